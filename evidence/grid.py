"""Methods against each other on real images, on a CPU: a grid of cells (network x method x seed), one after another.

    python -m evidence.grid --data-dir DIR     # what is not there yet; Ctrl-C and the same again goes on
    python -m evidence.grid --table            # results/grid-*.json as Markdown tables

CIFAR-10 at 32 px (a folder ``DIR/cifar10/{train,test}/<class>``, or its download). A cell is a run of hirelc.py from
the same trained network, with the same fine-tuning, below ``--out``; when it is done, a small file in ``results/``
holds what was measured, the command, and for every test image whether the network is right, as hexadecimal digits, the
first image in the highest bit. Both networks of a cell are scored here, the deployed one as read from its packed file.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

import data
import models
from config import BASELINES, EXPERIMENTS, Config, override
from deploy import pack
from evidence.stats import crossed_interval
from support.files import write_text
from train import correct

ROOT = Path(__file__).resolve().parent.parent
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
# Parts of the paper's method, one left out or replaced each; CHANGED with the proxy and the votes' sizes, HELD at one.
PARTS = {"no-hla": "search=no-hla", "none": "sensitivity=none", "a2c": "lla.algorithms=A2C,A2C,A2C"}
HELD = f"{MATCHED}1"
CHANGED = "surrogate=off lla.timesteps=32 search.cycles="
METHODS = {
    "hirelc": PAPER, "null": f"{PAPER} search=null", "hirelc-proxy": f"{PAPER} surrogate=off lla.timesteps=32",
    "enforced": f"{MATCHED}4", "plus": f"preset=plus {MATCHED}4",
    "plus-surrogate": f"preset=plus {MATCHED}4 surrogate=on surrogate.warmup=3",
    **{name: f"{MATCHED}4 search={name}" for name in ("random", "uniform")},
    **{name: f"{MATCHED}1 search={name}" for name in ("greedy", "evolution", "sequential")},
    **{f"{name}-1": f"{SEARCHED} {own}" for name, own in {
        "enforced": "", "steps": "lla.timesteps=256", "plus": "preset=plus",
        "plus-snip": "preset=plus sensitivity=snip", "plus-steps": "preset=plus lla.timesteps=256",
        **{name: f"search={name}" for name in BASELINES}}.items()},
    "held": HELD, **{f"{name}-held": f"{HELD} {own}" for name, own in {**PARTS, "null": "search=null"}.items()},
    "proxy": f"{CHANGED}1", **{name: f"{CHANGED}1 {own}" for name, own in PARTS.items()},
    **{name: f"{CHANGED}1 sensitivity={name}" for name in ("gradient", "snip", "grasp", "hessian")},
    "confidence": f"{CHANGED}1 vote=confidence",
    **{f"carry-{name}": f"{CHANGED}2 carry={name}" for name in ("none", "rest")}}
FRESH = (45, 46, 47)  # seeds; plus was put together on 42, 43 and 44
KEPT = ("exp", "seed", "model", "data", "protocol", "eval_images", "test_images", "baseline_acc", "final_acc",
        "deployed_acc", "mode", "search", "cr", "retained", "packed_bytes", "whole_model_ratio", "compliance",
        "surrogate_mae", "mean_kl", "searches", "evaluations", "null_controller", "best_cycle", "timings", "notes")
OF_CYCLE = ("cycle", "acc", "acc_before_finetune", "deployed_acc", "retained", "cr", "average_bits", "average_keep",
            "compliance", "voted_retained", "surrogate_prediction")


def command(args, exp: int, name: str, seed: int, settings: str) -> list[str]:
    """Arguments of hirelc.py."""
    return ["--exp", str(exp), "--seed", str(seed), "--name", name, "--out", args.out, "--data-dir", args.data_dir,
            "--no-table", "--resume", "--set", *settings.split()]


def call(arguments) -> int:
    """Exit code of hirelc.py, which Ctrl-C reaches as well."""
    try:
        return subprocess.run([sys.executable, str(ROOT / "hirelc.py"), *arguments]).returncode
    except KeyboardInterrupt:
        return 130


def base(args, network: str) -> Path | None:
    """The trained network that a network's cells begin with, made where it is missing; None where that failed."""
    exp, scratch, _ = NETWORKS[network]
    folder = Path(args.out) / f"exp{exp}-base-seed42"
    if not (folder / "baseline.pt").exists():
        settings = f"{scratch} model.weights=none surrogate.warmup=0 search=null search.cycles=1 finetune.epochs=1"
        if call(command(args, exp, "base", 42, f"{DATA} {settings}")):
            return None
    return folder / "baseline.pt"


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
    model = pack.load(folder / "packed.pt").to(memory_format=torch.channels_last)
    networks = {"final": torch.load(folder / "best.pt", weights_only=True)["model"]}
    if network not in baselines:
        networks["baseline"] = torch.load(weights, weights_only=True)
    kept["deployed_hits"] = digits(correct(model, splits.test))
    for name, state in networks.items():
        model.load_state_dict(state)
        kept[f"{name}_hits"] = digits(correct(model, splits.test))
    kept["baseline_hits"] = baselines.setdefault(network, kept.get("baseline_hits"))
    text = json.dumps(kept | {"test_images": len(splits.test)}, indent=1) + "\n"
    for folder, name in ((args.out, "runs-grid"), (args.data_dir, "DIR")):
        if Path(folder).is_absolute():  # where somebody keeps such things is of no use to others
            text = text.replace(folder.rstrip("/"), name)
    Path(args.results).mkdir(exist_ok=True)
    write_text(Path(args.results) / f"grid-{network}-{method}-seed{seed}.json", text)


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
    """Mean ± standard deviation (n - 1) of the values that are not None."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def interval(before, after) -> str:
    """Mean difference of hits [seeds, n] in points with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*crossed_interval(before, after))


