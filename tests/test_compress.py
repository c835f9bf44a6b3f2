"""The operator T(theta, C) on numbers worked out by hand, its properties over many tensors, and the accounting."""

import copy
import functools
import itertools
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress import (LOG, PER_CHANNEL, BlockConfig, KernelConfig, KernelShape, NetworkConfig, compress_kernel,
                      compress_network, kernel_bytes, kernel_retained, mask_factors, prune_mask, quantize,
                      snap_to_grid)

QUANTIZERS = [("INT", "uniform"), ("FLOAT", "uniform"), ("INT", "per-channel"), ("FLOAT", "per-channel"),
              ("INT", "learned"), ("INT", "log"), ("INT", "log-script")]
BITS = [2, 3, 4, 5, 6, 7, 8, 12]
# One rounding to the input's type, as a fraction of the value.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2 ** -11, torch.bfloat16: 2 ** -8}


def tensor_cases():
    """Name → weight, made to catch a quantiser out; the same at every call."""
    generator = torch.Generator().manual_seed(7)
    randn = functools.partial(torch.randn, generator=generator)
    cases = {
        "linear": randn(6, 10), "conv": randn(5, 3, 3, 3), "depthwise": randn(5, 1, 3, 3), "vector": randn(9),
        "positive": randn(4, 7).abs() + 0.1, "negative": -randn(4, 7).abs() - 0.1,
        "constant": torch.full((3, 4), 0.37), "single": torch.tensor([[1.7]]), "zeros": torch.zeros(3, 4),
        # low = -high: the zero-point (2^b - 1) / 2 is a half at every bitwidth
        "symmetric": (lambda half: torch.cat([half, -half], dim=1))(randn(4, 8)),
        "ends": torch.tensor([[-1.0, 1.0], [-3.7, 3.7]]),
        # a zero-point of exactly 0.5 and 2.5 at two bits, of 3.5 at three
        "halves": torch.tensor([[-0.5, 2.5, 1.0], [-2.5, 0.5, 0.1], [-3.5, 3.5, 0.6]]),
        "nearly constant": 1 + 1e-6 * randn(4, 8), "close together": -1e-3 * (1 + 1e-4 * randn(4, 8)),
        "nine decades": torch.sign(randn(8, 16)) * 10 ** (9 * torch.rand(8, 16, generator=generator) - 6),
        "decades by channel": randn(8, 16) * 10 ** (9 * torch.arange(8.0)[:, None] / 7 - 6),
        "sparse": randn(4, 8) * (torch.rand(4, 8, generator=generator) > 0.6),
        # around the smallest scale, 1e-8 (dead channels of trained networks are such)
        "large": 1e30 * randn(3, 5), "1e-7": 1e-7 * randn(4, 8), "1e-9": 1e-9 * randn(4, 8),
        "zero channel": randn(4, 6) * torch.tensor([1.0, 1, 0, 1])[:, None],
        "dead channel": randn(4, 6) * torch.tensor([1.0, 1e-9, 1, 1])[:, None],
    }
    for name in range(10):
        cases[f"random {name}"] = randn(*random.Random(name).choices(range(1, 9), k=2)) * 10 ** (name - 5)
    return cases


CASES = tensor_cases()
REDUCED = ["linear", "conv", "depthwise", "positive", "negative", "constant", "single", "zeros", "symmetric", "halves",
           "zero channel", "sparse", "nine decades"]


def in_rows(weight, granularity):
    """[groups that share a scale, values]"""
    return weight.reshape(weight.shape[0] if granularity in PER_CHANNEL else 1, -1)


# --- KernelConfig ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field, values", [
    ("bits", [1, 0, -4, 4.0, "4", None, True]), ("keep", [0.0, -0.1, 1.0001, float("nan"), float("inf"), True]),
    ("qtype", ["int", "any", 0, None]), ("granularity", ["any", "per_channel", None])])
def test_values_outside_their_range_are_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{field}=.*expected"):
            KernelConfig(**{field: value})
        with pytest.raises(ValueError, match=f"{field}=.*expected"):  # so do those that take the numbers themselves
            if field == "keep":
                prune_mask(torch.ones(2, 2), value)
            else:
                quantize(torch.ones(2), **{"bits": 4, field: value})


