"""The command line: its flags, the settings that they make, and the list of the experiments. Imports no torch."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for _path in ROOT.glob("*.py"):  # before one of them is imported: a folder of the user's may have a file of that name
    _spec = importlib.util.find_spec(_path.stem) if _path.stem != "hirelc" else None
    if _spec and _spec.origin and Path(_spec.origin).resolve() != _path:
        raise ImportError(f"'import {_path.stem}' finds {_spec.origin}, not {_path}: rename that file, or put {ROOT} "
                          "before its folder on sys.path")

from config import EXPERIMENTS, Config, InputError, override
from support.published import PRETRAINED

SMOKE = {  # small enough for two CPU cores; blocks, kernels and the code path stay
    "smoke": True, "out": "runs-smoke", "model.weights": "none",
    "threads": 1,  # tensors this small gain nothing from a second one, and waiting for it costs on a busy machine
    "data.name": "synthetic", "data.classes": 10, "data.image_size": 32, "data.train_images": 1024,
    "data.test_images": 256, "data.batch_size": 32,
    "scratch.epochs": 8, "scratch.lr": 2e-3, "scratch.warmup_epochs": 0.5, "baseline.epochs": 1,
    "finetune.epochs": 2, "finetune.lr": 5e-4,
    "search.cycles": 2, "search.proxy_batches": 1, "sensitivity.images": 16,
    "lla.timesteps": 32, "hla.timesteps": 64, "hla.burst": 64,
    "surrogate.min_samples": 1, "surrogate.epochs": 20, "surrogate.epochs_after_warmup": 40}
SMOKE_MODEL = {  # model.width and model.patch_size per network
    "deit_tiny_patch16_224": (0.25, 16), "deit_small_patch16_224": (0.125, 16), "deit_base_patch16_224": (0.0834, 16),
    "vit_base_patch32_clip_224": (0.0834, 16),
    "resnet18": (0.125, 0), "resnet50": (0.125, 0), "mobilenetv2_100": (0.25, 0)}
FLAGS = {"smoke": "smoke", "seed": "seed", "device": "device", "data_dir": "data.dir", "weights": "model.weights",
         "weights_dir": "model.weights_dir", "out": "out", "name": "name", "policy": "policy", "preset": "preset"}


def resolve(exp: int, flags: dict, assignments=()) -> Config:
    """Return the settings of an experiment: the paper's, then --smoke's, then the flags', then --set's."""
    if exp not in EXPERIMENTS:
        raise InputError(f"unknown experiment {exp}; there are {', '.join(map(str, EXPERIMENTS))} (see --list)")
    config = override(Config(), EXPERIMENTS[exp].settings)
    if flags.get("smoke"):
        width, patch = SMOKE_MODEL[config.model.name]
        config = override(config, {**SMOKE, "model.width": width, "model.patch_size": patch,
                                   "surrogate.warmup": min(config.surrogate.warmup, 4)})
    return override(override(config, flags), assignments)


def resolve_own(source: str, flags: dict, assignments=()) -> Config:
    """Return the settings for a network of the user's: the defaults, then --smoke's, the flags', then --set's.

    Its weights are those that its function gives it, it is trained already (no baseline epochs), and its name is the
    function's, unless a flag or setting says otherwise.
    """
    place, _, function = source.rpartition(":")
    if not place or not function or place.endswith(".py") and not os.path.isfile(place):
        raise InputError(f"--model {source}: expected module:function, or path/to/file.py:function of a file there")
    config = override(override(Config(), SMOKE if flags.get("smoke") else {}), {
        "model.source": source, "model.weights": "given", "name": function, "baseline.epochs": 0})
    config = override(override(config, flags), assignments)
    if config.model.weights == "auto":
        raise InputError("--weights auto: there are no published weights for a network of your own; give a file, none "
                         "to train from scratch, or leave the flag out for the weights that the function gives it")
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parser() -> argparse.ArgumentParser:
    """Return the parser of hirelc.py's arguments."""
    p = _Parser(prog="hirelc.py", description="Compress a vision network with hierarchical reinforcement learning, as "
                "in arXiv 2606.26002. Without data or a GPU: --exp 3 --smoke.")
    add = p.add_argument
    add("--exp", type=int, nargs="+", metavar="N", help="experiments of the paper, one after the other")
    add("--model", metavar="SOURCE", help="a network of your own: module:function or file.py:function")
    add("--load", metavar="FILE", help="only evaluate a packed file on the test images")
    add("--list", action="store_true", help="the experiments with the paper's numbers")
    add("--smoke", action="store_true", help="seconds, not hours: narrow network, synthetic images")
    add("--seed", type=int, help="seed of the run (42)")
    add("--device", help="auto, cpu or cuda")
    add("--data-dir", help="folder of the data sets")
    add("--weights", help="auto, none (train from scratch), or a file or URL; by itself --model's function gives them")
    add("--weights-dir", help="folder for downloaded weights")
    add("--out", help="folder that receives the run directories (runs; runs-smoke with --smoke)")
    add("--preset", help="plus: the search and training that go past the paper")
    add("--name", help="name of a variant, part of the run directory")
    add("--policy", metavar="FILE", help="apply the policy.json of a run, in one cycle, instead of searching")
    add("--dry-run", action="store_true", help="only check everything, and say what would run and for how long")
    add("--resume", action="store_true", help="go on with a run that was broken off")
    add("--restart", action="store_true", help="begin anew where a run was broken off or is finished")
    add("--no-table", action="store_true", help="leave out the results table at the end")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any setting of config.py, for example --set data.image_size=64 lla.timesteps=64")
    return p


