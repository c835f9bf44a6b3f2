"""The grid of methods: its commands, and its tables from cells made by hand; the commands of the script for a GPU."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from config import flatten
from evidence import gpu, grid
from support.cli import arguments

ROOT = Path(__file__).resolve().parents[2]


def test_digits_and_back():
    for count in (1, 8, 10, 1000):
        hit = torch.rand(count) < 0.6
        assert np.array_equal(grid.read_digits(grid.digits(hit), count), hit.numpy())
    assert grid.digits(torch.tensor([True, False, False, False, False, False, False, True, True])) == "8180"


def test_every_cell_is_another_command_of_one_size_and_as_many_evaluations():
    found = {}
    for method, settings in grid.METHODS.items():
        for exp, _, rate in grid.NETWORKS.values():
            command = ["--exp", str(exp), "--set", *f"{grid.CELL} {rate} {settings} model.weights=w.pt".split()]
            values = found[exp, method] = flatten(arguments(command)[1][0])
            if grid.MATCHED in settings:
                steps = 256 if method in ("steps-1", "plus-steps-1") else 32  # the two that show what more would bring
                same = values["search.target"], values["lla.timesteps"], values["finetune.mode"]
                assert same == (0.1, steps, "qat")
    assert len({json.dumps(settings, sort_keys=True) for settings in found.values()}) == len(found)
    kept = grid.read(ROOT / "results")
    assert kept and all(cell["settings"] == grid.METHODS[m] for (_, m, _), cell in kept.items() if m in grid.METHODS)


def cell(method, seed, deployed):
    digits = {f"{name}_hits": grid.digits(torch.tensor(hits, dtype=torch.bool)) for name, hits in
              (("deployed", deployed), ("final", deployed), ("baseline", [1] * 8))}
    row = {"cycle": 1, "acc_before_finetune": 25.0, "average_bits": seed / 8, "average_keep": 0.75}
    return {"network": "resnet18", "method": method, "seed": seed, "evaluations": 480, "cr": 10.0 + seed % 2,
            "packed_bytes": 1000, "compliance": 50.0, "best_cycle": 1, "cycles": [row], "test_images": 8,
            "eval_images": 2, "searches": [{"level": "LLA", "entropy": [1.0, 0.5], "consensus_reward": 2.0,
                                            "random_reward": 3.0}], "mean_kl": {"LLA PPO": 1e-4}, **digits}


def test_tables_by_hand(tmp_path):
    cells = [cell("random", 44, [1, 1, 0, 0, 0, 0, 0, 0]), cell("random", 45, [1, 1, 1, 1, 0, 0, 0, 0]),
             cell("plus", 44, [1, 1, 1, 1, 0, 0, 0, 0]), cell("plus", 45, [1, 1, 1, 1, 1, 1, 0, 0]),
             cell("plus", 46, [1, 1, 1, 1, 1, 1, 1, 1])]  # a seed that only one has is not compared
    for made in cells:
        (tmp_path / f"grid-resnet18-{made['method']}-seed{made['seed']}.json").write_text(json.dumps(made))
    text = grid.tables(tmp_path)
    assert "baseline of resnet18: 100.00 % of 8" in text and "mobilenetv2" not in text
    row = next(line for line in text.splitlines() if line.startswith("| random |"))
    assert row.split(" | ")[1:10] == ["44 45", "480", "10.50 ± 0.71", "5.56, 0.75", "1,000", "50.00 ± 0.00",
                                      "25.00 ± 0.00", "37.50 ± 17.68", "37.50 ± 17.68"]
    # By image the differences are 0 0 1/2 1/2 1/2 1/2 0 0, of variance 1/14; the seeds' are equal.
    half = 100 * 1.959963984540054 * (1 / 14 / 8) ** 0.5
    assert row.endswith(f"| -25.00 [{-25 - half:+.2f}, {-25 + half:+.2f}]; -25.00, -25.00 |")
    # On the two images that chose nothing is lost, on the six others 2/6, 4/6 and 6/6 are right.
    assert "| plus | 44 45 46 | +0.00 [+0.00, +0.00] | +33.33 [" in text
    assert "| plus | 44 45 46 | 1.0000 → 0.5000 | 1.0e-04, nan; nan, nan | 2.00 ± 0.00 | 3.00 ± 0.00 |" in text


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
    if code == 0:  # a finished cell is not done again
        assert grid.main() == 0 and len(calls) == 2
    else:
        assert "plus seed 45 ended with 3" in capsys.readouterr().err


def test_what_the_gpu_script_asks_for_can_be_run(tmp_path):
    assert all("cuda.is_available" in Path(file).read_text() for file in gpu.commands("tests", "", "cuda")[0][3:])
    found = [arguments(command[1:]) for command in gpu.commands("run", str(tmp_path), "cpu")]
    assert [config.name for _, (config,) in found] == ["first", "second", ""] and found[2][0].load
