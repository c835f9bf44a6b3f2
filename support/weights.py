"""Checkpoint files as plain tensors by name, without running anything that is in them (SPEC 10).

Four formats: safetensors, both that ``torch.save`` writes (a zip archive; the older row of pickles), and TorchScript
archives. The last three hold a pickle, which as a rule may call any function. Here a small machine of our own steps
through it instead (:func:`unpickle`): it imports and calls nothing, knows a dozen names that make up a tensor, and
takes every TorchScript class for a bag of attributes. A tensor is a description until the end; then its size is
checked against the bytes that the file really has, before memory is taken for it.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from dataclasses import dataclass

import torch

from config import InputError
from support.files import shown

MAX_TEXT = 16 << 20   # bytes of a pickle or a JSON header; those of published networks take less than one million
MAX_STEPS = 1_000_000  # of a pickle
MAX_DEPTH, MAX_VISITS = 64, 200_000  # modules within modules, and attributes seen, of a TorchScript network


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file on the CPU, by the file's own names, out of {"model": …} or
    {"state_dict": …}; of a TorchScript archive, its parameters and buffers by their dotted names.
    Raises InputError, one line, for whatever cannot be used."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; give a checkpoint with --weights, or --weights none")
    try:
        if path.endswith(".safetensors"):
            return _read_safetensors(path)
        if not os.path.getsize(path):
            raise InputError(f"{path}: the file is empty")
        if _is_zip(path):
            return _read_zip(path)
        return _read_legacy(path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise InputError(f"{path}: needs more memory than there is") from None
    except Forbidden as error:
        raise InputError(f"{path}: holds Python objects besides tensors ({error}), which are not loaded; "
                         "save the network's state_dict() with torch.save") from None
    except Exception as error:  # damaged input: a short read, a wrong type, a missing entry, a wrong CRC, …
        reason = shown(" ".join(str(error).split()))[:160]
        raise InputError(f"{path}: damaged, or not a checkpoint ({type(error).__name__}: {reason}); get the file "
                         "again") from None


def is_torchscript(path: str) -> bool:
    """Whether a file is a TorchScript archive, as ``torch.jit.save`` writes it (and OpenAI published CLIP)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # what is wrong with it, read_checkpoint says
        return False


# ---------------------------------------------------------------------------------------------------------------
# The pickle machine


class Forbidden(Exception):
    """The pickle names something that is not part of a tensor."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; never looked up."""
    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """``numel`` numbers of ``dtype`` under ``key`` of the file."""
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Stored:
    """A tensor's place in its storage; sizes and strides are as the file says, not checked yet."""
    storage: Storage
    offset: int
    size: tuple
    stride: tuple


class Bag:
    """An object of a TorchScript class, as its attributes; or something that no tensor depends on."""

    def __init__(self):
        self.attributes = {}


STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}
ORDERED_DICT = Name("collections", "OrderedDict")
REBUILD = {Name("torch._utils", "_rebuild_tensor"), Name("torch._utils", "_rebuild_tensor_v2")}
DTYPES = {Name("torch", str(dtype).removeprefix("torch.")) for dtype in STORAGES.values()}
REBUILD_PARAMETER = Name("torch._utils", "_rebuild_parameter")
INERT = DTYPES | {
    Name("torch", "Size"), Name("torch", "device"), Name("torch.jit._pickle", "build_intlist"),
    Name("torch.jit._pickle", "build_doublelist"), Name("torch.jit._pickle", "build_boollist"),
    Name("torch.jit._pickle", "build_tensorlist"), Name("torch.jit._pickle", "restore_type_tag")}


def _named(module, name):
    found = Name(module, name)
    if module.split(".")[0] == "__torch__" or found in REBUILD or found in INERT or \
            found in (ORDERED_DICT, REBUILD_PARAMETER) or module == "torch" and name in STORAGES:
        return found
    if module == "torch._utils" and name.startswith("_rebuild_"):
        raise Forbidden(f"{shown(name)}: a tensor, but not a plain tensor of numbers")
    raise Forbidden(shown(f"{module}.{name}"))


