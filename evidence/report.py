"""The report on all runs of a folder: ``python -m evidence.report OUT`` reads OUT/*/ and nothing else, prints the table
of all runs and writes OUT/report.html, OUT/results.md and OUT/csv/. Run directories of earlier code are read too; their
settings that are gone are named."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import sys
import textwrap
from pathlib import Path

from config import EXPERIMENTS, InputError, flatten, read_settings
from evidence import figures, rows, tables
from evidence.figures import escape
from evidence.tables import Family, Run, Table
from support.files import read_json, survive_ascii, write_text

MINIATURE = ("miniature (--smoke): narrow networks on synthetic images with tiny budgets; only the code path is the "
             "paper's, not the numbers.")
NUMBERS = re.compile(r"[-+][0-9.]+(?:[ ,][^|!=@]*)?")  # a cell of our tables that begins with a sign


# ---------------------------------------------------------------------------------------------------------------
# Reading run directories


def read_runs(out) -> list[Run]:
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


def _read_run(folder: Path) -> Run:
    """Read file after file, making the report of each part at once, so that what no table can show is named."""
    run = Run(folder, {})
    for name, read in (("result.json", _add_result), ("config.json", _add_config), ("policy.json", _add_policy),
                       ("updates.csv", _add_updates)):
        try:
            if (folder / name).exists():
                run = read(run, folder / name)
                results_table([run.result])
                csv_files([run])
                page([run])
            else:
                run = dataclasses.replace(run, missing=(*run.missing, name))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, csv.Error) as error:
            raise InputError(f"{folder / name}: not what a run of this program writes ({type(error).__name__}: "
                             f"{str(error)[:200]!r}); remove it or run again") from None
    return run


def _add_result(run: Run, path: Path) -> Run:
    result, _ = read_json(path)
    if any(isinstance(v, str) and (len(v) > 200 or not v.isprintable()) for v in result.values()):
        raise ValueError("text that no table can show")
    return dataclasses.replace(run, result=tables.with_derived(result))


def _add_config(run: Run, path: Path) -> Run:
    config, _ = read_json(path)
    settings, retired = read_settings(config["settings"])
    return dataclasses.replace(run, config=config, retired=retired, settings={
        **flatten(settings), **{key: config["settings"][key] for key in retired}})


def _add_policy(run: Run, path: Path) -> Run:
    return dataclasses.replace(run, policy=read_json(path)[0])


def _add_updates(run: Run, path: Path) -> Run:
    """Add the rows with their entropy as a float, None for one that is not finite."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        updates = list(reader)
    if "entropy" not in (reader.fieldnames or ()):
        raise ValueError("no column 'entropy'")
    for row in updates:
        value = float(row["entropy"])
        row["entropy"] = value if abs(value) < 1e15 else None
    return dataclasses.replace(run, updates=updates)


# ---------------------------------------------------------------------------------------------------------------
# The table of all runs, as text and Markdown


COLUMNS = ("baseline", "final", "drop", "packed", "CR", "null: CR", "compl.", "FP32 KB", "packed KB", "ratio", "Eq. 3",
           "paper: drop", "CR")


def _number(value, form="{:.2f}"):
    return "-" if value is None else form.format(value)


def _identity(r: dict) -> str:
    """Name a run: experiment, variant, network, data, seed, and what is not the default."""
    name = "-".join(filter(None, [str(r["exp"]), r["name"]]))
    return f"exp {name}: {r['model']}, {r['data']}, seed {r['seed']}, scope {r['scope']}, mode {r['mode']}" + (
        ", miniature" if r["smoke"] else "")


def _row(r: dict) -> list[str]:
    null, paper = r["null_controller"], EXPERIMENTS[r["exp"]].paper if r["exp"] in EXPERIMENTS else None
    return [*(_number(r[key]) for key in ("baseline_acc", "final_acc", "drop", "deployed_acc", "cr")),
            f"{null['cr_mean']:.2f}±{null['cr_std']:.2f}", _number(r["compliance"], "{:.1f}"),
            *(_number(r[key] / 1000, "{:.1f}") for key in ("fp32_bytes", "packed_bytes")),
            _number(r["fp32_bytes"] / r["packed_bytes"]), "met" if r["cr_met"] and r["drop_met"] else "no",
            _number(paper and paper.drop), _number(paper and paper.cr)]


