"""The networks of the paper, the blocks that its agents compress (§3.2), and the stages that they run in.

The networks carry the parameter names of the checkpoints that people have: timm's for the ViTs and MobileNetV2,
torchvision's (which are timm's too) for the ResNets. ``layout`` tells :mod:`support.weights` which names they are.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import eval_mode
from config import InputError
from support.kernels import (CLASSIFIER, ELSEWHERE, INDIRECT, LAST, PATCHES, SHORTCUT, UNREACHED, Block, Kernel,
                             registered_kernels, traced_kernels)
from support.weights import (PRETRAINED, PRETRAINED_STATS, classifier_name, load_pretrained,  # noqa: F401 (for callers)
                             set_quick_gelu, weights_path)


@dataclass(frozen=True)
class Stage:
    """One link of the chain that a network is in eval mode. ``modules``: hold its kernels; ``run``: what the stage
    before gives → what the next one takes; it treats every image by itself and leaves its input as it is."""
    modules: tuple[nn.Module, ...]
    run: Callable[[Tensor], Tensor]

    def holds(self, parameters) -> bool:
        """Whether one of ``parameters`` belongs to this stage."""
        wanted = {id(parameter) for parameter in parameters}
        return any(id(p) in wanted for module in self.modules for p in module.parameters())


def as_built(model: nn.Module) -> bool:
    """Whether a network is one of this file's as it was made: no layer replaced, added or hooked, no own forward."""
    return (type(model) in (VisionTransformer, ResNet, MobileNetV2)
            and getattr(model, "made", None) == [type(module) for module in model.modules()]
            and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()))


def stages(model: nn.Module) -> tuple[Stage, ...]:
    """Divide a network into stem, encoder or residual blocks, and head; one of another kind is a single stage.

    A candidate for one block needs nothing of the stages before it but their result, the same for every candidate.
    """
    if as_built(model):
        return model.stages()
    return (Stage((model,), model),)


# Vision transformers (DeiT, CLIP)

