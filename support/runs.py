"""Run directories: where a run's files lie, whose settings they belong to, and what is written when (SPEC 12)."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import io
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from config import Config, InputError, flatten, from_flat
from support.files import read_json, replace_file, shown
from evidence.report import write_text
from support.state import SaveError, Stopped


try:
    import fcntl
except ImportError:  # not on Windows, where nothing then keeps two processes off one run
    fcntl = None

CPU_INFO = Path("/proc/cpuinfo")

# where things lie, and how they are read, does not change the result
PLACES = {"out", "data.dir", "data.cache", "data.workers", "model.weights_dir", "policy"}


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next batch, for the whole process; nothing where it is not glibc.

    By default it may hand a freed batch back to the system, and the next one pays a page fault per 4 KB: a pass over
    decoded 64 px images then takes four times as long, and training a MobileNetV2 a tenth longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, 2**25)  # the most that some versions take


def run_directory(config: Config) -> Path:
    """OUT/expN[-NAME]-seedS, and OUT/NAME-seedS for a network of one's own."""
    if not config.exp:
        return Path(config.out) / f"{config.name}-seed{config.seed}"
    name = f"-{config.name}" if config.name else ""
    return Path(config.out) / f"exp{config.exp}{name}-seed{config.seed}"


def check_settings(path: Path, config: Config) -> None:
    """Refuse a folder that holds a run of other settings."""
    old = path / "config.json"
    if old.exists():
        try:
            before = flatten(from_flat(read_json(old)[0]["settings"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{old}: cannot be read as this program's settings ({shown(error)}); move the folder away "
                             "or choose another --out or --name") from None
        now = flatten(config)
        differing = [f"{key} (there {shown(before[key])}, now {shown(now[key])})" for key in now
                     if key not in PLACES and before[key] != now[key]]
        if differing:
            raise InputError(f"{path} holds a run with other settings: {'; '.join(differing)}; give the variant a "
                             "--name or choose another --out")


def check_directory(path: Path, config: Config) -> None:
    """Refuse a folder that cannot be written or that holds a run of other settings; leaves no trace."""
    check_settings(path, config)
    made = []
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        probe = path / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {config.out}: cannot write there ({error.strerror}: {error.filename}); choose "
                         "another folder") from None
    finally:
        for folder in reversed(made):
            folder.rmdir()


def provenance(device) -> dict:
    """What config.json holds beside the settings: command, time, git commit, versions, hardware."""
    here = Path(__file__).resolve().parents[1]
    git = None
    if (here / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
                             capture_output=True, text=True)
    return {"command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git.stdout.strip() if git and git.returncode == 0 else None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "hardware": {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                         "threads": torch.get_num_threads()}}


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether the hardware is known to have no instructions for bfloat16, which is then slower than float32."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        told = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", told, re.MULTILINE)
    return bool(flags) and "bf16" not in flags[0]


def save(run, path: Path, finished: bool = False) -> None:
    """After every phase: cycles.csv, updates.csv and the best cycle's packed file; theta_0 and best.pt when the run is
    ``finished``. Raises state.SaveError."""
    packed = path / "packed.pt"
    try:
        if run.cycles:
            write_text(path / "cycles.csv", _csv([dataclasses.asdict(row) for row in run.cycles]))
        if run.updates:
            write_text(path / "updates.csv", _csv(run.updates))
        if run.best is not None and not (packed.exists() and packed.read_bytes() == run.best_packed):
            replace_file(packed, lambda file: file.write(run.best_packed))
        if finished:
            replace_file(path / "baseline.pt", lambda file: torch.save(run.theta0, file))
            replace_file(path / "best.pt", lambda file: torch.save(run.best_network(), file))
    except OSError as error:
        raise SaveError(f"cannot write to {path}: {error.strerror or error}; the state there is intact: make room, or "
                        "give the folder back, and go on with --resume") from None


def clear(path: Path) -> None:
    """Remove what an earlier run with the same settings left, and temporary files of one that was killed."""
    shutil.rmtree(path / "state", ignore_errors=True)
    for name in ("result.json", "policy.json", "baseline.pt", "best.pt", "packed.pt", "cycles.csv", "updates.csv"):
        (path / name).unlink(missing_ok=True)
    _remove_temporary(path)


def _remove_temporary(path: Path) -> None:
    for pattern in (".*.tmp", ".probe-*"):
        for left in path.glob(pattern):
            left.unlink(missing_ok=True)


def identity(config: Config) -> dict:
    """What has to be the same for a run to go on: every setting that its result depends on, and the versions."""
    settings = {key: value for key, value in flatten(config).items() if key not in PLACES}
    return {**settings, "torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}


def moved(path: Path, device, processes: int) -> list[str]:
    """What is different about the machine that a run goes on at, one line each: results may then differ in the last
    bits, and from there on."""
    try:
        before, _ = read_json(path / "config.json")
        before = {**before["hardware"], "processes": before["processes"]}
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    now = {**provenance(device)["hardware"], "processes": processes}
    return [f"goes on with another {key} than it began with ({before.get(key)}, now {value}): the last bits may differ "
            "from those of a run in one go" for key, value in now.items() if before.get(key) != value]


class Owner:
    """The one process that may write to a run directory: it holds a lock on the file ``lock`` there, which says who it is
    and which the system releases when it ends, however it ends."""

    def __init__(self):
        self.path, self.file = None, None

    def take(self, folder: Path) -> None:
        """Become the owner of a folder, if it exists already. Raises InputError with the owner's host and process."""
        self.path = folder / "lock"
        while fcntl and self.file is None and self.path.parent.is_dir():
            file = open(self.path, "a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = " ".join(file.read(200).split()) or "another process"
                file.close()
                raise InputError(f"{self.path.parent}: {owner} works on this run; wait for it, or give this one "
                                 "another --name or --out") from None
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self.file = file
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                _remove_temporary(self.path.parent)
            else:
                file.close()  # its owner left between our two steps and took the file along

    def leave(self) -> None:
        """Give the run directory back."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None


@contextlib.contextmanager
def stoppable(progress):
    """SIGINT and SIGTERM inside: the run saves its state at the next step and raises state.Stopped; at once on the second
    signal, or where it is one of several processes."""
    def ask(number, frame):
        if progress.asked is not None or not progress.alone:
            raise Stopped(number)
        progress.asked = number

    with _handling(ask):
        try:
            yield
        finally:
            progress.wait()  # nobody else may have the run before


@contextlib.contextmanager
def _handling(handler):
    if threading.current_thread() is not threading.main_thread():  # others cannot be told
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_at_once():
    """SIGINT and SIGTERM inside raise state.Stopped."""
    def stop(number, frame):
        raise Stopped(number)

    return _handling(stop)


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
