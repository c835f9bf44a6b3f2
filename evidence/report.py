"""The report on all runs of a folder: ``python -m evidence.report OUT`` reads OUT/*/, prints the table of all runs and
writes OUT/report.html, OUT/results.md and OUT/csv/. Of runs of earlier code the settings that are gone are named."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import statistics
import sys
import textwrap
from pathlib import Path

from config import EXPERIMENTS, Config, InputError, flatten, override, read_settings
from evidence import figures, report_tables, rows
from evidence.figures import escape
from evidence.report_tables import RunFolder, Table
from support.files import read_json, replace_file, survive_ascii

NUMBERS = re.compile(r"[-+][0-9.]+(?:[ ,][^|!=@]*)?")  # a cell of our tables that begins with a sign


def read_runs(out) -> list[RunFolder]:
    """Return every run directory OUT/* with a result.json, in the order of experiment, variant and seed.

    Raises InputError with the file that cannot be shown, or where two directories hold the same run.
    """
    runs, folders = [], {}
    for path in sorted(Path(out).glob("*/result.json")):
        run = _read_run(path.parent)
        key = tuple(run.result[k] for k in ("exp", "name", "model", "data", "smoke", "seed"))
        if key in folders:
            raise InputError(f"{path}: the same run ({run.label}) as {folders[key]}; move one of the two away")
        folders[key] = path.parent
        runs.append(run)
    return sorted(runs, key=lambda run: tuple(run.result[k] for k in ("exp", "name", "seed")))


def _read_run(folder: Path) -> RunFolder:
    """Read file after file, making the report of each part at once, so that what no table can show is named."""
    run = RunFolder(folder, {})
    for name, read in (("result.json", _add_result), ("config.json", _add_config),
                       ("policy.json", lambda run, path: dataclasses.replace(run, policy=read_json(path)[0]))):
        try:
            if (folder / name).exists():
                run = read(run, folder / name)
                csv_files([run])
                page([run])
            else:
                run = dataclasses.replace(run, missing=(*run.missing, name))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{folder / name}: not what a run of this program writes ({type(error).__name__}: "
                             f"{str(error)[:200]!r}); remove it or run again") from None
    return run


def _add_result(run: RunFolder, path: Path) -> RunFolder:
    result, _ = read_json(path)
    if any(isinstance(v, str) and (len(v) > 200 or not v.isprintable()) for v in result.values()):
        raise ValueError("text that no table can show")
    return dataclasses.replace(run, result=report_tables.with_derived(result))


def _add_config(run: RunFolder, path: Path) -> RunFolder:
    config, _ = read_json(path)
    settings, retired = read_settings(config["settings"])
    return dataclasses.replace(run, config=config, retired=retired, settings={
        **flatten(settings), **{key: config["settings"][key] for key in retired}})


