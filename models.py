"""The networks of the paper, the blocks that its agents compress, and loading weights (SPEC 3 and 4; paper §3.2).

Networks are written out here and carry the parameter names of the checkpoints that people have: timm's for the
ViTs and MobileNetV2, torchvision's (which are timm's too) for the ResNets. Nothing here touches a model hub: a
file or a URL is read, checked against the network and copied in, or refused with every reason at once.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.kernels import CLASSIFIER, LAST, PATCHES, SHORTCUT, Block, Survey, arrange, registered_kernels, traced_kernels
from support.weights import is_torchscript, read_checkpoint, shown
from config import InputError
from support.files import cached, file_name, hash_prefix
from support.stages import Stage, Staged, StagedBlock

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

    def class_token(self, x):
        """The first token's row of forward, [B, 1, C]: its own query, the keys and values of all tokens."""
        B, T, C = x.shape
        weights, biases = self.qkv.weight.split((C, 2 * C)), self.qkv.bias.split((C, 2 * C))
        q = F.linear(x[:, :1], weights[0], biases[0]).reshape(B, 1, self.heads, -1).transpose(1, 2)  # [B, heads, 1, d]
        k, v = F.linear(x, weights[1], biases[1]).reshape(B, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # [B, heads, 1, d]
        return self.proj(x.transpose(1, 2).reshape(B, 1, -1))  # [B, 1, C]


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

    def class_token(self, x):
        """The first token's row of forward, [B, 1, C]: all that a classifier of the class token needs of the last
        block."""
        x = x[:, :1] + self.attn.class_token(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # [B, 1, C]


class VisionTransformer(Staged):
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

    def embed(self, x):
        """Images → tokens [B, T, C]."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(f"images of {x.shape[-2]} x {x.shape[-1]} pixels for a network built for "
                             f"{self.image_size} x {self.image_size}")
        x = self.patch_embed(x)  # [B, patches, C]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # [B, T, C]
        return self.norm_pre(x)

    def classify(self, x):
        """Tokens [B, T, C], of which the first is read → logits [B, classes]."""
        return self.head(self.norm(x[:, 0]))

    def forward(self, x):
        return self.classify(self.blocks(self.embed(x)))

    def stages(self):
        """Embedding, encoder blocks, classifier; the last block computes the class token alone."""
        *blocks, last = self.blocks
        return [Stage((self.patch_embed, self.norm_pre), self.embed), *(Stage((block,), block) for block in blocks),
                Stage((last,), last.class_token), Stage((self.norm, self.head), self.classify)]


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


class ResidualBlock(StagedBlock):
    """What both residual blocks share: the shortcut, handed on beside the branch's result from the first stage on."""

    def shortcut(self, x):
        return self.downsample(x) if self.downsample is not None else x

    def _first(self):
        """[B, inputs, H, W] → (relu(bn1(conv1)), shortcut)."""
        modules = (self.conv1, self.bn1) + ((self.downsample,) if self.downsample is not None else ())
        return Stage(modules, lambda x: (F.relu(self.bn1(self.conv1(x)), inplace=True), self.shortcut(x)))

    def _last(self, conv, bn):
        """(y, shortcut) → relu(bn(conv(y)) + shortcut); in place of the convolution's result, which is nobody else's."""
        return Stage((conv, bn), lambda state: F.relu(bn(conv(state[0])).add_(state[1]), inplace=True))


class BasicBlock(ResidualBlock):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)."""

    expansion = 1

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1 = conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None

    def stages(self):  # [B, inputs, H, W] → [B, planes, H/stride, W/stride]
        return [self._first(), self._last(self.conv2, self.bn2)]


class Bottleneck(ResidualBlock):
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

    def stages(self):  # [B, inputs, H, W] → [B, 4 planes, H/stride, W/stride]
        return [self._first(),
                Stage((self.conv2, self.bn2),
                      lambda state: (F.relu(self.bn2(self.conv2(state[0])), inplace=True), state[1])),
                self._last(self.conv3, self.bn3)]


class ResNet(Staged):
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

    def stem(self, x):
        """Images → [B, C, H/4, W/4]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # [B, C, H/2, W/2]
        return F.max_pool2d(x, 3, stride=2, padding=1)

    def classify(self, x):
        """[B, 8 C · expansion, H/32, W/32] → logits [B, classes]."""
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.classify(self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x))))))

    def stages(self):
        """Stem, the convolutions of every residual block one by one, classifier."""
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [Stage((self.conv1, self.bn1), self.stem),
                *(stage for layer in layers for block in layer for stage in block.stages()),
                Stage((self.fc,), self.classify)]


