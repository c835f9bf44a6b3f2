"""What to run once on a machine with a GPU: the tests that need one, a miniature experiment, and the speeds there.

    python -m evidence.gpu                     # about ten minutes
    python -m evidence.gpu --only tests run    # some of the steps

``tests``: every test file that asks for CUDA. ``run``: experiment 4 in miniature, on the GPU, twice with the same seed,
whose policies must be the same; and its packed file, read back and scored. ``speed``: evidence/speed.py. A step that
fails does not stop the others; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "run", "speed")


def commands(step: str, out: str, device: str) -> list[list[str]]:
    """Return the arguments of Python that make up a step."""
    if step == "tests":
        files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))
                 if "cuda.is_available" in path.read_text()]
        return [["-m", "pytest", "-q", *files]]
    if step == "speed":
        return [["-m", "evidence.speed", "--sections", "proxy", "training", "--device", device]]
    hirelc = [str(ROOT / "hirelc.py"), "--exp", "4", "--smoke", "--device", device, "--out", out]
    return [*([*hirelc, "--restart", "--no-table", "--name", name] for name in ("first", "second")),
            [*hirelc, "--load", str(Path(out) / "exp4-first-seed42" / "packed.pt")]]


def same_policies(out: str) -> bool:
    """Whether the two runs chose alike; says how far their accuracies are apart."""
    runs = [Path(out) / f"exp4-{name}-seed42" for name in ("first", "second")]
    first, second = ([json.loads((run / f"{name}.json").read_text()) for name in ("policy", "result")] for run in runs)
    print(f"accuracies of the packed files: {first[1]['deployed_acc_full']:.2f}, {second[1]['deployed_acc_full']:.2f}")
    return first[0] == second[0]


def main(argv=None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=STEPS, choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--out", default="runs-gpu", help="folder of the run directories")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this script out")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu: this machine has no usable GPU", file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    failed = []
    for step in args.only:
        started = time.monotonic()
        good = all([subprocess.run([sys.executable, *command], cwd=ROOT).returncode == 0
                    for command in commands(step, str(Path(args.out).absolute()), args.device)])
        good = good and (step != "run" or same_policies(args.out))
        print(f"gpu: {step} {'passed' if good else 'FAILED'}, {time.monotonic() - started:.0f} s", flush=True)
        failed += [] if good else [step]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
