"""Run directories: where the files of a run lie, who may write to them, and how a run goes on where it was stopped.

A run is a row of phases. :meth:`Phases.once` stores what a phase returned and the state of every object that it
changed; a resumed run passes over the phases that are stored and repeats the one that was broken off. A training within
a phase stores its state after every epoch. Every file appears by renaming a complete temporary file, so that the state
on the disk is whole at any moment, however the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from config import Config, InputError, flatten, read_settings
from support.files import one_line, read_json, replace_file, shown, write_json
from support.log import Log
from support.own import ours_by_name
from support.ranks import Ranks

# Where things lie, how they are read, and what computes are no other run.
PLACES = {"out", "data.dir", "data.cache", "data.workers", "model.weights_dir", "policy", "device", "threads"}
LARGE = {"network", "tuned", "best"}  # parts as large as a network: one file for each, the newest alone
FILES = "model file", "weights file"  # of the user's; config.json has their hashes
VERSIONS = {"torch": str(torch.__version__), "torchvision": torchvision.__version__, "numpy": np.__version__}
OUTPUTS = ("result.json", "policy.json", "baseline.pt", "best.pt", "packed.pt", "cycles.csv", "updates.csv")


class Stopped(BaseException):  # no Exception: nothing that handles errors may take it for one
    """The run was asked to stop by a signal. ``code``: exit code, 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.code = 128 + number


class SaveError(Exception):
    """A file of the run could not be written; the state before it is intact."""


@contextlib.contextmanager
def stop_at_once():
    """Raise Stopped inside on SIGINT and SIGTERM, once the operation at hand has ended."""
    def stop(number, frame):
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Phases


