"""Statistics, tables and the page (paper §5). Reads run directories and nothing else; ``python report.py OUT`` prints
the table of all runs and writes OUT/report.html, OUT/results.md and OUT/csv/."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from evidence import figures
from evidence import tables
from config import EXPERIMENTS, InputError
from evidence.figures import escape
from support.files import read_json, replace_file
from evidence.tables import Run, Table

NUMBERS = re.compile(r"[-+][0-9.]+(?:[ ,][^|!=@]*)?")  # a cell of the tables' own that begins with a sign


def write_text(path, text: str) -> None:
    """Write a whole file or nothing."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path, value) -> None:
    """Write plain data as JSON; raises ValueError for NaN and infinity, which are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_runs(out) -> list[Run]:
    """Every run directory OUT/* with a result.json, in the order of experiment, variant and seed, with what else of its
    files the report shows. Raises InputError with the file that is broken, or where two folders hold the same run."""
    runs, folders = [], {}
    for path in sorted(Path(out).glob("*/result.json")):
        result, folder = _read(path, _read_result), path.parent
        more = {name: _read(folder / name, reader) if (folder / name).exists() else None
                for name, reader in (("config.json", _read_config), ("policy.json", _read_policy),
                                     ("updates.csv", _read_updates))}
        run = Run(folder, tables.with_derived(result), more["config.json"], more["policy.json"], more["updates.csv"],
                  tuple(name for name, value in more.items() if value is None),
                  tables.read_settings(more["config.json"]))
        key = tuple(result[k] for k in ("exp", "name", "model", "data", "smoke", "seed"))
        if key in folders:
            raise InputError(f"{path}: the same run ({run.label}) as {folders[key]}; move one of the two away")
        folders[key] = folder
        runs.append(run)
    return sorted(runs, key=lambda run: (run.result["exp"], run.result["name"], run.result["seed"]))


def read_results(out) -> list[dict]:
    """Every OUT/*/result.json, in the order of experiment, variant and seed. Raises InputError for a broken one."""
    results = [_read(path, _read_result) for path in Path(out).glob("*/result.json")]
    return sorted(results, key=lambda r: (r["exp"], r["name"], r["seed"]))


def _read(path: Path, reader):
    """What ``reader`` makes of a file; an InputError that names it where it is not what this program writes."""
    try:
        return reader(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, csv.Error) as error:
        raise InputError(f"{path}: not a result of this program ({type(error).__name__}: {str(error)[:200]!r}); "
                         "remove it or run again") from None


def _read_result(path) -> dict:
    result, _ = read_json(path)
    tables.check_shape(result, tables.RESULT)
    if any(len(cell) > 200 or not cell.isprintable() for cell in _row(result)):
        raise ValueError("text that no table can show")
    results_table([result])  # whatever the table needs is there and of the right kind
    return result


def _read_config(path) -> dict:
    config, _ = read_json(path)
    tables.check_shape(config, tables.CONFIG)
    return config


def _read_policy(path) -> dict:
    policy, _ = read_json(path)
    tables.check_shape(policy, tables.POLICY)
    return policy