# ---------------------------------------------------------------------------------------------------------------
# MobileNetV2

# Expansion, channels, repeats, stride of the first: Table 2 of the MobileNetV2 paper.
MOBILENET_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                    (6, 320, 1, 1))


class DepthwiseSeparable(StagedBlock):
    """The first block: 3×3 per channel, then a linear 1×1; no expansion and no shortcut."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_dw = conv(inputs, inputs, 3, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = conv(inputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)

    def stages(self):  # [B, inputs, H, W] → [B, outputs, H, W]
        return [Stage((self.conv_dw, self.bn1), lambda x: F.relu6(self.bn1(self.conv_dw(x)), inplace=True)),
                Stage((self.conv_pw, self.bn2), lambda x: self.bn2(self.conv_pw(x)))]


class InvertedResidual(StagedBlock):
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

    def stages(self):  # [B, inputs, H, W] → [B, outputs, H/stride, W/stride]; where there is a shortcut, beside y
        def expand(x):
            y = F.relu6(self.bn1(self.conv_pw(x)), inplace=True)
            return (y, x) if self.shortcut else (y,)

        def depthwise(state):
            return F.relu6(self.bn2(self.conv_dw(state[0])), inplace=True), *state[1:]

        def project(state):
            y = self.bn3(self.conv_pwl(state[0]))
            return state[1] + y if self.shortcut else y

        return [Stage((self.conv_pw, self.bn1), expand), Stage((self.conv_dw, self.bn2), depthwise),
                Stage((self.conv_pwl, self.bn3), project)]


class MobileNetV2(Staged):
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

    def stem(self, x):
        """Images → [B, 32, H/2, W/2]."""
        return F.relu6(self.bn1(self.conv_stem(x)), inplace=True)

    def widen(self, x):
        """[B, 320, H/32, W/32] → [B, 1280, H/32, W/32]."""
        return F.relu6(self.bn2(self.conv_head(x)), inplace=True)

    def classify(self, x):
        """[B, 1280, H/32, W/32] → logits [B, classes]."""
        return self.classifier(x.mean((2, 3)))

    def forward(self, x):
        return self.classify(self.widen(self.blocks(self.stem(x))))

    def stages(self):
        """Stem, the convolutions of every block one by one, last convolution, classifier."""
        return [Stage((self.conv_stem, self.bn1), self.stem),
                *(stage for group in self.blocks for block in group for stage in block.stages()),
                Stage((self.conv_head, self.bn2), self.widen), Stage((self.classifier,), self.classify)]


# ---------------------------------------------------------------------------------------------------------------
# By name

VITS = {"deit_tiny_patch16_224": dict(patch=16, heads=3),
        "deit_small_patch16_224": dict(patch=16, heads=6),
        "deit_base_patch16_224": dict(patch=16, heads=12),
        "vit_base_patch32_clip_224": dict(patch=32, heads=12, clip=True)}
CNNS = {"resnet18": lambda classes, width: ResNet(classes, BasicBlock, (2, 2, 2, 2), width),
        "resnet50": lambda classes, width: ResNet(classes, Bottleneck, (3, 4, 6, 3), width),
        "mobilenetv2_100": lambda classes, width: MobileNetV2(classes, width)}


@dataclass(frozen=True)
class Published:
    """Weights that can be had from ``url`` and are kept as ``file``. ``sha256``: the first digits of the digest, where
    the published name carries them; ``size`` in bytes, None where nobody states it; ``megabytes``: about."""
    url: str
    file: str
    megabytes: int
    sha256: str = ""
    size: int | None = None


def _published(url, megabytes, file=""):
    return Published(url, file or file_name(url), megabytes, hash_prefix(url))


# For ``--weights auto``.
PRETRAINED = {
    "deit_tiny_patch16_224": _published(
        "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth", 23),
    "deit_small_patch16_224": _published(
        "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth", 88),
    "deit_base_patch16_224": _published(
        "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth", 346),
    "vit_base_patch32_clip_224": _published(
        "https://huggingface.co/timm/vit_base_patch32_clip_224.laion2b_ft_in12k_in1k/resolve/main/model.safetensors",
        353, "vit_base_patch32_clip_224.laion2b_ft_in12k_in1k.safetensors"),
    "resnet18": _published("https://download.pytorch.org/models/resnet18-f37072fd.pth", 47),
    "resnet50": _published("https://download.pytorch.org/models/resnet50-0676ba61.pth", 103),
    "mobilenetv2_100": _published("https://download.pytorch.org/models/mobilenet_v2-b0353104.pth", 14),
}

# (mean, std) of the inputs that those weights were trained with, for data.normalize=pretrained.
IMAGENET_INPUTS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PRETRAINED_STATS = {name: IMAGENET_INPUTS for name in PRETRAINED} | {
    "vit_base_patch32_clip_224": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}


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


def survey(model: nn.Module, example=None, exclude=(), groups=None, scope: str = "paper") -> Survey:
    """The blocks of ``model`` in order, and the kernels that are in none with the reason (paper §3.2).

    ViT: {qkv, attn.proj, mlp.fc1, mlp.fc2} of each encoder block. The CNNs here: every Conv2d/Linear in forward
    order but the classifier, the down-sample projections and MobileNetV2's last 1×1 convolution, in groups of
    four. Any other module: by what one forward of the batch ``example`` does (:func:`blocks.traced_kernels`), in
    groups of four; without an example its Conv2d/Linear in registration order but the classifier
    (:func:`classifier_name`). ``exclude``, ``groups``: names that override it (:func:`blocks.arrange`);
    ``scope="all"``: the ViT's patch embedding, shortcut projections, MobileNetV2's last convolution and the classifier
    too, in extra blocks. Raises InputError where that leaves nothing to compress.
    """
    what, sections = type(model).__name__, None
    if isinstance(model, (VisionTransformer, ResNet, MobileNetV2)) or example is None:
        kernels, classifier = registered_kernels(model), classifier_name(model)
        classifier = "weight" if classifier == "" else classifier  # the network is that one layer
        for kernel in kernels:
            if kernel.name == classifier:
                kernel.reason, kernel.classifier = CLASSIFIER, True
            elif isinstance(model, VisionTransformer) and kernel.name == "patch_embed.proj":
                kernel.reason = PATCHES
            elif isinstance(model, (ResNet, MobileNetV2)) and ".downsample." in kernel.name:
                kernel.reason = SHORTCUT
            elif isinstance(model, MobileNetV2) and kernel.name == "conv_head":
                kernel.reason = LAST
    else:
        kernels = traced_kernels(model, example)
    if isinstance(model, VisionTransformer):
        sections = [(f"blocks.{i}", {f"blocks.{i}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
                     tuple(f"blocks.{i}.{name}" for name, _ in block.named_parameters()))
                    for i, block in enumerate(model.blocks)]
    return arrange(what, kernels, exclude, groups, sections, scope)


def find_blocks(model: nn.Module, example=None, exclude=(), groups=None) -> list[Block]:
    """The blocks of :func:`survey`; ``example``: a batch of images, which every network but this file's needs for
    its kernels to be found by what it does with them."""
    return survey(model, example, exclude, groups).blocks


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
    left at their initialisation because the file has another number of classes, or no classifier. ``missing``,
    ``unexpected``: names that were tolerated (BatchNorm's ``num_batches_tracked``, absent from older files)."""
    source: str
    loaded: int
    replaced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_pretrained(model: nn.Module, source, weights_dir: str = "weights", progress=None,
                    quick_gelu: bool | None = None) -> LoadReport:
    """Copy a checkpoint into ``model``, in place; all of it fits or nothing is changed.

    ``source``: a local .pth, .pt, .bin or .safetensors file (:func:`checkpoints.read_checkpoint`), a http(s)/file
    URL or a :class:`Published`, which are kept in ``weights_dir``. Layouts: :func:`convert_layout`.
    ``progress(what, done, total)`` is called while a download runs, in bytes. A classifier for another number of
    classes keeps its initialisation, position embeddings of another image size are interpolated, other precisions
    become float32; the report says so.
    ``quick_gelu``: the activation of a ViT that the weights were trained with, QuickGELU (True) or GELU (False). The
    names in a file do not tell; None means QuickGELU for a TorchScript archive with CLIP's names, which is how OpenAI
    published theirs, and the network's own activation for every other file.
    Raises InputError, one line, for a file that is absent, damaged, unsafe or not finite, for every name and shape
    that does not fit, and for ``quick_gelu`` with a network that is no ViT.
    """
    if quick_gelu is not None and not isinstance(model, VisionTransformer):
        raise InputError("quick_gelu is a matter of CLIP's weights; leave it at its default for any other network")
    source, path = _local(source, weights_dir, progress)
    state, notes, headless = convert_layout(read_checkpoint(path), model)
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}

    if headless:
        replaced = tuple(name for name in _classifier_tensors(model) if name in own)
        notes.append("classifier left at its initialisation: the file has none")
    else:
        replaced = _other_classes(model, state, own)
    if replaced and not headless:
        weight = replaced[0]
        notes.append(f"classifier left at its initialisation: {len(state[weight])} classes in the file, "
                     f"{len(own[weight])} in the network")
    if isinstance(model, VisionTransformer) and "pos_embed" in state:
        resized = _resized_positions(state["pos_embed"], own["pos_embed"])
        if resized is not None:
            notes.append(f"position embeddings interpolated from {state['pos_embed'].shape[1] - 1} to "
                         f"{resized.shape[1] - 1} patches (bicubic)")
            state["pos_embed"] = resized

    wanted = [name for name in own if name not in replaced]
    missing = [name for name in wanted if name not in state]
    tolerated = tuple(name for name in missing if name.endswith("num_batches_tracked"))
    missing = [name for name in missing if name not in tolerated]
    unexpected = [name for name in state if name not in own]
    wanted = [name for name in wanted if name in state]
    problems = []
    if missing:
        problems.append("missing: " + _listed(missing))
    if unexpected:
        problems.append("unexpected: " + _listed(unexpected))
    for name in wanted:
        if state[name].shape != own[name].shape:
            problems.append(f"shape: {name} {list(state[name].shape)} (file) vs {list(own[name].shape)} (network)")
        elif state[name].is_floating_point() != own[name].is_floating_point():
            problems.append(f"type: {name} {state[name].dtype} (file) vs {own[name].dtype} (network)")
    if problems:
        raise InputError(f"{path} does not fit the network; " + "; ".join(problems))

    # Converted only now that the shapes are the network's: what a file can make this allocate is bounded.
    converted = 0
    for name in wanted:
        if state[name].is_floating_point():
            converted += state[name].dtype != torch.float32
            state[name] = state[name].float()
            if not state[name].isfinite().all():
                raise InputError(f"{path}: tensor {shown(name)} holds values that are not finite in float32")
    if converted:
        notes.append(f"{converted} tensors of another precision converted to float32")
    if tolerated:
        notes.append(f"{len(tolerated)} num_batches_tracked counters are not in the file and keep their values")

    with torch.no_grad():
        for name in wanted:
            own[name].copy_(state[name])
    if isinstance(model, VisionTransformer):
        notes += _set_activation(model, quick_gelu, headless, headless and is_torchscript(path))
    return LoadReport(source, len(wanted), replaced, tolerated, (), tuple(notes))


