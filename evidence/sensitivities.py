"""How fragile each block is, measured other than by Fisher information (``train.fisher_sensitivity``, Eq. 14-15).

Every measure is a number per block, from the cross-entropy of calibration images in eval mode, divided by the largest
(Eq. 15). theta are ``block.parameters``, g is the gradient of the mean loss, H its Hessian. No network is changed.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress import eval_mode

PROBES = 16  # Rademacher vectors of the Hessian's trace
IMAGES_TOGETHER = 16  # of a second derivative, whose graph is large


def sensitivity(method: str, model: nn.Module, blocks, images: Tensor, labels: Tensor, generator) -> list[float]:
    """Return s_i in [0, 1] of every block: the measure ``method`` (gradient, snip, grasp or hessian) divided by the
    largest (Eq. 15); a negative trace counts as none, and all are ones where no block has any.

    images [N, 3, H, W], labels [N]; ``generator`` draws hessian's vectors. Raises FloatingPointError when a value is
    not finite.
    """
    measure = {"gradient": block_gradient, "snip": block_snip, "grasp": block_grasp, "hessian": block_hessian}[method]
    values = measure(model, blocks, images, labels, *([generator] if method == "hessian" else []))
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"sensitivity={method} is not finite: the network's loss or gradients overflow")
    values = [max(value, 0.0) for value in values]
    largest = max(values)
    return [value / largest for value in values] if largest > 0 else [1.0] * len(values)


def block_gradient(model, blocks, images, labels) -> list[float]:
    """Return the mean of |g_j| over each block's parameters."""
    gradients = _gradients(model, blocks, images, labels)
    return [sum(g.abs().sum().item() for _, g in pairs) / sum(g.numel() for _, g in pairs) for pairs in gradients]


def block_snip(model, blocks, images, labels) -> list[float]:
    """Return the sum of |theta_j g_j| over each block's parameters: SNIP (Lee et al. 2019, 1810.02340)."""
    gradients = _gradients(model, blocks, images, labels)
    return [sum((p.detach() * g).abs().sum().item() for p, g in pairs) for pairs in gradients]


def block_grasp(model, blocks, images, labels) -> list[float]:
    """Return |sum of -theta_j (H g)_j| over each block's parameters: by how much removing its weights changes the
    gradient's norm, to first order (GraSP, Wang et al. 2020, 2002.07376), H g over all blocks' parameters together."""
    flat = [p for params in _parameters(model, blocks) for p in params]
    gradient = [g for pairs in _gradients(model, blocks, images, labels) for _, g in pairs]
    return [abs(total) for total in _along(model, blocks, images, labels, [gradient], [[-p.detach() for p in flat]])]


def block_hessian(model, blocks, images, labels, generator, probes: int = PROBES) -> list[float]:
    """Return the trace of each block's diagonal part of H: the mean over ``probes`` of v^T H v, v drawn from {-1, 1}
    for all blocks at once (Hutchinson's estimator, as HAWQ-V2, Dong et al. 2020, 1911.03852)."""
    flat = [p for params in _parameters(model, blocks) for p in params]
    vectors = [[(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in flat] for _ in range(probes)]
    return [total / probes for total in _along(model, blocks, images, labels, vectors, vectors)]


def _parameters(model, blocks):
    named = dict(model.named_parameters(remove_duplicate=False))  # a shared tensor goes by each of its names
    return [[named[name] for name in block.parameters] for block in blocks]


@contextlib.contextmanager
def _trainable(parameters):
    """Parameters that want gradients inside, and what they wanted afterwards."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _grad(outputs, flat, **more):
    """torch.autograd.grad with zeros where a parameter takes no part."""
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(flat, torch.autograd.grad(outputs, flat, allow_unused=True, **more))]


def _losses(model, images, labels):
    """Yield the parts of the mean cross-entropy, IMAGES_TOGETHER images each."""
    for x, y in zip(images.split(IMAGES_TOGETHER), labels.split(IMAGES_TOGETHER)):
        yield F.cross_entropy(model(x), y, reduction="sum") / len(images)


def _gradients(model, blocks, images, labels):
    """Per block the pairs (theta, g) of its parameters."""
    wanted = _parameters(model, blocks)
    flat = [p for params in wanted for p in params]
    sums = [torch.zeros_like(p) for p in flat]
    with _trainable(flat), eval_mode(model):
        for loss in _losses(model, images, labels):
            for total, gradient in zip(sums, _grad(loss, flat)):
                total += gradient
    gradients = iter(sums)
    return [[(p, next(gradients)) for p in params] for params in wanted]


def _along(model, blocks, images, labels, vectors, others) -> list[float]:
    """Per block the sum over pairs (v, u) of u^T (H v), of the block's part of u and H v. ``vectors``, ``others``: the
    v and u, each a tensor per parameter of the blocks."""
    wanted = _parameters(model, blocks)
    flat, totals = [p for params in wanted for p in params], [0.0] * len(blocks)
    # Of the kinds of attention, only the plain one has a second derivative.
    with _trainable(flat), eval_mode(model), sdpa_kernel(SDPBackend.MATH):
        for loss in _losses(model, images, labels):
            first = _grad(loss, flat, create_graph=True)
            for v, u in zip(vectors, others, strict=True):
                along = sum((g * part).sum() for g, part in zip(first, v) if g.requires_grad)
                if isinstance(along, Tensor):  # else the loss is linear in every parameter
                    products = iter([(part * product).sum(dtype=torch.float64).item()
                                     for part, product in zip(u, _grad(along, flat, retain_graph=True))])
                    totals = [total + sum(next(products) for _ in params) for total, params in zip(totals, wanted)]
    return totals
