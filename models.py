"""The networks of the paper, the blocks that its agents compress, and checkpoint files (SPEC 3 and 4; paper §3.2).

Networks are written out here and carry the parameter names of the checkpoints that people have: timm's for the
ViTs and MobileNetV2, torchvision's (which are timm's too) for the ResNets. Nothing here touches a model hub: a
file or a URL is read, checked against the network and copied in, or refused with every reason at once.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import re
import struct
import tempfile
import urllib.parse
import urllib.request
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from config import InputError

# ---------------------------------------------------------------------------------------------------------------
# Vision transformers (DeiT, CLIP)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation with which OpenAI trained CLIP."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class PatchEmbed(nn.Module):
    def __init__(self, patch, width, bias):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch, bias=bias)

    def forward(self, x):  # [B, 3, H, W]
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, patches, C]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, T, d]
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # [B, heads, T, d]
        return self.proj(x.transpose(1, 2).reshape(B, T, -1))  # [B, T, C]


class Mlp(nn.Module):
    def __init__(self, width, quick_gelu):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class EncoderBlock(nn.Module):
    """Pre-norm: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width, heads, eps, quick_gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, quick_gelu)

    def forward(self, x):  # [B, T, C]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # [B, T, C]


class VisionTransformer(nn.Module):
    """Images [B, 3, S, S] with S = ``image_size`` → logits [B, num_classes]; class token, learned positions.

    ``embed`` = ``heads`` × ``head_dim``. ``clip=True`` is CLIP's image tower: LayerNorm ``norm_pre`` before the
    blocks, no bias in the patch convolution, LayerNorm eps 1e-5 in place of 1e-6; ``quick_gelu=True`` for weights
    that OpenAI released. InputError when ``patch`` does not divide ``image_size``, or an image has another size.
    """

    classifier_name = "head"

    def __init__(self, num_classes, image_size=224, patch=16, heads=6, head_dim=64, depth=12, clip=False,
                 quick_gelu=False):
        super().__init__()
        if image_size % patch:
            raise InputError(f"image size {image_size} is not a multiple of the patch size {patch}; "
                             "set data.image_size or model.patch_size")
        embed, eps = heads * head_dim, 1e-5 if clip else 1e-6
        self.image_size = image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, embed))
        self.patch_embed = PatchEmbed(patch, embed, bias=not clip)
        self.norm_pre = nn.LayerNorm(embed, eps=eps) if clip else nn.Identity()
        self.blocks = nn.Sequential(*(EncoderBlock(embed, heads, eps, quick_gelu) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed, eps=eps)
        self.head = nn.Linear(embed, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # Unit-variance tokens whatever the patch size: a fixed 0.02 would vanish for patches of a few pixels.
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=(3 * patch * patch) ** -0.5)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)

    def forward(self, x):
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(f"images of {x.shape[-2]} x {x.shape[-1]} pixels for a network built for "
                             f"{self.image_size} x {self.image_size}")
        x = self.patch_embed(x)  # [B, patches, C]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # [B, T, C]
        x = self.norm(self.blocks(self.norm_pre(x)))  # [B, T, C]
        return self.head(x[:, 0])  # [B, classes]


# ---------------------------------------------------------------------------------------------------------------
# ResNets


def scale_channels(channels, width):
    """A CNN's channel count times ``width``: the nearest multiple of 4, at least 4, one step up where that would
    lose more than a tenth (MobileNetV2's rule). Every count of the paper's networks stays itself at width 1."""
    wanted = channels * width
    scaled = max(4, 4 * int(wanted / 4 + 0.5))
    return scaled + 4 if scaled < 0.9 * wanted else scaled


def conv(inputs, outputs, size, stride=1, groups=1):
    """A convolution before a BatchNorm: no bias, padded so that stride 1 keeps the resolution."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)."""

    expansion = 1

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1 = conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None

    def forward(self, x):  # [B, inputs, H, W]
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = self.downsample(x) if self.downsample is not None else x
        return F.relu(y + shortcut)  # [B, planes, H/stride, W/stride]