class GELU(nn.Module):
    """GELU, or with ``quick`` x · sigmoid(1.702 x), the approximation with which OpenAI trained CLIP."""

    def __init__(self, quick):
        super().__init__()
        self.quick = quick

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, queries=None):
        """Return [B, T, C], or the rows of the first ``queries`` tokens alone."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, T, d]
        x = F.scaled_dot_product_attention(q[:, :, :queries], k, v, scale=self.scale)  # [B, heads, queries, d]
        return self.proj(x.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Pre-norm: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width, heads, eps, quick_gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), act=GELU(quick_gelu),
                                             fc2=nn.Linear(4 * width, width)))

    def forward(self, x, queries=None):
        """Return [B, T, C], or the rows of the first ``queries`` tokens alone."""
        x = x[:, :queries] + self.attn(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images [B, 3, S, S] with S = ``image_size`` → logits [B, num_classes]; class token, learned positions.

    ``embed`` = ``heads`` × ``head_dim``. ``clip=True`` is CLIP's image tower: LayerNorm ``norm_pre`` before the
    blocks, no bias in the patch convolution, LayerNorm eps 1e-5 in place of 1e-6; ``quick_gelu=True`` for weights
    that OpenAI released. Raises InputError when ``patch`` does not divide ``image_size``.
    """

    layout, classifier_name = "vit", "head"

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
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, embed, patch, stride=patch, bias=not clip)))
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
        self.made = [type(module) for module in self.modules()]  # see as_built

    def embed(self, x):
        """Images → tokens [B, T, C]. Raises InputError for images of another size."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(f"images of {x.shape[-2]} x {x.shape[-1]} pixels for a network built for "
                             f"{self.image_size} x {self.image_size}")
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # [B, patches, C]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # [B, T, C]
        return self.norm_pre(x)

    def classify(self, x):
        """Tokens [B, T, C], of which the first is read → logits [B, classes]."""
        return self.head(self.norm(x[:, 0]))

    def forward(self, x):
        return self.classify(self.blocks(self.embed(x)))

    def stages(self):
        """Embedding, encoder blocks, classifier, for which the last block computes the class token alone."""
        *blocks, last = self.blocks
        return (Stage((self.patch_embed, self.norm_pre), self.embed), *(Stage((block,), block) for block in blocks),
                Stage((last,), partial(last, queries=1)), Stage((self.norm, self.head), self.classify))


def has_quick_gelu(model: nn.Module) -> bool:
    """Whether a network is a ViT with QuickGELU; neither activation has parameters that a state dict could show."""
    return isinstance(model, VisionTransformer) and getattr(model.blocks[0].mlp.act, "quick", False)


# ResNets

def scale_channels(channels, width):
    """Return a CNN's channel count times ``width``: the nearest multiple of 4, at least 4, one step up where that would
    lose more than a tenth (MobileNetV2's rule). Every count of the paper's networks stays itself at width 1."""
    wanted = channels * width
    scaled = max(4, 4 * int(wanted / 4 + 0.5))
    return scaled + 4 if scaled < 0.9 * wanted else scaled


def conv(inputs, outputs, size, stride=1, groups=1):
    """Make a convolution before a BatchNorm: no bias, padded so that stride 1 keeps the resolution."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


class ResidualBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut): [B, inputs, H, W] → [B, outputs, H/stride, W/stride].

    Two 3×3 convolutions; with ``bottleneck`` 1×1, 3×3 (which carries the stride, as in torchvision) and conv3 and bn3,
    1×1 to four times ``planes``. ``project``: the shortcut is a 1×1 convolution too.
    """

    def __init__(self, inputs, planes, stride, bottleneck, project):
        super().__init__()
        self.bottleneck, outputs = bottleneck, 4 * planes if bottleneck else planes
        self.conv1 = conv(inputs, planes, 1) if bottleneck else conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(planes)
        if bottleneck:
            self.conv3 = conv(planes, outputs, 1)
            self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if project else None

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y, inplace=True)))
        return F.relu(y.add_(x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """Images [B, 3, H, W] of any size → logits [B, num_classes]; the ordinary 7×7 stem at every resolution."""

    layout, classifier_name = "resnet", "fc"

    def __init__(self, num_classes, bottleneck, repeats, width=1.0):
        super().__init__()
        inputs = scale_channels(64, width)
        self.conv1 = conv(3, inputs, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(inputs)
        for stage, repeat in enumerate(repeats):
            planes, blocks = scale_channels(64 * 2 ** stage, width), []
            for index in range(repeat):
                # By position, not by channel counts, so that a narrow network has the same shortcuts.
                blocks.append(ResidualBlock(inputs, planes, stride=2 if stage and not index else 1,
                                            bottleneck=bottleneck, project=not index and (stage > 0 or bottleneck)))
                inputs = 4 * planes if bottleneck else planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.made = [type(module) for module in self.modules()]  # see as_built

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
        """Stem, residual blocks, classifier."""
        blocks = (*self.layer1, *self.layer2, *self.layer3, *self.layer4)
        return (Stage((self.conv1, self.bn1), self.stem), *(Stage((block,), block) for block in blocks),
                Stage((self.fc,), self.classify))


# MobileNetV2: expansion, channels, repeats, stride of the first (Table 2 of its paper)
MOBILENET_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                    (6, 320, 1, 1))


class DepthwiseSeparable(nn.Module):
    """The first block: 3×3 per channel, then a linear 1×1, no shortcut: [B, inputs, H, W] → [B, outputs, H, W]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_dw = conv(inputs, inputs, 3, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = conv(inputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)), inplace=True)))


