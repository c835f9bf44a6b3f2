"""The packed file of a compressed network: b-bit codes of the kept channels, and everything else as it is.

A packed file is one ``torch.save`` of three uint8 tensors, so that ``torch.load(FILE, weights_only=True)`` reads it:

``header``  magic, version (uint32), SHA-256 of version, index and blob
``index``   zlib-compressed JSON: the network, its blocks and kernels, the tensors that are no kernels
``blob``    for each kernel in the index's order: bitmap of kept channels (absent when all stay), scales (float32),
            zero-points (ceil(b/8) bytes each), codes of the kept rows (``storage_bits`` each, from the lowest bit up);
            a kernel of 32 bits has its kept rows in its own type in place of scales and codes; then the other tensors

Nothing in the index says where a part begins: sizes follow from shapes and bits, and must add up to the blob's length.
All numbers are little-endian. Reading runs nothing that is in the file (:mod:`checkpoints`) and takes a file for
hostile, also when its digest is right: shapes are checked before memory is taken for them.

    python pack.py info FILE               # what is in it: per block and kernel bits, channels, bytes
    python pack.py export FILE OUT.pt2     # the narrow network through torch.export, which needs none of this code
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import models
from support.weights import read_checkpoint, shown
from compress import (FULL_BITS, BlockConfig, Grid, KernelConfig, KernelShape, NetworkConfig, channels_kept, decode,
                      encode, kernel_shapes)
from config import InputError
from support.files import replace_file
from support.own import own_network
from evidence.report import survive_ascii

MAGIC = b"HiReLC packed\n"
VERSION = 1
MAX_BITS = 16  # of a code; above there are only raw rows
MAX_INDEX = 4 << 20  # bytes of JSON, some 30,000 tensors: zlib and JSON both make much of little
MAX_SIDE, MAX_SIDES = 1 << 40, 64  # of a tensor; 64 is torch's and numpy's own limit
# Weights that a kernel may have per byte of the blob, beyond the first million: four 2-bit codes to the byte, and of
# 199 channels at least one stays at the strongest pruning that a setting allows, 0.99, makes 796.
EXPANSION, FREE_WEIGHTS = 1024, 1 << 20
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# ---------------------------------------------------------------------------------------------------------------
# What a packed file holds


@dataclass(frozen=True)
class PackedKernel:
    """One kernel. ``tensors``: all its names in the state dict; ``shape`` [n_out, …] and ``dtype`` of the whole;
    ``kept``: channels in the file; ``config``: its bits, numeric type and granularity, ``keep`` as really kept."""
    name: str
    tensors: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int
    config: KernelConfig

    @property
    def params(self) -> int:
        """Weights before pruning."""
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Bytes of bitmap, scales, zero-points, and codes (or raw rows)."""
        n_out, weights = self.shape[0], self.kept * math.prod(self.shape[1:])
        bitmap = 0 if self.kept == n_out else math.ceil(n_out / 8)
        bits, granularity = self.config.bits, self.config.granularity
        if bits == FULL_BITS:
            return bitmap, 0, 0, weights * self.dtype.itemsize
        scales = 2 if granularity in ("log", "log-script") else 1 if granularity == "uniform" else self.kept
        zeros = scales if self.config.qtype == "FLOAT" and granularity in ("uniform", "per-channel") else 0
        return bitmap, 4 * scales, zeros * math.ceil(bits / 8), math.ceil(weights * self.config.storage_bits / 8)

    @property
    def bytes(self) -> int:
        """Bytes in the file; compress.kernel_bytes for all but raw rows of another type than float32."""
        return sum(self.parts)


@dataclass(frozen=True)
class PackedBlock:
    """The kernels of one block, in order."""
    name: str
    kernels: tuple[PackedKernel, ...]

    @property
    def config(self) -> BlockConfig:
        """The block's configuration, with the statistics of the paper's accounting."""
        return BlockConfig(tuple(k.config for k in self.kernels),
                           tuple(KernelShape(k.shape[0], k.params) for k in self.kernels))

    @property
    def bytes(self) -> int:
        """Bytes of its kernels in the file."""
        return sum(k.bytes for k in self.kernels)


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is no kernel. ``names``: all its names in the state dict; ``dtype``: the network's; ``stored``:
    the file's."""
    names: tuple[str, ...]
    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.stored.itemsize


