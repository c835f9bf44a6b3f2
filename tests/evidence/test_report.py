"""report.py and log.py: intervals by hand, whole files or none, tables cell by cell, lines on a fake clock."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys

import pytest

from support import log as log_module
from evidence import report
from evidence import tables
from config import EXPERIMENTS, InputError
from support.log import Log, duration
from evidence.report import read_results, results_table, write_json, write_text
from evidence.stats import wilson

# Statistics


@pytest.mark.parametrize("hits, n, low, high", [
    # Roots of (hits/n - p)^2 = z^2 p (1 - p)/n in 40 decimal digits, z = 1.95996398454.
    (0, 10, 0.0, 27.753280), (5, 10, 23.659309, 76.340691), (10, 10, 72.246720, 100.0), (1, 3, 6.149194, 79.234040),
    (1112, 1280, 84.914276, 88.615053)])
def test_wilson_by_hand(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_never_leaves_the_range_of_percentages():
    for n in range(1, 2000):
        assert wilson(0, n)[0] >= 0 and wilson(n, n)[1] <= 100
        assert wilson(0, n)[1] > 0 and wilson(n, n)[0] < 100


@pytest.mark.parametrize("hits, n", [(-1, 10), (11, 10), (0, 0), (0, -1), (-2, -1)])
def test_wilson_refuses_what_is_no_proportion(hits, n):
    with pytest.raises(ValueError, match=f"{hits}.*{n}"):
        wilson(hits, n)


# Files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_by_the_new_text_alone(tmp_path):
    path = tmp_path / "results.md"
    write_text(path, "a longer first text\n")
    write_text(str(path), "± ρ\n")
    assert path.read_bytes() == "± ρ\n".encode()
    assert names(tmp_path) == ["results.md"]


def test_a_text_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it " * 10_000 + "\ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.md"]


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "results.md").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "results.md", "text")
    assert names(tmp_path) == ["results.md"]


def test_json_comes_back_as_it_was(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"c": "±"}}
    write_json(tmp_path / "result.json", value)
    assert json.loads((tmp_path / "result.json").read_text()) == value
    assert (tmp_path / "result.json").read_text().endswith("}\n")


@pytest.mark.parametrize("value, error", [(math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError),
                                          (object(), TypeError)])
def test_json_that_is_none_keeps_the_old_file(tmp_path, value, error):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(error):
        write_json(path, {"rows": [{"acc": 1.0}, {"acc": value}]})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


# Results


def result(**changes):
    """A result.json in which every number differs from every other."""
    return {**{
        "exp": 1, "name": "", "smoke": False, "seed": 42, "model": "deit_small_patch16_224", "data": "cifar100",
        "eval_images": 1280, "test_images": 10_000,
        "baseline_acc": 87.1094, "final_acc": 85.4688, "drop": 1.6406, "deployed_acc": 84.2969, "cr": 6.5432,
        "target": 0.25, "retained": 0.1528, "voted_retained": 0.1528, "voted_compliance": 61.2345,
        "scope": "paper", "mode": "qat", "fp32_bytes": 87_654_321, "packed_bytes": 16_136_360,
        "whole_model_ratio": 5.4321, "compliance": 61.2345, "cr_met": True, "drop_met": False,
        "null_controller": {"cr_mean": 6.7012, "cr_std": 0.2109, "compliance_mean": 60.9512, "compliance_std": 2.0512},
        "baseline_acc_full": None, "final_acc_full": None, "deployed_acc_full": None,
        "baseline_interval_full": None, "final_interval_full": None, "deployed_interval_full": None}, **changes}


def full(**changes):
    return result(baseline_acc_full=87.01, baseline_interval_full=[86.336, 87.654], final_acc_full=85.2,
                  final_interval_full=[84.491, 85.882], deployed_acc_full=84.019, deployed_interval_full=[83.29, 84.72],
                  **changes)


def put(out, folder, value):
    (out / folder).mkdir(parents=True)
    (out / folder / "result.json").write_text(value if isinstance(value, str) else json.dumps(value))


def cells(table):
    """Rows of a Markdown table as lists of cells, title row first, ruler left out."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"\|(---\|)+", lines[1]) and lines[1].count("---") == lines[0].count("|") - 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_results_are_read_in_the_order_of_experiment_variant_and_seed(tmp_path):
    runs = [(10, "", 42), (2, "no-hla", 5), (2, "", 42), (2, "a2c", 42), (2, "", 5), (1, "", 44)]
    for number, (exp, name, seed) in enumerate(runs):
        put(tmp_path, f"run{number}", result(exp=exp, name=name, seed=seed))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "results.md").write_text("of an earlier call")
    found = [(r["exp"], r["name"], r["seed"]) for r in read_results(tmp_path)]
    assert found == [(1, "", 44), (2, "", 5), (2, "", 42), (2, "a2c", 42), (2, "no-hla", 5), (10, "", 42)]
    assert read_results(str(tmp_path))[0] == result(exp=1, seed=44)


