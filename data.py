"""Image sets: batches augmented on the device, data sets by name, adapters for one's own (§4; ledger D15, D19).

A split is one uint8 tensor in CPU memory, often the mapped cache of :mod:`sources`, or a list of files that worker
processes decode. A batch is picked from it, moved to the device as uint8 and only there resized, augmented and
normalised, all images at once. Every random number is drawn from a CPU generator that the caller passes, so that a
run sees the same batches on a CPU and on a GPU, from memory and from disk.

| data set | train augmentation, after the resize |
|---|---|
| cifar10, cifar100 | flip, crop, jitter |
| tiny-imagenet, imagenet, folder | flip, jitter |
| synthetic (drawn here) | flip, crop |

Against a torchvision pipeline: the resize of CIFAR and Tiny ImageNet works on floats, so it does not round to 1/255
before the augmentation (imagenet and folder are resized as they are decoded, and do); flips are taken before the
resize, which gives the same pixels and moves fewer bytes; the order of the three colour operations is drawn per batch,
not per image; jitter factors are drawn per image, as there.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from support import images as sources
from config import Data, InputError
from support.images import silent

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYNTHETIC_STATS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

JITTER = 0.2                       # colour factors are uniform in [1 - JITTER, 1 + JITTER]
LUMA = (0.2989, 0.587, 0.114)      # weights of red, green, blue in a grey value (ITU-R 601), as torchvision's
SYNTHETIC_SEED = 26002             # of the synthetic images; independent of the run's seed for the same reason
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 2000, 1000


class ImageSet:
    """What the splits below share: fields ``labels`` int64 [N], ``size``, ``mean``, ``std``, ``augment``, ``padding``,
    and how a batch of uint8 images becomes floats."""

    def __len__(self) -> int:
        return len(self.labels)

    def _check(self):
        unknown = set(self.augment) - {"flip", "crop", "jitter"}
        if unknown:
            raise ValueError(f"augment knows flip, crop and jitter, not {', '.join(sorted(unknown))}")

    def _prepare(self, x, device, generator):
        """Resize, flip, crop, jitter, normalise (ledger D15's table); the middle three only with a generator, which
        must be a CPU one. x uint8 [n, C, h, w] on the CPU, not changed → float32 [n, C, size, size] on ``device``."""
        x = x.to(device, non_blocking=True)                 # the bytes move, not the floats
        n, draw = len(x), generator is not None
        if draw and "flip" in self.augment:
            x = flip(x, torch.rand(n, generator=generator) < 0.5)
        x = resize(x, self.size)
        if draw and "crop" in self.augment:
            corner = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator)
            x = crop(x, corner[0], corner[1], self.padding)
        if not (draw and "jitter" in self.augment):         # one pass over the floats less
            return normalise_(x.to(torch.float32), self.mean, self.std, 255)
        x = x.to(torch.float32).div_(255)
        factors = 1 - JITTER + 2 * JITTER * torch.rand(3, n, generator=generator)
        factors = factors.to(device).view(3, n, 1, 1, 1)
        for which in torch.randperm(3, generator=generator).tolist():
            (brightness_, contrast_, saturation_)[which](x, factors[which])
        return normalise_(x, self.mean, self.std)


@dataclass(frozen=True, eq=False)
class Images(ImageSet):
    """One split in memory. ``size`` is the side in pixels after the resize; ``augment`` is what a generator switches
    on.

    ``images`` uint8 [N, C, h, w] and ``labels`` int64 [N], both in CPU memory; ``mean`` and ``std`` per channel
    for values in [0, 1]; ``padding`` in pixels at ``size``. Jitter is for three channels. Raises ValueError for
    tensors of another kind.
    """
    images: torch.Tensor
    labels: torch.Tensor
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    padding: int = 4

    def __post_init__(self):
        channels = len(self.mean)
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != channels:
            raise ValueError(f"images must be uint8 [N, {channels}, h, w], "
                             f"not {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(self.images)}], "
                             f"not {self.labels.dtype} {list(self.labels.shape)}")
        self._check()

    def subset(self, index) -> Images:
        """The images at ``index`` (int64 tensor or list: a copy; slice: a view), with the same settings."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.int64)
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def batch(self, index, device="cpu", generator=None):
        """Images at ``index`` (int64 [n] or list) → (x float32 [n, C, size, size], y int64 [n]) on ``device``.

        Augmented with a generator only. The stored images are never changed.
        """
        index = torch.as_tensor(index, dtype=torch.int64)
        x = self._prepare(self.images.index_select(0, index), device, generator)
        return x, self.labels.index_select(0, index).to(device, non_blocking=True)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """Yield :meth:`batch` over the split; the last batch may be smaller.

        Without a generator in stored order and unaugmented; with one in an order drawn from it, augmented. With
        ``limit`` > 0 it ends after the first ``limit`` images of that order.
        """
        if generator is not None:
            for index in _order(len(self), generator, limit).split(batch_size):
                yield self.batch(index, device, generator)
            return
        count = min(limit, len(self)) if limit > 0 else len(self)
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))     # a view: nothing is gathered
            yield self._prepare(self.images[part], device, None), self.labels[part].clone().to(device)


