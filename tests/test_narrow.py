"""The narrow network against the masked one, with every constant that a pruned channel emits made different from 0."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
import narrow
from compress import prune_mask
from config import InputError
from test_own_network import Attend, Flattening, Shared, fingerprint, same, swin, tied

ROOT = Path(__file__).resolve().parent.parent
LONG = pytest.mark.skipif(not os.environ.get("HIRELC_LONG"), reason="minutes; HIRELC_LONG=1 runs it")


def randomised(model, seed=0):
    """Statistics, shifts, biases and weights such that neither a constant nor the images are lost on the way."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, mean, std):
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                draw(parameter, 0, (2 / parameter[0].numel()) ** 0.5)
            elif name.endswith("bias"):
                draw(parameter, 0.2, 0.3)
            else:
                draw(parameter, 1, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                draw(buffer, 0, 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def pruned(model, example, keep=None, everything=False, seed=0):
    """Zero rows, in place: the kernels that are compressed, or every Conv2d and Linear; ``keep`` None: each its own."""
    generator = torch.Generator().manual_seed(seed)
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
    """Materialise a network and compare the logits at three batch sizes → the narrow network."""
    before, given = fingerprint(model), example.clone()
    network = narrow.materialize(model, example)
    assert same(before, fingerprint(model)) and torch.equal(example, given)
    assert not any(module.training for module in network.modules())
    for n in (1, 3, 16):
        images = torch.randn(n, *example.shape[1:])
        kept = images.clone()
        with torch.no_grad():
            wanted, logits = model(images.clone()), network(images)
        assert torch.equal(images, kept) and logits.shape == wanted.shape
        assert (wanted - logits).abs().max() <= tolerance * max(1, wanted.abs().max())
    assert wanted.std(0).max() > 100 * (wanted - logits).abs().max()  # the images made a difference at all
    return network


class Plain(nn.Module):
    """No BatchNorm and no padding; a 1x1 convolution, a layer that is used twice, weights handed to functions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, 2, padding="valid")
        self.w, self.fc = nn.Parameter(torch.randn(10, 6)), nn.Linear(10, 3)

    def forward(self, x):
        x = F.silu(self.a(x))
        x = F.gelu(self.b(F.leaky_relu(self.b(x))))
        x = F.conv2d(x, self.c.weight, self.c.bias, 2).amax((2, 3))
        return self.fc(torch.tanh(x @ self.w.t()))


class Grouped(nn.Module):
    """A convolution in groups between two others; a depthwise one with two channels per input; a gate; a concatenation
    with padding; an operation that mixes the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1, groups=4)
        self.dw, self.gate = nn.Conv2d(8, 16, 5, 2, padding=2, groups=8), nn.Conv2d(16, 16, 1)
        self.end, self.fc = nn.Conv2d(32, 12, 3, 2, dilation=2, padding=2), nn.Linear(12, 3)

    def forward(self, x):
        x = self.dw(F.hardswish(self.b(F.elu(self.a(x)))))
        gate = self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        x = F.max_pool2d(F.pad(torch.cat([x * gate, x], 1), (1, 0, 2, 1)), 2)
        x = self.end(x)
        return self.fc((x.softmax(1) + x).flatten(1).view(-1, 12, x.shape[2] * x.shape[3]).mean(2))


NETWORKS = {
    "deit": lambda: models.build("deit_small_patch16_224", 5, 16, 0.125, 8),
    "clip": lambda: models.VisionTransformer(5, 16, 8, 2, 8, 2, clip=True, quick_gelu=True),
    "resnet18": lambda: models.build("resnet18", 5, 32, 0.25),
    "resnet50": lambda: models.build("resnet50", 5, 32, 0.125),
    "mobilenetv2": lambda: models.build("mobilenetv2_100", 5, 32, 0.5),
    "attend": Attend, "flattening": Flattening, "plain": Plain, "grouped": Grouped, "swin": swin,
    "shared": Shared, "tied": tied}
SIDES = {"resnet18": 40, "resnet50": 40, "mobilenetv2": 40}


def make(name, seed=0):
    torch.manual_seed(seed)
    side, channels = SIDES.get(name, 16), 1 if name in ("shared", "tied") else 3
    return randomised(NETWORKS[name](), seed), torch.randn(2, channels, side, side)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("keep, everything", [(0.5, False), (None, True)])
def test_same_logits_with_fewer_operations_and_parameters(name, keep, everything):
    model, example = make(name)
    before = narrow.multiply_adds(model, example)
    network = check(pruned(model, example, keep, everything), example)
    assert narrow.multiply_adds(model, example) == before > narrow.multiply_adds(network, example)
    assert size(network) < size(model)
    if name != "grouped":
        assert narrow.stays(network) == {}


@pytest.mark.parametrize("name", ["deit", "mobilenetv2", "grouped", "swin"])
def test_a_network_without_pruned_channels_keeps_all_operations(name):
    model, example = make(name)
    network = check(model, example)
    assert narrow.multiply_adds(network, example) == narrow.multiply_adds(model, example)
    assert size(network) <= size(model) and narrow.stays(network) == {}