@dataclass(frozen=True)
class Packed:
    """A packed file as read: everything but the tensors, which :func:`state` unpacks. ``where``: the file's name for
    messages; ``network``: how to rebuild the network; ``channels_last``: whether it ran in that memory format."""
    where: str
    network: dict
    channels_last: bool
    blocks: tuple[PackedBlock, ...]
    rest: tuple[PackedTensor, ...]
    index_bytes: int
    file_bytes: int
    blob: Tensor = field(repr=False, compare=False)

    @property
    def kernels(self) -> tuple[PackedKernel, ...]:
        """The kernels of all blocks, in order."""
        return tuple(kernel for block in self.blocks for kernel in block.kernels)

    @property
    def config(self) -> NetworkConfig:
        """The configuration of all blocks; its ``cr`` is Eq. 22's."""
        return NetworkConfig(tuple(block.config for block in self.blocks))

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the kernels in the file."""
        return sum(block.bytes for block in self.blocks)

    @property
    def rest_bytes(self) -> int:
        """Bytes of the other tensors in the file."""
        return sum(tensor.bytes for tensor in self.rest)

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of all tensors in the network's own types, shared ones once."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in (*self.kernels, *self.rest))

    @property
    def ratio(self) -> float:
        """Bytes of the network / bytes of the file."""
        return self.unpacked_bytes / self.file_bytes


# ---------------------------------------------------------------------------------------------------------------
# Bits


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n], 0 <= code < 2^bits, bits <= 17 → uint8 [ceil(n · bits / 8)], lowest bit first, unused bits 0."""
    groups = np.zeros((math.ceil(len(codes) / 8), 8), np.int32)  # eight codes fill ``bits`` bytes
    groups.reshape(-1)[:len(codes)] = codes
    data = np.zeros((len(groups), bits), np.uint8)
    for code, first, last, shift in _places(bits):
        shifted = groups[:, code] << shift
        for byte in range(first, last + 1):
            data[:, byte] |= (shifted >> 8 * (byte - first)).astype(np.uint8)
    return data.reshape(-1)[:math.ceil(len(codes) * bits / 8)]


