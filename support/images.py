"""Image files decoded in processes and cached, and sets of images that are read as they are used (ledger D15, D19)."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pathlib
import signal
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import (BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler,
                              default_collate)

from config import InputError
from support import layouts
from support.files import one_line, shown
from support.layouts import PUBLISHED, Sample, absent  # noqa: F401 (for callers of this module)

IN_MEMORY = 4 * 2**30              # bytes of a decoded split of imagenet or folder; a larger one is streamed
MANY, CHUNK = 500, 50              # images from which on processes decode, and images per request to one
CACHE, FORMAT = ".hirelc-cache", 3 # folder of the cache files, beside the data, and their format
MAX_PIXELS, MAX_LENGTH = 64 << 20, 1 << 16                  # of an image; one that claims more may take minutes
RESIZED, RECOLOURED, UNREADABLE = 1, 2, 4                   # flags of an image

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it prints what is wrong with a file by itself, too


def silent(what: str, done: int, total: int) -> None:
    """The progress callback that says nothing."""


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_method():
    """Return how processes are started: forked where that exists; other ways import the user's script once more."""
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


# Decoding


def decode(paths, side, what="reading images", progress=silent, skip=False) -> np.ndarray:
    """Decode n image files → uint8 [n·(1 + 3·side²)]: a flag per file, the pixels of the readable ones, zeros.
    ``side`` 0 only tries to read them. Without ``skip``, InputError names the first that cannot be read."""
    n = len(paths)
    flat, end = np.zeros(n * (1 + 3 * side * side), np.uint8), n
    starts = range(0, n, CHUNK)
    pool = ProcessPoolExecutor(cores(), start_method(), _start_worker) if n >= MANY and cores() > 1 else None
    each = pool.map if pool else map
    progress(what, 0, n)
    try:
        parts = each(partial(read_images, side=side, skip=skip), [paths[start:start + CHUNK] for start in starts])
        for start, (pixels, flags) in zip(starts, parts):
            flat[start:start + len(flags)] = flags
            flat[end:end + pixels.size] = pixels.reshape(-1)
            end += pixels.size
            progress(what, start + len(flags), n)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)              # after an error, do not read on
    return flat


def read_images(paths, side, skip=False):
    """Decode n images → (pixels uint8 [m, 3, side, side] of the m readable ones, flags [n]); as :func:`decode`."""
    pixels, flags = np.zeros((len(paths), 3, side, side), np.uint8), np.zeros(len(paths), np.uint8)
    for i, path in enumerate(paths):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")             # of odd metadata; what matters is whether it decodes
                flags[i] = _read_image(path, pixels[i])
        except MemoryError:
            raise
        except Exception as error:                          # Pillow's decoders raise almost anything on damaged files
            if not skip:
                raise InputError(f"{shown(path)}: not a readable image ({one_line(error)}); replace the file, remove "
                                 "its data set's folder and get it again, or leave such images out with "
                                 "data.skip_corrupt=true") from None
            flags[i] = UNREADABLE
    return pixels[flags != UNREADABLE], flags


def _read_image(path, pixels):
    """Decode into uint8 [3, side, side] → flag."""
    flag, side = 0, pixels.shape[1]
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_LENGTH:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}, or than {MAX_LENGTH} "
                             "along a side")
        image.load()
        if side and image.mode != "RGB":
            image, flag = image.convert("RGB"), RECOLOURED
        if side and image.size != (side, side):
            image, flag = image.resize((side, side), Image.Resampling.BILINEAR), flag | RESIZED
        if side:
            pixels[:] = np.asarray(image).transpose(2, 0, 1)
    return flag


