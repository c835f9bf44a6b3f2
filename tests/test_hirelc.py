"""The loop in the paper's order, run directories, bad input and the command line."""

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import hirelc
import models
from deploy import pack
from support import runs
from compress import KernelConfig, NetworkConfig, from_policy, kernel_retained, prune_mask
from config import Config, InputError, override
from hirelc import Cycle, HiReLC
from support.log import Log
from support.state import Progress, Store
from train import accuracy, correct

ROOT = Path(__file__).resolve().parent.parent
FILES = {"config.json", "run.log", "cycles.csv", "updates.csv", "policy.json", "result.json", "best.pt",
         "baseline.pt", "packed.pt"}
QUICK = ["scratch.epochs=1", "lla.timesteps=4", "hla.timesteps=4", "hla.burst=4", "data.train_images=64",
         "data.test_images=40", "sensitivity.images=2", "finetune.epochs=1"]


def small_run(**settings) -> HiReLC:
    """A loop over a two-block convolutional network on a few drawn images."""
    config = override(Config(), {
        "model.weights": "given", "data.batch_size": 16, "eval.images": 30, "search.cycles": 2, "lla.timesteps": 8,
        "hla.timesteps": 8, "hla.burst": 8, "baseline.epochs": 1, "finetune.epochs": 2, "finetune.lr": 1e-3,
        "sensitivity.images": 4, "surrogate.min_samples": 1, "surrogate.epochs": 3, "search.proxy_batches": 1,
        "device": "cpu", **settings})
    torch.manual_seed(config.seed)
    train, test = data.synthetic(3, 48, 40, 16, 0)
    model = small_network()
    return HiReLC(model, models.find_blocks(model), train, test, config, Log(stream=open(os.devnull, "w")))


