"""Tests of search.py: decoders, votes and rewards against numbers worked out by hand, the environments slot by slot,
the drop estimators on a network of six layers, and ensembles that go on bit for bit after a save."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import search
from compress import BlockConfig, KernelConfig, KernelShape, NetworkConfig, compress_kernel
from config import Compress, Config, override
from config import HLA as HLASettings
from config import LLA as LLASettings
from config import Search as SearchSettings
from config import Surrogate as SurrogateSettings
from models import find_blocks
from search import DropEstimator, HLAEnsemble, HLAEnv, LayerBudget, LLAEnsemble, LLAEnv, Proxy, Surrogate

LIMITS = Compress(qtype="any", granularity="any")
FREE = LayerBudget(target=0.25, max_pruning=0.6, min_bits=3, max_drop=2.0, strategy="auto")


def settings(**changes):
    """A Config with budgets of a few steps; keys with __ for the dot."""
    small = {"lla.timesteps": 8, "lla.episode": 3, "hla.timesteps": 6, "hla.episode": 4}
    return override(Config(), {**small, **{key.replace("__", "."): value for key, value in changes.items()}})


def bits_of(action_b, budget, limits=LIMITS):
    return search.decode_lla([action_b, 0, 0, 0], budget, limits)[0].bits


def budget(**changes):
    return LayerBudget(**{**{f: getattr(FREE, f) for f in ("target", "max_pruning", "min_bits", "max_drop", "strategy")},
                          **changes})


def saved(state):
    """A state through a file, read as plain data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def weights_of(agents):
    return [p.detach().clone() for agent in agents for p in agent.parameters]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


# ---------------------------------------------------------------------------------------------------------------
# Actions


def test_action_sizes():
    assert list(search.lla_nvec(1)) == [15, 15, 2, 4]
    assert list(search.lla_nvec(3)) == [15, 15, 2, 4, 15, 15, 2, 4, 15, 15, 2, 4]
    assert list(search.hla_nvec(2)) == [5, 3, 5, 3]


@pytest.mark.parametrize("min_bits, expected", [
    (2, [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8]),  # b_min = 3 wins
    (3, [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8]),  # floor(5 a / 14)
    (4, [4, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 8]),  # floor(4 a / 14): 13 gives 3.71, which is 7 bits
    (5, [5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 8]),
    (6, [6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 8]),
    (8, [8] * 15),
    (9, [8] * 15),  # never above b_max
])
def test_bits_of_every_index(min_bits, expected):
    assert [bits_of(a, budget(min_bits=min_bits)) for a in range(15)] == expected


def test_bits_under_other_global_bounds():
    narrow = Compress(bits_min=5, bits_max=6)
    assert [bits_of(a, budget(min_bits=3), narrow) for a in (0, 13, 14)] == [5, 5, 6]
    assert [bits_of(a, budget(min_bits=6), Compress(bits_min=3, bits_max=4)) for a in (0, 7, 14)] == [4, 4, 4]


def test_keep_of_every_index():
    keeps = [search.decode_lla([0, a, 0, 0], FREE, LIMITS)[0].keep for a in range(15)]
    by_hand = [1.0, 0.957142857, 0.914285714, 0.871428571, 0.828571429, 0.785714286, 0.742857143, 0.7,
               0.657142857, 0.614285714, 0.571428571, 0.528571429, 0.485714286, 0.442857143, 0.4]
    assert keeps == pytest.approx(by_hand, abs=1e-8) and keeps[0] == 1.0


@pytest.mark.parametrize("allowed, global_bound, middle, end", [
    (0.2, 0.6, 0.9, 0.8), (0.3, 0.6, 0.85, 0.7), (0.8, 0.6, 0.7, 0.4), (0.6, 0.5, 0.75, 0.5), (0.4, 0.0, 1.0, 1.0)])
def test_keep_under_the_smaller_bound(allowed, global_bound, middle, end):
    limits = Compress(max_pruning=global_bound)
    keeps = [search.decode_lla([0, a, 0, 0], budget(max_pruning=allowed), limits)[0].keep for a in (7, 14)]
    assert keeps == pytest.approx([middle, end], abs=1e-12)


def test_type_and_granularity_by_index_and_overridden():
    def decoded(limits):
        return [search.decode_lla([0, 0, t, g], FREE, limits)[0] for t in (0, 1) for g in range(4)]

    names = ["uniform", "log", "per-channel", "learned"]
    assert [k.qtype for k in decoded(LIMITS)] == ["INT"] * 4 + ["FLOAT"] * 4
    assert [k.granularity for k in decoded(LIMITS)] == names * 2
    fixed_type = decoded(Compress(qtype="FLOAT", granularity="any"))
    assert [k.qtype for k in fixed_type] == ["FLOAT"] * 8 and [k.granularity for k in fixed_type] == names * 2
    fixed_granularity = decoded(Compress(qtype="any", granularity="log"))
    assert [k.qtype for k in fixed_granularity] == ["INT"] * 4 + ["FLOAT"] * 4
    assert {k.granularity for k in fixed_granularity} == {"log"}
    assert {k.granularity for k in decoded(Compress(granularity="log-script"))} == {"log-script"}


def test_kernels_are_decoded_in_order_four_numbers_each():
    first, second = search.decode_lla([14, 0, 0, 3, 0, 14, 1, 0], FREE, LIMITS)
    assert first == KernelConfig(8, 1.0, "INT", "learned")
    assert (second.bits, second.qtype, second.granularity) == (3, "FLOAT", "uniform")
    assert second.keep == pytest.approx(0.4)


@pytest.mark.parametrize("action", [
    [15, 0, 0, 0], [-1, 0, 0, 0], [0, 15, 0, 0], [0, -1, 0, 0], [0, 0, 2, 0], [0, 0, -1, 0], [0, 0, 0, 4],
    [0, 0, 0, -1], [0, 0, 0, 0, 0, 0, 0, 4]])
def test_lla_actions_out_of_range_raise(action):
    with pytest.raises(ValueError):
        search.decode_lla(action, FREE, LIMITS)


@pytest.mark.parametrize("action, blocks", [
    ([5, 0], 1), ([-1, 0], 1), ([0, 3], 1), ([0, -1], 1), ([0, 0, 4, 3], 2), ([0, 0], 2), ([0, 0, 0, 0], 1)])
def test_hla_actions_out_of_range_raise(action, blocks):
    with pytest.raises(ValueError):
        search.decode_hla(action, [0.5] * blocks, LIMITS)


@pytest.mark.parametrize("sensitivity, expected", [
    (0.0, [1, 2, 3, 4, 4]), (0.299, [1, 2, 3, 4, 4]), (0.3, [0, 1, 2, 3, 4]), (0.5, [0, 1, 2, 3, 4]),
    (0.7, [0, 1, 2, 3, 4]), (0.701, [0, 0, 1, 2, 3]), (1.0, [0, 0, 1, 2, 3])])
def test_tier_correction(sensitivity, expected):
    assert [search.corrected_tier(t, sensitivity) for t in range(5)] == expected


# SPEC 6's table by corrected tier: rho*, max_pruning (0.8 is capped at 0.6), min_bits.
ROWS = [(0.35, 0.2, 6), (0.30, 0.3, 6), (0.25, 0.4, 5), (0.20, 0.6, 4), (0.15, 0.6, 4)]


@pytest.mark.parametrize("sensitivity, rows, max_drop", [
    (0.1, [1, 2, 3, 4, 4], 2.0), (0.3, [0, 1, 2, 3, 4], 2.0), (0.5, [0, 1, 2, 3, 4], 2.0),
    (0.51, [0, 1, 2, 3, 4], 1.0), (0.7, [0, 1, 2, 3, 4], 1.0), (0.71, [0, 0, 1, 2, 3], 0.5)])
def test_budget_of_every_tier_band_and_strategy(sensitivity, rows, max_drop):
    for index, strategy in enumerate(["quantization", "pruning", "auto"]):
        for tier, row in enumerate(rows):
            assert search.layer_budget(tier, index, sensitivity, LIMITS) == LayerBudget(*ROWS[row], max_drop, strategy)
            decoded = search.decode_hla([2, 0, tier, index], [0.5, sensitivity], LIMITS)
            assert decoded == (LayerBudget(0.25, 0.4, 5, 2.0, "quantization"),
                               LayerBudget(*ROWS[row], max_drop, strategy))


def test_budgets_keep_the_global_bounds():
    limits = Compress(bits_min=5, max_pruning=0.35)
    budgets = search.decode_hla([0, 2, 1, 2, 2, 2, 3, 2, 4, 2], [0.5] * 5, limits)
    assert [b.max_pruning for b in budgets] == [0.2, 0.3, 0.35, 0.35, 0.35]
    assert [b.min_bits for b in budgets] == [6, 6, 5, 5, 5]


def test_uniform_budgets_are_the_global_bounds():
    wanted = LayerBudget(0.2, 0.5, 4, 1.5, "auto")
    given = search.uniform_budgets(3, SearchSettings(target=0.2, max_drop=1.5), Compress(bits_min=4, max_pruning=0.5))
    assert given == (wanted,) * 3


# ---------------------------------------------------------------------------------------------------------------
# Votes


def test_vote_rounds_the_mean():
    # Means 5, 14/3 = 4.67, 1/3, 2/3, 13/3 = 4.33, 3: rounding down or taking the majority gives other numbers.
    actions = [[5, 14, 0, 1, 4, 0], [5, 0, 0, 1, 4, 3], [5, 0, 1, 0, 5, 6]]
    vote = search.vote_actions(np.array(actions))
    assert vote.tolist() == [5, 5, 0, 1, 4, 3] and vote.dtype == np.int64


def test_vote_of_equal_actions_is_that_action():
    every = np.arange(15)
    assert search.vote_actions([every] * 3).tolist() == list(range(15))
    assert search.vote_actions([every]).tolist() == list(range(15))


def test_mode_votes_take_the_majority_of_types_and_granularities():
    actions = [[0, 14, 0, 0, 3, 3, 1, 3], [1, 0, 1, 3, 4, 3, 1, 2], [4, 2, 1, 0, 9, 3, 0, 1]]
    # bits and keep round the means 5/3, 16/3, 16/3, 3; three different granularities: the first agent's
    assert search.mode_votes(actions).tolist() == [2, 5, 1, 0, 5, 3, 1, 3]
    assert search.vote_actions(actions).tolist() == [2, 5, 1, 1, 5, 3, 1, 2]


def test_vote_with_weights():
    # 0.5 * 14 + 0.3 * 4 + 0.2 * 0 = 8.2, 0.5 * 0 + 0.3 * 1 + 0.2 * 1 = 0.5 - within half, 0.3 * 2 + 0.2 * 3 = 1.2
    assert search.vote_actions([[14, 0], [4, 2], [0, 3]], weights=[0.5, 0.3, 0.2]).tolist() == [8, 1]
    assert search.vote_actions([[14, 0], [4, 2], [0, 3]], weights=[0.0, 0.0, 1.0]).tolist() == [0, 3]


