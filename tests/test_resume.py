"""Runs that are killed and resumed end as those that were not.

The kills are real: this file, run as a program, forks a process per attempt and ends it with SIGKILL, at a random moment or
in the middle of a write, before or after a flush or a rename. The suite takes a small network through the whole loop;
HIRELC_LONG=1 kills 50 runs of the smoke experiment 4, several times each, and the small one at every single write.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LONG = os.environ.get("HIRELC_LONG") == "1"
FILES = {"config.json", "run.log", "cycles.csv", "updates.csv", "policy.json", "result.json", "best.pt", "baseline.pt",
         "packed.pt"}
NETWORK = """
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, 2), nn.Dropout(0.2), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(),
                         nn.Conv2d(12, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes))
"""
SMALL = ["data.classes=3", "data.image_size=16", "data.train_images=48", "data.test_images=40", "data.batch_size=16",
         "eval.batch_size=8", "scratch.epochs=2", "baseline.epochs=1", "surrogate.warmup=2", "surrogate.min_samples=3",
         "surrogate.epochs=3", "surrogate.epochs_after_warmup=3", "search.cycles=2", "lla.timesteps=4", "hla.timesteps=4",
         "hla.burst=4", "finetune.epochs=2", "finetune.bn_images=32", "sensitivity.images=2"]


def small(folder, *settings):
    """Command line of a run of the whole loop in about a second; the network's file is written to ``folder``."""
    (Path(folder) / "net.py").write_text(NETWORK)
    return ["--model", f"{folder}/net.py:make", "--smoke", "--weights", "none", "--device", "cpu", "--no-table", "--set",
            *SMALL, *settings]


def outcome(path):
    """All of a finished run directory that does not depend on time, and the names in it."""
    result = json.loads((path / "result.json").read_text())
    for key in ("timings", "time_shares"):
        del result[key]
    tensors = {name: torch.load(path / name, weights_only=True) for name in ("best.pt", "baseline.pt")}
    flat = {f"{name} {key}": value.tolist() for name, saved in tensors.items()
            for key, value in saved.get("model", saved).items()}
    return {"result": result, "policy": json.loads((path / "policy.json").read_text()), "weights": flat,
            "packed": (path / "packed.pt").read_bytes().hex(), "cycles": (path / "cycles.csv").read_text(),
            "updates": (path / "updates.csv").read_text(), "files": sorted(p.name for p in path.iterdir())}


# ---------------------------------------------------------------------------------------------------------------
# The program: forks processes and kills them


