"""Faults that are really brought about: signals, two owners, disks and folders, numbers that are not finite, memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from support import files
import hirelc
from support import runs
from support import state
from config import InputError
from support.log import Log
from models import Block
from evidence.sensitivities import PROBES, sensitivity
from support.state import Progress, SaveError, Stopped, Store
from test_hirelc import small_run
from test_qat import Pictures
from test_resume import FILES, ROOT, outcome, small
from train import TooLarge, Trainer, correct, estimate_batchnorm

RUN = "make-seed42"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Of a small run; the file of its network, which the results name, is the same for all."""
    return small(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert hirelc.main([*command, "--out", str(folder)]) == 0
    return outcome(folder / RUN)


# ---------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("where, number, code", [
    *((step, signal.SIGTERM, 143) for step in ("train_from_scratch", "train_baseline", "estimate_sensitivity",
                                               "warm_up_surrogate", "choose_budgets", "search_blocks",
                                               "finetune_and_measure", "report")),
    ("train_baseline", signal.SIGINT, 130), ("search_blocks", signal.SIGINT, 130)])
def test_a_signal_in_each_phase_saves_the_state(tmp_path, monkeypatch, capfd, undisturbed, command, where, number, code):
    step = getattr(hirelc.HiReLC, where)

    def interrupted(run, *args):
        os.kill(os.getpid(), number)
        return step(run, *args)

    arguments = [*command, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(hirelc.HiReLC, where, interrupted)
        assert hirelc.main(arguments) == code
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "go on with: python hirelc.py --model" in said[0] and said[0].endswith("--resume")
    assert (tmp_path / "out" / RUN / "state" / "manifest.json").exists()
    assert not (tmp_path / "out" / RUN / "lock").exists()
    assert hirelc.main(arguments) == 2  # not without --resume or --restart
    assert "--resume goes on with it, --restart begins anew" in capfd.readouterr().err
    assert hirelc.main([*arguments, "--resume"]) == 0
    assert outcome(tmp_path / "out" / RUN) == undisturbed


def test_a_signal_while_data_are_read_ends_at_once(tmp_path, monkeypatch, capfd, command):
    monkeypatch.setattr(hirelc.data, "load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert hirelc.main([*command, "--out", str(tmp_path / "out")]) == 143
    assert "stopped by SIGTERM" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_second_signal_ends_it_where_it_is():
    progress = Progress(Store("nowhere", {}))
    with pytest.raises(Stopped), runs.stoppable(progress):
        os.kill(os.getpid(), signal.SIGTERM)
        assert progress.asked == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_finished_run_is_left_alone_with_resume(tmp_path, capfd, command):
    arguments = [*command, "--out", str(tmp_path / "out")]
    assert hirelc.main([*arguments, "--resume"]) == 0  # nothing there yet: begins
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / RUN).iterdir()}
    assert set(before) == FILES
    assert hirelc.main([*arguments, "--resume"]) == 0
    assert "finished already" in capfd.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / RUN).iterdir()}
    (tmp_path / "out" / RUN / "state").mkdir()  # as if the process had been killed while it cleaned up
    (tmp_path / "out" / RUN / "state" / "run-9").write_bytes(b"part")
    assert hirelc.main([*arguments, "--resume"]) == 0
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / RUN).iterdir()}


# ---------------------------------------------------------------------------------------------------------------
# One owner


def test_a_lock_that_is_held_and_one_that_was_left_behind(tmp_path, capfd, command):
    path = tmp_path / "out" / RUN
    path.mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from support import runs
owner = runs.Owner()
owner.take(pathlib.Path({str(path)!r}))
print("mine", flush=True)
time.sleep(600)
"""], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "mine\n"
    arguments = [*command, "--out", str(tmp_path / "out")]
    assert hirelc.main(arguments) == 2
    said = capfd.readouterr().err
    assert f"process {holder.pid} on " in said and str(path) in said and len(said.splitlines()) == 1
    assert [p.name for p in path.iterdir()] == ["lock"]
    holder.kill()
    holder.wait()
    assert (path / "lock").exists()  # its owner is dead
    assert hirelc.main(arguments) == 0
    assert {p.name for p in path.iterdir()} == FILES


# ---------------------------------------------------------------------------------------------------------------
# The disk


def mounted(folder, options):
    """An empty file system of its own on ``folder``; skips the test where the system refuses."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    try:
        mounted(folder, "size=8m")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_state(tmp_path, disk, capfd, undisturbed, command):
    filler = disk / "filler"
    filler.write_bytes(b"\0" * 7_000_000)
    arguments = [*command, "--out", str(disk / "out")]
    assert hirelc.main(arguments) == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "No space left on device" in said[0] and "--resume" in said[0], said
    assert not list((disk / "out").rglob(".*.tmp"))
    done = json.loads((disk / "out" / RUN / "state" / "manifest.json").read_text())
    assert done["number"] >= 1
    filler.unlink()
    assert hirelc.main([*arguments, "--resume"]) == 0
    assert outcome(disk / "out" / RUN) == undisturbed


