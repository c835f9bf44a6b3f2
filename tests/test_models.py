"""Networks against independent references, the block structure of SPEC section 3, and every way a file can be wrong."""

import hashlib
import json
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import models  # noqa: E402
from config import NETWORKS, InputError  # noqa: E402
from models import VisionTransformer, build, find_blocks, load_pretrained, read_checkpoint, weights_path  # noqa: E402


def randomised(model, seed=0):
    """Every tensor drawn anew, BatchNorm statistics and affine parameters included, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var") or tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.3 * noise.tanh())
            elif tensor.ndim > 1 and name not in ("pos_embed", "cls_token", "class_token", "encoder.pos_embedding"):
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.3 * noise)
    return model.eval()


def images(count, side, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tiny(classes=10, **settings):
    """A two-block ViT of 8 channels, 17 tokens."""
    return VisionTransformer(classes, **{**dict(image_size=16, patch=4, heads=2, head_dim=4, depth=2), **settings})


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, model):
    after = model.state_dict()
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------------------------------------------------
# Structure

COUNTS = {"deit_small_patch16_224": (12, 48, 21_233_664), "deit_base_patch16_224": (12, 48, 84_934_656),
          "vit_base_patch32_clip_224": (12, 48, 84_934_656), "resnet18": (5, 17, 10_994_880),
          "mobilenetv2_100": (13, 51, 1_780_160), "resnet50": (13, 49, 20_686_016)}
# Published sizes of the whole networks with 1000 classes.
PARAMETERS = {"deit_small_patch16_224": 22_050_664, "deit_base_patch16_224": 86_567_656,
              "vit_base_patch32_clip_224": 88_225_000, "resnet18": 11_689_512, "mobilenetv2_100": 3_504_872,
              "resnet50": 25_557_032}


def test_every_network_of_the_settings_can_be_built():
    assert set(NETWORKS) == set(COUNTS) == set(models.VITS) | set(models.CNNS) == set(models.PRETRAINED)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_paper(name):
    with torch.device("meta"):
        model = build(name, 1000)
    blocks = find_blocks(model)
    kernels = [kernel for block in blocks for kernel in block.kernels.values()]
    assert (len(blocks), len(kernels), sum(k.weight.numel() for k in kernels)) == COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert [len(block.kernels) for block in blocks[:-1]] == [4] * (len(blocks) - 1)
    assert len({block.name for block in blocks}) == len(blocks)


@pytest.mark.parametrize("name", COUNTS)
def test_narrow_networks_keep_the_structure(name):
    patch = 8 if name in models.VITS else 0
    torch.manual_seed(0)
    narrow = build(name, 7, image_size=32, width=0.25, patch_size=patch).eval()
    with torch.device("meta"):
        full = build(name, 7)
    assert [list(b.kernels) for b in find_blocks(narrow)] == [list(b.kernels) for b in find_blocks(full)]
    assert list(narrow.state_dict()) == list(full.state_dict())
    kernels = [(k.weight.shape, f.weight.shape) for b, c in zip(find_blocks(narrow), find_blocks(full))
               for k, f in zip(b.kernels.values(), c.kernels.values())]
    assert all(n[0] < f[0] for n, f in kernels)
    logits = narrow(images(3, 32))
    assert logits.shape == (3, 7) and logits.isfinite().all() and logits.std(dim=0).min() > 0


def test_width_of_each_family():
    assert build("deit_small_patch16_224", 2, 32, 0.25, 8).cls_token.shape[-1] == 6 * 16
    assert build("deit_small_patch16_224", 2, 32, 0.01, 8).cls_token.shape[-1] == 6 * 4
    model = build("resnet50", 2, width=0.25)
    assert model.conv1.out_channels == 16 and model.layer4[2].conv3.out_channels == 512
    model = build("mobilenetv2_100", 2, width=0.25)
    assert [stage[0].state_dict()["bn2.weight" if i == 0 else "bn3.weight"].numel()
            for i, stage in enumerate(model.blocks)] == [4, 8, 8, 16, 24, 40, 80]
    assert [models.scale_channels(c, 0.01) for c in (32, 64, 320)] == [4, 4, 4]


def test_narrow_networks_have_the_same_shortcuts():
    """Rounding can make input and output widths equal where the full network's differ; structure must not follow."""
    model = build("mobilenetv2_100", 2, width=0.1)
    assert model.blocks[0][0].conv_dw.in_channels == model.blocks[0][0].conv_pw.out_channels
    shortcuts = [[block.shortcut for block in stage] for stage in model.blocks[1:]]
    assert shortcuts == [[False] + [True] * (n - 1) for n in (2, 3, 4, 3, 3, 1)]
    assert build("resnet18", 2, width=0.01).layer2[0].downsample is not None
    assert build("resnet18", 2).layer1[0].downsample is None


