"""Training, evaluation and block sensitivity (paper §3.3, §3.5, §3.7).

Sets of images are objects with ``len()``, ``batch(indices, device)`` and ``batches(batch_size, device, generator=None,
limit=0)``, as :class:`data.Images`: with a generator shuffled and augmented, without one in stored order. Accuracies
are in percentage points.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import eval_mode, mask_factors, set_state
from models import block_parameters
from support.ranks import Ranks

SCALE_LR_FACTOR = 20.0  # a learned scale's logarithm moves by up to this many learning rates per step


def device_of(model: nn.Module) -> torch.device:
    """Return where the network's parameters live."""
    return next(model.parameters()).device


@torch.no_grad()
def correct(model: nn.Module, images, batch_size: int = 256, limit: int = 0, progress=None,
            ranks: Ranks = Ranks()) -> Tensor:
    """Return which of the first ``limit`` (0 = all) images the network classifies correctly: bool [n] on the CPU.

    Runs in eval mode and puts the modes back as they were, so that the next training epoch trains (ledger D20).
    Several processes divide the images, and each gets the whole answer.
    """
    device, total = device_of(model), min(limit, len(images)) if limit else len(images)
    mine = ranks.part(torch.arange(total))
    batches = images.batches(batch_size, device, limit=limit) if ranks.size == 1 else (
        images.batch(index, device) for index in mine.split(batch_size))
    hits, done = [torch.zeros(0, dtype=torch.bool)], 0
    with eval_mode(model):
        for x, y in batches:
            hits.append((model(x).argmax(dim=1) == y).cpu())
            done += len(y)
            if progress:
                progress("evaluation", done * ranks.size, total)
    answer = torch.zeros(total, dtype=torch.bool)
    for rank, part in enumerate(ranks.gather(torch.cat(hits))):
        answer[rank::ranks.size] = part
    return answer


def accuracy(hits: Tensor) -> float:
    """Return the share of hits in percentage points."""
    return 100.0 * int(hits.sum()) / len(hits)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""
    lr_setting: str  # the setting that ``lr`` comes from, for messages
    epochs: int
    lr: float  # AdamW learning rate at the start
    weight_decay: float
    patience: int = 0  # epochs without a better accuracy before training ends; 0 = never early
    warmup_epochs: float = 0.0
    keep: str = "best"  # epoch: the most accurate, or the "last"

    def rate(self, epoch: int, fraction: float) -> float:
        """Return the learning rate in epoch ``epoch`` (from 0) after ``fraction`` of its batches.

        Without a warm-up it is constant within an epoch, lr (1 + cos(pi epoch / epochs)) / 2; with one it rises
        linearly and then follows the cosine step by step.
        """
        if not self.warmup_epochs:
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        position = epoch + fraction
        if position < self.warmup_epochs:
            return self.lr * (position + 0.01) / (self.warmup_epochs + 0.01)
        decay = max(self.epochs - self.warmup_epochs, 1e-9)
        return self.lr * (1 + math.cos(math.pi * min((position - self.warmup_epochs) / decay, 1.0))) / 2


@dataclass(frozen=True)
class Epoch:
    """One training epoch: its number from 1, mean training loss, learning rate at its start, accuracy after it."""
    epoch: int
    loss: float
    lr: float
    acc: float


class _WithScales(nn.Module):
    """The network in training and the learned scales as one module, so that several processes average both."""

    def __init__(self, model, on_grid):
        super().__init__()
        self.model = model
        self.scales = nn.ParameterList(on_grid.log_scales.values() if on_grid is not None else ())

    def forward(self, x):
        return self.model(x)


