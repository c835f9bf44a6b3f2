"""Settings of a run, the paper's experiments, and the numbers that the paper reports for them.

Every number of the method that a user may change is a field here, typed and checked by :func:`override`. Constants are
those of the paper (§4, Appendix B) and, where it leaves them out, of the authors' scripts; docs/LEDGER.md says where
these disagree.
"""

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line: what, where, how to mend it."""


def setting(default, help, choices=None, low=None, high=None):
    """A dataclass field with its help text and, where given, the allowed values or an inclusive range."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


DATASETS = ("cifar10", "cifar100", "tiny-imagenet", "imagenet", "folder", "synthetic")
NETWORKS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "vit_base_patch32_clip_224",
            "resnet18", "resnet50", "mobilenetv2_100")
ALGORITHMS = ("PPO", "A2C")
LEVELS = 15  # resolution of the bit and keep actions (§3.1.3)
BASELINES = ("uniform", "random", "greedy", "evolution", "sequential", "table")


@dataclass(frozen=True)
class Data:
    name: str = setting("cifar100", "data set", choices=DATASETS)
    dir: str = setting("data", "folder that holds (or receives) the data sets; --data-dir")
    image_size: int = setting(224, "side in pixels after the resize", low=8, high=1024)
    train_images: int = setting(0, "number of training images, a fixed pseudo-random subset; 0 = all", low=0)
    test_images: int = setting(0, "number of test images, the first of the test order; 0 = all", low=0)
    normalize: str = setting("dataset", "mean and std of the data set, the published weights or ImageNet, or none",
                             choices=("dataset", "pretrained", "imagenet", "none"))
    skip_corrupt: bool = setting(False, "leave out images that cannot be read, counted in the log and result.json")
    cache: bool = setting(True, "keep decoded images in a memory-mapped file beside the data")
    workers: int = setting(-1, "processes that stream images from disk; -1 = one per core, 0 = none", low=-1)
    classes: int = setting(10, "number of classes of the synthetic set", low=2, high=1000)
    batch_size: int = setting(64, "images per training batch", low=1)


@dataclass(frozen=True)
class Model:
    name: str = setting("deit_small_patch16_224", "network", choices=NETWORKS)
    source: str = setting("", "module:function or file.py:function that makes a network of one's own; --model")
    weights: str = setting("auto", "auto = published weights, none = train from scratch, or a file or URL; --weights")
    weights_dir: str = setting("weights", "folder for downloaded weights")
    quick_gelu: str = setting("auto", "QuickGELU in a ViT; auto = as the weights say", choices=("auto", "on", "off"))
    width: float = setting(1.0, "factor on the number of channels; blocks and kernels stay", low=0.01, high=4.0)
    patch_size: int = setting(0, "side of a ViT's patches in pixels; 0 = the network's own", low=0)


@dataclass(frozen=True)
class Scratch:
    epochs: int = setting(30, "epochs of training from scratch with --weights none", low=1)
    lr: float = setting(1e-3, "AdamW learning rate", low=0.0)
    weight_decay: float = setting(0.05, "AdamW weight decay", low=0.0)
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up, then a cosine to 0 by steps; 0: by epochs", low=0.0)


@dataclass(frozen=True)
class Baseline:
    epochs: int = setting(3, "epochs of fine-tuning before compression; its best epoch is theta_0", low=0)
    lr: float = setting(1e-4, "AdamW learning rate", low=0.0)
    weight_decay: float = setting(0.01, "AdamW weight decay", low=0.0)
    patience: int = setting(1, "epochs without a better accuracy before it stops", low=1)


@dataclass(frozen=True)
class Finetune:
    epochs: int = setting(15, "epoch limit after each compression", low=1)
    lr: float = setting(5e-5, "AdamW learning rate", low=0.0)
    weight_decay: float = setting(0.01, "AdamW weight decay", low=0.0)
    patience: int = setting(3, "epochs without a better accuracy before it stops", low=1)
    warmup_epochs: float = setting(0.0, "as scratch.warmup_epochs", low=0.0)
    mode: str = setting("paper", "paper: kernels move as FP32 numbers (ledger D14); qat: training on the grid",
                        choices=("paper", "qat"))
    distill: float = setting(0.0, "weight of the distillation from theta_0 beside the cross-entropy's 1", low=0.0)
    keep: str = setting("best", "epoch kept: the most accurate, or the last (no patience)", choices=("best", "last"))
    temperature: float = setting(4.0, "temperature of the distillation", low=0.1)
    bn_images: int = setting(2048, "training images, at most, to estimate BatchNorm on; 0 or 1: none", low=0)


