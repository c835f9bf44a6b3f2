"""variants.py, and run_all.sh with several seeds and --paper."""

import pytest

import hirelc
import variants
from config import BASELINES, flatten
from test_hirelc import ROOT, run_all, stub  # noqa: F401 (a fixture)


def resolved(flags):
    args = hirelc._parser().parse_args(["--exp", "4", *flags])
    given = {key: getattr(args, name) for name, key in hirelc.FLAGS.items() if getattr(args, name) not in (None, False)}
    return flatten(hirelc.resolve(4, given, args.set))


def test_every_variant_differs_from_the_experiment_and_from_every_other():
    plain, seen = resolved([]), []
    for name, flags in variants.VARIANTS.items():
        change = {key: value for key, value in resolved(flags.split()).items() if plain[key] != value}
        assert change and change not in seen, name
        seen.append(change)
    assert set(BASELINES) | {"no-hla", "a2c", "no-sens", "null", "plus"} <= set(variants.VARIANTS)


@pytest.fixture
def called(monkeypatch):
    calls, codes = [], {}

    def main(argv):
        calls.append(argv)
        code = codes.get(argv[argv.index("--name") + 1], 0)
        if isinstance(code, Exception):
            raise code
        return code

    monkeypatch.setattr(hirelc, "main", main)
    return calls, codes


def test_one_that_fails_does_not_stop_the_others(called, capsys):
    calls, codes = called
    codes.update(null=2, conf=ZeroDivisionError("a fault"))
    assert variants.main(["--exp", "4", "--seeds", "1", "2", "--only", "conf", "null", "a2c", "--smoke", "--set",
                          "lla.timesteps=4"]) == 1
    assert [(c[3], c[c.index("--name") + 1]) for c in calls] == [
        (seed, name) for seed in "12" for name in ("conf", "null", "a2c")]
    assert calls[2] == ["--exp", "4", "--seed", "1", "--smoke", "--set", "lla.timesteps=4", "--name", "a2c", "--set",
                        "lla.algorithms=A2C,A2C,A2C"]
    assert resolved(calls[2][4:])["lla.timesteps"] == 4
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("variants:")] == [
        f"variants: failed: exp 4-{name} seed {seed} (exit {code})" for seed in "12" for name, code in (("conf", 1),
                                                                                                   ("null", 2))]


@pytest.mark.parametrize("code", [130, 143])
def test_a_signal_stops_them_all(called, code):
    calls, codes = called
    codes["no-hla"] = code
    assert variants.main(["--exp", "4", "--seeds", "1", "2"]) == code and len(calls) == 1


@pytest.mark.parametrize("argv", [[], ["--exp", "x"], ["--exp", "4", "--only", "nothing"], ["--exp", "4", "--seeds"]])
def test_bad_input_is_one_line(called, capsys, argv):
    assert variants.main(argv) == 2 and called[0] == []
    err = capsys.readouterr().err
    assert err.startswith("variants: ") and err.count("\n") == 1


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")
@pytest.mark.parametrize("seeds", [["--seeds", "1", "2"], ["--seeds", "1,2"], ["--seeds=1,2"], ["--seeds", "1,", "2"]])
def test_run_all_takes_seeds_either_way_and_ends_with_the_report(stub, tmp_path, seeds):  # noqa: F811
    done, calls = run_all(stub, *seeds, "--paper", "--out", str(tmp_path), "--smoke")
    assert [c.split()[1:5] for c in calls[:14]] == [
        ["--exp", str(exp), "--seed", seed] for seed in "12" for exp in range(1, 8)]
    assert calls[14:] == [f"variants.py --exp 4 --seeds 1 2 --out {tmp_path} --no-table --resume --smoke",
                          f"report.py {tmp_path}"]
    assert done.stderr.count("\n") == 2  # experiment 3, which the stand-in lets fail


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")
def test_run_all_without_paper_runs_no_variants(stub, tmp_path):  # noqa: F811
    _, calls = run_all(stub, "--seeds", "7", "--out", str(tmp_path))
    assert len(calls) == 8 and not any("variants" in call for call in calls)
