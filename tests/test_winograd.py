"""Tests of Winograd's convolutions against direct ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from support import winograd
from support.winograd import WinogradConv2d, fits, transforms, with_winograd


@pytest.fixture
def direct(monkeypatch):
    """How often a WinogradConv2d was computed as an ordinary convolution."""
    calls, ordinary = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(self) or ordinary(self, x))
    return calls


def made(inputs=5, outputs=7, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, dtype=dtype).requires_grad_(False)
    return conv, WinogradConv2d(conv)


def test_the_transforms_give_the_correlation():
    a, g, b = transforms()
    kernel, data = torch.randn(3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    wanted = torch.stack([data[i:i + 3] @ kernel for i in range(4)])
    torch.testing.assert_close(a @ ((g @ kernel) * (b @ data)), wanted)
    # Bᵀ of Lavin and Gray's F(4, 3), up to the sign and scale of a row that G makes up for.
    assert b[0].tolist() == [4, 0, -5, 0, 1, 0] and b[-1].tolist() == [0, 4, 0, -5, 0, 1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 4), (7, 7), (8, 12), (14, 14), (7, 15), (28, 28)])
def test_every_pixel_is_that_of_a_direct_convolution(direct, size, bias):
    conv, fast = made(bias=bias)
    x = torch.randn(3, 5, *size, dtype=torch.float64)
    wanted = F.conv2d(x, conv.weight, conv.bias, padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(fast(x.contiguous(memory_format=layout)), wanted, rtol=1e-11, atol=1e-11)
    assert not direct


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 3), (5, 5), (4, 1)])
def test_images_that_fill_no_tile_are_convolved_directly(direct, size):
    conv, fast = made()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    assert torch.equal(fast(x), F.conv2d(x, conv.weight, conv.bias, padding=1)) and direct == [fast]


def test_float32_loses_no_more_than_a_few_roundings():
    conv, fast = made(256, 256, dtype=torch.float32)
    x = torch.randn(2, 256, 14, 14).relu()
    wanted = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert (fast(x) - wanted).norm() / wanted.norm() < 5e-6


def test_other_weights_in_its_place_are_used(direct):
    conv, fast = made()
    x, other = torch.randn(2, 5, 8, 8, dtype=torch.float64), torch.randn(7, 5, 3, 3, dtype=torch.float64)
    found = functional_call(fast, {"weight": other}, (x,))
    assert torch.equal(found, F.conv2d(x, other, conv.bias, padding=1)) and direct == [fast]
    fast(x)
    assert len(direct) == 1


@pytest.mark.parametrize("change", [{"kernel_size": 1}, {"kernel_size": 5}, {"stride": 2}, {"padding": 0}, {"dilation": 2},
                                    {"groups": 2}, {"padding_mode": "reflect"}, {"in_channels": 126},
                                    {"out_channels": 126}])
def test_other_convolutions_stay_what_they_are(change):
    settings = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1, **change}
    network = with_winograd(nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(**settings)))
    assert [type(module) for module in network] == [WinogradConv2d, nn.Conv2d]
    assert fits(nn.Conv2d(128, 128, 3, padding=1)) and not fits(network[0]) and not fits(network[1])


def test_the_network_itself_is_left_alone(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 4)
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)))
    fast, x = with_winograd(network), torch.randn(2, 4, 8, 8)
    assert [type(module).__name__ for module in (network[0], network[1][0])] == ["Conv2d"] * 2
    assert [type(module) for module in (fast[0], fast[1][0])] == [WinogradConv2d] * 2
    assert list(fast.state_dict()) == list(network.state_dict())
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
