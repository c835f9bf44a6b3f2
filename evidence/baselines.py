"""What the hierarchy is compared with: searches over the same configurations, the same estimates and the same budget.

Every method looks for the network configuration of the smallest *sum over the blocks of the estimated drop*, each block
judged with the others at theta_0 as the low-level agents' candidates are, that takes at most what is allowed: bytes of
the packed file where the goal is its size, else Eq. 21's weights. A drop does not end at Eq. 23's 50 points here: sums
of drops that are cut off cannot tell networks with ruined blocks apart. Greedy uses the sum only to choose between its
two allocations. One *evaluation* is one estimate of one block's candidate, so that a method is charged alike whether it
looks at blocks or at networks; one that was made before costs nothing. No method makes more than the hierarchy
(:func:`make_problem`).

Configurations are those that the agents' actions can say under uniform budgets. A *genome* is int [K, 4]: level of bits
and of keep (0 = the least), type and granularity of each of the network's K kernels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from compress import (FULL_BITS, BlockConfig, KernelConfig, NetworkConfig, channels_kept, compress_kernel,
                      kernel_shapes)
from config import LEVELS, InputError
from deploy.allocate import enforce, least_sum
from estimate import WORST
from rl import LLA_PPO, PPO
from search import Found, derive_seed, numeric_options

RUINED = 1e9  # points, in place of a drop that is not finite
PARENTS, CHILDREN, TOURNAMENT = 32, 16, 3
PATIENCE = 20  # generations of remembered candidates alone after which evolution has nothing more to try
EPISODES_TOGETHER = 4  # of the sequential controller
SEQUENTIAL_PPO = {**LLA_PPO, "lr": 1e-3, "gamma": 1.0, "minibatch": 64}  # an episode's reward comes at its end


@dataclass(frozen=True)
class Problem:
    """What a method is told."""
    blocks: list  # with theta_0 in them
    sensitivity: list  # s_i
    limits: object  # config.Compress
    cost: object  # cost(KernelConfig, KernelShape), compress.retained_weights or kernel_bytes
    allowed: float  # sum of the costs, at most
    evaluations: int  # at most
    estimates: object = None  # with search.estimate=table an evidence.table.EstimateTable, else an estimate.Proxy


@dataclass(frozen=True)
class Choice:
    """What a method chose."""
    config: NetworkConfig
    evaluations: int
    notes: tuple[str, ...]  # one line each


def make_problem(blocks, sensitivity, config, allowance) -> Problem:
    """Return the problem of a run, without estimates; ``allowance``: its (cost, allowed). The evaluations are those of
    one cycle of the hierarchy: every agent of every block takes lla.timesteps steps, rounded up to whole steps of its
    environments."""
    lla = config.lla
    most = len(blocks) * len(lla.algorithms) * max(math.ceil(lla.timesteps / lla.envs), 1) * lla.envs
    return Problem(blocks, sensitivity, config.compress, *allowance, most)


def find(method: str, problem: Problem, seed: int) -> Choice:
    """Return the configuration that ``method`` (a name in SEARCHES) chooses; all random numbers come from ``seed``.
    There is at least one evaluation per block. Raises InputError where the method finds nothing within the target."""
    space = Space(problem)
    note = SEARCHES[method](space, np.random.default_rng(seed))
    if space.best is None:
        raise InputError(f"search={method} finds no configuration that takes at most {problem.allowed:,.6g}, as asked: "
                         "ask for a larger network, lower compress.bits_min or raise compress.max_pruning")
    bad = space.bad and f"{space.bad} drops were not finite and count as the worst"
    return Choice(space.best, problem.evaluations - space.remaining, tuple(filter(None, (note, bad))))


def joint_blocks(problem: Problem, estimator, config, note) -> list[JointBlock]:
    """Make the searches of all blocks for config.search.method; ``note(text)`` takes what is to be said."""
    method = config.search.method
    # the surrogate's drops are of whole networks: their sum over the blocks would count each block many times
    problem = replace(problem, estimates=estimator.proxy)

    @functools.lru_cache(maxsize=1)
    def find_in(cycle: int) -> Choice:
        return find(method, problem, derive_seed(config.seed, "baseline", method, cycle))

    return [JointBlock(i, find_in, note) for i in range(len(problem.blocks))]


class JointBlock:
    """A block's part of a search of the whole network, ``find_in(cycle)``, with the low-level agents' interface."""

    def __init__(self, index: int, find_in, note):
        self.index, self.find_in, self.note, self.cycle = index, find_in, note, 0

    def search(self, budget) -> Found:
        """Return the block's configuration in the next cycle, with the first block the evaluations of the whole."""
        self.cycle += 1
        choice = self.find_in(self.cycle)
        for text in () if self.index else choice.notes:
            self.note(text)
        return Found(choice.config.blocks[self.index], evaluations=0 if self.index else choice.evaluations)

    def state_dict(self) -> dict:
        """Return the cycle."""
        return {"cycle": self.cycle}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.cycle = state["cycle"]


