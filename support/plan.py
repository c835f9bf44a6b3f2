"""What a run would do and need, without doing it: ``--dry-run``. Nothing is written, nothing downloaded.

Each kind of work is tried once on a few images and multiplied by how often the settings ask for it, so the times are
those of this machine as it is now; early stopping makes a run shorter. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
from deploy import pack
from support import policies
from support import images as sources
from compress import compress_network, kernel_shapes, model_bytes, snap_to_grid
from config import BASELINES, EXPERIMENTS, Config, InputError
from support.log import duration
from support.own import own_network, try_network
from deploy.qat import GridTraining
from support.runs import check_settings, run_directory
from search import COMPARED, HLAEnsemble, Proxy, Surrogate, hla_nvec, lla_nvec, random_config
from deploy.target import parse_goal
from train import Trainer, correct, fisher_sensitivity

PROBE = 2.0  # seconds that a training step of a probe should take at most
RESERVE = 64e6  # bytes of a run directory besides its networks


def plan(config: Config, device: torch.device, check=lambda *_: None) -> str:
    """The plan of a run as text. check(model, blocks, train, test): what else the run refuses.

    Raises InputError for whatever the run would refuse before it starts, and where a disk has no room.
    """
    parse_goal(config.goal)
    policy = policies.read(config.policy) if config.policy else None
    config = policy.settings(config) if policy else config
    if config.data.batch_size < 2:
        raise InputError("data.batch_size=1 is too small: BatchNorm needs two images of a batch")
    if config.threads:
        torch.set_num_threads(config.threads)
    path, disk = run_directory(config), Disk()
    check_settings(path, config)
    again = "holds a run with these settings" if (path / "config.json").exists() else "new"
    lines = [f"device: {device}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"device: {device}",
             f"run directory: {path} ({again})"]

    splits, counts, decode, said = _look(config, disk)
    lines += said
    train, test = splits.train, splits.test
    torch.manual_seed(config.seed)
    model, survey, said = _network(config, splits, device, disk)
    lines += said
    shapes = [kernel_shapes(block) for block in survey.blocks]
    if policy:
        chosen, _, notes = policy.fit(survey.blocks, config)
        lines += [f"policy: {policy.where}, CR {chosen.cr:.2f}, nothing is searched", *notes]
    check(model, survey.blocks, train, test)

    size, kernels = model_bytes(model), sum(shape.params for block in shapes for shape in block)
    packed = size - 4 * kernels + kernels * config.compress.bits_max // 8
    training = 4 * size  # the network, both moments, the best epoch's; new ones are written beside the old
    disk.add("run directory", path, 2 * size + kernels // 8 + packed + 2 * training + _agent_bytes(config, shapes) + RESERVE)
    lines += disk.lines()

    rows, memory = _probe(config, model, survey.blocks, shapes, train, test, counts, bool(policy), device)
    rows.insert(0, ("data", "images to decode", *decode))
    lines += _memory(config, memory, size, counts, train, device)
    total = sum(count * each for _, _, count, each in rows)
    lines += ["", f"{'phase':12}{'of':44}{'count':>10}{'s each':>12}{'s':>12}"]
    lines += [f"{phase:12}{what:44}{count:>10,.0f}{_digits(each):>12}{_digits(count * each):>12}"
              for phase, what, count, each in rows if count]
    load = f" (load average {os.getloadavg()[0]:.1f} on {sources.cores()} cores)" if hasattr(os, "getloadavg") else ""
    lines += [f"about {duration(total)} in all as busy as the machine is now{load}, less where training stops early; "
              "nothing was written"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Disks


class Disk:
    """Bytes that a run would add, by file system."""

    def __init__(self):
        self.needs: list[tuple[str, Path, float]] = []

    def add(self, what, folder, size) -> None:
        """``size`` bytes below ``folder``, which need not be there yet; InputError where nothing can be written."""
        there = next(p for p in (Path(folder), *Path(folder).absolute().parents) if p.exists())
        if size and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise InputError(f"{folder} ({what}): cannot write there, {there} is no writable folder; choose another")
        self.needs.append((what, there, size))

    def lines(self) -> list[str]:
        """One line per file system; InputError where one has too little room."""
        found = []
        for device in dict.fromkeys(os.stat(folder).st_dev for _, folder, _ in self.needs):
            needs = [need for need in self.needs if os.stat(need[1]).st_dev == device]
            size, free = sum(need[2] for need in needs), shutil.disk_usage(needs[0][1]).free
            what = ", ".join(f"{name} {_mb(part)}" for name, _, part in needs if part)
            if size > free:
                raise InputError(f"{needs[0][1]}: the run needs {_mb(size)} there ({what}), {_mb(free)} are free; free "
                                 "space, or choose another --out, --data-dir or --weights-dir")
            found.append(f"disk of {needs[0][1]}: {_mb(size)} needed ({what}), {_mb(free)} free")
        return found


def _digits(number) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _mb(size) -> str:
    return f"{size / 1e6:,.1f} MB"


def _agent_bytes(config, shapes) -> int:
    """Weights and both moments of all agents' networks, float32; buffers of one rollout on top are small."""
    def one(observation, heads):
        body = (observation + 1) * 64 + 65 * 64
        return 12 * (2 * body + 65 * heads + 65)

    blocks = len(shapes)
    return len(config.hla.algorithms) * one(5 + 2 * blocks, sum(hla_nvec(blocks))) + len(config.lla.algorithms) * sum(
        one(12 + len(block), sum(lla_nvec(len(block)))) for block in shapes)


