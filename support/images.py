"""Where images come from: layouts on disk, decoding on all cores, and the cache of decoded images (ledger D15, D19).

| data set | below data.dir | order |
|---|---|---|
| cifar10, cifar100 | NAME/{train,test}/CLASS/*, or the published archive | permuted; the archive's test split as is |
| tiny-imagenet | tiny-imagenet-200/, the published tree, downloaded where absent | permuted; val_annotations.txt |
| imagenet | imagenet/{train,val}/CLASS/*, or {train,val}/CLASS/* | both permuted |
| folder | {train,val}/CLASS/* or {train,test}/CLASS/* | both permuted |

"Permuted" is one fixed pseudo-random permutation of the sorted files, so that subsets are prefixes in which every
class turns up early (in name order the first 1,280 test images would be of a class or two). Class index = place in the
sorted class names; for tiny-imagenet, line of wnids.txt.

**Cache.** DIR/.hirelc-cache/ keeps one file per data set, split and side: the decoded images of a prefix of the split
in its order, then one byte of flags per file, then a JSON header with checksums, its length and its checksum. The
file's name ends in a key over names, sizes and modification times of the *whole* split, in order, and how it was
decoded. A run that asks for no more images than the file covers maps it into memory, once its checksums are seen to
be right; one that asks for more decodes all that it asks for and replaces it. It is written under another name, synced
and renamed: a run sees a whole cache or none. A lock makes a second run wait for the first and then use its cache.

**Decoding.** Few images are read by threads, many by processes that share the memory which receives the pixels: Pillow
holds the interpreter lock for about half of a small image's time. The processes run this file as a script, which needs
no torch and imports nothing of the calling program; they end when their input does, so none outlives the run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import mmap
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zlib
from dataclasses import dataclass, field

import numpy as np
import PIL
from PIL import Image

from config import Data, InputError
from support.files import extract, fetch, parse_json, read_json, shown

try:
    import fcntl
except ImportError:                                         # not on Windows: no lock, every run builds for itself
    fcntl = None

ORDER_SEED = 2606                  # of the fixed permutation of files; no setting, so that test subsets stay the same
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
PUBLISHED = {"cifar10": (10, 50_000, 10_000), "cifar100": (100, 50_000, 10_000),
             "tiny-imagenet": (200, 100_000, 10_000),
             "imagenet": (1000, 1_281_167, 50_000)}         # classes, training images, test images
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
IN_MEMORY = 4 * 2**30              # bytes of a decoded split of imagenet or folder; a larger one is streamed
MANY = 2000                        # images from which on processes decode: below, starting them costs more
CHUNK = 100                        # images per request to a thread or process
CACHE = ".hirelc-cache"
FORMAT = 2                         # of the cache files, part of their key
MAGIC = b"HiReLCu8"
MAX_PIXELS, MAX_LENGTH = 64 << 20, 1 << 16                  # of an image; one that claims more may take minutes
CHECKED = 1000                     # images under one checksum of the cache
MAX_HEADER = 64 << 20              # bytes of the cache's header
RESIZED, RECOLOURED, UNREADABLE = 1, 2, 4                   # flags of an image

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it prints what is wrong with a file by itself, too


def silent(what: str, done: int, total: int) -> None:
    """The progress callback that says nothing."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class Part:
    """A split as read. ``pixels`` uint8 [n, 3, side, side]; None where the images are to be streamed from ``files``,
    the first n of its names. ``labels`` int64 [n]; ``available``: image files of the whole split; ``skipped``: files
    of the asked-for part that were left out."""
    labels: np.ndarray
    available: int
    pixels: np.ndarray | None = None
    files: Listing | None = None
    skipped: int = 0


@dataclass(eq=False)
class Listing:
    """Image files of a split in their final order: ``names`` relative to ``folder``, and class indices. ``strays``:
    paths of files beside them that are no images."""
    folder: pathlib.Path
    names: list[str]
    labels: list[int]
    strays: list[str] = field(default_factory=list)

    def paths(self, count=None) -> list[str]:
        """The first ``count`` paths."""
        folder = str(self.folder)
        return [f"{folder}/{name}" for name in self.names[:count]]

    def take(self, order) -> Listing:
        """The files at the positions ``order``."""
        return Listing(self.folder, [self.names[i] for i in order], [self.labels[i] for i in order], self.strays)


