"""How fragile each block is, measured other than by Fisher information (``train.fisher_sensitivity``, Eq. 14-15).

Every measure is a number per block, from the cross-entropy of calibration images in eval mode, divided by the largest
(Eq. 15). theta are ``block.parameters``, g is the gradient of the mean loss, H its Hessian. No network is changed.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import block_parameters
from train import max_normalised

PROBES = 16  # Rademacher vectors of the Hessian's trace
IMAGES_TOGETHER = 16  # of a second derivative, whose graph is large
# with zeros where a parameter takes no part
_grad = functools.partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)


def sensitivity(method: str, model: nn.Module, blocks, images: Tensor, labels: Tensor, generator) -> list[float]:
    """Return s_i in [0, 1] of every block: the measure ``method`` (gradient, snip, grasp or hessian) divided by the
    largest (Eq. 15); a negative trace counts as none, and all are ones where no block has any.

    images [N, 3, H, W], labels [N]; ``generator`` draws hessian's vectors. Raises FloatingPointError when a value is
    not finite.
    """
    return max_normalised(block_values(method, model, blocks, images, labels, generator), f"sensitivity={method}")


def block_values(method, model, blocks, images, labels, generator, probes: int = PROBES) -> list[float]:
    """Return a measure of every block, not divided by anything; see :func:`sensitivity` and the functions below."""
    def losses():  # the parts of the mean cross-entropy
        for x, y in zip(images.split(IMAGES_TOGETHER), labels.split(IMAGES_TOGETHER)):
            yield F.cross_entropy(model(x.clone()), y, reduction="sum") / len(images)

    with block_parameters(model, blocks) as (flat, owner):
        values = np.bincount(owner, hessian(flat, losses, generator, probes) if method == "hessian" else
                             {"gradient": gradient, "snip": snip, "grasp": grasp}[method](flat, losses))
    if method == "gradient":
        values = values / np.bincount(owner, [p.numel() for p in flat])
    return (np.abs(values) if method == "grasp" else values).tolist()


def gradient(flat, losses) -> list[float]:
    """Return the sum of |g_j| over each parameter; its mean over a block is the measure."""
    return [g.abs().sum().item() for g in _gradients(flat, losses)]


def snip(flat, losses) -> list[float]:
    """Return the sum of |theta_j g_j| over each parameter: SNIP (Lee et al. 2019, 1810.02340)."""
    return [(p.detach() * g).abs().sum().item() for p, g in zip(flat, _gradients(flat, losses))]


def grasp(flat, losses) -> np.ndarray:
    """Return the sum of theta_j (H g)_j over each parameter, H g over all blocks together; its size over a block is by
    how much removing the weights changes the gradient's norm, to first order (GraSP, Wang et al. 2020, 2002.07376)."""
    return _along(flat, losses, [_gradients(flat, losses)], [[p.detach() for p in flat]])


def hessian(flat, losses, generator, probes) -> np.ndarray:
    """Return the trace of each parameter's diagonal part of H: the mean over ``probes`` of v^T H v, v drawn from
    {-1, 1} for all blocks at once (Hutchinson's estimator, as HAWQ-V2, Dong et al. 2020, 1911.03852)."""
    vectors = [[(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in flat] for _ in range(probes)]
    return _along(flat, losses, vectors, vectors) / probes


def _gradients(flat, losses) -> list[Tensor]:
    """Return g, a tensor per parameter."""
    sums = [torch.zeros_like(p) for p in flat]
    for loss in losses():
        for total, part in zip(sums, _grad(loss, flat)):
            total += part
    return sums


def _along(flat, losses, vectors, others) -> np.ndarray:
    """Return per parameter the sum over pairs (v, u) of u^T (H v), of the parameter's part of u and H v. ``vectors``,
    ``others``: the v and u, each a tensor per parameter."""
    totals = np.zeros(len(flat))
    with sdpa_kernel(SDPBackend.MATH):  # of the kinds of attention, only the plain one has a second derivative
        for loss in losses():
            first = _grad(loss, flat, create_graph=True)
            for v, u in zip(vectors, others, strict=True):
                along = sum((g * part).sum() for g, part in zip(first, v))
                if along.requires_grad:  # else the loss is linear in every parameter
                    second = _grad(along, flat, retain_graph=True)
                    totals += [(part * product).sum(dtype=torch.float64).item() for part, product in zip(u, second)]
    return totals
