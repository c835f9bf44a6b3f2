"""What a step of the search costs on this machine, and what each part of the fast path brings.

    python benchmarks/search.py                                # this machine's device and threads
    python benchmarks/search.py --threads 1 --clock cpu        # on a machine that others use, too

The first section is the logit-MSE proxy: DeiT-Tiny and ResNet18, the same candidates in every block for every variant.
``plain`` is a whole float32 forward pass in the default layout for each candidate; the variants below it add one part
after another. Per round every block is measured with all variants in turn; what is printed is the median over the
rounds of the ratios of summed times, and their range. The bound is the bare forward pass of theta_0 from the block's
first stage on, in the same layout and precision: what the suffix's FLOPs take at the speed that its layers reach here.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: E402
from compress import BlockConfig, compress_kernel, kernel_shapes  # noqa: E402
from config import Compress  # noqa: E402
from runs import keep_freed_memory  # noqa: E402
from search import LayerBudget, Proxy, decode_lla, lla_nvec  # noqa: E402
from stages import Entering, folded, run, split  # noqa: E402

NETWORKS = ("deit_tiny_patch16_224", "resnet18")
LIMITS = {"INT uniform": Compress(), "types and granularities chosen": Compress(qtype="any", granularity="any")}
BUDGET = LayerBudget(0.25, 0.6, 3, 1.0, "auto")
TOGETHER = 2  # candidates that an environment hands over at once by default


class StartOnly(Proxy):
    """Starts at the block, and compresses each kernel from nothing."""

    def _compressed(self, block, config):
        return (compress_kernel(holder.weight, kernel)[0]
                for holder, kernel in zip(block.kernels.values(), config.kernels))


class Bare:
    """The forward pass of theta_0 from a block's first stage on: no weights made, no errors taken."""

    def __init__(self, proxy):
        self.proxy = proxy
        self.network, _ = folded(proxy.model)
        self.stages = split(self.network)
        with torch.inference_mode():
            self.entering = Entering(self.stages, proxy.batches, 2**40, copy=False)

    def first(self, index):
        known = dict(self.network.named_parameters())
        weights = [known[name] for name in self.proxy.blocks[index].weight_names.values()]
        return next(i for i, stage in enumerate(self.stages) if stage.holds(weights))

    @torch.inference_mode()
    def drops(self, index, configs):
        first = self.first(index)
        with torch.autocast(self.proxy.batches[0].device.type, torch.bfloat16, enabled=self.proxy.dtype == "bfloat16"):
            for _ in configs:
                for b in range(len(self.proxy.batches)):
                    run(self.stages[first:], self.entering.at(first, b))

    @torch.inference_mode()
    def gflop(self, index):
        """10^9 multiplications and additions of one candidate's suffix, as torch counts them."""
        first, counter = self.first(index), FlopCounterMode(display=False)
        with counter:
            for b in range(len(self.proxy.batches)):
                run(self.stages[first:], self.entering.at(first, b))
        return counter.get_total_flops() / 1e9


def variants(model, batches, lower: bool) -> dict:
    """Name → what is timed, each part added to those above it; bounds after the variants that they belong to."""
    fast_layout = copy.deepcopy(model).to(memory_format=torch.channels_last)
    blocks, fast_blocks = models.find_blocks(model), models.find_blocks(fast_layout)
    full = Proxy(fast_layout, fast_blocks, batches, together=1, fold=True)
    made = {"plain": Proxy(model, blocks, batches, cache=False),
            "start at the block": StartOnly(model, blocks, batches, together=1),
            "+ kernels prepared": Proxy(model, blocks, batches, together=1),
            "+ channels last": Proxy(fast_layout, fast_blocks, batches, together=1),
            "+ BatchNorm folded": full,
            "  bound of it": Bare(full),
            f"+ {TOGETHER} candidates together": Proxy(fast_layout, fast_blocks, batches, together=TOGETHER,
                                                            fold=True)}
    if lower:
        half = Proxy(fast_layout, fast_blocks, batches, dtype="bfloat16", together=1, fold=True)
        made |= {"folded, bfloat16": half, "  bound of that": Bare(half),
                 f"+ {TOGETHER} together, bfloat16": Proxy(fast_layout, fast_blocks, batches, dtype="bfloat16",
                                                           together=TOGETHER, fold=True)}
    return made