BROKEN = {"empty": "", "cut": '{"exp": 1, "seed"', "list": "[]", "number": "3", "text": '"exp seed"', "null": "null",
          "no seed": '{"exp": 1}', "no exp": '{"seed": 1}'}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_result_is_named(tmp_path, text):
    put(tmp_path, "good", result())
    put(tmp_path, "bad", text)
    with pytest.raises(InputError) as caught:
        read_results(tmp_path)
    assert str(tmp_path / "bad" / "result.json") in str(caught.value)
    assert str(tmp_path / "good") not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe{")], ids=["folder", "bytes"])
def test_a_result_that_cannot_be_read_is_named(tmp_path, make):
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad" / "result.json")
    with pytest.raises(InputError, match="result.json"):
        read_results(tmp_path)


# The table


def test_every_number_stands_under_its_title():
    titles, row = cells(results_table([result()], markdown=True))
    assert titles == ["exp", "network, data", "seed", "scope", "mode", "baseline", "final", "drop", "deployed", "CR",
                      "FP32 KB", "packed KB", "ratio", "compl.", "Eq. 3", "null: CR", "compl.", "paper: base", "final", "drop", "CR", "compl."]
    assert row == ["1", "deit_small_patch16_224, cifar100", "42", "paper", "qat", "87.11", "85.47", "1.64", "84.30",
                   "6.54", "87654.3", "16136.4", "5.43", "61.2", "no", "6.70±0.21", "61.0±2.1", "86.88", "85.16", "1.72", "6.23", "59.8"]


def test_an_enforced_target_is_told_with_what_was_voted():
    text = results_table([result(), result(exp=4, name="small", target=0.15, retained=0.1493, voted_retained=0.1366,
                                           voted_compliance=58.91)])
    line, = [line for line in text.splitlines() if "for a target" in line]
    assert line.strip() == ("exp 4-small seed 42: rho 0.1493 for a target of 0.1500 (voted 0.1366), compliance 61.2 % "
                            "(voted 58.9 %)")
    assert "for a target" not in results_table([result()])


def test_the_paper_s_numbers_stand_beside_each_experiment():
    rows = cells(results_table([result(exp=n) for n in (1, 2, 3, 4, 5, 6, 7)], markdown=True))[1:]
    assert [row[0] for row in rows] == list("1234567")
    assert [row[17:] for row in rows] == [
        ["86.88", "85.16", "1.72", "6.23", "59.8"], ["57.50", "56.95", "0.55", "6.63", "59.2"],
        ["89.22", "93.05", "-3.83", "6.64", "-"], ["75.16", "70.94", "4.22", "5.99", "60.9"],
        ["76.56", "70.94", "5.62", "6.59", "62.4"], ["87.42", "86.25", "1.17", "6.27", "58.3"],
        ["90.70", "88.59", "2.11", "6.72", "59.7"]]


def test_seven_results_give_seven_aligned_rows_of_text():
    runs = [result(exp=n, model=EXPERIMENTS[n].settings["model.name"], data=EXPERIMENTS[n].settings["data.name"])
            for n in range(1, 8)]
    lines = results_table(runs).splitlines()
    head, ruler, rows = lines[0], lines[1], lines[2:9]
    assert set(ruler) == {"-"} and lines[9] == ""
    assert len({len(line) for line in lines[:9]}) == 1
    assert [row.split()[:4] for row in rows[:2]] == [["1", "deit_small_patch16_224,", "cifar100", "42"],
                                                     ["2", "vit_base_patch32_clip_224,", "cifar100", "42"]]
    for title, value in (("baseline", "87.11"), ("deployed", "84.30"), ("ratio", "5.43"), ("null: CR", "6.70±0.21")):
        end = head.index(title) + len(title)
        assert all(row[:end].endswith(" " + value) for row in rows), title


def test_the_rows_stay_in_the_order_given():
    rows = cells(results_table([result(exp=3), result(exp=1)], markdown=True))[1:]
    assert [row[0] for row in rows] == ["3", "1"]


def test_a_variant_is_named_and_a_network_of_one_s_own_has_no_paper():
    rows = cells(results_table([result(name="no-hla", seed=43), result(exp=0, model="mine"),
                                result(exp=0, name="wide")], markdown=True))[1:]
    assert [row[0] for row in rows] == ["1-no-hla", "0", "0-wide"]
    assert rows[0][2] == "43" and rows[1][1] == "mine, cifar100"
    assert rows[0][17] == "86.88" and rows[1][17:] == ["-"] * 5
    assert rows[1][5:7] == ["87.11", "85.47"]


def test_numbers_that_were_not_measured_are_dashes():
    row = cells(results_table([result(deployed_acc=None, compliance=None)], markdown=True))[1]
    assert (row[8], row[13]) == ("-", "-")
    assert "-" not in row[5:8] + row[9:13]


def test_a_gain_is_a_negative_drop():
    assert cells(results_table([result(drop=-3.828125)], markdown=True))[1][7] == "-3.83"


@pytest.mark.parametrize("cr_met, drop_met, word", [(True, True, "met"), (True, False, "no"), (False, True, "no"),
                                                    (False, False, "no")])
def test_equation_3_needs_both_conditions(cr_met, drop_met, word):
    assert cells(results_table([result(cr_met=cr_met, drop_met=drop_met)], markdown=True))[1][14] == word


@pytest.mark.parametrize("markdown", [False, True])
def test_the_legend_says_what_the_numbers_are_of(markdown):
    text = results_table([result(), result(eval_images=200)], markdown)
    assert "first 200 or 1280 test images" in text
    assert "smoke" not in text and "Wilson" not in text
    legend = text.partition("\n\n")[2]
    for word in ("final:", "deployed:", "scope:", "CR:", "packed KB:", "ratio:", "compl.:", "Eq. 3:", "null:"):
        assert word in legend, word


@pytest.mark.parametrize("markdown", [False, True])
def test_smoke_runs_are_marked_and_explained(markdown):
    text = results_table([result(smoke=True, data="synthetic"), result(exp=2)], markdown)
    marked = [line for line in text.splitlines() if "(smoke)" in line]
    assert len(marked) == 1 and "synthetic (smoke)" in marked[0]
    assert text.count("smoke: ") == 1 and "not the numbers" in text


@pytest.mark.parametrize("markdown", [False, True])
def test_the_whole_split_has_a_line_per_run_that_scored_it(markdown):
    text = results_table([full(), result(exp=2), full(exp=3, name="any", seed=7, test_images=9_999)], markdown)
    lines = [line.removeprefix("- ").strip() for line in text.splitlines() if "n = " in line]
    numbers = "baseline 87.01 [86.34, 87.65], final 85.20 [84.49, 85.88], deployed 84.02"
    assert lines == [f"exp 1 seed 42: {numbers} (n = 10000)", f"exp 3-any seed 7: {numbers} (n = 9999)"]
    assert text.count("95 % Wilson") == 1


def test_the_markdown_table_ends_with_an_empty_line():
    # Without it the legend would become a row of the table.
    lines = results_table([result()], markdown=True).splitlines()
    assert lines[2].startswith("|") and lines[3] == "" and lines[4]
    assert not any(line.startswith("|") for line in lines[3:])


# The command line


def one_line(capsys):
    """The one line on stderr; nothing was printed."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n") and err.startswith("report: ")
    return err


def test_main_prints_the_table_and_writes_it(tmp_path, capsys):
    put(tmp_path, "exp3-seed42", full(exp=3))
    put(tmp_path, "exp1-seed42", result())
    assert report.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["1", "3"]
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert [row[0] for row in cells(written.partition("\n## ")[0])] == ["exp", "1", "3"] and written.endswith("\n")
    assert [line for line in written.splitlines() if line.startswith("## ")] == [
        "## Table 2: the experiments", "## Table 3: uncertainty over seeds",
        "## Table 4: kernels, surrogate, strategies, budget compliance", "## Table 5: ablations",
        "## All methods and ablations", "## How far the agents are from the null controller"]
    assert "95 % Wilson" in out and "95 % Wilson" in written
    assert report.main([str(tmp_path)]) == 0  # the table beside the runs does not disturb a second call


@pytest.mark.parametrize("argv", [[], ["a", "b"]])
def test_main_without_one_folder_shows_the_usage(argv, capsys):
    assert report.main(argv) == 2
    assert "usage: python report.py OUT" in one_line(capsys)


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_main_on_a_folder_without_results_names_it(tmp_path, capsys, folder):
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / folder)]) == 2
    assert str(tmp_path / folder) in one_line(capsys)
    assert names(tmp_path) == ["empty"] and names(tmp_path / "empty") == []


@pytest.mark.parametrize("text", ["{", '{"exp": 1}'])
def test_main_on_a_broken_result_names_the_file(tmp_path, capsys, text):
    put(tmp_path, "good", result())
    put(tmp_path, "bad", text)
    assert report.main([str(tmp_path)]) == 2
    assert str(tmp_path / "bad" / "result.json") in one_line(capsys)
    assert names(tmp_path) == ["bad", "good"]


@pytest.mark.parametrize("missing", ["name", "null_controller", "cr"])
def test_main_on_a_result_that_lacks_a_number_names_the_file(tmp_path, capsys, missing):
    value = result()
    del value[missing]
    put(tmp_path, "bad", value)
    assert report.main([str(tmp_path)]) == 2
    assert str(tmp_path / "bad" / "result.json") in one_line(capsys)


def test_the_program_ends_with_its_exit_code(tmp_path):
    program = os.path.abspath(report.__file__)
    put(tmp_path, "exp1-seed42", result())
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    good = subprocess.run([sys.executable, program, str(tmp_path)], capture_output=True, cwd=tmp_path, env=environment)
    bad = subprocess.run([sys.executable, program], capture_output=True, cwd=tmp_path, env=environment)
    assert (good.returncode, good.stderr) == (0, b"") and b"87.11" in good.stdout
    assert (bad.returncode, bad.stdout, bad.stderr.count(b"\n")) == (2, b"", 1)


# log.py


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (42, "42s"), (42.4, "42s"), (59.4, "59s"), (59.6, "1m00s"), (60, "1m00s"), (185, "3m05s"),
    (3599.4, "59m59s"), (3599.6, "1h00m"), (3600, "1h00m"), (7620, "2h07m"), (7679, "2h07m"), (90_061, "25h01m")])
def test_duration_as_a_person_reads_it(seconds, text):
    assert duration(seconds) == text


class Clock:
    """Stands in for the time module: monotonic() is `now`, every time of day is 12:34:56."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def strftime(self, form):
        return form.replace("%H:%M:%S", "12:34:56")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(log_module, "time", Clock())
    return log_module.time


def screen(text):
    """The lines that a terminal shows after `text`: a carriage return goes back to the first column."""
    lines = []
    for line in text.split("\n"):
        row = []
        for piece in line.split("\r"):
            row[:len(piece)] = piece
        lines.append("".join(row).rstrip())
    return lines


def test_lines_go_to_the_stream_and_notes_are_kept(clock):
    stream = io.StringIO()
    log = Log(stream)
    log.info("one")
    log.note("two of three images were skipped")
    assert stream.getvalue() == "one\nnote: two of three images were skipped\n"
    assert log.notes == ["two of three images were skipped"]
    assert Log(stream).notes == []


def test_the_stream_is_standard_output_where_none_is_given(capsys):
    Log().info("hello")
    assert capsys.readouterr().out == "hello\n"


def test_the_file_begins_with_what_was_said_before_it_was_opened(clock, tmp_path):
    stream = io.StringIO()
    log = Log(stream)
    log.info("early")
    log.note("skipped")
    log.open(tmp_path / "run.log")
    log.info("late ± ρ")
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == (
        "12:34:56 early\n12:34:56 note: skipped\n12:34:56 late ± ρ\n")   # there already, before close
    log.close()
    assert stream.getvalue() == "early\nnote: skipped\nlate ± ρ\n"
    assert log.file is None
    log.close()  # a second time does no harm


def test_a_new_run_replaces_the_old_log(clock, tmp_path):
    (tmp_path / "run.log").write_text("of an earlier run\n")
    log = Log(io.StringIO())
    log.open(tmp_path / "run.log")
    log.info("new")
    log.close()
    assert (tmp_path / "run.log").read_text() == "12:34:56 new\n"


def test_piped_progress_is_a_plain_line_at_most_every_interval(clock):
    stream = io.StringIO()
    log = Log(stream, interval=20.0)
    for step in range(100):  # one step a second
        log.progress("training", step, 100)
        clock.now += 1
    log.progress("training", 100, 100)
    lines = stream.getvalue().splitlines()
    assert lines == ["  training: 20/100 (20 %), 1m20s left", "  training: 40/100 (40 %), 1m00s left",
                     "  training: 60/100 (60 %), 40s left", "  training: 80/100 (80 %), 20s left"]
    assert "\r" not in stream.getvalue()


def test_piped_progress_of_short_work_says_nothing(clock):
    stream = io.StringIO()
    log = Log(stream, interval=20.0)
    for work in ("one", "two", "three", "one"):
        for step in range(16):
            log.progress(work, step, 15)
            clock.now += 1
    assert stream.getvalue() == ""


def test_other_work_starts_its_own_clock(clock):
    stream = io.StringIO()
    log = Log(stream, interval=20.0)
    log.progress("reading", 0, 10)
    clock.now += 1000
    log.progress("training", 0, 10)
    clock.now += 30
    log.progress("training", 3, 10)
    assert stream.getvalue() == "  training: 3/10 (30 %), 1m10s left\n"


@pytest.mark.parametrize("last", [4, 1], ids=["finished", "given up"])
def test_the_same_work_again_starts_anew(clock, last):
    # Otherwise the second epoch of the same name would count the pause as its own.
    stream = io.StringIO()
    log = Log(stream, interval=20.0)
    log.progress("evaluation", 0, 4)
    log.progress("evaluation", last, 4)
    clock.now += 1000
    log.progress("evaluation", 0, 4)
    clock.now += 30
    log.progress("evaluation", 2, 4)
    assert stream.getvalue() == "  evaluation: 2/4 (50 %), 30s left\n"


@pytest.mark.parametrize("before", ["reading", "training"])
def test_work_that_first_reports_after_a_step_starts_anew_too(clock, before):
    stream = io.StringIO()
    log = Log(stream, interval=20.0)
    log.progress(before, 0, 10)
    log.progress(before, 10, 10)
    clock.now += 1000
    log.progress("training", 1, 10)
    assert stream.getvalue() == ""
    clock.now += 30
    log.progress("training", 3, 10)
    assert stream.getvalue().startswith("  training: 3/10 (30 %), 1m") and stream.getvalue().count("\n") == 1


def test_other_work_in_the_middle_of_work_starts_anew(clock):
    stream = io.StringIO()
    log = Log(stream, interval=20.0)
    log.progress("reading", 0, 10)
    clock.now += 1000
    log.progress("training", 1, 10)
    assert stream.getvalue() == ""


def test_the_rest_is_reckoned_from_steps_that_were_timed(clock):
    # Work that first reports after ten images: the next ten took 30 s, so the other eighty take 4 minutes.
    stream = io.StringIO()
    log = Log(stream, interval=20.0)
    log.progress("training", 10, 100)
    clock.now += 30
    log.progress("training", 20, 100)
    assert stream.getvalue() == "  training: 20/100 (20 %), 4m00s left\n"


def test_a_terminal_has_one_line_that_is_drawn_over_itself(clock):
    stream = Terminal()
    log = Log(stream)
    log.progress("reading training images", 0, 100)
    shown = []
    for done in (50, 60, 90):
        clock.now += 10
        log.progress("reading training images", done, 100)
        shown.append(screen(stream.getvalue()))
    assert "\n" not in stream.getvalue() and stream.getvalue().startswith("\r")
    assert shown == [["  reading training images: 50/100 (50 %), 10s left"],
                     ["  reading training images: 60/100 (60 %), 13s left"],
                     ["  reading training images: 90/100 (90 %), 3s left"]]  # shorter: nothing of the old line stays


def test_a_terminal_is_not_redrawn_at_every_step(clock):
    stream = Terminal()
    log = Log(stream)
    for step in range(1000):  # one second in all
        log.progress("training", step, 1000)
        clock.now += 0.001
    assert 3 <= stream.getvalue().count("\r") <= 6


def test_the_line_on_a_terminal_is_wiped_before_a_message(clock, tmp_path):
    stream = Terminal()
    log = Log(stream)
    log.open(tmp_path / "run.log")
    log.progress("training", 0, 10)
    clock.now += 5
    log.progress("training", 5, 10)
    log.info("epoch 1")
    assert screen(stream.getvalue()) == ["epoch 1", ""]
    before = len(stream.getvalue())
    log.info("epoch 2")
    assert stream.getvalue()[before:] == "epoch 2\n"  # nothing is left to wipe
    log.close()
    assert (tmp_path / "run.log").read_text() == "12:34:56 epoch 1\n12:34:56 epoch 2\n"


@pytest.mark.parametrize("end", [lambda log: log.progress("training", 10, 10), lambda log: log.close()],
                         ids=["finished", "closed"])
def test_the_line_on_a_terminal_is_wiped_at_the_end(clock, end):
    stream = Terminal()
    log = Log(stream)
    log.progress("training", 0, 10)
    clock.now += 5
    log.progress("training", 5, 10)
    assert screen(stream.getvalue()) == ["  training: 5/10 (50 %), 5s left"]
    end(log)
    assert screen(stream.getvalue()) == [""] and stream.getvalue().endswith("\r")


def test_progress_without_a_total_ends_at_once(clock):
    stream = io.StringIO()
    log = Log(stream, interval=0.0)
    log.progress("reading", 0, 0)
    assert stream.getvalue() == ""


def test_texts_that_a_spreadsheet_takes_for_formulas_are_quoted():
    rows = [["=1+1", "-0.38 [-1.20, +0.40], p 0.3", "+1.5 ± 0.2", "-2+3+cmd|' /C calc'!A0", "@x", -1.5, tables.LOST]]
    text = report.csv_text("abcdefg", rows)
    assert next(csv.reader(text.splitlines()[1:])) == [
        "'=1+1", "-0.38 [-1.20, +0.40], p 0.3", "+1.5 ± 0.2", "'-2+3+cmd|' /C calc'!A0", "'@x", "-1.5", tables.LOST]


def test_a_legend_says_what_chose_by_the_runs_own_protocol():
    paper, held = result(eval_images=100), result(eval_images=30, seed=43, protocol="holdout")
    assert "100 test images, which also chose" in "\n".join(tables.chosen_on([paper]))
    both = tables.chosen_on([paper, held])
    assert len(both) == 2 and "30 images of the held-out 5 %" in both[1]
    assert tables.chosen_on([held]) == both[1:] and both[1] in report.results_table([held])
