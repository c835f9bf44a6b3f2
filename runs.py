"""Run directories: where a run's files lie, whose settings they belong to, and what is written when (SPEC 12)."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import io
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

import pack
from config import Config, InputError, flatten, from_flat
from files import read_json, shown
from report import write_text


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
            raise InputError(f"{old}: cannot be read as this program's settings ({shown(error)}); move the folder away or "
                             "choose another --out or --name") from None
        now = flatten(config)
        # where things lie, and how they are read, does not change the result
        places = {"out", "data.dir", "data.cache", "data.workers", "model.weights_dir", "policy"}
        differing = [f"{key} (there {shown(before[key])}, now {shown(now[key])})" for key in now
                     if key not in places and before[key] != now[key]]
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
    here = Path(__file__).resolve().parent
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


def save(run, path: Path) -> None:
    """After every cycle: cycles.csv, updates.csv, once theta_0, and the best network so far, masked and packed."""
    write_text(path / "cycles.csv", _csv([dataclasses.asdict(row) for row in run.cycles]))
    if run.updates:
        write_text(path / "updates.csv", _csv(run.updates))
    if not (path / "baseline.pt").exists():
        _write_tensors(path / "baseline.pt", run.theta0)
    if run.best is run.cycles[-1]:
        _write_tensors(path / "best.pt", {
            "format": 1, "settings": flatten(run.config), "cycle": run.best.cycle, "network": run.network,
            "model": run.best_state, "masks": run.best_masks, "policy": run.policy()})
        pack.write(path / "packed.pt", run.best_packed)


def _write_tensors(path: Path, value) -> None:
    """``torch.save``, a whole file or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(value, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