def candidates(blocks, limits, count: int, seed: int):
    """[block][count] configurations as agents draw them first: uniform actions."""
    rng, drawn = np.random.default_rng(seed), []
    for block in blocks:
        shapes, nvec = kernel_shapes(block), np.array(lla_nvec(len(block.kernels)))
        drawn.append([BlockConfig(decode_lla(rng.integers(nvec), BUDGET, limits, shapes), shapes)
                      for _ in range(count)])
    return drawn


def seconds(call, clock, device) -> float:
    """Time of one call by ``clock``, until the device is done."""
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measured(made, blocks, limits, args, clock):
    """Variant → [rounds, blocks] seconds for ``args.steps`` candidates of each block."""
    times = {name: np.zeros((args.rounds, len(blocks))) for name in made}
    for round_ in range(args.rounds):
        drawn = candidates(blocks, limits, args.steps, round_)
        for index, configs in enumerate(drawn):
            for name, what in made.items():
                what.drops(index, configs[:1])  # the state that enters the block, the kernels' order; code and caches
                times[name][round_, index] = seconds(
                    lambda: [what.drops(index, configs[i:i + TOGETHER]) for i in range(0, len(configs), TOGETHER)],
                    clock, args.device)
    return times


def spread(values, form="{:.2f}") -> str:
    """Median [least, most]."""
    return " ".join((form.format(statistics.median(values)),
                     "[" + ", ".join(form.format(end) for end in (min(values), max(values))) + "]"))


def proxy_section(args, clock) -> None:
    """The proxy's table, per network and per choice of what agents decide."""
    for network in args.networks:
        torch.manual_seed(0)
        model = models.build(network, 1000, args.size).to(args.device).eval()
        batches = [torch.randn(args.images, 3, args.size, args.size, device=args.device)]
        for what, limits in LIMITS.items():
            made = variants(model, batches, not args.no_bfloat16)
            blocks = made["plain"].blocks
            times = measured(made, blocks, limits, args, clock)
            count, middle = args.steps * len(blocks), len(blocks) // 2
            print(f"{network}, {args.size} px, {args.images} images, {what}; {args.steps} candidates in each of "
                  f"{len(blocks)} blocks, {args.rounds} rounds")
            print(f"  {'':27} {'candidates/s':>24} {'block ' + str(middle):>8}   times plain")
            for name, taken in times.items():
                rates, ratios = count / taken.sum(1), times["plain"].sum(1) / taken.sum(1)
                at_middle = statistics.median(args.steps / taken[:, middle])
                print(f"  {name:27} {spread(rates.tolist()):>24} {at_middle:8.2f}   {spread(ratios.tolist())}")
            for bound, name in (("  bound of it", "+ BatchNorm folded"), ("  bound of that", "folded, bfloat16")):
                if bound in times:
                    share = times[bound].sum(1) / times[name].sum(1)
                    gflop = sum(made[bound].gflop(i) for i in range(len(blocks))) * args.steps
                    print(f"  {name.removeprefix('+ ')}: {spread((100 * share).tolist(), '{:.0f}')} % of the bound, "
                          f"suffixes at {spread((gflop / times[bound].sum(1)).tolist(), '{:.0f}')} GFLOP/s")
            kept = made["+ BatchNorm folded"].entering
            print(f"  states kept: {kept.bytes / 1e6:.1f} MB in float32", flush=True)


def matmul_rate(device, dtype, clock) -> float:
    """GFLOP/s of a product of two square matrices of 2048 rows, the best of five."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    a @ a
    return 2 * 2048**3 / min(seconds(lambda: a @ a, clock, device) for _ in range(5)) / 1e9


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=sorted([*models.VITS, *models.CNNS]))
    parser.add_argument("--steps", type=int, default=4, help="candidates per block and round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, all variants in turn")
    parser.add_argument("--images", type=int, default=8, help="calibration images")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = as many as torch takes by itself")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu = processor time of this process")
    parser.add_argument("--no-bfloat16", action="store_true", help="leave bfloat16 out: it is slow without hardware")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    keep_freed_memory()  # as hirelc.py does; for every variant
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    rates = ", ".join(f"{str(dtype).removeprefix('torch.')} {matmul_rate(args.device, dtype, clock):.0f}"
                      for dtype in (torch.float32, torch.bfloat16))
    print(f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
          f"{torch.__version__}, {args.clock} clock, {time.strftime('%Y-%m-%d')}; matrix product {rates} GFLOP/s")
    proxy_section(args, clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