@dataclass(frozen=True)
class Sample(Data):
    """Settings under which at most ``at_most`` images of a split are read; how many were asked for is checked all the
    same."""
    at_most: int = 0


@dataclass(frozen=True)
class Absent:
    """``what`` would be done to get a data set, and the ``bytes`` that it takes on the disk then."""
    what: str
    bytes: float


# Bytes of the published archives, and of what is in them.
ARCHIVES = {"cifar10": (170e6, 186e6), "cifar100": (169e6, 186e6), "tiny-imagenet": (248e6, 500e6)}


def absent(settings) -> Absent | None:
    """What :func:`read` would download or unpack first; None where the data set lies there, or is never fetched."""
    base, name = pathlib.Path(settings.dir), settings.name
    if name not in ARCHIVES or (base / name).exists():
        return None
    if name == "tiny-imagenet":
        url, archive, folder = TINY_IMAGENET_URL, base / "tiny-imagenet-200.zip", base / "tiny-imagenet-200"
    else:
        import torchvision
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        url, archive, folder = kind.url, base / kind.filename, base / kind.base_folder
    packed, unpacked = ARCHIVES[name]
    if folder.exists():
        return None
    if archive.is_file():
        return Absent(f"would be unpacked from {archive}", unpacked)
    return Absent(f"would be downloaded from {url} to {archive} (about {packed / 1e6:.0f} MB)", packed + unpacked)


def has_cache(settings, split, side, size) -> bool:
    """Whether a cache of at least ``size`` bytes lies there for a split; one that is out of date makes room."""
    pattern = f"{settings.name}-{split}-{side}-*.u8"
    return any(path.stat().st_size >= size for path in (pathlib.Path(settings.dir) / CACHE).glob(pattern))


def read(settings, progress=silent):
    """→ (train Part, test Part, class names, notes) of the data set that ``settings`` (config.Data) name.

    Raises InputError when it is not there, cannot be had, is incomplete or damaged, or holds too few images.
    """
    notes = []
    reader = {"cifar10": _cifar, "cifar100": _cifar, "tiny-imagenet": _tiny_imagenet, "imagenet": _imagenet,
              "folder": _folder}[settings.name]
    train, test, names = reader(settings, progress, notes)
    known = zip(("classes", "training images", "test images"), (len(names), train.available, test.available),
                PUBLISHED.get(settings.name, ()))
    for what, found, published in known:
        if found != published:
            notes.append(f"{settings.name}: {found} {what} found, the published set has {published}")
    for what, part in (("training images: the first {} of a fixed permutation of {}", train),
                       ("test images: the first {} of the test order of {}", test)):
        asked = len(part.labels) + part.skipped
        if asked < part.available:
            notes.append(f"{settings.name}: " + what.format(asked, part.available))
    return train, test, names, notes


def fixed_order(n: int) -> list[int]:
    """The one permutation of n items behind every order and subset here (ledger D19).

    RandomState: numpy guarantees that its stream never changes, so subsets stay comparable across versions.
    """
    return np.random.RandomState(ORDER_SEED).permutation(n).tolist()


def _asked(settings, split, available, where):
    """How many images to take: the setting, or all for 0; InputError when there are fewer."""
    wanted = getattr(settings, f"{split}_images")
    if wanted > available:
        raise InputError(f"data.{split}_images={wanted}: {where} holds {available}; give at most {available}, "
                         "or 0 for all")
    return min(wanted or available, getattr(settings, "at_most", available))


