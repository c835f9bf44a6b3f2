"""Packed files: every quantiser bit for bit, whole networks with their logits, sizes, and damaged and crafted files."""

import copy
import functools
import hashlib
import io
import itertools
import json
import math
import re
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import models
from compress import (GRANULARITIES, QTYPES, BlockConfig, KernelConfig, NetworkConfig, compress_network, kernel_bytes,
                      kernel_shapes, model_bytes, snap_to_grid)
from config import InputError
from deploy import pack
from support.kernels import Block
from support.own import own_network

EVERY = list(itertools.product(QTYPES, (*GRANULARITIES, "log-script")))
MIXED = [KernelConfig(bits, keep, *kind) for kind, bits, keep in zip(
    EVERY, (2, 3, 4, 5, 6, 7, 8, 12, 32, 4), (1.0, 0.73, 0.5, 0.3, 0.9, 1.0, 0.01, 0.66, 0.5, 0.8))]
OWN = {"name": "", "source": "make", "num_classes": 3, "image_size": [16, 24], "channels": 1}
EXAMPLE = torch.ones(2, 1, 16, 24)


class Mine(nn.Module):
    """A weight in two modules and under three names, attention whose weight no module holds, buffers of every type."""

    def __init__(self):
        super().__init__()
        self.stem, self.once, self.bn = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.again, self.tied, self.fc = self.once, nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 3)
        self.tied.weight, self.attend = self.once.weight, nn.MultiheadAttention(8, 2, batch_first=True)
        for name, dtype in pack.DTYPES.items():
            self.register_buffer(f"of_{name}", torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype).t())
        self.register_buffer("other", self.of_bool)
        self.register_buffer("empty", torch.zeros(0, 5))
        self.register_buffer("odd", torch.tensor([[math.nan, math.inf, -math.inf, -0.0, 1e-45]]))
        self.register_buffer("gone", torch.ones(3), persistent=False)

    def forward(self, x):
        x = self.tied(self.again(self.once(self.bn(self.stem(x)).relu()).relu())).flatten(2).transpose(1, 2)
        return self.fc(self.attend(x, x, x, need_weights=False)[0].mean(1))


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits_of(state):
    """A state dict as plain data, equal only where it is bit for bit (-0 is not +0), types and shapes included."""
    return {name: (tensor.dtype, tensor.shape, raw(tensor)) for name, tensor in state.items()}


def compressed(model, kernels, example=None):
    """``model`` put on its grids in place, its kernels configured by turns → arguments for pack.pack after it."""
    blocks, turn = models.find_blocks(model, example), itertools.cycle(kernels)
    config = NetworkConfig(tuple(BlockConfig(tuple(next(turn) for _ in b.kernels), kernel_shapes(b)) for b in blocks))
    masks = compress_network(blocks, config)
    return blocks, config, masks, snap_to_grid(blocks, config, masks)


@functools.cache
def small():
    torch.manual_seed(1)
    model = Mine()
    return pack.pack(model, *compressed(model, [KernelConfig(3, 0.6), *MIXED[1:]], EXAMPLE), OWN)


def ours(name="resnet18", **settings):
    """A network of this project whose BatchNorm buffers moved, and what rebuilds it."""
    model = models.build(name, 7, 32, **settings)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 32, 32))
    return model, {"name": name, "num_classes": 7, "image_size": 32, "width": 1.0, "patch_size": 0, **settings}


def parts(data):
    _, index, blob = (bytes(t.numpy()) for t in torch.load(io.BytesIO(data), weights_only=True).values())
    return json.loads(zlib.decompress(index)), bytearray(blob)


def assembled(index, blob):
    """A packed file with a digest that fits; ``index`` as JSON or as compressed bytes."""
    index = index if isinstance(index, bytes) else zlib.compress(json.dumps(index).encode())
    digest = hashlib.sha256(b"\1\0\0\0" + len(index).to_bytes(8, "little") + index + bytes(blob)).digest()
    contents = {"header": b"HiReLC packed\n\1\0\0\0" + digest, "index": index, "blob": bytes(blob)}
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in contents.items()}, file)
    return file.getvalue()


def refused(data, message, load=lambda data: pack.state(pack.read(data))):
    with pytest.raises(InputError, match=message) as caught:
        load(data)
    assert str(caught.value).startswith("packed bytes") and str(caught.value).isprintable()