class Phases:
    """The phases of a run that have ended, kept in ``folder``; without a folder nothing is kept.

    ``classes``: the dataclasses that values and states may consist of besides tensors, numbers, text, lists, tuples and
    dictionaries; reading a state creates nothing else. ``identity``: flat dictionary of what has to be the same for a
    run to go on. Of several processes the first one reads for all and writes. ``seconds``: time spent, by the word
    before the colon in the phase's name.
    """

    def __init__(self, folder: Path | None = None, identity: dict | None = None, classes=(), ranks: Ranks = Ranks(),
                 log: Log | None = None):
        self.folder, self.identity, self.classes = folder, identity or {}, list(classes)
        self.ranks, self.log, self.resumes = ranks, log or Log(), False
        self.seconds: dict[str, float] = {}
        self.saving = 0.0  # seconds spent on writing
        self.started, self.elapsed = time.monotonic(), 0.0  # of this process; seconds of those before it

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return self.folder is not None and (self.folder / "identity.json").exists()

    def begin(self, resume: bool) -> None:
        """Go on from the state on the disk, or start a new one. Raises InputError where it is of another run."""
        self.resumes = resume
        if self.folder is None or not self.ranks.first:
            return
        path = self.folder / "identity.json"
        if not resume:
            if not path.exists() and self.folder.exists() and any(self.folder.iterdir()):
                raise InputError(f"{self.folder}: holds files of something else; give another folder")
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(path, self.identity)
            return
        try:
            differing = _differing(dict(read_json(path)[0]), self.identity)
        except Exception as error:
            raise _damaged(path, error) from None
        if differing:
            raise InputError(f"{self.folder}: a state with other settings or versions: {differing}; give those, or "
                             "start anew (--restart, or another run_dir)")
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)

    def once(self, name: str, compute, **parts):
        """Return compute(), or what it returned to an earlier process of this run.

        ``name``: "kind: details", unique in the run. ``parts``: the objects that ``compute`` changes, each with
        ``state_dict`` and ``load_state_dict``; their states, notes, random states and seconds of the phase are kept
        with the value, those of LARGE until a later phase stores a newer one under the same key.
        """
        stem, self.phase = re.sub(r"[^a-z0-9.]+", "-", name.lower()), name
        entry = self._read(f"{stem}.pt")
        if entry is None:
            notes, start = len(self.log.notes), time.monotonic()
            entry = {"value": compute(), "notes": self.log.notes[notes:], "random": random_states(),
                     "seconds": time.monotonic() - start, "elapsed": self.elapsed + time.monotonic() - self.started}
            entry["parts"] = {key: part.state_dict() for key, part in parts.items() if key not in LARGE}
            for key in parts.keys() & LARGE:
                self._write(f"{stem}@{key}.pt", parts[key].state_dict())
            self._write(f"{stem}.pt", entry)  # makes the phase one that has ended
            self._drop_superseded(stem, parts)
        else:
            for key, part in parts.items():
                state = self._read(f"{stem}@{key}.pt") if key in LARGE else entry["parts"][key]
                if state is not None:  # else a later phase has stored a newer one
                    part.load_state_dict(state)
            self.log.notes += entry["notes"]
            self.elapsed = entry["elapsed"]
            set_random_states(entry["random"])
        kind = name.partition(":")[0]
        self.seconds[kind] = self.seconds.get(kind, 0.0) + entry["seconds"]
        return entry["value"]

    def load(self) -> dict | None:
        """Return the state that the training of the phase at hand saved last, or None."""
        saved = self._read("training.pt")
        if saved is None or saved["phase"] != self.phase:
            return None
        set_random_states(saved["random"])
        return saved["training"]

    def save(self, training: dict) -> None:
        """Store the state of the training of the phase at hand."""
        self._write("training.pt", {"phase": self.phase, "training": training, "random": random_states()})

    def _drop_superseded(self, stem, parts) -> None:
        if self.folder is not None and self.ranks.first:
            (self.folder / "training.pt").unlink(missing_ok=True)
            for path in (path for key in parts.keys() & LARGE for path in self.folder.glob(f"*@{key}.pt")):
                if not path.name.startswith(f"{stem}@"):
                    path.unlink()

    def _write(self, file: str, value) -> None:
        if self.folder is not None and self.ranks.first:
            start = time.monotonic()
            with ours_by_name():
                write(self.folder / file, lambda out: torch.save(value, out))
            self.saving += time.monotonic() - start

    def _read(self, file: str):
        """What a file of the state holds, the same for all processes; None where there is none."""
        if not self.resumes:
            return None
        value, error, path = None, None, self.folder / file
        if self.ranks.first and path.exists():
            try:
                with torch.serialization.safe_globals(self.classes):
                    value = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as caught:
                error = _damaged(path, caught)
        self.ranks.agree(error)
        return self.ranks.same(value)

    def remove(self) -> None:
        """Delete the state of a run that has ended."""
        if self.folder is not None and self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)


def _damaged(path, error) -> InputError:
    return InputError(f"{path}: damaged, or not a state of this program ({one_line(error)}); start anew (--restart, or "
                      "another run_dir)")