def _call(function, arguments):
    """REDUCE and NEWOBJ: what ``function`` would make, for the names that are known."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise ValueError("calls what cannot be called")
    if function in REBUILD:
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise ValueError("a tensor without a storage or a shape")
        return Stored(storage, offset, size, stride)
    if function == REBUILD_PARAMETER:
        if not isinstance(arguments[0], Stored):
            raise ValueError("a parameter that is no tensor")
        return arguments[0]
    if function == ORDERED_DICT:
        if arguments:
            raise ValueError("an OrderedDict made of a list")
        return {}
    return Bag()


def _key(key):
    # No tuples: hashing one that holds itself a hundred levels deep would never end.
    if type(key) not in (str, int, float, bool, bytes):
        raise ValueError(f"a {type(key).__name__} as a key")
    return key


def _storage(identifier):
    kind, storage, key, _, numel, *view = identifier
    if kind != "storage" or not isinstance(storage, Name) or type(key) not in (str, int) or type(numel) is not int \
            or numel < 0 or any(view):
        raise ValueError("a storage of an unknown form")
    return Storage(str(key), STORAGES[storage.name], numel)


def unpickle(data: bytes, position: int = 0):
    """Step through one pickle in ``data`` → (value, position after it).

    The value is made of dictionaries, lists, tuples, numbers, text, :class:`Stored` tensors and :class:`Bag` objects.
    Raises Forbidden for a name that is not part of a tensor, and ValueError, IndexError, KeyError, TypeError or
    struct.error for what is not a pickle of these.
    """
    stack, marks, memo = [], [], {}

    def take(count):
        nonlocal position
        position += count
        if count < 0 or position > len(data):
            raise ValueError("ends early")
        return data[position - count:position]

    def number(form):
        return struct.unpack(form, take(struct.calcsize(form)))[0]

    def line():
        nonlocal position
        end = data.index(b"\n", position, position + 1000)
        text, position = data[position:end], end + 1
        return text.decode("utf-8")

    def since_mark():
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    def append(items):
        if type(stack[-1]) is not list:
            raise ValueError("appends to what is no list")
        stack[-1].extend(items)

    def assign(items):
        if type(stack[-1]) is not dict:
            raise ValueError("sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            stack[-1][_key(key)] = value

    constants = {b"N": None, b"\x88": True, b"\x89": False}
    numbers = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
    texts = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q", b"T": "<i", b"U": "<B", b"B": "<I", b"C": "<B", b"\x8e": "<Q"}
    empties = {b"}": dict, b"]": list, b")": tuple}
    for _ in range(MAX_STEPS):
        code = take(1)
        if code in numbers:
            stack.append(number(numbers[code]))
        elif code in constants:
            stack.append(constants[code])
        elif code in texts:
            raw = take(number(texts[code]))
            stack.append(raw if code in b"BC\x8e" else raw.decode("latin-1" if code in b"TU" else "utf-8"))
        elif code in empties:
            stack.append(empties[code]())
        elif code == b"\x8a":
            stack.append(int.from_bytes(take(number("<B")), "little", signed=True))
        elif code == b"(":
            marks.append(stack)
            stack = []
        elif code == b"t":
            items = since_mark()
            stack.append(tuple(items))
        elif code in b"\x85\x86\x87":
            count = code[0] - 0x84
            if len(stack) < count:
                raise ValueError("a tuple of too few items")
            stack[-count:] = [tuple(stack[-count:])]
        elif code == b"l":
            items = since_mark()
            stack.append(items)
        elif code == b"d":
            items = since_mark()
            stack.append({})
            assign(items)
        elif code == b"a":
            append([stack.pop()])
        elif code == b"e":
            append(since_mark())
        elif code == b"s":
            value, key = stack.pop(), stack.pop()
            assign([key, value])
        elif code == b"u":
            assign(since_mark())
        elif code == b"q":
            memo[number("<B")] = stack[-1]
        elif code == b"r":
            memo[number("<I")] = stack[-1]
        elif code == b"\x94":
            memo[len(memo)] = stack[-1]
        elif code == b"h":
            stack.append(memo[number("<B")])
        elif code == b"j":
            stack.append(memo[number("<I")])
        elif code == b"c":
            stack.append(_named(line(), line()))
        elif code == b"\x93":
            name, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(name, str):
                raise ValueError("a name that is no text")
            stack.append(_named(module, name))
        elif code in b"R\x81":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif code == b"Q":
            stack.append(_storage(stack.pop()))
        elif code == b"b":
            state = stack.pop()
            if isinstance(stack[-1], Bag):  # of a dictionary, the state is state_dict's _metadata: of no use here
                stack[-1].attributes = state if isinstance(state, dict) else {}
            elif not isinstance(stack[-1], dict):
                raise ValueError("a state of what has none")
        elif code == b"\x80":
            number("<B")
        elif code == b"\x95":
            number("<Q")
        elif code == b"0":
            stack.pop()
        elif code == b".":
            return stack.pop(), position
        else:
            raise ValueError(f"an unknown step {code!r}")
    raise ValueError(f"more than {MAX_STEPS} steps")


# ---------------------------------------------------------------------------------------------------------------
# From descriptions to tensors


def _state_dict(path, value):
    """The dictionary name → :class:`Stored` within what the pickle holds."""
    for _ in range(2):
        for wrapper in ("model", "state_dict"):
            if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
                value = value[wrapper]
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}: holds no state dict of tensors by name")
    for name, entry in value.items():
        if not isinstance(name, str) or not isinstance(entry, Stored):
            kind = "Tensor" if isinstance(entry, Stored) else type(entry).__name__
            raise InputError(f"{path}: not a state dict: entry {ascii(name)[:80]} is a {kind}, not a tensor by name")
    return value


def _attributes(path, root):
    """The tensors below a TorchScript object, by dotted names. Objects may be shared, so visits are counted."""
    found, left, visits = {}, [("", root, 0)], 0
    while left:
        prefix, bag, depth = left.pop()
        for name, value in bag.attributes.items():
            visits += 1
            if visits > MAX_VISITS or not isinstance(name, str) or len(name) > 200:
                raise ValueError("not the attributes of a network")
            if isinstance(value, Stored):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Bag) and value.attributes:
                if depth >= MAX_DEPTH:
                    raise ValueError(f"modules nested more than {MAX_DEPTH} deep")
                left.append((f"{prefix}{name}.", value, depth + 1))
    if not found:
        raise InputError(f"{path}: a TorchScript archive without tensors")
    return found


def _tensor(stored, numbers):
    """``stored`` as a view of its storage's ``numbers`` (1-d tensor). ValueError when it leads out of them."""
    size, stride, offset = stored.size, stored.stride, stored.offset
    if len(size) != len(stride) or len(size) > 8 or \
            not all(type(n) is int and 0 <= n < 1 << 62 for n in (*size, *stride, offset)):
        raise ValueError("a tensor of an impossible shape")
    if math.prod(size) > len(numbers) or math.prod(size) and \
            offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(numbers):
        raise ValueError("a tensor larger than its data")
    if not math.prod(size):
        if math.prod(n or 1 for n in size) > 1 << 40:  # torch multiplies the sides, empty or not
            raise ValueError("a tensor of an impossible shape")
        return torch.empty(size, dtype=numbers.dtype)
    return numbers.as_strided(size, stride, offset)


