"""Image sets: where they come from, their order, and batches augmented on the device (§4; ledger D15, D19).

A split is one uint8 tensor in CPU memory. A batch is picked from it, moved to the device as uint8 and only there
resized, augmented and normalised, all images at once. Every random number is drawn from a CPU generator that the
caller passes, so that a run sees the same batches on a CPU and on a GPU.

| data set | train augmentation, after the resize | images come from |
|---|---|---|
| cifar10, cifar100 | flip, crop, jitter | class folders, or the published archive through torchvision |
| tiny-imagenet | flip, jitter | the published folder tree, downloaded where absent |
| synthetic | flip, crop | drawn here |

Against a torchvision pipeline: the resize works on floats, so it does not round to 1/255 before the augmentation;
flips are taken before the resize, which gives the same pixels and moves fewer bytes; the order of the three colour
operations is drawn per batch, not per image; jitter factors are drawn per image, as there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import math
import os
import pathlib
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from config import Data, InputError

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYNTHETIC_STATS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

JITTER = 0.2                       # colour factors are uniform in [1 - JITTER, 1 + JITTER]
LUMA = (0.2989, 0.587, 0.114)      # weights of red, green, blue in a grey value (ITU-R 601), as torchvision's
ORDER_SEED = 2606                  # of the fixed permutation of files; no setting, so that test subsets stay the same
SYNTHETIC_SEED = 26002             # of the synthetic images; independent of the run's seed for the same reason
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 2000, 1000
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
PUBLISHED = {"cifar10": (10, 50_000, 10_000), "cifar100": (100, 50_000, 10_000),
             "tiny-imagenet": (200, 100_000, 10_000)}    # classes, training images, test images
SUFFIXES = (".png", ".jpg", ".jpeg")


def silent(what: str, done: int, total: int) -> None:
    """The progress callback that says nothing."""


@dataclass(frozen=True, eq=False)
class Images:
    """One split. ``size`` is the side in pixels after the resize; ``augment`` is what a generator switches on.

    ``images`` uint8 [N, 3, h, w] and ``labels`` int64 [N], both in CPU memory; ``mean`` and ``std`` per channel
    for values in [0, 1]; ``padding`` in pixels at ``size``. Raises ValueError for tensors of another kind.
    """
    images: torch.Tensor
    labels: torch.Tensor
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: tuple[str, ...] = ()
    padding: int = 4

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N, 3, h, w], not {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(self.images)}], "
                             f"not {self.labels.dtype} {list(self.labels.shape)}")
        unknown = set(self.augment) - {"flip", "crop", "jitter"}
        if unknown:
            raise ValueError(f"augment knows flip, crop and jitter, not {', '.join(sorted(unknown))}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index) -> Images:
        """The images at ``index`` (int64 tensor or list: a copy; slice: a view), with the same settings."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.int64)
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def batch(self, index, device="cpu", generator=None):
        """Images at ``index`` (int64 [n] or list) → (x float32 [n, 3, size, size], y int64 [n]) on ``device``.

        Resize, flip, crop, jitter, normalise (ledger D15's table); the middle three only with a generator, which
        must be a CPU one. The stored images are never changed.
        """
        index = torch.as_tensor(index, dtype=torch.int64)
        x = self.images.index_select(0, index).to(device, non_blocking=True)   # the bytes move, not the floats
        y = self.labels.index_select(0, index).to(device, non_blocking=True)
        n, draw = len(index), generator is not None
        if draw and "flip" in self.augment:
            x = flip(x, torch.rand(n, generator=generator) < 0.5)
        x = resize(x, self.size)
        if draw and "crop" in self.augment:
            corner = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator)
            x = crop(x, corner[0], corner[1], self.padding)
        x = x.to(torch.float32).div_(255)
        if draw and "jitter" in self.augment:
            factors = 1 - JITTER + 2 * JITTER * torch.rand(3, n, generator=generator)
            factors = factors.to(device).view(3, n, 1, 1, 1)
            for which in torch.randperm(3, generator=generator).tolist():
                (brightness_, contrast_, saturation_)[which](x, factors[which])
        return normalise_(x, self.mean, self.std), y

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        """Yield :meth:`batch` over the split; the last batch may be smaller.

        Without a generator in stored order and unaugmented; with one in an order drawn from it, augmented. With
        ``limit`` > 0 it ends after the first ``limit`` images of that order.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in (order[:limit] if limit > 0 else order).split(batch_size):
            if len(index):
                yield self.batch(index, device, generator)


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set. ``notes``: one line for everything that was substituted, converted, skipped or cut (for the log
    and result.json)."""
    train: Images
    test: Images
    num_classes: int
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


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