def _read_updates(path) -> list[dict]:
    """Rows with their three numbers as floats, None for one that is not finite."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        tables.check_shape(dict.fromkeys(reader.fieldnames or (), ""), tables.UPDATE, "the first line")
        rows = list(reader)
    for row in rows:
        tables.check_shape(row, tables.UPDATE)
        for key in tables.LEARNING:
            value = float(row[key])
            row[key] = value if abs(value) < 1e15 else None
    return rows


def _number(value, form="{:.2f}"):
    return "-" if value is None else form.format(value)


COLUMNS = ("exp", "network, data", "seed", "scope", "mode", "baseline", "final", "drop", "deployed", "CR", "FP32 KB",
           "packed KB", "ratio", "compl.", "Eq. 3", "null: CR", "compl.", "paper: base", "final", "drop", "CR",
           "compl.")


def _row(result: dict) -> list[str]:
    name = str(result["exp"]) + (f"-{result['name']}" if result["name"] else "")
    null = result["null_controller"]
    cells = [name, f"{result['model']}, {result['data']}" + (" (smoke)" if result["smoke"] else ""),
             str(result["seed"]), result["scope"], result["mode"], _number(result["baseline_acc"]),
             _number(result["final_acc"]), _number(result["drop"]), _number(result["deployed_acc"]),
             _number(result["cr"]), _number(result["fp32_bytes"] / 1000, "{:.1f}"),
             _number(result["packed_bytes"] / 1000, "{:.1f}"), _number(result["whole_model_ratio"]),
             _number(result["compliance"], "{:.1f}"),
             "met" if result["cr_met"] and result["drop_met"] else "no",
             f"{null['cr_mean']:.2f}±{null['cr_std']:.2f}",
             f"{null['compliance_mean']:.1f}±{null['compliance_std']:.1f}"]
    experiment = EXPERIMENTS.get(result["exp"])
    if experiment is None:
        return cells + ["-"] * 5
    p = experiment.paper
    return cells + [_number(p.baseline), _number(p.final), _number(p.drop), _number(p.cr),
                    _number(p.compliance, "{:.1f}")]


def _run(result: dict) -> str:
    return f"exp {result['exp']}{'-' + result['name'] if result['name'] else ''} seed {result['seed']}"


def _legend(results) -> list[str]:
    """The lines below the table."""
    legend = [
        "",
        *tables.chosen_on(results),
        "final: the best epoch of fine-tuning; mode paper: FP32 weights off the grid, as the paper scores them, qat: "
        "on it; deployed: read back from packed.pt.",
        "scope: paper's kernels, or all of them; CR: those kernels only (Eq. 22); FP32 KB: every parameter and buffer, "
        "packed KB: the size of packed.pt, in 1000 bytes; ratio: between these two; compl.: budget compliance in "
        "percent.",
        "Eq. 3: whether CR >= 1/rho_target and drop <= delta_max; null: every action drawn uniformly, same votes "
        "(mean ± standard deviation, no training)."]
    if any(r["smoke"] for r in results):
        legend.append("smoke: narrow networks on synthetic images with tiny budgets; only the code path is that of the "
                      "paper, not the numbers.")
    full = [r for r in results if r["final_acc_full"] is not None]
    if full:
        legend += ["", "Whole test split, with 95 % Wilson intervals:"]
        for r in full:
            low, high = r["final_interval_full"]
            b_low, b_high = r["baseline_interval_full"]
            legend.append(f"  {_run(r)}: baseline {r['baseline_acc_full']:.2f} [{b_low:.2f}, {b_high:.2f}], final "
                          f"{r['final_acc_full']:.2f} [{low:.2f}, {high:.2f}], deployed {r['deployed_acc_full']:.2f} "
                          f"(n = {r['test_images']})")
    enforced = [r for r in results if r["voted_retained"] != r["retained"]]
    if enforced:
        legend += ["", "Target enforced after the vote (rho: retained fraction of the kernels):"]
        legend += [f"  {_run(r)}: rho {r['retained']:.4f} for a target of {r['target']:.4f} (voted "
                   f"{r['voted_retained']:.4f}), compliance {r['compliance']:.1f} % (voted "
                   f"{r['voted_compliance']:.1f} %)" for r in enforced]
    return legend


def results_table(results, markdown: bool = False) -> str:
    """One row per run: measured, the null controller, and what the paper reports; with a legend below."""
    rows = [list(COLUMNS)] + [_row(r) for r in results]
    if markdown:
        lines = [_markdown_row(cells) for cells in rows]
        lines.insert(1, "|" + "---|" * len(COLUMNS))
    else:
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
                 for row in rows]
        lines.insert(1, "-" * len(lines[0]))
    legend = _legend(results)
    if markdown:  # a list, since Markdown would join the lines of a paragraph
        legend = [f"- {line.strip()}" if line else "" for line in legend]
    return "\n".join(lines + legend)


# ---------------------------------------------------------------------------------------------------------------
# Tables as Markdown, CSV and HTML


def _markdown_row(cells) -> str:
    """A row in which no cell's text is taken for Markdown's or HTML's own signs."""
    shown = [figures.clean(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells]
    return "| " + " | ".join(shown) + " |"


def markdown(table: Table) -> str:
    """A table with its title and notes."""
    lines = [f"## {table.title}", ""]
    if table.rows:
        lines += [_markdown_row(table.columns), "|" + "---|" * len(table.columns), *map(_markdown_row, table.rows), ""]
    return "\n".join(lines + [f"- {note}" for note in table.notes]) + "\n"


def csv_text(columns, rows) -> str:
    """Rows below a header, as comma-separated text. A text that a spreadsheet would take for a formula gets an
    apostrophe in front: names of runs, blocks and kernels come from the user's files."""
    def cell(value):
        formula = isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and not NUMBERS.fullmatch(value)
        return f"'{value}" if formula else value

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(value) for value in row] for row in rows)
    return text.getvalue()


