"""The paper's Tables 2-5 beside the runs, and the rows behind every figure: plain data in, plain data out.

A run is what its folder holds (:class:`Run`); runs that differ in nothing but the seed are a group, and tables give the
mean and the standard deviation over its seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from config import EXPERIMENTS, Config, flatten, override

# What the paper prints beside the numbers in config.EXPERIMENTS. Table 3 (three seeds), where the published text has
# lost drop and CR; the strategies of Table 4; Table 5; and §7 on sensitivity guidance.
PAPER_SEEDS = {1: ("87.86", "85.65")}
PAPER_STRATEGIES = {
    1: "auto 75.0, pruning 16.7, quantization 8.3", 2: "pruning 50.0, auto 25.0, quantization 25.0",
    3: "auto 50.0, quantization 33.3, pruning 16.7", 4: "quantization 80.0, pruning 20.0",
    5: "auto 53.8, quantization 30.8, pruning 15.4", 6: "auto 66.7, pruning 16.7, quantization 16.7",
    7: "pruning 66.7, auto 25.0, quantization 8.3"}
PAPER_MSR = {1: "83.9", 2: "84.9", 3: "84.9", 4: "83.3", 5: "84.8", 6: "84.0", 7: "85.1"}
PAPER_KERNELS = {1: (48, 12), 2: (48, 12), 3: (48, 12), 4: (17, 5), 5: (51, 13), 6: (48, 12), 7: (48, 12)}
PAPER_ABLATIONS = {"full": ("1.72", "6.23"), "no-hla": ("6.80", "8.87"), "full, cycle 1": ("3.28", "6.38"),
                   "a2c, cycle 1": ("7.19", "6.63")}
PAPER_GUIDANCE = 1.30  # points of accuracy that Fisher guidance brings in Fig. 7, Exp. 1

# Settings that name a run or say where it ran, not what was done.
NOT_METHOD = {"exp", "name", "seed", "out", "device", "threads", "data.dir", "data.cache", "data.workers",
              "model.weights_dir", "policy", "policy_sha256"}
ABLATIONS = {"null": {"search.method": "null"}, "no-hla": {"search.method": "no-hla"},
             "a2c": {"lla.algorithms": ["A2C", "A2C", "A2C"]}, "no-sens": {"sensitivity.method": "none"}}
LOST = "–"


# ---------------------------------------------------------------------------------------------------------------
# What a run directory has to hold


CYCLE = {"cycle": int, "acc": float, "drop": float, "cr": float, "deployed_acc?": float, "surrogate_active?": bool,
         "surrogate_prediction?": float}
BLOCK_BUDGET = {"name": str, "strategy": str, "target": float}
RESULT = {
    "exp": int, "name": str, "smoke": bool, "seed": int, "model": str, "data": str, "eval_images": int,
    "baseline_acc": float, "final_acc": float, "drop": float, "cr": float, "fp32_bytes": float, "packed_bytes": float,
    "target": float, "retained": float, "scope": str, "mode": str, "whole_model_ratio": float, "compliance?": float,
    "deployed_acc?": float, "test_images?": int, "msr?": float, "sparsity?": float, "best_cycle?": int,
    "baseline_acc_full?": float, "final_acc_full?": float, "deployed_acc_full?": float,
    "baseline_interval_full?": [float], "final_interval_full?": [float], "deployed_interval_full?": [float],
    "drop_interval_full?": [float], "mcnemar_p_full?": float, "deployed_drop_interval_full?": [float],
    "deployed_mcnemar_p_full?": float, "protocol?": str, "device?": str, "method?": str, "search?": str,
    "evaluations?": int, "surrogate_mae?": float, "cycles?": [CYCLE], "strategies?": {str: float},
    "sensitivity?": [float], "mean_kl?": {str: float}, "notes?": [str], "timings?": {str: float},
    "kernels?": {str: {"block": str}}, "null_controller": {"cr_mean": float, "cr_std": float, "compliance_mean": float,
                                                           "compliance_std": float},
    "searches?": [{"level": str, "cycle": int, "entropy?": [float], "consensus_drop?": float, "random_drop?": float}],
    "cycle_budgets?": [{"cycle": int, "blocks": [BLOCK_BUDGET]}]}
POLICY = {"blocks": [{"name": str, "retained": float, "cr": float,
                      "kernels": [{"name": str, "bits": int, "keep": float, "keep_actual?": float, "qtype": str,
                                   "granularity": str, "retained": float}],
                      "budget?": {"strategy": str, "target": float}}]}
CONFIG = {"settings": {str: object}, "command?": [str], "started?": str, "git?": str, "versions?": {str: str},
          "hardware?": {"device": str, "threads": int}}
UPDATE = {"level": str, "algorithm": str, "block": str, "agent": str, "cycle": str, "entropy": str, "approx_kl": str,
          "value_loss": str}


def check_shape(value, shape, where: str = "it") -> None:
    """Raise ValueError, one line, unless ``value`` is built like ``shape``: a type (float: any number below
    1e15), a list of one shape, or a dictionary of them, in which a key with a question mark may be missing or null and
    {str: shape} takes any keys."""
    if isinstance(shape, list):
        check_shape(value, list, where)
        for item in value:
            check_shape(item, shape[0], f"an entry of {where}")
    elif isinstance(shape, dict):
        check_shape(value, dict, where)
        for key, inner in shape.items():
            if key is str:
                for name, item in value.items():
                    check_shape(item, inner, f"{name[:50]!r} of {where}")
            elif value.get(key.rstrip("?")) is not None or not key.endswith("?"):
                if key.rstrip("?") not in value:
                    raise ValueError(f"{where} has no {key!r}")
                check_shape(value[key.rstrip("?")], inner, repr(key.rstrip("?")))
    elif shape in (float, int):
        if type(value) not in (int, float)[:1 + (shape is float)] or not abs(value) < 1e15:
            raise ValueError(f"{where} is no {'number' if shape is float else 'whole number'}")
    elif not isinstance(value, shape):
        raise ValueError(f"{where} is no {shape.__name__}")


@dataclass(frozen=True)
class Run:
    """What a run directory says; None for a file that is not there."""
    path: Path
    result: dict
    config: dict | None = None
    policy: dict | None = None
    updates: list[dict] | None = None
    missing: tuple[str, ...] = ()
    settings: dict | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        r = self.result
        what = f"exp {r['exp']}" if r["exp"] else ""
        return " ".join(filter(None, [what + ("-" if what and r["name"] else "") + r["name"] or r["model"],
                                      f"seed {r['seed']}"]))

    @property
    def method(self) -> str | None:
        """search.method, from wherever it is told."""
        return self.result.get("method") or self.result.get("search") or (self.settings or {}).get("search.method")


def read_settings(config: dict | None) -> dict | None:
    """All settings of a run as this version knows them: those that it does not say are the defaults."""
    return None if config is None else {**flatten(Config()), **config["settings"]}


# ---------------------------------------------------------------------------------------------------------------
# Groups of runs


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only."""
    exp: int
    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.result["seed"]) for run in self.runs)

    @property
    def title(self) -> str:
        r = self.runs[0].result
        return f"{r['model']}, {r['data']}" + (" (smoke)" if r["smoke"] else "")

    @property
    def settings(self) -> dict | None:
        return self.runs[0].settings

    def values(self, key) -> list:
        return [run.result.get(key) for run in self.runs]

    def by_seed(self) -> dict:
        return {run.result["seed"]: run.result for run in self.runs}


