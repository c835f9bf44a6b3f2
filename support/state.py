"""What a run needs to go on where it was stopped, so that it ends in the same result.

A run is a row of phases. After each, everything that the next ones depend on is written (:meth:`Progress.commit`). A phase
that was broken off is taken again from its beginning, but what cost time is not computed twice: figures that were
measured in it are remembered one by one (:meth:`Progress.once`), and a training goes on at its last saved step. What
was not saved when a process was killed is at most about ``INTERVAL`` seconds of work.

On the disk a state is a folder: a file per part, and ``manifest.json``, which names the current ones with their sizes
and checksums. Files never change; a new manifest is renamed over the old one, so that there is one whole state at every
moment. Parts hold plain values and tensors (:func:`encode`), without the rows that are pruned, and with the exponents
of what is left in fewer bits; reading them executes nothing. Within a phase a thread writes them, from a copy, while
the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from config import InputError
from support.files import replace_file, shown
from support.ranks import Ranks
from support.images import cores

FORMAT = 3
INTERVAL = 20.0  # seconds between two saves within a phase
SHARE = 0.025  # of the machine's time that saving within phases may take
NETWORKS = 5  # times the size of the network that a state may take besides the agents
MAGIC = b"HiReLC state\n"
MAX_HEADER, MAX_MANIFEST = 32 << 20, 1 << 20
MAX_ZEROS = 16  # rows of a tensor for each that is in the file
RAW, PLANES = b"r", b"p"  # what precedes numbers of four bytes
PLAIN = 4096  # elements of a tensor that is too small to be worth coding
AGENTS = {"run", "known", "done"}  # parts without networks
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}


class Stopped(Exception):
    """The run was asked to stop and its state is saved. ``code``: exit code, 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.code = 128 + number


class SaveError(Exception):
    """The state could not be written; the one before it is intact."""


# ---------------------------------------------------------------------------------------------------------------
# Values as bytes


def encode(value, file) -> None:
    """Write None, bool, int, float, str, bytes, tensors, and lists, tuples and dictionaries of them; a tuple comes back
    as a list. Raises TypeError for anything else."""
    Frozen(value)(file)


class Frozen:
    """A function that writes ``value`` to a file, as :func:`encode`, as it is now, whatever becomes of its tensors.

    ``bytes``: how long the file is if ``coded`` is False; True leaves out what exponents do not need, which takes longer.
    """

    def __init__(self, value, coded: bool = True):
        self.blobs, self.coded = [], coded
        self.header = json.dumps(_plain(value, self.blobs)).encode()
        self.bytes = len(self.header) + sum(blob.nbytes if isinstance(blob, np.ndarray) else len(blob)
                                            for blob in self.blobs)

    def __call__(self, file) -> None:
        file.write(MAGIC + len(self.header).to_bytes(8, "little") + self.header)
        for blob in self.blobs:
            if isinstance(blob, np.ndarray) and blob.itemsize == 4:
                for part in _planes(blob) if self.coded else (RAW, blob.view(np.uint8)):
                    file.write(part)
            else:
                file.write(blob)