def _start_worker():
    """Leave Ctrl-C to the parent, and end with it even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# The cache: one .npy file of what decode() returns, mapped into memory. Its name ends in a hash over how it was made
# and over names, sizes and modification times of the whole split in order.


def _decoded(settings, split, listing, count, side, progress, notes):
    """(pixels, flags) of the first ``count`` files, from the cache where it has them."""
    flat, row = None, 3 * side * side
    if settings.cache:
        key = listing.digest(f"{FORMAT} {PIL.__version__} {side} bilinear")
        target = pathlib.Path(settings.dir) / CACHE / f"{settings.name}-{split}-{side}-{key}.npy"
        flat = _open_cache(target, count, side, notes)
    if flat is None or not settings.skip_corrupt and UNREADABLE in flat[:count]:
        what = f"{'reading' if side else 'checking'} {split} images"
        flat = decode([f"{listing.folder}/{name}" for name in listing.names[:count]], side, what, progress,
                      settings.skip_corrupt)
        if settings.cache:
            try:
                _keep(target, flat)
                mapped = _open_cache(target, count, side, notes)
                flat = flat if mapped is None else mapped
            except OSError as error:
                notes.append(f"{settings.name}: decoded images are not kept, {target.parent} cannot hold them "
                             f"({error.strerror or error})")
    flags, start = flat[:count], len(flat) // (1 + row)
    readable = np.count_nonzero(flags != UNREADABLE)
    return flat[start:start + readable * row].reshape(readable, 3, side, side), flags


def _open_cache(path, count, side, notes):
    """What :func:`decode` returned, mapped so that writes stay in memory; None where it covers fewer files."""
    try:
        flat = np.load(path, mmap_mode="c")
        if flat.dtype != np.uint8 or flat.ndim != 1 or len(flat) % (1 + 3 * side * side):
            raise ValueError(f"it holds {flat.dtype} {list(flat.shape)}")
        return flat if len(flat) >= count * (1 + 3 * side * side) else None
    except FileNotFoundError:
        return None
    except Exception as error:                              # numpy raises almost anything on damaged files
        notes.append(f"{path} is no whole cache of decoded images ({one_line(error)}); it is made again")
        return None


def _keep(target, flat):
    """Write a cache under another name and rename it; remove older ones of the split and abandoned parts."""
    target.parent.mkdir(exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            np.save(file, flat)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    for path in target.parent.glob(f"{target.name.rpartition('-')[0]}-*"):
        if path != target and path.stat().st_mtime < time.time() - 3600:    # a younger one may be another run's
            path.unlink(missing_ok=True)


# Reading a data set


@dataclass(eq=False)
class Split:
    """A split as read: ``labels`` int64 [n], ``pixels`` uint8 [n, 3, side, side], or :class:`Files` to be streamed.
    ``available``: images of the whole split; ``skipped``: images left out."""
    labels: np.ndarray
    available: int
    pixels: np.ndarray | Files
    skipped: int = 0


def read(settings, progress=silent):
    """Return (train Split, test Split, class names, notes) of the data set that ``settings`` (config.Data) name.
    Raises InputError when it cannot be had, is incomplete or damaged, or holds too few images."""
    notes, name = [], settings.name
    layout = layouts.find(settings, progress, notes)
    splits = [_read_split(settings, split, layout, progress, notes) for split in ("train", "test")]
    for part, what in zip(splits, ("training images: the first {} of a fixed permutation of {}",
                                   "test images: the first {} of the test order of {}")):
        if len(part.labels) + part.skipped < part.available:
            notes.append(f"{name}: " + what.format(len(part.labels) + part.skipped, part.available))
    return *splits, layout.classes, notes


def _read_split(settings, split, layout, progress, notes) -> Split:
    """The asked-for first images of a split, decoded, or to be streamed where that takes too much memory.

    Unreadable images among them are left out with skip_corrupt: n asked for, k unreadable gives n - k.
    """
    listing, name, side = getattr(layout, split), settings.name, layout.side
    wanted, available = getattr(settings, f"{split}_images"), len(listing.labels)
    if wanted > available:
        raise InputError(f"data.{split}_images={wanted}: the {split} split of {name} in {settings.dir} holds "
                         f"{available}; give at most {available}, or 0 for all")
    count = min(wanted or available, getattr(settings, "at_most", available))
    names, labels = listing.names, np.array(listing.labels[:count], np.int64)
    if listing.pixels is not None:
        return Split(labels, available, listing.pixels[:count])
    size, flags, pixels = count * 3 * side * side, np.zeros(count, np.uint8), None
    streamed = layout.may_stream and size > IN_MEMORY
    if streamed:
        notes.append(f"{name}: {split} images are streamed from disk; decoded to {side} px they would take "
                     f"{size / 1e9:.1f} GB")
    if not streamed or settings.skip_corrupt:
        pixels, flags = _decoded(settings, split, listing, count, 0 if streamed else side, progress, notes)
    readable = flags != UNREADABLE
    bad = [f"{listing.folder}/{names[i]}" for i in np.flatnonzero(~readable)]
    for flag, what in ((RESIZED, f"not {side} x {side} and were resized to it"),
                       (RECOLOURED, "not RGB (grey, palette) and were converted")):
        if (flags & flag).any():
            notes.append(f"{name}: {np.count_nonzero(flags & flag)} {split} images were {what}")
    if bad:
        notes.append(f"{name}: left out {len(bad)} {split} images that cannot be read: {', '.join(bad[:3])}"
                     f"{', …' if len(bad) > 3 else ''}")
    lost = set(labels.tolist()) - set(labels[readable].tolist())
    if not readable.any() or lost and count == available:
        raise InputError(f"{listing.folder}/{names[labels.tolist().index(min(lost))]}: no image of its class in the "
                         f"{split} split can be read; replace the files, or remove the class everywhere")
    if streamed:
        encoded = np.array([os.fsencode(name) for name in names[:count]])[readable]
        pixels = Files(listing.folder, encoded, side, cores() if settings.workers < 0 else settings.workers)
    return Split(labels[readable], available, pixels, len(bad))


# Sets that are read as they are used


@dataclass(frozen=True, eq=False)
class Files:
    """Image files in ``folder`` that ``workers`` processes (0 = this one) decode to uint8 [3, side, side] when used."""
    folder: str
    names: np.ndarray                                       # bytes; every process would copy a list of strings
    side: int
    workers: int

    def __getitem__(self, index):
        """Return the images at ``index`` (int64 [n]), uint8 [n, 3, side, side]. Raises InputError for a bad one."""
        paths = [os.path.join(self.folder, os.fsdecode(name)) for name in self.names[np.asarray(index)]]
        return torch.from_numpy(read_images(paths, self.side)[0])

    def __getitems__(self, index):
        """As ``[index]`` for a DataLoader, with the InputError as a value: raised, a traceback would arrive."""
        try:
            return self[index]
        except InputError as error:
            return error


def chunks(n, batch_size, generator=None, limit=0):
    """Return int64 positions of each batch: in order, or in an order drawn from the generator; the first ``limit``."""
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    return (order[:limit] if limit > 0 else order).split(batch_size) if n else ()


def read_ahead(dataset, parts, workers, collate=lambda batch: batch, seeds=None, init=None):
    """Return pairs (positions, collated items) for all tensors of positions, read by ``workers`` processes (0 = here);
    ``seeds``: generator of the processes' random numbers."""
    loader = DataLoader(dataset, batch_sampler=[part.tolist() for part in parts], collate_fn=collate,
                        num_workers=workers, worker_init_fn=init,
                        multiprocessing_context=start_method() if workers else None,
                        generator=seeds or torch.Generator())       # else a pass would draw from the global generator
    return zip(parts, loader)


