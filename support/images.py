"""Image files decoded by processes and cached, and sets of images that are read as they are used (ledger D15, D19)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from config import InputError
from support import layouts
from support.files import one_line, replace_file, shown

IN_MEMORY = 4 * 2**30              # bytes of a decoded split of imagenet or folder; a larger one is streamed
MANY = 500                         # images from which on processes decode
CHUNK, MESSAGE = 50, 2**20         # images and bytes at most that a process hands over at once; containers share 64 MB
CACHE, FORMAT = ".hirelc-cache", 5 # folder of the cache files, beside the data, and their format
CHANGED, UNREADABLE = 1, 2         # flags of an image: resized or converted to RGB; not to be decoded
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
START = "fork" if "fork" in multiprocessing.get_all_start_methods() else None   # others import the user's script again


# Decoding. An image is a row, uint8 [1 + 3·side²]: a flag, then the pixels.


def decode(path, side):
    """Return the row of an image file; ``side`` 0 only tries whether it decodes. InputError where it does not."""
    row = np.zeros(1 + 3 * side * side, np.uint8)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image.load()
            if side:
                row[0] = CHANGED * (image.mode != "RGB" or image.size != (side, side))
                low, high = np.asarray(image).min(), np.asarray(image).max()
                if image.mode == "F" or image.mode[0] == "I" and (
                        low < 0 or high >= 2**16 or 0 < high < 2**8):  # whole numbers, of 8 or of 16 bits?
                    raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
                if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
                    image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
                image = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
                row[1:] = np.asarray(image).transpose(2, 0, 1).reshape(-1)
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise InputError(f"{shown(path)}: not a readable image ({one_line(error)}); replace it, or leave such images "
                         "out with data.skip_corrupt=true") from None
    return torch.from_numpy(row)


@dataclasses.dataclass(frozen=True, eq=False)
class Files(Dataset):
    """Image files decoded to ``side`` pixels when used; ``workers``: processes that stream them."""
    paths: np.ndarray                                       # bytes; every process would copy a list of strings
    side: int
    workers: int = 0

    def __getitem__(self, i):
        """Return the row of image i, flagged where it cannot be read: an error would come from a process as a text."""
        try:
            return decode(os.fsdecode(self.paths[i]), self.side)
        except InputError:
            return torch.zeros(1 + 3 * self.side**2, dtype=torch.uint8).index_fill_(0, torch.tensor(0), UNREADABLE)

    def read(self, parts, workers=0, skip=False):
        """Yield (positions int64 [n], rows) for all tensors of positions; without ``skip``, InputError names the first
        image that cannot be read."""
        for index, rows in read_ahead(self, parts, workers):
            for i in () if skip else (rows[:, 0] == UNREADABLE).nonzero().flatten():
                rows[i] = decode(os.fsdecode(self.paths[index[i]]), self.side)      # raises, with the reason
            yield index, rows


def pixels(rows):
    """Return the pixels of rows, uint8 [n, 3, side, side], a view."""
    side = round((rows.shape[1] // 3) ** 0.5)
    return rows[:, 1:].unflatten(1, (3, side, side))


def read_ahead(dataset, parts, workers, collate=default_collate, seeds=None, init=None):
    """Return pairs (positions, collated items) for all tensors of positions, read by ``workers`` processes (0 = here);
    ``seeds``: generator of the processes' random numbers; ``init``: called in each with its number."""
    loader = DataLoader(dataset, batch_sampler=[part.tolist() for part in parts], collate_fn=collate,
                        num_workers=workers, worker_init_fn=partial(_start, init=init),
                        multiprocessing_context=START if workers else None,
                        generator=seeds or torch.Generator())       # else a pass would draw from the global generator
    return zip(parts, loader)


def _start(worker, init):
    os.setpgrp()                # signals to a whole group (Ctrl-C, timeout) are for the parent; with it processes end
    if init:
        init(worker)


# Reading a data set, with a cache: one file of all rows, mapped into memory


class Split(NamedTuple):
    """A split as read: ``images`` uint8 [n, 3, side, side] or :class:`Files` to be streamed; ``labels`` int64 [n];
    ``available``: images of the whole split; ``skipped``: images left out."""
    images: torch.Tensor | Files
    labels: torch.Tensor
    available: int
    skipped: int = 0