def results_table(results) -> str:
    """Return the table of all runs as text of at most 120 columns with two lines per run, and its legend."""
    table = report_tables.runs_table(results)
    cells = [table.columns[1:], *(row[1:] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    shown = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    lines = [shown[0], "-" * len(shown[0])]
    for row, numbers in zip(table.rows, shown[1:]):
        lines += [*textwrap.wrap(row[0], 120, subsequent_indent="  "), numbers]
    notes = list(table.notes)
    for r in results:
        scored = ["{} {:.2f} [{:.2f}, {:.2f}]".format(word, r[f"{key}_acc_full"], *r[f"{key}_interval_full"])
                  for word, key in (("baseline", "baseline"), ("final", "final"), ("packed", "deployed"))
                  if r.get(f"{key}_interval_full")]
        if scored:
            notes.append(f"exp {report_tables.name_of(r)} seed {r['seed']}, whole test split (n = {r['test_images']}, "
                         f"95 % intervals): {', '.join(scored)}")
    return "\n".join([*lines, "", *(textwrap.fill(note, 120, subsequent_indent="    ") for note in notes)])


def _markdown(table: Table) -> str:
    """Return a table, no cell of which is taken for the signs of Markdown or HTML, and its notes as a list."""
    header, *rows = ("| " + " | ".join(
        figures.clean(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in row) + " |"
        for row in (table.columns, *table.rows))
    return "\n".join([header, "|" + "---|" * len(table.columns), *rows, "", *(f"- {n}" for n in table.notes), ""])


def csv_of(rows: list[dict]) -> str:
    """Return rows with the same keys as comma-separated text."""
    return csv_text(rows[0], [row.values() for row in rows])


def csv_text(columns, lines) -> str:
    """Return lines below a header, as comma-separated text. A text that a spreadsheet would take for a formula gets an
    apostrophe in front: names of runs, blocks and kernels come from the user's files."""
    def cell(value):
        formula = isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and not NUMBERS.fullmatch(value)
        return f"'{value}" if formula else value

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *([cell(value) for value in line] for line in lines)])
    return text.getvalue()


def csv_files(runs: list[RunFolder]) -> dict[str, str]:
    """Return name → content of every CSV: a file per table, and one per kind of figure with the rows of all runs."""
    files = {f"{table.key}.csv": csv_text(table.columns, table.rows) for table in report_tables.all_tables(runs)}
    drawn: dict[str, list[dict]] = {}
    for figures_ in (*map(rows.experiment_figures, report_tables.grouped(runs).values()), *map(rows.run_figures, runs)):
        for figure in figures_:
            drawn.setdefault(figure.name, []).extend(figure.rows)
    return files | {f"{name}.csv": csv_of(lines) for name, lines in drawn.items()}


STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1a1a1a; --soft: #595959; --rule: #ccc; }
@media (prefers-color-scheme: dark) { :root { --bg: #15181b; --fg: #e8e8e8; --soft: #a9b0b6; --rule: #43494f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0.8rem; max-width: 84rem; background: var(--bg); color: var(--fg);
 font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
.note, figcaption, dt { color: var(--soft); font-size: 0.85rem; } .note { margin: 0.3rem 0; }
section { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; overflow-wrap: break-word; }
th, td { padding: 0.25rem 0.5rem; text-align: left; vertical-align: top; border-top: 1px solid var(--rule); }
@media (max-width: 60rem) {
 table { overflow-wrap: anywhere; } thead { display: none; }
 tr { display: block; padding: 0.5rem 0; border-top: 1px solid var(--rule); }
 tbody th, td { display: grid; grid-template-columns: 8rem minmax(0, 1fr); border: 0; padding: 0.1rem 0.5rem; }
 tbody th::before, td::before { content: attr(data-label); color: var(--soft); font-weight: normal; } }
figure { margin: 0.5rem 0; max-width: 30rem; }
svg { display: block; width: 100%; color: var(--fg); font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .track { fill: currentColor; fill-opacity: 0.12; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: currentColor; }
details { border: 1px solid var(--rule); margin: 0.6rem 0; padding: 0 0.7rem; }
summary { cursor: pointer; padding: 0.5rem 0; font-weight: 600; } dd { margin: 0 0 0.4rem; font-size: 0.85rem; }
"""


def html_table(table: Table) -> str:
    """Return a table with heading and notes; on a narrow screen each of its rows is a card."""
    lines = [f'<section id="{table.key}"><h2>{escape(table.title)}</h2><table><thead><tr>',
             *(f'<th scope="col">{escape(c)}</th>' for c in table.columns), "</tr></thead><tbody>"]
    for row in table.rows:
        lines += ["<tr>", f'<th scope="row" data-label="{escape(table.columns[0])}">{escape(row[0])}</th>',
                  *(f'<td data-label="{escape(c)}">{escape(cell)}</td>' for c, cell in zip(table.columns[1:], row[1:])),
                  "</tr>"]
    notes = (f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return "\n".join([*lines, "</tbody></table>", *notes, "</section>"])


def page(runs: list[RunFolder]) -> str:
    """Return the whole report as one file: HTML that is well-formed XML, without scripts or anything from elsewhere."""
    experiments, (verdict, *others) = report_tables.grouped(runs), report_tables.all_tables(runs)
    small, old = sum(run.result["smoke"] for run in runs), sum(bool(run.retired) for run in runs)
    parts = [
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/><title>HiReLC: report</title>'
        f"<style>{STYLE}</style></head><body><h1>HiReLC: report</h1>",
        f"<p><strong>{small} of {len(runs)} runs: {escape(report_tables.MINIATURE)}</strong></p>" * bool(small),
        f"<p>Measured by earlier code: {old} of {len(runs)} runs; their settings that are gone are named with each "
        "run below.</p>" * bool(old), html_table(verdict),
        "<p>What runs of this implementation measured, beside what the paper (arXiv 2606.26002) reports. Tables and "
        "rows of figures are in <code>csv/</code> too.</p>", *map(html_table, others)]
    for exp, groups in experiments.items():
        title = f"Experiment {exp}: {EXPERIMENTS[exp].title}" if exp in EXPERIMENTS else "Users' networks"
        parts += [f'<section id="exp{exp}"><h2>{escape(title)}</h2>',
                  *(figure.html() for figure in rows.experiment_figures(groups)),
                  *(_run_section(run) for group in groups for run in group.runs), "</section>"]
    return "\n".join(parts) + "\n</body></html>\n"


def _run_section(run: RunFolder) -> str:
    """Return one run: where and how it was made, what differs, its notes, and its figures."""
    r, config, settings = run.result, run.config or {}, run.settings or {}
    hardware, exp = config.get("hardware"), EXPERIMENTS.get(r["exp"])
    change = report_tables.differing(run.settings, flatten(override(Config(), exp.settings if exp else {})))
    facts = [
        ("command", " ".join(config.get("command") or ())), ("date", config.get("started")),
        ("hardware", hardware and f"{hardware['device']}, {hardware['threads']} threads"),
        ("versions", " ".join(f"{key}={value}" for key, value in (config.get("versions") or {}).items())),
        ("git", config.get("git")), ("estimated drop", _votes(r)),
        ("settings that differ from the experiment's",
         run.settings and (report_tables.shown_settings(change) or "none")),
        ("settings that are gone", report_tables.shown_settings({key: settings[key] for key in run.retired})),
        ("notes", " · ".join(r.get("notes") or ())), ("files that are missing", ", ".join(run.missing))]
    shown = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts if value)
    return (f"<details><summary>{escape(run.label)}: accuracy {r['baseline_acc']:.2f} → {r['final_acc']:.2f}, CR "
            f"{r['cr']:.2f}</summary><dl>{shown}</dl>"
            + "\n".join(figure.html() for figure in rows.run_figures(run)) + "</details>")


def _votes(r: dict) -> str:
    """Return what the votes of the trained low-level agents are worth beside uniform draws; empty where unknown."""
    pairs = [(step.get("consensus_drop"), step.get("random_drop")) for step in r.get("searches") or ()]
    means = [statistics.fmean(drops) for drops in zip(*(pair for pair in pairs if None not in pair))]
    return "of the votes {:.2f} points, of uniformly drawn actions {:.2f}".format(*means) if means else ""


def write_report(out, runs: list[RunFolder]) -> None:
    """Write report.html, results.md and csv/ into the folder of the runs."""
    out = Path(out)
    (out / "csv").mkdir(exist_ok=True)
    for name, text in csv_files(runs).items():
        replace_file(out / "csv" / name, text.encode())
    tables_as_text = "\n".join(f"## {table.title}\n\n{_markdown(table)}" for table in report_tables.all_tables(runs))
    replace_file(out / "results.md", tables_as_text.encode())
    replace_file(out / "report.html", page(runs).encode())


def main(argv=None) -> int:
    """Print the table of all runs below OUT and write the report beside them; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    survive_ascii()
    try:
        if len(argv) != 1:
            raise InputError("usage: python -m evidence.report OUT, where OUT holds run directories")
        runs = read_runs(argv[0])
        if not runs:
            raise InputError(f"{argv[0]}: no */result.json in it; run an experiment first: python hirelc.py --exp 3")
        write_report(argv[0], runs)
        print(results_table([run.result for run in runs]))
        for gone in dict.fromkeys(run.retired for run in runs if run.retired):
            names = ", ".join(run.path.name for run in runs if run.retired == gone)
            print(f"\nMeasured by earlier code (settings that are gone: {', '.join(gone)}): {names}")
        print(f"\n{Path(argv[0]) / 'report.html'}: tables and figures; results.md and csv/ beside it")
    except (InputError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
