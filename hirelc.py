"""HiReLC: hierarchical reinforcement learning for pruning and quantisation (arXiv 2606.26002).

:meth:`HiReLC.run` is the paper's Algorithm 1: one call per step, in the paper's order. The rest of this file
prepares an experiment or a network of one's own and reads the command line::

    python hirelc.py --exp 3               # one of the paper's experiments
    python hirelc.py --exp 3 --smoke       # the same code path in seconds, without any download
    python hirelc.py --exp 3 --load FILE   # accuracy of a packed file
    python hirelc.py --list                # the experiments and the paper's numbers
    python hirelc.py --model net.py:make   # a network of one's own, from a Python file or module
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evidence import baselines
import data
import models
from deploy import pack
from support import plan
from support import policies
from support.kernels import Survey
from compress import (BlockConfig, KernelConfig, NetworkConfig, compress_network, from_policy, kernel_bytes,
                      kernel_shapes, model_bytes, snap_to_grid, to_policy)
from config import BASELINES, EXPERIMENTS, Config, InputError, flatten, override
from support.files import read_json, shown
from support.log import Log, duration
from support.own import copy_network, forward, own_network, try_network, untouched
from support.ranks import Elsewhere, Ranks, leave, lost, several, start
from deploy.qat import GridTraining, coded, decoded, plain_grids, read_grids
from evidence.report import results_table, survive_ascii, write_json
from support.runs import (Owner, check_directory, clear, identity, keep_freed_memory, lacks_bfloat16, moved, provenance,
                  run_directory, save, stop_at_once, stoppable)
from search import (TIER_MIN_BITS, DropEstimator, HLAEnsemble, LayerBudget, LLAEnsemble, Proxy, Surrogate,
                    block_features, compliance, derive_seed, least_drop, null_controller, random_config, train_together)
from evidence.sensitivities import sensitivity
from support.state import (Progress, SaveError, Stopped, Store, difference, random_states, restored, set_random_states,
                   understood)
from evidence.stats import mcnemar, paired_interval, wilson
from deploy.target import allocations, enforce, give_back, max_give_back, parse_goal, retained_weights
from train import TooLarge, Trainer, accuracy, correct, estimate_batchnorm, fisher_sensitivity

__all__ = ["EXPERIMENTS", "HiReLC", "compress_model", "fisher_sensitivity", "main", "run_experiment"]

SMOKE = {  # small enough for two CPU cores; blocks, kernels and the code path stay
    "smoke": True, "out": "runs-smoke", "model.weights": "none",
    "threads": 1,  # tensors this small gain nothing from a second one, and waiting for it costs on a busy machine
    "data.name": "synthetic", "data.classes": 10, "data.image_size": 32, "data.train_images": 1024,
    "data.test_images": 256, "data.batch_size": 32,
    "scratch.epochs": 8, "scratch.lr": 2e-3, "scratch.warmup_epochs": 0.5, "baseline.epochs": 1,
    "finetune.epochs": 2, "finetune.lr": 5e-4,
    "search.cycles": 2, "search.proxy_batches": 1, "sensitivity.images": 16,
    "lla.timesteps": 32, "hla.timesteps": 64, "hla.burst": 64,
    "surrogate.min_samples": 1, "surrogate.epochs": 20, "surrogate.epochs_after_warmup": 40}
SMOKE_MODEL = {  # model.width and model.patch_size per network
    "deit_tiny_patch16_224": (0.25, 16), "deit_small_patch16_224": (0.125, 16), "deit_base_patch16_224": (0.0834, 16),
    "vit_base_patch32_clip_224": (0.0834, 16),
    "resnet18": (0.125, 0), "resnet50": (0.125, 0), "mobilenetv2_100": (0.25, 0)}
PROPOSED = (1.0, 0.7, 1.4)  # sizes of lla.start=greedy, in parts of search.target
INDEX_ROOM = 256  # bytes by which the compressed index of a packed file may differ between configurations
TRAINED_BY = ("exp", "smoke", "seed", "device", "precision", "tf32", "threads", "data", "model", "scratch", "baseline",
              "eval")  # settings, and groups of them, that the training of the uncompressed network depends on
SMOKE_WARMUP = 4  # random configurations where the experiment has a warm-up


# ---------------------------------------------------------------------------------------------------------------
# Algorithm 1


@dataclass
class Cycle:
    """What one cycle chose and what was measured of it; a row of cycles.csv (row 0: the uncompressed baseline)."""
    cycle: int
    acc: float
    drop: float
    deployed_acc: float | None = None
    acc_before_finetune: float | None = None
    retained: float = 1.0
    cr: float = 1.0
    msr: float = 0.0
    cr_unweighted: float = 1.0
    packed_bytes: int | None = None
    whole_model_ratio: float = 1.0
    sparsity: float = 0.0
    average_bits: float = 32.0
    average_keep: float = 1.0
    compliance: float | None = None
    voted_retained: float = 1.0
    voted_compliance: float | None = None
    finetune_epochs: int = 0
    finetune_best_epoch: int = 0
    surrogate_active: bool = False
    surrogate_prediction: float | None = None


class HiReLC:
    """One compression of one trained network.

    model: an nn.Module on the device of choice, mapping [n, C, H, W] to logits; it is changed in place and holds
    the best compressed weights at the end. blocks: from ``models.find_blocks``. train, test: sets of images as
    ``data.Images``. ``save``: called as save(self) after every phase. given: (NetworkConfig, budgets) that take
    the place of the search. progress: where the state is kept, if at all. trained: trainings of uncompressed networks,
    and of the warm-up's samples, that runs of this process have in common; they are looked up and put there.
    """

    def __init__(self, model, blocks, train, test, config: Config, log: Log, save=lambda run: None, network=None,
                 ranks: Ranks = Ranks(), given=None, progress: Progress | None = None, trained: dict | None = None):
        self.trained = {} if trained is None else trained
        self.model, self.blocks, self.train_set, self.test_set = model, blocks, train, test
        self.choice_set = test  # chooses epoch and cycle
        if config.eval.protocol == "holdout":
            self.train_set, self.choice_set = data.hold_out(train)
            log.info(f"holdout: {len(self.choice_set)} of {len(train)} training images choose epoch and cycle")
        self.config, self.log, self.save, self.network = config, log, save, network or {}
        self.ranks, self.given, self.progress = ranks, given, progress or Progress()
        self.progress.note = log.note
        self.device = next(model.parameters()).device
        self.shapes = [kernel_shapes(block) for block in blocks]
        self.timings: dict[str, float] = {}
        self.updates: list[dict] = []
        self.cycles: list[Cycle] = []
        self.searches: list[dict] = []
        self.cycle_budgets: list[dict] = []
        self.best: Cycle | None = None
        self.baseline_acc, self.sensitivity, self.budgets, self.voted = 0.0, [], (), None
        self.skipped_steps, self.resumed, self.grids, self.buffers = 0, None, None, {}
        self.stored_theta0 = self.stored_carried = self.stored_best = None  # what the state on the disk holds
        self.started, self.elapsed = time.monotonic(), 0.0  # of this process; seconds of those before it
        self.goal = parse_goal(config.goal)
        if self.goal:
            self.config = override(config, self._goal_settings())
        self._check_sizes()
        for name, asked in (("precision", config.precision), ("search.dtype", config.search.dtype)):
            if asked == "bfloat16" and lacks_bfloat16(self.device):
                log.note(f"{name}=bfloat16: this hardware has no instructions for it; float32 is faster here")

    def run(self) -> dict:
        """Algorithm 1; returns the content of result.json.

        Each ``_once`` is a phase: a resumed run passes over those that are done and takes the broken-off one again,
        which costs next to nothing up to where it was (``state.Progress``).
        """
        last_cycle = self.config.search.cycles
        self._once("from scratch", self.train_from_scratch)
        self._once("baseline", self.train_baseline)
        self._once("sensitivity", self.estimate_sensitivity)
        self._restore(self.make_agents)
        if not self.given:
            self._once("warm-up", self.warm_up_surrogate)
            self._once("high-level agents", self.train_hla, self.config.hla.timesteps)
        for cycle in range(1, last_cycle + 1):
            self._once(f"cycle {cycle}, budgets", self.choose_budgets, cycle, cycle == last_cycle)
            self._once(f"cycle {cycle}, search", self.search_blocks, cycle)
            self._once(f"cycle {cycle}, measurement", self.measure, cycle)
        while self.may_relax():
            self._once(f"relaxation {len(self.cycles) - last_cycle}", self.relax)
        return self.report()

    def choose_budgets(self, cycle: int, last: bool) -> None:
        """Steps 1-3: tell the high-level agents what the last cycle measured, train them on, vote."""
        self.hla.feedback(self.cycles[-1].drop, self.cycles[-1].retained, cycle)
        if self.given:
            self.budgets = self.given[1]
        else:
            if cycle > 1:
                self.train_hla(self.config.hla.burst)
            self.budgets = self.ranks.same(self.hla.budgets(deterministic=last))
        self.cycle_budgets.append({"cycle": cycle, "blocks": [
            {"name": block.name, "strategy": budget.strategy, "target": budget.target}
            for block, budget in zip(self.blocks, self.budgets)]})

    def measure(self, cycle: int) -> None:
        """Steps 6-9: apply what was chosen, repair and measure it, learn from it, keep the best."""
        chosen = self.meet_target(self.voted)
        masks = self.apply(chosen)
        row = self.finetune_and_measure(cycle, chosen, masks, self.budgets, self.voted)
        if not self.given:
            self.update_surrogate(chosen, row)
        self.keep_best(row, chosen, masks, self.budgets)

    # -- before the first cycle

    def train_from_scratch(self) -> None:
        """Where there are no weights: training on the experiment's own data."""
        c = self.config
        if len(self.train_set) % c.data.batch_size == 1 and c.data.batch_size > 1:
            self.log.note("the last batch of each training epoch holds one image and is left out (BatchNorm)")
        if c.model.weights == "none":
            with self._timed("scratch"):
                s = c.scratch
                best = self._train("scratch", "from scratch", s.epochs, s.lr, s.weight_decay, 0, s.warmup_epochs)
            self.log.info(f"trained from scratch: AdamW {s.lr:g}, weight decay {s.weight_decay:g}, {s.epochs} epochs, "
                          f"warm-up {s.warmup_epochs:g}, accuracy {best.acc:.2f} (epoch {best.epoch})")

    def train_baseline(self) -> None:
        """theta_0 and the baseline accuracy, fine-tuned from the weights that there are (§3.1.1)."""
        with self._timed("baseline"):
            b = self.config.baseline
            if b.epochs:
                self._train("baseline", "baseline", b.epochs, b.lr, b.weight_decay, b.patience)
            self.ranks.same_tensors(self.model.state_dict().values())
            self.theta0 = self._state()
            self.baseline_acc = accuracy(self._correct("baseline"))
        self.cycles.append(Cycle(cycle=0, acc=self.baseline_acc, drop=0.0, deployed_acc=self.baseline_acc))
        self.carried = self.theta0
        self.log.info(f"baseline accuracy {self.baseline_acc:.2f} on {self.eval_images} "
                      f"{'test' if self.choice_set is self.test_set else 'held-out'} images")

    def _train(self, phase, what, *settings):
        """The best epoch of a training of the uncompressed network, with which the network is left; of one that a run
        before had with the same settings, what that gave (``trained``)."""
        def train():
            trainer = self._trainer(phase, *settings)
            best = trainer.run(self.log.progress, what, self.log.info)
            return best, trainer.skipped, self._state(), random_states()

        (best, skipped, state, random), known = self._common(phase, TRAINED_BY, train)
        if known:
            self.log.note(f"{what}: the network that the run before trained with the same settings")
        self.model.load_state_dict(state)
        set_random_states(random)
        self.skipped_steps += skipped
        return best

    def _common(self, phase, groups, compute):
        """(compute(), or what it gave in a run before with the same settings of these ``groups``; whether that was so)"""
        key = phase, *((key, str(value)) for key, value in flatten(self.config).items() if key.split(".")[0] in groups)
        known = key in self.trained
        if not known:
            self.trained[key] = compute()
        return self.trained[key], known

    def estimate_sensitivity(self) -> None:
        """s_i of every block on calibration images from the training set (Eq. 14-15, or another measure)."""
        c = self.config
        with self._timed("sensitivity"):
            if c.sensitivity.method == "none":
                self.sensitivity = [0.5] * len(self.blocks)
            else:
                count = min(c.sensitivity.images, len(self.train_set))
                order = torch.randperm(len(self.train_set), generator=self._generator("sensitivity"))
                images, labels = self.train_set.batch(order[:count], self.device)
                self.sensitivity = sensitivity(c.sensitivity.method, self.model, self.blocks, images, labels,
                                               self._generator("sensitivity", "vectors"), self.progress)
        self.sensitivity = self.ranks.same(self.sensitivity)
        self.log.info("sensitivity " + " ".join(f"{s:.3f}" for s in self.sensitivity))

    def make_agents(self) -> None:
        """Drop estimator, high-level ensemble, and one low-level ensemble per block."""
        c = self.config
        if c.search.method in ("hirelc", "null") and c.compress.bits_max < max(TIER_MIN_BITS):
            self.log.note(f"budgets that ask for more bits than compress.bits_max={c.compress.bits_max} are cut to it")
        batches, wanted = [], c.search.proxy_batches
        for images, _ in self.train_set.batches(c.data.batch_size, self.device, generator=self._generator("proxy"),
                                                limit=wanted * c.data.batch_size):
            batches.append(images)
        if len(batches) < wanted:
            self.log.note(f"the proxy has {len(batches)} calibration batches, not {wanted}: the training set is small")
        self.surrogate = Surrogate(5 * sum(map(len, self.shapes)), c.surrogate, derive_seed(c.seed, "surrogate"))
        s = c.search
        proxy = Proxy(self.model, self.blocks, batches, s.cache, s.dtype, s.cache_mb, s.together, s.fold, s.winograd)
        for name in proxy.without_effect():
            self.log.note(f"search.{name} finds nothing in this network that it applies to, and changes nothing")
        self.estimator = DropEstimator(proxy, self.surrogate, self.baseline_acc, self.progress.once)
        params = [sum(shape.params for shape in block) for block in self.shapes]
        self.hla = HLAEnsemble(params, self.sensitivity, c)
        self.lla = [LLAEnsemble(i, block, s, self.estimator, c, len(self.blocks))
                    for i, (block, s) in enumerate(zip(self.blocks, self.sensitivity))]
        self.owners = self.ranks.owners([proxy.stages_passed(i) for i in range(len(self.blocks))])

    def warm_up_surrogate(self) -> None:
        """Random configurations, each fine-tuned for one epoch and measured, fill the buffer (§3.6)."""
        s = self.config.surrogate
        if not (s.enabled and s.warmup):
            return
        rng = np.random.default_rng(derive_seed(self.config.seed, "warmup"))
        with self._timed("warmup"):
            for n in range(s.warmup):
                self.log.progress("surrogate warm-up", n, s.warmup)
                self.model.load_state_dict(self.theta0)
                sample = random_config(self.shapes, self.config.compress, rng)
                masks = compress_network(self.blocks, sample)

                def measured():
                    trainer = self._trainer(f"warmup {n}", 1, s.warmup_lr, self.config.finetune.weight_decay,
                                            patience=0, masks=masks)
                    return trainer.run(None, f"warm-up sample {n + 1}").acc, trainer.skipped, random_states()

                (acc, skipped, random), known = self.progress.once("warm-up", lambda: self._common(
                    f"warmup {n}", (*TRAINED_BY, "compress", "surrogate", "finetune"), measured))
                if known and n == 0:
                    self.log.note("warm-up: what the run before measured with the same settings")
                set_random_states(random)
                self.skipped_steps += skipped
                self.surrogate.add(sample, acc)
                self.log.info(f"  warm-up {n + 1}/{s.warmup}: CR {sample.cr:.2f}, accuracy {acc:.2f}")
            self.model.load_state_dict(self.theta0)
            loss = self.surrogate.train(s.epochs_after_warmup)
        said = "too few to train on yet" if math.isnan(loss) else f"root of the training loss {math.sqrt(loss):.2f} points"
        self.log.info(f"surrogate: {len(self.surrogate.buffer)} samples, {said}")

    # -- the steps of a cycle (§3.7)

    def train_hla(self, timesteps: int) -> None:
        """Steps 1-2: train the high-level agents under the last feedback."""
        before = self.hla.entropy()
        with self._timed("hla"):
            self._log_updates(self.hla.train(timesteps))
        if self.config.search.method == "hirelc":
            self.searches.append({"level": "HLA", "cycle": len(self.cycles), "entropy": [before, self.hla.entropy()]})

    def search_blocks(self, cycle: int) -> None:
        """Steps 4-5: train each block's low-level agents under its budget and vote, with theta_0 in the network.

        Blocks are independent of one another, so that several ranks divide them. With lla.choose=visited the candidates
        of the least sum of drops win (``search.least_drop``), and with lla.rounds this is repeated.
        """
        if self.given:
            self.voted = self.given[0]
            return
        budgets = self.budgets
        self.model.load_state_dict(self.theta0)
        if self.config.search.around == "last" and cycle > 1:
            self.estimator.proxy.around = NetworkConfig(tuple(self.estimator.consensus))
        if self.config.search.method in BASELINES:
            return self.search_baseline(cycle)
        if not self.lla[0].proposals:
            self.propose()
        before = self.estimator.evaluations
        done, mine = 0, [i for i, owner in enumerate(self.owners) if owner == self.ranks.rank]
        steps = rounds(self.config.lla)
        total = len(mine) * len(self.config.lla.algorithms) * len(steps)

        def progress():
            nonlocal done
            done += 1
            self.log.progress(f"cycle {cycle}, search", done, total)

        rows, best, entropy, compared = [[] for _ in self.blocks], None, {}, {}
        self.log.progress(f"cycle {cycle}, search", 0, total)
        with self._timed("search"):
            for n, timesteps in enumerate(steps):
                if best:  # lla.rounds: every block is searched on at the size that it has in the best network so far
                    budgets = [dataclasses.replace(b, target=c.retained) for b, c in zip(budgets, best.blocks)]
                found = {}
                # The surrogate predicts for all blocks at once; the proxy keeps one block's activations at a time.
                for part in [mine] if self.surrogate.active else [[i] for i in mine]:
                    ensembles = [self.lla[i] for i in part]
                    if n == 0:
                        entropy.update({i: [self.lla[i].entropy(budgets[i])] for i in part})
                    updates = train_together(ensembles, [budgets[i] for i in part], progress, timesteps, n == 0)
                    evaluations = self.estimator.evaluations
                    for i, own in zip(part, updates):
                        config, last = self.lla[i].consensus(), n + 1 == len(steps)
                        compared[i] = self.lla[i].compared(config) if last else {}
                        found[i] = config, own, self.lla[i].visited()
                        if last:
                            entropy[i].append(self.lla[i].entropy(budgets[i]))
                    self.estimator.evaluations = evaluations
                found = {i: result for part in self.ranks.gather(found) for i, result in part.items()}
                voted, updates, visited = zip(*(found[i] for i in range(len(self.blocks))))
                rows = [before + own for before, own in zip(rows, updates)]
                if self.config.lla.choose == "visited" and all(visited):
                    best = least_drop(visited, self.config.search.target)
        self._log_search(cycle, self.estimator.evaluations - before, entropy, compared)
        if best and best.retained > self.config.search.target:
            self.log.note(f"cycle {cycle}: nothing that was tried meets search.target, the smallest is taken")
        chosen = best or NetworkConfig(voted)
        for block, budget, config, own in zip(self.blocks, budgets, chosen.blocks, rows):
            self._log_updates(own)
            self.log.info(f"  cycle {cycle}, block {block.name}: {budget.strategy}, target {budget.target:.3f}, "
                          f"retained {config.retained:.3f}, bits {config.average_bits:.2f}, "
                          f"keep {config.average_keep:.3f}")
        self.voted = chosen

    def propose(self) -> None:
        """With lla.start=greedy: what the agents of each block try first, its parts of the allocations of the least damage
        to sizes around the target."""
        c, found = self.config, []
        with self._timed("search"):
            for share in PROPOSED if c.lla.start == "greedy" else ():
                with contextlib.suppress(InputError):  # smaller than anything is
                    found += [enforced.config for enforced in allocations(
                        self.blocks, self.shapes, self.sensitivity, c.compress, share * c.search.target)]
        for lla, blocks in zip(self.lla, zip(*(config.blocks for config in found))):
            lla.proposals = list(dict.fromkeys(blocks))

    def search_baseline(self, cycle: int) -> None:
        """The same step by a method of ``baselines``, with the evaluations that the agents would have made. Every rank
        goes through it, so that none waits, and takes rank 0's choice."""
        c, method = self.config, self.config.search.method
        allowed = baselines.budget(len(self.blocks), len(c.lla.algorithms), c.lla)
        problem = baselines.Problem(self.blocks, self.sensitivity, c.compress, c.search.target, self.estimator.drops,
                                    allowed)
        with self._timed("search"):
            found = self.ranks.same(baselines.find(method, problem, derive_seed(c.seed, "baseline", method, cycle)))
        for note in filter(None, (found.note, found.bad and f"{found.bad} drops were not finite and became 50")):
            self.log.note(note)
        self.searches.append({"level": "LLA", "cycle": cycle, "evaluations": found.evaluations, "drop": found.drop})
        self.log.info(f"  cycle {cycle}, {method} search: {found.evaluations} of {allowed} evaluations, sum of the "
                      f"estimated drops {found.drop:.3f}, retained {found.config.retained:.4f}")
        self.voted = found.config

    def meet_target(self, voted: NetworkConfig) -> NetworkConfig:
        """Past the paper, where asked for: steps of bits and keep until the size is met (``target.enforce``)."""
        chosen, goal, sizes = voted, self.goal, []
        if self.config.search.method not in BASELINES and (
                self.config.enforce_target or goal and goal.min_cr is not None):
            sizes.append((self.config.search.target * voted.params, retained_weights))
        if goal and goal.max_bytes is not None:
            sizes.append((goal.max_bytes - self._fixed_bytes(voted), kernel_bytes))
        for n, (budget, cost) in enumerate(sizes):
            if n and _packed_kernels(chosen) <= budget:  # only the bytes come second
                continue
            visited = cost is retained_weights and self.config.lla.choose == "visited"
            if visited and voted.retained * voted.params <= budget:
                continue  # chosen for this target from candidates that were measured
            with self._timed("target"):
                enforced = enforce(self.blocks, chosen, self.sensitivity, self.config.compress, budget, cost)
            if enforced.note:
                self.log.note(enforced.note)
            self.log.info(f"  target: {enforced.moves} steps, retained {chosen.retained:.4f} -> "
                          f"{enforced.config.retained:.4f}")
            chosen = enforced.config
        self.estimator.consensus = list(chosen.blocks)
        return chosen

    def apply(self, chosen: NetworkConfig) -> dict:
        """Step 6: theta = T(theta_0, C); what else a cycle takes over is ``carry`` (ledger D12). Returns the masks."""
        if self.carried is None:  # the training that was broken off needs it no more, and has them
            with understood():
                return self.progress.broken_off["trainer"]["masks"]
        start = dict(self.carried)
        if self.config.carry != "all":
            start.update({key: self.theta0[key] for key in (self.theta0 if self.config.carry == "none" else self._kernels)})
        self.model.load_state_dict(start)
        return compress_network(self.blocks, chosen)

    def finetune_and_measure(self, cycle, chosen, masks, budgets, voted) -> Cycle:
        """Step 7: fine-tune under the masks; accuracy of the best epoch, and of the packed file that comes of it."""
        f = self.config.finetune
        with self._timed("finetune"):
            before = accuracy(self._correct("before fine-tuning"))
            on_grid = GridTraining(self.blocks, chosen, masks, f.scales == "learned") if f.mode == "qat" else None
            trainer = self._trainer(f"finetune {cycle}", f.epochs, f.lr, f.weight_decay, f.patience, masks=masks,
                                    on_grid=on_grid)
            best = trainer.run(self.log.progress, f"cycle {cycle}, fine-tuning", self.log.info)
            self.skipped_steps += trainer.skipped
            self.carried = self._state()
        with self._timed("deploy"):
            self.packed, self.grids = self.deploy(chosen, masks, trainer.best_grids), trainer.best_grids
            deployed = accuracy(self._correct("deployed"))
            self.model.load_state_dict(self.carried)
        active = self.surrogate.active
        features = [v for block in chosen.blocks for v in block_features(block)]
        row = Cycle(
            cycle=cycle, acc=best.acc, drop=self.baseline_acc - best.acc, deployed_acc=deployed,
            acc_before_finetune=before, retained=chosen.retained, cr=chosen.cr, msr=chosen.msr,
            cr_unweighted=chosen.cr_unweighted, packed_bytes=len(self.packed),
            whole_model_ratio=model_bytes(self.model) / len(self.packed), sparsity=chosen.sparsity,
            average_bits=chosen.average_bits, average_keep=chosen.average_keep,
            compliance=compliance(chosen, budgets), voted_retained=voted.retained,
            voted_compliance=compliance(voted, budgets), finetune_epochs=len(trainer.history),
            finetune_best_epoch=best.epoch, surrogate_active=active,
            surrogate_prediction=self.surrogate.predict([features])[0] if active else None)
        self.cycles.append(row)
        self.log.info(f"cycle {cycle}: accuracy {row.acc:.2f} (before fine-tuning {before:.2f}, packed file "
                      f"{deployed:.2f}), drop {row.drop:.2f}, CR {row.cr:.2f}, "
                      f"{row.packed_bytes:,} bytes, whole model {row.whole_model_ratio:.2f}, "
                      f"sparsity {100 * row.sparsity:.1f} %, compliance {row.compliance:.1f} %")
        return row

    def deploy(self, chosen: NetworkConfig, masks, grids=None) -> bytes:
        """The packed file of the network as it stands, which is left with what was read back from it.

        Weights that are on no grids yet are put there; then BatchNorm's statistics are estimated again.
        """
        grids = grids or snap_to_grid(self.blocks, chosen, masks)
        estimate_batchnorm(self.model, self.train_set, self.config.data.batch_size, self.config.finetune.bn_images,
                           self._generator("batchnorm"), self.progress)
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        self.buffers = {name: value.clone() for name, value in self.model.state_dict().items() if name in buffers}
        packed = self._pack(chosen, masks, grids)
        pack.load(packed, self.model)
        return packed

    def _pack(self, chosen: NetworkConfig, masks, grids) -> bytes:
        """The packed file of the network as it stands, its weights on their grids."""
        notes: list[str] = []
        packed = pack.pack(self.model, self.blocks, chosen, masks, grids, self.network, self.config.pack.rest, notes)
        for note in notes:
            self.log.note(note)
        return packed

    def update_surrogate(self, chosen: NetworkConfig, row: Cycle) -> None:
        """Step 8: add the measured pair, train the MLP once it is active."""
        if not self.config.surrogate.enabled:
            return
        with self._timed("surrogate"):
            self.surrogate.add(chosen, row.acc)
            self.surrogate.train(self.config.surrogate.epochs)

    def keep_best(self, row: Cycle, chosen: NetworkConfig, masks, budgets) -> None:
        """Step 9: the cycle of the highest accuracy wins, the first of equals. Under a goal: see :meth:`merit`."""
        if self.best is None or self.merit(row) > self.merit(self.best):
            self._keep(row, chosen, masks, budgets)

    def _keep(self, row: Cycle, chosen: NetworkConfig, masks, budgets) -> None:
        self.best, self.best_config, self.best_masks, self.best_budgets = row, chosen, masks, budgets
        self.best_state, self.best_grids, self.best_packed = self.carried, self.grids, self.packed
        self.best_buffers = self.buffers

    def merit(self, row: Cycle) -> tuple:
        """What the best cycle has most of. Under a goal: the packed file's drop holds; then, unless a size was asked
        for, the smaller network; then the packed file's accuracy."""
        if self.goal is None:
            return (row.acc,)
        holds = self.drop_holds(row)
        return holds, row.cr if holds and not self.goal.has_size else 0.0, row.deployed_acc

    def drop_holds(self, row: Cycle) -> bool:
        """Whether the packed file of a cycle keeps the goal's drop; True where it has none."""
        allowed = self.goal.max_drop if self.goal else None
        return allowed is None or self.baseline_acc - row.deployed_acc <= allowed

    # -- after the last cycle

    def may_relax(self) -> bool:
        """Whether blocks are to be given back: the drop is missed, and no size is held against it."""
        allowed = self.goal is not None and (self.config.relax or not self.goal.has_size)
        left = self._give_back_count // 2 < max_give_back(self.best_config)
        return allowed and left and not self.drop_holds(self.best)

    def relax(self) -> None:
        """Past the paper: give the most sensitive blocks back, twice as many as the round before, and measure."""
        count = min(self._give_back_count, max_give_back(self.best_config))
        chosen, budgets = give_back(self.best_config, self.sensitivity, count, self.config.compress), self.best_budgets
        self.log.note(f"the goal's drop is missed: the {min(count, len(self.blocks))} most sensitive blocks are given "
                      f"back{', some as FP32' if count > len(self.blocks) else ''}")
        masks = self.apply(chosen)
        row = self.finetune_and_measure(len(self.cycles), chosen, masks, budgets, chosen)
        self._keep(row, chosen, masks, budgets)

    def report(self) -> dict:
        """Whole-split accuracies of theta_0 and the best network, and everything for result.json."""
        c, best, count = self.config, self.best, len(self.test_set)
        full = {"baseline": None, "final": None, "deployed": None}
        self.progress.begin()
        with self._timed("report"):
            if c.eval.full:
                for key, state in (("baseline", self.theta0), ("final", self.best_state), ("deployed", None)):
                    if state is None:
                        pack.load(self.best_packed, self.model)
                    else:
                        self.model.load_state_dict(state)
                    full[key] = correct(self.model, self.test_set, c.eval.batch_size, 0, self.log.progress,
                                        self.ranks, self.progress, f"whole split, {key}")
            self.model.load_state_dict(self.best_state)
            null = null_controller(self.shapes, self.sensitivity, c)
        interval = {k: v if v is None else list(wilson(int(v.sum()), count)) for k, v in full.items()}
        drops = {which: None if full[which] is None else _paired(full["baseline"], full[which])
                 for which in ("final", "deployed")}
        full = {k: v if v is None else accuracy(v) for k, v in full.items()}
        errors = [abs(r.surrogate_prediction - r.acc) for r in self.cycles if r.surrogate_prediction is not None]
        strategies = [budget.strategy for budget in self.best_budgets]
        moved: dict[str, list[float]] = {}
        for update in self.updates:
            moved.setdefault(f"{update['level']} {update['algorithm']}", []).append(update["approx_kl"])
        bad = sum(self.ranks.gather(sum(lla.bad_rewards for lla in self.lla)))
        if bad:
            self.log.note(f"{bad} rewards were not finite and became -10")
        return {
            "exp": c.exp, "name": c.name, "smoke": c.smoke, "seed": c.seed,
            "model": c.model.source.rpartition(":")[2] or c.model.name,
            "data": c.data.name, "device": str(self.device),
            "protocol": c.eval.protocol,
            "eval_images": self.eval_images, "test_images": count,
            "baseline_acc": self.baseline_acc, "final_acc": best.acc, "drop": best.drop,
            "deployed_acc": best.deployed_acc, "baseline_acc_full": full["baseline"], "final_acc_full": full["final"],
            "deployed_acc_full": full["deployed"], "baseline_interval_full": interval["baseline"],
            "final_interval_full": interval["final"], "deployed_interval_full": interval["deployed"],
            "drop_full": drops["final"] and drops["final"]["drop"],
            "drop_interval_full": drops["final"] and drops["final"]["interval"],
            "mcnemar_p_full": drops["final"] and drops["final"]["p"],
            "deployed_drop_full": drops["deployed"] and drops["deployed"]["drop"],
            "deployed_drop_interval_full": drops["deployed"] and drops["deployed"]["interval"],
            "deployed_mcnemar_p_full": drops["deployed"] and drops["deployed"]["p"],
            "mode": c.finetune.mode, "scope": c.compress.scope,
            "cr": best.cr, "msr": best.msr, "cr_unweighted": best.cr_unweighted,
            "whole_model_ratio": best.whole_model_ratio, "fp32_bytes": model_bytes(self.model),
            "packed_bytes": best.packed_bytes, "sparsity": best.sparsity, "compliance": best.compliance,
            "cr_met": best.cr >= 1 / c.search.target, "drop_met": best.drop <= c.search.max_drop,
            "goal": self._goal_result(), "target": c.search.target, "retained": best.retained,
            "voted_retained": best.voted_retained,
            "voted_compliance": best.voted_compliance,
            "best_cycle": best.cycle, "cycles": [dataclasses.asdict(row) for row in self.cycles],
            "strategies": {s: strategies.count(s) / len(strategies) for s in sorted(set(strategies))},
            "sensitivity": self.sensitivity,
            "surrogate_mae": sum(errors) / len(errors) if errors else None,
            "mean_kl": {who: sum(values) / len(values) for who, values in moved.items()},
            "search": c.search.method, "searches": self.searches, "cycle_budgets": self.cycle_budgets,
            "evaluations": sum(search.get("evaluations", 0) for search in self.searches),
            "surrogate_samples": len(self.surrogate.buffer), "bad_rewards": bad, "skipped_steps": self.skipped_steps,
            "null_controller": null,
            "notes": self.log.notes, "timings": {k: round(v, 2) for k, v in self.timings.items()}}

    def policy(self) -> dict:
        """The best cycle's configuration of every kernel and budget of every block, as plain data."""
        policy = to_policy(self.blocks, self.best_config)
        for entry, budget in zip(policy["blocks"], self.best_budgets):
            entry["budget"] = dataclasses.asdict(budget)
        return policy

    # -- phases and the state between them

    def _once(self, phase: str, step, *args) -> None:
        """Take a phase unless a resumed run has it behind it, and save what follows from it."""
        if phase in self.progress.done:
            return
        self.progress.begin()
        step(*args)
        self.progress.commit(phase, *self._changed())
        self.save(self)

    def _restore(self, make) -> None:
        """Make the agents, which every process does, and give them the state that a resumed run left them in."""
        notes = list(self.log.notes)
        make()
        if self.resumed:
            if self.resumed["hla"] is not None:
                self.log.notes = notes  # what making them says is among them already
            with understood():
                for owner, key in ((self.surrogate, "surrogate"), (self.hla, "hla")):
                    if self.resumed[key] is not None:
                        owner.load_state_dict(self.resumed[key])
                for lla, saved in zip(self.lla, self.resumed["lla"]):
                    lla.load_state_dict(saved)
                if self.resumed["consensus"]:
                    self.estimator.consensus = list(from_policy(self.resumed["consensus"], self.blocks).blocks)
            self.resumed = None

    def _changed(self) -> tuple[dict, tuple]:
        """(parts to write, parts to drop) of the state after a phase. theta_0 and the best network are written when they
        are new; the network alone only where theta_0 does not stand for it."""
        if self.progress.store is None:
            return {}, ()
        parts, drop = {"run": self.state_dict()}, []
        if not self.cycles:
            parts["network"] = self._state()
        elif self.stored_theta0 is not self.theta0:
            parts["theta0"] = self.theta0
            drop.append("network")
        if self._carries() != "own":
            drop.append("carried")
        elif self.stored_carried is not self.carried:
            of_theta0 = self._kernels if self.config.carry == "rest" else ()
            parts["carried"] = difference({key: value for key, value in self.carried.items() if key not in of_theta0},
                                          self.theta0)
            self.stored_carried = self.carried
        if self.best is not None and self.stored_best is not self.best:
            best = coded(self.best_state, self.blocks, self.best_masks, self.best_grids)
            parts["best"] = {"network": difference(best, self.theta0), "masks": self.best_masks,
                             "grids": plain_grids(self.best_grids), "deployed": self.best_buffers}
        self.stored_theta0, self.stored_best = (self.theta0 if self.cycles else None), self.best
        return parts, drop

    def _carries(self) -> str:
        """Which network the next cycle takes over from: theta0, best, or one of its own."""
        if not self.cycles or self.config.carry == "none" or self.carried is self.theta0:
            return "theta0"
        return "best" if self.best is not None and self.carried is self.best_state else "own"

    def best_network(self) -> dict:
        """Content of best.pt."""
        return {"format": 1, "settings": flatten(self.config), "cycle": self.best.cycle, "network": self.network,
                "model": self.best_state, "masks": self.best_masks, "policy": self.policy()}

    def state_dict(self) -> dict:
        """Everything but networks that the next phase depends on, as plain tensors, numbers, lists and dictionaries.

        Phases draw from generators of their own, derived from the seed; the global random states are those that the
        user's own network or images may draw from.
        """
        agents = hasattr(self, "hla")
        consensus = self.estimator.consensus if agents else [None]
        best = None if self.best is None else {
            "cycle": self.best.cycle, "policy": to_policy(self.blocks, self.best_config),
            "budgets": [dataclasses.asdict(budget) for budget in self.best_budgets]}
        return {
            "baseline_acc": self.baseline_acc, "sensitivity": self.sensitivity,
            "cycles": [dataclasses.asdict(row) for row in self.cycles],
            "budgets": [dataclasses.asdict(budget) for budget in self.budgets],
            "voted": to_policy(self.blocks, self.voted) if self.voted else None,
            "consensus": to_policy(self.blocks, NetworkConfig(tuple(consensus))) if all(consensus) else None,
            "surrogate": self.surrogate.state_dict() if agents else None,
            "hla": self.hla.state_dict() if agents else None, "lla": self._lla_states() if agents else [],
            "best": best, "carried": self._carries(), "updates": self.updates, "searches": self.searches,
            "cycle_budgets": self.cycle_budgets,
            "timings": dict(self.timings), "notes": list(self.log.notes),
            "skipped_steps": self.skipped_steps, "elapsed": self.elapsed + time.monotonic() - self.started,
            "random": random_states()}

    def load_state(self, parts: dict) -> None:
        """Take over the parts of a state; :meth:`run` then goes on behind the last phase that was done."""
        state = parts["run"]
        if "theta0" in parts:
            self.theta0 = self.stored_theta0 = self._like(parts["theta0"])
            self.carried = self.theta0
            if state["carried"] == "own":  # without it, a training that has gone on from it was broken off
                self.carried = self._like({**self.theta0, **restored(parts["carried"], self.theta0)}) if (
                    "carried" in parts) else None
            self.model.load_state_dict(self.theta0)
        elif "network" in parts:
            self.model.load_state_dict(self._like(parts["network"]))
        self.baseline_acc, self.sensitivity = state["baseline_acc"], state["sensitivity"]
        self.cycles = [Cycle(**row) for row in state["cycles"]]
        self.budgets = tuple(LayerBudget(**budget) for budget in state["budgets"])
        self.voted = from_policy(state["voted"], self.blocks) if state["voted"] else None
        best = state["best"]
        if best is not None:
            self.best = self.stored_best = self.cycles[best["cycle"]]
            self.best_config, network = from_policy(best["policy"], self.blocks), parts["best"]
            self.best_masks, self.best_grids = network["masks"], read_grids(network["grids"])
            self.best_budgets = tuple(LayerBudget(**budget) for budget in best["budgets"])
            self.best_state = self._like(decoded(restored(network["network"], self.theta0)))
            if state["carried"] == "best":
                self.carried = self.best_state
            self.best_buffers = network["deployed"]
            self.model.load_state_dict({**self.best_state, **self.best_buffers})
            grids = self.best_grids or snap_to_grid(self.blocks, self.best_config, self.best_masks)
            self.best_packed = self._pack(self.best_config, self.best_masks, grids)
            self.model.load_state_dict(self.theta0)
        self.updates, self.timings = list(state["updates"]), dict(state["timings"])
        self.log.notes, self.skipped_steps = list(state["notes"]), state["skipped_steps"]
        self.elapsed, self.searches = state["elapsed"], list(state["searches"])
        self.cycle_budgets = list(state["cycle_budgets"])
        self.resumed = state
        set_random_states(state["random"])

    def _like(self, tensors: dict) -> dict:
        """Tensors by name as the network has them: its device and memory format. InputError where they do not fit."""
        own = self.model.state_dict()
        if own.keys() != tensors.keys() or any(own[key].shape != value.shape for key, value in tensors.items()):
            raise InputError("the state holds another network than the settings ask for; start anew with --restart")
        return {key: torch.empty_like(own[key]).copy_(value) for key, value in tensors.items()}

    # -- helpers

    @property
    def _kernels(self) -> set[str]:
        """Names of the kernels' weights in the network's state dict."""
        return {key for block in self.blocks for key in block.state_names}

    @property
    def half(self) -> bool:
        """Whether training steps run under bfloat16 autocast."""
        precision = self.config.precision
        return precision == "bfloat16" or precision == "auto" and self.device.type == "cuda"

    @property
    def _give_back_count(self) -> int:
        """How many blocks the next round gives back: 1, 2, 4, …"""
        return 2 ** (len(self.cycles) - 1 - self.config.search.cycles)

    def _check_sizes(self) -> None:
        """InputError for a size that no configuration within the bounds can have."""
        limits, goal = self.config.compress, self.goal
        smallest = NetworkConfig(tuple(BlockConfig(tuple(KernelConfig(
            limits.bits_min, 1 - limits.max_pruning if shape.prunable else 1.0) for shape in block), block)
            for block in self.shapes))
        if self.config.enforce_target or self.config.search.method in BASELINES or goal and goal.min_cr is not None:
            if smallest.retained > self.config.search.target:
                target = self.config.search.target
                raise InputError(f"search.target={target:.4g} (CR {1 / target:.2f}) cannot be met: with "
                                 f"compress.bits_min={limits.bits_min} and compress.max_pruning="
                                 f"{limits.max_pruning:g} at least {smallest.retained:.4f} is retained")
        if goal and goal.max_bytes is not None:
            rest = (model_bytes(self.model) - 4 * smallest.params) // (2 if self.config.pack.rest == "float16" else 1)
            least = rest + _packed_kernels(smallest)
            if least > goal.max_bytes:
                raise InputError(f"goal={self.config.goal}: the file takes at least {least:,} bytes, {rest:,} of them "
                                 "for what is not compressed; ask for more, or try compress.scope=all or "
                                 "pack.rest=float16")

    def _goal_settings(self) -> dict:
        """rho_target and delta_max as the goal has them; the target of a file's size as if it had no index."""
        params, goal = sum(shape.params for block in self.shapes for shape in block), self.goal
        targets = [] if goal.min_cr is None else [1 / goal.min_cr]
        if goal.max_bytes is not None:
            targets.append((goal.max_bytes - model_bytes(self.model)) / (4 * params) + 1)
        settings = {"search.target": min(max(min(targets), 0.01), 1.0)} if targets else {}
        return settings if goal.max_drop is None else {**settings, "search.max_drop": goal.max_drop}

    def _fixed_bytes(self, chosen: NetworkConfig) -> int:
        """Bytes of the packed file besides the kernels: everything else, the index, and room for it to vary."""
        masks = compress_network(self.blocks, chosen)
        grids = snap_to_grid(self.blocks, chosen, masks)
        packed = pack.pack(self.model, self.blocks, chosen, masks, grids, self.network, self.config.pack.rest)
        self.model.load_state_dict(self.theta0)
        return len(packed) - _packed_kernels(chosen) + INDEX_ROOM

    def _goal_result(self) -> dict | None:
        """Which of the goal's conditions the packed file meets; the drop is the packed file's."""
        if self.goal is None:
            return None
        goal, best = self.goal, self.best
        met = {"size": goal.max_bytes is None or best.packed_bytes <= goal.max_bytes,
               "cr": goal.min_cr is None or best.cr >= goal.min_cr, "drop": self.drop_holds(best)}
        return {"asked": self.config.goal, "met": all(met.values()), "missed": [k for k, v in met.items() if not v],
                "deployed_drop": self.baseline_acc - best.deployed_acc, "packed_bytes": best.packed_bytes}

    @property
    def eval_images(self) -> int:
        """Number of images that choose epoch and cycle (ledger D15)."""
        most = self.config.eval.images if self.config.eval.protocol == "paper" else len(self.choice_set)
        return min(most, len(self.choice_set))

    def _generator(self, *phase) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.config.seed, *phase))

    def _state(self) -> dict:
        return {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def _correct(self, what):
        return correct(self.model, self.choice_set, self.config.eval.batch_size, self.eval_images, ranks=self.ranks,
                       state=self.progress, what=what)

    def _lla_states(self) -> list[dict]:
        """State of every block's agents, each from the rank that trains them."""
        mine = {i: self.lla[i].state_dict() for i, owner in enumerate(self.owners) if owner == self.ranks.rank}
        states = {i: state for part in self.ranks.gather(mine) for i, state in part.items()}
        return [states[i] for i in range(len(self.lla))]

    def _trainer(self, phase, epochs, lr, weight_decay, patience, warmup_epochs=0.0, masks=None,
                 on_grid=None) -> Trainer:
        trainer = Trainer(self.model, self.train_set, self.choice_set, epochs=epochs, lr=lr, weight_decay=weight_decay,
                          patience=patience, batch_size=self.config.data.batch_size, eval_images=self.eval_images,
                          eval_batch_size=self.config.eval.batch_size, generator=self._generator(phase),
                          blocks=self.blocks, masks=masks, warmup_epochs=warmup_epochs, on_grid=on_grid,
                          ranks=self.ranks, unused_parameters=self.config.model.weights == "given", half=self.half)
        reference = self.best_state if self.best is not None else self.theta0 if self.cycles else None
        needless = ("carried",) if phase.startswith("finetune") and self.config.carry == "all" and not on_grid else ()
        self.progress.train(phase, trainer, reference, needless)
        return trainer

    def _timed(self, phase: str):
        return _Timed(self.timings, phase)

    def _log_search(self, cycle, evaluations, entropy, compared) -> None:
        """How far the low-level policies moved, and what their consensus is worth: means over the blocks."""
        parts = self.ranks.gather((evaluations, entropy, compared))
        entropy = [pair for part in parts for pair in part[1].values()]
        row = {"level": "LLA", "cycle": cycle, "evaluations": sum(part[0] for part in parts),
               "entropy": [float(value) for value in np.mean(entropy, axis=0)]}
        blocks = [numbers for part in parts for numbers in part[2].values()]
        for key in blocks[0]:
            values = [numbers[key] for numbers in blocks]
            row[key] = None if None in values else math.fsum(values) / len(values)
        self.searches.append(row)
        self.log.info(f"  cycle {cycle}: {row['evaluations']} evaluations, entropy {row['entropy'][0]:.4f} -> "
                      f"{row['entropy'][1]:.4f} of a uniform policy's; mean reward of the consensus "
                      f"{_number(row['consensus_reward'])}, of random actions {_number(row['random_reward'])}")

    def _log_updates(self, rows) -> None:
        self.updates += [{"cycle": len(self.cycles), **row} for row in rows]


def _paired(before, after) -> dict:
    """The drop from one network to another on the same images (bool [n] each): points, 95 % interval, McNemar's p."""
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return {"drop": 100 * (lost - won) / len(before), "interval": list(paired_interval(lost, won, len(before))),
            "p": mcnemar(lost, won)}


def _number(value) -> str:
    return "-" if value is None else f"{value:.1f}"


def rounds(lla) -> list[int]:
    """lla.timesteps, rounded up to whole steps of the environments, in lla.rounds parts; none is empty."""
    steps = math.ceil(lla.timesteps / lla.envs)
    parts = [steps * (n + 1) // lla.rounds - steps * n // lla.rounds for n in range(lla.rounds)]
    return [part * lla.envs for part in parts if part]


def _packed_kernels(config: NetworkConfig) -> int:
    """Bytes of all kernels in the packed file."""
    return sum(kernel_bytes(k, s) for block in config.blocks for k, s in zip(block.kernels, block.shapes))


class _Timed:
    """Adds the seconds spent inside to timings[phase]."""

    def __init__(self, timings, phase):
        self.timings, self.phase = timings, phase

    def __enter__(self):
        self.start = time.monotonic()

    def __exit__(self, *error):
        self.timings[self.phase] = self.timings.get(self.phase, 0.0) + time.monotonic() - self.start


# ---------------------------------------------------------------------------------------------------------------
# Networks of one's own


def compress_model(model, train, test, *, exclude=(), groups=None, log=None, packed=None, policy=None,
                   **settings):
    """Compress a network of one's own: any nn.Module that maps a batch of images to logits [n, classes].

    train, test: a Dataset, a DataLoader, a pair of tensors (:func:`data.as_images`), or an object with ``len()``,
    ``batch`` and ``batches`` as :class:`data.Images`. Kernels and blocks are found by what a forward of eight training
    images does (:func:`blocks.traced_kernels`). exclude: names of kernels or modules, or patterns with ``*``, to leave
    out; groups: lists of kernel names that are the blocks. log: a :class:`log.Log`; without one it prints.
    packed: path of the packed file to write; ``pack.load(path, model=…)`` fills a network of the same class with it.
    policy: one that this function returned, or the path of a policy.json; it is applied in one cycle without a search.
    settings: those of config.Config, with ``__`` for the dot, for example ``search__cycles=1``.

    Returns (compressed network, policy, result): the network in eval mode on the given one's device, the other two as
    policy.json and result.json hold them. The given network is left untouched, whatever happens, and so are torch's
    random generators. Raises InputError for settings, images or a network that cannot be used.
    """
    # weights "given": the network is trained already, nothing is trained from scratch.
    config = override(Config(model=dataclasses.replace(Config().model, weights="given", source=type(model).__name__)),
                      {key.replace("__", "."): value for key, value in settings.items()})
    policy = policies.read(policy) if policy is not None else None
    config = policy.settings(config) if policy else config
    log, device, home = log or Log(), _device(config), next(model.parameters(), torch.empty(0)).device
    train, test = data.as_images(train), data.as_images(test)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        network, survey = _prepare(copy_network(model).to(device), train, test, log, config, exclude, groups)
        run = HiReLC(network, survey.blocks, train, test, config, log, network=_describe(network, config, train),
                     given=_fitted(policy, survey.blocks, config, log))
        result = {**run.run(), "data": "given", **_account(run, survey), "policy_source": policy and policy.source}
        if packed is not None:
            pack.write(packed, run.best_packed)
    return network.to(home), run.policy(), result


def _prepare(network, train, test, log: Log, config: Config, exclude=(), groups=None):
    """(network, survey) of a network that is not this project's: in the memory format that suits it, and its kernels.

    It is tried on eight images of ``train``. What is left out is said in the log, and kept in the notes unless it is
    the classifier. Raises InputError as :func:`compress_model`.
    """
    if not len(train) or not len(test):
        raise InputError(f"{len(train)} training and {len(test)} test images: there must be some of both")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    images, labels = train.batch(torch.arange(min(8, len(train))), device)
    classes, channels_last = try_network(network, images)
    for name, labels in (("training", getattr(train, "labels", labels)), ("test", getattr(test, "labels", None))):
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise InputError(f"{name} labels go from {int(labels.min())} to {int(labels.max())}, the network has "
                             f"logits for the classes 0 to {classes - 1}")
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    survey = models.survey(network, images, exclude, groups, config.compress.scope)
    log.info(f"{type(network).__name__}: {len(survey.compressed)} kernels in {len(survey.blocks)} blocks, "
             f"{100 * survey.coverage:.2f} % of the kernel parameters besides the classifier's")
    for kernel in survey.excluded:
        say = log.info if kernel.classifier else log.note
        say(f"not compressed: {kernel.name} ({kernel.params:,} parameters): {kernel.reason}")
    return network, survey


def _fitted(policy, blocks, config: Config, log: Log):
    """``given`` of :class:`HiReLC`: a policy's configuration and budgets; None without one."""
    if policy is None:
        return None
    chosen, budgets, notes = policy.fit(blocks, config)
    log.info(f"policy of {policy.where}: CR {chosen.cr:.2f}, {chosen.average_bits:.2f} bits, keep "
             f"{chosen.average_keep:.3f}; nothing is searched")
    for note in notes:
        log.note(note)
    return chosen, budgets


def _describe(network, config: Config, train) -> dict:
    """What the packed file says of its network: how to build it where it is one of ours, and what images it takes."""
    images, _ = train.batch(torch.arange(1), next(network.parameters()).device)
    with untouched(network):
        classes = forward(network, images).shape[1]
    _, channels, height, width = images.shape
    return {"name": "" if config.model.source else config.model.name, "source": config.model.source,
            "num_classes": classes, "channels": channels, "image_size": height if height == width else [height, width],
            "width": config.model.width, "patch_size": config.model.patch_size,
            "quick_gelu": models.has_quick_gelu(network), "mean": list(getattr(train, "mean", ())),
            "std": list(getattr(train, "std", ())), "data": config.data.name}


def _finished(path: Path) -> dict:
    """The result of a finished run, as far as the table needs it."""
    try:
        result, _ = read_json(path)
        results_table([result])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a result of this program ({type(error).__name__}); remove it or run again "
                         "without --resume") from None
    return result


def _account(run: HiReLC, survey: Survey) -> dict:
    """What result.json says of the kernels one by one, and where the network's parameters and bytes are."""
    kernels, known = {}, {kernel.name: kernel for kernel in survey.compressed}
    for block, config in zip(run.blocks, run.best_config.blocks):
        for name, kernel, shape in zip(block.kernels, config.kernels, config.shapes):
            kernels[name] = {"block": block.name, "tensors": list(known[name].tensors),
                             "shape": list(known[name].shape), "params": shape.params,
                             "bytes": kernel_bytes(kernel, shape)}
    total, stored = sum(p.numel() for p in run.model.parameters()), model_bytes(run.model)
    compressed = sum(kernel["params"] for kernel in kernels.values())
    classifier = sum(k.params for k in survey.excluded if k.classifier)
    left_out = sum(k.params for k in survey.excluded if not k.classifier)
    return {
        "kernels": kernels, "coverage": survey.coverage,
        "excluded": {k.name: {"params": k.params, "reason": k.reason} for k in survey.excluded},
        "accounting": {
            "parameters": total, "compressed": compressed, "classifier": classifier, "kernels_left_out": left_out,
            "not_kernels": total - compressed - classifier - left_out, "bytes": stored,
            "bytes_packed": run.best.packed_bytes}}


# ---------------------------------------------------------------------------------------------------------------
# One experiment and its run directory


def resolve(exp: int, flags: dict, assignments=()) -> Config:
    """Settings of an experiment: the paper's, then --smoke's, then the flags', then --set's."""
    if exp not in EXPERIMENTS:
        raise InputError(f"unknown experiment {exp}; known: {', '.join(map(str, EXPERIMENTS))} (see --list)")
    config = override(Config(), EXPERIMENTS[exp].settings)
    if flags.get("smoke"):
        width, patch = SMOKE_MODEL[config.model.name]
        config = override(config, {**SMOKE, "model.width": width, "model.patch_size": patch,
                                   "surrogate.warmup": min(config.surrogate.warmup, SMOKE_WARMUP)})
    return override(override(config, flags), assignments)


def resolve_own(source: str, flags: dict, assignments=()) -> Config:
    """Settings for a network of one's own: the defaults, then --smoke's, then the flags', then --set's. Its weights
    are those that its function gives it, and its name is the function's, unless a flag says otherwise."""
    if not all(source.rpartition(":")):
        raise InputError(f"--model {source}: expected module:function or path/to/file.py:function")
    config = override(Config(), {"model.source": source, "model.weights": "given", "name": source.rpartition(":")[2]})
    config = override(override(override(config, SMOKE if flags.get("smoke") else {}), flags), assignments)
    if config.model.weights == "auto":
        raise InputError("--weights auto: there are no published weights for a network of one's own; give a file, none "
                         "to train from scratch, or leave the flag out for the weights that the function gives it")
    return config


def run_experiment(config: Config, log: Log | None = None, resume: bool = False, restart: bool = False,
                   trained: dict | None = None) -> dict:
    """Prepare and run one experiment, or one network of one's own, and fill its run directory (SPEC 12).

    Returns what result.json holds. ``resume``: go on with a run that was broken off, and leave a finished one as it is;
    ``restart``: begin anew where one was broken off, which is an InputError otherwise. ``trained``: as :class:`HiReLC`.
    Raises InputError before anything is written when settings, data, weights, device or folder cannot be used.
    """
    owner = Owner()
    try:
        return _run_experiment(config, log, resume, restart, owner, trained)
    finally:
        owner.leave()


def _run_experiment(config, log, resume, restart, owner, trained):
    started, ranks = time.monotonic(), start(config.device)
    log = (log or Log()) if ranks.first else Log(open(os.devnull, "w"))
    with ranks.alike():
        parse_goal(config.goal)
        policy = policies.read(config.policy) if config.policy else None
        config = policy.settings(config) if policy else config
        if config.data.batch_size < 2 * ranks.size:
            raise InputError(f"data.batch_size={config.data.batch_size} is too small for {ranks.size} processes: each "
                             "needs two images of a batch")
        if config.model.source and config.data.normalize == "pretrained":
            raise InputError("data.normalize=pretrained: mean and std of the weights of a network of one's own are not "
                             "known; leave it at dataset, or normalise inside the network")
        device, path = _device(config, ranks), run_directory(config)
        store, finished = Store(path / "state", identity(config)), None
        if ranks.first:
            check_directory(path, config)
            owner.take(path)
            if store.exists and not (resume or restart):
                raise _begun(path)
            if resume and (path / "result.json").exists() and not store.exists:
                log.info(f"{path}: finished already")
                store.remove()  # the process before may have ended at this
                finished = _finished(path / "result.json")
    resume, finished = ranks.same((resume and store.exists, finished))  # the others may have another disk
    if finished:
        return finished
    title = f"experiment {config.exp}: {EXPERIMENTS[config.exp].title}" if config.exp else config.model.source
    log.info(f"{title}{' (smoke)' if config.smoke else ''}, seed {config.seed}, on {device}"
             + (f", {ranks.size} processes" if ranks.size > 1 else ""))
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    torch.manual_seed(config.seed)
    with ranks.in_turn():  # downloads and builds caches
        splits = data.load(config.data, log.progress, models.PRETRAINED_STATS[config.model.name])
    for note in splits.notes:
        log.note(note)
    log.info(f"{config.data.name}: {len(splits.train)} training and {len(splits.test)} test images, "
             f"{splits.num_classes} classes, {config.data.image_size} px")
    model, survey = _network(config, splits, device, ranks, log)
    with ranks.alike():
        run = HiReLC(model, survey.blocks, splits.train, splits.test, config, log,
                     save=lambda r: save(r, path) if ranks.first else None,
                     network=_describe(model, config, splits.train), ranks=ranks,
                     given=_fitted(policy, survey.blocks, config, log), progress=Progress(store, ranks), trained=trained)
    _take_up(run, config, path, owner, resume)
    with stoppable(run.progress):
        result = {**run.run(), **_account(run, survey), "skipped_images": splits.skipped,
                  "policy_source": policy and policy.source}
    return _finish(run, result, path, run.elapsed + time.monotonic() - started)


def _network(config: Config, splits, device, ranks: Ranks, log: Log):
    """(model with its weights on the device, survey of its kernels)."""
    if config.model.source:
        with ranks.in_turn():
            model = own_network(config.model.source, splits.num_classes)
            _load_weights(model, config, log)
        with ranks.alike():
            return _prepare(model.to(device), splits.train, splits.test, log, config)
    with ranks.in_turn():
        model = models.build(config.model.name, splits.num_classes, config.data.image_size, config.model.width,
                             config.model.patch_size)
        _load_weights(model, config, log)
    # Convolutions run up to 1.7 times faster with channels last, also on a CPU; ViTs do not care.
    model = model.to(device, memory_format=torch.channels_last)
    survey = models.survey(model, scope=config.compress.scope)
    log.info(f"{config.model.name}: {len(survey.compressed)} kernels in {len(survey.blocks)} blocks, "
             f"{sum(kernel.params for kernel in survey.compressed):,} kernel parameters")
    return model, survey


def _take_up(run: HiReLC, config: Config, path: Path, owner: Owner, resume: bool) -> None:
    """The run's state as it was saved, where it goes on; its directory with everything that is known at the start."""
    ranks, log, parts = run.ranks, run.log, {}
    if resume:
        parts = run.progress.load()
        with ranks.alike(), understood():
            if "run" in parts:
                run.load_state(parts)
        log.info(f"resumed after {run.progress.done[-1] if run.progress.done else 'the start'}")
    with ranks.alike():
        if ranks.first:
            _open_directory(run, config, path, owner, resume, known="run" in parts)


def _open_directory(run, config, path, owner, resume, known) -> None:
    """``known``: whether a phase of the run was at its end."""
    path.mkdir(parents=True, exist_ok=True)
    owner.take(path)
    if not resume:
        clear(path)
    run.log.open(path / "run.log", resume)
    if resume:
        for note in moved(path, run.device, run.ranks.size):
            run.log.note(note)
        if known:
            save(run, path)  # the process before may have ended between the state and these
    else:
        write_json(path / "config.json", {"settings": flatten(config), "processes": run.ranks.size,
                                          **provenance(run.device)})


def _finish(run: HiReLC, result: dict, path: Path, total: float) -> dict:
    """``result`` with where the time went, ``total`` seconds in all; the first process writes it and removes the state."""
    log = run.log
    result["timings"]["other"] = round(total - sum(result["timings"].values()), 2)
    result["time_shares"] = {phase: round(seconds / total, 4) for phase, seconds in result["timings"].items()}
    result["timings"] |= {"total": round(total, 2), "saving": round(run.progress.spent, 2)}
    if not run.ranks.first:
        return result
    save(run, path, finished=True)
    result["fp32_file_bytes"] = (path / "baseline.pt").stat().st_size
    write_json(path / "policy.json", run.policy())
    write_json(path / "result.json", result)
    run.progress.store.remove()
    for phase, share in sorted(result["time_shares"].items(), key=lambda item: -item[1]):
        log.info(f"  {phase:12} {result['timings'][phase]:10.1f} s  {100 * share:5.1f} %")
    log.info(f"baseline {result['baseline_acc']:.2f}, final {result['final_acc']:.2f}, drop {result['drop']:.2f}, "
             f"packed file {result['deployed_acc']:.2f}, CR {result['cr']:.2f}, {result['packed_bytes']:,} bytes for "
             f"{result['fp32_file_bytes']:,}, whole model {result['whole_model_ratio']:.2f}, best cycle "
             f"{result['best_cycle']}, {duration(result['timings']['total'])} → {path}")
    return result


def dry_run(config: Config, resume: bool = False, restart: bool = False) -> str:
    """The plan of :func:`run_experiment`, which is not begun. Raises InputError where that would."""
    path = run_directory(config)
    if Store(path / "state", {}).exists and not (resume or restart):
        raise _begun(path)

    def check(model, blocks, train, test):
        HiReLC(model, blocks, train, test, config, Log(open(os.devnull, "w")))  # refuses sizes that cannot be met
    return plan.plan(config, _device(config), check)


def _begun(path) -> InputError:
    return InputError(f"{path}: holds a run that was broken off; --resume goes on with it, --restart begins anew")


def evaluate_packed(config: Config, path: str, log: Log | None = None) -> dict:
    """Accuracy of a packed file on the test images of an experiment, or with ``model.source`` of one's own network.

    Image size, mean and std are those that the file was made with. Writes nothing. Returns accuracies in percentage
    points on the first ``eval.images`` images and on the whole split, its Wilson interval, and sizes in bytes. Raises
    InputError where file, network and data do not fit.
    """
    log, device, packed = log or Log(), _device(config), pack.read(path)
    network = {"name": "", "num_classes": None, "mean": [], "std": [], **packed.network}
    if config.threads:
        torch.set_num_threads(config.threads)
    if network["name"] and not config.model.source:
        config = override(config, {"data.image_size": network["image_size"]})
    splits = data.load(config.data, log.progress, models.PRETRAINED_STATS[config.model.name])
    test = splits.test
    if config.model.source:
        model = pack.load(path, own_network(config.model.source, splits.num_classes))
    else:
        model = pack.load(path)
        if network["name"] != config.model.name:
            log.note(f"the file holds {network['name']}, the experiment is about {config.model.name}")
    if network["num_classes"] != splits.num_classes:
        raise InputError(f"{path}: made for {network['num_classes']} classes, {config.data.name} has "
                         f"{splits.num_classes}; choose the experiment or --set data.name=… that it was made with")
    for key in ("mean", "std"):
        values = network[key]
        if not (isinstance(values, list) and len(values) in (0, len(test.mean)) and all(
                isinstance(v, (int, float)) and math.isfinite(v) and (key == "mean" or v > 0) for v in values)):
            raise InputError(f"{path}: its {key} is {shown(values)}, expected a number per channel; pack the network "
                             "again")
    if network["mean"] and network["std"] and (network["mean"], network["std"]) != (list(test.mean), list(test.std)):
        test = dataclasses.replace(test, mean=tuple(network["mean"]), std=tuple(network["std"]))
        log.note(f"images are normalised as the file says: mean {network['mean']}, std {network['std']}")
    hits = correct(model.to(device), test, config.eval.batch_size, 0, log.progress)
    count = min(config.eval.images, len(test))
    low, high = wilson(int(hits.sum()), len(hits))
    result = {"deployed_acc": accuracy(hits[:count]), "eval_images": count, "deployed_acc_full": accuracy(hits),
              "test_images": len(hits), "deployed_interval_full": [low, high], "packed_bytes": packed.file_bytes,
              "fp32_bytes": model_bytes(model)}
    log.info(f"{path}: {network['name'] or config.model.source}, {packed.file_bytes:,} bytes for "
             f"{result['fp32_bytes']:,} ({result['fp32_bytes'] / packed.file_bytes:.2f} times smaller); accuracy "
             f"{result['deployed_acc']:.2f} on the first {count} test images, {result['deployed_acc_full']:.2f} "
             f"[{low:.2f}, {high:.2f}] on all {len(hits)}")
    return result


def _device(config: Config, ranks: Ranks = Ranks()) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable GPU; use --device cpu or auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local) if ranks.size > 1 else torch.device("cuda")