def random_states() -> dict:
    """Return the global random states of torch, CUDA, numpy and Python, which a user's network or images may use."""
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "numpy": [kind, keys.tolist(), *rest], "python": random.getstate(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def set_random_states(states: dict) -> None:
    """Put back what :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][:torch.cuda.device_count()])
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])


# The directory


def run_directory(config: Config) -> Path:
    """Return OUT/expN[-NAME]-seedS, or OUT/NAME-seedS for a network of the user's."""
    name = "-".join(filter(None, (f"exp{config.exp}" if config.exp else "", config.name)))
    return Path(config.out).expanduser() / f"{name}-seed{config.seed}"


def check_directory(path: Path, config: Config) -> Path:
    """Return a run directory. Raises InputError where it holds a run with other settings."""
    old = path / "config.json"
    if not old.exists():
        return path
    try:
        held = read_json(old)[0]
        before = identity(read_settings(held["settings"])[0]) | {k: held[k] for k in FILES if k in held}
    except Exception as error:
        raise InputError(f"{old}: cannot be read as this program's settings ({shown(error)}); move the folder away or "
                         "choose another --out or --name") from None
    if differing := _differing(before, identity(config)):
        raise InputError(f"{path} holds a run with other settings: {differing}; give the variant a --name or choose "
                         "another --out")
    return path


def _differing(before: dict, now: dict) -> str:
    return "; ".join(f"{key} (there {shown(before.get(key))}, now {shown(now.get(key))})"
                     for key in sorted({*before, *now} - PLACES) if before.get(key) != now.get(key))


@contextlib.contextmanager
def locked(path: Path):
    """Make the run directory and keep every other process out of it inside. Raises InputError where one is in it."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be the folder of a run ({error.strerror}); choose another --out") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{path}: another process works on this run; wait for it, or give this one another --name or "
                         "--out") from None
    finally:
        os.close(descriptor)  # releases the lock
        with contextlib.suppress(OSError):  # ends at the first folder into which something was written
            for folder in made:
                folder.rmdir()


def write(path: Path, fill) -> None:
    """Write a file of the run as files.replace_file does. Raises SaveError."""
    try:
        replace_file(path, fill)
    except OSError as error:
        raise SaveError(f"cannot write to {path.parent}: {error.strerror or error}; the state before is intact: make "
                        "room there, or give the folder back, and go on with --resume") from None


def finished(path: Path) -> dict | None:
    """Return the result of a run that has ended; None where there is none. What is left of its state is removed."""
    if not (path / "result.json").exists():
        return None
    try:
        result = dict(read_json(path / "result.json")[0])
    except Exception:
        raise InputError(f"{path}/result.json: no result of this program; begin anew with --restart") from None
    shutil.rmtree(path / "state", ignore_errors=True)  # the process before may have ended between the two
    return result


def open_directory(path: Path, config: Config, run, resume: bool) -> None:
    """Clear the directory, begin the log and write config.json; on resuming, note what is different about this machine.

    ``run``: hirelc.Run, whose config holds what a goal has been resolved to.
    """
    if not resume:  # what an earlier run left, and temporary files of one that was killed
        shutil.rmtree(path / "state", ignore_errors=True)
        for file in (*(path / name for name in OUTPUTS), *path.glob(".*.tmp")):
            file.unlink(missing_ok=True)
    run.log.open(path / "run.log", resume)
    if resume:
        for note in moved(path, run.device, run.ranks.size):
            run.log.note(note)
        return
    asked, now = flatten(config), flatten(run.config)
    write_json(path / "config.json", {"settings": asked, "resolved": {k: v for k, v in now.items() if v != asked[k]},
                                      **provenance(run.device, run.ranks.size),
                                      **{key: value for key, value in identity(config).items() if key in FILES}})


# The machine


def identity(config: Config) -> dict:
    """Return what has to be the same for a run to go on: every setting that its result depends on, the versions, and
    hashes of FILES."""
    paths = [Path(name).expanduser() for name in (config.model.source.rpartition(":")[0], config.model.weights)]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths]
    return flatten(config) | VERSIONS | dict(zip(FILES, hashes))


def provenance(device, processes: int) -> dict:
    """Return what config.json holds beside the settings: command, time, git commit, versions, hardware."""
    here, commit = Path(__file__).resolve().parents[1], ""
    if (here / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
                                capture_output=True, text=True).stdout.strip()
    return {"command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "processes": processes,
            "git": commit or None, "versions": {"python": platform.python_version(), **VERSIONS},
            "hardware": {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                         "threads": torch.get_num_threads()}}


def moved(path: Path, device, processes: int) -> list[str]:
    """Return a line for each thing in which this machine differs from the one that the run began on."""
    before, now = ({**entry["hardware"], "number of processes": entry["processes"]} for entry in (
        read_json(path / "config.json")[0], provenance(device, processes)))
    return [f"goes on with another {key} than it began with ({before.get(key)}, now {value}): the last bits may differ "
            "from those of a run in one go" for key, value in now.items() if before.get(key) != value]


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next batch; nothing where it is not glibc.

    By default it hands a freed batch back to the system, and the next one pays a page fault per 4 KB: training a
    MobileNetV2 at 64 px takes a tenth longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD of malloc.h
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; the second is the most that some versions take