def read(settings, progress, at_most=0):
    """Return (train Split, test Split, number of classes, notes) of the data set that ``settings`` (config.Data) name,
    with ``at_most`` > 0 no more images of a split than that. Raises InputError when it cannot be had, is incomplete or
    damaged, or holds too few images."""
    notes = []
    *listings, classes = layouts.find(settings, progress, notes)
    splits = [_read_split(settings, split, listing, progress, notes, at_most)
              for split, listing in zip(("train", "test"), listings)]
    return *splits, len(classes), notes


def _read_split(settings, split, listing, progress, notes, at_most) -> Split:
    """The first n images of a split, decoded, or to be streamed where that takes too much memory; with skip_corrupt
    n - k, where k of them cannot be read."""
    wanted, available, name = getattr(settings, f"{split}_images"), len(listing.labels), settings.name
    if wanted > available:
        raise InputError(f"data.{split}_images={wanted}: the {split} split of {name} in {settings.dir} holds "
                         f"{available}; give at most {available}, or 0 for all")
    count = min(wanted or available, at_most or available)
    if count < available:
        order = "a fixed permutation" if split == "train" else "the test order"
        notes.append(f"{name}: {split} images: the first {count} of {order} of {available}")
    labels = torch.tensor(listing.labels[:count])
    if listing.pixels is not None:
        return Split(listing.pixels[:count], labels, available)
    side = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}.get(name, settings.image_size)
    files = Files(np.array([os.fsencode(path) for path in listing.paths[:count]]), side,
                  CORES if settings.workers < 0 else settings.workers)
    size = count * 3 * side * side
    streamed = name in ("imagenet", "folder") and size > IN_MEMORY
    if streamed:
        notes.append(f"{name}: {split} images are streamed from disk; decoded they would take {size / 1e9:.1f} GB")
        if not settings.skip_corrupt:
            return Split(files, labels, available)
    rows = _rows(settings, split, listing, dataclasses.replace(files, side=0 if streamed else side), progress, notes)
    good, changed = rows[:, 0] != UNREADABLE, int((rows[:, 0] == CHANGED).sum())
    bad = [listing.paths[i] for i in (~good).nonzero()]
    if changed:
        notes.append(f"{name}: {changed} {split} images were resized to {side} x {side} or converted to RGB")
    if bad:
        notes.append(f"{name}: left out {len(bad)} {split} images that cannot be read, such as {', '.join(bad[:3])}")
    if len(bad) == count:
        raise InputError(f"{bad[0]}: no image of the {split} split can be read; replace the files")
    files = dataclasses.replace(files, paths=files.paths[good.numpy()])
    return Split(files if streamed else pixels(rows[good] if bad else rows), labels[good], available, len(bad))