@dataclass(frozen=True, eq=False)
class Stream(ImageSet):
    """One split that stays on disk: the files ``names`` (encoded, relative to ``folder``), decoded and resized to
    ``size`` by ``workers`` processes (-1 = one per core, 0 = in this one) while batches are used.

    The same batches for the same generator as :class:`Images` of the same files at that side. The processes start
    with the first pass and stay for the next; they draw no random numbers. An image that cannot be read raises
    InputError naming it, from :meth:`batch` and :meth:`batches`.
    """
    folder: str
    names: np.ndarray                                       # bytes: a list of strings would be copied by every process
    labels: torch.Tensor
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    padding: int = 4
    workers: int = -1
    _loaders: list = field(default_factory=list, init=False, repr=False)    # idle ones, at most one

    def __post_init__(self):
        if self.names.dtype.kind != "S" or self.labels.dtype != torch.int64 or len(self.names) != len(self.labels):
            raise ValueError(f"a stream needs N encoded names and int64 labels [N], not {self.names.dtype} "
                             f"[{len(self.names)}] and {self.labels.dtype} {list(self.labels.shape)}")
        self._check()

    def subset(self, index) -> Stream:
        """The images at ``index`` (int64 tensor, list or slice), with the same settings."""
        index = index if isinstance(index, slice) else torch.as_tensor(index, dtype=torch.int64)
        which = index if isinstance(index, slice) else index.numpy()
        return dataclasses.replace(self, names=self.names[which], labels=self.labels[index])

    def batch(self, index, device="cpu", generator=None):
        """As :meth:`Images.batch`; decoded here."""
        index = torch.as_tensor(index, dtype=torch.int64)
        paths = [os.path.join(self.folder, os.fsdecode(name)) for name in self.names[index.numpy()]]
        x = torch.from_numpy(sources.decode(paths, self.size)[0])
        return self._prepare(x, device, generator), self.labels[index].to(device, non_blocking=True)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """As :meth:`Images.batches`, two batches per process ahead."""
        chunks = _order(len(self), generator, limit).split(batch_size) if len(self) else ()
        if not self.workers:
            for index in chunks:
                yield self.batch(index, device, generator)
            return
        # Taken out while in use: a second pass at the same time starts processes of its own.
        loader = self._loaders.pop() if self._loaders else self._loader()
        try:
            loader.batch_sampler.chunks = chunks
            for index, (x, problem) in zip(chunks, loader):
                if problem:
                    raise InputError(problem)
                yield self._prepare(x, device, generator), self.labels[index].to(device, non_blocking=True)
        finally:
            if not self._loaders:
                self._loaders.append(loader)

    def _loader(self):
        count = sources.cores() if self.workers < 0 else self.workers
        return DataLoader(_Decoder(self.folder, self.names, self.size), batch_sampler=_Chunks(), collate_fn=_same,
                          num_workers=count, persistent_workers=True, generator=torch.Generator(),
                          multiprocessing_context=_context())