def _local(source, weights_dir, progress):
    """``source`` as text, and the file that holds it."""
    if not isinstance(source, Published):
        source = os.fspath(source)
        if "://" not in source and not source.startswith("file:"):
            return source, os.path.expanduser(source)
        source = next((known for known in PRETRAINED.values() if known.url == source), source)
    target = weights_path(source, weights_dir)
    if not isinstance(source, Published):
        return source, cached(source, target, progress, sha256=hash_prefix(source))
    hint = f" (about {source.megabytes} MB), or give --weights FILE or --weights none"
    return source.url, cached(source.url, target, progress, size=source.size, sha256=source.sha256, hint=hint)


def weights_path(source, weights_dir: str = "weights") -> str:
    """Where the file of a URL or :class:`Published` is kept, and where to put it by hand without a network."""
    return os.path.join(weights_dir, source.file if isinstance(source, Published) else file_name(source))


def set_quick_gelu(model: VisionTransformer, on: bool) -> None:
    """Give every block of a ViT QuickGELU, or GELU. Neither has parameters, so no state dict shows which it is."""
    for block in model.blocks:
        block.mlp.act = QuickGELU() if on else nn.GELU()


def has_quick_gelu(model: nn.Module) -> bool:
    """Whether a network is one of this file's ViTs with QuickGELU."""
    return isinstance(model, VisionTransformer) and isinstance(model.blocks[0].mlp.act, QuickGELU)


