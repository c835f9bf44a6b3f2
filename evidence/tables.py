"""The paper's Tables 2, 4 and 5 beside the runs, and the rows behind every figure: plain data in, plain data out.

A run is what its directory holds (:class:`Run`). Runs that differ in the seed alone form a group, and tables give the
mean and the standard deviation over its seeds. Every drop compares like with like: the fine-tuned network and the
network on the grid with the baseline, the packed network, whose BatchNorm statistics were estimated again, with a
baseline treated in the same way. Results of older code lack that last one; their drop carries a dagger.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from config import EXPERIMENTS, Config, flatten, override
from evidence.stats import difference_interval

# What the paper prints beside the numbers in config.EXPERIMENTS. Table 3's drop and CR are missing in its text.
PAPER_SEEDS = {1: ("87.86", "85.65")}
PAPER_STRATEGIES = {
    1: "auto 75.0, pruning 16.7, quantization 8.3", 2: "pruning 50.0, auto 25.0, quantization 25.0",
    3: "auto 50.0, quantization 33.3, pruning 16.7", 4: "quantization 80.0, pruning 20.0",
    5: "auto 53.8, quantization 30.8, pruning 15.4", 6: "auto 66.7, pruning 16.7, quantization 16.7",
    7: "pruning 66.7, auto 25.0, quantization 8.3"}
PAPER_MSR = {1: "83.9", 2: "84.9", 3: "84.9", 4: "83.3", 5: "84.8", 6: "84.0", 7: "85.1"}
PAPER_KERNELS = {1: (48, 12), 2: (48, 12), 3: (48, 12), 4: (17, 5), 5: (51, 13), 6: (48, 12), 7: (48, 12)}
PAPER_ABLATIONS = {"full": ("1.72", "6.23"), "no-hla": ("6.80", "8.87"), "full, cycle 1": ("3.28", "6.38"),
                   "a2c": ("7.19", "6.63")}

# Settings that name a run or say where it ran, not what was done.
NOT_METHOD = {"exp", "name", "seed", "out", "device", "threads", "data.dir", "data.cache", "data.workers",
              "model.weights_dir", "policy", "policy_sha256"}
ABLATIONS = {"no-hla": {"search.method": "no-hla"}, "a2c": {"lla.algorithms": ["A2C", "A2C", "A2C"]}}
LOST, DAGGER = "–", " †"


@dataclass(frozen=True)
class Run:
    """The contents of a run directory; None for a file that is missing."""
    path: Path
    result: dict
    config: dict | None = None
    policy: dict | None = None
    updates: list[dict] | None = None
    missing: tuple[str, ...] = ()
    settings: dict | None = field(default=None, compare=False)  # all of this version's, and the retired ones
    retired: tuple[str, ...] = ()  # names of the settings that this version lacks

    @property
    def label(self) -> str:
        r = self.result
        what = f"exp {r['exp']}" + (f"-{r['name']}" if r["name"] else "") if r["exp"] else r["name"] or r["model"]
        return f"{what} seed {r['seed']}" + (" (miniature)" if r["smoke"] else "")

    @property
    def method(self) -> str | None:
        """search.method, from whichever file names it."""
        return self.result.get("method") or self.result.get("search") or (self.settings or {}).get("search.method")


# ---------------------------------------------------------------------------------------------------------------
# Groups of runs


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone."""
    exp: int
    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.result["seed"]) for run in self.runs)

    @property
    def title(self) -> str:
        r = self.runs[0].result
        return f"{r['model']}, {r['data']}" + (" (miniature)" if r["smoke"] else "")

    @property
    def settings(self) -> dict | None:
        return self.runs[0].settings

    def values(self, key) -> list:
        return [run.result.get(key) for run in self.runs]

    def has(self, *keys) -> bool:
        """Whether every run has a value of every key."""
        return all(run.result.get(key) is not None for run in self.runs for key in keys)

    def by_seed(self) -> dict:
        return {run.result["seed"]: run.result for run in self.runs}


def differing(settings: dict | None, reference: dict | None) -> dict | None:
    """Return the settings of the method that differ from the reference's, among those that both have; None where one
    of the two is unknown."""
    if settings is None or reference is None:
        return None
    return {key: value for key, value in settings.items()
            if key not in NOT_METHOD and key in reference and reference[key] != value}