@dataclass(frozen=True)
class Pack:
    rest: str = setting("float32", "precision of what is not a compressed kernel", choices=("float32", "float16"))


@dataclass(frozen=True)
class Compress:
    bits_min: int = setting(3, "b_min", low=2, high=8)
    bits_max: int = setting(8, "b_max", low=2, high=16)
    max_pruning: float = setting(0.6, "largest fraction of a kernel's channels that may go", low=0.0, high=0.99)
    qtype: str = setting("INT", "numeric type; any = the agents choose", choices=("INT", "FLOAT", "any"))
    granularity: str = setting("uniform", "any = the agents choose, of the first four",
                               choices=("uniform", "log", "per-channel", "learned", "log-script", "fitted", "any"))
    scope: str = setting("paper", "all: also patch embedding, shortcut projections, last convolution, classifier",
                         choices=("paper", "all"))


@dataclass(frozen=True)
class Search:
    method: str = setting("hirelc", "hirelc: the agents; no-hla: with uniform budgets; null: uniform draws; the rest "
                          "replace the agents and meet search.target",
                          choices=("hirelc", "no-hla", "null", *BASELINES))
    cycles: int = setting(4, "C, number of cycles", low=1)
    target: float = setting(0.25, "rho_target, retained fraction to reach", low=0.01, high=1.0)
    max_drop: float = setting(1.0, "delta_max, allowed accuracy drop in points", low=0.0)
    estimate: str = setting("proxy", "of drops; table = of every kernel measured alone", choices=("proxy", "table"))
    proxy_batches: int = setting(2, "calibration batches (of data.batch_size) of the logit-MSE proxy", low=1)


@dataclass(frozen=True)
class LLA:
    algorithms: tuple[str, ...] = setting(("PPO", "A2C", "PPO"), "one policy per entry", choices=ALGORITHMS)
    timesteps: int = setting(256, "environment steps per block, agent and cycle", low=0)
    episode: int = setting(20, "steps of an episode", low=1)
    envs: int = setting(2, "environments per agent", low=1)
    alpha: tuple[float, ...] = setting((30.0, 30.0, 30.0), "weight of R_acc, per agent")
    beta: tuple[float, ...] = setting((1.5, 5.0, 8.0), "weight of R_comp, per agent")
    gamma_s: tuple[float, ...] = setting((1.0, 1.0, 1.0), "weight of R_stab, per agent")
    standardize: bool = setting(False, "rewards of a rollout minus their mean, divided by their standard deviation")


@dataclass(frozen=True)
class HLA:
    algorithms: tuple[str, ...] = setting(("PPO", "A2C", "PPO"), "one policy per entry", choices=ALGORITHMS)
    timesteps: int = setting(256, "environment steps before cycle 1", low=1)
    burst: int = setting(256, "environment steps before each later cycle", low=1)
    episode: int = setting(10, "steps of an episode", low=1)
    alpha: tuple[float, ...] = setting((30.0, 30.0, 30.0), "scales R_sens + R_dyn by alpha/30, per agent")
    beta: tuple[float, ...] = setting((6.0, 10.0, 4.0), "scales R_glob by beta/6, per agent")
    gamma: tuple[float, ...] = setting((1.0, 1.0, 1.0), "scales R_bal by gamma/1, per agent")


@dataclass(frozen=True)
class Sensitivity:
    method: str = setting("fisher", "s_i by Eq. 15 or another measure; none: s_i = 0.5 everywhere, P_sens = 0",
                          choices=("fisher", "none", "gradient", "snip", "grasp", "hessian"))
    images: int = setting(64, "calibration images", low=1)