def attempt(arguments, out, delay=None, at=None, often=True):
    """One process that runs or resumes; killed after ``delay`` seconds, or at its ``at``-th write, flush, or side of a
    rename. ``often``: it saves wherever it could. Returns its exit code, -9 where it was killed."""
    import files
    import hirelc
    import state
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        if often:
            state.INTERVAL, state.SHARE = 0.0, 1e9
        passed = 0

        def counted(broken):
            nonlocal passed
            passed += 1
            if passed == at:
                broken()
                os.kill(os.getpid(), signal.SIGKILL)

        def write(file, data):
            counted(lambda: file.write(data[:len(data) // 2]))
            written(file, data)

        def flush(file):
            counted(lambda: None)
            flushed(file)

        def rename(old, new):
            counted(lambda: None)
            renamed(old, new)
            counted(lambda: None)

        written, flushed, renamed = files.write_bytes, files.flush, files.rename
        files.write_bytes, files.flush, files.rename = write, flush, rename
        os._exit(hirelc.main([*arguments, "--out", str(out), "--resume"]) if passed == 0 else 1)
    if delay is not None:
        end = time.monotonic() + delay
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def number(out):
    """Of the newest state below ``out``, 0 where there is none."""
    found = [json.loads(path.read_text())["number"] for path in Path(out).glob("*/state/manifest.json")]
    return found[0] if found else 0


def random_moments(arguments, out, seconds, rng):
    """A run that is killed up to five times at random moments; how often it was."""
    kills = 0
    while kills < 5:
        code = attempt(arguments, out, delay=rng.uniform(0.05, 0.5) * seconds, often=rng.random() < 0.5)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, code
        kills += 1
    assert attempt(arguments, out) == 0
    return kills


def every_write(arguments, out, stride):
    """One run that is killed at every ``stride``-th write, flush and rename between two states; how often it was."""
    kills, at, before = 0, 1, 0
    while (code := attempt(arguments, out, at=at, often=False)) != 0:
        assert code == -signal.SIGKILL, code
        kills += 1
        now = number(out)
        at, before = (1 + kills % stride if now != before else at + stride), now
    return kills


def program(folder, long, *parts):
    """``parts``: what of small, smoke and writes; smoke:25 begins at the run of that number."""
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    begin = {name: int(first or 0) for name, _, first in (part.partition(":") for part in parts)}
    past = small(folder, "carry=rest", "finetune.mode=qat", "surrogate=off", "search.around=last")
    for name, arguments, runs in (("small", past, 20 if long else 2),
                                  *([("smoke", ["--exp", "4", "--smoke", "--device", "cpu", "--no-table"], 50)]
                                    if long else [])):
        if name not in (begin or (name,)):
            continue
        for again in ("cold", "warm"):  # the first one also loads what later ones find loaded
            start = time.monotonic()
            out = f"{folder}/{name}" + ("-cold" if again == "cold" else "")
            assert attempt(arguments, out, often=False) == 0
            seconds = time.monotonic() - start
        path, = Path(f"{folder}/{name}").iterdir()
        wanted = outcome(path)
        assert set(wanted["files"]) == FILES
        kills = []
        for n in range(begin.get(name, 0), runs):
            print(f"{name} {n}", file=sys.stderr, flush=True)
            kills.append(random_moments(arguments, f"{folder}/{name}-{n}", seconds, random.Random(f"{name} {n}")))
            assert outcome(Path(f"{folder}/{name}-{n}") / path.name) == wanted, f"{name}, run {n}"
        print(json.dumps({"run": name, "seconds": round(seconds, 1), "killed at random": kills}), flush=True)
    if "writes" not in (begin or ("writes",)):
        return
    arguments = small(folder)
    assert attempt(arguments, f"{folder}/plain", often=False) == 0
    path, = Path(f"{folder}/plain").iterdir()
    kills = every_write(arguments, f"{folder}/writes", 1 if long else 11)
    assert outcome(Path(f"{folder}/writes") / path.name) == outcome(path)
    print(json.dumps({"run": "small", "killed at writes, flushes and renames": kills}), flush=True)


def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    done = subprocess.run([sys.executable, __file__, str(tmp_path), str(int(LONG))], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=4 * 3600 if LONG else 600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert sum(sum(entry.get("killed at random", [])) for entry in found) >= (100 if LONG else 2)
    assert found[-1]["killed at writes, flushes and renames"] >= (300 if LONG else 20)


# ---------------------------------------------------------------------------------------------------------------
# What a state takes on the disk


def stored(value, path):
    """What comes back of a value, and the bytes that it took."""
    import state
    with open(path, "wb") as file:
        state.encode(value, file)
    return state.decode(path), path.stat().st_size


def same_bits(one, other):
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_pruned_rows_take_no_room_and_come_back(tmp_path):
    weight = torch.randn(40, 30, 2, 2)
    weight[5:30] = 0.0
    weight[3, 1] = weight[31] = -0.0
    weight[32] = torch.nan
    found, size = stored({"w": weight, "all": torch.zeros(40, 30), "one": torch.ones(40)}, tmp_path / "part")
    assert same_bits(found["w"], weight) and same_bits(found["all"], torch.zeros(40, 30)) and found["one"].all()
    assert size < weight[:15].nbytes + 40 * 31 * 4 + 500
    turned = weight.to(memory_format=torch.channels_last)
    assert same_bits(stored(turned, tmp_path / "part")[0], weight)
    few = torch.zeros(1000, 3)
    few[7] = 1.0
    assert same_bits(stored(few, tmp_path / "part")[0], few)


@pytest.mark.parametrize("shape, count, bitmap", [
    ([8, 2 ** 40], 4, b"\xf0"), ([8, 3], 3, b"\xf0"), ([8, 3], 0, b"\0"), ([8, -3], 4, b"\xf0"), ([2 ** 50, 1], 4, b"\xf0"),
    ([4, 3], 8, b"\xf0"), ([], 4, b"\xf0"), ("ab", 4, b"\xf0"), ([8, 4], 4, b"\xf0")])
def test_rows_that_cannot_be_are_refused(tmp_path, shape, count, bitmap):
    import state
    header = json.dumps({"rows": [shape, count]}).encode()
    (tmp_path / "part").write_bytes(state.MAGIC + len(header).to_bytes(8, "little") + header + bitmap + bytes(48))
    with pytest.raises((ValueError, TypeError, IndexError)):
        state.decode(tmp_path / "part")


@pytest.mark.parametrize("mode", ["paper", "qat"])
def test_a_state_holds_no_more_networks_than_it_says(tmp_path, monkeypatch, mode):
    import hirelc
    import state
    arguments = small(tmp_path, "finetune.epochs=3", f"finetune.mode={mode}", "compress.scope=all", "surrogate=off",
                      "search.cycles=3", *(["search=greedy", "search.target=0.15"] if mode == "qat" else []))
    (tmp_path / "net.py").write_text(NETWORK.replace("12", "8").replace("8", "64"))
    monkeypatch.setattr(state, "INTERVAL", 0.0)
    monkeypatch.setattr(state, "SHARE", 1e9)
    write, taken = state.Store.write, []

    def watched(store, *parts):
        write(store, *parts)
        taken.append({name: size for name, (_, size, _) in store.parts.items()})

    monkeypatch.setattr(state.Store, "write", watched)
    assert hirelc.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    path, = (tmp_path / "out").iterdir()
    cycles = json.loads((path / "result.json").read_text())["cycles"]
    left, network = 1 - min(row["sparsity"] for row in cycles[1:]), (path / "baseline.pt").stat().st_size
    at_most = 1.02 * network * (1 + 5 * left if mode == "paper" else 4 + 2 * 0.3) + 50_000
    full = [sizes for sizes in taken if sizes.keys() >= {"theta0", "best", "trainer", "trainer.best"}]
    most = max(sum(sizes[name] for name in ("theta0", "best", "trainer", "trainer.best")) for sizes in full)
    assert 3 * network < most < at_most and (mode == "qat" or left < 0.9)


if __name__ == "__main__":
    program(sys.argv[1], sys.argv[2] == "1", *sys.argv[3:])
