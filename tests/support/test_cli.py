"""The command line: what answers before torch is imported, and which setting wins."""

import subprocess
import sys
from pathlib import Path

import pytest

from config import EXPERIMENTS, InputError
from support import cli

ROOT = Path(__file__).resolve().parents[2]
RUN = f"""
import runpy, sys
try: runpy.run_path({str(ROOT / "hirelc.py")!r}, run_name="__main__")
except SystemExit as end: print("exit", end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize("arguments, code, said", [
    ("--help", 0, "--exp N"), ("--list", 0, "ResNet18, Tiny ImageNet"), ("", 2, "--exp 3 --smoke"),
    ("--exp 3 --set search.cycle=1", 2, "did you mean search.cycles"), ("--model net.py", 2, "file.py:function"),
    ("--model net.py:make", 2, "of a file there")])
def test_what_needs_no_torch_answers_without_it(tmp_path, arguments, code, said):
    done = subprocess.run([sys.executable, "-c", RUN, *arguments.split()], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines()[-1] == f"exit {code} False" and said in done.stdout + done.stderr
    assert done.stderr.count("\n") == (code == 2)


@pytest.mark.parametrize("name", ["config", "data", "models"])
def test_another_module_of_a_name_of_ours_is_one_line(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    code = f"import sys; sys.path.append({str(ROOT)!r})\ntry: import hirelc\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(f"'import {name}' finds {tmp_path / name}.py, not {ROOT / name}.py: rename")
    assert done.stdout.count("\n") == 1 and not done.stderr and done.returncode == 0


def test_list_shows_every_experiment_with_the_papers_numbers():
    lines = cli.list_experiments().splitlines()
    assert "ResNet18, Tiny ImageNet" in lines[4] and lines[4].endswith("5.99")
    assert [int(line.split()[0]) for line in lines[1:10]] == list(EXPERIMENTS) and "seven" in lines[10]
    assert any("deit_small_patch16_224-cd65a155.pth" in line and "SHA-256 cd65a155" in line for line in lines)


def test_set_wins_over_flags_and_flags_over_smoke():
    config = cli.resolve(5, {"smoke": True, "seed": 7, "model.weights": "w.pth"}, ["seed=8", "search.cycles=3"])
    assert (config.seed, config.search.cycles, config.model.weights) == (8, 3, "w.pth")
    assert config.model.name == "mobilenetv2_100" and config.surrogate.warmup == 4 and config.out == "runs-smoke"
    assert cli.resolve(5, {}).out == "runs" and cli.resolve(5, {}).surrogate.warmup == 100
    own = cli.resolve_own(f"{__file__}:make", {"preset": "plus"}, ["search=null"])
    assert (own.name, own.model.weights, own.baseline.epochs, own.search.method) == ("make", "given", 0, "null")
    assert cli.resolve_own(f"{__file__}:make", {"smoke": True}).baseline.epochs == 0


def test_several_processes_have_a_run(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for word in ("--dry-run", "--load=x.pt", "--list"):
        with pytest.raises(InputError, match="leave out torchrun"):
            cli.arguments(["--exp", "4", word])
