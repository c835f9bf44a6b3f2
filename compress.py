"""The compression operator T(theta, C) and its accounting (paper §3.2, §3.5, Appendix A.3).

A kernel is the weight tensor of one Conv2d or Linear, output channels in dimension 0. A KernelConfig gives its bits,
the fraction of output channels to keep, numeric type and granularity; a BlockConfig gathers the kernels of a block
(the paper's LayerConfig), a NetworkConfig the blocks; a LayerBudget is what the high-level agents allow a block.
The operator prunes first, then quantises; it is deterministic and has no Python loop over channels.
Retained fractions are size ratios in (0, 1]; CR = 1 / retained fraction.
"""

import contextlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

QTYPES = ("INT", "FLOAT")  # in the order of the action's type index
GRANULARITIES = ("uniform", "log", "per-channel", "learned")  # in the order of the action's granularity index
PER_CHANNEL = ("per-channel", "learned", "fitted")  # those with a grid for every row
SIGNED = ("learned", "fitted")  # those that are signed whatever the type
LOG = ("log", "log-script")
STRATEGIES = ("quantization", "pruning", "auto")  # in the order of the action's strategy index
FULL_BITS = 32
SMALLEST_SCALE = 1e-8
FITTED_STARTS = tuple(0.9 ** n for n in range(20))  # of a fitted scale, in parts of max|W| / q_max


# --- Configurations and their sizes -----------------------------------------------------------------------
@dataclass(frozen=True)
class KernelConfig:
    """Compression of one kernel: bits b, keep-ratio kappa as requested, numeric type tau, granularity mu (§3.1.1).

    ``granularity`` is one of GRANULARITIES; or ``log-script``, the log grid of the authors' script, kept for
    comparison (ledger D3); or ``fitted``, past the paper: per channel, a scale of about the least squared error. Raises
    ValueError for a value outside its range.
    """
    bits: int = FULL_BITS
    keep: float = 1.0
    qtype: str = "INT"
    granularity: str = "uniform"

    def __post_init__(self):
        if type(self.bits) is not int or self.bits < 2:
            raise ValueError(f"bits={self.bits!r}: expected a whole number of at least 2")
        if isinstance(self.keep, bool) or not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep!r}: expected a number in (0, 1]")
        for name, options in (("qtype", QTYPES), ("granularity", (*GRANULARITIES, "log-script", "fitted"))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(options)}")
        if self.granularity in LOG and 16 < self.bits < FULL_BITS:
            raise ValueError(f"bits={self.bits}: a log grid has at most 16, because its table holds every level")

    @property
    def storage_bits(self) -> int:
        """Bits that one stored weight takes: b, and b + 1 for the script's log grid, whose sign comes on top."""
        return self.bits + (self.granularity == "log-script" and self.bits < FULL_BITS)


@dataclass(frozen=True)
class KernelShape:
    """What the accounting needs to know of a kernel."""
    n_out: int  # output channels
    params: int  # P_ik, FP32 parameters
    prunable: bool = True  # False for a classifier, whose output channels are the classes


def channels_kept(keep: float, n_out: int) -> int:
    """Return n = max(1, floor(keep * n_out)); the tolerance undoes rounding (0.29 * 100 is 28.999… in floats)."""
    return min(n_out, max(1, math.floor(keep * n_out + 1e-9 * n_out)))


def kernel_retained(config: KernelConfig, n_out: int) -> float:
    """Return rho_ik = (b / 32) * (n / n_out), n the channels really kept (Eq. 21, 29)."""
    return min(config.storage_bits, FULL_BITS) / FULL_BITS * channels_kept(config.keep, n_out) / n_out


def retained_weights(config: KernelConfig, shape: KernelShape) -> float:
    """Return the FP32-equivalent weights that stay, rho_ik P_ik; summed over a network and divided by P it is rho."""
    return kernel_retained(config, shape.n_out) * shape.params


