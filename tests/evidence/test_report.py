"""Run directories in, the printed table, Markdown and CSV out; broken, incomplete and old directories."""

import csv
import io
import json
import sys

import pytest

from config import EXPERIMENTS, Config, InputError, flatten, override
from evidence import report, report_tables
from evidence.report import read_runs, results_table


def result(**changes):
    """A result.json in which every number differs from every other."""
    return {**{
        "exp": 1, "name": "", "smoke": False, "seed": 42, "model": "deit_small_patch16_224", "data": "cifar100",
        "eval_images": 1280, "test_images": 10_000,
        "baseline_acc": 87.1094, "final_acc": 85.4688, "drop": 1.6406, "deployed_acc": 84.2969, "cr": 6.5432,
        "scope": "paper", "mode": "qat", "fp32_bytes": 87_654_321, "packed_bytes": 16_136_360,
        "compliance": 61.2345, "cr_met": True, "drop_met": False,
        "null_controller": {"cr_mean": 6.7012, "cr_std": 0.2109, "compliance_mean": 60.9512, "compliance_std": 2.0512},
        "final_acc_full": None}, **changes}


def full(**changes):
    return result(**{**{
        "baseline_acc_full": 87.01, "baseline_interval_full": [86.336, 87.654], "final_acc_full": 85.2,
        "final_interval_full": [84.491, 85.882], "deployed_acc_full": 84.019, "deployed_interval_full": [83.29, 84.72]},
        **changes})


POLICY = {"blocks": [{"name": block, "kernels": [
    {"name": f"net.{i}.weight", "bits": 3 + i % 6, "keep": 0.41 + 0.05 * i, "keep_actual": 0.4 + 0.05 * i,
     "qtype": "INT" if i % 2 else "FLOAT", "granularity": "log", "retained": 0.05 + 0.01 * i} for i in numbers]}
    for block, numbers in (("first", range(2)), ("second", range(2, 8)))]}


def put(out, folder, value, changes=(), retired=()):
    """A run directory with everything in it."""
    (out / folder).mkdir(parents=True)
    (out / folder / "result.json").write_text(value if isinstance(value, str) else json.dumps(value))
    value = {"exp": 1, "name": "", "seed": 0} if isinstance(value, str) else value
    made = override(override(Config(), EXPERIMENTS[value["exp"]].settings if value["exp"] else {}), dict(changes))
    config = {"settings": {**flatten(made), "name": value["name"], "seed": value["seed"],
                           **dict(retired)}, "command": ["hirelc.py", "--exp", "1"], "started": "2026-01-02",
              "versions": {"torch": "2"}, "hardware": {"device": "a machine", "threads": 3}}
    (out / folder / "config.json").write_text(json.dumps(config))
    (out / folder / "policy.json").write_text(json.dumps(POLICY))


