"""Files: downloads, JSON from elsewhere, files written whole or not at all, and archives unpacked safely."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch

from config import InputError


def download(url: str, target, progress=None, sha256: str = "", hint: str = "") -> None:
    """Download ``url`` (http, https or file) to the file ``target``, which appears or is replaced when complete.

    ``progress``: anything but None shows torch.hub's bar, on a terminal alone. ``sha256``: hexadecimal digits that the
    digest must begin with. Raises InputError, one line with URL, reason, place and ``hint``, when it cannot be had.
    """
    try:
        if urlsplit(url).scheme not in ("http", "https", "file"):
            raise ValueError("only http, https and file URLs are read")
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        torch.hub.download_url_to_file(url, os.fspath(target), sha256 or None,
                                       progress is not None and sys.stderr.isatty())
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # RuntimeError: another digest
        raise InputError(f"cannot fetch {url} ({one_line(error)}); fetch it elsewhere and save it as {target}{hint}") \
            from None


# JSON from elsewhere
MAX_JSON = 16 << 20  # bytes; a result of the largest network here takes less than one million


def read_json(path, most: int = MAX_JSON) -> tuple[object, bytes]:
    """Return the value in a JSON file of at most ``most`` bytes, and the file's bytes. Raises OSError where it cannot
    be read, ValueError, one line, where it is larger or :func:`parse_json` refuses it."""
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"larger than {most} bytes")
    return parse_json(raw), raw


def parse_json(raw: bytes):
    """Return the value of a JSON text. Raises ValueError, one line, for what is no UTF-8 or no JSON, for NaN and
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


def member(owner, key, kinds, place):
    """Return ``owner[key]`` of a parsed file, which must be of one of the types; a bool is no number, nor are infinity
    and NaN. Raises InputError that names the ``place``."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    value = owner.get(key)
    if type(value) not in kinds or type(value) is float and not math.isfinite(value):
        what = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}[kinds[-1]]
        raise InputError(f"{place}: {key}{'=' + quoted(value) if key in owner else ' is missing'}, expected {what}")
    return value


def shown(name) -> str:
    """Make a name from a file fit for a one-line message."""
    name = str(name)
    name = name if len(name) <= 200 else name[:200] + "…"
    return name if name.isprintable() else ascii(name)


def quoted(value) -> str:
    """Make a value from a file fit for a one-line message."""
    if type(value) is int and value.bit_length() > 200:
        return "a huge number"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if text.isprintable() else ascii(text)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters; its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# Writing: a whole file or none


def replace_file(path, fill) -> None:
    """Write ``path`` by fill(file): a temporary file beside it, flushed to the disk, then renamed. Raises OSError, with
    the file before intact and no temporary one, also where ``torch.save`` makes a RuntimeError of a full disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must be on the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_writable(path) -> None:
    """Raise InputError where a file cannot be written at ``path``; nothing is left there."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK) or (
            path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{path}: cannot be written there; give the path of a file in a folder that can be written to")


def write_text(path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path, value) -> None:
    """Write a value as JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def survive_ascii() -> None:
    """Let a terminal without Unicode show a question mark in place of an error that ends the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# Archives

MAX_EXPANSION = 100  # times an archive's size; images hardly shrink in a zip, a bomb shrinks by a factor of 1,000


def extract(archive, folder) -> None:
    """Unpack a zip file into ``folder``; every CRC is checked, and links become files.

    Raises InputError when it is damaged, and, before anything is written, when a member's name leads out of the folder
    and when all would take more than ``MAX_EXPANSION`` times the archive's size or the space on the disk; OSError when
    it cannot be written.
    """
    mend = "delete it and start again to fetch a new one"
    folder, size = Path(folder), os.path.getsize(archive)
    try:
        with zipfile.ZipFile(archive) as source:
            for name in source.namelist():
                parts = name.replace("\\", "/").split("/")
                if not parts[0] or ".." in parts or ":" in parts[0]:
                    raise InputError(f"{archive}: member {ascii(name)} leads out of the folder; {mend}")
            total = sum(member.file_size for member in source.infolist())
            if total > max(MAX_EXPANSION * size, 1 << 20):
                raise InputError(f"{archive}: {size} bytes that claim to hold {total}; {mend}")
            above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(above).free
            if total > free:
                raise InputError(f"{archive} holds {total >> 20} MB, {above} has room for {free >> 20}; free some")
            source.extractall(folder)
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile raises almost anything on damaged input
        raise InputError(f"{archive} is damaged ({one_line(error)}); {mend}") from None
