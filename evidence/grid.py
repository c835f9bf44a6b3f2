"""Methods against each other on published networks and real images, on a CPU: a grid of cells, one after another.

    python -m evidence.grid --data-dir DIR --weights-dir DIR     # what is not there yet; Ctrl-C and the same goes on
    python -m evidence.grid --table greedy     # results/*.json as Markdown, each method compared with greedy

A cell (network x size x method x seed) is a run of hirelc.py on one thread from the same trained network, with the same
bytes, the same table of estimates and the same repair. When it is done, a small file in ``results/`` holds what was
measured and which test images the packed file's network, read back here, has right (evidence/cells.py).
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch

import data
import models
from config import Config, override
from deploy import pack
from evidence import networks
from evidence.cells import METHODS, digits, read, sizes, table
from evidence.networks import NETWORKS
from hirelc import STORED, Run
from support import cli
from support.files import replace_file, write_json
from support.log import Log
from support.networks import make, switches
from support.ranks import Ranks
from support.runs import Phases, identity
from train import correct

ROOT = Path(__file__).resolve().parent.parent
RUN = "threads=1 precision=bfloat16 search.cycles=1 surrogate.warmup=0 search.proxy_batches=1"
CELL = f"{RUN} preset=plus search.estimate=table baseline.epochs=0 eval.protocol=holdout eval.full=false"
COMMAND = "python -m evidence.grid --networks {} --times {} --methods {} --seeds {} --data-dir DIR --weights-dir DIR"
KEPT = ("exp", "seed", "model", "data", "protocol", "eval_images", "baseline_acc", "final_acc", "deployed_acc", "cr",
        "retained", "packed_bytes", "fp32_bytes", "evaluations", "searches", "table", "timings")
MADE = ("started", "git", "versions", "hardware")  # of a run's config.json


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
        "command": COMMAND.format(network, times, method, seed),
        "test_images": len(test), "deployed_hits": digits(hit)})


def cell_file(args, network: str, times: int, method: str, seed: int) -> Path:
    """Return where the results of a cell are kept."""
    return Path(args.results) / f"{network}-{times}-{method}-seed{seed}.json"


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
    args = parser.parse_args()
    if args.table:
        cells = read(args.results)
        print("\n\n".join(table(cells, *size, args.table) for size in sizes(cells)))
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