class Space:
    """Genomes of a problem, their sizes, and the count of evaluations with the best configuration so far."""

    def __init__(self, problem: Problem):
        self.problem, limits = problem, problem.limits
        self.block_shapes = [kernel_shapes(block) for block in problem.blocks]
        self.shapes = [shape for block in self.block_shapes for shape in block]
        self.of_block = np.repeat(np.arange(len(problem.blocks)), [len(block) for block in self.block_shapes])
        self.qtypes, self.granularities = numeric_options(limits)
        self.keeps = [self.keep_grid(shape) for shape in self.shapes]
        bits = limits.bits_max - limits.bits_min + 1
        self.levels = np.array([[bits, len(keeps), len(self.qtypes), len(self.granularities)] for keeps in self.keeps])
        self.sizes = np.zeros((len(self.shapes), *self.levels.max(0)))
        for k, shape in enumerate(self.shapes):
            for genome in np.ndindex(*self.levels[k]):
                self.sizes[k, *genome] = problem.cost(self.kernel(k, *genome), shape)
        self.allowed = problem.allowed * (1 - 1e-12)  # room for another order
        self.remaining, self.bad = problem.evaluations, 0  # evaluations to go; those that were not finite
        self.known: dict[tuple[int, BlockConfig], float] = {}
        self.best, self.best_drop = None, math.inf

    def keep_grid(self, shape) -> list[float]:
        """Return the agents' keep grid, 1 - j/14 max_pruning, ascending; of equal numbers of channels the largest."""
        if not shape.prunable:
            return [1.0]
        grid = [1.0 - j / (LEVELS - 1) * self.problem.limits.max_pruning for j in reversed(range(LEVELS))]
        return list({channels_kept(keep, shape.n_out): keep for keep in grid}.values())

    def kernel(self, k, bits, keep, qtype, granularity) -> KernelConfig:
        """Return one kernel's configuration from its four numbers."""
        return KernelConfig(self.problem.limits.bits_min + bits, self.keeps[k][keep], self.qtypes[qtype],
                            self.granularities[granularity])

    def config(self, genome) -> NetworkConfig:
        """Return the configuration that a genome stands for."""
        return self.grouped([self.kernel(k, *row) for k, row in enumerate(genome.tolist())])

    def grouped(self, kernels) -> NetworkConfig:
        """Return kernel configurations in order as those of the blocks."""
        following = iter(kernels)
        return NetworkConfig(tuple(BlockConfig(tuple(next(following) for _ in block), block)
                                   for block in self.block_shapes))

    def cost(self, config) -> float:
        """Return what a configuration takes."""
        return math.fsum(map(self.problem.cost, config.joined.kernels, config.joined.shapes))

    def size(self, genome) -> float:
        """Return what a genome takes."""
        return float(self.sizes[np.arange(len(genome)), *genome.T].sum())

    def draw(self, rng) -> np.ndarray:
        """Return a genome drawn uniformly."""
        return rng.integers(self.levels)

    def onto_target(self, genome, rng) -> np.ndarray:
        """Return the genome after random single steps of bits and keep: down until it meets the target, then up until
        no step fits. Where its types and granularities alone take too much, all kernels have the first ones. As small
        as it gets where nothing meets the target."""
        genome = genome.copy()
        if self.size(genome * [0, 0, 1, 1]) > self.allowed:
            genome[:, 2:] = 0
        size = self.size(genome)
        for sign in (-1, 1):
            while sign > 0 or size > self.allowed:
                after = genome[:, :2] + sign
                k, head = np.argwhere((after >= 0) & (after < self.levels[:, :2])).T
                bits, keep, *kind = genome[k].T
                change = self.sizes[k, bits + sign * (head == 0), keep + sign * (head == 1), *kind]
                change -= self.sizes[k, bits, keep, *kind]
                fitting = np.flatnonzero((sign < 0) | (size + change <= self.allowed))
                if not len(fitting):
                    break
                chosen = fitting[rng.integers(len(fitting))]
                genome[k[chosen], head[chosen]] += sign
                size += change[chosen]
        return genome

    def scores(self, configs) -> list[float]:
        """Return the sum of the blocks' drops of each network; the best that meets the target is kept. A network whose
        unknown blocks are more than what remains costs nothing and scores infinity."""
        asked: dict[int, list[BlockConfig]] = {}
        for config in configs:
            unknown = [(i, block) for i, block in enumerate(config.blocks) if (i, block) not in self.known]
            if len(unknown) <= self.remaining:
                self.remaining -= len(unknown)
                self.known |= dict.fromkeys(unknown)
                for i, block in unknown:
                    asked.setdefault(i, []).append(block)
        for i, blocks in sorted(asked.items()):
            for block, drop in zip(blocks, self.problem.estimates.drops(i, blocks, math.inf), strict=True):
                self.bad += not math.isfinite(drop)
                self.known[i, block] = drop if math.isfinite(drop) else RUINED
        drops = [math.fsum(self.known.get(pair, math.inf) for pair in enumerate(config.blocks)) for config in configs]
        for config, drop in zip(configs, drops):
            if drop < self.best_drop and self.cost(config) <= self.problem.allowed:
                self.best, self.best_drop = config, drop
        return drops