def test_a_file_byte_by_byte():
    """Worked out by hand: INT at 3 bits (-4 … 3) of scale 1, FLOAT at 3 bits (0 … 7, zero-point 3) of scale 0.5."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -2.0], [0.1, 0.1], [1.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([[-1.5, 2.0, 0.5]]))
    kernels = [KernelConfig(3, 0.67), KernelConfig(3, 1.0, "FLOAT")]
    data = pack.pack(model, *compressed(model, kernels, torch.ones(2, 2)), OWN)
    expected = bytes([0b101]) + struct.pack("<f", 1.0) + (7 | 2 << 3 | 5 << 6 | 4 << 9).to_bytes(2, "little")
    expected += struct.pack("<f", 0.5) + bytes([3]) + (0 | 7 << 3 | 4 << 6).to_bytes(2, "little")
    index, blob = parts(data)
    assert bytes(blob) == expected + raw(model[2].weight)
    assert index["network"] == OWN and index["rest"] == [[["2.weight"], "float32", "float32", [1, 1]]]
    assert index["blocks"][0][1][0] == ["0", ["0.weight"], "float32", [3, 2], 3, 2, "INT", "uniform"]
    assert data == assembled(zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9), blob)


@pytest.mark.parametrize("qtype, granularity", EVERY)
def test_packed_and_unpacked_is_equal_bit_for_bit(qtype, granularity):
    """Odd shapes and values, every bitwidth, keep-ratios and types by turns."""
    linear, conv, *more = map(torch.randn, ((13, 7), (9, 3, 3, 3), (11, 1, 3, 3), (1, 5), (1, 1), (8, 3), (16, 2)))
    five = linear[:5, :4]
    more += [torch.zeros(5, 3), torch.full((3, 5), 0.37), -five.abs() - 0.1, 1e-42 * five, 1e-39 * five, 1e4 * five,
             five * 10 ** five, five * torch.tensor([1, 1e-9, 1, 1e-30, 0])[:, None], five.t(), linear, linear, linear]
    holders, kernels, keeps = {}, [], itertools.cycle((1.0, 0.73, 0.5, 1e-6))
    dtypes = itertools.cycle((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64))
    more += [conv, conv.to(memory_format=torch.channels_last)]
    for weight, bits in itertools.product(more, (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32)):
        holders[f"k{len(holders)}"] = holder = nn.Linear(1, 1, bias=False)
        holder.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format).to(next(dtypes)))
        kernels.append(KernelConfig(bits, next(keeps), qtype, granularity))
    model, blocks = nn.ModuleDict(holders), [Block("all", holders, ())]
    config = NetworkConfig((BlockConfig(tuple(kernels), kernel_shapes(blocks[0])),))
    masks = compress_network(blocks, config)
    grids, before = snap_to_grid(blocks, config, masks), bits_of(model.state_dict())
    packed = pack.read(pack.pack(model, blocks, config, masks, grids, OWN))
    assert bits_of(model.state_dict()) == bits_of(pack.state(packed)) == before and packed.rest == ()
    for kernel, asked, shape in zip(packed.kernels, kernels, kernel_shapes(blocks[0]), strict=True):
        weight = holders[kernel.name].weight
        extra = (weight.itemsize - 4) * kernel.kept * weight[0].numel() if asked.bits == 32 else 0
        assert kernel.bytes == kernel_bytes(asked, shape) + extra, kernel.name
        assert kernel.kept == int(masks[kernel.name].sum()) and kernel.dtype == weight.dtype
    assert packed.config.cr == pytest.approx(config.cr)


@pytest.mark.parametrize("name, settings, quick_gelu, channels_last", [
    ("deit_small_patch16_224", dict(width=0.07, patch_size=16), True, True),
    ("resnet18", dict(width=0.2), False, False), ("mobilenetv2_100", dict(width=0.25), False, True)])
def test_our_networks_come_back_with_equal_logits(tmp_path, name, settings, quick_gelu, channels_last):
    model, network = ours(name, **settings)
    network |= {"quick_gelu": quick_gelu, "mine": [1, None, "é\n"]}
    if quick_gelu:
        models.set_quick_gelu(model, True)
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    blocks, config, masks, grids = compressed(model, MIXED)
    data, generator = pack.pack(model, blocks, config, masks, grids, network), torch.get_rng_state()
    (tmp_path / "packed.pt").write_bytes(data)
    loaded, packed = pack.load(tmp_path / "packed.pt"), pack.read(data)
    assert torch.equal(generator, torch.get_rng_state()) and not loaded.training and model.training
    assert bits_of(loaded.state_dict()) == bits_of(model.state_dict())
    for one, two in zip(loaded.parameters(), model.parameters(), strict=True):
        assert one.stride() == two.stride() and one.requires_grad  # the last bits of logits depend on strides
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert raw(loaded(x)) == raw(model.eval()(x)) and loaded(x).std() > 0
    assert packed.network == network and list(packed.blocks) == [b.name for b in blocks]
    whole = sum(k.bytes for k in packed.kernels) + model_bytes(model) - 4 * config.params
    assert whole < len(data) == packed.file_bytes <= whole + 8192


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype, channels_last", [(None, True), (torch.bfloat16, False), (torch.float64, False)])
def test_a_network_of_ones_own(dtype, channels_last):
    model, x = Mine().to(dtype), torch.randn(2, 1, 16, 16, dtype=dtype)
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)(x)  # BatchNorm's move
    data = pack.pack(model, *compressed(model, [*MIXED[-2:], *MIXED], x), OWN)
    packed, mine = pack.read(data), Mine().to(dtype).train()
    names = {entry.tensors for entry in (*packed.kernels, *packed.rest)}  # each stored once, with all its names
    assert names > {("once.weight", "again.weight", "tied.weight"), ("attend.in_proj_weight",), ("of_bool", "other")}
    places = {name: tensor.data_ptr() for name, tensor in mine.state_dict().items()}
    assert pack.load(data, mine) is mine and not any(module.training for module in mine.modules())
    assert channels_last or places == {k: v.data_ptr() for k, v in mine.state_dict().items()}  # filled in place
    assert bits_of(mine.state_dict()) == bits_of(pack.state(packed)) == bits_of(model.state_dict())
    assert [p.stride() for p in mine.parameters()] == [p.stride() for p in model.parameters()]
    refused(data, r"make.*pack\.load\(FILE, model=mine\)", pack.load)


def test_layouts_that_contiguity_does_not_tell_and_a_program_that_has_no_modes():
    def make():
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(4, 3))
    for layout in (torch.channels_last, torch.contiguous_format):
        model = make().to(memory_format=layout)
        data = pack.pack(model, *compressed(model, MIXED, EXAMPLE), OWN)
        assert [p.stride() for p in pack.load(data, make()).parameters()] == [p.stride() for p in model.parameters()]
    program = torch.export.export(make().eval(), (EXAMPLE,)).module()
    assert bits_of(pack.load(data, program).state_dict()) == bits_of(model.state_dict())


def test_the_rest_in_half_precision():
    model, network = ours(width=0.2)
    with torch.no_grad():
        model.fc.bias[0], model.bn1.running_var[1], model.bn1.running_mean[0] = 70_000.0, math.inf, 1e-9
        model.bn1.bias[:], model.bn1.weight[:] = 23.5 * 2**-24, 40.5 * 2**-24  # float16 is 1/47 and 1/81 off
    model.layer1[0].bn1.double()
    arguments, notes = compressed(model, [KernelConfig(40), *MIXED]), []  # beyond 32 bits are raw rows
    data = pack.pack(model, *arguments, network, "float16", notes.append)
    assert (stay := [note.partition(" stays float32: ")[0] for note in notes]) == ["bn1.bias", "fc.bias"]
    kernels = {name for block in arguments[0] for name in block.state_names}
    expected = {name: tensor if name in {*kernels, *stay} or not tensor.is_floating_point()
                else tensor.half().to(tensor.dtype) for name, tensor in model.state_dict().items()}
    assert bits_of(pack.load(data, copy.deepcopy(model)).state_dict()) == bits_of(expected)


@pytest.mark.parametrize("spoil, message", [
    (lambda m, *_: m.once.weight.mul_(1.001), "kernel once: its weights are not on their grid"),
    (lambda m, b, c, masks, g: m.stem.weight.__setitem__(~masks["stem"], -0.0), "kernel stem: .*pruned rows are not"),
    (lambda m, b, c, masks, g: m.stem.weight.__setitem__(masks["stem"], math.nan), "kernel stem: "),
    (lambda m, b, c, masks, g: b.pop(), "argument 2 is longer"),
    (lambda m, b, c, masks, g: g.update(once=g["stem"]), "kernel once: its weights are not on their grid"),
    (lambda m, *_: m.register_parameter("w", nn.Parameter(torch.ones(2).to_sparse())), "packed: w of its state dict"),
    (lambda *_: {"a": "x" * (5 << 20)}, "too many tensors")])
@torch.no_grad()
def test_what_the_file_would_not_give_back_is_refused(spoil, message):
    model = Mine()
    arguments = compressed(model, [KernelConfig(3, 0.6), *MIXED[1:]], EXAMPLE)
    network = spoil(model, *arguments)
    with pytest.raises(ValueError, match=message):
        pack.pack(model, *arguments, network if isinstance(network, dict) else OWN)


def test_everything_that_does_not_fit_is_listed_and_nothing_is_filled():
    mine = Mine()
    mine.stem.bias, mine.extra, mine.fc.bias = None, nn.Linear(2, 2, bias=False), nn.Parameter(torch.zeros(9))
    mine.tied.bias.data = mine.tied.bias.data.half()
    before = bits_of(mine.state_dict())
    refused(small(), r"does not fit the network; missing: extra.weight; unexpected: stem.bias; different: tied.bias "
            r".*float32 \[8\] in the file, .*float16 \[8\] in the network; different: fc.bias .*\[3\] .*\[9\] in",
            lambda data: pack.load(data, mine))
    assert bits_of(mine.state_dict()) == before and mine.training


@pytest.mark.parametrize("change, message", [
    ({"width": 0.25}, "does not fit the network; different: conv1.weight"), ({"name": "vgg"}, "unknown network 'vgg'"),
    ({"name": "resnet50"}, "missing: layer1.0.conv3.weight"), ({"num_classes": 10 ** 12}, "different: fc.weight"),
    ({"num_classes": 10 ** 30}, "damaged"), ({"width": 1e300}, "damaged"), ({"name": ["resnet18"]}, "damaged"),
    ({"quick_gelu": True}, "damaged")])
def test_another_network_than_the_tensors_are_of(change, message):
    model, network = ours(width=0.1)
    refused(pack.pack(model, *compressed(model, MIXED), network | change), message, pack.load)


def zipped(compression=zipfile.ZIP_STORED, **contents):
    """A packed file as another zip, with other contents of the tensors by number, and CRCs that fit."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(small())) as old, zipfile.ZipFile(made, "w", compression) as new:
        for n in range(3):
            new.writestr(f"other/data/{n}", contents.get(f"_{n}", old.read(f"archive/data/{n}")))
    return made.getvalue()