def group_runs(runs) -> list[Group]:
    """Groups in the order of experiment, variant (the experiment itself first) and first seed."""
    found = {}
    for run in runs:
        r = run.result
        method = None if run.settings is None else json.dumps(
            {key: value for key, value in run.settings.items() if key not in NOT_METHOD}, sort_keys=True)
        found.setdefault((r["exp"], r["name"], r["model"], r["data"], r["smoke"], r["mode"], r["scope"], method),
                         []).append(run)
    return sorted((Group(key[0], key[1], tuple(sorted(members, key=lambda run: run.result["seed"])))
                   for key, members in found.items()), key=lambda g: (g.exp, g.name, g.runs[0].result["seed"]))


def differing(settings: dict | None, reference: dict | None) -> dict | None:
    """Settings of the method that are not the reference's; None where one of the two is not known."""
    if settings is None or reference is None:
        return None
    return {key: value for key, value in settings.items() if key not in NOT_METHOD and reference.get(key) != value}


def experiment_settings(exp: int) -> dict:
    """The settings that the paper gives an experiment, and the defaults for a network of one's own."""
    return flatten(override(Config(), EXPERIMENTS[exp].settings if exp in EXPERIMENTS else {}))


def role(group: Group, plain: list[Group]) -> str | None:
    """Which of the paper's ablations, or the null controller, a group is: the one setting in which it differs from a
    group of the experiment itself, or from the experiment's settings where that was not run."""
    for reference in [g.settings for g in plain] or [experiment_settings(group.exp)]:
        for name, change in ABLATIONS.items():
            if differing(group.settings, reference) == change:
                return name
    return None