# ---------------------------------------------------------------------------------------------------------------
# What is there


def _look(config, disk):
    """→ (a few images of both splits, how many the run would use, (how many it would decode, seconds each), lines)."""
    settings, lines, seen, each = config.data, [], [], 0.0
    wanted = max(settings.batch_size, config.eval.batch_size)
    absent = None if settings.name == "synthetic" else sources.absent(settings)
    if absent:
        counts = tuple(getattr(settings, f"{split}_images") or most for split, most in
                       zip(("train", "test"), sources.PUBLISHED[settings.name][1:]))
        for split, count, most in zip(("train", "test"), counts, sources.PUBLISHED[settings.name][1:]):
            if count > most:
                raise InputError(f"data.{split}_images={count}: {settings.name} has {most}; give at most {most}, or 0 "
                                 "for all")
        lines.append(f"data: {settings.name} {absent.what}; tried with drawn images, the times leave it out")
        disk.add("data set", settings.dir, absent.bytes)
        settings = dataclasses.replace(settings, name="synthetic", classes=sources.PUBLISHED[settings.name][0],
                                       train_images=2 * wanted, test_images=wanted, normalize="dataset")
        splits = data.load(settings)
    else:
        sample = sources.Sample(**{**vars(settings), "cache": False, "workers": 0}, at_most=2 * wanted)
        splits = data.load(sample, lambda what, done, total: seen.append((time.monotonic(), done)),
                           models.PRETRAINED_STATS[config.model.name])
        counts = splits.asked
        each = (seen[-1][0] - seen[0][0]) / (len(splits.train) + len(splits.test)) if seen else 0.0
        lines.append(f"data: {settings.name}, {counts[0]} training and {counts[1]} test images, {splits.num_classes} "
                     f"classes, {settings.image_size} px")
        lines += [f"note: {note}" for note in splits.notes if not re.search("the first .* of", note)]
    side = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}.get(config.data.name, settings.image_size)
    to_decode = 0
    if seen or absent and not config.data.name.startswith("cifar"):
        for split, count in zip(("train", "test"), counts):
            size = count * 3 * side * side
            if config.data.name in ("imagenet", "folder") and size > sources.IN_MEMORY:
                lines.append(f"note: {split} images are streamed from disk; the times leave out their decoding")
            elif not config.data.cache:
                to_decode += count
            elif not sources.has_cache(config.data, split, side, size):
                to_decode += count
                disk.add(f"decoded {split} images", config.data.dir, size)
    return splits, counts, (to_decode if seen else 0, each), lines


