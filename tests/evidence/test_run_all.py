"""run_all.sh with seeds, the ablations, several jobs and signals, on a stand-in for Python."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")


@pytest.fixture
def stub(tmp_path):
    """A stand-in that writes down its arguments and fails for experiment 3."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\n[ "$1" != -c ] || exit 0\necho "$*" >> "$0.calls"\n'
                    'case "$*" in *"--exp 3 "*) exit 2;; esac\necho last\n')
    path.chmod(0o755)
    return path


def run(stub, *args):
    """The finished run_all.sh and the calls of Python, without the repository's path."""
    done = subprocess.run(["bash", str(ROOT / "run_all.sh"), *args], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(stub)}, stdin=subprocess.DEVNULL)
    calls = Path(f"{stub}.calls").read_text().replace(f"{ROOT}/", "").splitlines()
    Path(f"{stub}.calls").unlink()
    return done, calls


@pytest.mark.parametrize("seeds", [["--seeds", "1", "2"], ["--seeds=1,2"], ["--seeds", "1,", "2"]])
def test_seeds_in_any_way_the_ablations_and_the_report(stub, tmp_path, seeds):
    done, calls = run(stub, *seeds, "--paper", "--out", str(tmp_path), "--smoke", "--jobs", "1", "--set", "seed=7")
    flags = f"--out {tmp_path} --no-table --resume --smoke --set seed=7"
    assert calls == [*(f"hirelc.py --exp {exp} --seed {seed} {flags}" for seed in "12" for exp in range(1, 8)),
        f"-P -m evidence.variants --exp 4 --seeds 1 2 {flags}",
        f"-P -m evidence.variants --exp 1 --seeds 1 --only no-hla a2c no-sens {flags}",
        f"-P -m evidence.report {tmp_path}"]
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"run_all: failed: exp 3 seed {seed} (exit 2)" for seed in "12"]


@pytest.mark.parametrize("flags", [["--seeds"], ["--jobs"], ["--jobs", "0"], ["--jobs=many"]])
def test_flags_that_cannot_be_used_are_one_line_before_anything_runs(stub, flags):
    Path(f"{stub}.calls").touch()
    done, calls = run(stub, *flags)
    assert done.returncode == 2 and not calls and done.stderr.count("\n") == 1


def test_several_jobs_run_the_same(stub, tmp_path):
    flags = ["--seeds", "1", "2", "--paper", "--smoke", "--out", str(tmp_path)]
    (one, calls), (several, others) = (run(stub, *flags, "--jobs", jobs) for jobs in "13")
    assert sorted(others) == sorted(calls) and others[-1] == calls[-1] and several.returncode == one.returncode == 1
    assert sorted(several.stderr.splitlines()) == sorted(one.stderr.splitlines())
    assert sorted(several.stdout.splitlines()[:16]) == sorted(
        ["ablations and baselines of experiment 4: last", "the paper's ablations of experiment 1: last",
         *(f"exp {e} seed {s}: {'' if e == 3 else 'last'}" for s in "12" for e in range(1, 8))])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_runs(stub, tmp_path, number, code):
    stub.write_text('#!/bin/bash\n[ "$1" != -c ] || exit 0\ntrap \'echo $1 >> "$0.ended"; exit 143\' TERM\n'
                    'echo begun >> "$0.calls"\nwhile :; do sleep 0.05; done\n')
    process = subprocess.Popen(["bash", str(ROOT / "run_all.sh"), "--jobs", "2", "--out", str(tmp_path)],
                               env={**os.environ, "PYTHON": str(stub)}, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    begun, deadline = Path(f"{stub}.calls"), time.monotonic() + 30
    while (not begun.exists() or begun.read_text().count("begun") < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "run_all: stopped\n" and process.returncode == code
    assert Path(f"{stub}.ended").read_text().count("hirelc.py") == 2
