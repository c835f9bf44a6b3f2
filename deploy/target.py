"""Goals (a size, a compression ratio, an accuracy drop), and what they add to the loop of Algorithm 1: past the paper.

:class:`Demands` is all that the loop asks. Without a goal, ``enforce_target`` or ``relax`` it changes nothing: what was
voted is taken, and the cycle of the highest accuracy is kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from decimal import Decimal

from compress import FULL_BITS, BlockConfig, KernelConfig, NetworkConfig, kernel_bytes, retained_weights
from config import BASELINES, Config, InputError, get, override
from deploy.allocate import enforce

ROUNDING = 1e-9  # points, of a difference of two accuracies
INDEX_ROOM = 256  # bytes by which the compressed index of a packed file may differ between configurations


@dataclass(frozen=True)
class Goal:
    """What a network is to come to; None where nothing is asked."""
    max_bytes: int | None = None  # of the packed file
    min_cr: float | None = None
    max_drop: float | None = None  # of the packed file's accuracy, points

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
    joined, values = "".join(text.split()).lower(), {}
    for part in joined.split(",") if joined else ():
        match = CONDITION.fullmatch(part)
        size, cr, drop, number, unit = match.groups() if match else (None,) * 5
        name, value = size or cr or drop, float(number or "nan")
        if size and unit and math.isfinite(value):
            value = int(Decimal(number) * UNITS[unit])
        if (not match or bool(size) != bool(unit) or name in values or not math.isfinite(value)
                or (value <= 0 and not drop) or (cr and value > 100)):
            raise InputError(f"goal={' '.join(text.split())}: '{part}' is unknown or comes twice; expected, with "
                             "commas between, size:1.5MB (or kB, B; also size<=1.5MB), cr:8 (cr>=8, up to 100), drop:1")
        values[name] = value
    return Goal(values.get("size"), values.get("cr"), values.get("drop")) if values else None


def give_back(config: NetworkConfig, sensitivity, count: int, limits) -> NetworkConfig:
    """The configuration with its ``count`` most sensitive blocks (ties: the earlier) at keep 1 and limits.bits_max, or
    the bits that they have where that is more. Of B blocks the most sensitive ``count`` - B go back to FP32."""
    blocks = list(config.blocks)
    for rank, i in enumerate(sorted(range(len(blocks)), key=lambda i: -sensitivity[i])[:count]):
        bits = FULL_BITS if rank < count - len(blocks) else limits.bits_max
        blocks[i] = replace(blocks[i], kernels=tuple(
            replace(k, bits=max(k.bits, bits), keep=1.0) for k in blocks[i].kernels))
    return NetworkConfig(tuple(blocks))


def resolved(config: Config, params: int, model_bytes: int) -> Config:
    """The settings with rho_target and delta_max as a goal has them, without a surrogate where no search asks it. Of a
    file's size the target is what the kernels may take, as if it had no index.

    params: FP32 parameters of all kernels; ``model_bytes``: of the network's state dict.
    """
    goal = parse_goal(config.goal) or Goal()
    settings = {"surrogate.enabled": False} if config.search.method in (*BASELINES, "null") else {}
    settings |= {} if goal.max_drop is None else {"search.max_drop": goal.max_drop}
    targets = [] if goal.min_cr is None else [1 / goal.min_cr]
    if goal.max_bytes is not None:
        rest = (model_bytes - 4 * params) // (2 if config.pack.rest == "float16" else 1)  # bytes besides the kernels
        targets.append((goal.max_bytes - rest) / (4 * params))
    return override(config, settings | ({"search.target": min(max(min(targets), 0.01), 1.0)} if targets else {}))


class Demands:
    """What a goal, an enforced target and relaxing add to the loop.

    config: of :func:`resolved`; blocks: hold theta_0 whenever :meth:`chosen` is called; ``sensitivity``: s_i;
    ``baseline_acc``: points; ``file_bytes(NetworkConfig)``: of the packed file of theta_0 so compressed; log:
    support.log.Log. A row has acc, deployed_acc (points), packed_bytes and cr.
    """

    def __init__(self, config: Config, blocks, sensitivity, baseline_acc: float, file_bytes, log):
        self.config, self.blocks, self.sensitivity = config, blocks, sensitivity
        self.baseline_acc, self.file_bytes, self.log = baseline_acc, file_bytes, log
        self.goal = parse_goal(config.goal)

    def check_sizes(self, shapes) -> None:
        """Raise InputError for a size that no configuration within the bounds has; shapes: KernelShape, per block."""
        limits, goal, target = self.config.compress, self.goal, self.config.search.target
        smallest = _smallest(shapes, limits)
        if goal and goal.max_bytes is not None and (least := self.file_bytes(smallest)) > goal.max_bytes:
            more = [f"{key}={value}" for key, value in (("compress.scope", "all"), ("pack.rest", "float16"))
                    if get(self.config, key) != value]
            raise InputError(f"goal={self.config.goal}: the file takes at least {least:,} bytes, "
                             f"{least - smallest.kernels_bytes:,} of them for what is not compressed; ask for more"
                             f"{' or try ' * bool(more) + ' '.join(more)}")
        if (_asks_ratio(self.config, goal) or self.config.search.method in BASELINES) and smallest.retained > target:
            raise InputError(f"search.target={target:.4g} (CR {1 / target:.2f}) cannot be met: with compress.bits_min="
                             f"{limits.bits_min} and compress.max_pruning={limits.max_pruning:g} at least "
                             f"{math.ceil(1e4 * smallest.retained) / 1e4:.4f} is retained")

    def chosen(self, voted: NetworkConfig) -> NetworkConfig:
        """The configuration to apply: of a given policy, and of a search beside the agents but equal bits, ``voted`` as
        it is where it meets what is asked; else ``voted`` moved onto the ratio, and into the bytes left."""
        target, method, given = self.config.search.target, self.config.search.method, self.config.policy != ""
        ratio = _asks_ratio(self.config, self.goal) and (method not in BASELINES or given)
        most = self.goal.max_bytes if self.goal else None
        if given or method in BASELINES and method != "uniform":
            small = not ratio or voted.retained <= target * (1 + ROUNDING)
            if small and (most is None or self.file_bytes(voted) <= most):
                return voted
        chosen = self._moved(voted, target * voted.params, retained_weights) if ratio else voted
        if most is not None:
            room = self._room(voted)
            if not ratio or chosen.kernels_bytes > room:  # under a ratio the bytes are only a bound
                try:
                    chosen = self._moved(chosen, room, kernel_bytes)
                except InputError:  # its types and granularities take more than the smallest, which check_sizes saw fit
                    self.log.note("the size leaves room for the smallest configuration alone, in place of the vote")
                    chosen = _smallest([block.shapes for block in voted.blocks], self.config.compress)
        return chosen

    def allowance(self, shapes) -> tuple:
        """Return (cost, budget): what a kernel takes, and what all may take together. Bytes where the goal is a file's
        size and no ratio; else the weights of Eq. 21, of which search.target may stay. shapes: of the kernels."""
        if self.goal and self.goal.max_bytes is not None and not _asks_ratio(self.config, self.goal):
            limits = self.config.compress
            return kernel_bytes, self._room(_alike(shapes, limits, limits.bits_max, 1.0))
        return retained_weights, self.config.search.target * sum(s.params for block in shapes for s in block)

    def _room(self, config) -> float:
        """Bytes that the kernels may take, at least those of the smallest, whose file is known to fit; ``config``: any,
        which is packed to see what the rest takes."""
        room = self.goal.max_bytes - (self.file_bytes(config) - config.kernels_bytes) - INDEX_ROOM
        return max(room, _smallest([block.shapes for block in config.blocks], self.config.compress).kernels_bytes)

    def _moved(self, config, budget, cost) -> NetworkConfig:
        moved, note = enforce(self.blocks, config, self.sensitivity, self.config.compress, budget, cost)
        if note:
            self.log.note(note)
        say, what = (self.log.note, "the given policy misses the") if self.config.policy else (self.log.info, " ")
        say(f"{what} target: retained {config.retained:.4f} -> {moved.retained:.4f}")
        return moved

    def key(self, row) -> tuple:
        """Sort key for choosing the best cycle: the accuracy. Under a goal: whether the packed file's drop holds; then,
        unless a size is asked for, the smaller network; then the packed file's accuracy."""
        if self.goal is None:
            return (row.acc,)
        holds = self.holds(row)
        return holds, row.cr if holds and not self.goal.has_size else 0.0, row.deployed_acc

    def holds(self, row) -> bool:
        """Whether the packed file of a cycle keeps the goal's drop; True where it has none."""
        allowed = self.goal.max_drop if self.goal else None
        return allowed is None or self.baseline_acc - row.deployed_acc <= allowed + ROUNDING

    def relaxed(self, row, config: NetworkConfig, rounds: int) -> NetworkConfig | None:
        """The best configuration with its 1, 2, 4, … most sensitive blocks given back; None where the drop holds, or a
        size is held against it. row, config: of the best cycle or the last round; ``rounds``: how many went before."""
        allowed = self.goal is not None and (self.config.relax or not self.goal.has_size)
        blocks, count = len(config.blocks), 2 ** rounds
        if not allowed or count // 2 >= 2 * blocks or self.holds(row):
            return None
        self.log.note(f"the goal's drop is missed: the {min(count, blocks)} most sensitive blocks are given back"
                      f"{', some as FP32' if count > blocks else ''}")
        return give_back(config, self.sensitivity, count, self.config.compress)

    def result(self, row) -> dict | None:
        """Which of the goal's conditions the packed file of the best cycle meets, for result.json; None without one."""
        if (goal := self.goal) is None:
            return None
        met = {"size": goal.max_bytes is None or row.packed_bytes <= goal.max_bytes,
               "cr": goal.min_cr is None or row.cr >= goal.min_cr - ROUNDING, "drop": self.holds(row)}
        return {"asked": self.config.goal, "met": all(met.values()), "missed": [k for k, v in met.items() if not v],
                "deployed_drop": self.baseline_acc - row.deployed_acc, "packed_bytes": row.packed_bytes}


def _alike(shapes, limits, bits: int, keep: float) -> NetworkConfig:
    """The same for all kernels, with the type and granularity that take the least where a choice is allowed."""
    kind = ("INT" if limits.qtype == "any" else limits.qtype,
            "uniform" if limits.granularity == "any" else limits.granularity)
    return NetworkConfig(tuple(BlockConfig(tuple(KernelConfig(bits, keep if shape.prunable else 1.0, *kind)
                                                 for shape in block), tuple(block)) for block in shapes))


def _smallest(shapes, limits) -> NetworkConfig:
    """The least that the bounds allow."""
    return _alike(shapes, limits, limits.bits_min, 1 - limits.max_pruning)


def _asks_ratio(config: Config, goal: Goal | None) -> bool:
    """Whether search.target is to be met, and not only aimed at."""
    return config.enforce_target or goal is not None and goal.min_cr is not None
