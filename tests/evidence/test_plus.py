"""The search of --preset plus: budgets, fronts and mutations by hand, and the optimum of the six kernels."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import search
from compress import BlockConfig, KernelConfig, KernelShape, LayerBudget, kernel_shapes
from config import Compress, Config, override
from deploy.allocate import allocations
from evidence import plus
from evidence.plus import Candidate, Front, PlusEnv, PlusFound, PlusHLAEnv, combine, encode, plus_blocks
from problems import BUDGET, CURVATURE, LIMITS, TARGET, SixKernels

SHAPES = (KernelShape(64, 640), KernelShape(30, 90))
BUDGET_OF_BLOCK = LayerBudget(0.2, 0.6, 3, 1.0, "auto")


@pytest.fixture(scope="module")
def six():
    return SixKernels()


def estimator(six):
    """What the agents ask for drops: those of the six kernels, counted."""
    def drops(index, configs):
        result.evaluations += len(configs)
        return six.drops(index, configs)

    result = SimpleNamespace(drops=drops, evaluations=0, surrogate_active=False)
    return result


@pytest.fixture(scope="module")
def cycle(six):
    """The results of the blocks, the configuration that they combine to, and what was noted and asked."""
    torch.set_num_threads(1)  # as in every test, but this is set up before
    config = override(Config(), {"search.method": "plus", "search.target": TARGET, "lla.timesteps": 64,
                                 "compress.bits_max": 5, "compress.max_pruning": 0.5})
    hla = plus.PlusHLA([sum(s.params for s in kernel_shapes(b)) for b in six.blocks], CURVATURE, config)
    hla.train(config.hla.timesteps)
    six.asked.clear()
    blocks, notes = plus_blocks(six.blocks, CURVATURE, estimator(six), config), []
    found = [block.search(budget) for block, budget in zip(blocks, hla.budgets(deterministic=True))]
    return found, combine(found, TARGET, notes.append), notes, list(six.asked)


def test_the_optimum_is_found_within_the_budget(six, cycle):
    found, chosen, notes, asked = cycle
    assert six.gain(chosen) >= 0.95 and chosen.retained <= TARGET and not notes
    assert sum(block.evaluations for block in found) == BUDGET and len(asked) == BUDGET + 2 * 5  # five compare
    for index, block in enumerate(found):
        assert all(six.drop(index, config) == pytest.approx(drop) for config, drop in block.front)
        assert block.updates and 0 < block.entropy[1] <= 1 and "consensus_drop" in block.compared


def test_the_first_candidates_are_the_allocations(six, cycle):
    """Of both blocks, at the sizes asked for; with bits alone, and with bits and keep."""
    proposed = [allocations(six.blocks, [kernel_shapes(b) for b in six.blocks], CURVATURE, LIMITS, share * TARGET)
                for share in plus.PROPOSED]
    assert [len(pair) for pair in proposed] == [2, 1, 2]  # 0.7 of the target is less than bits alone can reach
    for index in range(2):
        asked = [config for i, config in cycle[-1] if i == index]
        wanted = list(dict.fromkeys(config.blocks[index] for pair in proposed for config, _ in pair))
        assert asked[:len(wanted)] == wanted


def test_tiers_are_relative_to_the_target_and_bounds_the_global_ones():
    config = override(Config(), {"search.target": 0.1, "compress.max_pruning": 0.5})
    env, paper = (kind([3, 1], [0.9, 0.5], config.compress, config.search, config.hla, (30, 6, 1))
                  for kind in (PlusHLAEnv, search.HLAEnv))
    action = [3, 1, 4, 2]  # 0.9 lightens the first block's 0.20 to 0.25, the second has 0.15
    budgets = env.budgets(action)
    assert [b.target for b in budgets] == pytest.approx([0.1, 0.06]) and budgets[0].strategy == "pruning"
    assert {(b.max_pruning, b.min_bits) for b in budgets} == {(0.5, 3)}
    r_bal, r_sens, r_glob, r_dyn = env.terms([b.target for b in budgets], 0.09)
    assert (r_bal, r_sens) == pytest.approx(paper.terms([0.25, 0.15], 0.225)[:2])
    assert r_glob == pytest.approx(-50 * 0.01) and r_dyn == 20.0  # below what is retained before the first cycle, 1


def candidate(size, drop, action=((0, 0, 0, 0),)):
    return Candidate(np.array(action), None, size, drop)


def test_the_front_holds_what_nothing_beats():
    front = Front()
    for size, drop in ((0.3, 50.0), (0.2, 5.0), (0.3, 6.0), (0.1, 9.0), (0.15, 9.0), (0.05, 50.0), (0.2, math.nan),
                       (0.2, -math.inf), (0.12, 4.0)):
        front.add(candidate(size, drop))
    assert [(c.retained, c.drop) for c in front.candidates] == [(0.1, 9.0), (0.12, 4.0)]
    assert front.near(0.15) == front.candidates[1:] and front.near(0.01) == front.candidates[:1]


def test_an_action_changes_a_candidate_near_the_budget():
    limits = Compress(qtype="any", granularity="any")
    env = PlusEnv(0, SHAPES, 0.5, None, limits, Config().lla, (30, 5, 1), blocks=1)
    env.budget, env.front, env.rng = BUDGET_OF_BLOCK, Front(), np.random.default_rng(0)
    parent, action = np.array([[7, 7, 0, 2], [3, 0, 1, 1]]), np.array([[14, 0, 1, 3], [7, 7, 0, 0]])
    assert (env.changed(action) == action).all()
    env.front.add(candidate(0.2, 3.0, parent))
    env.front.add(candidate(0.05, 9.0, parent * 0))  # not near
    changes = []
    for _ in range(300):
        different = (changed := env.changed(action)) != parent
        changes.append(different.sum())
        # bits 7 + 14 and keep 7 - 14, cut to the ends; 3 + 0 and 0 + 0 are no change; type, granularity: the action's
        assert (changed[different] == np.array([[14, 0, 1, 3], [3, 0, 0, 0]])[different]).all()
    assert 1.5 < np.mean(changes) < 2.5 and max(changes) >= 4  # two of eight, and one at least
    env.front.proposals = [action * 0, parent]
    assert [env.changed(action).tolist() for _ in range(2)] == [(action * 0).tolist(), parent.tolist()]


def test_encoded_actions_say_what_they_came_from():
    rng = np.random.default_rng(0)
    for limits in (Compress(), Compress(qtype="any", granularity="any"), Compress(2, 8, granularity="log-script")):
        for budget in (BUDGET_OF_BLOCK, LayerBudget(0.2, 0.3, 5, 1.0, "pruning")):
            for _ in range(10):
                said = search.decode_lla(rng.integers(search.lla_nvec(2)), budget, limits, SHAPES)
                action = encode(BlockConfig(said, SHAPES), budget, limits)
                assert search.decode_lla(action.ravel(), budget, limits, SHAPES) == said
    # Out of the budget's bounds the nearest: 5 bits and a third pruned where 6 bits and a tenth is the most.
    wide, tight = BlockConfig((KernelConfig(5, 2 / 3),) * 2, SHAPES), LayerBudget(0.2, 0.1, 6, 1.0, "auto")
    near = search.decode_lla(encode(wide, tight, Compress()).ravel(), tight, Compress(), SHAPES)
    assert all(kernel.bits == 6 and kernel.keep == pytest.approx(0.9) for kernel in near)


def fronts(*blocks):
    """Results of blocks of one kernel with 32 weights, their fronts (bits, drop)."""
    configs = [[(BlockConfig((KernelConfig(bits),), (KernelShape(4, 32),)), drop) for bits, drop in b] for b in blocks]
    vote = BlockConfig((KernelConfig(8),), (KernelShape(4, 32),))
    return [PlusFound(vote, [], 0, None, {}, tuple(front)) for front in configs]


def test_candidates_are_combined_within_the_target():
    notes, bits = [], lambda config: [block.kernels[0].bits for block in config.blocks]
    found = fronts([(4, 2.0), (8, 1.0)], [(4, 2.0), (6, 0.0)])
    assert bits(combine(found, 5 / 32, notes.append)) == [4, 6] and not notes  # just met
    assert bits(combine(found, 4.9 / 32, notes.append)) == [4, 4] and not notes
    assert bits(combine(found, 3.9 / 32, notes.append)) == [4, 4] and len(notes) == 1 and "smallest" in notes[0]
    voted = fronts([(4, 2.0), (5, 1.0)], [])  # nothing in the second is known to be good: its vote, 8 bits
    assert bits(combine(voted, 6 / 32, notes.append)) == [4, 8] and len(notes) == 1
