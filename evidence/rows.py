"""The figures of the report: their rows, out of the runs, and what each shows in one sentence.

Rows of a plot have series, x, y and, where there is an interval, low and high.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import partial

from config import EXPERIMENTS
from evidence import figures
from evidence.tables import Family, Group, Run, differing


@dataclass(frozen=True)
class Figure:
    """A figure of one run or one experiment, whose rows csv/NAME.csv holds too."""
    name: str
    caption: str
    rows: list[dict]
    draw: object  # (figure, rows) → SVG
    verdict: str = ""

    def html(self, key: str) -> str:
        """Draw the figure; rows without a finite y are counted in the caption."""
        shown = [row for row in self.rows if row.get("y", 0) is not None]
        lost = len(self.rows) - len(shown)
        caption = ". ".join(filter(None, [self.caption, self.verdict, f"{lost} values are not finite" if lost else ""]))
        drawn = self.draw((key, self.caption, f"{len(shown)} values, which csv/{self.name}.csv holds too"),
                          shown) if shown else ""
        return (f'<figure data-csv="{self.name}">{drawn}<figcaption>{figures.escape(caption)}.</figcaption></figure>')


def run_figures(run: Run) -> list[Figure]:
    """Return what can be drawn of one run."""
    kernels, budgets, learning = allocation_rows(run), strategy_rows(run), learning_rows(run)
    kept = [row["keep"] if row["keep_actual"] is None else row["keep_actual"] for row in kernels]
    moved = []
    for series in dict.fromkeys(row["series"] for row in learning):
        values = [row["y"] for row in learning if row["series"] == series and row["y"] is not None]
        moved += [f"{series} {values[0]:.2f} → {values[-1]:.2f}"] if values else []
    return [figure for figure in (
        Figure("allocation", f"Allocation per kernel (Fig. 4): {run.label}", kernels, figures.allocation, kernels and (
            f"Mean over {len(kernels)} kernels: {statistics.fmean(row['bits'] for row in kernels):.2f} bits, "
            f"{statistics.fmean(kept):.0%} of the channels kept")),
        Figure("strategies", f"Strategies by cycle (Fig. 5): {run.label}", budgets, figures.strategies,
               f"Budget compliance {run.result['compliance']:.1f} %, of the drawn null controller "
               f"{run.result['null_controller']['compliance_mean']:.1f} %"
               if run.result.get("compliance") is not None else ""),
        Figure("learning", f"Entropy of the policies, mean over agents and blocks: {run.label}", learning,
               partial(figures.xy, x_label="update of an agent", y_label="entropy, nats", whole=True),
               f"From the first to the last update: {', '.join(moved)}" if moved else "")) if figure.rows]


def family_figures(fam: Family) -> list[Figure]:
    """Return what can be drawn of all runs of one experiment."""
    plot, best = partial(partial, figures.xy), (fam.plain or fam.groups)[0].runs[0]
    r, predicted, sizes = best.result, surrogate_rows(fam), size_rows(fam)
    null = r["null_controller"]
    chosen = f"{best.label}: cycle {r.get('best_cycle')} of {max(len(r.get('cycles') or ()) - 1, 0)} is the best"
    return [figure for figure in (
        Figure("drops", f"Drop by cycle: {fam.label}", cycle_rows(fam, "drop"),
               plot(x_label="cycle", y_label="drop, points", whole=True), f"{chosen}, drop {r['drop']:.2f}"),
        Figure("ratios", f"Compression ratio by cycle (Fig. 6): {fam.label}", cycle_rows(fam, "cr"),
               plot(x_label="cycle", y_label="CR (Eq. 22)", whole=True),
               f"{chosen}, CR {r['cr']:.2f}; the null controller draws {null['cr_mean']:.2f} ± {null['cr_std']:.2f}"),
        Figure("guidance", f"Sensitivity guidance on and off: CR by block (Fig. 8): {fam.label}",
               guidance_rows(fam), plot(x_label="block", y_label="CR of the block", whole=True)),
        Figure("surrogate", f"Surrogate: prediction before fine-tuning and accuracy measured: {fam.label}", predicted,
               plot(x_label="measured, %", y_label="predicted, %", line=False, diagonal=True),
               _surrogate_verdict(predicted)),
        Figure("size", f"Accuracy of the packed file and its size: {fam.label}", sizes,
               plot(x_label="packed file, KB", y_label="accuracy, %", line=False), _size_verdict(sizes)))
        if figure.rows]


def allocation_rows(run: Run) -> list[dict]:
    """Return what the best cycle chose for every kernel (Fig. 4); nothing without a policy.json."""
    return [{"run": run.label, "block": block["name"], "kernel": k["name"], "keep_actual": k.get("keep_actual"),
             **{key: k[key] for key in ("bits", "keep", "qtype", "granularity", "retained")}}
            for block in (run.policy or {"blocks": ()})["blocks"] for k in block["kernels"]]


def strategy_rows(run: Run) -> list[dict]:
    """Return the budgets of every cycle, or where result.json lacks them those of the best cycle; the realised retained
    fraction is that of the best cycle."""
    blocks = {b["name"]: b for b in (run.policy or {"blocks": ()})["blocks"]}
    best = run.result.get("best_cycle") or 0
    cycles = run.result.get("cycle_budgets") or [{"cycle": best, "blocks": [
        {"name": name, **b["budget"]} for name, b in blocks.items() if b.get("budget")]}]
    return [{"run": run.label, "cycle": cycle["cycle"], "block": b["name"], "strategy": b["strategy"],
             "target": b["target"],
             "realised": blocks[b["name"]]["retained"] if cycle["cycle"] == best and b["name"] in blocks else None}
            for cycle in cycles for b in cycle["blocks"]]


def learning_rows(run: Run, most: int = 120) -> list[dict]:
    """Return the mean entropy of the n-th updates over agents and blocks, by level and algorithm.

    Long histories in at most ``most`` steps, each the mean of several updates; empty where no agent has two updates.
    """
    count, entropies = {}, {}
    for row in run.updates or ():
        agent = (row["level"], row["block"], row["agent"], row["algorithm"])
        count[agent] = count.get(agent, 0) + 1
        by_update = entropies.setdefault(f"{row['level']} {row['algorithm']}", {})
        by_update.setdefault(count[agent], []).append(row["entropy"])
    rows = []
    for series, by_update in entropies.items():
        step = math.ceil(len(by_update) / most)
        for start in range(1, len(by_update) + 1, step):
            part = [value for n in range(start, start + step) for value in by_update.get(n, ()) if value is not None]
            rows.append({"run": run.label, "series": series, "x": start + (step - 1) / 2 if step > 1 else start,
                         "y": statistics.fmean(part) if part else None})
    return rows if max(count.values(), default=0) > 1 else []


def cycle_rows(fam: Family, key: str) -> list[dict]:
    """Return drop or CR by cycle: of the experiment itself, or where it was not run of all runs, and the paper's."""
    rows = [{"exp": fam.exp, "series": run.label, "x": row["cycle"], "y": row[key]}
            for g in fam.plain or fam.groups for run in g.runs for row in run.result.get("cycles") or ()]
    paper = EXPERIMENTS[fam.exp].paper if fam.exp in EXPERIMENTS else None
    if paper and paper.cycle_drops and rows:
        best = paper.cycle_drops.index(min(paper.cycle_drops)) + 1
        rows += [{"exp": fam.exp, "series": "paper", "x": c, "y": y} for c, y in (
            enumerate((0.0, *paper.cycle_drops)) if key == "drop" else [(best, paper.cr)])]
    return rows


