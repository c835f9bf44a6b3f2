"""What the search, training and a network without its pruned channels cost on this machine.

    python -m evidence.speed                                            # proxy and agents
    python -m evidence.speed --sections training latency processes
    python -m evidence.speed --threads 1 --clock cpu                    # on a machine that others use, too

``proxy``: steps per second of the logit-MSE proxy, beside a loop that prunes, quantises and runs the whole network for
the same candidates. ``agents``: environment steps per second with the surrogate active, updates included.
``training``: ResNet18 at 64 px, beside a plain loop over torchvision's network and transforms and a DataLoader.
``latency``: a forward pass of the dense, masked and narrow network; exit code 1 where the logits of the last two are
further apart than 1e-4. ``processes``: the search of experiment 4, small, by one process and by two. What is compared
takes turns, one round untimed; printed are medians and ranges.
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2

import data
import models
from compress import BlockConfig, LayerBudget, compress_kernel, kernel_shapes, prune_mask
from config import Compress, Config
from deploy import narrow
from estimate import DropEstimator, Proxy, Surrogate, proxy_drop
from search import HLAEnsemble, LLAEnsemble, decode_lla, lla_nvec, random_config
from support.runs import keep_freed_memory
from train import Recipe, Trainer

LIMITS = {"INT uniform": Compress(), "types and granularities chosen": Compress(qtype="any", granularity="any")}
BUDGET = LayerBudget(0.25, 0.6, 3, 1.0, "auto")


def in_turn(calls: dict, args) -> dict[str, list[float]]:
    """Return the seconds of every call, name → one per round; a first round is not timed."""
    times = {name: [] for name in calls}
    for round_ in range(args.rounds + 1):
        for name, call in calls.items():
            start = args.timer()
            call()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(args.timer() - start)
    return times


def spread(values, form="{:.2f}") -> str:
    """Return median [least, most]."""
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{least}, {most}]"


def ratios(first, second) -> str:
    """Return the spread of first / second, round by round."""
    return spread([a / b for a, b in zip(first, second)])


class PlainLoop:
    """The proxy as one would write it down: compress the block, run the whole network, put theta_0 back."""

    def __init__(self, model, batches):
        self.model, self.blocks, self.batches = model, models.find_blocks(model), batches
        with torch.inference_mode():
            self.reference = [model(batch) for batch in batches]

    @torch.inference_mode()
    def drops(self, index, configs):
        kernels, drops = list(self.blocks[index].kernels.values()), []
        theta0 = [kernel.weight.clone() for kernel in kernels]
        for config in configs:
            for kernel, chosen in zip(kernels, config.kernels):
                kernel.weight.copy_(compress_kernel(kernel.weight, chosen)[0])
            errors = [F.mse_loss(self.model(x), y).item() for x, y in zip(self.batches, self.reference)]
            drops.append(proxy_drop(statistics.mean(errors)))
            for kernel, weight in zip(kernels, theta0):
                kernel.weight.copy_(weight)
        return drops


def proxy_section(args) -> int:
    """Steps per second over all blocks, per network and per choice of what agents decide."""
    for name in args.networks or ("resnet18", "deit_tiny_patch16_224"):
        torch.manual_seed(0)
        plain = models.build(name, 1000, args.side).to(args.device).eval()
        batches = [torch.randn(args.images, 3, args.side, args.side, device=args.device)]
        network = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # as a run has it
        blocks = models.find_blocks(network)
        estimators = {"proxy": Proxy(network, blocks, batches), "plain": PlainLoop(plain, batches)}
        for what, limits in LIMITS.items():
            rng, seconds = np.random.default_rng(0), {key: np.zeros(args.rounds) for key in estimators}
            for index, shapes in enumerate(map(kernel_shapes, blocks)):
                configs = [BlockConfig(decode_lla(rng.integers(lla_nvec(len(shapes))), BUDGET, limits, shapes), shapes)
                           for _ in range(args.steps)]
                np.testing.assert_allclose(*[e.drops(index, configs[:1]) for e in estimators.values()], 1e-3, 1e-4)
                calls = {key: lambda e=e: e.drops(index, configs) for key, e in estimators.items()}
                for key, times in in_turn(calls, args).items():
                    seconds[key] += times
            rates = {key: args.steps * len(blocks) / taken for key, taken in seconds.items()}
            print(f"{name}, {args.side} px, {args.images} images, {what}: proxy {spread(rates['proxy'])} steps/s, "
                  f"plain loop {spread(rates['plain'])}, ratio {ratios(rates['proxy'], rates['plain'])}", flush=True)
    return 0


def agents_section(args) -> int:
    """Environment steps per second of both levels on DeiT-Small's blocks, drops told by a surrogate."""
    config, rng = Config(), np.random.default_rng(0)
    blocks = models.find_blocks(models.build("deit_small_patch16_224", 100))
    shapes = [kernel_shapes(block) for block in blocks]
    surrogate = Surrogate(5 * sum(map(len, shapes)), config.surrogate, seed=0)
    for acc in (80.0, 70.0, 60.0):
        surrogate.add(random_config(shapes, config.compress, rng), acc)
    estimator = DropEstimator(SimpleNamespace(blocks=blocks), surrogate, 90.0)
    estimator.consensus = list(random_config(shapes, config.compress, rng).blocks)
    low = LLAEnsemble(0, blocks[0], 0.5, estimator, config, len(blocks))
    high = HLAEnsemble([sum(shape.params for shape in block) for block in shapes], [0.5] * len(blocks), config)
    times = in_turn({"low": lambda: low.search(BUDGET), "high": lambda: high.train(config.hla.timesteps)}, args)
    for level, agents, steps in (("low", low.agents, config.lla.timesteps),
                                 ("high", high.agents, config.hla.timesteps)):
        rates = [len(agents) * steps / taken for taken in times[level]]
        print(f"{len(agents)} agents of the {level} level: {spread(rates, '{:.0f}')} steps/s", flush=True)
    return 0


