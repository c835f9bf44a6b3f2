"""What to run once on a machine with a GPU: the tests that need one, a miniature experiment, and the speeds there.

    python -m evidence.gpu                     # about ten minutes
    python -m evidence.gpu --only tests run    # some of the steps

``tests``: every test file that asks for CUDA. ``run``: experiment 4 in miniature, on the GPU, twice with the same seed,
whose policies must be the same; and its packed file, read back and scored. ``speed``: evidence/speed.py. A step that
fails does not stop the others; the exit code is 1 then.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "run", "speed")
OUT = ROOT / "runs-gpu"


def commands(step: str) -> list[list[str]]:
    """Return the arguments of Python that make up a step."""
    if step == "tests":
        files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))
                 if "cuda.is_available" in path.read_text()]
        return [["-m", "pytest", "-q", *files]]
    if step == "speed":
        return [["-m", "evidence.speed", "--sections", "proxy", "training", "--device", "cuda"]]
    hirelc = [str(ROOT / "hirelc.py"), "--exp", "4", "--smoke", "--device", "cuda", "--out", str(OUT)]
    return [*([*hirelc, "--restart", "--no-table", "--name", name] for name in ("first", "second")),
            [*hirelc, "--load", str(OUT / "exp4-first-seed42" / "packed.pt")]]


def same_policies() -> bool:
    """Return whether the two runs chose alike."""
    one, other = ((OUT / f"exp4-{name}-seed42" / "policy.json").read_bytes() for name in ("first", "second"))
    return one == other


def main(argv=None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=STEPS, choices=STEPS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: this machine has no usable GPU", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    code = 0
    for step in args.only:
        codes = [subprocess.run([sys.executable, *command], cwd=ROOT).returncode for command in commands(step)]
        good = not any(codes) and (step != "run" or same_policies())
        print(f"gpu: {step} {'passed' if good else 'FAILED'}", flush=True)
        code = code if good else 1
    return code


if __name__ == "__main__":
    sys.exit(main())
