"""Making a voted configuration meet a size: single steps of bits or channels, the cheapest in damage first.

The damage that a configuration does to a kernel W of block i is estimated as s_i / P_i ||W - W^||^2, W^ the kernel
after pruning and quantisation, P_i the block's kernel parameters. s_i is a Fisher information summed over the block's
parameters (Eq. 14-15), and to second order the loss moves by the mean one times the squared change of the weights,
however large the weights are (as HAWQ-V2's average Hessian trace, Dong et al. 2020, 1911.03852).
"""

from __future__ import annotations

import heapq
import math
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from itertools import product

import torch

from compress import (FULL_BITS, GRANULARITIES, QTYPES, BlockConfig, KernelConfig, KernelShape, NetworkConfig,
                      channels_kept, compress_kernel, kernel_retained, quantize)
from config import InputError
from search import LEVELS

CLOSENESS = 0.99  # a budget is met from this fraction of it upwards
SLOTS = 10_000  # into how many parts the last resort divides a budget
COUNTS = 64  # about how many channel counts of a kernel it tries


# ---------------------------------------------------------------------------------------------------------------
# Meeting a budget


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
    rho_target * P, or compress.kernel_bytes with bytes. A configuration that is there already stays as it is.

    A step is one bit within [bits_min, bits_max], or one value of the agents' keep grid, 1 - j/14 max_pruning, that
    changes the number of channels; ``qtype`` and granularity stay. Above the budget: the steps down whose damage per
    cost saved is least, until it fits. Then, below 0.99 of it: the steps up that fit and undo most damage per cost;
    after those single channels; then a step up that does not fit, paid for by single channels; and at last the choice
    of least damage among all. Kernels above bits_max (FP32) are left alone while another kernel has a step. Ties: the
    smaller change of the error, then the order of kernels. Raises InputError when even the smallest configuration is
    above the budget, ValueError when ``config`` or ``sensitivity`` is for another number of blocks or kernels.
    """
    kernels = [_Kernel(holder.weight, kernel, shape, s / chosen.params, limits, cost)
               for block, chosen, s in zip(blocks, config.blocks, sensitivity, strict=True)
               for holder, kernel, shape in zip(block.kernels.values(), chosen.kernels, chosen.shapes, strict=True)]
    walk = _Walk(kernels, budget)
    if walk.met:
        return Enforced(config, 0, True)
    walk.go(-1)
    if walk.total > budget:
        rho = math.ceil(1e4 * walk.config(config).retained) / 1e4
        raise InputError(f"the target asks for {budget:,.6g}, but the smallest configuration takes {walk.total:,.6g} "
                         f"(rho {rho:.4f}): lower compress.bits_min={limits.bits_min} or raise "
                         f"compress.max_pruning={limits.max_pruning:g}")
    walk.go(+1)
    walk.go(+1, fine=True)
    if not walk.met and not any(kernel.steps(+1, fine=True) for kernel in kernels):
        note = f"the largest configuration takes {walk.total:,.6g}: compress.bits_max={limits.bits_max} allows no more"
    elif walk.met or walk.swap() or walk.combine():
        return Enforced(walk.config(config), walk.moves, True)
    else:
        note = f"no choice of bits and channels lies within 1 % below it, this one takes {walk.total:,.6g}"
    return Enforced(walk.config(config), walk.moves, False, f"the target of {budget:,.6g} is not met: {note}")


def allocations(blocks, shapes, sensitivity, limits, target: float) -> list[Enforced]:
    """Everything at its largest, then the steps down of least damage per weight saved, until the retained fraction is at
    most ``target``: with bits alone, as HAWQ-V2 allocates, where that can meet it, and with bits and keep.

    shapes: per block the kernels' KernelShape. Where types and granularities are free, each kernel has those of the least
    error at the bits that the target means. Raises InputError where the target is out of reach.
    """
    middle = min(max(round(FULL_BITS * target), limits.bits_min), limits.bits_max)
    types = QTYPES if limits.qtype == "any" else (limits.qtype,)
    granularities = GRANULARITIES if limits.granularity == "any" else (limits.granularity,)

    def start(holder):
        choices = [KernelConfig(middle, 1.0, t, g) for t in types for g in granularities]
        weight = holder.weight.detach()
        errors = [(compress_kernel(weight, c)[0] - weight).square().sum().item() for c in choices] \
            if len(choices) > 1 else [0.0]
        return replace(choices[errors.index(min(errors))], bits=limits.bits_max)

    largest = NetworkConfig(tuple(BlockConfig(tuple(map(start, block.kernels.values())), tuple(own))
                                  for block, own in zip(blocks, shapes, strict=True)))
    alone = limits.bits_min / FULL_BITS <= target
    return [enforce(blocks, largest, sensitivity, bounds, target * largest.params)
            for bounds in ([replace(limits, max_pruning=0.0)] if alone else []) + [limits]]


class _Kernel:
    """A kernel's choices, pairs (bits, channels kept): where it is, what a choice costs, what damage it does."""

    def __init__(self, weight, config, shape, sensitivity, limits, cost):
        self.weight, self.config, self.shape, self.sensitivity = weight.detach(), config, shape, sensitivity
        self.limits, self.cost_of = limits, cost
        n_out = shape.n_out
        free = getattr(shape, "prunable", True)
        self.now = config.bits, channels_kept(config.keep, n_out) if free else n_out
        self.least = channels_kept(1 - limits.max_pruning, n_out) if free else n_out
        grid = {channels_kept(1 - j / (LEVELS - 1) * limits.max_pruning, n_out) for j in range(LEVELS)}
        self.bits = sorted({config.bits, *range(limits.bits_min, limits.bits_max + 1)})
        self.coarse = sorted({self.now[1], *(kept for kept in grid if kept >= self.least)})
        self.fine = sorted({self.now[1], *range(self.least, n_out + 1)})
        self.costs, self.errors = {}, {}

    def at(self, choice) -> KernelConfig:
        """The configuration of a choice; keep within its bounds, and as it was where the channels are."""
        (bits, kept), n_out = choice, self.shape.n_out
        if kept == channels_kept(self.config.keep, n_out):
            return replace(self.config, bits=bits)
        return replace(self.config, bits=bits, keep=max(kept / n_out, 1 - self.limits.max_pruning))

    def cost(self, choice) -> float:
        if choice not in self.costs:
            self.costs[choice] = self.cost_of(self.at(choice), self.shape)
        return self.costs[choice]

    @cached_property
    def rows(self):
        """Order of the channels by falling norm, as in prune_mask, and for every n >= 0 what all but the first n
        contribute to the error."""
        values = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).flatten(1)
        order = torch.sort(torch.linalg.vector_norm(values, dim=1), descending=True, stable=True).indices
        squares = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()[order]
        return order, [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]

    def error(self, choice) -> float:
        """||W - W^||^2 of compress_kernel at a choice, summed in float64."""
        if choice not in self.errors:
            (bits, kept), (order, pruned) = choice, self.rows
            rows = self.weight if kept == self.shape.n_out else self.weight[order[:kept]]
            lost = 0.0
            if bits < FULL_BITS:
                quantized = quantize(rows, bits, self.config.qtype, self.config.granularity)
                lost = (rows.float() - quantized.float()).square_().sum(dtype=torch.float64).item()
            self.errors[choice] = pruned[kept] + lost
        return self.errors[choice]

    def steps(self, sign, fine=False, bits_too=True) -> list:
        """The nearest choices that cost more (sign 1) or less (-1): one in bits, one in channels. A nearer one may not:
        in bytes, the first channel that goes brings the map of channels with it."""
        bits, kept = self.now
        paths = [[(bits, n) for n in (self.fine if fine else self.coarse)[::sign] if sign * (n - kept) > 0]]
        if bits_too:
            paths.append([(b, kept) for b in self.bits[::sign] if sign * (b - bits) > 0])
        found = (next((c for c in path if sign * (self.cost(c) - self.cost(self.now)) > 0), None) for path in paths)
        return [choice for choice in found if choice]

    def price(self, choice) -> tuple[bool, float, float]:
        """What steps are sorted by: whether to leave the kernel alone, then the change of the damage, then of the
        error, both per change of cost."""
        change = (self.error(choice) - self.error(self.now)) / abs(self.cost(choice) - self.cost(self.now))
        return self.now[0] > self.limits.bits_max, self.sensitivity * change, change


