"""Training on the grid: the network computes with the pruned, quantised weights that its packed file will hold.

The optimiser moves full-precision weights, as in the paper's fine-tuning. Every forward pass uses the grid values of
their kept rows in their place, and the gradient goes straight through the rounding (Bengio et al. 2013, arXiv
1308.3432), cut off where a weight lies outside the grid's range. A grid's scale follows the weights (Eq. 19-20), or is
learned beside them as in LSQ (Esser et al. 2020, arXiv 1902.08153). A log grid's ends always follow.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor, nn

from compress import FULL_BITS, Grid, NetworkConfig, decode, encode, find_grid
from support.state import MAX_ZEROS


class _OnGrid(torch.autograd.Function):
    """Values → their grid values. Backward: straight through inside the range, 0 outside; to a learned scale LSQ's
    gradient, which is code - value / scale inside the range and the code outside."""

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
            return gradient, None, None  # a grid that spans its weights clips none
        values, codes = ctx.saved_tensors
        zero = 0 if ctx.grid.zero is None else ctx.grid.zero
        position = values / ctx.grid.scale
        inside = (position.round() + zero) == codes
        to_scale = gradient * torch.where(inside, codes - zero - position, codes - zero)
        return gradient * inside, to_scale.sum_to_size(ctx.grid.scale.shape), None


class GridTraining:
    """The compressed kernels of a network under training on the grid.

    blocks, config, masks: as for ``compress.snap_to_grid``. ``learned``: scales are parameters of the optimiser,
    starting where Eq. 19-20 put them; they are held as logarithms, so that a step changes each by the same share.
    """

    def __init__(self, blocks, config: NetworkConfig, masks: dict[str, Tensor], learned: bool):
        self.blocks, self.learned = blocks, learned
        self.kernels = {name: (holder.weight, kernel, masks[name].nonzero().squeeze(1))
                        for block, chosen in zip(blocks, config.blocks)
                        for (name, holder), kernel in zip(block.kernels.items(), chosen.kernels)}
        self.masks = masks
        self.kept: dict[int, Tensor] = {}  # the full-precision weights, by id of the parameter that holds grid values
        self.start: dict[str, Grid] = {}
        self.log_scales: dict[str, nn.Parameter] = {}
        if learned:
            for name, (weight, kernel, rows) in self.kernels.items():
                if kernel.bits < FULL_BITS and not kernel.granularity.startswith("log"):
                    grid = find_grid(weight.detach()[rows].float(), kernel)
                    self.start[name] = dataclasses.replace(grid, high=None)
                    self.log_scales[name] = nn.Parameter(grid.scale.log())

    def weights(self) -> dict[str, Tensor]:
        """What stands in for the kernels' weights in a forward pass, by the names for functional_call(…,
        tie_weights=False); differentiable with respect to the weights and the learned scales."""
        return {place: weight for block in self.blocks
                for place, weight in block.replaced(self._weight(name)[0] for name in block.kernels).items()}

    def _weight(self, name) -> tuple[Tensor, Grid | None]:
        weight, kernel, rows = self.kernels[name]
        kept = weight if len(rows) == len(weight) else weight.index_select(0, rows)
        if kernel.bits >= FULL_BITS:
            grid, values = None, kept
        elif name in self.log_scales:
            scale = self.log_scales[name].exp()
            grid = dataclasses.replace(self.start[name], scale=scale.detach())
            values = _OnGrid.apply(kept.float(), scale, grid).to(weight.dtype)
        else:
            grid = find_grid(kept.detach().float(), kernel)
            values = _OnGrid.apply(kept.float(), None, grid).to(weight.dtype)
        if len(rows) < len(weight):
            values = torch.zeros_like(weight).index_copy(0, rows, values)
        return values, grid

    @contextlib.contextmanager
    def in_place(self):
        """The network holds the grid values inside, and its full-precision weights again afterwards; yields the grids,
        kernel name → Grid, None for a kernel of 32 bits."""
        self.kept = {id(weight): weight.detach().clone() for weight, _, _ in self.kernels.values()}
        grids = {}
        try:
            with torch.no_grad():
                for name, (weight, _, _) in self.kernels.items():
                    values, grids[name] = self._weight(name)
                    weight.copy_(values)
            yield grids
        finally:
            with torch.no_grad():
                for weight, _, _ in self.kernels.values():
                    weight.copy_(self.kept[id(weight)])
            self.kept = {}


def coded(state: dict, blocks, masks: dict[str, Tensor], grids: dict[str, Grid | None] | None) -> dict:
    """A network's state dict with the kernels that are on ``grids`` as codes of one or two bytes, for the disk; as it is
    where there are none. :func:`decoded` gives every bit of it back."""
    found = dict(state)
    for block in blocks if grids else ():
        for name, key in block.weight_names.items():
            grid, weight, kept = grids[name], state[key], masks[name]
            if grid is None or weight.dtype != torch.float32 or len(kept) > MAX_ZEROS * int(kept.sum()):
                continue
            codes = encode(weight[kept], grid)
            entry = {"codes": codes.to(_smallest(*grid.code_range)), "grid": _plain(grid), "kept": kept}
            if torch.equal(_weight(entry).view(torch.int32), weight.contiguous().view(torch.int32)):
                found |= {same: entry for same in block.tensors.get(name, (key,))}
    return found


def decoded(state: dict) -> dict:
    """The state dict that :func:`coded` was given. Raises ValueError for what it never gives."""
    return {name: _weight(value) if isinstance(value, dict) else value for name, value in state.items()}


def plain_grids(grids: dict[str, Grid | None] | None) -> dict | None:
    """Grids as dictionaries, for the disk."""
    return grids and {name: None if grid is None else _plain(grid) for name, grid in grids.items()}


def read_grids(grids: dict | None) -> dict[str, Grid | None] | None:
    """The grids that :func:`plain_grids` was given."""
    return grids and {name: None if grid is None else Grid(**grid) for name, grid in grids.items()}


def _plain(grid: Grid) -> dict:
    return {field.name: getattr(grid, field.name) for field in dataclasses.fields(grid)}  # not what it has worked out


def _weight(entry) -> Tensor:
    rows, kept = decode(entry["codes"].float(), Grid(**entry["grid"])), entry["kept"]
    if kept.dtype != torch.bool or kept.dim() != 1 or len(kept) > MAX_ZEROS * len(rows):
        raise ValueError("rows that cannot be")
    weight = rows.new_zeros(len(kept), *rows.shape[1:])
    weight[kept] = rows
    return weight


def _smallest(low: int, high: int) -> torch.dtype:
    return next(dtype for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
                if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)