def test_a_log_grid_of_more_than_16_bits_and_other_counts_are_refused():
    assert KernelConfig(16, 1.0, "INT", "log") and KernelConfig(32, 1.0, "INT", "log")
    with pytest.raises(ValueError, match="at most 16"):
        KernelConfig(17, 1.0, "INT", "log")
    for kernels, shapes in [((KernelConfig(),), ()), ((), ()), ((KernelConfig(),), (KernelShape(2, 4),) * 2)]:
        with pytest.raises(ValueError, match="kernel configurations"):
            BlockConfig(kernels, shapes)


# --- Quantisers by hand ----------------------------------------------------------------------------------------

# One scale for all: max 3 over q_max 3.
INT_UNIFORM = ([[3.0, -1.4, 0.6], [0.75, -0.3, 0.0]], [[3.0, -1.0, 1.0], [1.0, 0.0, 0.0]])
# Scales 1 and 0.25, and a row without a weight.
INT_CHANNEL = ([[3.0, -1.4, 0.4], [0.75, -0.3, 0.1], [0.0, 0.0, 0.0]],
               [[3.0, -1.0, 0.0], [0.75, -0.25, 0.0], [0.0, 0.0, 0.0]])
# Range -1 … 2 over 3 steps: scale 1, zero-point 1.
FLOAT_UNIFORM = ([[-1.0, 2.0], [0.4, 1.3]], [[-1.0, 2.0], [0.0, 1.0]])
# Scales 1, 0.25, 0.5 (widened down to 0) and 2 (widened up to 0); zero-points 1, 2, 0 and 3.
FLOAT_CHANNEL = ([[-1.0, 2.0, 0.4], [-0.5, 0.25, 0.1], [0.5, 0.8, 1.5], [-6.0, -3.2, -1.2]],
                 [[-1.0, 2.0, 0.0], [-0.5, 0.25, 0.0], [0.5, 1.0, 1.5], [-6.0, -4.0, -2.0]])
# Magnitudes 1, 2, 4: log2 1.3 = 0.38, log2 3 = 1.58, log2 2.7 = 1.43.
LOG_HAND = ([[1.0, -4.0, 1.3], [-3.0, 0.0, 2.7]], [[1.0, -4.0, 1.0], [-4.0, 0.0, 2.0]])


@pytest.mark.parametrize("bits, qtype, granularity, numbers", [
    (3, "INT", "uniform", INT_UNIFORM), (3, "INT", "per-channel", INT_CHANNEL),
    (2, "FLOAT", "uniform", FLOAT_UNIFORM), (2, "FLOAT", "per-channel", FLOAT_CHANNEL),
    (3, "INT", "learned", INT_CHANNEL), (3, "FLOAT", "learned", INT_CHANNEL),
    (3, "INT", "log", LOG_HAND), (3, "FLOAT", "log", LOG_HAND),
    # the script has 2^b - 1 magnitudes: three of them at two bits already
    (2, "INT", "log-script", LOG_HAND), (2, "FLOAT", "log-script", LOG_HAND),
    # one magnitude, in the middle of 1 and 4 on the log scale
    (2, "INT", "log", ([[1.0, -4.0], [0.0, 3.0]], [[2.0, -2.0], [0.0, 2.0]])),
    # 7 magnitudes 1/8 … 8; log2 0.7 = -0.51 and log2 0.72 = -0.47 lie on either side of a half
    (4, "INT", "log", ([[0.125, 8.0, -0.7, 0.72, 5.6, -5.7]], [[0.125, 8.0, -0.5, 1.0, 4.0, -8.0]])),
    # ternary: -2^(b-1) is never needed
    (2, "INT", "uniform", ([[2.0, -0.9, 1.1, 0.0, -2.0]], [[2.0, 0.0, 2.0, 0.0, -2.0]])),
    # the scale is at least 1e-8, where 2.4e-8 / 127 would be less
    *((8, "INT", name, ([[2.4e-8, -1.6e-8, 3e-9]], [[2e-8, -2e-8, 0.0]])) for name in ("uniform", *PER_CHANNEL)),
    (8, "INT", "uniform", ([[127.0, -126.6, 0.4, -3.7]], [[127.0, -127.0, 0.0, -4.0]])),
    (8, "FLOAT", "uniform", ([[-100.0, 155.0, 0.4, -3.7]], [[-100.0, 155.0, 0.0, -4.0]]))])
