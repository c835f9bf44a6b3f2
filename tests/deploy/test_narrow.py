"""The narrow network against the masked one, with every constant that a pruned channel emits made different from 0."""

import copy
import operator
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from compress import prune_mask
from config import InputError
from deploy import narrow
from networks import Attend, Flattening, Grouped, Made, Plain, Shared, fingerprint, randomised, same, seeded, tied


def pruned(model, example, keep=None, everything=False, seed=0):
    """Zero rows, in place: the kernels that are compressed, or every Conv2d and Linear; ``keep`` None: each its own."""
    generator = seeded(seed)
    holders = [k for block in models.find_blocks(model, example) for k in block.kernels.values()]
    if everything:
        holders += [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear) and m not in holders]
    with torch.no_grad():
        for holder in holders:
            fraction = keep or 0.4 + 0.6 * float(torch.rand((), generator=generator))
            holder.weight[~prune_mask(holder.weight, fraction)] = 0
    return model


def size(model):
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def check(model, example, tolerance=1e-4):
    """Materialise a network and compare the logits at three batch sizes, once channels-last → the narrow network."""
    before, given = fingerprint(model), example.clone()
    network = narrow.materialize(model, example)
    assert same(before, fingerprint(model)) and torch.equal(example, given)
    assert not any(module.training for module in network.modules())
    for n in (1, 3, 7):
        images = torch.randn(n, *example.shape[1:])
        images = images.contiguous(memory_format=torch.channels_last) if n == 3 else images
        kept = images.clone()
        with torch.no_grad():
            wanted, logits = model(images.contiguous()), network(images)
        assert torch.equal(images, kept) and logits.shape == wanted.shape
        assert (wanted - logits).abs().max() <= tolerance * max(1, wanted.abs().max())
    assert wanted.std(0).max() > 100 * (wanted - logits).abs().max()  # the images made a difference at all
    return network


NETWORKS = {
    "deit": lambda: models.VisionTransformer(5, 16, 4, 2, 8, 2),
    "clip": lambda: models.VisionTransformer(5, 16, 8, 2, 8, 1, clip=True, quick_gelu=True),
    "resnet": lambda: models.ResNet(5, False, (1, 1, 1, 1), 0.125),
    "attend": Attend, "flattening": Flattening, "plain": Plain, "grouped": Grouped, "shared": Shared, "tied": tied}


def make(name, seed=0):
    torch.manual_seed(seed)
    side, channels = 40 if name == "resnet" else 16, 1 if name in ("shared", "tied") else 3
    return randomised(NETWORKS[name](), seed), torch.randn(2, channels, side, side)


@pytest.mark.parametrize("name, keep, everything", [
    *((name, 0.5, False) for name in ("deit", "resnet", "flattening", "grouped", "tied")),
    *((name, None, True) for name in ("clip", "attend", "plain", "grouped", "shared")), ("grouped", 1.0, False)])
def test_same_logits_with_fewer_operations_and_parameters(name, keep, everything):
    model, example = make(name)
    before = narrow.multiply_adds(model, example)
    network = check(pruned(model, example, keep, everything), example)
    after = narrow.multiply_adds(network, example)
    assert narrow.multiply_adds(model, example) == before >= after and size(network) <= size(model) - (keep != 1)
    assert (before > after) == (keep != 1)  # without pruned channels all operations are kept
    assert name != "resnet" or after <= 0.5 * before
    assert name != "deit" or before == 16 * 48 * 16 + 2 * (17 * 12 * 16**2 + 2 * 17**2 * 16) + 5 * 16  # by hand
    assert narrow.stays(network) == {} or name == "grouped" and keep != 1


def shapes(network):
    """Shapes of the weights of the layers, in the order of the graph."""
    return [tuple(operator.attrgetter(node.args[1].target)(network).shape) for node in network.graph.nodes
            if str(node.target) in ("aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default")]


def rows(layer, *pruned):
    """Zero some rows of a layer, in place."""
    with torch.no_grad():
        layer.weight[list(pruned)] = 0


def chain(*layers):
    torch.manual_seed(0)
    end = nn.Linear(layers[-1].out_channels, 3)
    return randomised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), end))


IMAGES = torch.randn(2, 3, 9, 9, generator=seeded(1))