@dataclass(frozen=True)
class Family:
    """All groups of one experiment (or of one's own networks, exp 0)."""
    exp: int
    groups: tuple[Group, ...]

    @property
    def plain(self) -> list[Group]:
        """The experiment as it is, without a name."""
        return [g for g in self.groups if not g.name and self.exp and g.runs[0].method != "null"]

    def of(self, kind: str) -> list[Group]:
        return [g for g in self.groups if role(g, self.plain) == kind]


def families(runs) -> list[Family]:
    """The runs' groups, one family per experiment, in its order."""
    groups = group_runs(runs)
    return [Family(exp, tuple(g for g in groups if g.exp == exp)) for exp in sorted({g.exp for g in groups})]


def family(found: list[Family], exp: int) -> Family:
    """That of an experiment, an empty one where nothing of it was run."""
    return next((f for f in found if f.exp == exp), Family(exp, ()))


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
    """Mean ± standard deviation (n − 1) of what was measured, the value alone where there is one."""
    known = [value for value in values if value is not None]
    if not known:
        return LOST
    text = form.format(statistics.fmean(known))
    if len(known) > 1:
        text += f" ± {form.replace('+', '').format(statistics.stdev(known))}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} runs)"


def _interval(group: Group, key: str, interval: str, p: str = "") -> str:
    """One run: the value with its 95 % interval and p; several: the mean and standard deviation."""
    r = group.runs[0].result
    if len(group.runs) > 1 or r.get(key) is None:
        return spread(group.values(key))
    text = f"{r[key]:.2f}"
    if r.get(interval) is not None and len(r[interval]) == 2:
        text += f" [{r[interval][0]:.2f}, {r[interval][1]:.2f}]"
    return text + (f", p = {r[p]:.2g}" if r.get(p) is not None else "")


def drop_full(result: dict, key: str = "final_acc_full") -> float | None:
    """The drop on the whole test split."""
    known = result.get("baseline_acc_full") is not None and result.get(key) is not None
    return result["baseline_acc_full"] - result[key] if known else None


def with_derived(result: dict) -> dict:
    """A result with what older ones leave to be computed."""
    return {**result, "drop_full": drop_full(result), "deployed_drop_full": drop_full(result, "deployed_acc_full"),
            "msr_percent": 100 * (1 - 1 / result["cr"]) if result["cr"] else None}


def _null_runs(fam: Family) -> list[Group]:
    """Runs with search=null, those with a seed of the experiment's own runs where there are such."""
    seeds = {run.result["seed"] for g in fam.plain for run in g.runs}
    found = []
    for group in fam.of("null"):
        runs = tuple(run for run in group.runs if not seeds or run.result["seed"] in seeds)
        if runs:
            found.append(Group(group.exp, group.name, runs))
    return found


def _drawn(group: Group, key: str, form: str) -> str:
    """A figure of result.json's null controller over many draws; the mean over the runs of a group."""
    null = [run.result["null_controller"] for run in group.runs]
    return f"{form.format(statistics.fmean(n[f'{key}_mean'] for n in null))} ± " + form.format(
        statistics.fmean(n[f"{key}_std"] for n in null))


