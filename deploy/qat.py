"""Training on the grid: the network computes with the pruned, quantised weights that its packed file will hold.

The optimiser moves full-precision weights, as in the paper's fine-tuning. Every forward pass uses the grid values of
their kept rows, and the gradient goes straight through the rounding (Bengio et al. 2013), cut off where a weight lies
half a step or more outside the grid's range. A grid's scale is learned beside the weights as in LSQ (Esser et al.
2020); the ends of a log grid follow them (Eq. 19-20).
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import FULL_BITS, Grid, NetworkConfig, decode, encode, find_grid, set_state
from support.kernels import swapped
from support.own import copy_network


class _OnGrid(torch.autograd.Function):
    """Replace values by their grid values. Backward: straight through inside the range, 0 outside; to a learned scale
    LSQ's gradient, code - value / scale inside the range and the code outside; what rounds to an end is inside."""

    @staticmethod
    def forward(ctx, values, scale, grid):
        codes = encode(values, grid)
        if scale is not None:
            ctx.save_for_backward(values, codes)
            ctx.grid = grid
        return decode(codes, grid)

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.needs_input_grad[1]:
            return gradient, None, None  # a log grid spans its weights and clips none
        values, codes = ctx.saved_tensors
        steps = codes if ctx.grid.zero is None else codes - ctx.grid.zero
        position = values / ctx.grid.scale
        inside = position.round() == steps
        to_scale = gradient * torch.where(inside, steps - position, steps)
        return gradient * inside, to_scale.sum_to_size(ctx.grid.scale.shape), None


class GridTraining:
    """Compressed kernels in training on the grid; blocks, config, masks as for ``compress.snap_to_grid``.

    Scales are parameters of the optimiser, starting where Eq. 19-20 put them; they are held as logarithms, so that a
    step changes each by the same factor.
    """

    def __init__(self, blocks, config: NetworkConfig, masks: dict[str, Tensor]):
        self.blocks = blocks
        self.kernels = {name: (holder.weight, kernel, masks[name].nonzero().squeeze(1))  # indices of the kept rows
                        for block, chosen in zip(blocks, config.blocks)
                        for (name, holder), kernel in zip(block.kernels.items(), chosen.kernels)}
        self.start: dict[str, Grid] = {}  # grids whose scales are learned, as they were at the start
        self.log_scales: dict[str, nn.Parameter] = {}
        for name, (weight, kernel, rows) in self.kernels.items():
            if kernel.bits < FULL_BITS and not kernel.granularity.startswith("log"):
                self.start[name] = dataclasses.replace(find_grid(weight.detach()[rows].float(), kernel), high=None)
                self.log_scales[name] = nn.Parameter(self.start[name].scale.log())

    def swapped(self, model: nn.Module):
        """Let the modules of ``model`` compute with :meth:`weights`, in the backward pass too, where activation
        checkpointing computes again."""
        return swapped(model, self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Return the grid values that replace the kernels' weights in a forward pass, by the names for
        kernels.swapped; differentiable with respect to weights and learned scales."""
        return {place: weight for block in self.blocks
                for place, weight in block.replaced(self._weight(name)[0] for name in block.kernels).items()}

    def _weight(self, name) -> tuple[Tensor, Grid | None]:
        """Return the grid values of a kernel [n_out, …], zero in the pruned rows, and its grid."""
        weight, kernel, rows = self.kernels[name]
        values, grid, scale = weight.index_select(0, rows), None, None
        if name in self.log_scales:
            scale = self.log_scales[name].exp()
            grid = dataclasses.replace(self.start[name], scale=scale.detach())
        elif kernel.bits < FULL_BITS:
            grid = find_grid(values.detach().float(), kernel)
        if grid is not None:
            values = _OnGrid.apply(values.float(), scale, grid).to(weight.dtype)
        return torch.zeros_like(weight).index_copy_(0, rows, values), grid

    @contextlib.contextmanager
    def in_place(self):
        """Put the grid values into the network, and its full-precision weights back afterwards; yields the grids,
        kernel name → Grid, None for a kernel of 32 bits."""
        before = [(weight, weight.detach().clone()) for weight, _, _ in self.kernels.values()]
        grids = {}
        try:
            with torch.no_grad():
                for name, (weight, _, _) in self.kernels.items():
                    values, grids[name] = self._weight(name)
                    weight.copy_(values)
            yield grids
        finally:
            with torch.no_grad():
                for weight, values in before:
                    weight.copy_(values)


def repair(model, blocks, chosen: NetworkConfig, masks, theta0: dict, finetune, half: bool) -> dict:
    """Return the arguments of a train.Trainer that fine-tunes a compressed network as ``finetune`` (config.Finetune)
    says: its masks, training on the grid, distillation from ``theta0``."""
    more = {"masks": masks, "on_grid": GridTraining(blocks, chosen, masks) if finetune.mode == "qat" else None}
    if finetune.distill:
        more["loss"] = Distillation(model, theta0, finetune.distill, finetune.temperature, half)
    return more


class Distillation:
    """The loss of a student: mean cross-entropy + weight T^2 KL(teacher || student) of their logits / T (Hinton et al.
    2015, 1503.02531). ``model``: the network whose state dict ``theta0`` is the teacher; ``half``: as train.Trainer."""

    def __init__(self, model: nn.Module, theta0: dict, weight: float, temperature: float, half: bool):
        self.weight, self.temperature, self.half = weight, temperature, half
        self.teacher = copy_network(model)
        self.teacher.train()
        set_state(self.teacher, theta0)
        self.teacher.eval()  # now, since a network may make something of its weights here

    def __call__(self, logits, y, x) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            target = self.teacher(x.clone())  # which a network may write into
        soft, taught = (F.log_softmax(v.float() / self.temperature, dim=1) for v in (logits, target))
        distance = F.kl_div(soft, taught, reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, y) + self.weight * self.temperature ** 2 * distance