class Trainer:
    """AdamW with a cosine schedule, early stopping, masks, and the best epoch kept (§3.5, §3.7 step 7).

    Per epoch, in train mode: every batch takes a step, in which the gradients of pruned rows are 0, so that these, 0
    from the start, stay 0 as if they were zeroed again after it, and AdamW's moments of them as well; then the accuracy
    on the first ``eval_images`` images of ``choice`` is measured. The state before the first epoch is not a candidate.
    With ``on_grid``, a ``deploy.qat.GridTraining``, the network computes with grid values everywhere, the best epoch's
    weights are those, and ``best_grids`` are their grids. Several ``ranks`` divide each batch, their gradients are
    averaged, BatchNorm's statistics are the first one's; with ``unused_parameters`` some may have no gradient.
    ``half``: a training step's forward pass under bfloat16 autocast; accuracies are always measured in float32.
    ``generator`` draws order and augmentation, and seeds dropout. With ``recipe.keep="last"`` the best is the last.
    ``loss(logits, y, x)``: mean over a batch; the cross-entropy unless given.
    """

    def __init__(self, model, train, choice, recipe: Recipe, *, batch_size, eval_images, eval_batch_size, generator,
                 blocks=None, masks=None, on_grid=None, ranks=Ranks(), unused_parameters=False, half=False,
                 loss=lambda logits, y, x: F.cross_entropy(logits, y)):
        self.model, self.train_set, self.choice_set, self.recipe = model, train, choice, recipe
        self.batch_size, self.eval_images, self.eval_batch_size = batch_size, eval_images, eval_batch_size
        self.generator, self.half, self.on_grid, self.ranks, self.loss = generator, half, on_grid, ranks, loss
        self.factors = [] if masks is None else mask_factors(blocks, masks)
        self.parallel = ranks.wrap(_WithScales(model, on_grid), unused_parameters)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay,
                                           fused=True)
        if on_grid is not None and on_grid.log_scales:
            self.optimizer.add_param_group({"params": list(on_grid.log_scales.values()), "weight_decay": 0.0,
                                            "lr_factor": SCALE_LR_FACTOR})
        self.history: list[Epoch] = []
        self.best_state: dict[str, Tensor] = {}
        self.best_grids = None

    @property
    def best(self) -> Epoch:
        """The epoch that is kept: that of the highest accuracy, the first of equals; or the last."""
        return max(self.history, key=lambda e: e.epoch if self.recipe.keep == "last" else (e.acc, -e.epoch))

    @property
    def finished(self) -> bool:
        """Whether the epoch limit is reached or the patience used up."""
        done, patience = len(self.history), self.recipe.patience
        return done >= self.recipe.epochs or bool(done and patience and done - self.best.epoch >= patience)

    def run(self, progress=None, what="training", log=None, checkpoint=None) -> Epoch:
        """Train to the end, leave the network at its best epoch in eval mode, and return that epoch.

        ``checkpoint``: has ``load()``, which returns a state of this training to go on from, or None, and
        ``save(state)``, called after every epoch. Raises FloatingPointError where the loss of an epoch is not finite.
        """
        if checkpoint and (state := checkpoint.load()) is not None:
            self.load_state_dict(state)
        while not self.finished:
            e = self.run_epoch(progress, what)
            if log:
                log(f"  {what}: epoch {e.epoch}, loss {e.loss:.4f}, lr {e.lr:.2e}, accuracy {e.acc:.2f}")
            if checkpoint and not self.finished:  # the end is the phase's to store
                checkpoint.save(self.state_dict())
        self.model.train()  # through train(): see eval_mode
        set_state(self.model, self.best_state)
        self.model.eval()
        return self.best

    def run_epoch(self, progress=None, what="training") -> Epoch:
        """Train one epoch and measure it.

        Where batches are larger, a last one without two images per process is left out: BatchNorm needs two.
        """
        epoch, device = len(self.history), device_of(self.model)
        steps = math.ceil(len(self.train_set) / self.batch_size)
        total_loss, seen = torch.zeros((), dtype=torch.float64, device=device), 0
        self.model.train()
        # Dropout draws from the global generators: they start each epoch from this trainer's seed, and are put back.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.generator.initial_seed() + epoch)
            for step, (x, y) in enumerate(self.train_set.batches(self.batch_size, device, generator=self.generator)):
                if len(y) < 2 * self.ranks.size and step and self.batch_size > 1:
                    continue
                for group in self.optimizer.param_groups:
                    group["lr"] = self.recipe.rate(epoch, step / steps) * group.get("lr_factor", 1.0)
                loss = self.step(self.ranks.part(x), self.ranks.part(y), len(y))
                first = loss if step == 0 else first
                total_loss += loss
                seen += len(y)
                if progress:
                    progress(f"{what}, epoch {epoch + 1} of {self.recipe.epochs}", step + 1, steps)
        self.ranks.same_tensors(self.model.buffers())
        mean_loss = self.ranks.total(total_loss).item() / seen
        # Looked at once per epoch: after a loss that is not finite every later one is not, either.
        if not (math.isfinite(mean_loss) and all(p.isfinite().all() for p in self.model.parameters())):
            if epoch == 0 and not math.isfinite(self.ranks.total(first).item()):
                raise FloatingPointError(f"{what}: the loss is not finite before the first step: the network's logits "
                                         "overflow, or it divides by channels that are pruned (compress.max_pruning=0)")
            raise FloatingPointError(f"{what}: the loss of epoch {epoch + 1} is not finite; lower "
                                     f"{self.recipe.lr_setting} ({self.recipe.lr:g})")
        with self.on_grid.in_place() if self.on_grid is not None else contextlib.nullcontext() as grids:
            acc = accuracy(correct(self.model, self.choice_set, self.eval_batch_size, self.eval_images,
                                   ranks=self.ranks))
            result = Epoch(epoch + 1, mean_loss, self.recipe.rate(epoch, 0.0), acc)
            self.history.append(result)
            if self.best is result:
                self.best_state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
                self.best_grids = grids
        return result

    def step(self, x, y, whole: int) -> Tensor:
        """Take one step on this process's part of a batch of ``whole`` images; return its share of the summed loss."""
        with self.on_grid.swapped(self.model) if self.on_grid is not None else contextlib.nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
                logits = self.parallel(x.clone())  # a network may write into its images
            # DistributedDataParallel averages over the processes; the factor makes it the mean over the whole batch.
            loss = self.loss(logits.float() if self.half else logits, y, x) * (len(y) * self.ranks.size / whole)
            self.optimizer.zero_grad(set_to_none=True)
            if loss.requires_grad:  # not where every parameter is frozen
                loss.backward()
                for weight, factor in self.factors:  # pruned rows stay at 0 (§3.5.1, ledger D13)
                    if weight.grad is not None:
                        weight.grad.mul_(factor)
                self.optimizer.step()
        return loss.detach() * (whole / self.ranks.size)

    def state_dict(self) -> dict:
        """Return what :meth:`load_state_dict` goes on from after an epoch."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(), "history": list(self.history),
                "best_state": self.best_state, "best_grids": self.best_grids,
                "scales": {} if self.on_grid is None else {k: v.detach() for k, v in self.on_grid.log_scales.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned, on a Trainer made with the same arguments."""
        set_state(self.model, state["model"])
        for name, scale in state["scales"].items():
            self.on_grid.log_scales[name].copy_(scale)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.history, self.best_state = list(state["history"]), state["best_state"]
        self.best_grids = state["best_grids"]


