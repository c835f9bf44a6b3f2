"""data.py: augmentation against hand numbers and torchvision, order and completeness of batches, every loader on
trees that the test makes, and real images where HIRELC_DATA names a folder that holds them."""

import io
import os
import pathlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional
from PIL import Image

import data
from config import Data, InputError

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))       # mean, std: black → -1, white → 1
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))       # leaves values in [0, 1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n=20, side=8, size=None, stats=UNIT, augment=(), seed=1):
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=seeded(seed))
    return data.Images(pixels, torch.arange(n), size or side, *stats, augment)


def all_of(images, **arguments):
    return torch.cat([x for x, _ in images.batches(64, **arguments)])


# Pieces of the augmentation


def test_crop_cuts_the_window_that_the_corner_names():
    nine = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(3, 3, 3, 3)
    got = data.crop(nine, torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1]), padding=1)
    assert got[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert got[1, 2].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert torch.equal(got[2], nine[2])


def test_flip_mirrors_the_chosen_images_left_to_right():
    six = torch.arange(1, 7, dtype=torch.uint8).view(1, 1, 2, 3).expand(3, 3, 2, 3)
    got = data.flip(six, torch.tensor([True, False, True]))
    assert got[0, 0].tolist() == got[2, 2].tolist() == [[3, 2, 1], [6, 5, 4]]
    assert torch.equal(got[1], six[1])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_functions_agree_with_torchvision(name):
    x = torch.rand(5, 3, 9, 9, generator=seeded())
    factors = torch.tensor([0.8, 0.9, 1.0, 1.15, 1.9])          # 1.9 makes the clamp matter
    got = getattr(data, f"{name}_")(x.clone(), factors.view(5, 1, 1, 1))
    theirs = getattr(torchvision.transforms.functional, f"adjust_{name}")
    for i, factor in enumerate(factors.tolist()):
        assert torch.allclose(got[i], theirs(x[i], factor), atol=1e-3)
    assert torch.allclose(got[2], x[2], atol=1e-6) and not torch.allclose(got[3], x[3], atol=1e-2)


def test_contrast_by_hand():
    # Grey 0.2 and 0.6: the mean is 0.4; factor 0.5 halves both distances from it, 3 overshoots into the clamp.
    x = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2).repeat(2, 3, 1, 1)
    got = data.contrast_(x, torch.tensor([0.5, 3.0]).view(2, 1, 1, 1))
    assert torch.allclose(got[:, 0, 0], torch.tensor([[0.3, 0.5], [0.0, 1.0]]), atol=1e-3)


def test_resize_by_hand():
    step = torch.tensor([0, 4], dtype=torch.uint8).view(1, 1, 1, 2).repeat(1, 3, 2, 1)
    assert torch.allclose(data.resize(step, 4)[0, 0, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]), atol=1e-4)
    # Shrinking by two widens the triangle to two pixels: weights 3/4, 3/4, 1/4 at distances 1/2, 1/2, 3/2.
    edge = torch.tensor([0, 0, 7, 7], dtype=torch.uint8).view(1, 1, 1, 4).repeat(1, 3, 4, 1)
    assert torch.allclose(data.resize(edge, 2)[0, 0, 0], torch.tensor([1.0, 6.0]), atol=1e-4)
    assert data.resize(step, 2) is step


@pytest.mark.parametrize("side, size", [(32, 48), (8, 50), (64, 24)])
def test_resize_agrees_with_the_reference(side, size):
    x = random_images(4, side).images
    if size > side:
        reference = F.interpolate(x.float(), size=(size, size), mode="bilinear", align_corners=False)
    else:
        reference = torchvision.transforms.v2.functional.resize(x.float(), [size, size], antialias=True)
    assert torch.allclose(data.resize(x, size), reference, atol=1e-3)


# Images: batches


