"""The compression operator T(theta, C) and its accounting (paper §3.2, §3.5, Appendix A.3).

A kernel is the weight tensor of one Conv2d or Linear, output channels in dimension 0. Per kernel a KernelConfig
says how many bits, which fraction of output channels, which numeric type and which granularity; a BlockConfig
gathers the kernels of a block (the paper's LayerConfig), a NetworkConfig the blocks. Pruning comes first,
quantisation second; the whole operator is deterministic and has no Python loop over channels.

Retained fractions are size ratios in (0, 1]; CR = 1 / retained fraction.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from config import InputError
from support.files import member, quoted

QTYPES = ("INT", "FLOAT")  # in the order of the action's type index
GRANULARITIES = ("uniform", "log", "per-channel", "learned")  # in the order of the action's granularity index
PER_CHANNEL = ("per-channel", "learned")  # those with a grid for every row
FULL_BITS = 32
SMALLEST_SCALE = 1e-8


# ---------------------------------------------------------------------------------------------------------------
# Configurations and their statistics


@dataclass(frozen=True)
class KernelConfig:
    """Compression of one kernel: bits b, keep-ratio kappa as requested, numeric type tau, granularity mu (§3.1.1).

    ``granularity`` is one of GRANULARITIES or ``log-script``, the log grid of the authors' script, kept for
    comparison (ledger D3). Raises ValueError for a value outside its range.
    """
    bits: int = FULL_BITS
    keep: float = 1.0
    qtype: str = "INT"
    granularity: str = "uniform"

    def __post_init__(self):
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or self.bits < 2:
            raise ValueError(f"bits={self.bits!r}: expected a whole number of at least 2")
        if isinstance(self.keep, bool) or not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep!r}: expected a number in (0, 1]")
        if self.qtype not in QTYPES:
            raise ValueError(f"qtype={self.qtype!r}: expected one of {', '.join(QTYPES)}")
        if self.granularity not in (*GRANULARITIES, "log-script"):
            raise ValueError(f"granularity={self.granularity!r}: expected one of {', '.join(GRANULARITIES)} or "
                             "log-script")
        if self.granularity.startswith("log") and 16 < self.bits < FULL_BITS:
            raise ValueError(f"bits={self.bits}: a log grid has at most 16, its table holds every level")

    @property
    def storage_bits(self) -> int:
        """Bits that one stored weight takes: b, and b + 1 for the script's log grid, whose sign comes on top."""
        return self.bits + (self.granularity == "log-script" and self.bits < FULL_BITS)


@dataclass(frozen=True)
class KernelShape:
    """What the accounting needs to know of a kernel: output channels, FP32 parameters P_ik, and whether channels may
    go (a classifier's are the classes)."""
    n_out: int
    params: int
    prunable: bool = True


def channels_kept(keep: float, n_out: int) -> int:
    """n = max(1, floor(keep * n_out)); the tolerance undoes binary rounding (0.29 * 100 is 28.999… in floats)."""
    return min(n_out, max(1, math.floor(keep * n_out + 1e-9 * n_out)))


def kernel_retained(config: KernelConfig, n_out: int) -> float:
    """rho_ik = (b / 32) * (n / n_out), n the channels really kept (Eq. 21, 29)."""
    return min(config.storage_bits, FULL_BITS) / FULL_BITS * channels_kept(config.keep, n_out) / n_out


