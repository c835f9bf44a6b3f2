"""How fragile each block is, other than by Fisher information (``train.fisher_sensitivity``, Eq. 14-15).

Every measure is a number per block, from the cross-entropy of calibration images in eval mode, and is divided by the
largest as in Eq. 15. theta are ``block.parameters``, as for the Fisher information. g: gradient of the loss's mean over
the images, H its Hessian. The network is left as it was.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress import eval_mode
from support.state import Progress
from train import fisher_sensitivity

PROBES = 16  # Rademacher vectors of the Hessian's trace
IMAGES_TOGETHER = 16  # of a second derivative, whose graph is large


def sensitivity(method: str, model: nn.Module, blocks, images: Tensor, labels: Tensor, generator,
                state: Progress = Progress()) -> list[float]:
    """s_i in [0, 1] of every block: the measure ``method`` (fisher, gradient, snip, grasp or hessian), divided by the
    largest (Eq. 15). images [N, 3, H, W], labels [N]; ``generator`` draws hessian's vectors.

    A negative trace counts as none, and all are ones where no block has any. What ``state`` knows of fisher and hessian
    from before the run was broken off is not computed again. Raises FloatingPointError when a value is
    not finite.
    """
    if method == "fisher":
        return fisher_sensitivity(model, blocks, images, labels, state)
    if method == "hessian":
        values = block_hessian(model, blocks, images, labels, generator, state=state)
    else:
        values = {"gradient": block_gradient, "snip": block_snip, "grasp": block_grasp}[method](
            model, blocks, images, labels)
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"sensitivity={method} is not finite: the network's loss or gradients overflow")
    values = [max(value, 0.0) for value in values]
    largest = max(values)
    return [value / largest for value in values] if largest > 0 else [1.0] * len(values)


def block_gradient(model, blocks, images, labels) -> list[float]:
    """Mean of |g_j| over each block's parameters."""
    gradients = _gradients(model, blocks, images, labels)
    return [sum(g.abs().sum().item() for _, g in pairs) / sum(g.numel() for _, g in pairs) for pairs in gradients]


def block_snip(model, blocks, images, labels) -> list[float]:
    """Sum of |theta_j g_j| over each block's parameters: connection sensitivity (SNIP, Lee et al. 2019, 1810.02340)."""
    gradients = _gradients(model, blocks, images, labels)
    return [sum((p.detach() * g).abs().sum().item() for p, g in pairs) for pairs in gradients]


def block_grasp(model, blocks, images, labels) -> list[float]:
    """|sum of -theta_j (H g)_j| over each block's parameters: by how much removing the block's weights changes the
    gradient's norm, to first order (GraSP, Wang et al. 2020, 2002.07376). H g is that of all blocks' parameters
    together; GraSP's sign tells pruning's help from its harm, a block's score is the magnitude."""
    flat = [p for params in _parameters(model, blocks) for p in params]
    gradient = [g for pairs in _gradients(model, blocks, images, labels) for _, g in pairs]
    return [abs(total) for total in _along(model, blocks, images, labels, [gradient], [[-p.detach() for p in flat]])]


def block_hessian(model, blocks, images, labels, generator, probes: int = PROBES,
                  state: Progress = Progress()) -> list[float]:
    """Trace of each block's diagonal part of H by Hutchinson's estimator, mean over ``probes`` of v^T H v with v drawn
    from {-1, 1} (HAWQ-V2, Dong et al. 2020, 1911.03852). v is over all blocks' parameters at once: the terms that
    cross blocks have mean zero."""
    flat = [p for params in _parameters(model, blocks) for p in params]
    vectors = [[(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in flat] for _ in range(probes)]
    return [total / probes for total in _along(model, blocks, images, labels, vectors, vectors, state)]


def _parameters(model, blocks):
    named = dict(model.named_parameters(remove_duplicate=False))  # a shared tensor goes by each of its names
    return [[named[name] for name in block.parameters] for block in blocks]


class _Trainable:
    """Parameters that want gradients inside, and what they wanted afterwards."""

    def __init__(self, parameters):
        self.frozen = [p for p in parameters if not p.requires_grad]

    def __enter__(self):
        for p in self.frozen:
            p.requires_grad_(True)

    def __exit__(self, *error):
        for p in self.frozen:
            p.requires_grad_(False)


def _grad(outputs, flat, **more):
    """torch.autograd.grad with zeros where a parameter takes no part."""
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(flat, torch.autograd.grad(outputs, flat, allow_unused=True, **more))]


def _gradients(model, blocks, images, labels):
    """Per block the pairs (theta, g) of its parameters."""
    wanted = _parameters(model, blocks)
    flat = [p for params in wanted for p in params]
    sums = [torch.zeros_like(p) for p in flat]
    with _Trainable(flat), eval_mode(model):
        for x, y in zip(images.split(IMAGES_TOGETHER), labels.split(IMAGES_TOGETHER)):
            loss = F.cross_entropy(model(x), y, reduction="sum") / len(images)
            for total, gradient in zip(sums, _grad(loss, flat)):
                total += gradient
    left = iter(sums)
    return [[(p, next(left)) for p in params] for params in wanted]


def _along(model, blocks, images, labels, vectors, others, state: Progress = Progress()) -> list[float]:
    """Per block the sum over pairs (v, u) of u^T (H v), of the block's part of u and H v. ``vectors``, ``others``: the v
    and u, each a tensor per parameter of the blocks. The sum goes batch by batch, pair by pair."""
    wanted = _parameters(model, blocks)
    flat, totals = [p for params in wanted for p in params], [0.0] * len(blocks)

    def added(first, v, u, more):
        """The sums with another pair's."""
        along = sum((g * part).sum() for g, part in zip(first, v) if g.requires_grad)
        if not isinstance(along, Tensor):  # a loss that is linear in every parameter
            return list(totals)
        products = iter(zip(u, _grad(along, flat, retain_graph=more)))
        return [total + sum((part * product).sum(dtype=torch.float64).item()
                            for part, product in (next(products) for _ in params))
                for total, params in zip(totals, wanted)]

    # Of the kinds of attention, only the plain one has a second derivative.
    with _Trainable(flat), eval_mode(model), sdpa_kernel(SDPBackend.MATH):
        for x, y in zip(images.split(IMAGES_TOGETHER), labels.split(IMAGES_TOGETHER)):
            loss = F.cross_entropy(model(x), y, reduction="sum") / len(images)
            first = _grad(loss, flat, create_graph=True)
            for n, (v, u) in enumerate(zip(vectors, others, strict=True)):
                totals = state.latest("Hessian", lambda: added(first, v, u, n + 1 < len(vectors))) or totals
    return totals
