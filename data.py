"""Image sets: batches augmented on the device, data sets by name, the synthetic set (§4; ledger D15, D19).

A split is a uint8 tensor in CPU memory, or files that processes decode (:mod:`support.images`). A batch is picked from
it, moved to the device as uint8 and only there resized, augmented and normalised. Random numbers come from a CPU
generator that the caller passes: the same batches on a CPU and on a GPU.

| data set | train augmentation, after the resize |
|---|---|
| cifar10, cifar100 | flip, crop, jitter |
| tiny-imagenet, imagenet, folder | flip, jitter |
| synthetic (drawn here) | flip, crop |

Against a torchvision pipeline: the resize of CIFAR and Tiny ImageNet works on floats, so it does not round to 1/255
before the augmentation (imagenet and folder are resized as they are decoded, and do); flips come before the resize,
which gives the same pixels; the order of the three colour operations is drawn per batch, jitter factors per image.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config import Data, InputError
from support import images as sources
from support.images import ImageSet

CIFAR_STATS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
               "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYNTHETIC_STATS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

JITTER = 0.2                       # colour factors are uniform in [1 - JITTER, 1 + JITTER]
LUMA = (0.2989, 0.587, 0.114)      # weights of red, green, blue in a grey value (ITU-R 601), as torchvision's
SYNTHETIC_SEED = 26002             # of the synthetic images, whatever the run's seed: runs stay comparable
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 2000, 1000
HOLDOUT_SHARE, HOLDOUT_SEED = 0.05, 26002


@dataclass(frozen=True, eq=False)
class Images(ImageSet):
    """A split in memory: ``images`` uint8 [N, C, h, w], or float [N, C, H, W] used as they are; ``labels`` int64 [N].

    Of uint8 images, ``size``: side in pixels after the resize; ``mean``, ``std``: per channel, for values in [0, 1];
    ``augment``: what a generator switches on (jitter is for three channels); ``padding``: pixels at ``size``. Raises
    InputError for tensors of another kind.
    """
    images: torch.Tensor
    labels: torch.Tensor
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    padding: int = 4

    def __post_init__(self):
        x, y = self.images, self.labels
        if x.dim() != 4 or y.shape != x.shape[:1] or not len(y) or y.dtype != torch.int64 or not (
                x.is_floating_point() or x.dtype == torch.uint8 and x.shape[1] == len(self.mean)):
            raise InputError("images must be uint8, or floats already normalised, [N, C, H, W] and labels int64 [N], "
                             f"not {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index, device="cpu", generator=None):
        """Return x float32 [n, C, size, size] and y int64 [n] at ``index`` (int64 [n] or list) on ``device``, copies,
        augmented with a generator only."""
        index = torch.as_tensor(index, dtype=torch.int64)
        return self._prepare(self.images[index].detach(), index, device, generator)

    def _prepare(self, x, index, device, generator):
        """Flip, resize, crop, jitter, normalise; flip, crop and jitter (table above) only with a generator.

        x uint8 [n, C, h, w] at ``index`` → (float32 [n, C, size, size], labels int64 [n]) on ``device``; floats stay.
        """
        y = self.labels[index].to(device, non_blocking=True)
        if x.is_floating_point():
            return x.to(device, torch.float32), y
        x = x.to(device, non_blocking=True)                 # the bytes move, not the floats
        n, augment = len(x), self.augment if generator is not None else ()
        if "flip" in augment:
            x = flip(x, torch.rand(n, generator=generator) < 0.5)
        x = resize(x, self.size)
        if "crop" in augment:
            corner = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator)
            x = crop(x, corner[0], corner[1], self.padding)
        if "jitter" in augment:
            return normalise_(jitter(x.to(torch.float32).div_(255), generator), self.mean, self.std), y
        return normalise_(x.to(torch.float32), self.mean, self.std, 255), y     # one pass over the floats less


class Stream(Images):
    """A split on disk: ``images`` is :class:`support.images.Files`. Batches are those of :class:`Images` of the decoded
    files; InputError names one that cannot be read."""

    def __post_init__(self):
        """Check nothing: nothing is in memory."""

    def subset(self, index) -> Stream:
        """Return the images at ``index`` (int64 [n]), streamed as well."""
        files = dataclasses.replace(self.images, paths=self.images.paths[index.numpy()])
        return dataclasses.replace(self, images=files, labels=self.labels[index])

    def batch(self, index, device="cpu", generator=None):
        """As :meth:`Images.batch`, decoded in this process."""
        (index, rows), = self.images.read([torch.as_tensor(index, dtype=torch.int64)])
        return self._prepare(sources.pixels(rows), index, device, generator)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """As :meth:`ImageSet.batches`, two batches per process ahead."""
        parts = sources.chunks(len(self), batch_size, generator, limit)
        for index, rows in self.images.read(parts, self.images.workers):
            yield self._prepare(sources.pixels(rows), index, device, generator)


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set. ``notes``: a line for everything that was substituted, converted, skipped or cut; ``skipped``: how
    many files data.skip_corrupt left out; ``asked``: how many images of each split the settings ask for."""
    train: Images | Stream
    test: Images | Stream
    num_classes: int
    notes: tuple[str, ...]
    skipped: int = 0
    asked: tuple[int, int] = (0, 0)