def _set_activation(model, quick_gelu, clip_names, openai):
    """Act on ``quick_gelu`` (:func:`load_pretrained`) → notes."""
    before = has_quick_gelu(model)
    after = quick_gelu if quick_gelu is not None else before or openai
    if after != before:
        set_quick_gelu(model, after)
    name = "QuickGELU" if after else "GELU"
    if quick_gelu is not None:
        return [f"activation {name}, as asked"] if after != before else []
    if openai:
        return [f"activation {name}: a TorchScript archive with CLIP's names is taken for OpenAI's release"]
    if clip_names:
        return [f"activation {name} assumed: a file with CLIP's names does not tell; OpenAI's weights and open_clip's "
                "-quickgelu models need QuickGELU (quick_gelu=True, --set model.quick_gelu=on), its others GELU"]
    return []


def convert_layout(state: dict, model: nn.Module) -> tuple[dict, list[str], bool]:
    """A checkpoint's tensors under this file's names → (tensors, notes, whether the layout has no classifier).

    Told apart by their names: torchvision's MobileNetV2, and CLIP's image tower as OpenAI and open_clip name it, with
    or without ``visual.`` in front and the text tower beside it. A name that no layout knows stays as it is, so that
    it is reported as unexpected. timm's, Meta's and torchvision's ResNets have our names.
    """
    if state and all(name.startswith("module.") for name in state) and not hasattr(model, "module"):  # DataParallel's
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if isinstance(model, MobileNetV2) and "features.0.0.weight" in state:
        table = _torchvision_mobilenet()
        renamed = {}
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            renamed[f"{table[module]}.{leaf}" if module in table else name] = tensor
        return renamed, [], False
    if isinstance(model, VisionTransformer):
        if "visual.class_embedding" in state:
            tower = {name.removeprefix("visual."): tensor for name, tensor in state.items()
                     if name.startswith("visual.")}
            return *_clip_tower(tower, len(state) - len(tower)), True
        if "class_embedding" in state and "conv1.weight" in state:
            return *_clip_tower(state, 0), True
    return dict(state), [], False


