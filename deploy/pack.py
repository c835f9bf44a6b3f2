"""The packed file of a compressed network: b-bit codes of the kept channels, and everything else as it is.

A packed file is one ``torch.save`` of three uint8 tensors, so that ``torch.load(FILE, weights_only=True)`` reads it:

``header``  magic, version (uint32), SHA-256 of version, index and blob
``index``   zlib-compressed JSON: the network, its blocks and kernels, the tensors that are no kernels
``blob``    for each kernel in the index's order: bitmap of kept channels (absent when all stay), scales (float32),
            zero-points (ceil(b/8) bytes each), codes of the kept rows (``storage_bits`` each, from the lowest bit up);
            a kernel of 32 bits has its kept rows in its own type in place of scales and codes; then the other tensors

Nothing in the index says where a part begins: sizes follow from shapes and bits, and must add up to the blob's length.
All numbers are little-endian. A file is taken for hostile, also when its digest is right: it is read as a zip archive
of three byte strings, its pickle is not run, and shapes are checked before memory is taken for them.

    python -m deploy.pack info FILE   # what is in it: per block and kernel bits, channels, bytes
    python -m deploy.pack export FILE OUT.pt2 [--model file.py:function]   # the narrow network through torch.export
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import models
from compress import (FULL_BITS, BlockConfig, Grid, KernelConfig, KernelShape, NetworkConfig, channels_kept, decode,
                      encode, kernel_shapes)
from config import InputError
from deploy import narrow
from support.files import replace_file, shown, survive_ascii
from support.own import own_network

MAGIC, VERSION = b"HiReLC packed\n", 1
HEAD = MAGIC + VERSION.to_bytes(4, "little")
MAX_BITS = 16  # of a code; beyond there are only raw rows
MAX_INDEX = 4 << 20  # bytes of JSON, some 30,000 tensors: zlib and JSON both make much of little
MAX_SIDE, MAX_SIDES = 1 << 40, 64  # of a tensor; 64 is torch's and numpy's own limit
# Weights of the kernels per byte of the blob, beyond the first million; 2 bits and a pruning of 0.99 come to 796.
EXPANSION, FREE_WEIGHTS = 1024, 1 << 20
DTYPES = {name: getattr(torch, name) for name in (
    "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128"
).split()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PackedTensor:
    """A tensor in a packed file: a kernel, or where there is no ``config`` any other."""
    tensors: tuple[str, ...]  # all its names in the state dict
    dtype: torch.dtype  # in the network
    stored: torch.dtype  # in the file, unless as codes
    shape: tuple[int, ...]  # in the network; a kernel's begins with n_out
    name: str = ""  # of the kernel
    kept: int = 0  # channels in the file
    config: KernelConfig | None = None  # ``keep`` is the fraction that is in the file

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Return the bytes of bitmap, scales, zero-points, and codes (or numbers as they are)."""
        if self.config is None:
            return 0, 0, 0, math.prod(self.shape) * self.stored.itemsize
        n_out, weights = self.shape[0], self.kept * math.prod(self.shape[1:])
        bitmap = 0 if self.kept == n_out else math.ceil(n_out / 8)
        bits, granularity = self.config.bits, self.config.granularity
        if bits == FULL_BITS:
            return bitmap, 0, 0, weights * self.stored.itemsize
        scales = 2 if granularity in ("log", "log-script") else 1 if granularity == "uniform" else self.kept
        zeros = scales if self.config.qtype == "FLOAT" and granularity in ("uniform", "per-channel") else 0
        return bitmap, 4 * scales, zeros * math.ceil(bits / 8), math.ceil(weights * self.config.storage_bits / 8)

    @property
    def bytes(self) -> int:
        """Return its bytes in the file; compress.kernel_bytes of a kernel, except for raw rows that are no float32."""
        return sum(self.parts)


@dataclass(frozen=True)
class PackedBlock:
    """The kernels of one block, in order."""
    name: str
    kernels: tuple[PackedTensor, ...]


