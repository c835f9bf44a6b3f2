"""The two-level search: action decoders, votes, rewards, environments and ensembles (§3.1.3, §3.4).

Low-level agents (LLA, §3.4.1) choose the configuration of every kernel of one block within the budget that high-level
agents (HLA, §3.4.2) give it. Both are ensembles of PPO and A2C policies that vote on their proposals.
Drops are in points, retained fractions in (0, 1].
"""

import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

from compress import (GRANULARITIES, QTYPES, STRATEGIES, BlockConfig, KernelConfig, LayerBudget, NetworkConfig,
                      kernel_shapes)
from config import LEVELS
from estimate import WORST
from rl import A2C, HLA_A2C, HLA_PPO, LLA_A2C, LLA_PPO, PPO, entropy

TIERS = (0.35, 0.30, 0.25, 0.20, 0.15)  # rho* of the five compression levels (Eq. 8)
TIER_MAX_PRUNING = (0.2, 0.3, 0.4, 0.6, 0.8)
TIER_MIN_BITS = (6, 6, 5, 4, 4)
STRATEGY_CODE = {"quantization": 0.0, "pruning": 0.5, "auto": 1.0}
RANDOM_ACTIONS = 4  # random actions per block beside which the consensus is put
BAD_REWARD = -10.0  # instead of a reward that is not finite


def derive_seed(seed: int, *path) -> int:
    """Return a separate seed for each (phase, block, agent, …), so that none depends on what ran before it."""
    words = [seed, *(zlib.crc32(str(part).encode()) for part in path)]
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)


# --- Actions (Eq. 5-8) -----------------------------------------------------------------------------------------
def lla_nvec(kernels: int) -> list[int]:
    """Return the MultiDiscrete sizes of the LLA action: [15, 15, 2, 4] per kernel (Eq. 5)."""
    return [LEVELS, LEVELS, len(QTYPES), len(GRANULARITIES)] * kernels


def hla_nvec(blocks: int) -> list[int]:
    """Return the MultiDiscrete sizes of the HLA action: [5, 3] per block (Eq. 8)."""
    return [len(TIERS), len(STRATEGIES)] * blocks


def _split(action, nvec, count) -> list[list[int]]:
    """Cut an action into ``count`` parts of len(nvec) numbers; raises ValueError where one is outside its range."""
    parts = np.asarray(action).reshape(-1, len(nvec))
    if len(parts) != count or (parts < 0).any() or (parts >= nvec).any():
        raise ValueError(f"action {parts.tolist()} is outside {nvec}, {count} times")
    return parts.tolist()


def numeric_options(limits):
    """Return the numeric types and the granularities that ``limits`` (config.Compress) leaves to choose from."""
    return (QTYPES if limits.qtype == "any" else (limits.qtype,),
            GRANULARITIES if limits.granularity == "any" else (limits.granularity,))


def decode_lla(action, budget: LayerBudget, limits, shapes) -> tuple[KernelConfig, ...]:
    """Decode an LLA action, int [4 K], to one configuration per kernel (Eq. 6-7).

    bits = b_lo + floor(a_b (b_max - b_lo) / 14) with b_lo = max(b_min, budget.min_bits), at most b_max;
    keep = 1 - (a_p / 14) p_hi with p_hi = min(max_pruning, budget.max_pruning); type and granularity by index unless
    ``limits`` overrides them. ``shapes``: KernelShape per kernel. Raises ValueError for an action outside its range.
    """
    b_lo = min(max(limits.bits_min, budget.min_bits), limits.bits_max)
    p_hi = min(limits.max_pruning, budget.max_pruning)
    qtypes, granularities = numeric_options(limits)
    return tuple(KernelConfig(bits=b_lo + a_b * (limits.bits_max - b_lo) // (LEVELS - 1),
                              keep=1.0 - a_p / (LEVELS - 1) * p_hi if shape.prunable else 1.0,
                              qtype=qtypes[a_t % len(qtypes)], granularity=granularities[a_g % len(granularities)])
                 for (a_b, a_p, a_t, a_g), shape in zip(_split(action, lla_nvec(1), len(shapes)), shapes))


