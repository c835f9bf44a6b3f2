"""Throughput of training, evaluation and search, measured on this machine.

    python benchmarks/throughput.py --data-dir DIR    # Tiny ImageNet below DIR
    python benchmarks/throughput.py                   # drawn images, written to a temporary folder as JPEG

Training and evaluation of ResNet18 at 64 px stand beside a plain loop over torchvision's network, ImageFolder and
DataLoader that reads the same files with the same augmentation; the two take turns, ``--rounds`` times, and the ratio
is that of the medians. A low-level environment step is one candidate: decode, estimate the drop, reward, observe.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import models  # noqa: E402
from compress import kernel_shapes  # noqa: E402
from config import Compress, Config, InputError, LLA, override  # noqa: E402
from support.runs import keep_freed_memory  # noqa: E402
from search import (DropEstimator, LayerBudget, LLAEnv, Proxy, Surrogate, lla_nvec, random_config)  # noqa: E402
from train import Trainer, correct  # noqa: E402

BATCH = 64


def write_images(folder: Path, count: int) -> None:
    """A tree in Tiny ImageNet's layout of drawn 64 px images, ten classes."""
    images, _ = data.synthetic(10, count, 10, 64, seed=0)
    names = [f"n{c:08d}" for c in range(10)]
    root = folder / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(names))
    lines = []
    for i, (image, label) in enumerate(zip(images.images, images.labels)):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        target = root / "train" / names[label] / "images" / f"{i}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        picture.save(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{names[label]}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))


def plain_loops(root: Path, count: int, classes: int):
    """(train, evaluate): one pass over ``count`` images with torchvision and a DataLoader."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    augment = v2.Compose([v2.Resize((64, 64)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2), *tail])
    train_set = torchvision.datasets.ImageFolder(str(root / "train"), augment)
    test_set = torchvision.datasets.ImageFolder(str(root / "train"), v2.Compose([v2.Resize((64, 64)), *tail]))
    index = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:count].tolist()
    workers = os.cpu_count()
    train_loader = torch.utils.data.DataLoader(torch.utils.data.Subset(train_set, index), BATCH, shuffle=True,
                                               num_workers=workers, persistent_workers=True)
    test_loader = torch.utils.data.DataLoader(torch.utils.data.Subset(test_set, index), 256, num_workers=workers,
                                              persistent_workers=True)
    model = torchvision.models.resnet18(num_classes=classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train():
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate():
        model.eval()
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in test_loader)

    return train, evaluate


def our_loops(splits, count: int):
    """(train, evaluate): the same with this project's network, image sets and trainer."""
    model = models.build("resnet18", splits.num_classes, 64).to(memory_format=torch.channels_last)
    train_set = splits.train.subset(slice(0, count))
    few = splits.test.subset(slice(0, 1))  # a Trainer measures after each epoch: one image, not to be timed
    trainer = Trainer(model, train_set, few, epochs=10**6, lr=1e-4, weight_decay=0.01, patience=0, batch_size=BATCH,
                      eval_images=1, eval_batch_size=1, generator=torch.Generator().manual_seed(0))
    return trainer.run_epoch, lambda: correct(model, train_set)


def seconds(call) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(ours, plain, rounds: int, count: int):
    """Images/s of both, median and range over the rounds; both are run once first and not timed."""
    ours(), plain()
    times = [(seconds(ours), seconds(plain)) for _ in range(rounds)]
    return [sorted(count / t for t in column) for column in zip(*times)]


def step_rate(network: str, image_size: int, limits: Compress, surrogate: bool, images: int, least: float) -> float:
    """LLA environment steps/s on the middle block, over at least ``least`` seconds."""
    torch.manual_seed(0)
    model = models.build(network, 100, image_size).to(memory_format=torch.channels_last).eval()
    blocks = models.find_blocks(model)
    shapes = [kernel_shapes(block) for block in blocks]
    batches = torch.randn(images, 3, image_size, image_size).split(64)
    mlp = Surrogate(5 * sum(map(len, shapes)), Config().surrogate, 0)
    rng = np.random.default_rng(0)
    if surrogate:
        for acc in (80.0, 70.0, 60.0):
            mlp.add(random_config(shapes, limits, rng), acc)
    estimator, index = DropEstimator(Proxy(model, blocks, batches), mlp, 90.0), len(blocks) // 2
    env = LLAEnv(index, shapes[index], 0.5, estimator, limits, LLA(), (30.0, 5.0, 1.0), blocks=len(blocks))
    env.budget = LayerBudget(0.25, 0.4, 5, 1.0, "auto")
    env.reset()
    nvec = np.array(lla_nvec(len(shapes[index])))
    env.step(rng.integers(nvec, size=(env.num_envs, len(nvec))))  # caches the reference logits
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < least:
        env.step(rng.integers(nvec, size=(env.num_envs, len(nvec))))
        steps += env.num_envs
    return steps / (time.perf_counter() - start)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="folder that holds tiny-imagenet-200/")
    parser.add_argument("--images", type=int, default=2560, help="images per pass")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each")
    parser.add_argument("--seconds", type=float, default=10.0, help="at least this long per step rate")
    args = parser.parse_args()
    keep_freed_memory()  # as hirelc.py does; for both sides
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.data_dir or scratch)
        if not args.data_dir:
            write_images(folder, args.images)
        settings = override(Config(), {"data.name": "tiny-imagenet", "data.dir": str(folder), "data.image_size": 64,
                                       "data.train_images": args.images, "data.test_images": 1})
        try:
            splits = data.load(settings.data)
        except InputError as error:
            print(f"throughput: {error}", file=sys.stderr)
            return 2
        ours, plain = our_loops(splits, args.images), plain_loops(folder / "tiny-imagenet-200", args.images,
                                                                  splits.num_classes)
        print(f"ResNet18, 64 px, {args.images} images per pass, {args.rounds} rounds in turn; median [range] images/s")
        for what, our, other in zip(("training, batch 64", "evaluation, batch 256"), ours, plain):
            mine, theirs = take_turns(our, other, args.rounds, args.images)
            ratio = statistics.median(mine) / statistics.median(theirs)
            print(f"  {what:22} here {statistics.median(mine):6.0f} [{mine[0]:.0f}, {mine[-1]:.0f}]   torchvision "
                  f"+ DataLoader {statistics.median(theirs):6.0f} [{theirs[0]:.0f}, {theirs[-1]:.0f}]   ratio {ratio:.2f}",
                  flush=True)
    print("LLA environment steps/s on the middle block, two environments")
    both = Compress(), Compress(qtype="any", granularity="any")
    for network, size, surrogate, images in (("resnet18", 64, False, 128), ("deit_small_patch16_224", 224, False, 8),
                                             ("deit_small_patch16_224", 224, True, 8)):
        rates = [step_rate(network, size, limits, surrogate, images, args.seconds) for limits in both]
        how = "surrogate" if surrogate else f"proxy, {images} images"
        print(f"  {network}, {size} px, {how:18}  INT uniform {rates[0]:8.1f}   types and granularities chosen "
              f"{rates[1]:8.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