@dataclass(frozen=True)
class Packed:
    """A packed file as read: everything but the tensors, which :func:`state` unpacks."""
    where: str  # the file's name for messages
    network: dict  # how to rebuild the network
    channels_last: bool  # whether it ran in that memory format
    blocks: tuple[PackedBlock, ...]
    rest: tuple[PackedTensor, ...]
    file_bytes: int
    blob: np.ndarray = field(repr=False, compare=False)  # uint8 [n]

    @property
    def kernels(self) -> tuple[PackedTensor, ...]:
        """Return the kernels of all blocks, in order."""
        return tuple(kernel for block in self.blocks for kernel in block.kernels)

    @property
    def config(self) -> NetworkConfig:
        """Return the configuration of all blocks; its ``cr`` is Eq. 22's."""
        return NetworkConfig(tuple(BlockConfig(
            tuple(k.config for k in block.kernels),
            tuple(KernelShape(k.shape[0], math.prod(k.shape)) for k in block.kernels)) for block in self.blocks))


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack int32 codes [n], 0 <= code < 2^bits → uint8 [ceil(n · bits / 8)], lowest bit first, unused bits 0."""
    single = np.empty((len(codes), bits), np.uint8)
    for bit in range(bits):
        single[:, bit] = codes >> bit & 1
    return np.packbits(single, bitorder="little")


def unpack_bits(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the ``count`` codes, int32, that :func:`pack_bits` put into ``data``."""
    single = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    codes = np.zeros(count, np.int32)
    for bit in range(bits):
        codes |= single[:, bit].astype(np.int32) << bit
    return codes


@torch.no_grad()
def pack(model: nn.Module, blocks, config: NetworkConfig, masks: dict[str, Tensor], grids: dict[str, Grid | None],
         network: dict, rest: str = "float32", notes: list[str] | None = None) -> bytes:
    """Return the packed file of a compressed network, as bytes for :func:`write`.

    model: holds weights on their grids with pruned rows at zero, as :func:`compress.snap_to_grid` leaves them and its
    ``grids``. masks: kernel → bool [n_out]. network: plain data that says how to rebuild the network: ``name``,
    ``num_classes``, ``image_size``, ``width``, ``patch_size``, ``quick_gelu`` for this project's, ``name`` "" for any
    other; further keys are kept. rest: ``float32`` stores the tensors that are no kernels as they are; ``float16`` puts
    float32 and float64 in half precision, except where a value would overflow: ``notes`` gets a sentence for each.
    Raises ValueError naming the kernel whose weights are not exactly what the file would give back, or where the
    arguments are of other kernels; InputError for a state dict that cannot be stored.
    """
    notes = [] if notes is None else notes
    if rest not in ("float32", "float16"):
        raise InputError(f"pack.rest={rest!r}: expected float32 or float16")
    if [kernel_shapes(block) for block in blocks] != [block.shapes for block in config.blocks]:
        raise ValueError("the configuration must be that of the blocks' kernels")
    state, shared = model.state_dict(keep_vars=True), {}  # the parameters themselves: a tied one is the same object
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES \
                or tensor.is_meta:
            raise InputError(f"{type(model).__name__} cannot be packed: {name} of its state dict is no plain tensor; "
                             "register a plain one as a buffer, or leave it out of the state dict")
        shared.setdefault(id(tensor), []).append(name)
    index, blob = {"network": network, "channels_last": _channels_last(model), "blocks": [], "rest": []}, []
    for block, block_config in zip(blocks, config.blocks):
        index["blocks"].append([block.name, []])
        for (name, module), kernel in zip(block.kernels.items(), block_config.kernels):
            weight, mask = module.weight, masks[name].cpu()
            entry = [name, shared.pop(id(weight), []), DTYPE_NAMES[weight.dtype], list(weight.shape),
                     min(kernel.bits, FULL_BITS), int(mask.sum()), kernel.qtype, kernel.granularity]
            blob.append(_pack_kernel(_kernel(entry), kernel.keep, weight.detach().cpu(), mask, grids[name]))
            index["blocks"][-1][1].append(entry)
    for same in shared.values():
        tensor = stored = state[same[0]].detach().cpu()
        if rest == "float16" and tensor.dtype in (torch.float32, torch.float64):
            stored = tensor.half()
            if not torch.equal(stored.isinf(), tensor.isinf()):
                stored = tensor
                notes.append(f"{same[0]} stays {DTYPE_NAMES[tensor.dtype]}: float16 would make infinities of it")
        blob.append(_raw(stored))
        index["rest"].append([same, DTYPE_NAMES[tensor.dtype], DTYPE_NAMES[stored.dtype], list(tensor.shape)])
    return _file(index, np.concatenate(blob))


