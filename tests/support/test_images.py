"""sources.py: every layout on trees that the test makes, decoding by threads and by processes, the cache of decoded
images (its keys, its soundness with several runs), unreadable files, and real images where HIRELC_DATA names a folder
that holds them."""

import errno
import io
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
from support import images as sources
from config import Data, InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Reading files


def save(path, colour, side=32, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(colour, tuple) else "L", (side, side), colour).save(path, **how)


@pytest.fixture(params=["threads", "processes"])
def by(request, monkeypatch):
    """Both ways of decoding; two workers wherever there are more or fewer cores."""
    monkeypatch.setattr(sources, "MANY", 1 if request.param == "processes" else 10**9)
    monkeypatch.setattr(sources, "cores", lambda: 2)
    return request.param


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    from PIL import Image
    Image.new("RGB", (10, 8)).save(tmp_path / "large.png")
    for pixels, side, refused in ((80, 10, False), (79, 10, True), (80, 9, True)):
        monkeypatch.setattr(sources, "MAX_PIXELS", pixels)
        monkeypatch.setattr(sources, "MAX_LENGTH", side)
        reasons = sources.decode([str(tmp_path / "large.png")], 4, skip=True)[2]
        assert bool(reasons) == refused and all("10 x 8 pixels" in reason for reason in reasons.values())