def _dict_csv(rows: list[dict]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row if key != "say"))
    return csv_text(names, [[row.get(name) for name in names] for row in rows])


WRAPPED = {"network, data", "what differs", "strategies of the blocks, %", "configuration",
           "accuracy minus the experiment's, same seeds"}  # columns whose cells may take several lines


def _html_table(columns, rows, caption: str) -> str:
    """A table in a box that scrolls by itself; the first cell of a row is its heading."""
    lines = ['<div class="wide" role="region" tabindex="0" aria-label="' + escape(caption) + '"><table>',
             "<thead><tr>" + "".join(f'<th scope="col">{escape(c)}</th>' for c in columns) + "</tr></thead><tbody>"]
    wrap = [' class="free"' if c in WRAPPED else "" for c in columns]
    for row in rows:
        kind = row[1].partition(",")[0] if columns[1] in ("whose", "configuration") else ""
        lines.append(f'<tr class="{kind}">' * (kind in ("paper", "null")) or "<tr>")
        lines.append(f'<th scope="row">{escape(row[0])}</th>'
                     + "".join(f"<td{w}>{escape(c)}</td>" for c, w in zip(row[1:], wrap[1:])) + "</tr>")
    return "\n".join(lines) + "</tbody></table></div>"


def html_table(table: Table) -> str:
    """A table of the report with its heading and notes."""
    parts = [f'<section id="{table.key}"><h2>{escape(table.title)}</h2>']
    if table.rows:
        parts.append(_html_table(table.columns, table.rows, table.title))
    parts += [f'<p class="note">{escape(note)}</p>' for note in table.notes]
    return "\n".join(parts) + "\n</section>"


# ---------------------------------------------------------------------------------------------------------------
# The page


@dataclass(frozen=True)
class Figure:
    """A figure of one run or one experiment: its CSV (``name``), how it is drawn, and the columns that a plot shows."""
    name: str
    caption: str
    rows: list[dict]
    draw: object  # (figure, rows) → SVG
    y: str = "y"
    x: str = "x"

    def html(self, key: str, whose: str) -> str:
        """The figure, or one line where there is nothing to draw."""
        caption = f"{self.caption}: {whose}"
        if not self.rows:
            return f'<p class="note">{escape(caption)}: nothing measured here.</p>'
        shown = [{**row, "x": row.get(self.x), "y": row.get(self.y)} if "series" in row else row for row in self.rows
                 if "series" not in row or row[self.y] is not None]
        if not shown:
            return f'<p class="note">{escape(caption)}: no finite number to draw.</p>'
        drawn = self.draw((key, caption, f"{len(shown)} values, which csv/{self.name}.csv holds too"), shown)
        return (f'<figure data-csv="{self.name}" data-columns="{self.x} {self.y}">{drawn}'
                f"<figcaption>{escape(caption)}</figcaption></figure>")


