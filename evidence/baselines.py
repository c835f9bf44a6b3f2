"""What the hierarchy is compared with: searches over the same configurations, the same estimates and the same budget.

Every method looks for the network configuration of the smallest *sum over the blocks of the estimated drop*, each block
judged with the others at theta_0 as the low-level agents' candidates are, whose retained fraction is at most ``target``.
To first order the drops of the blocks add up, and the sum costs one estimate per block, so that a method is charged
alike whether it looks at blocks or at networks: one *evaluation* is one estimate of one block's candidate. A candidate
that was seen before is remembered and costs nothing. HiReLC's own count is blocks x agents x lla.timesteps per cycle;
no method here asks for more (:func:`budget`).

Configurations are those that the agents' actions can say under uniform budgets: bits_min…bits_max, and the 15 values of
keep, those that mean other channels. A *genome* is int [K, 4]: bits, step of keep (0 = all), type and granularity of
each of the network's K kernels.

    uniform     the same bits and keep everywhere: for each number of bits the largest keep that meets the target
    random      random configurations moved onto the target, the best of all
    greedy      damage s_i / P_i ||W - W^||^2 per weight saved, as HAWQ-V2 allocates (Dong et al. 2020, 1911.03852)
    evolution   (mu + lambda) over genomes: tournaments, crossover by blocks, mutation of kernels
    sequential  one policy that goes through the kernels in order, as AMC (He et al. 2018, 1802.03494) and HAQ (Wang et
                al. 2019, 1811.08886), with PPO for their DDPG; the best network visited
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from compress import (GRANULARITIES, QTYPES, BlockConfig, KernelConfig, NetworkConfig, channels_kept,
                      kernel_retained, kernel_shapes)
from config import InputError
from rl import LLA_PPO, PPO
from search import LEVELS
from deploy.target import allocations

PARENTS, CHILDREN, TOURNAMENT = 32, 16, 3
PATIENCE = 20  # generations of known candidates alone after which evolution has nothing left to find
EPISODES_TOGETHER = 4  # of the sequential controller
SEQUENTIAL_PPO = {**LLA_PPO, "lr": 1e-3, "gamma": 1.0, "minibatch": 64}  # an episode's reward comes at its end


@dataclass(frozen=True)
class Problem:
    """What a method is told. blocks: with theta_0 in them; ``sensitivity``: s_i; ``limits``: config.Compress;
    ``target``: retained fraction; ``drops(index, configs)``: estimated drops in points of candidates of a block;
    ``budget``: how many of these may be asked for."""
    blocks: list
    sensitivity: list
    limits: object
    target: float
    drops: object
    budget: int


@dataclass(frozen=True)
class Found:
    """A method's choice, the sum of its blocks' estimated drops in points, the evaluations made, how many of these were
    not finite and counted as 50 points, and what there is to say about the choice, in one line."""
    config: NetworkConfig
    drop: float
    evaluations: int
    bad: int
    note: str = ""


def budget(blocks: int, agents: int, lla) -> int:
    """Evaluations of one cycle of the hierarchy: every agent of every block takes lla.timesteps steps, rounded up to
    whole steps of its environments. ``lla``: config.LLA."""
    return blocks * agents * math.ceil(lla.timesteps / lla.envs) * lla.envs


def find(method: str, problem: Problem, seed: int) -> Found:
    """The configuration that ``method`` (a name in METHODS) chooses; its own random numbers come from ``seed`` alone.

    Raises InputError where no configuration meets the target, ValueError for a budget below one network's evaluations.
    """
    space = Space(problem)
    if problem.budget < len(problem.blocks):
        raise ValueError(f"{problem.budget} evaluations are less than one for each of {len(problem.blocks)} blocks")
    if space.sizes.min(axis=(1, 2)).sum() > problem.target * space.weights:
        raise InputError(f"search.target={problem.target:.4g} is below the smallest configuration: lower "
                         "compress.bits_min or raise compress.max_pruning")
    note = METHODS[method](space, np.random.default_rng(seed)) or ""
    return Found(space.best, space.best_drop, space.evaluations, space.bad, note)


class Space:
    """Genomes of a problem, their sizes, and the count of evaluations with the best configuration so far."""

    def __init__(self, problem: Problem):
        self.problem, limits = problem, problem.limits
        self.block_shapes = [kernel_shapes(block) for block in problem.blocks]
        self.shapes = [shape for block in self.block_shapes for shape in block]
        self.of_block = np.repeat(np.arange(len(problem.blocks)), [len(block) for block in self.block_shapes])
        self.bits = np.arange(limits.bits_min, limits.bits_max + 1)
        self.keeps = [self._keeps(shape) for shape in self.shapes]
        self.steps = np.array([len(keeps) for keeps in self.keeps])
        self.options = np.array([len(QTYPES) if limits.qtype == "any" else 1,
                                 len(GRANULARITIES) if limits.granularity == "any" else 1])
        self.weights = float(sum(shape.params for shape in self.shapes))
        self.allowed = problem.target * self.weights * (1 - 1e-12)  # room for a sum in another order
        self.evaluations = self.bad = 0
        self.known: dict[tuple, float] = {}
        self.best, self.best_drop = None, math.inf

    # -- genomes

    def _keeps(self, shape) -> list[float]:
        """The agents' keep grid, 1 - j/14 max_pruning, from the largest; of equal numbers of channels the first."""
        if not shape.prunable:
            return [1.0]
        grid = [1.0 - j / (LEVELS - 1) * self.problem.limits.max_pruning for j in range(LEVELS)]
        return list({channels_kept(keep, shape.n_out): keep for keep in reversed(grid)}.values())[::-1]

    @cached_property
    def sizes(self) -> np.ndarray:
        """FP32-equivalent weights that stay, float [K, bits, steps of keep]."""
        return np.array([[[shape.params * kernel_retained(self.kernel(k, b, min(j, self.steps[k] - 1), 0, 0),
                                                          shape.n_out)
                           for j in range(LEVELS)] for b in self.bits] for k, shape in enumerate(self.shapes)])

    def kernel(self, k, bits, step, qtype, granularity) -> KernelConfig:
        """One kernel's configuration from its four numbers."""
        limits = self.problem.limits
        return KernelConfig(int(bits), self.keeps[k][step],
                            QTYPES[qtype] if limits.qtype == "any" else limits.qtype,
                            GRANULARITIES[granularity] if limits.granularity == "any" else limits.granularity)

    def config(self, genome) -> NetworkConfig:
        """The configuration that a genome stands for."""
        kernels = [self.kernel(k, *row) for k, row in enumerate(genome.tolist())]
        return self.grouped(kernels)

    def grouped(self, kernels) -> NetworkConfig:
        """Kernel configurations in order as those of the blocks."""
        left = iter(kernels)
        return NetworkConfig(tuple(BlockConfig(tuple(next(left) for _ in block), block)
                                   for block in self.block_shapes))

    def size(self, genome) -> float:
        """FP32-equivalent weights that stay."""
        return float(self.sizes[np.arange(len(genome)), genome[:, 0] - self.bits[0], genome[:, 1]].sum())

    def draw(self, rng) -> np.ndarray:
        """A genome drawn uniformly."""
        count = len(self.shapes)
        return np.stack([rng.integers(self.bits[0], self.bits[-1] + 1, count), rng.integers(self.steps),
                         rng.integers(self.options[0], size=count), rng.integers(self.options[1], size=count)], axis=1)

    def fitted(self, genome, rng) -> np.ndarray:
        """The genome after random single steps of bits and keep: down until it meets the target, then up until no step
        fits. As small as it gets where nothing meets the target."""
        genome, size = genome.copy(), self.size(genome)
        for sign in (-1, 1):
            while sign > 0 or size > self.allowed:
                moves = self._moves(genome, sign)
                change = self._sizes_after(genome, moves, sign)
                fitting = np.flatnonzero((change < 0) if sign < 0 else (size + change <= self.allowed))
                if not len(fitting):
                    break
                chosen = fitting[rng.integers(len(fitting))]
                k, head = moves[chosen]
                genome[k, head] += sign if head == 0 else -sign
                size += change[chosen]
        return genome

    def _moves(self, genome, sign) -> np.ndarray:
        """(kernel, 0 = bits, 1 = keep) of every step that stays in its range; ``sign`` 1 is towards more."""
        bits = genome[:, 0] < self.bits[-1] if sign > 0 else genome[:, 0] > self.bits[0]
        keep = genome[:, 1] > 0 if sign > 0 else genome[:, 1] < self.steps - 1
        return np.argwhere(np.stack([bits, keep], axis=1))

    def _sizes_after(self, genome, moves, sign) -> np.ndarray:
        """By how much each of ``moves`` changes the size."""
        k, head = moves[:, 0], moves[:, 1]
        b, j = genome[k, 0] - self.bits[0], genome[k, 1]
        return self.sizes[k, b + sign * (head == 0), j - sign * (head == 1)] - self.sizes[k, b, j]

    # -- evaluations

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self.problem.budget - self.evaluations

    def scores(self, configs) -> list[float]:
        """Sum of the blocks' drops of each network; the best that meets the target is kept.

        In order; a network whose unknown blocks are more than what is left costs nothing and scores infinity.
        """
        keys = [[(i, tuple((k.bits, channels_kept(k.keep, s.n_out), k.qtype, k.granularity)
                           for k, s in zip(block.kernels, block.shapes))) for i, block in enumerate(config.blocks)]
                for config in configs]
        asked: dict[int, dict] = {}
        for config, own in zip(configs, keys):
            unknown = [(key, block) for key, block in zip(own, config.blocks)
                       if key not in self.known and key not in asked.get(key[0], {})]
            if len(unknown) <= self.left:
                for key, block in unknown:
                    asked.setdefault(key[0], {})[key] = block
                    self.evaluations += 1
        for index, candidates in sorted(asked.items()):
            for key, drop in zip(candidates, self.problem.drops(index, list(candidates.values())), strict=True):
                self.bad += not math.isfinite(drop)
                self.known[key] = drop if math.isfinite(drop) else 50.0
        result = [math.fsum(self.known.get(key, math.inf) for key in own) for own in keys]
        for config, drop in zip(configs, result):
            if drop < self.best_drop and config.retained <= self.problem.target:
                self.best, self.best_drop = config, drop
        return result


