"""benchmarks/grid.py: what it keeps of a cell, and its tables from cells made by hand; benchmarks/gpu.py: its steps."""

import json
import sys

import numpy as np
import pytest
import torch

import hirelc
from config import flatten
from test_hirelc import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import grid  # noqa: E402


def test_digits_and_back():
    for count in (1, 8, 10, 1000):
        hit = torch.rand(count) < 0.6
        assert np.array_equal(grid.read_digits(grid.digits(hit), count), hit.numpy())
    assert grid.digits(torch.tensor([True, False, False, False, False, False, False, True, True])) == "8180"


def test_every_cell_is_a_command_that_is_understood():
    """The same size and evaluations for all that are compared at one, but for the two that show what more would bring."""
    found = {}
    for method, settings in grid.METHODS.items():
        for network, (exp, _, rate) in grid.NETWORKS.items():
            config = hirelc.resolve(exp, {"seed": 45}, f"{grid.CELL} {rate} {settings} model.weights=w.pt".split())
            found[network, method] = flatten(config)
    assert len({json.dumps(settings, sort_keys=True) for settings in found.values()}) == len(found)
    for (network, method), settings in found.items():
        if grid.MATCHED in grid.METHODS[method]:
            steps = 256 if method in ("steps-1", "plus-steps-1") else 32
            assert (settings["search.target"], settings["lla.timesteps"], settings["finetune.mode"]) == (0.1, steps, "qat")


def cell(method, seed, deployed, final=None, **more):
    digits = {name: grid.digits(torch.tensor(hits, dtype=torch.bool)) for name, hits in
              (("deployed", deployed), ("final", final or deployed), ("baseline", [1] * 8))}
    row = {"cycle": 1, "acc_before_finetune": 25.0, "average_bits": seed / 8, "average_keep": 0.75}
    return {"network": "resnet18", "method": method, "seed": seed, "evaluations": 480, "cr": 10.0 + seed % 2,
            "packed_bytes": 1000, "compliance": 50.0, "best_cycle": 1, "cycles": [row], "test_images": 8,
            "eval_images": 2, **{f"{name}_hits": text for name, text in digits.items()},
            "searches": [{"level": "LLA", "entropy": [1.0, 0.5], "consensus_reward": 2.0, "random_reward": 3.0}],
            "mean_kl": {"LLA PPO": 1e-4}, **more}


def test_tables_by_hand(tmp_path):
    cells = [cell("random", 44, [1, 1, 0, 0, 0, 0, 0, 0]), cell("random", 45, [1, 1, 1, 1, 0, 0, 0, 0]),
             cell("plus", 44, [1, 1, 1, 1, 0, 0, 0, 0]), cell("plus", 45, [1, 1, 1, 1, 1, 1, 0, 0])]
    for made in cells:
        (tmp_path / f"grid-resnet18-{made['method']}-seed{made['seed']}.json").write_text(json.dumps(made))
    text = grid.tables(tmp_path)
    assert "baseline of resnet18: 100.00 % of 8" in text and "mobilenetv2" not in text
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.split("\n\n")[1].splitlines()}
    assert rows["random"].split(" | ")[1:10] == ["44 45", "480", "10.50 ± 0.71", "5.56, 0.75", "1,000", "50.00 ± 0.00",
                                                 "25.00 ± 0.00", "37.50 ± 17.68", "37.50 ± 17.68"]
    # By image the differences are 0 0 1/2 1/2 1/2 1/2 0 0, of variance 1/14; the seeds' are equal.
    half = 100 * 1.959963984540054 * (1 / 14 / 8) ** 0.5
    assert rows["random"].endswith(f"| -25.00 [{-25 - half:+.2f}, {-25 + half:+.2f}]; -25.00, -25.00 |")
    flattery = next(part for part in text.split("\n\n") if "on the others" in part)
    # On the two images that chose nothing is lost, on the six others 2/6 and 4/6 are right.
    assert "| plus | 44 45 | +0.00 [+0.00, +0.00] | +50.00 [" in flattery
    moved = next(part for part in text.split("\n\n") if "entropy" in part)
    assert "| plus | 44 45 | 1.0000 → 0.5000 | 1.0e-04, nan; nan, nan | 2.00 ± 0.00 | 3.00 ± 0.00 |" in moved


def test_seeds_that_only_one_has_are_left_out():
    cells = {("resnet18", made["method"], made["seed"]): made for made in (
        cell("random", 45, [1, 0, 0, 0, 0, 0, 0, 0]), cell("plus", 45, [1, 1, 0, 0, 0, 0, 0, 0]),
        cell("plus", 46, [1, 1, 1, 1, 1, 1, 1, 1]))}
    assert grid.table(cells, "resnet18", ["plus"], "random").endswith("; +12.50 |")
    assert grid.table(cells, "resnet18", ["plus"], "uniform").endswith("|  |")


@pytest.mark.parametrize("code", [0, 3])
def test_a_cell_that_is_stopped_is_left_for_the_next_time(tmp_path, monkeypatch, capsys, code):
    calls = []
    monkeypatch.setattr(grid, "call", lambda arguments: calls.append(arguments) or code)
    monkeypatch.setattr(grid, "keep", lambda args, network, method, seed, *_: (
        tmp_path / f"grid-{network}-{method}-seed{seed}.json").write_text("{}"))
    (tmp_path / "exp4-base-seed42").mkdir()
    (tmp_path / "exp4-base-seed42" / "baseline.pt").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["grid.py", "--out", str(tmp_path), "--results", str(tmp_path), "--networks",
                                      "resnet18", "--methods", "plus", "random", "--seeds", "45"])
    assert grid.main() == code and len(calls) == (2 if code == 0 else 1)
    if code == 0:  # what is there is not done again
        assert grid.main() == 0 and len(calls) == 2
    else:
        assert "plus seed 45 ended with 3" in capsys.readouterr().err


def test_every_cell_that_is_kept_was_run_with_its_methods_settings():
    kept = grid.read(ROOT / "results")
    assert kept and all(cell["settings"] == grid.METHODS[method] for (_, method, _), cell in kept.items())


@pytest.mark.parametrize("flags", [[], ["--tiny"], ["--tiny", "--set", "search.cycles=1"]])
def test_what_the_gpu_script_asks_for_can_be_run(tmp_path, monkeypatch, flags):
    """Every step of every experiment; three of the four need the result of the first."""
    asked = []

    def run(arguments, deadline):
        args, (config,) = hirelc._arguments(arguments)
        asked.append((config.exp, config.name, config.search.target))
        (tmp_path / f"exp{config.exp}-{config.name}-seed42").mkdir()
        (tmp_path / f"exp{config.exp}-{config.name}-seed42" / "result.json").write_text('{"retained": 0.125}')
        return 0
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "keep", lambda *kept: None)
    monkeypatch.setattr(gpu, "row", lambda kept: "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path), *flags])
    monkeypatch.chdir(tmp_path)
    assert gpu.main() == 0
    assert [(exp, name) for exp, name, _ in asked] == [
        (exp, name) for exp in gpu.ORDER for name in ("paper", "qat", "null", "plus")]
    assert {target for _, name, target in asked if name in ("null", "plus")} == {0.125}
