"""The page and its figures: well-formed XML, tables that equal the CSV files, marks on one scale, hostile text."""

import csv
import re
import statistics
import xml.etree.ElementTree as ET

import pytest

from evidence import figures, report
from evidence.report import read_runs
from test_report import full, put, result
from test_report_tables import MORE

SVG, HTML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xhtml}"
HOSTILE = '<script>alert(1)<script>&"\']]>|`'


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Experiment 1 on two seeds and a variant, a miniature, and a user's hostile network."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (42, 43):
        put(out, f"exp1-seed{seed}", full(**MORE, seed=seed, final_acc=seed + 43.0, cr=seed - 36.5))
    put(out, "exp1-guess-seed43", full(**MORE, seed=43, name="guess"), {"sensitivity.method": "none"})
    put(out, "exp4-seed42", result(**MORE, exp=4, model="resnet18", smoke=True))
    put(out, "mine", result(**MORE, exp=0, name=HOSTILE, notes=[HOSTILE, "\u202e\x00\ud800 end"]))
    report.write_report(out, read_runs(out))
    return out


def read_csv(out, name):
    return list(csv.DictReader((out / "csv" / f"{name}.csv").read_text(encoding="utf-8").splitlines()))


def tree(out):
    return ET.fromstring((out / "report.html").read_bytes())


def test_the_page_is_xml_without_scripts_or_anything_from_elsewhere_and_text_stays_text(out):
    root = tree(out)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert root.tag == HTML + "html" and len(ids) == len(set(ids))
    for element in root.iter():
        assert element.tag.partition("}")[2] not in (
            "script", "link", "img", "iframe", "object", "image", "use", "foreignObject")
        for key in element.attrib:
            assert not key.startswith("on") and key not in ("style", "href", "src")
    assert not re.search(r"url\(|@import|http", next(root.iter(HTML + "style")).text)
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in root.iter(SVG + "svg"))
    shown = "".join(root.itertext())
    assert HOSTILE in shown and "\N{REPLACEMENT CHARACTER}" * 3 + " end" in shown
    assert not any(c in shown for c in "\u202e\x00")
    for table in (out / "results.md").read_text(encoding="utf-8").split("\n\n"):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")}
        assert len(columns) <= 1


def test_the_page_begins_with_the_verdict_and_its_tables_are_those_of_the_csv_files(out):
    sections = [e for e in tree(out).iter(HTML + "section") if e.find(HTML + "table") is not None]
    assert [e.get("id") for e in sections] == ["verdict", "runs", "paper", "whole", "variants"]
    for section in sections:
        known = read_csv(out, section.get("id"))
        shown = [["".join(c.itertext()) for c in tr] for tr in section.iter(HTML + "tr")]
        assert shown == [list(known[0]), *([cell.lstrip("'") for cell in row.values()] for row in known)]
        assert all(cell.get("data-label") for tr in list(section.iter(HTML + "tr"))[1:] for cell in tr)
    style = next(tree(out).iter(HTML + "style")).text  # on a phone rows are cards of labels and values
    assert "attr(data-label)" in style and "overflow-wrap: anywhere" in style and "thead { display: none; }" in style


def test_a_run_s_section_says_where_it_came_from_and_what_differs(out):
    shown = {"".join(d.find(HTML + "summary").itertext()): "".join(d.find(HTML + "dl").itertext())
             for d in tree(out).iter(HTML + "details")}
    text = next(v for k, v in shown.items() if k.startswith("exp 1-guess seed 43"))
    for part in ("hirelc.py --exp 1", "2026-01-02", "a machine, 3 threads", "sensitivity.method=none",
                 "of the votes 3.50 points, of uniformly drawn actions 5.50"):
        assert part in text
    assert len(shown) == 5 and "1 of 5 runs: miniature (--smoke)" in "".join(tree(out).itertext())


def test_every_drop_of_the_csv_is_a_mark_and_marks_and_labels_lie_on_one_scale(out):
    root = tree(out)
    figure = next(f for f in root.iter(HTML + "figure") if f.get("data-csv") == "cycles" and "exp 1" in f[1].text)
    rows_ = [row for row in read_csv(out, "cycles") if row["exp"] == "1"]
    marks = [m for m in figure.iter(SVG + "circle") if ": " in m[0].text]  # without those of the legend
    assert [m[0].text for m in marks] == [figures.clean(f"{r['series']}: {r['cycle']}, {r['drop']}") for r in rows_]
    assert {r["series"] for r in rows_} == {"exp 1 seed 42", "exp 1 seed 43", "paper"}
    assert "".join(r["cycle"] for r in rows_) == "012" * 2 + "1234"  # the paper's begin after the first cycle
    for key, axis in (("cycle", "cx"), ("drop", "cy")):
        ticks = [(float(t.text), float(t.get("x")) if axis == "cx" else float(t.get("y")) - 4)
                 for t in figure.iter(SVG + "text") if re.fullmatch(r"-?[\d.]+", t.text)
                 and (t.get("text-anchor") == "middle") == (axis == "cx")]
        pairs = [(float(r[key]), float(m.get(axis))) for r, m in zip(rows_, marks)] + ticks
        slope, offset = statistics.linear_regression(*zip(*pairs))
        assert len(ticks) > 1 and max(abs(slope * a + offset - b) for a, b in pairs) < 0.02


def test_a_kernel_s_bars_are_as_long_as_its_bits_and_what_it_keeps(out):
    known = [r for r in read_csv(out, "allocation") if r["run"] == "exp 4 seed 42 (miniature)"]
    svg = next(f for f in tree(out).iter(HTML + "figure") if f.get("data-csv") == "allocation" and "exp 4" in f[1].text)
    bars = [(float(b.get("width")) / float(t.get("width")), b[0].text) for t, b in zip(
        *[iter(svg.iter(SVG + "rect"))] * 2)]
    for row, bits, keep in zip(known, bars[::2], bars[1::2], strict=True):
        assert bits == (pytest.approx(float(row["bits"]) / 8, abs=1e-3), f"{row['kernel']}: bits {row['bits']}")
        assert keep == (pytest.approx(float(row["keep"]), abs=1e-3), f"{row['kernel']}: keep {row['keep']}")
    assert known[1]["keep"] == str(0.4 + 0.05)  # keep_actual, not the 0.46 that was asked for
    assert "Mean over 8 kernels: 5.00 bits, " in "".join(tree(out).itertext())


@pytest.mark.parametrize("values", [[0.0], [9e14, -9e14], [1e-300], [0, 1], [-3.2, 17.9], [5, 5.0001], [1e-9, 3e-9]])
def test_a_plot_of_odd_numbers_has_few_round_ticks_inside_and_no_number_that_is_none(values):
    text = figures.lines("t", [{"series": "s", "x": i, "y": y} for i, y in enumerate(values)], "x", "y", ("x", "y"))
    ET.fromstring(text)
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', text)
    low, high = figures.bounds(values)
    found = figures.ticks(low, high)
    assert 1 <= len(found) <= 6 and all(low - 1e-9 * abs(low) - 1e-12 <= t <= high + 1e-9 * abs(high) for t in found)