def unpack_bits(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The ``count`` codes, int32, that :func:`pack_bits` put in ``data``."""
    groups = np.zeros((math.ceil(count / 8), bits), np.uint8)
    groups.reshape(-1)[:len(data)] = data
    codes = np.empty((len(groups), 8), np.int32)
    for code, first, last, shift in _places(bits):
        shifted = groups[:, first].astype(np.int32)
        for byte in range(first + 1, last + 1):
            shifted |= groups[:, byte].astype(np.int32) << 8 * (byte - first)
        codes[:, code] = shifted >> shift & (1 << bits) - 1
    return codes.reshape(-1)[:count]


def _places(bits):
    """For each of eight codes: its number, first and last byte, and its place within the first."""
    return [(code, code * bits // 8, (code * bits + bits - 1) // 8, code * bits % 8) for code in range(8)]


# ---------------------------------------------------------------------------------------------------------------
# Packing


@torch.no_grad()
def pack(model: nn.Module, blocks, config: NetworkConfig, masks: dict[str, Tensor], grids: dict[str, Grid | None],
         network: dict, rest: str = "float32", notes: list[str] | None = None) -> bytes:
    """The packed file of a compressed network, as bytes for :func:`write`.

    model: holds weights on their grids with pruned rows at zero, as :func:`compress.snap_to_grid` leaves them and its
    ``grids``. masks: kernel → bool [n_out]. network: plain data that says how to rebuild the network: ``name``,
    ``num_classes``, ``image_size``, ``width``, ``patch_size``, ``quick_gelu`` for this project's, ``name`` "" for any
    other; further keys are kept as they are. rest: ``float32`` stores the tensors that are no kernels as they are,
    ``float16`` those of float32 and float64 in half precision, except where a value would overflow, which ``notes``
    is told in one sentence per tensor.

    Raises ValueError naming the kernel whose weights are not exactly what the file would give back, or where
    configuration, masks or grids are of other kernels; InputError for a state dict that cannot be stored.
    """
    if rest not in ("float32", "float16"):
        raise InputError(f"pack.rest={rest!r}: expected float32 or float16")
    names = {name for block in blocks for name in block.kernels}
    if [kernel_shapes(block) for block in blocks] != [block.shapes for block in config.blocks] \
            or names != set(masks) or names != set(grids):
        raise ValueError("configuration, masks and grids must be those of the blocks' kernels")
    shared: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)  # the parameters themselves: a tied one is the same object
    odd = [name for name, tensor in state.items() if not _storable(tensor)]
    if odd:
        raise InputError(f"{type(model).__name__} cannot be packed: {', '.join(odd)} of its state dict "
                         f"{'is' if len(odd) == 1 else 'are'} no plain tensors; register plain tensors as buffers, or "
                         "leave them out of the state dict")
    for name, tensor in state.items():
        shared.setdefault(id(tensor), []).append(name)

    index, blob = {"network": network, "channels_last": _channels_last(model), "blocks": [], "rest": []}, []
    for block, block_config in zip(blocks, config.blocks):
        entries = []
        for (name, module), kernel in zip(block.kernels.items(), block_config.kernels):
            if id(module.weight) not in shared:
                raise InputError(f"{type(model).__name__} cannot be packed: the weight of kernel {name} is not in its "
                                 "state dict")
            packed = PackedKernel(name, tuple(shared.pop(id(module.weight))), module.weight.dtype,
                                  tuple(module.weight.shape), int(masks[name].sum()),
                                  KernelConfig(min(kernel.bits, FULL_BITS), 1.0, kernel.qtype, kernel.granularity))
            if packed.kept != channels_kept(kernel.keep, len(module.weight)):
                raise ValueError(f"kernel {name}: its mask keeps {packed.kept} channels, its configuration "
                                 f"{channels_kept(kernel.keep, len(module.weight))}")
            blob.append(_pack_kernel(packed, module.weight.detach().cpu(), masks[name].cpu(), grids[name]))
            entries.append([name, packed.tensors, DTYPE_NAMES[packed.dtype], packed.shape, packed.config.bits,
                            packed.kept, kernel.qtype, kernel.granularity])
        index["blocks"].append([block.name, entries])
    for same in shared.values():
        tensor = state[same[0]].detach().cpu()
        stored = _stored(tensor, rest)
        if rest == "float16" and stored.dtype in (torch.float32, torch.float64) and notes is not None:
            notes.append(f"{same[0]} stays {DTYPE_NAMES[stored.dtype]}: float16 would make infinities of it")
        blob.append(_raw(stored))
        index["rest"].append([same, DTYPE_NAMES[tensor.dtype], DTYPE_NAMES[stored.dtype], list(tensor.shape)])

    text = json.dumps(index, separators=(",", ":"), allow_nan=False).encode()
    blob = np.concatenate(blob)
    if len(text) > MAX_INDEX:
        raise InputError(f"{type(model).__name__} cannot be packed: the list of its tensors takes {len(text)} bytes, "
                         f"at most {MAX_INDEX} can be read back")
    _layout(json.loads(text), len(blob))  # nothing is written that could not be read
    text = zlib.compress(text, 9)
    header = MAGIC + VERSION.to_bytes(4, "little") + _digest(VERSION, text, blob)
    file = io.BytesIO()
    torch.save({"header": torch.frombuffer(bytearray(header), dtype=torch.uint8),
                "index": torch.frombuffer(bytearray(text), dtype=torch.uint8), "blob": torch.from_numpy(blob)}, file)
    return file.getvalue()


def _storable(tensor):
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.dtype in DTYPE_NAMES \
        and not tensor.is_meta


def _channels_last(model):
    """Whether the network's 4-d parameters have channels last. The last bits of a convolution depend on it."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights) \
        and not all(p.is_contiguous() for p in weights)


def _digest(version, index, blob):
    digest = hashlib.sha256(version.to_bytes(4, "little") + len(index).to_bytes(8, "little") + index)
    digest.update(blob)
    return digest.digest()


def _raw(tensor) -> np.ndarray:
    """The bytes of a tensor in the order of its indices, uint8 [n]."""
    return tensor.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8).numpy()


