"""HiReLC: hierarchical reinforcement learning for pruning and quantisation (arXiv 2606.26002).

:func:`algorithm_1` is the paper's loop: one call per step, in the paper's order. :class:`Run` holds what the steps work
on. The rest of this file prepares one of the paper's experiments (``python hirelc.py --exp 3``) or a network of the
user's (``python hirelc.py --model net.py:make``).
"""

from __future__ import annotations

from support import cli  # first: it answers --help and --list, and refuses bad arguments, before torch is imported

import contextlib
import dataclasses
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import data
import models
from compress import (BlockConfig, Grid, KernelConfig, KernelShape, LayerBudget, NetworkConfig, compress_network,
                      kernel_shapes, model_bytes, set_state, snap_to_grid)
from config import BASELINES, EXPERIMENTS, Config, InputError, override
from deploy import checks, pack, policies
from deploy.batchnorm import estimate_batchnorm
from deploy.cycle import Best, Cycle, measure
from deploy.qat import repair
from deploy.target import Demands, parse_goal, resolved
from estimate import DropEstimator, Proxy, Surrogate
from evidence import baselines, plan, sensitivities, summary
from evidence.given import GivenBlock, GivenBudgets, policy_for
from evidence.null import NullHLA, NullLLA
from evidence.report import results_table
from evidence.table import Entries, relative_drops, tabulated
from search import TIER_MIN_BITS, Found, HLAEnsemble, LLAEnsemble, UniformBudgets, derive_seed, random_config
from support import networks, runs
from support.files import replace_file, survive_ascii
from support.log import Log
from support.own import copy_network
from support.ranks import Elsewhere, Ranks, leave, lost, several, start
from train import Epoch, Recipe, Trainer, accuracy, correct, fisher_sensitivity


@dataclass
class Outcome:
    """What Algorithm 1 ends with, and what it did on the way."""
    theta0: dict  # state dict
    baseline: dict  # accuracies of theta_0 and of the network as given, in points
    sensitivity: list[float]
    demands: Demands
    surrogate: Surrogate
    carried: dict  # state dict that a cycle begins with, besides the kernels (ledger D12)
    best: Best = field(default_factory=Best)
    rows: list[Cycle] = field(default_factory=list)
    updates: list[dict] = field(default_factory=list)  # diagnostics of every gradient update of the agents
    searches: list[dict] = field(default_factory=list)
    budgets: list[dict] = field(default_factory=list)  # per cycle
    failed_samples: int = 0  # of the warm-up, whose training diverged
    bad_rewards: int = 0
    table: dict | None = None  # how far the table of estimates is from the proxy


STORED = [KernelConfig, KernelShape, BlockConfig, NetworkConfig, LayerBudget, Grid, Epoch, Found, Cycle, Entries]


