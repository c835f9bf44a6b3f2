"""data.py: augmentation against hand numbers and torchvision, order and completeness of batches, streams against
images in memory, adapters for one's own data, and the synthetic images."""

import multiprocessing
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional
from PIL import Image

import data
from support import images as sources
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


# Streams from disk


def make_tree(base, per_class=10, sides=(20, 12), seed=0):
    """{train,val}/{ant,bee,cat}/*.png of noise, all different."""
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for label in ("ant", "bee", "cat"):
            for i in range(per_class):
                path = base / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(path)
    return base


def both_ways(base, monkeypatch, workers=2, size=16):
    """The training split of a tree in memory and as a stream."""
    settings = Data(name="folder", dir=str(base), image_size=size, workers=workers)
    images = data.load(settings).train
    monkeypatch.setattr(sources, "IN_MEMORY", 30 * 3 * size * size - 1)             # one byte too small
    stream = data.load(settings).train
    assert type(images) is data.Images and type(stream) is data.Stream
    return images, stream


def same_batches(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_from_memory(tmp_path, monkeypatch, workers):
    images, stream = both_ways(make_tree(tmp_path), monkeypatch, workers)
    assert len(stream) == 30 and torch.equal(images.labels, stream.labels) and images.augment == stream.augment
    one, other = seeded(3), seeded(3)
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    for _ in range(2):                                      # two epochs of the same generator: the second goes on
        assert same_batches(images.batches(7, generator=one), stream.batches(7, generator=other))
    assert torch.equal(one.get_state(), other.get_state())
    assert same_batches(images.batches(7), stream.batches(7))
    assert same_batches(images.batches(4, generator=one, limit=9), stream.batches(4, generator=other, limit=9))
    assert same_batches([images.batch([5, 2], generator=one)], [stream.batch([5, 2], generator=other)])
    assert same_batches(images.subset([7, 3, 9]).batches(2), stream.subset([7, 3, 9]).batches(2))
    assert same_batches(images.subset(slice(2, 9)).batches(2), stream.subset(slice(2, 9)).batches(2))
    assert torch.equal(torch.random.get_rng_state(), state)             # a pass leaves the run's random numbers alone


def test_a_streams_processes_stay_and_passes_do_not_disturb_each_other(tmp_path, monkeypatch):
    images, stream = both_ways(make_tree(tmp_path), monkeypatch)
    before = set(multiprocessing.active_children())
    began = stream.batches(4)
    next(began)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    nested = stream.batches(4)                              # while the other pass is under way
    assert same_batches(nested, images.batches(4))
    assert same_batches(began, list(images.batches(4))[1:])
    for limit in (0, 5):                                    # again, also after a pass that was given up
        broken = stream.batches(3)
        next(broken)
        del broken
        assert same_batches(stream.batches(4, limit=limit), images.batches(4, limit=limit))
    left = set(multiprocessing.active_children()) - before
    assert len(left) == 2
    del stream, began, nested
    deadline = time.monotonic() + 30
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before


def test_a_stream_rejects_what_does_not_fit_together():
    names, labels = np.array([b"a", b"b"]), torch.zeros(2, dtype=torch.int64)
    for change in ({"names": names[:1]}, {"names": names.astype(str)}, {"labels": torch.zeros(2)},
                   {"augment": ("mixup",)}):
        with pytest.raises(ValueError):
            data.Stream(**{**dict(folder="x", names=names, labels=labels, size=8, mean=HALF[0], std=HALF[1]), **change})


# Normalisation by settings


@pytest.mark.parametrize("name", ["folder", "synthetic"])
def test_pretrained_normalisation_takes_the_networks_statistics(tmp_path, name):
    settings = dict(name=name, dir=str(make_tree(tmp_path, 2)), image_size=16, train_images=4, test_images=4)
    plain = data.load(Data(**settings))
    with pytest.raises(ValueError, match="pretrained_stats"):
        data.load(Data(**settings, normalize="pretrained"))
    stats = ([0.5, 0.25, 0.1], [0.5, 0.5, 0.2])
    own = data.load(Data(**settings, normalize="pretrained"), pretrained_stats=stats)
    for part, other in ((own.train, plain.train), (own.test, plain.test)):
        expected = part.images.float() / 255 - torch.tensor(stats[0]).view(3, 1, 1)
        assert torch.allclose(part.batch(list(range(4)))[0], expected / torch.tensor(stats[1]).view(3, 1, 1), atol=1e-5)
        assert not torch.allclose(other.batch(list(range(4)))[0], part.batch(list(range(4)))[0], atol=1e-2)
        assert part.augment == other.augment and part.padding == other.padding
    assert any("0.25" in note for note in own.notes)
    same = data.load(Data(**settings), pretrained_stats=stats)          # given, but not asked for
    assert same.train.mean == plain.train.mean and same.notes == plain.notes


# Adapters


class Squares(torch.utils.data.Dataset):
    """Item i: a 1 x 4 x 4 image of i, label 10 + i; with noise it draws from torch's generator."""

    def __init__(self, n=23, noise=False):
        self.n, self.noise = n, noise

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((1, 4, 4), float(i)) + (torch.rand(()) / 4 if self.noise else 0), 10 + i


def doubled(items):
    x, y = torch.utils.data.default_collate(items)
    return 2 * x, y


def sources_of_squares():
    x, y = torch.utils.data.default_collate([Squares()[i] for i in range(23)])
    loader = torch.utils.data.DataLoader
    return {"tensors": (x, y), "list": [x.double(), y], "dataset": Squares(), "loader": loader(Squares(), 5),
            "shuffled": loader(Squares(), 5, shuffle=True, drop_last=True), "workers": loader(Squares(), num_workers=2),
            "subset": torch.utils.data.Subset(Squares(40), range(23)),
            "tensor dataset": torch.utils.data.TensorDataset(x, y)}


@pytest.mark.parametrize("kind", list(sources_of_squares()))
def test_adapters_give_the_interface_of_images(kind):
    images = data.as_images(sources_of_squares()[kind])
    assert len(images) == 23 and data.as_images(images) is images
    in_order = list(images.batches(5))
    assert [len(y) for _, y in in_order] == [5, 5, 5, 5, 3]
    x, y = (torch.cat(part) for part in zip(*in_order))
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert y.tolist() == list(range(10, 33)) and torch.equal(x[:, 0, 3, 3], y - 10.0) and x.shape == (23, 1, 4, 4)
    assert torch.cat([y for _, y in images.batches(5, limit=7)]).tolist() == list(range(10, 17))
    drawn = [torch.cat([y for _, y in images.batches(5, generator=seeded(seed))]).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == y.tolist() != drawn[0]
    for x, y in images.batches(5, generator=seeded(1), limit=8):
        assert torch.equal(x[:, 0, 0, 0], y - 10.0)                     # images keep their labels
    generator = seeded(4)
    assert list(images.batches(23, generator=generator))[0][1].tolist() != \
        list(images.batches(23, generator=generator))[0][1].tolist()
    x, y = images.batch(torch.tensor([20, 3]))
    assert y.tolist() == [30, 13] and x[:, 0, 1, 1].tolist() == [20.0, 3.0]
    x.zero_(), y.zero_()
    assert images.batch([20])[1].item() == 30 and images.batch([20])[0].max() == 20


def test_uint8_pairs_are_divided_by_255_and_nothing_else():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).repeat(1, 1, 6, 6)
    for x in (pixels, pixels.repeat(1, 3, 1, 1)):
        images = data.as_images((x, torch.tensor([2, 1, 0])))
        assert isinstance(images, data.Images) and images.augment == () and images.size == 6
        got, y = next(images.batches(3))
        assert got.shape == x.shape and torch.allclose(got[:, 0, 2, 3], torch.tensor([0, 0.2, 1])) and y[0] == 2


def test_a_loaders_collate_and_worker_init_are_kept_and_global_random_numbers_are_not_used():
    images = data.as_images(torch.utils.data.DataLoader(Squares(), 5, collate_fn=doubled))
    assert next(images.batches(3))[0][:, 0, 0, 0].tolist() == [0, 2, 4]
    assert images.batch([4])[0].max() == 8
    touched = multiprocessing.get_context("fork").Value("i", 0)
    loader = torch.utils.data.DataLoader(Squares(noise=True), num_workers=2,
                                         worker_init_fn=lambda _: setattr(touched, "value", 1))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    images = data.as_images(loader)
    passes = [torch.cat([x for x, _ in images.batches(5, generator=seeded(seed))]) for seed in (1, 1, 2)]
    assert touched.value == 1 and torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(passes[0], passes[1])                            # noise in the processes follows the generator
    assert not torch.equal(passes[0].sort(0)[0], passes[2].sort(0)[0])


class ImagesOfPillow(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return Image.new("RGB", (4, 4)), i


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("make, word", [
    (lambda: Endless(), "IterableDataset"), (lambda: torch.utils.data.DataLoader(Endless()), "IterableDataset"),
    (lambda: torch.utils.data.DataLoader(Squares(), sampler=torch.utils.data.SubsetRandomSampler([1])), "Subset"),
    (lambda: torch.utils.data.DataLoader(Squares(), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 23, 23)),
     "WeightedRandomSampler"),
    (lambda: torch.utils.data.DataLoader(Squares(), sampler=torch.utils.data.RandomSampler(Squares(), True)),
     "every item once"),
    (lambda: torch.utils.data.DataLoader(Squares(), batch_sampler=[[1, 2]]), "batch sampler"),
    (lambda: torch.utils.data.DataLoader(Squares(), batch_size=None), "batch_size=None"),
    (lambda: Squares(0), "empty"), (lambda: 5, "not int"), (lambda: [1, 2, 3], "not list"),
    (lambda: torch.utils.data.TensorDataset(torch.zeros(3, 1, 4, 4)), "batch of the data set"),
    (lambda: torch.utils.data.TensorDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.arange(3)), "uint8"),
    (lambda: torch.utils.data.TensorDataset(torch.zeros(3, 1, 4, 4), torch.rand(3)), "float32"),
    (lambda: ImagesOfPillow(), "float tensor"),
    (lambda: (torch.zeros(3, 1, 4, 4), torch.arange(4)), "N, C, H, W"),
    (lambda: (torch.zeros(3, 16), torch.arange(3)), "N, C, H, W"),
    (lambda: (torch.zeros(3, 1, 4, 4), torch.rand(3)), "int64"),
    (lambda: (torch.zeros(3, 1, 4, 4, dtype=torch.int32), torch.arange(3)), "int32"),
    (lambda: (torch.zeros(3, 1, 4, 6, dtype=torch.uint8), torch.arange(3)), "square")])
