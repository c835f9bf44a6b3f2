"""Several processes on one run."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hirelc
import models
from config import InputError
from support.ranks import Elsewhere, Ranks

ROOT = Path(__file__).resolve().parents[2]


def test_images_and_blocks_are_divided_and_alone_everything_is_mine():
    alone, x = Ranks(), torch.arange(5)
    assert alone.gather(3) == [3] and alone.same(3) == 3 and alone.first
    assert torch.equal(alone.part(x), x) and alone.total(x) is x and alone.waves(3) == [[0], [1], [2]]
    assert [Ranks(n, 3).part(torch.arange(8)).tolist() for n in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert Ranks(1, 2).waves(5) == [[0, 1], [2, 3], [4]]


@dataclass(frozen=True)
class Threads(Ranks):
    """Ranks that are threads of this process."""
    shared: list = None
    barrier: threading.Barrier = None

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(timeout=20)
        values = list(self.shared)
        self.barrier.wait(timeout=20)
        return values

    @staticmethod
    def run(size, body):
        """What body(ranks) raised or returned, per rank."""
        shared, barrier = [None] * size, threading.Barrier(size)

        def outcome(rank):
            try:
                return body(Threads(rank, size, shared, barrier))
            except (InputError, OSError, Elsewhere) as error:
                return error
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(outcome, range(size)))


@pytest.mark.parametrize("turns", ["alike", "in_turn"])
@pytest.mark.parametrize("bad", [(), (0,), (1,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("kind", [InputError, FileNotFoundError])
def test_what_one_process_cannot_do_ends_all_and_one_says_why(turns, bad, kind):
    entered = []

    def body(ranks):
        with getattr(ranks, turns)():
            entered.append(ranks.rank)
            if ranks.rank in bad:
                raise kind(ranks.rank)
        return "went on"

    outcomes = Threads.run(3, body)
    if turns == "in_turn":
        assert entered[0] == 0 and len(entered) == (1 if 0 in bad else 3)
    assert [outcome.args for outcome in outcomes if type(outcome) is kind] == [(n,) for n in bad[:1]]
    assert [type(outcome) for outcome in outcomes].count(Elsewhere if bad else str) == (2 if bad else 3)


def launch(*arguments):
    """Run a script in two processes of one thread."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


KILLED = """
import os, signal, sys, time
import hirelc
from support import ranks, runs
once = runs.Phases.once
def once_or_killed(self, name, *arguments, **parts):
    if self.ranks.rank == 1 and name.startswith("search: cycle 1, block 2"):
        while not (self.folder / "search-cycle-1-block-0-1.pt").exists(): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return once(self, name, *arguments, **parts)
runs.Phases.once = once_or_killed
ranks.leave(hirelc.main(sys.argv[1:]))
"""


def test_two_processes_of_which_one_is_killed_end_after_resume_as_one_process_does(tmp_path):
    torch.save(models.build("resnet18", 10, 32, 0.125).state_dict(), tmp_path / "theta0.pt")
    arguments = ["--exp", "4", "--smoke", "--device", "cpu", "--weights", str(tmp_path / "theta0.pt"), "--set",
                 "data.train_images=96", "data.test_images=48", "baseline.epochs=0", "surrogate.warmup=0",
                 "search.cycles=1", "lla.timesteps=4", "hla.timesteps=4", "sensitivity.images=2", "finetune.epochs=1"]
    assert hirelc.main([*arguments, f"out={tmp_path / 'one'}"]) == 0
    (tmp_path / "killed.py").write_text(KILLED)
    killed = launch(tmp_path / "killed.py", *arguments, f"out={tmp_path / 'two'}")
    ours = [line for line in killed.stderr.splitlines() if line.startswith("hirelc: ")]
    assert killed.returncode and len(ours) == 1 and "--resume" in ours[0] and "[rank" not in killed.stderr
    one, two = (tmp_path / name / "exp4-seed42" for name in ("one", "two"))
    assert not (two / "result.json").exists() and (two / "state" / "search-cycle-1-block-0-1.pt").exists()

    again = launch(ROOT / "hirelc.py", *arguments, f"out={tmp_path / 'two'}", "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("best cycle") == 1  # rank 0 alone speaks
    assert (one / "policy.json").read_text() == (two / "policy.json").read_text()
    results = [json.loads((path / "result.json").read_text()) for path in (one, two)]
    same = ("baseline_acc", "sensitivity", "cr", "packed_bytes", "mean_kl", "baseline_acc_full")
    assert [results[0][key] for key in same] == [results[1][key] for key in same]
    assert len({result["cycles"][1]["acc_before_finetune"] for result in results}) == 1  # after it, bits may differ
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())


STEPS = """
import torch
from torch import nn
import data, hirelc
from support import ranks
from train import Recipe, Trainer, correct
def trained(ranks):
    torch.manual_seed(0)
    train, test = data.synthetic(3, 70, 21, 8, 0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))  # no BatchNorm
    trainer = Trainer(model, train, test, Recipe("finetune", 3, 0.01, 0.0), batch_size=16, eval_images=21,
                      eval_batch_size=4, generator=torch.Generator().manual_seed(1), ranks=ranks)
    trainer.run()
    return dict(model.state_dict()), [epoch.loss for epoch in trainer.history], correct(model, test, 4, ranks=ranks)
torch.testing.assert_close(trained(ranks.start("cpu")), trained(ranks.Ranks()), rtol=1e-3, atol=1e-4)
for bad in (["data.name=cifar10", "data.dir=nowhere"], ["search.cycles=0"]):
    assert hirelc.main(["--exp", "4", "--smoke", "--device", "cpu", "--set", "out=out", *bad]) == 2
ranks.leave(0)
"""


def test_processes_that_share_a_batch_take_the_steps_of_one_and_say_once_what_is_bad(tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    done = launch(tmp_path / "steps.py")
    assert done.returncode == 0, done.stderr[-2000:]
    data, cycles = [line for line in done.stderr.splitlines() if line.startswith("hirelc: ")]
    assert "cifar10" in data and "nowhere" in data and "search.cycles=0" in cycles