def arguments(argv=None):
    """Return (arguments, a Config per run). Raises InputError for arguments that cannot be used."""
    args = parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (args.dry_run or args.load or args.list):
        raise InputError("--dry-run, --load and --list are for one process; leave out torchrun")
    if args.resume and args.restart:
        raise InputError("--resume goes on with a run, --restart begins it anew; give one of them")
    if args.list:
        return args, []
    if bool(args.exp) == bool(args.model):
        raise InputError("give either --exp N, for example --exp 3 --smoke, or --model FILE.py:FUNCTION, or --list")
    flags = {key: getattr(args, name) for name, key in FLAGS.items() if getattr(args, name) not in (None, False)}
    if args.load and len(args.exp or [0]) > 1:
        raise InputError("--load evaluates one file on one experiment's images; give one --exp")
    if args.policy is not None and (args.load or len(args.exp or [0]) > 1 or not args.policy):
        raise InputError("--policy applies one policy.json to one network; give one --exp, or --model, a file, and no "
                         "--load")
    configs = [resolve(exp, flags, args.set) for exp in args.exp or ()]
    return args, configs or [resolve_own(args.model, flags, args.set)]


def answer() -> None:
    """End the process where the arguments ask for text alone or cannot be used, before torch is imported."""
    try:
        args, _ = arguments()
    except InputError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return  # one of several processes: they settle who says it
        sys.exit(fail(error, 2))
    if args.list:
        print(list_experiments())
        sys.exit(0)


def fail(error, code: int) -> int:
    """Say on stderr, in one line, why the program ends, unless the error has no text; return its exit code."""
    sys.stdout.flush()
    if text := " ".join(str(error).split()):
        print(f"hirelc: {text}", file=sys.stderr)
    return code


def list_experiments() -> str:
    """Return the experiments with the paper's numbers, and where their weights come from, as text."""
    lines = ["exp  network, data                             cycles  epochs  paper: baseline   final    drop    CR"]
    for e in EXPERIMENTS.values():
        lines.append(f"{e.number:3}  {e.title:40}  {e.settings['search.cycles']:6}  {e.settings['finetune.epochs']:6}  "
                     f"{e.paper.baseline:15.2f}  {e.paper.final:6.2f}  {e.paper.drop:6.2f}  {e.paper.cr:4.2f}")
    lines += ["1 to 7 are the paper's seven experiments (run_all.sh); 8 and 9 its ImageNet-1K context.", "",
              "published weights (--weights auto)"]
    for name, source in PRETRAINED.items():
        check = f", SHA-256 {source.sha256}…" if source.sha256 else ""
        lines.append(f"  {name}: {source.url} (about {source.megabytes} MB{check})")
    return "\n".join(lines)


if getattr(sys.modules["__main__"], "__file__", None) and Path(sys.modules["__main__"].__file__).resolve() == (
        ROOT / "hirelc.py"):
    answer()
