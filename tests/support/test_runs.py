"""Resuming: a run that is broken off anywhere, and goes on, ends as one that was left alone.

python tests/support/test_runs.py DIR [KILLS] kills real runs at random moments and compares (twenty by default).
"""

import io
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # where this file is run as a script

import hirelc  # noqa: E402
from config import InputError  # noqa: E402
from networks import Trap, silent  # noqa: E402
from support import cli, runs  # noqa: E402

SMALL = ["data.train_images=96", "data.test_images=48", "scratch.epochs=2", "finetune.epochs=2", "lla.timesteps=4",
         "hla.timesteps=4", "hla.burst=4", "sensitivity.images=4", "surrogate.epochs=2", "surrogate.warmup=2",
         "surrogate.epochs_after_warmup=2", "finetune.bn_images=64", "model.width=0.05"]
VARIANTS = {"paper": (4, ["carry=rest", "surrogate.min_samples=2"]),
            "plus": (4, ["preset=plus", "search.target=0.2", "goal=drop:0", "search.cycles=1"]),
            "null": (4, ["search=null"])}


def settings(out, variant="paper"):
    exp, more = VARIANTS[variant]
    return cli.resolve(exp, {"smoke": True, "out": str(out)}, SMALL + more)


def contents(path):
    """Everything that a finished run leaves, but for what tells the time."""
    result = json.loads((path / "result.json").read_text())
    for key in ("timings", "time_shares"):
        del result[key]
    files = {name: (path / name).read_bytes() for name in ("policy.json", "packed.pt", "cycles.csv", "updates.csv")
             if (path / name).exists()}
    networks = [torch.load(path / name, weights_only=True) for name in ("baseline.pt", "best.pt")]
    tensors = {**networks[0], **{f"best {key}": value for key, value in networks[1]["model"].items()}}
    return result, files, {key: value.numpy().tobytes() for key, value in tensors.items()}


def assert_same(path, reference):
    for mine, other in zip(contents(path), contents(reference)):
        assert mine.keys() == other.keys()
        assert not [key for key in mine if mine[key] != other[key]]
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in reference.iterdir())  # nothing is left over


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_broken_off_at_every_boundary_ends_as_one_left_alone(tmp_path, monkeypatch, variant):
    whole, config = settings(tmp_path / "whole", variant), settings(tmp_path / "broken", variant)
    hirelc.run_experiment(whole, silent())
    path, replace, breaks, seen = runs.run_directory(config), runs.replace_file, 0, set()

    class Killed(BaseException):
        pass

    def kill(file, fill):  # by turns before and after the file has its name, and at each name once
        nonlocal breaks
        name = Path(file).name
        if Path(file).parent.name == "state" and name not in {"identity.json", *seen}:
            breaks += 1
            if name == "training.pt" or breaks % 2:
                replace(file, fill)
            seen.update({name} - {"training.pt"})
            raise Killed
        replace(file, fill)

    monkeypatch.setattr(runs, "replace_file", kill)
    resume = False
    while not (path / "result.json").exists():
        try:
            hirelc.run_experiment(config, silent(), resume=resume)
        except Killed:
            assert breaks < 400
        resume = True
    assert breaks > 15
    assert_same(path, runs.run_directory(whole))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = settings(tmp_path, "null")
    first, again = (hirelc.run_experiment(config, silent()) for _ in range(2))
    assert again["timings"] == json.loads(json.dumps(first["timings"]))
    assert hirelc.run_experiment(config, silent(), restart=True)["timings"] != again["timings"]


