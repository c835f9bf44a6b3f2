"""Training, evaluation and block sensitivity (paper §3.3, §3.5, §3.7).

Sets of images are objects with ``len()`` and ``batches(batch_size, device, generator=None, limit=0)``, as
:class:`data.Images`: with a generator shuffled and augmented, without one in stored order. Accuracies are in
percentage points.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from compress import apply_factors, apply_masks, eval_mode, mask_factors
from support.ranks import Ranks
from deploy.qat import coded, decoded, plain_grids, read_grids
from support.state import Progress, random_states, set_random_states


def device_of(model: nn.Module) -> torch.device:
    """Where the network's parameters live."""
    return next(model.parameters()).device


@torch.no_grad()
def correct(model: nn.Module, images, batch_size: int = 256, limit: int = 0, progress=None, ranks: Ranks = Ranks(),
            state: Progress = Progress(), what: str = "evaluation") -> Tensor:
    """Which of the first ``limit`` (0 = all) images the network classifies rightly: bool [n] on the CPU.

    Runs in eval mode and puts the modes back as they were, so that the next training epoch trains (ledger D20).
    Several ranks share the batches, each has the whole answer. Batches that ``state`` knows from before the run was broken
    off, by the name ``what``, are not computed again. One that a GPU's memory does not hold is taken in two halves.
    """
    device = device_of(model)
    total = min(limit, len(images)) if limit else len(images)
    mine = ranks.part(torch.arange(total))
    batches = iter(images.batches(batch_size, device, limit=limit) if ranks.size == 1 else
                   (images.batch(index, device) for index in mine.split(batch_size)))
    hits, taken, done = [], 0, 0

    def following():
        nonlocal taken
        for x, y in batches:
            taken += 1
            if taken > len(hits):
                return _hits(model, x, y, state)

    with eval_mode(model):
        while done < len(mine) and (part := state.once(what, following)) is not None:
            hits.append(part)
            done += len(part)
            if progress:
                progress("evaluation", done * ranks.size, total)
    answer = torch.zeros(total, dtype=torch.bool)
    for rank, part in enumerate(ranks.gather(torch.cat(hits) if hits else torch.zeros(0, dtype=torch.bool))):
        answer[rank::ranks.size] = part
    return answer


def _hits(model, x, y, state):
    """Hits of one batch, in two halves, and so on, where it does not fit into the memory of a GPU."""
    try:
        return (model(x).argmax(dim=1) == y).cpu()
    except torch.OutOfMemoryError:
        if len(y) == 1:
            raise
    half = (len(y) + 1) // 2
    state.note(f"an evaluation batch of {len(y)} images does not fit into the GPU's memory and was halved; "
               "lower eval.batch_size")
    return torch.cat([_hits(model, *part, state) for part in zip(x.split(half), y.split(half))])


def accuracy(hits: Tensor) -> float:
    """Share of hits in percentage points."""
    return 100.0 * int(hits.sum()) / len(hits)


class TooLarge(RuntimeError):
    """A GPU's memory does not hold what a setting asks for."""


SCALE_LR_FACTOR = 20.0  # a learned scale's logarithm moves by up to this many learning rates per step


@dataclass(frozen=True)
class Epoch:
    """One training epoch: its number from 1, mean training loss, learning rate at its start, accuracy after it."""
    epoch: int
    loss: float
    lr: float
    acc: float


class _Logits(nn.Module):
    """The network as it computes in training: as it is, or with the grid values of its kernels."""

    def __init__(self, model, on_grid):
        super().__init__()
        self.model, self.on_grid = model, on_grid
        self.scales = nn.ParameterList(on_grid.log_scales.values() if on_grid is not None else ())

    def forward(self, x):
        if self.on_grid is None:
            return self.model(x)
        return functional_call(self.model, self.on_grid.weights(), (x,), tie_weights=False)