def test_budget_vote_means_and_majority():
    proposals = [(LayerBudget(0.35, 0.2, 6, 0.5, "pruning"), LayerBudget(0.15, 0.6, 4, 2.0, "auto")),
                 (LayerBudget(0.20, 0.6, 4, 1.0, "auto"), LayerBudget(0.20, 0.6, 4, 2.0, "quantization")),
                 (LayerBudget(0.20, 0.4, 4, 0.5, "auto"), LayerBudget(0.25, 0.3, 6, 2.0, "pruning"))]
    first, second = search.vote_budgets(proposals)
    assert (first.target, first.max_pruning, first.max_drop) == pytest.approx((0.25, 0.4, 2 / 3))
    assert (first.min_bits, first.strategy) == (5, "auto")  # 14/3 rounds up; two of three
    assert (second.target, second.max_pruning, second.max_drop) == pytest.approx((0.2, 0.5, 2.0))
    assert (second.min_bits, second.strategy) == (5, "auto")  # all differ: the first agent's
    assert type(first.min_bits) is int


@pytest.mark.parametrize("strategies, winner", [
    (("auto", "pruning", "pruning"), "pruning"), (("pruning", "auto", "pruning"), "pruning"),
    (("pruning", "auto", "quantization"), "pruning"), (("quantization", "pruning", "auto"), "quantization"),
    (("pruning", "auto", "auto", "pruning"), "pruning"), (("auto", "pruning"), "auto"),
    (("quantization",) * 3, "quantization")])
def test_strategy_vote(strategies, winner):
    assert search.vote_budgets([(budget(strategy=s),) for s in strategies])[0].strategy == winner


def test_min_bits_of_thirds():
    votes = [search.vote_budgets([(budget(min_bits=b),) for b in bits])[0].min_bits
             for bits in ((6, 6, 5), (6, 5, 5), (4, 4, 6), (4, 5, 6))]
    assert votes == [6, 5, 5, 5]


def test_confidence_weights_by_hand():
    # Pooled mean 2, standard deviation sqrt 2: -0.7071, -0.7071, 1.4142; e^(-2.1213) = 0.119873.
    assert search.confidence_weights([[1.0], [1.0], [4.0]]) == pytest.approx([0.096692, 0.096692, 0.806617], abs=1e-5)
    # Standardised: the same however the rewards are scaled or shifted.
    assert search.confidence_weights([[3100.0], [3100.0], [3400.0]]) == pytest.approx(
        [0.096692, 0.096692, 0.806617], abs=1e-5)
    # Each agent's mean counts, spread inside an agent widens the unit: pooled 0, 2, 2, 4 has mean 2, std sqrt 2,
    # the means 1 and 3 become -0.7071 and 0.7071; 1 / (1 + e^(-1.41421)) = 0.804430.
    assert search.confidence_weights([[0.0, 2.0], [2.0, 4.0]]) == pytest.approx([0.195570, 0.804430], abs=1e-5)
    # T = 2 halves the exponent: e^(-1.06066) = 0.346227, 1 / 1.692454 = 0.590858.
    weights = search.confidence_weights([[1.0], [1.0], [4.0]], temperature=2.0)
    assert weights == pytest.approx([0.204571, 0.204571, 0.590858], abs=1e-5)


def test_confidence_weights_without_differences_are_uniform():
    assert search.confidence_weights([[3000.0] * 5] * 3) == pytest.approx([1 / 3] * 3)
    assert search.confidence_weights([[1.0, 3.0], [3.0, 1.0]]) == pytest.approx([0.5, 0.5])
    assert search.confidence_weights([[5.0], [], [7.0]]) == pytest.approx([1 / 3] * 3)


# ---------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize("drop, reward", [
    (-4.0, 100), (0.0, 100), (1 - 1e-9, 100), (1.0, 95), (1.5, 92.5), (2 - 1e-9, 90), (2.0, 85), (2.5, 80),
    (3 - 1e-9, 75), (3.0, 70), (5.0, 50), (9.5, 5), (10.0, 0), (10.5, 0), (50.0, 0)])
def test_accuracy_reward(drop, reward):
    assert search.accuracy_reward(drop) == pytest.approx(reward, abs=1e-6)


def test_compression_budget_and_sensitivity_terms():
    assert [search.compression_reward(r) for r in (1.0, 0.25, 0.125)] == pytest.approx([0.0, 45.0, 52.5])
    assert search.budget_reward(0.25, 0.25) == 20.0
    assert search.budget_reward(0.35, 0.25) == pytest.approx(7.3575888)  # 20 / e
    assert search.budget_reward(0.15, 0.25) == pytest.approx(7.3575888)
    assert search.sensitivity_penalty(0.5, 0.25) == pytest.approx(4.5)
    assert search.sensitivity_penalty(1.0, 0.5) == pytest.approx(6.0) and search.sensitivity_penalty(1.0, 1.0) == 0


@pytest.mark.parametrize("history, reward", [
    ([], 0.0), ([7.0], 0.0), ([1.0, 9.0], 0.0), ([1.0, 2.0, 3.0], 0.0), ([1.0, 2.0, 3.0, 4.0], 0.0),
    ([1.0, 2.0, 3.0, 4.0, 5.0], -2.8284271),  # std sqrt 2; the sample std would give -3.162
    ([100.0, 1.0, 2.0, 3.0, 4.0, 5.0], -2.8284271), ([5.0] * 6, 0.0)])
def test_stability_reward(history, reward):
    assert search.stability_reward(history) == pytest.approx(reward, abs=1e-7)


def test_lla_reward_is_the_weighted_sum():
    # 30 * 92.5 + 5 * 45 + 20 / e - 2 * 2 * 14.142136 - 4.5
    history = [10.0, 20.0, 30.0, 40.0, 50.0]
    reward = search.lla_reward(1.5, 0.25, 0.15, 4.5, history, (30.0, 5.0, 2.0))
    assert reward == pytest.approx(2946.2890463, abs=1e-5)
    # The conservative agent, short history: 30 * 92.5 + 1.5 * 45 + 20 / e - 4.5.
    assert search.lla_reward(1.5, 0.25, 0.15, 4.5, history[:4], (30.0, 1.5, 1.0)) == pytest.approx(2845.3575888)