def test_decode_keeps_the_order_and_reports_progress(tmp_path, by):
    paths = [tmp_path / f"{i}.png" for i in range(600)]                 # more than two chunks
    for i, path in enumerate(paths):
        save(path, (i % 256, i // 256, 7), 4)
    calls = []
    images, flags, reasons = sources.decode(paths, 4, "reading", lambda *call: calls.append(call))
    assert flags.shape == (600,) and not flags.any() and reasons == {}
    assert (images[:, 0, 2, 3] + 256 * images[:, 1, 2, 3].astype(int)).tolist() == list(range(600))
    assert calls[0] == ("reading", 0, 600) and calls[-1] == ("reading", 600, 600)
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)


def test_decode_converts_grey_and_resizes_and_counts_both(tmp_path):
    save(tmp_path / "grey.png", 100, 8)
    Image.fromarray(np.array([[[0, 0, 0], [200, 100, 0]]] * 2, dtype=np.uint8)).save(tmp_path / "small.png")
    images, flags, _ = sources.decode([tmp_path / "grey.png", tmp_path / "small.png"], 8)
    assert flags.tolist() == [sources.RECOLOURED, sources.RESIZED]
    assert (images[0] == 100).all()
    line = images[1, 0, 4].tolist()                                     # 0 → 200 in the bilinear ramp
    assert line[0] == 0 and line[-1] == 200 and line == sorted(line) and 0 < line[3] < 200


def test_fixed_order_is_a_permutation_that_never_changes():
    assert sources.fixed_order(7) == [5, 4, 0, 3, 1, 6, 2]
    assert sorted(sources.fixed_order(1000)) == list(range(1000))
    torch.manual_seed(1), np.random.seed(1)
    assert sources.fixed_order(7) == [5, 4, 0, 3, 1, 6, 2]


# Tiny ImageNet. Class k of wnids.txt has the colour COLOURS[k]; the grey part tells its images apart.

WNIDS = ["n03", "n01", "n02"]                   # not in name order, as in the published file
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
ANNOTATED = [("val_2.JPEG", "n01"), ("val_0.JPEG", "n02"), ("val_3.JPEG", "n03"), ("val_1.JPEG", "n01")]


def make_tiny(folder, per_class=20):
    tree = folder / "tiny-imagenet-200"
    for k, wnid in enumerate(WNIDS):
        for i in range(per_class):
            save(tree / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", COLOURS[k], 64)
    for file, wnid in ANNOTATED:
        save(tree / "val" / "images" / file, COLOURS[WNIDS.index(wnid)], 64)
    (tree / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (tree / "val" / "val_annotations.txt").write_text(
        "".join(f"{file}\t{wnid}\t0\t0\t62\t62\n" for file, wnid in ANNOTATED))
    return tree


def tiny(folder, **settings):
    return Data(name="tiny-imagenet", dir=str(folder), image_size=64, **settings)


def test_tiny_imagenet_labels_order_and_settings(tmp_path):
    make_tiny(tmp_path)
    calls = []
    splits = data.load(tiny(tmp_path), lambda *call: calls.append(call))
    assert splits.num_classes == 3 and splits.class_names == tuple(WNIDS)
    assert splits.test.labels.tolist() == [1, 2, 0, 1]                  # the lines of val_annotations.txt
    assert sorted(splits.train.labels.tolist()) == [0] * 20 + [1] * 20 + [2] * 20
    for part in (splits.train, splits.test):
        assert torch.equal(part.images[:, :, 32, 32].int().argmax(1), part.labels)      # red, green, blue
    assert set(splits.train.augment) == {"flip", "jitter"} and splits.test.augment == ()
    assert calls[-1][1:] == (4, 4) and any(call[1:] == (60, 60) for call in calls)
    assert any("val_annotations.txt" in note for note in splits.notes)
    assert any("60 training images" in note and "100000" in note for note in splits.notes)


def test_tiny_imagenet_subsets_are_prefixes_spread_over_the_classes(tmp_path):
    make_tiny(tmp_path)
    everything, few = data.load(tiny(tmp_path)), data.load(tiny(tmp_path, train_images=15, test_images=2))
    assert (len(few.train), len(few.test)) == (15, 2)
    assert torch.equal(few.train.images, everything.train.images[:15])
    assert few.train.labels.bincount(minlength=3).min() >= 2            # in class order there would be one class
    assert few.test.labels.tolist() == [1, 2]
    assert sum("first" in note for note in few.notes) == 2


@pytest.mark.parametrize("missing", ["wnids.txt", "val/val_annotations.txt", "val/images/val_3.JPEG",
                                     "train/n01/images", "train/n02/images/*"])
def test_tiny_imagenet_names_what_is_missing(tmp_path, missing):
    tree = make_tiny(tmp_path, per_class=2)
    for path in sorted(tree.glob(missing)):
        if path.is_dir():
            path.rename(tmp_path / "elsewhere")
        else:
            path.unlink()
    with pytest.raises(InputError) as error:
        data.load(tiny(tmp_path))
    assert str(tree / missing.removesuffix("/*")) in str(error.value) and sources.TINY_IMAGENET_URL in str(error.value)
    assert "\n" not in str(error.value)


def test_tiny_imagenet_names_the_line_with_an_unknown_class(tmp_path):
    tree = make_tiny(tmp_path, per_class=2)
    with open(tree / "val" / "val_annotations.txt", "a") as file:
        file.write("val_1.JPEG\tn99\t0\t0\t1\t1\n")
    with pytest.raises(InputError, match="line 5: 'n99'"):
        data.load(tiny(tmp_path))


def test_a_corrupt_image_is_named_and_unasked_images_are_not_read(tmp_path):
    broken = make_tiny(tmp_path, per_class=2) / "val" / "images" / "val_1.JPEG"        # the last of the test order
    whole = broken.read_bytes()
    for content in (whole[:len(whole) // 2], b"no image"):
        broken.write_bytes(content)
        with pytest.raises(InputError) as error:
            data.load(tiny(tmp_path))
        assert str(broken) in str(error.value) and "\n" not in str(error.value)
    assert len(data.load(tiny(tmp_path, test_images=3)).test) == 3


@pytest.mark.parametrize("key, there", [("train_images", 6), ("test_images", 4)])
def test_asking_for_more_than_there_is_names_the_number(tmp_path, key, there):
    make_tiny(tmp_path, per_class=2)
    assert len(getattr(data.load(tiny(tmp_path, **{key: there})), key.split("_")[0])) == there
    with pytest.raises(InputError, match=rf"{key}={there + 1}.* {there};"):
        data.load(tiny(tmp_path, **{key: there + 1}))


def test_tiny_imagenet_notes_count_conversions(tmp_path):
    tree = make_tiny(tmp_path, per_class=2)
    save(tree / "train" / "n01" / "images" / "n01_0.JPEG", 90, 64)
    save(tree / "val" / "images" / "val_0.JPEG", (0, 0, 200), 30)
    notes = " | ".join(data.load(tiny(tmp_path)).notes)
    assert "1 train images were not RGB" in notes and "1 test images were not 64 x 64" in notes
    assert "train images were not 64" not in notes and "test images were not RGB" not in notes


def zip_of(tree, path, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*")):
            archive.write(file, file.relative_to(tree.parent))
        for name in extra:
            archive.writestr(name, "x")


def test_tiny_imagenet_is_downloaded_and_extracted_once(tmp_path, monkeypatch):
    source = tmp_path / "server.zip"
    zip_of(make_tiny(tmp_path / "made", per_class=2), source)
    monkeypatch.setattr(sources, "TINY_IMAGENET_URL", source.as_uri())
    calls = []
    splits = data.load(tiny(tmp_path / "new" / "folder"), lambda *call: calls.append(call))
    assert splits.test.labels.tolist() == [1, 2, 0, 1]
    assert ("downloading tiny-imagenet-200.zip", source.stat().st_size, source.stat().st_size) in calls
    left = {path.name for path in (tmp_path / "new" / "folder").iterdir()} - {sources.CACHE}
    assert left == {"tiny-imagenet-200", "tiny-imagenet-200.zip"}       # nothing half-done stays
    source.unlink()
    assert len(data.load(tiny(tmp_path / "new" / "folder")).train) == 6


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "tiny-imagenet-200/../../evil.txt", "..\\evil.txt",
                                  "C:/evil.txt"])
def test_archive_members_cannot_leave_the_folder(tmp_path, name):
    folder = tmp_path / "a" / "b"
    tree = make_tiny(tmp_path / "made", per_class=1)
    folder.mkdir(parents=True)
    zip_of(tree, folder / "tiny-imagenet-200.zip", extra=[name])
    with pytest.raises(InputError, match="leads out"):
        data.load(tiny(folder))
    assert [path.name for path in folder.iterdir()] == ["tiny-imagenet-200.zip"]
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("content", [b"not a zip file", None])
def test_a_damaged_archive_is_named(tmp_path, content):
    archive = tmp_path / "tiny-imagenet-200.zip"
    zip_of(make_tiny(tmp_path / "made", per_class=1), archive)
    whole = bytearray(archive.read_bytes())
    whole[whole.index(b"\xff\xd8") + 30] ^= 255                         # inside a stored image: its CRC is wrong
    archive.write_bytes(content or bytes(whole))
    with pytest.raises(InputError) as error:
        data.load(tiny(tmp_path))
    assert str(archive) in str(error.value) and "delete it" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"made", "tiny-imagenet-200.zip"}


@pytest.mark.parametrize("blocked", [False, True])
def test_a_failed_download_names_url_and_folder(tmp_path, monkeypatch, blocked):
    monkeypatch.setattr(sources, "TINY_IMAGENET_URL", (tmp_path / "nowhere.zip").as_uri())
    folder = tmp_path / "file" / "data" if blocked else tmp_path / "data"
    (tmp_path / "file").write_text("a file where a folder is needed")
    with pytest.raises(InputError) as error:
        data.load(tiny(folder))
    assert sources.TINY_IMAGENET_URL in str(error.value) and f"{folder}/tiny-imagenet-200" in str(error.value)
    assert not folder.exists() or not list(folder.iterdir())


# CIFAR

CLASSES = ["ant", "bee", "cat"]


def make_cifar(folder, name="cifar10", per_class=40):
    for split in ("train", "test"):
        for k, label in enumerate(CLASSES):
            for i in range(per_class):
                suffix = (".png", ".PNG")[i % 2]
                save(folder / name / split / label / f"{i:04d}{suffix}", (k, i, 9))
    return folder / name


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_class_folders(tmp_path, name):
    tree = make_cifar(tmp_path, name)
    (tree / "train" / "bee" / ".hidden").write_text("x")
    splits = data.load(Data(name=name, dir=str(tmp_path), image_size=40))
    assert splits.class_names == tuple(CLASSES) and splits.num_classes == 3
    for part in (splits.train, splits.test):
        keys = part.images[:, :, 0, 0].tolist()                         # (class, number of the file, 9)
        assert part.labels.tolist() == [key[0] for key in keys]
        assert sorted(keys) == [[k, i, 9] for k in range(3) for i in range(40)] and keys != sorted(keys)
        assert part.labels[:20].bincount(minlength=3).min() >= 3        # the first 20 by name are all ants
    assert set(splits.train.augment) == {"flip", "crop", "jitter"} and splits.test.augment == ()
    assert splits.train.padding == 4 and next(splits.test.batches(5))[0].shape == (5, 3, 40, 40)
    assert splits.skipped == 0


def test_class_folder_order_depends_on_no_seed_and_subsets_are_prefixes(tmp_path):
    make_cifar(tmp_path)
    torch.manual_seed(0)
    everything = data.load(Data(name="cifar10", dir=str(tmp_path)))
    torch.manual_seed(1)
    few = data.load(Data(name="cifar10", dir=str(tmp_path), train_images=30, test_images=12))
    assert torch.equal(few.train.images, everything.train.images[:30])
    assert torch.equal(few.test.images, everything.test.images[:12])
    assert len(few.train.images) == 30 and torch.equal(few.test.labels, everything.test.labels[:12])


def test_order_does_not_depend_on_how_the_file_system_lists(tmp_path, monkeypatch):
    make_cifar(tmp_path, per_class=5)
    make_tiny(tmp_path, per_class=5)
    for k, path in enumerate(sorted((tmp_path / "tiny-imagenet-200" / "train").rglob("*.JPEG"))):
        save(path, (k * 10, 0, 0), 64)                                  # so that no two training images are alike
    names, entries = ("cifar10", "tiny-imagenet"), sources._entries
    listed = []
    for key in (lambda entry: entry.name, lambda entry: entry.name[::-1]):
        monkeypatch.setattr(sources, "_entries", lambda *where: sorted(entries(*where), key=key, reverse=True))
        listed.append([data.load(Data(name=name, dir=str(tmp_path), cache=False)).train.images for name in names])
    monkeypatch.setattr(sources, "_entries", entries)
    listed.append([data.load(Data(name=name, dir=str(tmp_path))).train.images for name in names])
    for images in zip(*listed):
        assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
        assert len(images[0].flatten(1).unique(dim=0)) == len(images[0])


def test_incomplete_class_folders_are_named(tmp_path):
    tree = make_cifar(tmp_path, per_class=2)
    (tree / "test" / "cat").rename(tree / "test" / "cow")
    with pytest.raises(InputError, match="missing: .*/cifar10/test/cat, .*/cifar10/train/cow"):
        data.load(Data(name="cifar10", dir=str(tmp_path)))
    (tree / "test" / "cow").rename(tree / "test" / "cat")
    for path in (tree / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"train/bee holds no images; expected .*CLASS"):
        data.load(Data(name="cifar10", dir=str(tmp_path)))
    (tree / "train").rename(tree / "training")
    with pytest.raises(InputError, match="cifar10/train is missing; expected .*CLASS"):
        data.load(Data(name="cifar10", dir=str(tmp_path)))


@pytest.mark.parametrize("name, expected", [         # (1 - mean)/std, (0 - mean)/std, (0.2 - mean)/std by hand
    ("cifar10", (2.514088, -2.418255, -1.226368)),
    ("cifar100", (1.842617, -1.897466, -0.872148)),
    ("tiny-imagenet", (2.248908, -2.035714, -0.915556))])
def test_normalisation_constants(tmp_path, name, expected):
    if name == "tiny-imagenet":
        tree = make_tiny(tmp_path, per_class=1)
        save(tree / "val" / "images" / "val_2.JPEG", (255, 0, 51), 64, format="PNG")
    else:
        for split in ("train", "test"):
            save(tmp_path / name / split / "ant" / "0.png", (255, 0, 51))
    splits = data.load(Data(name=name, dir=str(tmp_path), image_size=16, test_images=1))
    x, _ = splits.test.batch([0])
    assert torch.allclose(x[0, :, 8, 8], torch.tensor(expected), atol=1e-4)
    assert (splits.train.mean, splits.train.std) == (splits.test.mean, splits.test.std)


def published_cifar(folder, monkeypatch, label_key="labels"):
    """An archive of CIFAR-10's layout: 6 + 6 training images and 5 test images, pixel value = number of the image."""
    def member(start, count):
        numbers = np.arange(start, start + count, dtype=np.uint8)
        return {"data": np.repeat(numbers[:, None], 3072, 1), label_key: [int(i) % 2 for i in numbers]}
    files = {"data_batch_1": member(0, 6), "data_batch_2": member(6, 6), "test_batch": member(50, 5),
             "batches.meta": {"label_names": ["even", "odd"]}}
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file, content in files.items():
            content = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "url", archive.as_uri())
    monkeypatch.setattr(kind, "tgz_md5", None)
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None], ["data_batch_2", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return archive


def test_cifar_from_the_published_archive(tmp_path, monkeypatch):
    archive = published_cifar(tmp_path, monkeypatch)
    where = tmp_path / "new"
    splits = data.load(Data(name="cifar10", dir=str(where), image_size=32, train_images=8))
    numbers = splits.train.images[:, 1, 31, 0].tolist()
    assert len(set(numbers)) == 8 and max(numbers) < 12 and numbers != sorted(numbers)
    assert splits.train.labels.tolist() == [number % 2 for number in numbers]
    assert splits.test.images[:, 2, 5, 5].tolist() == [50, 51, 52, 53, 54] and splits.class_names == ("even", "odd")
    archive.unlink()
    again = data.load(Data(name="cifar10", dir=str(where), image_size=32, test_images=3))      # what is there is used
    assert again.test.labels.tolist() == [0, 1, 0] and again.train.images[:8, 1, 31, 0].tolist() == numbers
    with pytest.raises(InputError, match="train_images=13.* 12;"):
        data.load(Data(name="cifar10", dir=str(where), train_images=13))


@pytest.mark.parametrize("blocked", [False, True])
def test_cifar_that_cannot_be_had_names_url_folder_and_layout(tmp_path, monkeypatch, blocked):
    archive = published_cifar(tmp_path, monkeypatch)
    folder = archive / "data" if blocked else tmp_path / "data"
    if not blocked:
        archive.unlink()
    with pytest.raises(InputError) as error:
        data.load(Data(name="cifar10", dir=str(folder)))
    for word in (archive.as_uri(), str(folder), "cifar-10-batches-py", "train/CLASS/*.png"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# Class folders of any kind


def make_folder(base, test="val", per_class=8, sides=(20, 12)):
    """{train,TEST}/{ant,bee}/*: the red value tells the class, green the number of the file; 20 x 12 pixels."""
    for split in ("train", test):
        for k, label in enumerate(CLASSES[:2]):
            for i in range(per_class):
                path = base / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", sides, (50 * k, 10 * i, 9)).save(path)
    return base


def folder_settings(base, **settings):
    return Data(**{"name": "folder", "dir": str(base), "image_size": 16, **settings})


@pytest.mark.parametrize("name, where, test", [("folder", ".", "val"), ("folder", ".", "test"),
                                               ("imagenet", "imagenet", "val"), ("imagenet", ".", "val")])
def test_class_folder_layouts(tmp_path, name, where, test):
    make_folder(tmp_path / where, test)
    splits = data.load(folder_settings(tmp_path, name=name, test_images=10))
    assert splits.class_names == ("ant", "bee") and (len(splits.train), len(splits.test)) == (16, 10)
    for part in (splits.train, splits.test):
        assert part.images.shape[1:] == (3, 16, 16)                     # decoded to image_size, whatever their sides
        assert torch.equal(part.images[:, 0, 3, 3].int() // 50, part.labels.int())
    keys = splits.train.images[:, :2, 0, 0].tolist()
    assert sorted(keys) == [[50 * k, 10 * i] for k in range(2) for i in range(8)] and keys != sorted(keys)
    assert splits.train.augment == ("flip", "jitter") and splits.train.mean == data.IMAGENET_STATS[0]
    assert any("the first 10 of the test order of 16" in note for note in splits.notes)
    assert (name == "imagenet") == any("2 classes found, the published set has 1000" in note for note in splits.notes)


def test_val_goes_before_test_and_its_use_is_noted(tmp_path):
    make_folder(make_folder(tmp_path, "test", 3), "val", 5)
    splits = data.load(folder_settings(tmp_path))
    assert len(splits.test) == 10 and any(f"test = {tmp_path}/val" in note for note in splits.notes)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_what_is_wrong_with_a_folder_is_named(tmp_path, name):
    base = tmp_path / "imagenet" if name == "imagenet" else tmp_path
    with pytest.raises(InputError, match=f"{base}/train is missing; expected"):
        data.load(folder_settings(tmp_path, name=name))
    make_folder(base)
    (base / "train" / "cow").mkdir()
    with pytest.raises(InputError, match=f"missing: {base}/val/cow"):
        data.load(folder_settings(tmp_path, name=name))
    (base / "val" / "cow").mkdir()
    with pytest.raises(InputError, match=f"{base}/train/cow holds no images"):
        data.load(folder_settings(tmp_path, name=name))
    (base / "train" / "cow").rmdir(), (base / "val" / "cow").rmdir()
    (base / "val" / "bee" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=f"{base}/val/bee/notes.txt is no image.*data.skip_corrupt=true"):
        data.load(folder_settings(tmp_path, name=name))
    splits = data.load(folder_settings(tmp_path, name=name, skip_corrupt=True))
    assert splits.skipped == 1 and len(splits.test) == 16
    assert any("left out 1 test files" in note and "bee/notes.txt" in note for note in splits.notes)


# Unreadable images


def break_files(*paths):
    for i, path in enumerate(paths):
        path.write_bytes((b"no image", path.read_bytes()[:60])[i % 2])


def test_skip_corrupt_leaves_out_and_counts(tmp_path, by, decoded):
    make_folder(tmp_path)
    whole = data.load(folder_settings(tmp_path))
    broken = [tmp_path / "train" / "ant" / "3.png", tmp_path / "train" / "bee" / "6.png"]
    break_files(*broken)
    with pytest.raises(InputError, match="train/(ant/3|bee/6).png: not a readable image .*skip_corrupt=true") as error:
        data.load(folder_settings(tmp_path))
    assert "\n" not in str(error.value)
    settings = folder_settings(tmp_path, skip_corrupt=True)
    for round in range(2):                                              # decoded, then from the cache
        decoded.clear()
        splits = data.load(settings)
        assert splits.skipped == 2 and (len(splits.train), len(splits.test)) == (14, 16)
        keys = whole.train.images[:, :2, 0, 0].tolist()
        keep = [i for i, key in enumerate(keys) if key not in ([0, 30], [50, 60])]
        assert torch.equal(splits.train.images, whole.train.images[keep])
        assert torch.equal(splits.train.labels, whole.train.labels[keep])
        note, = (note for note in splits.notes if "left out" in note)
        assert "2 train images" in note and "ant/3.png" in note and "bee/6.png" in note
        if by == "threads":
            assert len(decoded) == (16, 0)[round]
        # A subset is taken first: what cannot be read among its images is missing from it.
        few = data.load(folder_settings(tmp_path, skip_corrupt=True, train_images=12))
        assert torch.equal(few.train.images, whole.train.images[[i for i in keep if i < 12]])
        assert few.skipped == 12 - len(few.train)
    with pytest.raises(InputError, match="train/(ant/3|bee/6).png: not a readable image"):   # the cache knows them
        data.load(folder_settings(tmp_path))


def test_a_class_whose_images_are_all_unreadable_is_named(tmp_path):
    make_folder(tmp_path, per_class=3)
    break_files(*(tmp_path / "val" / "bee").iterdir())
    with pytest.raises(InputError, match="val/bee/.*nothing of the class is left"):
        data.load(folder_settings(tmp_path, skip_corrupt=True))


def test_streamed_files_are_checked_once_with_skip_corrupt(tmp_path, monkeypatch, decoded):
    make_folder(tmp_path)
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    broken = tmp_path / "train" / "ant" / "3.png"
    break_files(broken)
    settings = folder_settings(tmp_path, skip_corrupt=True, workers=0)
    for count in (32, 0):
        decoded.clear()
        splits = data.load(settings)
        assert len(decoded) == count                                    # the second time the result is remembered
        assert isinstance(splits.train, data.Stream) and (len(splits.train), splits.skipped) == (15, 1)
        assert any("left out 1 train" in note and "ant/3.png" in note for note in splits.notes)
        assert any("streamed" in note for note in splits.notes)
    x, y = splits.train.batch(list(range(15)))
    assert y.tolist() == splits.train.labels.tolist() and len(x) == 15
    os.utime(broken, (1, 1))
    decoded.clear()
    data.load(settings)
    assert len(decoded) == 16                                           # of the changed split only


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_met_while_streaming_is_named_in_one_line(tmp_path, monkeypatch, workers):
    make_folder(tmp_path)
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    break_files(tmp_path / "train" / "ant" / "3.png")
    splits = data.load(folder_settings(tmp_path, workers=workers))
    with pytest.raises(InputError, match="train/ant/3.png: not a readable image") as error:
        list(splits.train.batches(4))
    assert "\n" not in str(error.value)


# The cache


@pytest.fixture
def decoded(monkeypatch):
    """Paths that were decoded in this process, in any order."""
    taped, real = [], sources.read_images
    monkeypatch.setattr(sources, "read_images", lambda paths, *more: taped.extend(paths) or real(paths, *more))
    return taped


def cache_files(base):
    return sorted(path for path in (base / sources.CACHE).iterdir() if path.suffix == ".u8")


def test_the_second_time_nothing_is_decoded(tmp_path, decoded):
    make_tiny(tmp_path)
    first = data.load(tiny(tmp_path))
    assert len(decoded) == 64
    decoded.clear()
    again = data.load(tiny(tmp_path))
    assert decoded == [] and again.notes == first.notes
    for old, new in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(old.images, new.images) and torch.equal(old.labels, new.labels)
    assert len(data.load(tiny(tmp_path, cache=False)).train) == 60 and len(decoded) == 64
    assert len(cache_files(tmp_path)) == 2


def test_without_the_cache_no_file_is_written(tmp_path, by):
    make_tiny(tmp_path, per_class=2)
    images = data.load(tiny(tmp_path, cache=False)).train.images
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-imagenet-200"]
    assert torch.equal(images, data.load(tiny(tmp_path)).train.images)


@pytest.mark.parametrize("change", ["time", "content", "name", "added", "order"])
def test_the_cache_is_rebuilt_when_a_file_changes(tmp_path, decoded, change):
    tree = make_tiny(tmp_path, per_class=4)
    data.load(tiny(tmp_path))
    before = cache_files(tmp_path)
    other = before[0].with_name("folder-train-64-0123456789abcdef.u8")      # another data set's
    mine = before[0].with_name("tiny-imagenet-train-64-mine.u8")            # not of our pattern
    other.write_text("x"), mine.write_text("x")
    decoded.clear()
    file = tree / "train" / "n01" / "images" / "n01_2.JPEG"
    status = file.stat()
    if change == "time":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "content":
        save(file, (0, 99, 99), 64, quality=95)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "name":
        file.rename(file.with_name("n01_9.JPEG"))
    elif change == "added":
        save(file.with_name("n01_9.JPEG"), (0, 99, 99), 64)
    else:                                                                   # the test split's order is in a text file
        annotations = tree / "val" / "val_annotations.txt"
        annotations.write_text("".join(reversed(annotations.read_text().splitlines(keepends=True))))
    splits = data.load(tiny(tmp_path))
    split, count = {"added": ("train", 13), "order": ("test", 4)}.get(change, ("train", 12))
    assert len(decoded) == count                                            # that split's files, and all of them
    direct = data.load(tiny(tmp_path, cache=False))
    for part in ("train", "test"):
        assert torch.equal(getattr(splits, part).images, getattr(direct, part).images)
    assert other.exists() and mine.exists()
    left = [path for path in cache_files(tmp_path) if path not in (other, mine)]
    assert len(left) == 2 and sum(f"-{split}-" in path.name and path not in before for path in left) == 1


def test_a_subset_uses_a_larger_cache_and_is_replaced_by_one(tmp_path, decoded):
    make_folder(tmp_path)
    counts = []
    for wanted in (5, 4, 0, 7):
        decoded.clear()
        splits = data.load(folder_settings(tmp_path, train_images=wanted, test_images=1))
        assert not any("anew" in note for note in splits.notes)         # a cache that is too small is not a broken one
        images = splits.train.images
        assert len(images) == (wanted or 16)
        counts.append(sum("/train/" in path for path in decoded))
        assert torch.equal(images, data.load(folder_settings(tmp_path, cache=False)).train.images[:len(images)])
    assert counts == [5, 0, 16, 0] and len(cache_files(tmp_path)) == 2


def test_writing_to_cached_images_does_not_reach_the_file(tmp_path, recwarn):
    make_tiny(tmp_path, per_class=2)
    kept = data.load(tiny(tmp_path)).train.images.clone()
    images = data.load(tiny(tmp_path)).train.images
    contents = [path.read_bytes() for path in cache_files(tmp_path)]
    assert torch.equal(images.index_select(0, torch.tensor([3, 1])), kept[[3, 1]])
    images.zero_()
    assert [path.read_bytes() for path in cache_files(tmp_path)] == contents
    assert torch.equal(data.load(tiny(tmp_path)).train.images, kept)
    assert not [w for w in recwarn if "writable" in str(w.message)]


def spoil(path, how):
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-5000], "empty": b"", "foreign": b"x" * len(whole),
                      "longer": b"y" * 100 + whole, "other key": whole.replace(path.stem[-16:].encode(), b"0" * 16),
                      "tail only": whole[-16:]}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign", "longer", "other key", "tail only"])
def test_a_file_that_is_no_whole_cache_is_rebuilt_and_noted(tmp_path, how):
    make_tiny(tmp_path, per_class=2)
    kept = data.load(tiny(tmp_path)).train.images.clone()
    target = cache_files(tmp_path)[1]
    spoil(target, how)
    splits = data.load(tiny(tmp_path))
    assert torch.equal(splits.train.images, kept)
    note, = (note for note in splits.notes if "built anew" in note)
    assert str(target) in note
    assert not any("built anew" in note for note in data.load(tiny(tmp_path)).notes)


@pytest.mark.parametrize("call, code", [("pathlib.Path.mkdir", errno.EROFS), ("builtins.open", errno.EACCES),
                                        ("os.posix_fallocate", errno.ENOSPC), ("os.fsync", errno.EIO),
                                        ("os.replace", errno.EACCES)])
def test_a_folder_that_takes_no_cache_is_noted_and_images_stay_in_memory(tmp_path, monkeypatch, by, call, code):
    make_tiny(tmp_path, per_class=2)
    kept = data.load(tiny(tmp_path, cache=False)).train.images

    real_open = open
    def fail(*arguments, **more):
        if call == "builtins.open" and (sources.CACHE not in str(arguments[0]) or "r" in arguments[1]):
            return real_open(*arguments, **more)
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(call, fail)
    splits = data.load(tiny(tmp_path))
    monkeypatch.undo()
    assert torch.equal(splits.train.images, kept)
    notes = [note for note in splits.notes if "cannot hold" in note]
    assert len(notes) == 2 and all(sources.CACHE in note and os.strerror(code) in note for note in notes)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.u8"))


BUILDER = """
import hashlib, os, sys, time
sys.path.insert(0, {root!r})
from support import images as sources
from config import Data
mode, folder = sys.argv[1:]
started, read, seen = sources._start, sources.read_images, []
if "processes" in mode:
    sources.MANY = 1
    sources.cores = lambda: 2
    def start(*arguments):
        process = started(*arguments)
        print("worker", process.pid, flush=True)
        return process
    sources._start = start
    sources.CHUNK = 2
    real_ask = sources._ask
    sources._ask = lambda *arguments: time.sleep(0.2) or real_ask(*arguments)
def slow(paths, *more):
    seen.extend(paths)
    time.sleep(0.02 * len(paths))
    return read(paths, *more)
sources.read_images = slow
if "unlocked" in mode:
    sources.fcntl = None
print("ready", flush=True)
sys.stdin.readline()
train, test, names, notes = sources.read(Data(name="tiny-imagenet", dir=folder, image_size=64))
print(len(seen), hashlib.sha256(train.pixels.tobytes() + test.pixels.tobytes()).hexdigest(), flush=True)
"""


def start_builder(folder, mode):
    root = str(pathlib.Path(sources.__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", BUILDER.format(root=root), mode, str(folder)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("mode", ["locked", "unlocked"])
def test_two_runs_that_build_at_once_end_in_one_sound_cache(tmp_path, mode, decoded):
    make_tiny(tmp_path, per_class=10)
    builders = [start_builder(tmp_path, mode) for _ in range(2)]
    for builder in builders:                                            # both are up: they decode 0.7 s each
        builder.stdin.write("\n"), builder.stdin.flush()
    answers = [builder.communicate(timeout=60)[0].split() for builder in builders]
    assert answers[0][1] == answers[1][1]
    assert sum(int(count) for count, _ in answers) == {"locked": 34, "unlocked": 68}[mode]
    splits = data.load(tiny(tmp_path))
    assert decoded == [] and not any("anew" in note for note in splits.notes)
    direct = data.load(tiny(tmp_path, cache=False))
    assert torch.equal(splits.train.images, direct.train.images)
    assert torch.equal(splits.test.images, direct.test.images)
    assert len(cache_files(tmp_path)) == 2 and not list(tmp_path.rglob("*.part"))


def gone(pid):
    """Whether a process has ended; an orphan's entry may stay as a zombie where nobody collects it."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_builder_that_is_stopped_leaves_no_cache_and_no_process(tmp_path, how, decoded):
    make_tiny(tmp_path, per_class=10)
    builder = start_builder(tmp_path, "processes")
    builder.stdin.write("\n"), builder.stdin.flush()
    workers = [int(builder.stdout.readline().split()[1]) for _ in range(2)]
    assert not any(map(gone, workers))
    deadline = time.monotonic() + 30
    while not list(tmp_path.rglob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    builder.send_signal(how)
    builder.communicate(timeout=60)
    assert builder.returncode != 0 and not list(tmp_path.rglob("*.u8"))
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, workers))
    assert len(list(tmp_path.rglob("*.part"))) == (1 if how == signal.SIGKILL else 0)
    splits = data.load(tiny(tmp_path))
    assert len(decoded) == 34 and not list(tmp_path.rglob("*.part"))    # what the killed one left is swept away
    assert torch.equal(splits.train.images[:, :, 32, 32].int().argmax(1), splits.train.labels)


def test_a_decoding_process_that_dies_is_an_error_not_an_empty_image(tmp_path, monkeypatch):
    make_tiny(tmp_path, per_class=2)
    monkeypatch.setattr(sources, "MANY", 1)
    monkeypatch.setattr(sources, "cores", lambda: 2)
    monkeypatch.setattr(sources, "CHUNK", 2)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: real([sys.executable, "-c", "exit(3)"], **how))
    with pytest.raises(RuntimeError, match="decoding process ended early"):
        data.load(tiny(tmp_path))
    assert not list(tmp_path.rglob("*.u8")) and not list(tmp_path.rglob("*.part"))


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    make_folder(tmp_path / "images")
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(pathlib.Path(sources.__file__).parent)!r})
print("started", flush=True)
import data, sources
from config import Data
sources.MANY, sources.CHUNK, sources.cores = 1, 4, lambda: 2
splits = data.load(Data(name="folder", dir={str(tmp_path / "images")!r}, image_size=16))
sources.IN_MEMORY = 0
stream = data.load(Data(name="folder", dir={str(tmp_path / "images")!r}, image_size=16, workers=2)).train
print(len(splits.train), sum(len(y) for _, y in stream.batches(4)))
""")
    answer = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (answer.stdout, answer.stderr, answer.returncode) == ("started\n16 16\n", "", 0)


# Real images

REAL = pathlib.Path(os.environ.get("HIRELC_DATA") or "/nonexistent")


@pytest.mark.skipif(not (REAL / "tiny-imagenet-200").is_dir(), reason="HIRELC_DATA names no folder with "
                    "tiny-imagenet-200")
def test_real_tiny_imagenet():
    splits = data.load(Data(name="tiny-imagenet", dir=str(REAL), image_size=64, train_images=4000, test_images=1280))
    assert splits.num_classes == 200 and splits.class_names[0] == "n02124075"
    # The first line of val_annotations.txt gives val_0.JPEG the class n03444034.
    assert splits.class_names[splits.test.labels[0]] == "n03444034"
    with Image.open(REAL / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG") as image:
        assert np.array_equal(splits.test.images[0].permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
    assert splits.train.labels.bincount(minlength=200).min() >= 5       # 20 expected per class
    x = torch.cat([x for x, _ in splits.train.batches(500)])
    assert x.mean((0, 2, 3)).abs().max() < 0.15 and 1 < x.std((0, 2, 3)).min() and x.std((0, 2, 3)).max() < 1.4
    augmented = torch.cat([x for x, _ in splits.train.batches(500, generator=seeded())])
    assert (augmented.mean((0, 2, 3)) - x.mean((0, 2, 3))).abs().max() < 0.05


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="HIRELC_DATA names no folder with cifar10")
def test_real_cifar10():
    splits = data.load(Data(name="cifar10", dir=str(REAL), image_size=32, train_images=4000, test_images=1280))
    assert splits.class_names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                                  "truck")
    assert splits.test.labels.bincount().min() > 90                     # 128 expected per class
    x = torch.cat([x for x, _ in splits.train.batches(500)])
    assert x.mean((0, 2, 3)).abs().max() < 0.1