def _load_weights(model, config: Config, log: Log) -> None:
    source = config.model.weights
    if source in ("none", "given"):
        return
    if source == "auto":
        source = models.PRETRAINED[config.model.name]
    quick_gelu = {"auto": None, "on": True, "off": False}[config.model.quick_gelu]
    report = models.load_pretrained(model, source, config.model.weights_dir, log.progress, quick_gelu)
    log.info(f"weights: {report.loaded} tensors from {report.source}")
    if report.replaced and config.model.source:
        raise InputError(f"{source} does not fit the network: {', '.join(report.replaced)} of another class count")
    if report.replaced:
        log.info(f"  the classifier starts anew: {', '.join(report.replaced)}")
    for note in report.notes:
        log.note(note)


# ---------------------------------------------------------------------------------------------------------------
# Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hirelc.py", description="Compress a vision network with hierarchical reinforcement "
                     "learning, as in arXiv 2606.26002.")
    parser.add_argument("--exp", type=int, nargs="+", metavar="N", help="experiments of the paper, one after the other")
    parser.add_argument("--model", metavar="SOURCE", help="a network of one's own: module:function or file.py:function")
    parser.add_argument("--load", metavar="FILE", help="only evaluate a packed file on the test images")
    parser.add_argument("--list", action="store_true", help="the experiments with the paper's numbers")
    parser.add_argument("--smoke", action="store_true", help="seconds, not hours: narrow network, synthetic images")
    parser.add_argument("--seed", type=int, help="seed of the run (42)")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--weights", help="auto, none (train from scratch), or a file or URL; with --model "
                        "the weights that the function gives it unless this says otherwise")
    parser.add_argument("--weights-dir", help="folder for downloaded weights")
    parser.add_argument("--out", help="folder that receives the run directories (runs; runs-smoke with --smoke)")
    parser.add_argument("--preset", help="plus: the settings that make the hierarchy win under the same budget")
    parser.add_argument("--name", help="name of a variant, part of the run directory")
    parser.add_argument("--policy", metavar="FILE", help="apply the policy.json of a run instead of searching: "
                        "one cycle of compression and fine-tuning")
    parser.add_argument("--dry-run", action="store_true", help="only check data, weights, disks, memory and device, "
                        "and print the plan with an estimated time")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was broken off; one that is "
                        "finished is left as it is")
    parser.add_argument("--restart", action="store_true", help="begin anew where a run was broken off")
    parser.add_argument("--no-table", action="store_true", help="leave out the results table at the end")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="any setting, for example --set data.image_size=64 lla.timesteps=64; "
                             "an unknown key lists the known ones")
    return parser


