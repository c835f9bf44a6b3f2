"""Methods against each other on published networks and real images, on a CPU: a grid of cells, one after another.

    python -m evidence.grid --data-dir DIR --weights-dir DIR     # what is not there yet; Ctrl-C and the same goes on
    python -m evidence.grid --table greedy     # results/*.json as Markdown, each method compared with greedy
    python -m evidence.grid --figure           # results/frontier.csv and, of that, docs/frontier.svg

A cell (network x size x method x seed) is a run of hirelc.py on one thread from the same trained network, with the same
bytes, the same table of estimates and the same repair. When it is done, a small file in ``results/`` holds what was
measured and, as hexadecimal digits, for every test image whether the packed file's network, read back here, is right,
the first in the highest bit.
"""

import argparse
import csv
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

import data
import models
from config import Config, override
from deploy import pack
from evidence import networks
from evidence.figures import panels
from evidence.networks import NETWORKS
from evidence.stats import crossed_interval
from hirelc import STORED, Run
from support import cli
from support.files import replace_file, write_json, write_text
from support.log import Log
from support.networks import make, switches
from support.ranks import Ranks
from support.runs import Phases, identity
from train import correct

ROOT = Path(__file__).resolve().parent.parent
RUN = "threads=1 precision=bfloat16 search.cycles=1 surrogate.warmup=0 search.proxy_batches=1"
CELL = f"{RUN} preset=plus search.estimate=table baseline.epochs=0 eval.protocol=holdout eval.full=false"
METHODS = {**{name: f"search={name}" for name in (
    "uniform", "random", "greedy", "evolution", "sequential", "table", "null", "hirelc")},
    "untrained": "search=hirelc lla.timesteps=0",
    "trained": "search=hirelc lla.timesteps=10000 lla.envs=8 lla.standardize=true",
    "trained-long": "search=hirelc lla.timesteps=100000 lla.envs=8 lla.standardize=true"}
# the same with all channels kept
METHODS |= {f"{name}-bits": f"{METHODS[name]} compress.max_pruning=0" for name in ("table", "untrained", "trained")}
KEPT = ("exp", "seed", "model", "data", "protocol", "eval_images", "baseline_acc", "final_acc", "deployed_acc", "cr",
        "retained", "packed_bytes", "fp32_bytes", "evaluations", "searches", "table", "timings")
MADE = ("started", "versions", "hardware")  # of a run's config.json
# Published accuracies of the same networks with small weights and FP32 activations: series, times smaller, percent.
PUBLISHED = {"resnet20": [("trained ternary quantisation (Zhu et al. 2017)", 16, 91.13)],
             "resnet56": [("trained ternary quantisation (Zhu et al. 2017)", 16, 93.56)]}
# The figure's plots, and its series (up to their bracket): as they are called in it.
TITLES = {"resnet20": "ResNet-20, CIFAR-10", "resnet56": "ResNet-56, CIFAR-10", "mobilenetv2": "MobileNetV2, half of "
          "Tiny ImageNet", "resnet18": "ResNet18, half of Tiny ImageNet", "deit_tiny": "DeiT-Tiny, CIFAR-100"}
SERIES = {"table": "table's optimum (--preset plus)", "greedy": "greedy by Fisher information", "uniform": "equal bits",
          "evolution": "evolution", "sequential": "sequential controller", "random": "random search",
          "given": "the network as given", "trained": "hierarchy, 10,000 steps", "hirelc": "hierarchy, 256 steps",
          "untrained": "hierarchy, untrained", "null": "null controller", "repaired longer": "repaired longer",
          "trained ternary quantisation": "published: ternary, Zhu et al. 2017"}


def run(args, flags: str, name: str, seed: int, settings: str) -> int:
    """Run hirelc.py, which goes on with what was stopped; return its exit code. Ctrl-C reaches it as well."""
    flags = f"{flags} --seed {seed} --name {name} --no-table --resume --set {settings} out={args.out}".split()
    try:
        return subprocess.call([sys.executable, ROOT / "hirelc.py", *flags, f"data.dir={args.data_dir}"])
    except KeyboardInterrupt:
        return 130


def folder(args, network: str, name: str, seed: int) -> Path:
    """Return the run directory of a cell, or of the training to theta_0."""
    exp = NETWORKS[network][0].partition("--exp ")[2]
    return Path(args.out) / f"{f'exp{exp}-' if exp else ''}{name}-seed{seed}"