RESNET18_GROUPS = [
    ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"],
    ["layer1.1.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1"],
    ["layer2.1.conv2", "layer3.0.conv1", "layer3.0.conv2", "layer3.1.conv1"],
    ["layer3.1.conv2", "layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1"],
    ["layer4.1.conv2"]]


def test_blocks_of_resnet18():
    model = build("resnet18", 10, width=0.1)
    blocks = find_blocks(model)
    assert [list(block.kernels) for block in blocks] == RESNET18_GROUPS
    assert blocks[1].kernels["layer2.0.conv1"] is model.layer2[0].conv1
    assert blocks[4].parameters == ("layer4.1.conv2.weight",)
    assert not any("bn" in name or "downsample" in name for block in blocks for name in block.parameters)


def test_blocks_of_mobilenet():
    blocks = find_blocks(build("mobilenetv2_100", 10, width=0.1))
    assert list(blocks[0].kernels) == ["conv_stem", "blocks.0.0.conv_dw", "blocks.0.0.conv_pw", "blocks.1.0.conv_pw"]
    assert list(blocks[1].kernels) == ["blocks.1.0.conv_dw", "blocks.1.0.conv_pwl", "blocks.1.1.conv_pw",
                                       "blocks.1.1.conv_dw"]
    assert list(blocks[12].kernels) == ["blocks.6.0.conv_pw", "blocks.6.0.conv_dw", "blocks.6.0.conv_pwl"]


def test_blocks_of_a_vit():
    model = tiny()
    block = find_blocks(model)[1]
    assert list(block.kernels) == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert block.kernels["blocks.1.mlp.fc1"] is model.blocks[1].mlp.fc1
    assert block.parameters == tuple(f"blocks.1.{part}.{leaf}" for part in
                                     ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
                                     for leaf in ("weight", "bias"))


def test_blocks_of_any_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 6),
                          nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    blocks = find_blocks(model)
    assert [list(block.kernels) for block in blocks] == [["0", "2", "4", "6"], ["8"]]
    assert blocks[0].parameters == ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias",
                                    "6.weight", "6.bias")
    assert set(blocks[0].parameters) <= dict(model.named_parameters()).keys()


def test_blocks_of_a_module_without_linear():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    assert [list(block.kernels) for block in find_blocks(conv)] == [["0", "1"]]
    assert [list(block.kernels) for block in find_blocks(conv[:2])] == [["0", "1"]]


def test_a_weight_shared_by_two_modules_is_one_kernel():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert [list(block.kernels) for block in find_blocks(model)] == [["0"]]


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(3, 2))])
def test_nothing_to_compress(model):
    with pytest.raises(InputError, match="nothing to compress"):
        find_blocks(model)


