"""Methods against each other on real images, on a CPU: a grid of cells (network x method x seed), worked off one by one.

    python benchmarks/grid.py --data-dir DIR            # what is not there yet; Ctrl-C and the same again goes on
    python benchmarks/grid.py --data-dir DIR --base     # only the networks trained from scratch that the cells begin with
    python benchmarks/grid.py --table                   # results/grid-*.json as Markdown tables

CIFAR-10 at 32 px (a folder ``DIR/cifar10/{train,test}/<class>``, or its download). A cell is a run of hirelc.py from the
same trained network, with the same fine-tuning, below ``--out``; when it is done, a small file in ``results/`` holds what
was measured, the command, and for every test image whether the network is right, as hexadecimal digits, the first image in
the highest bit. Both networks of a cell are scored here, the deployed one as read back from its packed file.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import models  # noqa: E402
import pack  # noqa: E402
from config import EXPERIMENTS, Config, override  # noqa: E402
from evidence.stats import crossed_interval  # noqa: E402
from train import correct  # noqa: E402

# name → experiment, training from scratch, learning rate of fine-tuning
NETWORKS = {"resnet18": (4, "scratch.epochs=6", "finetune.lr=1e-4"),
            "mobilenetv2": (5, "scratch.epochs=10", "finetune.lr=5e-4")}
DATA = "threads=1 data.name=cifar10 data.image_size=32 baseline.epochs=0"
CELL = f"{DATA} data.train_images=3000 search.proxy_batches=1 finetune.epochs=1 eval.full=false"
# As the paper has it: sizes are what the votes give, and after a warm-up the surrogate takes over from the proxy.
PAPER = "search.cycles=4 surrogate.warmup=3"
# At one size, with as many evaluations of the proxy, fine-tuned on the grid.
MATCHED = "surrogate=off lla.timesteps=32 search.target=0.10 enforce_target=true finetune.mode=qat search.cycles="
# The search alone: next to no fine-tuning, which makes the same of every choice.
SEARCHED = f"{MATCHED}1 data.train_images=256 finetune.lr=1e-9"
# The parts of the paper's method, one left out or replaced each; CHANGED with the proxy and the votes' sizes, HELD at one.
PARTS = {"no-hla": "search=no-hla", "none": "sensitivity=none", "a2c": "lla.algorithms=A2C,A2C,A2C"}
HELD = f"{MATCHED}1"
CHANGED = "surrogate=off lla.timesteps=32 search.cycles="
METHODS = {
    "hirelc": PAPER, "null": f"{PAPER} search=null", "hirelc-proxy": f"{PAPER} surrogate=off lla.timesteps=32",
    "enforced": f"{MATCHED}4", "plus": f"preset=plus {MATCHED}4",
    "drawn": f"preset=plus {MATCHED}4 lla.start=drawn",  # without the allocations by sensitivity to begin with
    "untrained": f"preset=plus {MATCHED}4 lla.lr_factor=0",  # what is left of plus when the policies stay as they begin
    "plus-surrogate": f"preset=plus {MATCHED}4 surrogate=on surrogate.warmup=3",
    "plus-around": f"preset=plus {MATCHED}4 search.around=last",
    **{name: f"{MATCHED}4 search={name}" for name in ("random", "uniform")},
    **{name: f"{MATCHED}1 search={name}" for name in ("greedy", "evolution", "sequential")},
    **{f"{name}-1": f"{SEARCHED} {own}" for name, own in {
        "enforced": "", "visited": "lla.choose=visited", "tiers": "hla.tiers=relative", "mode": "vote=mode",
        "relative": "lla.reward=relative", "project": "lla.project=true", "steps": "lla.timesteps=256",
        "visited-rounds": "lla.choose=visited lla.rounds=4", "visited-refine": "lla.choose=visited lla.refine=2",
        "visited-start": "lla.choose=visited lla.start=greedy", "plus": "preset=plus",
        "plus-drawn": "preset=plus lla.start=drawn", "plus-unrefined": "preset=plus lla.refine=0",
        "plus-paper-tiers": "preset=plus hla.tiers=paper", "plus-rounds4": "preset=plus lla.rounds=4",
        "plus-project": "preset=plus lla.project=true", "plus-snip": "preset=plus sensitivity=snip",
        "plus-steps": "preset=plus lla.timesteps=256",
        **{name: f"search={name}" for name in ("random", "uniform", "greedy", "evolution", "sequential")}}.items()},
    "held": HELD, **{f"{name}-held": f"{HELD} {own}" for name, own in {**PARTS, "null": "search=null"}.items()},
    "proxy": f"{CHANGED}1", **{name: f"{CHANGED}1 {own}" for name, own in PARTS.items()},
    **{name: f"{CHANGED}1 sensitivity={name}" for name in ("gradient", "snip", "grasp", "hessian")},
    **{name: f"{CHANGED}1 vote={name}" for name in ("confidence", "mode")},
    **{f"carry-{name}": f"{CHANGED}2 carry={name}" for name in ("none", "rest", "all")}}
FRESH, TUNED = (45, 46, 47), (42, 43, 44)  # plus was put together on the latter
KEPT = ("exp", "seed", "model", "data", "protocol", "eval_images", "test_images", "baseline_acc", "final_acc",
        "deployed_acc", "mode", "search", "cr", "retained", "packed_bytes", "whole_model_ratio", "compliance",
        "surrogate_mae", "mean_kl", "searches", "evaluations", "null_controller", "best_cycle", "skipped_steps", "timings",
        "notes")
OF_CYCLE = ("cycle", "acc", "acc_before_finetune", "deployed_acc", "retained", "cr", "average_bits", "average_keep",
            "compliance", "voted_retained", "surrogate_prediction")


def cells(args) -> list[tuple[str, str, int]]:
    """(network, method, seed) of the whole grid, in the order in which they are worked off."""
    methods = args.methods or [m for m in METHODS if not m.endswith("-1")]
    return [(network, method, seed) for seed in args.seeds for method in methods for network in args.networks]


def command(args, exp: int, name: str, seed: int, settings: str) -> list[str]:
    """Arguments of hirelc.py."""
    return ["--exp", str(exp), "--seed", str(seed), "--name", name, "--out", args.out, "--data-dir", args.data_dir,
            "--no-table", "--resume", "--set", *settings.split()]


def call(arguments) -> int:
    """Exit code of hirelc.py; a signal that stops this process goes to it too."""
    process = subprocess.Popen([sys.executable, str(ROOT / "hirelc.py"), *arguments])
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def base(args, network: str) -> Path | None:
    """The trained network that a network's cells begin with; it is made where it is not there. None where that failed."""
    exp, scratch, _ = NETWORKS[network]
    folder = Path(args.out) / f"exp{exp}-base-seed42"
    if not (folder / "baseline.pt").exists() or (folder / "state").exists():
        settings = f"{DATA} {scratch} surrogate.warmup=0 search=null search.cycles=1 finetune.epochs=1 model.weights=none"
        if call(command(args, exp, "base", 42, settings)):
            return None
    return folder / "baseline.pt"


