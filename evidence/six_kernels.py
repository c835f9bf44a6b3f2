"""Every search on a problem whose optimum can be computed: a table of how much of the way to it each goes.

    python -m evidence.six_kernels

The problem is tests/problems.py: 46,656 configurations, of which the best that meets the target is found by trying all.
1 is that optimum, 0 the mean of all that meet the target; every search has the same number of evaluations.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from compress import NetworkConfig, kernel_shapes  # noqa: E402
from config import BASELINES, Config, override  # noqa: E402
from deploy.target import Demands  # noqa: E402
from evidence import plus  # noqa: E402
from problems import BUDGET, CURVATURE, LIMITS, TARGET, TIMESTEPS, SixKernels, found  # noqa: E402
from evidence.null import NullHLA, NullLLA  # noqa: E402
from search import HLAEnsemble, LLAEnsemble, UniformBudgets  # noqa: E402

SEEDS = range(16)


def estimator(six):
    """What the agents ask for drops: those of the six kernels, counted."""
    def drops(index, configs):
        result.evaluations += len(configs)
        return six.drops(index, configs)

    six.asked.clear()
    result = SimpleNamespace(drops=drops, evaluations=0, surrogate_active=False)
    return result


def hierarchy(six, seed: int, method: str) -> NetworkConfig:
    """What one cycle of hirelc, no-hla, null or plus chooses, moved onto the target."""
    config = override(Config(), {
        "search.method": method, "search.cycles": 1, "search.target": TARGET, "seed": seed, "enforce_target": True,
        "compress.bits_max": LIMITS.bits_max, "compress.max_pruning": LIMITS.max_pruning, "lla.timesteps": TIMESTEPS})
    high, low = {"hirelc": (HLAEnsemble, LLAEnsemble), "no-hla": (UniformBudgets, LLAEnsemble),
                 "null": (NullHLA, NullLLA), "plus": (plus.PlusHLA, None)}[method]
    hla, drops = high([sum(s.params for s in kernel_shapes(b)) for b in six.blocks], CURVATURE, config), estimator(six)
    blocks = [low(i, block, s, drops, config, 2) for i, (block, s) in enumerate(zip(six.blocks, CURVATURE))] \
        if low else plus.plus_blocks(six.blocks, CURVATURE, drops, config)
    hla.train(config.hla.timesteps)
    hla.feedback(0.0, 1.0, 1)
    results = [block.search(budget) for block, budget in zip(blocks, hla.budgets(deterministic=True))]
    voted = NetworkConfig(tuple(result.config for result in results)) if low else plus.combine(results, TARGET, print)
    log = SimpleNamespace(note=print, info=lambda text: None)
    return Demands(config, six.blocks, CURVATURE, 0.0, None, log).chosen(voted)


def main() -> None:
    """Print the table, a row as soon as it is computed."""
    torch.set_num_threads(1)
    six = SixKernels()
    print(f"{six.configurations:,} configurations, rho <= {TARGET}, at most {BUDGET} evaluations\n")
    print(f"| search | mean | least | seeds of {len(SEEDS)} with at least 0.95 |\n|---|---|---|---|")
    for method in (*BASELINES, "hirelc", "null", "no-hla", "plus"):
        gains = [six.gain(found(six, method, seed).config if method in BASELINES else hierarchy(six, seed, method))
                 for seed in SEEDS]
        print(f"| {method} | {np.mean(gains):.3f} | {min(gains):.3f} | {sum(g >= 0.95 for g in gains)} |", flush=True)


if __name__ == "__main__":
    main()