def experiment_settings(exp: int) -> dict:
    """Return the settings that the paper gives an experiment; the defaults for a user's network (exp 0)."""
    return flatten(override(Config(), EXPERIMENTS[exp].settings if exp in EXPERIMENTS else {}))


@dataclass(frozen=True)
class Family:
    """All groups of one experiment, or of users' networks (exp 0)."""
    exp: int
    groups: tuple[Group, ...]

    @property
    def label(self) -> str:
        smoke = {smoke for g in self.groups for smoke in g.values("smoke")}
        return (f"exp {self.exp}" if self.exp else "users' networks") + (
            "" if True not in smoke else " (miniature)" if len(smoke) == 1 else " (some miniature)")

    @property
    def plain(self) -> list[Group]:
        """The experiment as it is: no name, and not the null controller."""
        return [g for g in self.groups if not g.name and self.exp and g.runs[0].method != "null"]

    @property
    def subjects(self) -> list[Group]:
        """The experiment as it is; where that was not run, all groups but null controllers, or these alone."""
        return self.plain or [g for g in self.groups if g.runs[0].method != "null"] or list(self.groups)

    def of(self, change: dict) -> list[Group]:
        """Groups that differ from the experiment, as it was run or as the paper has it, in this setting alone."""
        reference = self.plain[0].settings if self.plain else experiment_settings(self.exp)
        return [g for g in self.groups if differing(g.settings, reference) == change]

    def null_of(self, group: Group) -> Group | None:
        """The runs of a group's null controller, on the seeds of the group."""
        seeds = group.by_seed()
        runs = [run for g in self.groups if differing(g.settings, group.settings) == {"search.method": "null"}
                for run in g.runs if run.result["seed"] in seeds]
        return Group(self.exp, runs[0].result["name"], tuple(runs)) if runs else None


def families(runs) -> list[Family]:
    """Return the groups of the runs, one family per experiment, each in the order of variant and first seed."""
    members = {}
    for run in runs:
        r = run.result
        method = None if run.settings is None else json.dumps(
            {key: value for key, value in run.settings.items() if key not in NOT_METHOD}, sort_keys=True)
        members.setdefault((r["exp"], r["name"], r["model"], r["data"], r["smoke"], r["mode"], r["scope"], method),
                           []).append(run)
    groups = sorted((Group(key[0], key[1], tuple(sorted(part, key=lambda run: run.result["seed"])))
                     for key, part in members.items()), key=lambda g: (g.exp, g.name, g.runs[0].result["seed"]))
    return [Family(exp, tuple(g for g in groups if g.exp == exp)) for exp in sorted({g.exp for g in groups})]


# ---------------------------------------------------------------------------------------------------------------
# Tables


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
        return LOST
    text = form.format(statistics.fmean(measured))
    if len(measured) > 1:
        text += f" ± {form.replace('+', '').format(statistics.stdev(measured))}"
    return text if len(measured) == len(values) else f"{text} ({len(measured)} of {len(values)} runs)"


def _interval(group: Group, key: str, interval: str, p: str = "") -> str:
    """One run: the value with its 95 % interval and p; several: the mean and standard deviation."""
    r = group.runs[0].result
    if len(group.runs) > 1 or r.get(key) is None:
        return spread(group.values(key))
    text = f"{r[key]:.2f}"
    if len(r.get(interval) or ()) == 2:
        text += f" [{r[interval][0]:.2f}, {r[interval][1]:.2f}]"
    return text + (f", p = {r[p]:.2g}" if r.get(p) is not None else "")


def packed_drop(group: Group) -> str:
    """Return the drop of the packed network against the baseline with BatchNorm statistics estimated again, on the
    whole split; with a dagger where the statistics of the baseline were left as they were."""
    if group.has("deployed_bn_drop_full"):
        return _interval(group, "deployed_bn_drop_full", "deployed_bn_drop_interval_full")
    if group.has("baseline_acc_full", "deployed_acc_full"):
        return _interval(group, "deployed_drop_full", "deployed_drop_interval_full") + DAGGER
    if group.has("deployed_acc"):
        return spread([r["baseline_acc"] - r["deployed_acc"] for r in group.by_seed().values()]) + DAGGER
    return LOST


