"""What a step of the search costs on this machine, and what each part of the fast path brings.

    python benchmarks/search.py                                # this machine's device and threads
    python benchmarks/search.py --threads 1 --clock cpu        # on a machine that others use, too

The section ``proxy`` is the logit-MSE proxy: DeiT-Tiny and ResNet18, the same candidates in every block for every variant.
``plain`` is a whole float32 forward pass in the default layout for each candidate; the variants below it add one part
after another. Per round every block is measured with all variants in turn; what is printed is the median over the
rounds of the ratios of summed times, and their range. The bound is the bare forward pass of theta_0 from the block's
first stage on, in the same layout and precision: what the suffix's FLOPs take at the speed that its layers reach here.

``agents`` is environment steps/s with the surrogate active, updates included: the same agents train all blocks together
(``train_together``), block by block, and agent by agent; printed are rates of wall-clock time, and of the process's own
time, which other work on the machine disturbs less. ``processes`` is the search of experiments 1 and 4, narrow, by one
process and by two that torchrun starts.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch._inductor.config as inductor
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: E402
from compress import BlockConfig, compress_kernel, kernel_shapes  # noqa: E402
from config import Compress, Config  # noqa: E402
from support.runs import keep_freed_memory  # noqa: E402
from search import (DropEstimator, HLAEnsemble, LayerBudget, LLAEnsemble, Proxy, Surrogate, decode_lla,  # noqa: E402
                    lla_nvec, random_config, train_together)
from support.stages import Chain, Entering, folded, run, split  # noqa: E402
from support.winograd import fits, with_winograd  # noqa: E402

NETWORKS = ("deit_tiny_patch16_224", "resnet18")
LIMITS = {"INT uniform": Compress(), "types and granularities chosen": Compress(qtype="any", granularity="any")}
BUDGET = LayerBudget(0.25, 0.6, 3, 1.0, "auto")
TOGETHER = len(Config().lla.algorithms) * Config().lla.envs  # candidates that a block's agents hand over at once by default


class StartOnly(Proxy):
    """Starts at the block, and compresses each kernel from nothing."""

    def _compressed(self, block, config):
        return (compress_kernel(holder.weight, kernel)[0]
                for holder, kernel in zip(block.kernels.values(), config.kernels))


class Bare:
    """The forward pass of theta_0 from a block's first stage on: no weights made, no errors taken. The block's own
    convolutions are ordinary ones, as those of a candidate are."""

    def __init__(self, proxy):
        self.proxy = proxy
        self.network, _ = folded(proxy.model)
        if proxy.winograd:
            self.network = with_winograd(self.network)
        self.known, self.chain = dict(self.network.named_parameters()), Chain(self.network)
        self.stages = split(self.network)
        with torch.inference_mode():
            self.entering = Entering(self.stages, proxy.batches, 2**40, copy=False)

    def own(self, index):
        """The block's weights by name."""
        return {name: self.known[name] for name in self.proxy.blocks[index].weight_names.values()}

    def first(self, index):
        own = list(self.own(index).values())
        return next(i for i, stage in enumerate(self.stages) if stage.holds(own))

    @torch.inference_mode()
    def drops(self, index, configs):
        first = self.first(index)
        others = {f"model.{name}": weight.detach() for name, weight in self.own(index).items()}
        with self.proxy.lower():
            for _ in configs:
                for b in range(len(self.proxy.batches)):
                    functional_call(self.chain, others, (self.stages[first:], self.entering.at(first, b)))

    @torch.inference_mode()
    def gflop(self, index):
        """10^9 multiplications and additions of one candidate's suffix, as torch counts them."""
        first, counter = self.first(index), FlopCounterMode(display=False)
        with self.proxy.lower(), counter:
            for b in range(len(self.proxy.batches)):
                run(self.stages[first:], self.entering.at(first, b))
        return counter.get_total_flops() / 1e9