def _network(config, splits, device, disk):
    """→ (network, survey, lines). Weights that are there are loaded; those that are not are named."""
    m, lines = config.model, []
    if m.source and config.data.normalize == "pretrained":
        raise InputError("data.normalize=pretrained: mean and std of the weights of a network of one's own are not "
                         "known; leave it at dataset, or normalise inside the network")
    if m.source:
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # not even beside the user's file
        try:
            model = own_network(m.source, splits.num_classes).to(device)
        finally:
            sys.dont_write_bytecode = before
    else:
        model = models.build(m.name, splits.num_classes, config.data.image_size, m.width, m.patch_size).to(device)
    if m.weights in ("none", "given"):
        lines.append(f"weights: {'trained from scratch' if m.weights == 'none' else 'those that the function gives'}")
    else:
        source = models.PRETRAINED[m.name] if m.weights == "auto" else m.weights
        url = source.url if m.weights == "auto" else m.weights if re.match("https?:|file:", m.weights) else ""
        target = models.weights_path(source, m.weights_dir) if url else source
        if url and not os.path.isfile(target):
            size = f"about {source.megabytes} MB" if m.weights == "auto" else "size not known"
            disk.add("weights", m.weights_dir, source.megabytes * 1e6 if m.weights == "auto" else model_bytes(model))
            lines.append(f"weights: {url} would be downloaded to {target} ({size}, {m.weights_dir} can be written)")
        else:
            quick = {"auto": None, "on": True, "off": False}[m.quick_gelu]
            report = models.load_pretrained(model, target, m.weights_dir, None, quick)
            if report.replaced and m.source:
                raise InputError(f"{target} does not fit the network: {', '.join(report.replaced)} of another class "
                                 "count")
            lines.append(f"weights: {report.loaded} tensors from {target}")
    example = splits.train.batch(torch.arange(min(8, len(splits.train))), device)[0]
    if m.source:
        if try_network(model, example)[1]:
            model = model.to(memory_format=torch.channels_last)
        survey = models.survey(model, example, scope=config.compress.scope)
    else:
        model = model.to(memory_format=torch.channels_last)
        survey = models.survey(model, scope=config.compress.scope)
    title = f"experiment {config.exp}: {EXPERIMENTS[config.exp].title}" if config.exp else m.source
    lines.insert(0, f"network: {title}{' (smoke)' if config.smoke else ''}, {len(survey.compressed)} kernels in "
                    f"{len(survey.blocks)} blocks, {_mb(model_bytes(model))}")
    return model, survey, lines


# ---------------------------------------------------------------------------------------------------------------
# Times


def _clock(work, device) -> float:
    """Seconds that work() takes."""
    start = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - start