@pytest.mark.parametrize("make, message", [
    (lambda: b"", "zip"), (lambda: small()[:-9], "zip"), (lambda: zipped(_0=b"weights"), "magic"),
    (lambda: zipped(_1=b"x"), "SHA-256"), (lambda: zipped(_2=b""), "SHA"),
    (lambda: small().replace(b"HiReLC packed\n", b"HiReLC PACKED\n"), "CRC"),
    (lambda: zipped(_0=b"HiReLC packed\n\2\0\0\0" + bytes(32)), r"version are b'HiReLC packed\\n\\x02"),
    (lambda: zipped(zipfile.ZIP_DEFLATED, _2=bytes(200 << 20)), "compressed"),
    *((lambda text=text: assembled(text, b""), said) for text, said in (
        (b"abc", "header check"), (zlib.compress(b"[" * 200_000), "Recursion"),
        (zlib.compress(b" " * (200 << 20), 1), "more than 4194304")))])
def test_what_is_no_packed_file_is_refused(make, message):
    data = make()
    tracemalloc.start()
    refused(data, message)
    assert tracemalloc.get_traced_memory()[1] < 120 << 20 and pack.state(pack.read(zipped()))
    tracemalloc.stop()


CRAFTED = {  # place in the index → values; the first kernel: stem [8, 1, 3, 3], 3 bits INT uniform, 4 of 8 channels
    ("network",): [7], ("rest", 0, 0): [[], [[]]], ("rest", 0, 3): [[9], [-8], [10 ** 400], {"0": 8}],
    ("blocks",): [[], "ab", [["empty", []]]], ("blocks", 0, 1, 0): [[1, 2, 3]], ("blocks", 0, 1, 0, 1): [[], [1], None],
    ("blocks", 0, 1, 0, 2): ["quint8", []], ("blocks", 0, 1, 0, 3): [
        [8, 1, 3], [], [0, 1, 3, 3], [8, -1, -3, 3], [8.0, 1, 3, 3], "8133", [8, 1 << 62, 3, 3], [8, 9] + [1] * 70],
    ("blocks", 0, 1, 0, 4): [0, 4, 17, 32, 33, 3.0, "3"], ("blocks", 0, 1, 0, 5): [0, 3, 9, -1, 4.0, None],
    ("blocks", 0, 1, 0, 6): ["BOTH", "FLOAT", {}], ("blocks", 0, 1, 0, 7): ["any", "per-channel", []]}