def normalise_(x, mean, std):
    """(x − mean)/std per channel, in place; x float [n, 3, h, w] in [0, 1]."""
    mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (mean, std))
    return x.sub_(mean).mul_(1 / std)


# ---------------------------------------------------------------------------------------------------------------
# Loading a data set by its name


def load(settings: Data, progress=silent) -> Splits:
    """Read, download or draw the data set that ``settings`` name, only the images that it asks for.

    ``train_images``: the first n of a fixed pseudo-random permutation (every class is in it early on);
    ``test_images``: the first n of the test order (ledger D15, D19); 0 = all. ``progress(what, done, total)`` is
    called while files are read (images) or downloaded (bytes).
    Raises InputError when the data is not there, cannot be had, is incomplete or damaged, or holds fewer images.
    """
    if settings.name == "synthetic":
        return _load_synthetic(settings)
    reader = {"cifar10": _load_cifar, "cifar100": _load_cifar, "tiny-imagenet": _load_tiny_imagenet}[settings.name]
    train, test, names, notes = reader(settings, progress)
    known = zip(("classes", "training images", "test images"),
                (len(names), train.available, test.available), PUBLISHED[settings.name])
    for what, found, published in known:
        if found != published:
            notes.append(f"{settings.name}: {found} {what} found, the published set has {published}")
    for what, part in (("training images: the first {} of a fixed permutation of {}", train),
                       ("test images: the first {} of the test order of {}", test)):
        if len(part.labels) < part.available:
            notes.append(f"{settings.name}: " + what.format(len(part.labels), part.available))
    mean, std = {"cifar10": CIFAR10_STATS, "cifar100": CIFAR100_STATS}.get(settings.name, IMAGENET_STATS)
    augment = ("flip", "jitter") if settings.name == "tiny-imagenet" else ("flip", "crop", "jitter")
    return Splits(Images(train.images, train.labels, settings.image_size, mean, std, augment),
                  Images(test.images, test.labels, settings.image_size, mean, std),
                  len(names), tuple(names), tuple(notes))


@dataclass(frozen=True, eq=False)
class Part:
    """A split as read: the asked-for images and labels, and how many there are in all."""
    images: torch.Tensor
    labels: torch.Tensor
    available: int


def fixed_order(n: int) -> list[int]:
    """The one permutation of n items behind every order and subset here (ledger D19).

    RandomState: numpy guarantees that its stream never changes, so subsets stay comparable across versions.
    """
    return np.random.RandomState(ORDER_SEED).permutation(n).tolist()


def _asked(settings, key, available, where):
    """How many images to take: the setting, or all for 0; InputError when there are fewer."""
    wanted = getattr(settings, key)
    if wanted > available:
        raise InputError(f"data.{key}={wanted}: {where} holds {available}; give at most {available}, or 0 for all")
    return wanted or available


def _read_part(settings, key, items, side, progress, notes) -> Part:
    """Decode the first asked-for ``items`` (path, label), which are in their final order already."""
    split = key.removesuffix("_images")
    count = _asked(settings, key, len(items), f"the {split} split of {settings.name} in {settings.dir}")
    chosen = items[:count]
    images, resized, recoloured = decode([path for path, _ in chosen], side, f"reading {split} images", progress)
    if resized:
        notes.append(f"{settings.name}: {resized} {split} images were not {side} x {side} and were resized to it")
    if recoloured:
        notes.append(f"{settings.name}: {recoloured} {split} images were not RGB (grey, palette) and were converted")
    return Part(images, torch.tensor([label for _, label in chosen], dtype=torch.int64), len(items))


def decode(paths, side, what="reading images", progress=silent, workers=None):
    """Image files → (uint8 [N, 3, side, side], number resized to that side, number converted to RGB).

    A pool of threads (Pillow decodes outside the interpreter lock) writes straight into the one tensor: all of
    Tiny ImageNet takes 1.35 GB, and no second copy of it is made.
    Raises InputError that names the first file that cannot be read.
    """
    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    pixels = images.numpy()                                 # the same memory

    def read(start):
        resized = recoloured = 0
        for i in range(start, min(start + chunk, len(paths))):
            try:
                with Image.open(paths[i]) as image:
                    if image.mode != "RGB":
                        image, recoloured = image.convert("RGB"), recoloured + 1
                    if image.size != (side, side):
                        image, resized = image.resize((side, side), Image.Resampling.BILINEAR), resized + 1
                    pixels[i] = np.asarray(image).transpose(2, 0, 1)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"{paths[i]}: not a readable image ({reason}); replace the file, or remove its "
                                 "data set's folder and get it again") from None
        return resized, recoloured

    chunk, done, counts = 250, 0, (0, 0)
    progress(what, 0, len(paths))
    pool = concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        for start, found in zip(range(0, len(paths), chunk), pool.map(read, range(0, len(paths), chunk))):
            counts = (counts[0] + found[0], counts[1] + found[1])
            done = min(start + chunk, len(paths))
            progress(what, done, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)                  # after an error, do not read on
    return images, *counts