def _probe(config, model, blocks, shapes, train, test, counts, given, device):
    """→ (rows: phase, what, count, seconds each; bytes that a training batch keeps for its backward pass)."""
    c, batch = config, config.data.batch_size
    train_count, test_count = counts
    eval_count, chosen_on = min(c.eval.images, test_count), "test"
    if c.eval.protocol == "holdout":
        eval_count, chosen_on = data.held_out(train_count), "held-out"
        train_count -= eval_count
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    sample = random_config(shapes, c.compress, np.random.default_rng(0))

    def trainer(n, on_grid, steps):
        return Trainer(model, train.subset(range(min(steps * n, len(train)))), test.subset(range(1)), epochs=1, lr=0.0,
                       weight_decay=0.0, patience=0, batch_size=n, eval_images=1, eval_batch_size=1,
                       generator=torch.Generator().manual_seed(0), on_grid=on_grid,
                       half=c.precision == "bfloat16" or c.precision == "auto" and device.type == "cuda")

    def step(n, on_grid=None, steps=2):
        made = trainer(n, on_grid, steps)
        made.run_epoch()  # the first one makes the optimiser's state
        return _clock(made.run_epoch, device) / math.ceil(len(made.train_set) / n) * batch / n

    n = min(4, batch, len(train))
    per_step = step(n)
    n = max(n, min(batch, len(train), int(n * PROBE / max(per_step * n / batch, 1e-6))))
    per_step = step(n, steps=max(2, min(8, int(PROBE / max(per_step, 1e-6)))))
    kept = _kept_bytes(model, *train.batch(torch.arange(n), device)) * batch / n
    images = test.subset(range(min(n, len(test))))
    correct(model, images, len(images))
    per_image = _clock(lambda: correct(model, images, len(images)), device) / len(images)
    x, y = train.batch(torch.arange(min(2, len(train))), device)
    per_fisher = _clock(lambda: fisher_sensitivity(model, blocks, x, y), device) / len(x)

    cycles, steps = c.search.cycles, math.ceil(train_count / batch)
    epoch = steps * per_step + eval_count * per_image
    rows = []
    if c.model.weights == "none":
        rows.append(("scratch", f"epochs of {steps} steps, {eval_count} {chosen_on} images", c.scratch.epochs, epoch))
    rows.append(("baseline", f"epochs of {steps} steps, {eval_count} {chosen_on} images", c.baseline.epochs, epoch))
    if c.sensitivity.method == "fisher":
        rows.append(("sensitivity", "images, a backward pass each", min(c.sensitivity.images, train_count), per_fisher))
    if not given:
        rows += _search_rows(c, model, blocks, shapes, sample, train, n, epoch, train_count, device)

    masks = compress_network(blocks, sample)
    on_grid = GridTraining(blocks, sample, masks, c.finetune.scales == "learned") if c.finetune.mode == "qat" else None
    if on_grid:
        epoch += steps * (step(n, on_grid) - per_step)
    rows.append(("finetune", f"epochs of {steps} steps, {eval_count} {chosen_on} images", cycles * c.finetune.epochs, epoch))
    model.load_state_dict(state)

    def deploy():
        made = compress_network(blocks, sample)
        pack.pack(model, blocks, sample, made, snap_to_grid(blocks, sample, made), {}, c.pack.rest)
    statistics = c.finetune.bn_images if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
                                             for m in model.modules()) else 0
    rows.append(("deploy", "packed files, statistics, evaluations", cycles, _clock(deploy, device) + (
        min(statistics, train_count) + 2 * eval_count) * per_image))
    rows.append(("report", "test images, of three networks", 3 * test_count * c.eval.full, per_image))
    return rows, kept


