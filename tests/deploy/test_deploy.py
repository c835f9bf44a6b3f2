"""What a run deploys: training on the grid, the packed file, sizes that are enforced, goals and giving back."""

import dataclasses

import pytest

import hirelc
from deploy import pack
from deploy.target import Demands
from networks import equal
from test_hirelc import QUICK, TRAINED, result_of, small_run

SMOKE = ["--exp", "4", "--smoke", "--device", "cpu"]


def small_outcome(**settings):
    """A network of two blocks, compressed on drawn images → result, state dict of the packed file, outcome."""
    run = small_run(**settings)
    out = hirelc.algorithm_1(run)
    return result_of(run, out), pack.state(pack.read(out.best.packed)), out


def test_training_on_the_grid_deploys_what_it_trained():
    result, state, out = small_outcome(**{"finetune.mode": "qat", "finetune.bn_images": 0, "search.target": 0.01,
                                          "search.max_drop": 99, **TRAINED})
    assert result["mode"] == "qat" and equal(state, out.best.network) and sum(result["strategies"].values()) == 1
    assert (result["evaluations"], result["cr_met"], result["drop_met"]) == (48, False, True)  # the drop is 3.33
    for key in ("acc", "acc_full"):
        assert result[f"deployed_{key}"] == result[f"grid_{key}"] == result[f"final_{key}"]


@pytest.mark.parametrize("settings, target", [({"enforce_target": True, "search.target": 0.2}, 0.2),
                                              ({"goal": "cr:10"}, 0.1)])
def test_a_size_is_met_and_the_votes_stay_on_record(settings, target):
    result = small_outcome(**settings)[0]
    for row in result["cycles"][1:]:
        assert 0.99 * target <= row["retained"] <= target
        assert row["voted_retained"] != row["retained"] and row["voted_compliance"] != row["compliance"]
    assert result["cr_met"] and result["target"] == target and (not result["goal"] or result["goal"]["met"])


def test_giving_back_ends_when_everything_is_back(monkeypatch):
    monkeypatch.setattr(Demands, "holds", lambda self, row: False)
    result, _, out = small_outcome(goal="drop:0", **{"search.cycles": 1})
    assert all(k.bits == 32 and k.keep == 1 for block in out.best.config.blocks for k in block.kernels)
    assert len(result["cycles"]) == 2 + 3 and result["goal"]["missed"] == ["drop"]  # 1, 2, 4 of two levels of two
    assert sum("given back" in note for note in result["notes"]) == 3 and result["best_cycle"] == 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out, settings = tmp_path_factory.mktemp("deploy"), [*QUICK, "compress.scope=all", "goal=cr:8,drop:0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Demands, "holds", lambda self, row: False)
        assert hirelc.main([*SMOKE, "--out", str(out), "--set", *settings]) == 3
    assert sum(len(block.kernels) for block in pack.read(out / "exp4-seed42" / "packed.pt").config.blocks) == 17 + 4
    return out / "exp4-seed42"


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


def test_images_of_a_file_that_does_not_say_are_normalised_by_the_settings(run_folder, capsys, monkeypatch):
    packed = pack.read(run_folder / "packed.pt")
    monkeypatch.setattr(pack, "read", lambda _: dataclasses.replace(packed, network=packed.network | {"mean": []}))
    assert hirelc.main([*SMOKE, "--load", str(run_folder / "packed.pt")]) == 0
    assert "as data.normalize=dataset says" in capsys.readouterr().out
