"""The tables of the report: the verdict, all runs, the paper beside the runs, the whole test split, the variants.

Runs that differ in the seed alone form a group; tables give the mean and the standard deviation over its seeds. Every
drop compares like with like: the fine-tuned network and the network on the grid with the baseline, the packed network,
whose BatchNorm statistics were estimated again, with a baseline treated in the same way (lacking that: a dagger).
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

from config import EXPERIMENTS
from evidence.stats import mean_interval

# Table 5 and Fig. 7 of the paper, all of experiment 1, by the settings that differ from it: drop in points, CR.
PAPER_ABLATIONS = {
    "the experiment itself": "1.72, CR 6.23; cycle 1: 3.28, CR 6.38", "search.method=no-hla": "6.80, CR 8.87",
    "lla.algorithms=A2C,A2C,A2C": "cycle 1: 7.19, CR 6.63", "sensitivity.method=none": "1.30 points more (Fig. 7)"}
# Settings that name a run or say where it ran, not what was done; and those that say where theta_0 comes from.
NOT_METHOD = {"exp", "name", "seed", "out", "device", "threads", "data.dir", "data.cache", "data.workers",
              "model.weights_dir", "policy", "policy_sha256"}
HANDED_ON = {"model.weights", "model.quick_gelu", "baseline.epochs"}
ABSENT, DAGGER = "–", " †"
SEEDS_NOTE = "± is the standard deviation over the seeds (n − 1); [low, high] is the 95 % interval of a single run."
DAGGER_NOTE = ("† The BatchNorm statistics of the packed network were estimated again, the baseline's were not (on the "
               "first images, and in results of earlier code): part of the difference comes from that.")
MINIATURE = ("miniature (--smoke): narrow networks on synthetic images with tiny budgets; only the code path is the "
             "paper's, not the numbers.")


def name_of(result: dict) -> str:
    """Return the number of the experiment (0: a user's network) and the name of the run."""
    return "-".join(filter(None, [str(result["exp"]), result["name"]]))


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run directory; None for a file that is missing."""
    path: Path
    result: dict
    config: dict | None = None
    policy: dict | None = None
    missing: tuple[str, ...] = ()
    settings: dict | None = field(default=None, compare=False)  # all of this version's, and the retired ones
    retired: tuple[str, ...] = ()  # names of the settings that this version lacks

    @property
    def label(self) -> str:
        r = self.result
        return f"exp {name_of(r)} seed {r['seed']}" + " (miniature)" * bool(r["smoke"])

    @property
    def null(self) -> bool:
        """Whether its actions were drawn uniformly (search.method=null)."""
        return (self.result.get("search") or (self.settings or {}).get("search.method")) == "null"


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone."""
    runs: tuple[RunFolder, ...]

    @property
    def head(self) -> list[str]:
        """Return the first cells of a row: name, network and data, seeds."""
        r = self.runs[0].result
        return [name_of(r), f"{r['model']}, {r['data']}" + " (miniature)" * bool(r["smoke"]),
                ", ".join(map(str, self.by_seed()))]

    def values(self, key) -> list:
        return [run.result.get(key) for run in self.runs]

    def has(self, *keys) -> bool:
        """Whether every run has a value of every key."""
        return all(run.result.get(key) is not None for run in self.runs for key in keys)

    def by_seed(self) -> dict[int, dict]:
        return {run.result["seed"]: run.result for run in self.runs}


def grouped(runs) -> dict[int, list[Group]]:
    """Return the groups of each experiment (0: users' networks), in the order of the runs; runs belong together where
    network, data and all settings of the method are the same."""
    members: dict[int, dict[str, list[RunFolder]]] = {}
    for run in runs:
        same = {key: run.result[key] for key in ("exp", "name", "model", "data", "smoke", "mode", "scope")}
        same["method"] = method(run.settings)
        members.setdefault(run.result["exp"], {}).setdefault(json.dumps(same, sort_keys=True), []).append(run)
    return {exp: [Group(tuple(same)) for same in parts.values()] for exp, parts in members.items()}


def subjects(groups: list[Group]) -> list[Group]:
    """Return the groups that stand for an experiment: without a name, else all but null controllers, else all."""
    trained = [g for g in groups if not g.runs[0].null]
    return [g for g in trained if not g.runs[0].result["name"]] or trained or groups


def method(settings: dict | None) -> dict:
    """Return the settings of the method; not those of theta_0 where it is another run's, as evidence.variants gives."""
    settings = settings or {}
    handed_on = Path(settings.get("model.weights") or "").name == "baseline.pt"
    left_out = NOT_METHOD | HANDED_ON if handed_on else NOT_METHOD
    return {key: value for key, value in settings.items() if key not in left_out}


def differing(settings: dict | None, reference: dict | None) -> dict:
    """Return the settings of the method that differ from the reference's, among those that both have."""
    own, others = method(settings), method(reference)
    return {key: value for key, value in own.items() if key in others and others[key] != value}


def shown_settings(values: dict) -> str:
    """Return the settings as ``--set`` takes them, in the order of their names."""
    return " ".join(f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
                    for key, value in sorted(values.items()))


def null_of(group: Group, groups: list[Group]) -> Group | None:
    """Return the runs of a group's null controller on the seeds of the group: only search.method differs."""
    runs = [run for g in groups if differing(g.runs[0].settings, group.runs[0].settings) == {"search.method": "null"}
            for run in g.runs if run.result["seed"] in group.by_seed()]
    return Group(tuple(runs)) if runs else None


def with_derived(r: dict) -> dict:
    """Return a result with its sizes in KB of 1000 bytes and their ratio."""
    before, after = r["fp32_bytes"], r["packed_bytes"]
    return {**r, "fp32_kb": before / 1000, "packed_kb": after / 1000, "ratio": before / after}


@dataclass(frozen=True)
class Table:
    key: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def spread(values, form="{:.2f}") -> str:
    """Return mean ± standard deviation (n − 1) of what was measured, the value alone where there is one."""
    measured = [value for value in values if value is not None]
    if not measured:
        return ABSENT
    text = form.format(statistics.fmean(measured))
    text += f" ± {form.replace('+', '').format(statistics.stdev(measured))}" if len(measured) > 1 else ""
    return text + f" ({len(measured)} of {len(values)} runs)" * (len(measured) < len(values))


def spreads(group: Group, *keys: str) -> list[str]:
    """Return the spread of each value over the runs of a group; of KB with one decimal."""
    return [spread(group.values(key), "{:.1f}" if key.endswith("_kb") else "{:.2f}") for key in keys]


def with_interval(group: Group, key: str) -> str:
    """Return the value of one run with its 95 % interval; of several the mean and standard deviation."""
    ends = group.runs[0].result.get(key.replace("_acc", "").replace("_full", "_interval_full"))
    alone = len(group.runs) == 1 and group.has(key) and ends
    return spread(group.values(key)) + " [{:.2f}, {:.2f}]".format(*ends) if alone else spread(group.values(key))


def packed_drop(group: Group) -> str:
    """Return the drop of the packed network against the baseline with BatchNorm estimated again, else with a dagger."""
    for key, mark in ("deployed_bn_drop_full", ""), ("deployed_drop_full", DAGGER):
        if group.has(key):
            return with_interval(group, key) + mark
    if group.has("deployed_acc"):
        return spread([r["baseline_acc"] - r["deployed_acc"] for r in group.by_seed().values()]) + DAGGER
    return ABSENT


def drawn(group: Group, key: str) -> str:
    """Return mean ± standard deviation over the draws of the null controller; their means over the runs of a group."""
    nulls = group.values("null_controller")
    return " ± ".join(f"{statistics.fmean(n[f'{key}_{what}'] for n in nulls):.2f}" for what in ("mean", "std"))


def packed_gains(group: Group, other: Group | None) -> dict[int, float]:
    """Return, by common seed, the accuracy of the packed network minus that of another group's, in points: on the
    whole split, or where some run lacks that on the first images; empty where that lacks too."""
    mine, reference = group.by_seed(), other.by_seed() if other else {}
    pairs = {seed: (mine[seed], reference[seed]) for seed in mine if seed in reference}
    for key in ("deployed_acc_full", "deployed_acc"):
        if all(r.get(key) is not None for pair in pairs.values() for r in pair):
            return {seed: a[key] - b[key] for seed, (a, b) in pairs.items()}
    return {}


def against_null(group: Group, groups: list[Group]) -> str:
    """Return how a group stands against the null controller's runs on the same seeds, else against its draws: a
    difference in accuracy is shown where the 95 % interval over several seeds excludes zero, or those of one seed lie
    apart."""
    if group.runs[0].null:
        return "is the null controller"
    null = null_of(group, groups)
    gains = packed_gains(group, null)
    if gains:
        a, b = group.by_seed(), null.by_seed()
        if len(gains) > 1:
            _, low, high = mean_interval(list(gains.values()))
        else:
            mine, other = (side[seed].get("deployed_interval_full") or (0, 100) for side in (a, b) for seed in gains)
            low, high = mine[0] - other[1], mine[1] - other[0]
        word = "More accurate" if low > 0 else "Less accurate" if high < 0 else "No difference in accuracy shown"
        size = statistics.fmean(a[seed]["packed_bytes"] / b[seed]["packed_bytes"] for seed in gains) - 1
        return f"{word}: {spread(list(gains.values()), '{:+.2f}')} points; size of the packed file {size:+.1%}"
    return f"null not run; CR {spread(group.values('cr'))}, its draws {drawn(group, 'cr')}"


def verdict_table(experiments: dict[int, list[Group]]) -> Table:
    """Return what came out, one row per experiment: accuracies, bytes, and the comparison with the null controller."""
    rows = []
    for g, groups in ((g, groups) for groups in experiments.values() for g in subjects(groups)):
        full = "_full" if g.has("baseline_acc_full", "deployed_acc_full") else ""
        rows.append([
            *g.head, *spreads(g, f"baseline_acc{full}", "baseline_bn_acc_full", f"deployed_acc{full}"), packed_drop(g),
            spread(g.values("fp32_kb")[:1], "{:.1f}"), *spreads(g, "packed_kb", "ratio"), against_null(g, groups)])
    return Table("verdict", "Verdict", (
        "exp", "network, data", "seeds", "baseline", "BN again", "packed file", "drop", "FP32 KB", "packed KB", "ratio",
        "against the null controller"), rows, (
        "Accuracies in percent, on the whole test split where that was scored. BN again: the baseline with BatchNorm "
        "statistics estimated again like the packed file's; drop: of the packed file from there, in points. FP32 KB: "
        "all parameters and buffers (1 KB = 1000 bytes). Null: actions drawn uniformly, on the same seeds.",))


def runs_table(results) -> Table:
    """Return one row per result, with the paper's drop and CR beside it."""
    rows = []
    for r in map(with_derived, results):
        paper, g = EXPERIMENTS[r["exp"]].paper if r["exp"] in EXPERIMENTS else None, Group((RunFolder(Path(), r),))
        rows.append([
            f"exp {name_of(r)}: {r['model']}, {r['data']}, seed {r['seed']}, scope {r['scope']}, mode {r['mode']}"
            + ", protocol holdout" * (r.get("protocol") == "holdout") + ", miniature" * bool(r["smoke"]),
            *spreads(g, "baseline_acc", "final_acc", "drop", "deployed_acc", "cr"), drawn(g, "cr"),
            spread([r["compliance"]], "{:.1f}"), *spreads(g, "fp32_kb", "packed_kb", "ratio"),
            "met" if r["cr_met"] and r["drop_met"] else "no",
            spread([paper and paper.drop]), spread([paper and paper.cr])])
    images = " or ".join(map(str, sorted({r["eval_images"] for r in results})))
    return Table("runs", "All runs", (
        "run", "baseline", "final", "drop", "packed", "CR", "null CR", "compl.", "FP32 KB", "packed KB", "ratio",
        "Eq. 3", "paper drop", "paper CR"), rows, (
        f"Accuracies and drops in percentage points on the first {images} test images, which also chose epoch and "
        "cycle (protocol holdout: held-out training images).",
        "final: the best epoch of fine-tuning (mode paper: FP32 weights off the grid, as the paper scores them; mode "
        "qat: on the grid); packed: read back from packed.pt, with BatchNorm statistics estimated again.",
        "CR: compressed kernels alone (Eq. 22); KB: 1000 bytes, of every parameter and buffer and of packed.pt; "
        "ratio: of these; compl.: budget compliance in percent; Eq. 3: whether CR >= 1/rho_target and drop <= "
        "delta_max; null: every action drawn uniformly, same votes (mean ± standard deviation, no training).",
        *([MINIATURE] if any(r["smoke"] for r in results) else ())))


def paper_table(experiments: dict[int, list[Group]]) -> Table:
    """Return Tables 2 and 4 of the paper beside the runs, as the paper scores them."""
    rows = []
    for exp, groups in ((exp, groups) for exp, groups in experiments.items() if exp in EXPERIMENTS):
        p = EXPERIMENTS[exp].paper
        rows.append([str(exp), EXPERIMENTS[exp].title, ABSENT, "paper", *(spread([value]) for value in (
            p.baseline, p.final, p.drop, p.cr, p.compliance, p.surrogate_mae))])
        for g in subjects(groups):
            for whose, part in ("here", g), ("null, run", null_of(g, groups)):
                if part:
                    rows.append([*part.head, whose, *spreads(
                        part, "baseline_acc", "final_acc", "drop", "cr", "compliance", "surrogate_mae")])
            rows.append([*g.head, "null, drawn", *[ABSENT] * 3, drawn(g, "cr"), drawn(g, "compliance"), ABSENT])
    return Table("paper", "The paper's Tables 2 and 4 beside the runs", (
        "exp", "network, data", "seeds", "whose", "baseline", "final", "drop", "CR", "compliance %", "surrogate MAE"),
        rows, ("The paper's Table 3 has 87.86 → 85.65 for three seeds of experiment 1. Compliance: 1 − |ρ − ρ*| / ρ*, "
               "mean over the blocks. Surrogate MAE: of its predictions before fine-tuning, in points. null, run: with "
               "search=null; null, drawn: what it draws, without training.", SEEDS_NOTE))


def whole_table(experiments: dict[int, list[Group]]) -> Table:
    """Return what each step costs on the whole test split: fine-tuned, on the grid, packed."""
    rows = [[*g.head, str(g.runs[0].result["test_images"]), with_interval(g, "baseline_acc_full"),
             *spreads(g, "final_acc_full"), with_interval(g, "drop_full"), *spreads(g, "grid_acc_full"),
             with_interval(g, "grid_drop_full"), *spreads(g, "baseline_bn_acc_full", "deployed_acc_full"),
             packed_drop(g)]
            for groups in experiments.values() for g in groups if g.has("final_acc_full")]
    return Table("whole", "The whole test split: what each step costs", (
        "exp", "network, data", "seeds", "images", "baseline", "final", "drop", "on the grid", "grid drop", "BN again",
        "packed file", "packed drop"), rows, (
        "final and on the grid (weights rounded to what the file holds, BatchNorm as trained) are compared with the "
        "baseline, the packed file with BN again, the baseline treated like it, image by image.", SEEDS_NOTE))


def variants_table(experiments: dict[int, list[Group]]) -> Table:
    """Return every variant of an experiment that has any, beside the experiment itself and the paper's ablations."""
    rows = []
    for exp, groups in experiments.items():
        for g in groups if len(groups) > 1 else ():
            plain = next((p for p in subjects(groups) if p.head[:2] == [str(exp), g.head[1]]), None)
            text = "the experiment itself" if g is plain else shown_settings(
                differing(g.runs[0].settings, plain and plain.runs[0].settings)) or ABSENT
            first = [next((row for row in run.result.get("cycles") or () if row["cycle"] == 1), {}) for run in g.runs]
            gains = {} if g is plain else packed_gains(g, plain)
            rows.append([
                *g.head, text, *spreads(g, "drop", "cr"),
                *(spread([row.get(key) for row in first]) for key in ("drop", "cr")),
                *spreads(g, "packed_kb"), spread(g.values("evaluations"), "{:.0f}"),
                spread(list(gains.values()), "{:+.2f}"), PAPER_ABLATIONS.get(text, ABSENT) if exp == 1 else ABSENT])
    return Table("variants", "Methods and ablations", (
        "exp", "network, data", "seeds", "what differs", "drop", "CR", "cycle 1: drop", "cycle 1: CR", "packed KB",
        "evaluations", "accuracy minus the experiment's", "paper: drop"), rows, (
        "drop: of the fine-tuned network; evaluations: candidates judged, without the passes of a table of estimates; "
        "accuracy: of the packed file.",))


def all_tables(runs) -> list[Table]:
    """Return the tables that have rows, the verdict first; a dagger in a cell brings its note."""
    groups = grouped(runs)
    tables = (verdict_table(groups), runs_table([run.result for run in runs]), paper_table(groups), whole_table(groups),
              variants_table(groups))
    return [replace(t, notes=(*t.notes, DAGGER_NOTE)) if any(cell.endswith(DAGGER) for row in t.rows for cell in row)
            else t for t in tables if t.rows]