TIMM_NAMES = {
    "deit_small_patch16_224": [
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.0.norm1.weight",
        "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias", "blocks.0.norm2.weight", "blocks.0.norm2.bias", "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias", "blocks.1.norm1.weight"],
    "vit_base_patch32_clip_224": [
        "cls_token", "pos_embed", "patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias",
        "blocks.0.norm1.weight"],
    "resnet18": [
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked",
        "layer1.0.conv1.weight", "layer1.0.bn1.weight"],
    "resnet50": ["conv1.weight", "bn1.weight"],
    "mobilenetv2_100": [
        "conv_stem.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
        "bn1.num_batches_tracked", "blocks.0.0.conv_dw.weight", "blocks.0.0.bn1.weight"]}
LAST_NAMES = {
    "deit_small_patch16_224": ["blocks.11.mlp.fc2.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"],
    "vit_base_patch32_clip_224": ["blocks.11.mlp.fc2.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"],
    "resnet18": ["layer4.1.bn2.num_batches_tracked", "fc.weight", "fc.bias"],
    "resnet50": ["layer4.2.bn3.num_batches_tracked", "fc.weight", "fc.bias"],
    "mobilenetv2_100": ["conv_head.weight", "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var",
                        "bn2.num_batches_tracked", "classifier.weight", "classifier.bias"]}


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_names_are_those_of_the_checkpoints(name):
    with torch.device("meta"):
        names = list(build(name, 10).state_dict())
    assert names[:len(TIMM_NAMES[name])] == TIMM_NAMES[name]
    assert names[-len(LAST_NAMES[name]):] == LAST_NAMES[name]
    weights = [n.removesuffix(".weight") for n in names if n.endswith(".weight")]
    if name == "resnet18":
        first = weights.index("layer2.0.conv1")
        assert weights[first:first + 6] == [f"layer2.0.{part}" for part in (
            "conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1")]
    if name == "mobilenetv2_100":
        assert {n.rpartition(".conv")[0] for n in weights if ".conv" in n} == {
            f"blocks.{stage}.{i}" for stage, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for i in range(n)}
        first = weights.index("blocks.1.0.conv_pw")
        assert weights[first:first + 6] == [f"blocks.1.0.{part}" for part in (
            "conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")]


@pytest.mark.parametrize("settings, words", [
    (dict(name="resnet19"), ["resnet19", "resnet18", "deit_small_patch16_224"]),
    (dict(name="deit_small_patch16_224", image_size=100), ["100", "16"]),
    (dict(name="deit_small_patch16_224", image_size=32, patch_size=5), ["32", "5"]),
    (dict(name="resnet18", patch_size=4), ["resnet18", "4", "patch"]),
    (dict(name="resnet18", width=0.0), ["width 0"]),
    (dict(name="resnet18", width=float("nan")), ["width nan"]),
    (dict(name="resnet18", num_classes=0), ["0 classes"])])
def test_build_refuses(settings, words):
    with pytest.raises(InputError) as error:
        build(**{**dict(num_classes=10), **settings})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_vit_refuses_images_of_another_size():
    with pytest.raises(InputError, match="8 x 8 .* 16 x 16"):
        tiny()(images(1, 8))


