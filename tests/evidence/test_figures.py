"""tables.py, figures.py and the page: numbers by hand, SVG against CSV, well-formed XML, hostile and broken folders."""

import csv
import io
import json
import math
import re
import statistics
import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from evidence import figures
from evidence import report
from evidence import tables
from config import Config, EXPERIMENTS, InputError, flatten, override
from evidence.report import read_runs
from test_report import full as scored, one_line, result

SVG, HTML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xhtml}"


def full(**changes):
    return {**scored(), **changes}


def settings(exp, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return flatten(override(override(Config(), EXPERIMENTS[exp].settings if exp else {}), changes))


def cycle(number, acc, cr, **more):
    return {"cycle": number, "acc": acc, "drop": 87.0 - acc, "cr": cr, **more}


def policy(shift=0):
    """Two blocks, the second of six kernels; every number is another one."""
    def kernel(i):
        return {"name": f"net.{i}.weight", "bits": 3 + (i + shift) % 6, "keep": 0.41 + 0.05 * i,
                "qtype": "INT" if i % 2 else "FLOAT", "granularity": "log" if i % 3 else "per-channel", "channels": 20,
                "keep_actual": 0.4 + 0.05 * i, "retained": 0.05 + 0.01 * i}
    return {"format": 1, "blocks": [
        {"name": "first", "retained": 0.11 + 0.01 * shift, "cr": 9.09 + shift, "kernels": [kernel(0), kernel(1)],
         "budget": {"target": 0.25, "strategy": "pruning", "max_pruning": 0.5, "min_bits": 4}},
        {"name": "second", "retained": 0.17, "cr": 5.88 - shift, "kernels": [kernel(i) for i in range(2, 8)],
         "budget": {"target": 0.3, "strategy": "auto"}}]}


UPDATES = "cycle,level,block,agent,algorithm,policy_loss,value_loss,entropy,approx_kl,clip_fraction," \
    """explained_variance,timesteps
1,HLA,,0,PPO,-0.03,8000.5,13.5,0.001,0.0,nan,64
2,HLA,,0,PPO,-0.03,20.25,13.25,0.002,0.0,0.1,64
1,LLA,0,0,A2C,1.0,100.0,9.0,0.5,0.0,0.1,8
1,LLA,1,0,A2C,1.0,300.0,7.0,nan,0.0,0.1,8
1,LLA,0,0,A2C,1.0,inf,6.0,0.25,0.0,0.1,16
"""


def put(out, folder, value, changed=None, rules=None, updates=UPDATES):
    """A run directory with everything in it."""
    (out / folder).mkdir(parents=True)
    (out / folder / "result.json").write_text(json.dumps(value))
    config = {"settings": {**settings(value["exp"], **changed or {}), "name": value["name"], "seed": value["seed"]},
              "command": ["hirelc.py", "--exp", "1"], "started": "2026-01-02T03:04:05+0000", "git": "abc",
              "versions": {"torch": "2"}, "hardware": {"device": "a machine", "threads": 3}, "processes": 1}
    (out / folder / "config.json").write_text(json.dumps(config))
    (out / folder / "policy.json").write_text(json.dumps(rules or policy()))
    (out / folder / "updates.csv").write_text(updates)


CYCLES = [cycle(0, 87.0, 1.0), cycle(1, 80.0, 6.25, deployed_acc=79.5, surrogate_prediction=70.5,
                                          surrogate_active=True),
          cycle(2, 84.0, 6.75, deployed_acc=83.5, surrogate_prediction=85.25, surrogate_active=True)]
MORE = {"cycles": CYCLES, "best_cycle": 2, "strategies": {"auto": 0.5, "pruning": 0.5}, "sensitivity": [1.0, 0.5],
        "kernels": {f"k{i}": {"block": "first"} for i in range(8)}, "surrogate_mae": 5.375,
        "mean_kl": {"HLA PPO": 0.0015},
        "notes": ["one note", "another"], "searches": [
            {"level": "HLA", "cycle": 1, "entropy": [0.9, 0.8]},
            {"level": "LLA", "cycle": 1, "entropy": [1.0, 0.75], "consensus_drop": 4.0, "random_drop": 5.0},
            {"level": "LLA", "cycle": 2, "entropy": [0.75, 0.5], "consensus_drop": 3.0, "random_drop": 6.0}],
        "timings": {"search": 12.34, "total": 56.78}, "protocol": "as in the paper"}
HOSTILE = '<script>alert(1)</script>&"\']]>|`'


@pytest.fixture
def out(tmp_path):
    """Experiment 1 on two seeds with four ablations, experiment 4 once with search=null, and a network of one's own."""
    for seed, acc, cr in ((42, 85.0, 6.5), (43, 83.0, 7.5)):
        common = {**MORE, "seed": seed, "baseline_acc": 87.0}
        put(tmp_path, f"exp1-seed{seed}", full(**common, final_acc=acc, drop=87 - acc, cr=cr,
                                               deployed_acc_full=acc - 1))
        put(tmp_path, f"exp1-guess-seed{seed}", full(**common, name="guess", final_acc=acc - 4, drop=91 - acc, cr=6.0,
                                                     deployed_acc_full=acc - 1.25),
            {"sensitivity.method": "none"}, policy(2))
    put(tmp_path, "exp1-x-seed42", result(**MORE, name="x", final_acc=70.0, drop=17.0, cr=9.25),
        {"search.method": "no-hla"})
    put(tmp_path, "exp1-y-seed42", result(**{**MORE, "cycles": [cycle(1, 79.0, 6.125)]}, name="y"),
        {"lla.algorithms": "A2C,A2C,A2C"})
    put(tmp_path, "exp1-z-seed42", result(**MORE, name="z", cr=6.625), {"search.method": "null"})
    put(tmp_path, "exp1-z-seed7", result(**MORE, name="z", seed=7, cr=50.0), {"search.method": "null"})
    put(tmp_path, "exp1-null-seed99", result(**MORE, name="null", seed=99, cr=99.0),
        {"search.method": "null", "carry": "all"})
    put(tmp_path, "exp4-seed42", result(**MORE, exp=4, model="resnet18", smoke=True))
    put(tmp_path, "mine", result(**{**MORE, "notes": [HOSTILE, "\u202e\x00\ud800 end"]}, exp=0, name=HOSTILE))
    return tmp_path


def rows_of(out, name):
    return list(csv.DictReader(io.StringIO((out / "csv" / name).read_text(encoding="utf-8"))))


def tree(out):
    return ET.fromstring((out / "report.html").read_bytes())


@pytest.fixture
def written(out):
    report.write_report(out, read_runs(out))
    return out


def table(out, key):
    """A table as (title row, [row]); cells from the CSV, which the page's must equal."""
    rows = list(csv.reader(io.StringIO((out / "csv" / f"{key}.csv").read_text(encoding="utf-8"))))
    return rows[0], rows[1:]


# The page


def test_the_page_is_xml_without_scripts_or_anything_from_elsewhere(written):
    root = tree(written)
    assert root.tag == HTML + "html"
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        assert element.tag.partition("}")[2] not in (
            "script", "link", "img", "iframe", "object", "image", "use", "foreignObject")
        for key, value in element.attrib.items():
            assert not key.startswith("on") and "style" != key
            if "href" in key or "src" in key:
                assert value.startswith("#") and value[1:] in ids
    style = next(root.iter(HTML + "style")).text
    assert not re.search(r"url\(|@import|http", style)
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_every_svg_is_named_and_described(written):
    drawn = list(tree(written).iter(SVG + "svg"))
    assert len(drawn) > 30
    for svg in drawn:
        ids = {child.get("id"): child for child in svg if child.get("id")}
        title, desc = (ids[key] for key in svg.get("aria-labelledby").split())
        assert (title.tag, desc.tag) == (SVG + "title", SVG + "desc") and title.text and desc.text
        assert svg.get("role") == "img"
        ET.fromstring(ET.tostring(svg))


def test_text_from_a_run_stays_text(written):
    root = tree(written)
    shown = "".join(root.itertext())
    assert HOSTILE in shown and "\N{REPLACEMENT CHARACTER}" * 3 + " end" in shown
    assert not any(c in shown for c in "\u202e\x00")
    lines = [line for line in (written / "results.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for line, ruler in zip(lines, lines[1:]):
        if set(ruler) == {"|", "-"}:
            columns = len(re.findall(r"(?<!\\)\|", line))
            assert columns == ruler.count("|")
        elif set(line) != {"|", "-"}:
            assert len(re.findall(r"(?<!\\)\|", line)) == columns


def test_the_page_s_tables_are_those_of_the_csv_files(written):
    root = tree(written)
    for key in ("table2", "table3", "table4", "table5", "variants", "moved"):
        section = next(e for e in root.iter(HTML + "section") if e.get("id") == key)
        cells = [["".join(c.itertext()) for c in tr] for tr in section.iter(HTML + "tr")]
        titles, rows = table(written, key)
        assert cells == [titles] + rows and len(rows) > 1, key


def test_a_run_s_section_says_where_it_came_from(written):
    root = tree(written)
    told = {"".join(d.find(HTML + "summary").itertext()): "".join(d.find(HTML + "dl").itertext())
            for d in root.iter(HTML + "details")}
    assert len(told) == 11
    text = next(v for k, v in told.items() if k.startswith("exp 1-guess seed 43"))
    for part in ("hirelc.py --exp 1", "2026-01-02", "a machine, 3 threads", "one note", "12.3",
                 "sensitivity.method=none", "as in the paper"):
        assert part in text
    assert "vote" not in text  # only what differs


# SVG against CSV


def plots(root):
    """(csv, x column, y column, svg) of every figure."""
    for figure in root.iter(HTML + "figure"):
        x, y = figure.get("data-columns").split()
        yield figure.get("data-csv"), x, y, figure.find(SVG + "svg")


def marks(svg):
    return [e for e in svg.iter() if e.get("data-at")]


def test_every_mark_is_a_row_of_its_csv_and_every_row_is_drawn(written):
    drawn, seen = {}, set()
    for name, x, y, svg in plots(tree(written)):
        if name not in ("allocation", "strategies"):
            drawn.setdefault((name, x, y), Counter()).update(
                (m.get("data-series"), m.get("data-x"), m.get("data-y")) for m in marks(svg))
    for (name, x, y), found in drawn.items():
        expected = Counter((r["series"], r[x], r[y]) for r in rows_of(written, f"{name}.csv") if r[y])
        assert {(figures.clean(s), a, b): n for (s, a, b), n in expected.items()} == found, (name, y)
        seen.add((name, y))
    assert seen == {("cycles", "accuracy"), ("cycles", "packed_accuracy"), ("cycles", "drop"), ("cycles", "cr"),
                    ("guidance", "y"), ("guidance-blocks", "y"), ("surrogate", "y"), ("size", "y"), ("budgets", "y"),
                    ("learning", "entropy"), ("learning", "approx_kl"), ("learning", "value_loss")}


@pytest.mark.parametrize("name, kind, keys", [
    ("allocation", "kernel", ("block", "kernel", "bits", "keep", "qtype", "granularity", "retained")),
    ("strategies", "strategy", ("cycle", "block", "strategy", "target"))])
def test_every_cell_is_a_row_of_its_csv_and_every_row_is_drawn(written, name, kind, keys):
    found = Counter(tuple(cell.get(f"data-{key}") for key in keys) for csv_name, _, _, svg in plots(tree(written))
                    if csv_name == name for cell in svg.iter(SVG + "g") if cell.get("class") == kind)
    assert found == Counter(tuple(r[key] for key in keys) for r in rows_of(written, f"{name}.csv")) and len(found) > 1


def test_a_kernel_s_cell_says_its_bits_and_its_bar_is_as_long_as_what_it_keeps(written):
    rows = {r["kernel"]: r for r in rows_of(written, "allocation.csv") if r["run"] == "exp 4 seed 42"}
    svg = next(s for n, _, _, s in plots(tree(written)) if n == "allocation" and "exp 4 seed 42" in s[0].text)
    cells = [g for g in svg.iter(SVG + "g") if g.get("class") == "kernel"]
    assert len(cells) == 8
    for cell in cells:
        row, (_, track, bar) = rows[cell.get("data-kernel")], cell.findall(SVG + "rect")
        texts = [t.text for t in cell.findall(SVG + "text")]
        assert texts[1] == f"{row['bits']} bit {row['qtype']}"
        assert texts[2].startswith(f"{float(row['keep_actual']):.2f} ")
        assert float(bar.get("width")) / float(track.get("width")) == pytest.approx(float(row["keep_actual"]), abs=1e-3)
    places = {(c.find(SVG + "rect").get("x"), c.find(SVG + "rect").get("y")) for c in cells}
    assert len(places) == 8


def fit(pairs):
    """(slope, intercept, largest error) of the line through points."""
    xs, ys = zip(*pairs)
    if len(set(xs)) == 1:
        return None, None, max(ys) - min(ys)
    slope, offset = statistics.linear_regression(xs, ys)
    return slope, offset, max(abs(slope * x + offset - y) for x, y in pairs)


def test_marks_and_tick_labels_lie_on_one_scale(written):
    """Where a mark lies says the same as its numbers, and as the labels of the axes beside it."""
    logs = 0
    for name, _, column, svg in plots(tree(written)):
        if name in ("allocation", "strategies", "budgets"):
            continue
        at = [(float(m.get("data-x")), float(m.get("data-y")), *map(float, m.get("data-at").split()))
              for m in marks(svg)]
        labels = {axis: [(float(t.text), float(t.get("x")) if axis == "x" else float(t.get("y")) - 4)
                         for t in svg.iter(SVG + "text") if t.get("class") == f"{axis} tick"] for axis in "xy"}
        log = any("log" in (t.text or "") for t in svg.iter(SVG + "text") if t.get("transform"))
        logs += log
        place = math.log10 if log else float
        slope, _, error = fit([(x, px) for x, _, px, _ in at] + labels["x"])
        assert error < 0.02 and (slope is None or slope > 0), name
        slope, _, error = fit([(place(y), py) for _, y, _, py in at] + [(place(v), p) for v, p in labels["y"]])
        assert error < 0.02 and (slope is None or slope < 0), (name, column)
        assert len(labels["y"]) >= 1 and all(36 <= px <= 350 and 10 <= py <= 190 for *_, px, py in at)
    assert logs > 0


def test_budgets_lie_on_the_scale_of_their_axis(written):
    svg = next(s for n, _, _, s in plots(tree(written)) if n == "budgets")
    pairs = [(float(m.get("data-x")), float(m.get("data-at").split()[0])) for m in marks(svg)]
    ticks = [(float(t.text), float(t.get("x"))) for t in svg.iter(SVG + "text") if t.get("class") == "x tick"]
    slope, offset, error = fit(pairs + ticks)
    assert error < 0.02 and slope > 0 and offset == pytest.approx(62, abs=0.1)  # the axis begins at zero


def test_a_whisker_reaches_from_low_to_high():
    svg = ET.fromstring(figures.xy(("a", "t", "d"), [
        {"series": "s", "x": 1, "y": 5.0, "low": 2.0, "high": 6.0}, {"series": "s", "x": 3, "y": 4.0, "low": None}],
        "x", "y"))
    (x, y), (_, y4) = (map(float, m.get("data-at").split()) for m in marks(svg))
    scale = y4 - y  # one unit of y
    whisker, = [e for e in svg.iter(SVG + "line")
                if e.get("stroke") == figures.COLOURS[0] and e.get("x1") == e.get("x2")]
    assert float(whisker.get("x1")) == x
    assert float(whisker.get("y1")) == pytest.approx(y + 3 * scale, abs=0.05)
    assert float(whisker.get("y2")) == pytest.approx(y - scale, abs=0.05)


def test_no_two_series_share_marker_or_dashes_and_colour():
    rows = [{"series": f"s{i}", "x": x, "y": i} for i in range(20) for x in (1, 2)]
    svg = ET.fromstring(figures.xy(("a", "t", "d"), rows, "x", "y"))
    looks = {}
    for m in marks(svg):
        shape = m.tag + re.sub(r"[\d.]+", "", m.get("d", ""))
        looks.setdefault(m.get("data-series"), set()).add((shape, m.get("fill"), m.get("stroke")))
    lines = [(e.get("stroke"), e.get("stroke-dasharray")) for e in svg.iter(SVG + "polyline")]
    assert all(len(look) == 1 for look in looks.values()) and len(lines) == len(set(lines)) == 20
    assert len({frozenset(look) for look in looks.values()}) == 20
    assert len({shape for i in range(7) for shape, *_ in looks[f"s{i}"]}) == 7  # told apart without any colour
    texts = [t.text for t in svg.iter(SVG + "text")]
    assert [t for t in texts if t in looks] == list(looks)  # every series is named in the legend


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 17.9), (1e-9, 3e-9), (5, 5.0001), (1e14, 1.1e14), (-1, 1e14)])
def test_ticks_are_few_round_and_inside(low, high):
    found = figures.ticks(low, high)
    assert 1 <= len(found) <= 6 and all(low - 1e-9 * abs(low) - 1e-12 <= t <= high * (1 + 1e-9) + 1e-12 for t in found)
    assert low > 0 and high < 1e-8 or len(found) >= 2