def _channels_last(model) -> bool:
    """Say whether the network's 4-d parameters have channels last. The last bits of a convolution depend on it."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights) \
        and not all(p.is_contiguous() for p in weights)


def _pack_kernel(kernel, keep, weight, mask, grid) -> np.ndarray:
    """Return the kernel's part of the blob, uint8 [n]; ValueError unless it gives ``weight`` back bit for bit."""
    config, kind = kernel.config, None if grid is None else (grid.bits, grid.qtype, grid.granularity)
    if mask.dtype != torch.bool or mask.shape != (len(weight),) or kernel.kept != channels_kept(keep, len(weight)) or \
            kind != (None if config.bits == FULL_BITS else (config.bits, config.qtype, config.granularity)):
        raise ValueError(f"kernel {kernel.name}: its mask or its grid is not that of its configuration")
    rows = weight[mask]
    parts = [np.packbits(mask.numpy(), bitorder="little")] if kernel.parts[0] else []
    if grid is None:
        parts.append(_raw(rows))
    else:
        grid = Grid(*kind, *(end if end is None else end.cpu() for end in (grid.scale, grid.zero, grid.high)))
        parts.append(_raw(grid.scale))
        if grid.zero is not None:
            parts.append(grid.zero.reshape(-1).numpy().astype(f"<u{math.ceil(config.bits / 8)}").view(np.uint8))
        codes = encode(rows.float(), grid).reshape(-1) - grid.code_range[0]
        parts.append(pack_bits(codes.to(torch.int32).numpy(), config.storage_bits))
    data = np.concatenate(parts)
    if not np.array_equal(_raw(_unpack_kernel(kernel, data)), _raw(weight)):  # bytes: -0 is not +0, NaN is itself
        raise ValueError(f"kernel {kernel.name}: its weights are not on their grid, or its pruned rows are not +0; "
                         "put them there first, on the CPU (compress.snap_to_grid)")
    return data


def _raw(tensor) -> np.ndarray:
    """Return the bytes of a tensor in the order of its indices, uint8 [n]."""
    return tensor.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8).numpy()


def _file(index, blob) -> bytes:
    """Return the file of an index and its blob; InputError or ValueError where it could not be read back."""
    text = json.dumps(index, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_INDEX:
        raise InputError(f"too many tensors to be packed: their list takes {len(text)} bytes, at most {MAX_INDEX}")
    _layout(index, len(blob))
    text = zlib.compress(text, 9)
    header = HEAD + _digest(text, blob)
    file = io.BytesIO()
    torch.save({"header": torch.frombuffer(bytearray(header), dtype=torch.uint8),
                "index": torch.frombuffer(bytearray(text), dtype=torch.uint8), "blob": torch.from_numpy(blob)}, file)
    return file.getvalue()


def _digest(index, blob) -> bytes:
    digest = hashlib.sha256(HEAD[len(MAGIC):] + len(index).to_bytes(8, "little") + index)
    digest.update(blob)
    return digest.digest()


def write(path, data: bytes) -> None:
    """Write a whole file or nothing. Raises OSError."""
    replace_file(path, lambda file: file.write(data))


def read(file) -> Packed:
    """Return what is in a packed file (a path, or its bytes), without unpacking its tensors. Raises InputError, one
    line, for a file that is absent, of another kind or version, truncated or edited."""
    if isinstance(file, (bytes, bytearray, memoryview)):
        where, size, source = "packed bytes", len(file), io.BytesIO(file)
    else:
        where = source = os.fspath(file)
        if not os.path.isfile(where):
            raise InputError(f"{where}: no such file; a run leaves packed.pt in its run directory")
        size = os.path.getsize(where)
    with _told(where):
        header, index, blob = _records(source, size)
        if not header.startswith(HEAD):
            raise ValueError(f"its magic and version are {ascii(header[:len(HEAD)])}, expected {ascii(HEAD)}")
        if header != HEAD + _digest(index, blob):
            raise ValueError("its SHA-256 is not that of its content")
        inflate = zlib.decompressobj()
        text = inflate.decompress(index, MAX_INDEX)
        if not inflate.eof or inflate.unused_data:
            raise ValueError(f"an index that ends elsewhere, or of more than {MAX_INDEX} bytes")
        return Packed(where, *_layout(json.loads(text.decode("utf-8")), len(blob)), size, np.frombuffer(blob, np.uint8))


def _records(source, size) -> list[bytes]:
    """Return the bytes of the first three tensors of a file that torch.save wrote, each at most ``size`` long."""
    with zipfile.ZipFile(source) as archive:
        entries = {name.partition("/")[2]: name for name in archive.namelist()}
        infos = [archive.getinfo(entries[f"data/{n}"]) for n in range(3)]
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > size for info in infos):
            raise ValueError("tensors that are compressed, or larger than the file")
        return [archive.read(info) for info in infos]


