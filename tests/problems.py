"""A problem for every search, whose optimum is known: six kernels in two blocks, 46,656 configurations."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from compress import BlockConfig, KernelConfig, channels_kept, compress_kernel, kernel_shapes, retained_weights
from config import Compress
from evidence import baselines
from evidence.table import Entries

LIMITS = Compress(bits_min=3, bits_max=5, max_pruning=0.5)  # with two channels: 3, 4 or 5 bits, one channel or both
CURVATURE = (1.0, 0.3)
TARGET = 0.12
TIMESTEPS = 64  # per block and agent
BUDGET = 2 * 3 * TIMESTEPS  # evaluations, less than the 432 candidates that the blocks have


class SixKernels:
    """Two blocks of three kernels of two channels, and an estimator that counts.

    The drop of a block is its curvature times the squared errors of its kernels, and a term that couples the first two.
    ``optimum``: the least sum of drops of all configurations that meet the target; ``mean``: of those, the mean.
    """

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        sizes = ((30, 1.0), (24, 0.7), (36, 0.9), (20, 0.8), (40, 1.1), (28, 0.75))
        kernels = [nn.Linear(inputs, 2, bias=False) for inputs, _ in sizes]
        for kernel, (inputs, scale) in zip(kernels, sizes):
            kernel.weight.data = torch.randn(2, inputs) * scale * torch.tensor([[1.0], [0.5]])
        self.blocks = [SimpleNamespace(name=f"b{i}", kernels={f"k{i}{j}": kernels[3 * i + j] for j in range(3)})
                       for i in range(2)]
        self.errors, self.asked = {}, []
        self.entries, self.factors = [[self.alone(i, j) for j in range(3)] for i in range(2)], CURVATURE  # as a table's
        self.params = sum(kernel.weight.numel() for kernel in kernels)
        tables = []
        for i, block in enumerate(self.blocks):
            shapes = kernel_shapes(block)
            choices = itertools.product([KernelConfig(b, k) for b in (3, 4, 5) for k in (1.0, 0.5)], repeat=3)
            configs = [BlockConfig(choice, shapes) for choice in choices]
            tables.append((np.array([config.retained * config.params for config in configs]),
                           np.array([self.drop(i, config) for config in configs])))
        (sizes_a, drops_a), (sizes_b, drops_b) = tables
        meets = sizes_a[:, None] + sizes_b <= TARGET * self.params
        drops = (drops_a[:, None] + drops_b)[meets]
        self.optimum, self.mean = drops.min(), drops.mean()

    def alone(self, index, j) -> Entries:
        """What a table has of a kernel."""
        return Entries({(b, "INT", "uniform"): self.error(index, j, KernelConfig(b)) for b in (3, 4, 5)}, [1, 2],
                       [self.error(index, j, KernelConfig(32, 0.5)), 0.0])

    def error(self, index, j, kernel) -> float:
        """Squared error of one kernel."""
        key = index, j, kernel.bits, channels_kept(kernel.keep, 2)
        if key not in self.errors:
            weight = list(self.blocks[index].kernels.values())[j].weight.detach()
            self.errors[key] = (compress_kernel(weight, kernel)[0] - weight).square().sum().item()
        return self.errors[key]

    def drop(self, index, config) -> float:
        """Drop of one candidate."""
        errors = [self.error(index, j, kernel) for j, kernel in enumerate(config.kernels)]
        return CURVATURE[index] * (sum(errors) + 0.3 * math.sqrt(errors[0] * errors[1]))

    def drops(self, index, configs, worst) -> list[float]:
        """What the proxy would be; every candidate is counted."""
        self.asked += [(index, config) for config in configs]
        return [self.drop(index, config) for config in configs]

    def gain(self, config) -> float:
        """Share of the way from the mean of all configurations that meet the target to the optimum."""
        drop = sum(self.drop(i, block) for i, block in enumerate(config.blocks))
        return (self.mean - drop) / (self.mean - self.optimum)


def problem(six, **changes) -> baselines.Problem:
    """The six kernels as the baselines take them."""
    values = dict(blocks=six.blocks, sensitivity=list(CURVATURE), limits=LIMITS, cost=retained_weights,
                  allowed=TARGET * six.params, evaluations=BUDGET, estimates=six)
    return baselines.Problem(**{**values, **changes})


def found(six, method, seed=0, **changes):
    """What a baseline chooses."""
    six.asked.clear()
    return baselines.find(method, problem(six, **changes), seed)