@pytest.mark.parametrize("rows", [
    [{"series": "s", "x": 0, "y": 0.0}], [{"series": "s", "x": 1, "y": 9e14}, {"series": "s", "x": 2, "y": -9e14}],
    [{"series": "s", "x": 1, "y": 1e-300}]], ids=["one", "huge", "tiny"])
@pytest.mark.parametrize("how", [{}, {"diagonal": True}, {"whole": True}])
def test_a_plot_of_odd_numbers_has_no_number_that_is_none(rows, how):
    text = figures.xy(("a", "t", "d"), rows, "x", "y", **how)
    ET.fromstring(text)
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', text)


def test_learning_curves_are_means_over_agents_and_blocks(written):
    rows = [r for r in rows_of(written, "learning.csv") if r["run"] == "exp 4 seed 42"]
    assert [(r["series"], r["x"], r["entropy"], r["approx_kl"], r["value_loss"]) for r in rows] == [
        ("HLA PPO", "1", "13.5", "0.001", "8000.5"), ("HLA PPO", "2", "13.25", "0.002", "20.25"),
        ("LLA A2C", "1", "8.0", "0.5", "200.0"), ("LLA A2C", "2", "6.0", "0.25", "")]


def test_a_long_history_is_drawn_in_steps_that_leave_nothing_out():
    updates = [{"level": "HLA", "block": "", "agent": "0", "algorithm": "PPO", "entropy": float(n), "approx_kl": 1.0,
                "value_loss": 1.0} for n in range(1, 251)]
    run = tables.Run(None, result(), updates=updates)
    rows = tables.learning_rows(run, most=100)
    assert len(rows) == 84 and [rows[0]["x"], rows[0]["entropy"]] == [2.0, 2.0]  # updates 1, 2, 3
    assert rows[-1]["entropy"] == 250.0


