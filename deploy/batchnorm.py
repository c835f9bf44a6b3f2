"""BatchNorm's statistics, estimated again for weights that were put on their grids: a repair without any training."""

from __future__ import annotations

import torch
from torch import nn

from compress import eval_mode
from train import device_of


@torch.no_grad()
def estimate_batchnorm(model: nn.Module, images, batch_size: int, limit: int, generator) -> bool:
    """Set the running mean and variance of every BatchNorm to those of ``limit`` training images, means over batches.

    The images are augmented as in training, two or more at a time; everything else stays in eval mode. Changes the
    network in place; a BatchNorm that no image reaches, or that the network's own train() keeps in eval mode, keeps
    its statistics. Returns whether there was anything to estimate: a BatchNorm, and images.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
    if not norms or min(limit, len(images)) < 2:
        return False
    with eval_mode(model):
        model.train()
        norms = {norm: norm.momentum for norm in norms if norm.training}
        model.eval()
        for norm in norms:
            norm.train()
            for buffer in (norm.running_mean, norm.running_var):
                buffer.nan_to_num_()  # which the first batch's factor, 1, would not get rid of
        seen, batches = 0, images.batches(max(batch_size, 2), device_of(model), generator=generator, limit=limit)
        for x, _ in (batch for batch in batches if len(batch[0]) > 1):
            seen += len(x)
            for norm in norms:
                norm.momentum = len(x) / seen  # the cumulative mean
            model(x)
    for norm, momentum in norms.items():
        norm.momentum = momentum
    return bool(norms)
