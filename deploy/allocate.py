"""Moving a configuration onto a size: single steps of bits or channels, the cheapest in damage first.

The damage that a configuration does to a kernel W of block i is estimated as s_i / P_i ||W - W^||^2, W^ the kernel
after pruning and quantisation, P_i the block's kernel parameters. s_i is a Fisher information summed over the block's
parameters (Eq. 14-15), and to second order the loss moves by the mean one times the squared change of the weights,
however large the weights are (as HAWQ-V2's average Hessian trace, Dong et al. 2020, 1911.03852).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from itertools import product

import numpy as np

from compress import KernelConfig, NetworkConfig, channels_kept, compress_kernel, retained_weights
from config import LEVELS, InputError

CLOSENESS = 0.99  # a budget is met from this fraction of it upwards
SLOTS = 10_000  # parts into which least_sum divides a budget
COUNTS = 64  # about how many channel counts of a kernel the last resort tries


def enforce(blocks, config: NetworkConfig, sensitivity, limits, budget: float,
            cost=retained_weights) -> tuple[NetworkConfig, str]:
    """Move a configuration into [0.99 budget, budget] by single steps, the least damage per unit of cost first; return
    it and "", or one line that says why it ends below.

    blocks: with theta_0, never modified; ``sensitivity``: s_i per block; ``limits``: config.Compress; ``cost``: what a
    kernel takes, in the budget's unit: :func:`retained_weights` with rho_target * P, or compress.kernel_bytes.

    A step is one bit within [bits_min, bits_max], or one value of the agents' keep grid, 1 - j/14 max_pruning, that
    changes the number of channels; type and granularity stay. First come steps down, until the budget holds; then,
    below 0.99 of it, steps up that fit and undo most damage per cost; then single channels up; and at last the choice
    of least damage among all. Kernels above bits_max (FP32) are left alone while another has a step. Ties: the smaller
    change of the error, then the order of kernels. Raises InputError when the smallest configuration is too large.
    """
    kernels = [_Kernel(holder.weight, kernel, shape, s / chosen.params, limits, cost)
               for block, chosen, s in zip(blocks, config.blocks, sensitivity, strict=True)
               for holder, kernel, shape in zip(block.kernels.values(), chosen.kernels, chosen.shapes, strict=True)]
    if CLOSENESS * budget <= _total(kernels) <= budget:
        return config, ""
    _move(kernels, budget, -1)
    _move(kernels, budget, +1)
    _move(kernels, budget, +1, fine=True)
    largest = not any(kernel.steps(+1, fine=True) for kernel in kernels)
    if not largest and _total(kernels) < CLOSENESS * budget:
        _combine(kernels, budget)
    following, total = iter([kernel.at(kernel.now) for kernel in kernels]), _total(kernels)
    moved = NetworkConfig(tuple(replace(block, kernels=tuple(next(following) for _ in block.kernels))
                                for block in config.blocks))
    if total > budget:
        raise InputError(f"the target asks for {budget:,.6g}, but the smallest configuration takes {total:,.6g} (rho "
                         f"{math.ceil(1e4 * moved.retained) / 1e4:.4f}): lower compress.bits_min={limits.bits_min} or "
                         f"raise compress.max_pruning={limits.max_pruning:g}")
    if total >= CLOSENESS * budget:
        return moved, ""
    why = f"compress.bits_max={limits.bits_max} allows no more" if largest else "no choice lies within 1 % below it"
    return moved, f"the configuration takes {total:,.6g} of the {budget:,.6g} that it may take: {why}"


def least_sum(options, budget: float, at_least: float = 0.0, stay=None) -> list[int] | None:
    """Indices of one option per group whose costs sum to [at_least, budget] and whose damages have the least sum.

    options: per group a list of (cost, damage); None where no sum is within the bounds. By dynamic programming: of the
    choices for k groups ``stay(k, costs, damages)`` says which stay, or in each of SLOTS parts of the budget the best.
    """
    groups = [np.array(group, dtype=np.float64).T for group in options]
    least, most = sum(cost.min() for cost, _ in groups), sum(cost.max() for cost, _ in groups)
    total, damage, paths = np.zeros(1), np.zeros(1), []
    for k, (cost, more) in enumerate(groups, 1):
        least, most = least - cost.min(), most - cost.max()
        totals, damages = (total[:, None] + cost).ravel(), (damage[:, None] + more).ravel()
        within = np.flatnonzero((totals + least <= budget * (1 + 1e-13)) & (totals + most >= at_least))  # rounded sums
        if not len(within):
            return None
        if stay:
            states = within[stay(k, totals[within], damages[within])]
        else:
            within = within[np.argsort(damages[within], kind="stable")[::-1]]  # the last of a slot: the least damage
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
        self.limits, n_out = limits, shape.n_out
        self.now = config.bits, channels_kept(config.keep, n_out) if shape.prunable else n_out
        least = channels_kept(1 - limits.max_pruning, n_out) if shape.prunable else n_out
        grid = {channels_kept(1 - j / (LEVELS - 1) * limits.max_pruning, n_out) for j in range(LEVELS)}
        self.bits = sorted({config.bits, *range(limits.bits_min, limits.bits_max + 1)})
        self.coarse = sorted({self.now[1], *(kept for kept in grid if kept >= least)})
        self.fine = sorted({self.now[1], *range(least, n_out + 1)})
        self.cost = functools.cache(lambda choice: cost(self.at(choice), shape))  # in the budget's unit
        self.error = functools.cache(self._error)

    def at(self, choice) -> KernelConfig:
        """The configuration of a choice; keep within its bounds, and unchanged where the channels are."""
        (bits, kept), n_out = choice, self.shape.n_out
        if kept == channels_kept(self.config.keep, n_out):
            return replace(self.config, bits=bits)
        return replace(self.config, bits=bits, keep=max(kept / n_out, 1 - self.limits.max_pruning))

    def _error(self, choice) -> float:
        """||W - W^||^2 at a choice, summed in float64."""
        change = compress_kernel(self.weight, self.at(choice))[0].double() - self.weight.double()
        return change.square_().sum().item()

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


def _total(kernels) -> float:
    """Cost of the present choices."""
    return math.fsum(kernel.cost(kernel.now) for kernel in kernels)


def _move(kernels, budget, sign, fine=False) -> None:
    """Take steps down (sign -1) until the total fits, or steps up that fit until it is close."""
    top = budget * (1 - 1e-12)  # room for the rounding of a sum in another order
    steps = {}  # by kernel: what they are sorted by, the kernel's index, the choice, the change of the cost
    while (total := _total(kernels)) > top or sign > 0 and total < CLOSENESS * budget:
        for index, kernel in enumerate(kernels):
            if index not in steps:
                steps[index] = [(*kernel.price(c), index, c, kernel.cost(c) - kernel.cost(kernel.now))
                                for c in kernel.steps(sign, fine)]
        fitting = [step for own in steps.values() for step in own if sign < 0 or step[-1] <= top - total]
        if not fitting:
            return
        *_, index, kernels[index].now, _ = min(fitting)
        del steps[index]


def _combine(kernels, budget) -> None:
    """Take the least damage over all choices of the kernels that are not FP32, where some meet the budget. Only
    networks of a few small kernels come here."""
    choices = [[kernel.now] if kernel.now[0] > kernel.limits.bits_max else
               list(product(kernel.bits, kernel.fine[::1 + len(kernel.fine) // COUNTS])) for kernel in kernels]
    indices = least_sum([[(kernel.cost(c), kernel.sensitivity * kernel.error(c)) for c in own]
                         for kernel, own in zip(kernels, choices)], budget, CLOSENESS * budget)
    for kernel, own, index in zip(kernels, choices, indices or ()):
        kernel.now = own[index]