def small_network():
    conv = torch.nn.Conv2d
    return torch.nn.Sequential(conv(3, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), conv(8, 8, 1),
                               torch.nn.ReLU(), conv(8, 8, 3, 2), torch.nn.ReLU(), conv(8, 12, 1), torch.nn.ReLU(),
                               conv(12, 12, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(12, 3))


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------------
# The algorithm


def test_the_steps_come_in_the_order_of_the_paper(monkeypatch):
    run, tape = small_run(), []

    def taped(owner, name, label):
        method = getattr(owner, name)

        def call(*args, **kwargs):
            tape.append(label(args) if callable(label) else label)
            return method(*args, **kwargs)
        setattr(owner, name, call)

    for name in ("train_from_scratch", "train_baseline", "estimate_sensitivity", "warm_up_surrogate", "search_blocks",
                 "apply", "finetune_and_measure", "update_surrogate", "keep_best", "report"):
        taped(run, name, name)
    make = run.make_agents

    def make_and_tape():
        tape.append("make_agents")
        make()
        taped(run.hla, "feedback", lambda args: ("feedback", *(round(float(a), 9) for a in args)))
        taped(run.hla, "train", lambda args: ("train_hla", args[0]))
        budgets = run.hla.budgets
        run.hla.budgets = lambda deterministic: tape.append(("budgets", deterministic)) or budgets(deterministic)
        for i, lla in enumerate(run.lla):
            taped(lla, "consensus", ("consensus", i))
    together = hirelc.train_together
    monkeypatch.setattr(hirelc, "train_together", lambda ensembles, *args: tape.extend(
        ("train_lla", lla.index) for lla in ensembles) or together(ensembles, *args))
    run.make_agents = make_and_tape
    run.config = override(run.config, ["hla.timesteps=6", "hla.burst=5"])
    run.run()

    # The proxy (cycle 1) takes block after block, the surrogate (cycle 2) all at once.
    by_proxy = ["search_blocks", ("train_lla", 0), ("consensus", 0), ("train_lla", 1), ("consensus", 1)]
    by_surrogate = ["search_blocks", ("train_lla", 0), ("train_lla", 1), ("consensus", 0), ("consensus", 1)]
    after = ["apply", "finetune_and_measure", "update_surrogate", "keep_best"]
    first = run.cycles[1]
    assert tape == (
        ["train_from_scratch", "train_baseline", "estimate_sensitivity", "make_agents", "warm_up_surrogate", ("train_hla", 6)]
        + [("feedback", 0.0, 1.0, 1.0), ("budgets", False)] + by_proxy + after
        + [("feedback", round(first.drop, 9), round(first.retained, 9), 2.0), ("train_hla", 5), ("budgets", True)]
        + by_surrogate + after + ["report"])


@pytest.mark.parametrize("surrogate", ["on", "off"])
def test_the_search_leaves_the_network_bit_identical(surrogate):
    run = small_run(**{"surrogate.enabled": surrogate})
    run.train_baseline()
    run.estimate_sensitivity()
    run.make_agents()
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.budgets = run.hla.budgets(False)
    run.search_blocks(1)
    assert tensors_equal(before, run.model.state_dict())
    assert tensors_equal(before, run.theta0)
    assert run.voted.retained < 0.25


def test_theta0_is_what_a_cycle_starts_from():
    run = small_run(**{"search.cycles": 1})
    run.run()
    theta0 = run.theta0
    run.carried = {k: v + 1 if v.is_floating_point() else v for k, v in theta0.items()}
    kernels = {f"{name}.weight" for block in run.blocks for name in block.kernels}

    starts = {}
    for carry in ("none", "rest", "all"):
        run.config = override(run.config, {"carry": carry})
        seen = {}
        original, hirelc.compress_network = hirelc.compress_network, lambda *_: seen.update(run._state()) or {}
        try:
            run.apply(run.best_config)
        finally:
            hirelc.compress_network = original
        starts[carry] = seen
    assert tensors_equal(starts["none"], theta0)
    assert tensors_equal(starts["all"], run.carried)
    for key, value in starts["rest"].items():
        assert torch.equal(value, theta0[key] if key in kernels else run.carried[key]), key


def test_the_best_cycle_is_the_most_accurate_and_the_first_of_equals():
    run = small_run()
    run.carried, run.packed = {}, b""
    for cycle, acc in enumerate((50.0, 60.0, 60.0, 55.0), start=1):
        run.keep_best(Cycle(cycle, acc, 0.0), f"config {cycle}", {}, ())
    assert run.best.cycle == 2 and run.best_config == "config 2"


def test_the_search_may_be_around_what_the_last_cycle_chose():
    for around, surrounded in (("theta0", False), ("last", True)):
        run, seen = small_run(**{"surrogate.enabled": False, "search.around": around}), []
        search, measure = run.search_blocks, run.measure
        run.search_blocks = lambda cycle: (search(cycle), seen.append(run.estimator.proxy.around))
        run.measure = lambda cycle: (measure(cycle), seen.append(NetworkConfig(tuple(run.estimator.consensus))))
        run.run()
        assert seen[0] is None and seen[2] == (seen[1] if surrounded else None)
        assert seen[1].cr == run.cycles[1].cr


def test_the_reported_network_is_the_best_cycle_and_scores_what_is_reported():
    run = small_run()
    result = run.run()
    assert result["best_cycle"] in (1, 2) and len(result["cycles"]) == 3
    assert accuracy(correct(run.model, run.test_set, limit=30)) == result["final_acc"]
    assert accuracy(correct(run.model, run.test_set)) == result["final_acc_full"]
    assert result["final_acc"] == max(row["acc"] for row in result["cycles"][1:])
    assert result["drop"] == pytest.approx(result["baseline_acc"] - result["final_acc"])
    for block, config in zip(run.blocks, run.best_config.blocks):
        for module, kernel in zip(block.kernels.values(), config.kernels):
            zero_rows = int((module.weight.flatten(1) == 0).all(dim=1).sum())
            assert zero_rows == len(module.weight) - int(prune_mask(module.weight, kernel.keep).sum())
    pack.load(run.best_packed, run.model)
    assert accuracy(correct(run.model, run.test_set, limit=30)) == result["deployed_acc"]
    assert accuracy(correct(run.model, run.test_set)) == result["deployed_acc_full"]
    for block, config in zip(run.blocks, run.best_config.blocks):
        for module, kernel in zip(block.kernels.values(), config.kernels):
            assert module.weight.unique().numel() <= 2 ** kernel.bits


def test_surrogate_error_and_activity_are_those_of_the_cycles():
    run = small_run(**{"search.cycles": 3, "surrogate.min_samples": 2})
    result = run.run()
    rows = result["cycles"]
    assert [row["surrogate_active"] for row in rows] == [False, False, False, True]
    assert result["surrogate_mae"] == pytest.approx(abs(rows[3]["surrogate_prediction"] - rows[3]["acc"]))
    assert result["surrogate_samples"] == 3


def test_warm_up_fills_the_buffer_and_leaves_theta0():
    run = small_run(**{"surrogate.warmup": 3, "surrogate.min_samples": 3})
    run.train_baseline()
    run.estimate_sensitivity()
    run.make_agents()
    run.warm_up_surrogate()
    assert len(run.surrogate.buffer) == 3 and run.surrogate.active
    assert tensors_equal(run.theta0, {k: v for k, v in run.model.state_dict().items()})


@pytest.mark.parametrize("settings", [{}, {"carry": "all", "finetune.mode": "qat", "surrogate.warmup": 2},
                                      {"goal": "cr:5,drop:0", "relax": True}])
def test_a_run_goes_on_behind_every_phase_to_the_same_result(tmp_path, settings):
    whole = small_run(**settings)
    whole.progress = Progress(Store(tmp_path / "state", {}))
    whole.save = lambda run: shutil.copytree(tmp_path / "state", tmp_path / str(len(run.progress.done)))
    expected = whole.run()
    phases = list(whole.progress.done)
    assert len(phases) >= 11 and phases[:3] == ["from scratch", "baseline", "sensitivity"]
    for n in range(1, len(phases) + 1):
        resumed = small_run(**settings)
        resumed.progress = Progress(Store(tmp_path / str(n), {}))
        resumed.load_state(resumed.progress.load())
        assert resumed.progress.done == phases[:n]
        result = resumed.run()
        assert {**result, "timings": None} == {**expected, "timings": None}, phases[n - 1]
        assert resumed.policy() == whole.policy() and resumed.updates == whole.updates
        assert tensors_equal(resumed.model.state_dict(), whole.model.state_dict())
        assert resumed.best_packed == whole.best_packed


@pytest.mark.parametrize("setting, check", [
    ({"search.method": "no-hla"}, lambda run: all(b.target == 0.25 and b.min_bits == 3 for b in run.best_budgets)),
    ({"search.method": "null"}, lambda run: not run.updates),
    ({"sensitivity.method": "none"}, lambda run: run.sensitivity == [0.5, 0.5]
        and all(env.penalty_scale == 0 for lla in run.lla for env in lla.envs)),
    ({"lla.algorithms": "A2C,A2C,A2C"}, lambda run: {row["algorithm"] for row in run.updates
                                                    if row["level"] == "LLA"} == {"A2C"}),
    ({"vote": "confidence"}, lambda run: run.best_config.retained <= 0.25),
])
def test_ablations_are_one_setting_each(setting, check):
    run = small_run(**setting)
    run.run()
    assert check(run)


def test_budgets_above_the_most_bits_are_cut_and_noted():
    run = small_run(**{"compress.bits_max": 4, "search.cycles": 1})
    result = run.run()
    assert any("compress.bits_max=4" in note for note in result["notes"])
    assert all(kernel.bits == 4 for block in run.best_config.blocks for kernel in block.kernels)


@pytest.mark.parametrize("told, lacks", [
    ("processor\t: 0\nflags\t\t: fpu avx512_vnni\n", True), ("flags : fpu avx512_bf16 sse\nflags : fpu\n", False),
    ("flags\t: amx_bf16 fpu\n", False), ("Features\t: fp asimd bf16\n", False), ("Features : fp asimd\n", True),
    ("cpu\t: POWER9\n", False), (None, False)])
def test_hardware_without_bfloat16_is_said(tmp_path, monkeypatch, told, lacks):
    """Where nothing is known of the hardware nothing is said of it."""
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr(runs, "CPU_INFO", file)
    assert runs.lacks_bfloat16(torch.device("cpu")) is lacks
    model, log = models.build("resnet18", 10, 32, 0.0625), Log(open(os.devnull, "w"))
    config = override(Config(), ["search.dtype=bfloat16", "precision=float32"])
    pictures = data.load(override(Config(), ["data.name=synthetic", "data.image_size=32", "data.train_images=64",
                                             "data.test_images=16"]).data)
    HiReLC(model, models.find_blocks(model), pictures.train, pictures.test, config, log)
    assert [note for note in log.notes if "bfloat16" in note] == (
        ["search.dtype=bfloat16: this hardware has no instructions for it; float32 is faster here"] if lacks else [])


def test_compress_model_leaves_the_given_network_untouched():
    train, test = data.synthetic(3, 48, 40, 16, 0)
    model = small_network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compressed, policy, result = hirelc.compress_model(
        model, train, test, search__cycles=1, lla__timesteps=4, hla__timesteps=4, finetune__epochs=1,
        baseline__epochs=0, data__batch_size=16, sensitivity__images=2, search__proxy_batches=1, device="cpu")
    assert tensors_equal(before, model.state_dict())
    assert compressed is not model and accuracy(correct(compressed, test)) == result["final_acc_full"]
    config = from_policy(json.loads(json.dumps(policy)), models.find_blocks(compressed))
    assert config.cr == pytest.approx(result["cr"])
    with pytest.raises(InputError, match="unknown setting 'no.such'"):
        hirelc.compress_model(model, train, test, no__such=1)


# ---------------------------------------------------------------------------------------------------------------
# A whole smoke run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Two runs of the same smoke experiment, in two folders."""
    outs = [tmp_path_factory.mktemp("smoke") for _ in range(2)]
    codes = [hirelc.main(["--exp", "4", "--smoke", "--device", "cpu", "--out", str(out)]) for out in outs]
    return codes, [out / "exp4-seed42" for out in outs]


def test_a_smoke_run_leaves_a_complete_run_directory(smoke):
    codes, (path, _) = smoke
    assert codes == [0, 0]
    assert {p.name for p in path.iterdir()} == FILES
    config = json.loads((path / "config.json").read_text())
    assert config["settings"]["data.name"] == "synthetic" and config["versions"]["torch"] == torch.__version__
    result = json.loads((path / "result.json").read_text())
    for key in ("baseline_acc", "final_acc", "drop", "deployed_acc", "packed_bytes", "fp32_file_bytes", "cr", "msr",
                "whole_model_ratio", "best_cycle",
                "cr_met", "drop_met", "timings", "compliance", "null_controller", "final_interval_full"):
        assert key in result, key
    rows = list(csv.DictReader((path / "cycles.csv").open()))
    assert [int(row["cycle"]) for row in rows] == [0, 1, 2]
    assert float(rows[0]["acc"]) == result["baseline_acc"] and float(rows[0]["cr"]) == 1.0
    updates = list(csv.DictReader((path / "updates.csv").open()))
    for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance"):
        assert updates[0][key] != "", key
    assert {row["level"] for row in updates} == {"HLA", "LLA"}
    lla_ppo = [float(row["approx_kl"]) for row in updates if (row["level"], row["algorithm"]) == ("LLA", "PPO")]
    assert result["mean_kl"]["LLA PPO"] == pytest.approx(sum(lla_ppo) / len(lla_ppo))
    assert set(result["mean_kl"]) == {"HLA PPO", "HLA A2C", "LLA PPO", "LLA A2C"}
    assert (path / "run.log").read_text().count(" cycle 2: accuracy ") == 1


def test_the_numbers_of_a_run_agree_with_its_policy_and_its_weights(smoke):
    path = smoke[1][0]
    result = json.loads((path / "result.json").read_text())
    saved = torch.load(path / "best.pt", weights_only=True)
    settings = saved["settings"]
    model = models.build(settings["model.name"], settings["data.classes"], settings["data.image_size"],
                         settings["model.width"])
    model.load_state_dict(saved["model"])
    blocks = models.find_blocks(model)
    assert [len(block.kernels) for block in blocks] == [4, 4, 4, 4, 1]
    policy = json.loads((path / "policy.json").read_text())
    assert policy == saved["policy"]

    weights = {f"{name}": m.weight for block in blocks for name, m in block.kernels.items()}
    stored = total = 0.0
    for block in policy["blocks"]:
        for kernel in block["kernels"]:
            weight = weights[kernel["name"]]
            kept = int((weight.flatten(1) != 0).any(dim=1).sum())
            assert kept <= kernel["channels_kept"] < kernel["channels"] or kernel["keep"] == 1
            stored += weight.numel() * kernel["bits"] / 32 * kernel["channels_kept"] / kernel["channels"]
            total += weight.numel()
            config = KernelConfig(kernel["bits"], kernel["keep"], kernel["qtype"], kernel["granularity"])
            assert kernel["retained"] == kernel_retained(config, len(weight))
    assert result["cr"] == pytest.approx(total / stored)

    config = override(Config(), {k: v for k, v in settings.items()})
    test = data.load(config.data).test
    assert accuracy(correct(model, test)) == result["final_acc"]


def test_equal_seeds_give_equal_results(smoke):
    _, (one, two) = smoke
    assert (one / "policy.json").read_bytes() == (two / "policy.json").read_bytes()
    results = [json.loads((path / "result.json").read_text()) for path in (one, two)]
    for result in results:
        assert result.pop("timings")["total"] > 0
        assert sum(result.pop("time_shares").values()) == pytest.approx(1, abs=0.01)
    assert results[0] == results[1]
    assert (one / "cycles.csv").read_bytes() == (two / "cycles.csv").read_bytes()


def test_another_seed_gives_another_run(smoke, tmp_path):
    args = ["--exp", "4", "--smoke", "--device", "cpu", "--out", str(tmp_path), "--seed", "43", "--set", *QUICK]
    assert hirelc.main(args) == 0
    assert (tmp_path / "exp4-seed43" / "policy.json").read_bytes() != (smoke[1][0] / "policy.json").read_bytes()


def test_a_run_directory_with_other_settings_is_refused_and_kept(smoke, capsys):
    path = smoke[1][0]
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    args = ["--exp", "4", "--smoke", "--device", "cpu", "--out", str(path.parent), "--set", "lla.timesteps=5"]
    assert hirelc.main(args) == 2
    error = capsys.readouterr().err
    assert "lla.timesteps (there 32, now 5)" in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_several_experiments_run_in_one_process_and_a_vit_compresses_too(tmp_path, capsys):
    args = ["--exp", "5", "6", "--smoke", "--device", "cpu", "--out", str(tmp_path), "--name", "quick", "--set"]
    assert hirelc.main(args + QUICK + ["surrogate.warmup=1"]) == 0
    for name, kernels, blocks in (("exp5-quick-seed42", 51, 13), ("exp6-quick-seed42", 48, 12)):
        policy = json.loads((tmp_path / name / "policy.json").read_text())
        assert [len(policy["blocks"]), sum(len(b["kernels"]) for b in policy["blocks"])] == [blocks, kernels]
    mixed = {k["qtype"] for b in policy["blocks"] for k in b["kernels"]}
    assert mixed == {"INT", "FLOAT"} and {k["granularity"] for b in policy["blocks"] for k in b["kernels"]} == {"log"}
    table = capsys.readouterr().out
    assert "5-quick" in table and "6-quick" in table and "86.25" in table


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def truncated_weights(folder):
    path = folder / "broken.pth"
    torch.save(models.build("resnet18", 10, 32, 0.125).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    return path


def wrong_weights(folder):
    path = folder / "wrong.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    return path


def incomplete_tree(folder):
    (folder / "data" / "tiny-imagenet-200").mkdir(parents=True)
    return folder / "data"


@pytest.mark.parametrize("make", [
    lambda f: (["--exp", "99"], "unknown experiment 99"),
    lambda f: (["--exp", "x"], "invalid int value"),
    lambda f: ([], "--exp"),
    lambda f: (["--exp", "4", "--bogus"], "unrecognized arguments"),
    lambda f: (["--exp", "4", "--set", "data.imagesize=64"], "data.image_size"),
    lambda f: (["--exp", "4", "--set", "data.image_size=big"], "expected a whole number"),
    lambda f: (["--exp", "4", "--set", "seed"], "key=value"),
    lambda f: (["--exp", "4", "--device", "gpu"], "expected one of auto, cpu, cuda"),
    lambda f: (["--exp", "4", "--weights", "none", "--data-dir", str(incomplete_tree(f))], "wnids.txt"),
    lambda f: (["--exp", "4", "--smoke", "--weights", str(truncated_weights(f))], "broken.pth"),
    lambda f: (["--exp", "4", "--smoke", "--weights", str(wrong_weights(f))], "missing"),
    lambda f: (["--exp", "4", "--smoke", "--weights", str(f / "none.pth")], "none.pth"),
    lambda f: (["--exp", "3", "--smoke", "--set", "data.image_size=30"], "patch"),
])
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(make, tmp_path, capsys):
    args, expected = make(tmp_path)
    out = tmp_path / "new" / "runs"
    assert hirelc.main([*args, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and error.startswith("hirelc: ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_on_a_gpu_is_float32_unless_asked_otherwise(tmp_path, monkeypatch, tf32):
    """torch's own default lets convolutions round to TF32."""
    def seen(*_):
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        raise InputError("seen")

    monkeypatch.setattr(hirelc.data, "load", seen)
    with pytest.raises(InputError, match="^seen$"):
        hirelc.run_experiment(hirelc.resolve(4, {"smoke": True, "out": str(tmp_path)}, [f"tf32={tf32}"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(tmp_path, capsys):
    assert hirelc.main(["--exp", "4", "--smoke", "--device", "cuda", "--out", str(tmp_path / "runs")]) == 2
    assert "no usable GPU" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert hirelc.main(["--exp", "4", "--smoke", "--out", str(tmp_path / "file" / "runs")]) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_failed_experiment_does_not_stop_the_next(tmp_path, capsys):
    args = ["--exp", "3", "4", "--smoke", "--device", "cpu", "--out", str(tmp_path), "--set", *QUICK,
            "model.patch_size=16"]  # ResNet18 has no patches, the ViT runs
    assert hirelc.main(args) == 2
    assert (tmp_path / "exp3-seed42" / "result.json").exists() and not (tmp_path / "exp4-seed42").exists()
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "\n3 " in captured.out


# ---------------------------------------------------------------------------------------------------------------
# Command line


def test_list_shows_the_experiments_with_the_papers_numbers(capsys):
    assert hirelc.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ResNet18, Tiny ImageNet" in lines[4] and lines[4].endswith("5.99")
    assert [int(line.split()[0]) for line in lines[1:10]] == list(range(1, 10)) and lines[10] == ""
    assert any("deit_small_patch16_224-cd65a155.pth" in line and "SHA-256 cd65a155" in line for line in lines[11:])


def test_set_wins_over_flags_and_flags_over_smoke():
    config = hirelc.resolve(5, {"smoke": True, "seed": 7, "model.weights": "w.pth"}, ["seed=8", "search.cycles=3"])
    assert (config.seed, config.search.cycles, config.model.weights) == (8, 3, "w.pth")
    assert config.model.name == "mobilenetv2_100" and config.surrogate.warmup == 4 and config.out == "runs-smoke"
    assert hirelc.resolve(5, {}, []).out == "runs" and hirelc.resolve(5, {}, []).surrogate.warmup == 100


@pytest.fixture
def stub(tmp_path):
    """A stand-in for python that writes down how it was called and fails for experiment 3."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "$*" >> "$0.calls"\ncase "$*" in *"--exp 3 "*) exit 2;; esac\nexit 0\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def run_all(stub, *args):
    done = subprocess.run(["bash", str(ROOT / "run_all.sh"), *args], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(stub)}, stdin=subprocess.DEVNULL)
    path = Path(f"{stub}.calls")
    calls = [c.replace(f"{ROOT}/", "") for c in path.read_text().splitlines()] if path.exists() else []
    return done, [c for c in calls if not c.startswith("-c")]


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")
def test_run_all_goes_on_past_a_failure_and_says_so_at_the_end(stub, tmp_path):
    done, calls = run_all(stub, "--smoke", "--seeds", "1,2", "--jobs", "1", "--out", str(tmp_path), "--set",
                          "lla.timesteps=4")
    assert done.returncode == 1
    expected = [f"hirelc.py --exp {e} --seed {s} --out {tmp_path} --no-table --resume --smoke --set lla.timesteps=4"
                for s in (1, 2) for e in range(1, 8)]
    assert calls == [*expected, f"report.py {tmp_path}"]
    assert done.stderr.splitlines() == ["run_all: failed: exp 3 seed 1 (exit 2)", "run_all: failed: exp 3 seed 2 (exit 2)"]


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")
def test_run_all_refuses_a_flag_without_its_value(stub):
    for flags in (["--seeds"], ["--jobs"], ["--jobs", "0"], ["--jobs=many"]):
        done, calls = run_all(stub, *flags)
        assert done.returncode == 2 and calls == [] and done.stderr.count("\n") == 1


def test_the_program_runs_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "hirelc.py"), "--list"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"DeiT-Small" in done.stdout


def test_holdout_chooses_on_training_images_and_reads_the_test_split_once(monkeypatch):
    run = small_run(**{"eval.protocol": "holdout", "search.cycles": 1})
    assert len(run.train_set) == 46 and len(run.choice_set) == 2
    looked, original = [], hirelc.correct

    def counted(model, images, *rest, **more):
        looked.append(images is run.test_set)
        return original(model, images, *rest, **more)

    monkeypatch.setattr(hirelc, "correct", counted)
    monkeypatch.setattr("train.correct", counted)
    result = run.run()
    assert looked[-3:] == [True] * 3 and not any(looked[:-3])
    assert result["protocol"] == "holdout" and result["eval_images"] == 2 and result["test_images"] == 40
    low, high = result["drop_interval_full"]
    assert low <= result["drop_full"] <= high or result["drop_full"] == 0
    assert result["drop_full"] == pytest.approx(result["baseline_acc_full"] - result["final_acc_full"])
    assert result["deployed_drop_full"] == pytest.approx(result["baseline_acc_full"] - result["deployed_acc_full"])
    assert 0 < result["mcnemar_p_full"] <= 1
