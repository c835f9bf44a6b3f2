"""Networks against independent references, and the block structure of SPEC section 3."""

import os
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import models  # noqa: E402
from compress import kernel_shapes  # noqa: E402
from config import NETWORKS, InputError  # noqa: E402
from models import VisionTransformer, build, find_blocks, load_pretrained  # noqa: E402


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

COUNTS = {"deit_tiny_patch16_224": (12, 48, 5_308_416), "deit_small_patch16_224": (12, 48, 21_233_664),
          "deit_base_patch16_224": (12, 48, 84_934_656), "vit_base_patch32_clip_224": (12, 48, 84_934_656),
          "resnet18": (5, 17, 10_994_880), "mobilenetv2_100": (13, 51, 1_780_160), "resnet50": (13, 49, 20_686_016)}
# Published sizes of the whole networks with 1000 classes.
PARAMETERS = {"deit_tiny_patch16_224": 5_717_416, "deit_small_patch16_224": 22_050_664,
              "deit_base_patch16_224": 86_567_656, "vit_base_patch32_clip_224": 88_225_000, "resnet18": 11_689_512,
              "mobilenetv2_100": 3_504_872, "resnet50": 25_557_032}


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


# Scope


@pytest.mark.parametrize("name, width, extra", [
    ("deit_small_patch16_224", 0.125, ["patch_embed.proj", "head"]),
    ("resnet18", 0.125, [f"layer{n}.0.downsample.0" for n in (2, 3, 4)] + ["fc"]),
    ("mobilenetv2_100", 0.25, ["conv_head", "classifier"])])
def test_scope_all_adds_blocks_and_changes_none(name, width, extra):
    model = models.build(name, 10, 32, width)
    paper, everything = (models.survey(model, scope=scope) for scope in ("paper", "all"))
    assert [list(b.kernels) for b in everything.blocks[:-1]] == [list(b.kernels) for b in paper.blocks]
    last = everything.blocks[-1]
    assert list(last.kernels) == extra and last.whole == (extra[-1],) and not everything.excluded
    assert [shape.prunable for shape in kernel_shapes(last)] == [True] * (len(extra) - 1) + [False]
    assert all(shape.prunable for block in paper.blocks for shape in kernel_shapes(block))
    assert all(f"{kernel}.weight" in last.parameters for kernel in extra)


def test_scope_all_of_mobilenetv2_holds_nearly_all_parameters():
    model = models.build("mobilenetv2_100", 200)
    sizes = {scope: sum(k.params for k in models.survey(model, scope=scope).compressed) for scope in ("paper", "all")}
    assert sizes == {"paper": 1_780_160, "all": 1_780_160 + 320 * 1280 + 1280 * 200}


def test_scope_all_of_a_network_of_one_s_own_takes_classifier_and_shortcuts_but_not_what_is_excluded():
    model = torchvision.models.resnet18(num_classes=7)
    images = torch.randn(2, 3, 32, 32)
    found = models.survey(model, images, exclude=["layer2.0.downsample.0"], scope="all")
    assert list(found.blocks[-1].kernels) == ["layer3.0.downsample.0", "layer4.0.downsample.0", "fc"]
    assert found.blocks[-1].whole == ("fc",)
    assert [k.name for k in found.excluded] == ["layer2.0.downsample.0"]
