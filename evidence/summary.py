"""What result.json says of a run, and the accuracy of a packed file."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import torch

import data
import models
from compress import kernel_bytes, model_bytes, set_state, snap_to_grid
from config import BASELINES, Config, InputError, flatten, override
from deploy import pack, policies
from deploy.target import ROUNDING
from evidence.stats import mcnemar, paired_interval, wilson
from evidence.null import null_controller
from evidence.report import csv_of
from support.files import shown
from support.log import duration
from support.own import own_network
from train import accuracy, correct

SCORED = ("baseline", "baseline_bn", "final", "grid", "deployed")  # those whose accuracy is reported
OF_BEST = ("drop", "grid_acc", "deployed_acc", "cr", "msr", "cr_unweighted", "whole_model_ratio", "packed_bytes",
           "sparsity", "compliance", "retained", "voted_retained", "voted_compliance")  # of the best cycle's row
# drop → (before, after): each compares two networks whose BatchNorm statistics have one origin, but for "deployed",
# whose statistics were estimated again while the baseline's are those of training
DROPS = {"": ("baseline", "final"), "grid_": ("baseline", "grid"), "deployed_": ("baseline", "deployed"),
         "deployed_bn_": ("baseline_bn", "deployed")}


def summarise(run, outcome, fresh=None) -> dict:
    """Return the content of result.json but for times, files, skipped images and the source of a policy. ``run``:
    hirelc.Run; ``outcome``: hirelc.Outcome; ``fresh``: a network as the given one was before anything ran; without it a
    new one is made. Raises InputError where the packed file gives it other logits."""
    if fresh is None and run.config.model.source:
        fresh = own_network(run.config.model.source, run.network["num_classes"])
    images, _ = run.train_set.batch(torch.arange(min(8, len(run.train_set))), run.device)
    run.phases.once("compare: packed file",
                    lambda: pack.compare(outcome.best.packed, run.model, fresh, images))
    c, best, hits = run.config, outcome.best.row, score_networks(run, outcome)
    strategies = [budget.strategy for budget in outcome.best.budgets]
    errors = [abs(row.surrogate_prediction - row.acc) for row in outcome.rows if row.surrogate_prediction is not None]
    moved: dict[str, list[float]] = {}
    for update in outcome.updates:
        moved.setdefault(f"{update['level']} {update['algorithm']}", []).append(update["approx_kl"])
    goal = outcome.demands.result(best)
    if goal and not goal["met"]:
        run.log.note(missed(goal, best.cr))
    if best.whole_model_ratio < 1:
        run.log.note("the packed file is larger than the network's tensors in FP32")
    if outcome.bad_rewards:
        run.log.note(f"{outcome.bad_rewards} rewards were not finite and became -10")
    if c.surrogate.warmup and c.search.method in (*BASELINES, "null") and not run.given:
        run.log.note(f"search={c.search.method} asks no surrogate: none was trained, its warm-up was left out")
    return {
        "exp": c.exp, "name": c.name, "smoke": c.smoke, "seed": c.seed,
        "model": c.model.source.rpartition(":")[2] or c.model.name, "data": c.data.name, "device": str(run.device),
        "protocol": c.eval.protocol, "eval_images": run.eval_images, "test_images": len(run.test_set),
        "given_acc": outcome.baseline["given_acc"], "baseline_acc": outcome.baseline["acc"], "final_acc": best.acc,
        **{key: getattr(best, key) for key in OF_BEST}, "best_cycle": best.cycle, **whole_split(hits),
        "fp32_bytes": model_bytes(run.model), "mode": c.finetune.mode, "scope": c.compress.scope,
        "target": c.search.target, "cr_met": best.cr >= 1 / c.search.target - ROUNDING,
        "drop_met": best.drop <= c.search.max_drop + ROUNDING, "goal": goal,
        "cycles": [dataclasses.asdict(row) for row in outcome.rows],
        "strategies": {s: strategies.count(s) / len(strategies) for s in sorted(set(strategies))},
        "sensitivity": outcome.sensitivity, "surrogate_mae": sum(errors) / len(errors) if errors else None,
        "mean_kl": {who: sum(values) / len(values) for who, values in moved.items()},
        "search": c.search.method, "table": outcome.table, "searches": outcome.searches,
        "cycle_budgets": outcome.budgets,
        "evaluations": sum(search.get("evaluations", 0) for search in outcome.searches),
        "surrogate_samples": len(outcome.surrogate.buffer), "failed_samples": outcome.failed_samples,
        "bad_rewards": outcome.bad_rewards, "null_controller": null_controller(run.shapes, outcome.sensitivity, c),
        **account(run, outcome.best), "notes": list(run.log.notes)}


def missed(goal: dict, cr: float) -> str:
    """Return what a missed goal asked for and what the packed file has; ``goal``: of Demands.result."""
    return (f"goal missed ({', '.join(goal['missed'])}): asked for {goal['asked']}, the packed file has "
            f"{goal['packed_bytes']:,} bytes, CR {cr:.2f}, a drop of {goal['deployed_drop']:.2f}")


def search_row(cycle: int, found, note) -> dict:
    """Return how far the low-level policies moved in a cycle, and what their votes are worth: means over the blocks.

    ``found``: search.Found of every block; ``note(text)`` takes what is to be said.
    """
    row = {"level": "LLA", "cycle": cycle, "evaluations": sum(block.evaluations for block in found)}
    entropy = [block.entropy for block in found if block.entropy is not None]
    if entropy:
        row["entropy"] = [math.fsum(column) / len(column) for column in zip(*entropy)]
    for key in found[0].compared:
        values = [block.compared[key] for block in found]
        row[key] = None if None in values else math.fsum(values) / len(values)
    if row.get("unseen", 0) > 0.5:
        note(f"cycle {cycle}: {row['unseen']:.0%} of the low-level agents' candidates had an estimated drop of ten "
             "points or more, where R_acc is 0: they learned of the size alone")
    return row


def score_networks(run, outcome) -> dict:
    """Return which test images each of SCORED classifies correctly: name → bool [n]; empty without ``eval.full``.

    A network whose BatchNorm cannot be estimated again is not scored twice.
    """
    c, best, hits = run.config, outcome.best, {}

    def scored(name, state, change=lambda: True):
        def score():
            set_state(run.model, state)
            if change() is False:  # no BatchNorm to estimate again
                return hits["baseline"]
            return correct(run.model, run.test_set, c.eval.batch_size, 0, run.log.progress, run.ranks)

        hits[name] = run.phases.once(f"report: {name}", score)

    if c.eval.full:
        scored("baseline", outcome.theta0)
        scored("baseline_bn", outcome.theta0, run.estimate_batchnorm)
        scored("final", best.network)
        if best.grids:  # training on the grid leaves the weights there
            hits["grid"] = hits["final"]
        else:
            scored("grid", best.network, lambda: snap_to_grid(run.blocks, best.config, best.masks))
        scored("deployed", best.network, lambda: pack.load(best.packed, run.model))
    return hits


def whole_split(hits: dict) -> dict:
    """Return accuracies on the whole test split with 95 % Wilson intervals, and paired drops with intervals, in points.

    With McNemar's p; None where nothing was scored.
    """
    result = {}
    for name in SCORED:
        found = hits.get(name)
        result[f"{name}_acc_full"] = None if found is None else accuracy(found)
        result[f"{name}_interval_full"] = None if found is None else list(wilson(int(found.sum()), len(found)))
    for key, (before, after) in DROPS.items():
        drop, interval, p = paired(hits[before], hits[after]) if hits else (None, None, None)
        result |= {f"{key}drop_full": drop, f"{key}drop_interval_full": interval, f"{key}mcnemar_p_full": p}
    return result


def paired(before, after) -> tuple[float, list[float], float]:
    """Return the drop between two networks on the same images (bool [n] each): points, 95 % interval, McNemar's p."""
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return 100 * (lost - won) / len(before), list(paired_interval(lost, won, len(before))), mcnemar(lost, won)