def _measured(fam: Family) -> list[tuple[str, Group]]:
    """(whose, group) of the rows that an experiment has in every table."""
    return [("here", g) for g in fam.plain] + [("null, run", g) for g in _null_runs(fam)]


def _shown(found: list[Family]) -> list[int]:
    return list(range(1, 8)) + [f.exp for f in found if f.exp > 7 and (f.plain or f.of("null"))]


NULL_NOTE = ("null, run: a run with search=null, whose actions are drawn uniformly and voted on in the same way; null, "
             "drawn: the same controller's configurations alone, mean ± standard deviation over the draws in "
             "result.json, so without accuracies.")
SEEDS_NOTE = ("± is the standard deviation over the seeds named (n − 1); [low, high] is the 95 % interval of a single "
              "run and p is McNemar's, baseline against final. Runs whose settings differ have rows of their own.")


def chosen_on(results) -> list[str]:
    """What the accuracies of runs were measured on and what chose epoch and cycle, a sentence per protocol."""
    said = []
    for protocol, images in (("paper", "test images, which also chose epoch and cycle (eval.protocol=paper)."),
                             ("holdout", "images of the held-out 5 % of the training images, which chose epoch and cycle "
                                         "(eval.protocol=holdout); the test split was scored once, at the end.")):
        counts = sorted({r["eval_images"] for r in results if r.get("protocol", "paper") == protocol})
        if counts:
            said.append(f"Accuracies and drops in percentage points on the first {' or '.join(map(str, counts))} {images}")
    return said


def table2(found: list[Family]) -> Table:
    """Table 2: baseline, final accuracy, drop and CR beside the paper's."""
    rows = []
    for exp in _shown(found):
        fam, paper = family(found, exp), EXPERIMENTS[exp].paper
        rows.append([str(exp), "paper", EXPERIMENTS[exp].title, LOST, f"{paper.baseline:.2f}", f"{paper.final:.2f}",
                     f"{paper.drop:.2f}", f"{paper.cr:.2f}", PAPER_MSR.get(exp, LOST), LOST, LOST, LOST])
        if not fam.plain:
            rows.append([str(exp), "here", "no run"] + [LOST] * 9)
        for whose, g in _measured(fam):
            rows.append([str(exp), whose, g.title, g.seeds, *(spread(g.values(key)) for key in
                         ("baseline_acc", "final_acc", "drop", "cr")), spread(g.values("msr_percent"), "{:.1f}"),
                         spread(g.values("deployed_acc")), _interval(g, "final_acc_full", "final_interval_full"),
                         _interval(g, "drop_full", "drop_interval_full", "mcnemar_p_full")])
        if not _null_runs(fam):
            for g in fam.plain:
                rows.append([str(exp), "null, drawn", g.title, g.seeds, LOST, LOST, LOST, _drawn(g, "cr", "{:.2f}")]
                            + [LOST] * 4)
    return Table("table2", "Table 2: the experiments", (
        "exp", "whose", "network, data", "seeds", "baseline", "final", "drop", "CR", "MSR %", "packed file",
        "whole split: final", "whole split: drop"), rows, (
        *chosen_on([run.result for fam in found for group in fam.groups for run in group.runs]),
        "The last two columns are the whole test split; the paper's figures are of its own protocol.", SEEDS_NOTE,
        NULL_NOTE))


def table3(found: list[Family]) -> Table:
    """Table 3, cycle by cycle, beside the paper's."""
    rows = []
    for exp in _shown(found):
        fam = family(found, exp)
        if exp in PAPER_SEEDS:
            baseline, final = PAPER_SEEDS[exp]
            rows.append([str(exp), "paper", EXPERIMENTS[exp].title, "3", baseline, final, LOST, LOST, LOST])
        elif not fam.plain:
            continue
        if not fam.plain:
            rows.append([str(exp), "here", "no run"] + [LOST] * 6)
        for whose, g in _measured(fam):
            rows.append([str(exp), whose, g.title, str(len(g.runs)), *(spread(g.values(key)) for key in (
                "baseline_acc", "final_acc", "drop", "cr")), spread(g.values("compliance"), "{:.1f}")])
        if not _null_runs(fam):
            for g in fam.plain:
                rows.append([str(exp), "null, drawn", g.title, str(len(g.runs)), LOST, LOST, LOST,
                             _drawn(g, "cr", "{:.2f}"), _drawn(g, "compliance", "{:.1f}")])
    return Table("table3", "Table 3: uncertainty over seeds", (
        "exp", "whose", "network, data", "seeds", "baseline", "final", "drop", "CR", "compliance %"), rows, (
        "The paper has three seeds of experiment 1; its drop and CR are missing from the published text. One seed has "
        "no standard deviation. Null rows as in Table 2.",))


