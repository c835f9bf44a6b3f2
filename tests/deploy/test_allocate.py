"""Moving configurations onto a size: steps worked out by hand, and small networks."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
from compress import (BlockConfig, KernelConfig, KernelShape, NetworkConfig, channels_kept, kernel_bytes, kernel_shapes,
                      retained_weights)
from config import Compress, InputError
from deploy import allocate
from deploy.allocate import enforce, least_sum
from evidence.baselines import exact_least_sum
from networks import equal, snapshot


def network(*weights):
    """Blocks of the given kernels: one list of tensors per block."""
    return [SimpleNamespace(kernels={f"b{i}.{k}": SimpleNamespace(weight=w) for k, w in enumerate(kernels)})
            for i, kernels in enumerate(weights)]


def configured(blocks, kernel=KernelConfig(8)):
    """The same configuration, or the next one of an iterator, for every kernel."""
    following = (lambda: kernel) if isinstance(kernel, KernelConfig) else lambda: next(kernel)
    return NetworkConfig(tuple(BlockConfig(tuple(following() for _ in b.kernels), kernel_shapes(b)) for b in blocks))


def pairs(config):
    return [pair for block in config.blocks for pair in zip(block.kernels, block.shapes)]


def choices(config):
    """(bits, channels kept) of every kernel."""
    return [(kernel.bits, channels_kept(kernel.keep, shape.n_out)) for kernel, shape in pairs(config)]


def total(config, cost=retained_weights):
    return math.fsum(cost(*pair) for pair in pairs(config))


# max_pruning 0.5 on two channels: one or both stay. [[3], [1]] at 3 bits is exact (scale 1); at 2 bits (scale 3) the
# 1 becomes 0, as it does when its channel goes: error 1 either way, and none more for the other step after that.
TINY = Compress(bits_min=2, bits_max=3, max_pruning=0.5)
W = torch.tensor([[3.0], [1.0]])


def tiny(weights, kernel, sensitivity, budget):
    """Choices after a move of blocks of kernels W, some times a scale; the cost is in 1/32."""
    blocks = network(*weights)
    config, note = enforce(blocks, configured(blocks, kernel), sensitivity, TINY, budget / 32)
    assert not note
    return choices(config)


def test_the_cheapest_step_per_cost_comes_first():
    # Costs in 1/32: (3, 2) 6, (2, 2) 4, (3, 1) 3, (2, 1) 2. The channel saves 3 for the error that the bit saves 2 for.
    assert tiny(([W], [W]), KernelConfig(3), [1.0, 0.5], 9.05) == [(3, 2), (3, 1)]
    # The next step, the second kernel's last bit, is free; 8 is within 1 % of 8.05.
    assert tiny(([W], [W]), KernelConfig(3), [1.0, 0.5], 8.05) == [(3, 2), (2, 1)]
    # Errors are absolute: twice the weights, four times the damage, and 0.5 no longer suffices to come first.
    assert tiny(([W], [2 * W]), KernelConfig(3), [1.0, 0.5], 9.05) == [(3, 1), (3, 2)]
    # A block's sensitivity is its parameters' together: of each one 1 / 2 in the first block, 1.5 / 4 in the second.
    assert tiny(([W], [W, 100 * W]), KernelConfig(3), [1.0, 1.5], 15.05) == [(3, 2), (3, 1), (3, 2)]
    # Equal damage: the first kernel; without sensitivity the error decides.
    assert tiny(([W], [W]), KernelConfig(3), [1.0, 1.0], 9.05) == [(3, 1), (3, 2)]
    assert tiny(([2 * W], [W]), KernelConfig(3), [0.0, 0.0], 9.05) == [(3, 2), (3, 1)]
    # Up from (3, 1) twice, at 6 of 32: the channel back undoes error 1 for 3; in the second block it is 4 * 0.5.
    assert tiny(([W], [2 * W]), KernelConfig(3, 0.5), [1.0, 0.5], 9.05) == [(3, 1), (3, 2)]


def test_budgets_out_of_reach():
    blocks = network([torch.randn(8, 4)], [torch.randn(8, 2)])
    start = configured(blocks, KernelConfig(5, 0.7))
    smallest = 3 / 32 * 3 / 8 * 48
    assert enforce(blocks, start, [1, 1], Compress(), smallest)[0].retained == 3 / 32 * 3 / 8
    with pytest.raises(InputError, match=r"rho 0\.0352.*compress\.bits_min=3.*compress\.max_pruning=0\.6") as raised:
        enforce(blocks, start, [1, 1], Compress(), smallest - 0.01)
    assert "\n" not in str(raised.value)
    largest, note = enforce(blocks, start, [1, 1], Compress(), 0.26 * 48)
    assert choices(largest) == [(8, 8)] * 2 and "bits_max=8" in note
    assert not enforce(blocks, start, [1, 1], Compress(), 0.25 * 48)[1]  # the paper's target, which all 8 bits meet
    lone = network([torch.randn(1, 4)])
    between, note = enforce(lone, configured(lone), [1], Compress(), 0.2 * 4)  # 6 bits are 0.1875, 7 bits 0.21875
    assert choices(between) == [(6, 1)] and "within 1 %" in note and "\n" not in note


def test_fp32_kernels_are_left_alone_while_others_have_a_step():
    blocks = network([torch.randn(8, 4)], [torch.randn(8, 4)])
    start = configured(blocks, iter([KernelConfig(32, 1.0, "FLOAT", "learned"), KernelConfig(8)]))
    config, note = enforce(blocks, start, [0.0, 1.0], Compress(), 36.0)  # 32 for the first; 8 bits are 8
    assert config.blocks[0] == start.blocks[0] and not note
    config, note = enforce(blocks, start, [0.0, 1.0], Compress(), 12.0)
    assert config.blocks[0].kernels[0].bits <= 8 and config.blocks[0].kernels[0].granularity == "learned" and not note
    assert allocate._Kernel(torch.randn(8, 4), KernelConfig(32), KernelShape(8, 32), 1.0, Compress(),
                          retained_weights).steps(-1) == [(32, 7), (8, 8)]


def test_steps_follow_the_agents_grid_and_then_single_channels():
    def steps(kernel, n_out, sign, cost=retained_weights, **how):
        return allocate._Kernel(torch.randn(n_out, 1), kernel, KernelShape(n_out, n_out), 1.0, Compress(), cost).steps(
            sign, **how)
    # 0.6 / 14 of 100 channels is 4.29: 100, 95, 91, 87, …, 40
    assert steps(KernelConfig(6), 100, -1) == [(6, 95), (5, 100)] and steps(KernelConfig(6), 100, +1) == [(7, 100)]
    assert steps(KernelConfig(6, 0.93), 100, -1) == [(6, 91), (5, 93)]
    assert steps(KernelConfig(6, 0.93), 100, +1) == [(6, 95), (7, 93)]
    assert steps(KernelConfig(6, 0.93), 100, -1, fine=True) == [(6, 92), (5, 93)]
    assert steps(KernelConfig(3, 0.4), 100, -1) == [] and steps(KernelConfig(8), 100, +1, fine=True) == []
    assert steps(KernelConfig(6), 4, -1) == [(6, 3), (5, 4)]  # the next three values of the grid keep 3 of 4
    # 64 one-weight rows of 3 bits take 24 bytes, the map of channels 8: only 40 rows, 15 bytes, are less with it.
    assert steps(KernelConfig(3), 64, -1, kernel_bytes, fine=True) == [(3, 40)]


def test_the_least_sum_is_that_of_every_combination():
    rng = np.random.default_rng(0)
    for _ in range(40):
        options = [list(zip(rng.uniform(1, 5, 4), rng.uniform(0, 10, 4))) for _ in range(4)]
        budget = rng.uniform(3, 16)
        sums = {indices: [sum(option[n][part] for option, n in zip(options, indices)) for part in (0, 1)]
                for indices in product(range(4), repeat=4)}
        within = {indices: damage for indices, (cost, damage) in sums.items() if cost <= budget}
        assert least_sum(options, budget) == (list(min(within, key=within.get)) if within else None)
    assert least_sum([[(4, 2.0), (8, 1.0)], [(4, 2.0), (6, 0.0)]], 10.0) == [0, 1]  # just met
    one_slot = [[(50000.4, 1.0), (50000.0, 2.0)], [(50000.0, 0.0), (10000.0, 100.0)]]
    assert least_sum(one_slot, 1e5) == [0, 1] and exact_least_sum(one_slot, 1e5) == [1, 0]


def test_kernels_that_are_not_prunable_keep_their_channels():
    blocks = network([torch.randn(16, 9)], [torch.randn(16, 9)])
    config = configured(blocks, KernelConfig(8, 0.7))
    whole = replace(config.blocks[0], shapes=(KernelShape(16, 144, False),))
    config = replace(config, blocks=(whole, config.blocks[1]))
    for share in (0.2, 0.15, 0.1):
        moved, note = enforce(blocks, config, [0.1, 1.0], Compress(), share * 288)
        assert choices(moved)[0][1] == 16 and not note
    with pytest.raises(InputError):
        enforce(blocks, config, [0.1, 1.0], Compress(), 0.06 * 288)  # with channels to go 0.04 is possible


@pytest.mark.parametrize("name, width, patch, cost, unit", [("deit_tiny_patch16_224", 0.25, 16, retained_weights, 1),
    ("resnet18", 0.125, 0, kernel_bytes, 4), ("mobilenetv2_100", 0.25, 0, retained_weights, 1)])
def test_small_networks_meet_the_targets_within_the_bounds(name, width, patch, cost, unit):
    model = models.build(name, 10, 32, width, patch)
    blocks, rng = models.find_blocks(model), np.random.default_rng(3)
    weights = snapshot(model)
    s = rng.random(len(blocks)).tolist()
    for share, kind in ((0.2, "uniform"), (0.15, "log"), (0.1, "per-channel")):
        start = configured(blocks, iter([KernelConfig(int(rng.integers(3, 9)), rng.uniform(0.4, 1), "FLOAT", kind)
                                         for block in blocks for _ in block.kernels]))
        budget = share * unit * start.params
        moved, note = enforce(blocks, start, s, Compress(), budget, cost)
        assert 0.99 * budget <= total(moved, cost) <= budget and not note
        for (old, shape), (new, same) in zip(pairs(start), pairs(moved)):
            assert shape == same and new == replace(old, bits=new.bits, keep=new.keep)
            assert 3 <= new.bits <= 8 and 0.4 <= new.keep <= 1
        assert enforce(blocks, moved, s, Compress(), budget, cost) == (moved, "")  # on it, nothing moves
    assert equal(weights, model.state_dict())