class _Decoder:
    """What a stream's DataLoader reads: a list of positions → (uint8 [n, 3, size, size], ""), or (empty, why)."""

    def __init__(self, folder, names, size):
        self.folder, self.names, self.size = folder, names, size

    def __len__(self):
        return len(self.names)

    def __getitems__(self, index):
        paths = [os.path.join(self.folder, os.fsdecode(self.names[i])) for i in index]
        try:
            return torch.from_numpy(sources.decode(paths, self.size, workers=1)[0]), ""
        except InputError as error:                         # raised here it would arrive as a traceback of many lines
            return torch.empty(0), str(error)


class _Chunks:
    """A batch sampler whose batches are given before each pass; persistent workers need one object throughout."""
    chunks = ()

    def __iter__(self):
        return (index.tolist() for index in self.chunks)

    def __len__(self):
        return len(self.chunks)


def _same(batch):
    return batch


def _context():
    """Worker processes are forked where that exists: other ways import the user's script once more."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def _order(n, generator, limit):
    """Positions int64 [n or limit]: drawn from the generator, or in order without one."""
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    return order[:limit] if limit > 0 else order


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set. ``notes``: one line for everything that was substituted, converted, skipped or cut (for the log
    and result.json); ``skipped``: how many files data.skip_corrupt left out; ``asked``: how many images of each split
    the settings ask for."""
    train: Images | Stream
    test: Images | Stream
    num_classes: int
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: int = 0
    asked: tuple[int, int] = (0, 0)


# ---------------------------------------------------------------------------------------------------------------
# Resize, augmentation and normalisation of a batch. A name with a trailing underscore works in place: at 224 px a
# fresh batch costs more than the arithmetic on it.