class InvertedResidual(nn.Module):
    """1×1 to ``expansion`` × inputs, 3×3 per channel, linear 1×1; plus its input where ``shortcut``:
    [B, inputs, H, W] → [B, outputs, H/stride, W/stride]."""

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

    def forward(self, x):
        y = F.relu6(self.bn1(self.conv_pw(x)), inplace=True)
        y = F.relu6(self.bn2(self.conv_dw(y)), inplace=True)
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Images [B, 3, H, W] of any size → logits [B, num_classes]. No dropout before the classifier: that is timm's
    default for ``mobilenetv2_100`` (torchvision's has 0.2)."""

    layout, classifier_name = "mobilenetv2", "classifier"

    def __init__(self, num_classes, width=1.0):
        super().__init__()
        inputs = scale_channels(32, width)
        self.conv_stem = conv(3, inputs, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(inputs)
        stages = []
        for expansion, channels, repeats, first_stride in MOBILENET_STAGES:
            outputs, blocks = scale_channels(channels, width), []
            for index in range(repeats):
                blocks.append(DepthwiseSeparable(inputs, outputs) if expansion == 1 else InvertedResidual(
                    inputs, outputs, expansion, stride=1 if index else first_stride, shortcut=index > 0))
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
        self.made = [type(module) for module in self.modules()]  # see as_built

    def stem(self, x):
        """Images → [B, 32, H/2, W/2]."""
        return F.relu6(self.bn1(self.conv_stem(x)), inplace=True)

    def classify(self, x):
        """[B, 320, H/32, W/32] → logits [B, classes]."""
        x = F.relu6(self.bn2(self.conv_head(x)), inplace=True)  # [B, 1280, H/32, W/32]
        return self.classifier(x.mean((2, 3)))

    def forward(self, x):
        return self.classify(self.blocks(self.stem(x)))

    def stages(self):
        """Stem, inverted residual blocks, last convolution and classifier."""
        blocks = (block for group in self.blocks for block in group)
        return (Stage((self.conv_stem, self.bn1), self.stem), *(Stage((block,), block) for block in blocks),
                Stage((self.conv_head, self.bn2, self.classifier), self.classify))


VITS = {"deit_tiny_patch16_224": dict(patch=16, heads=3),
        "deit_small_patch16_224": dict(patch=16, heads=6),
        "deit_base_patch16_224": dict(patch=16, heads=12),
        "vit_base_patch32_clip_224": dict(patch=32, heads=12, clip=True)}
CNNS = {"resnet18": lambda classes, width: ResNet(classes, False, (2, 2, 2, 2), width),
        "resnet50": lambda classes, width: ResNet(classes, True, (3, 4, 6, 3), width),
        "mobilenetv2_100": lambda classes, width: MobileNetV2(classes, width)}


def build(name: str, num_classes: int, image_size: int = 224, width: float = 1.0, patch_size: int = 0) -> nn.Module:
    """Return a freshly initialised network (global torch generator: the caller seeds).

    ``width`` scales channels and keeps blocks and kernels: a ViT keeps depth and heads and narrows each head (at least
    4 channels), a CNN scales every layer (:func:`scale_channels`). ``patch_size`` in pixels replaces a ViT's unless 0.
    Raises InputError for an unknown name, a patch that does not fit, and sizes that are not positive.
    """
    if name not in VITS and name not in CNNS:
        raise InputError(f"unknown network '{name}'; known: {', '.join([*VITS, *CNNS])}")
    if num_classes < 1 or image_size < 1 or patch_size < 0 or not (0 < width < float("inf")):
        raise InputError(f"cannot build {name} with {num_classes} classes, image size {image_size}, width {width}, "
                         f"patch size {patch_size}: sizes must be positive")
    if name in CNNS:
        if patch_size:
            raise InputError(f"patch size {patch_size} given for {name}, which has no patches; leave it at 0")
        return CNNS[name](num_classes, width)
    settings = VITS[name] | ({"patch": patch_size} if patch_size else {})
    return VisionTransformer(num_classes, image_size, head_dim=max(4, round(64 * width)), **settings)


# Blocks and kernels (paper §3.2)

GROUP = 4  # kernels of a block where the network does not say what its blocks are
OUT_OF_SCOPE = (CLASSIFIER, SHORTCUT, PATCHES, LAST)  # reasons that hold for compress.scope=paper only
LEFT_OUT = {"patch_embed.proj": PATCHES, ".downsample.": SHORTCUT, "conv_head": LAST}  # by a part of the name


@dataclass
class Survey:
    """The blocks of a network and everything that is not in one. ``excluded`` has its reasons set."""
    blocks: list[Block]
    compressed: list[Kernel]
    excluded: list[Kernel]

    @property
    def coverage(self) -> float:
        """Return the share of the kernels' parameters that is compressed, in [0, 1]; the classifier's count on neither
        side."""
        done = sum(k.params for k in self.compressed if not k.classifier)
        excluded = sum(k.params for k in self.excluded if k.reason != CLASSIFIER)
        return done / max(done + excluded, 1)


def survey(model: nn.Module, example=None, exclude=(), groups=None, scope: str = "paper") -> Survey:
    """Return the blocks of ``model`` in order, and the kernels that are in none with the reason (paper §3.2).

    ViT: {qkv, attn.proj, mlp.fc1, mlp.fc2} of each encoder block. The CNNs here: every Conv2d/Linear in forward order
    but the classifier, the down-sample projections and MobileNetV2's last 1×1 convolution, in groups of four. Any
    other module: by what one forward of the batch ``example`` does (:func:`kernels.traced_kernels`), in groups of four.
    ``exclude``, ``groups``: names that override it (:func:`arrange`); ``scope="all"``: the kernels that the
    paper leaves out too, in extra blocks. Raises InputError where that leaves nothing to compress.
    """
    what, sections = type(model).__name__, None
    if as_built(model):
        kernels, classifier = registered_kernels(model), classifier_name(model)
        for kernel in kernels:
            if kernel.name == classifier:
                kernel.reason, kernel.classifier = CLASSIFIER, True
            else:
                kernel.reason = next((LEFT_OUT[part] for part in LEFT_OUT if part in kernel.name), kernel.reason)
    else:
        kernels = traced_kernels(model, example)
    if as_built(model) and type(model) is VisionTransformer:
        sections = [(f"blocks.{i}", {f"blocks.{i}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
                     tuple(f"blocks.{i}.{name}" for name, _ in block.named_parameters()))
                    for i, block in enumerate(model.blocks)]
    return arrange(what, kernels, exclude, groups, sections, scope)


def find_blocks(model: nn.Module, example=None, exclude=(), groups=None) -> list[Block]:
    """Return the blocks of :func:`survey`; every network but this file's needs ``example``, a batch of images."""
    return survey(model, example, exclude, groups).blocks


@contextlib.contextmanager
def block_parameters(model: nn.Module, blocks):
    """In eval mode inside: yield the ``parameters`` of all blocks, frozen ones trainable too, and each one's block."""
    named = dict(model.named_parameters(remove_duplicate=False))  # a shared tensor goes by each of its names
    parameters, owner = zip(*((named[name], i) for i, block in enumerate(blocks) for name in block.parameters))
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with eval_mode(model):
            yield parameters, owner
    finally:
        for p in frozen:
            p.requires_grad_(False)


def arrange(what: str, kernels: list[Kernel], exclude=(), groups=None, sections=None, scope="paper") -> Survey:
    """Cut the kernels of ``what``, a name, into blocks: groups of four, or as ``groups`` and ``sections`` say.

    ``exclude``: names of kernels or modules, or patterns with ``*``, which are left out. ``groups``: the blocks as
    lists of names; of other kernels none is compressed, of these even the classifier. ``sections``: (block name, kernel
    names, parameter names) of a network whose blocks are given. ``scope="all"``: what is left out for a reason of
    OUT_OF_SCOPE follows in further groups of four. Raises InputError for a name without a kernel (naming close ones),
    a kernel that cannot be compressed or is named twice, and where nothing remains to compress.
    """
    unwanted = set()
    if not isinstance(exclude, (str, list, tuple, set)) or not all(isinstance(name, str) for name in exclude):
        raise InputError("exclude: expected names of kernels or modules, or patterns with *")
    for pattern in (exclude,) if isinstance(exclude, str) else exclude:
        matching = [k for k in kernels if any(
            n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern) for n in k.names)]
        if not matching:
            raise InputError(f"exclude: {_unknown(pattern, kernels)}")
        for kernel in matching:
            unwanted.add(kernel.name)
            kernel.reason = kernel.reason or f"left out by exclude={pattern}"
    if groups is not None:
        cut = _named_groups(kernels, groups, unwanted)
    elif sections:
        cut = [(name, [k for k in kernels if k.name in names and not k.reason], parameters)
               for name, names, parameters in sections]
    else:
        cut = _fours("group", [k for k in kernels if not k.reason])
    if scope == "all" and groups is None:
        extra = [k for k in kernels if k.reason in OUT_OF_SCOPE and k.holder is not None and k.name not in unwanted]
        for kernel in extra:
            kernel.reason = ""
        cut += _fours("extra", extra)
    blocks, counted = [], set()
    for name, group, parameters in (c for c in cut if c[1]):
        if parameters is None:  # a bias that several kernels share counts once, with the first
            parameters = tuple(dict.fromkeys(p for k in group for p in (k.tensors[0], *k.biases) if p not in counted))
            counted.update(parameters)
        blocks.append(Block(name, {k.name: k.holder for k in group}, parameters, {k.name: k.tensors for k in group},
                            {k.name: k.places for k in group}, tuple(k.name for k in group if k.classifier)))
    compressed = [k for _, group, _ in cut for k in group]
    if not compressed:
        raise InputError(f"{what}: no Conv2d or Linear besides the classifier, nothing to compress"
                         + "".join(f"; {k.name}: {k.reason}" for k in kernels[:5]))
    excluded = [k for k in kernels if k.reason]
    for kernel in excluded:
        if kernel.classifier and scope == "paper" and kernel.reason != ELSEWHERE:
            kernel.reason = CLASSIFIER  # whatever else would keep it out
    return Survey(blocks, compressed, excluded)


def _fours(what, kernels):
    return [(f"{what}{first // GROUP}", kernels[first:first + GROUP], None) for first in range(0, len(kernels), GROUP)]


def _named_groups(kernels, groups, unwanted):
    by_name = {name: k for k in reversed(kernels) for name in k.names} | {k.name: k for k in kernels}
    if not isinstance(groups, (list, tuple)) or not groups or not all(
            isinstance(g, (list, tuple)) and g and all(isinstance(name, str) for name in g) for g in groups):
        raise InputError("groups: expected lists of kernel names, none of them empty, one list per block")
    taken = set()
    for name in (name for names in groups for name in names):
        if name not in by_name:
            raise InputError(f"groups: {_unknown(name, kernels)}")
        kernel = by_name[name]
        if kernel.holder is None or kernel.reason in (UNREACHED, INDIRECT, ELSEWHERE) or kernel.name in unwanted:
            raise InputError(f"groups: {name} is excluded: {kernel.reason}")
        if kernel.name in taken:
            raise InputError(f"groups: {name} is named twice")
        taken.add(kernel.name)
    for kernel in kernels:
        kernel.reason = "" if kernel.name in taken else kernel.reason or "in none of the groups"
    return [(f"group{number}", [by_name[name] for name in names], None) for number, names in enumerate(groups)]


def _unknown(name, kernels):
    names = sorted({k.name for k in kernels})
    close = difflib.get_close_matches(str(name), names, n=5, cutoff=0.4) or names[:5]
    return f"no kernel is called '{name}'; close: {', '.join(close)}"
