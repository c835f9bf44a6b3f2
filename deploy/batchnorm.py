"""BatchNorm's statistics, estimated again for weights that were put on their grids: a repair without any training."""

from __future__ import annotations

import torch
from torch import nn

from compress import eval_mode
from train import device_of


@torch.no_grad()
def estimate_batchnorm(model: nn.Module, images, batch_size: int, limit: int, generator) -> bool:
    """Set the running mean and variance of every BatchNorm to the mean over batches of ``limit`` training images.

    The images are augmented as in training; everything else stays in eval mode. Changes the network in place; one that
    no image reaches keeps its statistics. Returns whether there was anything to estimate: a BatchNorm, and images.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or min(limit, len(images)) < 2:
        return False
    momenta = [norm.momentum for norm in norms]
    given = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative mean
            norm.train()
        for x, _ in images.batches(batch_size, device_of(model), generator=generator, limit=limit):
            if len(x) > 1:
                model(x)
    for norm, momentum, before in zip(norms, momenta, given):
        norm.momentum = momentum
        if not norm.num_batches_tracked:
            norm.load_state_dict(before, strict=False)
    return True