def test_balance_reward_is_an_unweighted_population_variance():
    assert search.balance_reward([0.35, 0.15]) == pytest.approx(-0.1)
    assert search.balance_reward([0.35, 0.15, 0.25]) == pytest.approx(-0.0666667, abs=1e-6)
    assert search.balance_reward([0.2, 0.2, 0.2]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("target, sensitivity, reward", [
    (0.35, 0.71, 0.5), (0.35, 0.7, 0.0), (0.30, 0.9, 0.0), (0.301, 0.9, 0.01), (0.15, 0.9, 0.0), (0.15, 0.29, 0.25),
    (0.15, 0.3, 0.0), (0.20, 0.1, 0.0), (0.199, 0.1, 0.005), (0.35, 0.1, 0.0), (0.35, 0.5, 0.0), (0.15, 0.5, 0.0)])
def test_sensitivity_reward(target, sensitivity, reward):
    assert search.sensitivity_reward([target], [sensitivity]) == pytest.approx(reward, abs=1e-9)


def test_sensitivity_reward_sums_over_blocks():
    assert search.sensitivity_reward([0.35, 0.15, 0.35, 0.15], [0.8, 0.1, 1.0, 0.8]) == pytest.approx(1.25)


def test_global_reward():
    assert search.global_reward(0.2, 0.25) == pytest.approx(-2.5) == pytest.approx(search.global_reward(0.3, 0.25))
    assert search.global_reward(0.25, 0.25) == 0.0


@pytest.mark.parametrize("mean, last_retained, last_drop, reward", [
    (0.20, 0.25, 3.0, -100.0),  # too much was lost, and less is to be kept
    (0.20, 0.25, 1.5, -25.0),
    (0.25, 0.25, 3.0, 20.0),  # D8: relaxed, or as before
    (0.30, 0.25, 3.0, 20.0),
    (0.30, 0.28, 1.01, 20.0),
    (0.20, 0.28, 1.0, 20.0),  # exactly the allowed drop counts as kept
    (0.20, 0.28, 0.0, 20.0),
    (0.20, 1.00, 0.0, 20.0),  # the first cycle
    (0.28, 0.28, 0.0, 0.0),  # not below what was kept
    (0.30, 0.28, 0.0, 0.0),
    (0.20, 0.25, 0.0, 0.0),  # the target was met
    (0.15, 0.20, -1.0, 0.0)])
def test_dynamic_reward(mean, last_retained, last_drop, reward):
    assert search.dynamic_reward(mean, last_retained, last_drop, 0.25, 1.0) == pytest.approx(reward)


# ---------------------------------------------------------------------------------------------------------------
# The environment of a low-level agent


class Scripted:
    """Drop estimator that gives the rows it was told to, in order, and tapes the calls."""

    def __init__(self, *rows, active=False):
        self.rows, self.surrogate_active, self.calls = list(rows), active, []

    def drops(self, index, configs):
        self.calls.append((index, list(configs)))
        return self.rows[min(len(self.calls), len(self.rows)) - 1]

    def predicted_drops(self, requests):
        return [self.drops(index, features) for index, features in requests]


SHAPES = (KernelShape(10, 40), KernelShape(4, 120))
FULL = [14, 0, 0, 0] * 2  # 8 bits, nothing pruned: retained 0.25
HARD = [14, 0, 0, 0, 0, 14, 0, 0]  # 0.25, and 4 bits with 1 of 4 channels: 0.03125; weighted 13.75 / 160


def lla_env(estimator, budget=FREE, sensitivity=0.6, weights=(30.0, 5.0, 1.0), envs=2, episode=20, **more):
    env = LLAEnv(1, SHAPES, sensitivity, estimator, LIMITS, LLASettings(envs=envs, episode=episode), weights, blocks=4,
                 **more)
    env.budget = budget
    return env


def test_lla_observation_at_reset_and_after_a_step():
    allowed = LayerBudget(0.25, 0.6, 4, 2.0, "pruning")
    env = lla_env(Scripted([1.5, 40.0]), allowed)
    obs = env.reset()
    assert obs.shape == (2, 14) and obs.dtype == np.float32 and env.obs_dim == 14 and env.num_envs == 2
    at_reset = [0.25, 0.6, 1.0, 0.0, 0.0, 1.0, 0.25, 0.5, 0.2, 1.0, 0.0, 0.0, 0.5, 0.5]
    for row in obs:
        assert row == pytest.approx(at_reset, abs=1e-7)
    obs, rewards, dones, _ = env.step(np.array([HARD, FULL]))
    assert obs.shape == (2, 14) and obs.dtype == np.float32
    assert np.shape(rewards) == (2,) and dones.shape == (2,) and dones.dtype == bool and not dones.any()
    # 30 * 92.5 + 5 * 54.84375 + 20 e^(-1.640625) - 12 * 0.6 * 0.9140625; and 0 + 5 * 45 + 20 - 5.4
    assert rewards == pytest.approx([3046.5146769, 239.6], abs=1e-5)
    assert obs[0] == pytest.approx(
        [0.25, 0.6, 0.0859375, 0.1640625, 0.15, 1.0, 0.25, 0.5, 0.2, 1.0, 0.0, 30.465147, 0.25, 0.03125], abs=1e-5)
    assert obs[1] == pytest.approx([0.25, 0.6, 0.25, 0.0, 4.0, 1.0, 0.25, 0.5, 0.2, 1.0, 0.0, 2.396, 0.25, 0.25],
                                   abs=1e-5)


@pytest.mark.parametrize("strategy, code", [("quantization", 0.0), ("pruning", 0.5), ("auto", 1.0)])
@pytest.mark.parametrize("active", [False, True])
def test_reset_and_step_fill_the_same_slots(strategy, code, active):
    """What an action does not change reads the same before and after it, and each slot has its own source."""
    env = lla_env(Scripted([0.0, 0.0], active=active), LayerBudget(0.15, 0.4, 4, 0.5, strategy), sensitivity=0.9)
    first = env.reset()
    after = env.step(np.array([FULL, HARD]))[0]
    for obs in (*first, *after):
        assert obs[[0, 1, 5, 6, 7, 8, 9, 10]] == pytest.approx([0.25, 0.9, 1, 0.15, code, 0.05, 1, float(active)])
    assert (first[:, 3] == 0).all() and after[0, 3] == pytest.approx(0.10)  # at reset no action, so no deviation
    env.budget = LayerBudget(0.35, 0.4, 4, 2.0, strategy)
    assert env.reset()[0, [6, 8]] == pytest.approx([0.35, 0.2])


def test_lla_penalty_can_be_switched_off():
    plain = lla_env(Scripted([0.0, 0.0]))
    without = lla_env(Scripted([0.0, 0.0]), penalty_scale=0.0)
    for env in (plain, without):
        env.reset()
    actions = np.array([FULL, FULL])
    difference = without.step(actions)[1] - plain.step(actions)[1]
    assert difference == pytest.approx([5.4, 5.4])  # 12 * 0.6 * 0.75
    assert without.reset()[0, 1] == pytest.approx(0.6)


def test_rewards_of_an_episode_and_separate_histories():
    """Environment 0 sees drops 1…5 and then 0, environment 1 always 0: only the first loses stability."""
    rows = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [5.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    env = lla_env(Scripted(*rows), sensitivity=0.0, weights=(1.0, 1.0, 1.0))
    env.reset()
    got = np.array([env.step(np.array([FULL, FULL]))[1] for _ in range(7)])
    # R_acc + 45 + 20; then -2 std of (160, 150, 135, 125, 115), which is 16.309506; then of the last five, raw.
    assert got[:, 0] == pytest.approx([160, 150, 135, 125, 115, 132.3809871, 141.8522432], abs=1e-5)
    assert got[:, 1] == pytest.approx([165] * 7)


def test_stability_weight_and_a_new_episode_forgets():
    rows = [[1.0], [2.0], [3.0], [4.0], [5.0], [0.0]]
    env = lla_env(Scripted(*rows), sensitivity=0.0, weights=(1.0, 1.0, 3.0), envs=1)
    env.reset()
    sixth = [env.step(np.array([FULL]))[1][0] for _ in range(6)][-1]
    assert sixth == pytest.approx(165 - 3 * 32.6190129, abs=1e-5)
    short = lla_env(Scripted(*rows), sensitivity=0.0, weights=(1.0, 1.0, 3.0), envs=1, episode=5)
    short.reset()
    assert [short.step(np.array([FULL]))[1][0] for _ in range(6)][-1] == pytest.approx(165)


def test_episode_ends_after_twenty_steps_with_the_reset_observation():
    assert LLASettings().episode == 20
    env = lla_env(Scripted([1.5, 2.5]))
    first = env.reset()
    for episode in range(2):
        for step in range(1, 21):
            obs, rewards, dones, _ = env.step(np.array([HARD, FULL]))
            assert dones.tolist() == [step == 20] * 2
            assert np.array_equal(obs, first) == (step == 20)
            assert (rewards > 1000).all()  # the last reward is that of the last action
    assert obs.dtype == np.float32


def test_reset_starts_the_episode_anew():
    env = lla_env(Scripted([0.0, 0.0]), episode=3)
    env.reset()
    env.step(np.array([FULL, FULL]))
    env.step(np.array([FULL, FULL]))
    env.reset()
    assert [env.step(np.array([FULL, FULL]))[2].all() for _ in range(3)] == [False, False, True]


def test_a_step_asks_the_estimator_once_with_one_configuration_each():
    estimator = Scripted([0.0, 0.0, 0.0])
    env = lla_env(estimator, envs=3)
    env.reset()
    assert estimator.calls == []
    actions = np.array([FULL, HARD, [7, 7, 1, 2] * 2])
    env.step(actions)
    assert len(estimator.calls) == 1
    index, configs = estimator.calls[0]
    assert index == 1 and len(configs) == 3
    assert [k.bits for k in configs[0].kernels] == [8, 8] and [k.bits for k in configs[1].kernels] == [8, 3]
    assert configs[2].kernels[1] == KernelConfig(5, 0.7, "FLOAT", "per-channel") and configs[2].shapes == SHAPES
    env.reset()
    env.step(actions)
    assert [len(configs) for _, configs in estimator.calls] == [3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_drop_that_is_not_finite_costs_ten_and_enters_the_history(bad):
    rows = [[bad, 0.0]] + [[0.0, 0.0]] * 5
    env = lla_env(Scripted(*rows), sensitivity=0.0, weights=(1.0, 1.0, 1.0))
    env.reset()
    obs, rewards, _, _ = env.step(np.array([FULL, FULL]))
    assert rewards == pytest.approx([-10.0, 165.0]) and env.bad_rewards == 1
    assert np.isfinite(obs).all() and obs[:, 11] == pytest.approx([-0.1, 1.65])
    later = np.array([env.step(np.array([FULL, FULL]))[1] for _ in range(5)])
    # (-10, 165, 165, 165, 165): mean 130, variance (140^2 + 4 * 35^2) / 5 = 4900, std 70.
    assert later[-1] == pytest.approx([165 - 140, 165.0]) and env.bad_rewards == 1


def test_a_reward_that_is_not_finite_costs_ten():
    env = lla_env(Scripted([0.0, 0.0]), sensitivity=math.nan)
    env.reset()
    assert env.step(np.array([FULL, FULL]))[1].tolist() == [-10.0, -10.0] and env.bad_rewards == 2
    env.reset()
    assert env.bad_rewards == 2  # counted over the run


def test_reset_without_a_budget_raises():
    with pytest.raises(RuntimeError):
        lla_env(Scripted([0.0]), None).reset()


# ---------------------------------------------------------------------------------------------------------------
# The environment of a high-level agent


def hla_env(weights=(60.0, 18.0, 5.0), **more):
    return HLAEnv([100, 300], [0.8, 0.1], LIMITS, SearchSettings(**more), HLASettings(), weights)


LIGHT_HARD = np.array([[1, 0, 3, 1]])  # corrected to tiers 0 and 4: 0.35 and 0.15, weighted mean 0.2


def test_hla_observation_at_reset_and_after_a_step():
    env = hla_env(max_drop=2.0)
    assert env.obs_dim == 9 and env.num_envs == 1
    obs = env.reset()
    assert obs.shape == (1, 9) and obs.dtype == np.float32
    assert obs[0] == pytest.approx([0.0, 1.0, 0.0, 0.25, 0.2, 0.8, 0.5, 0.1, 0.5])  # nothing measured yet
    env.feedback(3.0, 0.28, 2)
    assert env.reset()[0] == pytest.approx([0.3, 0.28, 0.25, 0.25, 0.2, 0.8, 0.5, 0.1, 0.5])
    obs, rewards, dones, _ = env.step(LIGHT_HARD)
    assert obs.shape == (1, 9) and obs.dtype == np.float32 and np.shape(rewards) == (1,) and dones.tolist() == [False]
    # R_bal -0.1, R_sens 0.5 + 0.25, R_dyn -50 * (3 - 2): (-0.1 + 0.75 - 50) / 20 = -2.4675, unscaled by the agent
    assert obs[0] == pytest.approx([0.3, 0.28, 0.25, 0.05, -2.4675, 0.8, 0.35, 0.1, 0.15], abs=1e-6)


def test_hla_reward_is_weighted_per_agent():
    """Unscaled terms -0.1, 0.75, -2.5 (the parameter-weighted mean is 0.2, the plain one 0.25) and -100."""
    totals = []
    for weights in ((30.0, 6.0, 1.0), (60.0, 6.0, 1.0), (30.0, 18.0, 1.0), (30.0, 6.0, 5.0), (60.0, 18.0, 5.0)):
        env = hla_env(weights)
        env.feedback(3.0, 0.28, 2)
        env.reset()
        totals.append(env.step(LIGHT_HARD)[1][0])
    assert totals == pytest.approx([-101.85, -201.10, -106.85, -102.25, -206.5])


def test_hla_dynamic_term_follows_the_feedback():
    env = hla_env((30.0, 6.0, 1.0))
    rest = -0.1 + 0.75 - 2.5
    for drop, retained, dynamic in ((0.0, 1.0, 20.0), (3.0, 0.2, 20.0), (3.0, 0.19, 20.0), (1.0, 0.28, 20.0),
                                    (0.5, 0.22, 0.0), (1.5, 0.22, -25.0)):
        env.feedback(drop, retained, 3)
        env.reset()
        assert env.step(LIGHT_HARD)[1][0] == pytest.approx(rest + dynamic), (drop, retained)


def test_hla_progress_is_cycles_finished_over_all():
    env = hla_env(cycles=5)
    seen = []
    for cycle in range(1, 6):
        env.feedback(0.0, 1.0, cycle)
        seen += [env.reset()[0, 2], env.step(LIGHT_HARD)[0][0, 2]]
    assert seen == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])


def test_hla_episode_ends_after_ten_steps_with_the_reset_observation():
    env = hla_env()
    env.feedback(1.2, 0.3, 2)
    first = env.reset()
    for episode in range(2):
        for step in range(1, 11):
            obs, _, dones, _ = env.step(LIGHT_HARD)
            assert dones.tolist() == [step == 10]
            assert np.array_equal(obs, first) == (step == 10)
    env.step(LIGHT_HARD)
    env.reset()
    assert [env.step(LIGHT_HARD)[2][0] for _ in range(10)] == [False] * 9 + [True]


# ---------------------------------------------------------------------------------------------------------------
# Proxy


def network(seed=0, dropout=0.5):
    """A convolution and four linear layers before the classifier: two blocks, of four kernels and of one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12),
                          nn.Dropout(dropout), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(),
                          nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5))
    for module in model.modules():  # weights large enough for the input to reach the logits
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return model


@pytest.fixture
def net():
    model = network()
    model[1].running_mean.uniform_(-0.2, 0.2)
    model[1].running_var.uniform_(0.5, 2.0)
    generator = torch.Generator().manual_seed(1)
    batches = [2 * torch.randn(16, 3, 4, 4, generator=generator) for _ in range(2)]
    return model, find_blocks(model), batches


def block_config(block, *kernels):
    return BlockConfig(tuple(kernels), search.kernel_shapes(block))


def alike(block, bits, keep=1.0):
    return block_config(block, *[KernelConfig(bits, keep)] * len(block.kernels))


def by_copy(model, blocks, index, config, batches):
    """20 x the mean squared logit difference of a real copy with the block's weights replaced."""
    reference, other = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    modules = dict(other.named_modules())
    with torch.no_grad():
        for name, kernel in zip(blocks[index].kernels, config.kernels):
            modules[name].weight.copy_(compress_kernel(modules[name].weight, kernel)[0])
        squares = torch.cat([(other(x) - reference(x)) ** 2 for x in batches])
    return 20 * squares.double().mean().item()


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]


def assert_untouched(model, before):
    state, modes = before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "the network was changed"
    assert [m.training for m in model.modules()] == modes, "the mode was changed"
    assert all(p.grad is None for p in model.parameters())


def test_network_has_two_blocks(net):
    assert [len(block.kernels) for block in net[1]] == [4, 1]