def algorithm_1(run: Run) -> Outcome:
    """Compress a network (§3.7): return the best cycle and what led to it.

    Each ``once`` is a phase: a resumed run takes over what the phases before returned and repeats the one that was
    broken off (``support.runs.Phases``). The numbers are those of the paper's steps.
    """
    c, once, cycles = run.config, run.phases.once, run.config.search.cycles
    # before the first cycle: theta_0, the sensitivities, the estimate of drops, the agents
    once("scratch: training", run.train_from_scratch, network=run.model)
    baseline = once("baseline: training", run.train_baseline, network=run.model)
    theta0 = run.weights()
    sensitivity = once("sensitivity: blocks", run.estimate_sensitivity)
    surrogate = Surrogate(5 * sum(map(len, run.shapes)), c.surrogate, derive_seed(c.seed, "surrogate"))
    demands = run.demands(theta0, sensitivity, baseline["acc"])
    problem = baselines.make_problem(run.blocks, sensitivity, c, demands.allowance(run.shapes))
    proxy = Proxy(run.model, run.blocks, run.calibration_batches(), relative_drops(c))
    estimator = DropEstimator(proxy if run.given else tabulated(proxy, problem, c, once), surrogate, baseline["acc"])
    hla, lla = choose_search(run, sensitivity, estimator, problem)
    out = Outcome(theta0, baseline, sensitivity, demands, surrogate, carried=theta0,
                  rows=[Cycle(0, baseline["acc"], 0.0, baseline["acc"], baseline["acc"])])
    warm_up(run, out)
    train_hla(run, hla, c.hla.timesteps, out)

    for cycle in range(1, cycles + 1):
        # 1. tell the high-level agents what the last cycle measured
        hla.feedback(out.rows[-1].drop, out.rows[-1].retained, cycle)
        # 2. train them on
        if cycle > 1:
            train_hla(run, hla, c.hla.burst, out)
        # 3. a budget for every block
        budgets = once(f"hla: budgets of cycle {cycle}", lambda: run.ranks.same(hla.budgets(cycle == cycles)), hla=hla)
        # 4, 5. train each block's low-level agents under its budget, and vote
        voted = NetworkConfig(tuple(found.config for found in search_blocks(run, lla, budgets, cycle, out)))
        # past the paper: a size that is to be met; by itself what was voted
        chosen = once(f"target: cycle {cycle}", lambda: out.demands.chosen(voted))
        out.table = estimator.settle(chosen)
        # 6, 7. prune and quantise theta_0, fine-tune, measure
        row = compress_and_finetune(run, cycle, chosen, voted, budgets, out)
        # 8. add the pair to the buffer and train the surrogate
        once(f"surrogate: cycle {cycle}", lambda: teach(run, surrogate, chosen, row.acc), surrogate=surrogate)
        # 9. the best cycle so far is in out.best

    # past the paper: where a goal's drop is missed, blocks are given back
    while (chosen := once(f"relax: cycle {len(out.rows)}", lambda: out.demands.relaxed(
            out.best.row, out.best.config, len(out.rows) - 1 - cycles))) is not None:
        compress_and_finetune(run, len(out.rows), chosen, chosen, out.best.budgets, out, relaxed=True)
    return out


def choose_search(run: Run, sensitivity, estimator, problem):
    """Return the high-level agents, and the low-level agents of every block."""
    c, method = run.config, run.config.search.method
    params = [sum(shape.params for shape in block) for block in run.shapes]
    if run.given:
        return GivenBudgets(run.given[1]), [GivenBlock(block) for block in run.given[0].blocks]
    if method in BASELINES:
        return UniformBudgets(params, sensitivity, c), baselines.joint_blocks(problem, estimator, c, run.log.note)
    high, low = {"hirelc": (HLAEnsemble, LLAEnsemble), "no-hla": (UniformBudgets, LLAEnsemble),
                 "null": (NullHLA, NullLLA)}[method]
    if method != "no-hla" and c.compress.bits_max < max(TIER_MIN_BITS):
        run.log.note(f"budgets that ask for more bits than compress.bits_max={c.compress.bits_max} are cut to it")
    pairs = enumerate(zip(run.blocks, sensitivity))
    return high(params, sensitivity, c), [low(i, block, s, estimator, c, len(run.blocks)) for i, (block, s) in pairs]