def _stored(tensor, rest):
    """``tensor`` as the file keeps it."""
    if rest == "float16" and tensor.dtype in (torch.float32, torch.float64):
        half = tensor.half()
        return half if torch.equal(half.isinf(), tensor.isinf()) else tensor
    return tensor


def _pack_kernel(kernel, weight, mask, grid):
    """The kernel's part of the blob, uint8 [n]; ValueError unless it gives ``weight`` back bit for bit."""
    config = kernel.config
    if kernel.dtype not in KERNEL_DTYPES or mask.dtype != torch.bool or mask.shape != (len(weight),):
        raise ValueError(f"kernel {kernel.name}: expected floats and a bool mask [{len(weight)}], got {weight.dtype} "
                         f"and {mask.dtype} {list(mask.shape)}")
    if (grid is None) != (config.bits == FULL_BITS) or grid is not None and \
            (grid.bits, grid.qtype, grid.granularity) != (config.bits, config.qtype, config.granularity):
        raise ValueError(f"kernel {kernel.name}: its grid is not of its configuration")
    if MAX_BITS < config.bits < FULL_BITS:
        raise ValueError(f"kernel {kernel.name}: codes of {config.bits} bits, expected at most {MAX_BITS}, or "
                         f"{FULL_BITS} for none")
    rows = weight[mask]
    parts = [np.packbits(mask.numpy(), bitorder="little")] if kernel.parts[0] else []
    if grid is None:
        parts.append(_raw(rows))
    else:
        grid = Grid(grid.bits, grid.qtype, grid.granularity,
                    *(None if t is None else t.cpu() for t in (grid.scale, grid.zero, grid.high)))
        codes, (low, high) = encode(rows.float(), grid), grid.code_range
        if not bool(((codes >= low) & (codes <= high)).all()):
            raise ValueError(f"kernel {kernel.name}: some of its weights are not finite")
        parts.append(_raw(grid.scale))
        if grid.zero is not None:
            zeros = grid.zero.reshape(-1, 1).numpy().astype("<u4").view(np.uint8)  # [scales, 4]
            parts.append(zeros[:, :math.ceil(config.bits / 8)].reshape(-1))
        parts.append(pack_bits((codes.reshape(-1) - low).to(torch.int32).numpy(), config.storage_bits))
    data = np.concatenate(parts)
    if not np.array_equal(_raw(_unpack_kernel(kernel, data)), _raw(weight)):  # bytes: -0 is not +0, NaN is itself
        raise ValueError(f"kernel {kernel.name}: its weights are not on their grid, or its pruned rows are not +0; "
                         "put them there first, on the CPU (compress.snap_to_grid)")
    return data


def write(path, data: bytes) -> None:
    """Write a whole file or nothing. Raises OSError."""
    replace_file(path, lambda file: file.write(data))


# ---------------------------------------------------------------------------------------------------------------
# Reading


def read(file) -> Packed:
    """What is in a packed file (a path, or its bytes), without unpacking its tensors.

    Raises InputError, one line, for a file that is absent, of another kind or version, truncated or edited.
    """
    if isinstance(file, (bytes, bytearray, memoryview)):
        with tempfile.TemporaryDirectory() as folder:  # checkpoints reads files
            path = os.path.join(folder, "packed.pt")
            Path(path).write_bytes(file)
            return _read(path, "packed bytes")
    path = os.fspath(file)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; a run leaves packed.pt in its run directory")
    return _read(path, path)


