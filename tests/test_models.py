"""Networks against independent references, and the block structure of the paper (§3.2)."""

import re
from types import MethodType

import pytest
import torch
import torchvision
from torch import nn

import models
from compress import kernel_shapes
from config import NETWORKS, InputError
from models import VisionTransformer, build, find_blocks, load_pretrained
from networks import equal, randomised


def images(count, side, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tiny(classes=10, **settings):
    """A two-block ViT of 8 channels, 17 tokens."""
    return VisionTransformer(classes, **{**dict(image_size=16, patch=4, heads=2, head_dim=4, depth=2), **settings})


# Blocks, kernels, their parameters, and the published size of the whole network with 1000 classes.
COUNTS = {"deit_tiny_patch16_224": (12, 48, 5_308_416, 5_717_416),
          "deit_small_patch16_224": (12, 48, 21_233_664, 22_050_664),
          "deit_base_patch16_224": (12, 48, 84_934_656, 86_567_656),
          "vit_base_patch32_clip_224": (12, 48, 84_934_656, 88_225_000), "resnet18": (5, 17, 10_994_880, 11_689_512),
          "mobilenetv2_100": (13, 51, 1_780_160, 3_504_872), "resnet50": (13, 49, 20_686_016, 25_557_032)}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_paper(name):
    with torch.device("meta"):
        model = build(name, 1000)
    assert set(NETWORKS) == set(COUNTS) == set(models.VITS) | set(models.CNNS) == set(models.PRETRAINED)
    blocks = find_blocks(model)
    kernels = [kernel for block in blocks for kernel in block.kernels.values()]
    assert (len(blocks), len(kernels), sum(k.weight.numel() for k in kernels),
            sum(p.numel() for p in model.parameters())) == COUNTS[name]
    assert [len(block.kernels) for block in blocks[:-1]] == [4] * (len(blocks) - 1)
    assert len({block.name for block in blocks}) == len(blocks)


@pytest.mark.parametrize("name", COUNTS)
def test_narrow_networks_keep_the_structure(name):
    narrow = build(name, 7, image_size=32, width=0.25, patch_size=8 if name in models.VITS else 0).eval()
    with torch.device("meta"):
        full = build(name, 7)
    assert [list(b.kernels) for b in find_blocks(narrow)] == [list(b.kernels) for b in find_blocks(full)]
    assert list(narrow.state_dict()) == list(full.state_dict())
    assert all(len(kernel.weight) < len(wide.kernels[name].weight) for block, wide in
               zip(find_blocks(narrow), find_blocks(full)) for name, kernel in block.kernels.items())
    logits = narrow(images(3, 32))
    assert logits.shape == (3, 7) and logits.isfinite().all() and logits.std(dim=0).min() > 0


def test_narrow_networks_have_the_same_shortcuts():
    """Rounding can make input and output widths equal where the full network's differ; structure must not follow."""
    assert [models.scale_channels(c, 0.01) for c in (32, 64, 320)] == [4, 4, 4]
    assert [models.scale_channels(c, 0.25) for c in (16, 24, 32, 96, 1280)] == [4, 8, 8, 24, 320]
    assert [build("deit_small_patch16_224", 2, 32, w, 8).cls_token.shape[-1] for w in (0.25, 0.01)] == [6 * 16, 6 * 4]
    model = build("mobilenetv2_100", 2, width=0.1)
    assert model.blocks[0][0].conv_dw.in_channels == model.blocks[0][0].conv_pw.out_channels
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    shortcuts = [[block.shortcut for block in group] for group in model.blocks[1:]]
    assert shortcuts == [[False] + [True] * (n - 1) for n in (2, 3, 4, 3, 3, 1)]
    assert build("resnet18", 2, width=0.01).layer2[0].downsample is not None
    assert build("resnet18", 2, width=0.1).layer1[0].downsample is None


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
    with pytest.raises(InputError, match="8 x 8 .* 16 x 16"):
        tiny()(images(1, 8))


def assert_same_logits(model, reference):
    x = images(2, 64)
    with torch.no_grad():
        expected = reference(x)
        assert expected.std() > 0.05
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, file", [("resnet18", "resnet18"), ("resnet50", "resnet50"),
                                        ("mobilenetv2_100", "mobilenet_v2")])