# ---------------------------------------------------------------------------------------------------------------
# The methods


def uniform(space: Space, rng) -> None:
    """The same bits and keep everywhere; of every number of bits (type and granularity, where they are free) the
    largest keep that meets the target, and of these the least drop."""
    limits, configs = space.problem.limits, []
    qtypes = QTYPES if limits.qtype == "any" else (limits.qtype,)
    granularities = GRANULARITIES if limits.granularity == "any" else (limits.granularity,)

    def network(bits, keep, qtype, granularity):
        return space.grouped([KernelConfig(int(bits), keep if shape.prunable else 1.0, qtype, granularity)
                              for shape in space.shapes])

    for bits in space.bits:
        low, high = 1.0 - limits.max_pruning, 1.0
        if network(bits, low, qtypes[0], granularities[0]).retained > space.problem.target:
            continue
        if network(bits, high, qtypes[0], granularities[0]).retained <= space.problem.target:
            low = high
        for _ in range(30):
            middle = (low + high) / 2
            fits = network(bits, middle, qtypes[0], granularities[0]).retained <= space.problem.target
            low, high = (middle, high) if fits else (low, middle)
        configs += [network(bits, low, qtype, granularity) for qtype in qtypes for granularity in granularities]
    space.scores(configs)


def random_search(space: Space, rng) -> None:
    """The best of as many random configurations on the target as the budget allows."""
    for _ in range(space.problem.budget):  # more draws than evaluations only where candidates repeat
        space.scores([space.config(space.fitted(space.draw(rng), rng))])
        if space.left < 1:
            return


