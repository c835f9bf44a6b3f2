"""Several processes on one run."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hirelc
from config import InputError
from support.ranks import Elsewhere, Ranks
from test_hirelc import QUICK

ROOT = Path(__file__).resolve().parents[2]


def test_alone_everything_is_mine():
    alone, x = Ranks(), torch.arange(5)
    assert alone.gather(3) == [3] and alone.same(3) == 3 and alone.first
    assert torch.equal(alone.part(x), x) and torch.equal(alone.total(x.clone()), x)
    assert alone.owners([3.0, 1.0]) == [0, 0]


def test_parts_hold_every_image_once():
    parts = [Ranks(rank, 3).part(torch.arange(10)) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_owners_balance_the_costs():
    costs = [7.0, 1.0, 1.0, 5.0, 3.0, 1.0]
    owners = Ranks(0, 2).owners(costs)
    loads = [sum(c for c, owner in zip(costs, owners) if owner == rank) for rank in range(2)]
    assert loads == [9.0, 9.0]
    assert owners == Ranks(1, 2).owners(costs)  # every rank comes to the same


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
    def run(locals, body):
        """What body(ranks) raised or returned, per rank; ``locals``: their numbers on their machines."""
        shared, barrier = [None] * len(locals), threading.Barrier(len(locals))
        all_ranks = [Threads(n, len(locals), local, shared, barrier) for n, local in enumerate(locals)]

        def outcome(ranks):
            try:
                return body(ranks)
            except (InputError, OSError, Elsewhere) as error:
                return error
        with ThreadPoolExecutor(len(locals)) as pool:
            return list(pool.map(outcome, all_ranks))


def test_one_process_of_each_machine_goes_before_the_others():
    entered = []

    def body(ranks):
        with ranks.in_turn():
            time.sleep(0.05 if ranks.first or ranks.local == 0 else 0.0)
            entered.append(ranks.rank)
        return ranks.rank
    assert Threads.run([0, 1, 2, 0, 1], body) == [0, 1, 2, 3, 4]
    assert entered[:2] == [0, 3] and sorted(entered[2:]) == [1, 2, 4]


@pytest.mark.parametrize("turns", ["alike", "in_turn"])
@pytest.mark.parametrize("bad", [(0,), (1,), (3,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("kind", [InputError, FileNotFoundError])
def test_what_one_process_cannot_do_ends_all_and_one_says_why(turns, bad, kind):
    entered = []

    def body(ranks):
        with getattr(ranks, turns)():
            entered.append(ranks.rank)
            if ranks.rank in bad:
                raise kind(f"process {ranks.rank}")
        return "went on"
    outcomes = Threads.run([0, 1, 0, 1], body)
    if turns == "in_turn":
        first = [0] if 0 in bad else [0, 2] if 2 in bad else [0, 1, 2, 3]
        assert sorted(entered) == first
    speaker = min(bad)
    assert type(outcomes[speaker]) is kind and str(outcomes[speaker]) == f"process {speaker}"
    assert all(type(outcome) is Elsewhere for n, outcome in enumerate(outcomes) if n != speaker)


def test_an_error_that_is_no_users_leaves_at_once():
    with pytest.raises(ZeroDivisionError), Ranks().alike():
        1 / 0


def command(processes, *arguments, start=("--standalone",)):
    return [sys.executable, "-m", "torch.distributed.run", *start, f"--nproc_per_node={processes}",
            str(ROOT / "hirelc.py"), *arguments]


def launch(processes, *arguments):
    return subprocess.run(command(processes, *arguments), capture_output=True, text=True, timeout=500,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def launch_on_two_machines(folder, *arguments):
    """Two groups of one process each, as on machines with disks of their own: the working directories differ."""
    port, started = free_port(), []
    for node in (0, 1):
        where = folder / f"machine{node}"
        where.mkdir(exist_ok=True)
        start = ("--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")
        with open(where / "said", "w") as said:
            started.append(subprocess.Popen(command(1, *arguments, start=start), cwd=where, stdout=said, stderr=said,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"}))
    return started


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def theta0(tmp_path_factory):
    """A short baseline of the smoke experiment 4."""
    out = tmp_path_factory.mktemp("base")
    assert hirelc.main(["--exp", "4", "--smoke", "--device", "cpu", "--out", str(out), "--set", *QUICK]) == 0
    return out / "exp4-seed42" / "baseline.pt"


def test_two_processes_choose_the_policy_of_one(theta0, tmp_path):
    settings = [item for item in QUICK if not item.startswith(("scratch", "lla"))]
    arguments = ["--exp", "4", "--smoke", "--device", "cpu", "--weights", str(theta0), "--set", *settings,
                 "baseline.epochs=0", "search.cycles=1", "surrogate.warmup=0", "lla.timesteps=24"]
    assert hirelc.main([*arguments, f"out={tmp_path / 'one'}"]) == 0
    two = launch(2, *arguments, f"out={tmp_path / 'two'}")
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout.count("best cycle") == 1  # rank 0 alone speaks
    paths = [tmp_path / name / "exp4-seed42" for name in ("one", "two")]
    policies, results, configs = ([json.loads((path / f"{name}.json").read_text()) for path in paths]
                                  for name in ("policy", "result", "config"))
    assert policies[0] == policies[1]
    assert [config["processes"] for config in configs] == [1, 2]
    same = ("baseline_acc", "sensitivity", "cr", "packed_bytes", "mean_kl", "baseline_acc_full")
    assert {key: results[0][key] for key in same} == {key: results[1][key] for key in same}
    before = [result["cycles"][1]["acc_before_finetune"] for result in results]
    assert before[0] == before[1]  # fine-tuning itself may differ in the last bits
    assert sorted(p.name for p in paths[0].iterdir()) == sorted(p.name for p in paths[1].iterdir())

    killed = tmp_path / "machine0" / "killed" / "exp4-seed42"
    state = killed / "state" / "manifest.json"
    machines = launch_on_two_machines(tmp_path, *arguments, "out=killed")
    while all(machine.poll() is None for machine in machines) and not (
            state.exists() and json.loads(state.read_text())["number"] >= 6):
        time.sleep(0.01)
    os.kill(int((killed / "lock").read_text().split()[1]), signal.SIGKILL)  # rank 0; the other one then ends as well
    assert all(machine.wait(timeout=200) != 0 for machine in machines)
    assert not (killed / "result.json").exists()
    said = [tmp_path / f"machine{n}" / "said" for n in (0, 1)]
    assert "another process of this run has ended" in said[1].read_text() and "[rank" not in said[1].read_text()
    again = launch_on_two_machines(tmp_path, *arguments, "out=killed", "--resume")
    assert [machine.wait(timeout=500) for machine in again] == [0, 0], said[0].read_text()[-2000:]
    assert "resumed after cycle 1" in said[0].read_text()
    assert [path.name for path in (tmp_path / "machine1").iterdir()] == ["said"] and not said[1].read_text()
    assert json.loads((killed / "policy.json").read_text()) == policies[1]
    timeless = [{k: v for k, v in json.loads((path / "result.json").read_text()).items()
                 if k not in ("timings", "time_shares")} for path in (killed, paths[1])]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("arguments, says", [
    (["--set", "data.name=cifar10", "data.dir=nowhere"], "cifar10 is not in nowhere"),
    (["--set", "search.cycles=0"], "search.cycles=0"),
])
def test_bad_input_is_one_line_of_one_process(tmp_path, arguments, says):
    done = launch(2, "--exp", "4", "--smoke", "--device", "cpu", "--out", str(tmp_path / "out"), *arguments)
    lines = done.stderr[:done.stderr.index("torch/distributed/elastic")].splitlines()  # then torchrun reports
    ours = [line for line in lines if line.startswith("hirelc: ")]
    assert done.returncode != 0 and len(ours) == 1 and says in ours[0] and "exitcode  : 2" in done.stderr, done.stderr
    assert "[rank" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--load", "packed.pt"], ["--dry-run"], ["--list"]])
def test_what_one_process_does_is_not_for_several(monkeypatch, capsys, option):
    monkeypatch.setattr(hirelc, "several", lambda: True)
    assert hirelc.main(["--exp", "4", "--smoke", *option]) == 2
    assert "leave out torchrun" in capsys.readouterr().err


def test_processes_that_share_a_batch_take_the_steps_of_one(tmp_path):
    """Gradients over two halves of each batch are those of the whole; no BatchNorm, so nothing else differs."""
    script = tmp_path / "steps.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch
from torch import nn
from support import ranks as parallel
from test_qat import Pictures
from train import Trainer, correct
ranks = parallel.start("cpu")
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
trainer = Trainer(model, Pictures(70), Pictures(21), epochs=3, lr=0.01, weight_decay=0.0, patience=0, batch_size=16,
                  eval_images=21, eval_batch_size=4, generator=torch.Generator().manual_seed(1), ranks=ranks)
trainer.run()
hits = correct(model, Pictures(21), 4, 0, ranks=ranks)
if ranks.first:
    torch.save({{"state": model.state_dict(), "losses": [e.loss for e in trainer.history], "hits": hits}}, sys.argv[1])
parallel.leave(0)
""")
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               f"--nproc_per_node={processes}", str(script), str(out)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert torch.equal(one["hits"], two["hits"]) and len(one["hits"]) == 21
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-4, atol=1e-5)
    for key, value in one["state"].items():
        torch.testing.assert_close(value, two["state"][key], rtol=1e-3, atol=1e-4)
