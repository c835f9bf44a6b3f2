"""Policies from files: applied without a search, and refused where they are not what they should be."""

import copy
import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hirelc
from support import policies
from compress import BlockConfig, KernelConfig, NetworkConfig, kernel_shapes, to_policy
from config import Config, InputError, override
from search import LayerBudget, uniform_budgets
from test_hirelc import QUICK, small_network

BLOCKS = [SimpleNamespace(name="first", kernels={"a": nn.Linear(3, 4), "b": nn.Linear(4, 6)}, whole=()),
          SimpleNamespace(name="second", kernels={"head": nn.Linear(6, 5)}, whole=("head",))]
CHOSEN = NetworkConfig(tuple(BlockConfig(kernels, kernel_shapes(block)) for kernels, block in zip(
    ((KernelConfig(3, 0.4), KernelConfig(8, 0.7)), (KernelConfig(32, 1.0),)), BLOCKS)))
BUDGETS = (LayerBudget(0.25, 0.6, 4, 2.0, "auto"), LayerBudget(0.35, 0.2, 6, 0.5, "quantization"))


def whole():
    policy = to_policy(BLOCKS, CHOSEN)
    for entry, budget in zip(policy["blocks"], BUDGETS):
        entry["budget"] = asdict(budget)
    return policy


def fit(tmp_path, content, config=Config()):
    path = tmp_path / "policy.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return policies.read(str(path)).fit(BLOCKS, config)


def test_a_policy_comes_back_as_it_was_written(tmp_path):
    assert fit(tmp_path, whole()) == (CHOSEN, BUDGETS, [])
    assert policies.read(whole()).fit(BLOCKS, Config()) == (CHOSEN, BUDGETS, [])


def test_a_file_without_budgets_gets_neutral_ones_and_a_note(tmp_path):
    config = override(Config(), {"search.target": 0.2, "compress.bits_min": 2})
    chosen, budgets, notes = fit(tmp_path, to_policy(BLOCKS, CHOSEN), config)
    assert chosen == CHOSEN and budgets == uniform_budgets(2, config.search, config.compress)
    assert len(notes) == 1 and "policy.json" in notes[0] and "0.2" in notes[0]


FIRST, HEAD, BUDGET = ("blocks", 0, "kernels", 0), ("blocks", 1, "kernels", 0), ("blocks", 1, "budget")
GONE = object()


@pytest.mark.parametrize("way, value, said", [
    (("format",), True, "format"), (("format",), 1.0, "format"), (("blocks",), [], "blocks"),
    (("blocks", 0, "kernels"), [3], r"blocks\[0\].*kernels"), (("blocks",), {"a": 1}, "blocks"),
    ((*FIRST, "name"), "b", r"blocks\[0\].kernels\[1\].*'b'.*once"), ((*FIRST, "name"), "c", "another network"),
    ((*FIRST, "name"), "x\n\x1b[2J" + "y" * 1000, "another network"),
    (("blocks", 0, "name"), "third", "'third'.*first"), (("blocks", 0, "name"), GONE, "None.*first"),
    ((*FIRST, "bits"), 2, "bits=2, expected 3 to 8"), ((*FIRST, "bits"), 9, "bits=9, expected 3 to 8"),
    ((*FIRST, "bits"), 10 ** 300, "a huge number"), ((*FIRST, "bits"), True, "whole number"),
    ((*FIRST, "bits"), 4.0, "whole number"), ((*FIRST, "keep"), 0.39, "keep=0.39, expected 0.4 to 1"),
    ((*FIRST, "keep"), 1.01, "0.4 to 1"), ((*FIRST, "keep"), True, "a number"), ((*FIRST, "keep"), "0.5", "a number"),
    ((*FIRST, "qtype"), "FLOAT", "compress.qtype=FLOAT"), ((*FIRST, "qtype"), "INT4", "qtype"),
    ((*FIRST, "granularity"), "log", "compress.granularity=log"), ((*FIRST, "granularity"), [], "text"),
    ((*FIRST, "channels"), 5, "5 there, 4 here"), ((*FIRST, "channels"), GONE, "channels is missing"),
    ((*HEAD, "keep"), 0.5, "classes"), (BUDGET, GONE, r"blocks\[1\].*budget is missing"), (BUDGET, 3, "an object"),
    ((*BUDGET, "target"), 0, "target=0, expected 0.01 to 1"), ((*BUDGET, "target"), GONE, "target is missing"),
    ((*BUDGET, "max_pruning"), 2, "max_pruning"), ((*BUDGET, "min_bits"), 4.5, "min_bits"),
    ((*BUDGET, "min_bits"), 33, "min_bits"), ((*BUDGET, "max_drop"), -1, "max_drop"),
    ((*BUDGET, "strategy"), "slow", "strategy='slow'")])
