"""Estimates of the accuracy drop that a candidate configuration of one block causes (paper §3.6).

The proxy asks the network: how far do the logits move (Eq. 23)? The surrogate is an MLP that predicts the accuracy
after fine-tuning from the configuration alone (Eq. 24), once it has a few measured pairs to learn from. Drops and
accuracies are in percentage points.
"""

import math
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import BlockConfig, KernelConfig, NetworkConfig, compress_kernel, eval_mode, to_eval
from models import stages
from support.kernels import swapped

WORST = 50.0  # points, the largest drop that the proxy gives
UNKNOWN_KERNEL = [0.8, 1.0, 0.0, 0.0, 0.5]  # features of a kernel that has no consensus yet (ledger D10)
GRANULARITY_FEATURE = {"uniform": 0.0, "log": 0.33, "log-script": 0.33, "per-channel": 0.67, "learned": 1.0,
                       "fitted": 1.0}


# --- Logit-MSE proxy -------------------------------------------------------------------------------------------
def proxy_drop(mse: float, unit: float = 1.0, worst: float = WORST) -> float:
    """Return the drop in points for a logit MSE in parts of ``unit``: min(20 MSE, 50) (Eq. 23), or another ``worst``
    in place of 50; not finite where the MSE is not."""
    return min(20.0 * mse / unit, worst) if math.isfinite(mse) else mse


def chain(links, state: Tensor) -> Tensor:
    """Return what stages, one after the other, make of what enters the first."""
    for stage in links:
        state = stage.run(state)
    return state


class Proxy:
    """Logit-MSE proxy (Eq. 23): how far compressing one block moves the logits of theta_0.

    ``batches``: list of images [n, 3, H, W] on the network's device, drawn and augmented once per run. The network
    holds theta_0 whenever :meth:`drops` is called and afterwards; a candidate's weights are put in their places, so
    that all other blocks are at theta_0 (ledger D17).

    A candidate begins at the first stage that holds one of its kernels. What enters that stage is the same for all
    candidates of the block; it is computed once and kept until another block is asked for.

    ``relative``: drops are told per unit of the variance of theta_0's logits. Eq. 23 takes the MSE as it is: where the
    logits are large nearly every candidate has a drop of more than ten points, at which R_acc is 0 (docs/LEDGER.md).
    """

    def __init__(self, model: nn.Module, blocks, batches, relative: bool = False):
        self.model, self.blocks, self.batches, self.relative = model, blocks, list(batches), relative
        self.stages = tuple(stages(model))
        self.reference: list[Tensor] = []  # theta_0's logits, per batch
        self.block: int | None = None  # whose inputs are kept
        self.links = ()  # the stages from the block's first on
        self.inputs: list[Tensor] = []  # what enters them, per batch

    def drops(self, index: int, configs, worst: float = WORST) -> list[float]:
        """Estimate the drop in points, at most ``worst``, of each candidate configuration of block ``index``."""
        return [proxy_drop(mse, self.unit, worst) for mse in self.errors(index, configs)]

    @cached_property
    def unit(self) -> float:
        """The logit MSE of 20 points: 1, or with ``relative`` the variance of an image's logits, mean over images."""
        if not self.relative:
            return 1.0
        self.errors(None, [])  # computes theta_0's logits where nothing has yet
        return max(torch.cat(self.reference).float().var(1, correction=0).mean().item(), 1e-12)

    @torch.no_grad()
    def errors(self, index: int | None, configs) -> list[float]:
        """Return the logit MSE of each candidate: a BlockConfig of block ``index``, or with None a NetworkConfig."""
        with eval_mode(self.model):
            if not self.reference:
                self.reference = [chain(self.stages, batch.clone()) for batch in self.batches]
            self._enter(index)
            blocks = self.blocks if index is None else [self.blocks[index]]
            errors = [self._errors(blocks, config) for config in configs]
            to_eval(self.model)
        rows = torch.stack(errors).tolist() if errors else []  # one transfer for all, because a GPU waits for each
        return [sum(row) / len(row) for row in rows]

    def check(self, chosen: NetworkConfig) -> None:
        """Return None: there is nothing to compare the proxy with (a table of estimates has)."""

    def _enter(self, index):
        """Keep what enters the first stage of block ``index`` (None: the images), instead of that of another block."""
        if index is None:
            self.block, self.links, self.inputs = None, self.stages, self.batches
        elif index != self.block:
            self.block, self.inputs = None, []  # releases the memory first
            weights = [holder.weight for holder in self.blocks[index].kernels.values()]
            first = next(n for n, stage in enumerate(self.stages) if stage.holds(weights))
            self.inputs = [chain(self.stages[:first], batch) for batch in self.batches]
            self.block, self.links = index, self.stages[first:]

    def _errors(self, blocks, config):
        """Mean squared logit error of one candidate, [batches]; ``config``: of the one block, or of the network."""
        weights, errors = {}, []
        for block, chosen in zip(blocks, getattr(config, "blocks", [config])):
            weights |= block.replaced(compress_kernel(holder.weight, kernel)[0]
                                      for holder, kernel in zip(block.kernels.values(), chosen.kernels))
        with swapped(self.model, weights):
            to_eval(self.model)  # some networks compute something from their weights on the way
            for state, reference in zip(self.inputs, self.reference):
                if len(self.links) == len(self.stages):
                    state = state.clone()  # a user's network may write into its images
                errors.append(F.mse_loss(chain(self.links, state).float(), reference.float()))
        return torch.stack(errors)


