"""Where the published weights of the networks are, for ``--weights auto``, and how their inputs are normalised."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Weights at ``url``, about ``megabytes`` MB (0: unknown)."""
    url: str
    megabytes: int = 0

    @property
    def sha256(self) -> str:
        """First digits of the file's SHA-256 where its name ends with them."""
        return "".join(re.findall(r"-([0-9a-f]{8,64})\.\w+$", self.url))

    @property
    def file(self) -> str:
        """Name of the local file: the URL's where it carries a hash, else host and path, the suffix last."""
        address, _, query = self.url.partition("://")[2].partition("?")
        name = address.rpartition("/")[2] if self.sha256 else query + address
        return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[-200:]


_DEIT, _TORCHVISION = "https://dl.fbaipublicfiles.com/deit/", "https://download.pytorch.org/models/"
_CLIP = "https://huggingface.co/timm/vit_base_patch32_clip_224.laion2b_ft_in12k_in1k/resolve/main/model.safetensors"
PRETRAINED = {
    "deit_tiny_patch16_224": Published(_DEIT + "deit_tiny_patch16_224-a1311bcf.pth", 23),
    "deit_small_patch16_224": Published(_DEIT + "deit_small_patch16_224-cd65a155.pth", 88),
    "deit_base_patch16_224": Published(_DEIT + "deit_base_patch16_224-b5f2ef4d.pth", 346),
    "vit_base_patch32_clip_224": Published(_CLIP, 353),
    "resnet18": Published(_TORCHVISION + "resnet18-f37072fd.pth", 47),
    "resnet50": Published(_TORCHVISION + "resnet50-0676ba61.pth", 103),
    "mobilenetv2_100": Published(_TORCHVISION + "mobilenet_v2-b0353104.pth", 14)}
# (mean, std) of the inputs that those weights were trained with, for data.normalize=pretrained
PRETRAINED_STATS = dict.fromkeys(PRETRAINED, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))) | {
    "vit_base_patch32_clip_224": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}
