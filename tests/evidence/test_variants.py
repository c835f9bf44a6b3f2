"""Variants of an experiment: their settings, failures and signals, and the network that they have in common."""

from types import SimpleNamespace

import pytest

import hirelc
from config import BASELINES, flatten
from deploy import pack
from evidence import variants
from support.cli import arguments
from support.runs import run_directory


def resolved(flags):
    return flatten(arguments(["--exp", "4", *flags])[1][0])


def test_every_variant_differs_from_the_experiment_and_from_every_other():
    plain, seen = resolved([]), []
    for name, flags in variants.VARIANTS.items():
        change = {key: value for key, value in resolved(flags.split()).items() if plain[key] != value}
        assert change and change not in seen, name
        seen.append(change)
    assert set(BASELINES) | {"no-hla", "a2c", "no-sens", "null", "plus"} <= set(variants.VARIANTS)


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Calls of a stand-in for hirelc.main, which leaves a network where its exit code, by name, is 0 or 3."""
    calls, codes = [], {}

    def main(argv):
        calls.append(argv)
        config = arguments(argv)[1][0]
        code = codes.get(config.name, 0)
        if isinstance(code, Exception):
            raise code
        if code in (0, 3):
            run_directory(config).mkdir(parents=True, exist_ok=True)
            (run_directory(config) / "baseline.pt").touch()
        return code

    monkeypatch.setattr(hirelc, "main", main)
    monkeypatch.setattr(pack, "read", lambda path: SimpleNamespace(network={"quick_gelu": codes.get("quick", False)}))
    monkeypatch.chdir(tmp_path)
    return calls, codes


def test_one_that_fails_does_not_stop_the_others(called, capsys):
    calls, codes = called
    codes.update(null=2, conf=ZeroDivisionError("a fault"))
    assert variants.main(["--exp", "4", "--seeds", "1", "2", "--only", "conf", "null", "a2c", "--smoke", "--set",
                          "lla.timesteps=4"]) == 1
    assert [(c[3], c[c.index("--name") + 1]) for c in calls] == [
        (seed, name) for seed in "12" for name in ("conf", "null", "a2c")]
    assert calls[2] == ["--exp", "4", "--seed", "1", "--smoke", "--set", "lla.timesteps=4", "--name", "a2c", "--set",
                        "lla.algorithms=A2C,A2C,A2C"]  # nobody before has left a network
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("variants:")] == [
        f"variants: failed: exp 4-{name} (exit {code})" for name, code in (
            ("conf seed 1", 1), ("null seed 1", 2), ("conf seed 2", 1), ("null seed 2", 2))]


@pytest.mark.parametrize("quick", [False, True])
def test_the_first_network_of_a_seed_is_given_to_the_others(called, quick):
    calls, codes = called
    codes.update(null=2, conf=3, quick=quick)  # a missed goal has a network
    variants.main(["--exp", "2", "--only", "null", "conf", "plus", "--weights", "none"])
    found = [flatten(arguments(call)[1][0]) for call in calls]
    assert [(f["model.weights"], f["baseline.epochs"], f["model.quick_gelu"]) for f in found] == [
        ("none", 3, "auto"), ("none", 3, "auto"), ("runs/exp2-conf-seed42/baseline.pt", 0, "on" if quick else "auto")]


@pytest.mark.parametrize("code", [130, 143])
def test_a_signal_stops_them_all(called, code):
    calls, codes = called
    codes["no-hla"] = code
    assert variants.main(["--exp", "4", "--seeds", "1", "2"]) == code and len(calls) == 1
