"""The search of ``--preset plus``: the table's optimum, refined on the real network.

The table (:mod:`evidence.table`) judges every kernel with all others at theta_0; at a twelfth of the file's size that
is not where the network is. From the better of its optimum and the greedy allocation, exchanges of bits and channels
between kernels are tried at equal size and judged by the logits of the *whole* compressed network. The table says which
of many random exchanges are worth a pass: the measured error of the present network plus the table's difference.
"""

from __future__ import annotations

import numpy as np

from deploy.allocate import allocations
from evidence.baselines import METHODS, Space, optimum

DRAWN = 64  # exchanges drawn per round
MEASURED = 4  # of them that get a pass, the best by the table
PASSES = 400  # of the network, about as many as the table of ResNet-20 takes
MOVED = 1.5  # kernels that an exchange changes, on average


def refined(space: Space, rng) -> str:
    """Return a note on what was reached; the space has the best network. A pass of the network is an evaluation."""
    p = space.problem
    space.remaining = min(p.budget, PASSES)
    starts = [optimum(space, p.allowed), *(config for config, _ in allocations(
        p.blocks, space.block_shapes, p.sensitivity, p.limits, p.allowed, p.cost))]
    space.best, space.best_drop = min(zip(starts, p.table.proxy.errors(None, starts)), key=lambda pair: pair[1])
    genome, first, seen = space.genome(space.best), space.best_drop, set()
    space.remaining -= len(starts)
    while space.remaining >= MEASURED:
        drawn = {child.tobytes(): child for child in (exchange(space, genome, rng) for _ in range(DRAWN))}
        fresh = [child for key, child in drawn.items() if key not in seen]
        configs = [space.config(child) for child in fresh]
        order = np.argsort(p.table.errors(None, configs), kind="stable")[:MEASURED]
        if not len(order):
            break
        space.remaining -= len(order)
        for i, error in zip(order, p.table.proxy.errors(None, [configs[i] for i in order])):
            seen.add(fresh[i].tobytes())
            if error < space.best_drop:
                space.best, space.best_drop, genome = configs[i], error, fresh[i]
    return f"logit MSE of the whole network: {first:.4g} at the start, {space.best_drop:.4g} after the exchanges"


def exchange(space: Space, genome, rng) -> np.ndarray:
    """Return a genome of the same size in which some kernels have other bits or channels."""
    count = len(genome)
    changed = rng.random((count, 2)) < MOVED / (2 * count)
    changed[rng.integers(count), rng.integers(2)] = True
    moved = genome.copy()
    moved[:, :2] += np.where(changed, rng.choice([-1, 1], (count, 2)), 0)
    return space.fitted(moved.clip(0, space.levels - 1), rng)


METHODS["plus"] = refined