def kernel_parts(config: KernelConfig, shape: KernelShape) -> tuple[int, int, int, int]:
    """Return the bytes of one packed kernel: map of kept channels, scales, zero-points, codes of the kept rows.

    The map is a bitmap that is absent when every channel stays; scales and the two ends of a log grid are float32, a
    zero-point takes ceil(b / 8) bytes. At 32 bits the rows are float32 numbers.
    """
    kept = channels_kept(config.keep, shape.n_out)
    weights = kept * (shape.params // shape.n_out)
    bitmap = 0 if kept == shape.n_out else math.ceil(shape.n_out / 8)
    if config.bits >= FULL_BITS:
        return bitmap, 0, 0, 4 * weights
    scales = 2 if config.granularity in LOG else kept if config.granularity in PER_CHANNEL else 1
    zeros = scales if config.qtype == "FLOAT" and config.granularity in ("uniform", "per-channel") else 0
    return bitmap, 4 * scales, zeros * math.ceil(config.bits / 8), math.ceil(weights * config.storage_bits / 8)


def kernel_bytes(config: KernelConfig, shape: KernelShape) -> int:
    """Return the bytes of one packed kernel, the sum of :func:`kernel_parts`."""
    return sum(kernel_parts(config, shape))


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
    def kept(self) -> tuple[float, ...]:
        """Fraction of channels really kept, of every kernel."""
        return tuple(channels_kept(k.keep, s.n_out) / s.n_out for k, s in zip(self.kernels, self.shapes))

    @property
    def retained(self) -> float:
        """rho_i = sum_k P_ik rho_ik / P_i (Eq. 30)."""
        return sum(s.params * r for s, r in zip(self.shapes, self.per_kernel)) / self.params

    @property
    def average_bits(self) -> float:
        """Mean bits of a stored weight, over the kernels, unweighted."""
        return sum(k.storage_bits for k in self.kernels) / len(self.kernels)

    @property
    def average_keep(self) -> float:
        """Mean fraction of channels really kept, over the kernels, unweighted."""
        return sum(self.kept) / len(self.kernels)


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
        return len(self.blocks) / sum(sum(block.per_kernel) / len(block.kernels) for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Pruned kernel weights / kernel weights."""
        return sum(sum(s.params * (1 - kept) for s, kept in zip(b.shapes, b.kept)) for b in self.blocks) / self.params

    @property
    def kernels_bytes(self) -> int:
        """Bytes of all kernels in the packed file."""
        return sum(kernel_bytes(k, s) for block in self.blocks for k, s in zip(block.kernels, block.shapes))

    @property
    def joined(self) -> BlockConfig:
        """All kernels as one block, for means over the network."""
        return BlockConfig(sum((block.kernels for block in self.blocks), ()),
                           sum((block.shapes for block in self.blocks), ()))


@dataclass(frozen=True)
class LayerBudget:
    """What the high-level agents allow a block (§3.4.2)."""
    target: float  # rho*_i, retained fraction to reach
    max_pruning: float  # largest fraction of output channels to prune
    min_bits: int  # smallest bitwidth
    max_drop: float  # allowed accuracy drop, points
    strategy: str  # one of STRATEGIES


def kernel_shapes(block) -> tuple[KernelShape, ...]:
    """Return the shapes of ``block.kernels``, name → module with a ``weight``; those in ``block.whole`` stay whole."""
    return tuple(KernelShape(m.weight.shape[0], m.weight.numel(), name not in getattr(block, "whole", ()))
                 for name, m in block.kernels.items())


def model_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the state dict's tensors; one that is shared counts once."""
    return sum(tensor.nbytes for tensor in {*model.state_dict(keep_vars=True).values()})


# --- Pruning (Eq. 18) and quantisation (Eq. 19-20) -------------------------------------------------------------
def prune_mask(weight: Tensor, keep: float) -> Tensor:
    """Return which output channels stay: the n = max(1, floor(keep * n_out)) of largest L2 norm (Eq. 18).

    weight [n_out, …] → bool [n_out]. Equal norms: the lower index stays. Raises ValueError unless 0 < keep <= 1.
    """
    kept = channels_kept(KernelConfig(keep=keep).keep, len(weight))  # the KernelConfig checks the value
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))  # half precision would make ties
    norms = torch.linalg.vector_norm(values.reshape(len(weight), -1), dim=1)
    mask = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    mask[norms.sort(descending=True, stable=True).indices[:kept]] = True
    return mask


