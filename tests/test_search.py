"""Tests of search.py: decoders, votes and rewards against numbers worked out by hand, the environments slot by slot,
and ensembles that go on bit for bit after a save."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import search
from compress import BlockConfig, KernelConfig, KernelShape, LayerBudget, NetworkConfig
from config import HLA, LLA, Compress, Config, Search, override
from evidence.summary import search_row
from networks import same, through_a_file
from search import Found, HLAEnsemble, HLAEnv, LLAEnsemble, LLAEnv

LIMITS = Compress(qtype="any", granularity="any")
FREE = LayerBudget(target=0.25, max_pruning=0.6, min_bits=3, max_drop=2.0, strategy="auto")
ONE, TWO = (KernelShape(100, 1000),), (KernelShape(10, 40), KernelShape(4, 120))


def settings(**changes):
    """A Config with few steps; keys with __ for the dot."""
    small = {"lla.timesteps": 8, "lla.episode": 3, "hla.timesteps": 6, "hla.episode": 4}
    return override(Config(), {**small, **{key.replace("__", "."): value for key, value in changes.items()}})


def decoded(action, budget=FREE, limits=LIMITS, shapes=ONE):
    return search.decode_lla(action, budget, limits, shapes)


def budget(**changes):
    return LayerBudget(**{**vars(FREE), **changes})


@pytest.mark.parametrize("min_bits, expected", [
    (2, [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8]),  # b_min = 3 wins
    (3, [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8]),  # floor(5 a / 14)
    (4, [4, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 8]),  # floor(4 a / 14): 13 gives 3.71, which is 7 bits
    (6, [6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 8]),
    (9, [8] * 15)])  # never above b_max
def test_bits_of_every_index(min_bits, expected):
    assert [decoded([a, 0, 0, 0], budget(min_bits=min_bits))[0].bits for a in range(15)] == expected
    for least, bounds, bits in ((3, (5, 6), [5, 5, 6]), (6, (3, 4), [4, 4, 4])):  # the global bounds win
        assert [decoded([a, 0, 0, 0], budget(min_bits=least), Compress(*bounds))[0].bits for a in (0, 13, 14)] == bits


@pytest.mark.parametrize("allowed, global_bound, middle, end", [
    (0.6, 0.6, 0.7, 0.4), (0.2, 0.6, 0.9, 0.8), (0.8, 0.6, 0.7, 0.4), (0.6, 0.5, 0.75, 0.5), (0.4, 0.0, 1.0, 1.0)])
def test_keep_under_the_smaller_bound(allowed, global_bound, middle, end):
    limits = Compress(max_pruning=global_bound)
    keeps = [decoded([0, a, 0, 0], budget(max_pruning=allowed), limits)[0].keep for a in (0, 7, 14)]
    assert keeps == pytest.approx([1.0, middle, end], abs=1e-12) and keeps[0] == 1.0


def test_type_and_granularity_by_index_and_overridden():
    def choices(limits):
        kernels = [decoded([0, 0, t, g], limits=limits)[0] for t in (0, 1) for g in range(4)]
        return [k.qtype for k in kernels], [k.granularity for k in kernels]

    types, names = ["INT"] * 4 + ["FLOAT"] * 4, ["uniform", "log", "per-channel", "learned"] * 2
    assert choices(LIMITS) == (types, names)
    assert choices(Compress(qtype="FLOAT", granularity="any")) == (["FLOAT"] * 8, names)
    assert choices(Compress(qtype="any", granularity="log")) == (types, ["log"] * 8)
    assert choices(Compress(granularity="log-script")) == (["INT"] * 8, ["log-script"] * 8)


def test_kernels_are_decoded_in_order_four_numbers_each():
    first, second = decoded([14, 0, 0, 3, 0, 14, 1, 0], shapes=TWO)
    assert first == KernelConfig(8, 1.0, "INT", "learned")
    assert second == KernelConfig(3, 0.4, "FLOAT", "uniform")
    shapes = (KernelShape(10, 100), KernelShape(10, 100, prunable=False))  # one keeps every channel
    assert [k.keep for k in decoded([14, 14, 0, 0] * 2, shapes=shapes)] == pytest.approx([0.4, 1.0])
    drawn = search.random_config([shapes], Compress(max_pruning=0.01), np.random.default_rng(0)).blocks[0].kernels
    assert 0.99 <= drawn[0].keep < 1.0 == drawn[1].keep


def test_actions_out_of_range_raise():
    for action in ([15, 0, 0, 0], [-1, 0, 0, 0], [0, 15, 0, 0], [0, 0, 2, 0], [0, 0, 0, 4], [0, 0, 0, -1], [0] * 8):
        with pytest.raises(ValueError, match="outside"):
            decoded(action)
    for action in ([5, 0, 0, 0], [0, 0, -1, 0], [0, 0, 4, 3], [0, -1, 0, 0], [0, 0], [0, 0] * 3):
        with pytest.raises(ValueError, match="outside"):
            search.decode_hla(action, [0.5, 0.5], LIMITS)


# By corrected tier: rho*, max_pruning (0.8 is capped at 0.6), min_bits.
ROWS = [(0.35, 0.2, 6), (0.30, 0.3, 6), (0.25, 0.4, 5), (0.20, 0.6, 4), (0.15, 0.6, 4)]


@pytest.mark.parametrize("sensitivity, rows, max_drop", [
    (0.1, [1, 2, 3, 4, 4], 2.0), (0.3, [0, 1, 2, 3, 4], 2.0), (0.5, [0, 1, 2, 3, 4], 2.0),
    (0.51, [0, 1, 2, 3, 4], 1.0), (0.7, [0, 1, 2, 3, 4], 1.0), (0.71, [0, 0, 1, 2, 3], 0.5)])
def test_budget_of_every_tier_band_and_strategy(sensitivity, rows, max_drop):
    for index, strategy in enumerate(["quantization", "pruning", "auto"]):
        for tier, row in enumerate(rows):
            assert search.decode_hla([2, 0, tier, index], [0.5, sensitivity], LIMITS) == (
                LayerBudget(0.25, 0.4, 5, 2.0, "quantization"), LayerBudget(*ROWS[row], max_drop, strategy))


def test_budgets_keep_the_global_bounds():
    limits = Compress(bits_min=5, max_pruning=0.35)
    budgets = search.decode_hla([0, 2, 1, 2, 2, 2, 3, 2, 4, 2], [0.5] * 5, limits)
    assert [b.max_pruning for b in budgets] == [0.2, 0.3, 0.35, 0.35, 0.35]
    assert [b.min_bits for b in budgets] == [6, 6, 5, 5, 5]
    assert search.uniform_budgets(3, Search(target=0.2, max_drop=1.5), limits) == (
        LayerBudget(0.2, 0.35, 5, 1.5, "auto"),) * 3


def test_vote_rounds_the_mean():
    # Means 5, 14/3 = 4.67, 1/3, 2/3, 13/3 = 4.33, 3: rounding down or taking the majority gives other numbers.
    actions = [[5, 14, 0, 1, 4, 0], [5, 0, 0, 1, 4, 3], [5, 0, 1, 0, 5, 6]]
    assert search.vote_actions(np.array(actions)).tolist() == [5, 5, 0, 1, 4, 3]
    # 0.5 * 14 + 0.3 * 4 + 0.2 * 0 = 8.2, 0.5 * 0 + 0.3 * 2 + 0.2 * 3 = 1.2; 1 + 3.9 + 0.6 = 5.5, in binary just below
    assert search.vote_actions([[14, 0, 2], [4, 2, 13], [0, 3, 3]], weights=[0.5, 0.3, 0.2]).tolist() == [8, 1, 6]


def test_budget_vote_means_and_majority():
    proposals = [(LayerBudget(0.35, 0.2, 6, 0.5, "pruning"), LayerBudget(0.15, 0.6, 4, 2.0, "auto")),
                 (LayerBudget(0.20, 0.6, 4, 1.0, "auto"), LayerBudget(0.20, 0.6, 4, 2.0, "quantization")),
                 (LayerBudget(0.20, 0.4, 4, 0.5, "auto"), LayerBudget(0.25, 0.3, 6, 2.0, "pruning"))]
    first, second = search.vote_budgets(proposals)
    assert (first.target, first.max_pruning, first.max_drop) == pytest.approx((0.25, 0.4, 2 / 3))
    assert (second.target, second.max_pruning, second.max_drop) == pytest.approx((0.2, 0.5, 2.0))
    assert (first.min_bits, first.strategy) == (5, "auto") and type(first.min_bits) is int  # 14/3 rounds up
    assert (second.min_bits, second.strategy) == (5, "auto")  # all differ: the first agent's
    for strategies in (("auto", "pruning", "pruning"), ("pruning", "auto", "auto", "pruning")):
        assert search.vote_budgets([(budget(strategy=s),) for s in strategies])[0].strategy == "pruning"


def test_confidence_weights_by_hand():
    # Pooled mean 2, standard deviation sqrt 2: -0.7071, -0.7071, 1.4142; e^(-2.1213) = 0.119873.
    assert search.confidence_weights([[1.0], [1.0], [4.0]]) == pytest.approx([0.096692, 0.096692, 0.806617], abs=1e-5)
    # Each agent's mean counts, spread inside an agent widens the unit: pooled 0, 2, 2, 4 has mean 2, std sqrt 2,
    # the means 1 and 3 become -0.7071 and 0.7071; 1 / (1 + e^(-1.41421)) = 0.804430.
    assert search.confidence_weights([[0.0, 2.0], [2.0, 4.0]]) == pytest.approx([0.195570, 0.804430], abs=1e-5)
    for rewards in ([[3000.0] * 5] * 3, [[1.0, 3.0], [3.0, 1.0], [2.0]], [[], [], []]):
        assert search.confidence_weights(rewards) == pytest.approx([1 / 3] * 3)


def test_accuracy_reward():
    drops = [-4.0, 0.0, 1 - 1e-9, 1.0, 1.5, 2 - 1e-9, 2.0, 2.5, 3 - 1e-9, 3.0, 5.0, 9.5, 10.0, 10.5, 50.0]
    rewards = [100, 100, 100, 95, 92.5, 90, 85, 80, 75, 70, 50, 5, 0, 0, 0]
    assert [float(search.accuracy_reward(drop)) for drop in drops] == pytest.approx(rewards, abs=1e-6)


RISING = [10.0, 20.0, 30.0, 40.0, 50.0]  # std sqrt(200)


@pytest.mark.parametrize("term, arguments, reward", [
    ("compression_reward", (1.0,), 0.0), ("compression_reward", (0.125,), 52.5),
    ("budget_reward", (0.25, 0.25), 20.0),
    ("budget_reward", (0.35, 0.25), 7.3575888), ("budget_reward", (0.15, 0.25), 7.3575888),  # 20 / e
    ("sensitivity_penalty", (0.5, 0.25), 4.5), ("sensitivity_penalty", (1.0, 1.0), 0.0),
    ("stability_reward", ([],), 0.0), ("stability_reward", ([1.0, 2.0, 3.0, 4.0],), 0.0),
    ("stability_reward", ([1.0, 2.0, 3.0, 4.0, 5.0],), -2.8284271),  # std sqrt 2; the sample std would give -3.162
    ("stability_reward", ([100.0, 1.0, 2.0, 3.0, 4.0, 5.0],), -2.8284271), ("stability_reward", ([5.0] * 6,), 0.0),
    # 30 * 92.5 + 5 * 45 + 20 / e - 2 * 2 * 14.142136 - 4.5; the conservative agent, short history: 1.5 * 45, no std
    ("lla_reward", (1.5, 0.25, 0.15, 4.5, RISING, (30.0, 5.0, 2.0)), 2946.2890463),
    ("lla_reward", (1.5, 0.25, 0.15, 4.5, RISING[:4], (30.0, 1.5, 1.0)), 2845.3575888),
    ("balance_reward", ([0.35, 0.15],), -0.1), ("balance_reward", ([0.35, 0.15, 0.25],), -1 / 15),
    ("balance_reward", ([0.2, 0.2, 0.2],), 0.0),
    ("global_reward", (0.2, 0.25), -2.5), ("global_reward", (0.3, 0.25), -2.5)])
def test_reward_terms_by_hand(term, arguments, reward):
    assert getattr(search, term)(*arguments) == pytest.approx(reward, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("target, sensitivity, reward", [
    (0.35, 0.71, 0.5), (0.35, 0.7, 0.0), (0.30, 0.9, 0.0), (0.301, 0.9, 0.01), (0.15, 0.9, 0.0), (0.15, 0.29, 0.25),
    (0.15, 0.3, 0.0), (0.20, 0.1, 0.0), (0.199, 0.1, 0.005), (0.35, 0.1, 0.0), (0.35, 0.5, 0.0), (0.15, 0.5, 0.0)])
def test_sensitivity_reward(target, sensitivity, reward):
    assert search.sensitivity_reward([target, 0.35], [sensitivity, 1.0]) == pytest.approx(reward + 0.5)


@pytest.mark.parametrize("mean, last_retained, last_drop, reward", [
    (0.20, 0.25, 3.0, -100.0), (0.20, 0.25, 1.5, -25.0),  # too much was lost, and less is to be kept
    (0.25, 0.25, 3.0, 20.0), (0.30, 0.25, 3.0, 20.0), (0.30, 0.28, 1.01, 20.0),  # D8: relaxed, or as before
    (0.20, 0.28, 1.0, 20.0), (0.20, 0.28, 0.0, 20.0),  # exactly the allowed drop counts as kept
    (0.20, 1.00, 0.0, 20.0),  # the first cycle
    (0.28, 0.28, 0.0, 0.0), (0.30, 0.28, 0.0, 0.0),  # not below what was kept
    (0.20, 0.25, 0.0, 0.0), (0.15, 0.20, -1.0, 0.0)])  # the target was met
def test_dynamic_reward(mean, last_retained, last_drop, reward):
    assert search.dynamic_reward(mean, last_retained, last_drop, 0.25, 1.0) == pytest.approx(reward)


class Scripted:
    """Drop estimator that gives the rows it was told to, in order, and tapes the calls."""

    def __init__(self, *rows, active=False):
        self.rows, self.surrogate_active, self.calls, self.evaluations = list(rows), active, [], 0

    def drops(self, index, configs):
        self.calls.append((index, list(configs)))
        self.evaluations += len(configs)
        return self.rows[min(len(self.calls), len(self.rows)) - 1][:len(configs)]


FULL = [14, 0, 0, 0] * 2  # 8 bits, nothing pruned: retained 0.25
HARD = [14, 0, 0, 0, 0, 14, 0, 0]  # 0.25, and 4 bits with 1 of 4 channels: 0.03125; weighted 13.75 / 160


def lla_env(estimator, budget=FREE, sensitivity=0.6, weights=(30.0, 5.0, 1.0), envs=2, episode=20, **more):
    env = LLAEnv(1, TWO, sensitivity, estimator, LIMITS, LLA(envs=envs, episode=episode), weights, blocks=4, **more)
    env.budget = budget
    return env


def test_lla_observation_at_reset_and_after_a_step():
    allowed = LayerBudget(0.25, 0.6, 4, 2.0, "pruning")
    env = lla_env(Scripted([1.5, 40.0]), allowed)
    assert env.obs_dim == 14 and env.num_envs == 2
    for row in env.reset():
        assert row == pytest.approx([0.25, 0.6, 1.0, 0.0, 0.0, 1.0, 0.25, 0.5, 0.2, 1.0, 0.0, 0.0, 0.5, 0.5], abs=1e-7)
    obs, rewards, dones, _ = env.step(np.array([HARD, FULL]))
    assert obs.dtype == np.float32 and rewards.shape == dones.shape == (2,) and dones.dtype == bool
    assert [(index, len(configs)) for index, configs in env.estimator.calls] == [(1, 2)]
    # 30 * 92.5 + 5 * 54.84375 + 20 e^(-1.640625) - 12 * 0.6 * 0.9140625; and 0 + 5 * 45 + 20 - 5.4
    assert rewards == pytest.approx([3046.5146769, 239.6], abs=1e-5)
    without = lla_env(Scripted([1.5, 40.0]), allowed, penalty_scale=0.0).step(np.array([HARD, FULL]))[1]
    assert without - rewards == pytest.approx([6.58125, 5.4])
    assert obs[0] == pytest.approx(
        [0.25, 0.6, 0.0859375, 0.1640625, 0.15, 1.0, 0.25, 0.5, 0.2, 1.0, 0.0, 30.465147, 0.25, 0.03125], abs=1e-5)
    assert obs[1] == pytest.approx([0.25, 0.6, 0.25, 0.0, 4.0, 1.0, 0.25, 0.5, 0.2, 1.0, 0.0, 2.396, 0.25, 0.25],
                                   abs=1e-5)


@pytest.mark.parametrize("strategy, code, active", [
    ("quantization", 0.0, False), ("pruning", 0.5, True), ("auto", 1.0, False)])
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


def test_rewards_of_an_episode_and_separate_histories():
    """Environment 0 sees drops 1…5 and then 0, environment 1 always 0: only the first loses stability."""
    rows = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [5.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    env = lla_env(Scripted(*rows), sensitivity=0.0, weights=(1.0, 1.0, 1.0), episode=7)
    env.reset()
    got = np.array([env.step(np.array([FULL, FULL]))[1] for _ in range(8)])
    # R_acc + 45 + 20; then -2 std of (160, 150, 135, 125, 115), which is 16.309506; then of the last five, raw.
    assert got[:, 0] == pytest.approx([160, 150, 135, 125, 115, 132.3809871, 141.8522432, 165], abs=1e-5)
    assert got[:, 1] == pytest.approx([165] * 8)  # a new episode forgets


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_drop_that_is_not_finite_costs_ten_and_enters_the_history(bad):
    rows = [[bad, 0.0]] + [[0.0, 0.0]] * 5
    env = lla_env(Scripted(*rows), sensitivity=0.0, weights=(1.0, 1.0, 1.0))
    env.reset()
    obs, rewards, _, _ = env.step(np.array([FULL, FULL]))
    assert rewards == pytest.approx([-10.0, 165.0]) and env.bad_rewards == 1
    assert np.isfinite(obs).all() and obs[:, [4, 11]] == pytest.approx(np.array([[5.0, -0.1], [0.0, 1.65]]))
    later = np.array([env.step(np.array([FULL, FULL]))[1] for _ in range(5)])
    # (-10, 165, 165, 165, 165): mean 130, variance (140^2 + 4 * 35^2) / 5 = 4900, std 70.
    assert later[-1] == pytest.approx([165 - 140, 165.0]) and env.bad_rewards == 1
    env.sensitivity = math.nan  # neither is a reward, where the drop is
    assert env.step(np.array([FULL, FULL]))[1].tolist() == [-10.0, -10.0] and env.bad_rewards == 3


def hla_env(weights=(60.0, 18.0, 5.0), **more):
    return HLAEnv([100, 300], [0.8, 0.1], LIMITS, Search(**more), HLA(), weights)


LIGHT_HARD = np.array([[1, 0, 3, 1]])  # corrected to tiers 0 and 4: 0.35 and 0.15, weighted mean 0.2


def test_hla_observation_at_reset_and_after_a_step():
    env = hla_env(max_drop=2.0)
    assert env.obs_dim == 9 and env.num_envs == 1
    assert env.reset()[0] == pytest.approx([0.0, 1.0, 0.0, 0.25, 0.2, 0.8, 0.5, 0.1, 0.5])  # nothing measured yet
    env.feedback(3.0, 0.28, 2)
    assert env.reset()[0] == pytest.approx([0.3, 0.28, 0.25, 0.25, 0.2, 0.8, 0.5, 0.1, 0.5])
    obs, rewards, dones, _ = env.step(LIGHT_HARD)
    assert obs.shape == (1, 9) and obs.dtype == np.float32 and np.shape(rewards) == np.shape(dones) == (1,)
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


@pytest.mark.parametrize("env, actions, length", [
    (lla_env(Scripted([1.5, 2.5])), np.array([HARD, FULL]), 20), (hla_env(), LIGHT_HARD, 10)], ids=["LLA", "HLA"])
def test_an_episode_ends_by_its_limit_with_the_reset_observation(env, actions, length):
    env.reset()
    env.step(actions)
    first = env.reset()  # the episode starts anew
    for step in range(1, 2 * length + 1):
        obs, rewards, dones, _ = env.step(actions)
        assert dones.tolist() == [step % length == 0] * env.num_envs
        assert np.array_equal(obs, first) == (step % length == 0)
        assert (rewards != 0).all()  # the last reward is that of the last action


BLOCKS = [SimpleNamespace(kernels={str(n): nn.Linear(8, 6 + n) for n in range(4)}),
          SimpleNamespace(kernels={"0": nn.Linear(10, 8)})]


def lla_ensemble(config=settings(), index=0):
    return LLAEnsemble(index, BLOCKS[index], 0.4, Scripted([1.0, 2.5, 0.5, 7.0, 1.0]), config, len(BLOCKS))


def hla_ensemble(config=settings()):
    return HLAEnsemble([100, 300, 200], [1.0, 0.1, 0.5], config)


def test_ensembles_follow_the_settings():
    low, high = lla_ensemble(), hla_ensemble()
    other = lla_ensemble(settings(lla__algorithms="A2C,PPO,A2C,A2C", lla__alpha="1,2,3,4", lla__beta="5,6,7,8",
                                  lla__gamma_s="9,10,11,12", sensitivity__method="none"), index=1)
    assert [[env.weights for env in ensemble.envs] for ensemble in (low, high, other)] == [
        [(30, 1.5, 1), (30, 5, 1), (30, 8, 1)], [(30, 6, 1), (30, 10, 1), (30, 4, 1)],
        [(1, 5, 9), (2, 6, 10), (3, 7, 11), (4, 8, 12)]]
    assert [[(type(a).__name__, a.hyper["lr"], a.hyper["n_steps"]) for a in e.agents] for e in (low, high)] == [
        [("PPO", 3e-4, 128), ("A2C", 7e-4, 64), ("PPO", 3e-4, 128)],
        [("PPO", 1e-4, 64), ("A2C", 3e-4, 64), ("PPO", 1e-4, 64)]]
    assert [agent.name for agent in other.agents[:2]] == ["A2C (block 1, agent 0)", "PPO (block 1, agent 1)"]
    assert [env.num_envs for env in low.envs] == [2] * 3 and [env.index / env.blocks for env in other.envs] == [0.5] * 4
    assert (low.envs[0].penalty_scale, other.envs[0].penalty_scale) == (1.0, 0.0)
    # No two agents draw the same numbers, in other blocks and runs neither.
    ensembles = [low, lla_ensemble(index=1), lla_ensemble(settings(seed=43)), high]
    assert len({agent.generator.initial_seed() for ensemble in ensembles for agent in ensemble.agents}) == 12


def test_a_search_trains_votes_and_reports():
    ensemble = lla_ensemble()
    start = [agent.actor[0].weight.detach().clone() for agent in ensemble.agents]
    found = ensemble.search(FREE)
    assert [(r["level"], r["block"], r["agent"], r["algorithm"], r["timesteps"]) for r in found.updates] == [
        ("LLA", 0, 0, "PPO", 8), ("LLA", 0, 1, "A2C", 8), ("LLA", 0, 2, "PPO", 8)]
    assert found.evaluations == 24 == ensemble.estimator.evaluations  # the five that are compared do not count
    assert [len(configs) for _, configs in ensemble.estimator.calls] == [2] * 12 + [5]
    assert found.config == ensemble.consensus() and found.entropy[0] == pytest.approx(1.0, abs=1e-3)
    assert not any(torch.equal(was, agent.actor[0].weight) for was, agent in zip(start, ensemble.agents))
    # Agents go on in the next cycle, under the budget of that cycle.
    assert [r["timesteps"] for r in ensemble.search(budget(target=0.15)).updates] == [16, 16, 16]
    assert all(env.budget == budget(target=0.15) for env in ensemble.envs)


def scripted_agents(ensemble, actions):
    """Let every agent propose a given action; returns the tape of what each was shown and how it was asked."""
    tape = []
    for agent, action in zip(ensemble.agents, actions):
        agent.predict = lambda obs, deterministic, a=action: tape.append((obs, deterministic)) or np.array([a])
    return tape


def test_lla_consensus_is_the_vote_on_greedy_actions_from_the_reset_observation():
    ensemble = lla_ensemble(settings(compress__qtype="any", compress__granularity="any"), index=1)
    for env in ensemble.envs:
        env.budget = budget(min_bits=4)
    tape = scripted_agents(ensemble, [[14, 0, 1, 3], [14, 14, 1, 3], [4, 7, 0, 2]])
    config = ensemble.consensus()
    # Mean 10.67 -> 11 -> 7 bits; 7 -> keep 0.7; 0.67 -> FLOAT; 2.67 -> learned.
    assert config == BlockConfig((KernelConfig(7, 0.7, "FLOAT", "learned"),), (KernelShape(8, 80),))
    for obs, deterministic in tape:
        assert deterministic and obs[0] == pytest.approx([0.5, 0.4, 1, 0, 0, 1, 0.25, 1.0, 0.2, 1, 0, 0, 0.5])
    ensemble.config = settings(vote="confidence")
    for agent, reward in zip(ensemble.agents, (1.0, 1.0, 4.0)):
        agent.recent_rewards.append(reward)
    # (14 + 14) * 0.096692 + 4 * 0.806617 = 5.93 -> 6 -> 4 + floor(24 / 14) = 5 bits.
    assert ensemble.consensus().kernels[0].bits == 5


def test_hla_budgets_are_the_vote_of_the_proposals():
    ensemble = hla_ensemble()
    tape = scripted_agents(ensemble, [[1, 0, 0, 0, 0, 2], [2, 1, 3, 2, 0, 1], [4, 1, 4, 1, 2, 0]])
    # Corrected tiers: 0, 1, 3 for the first block; 1, 4, 4; 0, 0, 2.
    budgets = ensemble.budgets(deterministic=False)
    assert [b.target for b in budgets] == pytest.approx([0.85 / 3, 0.2, 0.95 / 3])
    assert [b.max_pruning for b in budgets] == pytest.approx([1.1 / 3, 0.5, 0.8 / 3])
    assert [(b.min_bits, b.max_drop, b.strategy) for b in budgets] == [
        (5, 0.5, "pruning"), (5, 2.0, "quantization"), (6, 2.0, "auto")]
    ensemble.feedback(2.0, 0.3, 2)
    ensemble.budgets(deterministic=True)
    assert [deterministic for _, deterministic in tape] == [False] * 3 + [True] * 3
    for obs, _ in tape[3:]:
        assert obs[0] == pytest.approx([0.2, 0.3, 0.25, 0.25, 0.1, 1.0, 0.5, 0.1, 0.5, 0.5, 0.5])


def test_the_low_level_goes_on_bit_for_bit_after_a_file():
    first, second = lla_ensemble(), lla_ensemble()
    first.envs[1].bad_rewards = first.envs[1].unseen = 5  # of another search
    assert first.search(FREE).bad_rewards == 0
    second.load_state_dict(through_a_file(first.state_dict()))
    found = []
    for ensemble in (first, second):  # the same drops again, after one that is none and a large one
        ensemble.estimator.calls.clear()
        ensemble.estimator.rows.insert(0, [math.nan, 40.0])
        found.append(ensemble.search(budget(target=0.15)))
    assert str(found[0]) == str(found[1]) and same(first.state_dict(), second.state_dict())  # as text, for NaN's sake
    assert [(one.bad_rewards, one.compared["unseen"]) for one in found] == [(1, 2 / 24)] * 2


def test_entropy_is_one_for_uniform_policies_and_falls():
    ensemble = hla_ensemble()
    assert ensemble.entropy() == pytest.approx(1.0, abs=1e-3)
    for agent in ensemble.agents:
        agent.actor[-1].weight.data.zero_()
        agent.actor[-1].bias.data[0] = 50.0  # one head of 5 options is certain; of the six, three have 5 and three 3
    assert ensemble.entropy() == pytest.approx(1 - math.log(5) / math.log(15 ** 3), abs=1e-6)


def test_the_consensus_is_compared_with_random_actions():
    ensemble = lla_ensemble(settings(lla__alpha="1,2,3"), index=1)
    for env in ensemble.envs:
        env.budget, env.penalty_scale = FREE, 0.5
    ensemble.estimator.rows = [[0.5] + [2.5] * 4]
    consensus = ensemble.consensus()
    row, (_, asked) = ensemble.compared(consensus), ensemble.estimator.calls[0]
    assert asked[0] == consensus and len(asked) == 5 and len(set(asked)) > 2
    assert row["consensus_drop"] == 0.5 and row["random_drop"] == 2.5
    expected = np.mean([search.lla_reward(0.5, consensus.retained, 0.25, 6 * 0.4 * (1 - consensus.retained), [],
                                          (alpha, beta, 1.0)) for alpha, beta in zip((1, 2, 3), (1.5, 5.0, 8.0))])
    assert row["consensus_reward"] == pytest.approx(expected) and row["random_reward"] < row["consensus_reward"]
    ensemble.estimator.rows = [[math.inf] + [2.5] * 4]
    assert [*ensemble.compared(consensus).values()] == [None, 2.5, None, row["random_reward"]]


def test_candidates_without_an_accuracy_reward_are_counted_and_said():
    ensemble, notes = lla_ensemble(), []
    ensemble.estimator.rows = [[9.9, 10.0, 1.0, 1.0, 1.0]]
    assert [ensemble.search(FREE).compared["unseen"] for _ in range(2)] == [0.5, 0.5]
    found = [Found(None, [], 8, None, {"unseen": share}) for share in (1.0, 0.25)]
    assert search_row(1, found, notes.append)["unseen"] == 0.625 and search_row(2, found[1:], notes.append)
    assert len(notes) == 1 and "cycle 1: 62% of the low-level agents' candidates" in notes[0]


def test_compliance_by_hand():
    shapes = (KernelShape(8, 100),)
    config = NetworkConfig((BlockConfig((KernelConfig(8, 1.0),), shapes), BlockConfig((KernelConfig(8, 0.5),), shapes)))
    # Retained 0.25 for 0.20: 1 - 0.25; retained 0.125 for 0.25: 1 - 0.5.
    assert search.compliance(config, [budget(target=0.2), budget(target=0.25)]) == pytest.approx(62.5)


@pytest.mark.parametrize("limits, drawn", [
    (Compress(bits_min=6, bits_max=7), [{6, 7}, {"INT"}, {"uniform"}]),
    (Compress(bits_min=2, bits_max=3), [{2, 3}, {"INT"}, {"uniform"}]),
    (LIMITS, [{4, 5, 6, 7, 8}, set(search.QTYPES), set(search.GRANULARITIES)])])
def test_random_configurations_stay_in_their_ranges(limits, drawn):
    rng = np.random.default_rng(0)
    kernels = [k for _ in range(40) for b in search.random_config([TWO, ONE], limits, rng).blocks for k in b.kernels]
    assert [{getattr(k, name) for k in kernels} for name in ("bits", "qtype", "granularity")] == drawn
    keeps = np.array([k.keep for k in kernels])
    assert 0.6 <= keeps.min() < 0.62 and 0.98 < keeps.max() <= 1.0 and keeps.mean() == pytest.approx(0.8, abs=0.04)


def test_seeds_are_stable_and_differ_by_path():
    assert search.derive_seed(42, "warmup") == 1744266471 and search.derive_seed(42, "lla", 1, 11) == 1045329994
    paths = [(), ("warm", "up"), ("warmup",), ("lla", 1, 11), ("lla", 11, 1), ("lla", 111)]
    assert len({search.derive_seed(seed, *path) for seed in (0, 42, 43) for path in paths}) == 18
