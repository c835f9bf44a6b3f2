"""Augmentation against hand numbers and torchvision, order and completeness of batches, streams against images in
memory, a user's own images, images that are not finite, and the synthetic images."""

import multiprocessing
import os
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader as Loader
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Subset, SubsetRandomSampler, TensorDataset
from torch.utils.data import default_collate

import data
from support import images as sources
from config import Data, InputError
from networks import same, seeded

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))       # mean, std: black → -1, white → 1
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))       # leaves values in [0, 1]


def random_images(n=20, side=8, size=None, stats=UNIT, augment=()):
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=seeded(1))
    return data.Images(pixels, torch.arange(n), size or side, *stats, augment)


def test_crop_cuts_the_window_that_the_corner_names():
    nine = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(3, 3, 3, 3)
    got = data.crop(nine, torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1]), padding=1)
    assert got[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert got[1, 2].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert torch.equal(got[2], nine[2])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_functions_agree_with_torchvision(name):
    x = torch.rand(5, 3, 9, 9, generator=seeded())
    factors = torch.tensor([0.8, 0.9, 1.0, 1.15, 1.9])          # 1.9 makes the clamp matter
    got = getattr(data, f"{name}_")(x.clone(), factors.view(5, 1, 1, 1))
    theirs = getattr(torchvision.transforms.functional, f"adjust_{name}")
    for i, factor in enumerate(factors.tolist()):
        assert torch.allclose(got[i], theirs(x[i], factor), atol=1e-3)
    assert torch.allclose(got[2], x[2], atol=1e-6) and not torch.allclose(got[3], x[3], atol=1e-2)


def test_resize_by_hand():
    step = torch.tensor([0, 4], dtype=torch.uint8).view(1, 1, 1, 2).repeat(1, 3, 2, 1)
    assert torch.allclose(data.resize(step, 4)[0, 0, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]), atol=1e-4)
    # Shrinking by two widens the triangle to two pixels: weights 3/4, 3/4, 1/4 at distances 1/2, 1/2, 3/2.
    edge = torch.tensor([0, 0, 7, 7], dtype=torch.uint8).view(1, 1, 1, 4).repeat(1, 3, 4, 1)
    assert torch.allclose(data.resize(edge, 2)[0, 0, 0], torch.tensor([1.0, 6.0]), atol=1e-4)
    assert data.resize(step, 2) is step


def test_flips_mirror_half_of_the_images_left_to_right():
    six = torch.arange(1, 7, dtype=torch.uint8).view(1, 1, 2, 3).expand(3, 3, 2, 3)
    got = data.flip(six, torch.tensor([True, False, True]))
    assert got[0, 0].tolist() == got[2, 2].tolist() == [[3, 2, 1], [6, 5, 4]] and torch.equal(got[1], six[1])
    pixels = torch.zeros(2000, 3, 8, 8, dtype=torch.uint8)
    pixels[..., :4] = 255
    images = data.Images(pixels, torch.zeros(2000, dtype=torch.int64), 8, *HALF, ("flip",))
    x = torch.cat([x for x, _ in images.batches(64, generator=seeded())])
    bright_left = x[:, 0, 0, 0] == 1
    assert 900 < bright_left.sum() < 1100                               # 4.5 standard deviations
    assert torch.equal(x[:, 1, 5, 7] == -1, bright_left)
    assert len({tuple(part.tolist()) for part in bright_left.split(64)[:10]}) == 10    # drawn anew for each batch


def test_crops_are_black_windows_at_the_resized_size_one_per_image():
    pixels = torch.full((1500, 3, 6, 6), 255, dtype=torch.uint8)
    images = data.Images(pixels, torch.zeros(1500, dtype=torch.int64), 12, *HALF, ("crop",))
    x = torch.cat([x for x, _ in images.batches(64, generator=seeded())])
    assert x.shape == (1500, 3, 12, 12) and set(x.unique().tolist()) == {-1.0, 1.0}     # padded, then normalised
    rows, columns = (x[:, 0] == 1).any(2), (x[:, 0] == 1).any(1)        # bool [n, 12]
    offset = lambda line: line.index(True) - line[::-1].index(True)             # black lines before minus after
    seen = {(offset(row), offset(column)) for row, column in zip(rows.tolist(), columns.tolist())}
    assert seen == {(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)}


