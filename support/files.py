"""Files from elsewhere: downloads that go on after a break, are checked and appear whole, and archives unpacked safely.

Data sets and weights come through the same :func:`fetch`. While it runs, what has arrived lies beside the target as
``NAME.part``, with ``NAME.part.json`` saying which version of which URL it is; both are gone when the target is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import os
import pathlib
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib

from config import InputError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing then keeps two downloads of one file apart
    fcntl = None

BLOCK = 1 << 18  # bytes read at a time
MAX_WAIT = 3600  # seconds for another process's download of the same file


def fetch(url, target, progress=None, timeout=60, *, size=None, sha256="") -> None:
    """Download ``url`` to the file ``target``, which appears (or is replaced) only when complete and checked.

    A partial file of an earlier call is continued where the server can say that its file is still the same one (a
    strong ETag or Last-Modified), or where ``sha256`` would show that it is not; otherwise it starts again. A second
    process that wants the same target waits for the first. ``progress(what, done, total)`` is called in bytes,
    ``total`` 0 where the server does not say; ``timeout`` is in seconds without a byte. ``size``: bytes that the file
    must have; ``sha256``: hexadecimal digits that its digest must begin with.
    Raises OSError when the file cannot be had or written (what has arrived stays for the next call), InputError when
    what arrived is another file (nothing stays).
    """
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, origin = (target.with_name(target.name + suffix) for suffix in (".part", ".part.json"))
    report = progress or (lambda what, done, total: None)
    before = _identity(target)
    file = _lock(partial, lambda waited: report(f"waiting (s) while another process downloads {target.name}",
                                                waited, MAX_WAIT))
    try:
        if _identity(target) != before:  # another process finished it in the meantime
            partial.unlink()
            return
        _receive(url, file, origin, lambda done, total: report(f"downloading {target.name}", done, total), timeout,
                 size, sha256)
        file.flush()
        os.fsync(file.fileno())
        _check(url, partial, size, sha256)
        origin.unlink(missing_ok=True)
        if not fcntl:
            file.close()  # Windows moves no open file
        os.replace(partial, target)
    except InputError:
        _remove(partial, origin)
        raise
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            file.flush()
        if _identity(partial) and not partial.stat().st_size:
            _remove(partial, origin)
        file.close()  # and with it the lock


def _identity(path):
    """What tells one version of a file from the next; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _remove(*paths):
    for path in paths:
        path.unlink(missing_ok=True)