def test_strategies_of_every_cycle_are_drawn_where_a_run_tells_them():
    told = [{"cycle": c, "blocks": [{"name": "b", "strategy": s, "target": 0.2}]}
            for c, s in ((1, "auto"), (2, "pruning"))]
    rows = tables.strategy_rows(tables.Run(None, result(cycle_budgets=told), policy=policy()))
    assert [(r["cycle"], r["strategy"]) for r in rows] == [(1, "auto"), (2, "pruning")]
    svg = ET.fromstring(figures.strategies(("a", "t", "d"), rows))
    texts = [t.text for t in svg.iter(SVG + "text")]
    assert {"cycle 1", "cycle 2", "A 0.20", "P 0.20"} <= set(texts)
    best = tables.strategy_rows(tables.Run(None, result(best_cycle=3), policy=policy()))
    assert [(r["cycle"], r["block"], r["strategy"], r["target"]) for r in best] == [
        (3, "first", "pruning", 0.25), (3, "second", "auto", 0.3)]


def test_sensitivity_on_and_off(written):
    rows = [(r["series"], r["x"], r["y"]) for r in rows_of(written, "guidance.csv")]
    assert rows == [("sensitivity fisher", "42", "85.0"), ("sensitivity fisher", "43", "83.0"),
                    ("sensitivity none", "42", "81.0"), ("sensitivity none", "43", "79.0")]
    blocks = [(r["series"], r["block"], float(r["y"]), r["seeds"]) for r in rows_of(written, "guidance-blocks.csv")]
    assert blocks == [("sensitivity fisher", "first", 9.09, "2"), ("sensitivity fisher", "second", 5.88, "2"),
                      ("sensitivity none", "first", 11.09, "2"), ("sensitivity none", "second", 3.88, "2")]


