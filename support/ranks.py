"""Several processes on one run, as ``torchrun --nproc_per_node=2 hirelc.py --exp 4`` starts them on one machine.

The search of a cycle is divided by blocks, fine-tuning and evaluation by images, rank 0 writes; everything else is
cheap and done by all of them. A process alone is ``Ranks()``.
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
from support.own import ours_by_name


class Elsewhere(Exception):
    """Another process of this run has failed, and says why."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``size`` processes."""
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, value) -> list:
        """Return every rank's ``value`` (anything that pickles), in their order, on all of them."""
        values = [value] * self.size
        if self.size > 1:
            with ours_by_name():
                dist.all_gather_object(values, value)
        return values

    def same(self, value):
        """Return rank 0's ``value`` on all ranks."""
        return self.gather(value if self.first else None)[0]

    def same_tensors(self, tensors) -> None:
        """Copy rank 0's values into the tensors of all ranks."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=0)

    def total(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, error: Exception | None = None) -> None:
        """Raise an ``error`` of any process in the first that has one, which so says why, Elsewhere in all others."""
        failed = self.gather(error is not None)
        if any(failed):
            raise error if failed.index(True) == self.rank else Elsewhere

    @contextlib.contextmanager
    def alike(self):
        """End all processes, with one message, where one's body, which exchanges nothing, raises for bad input."""
        error = None
        try:
            yield
        except (InputError, OSError) as caught:
            error = caught
        self.agree(error)

    @contextlib.contextmanager
    def in_turn(self):
        """Do the body as in :meth:`alike`, rank 0 first: the others read what it wrote to the disk."""
        for turn in (True, False):
            with self.alike():
                if self.first is turn:
                    yield

    def part(self, x: Tensor) -> Tensor:
        """Return this rank's rows of a batch [n, …]: every ``size``-th from its number on."""
        return x[self.rank::self.size]

    def waves(self, count: int) -> list[list[int]]:
        """Return items 0…count - 1 in waves of one per process; neighbours, whose costs are about equal, share one."""
        return [list(range(count))[first:first + self.size] for first in range(0, count, self.size)]

    def wrap(self, module: nn.Module, unused: bool = False) -> nn.Module:
        """Return ``module`` with gradients that are means over the ranks. ``unused``: some parameters may have none."""
        many = self.size > 1 and any(p.requires_grad for p in module.parameters())
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=unused) if many else module


def start(device: str) -> Ranks:
    """Join the processes that torchrun started, if any; ``device``: auto, cpu or cuda. InputError: too few GPUs."""
    if not several():
        return Ranks()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if 0 < gpus < ranks.size:
        raise InputError(f"{ranks.size} processes for {gpus} GPUs: lower --nproc_per_node or give --device cpu")
    if gpus:
        torch.cuda.set_device(ranks.rank)
    if not dist.is_initialized():  # objects go by gloo, from memory to memory
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    return ranks


def several() -> bool:
    """Return whether torchrun started this process as one of several."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def lost(error: Exception) -> bool:
    """Return whether an exchange failed because another process has ended."""
    signs = "closed by peer", "reset by peer", "remote process exited"
    return dist.is_initialized() and any(sign in str(error) for sign in signs)


def leave(code: int) -> None:
    """End the process with ``code``; one of several without the interpreter's teardown, in which gloo may abort it."""
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
