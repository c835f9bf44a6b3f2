"""Moving a configuration onto a size: single steps of bits or channels, the cheapest in damage first.

The damage that a configuration does to a kernel W of block i is estimated as s_i / P_i ||W - W^||^2, W^ the kernel
after pruning and quantisation, P_i the block's kernel parameters. s_i is a Fisher information summed over the block's
parameters (Eq. 14-15), and to second order the loss moves by the mean one times the squared change of the weights,
however large the weights are (as HAWQ-V2's average Hessian trace, Dong et al. 2020, 1911.03852).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from compress import (FULL_BITS, GRANULARITIES, QTYPES, BlockConfig, KernelConfig, KernelShape, NetworkConfig,
                      channels_kept, compress_kernel, kernel_retained)
from config import LEVELS, InputError

CLOSENESS = 0.99  # a budget is met from this fraction of it upwards
SLOTS = 10_000  # parts into which the last resort divides a budget
COUNTS = 64  # about how many channel counts of a kernel it tries


@dataclass(frozen=True)
class Enforced:
    """What :func:`enforce` made of a configuration. ``moves``: kernels' moves from one choice to the next; ``reached``:
    whether the cost is in [0.99 budget, budget], if not it is below and ``note`` says why, in one line."""
    config: NetworkConfig
    moves: int
    reached: bool
    note: str = ""


def retained_weights(config: KernelConfig, shape: KernelShape) -> float:
    """FP32-equivalent weights that stay: rho_ik P_ik. Summed over a network and divided by P it is rho (Eq. 31)."""
    return kernel_retained(config, shape.n_out) * shape.params


def enforce(blocks, config: NetworkConfig, sensitivity, limits, budget: float, cost=retained_weights) -> Enforced:
    """Move a configuration into [0.99 budget, budget] by single steps, the least damage per unit of cost first.

    blocks: holders with theta_0, never modified; ``sensitivity``: s_i per block; ``limits``: config.Compress;
    ``cost(kernel_config, kernel_shape)``: what a kernel takes, in the budget's unit: :func:`retained_weights` with
    rho_target * P, or compress.kernel_bytes with bytes. A configuration within the budget stays as it is.

    A step is one bit within [bits_min, bits_max], or one value of the agents' keep grid, 1 - j/14 max_pruning, that
    changes the number of channels; ``qtype`` and granularity stay. Above the budget: the steps down whose damage per
    cost saved is least, until it fits. Then, below 0.99 of it: the steps up that fit and undo most damage per cost;
    after those single channels; and at last the choice of least damage among all. Kernels above bits_max (FP32) are
    left alone while another kernel has a step. Ties: the smaller change of the error, then the order of kernels.
    Raises InputError when even the smallest configuration is above the budget, ValueError when ``config`` or
    ``sensitivity`` is for another number of blocks or kernels.
    """
    kernels = [_Kernel(holder.weight, kernel, shape, s / chosen.params, limits, cost)
               for block, chosen, s in zip(blocks, config.blocks, sensitivity, strict=True)
               for holder, kernel, shape in zip(block.kernels.values(), chosen.kernels, chosen.shapes, strict=True)]
    allocator = _Allocator(kernels, budget)
    if allocator.met:
        return Enforced(config, 0, True)
    allocator.go(-1)
    if allocator.total > budget:
        rho = math.ceil(1e4 * allocator.config(config).retained) / 1e4
        raise InputError(f"the target asks for {budget:,.6g}, but the smallest configuration takes "
                         f"{allocator.total:,.6g} (rho {rho:.4f}): lower compress.bits_min={limits.bits_min} or raise "
                         f"compress.max_pruning={limits.max_pruning:g}")
    allocator.go(+1)
    allocator.go(+1, fine=True)
    note = ""
    if not allocator.met and not any(kernel.steps(+1, fine=True) for kernel in kernels):
        note = (f"the largest configuration takes {allocator.total:,.6g}: compress.bits_max={limits.bits_max} allows "
                "no more")
    elif not allocator.met and not allocator.combine():
        note = f"no choice of bits and channels lies within 1 % below it, this one takes {allocator.total:,.6g}"
    return Enforced(allocator.config(config), allocator.moves, not note,
                    note and f"the target of {budget:,.6g} is not met: {note}")


def allocations(blocks, shapes, sensitivity, limits, target: float) -> list[Enforced]:
    """Everything at its largest, then the steps down of least damage per weight saved, until at most ``target`` is
    retained: with bits alone, as HAWQ-V2 allocates, where that can meet it, and with bits and keep.

    shapes: per block the kernels' KernelShape. Where types and granularities are free, each kernel has those of the
    least error at the bits that the target means. Raises InputError where the target is out of reach.
    """
    middle = min(max(round(FULL_BITS * target), limits.bits_min), limits.bits_max)
    types = QTYPES if limits.qtype == "any" else (limits.qtype,)
    granularities = GRANULARITIES if limits.granularity == "any" else (limits.granularity,)

    def start(holder):
        weight = holder.weight.detach()
        choices = [KernelConfig(middle, 1.0, *kind) for kind in product(types, granularities)]
        if len(choices) > 1:
            choices.sort(key=lambda choice: (compress_kernel(weight, choice)[0] - weight).square().sum().item())
        return replace(choices[0], bits=limits.bits_max)

    largest = NetworkConfig(tuple(BlockConfig(tuple(map(start, block.kernels.values())), tuple(own))
                                  for block, own in zip(blocks, shapes, strict=True)))
    alone = limits.bits_min / FULL_BITS <= target
    return [enforce(blocks, largest, sensitivity, bounds, target * largest.params)
            for bounds in ([replace(limits, max_pruning=0.0)] if alone else []) + [limits]]


def least_sum(options, budget: float, at_least: float = 0.0) -> list[int] | None:
    """Indices of one option per group whose costs sum to [at_least, budget] and whose damages have the least sum.

    options: per group a list of (cost, damage). By dynamic programming over the total cost so far in SLOTS parts of the
    budget, of which each keeps the least damage; None where no sum is within the bounds.
    """
    groups = [np.array(group, dtype=np.float64).T for group in options]
    least, most = sum(cost.min() for cost, _ in groups), sum(cost.max() for cost, _ in groups)
    total, damage, paths = np.zeros(1), np.zeros(1), []
    for cost, more in groups:
        least, most = least - cost.min(), most - cost.max()
        totals, damages = (total[:, None] + cost).ravel(), (damage[:, None] + more).ravel()
        within = np.flatnonzero((totals + least <= budget) & (totals + most >= at_least))
        if not len(within):
            return None
        within = within[np.argsort(damages[within], kind="stable")[::-1]]  # the last of a slot stays: the least damage
        states = np.full(SLOTS + 2, -1)
        states[(totals[within] / budget * SLOTS).astype(np.int64)] = within
        states = states[states >= 0]
        paths.append(np.divmod(states, len(cost)))  # state before, option
        total, damage = totals[states], damages[states]
    state, chosen = int(damage.argmin()), []
    for before, option in reversed(paths):
        chosen.append(int(option[state]))
        state = before[state]
    return chosen[::-1]


class _Kernel:
    """The choices of one kernel, pairs (bits, channels kept): the present one, their costs, and their damage."""

    def __init__(self, weight, config, shape, sensitivity, limits, cost):
        self.weight, self.config, self.shape, self.sensitivity = weight.detach(), config, shape, sensitivity
        self.limits, self.cost_of = limits, cost
        n_out = shape.n_out
        self.now = config.bits, channels_kept(config.keep, n_out) if shape.prunable else n_out
        least = channels_kept(1 - limits.max_pruning, n_out) if shape.prunable else n_out
        grid = {channels_kept(1 - j / (LEVELS - 1) * limits.max_pruning, n_out) for j in range(LEVELS)}
        self.bits = sorted({config.bits, *range(limits.bits_min, limits.bits_max + 1)})
        self.coarse = sorted({self.now[1], *(kept for kept in grid if kept >= least)})
        self.fine = sorted({self.now[1], *range(least, n_out + 1)})
        self.costs, self.errors = {}, {}

    def at(self, choice) -> KernelConfig:
        """The configuration of a choice; keep within its bounds, and unchanged where the channels are."""
        (bits, kept), n_out = choice, self.shape.n_out
        if kept == channels_kept(self.config.keep, n_out):
            return replace(self.config, bits=bits)
        return replace(self.config, bits=bits, keep=max(kept / n_out, 1 - self.limits.max_pruning))

    def cost(self, choice) -> float:
        """Cost of a choice, in the budget's unit."""
        if choice not in self.costs:
            self.costs[choice] = self.cost_of(self.at(choice), self.shape)
        return self.costs[choice]

    def error(self, choice) -> float:
        """||W - W^||^2 at a choice, summed in float64."""
        if choice not in self.errors:
            change = compress_kernel(self.weight, self.at(choice))[0].double() - self.weight.double()
            self.errors[choice] = change.square_().sum().item()
        return self.errors[choice]

    def steps(self, sign, fine=False) -> list:
        """The nearest choices that cost more (sign 1) or less (-1): one in channels, one in bits. A nearer one may not:
        in bytes, the first channel that goes brings the map of channels with it."""
        bits, kept = self.now
        paths = ([(bits, n) for n in (self.fine if fine else self.coarse)[::sign] if sign * (n - kept) > 0],
                 [(b, kept) for b in self.bits[::sign] if sign * (b - bits) > 0])
        nearest = (next((c for c in path if sign * (self.cost(c) - self.cost(self.now)) > 0), None) for path in paths)
        return [choice for choice in nearest if choice]

    def price(self, choice) -> tuple[bool, float, float]:
        """What steps are sorted by: whether to leave the kernel alone, then the change of the damage, then of the
        error, both per change of cost."""
        change = (self.error(choice) - self.error(self.now)) / abs(self.cost(choice) - self.cost(self.now))
        return self.now[0] > self.limits.bits_max, self.sensitivity * change, change