def _legend(results) -> list[str]:
    """Return the lines below the table."""
    lines = [
        *tables.chosen_on(results),
        "final: the best epoch of fine-tuning (mode paper: FP32 weights off the grid, as the paper scores them; mode "
        "qat: on the grid); packed: read back from packed.pt, with BatchNorm statistics estimated again.",
        "CR: compressed kernels alone (Eq. 22); FP32 KB: every parameter and buffer; packed KB: packed.pt (1 KB = 1000 "
        "bytes); ratio: FP32 KB / packed KB; compl.: budget compliance in percent.",
        "Eq. 3: whether CR >= 1/rho_target and drop <= delta_max; null: every action drawn uniformly, same votes "
        "(mean ± standard deviation, no training)."]
    if any(r["smoke"] for r in results):
        lines.append(MINIATURE)
    full = [r for r in results if r["final_acc_full"] is not None]
    if full:
        lines += ["", "Whole test split, with 95 % intervals (drop: final against baseline; packed drop: against the "
                  "baseline with BatchNorm statistics estimated again as well):"]
    for r in full:
        parts = [f"{word} {r[f'{key}_acc_full']:.2f} [{low:.2f}, {high:.2f}]" for word, key in (
            ("baseline", "baseline"), ("final", "final"), ("grid", "grid"), ("packed", "deployed"))
            if r.get(f"{key}_acc_full") is not None for low, high in [r[f"{key}_interval_full"]]]
        if r.get("deployed_bn_drop_full") is not None:
            parts.append(f"packed drop {r['deployed_bn_drop_full']:.2f}")
        lines.append(f"  {_short(r)}: {', '.join(parts)} (n = {r['test_images']})")
    enforced = [r for r in results if r["voted_retained"] != r["retained"]]
    if enforced:
        lines += ["", "Target enforced after the vote (rho: retained fraction of the kernels):"]
    lines += [f"  {_short(r)}: rho {r['retained']:.4f} for a target of {r['target']:.4f} (voted "
              f"{r['voted_retained']:.4f}), compliance {r['compliance']:.1f} % (voted {r['voted_compliance']:.1f} %)"
              for r in enforced]
    return lines


def _short(r: dict) -> str:
    return f"exp {'-'.join(filter(None, [str(r['exp']), r['name']]))} seed {r['seed']}"


def results_table(results, markdown: bool = False) -> str:
    """Return a table with two lines per run (one in Markdown), at most 120 columns wide as text, and its legend."""
    cells = [list(COLUMNS)] + [_row(r) for r in results]
    if markdown:
        lines = [_markdown_row(["run", *COLUMNS]), "|" + "---|" * (len(COLUMNS) + 1)]
        lines += [_markdown_row([_identity(r), *row]) for r, row in zip(results, cells[1:])]
        # a list, since Markdown would join the lines of a paragraph
        return "\n".join(lines + [""] + [f"- {line.strip()}" if line else "" for line in _legend(results)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    shown = ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in cells]
    lines = [shown[0], "-" * len(shown[0])]
    for r, row in zip(results, shown[1:]):
        lines += [*textwrap.wrap(_identity(r), 120, subsequent_indent="  "), row]
    return "\n".join(lines + [""] + [part for line in _legend(results) for part in (textwrap.wrap(
        line, 120, subsequent_indent="    ", drop_whitespace=True) or [""])])


def _markdown_row(cells) -> str:
    """Return a row in which no cell's text is taken for the signs of Markdown or HTML."""
    shown = [figures.clean(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells]
    return "| " + " | ".join(shown) + " |"


def markdown(table: Table) -> str:
    """Return a table with its title and notes."""
    return "\n".join([f"## {table.title}", "", _markdown_row(table.columns), "|" + "---|" * len(table.columns),
                      *map(_markdown_row, table.rows), "", *(f"- {note}" for note in table.notes)]) + "\n"


def csv_text(columns, lines) -> str:
    """Return lines below a header, as comma-separated text. A text that a spreadsheet would take for a formula gets an
    apostrophe in front: names of runs, blocks and kernels come from the user's files."""
    def cell(value):
        formula = isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and not NUMBERS.fullmatch(value)
        return f"'{value}" if formula else value

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *([cell(value) for value in line] for line in lines)])
    return text.getvalue()


def csv_files(runs: list[Run]) -> dict[str, str]:
    """Return name → content of every CSV: the tables, the raw numbers of the runs, and the rows of each figure."""
    content = {"runs": tables.raw_rows(runs)}
    for figure in [f for run in runs for f in rows.run_figures(run)] + [
            f for fam in tables.families(runs) for f in rows.family_figures(fam)]:
        content.setdefault(figure.name, []).extend(figure.rows)
    files = {f"{t.key}.csv": csv_text(t.columns, t.rows) for t in tables.all_tables(runs)}
    for name, lines in content.items():
        columns = list(dict.fromkeys(key for line in lines for key in line))
        files[f"{name}.csv"] = csv_text(columns, [[line.get(key) for key in columns] for line in lines])
    return files


