"""Every layout on trees that the test makes, decoding here and by processes, the cache, unreadable files."""

import errno
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
from support import images as sources
from support import layouts
from config import Data, InputError

def save(path, colour, side=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(colour, tuple) else "L", (side, side), colour).save(path)


def one_line(error, *words):
    assert "\n" not in str(error.value) and all(str(word) in str(error.value) for word in words), error.value


@pytest.fixture
def decoded(monkeypatch):
    """Paths that were decoded in this process, in any order."""
    taped, real = [], sources.decode
    monkeypatch.setattr(sources, "decode", lambda path, side: taped.append(path) or real(path, side))
    return taped


def test_an_image_becomes_a_flag_and_its_pixels_converted_and_resized(tmp_path):
    for name, colour, side, flag in (("same", (1, 2, 3), 8, 0), ("grey", 100, 8, sources.CHANGED),
                                     ("large", (1, 2, 3), 9, sources.CHANGED)):
        save(tmp_path / f"{name}.png", colour, side)
        row = sources.decode(tmp_path / f"{name}.png", 8)
        assert row[0] == flag and row.shape == (1 + 3 * 64,)
        assert sources.pixels(row[None])[0, :, 3, 4].tolist() == ([100] * 3 if name == "grey" else [1, 2, 3])
    Image.fromarray(np.array([[[0, 0, 0], [200, 100, 0]]] * 2, dtype=np.uint8)).save(tmp_path / "small.png")
    line = sources.pixels(sources.decode(tmp_path / "small.png", 8)[None])[0, 0, 4].tolist()
    assert line[0] == 0 and line[-1] == 200 and line == sorted(line) and 0 < line[3] < 200     # a bilinear ramp
    assert sources.decode(tmp_path / "small.png", 0).tolist() == [0]


def test_fixed_order_is_a_permutation_that_never_changes():
    assert layouts.fixed_order(7) == [5, 4, 0, 3, 1, 6, 2] and sorted(layouts.fixed_order(1000)) == list(range(1000))


# Tiny ImageNet. Class k of wnids.txt has the colour COLOURS[k].

WNIDS = ["n03", "n01", "n02"]                   # not in name order, as in the published file
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
ANNOTATED = [("val_2.JPEG", "n01"), ("val_0.JPEG", "n02"), ("val_3.JPEG", "n03"), ("val_1.JPEG", "n01")]


def make_tiny(folder, per_class=2):
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


def test_tiny_imagenet_labels_order_subsets_and_notes(tmp_path):
    tree = make_tiny(tmp_path, 20)
    splits, few = data.load(tiny(tmp_path)), data.load(tiny(tmp_path, train_images=15, test_images=2))
    assert splits.num_classes == 3
    assert splits.test.labels.tolist() == [1, 2, 0, 1]                  # the lines of val_annotations.txt
    assert sorted(splits.train.labels.tolist()) == [0] * 20 + [1] * 20 + [2] * 20
    for part in (splits.train, splits.test):
        assert torch.equal(part.images[:, :, 32, 32].int().argmax(1), part.labels)      # red, green, blue
    assert set(splits.train.augment) == {"flip", "jitter"} and splits.test.augment == ()
    assert any("60 training images" in note and "100000" in note for note in splits.notes)
    assert torch.equal(few.train.images, splits.train.images[:15]) and few.test.labels.tolist() == [1, 2]
    assert few.train.labels.bincount(minlength=3).min() >= 2            # in class order there would be one class
    assert sum("first" in note for note in few.notes) == 2
    with pytest.raises(InputError, match=r"train_images=61.* 60;"):
        data.load(tiny(tmp_path, train_images=61))
    save(tree / "train" / "n01" / "images" / "n01_0.JPEG", 90, 64)
    save(tree / "val" / "images" / "val_0.JPEG", (0, 0, 200), 30)
    notes = " | ".join(data.load(tiny(tmp_path)).notes)
    assert "1 train images were resized to 64 x 64 or converted" in notes and "1 test images were resized" in notes