def _strategies(group: Group) -> str:
    told = [run.result["strategies"] for run in group.runs if run.result.get("strategies")]
    share = {name: 100 * statistics.fmean(s.get(name, 0.0) for s in told) for s in told for name in s}
    return ", ".join(f"{name} {value:.1f}" for name, value in sorted(share.items(), key=lambda item: -item[1])) or LOST


def table4(found: list[Family]) -> Table:
    """Table 4: budget compliance, beside the paper's."""
    rows = []
    for exp in _shown(found):
        fam, paper = family(found, exp), EXPERIMENTS[exp].paper
        kernels, blocks = PAPER_KERNELS.get(exp, (LOST, LOST))
        rows.append([str(exp), "paper", LOST, str(kernels), str(blocks),
                     LOST if paper.surrogate_mae is None else f"{paper.surrogate_mae:.2f}",
                     PAPER_STRATEGIES.get(exp, LOST), LOST if paper.compliance is None else f"{paper.compliance:.1f}"])
        if not fam.plain:
            rows.append([str(exp), "here", "no run"] + [LOST] * 5)
        for whose, g in _measured(fam):
            r = g.runs[0].result
            rows.append([str(exp), whose, g.seeds, str(len(r.get("kernels") or ()) or LOST),
                         str(len(r.get("sensitivity") or ()) or LOST),
                         LOST if not any(v is not None for v in g.values("surrogate_mae"))
                         else spread(g.values("surrogate_mae")), _strategies(g),
                         spread(g.values("compliance"), "{:.1f}")])
        if not _null_runs(fam):
            for g in fam.plain:
                rows.append([str(exp), "null, drawn", g.seeds] + [LOST] * 4 + [_drawn(g, "compliance", "{:.1f}")])
    return Table("table4", "Table 4: kernels, surrogate, strategies, budget compliance", (
        "exp", "whose", "seeds", "kernels", "blocks", "surrogate MAE", "strategies of the blocks, %",
        "compliance %"), rows, (
        "Surrogate MAE: |prediction before fine-tuning − accuracy measured| over the cycles in which it was active; – "
        "where it never was. Compliance: 1 − |ρ − ρ*| / ρ*, mean over the blocks. Null rows as in Table 2.",))


def _cycle_values(group: Group, cycle: int, key: str) -> list:
    return [next((row[key] for row in run.result.get("cycles") or () if row["cycle"] == cycle), None)
            for run in group.runs]


def table5(found: list[Family]) -> Table:
    """Table 5: the ablations, beside the paper's."""
    rows = []
    kinds = (("full", "HiReLC: HLA and LLA ensemble", "", None), ("no-hla", "no HLA, uniform budgets", "no-hla", None),
             ("full, cycle 1", "[PPO, A2C, PPO], first cycle", "", 1), ("a2c, cycle 1", "[A2C, A2C, A2C], first cycle",
                                                                      "a2c", 1))
    for exp in sorted({1} | {f.exp for f in found if f.exp and any(f.of(kind) for kind in ("no-hla", "a2c"))}):
        fam = family(found, exp)
        for key, title, kind, cycle in kinds:
            paper = PAPER_ABLATIONS[key] if exp == 1 else (LOST, LOST)
            groups = fam.of(kind) if kind else fam.plain
            if not groups:
                rows.append([str(exp), title, "no run", LOST, LOST, *paper])
            for g in groups:
                drop, cr = ((g.values("drop"), g.values("cr")) if cycle is None else
                            (_cycle_values(g, cycle, "drop"), _cycle_values(g, cycle, "cr")))
                rows.append([str(exp), title, g.seeds, spread(drop), spread(cr), *paper])
        for g in _null_runs(fam):
            rows.append([str(exp), "null, run", g.seeds, spread(g.values("drop")), spread(g.values("cr")), LOST, LOST])
        if not _null_runs(fam):
            for g in fam.plain:
                rows.append([str(exp), "null, drawn", g.seeds, LOST, _drawn(g, "cr", "{:.2f}"), LOST, LOST])
    return Table("table5", "Table 5: ablations", (
        "exp", "configuration", "seeds", "drop", "CR", "paper: drop", "paper: CR"), rows, (
        "The paper's ablations are of experiment 1. A run belongs to a row by its settings, not by its name: it "
        "differs from the experiment's own run in that one setting. Null rows as in Table 2.",))