def greedy(space: Space, rng) -> str:
    """The least damage per weight saved, once with bits alone and once with bits and keep (``target.allocations``). The
    two choices' drops are all evaluations."""
    p = space.problem
    found = allocations(p.blocks, space.block_shapes, p.sensitivity, p.limits, p.target)
    space.scores([enforced.config for enforced in found])
    return next(enforced.note for enforced in found if enforced.config == space.best)


def evolution(space: Space, rng) -> None:
    """(mu + lambda): each child takes its blocks from two tournament winners, some kernels change, and random steps
    bring it back onto the target."""
    people: list[tuple[float, int, np.ndarray]] = []
    born = idle = 0
    while space.left and idle < PATIENCE:
        if born < PARENTS:
            children = [space.fitted(space.draw(rng), rng) for _ in range(CHILDREN)]
        else:
            children = [space.fitted(_child(space, people, rng), rng) for _ in range(CHILDREN)]
        before = space.evaluations
        drops = space.scores([space.config(child) for child in children])
        people += [(drop, born + n, child) for n, (drop, child) in enumerate(zip(drops, children)) if drop < math.inf]
        people = sorted(people, key=lambda person: person[:2])
        distinct = {person[2].tobytes(): person for person in reversed(people)}
        people = sorted(distinct.values(), key=lambda person: person[:2])[:PARENTS]
        born += CHILDREN
        idle = 0 if space.evaluations > before else idle + 1


def _child(space: Space, people, rng) -> np.ndarray:
    def winner():
        return people[rng.integers(len(people), size=min(TOURNAMENT, len(people))).min()][2]

    first, second = winner(), winner()
    blocks = rng.random(len(space.problem.blocks)) < 0.5
    child = np.where(blocks[space.of_block][:, None], first, second)
    count = len(child)
    changed = rng.random((count, 4)) < 1.5 / count
    child[:, 0] += changed[:, 0] * rng.choice([-2, -1, 1, 2], count)
    child[:, 1] += changed[:, 1] * rng.integers(-4, 5, count)
    fresh = space.draw(rng)
    child[:, 2:] = np.where(changed[:, 2:], fresh[:, 2:], child[:, 2:])
    child[:, 0] = child[:, 0].clip(space.bits[0], space.bits[-1])
    child[:, 1] = child[:, 1].clip(0, space.steps - 1)
    return child