def _lock(partial, waiting):
    """The partial file, open for appending and locked until it is closed."""
    started = time.monotonic()
    while True:
        file = open(partial, "a+b")
        try:
            while fcntl:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waited = time.monotonic() - started
                    if waited > MAX_WAIT:
                        raise OSError(f"another process has been downloading it for {MAX_WAIT} seconds") from None
                    waiting(int(waited))
                    time.sleep(0.1)
                except OSError:  # a file system without locks
                    break
            # The one that held the lock may have moved the file to its final name, or thrown it away.
            if _identity(partial) == _identity(file.fileno()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _receive(url, file, origin, report, timeout, size, sha256):
    """Append to ``file`` what it lacks of ``url``, or fill it from the start. OSError when not all of it arrives."""
    have, headers = os.fstat(file.fileno()).st_size, {}
    if have:
        known = _read_origin(origin)
        if known.get("url") == url and (known.get("version") or sha256):
            headers = {"Range": f"bytes={have}-"}
            if known.get("version"):
                headers["If-Range"] = known["version"]
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not headers:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":  # all of it had arrived
            return
        file.truncate(0)
        return _receive(url, file, origin, report, timeout, size, sha256)
    with answer:
        done, total = 0, _number(answer.headers.get("Content-Length"))
        if getattr(answer, "status", None) == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range") or "")
            if not headers:
                raise OSError("the server sends a part without having been asked for one")
            if not span or int(span[1]) != have:
                file.truncate(0)
                return _receive(url, file, origin, report, timeout, size, sha256)
            done, total = have, int(span[2])
        else:
            file.truncate(0)
            _write_origin(origin, url, answer.headers)
        if size is not None and total is not None and total != size:
            raise InputError(f"{url}: the server's file has {total} bytes, the published one {size}; get it from "
                             "another place")
        report(done, total or 0)
        while block := answer.read(BLOCK):
            file.write(block)
            done += len(block)
            report(done, total or 0)
            if size is not None and done > size:
                break
        if total is not None and done < total:
            raise OSError(f"the connection ended after {done} of {total} bytes; the same command goes on from there")


def _check(url, partial, size, sha256):
    found = partial.stat().st_size
    if size is not None and found != size:
        raise InputError(f"{url}: {found} bytes arrived, the published file has {size}; they were removed, try again")
    if sha256 and not digest(partial).startswith(sha256.lower()):
        raise InputError(f"{url}: the SHA-256 of what arrived does not begin with {sha256}; it was removed, try again")


def digest(path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(text):
    return int(text) if text and text.isdecimal() else None


def _read_origin(origin):
    """{"url", "version"} as :func:`_write_origin` left them; nothing where they are not that."""
    try:
        known, _ = read_json(origin, 1 << 16)
    except (OSError, ValueError):
        return {}
    sound = isinstance(known, dict) and all(isinstance(known.get(key), str) for key in ("url", "version"))
    return known if sound and known["version"].isprintable() and known["version"].isascii() else {}


def _write_origin(origin, url, headers):
    """``version``: what the server calls this version of the file, in a form that If-Range may carry."""
    tag = headers.get("ETag") or ""
    version = tag if tag.startswith('"') else headers.get("Last-Modified") or ""
    origin.write_text(json.dumps({"url": url, "version": version}), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# JSON from elsewhere

MAX_JSON = 16 << 20  # bytes; a result of the largest network here takes less than one million


def read_json(path, most: int = MAX_JSON) -> tuple[object, bytes]:
    """The value in a JSON file of at most ``most`` bytes, and the file's bytes. Raises OSError where it cannot be read,
    ValueError, one line, where it is larger or :func:`parse_json` refuses it."""
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"larger than {most} bytes")
    return parse_json(raw), raw


def parse_json(raw: bytes):
    """The value of a JSON text. ValueError, one line, for what is no UTF-8 or no JSON, and beyond that for NaN and
    infinity, a number too large for a float, a key given twice, and nesting too deep for the parser."""
    def once(items):
        made = dict(items)
        if len(made) < len(items):
            raise ValueError("a key is given twice in one object")
        return made

    def finite(text):
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text[:40]} is not a finite number")
        return number

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("lists or objects nested too deep") from None
    except MemoryError:
        raise ValueError("needs more memory than there is") from None


def member(owner, key, kinds, place):
    """``owner[key]`` of a parsed file, which must be there and of one of the types; a bool is no number, nor are
    infinity and NaN. Raises InputError that names the ``place``."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    value = owner.get(key)
    if type(value) not in kinds or type(value) is float and not math.isfinite(value):
        what = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}[kinds[-1]]
        raise InputError(f"{place}: {key}{'=' + quoted(value) if key in owner else ' is missing'}, expected {what}")
    return value


def shown(name) -> str:
    """A name from a file, fit for a one-line message."""
    name = str(name)
    name = name if len(name) <= 200 else name[:200] + "…"
    return name if name.isprintable() else ascii(name)


def quoted(value) -> str:
    """A value from a file, fit for a one-line message."""
    if type(value) is int and value.bit_length() > 200:
        return "a huge number"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if text.isprintable() else ascii(text)


# ---------------------------------------------------------------------------------------------------------------
# Published files kept in a folder


def cached(url, target, progress=None, *, size=None, sha256="", hint="") -> str:
    """The path of ``target`` holding ``url``'s file: as it lies there (a file: URL's is copied again, it may have
    changed), else fetched. Raises InputError, one line with the URL, where to put the file and ``hint``, when it cannot
    be had, and when the file there is not the published one."""
    target = os.fspath(target)
    if not re.match("(https?|file):", url):
        raise InputError(f"{url}: only http, https and file URLs are read")
    try:
        if os.path.isfile(target) and not url.startswith("file:"):
            if size is not None and os.path.getsize(target) != size:
                raise InputError(f"{target}: has {os.path.getsize(target)} bytes, the published file {size}; delete "
                                 f"it to download {url} again")
            if sha256 and not digest(target).startswith(sha256):
                raise InputError(f"{target}: its SHA-256 does not begin with {sha256}; delete it to download {url} "
                                 "again")
            return target
        fetch(url, target, progress, size=size, sha256=sha256)
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot fetch {url} ({reason}); fetch it elsewhere and save it as {target}{hint}") from None
    return target


def hash_prefix(url: str) -> str:
    """The digits of its SHA-256 that a published URL carries: NAME-xxxxxxxx.pth, or a folder that is the whole
    digest; "" where it carries none."""
    parts = urllib.parse.unquote(urllib.parse.urlsplit(url).path).split("/")
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", parts[-1])
    whole = [part for part in parts[:-1] if re.fullmatch("[0-9a-f]{64}", part)]
    return found.group(1) if found else whole[-1] if whole else ""


def file_name(url: str) -> str:
    """The name under which a URL's file is kept: its own where that carries a hash, else host and path, since many
    files are called model.safetensors. Raises InputError for what is no URL of a file."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url}: not a URL ({error})") from None
    path = urllib.parse.unquote(parts.path)
    name = path.rpartition("/")[2]
    if not name.strip("."):
        raise InputError(f"{url}: does not name a file")
    if not re.search(r"-[0-9a-f]{8,64}\.\w+$", name):  # the query goes in front: the suffix tells the format
        name = re.sub(r"[^\w.-]+", "_", f"{parts.hostname or ''}{parts.query}{path}", flags=re.ASCII).strip("_")
    return name[-200:]  # file systems end at 255 bytes