class Run:
    """One compression of one trained network: what the steps of Algorithm 1 work on, and the steps.

    model: nn.Module on its device, mapping [n, C, H, W] to logits; it is changed in place. survey: its kernels and
    blocks. train, test: sets of images as ``data.Images``. network: what the packed file says of it. given:
    (NetworkConfig, budgets) in place of the search. save(outcome): called after every cycle.
    """

    def __init__(self, model, survey, train, test, config: Config, log: Log, network=None, ranks: Ranks = Ranks(),
                 given=None, phases=None, save=lambda outcome: None):
        self.model, self.survey, self.blocks, self.given = model, survey, survey.blocks, given
        self.train_set, self.test_set, self.choice_set = train, test, test  # choice_set chooses epoch and cycle
        if config.eval.protocol == "holdout":
            self.train_set, self.choice_set = data.hold_out(train)
            log.info(f"holdout: {len(self.choice_set)} of {len(train)} training images choose epoch and cycle")
        self.log, self.network, self.ranks, self.save = log, network or {}, ranks, save
        self.phases = phases or runs.Phases(log=log)
        self.device = next(model.parameters()).device
        self.shapes = [kernel_shapes(block) for block in self.blocks]
        self.config = resolved(config, sum(s.params for block in self.shapes for s in block), model_bytes(model))
        self.demands(self.weights(), [], 0.0).check_sizes(self.shapes)  # before any work: sizes are known already
        left = len(self.train_set) % config.data.batch_size
        if 0 < left < min(2 * ranks.size, len(self.train_set)):
            log.note(f"{left} of the training images, other ones in each epoch, are left out (BatchNorm)")
        if config.model.source:
            checks.check_use(model, self.train_set, test, self.blocks, self.config, log)

    @property
    def eval_images(self) -> int:
        """Number of images that choose epoch and cycle (ledger D15)."""
        most = self.config.eval.images if self.config.eval.protocol == "paper" else len(self.choice_set)
        return min(most, len(self.choice_set))

    @property
    def half(self) -> bool:
        """Whether training steps compute in bfloat16."""
        return self.config.precision == "bfloat16" or self.config.precision == "auto" and self.device.type == "cuda"

    def weights(self) -> dict:
        """Return a copy of the network's state dict."""
        return {key: value.detach().clone() for key, value in self.model.state_dict().items()}

    def score(self) -> float:
        """Return the network's accuracy on the images that choose epoch and cycle, in points."""
        return accuracy(correct(self.model, self.choice_set, self.config.eval.batch_size, self.eval_images,
                                ranks=self.ranks))

    def generator(self, *phase) -> torch.Generator:
        """Return a generator of a phase's own, derived from the run's seed."""
        return torch.Generator().manual_seed(derive_seed(self.config.seed, *phase))

    def trainer(self, phase: str, recipe: Recipe, **more) -> Trainer:
        """Return a training of the network as it stands."""
        c = self.config
        return Trainer(self.model, self.train_set, self.choice_set, recipe, batch_size=c.data.batch_size,
                       eval_images=self.eval_images, eval_batch_size=c.eval.batch_size, generator=self.generator(phase),
                       blocks=self.blocks, ranks=self.ranks, unused_parameters=bool(c.model.source),
                       half=self.half, **more)

    def finetuner(self, phase: str, chosen: NetworkConfig, masks: dict, theta0: dict) -> Trainer:
        """Return the fine-tuning of the compressed network (§3.5)."""
        f = self.config.finetune
        recipe = Recipe("finetune.lr", f.epochs, f.lr, f.weight_decay, f.patience, f.warmup_epochs, f.keep)
        return self.trainer(phase, recipe, **repair(self.model, self.blocks, chosen, masks, theta0, f, self.half))

    def train(self, what: str, trainer: Trainer) -> Epoch:
        """Run a training, which goes on from its last saved epoch; return its best epoch."""
        return trainer.run(self.log.progress, what, self.log.info, self.phases)

    def train_from_scratch(self) -> None:
        """Train on the experiment's own data where there are no weights."""
        if self.config.model.weights == "none":
            recipe = Recipe("scratch.lr", **dataclasses.asdict(self.config.scratch))
            best = self.train("from scratch", self.trainer("scratch", recipe))
            self.log.info(f"trained from scratch: {recipe.epochs} epochs, accuracy {best.acc:.2f} (epoch {best.epoch})")

    def train_baseline(self) -> dict:
        """Fine-tune to theta_0 (§3.1.1); return accuracies in points: ``given_acc`` before, ``acc`` after."""
        recipe, before = self.config.baseline, None
        if recipe.epochs:
            before = self.score() if self.config.model.weights == "given" else None
            self.train("baseline", self.trainer("baseline", Recipe("baseline.lr", **dataclasses.asdict(recipe))))
        self.ranks.same_tensors(self.model.state_dict().values())
        acc = self.score()
        self.log.info(f"baseline accuracy {acc:.2f} on {self.eval_images} "
                      f"{'test' if self.choice_set is self.test_set else 'held-out'} images")
        return {"acc": acc, "given_acc": acc if before is None and self.config.model.weights == "given" else before}

    def estimate_batchnorm(self) -> bool:
        """Estimate BatchNorm's statistics again; return whether there were any, and images for them."""
        c = self.config
        return estimate_batchnorm(self.model, self.train_set, c.data.batch_size, c.finetune.bn_images,
                                  self.generator("batchnorm"))

    def demands(self, theta0: dict, sensitivity, baseline_acc: float) -> Demands:
        """Return what a goal, an enforced target or relaxing adds to the loop."""
        def file_bytes(chosen: NetworkConfig) -> int:
            masks = compress_network(self.blocks, chosen)
            grids = snap_to_grid(self.blocks, chosen, masks)
            size = len(pack.pack(self.model, self.blocks, chosen, masks, grids, self.network, self.config.pack.rest))
            set_state(self.model, theta0)
            return size

        return Demands(self.config, self.blocks, sensitivity, baseline_acc, file_bytes, self.log)

    def estimate_sensitivity(self) -> list[float]:
        """Return s_i of every block on calibration images from the training set (Eq. 14-15, or another measure)."""
        c = self.config.sensitivity
        if c.method == "none":
            values = [0.5] * len(self.blocks)
        else:
            order = torch.randperm(len(self.train_set), generator=self.generator("sensitivity"))[:c.images]
            if len(order) < c.images:
                self.log.note(f"the sensitivities have {len(order)} images, not {c.images}: the training set is small")
            images, labels = self.train_set.batch(order, self.device)
            values = fisher_sensitivity(self.model, self.blocks, images, labels) if c.method == "fisher" else \
                sensitivities.sensitivity(c.method, self.model, self.blocks, images, labels,
                                          self.generator("sensitivity", "vectors"))
            if len(values) > 1 and set(values) == {1.0}:
                self.log.note("no block has any sensitivity, since the loss is flat: all have 1")
        self.log.info("sensitivity " + " ".join(f"{s:.3f}" for s in values))
        return self.ranks.same(values)

    def calibration_batches(self) -> list[torch.Tensor]:
        """Return the proxy's training batches, drawn and augmented once per run."""
        size, wanted = self.config.data.batch_size, self.config.search.proxy_batches
        batches = [images for images, _ in self.train_set.batches(
            size, self.device, generator=self.generator("proxy"), limit=wanted * size)]
        if len(batches) < wanted:
            self.log.note(f"the proxy has {len(batches)} calibration batches, not {wanted}: the training set is small")
        return batches