def _plain(value, blobs):
    """``value`` as JSON; copies of tensors, and bytes, go to ``blobs``, float32 and int32 ones as they are, others as
    bytes. Every dictionary there has one key, which tells its kind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        used = _used_rows(tensor)
        if used is not None:
            blobs += [np.packbits(used.numpy()).tobytes(), tensor[used].reshape(-1).numpy()]
            return {"rows": [list(tensor.shape), int(used.sum())]}
        copy = tensor.reshape(-1).clone() if tensor.data_ptr() == value.data_ptr() else tensor.reshape(-1)
        blobs.append(copy.numpy() if tensor.itemsize == 4 else copy.view(torch.uint8).numpy() if len(copy) else b"")
        return {"tensor": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]}
    if isinstance(value, (bytes, bytearray)):
        blobs.append(bytes(value))
        return {"bytes": len(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item, blobs) for item in value]
    if isinstance(value, dict):
        return {"items": [[_plain(key, blobs), _plain(item, blobs)] for key, item in value.items()]}
    if isinstance(value, np.generic):
        return _plain(value.item(), blobs)
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def _planes(values):
    """float32 or int32 [n] for the disk, other than behind RAW as they are: turned left by a bit, so that a float's
    exponent is a byte; then the four planes of bytes, the highest first, each behind its length. Exponents of weights and
    moments are worth two or three bits and Huffman-coded, the two high bytes of differences likewise."""
    bits, worth = values.view(np.uint32), (3,) if values.dtype == np.float32 else (3, 2)
    yield PLANES
    turned = ((bits << np.uint32(1)) | (bits >> np.uint32(31))).astype("<u4", copy=False)
    for index in (3, 2, 1, 0):
        plane = turned.view(np.uint8)[index::4]
        data = plane.tobytes()
        if index in worth and len(bits) >= PLAIN and _entropy(plane[::len(bits) // PLAIN]) < 7:
            coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
            data = min(coder.compress(data) + coder.flush(), data, key=len)
        yield len(data).to_bytes(8, "little")
        yield data


def _entropy(sample) -> float:
    """Bits per byte."""
    share = np.bincount(sample) / len(sample)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def _joined(count, take):
    """float32 [count], as it is or out of its planes; ``take(n)`` gives the next n bytes. Raises ValueError for what
    is never written."""
    kind, turned = take(1), None
    if kind == RAW:
        data = take(4 * count)
        return torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
    if kind != PLANES:
        raise ValueError("numbers of no known kind")
    for index in (3, 2, 1, 0):
        data = take(int.from_bytes(take(8), "little"))
        if len(data) != count:
            if not len(data) < count <= 8 * len(data):  # a Huffman code has no less than a bit for each
                raise ValueError("a code that cannot be")
            coder = zlib.decompressobj(-15)
            try:
                data = coder.decompress(data, count)
                rest = coder.decompress(coder.unconsumed_tail, 1)
            except zlib.error as error:
                raise ValueError(str(error)) from None
            if len(data) != count or rest or not coder.eof or coder.unused_data:
                raise ValueError("a code of another length")
        if turned is None:
            turned = np.empty((count, 4), np.uint8)
        turned[:, index] = np.frombuffer(data, np.uint8)
    bits = turned.reshape(-1).view("<u4")
    return torch.from_numpy(((bits >> np.uint32(1)) | (bits << np.uint32(31))).view(np.float32))


def _used_rows(tensor):
    """Which rows of a float32 matrix or kernel are not all +0, bool [n]; None where leaving out the others is no gain, or
    leaves so little that whoever reads it would have to believe in the rest."""
    if tensor.dtype != torch.float32 or tensor.dim() < 2 or not tensor.numel():
        return None
    bits = tensor.view(torch.int32).flatten(1)
    if bits[:, 0].ne(0).all():  # the common case, at once
        return None
    used = bits.ne(0).any(1)
    return used if len(used) <= MAX_ZEROS * int(used.sum()) < MAX_ZEROS * len(used) else None


def decode(path):
    """What :func:`encode` wrote. Raises ValueError for a file that is not of that kind; no size in it is believed before
    the file was seen to be as long."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("not a part of a state")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, MAX_HEADER):
            raise ValueError("cut off")
        tree, left = json.loads(file.read(length)), size - file.tell()

        def take(count):
            nonlocal left
            if not isinstance(count, int) or not 0 <= count <= left:
                raise ValueError("cut off")
            left -= count
            return bytearray(file.read(count))

        def value(node):
            if not isinstance(node, (dict, list)):
                return node
            if isinstance(node, list):
                return [value(item) for item in node]
            (kind, what), = node.items()
            if kind == "items":
                return {value(key): value(item) for key, item in what}
            if kind == "bytes":
                return bytes(take(what))
            if kind == "rows":
                shape, count = what
                if not all(type(n) is int and n > 0 for n in (*shape, count)) or not count <= shape[0] <= MAX_ZEROS * count:
                    raise ValueError("rows that cannot be")
                used = np.unpackbits(np.frombuffer(take(-(-shape[0] // 8)), np.uint8))[:shape[0]].astype(bool)
                if used.sum() != count:
                    raise ValueError("another number of rows")
                kept = _joined(count * math.prod(shape[1:]), take)
                found = torch.zeros(shape)
                found[torch.from_numpy(used)] = kept.reshape(count, *shape[1:])
                return found
            dtype, shape = what
            if kind != "tensor" or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"unknown entry {kind}")
            if DTYPES[dtype].itemsize == 4:
                return _joined(math.prod(shape), take).view(DTYPES[dtype]).reshape(shape)
            data = take(math.prod(shape) * DTYPES[dtype].itemsize)
            return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape) if data else torch.empty(
                shape, dtype=DTYPES[dtype])

        found = value(tree)
        if left:
            raise ValueError("bytes behind its end")
        return found


def difference(tensors: dict, other: dict | None) -> dict:
    """``tensors`` by name, float32 ones as the bits (int32) in which they differ from ``other``'s; for two networks of
    which one was trained on from the other that is fewer. Those with pruned rows stay, and all where there is no other."""
    return {name: value.view(torch.int32) ^ other[name].view(torch.int32) if other and _alike(value, other[name]) else value
            for name, value in tensors.items()}


def _alike(value, other) -> bool:
    return (isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape == other.shape
            and value.dim() > 0 and _used_rows(value.detach()) is None)


def restored(tensors: dict, other: dict | None) -> dict:
    """What :func:`difference` was given, with the same ``other``."""
    return {name: (value ^ other[name].cpu().view(torch.int32)).view(torch.float32)
            if other and isinstance(value, torch.Tensor) and value.dtype == torch.int32
            and other[name].dtype == torch.float32 else value for name, value in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------
# The folder


class Store:
    """The state of one run below ``folder``. ``identity``: flat dictionary of what has to be the same for the run to go on
    (settings, versions)."""

    def __init__(self, folder, identity: dict):
        self.folder, self.identity = Path(folder), json.loads(json.dumps(identity))
        self.parts: dict[str, list] = {}  # name → [file, bytes, CRC-32]
        self.number = 0

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.folder / "manifest.json").exists()

    def write(self, parts: dict, drop=()) -> None:
        """Put new parts in the place of those of their names, leave out ``drop``, keep the others.

        A value is encoded; a callable, as :class:`Frozen` gives it, writes the file itself. Raises SaveError; the state
        before is then intact.
        """
        self.number += 1
        new = {name: kept for name, kept in self.parts.items() if name not in drop}
        try:
            self.folder.mkdir(exist_ok=True)
            for name, value in parts.items():
                file = f"{name}-{self.number}"
                fill = value if callable(value) else lambda out: encode(value, out)
                new[name] = [file, *replace_file(self.folder / file, fill)]
            manifest = {"format": FORMAT, "identity": self.identity, "number": self.number, "parts": new}
            text = json.dumps(manifest, indent=1).encode()
            replace_file(self.folder / "manifest.json", lambda out: out.write(text))
        except OSError as error:
            raise SaveError(f"cannot save the state in {self.folder}: {error.strerror or error}; the one before it is "
                            "intact: make room there, or give the folder back, and go on with --resume") from None
        finally:
            self._tidy(new if self._current() == self.number else self.parts)
        self.parts = new

    def _current(self) -> int | None:
        try:
            return json.loads((self.folder / "manifest.json").read_bytes())["number"]
        except (OSError, ValueError, KeyError):
            return None

    def _tidy(self, parts) -> None:
        """Remove what no manifest names."""
        named = {file for file, *_ in parts.values()} | {"manifest.json"}
        with contextlib.suppress(OSError):  # where nothing can be removed, writing says more
            for entry in list(self.folder.iterdir()):
                if entry.name not in named:
                    entry.unlink(missing_ok=True)

    def read(self) -> dict:
        """The manifest's parts: name → value.

        Raises InputError for a state of other settings or another version, with the differing keys, and for one that is
        damaged.
        """
        path = self.folder / "manifest.json"
        try:
            if path.stat().st_size > MAX_MANIFEST:
                raise ValueError("too long")
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise InputError(f"{self.folder}: a state of format {shown(manifest['format'])}, this program reads "
                                 f"{FORMAT}; go on with the version that wrote it, or start anew with --restart")
            there = {str(k): v for k, v in dict(manifest["identity"]).items()}
            parts = {str(k): list(v) for k, v in manifest["parts"].items()}
            self.number = int(manifest["number"])
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise self._damaged(path, error) from None
        differing = [f"{key} (there {shown(there.get(key))}, now {shown(self.identity.get(key))})"
                     for key in sorted({*there, *self.identity}) if there.get(key) != self.identity.get(key)]
        if differing:
            raise InputError(f"{self.folder}: a state with other settings or versions: {'; '.join(differing)}; give "
                             "those, or start anew with --restart")
        found = {}
        for name, entry in parts.items():
            try:
                file, size, crc = entry
                if not re.fullmatch(r"[a-z0-9.]+-[0-9]+", file):
                    raise ValueError(f"not a file of a state: {ascii(file)[:80]}")
                path = self.folder / file
                if path.stat().st_size != size:
                    raise ValueError(f"{path.stat().st_size} bytes, not {size}")
                with open(path, "rb") as content:
                    found_crc = 0
                    while block := content.read(1 << 22):
                        found_crc = zlib.crc32(block, found_crc)
                if found_crc != crc:
                    raise ValueError("its checksum is another")
                found[name] = decode(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError,
                    RuntimeError) as error:
                raise self._damaged(self.folder / str(name), error) from None
        self.parts = parts
        self._tidy(parts)
        return found

    def _damaged(self, path, error) -> InputError:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return InputError(f"{path}: damaged, or not a state of this program ({reason}); start anew with --restart")

    def remove(self) -> None:
        """The run is finished: its state goes, first what makes it one."""
        (self.folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.parts = {}


@contextlib.contextmanager
def understood():
    """What a state holds is taken over inside: InputError where it is whole and yet not what this program writes."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        raise InputError(f"the state holds something else than this program writes ({type(error).__name__}: "
                         f"{shown(' '.join(str(error).split())[:160])}); start anew with --restart") from None


# ---------------------------------------------------------------------------------------------------------------
# Random states


def random_states() -> dict:
    """Those of torch, CUDA, numpy and Python, as plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, following = random.getstate()
    return {"torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, list(numbers), following]}


def set_random_states(states: dict) -> None:
    """Put :func:`random_states` back."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][:torch.cuda.device_count()])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))


# ---------------------------------------------------------------------------------------------------------------
# Where a run is


class Progress:
    """Which phases of a run are done, and what is known within the one that is going on.

    Without a ``store`` nothing is kept. ``ranks``: several processes save at the end of phases and epochs only, since
    each knows just its own part in between, and the first of them writes. ``note``: says what was substituted.
    """

    def __init__(self, store: Store | None = None, ranks: Ranks = Ranks(), note=lambda text: None):
        self.note = note
        self.store, self.ranks, self.alone, self.writes = store, ranks, ranks.size == 1, ranks.first
        self.done: list[str] = []
        self.known: dict[str, object] = {}
        self.counts: dict[str, int] = {}
        self.training = None  # (name, Trainer) of the training that is going on
        self.broken_off: dict | None = None  # the state of the one that was
        self.reference: dict | None = None  # a network on the disk, of which its best epoch's is the difference there
        self.needless: tuple[str, ...] = ()  # parts that it makes so
        self.stored_best: dict | None = None  # its best epoch's network, as the disk has it
        self.saved, self.cost, self.spent = time.monotonic(), 0.0, 0.0
        self.writer, self.writing = ThreadPoolExecutor(1), None  # a thread once it has something to do
        self.asked: int | None = None  # the signal that asks for a stop

    def begin(self) -> None:
        """Start a phase: what is counted in it counts from 0."""
        self.counts = {}

    def once(self, key: str, compute):
        """compute(), or what it gave before the run was broken off in this phase. ``key`` is numbered, so that it may be
        the same for every step of a loop."""
        if self.store is None or not self.alone:
            return compute()
        number = self.counts[key] = self.counts.get(key, -1) + 1
        key = f"{key} {number}"
        if key not in self.known:
            before, counts = set(self.known), dict(self.counts)
            value = compute()
            # What it consists of need not be known any more.
            self.known = {k: v for k, v in self.known.items() if k in before}
            self.counts, self.known[key] = counts, value
            self.tick()
        return self.known[key]

    def latest(self, key: str, compute):
        """compute() in a loop of which each value takes the place of the one before: the last known value at its turn,
        None at the turns before it."""
        if self.store is None or not self.alone:
            return compute()
        number = self.counts[key] = self.counts.get(key, -1) + 1
        last, value = self.known.get(key, (-1, None))
        if number > last:
            value = compute()
            self.known[key] = [number, value]
            self.tick()
        return value if number >= last else None

    def train(self, name: str, trainer, reference: dict | None = None, needless=()) -> None:
        """``trainer`` is the training that is going on; it takes over where it was broken off. ``reference``: a network
        that is on the disk already, the same whenever the run is resumed; ``needless``: parts that its state makes so."""
        if self.broken_off is not None and self.broken_off.get("name") == name:
            with understood():
                state = self.broken_off["trainer"]
                trainer.load_state_dict({**state, "best_state": restored(state["best_state"], reference)})
        self.broken_off, self.training, self.reference, self.needless = None, (name, trainer), reference, needless
        trainer.progress = self

    def trained(self) -> None:
        """The training is at its end; from here on its network may change, and its last saved state stays."""
        self.training = None

    def tick(self, epoch: bool = False) -> None:
        """A place where the run can stop, and where its state is saved if that is due: ``INTERVAL`` seconds after the
        last time, at the end of an ``epoch`` as soon as it costs no more than ``SHARE`` of the time."""
        if self.store is None:
            return
        now = time.monotonic()
        if self.writing is not None and self.writing.done():
            self.wait()
        due = now - self.saved >= (0.0 if epoch else INTERVAL) and now - self.saved >= self.cost / SHARE
        if (self.alone and (due or self.asked is not None)) or (epoch and due):
            self._save_phase()
        if self.asked is not None and self.alone:
            self.wait()
            raise Stopped(self.asked)

    def _save_phase(self) -> None:
        if not self.writes:
            return
        start = time.monotonic()
        self.wait()
        parts = {"known": Frozen(self.known)}
        if self.training is not None:
            name, trainer = self.training
            state = trainer.state_dict()
            best = state.pop("best_state")
            if best is not self.stored_best:  # it changes with epochs, not with steps
                parts["trainer.best"], self.stored_best = Frozen(difference(trainer.coded(best), self.reference)), best
            parts["trainer"] = part = Frozen({"name": name, "trainer": state}, coded=False)
            sizes = {kept: size for kept, (_, size, _) in self.store.parts.items() if kept not in self.needless}
            sizes |= {new: made.bytes for new, made in parts.items()}
            network = sum(tensor.nbytes for tensor in state["model"].values())
            part.coded = sum(sizes[name] for name in sizes.keys() - AGENTS) > NETWORKS * network
        self.saved = time.monotonic()
        self.writing = self.writer.submit(self._write, parts, self.needless if "trainer" in parts else ())
        self.cost = time.monotonic() - start
        self.spent += self.cost

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises SaveError where it could not be written."""
        if self.writing is None:
            return
        start = time.monotonic()
        try:
            seconds = self.writing.result()
        finally:
            if self.writing.done():  # a signal may have come first
                self.writing = None
        seconds += time.monotonic() - start
        self.cost += seconds
        self.spent += seconds

    def _write(self, parts, drop=()) -> float:
        """Put them on the disk; the seconds that this took of all cores."""
        start = time.thread_time()
        self.store.write(parts, drop)
        return (time.thread_time() - start) / cores()

    def commit(self, phase: str, parts: dict, drop=()) -> None:
        """The end of a phase: ``parts`` are what the next ones depend on."""
        self.wait()
        self.done.append(phase)
        self.known, self.training, self.broken_off = {}, None, None
        self.stored_best = None
        if self.store is None:
            return
        if self.writes:
            start = time.monotonic()
            self._write({**parts, "done": self.done}, ("known", "trainer", "trainer.best", *drop))
            self.saved = time.monotonic()
            self.spent += self.saved - start
        if self.asked is not None and self.alone:
            raise Stopped(self.asked)

    def load(self) -> dict:
        """The parts of the last commit, which the first process reads for all: the others may be on machines that know
        nothing of its disk. What was known after it is taken over here."""
        with self.ranks.alike():
            parts = self.store.read() if self.writes else None
        parts = self.ranks.same(parts)
        with understood():
            self.done = list(parts.pop("done", []))
            self.known = dict(parts.pop("known", {}))
            self.broken_off, best = parts.pop("trainer", None), parts.pop("trainer.best", {})
            if self.broken_off is not None:
                self.broken_off["trainer"]["best_state"] = best
        return parts
