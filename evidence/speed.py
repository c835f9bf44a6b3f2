"""What the search and training cost on this machine.

    python -m evidence.speed --sections proxy agents training

``proxy``: steps per second of the logit-MSE proxy, beside a loop that prunes, quantises and runs the whole network for
the same candidates. ``agents``: environment steps per second with the surrogate active, updates included.
``training``: images per second of ResNet18 at 64 px. What is compared takes turns, one round untimed; printed are
medians and ranges.
"""

import argparse
import copy
import os
import platform
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
from compress import BlockConfig, LayerBudget, compress_kernel, kernel_shapes
from config import Compress, Config
from estimate import DropEstimator, Proxy, Surrogate, proxy_drop
from search import HLAEnsemble, LLAEnsemble, decode_lla, lla_nvec, random_config
from support.runs import keep_freed_memory
from train import Recipe, Trainer

BUDGET = LayerBudget(0.25, 0.6, 3, 1.0, "auto")


def in_turn(calls, args) -> np.ndarray:
    """Return the seconds of every call in every round, [calls, rounds]; a first round is not timed."""
    seconds = np.zeros((len(calls), args.rounds + 1))
    for round_ in range(args.rounds + 1):
        for n, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[n, round_] = time.perf_counter() - start
    return seconds[:, 1:]


def spread(values) -> str:
    """Return median [least, most] to three digits."""
    return f"{np.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


@torch.inference_mode()
def plain_drops(model, block, configs, images, reference) -> list[float]:
    """Estimate drops as one would write it down: compress the block, run the whole network, put theta_0 back."""
    kernels, drops = list(block.kernels.values()), []
    theta0 = [kernel.weight.clone() for kernel in kernels]
    for config in configs:
        for kernel, chosen in zip(kernels, config.kernels):
            kernel.weight.copy_(compress_kernel(kernel.weight, chosen)[0])
        drops.append(proxy_drop(F.mse_loss(model(images), reference).item()))
        for kernel, weight in zip(kernels, theta0):
            kernel.weight.copy_(weight)
    return drops


def proxy_section(args) -> None:
    """Steps per second over all blocks; every kernel's type and granularity are drawn."""
    limits = Compress(qtype="any", granularity="any")
    for name in ("resnet18", "deit_tiny_patch16_224"):
        torch.manual_seed(0)
        plain = models.build(name, 1000, args.side).to(args.device).eval().requires_grad_(False)
        images = torch.randn(args.images, 3, args.side, args.side, device=args.device)
        network = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # as a run has it
        proxy, blocks = Proxy(network, models.find_blocks(network), [images]), models.find_blocks(plain)
        reference = plain(images)
        rng, seconds = np.random.default_rng(0), np.zeros((2, args.rounds))
        for index, shapes in enumerate(map(kernel_shapes, blocks)):
            configs = [BlockConfig(decode_lla(rng.integers(lla_nvec(len(shapes))), BUDGET, limits, shapes), shapes)
                       for _ in range(args.steps)]
            calls = [lambda: proxy.drops(index, configs),
                     lambda: plain_drops(plain, blocks[index], configs, images, reference)]
            np.testing.assert_allclose(calls[0](), calls[1](), 1e-3, 1e-4)
            seconds += in_turn(calls, args)
        ours, other = args.steps * len(blocks) / seconds
        print(f"{name}, {args.side} px, {args.images} images: proxy {spread(ours)} steps/s, plain loop "
              f"{spread(other)}, ratio {spread(ours / other)}", flush=True)


def agents_section(args) -> None:
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
    seconds = in_turn([lambda: low.search(BUDGET), lambda: high.train(config.hla.timesteps)], args)
    for level, steps, taken in zip((low, high), (config.lla.timesteps, config.hla.timesteps), seconds):
        rates = len(level.agents) * steps / taken
        print(f"{len(level.agents)} agents of {type(level).__name__}: {spread(rates)} steps/s", flush=True)


def training_section(args) -> None:
    """Images per second of an epoch of ResNet18, in batches of 64, flipped and with colour jitter."""
    count, side, classes = 1280, 64, 10
    train, _ = data.synthetic(classes, count, classes, side, seed=0)
    network = models.build("resnet18", classes, side).to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(network, train, train, Recipe("baseline.lr", 10**6, 1e-4, 0.01), batch_size=64, eval_images=1,
                      eval_batch_size=1, generator=torch.Generator().manual_seed(0))
    seconds, = in_turn([trainer.run_epoch], args)
    print(f"training ResNet18 at {side} px, {count} images: {spread(count / seconds)} images/s", flush=True)


SECTIONS = {"proxy": proxy_section, "agents": agents_section, "training": training_section}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", nargs="+", default=["proxy", "agents"], choices=tuple(SECTIONS))
    parser.add_argument("--steps", type=int, default=3, help="candidates per block and round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--images", type=int, default=8, help="calibration images")
    parser.add_argument("--side", type=int, default=224, help="side of these images in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    keep_freed_memory()  # as hirelc.py does
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
          f"{torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    for section in args.sections:
        SECTIONS[section](args)


if __name__ == "__main__":
    main()