# The steps


def warm_up(run: Run, out: Outcome) -> None:
    """Fill the surrogate's buffer with random configurations, each fine-tuned for one epoch and measured (§3.6)."""
    s, surrogate = run.config.surrogate, out.surrogate
    if run.given or not (s.enabled and s.warmup):
        return
    rng = np.random.default_rng(derive_seed(run.config.seed, "warmup"))
    for n in range(s.warmup):
        run.log.progress("surrogate warm-up", n, s.warmup)
        sample = random_config(run.shapes, run.config.compress, rng)

        def measured() -> float | None:
            set_state(run.model, out.theta0)
            recipe = Recipe("surrogate.warmup_lr", 1, s.warmup_lr, run.config.finetune.weight_decay)
            masks = compress_network(run.blocks, sample)
            try:
                return run.train(f"warm-up sample {n + 1}", run.trainer(f"warmup {n}", recipe, masks=masks)).acc
            except FloatingPointError as error:
                run.log.note(f"{error}; the sample is left out")

        acc = run.phases.once(f"warmup: sample {n + 1}", measured)
        if acc is None:
            out.failed_samples += 1
            continue
        surrogate.add(sample, acc)
        run.log.info(f"  warm-up {n + 1}/{s.warmup}: CR {sample.cr:.2f}, accuracy {acc:.2f}")
    loss = run.phases.once("surrogate: warm-up", lambda: surrogate.train(s.epochs_after_warmup), surrogate=surrogate)
    run.log.info(f"surrogate: {len(surrogate.buffer)} samples, " + (
        "too few to train on yet" if math.isnan(loss) else f"root of the training loss {math.sqrt(loss):.2f} points"))


def train_hla(run: Run, hla, timesteps: int, out: Outcome) -> None:
    """Train the high-level agents under the last feedback (§3.7 step 2)."""
    cycle = len(out.rows)
    before, updates, after = run.phases.once(
        f"hla: training, cycle {cycle}", lambda: (hla.entropy(), hla.train(timesteps), hla.entropy()), hla=hla)
    out.updates += [{"cycle": cycle, **update} for update in updates]
    if before is not None:
        out.searches.append({"level": "HLA", "cycle": cycle, "entropy": [before, after]})


