"""The loop in the paper's order, what a run leaves, networks of a user's, and bad input."""

import copy
import csv
import json
import os
import re
import signal
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import data
import hirelc
import models
import train
from compress import compress_network, prune_mask, snap_to_grid
from config import Config, InputError, override
from deploy import pack, policies
from deploy.batchnorm import estimate_batchnorm
from estimate import block_features
from evidence import summary
from hirelc import Cycle, Run, algorithm_1, compress_model
from networks import equal, silent, snapshot
from support import networks, runs
from train import Recipe, accuracy, correct

QUICK = ["scratch.epochs=1", "lla.timesteps=4", "hla.timesteps=4", "hla.burst=4", "data.train_images=64",
         "data.test_images=40", "sensitivity.images=2", "finetune.epochs=1", "finetune.bn_images=32"]
SMALL = {"data.batch_size": 16, "eval.images": 30, "search.cycles": 2, "lla.timesteps": 4, "hla.timesteps": 6,
         "hla.burst": 5, "finetune.epochs": 2, "finetune.lr": 1e-3, "sensitivity.images": 4, "surrogate.epochs": 3,
         "search.proxy_batches": 1, "device": "cpu", "finetune.bn_images": 32}
API = {key.replace(".", "__"): value for key, value in {**SMALL, "search.cycles": 1}.items()}
TRAINED = {"baseline.epochs": 6, "baseline.patience": 6, "baseline.lr": 0.03}  # it learns something
SMALL["model.weights"] = "given"


def images():
    return data.synthetic(3, 48, 40, 16, 0)