def markdown(head: str, rows) -> str:
    """A table; ``rows``: lists of texts."""
    rule = "|---" * (head.count(" | ") + 1) + "|"
    return "\n".join([f"| {head} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def chosen(cells, network: str, methods) -> list[tuple[str, str, list[dict]]]:
    """(method, its seeds, its cells by seed) of the methods that have cells of a network."""
    found = [(method, {seed: cell for (n, m, seed), cell in cells.items() if (n, m) == (network, method)})
             for method in methods]
    return [(method, " ".join(map(str, sorted(own))), [cell for _, cell in sorted(own.items())])
            for method, own in found if own]


def table(cells, network: str, methods, reference: str) -> str:
    """Markdown: a row per method, and how far its packed file's accuracy is from ``reference``'s, paired by seed and
    image over the seeds that both have."""
    rows, others = [], {cell["seed"]: cell for *_, own in chosen(cells, network, [reference]) for cell in own}
    for method, seeds, own in chosen(cells, network, methods):
        pairs = [(others[cell["seed"]], cell) for cell in own if cell["seed"] in others] if method != reference else []
        best = [next(row for row in cell["cycles"] if row["cycle"] == cell["best_cycle"]) for cell in own]
        against = ""
        if pairs:
            before, after = (right(side, "deployed") for side in zip(*pairs))
            against = "; ".join([interval(before, after), ", ".join(
                f"{100 * (b.mean() - a.mean()):+.2f}" for a, b in zip(before, after))])
        rows.append([
            method, seeds, spread([cell["evaluations"] for cell in own]).split(" ")[0].removesuffix(".00"),
            spread([cell["cr"] for cell in own]), f"{np.mean([row['average_bits'] for row in best]):.2f}, "
            f"{np.mean([row['average_keep'] for row in best]):.2f}",
            f"{np.mean([cell['packed_bytes'] for cell in own]):,.0f}", spread([cell["compliance"] for cell in own]),
            spread([row["acc_before_finetune"] for row in best]), spread(100 * right(own, "final").mean(1)),
            spread(100 * right(own, "deployed").mean(1)), against])
    return markdown(f"{network} | seeds | evaluations | CR | mean bits, keep | packed bytes | compliance | before "
                    f"fine-tuning (n = 1,280) | final | deployed | deployed - {reference}'s [95 %]; by seed", rows)


def flattery(cells, network: str) -> str:
    """Markdown: the drop on the images that chose epoch and cycle, and on all others, of the paper's own protocol."""
    rows = []
    for method, seeds, own in chosen(cells, network, ("hirelc", "null", "enforced", "plus")):
        n, hit = own[0]["eval_images"], {which: right(own, which) for which in ("baseline", "final", "deployed")}
        rows.append([method, seeds, *(interval(hit[which][:, part], hit["baseline"][:, part]) for part, which in (
            (slice(n), "final"), (slice(n, None), "final"), (slice(n, None), "deployed")))])
    return markdown(f"{network} | seeds | drop on the images that chose | on the others | and deployed", rows)


def moved(cells, network: str) -> str:
    """Markdown: how far the agents' policies moved, and what their vote is worth."""
    rows, agents = [], ("LLA PPO", "LLA A2C", "HLA PPO", "HLA A2C")
    for method, seeds, own in chosen(cells, network, ("hirelc", "enforced", "plus")):
        searches = [row for cell in own for row in cell["searches"] if row["level"] == "LLA"]
        entropy = "{:.4f} → {:.4f}".format(*np.mean([row["entropy"] for row in searches], axis=0))
        kl = [np.mean([cell["mean_kl"][who] for cell in own if who in cell["mean_kl"]] or [math.nan]) for who in agents]
        rows.append([method, seeds, entropy, "{:.1e}, {:.1e}; {:.1e}, {:.1e}".format(*kl),
                     *(spread([row[key] for row in searches]) for key in ("consensus_reward", "random_reward"))])
    return markdown(f"{network} | seeds | entropy of the low-level policies before → after, of a uniform one's | mean "
                    "KL of an update: LLA PPO, A2C; HLA PPO, A2C | reward of the vote | of random actions", rows)


def tables(folder) -> str:
    """All tables of the cells in ``folder``, as Markdown."""
    cells, text = read(folder), []
    for network in sorted({n for n, *_ in cells}, key=list(NETWORKS).index):
        hit = right([next(cell for (n, *_), cell in cells.items() if n == network)], "baseline")[0]
        kinds = {"null": [m for m in METHODS if METHODS[m].startswith(PAPER)],
                 "plus": [m for m in METHODS if MATCHED in METHODS[m] and not m.endswith(("-1", "held"))],
                 "plus-1": [m for m in METHODS if m.endswith("-1")], "held": [m for m in METHODS if m.endswith("held")],
                 "proxy": [m for m in METHODS if CHANGED in METHODS[m]]}  # by what a table's methods are compared with
        text += [f"baseline of {network}: {100 * hit.mean():.2f} % of {len(hit)}",
                 *(table(cells, network, methods, reference) for reference, methods in kinds.items()),
                 flattery(cells, network), moved(cells, network)]
    return "\n\n".join(part for part in text if part.count("\n") != 1)


def main() -> int:
    """Command line; exit code 0 when all is done, else that of the cell that failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--out", default="runs-grid", help="folder of the run directories")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the small result files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS),
                        default=[method for method in METHODS if not method.endswith("-1")])
    parser.add_argument("--seeds", type=int, nargs="+", default=FRESH)
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    if args.table:
        print(tables(args.results))
        return 0
    weights = {network: base(args, network) for network in args.networks}
    if None in weights.values():
        print("grid: a network could not be trained from scratch", file=sys.stderr)
        return 1
    baselines: dict[str, str] = {}
    for seed, method, network in product(args.seeds, args.methods, args.networks):
        if (Path(args.results) / f"grid-{network}-{method}-seed{seed}.json").exists():
            continue
        exp, _, rate = NETWORKS[network]
        settings = f"{CELL} {rate} {METHODS[method]} model.weights={weights[network]}"
        code = call(command(args, exp, method, seed, settings))
        if code:
            print(f"grid: {network} {method} seed {seed} ended with {code}; the same command goes on", file=sys.stderr)
            return code
        keep(args, network, method, seed, weights[network], baselines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