def test_cnns_equal_torchvisions_through_their_files(tmp_path, name, file):
    reference, model = randomised(getattr(torchvision.models, file)(num_classes=11)), build(name, 11).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d) and file == "mobilenet_v2":
            module.weight.data.mul_(4)  # activations beyond 6, where ReLU6 differs from ReLU
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    assert load_pretrained(model, tmp_path / "w.pth").loaded == len(model.state_dict())
    assert_same_logits(model, reference)


def test_vit_equals_torchvisions():
    """DeiT-Tiny under other names; LayerNorm has the same eps, 1e-6."""
    reference = randomised(torchvision.models.VisionTransformer(64, 16, 12, 3, 192, 768, num_classes=9))
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
    model = build("deit_tiny_patch16_224", 9, image_size=64).eval()
    model.load_state_dict(state)
    assert_same_logits(model, reference)


def test_clip_differs_from_deit_as_its_definition_says():
    """Its forward is compared with OpenAI's definition where its file is loaded."""
    model = build("vit_base_patch32_clip_224", 3, width=0.01)
    assert model.patch_embed.proj.kernel_size == (32, 32) and not models.has_quick_gelu(model)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in tiny().modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_initialisation_is_the_seeds():
    torch.manual_seed(3)
    first = build("mobilenetv2_100", 4, width=0.1)
    torch.manual_seed(3)
    assert equal(first.state_dict(), build("mobilenetv2_100", 4, width=0.1).state_dict())
    assert not equal(first.state_dict(), build("mobilenetv2_100", 4, width=0.1).state_dict())
    vit = build("deit_small_patch16_224", 100, 32, 1.0, 8)
    assert abs(vit.head.weight.std().item() - 0.02) < 1e-3 and not vit.blocks[0].attn.qkv.bias.any()
    resnet = build("resnet18", 4)
    assert abs(resnet.layer1[0].conv1.weight.std().item() - (2 / (64 * 9)) ** 0.5) < 1e-3


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "resnet18", "mobilenetv2_100"])
def test_autocast(name):
    model, x = build(name, 5, 32, 0.25, 8 if name in models.VITS else 0).eval(), images(2, 32)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < 0.1 * full.abs().max()


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
    assert all(f"{kernel}.weight" in last.parameters for kernel in extra)


def test_scope_all_of_another_network_takes_classifier_and_shortcuts_but_not_what_is_excluded():
    other = type("Mine", (models.ResNet,), {})(7, False, (1, 1, 1, 1), 0.125)  # its forward may be another one
    assert len(models.stages(other)) == 1 and models.survey(other, images(2, 32)).compressed
    model = torchvision.models.resnet18(num_classes=7)
    found = models.survey(model, images(2, 32), exclude=["layer2.0.downsample.0"], scope="all")
    assert list(found.blocks[-1].kernels) == ["layer3.0.downsample.0", "layer4.0.downsample.0", "fc"]
    assert found.blocks[-1].whole == ("fc",)
    assert [k.name for k in found.excluded] == ["layer2.0.downsample.0"]


@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "head", nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 5))),
    lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()),
    lambda m: m.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],)),
    lambda m: m.blocks.register_forward_hook(lambda _, inputs, x: 2 * x),
    lambda m: setattr(m, "forward", MethodType(lambda self, x: VisionTransformer.forward(self, 2 * x), m))])
def test_a_network_that_was_changed_is_taken_as_it_runs(change):
    model = tiny(5)
    assert len(models.stages(model)) == 4
    change(model)
    assert len(models.stages(model)) == 1 and not models.has_quick_gelu(model)
    found = models.survey(model, images(2, 16))
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert {k.name: k.classifier for k in found.compressed + found.excluded} == {n: n == names[-1] for n in names}
