"""What the hierarchy is compared with: searches over the same configurations, the same estimates and the same budget.

Every method looks for the network configuration of the smallest *sum over the blocks of the estimated drop*, each
block judged with the others at theta_0 as the low-level agents' candidates are, that retains at most ``target``. To
first order the blocks' drops add up, and the sum costs one estimate per block: a method is charged alike whether it
looks at blocks or at networks. One *evaluation* is one estimate of one block's candidate; one that was made before is
remembered and costs nothing. No method makes more than the hierarchy (:func:`budget`).

Configurations are those that the agents' actions can say under uniform budgets: bits_min…bits_max, and the 15 values of
keep, those that mean other channels. A *genome* is int [K, 4]: bits, step of keep (0 = all), type and granularity of
each of the network's K kernels. The methods are the functions in METHODS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from compress import (GRANULARITIES, QTYPES, BlockConfig, KernelConfig, NetworkConfig, channels_kept,
                      kernel_retained, kernel_shapes)
from config import LEVELS, InputError
from deploy.allocate import allocations
from estimate import WORST
from rl import LLA_PPO, PPO
from search import Found, derive_seed

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
    target: float  # retained fraction
    drops: object  # drops(index, configs) → estimated drops of candidates of a block, points
    budget: int  # evaluations, at most


@dataclass(frozen=True)
class Choice:
    """What a method chose."""
    config: NetworkConfig
    drop: float  # sum of its blocks' estimated drops, points
    evaluations: int
    bad: int  # evaluations that were not finite and counted as 50 points
    note: str = ""  # about the choice, one line


def budget(blocks: int, agents: int, lla) -> int:
    """Return the evaluations of one cycle of the hierarchy: every agent of every block takes lla.timesteps steps,
    rounded up to whole steps of its environments. ``lla``: config.LLA."""
    return blocks * agents * math.ceil(lla.timesteps / lla.envs) * lla.envs


def find(method: str, problem: Problem, seed: int) -> Choice:
    """Return the configuration that ``method`` (a name in METHODS) chooses; all random numbers come from ``seed``.

    Raises InputError where no configuration meets the target, ValueError for a budget below one network's evaluations.
    """
    space = Space(problem)
    if problem.budget < len(problem.blocks):
        raise ValueError(f"{problem.budget} evaluations are less than one for each of {len(problem.blocks)} blocks")
    if space.sizes.min(axis=(1, 2)).sum() > problem.target * space.weights:
        raise InputError(f"search.target={problem.target:.4g} is below the smallest configuration: lower "
                         "compress.bits_min or raise compress.max_pruning")
    note = METHODS[method](space, np.random.default_rng(seed)) or ""
    return Choice(space.best, space.best_drop, space.evaluations, space.bad, note)


# --- In place of the low-level agents --------------------------------------------------------------------------


def joint_blocks(blocks, sensitivity, estimator, config, note) -> list[JointBlock]:
    """Make the searches of all blocks for the method config.search.method; the network holds theta_0 whenever one is
    asked. ``note(text)`` is called with what there is to say about a choice."""
    problem = Problem(blocks, sensitivity, config.compress, config.search.target, estimator.drops,
                      budget(len(blocks), len(config.lla.algorithms), config.lla))
    method, shared = config.search.method, {"cycle": 0, "asked": [], "config": None, "evaluations": 0}

    def find_in(cycle: int) -> Choice:
        choice = find(method, problem, derive_seed(config.seed, "baseline", method, cycle))
        for text in filter(None, (choice.note, choice.bad and f"{choice.bad} drops were not finite and became 50")):
            note(text)
        return choice

    return [JointBlock(i, find_in, shared) for i in range(len(blocks))]


class JointBlock:
    """A block's part of a search of the whole network, with the interface of the low-level agents.

    The network is searched once per cycle, when the first block is asked; a block that is asked again begins a cycle.
    ``find_in(cycle)``: the search, a function of seed and cycle alone; ``shared``: by all blocks.
    """

    bad_rewards = 0

    def __init__(self, index: int, find_in, shared: dict):
        self.index, self.find_in, self.shared = index, find_in, shared

    def search(self, budget) -> Found:
        """Return the block's configuration, and with the first block of the network the evaluations of the whole; the
        network has one size, so that ``budget`` plays no part."""
        shared = self.shared
        if shared["config"] is None or self.index in shared["asked"]:
            choice = self.find_in(shared["cycle"] + 1)
            shared.update(cycle=shared["cycle"] + 1, asked=[], config=choice.config, evaluations=choice.evaluations)
        shared["asked"] = [*shared["asked"], self.index]
        return Found(shared["config"].blocks[self.index], [], 0 if self.index else shared["evaluations"], None, {})

    def state_dict(self) -> dict:
        """Return the cycle, the blocks asked in it, and the network's configuration and evaluations."""
        return dict(self.shared)

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned, for all blocks."""
        self.shared.update(state)


# --- Configurations and the count of evaluations ---------------------------------------------------------------


class Space:
    """Genomes of a problem, their sizes, and the count of evaluations with the best configuration so far."""

    def __init__(self, problem: Problem):
        self.problem, limits = problem, problem.limits
        self.block_shapes = [kernel_shapes(block) for block in problem.blocks]
        self.shapes = [shape for block in self.block_shapes for shape in block]
        self.of_block = np.repeat(np.arange(len(problem.blocks)), [len(block) for block in self.block_shapes])
        self.bits = np.arange(limits.bits_min, limits.bits_max + 1)
        self.qtypes = QTYPES if limits.qtype == "any" else (limits.qtype,)
        self.granularities = GRANULARITIES if limits.granularity == "any" else (limits.granularity,)
        self.keeps = [self._keeps(shape) for shape in self.shapes]
        self.steps = np.array([len(keeps) for keeps in self.keeps])
        self.weights = float(sum(shape.params for shape in self.shapes))
        self.allowed = problem.target * self.weights * (1 - 1e-12)  # room for a sum in another order
        self.sizes = np.array([[[shape.params * kernel_retained(self.kernel(k, b, min(j, len(keeps) - 1), 0, 0),
                                                                shape.n_out) for j in range(LEVELS)]
                                for b in self.bits] for k, (shape, keeps) in enumerate(zip(self.shapes, self.keeps))])
        self.evaluations = self.bad = 0
        self.known: dict[tuple, float] = {}
        self.best, self.best_drop = None, math.inf

    def _keeps(self, shape) -> list[float]:
        """The agents' keep grid, 1 - j/14 max_pruning, from the largest; of equal numbers of channels the first."""
        if not shape.prunable:
            return [1.0]
        grid = [1.0 - j / (LEVELS - 1) * self.problem.limits.max_pruning for j in range(LEVELS)]
        return list({channels_kept(keep, shape.n_out): keep for keep in reversed(grid)}.values())[::-1]

    def kernel(self, k, bits, step, qtype, granularity) -> KernelConfig:
        """Return one kernel's configuration from its four numbers."""
        return KernelConfig(int(bits), self.keeps[k][step], self.qtypes[qtype], self.granularities[granularity])

    def config(self, genome) -> NetworkConfig:
        """Return the configuration that a genome stands for."""
        return self.grouped([self.kernel(k, *row) for k, row in enumerate(genome.tolist())])

    def grouped(self, kernels) -> NetworkConfig:
        """Return kernel configurations in order as those of the blocks."""
        following = iter(kernels)
        return NetworkConfig(tuple(BlockConfig(tuple(next(following) for _ in block), block)
                                   for block in self.block_shapes))

    def size(self, genome) -> float:
        """Return the FP32-equivalent weights that stay."""
        return float(self.sizes[np.arange(len(genome)), genome[:, 0] - self.bits[0], genome[:, 1]].sum())

    def draw(self, rng) -> np.ndarray:
        """Return a genome drawn uniformly."""
        count = len(self.shapes)
        return np.stack([rng.integers(self.bits[0], self.bits[-1] + 1, count), rng.integers(self.steps),
                         rng.integers(len(self.qtypes), size=count),
                         rng.integers(len(self.granularities), size=count)], axis=1)

    def fitted(self, genome, rng) -> np.ndarray:
        """Return the genome after random single steps of bits and keep: down until it meets the target, then up until
        no step fits. As small as it gets where nothing meets the target."""
        genome, size = genome.copy(), self.size(genome)
        for sign in (-1, 1):
            while sign > 0 or size > self.allowed:
                moves, change = self.moves(genome, sign)
                fitting = np.flatnonzero((change < 0) if sign < 0 else (size + change <= self.allowed))
                if not len(fitting):
                    break
                chosen = fitting[rng.integers(len(fitting))]
                k, head = moves[chosen]
                genome[k, head] += sign if head == 0 else -sign
                size += change[chosen]
        return genome

    def moves(self, genome, sign) -> tuple[np.ndarray, np.ndarray]:
        """Return (kernel, 0 = bits, 1 = keep) of every step that stays in its range, ``sign`` 1 towards more, and by
        how much each changes the size."""
        bits = genome[:, 0] < self.bits[-1] if sign > 0 else genome[:, 0] > self.bits[0]
        keep = genome[:, 1] > 0 if sign > 0 else genome[:, 1] < self.steps - 1
        moves = np.argwhere(np.stack([bits, keep], axis=1))
        k, head = moves[:, 0], moves[:, 1]
        b, j = genome[k, 0] - self.bits[0], genome[k, 1]
        return moves, self.sizes[k, b + sign * (head == 0), j - sign * (head == 1)] - self.sizes[k, b, j]

    def reduced(self, genome) -> np.ndarray:
        """Return the genome made to meet the target as HAQ does: one bit less for each kernel in order until it fits,
        round after round; where all are at their least, one step of keep less in the same way."""
        genome = genome.copy()
        for head, sign in ((0, -1), (1, 1)):
            moved = True
            while moved:
                moved = False
                for k in range(len(genome)):
                    if self.size(genome) <= self.allowed:
                        return genome
                    if (genome[k, 0] > self.bits[0]) if head == 0 else (genome[k, 1] < self.steps[k] - 1):
                        genome[k, head] += sign
                        moved = True
        return genome

    @property
    def remaining(self) -> int:
        """Evaluations that may still be made."""
        return self.problem.budget - self.evaluations

    def scores(self, configs) -> list[float]:
        """Return the sum of the blocks' drops of each network; the best that meets the target is kept.

        In order; a network whose unknown blocks are more than what remains costs nothing and scores infinity.
        """
        keys = [[(i, tuple((k.bits, channels_kept(k.keep, s.n_out), k.qtype, k.granularity)
                           for k, s in zip(block.kernels, block.shapes))) for i, block in enumerate(config.blocks)]
                for config in configs]
        asked: dict[int, dict] = {}
        for config, own in zip(configs, keys):
            unknown = [(key, block) for key, block in zip(own, config.blocks)
                       if key not in self.known and key not in asked.get(key[0], {})]
            if len(unknown) <= self.remaining:
                for key, block in unknown:
                    asked.setdefault(key[0], {})[key] = block
                    self.evaluations += 1
        for index, candidates in sorted(asked.items()):
            for key, drop in zip(candidates, self.problem.drops(index, list(candidates.values())), strict=True):
                self.bad += not math.isfinite(drop)
                self.known[key] = drop if math.isfinite(drop) else WORST
        result = [math.fsum(self.known.get(key, math.inf) for key in own) for own in keys]
        for config, drop in zip(configs, result):
            if drop < self.best_drop and config.retained <= self.problem.target:
                self.best, self.best_drop = config, drop
        return result