@dataclass(frozen=True)
class BlockConfig:
    """Configurations of the kernels of one block, with the statistics that higher levels use (§3.2)."""
    kernels: tuple[KernelConfig, ...]
    shapes: tuple[KernelShape, ...]

    def __post_init__(self):
        if len(self.kernels) != len(self.shapes) or not self.kernels:
            raise ValueError(f"{len(self.kernels)} kernel configurations for {len(self.shapes)} kernels")

    @property
    def params(self) -> int:
        """P_i, FP32 parameters of the block's kernels."""
        return sum(shape.params for shape in self.shapes)

    @property
    def per_kernel(self) -> tuple[float, ...]:
        """rho_ik of every kernel."""
        return tuple(kernel_retained(k, s.n_out) for k, s in zip(self.kernels, self.shapes))

    @property
    def retained(self) -> float:
        """rho_i = sum_k P_ik rho_ik / P_i (Eq. 30)."""
        return sum(s.params * r for s, r in zip(self.shapes, self.per_kernel)) / self.params

    @property
    def retained_unweighted(self) -> float:
        """Mean of rho_ik over kernels, as the authors' script has it."""
        return sum(self.per_kernel) / len(self.kernels)

    @property
    def average_bits(self) -> float:
        """Mean bits that a weight takes, over the kernels, unweighted."""
        return sum(k.storage_bits for k in self.kernels) / len(self.kernels)

    @property
    def average_keep(self) -> float:
        """Mean fraction of channels really kept, over the kernels, unweighted."""
        return sum(channels_kept(k.keep, s.n_out) / s.n_out for k, s in zip(self.kernels, self.shapes)) \
            / len(self.kernels)

    @property
    def pruned(self) -> float:
        """Number of pruned kernel weights."""
        return sum(s.params * (1 - channels_kept(k.keep, s.n_out) / s.n_out)
                   for k, s in zip(self.kernels, self.shapes))

    @property
    def cr(self) -> float:
        """1 / rho_i."""
        return 1 / self.retained


@dataclass(frozen=True)
class NetworkConfig:
    """The joint configuration C of all blocks, with the global accounting."""
    blocks: tuple[BlockConfig, ...]

    @property
    def params(self) -> int:
        """P, FP32 parameters of all kernels."""
        return sum(block.params for block in self.blocks)

    @property
    def retained(self) -> float:
        """rho = sum_i P_i rho_i / P (Eq. 31)."""
        return sum(block.params * block.retained for block in self.blocks) / self.params

    @property
    def cr(self) -> float:
        """CR = 1 / rho (Eq. 22)."""
        return 1 / self.retained

    @property
    def msr(self) -> float:
        """Model-size reduction 1 - rho (Eq. 22), as a fraction."""
        return 1 - self.retained

    @property
    def cr_unweighted(self) -> float:
        """The script's CR: 1 / mean over blocks of the mean over kernels of rho_ik."""
        return len(self.blocks) / sum(block.retained_unweighted for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Pruned kernel weights / kernel weights."""
        return sum(block.pruned for block in self.blocks) / self.params

    @property
    def average_bits(self) -> float:
        """Mean bits that a weight takes, over all kernels, unweighted."""
        kernels = [kernel for block in self.blocks for kernel in block.kernels]
        return sum(kernel.storage_bits for kernel in kernels) / len(kernels)

    @property
    def average_keep(self) -> float:
        """Mean fraction of channels really kept over all kernels, unweighted."""
        return sum(block.average_keep * len(block.kernels) for block in self.blocks) \
            / sum(len(block.kernels) for block in self.blocks)


def kernel_shapes(block) -> tuple[KernelShape, ...]:
    """Shapes of a block's kernels; ``block.kernels`` maps names to modules with a ``weight``, ``block.whole``, where
    there is one, names those that keep every channel."""
    whole = getattr(block, "whole", ())
    return tuple(KernelShape(m.weight.shape[0], m.weight.numel(), name not in whole)
                 for name, m in block.kernels.items())


# ---------------------------------------------------------------------------------------------------------------
# Pruning (Eq. 18) and quantisation (Eq. 19-20)


def prune_mask(weight: Tensor, keep: float) -> Tensor:
    """Which output channels stay: the n = max(1, floor(keep * n_out)) of largest L2 norm (Eq. 18).

    weight [n_out, …] → bool [n_out]. Equal norms: the lower index stays. Raises ValueError unless 0 < keep <= 1.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep!r}: expected a number in (0, 1]")
    n_out = weight.shape[0]
    mask = torch.zeros(n_out, dtype=torch.bool, device=weight.device)
    mask[channel_order(weight)[:channels_kept(keep, n_out)]] = True
    return mask


def channel_order(weight: Tensor) -> Tensor:
    """Output channels of ``weight`` [n_out, …] from the largest L2 norm to the smallest, int64 [n_out]; equal norms:
    the lower index first."""
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))  # half precision would make ties
    norms = torch.linalg.vector_norm(values.reshape(weight.shape[0], -1), dim=1)
    return torch.sort(norms, descending=True, stable=True).indices