@contextlib.contextmanager
def _told(where):
    """Turn whatever the content of a damaged or hostile file can raise into an InputError of one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{where}: not a packed file, damaged or edited: {shown(f'{type(error).__name__}: {error}')}; "
                         "copy the file again, or pack the network again") from None


def _layout(index, size):
    """Check an index against the blob's ``size`` in bytes → network, channels_last, blocks, rest; any exception where
    it makes no sense. What passes takes no more memory than size · (EXPANSION weights, or four times itself)."""
    network, channels_last = index["network"], index["channels_last"]
    if type(network) is not dict or type(channels_last) is not bool or len(index) != 4:
        raise ValueError("an index of another form")
    blocks = tuple(PackedBlock(*_names([name]), tuple(map(_kernel, kernels))) for name, kernels in index["blocks"])
    kernels, rest = [kernel for block in blocks for kernel in block.kernels], tuple(map(_tensor, index["rest"]))
    if not kernels or not all(block.kernels for block in blocks):
        raise ValueError("a block without kernels, or no blocks")
    for names in ([kernel.name for kernel in kernels], [n for entry in (*kernels, *rest) for n in entry.tensors]):
        if len(set(names)) != len(names):
            raise ValueError("a name that is given twice")
    total, weights = sum(entry.bytes for entry in (*kernels, *rest)), sum(math.prod(k.shape) for k in kernels)
    if total != size:
        raise ValueError(f"tensors of {total} bytes in all, where there are {size}")
    if weights > FREE_WEIGHTS + EXPANSION * size:
        raise ValueError(f"kernels of {weights} weights out of {size} bytes, more than {EXPANSION} to the byte")
    return network, channels_last, blocks, rest


def _kernel(entry) -> PackedTensor:
    name, tensors, dtype, shape, bits, kept, qtype, granularity = entry
    shape, dtype = _shape(shape), DTYPES[dtype]
    if not shape or not all(shape) or type(kept) is not int or not 1 <= kept <= shape[0] or \
            bits > MAX_BITS and bits != FULL_BITS or not dtype.is_floating_point:
        raise ValueError(f"kernel {name}: {kept} channels of {dtype} {list(shape)} at {bits} bits")
    return PackedTensor(_names(tensors), dtype, dtype, shape, *_names([name]), kept,
                        KernelConfig(bits, kept / shape[0], qtype, granularity))


def _tensor(entry) -> PackedTensor:
    names, dtype, stored, shape = entry
    dtype, stored = DTYPES[dtype], DTYPES[stored]
    if stored != dtype and (stored != torch.float16 or dtype not in (torch.float32, torch.float64)):
        raise ValueError(f"{dtype} stored as {stored}")
    return PackedTensor(_names(names), dtype, stored, _shape(shape))


def _shape(value) -> tuple[int, ...]:
    if type(value) is not list or len(value) > MAX_SIDES or \
            not all(type(n) is int and 0 <= n <= MAX_SIDE for n in value) or \
            math.prod(n or 1 for n in value) > MAX_SIDE:  # torch multiplies the sides, also of an empty tensor
        raise ValueError("a tensor of an impossible shape")
    return tuple(value)


def _names(value) -> tuple[str, ...]:
    if type(value) is not list or not value or not all(type(name) is str for name in value):
        raise ValueError("a name that is missing or no text")
    return tuple(value)


def state(packed: Packed) -> dict[str, Tensor]:
    """Return the state dict in a packed file, on the CPU: every tensor in the network's type and shape, under all its
    names. Raises InputError for a file whose codes, scales or bitmaps make no sense."""
    tensors, at = {}, 0
    with _told(packed.where):
        for entry in (*packed.kernels, *packed.rest):
            data, at = packed.blob[at:at + entry.bytes], at + entry.bytes
            tensor = _unpack_kernel(entry, data) if entry.config else _typed(data, entry.stored).to(entry.dtype)
            tensors.update(dict.fromkeys(entry.tensors, tensor.reshape(entry.shape)))
    return tensors


def _typed(data, dtype) -> Tensor:
    """Return a copy of uint8 [n] as a 1-d tensor of ``dtype``; a bool that is not 0 is true."""
    data = torch.tensor(data, dtype=torch.uint8)
    return data != 0 if dtype == torch.bool else data.view(dtype)


def _unpack_kernel(kernel, data) -> Tensor:
    """Unpack the kernel's part of the blob, uint8 [n] → its weight [n_out, …]."""
    bitmap, scales, zeros, codes = np.split(data, np.cumsum(kernel.parts)[:-1])
    n_out, shape = kernel.shape[0], (kernel.kept, *kernel.shape[1:])
    mask = np.unpackbits(bitmap, count=n_out, bitorder="little") if len(bitmap) else np.ones(n_out, np.uint8)
    if mask.sum() != kernel.kept:
        raise ValueError(f"kernel {kernel.name}: a bitmap of {mask.sum()} channels, expected {kernel.kept}")
    if kernel.config.bits == FULL_BITS:
        rows = _typed(codes, kernel.dtype).reshape(shape)
    else:
        grid = _unpack_grid(kernel, scales, zeros)
        low, high = grid.code_range
        values = torch.from_numpy(unpack_bits(codes, kernel.config.storage_bits, math.prod(shape))) + low
        if int(values.max()) > high:
            raise ValueError(f"kernel {kernel.name}: a code beyond {high}")
        rows = decode(values.float().reshape(shape), grid).to(kernel.dtype)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"kernel {kernel.name}: weights that are not finite")
    weight = torch.zeros(kernel.shape, dtype=kernel.dtype)
    weight[torch.from_numpy(mask != 0)] = rows
    return weight


