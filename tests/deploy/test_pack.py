"""Packed files: every quantiser bit for bit, whole networks with their logits, sizes, and damaged and crafted files."""

import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
from deploy import pack
from support.kernels import Block
from compress import (GRANULARITIES, QTYPES, BlockConfig, KernelConfig, NetworkConfig, compress_network, kernel_bytes,
                      kernel_shapes, model_bytes, snap_to_grid)
from config import InputError
from test_fuzz import rezipped
from test_own_network import SOURCE, Attend, Shared, tied

ROOT = Path(__file__).resolve().parents[2]
EVERY = list(itertools.product(QTYPES, (*GRANULARITIES, "log-script")))
OWN = {"name": "", "source": "make", "num_classes": 3, "image_size": 16}


def raw(tensor):
    """The bytes of a tensor: tells -0 from +0."""
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one, two):
    """Whether two state dicts are equal bit for bit, types and shapes included."""
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype and one[k].shape == two[k].shape and raw(one[k]) == raw(two[k]) for k in one)


def compressed(model, kernels, example=None):
    """``model`` put on its grids in place, its kernels configured by turns → arguments for pack.pack after it."""
    blocks, turn = models.find_blocks(model, example), itertools.cycle(kernels)
    config = NetworkConfig(tuple(BlockConfig(tuple(next(turn) for _ in b.kernels), kernel_shapes(b)) for b in blocks))
    masks = compress_network(blocks, config)
    return blocks, config, masks, snap_to_grid(blocks, config, masks)


MIXED = [KernelConfig(bits, keep, qtype, granularity) for (qtype, granularity), bits, keep in zip(
    EVERY, (2, 3, 4, 5, 6, 7, 8, 12, 32, 4), (1.0, 0.73, 0.5, 0.3, 0.9, 1.0, 0.01, 0.66, 0.5, 0.8))]


@functools.cache
def small():
    """A convolutional network and its packed file of a few KB; not to be changed."""
    torch.manual_seed(1)
    model = Shared()
    arguments = compressed(model, [KernelConfig(3, 0.6), KernelConfig(5, 0.8, "FLOAT", "per-channel"),
                                   KernelConfig(4, 0.5, "INT", "log")], torch.ones(2, 1, 8, 8))
    return model, pack.pack(model, *arguments, OWN)


# ---------------------------------------------------------------------------------------------------------------
# Bits and bytes


def test_three_bits_take_three_bits_in_a_known_order():
    # 1, 2, 3 … from the lowest bit: 001 010 011 100 101 110 111 000 → 0b11010001 0b01011000 0b00011111
    assert pack.pack_bits(np.array([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]
    assert pack.pack_bits(np.array([5]), 3).tolist() == [5]


@pytest.mark.parametrize("bits", range(1, 18))
def test_codes_of_every_width(bits):
    """Against one large integer."""
    for count in (0, 1, 2, 7, 8, 9, 31, 100):
        codes = np.random.default_rng(count).integers(0, 2 ** bits, count)
        codes[:2] = (2 ** bits - 1, 0)[:count]
        data = pack.pack_bits(codes, bits)
        number = sum(int(code) << i * bits for i, code in enumerate(codes))
        assert data.tobytes() == number.to_bytes(math.ceil(count * bits / 8), "little")
        assert pack.unpack_bits(data, bits, count).tolist() == codes.tolist()


def test_a_kernel_byte_by_byte():
    """Worked out by hand: INT at 3 bits (-4 … 3) of scale 1, FLOAT at 3 bits (0 … 7, zero-point 3) of scale 0.5."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -2.0], [0.1, 0.1], [1.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([[-1.5, 2.0, 0.5]]))
    data = pack.pack(model, *compressed(model, [KernelConfig(3, 0.67), KernelConfig(3, 1.0, "FLOAT")]), OWN)
    expected = bytes([0b101]) + struct.pack("<f", 1.0) + (7 | 2 << 3 | 5 << 6 | 4 << 9).to_bytes(2, "little")
    expected += struct.pack("<f", 0.5) + bytes([3]) + (0 | 7 << 3 | 4 << 6).to_bytes(2, "little")
    parts = torch.load(io.BytesIO(data), weights_only=True)
    assert bytes(parts["blob"].numpy()) == expected + raw(model[2].weight)
    index = json.loads(zlib.decompress(bytes(parts["index"].numpy())))
    assert index["network"] == OWN and bytes(parts["header"].numpy()).startswith(b"HiReLC packed\n\1\0\0\0")


# ---------------------------------------------------------------------------------------------------------------
# Every quantiser


def weights():
    """Name → weight: shapes and values made to catch a packer out."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    cases = {"linear": randn(13, 7), "conv": randn(9, 3, 3, 3), "depthwise": randn(11, 1, 3, 3), "row": randn(1, 5),
             "one": randn(1, 1), "eight": randn(8, 3), "sixteen": randn(16, 2), "zeros": torch.zeros(5, 3),
             "constant": torch.full((3, 5), 0.37), "negative": -randn(7, 3).abs() - 0.1, "tiny": 1e-42 * randn(4, 5),
             "denormal": 1e-39 * randn(6, 3), "dead": randn(5, 4) * torch.tensor([1, 1e-9, 1, 1e-30, 0])[:, None],
             "decades": randn(6, 9) * 10 ** randn(6, 9), "large": 1e30 * randn(3, 4)}
    cases["channels last"] = randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    cases["transposed"] = randn(5, 9).t()
    return cases


KEEP = (1.0, 0.73, 0.5, 1e-6)


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))


