"""Each search against a problem whose optimum is known, its evaluations against its budget."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compress import KernelConfig, NetworkConfig, channels_kept, kernel_bytes, retained_weights
from config import BASELINES, Compress, Config, InputError, override
from evidence import baselines
from evidence.baselines import Problem, Space
from problems import BUDGET, LIMITS, TARGET, SixKernels, found
from search import derive_seed


@pytest.fixture(scope="module")
def six():
    return SixKernels()


def space(limits=LIMITS, target=0.2, channels=(2, 16, 4), whole=(), drops=None, budget=100, inputs=8,
          cost=retained_weights):
    """Blocks of one kernel each."""
    blocks = [SimpleNamespace(name=str(i), kernels={f"k{i}": nn.Linear(inputs, n)},
                              whole=[f"k{i}"] if i in whole else []) for i, n in enumerate(channels)]
    allowed = target * sum(inputs * n for n in channels)
    estimates = SimpleNamespace(drops=lambda index, configs, worst: drops(index, configs), factors=[1.0] * len(blocks),
                                entries=[[SimpleNamespace(mse=lambda kernel, n_out: 9.0 - kernel.bits)]] * len(blocks))
    return Space(Problem(blocks, [0.5] * len(blocks), limits, cost, allowed, budget, estimates))


@pytest.mark.parametrize("method", ["random", "greedy", "evolution", "sequential", "table"])
def test_every_search_finds_the_optimum_within_its_budget(six, method):
    result = found(six, method)
    assert six.gain(result.config) >= 0.95 and result.config.retained <= TARGET
    assert result.evaluations == len(six.asked) == len(set(six.asked)) <= BUDGET  # nothing is asked for twice
    if method == "greedy":  # every block with bits alone, and then with channels
        assert [all(k.keep == 1 for k in c.kernels) for _, c in six.asked][::2] == [True, True]


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("budget", [2, 11])
def test_small_budgets_are_kept_and_seeds_repeat(six, method, budget):
    result = found(six, method, 5, evaluations=budget)
    assert 1 <= result.evaluations == len(six.asked) <= budget and result.config.retained <= TARGET
    assert found(six, method, 5, evaluations=budget) == result


def test_searches_use_their_budget():
    """Where there is more to find than the budget allows, it is spent."""
    def drops(index, configs):
        return [sum(k.bits * k.keep for k in config.kernels) for config in configs]

    for method in ("random", "evolution", "sequential"):
        s = space(limits=Compress(), channels=(64,) * 8, drops=drops, budget=150)
        assert 140 <= baselines.find(method, s.problem, 0).evaluations <= 150
    for method in set(BASELINES) - {"table"}:  # and nothing is found where nothing is small enough
        with pytest.raises(InputError, match="smallest configuration takes|no configuration that takes at most"):
            baselines.find(method, space(target=0.01, drops=drops).problem, 0)


def test_uniform_is_the_best_of_the_largest_keeps(six):
    """At rho 0.12 of two channels: 3 bits keep both (0.094), 4 and 5 bits one (0.0625, 0.078)."""
    result, sums = found(six, "uniform"), {}
    for index, config in six.asked:
        (key,) = {(k.bits, channels_kept(k.keep, 2)) for k in config.kernels}  # every kernel alike
        sums[key] = sums.get(key, 0) + six.drop(index, config)
    assert set(sums) == {(3, 2), (4, 1), (5, 1)} and result.evaluations == 6
    kernels = {(k.bits, channels_kept(k.keep, 2)) for block in result.config.blocks for k in block.kernels}
    assert kernels == {min(sums, key=sums.get)}


@pytest.mark.parametrize("method", ["uniform", "greedy"])
def test_types_and_granularities_are_chosen_where_they_are_free(method):
    def drops(index, configs):
        return [0.0 if (c.kernels[0].qtype, c.kernels[0].granularity) == ("FLOAT", "per-channel") else 1.0
                for c in configs]

    s = space(limits=Compress(qtype="any", granularity="any"), channels=(4,), inputs=64, drops=drops)
    with torch.no_grad():  # FLOAT per-channel is exact at the 6 bits that 0.2 means; at 8 bits INT is nearer
        weight = s.problem.blocks[0].kernels["k0"].weight
        weight.copy_(torch.tensor([4.0, -3.0]).repeat(32) * torch.tensor([[1.0], [10.0], [100.0], [1000.0]]))
    kernel = baselines.find(method, s.problem, 0).config.blocks[0].kernels[0]
    assert (kernel.qtype, kernel.granularity) == ("FLOAT", "per-channel")


@pytest.mark.parametrize("method", BASELINES)
def test_what_free_types_and_granularities_take_is_counted(method):
    s = space(limits=Compress(qtype="any", granularity="any"), channels=(16, 32) * 5, cost=kernel_bytes,
              drops=lambda index, configs: [-float(c.average_bits) for c in configs])
    for allowed in s.sizes[:, 0, 0, 0, 0].sum() * np.array([1, 1.02, 1.1, 1.3, 2, 3]):
        assert baselines.find(method, replace(s.problem, allowed=allowed), 0).config.kernels_bytes <= allowed


def joint(six, method="random", **settings):
    settings = {"search.method": method, "search.target": TARGET, "compress.bits_max": 5, "compress.max_pruning": 0.5,
                "lla.timesteps": 3, "lla.envs": 2, "seed": 3, **settings}  # 2 * 3 * 4 evaluations, all drops beyond 50
    proxy = SimpleNamespace(drops=lambda i, c, worst: [min(1e3 + d, worst) for d in six.drops(i, c, worst)])
    config, notes, allowance = override(Config(), settings), [], (retained_weights, TARGET * sum(
        kernel.weight.numel() for block in six.blocks for kernel in block.kernels.values()))
    problem = baselines.make_problem(six.blocks, [1.0, 0.3], config, allowance)
    return baselines.joint_blocks(problem, SimpleNamespace(proxy=proxy), config, notes.append), notes  # no surrogate


def test_blocks_share_one_search_per_cycle(six):
    blocks, notes = joint(six)
    six.asked.clear()
    first = [block.search(None) for block in blocks]
    assert [one.evaluations for one in first] == [24, 0] and len(six.asked) == 24
    assert [(one.updates, one.entropy, one.compared) for one in first] == [([], None, {})] * 2 and not notes
    assert NetworkConfig(tuple(one.config for one in first)).retained <= TARGET
    seeds = [derive_seed(3, "baseline", "random", cycle) for cycle in (1, 2)]
    chosen = [found(six, "random", seed, evaluations=24).config.blocks for seed in seeds]
    assert chosen[0] != chosen[1] and chosen[0] == tuple(one.config for one in first)
    assert chosen[1][::-1] == tuple(block.search(None).config for block in reversed(blocks))  # the next cycle


def test_a_search_goes_on_behind_a_block(six):
    whole, before, after = (joint(six)[0] for _ in range(3))
    expected = [block.search(None) for _ in range(2) for block in whole]
    done = [before[n % 2].search(None) for n in range(3)]
    for block, stopped in zip(after, before):
        block.load_state_dict(stopped.state_dict())
    assert done + [after[1].search(None)] == expected


def test_what_there_is_to_say_is_noted_once(six):
    blocks, notes = joint(SimpleNamespace(blocks=six.blocks, drops=lambda i, c, _: [math.inf] * len(c)), "uniform")
    assert [block.search(None) for block in blocks] and notes == ["6 drops were not finite and count as the worst"]


def test_keeps_are_the_agents_that_mean_other_channels():
    s = space(limits=Compress(max_pruning=0.6), channels=(4, 100), whole=(1,))
    assert s.keeps[1] == [1.0]  # must stay whole
    # 1 - j/14 0.6: the largest with 3, 2 and 1 of 4 channels are j = 1, 6 and 12
    assert s.keeps[0] == pytest.approx([1 - 7.2 / 14, 1 - 3.6 / 14, 1 - 0.6 / 14, 1.0])


def test_fitted_genomes_meet_the_target_and_leave_no_room():
    s = space(limits=Compress(granularity="any"), channels=(16, 24, 4), target=1.2, whole=(2,), cost=kernel_bytes)
    rng, both = np.random.default_rng(0), [(1.0, np.zeros_like(s.levels)), (2.0, s.levels - 1)]
    genomes = [s.onto_target(s.draw(rng), rng) for _ in range(50)]
    for genome in genomes:
        config = s.config(genome)
        assert s.size(genome) <= s.allowed and config.blocks[2].kernels[0].keep == 1.0
        assert s.size(genome) == pytest.approx(s.cost(config))
        for k, head in np.argwhere(genome[:, :2] < s.levels[:, :2] - 1):
            genome[k, head] += 1
            assert s.size(genome) > s.allowed
            genome[k, head] -= 1
    assert len({genome.tobytes() for genome in genomes}) > 40 and sum(genome[:, 2:].any() for genome in genomes) > 40
    assert np.mean([baselines._child(s, both, rng)[:2, 1] == 0 for _ in range(40)]) > 0.5  # three draws: 7 times of 8


def test_a_drop_that_is_not_finite_is_the_largest_and_the_best_meets_the_target():
    s = space(channels=(2,), target=4.5 / 32, drops=lambda i, configs: [
        math.nan if c.kernels[0].bits == 3 else -float(c.kernels[0].bits) for c in configs])
    assert s.scores([s.grouped([KernelConfig(bits)]) for bits in (3, 4, 5)]) == [1e9, -4.0, -5.0] and s.bad == 1
    assert s.best.blocks[0].kernels[0].bits == 4


def test_networks_beyond_the_budget_are_not_asked_for():
    asked = []
    s = space(channels=(2, 2), budget=3, drops=lambda i, configs: asked.extend(configs) or [1.0] * len(configs))
    networks = [s.grouped([KernelConfig(a), KernelConfig(b)]) for a, b in ((3, 3), (4, 4), (3, 4), (3, 3))]
    assert s.scores(networks) == [2.0, math.inf, 2.0, 2.0] and len(asked) == 3 and s.remaining == 0
    assert s.scores([s.grouped([KernelConfig(5), KernelConfig(3)])]) == [math.inf] and len(asked) == 3


def test_the_sequential_controller_sees_one_kernel_after_the_other():
    s = space(limits=Compress(bits_min=3, bits_max=8, max_pruning=0.5), channels=(2, 4), target=6 / 32,
              drops=lambda i, configs: [2.0 * c.kernels[0].bits for c in configs])
    env, asked, score = baselines.SequentialEnv(s, np.random.default_rng(0)), [], s.scores
    s.scores = lambda configs: asked.extend(configs) or score(configs)
    first = env.reset()
    assert first.shape == (4, 9)
    assert first[0] == pytest.approx([0, 0, math.log10(16) / 8, 1 / 12, 1, 0.5, 0, 0, 0])
    obs, rewards, dones, _ = env.step(np.array([[5, 0, 0, 0], [0, 14, 0, 0], [5, 14, 0, 0], [0, 0, 0, 0]]))
    assert not dones.any() and not rewards.any() and obs[0, 0] == 0.5  # the second of two kernels
    size = np.array([16 * 8 / 32, 8 * 3 / 32, 8 * 8 / 32, 16 * 3 / 32])
    assert obs[:, 6] == pytest.approx(size / s.allowed)
    assert obs[:, 7] == pytest.approx([1, 3 / 8, 1, 3 / 8]) and obs[:, 8] == pytest.approx([1, 0.5, 0.5, 1])
    _, rewards, dones, _ = env.step(np.array([[5, 0, 0, 0]] * 4))  # above or below the target, but for steps onto it
    assert all(config.retained <= 6 / 32 for config in asked) and len(asked) == 4
    assert dones.all() and rewards.tolist() == [-sum(b.kernels[0].bits for b in c.blocks) for c in asked]