def guidance_rows(fam: Family) -> list[dict]:
    """Return the CR of every block with and without sensitivity guidance, mean over the seeds and their range (Fig. 8):
    of the experiment itself and its runs that differ in sensitivity.method alone."""
    plain, rows = fam.plain[0] if fam.plain else None, []
    for g in fam.groups if plain and plain.settings else ():
        if g is not plain and set(differing(g.settings, plain.settings) or ()) != {"sensitivity.method"}:
            continue
        for i, blocks in enumerate(zip(*(run.policy["blocks"] for run in g.runs if run.policy))):
            crs = [block["cr"] for block in blocks]
            rows.append({"exp": fam.exp, "series": f"sensitivity {g.settings['sensitivity.method']}", "x": i,
                         "y": statistics.fmean(crs), "low": min(crs), "high": max(crs), "block": blocks[0]["name"],
                         "seeds": len(crs)})
    return rows if len({row["series"] for row in rows}) > 1 else []


def _series(group: Group) -> str:
    """Name a group in a figure of all groups of its experiment."""
    return group.name or (EXPERIMENTS[group.exp].title if group.exp in EXPERIMENTS else group.runs[0].result["model"])


def surrogate_rows(fam: Family) -> list[dict]:
    """Return prediction and measured accuracy of every cycle that has both, in percent."""
    return [{"exp": fam.exp, "series": _series(g), "x": row["acc"], "y": row["surrogate_prediction"],
             "seed": run.result["seed"], "cycle": row["cycle"]}
            for g in fam.groups for run in g.runs for row in run.result.get("cycles") or ()
            if row.get("surrogate_prediction") is not None]


def _surrogate_verdict(rows) -> str:
    if not rows:
        return ""
    mean = statistics.fmean(row["x"] for row in rows)
    error, constant = (statistics.fmean(abs(row["x"] - guess) for row, guess in zip(rows, guesses))
                       for guesses in ([row["y"] for row in rows], [mean] * len(rows)))
    return (f"Mean error {error:.2f} points over {len(rows)} cycles; of their mean accuracy in place of the "
            f"predictions {constant:.2f}")


def size_rows(fam: Family) -> list[dict]:
    """Return accuracy of the packed file against its size, with an interval where the whole split was scored."""
    rows = []
    for g in fam.groups:
        for r in (run.result for run in g.runs if run.result.get("deployed_acc") is not None):
            full = r.get("deployed_acc_full") is not None
            low, high = full and r.get("deployed_interval_full") or (None, None)
            rows.append({"exp": fam.exp, "series": _series(g), "seed": r["seed"], "x": r["packed_bytes"] / 1000,
                         "y": r["deployed_acc_full" if full else "deployed_acc"], "low": low, "high": high,
                         "images": r.get("test_images") if full else r["eval_images"]})
    return rows


def _size_verdict(rows) -> str:
    """Name the methods that no single other run beats in both accuracy and size."""
    best = [row for row in rows if not any(o["x"] <= row["x"] and o["y"] >= row["y"] and (o["x"], o["y"]) != (
        row["x"], row["y"]) for o in rows)]
    names = list(dict.fromkeys(row["series"] for row in best))
    return f"No other run is both smaller and more accurate than: {', '.join(names)}" if len(rows) > 1 else ""