# ---------------------------------------------------------------------------------------------------------------
# Forward passes against independent references


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_equal_torchvision(name):
    reference = randomised(getattr(torchvision.models, name)(num_classes=11))
    model = build(name, 11).eval()
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    x = images(2, 64)
    with torch.no_grad():
        expected = reference(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_mobilenet_equals_torchvision_through_its_file(tmp_path):
    """torchvision's names, from its own file layout, end up where they belong."""
    reference = randomised(torchvision.models.mobilenet_v2(num_classes=11))
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(4)  # activations beyond 6, where ReLU6 differs from ReLU
    path = str(tmp_path / "mobilenet.pth")
    torch.save(reference.state_dict(), path)
    model = build("mobilenetv2_100", 11).eval()
    report = load_pretrained(model, path)
    assert report.loaded == len(model.state_dict()) and report.replaced == report.missing == report.unexpected == ()
    x = images(2, 64)
    with torch.no_grad():
        expected = reference(x)
        assert expected.std() > 0.05
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_mobilenet_has_no_dropout():
    model = randomised(build("mobilenetv2_100", 3, width=0.1)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert torch.equal(model(images(2, 32)), model(images(2, 32)))


def test_vit_equals_torchvision():
    """torchvision's vit_b_32 is DeiT-Base with patches of 32 pixels under other names (LayerNorm eps 1e-6)."""
    reference = randomised(torchvision.models.vit_b_32(image_size=64, num_classes=9))
    table = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj",
             "encoder.ln": "norm", "heads.head": "head"}
    parts = {"ln_1": "norm1", "ln_2": "norm2", "self_attention.in_proj_": "attn.qkv.",
             "self_attention.out_proj": "attn.proj", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    state = {}
    for name, tensor in reference.state_dict().items():
        new = re.sub(r"encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1", name)
        for old, ours in (parts if new != name else table).items():
            new = new.replace(old, ours)
        state[new] = tensor
    model = build("deit_base_patch16_224", 9, image_size=64, patch_size=32).eval()
    model.load_state_dict(state)
    x = images(2, 64)
    with torch.no_grad():
        expected = reference(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def written_out_clip(state, x, patch, heads, act):
    """CLIP's image tower step by step from a state dict, with softmax attention head by head."""
    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    side, width = x.shape[-1] // patch, state["cls_token"].shape[-1]
    tokens = [state["cls_token"][0, 0].expand(len(x), -1)]
    for row in range(side):
        for column in range(side):
            square = x[:, :, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch]
            tokens.append(torch.einsum("bchw,ochw->bo", square, state["patch_embed.proj.weight"]))
    x = norm(torch.stack(tokens, dim=1) + state["pos_embed"], "norm_pre")
    for i in range(2):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(width, dim=-1)
        size, mixed = width // heads, []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            mixed.append((q[..., part] @ k[..., part].transpose(1, 2) / size ** 0.5).softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(mixed, dim=-1), f"blocks.{i}.attn.proj")
        x = x + linear(act(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize("quick", [False, True])
def test_clip_equals_its_definition(quick):
    model = randomised(tiny(clip=True, quick_gelu=quick)).double()
    with torch.no_grad():
        model.norm_pre.weight.mul_(0.01)  # small activations, so that the eps of LayerNorm shows
        model.norm_pre.bias.mul_(0.01)
    x = images(2, 16).double()
    act = (lambda x: x / (1 + torch.exp(-1.702 * x))) if quick else \
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2 ** 0.5)))
    with torch.no_grad():
        expected = written_out_clip(model.state_dict(), x, 4, 2, act)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert "patch_embed.proj.bias" not in model.state_dict()
    built = build("vit_base_patch32_clip_224", 3, width=0.01)
    assert built.patch_embed.proj.kernel_size == (32, 32)
    assert {m.eps for m in built.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in tiny().modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_initialisation_is_the_seeds():
    torch.manual_seed(3)
    first = build("mobilenetv2_100", 4, width=0.1)
    torch.manual_seed(3)
    assert same(snapshot(first), build("mobilenetv2_100", 4, width=0.1))
    assert not same(snapshot(first), build("mobilenetv2_100", 4, width=0.1))
    vit = build("deit_small_patch16_224", 100, 32, 1.0, 8)
    assert abs(vit.head.weight.std().item() - 0.02) < 1e-3 and not vit.blocks[0].attn.qkv.bias.any()
    resnet = build("resnet18", 4)
    assert abs(resnet.layer1[0].conv1.weight.std().item() - (2 / (64 * 9)) ** 0.5) < 1e-3


@pytest.mark.parametrize("name, side", [("vit", 16), ("clip", 16), ("resnet18", 32), ("mobilenetv2_100", 32)])
def test_per_sample_gradients(name, side):
    """vmap(grad(...)) in eval mode gives each image's own gradient, as autograd does one image at a time."""
    torch.manual_seed(0)
    model = tiny(clip=name == "clip") if side == 16 else build(name, 10, width=0.1)
    model.eval()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x, y = images(3, side), torch.tensor([0, 4, 9])

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, (parameters, buffers), (image[None],)), label[None])

    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("error")  # the math backend has a batching rule: no fallback to a loop
        found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(x[i:i + 1]), y[i:i + 1]).backward()
        for n, p in model.named_parameters():
            torch.testing.assert_close(found[n][i], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "resnet18", "mobilenetv2_100"])
