"""What a run would do and need, without doing it: ``--dry-run``. Nothing is written and nothing downloaded.

One step of training, of fine-tuning and of the search are timed and multiplied by how often they are asked for; early
stopping makes a run shorter. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch

import data
import models
from compress import compress_network, model_bytes
from config import LEVELS, Config, Data, InputError
from deploy.checks import check_given
from estimate import Proxy
from evidence.table import needs_table
from search import numeric_options, random_config
from support import layouts
from support.log import Log, duration
from support.networks import device_for, make
from support.ranks import Ranks
from support.weights import weights_path
from train import Recipe, correct

RESERVE = 64e6  # bytes of a run directory besides its networks


def plan(config: Config, path: Path, make_run) -> str:
    """Return the plan of a run as text. ``path``: its directory; ``make_run(model, survey, train, test)``: hirelc.Run.

    Raises InputError for whatever the run would refuse before it starts, and where a disk has no room.
    """
    device, needs, silent = device_for(config), [], Log(open(os.devnull, "w"))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    lines = [f"device: {device}, {torch.get_num_threads()} threads", f"run directory: {path} "
             f"({'holds a run with these settings' if (path / 'config.json').exists() else 'new'})"]
    splits, counts = _images(config, lines, needs)
    torch.manual_seed(config.seed)
    model, survey = make(_weights(config, lines, needs), splits, device, Ranks(), silent, check_given)
    size = model_bytes(model)
    lines.append(f"network: {config.model.source or config.model.name}, {len(survey.compressed)} kernels in "
                 f"{len(survey.blocks)} blocks, {size / 1e6:,.1f} MB")
    lines += [f"note: {note}" for note in silent.notes]
    run = make_run(model, survey, splits.train, splits.test)
    needs.append(("run directory", path, 9 * size + RESERVE))  # theta_0, tuned, best and a training, one written anew
    rows = _times(run, counts)
    lines += [*(_room(*need) for need in needs), "", f"{'phase':12}{'of':38}{'count':>12}{'s each':>12}{'s':>12}"]
    lines += [f"{phase:12}{what:38}{count:>12,.0f}{each:>12.4f}{count * each:>12,.1f}"
              for phase, what, count, each in rows if count]
    lines.append(f"about {duration(sum(count * each for *_, count, each in rows))} as busy as the machine is now, less "
                 "where training stops early, more for reading images; nothing was written")
    return "\n".join(lines)


def _absent(settings: Data) -> tuple[str, float] | None:
    """Return what would be done first to get a data set, and the bytes that it takes then; None where it is there."""
    if settings.name not in layouts.ARCHIVES:
        return None
    (url, folder, packed, unpacked), archive = layouts.ARCHIVES[settings.name], layouts.archive_of(settings)
    if (archive.parent / settings.name).exists() or (archive.parent / folder).exists():
        return None
    if archive.is_file():
        return f"unpacked from {archive}", unpacked
    return f"downloaded from {url} to {archive} (about {packed / 1e6:.0f} MB)", packed + unpacked


def _images(config: Config, lines, needs):
    """Return a few images of both splits, drawn ones where the data set is absent, and the numbers that a run has."""
    settings, wanted = config.data, 2 * max(config.data.batch_size, config.eval.batch_size)
    absent = _absent(settings)
    if not absent:
        sample = dataclasses.replace(settings, cache=False, workers=0)
        splits = data.load(sample, pretrained_stats=models.PRETRAINED_STATS[config.model.name], at_most=wanted)
        lines.append(f"data: {settings.name}, {splits.asked[0]} training and {splits.asked[1]} test images, "
                     f"{splits.num_classes} classes, {settings.image_size} px")
        return splits, splits.asked
    classes, *most = layouts.PUBLISHED[settings.name]
    counts = settings.train_images or most[0], settings.test_images or most[1]
    if counts[0] > most[0] or counts[1] > most[1]:
        raise InputError(f"data.train_images, data.test_images: {settings.name} has {most[0]} and {most[1]}, not "
                         f"{counts[0]} and {counts[1]}; 0 = all")
    lines.append(f"data: {settings.name} would be {absent[0]}; tried with drawn images")
    needs.append(("data set", Path(settings.dir), absent[1]))
    drawn = dataclasses.replace(settings, name="synthetic", classes=classes, train_images=wanted, test_images=wanted,
                                normalize="dataset")
    return data.load(drawn), counts


def _weights(config: Config, lines, needs) -> Config:
    """Say where the weights come from; the settings that it returns leave out those that would be downloaded."""
    m = config.model
    source = models.PRETRAINED[m.name] if m.weights == "auto" else m.weights
    target = weights_path(source, m.weights_dir) if m.weights == "auto" or "://" in m.weights else source
    if target == source or os.path.isfile(target):
        lines.append(f"weights: {target}")
        return config
    lines.append(f"weights: {getattr(source, 'url', source)} would be downloaded to {target}")
    needs.append(("weights", Path(m.weights_dir), 1e6 * getattr(source, "megabytes", 0)))
    return dataclasses.replace(config, model=dataclasses.replace(m, weights="given"))


def _room(what: str, folder: Path, size: float) -> str:
    """Return a line about the bytes that the run needs in a folder. Raises InputError where the disk has no room."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if size > free or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder} ({what}): the run needs {size / 1e6:,.1f} MB there, {free / 1e6:,.1f} MB are free, "
                         "or it cannot be written; choose another --out, --data-dir or --weights-dir")
    return f"disk: {what} needs {size / 1e6:,.1f} MB in {folder}, {free / 1e6:,.1f} MB are free"