def account(run, best) -> dict:
    """Return what result.json says of the kernels one by one, and where the network's parameters and bytes are."""
    kernels, known = {}, {kernel.name: kernel for kernel in run.survey.compressed}
    for block, config in zip(run.blocks, best.config.blocks):
        for name, kernel, shape in zip(block.kernels, config.kernels, config.shapes):
            kernels[name] = {"block": block.name, "tensors": list(known[name].tensors),
                             "shape": list(known[name].shape), "params": shape.params,
                             "bytes": kernel_bytes(kernel, shape)}
    excluded, total = run.survey.excluded, sum(p.numel() for p in run.model.parameters())
    compressed = sum(kernel["params"] for kernel in kernels.values())
    classifier = sum(kernel.params for kernel in excluded if kernel.classifier)
    left_out = sum(kernel.params for kernel in excluded if not kernel.classifier)
    return {
        "kernels": kernels, "coverage": run.survey.coverage,
        "excluded": {kernel.name: {"params": kernel.params, "reason": kernel.reason} for kernel in excluded},
        "accounting": {
            "parameters": total, "compressed": compressed, "classifier": classifier, "kernels_left_out": left_out,
            "not_kernels": total - compressed - classifier - left_out, "bytes": model_bytes(run.model),
            "bytes_packed": best.row.packed_bytes}}


def save(path, out, write) -> None:
    """Write what is known after a cycle: cycles.csv, updates.csv and the best cycle's packed file.

    ``write(path, bytes or a function of a file)``: support.runs.write.
    """
    for name, rows in (("cycles.csv", [dataclasses.asdict(row) for row in out.rows]), ("updates.csv", out.updates)):
        if rows:
            write(path / name, csv_of(rows).encode())
    write(path / "packed.pt", out.best.packed)