@dataclass(frozen=True)
class Surrogate:
    enabled: bool = setting(True, "whether an MLP replaces the proxy from min_samples on; off without agents")
    warmup: int = setting(0, "random configurations measured before cycle 1", low=0)
    min_samples: int = setting(3, "N_min, measured configurations before the MLP is used", low=1)
    warmup_lr: float = setting(1e-4, "AdamW learning rate of the warm-up's one epoch", low=0.0)
    epochs: int = setting(50, "MLP training epochs at the end of each cycle", low=1)
    epochs_after_warmup: int = setting(100, "MLP training epochs after the warm-up", low=1)
    lr: float = setting(1e-3, "Adam learning rate of the MLP", low=0.0)
    weight_decay: float = setting(1e-4, "Adam weight decay of the MLP", low=0.0)
    batch_size: int = setting(16, "samples per minibatch of the MLP", low=1)


@dataclass(frozen=True)
class Eval:
    protocol: str = setting("paper", "what chooses epoch and cycle: the first test images (ledger D15), or 5 % of "
                            "the training images, which are then not trained on", choices=("paper", "holdout"))
    images: int = setting(1280, "first test images that choose epoch and cycle, and that the paper scores", low=1)
    batch_size: int = setting(256, "images per evaluation batch", low=1)
    full: bool = setting(True, "score the whole test split too, once per reported network")


@dataclass(frozen=True)
class Config:
    preset: str = setting("none", "settings that go together (config.PRESETS); --preset", choices=("none", "plus"))
    exp: int = setting(0, "number of the experiment, 0 for a network of one's own", low=0)
    name: str = setting("", "name of a variant, part of the run directory; --name")
    smoke: bool = setting(False, "narrow network, synthetic images, small budgets; --smoke")
    seed: int = setting(42, "seed of the run; --seed", low=0, high=2**31 - 1000)
    device: str = setting("auto", "auto, cpu or cuda; --device", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "of training; auto = bfloat16 on a GPU", choices=("auto", "float32", "bfloat16"))
    tf32: bool = setting(False, "on a GPU: float32 matrix products and convolutions with the ten mantissa bits of TF32")
    threads: int = setting(0, "CPU threads; 0 = as many as torch takes by itself", low=0, high=1024)
    out: str = setting("runs", "folder that receives the run directories; --out")
    vote: str = setting("uniform", "LLA vote by Eq. 16 or Eq. 17", choices=("uniform", "confidence"))
    carry: str = setting("none", "rest: all but the kernels goes on from the last cycle (ledger D12)",
                         choices=("none", "rest"))
    enforce_target: bool = setting(False, "after the vote, move bits and keep to at most 1 % below search.target")
    goal: str = setting("", "what to reach, for example size:1.5MB,drop:1 or cr:8; sets target and max_drop")
    policy: str = setting("", "policy.json of a run, applied in one cycle instead of searching; --policy")
    policy_sha256: str = setting("", "SHA-256 that the policy must have; filled in by the run")
    relax: bool = setting(False, "where the goal's drop is missed, give the most sensitive blocks back until it holds")
    data: Data = Data()
    model: Model = Model()
    scratch: Scratch = Scratch()
    baseline: Baseline = Baseline()
    finetune: Finetune = Finetune()
    compress: Compress = Compress()
    pack: Pack = Pack()
    search: Search = Search()
    lla: LLA = LLA()
    hla: HLA = HLA()
    sensitivity: Sensitivity = Sensitivity()
    surrogate: Surrogate = Surrogate()
    eval: Eval = Eval()


PRESETS = {
    "none": {},
    "plus": {"search.method": "table", "search.cycles": 1, "surrogate.enabled": False, "compress.scope": "all",
             "compress.bits_min": 2, "compress.granularity": "fitted", "finetune.mode": "qat", "finetune.distill": 1.0,
             "finetune.keep": "last", "pack.rest": "float16"},
}
# Settings of older versions. They were measured and did not help, or changed no result (docs/RESULTS.md).
RETIRED = frozenset((
    "lla.reward", "lla.project", "lla.choose", "lla.start", "lla.rounds", "lla.refine", "lla.gamma", "lla.rollout",
    "lla.lr_factor", "hla.tiers", "finetune.scales", "search.around", "search.cache", "search.cache_mb", "search.dtype",
    "search.fold", "search.winograd", "search.together"))
GONE = (("vote", "mode"), ("carry", "all"), ("search.method", "plus"))  # values


