"""The page and its figures: well-formed XML, tables and marks that equal the CSV files, hostile text."""

import csv
import io
import math
import re
import statistics
import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from evidence import figures, report, rows, tables
from evidence.report import read_runs
from test_report import full, policy, put, result
from test_tables import MORE

SVG, HTML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xhtml}"
HOSTILE = '<script>alert(1)<script>&"\']]>|`'
BUDGETS = [{"cycle": c, "blocks": [{"name": "first", "strategy": s, "target": 0.2}]}
           for c, s in ((1, "auto"), (2, "pruning"))]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Experiment 1 on two seeds with and without guidance, a miniature, and a user's hostile network."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (42, 43):
        put(out, f"exp1-seed{seed}", full(**MORE, seed=seed, final_acc=seed + 43.0, cr=seed - 36.5))
        put(out, f"exp1-guess-seed{seed}", full(**MORE, seed=seed, name="guess", final_acc=123.0 - seed),
            {"sensitivity.method": "none"}, policy(2))
    put(out, "exp4-seed42", result(**MORE, exp=4, model="resnet18", smoke=True, cycle_budgets=BUDGETS))
    put(out, "mine", result(**MORE, exp=0, name=HOSTILE, notes=[HOSTILE, "\u202e\x00\ud800 end"]))
    report.write_report(out, read_runs(out))
    return out


def read_csv(out, name):
    return list(csv.DictReader(io.StringIO((out / "csv" / f"{name}.csv").read_text(encoding="utf-8"))))


def tree(out):
    return ET.fromstring((out / "report.html").read_bytes())


def marks(svg):
    return [e for e in svg.iter() if e.get("data-at")]


# The page


def test_the_page_is_xml_without_scripts_or_anything_from_elsewhere(out):
    root = tree(out)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert root.tag == HTML + "html" and len(ids) == len(set(ids))
    for element in root.iter():
        assert element.tag.partition("}")[2] not in (
            "script", "link", "img", "iframe", "object", "image", "use", "foreignObject")
        for key, value in element.attrib.items():
            assert not key.startswith("on") and "style" != key
            if "href" in key or "src" in key:
                assert value.startswith("#") and value[1:] in ids
    assert not re.search(r"url\(|@import|http", next(root.iter(HTML + "style")).text)
    for svg in root.iter(SVG + "svg"):
        named = {child.get("id"): child.text for child in svg if child.get("id")}
        assert svg.get("role") == "img" and all(named[key] for key in svg.get("aria-labelledby").split())