def finish(path, run, out, result: dict, write) -> None:
    """Write the networks, the policy and at last the result, with where the time went, and say so in the log."""
    save(path, out, write)
    policy = policies.to_policy(run.blocks, out.best.config, out.best.budgets)
    write(path / "baseline.pt", lambda file: torch.save(out.theta0, file))
    best = {"format": 1, "settings": flatten(run.config), "cycle": out.best.row.cycle, "network": run.network,
            "model": out.best.network, "masks": out.best.masks, "policy": policy}
    write(path / "best.pt", lambda file: torch.save(best, file))
    result["fp32_file_bytes"] = (path / "baseline.pt").stat().st_size
    phases, log = run.phases, run.log
    total = phases.elapsed + time.monotonic() - phases.started
    seconds = {**phases.seconds, "other": max(total - sum(phases.seconds.values()), 0.0)}
    result["timings"] = {k: round(v, 2) for k, v in {**seconds, "total": total, "saving": phases.saving}.items()}
    result["time_shares"] = {phase: round(value / total, 4) for phase, value in seconds.items()}
    write(path / "policy.json", json.dumps(policy, indent=1).encode())
    write(path / "result.json", json.dumps(result, indent=1).encode())
    phases.remove()
    for phase, share in sorted(result["time_shares"].items(), key=lambda item: -item[1]):
        log.info(f"  {phase:12} {result['timings'][phase]:10.1f} s  {100 * share:5.1f} %")
    log.info(f"baseline {result['baseline_acc']:.2f}, final {result['final_acc']:.2f}, drop {result['drop']:.2f}, "
             f"packed file {result['deployed_acc']:.2f}, CR {result['cr']:.2f}, {result['packed_bytes']:,} bytes for "
             f"{result['fp32_bytes']:,}, whole model {result['whole_model_ratio']:.2f}, best cycle "
             f"{result['best_cycle']}, {duration(total)} → {path}")


def evaluate_packed(config: Config, path: str, log, device) -> dict:
    """Return the accuracy of a packed file on the test images of an experiment, or with ``model.source`` of a user's.

    Image size, mean and std are those that the file was made with. Writes nothing. Accuracies in percentage points on
    the first ``eval.images`` images and on the whole split, its Wilson interval, and sizes in bytes. Raises InputError
    where file, network and data do not fit.
    """
    packed = pack.read(path)
    network = {"name": "", "num_classes": None, "mean": [], "std": [], **packed.network}
    own_size = network.get("image_size")
    if own_size != config.data.image_size and (network["name"] or isinstance(own_size, int)):
        config = override(config, {"data.image_size": own_size})
        log.note(f"images have {own_size} px, as the file says")
    splits = data.load(config.data, log.progress, models.PRETRAINED_STATS[config.model.name])
    own = own_network(config.model.source, splits.num_classes) if config.model.source else None
    model = pack.load(path, own)
    if own is None and network["name"] != config.model.name:
        log.note(f"the file holds {network['name']}, the experiment is about {config.model.name}")
    if network["num_classes"] != splits.num_classes:
        text = f"{path}: made for {network['num_classes']} classes, {config.data.name} has {splits.num_classes}"
        if own is None or (network["num_classes"] or 0) < splits.num_classes:
            raise InputError(f"{text}; choose the experiment or --set data.name=… that it was made with")
        log.note(text)
    test = _normalised(splits.test, network, path, log, config.data.normalize)
    hits = correct(model.to(device), test, config.eval.batch_size, 0, log.progress)
    count, (low, high) = min(config.eval.images, len(test)), wilson(int(hits.sum()), len(hits))
    result = {"deployed_acc": accuracy(hits[:count]), "eval_images": count, "deployed_acc_full": accuracy(hits),
              "test_images": len(hits), "deployed_interval_full": [low, high], "packed_bytes": packed.file_bytes,
              "fp32_bytes": model_bytes(model)}
    log.info(f"{path}: {network['name'] or config.model.source}, {packed.file_bytes:,} bytes for "
             f"{result['fp32_bytes']:,} ({result['fp32_bytes'] / packed.file_bytes:.2f} times smaller); accuracy "
             f"{result['deployed_acc']:.2f} on the first {count} test images, {result['deployed_acc_full']:.2f} "
             f"[{low:.2f}, {high:.2f}] on all {len(hits)}")
    return result


def _normalised(test, network: dict, path: str, log, normalize: str):
    """The test images with the mean and std that a packed file names; without, as data.normalize=``normalize``."""
    for key in ("mean", "std"):
        values = network[key]
        if not (isinstance(values, list) and len(values) in (0, len(test.mean)) and all(
                isinstance(v, (int, float)) and math.isfinite(v) and (key == "mean" or v > 0) for v in values)):
            raise InputError(f"{path}: its {key} is {shown(values)}, expected a number per channel; pack the network "
                             "again")
    if not (network["mean"] and network["std"]):
        log.note(f"{path} does not say how its images were normalised; they have mean {list(test.mean)}, std "
                 f"{list(test.std)}, as data.normalize={normalize} says")
        return test
    if (network["mean"], network["std"]) == (list(test.mean), list(test.std)):
        return test
    log.note(f"images are normalised as the file says: mean {network['mean']}, std {network['std']}")
    return dataclasses.replace(test, mean=tuple(network["mean"]), std=tuple(network["std"]))