def layer_budget(tier: int, strategy: int, sensitivity: float, limits) -> LayerBudget:
    """Return the budget of one block for the HLA's tier and strategy index. The tier is corrected by sensitivity: one
    lighter for s > 0.7, one harder for s < 0.3, within 0…4 (§3.1.3, ledger D7)."""
    shift = -1 if sensitivity > 0.7 else 1 if sensitivity < 0.3 else 0
    tier = min(max(tier + shift, 0), len(TIERS) - 1)
    return LayerBudget(target=TIERS[tier], max_pruning=min(TIER_MAX_PRUNING[tier], limits.max_pruning),
                       min_bits=max(TIER_MIN_BITS[tier], limits.bits_min),
                       max_drop=0.5 if sensitivity > 0.7 else 1.0 if sensitivity > 0.5 else 2.0,
                       strategy=STRATEGIES[strategy])


def decode_hla(action, sensitivity, limits) -> tuple[LayerBudget, ...]:
    """Decode an HLA action, int [2 B], to one budget per block (Eq. 8). Raises ValueError outside the range."""
    pairs = _split(action, hla_nvec(1), len(sensitivity))
    return tuple(layer_budget(tier, strategy, s, limits) for (tier, strategy), s in zip(pairs, sensitivity))


def uniform_budgets(blocks: int, search, limits) -> tuple[LayerBudget, ...]:
    """Return budgets without an HLA: rho* = rho_target and the global bounds for every block (§3.4.2's ablation)."""
    return (LayerBudget(search.target, limits.max_pruning, limits.bits_min, search.max_drop, "auto"),) * blocks


# --- Votes (Eq. 16-17) -----------------------------------------------------------------------------------------
def vote_actions(actions, weights=None) -> np.ndarray:
    """Return the consensus a = round(sum_n omega_n a_n) (Eq. 16): int [agents, heads], weights [agents] → [heads]."""
    actions = np.asarray(actions, dtype=np.float64)
    weights = np.full(len(actions), 1 / len(actions)) if weights is None else np.asarray(weights)
    # Six decimals undo binary rounding (5.499999999999999) before the tie rule (half to even) looks at the sum.
    return np.rint(np.round(weights @ actions, 6)).astype(np.int64)


def confidence_weights(rewards) -> np.ndarray:
    """Return omega_n = softmax_n(mean of agent n's last rewards / T), T = 1 (Eq. 17).

    rewards: one sequence per agent. They are standardised over the ensemble first: raw ones of about 3,000 would make
    the softmax a maximum. Without any reward (lla.timesteps=0) all weigh the same.
    """
    pooled = np.concatenate([np.asarray(r, dtype=np.float64) for r in rewards])
    if not len(pooled):
        return np.full(len(rewards), 1 / len(rewards))
    means = np.array([(np.mean(r) - pooled.mean()) / (pooled.std() + 1e-8) for r in rewards])
    powers = np.exp(means - means.max())
    return powers / powers.sum()


def vote_budgets(proposals) -> tuple[LayerBudget, ...]:
    """Return one budget per block from the agents' proposals, [agents][blocks]: means of the numbers (min_bits
    rounded), majority of the strategies, the first agent's of those that tie (§3.4.2)."""
    result = []
    for budgets in zip(*proposals):
        target, max_pruning, min_bits, max_drop = np.mean(
            [[b.target, b.max_pruning, b.min_bits, b.max_drop] for b in budgets], axis=0).tolist()
        strategies = [b.strategy for b in budgets]
        result.append(LayerBudget(target, max_pruning, round(min_bits), max_drop,
                                  max(strategies, key=strategies.count)))  # max takes the first of equals
    return tuple(result)


# --- Rewards (Eq. 9-12, 25-28). Those of the low level take numbers, or arrays with one entry per candidate. ----
def accuracy_reward(drop):
    """Return R_acc (Eq. 25), piecewise linear in the estimated drop, in [0, 100]."""
    beyond = np.where(np.less(drop, 3), 85.0 - 10.0 * (drop - 2), np.maximum(0.0, 70.0 - 10.0 * (drop - 3)))
    return np.where(np.less(drop, 1), 100.0, np.where(np.less(drop, 2), 95.0 - 5.0 * (drop - 1), beyond))


def compression_reward(retained):
    """Return R_comp = 60 (1 - rho_i) (Eq. 26)."""
    return 60.0 * (1.0 - retained)


def budget_reward(retained, target):
    """Return R_budget = 20 exp(-10 |rho_i - rho*_i|) (Eq. 27)."""
    return 20.0 * np.exp(-10.0 * np.abs(retained - target))


def sensitivity_penalty(sensitivity, retained):
    """Return P_sens = 12 s_i (1 - rho_i) (Eq. 10, 28)."""
    return 12.0 * sensitivity * (1.0 - retained)