def sequential(space: Space, rng) -> None:
    """PPO over episodes that decide one kernel after the other; the best network visited."""
    env, kernels, blocks = SequentialEnv(space), len(space.shapes), len(space.problem.blocks)
    agent = PPO(env, [len(space.bits), LEVELS, *space.options.tolist()], seed=int(rng.integers(2**31)),
                name="PPO (sequential controller)", **{**SEQUENTIAL_PPO, "n_steps": 4 * kernels})
    while space.left >= blocks and agent.timesteps < space.problem.budget * kernels:  # more where candidates repeat
        agent.learn(kernels * max(space.left // blocks, EPISODES_TOGETHER))


class SequentialEnv:
    """N episodes side by side: at step t the action [bits, step of keep, type, granularity] of kernel t.

    Observation [N, 10]: t / K; block / B; log10 of the parameters / 8; log2 of the channels / 12; whether channels may
    go; s_i; least size of the kernels to come / allowed size; size so far / allowed; last kernel's bits / 8 and fraction
    of kept channels.
    At the end a network above the target loses, as in HAQ, one bit of each kernel in order, round after round, and once
    all are at their least, a step of keep in the same way. The reward comes at the end: the drop's distance below the
    mean of the drops so far, in their standard deviations, within ±5; 0 at every other step.
    """

    obs_dim = 10

    def __init__(self, space: Space):
        self.space, self.num_envs = space, EPISODES_TOGETHER
        self.seen: list[float] = []
        s = space.shapes
        least = space.sizes.min(axis=(1, 2))
        after = np.append(np.cumsum(least[::-1])[::-1][1:], 0.0)  # what kernels behind t take at least
        sensitivity = np.asarray(space.problem.sensitivity, dtype=np.float64)[space.of_block]
        count = len(s)
        self.fixed = np.stack([np.arange(count) / count, space.of_block / len(space.problem.blocks),
                               np.log10([shape.params for shape in s]) / 8, np.log2([shape.n_out for shape in s]) / 12,
                               np.array([float(shape.prunable) for shape in s]), sensitivity,
                               after / space.allowed], axis=1)
        self.reset()

    def reset(self) -> np.ndarray:
        self.t = 0
        self.genomes = np.zeros((self.num_envs, len(self.space.shapes), 4), dtype=np.int64)
        return self._observation()

    def _observation(self) -> np.ndarray:
        obs = np.zeros((self.num_envs, self.obs_dim), dtype=np.float32)
        obs[:, :7] = self.fixed[self.t]
        if self.t:
            for n, genome in enumerate(self.genomes[:, :self.t]):
                used = self.space.sizes[np.arange(self.t), genome[:, 0] - self.space.bits[0], genome[:, 1]].sum()
                obs[n, 7:] = used / self.space.allowed, genome[-1, 0] / 8, self._kept(genome[-1, 1])
        return obs

    def _kept(self, step) -> float:
        """Fraction of the last kernel's channels that stay."""
        n_out = self.space.shapes[self.t - 1].n_out
        return channels_kept(self.space.keeps[self.t - 1][step], n_out) / n_out

    def step(self, actions):
        """Decide kernel t in every episode."""
        genes = np.array(actions, dtype=np.int64)
        genes[:, 0] += self.space.bits[0]
        genes[:, 1] = genes[:, 1] * self.space.steps[self.t] // LEVELS
        self.genomes[:, self.t] = genes
        self.t += 1
        done, rewards = self.t == len(self.space.shapes), np.zeros(self.num_envs)
        if done:
            drops = self.space.scores([self.space.config(reduced(self.space, genome)) for genome in self.genomes])
            known = [drop for drop in drops if drop < math.inf]
            self.seen += known
            spread = float(np.std(self.seen)) if self.seen else 0.0
            if spread > 0:
                mean = float(np.mean(self.seen))
                rewards = np.array([np.clip((mean - drop) / spread, -5, 5) if drop < math.inf else 0.0
                                    for drop in drops])
        dones = np.full(self.num_envs, done)
        return self.reset() if done else self._observation(), rewards, dones, {}


def reduced(space: Space, genome) -> np.ndarray:
    """The genome made to meet the target as HAQ does: one bit less for each kernel in order until it fits, round after
    round; where all are at their least, one step of keep less in the same way."""
    genome, size = genome.copy(), space.size(genome)
    for head, sign in ((0, -1), (1, 1)):
        moved = True
        while size > space.allowed and moved:
            moved = False
            for k in range(len(genome)):
                if (genome[k, 0] > space.bits[0]) if head == 0 else (genome[k, 1] < space.steps[k] - 1):
                    genome[k, head] += sign
                    moved = True
                    size = space.size(genome)
                    if size <= space.allowed:
                        break
    return genome


METHODS = {"uniform": uniform, "random": random_search, "greedy": greedy, "evolution": evolution,
           "sequential": sequential}