def _pairs(group: Group, plain: Group) -> tuple[list[float], str]:
    """Accuracy of a group minus that of the experiment itself, by seed, and of what."""
    mine, other = group.by_seed(), plain.by_seed()
    seeds = sorted(mine.keys() & other.keys())
    for key, what in (("deployed_acc_full", "packed, whole split"), ("deployed_acc", "packed"),
                      ("final_acc", "scored")):
        if seeds and all(side[s].get(key) is not None for side in (mine, other) for s in seeds):
            return [mine[s][key] - other[s][key] for s in seeds], what
    return [], ""


def variants_table(found: list[Family]) -> Table:
    """Every variant of an experiment that has any, beside the experiment itself."""
    rows = []
    for fam in found:
        if len(fam.groups) < 2:
            continue
        for g in fam.groups:
            plain = next((p for p in fam.plain if p.title == g.title), None)
            change = differing(g.settings, plain.settings if plain else None)
            if plain is g:
                told = "the experiment itself"
            else:
                told = " ".join(f"{k}={_plain(v)}" for k, v in sorted((change or {}).items())) or LOST
            difference, what = ([], "") if plain is None or plain is g else _pairs(g, plain)
            rows.append([str(fam.exp) if fam.exp else LOST, g.name or LOST, told, g.seeds, spread(g.values("drop")),
                         _interval(g, "deployed_drop_full", "deployed_drop_interval_full", "deployed_mcnemar_p_full"),
                         _interval(g, "deployed_acc_full", "deployed_interval_full")
                         if g.runs[0].result.get("deployed_acc_full") is not None else spread(g.values("deployed_acc")),
                         spread([v / 1000 for v in g.values("packed_bytes")], "{:.1f}"), spread(g.values("cr")),
                         spread(g.values("compliance"), "{:.1f}"), spread(g.values("evaluations"), "{:.0f}"),
                         f"{spread(difference, '{:+.2f}')} ({what})" if difference else LOST])
    return Table("variants", "All methods and ablations", (
        "exp", "name", "what differs", "seeds", "drop", "packed file: drop on the whole split", "packed file",
        "packed KB", "CR", "compliance %", "evaluations", "accuracy minus the experiment's, same seeds"), rows, (
        "evaluations: candidates that the search had judged, over all cycles (– where the run does not say). KB are "
        "1000 bytes. ± as in Table 2.",)) if rows else Table("variants", "All methods and ablations", ("exp",), [], (
            "No experiment has a variant here: run_all.sh --paper runs them.",))