def test_quantiser_by_hand(bits, qtype, granularity, numbers):
    weight, expected = (torch.tensor(n) for n in numbers)
    torch.testing.assert_close(quantize(weight, bits, qtype, granularity), expected, rtol=1e-6, atol=0)


# --- Quantisers: properties ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_levels_error_and_zeros(name):
    for dtype, (qtype, granularity), bits in itertools.product(
            ROUNDING if name in REDUCED else [torch.float32], QUANTIZERS, BITS):
        weight, what = CASES[name].to(dtype), f"{dtype} {qtype} {granularity} {bits} bits"
        result = quantize(weight, bits, qtype, granularity)
        assert result.dtype == dtype and result.shape == weight.shape and not result[weight == 0].any(), what
        rows, exact = in_rows(result.double(), granularity), in_rows(weight.double(), granularity)
        bits += granularity == "log-script"  # whose sign comes on top
        assert max(len(row.unique()) for row in rows) <= 2 ** bits, what
        if granularity in LOG:
            check_log(exact, rows, 2 ** (bits - 1) - 1, dtype, what)
            continue
        low, high, largest = exact.amin(1, keepdim=True), exact.amax(1, keepdim=True), exact.abs().amax(1, keepdim=True)
        steps = 2 ** (bits - 1) - 1 if qtype == "INT" else 2 ** bits - 1
        scale = (largest if qtype == "INT" else high.clamp_min(0) - low.clamp_max(0)) / steps
        # The grid's ends lie at most half a step further out than the weights.
        slack = ROUNDING[dtype] * (largest + scale) + (dtype is torch.float16) * 6e-8
        assert bool(((rows - exact).abs() <= scale.clamp_min(1e-8) / 2 + slack).all()), what


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fitted_scales_have_about_the_least_squared_error(bits):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([[10.0 ** n] for n in range(6)])
    result, most = quantize(weight, bits, "FLOAT", "fitted"), 2 ** (bits - 1) - 1  # signed, whatever the type
    assert all(len(row.unique()) <= 2 * most + 1 for row in result)
    scales = weight.abs().amax(1, keepdim=True) / most * torch.linspace(0.05, 1, 400)[:, None, None]  # a fine search
    errors = ((weight / scales).round().clamp(-most, most) * scales - weight).square().sum(2).amin(0)
    error = (result - weight).square().sum(1)
    assert bool((error <= (1.03 if bits < 8 else 1.3) * errors).all()), error / errors
    assert bool((error <= (quantize(weight, bits, "INT", "learned") - weight).square().sum(1) * (1 + 1e-5)).all())
    assert not quantize(torch.zeros(2, 3), bits, "INT", "fitted").any()


def check_log(exact, rows, magnitudes, dtype, what):
    """At most so many magnitudes; signs kept; log2 of the magnitude within half a step (float16's subnormals apart)."""
    assert len(rows[rows != 0].abs().unique()) <= magnitudes and torch.equal(rows.sign(), exact.sign()), what
    normal = exact.abs() > (6.2e-5 if dtype is torch.float16 else 0)
    logs = exact[exact != 0].abs().log2()
    if len(logs):
        step = (logs.max() - logs.min()) / max(magnitudes - 1, 1)
        error = (exact[normal].abs().log2() - rows[normal].abs().log2()).abs()
        # float32 log2 of numbers up to 2^100 is good to about 1e-5
        assert bool((error <= step / 2 + 2 * ROUNDING[dtype] + 1e-5).all()), what