class _Walk:
    """The kernels on their way into a budget."""

    def __init__(self, kernels, budget):
        self.kernels, self.budget, self.moves = kernels, budget, 0
        self.top = budget * (1 - 1e-12)  # room for the rounding of a sum in another order

    @property
    def total(self) -> float:
        return math.fsum(kernel.cost(kernel.now) for kernel in self.kernels)

    @property
    def met(self) -> bool:
        return CLOSENESS * self.budget <= self.total <= self.budget

    def config(self, start: NetworkConfig) -> NetworkConfig:
        """The configuration of where the kernels are."""
        left = iter(self.kernels)
        return NetworkConfig(tuple(
            BlockConfig(tuple((kernel := next(left)).at(kernel.now) for _ in block.kernels), block.shapes)
            for block in start.blocks))

    def fits(self, total: float, kernel, choice) -> bool:
        return total + kernel.cost(choice) - kernel.cost(kernel.now) <= self.top

    def go(self, sign, fine=False, bits_too=True) -> None:
        """Steps down (sign -1) until the total fits, or steps up that fit until it is close."""
        heap, total = [], self.total

        def push(index):
            kernel = self.kernels[index]
            for choice in kernel.steps(sign, fine, bits_too):
                if sign < 0 or self.fits(total, kernel, choice):  # what does not fit now never will: the total grows
                    heapq.heappush(heap, (*kernel.price(choice), index, kernel.now, choice))

        def done():
            return total <= self.top if sign < 0 else total >= CLOSENESS * self.budget

        if not done():
            for index in range(len(self.kernels)):
                push(index)
        while heap and not done():
            *_, index, origin, choice = heapq.heappop(heap)
            kernel = self.kernels[index]
            if kernel.now == origin and (sign < 0 or self.fits(total, kernel, choice)):
                kernel.now = choice
                self.moves, total = self.moves + 1, self.total
                push(index)

    def swap(self) -> bool:
        """A step up that is too large, and single channels that pay for it; whether that meets the budget."""
        start, moves = [kernel.now for kernel in self.kernels], self.moves
        steps = [(*kernel.price(choice), index, choice) for index, kernel in enumerate(self.kernels)
                 for choice in kernel.steps(+1, fine=True)]
        for *_, index, choice in sorted(steps):
            self.kernels[index].now, self.moves = choice, moves + 1
            self.go(-1, fine=True, bits_too=False)
            self.go(+1, fine=True)
            if self.met:
                return True
            for kernel, before in zip(self.kernels, start):
                kernel.now = before
        self.moves = moves
        return False

    def combine(self) -> bool:
        """The least damage over all choices of all kernels, by dynamic programming over the total so far, in SLOTS
        parts of the budget; whether that meets it, and if not nothing moves. Only networks of a few small kernels come
        here: with more, or with more channels, single steps or swaps are fine enough."""
        options = [[(kernel.cost(c), kernel.sensitivity * kernel.error(c), c)
                    for c in product(kernel.bits, kernel.fine[::1 + len(kernel.fine) // COUNTS])]
                   for kernel in self.kernels]
        least = sum(min(option)[0] for option in options)
        most = sum(max(option)[0] for option in options)
        states = {0: (0.0, 0.0, ())}  # part of the budget → damage, total, choices
        for option in options:
            least, most, following = least - min(option)[0], most - max(option)[0], {}
            for damage, total, choices in states.values():
                for cost, more, choice in option:
                    after, slot = total + cost, int((total + cost) / self.budget * SLOTS)
                    if after + least <= self.budget and after + most >= CLOSENESS * self.budget and (
                            slot not in following or damage + more < following[slot][0]):
                        following[slot] = damage + more, after, (*choices, choice)
            states = following
        if states:
            for kernel, choice in zip(self.kernels, min(states.values())[2]):
                self.moves, kernel.now = self.moves + (kernel.now != choice), choice
        return self.met


# ---------------------------------------------------------------------------------------------------------------
# Goals, and giving bits back


@dataclass(frozen=True)
class Goal:
    """What a network is to come to; None where nothing is asked. ``max_bytes``: its size; ``min_cr``: its CR;
    ``max_drop``: its accuracy drop in percentage points."""
    max_bytes: int | None = None
    min_cr: float | None = None
    max_drop: float | None = None

    @property
    def has_size(self) -> bool:
        """Whether the network's size is part of it."""
        return self.max_bytes is not None or self.min_cr is not None


UNITS = {"b": 1, "kb": 10**3, "mb": 10**6}
CONDITION = re.compile(r"(?:(size)(?::|<=)|(cr)(?::|>=)|(drop)(?::|<=))"
                       r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)([km]?b)?")


def parse_goal(text: str) -> Goal | None:
    """The goal of a text such as "size:1.5MB, drop<=1"; None for an empty one. Case and spaces do not matter.

    MB is 10^6 bytes, kB 10^3; a size is cut to whole bytes. Raises InputError for a condition that is unknown or
    repeated, and a number that is not finite or not positive (a drop may be 0).
    """
    joined = "".join(text.split()).lower()
    found = {}
    for part in joined.split(",") if joined else ():
        match = CONDITION.fullmatch(part)
        size, cr, drop, number, unit = match.groups() if match else (None,) * 5
        name, value = size or cr or drop, float(number or "nan")
        if size and unit and math.isfinite(value):
            value = int(Decimal(number) * UNITS[unit])
        if (not match or bool(size) != bool(unit) or name in found or not math.isfinite(value)
                or (value <= 0 and not drop)):
            raise InputError(f"goal={' '.join(text.split())}: '{part}' is not a condition or comes twice; expected one "
                             "or more of size:1.5MB (or kB, B; also size<=1.5MB), cr:8 (cr>=8), drop:1 (drop<=1), "
                             "separated by commas")
        found[name] = value
    return Goal(found.get("size"), found.get("cr"), found.get("drop")) if found else None


def max_give_back(config: NetworkConfig) -> int:
    """The ``count`` at which :func:`give_back` has given everything back: two levels per block."""
    return 2 * len(config.blocks)


def give_back(config: NetworkConfig, sensitivity, count: int, limits) -> NetworkConfig:
    """The configuration with its ``count`` most sensitive blocks uncompressed as far as the bounds allow.

    They get limits.bits_max bits, or what they have where that is more, and keep 1; type and granularity stay. Once
    every block of B has that, the most sensitive ``count`` - B go back to FP32, until :func:`max_give_back`. Ties: the
    earlier block. Raises ValueError for a count outside 0…2 B or another number of sensitivities.
    """
    blocks = len(config.blocks)
    if len(sensitivity) != blocks or not 0 <= count <= max_give_back(config):
        raise ValueError(f"count={count} and {len(sensitivity)} sensitivities for {blocks} blocks")
    order = sorted(range(blocks), key=lambda i: -sensitivity[i])
    given, full = set(order[:count]), set(order[:max(0, count - blocks)])

    def returned(index, kernel):
        if index not in given:
            return kernel
        return replace(kernel, bits=FULL_BITS if index in full else max(kernel.bits, limits.bits_max), keep=1.0)

    return NetworkConfig(tuple(replace(block, kernels=tuple(returned(i, kernel) for kernel in block.kernels))
                               for i, block in enumerate(config.blocks)))