def fields_of(config) -> dict[str, dataclasses.Field]:
    """Every settable key ('seed', 'data.image_size', …) → its dataclass field, in declaration order."""
    found = {}
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        found |= {f"{item.name}.{part.name}": part for part in dataclasses.fields(section)} \
            if dataclasses.is_dataclass(section) else {item.name: item}
    return found


def flatten(config) -> dict[str, object]:
    """Settings as one flat dictionary of plain values (tuples become lists), ready for JSON."""
    values = {key: get(config, key) for key in fields_of(config)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def get(config, key: str):
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def override(config: Config, assignments) -> Config:
    """Apply settings in order and check the result. ``assignments``: strings ``key=value`` as on the command line, or a
    mapping key → value. A section's first field may be set by the section's name alone: ``search=no-hla`` is
    ``search.method=no-hla``. ``preset`` sets what PRESETS lists, which later assignments may change again.
    Raises InputError for an unknown key (naming the nearest known ones), a wrong type, or a value out of range.
    """
    known, todo = fields_of(config), [*(assignments.items() if hasattr(assignments, "items") else assignments)]
    while todo:
        item = todo.pop(0)
        if isinstance(item, str):
            key, equals, value = item.partition("=")
            if not equals:
                raise InputError(f"--set {item}: expected key=value, for example --set data.image_size=64")
        else:
            key, value = item
        key = key.strip()
        if key not in known and dataclasses.is_dataclass(getattr(config, key, None)):
            key = f"{key}.{dataclasses.fields(getattr(config, key))[0].name}"
        if key not in known:
            raise InputError(_unknown(key, known))
        config = _replace(config, key, _typed(key, known[key], value))
        if key == "preset":
            todo = [*PRESETS[config.preset].items(), *todo]
    _check_together(config)
    return config


def read_settings(values) -> tuple[Config, tuple[str, ...]]:
    """Return the settings in a config.json's flat dictionary, and the names of those among them that are gone.

    A value that a setting no longer has (GONE) counts as gone. Raises InputError as :func:`override` does.
    """
    if not isinstance(values, dict):
        raise InputError(f"settings are a dictionary, not a {type(values).__name__}")
    gone = [key for key in values if key in RETIRED or (key, values[key]) in GONE]
    return override(Config(), {key: value for key, value in values.items() if key not in gone}), tuple(gone)


def _unknown(key: str, known) -> str:
    if key in RETIRED:
        return f"setting '{key}' is gone: what it was measured to bring is in docs/RESULTS.md; leave it out"
    word = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == word] + difflib.get_close_matches(key, known, 3)
    near = list(dict.fromkeys(near))[:4] or ["one of those listed in docs/GUIDE.md"]
    return f"unknown setting '{key}'; did you mean {' or '.join(near)}?"


def _replace(config, key, value):
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def _typed(key, item, value):
    """``value`` (text or already typed) as the field's type, checked against its choices or range. The types are
    objects because this module does not import annotations from __future__."""
    if typing.get_origin(item.type) is not tuple:
        return _scalar(key, item.type, value, item.metadata)
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts:
        raise InputError(f"{key}={value}: expected values separated by commas")
    return tuple(_scalar(key, typing.get_args(item.type)[0], part, item.metadata) for part in parts)


def _scalar(key, wanted, value, limits):
    try:
        if isinstance(value, bool) and wanted is not bool:
            raise TypeError
        result = _READERS[wanted](value.strip() if isinstance(value, str) else value)
        if wanted is float and not math.isfinite(result) or wanted is int and result != float(value):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
        name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[wanted]
        raise InputError(f"{key}={value}: expected {name} ({limits['help']})") from None
    choices, low, high = limits["choices"], limits["low"], limits["high"]
    if choices and result not in choices:
        raise InputError(f"{key}={result}: expected one of {', '.join(choices)}")
    if low is not None and result < low or high is not None and result > high:
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{key}={result}: expected {bounds} ({limits['help']})")
    return result


_TRUTH = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
_READERS = {bool: lambda value: _TRUTH[str(value).lower()], int: int, float: float, str: str.strip}