def base(args, network: str) -> Path | None:
    """Return the weights that all cells begin with, trained where they are missing; None where that was stopped.

    Of the epochs the one is kept that is the best on held-out training images.
    """
    flags, weights, images, training, _ = NETWORKS[network]
    weights, path = Path(args.weights_dir) / weights, Path(args.out) / f"{network}-base" / "baseline.pt"
    if not training or path.exists():
        return path if training else weights
    _, (config,) = cli.arguments(f"{flags} --seed 42 --set {RUN} {images} {training} model.weights={weights} "
                                 f"data.dir={args.data_dir} eval.protocol=holdout".split())
    torch.manual_seed(config.seed)
    log, splits = Log(), data.load(config.data, pretrained_stats=models.PRETRAINED_STATS[config.model.name])
    phases = Phases(path.parent / "state", identity(config), STORED, log=log)
    try:
        with switches(config):
            model, survey = make(config, splits, torch.device("cpu"), Ranks(), log, None)
            phases.begin(phases.exists)
            run = Run(model, survey, splits.train, splits.test, config, log, phases=phases)
            phases.once("baseline", run.train_baseline, network=model)
            log.info(f"{network}: {100 * correct(model, splits.test).float().mean():.2f} on all test images")
    except KeyboardInterrupt:
        return None
    replace_file(path, lambda file: torch.save(model.state_dict(), file))
    return path


def keep(args, network: str, times: int, method: str, seed: int) -> None:
    """Score a finished cell and write its file."""
    place, images = folder(args, network, f"{network}-{times}-{method}", seed), NETWORKS[network][2]
    result, config = (json.loads((place / f"{name}.json").read_text()) for name in ("result", "config"))
    torch.set_num_threads(1)
    name = config["settings"]["data.name"]
    where = override(Config(), [*images.split(), f"data.name={name}", f"data.dir={args.data_dir}"])
    test = data.load(where.data, pretrained_stats=models.PRETRAINED_STATS[where.model.name]).test
    model = getattr(networks, network)() if hasattr(networks, network) else None
    model = pack.load(place / "packed.pt", model=model).to(memory_format=torch.channels_last)
    hit, given = correct(model, test), Path(args.results) / f"given-{network}.json"
    if not given.exists():
        model.load_state_dict(torch.load(place / "baseline.pt", weights_only=True))
        write_json(given, {"network": network, "times": 1, "method": "given", "fp32_bytes": result["fp32_bytes"],
                           "packed_bytes": result["fp32_bytes"], "test_images": len(test),
                           "deployed_hits": digits(correct(model, test))})
    write_json(cell_file(args, network, times, method, seed), {
        **{key: result[key] for key in KEPT}, **{key: config[key] for key in MADE},
        "notes": [note.replace(str(args.data_dir), "DIR") for note in result["notes"]],
        "network": network, "times": times, "method": method, "settings": f"{NETWORKS[network][4]} {METHODS[method]}",
        "test_images": len(test), "deployed_hits": digits(hit)})


def cell_file(args, network: str, times: int, method: str, seed: int) -> Path:
    """Return where the results of a cell are kept."""
    return Path(args.results) / f"{network}-{times}-{method}-seed{seed}.json"


def digits(hit: torch.Tensor) -> str:
    """Return which test images are right, bool [n], as a cell's file holds it."""
    return np.packbits(hit.numpy()).tobytes().hex()