def moved_table(found: list[Family]) -> Table:
    """How far the trained agents are from the null controller."""
    rows = []
    for g in (g for fam in found for g in fam.groups):
        steps = [step for run in g.runs for step in run.result.get("searches") or ()
                 if step["level"] == "LLA" and None not in (step.get("consensus_drop"), step.get("random_drop"))]
        if not steps:
            continue
        entropies = [step["entropy"] for step in steps if len(step.get("entropy") or ()) == 2]
        gaps = [step["consensus_drop"] - step["random_drop"] for step in steps]
        rows.append([
            str(g.exp) if g.exp else LOST, g.name or LOST, g.seeds,
            f"{spread([e[0] for e in entropies], '{:.4f}')} → {spread([e[1] for e in entropies], '{:.4f}')}",
            spread([step["consensus_drop"] for step in steps]), spread([step["random_drop"] for step in steps]),
            spread(gaps, "{:+.2f}"), spread(g.values("cr")), _drawn(g, "cr", "{:.2f}"),
            spread(g.values("compliance"), "{:.1f}"), _drawn(g, "compliance", "{:.1f}")])
    return Table("moved", "How far the agents are from the null controller", (
        "exp", "name", "seeds", "LLA entropy, before → after", "proxy drop: consensus", "of random actions",
        "difference", "CR", "null: CR", "compliance %", "null: compliance %"), rows, (
        "Entropy is a share of a uniform policy's; it and the drops are means over the blocks, ± over seeds and "
        "cycles. A negative difference means that the vote of the trained agents is better than actions drawn "
        "uniformly. null: drawn, as in Table 2; a run with search=null has accuracies too and is a variant.",
    ) if rows else (
        "No run here tells how its agents compare with random actions.",))


def _plain(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def all_tables(runs) -> list[Table]:
    """Tables 2-5, all variants, and how far the agents moved."""
    found = families(runs)
    return [table2(found), table3(found), table4(found), table5(found), variants_table(found), moved_table(found)]


def raw_rows(runs) -> list[dict]:
    """Every single number and word of result.json, a row per run."""
    rows = [{"run": run.path.name, **{k: v for k, v in run.result.items() if not isinstance(v, (list, dict))}}
            for run in runs]
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in names} for row in rows]


# ---------------------------------------------------------------------------------------------------------------
# Rows of the figures. Those of a plot have series, x, y and, where there is one, the interval low to high.


def allocation_rows(run: Run) -> list[dict]:
    """What the best cycle chose for every kernel (Fig. 4); nothing without a policy.json."""
    return [{"run": run.label, "block": block["name"], "kernel": k["name"], "bits": k["bits"], "keep": k["keep"],
             "keep_actual": k.get("keep_actual"), "qtype": k["qtype"], "granularity": k["granularity"],
             "retained": k["retained"]} for block in (run.policy or {"blocks": ()})["blocks"] for k in block["kernels"]]


def strategy_rows(run: Run) -> list[dict]:
    """Every cycle's budgets where result.json has them, else the best cycle's from policy.json."""
    told = run.result.get("cycle_budgets")
    if not told and run.policy:
        told = [{"cycle": run.result.get("best_cycle") or 0, "blocks": [
            {"name": b["name"], **b["budget"]} for b in run.policy["blocks"] if b.get("budget")]}]
    return [{"run": run.label, "cycle": cycle["cycle"], "block": b["name"], "strategy": b["strategy"],
             "target": b["target"]} for cycle in told or () for b in cycle["blocks"]]


def budget_rows(run: Run) -> list[dict]:
    """The retained fraction that each block was given and the one that it has."""
    blocks = [b for b in (run.policy or {"blocks": ()})["blocks"] if b.get("budget")]
    return [{"run": run.label, "series": series, "x": value, "y": b["name"]} for b in blocks
            for series, value in (("budget ρ*", b["budget"]["target"]), ("realised ρ", b["retained"]))]


LEARNING = ("entropy", "approx_kl", "value_loss")


def learning_rows(run: Run, most: int = 120) -> list[dict]:
    """Mean over agents and blocks of their n-th updates, by level and algorithm; long histories in ``most`` steps."""
    seen, found = {}, {}
    for row in run.updates or ():
        agent = (row["level"], row["block"], row["agent"], row["algorithm"])
        seen[agent] = seen.get(agent, 0) + 1
        found.setdefault((f"{row['level']} {row['algorithm']}", seen[agent]), []).append(row)
    rows = []
    for series in dict.fromkeys(who for who, _ in found):
        length = max(n for who, n in found if who == series)
        step = math.ceil(length / most)
        for start in range(1, length + 1, step):
            part = [row for n in range(start, start + step) for row in found.get((series, n), ())]
            values = {key: [row[key] for row in part if row[key] is not None] for key in LEARNING}
            rows.append({"run": run.label, "series": series, "x": start + (step - 1) / 2 if step > 1 else start,
                         **{key: statistics.fmean(v) if v else None for key, v in values.items()}})
    return rows