# Tables


def test_table_2_has_paper_measured_and_null_or_says_what_is_missing(written):
    titles, rows = table(written, "table2")
    first = [dict(zip(titles, row)) for row in rows if row[0] == "1"]
    assert [r["whose"] for r in first] == ["paper", "here", "null, run"]
    assert [first[0][k] for k in ("baseline", "final", "drop", "CR", "MSR %")] == [
        "86.88", "85.16", "1.72", "6.23", "83.9"]
    # by hand: 85 and 83 have the mean 84 and the standard deviation sqrt(2); 6.5 and 7.5 sqrt(0.5)
    assert [first[1][k] for k in ("seeds", "baseline", "final", "drop", "CR")] == [
        "42, 43", "87.00 ± 0.00", "84.00 ± 1.41", "3.00 ± 1.41", "7.00 ± 0.71"]
    assert (first[2]["seeds"], first[2]["CR"]) == ("42", "6.62")  # neither seed 7 nor the one that carries over
    fourth = [dict(zip(titles, row)) for row in rows if row[0] == "4"]
    assert [r["whose"] for r in fourth] == ["paper", "here", "null, drawn"]
    assert fourth[2]["CR"] == "6.70 ± 0.21" and fourth[2]["final"] == "–"
    assert fourth[1]["network, data"] == "resnet18, cifar100 (smoke)"
    assert [row[1:3] for row in rows if row[0] == "5"] == [["paper", "MobileNetV2, Tiny ImageNet"], ["here", "no run"]]
    assert {row[0] for row in rows} == set("1234567")