def test_text_from_a_run_stays_text(out):
    shown = "".join(tree(out).itertext())
    assert HOSTILE in shown and "\N{REPLACEMENT CHARACTER}" * 3 + " end" in shown
    assert not any(c in shown for c in "\u202e\x00")
    for line in (out / "results.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line)) if set(line) == {"|", "-"} else None
            assert columns is None or columns == before
            before = len(re.findall(r"(?<!\\)\|", line))


def test_the_page_begins_with_the_verdict_and_its_tables_are_those_of_the_csv_files_in_boxes_that_scroll(out):
    root = tree(out)
    sections = [e for e in root.iter(HTML + "section") if e.find(HTML + "div").find(HTML + "table") is not None]
    assert [e.get("id") for e in sections][0] == "verdict" and len(sections) == 6
    for section in sections:
        with open(out / "csv" / f"{section.get('id')}.csv", encoding="utf-8", newline="") as file:
            expected = [[cell.lstrip("'") for cell in row] for row in csv.reader(file)]
        assert [["".join(c.itertext()).lstrip("'") for c in tr] for tr in section.iter(HTML + "tr")] == expected
        assert "wide" in section.find(HTML + "div").get("class").split()
    style = next(root.iter(HTML + "style")).text
    assert ".wide { overflow-x: auto; max-width: 100%;" in style and "overflow-wrap: anywhere" in style


def test_miniatures_are_called_so_beside_their_numbers(out):
    root = tree(out)
    assert "1 of 6 runs is a miniature, marked so." in "".join(root.itertext())
    section = next(e for e in root.iter(HTML + "section") if e.get("id") == "exp4")
    captions = ["".join(e.itertext()) for e in section.iter() if e.tag in (HTML + "figcaption", HTML + "summary")]
    assert len(captions) == 8 and all("(miniature)" in text for text in captions)
    rest = next(e for e in root.iter(HTML + "section") if e.get("id") == "exp1")
    assert "miniature" not in "".join(rest.itertext())


def test_a_run_s_section_says_where_it_came_from_and_what_differs(out):
    shown = {"".join(d.find(HTML + "summary").itertext()): "".join(d.find(HTML + "dl").itertext())
             for d in tree(out).iter(HTML + "details")}
    text = next(v for k, v in shown.items() if k.startswith("exp 1-guess seed 43"))
    for part in ("hirelc.py --exp 1", "2026-01-02", "a machine, 3 threads", "sensitivity.method=none"):
        assert part in text
    assert len(shown) == 6 and "vote" not in text


# SVG against CSV


def test_every_mark_is_a_row_of_its_csv_and_every_row_with_a_number_is_drawn(out):
    keys = {"allocation": ("kernel", ("block", "kernel", "bits", "keep", "qtype", "granularity", "retained")),
            "strategies": ("strategy", ("cycle", "block", "strategy", "target"))}
    drawn = {}
    for figure in tree(out).iter(HTML + "figure"):
        kind, columns = keys.get(figure.get("data-csv"), (None, ("series", "x", "y")))
        cells = [g for g in figure.iter(SVG + "g") if g.get("class") == kind] if kind else marks(figure)
        drawn.setdefault(figure.get("data-csv"), Counter()).update(
            tuple(c.get(f"data-{key}") for key in columns) for c in cells)
    assert set(drawn) == {"drops", "ratios", "guidance", "surrogate", "size", "learning", *keys}
    for name, found in drawn.items():
        columns = keys.get(name, (None, ("series", "x", "y")))[1]
        assert found == Counter(tuple(figures.clean(row[key]) for key in columns) for row in read_csv(out, name)
                                if row.get("y") != ""), name


def test_marks_and_tick_labels_lie_on_one_scale(out):
    """Where a mark lies says the same as its numbers, and as the labels of the axes beside it."""
    def error(pairs):
        xs, ys = zip(*pairs)
        slope, offset = statistics.linear_regression(xs, ys) if len(set(xs)) > 1 else (0, ys[0])
        return max(abs(slope * x + offset - y) for x, y in pairs)

    for figure in tree(out).iter(HTML + "figure"):
        at = [(m.get("data-x"), m.get("data-y"), *m.get("data-at").split()) for m in marks(figure)]
        labels = {axis: [(t.text, float(t.get(axis)) - 4 * (axis == "y")) for t in figure.iter(SVG + "text")
                         if t.get("class") == f"{axis} tick"] for axis in "xy"}
        for axis, i in (("x", 0), ("y", 1)) if at else ():
            pairs = [(float(a), float(b)) for a, b in [(m[i], m[i + 2]) for m in at] + labels[axis]]
            assert error(pairs) < 0.02 and labels[axis], (figure.get("data-csv"), axis)
        assert all(36 <= float(x) <= 350 and 10 <= float(y) <= 190 for *_, x, y in at)


def test_a_kernel_s_bar_is_as_long_as_what_it_keeps(out):
    known = {r["kernel"]: r for r in read_csv(out, "allocation") if r["run"] == "exp 4 seed 42 (miniature)"}
    svg = next(f for f in tree(out).iter(HTML + "figure")
               if f.get("data-csv") == "allocation" and "exp 4" in f[0][0].text)
    cells = [g for g in svg.iter(SVG + "g") if g.get("class") == "kernel"]
    for cell in cells:
        row, (_, track, bar) = known[cell.get("data-kernel")], cell.findall(SVG + "rect")
        assert cell.findall(SVG + "text")[1].text == f"{row['bits']} bit {row['qtype']}"
        assert float(bar.get("width")) / float(track.get("width")) == pytest.approx(float(row["keep_actual"]), abs=1e-3)
    assert len({(c.find(SVG + "rect").get("x"), c.find(SVG + "rect").get("y")) for c in cells}) == 8


def test_a_whisker_reaches_from_low_to_high():
    svg = ET.fromstring(figures.xy(("a", "t", "d"), [
        {"series": "s", "x": 1, "y": 5.0, "low": 2.0, "high": 6.0}, {"series": "s", "x": 3, "y": 4.0, "low": None}],
        "x", "y"))
    (x, y), (_, y4) = (map(float, m.get("data-at").split()) for m in marks(svg))
    whisker, = [e for e in svg.iter(SVG + "line")
                if e.get("stroke") == figures.COLOURS[0] and e.get("x1") == e.get("x2")]
    assert [float(whisker.get(key)) for key in ("x1", "y1", "y2")] == pytest.approx(
        [x, y + 3 * (y4 - y), y - (y4 - y)], abs=0.05)


def test_no_two_series_share_marker_or_dashes_and_colour():
    svg = ET.fromstring(figures.xy(("a", "t", "d"), [
        {"series": f"s{i}", "x": x, "y": i} for i in range(20) for x in (1, 2)], "x", "y"))
    looks = {}
    for m in marks(svg):
        shape = m.tag + re.sub(r"[\d.]+", "", m.get("d", ""))
        looks.setdefault(m.get("data-series"), set()).add((shape, m.get("fill"), m.get("stroke")))
    dashes = {(e.get("stroke"), e.get("stroke-dasharray")) for e in svg.iter(SVG + "polyline")}
    assert len({frozenset(look) for look in looks.values()}) == len(dashes) == 20
    assert len({shape for i in range(7) for shape, *_ in looks[f"s{i}"]}) == 7  # distinct without any colour
    assert [t.text for t in svg.iter(SVG + "text") if t.text in looks] == list(looks)  # every series is in the legend


@pytest.mark.parametrize("values", [[0.0], [9e14, -9e14], [1e-300], [0, 1], [-3.2, 17.9], [5, 5.0001], [1e-9, 3e-9]])
@pytest.mark.parametrize("how", [{}, {"diagonal": True}, {"whole": True}])
def test_a_plot_of_odd_numbers_has_few_round_ticks_inside_and_no_number_that_is_none(values, how):
    text = figures.xy(("a", "t", "d"), [{"series": "s", "x": i, "y": y} for i, y in enumerate(values)], "x", "y", **how)
    ET.fromstring(text)
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', text)
    low, high = figures.bounds(values)
    found = figures.ticks(low, high)
    assert 1 <= len(found) <= 6 and all(low - 1e-9 * abs(low) - 1e-12 <= t <= high + 1e-9 * abs(high) for t in found)


# Rows and verdicts


def test_learning_curves_are_means_over_agents_and_blocks_in_steps_that_omit_nothing(out):
    known = [(r["series"], r["x"], r["y"]) for r in read_csv(out, "learning") if r["run"] == "exp 1 seed 42"]
    assert known == [("HLA PPO", "1", "13.5"), ("HLA PPO", "2", "13.25"), ("LLA A2C", "1", "8.0"),
                     ("LLA A2C", "2", "6.0"), ("LLA A2C", "3", "")]
    assert "HLA PPO 13.50 → 13.25, LLA A2C 8.00 → 6.00. 1 values are not finite." in "".join(tree(out).itertext())
    run = tables.Run(None, result(), updates=[{"level": "HLA", "block": "", "agent": "0", "algorithm": "PPO",
                                               "entropy": float(n)} for n in range(1, 251)])
    steps = rows.learning_rows(run, most=100)
    assert len(steps) == 84 and (steps[0]["x"], steps[0]["y"], steps[-1]["y"]) == (2.0, 2.0, 250.0)  # 1, 2, 3 first


def test_strategies_of_every_cycle_with_what_the_best_one_realised(out):
    known = rows.strategy_rows(tables.Run(None, result(cycle_budgets=BUDGETS, best_cycle=2), policy=policy()))
    assert [(r["cycle"], r["strategy"], r["realised"]) for r in known] == [(1, "auto", None), (2, "pruning", 0.11)]
    texts = [t.text for t in ET.fromstring(figures.strategies(("a", "t", "d"), known)).iter(SVG + "text")]
    assert {"cycle 1", "cycle 2", "A 0.20", "P 0.20→0.11"} <= set(texts)
    best = rows.strategy_rows(tables.Run(None, result(best_cycle=3), policy=policy()))  # budgets in policy.json alone
    assert [(r["cycle"], r["block"], r["target"]) for r in best] == [(3, "first", 0.25), (3, "second", 0.3)]


def test_captions_say_what_came_out(out):
    shown = "".join(tree(out).itertext())
    for text in ("exp 1 seed 42: cycle 2 of 2 is the best, CR 5.50; the null controller draws 6.70 ± 0.21.",
                 # |80 - 70.5| and |84 - 85.25|; their mean 82
                 "Mean error 5.38 points over 2 cycles; of their mean accuracy in place of the predictions 2.00"):
        assert text in shown, text
    blocks = [(r["series"], r["block"], float(r["y"]), r["seeds"]) for r in read_csv(out, "guidance")]
    assert blocks == [("sensitivity fisher", "first", 9.09, "2"), ("sensitivity fisher", "second", 5.88, "2"),
                      ("sensitivity none", "first", 11.09, "2"), ("sensitivity none", "second", 3.88, "2")]
    size = [{"series": s, "x": x, "y": y} for s, x, y in (("a", 1, 5), ("b", 2, 4), ("c", 2, 6))]
    assert rows._size_verdict(size).endswith("than: a, c")