class Bottleneck(nn.Module):
    """1×1, 3×3 (which carries the stride, as in torchvision), 1×1 to four times ``planes``."""

    expansion = 4

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1 = conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None

    def forward(self, x):  # [B, inputs, H, W]
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = self.downsample(x) if self.downsample is not None else x
        return F.relu(y + shortcut)  # [B, 4 planes, H/stride, W/stride]


class ResNet(nn.Module):
    """Images [B, 3, H, W] of any size → logits [B, num_classes]; the ordinary 7×7 stem at every resolution."""

    classifier_name = "fc"

    def __init__(self, num_classes, block, repeats, width=1.0):
        super().__init__()
        inputs = scale_channels(64, width)
        self.conv1 = conv(3, inputs, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(inputs)
        for stage, repeat in enumerate(repeats):
            planes, blocks = scale_channels(64 * 2 ** stage, width), []
            for index in range(repeat):
                stride = 2 if stage and not index else 1
                blocks.append(block(inputs, planes, stride))
                # By position, not by channel counts, so that a narrow network has the same shortcuts.
                if index == 0 and (stage or block.expansion > 1):
                    blocks[-1].downsample = nn.Sequential(conv(inputs, planes * block.expansion, 1, stride),
                                                          nn.BatchNorm2d(planes * block.expansion))
                inputs = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # [B, C, H/2, W/2]
        x = F.max_pool2d(x, 3, stride=2, padding=1)  # [B, C, H/4, W/4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 8 C · expansion, H/32, W/32]
        return self.fc(x.mean((2, 3)))  # [B, classes]


# ---------------------------------------------------------------------------------------------------------------
# MobileNetV2

# Expansion, channels, repeats, stride of the first: Table 2 of the MobileNetV2 paper.
MOBILENET_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                    (6, 320, 1, 1))


