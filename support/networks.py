"""The network of a run: built or made by the user's function, with its weights, on its device, and its kernels."""

from __future__ import annotations

import contextlib
import os
import random

import numpy as np
import torch
from torch import nn

import models
from config import Config, InputError
from support.log import Log
from support.own import copy_network, own_network, try_network
from support.published import PRETRAINED
from support.ranks import Ranks


def device_for(config: Config, ranks: Ranks = Ranks()) -> torch.device:
    """Return the device of a run. Raises InputError for a GPU that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable GPU; use --device cpu or auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # cuBLAS keeps its results the same from run to run with this workspace alone; it reads it at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", ranks.rank) if ranks.size > 1 else torch.device("cuda")


def check(config: Config, ranks: Ranks) -> None:
    """Raise InputError for settings that cannot be used together."""
    if config.data.batch_size < 2 * ranks.size:
        raise InputError(f"data.batch_size={config.data.batch_size} is too small for {ranks.size} processes: each "
                         "needs two images of a batch")
    if config.model.weights == "given" and not config.model.source:
        raise InputError("model.weights=given: only a network of your own has its weights; use auto, none or a file")
    if config.model.source and config.data.normalize == "pretrained":
        raise InputError("data.normalize=pretrained is unknown of a network of your own; use imagenet, none or dataset")


def make(config: Config, splits, device, ranks: Ranks, log: Log, check) -> tuple[nn.Module, models.Survey]:
    """Return the network of a run with its weights on the device, and its kernels and blocks; ``check(model)`` looks at
    one of the user's before it is worked on."""
    c = config.model
    with ranks.in_turn():  # the first process downloads
        model = own_network(c.source, splits.num_classes) if c.source else models.build(
            c.name, splits.num_classes, config.data.image_size, c.width, c.patch_size)
        load_weights(model, config, log)
    if c.source:
        with ranks.alike():
            check(model)
            return prepare(copy_network(model).to(device), splits.train, splits.test, log, config)
    # Convolutions run up to 1.7 times faster with channels last, also on a CPU; ViTs do not care.
    model = model.to(device, memory_format=torch.channels_last)
    survey = models.survey(model, scope=config.compress.scope)
    log.info(f"{c.name}: {len(survey.compressed)} kernels in {len(survey.blocks)} blocks, "
             f"{sum(kernel.params for kernel in survey.compressed):,} kernel parameters")
    return model, survey


def load_weights(model: nn.Module, config: Config, log: Log) -> None:
    """Fill the network as ``model.weights`` says: published weights, a file, a URL, or as it is."""
    source = PRETRAINED[config.model.name] if config.model.weights == "auto" else config.model.weights
    if source in ("none", "given"):
        return
    quick_gelu = {"auto": None, "on": True, "off": False}[config.model.quick_gelu]
    report = models.load_pretrained(model, source, config.model.weights_dir, log.progress, quick_gelu)
    if report.replaced and config.model.source:
        raise InputError(f"{source} does not fit the network: {', '.join(report.replaced)} of another class count")
    log.info(f"weights: {report.loaded} tensors from {report.source}; new: {', '.join(report.replaced) or 'none'}")
    for note in report.notes:
        log.note(note)


def prepare(network: nn.Module, train, test, log: Log, config: Config, exclude=(), groups=None):
    """Return (network in the memory format that suits it, survey) of a user's network, tried on eight training images.

    What is left out is said in the log, and kept in the notes unless it is the classifier. Raises InputError for a
    network, images, labels or names that cannot be used.
    """
    if not len(train) or not len(test):
        raise InputError(f"{len(train)} training and {len(test)} test images: there must be some of both")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    images, _ = train.batch(torch.arange(min(8, len(train))), device)
    if images.dim() != 4:
        raise InputError(f"images are [C, H, W], batches of them [n, C, H, W], not {list(images.shape)}")
    classes, channels_last = try_network(network, images)
    for name, part in (("training", train), ("test", test)):  # of images that are read as they are used, a first pass
        y = part.labels if hasattr(part, "labels") else torch.cat([y.cpu() for _, y in part.batches(256)])
        for i in ((y < 0) | (y >= classes)).nonzero().flatten().tolist():
            raise InputError(f"{name} labels go from {int(y.min())} to {int(y.max())}, the network has logits for the "
                             f"classes 0 to {classes - 1}; the first beyond is {int(y[i])}, of image {i}")
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    survey = models.survey(network, images, exclude, groups, config.compress.scope)
    log.info(f"{type(network).__name__}: {len(survey.compressed)} kernels in {len(survey.blocks)} blocks, "
             f"{100 * survey.coverage:.2f} % of the kernel parameters besides the classifier's")
    for k in survey.excluded:
        say = log.info if k.reason == models.CLASSIFIER else log.note
        say(f"not compressed: {k.name} ({k.params:,} parameters): {k.reason}")
    return network, survey


@contextlib.contextmanager
def switches(config: Config):
    """Seed torch's, numpy's and Python's generators; inside, set torch's threads and TF32 switches as the settings say,
    with deterministic algorithms, with gradients and without autocast, whatever it is called under."""
    # Autocast forgets its copies of the weights when the outermost context ends: inside this one that is never.
    off = {"enabled": False, "cache_enabled": False}
    with contextlib.ExitStack() as after, torch.enable_grad(), torch.autocast("cpu", **off), torch.autocast(
            "cuda", **off):
        for unit in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            after.callback(setattr, unit, "fp32_precision", unit.fp32_precision)
            unit.fp32_precision = "tf32" if config.tf32 else "ieee"
        after.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn")
        after.callback(torch.set_num_threads, torch.get_num_threads())
        if config.threads:
            torch.set_num_threads(config.threads)
        for seed in (torch.manual_seed, np.random.seed, random.seed):  # a user's network or images may draw from any
            seed(config.seed)
        yield