def _read(path, where):
    try:
        parts = read_checkpoint(path)
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{where}: not a packed file, or damaged: {reason}") from None
    if set(parts) != {"header", "index", "blob"} or any(t.dtype != torch.uint8 or t.dim() != 1 for t in parts.values()):
        raise InputError(f"{where}: not a packed file of this program: it holds other tensors ("
                         f"{', '.join(map(shown, list(parts)[:3]))}…); give the packed.pt of a run")
    header, index, blob = (bytes(parts["header"].numpy()), bytes(parts["index"].numpy()), parts["blob"].contiguous())
    if not header.startswith(MAGIC) or len(header) != len(MAGIC) + 36:
        raise InputError(f"{where}: not a packed file: its magic is {ascii(header[:len(MAGIC)])} in a header of "
                         f"{len(header)} bytes, expected {ascii(MAGIC)} in {len(MAGIC) + 36}; give the packed.pt of a "
                         "run")
    version = int.from_bytes(header[len(MAGIC):-32], "little")
    if version != VERSION:
        raise InputError(f"{where}: packed file of version {version}, expected {VERSION}; read it with the program "
                         "that wrote it, or pack the network again")
    if header[-32:] != _digest(version, index, blob.numpy()):
        raise InputError(f"{where}: damaged or edited: its SHA-256 does not fit what it holds; copy the file again, or "
                         "pack the network again")
    with _told(where):
        inflate = zlib.decompressobj()
        text = inflate.decompress(index, MAX_INDEX)
        if not inflate.eof or inflate.unused_data:
            raise ValueError(f"an index that ends elsewhere, or of more than {MAX_INDEX} bytes")
        return Packed(where, *_layout(json.loads(text.decode("utf-8")), len(blob)), len(index),
                      os.path.getsize(path), blob)