def search_blocks(run: Run, lla, budgets, cycle: int, out: Outcome) -> list[Found]:
    """Search every block under its budget, with theta_0 in the network (§3.7 steps 4 and 5).

    Blocks are independent of one another, so that several processes divide them, a wave of one block each at a time.
    """
    set_state(run.model, out.theta0)
    # a baseline searches all blocks at once: every process does the same
    found, ranks = {}, Ranks() if run.config.search.method in BASELINES else run.ranks
    for wave in ranks.waves(len(run.blocks)):
        run.log.progress(f"cycle {cycle}, search", len(found), len(run.blocks))

        def search_wave():
            mine = [(i, lla[i].search(budgets[i]), lla[i].state_dict()) for i in wave[ranks.rank:ranks.rank + 1]]
            searched = sum(ranks.gather(mine), [])
            for i, _, state in searched if ranks.size > 1 else ():
                lla[i].load_state_dict(state)
            return {i: result for i, result, _ in searched}

        name = f"search: cycle {cycle}, block {' '.join(map(str, wave))}"
        found |= run.phases.once(name, search_wave, **{f"block{i}": lla[i] for i in wave})
    out.budgets.append({"cycle": cycle, "blocks": [
        {"name": block.name, "strategy": b.strategy, "target": b.target} for block, b in zip(run.blocks, budgets)]})
    for i, (block, budget) in enumerate(zip(run.blocks, budgets)):
        config = found[i].config
        out.updates += [{"cycle": cycle, **update} for update in found[i].updates]
        out.bad_rewards += found[i].bad_rewards
        run.log.info(f"  cycle {cycle}, block {block.name}: {budget.strategy}, target {budget.target:.3f}, retained "
                     f"{config.retained:.3f}, bits {config.average_bits:.2f}, keep {config.average_keep:.3f}")
    out.searches.append(summary.search_row(cycle, list(found.values()), run.log.note))
    return [found[i] for i in range(len(run.blocks))]


def compress_and_finetune(run: Run, cycle: int, chosen: NetworkConfig, voted: NetworkConfig, budgets, out: Outcome,
                          relaxed: bool = False) -> Cycle:
    """Apply T(theta_0, C), fine-tune under the masks, pack and measure (§3.7 steps 6, 7 and 9); return the row.

    With ``carry=rest`` everything but the kernels goes on from the last cycle (ledger D12).
    """
    kernels = {key for block in run.blocks for key in block.state_names}
    set_state(run.model, {key: out.theta0[key] if key in kernels else value for key, value in out.carried.items()})
    masks = compress_network(run.blocks, chosen)
    tuned = run.phases.once(f"finetune: cycle {cycle}", lambda: finetune(run, cycle, chosen, masks, out.theta0),
                            tuned=run.model)
    network = run.weights()
    if run.config.carry == "rest":
        out.carried = network

    def deploy() -> Cycle:
        new = Best(None, chosen, budgets, masks, tuned["grids"], network)
        new.row = measure(run, cycle, tuned, voted, new, out)
        if relaxed or out.best.row is None or out.demands.key(new.row) > out.demands.key(out.best.row):
            out.best.load_state_dict(new.state_dict())
        return new.row

    row = run.phases.once(f"deploy: cycle {cycle}", deploy, best=out.best)
    out.rows.append(row)
    run.save(out)
    return row


def finetune(run: Run, cycle: int, chosen: NetworkConfig, masks: dict, theta0: dict) -> dict:
    """Fine-tune the compressed network, leave it at its best epoch; return what was measured."""
    before, trainer = run.score(), run.finetuner(f"finetune {cycle}", chosen, masks, theta0)
    return {"before": before, "best": run.train(f"cycle {cycle}, fine-tuning", trainer),
            "epochs": len(trainer.history), "grids": trainer.best_grids}


def teach(run: Run, surrogate: Surrogate, chosen: NetworkConfig, acc: float) -> None:
    """Add a measured pair to the surrogate's buffer and train the MLP once it is active (§3.7 step 8)."""
    if run.config.surrogate.enabled and not run.given:
        surrogate.add(chosen, acc)
        surrogate.train(run.config.surrogate.epochs)


# A user's network