def _unpack_grid(kernel, scales, zeros) -> Grid:
    config = kernel.config
    log = config.granularity.startswith("log")  # has two ends in place of scales
    shape = (2,) if log else () if config.granularity == "uniform" else (kernel.kept, *[1] * (len(kernel.shape) - 1))
    scale, zero = _typed(scales, torch.float32).reshape(shape), None
    if not bool(((scale > 0) & scale.isfinite()).all()) or log and scale[0] > scale[1]:
        raise ValueError(f"kernel {kernel.name}: scales that are not positive, finite and in order")
    if len(zeros):
        zero = torch.from_numpy(zeros.view(f"<u{math.ceil(config.bits / 8)}").astype(np.float32)).reshape(shape)
        if zero.max() >= 2 ** config.bits:
            raise ValueError(f"kernel {kernel.name}: a zero-point beyond its codes")
    return Grid(config.bits, config.qtype, config.granularity, scale, zero)


def load(file, model: nn.Module | None = None) -> nn.Module:
    """Return the network of a packed file (a path, or its bytes), in eval mode and in the memory format that it ran in.

    Without ``model`` one of this project's is rebuilt, on the CPU, without drawing random numbers; a network of one's
    own is given as ``model``, of which everything is filled, in place, or nothing. Values and types are those that were
    packed. Raises InputError as :func:`read`, and naming all that is missing, unexpected, or of another shape or type.
    """
    packed = read(file)
    network = _build(packed) if model is None else model
    _check_fit(packed, network.state_dict(), built=model is None)
    network.load_state_dict(state(packed), assign=model is None)
    if packed.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.eval()


def _build(packed) -> nn.Module:
    """Return one of this project's networks without numbers: what a file claims to be takes no memory yet."""
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