@pytest.mark.parametrize("padding, norm", [(0, nn.BatchNorm2d), (1, nn.BatchNorm2d), ("same", nn.Identity)])
def test_both_sides_shrink_and_the_constant_is_a_map_where_zeros_pad_it(padding, norm):
    model = chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 6, 3, padding=padding),
                  norm(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    rows(model[0], 0, 3, 4), rows(model[3], 5)
    network = check(model, IMAGES)
    assert shapes(network) == [(5, 3, 3, 3), (5, 5, 3, 3), (4, 5, 1, 1), (3, 4)]
    stored = [t for name, t in network.named_buffers() if "map" in name]
    assert [tuple(t.shape) for t in stored] == ([] if padding == 0 else [(1, 3, 3, 5)])  # corners, edges and inside


def test_small_constants_that_differ_stay_apart():
    model = Made(lambda m, x: m.c(m.n(m.a(x).flatten(2).transpose(1, 2) + m.p)).mean(1) + m.d(x.mean((2, 3))),
                 a=nn.Conv2d(3, 8, 3, 3), n=nn.LayerNorm(8, eps=1e-30), c=nn.Linear(8, 3), d=nn.Linear(3, 3))
    model.p = nn.Parameter(1e-7 * torch.randn(1, 9, 8, generator=seeded(0)))
    rows(model.a, *range(8)), nn.init.zeros_(model.a.bias)
    check(model, IMAGES)


def test_a_depthwise_pair_keeps_what_both_keep():
    model = chain(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, 2, 1, groups=8),
                  nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    rows(model[0], 0, 1, 2), rows(model[3], 2, 3, 4)
    network = check(model, IMAGES)
    assert shapes(network) == [(3, 3, 1, 1), (3, 1, 3, 3), (4, 3, 1, 1), (3, 4)] and narrow.stays(network) == {}


@pytest.mark.parametrize("gone, shape, stay", [
    ((0, 5, 8, 13), (12, 3, 3, 3), None),  # one of each group of four
    ((4, 5, 6, 7), (12, 3, 3, 3), None),  # a whole group
    ((4, 5, 6, 7, 0), (12, 3, 3, 3), "1 of 5 pruned channels stay: a convolution in groups"),
    ((0, 1, 2), (16, 3, 3, 3), "3 of 3 pruned channels stay: a convolution in groups")])
def test_a_convolution_in_groups_shrinks_evenly_or_says_why_not(gone, shape, stay):
    model = chain(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
                  nn.Conv2d(16, 4, 1))
    rows(model[0], 1, 6, 9, 14), rows(model[2], *gone)
    network = check(model, IMAGES)
    assert shapes(network)[1] == shape and set(narrow.stays(network)) == ({"2"} if stay else set())
    assert not stay or narrow.stays(network)["2"].startswith(stay)
    assert shapes(network)[2][1] == shape[0]


class Layers(Made):
    """A convolution with pruned channels, and a function that takes it to the input of ``fc``."""

    def __init__(self, run, features=8, **modules):
        super().__init__(run, a=nn.Conv2d(3, 8, 3, padding=1), fc=nn.Linear(features, 3), **modules)

    def forward(self, x):
        return self.fc(super().forward(torch.relu(self.a(x))))


MERGED = [  # batch and channels in one dimension: each map alone, MobileViT's unfold, ShuffleNet's shuffle, size -1
    lambda x, n, c, h, w: F.avg_pool2d(x.reshape(n * c, 1, h, w), 3, 1, 1).reshape(n, c, h, w),
    lambda x, n, c, h, w: x.reshape(n * c * h // 3, 3, w // 3, 3).transpose(1, 2).reshape(n, c, h, w),
    lambda x, n, c, h, w: torch.cat([*x.reshape(n * c // 2, 2, h * w).transpose(0, 1).reshape(2, -1, c // 2, h, w)], 1),
    lambda x, n, c, h, w: (x.reshape(-1, h * w) * 2).reshape(-1, c, h, w)]


def routed(m, x):
    t = x.flatten(2).transpose(1, 2).reshape(-1, 8)
    chosen = m.g(t).argmax(-1)
    for k, expert in enumerate((m.d, m.e)):
        t = t.index_put((chosen == k,), expert(t[chosen == k]))
    return t.view(-1, 81, 8).mean(1)


@pytest.mark.parametrize("model", [
    lambda: Layers(lambda m, x: m.b(m.p(x)).mean((2, 3)), p=nn.PReLU(8), b=nn.Conv2d(8, 8, 3)),
    lambda: Layers(lambda m, x: m.b(x.flatten(2)).relu().mean(2), b=nn.Conv1d(8, 8, 3, padding=1)),
    lambda: Layers(lambda m, x: m.b(m.c(x[:, None]).flatten(1, 2)).mean((2, 3)), c=nn.Conv3d(1, 2, 3, padding=1),
                   b=nn.Conv2d(16, 8, 1)),
    lambda: Layers(lambda m, x: m.n(m.b(x.flatten(2).transpose(1, 2) + m.p.weight)).relu().mean(1), features=12,
                   p=nn.Embedding(81, 8), b=nn.Linear(8, 12), n=nn.BatchNorm1d(81)),
    lambda: Layers(lambda m, x: m.b(torch.cat([x, x], 1)).mean((2, 3)), b=nn.Conv2d(16, 8, 3)),
    lambda: Layers(lambda m, x: torch.addmm(m.p.weight[0], x.mean((2, 3)), m.b.weight), p=nn.Embedding(2, 1),
                   b=nn.Linear(8, 8)),
    lambda: Layers(lambda m, x: torch.cat([part.relu() for part in m.b(x).chunk(2, 1)], 1).mean((2, 3)),
                   b=nn.Conv2d(8, 8, 3)),
    lambda: Layers(lambda m, x: F.conv2d(x.flatten(0, 1)[None], (m.g(x.mean((2, 3))) @ m.k.weight).view(-1, 8, 1, 1),
                                         groups=x.shape[0]).unflatten(1, (-1, 8))[0].mean((2, 3)),
                   g=nn.Linear(8, 4), k=nn.Embedding(4, 64)),  # a kernel per image
    lambda: Layers(routed, g=nn.Linear(8, 2), d=nn.Linear(8, 8), e=nn.Linear(8, 8)),  # every token to one expert
    *(lambda how=how: Layers(lambda m, x: m.b(how(x, *x.shape)).mean((2, 3)), b=nn.Conv2d(8, 8, 3)) for how in MERGED)])
def test_what_is_not_followed_has_its_channels_in_place(model):
    torch.manual_seed(0)
    model = randomised(model())
    rows(model.a, 0, 2, 4, 6)
    check(model, IMAGES)


@pytest.mark.parametrize("model, stays", [
    (lambda: Layers(lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze()), {}),  # of one channel
    (lambda: Layers(lambda m, x: m.c(m.b(x).relu()).mean((2, 3)), b=nn.Conv2d(8, 8, 3), c=nn.Conv2d(8, 8, 3)),
     {"b": "1 of 8 pruned channels stay: none of its channels is both kept and read, one is left"})])
def test_one_channel_is_left_where_all_are_gone(model, stays):
    model = randomised(model())
    rows(getattr(model, "b", model.a), *range(0 if stays else 1, 8))
    network = narrow.materialize(model, IMAGES)
    with torch.no_grad():
        assert (network(IMAGES) - model(IMAGES)).abs().max() < 1e-5
    assert narrow.stays(network) == stays


def test_a_kernel_in_an_operation_that_is_not_followed_is_named():
    model = randomised(Layers(lambda m, x: torch.einsum("ni,oi->no", m.up(x).mean((2, 3)), m.w.weight), 4,
                              up=nn.ConvTranspose2d(8, 4, 2), w=nn.Embedding(4, 4)))
    rows(model.a, 0, 1), rows(model.up, 2)
    network = check(model, IMAGES)
    assert shapes(network)[0] == (6, 3, 3, 3) and set(narrow.stays(network)) == {"up"}
    assert "conv_transpose2d" in narrow.stays(network)["up"]


def test_a_sum_needs_its_channels_in_place():
    def run(m, x):
        return m.c(x + m.norm(m.b(x))).mean((2, 3))
    model = randomised(Layers(run, b=nn.Conv2d(8, 8, 3, padding=1), c=nn.Conv2d(8, 8, 3, padding=1),
                              norm=nn.BatchNorm2d(8)))
    rows(model.a, 0, 1, 2), rows(model.b, 1, 2, 3, 4, 5), rows(model.c, 0)
    assert shapes(check(model, IMAGES)) == [(5, 3, 3, 3), (3, 5, 3, 3), (7, 6, 3, 3), (3, 7)]


def test_the_type_and_the_names_stay_and_a_second_time_gives_the_same():
    model, example = make("clip")
    pruned(model, example, 0.5).double()
    one, two = (narrow.materialize(model, example) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert dict(one.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in one.parameters())
    with torch.no_grad():
        assert (one(example.double()) - model(example.double())).abs().max() < 1e-9
    assert narrow.stays(copy.deepcopy(one)) == {}


class Bytes(Layers):
    def forward(self, *xs):
        return super().forward(xs[0].to(self.a.weight.dtype) / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the first layer
def test_a_network_takes_images_of_its_own_type(tmp_path, dtype):
    model, x = randomised(Bytes(lambda m, x: x.float().mean((2, 3)))), torch.arange(486).byte().view(2, 3, 9, 9)
    model.a.to(dtype)
    rows(model.a, 0, 3)
    network = narrow.materialize(model, x)
    narrow.export(network, x, tmp_path / "narrow.pt2")
    assert shapes(network) == [(6, 3, 3, 3), (3, 6)]
    assert (torch.export.load(tmp_path / "narrow.pt2").module()(x) - model(x)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def padded():
    """A chain whose constants differ at the borders, and the narrow one."""
    model = chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 6, 3, padding=1))
    rows(model[0], 0, 3, 4), rows(model[3], 5)
    return model, narrow.materialize(model, IMAGES)


class Fixed(nn.Module):
    """Reads the number of images into a Python number, branches on values, has a part in another precision, or vmap."""

    def __init__(self, what):
        super().__init__()
        self.what, self.fc = what, nn.Linear(3, 2)

    def forward(self, x):
        if self.what == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(x.mean((2, 3)))
        x = (torch.vmap(self.fc) if self.what == "vmap" else self.fc)(x.mean((2, 3)))
        return x if self.what == "vmap" else x + torch.ones(2, 2) if self.what == "batch" else x if x.sum() > 0 else -x


@pytest.mark.parametrize("model, example, message", [
    (lambda: Fixed("batch"), IMAGES, "Fixed cannot be exported for batches of any size"),
    (lambda: Fixed("branch"), IMAGES, "Fixed cannot be exported: "),
    (lambda: Fixed("autocast"), IMAGES, "cannot be made narrower"), (lambda: Fixed("vmap"), IMAGES, "torch.vmap"),
    (Attend, None, "expected a batch of images"),
    (Attend, torch.zeros(0, 3, 16, 16), "expected a batch of images"),
    (Attend, torch.zeros(2, 5, 16, 16), "Attend fails on a batch of images"),
    (nn.Flatten, IMAGES, "Flatten has no parameters")])
def test_what_cannot_be_made_narrower_is_said_in_one_line(model, example, message):
    with pytest.raises(InputError, match=message) as error:
        narrow.materialize(model(), example)
    assert "\n" not in str(error.value)


def test_the_exported_file_needs_nothing_of_this_project(tmp_path, padded):
    (model, network), path, images = padded, tmp_path / "narrow.pt2", torch.randn(5, 3, 9, 9)
    narrow.export(network, IMAGES, path)
    assert os.listdir(tmp_path) == ["narrow.pt2"]
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "logits.pt")
    code = ("import sys, torch; sys.path = [p for p in sys.path if p]\n"
            "images, wanted = torch.load('logits.pt')\n"
            "network = torch.export.load('narrow.pt2').module()\n"
            "for n in (1, 5): assert (network(images[:n]) - wanted[:n]).abs().max() < 1e-4\n"
            "assert not {'deploy', 'models', 'config'} & set(sys.modules)")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_an_export_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch, padded):
    (_, network), path = padded, tmp_path / "narrow.pt2"
    path.write_text("before")

    def broken(program, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch.export, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        narrow.export(network, IMAGES, path)
    assert os.listdir(tmp_path) == ["narrow.pt2"] and path.read_text() == "before"
    with pytest.raises(InputError, match="cannot be exported"):
        narrow.export(network, torch.zeros(2, 4, 9, 9), path)