@dataclass(frozen=True)
class Grid:
    """What the codes of one kernel's kept rows stand for (§3.5.2); codes are whole numbers held as float32.

    INT, learned: signed code c is c * scale. FLOAT: code c in 0…2^b - 1 is (c - zero) * scale. log, log-script: code
    0 is zero, ±m the (m - 1)-th of the magnitudes that lie in equal steps of log2 between the two ends in ``scale``.
    ``scale``: float32, [] for a tensor, [n, 1, …] for channels, [2] for a log grid's smallest and largest magnitude;
    ``zero``: like ``scale``, FLOAT only. ``high``: upper ends of the weights that a FLOAT grid was made for.
    """
    bits: int
    qtype: str
    granularity: str
    scale: Tensor
    zero: Tensor | None = None
    high: Tensor | None = None

    def rows(self, part: slice) -> "Grid":
        """The grid of some of the kernel's rows."""
        if self.granularity not in PER_CHANNEL:
            return self
        scale, zero, high = (None if end is None else end[part] for end in (self.scale, self.zero, self.high))
        return Grid(self.bits, self.qtype, self.granularity, scale, zero, high)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.granularity in ("log", "log-script"):
            # 2^(b-1) magnitude codes of which one means zero; the script has 2^b - 1 magnitudes and a sign on top (D3).
            levels = 2 ** (self.bits - 1) - 1 if self.granularity == "log" else 2 ** self.bits - 1
            return -levels, levels
        if self.zero is not None:
            return 0, 2 ** self.bits - 1
        q_max = 2 ** (self.bits - 1) - 1
        return -q_max - (self.granularity == "uniform"), q_max

    @cached_property
    def log_steps(self) -> tuple[Tensor, Tensor]:
        """log2 of a log grid's smallest magnitude, and the step. In float64, like the table: the last bit of a float32
        logarithm differs between processors, and a packed file holds the ends alone."""
        low, high = self.scale.double().log2().unbind()
        levels = self.code_range[1]
        return low, ((high - low) / max(levels - 1, 1)).clamp_min(torch.finfo(torch.float32).tiny)

    @cached_property
    def log_table(self) -> Tensor:
        """What a log grid's codes stand for, float32, from the smallest code on. The ends are exact, so that a second
        pass finds the same table; with a single level it is the middle."""
        levels, (low, step) = self.code_range[1], self.log_steps
        smallest, largest = self.scale.unbind()
        if levels == 1:
            middle = smallest if bool(largest == smallest) else torch.exp2(low + step / 2).float()
            return torch.stack([-middle, torch.zeros_like(middle), middle])
        magnitudes = torch.exp2(low + step * torch.arange(levels, device=self.scale.device)).float()
        magnitudes[0], magnitudes[-1] = smallest, largest
        return torch.cat([-magnitudes.flip(0), torch.zeros_like(magnitudes[:1]), magnitudes])


def find_grid(values: Tensor, config: KernelConfig) -> Grid:
    """The grid of Eq. 19-20 over the range of ``values`` float32 [n, …], a kernel's kept rows.

    INT and learned: scale = max|W| / q_max, at least 1e-8. FLOAT: 2^b levels from min to max, widened to hold 0, with
    an integer zero-point. log: from the smallest to the largest magnitude of the non-zero weights (1 without any).
    ``uniform`` and ``log`` have one range for the tensor, ``per-channel`` and ``learned`` one per output channel.
    """
    bits, qtype, granularity = config.bits, config.qtype, config.granularity
    per_channel = granularity in PER_CHANNEL
    shape = (-1, *[1] * (values.dim() - 1)) if per_channel else ()
    rows = values.reshape(values.shape[0], -1) if per_channel else values.reshape(1, -1)
    if granularity in ("log", "log-script"):
        magnitude = rows.abs()
        largest = magnitude.amax()
        ends = torch.stack([torch.where(magnitude > 0, magnitude, torch.inf).amin(), largest])
        return Grid(bits, qtype, granularity, torch.where(largest > 0, ends, 1.0))
    if qtype == "INT" or granularity == "learned":
        q_max = 2 ** (bits - 1) - 1
        largest = rows.abs().amax(dim=1).reshape(shape)
        # The divisor is a tensor because CUDA divides by a plain number through its rounded reciprocal. With a
        # correctly rounded quotient, (q_max * scale) / q_max gives scale back, so that a second pass changes no bit.
        return Grid(bits, qtype, granularity, (largest / largest.new_full((), q_max)).clamp_min(SMALLEST_SCALE))
    low, high = (end.reshape(shape) for end in torch.aminmax(rows, dim=1))
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (2 ** bits - 1)
    usable = (scale >= SMALLEST_SCALE) & (high > 0)
    scale = scale.clamp_min(SMALLEST_SCALE)
    return Grid(bits, qtype, granularity, scale, (-low / scale).round_(), torch.where(usable, high, torch.inf))