def test_adapters_refuse_what_they_cannot_read_in_full(make, word):
    with pytest.raises(InputError, match=word) as error:
        data.as_images(make())
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


def fit(model, lr, epochs, batches):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def test_synthetic_is_learnt_by_a_small_convnet_but_not_from_colour():
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


@pytest.mark.parametrize("kind", ["images", "tensors"])
def test_held_out_images_are_a_fixed_twentieth_and_not_trained_on(kind):
    images = data.synthetic(3, 100, 10, 8, 0)[0]
    whole = images if kind == "images" else data.as_images((torch.arange(100.0).view(100, 1, 1, 1), images.labels))
    for _ in range(2):
        torch.manual_seed(_)
        train, chosen = data.hold_out(whole)
        assert (len(train), len(chosen)) == (95, 5)
        order = torch.randperm(100, generator=torch.Generator().manual_seed(data.HOLDOUT_SEED))
        for part, index in ((train, order[5:].sort().values), (chosen, order[:5])):
            x, y = part.batch(torch.arange(len(part)))
            wanted, labels = whole.batch(index)
            assert torch.equal(x, wanted) and torch.equal(y, labels) and torch.equal(part.labels, labels) if (
                kind == "images") else torch.equal(x, wanted) and torch.equal(y, labels)
            seen = torch.cat([y for _, y in part.batches(16, generator=torch.Generator().manual_seed(1))])
            assert seen.sort().values.equal(labels.sort().values)
    with pytest.raises(InputError, match="5 % of 9 training images are none"):
        data.hold_out(data.synthetic(3, 9, 10, 8, 0)[0])
