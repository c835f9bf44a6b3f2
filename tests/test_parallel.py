"""Several processes on one run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hirelc
from parallel import Ranks
from test_hirelc import QUICK

ROOT = Path(__file__).resolve().parent.parent


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


def command(processes, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            str(ROOT / "hirelc.py"), *arguments]


def launch(processes, *arguments):
    return subprocess.run(command(processes, *arguments), capture_output=True, text=True, timeout=500,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def launch_in_background(processes, *arguments):
    return subprocess.Popen(command(processes, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


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

    killed, state = tmp_path / "killed" / "exp4-seed42", tmp_path / "killed" / "exp4-seed42" / "state" / "manifest.json"
    process = launch_in_background(2, *arguments, f"out={tmp_path / 'killed'}")
    while process.poll() is None and not (state.exists() and json.loads(state.read_text())["number"] >= 6):
        time.sleep(0.01)
    os.kill(int((killed / "lock").read_text().split()[1]), signal.SIGKILL)  # rank 0; torchrun then ends the other one
    assert process.wait() != 0
    assert not (killed / "result.json").exists()
    again = launch(2, *arguments, f"out={tmp_path / 'killed'}", "--resume")
    assert again.returncode == 0 and "resumed after cycle 1" in again.stdout, again.stderr[-2000:]
    assert json.loads((killed / "policy.json").read_text()) == policies[1]
    timeless = [{k: v for k, v in json.loads((path / "result.json").read_text()).items()
                 if k not in ("timings", "time_shares")} for path in (killed, paths[1])]
    assert timeless[0] == timeless[1]


def test_processes_that_share_a_batch_take_the_steps_of_one(tmp_path):
    """Gradients over two halves of each batch are those of the whole; no BatchNorm, so nothing else differs."""
    script = tmp_path / "steps.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch
from torch import nn
import parallel
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
