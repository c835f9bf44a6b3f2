"""Environment steps/s of the agents with the surrogate active, updates included, measured on this machine.

    python benchmarks/agents.py [--blocks 12] [--kernels 4] [--rounds 5]

Low level: every block's ensemble of three agents under a fixed budget, DeiT-Small's four kernels per block (or the
first ``--kernels`` of them, repeated). The same agents with the same settings train all blocks together
(``train_together``), block by block (``LLAEnsemble.train``), and agent by agent (``learn``). High level: the three
agents together and one after the other. The variants take turns, ``--rounds`` times after one that is not timed;
printed are the medians and ranges of steps per second of wall-clock time, and of the process's own time, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compress import kernel_shapes  # noqa: E402
from config import Config  # noqa: E402
from runs import keep_freed_memory  # noqa: E402
from search import (DropEstimator, HLAEnsemble, LayerBudget, LLAEnsemble, Surrogate, random_config,  # noqa: E402
                    train_together)

DEIT_SMALL = ((1152, 384), (384, 384), (1536, 384), (384, 1536))  # outputs and inputs of a block's kernels
BUDGET = LayerBudget(target=0.25, max_pruning=0.4, min_bits=5, max_drop=1.0, strategy="auto")


def ensembles(blocks: int, kernels: int, config: Config):
    """(low, high): one LLAEnsemble per block, told drops by a surrogate that has just become active; an HLAEnsemble."""
    sizes = list(islice(cycle(DEIT_SMALL), kernels))
    network = [SimpleNamespace(kernels={str(n): nn.Linear(size[1], size[0], bias=False, device="meta")
                                        for n, size in enumerate(sizes)}) for _ in range(blocks)]
    shapes = [kernel_shapes(block) for block in network]
    surrogate, rng = Surrogate(5 * kernels * blocks, config.surrogate, seed=0), np.random.default_rng(0)
    for acc in (80.0, 70.0, 60.0):
        surrogate.add(random_config(shapes, config.compress, rng), acc)
    surrogate.train(config.surrogate.epochs)
    estimator = DropEstimator(SimpleNamespace(blocks=network), surrogate, 90.0)
    estimator.consensus = list(random_config(shapes, config.compress, rng).blocks)
    params = [sum(shape.params for shape in block) for block in shapes]
    return ([LLAEnsemble(i, block, 0.5, estimator, config, blocks) for i, block in enumerate(network)],
            HLAEnsemble(params, [0.5] * blocks, config))


def one_by_one(low, timesteps: int) -> None:
    """Every agent of every block on its own."""
    for ensemble in low:
        for env, agent in zip(ensemble.envs, ensemble.agents):
            env.budget = BUDGET
            agent.learn(timesteps)


def take_turns(variants: dict, steps: int, rounds: int) -> None:
    """Print the rates of each variant, a function that makes ``steps`` environment steps."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for n in range(rounds + 1):
        for name, run in variants.items():
            wall, own = time.perf_counter(), time.process_time()
            run()
            if n:
                rates[name].append((steps / (time.perf_counter() - wall), steps / (time.process_time() - own)))
    for name, pairs in rates.items():
        wall, own = (sorted(column) for column in zip(*pairs))
        print(f"  {name:28} {statistics.median(wall):7.0f} [{wall[0]:.0f}, {wall[-1]:.0f}]   of the process's own time "
              f"{statistics.median(own):7.0f} [{own[0]:.0f}, {own[-1]:.0f}]", flush=True)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--kernels", type=int, default=4, help="kernels per block")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each variant")
    args = parser.parse_args()
    keep_freed_memory()  # as hirelc.py does
    config = Config()
    low, high = ensembles(args.blocks, args.kernels, config)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads (agents: 1), Python "
          f"{platform.python_version()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    timesteps, agents = config.lla.timesteps, sum(len(ensemble.agents) for ensemble in low)
    print(f"low level, {args.blocks} blocks of {args.kernels} kernels, {agents} agents of {timesteps} steps each, "
          f"environment steps/s, median [range] of {args.rounds}")
    take_turns({"all blocks together": lambda: train_together(low, [BUDGET] * len(low)),
                "block by block": lambda: [ensemble.train(BUDGET) for ensemble in low],
                "agent by agent": lambda: one_by_one(low, timesteps)}, agents * timesteps, args.rounds)
    print(f"high level, {args.blocks} blocks, {len(high.agents)} agents of {config.hla.timesteps} steps each")
    take_turns({"agents together": lambda: high.train(config.hla.timesteps),
                "agent by agent": lambda: [agent.learn(config.hla.timesteps) for agent in high.agents]},
               len(high.agents) * config.hla.timesteps, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
