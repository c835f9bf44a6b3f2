"""Several processes on one run, as ``torchrun`` starts them: gloo between CPUs, NCCL between GPUs.

    torchrun --nproc_per_node=2 hirelc.py --exp 4

Every process goes through the same loop. The search of a cycle is divided by blocks, fine-tuning and evaluation by
images, rank 0 writes; everything else is cheap and done by all of them. A process alone is ``Ranks()``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import InputError


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``size`` processes, and its number on its own machine."""
    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, value) -> list:
        """Every rank's ``value`` (anything that pickles), in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def same(self, value):
        """Rank 0's ``value`` on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def same_tensors(self, tensors) -> None:
        """Rank 0's values in the tensors of all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def total(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    @contextlib.contextmanager
    def one_before_the_others(self):
        """Rank 0 goes through the body first, so that the others find on the disk what it made."""
        if self.size > 1 and not self.first:
            dist.barrier()
        yield
        if self.size > 1 and self.first:
            dist.barrier()

    def part(self, x: Tensor) -> Tensor:
        """This rank's rows of a batch [n, …]: every ``size``-th from its number on."""
        return x[self.rank::self.size] if self.size > 1 else x

    def owners(self, costs) -> list[int]:
        """Which rank takes each item, so that the ranks' sums of ``costs`` are about equal: the dearest first, each to
        the rank that has least so far."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[item] = loads.index(min(loads))
            loads[owners[item]] += costs[item]
        return owners

    def wrap(self, module: nn.Module, unused: bool = False) -> nn.Module:
        """``module`` with gradients that are means over the ranks. ``unused``: some parameters may take no part."""
        if self.size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        device = next(module.parameters()).device
        return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None,
                                                   find_unused_parameters=unused)


def start(device: str) -> Ranks:
    """Join the processes that torchrun started; ``device``: auto, cpu or cuda. Alone without torchrun.

    Raises InputError where a machine has fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_torchelastic_launched():
        return Ranks()
    ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if ranks.local >= torch.cuda.device_count():
            raise InputError(f"{ranks.local + 1} processes on a machine with {torch.cuda.device_count()} GPUs: lower "
                             "--nproc_per_node or give --device cpu")
        torch.cuda.set_device(ranks.local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return ranks


def leave(code: int) -> None:
    """End the process with ``code``.

    One of several ends at once, without the interpreter's teardown: threads of the group may still hold Python objects
    there, and gloo's now and then abort the process then ("terminate called without an active exception").
    """
    if not dist.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