def _check_together(config):
    """Conditions between settings."""
    bits = config.compress
    if bits.bits_min > bits.bits_max:
        raise InputError(f"compress.bits_min={bits.bits_min} is above compress.bits_max={bits.bits_max}")
    for section, names in (("lla", ("alpha", "beta", "gamma_s")), ("hla", ("alpha", "beta", "gamma"))):
        agents = len(getattr(config, section).algorithms)
        for name in names:
            if (count := len(getattr(getattr(config, section), name))) != agents:
                raise InputError(f"{section}.{name} has {count} values, {section}.algorithms has {agents}: "
                                 "give one per agent")
    if config.policy_sha256 and not config.policy:
        raise InputError("policy_sha256 is of a policy, and there is none; give it with --policy FILE")
    if any(sign in config.name for sign in "/\\") or config.name in (".", "..") or not config.name.isprintable():
        raise InputError(f"name={config.name!r}: becomes part of a folder's name and cannot hold a path or line breaks")


# The paper's experiments (§4) and what it reports for them (§5, Tables 2 and 4)

@dataclass(frozen=True)
class Paper:
    """Numbers that the paper prints: accuracies and drops in percentage points, compliance in percent."""
    baseline: float
    final: float
    drop: float
    cr: float
    compliance: float | None = None
    cycle_drops: tuple[float, ...] = ()
    surrogate_mae: float | None = None


@dataclass(frozen=True)
class Experiment:
    number: int
    title: str
    settings: dict
    paper: Paper


def _experiment(number, title, network, data, cycles, epochs, paper, more=()):
    return Experiment(number, title, {"exp": number, "model.name": network, "data.name": data, "search.cycles": cycles,
                                      "finetune.epochs": epochs, **dict(more)}, paper)


_LOG = {"compress.qtype": "any", "compress.granularity": "log", "surrogate.enabled": False}
_IMAGENET = {"lla.timesteps": 512, "data.test_images": 39_000, "eval.images": 39_000}
EXPERIMENTS: dict[int, Experiment] = {e.number: e for e in (
    _experiment(1, "DeiT-Small, CIFAR-100", "deit_small_patch16_224", "cifar100", 4, 15,
                Paper(86.88, 85.16, 1.72, 6.23, 59.8, (3.52, 2.34, 1.72, 2.81), 3.57)),
    _experiment(2, "CLIP ViT-B/32, CIFAR-100", "vit_base_patch32_clip_224", "cifar100", 4, 15,
                Paper(57.50, 56.95, 0.55, 6.63, 59.2, (3.12, 0.55, 0.86, 3.36))),
    _experiment(3, "CLIP ViT-B/32, CIFAR-10", "vit_base_patch32_clip_224", "cifar10", 1, 20,
                Paper(89.22, 93.05, -3.83, 6.64), {"surrogate.enabled": False}),
    _experiment(4, "ResNet18, Tiny ImageNet", "resnet18", "tiny-imagenet", 4, 15,
                Paper(75.16, 70.94, 4.22, 5.99, 60.9, (11.72, 5.08, 4.53, 4.22), 15.20), {"surrogate.warmup": 100}),
    _experiment(5, "MobileNetV2, Tiny ImageNet", "mobilenetv2_100", "tiny-imagenet", 4, 15,
                Paper(76.56, 70.94, 5.62, 6.59, 62.4, (), 10.37), {"surrogate.warmup": 100}),
    _experiment(6, "DeiT-Small, CIFAR-100, mixed types, log", "deit_small_patch16_224", "cifar100", 4, 15,
                Paper(87.42, 86.25, 1.17, 6.27, 58.3, (4.77, 1.17, 2.58, 1.48)), _LOG),
    _experiment(7, "DeiT-Base, CIFAR-100, mixed types, log", "deit_base_patch16_224", "cifar100", 1, 15,
                Paper(90.70, 88.59, 2.11, 6.72, 59.7), _LOG),
    # The ImageNet-1K context of Table 7 (the paper does not say how often it cycles; as Exp. 1).
    _experiment(8, "ResNet50, ImageNet-1K subset", "resnet50", "imagenet", 4, 15, Paper(74.12, 74.12, 0.00, 6.32),
                {**_IMAGENET, "data.train_images": 62_000}),
    _experiment(9, "DeiT-Small, ImageNet-1K subset", "deit_small_patch16_224", "imagenet", 4, 15,
                Paper(77.18, 75.01, 2.17, 5.59), {**_IMAGENET, "data.train_images": 125_000}),
)}
