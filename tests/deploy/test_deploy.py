"""What a run deploys: training on the grid, the packed file, sizes that are enforced, goals and giving back."""

import dataclasses
import json
import os

import pytest
import torch
from torch import nn

import data
import hirelc
from compress import model_bytes
from config import Config, override
from deploy import pack
from deploy.target import Demands
from evidence import summary
from support import networks
from support.log import Log
from train import accuracy, correct

SMOKE = ["--exp", "4", "--smoke", "--device", "cpu"]
QUICK = ["scratch.epochs=1", "lla.timesteps=4", "hla.timesteps=4", "hla.burst=4", "sensitivity.images=2",
         "finetune.epochs=1", "data.train_images=64", "data.test_images=40"]
SMALL = {"data.batch_size": 16, "eval.images": 30, "search.cycles": 2, "lla.timesteps": 8, "hla.timesteps": 8,
         "hla.burst": 8, "finetune.epochs": 2, "finetune.lr": 1e-3, "sensitivity.images": 4, "surrogate.min_samples": 1,
         "surrogate.epochs": 3, "search.proxy_batches": 1, "device": "cpu"}


def small_network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))


def small_run(**settings):
    """A network of two blocks, compressed on drawn images → result, state dict of the packed file, outcome, run."""
    config = override(Config(), {**SMALL, "model.weights": "given", "model.source": "net", **settings})
    torch.manual_seed(config.seed)
    (train, test), log = data.synthetic(3, 48, 40, 16, 0), Log(open(os.devnull, "w"))
    run = hirelc.Run(*networks.prepare(small_network(), train, test, log, config), train, test, config, log)
    out = hirelc.algorithm_1(run)
    result = summary.summarise(run, out)
    return result, pack.state(pack.read(out.best.packed)), out, run


@pytest.mark.parametrize("mode, rest", [("paper", "float16"), ("paper", "float32"), ("qat", "float16")])
def test_the_deployed_accuracy_is_that_of_the_packed_file(mode, rest):
    result, _, out, run = small_run(**{"finetune.mode": mode, "pack.rest": rest})
    hits = correct(pack.load(out.best.packed, small_network()), run.test_set)
    assert accuracy(hits[:30]) == result["deployed_acc"] and accuracy(hits) == result["deployed_acc_full"]
    assert result["mode"] == mode and result["whole_model_ratio"] == model_bytes(run.model) / len(out.best.packed)


@pytest.mark.parametrize("scales", ["follow", "learned"])
def test_training_on_the_grid_deploys_what_it_trained(scales):
    result, state, out, _ = small_run(**{"finetune.mode": "qat", "finetune.scales": scales, "finetune.bn_images": 0})
    assert all(torch.equal(value, out.best.network[key]) for key, value in state.items())
    for key in ("acc", "acc_full"):
        assert result[f"deployed_{key}"] == result[f"grid_{key}"] == result[f"final_{key}"]


def test_the_paper_s_mode_deploys_other_weights_than_it_scores_and_other_batchnorm_statistics():
    result, state, out, run = small_run(**{"finetune.bn_images": 0})
    moved = {key for key, value in state.items() if not torch.equal(value, out.best.network[key])}
    assert moved and moved <= {f"{name}.weight" for block in run.blocks for name in block.kernels}
    assert result["deployed_acc_full"] == result["grid_acc_full"]
    again = small_run(**{"finetune.bn_images": 32})[1]
    assert {key for key in again if not torch.equal(again[key], state[key])} == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("settings, target", [({"enforce_target": True, "search.target": 0.2}, 0.2),
                                              ({"goal": "cr:10"}, 0.1)])
def test_a_size_is_met_and_the_votes_stay_on_record(settings, target):
    result = small_run(**settings)[0]
    for row in result["cycles"][1:]:
        assert 0.99 * target <= row["retained"] <= target
        assert row["voted_retained"] != row["retained"] and row["voted_compliance"] != row["compliance"]
    assert result["cr_met"] and result["target"] == target and (not result["goal"] or result["goal"]["met"])


def test_giving_back_ends_when_everything_is_back(monkeypatch):
    monkeypatch.setattr(Demands, "holds", lambda self, row: False)
    result, _, out, _ = small_run(goal="drop:0", **{"search.cycles": 1})
    assert all(k.bits == 32 and k.keep == 1 for block in out.best.config.blocks for k in block.kernels)
    assert len(result["cycles"]) == 2 + 3 and result["goal"]["missed"] == ["drop"]  # 1, 2, 4 of two levels of two
    assert sum("given back" in note for note in result["notes"]) == 3 and result["best_cycle"] == 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out, settings = tmp_path_factory.mktemp("deploy"), [*QUICK, "compress.scope=all", "goal=cr:8,drop:0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Demands, "holds", lambda self, row: False)
        assert hirelc.main([*SMOKE, "--out", str(out), "--set", *settings]) == 3
    return out / "exp4-seed42"


def test_a_run_leaves_its_packed_file_and_theta_0_and_load_scores_it(run_folder, capsys):
    result, packed = json.loads((run_folder / "result.json").read_text()), run_folder / "packed.pt"
    config = pack.read(packed).config
    assert config.cr == pytest.approx(result["cr"]) and sum(len(block.kernels) for block in config.blocks) == 17 + 4
    assert packed.stat().st_size == result["packed_bytes"] and result["goal"]["missed"] == ["drop"]
    assert hirelc.main([*SMOKE, "--load", str(packed), "--set", *QUICK[-2:]]) == 0
    said = capsys.readouterr().out
    assert f"{result['packed_bytes']:,} bytes" in said and f"{result['deployed_acc']:.2f} on the first 40" in said


@pytest.mark.parametrize("change, network, message", [
    (["--set", "data.classes=5"], {}, "10 classes"), (["--model", "nothing.py:make"], {}, "--exp"),
    (["--load", "missing.pt"], {}, "missing.pt"), ([], {"mean": [0.1, None, 0.3]}, "its mean is"),
    ([], {"mean": "abc"}, "its mean is"), ([], {"std": [1.0, 0.0, 1.0]}, "its std is"), ([], {"std": 7}, "its std is")])
def test_a_packed_file_that_does_not_fit_is_one_line(run_folder, capsys, monkeypatch, change, network, message):
    packed = pack.read(run_folder / "packed.pt")
    if network:
        monkeypatch.setattr(pack, "read", lambda _: dataclasses.replace(packed, network=packed.network | network))
    assert hirelc.main([*SMOKE, "--load", str(run_folder / "packed.pt"), *change]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