def test_a_single_run_has_its_intervals_and_p(tmp_path):
    put(tmp_path, "a", full(baseline_acc_full=87.01, final_acc_full=85.2, drop_interval_full=[1.25, 2.37],
                            mcnemar_p_full=0.00123))
    titles, rows = tables.table2(tables.families(read_runs(tmp_path))).columns, tables.table2(
        tables.families(read_runs(tmp_path))).rows
    row = dict(zip(titles, rows[1]))
    assert row["whole split: final"] == "85.20 [84.49, 85.88]"
    assert row["whole split: drop"] == "1.81 [1.25, 2.37], p = 0.0012"


def test_runs_with_other_settings_are_not_averaged(tmp_path):
    put(tmp_path, "a", result(seed=1, cr=4.0))
    put(tmp_path, "b", result(seed=2, cr=6.0))
    put(tmp_path, "c", result(seed=3, cr=8.0), {"search.cycles": 2})
    rows = tables.table3(tables.families(read_runs(tmp_path))).rows
    assert [(r[3], r[7]) for r in rows if r[1] == "here"] == [("2", "5.00 ± 1.41"), ("1", "8.00")]


def test_table_4_has_strategies_surrogate_and_compliance(written):
    titles, rows = table(written, "table4")
    here = dict(zip(titles, next(r for r in rows if r[:2] == ["1", "here"])))
    assert here["strategies of the blocks, %"] == "auto 50.0, pruning 50.0" and here["kernels"] == "8"
    assert (here["blocks"], here["surrogate MAE"], here["compliance %"]) == ("2", "5.38 ± 0.00", "61.2 ± 0.0")
    assert next(r for r in rows if r[:2] == ["3", "paper"])[3:] == [
        "48", "12", "–", "auto 50.0, quantization 33.3, pruning 16.7", "–"]