# Resize, augmentation, normalisation. A trailing underscore: in place, as a fresh batch costs more than the arithmetic.


def resize(x, size):
    """Resize x [n, C, h, w] → float [n, C, size, size] in the same value range: bilinear, antialiased when shrinking.
    Images of that size come back as they are, uint8 included."""
    if x.shape[-2:] == (size, size):
        return x
    # Enlarging, the antialiased kernel has the plain one's weights, and is twice as fast on a CPU.
    return F.interpolate(x.to(torch.float32), size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def flip(x, which):
    """Mirror the images of x [n, C, h, w] where ``which`` (bool [n]) is true, left to right."""
    n = len(x)
    both = torch.cat((x, x.flip(3)))
    return both.index_select(0, torch.arange(n, device=x.device) + n * which.to(x.device))


def crop(x, top, left, padding):
    """Pad x [n, C, h, w] with zeros (black) on all sides, cut an h × w window per image.

    ``top``, ``left``: int64 [n], the window's corner in the padded image, 0 … 2·padding; (padding, padding) gives
    the image back.
    """
    h, w = x.shape[-2:]
    windows = F.pad(x, (padding,) * 4).unfold(2, h, 1).unfold(3, w, 1)      # view [n, C, 2p+1, 2p+1, h, w]
    return windows[torch.arange(len(x), device=x.device), :, top.to(x.device), left.to(x.device)]


def jitter(x, generator):
    """Change brightness, contrast and saturation of x float [n, 3, h, w] in [0, 1], in place, by factors per image."""
    factors = 1 - JITTER + 2 * JITTER * torch.rand(3, len(x), generator=generator)
    factors = factors.to(x.device).view(3, -1, 1, 1, 1)
    for which in torch.randperm(3, generator=generator).tolist():
        (brightness_, contrast_, saturation_)[which](x, factors[which])
    return x


def grey(x):
    """Grey values [n, 1, h, w] of x [n, 3, h, w]. Sums, not a matrix product, which TF32 or autocast would round."""
    return (x[:, :1] * LUMA[0]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def brightness_(x, factor):
    """Return x·f, clamped to [0, 1], in place. x float [n, 3, h, w] in [0, 1], factor [n, 1, 1, 1]; so the next two."""
    return x.mul_(factor).clamp_(0, 1)


def contrast_(x, factor):
    """Return f·x + (1 − f)·m, clamped, in place; m is each image's mean grey value."""
    mean = grey(x.mean((2, 3), keepdim=True))               # the mean of greys is the grey of the means
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def saturation_(x, factor):
    """Return f·x + (1 − f)·grey(x), clamped, in place."""
    pale = grey(x).mul_(1 - factor)
    return x.mul_(factor).add_(pale).clamp_(0, 1)


def normalise_(x, mean, std, top=1):
    """Return (x/top − mean)/std per channel, in place; x float [n, C, h, w] in [0, top]."""
    mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (mean, std))
    return x.mul_(1 / (top * std)).sub_(mean / std)


# Data sets by name, images of a user, the split that chooses


def load(settings: Data, progress=lambda what, done, total: None, pretrained_stats=None, at_most=0) -> Splits:
    """Read, download or draw the data set that ``settings`` name, only the images that it asks for.

    ``train_images``: the first n of a fixed pseudo-random permutation; ``test_images``: the first n of the test order
    (ledger D15, D19); 0 = all. ``progress(what, done, total)``: called as images are read. ``pretrained_stats``: mean
    and std of the network's published weights, which data.normalize=pretrained needs. ``at_most`` > 0: of either split
    only that many are read, although more are asked for. Raises InputError.
    """
    if settings.normalize == "pretrained" and pretrained_stats is None:
        raise InputError("data.normalize=pretrained needs the mean and std of a network's published weights")
    splits = _load_synthetic(settings) if settings.name == "synthetic" else _load_files(settings, progress, at_most)
    if settings.normalize != "dataset":
        stats = {"pretrained": pretrained_stats, "imagenet": IMAGENET_STATS, "none": ((0.0,) * 3, (1.0,) * 3)}
        mean, std = (tuple(values) for values in stats[settings.normalize])
        train, test = (dataclasses.replace(part, mean=mean, std=std) for part in (splits.train, splits.test))
        note = f"{settings.name}: normalised with the mean {mean} and std {std}, data.normalize={settings.normalize}"
        splits = dataclasses.replace(splits, train=train, test=test, notes=splits.notes + (note,))
    return splits


def _load_files(settings, progress, at_most):
    *parts, num_classes, notes = sources.read(settings, progress, at_most)
    mean, std = CIFAR_STATS.get(settings.name, IMAGENET_STATS)
    augment = ("flip", "crop", "jitter") if settings.name in CIFAR_STATS else ("flip", "jitter")
    splits = [(Stream if isinstance(part.images, sources.Files) else Images)(
        part.images, part.labels, settings.image_size, mean, std, how) for part, how in zip(parts, (augment, ()))]
    asked = (settings.train_images or parts[0].available, settings.test_images or parts[1].available)
    return Splits(*splits, num_classes, tuple(notes), sum(part.skipped for part in parts), asked)


def as_images(source, what="the images"):
    """Return what a user has as an object with ``len()``, ``batch`` and ``batches`` as :class:`Images` has them.

    Such an object comes back as it is; (x, y) with y integer [N]: x float [N, C, H, W] is taken as normalised, x uint8
    [N, C, h, h] only divided by 255, neither is augmented; a map-style Dataset of (float tensor [C, H, W], int) or a
    DataLoader over one: :func:`support.images.adapt`. ``what``: name of the set in messages. Raises InputError."""
    images = _as_images(source, what)
    x = getattr(images.whole if isinstance(images, Part) else images, "images", None)
    if isinstance(x, torch.Tensor) and x.is_floating_point():  # those of another Dataset are checked as they are read
        for index in torch.arange(len(x)).split(64):
            sources.finite(x[index[0]:index[-1] + 1], index, what)
    return images


def _as_images(source, what):
    if all(callable(getattr(source, name, None)) for name in ("batch", "batches", "__len__")):
        if not isinstance(labels := getattr(source, "labels", torch.empty(0)), torch.Tensor):
            raise InputError(f"{what}: its labels are a {type(labels).__name__}, expected an integer tensor [N]")
        return source
    if not isinstance(source, (tuple, list)) or [isinstance(part, torch.Tensor) for part in source] != [True, True]:
        return sources.adapt(source, what)
    x, y = source
    y = y.long() if y.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else y
    if any(part.is_meta or part.layout != torch.strided for part in source):
        raise InputError(f"{what}: sparse tensors, or on the meta device; give plain ones with values")
    if y.dtype != torch.int64 or y.dim() != 1:
        raise InputError(f"{what}: labels must be integers [N], one class per image, not {y.dtype} {list(y.shape)}")
    if not 0 < len(y) == x.shape[:1].numel():
        raise InputError(f"{what}: images {list(x.shape)} and {len(y)} labels; expected one or more, as many of both")
    if x.dtype == torch.uint8 and (x.dim() != 4 or x.shape[2] != x.shape[3]):
        raise InputError(f"{what}: uint8 images must be square [N, C, h, h], not {list(x.shape)}; give floats instead")
    if x.dtype == torch.uint8:
        return Images(x.cpu(), y.cpu(), x.shape[2], (0.0,) * x.shape[1], (1.0,) * x.shape[1])
    return Images(x, y, 0, (), ())


class Part(ImageSet):
    """The images of ``whole`` at ``index`` (int64 [n]), for sets of any kind."""

    def __init__(self, whole, index):
        self.whole, self.index = whole, index
        for name in {"mean", "std", "labels"} & set(dir(whole)):
            setattr(self, name, whole.labels[index] if name == "labels" else getattr(whole, name))

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index, device="cpu", generator=None):
        """Return images and labels at ``index``, as the whole set gives them."""
        return self.whole.batch(self.index[torch.as_tensor(index, dtype=torch.int64)], device, generator)


