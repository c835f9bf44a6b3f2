"""--dry-run: what a run would do and need is said, what it would refuse is refused, and nothing is written."""

import re
from types import SimpleNamespace

import pytest
import torch

import hirelc
from evidence import plan
from train import Trainer

QUICK = ["scratch.epochs=1", "lla.timesteps=4", "hla.timesteps=4", "data.train_images=64", "data.test_images=40",
         "sensitivity.images=2", "finetune.epochs=1", "model.width=0.05"]


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def dry_run(tmp_path, capsys, *more, code=0, which=("--exp", "4", "--smoke")):
    """Standard output, or with another code the line on standard error; nothing below tmp_path may have changed."""
    before = files(tmp_path)
    assert hirelc.main([*which, "--dry-run", "--out", str(tmp_path / "runs"), "--set", *QUICK, *more]) == code
    assert files(tmp_path) == before
    out, error = capsys.readouterr()
    assert (error.count("\n") == 1 and error.startswith("hirelc: ") and not out) if code else not error
    return error if code else out


def counts(text):
    table = [line.split() for line in text.partition("s each")[2].splitlines()[1:-1]]
    return {phase: int(count.replace(",", "")) for phase, *_, count, _, _ in table}


@pytest.mark.parametrize("more, expected", [
    ([], {"scratch": 1, "baseline": 1, "warmup": 4, "finetune": 2, "sensitivity": 2, "search": 24, "report": 5}),
    (["search=null", "surrogate=off", "eval.full=off"], {"scratch": 1, "baseline": 1, "finetune": 2, "sensitivity": 2}),
    (["search=random", "eval.protocol=holdout", "data.batch_size=31"],  # 61 images to train on, 24 as the agents try
     {"scratch": 1, "baseline": 1, "finetune": 2, "sensitivity": 2, "search": 24, "report": 5}),
    (["search=greedy", "surrogate=off", "eval.full=off", "model.weights=auto", "baseline.epochs=0"],
     {"finetune": 2, "sensitivity": 2, "search": 4}),
    (["preset=plus", "sensitivity=none", "model.weights=auto", "search.cycles=1", "baseline.epochs=0"],
     {"finetune": 1, "search": 74, "report": 5})])
def test_the_plan_counts_what_the_settings_ask_for(tmp_path, capsys, monkeypatch, more, expected):
    monkeypatch.chdir(tmp_path)
    grids, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *batch: grids.append(bool(self.on_grid)) or step(self, *batch))
    text = dry_run(tmp_path, capsys, *more)
    assert grids == [False, False] + 2 * ["preset=plus" in more]  # each kind twice: the first sets up
    assert counts(text) == expected and "epochs of 2 steps" in text and "about" in text.splitlines()[-1]
    assert f"run directory: {tmp_path / 'runs' / 'exp4-seed42'} (new)" in text
    assert ("21 kernels in 6 blocks" if "preset=plus" in more else "17 kernels in 5 blocks") in text
    assert "64 training and 40 test images" in text and "device: cpu, 1 threads" in text


def test_what_is_missing_is_named_with_its_size_and_not_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    places = ("--exp", "5", "--data-dir", str(tmp_path / "d"), "--weights-dir", str(tmp_path / "w"))
    size = "data.image_size=32 eval.batch_size=8 data.batch_size=8 data.train_images=0 data.test_images=0 model.width=1"
    text = dry_run(tmp_path, capsys, *size.split(), which=places)
    for said in ("tiny-imagenet-200.zip (about 248 MB)", "mobilenet_v2-b0353104.pth", "data set needs 748.0 MB",
                 "weights needs 14.0 MB", "epochs of 12500 steps"):
        assert said in text
    assert counts(text)["report"] == 5 * 10_000 // 8 and counts(text)["warmup"] == 100
    assert "100000" in dry_run(tmp_path, capsys, "data.train_images=100001", which=places, code=2)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "cifar-10-python.tar.gz").write_bytes(b"archive")
    assert "unpacked" in plan._absent(SimpleNamespace(dir=str(tmp_path / "d"), name="cifar10"))[0]


def test_a_disk_without_room_is_refused_and_one_with_just_enough_is_not(tmp_path, capsys, monkeypatch):
    needed = float(re.search(r"run directory needs ([\d.]+) MB", dry_run(tmp_path, capsys))[1]) * 1e6
    for free, code in ((needed + 1e5, 0), (needed - 1e5, 2)):
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        line = dry_run(tmp_path, capsys, code=code)
    assert "are free" in line and "run directory" in line and "--out" in line
    (tmp_path / "runs").write_text("a file")
    assert "runs" in dry_run(tmp_path, capsys, code=2)


def test_what_a_run_refuses_the_plan_refuses(tmp_path, capsys):
    for more in ("model.weights=none.pth", "goal=size:1KB", "data.batch_size=1", "policy=none.json", "goal=nothing",
                 "data.name=imagenet"):
        assert more.partition("=")[2] in dry_run(tmp_path, capsys, more, code=2)


def test_a_network_of_ones_own_is_planned(tmp_path, capsys):
    (tmp_path / "net.py").write_text("from torch.nn import *\ndef make(): return Sequential(Conv2d(3, 8, 3), "
                                     "Conv2d(8, 8, 3), AdaptiveAvgPool2d(1), Flatten(), Linear(8, 10))")
    text = dry_run(tmp_path, capsys, which=("--model", f"{tmp_path / 'net.py'}:make", "--smoke"))
    assert "2 kernels in 1 blocks" in text and not {"scratch", "baseline"} & counts(text).keys()