def _read_part(settings, split, listing, side, progress, notes, may_stream=False) -> Part:
    """The asked-for first images of ``listing``, decoded to ``side``, or to be streamed where that takes too much.

    Unreadable images among them are left out with skip_corrupt: n asked for, k unreadable gives n - k.
    """
    available = len(listing.names)
    count = _asked(settings, split, available, f"the {split} split of {settings.name} in {settings.dir}")
    prefix = f"{settings.name}-{split}-{side}"
    size = count * 3 * side * side
    part = Part(np.empty(0, np.int64), available)
    if may_stream and size > IN_MEMORY:
        part.files = listing.take(range(count))
        flags, reasons = np.zeros(count, np.uint8), {}
        if settings.skip_corrupt:
            flags, reasons = _verified(settings, prefix, listing, count, f"checking {split} images", progress, notes)
            part.files = part.files.take(np.flatnonzero(flags & UNREADABLE == 0).tolist())
        notes.append(f"{settings.name}: {split} images are streamed from disk; decoded to {side} px they would take "
                     f"{size / 1e9:.1f} GB")
    else:
        part.pixels, flags, reasons = _decoded(settings, prefix, listing, count, side, f"reading {split} images",
                                               progress, notes)
    readable = np.flatnonzero(flags & UNREADABLE == 0)
    labels = np.array(listing.labels[:count], np.int64)
    part.labels, part.skipped = labels[readable], count - len(readable)
    for flag, what in ((RESIZED, f"not {side} x {side} and were resized to it"),
                       (RECOLOURED, "not RGB (grey, palette) and were converted")):
        found = int(np.count_nonzero(flags & flag))
        if found:
            notes.append(f"{settings.name}: {found} {split} images were {what}")
    if part.skipped:
        named = [f"{listing.names[i]} ({reasons[i]})" for i in sorted(reasons)[:3]]
        notes.append(f"{settings.name}: left out {part.skipped} {split} images that cannot be read: "
                     f"{', '.join(named)}{', …' if part.skipped > 3 else ''}")
        lost = sorted(set(labels.tolist()) - set(part.labels.tolist()))
        if not len(readable) or lost and count == available:
            i = labels.tolist().index(lost[0])
            raise InputError(f"{os.path.join(listing.folder, listing.names[i])}: no image of its class can be read, "
                             f"so nothing of the class is left in the {split} split; replace the files, or remove "
                             "the class everywhere")
    if listing.strays:
        part.skipped += len(listing.strays)
        notes.append(f"{settings.name}: left out {len(listing.strays)} {split} files that are no images: "
                     f"{', '.join(listing.strays[:3])}{', …' if len(listing.strays) > 3 else ''}")
    return part


# ---------------------------------------------------------------------------------------------------------------
# Decoding


