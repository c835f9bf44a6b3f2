"""The grid of methods: its commands, and its table from cells made by hand"""

import json
import sys
from pathlib import Path

import pytest

from config import flatten
from evidence import grid
from support.cli import arguments

ROOT = Path(__file__).resolve().parents[2]


def test_every_cell_is_another_command_of_one_size_and_as_many_evaluations():
    found = []
    for settings in grid.METHODS.values():
        values = flatten(arguments(["--exp", "4", "--set", *f"{grid.CELL} {settings}".split()])[1][0])
        found.append(json.dumps(values, sort_keys=True))
        if grid.MATCHED in settings:
            assert (values["search.target"], values["lla.timesteps"], values["finetune.mode"]) == (0.1, 32, "qat")
    assert len(set(found)) == len(found)
    kept = [json.loads(path.read_text()) for path in (ROOT / "results").glob("grid-*-seed45.json")]
    assert kept and all(grid.METHODS.get(cell["method"], cell["settings"]) == cell["settings"] for cell in kept)


def test_the_table_by_hand():
    def cell(method, seed, digits):  # of eight images
        return {"network": "resnet18", "method": method, "seed": seed, "cr": 10.0 + seed % 2, "test_images": 8,
                "deployed_hits": digits}
    cells = [cell("random", 44, "c0"), cell("random", 45, "f0"), cell("plus", 44, "f0"), cell("plus", 45, "fc"),
             cell("plus", 46, "ff")]  # a seed that only one has is not compared
    plus, random = grid.table(cells, "resnet18", "plus").splitlines()[2:]
    assert plus == "| plus | 44 45 46 | 10.33 | 75.00 |  |"
    # By image the differences are 0 0 1/2 1/2 1/2 1/2 0 0, of variance 1/14; the seeds' are equal.
    half = 100 * 1.959963984540054 * (1 / 14 / 8) ** 0.5
    assert random == f"| random | 44 45 | 10.50 | 37.50 | -25.00 [{-25 - half:+.2f}, {-25 + half:+.2f}] |"


@pytest.mark.parametrize("code", [0, 3])
def test_a_cell_that_is_stopped_is_repeated_the_next_time(tmp_path, monkeypatch, capsys, code):
    calls = []
    monkeypatch.setattr(grid, "run", lambda args, exp, name, *rest: calls.append(name) or code * (name != "base"))
    monkeypatch.setattr(grid, "keep", lambda *cell: grid.cell_file(*cell).write_text("{}"))
    monkeypatch.setattr(sys, "argv", ["grid.py", "--out", str(tmp_path), "--results", str(tmp_path), "--networks",
                                      "resnet18", "--methods", "plus", "random", "--seeds", "45"])
    assert grid.main() == code and grid.main() == code
    if code == 0:  # a finished cell is not done again
        assert calls == ["base", "plus", "base", "random"]
    else:
        assert calls == ["base", "plus"] * 2 and "plus seed 45 ended with 3" in capsys.readouterr().err
