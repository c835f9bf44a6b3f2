"""The two-level search: action decoders, rewards, drop estimates, environments, ensembles and votes.

Low-level agents (LLA, §3.4.1) choose the configuration of every kernel of one block within the budget that the
high-level agents (HLA, §3.4.2) gave that block. Both levels are ensembles of independent PPO and A2C policies
whose proposals are voted on. Everything that the paper writes as a formula is a pure function here; the
environments only put them together. Accuracies and drops are in percentage points, retained fractions in (0, 1].
"""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from compress import (GRANULARITIES, QTYPES, BlockConfig, KernelConfig, KernelShape, NetworkConfig, PreparedKernel,
                      compress_kernel, eval_mode, kernel_retained, kernel_shapes)
from rl import A2C, HLA_A2C, HLA_PPO, LLA_A2C, LLA_PPO, PPO, categorical_stats, learn_together, threads
from support.stages import Chain, Entering, Staged, concatenated, folded, run, split, whole
from support.winograd import fits, with_winograd

LEVELS = 15  # resolution of the bit and keep actions (§3.1.3)
TIERS = (0.35, 0.30, 0.25, 0.20, 0.15)  # rho* of the five compression levels (Eq. 8)
TIER_MAX_PRUNING = (0.2, 0.3, 0.4, 0.6, 0.8)
TIER_MIN_BITS = (6, 6, 5, 4, 4)
STRATEGIES = ("quantization", "pruning", "auto")
STRATEGY_CODE = {"quantization": 0.0, "pruning": 0.5, "auto": 1.0}
STABILITY_WINDOW = 5
COMPARED = 4  # random actions per block beside which the consensus is put
WORST = 50.0  # points, where the proxy ends
BAD_REWARD = -10.0  # what a reward that is not finite becomes


def derive_seed(seed: int, *path) -> int:
    """A seed of its own for each (phase, block, agent, …), so that none depends on what ran before it."""
    words = [seed] + [zlib.crc32(str(part).encode()) for part in path]
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)


# ---------------------------------------------------------------------------------------------------------------
# Actions (Eq. 5-8)


@dataclass(frozen=True)
class LayerBudget:
    """What the HLA allows a block: target rho*_i, bounds for the LLA's actions, allowed drop, strategy (§3.4.2)."""
    target: float
    max_pruning: float
    min_bits: int
    max_drop: float
    strategy: str


def lla_nvec(kernels: int) -> list[int]:
    """MultiDiscrete sizes of the LLA action: [15, 15, 2, 4] per kernel (Eq. 5)."""
    return [LEVELS, LEVELS, len(QTYPES), len(GRANULARITIES)] * kernels


def hla_nvec(blocks: int) -> list[int]:
    """MultiDiscrete sizes of the HLA action: [5, 3] per block (Eq. 8)."""
    return [len(TIERS), len(STRATEGIES)] * blocks


def decode_lla(action, budget: LayerBudget, limits, shapes=None) -> tuple[KernelConfig, ...]:
    """LLA action, int [4 K], → one configuration per kernel (Eq. 6-7). ``limits``: config.Compress; ``shapes``: the
    kernels' KernelShape, where some may have to keep every channel.

    bits = b_lo + floor(a_b (b_max - b_lo) / 14) with b_lo = max(b_min, budget.min_bits);
    keep = 1 - (a_p / 14) p_hi with p_hi = min(max_pruning, budget.max_pruning); type and granularity by index
    unless ``limits`` overrides them. Raises ValueError for an action outside its range.
    """
    actions = np.asarray(action).reshape(-1, 4)
    sizes = np.array(lla_nvec(1))
    if (actions < 0).any() or (actions >= sizes).any():
        raise ValueError(f"LLA action {actions.tolist()} is outside {sizes.tolist()} per kernel")
    b_lo = min(max(limits.bits_min, budget.min_bits), limits.bits_max)
    p_hi = min(limits.max_pruning, budget.max_pruning)
    configs = []
    for k, (a_b, a_p, a_t, a_g) in enumerate(actions.tolist()):
        prunable = shapes is None or shapes[k].prunable
        configs.append(KernelConfig(
            bits=b_lo + a_b * (limits.bits_max - b_lo) // (LEVELS - 1),
            keep=1.0 - a_p / (LEVELS - 1) * p_hi if prunable else 1.0,
            qtype=QTYPES[a_t] if limits.qtype == "any" else limits.qtype,
            granularity=GRANULARITIES[a_g] if limits.granularity == "any" else limits.granularity))
    return tuple(configs)


def corrected_tier(tier: int, sensitivity: float) -> int:
    """Tier after the sensitivity correction: s > 0.7 one lighter, s < 0.3 one harder, within 0…4 (§3.1.3)."""
    shift = -1 if sensitivity > 0.7 else 1 if sensitivity < 0.3 else 0
    return min(max(tier + shift, 0), len(TIERS) - 1)


def tier_scale(config) -> float | None:
    """With hla.tiers=relative the factor on the tiers' targets that makes the middle one search.target, else None."""
    return config.search.target / TIERS[2] if config.hla.tiers == "relative" else None


def layer_budget(tier: int, strategy: int, sensitivity: float, limits, scale: float | None = None) -> LayerBudget:
    """Budget of one block from the HLA's tier and strategy index, corrected by sensitivity (ledger D7). ``scale``: of
    the tiers' targets, with the global bounds instead of the tiers' (hla.tiers=relative)."""
    tier, relative = corrected_tier(tier, sensitivity), scale is not None
    return LayerBudget(target=min(TIERS[tier] * scale, 1.0) if relative else TIERS[tier],
                       max_pruning=limits.max_pruning if relative else min(TIER_MAX_PRUNING[tier], limits.max_pruning),
                       min_bits=limits.bits_min if relative else max(TIER_MIN_BITS[tier], limits.bits_min),
                       max_drop=0.5 if sensitivity > 0.7 else 1.0 if sensitivity > 0.5 else 2.0,
                       strategy=STRATEGIES[strategy])


def decode_hla(action, sensitivity, limits, scale: float | None = None) -> tuple[LayerBudget, ...]:
    """HLA action, int [2 B], → one budget per block (Eq. 8). Raises ValueError outside the range."""
    pairs = _hla_pairs(action, len(sensitivity))
    return tuple(layer_budget(tier, strategy, s, limits, scale)
                 for (tier, strategy), s in zip(pairs.tolist(), sensitivity))


def _hla_pairs(action, blocks: int) -> np.ndarray:
    pairs = np.asarray(action).reshape(-1, 2)
    if len(pairs) != blocks or pairs.min() < 0 or (pairs.max(axis=0) >= (len(TIERS), len(STRATEGIES))).any():
        raise ValueError(f"HLA action {pairs.tolist()} is outside {hla_nvec(1)} for {blocks} blocks")
    return pairs


def uniform_budgets(blocks: int, search, limits) -> tuple[LayerBudget, ...]:
    """Budgets without an HLA: rho* = rho_target and the global bounds for every block (§3.4.2's ablation)."""
    return (LayerBudget(search.target, limits.max_pruning, limits.bits_min, search.max_drop, "auto"),) * blocks


# ---------------------------------------------------------------------------------------------------------------
# Votes (Eq. 16-17)


def vote_actions(actions, weights=None) -> np.ndarray:
    """Consensus a = round(sum_n omega_n a_n) (Eq. 16): actions int [agents, heads], weights [agents] → [heads]."""
    actions = np.asarray(actions, dtype=np.float64)
    weights = np.full(len(actions), 1 / len(actions)) if weights is None else np.asarray(weights)
    # Six decimals undo the binary rounding of thirds before the tie rule (half to even) looks at the sum.
    return np.rint(np.round(weights @ actions, 6)).astype(np.int64)


