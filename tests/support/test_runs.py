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
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
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

# Kernels are carried over, also from a cycle that is not the best, and nothing of a network is left out of its state.
CARRIED = ["carry=all", "finetune.mode=paper", "surrogate=off", "search.cycles=4", "finetune.epochs=4", "finetune.lr=0.01",
           "compress.max_pruning=0.1"]


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
    from support import files
    import hirelc
    from support import state
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
    """``parts``: what of small, carried, smoke and writes; smoke:25 begins at the run of that number."""
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    begin = {name: int(first or 0) for name, _, first in (part.partition(":") for part in parts)}
    past = small(folder, "carry=rest", "finetune.mode=qat", "surrogate=off", "search.around=last")
    for name, arguments, runs in (("small", past, 20 if long else 2),
                                  *([("carried", small(folder, *CARRIED), 20),
                                     ("smoke", ["--exp", "4", "--smoke", "--device", "cpu", "--no-table"], 50)]
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
    from support import state
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


BITS = {
    "weights": torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 0.02,
    "moments": torch.randn(5000, generator=torch.Generator().manual_seed(1)).pow(2) * 1e-9,
    "one value": torch.full((5000,), 1e-3), "zeros": torch.zeros(5000), "not numbers": torch.full((5000,), torch.nan),
    "any bits": torch.randint(-2 ** 31, 2 ** 31 - 1, (5000,), generator=torch.Generator().manual_seed(2), dtype=torch.int32),
    "differences": torch.arange(5000, dtype=torch.int32) * 7919, "a scalar": torch.tensor(-0.0), "nothing": torch.zeros(0, 3),
    "4096": torch.arange(4096.0), "channels last": torch.randn(40, 30, 3, 3).to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("name", BITS)
def test_every_bit_comes_back(tmp_path, name):
    found, size = stored(BITS[name], tmp_path / "part")
    assert found.dtype == BITS[name].dtype and found.shape == BITS[name].shape
    assert torch.equal(found.reshape(-1).view(torch.int32), BITS[name].contiguous().reshape(-1).view(torch.int32))
    assert size <= BITS[name].nbytes + 200


@pytest.mark.parametrize("name", BITS)
def test_numbers_that_are_not_coded_come_back_too(tmp_path, name):
    from support import state
    made = state.Frozen({"x": BITS[name]}, coded=False)
    with open(tmp_path / "part", "wb") as file:
        made(file)
    found = state.decode(tmp_path / "part")["x"]
    assert torch.equal(found.reshape(-1).view(torch.int32), BITS[name].contiguous().reshape(-1).view(torch.int32))
    assert found.dtype == BITS[name].dtype and found.shape == BITS[name].shape
    assert abs((tmp_path / "part").stat().st_size - made.bytes) < 50 and made.bytes > BITS[name].nbytes


def test_exponents_take_two_or_three_bits(tmp_path):
    """The entropy of a normal variable's exponent is 2.55 bits of the 8."""
    for name, most in (("weights", 0.86), ("moments", 0.88), ("one value", 0.79)):
        assert stored(BITS[name], tmp_path / "part")[1] < most * BITS[name].nbytes, name


def test_a_part_holds_what_was_there_when_it_was_made(tmp_path):
    from support import state
    values = {"w": torch.randn(90, 90), "rows": torch.eye(4), "order": torch.arange(5), "half": torch.ones(3).bfloat16()}
    values["rows"][:3] = 0.0
    before = {key: value.clone() for key, value in values.items()}
    write = state.Frozen(values)
    for value in values.values():
        value.zero_()
    with open(tmp_path / "part", "wb") as file:
        write(file)
    found = state.decode(tmp_path / "part")
    assert all(torch.equal(found[key], value) for key, value in before.items())


def test_a_network_trained_on_is_a_short_difference(tmp_path):
    from support import state
    draw = torch.Generator().manual_seed(0)
    other = {"a": torch.randn(80, 80, generator=draw), "pruned": torch.randn(80, 80, generator=draw), "b": torch.tensor(1.5),
             "n": torch.tensor(3), "i": torch.arange(4, dtype=torch.int32)}
    value = {key: tensor * (1 + 1e-4) if tensor.is_floating_point() else tensor + 1 for key, tensor in other.items()}
    value["pruned"][:40] = 0.0
    value["code"] = {"codes": torch.ones(3)}
    made = state.difference(value, {**other, "code": torch.ones(3)})
    assert torch.equal(made["pruned"], value["pruned"]) and made["code"] is value["code"]
    found, size = stored(made, tmp_path / "part")
    back = state.restored(found, {**other, "code": torch.ones(3)})
    assert all(back[key].dtype == value[key].dtype and torch.equal(back[key], value[key]) for key in other)
    assert size < 0.6 * value["a"].nbytes + 0.45 * value["pruned"].nbytes + 1000
    assert state.difference(value, None) == value and state.restored(value, None) == value


@pytest.mark.parametrize("count, lengths, fill", [
    (5000, [600, 5000, 5000, 5000], b"\0"), (5000, [4999, 5000, 5000, 5000], b"\xff"), (2 ** 45, [16], b"\0"),
    (40, [6, 40, 40, 40], b"\0"), (5000, [624, 5000, 5000, 5000], b"\0"), (5000, [5001, 5000, 5000, 5000], b"\0"),
    (5000, [2 ** 60], b"\0"), (0, [3, 0, 0, 0], b"\x03")])
def test_codes_that_cannot_be_are_refused(tmp_path, count, lengths, fill):
    from support import state
    header = json.dumps({"tensor": ["float32", [count]]}).encode()
    body = state.PLANES + b"".join(length.to_bytes(8, "little") + fill * min(length, 6000) for length in lengths)
    (tmp_path / "part").write_bytes(state.MAGIC + len(header).to_bytes(8, "little") + header + body)
    with pytest.raises(ValueError):
        state.decode(tmp_path / "part")


@pytest.mark.parametrize("change", ["longer", "shorter", "more"])
def test_a_code_of_another_length_is_refused(tmp_path, change):
    """zlib itself is content with all three."""
    from support import state
    stored(BITS["weights"], tmp_path / "part")
    content = (tmp_path / "part").read_bytes()
    start = content.index(b"}p", len(state.MAGIC)) + 2
    length = int.from_bytes(content[start:start + 8], "little")
    code, rest = content[start + 8:start + 8 + length], content[start + 8 + length:]
    plane = zlib.decompress(code, -15)
    plane, behind = {"longer": (plane + b"\0", b""), "shorter": (plane[:-1], b""), "more": (plane, b"\0")}[change]
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    code = coder.compress(plane) + coder.flush() + behind
    (tmp_path / "part").write_bytes(content[:start] + len(code).to_bytes(8, "little") + code + rest)
    with pytest.raises(ValueError, match="another length"):
        state.decode(tmp_path / "part")


@pytest.mark.parametrize("shape, count, bitmap", [
    ([8, 2 ** 40], 4, b"\xf0"), ([8, 3], 3, b"\xf0"), ([8, 3], 0, b"\0"), ([8, -3], 4, b"\xf0"), ([2 ** 50, 1], 4, b"\xf0"),
    ([4, 3], 8, b"\xf0"), ([], 4, b"\xf0"), ("ab", 4, b"\xf0"), ([8, 4], 4, b"\xf0")])
def test_rows_that_cannot_be_are_refused(tmp_path, shape, count, bitmap):
    from support import state
    header = json.dumps({"rows": [shape, count]}).encode()
    (tmp_path / "part").write_bytes(state.MAGIC + len(header).to_bytes(8, "little") + header + bitmap + bytes(48))
    with pytest.raises((ValueError, TypeError, IndexError)):
        state.decode(tmp_path / "part")


def watched(monkeypatch):
    """The sizes of the parts of every state that is written from here on, and saving wherever it can be."""
    from support import state
    write, taken = state.Store.write, []

    def measured(store, *parts):
        write(store, *parts)
        taken.append({name: size for name, (_, size, _) in store.parts.items()})

    monkeypatch.setattr(state.Store, "write", measured)
    monkeypatch.setattr(state, "INTERVAL", 0.0)
    monkeypatch.setattr(state, "SHARE", 1e9)
    return taken


WIDE = NETWORK.replace("12", "8").replace("8", "64")


@pytest.mark.parametrize("settings, most", [
    (["finetune.mode=paper"], 4.8), (["finetune.mode=qat", "search=greedy", "search.target=0.15"], 4.3),
    (["finetune.mode=paper", "compress.max_pruning=0"], 5), (["finetune.mode=paper", "compress.max_pruning=0", "carry=all"], 5),
    (["finetune.mode=qat", "finetune.scales=learned", "carry=all"], 4.3)])
def test_a_state_holds_no_more_networks_than_it_says(tmp_path, monkeypatch, settings, most):
    """theta_0, the best network and a training with a best epoch, beside the packed file; 5 is 3 more than those two."""
    import hirelc
    from support import state
    taken = watched(monkeypatch)
    arguments = small(tmp_path, "finetune.epochs=3", "compress.scope=all", "surrogate=off", "search.cycles=3", *settings)
    (tmp_path / "net.py").write_text(WIDE)
    assert hirelc.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    path, = (tmp_path / "out").iterdir()
    cycles = json.loads((path / "result.json").read_text())["cycles"]
    if "compress.max_pruning=0" in settings:
        assert all(row["sparsity"] == 0 for row in cycles)
    network = (path / "baseline.pt").stat().st_size
    full = [sizes for sizes in taken if sizes.keys() >= {"theta0", "best", "trainer", "trainer.best"}]
    assert len(full) >= 4
    largest = max(full, key=lambda sizes: sum(sizes[name] for name in sizes.keys() - state.AGENTS))
    assert 3 * network < sum(largest[name] for name in largest.keys() - state.AGENTS) < most * network + 50_000, largest


def test_a_training_stands_for_the_network_that_it_began_with(tmp_path, monkeypatch):
    """With carry=all that network is needed by nothing else: its part of the state goes, and the masks are the training's."""
    import hirelc
    from support import state
    import train
    arguments = small(tmp_path, *CARRIED)
    assert hirelc.main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    path, = (tmp_path / "plain").iterdir()
    wanted = outcome(path)
    assert wanted["result"]["best_cycle"] != 2  # the third begins with what is not the best
    monkeypatch.setattr(state, "INTERVAL", 0.0)
    monkeypatch.setattr(state, "SHARE", 1e9)
    epoch, again = train.Trainer.run_epoch, [*arguments, "--out", str(tmp_path / "out"), "--resume"]

    def broken(trainer, progress=None, what=""):
        if what == "cycle 3, fine-tuning" and len(trainer.history) == 2:
            raise FloatingPointError("broken off")
        return epoch(trainer, progress, what)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "run_epoch", broken)
        assert hirelc.main(again) == 1
    parts = json.loads((tmp_path / "out" / path.name / "state" / "manifest.json").read_text())["parts"]
    assert "trainer" in parts and "carried" not in parts
    applied = []
    monkeypatch.setattr(hirelc.HiReLC, "apply", lambda run, *args, own=hirelc.HiReLC.apply: applied.append(run.carried) or
                        own(run, *args))
    assert hirelc.main(again) == 0
    assert applied[0] is None and applied[1] is not None
    assert outcome(tmp_path / "out" / path.name) == wanted


BUFFERS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1)
        self.again, self.last = self.norm, nn.Linear(8, classes)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.again(self.second(x)).relu().mean((2, 3)) * self.scale)

