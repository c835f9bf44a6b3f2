"""What a run deploys: training on the grid, the packed file, sizes that are enforced, goals and giving back."""

import dataclasses
import json

import pytest
import torch

import hirelc
import models
from deploy import pack
from compress import kernel_bytes, model_bytes
from config import InputError
from test_hirelc import QUICK, small_network, small_run
from train import accuracy, correct


def deployed(run, limit=30):
    """Accuracy of the run's packed file, read into a network of its own."""
    return accuracy(correct(pack.load(run.best_packed, small_network()), run.test_set, limit=limit))


@pytest.mark.parametrize("mode", ["paper", "qat"])
@pytest.mark.parametrize("rest", ["float32", "float16"])
def test_the_deployed_accuracy_is_that_of_the_packed_file(mode, rest):
    run = small_run(**{"finetune.mode": mode, "pack.rest": rest})
    result = run.run()
    assert result["mode"] == mode
    assert deployed(run) == result["deployed_acc"] == result["cycles"][result["best_cycle"]]["deployed_acc"]
    assert deployed(run, 0) == result["deployed_acc_full"]
    assert len(run.best_packed) == result["packed_bytes"]
    assert result["whole_model_ratio"] == model_bytes(run.model) / result["packed_bytes"]


@pytest.mark.parametrize("scales", ["follow", "learned"])
def test_training_on_the_grid_deploys_what_it_trained(scales):
    run = small_run(**{"finetune.mode": "qat", "finetune.scales": scales, "finetune.bn_images": 0})
    result = run.run()
    state = pack.load(run.best_packed, small_network()).state_dict()
    assert all(torch.equal(value, run.best_state[key]) for key, value in state.items())
    assert result["deployed_acc"] == result["final_acc"] and result["deployed_acc_full"] == result["final_acc_full"]


def test_the_paper_s_mode_deploys_other_weights_than_it_scores():
    run = small_run(**{"finetune.bn_images": 0})
    run.run()
    state = pack.load(run.best_packed, small_network()).state_dict()
    moved = [key for key, value in state.items() if not torch.equal(value, run.best_state[key])]
    kernels = {f"{name}.weight" for block in run.blocks for name in block.kernels}
    assert moved and set(moved) <= kernels


