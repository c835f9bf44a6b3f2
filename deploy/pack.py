"""The packed file of a compressed network: b-bit codes of the kept channels, and everything else as it is.

A packed file is one ``torch.save`` of three uint8 tensors, so that ``torch.load(FILE, weights_only=True)`` reads it:

``header``  magic, version (uint32), SHA-256 of version, the index's length (uint64), index and blob
``index``   zlib-compressed JSON: the network, its blocks and kernels, the tensors that are no kernels
``blob``    for each kernel in the index's order: bitmap of kept channels (absent when all stay), scales (float32),
            zero-points (ceil(b/8) bytes each), codes of the kept rows (``storage_bits`` each, from the lowest bit up),
            or of a kernel of 32 bits the kept rows in its own type; then the other tensors

Numbers are little-endian; sizes follow from shapes and bits, and must add up to the blob's length. A file is taken for
hostile, also when its digest is right: its pickle is not run, and shapes are checked before memory is taken for them.

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
from compress import (FULL_BITS, LOG, BlockConfig, Grid, KernelConfig, KernelShape, NetworkConfig, decode, encode,
                      kernel_parts, set_state, to_eval)
from config import Config, InputError
from deploy import narrow
from deploy.checks import check_writable, demand, difference, raw_bytes
from support.files import shown, survive_ascii
from support.own import forward, own_network, untouched

MAGIC, VERSION = b"HiReLC packed\n", 1
HEAD = MAGIC + VERSION.to_bytes(4, "little")
MAX_BITS, MAX_SIDES = 16, 64  # of a code, beyond there are only raw rows; of a tensor, as torch has it
MAX_INDEX = 4 << 20  # bytes of JSON, some 30,000 tensors: zlib and JSON both make much of little
# Weights of the kernels per byte of the blob, beyond the first million; 2 bits and a pruning of 0.99 come to 796.
EXPANSION, FREE_WEIGHTS = 1024, 1 << 20
DTYPES = {name: getattr(torch, name) for name in (
    "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128"
).split()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ZERO_TYPES = torch.uint8, torch.uint16  # of a zero-point: up to 8 bits, and more


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
        parts = kernel_parts(self.config, KernelShape(self.shape[0], math.prod(self.shape)))
        if self.config.bits == FULL_BITS:  # the kept rows in their own type
            return parts[0], 0, 0, self.kept * math.prod(self.shape[1:]) * self.stored.itemsize
        return parts

    @property
    def bytes(self) -> int:
        """Return its bytes in the file; compress.kernel_bytes of a kernel, except for raw rows that are no float32."""
        return sum(self.parts)


@dataclass(frozen=True)
class Packed:
    """A packed file as read: everything but the tensors, which :func:`state` unpacks."""
    where: str  # the file's name for messages
    network: dict  # how to rebuild the network
    channels_last: bool  # whether it ran in that memory format
    blocks: dict[str, tuple[PackedTensor, ...]]  # block → its kernels, in order
    rest: tuple[PackedTensor, ...]
    file_bytes: int
    blob: np.ndarray = field(repr=False, compare=False)  # uint8 [n]

    @property
    def kernels(self) -> tuple[PackedTensor, ...]:
        """Return the kernels of all blocks, in order."""
        return tuple(kernel for kernels in self.blocks.values() for kernel in kernels)

    @property
    def config(self) -> NetworkConfig:
        """Return the configuration of all blocks; its ``cr`` is Eq. 22's."""
        return NetworkConfig(tuple(BlockConfig(
            tuple(k.config for k in kernels), tuple(KernelShape(k.shape[0], math.prod(k.shape)) for k in kernels))
            for kernels in self.blocks.values()))


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack int32 codes [n], 0 <= code < 2^bits → uint8 [ceil(n · bits / 8)], lowest bit first, unused bits 0."""
    single = np.unpackbits(codes.astype("<i4").view(np.uint8).reshape(-1, 4), axis=1, count=bits, bitorder="little")
    return np.packbits(single, bitorder="little")


def unpack_bits(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the ``count`` codes, int32, that :func:`pack_bits` put into ``data``."""
    single = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return sum(single[:, bit].astype(np.int32) << bit for bit in range(bits))