def _numbers(data, dtype):
    """Raw little-endian bytes (writable) → 1-d tensor."""
    if not data:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:
        return torch.frombuffer(data, dtype=torch.uint8) != 0  # a bool of another value than 0 and 1 is none
    return torch.frombuffer(data, dtype=dtype)


def _materialise(entries, read):
    """Name → :class:`Stored` into name → tensor; ``read(storage)`` gives a storage's bytes."""
    made, state = {}, {}
    for name, stored in entries.items():
        if stored.storage not in made:
            made[stored.storage] = _numbers(read(stored.storage), stored.storage.dtype)
        state[name] = _tensor(stored, made[stored.storage])
    return state


# ---------------------------------------------------------------------------------------------------------------
# Files of torch.save and torch.jit.save


def _is_zip(path):
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read_zip(path):
    """FOLDER/data.pkl and FOLDER/data/KEY, all stored as they are: nothing here is ever unpacked, so that nothing
    can grow. zipfile checks the CRC of each."""
    room = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:

        def record(name, limit=None):
            nonlocal room
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"{shown(name)} is compressed, as torch never does")
            room -= info.file_size  # two entries may point at the same bytes
            if room < 0 or limit is not None and info.file_size > limit:
                raise ValueError(f"{shown(name)} claims {info.file_size} bytes")
            data = bytearray(info.file_size)
            with archive.open(info) as file:
                if file.readinto(data) != info.file_size:
                    raise ValueError(f"{shown(name)} ends early")
                file.read(1)  # at the end it compares the CRC
            return data

        names = archive.namelist()
        roots = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"{path}: a zip archive, but not of torch.save: it holds {len(roots)} files */data.pkl")
        folder = roots[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and record(f"{folder}byteorder", 10) != b"little":
            raise InputError(f"{path}: written on a big-endian machine; save it again on an ordinary one")
        value, _ = unpickle(bytes(record(roots[0], MAX_TEXT)))
        entries = _attributes(path, value) if isinstance(value, Bag) else _state_dict(path, value)

        def read(storage):
            data = record(f"{folder}data/{storage.key}")
            if len(data) != storage.numel * storage.dtype.itemsize:
                raise ValueError(f"storage {shown(storage.key)} has {len(data)} bytes for {storage.numel} numbers")
            return data

        return _materialise(entries, read)


def _read_legacy(path):
    """torch.save before 1.6: pickles of a magic number, a version, the system, the objects and the storages' keys,
    then for each key in that order its length in numbers (int64) and its bytes."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        text = file.read(MAX_TEXT)
        magic, position = unpickle(text)
        if magic != 0x1950A86A20F9469CFC6C:
            raise ValueError("not of torch.save")
        _, position = unpickle(text, position)
        system, position = unpickle(text, position)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise InputError(f"{path}: written on a big-endian machine; save it again on an ordinary one")
        value, position = unpickle(text, position)
        keys, position = unpickle(text, position)
        entries, storages = _state_dict(path, value), {}
        # Those that only other objects of the file use (an optimiser's, say) have to be stepped over as well.
        for storage in _storages(value):
            if storages.setdefault(storage.key, storage) != storage:
                raise ValueError(f"storage {shown(storage.key)} is of two kinds")
        places = {}
        for key in keys:
            storage = storages[key]
            file.seek(position)
            numel, = struct.unpack("<q", file.read(8))
            position += 8 + storage.numel * storage.dtype.itemsize
            if numel != storage.numel or position > size:
                raise ValueError(f"storage {shown(key)} has {numel} numbers in place of {storage.numel}, or ends early")
            places[key] = position - storage.numel * storage.dtype.itemsize

        def read(storage):
            file.seek(places[storage.key])
            return bytearray(file.read(storage.numel * storage.dtype.itemsize))

        return _materialise(entries, read)


def _storages(value):
    """Every storage below ``value``, each object visited once."""
    seen, left = set(), [value]
    while left:
        item = left.pop()
        if isinstance(item, Stored):
            yield item.storage
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            left.extend(item.values() if isinstance(item, dict) else item)


# ---------------------------------------------------------------------------------------------------------------
# safetensors

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                      "U8": torch.uint8, "BOOL": torch.bool}


def _read_safetensors(path):
    """8 bytes: header length, little-endian; JSON header: name → dtype, shape, data_offsets; then the raw data.
    Every number of the header is checked against the file's size before anything is allocated."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size < 8:
            raise InputError(f"{path}: {size} bytes are too few for a safetensors file")
        length, = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_TEXT):
            raise InputError(f"{path}: not a safetensors file, or truncated: a header of {length} bytes "
                             f"in a file of {size}")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise InputError(f"{path}: not a safetensors file: its header is not a JSON object")
        header.pop("__metadata__", None)
        if not header:
            raise InputError(f"{path}: holds no state dict of tensors by name")
        room, spans = size - 8 - length, {}
        for name, entry in header.items():
            try:
                dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                sound = isinstance(shape, list) and len(shape) <= 8 and \
                    all(type(n) is int and 0 <= n <= room for n in (*shape, begin, end)) and \
                    end - begin == math.prod(shape) * dtype.itemsize and \
                    math.prod(n or 1 for n in shape) <= max(room, 1)  # an empty tensor can claim any other side
            except (KeyError, TypeError, ValueError):
                sound = False
            if not sound:
                raise InputError(f"{path}: damaged, truncated or of a type besides {', '.join(SAFETENSORS_DTYPES)}: "
                                 f"{shown(name)} is declared as {_brief(entry)} in {room} bytes of data")
            spans[name] = begin, end, dtype, shape
        last = 0  # the spans must tile the data, so that reading them all takes no more memory than the file
        for begin, end, _, _ in sorted(spans.values(), key=lambda span: span[:2]):
            if begin != last:
                raise InputError(f"{path}: damaged safetensors file: its tensors overlap or leave gaps")
            last = end
        if last != room:
            raise InputError(f"{path}: damaged safetensors file: {room - last} bytes belong to no tensor")
        state = {}
        for name, (begin, end, dtype, shape) in spans.items():
            file.seek(8 + length + begin)
            data = bytearray(end - begin)
            if file.readinto(data) != len(data):
                raise InputError(f"{path}: truncated while it was read")
            state[name] = _numbers(data, dtype).reshape(shape)
        return state


def _brief(entry):
    try:
        return ascii(entry)[:120]
    except RecursionError:
        return "lists within lists"
