"""The table of estimates against an additive proxy and another; its optimum against all configurations."""

import math

import numpy as np
import pytest

from compress import KernelConfig
from estimate import Proxy
from evidence import table
from evidence.baselines import Space, table_optimum
from evidence.stats import rank_correlation
from problems import CURVATURE, TARGET, SixKernels, problem


class World:
    """A proxy of the six kernels: sums of squared errors, ``joint`` times (by turns) where several have one."""

    def __init__(self, joint=1.0):
        self.six, self.joint, self.unit = SixKernels(), joint, 4.0
        self.blocks = self.six.blocks

    def errors(self, index, configs):
        if index is None:
            return [sum(self.errors(i, [block])[0] for i, block in enumerate(network.blocks)) for network in configs]
        parts = [[self.six.error(index, j, kernel) for j, kernel in enumerate(c.kernels)] for c in configs]
        return [CURVATURE[index] * sum(row) * (joint if np.count_nonzero(row) > 1 else 1)
                for row, joint in zip(parts, np.resize(self.joint, len(parts)))]


def measured(world):
    space = Space(problem(world.six))
    return table.EstimateTable(world, **table.measure(world, space, np.random.default_rng(0))), space


def test_an_additive_proxy_is_met():
    world = World()
    made, space = measured(world)
    assert made.quality["passes"] == 2 * 3 * (3 + 1) + 2 * table.JOINT and made.quality["held_out"] == table.HELD_OUT
    made.factors = [1.0, 1.0]
    for bits in (3, 4, 5):  # every channel stays
        network = space.config(np.array([[bits - 3, 1, 0, 0], [2, 1, 0, 0]] * 3))
        assert made.errors(None, [network]) == pytest.approx(world.errors(None, [network]))
    assert made.drops(1, [network.blocks[1]]) == [5 * made.errors(1, [network.blocks[1]])[0]] < [50]
    assert made.drops(1, [network.blocks[1]], 1e-3) == [1e-3]


def test_what_kernels_do_together_is_in_the_factors():
    alone, together = measured(World())[0], measured(World(joint=3.0))[0]
    assert together.factors == pytest.approx([3 * factor for factor in alone.factors])
    assert measured(World(joint=(0.5, 2.0)))[0].factors == pytest.approx(alone.factors)  # as ratios, 1 in the mean
    assert together.quality["networks_rank_correlation"] == pytest.approx(alone.quality["networks_rank_correlation"])
    assert together.quality["networks_mean_error"] == pytest.approx(alone.quality["networks_mean_error"])
    assert 0.9 < alone.quality["networks_rank_correlation"] <= 1 and alone.quality["blocks_mean_error"] < 0.6


def test_between_its_entries_channels_are_interpolated_and_other_bits_cost_nothing():
    entries = table.Entries({(4, "INT", "uniform"): 1.0}, [2, 6, 8], [5.0, 1.0, 0.0])
    assert [entries.mse(KernelConfig(4, keep), 8) for keep in (1.0, 0.75, 0.5, 0.25, 0.125)] == [1, 2, 4, 6, 6]
    assert entries.mse(KernelConfig(32), 8) == 0 and entries.mse(KernelConfig(32, 0.75), 8) == 1


def test_the_optimum_is_the_least_sum_of_all_that_fit():
    made, _ = measured(World())
    space = Space(problem(made.proxy.six, estimates=made))
    choices = [[(space.problem.cost(k, shape), made.factors[n // 3] * made.entries[n // 3][n % 3].mse(k, 2))
                for k in (space.kernel(n, bits, keep, 0, 0) for bits in range(3) for keep in range(2))]
               for n, shape in enumerate(space.shapes)]
    sums = np.zeros((2, 1))
    for pairs in choices:
        sums = (sums[:, :, None] + np.array(pairs).T[:, None, :]).reshape(2, -1)
    table_optimum(space, None)
    assert made.errors(None, [space.best])[0] == pytest.approx(sums[1][sums[0] <= space.allowed].min())
    tight = Space(problem(made.proxy.six, estimates=made, allowed=1.0))
    table_optimum(tight, None)
    assert space.best.retained <= TARGET and tight.best is None
    made.factors = [1e6, 1e6]
    quality = table.compare(made, space, np.random.default_rng(0), count=1)  # of one network nothing can be ranked
    assert quality["networks_rank_correlation"] is quality["blocks_rank_correlation"] is None
    assert quality["blocks_mean_error"] > 1e3  # relative to what is measured


def test_what_is_not_finite_is_not_chosen_and_spoils_no_figure():
    world, plain = World(), measured(World())[0]
    errors = world.errors  # of networks whose first kernel loses a channel there are none
    world.errors = lambda i, configs: [math.nan if not i and next(iter(getattr(c, "blocks", [c]))).kernels[0].keep < 1
                                       else error for c, error in zip(configs, errors(i, configs))]
    made, _ = measured(world)
    assert made.entries[0][0].kept_mse == [math.inf, 0.0] and made.quality["not_finite"] == 1
    assert made.factors[1] == plain.factors[1] and made.factors[0] == pytest.approx(plain.factors[0], rel=0.5)
    assert all(math.isfinite(value) for value in made.quality.values())
    space = Space(problem(made.proxy.six, estimates=made))
    assert "3 choices" in table_optimum(space, None) and space.best.blocks[0].kernels[0].keep == 1
    assert made.check(space.config(np.zeros((6, 4), int)))["chosen"] == [{"table_mse": None, "proxy_mse": None}]


def test_a_chosen_network_is_checked_by_the_proxy():
    world = World(joint=2.0)
    made, space = measured(world)
    network = space.config(np.array([[0, 1, 0, 0]] * 6))
    found = made.check(network)
    assert found["chosen"] == [{f"{name}_mse": source.errors(None, [network])[0]
                                for name, source in (("table", made), ("proxy", world))}]
    assert found["passes"] == made.quality["passes"] and Proxy.check(None, network) is None


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 9], [2, 3, 5, 7]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 2.5]) == pytest.approx(-0.5)
    assert rank_correlation([1, 1, 2], [5, 4, 6]) == pytest.approx(math.sqrt(3) / 2)  # ranks 1.5 1.5 3 and 2 1 3
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