# ---------------------------------------------------------------------------------------------------------------
# Files: a whole one or none. All writing of a run goes through these three, so that tests can break in anywhere.


def write_bytes(file, data) -> None:
    """Write all of ``data`` (bytes-like); an unbuffered file may take less at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left):]


def flush(file) -> None:
    """Until it lies on the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(old: pathlib.Path, new: pathlib.Path) -> None:
    """Put one file in another's place, and wait until the folder on the disk says so."""
    os.replace(old, new)
    folder = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Written:
    """A file that counts and checks what goes into it, and gathers small pieces; ``torch.save`` takes it for one."""

    def __init__(self, file):
        self.file, self.bytes, self.crc, self.gathered = file, 0, 0, bytearray()

    def write(self, data):
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        self.crc = zlib.crc32(view, self.crc)
        if len(self.gathered) + len(view) > BLOCK:
            self.flush()
        if len(view) > BLOCK:
            write_bytes(self.file, view)
        else:
            self.gathered += view
        return len(view)

    def flush(self):
        if self.gathered:
            write_bytes(self.file, self.gathered)
            self.gathered = bytearray()


def replace_file(path, fill) -> tuple[int, int]:
    """Write ``path`` by fill(file): a temporary file beside it, flushed to the disk, renamed. Returns its size and CRC-32.
    Raises OSError, with the old file intact and no temporary one left."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            written = _Written(file)
            fill(written)
            written.flush()
            flush(file)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return written.bytes, written.crc


def write_text(path, text: str) -> None:
    """Write a text file in UTF-8 with ``\n``, whole or not at all."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path, value) -> None:
    """Write a value as JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def survive_ascii() -> None:
    """Let a terminal without Unicode show a question mark in place of an error that ends the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# ---------------------------------------------------------------------------------------------------------------
# Archives

MAX_EXPANSION = 100  # times an archive's own size; images hardly shrink in a zip, a bomb by a factor of 1,000


def extract(archive, folder) -> None:
    """Unpack a zip file into ``folder``.

    Raises InputError when it is damaged, when a member's name leads out of the folder, or when it would grow beyond
    ``MAX_EXPANSION`` times its size or the space on the disk (nothing is written in these two cases); OSError when
    it cannot be written.
    """
    mend = "delete it and start again to fetch a new one"
    folder = pathlib.Path(folder)
    try:
        with zipfile.ZipFile(archive) as source:
            total = 0
            for member in source.infolist():
                parts = member.filename.replace("\\", "/").split("/")
                if member.filename.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
                    raise InputError(f"{archive}: member {ascii(member.filename)} leads out of the folder; {mend}")
                total += member.file_size
            if total > max(MAX_EXPANSION * os.path.getsize(archive), 1 << 20):
                raise InputError(f"{archive}: {os.path.getsize(archive)} bytes that claim to hold {total}; {mend}")
            above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(above).free
            if total > free:
                raise InputError(f"{archive} holds {total >> 20} MB, {above} has room for {free >> 20}; free space "
                                 "there")
            source.extractall(folder)
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile raises almost anything on damaged input
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{archive} is damaged ({reason}); {mend}") from None