def test_proxy_drop_is_clipped_at_fifty():
    assert [search.proxy_drop(m) for m in (0.0, 0.1, 1.0, 2.49, 2.5, 2.51, 1e6)] == pytest.approx(
        [0.0, 2.0, 20.0, 49.8, 50.0, 50.0, 50.0])


@pytest.mark.parametrize("training", [True, False])
def test_proxy_against_a_compressed_copy(net, training):
    model, blocks, batches = net
    model.train(training)
    before = snapshot(model)
    proxy = Proxy(model, blocks, batches)
    mixed = block_config(blocks[0], KernelConfig(3, 0.5), KernelConfig(4, 1.0, "FLOAT"), KernelConfig(8),
                         KernelConfig(5, 0.7, "INT", "log"))
    configs = [mixed, alike(blocks[0], 4), alike(blocks[0], 8)]
    drops = proxy.drops(0, configs)
    assert drops == pytest.approx([by_copy(model, blocks, 0, c, batches) for c in configs], rel=1e-3)
    assert 0 < drops[2] < drops[1] < 50 and 0.01 < drops[0] < 50
    assert proxy.drops(1, [alike(blocks[1], 3, 0.5)]) == pytest.approx(
        [by_copy(model, blocks, 1, alike(blocks[1], 3, 0.5), batches)], rel=1e-3)
    assert_untouched(model, before)


def test_proxy_uses_both_batches(net):
    model, blocks, batches = net
    config = alike(blocks[0], 3, 0.5)
    both, first, second = (Proxy(model, blocks, some).drops(0, [config])[0]
                           for some in (batches, batches[:1], batches[1:]))
    assert first != pytest.approx(second, rel=1e-3)
    assert both == pytest.approx((first + second) / 2, rel=1e-5)


def test_an_uncompressed_block_drops_nothing_and_a_wild_one_fifty(net):
    model, blocks, batches = net
    assert Proxy(model, blocks, batches).drops(0, [alike(blocks[0], 32)]) == [0.0]
    with torch.no_grad():
        model[-1].weight.mul_(1000)
    assert Proxy(model, blocks, batches).drops(0, [alike(blocks[0], 3, 0.5)]) == [50.0]


def test_every_block_is_judged_against_theta0(net):
    """D17: what was evaluated before, and in what order, does not matter."""
    model, blocks, batches = net
    questions = [(1, alike(blocks[1], 4, 0.6)), (0, alike(blocks[0], 3, 0.5)), (0, alike(blocks[0], 5)),
                 (1, alike(blocks[1], 3, 0.5))]
    fresh = [Proxy(model, blocks, batches).drops(i, [c])[0] for i, c in questions]
    proxy = Proxy(model, blocks, batches)
    assert [proxy.drops(i, [c])[0] for i, c in questions] == fresh
    assert [proxy.drops(i, [c])[0] for i, c in reversed(questions)] == fresh[::-1]
    assert proxy.drops(0, [questions[1][1], questions[2][1]]) == fresh[1:3]


@pytest.mark.parametrize("training", [True, False])
def test_proxy_leaves_the_network_after_an_exception(net, training):
    model, blocks, batches = net
    model.train(training)
    proxy = Proxy(model, blocks, batches)
    config = alike(blocks[0], 4)
    wanted = proxy.drops(0, [config])
    before = snapshot(model)

    def fail(*_):
        raise ZeroDivisionError

    hook = model[7].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        proxy.drops(0, [config])
    hook.remove()
    assert_untouched(model, before)
    assert proxy.drops(0, [config]) == wanted


# ---------------------------------------------------------------------------------------------------------------
# Surrogate


@pytest.mark.parametrize("kernel, features", [
    (KernelConfig(5, 0.7, "FLOAT", "learned"), [0.5, 0.7, 1, 1, 1.0]),
    (KernelConfig(8, 0.7, "INT", "log"), [0.8, 0.7, 0, 0.33, 0.5]),  # pruned, but at 8 bits
    (KernelConfig(7, 1.0, "FLOAT", "per-channel"), [0.7, 1.0, 1, 0.67, 0.5]),  # fewer bits, but not pruned
    (KernelConfig(7, 0.99, "INT", "uniform"), [0.7, 0.99, 0, 0, 1.0]),
    (KernelConfig(8, 1.0, "INT", "uniform"), [0.8, 1.0, 0, 0, 0.5])])
def test_kernel_features(kernel, features):
    assert search.kernel_features(kernel) == pytest.approx(features)


def test_unknown_kernel_is_eight_bits_unpruned():
    assert list(search.UNKNOWN_KERNEL) == [0.8, 1.0, 0.0, 0.0, 0.5]


def test_block_features_are_the_kernels_in_order():
    config = BlockConfig((KernelConfig(8), KernelConfig(4, 0.5, "FLOAT", "log")), SHAPES)
    assert search.block_features(config) == pytest.approx([0.8, 1, 0, 0, 0.5, 0.4, 0.5, 1, 0.33, 1.0])


@pytest.mark.parametrize("kernels, parameters", [(17, 7_617), (48, 17_537), (51, 18_497)])
def test_surrogate_size(kernels, parameters):
    layers = Surrogate(5 * kernels, SurrogateSettings(), 0).layers
    assert sum(p.numel() for p in layers.parameters()) == parameters


ONE = (KernelShape(100, 1000),)