def hits(cell: dict) -> np.ndarray:
    """Return which test images a cell's packed file has right, uint8 [n]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(cell["deployed_hits"]), np.uint8))[:cell["test_images"]]


def table(cells: list[dict], network: str, times: int, reference: str) -> str:
    """Return Markdown with a row per method that has cells of a network and size: the deployed accuracy in percent, and
    how far it is from that of ``reference``, or of the network as ``given``, paired by seed and image over the seeds
    that both have."""
    rows = [f"| {network}, file ÷ {times} | seeds | bytes | deployed | deployed - {reference}'s [95 %] | "
            "search, repair |", "|---" * 6 + "|"]
    of = {name: {cell["seed"]: cell for cell in cells if (cell["network"], cell["times"], cell["method"])
                 == (network, times, name)} for name in METHODS}
    of["given"] = {seed: cell for cell in cells if (cell["network"], cell["method"]) == (network, "given")
                   for own in of.values() for seed in own}
    for name, own in ((name, of[name]) for name in METHODS):
        both, difference = sorted(own.keys() & of[reference].keys()), ""
        if not own:
            continue
        if both and name != reference:
            before, after = ([hits(of[side][seed]) for seed in both] for side in (reference, name))
            difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*crossed_interval(before, after))
        mean = {key: np.mean([cell[key] for cell in own.values()]) for key in ("packed_bytes",)}
        seconds = [np.mean([sum(c["timings"].get(part, 0) for part in parts) for c in own.values()])
                   for parts in (("table", "sensitivity", "hla", "search", "target"), ("finetune", "deploy"))]
        rows.append(f"| {name} | {' '.join(map(str, sorted(own)))} | {mean['packed_bytes']:,.0f} | "
                    f"{100 * np.mean([hits(cell) for cell in own.values()]):.2f} | {difference} | "
                    f"{seconds[0]:.0f} s, {seconds[1]:.0f} s |")
    return "\n".join(rows)


def figure(args, cells: list[dict]) -> None:
    """Write results/frontier.csv, and docs/frontier.svg of its rows: a plot per network, means over the seeds."""
    points = [(c["network"], c["method"], c["fp32_bytes"] / c["packed_bytes"], 100 * hits(c).mean()) for c in cells]
    points += [(name, *point) for name, own in PUBLISHED.items() for point in own]
    longer = [json.loads(path.read_text()) for path in Path(args.results).glob("long-*.json")]
    points += [(r["network"], r["series"], r["fp32_bytes"] / r["packed_bytes"], r["deployed_acc_full"]) for r in longer]
    rows = [{"network": name, "series": series, "times smaller": round(float(x), 2), "accuracy": round(float(y), 2)}
            for name, series, x, y in sorted(points)]
    with open(Path(args.results) / "frontier.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plots, of = {title: [] for title in TITLES.values()}, {}
    for row in rows:
        of.setdefault((row["network"], row["series"].partition(" (")[0], round(row["times smaller"])), []).append(row)
    for (network, series, times), own in of.items():
        mean = {key: round(float(np.mean([row[key] for row in own])), 2) for key in ("times smaller", "accuracy")}
        if series in SERIES:
            level = {"times smaller": None} if times == 1 else {}  # the network as given
            plots[TITLES[network]].append({"series": SERIES[series], **mean, **level})
    plots = {title: own for title, own in plots.items() if own}
    drawn = panels("accuracy of the packed file against its size", plots, SERIES.values(), "times smaller", "accuracy",
                   ("FP32 file / packed file", "accuracy, %"))
    for name, style in (('class="grid"', 'stroke="#ddd"'), ('class="axis"', 'stroke="#000"'),  # a page of its own
                        ("<svg ", '<svg style="background:#fff" font-family="sans-serif" font-size="12" ')):
        drawn = drawn.replace(name, style)
    write_text(ROOT / "docs" / "frontier.svg", drawn)


def main() -> int:
    """Command line; exit code 0 when all is done, else that of the cell that failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--weights-dir", default="weights", help="folder of the published weights")
    parser.add_argument("--out", default="runs-grid", help="folder of the run directories")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the small result files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--times", type=int, nargs="+", default=[12, 8, 16], help="how many times smaller than FP32")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[45, 46, 47])
    parser.add_argument("--table", choices=[*METHODS, "given"], metavar="METHOD",
                        help="only print how others differ from METHOD, or from the network as given")
    parser.add_argument("--figure", action="store_true", help="only draw the frontier")
    args = parser.parse_args()
    if args.table or args.figure:
        cells = [json.loads(path.read_text()) for path in sorted(Path(args.results).glob("*.json"))]
        cells = [cell for cell in cells if cell.get("method") in {*METHODS, "given"}]
        if args.figure:
            figure(args, cells)
        else:
            pairs = sorted({(cell["network"], cell["times"]) for cell in cells if cell["method"] != "given"})
            print("\n\n".join(table(cells, *pair, args.table) for pair in pairs))
        return 0
    Path(args.results).mkdir(exist_ok=True)
    for seed, times, method, network in product(args.seeds, args.times, args.methods, args.networks):
        if cell_file(args, network, times, method, seed).exists():
            continue
        weights, (flags, _, images, _, repair) = base(args, network), NETWORKS[network]
        code = 1
        if weights:
            size = sum(t.numel() * t.element_size() for t in torch.load(weights, weights_only=True).values())
            settings = f"{CELL} {images} {repair} {METHODS[method]} model.weights={weights} goal=size:{size // times}B"
            code = run(args, flags, f"{network}-{times}-{method}", seed, settings)
        if code:
            print(f"grid: {network} {method} seed {seed} ended with {code}; the same command goes on", file=sys.stderr)
            return code
        keep(args, network, times, method, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