def test_batchnorm_is_estimated_again_for_the_packed_file():
    states = []
    for images in (0, 32):
        run = small_run(**{"finetune.bn_images": images})
        run.run()
        states.append(pack.load(run.best_packed, small_network()).state_dict())
    differing = {key for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    assert differing == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("target", [0.2, 0.15, 0.1])
def test_an_enforced_target_is_met_and_the_votes_stay_on_record(target):
    run = small_run(**{"enforce_target": True, "search.target": target})
    result = run.run()
    for row in result["cycles"][1:]:
        assert 0.99 * target <= row["retained"] <= target
        assert row["voted_retained"] != row["retained"] and row["voted_compliance"] != row["compliance"]
    assert result["cr_met"] and result["voted_compliance"] is not None
    assert run.best_config.retained == result["cycles"][result["best_cycle"]]["retained"]


def test_without_enforcement_the_vote_is_what_is_built():
    row = small_run(**{"search.target": 0.1}).run()["cycles"][1]
    assert row["voted_retained"] == row["retained"] and row["voted_compliance"] == row["compliance"]


def test_a_target_below_the_bounds_is_refused_before_anything_runs():
    with pytest.raises(InputError, match="bits_min=3.*max_pruning=0.6"):
        small_run(**{"enforce_target": True, "search.target": 0.02})


def test_a_goal_of_bytes_is_kept():
    plain = small_run().run()
    wanted = plain["packed_bytes"] - 60
    run = small_run(goal=f"size:{wanted}B")
    result = run.run()
    assert wanted - 400 < result["packed_bytes"] <= wanted and result["goal"]["met"]
    assert all(row["packed_bytes"] <= wanted for row in result["cycles"][1:])
    with pytest.raises(InputError, match="takes at least"):
        small_run(goal="size:500B")


def test_a_goal_of_a_ratio_sets_the_target():
    run = small_run(goal="cr:8")
    result = run.run()
    assert run.config.search.target == 1 / 8 and 8 <= result["cr"] <= 8.1 and result["goal"]["met"]


def test_a_missed_drop_keeps_the_size_and_says_so():
    run = small_run(goal="cr:10,drop:0")
    run.drop_holds = lambda row: False
    result = run.run()
    assert result["goal"]["missed"] == ["drop"] and not result["goal"]["met"]
    assert result["cr"] >= 10 and len(result["cycles"]) == 3


def test_giving_back_starts_with_the_most_sensitive_blocks_and_ends_when_the_drop_holds():
    run = small_run(goal="cr:10,drop:0", relax=True)
    run.drop_holds = lambda row: row.cycle >= 4  # the second round of giving back
    result = run.run()
    assert [row["cycle"] for row in result["cycles"]] == [0, 1, 2, 3, 4]
    assert result["best_cycle"] == 4 and result["goal"]["missed"] == ["cr"]
    light = [all(k.bits == 8 and k.keep == 1 for k in block.kernels) for block in run.best_config.blocks]
    assert light == [True] * len(light) and len(light) == 2  # one block in round 1, both in round 2
    assert sum("given back" in note for note in result["notes"]) == 2
    first = run.cycles[3]
    assert first.retained < run.cycles[4].retained


def test_giving_back_ends_when_everything_is_back():
    run = small_run(goal="drop:0", **{"search.cycles": 1})
    run.drop_holds = lambda row: False
    result = run.run()
    kernels = [kernel for block in run.best_config.blocks for kernel in block.kernels]
    assert all(kernel.bits == 32 and kernel.keep == 1 for kernel in kernels)
    assert len(result["cycles"]) == 2 + 3 and result["goal"]["missed"] == ["drop"]  # 1, 2, 4 of two levels of two


def test_under_a_goal_of_a_drop_alone_the_smallest_network_that_holds_it_wins():
    run = small_run(goal="drop:3")
    run.baseline_acc = 80.0
    rows = [hirelc.Cycle(n, acc, 0.0, deployed_acc=acc, cr=cr) for n, acc, cr in
            ((1, 79.0, 5.0), (2, 77.5, 7.0), (3, 76.0, 9.0))]
    assert max(rows, key=run.merit).cycle == 2


def test_compress_model_writes_a_packed_file_for_one_s_own_network(tmp_path):
    run = small_run()
    model = small_network()
    path = tmp_path / "small.pt"
    network, policy, result = hirelc.compress_model(
        model, run.train_set, run.test_set, packed=path, search__cycles=1, lla__timesteps=4, hla__timesteps=4,
        finetune__epochs=1, finetune__mode="qat", baseline__epochs=0, compress__scope="all", eval__images=30)
    assert path.stat().st_size == result["packed_bytes"]
    mine = pack.load(path, model=small_network())
    assert accuracy(correct(mine, run.test_set, limit=30)) == result["deployed_acc"]
    assert result["scope"] == "all" and not result["excluded"]
    kernels = {name: kernel for block in policy["blocks"] for name, kernel in
               ((k["name"], k) for k in block["kernels"])}
    assert kernels["13"]["channels_kept"] == 3  # the classes


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("deploy")
    assert hirelc.main(["--exp", "4", "--smoke", "--device", "cpu", "--out", str(out), "--set", *QUICK,
                        "compress.scope=all", "finetune.mode=qat"]) == 0
    return out / "exp4-seed42"


def test_a_run_leaves_its_packed_file_and_theta_0(run_folder):
    result = json.loads((run_folder / "result.json").read_text())
    packed = run_folder / "packed.pt"
    assert packed.stat().st_size == result["packed_bytes"]
    assert (run_folder / "baseline.pt").stat().st_size == result["fp32_file_bytes"] > result["fp32_bytes"]
    config = pack.read(packed).config
    shapes = [(kernel, shape) for block in config.blocks for kernel, shape in zip(block.kernels, block.shapes)]
    assert sum(kernel_bytes(*pair) for pair in shapes) < result["packed_bytes"]
    assert config.cr == pytest.approx(result["cr"]) and len(shapes) == 17 + 4
    model = models.build("resnet18", 10, 32, 0.125)
    models.load_pretrained(model, run_folder / "baseline.pt")  # what --weights reads


def test_load_scores_the_packed_file_as_the_run_did(run_folder, capsys):
    result = json.loads((run_folder / "result.json").read_text())
    before = sorted(p.name for p in run_folder.parent.rglob("*"))
    small = [item for item in QUICK if item.startswith("data.")]
    args = ["--exp", "4", "--smoke", "--device", "cpu", "--load", str(run_folder / "packed.pt"), "--set", *small]
    assert hirelc.main(args) == 0
    said = capsys.readouterr().out
    assert f"accuracy {result['deployed_acc']:.2f} on the first 40" in said
    assert f"{result['packed_bytes']:,} bytes" in said
    assert sorted(p.name for p in run_folder.parent.rglob("*")) == before


@pytest.mark.parametrize("change, message", [
    (["--set", "data.classes=5"], "10 classes"),
    (["--model", "nothing.py:make"], "--exp"),
    (["--load", "missing.pt"], "missing.pt"),
])
def test_a_packed_file_that_does_not_fit_is_one_line(run_folder, capsys, change, message):
    args = ["--exp", "4", "--smoke", "--device", "cpu", "--load", str(run_folder / "packed.pt"), *change]
    assert hirelc.main(args) == 2
    captured = capsys.readouterr().err.strip()
    assert message in captured and "\n" not in captured


@pytest.mark.parametrize("key, values", [("mean", "abc"), ("mean", [0.1, 0.2]), ("std", [1.0, 0.0, 1.0]),
                                         ("std", [1.0, float("nan"), 1.0]), ("mean", [0.1, None, 0.3]), ("std", 7)])
def test_a_packed_file_with_impossible_statistics_is_one_line(run_folder, capsys, monkeypatch, key, values):
    read = pack.read
    monkeypatch.setattr(hirelc.pack, "read", lambda path: (
        lambda packed: dataclasses.replace(packed, network={**packed.network, key: values}))(read(path)))
    assert hirelc.main(["--exp", "4", "--smoke", "--device", "cpu", "--load", str(run_folder / "packed.pt"), "--set",
                        *(item for item in QUICK if item.startswith("data."))]) == 2
    captured = capsys.readouterr().err.strip()
    assert f"its {key} is" in captured and "\n" not in captured


def test_a_bad_goal_is_refused_before_the_data_is_read(tmp_path, capsys):
    assert hirelc.main(["--exp", "4", "--smoke", "--out", str(tmp_path / "x"), "--set", "goal=tiny"]) == 2
    assert "size:1.5MB" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_missed_goal_ends_with_exit_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hirelc.HiReLC, "drop_holds", lambda self, row: False)
    code = hirelc.main(["--exp", "4", "--smoke", "--device", "cpu", "--out", str(tmp_path), "--set", *QUICK,
                        "goal=cr:8,drop:0", "search.cycles=1"])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 3 and len(said) == 1 and "goal missed (drop)" in said[0] and "CR 8." in said[0]
    assert json.loads((tmp_path / "exp4-seed42" / "result.json").read_text())["goal"]["missed"] == ["drop"]