# --- The methods -----------------------------------------------------------------------------------------------


def uniform(space: Space, rng) -> None:
    """The same bits and keep everywhere; of every number of bits (type and granularity, where they are free) the
    largest keep that meets the target, and of these the least drop."""
    target, configs = space.problem.target, []

    def network(bits, keep, qtype=space.qtypes[0], granularity=space.granularities[0]):
        return space.grouped([KernelConfig(int(bits), keep if shape.prunable else 1.0, qtype, granularity)
                              for shape in space.shapes])

    for bits in space.bits:
        low, high = 1.0 - space.problem.limits.max_pruning, 1.0
        if network(bits, low).retained > target:
            continue
        if network(bits, high).retained <= target:
            low = high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if network(bits, middle).retained <= target else (low, middle)
        configs += [network(bits, low, *kind) for kind in ((t, g) for t in space.qtypes for g in space.granularities)]
    space.scores(configs)


def random_search(space: Space, rng) -> None:
    """The best of as many random configurations on the target as the budget allows."""
    for _ in range(space.problem.budget):  # more draws than evaluations only where candidates repeat
        space.scores([space.config(space.fitted(space.draw(rng), rng))])
        if space.remaining < 1:
            return


def greedy(space: Space, rng) -> str:
    """The least damage s_i / P_i ||W - W^||^2 per weight saved, with bits alone as HAWQ-V2 allocates (Dong et al. 2020,
    1911.03852), and with bits and keep; the two choices' drops are all evaluations."""
    p = space.problem
    enforced = allocations(p.blocks, space.block_shapes, p.sensitivity, p.limits, p.target)
    space.scores([one.config for one in enforced])
    return next(one.note for one in enforced if one.config == space.best)