class Trainer:
    """AdamW with a cosine schedule, early stopping, masks, and the best epoch kept (§3.5, §3.7 step 7).

    Per epoch, in train mode: every batch takes a step, in which the gradients of pruned rows are 0, so that these stay
    0 as if they were zeroed again after it, and AdamW's moments of them as well; then the accuracy on the first
    ``eval_images`` test images is measured. Training ends after ``epochs`` epochs, or when
    ``patience`` epochs in a row brought no better accuracy (0 = never early). The state before the first epoch is
    not a candidate. With ``warmup_epochs`` = 0 the learning rate is constant within an epoch, as in
    lr * (1 + cos(pi * epoch / epochs)) / 2; with a warm-up it rises linearly and then follows the cosine step by
    step. With ``on_grid``, a ``qat.GridTraining``, the network computes with grid values everywhere, the best epoch's
    weights are those, and ``best_grids`` are their grids. Several ``ranks`` divide each batch, their gradients are
    averaged, BatchNorm's statistics are rank 0's; with ``unused_parameters`` some may have no gradient. ``half``: the
    forward pass of a training step under bfloat16 autocast; accuracies are always measured in float32.
    """

    def __init__(self, model, train, test, *, epochs, lr, weight_decay, patience, batch_size, eval_images,
                 eval_batch_size, generator, blocks=None, masks=None, warmup_epochs=0.0, on_grid=None,
                 ranks=Ranks(), unused_parameters=False, half=False):
        self.model, self.train_set, self.test_set = model, train, test
        self.epochs, self.lr, self.patience, self.warmup_epochs = epochs, lr, patience, warmup_epochs
        self.batch_size, self.eval_images, self.eval_batch_size = batch_size, eval_images, eval_batch_size
        self.generator, self.half = generator, half
        self.masks, self.factors = masks, None if masks is None else mask_factors(blocks, masks)
        if masks is not None:
            apply_masks(blocks, masks)
        self.on_grid, self.best_grids, self.ranks = on_grid, None, ranks
        self.parallel = ranks.wrap(_Logits(model, on_grid), unused_parameters)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        if on_grid is not None and on_grid.log_scales:
            self.optimizer.add_param_group({"params": list(on_grid.log_scales.values()), "weight_decay": 0.0,
                                            "lr_factor": SCALE_LR_FACTOR})
        self.history: list[Epoch] = []
        self.best_state: dict[str, Tensor] = {}

        self.progress = Progress()  # of the run that this training belongs to
        self.at = None  # within an epoch: steps done, sums, the data's generator as the epoch found it
        self.skipped = 0  # steps not taken because loss or gradient was not finite

    @property
    def best(self) -> Epoch:
        """The epoch of the highest accuracy, the first of equals."""
        return max(self.history, key=lambda e: (e.acc, -e.epoch))

    @property
    def finished(self) -> bool:
        """Whether the epoch limit is reached or the patience used up."""
        done = len(self.history)
        return done >= self.epochs or bool(done and self.patience and done - self.best.epoch >= self.patience)

    def rate(self, epoch: int, fraction: float) -> float:
        """Learning rate in epoch ``epoch`` (from 0) after ``fraction`` of its batches."""
        if not self.warmup_epochs:
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        position = epoch + fraction
        if position < self.warmup_epochs:
            return self.lr * (position + 0.01) / (self.warmup_epochs + 0.01)
        left = max(self.epochs - self.warmup_epochs, 1e-9)
        return self.lr * (1 + math.cos(math.pi * min((position - self.warmup_epochs) / left, 1.0))) / 2

    def run_epoch(self, progress=None, what="training") -> Epoch:
        """Trains one epoch and measures it. A step whose loss or gradient is not finite is not taken, and counted; raises
        FloatingPointError when none is left, TooLarge when a GPU cannot hold a batch.

        A last batch of a single image is left out where batches are larger: BatchNorm has no statistics of one.
        """
        epoch, device = len(self.history), device_of(self.model)
        steps = math.ceil(len(self.train_set) / self.batch_size)
        broken_off, at = self.at, self.at or {"step": 0, "loss": 0.0, "seen": 0, "skipped": 0,
                                              "order": self.generator.get_state()}
        self.at, total_loss = at, torch.tensor(at["loss"], dtype=torch.float64, device=device)
        self.model.train()
        # Dropout draws from the global generators: they start each epoch from this trainer's seed, and are put back.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.generator.initial_seed() + epoch)
            self.generator.set_state(at["order"])
            batches = self.train_set.batches(self.batch_size, device, generator=self.generator)
            for step, (x, y) in enumerate(batches):
                if step < at["step"]:
                    continue  # taken before the run was broken off
                if broken_off:
                    set_random_states(broken_off["random"])
                    broken_off = None
                if len(y) >= 2 * self.ranks.size or not step or self.batch_size == 1:
                    for group in self.optimizer.param_groups:
                        group["lr"] = self.rate(epoch, step / steps) * group.get("lr_factor", 1.0)
                    loss = self._step(self.ranks.part(x), self.ranks.part(y), len(y), what)
                    if loss is not None:
                        total_loss += loss
                        at["seen"] += len(y)
                    if progress:
                        progress(f"{what}, epoch {epoch + 1} of {self.epochs}", step + 1, steps)
                at["step"], at["loss"] = step + 1, total_loss
                self.progress.tick()
        self.ranks.same_tensors(self.model.buffers())
        self.skipped += at["skipped"]
        if at["skipped"]:
            self.progress.note(f"{what}, epoch {epoch + 1}: {at['skipped']} of {steps} steps were not taken, their loss "
                               "or gradient was not finite")
        if not at["seen"] or not all(p.isfinite().all() for p in self.model.parameters()):
            self.ranks.agree(FloatingPointError(
                f"{what}: epoch {epoch + 1} has no step with a finite loss and gradient; lower the learning rate "
                f"({self.lr:g}), or look for images that are not finite"))  # the same on all ranks
        mean_loss = self.ranks.total(total_loss.clone()).item() / at["seen"]
        with self.on_grid.in_place() if self.on_grid is not None else contextlib.nullcontext() as grids:
            acc = accuracy(correct(self.model, self.test_set, self.eval_batch_size, self.eval_images,
                                   ranks=self.ranks, state=self.progress, what=f"{what}, epoch {epoch + 1}"))
            result = Epoch(epoch + 1, mean_loss, self.rate(epoch, 0.0), acc)
            self.history.append(result)
            if self.best is result:
                self.best_state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
                self.best_grids = grids
        self.at = None
        self.progress.tick(epoch=True)
        return result

    def _step(self, x, y, whole, what):
        """One step on this rank's part of a batch of ``whole`` images; its share of the batch's summed loss, or None
        where loss or gradient was not finite: then nothing has changed."""
        device = x.device.type
        kept = [buffer.clone() for buffer in self.model.buffers()]  # a bad batch spoils BatchNorm's statistics, too
        try:
            with torch.autocast(device, torch.bfloat16, enabled=self.half):
                logits = self.parallel(x)
            # DistributedDataParallel averages over the ranks; this makes it the mean over the whole batch.
            loss = F.cross_entropy(logits.float() if self.half else logits, y) * (len(y) * self.ranks.size / whole)
            self.optimizer.zero_grad(set_to_none=True)
            if loss.requires_grad:  # not where every parameter is frozen
                loss.backward()
        except torch.OutOfMemoryError:
            raise TooLarge(f"{what}: a batch of {whole} images does not fit into the GPU's memory; lower "
                           f"data.batch_size ({self.batch_size}) or data.image_size") from None
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        size = torch.nn.utils.get_total_norm(gradients) if gradients else loss.new_zeros(())
        if not self.ranks.total((loss.detach() + size).isfinite().logical_not().float()).item() == 0:
            for buffer, before in zip(self.model.buffers(), kept):
                buffer.copy_(before)
            self.at["skipped"] += 1
            return None
        if self.factors is not None:
            moved = [(weight.grad, factor) for weight, factor in zip(*self.factors) if weight.grad is not None]
            if moved:
                apply_factors(*map(list, zip(*moved)))
        if gradients:
            self.optimizer.step()
        return loss.detach() * (whole / self.ranks.size)

    def run(self, progress=None, what="training", log=None) -> Epoch:
        """Trains to the end, leaves the network at its best epoch in eval mode, and returns that epoch."""
        while not self.finished:
            e = self.run_epoch(progress, what)
            if log:
                log(f"  {what}: epoch {e.epoch}, loss {e.loss:.4f}, lr {e.lr:.2e}, accuracy {e.acc:.2f}")
        self.progress.trained()
        self.model.load_state_dict(self.best_state)
        self.model.eval()
        return self.best

    def state_dict(self) -> dict:
        """Plain tensors and numbers from which :meth:`load_state_dict` goes on, also in the middle of an epoch."""
        model = dict(self.model.state_dict())
        if self.on_grid is not None:
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                model[name] = self.on_grid.kept.get(id(parameter), model[name])
        return {"model": model, "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
                "best_state": self.best_state, "history": [asdict(e) for e in self.history], "skipped": self.skipped,
                "masks": self.masks,
                "at": None if self.at is None else {**self.at, "loss": float(self.at["loss"]),
                                                    "random": random_states()},
                "grids": plain_grids(self.best_grids),
                "scales": dict(self.on_grid.log_scales) if self.on_grid is not None else {}}

    def coded(self, best_state: dict) -> dict:
        """The best epoch's network for the disk, as :meth:`load_state_dict` takes it in place of itself."""
        return best_state if self.on_grid is None else coded(best_state, self.on_grid.blocks, self.on_grid.masks,
                                                             self.best_grids)

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restores what :meth:`state_dict` returned, on a Trainer made with the same arguments."""
        self.model.load_state_dict(state["model"])
        for name, scale in state["scales"].items():
            self.on_grid.log_scales[name].copy_(scale)
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if value.shape == parameter.shape:  # in the parameter's memory format, which the fused step expects
                    values[key] = torch.empty_like(parameter).copy_(value)
        self.generator.set_state(state["generator"])
        self.best_state, self.at, self.skipped = decoded(state["best_state"]), state["at"], state["skipped"]
        self.history = [Epoch(**e) for e in state["history"]]
        self.best_grids = read_grids(state["grids"])


@torch.no_grad()
def estimate_batchnorm(model: nn.Module, images, batch_size: int, limit: int, generator,
                       state: Progress = Progress()) -> None:
    """Running mean and variance of every BatchNorm as the mean over batches of ``limit`` training images, augmented
    as in training; in place. Everything else stays in eval mode. Nothing where there is no BatchNorm, or no images.
    Batches that ``state`` knows from before the run was broken off are not computed again.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or min(limit, len(images)) < 2:
        return
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the cumulative mean
                norm.train()
            for x, _ in images.batches(batch_size, device_of(model), generator=generator, limit=limit):
                def statistics():
                    model(x)
                    return [value.clone() for norm in norms for value in norm.buffers()]

                if len(x) > 1 and (known := state.latest("BatchNorm", statistics)):
                    for buffer, value in zip((b for norm in norms for b in norm.buffers()), known, strict=True):
                        buffer.copy_(value)
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum


def block_fisher(model: nn.Module, blocks, images: Tensor, labels: Tensor, state: Progress = Progress()) -> list[float]:
    """Empirical Fisher information of every block, not normalised (Eq. 14-15, before the division).

    images [N, 3, H, W], labels [N]. F_j = (1/N) sum_n (d loss_n / d theta_j)^2 with the cross-entropy of *one*
    image each, in eval mode; a block's value is the sum over ``block.parameters``. The script squares the gradient
    of the batch mean instead, which is another quantity (ledger D4). The network is left as it was. Images that
    ``state`` knows from before the run was broken off are not computed again.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # a shared tensor goes by each of its names
    wanted = [[named[name] for name in block.parameters] for block in blocks]
    flat = [p for params in wanted for p in params]
    frozen = [p for p in flat if not p.requires_grad]
    totals = [0.0] * len(blocks)

    def added(x, y):
        """The sums with another image's."""
        loss, sums = F.cross_entropy(model(x[None]), y[None]), list(totals)
        gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
        for i, params in enumerate(wanted):
            for _ in params:
                gradient = next(gradients)
                if gradient is not None:
                    sums[i] += gradient.double().square().sum().item()
        return sums

    try:
        for p in frozen:
            p.requires_grad_(True)
        with eval_mode(model):
            # One backward pass per image. Vectorising over images (vmap) in chunks of 8 holds eight copies of every
            # gradient and took 3.5 times as long on a CPU for ResNet18 and DeiT-Small at 64 px.
            for x, y in zip(images, labels):
                totals = state.latest("Fisher information", lambda: added(x, y)) or totals
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return [total / len(images) for total in totals]


def fisher_sensitivity(model: nn.Module, blocks, images: Tensor, labels: Tensor,
                       state: Progress = Progress()) -> list[float]:
    """s_i in [0, 1]: the Fisher information of each block divided by the largest (Eq. 15).

    All ones where no block has any (a network whose loss is flat). ``state`` as :func:`block_fisher`. Raises
    FloatingPointError when it is not finite.
    """
    values = block_fisher(model, blocks, images, labels, state)
    largest = max(values)
    if not all(map(math.isfinite, values)):
        raise FloatingPointError("the Fisher information is not finite: the network's loss or gradients overflow")
    return [value / largest for value in values] if largest > 0 else [1.0] * len(values)