def hits(model, test) -> torch.Tensor:
    """Which test images the network classifies rightly, bool [n]."""
    return correct(model.to(memory_format=torch.channels_last), test)


def digits(hit: torch.Tensor) -> str:
    """bool [n] as hexadecimal digits."""
    return np.packbits(hit.numpy()).tobytes().hex()


def read_digits(text: str, count: int) -> np.ndarray:
    """The inverse: bool [count]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(bool)


def keep(args, network: str, method: str, seed: int, weights: Path, baselines: dict) -> None:
    """Score a finished cell and write its file. ``baselines``: network → its baseline's digits, once they are known."""
    exp = NETWORKS[network][0]
    folder = Path(args.out) / f"exp{exp}-{method}-seed{seed}"
    result, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config"))
    torch.set_num_threads(1)
    where = override(Config(), [*DATA.split(), f"data.dir={args.data_dir}"])
    splits = data.load(where.data, lambda *_: None, models.PRETRAINED_STATS[EXPERIMENTS[exp].settings["model.name"]])
    kept = {key: result[key] for key in KEPT} | {"cycles": [{key: row[key] for key in OF_CYCLE}
                                                            for row in result["cycles"]]}
    kept |= {"network": network, "method": method, "settings": METHODS[method]}
    kept |= {key: config[key] for key in ("command", "started", "versions", "hardware")}
    kept["command"] = ["hirelc.py", *kept["command"][1:]]
    model = pack.load(folder / "packed.pt")
    kept["deployed_hits"] = digits(hits(model, splits.test))
    model.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["model"])
    kept["final_hits"] = digits(hits(model, splits.test))
    if network not in baselines:
        model.load_state_dict(torch.load(weights, weights_only=True))
        baselines[network] = digits(hits(model, splits.test))
    kept |= {"baseline_hits": baselines[network], "test_images": len(splits.test)}
    Path(args.results).mkdir(exist_ok=True)
    path = Path(args.results) / f"grid-{network}-{method}-seed{seed}.json"
    part, text = path.with_suffix(".part"), json.dumps(kept, indent=1) + "\n"
    for folder, name in ((args.out, "runs-grid"), (args.data_dir, "DIR")):
        if Path(folder).is_absolute():  # where somebody keeps such things is of no use to others
            text = text.replace(folder.rstrip("/"), name)
    part.write_text(text)
    part.replace(path)