def test_a_broken_off_run_needs_a_word(tmp_path, monkeypatch):
    config = settings(tmp_path, "null")
    monkeypatch.setattr(hirelc, "algorithm_1", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hirelc.run_experiment(config, silent())
    with pytest.raises(InputError, match="--resume goes on with it, --restart begins anew"):
        hirelc.run_experiment(config, silent())


def counter():
    """An object with a state."""
    made = torch.nn.Module()
    made.register_buffer("count", torch.tensor(0))
    return made


def phases(folder, resume, **identity):
    made = runs.Phases(folder, {"seed": 1, **identity}, log=silent())
    made.begin(resume)
    return made


@pytest.mark.parametrize("key", ["counter", "best"])
def test_phases_return_what_they_returned_and_restore_what_changed(tmp_path, key):
    def advance(counter, ours):
        counter.count += 1
        ours.log.note(f"step {counter.count}")
        return int(counter.count), torch.rand(2)

    first, counted = phases(tmp_path / "state", False), counter()
    values = [first.once(f"a: {n}", lambda: advance(counted, first), **{key: counted}) for n in range(3)]
    following = torch.rand(2)
    assert sum("@" in path.name for path in (tmp_path / "state").iterdir()) == (key == "best")  # the newest network

    second, again = phases(tmp_path / "state", True), counter()
    torch.manual_seed(99)
    restored = [second.once(f"a: {n}", lambda: pytest.fail("computed again"), **{key: again}) for n in range(3)]
    assert [value[0] for value in restored] == [1, 2, 3] and again.count == 3
    assert all(torch.equal(a[1], b[1]) for a, b in zip(values, restored))
    assert torch.equal(torch.rand(2), following)  # the random states of the last phase
    assert second.log.notes == ["step 1", "step 2", "step 3"]
    assert second.once("a: 3", lambda: "new") == "new"


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(tmp_path):
    first = phases(tmp_path / "state", False)
    first.once("a: b", lambda: [1.0])
    with pytest.raises(InputError, match=r"seed \(there 1, now 2\)"):
        phases(tmp_path / "state", True, seed=2)
    file, trap = tmp_path / "state" / "a-b.pt", io.BytesIO()
    torch.save({"value": Trap(tmp_path / "executed"), "notes": [], "random": {}, "seconds": 0, "elapsed": 0}, trap)
    whole = file.read_bytes()
    for spoilt in (whole[:len(whole) // 2], b"", b"x" * len(whole), trap.getvalue()):
        file.write_bytes(spoilt)
        with pytest.raises(InputError, match="damaged, or not a state of this program"):
            phases(tmp_path / "state", True).once("a: b", lambda: None)
    assert not (tmp_path / "executed").exists()
    file.write_bytes(whole)
    assert phases(tmp_path / "state", True).once("a: b", lambda: None) == [1.0]


def test_a_folder_whose_settings_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as this program's settings"):
        runs.check_directory(tmp_path, hirelc.Config())


def test_one_process_at_a_time(tmp_path):
    with runs.locked(tmp_path / "out" / "run"):
        with pytest.raises(InputError, match="another process works on this run"):
            with runs.locked(tmp_path / "out" / "run"):
                pass
    assert not (tmp_path / "out").exists()  # nothing was written
    with runs.locked(tmp_path / "run"):
        pass


def test_another_machine_is_noted(tmp_path):
    device = torch.device("cpu")
    now = runs.provenance(device, 1)
    (tmp_path / "config.json").write_text(json.dumps({**now, "hardware": {**now["hardware"], "threads": 96}}))
    note, = runs.moved(tmp_path, device, 1)
    assert note.startswith("goes on with another threads than it began with (96, now ")


def start(out, *more):
    command = [sys.executable, str(ROOT / "hirelc.py"), "--exp", "4", "--smoke", "--out", str(out), "--no-table", *more,
               "--set", *SMALL, "scratch.epochs=8", "surrogate.min_samples=2", "carry=rest"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def killed(out, waits):
    """Run to the end, killed whenever the seconds that ``waits()`` gives have passed; return how often that was."""
    kills = 0
    while True:
        process = start(out, "--resume")
        try:
            process.wait(waits())
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        process.stderr.close()
        return kills


def test_two_real_kills_and_a_polite_stop(tmp_path):
    whole = start(tmp_path / "whole")
    began = time.monotonic()
    process = start(tmp_path / "stopped")
    state = tmp_path / "stopped" / "exp4-seed42" / "state"
    while not (state / "training.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "go on with the same command and --resume" in message
    assert whole.wait(120) == 0
    whole.stderr.close()
    seconds = iter([(time.monotonic() - began) * share for share in (0.5, 0.7)] + [300])
    assert killed(tmp_path / "stopped", lambda: next(seconds)) <= 2
    assert_same(tmp_path / "stopped" / "exp4-seed42", tmp_path / "whole" / "exp4-seed42")


def main(folder, kills=20):
    """Kill runs at random moments until ``kills`` are reached; compare each with one that was left alone."""
    folder, done, draw = Path(folder), 0, random.Random(0)
    began = time.monotonic()
    assert killed(folder / "whole", lambda: 600) == 0
    seconds, number = time.monotonic() - began, 0
    while done < kills:
        number += 1
        done += killed(folder / f"run{number}", lambda: draw.uniform(2.0, seconds))
        assert_same(folder / f"run{number}" / "exp4-seed42", folder / "whole" / "exp4-seed42")
        print(f"run {number}: {done} kills so far, equal to the run that was left alone", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