CLIP_MODULES = {"conv1": "patch_embed.proj", "ln_pre": "norm_pre", "ln_post": "norm"}
CLIP_BLOCK = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1",
              "mlp.c_proj": "mlp.fc2"}


def _clip_tower(state, others):
    """OpenAI's names of the image tower → ours; ``others``: number of tensors besides it. → (tensors, notes)."""
    renamed, notes = {}, []
    if others:
        notes.append(f"{others} tensors besides the image tower (CLIP's text tower and scale) left out")
    for name, tensor in state.items():
        if name == "proj":
            notes.append(f"projection to the space shared with texts {list(tensor.shape)} left out")
            continue
        module, _, leaf = name.rpartition(".")
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", module)
        new = name
        if name == "class_embedding":
            new, tensor = "cls_token", tensor.reshape(1, 1, -1) if tensor.ndim == 1 else tensor
        elif name == "positional_embedding":
            new, tensor = "pos_embed", tensor[None] if tensor.ndim == 2 else tensor
        elif module in CLIP_MODULES:
            new = f"{CLIP_MODULES[module]}.{leaf}"
        elif found and found[2] == "attn" and leaf in ("in_proj_weight", "in_proj_bias"):
            new = f"blocks.{found[1]}.attn.qkv.{leaf.removeprefix('in_proj_')}"
        elif found and found[2] in CLIP_BLOCK:
            new = f"blocks.{found[1]}.{CLIP_BLOCK[found[2]]}.{leaf}"
        renamed[new if new not in state else name] = tensor  # a file with both names keeps this one as unexpected
    return renamed, notes


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
    weight, bias = _classifier_tensors(model)
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
    old = old.float()
    grid = old[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)  # [1, C, g, g]
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([old[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + G², C]


def _classifier_tensors(model):
    name = classifier_name(model)
    return f"{name}.weight", f"{name}.bias"


def _listed(names):
    """Every name of a list, unless it is as long as no network's."""
    more = f" and {len(names) - 1000} more" if len(names) > 1000 else ""
    return ", ".join(map(shown, names[:1000])) + more