@contextlib.contextmanager
def _told(where):
    """Turns what the content of a damaged file can raise into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, zlib.error) as error:
        reason = shown(" ".join(f"{type(error).__name__}: {error}".split()).removeprefix("ValueError: "))
        raise InputError(f"{where}: damaged packed file: {reason}; copy the file again, or pack the network "
                         "again") from None


def _layout(index, size):
    """Checks an index against the blob's ``size`` in bytes → network, channels_last, blocks, rest.

    Raises ValueError, TypeError, LookupError or ArithmeticError; whatever passes takes no more memory than size ·
    (EXPANSION weights, or four times itself).
    """
    network, channels_last = index["network"], index["channels_last"]
    if type(network) is not dict or type(channels_last) is not bool or len(index) != 4:
        raise ValueError("an index of another form")
    blocks = tuple(PackedBlock(_text(name), tuple(map(_kernel, kernels))) for name, kernels in index["blocks"])
    rest = tuple(map(_tensor, index["rest"]))
    kernels = [kernel for block in blocks for kernel in block.kernels]
    if not kernels or not all(block.kernels for block in blocks):
        raise ValueError("a block without kernels, or no blocks")
    if len({kernel.name for kernel in kernels}) != len(kernels):
        raise ValueError("two kernels of one name")
    names = [name for entry in kernels for name in entry.tensors] + [name for entry in rest for name in entry.names]
    if len(set(names)) != len(names):
        raise ValueError("two tensors of one name")
    total = sum(entry.bytes for entry in (*kernels, *rest))
    if total != size:
        raise ValueError(f"tensors of {total} bytes in all, where there are {size}")
    weights = sum(kernel.params for kernel in kernels)
    if weights > FREE_WEIGHTS + EXPANSION * size:
        raise ValueError(f"kernels of {weights} weights out of {size} bytes, more than {EXPANSION} to the byte")
    return network, channels_last, blocks, rest


def _kernel(entry):
    name, tensors, dtype, shape, bits, kept, qtype, granularity = entry
    shape, dtype = _shape(shape), DTYPES[dtype]
    if not shape or not all(shape) or type(kept) is not int or not 1 <= kept <= shape[0] or \
            bits > MAX_BITS and bits != FULL_BITS or dtype not in KERNEL_DTYPES:
        raise ValueError(f"kernel {_text(name)}: {kept} channels of {list(shape)} at {bits} bits")
    return PackedKernel(_text(name), _names(tensors), dtype, shape, kept,
                        KernelConfig(bits, kept / shape[0], qtype, granularity))


def _tensor(entry):
    names, dtype, stored, shape = entry
    dtype, stored = DTYPES[dtype], DTYPES[stored]
    if stored != dtype and (stored, dtype) not in ((torch.float16, torch.float32), (torch.float16, torch.float64)):
        raise ValueError(f"{dtype} stored as {stored}")
    return PackedTensor(_names(names), dtype, stored, _shape(shape))


def _shape(value):
    if type(value) not in (list, tuple) or len(value) > MAX_SIDES or \
            not all(type(n) is int and 0 <= n <= MAX_SIDE for n in value) or \
            math.prod(n or 1 for n in value) > MAX_SIDE:  # torch multiplies the sides, also of an empty tensor
        raise ValueError("a tensor of an impossible shape")
    return tuple(value)


def _text(value):
    if type(value) is not str:
        raise ValueError("a name that is no text")
    return value


def _names(value):
    if type(value) is not list or not value:
        raise ValueError("a tensor without names")
    return tuple(map(_text, value))


def state(packed: Packed) -> dict[str, Tensor]:
    """The state dict in a packed file, on the CPU: every tensor in the network's type and shape, under all its names.
    Raises InputError for a file whose codes, scales or bitmaps make no sense."""
    tensors, at = {}, 0
    with _told(packed.where):
        for entry in (*packed.kernels, *packed.rest):
            data, at = packed.blob[at:at + entry.bytes], at + entry.bytes
            if isinstance(entry, PackedKernel):
                tensors.update(dict.fromkeys(entry.tensors, _unpack_kernel(entry, data.numpy())))
            else:
                tensors.update(dict.fromkeys(entry.names, _typed(data, entry.stored).to(entry.dtype)
                                             .reshape(entry.shape)))
    return tensors


def _typed(data, dtype):
    """uint8 [n] → a copy of it as a 1-d tensor of ``dtype``."""
    return data != 0 if dtype == torch.bool else data.clone().view(dtype)


def _unpack_kernel(kernel, data):
    """The kernel's part of the blob, uint8 [n] → its weight [n_out, …]."""
    bitmap, scales, zeros, codes = np.split(data, np.cumsum(kernel.parts)[:-1])
    bits = np.unpackbits(bitmap, bitorder="little") if len(bitmap) else np.ones(kernel.shape[0], np.uint8)
    if bits.sum() != kernel.kept or bits[kernel.shape[0]:].any():
        raise ValueError(f"kernel {kernel.name}: a bitmap of {bits.sum()} channels, expected {kernel.kept}")
    shape = (kernel.kept, *kernel.shape[1:])
    if kernel.config.bits == FULL_BITS:
        rows = _typed(torch.from_numpy(codes), kernel.dtype).reshape(shape)
    else:
        grid = _unpack_grid(kernel, scales, zeros)
        storage_bits, count, (low, high) = kernel.config.storage_bits, math.prod(shape), grid.code_range
        if count * storage_bits % 8 and codes[-1] >> count * storage_bits % 8:
            raise ValueError(f"kernel {kernel.name}: bits behind its last code")
        values = torch.from_numpy(unpack_bits(codes, storage_bits, count)) + low
        if int(values.max()) > high:
            raise ValueError(f"kernel {kernel.name}: a code beyond {high}")
        rows = decode(values.float().reshape(shape), grid).to(kernel.dtype)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"kernel {kernel.name}: weights that are not finite")
    if kernel.kept == kernel.shape[0]:
        return rows
    weight = torch.zeros(kernel.shape, dtype=kernel.dtype)
    weight[torch.from_numpy(bits[:kernel.shape[0]] != 0)] = rows
    return weight