class _Allocator:
    """The kernels of a network on their way into a budget."""

    def __init__(self, kernels, budget):
        self.kernels, self.budget, self.moves = kernels, budget, 0
        self.top = budget * (1 - 1e-12)  # room for the rounding of a sum in another order

    @property
    def total(self) -> float:
        """Cost of the present choices."""
        return math.fsum(kernel.cost(kernel.now) for kernel in self.kernels)

    @property
    def met(self) -> bool:
        """Whether the budget is met within 1 %."""
        return CLOSENESS * self.budget <= self.total <= self.budget

    def config(self, start: NetworkConfig) -> NetworkConfig:
        """The configuration of the present choices."""
        kernels = iter([kernel.at(kernel.now) for kernel in self.kernels])
        return NetworkConfig(tuple(BlockConfig(tuple(next(kernels) for _ in block.kernels), block.shapes)
                                   for block in start.blocks))

    def go(self, sign, fine=False) -> None:
        """Steps down (sign -1) until the total fits, or steps up that fit until it is close."""
        steps = {}  # by kernel: what they are sorted by, the kernel's index, the choice, the change of the cost
        while self.total > self.top if sign < 0 else self.total < CLOSENESS * self.budget:
            for index, kernel in enumerate(self.kernels):
                if index not in steps:
                    steps[index] = [(*kernel.price(c), index, c, kernel.cost(c) - kernel.cost(kernel.now))
                                    for c in kernel.steps(sign, fine)]
            room = self.top - self.total
            fitting = [step for own in steps.values() for step in own if sign < 0 or step[-1] <= room]
            if not fitting:
                return
            *_, index, choice, _ = min(fitting)
            self.kernels[index].now, self.moves = choice, self.moves + 1
            del steps[index]

    def combine(self) -> bool:
        """Take the least damage over all choices of the kernels that are not FP32; whether that meets the budget, and
        if not nothing moves. Only networks of a few small kernels come here: with more, single steps suffice."""
        choices = [[kernel.now] if kernel.now[0] > kernel.limits.bits_max else
                   list(product(kernel.bits, kernel.fine[::1 + len(kernel.fine) // COUNTS])) for kernel in self.kernels]
        indices = least_sum([[(kernel.cost(c), kernel.sensitivity * kernel.error(c)) for c in own]
                             for kernel, own in zip(self.kernels, choices)], self.budget, CLOSENESS * self.budget)
        for kernel, own, index in zip(self.kernels, choices, indices or ()):
            self.moves, kernel.now = self.moves + (kernel.now != own[index]), own[index]
        return self.met