def stability_reward(history):
    """Return R_stab = -2 std (population) of the last five rewards, 0 while there are fewer; [..., rewards] → [...]."""
    last = np.asarray(history)[..., -5:]
    return -2.0 * np.std(last, axis=-1) if last.shape[-1] == 5 else 0.0


def lla_reward(drop, retained, target, penalty, history, weights):
    """Return R = alpha R_acc + beta R_comp + R_budget + gamma_s R_stab - P_sens (Eq. 9)."""
    alpha, beta, gamma_s = weights
    return (alpha * accuracy_reward(drop) + beta * compression_reward(retained) + budget_reward(retained, target)
            + gamma_s * stability_reward(history) - penalty)


def balance_reward(targets) -> float:
    """Return R_bal = -10 var_i(rho*_i), unweighted population variance (Eq. 11)."""
    mean = math.fsum(targets) / len(targets)
    return -10.0 * math.fsum((target - mean) ** 2 for target in targets) / len(targets)


def sensitivity_reward(targets, sensitivity) -> float:
    """Return R_sens: light budgets for sensitive blocks, hard ones for insensitive blocks (Eq. 11)."""
    return sum(10.0 * (target - 0.3) if s > 0.7 and target > 0.3 else 5.0 * (0.2 - target) if s < 0.3 and target < 0.2
               else 0.0 for target, s in zip(targets, sensitivity))


def global_reward(mean_target: float, wanted: float) -> float:
    """Return R_glob = -50 |mean rho* - rho_target|, the mean weighted by parameters (Eq. 11)."""
    return -50.0 * abs(mean_target - wanted)


def dynamic_reward(mean_target, last_retained, last_drop, wanted, max_drop) -> float:
    """Return R_dyn from the last cycle's measurement (Eq. 12; ledger D8 for the second case)."""
    if last_drop > max_drop:
        return -50.0 * (last_drop - max_drop) if mean_target < last_retained else 20.0
    return 20.0 if last_retained > wanted and mean_target < last_retained else 0.0


# --- Environments (§3.1.3) -------------------------------------------------------------------------------------
class LLAEnv:
    """Environments of one low-level agent on one block, stepped together (the interface that rl.py describes).

    Observation float32 [num_envs, 12 + K_i], action int [num_envs, 4 K_i]; ``limits``: config.Compress, ``settings``:
    config.LLA. The block is that of place ``index`` of ``blocks``, a number; ``shapes`` are its kernels'.
    ``weights``: (alpha, beta, gamma_s) of the agent; ``budget``: set before each search; ``penalty_scale``: 0 drops
    P_sens (the ablation without sensitivity).
    """

    def __init__(self, index, shapes, sensitivity, estimator, limits, settings, weights, *, blocks, penalty_scale=1.0):
        self.index, self.blocks, self.shapes, self.sensitivity = index, blocks, shapes, sensitivity
        self.estimator, self.limits, self.settings, self.weights = estimator, limits, settings, weights
        self.penalty_scale, self.num_envs, self.obs_dim = penalty_scale, settings.envs, 12 + len(shapes)
        self.budget: LayerBudget | None = None
        self.bad_rewards, self.unseen = 0, 0  # of a search: that became BAD_REWARD; drops so large that R_acc is 0
        self.steps, self.history = 0, np.zeros((self.num_envs, settings.episode))  # rewards of the episode

    def reset(self) -> np.ndarray:
        """Start a new episode in every environment."""
        self.steps = 0
        return self._observation(1.0, 0.0, 0.0, 0.0, 0.5)

    def _observation(self, retained, deviation, drops, rewards, per_kernel):
        """Return the vectors of §3.1.3; retained, deviation, drops, rewards [num_envs], per_kernel [num_envs, K]."""
        obs = np.ones((self.num_envs, self.obs_dim), dtype=np.float32)  # slots 5 and 9 are always 1
        obs[:, 0], obs[:, 1] = self.index / self.blocks, self.sensitivity
        obs[:, 2], obs[:, 3], obs[:, 4] = retained, deviation, drops / 10
        obs[:, 6], obs[:, 7] = self.budget.target, STRATEGY_CODE[self.budget.strategy]
        obs[:, 8], obs[:, 10] = self.budget.max_drop / 10, self.estimator.surrogate_active
        obs[:, 11], obs[:, 12:] = rewards / 100, per_kernel
        return obs

    def step(self, actions):
        """Estimate one candidate per environment, actions int [num_envs, 4 K]: observations, rewards, dones and an
        empty info. Where drop or reward is not finite, the drop is observed as WORST and the reward is BAD_REWARD."""
        configs = [BlockConfig(decode_lla(action, self.budget, self.limits, self.shapes), self.shapes)
                   for action in actions]
        retained = np.array([config.retained for config in configs])
        drops = np.array(self.estimator.drops(self.index, configs), dtype=np.float64)
        penalty = self.penalty_scale * sensitivity_penalty(self.sensitivity, retained)
        with np.errstate(invalid="ignore", over="ignore"):
            rewards = lla_reward(drops, retained, self.budget.target, penalty, self.history[:, :self.steps],
                                 self.weights)
        bad = ~(np.isfinite(rewards) & np.isfinite(drops))
        seen = np.where(bad, WORST, drops)
        self.bad_rewards += int(bad.sum())
        self.unseen += int((accuracy_reward(seen) <= 0).sum())
        self.history[:, self.steps] = rewards = np.where(bad, BAD_REWARD, rewards)
        self.steps += 1
        done = self.steps >= self.settings.episode
        obs = self.reset() if done else self._observation(
            retained, np.abs(retained - self.budget.target), seen, rewards,
            [config.per_kernel for config in configs])
        return obs, rewards, np.full(self.num_envs, done), {}


