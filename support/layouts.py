"""Layouts of data sets on disk: which image files make a split, with which labels, in which order (ledger D15, D19).

| data set | below data.dir | order |
|---|---|---|
| cifar10, cifar100 | NAME/{train,test}/CLASS/*, or the published archive | permuted; the archive's test split as is |
| tiny-imagenet | tiny-imagenet-200/, the published tree, downloaded where absent | permuted; val_annotations.txt |
| imagenet | imagenet/{train,val}/CLASS/*, or {train,val}/CLASS/* | both permuted |
| folder | {train,val}/CLASS/* or {train,test}/CLASS/* | both permuted |

"Permuted" is one fixed pseudo-random permutation of the sorted files; in its prefixes every class turns up early. Class
index = place in the sorted class names; for tiny-imagenet, line of wnids.txt.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import make_dataset

from config import InputError
from support.files import download, one_line, shown

ORDER_SEED = 2606                  # of the fixed permutation of files; no setting, so that test subsets stay the same
PUBLISHED = {"cifar10": (10, 50_000, 10_000), "cifar100": (100, 50_000, 10_000),
             "tiny-imagenet": (200, 100_000, 10_000), "imagenet": (1000, 1_281_167, 50_000)}   # classes, images of both
ARCHIVES = {                                                # URL, folder in the archive, bytes packed and unpacked
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "cifar-10-batches-py", 170e6, 186e6),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "cifar-100-python", 169e6, 186e6),
    "tiny-imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200", 248e6, 500e6)}
OTHERWISE = "say where it is with --data-dir DIR, or try --smoke, which needs no data"


class Listing(NamedTuple):
    """Images of a split in order: ``paths`` of files, or decoded ``pixels`` uint8 [n, 3, h, w]; class indices."""
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    pixels: torch.Tensor | None = None


def find(settings, progress, notes) -> tuple[Listing, Listing, list[str]]:
    """Return training images, test images and class names of the data set that ``settings`` name, downloaded or
    unpacked where absent; what a reader of results must know is appended to ``notes``. Raises InputError."""
    reader = {"tiny-imagenet": _tiny_imagenet, "imagenet": _folder, "folder": _folder}.get(settings.name, _cifar)
    train, test, classes = reader(settings, progress, notes)
    counts = zip(("classes", "training images", "test images"), PUBLISHED.get(settings.name, ()),
                 (classes, train.labels, test.labels))
    notes += [f"{settings.name}: {len(items)} {what} found, the published set has {published}"
              for what, published, items in counts if len(items) != published]
    return train, test, classes


def fixed_order(n: int) -> list[int]:
    """Return the one permutation of n items behind every order and subset here (ledger D19), by RandomState, whose
    stream numpy guarantees never to change."""
    return np.random.RandomState(ORDER_SEED).permutation(n).tolist()


def _permuted(files):
    """A Listing of [(path, label)], in the fixed order."""
    return Listing(*zip(*(files[i] for i in fixed_order(len(files)))))


def archive_of(settings) -> Path:
    """Return where the archive of a published data set is kept."""
    return Path(settings.dir) / ARCHIVES[settings.name][0].rpartition("/")[2]


def _published(settings, progress, unpack, other):
    """Return ``unpack(archive)`` of a published data set, downloaded where neither archive nor folder is there.
    InputError names the archive and the ``other`` way to provide the images."""
    (url, folder, *_), archive, hint = ARCHIVES[settings.name], archive_of(settings), f", or {other}; {OTHERWISE}"
    if not archive.is_file() and not (archive.parent / folder).exists():
        download(url, archive, progress, hint=hint)
    try:
        return unpack(archive)
    except Exception as error:  # readers of damaged files raise almost anything
        raise InputError(f"{archive} cannot be used ({one_line(error)}); delete it and start again to fetch a new one"
                         f"{hint}") from None


def _class_folders(settings, folder, test, notes):
    """``folder/{train,TEST}/CLASS/*`` without hidden files."""
    notes.append(f"{settings.name}: class folders, test = {folder / test}; both splits in one fixed random order")
    visible = lambda path: f"{os.sep}." not in path[len(str(folder)):]
    try:
        train, other = (ImageFolder(folder / split, is_valid_file=visible) for split in ("train", test))
        if train.classes != other.classes:
            differ = sorted(set(train.classes) ^ set(other.classes))
            raise ValueError(f"train and {test} need the same class folders, and differ in {', '.join(differ[:5])}")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {one_line(error)}; expected {folder}/{{train,{test}}}/CLASS/*.png or .jpg, one "
                         f"folder per class; {OTHERWISE}") from None
    return _permuted(train.samples), _permuted(other.samples), train.classes


def _folder(settings, progress, notes):
    """ImageNet or a folder of the user."""
    base, name = Path(settings.dir), settings.name
    if name == "imagenet" and ((base / "imagenet").exists() or not (base / "train").is_dir()):
        base = base / "imagenet"
    test = "test" if name == "folder" and (base / "test").is_dir() and not (base / "val").is_dir() else "val"
    notes.append(f"{name}: resized to {settings.image_size} px without a crop, normalised with ImageNet's mean and std")
    return _class_folders(settings, base, test, notes)


def _cifar(settings, progress, notes):
    """Class folders where there are any, else the archive, which torchvision checks, unpacks and reads."""
    folder = Path(settings.dir) / settings.name
    if folder.exists():
        return _class_folders(settings, folder, "test", notes)
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[settings.name]
    parts = _published(
        settings, progress, lambda archive: [kind(archive.parent, train, download=True) for train in (True, False)],
        f"put images as {folder}/{{train,test}}/CLASS/*.png")
    orders = fixed_order(len(parts[0].data)), slice(None)   # the published order of the test split is random as it is
    return *(Listing((), tuple(np.array(part.targets)[order].tolist()),
                     torch.from_numpy(part.data[order]).permute(0, 3, 1, 2).contiguous())
             for part, order in zip(parts, orders)), parts[0].classes


def _tiny_imagenet(settings, progress, notes):
    """The published tree (ledger D19)."""
    tree = Path(settings.dir) / ARCHIVES[settings.name][1]
    if not tree.exists():
        _published(settings, progress, _extract, f"extract it so that {tree}/wnids.txt exists")
    notes.append("tiny-imagenet: test = validation split, ordered as val_annotations.txt; class = line of wnids.txt")
    try:
        classes = (tree / "wnids.txt").read_text(encoding="utf-8").split()
        index = {name: i for i, name in enumerate(classes)}
        train = make_dataset(tree / "train", index, is_valid_file=lambda path: Path(path).parent.name == "images")
        lines = (tree / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
        test = [(str(tree / "val" / "images" / file), index[label])
                for file, label, *_ in (line.split("\t") for line in lines)]
        if not test:
            raise ValueError("val_annotations.txt is empty")
    except (OSError, ValueError, KeyError) as error:        # KeyError: a label that wnids.txt lacks
        raise InputError(f"{tree}: incomplete or damaged ({shown(one_line(error))}); get the whole set from "
                         f"{ARCHIVES[settings.name][0]} and extract it into {settings.dir}") from None
    train.sort(key=lambda item: item[1])                    # by line of wnids.txt, not by name
    return _permuted(train), Listing(*zip(*test)), classes


def _extract(archive):
    """Extract a zip file to the folder of its name beside it, which appears only when complete. zipfile checks every
    CRC, leads no name out of the folder and makes files of links."""
    tree = archive.with_suffix("")
    with zipfile.ZipFile(archive) as source, tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        if sum(member.file_size for member in source.infolist()) > 100 * archive.stat().st_size:
            raise ValueError("it would take more than 100 times its size")
        source.extractall(scratch)
        if not tree.exists():                               # else another run extracted it in the meantime
            os.replace(Path(scratch) / tree.name, tree)