@pytest.mark.parametrize("file, content, word", [
    ("wnids.txt", None, "wnids.txt"), ("wnids.txt", b"", "at least one"), ("wnids.txt", b"\xff", "decode byte"),
    ("val/val_annotations.txt", None, "val_annotations.txt"), ("val/val_annotations.txt", b"", "is empty"),
    ("val/val_annotations.txt", b"val_1.JPEG\tn99\t0\n", "'n99'"), ("train/n01/images", None, "classes n01")])
def test_tiny_imagenet_incomplete_or_damaged_is_named(tmp_path, file, content, word):
    tree = make_tiny(tmp_path)
    (tree / file).rename(tmp_path / "away")
    if content is not None:
        (tree / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        data.load(tiny(tmp_path))
    one_line(error, tree, word, layouts.ARCHIVES["tiny-imagenet"][0])


def zip_of(tree, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*")):
            archive.write(file, file.relative_to(tree.parent))


def served_from(monkeypatch, name, archive):
    monkeypatch.setitem(layouts.ARCHIVES, name, (archive.as_uri(), *layouts.ARCHIVES[name][1:]))


def test_tiny_imagenet_is_downloaded_and_extracted_once(tmp_path, monkeypatch):
    source, folder = tmp_path / "tiny-imagenet-200.zip", tmp_path / "new" / "folder"
    zip_of(make_tiny(tmp_path / "made"), source)
    served_from(monkeypatch, "tiny-imagenet", source)
    assert data.load(tiny(folder)).test.labels.tolist() == [1, 2, 0, 1]
    left = {path.name for path in folder.iterdir()} - {sources.CACHE}
    assert left == {"tiny-imagenet-200", "tiny-imagenet-200.zip"}       # nothing half-done stays
    source.unlink()
    assert len(data.load(tiny(folder)).train) == 6


DAMAGES = {"empty": lambda whole: b"", "no zip": lambda whole: b"no zip file", "half": lambda whole: whole[:-900],
           "bit": lambda whole: whole.replace(b"\xff\xd9", b"\xff\xd8", 1)}


@pytest.mark.parametrize("how", ["other folder", "bomb", "nowhere", "blocked", *DAMAGES])
def test_an_archive_that_cannot_be_used_is_named(tmp_path, monkeypatch, how):
    archive = tmp_path / "a" / "tiny-imagenet-200.zip"
    served_from(monkeypatch, "tiny-imagenet", tmp_path / "none" / archive.name)
    tree = make_tiny(tmp_path / "made", 1)
    if how == "blocked":
        archive.parent.write_text("a file where a folder is needed")
    elif how != "nowhere":
        archive.parent.mkdir()
        zip_of(tree / "val" if how == "other folder" else tree, archive)
        archive.write_bytes(DAMAGES.get(how, bytes)(archive.read_bytes()))
    if how == "bomb":
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("zeros", bytes(5 << 20))
    with pytest.raises(InputError) as error:
        data.load(tiny(archive.parent))
    one_line(error, archive, *(["--data-dir DIR", "--smoke, which needs no data"] if how in ("nowhere", "blocked") else
                               ["100 times its size"] if how == "bomb" else ["delete it"]))
    assert not list(tmp_path.rglob("tmp*")) and not archive.with_suffix("").exists()


CLASSES = ["ant", "bee", "cat"]


def make_folder(base, test="val", per_class=8, sides=(20, 12)):
    """{train,TEST}/CLASS/*: red tells the class, green the number of the file."""
    for split in ("train", test):
        for k, label in enumerate(CLASSES):
            (base / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                name = f"{i}{('.png', '.PNG')[i % 2]}" if test == "test" else f"{i}.png"
                Image.new("RGB", sides, (50 * k, 5 * i, 9)).save(base / split / label / name)
    return base


def folder_settings(base, **settings):
    return Data(**{"name": "folder", "dir": str(base), "image_size": 16, **settings})


def test_sixteen_bit_images_are_scaled_and_float_ones_refused(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "8.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(">u2") * 257).save(tmp_path / "big.tif")
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "float.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32.tif")
    for name in ("16.png", "big.tif"):
        assert torch.equal(sources.decode(tmp_path / name, 16), sources.decode(tmp_path / "8.png", 16))
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "dark.png")  # 8 bits in 16
    for name in ("float.tif", "32.tif", "dark.png"):
        with pytest.raises(InputError, match=f"{name}: .* no known range"):
            sources.decode(tmp_path / name, 16)


@pytest.mark.parametrize("name, where, test", [
    ("cifar10", "cifar10", "test"), ("cifar100", "cifar100", "test"), ("folder", ".", "val"), ("folder", ".", "test"),
    ("imagenet", "imagenet", "val"), ("imagenet", ".", "val")])
def test_class_folders(tmp_path, monkeypatch, name, where, test):
    tree, cifar = make_folder(tmp_path / where, test, 40), name.startswith("cifar")
    (tree / "train" / "bee" / ".hidden").write_text("x")
    splits = data.load(folder_settings(tmp_path, name=name, test_images=100))
    assert splits.num_classes == 3 and (len(splits.train), len(splits.test), splits.skipped) == (120, 100, 0)
    for part in (splits.train, splits.test):
        keys = part.images[:, :, 3, 3].tolist()                         # (class, number of the file, 9)
        assert [key[0] // 50 for key in keys] == part.labels.tolist() and keys != sorted(keys)
        assert len({tuple(key) for key in keys}) == len(part)
        assert part.labels[:20].bincount(minlength=3).min() >= 3        # the first 20 by name are all ants
        assert part.images.shape[2] == (32 if cifar else 16) and part.batch([0])[0].shape == (1, 3, 16, 16)
    assert splits.train.augment == (("flip", "crop", "jitter") if cifar else ("flip", "jitter"))
    assert splits.test.augment == () and splits.train.padding == 4
    notes = " | ".join(splits.notes)
    assert "the first 100 of the test order of 120" in notes and f"test = {tmp_path / where / test}" in notes
    assert (name == "imagenet") == ("3 classes found, the published set has 1000" in notes)
    walk = os.walk                                                      # whatever order the file system lists in
    monkeypatch.setattr(os, "walk", lambda *where, **how: [(*at, sorted(files, reverse=True))
                                                           for *at, files in walk(*where, **how)])
    other = data.load(folder_settings(tmp_path, name=name, cache=False, train_images=30))
    assert torch.equal(other.train.images, splits.train.images[:30])
    if (name, test) == ("folder", "test"):                              # val goes before test
        make_folder(tmp_path, "val", 5)
        assert len(data.load(folder_settings(tmp_path)).test) == 15


@pytest.mark.parametrize("old, new, word", [
    ("test/cat", "test/cow", "differ in cat, cow"), ("train/bee/*", "", "classes bee"), ("train", "training", "train")])
def test_incomplete_class_folders_are_named(tmp_path, old, new, word):
    tree = make_folder(tmp_path / "cifar10", "test", 2)
    for path in tree.glob(old):
        path.rename(tree / new) if new else path.unlink()
    with pytest.raises(InputError) as error:
        data.load(Data(name="cifar10", dir=str(tmp_path)))
    one_line(error, tree, word, "{train,test}/CLASS/*.png", "--data-dir DIR", "--smoke, which needs no data")


@pytest.mark.parametrize("name, expected", [         # (1 - mean)/std, (0 - mean)/std, (0.2 - mean)/std by hand
    ("cifar10", (2.514088, -2.418255, -1.226368)), ("cifar100", (1.842617, -1.897466, -0.872148)),
    ("folder", (2.248908, -2.035714, -0.915556))])
def test_normalisation_constants(tmp_path, name, expected):
    for split in ("train", "test"):
        save(tmp_path / name.removeprefix("folder") / split / "ant" / "0.png", (255, 0, 51))
    splits = data.load(Data(name=name, dir=str(tmp_path), image_size=16, test_images=1))
    assert torch.allclose(splits.test.batch([0])[0][0, :, 8, 8], torch.tensor(expected), atol=1e-4)
    assert (splits.train.mean, splits.train.std) == (splits.test.mean, splits.test.std)


def published_cifar(folder, monkeypatch):
    """An archive of CIFAR-10's layout: 6 + 6 training images and 5 test images, pixel value = number of the image."""
    def member(start, count):
        numbers = np.arange(start, start + count, dtype=np.uint8)
        return {"data": np.repeat(numbers[:, None], 3072, 1), "labels": [int(i) % 2 for i in numbers]}
    files = {"data_batch_1": member(0, 6), "data_batch_2": member(6, 6), "test_batch": member(50, 5),
             "batches.meta": {"label_names": ["even", "odd"]}}
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file, content in files.items():
            content, info = pickle.dumps(content), tarfile.TarInfo(f"cifar-10-batches-py/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    served_from(monkeypatch, "cifar10", archive)
    for name, value in dict(url=archive.as_uri(), tgz_md5=None, test_list=[["test_batch", None]],
                            train_list=[["data_batch_1", None], ["data_batch_2", None]],
                            meta={"filename": "batches.meta", "key": "label_names", "md5": None}).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    return archive


def test_cifar_from_the_published_archive(tmp_path, monkeypatch, capsys):
    archive, where = published_cifar(tmp_path, monkeypatch), tmp_path / "new"
    splits = data.load(Data(name="cifar10", dir=str(where), image_size=32, train_images=8))
    numbers = splits.train.images[:, 1, 31, 0].tolist()
    assert len(set(numbers)) == 8 and max(numbers) < 12 and numbers != sorted(numbers)
    assert splits.train.labels.tolist() == [number % 2 for number in numbers]
    assert splits.test.images[:, 2, 5, 5].tolist() == [50, 51, 52, 53, 54] and splits.num_classes == 2
    archive.unlink()
    again = data.load(Data(name="cifar10", dir=str(where), image_size=32, test_images=3))      # what is there is used
    assert again.test.labels.tolist() == [0, 1, 0] and again.train.images[:8, 1, 31, 0].tolist() == numbers
    with pytest.raises(InputError, match="train_images=13.* 12;"):
        data.load(Data(name="cifar10", dir=str(where), train_images=13))
    with pytest.raises(InputError) as error:
        data.load(Data(name="cifar10", dir=str(tmp_path / "none")))
    one_line(error, archive.as_uri(), tmp_path / "none", "{train,test}/CLASS/*.png", "--data-dir DIR", "--smoke")
    assert capsys.readouterr().out == ""


def break_files(*paths):
    for i, path in enumerate(paths):
        path.write_bytes((b"no image", path.read_bytes()[:60])[i % 2])


@pytest.mark.parametrize("processes", [False, True])
def test_skip_corrupt_leaves_out_and_counts(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(sources, "MANY", 1 if processes else 10**9)
    monkeypatch.setattr(sources, "CHUNK", 3)
    monkeypatch.setattr(sources, "CORES", 2)
    make_folder(tmp_path)
    calls = []
    whole = data.load(folder_settings(tmp_path), lambda *call: calls.append(call))
    assert calls[:8] == [("reading train images", done, 24) for done in range(3, 25, 3)] and len(calls) == 16
    break_files(tmp_path / "train" / "ant" / "3.png", tmp_path / "train" / "bee" / "6.png")
    keys = whole.train.images[:, :2, 0, 0].tolist()
    keep = [i for i, key in enumerate(keys) if key not in ([0, 15], [50, 30])]
    for _ in range(2):                                                  # decoded, then from the cache
        splits = data.load(folder_settings(tmp_path, skip_corrupt=True))
        assert splits.skipped == 2 and (len(splits.train), len(splits.test)) == (22, 24)
        assert torch.equal(splits.train.images, whole.train.images[keep])
        assert torch.equal(splits.train.labels, whole.train.labels[keep])
        note, = (note for note in splits.notes if "left out" in note)
        assert "2 train images" in note and "ant/3.png" in note and "bee/6.png" in note
        # A subset is taken first: what cannot be read among its images is missing from it.
        few = data.load(folder_settings(tmp_path, skip_corrupt=True, train_images=12))
        assert torch.equal(few.train.images, whole.train.images[[i for i in keep if i < 12]])
        assert few.skipped == 12 - len(few.train)
        with pytest.raises(InputError, match="^.*.png: not a readable image .*data.skip_corrupt=true$"):
            data.load(folder_settings(tmp_path))
    (tmp_path / "val" / "bee" / "notes.txt").write_text("x")
    assert data.load(folder_settings(tmp_path, skip_corrupt=True)).skipped == 3
    break_files(*(tmp_path / "val").glob("*/*"))
    with pytest.raises(InputError, match="val/.*no image of the test split"):
        data.load(folder_settings(tmp_path, skip_corrupt=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_of_a_stream(tmp_path, monkeypatch, workers, decoded):
    make_folder(tmp_path)
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    break_files(tmp_path / "train" / "ant" / "3.png")
    with pytest.raises(InputError, match="train/ant/3.png: not a readable image"):
        list(data.load(folder_settings(tmp_path, workers=workers)).train.batches(4))
    for count in (48, 0):
        decoded.clear()
        splits = data.load(folder_settings(tmp_path, skip_corrupt=True, workers=workers))
        assert len(decoded) == count                                    # the second time the result is remembered
        assert isinstance(splits.train, data.Stream) and (len(splits.train), splits.skipped) == (23, 1)
        assert any("left out 1 train" in note and "ant/3.png" in note for note in splits.notes)
    assert sum(len(y) for _, y in splits.train.batches(4)) == 23


def cache_files(base):
    return sorted((base / sources.CACHE).iterdir())


@pytest.mark.parametrize("change", ["nothing", "time", "content", "name", "cut", "short", "long"])
def test_what_is_cached_is_decoded_once_and_again_when_a_file_changes(tmp_path, decoded, recwarn, change):
    tree = make_tiny(tmp_path, 4)
    data.load(tiny(tmp_path, cache=False))
    assert len(decoded) == 16 and not (tmp_path / sources.CACHE).exists()
    first = data.load(tiny(tmp_path))
    data.load(tiny(tmp_path)).train.images.zero_()                      # a mapping that keeps writes to itself
    assert len(decoded) == 32 and len(cache_files(tmp_path)) == 2
    file, target = tree / "train" / "n01" / "images" / "n01_2.JPEG", cache_files(tmp_path)[1]
    status, whole = file.stat(), target.read_bytes()
    target.write_bytes({"cut": whole[:-5000], "short": b"x", "long": whole + b"x"}.get(change, whole))
    if change == "content":
        save(file, (0, 99, 99), 128)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
    if change == "name":
        file.rename(file.with_name("n01_9.JPEG"))
    again = data.load(tiny(tmp_path))
    assert len(decoded) == (32 if change == "nothing" else 44)
    assert torch.equal(again.train.images, data.load(tiny(tmp_path, cache=False)).train.images)
    assert torch.equal(again.test.images, first.test.images) and torch.equal(again.test.labels, first.test.labels)
    assert change in ("name", "content") or again.notes == first.notes and target.read_bytes() == whole
    assert not recwarn


def test_a_subset_uses_a_larger_cache_and_is_replaced_by_one(tmp_path, decoded):
    make_folder(tmp_path)
    counts = []
    for wanted in (5, 4, 0, 7):
        decoded.clear()
        splits = data.load(folder_settings(tmp_path, train_images=wanted, test_images=1))
        counts.append(sum("/train/" in path for path in decoded))
        images = splits.train.images
        assert torch.equal(images, data.load(folder_settings(tmp_path, cache=False)).train.images[:wanted or 24])
    assert counts == [5, 0, 24, 0] and len(cache_files(tmp_path)) == 2


@pytest.mark.parametrize("call, code", [("pathlib.Path.mkdir", errno.EROFS), ("os.replace", errno.ENOSPC),
                                        ("os.fsync", errno.EIO)])
def test_a_folder_that_takes_no_cache_is_noted_and_images_stay_in_memory(tmp_path, monkeypatch, call, code):
    make_tiny(tmp_path)
    kept = data.load(tiny(tmp_path, cache=False)).train.images

    def fail(*arguments, **more):
        raise OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        splits = data.load(tiny(tmp_path))
    notes = [note for note in splits.notes if "cannot hold" in note]
    assert torch.equal(splits.train.images, kept) and len(notes) == 2
    assert all(sources.CACHE in note and os.strerror(code) in note for note in notes)
    assert not any(path.is_file() for path in tmp_path.glob(".*/*"))