def encode(values: Tensor, grid: Grid, logs: Tensor | None = None) -> Tensor:
    """Codes of ``values`` float32 [n, …]: the nearest of the grid, clipped to its ends. ``logs``: :func:`logarithms` of
    them, where they are known; they are written to."""
    low, high = grid.code_range
    if grid.granularity in ("log", "log-script"):
        if high == 1:
            return values.sign()
        start, step = grid.log_steps
        position = (logarithms(values) if logs is None else logs).sub_(start).div_(step).float()
        return position.round_().clamp_(0, high - 1).add_(1).mul_(values.sign())
    codes = (values / grid.scale).round_()
    if grid.zero is None:
        return codes.clamp_(low, high)
    codes = codes.add_(grid.zero).clamp_(low, high)
    # When the zero-point falls on a half, the upper end may round inwards, and a second pass would find a narrower
    # range. It takes the top code: still within scale / 2, and the range reproduces itself. In floats, as comparing
    # takes a CPU four times as long as subtracting: only the upper end is larger than the number before it.
    if grid.high is not None:
        below = torch.nextafter(grid.high, torch.full_like(grid.high, -torch.inf))
        codes = torch.maximum(codes, (values - below).sign_().mul_(high))
    return codes


def logarithms(values: Tensor) -> Tensor:
    """log2 of magnitudes, float64, of which a log grid's codes follow."""
    return values.abs().double().log2_()


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The values, float32 like ``codes``, that codes stand for; zero is +0."""
    if grid.granularity in ("log", "log-script"):
        table, zero = grid.log_table, grid.code_range[1]
        # A CPU makes whole numbers of 32 bits in a fifth of the time of 64, and selects in a fifth of that of indexing.
        return table.index_select(0, (codes + zero).int().flatten()).reshape(codes.shape)
    if grid.zero is not None:
        codes = codes - grid.zero
    return (codes * grid.scale).add_(0.0)  # -0 + 0 is +0: a code has no sign of zero


def quantize(weight: Tensor, bits: int, qtype: str = "INT", granularity: str = "uniform") -> Tensor:
    """De-quantised copy of ``weight`` on a grid of at most 2^bits values (§3.5.2).

    weight [n_out, …], any float type, in and out; arithmetic is float32. Zero stays exactly zero. A second pass
    changes nothing (INT, learned, log) or less than 1e-6 max|W| (FLOAT, float32 in). bits >= 32 returns a copy.
    ``log`` and ``learned`` ignore ``qtype``. Raises ValueError for values outside KernelConfig's ranges.
    """
    config = KernelConfig(bits, 1.0, qtype, granularity)  # checks the values
    if bits >= FULL_BITS or weight.numel() == 0:
        return weight.detach().clone()
    values = weight.detach().float()
    grid = find_grid(values, config)
    return decode(encode(values, grid), grid).to(weight.dtype)


def compress_kernel(weight: Tensor, config: KernelConfig) -> tuple[Tensor, Tensor]:
    """Prune, then quantise one kernel: weight [n_out, …] → (compressed weight, bool mask [n_out]).

    Only the rows that stay are quantised; zero is on every grid, so the others need no pass.
    """
    mask = prune_mask(weight, config.keep)
    if bool(mask.all()):
        return quantize(weight, config.bits, config.qtype, config.granularity), mask
    result = torch.zeros_like(weight)
    result[mask] = quantize(weight.detach()[mask], config.bits, config.qtype, config.granularity)
    return result, mask


class PreparedKernel:
    """Compresses one kernel again and again: what :func:`compress_kernel` computes of ``weight`` [n_out, …] whatever
    the configuration, its pruning order and the range of every row, is computed once. The weight must stay as it is.
    """

    CHUNK = 2 ** 18  # weights that a CPU takes at a time, so that all passes over them stay in its cache

    def __init__(self, weight: Tensor):
        self.weight, self.order = weight.detach(), channel_order(weight)
        rows = self._rows(self.weight).float()
        # A grid follows from three weights of each row as it does from all: the ends and the one nearest to zero.
        nearest = torch.where(rows == 0, torch.inf, rows.abs()).argmin(1, keepdim=True)
        self.ends = torch.cat([rows.amin(1, True), rows.amax(1, True), rows.gather(1, nearest)], dim=1)
        self.logs: Tensor | None = None  # from the first log grid on; eight bytes per weight, and may be dropped

    def _rows(self, tensor):
        """A dense tensor like the weight as a view [n_out, weights of a channel], in the order that they lie in."""
        order = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
        return tensor.permute(0, *order).flatten(1)

    def compressed(self, config: KernelConfig, factor: Tensor | None = None) -> Tensor:
        """The weight that :func:`compress_kernel` gives, in the layout of the kernel's, times ``factor`` [n_out]."""
        count = channels_kept(config.keep, len(self.order))
        kept = self.order[:count].sort().values
        grid = find_grid(self.ends.index_select(0, kept), config) if config.bits < FULL_BITS else None
        result = torch.empty_like(self.weight)
        rows, target = self._rows(self.weight), self._rows(result)
        target.index_fill_(0, self.order[count:], 0)
        of_logs = grid is not None and grid.granularity in ("log", "log-script")
        if of_logs and self.logs is None:
            self.logs = logarithms(rows.float())
        height = max(1, self.CHUNK // rows.shape[1]) if rows.device.type == "cpu" else count
        for start in range(0, count, height):
            part = slice(start, start + height)
            values = rows.index_select(0, kept[part])
            if grid is not None:
                own = grid.rows(part)
                logs = self.logs.index_select(0, kept[part]) if of_logs else None
                values = decode(encode(values.float(), own, logs), own).to(values.dtype)
            if factor is not None:
                values.mul_(factor.index_select(0, kept[part])[:, None])
            target.index_copy_(0, kept[part], values)
        return result


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module):
    """Eval mode inside, and afterwards every module back in the mode that it had, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_fit(blocks, config: NetworkConfig) -> None:
    """ValueError unless C was made for these blocks; before anything is changed."""
    if len(blocks) != len(config.blocks):
        raise ValueError(f"configuration of {len(config.blocks)} blocks for {len(blocks)} blocks")
    for block, block_config in zip(blocks, config.blocks):
        if kernel_shapes(block) != block_config.shapes:
            raise ValueError(f"block {block.name}: the configuration was made for kernels of other shapes")


def _check_masks(blocks, masks: dict[str, Tensor]) -> None:
    """ValueError unless there is a bool mask [n_out] for every kernel and for nothing else."""
    modules = {name: module for block in blocks for name, module in block.kernels.items()}
    if set(modules) != set(masks):
        raise ValueError(f"masks for {sorted(set(masks) - set(modules))} have no kernel, "
                         f"kernels {sorted(set(modules) - set(masks))} have no mask")
    for name, mask in masks.items():
        n_out = modules[name].weight.shape[0]
        if mask.dtype != torch.bool or mask.shape != (n_out,):
            raise ValueError(f"mask of {name}: expected bool [{n_out}], got {mask.dtype} {list(mask.shape)}")


@torch.no_grad()
def compress_network(blocks, config: NetworkConfig) -> dict[str, Tensor]:
    """theta = T(theta_0, C) (Eq. 1), in place on the modules of ``blocks``.

    Returns the pruning masks, kernel name → bool [n_out]. Raises ValueError when C does not fit the blocks.
    """
    _check_fit(blocks, config)
    masks = {}
    for block, block_config in zip(blocks, config.blocks):
        for (name, module), kernel in zip(block.kernels.items(), block_config.kernels):
            weight, masks[name] = compress_kernel(module.weight, kernel)
            module.weight.copy_(weight)
    return masks


@torch.no_grad()
def snap_to_grid(blocks, config: NetworkConfig, masks: dict[str, Tensor]) -> dict[str, Grid | None]:
    """Put fine-tuned kernels back on their grids (ledger D14), in place; the masks stay as they are.

    Returns the grids, kernel name → :class:`Grid`, None for a kernel of 32 bits.
    """
    _check_fit(blocks, config)
    _check_masks(blocks, masks)
    grids = {}
    for block, block_config in zip(blocks, config.blocks):
        for (name, module), kernel in zip(block.kernels.items(), block_config.kernels):
            kept = module.weight.detach()[masks[name]].float()
            grids[name] = find_grid(kept, kernel) if kernel.bits < FULL_BITS else None
            grid = grids[name]
            set_rows(module.weight, masks[name], decode(encode(kept, grid), grid) if grid else kept)
    return grids


def set_rows(weight: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Write ``rows`` [kept, …] into the rows of ``weight`` [n_out, …] that ``mask`` names, zero elsewhere."""
    full = torch.zeros_like(weight)
    full[mask] = rows.to(weight.dtype)
    weight.copy_(full)