class DivisionAsOnCuda(TorchDispatchMode):
    """CUDA divides a tensor by a plain number by multiplying with the number's float32 reciprocal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.div.Tensor and isinstance(args[1], (int, float)):
            return args[0] * torch.tensor(1.0).div(torch.tensor(float(args[1])))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("where", ["cpu", "division as on cuda", "cuda"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_second_pass_changes_nothing(dtype, where):
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # FLOAT: 1e-6 max|W| where the output holds the grid, else one step of the output's type
    allowed = {torch.float32: 1e-6, torch.float16: 2 ** -10, torch.bfloat16: 2 ** -7}[dtype]
    names = CASES if dtype is torch.float32 else [*REDUCED, "dead channel", "1e-7", "ends", "random 9"]
    with DivisionAsOnCuda() if where == "division as on cuda" else nullcontext():
        for name, (qtype, granularity), bits in itertools.product(names, QUANTIZERS, BITS):
            weight = CASES[name].to(dtype).to("cuda" if where == "cuda" else "cpu")
            once = quantize(weight, bits, qtype, granularity)
            twice = quantize(once, bits, qtype, granularity)
            most = in_rows(weight, granularity).abs().amax(1, keepdim=True).float()
            moved = (in_rows(once, granularity).float() - in_rows(twice, granularity).float()).abs()
            assert torch.equal(once, twice) if qtype == "INT" else bool(
                (moved <= allowed * most + (dtype is torch.float16) * 6e-8).all()), (name, granularity, bits)


@pytest.mark.parametrize("qtype, granularity", QUANTIZERS)
def test_from_32_bits_on_nothing_changes_and_the_given_tensor_is_left_alone(qtype, granularity):
    for bits, weight in itertools.product((32, 64), (torch.randn(3, 5), torch.randn(3, 5).half())):
        result = quantize(weight, bits, qtype, granularity)
        assert torch.equal(result, weight) and result.dtype == weight.dtype and result.data_ptr() != weight.data_ptr()
    weight = torch.randn(3, 5, requires_grad=True)
    before, result = weight.detach().clone(), compress_kernel(weight, KernelConfig(4, 0.5, qtype, granularity))[0]
    assert not result.requires_grad and torch.equal(weight, before)


@pytest.mark.parametrize("bits", BITS)
def test_equal_grids_give_equal_bits(bits):
    for name, weight in CASES.items():
        for granularity in ("log", "learned", "log-script"):  # they ignore the type
            assert torch.equal(quantize(weight, bits, "INT", granularity), quantize(weight, bits, "FLOAT", granularity))
        learned, per_channel = (quantize(weight, bits, "INT", g) for g in ("learned", "per-channel"))  # ledger D2
        assert torch.equal(learned.view(torch.int32), per_channel.view(torch.int32)), name
        assert torch.equal(quantize(weight, bits, "INT", "log-script"), quantize(weight, bits + 1, "INT", "log"))  # D3


@pytest.mark.parametrize("qtype, granularity", QUANTIZERS)
def test_memory_layout_does_not_matter(qtype, granularity):
    plain = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(5))
    config = KernelConfig(4, 0.5, qtype, granularity)
    for weight in (plain.to(memory_format=torch.channels_last), plain.transpose(0, 2).contiguous().transpose(0, 2),
                   torch.stack([plain, plain + 1], dim=-1)[..., 0]):
        result = compress_kernel(weight, config)[0]
        assert not weight.is_contiguous() and torch.equal(result, compress_kernel(plain, config)[0])
        assert result.stride() == torch.empty_like(weight).stride()


# --- Pruning ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep, expected", [
    # norms 5, 1, 13, 5, 2: of the two fives the first stays
    (1.0, [1, 1, 1, 1, 1]), (0.8, [1, 0, 1, 1, 1]), (0.6, [1, 0, 1, 1, 0]), (0.4, [1, 0, 1, 0, 0]),
    (0.59, [1, 0, 1, 0, 0]), (0.2, [0, 0, 1, 0, 0]), (0.19, [0, 0, 1, 0, 0]), (0.001, [0, 0, 1, 0, 0])])
def test_prune_mask_by_hand(keep, expected):
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0], [-5.0, -12.0], [-4.0, 3.0], [2.0, 0.0]])
    for shaped in (weight, weight.reshape(5, 1, 2, 1), weight.reshape(5, 2, 1, 1)):
        mask = prune_mask(shaped, keep)
        assert mask.dtype == torch.bool and mask.tolist() == [bool(e) for e in expected]


def test_the_l2_norm_decides_in_full_precision():
    for rows, dtype, kept in (
            ([[5.0, 0.0, 0.0], [2.0, 2.0, 2.0]], torch.float32, 0),  # L1 norms 5 and 6, L2 norms 5 and 3.46
            ([[3.0, 0.0, 0.0], [2.0, 2.0, 2.0]], torch.float32, 1),  # largest entries 3 and 2, L2 norms 3 and 3.46
            ([[1.0, 0.0], [1.0, 0.0625]], torch.bfloat16, 1),  # sqrt(1 + 1/256) = 1.002 is 1 in bfloat16, yet no tie
            ([[6e4, 6e4, 0, 0], [6e4] * 4], torch.float16, 1)):  # norms beyond float16's largest number
        assert prune_mask(torch.tensor(rows, dtype=dtype), 0.5).nonzero().tolist() == [[kept]]


@pytest.mark.parametrize("keep, n_out, kept", [
    (0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.7, 10, 7), (1 - 0.4, 5, 3), (1 - 0.6, 5, 2), (0.4, 6, 2),
    (0.999, 1000, 999), (0.9989, 1000, 998), (0.4, 1, 1), (0.01, 64, 1), (0.3333333, 3, 1), (1.0, 7, 7),
    *((percent / 100, 100, percent) for percent in range(1, 100))])
def test_number_of_channels_kept(keep, n_out, kept):
    weight = torch.randn(n_out, 2, generator=torch.Generator().manual_seed(n_out))
    mask = prune_mask(weight, keep)
    assert int(mask.sum()) == kept
    norms = (weight ** 2).sum(1)
    assert kept == n_out or norms[mask].min() >= norms[~mask].max()


# --- One kernel: prune, then quantise --------------------------------------------------------------------------
@pytest.mark.parametrize("qtype, granularity", QUANTIZERS)
def test_compress_kernel_is_quantisation_of_the_pruned_tensor(qtype, granularity):
    for (name, weight), keep, bits in itertools.product(CASES.items(), (1.0, 0.75, 0.4, 0.01), (2, 3, 5, 8, 32)):
        result, mask = compress_kernel(weight, KernelConfig(bits, keep, qtype, granularity))
        assert torch.equal(mask, prune_mask(weight, keep)) and not result[~mask].any(), name
        pruned = weight.clone()
        pruned[~mask] = 0
        assert torch.equal(result, quantize(pruned, bits, qtype, granularity)), (name, keep, bits)


# --- Accounting: Eq. 21-22, 29-36 ------------------------------------------------------------------------------
@pytest.mark.parametrize("bits, keep, granularity, n_out, expected", [
    (8, 1.0, "uniform", 7, 0.25), (4, 0.5, "uniform", 8, 0.0625), (3, 0.4, "learned", 10, 0.0375),
    (3, 0.4, "log", 6, 0.03125), (3, 0.4, "log-script", 10, 0.05), (8, 1.0, "log-script", 3, 0.28125),
    (8, 0.01, "per-channel", 4, 0.0625), (32, 1.0, "uniform", 5, 1.0), (32, 0.29, "log-script", 100, 0.29),
    (40, 0.5, "uniform", 4, 0.5)])
def test_kernel_retained_by_hand(bits, keep, granularity, n_out, expected):
    assert kernel_retained(KernelConfig(bits, keep, "INT", granularity), n_out) == pytest.approx(expected, rel=1e-12)


# Two blocks. Retained fractions of the kernels:
#   4/32 * 4/8 = 1/16 of 64 weights (4), 8/32 of 32 (8)                                          → 12 of 96
#   3/32 * 4/10 = 0.0375 of 160 (6), 8/32 * 3/6 = 0.125 of 48 (6), 4/32 of 16 (2)                → 14 of 224
FIRST = BlockConfig((KernelConfig(4, 0.5), KernelConfig(8, 1.0, "FLOAT", "per-channel")),
                    (KernelShape(8, 64), KernelShape(4, 32)))
SECOND = BlockConfig((KernelConfig(3, 0.4, "INT", "log"), KernelConfig(8, 0.6, "INT", "learned"), KernelConfig(4, 1.0)),
                     (KernelShape(10, 160), KernelShape(6, 48), KernelShape(2, 16)))
NETWORK = NetworkConfig((FIRST, SECOND))


def test_network_statistics_by_hand():
    assert (FIRST.params, SECOND.params, NETWORK.params) == (96, 224, 320)
    assert FIRST.per_kernel + SECOND.per_kernel == pytest.approx((0.0625, 0.25, 0.0375, 0.125, 0.125))
    assert (FIRST.retained, SECOND.retained) == pytest.approx((0.125, 0.0625))
    assert (FIRST.average_bits, SECOND.average_bits) == pytest.approx((6.0, 5.0))
    assert (FIRST.average_keep, SECOND.average_keep) == pytest.approx((0.75, 1.9 / 3))  # 0.6 of 6 channels is 3
    assert (NETWORK.retained, NETWORK.cr, NETWORK.msr) == pytest.approx((0.08125, 12.3076923, 0.91875))  # 26 / 320
    assert NETWORK.cr_unweighted == pytest.approx(7.9338843)  # 2 / (0.15625 + 0.0958333)
    assert NETWORK.sparsity == pytest.approx(0.475)  # 152 / 320
    assert (NETWORK.joined.average_bits, NETWORK.joined.average_keep) == pytest.approx((5.4, 0.68))  # over five kernels


def test_the_scripts_log_grid_is_charged_in_every_ratio():
    block = BlockConfig((KernelConfig(3, 0.5, "INT", "log-script"),), (KernelShape(4, 64),))
    network = NetworkConfig((block,))
    assert block.retained == network.retained == 0.0625 and network.cr == network.cr_unweighted == 16
    assert block.average_bits == network.joined.average_bits == 4
    assert kernel_bytes(block.kernels[0], block.shapes[0]) == 25  # 32 weights of 4 bits, two ends, a map of 1 byte


def test_bounds_where_the_channels_divide():  # Eq. 32-36: rho in [3/32 * 0.4, 8/32], CR in [4, 26.67]
    for bits, keep, rho in ((3, 0.4, 0.0375), (8, 1.0, 0.25)):
        block = BlockConfig((KernelConfig(bits, keep),) * 2, (KernelShape(5, 50), KernelShape(10, 70)))
        n = NetworkConfig((block, block))
        assert (n.retained, n.msr, n.cr, n.cr_unweighted) == pytest.approx((rho, 1 - rho, 1 / rho, 1 / rho))


# --- A network of ten weights ----------------------------------------------------------------------------------
class Ten(nn.Module):
    """Kernels of 2x3 and 2x2 weights, with biases and a norm that compression must not touch."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.a.weight.data = torch.tensor([[3.0, -1.4, 0.6], [0.5, 0.5, 0.5]])
        self.b.weight.data = torch.tensor([[-1.0, 2.0], [0.4, 1.3]])

    def blocks(self):
        return [SimpleNamespace(name="first", kernels={"a": self.a}),
                SimpleNamespace(name="second", kernels={"b": self.b})]