class HLAEnv:
    """Environment of one high-level agent: a budget for every block (§3.4.2).

    Observation float32 [1, 5 + 2 B], action int [1, 2 B]. ``params`` [B]: FP32 parameters of each block's kernels.
    ``weights``: (alpha, beta, gamma) scale R_sens + R_dyn by alpha/30, R_glob by beta/6, R_bal by gamma (ledger D9).
    """
    num_envs = 1

    def __init__(self, params, sensitivity, limits, search, settings, weights):
        self.params, self.sensitivity = np.asarray(params, dtype=np.float64), list(sensitivity)
        self.limits, self.search, self.settings, self.weights = limits, search, settings, weights
        self.obs_dim = 5 + 2 * len(self.sensitivity)
        self.last_drop, self.last_retained, self.cycle, self.steps = 0.0, 1.0, 1, 0

    def feedback(self, last_drop: float, last_retained: float, cycle: int) -> None:
        """Set delta_{c-1} and rho_{c-1} as measured, and the cycle c (from 1) that begins (§3.7 step 1)."""
        self.last_drop, self.last_retained, self.cycle = last_drop, last_retained, cycle

    def reset(self) -> np.ndarray:
        """Start an episode: every target at 0.5, the global constraints in slots 3 and 4."""
        self.steps = 0
        return self._observation([0.5] * len(self.sensitivity), self.search.target, self.search.max_drop / 10)

    def _observation(self, targets, slot3: float, slot4: float) -> np.ndarray:
        """Return [1, 5 + 2 B]: feedback, progress, slots 3 and 4, then (s_i, rho*_i) per block."""
        head = [self.last_drop / 10, self.last_retained, (self.cycle - 1) / self.search.cycles, slot3, slot4]
        return np.array([head + [v for pair in zip(self.sensitivity, targets) for v in pair]], dtype=np.float32)

    def step(self, actions):
        """Propose budgets for all blocks; returns observation, reward and done, each with a leading 1, and {}."""
        targets = [budget.target for budget in decode_hla(actions[0], self.sensitivity, self.limits)]
        mean = float(self.params @ np.array(targets) / self.params.sum())  # weighted by parameters
        r_bal, r_sens = balance_reward(targets), sensitivity_reward(targets, self.sensitivity)
        r_glob = global_reward(mean, self.search.target)
        r_dyn = dynamic_reward(mean, self.last_retained, self.last_drop, self.search.target, self.search.max_drop)
        alpha, beta, gamma = self.weights
        reward = gamma * r_bal + alpha / 30 * (r_sens + r_dyn) + beta / 6 * r_glob
        self.steps += 1
        done = self.steps >= self.settings.episode
        obs = self.reset() if done else self._observation(targets, abs(mean - self.search.target),
                                                          (r_bal + r_sens + r_dyn) / 20)
        return obs, np.array([reward]), np.array([done]), {}


# --- Ensembles -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Found:
    """Result of the search of one block; ``compared`` is empty and ``entropy`` None where nothing learns."""
    config: BlockConfig
    updates: list[dict] = field(default_factory=list)  # of every agent, with diagnostics: rows of updates.csv
    evaluations: int = 0  # candidates whose drop was estimated
    entropy: tuple[float, float] | None = None  # of the policies before and after, 1 = uniform
    compared: dict = field(default_factory=dict)  # see LLAEnsemble.compared; unseen: share of candidates with R_acc = 0
    bad_rewards: int = 0  # that were not finite and became BAD_REWARD