def mask_factors(blocks, masks: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of the kernels, and for each the factors 0 and 1 of its rows, for :func:`apply_factors`. Checks names
    and shapes."""
    _check_masks(blocks, masks)
    weights = {name: module.weight for block in blocks for name, module in block.kernels.items()}
    return list(weights.values()), [masks[name].to(weight).reshape(-1, *[1] * (weight.dim() - 1))
                                    for name, weight in weights.items()]


@torch.no_grad()
def apply_factors(weights: list[Tensor], factors: list[Tensor]) -> None:
    """Zero the pruned rows, of weights or of their gradients, in place, in one call for all kernels (§3.5.1)."""
    torch._foreach_mul_(weights, factors)


def apply_masks(blocks, masks: dict[str, Tensor]) -> None:
    """Zero the pruned rows of every kernel, in place (Eq. 18). Checks names and shapes."""
    apply_factors(*mask_factors(blocks, masks))


# ---------------------------------------------------------------------------------------------------------------
# Accounting beyond Eq. 21-22, and policies as files


def kernel_bytes(config: KernelConfig, shape: KernelShape) -> int:
    """Bytes of one packed kernel: codes of the kept rows, scales, zero-points and the map of kept channels.

    Scales and the two ends of a log grid are float32, a zero-point takes ceil(b / 8) bytes, the channel map is a
    bitmap that is absent when every channel stays.
    """
    kept = channels_kept(config.keep, shape.n_out)
    weights = kept * (shape.params // shape.n_out)
    bitmap = 0 if kept == shape.n_out else math.ceil(shape.n_out / 8)
    if config.bits >= FULL_BITS:
        return 4 * weights + bitmap
    if config.granularity in ("log", "log-script"):
        grid = 8
    else:
        per_channel = config.granularity in PER_CHANNEL
        zero_point = math.ceil(config.bits / 8) if config.qtype == "FLOAT" and config.granularity != "learned" else 0
        grid = (kept if per_channel else 1) * (4 + zero_point)
    return math.ceil(weights * config.storage_bits / 8) + grid + bitmap


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of every parameter and buffer as stored; a tensor that is shared counts once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def to_policy(blocks, config: NetworkConfig) -> dict:
    """A configuration as plain data for policy.json: requested values, and what they come to, per kernel."""
    return {"format": 1, "blocks": [
        {"name": block.name, "retained": block_config.retained, "cr": block_config.cr, "kernels": [
            {"name": name, **asdict(kernel), "channels": shape.n_out,
             "channels_kept": channels_kept(kernel.keep, shape.n_out),
             "keep_actual": channels_kept(kernel.keep, shape.n_out) / shape.n_out,
             "retained": kernel_retained(kernel, shape.n_out)}
            for name, kernel, shape in zip(block.kernels, block_config.kernels, block_config.shapes)]}
        for block, block_config in zip(blocks, config.blocks)]}


def from_policy(policy, blocks, limits=None, where: str = "policy") -> NetworkConfig:
    """The configuration in a policy for a network with these blocks; what follows from bits and keep is not read.

    ``policy``: anything, for example a parsed policy.json. ``limits``: config.Compress, which every kernel must keep to
    (32 bits, as a block that was given back has, are always allowed); ``where``: the file's name for messages. Kernels
    are told by name, in any order. Raises InputError naming the place, for whatever is no policy or does not fit.
    """
    if type(policy) is not dict or type(policy.get("format")) is not int or policy["format"] != 1:
        raise InputError(f"{where}: not a policy.json of this program, which has format 1; give that of a run")
    given, places, owners = {}, {}, {}
    entries = _list(policy, "blocks", where)
    for n, block in enumerate(entries):
        for k, kernel in enumerate(_list(block, "kernels", f"{where}, blocks[{n}]")):
            place = f"{where}, blocks[{n}].kernels[{k}]"
            name = member(kernel, "name", str, place)
            if name in given:
                raise InputError(f"{place}: {quoted(name)} has a configuration already; name each kernel once")
            given[name], places[name], owners[name] = kernel, place, block.get("name")
    shapes = {name: shape for block in blocks for name, shape in zip(block.kernels, kernel_shapes(block))}
    if shapes.keys() != given.keys():
        raise InputError(f"{where}: a policy for another network, compress.scope or grouping; kernels without a "
                         f"configuration: {_some(shapes.keys() - given.keys())}; configurations without a kernel: "
                         f"{_some(given.keys() - shapes.keys())}")
    configs = {name: _kernel_config(given[name], shape, limits, f"{places[name]} ({quoted(name)})")
               for name, shape in shapes.items()}
    other = [f"{name} ({given[name]['channels']} there, {shape.n_out} here)"
             for name, shape in shapes.items() if given[name]["channels"] != shape.n_out]
    if other:
        raise InputError(f"{where}: a policy for a network of other widths: {', '.join(other[:5])}"
                         f"{', …' if len(other) > 5 else ''}")
    for block in blocks:
        for name in block.kernels:
            if owners[name] != block.name:
                raise InputError(f"{places[name]}: {quoted(name)} is in block {quoted(owners[name])} there, in "
                                 f"{block.name} here; a policy for another network, compress.scope or grouping")
    if len(entries) != len(blocks):
        raise InputError(f"{where}: names a block twice; each must have one entry with all its kernels")
    return NetworkConfig(tuple(BlockConfig(tuple(configs[name] for name in block.kernels), kernel_shapes(block))
                               for block in blocks))


def _kernel_config(entry, shape, limits, place):
    """The KernelConfig of one kernel's entry in a policy, within the limits."""
    bits, keep = member(entry, "bits", int, place), member(entry, "keep", (int, float), place)
    qtype, granularity = member(entry, "qtype", str, place), member(entry, "granularity", str, place)
    member(entry, "channels", int, place)
    low, high = (limits.bits_min, limits.bits_max) if limits else (2, 16)
    if not low <= bits <= high and bits != FULL_BITS:
        raise InputError(f"{place}: bits={quoted(bits)}, expected {low} to {high} (compress.bits_min, "
                         f"compress.bits_max), or {FULL_BITS} for none")
    least = 1 - limits.max_pruning if limits else 0
    if not (keep > 0 and least - 1e-9 <= keep <= 1):
        raise InputError(f"{place}: keep={quoted(keep)}, expected {least:g} to 1 (compress.max_pruning)")
    try:
        config = KernelConfig(bits, keep, qtype, granularity)
    except ValueError as error:
        raise InputError(f"{place}: {quoted(str(error))[1:-1]}") from None
    for key, value, allowed in (("qtype", qtype, QTYPES), ("granularity", granularity, GRANULARITIES)):
        wanted = getattr(limits, key, value)
        if value != wanted and not (wanted == "any" and value in allowed):
            raise InputError(f"{place}: {key}={value}, the settings have {wanted}; --set compress.{key}={value} or any")
    if not shape.prunable and channels_kept(keep, shape.n_out) < shape.n_out:
        raise InputError(f"{place}: keep={keep}, but its channels are the classes; keep 1")
    return config


def _list(owner, key, place):
    """A list of a policy with at least one dictionary and nothing else."""
    value = member(owner, key, list, place)
    if not value or not all(type(item) is dict for item in value):
        raise InputError(f"{place}: {key} must be a list of objects with at least one, as in a run's policy.json")
    return value


def _some(names):
    return f"[{', '.join(map(quoted, sorted(names)[:5]))}{', …' if len(names) > 5 else ''}]"