class ImageSet:
    """Base of sets with ``len()`` and ``batch(index, device, generator)``."""

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """Yield :meth:`batch` over the set; the last batch may be smaller.

        Without a generator in stored order and unaugmented; with one in an order drawn from it, augmented. With
        ``limit`` > 0 only the first ``limit`` images of that order.
        """
        for index in chunks(len(self), batch_size, generator, limit):
            yield self.batch(index, device, generator)

    def subset(self, index) -> Part:
        """Return the images at ``index`` (int64 tensor, list, range or slice) as a set."""
        return Part(self, torch.arange(len(self))[index if isinstance(index, slice) else torch.as_tensor(index)])


class Part(ImageSet):
    """The images of ``whole`` at ``index`` (int64 [n]), for sets of any kind."""

    def __init__(self, whole, index):
        self.whole, self.index = whole, index

    def __len__(self) -> int:
        return len(self.index)

    def __getattr__(self, name):
        if name not in ("mean", "std", "labels"):           # of ``whole``, where it has them
            raise AttributeError(name)
        value = getattr(self.whole, name)
        return value[self.index] if name == "labels" else value

    def batch(self, index, device="cpu", generator=None):
        """Return images and labels at ``index``, as the whole set gives them."""
        return self.whole.batch(self.index[torch.as_tensor(index, dtype=torch.int64)], device, generator)