def test_flips_hit_half_of_the_images_and_only_mirror():
    pixels = torch.zeros(2000, 3, 8, 8, dtype=torch.uint8)
    pixels[..., :4] = 255
    x = all_of(data.Images(pixels, torch.zeros(2000, dtype=torch.int64), 8, *HALF, ("flip",)), generator=seeded())
    bright_left = x[:, 0, 0, 0] == 1
    assert 900 < bright_left.sum() < 1100                               # 4.5 standard deviations
    assert torch.equal(x[:, 1, 5, 7] == -1, bright_left)
    assert len({tuple(part.tolist()) for part in bright_left.split(64)[:10]}) == 10    # drawn anew for each batch


def test_crops_are_black_windows_at_the_resized_size_one_per_image():
    pixels = torch.full((1500, 3, 6, 6), 255, dtype=torch.uint8)
    images = data.Images(pixels, torch.zeros(1500, dtype=torch.int64), 12, *HALF, ("crop",))
    x = all_of(images, generator=seeded())
    assert x.shape == (1500, 3, 12, 12)
    assert set(x.unique().tolist()) == {-1.0, 1.0}                      # padded before the normalisation
    rows, columns = (x[:, 0] == 1).any(2), (x[:, 0] == 1).any(1)        # bool [n, 12]
    seen = set()
    for row, column in zip(rows.tolist(), columns.tolist()):
        offset = lambda line: line.index(True) - line[::-1].index(True)         # black lines before minus after
        seen.add((offset(row), offset(column)))
        assert row.count(True) == 12 - abs(offset(row))
    assert seen == {(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)}


def test_jitter_draws_three_independent_factors_between_0_8_and_1_2_per_image():
    n = 1000
    greys = torch.full((n, 3, 8, 8), 60, dtype=torch.uint8)
    greys[..., :4] = 120                                                # no clamp is reached, so the order is moot
    colour = torch.tensor([120, 60, 90], dtype=torch.uint8).view(1, 3, 1, 1).repeat(n, 1, 8, 8)
    labels = torch.arange(n)
    grey, tint = (data.Images(pixels, labels, 8, *UNIT, ("jitter",)).batch(labels, generator=seeded(3))[0] * 255
                  for pixels in (greys, colour))
    # Contrast keeps the mean grey, saturation keeps every grey: what is left of each gives one factor.
    brightness = grey.mean((1, 2, 3)) / 90
    contrast = (grey[:, 0, 0, 0] - grey[:, 0, 0, 7]) / 60 / brightness
    saturation = (tint[:, 0, 0, 0] - tint[:, 1, 0, 0]) / 60 / brightness / contrast
    factors = torch.stack((brightness, contrast, saturation))
    assert factors.min() > 0.799 and factors.max() < 1.201
    assert (factors.amin(1) < 0.81).all() and (factors.amax(1) > 1.19).all()
    assert (factors.mean(1) - 1).abs().max() < 0.02
    assert (torch.corrcoef(factors) - torch.eye(3)).abs().max() < 0.15


def test_jitter_order_is_drawn_per_batch(monkeypatch):
    taped = []
    for name in ("brightness_", "contrast_", "saturation_"):
        monkeypatch.setattr(data, name, lambda x, factor, name=name: taped.append(name) or x)
    list(random_images(80, augment=("jitter",)).batches(1, generator=seeded()))
    orders = {tuple(taped[i:i + 3]) for i in range(0, len(taped), 3)}
    assert len(taped) == 240 and len(orders) == 6 and all(len(set(order)) == 3 for order in orders)


def test_normalisation_by_hand():
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 8, 8)
    images = data.Images(pixels, torch.zeros(1, dtype=torch.int64), 8, (0.5, 0.25, 0.1), (0.5, 0.5, 0.2))
    x, _ = images.batch([0])
    assert torch.allclose(x[0, :, 3, 4], torch.tensor([1.0, -0.5, 0.5]), atol=1e-6)