def _plot(x_label, y_label, **how):
    return lambda figure, rows: figures.xy(figure, rows, x_label, y_label, **how)


def run_figures(run: Run) -> list[Figure]:
    """What is drawn of every run."""
    learning = tables.learning_rows(run)
    told = run.result.get("cycle_budgets")
    drawn = [
        Figure("allocation", "Allocation per kernel (Fig. 4)", tables.allocation_rows(run), figures.allocation),
        Figure("strategies", "Strategy and budget of every block, by cycle (Fig. 5)" if told else
               "Strategy and budget of every block in the best cycle (Fig. 5; the run does not tell the others)",
               tables.strategy_rows(run), figures.strategies),
        Figure("budgets", "Budget and what was realised, by block", tables.budget_rows(run),
               lambda figure, rows: figures.dumbbells(figure, rows, "retained fraction ρ"))]
    for key, label in (("entropy", "entropy"), ("approx_kl", "approximate KL"), ("value_loss", "value loss")):
        values = [row[key] for row in learning if row[key] is not None]
        log = bool(values) and min(values) > 0 and max(values) > 50 * min(values)
        drawn.append(Figure("learning", f"Learning curves: {label}, mean over agents and blocks", learning,
                            _plot("update of an agent", label + (" (log)" if log else ""), log=log), key))
    return drawn


def family_figures(fam: tables.Family) -> list[Figure]:
    """What is drawn of all runs of an experiment together."""
    cycles = tables.cycle_rows(fam)
    return [
        Figure("cycles", "Accuracy by cycle, after fine-tuning (Fig. 6)", cycles,
               _plot("cycle", "accuracy, %", whole=True), "accuracy", "cycle"),
        Figure("cycles", "Accuracy of the packed file by cycle", cycles,
               _plot("cycle", "accuracy, %", whole=True), "packed_accuracy", "cycle"),
        Figure("cycles", "Drop by cycle, beside the paper's", cycles,
               _plot("cycle", "drop, points", whole=True), "drop", "cycle"),
        Figure("cycles", "Compression ratio by cycle (Fig. 6)", cycles,
               _plot("cycle", "CR (Eq. 22)", whole=True), "cr", "cycle"),
        Figure("guidance", "Sensitivity guidance on and off: accuracy by seed (Fig. 7)", tables.guidance_rows(fam),
               _plot("seed", "final accuracy, %", whole=True, line=False)),
        Figure("guidance-blocks", "Sensitivity guidance on and off: CR by block, mean and range over seeds (Fig. 8)",
               tables.guidance_block_rows(fam), _plot("block", "CR of the block", whole=True)),
        Figure("surrogate", "Surrogate: prediction before fine-tuning and accuracy measured",
               tables.surrogate_rows(fam), _plot("measured, %", "predicted, %", line=False, diagonal=True)),
        Figure("size", "Accuracy of the packed file and its size, with 95 % intervals where the whole split was scored",
               tables.size_rows(fam), _plot("packed file, KB", "accuracy, %", line=False))]


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
td.free { white-space: normal; min-width: 9.5rem; }
thead th { vertical-align: bottom; } tbody th { position: sticky; left: 0; background: var(--bg); }
tr.paper td { font-style: italic; } tr.paper > * { border-top: 2px solid var(--soft); }
tr.null td { background: var(--tint); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
 align-items: start; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: 0.85rem; color: var(--soft); }
svg { display: block; width: 100%; max-width: 30rem; height: auto; color: var(--fg); font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .small { font-size: 9.5px; }
svg .grid { stroke: var(--rule); stroke-width: 0.6; } svg .axis { stroke: currentColor; stroke-width: 1; }
svg .track { fill: currentColor; fill-opacity: 0.12; }
details { border: 1px solid var(--rule); margin: 0.6rem 0; padding: 0 0.7rem; }
details[open] { padding-bottom: 0.7rem; }
summary { cursor: pointer; padding: 0.5rem 0; font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: 0.2rem 0.8rem;
 margin: 0.5rem 0; font-size: 0.85rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: 0.4rem; } }