@pytest.mark.parametrize("qtype, granularity", EVERY)
def test_packed_and_unpacked_is_equal_bit_for_bit(qtype, granularity):
    """Every bitwidth by every keep-ratio, and the bytes are those of the accounting."""
    model, kernels = nn.ModuleDict(), []
    turn, turn_bits = itertools.cycle(KEEP), itertools.cycle((3, 8, 32, 5, 12))
    for name, weight in weights().items():
        for bits in (*range(2, 9), 12, 16, 32):
            for keep in KEEP if name in ("linear", "depthwise") else (next(turn),):
                model[f"{name} {len(model)}"] = Holder(weight)
                kernels.append(KernelConfig(bits, keep, qtype, granularity))
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            if name != "large" or dtype != torch.float16:
                model[f"{name} {len(model)}"] = Holder(weight.to(dtype))
                kernels.append(KernelConfig(next(turn_bits), next(turn), qtype, granularity))
    blocks = [Block("all", dict(model.items()), ())]
    config = NetworkConfig((BlockConfig(tuple(kernels), kernel_shapes(blocks[0])),))
    masks = compress_network(blocks, config)
    grids = snap_to_grid(blocks, config, masks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack.read(pack.pack(model, blocks, config, masks, grids, OWN))
    assert same(model.state_dict(), before) and same(pack.state(packed), before)
    for kernel, asked, shape in zip(packed.kernels, kernels, kernel_shapes(blocks[0]), strict=True):
        weight = before[f"{kernel.name}.weight"]
        extra = (weight.itemsize - 4) * kernel.kept * weight[0].numel() if asked.bits == 32 else 0
        assert kernel.bytes == kernel_bytes(asked, shape) + extra, kernel.name
        assert kernel.kept == int(masks[kernel.name].sum()) and kernel.dtype == weight.dtype
        assert (kernel.config.bits, kernel.config.qtype, kernel.config.granularity) == (asked.bits, qtype, granularity)
    assert len(packed.blob) == packed.kernel_bytes and packed.rest == ()
    assert packed.config.cr == pytest.approx(config.cr)


def test_more_than_32_bits_are_raw_rows():
    model = Shared()
    data = pack.pack(model, *compressed(model, [KernelConfig(40, 0.5)], torch.ones(2, 1, 8, 8)), OWN)
    assert {k.config.bits for k in pack.read(data).kernels} == {32}
    assert same(pack.load(data, Shared()).state_dict(), model.state_dict())


# ---------------------------------------------------------------------------------------------------------------
# Whole networks

NETWORKS = {"vit": ("deit_small_patch16_224", dict(image_size=16, width=0.07, patch_size=8)),
            "clip": ("vit_base_patch32_clip_224", dict(image_size=16, width=0.07, patch_size=8)),
            "resnet": ("resnet18", dict(image_size=32, width=0.2)),
            "mobilenet": ("mobilenetv2_100", dict(image_size=32, width=0.25))}


def ours(name, quick_gelu=False):
    """A network of this project whose BatchNorm buffers moved, and what rebuilds it."""
    known, settings = NETWORKS[name]
    model = models.build(known, 7, **settings)
    if quick_gelu:
        models.set_quick_gelu(model, True)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, settings["image_size"], settings["image_size"]))
    network = {"name": known, "num_classes": 7, "width": 1.0, "patch_size": 0, "quick_gelu": quick_gelu, **settings,
               "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "data": "cifar10", "mine": {"a": [1, None, "é\n"]}}
    return model, network


@pytest.mark.parametrize("name, quick_gelu, channels_last", [
    ("vit", False, False), ("vit", True, True), ("clip", True, False), ("resnet", False, False),
    ("resnet", False, True), ("mobilenet", False, True)])
def test_our_networks_come_back_with_equal_logits(tmp_path, name, quick_gelu, channels_last):
    model, network = ours(name, quick_gelu)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    blocks, config, masks, grids = compressed(model, MIXED)
    data = pack.pack(model, blocks, config, masks, grids, network)
    assert data == pack.pack(model, blocks, config, masks, grids, network)
    pack.write(tmp_path / "packed.pt", data)
    generator = torch.get_rng_state()
    loaded = pack.load(tmp_path / "packed.pt")
    assert torch.equal(generator, torch.get_rng_state()) and not loaded.training and model.training
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in loaded.parameters())
    assert same(loaded.state_dict(), model.state_dict())
    for one, two in zip(loaded.parameters(), model.parameters(), strict=True):
        assert one.stride() == two.stride()  # the last bits of logits depend on it
    x = torch.randn(3, 3, network["image_size"], network["image_size"])
    with torch.no_grad():
        expected = model.eval()(x)
        assert raw(loaded(x)) == raw(expected) and expected.std() > 0
        other = pack.load(data, models.build(*(network[k] for k in ("name", "num_classes", "image_size", "width",
                                                                    "patch_size"))))
        assert quick_gelu or raw(other(x)) == raw(expected)
    if name in ("resnet", "mobilenet"):
        assert loaded.bn1.num_batches_tracked == 1 and loaded.bn1.running_mean.abs().sum() > 0
    packed = pack.read(data)
    assert packed.network == network and [b.name for b in packed.blocks] == [b.name for b in blocks]
    assert [k.name for k in packed.kernels] == [n for b in blocks for n in b.kernels]

    kernels = sum(kernel_bytes(k, s) for b in config.blocks for k, s in zip(b.kernels, b.shapes))
    others = model_bytes(model) - sum(4 * s.params for b in config.blocks for s in b.shapes)
    assert packed.kernel_bytes == kernels and packed.rest_bytes == others
    assert kernels + others < len(data) <= 1.01 * kernels + 4096 + others
    assert packed.file_bytes == len(data) and packed.ratio == model_bytes(model) / len(data)