# ---------------------------------------------------------------------------------------------------------------
# Tables


def read(folder) -> dict[tuple[str, str, int], dict]:
    """(network, method, seed) → what is in its file."""
    found = (json.loads(path.read_text()) for path in sorted(Path(folder).glob("grid-*.json")))
    return {(cell["network"], cell["method"], cell["seed"]): cell for cell in found}


def right(cells, which: str) -> np.ndarray:
    """Which images the cells' networks classify rightly, bool [cells, n]; ``which``: baseline, final or deployed."""
    return np.stack([read_digits(cell[f"{which}_hits"], cell["test_images"]) for cell in cells])


def spread(values) -> str:
    """Mean ± standard deviation (n - 1) of what there is."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def difference(before, after) -> str:
    """Mean difference of hits [seeds, n] in points with its interval, and the seeds' own."""
    mean, low, high = crossed_interval(before, after)
    own = 100 * (after.mean(1, dtype=float) - before.mean(1, dtype=float))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]; " + ", ".join(f"{value:+.2f}" for value in own)


def table(cells, network: str, methods, reference: str) -> str:
    """Markdown: a row per method, and how far its packed file's accuracy is from ``reference``'s, paired by seed and
    image over the seeds that both have."""
    lines = [f"| {network} | seeds | evaluations | CR | mean bits, keep | packed bytes | compliance | before fine-tuning "
             f"(n = 1,280) | final | deployed | deployed - {reference}'s [95 %]; by seed |", "|---" * 11 + "|"]
    of = {method: {seed: cell for (n, m, seed), cell in cells.items() if (n, m) == (network, method)}
          for method in (*methods, reference)}
    for method in methods:
        rows = [cell for _, cell in sorted(of[method].items())]
        if not rows:
            continue
        both = sorted(set(of[method]) & set(of[reference]))
        best = [next(row for row in cell["cycles"] if row["cycle"] == cell["best_cycle"]) for cell in rows]
        final, deployed = (100 * right(rows, which).mean(1) for which in ("final", "deployed"))
        against = "" if method == reference or not both else difference(
            *(right([of[m][seed] for seed in both], "deployed") for m in (reference, method)))
        lines.append(
            f"| {method} | {' '.join(str(cell['seed']) for cell in rows)} | "
            f"{spread([cell['evaluations'] for cell in rows]).split(' ')[0].removesuffix('.00')} | "
            f"{spread([cell['cr'] for cell in rows])} | {np.mean([row['average_bits'] for row in best]):.2f}, "
            f"{np.mean([row['average_keep'] for row in best]):.2f} | {np.mean([cell['packed_bytes'] for cell in rows]):,.0f} | "
            f"{spread([cell['compliance'] for cell in rows])} | {spread([row['acc_before_finetune'] for row in best])} | "
            f"{spread(final)} | {spread(deployed)} | {against} |")
    return "\n".join(lines)