def test_autocast(name):
    torch.manual_seed(0)
    model = build(name, 5, 32, 0.25, 8 if name in models.VITS else 0).eval()
    x = images(2, 32)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        full = model(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64"}


def safetensors(state, tamper=None):
    """The bytes of a safetensors file; ``tamper`` may change the header before it is written."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    if tamper:
        tamper(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(model, source, *words, **options):
    """load_pretrained refuses ``source`` with one line that holds ``words``, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(InputError) as error:
        load_pretrained(model, source, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert same(before, model)
    return message


@pytest.fixture
def state():
    """The state dict of a tiny ViT of known weights."""
    return snapshot(randomised(tiny(), seed=5))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3},
                                  lambda s: {"module." + name: tensor for name, tensor in s.items()},
                                  lambda s: {"state_dict": {"module." + n: t for n, t in s.items()}}])
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_torch_files(tmp_path, state, wrap, suffix):
    path = str(tmp_path / f"weights.{suffix}")
    torch.save(wrap(state), path)
    model = tiny()
    report = load_pretrained(model, path)
    assert same(state, model)
    assert report == models.LoadReport(path, len(state))


@pytest.mark.parametrize("dtype", CODES)
def test_safetensors(tmp_path, state, dtype):
    if dtype == torch.int64:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        expected = {**snapshot(model), "1.num_batches_tracked": torch.tensor(7)}
    else:
        model, expected = tiny(), {name: tensor.to(dtype) for name, tensor in state.items()}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors(expected))
    report = load_pretrained(model, str(path))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32)
        assert torch.equal(tensor, expected[name].to(tensor.dtype))
    converted = [f"{len(expected)} tensors of another precision converted to float32"]
    assert list(report.notes) == (converted if dtype in (torch.float64, torch.float16, torch.bfloat16) else [])