TEN = NetworkConfig((BlockConfig((KernelConfig(3, 0.5),), (KernelShape(2, 6),)),
                     BlockConfig((KernelConfig(2, 1.0, "FLOAT"),), (KernelShape(2, 4),))))
BOTH = {"a.weight", "b.weight"}


def changed(before, model):
    """Names of the tensors that are not as in the state dict ``before``."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_compress_network_by_hand():
    model = Ten()
    before, parameter = copy.deepcopy(model.state_dict()), model.a.weight
    masks = compress_network(model.blocks(), TEN)
    assert {name: mask.tolist() for name, mask in masks.items()} == {"a": [True, False], "b": [True, True]}
    torch.testing.assert_close(model.a.weight.data, torch.tensor([[3.0, -1.0, 1.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(model.b.weight.data, torch.tensor([[-1.0, 2.0], [0.0, 1.0]]))
    assert model.a.weight is parameter and parameter.requires_grad and changed(before, model) == BOTH
    assert TEN.sparsity == pytest.approx(0.3)
    assert TEN.retained == pytest.approx(0.053125)  # (6 * 3/64 + 4 * 1/16) / 10


def test_snap_to_grid_by_hand():
    model = Ten()
    masks = compress_network(model.blocks(), TEN)
    model.a.weight.data = torch.tensor([[6.0, -1.7, 2.8], [9.0, 9.0, 9.0]])  # steps that moved the pruned ones too
    model.b.weight.data = torch.tensor([[-0.5, 1.0], [0.2, 0.65]])
    before = copy.deepcopy(model.state_dict())
    grids = snap_to_grid(model.blocks(), TEN, masks)
    # scale 6 / 3 (the pruned nines count for nothing); scale 1.5 / 3 with zero-point 1
    torch.testing.assert_close(model.a.weight.data, torch.tensor([[6.0, -2.0, 2.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(model.b.weight.data, torch.tensor([[-0.5, 1.0], [0.0, 0.5]]))
    assert grids["a"].scale == 2 and (grids["b"].scale, grids["b"].zero) == (0.5, 1)
    assert changed(before, model) == BOTH
    once = copy.deepcopy(model.state_dict())
    snap_to_grid(model.blocks(), TEN, masks)
    assert not changed(once, model)
    snap_to_grid(model.blocks(), TEN, masks | {"a": torch.tensor([False, True])})  # norms do not decide any more
    assert not model.a.weight.any()


def test_mask_factors_by_hand():
    conv = nn.Conv2d(2, 3, 3)
    (weight, factor), = mask_factors([SimpleNamespace(kernels={"c": conv})], {"c": torch.tensor([True, False, True])})
    assert weight is conv.weight and torch.equal(factor, torch.tensor([1.0, 0.0, 1.0])[:, None, None, None])


@pytest.mark.parametrize("masks, message", [
    ({"a": torch.tensor([True, False])}, r"kernels \['b'\] have no mask"),
    ({name: torch.tensor([True, False]) for name in "abd"}, r"\['d'\]"),
    *(({"a": mask, "b": torch.tensor([True, True])}, "mask of a: expected bool") for mask in (
        torch.tensor([1.0, 0.0]), torch.tensor([[True], [False]]), torch.tensor(True)))])
def test_masks_that_do_not_fit_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        mask_factors(Ten().blocks(), masks)


# --- Bytes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits, keep, qtype, granularity, expected", [
    # 10 channels of 16 weights
    (3, 1.0, "INT", "uniform", 60 + 4), (3, 0.4, "INT", "uniform", 24 + 4 + 2),
    (4, 1.0, "FLOAT", "uniform", 80 + 5), (12, 1.0, "FLOAT", "uniform", 240 + 4 + 2),
    (4, 0.4, "INT", "per-channel", 32 + 4 * 4 + 2), (4, 0.4, "FLOAT", "per-channel", 32 + 4 * 5 + 2),
    (8, 1.0, "FLOAT", "per-channel", 160 + 10 * 5),
    (4, 0.5, "INT", "learned", 40 + 5 * 4 + 2), (4, 0.5, "FLOAT", "learned", 40 + 5 * 4 + 2),
    (3, 1.0, "INT", "log", 60 + 8), (3, 0.9, "FLOAT", "log", 54 + 8 + 2), (3, 1.0, "INT", "log-script", 80 + 8),
    (32, 1.0, "INT", "uniform", 640), (32, 0.4, "FLOAT", "per-channel", 256 + 2), (32, 1.0, "INT", "log-script", 640)])
def test_kernel_bytes_by_hand(bits, keep, qtype, granularity, expected):
    assert kernel_bytes(KernelConfig(bits, keep, qtype, granularity), KernelShape(10, 160)) == expected
    assert kernel_bytes(KernelConfig(3, 0.4), KernelShape(1, 3)) == 2 + 4  # nine bits; the one channel stays


def test_a_configuration_or_masks_of_another_network_are_refused_before_anything_changes():
    model = Ten()
    blocks, before = model.blocks(), copy.deepcopy(model.state_dict())
    first, second = TEN.blocks
    wider = NetworkConfig((first, BlockConfig(second.kernels, (KernelShape(7, 7),))))
    masks = {name: torch.ones(2, dtype=torch.bool) for name in "ab"}
    for change in (compress_network, lambda b, c: snap_to_grid(b, c, masks)):
        for some, config, message in ((blocks[:1], TEN, "of 2 blocks for 1"), (blocks[::-1], TEN, "second: .*shapes"),
                                      (blocks, wider, "second: .*shapes")):
            with pytest.raises(ValueError, match=message):
                change(some, config)
    with pytest.raises(ValueError, match="have no mask"):
        snap_to_grid(blocks, TEN, {})
    assert not changed(before, model)