@pytest.mark.parametrize("way, value", [(way, value) for way, values in CRAFTED.items() for value in values])
def test_a_crafted_file_with_a_right_digest_is_refused(way, value):
    index, blob = parts(small())
    assert index["blocks"][0][1][0][3:] == [[8, 1, 3, 3], 3, 4, "INT", "uniform"]
    functools.reduce(lambda place, key: place[key], way[:-1], index)[way[-1]] = value
    refused(assembled(index, blob), "copy the file again")


@pytest.mark.parametrize("kernel", [KernelConfig(3), KernelConfig(4, 1.0, "FLOAT", "per-channel"), KernelConfig(32)])
def test_scales_and_weights_that_are_not_finite_are_refused(kernel):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    index, blob = parts(pack.pack(model, *compressed(model, [kernel], torch.ones(2, 2)), OWN))
    for value in (math.nan, math.inf):
        blob[:4] = struct.pack("<f", value)
        refused(assembled(index, blob), "kernel 0: scales or weights that are not finite")


def test_few_bytes_do_not_become_many_weights(monkeypatch):
    """One row of a million channels: 125 KB of bitmap, 250 KB of codes, 4 TB of weights."""
    side = 1 << 20
    blocks = [["b", [["k", ["k.weight"], "float32", [side, side], 2, 1, "INT", "uniform"]]]]
    index = {"network": {}, "channels_last": False, "blocks": blocks, "rest": []}
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("memory is taken"))
    refused(assembled(index, b"\1" + bytes(side // 8 - 1 + 4 + side // 4)), f"kernels of {side * side} weights")


def test_names_of_a_file_are_printed_in_one_line_each():
    index, blob = parts(small())
    index["blocks"][0][0] = index["blocks"][0][1][0][0] = "a\nb\x1b[2J" + "x" * 1000
    said = pack.info(pack.read(assembled(index, blob)))
    assert max(map(len, said.splitlines())) < 300 and "\x1b" not in said and "model=mine" in said


def test_the_command_line_says_what_is_in_a_file(tmp_path, capsys):
    (model, network), path = ours(width=0.2), tmp_path / "packed.pt"
    blocks, config, masks, grids = compressed(model, [KernelConfig(3, 0.5), KernelConfig(8, 1, "FLOAT", "per-channel")])
    path.write_bytes(pack.pack(model, blocks, config, masks, grids, network))
    model.register_buffer("cache", torch.ones(9), persistent=False)
    assert pack.main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert lines[0] == f"{path}: packed file, version 1; to load it: pack.load(FILE)"
    assert rows["group0"][:3] == ["5.50", "75.0", "%"] and rows["conv1"][:4] == ["3", "6/12", "INT", "uniform"]
    assert pack.main(["--help"]) == 0 and capsys.readouterr().out.startswith("usage: python -m deploy.pack info FILE")
    assert lines[-1].endswith(f"{model_bytes(model):,}: ratio {model_bytes(model) / path.stat().st_size:.2f}")


def test_bad_arguments_are_one_line(capsys):
    for arguments, message in ((["info"], "usage: "), (["info", "."], ".: no such file"),
                               (["export", __file__, "b"], "damaged"), (["export", __file__, "no/b"], "no/b: cannot")):
        assert pack.main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == "" and message in error and error.startswith("pack: ") and error.count("\n") == 1


def test_export_writes_a_program_with_the_packed_network_s_logits(tmp_path, capsys):
    path, out, source = tmp_path / "packed.pt", tmp_path / "out.pt2", tmp_path / "net.py"
    source.write_text("from torch import nn\ndef make(num_classes):\n    return nn.Sequential(nn.Conv2d(1, 8, 3, 2), "
                      "nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), "
                      "nn.Flatten(), nn.Linear(8, num_classes))\n")
    model, images = own_network(f"{source}:make", 3), torch.randn(3, 1, 16, 24)
    arguments, command = compressed(model, MIXED[2:], EXAMPLE), ["export", str(path), str(out)]
    path.write_bytes(pack.pack(model, *arguments, OWN))
    assert pack.main([*command, "--model", f"{source}:make"]) == 0
    before, after, size = (int(n) for n in re.findall(r" (\d+) ", capsys.readouterr().out.replace(",", "")))
    assert after < before and size == out.stat().st_size
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(out).module()(images), model.eval()(images), rtol=0, atol=1e-4)
    path.write_bytes(pack.pack(model, *arguments, OWN | {"image_size": 10 ** 9}))
    assert pack.main([*command, "--model", f"{source}:make"]) == 2 and "1 to 1024" in capsys.readouterr().err