def _unpack_grid(kernel, scales, zeros):
    config = kernel.config
    # Of one scale for the tensor, of one per channel, of a log grid's two ends.
    shape = {"uniform": (), "log": (2,), "log-script": (2,)}.get(
        config.granularity, (kernel.kept, *[1] * (len(kernel.shape) - 1)))
    scale = _typed(torch.from_numpy(scales), torch.float32).reshape(shape)
    if not bool(((scale > 0) & scale.isfinite()).all()) or shape == (2,) and scale[0] > scale[1]:
        raise ValueError(f"kernel {kernel.name}: scales that are not positive, finite and in order")
    zero = None
    if len(zeros):
        whole = np.zeros((scale.numel(), 4), np.uint8)
        whole[:, :math.ceil(config.bits / 8)] = zeros.reshape(scale.numel(), -1)
        if whole.view("<u4").max() >= 2 ** config.bits:
            raise ValueError(f"kernel {kernel.name}: a zero-point beyond its codes")
        zero = torch.from_numpy(whole.view("<u4").astype(np.float32)).reshape(shape)
    return Grid(config.bits, config.qtype, config.granularity, scale, zero)


def load(file, model: nn.Module | None = None) -> nn.Module:
    """The network of a packed file (a path, or its bytes), in eval mode and in the memory format that it ran in.

    Without ``model`` one of this project's is rebuilt, on the CPU; a network of one's own is given as ``model``, of
    which everything is filled, in place, or nothing. Tensors get the values and types that the network had, bit for
    bit unless pack.rest=float16 rounded them. No random numbers are drawn. Raises InputError as :func:`read`, and
    naming all that is missing, unexpected, or of another shape or type.
    """
    packed = read(file)
    build = model is None
    if build:
        model = _build(packed)
    own = model.state_dict()
    _check_fit(packed, own, build)
    tensors = state(packed)
    if build:
        model.load_state_dict(tensors, assign=True)
    else:
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
    if packed.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.eval()


def _build(packed):
    """One of this project's networks without any numbers: what a file claims to be takes no memory yet."""
    network = packed.network
    if not network.get("name"):
        raise InputError(f"{packed.where}: a network of one's own ({shown(network.get('source', ''))}); make it and "
                         "give it: pack.load(FILE, model=mine)")
    try:
        with torch.device("meta"):
            model = models.build(*(network[key] for key in ("name", "num_classes", "image_size", "width",
                                                            "patch_size")))
        if network.get("quick_gelu"):
            models.set_quick_gelu(model, True)
    except Exception as error:  # whatever a number or word of a file's choice leads to
        raise InputError(f"{packed.where}: its network cannot be built: {type(error).__name__}: "
                         f"{shown(' '.join(str(error).split()))}; pack the network again") from None
    return model


def _check_fit(packed, own, build):
    """InputError unless the file's tensors are those of the state dict ``own``. A network just built takes over their
    types, as long as floats stay floats."""
    held = {name: (entry.shape, entry.dtype) for entry in packed.kernels for name in entry.tensors}
    held.update({name: (entry.shape, entry.dtype) for entry in packed.rest for name in entry.names})
    problems = [f"missing: {shown(name)}" for name in own if name not in held]
    problems += [f"unexpected: {shown(name)}" for name in held if name not in own]
    for name, (shape, dtype) in held.items():
        if name not in own:
            continue
        tensor = own[name]
        if not isinstance(tensor, Tensor):
            problems.append(f"type: {shown(name)} is a tensor in the file, not in the network")
        elif tensor.shape != shape:
            problems.append(f"shape: {shown(name)} {list(shape)} (file) vs {list(tensor.shape)} (network)")
        elif tensor.is_floating_point() != dtype.is_floating_point or tensor.dtype != dtype and not build:
            problems.append(f"type: {shown(name)} {dtype} (file) vs {tensor.dtype} (network)")
    if problems:
        more = f"; and {len(problems) - 1000} more" if len(problems) > 1000 else ""
        raise InputError(f"{packed.where} does not fit the network; {'; '.join(problems[:1000])}{more}")


# ---------------------------------------------------------------------------------------------------------------
# Command line