def measured(count, seed=0):
    """Networks of three one-kernel blocks whose accuracy is 60 + 3 (bits - 6) per kernel: a simple relation."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        kernels = [KernelConfig(int(b), float(k)) for b, k in zip(rng.integers(4, 9, 3), rng.uniform(0.6, 1, 3))]
        acc = 60.0 + 3 * sum(k.bits - 6 for k in kernels)
        pairs.append((NetworkConfig(tuple(BlockConfig((k,), ONE) for k in kernels)), acc))
    return pairs


def surrogate(pairs, seed=3, **changes):
    result = Surrogate(15, SurrogateSettings(**changes), seed)
    for config, acc in pairs:
        result.add(config, acc)
    return result


def features_of(pairs):
    return [[v for block in config.blocks for v in search.block_features(block)] for config, _ in pairs]


def test_activation_at_exactly_the_threshold():
    counts = [surrogate(measured(n)).active for n in range(5)]
    assert counts == [False, False, False, True, True]
    assert [surrogate(measured(n), min_samples=2).active for n in (1, 2)] == [False, True]
    assert not surrogate(measured(40), enabled=False).active


def test_below_the_threshold_nothing_is_trained():
    two, disabled = surrogate(measured(2)), surrogate(measured(9), enabled=False)
    for model in (two, disabled):
        before = snapshot(model.layers)[0]
        assert math.isnan(model.train(5))
        assert all(torch.equal(v, before[k]) for k, v in model.layers.state_dict().items())


def test_buffer_holds_features_and_accuracy():
    pairs = measured(4)
    features, accuracies = zip(*surrogate(pairs).buffer)
    assert list(accuracies) == [acc for _, acc in pairs]
    for got, wanted in zip(features, features_of(pairs)):
        assert got == pytest.approx(wanted)
    assert len(features[0]) == 15


def test_surrogate_learns_a_simple_relation():
    pairs, others = measured(60), measured(40, seed=9)
    model = surrogate(pairs)
    for _ in range(4):
        model.train(100)
    truth = np.array([acc for _, acc in others])
    error = np.mean((np.array(model.predict(features_of(others))) - truth) ** 2)
    assert error < 0.35 * truth.var()


def test_training_improves_and_the_best_epoch_is_kept():
    pairs = measured(20)
    model = surrogate(pairs, lr=0.05)  # a rate at which the loss goes up and down
    accuracies = np.array([acc for _, acc in pairs])

    def loss():
        return np.mean((np.array(model.predict(features_of(pairs))) - accuracies) ** 2)

    start = loss()
    for epochs in (1, 7, 40):
        returned = model.train(epochs)
        assert returned == pytest.approx(loss(), rel=1e-4)
    assert returned < start

    # The same epochs one call at a time would end elsewhere; inside one call more epochs are never worse.
    results = [surrogate(pairs, lr=0.05).train(epochs) for epochs in (1, 5, 10, 20, 40)]
    assert results == sorted(results, reverse=True) and results[-1] < results[0]


def test_surrogate_is_a_function_of_its_seed_alone():
    pairs = measured(8)

    def trained(seed, scramble):
        torch.manual_seed(scramble)
        np.random.seed(scramble)
        model = surrogate(pairs, seed=seed)
        torch.rand(scramble)
        model.train(4)
        return list(model.layers.parameters())

    assert same(trained(3, 1), trained(3, 2))
    assert not same(trained(3, 1), trained(4, 1))


def test_surrogate_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    model = surrogate(measured(5))
    model.train(3)
    model.predict(features_of(measured(2)))
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()


def test_predictions_are_accuracies_without_dropout():
    model = surrogate(measured(6))
    model.train(5)
    rows = features_of(measured(50, seed=2))
    first = model.predict(rows)
    assert first == model.predict(rows)  # no dropout, no random numbers
    assert all(0 < acc < 100 for acc in first) and len(first) == 50
    with torch.no_grad():
        model.layers[-1].weight.zero_()
        model.layers[-1].bias.fill_(math.log(3))  # sigmoid(ln 3) = 0.75
    assert model.predict(rows[:2]) == pytest.approx([75.0, 75.0], abs=1e-4)


def test_surrogate_forward_by_hand():
    """One path through the network: relu(2 x0 - 0.5), times 3, times -1: x0 = 0.8 gives -3.3, x0 = 0.2 gives 0."""
    model = Surrogate(15, SurrogateSettings(), 0)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.zero_()
            layer.bias.zero_()
        model.layers[0].weight[0, 0], model.layers[0].bias[0] = 2.0, -0.5
        model.layers[1].weight[0, 0] = 3.0
        model.layers[2].weight[0, 0] = -1.0
    predicted = model.predict([[0.8] + [0.0] * 14, [0.2] + [0.0] * 14])
    assert predicted == pytest.approx([3.5571, 50.0], abs=1e-3)  # 100 / (1 + e^3.3)


def test_surrogate_goes_on_bit_for_bit_after_a_file():
    first = surrogate(measured(7))
    first.train(3)
    state = saved(first.state_dict())
    second = Surrogate(15, SurrogateSettings(), 99)
    second.load_state_dict(state)
    assert second.active and len(second.buffer) == 7
    extra = measured(1, seed=8)[0]
    for model in (first, second):
        model.add(*extra)
    assert first.train(4) == second.train(4)
    assert same(list(first.layers.parameters()), list(second.layers.parameters()))
    assert [(list(f), a) for f, a in first.buffer] == [(list(f), a) for f, a in second.buffer]


# ---------------------------------------------------------------------------------------------------------------
# Which estimate the agents are told


class StubProxy:
    def __init__(self, blocks):
        self.blocks, self.calls = blocks, []

    def drops(self, index, configs):
        self.calls.append(index)
        return [7.0] * len(configs)


class StubSurrogate:
    active = True

    def predict(self, rows):
        self.rows = [list(row) for row in rows]
        return [80.0 + n for n in range(len(self.rows))]


def test_estimator_asks_the_proxy_until_the_surrogate_is_active(net):
    _, blocks, _ = net
    proxy, model = StubProxy(blocks), Surrogate(25, SurrogateSettings(), 0)
    estimator = DropEstimator(proxy, model, 87.0)
    config = alike(blocks[1], 5)
    whole = NetworkConfig((alike(blocks[0], 8), config))
    for count in range(3):
        assert not estimator.surrogate_active
        assert estimator.drops(1, [config, config]) == [7.0, 7.0] and proxy.calls == [1] * (count + 1)
        model.add(whole, 80.0)
    assert estimator.surrogate_active
    wanted = 87.0 - model.predict([[0.8, 1.0, 0.0, 0.0, 0.5] * 4 + [0.5, 1.0, 0.0, 0.0, 0.5]])[0]
    assert estimator.drops(1, [config]) == pytest.approx([wanted]) and proxy.calls == [1, 1, 1]


def test_estimator_fills_other_blocks_with_their_consensus_or_unknown(net):
    _, blocks, _ = net
    model = StubSurrogate()
    estimator = DropEstimator(StubProxy(blocks), model, 87.5)
    unknown = [0.8, 1.0, 0.0, 0.0, 0.5]
    candidates = [alike(blocks[1], 5), alike(blocks[1], 4, 0.6)]
    assert estimator.drops(1, candidates) == [7.5, 6.5]  # baseline - prediction
    assert model.rows[0] == pytest.approx(unknown * 4 + [0.5, 1, 0, 0, 0.5])
    assert model.rows[1] == pytest.approx(unknown * 4 + [0.4, 0.6, 0, 0, 1.0])
    estimator.consensus[0] = alike(blocks[0], 6, 0.9)
    estimator.consensus[1] = alike(blocks[1], 3, 0.5)  # the block's own consensus plays no part in its query
    estimator.drops(1, candidates[:1])
    assert model.rows == [pytest.approx([0.6, 0.9, 0, 0, 1.0] * 4 + [0.5, 1, 0, 0, 0.5])]
    estimator.consensus[0] = alike(blocks[0], 7)
    estimator.drops(1, candidates[:1])
    assert model.rows == [pytest.approx([0.7, 1, 0, 0, 0.5] * 4 + [0.5, 1, 0, 0, 0.5])]
    estimator.drops(0, [alike(blocks[0], 4, 0.7)])
    assert model.rows == [pytest.approx([0.4, 0.7, 0, 0, 1.0] * 4 + [0.3, 0.5, 0, 0, 1.0])]


# ---------------------------------------------------------------------------------------------------------------
# Ensembles


def lla_ensemble(net, config=None, index=0, sensitivity=0.4):
    model, blocks, batches = net
    proxy = Proxy(model, blocks, batches)
    inputs = 5 * sum(len(block.kernels) for block in blocks)
    estimator = DropEstimator(proxy, Surrogate(inputs, SurrogateSettings(), 0), 80.0)
    return LLAEnsemble(index, blocks[index], sensitivity, estimator, config or settings(), len(blocks))


def hla_ensemble(config=None, sensitivity=(1.0, 0.1, 0.5)):
    return HLAEnsemble([100, 300, 200], list(sensitivity), config or settings())


def test_lla_ensemble_follows_the_settings(net):
    plain = lla_ensemble(net)
    assert [type(a).__name__ for a in plain.agents] == ["PPO", "A2C", "PPO"]
    assert [tuple(env.weights) for env in plain.envs] == [(30, 1.5, 1), (30, 5, 1), (30, 8, 1)]
    assert [env.num_envs for env in plain.envs] == [2, 2, 2] and len({id(env) for env in plain.envs}) == 3
    assert [(a.hyper["lr"], a.hyper["n_steps"]) for a in plain.agents] == [(3e-4, 128), (7e-4, 64), (3e-4, 128)]
    assert [list(a.nvec) for a in plain.agents] == [[15, 15, 2, 4] * 4] * 3
    assert [env.index / env.blocks for env in plain.envs] == [0, 0, 0] and {e.sensitivity for e in plain.envs} == {0.4}
    other = lla_ensemble(net, settings(lla__algorithms="A2C,PPO,A2C,A2C", lla__alpha="1,2,3,4", lla__beta="5,6,7,8",
                                       lla__gamma_s="9,10,11,12"), index=1)
    assert [type(a).__name__ for a in other.agents] == ["A2C", "PPO", "A2C", "A2C"]
    assert [tuple(env.weights) for env in other.envs] == [(1, 5, 9), (2, 6, 10), (3, 7, 11), (4, 8, 12)]
    assert len(other.agents[0].nvec) == 4


def test_hla_ensemble_follows_the_settings():
    plain = hla_ensemble()
    assert [type(a).__name__ for a in plain.agents] == ["PPO", "A2C", "PPO"]
    assert [tuple(env.weights) for env in plain.envs] == [(30, 6, 1), (30, 10, 1), (30, 4, 1)]
    assert [(a.hyper["lr"], a.hyper["n_steps"]) for a in plain.agents] == [(1e-4, 64), (3e-4, 64), (1e-4, 64)]
    assert [list(a.nvec) for a in plain.agents] == [[5, 3] * 3] * 3


def test_seeds_differ_between_agents_blocks_and_runs(net):
    """No two agents draw the same numbers, blocks of other shapes included."""
    ensembles = [lla_ensemble(net), lla_ensemble(net, index=1), lla_ensemble(net, settings(seed=43)), hla_ensemble()]
    seeds = [agent.generator.initial_seed() for ensemble in ensembles for agent in ensemble.agents]
    assert len(set(seeds)) == 12
    first, _, third = lla_ensemble(net).agents
    assert not same(weights_of([first]), weights_of([third]))
    assert same(weights_of(lla_ensemble(net).agents), weights_of(lla_ensemble(net).agents))


def test_lla_training_rows_progress_and_budget(net):
    model = net[0]
    before = snapshot(model)
    ensemble, calls = lla_ensemble(net), []
    start = weights_of(ensemble.agents)
    rows = ensemble.train(FREE, progress=lambda *_: calls.append(1))
    assert len(calls) == 3
    assert [(r["level"], r["block"], r["agent"], r["algorithm"]) for r in rows] == [
        ("LLA", 0, 0, "PPO"), ("LLA", 0, 1, "A2C"), ("LLA", 0, 2, "PPO")]
    assert [r["timesteps"] for r in rows] == [8, 8, 8]
    assert all(math.isfinite(r["policy_loss"]) and math.isfinite(r["entropy"]) for r in rows)
    assert all(env.budget == FREE for env in ensemble.envs)
    assert not any(torch.equal(a, b) for a, b in zip(start[::12], weights_of(ensemble.agents)[::12]))
    assert_untouched(model, before)
    # Agents go on in the next cycle, under the budget of that cycle.
    harder = budget(target=0.15, min_bits=4)
    assert [r["timesteps"] for r in ensemble.train(harder)] == [16, 16, 16]
    assert all(env.budget == harder for env in ensemble.envs)


def test_hla_training_rows():
    ensemble = hla_ensemble()
    rows = ensemble.train(70)
    assert [(r["level"], r["agent"], r["algorithm"], r["timesteps"]) for r in rows] == [
        ("HLA", 0, "PPO", 64), ("HLA", 0, "PPO", 70), ("HLA", 1, "A2C", 64), ("HLA", 1, "A2C", 70),
        ("HLA", 2, "PPO", 64), ("HLA", 2, "PPO", 70)]


def scripted_agents(ensemble, actions):
    """Let every agent propose a given action; returns the tape of what each was shown and how it was asked."""
    tape = []

    def stub(agent, action):
        def predict(obs, deterministic=True):
            tape.append((np.array(obs), deterministic))
            return np.array([action])
        agent.predict = predict

    for agent, action in zip(ensemble.agents, actions):
        stub(agent, action)
    return tape


def test_lla_consensus_is_the_vote_on_greedy_actions_from_the_reset_observation(net):
    ensemble = lla_ensemble(net, settings(compress__qtype="any", compress__granularity="any"), index=1)
    allowed = budget(min_bits=4)
    for env in ensemble.envs:
        env.budget = allowed
    tape = scripted_agents(ensemble, [[14, 0, 1, 3], [14, 14, 1, 3], [4, 7, 0, 2]])
    config = ensemble.consensus()
    # Mean 10.67 -> 11 -> 7 bits; 7 -> keep 0.7; 0.67 -> FLOAT; 2.67 -> learned.
    assert (config.kernels[0].bits, config.kernels[0].qtype, config.kernels[0].granularity) == (7, "FLOAT", "learned")
    assert config.kernels[0].keep == pytest.approx(0.7)
    assert config.shapes == (KernelShape(8, 80),)
    assert [deterministic for _, deterministic in tape] == [True] * 3
    for obs, _ in tape:
        assert obs[0] == pytest.approx([0.5, 0.4, 1, 0, 0, 1, 0.25, 1.0, 0.2, 1, 0, 0, 0.5])


def test_lla_consensus_can_take_the_mode(net):
    names = {}
    for vote in ("uniform", "mode"):
        ensemble = lla_ensemble(net, settings(vote=vote, compress__qtype="any", compress__granularity="any"), index=1)
        for env in ensemble.envs:
            env.budget = FREE
        scripted_agents(ensemble, [[0, 0, 1, 3], [0, 0, 1, 0], [0, 0, 0, 0]])
        names[vote] = {(k.qtype, k.granularity) for k in ensemble.consensus().kernels}
    assert names == {"uniform": {("FLOAT", "log")}, "mode": {("FLOAT", "uniform")}}


@pytest.mark.parametrize("vote, bits", [("uniform", 4), ("confidence", 6)])
def test_lla_consensus_can_weight_by_confidence(net, vote, bits):
    ensemble = lla_ensemble(net, settings(vote=vote), index=1)
    for env in ensemble.envs:
        env.budget = FREE
    scripted_agents(ensemble, [[0, 0, 0, 0], [0, 0, 0, 0], [14, 0, 0, 0]])
    for agent, reward in zip(ensemble.agents, (1.0, 1.0, 4.0)):
        agent.recent_rewards.append(reward)
    # 14 / 3 -> 5 -> 4 bits; 14 * 0.806617 = 11.29 -> 11 -> 3 + floor(55 / 14) = 6 bits.
    assert ensemble.consensus().kernels[0].bits == bits


def test_hla_budgets_are_the_vote_of_the_proposals():
    ensemble = hla_ensemble(sensitivity=(1.0, 0.1, 0.5))
    tape = scripted_agents(ensemble, [[1, 0, 0, 0, 0, 2], [2, 1, 3, 2, 0, 1], [4, 1, 4, 1, 2, 0]])
    # Corrected tiers: 0, 1, 3 for the first block; 1, 4, 4; 0, 0, 2.
    budgets = ensemble.budgets(deterministic=False)
    assert [b.target for b in budgets] == pytest.approx([0.85 / 3, 0.2, 0.95 / 3])
    assert [b.max_pruning for b in budgets] == pytest.approx([1.1 / 3, 0.5, 0.8 / 3])
    assert [b.min_bits for b in budgets] == [5, 5, 6]
    assert [b.max_drop for b in budgets] == [0.5, 2.0, 2.0]
    assert [b.strategy for b in budgets] == ["pruning", "quantization", "auto"]
    assert [deterministic for _, deterministic in tape] == [False] * 3
    ensemble.feedback(2.0, 0.3, 2)
    ensemble.budgets(deterministic=True)
    assert [deterministic for _, deterministic in tape[3:]] == [True] * 3
    for obs, _ in tape[3:]:
        assert obs[0] == pytest.approx([0.2, 0.3, 0.25, 0.25, 0.1, 1.0, 0.5, 0.1, 0.5, 0.5, 0.5])


def test_drawn_budgets_vary_and_greedy_ones_do_not():
    ensemble = hla_ensemble()
    ensemble.train(6)
    greedy = {ensemble.budgets(deterministic=True) for _ in range(4)}
    drawn = {ensemble.budgets(deterministic=False) for _ in range(8)}
    assert len(greedy) == 1 and len(drawn) > 4


def test_equal_seeds_give_equal_results(net):
    def outcome(seed):
        low, high = lla_ensemble(net, settings(seed=seed)), hla_ensemble(settings(seed=seed))
        torch.manual_seed(seed + 7)  # the ensembles must not depend on it
        high.train(6)
        budgets = [high.budgets(deterministic=d) for d in (False, True)]
        low.train(budgets[0][0])
        return budgets, low.consensus(), weights_of(low.agents + high.agents)

    first, second, other = outcome(1), outcome(1), outcome(2)
    assert first[:2] == second[:2] and same(first[2], second[2])
    assert not same(first[2], other[2])


def test_method_without_hla_gives_global_bounds_and_trains_no_hla(net):
    config = settings(search__method="no-hla", search__max_drop=1.5)
    ensemble = hla_ensemble(config)
    before = weights_of(ensemble.agents)
    assert ensemble.train(6) == [] and same(weights_of(ensemble.agents), before)
    for deterministic in (False, True):
        assert ensemble.budgets(deterministic) == (LayerBudget(0.25, 0.6, 3, 1.5, "auto"),) * 3
    low = lla_ensemble(net, config)
    assert len(low.train(FREE)) == 3  # the low level learns as usual


def test_null_method_trains_nothing_and_draws_uniformly(net):
    config = settings(search__method="null")
    high, low, calls = hla_ensemble(config), lla_ensemble(net, config, index=1), []
    before = weights_of(high.agents + low.agents)
    assert high.train(6) == [] and low.train(FREE, progress=lambda *_: calls.append(1)) == []
    assert len(calls) == 3 and same(weights_of(high.agents + low.agents), before)
    targets = np.array([[b.target for b in high.budgets(deterministic=True)] for _ in range(400)])
    # s = 1 shifts up (0.35 0.35 0.30 0.25 0.20: mean 0.29), s = 0.1 down (0.21), s = 0.5 not (0.25).
    assert targets.mean(axis=0) == pytest.approx([0.29, 0.21, 0.25], abs=0.01)
    kernels = [low.consensus().kernels[0] for _ in range(400)]
    # The mean of three draws from 0…14 is 7: keep 0.7; the vote seldom leaves the middle, single draws often would.
    keeps = np.array([k.keep for k in kernels])
    assert keeps.mean() == pytest.approx(0.7, abs=0.02) and keeps.std() == pytest.approx(0.107, abs=0.02)
    assert {k.qtype for k in kernels} == {"INT"} and {k.granularity for k in kernels} == {"uniform"}
    assert {k.bits for k in kernels} >= {4, 5, 6}


def test_no_sensitivity_switches_the_penalty_off(net):
    assert [env.penalty_scale for env in lla_ensemble(net).envs] == [1.0] * 3
    rewards = []
    for method in ("fisher", "none"):
        ensemble = lla_ensemble(net, settings(sensitivity__method=method), index=1, sensitivity=0.5)
        env = ensemble.envs[0]
        env.budget = FREE
        env.reset()
        rewards.append(env.step(np.array([[14, 0, 0, 0]] * 2))[1])
    assert rewards[1] - rewards[0] == pytest.approx([4.5, 4.5])  # 12 * 0.5 * 0.75


@pytest.mark.parametrize("method", ["hirelc", "null"])
def test_lla_ensemble_goes_on_bit_for_bit_after_a_file(net, method):
    config = settings(search__method=method)
    first = lla_ensemble(net, config)
    first.train(FREE)
    first.consensus()
    first.envs[1].bad_rewards = 3
    state = saved(first.state_dict())
    second = lla_ensemble(net, config)
    second.load_state_dict(state)
    assert [env.bad_rewards for env in second.envs] == [0, 3, 0] and second.bad_rewards == 3
    assert all(env.budget == FREE for env in second.envs)
    assert first.consensus() == second.consensus()
    harder = budget(target=0.15, min_bits=4)
    assert str(first.train(harder)) == str(second.train(harder))  # as text: NaN is not equal to itself
    assert same(weights_of(first.agents), weights_of(second.agents))
    assert [first.consensus() for _ in range(3)] == [second.consensus() for _ in range(3)]


def test_lla_ensemble_state_before_any_budget(net):
    second = lla_ensemble(net, settings(seed=7))
    second.load_state_dict(saved(lla_ensemble(net).state_dict()))
    assert all(env.budget is None for env in second.envs)
    assert same(weights_of(second.agents), weights_of(lla_ensemble(net).agents))


@pytest.mark.parametrize("method", ["hirelc", "no-hla", "null"])
def test_hla_ensemble_goes_on_bit_for_bit_after_a_file(method):
    config = settings(search__method=method)
    first = hla_ensemble(config)
    first.train(6)
    first.budgets(deterministic=False)
    first.feedback(2.5, 0.22, 3)
    state = saved(first.state_dict())
    first_rows, first_budgets = first.train(6), [first.budgets(deterministic=False) for _ in range(3)]
    second = hla_ensemble(config)
    second.load_state_dict(state)
    for env in second.envs:
        assert env.reset()[0, :3] == pytest.approx([0.25, 0.22, 0.5])
    assert str(second.train(6)) == str(first_rows)
    assert [second.budgets(deterministic=False) for _ in range(3)] == first_budgets
    assert same(weights_of(first.agents), weights_of(second.agents))


# ---------------------------------------------------------------------------------------------------------------
# What is reported about a search


def test_compliance_by_hand():
    shapes = (KernelShape(8, 100),)
    config = NetworkConfig((BlockConfig((KernelConfig(8, 1.0),), shapes), BlockConfig((KernelConfig(8, 0.5),), shapes)))
    # Retained 0.25 for 0.20: 1 - 0.25; retained 0.125 for 0.25: 1 - 0.5.
    assert search.compliance(config, [budget(target=0.2), budget(target=0.25)]) == pytest.approx(62.5)
    assert search.compliance(config, [budget(target=0.25), budget(target=0.125)]) == pytest.approx(100.0)


def random_kernels(limits, seed=0, count=40):
    rng = np.random.default_rng(seed)
    configs = [search.random_config([SHAPES, ONE], limits, rng) for _ in range(count)]
    assert all([len(block.kernels) for block in config.blocks] == [2, 1] for config in configs)
    return [kernel for config in configs for block in config.blocks for kernel in block.kernels]


def test_random_configurations_stay_in_their_ranges():
    kernels = random_kernels(Compress())
    assert {k.bits for k in kernels} == {4, 5, 6, 7, 8}
    keeps = np.array([k.keep for k in kernels])
    assert 0.6 <= keeps.min() < 0.62 and 0.98 < keeps.max() <= 1.0 and keeps.mean() == pytest.approx(0.8, abs=0.04)
    assert {(k.qtype, k.granularity) for k in kernels} == {("INT", "uniform")}
    free = random_kernels(LIMITS)
    assert {k.qtype for k in free} == {"INT", "FLOAT"}
    assert {k.granularity for k in free} == {"uniform", "log", "per-channel", "learned"}
    assert {k.granularity for k in random_kernels(Compress(qtype="any", granularity="log"))} == {"log"}
    assert {k.bits for k in random_kernels(Compress(bits_min=6, bits_max=7))} == {6, 7}


def test_random_configurations_follow_their_generator():
    assert random_kernels(LIMITS, seed=1, count=5) == random_kernels(LIMITS, seed=1, count=5)
    assert random_kernels(LIMITS, seed=1, count=5) != random_kernels(LIMITS, seed=2, count=5)


def test_seeds_are_stable_and_differ_by_path():
    assert search.derive_seed(42, "warmup") == 1744266471
    assert search.derive_seed(42, "lla", 1, 11) == 1045329994
    paths = [(), ("warmup",), ("warm",), ("up",), ("warm", "up"), ("lla",), ("lla", 1), ("lla", 1, 11), ("lla", 11, 1),
             ("lla", 111), (1, 11), (11, 1), (111,), ("null",), ("null", 0), ("null", "hla")]
    seeds = [search.derive_seed(seed, *path) for seed in (0, 42, 43) for path in paths]
    assert len(set(seeds)) == len(seeds)
    assert all(isinstance(s, int) and 0 <= s < 2**31 for s in seeds)


DEIT = [tuple(KernelShape(n_out, n_out * n_in) for n_out, n_in in ((1152, 384), (384, 384), (1536, 384), (384, 1536)))
        ] * 12
FLAT, PEAKED = [0.5] * 12, [1.0] + [0.6] * 2 + [0.4] * 4 + [0.1] * 5


@pytest.mark.parametrize("sensitivity", [FLAT, PEAKED], ids=["flat", "peaked"])
def test_null_controller_of_twelve_vit_blocks(sensitivity):
    """SPEC 11's figures for uniform draws follow from the decoders, budgets and votes alone."""
    null = search.null_controller(DEIT, sensitivity, Config(), draws=60)
    assert 6.2 < null["cr_mean"] < 7.3 and 56 < null["compliance_mean"] < 66 and null["draws"] == 60
    assert 0 < null["cr_std"] < 0.5 and 0 < null["compliance_std"] < 8
    assert search.null_controller(DEIT, sensitivity, Config(), draws=60) == null
    assert search.null_controller(DEIT, sensitivity, Config(seed=43), draws=60) != null


