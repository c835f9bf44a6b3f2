"""The ablations and baselines of one experiment, a run each, all in one process:
``python -m evidence.variants --exp 4 --seeds 42 43 [flags of hirelc.py]``. The uncompressed network is trained once per
seed: the first run trains it, and its baseline.pt is given to the others."""

from __future__ import annotations

import argparse
import sys
import traceback

import hirelc
from config import BASELINES
from deploy import pack
from support.cli import arguments
from support.ranks import leave
from support.runs import run_directory

# With bits <= 8 the paper's 0.25 constrains nothing; a surrogate of a few samples misleads whoever believes it.
TARGET = "search.target=0.15 surrogate=off"
# name → what it adds to the experiment's command line
VARIANTS = {
    "no-hla": "--set search=no-hla", "a2c": "--set lla.algorithms=A2C,A2C,A2C", "no-sens": "--set sensitivity=none",
    **{name: f"--set sensitivity={name}" for name in ("gradient", "snip", "grasp", "hessian")},
    "conf": "--set vote=confidence", "proxy": "--set surrogate=off", "carry-rest": "--set carry=rest",
    "null": "--set search=null", "enforced": f"--set enforce_target=true {TARGET}",
    "plus": f"--preset plus --set {TARGET}", **{name: f"--set search={name} {TARGET}" for name in BASELINES}}


def trained(command) -> list[str]:
    """Return the flags that give the uncompressed network of a finished run to another; none without that network."""
    folder = run_directory(arguments(command)[1][0])
    if not (folder / "baseline.pt").exists():
        return []
    quick = ["model.quick_gelu=on"] if pack.read(folder / "packed.pt").network.get("quick_gelu") else []
    return ["--set", f"model.weights={folder / 'baseline.pt'}", "baseline.epochs=0", *quick]


def main(argv=None) -> int:
    """Run every variant with every seed; one that fails does not stop the others. Return the exit code: 0, 1 where one
    failed, 2 for bad input, 130 or 143 where it was stopped."""
    parser = argparse.ArgumentParser(prog="variants", description=__doc__.split(",")[0] + ". Every other flag goes to "
                                     "hirelc.py.", allow_abbrev=False)
    parser.add_argument("--exp", type=int, required=True, metavar="N", help="experiment of the paper")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], metavar="SEED")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="some of the variants")
    args, flags = parser.parse_known_args(argv)
    failed = []
    for seed in args.seeds:
        given: list[str] = []
        for name in args.only:
            command = ["--exp", str(args.exp), "--seed", str(seed), *flags, "--name", name, *VARIANTS[name].split(),
                       *given]
            try:
                code = hirelc.main(command)
                given = given or (trained(command) if code in (0, 3) else [])
            except Exception:  # a fault of the program in one run is no reason to leave out the others
                traceback.print_exc()
                code = 1
            if code in (130, 143):
                return code
            if code:
                failed.append(f"exp {args.exp}-{name} seed {seed} (exit {code})")
    for line in failed:
        print(f"variants: failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main())