@torch.no_grad()
def pack(model: nn.Module, blocks, config: NetworkConfig, masks: dict[str, Tensor], grids: dict[str, Grid | None],
         network: dict, rest: str = "float32", note=lambda text: None) -> bytes:
    """Return the packed file of a compressed network, as bytes.

    model: as :func:`compress.snap_to_grid`, which returns ``grids``, leaves it. masks: kernel → bool [n_out]. network:
    how to rebuild it: ``name`` ("" for a network of one's own), ``num_classes``, ``image_size``, ``width``,
    ``patch_size``, ``quick_gelu``; further keys are kept. rest: ``float16`` puts the tensors that are no kernels in
    half precision, but for those that it would make infinite or put off by 1/64 of the largest: ``note`` is given a
    sentence for each. Raises ValueError naming a kernel that the file would not give back bit for bit; InputError for a
    state dict that cannot be stored.
    """
    state, shared = model.state_dict(keep_vars=True), {}  # the parameters themselves: a tied one is the same object
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
            raise InputError(f"{type(model).__name__} cannot be packed: {name} of its state dict is no plain tensor; "
                             "register a plain one as a buffer, or leave it out of the state dict")
        shared.setdefault(id(tensor), []).append(name)
    index, blob = {"network": network, "channels_last": _channels_last(model), "blocks": [], "rest": []}, []
    for block, block_config in zip(blocks, config.blocks, strict=True):
        index["blocks"].append([block.name, []])
        for (name, module), kernel in zip(block.kernels.items(), block_config.kernels, strict=True):
            weight, mask = module.weight, masks[name].cpu()
            entry = [name, shared.pop(id(weight), []), DTYPE_NAMES[weight.dtype], list(weight.shape),
                     min(kernel.bits, FULL_BITS), int(mask.sum()), kernel.qtype, kernel.granularity]
            blob.append(_pack_kernel(_kernel(entry), weight.detach().cpu(), mask, grids[name]))
            index["blocks"][-1][1].append(entry)
    for same in shared.values():
        tensor = stored = state[same[0]].detach().cpu()
        if rest == "float16" and tensor.dtype in (torch.float32, torch.float64):
            stored = tensor.half()
            coarse = tensor.numel() and (stored - tensor).abs().max() > tensor.abs().max() / 64
            if coarse or not torch.equal(stored.isinf(), tensor.isinf()):
                stored = tensor
                note(f"{same[0]} stays {DTYPE_NAMES[tensor.dtype]}: float16 would not hold its values")
        blob.append(raw_bytes(stored).numpy())
        index["rest"].append([same, DTYPE_NAMES[tensor.dtype], DTYPE_NAMES[stored.dtype], list(tensor.shape)])
    text, blob = json.dumps(index, separators=(",", ":"), allow_nan=False).encode(), np.concatenate(blob)
    if len(text) > MAX_INDEX:
        raise InputError(f"too many tensors to be packed: their list takes {len(text)} bytes, at most {MAX_INDEX}")
    _layout(index, len(blob))  # what reading checks
    text, file = zlib.compress(text, 9), io.BytesIO()
    parts = {"header": HEAD + _digest(text, blob), "index": text, "blob": blob}
    torch.save({name: torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for name, part in parts.items()}, file)
    return file.getvalue()


def _digest(index, blob) -> bytes:
    return hashlib.sha256(b"".join((HEAD[len(MAGIC):], len(index).to_bytes(8, "little"), index, blob))).digest()


def _channels_last(model) -> bool:
    """Say whether the network's 4-d parameters have channels last. The last bits of a convolution depend on it."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    # By the strides: a tensor of 1 x 1 kernels, or of one input channel, counts as contiguous in either format.
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights) and any(
        p.stride() != torch.empty(p.shape, device="meta").stride() for p in weights)


def _pack_kernel(kernel, weight, mask, grid) -> np.ndarray:
    """Return the kernel's part of the blob, uint8 [n]; ValueError unless it gives ``weight`` back bit for bit."""
    rows = weight[mask]
    parts = [np.packbits(mask.numpy(), bitorder="little")] if kernel.parts[0] else []
    if grid is None:
        parts.append(raw_bytes(rows).numpy())
    else:
        scale, zero, high = (end if end is None else end.cpu() for end in (grid.scale, grid.zero, grid.high))
        grid = Grid(grid.bits, grid.qtype, grid.granularity, scale, zero, high)
        parts.append(raw_bytes(scale).numpy())
        if zero is not None:
            parts.append(raw_bytes(zero.to(ZERO_TYPES[grid.bits > 8])).numpy())
        codes = encode(rows.float(), grid).reshape(-1) - grid.code_range[0]
        parts.append(pack_bits(codes.to(torch.int32).numpy(), kernel.config.storage_bits))
    data = np.concatenate(parts)
    if len(data) != kernel.bytes or not raw_bytes(_unpack_kernel(kernel, data)).equal(raw_bytes(weight)):
        raise ValueError(f"kernel {kernel.name}: its weights are not on their grid, or its pruned rows are not +0; "
                         "put them there first, on the CPU (compress.snap_to_grid)")
    return data