def test_what_is_wrong_is_named_with_its_place(tmp_path, way, value, said):
    policy = whole()
    inner = policy
    for step in way[:-1]:
        inner = inner[step]
    if value is GONE:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    with pytest.raises(InputError, match=said) as error:
        fit(tmp_path, policy)
    assert str(error.value).startswith(str(tmp_path / "policy.json")) and str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_values_that_the_settings_leave_open_are_taken(tmp_path):
    policy = whole()
    policy["blocks"][0]["kernels"][0].update(qtype="FLOAT", granularity="per-channel", bits=2, keep=0.1)
    config = override(Config(), {"compress.qtype": "any", "compress.granularity": "any", "compress.bits_min": 2,
                                 "compress.max_pruning": 0.9})
    assert fit(tmp_path, policy, config)[0].blocks[0].kernels[0] == KernelConfig(2, 0.1, "FLOAT", "per-channel")


def test_a_block_in_two_parts_and_kernels_of_another_block_are_refused(tmp_path):
    split = whole()
    first = split["blocks"][0]
    split["blocks"].append({**first, "kernels": [first["kernels"].pop()]})
    moved = whole()
    moved["blocks"][1]["kernels"].append(moved["blocks"][0]["kernels"].pop())
    for policy, said in ((split, "twice"), (moved, "'b' is in block 'second' there, in first here")):
        with pytest.raises(InputError, match=said):
            fit(tmp_path, policy)


@pytest.mark.parametrize("text, said", [
    ("", "not a policy"), ("{", "not a policy"), ("null", "format 1"), ("[" * 10 ** 6, "nested"),
    ("9" * 10 ** 5, "not a policy"),
    ('{"format": 1, "format": 1}', "twice"), ('{"format": NaN}', "finite"), ('{"format": 1e999}', "finite"),
    ('{"format": -Infinity}', "finite"), (" " * (5 << 20), "larger than"), ('"\\ud800"', "format 1")])