class _Ensemble:
    """Agents with an environment each; ``agents`` and ``envs`` are set by the two levels."""

    def _make(self, algorithms, where, nvec, seeds, ppo, a2c, **labels):
        """Make the agents; ppo, a2c: hyperparameters of the algorithms; ``labels``: first columns of their updates."""
        self.labels, kinds = labels, {"PPO": (PPO, ppo), "A2C": (A2C, a2c)}
        self.agents = [kinds[name][0](env, nvec, seed=seed, name=f"{name} ({where} {n})", **kinds[name][1])
                       for n, (name, env, seed) in enumerate(zip(algorithms, self.envs, seeds))]

    def train(self, timesteps: int) -> list[dict]:
        """Train every agent for ``timesteps`` steps; returns the diagnostics of every update, agent by agent."""
        return [{**self.labels, "agent": n, "algorithm": type(agent).__name__, **update}
                for n, agent in enumerate(self.agents) for update in agent.learn(timesteps)]

    def entropy(self) -> float:
        """Return the mean of the agents' entropies in the reset state ÷ that of the uniform policy, in [0, 1]."""
        with torch.no_grad():
            nats = [entropy(agent.actor(torch.from_numpy(env.reset()))).mean().item()
                    for agent, env in zip(self.agents, self.envs)]
        return float(np.mean(nats)) / math.fsum(map(math.log, self.agents[0].nvec))

    def _proposals(self, deterministic) -> list[np.ndarray]:
        """Return each agent's action from the reset observation."""
        return [agent.predict(env.reset(), deterministic)[0] for agent, env in zip(self.agents, self.envs)]

    def state_dict(self) -> dict:
        """Return the states of the agents; an environment's is set anew before it is used."""
        return {"agents": [agent.state_dict() for agent in self.agents]}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        for agent, own in zip(self.agents, state["agents"]):
            agent.load_state_dict(own)


class LLAEnsemble(_Ensemble):
    """Low-level agents of one block, the one of place ``index`` of ``blocks``, and their vote (§3.4.1)."""

    def __init__(self, index, block, sensitivity, estimator, config, blocks):
        s, self.config, self.index, self.estimator = config.lla, config, index, estimator
        self.shapes, penalty = kernel_shapes(block), 0.0 if config.sensitivity.method == "none" else 1.0
        self.envs = [LLAEnv(index, self.shapes, sensitivity, estimator, config.compress, s, weights, blocks=blocks,
                            penalty_scale=penalty)
                     for weights in zip(s.alpha, s.beta, s.gamma_s)]
        more = {"standardize": float(s.standardize)}
        self._make(s.algorithms, f"block {index}, agent", lla_nvec(len(self.shapes)),
                   [derive_seed(config.seed, "lla", index, n) for n in range(len(s.algorithms))], {**LLA_PPO, **more},
                   {**LLA_A2C, **more}, level="LLA", block=index)

    def search(self, budget: LayerBudget) -> Found:
        """Train every agent under ``budget`` and vote (§3.7 steps 4 and 5)."""
        for env in self.envs:
            env.budget, env.bad_rewards, env.unseen = budget, 0, 0
        before, asked = self.entropy(), self.estimator.evaluations
        updates = self.train(self.config.lla.timesteps)
        answered, config = self.estimator.evaluations, self.consensus()
        unseen, bad = (sum(getattr(env, name) for env in self.envs) for name in ("unseen", "bad_rewards"))
        compared = self.compared(config) | ({"unseen": unseen / (answered - asked)} if answered > asked else {})
        self.estimator.evaluations = answered  # the comparison is not part of the search
        return Found(config, updates, answered - asked, (before, self.entropy()), compared, bad)

    def consensus(self) -> BlockConfig:
        """Vote on the agents' greedy actions from the reset observation and decode the result (Eq. 16-17)."""
        rewards = [agent.recent_rewards for agent in self.agents]
        weights = confidence_weights(rewards) if self.config.vote == "confidence" else None
        return self._decoded(vote_actions(self._proposals(deterministic=True), weights))

    def _decoded(self, action):
        return BlockConfig(decode_lla(action, self.envs[0].budget, self.config.compress, self.shapes), self.shapes)

    def compared(self, consensus: BlockConfig) -> dict:
        """Return estimated drop in points and reward (mean of the agents' Eq. 9 without R_stab) of the consensus, and
        their means over RANDOM_ACTIONS uniformly drawn actions; None where a drop is not finite."""
        rng = np.random.default_rng(derive_seed(self.config.seed, "compare", self.index, self.agents[0].timesteps))
        nvec, env = lla_nvec(len(self.shapes)), self.envs[0]
        configs = [consensus, *(self._decoded(rng.integers(nvec)) for _ in range(RANDOM_ACTIONS))]
        drops = np.array(self.estimator.drops(self.index, configs), dtype=np.float64)
        drops[~np.isfinite(drops)] = math.nan
        retained = np.array([config.retained for config in configs])
        penalty = env.penalty_scale * sensitivity_penalty(env.sensitivity, retained)
        rewards = np.mean([lla_reward(drops, retained, env.budget.target, penalty, [], other.weights)
                           for other in self.envs], axis=0)
        numbers = {"consensus_drop": drops[0], "random_drop": drops[1:].mean(),
                   "consensus_reward": rewards[0], "random_reward": rewards[1:].mean()}
        return {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}