def attend():
    return Attend().eval()


class Odd(nn.Module):
    """Buffers of many types and shapes, one of them under two names, and a weight that two parameters share."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.again = nn.Conv2d(3, 6, 3, 2), nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)
        self.again.weight = self.fc.weight
        for number, dtype in enumerate(pack.DTYPES.values()):
            self.register_buffer(f"b{number}", torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype).t())
        self.register_buffer("scalar", torch.tensor(-0.0, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 5))
        self.register_buffer("odd", torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]))
        self.register_buffer("conj", torch.tensor([1 + 2j]).conj())
        self.register_buffer("other", self.scalar)
        self.register_buffer("gone", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("make, channels, dtype", [
    (Shared, 1, torch.float32), (tied, 1, torch.float32), (attend, 3, torch.float32), (attend, 3, torch.bfloat16),
    (attend, 3, torch.float64), (Shared, 1, torch.float16), (Odd, 3, torch.float32)])
def test_a_network_of_ones_own(make, channels, dtype):
    model, x = make().to(dtype) if dtype != torch.float32 else make(), torch.randn(2, channels, 16, 16).to(dtype)
    if make is Shared:
        model(x)  # moves BatchNorm's buffers
    data = pack.pack(model, *compressed(model, MIXED, x), OWN)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack.read(data)
    names = {k.name: set(k.tensors) for k in packed.kernels}
    if make is attend:
        assert names["encoder.layers.0.self_attn.in_proj_weight"] == {"encoder.layers.0.self_attn.in_proj_weight"}
    elif make is not Odd:  # stored once, with all its names
        assert names["once"] == {"once.weight", "again.weight", *(["fc.1.weight"] if make is tied else [])}
    mine = make().to(dtype) if dtype != torch.float32 else make()
    with torch.no_grad():
        for tensor in (*mine.parameters(), *mine.buffers()):
            tensor.zero_()
    places = {name: tensor.data_ptr() for name, tensor in mine.state_dict().items()}
    loaded = pack.load(data, mine.train())
    assert loaded is mine and not any(module.training for module in mine.modules())
    assert places == {name: tensor.data_ptr() for name, tensor in mine.state_dict().items()}  # filled in place
    assert same(mine.state_dict(), before) and same(model.state_dict(), before)
    with torch.no_grad():
        expected = model.eval()(x)
        assert raw(loaded(x)) == raw(expected) and expected.std() > 0
    with pytest.raises(InputError, match=r"make.*pack\.load\(FILE, model=mine\)"):
        pack.load(data)
    if make is Odd:
        assert {"fc.weight", "again.weight"} in [set(t.names) for t in packed.rest]
        assert {"scalar", "other"} in [set(t.names) for t in packed.rest] and "gone" not in pack.state(packed)


def test_a_network_of_ones_own_that_ran_with_channels_last():
    model = Shared().to(memory_format=torch.channels_last)
    data = pack.pack(model, *compressed(model, MIXED, torch.ones(2, 1, 8, 8)), OWN)
    mine = pack.load(data, Shared())
    assert [p.stride() for p in mine.parameters()] == [p.stride() for p in model.parameters()]
    assert same(mine.state_dict(), model.state_dict())


def test_the_rest_in_half_precision():
    model, network = ours("resnet")
    with torch.no_grad():
        model.fc.bias[0], model.bn1.running_var[1], model.bn1.running_mean[0] = 70_000.0, math.inf, 1e-9
    model.layer1[0].bn1.double()
    arguments, notes = compressed(model, MIXED), []
    whole, data = pack.pack(model, *arguments, network), pack.pack(model, *arguments, network, "float16", notes)
    assert len(notes) == 1 and notes[0].startswith("fc.bias stays float32") and "\n" not in notes[0]
    kernels = {name for block in arguments[0] for name in block.state_names}
    expected = {name: tensor if name in kernels or name == "fc.bias" or not tensor.is_floating_point()
                else tensor.half().to(tensor.dtype) for name, tensor in model.state_dict().items()}
    found = pack.state(pack.read(data))
    assert same({name: found[name] for name in expected}, expected) and found.keys() == expected.keys()
    assert not same(expected, model.state_dict())
    assert pack.read(data).rest_bytes < 0.6 * pack.read(whole).rest_bytes
    assert pack.read(data).unpacked_bytes == pack.read(whole).unpacked_bytes
    mine = pack.load(data, copy.deepcopy(model))
    assert same(mine.state_dict(), expected)
    pack.pack(model, *arguments, network, "float16")  # nobody to be told
    with pytest.raises(InputError, match="pack.rest='half': expected float32 or float16"):
        pack.pack(model, *arguments, network, "half")


# ---------------------------------------------------------------------------------------------------------------
# What cannot be packed, or does not fit


@pytest.mark.parametrize("spoil, message", [
    (lambda m, *_: m.once.weight[m.once.weight != 0].add_(0), None),
    (lambda m, *_: m.once.weight.mul_(1.001), "kernel once: its weights are not on their grid"),
    (lambda m, b, c, masks, g: m.stem.weight.__setitem__(~masks["stem"], -0.0), "kernel stem: .*pruned rows are not"),
    (lambda m, b, c, masks, g: m.dw.weight.__setitem__((~masks["dw"]).nonzero()[0, 0], 1.0), "kernel dw: "),
    (lambda m, b, c, masks, g: m.stem.weight.__setitem__(masks["stem"], math.nan), "kernel stem: .*not finite"),
    (lambda m, b, c, masks, g: masks["dw"].fill_(True), "kernel dw: its mask keeps 8 channels"),
    (lambda m, b, c, masks, g: masks.update(dw=masks["dw"].int()), "kernel dw: expected .* bool mask"),
    (lambda m, b, c, masks, g: masks.pop("dw"), "must be those of the blocks' kernels"),
    (lambda m, b, c, masks, g: g.pop("dw"), "must be those of the blocks' kernels"),
    (lambda m, b, c, masks, g: b[0].kernels.pop("dw"), "must be those of the blocks' kernels"),
    (lambda m, b, c, masks, g: g.update(dw=None), "kernel dw: its grid is not of its configuration"),
    (lambda m, b, c, masks, g: g.update(dw=g["once"]), "kernel dw: its grid is not of its configuration"),
    (lambda m, *_: m.register_parameter("w", nn.Parameter(torch.ones(2).to_sparse())), "w of its state dict"),
    (lambda m, *_: m.fc.register_forward_hook(lambda *_: None), None),
])
@torch.no_grad()
def test_what_the_file_would_not_give_back_is_refused(spoil, message):
    model = Shared()
    arguments = compressed(model, [KernelConfig(3, 0.6), KernelConfig(5, 0.8, "FLOAT", "per-channel"),
                                   KernelConfig(4, 0.5, "INT", "log")], torch.ones(2, 1, 8, 8))
    spoil(model, *arguments)
    if message is None:
        assert pack.pack(model, *arguments, OWN)
        return
    with pytest.raises(ValueError, match=message) as caught:
        pack.pack(model, *arguments, OWN)
    assert "\n" not in str(caught.value)


class Extra(Shared):
    def get_extra_state(self):
        return {"a": 1}


def test_a_state_dict_with_more_than_tensors_and_odd_widths_are_refused():
    model = Extra()
    arguments = compressed(model, [KernelConfig(4)], torch.ones(2, 1, 8, 8))
    with pytest.raises(InputError, match="Extra cannot be packed: _extra_state of its state dict is no"):
        pack.pack(model, *arguments, OWN)
    model = Shared()
    arguments = compressed(model, [KernelConfig(20)], torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="kernel stem: codes of 20 bits"):
        pack.pack(model, *arguments, OWN)
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack.pack(model, *compressed(model, [KernelConfig(4)], torch.ones(2, 1, 8, 8)), {"mean": math.nan})


def test_the_strongest_setting_is_within_the_bound_on_expansion_and_more_is_not(monkeypatch):
    monkeypatch.setattr(pack, "FREE_WEIGHTS", 0)
    linear = nn.Sequential(nn.Linear(400, 3 * 199, bias=False), nn.Linear(3 * 199, 199, bias=False),
                           nn.Linear(199, 3, bias=False))
    model = copy.deepcopy(linear)
    data = pack.pack(model, *compressed(model, [KernelConfig(2, 1 / 199)]), OWN)
    assert same(pack.load(data, linear).state_dict(), model.state_dict())
    monkeypatch.setattr(pack, "EXPANSION", 4)
    linear = nn.Sequential(nn.Linear(100, 40_000, bias=False), nn.Linear(40_000, 1, bias=False))
    with pytest.raises(ValueError, match="kernels of 4000000 weights out of .* more than 4 to the byte"):
        pack.pack(linear, *compressed(linear, [KernelConfig(2, 1e-6)]), OWN)


def test_everything_that_does_not_fit_is_listed_and_nothing_is_filled():
    model, data = small()

    def edit(network):
        network.stem.bias = None
        network.extra = nn.Linear(2, 2, bias=False)
        network.once.bias = nn.Parameter(torch.zeros(9))
        network.dw.half()
        return network

    mine = edit(Shared())
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(InputError) as caught:
        pack.load(data, mine)
    message = str(caught.value)
    for part in ("missing: extra.weight", "unexpected: stem.bias", "shape: once.bias [8] (file) vs [9] (network)",
                 "shape: again.bias", "type: dw.weight torch.float32 (file) vs torch.float16 (network)",
                 "type: dw.bias"):
        assert part in message
    assert message.count("; ") == 6 and "\n" not in message
    assert same(mine.state_dict(), before) and mine.training
    with pytest.raises(InputError, match="missing: _extra_state"):
        pack.load(data, Extra())


def test_another_network_name_than_the_tensors_are_of():
    model, network = ours("resnet")
    arguments = compressed(model, MIXED)
    for change, message in [({"width": 0.25}, "does not fit the network; shape: conv1.weight"),
                            ({"name": "resnet50"}, "does not fit the network; .*missing: layer1.0.conv3.weight"),
                            ({"name": "vgg"}, "unknown network 'vgg'"), ({"num_classes": 10 ** 12}, "shape: fc.weight"),
                            ({"num_classes": 10 ** 30}, "cannot be built"), ({"width": 1e300}, "cannot be built"),
                            ({"width": "1"}, "cannot be built"), ({"num_classes": None}, "cannot be built"),
                            ({"quick_gelu": True}, "cannot be built"), ({"name": ["resnet18"]}, "cannot be built"),
                            ({"patch_size": 4}, "cannot be built")]:
        with pytest.raises(InputError, match=message) as caught:
            pack.load(pack.pack(model, *arguments, {**network, **change}))
        assert "\n" not in str(caught.value) and str(caught.value).startswith("packed bytes")
    del network["width"]
    with pytest.raises(InputError, match="cannot be built: KeyError: 'width'"):
        pack.load(pack.pack(model, *arguments, network))


# ---------------------------------------------------------------------------------------------------------------
# Damaged and crafted files


def parts(data):
    """header, index as JSON, blob of a packed file."""
    found = torch.load(io.BytesIO(data), weights_only=True)
    return (bytes(found["header"].numpy()), json.loads(zlib.decompress(bytes(found["index"].numpy()))),
            bytearray(found["blob"].numpy()))


def assembled(index, blob, version=1, magic=b"HiReLC packed\n", more=None):
    """A packed file with a digest that fits; ``index`` as JSON or as compressed bytes."""
    index = index if isinstance(index, bytes) else zlib.compress(json.dumps(index).encode())

    def tensor(content):
        return torch.from_numpy(np.frombuffer(bytes(content), np.uint8).copy())

    version = version if isinstance(version, bytes) else version.to_bytes(4, "little")
    digest = hashlib.sha256(version[:4] + len(index).to_bytes(8, "little") + index + bytes(blob))
    header = magic + version + digest.digest()
    file = io.BytesIO()
    torch.save({"header": tensor(header), "index": tensor(index), "blob": tensor(blob), **(more or {})}, file)
    return file.getvalue()


def refused(tmp_path, capsys, data, *words):
    """Through the command line: exit code 2, one line that names the file and says what."""
    path = tmp_path / "packed.pt"
    path.write_bytes(data)
    for arguments in (["info", str(path)], ["export", str(path), str(tmp_path / "out.pt2")]):
        assert pack.main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith(f"pack: {path}: ") and error.count("\n") == 1
        assert all(word in error for word in words), error
    assert os.listdir(tmp_path) == ["packed.pt"]


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("spoil, words", [
    (lambda data: b"", ["empty"]),
    (lambda data: data[:len(data) // 2], ["damaged"]),
    (lambda data: data[:-1], ["damaged"]),
    (lambda data: b"no packed file", ["damaged"]),
    (lambda data: saved({"model": {"a": torch.ones(2)}, "epoch": 3}), ["holds other tensors (a…)"]),
    (lambda data: saved({"header": 1, "index": torch.ones(2), "blob": torch.ones(2)}), ["not a packed file"]),
    (lambda data: saved({"header": nn.Linear(1, 1)}), ["holds Python objects besides tensors"]),
    (lambda data: saved(dict.fromkeys(("header", "index", "blob"), torch.ones(2))), ["not a packed file"]),
    (lambda data: saved(dict.fromkeys(("header", "index", "blob"), torch.ones(2, 2).byte())), ["not a packed file"]),
    (lambda data: saved(dict.fromkeys(("header", "index", "blob"), torch.ones(0).byte())), ["its magic is b''"]),
    (lambda data: assembled(*parts(data)[1:], more={"more": torch.ones(1)}), ["not a packed file"]),
    (lambda data: assembled(*parts(data)[1:], magic=b"HiReLC quacked"), ["its magic is b'HiReLC quacked'"]),
    (lambda data: assembled(*parts(data)[1:], version=2), ["version 2, expected 1", "read it with"]),
    (lambda data: assembled(*parts(data)[1:], version=0), ["version 0"]),
    (lambda data: assembled(*parts(data)[1:], version=b"\1\0\0\0\0"), ["a header of 51 bytes"]),
    (lambda data: data.replace(b"HiReLC packed\n", b"HiReLC PACKED\n"), ["CRC"]),
])
def test_damage_is_refused_in_one_line(tmp_path, capsys, spoil, words):
    refused(tmp_path, capsys, spoil(small()[1]), *words)


def test_an_edit_of_any_part_is_noticed_by_the_digest(tmp_path, capsys):
    data = small()[1]
    assert pack.state(pack.read(rezipped(data, lambda name, content: content)))
    for record in ("/data/0", "/data/1", "/data/2"):
        for at in (20, -1):
            def change(name, content):
                if not name.endswith(record):
                    return content
                content = bytearray(content)
                content[at] ^= 64
                return bytes(content)
            refused(tmp_path, capsys, rezipped(data, change), "SHA-256" if at < 0 or record != "/data/0" else "")


def test_a_changed_byte_anywhere_is_refused_or_changes_nothing():
    model, data = small()
    expected, silent = pack.state(pack.read(data)), 0
    for at in range(0, len(data), max(1, len(data) // 150)):
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << at % 8
        try:
            assert same(pack.state(pack.read(bytes(spoilt))), expected)
            silent += 1  # padding, times and the like of the zip
        except InputError as error:
            assert "\n" not in str(error)
    assert silent < 100


def kernel(position, value):
    def change(index, blob):
        index["blocks"][0][1][0][position] = value
    return change


def network(change):
    return lambda index, blob: change(index)


def other(position, value):
    def change(index, blob):
        index["rest"][0][position] = value
    return change


def byte(at, value):
    def change(index, blob):
        blob[at] = value
    return change


def scale(value):
    def change(index, blob):
        blob[1:5] = struct.pack("<f", value)
    return change


CRAFTED = {  # the first kernel: stem [8, 1, 3, 3], 3 bits INT uniform, 4 of 8 channels: 1 + 4 + 14 bytes
    "no index": network(lambda i: i.clear()), "more in the index": network(lambda i: i.update(a=1)),
    "network": network(lambda i: i.update(network=[])), "memory format": network(lambda i: i.update(channels_last=1)),
    "no blocks": network(lambda i: i.update(blocks=[])), "blocks of text": network(lambda i: i.update(blocks="ab")),
    "a block without kernels": network(lambda i: i["blocks"].append(["empty", []])),
    "a block without a name": network(lambda i: i["blocks"][0].__setitem__(0, None)),
    "rest": network(lambda i: i.update(rest={"a": 1})), "less rest": network(lambda i: i["rest"].pop()),
    "a kernel twice": network(lambda i: i["blocks"][0][1].append(i["blocks"][0][1][0])),
    "a kernel too few": network(lambda i: i["blocks"][0][1].pop()),
    "a field too few": network(lambda i: i["blocks"][0][1][0].pop()),
    "a tensor twice": network(lambda i: i["rest"][1].__setitem__(0, i["rest"][0][0])),
    "a kernel's tensor twice": kernel(1, ["once.weight"]), "its own twice": kernel(1, ["stem.weight", "stem.weight"]),
    "kernel name": kernel(0, 7), "another's": kernel(0, "once"), "no names": kernel(1, []),
    "names": kernel(1, "stem.weight"), "names 2": kernel(1, [1]), "names 3": kernel(1, None),
    "dtype": kernel(2, "quint8"), "dtype 2": kernel(2, []),
    "int kernel": kernel(2, "int32"),
    "shape": kernel(3, [8, 1, 3]), "larger": kernel(3, [8, 1, 3, 4]), "one side": kernel(3, []),
    "no side": kernel(3, [0, 1, 3, 3]), "no side 2": kernel(3, [8, 0, 3, 3]), "negative": kernel(3, [8, -1, -3, 3]),
    "float": kernel(3, [8.0, 1, 3, 3]), "bool": kernel(3, [8, True, 3, 3]), "text": kernel(3, "8133"),
    "null": kernel(3, None), "huge": kernel(3, [8, 2 ** 62, 3, 3]), "huge 2": kernel(3, [2 ** 35, 2 ** 35]),
    "huge 3": kernel(3, [8, 10 ** 400]), "sides": kernel(3, [8, 9] + [1] * 70), "tall": kernel(3, [1 << 30, 1, 3, 3]),
    "bits 0": kernel(4, 0), "bits 1": kernel(4, 1), "bits 4": kernel(4, 4), "bits 17": kernel(4, 17),
    "bits 32": kernel(4, 32), "bits 33": kernel(4, 33), "bits -3": kernel(4, -3), "bits 3.0": kernel(4, 3.0),
    "bits true": kernel(4, True), "bits text": kernel(4, "3"), "kept 0": kernel(5, 0), "kept 3": kernel(5, 3),
    "kept 8": kernel(5, 8), "kept 9": kernel(5, 9), "kept -1": kernel(5, -1), "kept 4.0": kernel(5, 4.0),
    "kept null": kernel(5, None), "qtype": kernel(6, "BOTH"), "qtype 2": kernel(6, "FLOAT"), "qtype 3": kernel(6, {}),
    "granularity": kernel(7, "any"), "granularity 2": kernel(7, "per-channel"), "granularity 3": kernel(7, []),
    "other names": other(0, []), "other dtype": other(1, "float"), "other types": other(2, "int32"),
    "narrower": other(2, "float16"),
    "wider": lambda index, blob: index["rest"][0].__setitem__(slice(1, 3), ["float16", "float32"]),
    "other shape": other(3, [9]), "other shape 2": other(3, [-8]), "other shape 3": other(3, [0, 1 << 62]),
    "other shape 4": other(3, [1 << 39, 0, 1 << 39]), "other shape 5": other(3, {"0": 8}),
    "empty": network(lambda i: i["rest"].append([["e"], "float32", "float32", [1 << 39, 0, 1 << 39]])),
    "an empty bitmap": byte(0, 0), "a fuller bitmap": byte(0, 0xff), "scale 0": scale(0.0), "scale -1": scale(-1.0),
    "scale nan": scale(math.nan), "scale inf": scale(math.inf), "overflow": scale(3e38),
    "bits behind the last code": byte(18, 0xff), "longer": lambda index, blob: blob.append(0),
    "shorter": lambda index, blob: blob.pop(), "no blob": lambda index, blob: blob.clear()}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_index_with_a_right_digest_is_refused(name):
    _, index, blob = parts(small()[1])
    assert index["blocks"][0][1][0][3:] == [[8, 1, 3, 3], 3, 4, "INT", "uniform"] and pack.state(
        pack.read(assembled(index, blob)))
    CRAFTED[name](index, blob)
    with pytest.raises(InputError) as caught:
        pack.state(pack.read(assembled(index, blob)))
    message = str(caught.value)
    assert message.startswith("packed bytes: damaged packed file: ") and "\n" not in message and len(message) < 500
    assert "copy the file again" in message


@pytest.mark.parametrize("name, text", [
    ("no zlib", b"abc"), ("nothing", b""), ("cut", zlib.compress(b"{}" * 1000)[:-3]), ("no json", zlib.compress(b"{")),
    ("more", zlib.compress(b"{}") + b"more"), ("no utf-8", zlib.compress(b"\xff\xfe{}")),
    ("deep", zlib.compress(b"[" * 200_000)), ("a number", zlib.compress(b"9" * 100_000)),
    ("a list", zlib.compress(b"[[]]")), ("a bomb", zlib.compress(b" " * (200 << 20), 1)),
    ("a list of lists", zlib.compress(b"[" + b"[]," * (1 << 17) + b"[]]")),
    ("network", zlib.compress(json.dumps({"network": {}, "channels_last": False, "blocks": [], "rest": []}).encode()))])
def test_an_index_that_is_none(name, text):
    data = assembled(text, b"")
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            pack.read(data)
        assert tracemalloc.get_traced_memory()[1] < 120 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_nothing_hides_behind_the_index_or_in_a_truth_value():
    _, index, blob = parts(small()[1])
    index["rest"].append([["true"], "bool", "bool", [2]])
    text = zlib.compress(json.dumps(index).encode())
    assert raw(pack.state(pack.read(assembled(text, blob + b"\2\0")))["true"]) == b"\1\0"
    with pytest.raises(InputError, match="an index that ends elsewhere"):
        pack.read(assembled(text + b"more", blob + b"\2\0"))


def entry(shape, bits, kept, granularity="uniform", qtype="INT"):
    return ["k", ["k.weight"], "float32", shape, bits, kept, qtype, granularity]


def crafted(kernels, blob):
    return assembled({"network": {}, "channels_last": False, "blocks": [["b", kernels]], "rest": []}, blob)


def test_few_bytes_do_not_become_many_weights(monkeypatch):
    """One row of a million channels: 125 KB of bitmap, 250 KB of codes, 4 TB of weights."""
    side = 1 << 20
    data = crafted([entry([side, side], 2, 1)], b"\1" + bytes(side // 8 - 1) + struct.pack("<f", 1) + bytes(side // 4))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("memory is taken"))
    with pytest.raises(InputError, match=f"kernels of {side * side} weights out of .* bytes, more than 1024 to the "):
        pack.read(data)


@pytest.mark.parametrize("kernel, data, message", [
    (entry([1, 2], 3, 1, "per-channel"), struct.pack("<f", 1) + b"\x3f", "a code beyond 3"),
    (entry([1, 2], 3, 1, "learned", "FLOAT"), struct.pack("<f", 1) + b"\x07", "a code beyond 3"),
    (entry([1, 2], 3, 1, "log"), struct.pack("<ff", 1, 2) + b"\x07", "a code beyond 3"),
    (entry([1, 2], 3, 1, "log-script"), struct.pack("<ff", 1, 2) + b"\x0f", "a code beyond 7"),
    (entry([1, 2], 3, 1, "log"), struct.pack("<ff", 2, 1) + b"\0", "scales that are not"),
    (entry([1, 2], 3, 1, "log"), struct.pack("<ff", 0, 1) + b"\0", "scales that are not"),
    (entry([1, 2], 3, 1, "log"), struct.pack("<ff", 1, math.inf) + b"\x1b", "scales that are not"),
    (entry([1, 2], 3, 1, "uniform", "FLOAT"), struct.pack("<f", 1) + b"\x08\0", "a zero-point beyond"),
    (entry([2, 1], 12, 2, "per-channel", "FLOAT"), struct.pack("<ffHH", 1, 1, 7, 4096) + b"\0\0\0", "zero-point"),
    (entry([2, 1], 3, 1), b"\4" + struct.pack("<f", 1) + b"\0", "a bitmap of 1 channels"),
    (entry([2, 1], 3, 1), b"\5" + struct.pack("<f", 1) + b"\0", "a bitmap of 2 channels"),
    (entry([1, 1], 3, 1), struct.pack("<f", 1) + b"\x10", "bits behind its last code")])
def test_numbers_out_of_range(kernel, data, message):
    with pytest.raises(InputError, match=message) as caught:
        pack.state(pack.read(crafted([kernel], data)))
    assert "\n" not in str(caught.value)


def test_numbers_at_the_ends_of_their_range():
    data = struct.pack("<f", 0.5) + b"\7" + b"\x38"  # FLOAT at 3 bits: zero-point 7, codes 0 and 7
    assert pack.state(pack.read(crafted([entry([1, 2], 3, 1, "uniform", "FLOAT")], data)))["k.weight"].tolist() == \
        [[-3.5, 0.0]]
    data = b"\2" + struct.pack("<f", 2) + b"\x30"  # the second of two rows, codes 0 and 6 of 7: -3 and 3
    assert pack.state(pack.read(crafted([entry([2, 2], 3, 1, "per-channel")], data)))["k.weight"].tolist() == \
        [[0.0, 0.0], [-6.0, 6.0]]


def test_names_of_a_file_are_printed_in_one_line_each():
    name = "a\nb\x1b[2J" + "x" * 1000
    data = crafted([[name, [name], *entry([1, 1], 4, 1)[2:]]], struct.pack("<f", 1) + b"\0")
    packed = pack.read(data)
    assert max(map(len, pack.info(packed).splitlines())) < 300 and "\x1b" not in pack.info(packed)
    with pytest.raises(InputError) as caught:
        pack.load(data, nn.Linear(1, 1))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# Files and the command line


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path, asked = tmp_path / "packed.pt", []
    pack.write(str(path), b"old")

    def fails(*_):
        asked.append([p.name for p in tmp_path.iterdir()])
        raise OSError("no space left")

    for module, name in ((os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(OSError, match="no space left"):
                pack.write(path, b"new")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["packed.pt"]
    assert [len(names) for names in asked] == [2, 2]  # flushed, then moved, beside the old one
    pack.write(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["packed.pt"]
    with pytest.raises(OSError):
        pack.write(tmp_path / "gone" / "packed.pt", b"new")


def test_info(tmp_path, capsys):
    model, network = ours("resnet")
    kernels = [KernelConfig(3, 0.5), KernelConfig(8, 1.0, "FLOAT", "per-channel")]
    blocks, config, masks, grids = compressed(model, kernels)
    data = pack.pack(model, blocks, config, masks, grids, network)
    path = tmp_path / "packed.pt"
    pack.write(path, data)
    assert pack.main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert lines[0] == f"{path}: packed file, version 1" and '"name": "resnet18"' in lines[1]
    assert lines[2] == "to load it: pack.load(FILE)"
    block, shapes = config.blocks[0], kernel_shapes(blocks[0])
    sizes = [kernel_bytes(k, s) for k, s in zip(block.kernels, shapes)]
    assert rows["group0"] == ["5.50", "75.0", "%", f"{sum(sizes):,}"]
    assert rows["conv1"] == ["3", "6/12", "INT", "uniform", f"{sizes[0]:,}"]
    assert rows["layer1.0.conv1"] == ["8", "12/12", "FLOAT", "per-channel", f"{sizes[1]:,}"]
    total = sum(kernel_bytes(k, s) for b in config.blocks for k, s in zip(b.kernels, b.shapes))
    assert rows["kernels"][0] == f"{total:,}" and f"FP32 {4 * config.params:,}; CR {config.cr:.2f} " in lines[-4]
    assert rows["rest"][0] == f"{model_bytes(model) - 4 * config.params:,}"
    assert rows["file"][0] == f"{len(data):,}" and rows["index"][0] == f"{pack.read(data).index_bytes:,}"
    assert lines[-1].endswith(f"{model_bytes(model):,}: ratio {model_bytes(model) / len(data):.2f}")

    pack.write(path, small()[1])
    assert pack.main(["info", str(path)]) == 0
    assert "to load it: pack.load(FILE, model=mine)" in capsys.readouterr().out


def test_the_program_by_itself(tmp_path):
    path = tmp_path / "packed.pt"
    path.write_bytes(small()[1][:-9])
    done = subprocess.run([sys.executable, str(ROOT / "pack.py"), "info", str(path)], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"pack: {path}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    ([], "required: command (see --help)"), (["info"], "required: FILE"), (["show", "x"], "invalid choice"),
    (["info", "gone.pt"], "gone.pt: no such file; a run leaves packed.pt"), (["info", "."], ".: no such file"),
    (["info", "a", "b"], "unrecognized arguments: b"), (["export", "a"], "required: OUT.pt2")])
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert pack.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and message in error and error.startswith("pack: ") and error.count("\n") == 1


def test_export_writes_a_program_with_the_packed_network_s_logits(tmp_path, capsys):
    model, network = ours("mobilenet")
    path, out = tmp_path / "packed.pt", tmp_path / "out.pt2"
    pack.write(path, pack.pack(model, *compressed(model, MIXED), network))
    assert pack.main(["export", str(path), str(out)]) == 0
    before, after, size = _exported(capsys.readouterr().out)
    assert after < before and size == out.stat().st_size
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        given, wanted = torch.export.load(out).module()(images), pack.load(path)(images)
    assert (given - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))


def _exported(said):
    """(multiply-adds before, after, bytes) of export's first line."""
    line = said.splitlines()[0]
    return [int(number.replace(",", "")) for number in
            re.fullmatch(r".*: ([\d,]+) multiply-adds before, ([\d,]+) after, ([\d,]+) bytes", line).groups()]


