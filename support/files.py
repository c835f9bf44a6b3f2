"""Files: downloads, JSON from elsewhere, files written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
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
        torch.hub.download_url_to_file(url, str(target), sha256 or None, progress and sys.stderr.isatty())
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # RuntimeError: another digest
        raise InputError(f"cannot fetch {url} ({one_line(error)}); fetch it elsewhere and save it as {target}{hint}") \
            from None


def read_json(path, most: int = 16 << 20) -> tuple[object, bytes]:
    """Return the value in a JSON file of at most ``most`` bytes, and the file's bytes. Raises OSError where it cannot
    be read, ValueError, one line, where it is larger or :func:`parse_json` refuses it."""
    with open(path, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"larger than {most} bytes")
    return parse_json(raw), raw


def parse_json(raw: bytes):
    """Return the value of a JSON text. Raises ValueError, one line, where it is none or not in UTF-8."""
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("lists or objects nested too deep") from None


def shown(name) -> str:
    """Return a name from a file in a form fit for a one-line message."""
    name = str(name) if len(str(name)) <= 200 else str(name)[:200] + "…"
    return name if name.isprintable() else ascii(name)


def one_line(error: BaseException) -> str:
    """Return an error's message, or its type, on a line of 300 characters; of a DataLoader's process its last line."""
    text = str(error).strip().rpartition("\n")[2] if str(error).startswith("Caught ") else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def replace_file(path, fill) -> None:
    """Write bytes, or what fill(file) writes: a temporary file beside ``path``, flushed to the disk, then renamed.
    Raises OSError, the file before intact and no temporary one left, also where torch.save makes it a RuntimeError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(fill) if isinstance(fill, bytes) else fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value) -> None:
    """Write a value as JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    replace_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def survive_ascii() -> None:
    """Let a terminal without Unicode show a question mark in place of an error that ends the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