def cycle_rows(fam: Family) -> list[dict]:
    """Accuracy, drop and CR of every cycle: the experiment's own runs (all runs, where it has none) and the paper."""
    rows = []
    for g in fam.plain or fam.groups:
        for run in g.runs:
            for row in run.result.get("cycles") or ():
                rows.append({"exp": fam.exp, "series": run.label, "cycle": row["cycle"], "accuracy": row["acc"],
                             "packed_accuracy": row.get("deployed_acc"), "drop": row["drop"], "cr": row["cr"]})
    paper = EXPERIMENTS[fam.exp].paper if fam.exp in EXPERIMENTS else None
    if paper and paper.cycle_drops and rows:
        best = paper.cycle_drops.index(min(paper.cycle_drops))
        for c, drop in enumerate((0.0, *paper.cycle_drops)):
            rows.append({"exp": fam.exp, "series": "paper", "cycle": c, "accuracy": None, "packed_accuracy": None,
                         "drop": drop, "cr": paper.cr if c == best + 1 else None})
    return rows


def sensitivity_groups(fam: Family) -> list[tuple[str, Group]]:
    """(name of the guidance, group): the experiment itself and its runs that differ in sensitivity.method alone."""
    found = []
    for plain in fam.plain[:1]:
        for g in fam.groups:
            change = differing(g.settings, plain.settings)
            if g is plain or change is not None and set(change) == {"sensitivity.method"}:
                found.append(((g.settings or {}).get("sensitivity.method", "fisher"), g))
    return found if len(found) > 1 else []


def guidance_rows(fam: Family) -> list[dict]:
    """Fig. 7: final accuracy by seed."""
    return [{"exp": fam.exp, "series": f"sensitivity {name}", "x": run.result["seed"], "y": run.result["final_acc"]}
            for name, g in sensitivity_groups(fam) for run in g.runs]


def guidance_block_rows(fam: Family) -> list[dict]:
    """Fig. 8: CR of every block, mean over the seeds with the smallest and the largest."""
    rows = []
    for name, g in sensitivity_groups(fam):
        policies = [run.policy["blocks"] for run in g.runs if run.policy]
        for i, blocks in enumerate(zip(*policies)):
            crs = [block["cr"] for block in blocks]
            rows.append({"exp": fam.exp, "series": f"sensitivity {name}", "x": i, "y": statistics.fmean(crs),
                         "low": min(crs), "high": max(crs), "block": blocks[0]["name"], "seeds": len(crs)})
    return rows


def _series(group: Group) -> str:
    """The name of a group in a figure of all groups of its experiment."""
    return group.name or (EXPERIMENTS[group.exp].title if group.exp in EXPERIMENTS else group.runs[0].result["model"])


def surrogate_rows(fam: Family) -> list[dict]:
    """The surrogate's prediction and the measured accuracy of every cycle that has both, in points."""
    return [{"exp": fam.exp, "series": _series(g), "x": row["acc"], "y": row["surrogate_prediction"],
             "seed": run.result["seed"], "cycle": row["cycle"]}
            for g in fam.groups for run in g.runs for row in run.result.get("cycles") or ()
            if row.get("surrogate_prediction") is not None]


def size_rows(fam: Family) -> list[dict]:
    """Accuracy of the packed file against its size, whole split with its interval where that was scored."""
    rows = []
    for g in fam.groups:
        for run in g.runs:
            r = run.result
            full = r.get("deployed_acc_full") is not None
            value, interval = (r["deployed_acc_full"], r.get("deployed_interval_full")) if full else (
                r.get("deployed_acc"), None)
            if value is not None:
                low, high = interval if interval and len(interval) == 2 else (None, None)
                rows.append({"exp": fam.exp, "series": _series(g), "seed": r["seed"], "x": r["packed_bytes"] / 1000,
                             "y": value, "low": low, "high": high,
                             "images": r.get("test_images") if full else r["eval_images"]})
    return rows
