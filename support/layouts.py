"""Layouts of data sets on disk: which image files make a split, with which labels, in which order (ledger D15, D19).

| data set | below data.dir | order |
|---|---|---|
| cifar10, cifar100 | NAME/{train,test}/CLASS/*, or the published archive | permuted; the archive's test split as is |
| tiny-imagenet | tiny-imagenet-200/, the published tree, downloaded where absent | permuted; val_annotations.txt |
| imagenet | imagenet/{train,val}/CLASS/*, or {train,val}/CLASS/* | both permuted |
| folder | {train,val}/CLASS/* or {train,test}/CLASS/* | both permuted |

"Permuted" is one fixed pseudo-random permutation of the sorted files: subsets are prefixes in which every class turns
up early. Class index = place in the sorted class names; for tiny-imagenet, line of wnids.txt.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import tarfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from config import Data, InputError
from support.files import download, extract, one_line, shown

ORDER_SEED = 2606                  # of the fixed permutation of files; no setting, so that test subsets stay the same
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
PUBLISHED = {"cifar10": (10, 50_000, 10_000), "cifar100": (100, 50_000, 10_000),
             "tiny-imagenet": (200, 100_000, 10_000),
             "imagenet": (1000, 1_281_167, 50_000)}         # classes, training images, test images
ARCHIVES = {"cifar10": (170e6, 186e6), "cifar100": (169e6, 186e6), "tiny-imagenet": (248e6, 500e6)}  # bytes; unpacked


@dataclass(eq=False)
class Listing:
    """Images of a split in order: ``names`` of files relative to ``folder``, or decoded ``pixels`` uint8 [n, 3, h, w];
    ``labels``: class indices."""
    folder: str
    names: list[str]
    labels: list[int]
    pixels: np.ndarray | None = None

    def permuted(self) -> Listing:
        """Return the images in :func:`fixed_order`."""
        order = fixed_order(len(self.labels))
        return Listing(self.folder, [self.names[i] for i in order], [self.labels[i] for i in order])

    def digest(self, how: str) -> str:
        """Return 16 hexadecimal digits over ``how`` and names, sizes and modification times of the files, in order."""
        lines = [how]
        for name in self.names:
            try:
                status = os.stat(f"{self.folder}/{name}")
                lines.append(f"{name}\t{status.st_size}\t{status.st_mtime_ns}")
            except (OSError, ValueError):
                lines.append(f"{name}\tabsent")             # decoding will say so
        return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@dataclass(eq=False)
class Layout:
    """A data set on disk; ``side``: pixels to which its files are decoded; ``may_stream``: where that takes too much
    memory, they may be decoded when used."""
    train: Listing
    test: Listing
    classes: list[str]
    side: int
    may_stream: bool = False


def find(settings, progress, notes) -> Layout:
    """Return the layout of the data set that ``settings`` name, downloaded or unpacked where absent; what a reader of
    results must know is appended to ``notes``. Raises InputError."""
    reader = {"tiny-imagenet": _tiny_imagenet, "imagenet": _folder, "folder": _folder}.get(settings.name, _cifar)
    layout = reader(settings, progress, notes)
    counts = zip(("classes", "training images", "test images"), PUBLISHED.get(settings.name, ()),
                 (layout.classes, layout.train.labels, layout.test.labels))
    notes += [f"{settings.name}: {len(items)} {what} found, the published set has {published}"
              for what, published, items in counts if len(items) != published]
    return layout


def fixed_order(n: int) -> list[int]:
    """Return the one permutation of n items behind every order and subset here (ledger D19).

    RandomState: numpy guarantees that its stream never changes, so subsets stay comparable across versions.
    """
    return np.random.RandomState(ORDER_SEED).permutation(n).tolist()


@dataclass(frozen=True)
class Sample(Data):
    """Settings under which at most ``at_most`` images of a split are read; the number asked for is still checked."""
    at_most: int = 0


class Absent(NamedTuple):
    """``what`` would be done to get a data set, and the ``bytes`` that it takes on the disk then."""
    what: str
    bytes: float


def absent(settings) -> Absent | None:
    """Return what :func:`find` would download or unpack first; None where nothing is missing, or never fetched."""
    base, name = pathlib.Path(settings.dir), settings.name
    if name not in ARCHIVES or (base / name).exists():
        return None
    url, archive, folder = TINY_IMAGENET_URL, base / "tiny-imagenet-200.zip", base / "tiny-imagenet-200"
    if name != "tiny-imagenet":
        kind = _cifar_kind(name)
        url, archive, folder = kind.url, base / kind.filename, base / kind.base_folder
    packed, unpacked = ARCHIVES[name]
    if folder.exists():
        return None
    if archive.is_file():
        return Absent(f"would be unpacked from {archive}", unpacked)
    return Absent(f"would be downloaded from {url} to {archive} (about {packed / 1e6:.0f} MB)", packed + unpacked)


# Class folders: CIFAR as images, ImageNet, a folder of the user


def _folder(settings, progress, notes):
    base, name = pathlib.Path(settings.dir), settings.name
    if name == "imagenet" and ((base / "imagenet").exists() or not (base / "train").is_dir()):
        base = base / "imagenet"
    test = "test" if name == "folder" and (base / "test").is_dir() and not (base / "val").is_dir() else "val"
    notes.append(f"{name}: test = {base / test}; images are resized to {settings.image_size} x {settings.image_size} "
                 "without a crop and normalised with ImageNet's mean and std")
    return _class_folders(settings, base, test, settings.image_size, notes, may_stream=True)


def _class_folders(settings, folder, test, side, notes, may_stream=False):
    """``folder/{train,TEST}/CLASS/*``, both permuted."""
    notes.append(f"{settings.name}: read from class folders in {folder}; both splits in one fixed pseudo-random order")
    mend = f"expected {folder}/{{train,{test}}}/CLASS/*.png or .jpg, one folder per class"
    classes, others = ([name for name in _items(folder / split, mend) if (folder / split / name).is_dir()]
                       for split in ("train", test))
    missing = [str(folder / test / name) for name in classes if name not in others]
    missing += [str(folder / "train" / name) for name in others if name not in classes]
    if missing or not classes:
        raise InputError(f"train and {test} need the same class folders; missing: {', '.join(missing[:5]) or 'all'}"
                         f"{', …' if len(missing) > 5 else ''}; {mend}")
    train, test = (_list(folder / split, classes, "{}", mend).permuted() for split in ("train", test))
    return Layout(train, test, classes, side, may_stream)


def _list(folder, classes, place, mend):
    """The files of all classes below ``folder``, in ``place`` of each."""
    listing = Listing(str(folder), [], [])
    for label, name in enumerate(classes):
        sub = place.format(name)
        files = _items(folder / sub, mend)
        listing.names += [f"{sub}/{file}" for file in files]
        listing.labels += [label] * len(files)
    return listing


def _items(path, mend):
    """Sorted names in a folder without hidden ones, or lines of a text file. InputError where there are none."""
    try:
        lines = sorted(os.listdir(path)) if path.is_dir() else path.read_text(encoding="utf-8").splitlines()
        items = [line for line in lines if line.strip() and not line.startswith(".")]
        if not items:
            raise ValueError("it is empty")
        return items
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used ({one_line(error)})"
        raise InputError(f"{shown(path)} {reason}; {mend}") from None


# CIFAR-10, CIFAR-100, Tiny ImageNet


def _cifar_kind(name):
    import torchvision                                      # takes a second; only CIFAR's archives need it
    return {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]


def _cifar(settings, progress, notes):
    """Class folders where there are any, else the archive."""
    folder, parts = pathlib.Path(settings.dir) / settings.name, []
    if folder.exists():
        return _class_folders(settings, folder, "test", 32, notes)
    for train in (True, False):
        stored = _open_cifar(_cifar_kind(settings.name), settings, train, progress)
        n = len(stored.data)
        order = fixed_order(n) if train else list(range(n))             # the test split's published order is random
        pixels = np.ascontiguousarray(stored.data[order].transpose(0, 3, 1, 2))
        parts.append(Listing("", [], np.array(stored.targets)[order].tolist(), pixels))
    return Layout(*parts, stored.classes, 32)


def _open_cifar(kind, settings, train, progress):
    """torchvision's data set object; its archive is fetched, checked and unpacked where it is absent."""
    archive = pathlib.Path(settings.dir) / kind.filename
    try:
        if not archive.is_file() and not (archive.parent / kind.base_folder).is_dir():
            download(kind.url, archive, progress)
        return kind(settings.dir, train=train, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, InputError) as error:
        raise InputError(f"{settings.name} is not in {settings.dir} and could not be had from {kind.url} "
                         f"({one_line(error)}); put {kind.filename} or its folder {kind.base_folder} there, or images "
                         f"as {settings.dir}/{settings.name}/{{train,test}}/CLASS/*.png") from None


def _tiny_imagenet(settings, progress, notes):
    """The published tree. Test is the labelled validation split in the order of ``val_annotations.txt`` (ledger D19);
    class index = line of ``wnids.txt``."""
    tree = pathlib.Path(settings.dir) / "tiny-imagenet-200"
    if not tree.exists():
        _download_tiny_imagenet(tree, progress)
    mend = f"get the whole set from {TINY_IMAGENET_URL} and extract it into {settings.dir}"
    notes.append("tiny-imagenet: test = the labelled validation split in the order of val_annotations.txt; "
                 "class index = line of wnids.txt")
    names, annotations = _items(tree / "wnids.txt", mend), tree / "val" / "val_annotations.txt"
    classes = {name: i for i, name in enumerate(names)}
    if len(classes) < len(names):
        raise InputError(f"{tree / 'wnids.txt'} names a class twice; {mend}")
    train = _list(tree / "train", names, "{}/images", mend)
    test = Listing(str(tree / "val" / "images"), [], [])
    for line in _items(annotations, mend):
        file, label = (line.split("\t") + [""])[:2]
        if label not in classes:
            raise InputError(f"{annotations}: the class '{shown(label)}' of {shown(file)} is not in wnids.txt; {mend}")
        test.names.append(file)
        test.labels.append(classes[label])
    return Layout(train.permuted(), test, names, 64)


def _download_tiny_imagenet(tree, progress):
    """Fetch the archive (unless it lies there) and extract it next to ``tree``, which appears only when complete."""
    archive, scratch = tree.with_suffix(".zip"), tree.with_name(f"{tree.name}.{os.getpid()}.part")
    hint = f", or extract it so that {tree}/wnids.txt exists"
    try:
        if not archive.is_file():
            download(TINY_IMAGENET_URL, archive, progress, hint=hint)
        extract(archive, scratch)
        if not (scratch / tree.name).is_dir():
            raise InputError(f"{archive} holds no folder {tree.name}; delete it and start again to fetch a new one")
        os.replace(scratch / tree.name, tree)
    except OSError as error:
        if not tree.is_dir():                               # else another run extracted it in the meantime
            raise InputError(f"{archive} cannot be used ({one_line(error)}); free space{hint}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