def subset(images, index):
    """Return the images at ``index`` (int64 [n]), read by as many processes as the whole set."""
    if isinstance(images, sources.Loaded):
        return sources.Loaded(torch.utils.data.Subset(images.dataset, index.tolist()), images.what, images.collate,
                              images.workers, images.worker_init)
    return images.subset(index) if isinstance(images, Stream) else Part(images, index)


def mixed(images):
    """Return the set in a fixed pseudo-random order, whatever the seed."""
    return subset(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(HOLDOUT_SEED)))


def hold_out(train):
    """Return (images to train on, images that choose): a fixed pseudo-random 5 % of ``train``, whatever the seed."""
    count = round(HOLDOUT_SHARE * len(train))
    if not count:
        raise InputError(f"eval.protocol=holdout: 5 % of {len(train)} training images are none; give more images")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(HOLDOUT_SEED))
    return subset(train, order[count:].sort().values), subset(train, order[:count])


# Synthetic images


def _load_synthetic(settings):
    train, test = synthetic(settings.classes, settings.train_images or SYNTHETIC_TRAIN,
                            settings.test_images or SYNTHETIC_TEST, settings.image_size, SYNTHETIC_SEED)
    note = (f"synthetic: {len(train)} training and {len(test)} test images of drawn shapes, for trying the code out; "
            "accuracies on them say nothing about real images")
    return Splits(train, test, settings.classes, (note,), asked=(len(train), len(test)))