def test_the_parameters_stay_the_same_objects(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    model = tiny()
    before = {name: id(p) for name, p in model.named_parameters()}
    load_pretrained(model, tmp_path / "w.pth")
    assert before == {name: id(p) for name, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())


def test_another_number_of_classes(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    model = tiny(classes=4)
    head = model.head.weight.clone()
    report = load_pretrained(model, str(tmp_path / "w.pth"))
    assert report.replaced == ("head.weight", "head.bias") and report.loaded == len(state) - 2
    assert "10 classes in the file, 4 in the network" in report.notes[0]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, state["norm.weight"])


@pytest.mark.parametrize("name, classifier", [("resnet18", "fc"), ("mobilenetv2_100", "classifier")])
def test_another_number_of_classes_of_a_cnn(tmp_path, name, classifier):
    torch.save(build(name, 6, width=0.1).state_dict(), tmp_path / "w.pth")
    report = load_pretrained(build(name, 3, width=0.1), str(tmp_path / "w.pth"))
    assert report.replaced == (f"{classifier}.weight", f"{classifier}.bias")


def test_a_classifier_of_another_width_is_not_another_number_of_classes(tmp_path, state):
    state["head.weight"] = torch.zeros(4, 12)
    torch.save(state, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "shape: head.weight [4, 12] (file) vs [10, 8] (network)")


def test_position_embeddings_of_another_image_size(tmp_path, state):
    """A linear ramp over the grid stays a linear ramp away from the border; the class token's row is untouched."""
    ramp = torch.arange(4.0).repeat(4)  # column index, row by row
    state["pos_embed"] = torch.cat([torch.full((1, 1, 8), 9.0), ramp[None, :, None].expand(1, 16, 8)], dim=1)
    torch.save(state, tmp_path / "w.pth")
    model = tiny(image_size=32)
    report = load_pretrained(model, str(tmp_path / "w.pth"))
    assert report.notes == ("position embeddings interpolated from 16 to 64 patches (bicubic)",)
    assert report.loaded == len(state)
    assert (model.pos_embed[0, 0] == 9).all()
    grid = model.pos_embed[0, 1:, 3].reshape(8, 8)
    torch.testing.assert_close(grid, grid[:1].expand(8, 8))  # no change from row to row
    assert abs(grid[0].mean() - 1.5) < 1e-5 and (grid[0].diff() > 0).all()
    torch.testing.assert_close(grid[0, 3:5], torch.tensor([1.25, 1.75]), atol=0.02, rtol=0)
    refused(tiny(head_dim=6), str(tmp_path / "w.pth"), "shape: pos_embed [1, 17, 8] (file) vs [1, 17, 12] (network)")


def test_counters_may_be_missing(tmp_path):
    source = randomised(build("resnet18", 3, width=0.1))
    state = {n: t for n, t in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    model = build("resnet18", 3, width=0.1)
    report = load_pretrained(model, str(tmp_path / "old.pth"))
    assert len(report.missing) == 20 and all(n.endswith("num_batches_tracked") for n in report.missing)
    assert report.loaded == len(state) and "20 num_batches_tracked" in report.notes[0]
    assert torch.equal(model.layer4[1].bn2.running_var, source.layer4[1].bn2.running_var)


def test_every_mismatch_is_listed(tmp_path, state):
    del state["norm.bias"], state["blocks.1.attn.qkv.bias"]
    state["dist_token"], state["odd\nname"] = torch.zeros(1), torch.zeros(1)
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 8)
    state["blocks.0.norm1.bias"] = torch.zeros(9)
    state["norm.weight"] = torch.ones(8, dtype=torch.int8)
    torch.save(state, tmp_path / "w.pth")
    message = refused(tiny(), str(tmp_path / "w.pth"), str(tmp_path / "w.pth"),
                      "missing: blocks.1.attn.qkv.bias, norm.bias", "unexpected: dist_token, 'odd\\nname'",
                      "shape: blocks.0.mlp.fc1.weight [5, 8] (file) vs [32, 8] (network)",
                      "shape: blocks.0.norm1.bias [9] (file) vs [8] (network)", "type: norm.weight torch.int8")
    assert message.count("shape:") == 2


def test_a_counter_that_is_not_a_whole_number(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch.save({**model.state_dict(), "1.num_batches_tracked": torch.tensor(0.5)}, tmp_path / "w.pth")
    refused(model, str(tmp_path / "w.pth"), "type: 1.num_batches_tracked torch.float32 (file) vs torch.int64")


def test_another_network_is_refused(tmp_path):
    torch.save(build("resnet18", 3, width=0.1).state_dict(), tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "missing: cls_token", "unexpected: conv1.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path, state, value):
    state["blocks.1.mlp.fc2.weight"][3, 2] = value
    torch.save(state, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "blocks.1.mlp.fc2.weight", "not finite")


def test_a_value_beyond_float32(tmp_path, state):
    state["norm.bias"] = torch.full((8,), 1e300, dtype=torch.float64)
    torch.save(state, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "norm.bias", "not finite")


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00", b"garbage" * 500, b"PK\x03\x04 not really", b"\x80\x02}q\x00(X",
                                     b"\xff" * 64, b"<!DOCTYPE html><html>404</html>"])
def test_garbage(tmp_path, suffix, content):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    refused(tiny(), str(path), str(path))


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated(tmp_path, state, suffix, keep):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        path.write_bytes(safetensors(state))
    path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    refused(tiny(), str(path), str(path))


@pytest.mark.parametrize("content", [
    struct.pack("<Q", 2 ** 63) + b"{}", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", struct.pack("<Q", 2) + b"{}" + b"\0" * 9,
    struct.pack("<Q", 100_000) + b"[" * 100_000])
def test_safetensors_headers_that_lie(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    refused(tiny(), str(path), str(path))


@pytest.mark.parametrize("field, value", [
    ("dtype", "F8_E4M3"), ("dtype", ["F32"]), ("dtype", None), ("shape", [9]), ("shape", [-8]), ("shape", [True] * 8),
    ("shape", 8), ("shape", {}), ("shape", [8.0]), ("shape", [2 ** 70]), ("shape", [1] * 50 + [8]),
    ("data_offsets", [0, 10 ** 12]), ("data_offsets", [-32, 0]), ("data_offsets", [64, 32]), ("data_offsets", [0]),
    ("data_offsets", [0.0, 32.0]), ("data_offsets", None)])
def test_safetensors_entries_that_lie(tmp_path, state, field, value):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(state, lambda header: header["norm.bias"].update({field: value})))
    refused(tiny(), str(path), str(path), "norm.bias is declared as")


def test_safetensors_data_that_no_tensor_or_two_claim(tmp_path, state):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(state) + bytes(4))
    refused(tiny(), str(path), str(path), "4 bytes belong to no tensor")
    path.write_bytes(safetensors(state, lambda header: header["norm.bias"].update(data_offsets=[0, 32])))
    refused(tiny(), str(path), str(path), "overlap")