# ---------------------------------------------------------------------------------------------------------------
# CIFAR-10 and CIFAR-100


def _load_cifar(settings, progress):
    """→ train Part, test Part, class names, notes; from class folders where there are any, else from the archive."""
    folder = pathlib.Path(settings.dir) / settings.name
    if folder.exists():
        return _load_class_folders(settings, folder, progress)
    import torchvision                                      # takes a second; only this branch needs it
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[settings.name]
    parts = {}
    for key in ("train_images", "test_images"):
        stored = _open_cifar(kind, settings, key == "train_images", progress)
        count = _asked(settings, key, len(stored.data), f"the archive of {settings.name}")
        # The published files are in random order: the test split keeps theirs.
        order = fixed_order(len(stored.data)) if key == "train_images" else list(range(len(stored.data)))
        images = torch.from_numpy(np.ascontiguousarray(stored.data[order[:count]].transpose(0, 3, 1, 2)))
        labels = torch.tensor(stored.targets, dtype=torch.int64)[order[:count]]
        parts[key] = Part(images, labels, len(stored.data))
    return parts["train_images"], parts["test_images"], stored.classes, []


def _open_cifar(kind, settings, train, progress):
    """torchvision's data set object; its files are fetched here first, with a time limit, where they are absent."""
    archive = pathlib.Path(settings.dir) / kind.filename
    try:
        return kind(settings.dir, train=train, download=False)
    except (RuntimeError, OSError):
        pass                                                # absent, or not what its checksums say
    try:
        if not archive.is_file():
            fetch(kind.url, archive, progress)
        return kind(settings.dir, train=train, download=True)       # checks the archive, extracts it, reads it
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{settings.name} is not in {settings.dir} and could not be had from {kind.url} ({reason}); "
                         f"put {kind.filename} or its folder {kind.base_folder} into {settings.dir}, or images as "
                         f"{settings.dir}/{settings.name}/train/CLASS/*.png and .../test/CLASS/*.png") from None


def _load_class_folders(settings, folder, progress):
    """``folder/{train,test}/<class>/*.png|jpg|jpeg``: class index = place in the sorted class names.

    Both splits are sorted, then put in the fixed permutation's order (ledger D19): in name order the first 1,280
    test images would be of two classes.
    """
    notes = [f"{settings.name}: read from class folders in {folder}; both splits in one fixed pseudo-random order"]
    names, parts = None, {}
    for split in ("train", "test"):
        layout = f"expected {folder}/{split}/CLASS/*.png or .jpg, one folder per class"
        found = sorted(entry.name for entry in _entries(folder / split, layout)
                       if entry.is_dir() and not entry.name.startswith("."))
        if names is not None and found != names:
            odd = sorted(set(found) ^ set(names))
            raise InputError(f"{folder}: train and test do not have the same class folders; only one has "
                             f"{', '.join(odd[:5])}")
        names, items, skipped = found, [], 0
        for label, name in enumerate(names):
            files, others = _image_files(folder / split / name, layout)
            items += [(path, label) for path in files]
            skipped += others
        if not items:
            raise InputError(f"{folder / split}: no class folders; {layout}")
        if skipped:
            notes.append(f"{settings.name}: skipped {skipped} {split} files that are not PNG or JPEG")
        items = [items[i] for i in fixed_order(len(items))]
        parts[split] = _read_part(settings, f"{split}_images", items, 32, progress, notes)
    return parts["train"], parts["test"], names, notes