def uniform(space: Space, rng) -> None:
    """The same bits and keep everywhere: for every number of bits (type, granularity) the largest keep that meets the
    target, and of these the least drop. Under a file's size greedy steps fill up what it leaves over
    (deploy.target.Demands.chosen)."""
    limits, allowed, configs = space.problem.limits, space.problem.allowed, []

    def network(keep, bits, *kind):
        return space.grouped([KernelConfig(bits, keep if shape.prunable else 1.0, *kind) for shape in space.shapes])

    for alike in product(range(limits.bits_min, limits.bits_max + 1), space.qtypes, space.granularities):
        low, high = 1.0 - limits.max_pruning, 1.0
        if space.cost(network(low, *alike)) > allowed:
            continue
        low = high if space.cost(network(high, *alike)) <= allowed else low
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if space.cost(network(middle, *alike)) <= allowed else (low, middle)
        configs.append(network(low, *alike))
    space.scores(configs)


def random_search(space: Space, rng) -> None:
    """The best of as many random configurations on the target as the budget allows."""
    for _ in range(space.problem.evaluations):  # more draws than evaluations only where candidates repeat
        space.scores([space.config(space.onto_target(space.draw(rng), rng))])
        if space.remaining < 1:
            return


def greedy(space: Space, rng) -> str:
    """Everything at its largest, then the steps down of least damage s_i / P_i ||W - W^||^2 per cost saved, until the
    target is met: with bits alone, as HAWQ-V2 allocates (Dong et al. 2020, 1911.03852), where that can meet it, and
    with bits and keep; the two choices' drops are all evaluations.

    Where types and granularities are free, each kernel has those of the least error at the bits that the target means,
    or the first ones where others take too much.
    """
    p, limits = space.problem, space.problem.limits
    full = sum(p.cost(KernelConfig(), shape) for shape in space.shapes)
    middle = min(max(round(FULL_BITS * p.allowed / full), limits.bits_min), limits.bits_max)
    kinds = [*product(space.qtypes, space.granularities)]
    kinds = kinds if space.sizes[:, 0, 0].max((1, 2)).sum() <= p.allowed else kinds[:1]  # do the dearest fit at all

    def start(holder):
        weight = holder.weight.detach()
        best = min((KernelConfig(middle, 1.0, *kind) for kind in kinds),
                   key=lambda choice: (compress_kernel(weight, choice)[0] - weight).square().sum().item())
        return replace(best, bits=limits.bits_max)

    largest = space.grouped(start(holder) for block in p.blocks for holder in block.kernels.values())
    alone = space.cost(space.grouped(replace(k, bits=limits.bits_min) for k in largest.joined.kernels)) <= p.allowed
    found = [enforce(p.blocks, largest, p.sensitivity, bounds, p.allowed, p.cost)
             for bounds in ([replace(limits, max_pruning=0.0)] if alone else []) + [limits]]
    space.scores([config for config, _ in found])
    return next(note for config, note in found if config == space.best)