def make(num_classes):
    return Net(num_classes)
"""


def test_buffers_that_are_shared_or_not_kept(tmp_path, monkeypatch):
    """The packed file is made again from the best network after a stop."""
    import hirelc
    arguments = small(tmp_path, "search.cycles=3", "surrogate=off", "finetune.lr=0.01")
    (tmp_path / "net.py").write_text(BUFFERS)
    assert hirelc.main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    path, = (tmp_path / "plain").iterdir()
    search, again = hirelc.HiReLC.search_blocks, [*arguments, "--out", str(tmp_path / "out"), "--resume"]

    def broken(run, cycle):
        if cycle == 3:
            raise FloatingPointError("broken off")
        return search(run, cycle)

    with monkeypatch.context() as patch:
        patch.setattr(hirelc.HiReLC, "search_blocks", broken)
        assert hirelc.main(again) == 1
    assert hirelc.main(again) == 0
    assert outcome(tmp_path / "out" / path.name) == outcome(path)


# ---------------------------------------------------------------------------------------------------------------
# The thread that writes


def slow_store(tmp_path, monkeypatch):
    """(progress whose state is always due, a lock that its writes wait for, what was known at each of them)"""
    from support import state
    store, held, seen = state.Store(tmp_path / "state", {}), threading.Lock(), []
    write = store.write

    def waiting(parts, drop=()):
        with held:
            write(parts, drop)
            seen.append(state.decode(store.folder / store.parts["known"][0]) if "known" in parts else None)

    monkeypatch.setattr(store, "write", waiting)
    monkeypatch.setattr(state, "INTERVAL", 0.0)
    monkeypatch.setattr(state, "SHARE", 1e9)
    return state.Progress(store), held, seen


def test_a_run_goes_on_while_its_state_is_written(tmp_path, monkeypatch):
    progress, held, seen = slow_store(tmp_path, monkeypatch)
    values = torch.zeros(3)
    held.acquire()
    progress.begin()
    progress.once("a", lambda: values)  # due, and being written from here on
    values += 1
    assert progress.writing is not None and not progress.writing.done() and seen == []
    held.release()
    progress.commit("phase", {"run": {"x": 1}})
    assert torch.equal(seen[0]["a 0"], torch.zeros(3)) and len(seen) == 2
    assert progress.writing is None and 0 < progress.spent


def test_what_a_thread_could_not_write_ends_the_run(tmp_path, monkeypatch):
    from support import state
    progress, held, _ = slow_store(tmp_path, monkeypatch)

    def full(parts, drop=()):
        raise state.SaveError("no room")

    monkeypatch.setattr(progress.store, "write", full)
    progress.begin()
    progress.once("a", lambda: 1)
    with pytest.raises(state.SaveError, match="no room"):
        progress.wait()
    progress.wait()  # told once
    progress.once("b", lambda: 1)
    with pytest.raises(state.SaveError, match="no room"):
        progress.commit("phase", {})
    assert progress.done == []


def test_a_stop_waits_for_its_state(tmp_path, monkeypatch):
    from support import state
    progress, held, seen = slow_store(tmp_path, monkeypatch)
    held.acquire()
    threading.Timer(0.3, held.release).start()
    progress.begin()
    progress.asked = signal.SIGTERM
    with pytest.raises(state.Stopped):
        progress.once("a", lambda: 1)
    assert seen == [{"a 0": 1}] and progress.writing is None


if __name__ == "__main__":
    program(sys.argv[1], sys.argv[2] == "1", *sys.argv[3:])