def test_null_controller_without_hla():
    config = override(Config(), {"search.method": "no-hla"})
    assert search.null_controller(DEIT, FLAT, config, draws=60)["cr_mean"] == pytest.approx(9.15, abs=0.3)


def test_null_ensembles_agree_with_the_null_controller():
    """The ensembles with search=null and the shortcut draw from the same distribution."""
    config = settings(search__method="null")
    blocks = [type("Block", (), {"kernels": {"a": nn.Conv2d(4, 100, 1), "b": nn.Conv2d(3, 100, 1)}})() for _ in range(4)]
    estimator = Scripted([0.0, 0.0])
    high = HLAEnsemble([700] * 4, [0.5] * 4, config)
    low = [LLAEnsemble(i, block, 0.5, estimator, config, 4) for i, block in enumerate(blocks)]
    crs = []
    for _ in range(150):
        for ensemble, allowed in zip(low, high.budgets(deterministic=False)):
            ensemble.train(allowed)
        crs.append(NetworkConfig(tuple(ensemble.consensus() for ensemble in low)).cr)
    shortcut = search.null_controller([search.kernel_shapes(block) for block in blocks], [0.5] * 4, config, draws=150)
    assert np.mean(crs) == pytest.approx(shortcut["cr_mean"], rel=0.05)
    assert estimator.calls == []


def test_a_kernel_that_must_stay_whole_keeps_every_channel_in_every_draw():
    shapes = (KernelShape(10, 100), KernelShape(10, 100, prunable=False))
    most = search.decode_lla([14, 14, 0, 0] * 2, budget(max_pruning=0.6), LIMITS, shapes)
    assert most[0].keep == pytest.approx(0.4) and most[1].keep == 1.0 and most[0].bits == most[1].bits
    drawn = search.random_config([shapes], Compress(), np.random.default_rng(0)).blocks[0].kernels
    assert drawn[0].keep < 1.0 == drawn[1].keep


# ---------------------------------------------------------------------------------------------------------------
# Many at once


def active_surrogate(inputs, seed=0):
    result = Surrogate(inputs, SurrogateSettings(), seed)
    result.buffer = [([0.0] * inputs, 80.0)] * 3
    return result