def flattery(cells, network: str) -> str:
    """Markdown: the drop on the images that chose epoch and cycle, and on all others, of the paper's own protocol."""
    lines = [f"| {network} | seeds | drop on the images that chose | on the others | and deployed |", "|---" * 5 + "|"]
    for method in ("hirelc", "null", "enforced", "plus"):
        rows = [cell for (n, m, _), cell in sorted(cells.items()) if (n, m) == (network, method)]
        if rows:
            n = rows[0]["eval_images"]
            hit = {which: right(rows, which) for which in ("baseline", "final", "deployed")}
            drops = [(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
                     for part, which in ((slice(n), "final"), (slice(n, None), "final"), (slice(n, None), "deployed"))
                     for mean, low, high in [crossed_interval(hit[which][:, part], hit["baseline"][:, part])]]
            lines.append(f"| {method} | {' '.join(str(cell['seed']) for cell in rows)} | {' | '.join(drops)} |")
    return "\n".join(lines)


def moved(cells, network: str) -> str:
    """Markdown: how far the agents' policies moved, and what their vote is worth."""
    lines = [f"| {network} | seeds | entropy of the low-level policies before → after, of a uniform one's | mean KL of "
             "an update: LLA PPO, A2C; HLA PPO, A2C | reward of the vote | of random actions |", "|---" * 6 + "|"]
    for method in ("hirelc", "enforced", "plus"):
        rows = [cell for (n, m, _), cell in sorted(cells.items()) if (n, m) == (network, method)]
        if rows:
            searches = [row for cell in rows for row in cell["searches"] if row["level"] == "LLA"]
            first, last = np.mean([row["entropy"] for row in searches], axis=0)
            kl = {who: np.mean([cell["mean_kl"][who] for cell in rows if who in cell["mean_kl"]] or [math.nan])
                  for who in ("LLA PPO", "LLA A2C", "HLA PPO", "HLA A2C")}
            lines.append(f"| {method} | {' '.join(str(cell['seed']) for cell in rows)} | {first:.4f} → {last:.4f} | "
                         f"{kl['LLA PPO']:.1e}, {kl['LLA A2C']:.1e}; {kl['HLA PPO']:.1e}, {kl['HLA A2C']:.1e} | "
                         f"{spread([row['consensus_reward'] for row in searches])} | "
                         f"{spread([row['random_reward'] for row in searches])} |")
    return "\n".join(lines)


def tables(folder) -> str:
    """All tables of what is in ``folder``, as Markdown."""
    cells = read(folder)
    text = []
    for network in NETWORKS:
        rows = [cell for (n, *_), cell in cells.items() if n == network]
        if rows:
            hit = right(rows[:1], "baseline")[0]
            text += [f"baseline of {network}: {100 * hit.mean():.2f} % of {len(hit)}"]
            text += [table(cells, network, [m for m in METHODS if METHODS[m].startswith(PAPER)], "null"),
                     table(cells, network, [m for m in METHODS if MATCHED in METHODS[m] and not m.endswith(("-1", "held"))],
                           "plus"),
                     table(cells, network, [m for m in METHODS if m.endswith("-1")], "plus-1"),
                     table(cells, network, [m for m in METHODS if m.endswith("held")], "held"),
                     table(cells, network, [m for m in METHODS if CHANGED in METHODS[m]], "proxy"),
                     flattery(cells, network), moved(cells, network)]
    return "\n\n".join(part for part in text if part.count("\n") != 1)


def main() -> int:
    """Command line; exit code 0 when all is done, else that of the cell that failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--out", default="runs-grid", help="folder of the run directories")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the small result files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=FRESH)
    parser.add_argument("--base", action="store_true", help="only train the networks from scratch")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    if args.table:
        print(tables(args.results))
        return 0
    for network in args.networks:
        weights = base(args, network)
        if weights is None:
            print(f"grid: {network} could not be trained from scratch", file=sys.stderr)
            return 1
    baselines: dict[str, str] = {}
    for network, method, seed in [] if args.base else cells(args):
        if (Path(args.results) / f"grid-{network}-{method}-seed{seed}.json").exists():
            continue
        exp, _, rate = NETWORKS[network]
        weights = base(args, network)
        code = call(command(args, exp, method, seed, f"{CELL} {rate} {METHODS[method]} model.weights={weights}"))
        if code:
            print(f"grid: {network} {method} seed {seed} ended with {code}; the same command goes on", file=sys.stderr)
            return code
        keep(args, network, method, seed, weights, baselines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