AUGMENT = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2), v2.ToImage(),
                      v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])


def collate(pairs):
    """Return a batch of augmented pictures and their labels."""
    pictures, labels = zip(*pairs)
    return torch.stack([AUGMENT(picture) for picture in pictures]), torch.tensor(labels)


def training_section(args) -> int:
    """Images per second of an epoch, in batches of 64, flipped and with colour jitter."""
    count, side, classes = 1280, 64, 10
    train, _ = data.synthetic(classes, count, classes, side, seed=0)
    network = models.build("resnet18", classes, side).to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(network, train, train, Recipe("baseline", 10**6, 1e-4, 0.01), batch_size=64, eval_images=1,
                   eval_batch_size=1, generator=torch.Generator().manual_seed(0))
    x, y = train.batch(torch.arange(count), torch.device("cpu"))
    pictures = [v2.functional.to_pil_image((image - image.min()) / (image.max() - image.min())) for image in x]
    loader = torch.utils.data.DataLoader(list(zip(pictures, y.tolist())), 64, shuffle=True, collate_fn=collate,
                                         num_workers=os.cpu_count(), persistent_workers=True)
    model = torchvision.models.resnet18(num_classes=classes).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def plain():
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(args.device)), labels.to(args.device)).backward()
            optimizer.step()

    times = in_turn({"ours": trainer.run_epoch, "plain": plain}, args)
    ours, other = ([count / taken for taken in column] for column in times.values())
    print(f"training ResNet18 at {side} px, {count} images: {spread(ours, '{:.0f}')} images/s, torchvision and a "
          f"DataLoader {spread(other, '{:.0f}')}, ratio {ratios(ours, other)}", flush=True)
    return 0


