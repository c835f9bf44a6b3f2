"""Every search on a problem whose optimum is known: tables of how much of the way to it each goes.

    python benchmarks/six_kernels.py

The problem is tests/problems.py: 46,656 configurations, of which the best that meets the target is found by trying all.
1 is that optimum, 0 the mean of all that meet the target; every search has the same number of evaluations.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from config import BASELINES  # noqa: E402
from problems import BUDGET, TARGET, SixKernels, found, hierarchy  # noqa: E402

VISITED = {"lla__choose": "visited"}
CHANGES = {
    "none": {},
    "`hla.tiers=relative`": {"hla__tiers": "relative"},
    "`vote=mode`": {"vote": "mode"},
    "`lla.reward=relative`": {"lla__reward": "relative"},
    "`lla.project=true`": {"lla__project": True},
    "`lla.choose=visited`": VISITED,
    "… and `lla.rounds=4`": {**VISITED, "lla__rounds": 4},
    "… and `lla.refine=2`": {**VISITED, "lla__refine": 2.0},
    "… and `hla.tiers=relative`": {**VISITED, "hla__tiers": "relative"},
    "… and `lla.start=greedy`": {**VISITED, "lla__start": "greedy"},
    "`plus`": {"preset": "plus"},
    **{f"`plus`, {change}": {"preset": "plus", key: value} for change, key, value in (
        ("`lla.start=drawn`", "lla__start", "drawn"), ("`lla.refine=0`", "lla__refine", 0.0),
        ("`hla.tiers=paper`", "hla__tiers", "paper"), ("`lla.rounds=4`", "lla__rounds", 4),
        ("`lla.project=true`", "lla__project", True),
        ("policies that do not learn, `lla.lr_factor=0`", "lla__lr_factor", 0.0))},
    **{f"`plus`, `lla.start=drawn` and `{key}={value}`": {
        "preset": "plus", "lla__start": "drawn", key.replace(".", "__"): value} for key, value in (
        ("lla.refine", 0), ("lla.refine", 1.5), ("lla.refine", 3), ("lla.rounds", 4), ("lla.rounds", 8),
        ("hla.tiers", "paper"))}}
SEEDS, MANY = range(6), range(16)


def row(name, gains) -> str:
    """A Markdown row: mean, least, and how many of the seeds reach 0.95."""
    return f"| {name} | {np.mean(gains):.3f} | {min(gains):.3f} | {sum(gain >= 0.95 for gain in gains)} |"


def main() -> None:
    """Print the two tables, a row as soon as it is known."""
    torch.set_num_threads(1)
    six = SixKernels()
    print(f"{six.configurations:,} configurations, rho <= {TARGET}, at most {BUDGET} evaluations\n")
    print(f"| search | mean | least | seeds of {len(SEEDS)} with at least 0.95 |\n|---|---|---|---|")
    for method in BASELINES:
        print(row(method, [six.gain(found(six, method, seed).config) for seed in SEEDS]), flush=True)
    for method in ("hirelc", "null", "no-hla"):
        print(row(f"{method}, enforced", [six.gain(hierarchy(six, seed, search__method=method)[0]) for seed in SEEDS]),
              flush=True)
    print(f"\n| change to hirelc, enforced | mean | least | seeds of {len(MANY)} with at least 0.95 |\n|---|---|---|---|")
    for name, settings in CHANGES.items():
        print(row(name, [six.gain(hierarchy(six, seed, **settings)[0]) for seed in MANY]), flush=True)


if __name__ == "__main__":
    main()
