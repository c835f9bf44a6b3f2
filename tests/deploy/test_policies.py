"""Policies from files: applied without a search, and refused where they are not what they should be."""

import functools
import json
from types import SimpleNamespace

import pytest
from torch import nn

import hirelc
from compress import BlockConfig, KernelConfig, LayerBudget, NetworkConfig, kernel_shapes
from config import Config, InputError, override
from deploy import policies
from evidence.given import policy_for
from networks import silent
from search import uniform_budgets

BLOCKS = [SimpleNamespace(name="first", kernels={"a": nn.Linear(3, 4), "b": nn.Linear(4, 6)}, whole=()),
          SimpleNamespace(name="second", kernels={"head": nn.Linear(6, 5)}, whole=("head",))]
CHOSEN = NetworkConfig(tuple(BlockConfig(kernels, kernel_shapes(block)) for kernels, block in zip(
    ((KernelConfig(3, 0.4), KernelConfig(8, 0.7)), (KernelConfig(32, 1.0),)), BLOCKS)))
BUDGETS = (LayerBudget(0.25, 0.6, 4, 2.0, "auto"), LayerBudget(0.35, 0.2, 6, 0.5, "quantization"))


def whole():
    return policies.to_policy(BLOCKS, CHOSEN, BUDGETS)


def fit(tmp_path, content, config=Config()):
    (tmp_path / "policy.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return policies.read(str(tmp_path / "policy.json")).fit(BLOCKS, config)


def test_what_a_policy_says_of_a_kernel():
    """3 of 32 bits and ⌊0.4 · 4⌋ = 1 of 4 channels: 3/128 (Eq. 21); the block's 12 and 24 weights by Eq. 30."""
    block = whole()["blocks"][0]
    assert block["kernels"][0] == {
        "name": "a", "bits": 3, "keep": 0.4, "qtype": "INT", "granularity": "uniform", "channels": 4,
        "channels_kept": 1, "keep_actual": 0.25, "retained": 3 / 128}
    assert whole()["blocks"][1]["budget"] == {"target": 0.35, "max_pruning": 0.2, "min_bits": 6, "max_drop": 0.5,
                                              "strategy": "quantization"}
    assert block["retained"] == pytest.approx((12 * 3 / 128 + 24 * 8 / 32 * 4 / 6) / 36)
    assert block["cr"] == 1 / block["retained"]


def test_a_policy_comes_back_as_it_was_written_with_a_note_where_it_has_no_budgets(tmp_path):
    assert fit(tmp_path, whole()) == policies.read(whole()).fit(BLOCKS, Config()) == (CHOSEN, BUDGETS)
    config, log, bare = override(Config(), {"search.target": 0.2}), silent(), policies.to_policy(BLOCKS, CHOSEN)
    assert fit(tmp_path, bare) == (CHOSEN, None)
    chosen, budgets = policy_for(policies.read(bare), BLOCKS, config, log)
    assert chosen == CHOSEN and budgets == uniform_budgets(2, config.search, config.compress)
    assert ["given has no budgets: compliance is that of 0.2" in note for note in log.notes] == [True]


FIRST, HEAD, BUDGET = ("blocks", 0, "kernels", 0), ("blocks", 1, "kernels", 0), ("blocks", 1, "budget")
GONE = object()


@pytest.mark.parametrize("way, value, said", [
    (("format",), 2, "format"), (("blocks",), [], r"blocks\[0:\] are \[\], in the network \['first', 'second'\]"),
    (("blocks",), {"a": 1}, "blocks=a dict of 1, expected a list"), (("blocks", 0, "kernels"), [3], "blocks.*kernels"),
    ((*FIRST, "name"), "b", r"kernels\[0:\] are \['b', 'b'\], in the network \['a', 'b'\]; .* another network"),
    ((*FIRST, "name"), "x\n\x1b[2J" + "y" * 1000, "another network"), (("blocks", 0, "name"), GONE, "None.*first"),
    ((*FIRST, "bits"), 2, r"blocks\[0\] \(first\), kernels\[0\] \(a\): bits=2, expected 3 to 8"),
    ((*FIRST, "bits"), 10 ** 300, "bits=10{199}…"), ((*FIRST, "bits"), True, "bits=True, expected a whole number"),
    ((*FIRST, "keep"), 0.39, "keep=0.39, expected 0.4 to 1"), ((*FIRST, "keep"), 1.01, "0.4 to 1"),
    ((*FIRST, "keep"), "0.5", "keep='0.5', expected a number"), ((*FIRST, "keep"), float("nan"), "keep=nan, expected"),
    ((*FIRST, "keep"), True, "keep=True, expected a number"), ((*HEAD, "keep"), 0.5, "classes"),
    ((*FIRST, "qtype"), "FLOAT", r"='FLOAT', expected INT \(compress.qtype\)"),
    ((*FIRST, "granularity"), [1, 2], "granularity=a list of 2, expected text"),
    ((*FIRST, "channels"), 5, "5 channels there, 4"), (BUDGET, "x", "budget='x', expected an object"),
    (BUDGET, GONE, r"blocks\[1\].*budget is missing"), ((*BUDGET, "target"), 0, "target=0, expected 0.01 to 1"),
    ((*BUDGET, "min_bits"), 4.5, "min_bits"), ((*BUDGET, "max_drop"), float("nan"), "max_drop"),
    ((*BUDGET, "strategy"), "slow", "strategy='slow'")])
def test_what_is_wrong_is_named_with_its_place(tmp_path, way, value, said):
    policy = whole()
    inner = functools.reduce(lambda place, key: place[key], way[:-1], policy)
    inner[way[-1]] = value
    if value is GONE:
        del inner[way[-1]]
    with pytest.raises(InputError, match=said) as error:
        fit(tmp_path, policy)
    said = str(error.value)
    assert said.startswith(str(tmp_path / "policy.json")) and said.isprintable() and len(said) < 1000


def test_what_is_no_policy_is_refused(tmp_path):
    for text, said in (("", "not a policy"), ("null", "format 1"), ("[" * 10 ** 6, "nested")):
        with pytest.raises(InputError, match=said):
            fit(tmp_path, text)
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    for source, said in ((tmp_path, "directory"), ("none.json", "No such file"), ("/dev/zero", "larger"),
                         (tmp_path / "bytes.json", "utf-8"), (3j, "complex"), ({"a": {1, 2}}, "set")):
        with pytest.raises(InputError, match=said):
            policies.read(source)


def test_a_policy_of_a_run_is_applied_without_a_search_in_a_directory_of_its_own(tmp_path, monkeypatch, capsys):
    def run(*more):
        return hirelc.main([*f"--exp 4 --smoke --no-table --out {tmp_path}".split(), *more, "--set", "scratch.epochs=1",
                            "search.cycles=1", "lla.timesteps=4", "hla.timesteps=4", "data.train_images=64"])

    assert run() == 0
    monkeypatch.setattr(hirelc, "LLAEnsemble", lambda *_: pytest.fail("a search"))
    policy = str(tmp_path / "exp4-seed42" / "policy.json")
    assert run("--policy", policy, "--name", "applied") == 0
    before, searched, after, applied = (json.loads((tmp_path / name / file).read_text()) for name in (
        "exp4-seed42", "exp4-applied-seed42") for file in ("policy.json", "result.json"))
    assert after == before and searched["policy_source"] is None and applied["policy_source"]["file"] == policy
    for key in ("acc", "cr", "compliance", "packed_bytes", "deployed_acc"):
        assert applied["cycles"][1][key] == searched["cycles"][1][key]
    before["blocks"][0]["kernels"][0]["bits"] ^= 1
    (tmp_path / "other.json").write_text(json.dumps(before))
    for more in (("--policy", str(tmp_path / "other.json")), ()):  # the directory belongs to that policy
        assert run(*more, "--name", "applied") == 2 and "policy_sha256" in capsys.readouterr().err
