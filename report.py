"""Statistics and tables (paper §5). Reads run directories and nothing else; ``python report.py OUT`` prints them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from config import EXPERIMENTS, InputError
from files import replace_file
from files import read_json

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percentage points. Raises ValueError unless 0 <= hits <= n > 0."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n}")
    p, z2 = hits / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def write_text(path, text: str) -> None:
    """Write a whole file or nothing."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path, value) -> None:
    """Write plain data as JSON; raises ValueError for NaN and infinity, which are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_results(out) -> list[dict]:
    """Every OUT/*/result.json, in the order of experiment, variant and seed. Raises InputError for a broken one."""
    results = []
    for path in Path(out).glob("*/result.json"):
        try:
            result, _ = read_json(path)
            if not all(type(result[key]) is kind for key, kind in (("exp", int), ("seed", int), ("name", str))):
                raise TypeError("exp, seed and name of another kind")
            if any(len(cell) > 200 or not cell.isprintable() for cell in _row(result)):
                raise ValueError("text that no table can show")
            results_table([result])  # whatever the table needs is there and of the right kind
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{path}: not a result of this program ({type(error).__name__}: {str(error)[:200]!r}); "
                             "remove it or run again") from None
        results.append(result)
    return sorted(results, key=lambda r: (r["exp"], r["name"], r["seed"]))


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


def results_table(results, markdown: bool = False) -> str:
    """One row per run: measured, the null controller, and what the paper reports; with a legend below."""
    rows = [list(COLUMNS)] + [_row(r) for r in results]
    if markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        lines.insert(1, "|" + "---|" * len(COLUMNS))
    else:
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
                 for row in rows]
        lines.insert(1, "-" * len(lines[0]))
    counts = sorted({r["eval_images"] for r in results})
    legend = [
        "",
        f"Accuracies and drops in percentage points on the first {' or '.join(map(str, counts))} test images, which "
        "also chose epoch and cycle (the paper's protocol).",
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
    if markdown:  # a list, since Markdown would join the lines of a paragraph
        legend = [f"- {line.strip()}" if line else "" for line in legend]
    return "\n".join(lines + legend)


def survive_ascii() -> None:
    """Let a terminal without Unicode show a question mark rather than end the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main(argv=None) -> int:
    """``report.py OUT``: print the table of all runs below OUT and write it to OUT/results.md."""
    argv = sys.argv[1:] if argv is None else argv
    survive_ascii()
    try:
        if len(argv) != 1:
            raise InputError("usage: python report.py OUT, where OUT holds run directories")
        results = read_results(argv[0])
        if not results:
            raise InputError(f"{argv[0]}: no */result.json in it; run an experiment first: python hirelc.py --exp 3")
        print(results_table(results))
        write_text(Path(argv[0]) / "results.md", results_table(results, markdown=True) + "\n")
    except (InputError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
