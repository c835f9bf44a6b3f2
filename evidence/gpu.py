"""The seven experiments at the paper's image size and search budgets on one GPU, unattended, in steps that can be broken off.

    python benchmarks/gpu.py --data-dir DIR --minutes 9      # again and again, until it says that it is finished
    python benchmarks/gpu.py --tiny --device cpu             # the same steps in miniature

Per experiment: a baseline trained from scratch and the paper's method on it; then, from the same baseline, training on the
grid, and at the size that the paper's method reached the null controller and ``--preset plus``. CIFAR-100 is replaced by
CIFAR-10; epochs of training, fine-tuning and the warm-up's pool are scaled (``SCALED``), which every row says. What is done
stays done: each step is a run of hirelc.py with --resume that is asked to stop when the time is over. A result is a small
file, ``results/gpu-expN-VARIANT.json``.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import EXPERIMENTS  # noqa: E402

ORDER = (3, 4, 5, 1, 6, 2, 7)
SCALED = {3: "scratch.epochs=40 finetune.epochs=6", 4: "scratch.epochs=24 finetune.epochs=3 surrogate.warmup=12",
          5: "scratch.epochs=24 finetune.epochs=3 surrogate.warmup=12", 1: "scratch.epochs=40 finetune.epochs=4",
          6: "scratch.epochs=40 finetune.epochs=4", 2: "scratch.epochs=40 finetune.epochs=4",
          7: "scratch.epochs=24 finetune.epochs=4"}
KEPT = ("exp", "name", "seed", "model", "data", "device", "protocol", "eval_images", "test_images", "baseline_acc",
        "final_acc", "deployed_acc", "baseline_acc_full", "final_acc_full", "deployed_acc_full", "baseline_interval_full",
        "final_interval_full", "deployed_interval_full", "drop_interval_full", "mcnemar_p_full",
        "deployed_drop_interval_full", "deployed_mcnemar_p_full", "mode", "search", "cr", "retained", "packed_bytes",
        "fp32_file_bytes", "whole_model_ratio", "compliance", "surrogate_mae", "evaluations", "timings", "notes")


def steps(exp: int, args) -> list[tuple[str, list[str]]]:
    """(variant, arguments of hirelc.py) of one experiment; those that need the first one's result come once it is there."""
    data = "cifar10" if EXPERIMENTS[exp].settings["data.name"] == "cifar100" else None
    common = ["--exp", str(exp), "--device", args.device, "--out", args.out, "--no-table", "--resume"]
    if args.data_dir:
        common += ["--data-dir", args.data_dir]
    if args.tiny:
        common += ["--smoke"]
    settings = [*([] if args.tiny else SCALED[exp].split()), *([f"data.name={data}"] if data and not args.tiny else []),
                *args.set]
    base = Path(args.out) / f"exp{exp}-paper-seed42"
    given = ["--set", *settings] if settings else []
    found = [("paper", [*common, "--weights", "none", "--name", "paper", *given])]
    if (base / "result.json").exists() and not (base / "state").exists():
        target = json.loads((base / "result.json").read_text())["retained"]
        common += ["--weights", str(base / "baseline.pt")]
        settings += ["baseline.epochs=0"]
        found += [("qat", [*common, "--name", "qat", "--set", *settings, "finetune.mode=qat"]),
                  ("null", [*common, "--name", "null", "--set", *settings, "search=null", "enforce_target=true",
                            f"search.target={target:.4f}"]),
                  ("plus", [*common, "--name", "plus", "--preset", "plus", "--set", *settings,
                            f"search.target={target:.4f}"])]
    return found


def run(arguments, deadline: float) -> int:
    """Exit code of hirelc.py, which is asked to stop at ``deadline`` (time.monotonic)."""
    process = subprocess.Popen([sys.executable, str(ROOT / "hirelc.py"), *arguments])
    try:
        return process.wait(max(deadline - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        return 143 if code == -signal.SIGTERM else code  # it had not begun yet


def keep(exp: int, variant: str, args) -> dict:
    """Write results/gpu-expN-VARIANT.json from a finished run directory, and return it."""
    path = Path(args.out) / f"exp{exp}-{variant}-seed42"
    result, config = (json.loads((path / f"{name}.json").read_text()) for name in ("result", "config"))
    kept = {key: result[key] for key in KEPT} | {key: config[key] for key in ("command", "started", "versions", "hardware")}
    kept["scaled"] = "smoke" if args.tiny else SCALED[exp]
    Path(args.results).mkdir(parents=True, exist_ok=True)
    (Path(args.results) / f"gpu-exp{exp}-{variant}.json").write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def row(kept: dict) -> str:
    """One line of the table."""
    def shown(value):
        return "-" if value is None else f"{value:.2f}"

    return (f"| {kept['exp']} {kept['name']} | {kept['model']}, {kept['data']} | {shown(kept['baseline_acc_full'])} | "
            f"{shown(kept['final_acc_full'])} | {shown(kept['deployed_acc_full'])} | {shown(kept['cr'])} | "
            f"{kept['packed_bytes']:,} | {shown(kept['whole_model_ratio'])} | {shown(kept['compliance'])} | "
            f"{kept['timings']['total']:.0f} | {kept['scaled']} |")


def main() -> int:
    """Command line; exit code 0 when all is done, 143 where the time was over, else that of the run that failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--out", help="folder of the run directories; runs-gpu, with --tiny runs-gpu-tiny")
    parser.add_argument("--results", help="folder of the small result files; results, with --tiny the run directories'")
    parser.add_argument("--exp", type=int, nargs="+", default=ORDER, choices=ORDER)
    parser.add_argument("--minutes", type=float, default=9.0, help="time after which it stops, to be called again")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="in miniature, on drawn images")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for every run")
    args = parser.parse_args()
    args.out = args.out or ("runs-gpu-tiny" if args.tiny else "runs-gpu")
    args.results = args.results or (args.out if args.tiny else "results")
    deadline, table = time.monotonic() + 60 * args.minutes, []
    for exp in args.exp:
        done = 0
        while done < len(todo := steps(exp, args)):
            variant, arguments = todo[done]
            known = Path(args.results) / f"gpu-exp{exp}-{variant}.json"
            code = 0 if known.exists() else run(arguments, deadline)
            if code:
                print(f"gpu: exp {exp} {variant} ended with {code}" + ("; call again to go on" if code == 143 else ""))
                return code
            table.append(row(json.loads(known.read_text()) if known.exists() else keep(exp, variant, args)))
            done += 1
    print("| exp | network, data | baseline | final | deployed | CR | packed bytes | ratio | compl. | seconds | scaled |\n"
          "|---|---|---|---|---|---|---|---|---|---|---|\n" + "\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