# --- Surrogate -------------------------------------------------------------------------------------------------
def kernel_features(config: KernelConfig) -> list[float]:
    """Return the surrogate's five numbers per kernel: bits / 10, keep, type, granularity, joint indicator (§3.6)."""
    return [config.bits / 10, config.keep, float(config.qtype == "FLOAT"), GRANULARITY_FEATURE[config.granularity],
            1.0 if config.keep < 1 and config.bits < 8 else 0.5]


def block_features(config: BlockConfig) -> list[float]:
    """Return the features of all kernels of a block, 5 K_i numbers."""
    return [value for kernel in config.kernels for value in kernel_features(kernel)]


class Surrogate:
    """MLP 5 sum K_i → 64 → 32 → 1 that predicts the accuracy after fine-tuning, and its buffer (§3.6, Eq. 24).

    ReLU, dropout 0.3 in training, sigmoid × 100. ``inputs``: 5 sum K_i; ``settings``: config.Surrogate. It is active
    once the buffer holds ``min_samples`` pairs. Its random numbers are its own: torch's generator stays as it is.
    """

    def __init__(self, inputs: int, settings, seed: int):
        self.settings = settings
        self.random_state = torch.Generator().manual_seed(seed).get_state()
        with self._random_numbers():
            self.layers = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 32), nn.ReLU(),
                                        nn.Dropout(0.3), nn.Linear(32, 1), nn.Sigmoid()).eval()
        self.buffer: list[tuple[list[float], float]] = []  # features of a network, accuracy in points

    @property
    def active(self) -> bool:
        """Whether it replaces the proxy."""
        return self.settings.enabled and len(self.buffer) >= self.settings.min_samples

    def add(self, config: NetworkConfig, acc: float) -> None:
        """Add a measured pair (C, accuracy after fine-tuning)."""
        self.buffer.append((block_features(config.joined), acc))

    @torch.no_grad()
    def predict(self, features) -> list[float]:
        """Predict accuracies in points; features [n, 5 sum K_i]."""
        return self._accuracies(torch.as_tensor(features, dtype=torch.float32)).tolist()

    def train(self, epochs: int) -> float:
        """Fit the buffer by MSE (Eq. 24), keep the epoch of the lowest loss over the buffer, and return that loss; nan,
        and nothing done, while it is not active. Raises FloatingPointError where no loss is finite."""
        if not self.active:
            return math.nan
        x, y = (torch.tensor(column) for column in zip(*self.buffer))
        s = self.settings
        optimizer = torch.optim.Adam(self.layers.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        best_loss, best = math.inf, None
        with self._random_numbers():
            for _ in range(epochs):
                self.layers.train()
                for index in torch.randperm(len(y)).split(s.batch_size):
                    optimizer.zero_grad()
                    F.mse_loss(self._accuracies(x[index]), y[index]).backward()
                    optimizer.step()
                self.layers.eval()
                with torch.no_grad():
                    loss = F.mse_loss(self._accuracies(x), y).item()
                if loss < best_loss:
                    best_loss, best = loss, {name: value.clone() for name, value in self.layers.state_dict().items()}
        if best is None:
            raise FloatingPointError("surrogate: the loss is not finite; lower surrogate.lr")
        self.layers.load_state_dict(best)
        return best_loss

    def _accuracies(self, x):  # [n, inputs] → [n]
        return 100 * self.layers(x).squeeze(1)

    @contextmanager
    def _random_numbers(self):
        """Inside, torch's generator goes on from this surrogate's state, which is kept for the next time."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random_state)
            yield
            self.random_state = torch.get_rng_state()

    def state_dict(self) -> dict:
        """Return weights, buffer and random state."""
        return {"layers": {name: value.clone() for name, value in self.layers.state_dict().items()},
                "buffer": [[list(features), acc] for features, acc in self.buffer],
                "random_state": self.random_state.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.layers.load_state_dict(state["layers"])
        self.buffer = [(list(features), acc) for features, acc in state["buffer"]]
        self.random_state = state["random_state"]


# --- Which estimate the agents are told ------------------------------------------------------------------------
class DropEstimator:
    """The drop that an LLA is told: the surrogate's once it is active, the proxy's before (§3.6).

    ``proxy``: a Proxy, or what has its interface (evidence.table.EstimateTable); ``baseline_acc``: of theta_0, in
    points. In a surrogate query the other blocks carry their latest consensus, or UNKNOWN_KERNEL while they have none
    (ledger D10)."""

    def __init__(self, proxy: Proxy, surrogate: Surrogate, baseline_acc: float):
        self.proxy, self.surrogate, self.baseline_acc = proxy, surrogate, baseline_acc
        self.consensus: list[BlockConfig | None] = [None] * len(proxy.blocks)  # latest, per block
        self.evaluations = 0  # candidates estimated so far

    @property
    def surrogate_active(self) -> bool:
        """Whether estimates come from the surrogate."""
        return self.surrogate.active

    def drops(self, index: int, configs) -> list[float]:
        """Estimate the drops in points of candidate configurations of block ``index``."""
        self.evaluations += len(configs)
        if not self.surrogate_active:
            return self.proxy.drops(index, configs)
        parts = [block_features(chosen) if chosen else UNKNOWN_KERNEL * len(block.kernels)
                 for chosen, block in zip(self.consensus, self.proxy.blocks)]
        rows = [sum([*parts[:index], block_features(config), *parts[index + 1:]], []) for config in configs]
        return [self.baseline_acc - acc for acc in self.surrogate.predict(rows)]

    def settle(self, chosen: NetworkConfig) -> dict | None:
        """Take the configuration of a cycle as the blocks' consensus; return how good a table of estimates is there."""
        self.consensus = list(chosen.blocks)
        return self.proxy.check(chosen)