class Several:
    """Blocks of one, two and four kernels, and an estimator for all of them."""

    counts = (4, 1, 4, 2, 1)

    def __init__(self, proxied=False, **changes):
        blocks = [type("Block", (), {"kernels": {str(k): nn.Linear(8, 6 + k) for k in range(count)}, "whole": {"3"}})()
                  for count in self.counts]
        proxy = StubProxy(blocks)
        surrogate = active_surrogate(5 * sum(self.counts)) if not proxied else Surrogate(60, SurrogateSettings(), 0)
        self.estimator = DropEstimator(proxy, surrogate, 80.0)
        self.estimator.consensus[2] = alike(blocks[2], 5, 0.8)
        config = settings(**{"lla.timesteps": 22, "lla.episode": 7, **changes})
        self.ensembles = [LLAEnsemble(n, block, 0.2 * n, self.estimator, config, len(blocks))
                          for n, block in enumerate(blocks)]
        self.budgets = [budget(target=0.1 + 0.05 * n, min_bits=3 + n, max_pruning=0.2 + 0.1 * n)
                        for n in range(len(blocks))]

    def train(self, *indices):
        rows = search.train_together([self.ensembles[i] for i in indices], [self.budgets[i] for i in indices])
        return {i: (str(own), states_of(self.ensembles[i])) for i, own in zip(indices, rows)}


def states_of(ensemble):
    """All that an ensemble learnt, as bytes: equal only where every bit is."""
    file = io.BytesIO()
    state = ensemble.state_dict()
    torch.save(state, file)
    values = [value for agent in state["agents"] for value in (
        *agent["actor"].values(), *agent["critic"].values(), agent["generator"],
        *(part for own in agent["optimizer"]["state"].values() for part in own.values()))]
    numbers = [(agent["timesteps"], agent["recent_rewards"]) for agent in state["agents"]]
    return [value.numpy().tobytes() for value in values], numbers, state["budget"], state["bad_rewards"]


@pytest.mark.parametrize("proxied", [False, True], ids=["surrogate", "proxy"])
def test_blocks_learn_the_same_to_the_last_bit_in_any_company(proxied):
    everything, single = Several(proxied), Several(proxied)
    together = everything.train(4, 2, 0, 3, 1)
    assert sorted(together) == list(range(5))
    for n in range(5):
        assert together[n] == single.train(n)[n]
    halves = Several(proxied)
    assert {**halves.train(0, 1), **halves.train(2, 3, 4)} == together
    # The second cycle, through a save, divided in another way
    resumed = Several(proxied)
    for ours, theirs in zip(resumed.ensembles, everything.ensembles):
        ours.load_state_dict(saved(theirs.state_dict()))
    assert {**resumed.train(3, 0), **resumed.train(1), **resumed.train(2, 4)} == everything.train(*range(5))
    assert [e.consensus() for e in resumed.ensembles] == [e.consensus() for e in everything.ensembles]


@pytest.mark.parametrize("algorithms", ["PPO,A2C,PPO", "A2C,A2C", "PPO"])
@pytest.mark.parametrize("envs", [1, 2])
def test_an_ensemble_learns_what_its_agents_learn_alone(algorithms, envs):
    count = len(algorithms.split(","))
    changes = {"lla.algorithms": algorithms, "lla.envs": envs,
               **{f"lla.{key}": ",".join("123"[:count]) for key in ("alpha", "beta", "gamma_s")}}
    together, single = (Several(**changes).ensembles[3] for _ in range(2))
    rows = together.train(FREE)
    expected = []
    for n, (env, agent) in enumerate(zip(single.envs, single.agents)):
        env.budget = FREE
        expected += [{"level": "LLA", "block": 3, "agent": n, "algorithm": algorithms.split(",")[n], **update}
                     for update in agent.learn(22)]
    assert str(rows) == str(expected) and states_of(together) == states_of(single)


def test_the_high_level_learns_what_its_agents_learn_alone():
    together, single = hla_ensemble(), hla_ensemble()
    rows = together.train(70)
    updates = [agent.learn(70) for agent in single.agents]
    assert str([{k: v for k, v in row.items() if k not in ("level", "block", "agent", "algorithm")} for row in rows]
               ) == str([update for own in updates for update in own])
    assert same(weights_of(together.agents), weights_of(single.agents))


def test_progress_counts_every_agent_of_every_block():
    several, calls = Several(), []
    search.train_together(several.ensembles[:2], several.budgets[:2], progress=lambda: calls.append(1))
    assert len(calls) == 6


def test_an_agent_whose_numbers_are_not_finite_is_named_with_its_block():
    several = Several()
    with torch.no_grad():
        several.ensembles[3].agents[1].critic[-1].bias.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"^A2C \(block 3, agent 1\): the loss is not finite"):
        several.train(1, 3)
    high = hla_ensemble()
    high.envs[2].feedback(math.nan, 0.5, 1)
    with pytest.raises(FloatingPointError, match=r"^PPO \(high-level agent 2\): the environment gave"):
        high.train(6)


def test_one_question_per_block_and_step_holds_every_candidate_agent_by_agent():
    asked = []

    class Estimator:
        surrogate_active = False

        def drops(self, index, configs):
            asked.append((index, [config.kernels[0].bits for config in configs]))
            return [float(n) for n in range(len(configs))]

    def env(index, shapes):
        made = LLAEnv(index, shapes, 0.5, estimator, LIMITS, LLASettings(), (30.0, 5.0, 1.0), blocks=4)
        made.budget = FREE
        made.reset()
        return made

    estimator = Estimator()
    envs = [env(2, SHAPES), env(0, SHAPES), env(2, SHAPES), env(1, SHAPES[:1])]
    actions = [np.array([[a, 0, 0, 0] * len(e.shapes), [b, 0, 0, 0] * len(e.shapes)])
               for e, (a, b) in zip(envs, [(0, 3), (6, 9), (11, 14), (9, 0)])]
    outcomes = search.Lockstep(envs).step(envs, actions)
    assert sorted(asked) == [(0, [5, 6]), (1, [6, 3]), (2, [3, 4, 6, 8])]
    assert [outcome[3]["drops"] for outcome in outcomes] == [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]


def by_formula(env, action, drop, history):
    """(observation, reward) of one candidate from the formulas, number by number."""
    config = BlockConfig(search.decode_lla(action, env.budget, env.limits, env.shapes), env.shapes)
    b, retained = env.budget, config.retained
    penalty = env.penalty_scale * search.sensitivity_penalty(env.sensitivity, retained)
    reward = float(search.lla_reward(drop, retained, b.target, penalty, history, env.weights))
    return np.array([env.index / env.blocks, env.sensitivity, retained, abs(retained - b.target), drop / 10, 1.0,
                     b.target, search.STRATEGY_CODE[b.strategy], b.max_drop / 10, 1.0,
                     float(env.estimator.surrogate_active), reward / 100, *config.per_kernel], dtype=np.float32), reward


@pytest.mark.parametrize("granularity", ["any", "log-script"])
@pytest.mark.parametrize("proxied", [False, True], ids=["surrogate", "proxy"])
def test_environments_together_give_what_the_formulas_give_one_by_one(proxied, granularity):
    several = Several(proxied, **{"lla.episode": 20, "compress.qtype": "any", "compress.granularity": granularity})
    envs = [env for ensemble in several.ensembles for env in ensemble.envs[:2]]
    for env in envs:
        env.budget = several.budgets[env.index]
        env.reset()
    together, rng, history = search.Lockstep(envs), np.random.default_rng(1), [[[], []] for _ in envs]
    for step in range(19):
        actions = [rng.integers(search.lla_nvec(len(env.shapes)), size=(2, 4 * len(env.shapes))) for env in envs]
        for env, own, past, (obs, rewards, dones, info) in zip(envs, actions, history, together.step(envs, actions)):
            configs = [BlockConfig(search.decode_lla(a, env.budget, env.limits, env.shapes), env.shapes) for a in own]
            assert info["drops"] == several.estimator.drops(env.index, configs) and not dones.any()
            for n in range(2):
                expected, reward = by_formula(env, own[n], info["drops"][n], past[n])
                assert np.array_equal(obs[n], expected) and rewards[n] == reward
                past[n].append(reward)
    first = [env.first_observation() for env in envs]
    for (obs, _, dones, _), start in zip(together.step(envs, actions), first):
        assert np.array_equal(obs, [start, start]) and dones.all()
    assert len({env.bad_rewards for env in envs}) == 1 and all(env.steps == 0 for env in envs)


@pytest.mark.parametrize("limits", [LIMITS, Compress(bits_min=5, bits_max=6, granularity="log-script")])
@pytest.mark.parametrize("min_bits, max_pruning", [(3, 0.6), (6, 0.2), (5, 1.1 / 3), (9, 0.0)])
def test_numbers_of_every_action_index(limits, min_bits, max_pruning):
    shapes = (KernelShape(10, 40), KernelShape(7, 120), KernelShape(5, 30, prunable=False))
    numbers = search.action_numbers(min_bits, max_pruning, limits, shapes)
    allowed = budget(min_bits=min_bits, max_pruning=max_pruning)
    for a_b in range(15):
        for a_p in range(15):
            config = BlockConfig(search.decode_lla([a_b, a_p, 1, 2] * 3, allowed, limits, shapes), shapes)
            for k, kernel in enumerate(config.kernels):
                bits, keep, _, _, joint = search.kernel_features(kernel)
                assert numbers[k, a_b, a_p].tolist() == [config.per_kernel[k], bits, keep, joint]


@pytest.mark.parametrize("action", [[15, 0, 0, 0], [0, -1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 4]])
def test_a_step_refuses_actions_out_of_range(action):
    env = lla_env(Scripted([0.0, 0.0]))
    env.reset()
    with pytest.raises(ValueError, match="outside"):
        env.step(np.array([action * 2] * 2))


def test_a_prediction_does_not_depend_on_the_rows_beside_it():
    model, rows = active_surrogate(240), np.random.default_rng(0).random((203, 240))
    with torch.no_grad():
        model.layers[-1].weight.mul_(20)  # accuracies far apart
    together = model.predict(rows)
    assert together == [model.predict(rows[n:n + 1])[0] for n in range(203)]
    for count in (2, 3, 6, 7, 31):
        assert model.predict(rows[5:5 + count]) == together[5:5 + count]
    order = np.random.default_rng(1).permutation(203)
    assert model.predict(rows[order]) == [together[n] for n in order]
    layered = model._forward(torch.tensor(rows, dtype=torch.float32), training=False)
    assert together == pytest.approx(layered.tolist(), rel=1e-5)


def test_drops_of_several_blocks_are_those_of_each():
    several, rng = Several(), np.random.default_rng(2)
    estimator, candidates = several.estimator, []
    for n, ensemble in enumerate(several.ensembles):
        actions = rng.integers(search.lla_nvec(len(ensemble.shapes)), size=(n + 1, 4 * len(ensemble.shapes)))
        candidates.append([BlockConfig(search.decode_lla(a, FREE, LIMITS), ensemble.shapes) for a in actions])
    requests = [(n, np.array([search.block_features(c) for c in configs])) for n, configs in enumerate(candidates)]
    together = estimator.predicted_drops(requests[::-1])[::-1]
    assert together == [estimator.drops(n, configs) for n, configs in enumerate(candidates)]
    assert [len(drops) for drops in together] == [1, 2, 3, 4, 5] and len({d for own in together for d in own}) == 15