def mode_votes(actions) -> np.ndarray:
    """Consensus with bits and keep as in Eq. 16, type and granularity by majority: the mean of two indices may be a
    third that nobody chose. Ties: the first agent's of the options that have most. int [agents, 4 K] → [4 K]."""
    actions = np.asarray(actions)
    result = vote_actions(actions)
    for head in range(actions.shape[1]):
        if head % 4 >= 2:
            votes = actions[:, head].tolist()
            result[head] = max(votes, key=votes.count)  # max takes the first of equals
    return result


def confidence_weights(rewards, temperature: float = 1.0) -> np.ndarray:
    """omega_n = softmax_n(mean of agent n's last rewards / T) (Eq. 17).

    rewards: one sequence per agent. They are standardised over the whole ensemble first, since raw rewards of
    about 3,000 would make the softmax a maximum. Agents without rewards: uniform weights.
    """
    if any(len(r) == 0 for r in rewards):
        return np.full(len(rewards), 1 / len(rewards))
    pooled = np.concatenate([np.asarray(r, dtype=np.float64) for r in rewards])
    means = np.array([(np.mean(r) - pooled.mean()) / (pooled.std() + 1e-8) for r in rewards]) / temperature
    powers = np.exp(means - means.max())
    return powers / powers.sum()


def vote_budgets(proposals) -> tuple[LayerBudget, ...]:
    """One budget per block from the agents' proposals: means of the numbers, majority of the strategies (§3.4.2).

    proposals: [agents][blocks] LayerBudget. min_bits is rounded; where strategies tie, the first agent's counts.
    """
    result = []
    for budgets in zip(*proposals):
        strategies = [b.strategy for b in budgets]
        counts = {s: strategies.count(s) for s in strategies}
        most = [s for s in counts if counts[s] == max(counts.values())]
        result.append(LayerBudget(
            target=float(np.mean([b.target for b in budgets])),
            max_pruning=float(np.mean([b.max_pruning for b in budgets])),
            min_bits=int(np.rint(np.mean([b.min_bits for b in budgets]))),
            max_drop=float(np.mean([b.max_drop for b in budgets])),
            strategy=most[0] if len(most) == 1 or strategies[0] not in most else strategies[0]))
    return tuple(result)


# ---------------------------------------------------------------------------------------------------------------
# Rewards (Eq. 9-12, 25-28). Those of the low level take numbers, or arrays with one entry per candidate.


def accuracy_reward(drop):
    """R_acc (Eq. 25), piecewise linear in the estimated drop, in [0, 100]."""
    beyond = np.where(np.less(drop, 3), 85.0 - 10.0 * (drop - 2), np.maximum(0.0, 70.0 - 10.0 * (drop - 3)))
    return np.where(np.less(drop, 1), 100.0, np.where(np.less(drop, 2), 95.0 - 5.0 * (drop - 1), beyond))


def compression_reward(retained):
    """R_comp = 60 (1 - rho_i) (Eq. 26)."""
    return 60.0 * (1.0 - retained)


def budget_reward(retained, target):
    """R_budget = 20 exp(-10 |rho_i - rho*_i|) (Eq. 27)."""
    return 20.0 * np.exp(-10.0 * np.abs(retained - target))


def sensitivity_penalty(sensitivity, retained):
    """P_sens = 12 s_i (1 - rho_i) (Eq. 10, 28)."""
    return 12.0 * sensitivity * (1.0 - retained)


def stability_reward(history):
    """R_stab = -2 std of the last five rewards of the episode (population), 0 while there are fewer (§3.1.2).

    history [..., rewards so far] → [...].
    """
    last = np.asarray(history)[..., -STABILITY_WINDOW:]
    return -2.0 * np.std(last, axis=-1) if last.shape[-1] == STABILITY_WINDOW else 0.0


def lla_reward(drop, retained, target, penalty, history, weights):
    """R = alpha R_acc + beta R_comp + R_budget + gamma_s R_stab - P_sens (Eq. 9); weights (alpha, beta, gamma_s)."""
    alpha, beta, gamma_s = weights
    return (alpha * accuracy_reward(drop) + beta * compression_reward(retained) + budget_reward(retained, target)
            + gamma_s * stability_reward(history) - penalty)


def overshoot_cost(retained, target):
    """What a candidate above its budget is charged, in points of drop: 50 at twice the budget (lla.reward=relative)."""
    return 50.0 * np.maximum(retained / target - 1, 0.0)


def relative_rewards(costs, seen: list) -> np.ndarray:
    """How far costs [n] lie below the mean of all costs so far, in their standard deviations, within ±5; they join
    ``seen``. Independent of the scale of the drops, which differs a hundredfold between blocks."""
    seen += [cost for cost in costs.tolist() if math.isfinite(cost)]
    spread = float(np.std(seen)) if seen else 0.0
    if spread == 0:
        return np.where(np.isfinite(costs), 0.0, np.nan)
    return np.clip((np.mean(seen) - costs) / spread, -5.0, 5.0)


def balance_reward(targets) -> float:
    """R_bal = -10 var_i(rho*_i), unweighted population variance (Eq. 11)."""
    mean = math.fsum(targets) / len(targets)
    return -10.0 * math.fsum((target - mean) ** 2 for target in targets) / len(targets)


def sensitivity_reward(targets, sensitivity) -> float:
    """R_sens: light budgets for sensitive blocks, hard ones for insensitive blocks (Eq. 11)."""
    total = 0.0
    for target, s in zip(targets, sensitivity):
        if s > 0.7 and target > 0.3:
            total += 10.0 * (target - 0.3)
        elif s < 0.3 and target < 0.2:
            total += 5.0 * (0.2 - target)
    return total


def global_reward(mean_target: float, wanted: float) -> float:
    """R_glob = -50 |mean rho* - rho_target|, the mean weighted by parameters (Eq. 11)."""
    return -50.0 * abs(mean_target - wanted)


def dynamic_reward(mean_target, last_retained, last_drop, wanted, max_drop) -> float:
    """R_dyn from the last cycle's measurement (Eq. 12; ledger D8 for the second case)."""
    if last_drop > max_drop:
        return -50.0 * (last_drop - max_drop) if mean_target < last_retained else 20.0
    return 20.0 if last_retained > wanted and mean_target < last_retained else 0.0


# ---------------------------------------------------------------------------------------------------------------
# Estimates of the accuracy drop (§3.6)


def proxy_drop(mse: float) -> float:
    """Drop in points from the logit MSE: min(20 MSE, 50) (Eq. 23); not finite where the MSE is not."""
    return min(20.0 * mse, WORST) if math.isfinite(mse) else mse