def evolution(space: Space, rng) -> None:
    """(mu + lambda): each child takes its blocks from two tournament winners, some kernels change, and random steps
    bring it back onto the target."""
    population: dict[bytes, tuple[float, np.ndarray]] = {}  # by genome, in the order of birth where drops are equal
    generation = idle = 0
    while space.remaining and idle < PATIENCE:
        drawn, before = generation < PARENTS // CHILDREN, space.remaining
        children = [space.onto_target(space.draw(rng) if drawn else _child(space, list(population.values()), rng), rng)
                    for _ in range(CHILDREN)]
        for child, drop in zip(children, space.scores([space.config(child) for child in children])):
            if drop < math.inf:
                population.setdefault(child.tobytes(), (drop, child))
        population = dict(sorted(population.items(), key=lambda item: item[1][0])[:PARENTS])
        generation, idle = generation + 1, 0 if space.remaining < before else idle + 1


def _child(space: Space, population, rng) -> np.ndarray:
    def winner():  # it is sorted
        return population[rng.integers(len(population), size=min(TOURNAMENT, len(population))).min()][1]

    first, second, count = winner(), winner(), len(space.shapes)
    blocks = rng.random(len(space.problem.blocks)) < 0.5
    child = np.where(blocks[space.of_block][:, None], first, second)
    changed = rng.random((count, 4)) < 1.5 / count
    steps = np.column_stack([rng.choice([-2, -1, 1, 2], count), rng.integers(-4, 5, count)])
    mutated = np.column_stack([child[:, :2] + steps, space.draw(rng)[:, 2:]])
    return np.where(changed, mutated, child).clip(0, space.levels - 1)