def test_export_a_network_of_ones_own(tmp_path, capsys):
    (tmp_path / "net.py").write_text(SOURCE)
    namespace = {}
    exec(SOURCE, namespace)
    model, path = namespace["make"](3), tmp_path / "packed.pt"
    pack.write(path, pack.pack(model, *compressed(model, MIXED, torch.ones(2, 3, 16, 16)), OWN))
    command = ["export", str(path), str(tmp_path / "out.pt2")]
    assert pack.main(command) == 2 and "pack.load(FILE, model=mine)" in capsys.readouterr().err
    assert pack.main([*command, "--model", f"{tmp_path / 'net.py'}:make"]) == 0
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        program = torch.export.load(tmp_path / "out.pt2").module()
        torch.testing.assert_close(program(images), model.eval()(images), rtol=0, atol=1e-4)
    for change, message in (({"image_size": None}, "give --image-size N"), ({"image_size": 10 ** 9}, "1 to 1024"),
                            ({"num_classes": "3"}, "no number of classes")):
        pack.write(path, pack.pack(model, *compressed(model, MIXED, torch.ones(2, 3, 16, 16)), {**OWN, **change}))
        (tmp_path / "out.pt2").unlink(missing_ok=True)
        capsys.readouterr()
        assert pack.main([*command, "--model", f"{tmp_path / 'net.py'}:make"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out.pt2").exists()
