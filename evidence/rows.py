"""The figures of the report: their rows, out of the runs, and what each shows in one sentence."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from config import EXPERIMENTS
from evidence import figures
from evidence.report_tables import Group, RunFolder, subjects


@dataclass(frozen=True)
class Figure:
    """A figure of one run or one experiment; csv/NAME.csv holds its rows."""
    name: str
    caption: str
    rows: list[dict]
    draw: object  # (caption, rows) → SVG

    def html(self) -> str:
        """Return the figure with its caption."""
        return (f'<figure data-csv="{self.name}">{self.draw(self.caption, self.rows)}'
                f"<figcaption>{figures.escape(self.caption)}</figcaption></figure>")


def run_figures(run: RunFolder) -> list[Figure]:
    """Return what can be drawn of one run: the allocation of the best cycle."""
    kernels = allocation_rows(run)
    if not kernels:
        return []
    bits, keep = (statistics.fmean(row[key] for row in kernels) for key in ("bits", "keep"))
    return [Figure("allocation", f"Allocation per kernel (Fig. 4): {run.label}. Mean over {len(kernels)} kernels: "
                   f"{bits:.2f} bits, {keep:.0%} of the channels kept.", kernels, figures.allocation)]


def experiment_figures(groups: list[Group]) -> list[Figure]:
    """Return what can be drawn of all runs of one experiment: the drop by cycle."""
    rows, run = cycle_rows(groups), subjects(groups)[0].runs[0]
    caption = (f"Drop by cycle. {run.label}: cycle {run.result.get('best_cycle')} is the best, drop "
               f"{run.result['drop']:.2f}, CR {run.result['cr']:.2f}.")
    return [Figure("cycles", caption, rows, lambda title, rows: figures.lines(
        title, rows, "cycle", "drop", ("cycle", "drop, points")))] if rows else []


def allocation_rows(run: RunFolder) -> list[dict]:
    """Return what the best cycle chose for every kernel (Fig. 4), its keep as what is really kept where the file says
    it; nothing without a policy.json."""
    return [{"run": run.label, "block": block["name"], "kernel": kernel["name"], "bits": kernel["bits"],
             "keep": kernel["keep"] if kernel.get("keep_actual") is None else kernel["keep_actual"],
             **{key: kernel[key] for key in ("qtype", "granularity", "retained")}}
            for block in (run.policy or {"blocks": ()})["blocks"] for kernel in block["kernels"]]


def cycle_rows(groups: list[Group]) -> list[dict]:
    """Return drop and CR by cycle of an experiment's runs, and the drops that the paper prints."""
    exp = groups[0].runs[0].result["exp"]
    rows = [{"exp": exp, "series": run.label, **{key: row[key] for key in ("cycle", "drop", "cr")}}
            for group in subjects(groups) for run in group.runs for row in run.result.get("cycles") or ()]
    if rows and exp in EXPERIMENTS:
        rows += [{"exp": exp, "series": "paper", "cycle": cycle, "drop": drop, "cr": None}
                 for cycle, drop in enumerate(EXPERIMENTS[exp].paper.cycle_drops, 1)]
    return rows