class DepthwiseSeparable(nn.Module):
    """The first block: 3×3 per channel, then a linear 1×1; no expansion and no shortcut."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_dw = conv(inputs, inputs, 3, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = conv(inputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):  # [B, inputs, H, W]
        x = F.relu6(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(x))  # [B, outputs, H, W]


class InvertedResidual(nn.Module):
    """1×1 to ``expansion`` × inputs, 3×3 per channel, linear 1×1; plus its input where ``shortcut``."""

    def __init__(self, inputs, outputs, expansion, stride, shortcut):
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = shortcut
        self.conv_pw = conv(inputs, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv_dw = conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv_pwl = conv(hidden, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x):  # [B, inputs, H, W]
        y = F.relu6(self.bn1(self.conv_pw(x)))
        y = F.relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))  # [B, outputs, H/stride, W/stride]
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Images [B, 3, H, W] of any size → logits [B, num_classes].

    No dropout before the classifier: that is timm's default for ``mobilenetv2_100`` (torchvision's has 0.2).
    """

    classifier_name = "classifier"

    def __init__(self, num_classes, width=1.0):
        super().__init__()
        inputs = scale_channels(32, width)
        self.conv_stem = conv(3, inputs, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(inputs)
        stages = []
        for expansion, channels, repeats, first_stride in MOBILENET_STAGES:
            outputs, blocks = scale_channels(channels, width), []
            for index in range(repeats):
                if expansion == 1:
                    blocks.append(DepthwiseSeparable(inputs, outputs))
                else:
                    stride = 1 if index else first_stride
                    blocks.append(InvertedResidual(inputs, outputs, expansion, stride, shortcut=index > 0))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        last = scale_channels(1280, width)
        self.conv_head = conv(inputs, last, 1)
        self.bn2 = nn.BatchNorm2d(last)
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        x = F.relu6(self.bn1(self.conv_stem(x)))  # [B, 32, H/2, W/2]
        x = self.blocks(x)  # [B, 320, H/32, W/32]
        x = F.relu6(self.bn2(self.conv_head(x)))  # [B, 1280, H/32, W/32]
        return self.classifier(x.mean((2, 3)))  # [B, classes]


# ---------------------------------------------------------------------------------------------------------------
# By name

VITS = {"deit_small_patch16_224": dict(patch=16, heads=6),
        "deit_base_patch16_224": dict(patch=16, heads=12),
        "vit_base_patch32_clip_224": dict(patch=32, heads=12, clip=True)}
CNNS = {"resnet18": lambda classes, width: ResNet(classes, BasicBlock, (2, 2, 2, 2), width),
        "resnet50": lambda classes, width: ResNet(classes, Bottleneck, (3, 4, 6, 3), width),
        "mobilenetv2_100": lambda classes, width: MobileNetV2(classes, width)}

# Published weights for ``--weights auto``; names that end in -xxxxxxxx carry the first digits of their SHA-256.
PRETRAINED = {
    "deit_small_patch16_224": "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
    "vit_base_patch32_clip_224": "https://huggingface.co/timm/vit_base_patch32_clip_224.laion2b_ft_in12k_in1k"
                                 "/resolve/main/model.safetensors",
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "mobilenetv2_100": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
}


def build(name: str, num_classes: int, image_size: int = 224, width: float = 1.0, patch_size: int = 0) -> nn.Module:
    """A freshly initialised network of SPEC section 3 (global torch generator: the caller seeds).

    ``width`` scales channels and keeps blocks and kernels: a ViT keeps depth and heads and narrows each head (at
    least 4 channels), a CNN scales every stage (:func:`scale_channels`). ``patch_size`` in pixels replaces a
    ViT's own where it is not 0. A CNN takes images of any size. Raises InputError for an unknown name, a patch
    that does not divide ``image_size``, ``patch_size`` with a CNN, and sizes that are not positive.
    """
    if name not in VITS and name not in CNNS:
        raise InputError(f"unknown network '{name}'; known: {', '.join([*VITS, *CNNS])}")
    if num_classes < 1 or image_size < 1 or patch_size < 0 or not (0 < width < math.inf):
        raise InputError(f"cannot build {name} with {num_classes} classes, image size {image_size}, width {width}, "
                         f"patch size {patch_size}: sizes must be positive")
    if name in CNNS:
        if patch_size:
            raise InputError(f"patch size {patch_size} given for {name}, which has no patches; leave it at 0")
        return CNNS[name](num_classes, width)
    settings = dict(VITS[name], image_size=image_size, head_dim=max(4, round(64 * width)))
    if patch_size:
        settings["patch"] = patch_size
    return VisionTransformer(num_classes, **settings)


# ---------------------------------------------------------------------------------------------------------------
# Blocks and kernels (paper §3.2)


@dataclass
class Block:
    """A group of kernels that one low-level ensemble configures (B_i of the paper).

    ``kernels``: full dotted name → Conv2d/Linear module, ordered; the kernel itself is its ``weight``.
    ``parameters``: full dotted names of the parameters whose Fisher information makes up s_i (SPEC section 4):
    everything under the encoder block for ViTs, the weights and biases of its own kernels otherwise.
    """
    name: str
    kernels: dict[str, nn.Module]
    parameters: tuple[str, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of ``model`` in order (SPEC section 3; paper §3.2).

    ViT: {qkv, attn.proj, mlp.fc1, mlp.fc2} of each encoder block. The CNNs here: every Conv2d/Linear in forward
    order but the classifier, the down-sample projections and MobileNetV2's last 1×1 convolution, in groups of
    four. Any other module: its Conv2d/Linear in registration order but the classifier (:func:`classifier_name`),
    in groups of four. Raises InputError where that leaves nothing to compress.
    """
    if isinstance(model, VisionTransformer):
        return [Block(f"blocks.{i}",
                      {f"blocks.{i}.{part}": block.get_submodule(part)
                       for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
                      tuple(f"blocks.{i}.{name}" for name, _ in block.named_parameters()))
                for i, block in enumerate(model.blocks)]
    ours = isinstance(model, (ResNet, MobileNetV2))
    classifier, kernels, seen = classifier_name(model), {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or name == classifier:
            continue
        if ours and (".downsample." in name or name == "conv_head"):
            continue
        if id(module.weight) not in seen:  # a weight shared by two modules is one kernel
            seen.add(id(module.weight))
            kernels[name] = module
    if not kernels:
        raise InputError(f"{type(model).__name__}: no Conv2d or Linear besides the classifier, nothing to compress")
    names, blocks = list(kernels), []
    for first in range(0, len(names), 4):
        group = {name: kernels[name] for name in names[first:first + 4]}
        parameters = tuple(f"{name}.{leaf}" if name else leaf
                           for name, module in group.items() for leaf, _ in module.named_parameters())
        blocks.append(Block(f"group{first // 4}", group, parameters))
    return blocks


def classifier_name(model: nn.Module) -> str | None:
    """Dotted name of the module that gives the logits: the network's own, else the last Linear in registration
    order, else the last Conv2d if it is 1×1, else None."""
    if isinstance(model, (VisionTransformer, ResNet, MobileNetV2)):
        return model.classifier_name
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        return linear[-1]
    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return convs[-1][0] if convs and convs[-1][1].kernel_size == (1, 1) else None


# ---------------------------------------------------------------------------------------------------------------
# Loading weights


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did. ``loaded``: number of tensors copied. ``replaced``: classifier tensors
    left at their initialisation because the file has another number of classes. ``missing``, ``unexpected``:
    names that were tolerated (BatchNorm's ``num_batches_tracked``, absent from older files)."""
    source: str
    loaded: int
    replaced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_pretrained(model: nn.Module, source: str, weights_dir: str = "weights", progress=None) -> LoadReport:
    """Copy a checkpoint into ``model``, in place; all of it fits or nothing is changed.

    ``source``: a local .pth, .pt, .bin (``torch.save``, read with ``weights_only=True``) or .safetensors file, or
    a http(s)/file URL, which is kept in ``weights_dir`` (:func:`weights_path`). ``progress(what, done, total)`` is
    called while a download runs, in MB. A classifier for another number of classes keeps its initialisation,
    position embeddings of another image size are interpolated, other precisions become float32; the report says
    so. Raises InputError, one line, for a file that is absent, damaged, unsafe or not finite, and for every name
    and shape that does not fit.
    """
    source = os.fspath(source)
    is_url = "://" in source or source.startswith("file:")
    path = _download(source, weights_dir, progress) if is_url else os.path.expanduser(source)
    state = convert_layout(read_checkpoint(path), model)
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    notes = []

    converted = sum(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in state.values())
    if converted:
        notes.append(f"{converted} tensors of another precision converted to float32")
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.float()
            if not state[name].isfinite().all():
                raise InputError(f"{path}: tensor {_shown(name)} holds values that are not finite in float32")

    replaced = _other_classes(model, state, own)
    if replaced:
        weight = replaced[0]
        notes.append(f"classifier left at its initialisation: {len(state[weight])} classes in the file, "
                     f"{len(own[weight])} in the network")
    if isinstance(model, VisionTransformer) and "pos_embed" in state:
        resized = _resized_positions(state["pos_embed"], own["pos_embed"])
        if resized is not None:
            notes.append(f"position embeddings interpolated from {state['pos_embed'].shape[1] - 1} to "
                         f"{resized.shape[1] - 1} patches (bicubic)")
            state["pos_embed"] = resized

    unmatched = [name for name in own if name not in state]
    missing = [name for name in unmatched if not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    problems = []
    if missing:
        problems.append("missing: " + ", ".join(missing))
    if unexpected:
        problems.append("unexpected: " + ", ".join(map(_shown, unexpected)))
    for name in own:
        if name in state and name not in replaced:
            if state[name].shape != own[name].shape:
                problems.append(f"shape: {name} {list(state[name].shape)} (file) vs {list(own[name].shape)} (network)")
            elif state[name].is_floating_point() != own[name].is_floating_point():
                problems.append(f"type: {name} {state[name].dtype} (file) vs {own[name].dtype} (network)")
    if problems:
        raise InputError(f"{path} does not fit the network; " + "; ".join(problems))

    with torch.no_grad():
        for name, tensor in own.items():
            if name in state and name not in replaced:
                tensor.copy_(state[name])
    tolerated = tuple(name for name in unmatched if name not in missing)
    if tolerated:
        notes.append(f"{len(tolerated)} num_batches_tracked counters are not in the file and keep their values")
    return LoadReport(source, len(own) - len(tolerated) - len(replaced), replaced, tolerated, (), tuple(notes))


def convert_layout(state: dict, model: nn.Module) -> dict:
    """A checkpoint's tensors under this file's names. Other layouts are told apart by their names; a name that
    no layout knows stays as it is, so that it is reported as unexpected."""
    if state and all(name.startswith("module.") for name in state) and not hasattr(model, "module"):  # DataParallel's
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if isinstance(model, MobileNetV2) and "features.0.0.weight" in state:
        table = _torchvision_mobilenet()
        renamed = {}
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            renamed[f"{table[module]}.{leaf}" if module in table else name] = tensor
        return renamed
    return dict(state)


def _torchvision_mobilenet():
    """torchvision's module names → ours."""
    table = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2",
             "classifier.1": "classifier"}
    separable = ("conv_dw", "conv.0.0"), ("bn1", "conv.0.1"), ("conv_pw", "conv.1"), ("bn2", "conv.2")
    inverted = (("conv_pw", "conv.0.0"), ("bn1", "conv.0.1"), ("conv_dw", "conv.1.0"), ("bn2", "conv.1.1"),
                ("conv_pwl", "conv.2"), ("bn3", "conv.3"))
    index = 0
    for stage, (expansion, _, repeats, _) in enumerate(MOBILENET_STAGES):
        for block in range(repeats):
            index += 1
            for ours, theirs in separable if expansion == 1 else inverted:
                table[f"features.{index}.{theirs}"] = f"blocks.{stage}.{block}.{ours}"
    return table


def _other_classes(model, state, own):
    """Names of the classifier's tensors where the file's differ in the number of classes alone, else ()."""
    weight, bias = f"{classifier_name(model)}.weight", f"{classifier_name(model)}.bias"
    if weight not in own or weight not in state or (bias in own) != (bias in state):
        return ()
    old, new = state[weight], own[weight]
    if old.ndim != new.ndim or old.shape[1:] != new.shape[1:] or len(old) == len(new):
        return ()
    if bias not in own:
        return (weight,)
    return (weight, bias) if state[bias].shape == old.shape[:1] else ()


def _resized_positions(old, new):
    """[1, 1 + g², C] → [1, 1 + G², C] as ``new``, the class token's row kept, bicubic with anti-aliasing (as timm);
    None where another number of patches is not the difference."""
    if old.ndim != 3 or old.shape == new.shape or old.shape[0] != 1 or old.shape[2] != new.shape[2]:
        return None
    before, after = math.isqrt(max(old.shape[1] - 1, 0)), math.isqrt(new.shape[1] - 1)
    if before < 1 or before ** 2 != old.shape[1] - 1 or not old.is_floating_point():
        return None
    grid = old[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)  # [1, C, g, g]
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([old[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + G², C]


def _shown(name):
    """A name from a file, fit for a one-line message."""
    return name if name.isprintable() else ascii(name)


# ---------------------------------------------------------------------------------------------------------------
# Files and URLs


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file on the CPU, by the file's own names, out of {"model": …} or
    {"state_dict": …}. Nothing in the file is executed. Raises InputError for whatever cannot be used."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; give a checkpoint with --weights, or --weights none")
    try:
        if path.endswith(".safetensors"):
            state = _read_safetensors(path)
        else:
            state = _read_torch(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    for _ in range(2):
        for wrapper in ("model", "state_dict"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: holds no state dict of tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: not a state dict: entry {ascii(name)[:80]} is a {type(value).__name__}, "
                             "not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
            raise InputError(f"{path}: {_shown(name)} is not a plain tensor of numbers")
    return dict(state)


def _read_torch(path):
    if not os.path.getsize(path):
        raise InputError(f"{path}: the file is empty")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                script = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if script:
                raise InputError(f"{path}: a TorchScript archive holds code and is not read; "
                                 "save the network's state_dict() with torch.save")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, OSError):
        raise
    except Exception as error:  # torch.load raises almost anything on damaged input
        raise InputError(f"{path}: damaged, or holds Python objects besides tensors, which are not loaded "
                         f"({type(error).__name__}); save the network's state_dict() with torch.save") from None


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                      "U8": torch.uint8, "BOOL": torch.bool}


def _read_safetensors(path):
    """8 bytes: header length, little-endian; JSON header: name → dtype, shape, data_offsets; then the raw data.
    Every number of the header is checked against the file's size before anything is allocated."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size < 8:
            raise InputError(f"{path}: {size} bytes are too few for a safetensors file")
        length, = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise InputError(f"{path}: not a safetensors file, or truncated: a header of {length} bytes "
                             f"in a file of {size}")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise InputError(f"{path}: not a safetensors file: its header is not a JSON object")
        header.pop("__metadata__", None)
        room, state, spans = size - 8 - length, {}, []
        for name, entry in header.items():
            try:
                dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                sound = isinstance(shape, list) and len(shape) <= 8 and \
                    all(type(n) is int and 0 <= n <= room for n in (*shape, begin, end)) and \
                    end - begin == math.prod(shape) * dtype.itemsize and \
                    math.prod(n or 1 for n in shape) <= max(room, 1)  # an empty tensor can claim any other side
            except (KeyError, TypeError, ValueError):
                sound = False
            if not sound:
                raise InputError(f"{path}: damaged, truncated or of a type besides {', '.join(SAFETENSORS_DTYPES)}: "
                                 f"{_shown(name)} is declared as {ascii(entry)[:120]} in {room} bytes of data")
            file.seek(8 + length + begin)
            data = bytearray(file.read(end - begin))
            tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            state[name] = tensor.reshape(shape)
            spans.append((begin, end))
    last = 0
    for begin, end in sorted(spans):
        if begin != last:
            raise InputError(f"{path}: damaged safetensors file: its tensors overlap or leave gaps")
        last = end
    if last != room:
        raise InputError(f"{path}: damaged safetensors file: {room - last} bytes belong to no tensor")
    return state


def weights_path(url: str, weights_dir: str = "weights") -> str:
    """Where the file of ``url`` is kept, and where to put it by hand on a machine without a network: its own name
    where that carries a hash (…-cd65a155.pth), else host and path, since many files are called model.safetensors."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url}: not a URL ({error})") from None
    path = urllib.parse.unquote(parts.path)
    name = path.rpartition("/")[2]
    if not name.strip("."):
        raise InputError(f"{url}: does not name a file")
    if not _hash_prefix(name):  # the query goes in front: the suffix tells the format
        name = re.sub(r"[^\w.-]+", "_", f"{parts.hostname or ''}{parts.query}{path}").strip("_")
    return os.path.join(weights_dir, name)


def _hash_prefix(name):
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    return found.group(1) if found else ""


def _download(url, weights_dir, progress):
    """The local path of a URL's file: what ``weights_dir`` has already (but for file: URLs, which may have changed),
    else downloaded under a temporary name and moved into place when whole."""
    if not re.match("(https?|file):", url):
        raise InputError(f"{url}: only http, https and file URLs are read")
    target = weights_path(url, weights_dir)
    wanted = _hash_prefix(os.path.basename(target))
    if os.path.isfile(target) and not url.startswith("file:"):
        if wanted and not _sha256(target).startswith(wanted):
            raise InputError(f"{target}: its SHA-256 does not begin with {wanted}; delete it to download {url} again")
        return target
    temporary = None
    try:
        os.makedirs(weights_dir, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".download-", dir=weights_dir)
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=30) as answer:
            length = answer.headers.get("Content-Length") or ""
            expected, received = int(length) if length.isdecimal() else None, 0
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                received += len(chunk)
                if progress and expected:
                    progress(f"downloading {os.path.basename(target)} (MB)", received >> 20, expected >> 20)
        if expected not in (None, received):
            raise OSError(f"{received} of {expected} bytes arrived")
        if wanted and not _sha256(temporary).startswith(wanted):
            raise InputError(f"{url}: the SHA-256 of what arrived does not begin with {wanted}; it was removed")
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out others who share the folder
        os.replace(temporary, target)
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot fetch {url} ({reason}); fetch it elsewhere and save it as {target}") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)
    return target


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