class Proxy:
    """Logit-MSE proxy (Eq. 23): how far compressing one block moves the logits of theta_0.

    ``batches``: list of images [n, 3, H, W] on the network's device, drawn and augmented once per run. The network
    must hold theta_0 whenever :meth:`drops` is called; it is never changed: the candidate's weights are passed
    beside it, so every other block is judged at theta_0 (ledger D17). Where ``around`` is set, a configuration of the
    whole network, the other blocks are compressed by it; the logits to come close to stay theta_0's. ``cache``,
    ``dtype``, ``cache_mb``, ``together``, ``fold``, ``winograd``: settings of config.Search; without ``cache`` every
    candidate is a whole forward pass.

    Whatever is kept belongs to the weights that it was computed with, and goes when a parameter or buffer has been
    written to or replaced, so that restoring theta_0 costs one forward pass and no call here. Only a write through
    ``.data`` is not seen.
    """

    IMAGES_TOGETHER = 512  # that a GPU takes through the layers behind a block at once, where ``together`` is 0

    def __init__(self, model: nn.Module, blocks, batches, cache: bool = True, dtype: str = "float32",
                 cache_mb: int = 1024, together: int = 0, fold: bool = False, winograd: bool = False):
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r}: expected float32 or bfloat16")
        self.model, self.blocks, self.batches, self.dtype = model, blocks, batches, dtype
        self.cache, self.cache_mb, self.together, self.fold, self.winograd = cache, cache_mb, together, fold, winograd
        self.held, self.versions = [], None
        self.around: NetworkConfig | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of activations that are kept now, the calibration images and the reference logits not counted."""
        return self.entering.bytes if self.versions is not None else 0

    def stages_passed(self, index: int) -> int:
        """How many of the network's stages a candidate of block ``index`` goes through; about what it costs."""
        stages = split(self.model) if self.cache else whole(self.model)
        own = [holder.weight for holder in self.blocks[index].kernels.values()]
        return len(stages) - next(i for i, stage in enumerate(stages) if stage.holds(own))

    def without_effect(self) -> list[str]:
        """Those of ``fold`` and ``winograd`` that are asked for and find nothing in this network."""
        modules = list(self.model.modules()) if isinstance(self.model, Staged) else []
        found = {"fold": any(isinstance(module, nn.BatchNorm2d) for module in modules), "winograd": any(map(fits, modules))}
        return [name for name, there in found.items() if getattr(self, name) and not there]

    def lower(self):
        """The context of ``dtype``, in which forwards run."""
        return torch.autocast(self.batches[0].device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    @torch.inference_mode()
    def drops(self, index: int, configs) -> list[float]:
        """Estimated drop of each candidate configuration of block ``index``."""
        block, configs, errors = self.blocks[index], list(configs), []
        device = self.batches[0].device.type
        with eval_mode(self.model), self.lower():
            self._follow_weights()
            for name, kernel in self.kernels.items():
                if name not in block.kernels:
                    kernel.logs = None
            size = self._group(device)
            for start in range(0, len(configs), size):
                group = [block.replaced(self._compressed(block, config)) for config in configs[start:start + size]]
                errors += self._errors(self._first_stage(index, group[0]), group)
        # One transfer for all, because a GPU waits for each.
        rows = torch.stack(errors).tolist() if errors else []
        return [proxy_drop(sum(row) / len(row)) for row in rows]

    def _follow_weights(self):
        """Start anew where the network, or what is around a candidate, is another than at the last call."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        versions = [self.around, *((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)]
        if versions == self.versions:
            return
        self.held = tensors  # as long as they live no other tensor takes their place in memory
        staged, model = isinstance(self.model, Staged), self._surroundings()
        self.network, self.factors = folded(model) if self.fold and staged else (model, {})
        if self.winograd and staged:
            self.network = with_winograd(self.network)
        self.chain, self.tensors = Chain(self.network), dict(self.network.named_parameters(remove_duplicate=False))
        self._divide(split(self.network) if self.cache else whole(self.network))
        self.versions, self.kernels, self.checked = versions, {}, set()

    def _surroundings(self):
        """The network in which candidates are judged: theta_0, or a copy that is compressed by ``around``."""
        if self.around is None:
            return self.model
        model = copy.deepcopy(self.model)
        own = dict(model.named_parameters(remove_duplicate=False))
        for block, config in zip(self.blocks, self.around.blocks):
            weights = (compress_kernel(holder.weight, kernel)[0]
                       for holder, kernel in zip(block.kernels.values(), config.kernels))
            for name, weight in block.replaced(weights).items():
                own[name].copy_(weight)
        return model

    def _divide(self, stages):
        """Take ``stages`` for the network; nothing is kept yet but the logits of theta_0, one tensor per batch."""
        # Somebody else's network may write into its input.
        self.stages = stages
        self.entering = Entering(stages, self.batches, self.cache_mb * 10**6, copy=not isinstance(self.model, Staged))
        theta0 = stages if self.around is None else whole(self.model)
        self.reference = [run(theta0, self.entering.at(0, b)).float() for b in range(len(self.batches))]

    def _group(self, device):
        """Candidates per pass. Only stages that treat images one by one may see several candidates as one batch."""
        if not (self.cache and isinstance(self.model, Staged)):
            return 1
        return self.together or (1 if device == "cpu" else max(1, self.IMAGES_TOGETHER // len(self.batches[0])))

    def _compressed(self, block, config):
        """A candidate's weights, one per kernel."""
        for (name, key), holder, kernel in zip(block.weight_names.items(), block.kernels.values(), config.kernels):
            factor = self.factors.get(key)
            if not self.cache:
                weight, _ = compress_kernel(holder.weight, kernel)
                yield weight if factor is None else weight * factor[:, None, None, None]
                continue
            if name not in self.kernels:
                self.kernels[name] = PreparedKernel(holder.weight)
            yield self.kernels[name].compressed(kernel, factor)

    def _first_stage(self, index, weights):
        """Where candidates of block ``index`` begin to differ from theta_0; ``weights``: those of one, by name."""
        own = [self.tensors[name] for name in weights]
        first = next(i for i, stage in enumerate(self.stages) if stage.holds(own))
        if first and index not in self.checked and not isinstance(self.model, Staged):
            self.checked.add(index)
            if not self._divisible(first, weights):
                self._divide(whole(self.network))
                return 0
        return first

    def _divisible(self, first, weights):
        """Whether a candidate comes out from ``first`` on as by a whole forward pass, for somebody else's Sequential:
        its children may share more than their inputs and outputs show. Other images go through in between, and twice,
        for the first time may live on what computing the state left behind."""
        wanted = self._logits(0, len(self.stages), [weights], 0)
        for _ in range(2):
            run(self.stages, -self.batches[0].flip(0))
            try:
                logits = self._logits(first, len(self.stages), [weights], 0)
            except Exception:  # a child that waits for what an earlier one should have left
                return False
            if not torch.allclose(logits, wanted, rtol=1e-4, equal_nan=True):
                return False
        return True

    def _errors(self, first, group):
        """Squared logit error of each candidate of ``group`` (weights by name) on every batch, [batches] each."""
        last = len(self.stages)
        if len(group) > 1:  # behind the block's last stage all candidates have the same weights
            own = [self.tensors[name] for name in group[0]]
            last = 1 + max(i for i, stage in enumerate(self.stages) if stage.holds(own))
        errors = []
        for b, reference in enumerate(self.reference):
            logits = self._logits(first, last, group, b)
            errors.append(torch.stack([F.mse_loss(ours.float(), reference) for ours in logits.chunk(len(group))]))
        return list(torch.stack(errors, dim=1))

    def _logits(self, first, last, group, b):
        """Logits [candidates · n, classes] of batch ``b``: each candidate by itself in the stages from ``first`` to
        before ``last``, all as one batch behind them."""
        states = [functional_call(self.chain, {f"model.{name}": weight for name, weight in weights.items()},
                                  (self.stages[first:last], self.entering.at(first, b)), tie_weights=False)
                  for weights in group]
        return run(self.stages[last:], concatenated(states) if len(group) > 1 else states[0])


def kernel_features(config: KernelConfig) -> list[float]:
    """The surrogate's five numbers per kernel: bits / 10, keep, type, granularity, joint indicator (§3.6)."""
    granularity = {"uniform": 0.0, "log": 0.33, "per-channel": 0.67, "learned": 1.0, "log-script": 0.33}
    return [config.bits / 10, config.keep, float(config.qtype == "FLOAT"), granularity[config.granularity],
            1.0 if config.keep < 1 and config.bits < 8 else 0.5]


UNKNOWN_KERNEL = [0.8, 1.0, 0.0, 0.0, 0.5]  # features of a kernel that has no consensus yet (ledger D10)


def block_features(config: BlockConfig) -> list[float]:
    """Features of all kernels of a block, 5 K_i numbers."""
    return [value for kernel in config.kernels for value in kernel_features(kernel)]


class Surrogate:
    """MLP 5 sum K_i → 64 → 32 → 1 that predicts accuracy after fine-tuning, and its buffer (§3.6, Eq. 24).

    ReLU, dropout 0.3 in training, sigmoid × 100. ``settings``: config.Surrogate. It is active once the buffer
    holds ``min_samples`` pairs. Random numbers come from a generator of its own.
    """

    DROPOUT = 0.3

    def __init__(self, inputs: int, settings, seed: int):
        self.settings, self.generator = settings, torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([nn.Linear(inputs, 64), nn.Linear(64, 32), nn.Linear(32, 1)])
        self.buffer: list[tuple[list[float], float]] = []

    @property
    def active(self) -> bool:
        """Whether it replaces the proxy."""
        return self.settings.enabled and len(self.buffer) >= self.settings.min_samples

    def add(self, config: NetworkConfig, acc: float) -> None:
        """Add a measured pair (C, accuracy after fine-tuning)."""
        self.buffer.append(([v for block in config.blocks for v in block_features(block)], acc))

    def _forward(self, x: Tensor, training: bool) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()  # [n, 64], [n, 32]
            if training:
                keep = torch.rand(x.shape, generator=self.generator) >= self.DROPOUT
                x = x * keep / (1 - self.DROPOUT)
        return self.layers[-1](x).sigmoid().squeeze(-1) * 100  # [n]

    @torch.no_grad()
    def predict(self, features) -> list[float]:
        """Predicted accuracies in points; features [n, 5 sum K_i].

        A row is predicted alike, to the last bit, whatever rows it comes with: each is a matrix of its own in a
        batched product, and the sigmoid is written with exp, since torch's own rounds the last few numbers otherwise.
        """
        x = torch.as_tensor(features, dtype=torch.float32).unsqueeze(1)  # [n, 1, inputs]
        for layer in self.layers[:-1]:
            x = torch.baddbmm(layer.bias, x, layer.weight.T.expand(len(x), -1, -1)).relu()
        x = (x * self.layers[-1].weight).sum(-1) + self.layers[-1].bias  # [n, 1]
        return (100 / (1 + (-x).exp())).squeeze(1).tolist()

    def train(self, epochs: int) -> float:
        """Fit the buffer by MSE (Eq. 24); keeps the epoch of the lowest loss over the buffer, and returns it.

        Does nothing (nan) while the buffer is below the activation threshold.
        """
        if not self.active:
            return math.nan
        x = torch.tensor([features for features, _ in self.buffer])
        y = torch.tensor([acc for _, acc in self.buffer], dtype=torch.float32)
        s = self.settings
        optimizer = torch.optim.Adam(self.layers.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        best_loss, best = math.inf, None
        for _ in range(epochs):
            for index in torch.randperm(len(y), generator=self.generator).split(s.batch_size):
                optimizer.zero_grad()
                F.mse_loss(self._forward(x[index], training=True), y[index]).backward()
                optimizer.step()
            with torch.no_grad():
                loss = F.mse_loss(self._forward(x, training=False), y).item()
            if loss < best_loss:
                best_loss, best = loss, {k: v.clone() for k, v in self.layers.state_dict().items()}
        if best is None:
            raise FloatingPointError("surrogate: the loss is not finite; lower surrogate.lr")
        self.layers.load_state_dict(best)
        return best_loss

    def state_dict(self) -> dict:
        """Weights, buffer and random state."""
        return {"layers": {k: v.clone() for k, v in self.layers.state_dict().items()},
                "buffer": [[f, a] for f, a in self.buffer], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.layers.load_state_dict(state["layers"])
        self.buffer = [(list(f), a) for f, a in state["buffer"]]
        self.generator.set_state(state["generator"])


class DropEstimator:
    """The drop that an LLA is told: the surrogate's once it is active, the proxy's before (§3.6).

    In a surrogate query the other blocks carry their latest consensus (``consensus[j]``), or UNKNOWN_KERNEL while
    they have none (ledger D10). ``once``: of the run's ``state.Progress``; what the proxy said is not asked again.
    """

    def __init__(self, proxy: Proxy, surrogate: Surrogate, baseline_acc: float, once=lambda what, compute: compute()):
        self.proxy, self.surrogate, self.baseline_acc, self.once = proxy, surrogate, baseline_acc, once
        self.consensus: list[BlockConfig | None] = [None] * len(proxy.blocks)
        self.evaluations = 0  # candidates estimated so far

    @property
    def surrogate_active(self) -> bool:
        """Whether estimates come from the surrogate."""
        return self.surrogate.active

    def drops(self, index: int, configs) -> list[float]:
        """Estimated drops in points of candidate configurations of block ``index``."""
        if not self.surrogate_active:
            self.evaluations += len(configs)
            return self.once("proxy", lambda: self.proxy.drops(index, configs))
        return self.predicted_drops([(index, np.array([block_features(config) for config in configs]))])[0]

    def predicted_drops(self, requests) -> list[list[float]]:
        """The surrogate's drops of candidates of several blocks, in one prediction.

        requests: (index, features [n, 5 K_index]) per block; returns n drops in points for each.
        """
        parts = [block_features(known) if known else UNKNOWN_KERNEL * len(block.kernels)
                 for known, block in zip(self.consensus, self.proxy.blocks)]
        starts, ends = [0], list(np.cumsum([len(features) for _, features in requests]))
        self.evaluations += int(ends[-1])
        starts += ends
        rows = np.tile(np.concatenate(parts), (ends[-1], 1))
        for (index, features), start, end in zip(requests, starts, ends):
            first = sum(map(len, parts[:index]))
            rows[start:end, first:first + len(parts[index])] = features
        drops = [self.baseline_acc - acc for acc in self.surrogate.predict(rows)]
        return [drops[start:end] for start, end in zip(starts, ends)]


# ---------------------------------------------------------------------------------------------------------------
# Environments (§3.1.3)


class Visited:
    """The candidates of one search of a block that no other beats in both size and drop: action [K, 4], retained
    fraction, drop in points; the smallest first."""

    STEP = 14  # of bits and keep, at most
    WINDOW = 1.3  # candidates to refine are within this factor of the budget, where there are any

    def __init__(self, proposals=()):
        self.front: list[tuple[np.ndarray, float, float]] = []
        self.proposals = list(proposals)  # actions [K, 4] that take the place of the agents' first ones

    def add(self, action, retained: float, drop: float) -> None:
        """Add a candidate; one that is beaten, or whose drop is not finite, is forgotten."""
        if not math.isfinite(drop) or any(r <= retained and d <= drop < WORST for _, r, d in self.front):
            return
        if drop >= WORST:  # says nothing but that it is bad; the largest of these stands in until there is a better one
            if not self.front or self.front[0][2] >= WORST and retained > self.front[0][1]:
                self.front = [(np.array(action), retained, drop)]
            return
        kept = [entry for entry in self.front if (entry[1] < retained or entry[2] < drop) and entry[2] < WORST]
        self.front = sorted([*kept, (np.array(action), retained, drop)], key=lambda entry: entry[1])

    def refined(self, action, env) -> np.ndarray:
        """An action [K, 4] of ``env`` as a change of a candidate on the front near the budget, drawn uniformly: each of
        its numbers is changed with probability refine / count, one at least: bits and keep by up to STEP steps up or
        down, type and granularity to the action's. A proposal while there is one; the action itself while there is no
        candidate, or with refine 0."""
        if self.proposals:
            return self.proposals.pop(0)
        if not env.settings.refine or not self.front or self.front[0][2] >= WORST:
            return action
        target = env.budget.target
        near = [a for a, r, _ in self.front if target / self.WINDOW <= r <= target * self.WINDOW]
        near = near or [min(self.front, key=lambda entry: abs(entry[1] - target))[0]]
        free = np.array([True, True, env.limits.qtype == "any", env.limits.granularity == "any"])
        taken = env.rng.random(action.shape) < env.settings.refine / (free.sum() * len(action))
        taken[env.rng.integers(len(action)), env.rng.choice(np.flatnonzero(free))] = True
        parent = near[env.rng.integers(len(near))]
        half = LEVELS // 2
        moved = parent + np.rint((action - half) / half * self.STEP).astype(np.int64)
        changed = np.concatenate([moved[:, :2].clip(0, LEVELS - 1), action[:, 2:]], axis=1)
        return np.where(taken, changed, parent)


class LLAEnv:
    """Environments of one low-level agent on one block, stepped together (SPEC 12's batched interface).

    Observation float32 [num_envs, 12 + K_i], action int [num_envs, 4 K_i]. All of them start and end an episode
    together, after ``settings.episode`` steps. ``weights``: (alpha, beta, gamma_s) of the agent.
    ``penalty_scale`` 0 drops P_sens (the ablation without sensitivity).
    """

    def __init__(self, index, shapes, sensitivity, estimator, limits, settings, weights, *, blocks,
                 penalty_scale=1.0):
        self.index, self.shapes, self.sensitivity, self.estimator = index, shapes, sensitivity, estimator
        self.limits, self.settings, self.weights = limits, settings, weights
        self.blocks, self.penalty_scale = blocks, penalty_scale
        self.num_envs, self.obs_dim = settings.envs, 12 + len(shapes)
        self.budget: LayerBudget | None = None
        self.bad_rewards = 0
        self.visited = Visited()  # of this search; one for all agents of a block
        self.rng = np.random.default_rng(0)
        self.costs: list[float] = []  # of every candidate of this search, with lla.reward=relative
        self.steps, self.history = 0, np.zeros((self.num_envs, settings.episode))  # rewards of the episode
        self._alone: Lockstep | None = None

    def first_observation(self) -> np.ndarray:
        """The vector of §3.1.3 [12 + K_i] in the reset state."""
        if self.budget is None:
            raise RuntimeError(f"block {self.index}: no budget has been set")
        b = self.budget
        return np.array([self.index / self.blocks, self.sensitivity, 1.0, 0.0, 0.0, 1.0, b.target,
                         STRATEGY_CODE[b.strategy], b.max_drop / 10, 1.0, float(self.estimator.surrogate_active), 0.0,
                         *[0.5] * len(self.shapes)], dtype=np.float32)

    def reset(self) -> np.ndarray:
        """Start a new episode in every environment."""
        first = self.first_observation()
        self.steps, self._alone = 0, None
        return np.tile(first, (self.num_envs, 1))

    def step(self, actions):
        """Apply one candidate per environment: observations, rewards and dones, and the estimated drops."""
        self._alone = self._alone or Lockstep([self])
        return self._alone.step([self], [actions])[0]


@lru_cache(maxsize=256)
def action_numbers(min_bits: int, max_pruning: float, limits, shapes) -> np.ndarray:
    """What bit and keep index of an LLA action mean for each kernel under a budget, float64 [K, 15, 15, 4].

    The four numbers are the retained fraction and, of :func:`kernel_features`, bits, keep and the joint indicator.
    """
    budget = LayerBudget(1.0, max_pruning, min_bits, 0.0, "auto")
    numbers, rows = np.empty((len(shapes), LEVELS, LEVELS, 4)), {}
    for a_b in range(LEVELS):
        bits = decode_lla([a_b, 0, 0, 0], budget, limits)[0].bits
        if bits not in rows:  # several indices mean the same bits
            for a_p in range(LEVELS):
                kernels = decode_lla([a_b, a_p, 0, 0] * len(shapes), budget, limits, shapes)
                for k, (kernel, shape) in enumerate(zip(kernels, shapes)):
                    tenth, keep, _, _, joint = kernel_features(kernel)
                    numbers[k, a_b, a_p] = kernel_retained(kernel, shape.n_out), tenth, keep, joint
        rows.setdefault(bits, a_b)
        numbers[:, a_b] = numbers[:, rows[bits]]
    return numbers


def encode_lla(config: BlockConfig, budget: LayerBudget, limits) -> np.ndarray:
    """The action int64 [K, 4] that :func:`decode_lla` makes ``config`` of, or what is nearest to it in bits and keep."""
    numbers = action_numbers(budget.min_bits, budget.max_pruning, limits, config.shapes)  # [K, 15, 15, 4]
    bits, keep = 10 * numbers[:, :, 0, 1], numbers[:, 0, :, 2]  # [K, 15] each
    return np.array([[np.abs(bits[k] - kernel.bits).argmin(), np.abs(keep[k] - kernel.keep).argmin(),
                      QTYPES.index(kernel.qtype), GRANULARITIES.index(kernel.granularity)
                      if kernel.granularity in GRANULARITIES else 0] for k, kernel in enumerate(config.kernels)])


def projected(actions, numbers, params, target) -> np.ndarray:
    """Low-level actions moved into a budget, so that they say how a block shares its budget, not how large it is.

    actions int [n, 4 K]; ``numbers``: :func:`action_numbers` of the block; ``params`` [K]; ``target``: rho*_i. All bit
    indices go up and all keep indices down by the same number of steps, kernel by kernel within a step: the largest
    move whose retained fraction is at most the target; the smallest configuration where none is.
    """
    kernels = numbers.shape[0]
    steps = np.arange(-LEVELS + 1, LEVELS)[:, None, None]  # [29, 1, 1]
    within = np.arange(2 * kernels) < np.arange(2 * kernels)[:, None]  # [2 K, 2 K]: the first m go a step further
    moves = (steps + within).reshape(-1, kernels, 2)  # [29 * 2 K, K, 2]
    result = np.array(actions).reshape(len(actions), kernels, 4)
    bits = (result[:, None, :, 0] + moves[..., 0]).clip(0, LEVELS - 1)  # [n, moves, K]
    keep = (result[:, None, :, 1] - moves[..., 1]).clip(0, LEVELS - 1)
    sizes = numbers[np.arange(kernels), bits, keep, 0] @ (params / params.sum())  # [n, moves], never falling
    chosen = np.maximum((sizes <= target + 1e-12).sum(axis=1) - 1, 0)
    rows = np.arange(len(result))
    result[..., 0], result[..., 1] = bits[rows, chosen], keep[rows, chosen]
    return result.reshape(len(result), -1)


class Lockstep:
    """Low-level environments that step together: what each would do alone, computed for all at once.

    ``envs``: LLAEnv with their budgets set. Candidates of one block are estimated in one call, agent by agent; with
    the surrogate active those of all blocks of as many kernels are.
    """

    def __init__(self, envs):
        groups: dict[tuple, list[LLAEnv]] = {}
        for env in envs:
            groups.setdefault((id(env.estimator), len(env.shapes), env.num_envs, env.settings.episode), []).append(env)
        self.groups = [_Group(sorted(group, key=lambda env: env.index)) for group in groups.values()]

    def step(self, envs, actions):
        """Apply actions int64 [N, 4 K] of each environment; returns what each env.step would, in the order given."""
        actions, outcomes = dict(zip(map(id, envs), actions)), {}
        for group in self.groups:
            outcomes |= zip(map(id, group.envs), group.step(np.stack([actions[id(env)] for env in group.envs])))
        return [outcomes[id(env)] for env in envs]


class _Group:
    """E environments of a Lockstep with N parallel ones each and K kernels, sorted by block."""

    def __init__(self, envs):
        def column(values):
            return np.array(values, dtype=np.float64)[:, None]  # [E, 1]

        self.envs, first = envs, envs[0]
        self.estimator, self.episode = first.estimator, first.settings.episode
        self.project, self.relative = first.settings.project, first.settings.reward == "relative"
        self.sizes = np.array(lla_nvec(1))
        self.indices = np.arange(len(envs))[:, None, None], np.arange(len(first.shapes))
        self.numbers = np.stack([action_numbers(env.budget.min_bits, env.budget.max_pruning, env.limits, env.shapes)
                                 for env in envs])  # [E, K, 15, 15, 4]
        self.types, self.granularities = (np.array([[kernel_features(kernel)[slot] for kernel in (
            decode_lla([0, 0, t, g], env.budget, env.limits)[0] for t, g in choices)] for env in envs])
            for slot, choices in ((2, [(t, 0) for t in range(2)]), (3, [(0, g) for g in range(4)])))  # [E, 2], [E, 4]
        self.params = np.array([[shape.params for shape in env.shapes] for env in envs], dtype=np.float64)  # [E, K]
        self.total = column([sum(shape.params for shape in env.shapes) for env in envs])
        self.target = column([env.budget.target for env in envs])
        self.sensitivity = column([env.sensitivity for env in envs])
        self.penalty_scale = column([env.penalty_scale for env in envs])
        self.weights = [column(values) for values in zip(*(env.weights for env in envs))]
        self.start = np.repeat(np.stack([env.first_observation() for env in envs])[:, None], first.num_envs, axis=1)

    def step(self, actions):
        """actions int64 [E, N, 4 K] → per environment (obs, rewards, dones, info)."""
        actions = actions.reshape(*actions.shape[:2], -1, 4)  # [E, N, K, 4]
        if (actions < 0).any() or (actions >= self.sizes).any():
            raise ValueError(f"LLA actions outside {self.sizes.tolist()} per kernel: {actions.tolist()}")
        if self.envs[0].settings.refine or any(env.visited.proposals for env in self.envs):
            actions = np.stack([np.stack([env.visited.refined(action, env) for action in own])
                                for env, own in zip(self.envs, actions)])
        if self.project:
            moved = [projected(own.reshape(len(own), -1), *budget)
                     for own, *budget in zip(actions, self.numbers, self.params, self.target[:, 0])]
            actions = np.stack(moved).reshape(actions.shape)
        steps, = {env.steps for env in self.envs}
        numbers = self.numbers[(*self.indices, actions[..., 0], actions[..., 1])]  # [E, N, K, 4]
        per_kernel, retained = numbers[..., 0], 0.0
        for k in range(per_kernel.shape[2]):  # one after the other: the same sum as BlockConfig.retained
            retained = retained + self.params[:, k, None] * per_kernel[..., k]
        retained = retained / self.total  # [E, N]
        drops = self._drops(actions, numbers)
        history = np.stack([env.history for env in self.envs])[..., :steps]
        penalty = self.penalty_scale * sensitivity_penalty(self.sensitivity, retained)
        with np.errstate(invalid="ignore", over="ignore"):
            rewards = lla_reward(drops, retained, self.target, penalty, history, self.weights)
            if self.relative:
                costs = drops + overshoot_cost(retained, self.target)
                rewards = np.stack([relative_rewards(own, env.costs) for own, env in zip(costs, self.envs)])
        bad = ~(np.isfinite(rewards) & np.isfinite(drops))
        rewards, known = np.where(bad, BAD_REWARD, rewards), np.where(bad, WORST, drops)
        obs = self.start.copy()
        done = steps + 1 >= self.episode
        if not done:
            obs[..., 2], obs[..., 3] = retained, np.abs(retained - self.target)
            obs[..., 4], obs[..., 11], obs[..., 12:] = known / 10, rewards / 100, per_kernel
        dones = np.full(rewards.shape[1], done)
        for env, reward, wrong, own, sizes, found in zip(self.envs, rewards, bad.sum(axis=1), actions, retained, drops):
            env.history[:, steps] = reward
            env.steps = 0 if done else steps + 1
            env.bad_rewards += int(wrong)
            if env.settings.choose == "visited" or env.settings.refine:
                for action, size, drop in zip(own, sizes, found):
                    env.visited.add(action, float(size), float(drop))
        return [(o, r, dones, {"drops": d}) for o, r, d in zip(obs, rewards, drops.tolist())]

    def _drops(self, actions, numbers):
        """Estimated drops [E, N] in points, each block's candidates in one call."""
        edges = [n for n, env in enumerate(self.envs) if n == 0 or env.index != self.envs[n - 1].index]
        blocks = [slice(start, end) for start, end in zip(edges, edges[1:] + [len(self.envs)])]
        if self.estimator.surrogate_active:
            of_type, of_granularity = (np.take_along_axis(table[:, None, None], actions[..., slot, None], axis=-1)
                                       for table, slot in ((self.types, 2), (self.granularities, 3)))
            features = np.concatenate([numbers[..., 1:3], of_type, of_granularity, numbers[..., 3:]], axis=-1)
            requests = [(self.envs[block.start].index, features[block].reshape(-1, 5 * features.shape[2]))
                        for block in blocks]
            with threads(1):
                drops = self.estimator.predicted_drops(requests)
        else:
            drops = [self.estimator.drops(self.envs[block.start].index, [
                BlockConfig(decode_lla(action, env.budget, env.limits, env.shapes), env.shapes)
                for env, own in zip(self.envs[block], actions[block]) for action in own]) for block in blocks]
        return np.concatenate(drops).reshape(actions.shape[:2])


class HLAEnv:
    """Environment of one high-level agent: a budget for every block (§3.4.2).

    Observation float32 [1, 5 + 2 B], action int [1, 2 B]. ``params`` [B]: FP32 parameters of each block's kernels.
    ``weights``: (alpha, beta, gamma) scale R_sens + R_dyn by alpha / 30, R_glob by beta / 6, R_bal by gamma
    (ledger D9).
    """

    num_envs = 1

    def __init__(self, params, sensitivity, limits, search, settings, weights, scale: float | None = None):
        self.scale = 1.0 if scale is None else scale
        self.params, self.sensitivity = np.asarray(params, dtype=np.float64), list(sensitivity)
        self.limits, self.search, self.settings, self.weights = limits, search, settings, weights
        self.obs_dim, self.total = 5 + 2 * len(self.sensitivity), self.params.sum()
        self.tiers = np.array([[TIERS[corrected_tier(tier, s)] for tier in range(len(TIERS))] for s in sensitivity])
        self.last_drop, self.last_retained, self.cycle = 0.0, 1.0, 1
        self.steps = 0

    def feedback(self, last_drop: float, last_retained: float, cycle: int) -> None:
        """delta_{c-1} and rho_{c-1} as measured, and the cycle c (from 1) that begins (§3.7 step 1)."""
        self.last_drop, self.last_retained, self.cycle = last_drop, last_retained, cycle

    def observation(self, targets, slot3: float, slot4: float) -> np.ndarray:
        """[1, 5 + 2 B]: feedback, progress, the two reused slots, then (s_i, rho*_i) per block."""
        head = [self.last_drop / 10, self.last_retained, (self.cycle - 1) / self.search.cycles, slot3, slot4]
        pairs = [v for pair in zip(self.sensitivity, targets) for v in pair]
        return np.array([head + pairs], dtype=np.float32)

    def reset(self) -> np.ndarray:
        """Start an episode: every target at 0.5, the global constraints in slots 3 and 4."""
        self.steps = 0
        return self.observation([0.5] * len(self.sensitivity), self.search.target, self.search.max_drop / 10)

    def step(self, actions):
        """Propose budgets for all blocks; returns the observation, reward and done, each with a leading 1."""
        pairs = _hla_pairs(actions[0], len(self.sensitivity))
        targets = self.tiers[np.arange(len(pairs)), pairs[:, 0]]  # those of decode_hla
        mean = float(self.params @ targets / self.total) * self.scale
        targets = targets.tolist()
        alpha, beta, gamma = self.weights
        r_bal, r_sens = balance_reward(targets), sensitivity_reward(targets, self.sensitivity)
        r_glob = global_reward(mean, self.search.target)
        r_dyn = dynamic_reward(mean, self.last_retained, self.last_drop, self.search.target, self.search.max_drop)
        reward = gamma * r_bal + alpha / 30 * (r_sens + r_dyn) + beta / 6 * r_glob
        self.steps += 1
        done = self.steps >= self.settings.episode
        scaled = [target * self.scale for target in targets]
        obs = self.reset() if done else self.observation(scaled, abs(mean - self.search.target),
                                                         (r_bal + r_sens + r_dyn) / 20)
        return obs, np.array([reward]), np.array([done]), {}


# ---------------------------------------------------------------------------------------------------------------
# Ensembles


class LLAEnsemble:
    """Low-level agents of one block, each with environments of its own, and their vote (§3.4.1)."""

    def __init__(self, index, block, sensitivity, estimator, config, blocks):
        shapes, s = kernel_shapes(block), config.lla
        penalty = 0.0 if config.sensitivity.method == "none" else 1.0
        self.config, self.shapes, self.index = config, shapes, index
        self.envs = [LLAEnv(index, shapes, sensitivity, estimator, config.compress, s, weights, blocks=blocks,
                            penalty_scale=penalty) for weights in zip(s.alpha, s.beta, s.gamma_s)]
        self.agents = [_agent(name, f"block {index}, agent {n}", env, lla_nvec(len(shapes)),
                              derive_seed(config.seed, "lla", index, n), *lla_hyper(s))
                       for n, (name, env) in enumerate(zip(s.algorithms, self.envs))]
        self.proposals: list[BlockConfig] = []  # what a search tries first
        self.rng = np.random.default_rng(derive_seed(config.seed, "null", index))

    def train(self, budget: LayerBudget, progress=None) -> list[dict]:
        """Give every agent its steps under ``budget``; returns the diagnostics of every update, agent by agent."""
        return train_together([self], [budget], progress)[0]

    def consensus(self) -> BlockConfig:
        """Each agent's greedy action from the reset observation, voted and decoded (Eq. 16)."""
        if self.config.search.method == "null":
            nvec = np.array(lla_nvec(len(self.shapes)))
            actions, weights = [self.rng.integers(nvec) for _ in self.agents], None
        else:
            actions = [agent.predict(env.reset(), deterministic=True)[0]
                       for agent, env in zip(self.agents, self.envs)]
            weights = None
            if self.config.vote == "confidence":
                weights = confidence_weights([agent.recent_rewards for agent in self.agents])
        action = mode_votes(actions) if self.config.vote == "mode" else vote_actions(actions, weights)
        return self.decoded(action)

    def decoded(self, action) -> BlockConfig:
        """What an action says under the block's budget; moved into it where lla.project says so."""
        budget = self.envs[0].budget
        if self.config.lla.project:
            numbers = action_numbers(budget.min_bits, budget.max_pruning, self.config.compress, self.shapes)
            params = np.array([shape.params for shape in self.shapes], dtype=np.float64)
            action = projected([action], numbers, params, budget.target)[0]
        return BlockConfig(decode_lla(action, budget, self.config.compress, self.shapes), self.shapes)

    def entropy(self, budget: LayerBudget) -> float:
        """Mean of the agents' entropies in the reset state under ``budget``, 1 = uniform (:func:`relative_entropy`)."""
        for env in self.envs:
            env.budget = budget
        return float(np.mean([relative_entropy(agent, env.first_observation()[None])
                              for agent, env in zip(self.agents, self.envs)]))

    def compared(self, consensus: BlockConfig, draws: int = COMPARED) -> dict:
        """Estimated drop in points and reward of the consensus, and their means over ``draws`` uniformly drawn actions:
        what the policies have learnt. Rewards are the agents' mean of Eq. 9 without R_stab; not evaluations of the
        search. None where a drop is not finite."""
        rng = np.random.default_rng(derive_seed(self.config.seed, "compare", self.index, self.agents[0].timesteps))
        nvec, env = np.array(lla_nvec(len(self.shapes))), self.envs[0]
        configs = [consensus, *(self.decoded(rng.integers(nvec)) for _ in range(draws))]
        drops = np.array(env.estimator.drops(self.index, configs))
        retained = np.array([config.retained for config in configs])
        penalty = env.penalty_scale * sensitivity_penalty(env.sensitivity, retained)
        rewards = np.mean([lla_reward(drops, retained, env.budget.target, penalty, [], own.weights)
                           for own in self.envs], axis=0)
        numbers = {"consensus_drop": drops[0], "random_drop": drops[1:].mean(),
                   "consensus_reward": rewards[0], "random_reward": rewards[1:].mean()}
        return {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}

    def visited(self) -> list[tuple[BlockConfig, float]]:
        """The front of the last search with the drops, the smallest first; empty unless lla.choose=visited."""
        if self.config.lla.choose != "visited":
            return []
        budget, limits = self.envs[0].budget, self.config.compress
        return [(BlockConfig(decode_lla(action.ravel(), budget, limits, self.shapes), self.shapes), drop)
                for action, _, drop in self.envs[0].visited.front]

    @property
    def bad_rewards(self) -> int:
        """Rewards so far that were not finite and became −10."""
        return sum(env.bad_rewards for env in self.envs)

    def state_dict(self) -> dict:
        """Agents, counters, the budget and the null controller's random state."""
        budget = self.envs[0].budget
        return {"agents": [agent.state_dict() for agent in self.agents], "rng": self.rng.bit_generator.state,
                "bad_rewards": [env.bad_rewards for env in self.envs], "budget": asdict(budget) if budget else None}

    def load_state_dict(self, state: dict) -> None:
        """Restores what :meth:`state_dict` returned."""
        for agent, env, saved, bad in zip(self.agents, self.envs, state["agents"], state["bad_rewards"]):
            agent.load_state_dict(saved)
            env.bad_rewards = bad
            env.budget = LayerBudget(**state["budget"]) if state["budget"] else None
        self.rng.bit_generator.state = state["rng"]


def train_together(ensembles, budgets, progress=None, timesteps=None, anew=True) -> list[list[dict]]:
    """Train the agents of several blocks in lockstep, each ensemble under its budget; returns what each
    :meth:`LLAEnsemble.train` would, to the last bit, whichever blocks are trained together.

    That pays with the surrogate active: all candidates of a step are one prediction. The proxy is asked block by block
    in any case. ``progress()`` is called once per agent, after the training. ``timesteps``: lla.timesteps unless given;
    ``anew``: whether what was visited before is forgotten.
    """
    for ensemble, budget in zip(ensembles, budgets):
        proposals = [encode_lla(proposal, budget, ensemble.config.compress) for proposal in ensemble.proposals]
        shared = Visited({action.tobytes(): action for action in proposals}.values())
        for n, (agent, env) in enumerate(zip(ensemble.agents, ensemble.envs)):
            env.budget = budget
            if anew:
                env.visited, env.costs = shared, []
            env.rng = np.random.default_rng(
                derive_seed(ensemble.config.seed, "refine", ensemble.index, n, agent.timesteps))
    learning = [ensemble for ensemble in ensembles if ensemble.config.search.method != "null"]
    agents = [agent for ensemble in learning for agent in ensemble.agents]
    updates: dict[int, list[dict]] = {}
    if agents:
        step = Lockstep([agent.env for agent in agents]).step
        learnt = learn_together(agents, timesteps or learning[0].config.lla.timesteps, step)
        updates = dict(zip(map(id, agents), learnt))
    if progress:
        for _ in (agent for ensemble in ensembles for agent in ensemble.agents):
            progress()
    return [[row for n, agent in enumerate(ensemble.agents)
             for row in _labelled(updates.get(id(agent), []), "LLA", n, agent, ensemble.index)]
            for ensemble in ensembles]


def least_drop(options, target: float, slots: int = 10_000) -> NetworkConfig:
    """One configuration per block, of those whose retained fraction over the network is at most ``target`` the one of
    the least sum of drops; the smallest there is where none meets it.

    options: per block a list of (BlockConfig, drop). By dynamic programming over the blocks; sizes are rounded up to
    ``slots`` parts of what is allowed, so that the target always holds and up to a part per block may be lost.
    """
    allowed = target * sum(block[0][0].params for block in options)
    best, paths = np.zeros(slots + 1), []  # the least drop of the blocks so far within so many parts
    for block in options:
        following, path = np.full(slots + 1, math.inf), np.zeros(slots + 1, dtype=np.int64)
        for n, (config, drop) in enumerate(block):
            parts = math.ceil(config.params * config.retained / allowed * slots - 1e-9)
            if parts <= slots:
                drops = best[:slots + 1 - parts] + drop
                better = drops < following[parts:]
                following[parts:][better], path[parts:][better] = drops[better], n
        best = following
        paths.append(path)
    if not math.isfinite(best[slots]):
        return NetworkConfig(tuple(min(block, key=lambda item: item[0].retained)[0] for block in options))
    chosen, left = [], slots
    for block, path in zip(reversed(options), reversed(paths)):
        config = block[path[left]][0]
        chosen.append(config)
        left -= math.ceil(config.params * config.retained / allowed * slots - 1e-9)
    return NetworkConfig(tuple(chosen[::-1]))


class HLAEnsemble:
    """High-level agents and their vote (§3.4.2)."""

    def __init__(self, params, sensitivity, config):
        s = config.hla
        self.config, self.sensitivity = config, list(sensitivity)
        self.envs = [HLAEnv(params, sensitivity, config.compress, config.search, s, weights, tier_scale(config))
                     for weights in zip(s.alpha, s.beta, s.gamma)]
        self.agents = [_agent(name, f"high-level agent {n}", env, hla_nvec(len(self.sensitivity)), config.seed + n,
                              HLA_PPO, HLA_A2C) for n, (name, env) in enumerate(zip(s.algorithms, self.envs))]
        self.rng = np.random.default_rng(derive_seed(config.seed, "null", "hla"))

    def feedback(self, last_drop: float, last_retained: float, cycle: int) -> None:
        """Tell every environment what the last cycle measured (§3.7 step 1)."""
        for env in self.envs:
            env.feedback(last_drop, last_retained, cycle)

    def train(self, timesteps: int) -> list[dict]:
        """Train every agent for ``timesteps`` steps; returns the diagnostics of every update, agent by agent."""
        if self.config.search.method != "hirelc":
            return []
        return [row for n, (agent, updates) in enumerate(zip(self.agents, learn_together(self.agents, timesteps)))
                for row in _labelled(updates, "HLA", n, agent, "")]

    def entropy(self) -> float:
        """Mean of the agents' entropies in the start state, 1 = uniform (:func:`relative_entropy`)."""
        return float(np.mean([relative_entropy(agent, env.reset()) for agent, env in zip(self.agents, self.envs)]))

    def budgets(self, deterministic: bool) -> tuple[LayerBudget, ...]:
        """Voted budgets from the start state; greedy proposals in the last cycle, drawn ones before (§3.7 step 3)."""
        method, blocks = self.config.search.method, len(self.sensitivity)
        if method not in ("hirelc", "null"):
            return uniform_budgets(blocks, self.config.search, self.config.compress)
        if method == "null":
            nvec = np.array(hla_nvec(blocks))
            actions = [self.rng.integers(nvec) for _ in self.agents]
        else:
            actions = [agent.predict(env.reset(), deterministic=deterministic)[0]
                       for agent, env in zip(self.agents, self.envs)]
        return vote_budgets([decode_hla(a, self.sensitivity, self.config.compress, tier_scale(self.config))
                             for a in actions])

    def state_dict(self) -> dict:
        """Agents, feedback and the null controller's random state."""
        env = self.envs[0]
        return {"agents": [agent.state_dict() for agent in self.agents], "rng": self.rng.bit_generator.state,
                "feedback": [env.last_drop, env.last_retained, env.cycle]}

    def load_state_dict(self, state: dict) -> None:
        """Restores what :meth:`state_dict` returned."""
        for agent, saved in zip(self.agents, state["agents"]):
            agent.load_state_dict(saved)
        self.feedback(*state["feedback"])
        self.rng.bit_generator.state = state["rng"]


def lla_hyper(settings) -> tuple[dict, dict]:
    """Hyperparameters of the low level's PPO and A2C under ``settings`` (config.LLA)."""
    changes = {"gamma": settings.gamma} | ({"n_steps": settings.rollout} if settings.rollout else {})
    return tuple({**hyper, **changes, "lr": hyper["lr"] * settings.lr_factor} for hyper in (LLA_PPO, LLA_A2C))


def _agent(algorithm, name, env, nvec, seed, ppo, a2c):
    kind, hyper = (PPO, ppo) if algorithm == "PPO" else (A2C, a2c)
    return kind(env, nvec, seed=seed, name=f"{algorithm} ({name})", **hyper)


def _labelled(updates, level, agent_index, agent, block):
    """Diagnostics of updates with who made them, as rows for updates.csv."""
    return [{"level": level, "block": block, "agent": agent_index, "algorithm": type(agent).__name__, **update}
            for update in updates]


# ---------------------------------------------------------------------------------------------------------------
# What is reported about a search


def relative_entropy(agent, obs) -> float:
    """Entropy of an agent's policy at one observation [1, d] ÷ that of the uniform policy, in [0, 1]."""
    with torch.no_grad():
        logits = agent.actor(torch.as_tensor(obs, dtype=torch.float32))
    actions = torch.zeros(1, len(agent.nvec), dtype=torch.int64)
    return categorical_stats(logits, agent.nvec, actions)[1].item() / math.fsum(map(math.log, agent.nvec))


def compliance(config: NetworkConfig, budgets) -> float:
    """Budget compliance in percent: mean_i (1 - |rho_i - rho*_i| / rho*_i) (Table 4)."""
    return 100.0 * float(np.mean([1 - abs(block.retained - b.target) / b.target
                                  for block, b in zip(config.blocks, budgets)]))


def random_config(shapes, limits, rng: np.random.Generator) -> NetworkConfig:
    """A random configuration for the surrogate's warm-up: bits in {4…8}, keep uniform in [0.6, 1] (§3.6).

    shapes: per block the kernels' KernelShape; all within what ``limits`` (config.Compress) allows.
    """
    low, high = max(4, limits.bits_min), min(8, limits.bits_max)
    blocks = []
    for block in shapes:
        kernels = tuple(KernelConfig(
            bits=int(rng.integers(min(low, high), high + 1)),
            keep=float(rng.uniform(max(0.6, 1 - limits.max_pruning) if shape.prunable else 1.0, 1.0)),
            qtype=QTYPES[rng.integers(len(QTYPES))] if limits.qtype == "any" else limits.qtype,
            granularity=(GRANULARITIES[rng.integers(len(GRANULARITIES))] if limits.granularity == "any"
                         else limits.granularity)) for shape in block)
        blocks.append(BlockConfig(kernels, tuple(block)))
    return NetworkConfig(tuple(blocks))


def null_controller(shapes, sensitivity, config, draws: int = 200) -> dict:
    """CR and compliance of a controller that draws every action uniformly and votes as the ensembles do (§11).

    shapes: per block a tuple of KernelShape. Returns means and standard deviations over ``draws`` policies. No
    network is evaluated: both figures follow from the configuration alone.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "null"))
    blocks, crs, compliances = len(shapes), [], []
    agents, nvec = len(config.lla.algorithms), np.array(hla_nvec(blocks))
    for _ in range(draws):
        if config.search.method not in ("hirelc", "null"):
            budgets = uniform_budgets(blocks, config.search, config.compress)
        else:
            budgets = vote_budgets([decode_hla(rng.integers(nvec), sensitivity, config.compress, tier_scale(config))
                                    for _ in config.hla.algorithms])
        drawn = NetworkConfig(tuple(
            BlockConfig(decode_lla(vote_actions(rng.integers(lla_nvec(len(block)), size=(agents, 4 * len(block)))),
                                   budget, config.compress, block), tuple(block))
            for block, budget in zip(shapes, budgets)))
        crs.append(drawn.cr)
        compliances.append(compliance(drawn, budgets))
    return {"draws": draws, "cr_mean": float(np.mean(crs)), "cr_std": float(np.std(crs)),
            "compliance_mean": float(np.mean(compliances)), "compliance_std": float(np.std(compliances))}