def read(file) -> Packed:
    """Return what is in a packed file (a path, or its bytes), without unpacking its tensors. Raises InputError, one
    line, for a file that is absent, of another kind or version, truncated or edited."""
    if isinstance(file, bytes):
        where, size, source = "packed bytes", len(file), io.BytesIO(file)
    else:
        where = source = os.fspath(file)
        if not os.path.isfile(where):
            raise InputError(f"{where}: no such file; a run leaves packed.pt in its run directory")
        size = os.path.getsize(where)
    with _told(where):
        with zipfile.ZipFile(source) as archive:
            root = archive.namelist()[0].partition("/")[0]
            entries = [archive.getinfo(f"{root}/data/{n}") for n in range(3)]
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries):
                raise ValueError("tensors that are compressed, or larger than the file")
            header, index, blob = map(archive.read, entries)
        if not header.startswith(HEAD):
            raise ValueError(f"its magic and version are {ascii(header[:len(HEAD)])}, expected {ascii(HEAD)}")
        if header != HEAD + _digest(index, blob):
            raise ValueError("its SHA-256 is not that of its content")
        inflate = zlib.decompressobj()
        text = inflate.decompress(index, MAX_INDEX)
        if not inflate.eof or inflate.unused_data:
            raise ValueError(f"an index that ends elsewhere, or of more than {MAX_INDEX} bytes")
        return Packed(where, *_layout(json.loads(text.decode("utf-8")), len(blob)), size, np.frombuffer(blob, np.uint8))


@contextlib.contextmanager
def _told(where):
    """Turn whatever the content of a damaged or hostile file can raise into an InputError of one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{where}: not a packed file, damaged or edited: {shown(f'{type(error).__name__}: {error}')}; "
                         "copy the file again, or pack the network again") from None


def _layout(index, size):
    """Check an index against the blob's ``size`` in bytes, so that what passes takes no more memory than EXPANSION
    weights per byte → network, channels_last, blocks, rest; any exception where it makes no sense."""
    blocks = {name: tuple(map(_kernel, kernels)) for name, kernels in index["blocks"]}
    rest = tuple(_tensor(*entry) for entry in index["rest"])
    kernels = [kernel for block in blocks.values() for kernel in block]
    total, weights = sum(entry.bytes for entry in (*kernels, *rest)), sum(math.prod(k.shape) for k in kernels)
    if not kernels or not all(blocks.values()) or total != size or weights > FREE_WEIGHTS + EXPANSION * size:
        raise ValueError(f"kernels of {weights} weights, and tensors of {total} bytes in all, where there are {size}; "
                         "or a block without kernels")
    return dict(index["network"]), index["channels_last"], blocks, rest


def _kernel(entry) -> PackedTensor:
    name, tensors, dtype, shape, bits, kept, qtype, granularity = entry
    config = KernelConfig(bits, kept / shape[0], qtype, granularity)
    if MAX_BITS < bits != FULL_BITS or 0 in shape:
        raise ValueError(f"kernel {name}: {shape} at {bits} bits")
    return _tensor(tensors, dtype, dtype, shape, name, kept, config)


def _tensor(names, dtype, stored, shape, *of_kernel) -> PackedTensor:
    if not names or not all(type(name) is str for name in names):
        raise ValueError("a tensor without a name")
    if len(shape) > MAX_SIDES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{names[0]}: an impossible shape")
    return PackedTensor(tuple(names), DTYPES[dtype], DTYPES[stored], tuple(shape), *of_kernel)


def state(packed: Packed) -> dict[str, Tensor]:
    """Return the state dict in a packed file, on the CPU: every tensor in the network's type and shape, under all its
    names. Raises InputError for a file that cannot be unpacked."""
    tensors, at = {}, 0
    with _told(packed.where):
        for entry in (*packed.kernels, *packed.rest):
            data, at = packed.blob[at:at + entry.bytes], at + entry.bytes
            tensor = _unpack_kernel(entry, data) if entry.config else _typed(data, entry.stored).to(entry.dtype)
            tensors |= dict.fromkeys(entry.tensors, tensor.reshape(entry.shape))
    return tensors


def _typed(data, dtype) -> Tensor:
    """Return a copy of uint8 [n] as a 1-d tensor of ``dtype``; a bool that is not 0 is true."""
    data = torch.tensor(data, dtype=torch.uint8)
    return data != 0 if dtype == torch.bool else data.view(dtype)


def _unpack_kernel(kernel, data) -> Tensor:
    """Unpack the kernel's part of the blob, uint8 [n] → its weight [n_out, …]; any exception where that fails."""
    bitmap, scales, zeros, codes = np.split(data, np.cumsum(kernel.parts)[:-1])
    config, shape = kernel.config, (kernel.kept, *kernel.shape[1:])
    if config.bits == FULL_BITS:
        rows = _typed(codes, kernel.dtype).reshape(shape)
    else:
        scale = _typed(scales, torch.float32).reshape(2 if config.granularity in LOG else [-1, *[1] * (len(shape) - 1)])
        zero = _typed(zeros, ZERO_TYPES[config.bits > 8]).float().reshape(scale.shape) if len(zeros) else None
        grid = Grid(config.bits, config.qtype, config.granularity, scale, zero)
        codes = unpack_bits(codes, config.storage_bits, math.prod(shape)) + grid.code_range[0]
        rows = decode(torch.from_numpy(codes).float().reshape(shape), grid).to(kernel.dtype)
    if not rows.isfinite().all():
        raise ValueError(f"kernel {kernel.name}: scales or weights that are not finite")
    weight = torch.zeros(kernel.shape, dtype=kernel.dtype)
    mask = np.unpackbits(bitmap, count=len(weight), bitorder="little") if len(bitmap) else np.ones(len(weight))
    weight[torch.from_numpy(mask != 0)] = rows
    return weight