def test_table_5_knows_ablations_by_their_settings(written):
    _, rows = table(written, "table5")
    assert [row[1:5] for row in rows] == [
        ["HiReLC: HLA and LLA ensemble", "42, 43", "3.00 ± 1.41", "7.00 ± 0.71"],
        ["no HLA, uniform budgets", "42", "17.00", "9.25"],
        ["[PPO, A2C, PPO], first cycle", "42, 43", "7.00 ± 0.00", "6.25 ± 0.00"],
        ["[A2C, A2C, A2C], first cycle", "42", "8.00", "6.12"], ["null, run", "42", "1.64", "6.62"]]
    assert [row[5:] for row in rows] == [
        ["1.72", "6.23"], ["6.80", "8.87"], ["3.28", "6.38"], ["7.19", "6.63"], ["–", "–"]]


def test_variants_are_compared_with_the_experiment_by_seed(written):
    titles, rows = table(written, "variants")
    told = {row[1]: dict(zip(titles, row)) for row in rows}
    assert told["–"]["what differs"] == "the experiment itself"
    assert told["guess"]["what differs"] == "sensitivity.method=none"
    assert told["guess"][titles[-1]] == "-0.25 ± 0.00 (packed, whole split)"
    assert told["x"][titles[-1]] == "+0.00 (packed)" and told["y"]["what differs"] == "lla.algorithms=A2C,A2C,A2C"
    assert told["null"]["what differs"] == "carry=all search.method=null" and told["null"][titles[-1]] == "–"


