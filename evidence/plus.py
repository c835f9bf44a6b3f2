"""The search of ``--preset plus``: the two levels of the paper with four changes, as one search without settings.

Budgets: the tiers' targets are relative to search.target, and bits and pruning have the global bounds, so that every
target is in reach (:class:`PlusHLA`). Proposals: a block tries first what allocations of least damage give it, at sizes
around the target. Mutation: an agent's action does not say a whole candidate but changes an earlier good one
(:class:`PlusEnv`). Choice: of all candidates tried, those of the least sum of drops over the blocks that together meet
search.target, instead of a vote (:func:`combine`). Agents, rewards and the number of evaluations are the paper's.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from compress import GRANULARITIES, QTYPES, BlockConfig, LayerBudget, NetworkConfig, kernel_shapes
from config import LEVELS, InputError
from deploy.allocate import allocations, least_sum
from estimate import WORST
from search import TIERS, Found, HLAEnsemble, HLAEnv, LLAEnsemble, LLAEnv, decode_lla, derive_seed

PROPOSED = (1.0, 0.7, 1.4)  # sizes of the proposed allocations, in parts of search.target
MUTATED = 2.0  # entries of an earlier candidate that an action changes, on average
WINDOW = 1.3  # candidates to be changed are within this factor of the block's target, where there are any


# --- High level ------------------------------------------------------------------------------------------------


class PlusHLAEnv(HLAEnv):
    """A high-level environment whose tiers are relative to search.target: targets times search.target / 0.25."""

    def budget(self, tier: int, strategy: int, sensitivity: float) -> LayerBudget:
        """Return the budget of one block: the tier's target, scaled, and the global bounds."""
        budget = super().budget(tier, strategy, sensitivity)
        return replace(budget, target=min(budget.target * (self.search.target / TIERS[2]), 1.0),
                       max_pruning=self.limits.max_pruning, min_bits=self.limits.bits_min)

    def terms(self, targets, mean) -> tuple[float, float, float, float]:
        """Return R_bal and R_sens of the tiers as the paper has them, R_glob and R_dyn of the scaled ``mean``."""
        return super().terms([target / (self.search.target / TIERS[2]) for target in targets], mean)


class PlusHLA(HLAEnsemble):
    """High-level agents with budgets around search.target."""

    environment = PlusHLAEnv


# --- Low level -------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A configuration of a block that was tried."""
    action: np.ndarray  # int [K, 4]
    config: BlockConfig
    retained: float
    drop: float  # estimated, points


class Front:
    """Candidates of one search of a block that no other beats in both size and drop, the smallest first. ``proposals``:
    actions [K, 4] that take the place of the agents' first ones."""

    def __init__(self, proposals=()):
        self.candidates: list[Candidate] = []
        self.proposals = list(proposals)

    def add(self, candidate: Candidate) -> None:
        """Add a candidate; one that is beaten, or of which only is known that it is bad, is forgotten."""
        retained, drop = candidate.retained, candidate.drop
        if -math.inf < drop < WORST and not any(c.retained <= retained and c.drop <= drop for c in self.candidates):
            kept = [c for c in self.candidates if c.retained < retained or c.drop < drop]
            self.candidates = sorted([*kept, candidate], key=lambda c: c.retained)

    def near(self, target: float) -> list[Candidate]:
        """Return the candidates around a retained fraction, or the nearest; none where there are none."""
        near = [c for c in self.candidates if target / WINDOW <= c.retained <= target * WINDOW]
        return near or sorted(self.candidates, key=lambda c: abs(c.retained - target))[:1]