@torch.inference_mode()
def latency_section(args) -> int:
    """Milliseconds of a forward pass with half of every kernel's channels pruned: dense, masked, narrow."""
    code = 0
    for name in args.networks or ("resnet18", "mobilenetv2_100", "deit_small_patch16_224"):
        torch.manual_seed(0)
        dense = models.build(name, 1000, args.side).to(args.device)
        dense(images := torch.randn(args.images, 3, args.side, args.side, device=args.device))  # for BatchNorm
        masked = copy.deepcopy(dense.eval())
        for kernel in (kernel for block in models.find_blocks(masked) for kernel in block.kernels.values()):
            kernel.weight[~prune_mask(kernel.weight, 0.5)] = 0
        networks = {"dense": dense, "masked": masked, "narrow": narrow.materialize(masked, images[:1])}
        apart = float((masked(images) - networks["narrow"](images)).abs().max())
        code = max(code, int(not apart <= 1e-4))
        times = in_turn({key: lambda n=n: n(images) for key, n in networks.items()}, args)
        taken = ", ".join(f"{key} {spread([1000 * t for t in ts])} ms" for key, ts in times.items())
        work = " and ".join(f"{narrow.multiply_adds(n, images) / 1e6:.0f} M" for n in (dense, networks["narrow"]))
        print(f"{name}, batch {args.images}: {taken}, dense / narrow {ratios(times['dense'], times['narrow'])}, {work} "
              f"multiply-adds; logits {apart:.1e} apart", flush=True)
    return code


RUN = ("--smoke --exp 4 --device cpu --no-table --restart --set data.image_size=64 model.width=1 surrogate=off "
       "search.cycles=1 hla.timesteps=16 lla.timesteps=16 sensitivity.images=2 finetune.epochs=1 data.train_images=128 "
       "data.batch_size=64 data.test_images=64 finetune.bn_images=0 eval.full=false threads=1")


def processes_section(args) -> int:
    """The search of one process and of two, one thread each, from the same theta_0, in turn."""
    script, seconds, policies = Path(__file__).resolve().parent.parent / "hirelc.py", {1: [], 2: []}, set()
    with tempfile.TemporaryDirectory() as folder:
        def run(name, count, *more):
            starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
            subprocess.run([sys.executable, *starter, str(script), *RUN.split(), *more, f"out={folder}/{name}"],
                           check=True, stdout=subprocess.DEVNULL)
            return next(Path(f"{folder}/{name}").iterdir())

        weights = run("base", 1, "search=null", "scratch.epochs=1", "baseline.epochs=0") / "baseline.pt"
        for round_ in range(args.rounds):
            for count in seconds:
                path = run(f"{count}-{round_}", count, f"model.weights={weights}", "baseline.epochs=0")
                seconds[count].append(json.loads((path / "result.json").read_text())["timings"]["search"])
                policies.add((path / "policy.json").read_text())
    print(f"search of one process {spread(seconds[1], '{:.1f}')} s, of two {spread(seconds[2], '{:.1f}')} s, ratio "
          f"{ratios(seconds[1], seconds[2])}; {'the same' if len(policies) == 1 else 'NOT the same'} policy.json")
    return int(len(policies) > 1)


SECTIONS = {"proxy": proxy_section, "agents": agents_section, "training": training_section, "latency": latency_section,
            "processes": processes_section}


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", nargs="+", default=["proxy", "agents"], choices=tuple(SECTIONS))
    parser.add_argument("--networks", nargs="+", choices=sorted([*models.VITS, *models.CNNS]))
    parser.add_argument("--steps", type=int, default=3, help="candidates per block and round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--images", type=int, default=8, help="calibration images, and images of a forward pass")
    parser.add_argument("--side", type=int, default=224, help="side of these images in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu = processor time of this process")
    args = parser.parse_args()
    args.timer = time.perf_counter if args.clock == "wall" else time.process_time
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()  # as hirelc.py does
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
          f"{torch.__version__}, {args.clock} clock, {time.strftime('%Y-%m-%d')}", flush=True)
    return max(SECTIONS[section](args) for section in args.sections)


if __name__ == "__main__":
    sys.exit(main())