@dataclass(frozen=True)
class Grid:
    """What the codes of one kernel's kept rows stand for (§3.5.2); codes are whole numbers held as float32.

    INT, learned, fitted: signed code c is c * scale. FLOAT: code c in 0…2^b - 1 is (c - zero) * scale. log,
    log-script: code 0 is zero, ±m the (m - 1)-th of the magnitudes that lie in equal steps of log2 between the two ends
    in ``scale``.
    ``scale``: float32, [] for a tensor, [n, 1, …] for channels, [2] for a log grid's smallest and largest magnitude;
    ``zero``: like ``scale``, FLOAT only. ``high``: upper ends of the weights that a FLOAT grid was made for.
    """
    bits: int
    qtype: str
    granularity: str
    scale: Tensor
    zero: Tensor | None = None
    high: Tensor | None = None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.zero is not None:
            return 0, 2 ** self.bits - 1
        # log: 2^(b-1) magnitude codes of which one means zero; the script has 2^b - 1 and a sign on top (ledger D3).
        most = 2 ** (self.bits - (self.granularity != "log-script")) - 1
        return -most - (self.granularity == "uniform"), most

    @cached_property
    def log_steps(self) -> tuple[Tensor, Tensor]:
        """log2 of a log grid's smallest magnitude, and the step. In float64, like the table: the last bit of a float32
        logarithm differs between processors, and a packed file holds the ends alone."""
        low, high = self.scale.double().log2().unbind()
        return low, ((high - low) / max(self.code_range[1] - 1, 1)).clamp_min(torch.finfo(torch.float32).tiny)

    @cached_property
    def log_table(self) -> Tensor:
        """Values of a log grid's codes in order, float32. The ends are exact, so that a second pass finds the same
        table; a single level is in the middle."""
        levels, (low, step) = self.code_range[1], self.log_steps
        smallest, largest = self.scale.unbind()
        position = torch.arange(levels, dtype=torch.float64, device=self.scale.device) + 0.5 * (levels == 1)
        magnitudes = torch.exp2(low + step * position).float()
        if levels > 1 or bool(smallest == largest):
            magnitudes[0], magnitudes[-1] = smallest, largest
        return torch.cat([-magnitudes.flip(0), torch.zeros_like(magnitudes[:1]), magnitudes])


def find_grid(values: Tensor, config: KernelConfig) -> Grid:
    """Return the grid of Eq. 19-20 over the range of ``values`` float32 [n, …], a kernel's kept rows.

    INT and learned: scale = max|W| / q_max, at least 1e-8. FLOAT: 2^b levels from min to max, widened to hold 0, with
    an integer zero-point. log: from the smallest to the largest magnitude of the non-zero weights (1 without any).
    ``uniform`` and ``log`` have one range for the tensor, ``per-channel`` and ``learned`` one per output channel.
    ``fitted`` takes per channel the scale of least squared error instead of max|W| / q_max (:func:`fitted_scale`).
    """
    bits, qtype, granularity = config.bits, config.qtype, config.granularity
    make, per_channel = partial(Grid, bits, qtype, granularity), granularity in PER_CHANNEL
    shape = (-1, *[1] * (values.dim() - 1)) if per_channel else ()
    rows = values.reshape(values.shape[0] if per_channel else 1, -1)
    if granularity in LOG:
        magnitude = rows.abs()
        ends = torch.stack([torch.where(magnitude > 0, magnitude, torch.inf).amin(), magnitude.amax()])
        return make(torch.where(ends[1] > 0, ends, 1.0))
    if qtype == "INT" or granularity in SIGNED:
        q_max = 2 ** (bits - 1) - 1
        if granularity == "fitted":
            return make(fitted_scale(rows, q_max).reshape(shape))
        largest = rows.abs().amax(dim=1).reshape(shape)
        # The divisor is a tensor because CUDA divides by a plain number through its rounded reciprocal. With a
        # correctly rounded quotient, (q_max * scale) / q_max gives scale back, so that a second pass changes no bit.
        return make((largest / largest.new_full((), q_max)).clamp_min(SMALLEST_SCALE))
    low, high = rows.amin(dim=1).clamp_max(0).reshape(shape), rows.amax(dim=1).clamp_min(0).reshape(shape)
    scale = (high - low) / (2 ** bits - 1)
    usable = (scale >= SMALLEST_SCALE) & (high > 0)
    scale = scale.clamp_min(SMALLEST_SCALE)
    return make(scale, (-low / scale).round_(), torch.where(usable, high, torch.inf))


