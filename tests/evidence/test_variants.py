"""variants.py, and run_all.sh with several seeds and --paper."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import hirelc
from evidence import variants
from config import BASELINES, flatten
from test_hirelc import ROOT, run_all, small_run, stub, tensors_equal  # noqa: F401 (a fixture)


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

    def main(argv, trained):
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


def test_a_training_that_runs_have_in_common_is_done_once(monkeypatch):
    """The second run, with another search, ends as it does by itself."""
    epochs, run_epoch = [], hirelc.Trainer.run_epoch

    def counted(trainer, *rest):
        epochs.append(1)
        return run_epoch(trainer, *rest)

    monkeypatch.setattr(hirelc.Trainer, "run_epoch", counted)
    warm = {"surrogate.enabled": True, "surrogate.warmup": 2, "surrogate.min_samples": 2}
    alone, trained, runs = small_run(**{"search": "null", **warm}), {}, []
    alone.trained = {}
    wanted = alone.run()
    count = len(epochs)
    for search in ("hirelc", "null"):
        epochs.clear()
        run = small_run(**{"search": search, **warm})
        run.trained = trained
        runs.append(run.run())
    assert len(epochs) == count - 1 - 2 and len(trained) == 1 + 2  # the baseline, two samples of the warm-up
    said = [note for note in runs[1]["notes"] if "the run before" in note]
    assert len(said) == 2 and not any("the run before" in note for note in runs[0]["notes"])
    for result in (wanted, runs[1]):
        del result["timings"], result["notes"]
    assert runs[1] == wanted and tensors_equal(run.best_state, alone.best_state)
    other = small_run(**{"baseline.lr": 2e-4})  # another training
    other.trained = trained
    other.train_baseline()
    assert len(trained) == 4
    other = small_run(**warm, **{"compress.bits_max": 6})  # the same training, other samples
    other.trained = trained
    other.run()
    assert len(trained) == 6


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
    done, calls = run_all(stub, *seeds, "--paper", "--out", str(tmp_path), "--smoke", "--jobs", "1")
    assert [c.split()[1:5] for c in calls[:14]] == [
        ["--exp", str(exp), "--seed", seed] for seed in "12" for exp in range(1, 8)]
    flags = f"--out {tmp_path} --no-table --resume --smoke"
    assert calls[14:] == [f"variants.py --exp 4 --seeds 1 2 {flags}",
                          f"variants.py --exp 1 --seeds 1 --only no-hla a2c no-sens {flags}", f"report.py {tmp_path}"]
    assert done.stderr.count("\n") == 2  # experiment 3, which the stand-in lets fail


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")
def test_run_all_without_paper_runs_no_variants(stub, tmp_path):  # noqa: F811
    _, calls = run_all(stub, "--seeds", "7", "--out", str(tmp_path))
    assert len(calls) == 8 and not any("variants" in call for call in calls)


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")
def test_run_all_with_several_jobs_runs_the_same(stub, tmp_path):  # noqa: F811
    flags = ["--seeds", "1", "2", "--paper", "--smoke", "--out", str(tmp_path)]
    one, calls = run_all(stub, *flags, "--jobs", "1")
    (stub.parent / f"{stub.name}.calls").unlink()
    stub.write_text(stub.read_text().replace("exit 0", "echo first; echo last; sleep 0.1; exit 0"))
    several, others = run_all(stub, *flags, "--jobs", "3")
    assert sorted(others) == sorted(calls) and others[-1] == calls[-1] and several.returncode == one.returncode == 1
    assert sorted(several.stderr.splitlines()) == sorted(one.stderr.splitlines())
    assert sorted(several.stdout.splitlines()[:16]) == sorted(
        ["ablations and baselines of experiment 4: last", "the paper's ablations of experiment 1: last",
         *(f"exp {e} seed {s}: {'' if e == 3 else 'last'}" for s in "12" for e in range(1, 8))])


@pytest.mark.skipif((ROOT / ".venv").exists(), reason="run_all.sh would use .venv here")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_all_ends_its_runs_when_it_is_stopped(stub, tmp_path, number, code):  # noqa: F811
    stub.write_text("#!/usr/bin/env bash\n[ \"$1\" != -c ] || exit 0\ntrap 'echo $1 >> \"$0.ended\"; exit 143' TERM\n"
                    "echo begun >> \"$0.calls\"\nwhile :; do sleep 0.05; done\n")
    process = subprocess.Popen(["bash", str(ROOT / "run_all.sh"), "--jobs", "2", "--out", str(tmp_path)],
                               env={**os.environ, "PYTHON": str(stub)}, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    begun, ended = Path(f"{stub}.calls"), Path(f"{stub}.ended")
    deadline = time.monotonic() + 30
    while (not begun.exists() or begun.read_text().count("begun") < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "run_all: stopped\n" and process.returncode == code
    assert ended.read_text().count("hirelc.py") == 2