# ---------------------------------------------------------------------------------------------------------------
# The page


STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1a1a1a; --soft: #595959; --rule: #ccc; --tint: #f3f5f7; }
@media (prefers-color-scheme: dark) {
 :root { --bg: #15181b; --fg: #e8e8e8; --soft: #a9b0b6; --rule: #43494f; --tint: #1f2428; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0.8rem; max-width: 76rem; background: var(--bg); color: var(--fg);
 font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
a { color: inherit; } nav ul { padding: 0; display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; list-style: none; }
nav a { display: inline-block; padding: 0.3rem 0; }
.note { color: var(--soft); font-size: 0.85rem; margin: 0.3rem 0; }
.wide { overflow-x: auto; max-width: 100%; border: 1px solid var(--rule); }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.5rem; text-align: left; border-top: 1px solid var(--rule); white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
tbody th { position: sticky; left: 0; background: var(--bg); }
td.free { white-space: normal; min-width: 9.5rem; }
tr.paper td { font-style: italic; } tr.paper > * { border-top: 2px solid var(--soft); }
tr.null td { background: var(--tint); } .cards td { white-space: normal; } .cards td.free { min-width: 14rem; }
@media (max-width: 40rem) {
 .cards thead { display: none; } .cards tr { display: block; padding: 0.5rem 0; border-top: 1px solid var(--rule); }
 .cards th, .cards td { display: grid; grid-template-columns: 7.5rem minmax(0, 1fr); white-space: normal; border: 0;
  padding: 0.1rem 0.5rem; position: static; }
 .cards th::before, .cards td::before { content: attr(data-label); color: var(--soft); font-weight: normal; } }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
 align-items: start; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: 0.85rem; color: var(--soft); }
svg { display: block; width: 100%; max-width: 30rem; height: auto; color: var(--fg); font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .small { font-size: 9.5px; }
svg .grid { stroke: var(--rule); stroke-width: 0.6; } svg .axis { stroke: currentColor; stroke-width: 1; }
svg .track { fill: currentColor; fill-opacity: 0.12; }
details { border: 1px solid var(--rule); margin: 0.6rem 0; padding: 0 0.7rem 0.4rem; }
summary { cursor: pointer; padding: 0.5rem 0; font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, 11rem) minmax(0, 1fr); gap: 0.2rem 0.8rem; font-size: 0.85rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: 0.4rem; } }
@media print { .wide { overflow: visible; border: 0; } table { font-size: 6.5pt; } th, td { white-space: normal; }
 nav { display: none; } details::details-content { content-visibility: visible; block-size: auto; } }