class PlusEnv(LLAEnv):
    """A low-level environment whose actions change earlier candidates; ``front``, ``rng``: set before each search."""

    front: Front
    rng: np.random.Generator

    def step(self, actions):
        """Estimate the candidates that the actions become, and remember them."""
        actions = np.stack([self.changed(action) for action in actions.reshape(self.num_envs, -1, 4)])
        outcome = super().step(actions.reshape(self.num_envs, -1))
        info = outcome[-1]
        for candidate in zip(actions, info["configs"], info["retained"], info["drops"]):
            self.front.add(Candidate(*candidate))
        return outcome

    def changed(self, action) -> np.ndarray:
        """Return a proposal while there is one, else an action [K, 4] as a change of a candidate near the budget, drawn
        uniformly; the action itself while there is no candidate.

        Each entry is changed with probability MUTATED / count, one at least: bits and keep move by up to 14 steps, from
        the action's middle up or down; type and granularity become the action's.
        """
        if self.front.proposals:
            return self.front.proposals.pop(0)
        near = self.front.near(self.budget.target)
        if not near:
            return action
        free = np.array([True, True, self.limits.qtype == "any", self.limits.granularity == "any"])
        taken = self.rng.random(action.shape) < MUTATED / (free.sum() * len(action))
        taken[self.rng.integers(len(action)), self.rng.choice(np.flatnonzero(free))] = True
        parent = near[self.rng.integers(len(near))].action
        half = LEVELS // 2
        steps = np.rint((action[:, :2] - half) / half * (LEVELS - 1)).astype(np.int64)
        moved = (parent[:, :2] + steps).clip(0, LEVELS - 1)
        return np.where(taken, np.concatenate([moved, action[:, 2:]], axis=1), parent)


@dataclass(frozen=True)
class PlusFound(Found):
    """Result of the search of one block, with its front: configurations and their estimated drops in points."""
    front: tuple[tuple[BlockConfig, float], ...] = ()


class PlusBlock(LLAEnsemble):
    """Low-level agents of one block, and the candidates that they tried. ``proposals``: BlockConfigs to try first."""

    environment = PlusEnv
    proposals: tuple[BlockConfig, ...] = ()

    def search(self, budget: LayerBudget) -> PlusFound:
        """Train every agent under ``budget``; all change the candidates of one front, which the result holds."""
        front = Front(encode(config, budget, self.config.compress) for config in self.proposals)
        for n, (agent, env) in enumerate(zip(self.agents, self.envs)):
            env.front = front
            env.rng = np.random.default_rng(derive_seed(self.config.seed, "refine", self.index, n, agent.timesteps))
        found = super().search(budget)
        return PlusFound(**vars(found), front=tuple((c.config, c.drop) for c in front.candidates))


def plus_blocks(blocks, sensitivity, estimator, config) -> list[PlusBlock]:
    """Make the searches of all blocks, which hold theta_0; what each tries first are its parts of the allocations of
    least damage to sizes around search.target (as far as these are in reach)."""
    shapes, networks = [kernel_shapes(block) for block in blocks], []
    for share in PROPOSED:
        with contextlib.suppress(InputError):  # smaller than anything is
            networks += [network for network, _ in allocations(
                blocks, shapes, sensitivity, config.compress, share * config.search.target)]
    searches = [PlusBlock(i, block, s, estimator, config, len(blocks))
                for i, (block, s) in enumerate(zip(blocks, sensitivity))]
    for search, *proposals in zip(searches, *(network.blocks for network in networks)):
        search.proposals = tuple(dict.fromkeys(proposals))
    return searches


def encode(config: BlockConfig, budget: LayerBudget, limits) -> np.ndarray:
    """Return the action int64 [K, 4] that ``decode_lla`` makes ``config`` of, or the nearest in bits and in keep."""
    kernels = len(config.kernels)
    grid = [decode_lla([level, level, 0, 0] * kernels, budget, limits, config.shapes) for level in range(LEVELS)]
    return np.array([[min(range(LEVELS), key=lambda level: abs(grid[level][k].bits - kernel.bits)),
                      min(range(LEVELS), key=lambda level: abs(grid[level][k].keep - kernel.keep)),
                      QTYPES.index(kernel.qtype),
                      GRANULARITIES.index(kernel.granularity) if limits.granularity == "any" else 0]
                     for k, kernel in enumerate(config.kernels)])


def combine(found, target: float, note) -> NetworkConfig:
    """Return, of all candidates on the blocks' fronts, those of the least sum of drops whose retained fraction over the
    network is at most ``target``; the smallest of each block where none meets it, which ``note(text)`` says. The vote
    is all that a block has without a candidate on its front."""
    fronts = [block.front or ((block.config, WORST),) for block in found]
    indices = least_sum([[(config.retained * config.params, drop) for config, drop in front] for front in fronts],
                        target * sum(block.config.params for block in found))
    if indices is None:
        note("nothing that was tried meets search.target, the smallest is taken")
        indices = [0] * len(found)
    return NetworkConfig(tuple(front[index][0] for front, index in zip(fronts, indices)))