def fitted_scale(rows: Tensor, q_max: int) -> Tensor:
    """Return, per row of [n, m], the scale s of about the least |W - s c|^2 over codes c in -q_max…q_max: [n].

    From each of a geometric series of starts below max|W| / q_max, one step of Lloyd's method: codes by rounding, then
    the scale that fits them best, s = <W, c> / <c, c>. With b = 2 the grid is ternary.
    """
    largest = rows.abs().amax(dim=1) / q_max
    best, least = largest.clamp_min(SMALLEST_SCALE), torch.full_like(largest, torch.inf)
    for share in FITTED_STARTS:
        codes = (rows / (share * largest).clamp_min(SMALLEST_SCALE)[:, None]).round_().clamp_(-q_max, q_max)
        scale = ((rows * codes).sum(1) / codes.square().sum(1).clamp_min(1)).clamp_min(SMALLEST_SCALE)
        error = (rows - codes * scale[:, None]).square_().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def encode(values: Tensor, grid: Grid) -> Tensor:
    """Return the codes of ``values`` float32 [n, …]: the nearest of the grid, clipped to its ends."""
    low, high = grid.code_range
    if grid.granularity in LOG:
        start, step = grid.log_steps
        position = values.abs().double().log2_().sub_(start).div_(step).float()
        return position.round_().clamp_(0, high - 1).add_(1).mul_(values.sign())
    codes = (values / grid.scale).round_()
    if grid.zero is not None:
        codes.add_(grid.zero)
    codes.clamp_(low, high)
    # When the zero-point falls on a half, the upper end may round inwards, and a second pass would find a narrower
    # range. It takes the top code: still within scale / 2, and the range reproduces itself.
    return codes if grid.high is None else codes.masked_fill_(values >= grid.high, high)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Return the values, float32 like ``codes``, that codes stand for; zero is +0."""
    if grid.granularity in LOG:
        return grid.log_table[(codes + grid.code_range[1]).long()]
    if grid.zero is not None:
        codes = codes - grid.zero
    return (codes * grid.scale).add_(0.0)  # -0 + 0 is +0: a code has no sign of zero


def quantize(weight: Tensor, bits: int, qtype: str = "INT", granularity: str = "uniform") -> Tensor:
    """Return a de-quantised copy of ``weight`` on a grid of at most 2^bits values, ``log-script`` twice that (§3.5.2).

    weight [n_out, …], any float type, in and out; arithmetic is float32. Zero stays exactly zero. A second pass
    over float32 changes nothing (INT, learned, log) or less than 1e-6 max|W| (FLOAT; fitted, but for one row in
    thousands, for which another scale fits its own grid better). bits >= 32 returns a copy.
    ``log``, ``learned`` and ``fitted`` ignore ``qtype``. Raises ValueError for values outside KernelConfig's ranges.
    """
    config = KernelConfig(bits, 1.0, qtype, granularity)  # checks the values
    if bits >= FULL_BITS or weight.numel() == 0:
        return weight.detach().clone()
    values = weight.detach().float()
    grid = find_grid(values, config)
    return decode(encode(values, grid), grid).to(weight.dtype)


def compress_kernel(weight: Tensor, config: KernelConfig) -> tuple[Tensor, Tensor]:
    """Prune, then quantise one kernel: weight [n_out, …] → (compressed weight in the same layout, bool mask [n_out]).

    Only the rows that stay are quantised; zero is on every grid, so the others need no pass.
    """
    mask = prune_mask(weight, config.keep)
    result = torch.zeros_like(weight)
    result[mask] = quantize(weight.detach()[mask], config.bits, config.qtype, config.granularity)
    return result, mask


# --- The operator on a network ---------------------------------------------------------------------------------
@contextlib.contextmanager
def eval_mode(model: torch.nn.Module):
    """Eval mode inside, and afterwards every module back in its mode before, also after an exception.

    By calling train() and eval(), so that networks that merge, cache or convert something there work with the weights
    that they have now.
    """
    before = [(module, module.training) for module in model.modules()]
    to_eval(model)
    try:
        yield
    finally:
        for module, mode in before:
            if module.training != mode:
                module.train(mode)


def to_eval(model: torch.nn.Module) -> None:
    """Bring a network into eval mode through train(); a program of torch.export has no modes and stays as it is."""
    with contextlib.suppress(NotImplementedError):
        model.train()
        model.eval()


def set_state(model: torch.nn.Module, state, assign: bool = False) -> None:
    """Load a state dict that may have lost the versions of its modules, which some need to read it (MNASNet)."""
    state = OrderedDict(state)
    state._metadata = getattr(model.state_dict(), "_metadata", {})
    model.load_state_dict(state, **({"assign": True} if assign else {}))  # which an own load_state_dict may not know


@torch.no_grad()
def compress_network(blocks, config: NetworkConfig) -> dict[str, Tensor]:
    """Compute theta = T(theta_0, C) (Eq. 1), in place on the modules of ``blocks``; return the pruning masks, kernel
    name → bool [n_out]. Raises ValueError when C does not fit the blocks."""
    masks = {}
    for name, module, kernel in _checked_kernels(blocks, config):
        weight, masks[name] = compress_kernel(module.weight, kernel)
        module.weight.copy_(weight)
    return masks


@torch.no_grad()
def snap_to_grid(blocks, config: NetworkConfig, masks: dict[str, Tensor]) -> dict[str, Grid | None]:
    """Put fine-tuned kernels back on their grids (ledger D14), in place, with the masks as they are; return the grids,
    kernel name → Grid, None for a kernel of 32 bits. Raises ValueError when C or the masks do not fit the blocks."""
    kernels, grids = _checked_kernels(blocks, config), {}
    mask_factors(blocks, masks)  # raises unless the masks fit
    for name, module, kernel in kernels:
        kept = module.weight.detach()[masks[name]].float()
        grids[name] = grid = find_grid(kept, kernel) if kernel.bits < FULL_BITS else None
        module.weight.zero_()
        module.weight[masks[name]] = (decode(encode(kept, grid), grid) if grid else kept).to(module.weight.dtype)
    return grids


def mask_factors(blocks, masks: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the weight of every kernel with the factors 0 and 1 of its rows, [n_out, 1, …]. Raises ValueError unless
    there is a bool mask [n_out] for every kernel and for nothing else."""
    weights = {name: module.weight for block in blocks for name, module in block.kernels.items()}
    if set(weights) != set(masks):
        raise ValueError(f"masks for {sorted(set(masks) - set(weights))} have no kernel, "
                         f"kernels {sorted(set(weights) - set(masks))} have no mask")
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape != weights[name].shape[:1]:
            raise ValueError(f"mask of {name}: expected bool [{len(weights[name])}], got {mask.dtype} {[*mask.shape]}")
    return [(weight, masks[name].to(weight).reshape(-1, *[1] * (weight.dim() - 1)))
            for name, weight in weights.items()]


def _checked_kernels(blocks, config: NetworkConfig) -> list[tuple[str, torch.nn.Module, KernelConfig]]:
    """Kernels of all blocks with their configurations; ValueError, before anything is changed, unless C fits."""
    if len(blocks) != len(config.blocks):
        raise ValueError(f"configuration of {len(config.blocks)} blocks for {len(blocks)} blocks")
    for block, chosen in zip(blocks, config.blocks):
        if kernel_shapes(block) != chosen.shapes:
            raise ValueError(f"block {block.name}: the configuration was made for kernels of other shapes")
    return [(name, module, kernel) for block, chosen in zip(blocks, config.blocks)
            for (name, module), kernel in zip(block.kernels.items(), chosen.kernels)]