def with_derived(r: dict) -> dict:
    """Return a result with the numbers that are computed from others."""
    r = {**r}
    for key, which in (("drop_full", "final_acc_full"), ("deployed_drop_full", "deployed_acc_full")):
        if r.get("baseline_acc_full") is not None and r.get(which) is not None:
            r[key] = r["baseline_acc_full"] - r[which]
    return {**r, "msr_percent": 100 * (1 - 1 / r["cr"]), "fp32_kb": r["fp32_bytes"] / 1000,
            "packed_kb": r["packed_bytes"] / 1000, "ratio": r["fp32_bytes"] / r["packed_bytes"]}


def _drawn(group: Group, key: str, form: str) -> str:
    """A figure of the drawn null controller; the mean over the runs of a group."""
    return " ± ".join(form.format(statistics.fmean(n[f"{key}_{what}"] for n in group.values("null_controller")))
                      for what in ("mean", "std"))


NULL_NOTE = ("null, run: a run with search=null, whose actions are drawn uniformly and voted on in the same way; null, "
             "drawn: the configurations of that controller alone, mean ± standard deviation over the draws in "
             "result.json, so without accuracies.")
SEEDS_NOTE = ("± is the standard deviation over the seeds named (n − 1); [low, high] is the 95 % interval of a single "
              "run. Runs whose settings differ have separate rows.")
DAGGER_NOTE = ("† The BatchNorm statistics of the packed network were estimated again, the baseline's were not "
               "(measured by earlier code): with BatchNorm, part of the difference comes from that.")


def chosen_on(results) -> list[str]:
    """Say what the accuracies were measured on and what chose epoch and cycle, a sentence per protocol."""
    lines = []
    for protocol, images in (("paper", "test images, which also chose epoch and cycle (eval.protocol=paper)."),
                             ("holdout", "images of the held-out 5 % of the training images, which chose epoch and "
                                         "cycle (eval.protocol=holdout); the test split was scored once, at the end.")):
        counts = sorted({r["eval_images"] for r in results if r.get("protocol", "paper") == protocol})
        if counts:
            number = " or ".join(map(str, counts))
            lines.append(f"Accuracies and drops in percentage points on the first {number} {images}")
    return lines


def against_null(fam: Family, group: Group) -> str:
    """Say how a group stands against the null controller: its run on the same seeds where there is one (a single seed
    with a 95 % interval), else the compression ratio of its drawn configurations."""
    if group.runs[0].method == "null":
        return "is the null controller"
    null = fam.null_of(group)
    key, interval = "deployed_acc_full", "deployed_interval_full"
    mine, other = group.by_seed(), null.by_seed() if null else {}
    pairs = [(mine[seed], other[seed]) for seed in sorted(mine.keys() & other.keys())]
    if any(r.get(k) is None for pair in pairs for r in pair for k in (key, interval)):
        pairs = []
    if pairs:
        gains = [a[key] - b[key] for a, b in pairs]
        low, high = min(gains), max(gains)
        text = f"accuracy {spread(gains, '{:+.2f}')}"
        if len(pairs) == 1:
            low, high = difference_interval(*((r[key], r[interval]) for r in pairs[0]))
            text += f" [{low:+.2f}, {high:+.2f}]"
        size = statistics.fmean(a["packed_bytes"] / b["packed_bytes"] for a, b in pairs) - 1
        word = "More accurate" if low > 0 else "Less accurate" if high < 0 else "No difference in accuracy shown"
        side = "as large as" if abs(size) < 5e-4 else f"{abs(size):.1%} {'smaller' if size < 0 else 'larger'} than"
        return f"{word}: {text} points against null; packed file {side} null's"
    drawn = group.values("null_controller")
    gap = statistics.fmean(group.values("cr")) - statistics.fmean(n["cr_mean"] for n in drawn)
    limit = 2 * statistics.fmean(n["cr_std"] for n in drawn)
    word = "Higher CR than null" if gap > limit else "Lower CR than null" if gap < -limit else "CR like null's"
    return (f"{word}: {spread(group.values('cr'))} against {_drawn(group, 'cr', '{:.2f}')}, drawn; accuracy not "
            "compared (no run with search=null)")


