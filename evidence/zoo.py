"""compress_model on six networks of torchvision's zoo that this project did not write.

    python -m evidence.zoo --data-dir DIR    # real images: cifar10/ or another data set of config.DATASETS below DIR
    python -m evidence.zoo                   # drawn images

What it shows is what is found, compressed and counted, and how long it takes, not accuracy: the networks have random
weights (the zoo's own would have to be downloaded), and search and fine-tuning have the budget that is printed. Of
each network it checks that the given one is the same afterwards, bit for bit. The exit code is 1 where it is not.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time

import torch
import torchvision

import data
import hirelc
from config import Data, InputError
from support.log import Log

NETWORKS = ("vgg11_bn", "densenet121", "regnet_y_400mf", "convnext_tiny", "swin_t", "efficientnet_b0")
BUDGET = {"search__cycles": 1, "lla__timesteps": 4, "hla__timesteps": 16, "search__proxy_batches": 1,
          "sensitivity__images": 4, "baseline__epochs": 0, "finetune__epochs": 1, "data__batch_size": 32,
          "eval__images": 64, "eval__full": False}


def make(name: str, num_classes: int) -> torch.nn.Module:
    """A network of torchvision's zoo with random weights from a fixed seed."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def compress(name: str, train, test, num_classes: int, log=None, **budget):
    """(given network, compressed network, policy, result, seconds, whether the given network is as it was)."""
    network = make(name, num_classes)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    started = time.monotonic()
    compressed, policy, result = hirelc.compress_model(network, train, test, log=log, **{**BUDGET, **budget})
    seconds = time.monotonic() - started
    after = network.state_dict()
    same = list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    return network, compressed, policy, result, seconds, same


def main(argv=None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the data sets; without it images are drawn")
    parser.add_argument("--data", default="cifar10", help="data set below --data-dir (cifar10)")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="names of torchvision's zoo")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (64)")
    args = parser.parse_args(argv)
    try:
        splits = data.load(Data(name=args.data if args.data_dir else "synthetic", dir=args.data_dir or "",
                                image_size=args.size, train_images=128, test_images=64, cache=False))
    except InputError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if args.device != "cpu" and torch.cuda.is_available() else platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}; {args.data if args.data_dir else 'drawn images'} at {args.size} px, "
          f"{len(splits.train)} training images, random weights")
    print("budget: " + " ".join(f"{key.replace('__', '.')}={value}" for key, value in BUDGET.items()) + "\n")
    print("| network | kernels | blocks | parameters of the kernels besides the classifier's | compressed | CR | "
          "whole model | seconds | given network |\n|---|---|---|---|---|---|---|---|---|", flush=True)
    left_out, code = [], 0
    with open(os.devnull, "w") as nowhere:
        for name in args.networks:
            *_, result, seconds, same = compress(name, splits.train, splits.test, splits.num_classes,
                                                 Log(nowhere), device=args.device)
            count = result["accounting"]
            kernels, blocks = result["kernels"], {kernel["block"] for kernel in result["kernels"].values()}
            print(f"| {name} | {len(kernels)} | {len(blocks)} | {count['compressed'] + count['kernels_left_out']:,} | "
                  f"{100 * result['coverage']:.1f} % | {result['cr']:.2f} | {result['whole_model_ratio']:.2f} | "
                  f"{seconds:.0f} | {'unchanged' if same else 'CHANGED'} |", flush=True)
            left_out += [f"- {name}, {kernel} ({entry['params']:,}): {entry['reason']}"
                         for kernel, entry in result["excluded"].items()]
            code = code if same else 1
            gc.collect()
    print("\nNot compressed (parameters):\n" + "\n".join(left_out))
    return code


if __name__ == "__main__":
    sys.exit(main())