def variants(model, batches, lower: bool) -> dict:
    """Name → what is timed, each part added to those above it; bounds after the variants that they belong to."""
    fast_layout = copy.deepcopy(model).to(memory_format=torch.channels_last)
    blocks, fast_blocks = models.find_blocks(model), models.find_blocks(fast_layout)
    fold = Proxy(fast_layout, fast_blocks, batches, together=1, fold=True)
    winograd = any(map(fits, model.modules()))
    full = Proxy(fast_layout, fast_blocks, batches, together=1, fold=True, winograd=True) if winograd else fold
    made = {"plain": Proxy(model, blocks, batches, cache=False),
            "start at the block": StartOnly(model, blocks, batches, together=1),
            "+ kernels prepared": Proxy(model, blocks, batches, together=1),
            "+ channels last": Proxy(fast_layout, fast_blocks, batches, together=1),
            "+ BatchNorm folded": fold,
            "  bound of it": Bare(fold),
            **({"+ Winograd's convolutions": full, "  bound of those": Bare(full)} if winograd else {}),
            f"+ {TOGETHER} candidates together": Proxy(fast_layout, fast_blocks, batches, together=TOGETHER, fold=True,
                                                      winograd=winograd)}
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
            rates = [matmul_rate(args.device, torch.float32, clock)]
            times = measured(made, blocks, limits, args, clock)
            rates.append(matmul_rate(args.device, torch.float32, clock))
            count, middle = args.steps * len(blocks), len(blocks) // 2
            print(f"{network}, {args.size} px, {args.images} images, {what}; {args.steps} candidates in each of "
                  f"{len(blocks)} blocks, {args.rounds} rounds")
            print(f"  {'':27} {'candidates/s':>24} {'block ' + str(middle):>8}   times plain")
            for name, taken in times.items():
                speeds, ratios = count / taken.sum(1), times["plain"].sum(1) / taken.sum(1)
                at_middle = statistics.median(args.steps / taken[:, middle])
                print(f"  {name:27} {spread(speeds.tolist()):>24} {at_middle:8.2f}   {spread(ratios.tolist())}")
            together = f"+ {TOGETHER} candidates together"
            for bound, name in (("  bound of it", "+ BatchNorm folded"), ("  bound of those", "+ Winograd's convolutions"),
                                ("  bound of those" if "  bound of those" in times else "  bound of it", together),
                                ("  bound of that", "folded, bfloat16")):
                if bound in times:
                    share = times[bound].sum(1) / times[name].sum(1)
                    gflop = sum(made[bound].gflop(i) for i in range(len(blocks))) * args.steps
                    print(f"  {name.removeprefix('+ ')}: {spread((100 * share).tolist(), '{:.0f}')} % of the bound, "
                          f"suffixes at {spread((gflop / times[bound].sum(1)).tolist(), '{:.0f}')} GFLOP/s")
            gflop = sum(made["  bound of it"].gflop(i) for i in range(len(blocks))) / len(blocks)
            taken = {name: 1000 * statistics.median(times[name].sum(1) / count) for name in (
                "  bound of it", "+ BatchNorm folded", together)}
            print(f"  a step: the suffix's {gflop:.2f} GFLOP take {1000 * gflop / max(rates):.1f} ms at the matrix product's "
                  f"{max(rates):.0f} GFLOP/s; measured " + ", ".join(f"{took:.1f} ms ({name.strip(' +')})"
                                                                    for name, took in taken.items()))
            kept = made["+ BatchNorm folded"].entering
            print(f"  states kept: {kept.bytes / 1e6:.1f} MB in float32", flush=True)