def _rows(settings, split, listing, files, progress, notes):
    """The rows of ``files``, from the cache where it has them, and else decoded, by processes where they are many."""
    n, width = len(files.paths), 1 + 3 * files.side**2
    if settings.cache:
        target = _cache_file(settings, split, listing.paths, files.side)
        size = target.stat().st_size if os.access(target, os.R_OK) else 0
        if size >= n * width and size % width == 0:         # else cut off, or of fewer images; writes stay in memory
            return torch.from_file(str(target), shared=False, size=n * width, dtype=torch.uint8).view(n, width)
    what = f"{'reading' if files.side else 'checking'} {split} images"
    rows, done, workers = torch.empty(n, width, dtype=torch.uint8), 0, CORES if n >= MANY and CORES > 1 else 0
    parts = torch.arange(n).split(max(1, min(CHUNK, MESSAGE // width)))
    for index, part in files.read(parts, workers, settings.skip_corrupt):
        rows[index], done = part, done + len(part)
        progress(what, done, n)
    if settings.cache:
        try:
            target.parent.mkdir(exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}")    # another run may be writing the same file
            replace_file(part, lambda file: file.write(rows.numpy()))
            os.replace(part, target)
        except OSError as error:
            notes.append(f"{settings.name}: decoded images are not kept: {target.parent} cannot hold them ({error})")
    return rows


def _cache_file(settings, split, paths, side):
    """The path of a split's cache, which tells sizes, times and names of all files: changed ones are decoded anew."""
    digest = hashlib.blake2b(f"{FORMAT} {PIL.__version__} {settings.skip_corrupt}".encode(), digest_size=8)
    for path in paths:
        status = os.stat(path) if os.path.exists(path) else None        # decoding will say that it is absent
        name = path.removeprefix(str(Path(settings.dir)))
        digest.update(os.fsencode(f"{name}\t{status and (status.st_size, status.st_mtime_ns)}\n"))
    return Path(settings.dir) / CACHE / f"{settings.name}-{split}-{side}-{digest.hexdigest()}.rows"


# Sets that are read as they are used


def chunks(n, batch_size, generator=None, limit=0):
    """Return int64 positions of each batch: in order, or in an order drawn from the generator; the first ``limit``."""
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    return (order[:limit] if limit > 0 else order).split(batch_size) if n else ()


class ImageSet:
    """Base of sets with ``len()`` and ``batch(index, device, generator)``."""

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """Yield :meth:`batch` over the set; the last batch may be smaller. Without a generator in stored order and
        unaugmented; with one in an order drawn from it, augmented. ``limit`` > 0: the first images of that order."""
        for index in chunks(len(self), batch_size, generator, limit):
            yield self.batch(index, device, generator)


class Loaded(ImageSet):
    """A map-style ``dataset`` of (image float tensor, label int), read by ``workers`` processes (0 = this one). Raises
    InputError that names the set, ``what``, for the first item at once and for batches that are none or not finite."""

    def __init__(self, dataset, what, collate=default_collate, workers=0, worker_init=None):
        if not len(dataset):
            raise InputError(f"{what}: the data set is empty")
        self.dataset, self.what, self.collate = dataset, what, collate
        self.workers, self.worker_init = workers, worker_init
        self.images = dataset.tensors[0] if type(dataset) is torch.utils.data.TensorDataset else None    # in memory
        with torch.random.fork_rng(devices=[]):             # a look at an item must not shift the run's random numbers
            self.batch([0])

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, index, device="cpu", generator=None):
        """Return the items at ``index`` (int64 [n] or list), read in this process."""
        index = torch.as_tensor(index, dtype=torch.int64)
        with self._readable():
            return self._checked(self.collate([self.dataset[i] for i in index.tolist()]), index, device)

    @contextlib.contextmanager
    def _readable(self):
        try:
            yield
        except (InputError, OSError):
            raise
        except Exception as error:                          # whatever the user's data set, or collating, raises
            raise InputError(f"{self.what}: items must be (image float tensor, label int) of one size: "
                             f"{type(error).__name__}: {one_line(error)}") from error

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """As :meth:`ImageSet.batches`; the processes' random numbers follow the generator too, where there is one."""
        parts, seeds = chunks(len(self), batch_size, generator, limit), torch.Generator()
        if generator is not None:
            seeds.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        with self._readable():
            for index, batch in read_ahead(self.dataset, parts, self.workers, self.collate, seeds, self.worker_init):
                yield self._checked(batch, index, device)

    def _checked(self, batch, index, device):
        x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        if not (torch.is_tensor(x) and torch.is_tensor(y) and x.is_floating_point() and not y.is_floating_point()
                and y.shape == x.shape[:1] == index.shape):
            kinds = [f"{t.dtype} {list(t.shape)}" if torch.is_tensor(t) else type(t).__name__ for t in (x, y)]
            raise InputError(f"{self.what}: a batch must be (x float [n, C, H, W], y integer [n]), not {kinds}")
        finite(x, index, self.what)
        return x.to(device, torch.float32), y.to(device, torch.int64)


def finite(x, index, what):
    """Raise InputError for the first image that is not finite, of x float [n, …] at the places ``index`` of a set."""
    bad = ~x.to(torch.float32).isfinite().reshape(len(x), -1).all(1)
    if bad.any():
        raise InputError(f"{what}: image {int(index[int(bad.int().argmax())])} holds values that are not finite "
                         "(NaN or infinity); repair it or leave it out")


def adapt(source, what) -> Loaded:
    """Return a Dataset, a DataLoader or anything with ``len()`` and ``[]`` as a set; of a DataLoader its data set,
    collate_fn, num_workers and worker_init_fn. Raises InputError for what cannot be shuffled or read in part."""
    plain = not isinstance(source, DataLoader)
    dataset, sampler = (source, None) if plain else (source.dataset, source.sampler)
    unfit = (tuple, list, dict, str, torch.Tensor, np.ndarray, IterableDataset)
    if isinstance(dataset, unfit) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or not (
            plain or source.batch_size and type(sampler) in (SequentialSampler, RandomSampler)
            and len(sampler) == len(dataset) and not getattr(sampler, "replacement", False)):
        raise InputError(f"{what}: expected data.Images, a pair of tensors (x, y), a map-style torch Dataset (with "
                         "__getitem__ and __len__, no IterableDataset) or a DataLoader that gives every item of one "
                         f"once, in batches of one size, not {type(source).__name__}; choose items with Subset")
    return Loaded(dataset, what, *(() if plain else (source.collate_fn, source.num_workers, source.worker_init_fn)))