def test_a_read_only_folder_is_refused_before_anything_is_done(tmp_path, disk, capfd, command):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert hirelc.main([*command, "--out", str(disk / "out")]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "cannot write there" in said[0]


def test_a_state_that_cannot_be_written_stops_the_run(tmp_path, capfd, monkeypatch, undisturbed, command):
    arguments = [*command, "--out", str(tmp_path / "out")]
    search, kept = hirelc.HiReLC.search_blocks, tmp_path / "out" / RUN / "state"

    def broken(run, *args):
        kept.rename(tmp_path / "aside")
        kept.write_text("in the way")
        return search(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(hirelc.HiReLC, "search_blocks", broken)
        assert hirelc.main(arguments) == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "cannot save the state" in said[0]
    kept.unlink()
    (tmp_path / "aside").rename(kept)
    assert hirelc.main([*arguments, "--resume"]) == 0
    assert outcome(tmp_path / "out" / RUN) == undisturbed


def test_an_output_folder_that_goes_away(tmp_path, capfd, monkeypatch, command):
    arguments = [*command, "--out", str(tmp_path / "out")]
    search = hirelc.HiReLC.search_blocks

    def broken(run, *args):
        shutil.rmtree(tmp_path / "out")
        return search(run, *args)

    monkeypatch.setattr(hirelc.HiReLC, "search_blocks", broken)
    assert hirelc.main(arguments) == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "cannot save the state" in said[0] and "No such file" in said[0]


def test_a_best_network_that_cannot_be_written_leaves_the_state(tmp_path, monkeypatch, capfd, undisturbed, command):
    arguments, rename = [*command, "--out", str(tmp_path / "out")], files.rename

    def full(old, new):
        if new.name == "best.pt":
            raise OSError(28, "No space left on device")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", full)
        assert hirelc.main(arguments) == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "No space left on device" in said[0] and "--resume" in said[0]
    assert hirelc.main([*arguments, "--resume"]) == 0 and outcome(tmp_path / "out" / RUN) == undisturbed


def test_a_save_that_fails_keeps_the_state_before(tmp_path, monkeypatch):
    store = Store(tmp_path / "state", {"seed": 1})
    store.write({"a": {"x": torch.arange(3), "y": [1.5, None, "z"]}, "b": 2})
    for fault in ("write_bytes", "flush", "rename"):
        def fail(*_):
            raise OSError(28, "No space left on device")
        with monkeypatch.context() as patch:
            patch.setattr(files, fault, fail)
            with pytest.raises(SaveError, match="No space left on device.*is intact"):
                store.write({"a": 0})
        again = Store(tmp_path / "state", {"seed": 1})
        found = again.read()
        assert found["b"] == 2 and torch.equal(found["a"]["x"], torch.arange(3)) and found["a"]["y"] == [1.5, None, "z"]
        assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["a-1", "b-1", "manifest.json"]


def test_a_state_of_other_settings_or_another_version_is_refused(tmp_path):
    Store(tmp_path / "state", {"seed": 1, "torch": "2.0", "lr": 0.1}).write({"run": {}})
    with pytest.raises(InputError, match=r"seed \(there 1, now 2\); torch \(there 2.0, now 2.1\)") as error:
        Store(tmp_path / "state", {"seed": 2, "torch": "2.1", "lr": 0.1}).read()
    assert "lr" not in str(error.value)
    manifest = tmp_path / "state" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {state.FORMAT}', '"format": 99'))
    with pytest.raises(InputError, match="format 99"):
        Store(tmp_path / "state", {"seed": 1, "torch": "2.0", "lr": 0.1}).read()


@pytest.mark.parametrize("part, value", [("run", {}), ("run", 7), ("done", 3), ("known", [1]), ("trainer", {"name": "finetune"})])
def test_a_whole_state_that_holds_something_else_is_refused(tmp_path, capfd, monkeypatch, command, part, value):
    """Intact by its checksums, and yet not what this program writes."""
    arguments = [*command, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(hirelc.HiReLC, "search_blocks", lambda run, *args: os.kill(os.getpid(), signal.SIGTERM))
        assert hirelc.main(arguments) == 143
    folder = tmp_path / "out" / RUN / "state"
    settings = json.loads((folder / "manifest.json").read_text())["identity"]
    store = Store(folder, settings)
    store.read()
    store.write({part: value})
    capfd.readouterr()
    assert hirelc.main([*arguments, "--resume"]) == 2
    assert [line for line in capfd.readouterr().err.splitlines() if "--restart" in line] != []


@pytest.mark.parametrize("what, steps", [("batchnorm", 4), ("fisher", 24), ("hessian", 2 * PROBES)])
def test_long_estimates_go_on_where_they_were_broken_off(tmp_path, what, steps):
    pictures, seeded = Pictures(24), torch.Generator().manual_seed

    def estimate(model, progress):
        if what == "batchnorm":
            estimate_batchnorm(model, pictures, 6, 24, seeded(3), progress)
            return {k: v.tolist() for k, v in model.state_dict().items()}
        return sensitivity(what, model, [Block("all", {}, ("0.weight", "1.bias")), Block("last", {}, ("3.weight",))],
                           pictures.images, pictures.labels, seeded(3), progress)

    def prepared():
        model = network()
        model(torch.zeros(2, 3, 8, 8))
        return model

    class Counted(Progress):
        taken = 0

        def latest(self, key, compute):
            def counted():
                Counted.taken += 1
                self.asked = self.asked or (signal.SIGTERM if Counted.taken == stop else None)
                return compute()
            return super().latest(key, counted)

    expected, stop = estimate(prepared(), Progress()), steps - 1
    progress = Counted(Store(tmp_path / "state", {}))
    progress.begin()
    with pytest.raises(Stopped):
        estimate(prepared(), progress)
    progress = Counted(Store(tmp_path / "state", {}))
    progress.load()
    progress.begin()
    assert estimate(prepared(), progress) == expected and Counted.taken == steps


# ---------------------------------------------------------------------------------------------------------------
# Numbers that are not finite, memory that does not suffice


class Spoilt:
    """Images of which one in the training split is NaN."""

    def __init__(self, images, at):
        self.images, self.at = images, at

    def __len__(self):
        return len(self.images)

    def __getattr__(self, name):
        return getattr(self.images, name)

    def batch(self, index, device="cpu", generator=None):
        x, y = self.images.batch(index, device)
        x[torch.as_tensor(index) == self.at] = float("nan")
        return x, y

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in (order[:limit] if limit else order).split(batch_size):
            yield self.batch(index, device, generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))


def trainer_on(images, model, **more):
    return Trainer(model, images, Pictures(21), epochs=2, lr=0.01, weight_decay=0.0, patience=0, batch_size=16,
                   eval_images=21, eval_batch_size=8, generator=torch.Generator().manual_seed(1), **more)


def test_a_step_with_nan_is_not_taken_and_counted():
    notes, model = [], network()
    model(torch.zeros(2, 3, 8, 8))
    trainer = trainer_on(Spoilt(Pictures(70), 11), model)
    trainer.progress = Progress(note=notes.append)
    trainer.run()
    assert trainer.skipped == 2 and len(notes) == 2 and "1 of 5 steps were not taken" in notes[0]
    assert all(value.isfinite().all() for value in model.state_dict().values())  # BatchNorm's statistics, too
    assert all(torch.isfinite(torch.tensor(epoch.loss)) for epoch in trainer.history)


def test_a_training_without_a_finite_step_says_so():
    model = network()
    model(torch.zeros(2, 3, 8, 8))
    with torch.no_grad():
        model[3].weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="epoch 1 has no step with a finite loss and gradient"):
        trainer_on(Pictures(70), model).run()


def test_a_nan_image_is_counted_in_the_result():
    run = small_run(**{"search.cycles": 1})
    run.train_set = Spoilt(run.train_set, 5)
    run.config = hirelc.override(run.config, ["sensitivity=none", "finetune.bn_images=0"])
    result = run.run()
    assert result["skipped_steps"] >= 2 and any("steps were not taken" in note for note in result["notes"])


class Cramped(nn.Module):
    """A network whose memory holds so many images."""

    def __init__(self, most):
        super().__init__()
        self.most, self.layer = most, nn.Linear(192, 3)

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.layer(x.flatten(1))


def test_evaluation_halves_a_batch_that_does_not_fit_and_training_names_the_setting():
    torch.manual_seed(0)
    model, notes = Cramped(3), []
    found = correct(model, Pictures(21), 16, state=Progress(note=notes.append))
    model.most = 100
    assert torch.equal(found, correct(model, Pictures(21), 16))
    assert notes and all("halved" in note and "eval.batch_size" in note for note in notes)
    model.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        correct(model, Pictures(21), 16)
    with pytest.raises(TooLarge, match="lower data.batch_size"):
        trainer_on(Pictures(70), model).run()


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys):
    log = Log()
    log.open("/dev/full")
    log.info("one")
    log.info("two")
    log.close()
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "one" and said.count("nothing more goes into /dev/full") == 1 and "two" in said
