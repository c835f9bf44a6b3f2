"""How long Tiny ImageNet takes to load: the first time, from the cache, and with torchvision.

    python benchmarks/loading.py --data-dir DIR    # Tiny ImageNet below DIR

A pass reads all training and validation images as batches of 256, unaugmented, as normalised floats on the CPU at
64 px; its time counts from the call that opens the data set, listing included. torchvision's ImageFolder with a
DataLoader (one process per core) reads the same files once. Every file is read before, so that all find it in the page
cache. The decoded cache goes to a temporary folder in DIR: a cache that lies there already is neither used nor changed.
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

import torch
import torchvision
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import sources  # noqa: E402
from config import Data, InputError  # noqa: E402
from support.runs import keep_freed_memory  # noqa: E402

BATCH = 256


def cpu_name() -> str:
    """The processor as /proc/cpuinfo calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def timed(batches) -> tuple[float, float, int]:
    """(seconds to the first batch, seconds to the end, images) of a generator that has not been started."""
    start, first, count = time.perf_counter(), 0.0, 0
    for x, y in batches:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, 64, 64)
        first = first or time.perf_counter() - start
        count += len(y)
    return first, time.perf_counter() - start, count


def ours(folder: Path):
    """Open the data set and yield all of its batches."""
    splits = data.load(Data(name="tiny-imagenet", dir=str(folder), image_size=64))
    for part in (splits.train, splits.test):
        yield from part.batches(BATCH)


def plain(tree: Path):
    """The same with torchvision; the validation images lie in one folder, which it takes for a class."""
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*data.IMAGENET_STATS)])
    for split in ("train", "val"):
        images = torchvision.datasets.ImageFolder(str(tree / split), transform)
        yield from torch.utils.data.DataLoader(images, BATCH, num_workers=sources.cores())


def report(what: str, times, rounds: int = 1) -> float:
    """Print one line, the medians and the range of the full pass; → the median of the full pass."""
    first, whole = (statistics.median(column) for column in list(zip(*times))[:2])
    spread = f" [{min(t[1] for t in times):.2f}, {max(t[1] for t in times):.2f}]" if rounds > 1 else ""
    print(f"  {what:34} first batch {first:7.2f} s   full pass {whole:7.2f} s{spread}   "
          f"{times[0][2] / whole:8.0f} images/s", flush=True)
    return whole


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder that holds tiny-imagenet-200/")
    parser.add_argument("--rounds", type=int, default=5, help="passes from the cache; their median is compared")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of this process, the same for all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as hirelc.py does; for both sides
    tree = Path(args.data_dir).resolve() / "tiny-imagenet-200"
    files = [path for split in ("train", "val") for path in (tree / split).rglob("*.JPEG")]
    if not files:
        print(f"loading: {tree} holds no images", file=sys.stderr)
        return 2
    size = sum(len(path.read_bytes()) for path in files)
    print(f"{cpu_name()}, {sources.cores()} cores, {args.threads} torch threads, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}, {time.strftime('%Y-%m-%d')}; load average at the start "
          f"{os.getloadavg()[0]:.1f}")
    print(f"{len(files)} files, {size / 1e6:.0f} MB; batches of {BATCH} as floats at 64 px on the CPU", flush=True)
    with tempfile.TemporaryDirectory(prefix=".loading-", dir=args.data_dir) as scratch:
        folder = Path(scratch)
        (folder / tree.name).symlink_to(tree)
        try:
            other = report("torchvision ImageFolder, DataLoader", [timed(plain(tree))])
            first = report("here, first time (no cache)", [timed(ours(folder))])
            cached = [timed(ours(folder)) for _ in range(args.rounds)]
        except InputError as error:
            print(f"loading: {error}", file=sys.stderr)
            return 2
        again = report(f"here, from the cache ({args.rounds} rounds)", cached, args.rounds)
        assert all(t[2] == len(files) for t in cached), "a pass did not read every file"
    print(f"full pass from the cache: {other / again:.1f} times faster than torchvision, {first / again:.1f} times "
          f"faster than the first time; the first time: {other / first:.1f} times faster than torchvision")
    print(f"load average at the end {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