def load(file, model: nn.Module | None = None) -> nn.Module:
    """Return the network of a packed file (a path, or its bytes), in eval mode and in the memory format that it ran in.

    Without ``model`` one of this project's is rebuilt, on the CPU, without drawing random numbers; of a network of
    one's own, given as ``model``, everything is filled, in place. Raises InputError as :func:`read`; before anything is
    filled, naming all that is missing, unexpected, or of another shape or type; and for memory that does not keep it.
    """
    packed, built = read(file), model is None
    network = packed.network
    if built and not network.get("name"):
        raise InputError(f"{packed.where}: a network of one's own ({shown(network.get('source', ''))}); make it and "
                         "give it: pack.load(FILE, model=mine)")
    if built:  # on the meta device: what a file claims to be takes no memory yet
        with _told(packed.where), torch.device("meta"):
            model = models.build(*map(network.get, ("name", "num_classes", "image_size", "width", "patch_size")))
            if network.get("quick_gelu"):
                models.set_quick_gelu(model, True)
    elif not isinstance(model, nn.Module) or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise InputError(f"{packed.where}: model= expects a torch.nn.Module, and not on the meta device")
    _check_fit(packed, model.state_dict(), built)
    values = state(packed)
    try:
        set_state(model, values, assign=built)
    except RuntimeError as error:  # of memory that cannot be written into
        raise InputError(f"{packed.where} cannot be read into the network: {' '.join(str(error).split())}") from error
    for name, held in model.state_dict().items():
        if not torch.equal(raw_bytes(held), raw_bytes(values[name])):
            raise InputError(f"{packed.where}: {name} does not keep the values that are read into it: it shares memory "
                             "with another tensor, is expanded, or its module changes them")
    model.to(memory_format=torch.channels_last if packed.channels_last else torch.preserve_format)
    to_eval(model)  # what a network computes from its weights in eval mode is that of the new ones
    return model


def compare(packed: bytes, network: nn.Module, fresh: nn.Module | None, images) -> None:
    """Raise InputError unless a ``fresh`` network, made before anything ran (None: made of the file), gives the logits
    of ``network`` to the bit once both are filled by the file; images [n, …] as the network takes them.
    """
    try:
        found = difference(load(packed, network), load(packed, fresh).to(images.device), images)
    except InputError as error:
        found = f"it fails: {error}"
    demand("a fresh network filled by the packed file", found, "the network keeps something outside its state dict, "
           "or parameters that share their memory")


def _check_fit(packed, target, built) -> None:
    """InputError unless the file's tensors are those of the state dict ``target``, but floats if ``built``."""
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