def small_network():
    """Two blocks of convolutions with BatchNorm."""
    torch.manual_seed(0)
    conv = nn.Conv2d
    return nn.Sequential(conv(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, 1), nn.ReLU(), conv(8, 8, 3, 2),
                         nn.ReLU(), conv(8, 12, 1), nn.ReLU(), conv(12, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(12, 3))


def small_run(**settings) -> Run:
    config, log, sets = override(Config(), {**SMALL, "surrogate.min_samples": 1, **settings}), silent(), images()
    return Run(*networks.prepare(small_network(), *sets, log, config), *sets, config, log)


def result_of(run, out):
    return summary.summarise(run, out, copy.deepcopy(run.model))


def test_the_steps_come_in_the_order_of_the_paper(monkeypatch):
    run, tape, choose = small_run(**TRAINED, **{"enforce_target": True, "search.target": 0.1}), [], hirelc.choose_search
    told = []  # agents of both levels, estimator

    def taped(owner, name, label=None):
        method = getattr(owner, name)

        def call(*args, **more):
            tape.append(label(args) if label else name)
            return method(*args, **more)
        monkeypatch.setattr(owner, name, call)

    def choose_and_tape(*args):
        hla, lla = choose(*args)
        taped(hla, "feedback", lambda args: ("feedback", *args))
        taped(hla, "train", lambda args: ("train_hla", *args))
        taped(hla, "budgets", lambda args: ("budgets", *args))
        for i, block in enumerate(lla):
            taped(block, "search", lambda args, i=i: ("search", i, equal(run.weights(), theta0)))
        tape.append("agents")
        theta0, told[:] = run.weights(), (hla, lla, args[2])
        return hla, lla

    for owner, names in ((run, "train_from_scratch train_baseline estimate_sensitivity"), (hirelc.Demands, "chosen"),
                         (hirelc, "warm_up compress_network finetune measure teach")):
        for name in names.split():
            taped(owner, name)
    taped(hirelc.DropEstimator, "settle", lambda args: ("settle", args[1].retained < 0.101))
    monkeypatch.setattr(hirelc, "choose_search", choose_and_tape)
    out = algorithm_1(run)

    # blocks are searched with theta_0 in the network, and leave it there; what is applied is what they agree on
    steps = [("search", 0, True), ("search", 1, True), "chosen", ("settle", True), "compress_network", "finetune",
             "measure", "teach"]
    first = out.rows[1]
    assert tape == [
        "train_from_scratch", "train_baseline", "estimate_sensitivity", "agents", "warm_up", ("train_hla", 6),
        ("feedback", 0.0, 1.0, 1), ("budgets", False), *steps,
        ("feedback", first.drop, first.retained, 2), ("train_hla", 5), ("budgets", True), *steps]
    assert first.retained < 0.101 < first.voted_retained and first.drop == out.baseline["acc"] - first.acc
    assert [row.cycle for row in out.rows] == [0, 1, 2]
    high, low, estimator = told  # what they are told: the blocks' own numbers, theta_0's accuracy, what was chosen
    assert high.envs[0].params.tolist() == [sum(shape.params for shape in block) for block in run.shapes]
    assert high.envs[0].sensitivity == [block.envs[0].sensitivity for block in low] == out.sensitivity
    assert [(block.envs[0].budget.target, block.envs[0].budget.strategy) for block in low] == [
        (budget["target"], budget["strategy"]) for budget in out.budgets[1]["blocks"]]
    assert estimator.baseline_acc == out.baseline["acc"]
    assert out.surrogate.buffer[1][0] == sum(map(block_features, estimator.consensus), [])
    assert [acc for _, acc in out.surrogate.buffer] == [row.acc for row in out.rows[1:]]


def test_in_searches_past_the_papers_drops_are_relative(monkeypatch):
    told = []
    monkeypatch.setattr(hirelc, "Proxy", lambda *args: told.append(args[3]) or 1 / 0)
    for setting in ("method=hirelc", "method=null", "method=random", "method=table", "estimate=table"):
        with pytest.raises(ZeroDivisionError):
            algorithm_1(small_run(**dict([f"search.{setting}".split("=")])))
    assert told == [False] * 2 + [True] * 3


@pytest.mark.parametrize("carry", ["none", "rest"])
def test_the_best_cycle_is_kept_and_theta_0_is_what_a_cycle_starts_from(monkeypatch, carry):
    run = small_run(**{"search.cycles": 4, "search.method": "null", "carry": carry, "finetune.warmup_epochs": 2})
    starts, ends, told = [], [], []

    def measured(run, cycle, tuned, voted, new, out):
        ends.append(run.weights())
        assert tuned["best"].lr == pytest.approx((1e-5, 1.01e-3)[tuned["best"].epoch - 1] / 2.01)  # of 2 epochs
        return Cycle(cycle, (50.0, 60.0, 60.0, 55.0)[cycle - 1], float(cycle))

    monkeypatch.setattr(hirelc, "compress_network", lambda *a: starts.append(run.weights()) or compress_network(*a))
    monkeypatch.setattr(hirelc, "measure", measured)
    monkeypatch.setattr(hirelc.NullHLA, "feedback", lambda hla, *measured: told.append(measured))
    out = algorithm_1(run)
    assert told == [(float(n), 1.0, n + 1) for n in range(4)]  # of the last cycle, not of the best one
    assert out.best.row.cycle == 2 and equal(out.best.network, ends[1])  # the most accurate, the first of equals
    kernels = {f"{name}.weight" for block in run.blocks for name in block.kernels}
    for cycle, start in enumerate(starts):
        rest = out.theta0 if carry == "none" or not cycle else ends[cycle - 1]  # ledger D12
        assert equal(start, rest | {key: out.theta0[key] for key in kernels}), cycle


def test_what_is_reported_is_the_best_cycle_and_drops_compare_like_with_like():
    run = small_run(**{"search.cycles": 3, "surrogate.min_samples": 2, **TRAINED})
    out = algorithm_1(run)
    result, best, model = result_of(run, out), out.best, small_network().to(memory_format=torch.channels_last)

    def scores(name):
        hits = correct(model, run.test_set)
        assert accuracy(hits) == result[f"{name}_acc_full"] and result.get(f"{name}_acc") in (None, accuracy(hits[:30]))

    def estimate_again():
        estimate_batchnorm(model, run.train_set, 16, run.config.finetune.bn_images, run.generator("batchnorm"))

    model.load_state_dict(out.theta0)
    scores("baseline")
    estimate_again()
    scores("baseline_bn")
    model.load_state_dict(best.network)
    scores("final")
    assert result["final_acc"] == max(row["acc"] for row in result["cycles"][1:])
    blocks = models.find_blocks(model, torch.zeros(2, 3, 16, 16))
    for block, config in zip(blocks, best.config.blocks):
        for module, kernel in zip(block.kernels.values(), config.kernels):
            zero_rows = int((module.weight.flatten(1) == 0).all(dim=1).sum())
            assert zero_rows == len(module.weight) - int(prune_mask(module.weight, kernel.keep).sum())
    snap_to_grid(blocks, best.config, best.masks)
    scores("grid")
    estimate_again()
    scores("deployed")
    assert equal(model.state_dict(), pack.load(best.packed, small_network()).state_dict())  # rest is float32
    assert len({result[f"{name}_acc_full"] for name in ("baseline", "baseline_bn", "final", "grid", "deployed")}) > 2
    for key, before, after in (("", "baseline", "final"), ("grid_", "baseline", "grid"),
                               ("deployed_", "baseline", "deployed"), ("deployed_bn_", "baseline_bn", "deployed")):
        drop, (low, high) = result[f"{key}drop_full"], result[f"{key}drop_interval_full"]
        assert drop == pytest.approx(result[f"{before}_acc_full"] - result[f"{after}_acc_full"])
        assert low <= drop <= high and 0 < result[f"{key}mcnemar_p_full"] <= 1
    rows = result["cycles"]
    assert result["drop"] == result["baseline_acc"] - result["final_acc"]
    assert [row["surrogate_active"] for row in rows] == [False, False, False, True] and result["surrogate_samples"] == 3
    assert result["surrogate_mae"] == abs(rows[3]["surrogate_prediction"] - rows[3]["acc"])


@pytest.mark.parametrize("rate, failed", [(1e-4, 0), (1e30, 3)])
def test_warm_up_samples_start_from_theta_0_and_one_that_diverges_is_left_out(rate, failed, monkeypatch):
    run = small_run(**{"surrogate.warmup": 3, "surrogate.warmup_lr": rate, "search.cycles": 1, "search": "no-hla"})
    starts, trained, fit, epochs, learn = [], [], run.train, [], hirelc.Surrogate.train
    monkeypatch.setattr(hirelc.Surrogate, "train", lambda surrogate, n: epochs.append(n) or learn(surrogate, n))
    monkeypatch.setattr(hirelc, "compress_network", lambda *a: starts.append(run.weights()) or compress_network(*a))
    run.train = lambda what, trainer: trained.append((trainer.recipe, bool(trainer.factors))) or fit(what, trainer)
    out = algorithm_1(run)
    assert epochs == [100, 3]  # after the warm-up, and after the cycle
    assert len(starts) == 4 and all(equal(start, out.theta0) for start in starts)  # every sample and the cycle, masked:
    assert trained[1:] == [(Recipe("surrogate.warmup_lr", 1, rate, 0.01), True)] * 3 + [
        (Recipe("finetune.lr", 2, 1e-3, 0.01, 3), True)]
    assert (result_of(run, out)["failed_samples"], len(out.surrogate.buffer)) == (failed, 3 - failed + 1)
    notes = [note for note in run.log.notes if "warm-up sample" in note]
    assert len(notes) == failed and all("surrogate.warmup_lr" in note and "left out" in note for note in notes)


def test_images_for_the_proxy_are_drawn_once_and_few_for_the_sensitivity_or_a_flat_loss_are_noted():
    run = small_run(**{"sensitivity.images": 10_000})
    (batch,), (plain, _) = run.calibration_batches(), next(run.train_set.batches(16, "cpu"))
    assert torch.equal(batch, run.calibration_batches()[0]) and not torch.equal(batch, plain)
    nn.init.zeros_([*run.model.modules()][-1].weight)  # of the classifier
    assert run.estimate_sensitivity() == [1.0, 1.0]
    assert all(any(words in note for note in run.log.notes) for words in ("images, not 10000", "the loss is flat"))


@pytest.mark.parametrize("setting, check", [
    ({"search.method": "no-hla"}, lambda out: all(b.target == 0.25 and b.min_bits == 3 for b in out.best.budgets)),
    ({"search.method": "null", "surrogate.warmup": 1}, lambda out: not out.updates and not out.surrogate.buffer),
    ({"sensitivity.method": "none"}, lambda out: out.sensitivity == [0.5, 0.5]),
    ({"compress.bits_max": 4}, lambda out: {k.bits for b in out.best.config.blocks for k in b.kernels} == {4})])
def test_ablations_are_one_setting_each(setting, check):
    run = small_run(**{"search.cycles": 1, **setting})
    assert check(out := algorithm_1(run)) and result_of(run, out)
    for words, key in (("compress.bits_max=4", "compress.bits_max"), ("asks no surrogate", "surrogate.warmup")):
        assert any(words in note for note in run.log.notes) == (key in setting)


def test_holdout_chooses_on_training_images_and_reads_the_test_split_once(monkeypatch):
    run, looked = small_run(**{"eval.protocol": "holdout", "search.cycles": 1}), []
    assert (len(run.train_set), len(run.choice_set)) == (46, 2)
    for module in (hirelc, train, summary):
        monkeypatch.setattr(module, "correct", lambda model, images, *rest, **more: looked.append(
            images is run.test_set) or correct(model, images, *rest, **more))
    result = result_of(run, algorithm_1(run))
    assert looked[-5:] == [True] * 5 and not any(looked[:-5])  # five networks
    assert (result["protocol"], result["eval_images"], result["test_images"]) == ("holdout", 2, 40)


FILES = {"config.json", "run.log", "cycles.csv", "updates.csv", "policy.json", "result.json", "best.pt", "baseline.pt",
         "packed.pt"}
KEYS = """accounting bad_rewards baseline_acc baseline_acc_full baseline_bn_acc_full baseline_bn_interval_full
    baseline_interval_full best_cycle compliance coverage cr cr_met cr_unweighted cycle_budgets cycles data deployed_acc
    deployed_acc_full deployed_bn_drop_full deployed_bn_drop_interval_full deployed_bn_mcnemar_p_full deployed_drop_full
    deployed_drop_interval_full deployed_interval_full deployed_mcnemar_p_full device drop drop_full drop_interval_full
    drop_met eval_images evaluations excluded exp failed_samples final_acc final_acc_full final_interval_full fp32_bytes
    fp32_file_bytes given_acc goal grid_acc grid_acc_full grid_drop_full grid_drop_interval_full grid_interval_full
    grid_mcnemar_p_full kernels mcnemar_p_full mean_kl mode model msr name notes null_controller packed_bytes
    policy_source protocol retained scope search searches seed sensitivity skipped_images smoke sparsity strategies
    surrogate_mae surrogate_samples table target test_images time_shares timings voted_compliance voted_retained
    whole_model_ratio""".split()


def command(out, *more, exp="4"):
    return ["--exp", *exp.split(), "--smoke", "--device", "cpu", "--out", str(out), *more, "--set", *QUICK]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    torch.set_num_threads(1)
    assert hirelc.main([*command(out), "goal=cr:5"]) == 0
    return out / "exp4-seed42"


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_run_directory_is_complete(smoke):
    assert {file.name for file in smoke.iterdir()} == FILES
    config, result = (json.loads((smoke / f"{name}.json").read_text()) for name in ("config", "result"))
    assert config["settings"]["goal"] == "cr:5" and config["settings"]["search.target"] == 0.25
    assert config["resolved"] == {"search.target": 0.2} and result["target"] == 0.2
    assert config["versions"]["torch"] == torch.__version__ and result.keys() == set(KEYS)
    assert result["given_acc"] is None and sum(result["time_shares"].values()) == pytest.approx(1, abs=0.01)
    packed, fp32, said = (smoke / "packed.pt").stat().st_size, result["fp32_bytes"], (smoke / "run.log").read_text()
    assert result["accounting"]["bytes"] == fp32 and result["whole_model_ratio"] == fp32 / packed  # one definition
    assert f"{packed:,} bytes for {fp32:,}, whole model {fp32 / packed:.2f}" in said
    rows, updates = (list(csv.DictReader((smoke / f"{name}.csv").open())) for name in ("cycles", "updates"))
    assert [int(row["cycle"]) for row in rows] == [0, 1, 2]
    assert float(rows[0]["acc"]) == result["baseline_acc"] and float(rows[0]["cr"]) == 1.0
    assert all(updates[0][key] for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction",
                                           "explained_variance"))
    kl = [float(row["approx_kl"]) for row in updates if (row["level"], row["algorithm"]) == ("LLA", "PPO")]
    assert result["mean_kl"]["LLA PPO"] == pytest.approx(sum(kl) / len(kl)) and len(result["mean_kl"]) == 4
    assert said.count(" cycle 2: accuracy ") == 1
    saved, policy = torch.load(smoke / "best.pt", weights_only=True), json.loads((smoke / "policy.json").read_text())
    best = override(Config(), saved["settings"])
    model = models.build(best.model.name, 10, 32, best.model.width)
    model.load_state_dict(saved["model"])
    assert accuracy(correct(model, data.load(best.data).test)) == result["final_acc"] and policy == saved["policy"]
    assert policies.read(policy).fit(models.find_blocks(model), best)[0].cr == pytest.approx(result["cr"])