def sequential(space: Space, rng) -> None:
    """One policy that goes through the kernels in order, as AMC (He et al. 2018, 1802.03494) and HAQ (Wang et al. 2019,
    1811.08886), with PPO for their DDPG; the best network visited."""
    env, kernels, blocks = SequentialEnv(space, rng), len(space.shapes), len(space.problem.blocks)
    bits, _, qtypes, granularities = space.levels[0]
    agent = PPO(env, [bits, LEVELS, qtypes, granularities], seed=int(rng.integers(2**31)),
                name="PPO (sequential controller)", **{**SEQUENTIAL_PPO, "n_steps": 4 * kernels})
    while space.remaining >= blocks and agent.timesteps < space.problem.evaluations * kernels:  # candidates repeat
        agent.learn(kernels * max(space.remaining // blocks, EPISODES_TOGETHER))


class SequentialEnv:
    """N episodes side by side: at step t the action [bits, channels to go, type, granularity] of kernel t.

    Observation [N, 9]: t / K; block / B; log10 of the parameters / 8; log2 of the channels / 12; whether channels may
    go; s_i; size so far / allowed size; last kernel's bits / 8 and part of channels. The reward comes at the end: minus
    the blocks' mean drop, at most 50 points, of the network brought onto the target by random steps
    (:meth:`Space.onto_target`).
    """

    obs_dim = 9

    def __init__(self, space: Space, rng):
        self.space, self.rng, self.num_envs = space, rng, EPISODES_TOGETHER
        self.reset()

    def reset(self) -> np.ndarray:
        """Start a new episode everywhere."""
        self.t, self.genomes = 0, np.zeros((self.num_envs, len(self.space.shapes), 4), dtype=np.int64)
        self.past = np.zeros((self.num_envs, 3))  # the last three numbers of the observation
        return self._observation()

    def _observation(self) -> np.ndarray:
        space, shape, block = self.space, self.space.shapes[self.t], self.space.of_block[self.t]
        kernel = [self.t / len(space.shapes), block / len(space.problem.blocks), math.log10(shape.params) / 8,
                  math.log2(shape.n_out) / 12, shape.prunable, space.problem.sensitivity[block]]
        return np.column_stack([np.tile(kernel, (self.num_envs, 1)), self.past]).astype(np.float32)

    def step(self, actions):
        """Decide kernel t in every episode."""
        space, t, n_out = self.space, self.t, self.space.shapes[self.t].n_out
        bits, keep = actions[:, 0], space.levels[t, 1] - 1 - actions[:, 1] * space.levels[t, 1] // LEVELS
        self.genomes[:, t] = np.column_stack([bits, keep, actions[:, 2:]])
        kept = [channels_kept(space.keeps[t][level], n_out) / n_out for level in keep]
        self.past = np.column_stack([self.past[:, 0] + space.sizes[t, bits, keep, *actions[:, 2:].T] / space.allowed,
                                     (space.problem.limits.bits_min + bits) / 8, kept])
        self.t += 1
        if self.t < len(space.shapes):
            return self._observation(), np.zeros(self.num_envs), np.full(self.num_envs, False), {}
        drops = np.array(space.scores([space.config(space.onto_target(genome, self.rng)) for genome in self.genomes]))
        rewards = -np.minimum(drops / len(space.problem.blocks), WORST)  # infinity: no evaluations left
        return self.reset(), rewards, np.full(self.num_envs, True), {}


def table_optimum(space: Space, rng) -> str:
    """The least sum of the table's entries, as integer programs allocate (HAWQ-V3, Yao et al. 2021, 2011.10680): the
    exact optimum of the additive estimate."""
    table, pairs = space.problem.estimates, []
    entries = [entry for block in table.entries for entry in block]  # in the order of the kernels
    for k, shape in enumerate(space.shapes):
        factor = table.factors[space.of_block[k]]
        damages = (factor * entries[k].mse(space.kernel(k, *g), shape.n_out) for g in np.ndindex(*space.levels[k]))
        pairs.append([(space.sizes[k, *g], min(d, RUINED)) for g, d in zip(np.ndindex(*space.levels[k]), damages)])
    chosen = exact_least_sum(pairs, space.problem.allowed)
    if chosen:
        space.scores([space.config(np.array([*map(np.unravel_index, chosen, space.levels)]))])
    bad = sum(damage == RUINED for group in pairs for _, damage in group)
    return f"{bad} choices for single kernels give logits that are not finite, and count as the worst" * bool(bad)


def exact_least_sum(options, budget: float) -> list[int] | None:
    """Indices of one option per group whose costs sum to at most ``budget`` and whose damages have the least sum; None
    where none do. options: per group a list of (cost, damage).

    All partial choices stay that no other beats in cost and damage, and that may still lead below the sum of the
    choice by slots: the groups to come add at least their sum of min(damage + price cost), minus ``price`` times the
    cost that is left (Lagrange). That leaves a few hundred.
    """
    chosen, groups = least_sum(options, budget), [np.array(group, dtype=np.float64).T for group in options]
    if chosen is None:
        return None
    low, price = 0.0, 1e30
    for _ in range(200):
        middle = (low + price) / 2
        taken = math.fsum(cost[(damage + middle * cost).argmin()] for cost, damage in groups)
        low, price = (middle, price) if taken > budget else (low, middle)
    bound = math.fsum(group[1, index] for group, index in zip(groups, chosen)) + price * budget
    floor = [(damage + price * cost).min() for cost, damage in groups]

    def stay(k, costs, damages):
        near = np.flatnonzero(damages + price * costs + math.fsum(floor[k:]) <= bound * (1 + 1e-9))
        near = near[np.lexsort((damages[near], costs[near]))]
        return near[damages[near] < np.minimum.accumulate(np.append(math.inf, damages[near]))[:-1]]

    return least_sum(options, budget, stay=stay) or chosen


SEARCHES = dict(uniform=uniform, random=random_search, greedy=greedy, evolution=evolution, sequential=sequential,
                table=table_optimum)