def test_same_generator_same_batches():
    images = random_images(50, 8, size=10, augment=("flip", "crop", "jitter"))
    first, again, other = (all_of(images, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    generator = seeded(5)
    assert not torch.equal(all_of(images, generator=generator), all_of(images, generator=generator))


def test_without_a_generator_stored_order_unaugmented_and_limited():
    images = random_images(50, augment=("flip", "crop", "jitter"))
    x = torch.cat([x for x, _ in images.batches(16)])
    assert torch.allclose(x * 255, images.images.float(), atol=1e-3)
    assert [len(y) for _, y in images.batches(16)] == [16, 16, 16, 2]
    labels = [y for _, y in images.batches(16, limit=20)]
    assert [len(y) for y in labels] == [16, 4] and torch.cat(labels).tolist() == list(range(20))
    assert sum(len(y) for _, y in images.batches(16, limit=80)) == 50


def test_an_epoch_holds_every_image_once_with_its_label():
    pixels = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).repeat(1, 3, 8, 8)
    images = data.Images(pixels, torch.arange(50) + 100, 8, *UNIT, ("flip",))
    batches = list(images.batches(16, generator=seeded()))
    y = torch.cat([y for _, y in batches])
    assert sorted(y.tolist()) == list(range(100, 150)) and y.tolist() != list(range(100, 150))
    assert torch.equal((torch.cat([x for x, _ in batches])[:, 0, 0, 0] * 255).round().long() + 100, y)
    assert [len(y) for _, y in batches] == [16, 16, 16, 2]
    assert [len(y) for _, y in images.batches(16, generator=seeded(), limit=32)] == [16, 16]


def test_batches_never_change_the_stored_images():
    images = random_images(augment=("flip", "crop", "jitter"), stats=HALF)
    before = images.images.clone()
    x, y = images.batch(list(range(20)), generator=seeded())
    x.zero_(), y.zero_(), images.batch([0])[1].zero_()
    assert torch.equal(images.images, before) and images.labels.tolist() == list(range(20))


def test_subset_keeps_the_settings():
    images = random_images(20, 8, size=12, augment=("flip",))
    part = images.subset([7, 3])
    assert len(part) == 2 and part.labels.tolist() == [7, 3] and torch.equal(part.images[1], images.images[3])
    assert (part.size, part.augment) == (12, ("flip",)) and images.subset(slice(2, 5)).labels.tolist() == [2, 3, 4]


@pytest.mark.parametrize("change, word", [
    ({"images": torch.zeros(2, 3, 8, 8)}, "uint8"), ({"images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)}, "uint8"),
    ({"labels": torch.zeros(2)}, "int64"), ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
    ({"augment": ("flip", "mixup")}, "mixup")])
def test_images_reject_what_is_no_image_set(change, word):
    fields = dict(images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), labels=torch.zeros(2, dtype=torch.int64),
                  size=8, mean=HALF[0], std=HALF[1], augment=())
    with pytest.raises(ValueError, match=word):
        data.Images(**{**fields, **change})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_do_not_depend_on_the_device():
    images = random_images(32, 16, size=24, augment=("flip", "crop", "jitter"))
    on_cpu, on_gpu = (images.batch(list(range(32)), device, seeded(4)) for device in ("cpu", "cuda"))
    assert on_gpu[0].is_cuda and torch.allclose(on_cpu[0], on_gpu[0].cpu(), atol=1e-4)
    assert torch.equal(on_cpu[1], on_gpu[1].cpu())


# Reading files


def save(path, colour, side=32, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(colour, tuple) else "L", (side, side), colour).save(path, **how)


def test_decode_keeps_the_order_and_reports_progress(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(600)]                 # more than two chunks
    for i, path in enumerate(paths):
        save(path, (i % 256, i // 256, 7), 4)
    calls = []
    images, resized, recoloured = data.decode(paths, 4, "reading", lambda *call: calls.append(call), workers=4)
    assert (resized, recoloured) == (0, 0)
    assert [int(i) for i in images[:, 0, 2, 3] + 256 * images[:, 1, 2, 3].int()] == list(range(600))
    assert calls[0] == ("reading", 0, 600) and calls[-1] == ("reading", 600, 600)
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)


def test_decode_converts_grey_and_resizes_and_counts_both(tmp_path):
    save(tmp_path / "grey.png", 100, 8)
    Image.fromarray(np.array([[[0, 0, 0], [200, 100, 0]]] * 2, dtype=np.uint8)).save(tmp_path / "small.png")
    images, resized, recoloured = data.decode([tmp_path / "grey.png", tmp_path / "small.png"], 8)
    assert (resized, recoloured) == (1, 1)
    assert (images[0] == 100).all()
    line = images[1, 0, 4].tolist()                                     # 0 → 200 in the bilinear ramp
    assert line[0] == 0 and line[-1] == 200 and line == sorted(line) and 0 < line[3] < 200


def test_fixed_order_is_a_permutation_that_never_changes():
    assert data.fixed_order(7) == [5, 4, 0, 3, 1, 6, 2]
    assert sorted(data.fixed_order(1000)) == list(range(1000))
    torch.manual_seed(1), np.random.seed(1)
    assert data.fixed_order(7) == [5, 4, 0, 3, 1, 6, 2]


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
    assert str(tree / missing.removesuffix("/*")) in str(error.value) and data.TINY_IMAGENET_URL in str(error.value)
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
    monkeypatch.setattr(data, "TINY_IMAGENET_URL", source.as_uri())
    calls = []
    splits = data.load(tiny(tmp_path / "new" / "folder"), lambda *call: calls.append(call))
    assert splits.test.labels.tolist() == [1, 2, 0, 1]
    assert ("downloading tiny-imagenet-200.zip", source.stat().st_size, source.stat().st_size) in calls
    left = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
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
    monkeypatch.setattr(data, "TINY_IMAGENET_URL", (tmp_path / "nowhere.zip").as_uri())
    folder = tmp_path / "file" / "data" if blocked else tmp_path / "data"
    (tmp_path / "file").write_text("a file where a folder is needed")
    with pytest.raises(InputError) as error:
        data.load(tiny(folder))
    assert data.TINY_IMAGENET_URL in str(error.value) and f"{folder}/tiny-imagenet-200" in str(error.value)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_download_that_breaks_off_leaves_no_file(tmp_path, monkeypatch):
    class Source(io.BytesIO):
        headers = {"Content-Length": "100"}
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: Source(b"x" * 60))
    with pytest.raises(OSError, match="60 of 100"):
        data.fetch("http://host/file.zip", tmp_path / "file.zip")
    assert not list(tmp_path.iterdir())


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
    (tree / "train" / "bee" / "notes.txt").write_text("x")
    splits = data.load(Data(name=name, dir=str(tmp_path), image_size=40))
    assert splits.class_names == tuple(CLASSES) and splits.num_classes == 3
    for part in (splits.train, splits.test):
        keys = part.images[:, :, 0, 0].tolist()                         # (class, number of the file, 9)
        assert part.labels.tolist() == [key[0] for key in keys]
        assert sorted(keys) == [[k, i, 9] for k in range(3) for i in range(40)] and keys != sorted(keys)
        assert part.labels[:20].bincount(minlength=3).min() >= 3        # the first 20 by name are all ants
    assert set(splits.train.augment) == {"flip", "crop", "jitter"} and splits.test.augment == ()
    assert splits.train.padding == 4 and next(splits.test.batches(5))[0].shape == (5, 3, 40, 40)
    assert any("skipped 1 train files" in note for note in splits.notes)


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
    names, entries = ("cifar10", "tiny-imagenet"), data._entries
    listed = []
    for key in (lambda entry: entry.name, lambda entry: entry.name[::-1]):
        monkeypatch.setattr(data, "_entries", lambda *where: sorted(entries(*where), key=key, reverse=True))
        listed.append([data.load(Data(name=name, dir=str(tmp_path))).train.images for name in names])
    monkeypatch.setattr(data, "_entries", entries)
    listed.append([data.load(Data(name=name, dir=str(tmp_path))).train.images for name in names])
    for images in zip(*listed):
        assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
        assert len(images[0].flatten(1).unique(dim=0)) == len(images[0])


def test_incomplete_class_folders_are_named(tmp_path):
    tree = make_cifar(tmp_path, per_class=2)
    (tree / "test" / "cat").rename(tree / "test" / "cow")
    with pytest.raises(InputError, match="cat, cow"):
        data.load(Data(name="cifar10", dir=str(tmp_path)))
    for path in (tree / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"train/bee holds no images; expected .*CLASS"):
        data.load(Data(name="cifar10", dir=str(tmp_path)))
    (tree / "train").rename(tree / "training")
    with pytest.raises(InputError, match="cifar10/train is missing; expected"):
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


# Synthetic images


def test_synthetic_is_deterministic_balanced_and_told_apart_from_its_test_split():
    first, again, other = (data.synthetic(10, 100, 50, 16, seed) for seed in (1, 1, 2))
    for i in range(2):
        assert torch.equal(first[i].images, again[i].images) and torch.equal(first[i].labels, again[i].labels)
        assert not torch.equal(first[i].images, other[i].images)
    assert first[0].labels.bincount().tolist() == [10] * 10 and first[1].labels.bincount().tolist() == [5] * 10
    seen = {bytes(image) for image in first[0].images.flatten(1).numpy()}
    assert not seen & {bytes(image) for image in first[1].images.flatten(1).numpy()} and len(seen) == 100


def test_synthetic_has_a_thousand_different_classes():
    # The same random numbers for every class: two classes that mean the same would draw the same image.
    drawn = {bytes(data._draw(torch.tensor([k]), 16, seeded()).numpy()) for k in range(1000)}
    assert len(drawn) == 1000


@pytest.mark.parametrize("classes, size", [(1001, 32), (0, 32), (10, 7)])
def test_synthetic_ranges(classes, size):
    with pytest.raises(ValueError):
        data.synthetic(classes, 10, 10, size, 0)
    for side in (8, 13):
        assert data.synthetic(1000, 5, 3, side, 0)[0].images.shape == (5, 3, side, side)


def test_load_synthetic_takes_the_settings():
    splits = data.load(Data(name="synthetic", dir="/nowhere", image_size=16, classes=7))
    assert (len(splits.train), len(splits.test), splits.num_classes) == (2000, 1000, 7)
    assert len(splits.class_names) == 7 and splits.train.labels.max() == 6
    assert set(splits.train.augment) == {"flip", "crop"} and splits.test.augment == ()
    few = data.load(Data(name="synthetic", image_size=24, train_images=30, test_images=20))
    assert few.train.images.shape == (30, 3, 24, 24) and len(few.test) == 20
    assert any("synthetic" in note for note in few.notes)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fit(model, lr, epochs, batches):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def test_synthetic_is_learnt_by_a_small_convnet_but_not_from_colour(one_thread):
    train, test = data.synthetic(10, 1000, 500, 32, 0)
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in (16, 32, 64):
        layers += [torch.nn.Conv2d(channels, width, 3, 2, 1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        channels = width
    generator = seeded()
    convnet = fit(torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(1024, 10)), 3e-3, 8,
                  lambda: train.batches(50, generator=generator))
    with torch.no_grad():
        right = sum((convnet(x).argmax(1) == y).sum().item() for x, y in test.batches(250))
    assert right / 500 > 0.9

    seen, unseen = ([(x.mean((2, 3)), y) for x, y in part.batches(1000)] for part in (train, test))
    linear = fit(torch.nn.Linear(3, 10), 0.05, 400, lambda: seen)
    assert (linear(unseen[0][0]).argmax(1) == unseen[0][1]).float().mean() < 0.5


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