def test_what_leaves_a_finished_run_alone(smoke, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, result = contents(smoke), json.loads((smoke / "result.json").read_text())
    for more in ((), ("--resume",)):
        (smoke / "state").mkdir()  # as a process leaves it that was killed at its very end
        assert hirelc.main([*command(smoke.parent, *more), "goal=cr:5"]) == 0
        said = capsys.readouterr().out
        assert "finished already" in said and "exp 4: resnet18, synthetic, seed 42" in said
    assert hirelc.main([*command(smoke.parent), "lla.timesteps=5"]) == 2
    error = capsys.readouterr().err
    assert "lla.timesteps (there 4, now 5)" in error and "goal (there cr:5" in error and error.count("\n") == 1
    assert hirelc.main(command(tmp_path / "runs", "--load", str(smoke / "packed.pt"))) == 0
    said = capsys.readouterr().out
    assert f"{result['deployed_acc']:.2f} on the first 40" in said and f"{result['fp32_bytes']:,}" in said
    assert hirelc.main([*command(smoke.parent, "--dry-run"), "goal=cr:5"]) == 0
    assert "holds a run with these settings" in capsys.readouterr().out
    assert contents(smoke) == before and not list(tmp_path.iterdir())


def test_several_experiments_in_one_process_of_which_one_fails(tmp_path, capsys):
    small = ["search.cycles=1", "model.width=0.05", "model.patch_size=16"]  # a ResNet18 has no patches
    assert hirelc.main([*command(tmp_path, exp="4 6"), *small]) == 2
    policy, said = json.loads((tmp_path / "exp6-seed42" / "policy.json").read_text()), capsys.readouterr()
    kernels = [(kernel["qtype"], kernel["granularity"]) for block in policy["blocks"] for kernel in block["kernels"]]
    assert (len(policy["blocks"]), len(kernels)) == (12, 48) and not (tmp_path / "exp4-seed42").exists()
    assert set(kernels) == {("INT", "log"), ("FLOAT", "log")} and said.err.count("\n") == 1 and "patch" in said.err
    table = said.out.partition("\n\n")[2].splitlines()
    assert "exp 6: deit_small" in "".join(table) and max(map(len, table)) <= 120


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_the_command_that_goes_on(tmp_path, capsys, monkeypatch, number, code):
    monkeypatch.setattr(hirelc, "warm_up", lambda *_: os.kill(os.getpid(), number))
    assert hirelc.main(command(tmp_path)) == code
    error = capsys.readouterr().err
    assert "go on with the same command and --resume" in error and error.count("\n") == 1
    assert (tmp_path / "exp4-seed42" / "state" / "identity.json").exists()


# A user's network
@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A network with BatchNorm, compressed, with the other tensors of its packed file in half precision."""
    given, path, threads = small_network(), tmp_path_factory.mktemp("own") / "packed.pt", []
    before, log = snapshot(given), silent()
    log.info = lambda text: threads.append(torch.get_num_threads())
    torch.set_num_threads(2)
    network, policy, result = compress_model(given, *images(), packed=path, threads=1, pack__rest="float16", log=log,
                                             goal="cr:6", **API)
    assert torch.get_num_threads() == 2 and set(threads) == {1}
    torch.set_num_threads(1)
    assert equal(before, given.state_dict()) and given.training
    return network, policy, result, path, given


def test_the_network_that_is_returned_is_the_one_in_the_packed_file(compressed):
    network, policy, result, path, given = compressed
    assert network is not given and not network.training
    assert equal(network.state_dict(), pack.load(path, model=small_network()).state_dict())
    hits = correct(network, images()[1])
    assert (accuracy(hits), accuracy(hits[:30])) == (result["deployed_acc_full"], result["deployed_acc"])
    assert path.stat().st_size == result["packed_bytes"]
    blocks = models.find_blocks(given, torch.zeros(2, 3, 16, 16))
    assert policies.read(policy).fit(blocks, Config())[0].cr == pytest.approx(result["cr"])
    assert result["goal"]["met"] and result["target"] == pytest.approx(1 / 6)


def test_a_network_that_is_given_is_not_trained_before_unless_asked_for(compressed, capsys):
    _, policy, result, _, given = compressed
    before = accuracy(correct(given, images()[1], limit=30))
    assert result["given_acc"] == result["baseline_acc"] == before
    trained = compress_model(given, *images(), policy=policy, baseline__epochs=6, baseline__lr=0.03,
                             baseline__patience=6, **API)
    assert trained[1] == policy and trained[2]["policy_source"]["file"] == "given" and not trained[2]["evaluations"]
    assert trained[2]["given_acc"] == before and trained[2]["baseline_acc"] != before
    assert "accuracy" in capsys.readouterr().out  # without a log it prints


def test_a_missed_goal_is_in_the_notes_and_a_size_counts_the_rest_as_it_is_stored(compressed, monkeypatch):
    given, result = compressed[4], compressed[2]
    monkeypatch.setattr(hirelc.Demands, "holds", lambda self, row: False)
    size, params = result["packed_bytes"] - 100, sum(kernel["params"] for kernel in result["kernels"].values())
    missed = compress_model(given, *images(), pack__rest="float16", goal=f"size:{size}B,drop:0", log=silent(), **API)[2]
    assert any("goal missed (drop): asked for size:" in note for note in missed["notes"]) and not missed["goal"]["met"]
    assert size - 400 < missed["packed_bytes"] <= size
    rest = (result["fp32_bytes"] - 4 * params) / 2  # bytes besides the kernels
    assert missed["target"] == pytest.approx((size - rest) / (4 * params))


@pytest.mark.parametrize("settings, said", [
    *(({key: value}, key.replace("__", ".")) for key, value in (
        ("out", "x"), ("data__image_size", 64), ("data__dir", "x"), ("scratch__epochs", 1), ("model__width", 0.5),
        ("name", "x"), ("exp", 3), ("smoke", True), ("policy_sha256", "00"))),
    ({"no__such": 1}, "unknown setting 'no.such'"), ({"packed": "none/packed.pt"}, "none/packed.pt: cannot be written"),
    *(({"packed": p, "run_dir": "new"}, "cannot be w") for p in (".", "new")), ({"policy": "no.json"}, "no.json")])
def test_what_has_no_effect_or_cannot_be_used_is_refused_before_any_work(settings, said, monkeypatch):
    monkeypatch.setattr(data, "as_images", lambda *_: pytest.fail("work"))
    with pytest.raises(InputError, match=re.escape(said)):
        compress_model(small_network(), None, None, **settings)


@pytest.mark.parametrize("split, bad", [("training images", float("nan")), ("test images", float("inf"))])
def test_images_that_are_not_finite_are_refused_with_their_index(split, bad, monkeypatch):
    monkeypatch.setattr(networks, "prepare", lambda *_: pytest.fail("work"))
    sets = {name: (torch.zeros(12, 3, 16, 16), torch.arange(12) % 3) for name in ("training images", "test images")}
    sets[split][0][7, 1, 2, 3] = bad
    with pytest.raises(InputError, match=f"{split}.* 7 .*not finite|{split}.*not finite.*7"):
        compress_model(small_network(), *sets.values(), **API)


def test_a_policy_for_a_network_from_a_file(compressed, tmp_path, capsys):
    (tmp_path / "policy.json").write_text(json.dumps(compressed[1]))
    (tmp_path / "net.py").write_text("from test_hirelc import small_network as make")
    arguments = ["--model", f"{tmp_path / 'net.py'}:make", "--policy", str(tmp_path / "policy.json"),
                 *command(tmp_path / "runs")[2:], "data.classes=3", "data.image_size=16"]
    assert hirelc.main(arguments) == 0 and "nothing is searched" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "make-seed42" / "policy.json").read_text()) == compressed[1]


@pytest.mark.parametrize("arguments, expected", [
    ("--exp 99", "unknown experiment 99; there are 1, 2"), ("--exp x", "invalid int value"), ("", "--exp"),
    ("--exp 4 --bogus", "unrecognized arguments"), ("--exp 4 --set seed", "key=value"),
    ("--exp 4 --set data.imagesize=64", "did you mean data.image_size"), ("--exp 4 --resume --restart", "one of them"),
    ("--exp 4 --device gpu", "expected one of auto, cpu, cuda"), ("--exp 4 --load none.pt", "none.pt"),
    ("--exp 4 --weights none --data-dir {}", "--smoke"),  # without data: what there is to do
    ("--exp 4 --smoke --weights {}/w.pth", "missing"), ("--exp 4 --smoke --weights none.pth", "none.pth"),
    ("--exp 3 --smoke --set data.image_size=30", "patch"), ("--exp 4 --smoke --set data.batch_size=1", "batch_size"),
    ("--exp 3 4 --smoke --policy p.json", "give one --exp"), ("--exp 3 4 --smoke --load x.pt", "give one --exp"),
    ("--exp 4 --smoke --policy p.json --load x.pt", "no --load"), ("--exp 4 --smoke --policy none.json", "none.json"),
    ("--exp 4 --smoke --set goal=size:1KB", "goal=size:1KB"), ("--exp 4 --weights given", "of your own")])
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    assert hirelc.main([*arguments.format(tmp_path).split(), "--out", str(tmp_path / "new" / "runs")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and error.startswith("hirelc: ")
    assert not list((tmp_path / "new").rglob("*"))


def test_switches_and_seeds_hold_inside():
    units = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    was, units[1].fp32_precision = units[1].fp32_precision, "ieee"  # after which allow_tf32 cannot be read
    modes = lambda: [*(u.fp32_precision for u in units), torch.get_deterministic_debug_mode(), torch.get_num_threads()]
    before, drawn = modes(), []
    for tf32, seed in ((True, 42), (False, 7), (True, 42)):
        with networks.switches(override(Config(), {"tf32": tf32, "seed": seed, "threads": 3})):
            assert modes() == ["tf32" if tf32 else "ieee"] * 3 + [1, 3]
            drawn.append([str(runs.random_states()[key]) for key in ("torch", "numpy", "python")])
        assert modes() == before
    units[1].fp32_precision = was
    assert drawn[0] == drawn[2] and not {*drawn[0]} & {*drawn[1]}


def test_cublas_is_told_to_be_deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back afterwards
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    for there, asked, device in ((True, "cpu", "cpu"), (False, "auto", "cpu"), (True, "auto", "cuda")):
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        assert networks.device_for(override(Config(), {"device": asked})).type == device
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