def test_text_that_is_no_policy_is_refused(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        fit(tmp_path, text)


def test_other_things_than_a_file_are_refused(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    for source, said in ((tmp_path, "cannot be read"), (tmp_path / "none.json", "cannot be read"),
                         ("/dev/zero", "regular"), (tmp_path / "bytes.json", "utf-8")):
        with pytest.raises(InputError, match=said):
            policies.read(source)
    endless = {}
    endless["a"] = endless
    for content in (3j, {"a": {1, 2}}, endless, {"format": float("nan")}):
        with pytest.raises(InputError, match="policy"):
            policies.read(content)


# ---------------------------------------------------------------------------------------------------------------
# Runs


def command(tmp_path, *more):
    return hirelc.main(["--exp", "4", "--smoke", "--no-table", "--out", str(tmp_path / "runs"), *more, "--set", *QUICK])


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_policy_of_a_run_is_applied_without_a_search(tmp_path, monkeypatch, capsys):
    assert command(tmp_path) == 0
    searched = tmp_path / "runs" / "exp4-seed42"
    for name in ("train_hla", "warm_up_surrogate"):
        monkeypatch.setattr(hirelc.HiReLC, name, lambda *_: pytest.fail("a search"))
    monkeypatch.setattr(hirelc, "train_together", lambda *_: pytest.fail("a search"))
    policy = ("--policy", str(searched / "policy.json"))
    assert command(tmp_path, *policy, "--name", "applied") == 0
    applied = tmp_path / "runs" / "exp4-applied-seed42"
    assert json.loads((applied / "policy.json").read_text()) == json.loads((searched / "policy.json").read_text())
    before, after = (json.loads((path / "result.json").read_text()) for path in (searched, applied))
    assert before["policy_source"] is None and after["policy_source"]["file"] == policy[1]
    best = before["cycles"][before["best_cycle"]]
    row = after["cycles"][1]
    same = ["cr", "compliance"] + ["acc", "packed_bytes", "deployed_acc"] * (before["best_cycle"] == 1)
    assert [row[key] for key in same] == [best[key] for key in same]
    assert len(after["cycles"]) == 2 and after["best_cycle"] == 1 and after["baseline_acc"] == before["baseline_acc"]
    settings = json.loads((applied / "config.json").read_text())["settings"]
    assert settings["policy"] == policy[1] and settings["policy_sha256"] == after["policy_source"]["sha256"]

    # The directory belongs to that policy: a copy elsewhere is the same, another one and a search are not.
    kept = files(tmp_path)
    capsys.readouterr()
    changed = json.loads((searched / "policy.json").read_text())
    changed["blocks"][0]["kernels"][0]["bits"] ^= 1
    other, copied = tmp_path / "other.json", tmp_path / "copied.json"
    other.write_text(json.dumps(changed))
    copied.write_bytes((searched / "policy.json").read_bytes())
    monkeypatch.undo()
    for more in (("--policy", str(other), "--name", "applied"), ("--name", "applied"), policy):
        assert command(tmp_path, *more) == 2
        assert "policy_sha256" in capsys.readouterr().err
    assert {path: seen for path, seen in files(tmp_path / "runs").items() if path.is_file()} == \
        {path: seen for path, seen in kept.items() if path.is_file()}
    assert command(tmp_path, "--policy", str(copied), "--name", "applied") == 0


@pytest.mark.parametrize("arguments, said", [
    (["--exp", "4", "5", "--smoke", "--policy", "POLICY"], "one --exp"),
    (["--exp", "4", "--load", "packed.pt", "--policy", "POLICY"], "no --load"),
    (["--exp", "4", "--policy", ""], "--policy"),
    (["--exp", "4", "--smoke", "--policy", "none.json"], "none.json.*cannot be read"),
    (["--exp", "4", "--smoke", "--policy", "POLICY"], "another network"),
    (["--exp", "4", "--smoke", "--policy", "POLICY", "--set", "policy_sha256=00"], "SHA-256"),
    (["--exp", "4", "--smoke", "--set", "policy_sha256=00"], "policy_sha256")])
def test_what_cannot_be_applied_is_one_line_and_leaves_no_trace(tmp_path, capsys, arguments, said):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(whole()))
    before = files(tmp_path)
    out = str(tmp_path / "runs")
    assert hirelc.main([str(path) if a == "POLICY" else a for a in arguments] + ["--out", out]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(said, line)
    assert files(tmp_path) == before


def test_a_network_of_ones_own_takes_a_policy_as_a_dictionary_or_a_path(tmp_path):
    torch.manual_seed(1)
    images = (torch.randn(40, 3, 16, 16), torch.randint(0, 3, (40,)))
    small = dict(search__cycles=1, lla__timesteps=4, hla__timesteps=4, baseline__epochs=0, finetune__epochs=1,
                 sensitivity__images=2, search__proxy_batches=1, device="cpu", data__batch_size=16)
    network = small_network()
    _, policy, result = hirelc.compress_model(network, images, images, **small)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    again = copy.deepcopy(policy)
    for given in (policy, str(path), path):
        compressed, applied, measured = hirelc.compress_model(network, images, images, policy=given, **small)
        assert applied == again and measured["cr"] == result["cr"]
        assert measured["final_acc"] == result["final_acc"] and measured["mean_kl"] == {}
        assert measured["policy_source"]["file"] == ("given" if isinstance(given, dict) else str(path))
    with pytest.raises(InputError, match="policy"):
        hirelc.compress_model(network, images, images, policy={}, **small)


def test_the_command_line_applies_a_policy_to_a_network_of_ones_own(tmp_path):
    source = tmp_path / "net.py"
    source.write_text("import sys\nfrom torch import nn\n\ndef make(num_classes):\n    return nn.Sequential("
                      "nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), "
                      "nn.Flatten(), nn.Linear(8, num_classes))\n")
    common = ["--model", f"{source}:make", "--smoke", "--weights", "none", "--no-table", "--out",
              str(tmp_path / "runs"), "--set", *QUICK]
    assert hirelc.main(common) == 0
    found = tmp_path / "runs" / "make-seed42" / "policy.json"
    assert hirelc.main(["--policy", str(found), "--name", "applied", *common]) == 0
    applied = tmp_path / "runs" / "applied-seed42" / "policy.json"
    assert json.loads(applied.read_text()) == json.loads(found.read_text())