def _search_rows(c, model, blocks, shapes, sample, train, n, epoch, train_count, device):
    """The rows of the surrogate's warm-up, the agents and their candidates, the surrogate."""
    s, rows, cycles = c.surrogate, [], c.search.cycles
    proxy = Proxy(model, blocks, [train.batch(torch.arange(n), device)[0]], c.search.cache, c.search.dtype,
                  c.search.cache_mb, c.search.together, c.search.fold, c.search.winograd)
    middle, stages = len(blocks) // 2, [proxy.stages_passed(i) for i in range(len(blocks))]
    proxy.drops(middle, [sample.blocks[middle]])  # computes what is kept of theta_0
    per_candidate = _clock(lambda: proxy.drops(middle, [sample.blocks[middle]] * 2), device) / 2 * \
        c.search.proxy_batches * min(c.data.batch_size, train_count) / n
    agents = HLAEnsemble([sum(k.params for k in block) for block in shapes], [0.5] * len(blocks), c)
    per_agent_step = _clock(lambda: agents.train(64), device) / 64 / len(agents.agents)
    surrogate = Surrogate(5 * sum(map(len, shapes)), dataclasses.replace(s, enabled=True, min_samples=1), 0)
    samples = max(1, s.warmup + cycles)
    for _ in range(samples):
        surrogate.add(sample, 50.0)
    per_fit = _clock(lambda: surrogate.train(3), device) / 3

    if s.enabled and s.warmup:
        rows.append(("warmup", f"epochs of {math.ceil(train_count / c.data.batch_size)} steps", s.warmup, epoch))
        rows.append(("surrogate", "epochs of its own after the warm-up", s.epochs_after_warmup, per_fit))
    if c.search.method == "hirelc":
        rows.append(("hla", "agent steps, updates included", len(c.hla.algorithms) * (
            c.hla.timesteps + (cycles - 1) * c.hla.burst), per_agent_step))
    predicted = sum(s.enabled and s.warmup + cycle >= s.min_samples for cycle in range(cycles))
    each = len(c.lla.algorithms) * c.lla.timesteps if c.search.method != "null" else 0
    compared = 0 if c.search.method in BASELINES else 1 + COMPARED
    # A candidate of another block goes through another part of the network than one of the middle block.
    rows.append(("search", f"candidates by the proxy, as in {blocks[middle].name}"[:43],
                 (cycles - predicted) * (each + compared) * sum(stages) / stages[middle], per_candidate))
    if each and c.search.method not in BASELINES:
        rows.append(("search", "agent steps, updates included", cycles * each * len(blocks), per_agent_step))
    if s.enabled:
        rows.append(("surrogate", "epochs of its own", cycles * s.epochs, per_fit))
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Memory


def _kept_bytes(model, x, y) -> int:
    """Bytes of the tensors that one forward pass in train mode keeps for its backward pass, parameters not counted."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), y)
    del loss
    return sum(kept.values())


def available_memory() -> int | None:
    """Bytes that this process may still take: the system's, or what a control group leaves; None where nothing says."""
    found = []
    try:
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]))
    except (OSError, TypeError):
        pass
    for most, now in (("memory.max", "memory.current"),
                      ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in (most, now))
            found.append(int(limit) - int(used))
        except (OSError, ValueError):  # no such group, or "max"
            pass
    return min(found) if found else None


def _memory(config, kept, size, counts, train, device) -> list[str]:
    """The estimate against what is there, with a warning where it does not suffice."""
    channels, height, width = train.batch(torch.arange(1))[0].shape[1:]
    side = getattr(train, "images", torch.empty(1, 1, height, width)).shape[-1]
    parts = {"network, gradients, optimiser": 4 * size, "copies of the network": 4 * size,
             "a training's state, while it is written": 3 * size * (device.type == "cpu"),
             "activations of a training batch (measured)": kept,
             "batches": 3 * 4 * max(config.data.batch_size, config.eval.batch_size) * channels * height * width,
             "the proxy's cache at most": 0 if config.policy else config.search.cache_mb * 1e6,
             "the proxy's network at most": 0 if config.policy else size * (
                 (config.search.fold or config.search.winograd) + 4 * config.search.winograd +
                 (config.search.around == "last"))}
    images = min(sum(counts) * channels * side * side, 2 * sources.IN_MEMORY)
    host = available_memory()
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "the GPU"
        rest = [("decoded images", images, host, "memory")]
    else:
        parts["decoded images"], free, where, rest = images, host, "memory", []
    lines = [f"memory: {_mb(sum(parts.values()))} ({', '.join(f'{k} {_mb(v)}' for k, v in parts.items() if v)})"
             + (f", {_mb(free)} available" if free is not None else "")]
    for what, needed, there, place in [("this", sum(parts.values()), free, where), *rest]:
        if there is not None and needed > there:
            lines.append(f"warning: {what} may not fit into {place} ({_mb(needed)}, {_mb(there)} available); lower "
                         "data.batch_size, data.image_size or search.cache_mb")
    return lines