def verdict_table(all_families: list[Family]) -> Table:
    """What came out, one row per experiment: accuracies, bytes, and the comparison with the null controller."""
    rows = []
    for fam in all_families:
        for g in fam.subjects:
            full = g.has("baseline_acc_full", "deployed_acc_full")
            baseline, packed = ("baseline_acc_full", "deployed_acc_full") if full else ("baseline_acc", "deployed_acc")
            again = spread(g.values("baseline_bn_acc_full")) if g.has("baseline_bn_acc_full") else None
            text = spread(g.values(baseline))
            rows.append([
                "-".join(filter(None, [str(fam.exp) if fam.exp else "", g.name])) or LOST, g.title, g.seeds,
                text if again in (None, text) else f"{text}; BN again {again}", spread(g.values(packed)),
                packed_drop(g), spread(g.values("fp32_kb")[:1], "{:.1f}"), spread(g.values("packed_kb"), "{:.1f}"),
                spread(g.values("ratio")), against_null(fam, g)])
    notes = ["Accuracies in percent, on the whole test split where that was scored; drop: of the packed file, in "
             "points. FP32 KB: all parameters and buffers; packed KB: the packed file (1 KB = 1000 bytes). Null: the "
             "controller whose actions are drawn uniformly."]
    if any("BN again" in row[3] for row in rows):
        notes.append("BN again: the baseline with BatchNorm statistics estimated again as the packed file's were; the "
                     "drop is from there.")
    return Table("verdict", "Verdict", ("exp", "network, data", "seeds", "baseline", "packed file", "drop", "FP32 KB",
                                        "packed KB", "ratio", "against the null controller"), rows, tuple(notes))


def _measured(fam: Family) -> list[tuple[str, Group]]:
    """(whose, group) of the rows of an experiment: its groups, each before its null controller."""
    rows = []
    for g in fam.subjects:
        null, small = fam.null_of(g), " (miniature)" if g.runs[0].result["smoke"] else ""
        rows.append((", ".join(filter(None, ["here", g.name])) + small, g))
        if g.runs[0].method != "null":
            rows.append((("null, run" if null else "null, drawn") + small, null or g))
    return rows


def table2(all_families: list[Family]) -> Table:
    """Tables 2 and 3: baseline, final accuracy, drop and CR beside the paper's."""
    rows, shown = [], [fam for fam in all_families if fam.exp in EXPERIMENTS]
    for fam in shown:
        exp, title, paper = str(fam.exp), EXPERIMENTS[fam.exp].title, EXPERIMENTS[fam.exp].paper
        rows.append([exp, "paper", title, LOST, f"{paper.baseline:.2f}", f"{paper.final:.2f}", f"{paper.drop:.2f}",
                     f"{paper.cr:.2f}", PAPER_MSR.get(fam.exp, LOST), LOST])
        if fam.exp in PAPER_SEEDS:
            rows.append([exp, "paper, Table 3", title, "3 seeds", *PAPER_SEEDS[fam.exp]] + [LOST] * 4)
        for whose, g in _measured(fam):
            if whose.startswith("null, drawn"):
                rows.append([exp, whose, g.title, g.seeds, LOST, LOST, LOST, _drawn(g, "cr", "{:.2f}"), LOST, LOST])
                continue
            rows.append([exp, whose, g.title, g.seeds, *(spread(g.values(key)) for key in (
                "baseline_acc", "final_acc", "drop", "cr")), spread(g.values("msr_percent"), "{:.1f}"),
                spread(g.values("deployed_acc"))])
    return Table("table2", "Tables 2 and 3: the experiments, as the paper scores them", (
        "exp", "whose", "network, data", "seeds", "baseline", "final", "drop", "CR", "MSR %", "packed file"), rows, (
        *chosen_on([run.result for fam in shown for group in fam.groups for run in group.runs]),
        "final: the best epoch of fine-tuning; packed file: the accuracy of the network read back from it.", SEEDS_NOTE,
        NULL_NOTE))


def whole_table(all_families: list[Family]) -> Table:
    """What each step costs, on the whole test split: fine-tuned, on the grid, packed."""
    rows = [[str(g.exp) if g.exp else LOST, g.name or LOST, g.title, g.seeds, str(g.runs[0].result.get("test_images")),
             _interval(g, "baseline_acc_full", "baseline_interval_full"), spread(g.values("final_acc_full")),
             _interval(g, "drop_full", "drop_interval_full", "mcnemar_p_full"), spread(g.values("grid_acc_full")),
             _interval(g, "grid_drop_full", "grid_drop_interval_full"), spread(g.values("baseline_bn_acc_full")),
             spread(g.values("deployed_acc_full")), packed_drop(g)]
            for fam in all_families for g in fam.groups if g.has("final_acc_full")]
    return Table("whole", "The whole test split: what each step costs", (
        "exp", "name", "network, data", "seeds", "images", "baseline", "final", "drop", "on the grid", "drop",
        "baseline, BN again", "packed file", "drop from BN again"), rows, (
        "final and on the grid (weights rounded to what the file holds, BatchNorm as trained) are compared with the "
        "baseline, the packed file with the baseline whose BatchNorm statistics were estimated again like the file's "
        "(BN again), image by image; p is McNemar's.", SEEDS_NOTE))