def evolution(space: Space, rng) -> None:
    """(mu + lambda): each child takes its blocks from two tournament winners, some kernels change, and random steps
    bring it back onto the target."""
    people: list[tuple[float, int, np.ndarray]] = []
    born = idle = 0
    while space.remaining and idle < PATIENCE:
        children = [space.fitted(space.draw(rng) if born < PARENTS else _child(space, people, rng), rng)
                    for _ in range(CHILDREN)]
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
    """One policy that goes through the kernels in order, as AMC (He et al. 2018, 1802.03494) and HAQ (Wang et al. 2019,
    1811.08886), with PPO for their DDPG; the best network visited."""
    env, kernels, blocks = SequentialEnv(space), len(space.shapes), len(space.problem.blocks)
    agent = PPO(env, [len(space.bits), LEVELS, len(space.qtypes), len(space.granularities)],
                seed=int(rng.integers(2**31)), name="PPO (sequential controller)",
                **{**SEQUENTIAL_PPO, "n_steps": 4 * kernels})
    while space.remaining >= blocks and agent.timesteps < space.problem.budget * kernels:  # more: candidates repeat
        agent.learn(kernels * max(space.remaining // blocks, EPISODES_TOGETHER))


class SequentialEnv:
    """N episodes side by side: at step t the action [bits, step of keep, type, granularity] of kernel t.

    Observation [N, 10]: t / K; block / B; log10 of the parameters / 8; log2 of the channels / 12; whether channels may
    go; s_i; least size of the kernels to come / allowed size; size so far / allowed; last kernel's bits / 8 and
    fraction of kept channels. A network above the target is reduced as HAQ does (:meth:`Space.reduced`). The reward
    comes at the end: the drop's distance below the mean of the drops so far, in their standard deviations, within ±5.
    """

    obs_dim = 10

    def __init__(self, space: Space):
        self.space, self.num_envs, self.seen = space, EPISODES_TOGETHER, []
        s, count = space.shapes, len(space.shapes)
        least = space.sizes.min(axis=(1, 2))
        after = np.append(np.cumsum(least[::-1])[::-1][1:], 0.0)  # what kernels behind t take at least
        self.fixed = np.stack([np.arange(count) / count, space.of_block / len(space.problem.blocks),
                               np.log10([shape.params for shape in s]) / 8, np.log2([shape.n_out for shape in s]) / 12,
                               np.array([float(shape.prunable) for shape in s]),
                               np.array(space.problem.sensitivity, dtype=np.float64)[space.of_block],
                               after / space.allowed], axis=1)
        self.reset()

    def reset(self) -> np.ndarray:
        """Start a new episode everywhere."""
        self.t, self.genomes = 0, np.zeros((self.num_envs, len(self.space.shapes), 4), dtype=np.int64)
        return self._observation()

    def _observation(self) -> np.ndarray:
        obs = np.zeros((self.num_envs, self.obs_dim), dtype=np.float32)
        obs[:, :7] = self.fixed[self.t]
        if self.t:
            n_out, keeps = self.space.shapes[self.t - 1].n_out, self.space.keeps[self.t - 1]
            for n, genome in enumerate(self.genomes[:, :self.t]):
                used = self.space.sizes[np.arange(self.t), genome[:, 0] - self.space.bits[0], genome[:, 1]].sum()
                kept = channels_kept(keeps[genome[-1, 1]], n_out) / n_out
                obs[n, 7:] = used / self.space.allowed, genome[-1, 0] / 8, kept
        return obs

    def step(self, actions):
        """Decide kernel t in every episode."""
        genes = np.array(actions, dtype=np.int64)
        genes[:, 0] += self.space.bits[0]
        genes[:, 1] = genes[:, 1] * self.space.steps[self.t] // LEVELS
        self.genomes[:, self.t] = genes
        self.t += 1
        done, rewards = self.t == len(self.space.shapes), np.zeros(self.num_envs)
        if done:
            drops = self.space.scores([self.space.config(self.space.reduced(genome)) for genome in self.genomes])
            self.seen += [drop for drop in drops if drop < math.inf]
            spread = float(np.std(self.seen)) if self.seen else 0.0
            if spread > 0:
                below = (float(np.mean(self.seen)) - np.array(drops)) / spread
                rewards = np.where(np.isfinite(drops), below.clip(-5, 5), 0.0)
        return self.reset() if done else self._observation(), rewards, np.full(self.num_envs, done), {}


METHODS = {"uniform": uniform, "random": random_search, "greedy": greedy, "evolution": evolution,
           "sequential": sequential}