@checks.generators()
def compress_model(model, train, test, *, exclude=(), groups=None, log=None, packed=None, policy=None, run_dir=None,
                   **settings):
    """Compress a network of your own: any nn.Module that maps a batch of images to logits [n, classes].

    train, test: a Dataset, a DataLoader, a pair of tensors (:func:`data.as_images`), or an object with ``len()``,
    ``batch`` and ``batches`` as :class:`data.Images`. Kernels and blocks are found by what a forward pass of eight
    training images does. exclude: names of kernels or modules, or patterns with ``*``, to leave out; groups: lists of
    kernel names that are the blocks. log: a :class:`support.log.Log`; without one it prints. packed: path of the
    packed file to write, with which ``deploy.pack.load(path, model=…)`` fills a network of the class. policy: one that
    this function returned, or the path of a policy.json; it is applied in one cycle without a search. run_dir: folder
    in which the state is kept; the same call goes on from it after Ctrl-C or worse. settings: those of config.Config,
    with ``__`` for the dot, for example ``search__cycles=1``.

    Returns (network, policy, result): the network of the packed file in eval mode on the given one's device, the other
    two as policy.json and, but for what is said of files, result.json hold them. The given network is left untouched,
    whatever happens, and so are the random generators, torch's threads and TF32 switches. Raises InputError for
    settings, images, a network or a path that cannot be used, FloatingPointError where training diverges, SaveError or
    OSError where run_dir or packed cannot be written.
    """
    settings = checks.check_settings(settings)
    # The network is trained already: nothing is trained from scratch, nor before the compression unless asked for.
    base = {"model.source": type(model).__name__, "model.weights": "given", "baseline.epochs": 0}
    config = override(override(Config(), base), settings)
    checks.check_given(model)
    if packed is not None:
        packed = checks.check_writable(packed, run_dir)
    policy, config = policies.given(policy, config)
    log, device, home = log or Log(), networks.device_for(config), next(model.parameters(), torch.empty(0)).device
    log.notes = []  # the result has those of this call
    train, test = data.as_images(train, "training images"), data.as_images(test, "test images")
    state = Path(run_dir).expanduser() / "state" if run_dir is not None else None
    identity = runs.identity(config) | checks.fingerprint(model, (train, test), (exclude, groups)) if state else {}
    phases = runs.Phases(state, identity, STORED, log=log)
    with (networks.switches(config), runs.locked(state.parent) if state else contextlib.nullcontext(),
          checks.protected(model)):
        phases.begin(phases.exists)
        test = checks.fair_order(test, config.eval, log)
        network, survey = networks.prepare(copy_network(model).to(device), train, test, log, config, exclude, groups)
        run = Run(network, survey, train, test, config, log, pack.describe(network, config, train),
                  given=policy_for(policy, survey.blocks, config, log), phases=phases)
        out = algorithm_1(run)
        result = summary.summarise(run, out, copy_network(model)) | {"data": "given", "timings": run.phases.seconds}
        result["policy_source"] = policy and policy.source
        network = pack.load(out.best.packed, network)
        network.zero_grad()
        if packed is not None:
            replace_file(packed, out.best.packed)
    return network.to(home), policies.to_policy(run.blocks, out.best.config, out.best.budgets), result


# One experiment and its run directory


def run_experiment(config: Config, log: Log | None = None, resume: bool = False, restart: bool = False) -> dict:
    """Run one experiment, or one network of the user's, in its run directory; return what result.json holds.

    A finished run is left as it is. ``resume``: go on with a run that was broken off; ``restart``: begin anew. Raises
    InputError before anything is written when settings, data, weights, device or folder cannot be used.
    """
    ranks = start(config.device)
    log = (log or Log()) if ranks.first else Log(open(os.devnull, "w"))
    path = runs.run_directory(config)
    with contextlib.ExitStack() as stack:
        with ranks.alike():
            policy, config = policies.given(config.policy or None, config)
            parse_goal(config.goal)
            networks.check(config, ranks)
            device = networks.device_for(config, ranks)
            if ranks.first:
                runs.check_directory(path, config)
                stack.enter_context(runs.locked(path))
        phases = runs.Phases(path / "state", runs.identity(config), STORED, ranks, log)
        with ranks.alike():
            finished = runs.finished(path) if ranks.first and not restart else None
            if ranks.first and not finished and phases.exists and not (resume or restart):
                raise InputError(f"{path}: holds a run that was broken off; --resume goes on with it, --restart begins "
                                 "anew")
        finished, resume = ranks.same((finished, resume and phases.exists))
        if finished:
            log.info(f"{path}: finished already, with the images as they were then; --restart begins anew")
            return finished
        stack.enter_context(networks.switches(config))
        return _run_experiment(config, log, ranks, device, path, phases, policy, resume)