def describe(network: nn.Module, config: Config, train) -> dict:
    """Return what the packed file says of its network: how to build it where it is one of ours, and its images."""
    images, _ = train.batch(torch.arange(1), next(network.parameters()).device)
    with untouched(network):
        classes = forward(network, images).shape[1]
    _, channels, height, width = images.shape
    return {"name": "" if config.model.source else config.model.name, "source": config.model.source,
            "num_classes": classes, "channels": channels, "image_size": height if height == width else [height, width],
            "width": config.model.width, "patch_size": config.model.patch_size,
            "quick_gelu": models.has_quick_gelu(network), "mean": np.ravel(getattr(train, "mean", ())).tolist(),
            "std": np.ravel(getattr(train, "std", ())).tolist(), "data": config.data.name}


def info(packed: Packed) -> str:
    """Return what is in a packed file: a table of blocks and kernels, the totals, and how to load it."""
    width = max(12, *(2 + len(shown(name)) for name in (*packed.blocks, *(k.name for k in packed.kernels))))
    row = f"{{:<{width}}}  {{:>5}}  {{:>11}}  {{:<5}}  {{:<11}}  {{:>13}}".format
    mine = "" if packed.network.get("name") else ", model=mine"
    lines = [f"{shown(packed.where)}: packed file, version {VERSION}; to load it: pack.load(FILE{mine})",
             f"network: {json.dumps(packed.network)[:2000]}", "",
             row("block, kernel", "bits", "channels", "type", "granularity", "bytes")]
    for (name, kernels), config in zip(packed.blocks.items(), packed.config.blocks):
        lines.append(row(shown(name), f"{config.average_bits:.2f}", f"{100 * config.average_keep:.1f} %", "", "",
                         f"{sum(k.bytes for k in kernels):,}"))
        lines += [row(f"  {shown(k.name)}", k.config.storage_bits, f"{k.kept}/{k.shape[0]}", k.config.qtype,
                      k.config.granularity, f"{k.bytes:,}") for k in kernels]
    kernels, rest = (sum(t.bytes for t in tensors) for tensors in (packed.kernels, packed.rest))
    unpacked = sum(math.prod(t.shape) * t.dtype.itemsize for t in (*packed.kernels, *packed.rest))
    return "\n".join([
        *lines, "",
        f"kernels  {kernels:>13,} bytes, FP32 {4 * packed.config.params:,}; CR {packed.config.cr:.2f} (Eq. 22)",
        f"rest     {rest:>13,} bytes, {sum(t.stored != t.dtype for t in packed.rest)} of {len(packed.rest)} in float16",
        f"file     {packed.file_bytes:>13,} bytes; as it was {unpacked:,}: ratio {unpacked / packed.file_bytes:.2f}"])


def export(file, out, source: str = "") -> str:
    """Write the narrow network of a packed file through torch.export to ``out``; return lines on what came of it.
    source: module:function or file.py:function that makes a network of one's own. Raises InputError."""
    check_writable(out)
    network = read(file).network
    size = network.get("image_size")
    shape = [2, network.get("channels", 3), *(size if type(size) is list else [size, size])]
    if len(shape) != 4 or any(type(n) is not int or not 1 <= n <= 1024 for n in shape):
        raise InputError(f"{file}: for images of shape {shown(shape[1:])}, expected 1 to 1024 channels and pixels to a "
                         "side; pack the network again")
    model = load(file, own_network(source, network.get("num_classes")) if source else None)
    example = torch.zeros(shape, dtype=next(model.parameters()).dtype)
    narrowed = narrow.materialize(model, example)  # first: it says what is wrong with a network that does not run
    before, after = narrow.multiply_adds(model, example), narrow.multiply_adds(narrowed, example)
    narrow.export(narrowed, example, out)
    wide = "".join(f"\nstays wide: {layer}: {reason}" for layer, reason in narrow.stays(narrowed).items())
    return f"{out}: {before:,} multiply-adds before, {after:,} after, {os.path.getsize(out):,} bytes{wide}"


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input."""
    survive_ascii()
    usage = "usage: python -m deploy.pack info FILE | export FILE OUT.pt2 [--model SOURCE]"
    try:
        match sys.argv[1:] if argv is None else list(argv):
            case ["-h" | "--help"]:
                print(usage)
            case ["info", file]:
                print(info(read(file)))
            case ["export", file, out, *model] if out and (not model or model[0] == "--model" and len(model) == 2):
                print(export(file, out, *model[1:]))
            case _:
                raise InputError(usage)
    except (InputError, OSError) as error:
        print(f"pack: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
