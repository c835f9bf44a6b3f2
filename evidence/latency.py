"""Latency of the dense, the masked and the narrow network on the CPU, in turn in one run.

    python benchmarks/latency.py                          # ResNet18, MobileNetV2 and DeiT-Small at 224 px
    python benchmarks/latency.py --threads 1 --rounds 9

Every kernel keeps the fraction ``--keep`` of its output channels; weights and BatchNorm statistics are random. Each
network runs in the memory layout, contiguous or channels-last, that was faster for it in a first round. Times are
medians over the rounds, the ratio is dense to narrow with its smallest and largest value within a round. Logits of the
masked and the narrow network are compared as well: the exit code is 1 where they are further apart than 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: E402
import narrow  # noqa: E402
from compress import prune_mask  # noqa: E402
from support.runs import keep_freed_memory  # noqa: E402

NETWORKS = ("resnet18", "mobilenetv2_100", "deit_small_patch16_224")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def networks(name: str, keep: float, side: int) -> dict[str, nn.Module]:
    """The dense, the masked and the narrow network."""
    torch.manual_seed(0)
    dense = models.build(name, 1000, side).eval()
    with torch.no_grad():
        for module in dense.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5), module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.Linear):
                module.bias.normal_(0, 0.2)
        masked = copy.deepcopy(dense)
        for block in models.find_blocks(masked):
            for kernel in block.kernels.values():
                kernel.weight[~prune_mask(kernel.weight, keep)] = 0
    return {"dense": dense, "masked": masked, "narrow": narrow.materialize(masked, torch.randn(1, 3, side, side))}


def milliseconds(network, images, least: float) -> float:
    """Mean wall-clock time of a forward, over at least ``least`` seconds."""
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < least:
        network(images)
        count += 1
    return 1000 * (time.perf_counter() - start) / count


def measured(nets, batch: int, side: int, rounds: int, least: float):
    """({network: times in ms}, {network: its layout}): every network once in each layout, then in turn."""
    images = torch.randn(batch, 3, side, side)
    laid_out = {layout: images.contiguous(memory_format=form) for layout, form in LAYOUTS.items()}
    best = {}
    for name, network in nets.items():
        tried = {}
        for layout, form in LAYOUTS.items():
            network.to(memory_format=form)
            network(laid_out[layout])  # what the first call sets up is not timed
            tried[layout] = min(milliseconds(network, laid_out[layout], least / 2) for _ in range(2))
        best[name] = min(tried, key=tried.get)
        network.to(memory_format=LAYOUTS[best[name]])
    times = {name: [] for name in nets}
    for _ in range(rounds):
        for name, network in nets.items():
            times[name].append(milliseconds(network, laid_out[best[name]], least))
    return times, best


def parameters(network) -> int:
    """Numbers that a network stores: parameters and buffers."""
    return sum(t.numel() for t in (*network.parameters(), *network.buffers()))


def main(argv=None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = as many as torch takes by itself")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=0.5, help="at least this long per network and round")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the output channels that stay")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 64), help="images per batch")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=[*models.VITS, *models.CNNS], metavar="NAME")
    parser.add_argument("--side", type=int, default=224, help="side of the images in pixels")
    args = parser.parse_args(argv)
    keep_freed_memory()  # as hirelc.py does; else a large batch pays for page faults
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
          f"{platform.python_version()}, {time.strftime('%Y-%m-%d')}; {args.side} px, keep {args.keep}, "
          f"{args.rounds} rounds\n")
    print("| network | batch | multiply-adds, dense | narrow | parameters, dense | narrow | dense, ms | masked, ms | "
          "narrow, ms | dense / narrow |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)
    code, layouts = 0, []
    with torch.inference_mode():
        for name in args.networks:
            nets = networks(name, args.keep, args.side)
            images = torch.randn(4, 3, args.side, args.side)
            apart = float((nets["masked"](images) - nets["narrow"](images)).abs().max())
            code = code if apart <= 1e-4 else 1
            work = {n: narrow.multiply_adds(nets[n], images) / 1e6 for n in ("dense", "narrow")}
            size = {n: parameters(nets[n]) / 1e6 for n in ("dense", "narrow")}
            for batch in args.batches:
                times, best = measured(nets, batch, args.side, args.rounds, args.seconds)
                ratios = [dense / small for dense, small in zip(times["dense"], times["narrow"])]
                dense, masked, small = (statistics.median(times[n]) for n in ("dense", "masked", "narrow"))
                print(f"| {name} | {batch} | {work['dense']:.0f} M | {work['narrow']:.0f} M | {size['dense']:.2f} M | "
                      f"{size['narrow']:.2f} M | {dense:.1f} | {masked:.1f} | {small:.1f} | "
                      f"{dense / small:.2f} [{min(ratios):.2f}, {max(ratios):.2f}] |", flush=True)
                layouts.append(f"- {name}, batch {batch}: " + ", ".join(f"{n} {best[n]}" for n in nets)
                               + f"; largest difference of the logits {apart:.1e}")
    print("\nMemory layouts:\n" + "\n".join(layouts))
    return code


if __name__ == "__main__":
    sys.exit(main())