def block_fisher(model: nn.Module, blocks, images: Tensor, labels: Tensor) -> list[float]:
    """Return the empirical Fisher information of every block, not normalised (Eq. 14-15, before the division).

    images [N, C, H, W], labels [N]. F_j = (1/N) sum_n (d loss_n / d theta_j)^2 with the cross-entropy of *one*
    image each, in eval mode; a block's value is the sum over ``block.parameters``. The script squares the gradient
    of the batch mean instead, which is another quantity (ledger D4). The network is left as it was.
    """
    totals = np.zeros(len(blocks))
    with block_parameters(model, blocks) as (parameters, owner):
        # One backward pass per image. Vectorising over images (vmap) in chunks of 8 holds eight copies of every
        # gradient and took 3.5 times as long on a CPU for ResNet18 and DeiT-Small at 64 px.
        for x, y in zip(images, labels):
            loss = F.cross_entropy(model(x[None].clone()), y[None])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            totals += np.bincount(owner, [0.0 if g is None else g.double().square().sum().item() for g in gradients])
    return (totals / len(images)).tolist()


def max_normalised(values, what: str) -> list[float]:
    """Return values / the largest, a negative one as 0; ones where none is above 0. FloatingPointError: not finite."""
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"{what} is not finite: the network's loss or gradients overflow")
    largest = max(values)
    return [max(value, 0.0) / largest for value in values] if largest > 0 else [1.0] * len(values)


def fisher_sensitivity(model: nn.Module, blocks, images: Tensor, labels: Tensor) -> list[float]:
    """Return s_i in [0, 1]: the Fisher information of each block, as :func:`max_normalised` divides it (Eq. 15)."""
    return max_normalised(block_fisher(model, blocks, images, labels), "the Fisher information")