def synthetic(num_classes, train, test, size, seed):
    """Draw ``train`` and ``test`` images of side ``size`` ≥ 8 → (Images, Images); the same for the same arguments.

    A class is one of 10 shapes × 10 gratings (5 angles × 2 frequencies) × 10 hues; place, size, phase, shade and
    background are random, with noise. Up to 10 classes share 3 hues: colour alone does not tell them apart. Angles
    stay within a quarter turn: a mirrored image keeps its class.
    """
    if not 1 <= num_classes <= 1000 or size < 8:
        raise InputError(f"synthetic images: 1 to 1000 classes, a side of at least 8, not {num_classes} and {size}")
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for count, augment in ((train, ("flip", "crop")), (test, ())):
        labels = (torch.arange(count) % num_classes)[torch.randperm(count, generator=generator)]    # balanced
        parts = labels.split(max(1, 2**20 // size**2))      # a million pixels at a time, whatever the size
        images = torch.cat([_draw(part, size, generator) for part in parts])
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
    a, v = ((x - centre[:, 0]) / radius).abs(), (y - centre[:, 1]) / radius         # [n, 1, size], [n, size, 1]
    for k, holds in enumerate(SHAPES):                                              # ten shapes, not n images
        chosen = shape == k
        inside[chosen] = holds(a[chosen], v[chosen], v[chosen].abs())

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


# Whether the point (±a, v), b = |v|, lies in a shape of radius about 1; every shape is its own mirror image.
SHAPES = (
    lambda a, v, b: a**2 + v**2 < 1,                                                # disc
    lambda a, v, b: torch.maximum(a, b) < 0.85,                                     # square
    lambda a, v, b: a + b < 1.1,                                                    # diamond
    lambda a, v, b: (v < 0.8) & (2 * a < v + 1),                                    # triangle, point up
    lambda a, v, b: (v > -0.8) & (2 * a < 1 - v),                                   # triangle, point down
    lambda a, v, b: (torch.minimum(a, b) < 0.3) & (torch.maximum(a, b) < 1),        # cross
    lambda a, v, b: (a**2 + v**2 < 1) & (a**2 + v**2 > 0.35),                       # ring
    lambda a, v, b: (torch.maximum(a, b) < 0.9) & (torch.maximum(a, b) > 0.55),     # frame
    lambda a, v, b: (a < 1.1) & (b < 0.4),                                          # bar lying
    lambda a, v, b: (a < 0.4) & (b < 1.1))                                          # bar standing