"""
WRAPPED = {"network, data", "what differs", "strategies of the blocks, %", "configuration", "drop from BN again",
           "against the null controller", "accuracy minus the experiment's, same seeds"}  # cells of several lines


def html_table(table: Table) -> str:
    """Return a table with heading and notes, in a box that scrolls by itself; the verdict as cards on a phone."""
    lines = [f'<section id="{table.key}"><h2>{escape(table.title)}</h2><div class="wide'
             f'{" cards" if table.key == "verdict" else ""}" role="region" tabindex="0" '
             f'aria-label="{escape(table.title)}"><table><thead><tr>',
             *(f'<th scope="col">{escape(c)}</th>' for c in table.columns), "</tr></thead><tbody>"]
    for row in table.rows:
        kind = row[1].partition(",")[0]
        lines.append(f'<tr class="{kind}">' if table.columns[1] in ("whose", "configuration") and kind in (
            "paper", "null") else "<tr>")
        lines.append(f'<th scope="row" data-label="{escape(table.columns[0])}">{escape(row[0])}</th>')
        lines += [f'<td{" class=" + chr(34) + "free" + chr(34) if c in WRAPPED else ""} data-label="{escape(c)}">'
                  f"{escape(cell)}</td>" for c, cell in zip(table.columns[1:], row[1:])]
        lines.append("</tr>")
    notes = (f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return "\n".join([*lines, "</tbody></table></div>", *notes, "</section>"])


def page(runs: list[Run]) -> str:
    """Return the whole report as one file: HTML that is well-formed XML, without scripts or anything from elsewhere."""
    groups, (verdict, *others) = tables.families(runs), tables.all_tables(runs)
    small, old = sum(run.result["smoke"] for run in runs), sum(bool(run.retired) for run in runs)
    sections = [(t.key, t.title.partition(":")[0]) for t in others]
    sections += [(f"exp{fam.exp}", _title(fam)) for fam in groups]
    title = f"HiReLC: report on {len(runs)} run{'s' if len(runs) > 1 else ''}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{title}</title><style>{STYLE}</style></head><body><header><h1>{title}</h1></header><main>"]
    if small:
        parts.append(f"<p><strong>{small} of {len(runs)} runs {'is a' if small == 1 else 'are'} miniature"
                     f"{'s' * (small > 1)}</strong>, marked so. {escape(MINIATURE.capitalize())}</p>")
    if old:
        parts.append(f"<p>{old} of {len(runs)} runs were measured by earlier code: their settings that are gone are "
                     "named with each run below.</p>")
    parts += [html_table(verdict), '<nav aria-label="Sections"><ul>' + "".join(
        f'<li><a href="#{key}">{escape(text)}</a></li>' for key, text in sections) + "</ul></nav>",
        "<p>What runs of this implementation measured, beside what the paper (arXiv 2606.26002) reports. Every number "
        "comes from the run directories beside this file; tables and figures are in <code>csv/</code> too.</p>"]
    parts += map(html_table, others)
    for fam in groups:
        parts.append(f'<section id="exp{fam.exp}"><h2>{escape(_title(fam))}</h2><div class="figures">')
        parts += [*(f.html(f"e{fam.exp}-{k}") for k, f in enumerate(rows.family_figures(fam))), "</div>"]
        parts += [_run_section(run, fam, runs.index(run)) for g in fam.groups for run in g.runs]
        parts.append("</section>")
    return "\n".join(parts) + "\n</main></body></html>\n"


def _title(fam: Family) -> str:
    return f"Experiment {fam.exp}: {EXPERIMENTS[fam.exp].title}" + fam.label.removeprefix(f"exp {fam.exp}") \
        if fam.exp in EXPERIMENTS else fam.label.capitalize()


def _run_section(run: Run, fam: Family, number: int) -> str:
    """Return one run: where and how it was made, what differs, its notes, and its figures."""
    r, config, settings = run.result, run.config or {}, run.settings or {}
    change = tables.differing(run.settings, tables.experiment_settings(fam.exp))
    hardware = config.get("hardware")
    facts = [
        ("command", " ".join(config.get("command") or ())), ("date", config.get("started")),
        ("hardware", hardware and f"{hardware['device']}, {hardware['threads']} threads"),
        ("versions", _pairs(config.get("versions") or {}, "{} {}")), ("git", config.get("git")),
        ("protocol", r.get("protocol")), ("evaluations", r.get("evaluations")),
        ("mean KL of the updates", _pairs(r.get("mean_kl") or {}, "{} {:.4g}")),
        ("timings, s", _pairs(r.get("timings") or {}, "{} {:.1f}")),
        ("settings that differ from the experiment's", None if change is None else _settings(change) or "none"),
        ("settings that are gone (measured by earlier code)", _settings({k: settings[k] for k in run.retired})),
        ("notes", " · ".join(r.get("notes") or ())), ("files that are missing", ", ".join(run.missing))]
    shown = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts if v not in (None, ""))
    drawn = "\n".join(figure.html(f"r{number}-{k}") for k, figure in enumerate(rows.run_figures(run)))
    return (f'<details id="run{number}"><summary>{escape(run.label)}: accuracy {r["baseline_acc"]:.2f} → '
            f'{r["final_acc"]:.2f}, CR {r["cr"]:.2f}</summary><dl>{shown}</dl>'
            f'<div class="figures">{drawn}</div></details>')


def _pairs(values: dict, form: str) -> str:
    return ", ".join(form.format(*item) for item in values.items())


def _settings(values: dict) -> str:
    return ", ".join(f"{key}={tables.shown_value(value)}" for key, value in sorted(values.items()))


def write_report(out, runs: list[Run]) -> None:
    """Write report.html, results.md and csv/ into the folder of the runs."""
    out, shown = Path(out), tables.all_tables(runs)
    (out / "csv").mkdir(exist_ok=True)
    for name, text in csv_files(runs).items():
        write_text(out / "csv" / name, text)
    parts = [markdown(shown[0]), "## All runs\n\n" + results_table([run.result for run in runs], markdown=True) + "\n",
             *map(markdown, shown[1:])]
    write_text(out / "results.md", "\n".join(parts))
    write_text(out / "report.html", page(runs))


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
            print("\n" + textwrap.fill(f"Measured by earlier code (settings that are gone: {', '.join(gone)}): {names}",
                                       120))
        print(f"\n{Path(argv[0]) / 'report.html'}: tables and figures; results.md and csv/ beside it")
    except (InputError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
