"""torchvision's classification networks, the smallest member of each family, from one end to the other.

    python -m evidence.zoo [NAME …]     # a Markdown table; random weights and images, so that accuracies mean nothing

Each, without auxiliary heads, is compressed with a tiny budget on random images of the smallest size that it takes,
read from its packed file into a fresh network, made narrow and exported; every step says ok or why not.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import hirelc
from config import InputError
from deploy import narrow, pack
from support.log import Log
from support.own import forward

NAMES = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
         "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
         "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32",
         "wide_resnet50_2")
SIDES = (32, 64, 96, 128, 224, 299)
TINY = dict(search="greedy", goal="cr:6", compress__bits_min=8, search__cycles=1,  # so that channels go
            search__proxy_batches=1, finetune__epochs=1, sensitivity__images=1, data__batch_size=4, eval__full=False,
            finetune__bn_images=4, compress__scope="all")


def made(name: str) -> torch.nn.Module:
    """Return a network of torchvision with random weights, the same at every call."""
    torch.manual_seed(0)
    plain = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **plain)


def smallest(name: str) -> int:
    """Return the smallest side of SIDES on which a network runs in both modes."""
    for side in SIDES:
        try:
            for mode in (True, False):
                made(name).train(mode)(torch.zeros(2, 3, side, side))
            return side
        except (RuntimeError, ValueError, AssertionError, ZeroDivisionError):
            continue
    return SIDES[-1]


def steps(name: str, folder) -> tuple[int, dict]:
    """Return the images' side and what came of each step: numbers, "ok", or the reason why not."""
    side, found, file = smallest(name), {}, Path(folder) / f"{name}.pt"
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    sets = images, torch.arange(8) % 10

    def compress():
        silent = Log(open(os.devnull, "w"))
        _, _, result = hirelc.compress_model(made(name), sets, sets, packed=file, log=silent, **TINY)
        found.update(kernels=len(result["kernels"]), coverage=f"{100 * result['coverage']:.1f} %")

    def load():
        found["loaded"] = pack.load(file, made(name))

    def shrink():
        found["small"] = narrow.materialize(found["loaded"], images)
        before, after = (narrow.multiply_adds(found[key], images) for key in ("loaded", "small"))
        found["multiply-adds"] = f"{100 * after / before:.0f} %"

    def export():
        narrow.export(found["small"], images, file.with_suffix(".pt2"))
        forward(torch.export.load(file.with_suffix(".pt2")).module(), images[:3])

    for step, work in (("compress", compress), ("fresh load", load), ("narrow", shrink), ("export", export)):
        try:
            work()
            found[step] = "ok"
        except InputError as error:
            found[step] = f"refused: {error}"
            break
        except Exception as error:  # a fault of this project: the table is there to show it
            found[step] = f"**{type(error).__name__}**: {str(error)[:80]}"
            break
    return side, found


def main(names) -> int:
    """Print the table; return 1 where a row has an error that is no refusal."""
    columns, code = ("kernels", "coverage", "compress", "fresh load", "narrow", "multiply-adds", "export"), 0
    print("| network | side | " + " | ".join(columns) + " | seconds |", "|---" * (len(columns) + 3) + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in names or NAMES:
            start = time.monotonic()
            side, found = steps(name, folder)
            cells = [str(found.get(column, "")).replace("|", "/").replace("\n", " ") for column in columns]
            code |= any(cell.startswith("**") for cell in cells)
            print(f"| {name} | {side} | {' | '.join(cells)} | {time.monotonic() - start:.0f} |", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