class HLAEnsemble(_Ensemble):
    """High-level agents and their vote (§3.4.2). ``params`` [B]: FP32 parameters of each block's kernels."""

    def __init__(self, params, sensitivity, config):
        s = config.hla
        self.envs = [HLAEnv(params, sensitivity, config.compress, config.search, s, weights)
                     for weights in zip(s.alpha, s.beta, s.gamma)]
        self._make(s.algorithms, "high-level agent", hla_nvec(len(sensitivity)),
                   [config.seed + n for n in range(len(s.algorithms))], HLA_PPO, HLA_A2C, level="HLA", block="")

    def feedback(self, drop: float, retained: float, cycle: int) -> None:
        """Tell every environment what the last cycle measured (§3.7 step 1)."""
        for env in self.envs:
            env.feedback(drop, retained, cycle)

    def budgets(self, deterministic: bool) -> tuple[LayerBudget, ...]:
        """Vote on the agents' budgets from the reset observation; greedy proposals, or drawn ones (§3.7 step 3)."""
        return vote_budgets([decode_hla(action, env.sensitivity, env.limits)
                             for env, action in zip(self.envs, self._proposals(deterministic))])


class UniformBudgets:
    """In place of the high-level agents: rho_target and the global bounds for every block (no-hla); nothing learns."""

    def __init__(self, params, sensitivity, config):
        self.sensitivity, self.config = list(sensitivity), config

    def feedback(self, drop: float, retained: float, cycle: int) -> None:
        """Do nothing."""

    def train(self, timesteps: int) -> list[dict]:
        """Return no updates."""
        return []

    def entropy(self) -> None:
        """Return None, as there are no policies."""

    def budgets(self, deterministic: bool) -> tuple[LayerBudget, ...]:
        """Return one budget per block."""
        return uniform_budgets(len(self.sensitivity), self.config.search, self.config.compress)

    def state_dict(self) -> dict:
        """Return nothing, as nothing changes."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Do nothing."""


def compliance(config: NetworkConfig, budgets) -> float:
    """Return the budget compliance in percent: mean_i (1 - |rho_i - rho*_i| / rho*_i) (Table 4)."""
    return 100.0 * float(np.mean([1 - abs(block.retained - b.target) / b.target
                                  for block, b in zip(config.blocks, budgets)]))


def random_config(shapes, limits, rng: np.random.Generator) -> NetworkConfig:
    """Draw a configuration for the surrogate's warm-up: bits in {4…8}, keep uniform in [0.6, 1], within ``limits``
    (§3.6); any bits of the limits where none of theirs lie in 4…8. shapes: per block the kernels' KernelShape."""
    low, high = max(4, limits.bits_min), min(8, limits.bits_max)
    if low > high:
        low, high = limits.bits_min, limits.bits_max
    least, (qtypes, granularities) = max(0.6, 1 - limits.max_pruning), numeric_options(limits)
    return NetworkConfig(tuple(BlockConfig(tuple(
        KernelConfig(bits=int(rng.integers(low, high + 1)),
                     keep=float(rng.uniform(least if shape.prunable else 1.0, 1.0)),
                     qtype=qtypes[rng.integers(len(qtypes))],
                     granularity=granularities[rng.integers(len(granularities))]) for shape in block), tuple(block))
        for block in shapes))
