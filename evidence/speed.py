"""What the search and training cost on this machine.

    python -m evidence.speed --sections proxy training
    python -m evidence.speed --sections table job --data-dir DIR --weights-dir DIR    # published networks, real images

``proxy``: steps per second of the logit-MSE proxy, beside a loop that prunes, quantises and runs the whole network for
the same candidates. ``training``: images per second of ResNet18 at 64 px. ``table``: environment steps per second with
the table of estimates and with the proxy, updates left out, and the table's rank correlation with the proxy on 200
held-out candidates. ``job``: seconds of compress_model for ResNet-20 at a twelfth of its file. What is compared takes
turns, one round untimed; printed are medians and ranges.
"""

import argparse
import copy
import os
import platform
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import hirelc
import models
from compress import BlockConfig, LayerBudget, compress_kernel, kernel_shapes, model_bytes, retained_weights
from config import Compress, Config
from estimate import DropEstimator, Proxy, proxy_drop
from evidence import networks
from evidence.baselines import Problem, Space
from evidence.table import EstimateTable, compare, measure
from search import LLAEnv, decode_lla, lla_nvec
from support.cli import arguments
from support.log import Log
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


def training_section(args) -> None:
    """Images per second of an epoch of ResNet18, in batches of 64, flipped and with colour jitter."""
    count, side, classes = 1280, 64, 10
    train, _ = data.synthetic(classes, count, classes, side, seed=0)
    network = models.build("resnet18", classes, side).to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(network, train, train, Recipe("baseline.lr", 10**6, 1e-4, 0.01), batch_size=64, eval_images=1,
                      eval_batch_size=1, generator=torch.Generator().manual_seed(0))
    seconds, = in_turn([trainer.run_epoch], args)
    print(f"training ResNet18 at {side} px, {count} images: {spread(count / seconds)} images/s", flush=True)


def published(args, name: str):
    """Return a network of evidence.grid with its published weights, and its training images."""
    flags, weights, images, *_ = networks.NETWORKS[name]
    config = arguments([*flags.split(), "--data-dir", args.data_dir, "--set", *images.split()])[1][0]
    splits = data.load(config.data, pretrained_stats=models.PRETRAINED_STATS[config.model.name])
    model = getattr(networks, name)() if hasattr(networks, name) else models.build(
        config.model.name, 1000, config.data.image_size)
    models.load_pretrained(model, str(Path(args.weights_dir) / weights), args.weights_dir)
    return model.to(memory_format=torch.channels_last).eval(), splits


def table_section(args) -> None:
    """Steps per second of low-level environments over all blocks, and how well the table ranks."""
    limits, rng = Compress(bits_min=2, granularity="fitted"), np.random.default_rng(0)
    for name in args.networks:
        model, splits = published(args, name)
        images, _ = splits.train.batch(torch.arange(args.images), generator=torch.Generator().manual_seed(0))
        blocks = models.survey(model, images, scope="all").blocks
        proxy, params = Proxy(model, blocks, [images]), sum(k.params for b in blocks for k in kernel_shapes(b))
        space = Space(Problem(blocks, [0.5] * len(blocks), limits, retained_weights, 0.1 * params, 0))
        start = time.perf_counter()
        made = EstimateTable(proxy, **measure(proxy, space, rng))
        taken, seconds = time.perf_counter() - start, np.zeros((2, args.rounds))
        for i, block in enumerate(blocks):
            told = [DropEstimator(source, SimpleNamespace(active=False), 90.0) for source in (made, proxy)]
            envs = [LLAEnv(i, kernel_shapes(block), 0.5, estimator, limits, Config().lla, (30.0, 1.5, 1.0),
                           blocks=len(blocks)) for estimator in told]
            actions = [rng.integers(lla_nvec(len(block.kernels)), size=(2, 4 * len(block.kernels)))
                       for _ in range(args.steps)]

            def play(env):
                env.budget = BUDGET
                env.reset()
                for action in actions:
                    env.step(action)

            seconds += in_turn([lambda: play(envs[0]), lambda: play(envs[1])], args)
        ours, other = 2 * args.steps * len(blocks) / seconds
        print(f"{name}, {args.images} images: table {spread(ours)} steps/s, proxy {spread(other)}, ratio "
              f"{spread(ours / other)}; made in {taken:.0f} s, {made.quality['passes']} passes; " + ", ".join(
                  f"{key.replace('_', ' ')} {np.float64(value):.3g}"  # None, where nothing can be ranked, is nan
                  for key, value in compare(made, space, rng, 200).items()), flush=True)


def job_section(args) -> None:
    """Seconds from ``compress_model(...)`` to the packed file, and the phases' shares."""
    model, splits = published(args, "resnet20")
    start, packed = time.perf_counter(), Path(tempfile.mkdtemp()) / "small.pt"
    _, _, result = hirelc.compress_model(
        model, data.Part(splits.train, torch.arange(20_000)), splits.test, packed=packed, preset="plus",
        goal=f"size:{model_bytes(model) // 12}B", search__cycles=1, finetune__epochs=3, finetune__lr=1e-3,
        data__batch_size=128, precision="bfloat16", log=Log(open(os.devnull, "w")))
    seconds = time.perf_counter() - start
    shares = sorted(result["timings"].items(), key=lambda item: -item[1])
    print(f"job: ResNet-20, {result['fp32_bytes']:,} bytes to {packed.stat().st_size:,}, "
          f"{result['deployed_acc_full']:.2f} % of {result['test_images']} images, {seconds:.0f} s: " + ", ".join(
              f"{name} {100 * value / seconds:.0f} %" for name, value in shares if value > 0.01 * seconds), flush=True)


SECTIONS = {"proxy": proxy_section, "training": training_section, "table": table_section, "job": job_section}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", nargs="+", default=["proxy", "training"], choices=tuple(SECTIONS))
    parser.add_argument("--steps", type=int, default=3, help="candidates per block and round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--images", type=int, default=8, help="calibration images")
    parser.add_argument("--side", type=int, default=224, help="side of these images in pixels")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=networks.NETWORKS, help="of the table")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--weights-dir", default="weights", help="folder of the published weights")
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