def _strategies(group: Group) -> str:
    shares = [run.result["strategies"] for run in group.runs if run.result.get("strategies")]
    mean = {name: 100 * statistics.fmean(s.get(name, 0.0) for s in shares) for s in shares for name in s}
    return ", ".join(f"{name} {value:.1f}" for name, value in sorted(mean.items(), key=lambda item: -item[1])) or LOST


def table4(all_families: list[Family]) -> Table:
    """Table 4: budget compliance, beside the paper's."""
    rows = []
    for fam in all_families:
        if fam.exp not in EXPERIMENTS:
            continue
        exp, paper = str(fam.exp), EXPERIMENTS[fam.exp].paper
        kernels, blocks = PAPER_KERNELS.get(fam.exp, (LOST, LOST))
        rows.append([exp, "paper", LOST, str(kernels), str(blocks), spread([paper.surrogate_mae]),
                     PAPER_STRATEGIES.get(fam.exp, LOST), spread([paper.compliance], "{:.1f}")])
        for whose, g in _measured(fam):
            if whose.startswith("null, drawn"):
                rows.append([exp, whose, g.seeds] + [LOST] * 4 + [_drawn(g, "compliance", "{:.1f}")])
                continue
            r = g.runs[0].result
            rows.append([exp, whose, g.seeds, str(len(r.get("kernels") or ()) or LOST),
                         str(len(r.get("sensitivity") or ()) or LOST), spread(g.values("surrogate_mae")),
                         _strategies(g), spread(g.values("compliance"), "{:.1f}")])
    return Table("table4", "Table 4: kernels, surrogate, strategies, budget compliance", (
        "exp", "whose", "seeds", "kernels", "blocks", "surrogate MAE", "strategies of the blocks, %",
        "compliance %"), rows, (
        "Surrogate MAE: |prediction before fine-tuning − accuracy measured| in points, over the cycles in which it was "
        "active. Compliance: 1 − |ρ − ρ*| / ρ*, mean over the blocks. Null rows as in Table 2.",))


def table5(all_families: list[Family]) -> Table:
    """Table 5: the ablations, beside the paper's; empty where none was run."""
    rows = []
    for fam in all_families:
        if not fam.exp or not any(fam.of(change) for change in ABLATIONS.values()):
            continue
        for key, title, groups, cycle in (
                ("full", "HiReLC: HLA and LLA ensemble", fam.plain, None),
                ("no-hla", "no HLA, uniform budgets", fam.of(ABLATIONS["no-hla"]), None),
                ("full, cycle 1", "[PPO, A2C, PPO], first cycle", fam.plain, 1),
                ("a2c", "[A2C, A2C, A2C], first cycle", fam.of(ABLATIONS["a2c"]), 1)):
            paper = PAPER_ABLATIONS[key] if fam.exp == 1 else (LOST, LOST)
            for g in groups:
                values = [g.values(k) if cycle is None else _cycle_values(g, cycle, k) for k in ("drop", "cr")]
                rows.append([str(fam.exp), title, g.title, g.seeds, *map(spread, values), *paper])
        for whose, g in _measured(fam):
            if whose.startswith("null, run"):
                rows.append([str(fam.exp), whose, g.title, g.seeds, spread(g.values("drop")), spread(g.values("cr")),
                             LOST, LOST])
    return Table("table5", "Table 5: ablations", (
        "exp", "configuration", "network, data", "seeds", "drop", "CR", "paper: drop", "paper: CR"), rows, (
        "The paper's ablations are of experiment 1. A run belongs to a row by its settings, not by its name: it "
        "differs from the experiment itself in that one setting.",))


def _cycle_values(group: Group, cycle: int, key: str) -> list:
    return [next((row[key] for row in run.result.get("cycles") or () if row["cycle"] == cycle), None)
            for run in group.runs]