def cells(text):
    """Rows of a Markdown table as lists of cells, title row first, ruler left out."""
    lines = text.splitlines()
    assert lines[1] == "|" + "---|" * (lines[0].count("|") - 1)
    lines = lines[:lines.index("")]  # without it the legend would become a row of the table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def one_line(capsys):
    """The one line on stderr; nothing was printed."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n") and err.startswith("report: ")
    return err


def test_runs_are_read_in_the_order_of_experiment_variant_and_seed_and_none_twice(tmp_path):
    order = [(10, "", 42), (2, "no-hla", 5), (2, "", 42), (2, "a2c", 42), (2, "", 5), (1, "", 44)]
    for number, (exp, name, seed) in enumerate(order):
        value = result(exp=exp, name=name, seed=seed)
        put(tmp_path, f"run{number}", value if exp < 10 else json.dumps(value))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "results.md").write_text("of an earlier call")
    runs = read_runs(str(tmp_path))
    assert [(r.result["exp"], r.result["name"], r.result["seed"]) for r in runs] == sorted(order)
    assert runs[0].result.items() >= result(exp=1, seed=44).items()
    put(tmp_path, "twice", result(seed=44))
    with pytest.raises(InputError, match=f"{tmp_path / 'twice'}.*{tmp_path / 'run5'}"):
        read_runs(tmp_path)


@pytest.mark.parametrize("text", ["", '{"exp": 1, "seed"', "[]", '{"seed": 1}', *(
    json.dumps(result(**{key: value})) for key, value in (
        ("cycles", 3), ("cycles", [{"cycle": 1}]), ("cr", "6"), ("name", "a\x1bb"), ("packed_bytes", None),
        ("packed_bytes", 0), ("deployed_acc", "much"), ("null_controller", {})))])
def test_a_broken_result_is_named_in_one_line_and_nothing_is_written(tmp_path, capsys, text):
    put(tmp_path, "good", result())
    put(tmp_path, "bad", text)
    assert report.main([str(tmp_path)]) == 2
    line = one_line(capsys)
    assert str(tmp_path / "bad" / "result.json") in line and str(tmp_path / "good") not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


@pytest.mark.parametrize("name, text", [
    ("policy.json", "{"), ("policy.json", '{"blocks": [{"name": "b"}]}'), ("policy.json", b"\xff\xfe{"),
    ("policy.json", None), ("config.json", '{"settings": []}'), ("config.json", '{"settings": {}, "hardware": 3}'),
    ("config.json", '{"settings": {"search.cycles": "many"}}')])
def test_another_broken_file_is_named(tmp_path, capsys, name, text):
    put(tmp_path, "a", result())
    path = tmp_path / "a" / name
    path.unlink()
    path.mkdir() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert report.main([str(tmp_path)]) == 2
    assert str(path) in one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_main_writes_the_verdict_first_and_names_the_settings_of_earlier_code_that_are_gone(tmp_path, capsys):
    put(tmp_path, "new", full(exp=3, seed=43))
    put(tmp_path, "old", full(exp=3), retired={"lla.rounds": 3, "carry": "all"}.items())
    old, new = read_runs(tmp_path)
    assert set(old.retired) == {"lla.rounds", "carry"} and new.retired == ()
    assert len(report_tables.grouped([old, new])[3]) == 2  # not averaged with runs of this version
    assert report.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].startswith("exp 3: ") and "settings that are gone: " in out and "): old\n" in out
    titles = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("## ")]
    assert titles == ["## Verdict", "## All runs", "## The paper's Tables 2 and 4 beside the runs",
                      "## The whole test split: what each step costs", "## Methods and ablations"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Measured by earlier code: 1 of 2 runs" in page and "carry=all lla.rounds=3" in page
    assert report.main([str(tmp_path)]) == 0  # the files beside the runs do not disturb a second call
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_missing_files_are_said_and_a_terminal_without_unicode_gets_the_table(tmp_path, monkeypatch):
    put(tmp_path, "a", result())
    for name in ("policy.json", "config.json"):
        (tmp_path / "a" / name).unlink()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert report.main([str(tmp_path)]) == 0
    sys.stdout.flush()
    assert b"87.11" in sys.stdout.buffer.getvalue()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "config.json, policy.json" in page and "Allocation" not in page
    assert sorted(p.stem for p in (tmp_path / "csv").iterdir()) == ["paper", "runs", "verdict"]


def test_every_number_stands_under_its_title():
    titles, row = cells(report._markdown(report_tables.runs_table([result(whole_model_ratio=9.9)])))
    assert dict(zip(titles, row)) == {
        "run": "exp 1: deit_small_patch16_224, cifar100, seed 42, scope paper, mode qat", "baseline": "87.11",
        "final": "85.47", "drop": "1.64", "packed": "84.30", "CR": "6.54", "null CR": "6.70 ± 0.21", "compl.": "61.2",
        "FP32 KB": "87654.3", "packed KB": "16136.4", "ratio": "5.43", "Eq. 3": "no", "paper drop": "1.72",
        "paper CR": "6.23"}  # the ratio is that of the bytes beside it


def test_the_text_has_at_most_120_columns_and_numbers_end_where_their_titles_end():
    runs = [full(exp=n, name="a-long-name-of-a-variant" * (n == 2), smoke=n == 3, final_acc=-10.5, drop=-12.25, cr=16.5,
                 model=EXPERIMENTS[n].settings["model.name"], fp32_bytes=343_232_100, packed_bytes=102_345_678)
            for n in range(1, 8)]
    lines = results_table(runs).splitlines()
    assert max(map(len, lines)) <= 120 and lines[4].startswith("exp 2-a-long-name-of-a-variant: ")
    assert lines[6].endswith("miniature") and "miniature" not in lines[2] and any("(--smoke)" in line for line in lines)
    for title, value in (("baseline", "87.11"), ("packed", "84.30"), ("ratio", "3.35"), ("null CR", "6.70 ± 0.21")):
        end = lines[0].index(title) + len(title)
        assert all((" " + line[:end]).endswith(" " + value) for line in lines[3:17:2]), title


def test_a_network_of_a_user_has_no_paper_what_was_not_measured_is_a_dash_and_equation_3_needs_both_conditions():
    rows = report_tables.runs_table([result(exp=0, model="mine"), result(deployed_acc=None, compliance=None),
                              result(drop_met=True), result(cr_met=False, drop_met=True)]).rows
    assert [row[11] for row in rows] == ["no", "no", "met", "no"]
    assert rows[0][0].startswith("exp 0: mine") and rows[0][12:] == ["–", "–"]
    assert (rows[1][4], rows[1][7]) == ("–", "–") and "–" not in rows[1][1:4] + rows[1][5:7]


def test_the_legend_says_what_the_numbers_are_of():
    text = " ".join(results_table([full(), result(eval_images=30, protocol="holdout")]).split())
    assert "first 30 or 1280 test images, which also chose" in text and "mode qat, protocol holdout" in text
    assert text.endswith("exp 1 seed 42, whole test split (n = 10000, 95 % intervals): baseline 87.01 [86.34, 87.65], "
                         "final 85.20 [84.49, 85.88], packed 84.02 [83.29, 84.72]")


def test_texts_that_a_spreadsheet_takes_for_formulas_are_quoted():
    rows = [["=1+1", "-0.38 [-1.20, +0.40], p 0.3", "+1.5 ± 0.2", "-2+3+cmd|' /C calc'!A0", "@x", -1.5, "–"]]
    assert next(csv.reader(report.csv_text("abcdefg", rows).splitlines()[1:])) == [
        "'=1+1", "-0.38 [-1.20, +0.40], p 0.3", "+1.5 ± 0.2", "'-2+3+cmd|' /C calc'!A0", "'@x", "-1.5", "–"]


@pytest.mark.parametrize("argv, words", [([], "usage: python -m evidence.report OUT"), (["a", "b"], "usage"),
                                         (["absent"], "absent: no */result.json")])
def test_main_without_runs_says_what_it_needs(capsys, argv, words):
    assert report.main(argv) == 2 and words in one_line(capsys)