def info(packed: Packed) -> str:
    """What is in a packed file: a table of blocks and kernels, the totals, and how to load it."""
    rows = [("block, kernel", "bits", "channels", "type", "granularity", "bytes")]
    for block in packed.blocks:
        config = block.config
        rows.append((shown(block.name), f"{config.average_bits:.2f}", f"{100 * config.average_keep:.1f} %", "", "",
                     f"{block.bytes:,}"))
        rows += [(f"  {shown(k.name)}", str(k.config.bits), f"{k.kept}/{k.shape[0]}", k.config.qtype,
                  k.config.granularity, f"{k.bytes:,}") for k in block.kernels]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) if i in (0, 3, 4) else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]
    halves = sum(t.stored != t.dtype for t in packed.rest)
    fp32 = sum(4 * kernel.params for kernel in packed.kernels)
    network = packed.network
    how = "pack.load(FILE)" if network.get("name") else "pack.load(FILE, model=mine), mine being such a network"
    return "\n".join([
        f"{shown(packed.where)}: packed file, version {VERSION}",
        f"network: {json.dumps(network)[:2000]}", f"to load it: {how}", "",
        lines[0], "-" * len(lines[0]), *lines[1:], "",
        f"kernels  {packed.kernel_bytes:>13,} bytes, FP32 {fp32:,}; CR {packed.config.cr:.2f} (Eq. 22), mean bits and "
        "channels of a block over its kernels",
        f"rest     {packed.rest_bytes:>13,} bytes, {len(packed.rest)} tensors, {halves} of them in half precision",
        f"index    {packed.index_bytes:>13,} bytes",
        f"file     {packed.file_bytes:>13,} bytes; the network as it is {packed.unpacked_bytes:,}: ratio "
        f"{packed.ratio:.2f}"])


def export(file, out, source: str = "", image_size: int = 0) -> str:
    """Write the narrow network of a packed file through torch.export to ``out``; returns lines that say what came of
    it. source: module:function or file.py:function of a network of one's own; image_size: side of the example's images
    in pixels, 0 = as the file says. Raises InputError."""
    import narrow  # not needed to pack and load

    network = read(file).network
    size, classes, channels = (image_size or network.get("image_size"), network.get("num_classes"),
                               network.get("channels", 3))
    if type(size) is not int or not 1 <= size <= 1024:
        raise InputError(f"{file}: an image size of {shown(size)}, expected 1 to 1024 pixels; give --image-size N")
    if type(channels) is not int or not 1 <= channels <= 1024:
        raise InputError(f"{file}: images of {shown(channels)} channels, expected 1 to 1024; pack the network again")
    if source and type(classes) is not int:
        raise InputError(f"{file}: says no number of classes for --model {source}; pack the network again")
    model = load(file, own_network(source, classes) if source else None)
    example = torch.zeros(2, channels, size, size,
                          dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()))
    narrowed = narrow.materialize(model, example)  # first: it says what is wrong with a network that does not run
    before, after = narrow.multiply_adds(model, example), narrow.multiply_adds(narrowed, example)
    narrow.export(narrowed, example, out)
    wide = "".join(f"\nstays wide: {layer}: {reason}" for layer, reason in narrow.stays(narrowed).items())
    return f"{out}: {before:,} multiply-adds before, {after:,} after, {os.path.getsize(out):,} bytes{wide}"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def _parser():
    parser = _Parser(prog="pack.py", description="Packed files of compressed networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="what is in a packed file")
    command.add_argument("file", metavar="FILE")
    command = commands.add_parser("export", help="write the narrow network through torch.export")
    command.add_argument("file", metavar="FILE")
    command.add_argument("out", metavar="OUT.pt2")
    command.add_argument("--model", default="", metavar="SOURCE",
                         help="the network of one's own that was packed: module:function or file.py:function")
    command.add_argument("--image-size", type=int, default=0, metavar="N", help="side of the images in pixels")
    return parser


def main(argv=None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for bad input."""
    survive_ascii()
    try:
        args = _parser().parse_args(argv)
        print(info(read(args.file)) if args.command == "info" else
              export(args.file, args.out, args.model, args.image_size))
    except (InputError, OSError) as error:
        print(f"pack: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
