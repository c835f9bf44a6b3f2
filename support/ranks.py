"""Several processes on one run, as ``torchrun`` starts them: gloo between CPUs, NCCL between GPUs.

    torchrun --nproc_per_node=2 hirelc.py --exp 4

Every process goes through the same loop. The search of a cycle is divided by blocks, fine-tuning and evaluation by
images, rank 0 writes; everything else is cheap and done by all of them. A process alone is ``Ranks()``.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import InputError

TURNS = 3  # rank 0, the first process of every other machine, all others


class Elsewhere(Exception):
    """Another process of this run has failed, and says why."""


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

    def agree(self, error: Exception | None = None) -> None:
        """Go on where no process has an ``error``. Otherwise none does: the first that has one raises it, and so says
        why, all others raise Elsewhere."""
        failed = [rank for rank, bad in enumerate(self.gather(error is not None)) if bad]
        if failed:
            raise error if failed[0] == self.rank else Elsewhere

    @contextlib.contextmanager
    def alike(self):
        """What cannot be used or found in the body on one process ends all of them, with one message. The body itself
        exchanges nothing."""
        error = None
        try:
            yield
        except (InputError, OSError) as caught:
            error = caught
        self.agree(error)

    @contextlib.contextmanager
    def in_turn(self):
        """:meth:`alike`, rank 0 first, then a process of every other machine, then the others: each finds on its
        machine's disk what was made there."""
        turn, error = 0 if self.first else 1 if self.local == 0 else 2, None
        for _ in range(turn):
            self.agree()
        try:
            yield
        except (InputError, OSError) as caught:
            error = caught
        for _ in range(turn, TURNS):
            self.agree(error)

    def part(self, x: Tensor) -> Tensor:
        """This rank's rows of a batch [n, …]: every ``size``-th from its number on."""
        return x[self.rank::self.size] if self.size > 1 else x

    def waves(self, count: int) -> list[list[int]]:
        """Items 0…count - 1 in waves of one per process; neighbours, whose costs are about equal, share a wave."""
        return [list(range(count))[first:first + self.size] for first in range(0, count, self.size)]

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
    if not several():
        return Ranks()
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if ranks.local >= torch.cuda.device_count():
            raise InputError(f"{ranks.local + 1} processes on a machine with {torch.cuda.device_count()} GPUs: lower "
                             "--nproc_per_node or give --device cpu")
        torch.cuda.set_device(ranks.local)
    if not dist.is_initialized():
        # Objects, a whole state among them, go from memory to memory, not through that of the GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return ranks


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def lost(error: Exception) -> bool:
    """Whether an exchange failed because another process has ended."""
    return dist.is_initialized() and re.search(r"closed by peer|reset by peer|remote process exited", str(error)) is not None


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