def test_safetensors_scalar_whose_shape_is_no_list(tmp_path, state):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors({**state, "one": torch.tensor(1.0)}, lambda header: header["one"].update(shape={})))
    refused(tiny(), str(path), str(path), "one is declared as")


def test_safetensors_empty_tensor_of_absurd_sides(tmp_path, state):
    def tamper(header):
        header["extra"] = {"dtype": "F32", "shape": [0] + [4000] * 7, "data_offsets": [0, 0]}
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(state, tamper))
    refused(tiny(), str(path), "extra")


class Evil:
    """Unpickled, it would make the folder that it names."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, state, zipped):
    path, mark = tmp_path / "w.pth", tmp_path / "executed"
    if zipped:
        torch.save({**state, "evil": Evil(str(mark))}, path)
    else:
        path.write_bytes(pickle.dumps({"evil": Evil(str(mark))}, protocol=2))
    refused(tiny(), str(path), str(path), "besides tensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(str(mark))))
    assert mark.exists()  # the trap is a working one


def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("w/data.pkl", "w/constants.pkl", "w/code/__torch__.py", "w/version"):
            archive.writestr(name, b"x")
    refused(tiny(), str(path), str(path), "TorchScript")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("content, word", [({}, "no state dict"), ([1, 2], "no state dict"),
                                           ({"a": 1}, "'a' is a int"), ({1: torch.zeros(1)}, "1 is a Tensor"),
                                           ({"a": torch.zeros(2).to_sparse()}, "plain tensor")])
def test_files_without_a_state_dict(tmp_path, content, word):
    torch.save(content, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "w.pth", word)


def test_files_that_do_not_exist(tmp_path):
    refused(tiny(), str(tmp_path / "no.pth"), "no.pth", "no such file")
    refused(tiny(), str(tmp_path), "no such file")


def test_read_checkpoint_gives_the_files_own_names(tmp_path):
    torch.save({"model": {"features.0.0.weight": torch.ones(2)}}, tmp_path / "w.pth")
    assert list(read_checkpoint(str(tmp_path / "w.pth"))) == ["features.0.0.weight"]


def test_file_urls_go_through_the_weights_folder(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    url, kept = (tmp_path / "w.pth").as_uri(), tmp_path / "deep" / "weights"
    model = tiny()
    report = load_pretrained(model, url, weights_dir=str(kept))
    assert same(state, model) and report.source == url
    assert [os.path.join(str(kept), name) for name in os.listdir(kept)] == [weights_path(url, str(kept))]
    state["norm.bias"] += 1
    torch.save(state, tmp_path / "w.pth")  # the URL's file changes; the copy must follow
    load_pretrained(model, url, weights_dir=str(kept))
    assert same(state, model)


def test_urls_that_fail(tmp_path):
    kept = str(tmp_path / "weights")
    refused(tiny(), "file:///nonexistent/w.pth", "file:///nonexistent/w.pth", weights_path("file:///nonexistent/w.pth",
            kept), weights_dir=kept)
    refused(tiny(), "http://127.0.0.1:9/x-0123abcd.pth", "http://127.0.0.1:9/x-0123abcd.pth",
            os.path.join(kept, "x-0123abcd.pth"), weights_dir=kept)
    assert os.listdir(kept) == []
    refused(tiny(), "ftp://host/w.pth", "ftp://host/w.pth", "http", weights_dir=kept)
    refused(tiny(), "http://host/", "http://host/", weights_dir=kept)
    refused(tiny(), "http://[host/w.pth", "http://[host/w.pth", weights_dir=kept)
    (tmp_path / "file").write_text("")
    refused(tiny(), (tmp_path / "file").as_uri(), weights_dir=str(tmp_path / "file"))


def test_the_hash_in_a_urls_name_is_checked(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    good, bad, kept = tmp_path / f"w-{digest[:8]}.pth", tmp_path / "w-00000000.pth", tmp_path / "weights"
    for path in (good, bad):
        path.write_bytes((tmp_path / "w.pth").read_bytes())
    load_pretrained(tiny(), good.as_uri(), weights_dir=str(kept))
    refused(tiny(), bad.as_uri(), "SHA-256", "00000000", weights_dir=str(kept))
    assert os.listdir(kept) == [good.name]


def test_a_file_put_by_hand_is_used_without_a_network(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for url in (f"http://127.0.0.1:9/w-{digest[:8]}.pth", "http://127.0.0.1:9/a/model.pth?version=2"):
        path = weights_path(url, str(tmp_path))
        with open(path, "wb") as file:
            file.write(content)
        model = tiny()
        load_pretrained(model, url, weights_dir=str(tmp_path))
        assert same(state, model)
    wrong = "http://127.0.0.1:9/w-00000000.pth"
    with open(weights_path(wrong, str(tmp_path)), "wb") as file:
        file.write(content)
    refused(tiny(), wrong, "w-00000000.pth", "SHA-256", weights_dir=str(tmp_path))


def test_the_answer_of_a_server_that_stops_early_is_not_kept(tmp_path, monkeypatch):
    class Answer:
        headers, parts = {"Content-Length": str(3 << 20)}, [b"x" * (1 << 20)] * 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, _):
            return self.parts.pop() if self.parts else b""

    monkeypatch.setattr(models.urllib.request, "urlopen", lambda url, timeout: Answer())
    seen = []
    refused(tiny(), "https://host/w.pth", "https://host/w.pth", f"{2 << 20} of {3 << 20} bytes",
            weights_dir=str(tmp_path), progress=lambda what, done, total: seen.append((what, done, total)))
    assert os.listdir(tmp_path) == []
    assert seen == [("downloading host_w.pth (MB)", 1, 3), ("downloading host_w.pth (MB)", 2, 3)]


def test_names_in_the_weights_folder():
    assert weights_path(models.PRETRAINED["resnet18"], "weights") == os.path.join("weights", "resnet18-f37072fd.pth")
    clip = weights_path(models.PRETRAINED["vit_base_patch32_clip_224"], "w")
    assert "vit_base_patch32_clip_224" in clip and clip.endswith("model.safetensors")
    assert weights_path("http://h/a/m.pt") != weights_path("http://h/b/m.pt") != weights_path("http://h/b/m.pt?v=2")
    assert os.path.dirname(weights_path("http://h/%2e%2e/..%2fx.pt", "w")) == "w"
    assert all(url.startswith("https://") for url in models.PRETRAINED.values())