def _gain(group: Group, plain: Group | None) -> str:
    """Accuracy of a group minus that of the experiment itself, on common seeds, and of what."""
    mine, other = group.by_seed(), plain.by_seed() if plain else {}
    seeds = sorted(mine.keys() & other.keys())
    for key, what in (("deployed_acc_full", "packed, whole split"), ("deployed_acc", "packed"), ("final_acc", "final")):
        if plain is not group and seeds and all(side[s].get(key) is not None for side in (mine, other) for s in seeds):
            return f"{spread([mine[s][key] - other[s][key] for s in seeds], '{:+.2f}')} ({what})"
    return LOST


def variants_table(all_families: list[Family]) -> Table:
    """Every variant of an experiment that has any, beside the experiment itself."""
    rows = []
    for fam in all_families:
        for g in fam.groups if len(fam.groups) > 1 else ():
            plain = next((p for p in fam.plain if p.title == g.title), None)
            change = differing(g.settings, plain.settings if plain else None)
            text = "the experiment itself" if g is plain else " ".join(
                f"{k}={shown_value(v)}" for k, v in sorted((change or {}).items())) or LOST
            rows.append([str(fam.exp) if fam.exp else LOST, g.name or LOST, g.title, text, g.seeds,
                         spread(g.values("drop")), spread(g.values("deployed_acc")),
                         spread(g.values("packed_kb"), "{:.1f}"), spread(g.values("cr")),
                         spread(g.values("compliance"), "{:.1f}"), spread(g.values("evaluations"), "{:.0f}"),
                         _gain(g, plain)])
    return Table("variants", "All methods and ablations", (
        "exp", "name", "network, data", "what differs", "seeds", "drop", "packed file", "packed KB", "CR",
        "compliance %", "evaluations", "accuracy minus the experiment's, same seeds"), rows, (
        "drop: of the fine-tuned network; packed file: accuracy; evaluations: candidates that the search judged, over "
        "all cycles. ± as in Table 2. In the paper (Fig. 7), no sensitivity costs experiment 1 1.30 points.",))


def moved_table(all_families: list[Family]) -> Table:
    """How far the trained agents are from uniform draws."""
    rows = []
    for g in (g for fam in all_families for g in fam.groups):
        steps = [step for searches in g.values("searches") for step in searches or ()
                 if step["level"] == "LLA" and None not in (step.get("consensus_drop"), step.get("random_drop"))]
        if not steps:
            continue
        entropies = [step["entropy"] for step in steps if len(step.get("entropy") or ()) == 2]
        rows.append([
            str(g.exp) if g.exp else LOST, g.name or LOST, g.title, g.seeds,
            f"{spread([e[0] for e in entropies], '{:.4f}')} → {spread([e[1] for e in entropies], '{:.4f}')}",
            spread([step["consensus_drop"] for step in steps]), spread([step["random_drop"] for step in steps]),
            spread([step["consensus_drop"] - step["random_drop"] for step in steps], "{:+.2f}"), spread(g.values("cr")),
            _drawn(g, "cr", "{:.2f}"), spread(g.values("compliance"), "{:.1f}"), _drawn(g, "compliance", "{:.1f}")])
    return Table("moved", "How far the agents are from the null controller", (
        "exp", "name", "network, data", "seeds", "LLA entropy, before → after", "proxy drop: consensus",
        "of random actions", "difference", "CR", "null: CR", "compliance %", "null: compliance %"), rows, (
        "Entropy is a share of a uniform policy's; it and the drops are means over the blocks, ± over seeds and "
        "cycles. A negative difference means that the vote of the trained agents is better than actions drawn "
        "uniformly. null: drawn, as in Table 2.",))


def shown_value(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def all_tables(runs) -> list[Table]:
    """Return the tables that have rows, the verdict first; a dagger in a cell brings its note."""
    groups = families(runs)
    makers = (verdict_table, table2, whole_table, table4, table5, variants_table, moved_table)
    tables = [make(groups) for make in makers]
    return [Table(t.key, t.title, t.columns, t.rows, (*t.notes, DAGGER_NOTE) if any(
        cell.endswith(DAGGER) for row in t.rows for cell in row) else t.notes) for t in tables if t.rows]


def raw_rows(runs) -> list[dict]:
    """Return every single number and word of result.json, a row per run."""
    return [{"run": run.path.name, **{k: v for k, v in run.result.items() if not isinstance(v, (list, dict))}}
            for run in runs]
