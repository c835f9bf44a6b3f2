"""Methods against each other on real images, on a CPU: a grid of cells (network x method x seed), one after another.

    python -m evidence.grid --data-dir DIR     # what is not there yet; Ctrl-C and the same again goes on
    python -m evidence.grid --table plus       # results/grid-*.json as Markdown, each method compared with plus

CIFAR-10 at 32 px. A cell is a run of hirelc.py on one thread, from the same trained network, with the same fine-tuning,
below ``--out``; when it is done, a small file in ``results/`` holds what was measured and, as hexadecimal digits, for
every test image whether the packed file's network, read back here, is right, the first in the highest bit.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

import data
import models
from config import EXPERIMENTS, Config, override
from deploy import pack
from evidence.stats import crossed_interval
from support.files import write_json
from train import correct

ROOT = Path(__file__).resolve().parent.parent
# name → experiment, training from scratch, learning rate of fine-tuning
NETWORKS = {"resnet18": (4, "scratch.epochs=6", "finetune.lr=1e-4"),
            "mobilenetv2": (5, "scratch.epochs=10", "finetune.lr=5e-4")}
DATA = "threads=1 data.name=cifar10 data.image_size=32 baseline.epochs=0"
CELL = f"{DATA} data.train_images=3000 search.proxy_batches=1 finetune.epochs=1 eval.full=false"
PAPER = "search.cycles=4 surrogate.warmup=3"  # sizes are what the votes give; after a warm-up the surrogate estimates
# At one size, with as many evaluations, fine-tuned on the grid.
MATCHED = "surrogate=off lla.timesteps=32 search.target=0.10 enforce_target=true finetune.mode=qat search.cycles="
# One part of the method left out or replaced, with the proxy, at the votes' sizes (CHANGED) or at one.
PARTS = {"no-hla": "search=no-hla", "none": "sensitivity=none", "a2c": "lla.algorithms=A2C,A2C,A2C"}
CHANGED = "surrogate=off lla.timesteps=32 search.cycles="
METHODS = {
    "hirelc": PAPER, "null": f"{PAPER} search=null", "hirelc-proxy": f"{PAPER} surrogate=off lla.timesteps=32",
    "enforced": f"{MATCHED}4", "plus": f"preset=plus {MATCHED}4",
    "plus-surrogate": f"preset=plus {MATCHED}4 surrogate=on surrogate.warmup=3",
    **{name: f"{MATCHED}4 search={name}" for name in ("random", "uniform")},
    **{name: f"{MATCHED}1 search={name}" for name in ("greedy", "evolution", "sequential")},
    "held": f"{MATCHED}1", "null-held": f"{MATCHED}1 search=null",
    **{f"{name}-held": f"{MATCHED}1 {own}" for name, own in PARTS.items()},
    "proxy": f"{CHANGED}1", **{name: f"{CHANGED}1 {own}" for name, own in PARTS.items()},
    **{name: f"{CHANGED}1 sensitivity={name}" for name in ("gradient", "snip", "grasp", "hessian")},
    "confidence": f"{CHANGED}1 vote=confidence",
    **{f"carry-{name}": f"{CHANGED}2 carry={name}" for name in ("none", "rest")}}
FRESH = (45, 46, 47)  # seeds; plus was put together on 42, 43 and 44
KEPT = ("exp", "seed", "model", "data", "protocol", "eval_images", "final_acc", "deployed_acc", "cr", "retained",
        "packed_bytes", "compliance", "evaluations", "best_cycle", "timings", "notes")


def run(args, exp: int, name: str, seed: int, settings: str) -> int:
    """Run hirelc.py, which goes on with what was stopped; return its exit code. Ctrl-C reaches it as well."""
    flags = f"--exp {exp} --seed {seed} --name {name} --no-table --resume --set {settings}".split()
    flags += [f"out={args.out}", f"data.dir={args.data_dir}"]
    try:
        return subprocess.call([sys.executable, ROOT / "hirelc.py", *flags])
    except KeyboardInterrupt:
        return 130


def base(args, network: str) -> Path | None:
    """Return the trained network that all cells begin with, made where it is missing; None where that failed."""
    exp, scratch, _ = NETWORKS[network]
    path = Path(args.out) / f"exp{exp}-base-seed42" / "baseline.pt"
    settings = f"{DATA} {scratch} model.weights=none surrogate.warmup=0 search=null search.cycles=1 finetune.epochs=1"
    return None if not path.exists() and run(args, exp, "base", 42, settings) else path


def keep(args, network: str, method: str, seed: int) -> None:
    """Score a finished cell and write its file."""
    exp = NETWORKS[network][0]
    folder = Path(args.out) / f"exp{exp}-{method}-seed{seed}"
    result, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config"))
    torch.set_num_threads(1)
    where = override(Config(), [*DATA.split(), f"data.dir={args.data_dir}"])
    test = data.load(where.data, lambda *_: None, models.PRETRAINED_STATS[EXPERIMENTS[exp].settings["model.name"]]).test
    hit = correct(pack.load(folder / "packed.pt").to(memory_format=torch.channels_last), test)
    write_json(cell_file(args, network, method, seed), {
        **{key: result[key] for key in KEPT}, **{key: config[key] for key in ("started", "versions", "hardware")},
        "network": network, "method": method, "settings": METHODS[method], "test_images": len(test),
        "deployed_hits": np.packbits(hit.numpy()).tobytes().hex()})


def cell_file(args, network: str, method: str, seed: int) -> Path:
    """Return where the results of a cell are kept."""
    return Path(args.results) / f"grid-{network}-{method}-seed{seed}.json"


def table(cells: list[dict], network: str, reference: str) -> str:
    """Return Markdown with a row per method that has cells of a network: the deployed network's accuracy in percent,
    and how far it is from that of ``reference``, paired by seed and image over the seeds that both have."""
    rows = [f"| {network} | seeds | CR | deployed | deployed - {reference}'s [95 %] |", "|---" * 5 + "|"]
    of = {name: [cell for cell in cells if (cell["network"], cell["method"]) == (network, name)] for name in METHODS}
    hits = {name: {cell["seed"]: np.unpackbits(np.frombuffer(bytes.fromhex(cell["deployed_hits"]), np.uint8))[
        :cell["test_images"]] for cell in own} for name, own in of.items()}
    for name in (name for name in METHODS if of[name]):
        both, difference = sorted(hits[name].keys() & hits[reference]), ""
        if both and name != reference:
            before, after = ([hits[side][seed] for seed in both] for side in (reference, name))
            difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*crossed_interval(before, after))
        rows.append(f"| {name} | {' '.join(map(str, sorted(hits[name])))} | {np.mean([c['cr'] for c in of[name]]):.2f} "
                    f"| {100 * np.mean(list(hits[name].values())):.2f} | {difference} |")
    return "\n".join(rows)


def main() -> int:
    """Command line; exit code 0 when all is done, else that of the cell that failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--out", default="runs-grid", help="folder of the run directories")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the small result files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=FRESH)
    parser.add_argument("--table", choices=METHODS, metavar="METHOD", help="only print how others differ from METHOD")
    args = parser.parse_args()
    if args.table:
        cells = [json.loads(path.read_text()) for path in sorted(Path(args.results).glob("grid-*.json"))]
        print("\n\n".join(table(cells, network, args.table) for network in args.networks))
        return 0
    Path(args.results).mkdir(exist_ok=True)
    for network, seed, method in product(args.networks, args.seeds, args.methods):
        if cell_file(args, network, method, seed).exists():
            continue
        weights, (exp, _, rate) = base(args, network), NETWORKS[network]
        settings = f"{CELL} {rate} {METHODS[method]} model.weights={weights}"
        code = run(args, exp, method, seed, settings) if weights else 1
        if code:
            print(f"grid: {network} {method} seed {seed} ended with {code}; the same command goes on", file=sys.stderr)
            return code
        keep(args, network, method, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