def matmul_rate(device, dtype, clock) -> float:
    """GFLOP/s of a product of two square matrices of 2048 rows, the best of five."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    a @ a
    return 2 * 2048**3 / min(seconds(lambda: a @ a, clock, device) for _ in range(5)) / 1e9


# ---------------------------------------------------------------------------------------------------------------
# The agents, told drops by a surrogate

DEIT_SMALL = ((1152, 384), (384, 384), (1536, 384), (384, 1536))  # outputs and inputs of a block's kernels


def ensembles(blocks: int, kernels: int, config: Config):
    """(low, high): one LLAEnsemble per block, told drops by a surrogate that has just become active; an HLAEnsemble."""
    sizes = list(islice(cycle(DEIT_SMALL), kernels))
    network = [SimpleNamespace(kernels={str(n): nn.Linear(size[1], size[0], bias=False, device="meta")
                                        for n, size in enumerate(sizes)}) for _ in range(blocks)]
    shapes = [kernel_shapes(block) for block in network]
    surrogate, rng = Surrogate(5 * kernels * blocks, config.surrogate, seed=0), np.random.default_rng(0)
    for acc in (80.0, 70.0, 60.0):
        surrogate.add(random_config(shapes, config.compress, rng), acc)
    surrogate.train(config.surrogate.epochs)
    estimator = DropEstimator(SimpleNamespace(blocks=network), surrogate, 90.0)
    estimator.consensus = list(random_config(shapes, config.compress, rng).blocks)
    params = [sum(shape.params for shape in block) for block in shapes]
    return ([LLAEnsemble(i, block, 0.5, estimator, config, blocks) for i, block in enumerate(network)],
            HLAEnsemble(params, [0.5] * blocks, config))


def one_by_one(low, timesteps: int) -> None:
    """Every agent of every block on its own."""
    for ensemble in low:
        for env, agent in zip(ensemble.envs, ensemble.agents):
            env.budget = BUDGET
            agent.learn(timesteps)


def take_turns(variants: dict, steps: int, rounds: int) -> None:
    """Print the rates of each variant, a function that makes ``steps`` environment steps."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for n in range(rounds + 1):
        for name, run in variants.items():
            wall, own = time.perf_counter(), time.process_time()
            run()
            if n:
                rates[name].append((steps / (time.perf_counter() - wall), steps / (time.process_time() - own)))
    for name, pairs in rates.items():
        wall, own = (sorted(column) for column in zip(*pairs))
        print(f"  {name:28} {statistics.median(wall):7.0f} [{wall[0]:.0f}, {wall[-1]:.0f}]   of the process's own time "
              f"{statistics.median(own):7.0f} [{own[0]:.0f}, {own[-1]:.0f}]", flush=True)


def agents_section(args, clock) -> None:
    """Steps of all agents, updates included, at several ways of training the same ones together."""
    config = Config()
    low, high = ensembles(12, 4, config)
    timesteps, agents = config.lla.timesteps, sum(len(ensemble.agents) for ensemble in low)
    print(f"low level, {len(low)} blocks of 4 kernels, surrogate active, {agents} agents of {timesteps} steps each, one "
          f"thread, environment steps/s, median [range] of {args.rounds}")
    take_turns({"all blocks together": lambda: train_together(low, [BUDGET] * len(low)),
                "block by block": lambda: [ensemble.train(BUDGET) for ensemble in low],
                "agent by agent": lambda: one_by_one(low, timesteps)}, agents * timesteps, args.rounds)
    print(f"high level, {len(low)} blocks, {len(high.agents)} agents of {config.hla.timesteps} steps each")
    take_turns({"agents together": lambda: high.train(config.hla.timesteps),
                "agent by agent": lambda: [agent.learn(config.hla.timesteps) for agent in high.agents]},
               len(high.agents) * config.hla.timesteps, args.rounds)


# ---------------------------------------------------------------------------------------------------------------
# torch.compile


class Behind(nn.Module):
    """The stages of a network from ``first`` on."""

    def __init__(self, network, first):
        super().__init__()
        self.network, self.first = network, first

    def forward(self, state):
        return run(split(self.network)[self.first:], state)