def test_the_agents_are_compared_with_random_actions_and_the_null_controller(written):
    _, rows = table(written, "moved")
    assert next(row for row in rows if row[0] == "4") == [
        "4", "–", "42", "0.8750 ± 0.1768 → 0.6250 ± 0.1768", "3.50 ± 0.71", "5.50 ± 0.71", "-2.00 ± 1.41", "6.54",
        "6.70 ± 0.21", "61.2", "61.0 ± 2.1"]


def test_what_was_not_measured_in_every_run_says_so():
    assert tables.spread([1.0, None, 3.0]) == "2.00 ± 1.41 (2 of 3 runs)"
    assert tables.spread([None, None]) == "–" and tables.spread([2.0]) == "2.00"


# Folders that are broken, incomplete or hostile


@pytest.mark.parametrize("name, text", [
    ("policy.json", "{"), ("policy.json", '{"blocks": [{"name": "b"}]}'), ("policy.json", '{"blocks": 3}'),
    ("config.json", '{"settings": []}'), ("config.json", '{"settings": {}, "hardware": 3}'),
    ("updates.csv", "cycle,level\n1,2\n"), ("updates.csv", UPDATES.replace("13.5,", "many,")),
    ("updates.csv", UPDATES + "1,HLA\n"), ("updates.csv", "\0\n")])
def test_a_broken_file_is_named_in_one_line_and_nothing_is_written(out, capsys, name, text):
    (out / "exp4-seed42" / name).write_text(text)
    before = sorted(path.name for path in out.iterdir())
    assert report.main([str(out)]) == 2
    assert str(out / "exp4-seed42" / name) in one_line(capsys)
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.parametrize("changes", [
    {"cycles": 3}, {"cycles": [{"cycle": 1}]}, {"cycles": [cycle("1", 2.0, 3.0)]}, {"cr": "6"}, {"cr": True},
    {"cr": 1e300}, {"notes": [1]}, {"timings": {"a": "b"}}, {"strategies": [0.5]}, {"drop_interval_full": "x"},
    {"evaluations": 1.5}])
def test_a_result_with_numbers_of_another_kind_is_named(tmp_path, capsys, changes):
    put(tmp_path, "a", result(**changes))
    assert report.main([str(tmp_path)]) == 2
    assert str(tmp_path / "a" / "result.json") in one_line(capsys)


def test_missing_files_are_left_out_and_said(tmp_path):
    put(tmp_path, "a", result())
    for name in ("policy.json", "updates.csv", "config.json"):
        (tmp_path / "a" / name).unlink()
    assert report.main([str(tmp_path)]) == 0
    text = "".join(tree(tmp_path).itertext())
    assert "config.json, policy.json, updates.csv" in text
    assert "Allocation per kernel (Fig. 4): exp 1 seed 42: nothing" in text
    assert rows_of(tmp_path, "allocation.csv") == []


def test_a_folder_in_the_place_of_a_file_is_named(out):
    (out / "exp4-seed42" / "policy.json").unlink()
    (out / "exp4-seed42" / "policy.json").mkdir()
    with pytest.raises(InputError, match="exp4-seed42/policy.json"):
        read_runs(out)


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    put(tmp_path, "a", result())
    put(tmp_path, "b", result())
    assert report.main([str(tmp_path)]) == 2
    assert str(tmp_path / "a") in (line := one_line(capsys)) and str(tmp_path / "b") in line


def test_a_second_report_is_the_same(written):
    before = (written / "report.html").read_bytes()
    assert report.main([str(written)]) == 0
    assert (written / "report.html").read_bytes() == before