def _entries(folder, mend):
    """The entries of a folder; InputError (with the way to mend it) when it is missing or not readable."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        raise InputError(f"{folder} is missing; {mend}") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); {mend}") from None


def _image_files(folder, mend):
    """(sorted paths of the images in a folder, number of other files); InputError when it holds no image."""
    entries = [entry.name for entry in _entries(folder, mend)]
    files = sorted(name for name in entries if name.lower().endswith(SUFFIXES) and not name.startswith("."))
    if not files:
        raise InputError(f"{folder} holds no images; {mend}")
    return [os.path.join(folder, name) for name in files], len(entries) - len(files)


# ---------------------------------------------------------------------------------------------------------------
# Tiny ImageNet


def _load_tiny_imagenet(settings, progress):
    """→ train Part, test Part, class names, notes. Test is the labelled validation split in the order of
    ``val_annotations.txt`` (ledger D19); class index = line of ``wnids.txt``."""
    tree = pathlib.Path(settings.dir) / "tiny-imagenet-200"
    if not tree.exists():
        _download_tiny_imagenet(settings, tree, progress)
    mend = f"get the whole set from {TINY_IMAGENET_URL} and extract it into {settings.dir}"
    notes = ["tiny-imagenet: test = the labelled validation split in the order of val_annotations.txt; "
             "class index = line of wnids.txt"]
    names = [line.strip() for line in _lines(tree / "wnids.txt", mend) if line.strip()]
    classes = {name: i for i, name in enumerate(names)}
    if not names or len(classes) < len(names):
        raise InputError(f"{tree / 'wnids.txt'} is empty or names a class twice; {mend}")

    train = []
    for name in names:                                      # class order: the permutation below mixes it
        train += [(path, classes[name]) for path in _image_files(tree / "train" / name / "images", mend)[0]]
    others = {entry.name for entry in _entries(tree / "train", mend) if entry.is_dir()} - set(names)
    if others:
        notes.append(f"tiny-imagenet: skipped {len(others)} train folders that wnids.txt does not name")
    train = [train[i] for i in fixed_order(len(train))]     # file names are permuted, never the decoded images

    annotations, images = tree / "val" / "val_annotations.txt", tree / "val" / "images"
    present, test = None, []
    for number, line in enumerate(_lines(annotations, mend), start=1):
        if not line.strip():
            continue
        file, label = (line.split("\t") + ["", ""])[:2]
        if label.strip() not in classes:
            raise InputError(f"{annotations}, line {number}: '{label.strip()}' is not a class of wnids.txt; {mend}")
        present = present or {entry.name for entry in _entries(images, mend)}
        if file not in present:
            raise InputError(f"{images / file} is missing ({annotations.name}, line {number}, names it); {mend}")
        test.append((os.path.join(images, file), classes[label.strip()]))
    if not test:
        raise InputError(f"{annotations} names no images; {mend}")
    return (_read_part(settings, "train_images", train, 64, progress, notes),
            _read_part(settings, "test_images", test, 64, progress, notes), names, notes)


def _lines(path, mend):
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise InputError(f"{path} {reason}; {mend}") from None


def _download_tiny_imagenet(settings, tree, progress):
    """Fetch the archive (unless it lies there) and extract it next to ``tree``, which appears only when complete."""
    archive = tree.with_suffix(".zip")
    if not archive.is_file():
        try:
            fetch(TINY_IMAGENET_URL, archive, progress)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"tiny-imagenet is not in {settings.dir} and could not be had from {TINY_IMAGENET_URL} "
                             f"({reason}); extract that archive so that {tree}/wnids.txt exists") from None
    scratch = tree.with_name(f"{tree.name}.{os.getpid()}.part")
    try:
        extract(archive, scratch)
        if not (scratch / tree.name).is_dir():
            raise InputError(f"{archive} holds no folder {tree.name}; delete it and start again to fetch a new one")
        os.replace(scratch / tree.name, tree)
    except OSError as error:
        if not tree.is_dir():                               # else another run extracted it in the meantime
            raise InputError(f"{archive} could not be extracted into {tree.parent} ({error}); free space or extract "
                             f"it by hand so that {tree}/wnids.txt exists") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(url, target, progress=silent, timeout=60):
    """Download ``url`` to the file ``target``, which appears only when complete. Raises OSError (a URLError is one)
    or http.client.HTTPException; ``timeout`` in seconds without a byte."""
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as source, open(partial, "wb") as sink:
            total, done = int(source.headers.get("Content-Length") or 0), 0
            while block := source.read(1 << 20):
                sink.write(block)
                done += len(block)
                progress(f"downloading {target.name}", done, total)
        if done < total:
            raise OSError(f"the connection ended after {done} of {total} bytes")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def extract(archive, folder):
    """Unpack a zip file into ``folder``. Raises InputError when it is damaged or when a member's name leads out of
    the folder (nothing is written then), OSError when it cannot be written."""
    mend = "delete it and start again to fetch a new one"
    try:
        with zipfile.ZipFile(archive) as source:
            for name in source.namelist():
                parts = name.replace("\\", "/").split("/")
                if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
                    raise InputError(f"{archive}: member '{name}' leads out of the folder; {mend}")
            source.extractall(folder)
    except (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:
        raise InputError(f"{archive} is damaged ({error}); {mend}") from None


# ---------------------------------------------------------------------------------------------------------------
# Synthetic images


def _load_synthetic(settings):
    train, test = synthetic(settings.classes, settings.train_images or SYNTHETIC_TRAIN,
                            settings.test_images or SYNTHETIC_TEST, settings.image_size, SYNTHETIC_SEED)
    note = (f"synthetic: {len(train)} training and {len(test)} test images of drawn shapes, made for trying the "
            "code out; accuracies on them say nothing about real images")
    names = tuple(f"class{i}" for i in range(settings.classes))
    return Splits(train, test, settings.classes, names, (note,))


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