def resize(x, size):
    """Bilinear, antialiased when shrinking: [n, 3, h, w] → float [n, 3, size, size] in x's value range.

    Images that have the size already come back as they are, uint8 included.
    """
    if x.shape[-2:] == (size, size):
        return x
    # Enlarging, the antialiased kernel has the plain one's weights, and is twice as fast on a CPU.
    return F.interpolate(x.to(torch.float32), size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def flip(x, which):
    """Mirror the images of x [n, 3, h, w] where ``which`` (bool [n]) is true, left to right."""
    n = len(x)
    both = torch.cat((x, x.flip(3)))
    return both.index_select(0, torch.arange(n, device=x.device) + n * which.to(x.device))


def crop(x, top, left, padding):
    """Pad x [n, 3, h, w] with zeros (black) on all sides, cut an h × w window per image.

    ``top``, ``left``: int64 [n], the window's corner in the padded image, 0 … 2·padding; (padding, padding) gives
    the image back. Padding comes before the normalisation, as in torchvision's RandomCrop on images.
    """
    h, w = x.shape[-2:]
    windows = F.pad(x, (padding,) * 4).unfold(2, h, 1).unfold(3, w, 1)      # view [n, 3, 2p+1, 2p+1, h, w]
    return windows[torch.arange(len(x), device=x.device), :, top.to(x.device), left.to(x.device)]


def grey(x):
    """Grey values [n, 1, h, w] of x [n, 3, h, w]. Sums, not a matrix product, which TF32 or autocast would round."""
    return (x[:, :1] * LUMA[0]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def brightness_(x, factor):
    """x·f, clamped to [0, 1], in place. x float [n, 3, h, w] in [0, 1], factor [n, 1, 1, 1]; so the next two."""
    return x.mul_(factor).clamp_(0, 1)


def contrast_(x, factor):
    """f·x + (1 − f)·m, clamped, in place; m is each image's mean grey value."""
    mean = grey(x.mean((2, 3), keepdim=True))               # the mean of greys is the grey of the means
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def saturation_(x, factor):
    """f·x + (1 − f)·grey(x), clamped, in place."""
    pale = grey(x).mul_(1 - factor)
    return x.mul_(factor).add_(pale).clamp_(0, 1)


def normalise_(x, mean, std, top=1):
    """(x/top − mean)/std per channel, in place; x float [n, C, h, w] in [0, top]."""
    mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (mean, std))
    return x.mul_(1 / (top * std)).sub_(mean / std)


# ---------------------------------------------------------------------------------------------------------------
# Loading a data set by its name


def load(settings: Data, progress=silent, pretrained_stats=None) -> Splits:
    """Read, download or draw the data set that ``settings`` name, only the images that it asks for.

    ``train_images``: the first n of a fixed pseudo-random permutation (every class is in it early on);
    ``test_images``: the first n of the test order (ledger D15, D19); 0 = all. ``progress(what, done, total)`` is
    called while files are read (images) or downloaded (bytes). ``pretrained_stats``: (mean, std) of the network's
    published weights, which data.normalize=pretrained uses.
    Raises InputError when the data is not there, cannot be had, is incomplete or damaged, or holds fewer images;
    ValueError without the ``pretrained_stats`` that the settings need.
    """
    if settings.normalize == "pretrained" and pretrained_stats is None:
        raise ValueError("data.normalize=pretrained needs pretrained_stats, the network's (mean, std)")
    splits = _load_synthetic(settings) if settings.name == "synthetic" else _load_files(settings, progress)
    if settings.normalize == "pretrained":
        mean, std = (tuple(values) for values in pretrained_stats)
        train, test = (dataclasses.replace(part, mean=mean, std=std) for part in (splits.train, splits.test))
        note = f"{settings.name}: normalised with the mean {mean} and std {std} of the network's weights"
        splits = dataclasses.replace(splits, train=train, test=test, notes=splits.notes + (note,))
    return splits


def _load_files(settings, progress):
    *parts, names, notes = sources.read(settings, progress)
    mean, std = {"cifar10": CIFAR10_STATS, "cifar100": CIFAR100_STATS}.get(settings.name, IMAGENET_STATS)
    augment = ("flip", "crop", "jitter") if settings.name.startswith("cifar") else ("flip", "jitter")
    splits = []
    for part, how in zip(parts, (augment, ())):
        labels, common = torch.from_numpy(part.labels), (settings.image_size, mean, std, how)
        if part.files is None:
            splits.append(Images(torch.from_numpy(part.pixels), labels, *common))
        else:
            encoded = np.array([os.fsencode(name) for name in part.files.names])
            splits.append(Stream(str(part.files.folder), encoded, labels, *common, workers=settings.workers))
    asked = (settings.train_images or parts[0].available, settings.test_images or parts[1].available)
    return Splits(*splits, len(names), tuple(names), tuple(notes), sum(part.skipped for part in parts), asked)


# ---------------------------------------------------------------------------------------------------------------
# Images of one's own


def as_images(source):
    """What a user has → an object with ``len()``, ``batch`` and ``batches`` as :class:`Images` has them.

    - such an object: as it is
    - (x, y), y int64 [N]: x float [N, C, H, W] is taken as normalised; x uint8 [N, C, h, h] is only divided by 255.
      Neither is augmented
    - a map-style torch Dataset of (image float tensor [C, H, W], label int)
    - a DataLoader over one: its data set, collate_fn, num_workers and worker_init_fn are kept. Its order, batch size
      and drop_last are not, so one that draws a subset or a weighting is refused

    What a Dataset or DataLoader augments it does on its own, with or without a generator.
    Raises InputError for anything else.
    """
    if all(hasattr(source, name) for name in ("batch", "batches", "__len__")):
        return source
    if isinstance(source, (tuple, list)) and len(source) == 2 and all(isinstance(t, torch.Tensor) for t in source):
        return _from_tensors(*source)
    if isinstance(source, DataLoader):
        return _from_loader(source)
    if isinstance(source, IterableDataset):
        raise InputError("an IterableDataset cannot be shuffled or read in part: give a map-style Dataset (with "
                         "__getitem__ and __len__)")
    if isinstance(source, torch.utils.data.Dataset) or hasattr(source, "__getitem__") and hasattr(source, "__len__") \
            and not isinstance(source, (tuple, list, dict, str, torch.Tensor, np.ndarray)):
        return Loaded(source, torch.utils.data.default_collate)
    raise InputError(f"images must be data.Images, a pair of tensors (x, y), a torch Dataset or a DataLoader, "
                     f"not {type(source).__name__}")


def _from_tensors(x, y):
    if x.dim() != 4 or y.dim() != 1 or len(x) != len(y) or not len(x):
        raise InputError(f"a pair of tensors must be x [N, C, H, W] and y [N], not {list(x.shape)} and {list(y.shape)}")
    if y.dtype != torch.int64:
        raise InputError(f"labels must be int64 class indices, not {y.dtype}")
    if x.dtype == torch.uint8:
        if x.shape[2] != x.shape[3]:
            raise InputError(f"uint8 images must be square, not {x.shape[2]} x {x.shape[3]}; give floats instead")
        channels = x.shape[1]
        return Images(x.cpu(), y.cpu(), x.shape[2], (0.0,) * channels, (1.0,) * channels)
    if not x.dtype.is_floating_point:
        raise InputError(f"images must be uint8, or floats already normalised, not {x.dtype}")
    return Tensors(x, y)


def _from_loader(loader):
    if isinstance(loader.dataset, IterableDataset):
        raise InputError("a DataLoader over an IterableDataset cannot be shuffled or read in part: give one over a "
                         "map-style Dataset (with __getitem__ and __len__)")
    sampler = loader.sampler
    whole = type(sampler) is SequentialSampler or type(sampler) is RandomSampler and not sampler.replacement and \
        sampler.num_samples == len(loader.dataset)
    if type(loader.batch_sampler) is not BatchSampler or not whole:
        raise InputError(f"a DataLoader with batch_size=None, a batch sampler or a {type(sampler).__name__} that does "
                         "not give every item once: choose the items with torch.utils.data.Subset instead")
    return Loaded(loader.dataset, loader.collate_fn, loader.num_workers, loader.worker_init_fn)


@dataclass(frozen=True, eq=False)
class Tensors:
    """Images x float [N, C, H, W], used as they are, and labels y int64 [N], on any device."""
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index, device="cpu", generator=None):
        """Images and labels at ``index`` (int64 [n] or list): copies, float32."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.x.device)
        y = self.y.index_select(0, index.to(self.y.device))
        return self.x.index_select(0, index).to(device, torch.float32), y.to(device)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """As :meth:`Images.batches`, never augmented."""
        for index in _order(len(self), generator, limit).split(batch_size):
            yield self.batch(index, device)


class Loaded:
    """A map-style ``dataset`` of (image float tensor, label int), read by ``workers`` processes (0 = here).

    Raises InputError when its first items do not collate to (x float [n, …], y integer [n]), and later when a batch
    does not.
    """

    def __init__(self, dataset, collate, workers=0, worker_init=None):
        if not len(dataset):
            raise InputError("the data set is empty")
        self.dataset, self.collate, self.workers, self.worker_init = dataset, collate, workers, worker_init
        with torch.random.fork_rng(devices=[]):             # a look at an item must not shift the run's random numbers
            items = [dataset[0]]
        try:
            found = collate(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the data set's items must be (image float tensor, label int): "
                             f"{' '.join(str(error).split())}") from None
        self._on(found, "cpu")

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, index, device="cpu", generator=None):
        """Items at ``index`` (int64 [n] or list), read in this process."""
        index = torch.as_tensor(index, dtype=torch.int64).tolist()
        return self._on(self.collate([self.dataset[i] for i in index]), device)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """As :meth:`Images.batches`; the processes' own random numbers follow the generator too, where there is one."""
        chunks = _Chunks()
        chunks.chunks = _order(len(self), generator, limit).split(batch_size)
        seeds = torch.Generator()                           # else a pass would draw from the global generator
        if generator is not None:
            seeds.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        loader = DataLoader(self.dataset, batch_sampler=chunks, collate_fn=self.collate, num_workers=self.workers,
                            worker_init_fn=self.worker_init, generator=seeds,
                            multiprocessing_context=_context() if self.workers else None)
        for batch in loader:
            yield self._on(batch, device)

    def _on(self, batch, device):
        x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dtype.is_floating_point
                and not y.dtype.is_floating_point and y.dim() == 1 and len(x) == len(y)):
            what = [f"{part.dtype} {list(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
                    for part in (batch if isinstance(batch, (tuple, list)) else [batch])]
            raise InputError(f"a batch of the data set must be (x float [n, C, H, W], y integer [n]), not "
                             f"({', '.join(what)})")
        return x.to(device, torch.float32), y.to(device, torch.int64)