def test_hla_targets_are_those_of_the_decoded_budgets():
    sensitivity = [0.1, 0.29, 0.3, 0.5, 0.7, 0.71, 1.0]
    env = HLAEnv([100] * 7, sensitivity, LIMITS, SearchSettings(), HLASettings(), (60.0, 18.0, 5.0))
    env.reset()
    for action in np.random.default_rng(0).integers(search.hla_nvec(7), size=(9, 14)):
        targets = [b.target for b in search.decode_hla(action, sensitivity, LIMITS)]
        assert env.step(action[None])[0][0, 6::2].tolist() == np.array(targets, dtype=np.float32).tolist()
    with pytest.raises(ValueError, match="outside"):
        env.step(np.array([[5, 0] * 7]))


# ---------------------------------------------------------------------------------------------------------------
# Past the paper: settings that are off by default


def test_relative_tiers_scale_the_targets_and_open_the_bounds():
    config = settings(hla__tiers="relative", search__target=0.1)
    scale = search.tier_scale(config)
    assert scale == pytest.approx(0.4) and search.tier_scale(settings()) is None
    budgets = search.decode_hla([0, 0, 4, 1, 2, 2], [0.5, 0.5, 0.9], config.compress, scale)
    assert [b.target for b in budgets] == pytest.approx([0.14, 0.06, 0.12])  # the third is a tier lighter
    assert {(b.min_bits, b.max_pruning) for b in budgets} == {(3, 0.6)}
    assert [b.max_drop for b in budgets] == [2.0, 2.0, 0.5]


def test_the_high_level_env_sees_scaled_targets():
    config = settings(hla__tiers="relative", search__target=0.1)
    ensemble = HLAEnsemble([300, 100], [0.5, 0.5], config)
    env = ensemble.envs[0]
    obs, reward, _, _ = env.step(np.array([[0, 0, 4, 0]]))
    mean = (300 * 0.14 + 100 * 0.06) / 400
    assert obs[0, [6, 8]] == pytest.approx([0.14, 0.06]) and obs[0, 3] == pytest.approx(abs(mean - 0.1))
    # unscaled targets in R_bal; last_retained 1 > target and mean below it: +20
    assert reward == pytest.approx([-10 * 0.1 ** 2 + 20.0 - 50 * abs(mean - 0.1)])


def test_projected_actions_are_the_largest_within_the_budget():
    shapes = (KernelShape(16, 300), KernelShape(16, 100))
    numbers = search.action_numbers(3, 0.6, LIMITS, shapes)
    params = np.array([300.0, 100.0])

    def size(action):
        return search.BlockConfig(search.decode_lla(action, FREE, LIMITS, shapes), shapes).retained

    rng = np.random.default_rng(0)
    actions = rng.integers(search.lla_nvec(2), size=(50, 8))
    moved = search.projected(actions, numbers, params, 0.12)
    for before, after in zip(actions, moved):
        assert size(after) <= 0.12 + 1e-9
        assert after[[2, 3, 6, 7]].tolist() == before[[2, 3, 6, 7]].tolist()
        further = search.projected([before], numbers, params, size(after) + 1e-4)[0]
        assert size(further) <= size(after) + 1e-4
        grown = after.reshape(2, 4) + [[1, -1, 0, 0]]
        grown[:, :2] = grown[:, :2].clip(0, 14)
        assert size(grown.ravel()) > 0.12 or (grown.ravel() == after).all()
    assert search.projected(actions[:1], numbers, params, 1e-6)[0][[0, 1, 4, 5]].tolist() == [0, 14, 0, 14]
    assert search.projected(actions[:1], numbers, params, 1.0)[0][[0, 1, 4, 5]].tolist() == [14, 0, 14, 0]


def test_relative_rewards_by_hand():
    seen = []
    assert search.relative_rewards(np.array([3.0, 3.0]), seen).tolist() == [0.0, 0.0]
    # 3, 3, 1, 5: mean 3, population variance 2
    assert search.relative_rewards(np.array([1.0, 5.0]), seen) == pytest.approx([2 ** 0.5, -(2 ** 0.5)])
    rewards = search.relative_rewards(np.array([math.nan, 3.0]), seen)
    assert math.isnan(rewards[0]) and rewards[1] == 0.0 and len(seen) == 5
    assert search.overshoot_cost(np.array([0.1, 0.2, 0.3]), 0.2) == pytest.approx([0.0, 0.0, 25.0])


def test_the_front_holds_what_nothing_beats():
    front = search.Visited()
    for n, (size, drop) in enumerate([(0.2, 60.0), (0.3, 50.0), (0.1, 50.0)]):
        front.add([[n, 0, 0, 0]], size, drop)
    assert [r for _, r, _ in front.front] == [0.3]  # nothing but that all are bad: the largest
    for size, drop in [(0.2, 5.0), (0.3, 6.0), (0.1, 9.0), (0.15, 9.0), (0.05, 50.0), (0.2, math.nan), (0.12, 4.0)]:
        front.add([[0, 0, 0, 0]], size, drop)
    assert [(r, d) for _, r, d in front.front] == [(0.1, 9.0), (0.12, 4.0)]


def test_a_refined_action_changes_a_candidate_near_the_budget():
    env = lla_env(Scripted([[1.0, 1.0]] * 9), budget(target=0.2))
    env.settings = LLASettings(refine=1.0)
    parent = np.array([[7, 7, 0, 2], [3, 0, 1, 1]])
    action = np.array([[14, 0, 1, 3], [7, 7, 0, 0]])
    assert (env.visited.refined(action, env) == action).all()
    env.visited.add(parent, 0.2, 3.0)
    env.visited.add(parent * 0, 0.05, 9.0)  # not near
    changes = []
    for _ in range(300):
        refined = env.visited.refined(action, env)
        different = refined != parent
        changes.append(different.sum())
        # bits 7 + 14 and keep 7 - 14, cut to the ends; 3 + 0 and 0 + 0 are no change; type, granularity: the action's
        allowed = np.array([[14, 0, 1, 3], [3, 0, 0, 0]])
        assert (refined[different] == allowed[different]).all()
    assert 0.5 < np.mean(changes) < 2.0 and max(changes) >= 2


def test_proposals_take_the_place_of_the_first_actions():
    env = lla_env(Scripted([[1.0, 1.0]] * 9), budget(target=0.2))
    proposals = [np.full((2, 4), n) for n in (0, 1)]
    env.visited = search.Visited(proposals)
    action = np.array([[14, 0, 1, 3], [7, 7, 0, 0]])
    assert [env.visited.refined(action, env).tolist() for _ in range(3)] == [*map(np.ndarray.tolist, proposals),
                                                                             action.tolist()]
    env.visited.add(proposals[1], 0.2, 3.0)
    assert (env.visited.refined(action, env) == action).all()  # lla.refine is 0


def test_encoded_actions_say_what_they_came_from():
    rng = np.random.default_rng(0)
    shapes = (KernelShape(64, 640), KernelShape(30, 90))
    for limits in (Compress(), Compress(qtype="any", granularity="any"), Compress(2, 8, granularity="log")):
        for own in (budget(), LayerBudget(0.2, 0.3, 5, 1.0, "pruning")):
            for _ in range(20):
                action = rng.integers(search.lla_nvec(2))
                said = search.BlockConfig(search.decode_lla(action, own, limits, shapes), shapes)
                again = search.encode_lla(said, own, limits)
                assert search.decode_lla(again.ravel(), own, limits, shapes) == said.kernels
    # Out of the budget's bounds the nearest: 5 bits and a third pruned where 6 bits and a tenth is the most that may be.
    wide = search.BlockConfig((KernelConfig(5, 2 / 3),) * 2, shapes)
    near = search.decode_lla(search.encode_lla(wide, LayerBudget(0.2, 0.1, 6, 1.0, "auto"), Compress()).ravel(),
                             LayerBudget(0.2, 0.1, 6, 1.0, "auto"), Compress(), shapes)
    assert all(kernel.bits == 6 and kernel.keep == pytest.approx(0.9) for kernel in near)


def options(*blocks):
    """Candidates (weights that stay, drop) of blocks of one kernel with 32 weights."""
    return [[(search.BlockConfig((KernelConfig(bits),), (KernelShape(4, 32),)), drop) for bits, drop in block]
            for block in blocks]


def test_least_drop_against_every_combination():
    rng = np.random.default_rng(0)
    for _ in range(20):
        blocks = options(*[[(bits, float(rng.random() * 10)) for bits in rng.permutation(range(3, 9))[:4].tolist()]
                           for _ in range(4)])
        target = rng.uniform(4.5, 7.5) / 32
        best = math.inf
        for combination in itertools.product(*blocks):
            if NetworkConfig(tuple(c for c, _ in combination)).retained <= target:
                best = min(best, sum(drop for _, drop in combination))
        found = search.least_drop(blocks, target)
        drops = [dict(block)[config] for block, config in zip(blocks, found.blocks)]
        if math.isfinite(best):
            assert found.retained <= target and sum(drops) == pytest.approx(best)
        else:
            assert [c.kernels[0].bits for c in found.blocks] == [min(c.kernels[0].bits for c, _ in b) for b in blocks]


def test_least_drop_takes_a_target_that_is_just_met():
    found = search.least_drop(options([(4, 2.0), (8, 1.0)], [(4, 2.0), (6, 0.0)]), 5 / 32)
    assert [c.kernels[0].bits for c in found.blocks] == [4, 6]


def test_agents_take_the_settings_of_their_learning(net):
    ensemble = lla_ensemble(net, settings(lla__gamma=0.5, lla__rollout=4, lla__lr_factor=2.0))
    plain = lla_ensemble(net, settings())
    for agent, other in zip(ensemble.agents, plain.agents):
        assert agent.hyper == {**other.hyper, "gamma": 0.5, "n_steps": 4, "lr": 2 * other.hyper["lr"]}


def test_entropy_is_one_for_uniform_policies_and_falls(net):
    ensemble = lla_ensemble(net)
    assert ensemble.entropy(FREE) == pytest.approx(1.0, abs=1e-3)
    for agent in ensemble.agents:
        with torch.no_grad():
            agent.actor[-1].weight.zero_()
            agent.actor[-1].bias.zero_()
            agent.actor[-1].bias[0] = 50.0  # one head of 16 is certain
    heads = ensemble.agents[0].nvec
    assert ensemble.entropy(FREE) == pytest.approx(1 - math.log(heads[0]) / sum(map(math.log, heads)), abs=1e-6)


def test_the_consensus_is_compared_with_random_actions(net):
    ensemble = lla_ensemble(net, settings(lla__alpha="1,2,3"), index=1)
    ensemble.entropy(FREE)
    asked = []
    ensemble.envs[0].estimator.drops = lambda i, configs: asked.extend(configs) or [0.5] + [2.5] * 4
    consensus = ensemble.consensus()
    row = ensemble.compared(consensus)
    assert asked[0] == consensus and len(asked) == 5 and len(set(asked)) > 2
    assert row["consensus_drop"] == 0.5 and row["random_drop"] == 2.5
    expected = np.mean([search.lla_reward(0.5, consensus.retained, 0.25, 12 * 0.4 * (1 - consensus.retained), [],
                                          (alpha, beta, 1.0)) for alpha, beta in zip((1, 2, 3), (1.5, 5.0, 8.0))])
    assert row["consensus_reward"] == pytest.approx(expected) and row["random_reward"] < row["consensus_reward"]