def _run_experiment(config, log, ranks, device, path, phases, policy, resume) -> dict:
    what = EXPERIMENTS[config.exp].title if config.exp else config.model.source
    log.info(f"{what}{' (smoke)' * config.smoke}, seed {config.seed}, on {device}, processes: {ranks.size}")
    with ranks.in_turn():  # downloads and builds caches
        splits = data.load(config.data, log.progress, models.PRETRAINED_STATS[config.model.name])
    for note in splits.notes:
        log.note(note)
    log.info(f"{config.data.name}: {len(splits.train)} training and {len(splits.test)} test images, "
             f"{splits.num_classes} classes, {config.data.image_size} px")
    model, survey = networks.make(config, splits, device, ranks, log, checks.check_given)
    with ranks.alike():
        run = Run(model, survey, splits.train, splits.test, config, log,
                  pack.describe(model, config, splits.train), ranks, policy_for(policy, survey.blocks, config, log),
                  phases, save=lambda out: ranks.first and out.best.packed and summary.save(path, out, runs.write))
        phases.identity |= checks.fingerprint(model, (splits.train, splits.test), ())  # also of what its file imports
        if ranks.first:
            runs.open_directory(path, config, run, resume)
        phases.begin(resume)
    out = algorithm_1(run)
    result = summary.summarise(run, out) | {"policy_source": policy and policy.source, "skipped_images": splits.skipped}
    if ranks.first:
        summary.finish(path, run, out, result, runs.write)
    return result


def dry_run(config: Config) -> str:
    """Return what :func:`run_experiment` would do, as text; nothing is written. Raises InputError where that would."""
    networks.check(config, Ranks())
    (policy, config), silent = policies.given(config.policy or None, config), Log(open(os.devnull, "w"))
    return plan.plan(config, runs.check_directory(runs.run_directory(config), config), lambda model, survey, *sets: Run(
        model, survey, *sets, config, silent, given=policy_for(policy, survey.blocks, config, silent)))


def main(argv=None) -> int:
    """Run the command line; return the exit code: 0, 1 for a run that failed, 2 for bad input, 3 for a missed goal, 130
    or 143 where it was stopped."""
    survive_ascii()
    runs.keep_freed_memory()
    try:
        try:
            args, configs = cli.arguments(argv)
        except InputError as error:
            start("cpu").agree(error)
    except (InputError, Elsewhere) as error:
        return cli.fail(error, 2)
    if args.list:
        print(cli.list_experiments())
        return 0
    code, done = 0, []
    for config in configs:
        log = Log()
        try:
            with runs.stop_at_once():
                if args.dry_run:
                    print(dry_run(config))
                elif args.load:
                    summary.evaluate_packed(config, args.load, log, networks.device_for(config))
                else:
                    done.append(run_experiment(config, log, args.resume, args.restart))
        except (InputError, OSError, Elsewhere) as error:
            code = max(code, cli.fail(error, 2))
        except (FloatingPointError, runs.SaveError, torch.OutOfMemoryError) as error:
            code = max(code, cli.fail(error, 1))
        except (runs.Stopped, KeyboardInterrupt) as error:
            stopped = error if isinstance(error, runs.Stopped) else runs.Stopped(signal.SIGINT)
            how = "" if args.load or args.dry_run else "; go on with the same command and --resume"
            return cli.fail(f"{stopped}{how}", stopped.code)
        except RuntimeError as error:
            if not lost(error):
                raise
            return cli.fail("another process of this run has ended; go on with the same command and --resume", 1)
        finally:
            log.close()
    first = not several() or os.environ["RANK"] == "0"
    if done and not args.no_table and first:
        Log().info("\n" + results_table(done))
    missed = [result for result in done if first and result["goal"] and not result["goal"]["met"]]
    for result in missed:
        code = max(code, cli.fail(summary.missed(result["goal"], result["cr"]), 3))
    return code


if __name__ == "__main__":
    leave(main())
