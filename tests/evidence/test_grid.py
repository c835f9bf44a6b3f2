"""The grid of methods: its commands, its table and figure from cells made by hand"""

import json
import sys
import xml.etree.ElementTree as xml

import pytest
import torch

import data
from compress import BlockConfig, KernelConfig, KernelShape, NetworkConfig
from config import flatten
from deploy import pack
from evidence import cells, grid, networks
from evidence.report import csv_of
from support.cli import arguments
from support.kernels import Block


def test_every_cell_is_another_command_with_the_same_estimates_and_repair():
    for flags, _, images, _, repair in grid.NETWORKS.values():
        found = []
        for settings in cells.METHODS.values():
            text = f"{grid.CELL} {images} {repair} {settings}"
            values = flatten(arguments([*flags.split(), "--set", *text.split()])[1][0])
            found.append(json.dumps(values, sort_keys=True))
            assert (values["search.estimate"], values["finetune.mode"]) == ("table", "qat")
        assert len(set(found)) == len(found)


def cell(method, seed, digits, times=12):  # of eight images
    return {"network": "resnet20", "method": method, "seed": seed, "times": times, "test_images": 8, "fp32_bytes": 1210,
            "packed_bytes": 1200 // times, "deployed_hits": digits, "timings": {"table": 1, "search": 2, "finetune": 9}}


def test_the_tables_by_hand():
    found = [cell("random", 44, "c0"), cell("random", 45, "f0"), cell("table", 44, "f0"), cell("table", 45, "fc"),
             cell("table", 46, "ff"), cell("greedy", 46, "00", 8), cell("given", 0, "fe", 1)]
    random, table = cells.table(found, "resnet20", 12, "table").splitlines()[2:]
    assert table == "| table | 44 45 46 | 100 | 75.00 |  | 3 s, 9 s |"
    half = 100 * 2.3646243 * (1 / 14 / 8) ** 0.5  # differences by image: 0 0 1/2 1/2 1/2 1/2 0 0
    assert random == f"| random | 44 45 | 100 | 37.50 | -25.00 [{-25 - half:.2f}, {-25 + half:.2f}] | 3 s, 9 s |"
    given = cells.table(found, "resnet20", 12, "given")
    assert "| 37.50 | -50.00 [" in given and "| 75.00 | -12.50 [" in given
    assert cells.summary(found).splitlines()[2] == "| ResNet-20, CIFAR-10, 87.50 | 8 | | | | 0.00* | | | |"
    assert cells.summary(found).splitlines()[3].startswith("| | 12 | | | | | 75.00 | | -12.50 [")


def test_the_table_of_what_learning_did_by_hand():
    low = {"level": "LLA", "consensus_drop": 4, "random_drop": 2, "consensus_reward": 1500, "random_reward": 1000}
    runs = ("untrained", 45, "f0", 5), ("trained", 45, "fc", 3), ("trained", 47, "ff", 7), ("untrained", 47, "f0", 1)
    found = [cell(name, n, hits) | {"table": {"chosen": [{}, {"table_mse": mse}]}, "searches": [
        {"level": "HLA"}, {**low, "unseen": n / 100, "entropy": [1.0, n / 50]}]} for name, n, hits, mse in runs]
    assert cells.learning(found).splitlines()[2].startswith(
        "| ResNet-20, 12 | 45 47 | 46 % | 4.00, 2.00 | 1,500, 1,000 | 0.92 | 3.0 → 5.0 | +37.50 [")


def test_the_figure_has_every_cell_and_the_published_numbers(tmp_path):
    for name, found in enumerate((cell("table", 44, "f0"), cell("table", 44, "fc"), cell("given", 0, "fe", 1))):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    rows = cells.frontier(tmp_path)
    assert {"network": "resnet20", "series": "table", "times smaller": 12.1, "accuracy": 50.0} in rows
    drawn = [mark[0].text for mark in xml.fromstring(cells.figure(rows)).findall(".//{*}circle")]
    assert (len(rows), len(drawn), drawn[0]) == (3 + 2, 3 + 2, "table's optimum (--preset plus): 12.1, 62.5")
    assert csv_of(rows).splitlines()[:2] == ["network,series,times smaller,accuracy", "resnet20,given,1.01,87.5"]


@pytest.mark.parametrize("code", [0, 3])
def test_a_cell_is_scored_when_its_run_has_ended_and_repeated_where_it_was_stopped(tmp_path, monkeypatch, capsys, code):
    calls, given, small = [], networks.resnet20(), networks.resnet20()
    given.linear.bias.data[3], small.linear.bias.data[5] = 99, 99  # the class of every image
    block, config = Block("b", {"linear": small.linear}, ()), BlockConfig((KernelConfig(32),), (KernelShape(10, 640),))
    packed = pack.pack(small, [block], NetworkConfig((config,)), {"linear": torch.ones(10) > 0}, {"linear": None}, {})

    def run(args, flags, name, seed, settings):
        (place := grid.folder(args, "resnet20", name, seed)).mkdir(exist_ok=True)
        torch.save(given.state_dict(), place / "baseline.pt")
        (place / "packed.pt").write_bytes(packed)
        for file, values in (("result", {**dict.fromkeys(grid.KEPT, 7), "notes": [f"read from {tmp_path}"]}),
                             ("config", {"settings": {"data.name": "synthetic"}, **dict.fromkeys(grid.MADE, 8)})):
            (place / f"{file}.json").write_text(json.dumps(values))
        return calls.append((name, settings)) or code

    monkeypatch.setattr(grid, "run", run)
    images = "data.image_size=32 data.train_images=1 data.test_images=40"
    monkeypatch.setitem(grid.NETWORKS, "resnet20", ("", "w.pth", images, "", "seed=1"))
    torch.save({"weight": torch.zeros(30)}, tmp_path / "w.pth")
    places = (f"{flag}={tmp_path}" for flag in ("--out", "--results", "--data-dir", "--weights-dir"))
    monkeypatch.setattr(sys, "argv", ["grid.py", *places, "--networks", "resnet20", "--methods", "table", "random",
                                      "--seeds", "45", "--times", "12"])
    assert grid.main() == code and grid.main() == code
    assert all("goal=size:10B" in settings for _, settings in calls)
    assert [name[9:] for name, _ in calls] == (["12-table"] * 2 if code else ["12-table", "12-random"])
    assert code == 0 or "table seed 45 ended with 3" in capsys.readouterr().err
    if code == 0:
        whole, _, cell = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))
        labels = data.synthetic(10, 1, 40, 32, data.SYNTHETIC_SEED)[1].labels
        assert [cells.hits(c).tolist() for c in (cell, whole)] == [(labels == k).int().tolist() for k in (5, 3)]
        assert [cell[key] for key in ("cr", "hardware", "notes", "settings")] == [7, 8, ["read from DIR"],
                                                                                  "seed=1 search=table"]