FLAGS = {"smoke": "smoke", "seed": "seed", "device": "device", "data_dir": "data.dir", "weights": "model.weights",
         "weights_dir": "model.weights_dir", "out": "out", "name": "name", "policy": "policy", "preset": "preset"}


def list_experiments() -> str:
    """The experiments with the paper's numbers, and where their weights come from."""
    lines = ["exp  network, data                             cycles  epochs  paper: baseline   final    drop    CR"]
    for e in EXPERIMENTS.values():
        lines.append(f"{e.number:3}  {e.title:40}  {e.settings['search.cycles']:6}  {e.settings['finetune.epochs']:6}  "
                     f"{e.paper.baseline:15.2f}  {e.paper.final:6.2f}  {e.paper.drop:6.2f}  {e.paper.cr:4.2f}")
    lines += ["", "published weights (--weights auto)"]
    for name, source in models.PRETRAINED.items():
        check = f", SHA-256 {source.sha256}…" if source.sha256 else ""
        lines.append(f"  {name}: {source.url} (about {source.megabytes} MB{check})")
    return "\n".join(lines)


def main(argv=None, trained: dict | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 3 for a missed goal,
    130 for Ctrl-C. ``trained``: as :class:`HiReLC`."""
    survive_ascii()
    keep_freed_memory()
    try:
        try:
            args, configs = _arguments(argv)
        except InputError as error:
            start("cpu").agree(error)
    except (InputError, Elsewhere) as error:
        return _fail(error, 2)
    if args.list:
        print(list_experiments())
        return 0
    code, done, first = 0, [], not several() or os.environ["RANK"] == "0"
    for config in configs:
        log = Log()
        try:
            with stop_at_once():
                if args.dry_run:
                    print(dry_run(config, args.resume, args.restart))
                elif args.load:
                    evaluate_packed(config, args.load, log)
                else:
                    done.append(run_experiment(config, log, args.resume, args.restart, trained))
        except (InputError, OSError, Elsewhere) as error:
            code = max(code, _fail(error, 2))
        except (FloatingPointError, SaveError, TooLarge) as error:
            code = max(code, _fail(error, 1))
        except (Stopped, KeyboardInterrupt) as error:
            stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
            again = shlex.join(["python", "hirelc.py", *(a for a in argv or sys.argv[1:] if a != "--restart"),
                                *([] if args.resume else ["--resume"])])
            again = "the same command and --resume" if several() else again
            text = str(stopped) if args.load or args.dry_run else f"{stopped}; go on with: {again}"
            return _fail(text if first else Elsewhere(), stopped.code)
        except RuntimeError as error:
            if not lost(error):
                raise
            return _fail("another process of this run has ended; go on with the same command and --resume", 1)
        finally:
            log.close()
    if done and not args.no_table and first:
        print("\n" + results_table(done))
    for result in done:
        if first and result["goal"] and not result["goal"]["met"]:
            code = max(code, _fail(f"goal missed ({', '.join(result['goal']['missed'])}): asked for "
                                   f"{result['goal']['asked']}, the packed file has {result['packed_bytes']:,} bytes, "
                                   f"CR {result['cr']:.2f}, a drop of {result['goal']['deployed_drop']:.2f}", 3))
    return code


def _arguments(argv):
    """(arguments, a Config per run) of the command line."""
    args = _parser().parse_args(argv)
    if several() and (args.dry_run or args.load or args.list):
        raise InputError("--dry-run, --load and --list are for one process; leave out torchrun")
    if args.resume and args.restart:
        raise InputError("--resume goes on with a run, --restart begins it anew; give one of them")
    if args.list:
        return args, []
    if bool(args.exp) == bool(args.model):
        raise InputError("give either --exp N, for example --exp 3 --smoke, or --model FILE.py:FUNCTION, or --list")
    flags = {key: getattr(args, name) for name, key in FLAGS.items() if getattr(args, name) not in (None, False)}
    if args.load and len(args.exp or [0]) > 1:
        raise InputError("--load evaluates one file on one experiment's images; give one --exp")
    if args.policy is not None and (args.load or len(args.exp or [0]) > 1 or not args.policy):
        raise InputError("--policy applies one policy.json to one network; give one --exp, or --model, a file, and "
                         "no --load")
    return args, [resolve(exp, flags, args.set) for exp in args.exp or ()] or [
        resolve_own(args.model, flags, args.set)]


def _fail(error, code: int) -> int:
    """Say why on stderr, unless another process of this run does."""
    sys.stdout.flush()
    if not isinstance(error, Elsewhere):
        print(f"hirelc: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(main())