class Part:
    """The images of ``whole`` at ``index`` (int64 [n]), for sets of any kind."""

    def __init__(self, whole, index):
        self.whole, self.index = whole, index

    def __len__(self) -> int:
        return len(self.index)

    def __getattr__(self, name):
        if name in ("mean", "std"):  # what a packed file says of the images
            return getattr(self.whole, name)
        raise AttributeError(name)

    @property
    def labels(self):
        """Labels int64 [n], where the whole set knows them."""
        return self.whole.labels[self.index]

    def batch(self, index, device="cpu", generator=None):
        """Images and labels at ``index``, as the whole set gives them."""
        return self.whole.batch(self.index[torch.as_tensor(index, dtype=torch.int64)], device, generator)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """As :meth:`Images.batches`."""
        for index in _order(len(self), generator, limit).split(batch_size):
            yield self.batch(index, device, generator)


HOLDOUT_SHARE, HOLDOUT_SEED = 0.05, 26002


def held_out(images: int) -> int:
    """How many of so many training images are held out; InputError where nothing is left on one side."""
    count = round(HOLDOUT_SHARE * images)
    if not 0 < count < images:
        raise InputError(f"eval.protocol=holdout: 5 % of {images} training images are none; give more images")
    return count


def hold_out(train):
    """(images to train on, images that choose): a fixed pseudo-random 5 % of ``train``, the same for every seed of a run.

    Raises InputError as :func:`held_out`.
    """
    count = held_out(len(train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(HOLDOUT_SEED))
    kept, chosen = order[count:].sort().values, order[:count]
    if isinstance(train, Images):
        return train.subset(kept), train.subset(chosen)
    return Part(train, kept), Part(train, chosen)


# ---------------------------------------------------------------------------------------------------------------
# Synthetic images


def _load_synthetic(settings):
    train, test = synthetic(settings.classes, settings.train_images or SYNTHETIC_TRAIN,
                            settings.test_images or SYNTHETIC_TEST, settings.image_size, SYNTHETIC_SEED)
    note = (f"synthetic: {len(train)} training and {len(test)} test images of drawn shapes, made for trying the "
            "code out; accuracies on them say nothing about real images")
    names = tuple(f"class{i}" for i in range(settings.classes))
    return Splits(train, test, settings.classes, names, (note,), asked=(len(train), len(test)))


def synthetic(num_classes, train, test, size, seed):
    """Draw ``train`` and ``test`` images of side ``size`` ≥ 8 → (Images, Images); the same for the same arguments.

    A class is one of 10 shapes × 10 gratings (5 angles × 2 frequencies) × 10 hues, so up to 1,000 classes. Place,
    size, phase, shade and background are random and there is noise: up to 10 classes share 3 hues, and colour
    alone does not tell them apart. Angles stay within a quarter turn, so that a mirrored image keeps its class.
    Raises ValueError out of these ranges.
    """
    if not 1 <= num_classes <= 1000 or size < 8:
        raise ValueError(f"synthetic images need 1 to 1000 classes and a side of at least 8, "
                         f"not {num_classes} and {size}")
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for count, augment in ((train, ("flip", "crop")), (test, ())):
        labels = (torch.arange(count) % num_classes)[torch.randperm(count, generator=generator)]    # balanced
        images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        chunk = max(1, 2**20 // size**2)                    # a million pixels at a time, whatever the size
        for start in range(0, count, chunk):
            images[start:start + chunk] = _draw(labels[start:start + chunk], size, generator)
        splits.append(Images(images, labels, size, *SYNTHETIC_STATS, augment, padding=max(1, min(4, size // 8))))
    return tuple(splits)


def _draw(labels, size, generator):
    """Labels int64 [n] → uint8 [n, 3, size, size]."""
    n = len(labels)
    shape, grating, hue = labels % 10, (labels // 10 + labels) % 10, (labels // 100 + labels % 10 % 3) % 10
    uniform = lambda low, high, *dims: low + (high - low) * torch.rand(n, *dims, 1, 1, generator=generator)
    line = (torch.arange(size) + 0.5) / size * 2 - 1                                # pixel centres in [-1, 1]
    x, y = line.view(1, 1, size), line.view(1, size, 1)

    centre, radius = uniform(-0.2, 0.2, 2), uniform(0.6, 0.85)
    inside = torch.empty(n, size, size, dtype=torch.bool)
    u, v = (x - centre[:, 0]) / radius, (y - centre[:, 1]) / radius                 # [n, 1, size], [n, size, 1]
    for k in range(10):                                                             # ten shapes, not n images
        chosen = shape == k
        inside[chosen] = _inside(k, u[chosen], v[chosen])

    angle = (grating % 5).view(n, 1, 1) * (math.pi / 8)                             # 0 … 90 degrees
    cycles = torch.where(grating < 5, 1.2, 2.4).view(n, 1, 1).clamp(max=size / 5)   # per unit of x: half the side
    phase = uniform(0, 2 * math.pi)
    wave = torch.sin(2 * math.pi * cycles * (x * angle.cos() + y * angle.sin()) + phase)

    tones = torch.tensor([0.0, 1 / 3, 2 / 3])
    turns = (hue.view(n, 1) / 10 + uniform(-0.02, 0.02).view(n, 1) - tones) * (2 * math.pi)
    colour = (0.55 + 0.4 * turns.cos()).view(n, 3, 1, 1)
    colour = colour * uniform(0.8, 1.1, 1) * (0.65 + 0.35 * wave).unsqueeze(1)
    slope = uniform(-0.15, 0.15, 3, 2)                                              # [n, 3, 2, 1, 1]
    ground = uniform(0.1, 0.9, 3) + slope[:, :, 0] * x + slope[:, :, 1] * y
    image = torch.where(inside.unsqueeze(1), colour, ground)
    image += 0.05 * torch.randn(image.shape, generator=generator)
    return image.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _inside(shape, u, v):
    """Whether points (u, v) lie in a shape (0 … 9) of radius about 1; every shape is its own mirror image."""
    a, b = u.abs(), v.abs()
    if shape == 0:                                          # disc
        return u**2 + v**2 < 1
    if shape == 1:                                          # square
        return torch.maximum(a, b) < 0.85
    if shape == 2:                                          # diamond
        return a + b < 1.1
    if shape == 3:                                          # triangle, point up
        return (v < 0.8) & (2 * a < v + 1)
    if shape == 4:                                          # triangle, point down
        return (v > -0.8) & (2 * a < 1 - v)
    if shape == 5:                                          # cross
        return (torch.minimum(a, b) < 0.3) & (torch.maximum(a, b) < 1)
    if shape == 6:                                          # ring
        return (u**2 + v**2 < 1) & (u**2 + v**2 > 0.35)
    if shape == 7:                                          # frame
        return (torch.maximum(a, b) < 0.9) & (torch.maximum(a, b) > 0.55)
    if shape == 8:                                          # bar lying
        return (a < 1.1) & (b < 0.4)
    return (a < 0.4) & (b < 1.1)                            # bar standing