@torch.no_grad()
def compile_section(args, clock) -> None:
    """What torch.compile would save behind the middle block, whose layers every candidate has in common, and what it
    costs to start, nothing of it known from an earlier time."""
    inductor.force_disable_caches = True
    inductor.freezing = args.device == "cpu"  # the weights as constants, in the order that products like best
    count = Config().search.cycles * len(Config().lla.algorithms) * Config().lla.timesteps
    for name in args.networks:
        torch.manual_seed(0)
        network, _ = folded(models.build(name, 1000, args.size).to(args.device, memory_format=torch.channels_last).eval())
        stages, images = split(network), torch.randn(args.images, 3, args.size, args.size, device=args.device)
        first = len(stages) // 2
        state = run(stages[:first], images.contiguous(memory_format=torch.channels_last))
        eager = Behind(network, first)
        faster = torch.compile(Behind(network, first), mode="reduce-overhead" if args.device == "cuda" else None)
        start = seconds(lambda: faster(state), time.perf_counter, args.device)
        torch.testing.assert_close(faster(state), eager(state), rtol=1e-3, atol=1e-3)
        times = [[seconds(lambda: module(state), clock, args.device) for module in (eager, faster)]
                 for _ in range(10 * args.rounds)]
        before, after = (statistics.median(column) for column in zip(*times))
        paid = f"paid after {start / (before - after):.0f} candidates" if after < before else "never paid"
        print(f"{name}, stages {first} to {len(stages) - 1}, {args.images} images: {1e3 * before:.1f} ms, compiled "
              f"{1e3 * after:.1f} ms, {spread([b / a for b, a in times])} times as fast; start-up {start:.1f} s, {paid}; "
              f"a block has {count} in a run", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Several processes

RUN = ("--smoke --exp {exp} --device cpu --no-table --restart --set data.image_size=64 model.width=1 surrogate=off "
       "search.cycles=1 hla.timesteps=16 sensitivity.images=2 finetune.epochs=1 data.train_images=128 data.batch_size=64 "
       "data.test_images=64 finetune.bn_images=0 eval.full=false")


def processes_section(args, clock) -> None:
    """The search of one process and of two, one thread each, from the same theta_0, in turn."""
    script = str(Path(__file__).resolve().parent.parent / "hirelc.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for exp, steps in ((4, 16), (1, 4)):
            options = [*RUN.format(exp=exp).split(), f"lla.timesteps={steps}"]
            if exp == 1:  # DeiT-Small's twelve blocks, narrower
                options = ["model.width=0.5" if option == "model.width=1" else option for option in options]
            first = [sys.executable, script, *options, "search=null", "scratch.epochs=1", "baseline.epochs=0",
                     f"out={folder}/base{exp}"]
            subprocess.run(first, check=True, env=environment, stdout=subprocess.DEVNULL)
            weights = next(Path(f"{folder}/base{exp}").glob("*/baseline.pt"))
            options = ["--weights", str(weights), *options, "baseline.epochs=0"]
            ratios, policies = [], set()
            for round_ in range(args.rounds):
                seconds = []
                for count in (1, 2):
                    starter = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone",
                                                     f"--nproc_per_node={count}"]
                    out = f"{folder}/{exp}-{count}-{round_}"
                    subprocess.run([sys.executable, *starter, script, *options, f"out={out}"], check=True,
                                   env=environment, stdout=subprocess.DEVNULL)
                    path = next(Path(out).iterdir())
                    seconds.append(json.loads((path / "result.json").read_text())["timings"]["search"])
                    policies.add((path / "policy.json").read_text())
                ratios.append(seconds[0] / seconds[1])
            print(f"experiment {exp}, search by the proxy, one process {seconds[0]:.1f} s, two {seconds[1]:.1f} s in the last "
                  f"round; times one process {spread(ratios)}; {'the same' if len(policies) == 1 else 'NOT the same'} "
                  "policy.json", flush=True)


SECTIONS = {"proxy": proxy_section, "agents": agents_section, "compile": compile_section, "processes": processes_section}


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", nargs="+", default=["proxy", "agents"], choices=tuple(SECTIONS))
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=sorted([*models.VITS, *models.CNNS]))
    parser.add_argument("--steps", type=int, default=TOGETHER, help="candidates per block and round")
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
    for section in args.sections:
        SECTIONS[section](args, clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