def _times(run, counts):
    """Return (phase, what, how often, seconds each) of training, evaluation and search, each step timed once."""
    c, proxy = run.config, Proxy(run.model, run.blocks, run.calibration_batches())
    held_out = round(data.HOLDOUT_SHARE * counts[0]) if c.eval.protocol == "holdout" else 0
    steps = math.ceil((counts[0] - held_out) / c.data.batch_size)
    tests = math.ceil((held_out or min(c.eval.images, counts[1])) / c.eval.batch_size)
    sample = random_config(run.shapes, c.compress, np.random.default_rng(0))

    def seconds(work) -> float:
        work()  # what a first call sets up
        start = time.monotonic()
        work()
        return time.monotonic() - start

    plain = run.trainer("plan", Recipe("plan", 1, 0.0, 0.0))
    batch = run.train_set.batch(torch.arange(min(c.data.batch_size, len(run.train_set))), run.device)
    step = seconds(lambda: plain.step(*batch, len(batch[1])))
    test = seconds(lambda: correct(run.model, run.choice_set, c.eval.batch_size, c.eval.batch_size))
    candidate = sum(seconds(lambda i=i: proxy.drops(i, [sample.blocks[i]])) for i in range(len(run.blocks)))
    theta0 = run.weights()
    repair = run.finetuner("plan", sample, compress_network(run.blocks, sample), theta0)
    repair_step = seconds(lambda: repair.step(*batch, len(batch[1])))
    epochs = {"scratch": c.scratch.epochs * (c.model.weights == "none"), "baseline": c.baseline.epochs,
              "warmup": c.surrogate.warmup * (c.surrogate.enabled and not run.given),
              "finetune": c.finetune.epochs * c.search.cycles}
    rows = [(phase, f"epochs of {steps} steps and a measurement", count,
             steps * (repair_step if phase == "finetune" else step) + tests * test)
            for phase, count in epochs.items()]
    rows.append(("sensitivity", "images", c.sensitivity.images if c.sensitivity.method != "none" else 0,
                 3 * step / c.data.batch_size))  # alone, an image takes longer than in a batch
    widths = (c.compress.bits_max - c.compress.bits_min + 1) * math.prod(map(len, numeric_options(c.compress)))
    tried = c.search.cycles * {"null": 0, "greedy": 2, "uniform": widths}.get(
        c.search.method, len(c.lla.algorithms) * c.lla.timesteps)
    if needs_table(c):  # after it an estimate is a look-up; per kernel, at most
        tried = math.ceil((widths + LEVELS - 1) * sum(map(len, run.shapes)) / len(run.blocks))
    rows.append(("search", "candidates of every block", 0 if run.given else tried, candidate))
    whole = math.ceil(counts[1] / c.eval.batch_size) if c.eval.full else 0
    return [*rows, ("report", "test batches of five networks", 5 * whole, test)]