def _check_fit(packed, target, built) -> None:
    """InputError unless the file's tensors are those of the state dict ``target``. A network just built takes over
    their types, as long as floats stay floats."""
    held = {name: entry for entry in (*packed.kernels, *packed.rest) for name in entry.tensors}
    problems = [f"missing: {shown(name)}" for name in target if name not in held]
    for name, entry in held.items():
        tensor = target.get(name)
        if not isinstance(tensor, Tensor):
            problems.append(f"unexpected: {shown(name)}")
        elif tensor.shape != entry.shape or tensor.dtype != entry.dtype and not (
                built and tensor.is_floating_point() and entry.dtype.is_floating_point):
            problems.append(f"different: {shown(name)} {entry.dtype} {list(entry.shape)} in the file, {tensor.dtype} "
                            f"{list(tensor.shape)} in the network")
    if problems:
        raise InputError(f"{packed.where} does not fit the network; {'; '.join(problems[:1000])}")


def info(packed: Packed) -> str:
    """Return what is in a packed file: a table of blocks and kernels, the totals, and how to load it."""
    width = max(12, *(2 + len(shown(entry.name)) for entry in (*packed.blocks, *packed.kernels)))
    row = f"{{:<{width}}}  {{:>5}}  {{:>11}}  {{:<5}}  {{:<11}}  {{:>13}}".format
    lines = [row("block, kernel", "bits", "channels", "type", "granularity", "bytes")]
    for block, config in zip(packed.blocks, packed.config.blocks):
        lines.append(row(shown(block.name), f"{config.average_bits:.2f}", f"{100 * config.average_keep:.1f} %", "", "",
                         f"{sum(k.bytes for k in block.kernels):,}"))
        lines += [row(f"  {shown(k.name)}", k.config.bits, f"{k.kept}/{k.shape[0]}", k.config.qtype,
                      k.config.granularity, f"{k.bytes:,}") for k in block.kernels]
    kernels, rest = (sum(entry.bytes for entry in entries) for entries in (packed.kernels, packed.rest))
    unpacked = sum(math.prod(t.shape) * t.dtype.itemsize for t in (*packed.kernels, *packed.rest))
    mine = "" if packed.network.get("name") else ", model=mine"
    return "\n".join([
        f"{shown(packed.where)}: packed file, version {VERSION}; to load it: pack.load(FILE{mine})",
        f"network: {json.dumps(packed.network)[:2000]}", "", *lines, "",
        f"kernels  {kernels:>13,} bytes, FP32 {4 * packed.config.params:,}; CR {packed.config.cr:.2f} (Eq. 22)",
        f"rest     {rest:>13,} bytes, {len(packed.rest)} tensors, {sum(t.stored != t.dtype for t in packed.rest)} of "
        "them in half precision",
        f"file     {packed.file_bytes:>13,} bytes; the network as it is {unpacked:,}: ratio "
        f"{unpacked / packed.file_bytes:.2f}"])


def export(file, out, source: str = "") -> str:
    """Write the narrow network of a packed file through torch.export to ``out``; returns lines that say what came of
    it. source: module:function or file.py:function that makes a network of one's own. Raises InputError."""
    network = read(file).network
    size, classes = network.get("image_size"), network.get("num_classes")
    shape = [2, network.get("channels", 3), *(size if type(size) is list else [size, size])]
    if len(shape) != 4 or not all(type(n) is int and 1 <= n <= 1024 for n in shape) or type(classes) is not int:
        raise InputError(f"{file}: for images of shape {shown(shape[1:])} and {shown(classes)} classes, expected 1 to "
                         "1024 channels and pixels to a side, and a number of classes; pack the network again")
    model = load(file, own_network(source, classes) if source else None)
    example = torch.zeros(shape, dtype=next(model.parameters()).dtype)
    narrowed = narrow.materialize(model, example)  # first: it says what is wrong with a network that does not run
    before, after = narrow.multiply_adds(model, example), narrow.multiply_adds(narrowed, example)
    narrow.export(narrowed, example, out)
    wide = "".join(f"\nstays wide: {layer}: {reason}" for layer, reason in narrow.stays(narrowed).items())
    return f"{out}: {before:,} multiply-adds before, {after:,} after, {os.path.getsize(out):,} bytes{wide}"


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input."""
    survive_ascii()
    try:
        match sys.argv[1:] if argv is None else list(argv):
            case ["info", file]:
                print(info(read(file)))
            case ["export", file, out]:
                print(export(file, out))
            case ["export", file, out, "--model", source]:
                print(export(file, out, source))
            case _:
                raise InputError("usage: python -m deploy.pack info FILE | export FILE OUT.pt2 [--model SOURCE]")
    except (InputError, OSError) as error:
        print(f"pack: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