def decode(paths, side, what="reading images", progress=silent, *, workers=None, file=None, skip=False):
    """Image files → (pixels uint8 [n, 3, side, side], flags uint8 [N], {position: reason} of the unreadable ones).

    ``workers``: threads or processes, all cores by default. ``file``: an open file of at least N·3·side² bytes that
    receives the pixels. ``side`` 0 only tries whether the images can be read. With ``skip`` n is the number of
    readable images, else an unreadable one raises InputError naming the first in order.
    """
    n, workers = len(paths), workers or cores()
    shape, shared = (n, 3, side, side), None
    by_process = n >= MANY and workers > 1 and bool(sys.executable) and (
        file is not None or not side or hasattr(os, "memfd_create"))
    if by_process and file is None and side:
        shared = os.memfd_create("decoded")
        os.ftruncate(shared, n * 3 * side * side)
    flags, reasons = np.zeros(n, np.uint8), {}
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    processes = []
    progress(what, 0, n)
    try:
        descriptor = file.fileno() if file is not None else shared
        pixels = _map(descriptor, shape) if descriptor is not None and n and side else np.empty(shape, np.uint8)
        if by_process:
            for _ in range(min(workers, -(-n // CHUNK))):
                processes.append(_start(descriptor if side else -1, n, side, skip))
            idle = queue.SimpleQueue()
            for process in processes:
                idle.put(process)
            read = lambda start: _ask(idle, start, paths[start:start + CHUNK])
        else:
            read = lambda start: read_images(paths[start:start + CHUNK], pixels[start:start + CHUNK], side, skip)
        starts = range(0, n, CHUNK)
        for start, (found, bad) in zip(starts, pool.map(read, starts)):
            for i, reason in bad.items():
                reasons[start + int(i)] = reason
                if not skip:
                    raise _unreadable(paths[start + int(i)], reason)
            flags[start:start + len(found)] = found
            progress(what, min(start + CHUNK, n), n)
    finally:
        for process in processes:                           # first: threads wait for their answers
            process.kill()
        pool.shutdown(cancel_futures=True)                  # after an error, do not read on
        for process in processes:
            process.communicate()
        if shared is not None:
            os.close(shared)                                # the mapping stays
    readable = np.flatnonzero(flags & UNREADABLE == 0)
    if len(readable) < n:
        for to, i in enumerate(readable.tolist()):          # in place: a second tensor may not fit
            if to != i:
                pixels[to] = pixels[i]
    return pixels[:len(readable)], flags, reasons


def read_images(paths, pixels, side, skip):
    """Decode ``paths`` into ``pixels`` uint8 [n, 3, side, side] → (list of n flags, {position: reason}).

    Without ``skip`` it ends at the first unreadable image.
    """
    flags, reasons = [0] * len(paths), {}
    for i, path in enumerate(paths):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")             # of odd metadata; what matters is whether it decodes
                with Image.open(path) as image:
                    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_LENGTH:
                        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}, or than "
                                         f"{MAX_LENGTH} along a side")
                    if not side:
                        image.load()
                        continue
                    if image.mode != "RGB":
                        image, flags[i] = image.convert("RGB"), flags[i] | RECOLOURED
                    if image.size != (side, side):
                        image, flags[i] = image.resize((side, side), Image.Resampling.BILINEAR), flags[i] | RESIZED
                    pixels[i] = np.asarray(image).transpose(2, 0, 1)
        except MemoryError:
            raise
        except Exception as error:                          # Pillow's decoders raise almost anything on damaged files
            reasons[i], flags[i] = " ".join(str(error).split()) or type(error).__name__, UNREADABLE
            if not skip:
                break
    return flags, reasons


def _unreadable(path, reason):
    return InputError(f"{path}: not a readable image ({reason}); replace the file, remove its data set's folder and "
                      "get it again, or leave such images out with data.skip_corrupt=true")


def _map(descriptor, shape, private=False):
    """The start of an open file as a uint8 array; writes go to the file, or with ``private`` nowhere but memory."""
    access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
    return np.frombuffer(mmap.mmap(descriptor, int(np.prod(shape)), access=access), np.uint8).reshape(shape)


def _start(descriptor, n, side, skip):
    """Start a decoding process: requests go to its stdin, answers come from its stdout, pixels into the file."""
    arguments = [str(int(value)) for value in (descriptor, n, side, skip)]
    # In a session of its own: Ctrl-C reaches only this process, which then ends the others.
    return subprocess.Popen([sys.executable, os.path.abspath(__file__), *arguments], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, pass_fds=[descriptor] if descriptor >= 0 else [],
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _ask(idle, start, paths):
    """Have an idle process decode ``paths`` into the rows from ``start`` on; → what :func:`read_images` returns."""
    process = idle.get()
    try:
        process.stdin.write(json.dumps([start, [os.fspath(path) for path in paths]]).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except (BrokenPipeError, ValueError):
        answer = b""
    idle.put(process)
    if not answer.endswith(b"\n"):
        raise RuntimeError(f"a decoding process ended early (exit status {process.poll()}), perhaps out of memory")
    return json.loads(answer)


def _serve(descriptor, n, side, skip):
    """The decoding process: one answer line per request line, until the requests end."""
    pixels = _map(descriptor, (n, 3, side, side)) if side else np.empty((n, 3, 0, 0), np.uint8)
    for line in sys.stdin.buffer:
        start, paths = json.loads(line)
        print(json.dumps(read_images(paths, pixels[start:start + len(paths)], side, skip)), flush=True)


# ---------------------------------------------------------------------------------------------------------------
# The cache


def _key(listing, side):
    """Sixteen hex digits over names, sizes and modification times in order, and over how images are decoded."""
    lines = [f"{FORMAT} {PIL.__version__} {side} bilinear"]
    for name, path in zip(listing.names, listing.paths()):
        try:
            status = os.stat(path)
            lines.append(f"{name}\t{status.st_size}\t{status.st_mtime_ns}")
        except OSError:
            lines.append(f"{name}\tabsent")                 # decoding will say so
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _decoded(settings, prefix, listing, count, side, what, progress, notes):
    """What :func:`decode` returns for the first ``count`` files, from the cache where it has them."""
    fresh = lambda file=None: decode(listing.paths(count), side, what, progress, file=file, skip=settings.skip_corrupt)
    if not settings.cache:
        return fresh()
    folder = pathlib.Path(settings.dir) / CACHE
    key = _key(listing, side)
    target = folder / f"{prefix}-{key}.u8"
    part = folder / f"{target.name}.{os.getpid()}.part"
    result = _open_cache(target, key, side, count)
    try:
        if result is None:
            folder.mkdir(exist_ok=True)
            with _lock(folder / f"{prefix}.lock", progress) as held:
                result = _open_cache(target, key, side, count, notes)       # built while this run waited?
                if result is None:
                    if held:
                        _sweep(folder, prefix, "u8", target.name)
                    with open(part, "w+b") as file:
                        _reserve(file.fileno(), count * 3 * side * side)
                        result = fresh(file)
                        _seal(file, key, side, *result)
                        os.replace(part, target)
                        _sync(folder)
                    result = _open_cache(target, key, side, count) or result    # mapped so that nobody can write
    except OSError as error:
        notes.append(f"{settings.name}: decoded images are not kept, {folder} cannot hold them "
                     f"({error.strerror or error})")
        result = result or fresh()
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    if result[2] and not settings.skip_corrupt:             # the cache is of a run with skip_corrupt
        first = min(result[2])
        raise _unreadable(listing.paths(first + 1)[first], result[2][first])
    return result


def _seal(file, key, side, pixels, flags, reasons):
    """Complete a cache file that holds ``pixels`` already, and see it on disk."""
    file.truncate(pixels.size)
    file.seek(pixels.size)
    header = json.dumps({"key": key, "side": side, "files": len(flags), "images": len(pixels), "reasons": reasons,
                         "crc": _checksums(pixels)}).encode()
    index = flags.tobytes() + header
    file.write(index + len(header).to_bytes(4, "little") + zlib.crc32(index).to_bytes(4, "little") + MAGIC)
    file.flush()
    os.fsync(file.fileno())


def _checksums(pixels):
    """CRC-32 of every ``CHECKED`` images."""
    return [zlib.crc32(np.ascontiguousarray(pixels[i:i + CHECKED])) for i in range(0, len(pixels), CHECKED)]


def _reasons(stored, files):
    """{position: why it cannot be read} from what JSON keeps of it; ValueError for anything else."""
    reasons = {int(i): " ".join(reason.split()) for i, reason in stored.items()}
    if not all(0 <= i < files for i in reasons):
        raise ValueError("names a file that is not there")
    return reasons


def _open_cache(path, key, side, count, notes=None):
    """(pixels, flags, reasons) of the first ``count`` files in a cache file; None where there is none that covers
    them, with a note when the file is not a whole cache of this key."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 16))
            tail = file.read(16)
            length = int.from_bytes(tail[:4], "little")
            if tail[8:] != MAGIC or length > min(end - 16, MAX_HEADER):
                raise ValueError("its end is missing")
            file.seek(end - 16 - length)
            text = file.read(length)
            header = parse_json(text)
            files, images, row = header["files"], header["images"], 3 * side * side
            if header["key"] != key or header["side"] != side or type(files) is not int or type(images) is not int or \
                    not 0 <= images <= files or end != images * row + files + length + 16:
                raise ValueError("header and size do not agree")
            file.seek(end - 16 - length - files)
            flags = file.read(files)
            if zlib.crc32(text, zlib.crc32(flags)) != int.from_bytes(tail[4:8], "little"):
                raise ValueError("the checksum of its header is wrong")
            if files < count:
                return None
            flags, reasons = np.frombuffer(flags, np.uint8)[:count], _reasons(header["reasons"], files)
            reasons = {i: reason for i, reason in reasons.items() if i < count}
            readable = count - len(reasons)
            if not 0 < readable <= images or \
                    sorted(reasons) != np.flatnonzero(flags & UNREADABLE).tolist():
                raise ValueError("flags and header do not agree")
            pixels = _map(file.fileno(), (images, 3, side, side), private=True)
            wanted = header["crc"][:-(-readable // CHECKED)]
            if _checksums(pixels[:len(wanted) * CHECKED]) != wanted or len(wanted) * CHECKED < readable:
                raise ValueError("the checksum of its images is wrong")
            return pixels[:readable], flags, reasons
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if notes is not None:
            notes.append(f"{path} is not a whole cache of decoded images ({' '.join(str(error).split())}); "
                         "it is built anew")
        return None


def _verified(settings, prefix, listing, count, what, progress, notes):
    """(flags, reasons) of the first ``count`` files, of which each is read once; remembered beside the cache."""
    folder, key, known = pathlib.Path(settings.dir) / CACHE, _key(listing, 0), None
    target = folder / f"{prefix}-{key}.json"
    if settings.cache:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored, _ = read_json(target, MAX_HEADER)
            files, reasons = stored["files"], _reasons(stored["reasons"], stored["files"])
            if files >= count and stored["crc"] == _checksum(files, reasons):
                known = {i: reason for i, reason in reasons.items() if i < count}
    if known is None:
        _, _, known = decode(listing.paths(count), 0, what, progress, skip=True)
        if settings.cache:
            part = folder / f"{target.name}.{os.getpid()}.part"
            try:
                folder.mkdir(exist_ok=True)
                _sweep(folder, prefix, "json", target.name)
                part.write_text(json.dumps({"files": count, "reasons": known, "crc": _checksum(count, known)}),
                                encoding="utf-8")
                os.replace(part, target)
            except OSError as error:
                notes.append(f"{settings.name}: which images can be read is not kept, {folder} cannot hold it "
                             f"({error.strerror or error})")
    flags = np.zeros(count, np.uint8)
    flags[list(known)] = UNREADABLE
    return flags, known


def _checksum(files, reasons):
    """CRC-32 of what is remembered of ``files`` files."""
    return zlib.crc32(json.dumps([files, sorted(reasons.items())]).encode())


@contextlib.contextmanager
def _lock(path, progress):
    """Keep other runs from building the same cache meanwhile; yields False where the file system has no locks (then
    each builds its own, and the last to finish leaves its file)."""
    with open(path, "ab") as file:
        held = fcntl is not None
        try:
            if held:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another run that decodes these images", 0, 1)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            held = False
        try:
            yield held
        finally:
            if held:
                fcntl.flock(file, fcntl.LOCK_UN)            # closing is not enough where a fork holds a copy


def _sweep(folder, prefix, suffix, keep):
    """Remove files of older keys, and what killed builders left; only names of our own pattern."""
    ours = re.compile(rf"{re.escape(prefix)}-[0-9a-f]{{16}}\.{suffix}(\.[0-9]+\.part)?")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name != keep:
            path.unlink(missing_ok=True)


def _reserve(descriptor, size):
    """Give a file its size and its blocks: a full disk is an OSError here, not a signal in the middle of decoding."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _sync(folder):
    """See the renaming on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------
# Class folders: CIFAR as images, ImageNet, a folder of one's own


def _imagenet(settings, progress, notes):
    """ImageNet-1K below DIR/imagenet or DIR. Images are resized to size × size as for Tiny ImageNet."""
    base = pathlib.Path(settings.dir)
    folder = base / "imagenet"
    if not folder.exists() and (base / "train").is_dir() and (base / "val").is_dir():
        folder = base
    notes.append(f"imagenet: test = the validation split; images are resized to {settings.image_size} x "
                 f"{settings.image_size} without a crop")
    return _class_folders(settings, folder, "val", settings.image_size, progress, notes, may_stream=True)


def _folder(settings, progress, notes):
    """Any tree of class folders: DIR/train and DIR/val, or DIR/test where there is no val."""
    base = pathlib.Path(settings.dir)
    test = "val" if (base / "val").is_dir() or not (base / "test").is_dir() else "test"
    notes.append(f"folder: test = {base / test}; images are resized to {settings.image_size} x "
                 f"{settings.image_size} without a crop; mean and std of ImageNet stand for the folder's own")
    return _class_folders(settings, base, test, settings.image_size, progress, notes, may_stream=True)


def _class_folders(settings, folder, test, side, progress, notes, may_stream=False):
    """``folder/{train,TEST}/CLASS/*`` → train Part, test Part, class names."""
    notes.append(f"{settings.name}: read from class folders in {folder}; both splits in one fixed pseudo-random order")
    found, listings = {}, {}
    mend = f"expected {folder}/{{train,{test}}}/CLASS/*.png or .jpg, one folder per class"
    for split in ("train", test):
        found[split] = sorted(entry.name for entry in _entries(folder / split, mend)
                              if entry.is_dir() and not entry.name.startswith("."))
        if not found[split]:
            raise InputError(f"{folder / split}: no class folders; {mend}")
    missing = [str(folder / split / name) for split, other in ((test, "train"), ("train", test))
               for name in sorted(set(found[other]) - set(found[split]))]
    if missing:
        raise InputError(f"train and {test} do not have the same class folders; missing: {', '.join(missing[:5])}"
                         f"{', …' if len(missing) > 5 else ''}")
    names = found["train"]
    for split in ("train", test):
        listing = Listing(folder / split, [], [])
        for label, name in enumerate(names):
            _add_images(listing, name, label, mend, settings.skip_corrupt)
        listings[split] = listing.take(fixed_order(len(listing.names)))
    return (*(_read_part(settings, key, listings[split], side, progress, notes, may_stream)
              for key, split in (("train", "train"), ("test", test))), names)


def _entries(folder, mend):
    """The entries of a folder; InputError (with the way to mend it) when it is missing or not readable."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        raise InputError(f"{folder} is missing; {mend}") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); {mend}") from None


def _add_images(listing, sub, label, mend, skip):
    """Append the sorted images of the folder ``sub`` to ``listing``; hidden files are passed over.

    Raises InputError when it holds no image, or, without ``skip``, something that is none.
    """
    folder = listing.folder / sub
    entries = sorted(entry.name for entry in _entries(folder, mend) if not entry.name.startswith("."))
    files = [name for name in entries if name.lower().endswith(SUFFIXES)]
    if not files:
        raise InputError(f"{folder} holds no images; {mend}")
    if len(files) < len(entries):
        strays = [str(folder / name) for name in entries if not name.lower().endswith(SUFFIXES)]
        if not skip:
            raise InputError(f"{strays[0]} is no image; move it elsewhere, or leave such files out with "
                             "data.skip_corrupt=true")
        listing.strays.extend(strays)
    listing.names.extend(f"{sub}/{name}" for name in files)
    listing.labels.extend([label] * len(files))


# ---------------------------------------------------------------------------------------------------------------
# CIFAR-10 and CIFAR-100


def _cifar(settings, progress, notes):
    """→ train Part, test Part, class names; from class folders where there are any, else from the archive."""
    folder = pathlib.Path(settings.dir) / settings.name
    if folder.exists():
        return _class_folders(settings, folder, "test", 32, progress, notes)
    import torchvision                                      # takes a second; only this branch needs it
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[settings.name]
    parts = {}
    for split in ("train", "test"):
        stored = _open_cifar(kind, settings, split == "train", progress)
        count = _asked(settings, split, len(stored.data), f"the archive of {settings.name}")
        # The published files are in random order: the test split keeps theirs.
        order = fixed_order(len(stored.data)) if split == "train" else list(range(len(stored.data)))
        pixels = np.ascontiguousarray(stored.data[order[:count]].transpose(0, 3, 1, 2))
        parts[split] = Part(np.array(stored.targets, np.int64)[order[:count]], len(stored.data), pixels)
    return parts["train"], parts["test"], stored.classes


def _open_cifar(kind, settings, train, progress):
    """torchvision's data set object; its files are fetched here first, with a time limit, where they are absent."""
    archive = pathlib.Path(settings.dir) / kind.filename
    try:
        return kind(settings.dir, train=train, download=False)
    except (RuntimeError, OSError):
        pass                                                # absent, or not what its checksums say
    try:
        if not archive.is_file():
            fetch(kind.url, archive, progress)
        return kind(settings.dir, train=train, download=True)       # checks the archive, extracts it, reads it
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{settings.name} is not in {settings.dir} and could not be had from {kind.url} ({reason}); "
                         f"put {kind.filename} or its folder {kind.base_folder} into {settings.dir}, or images as "
                         f"{settings.dir}/{settings.name}/train/CLASS/*.png and .../test/CLASS/*.png") from None


# ---------------------------------------------------------------------------------------------------------------
# Tiny ImageNet


def _tiny_imagenet(settings, progress, notes):
    """→ train Part, test Part, class names. Test is the labelled validation split in the order of
    ``val_annotations.txt`` (ledger D19); class index = line of ``wnids.txt``."""
    tree = pathlib.Path(settings.dir) / "tiny-imagenet-200"
    if not tree.exists():
        _download_tiny_imagenet(settings, tree, progress)
    mend = f"get the whole set from {TINY_IMAGENET_URL} and extract it into {settings.dir}"
    notes.append("tiny-imagenet: test = the labelled validation split in the order of val_annotations.txt; "
                 "class index = line of wnids.txt")
    names = [line.strip() for line in _lines(tree / "wnids.txt", mend) if line.strip()]
    classes = {name: i for i, name in enumerate(names)}
    if not names or len(classes) < len(names) or not all(re.fullmatch(r"\w[\w.-]{,99}", name) for name in names):
        raise InputError(f"{tree / 'wnids.txt'} is empty, names a class twice or what is no folder's name; {mend}")

    train = Listing(tree / "train", [], [])
    for name in names:                                      # class order: the permutation below mixes it
        _add_images(train, f"{name}/images", classes[name], mend, settings.skip_corrupt)
    others = {entry.name for entry in _entries(tree / "train", mend) if entry.is_dir()} - set(names)
    if others:
        notes.append(f"tiny-imagenet: skipped {len(others)} train folders that wnids.txt does not name")
    train = train.take(fixed_order(len(train.names)))       # file names are permuted, never the decoded images

    annotations, images = tree / "val" / "val_annotations.txt", tree / "val" / "images"
    present, test = None, Listing(images, [], [])
    for number, line in enumerate(_lines(annotations, mend), start=1):
        if not line.strip():
            continue
        file, label = (line.split("\t") + ["", ""])[:2]
        if label.strip() not in classes:
            raise InputError(f"{annotations}, line {number}: '{shown(label.strip())}' is not a class of wnids.txt; "
                             f"{mend}")
        present = present or {entry.name for entry in _entries(images, mend)}
        if file not in present:
            raise InputError(f"{images / shown(file)} is missing ({annotations.name}, line {number}, names it); {mend}")
        test.names.append(file)
        test.labels.append(classes[label.strip()])
    if not test.names:
        raise InputError(f"{annotations} names no images; {mend}")
    return (_read_part(settings, "train", train, 64, progress, notes),
            _read_part(settings, "test", test, 64, progress, notes), names)


def _lines(path, mend):
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise InputError(f"{path} {reason}; {mend}") from None


def _download_tiny_imagenet(settings, tree, progress):
    """Fetch the archive (unless it lies there) and extract it next to ``tree``, which appears only when complete."""
    archive = tree.with_suffix(".zip")
    if not archive.is_file():
        try:
            fetch(TINY_IMAGENET_URL, archive, progress)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"tiny-imagenet is not in {settings.dir} and could not be had from {TINY_IMAGENET_URL} "
                             f"({reason}); extract that archive so that {tree}/wnids.txt exists") from None
    scratch = tree.with_name(f"{tree.name}.{os.getpid()}.part")
    try:
        extract(archive, scratch)
        if not (scratch / tree.name).is_dir():
            raise InputError(f"{archive} holds no folder {tree.name}; delete it and start again to fetch a new one")
        os.replace(scratch / tree.name, tree)
    except OSError as error:
        if not tree.is_dir():                               # else another run extracted it in the meantime
            raise InputError(f"{archive} could not be extracted into {tree.parent} ({error}); free space or extract "
                             f"it by hand so that {tree}/wnids.txt exists") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