class Loaded(ImageSet):
    """A map-style ``dataset`` of (image float tensor, label int), read by ``workers`` processes (0 = this one).

    Raises InputError that names the set, ``what``, when its first item does not collate to (x float [n, …], y integer
    [n]), and later when a batch does not or holds images that are not finite.
    """

    def __init__(self, dataset, what, collate=default_collate, workers=0, worker_init=None):
        if not len(dataset):
            raise InputError(f"{what}: the data set is empty")
        self.dataset, self.what, self.collate = dataset, what, collate
        self.workers, self.worker_init = workers, worker_init
        with torch.random.fork_rng(devices=[]):             # a look at an item must not shift the run's random numbers
            items = [dataset[0]]
        try:
            batch = collate(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{what}: items must be (image float tensor, label int): {one_line(error)}") from None
        self._checked(batch, "cpu")

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, index, device="cpu", generator=None):
        """Return the items at ``index`` (int64 [n] or list), read in this process."""
        index = torch.as_tensor(index, dtype=torch.int64)
        return self._checked(self.collate([self.dataset[i] for i in index.tolist()]), device, index)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """As :meth:`ImageSet.batches`; the processes' random numbers follow the generator too, where there is one."""
        parts, seeds = chunks(len(self), batch_size, generator, limit), torch.Generator()
        if generator is not None:
            seeds.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        for index, batch in read_ahead(self.dataset, parts, self.workers, self.collate, seeds, self.worker_init):
            yield self._checked(batch, device, index)

    def _checked(self, batch, device, index=None):
        x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dtype.is_floating_point
                and not y.dtype.is_floating_point and y.dim() == 1 and len(x) == len(y)):
            kinds = [f"{part.dtype} {list(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
                     for part in (batch if isinstance(batch, (tuple, list)) else [batch])]
            raise InputError(f"{self.what}: a batch must be (x float [n, C, H, W], y integer [n]), not "
                             f"({', '.join(kinds)})")
        if index is not None:
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
    dataset = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(dataset, IterableDataset):
        raise InputError(f"{what}: an IterableDataset cannot be shuffled or read in part: give a map-style Dataset "
                         "(with __getitem__ and __len__)")
    if isinstance(source, DataLoader):
        sampler = source.sampler
        whole = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement
                                                       and sampler.num_samples == len(dataset))
        if type(source.batch_sampler) is not BatchSampler or not whole:
            raise InputError(f"{what}: a DataLoader with batch_size=None, a batch sampler or a {type(sampler).__name__}"
                             " must give every item once; choose items with torch.utils.data.Subset instead")
        return Loaded(dataset, what, source.collate_fn, source.num_workers, source.worker_init_fn)
    if isinstance(source, Dataset) or hasattr(source, "__getitem__") and hasattr(source, "__len__") \
            and not isinstance(source, (tuple, list, dict, str, torch.Tensor, np.ndarray)):
        return Loaded(source, what)
    raise InputError(f"{what}: expected data.Images, a pair of tensors (x, y), a torch Dataset or a DataLoader, "
                     f"not {type(source).__name__}")