def test_jitter_draws_three_independent_factors_per_image_and_an_order_per_batch(monkeypatch):
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
    for low, high in zip(factors.amin(1), factors.amax(1)):
        assert 0.799 < low < 0.81 and 1.19 < high < 1.201
    assert (torch.corrcoef(factors) - torch.eye(3)).abs().max() < 0.15
    taped = []
    for name in ("brightness_", "contrast_", "saturation_"):
        monkeypatch.setattr(data, name, lambda x, factor, name=name: taped.append(name) or x)
    list(random_images(80, augment=("jitter",)).batches(1, generator=seeded()))
    assert len({tuple(taped[i:i + 3]) for i in range(0, 240, 3)}) == 6 and len(taped) == 240


def test_without_a_generator_stored_order_unaugmented_normalised_and_limited():
    images = random_images(50, augment=("flip", "crop", "jitter"), stats=((0.5, 0.25, 0.1), (0.5, 0.5, 0.2)))
    before = images.images.clone()
    x = torch.cat([x for x, _ in images.batches(16)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    assert torch.allclose(x, (images.images / 255 - mean) / std, atol=1e-5)
    assert [len(y) for _, y in images.batches(16)] == [16, 16, 16, 2]
    labels = [y for _, y in images.batches(16, limit=20)]
    assert [len(y) for y in labels] == [16, 4] and torch.cat(labels).tolist() == list(range(20))
    assert sum(len(y) for _, y in images.batches(16, limit=80)) == 50
    for x, y in (images.batch(list(range(20)), generator=seeded()), images.batch([0]), next(images.batches(9))):
        x.zero_(), y.zero_()                                            # copies
    assert torch.equal(images.images, before) and images.labels.tolist() == list(range(50))


def make_tree(base, per_class=10):
    """{train,val}/{ant,bee,cat}/*.png of noise, all different."""
    rng = np.random.default_rng(0)
    for place in (base / split / label for split in ("train", "val") for label in ("ant", "bee", "cat")):
        place.mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(rng.integers(0, 256, (20, 12, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return base


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_from_memory(tmp_path, monkeypatch, workers):
    settings = Data(name="folder", dir=str(make_tree(tmp_path)), image_size=16, workers=workers)
    images = data.load(settings).train
    monkeypatch.setattr(sources, "IN_MEMORY", 30 * 3 * 16 * 16 - 1)                 # one byte too small
    stream = data.load(settings).train
    assert type(images) is data.Images and type(stream) is data.Stream
    assert len(stream) == 30 and torch.equal(images.labels, stream.labels) and images.augment == stream.augment
    one, other = seeded(3), seeded(3)
    state = torch.random.get_rng_state()
    for _ in range(2):                                      # two epochs of the same generator: the second goes on
        assert same([*images.batches(7, generator=one)], [*stream.batches(7, generator=other)])
    assert torch.equal(one.get_state(), other.get_state())
    assert same([*images.batches(4, generator=one, limit=9)], [*stream.batches(4, generator=other, limit=9)])
    assert same(images.batch([5, 2], generator=one), stream.batch([5, 2], generator=other))
    for part, streamed in zip(data.hold_out(images), data.hold_out(stream)):
        assert same([*part.batches(2)], [*streamed.batches(2)]) and type(streamed) is data.Stream
    began = stream.batches(4)
    next(began)
    assert same([*stream.batches(4)], [*images.batches(4)])           # while the other pass is under way
    assert same([*began], [*images.batches(4)][1:])
    assert torch.equal(torch.random.get_rng_state(), state)             # a pass leaves the run's random numbers alone


@pytest.mark.parametrize("name", ["folder", "synthetic"])
def test_pretrained_normalisation_takes_the_networks_statistics(tmp_path, name):
    settings = dict(name=name, dir=str(make_tree(tmp_path, 2)), image_size=16, train_images=4, test_images=4)
    plain = data.load(Data(**settings))
    with pytest.raises(InputError, match="published weights"):
        data.load(Data(**settings, normalize="pretrained"))
    stats = ([0.5, 0.25, 0.1], [0.5, 0.5, 0.2])
    own = data.load(Data(**settings, normalize="pretrained"), pretrained_stats=stats)
    for part, other in ((own.train, plain.train), (own.test, plain.test)):
        assert part.mean == tuple(stats[0]) != other.mean and part.std == tuple(stats[1])
        assert torch.equal(part.images, other.images) and part.augment == other.augment
    assert any("0.25" in note for note in own.notes)
    for normalize, mean in (("imagenet", (0.485, 0.456, 0.406)), ("none", (0, 0, 0))):  # of a network of one's own
        assert data.load(Data(**settings, normalize=normalize)).test.mean == mean


class Squares(Dataset):
    """Item i: a 1 x 4 x 4 image of i, NaN where ``spoilt``, label 10 + i; noise is drawn from torch's generator."""

    def __init__(self, n=23, noise=False, spoilt=None):
        self.n, self.noise, self.spoilt = n, noise, spoilt

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image = torch.full((1, 4, 4), float("nan") if i == self.spoilt else float(i))
        return image + (torch.rand(()) / 4 if self.noise else 0), 10 + i


X, Y = default_collate([Squares()[i] for i in range(23)])


@pytest.mark.parametrize("source", [
    (X, Y), [X.double(), Y], Squares(), Loader(Squares(), 5), Loader(Squares(), 5, shuffle=True, drop_last=True),
    Loader(Squares(), num_workers=2), Subset(Squares(40), range(23)), TensorDataset(X, Y)])
def test_a_users_images_have_the_interface(source):
    images = data.as_images(source)
    assert len(images) == 23 and data.as_images(images) is images
    in_order = list(images.batches(5))
    assert [len(y) for _, y in in_order] == [5, 5, 5, 5, 3]
    x, y = (torch.cat(part) for part in zip(*in_order))
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert y.tolist() == list(range(10, 33)) and torch.equal(x[:, 0, 3, 3], y - 10.0) and x.shape == (23, 1, 4, 4)
    drawn = [torch.cat([y for _, y in images.batches(5, generator=seeded(seed))]).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == y.tolist() != drawn[0]
    for x, y in images.batches(5, generator=seeded(1), limit=8):
        assert torch.equal(x[:, 0, 0, 0], y - 10.0)                     # images keep their labels
    x, y = images.batch(torch.tensor([20, 3]))
    assert y.tolist() == [30, 13] and x[:, 0, 1, 1].tolist() == [20.0, 3.0]
    x.zero_(), y.zero_()
    assert images.batch([20])[1].item() == 30 and images.batch([20])[0].max() == 20


def test_uint8_pairs_are_divided_by_255_and_nothing_else():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).repeat(1, 1, 6, 6)
    got, y = next(data.as_images((x, torch.tensor([2, 1, 0]))).batches(3))
    assert got.shape == x.shape and torch.allclose(got[:, 0, 2, 3], torch.tensor([0, 0.2, 1])) and y[0] == 2


def test_a_loaders_collate_and_worker_init_are_kept_and_global_random_numbers_are_not_used():
    doubled = lambda items: default_collate([(2 * x, y) for x, y in items])
    images = data.as_images(Loader(Squares(), 5, collate_fn=doubled))
    assert next(images.batches(3))[0][:, 0, 0, 0].tolist() == [0, 2, 4] and images.batch([4])[0].max() == 8
    touched = multiprocessing.get_context("fork").Value("i", 0)
    init, state = lambda _: setattr(touched, "value", os.getpgrp()), torch.random.get_rng_state()
    images = data.as_images(Loader(Squares(noise=True), num_workers=2, worker_init_fn=init))
    passes = [torch.cat([x for x, _ in images.batches(5, generator=seeded(seed))]) for seed in (1, 1, 2)]
    assert data.mixed(images).workers == 2
    assert touched.value not in (0, os.getpgrp())                       # a signal to this group is not for processes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(passes[0], passes[1])                            # noise in the processes follows the generator
    assert not torch.equal(passes[0].sort(0)[0], passes[2].sort(0)[0])


class Endless(IterableDataset):
    __iter__ = None


class ImagesOfPillow(Squares):
    def __getitem__(self, i):
        return Image.new("RGB", (4, 4)), i


ZEROS, THREE = torch.zeros(3, 1, 4, 4), torch.arange(3)


@pytest.mark.parametrize("source, word", [
    (Endless(), "IterableDataset"), (Loader(Endless()), "IterableDataset"), (Squares(0), "empty"), (5, "not int"),
    (Loader(Squares(), sampler=SubsetRandomSampler([1])), "Subset"), ([1, 2, 3], "not list"),
    (Loader(Squares(), sampler=RandomSampler(Squares(), True)), "every item"), (Squares().__getitem__, "not method"),
    (Loader(Squares(), batch_sampler=[[1, 2]]), "one size"), (Loader(Squares(), batch_size=None), "one size"),
    (TensorDataset(ZEROS), "a batch must be"), (TensorDataset(ZEROS.byte(), THREE), "uint8"),
    (TensorDataset(ZEROS, torch.rand(3)), "float32"), (ImagesOfPillow(), "float tensor"),
    ((ZEROS, torch.arange(4)), "4 labels"), ((ZEROS.view(3, 16), THREE), "N, C, H, W"),
    ((ZEROS[:0], THREE[:0]), "0 labels"), ((ZEROS, torch.rand(3)), "images: labels"), ((ZEROS.int(), THREE), "int32"),
    ((ZEROS[..., :2].byte(), THREE), "square"), (MagicMock(labels=[0, 1]), "integer tensor")])
def test_what_cannot_be_read_in_full_is_refused(source, word):
    with pytest.raises(InputError, match=word):
        data.as_images(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])          # the last is infinite as float32
@pytest.mark.parametrize("kind", ["tensors", "part", "TensorDataset"])
def test_images_in_memory_that_are_not_finite_are_named(kind, value):
    x, y = torch.zeros(200, 1, 4, 4, dtype=torch.float64), torch.arange(200)
    images = {"tensors": (x, y), "TensorDataset": TensorDataset(x, y), "part": data.mixed(data.as_images((x, y)))}[kind]
    x[130, 0, 2, 3] = value
    with pytest.raises(InputError, match="^test images: image 130 holds values that are not finite"):
        data.as_images(images, "test images")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_read_when_used_are_checked_then(workers):
    images = data.as_images(Loader(Squares(spoilt=17), num_workers=workers), "test images")
    for use in (lambda: list(images.batches(5, generator=seeded(1))), lambda: images.batch([3, 17])):
        with pytest.raises(InputError, match="^test images: image 17 holds values that are not finite"):
            use()
    assert len(images.batch([3, 16])[1]) == 2


def test_synthetic_is_deterministic_balanced_and_different_in_its_test_split():
    first, again, other = (data.synthetic(10, 100, 50, 16, seed) for seed in (1, 1, 2))
    for i in range(2):
        assert torch.equal(first[i].images, again[i].images) and torch.equal(first[i].labels, again[i].labels)
        assert not torch.equal(first[i].images, other[i].images)
    assert first[0].labels.bincount().tolist() == [10] * 10 and first[1].labels.bincount().tolist() == [5] * 10
    seen = {bytes(image) for image in first[0].images.flatten(1).numpy()}
    assert not seen & {bytes(image) for image in first[1].images.flatten(1).numpy()} and len(seen) == 100
    # The same random numbers for every class: two classes that mean the same would draw the same image.
    assert len({bytes(data._draw(torch.tensor([k]), 16, seeded()).numpy()) for k in range(1000)}) == 1000
    with pytest.raises(InputError):
        data.synthetic(1001, 10, 10, 16, 0)
    splits = data.load(Data(name="synthetic", dir="/nowhere", image_size=24, classes=7, train_images=30))
    assert splits.train.images.shape == (30, 3, 24, 24) and (len(splits.test), splits.asked) == (1000, (30, 1000))
    assert splits.num_classes == 7 and splits.train.labels.max() == 6
    assert splits.train.augment == ("flip", "crop") and splits.test.augment == ()


@pytest.mark.parametrize("kind", ["images", "tensors", "interface"])
def test_held_out_images_are_a_fixed_twentieth_and_not_trained_on(kind):
    images = data.synthetic(3, 100, 10, 8, 0)[0]
    whole = data.as_images((torch.arange(100.0).view(100, 1, 1, 1), images.labels)) if kind == "tensors" else images
    given = type("Own", (), {"batch": whole.batch, "__len__": lambda self: 100})() if kind == "interface" else whole
    train, chosen = data.hold_out(given)
    assert (len(train), len(chosen)) == (95, 5)
    order = torch.randperm(100, generator=seeded(data.HOLDOUT_SEED))
    for part, index in ((train, order[5:].sort().values), (chosen, order[:5])):
        x, y = part.batch(torch.arange(len(part)))
        wanted, labels = whole.batch(index)
        assert torch.equal(x, wanted) and torch.equal(y, labels)
        assert kind == "interface" or part.labels.equal(labels) and part.mean == whole.mean
        seen = torch.cat([y for _, y in part.batches(16, generator=seeded(1))])
        assert seen.sort().values.equal(labels.sort().values)
    with pytest.raises(InputError, match="5 % of 9 training images are none"):
        data.hold_out(data.synthetic(3, 9, 10, 8, 0)[0])
