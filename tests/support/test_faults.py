"""Faults that are really brought about: folders that cannot be written, a full disk, training that diverges."""

import subprocess

import pytest

import hirelc
from support import runs

QUICK = ["--set", "scratch.epochs=1", "lla.timesteps=4", "hla.timesteps=4", "hla.burst=4", "data.train_images=64",
         "data.test_images=40", "sensitivity.images=2", "finetune.epochs=1", "search.cycles=1", "model.width=0.05"]


def run(out, *more, code):
    """Run a small experiment; assert its exit code."""
    assert hirelc.main(["--exp", "4", "--smoke", "--no-table", "--out", str(out), *more]) == code


def one_line(capsys):
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 32 MB; skips the test where the system refuses."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_state(tmp_path, disk, capsys):
    run(tmp_path / "whole", *QUICK, code=0)
    (disk / "filler").write_bytes(b"\0" * 32_800_000)
    run(disk / "out", *QUICK, code=1)
    said = one_line(capsys)
    state = disk / "out" / "exp4-seed42" / "state"
    assert "No space left on device" in said and "--resume" in said and not list(state.parent.rglob(".*.tmp"))
    assert (state / "scratch-training.pt").exists() and not (state.parent / "result.json").exists()
    (disk / "filler").unlink()
    run(disk / "out", "--resume", *QUICK, code=0)
    for name in ("policy.json", "packed.pt", "cycles.csv"):
        assert (state.parent / name).read_bytes() == (tmp_path / "whole" / "exp4-seed42" / name).read_bytes()


def test_folders_that_cannot_be_written_are_refused_before_anything_is_done(tmp_path, disk, capsys):
    (tmp_path / "file").write_text("in the way")
    run(tmp_path / "file" / "runs", *QUICK, code=2)
    assert "cannot be the folder of a run" in one_line(capsys) and (tmp_path / "file").read_text() == "in the way"
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run(disk / "out", *QUICK, code=2)
    assert "Read-only file system" in one_line(capsys)


def test_an_output_folder_that_goes_away(tmp_path, capsys, monkeypatch):
    write, out = runs.write, tmp_path / "out"
    monkeypatch.setattr(runs, "write", lambda *file: (out.rename(tmp_path / "aside"), write(*file)))
    run(tmp_path / "out", *QUICK, code=1)
    said = one_line(capsys)
    assert "cannot write to" in said and "No such file" in said and "--resume" in said


@pytest.mark.parametrize("setting", ["scratch.lr", "baseline.lr", "finetune.lr"])
def test_training_that_diverges_ends_with_the_name_of_the_setting(tmp_path, capsys, setting):
    run(tmp_path, *QUICK, f"{setting}=1e30", "search=null", code=1)
    said = one_line(capsys)
    assert "epoch 1 is not finite" in said and f"lower {setting} (1e+30)" in said