@media print {
 :root { color-scheme: light; --bg: #fff; --fg: #000; --soft: #333; --rule: #999; --tint: #eee; }
 @page { margin: 10mm; }
 html { font-size: 11px; } body { max-width: none; padding: 0; } #all table { font-size: 4.8pt; } nav { display: none; }
 .wide { overflow: visible; border: 0; } table { font-size: 6.5pt; } th, td { white-space: normal; padding: 1pt 2pt; }
 td { min-width: 2.9em; } td.free { min-width: 0; } tbody th { position: static; } tr { break-inside: avoid; }
 .figures { grid-template-columns: 1fr 1fr; } h2, summary { break-after: avoid; }
 details { border: 0; padding: 0; } details::details-content { content-visibility: visible; block-size: auto; } }
"""


def page(runs: list[Run]) -> str:
    """The whole report as one file: HTML that is well-formed XML, without scripts or anything from elsewhere."""
    found = tables.families(runs)
    shown = tables.all_tables(runs)
    results = [run.result for run in runs]
    sections = [(t.key, t.title.partition(":")[0]) for t in shown] + [("all", "All runs")]
    sections += [(f"exp{fam.exp}", _family_title(fam).partition(":")[0]) for fam in found]
    parts = [
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>HiReLC: report on {len(runs)} runs</title><style>{STYLE}</style></head><body>",
        f"<header><h1>HiReLC: report on {len(runs)} run{'s' if len(runs) > 1 else ''}</h1>",
        "<p>What runs of this implementation measured, beside what the paper (arXiv 2606.26002) reports. Every number "
        "comes from the run directories beside this file; those of tables and figures are in <code>csv/</code>.</p>"]
    if any(r["smoke"] for r in results):
        parts.append("<p><strong>Runs marked smoke are of narrow networks on drawn images with tiny budgets: only the "
                     "code path is that of the paper, not the numbers.</strong></p>")
    parts.append("</header><nav aria-label=\"Sections\"><ul>" + "".join(
        f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title in sections) + "</ul></nav><main>")
    parts += [html_table(table) for table in shown]
    parts.append(f'<section id="all"><h2>All runs</h2>{_html_table(COLUMNS, [_row(r) for r in results], "All runs")}')
    parts.append('<ul class="note">' + "".join(f"<li>{escape(line.strip())}</li>" for line in _legend(results) if line)
                 + "</ul></section>")
    for fam in found:
        parts.append(f'<section id="exp{fam.exp}"><h2>{escape(_family_title(fam))}</h2><div class="figures">')
        parts += _together([figure.html(f"e{fam.exp}-{k}", f"exp {fam.exp}" if fam.exp else "own networks")
                            for k, figure in enumerate(family_figures(fam))])
        first = (fam.plain or fam.groups)[0].runs[0]
        for group in sorted(fam.groups, key=lambda g: first not in g.runs):
            for run in group.runs:
                parts.append(_run_section(run, fam, runs.index(run), run is first))
        parts.append("</section>")
    return "\n".join(parts) + "\n</main></body></html>\n"


def _together(drawn: list[str]) -> list[str]:
    """Figures first, then one line for each that has nothing to show."""
    return [d for d in drawn if d.startswith("<figure")] + ["</div>"] + [d for d in drawn if d.startswith("<p")]


def _family_title(fam: tables.Family) -> str:
    if fam.exp in EXPERIMENTS:
        return f"Experiment {fam.exp}: {EXPERIMENTS[fam.exp].title}"
    return "Networks of one's own" if not fam.exp else f"Experiment {fam.exp}"


def _run_section(run: Run, fam: tables.Family, number: int, first: bool) -> str:
    """One run: where and how it was made, what differs, its notes, and its figures."""
    r, config = run.result, run.config or {}
    change = tables.differing(run.settings, tables.experiment_settings(fam.exp))
    hardware = config.get("hardware")
    facts = [
        ("command", " ".join(config.get("command") or ()) or None), ("date", config.get("started")),
        ("seed", str(r["seed"])),
        ("hardware", hardware and f"{hardware['device']}, {hardware['threads']} threads"),
        ("versions", ", ".join(f"{k} {v}" for k, v in (config.get("versions") or {}).items()) or None),
        ("git", config.get("git")), ("protocol", r.get("protocol")),
        ("evaluations", None if r.get("evaluations") is None else str(r["evaluations"])),
        ("mean KL", ", ".join(f"{k} {v:.4g}" for k, v in (r.get("mean_kl") or {}).items()) or None),
        ("timings, s", ", ".join(f"{k} {v:.1f}" for k, v in (r.get("timings") or {}).items()) or None),
        ("settings that differ from the experiment's", None if change is None else
         ", ".join(f"{k}={tables._plain(v)}" for k, v in sorted(change.items())) or "none"),
        ("notes", " · ".join(r.get("notes") or ()) or "none"),
        ("files that are missing", ", ".join(run.missing) or None)]
    told = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts if v)
    drawn = [figure.html(f"r{number}-{k}", run.label) for k, figure in enumerate(run_figures(run))]
    return (f'<details id="run{number}"{" open=" + chr(34) + chr(34) if first else ""}><summary>{escape(run.label)}: '
            f'accuracy {r["baseline_acc"]:.2f} → {r["final_acc"]:.2f}, CR {r["cr"]:.2f}</summary><dl>{told}</dl>'
            '<div class="figures">' + "\n".join(_together(drawn)) + "</details>")


def csv_files(runs: list[Run]) -> dict[str, str]:
    """Name → content of every CSV: the tables, the runs' raw numbers, and the rows of each figure over all runs."""
    files = {f"{t.key}.csv": csv_text(t.columns, t.rows) for t in tables.all_tables(runs)}
    files["runs.csv"] = _dict_csv(tables.raw_rows(runs))
    found, of_runs = tables.families(runs), (
        ("allocation", tables.allocation_rows), ("strategies", tables.strategy_rows), ("budgets", tables.budget_rows),
        ("learning", tables.learning_rows))
    of_families = (("cycles", tables.cycle_rows), ("guidance", tables.guidance_rows),
                   ("guidance-blocks", tables.guidance_block_rows), ("surrogate", tables.surrogate_rows),
                   ("size", tables.size_rows))
    for names, owners in ((of_runs, runs), (of_families, found)):
        for name, rows in names:
            files[f"{name}.csv"] = _dict_csv([row for owner in owners for row in rows(owner)])
    return files


def write_report(out, runs: list[Run]) -> None:
    """report.html, results.md and csv/ in the folder of the runs."""
    out = Path(out)
    (out / "csv").mkdir(exist_ok=True)
    for name, text in csv_files(runs).items():
        write_text(out / "csv" / name, text)
    parts = [results_table([run.result for run in runs], markdown=True) + "\n", *map(markdown, tables.all_tables(runs))]
    write_text(out / "results.md", "\n".join(parts))
    write_text(out / "report.html", page(runs))


def survive_ascii() -> None:
    """Let a terminal without Unicode show a question mark rather than end the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main(argv=None) -> int:
    """``report.py OUT``: print the table of all runs below OUT and write the report beside them."""
    argv = sys.argv[1:] if argv is None else argv
    survive_ascii()
    try:
        if len(argv) != 1:
            raise InputError("usage: python report.py OUT, where OUT holds run directories")
        runs = read_runs(argv[0])
        if not runs:
            raise InputError(f"{argv[0]}: no */result.json in it; run an experiment first: python hirelc.py --exp 3")
        write_report(argv[0], runs)
        print(results_table([run.result for run in runs]))
        print(f"\n{Path(argv[0]) / 'report.html'}: tables and figures; results.md and csv/ beside it")
    except (InputError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
