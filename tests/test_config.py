"""Settings: typed overrides and what they refuse, the flat form, and the experiments against the paper's tables."""

import dataclasses
import json

import pytest

import config as settings
from config import EXPERIMENTS, PRESETS, Config, InputError, flatten, get, override, read_settings


def changed(*assignments):
    return override(Config(), assignments)


def refused(assignment, *parts):
    """Assert that an assignment (text, a pair, or a mapping) is refused in one line that holds every part."""
    with pytest.raises(InputError) as caught:
        override(Config(), assignment if isinstance(assignment, dict) else [assignment])
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message, message


@pytest.mark.parametrize("assignment, key, value", [
    ("seed=7", "seed", 7), (" seed = 7 ", "seed", 7), ("finetune.lr=1e-3", "finetune.lr", 0.001),
    ("finetune.lr=2", "finetune.lr", 2.0), ("data.dir=/tmp/some where", "data.dir", "/tmp/some where"),
    ("data.dir=__import__('os').getcwd()", "data.dir", "__import__('os').getcwd()"),  # text stays as it stands
    ("model.weights=https://host/file?a=b", "model.weights", "https://host/file?a=b"),
    ("name=no-hla.v1..2", "name", "no-hla.v1..2"), ("name=", "name", ""),
    ("lla.algorithms=A2C,A2C,A2C", "lla.algorithms", ("A2C", "A2C", "A2C")),
    ("hla.beta=1, 2.5 ,4", "hla.beta", (1.0, 2.5, 4.0)),
    *((f"smoke={word}", "smoke", True) for word in ("true", "on", "yes", "1", "True")),
    *((f"eval.full={word}", "eval.full", False) for word in ("false", "off", "no", "0", "OFF")),
    # a section's name stands for its first field
    ("search=no-hla", "search.method", "no-hla"), ("sensitivity=none", "sensitivity.method", "none"),
    ("surrogate=off", "surrogate.enabled", False), ("lla=A2C,A2C,A2C", "lla.algorithms", ("A2C", "A2C", "A2C")),
    # values that are typed already
    (("seed", 7.0), "seed", 7), (("finetune.lr", 1), "finetune.lr", 1.0), (("smoke", False), "smoke", False),
    (("lla.alpha", [1, 2, 3]), "lla.alpha", (1.0, 2.0, 3.0))])
def test_text_becomes_the_fields_type(assignment, key, value):
    got = get(changed(assignment), key)
    assert got == value and type(got) is type(value)
    assert not isinstance(value, tuple) or [type(v) for v in got] == [type(v) for v in value]


def test_an_override_changes_that_setting_alone():
    before, after = flatten(Config()), flatten(changed("data.image_size=64"))
    assert {key for key in after if after[key] != before[key]} == {"data.image_size"} and flatten(Config()) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().data.image_size = 1


@pytest.mark.parametrize("key, near", [
    ("sed", "seed"), ("data.imagesize", "data.image_size"), ("cycles", "search.cycles"), ("Data.name", "data.name"),
    ("data.size", "data.image_size"), ("lla.algorithms.0", "lla.algorithms"), ("finetune.learning_rate", ""),
    *((key, "") for key in ("data.", "", "__class__", "data.__class__", "seed.real"))])
def test_an_unknown_key_names_the_nearest(key, near):
    with pytest.raises(InputError, match=f"^unknown setting '{key}.*did you mean .*{near}.*[?]$") as caught:
        changed(f"{key}=1")
    assert len(str(caught.value)) < 200  # four names at most


def test_a_key_that_is_gone_says_so_and_old_files_name_them():
    for key in sorted(settings.RETIRED):
        refused(f"{key}=1", f"'{key}' is gone", "docs/RESULTS.md")
    refused("vote=mode", "vote=mode", "uniform, confidence")
    old = {**flatten(changed("seed=7", "search.cycles=2")), "lla.rounds": 2, "vote": "mode", "search.dtype": "float32"}
    assert read_settings(old) == (changed("seed=7", "search.cycles=2"), ("vote", "lla.rounds", "search.dtype"))
    assert read_settings({"search.method": "plus"}) == (Config(), ("search.method",))
    assert read_settings({"carry": "all"}) == (Config(), ("carry",)) and read_settings({"vote": "confidence"})[1] == ()


@pytest.mark.parametrize("assignment, expected", [
    *((text, "expected key=value") for text in ("seed", "data.image_size 64", "")),
    *((f"seed={text}", "a whole number") for text in ("1.5", "one", "", "1e3", "true", "2+2", "__import__('os')")),
    *((f"finetune.lr={text}", "a number") for text in ("fast", "", "nan", "inf", "1,5", "1/2")),
    *((f"smoke={text}", "true or false") for text in ("maybe", "", "2", "None", "not False")),
    *((f"lla.alpha={text}", "a number") for text in ("1,x,3", "1,2,", "", "1;2;3", "(1,2,3)", "1,nan,2")),
    ("lla.algorithms=PPO,A2C,DQN", "lla.algorithms=DQN"), ("lla.algorithms=PPO,,PPO", "PPO, A2C"),
    ("search.method='null'", "hirelc, no-hla, null, uniform"),
    *((f"vote={text}", "uniform, confidence") for text in ("", "other", "uniformx", "UNIFORM")),
    *((("seed", value), "seed=") for value in (True, 1.5, None, [1], float("nan"), float("inf"))),
    *((("finetune.lr", value), "finetune.lr=") for value in (True, None, {}, float("nan"))),
    *((("smoke", value), "true or false") for value in (None, 2, 1.0, [])), (("name", 5), "text"),
    *((("lla.alpha", value), "lla.alpha") for value in (30.0, None, [], [1, None, 2], {})),
    (("search", {"cycles": 2}), "search"), pytest.param(("finetune.lr", 10 ** 400), "a number", id="too large")])
def test_mistyped(assignment, expected):
    refused(assignment, assignment.partition("=")[0] if isinstance(assignment, str) else assignment[0], expected)


@pytest.mark.parametrize("key, allowed, forbidden", [
    ("seed", [0, 2 ** 31 - 1000], [-1, 2 ** 31 - 999]), ("data.image_size", [8, 1024], [7, 1025]),
    ("data.train_images", [0, 5], [-1]), ("data.batch_size", [1], [0]), ("model.width", [0.01, 4], [0, 4.1, -1]),
    ("baseline.epochs", [0], [-1]), ("baseline.patience", [1], [0]), ("finetune.epochs", [1, 20], [0]),
    ("finetune.lr", [0, 0.1], [-1e-9]), ("compress.bits_min", [2, 8], [1, 9]), ("compress.bits_max", [3, 16], [1, 17]),
    ("compress.max_pruning", [0, 0.99], [-0.1, 1.0]), ("search.target", [0.01, 1], [0, 1.01]),
    ("search.max_drop", [0], [-0.5]), ("search.cycles", [1], [0]), ("surrogate.warmup", [0, 100], [-1])])
def test_ranges_include_their_ends(key, allowed, forbidden):
    for value in allowed:
        assert get(changed(f"{key}={value}"), key) == value
    for value in forbidden:
        refused(f"{key}={value}", f"{key}={value}", "expected")
        refused({key: value}, "expected")


def test_conditions_between_settings():
    refused({"compress.bits_min": 5, "compress.bits_max": 4}, "compress.bits_min=5", "compress.bits_max=4")
    # looked at when all assignments are in, whatever their order
    assert changed("compress.bits_max=2", "compress.bits_min=2").compress.bits_min == 2
    for section, names in (("lla", ("alpha", "beta", "gamma_s")), ("hla", ("alpha", "beta", "gamma"))):
        for name in names:
            refused(f"{section}.{name}=1,2", f"{section}.{name} has 2 values", f"{section}.algorithms has 3")
        refused(f"{section}.algorithms=PPO", f"{section}.algorithms has 1")
        alone = changed(f"{section}.algorithms=A2C", *(f"{section}.{name}=2" for name in names))
        assert [get(alone, f"{section}.{name}") for name in names] == [(2.0,)] * 3
    refused("policy_sha256=00", "--policy")
    for name in ("a/b", "../x", "/etc", "..", ".", "a\\b", "x/", "a\nb"):
        refused(f"name={name}", "name=", "path")


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_flat_form_round_trip_through_json(number):
    config = override(override(Config(), EXPERIMENTS[number].settings),
                      ["lla.beta=0.1,0.2,0.3", "finetune.lr=3.3e-5", "name=a b", "smoke=yes"])
    flat = json.loads(json.dumps(flatten(config)))
    assert flat["lla.beta"] == [0.1, 0.2, 0.3] and flat["smoke"] is True and "lla" not in flat
    assert read_settings(flat) == (config, ()) and config != Config()
    for spoilt, said in (({**flat, "data.colour": 1}, "unknown setting 'data.colour'"), ([1], "dictionary"),
                         ({**flat, "lla.alpha": [1.0]}, "lla.alpha has 1 values")):
        with pytest.raises(InputError, match=said):
            read_settings(spoilt)


def test_a_preset_is_its_settings_and_gives_way_to_later_ones():
    plus = changed("preset=plus")
    assert {key: get(plus, key) for key in PRESETS["plus"]} == PRESETS["plus"]
    assert plus.search.method == "table" and plus.finetune.distill == 1 and plus.finetune.mode == "qat"
    assert changed("preset=plus", "finetune.mode=paper").finetune.mode == "paper" and changed("preset=none") == Config()
    assert read_settings(flatten(changed("preset=plus", "search=null")))[0] == changed("preset=plus", "search=null")
    more = "lla.alpha=30", "lla.beta=5", "lla.gamma_s=1"  # one agent, which is whole only with the last
    assert changed("lla.algorithms=PPO", "preset=plus", *more) == changed("preset=plus", "lla.algorithms=PPO", *more)


TABLE = {  # model, data, cycles, epochs, type, granularity, surrogate, warm-up; baseline, final, drop, CR, compliance
    1: ("deit_small_patch16_224", "cifar100", 4, 15, "INT", "uniform", True, 0, 86.88, 85.16, 1.72, 6.23, 59.8),
    2: ("vit_base_patch32_clip_224", "cifar100", 4, 15, "INT", "uniform", True, 0, 57.50, 56.95, 0.55, 6.63, 59.2),
    3: ("vit_base_patch32_clip_224", "cifar10", 1, 20, "INT", "uniform", False, 0, 89.22, 93.05, -3.83, 6.64, None),
    4: ("resnet18", "tiny-imagenet", 4, 15, "INT", "uniform", True, 100, 75.16, 70.94, 4.22, 5.99, 60.9),
    5: ("mobilenetv2_100", "tiny-imagenet", 4, 15, "INT", "uniform", True, 100, 76.56, 70.94, 5.62, 6.59, 62.4),
    6: ("deit_small_patch16_224", "cifar100", 4, 15, "any", "log", False, 0, 87.42, 86.25, 1.17, 6.27, 58.3),
    7: ("deit_base_patch16_224", "cifar100", 1, 15, "any", "log", False, 0, 90.70, 88.59, 2.11, 6.72, 59.7)}
SHARED = {
    "compress.bits_min": 3, "compress.bits_max": 8, "compress.max_pruning": 0.6, "search.target": 0.25, "seed": 42,
    "search.max_drop": 1.0, "data.batch_size": 64, "lla.timesteps": 256, "hla.timesteps": 256, "hla.burst": 256,
    "lla.episode": 20, "hla.episode": 10, "lla.envs": 2, "lla.algorithms": ("PPO", "A2C", "PPO"),
    "hla.algorithms": ("PPO", "A2C", "PPO"), "lla.alpha": (30.0,) * 3, "lla.beta": (1.5, 5.0, 8.0),
    "lla.gamma_s": (1.0,) * 3, "hla.alpha": (30.0,) * 3, "hla.beta": (6.0, 10.0, 4.0), "hla.gamma": (1.0,) * 3,
    "finetune.lr": 5e-5, "finetune.weight_decay": 0.01, "finetune.patience": 3, "baseline.epochs": 3,
    "baseline.lr": 1e-4, "baseline.weight_decay": 0.01, "baseline.patience": 1, "sensitivity.images": 64,
    "surrogate.min_samples": 3, "surrogate.lr": 1e-3, "surrogate.weight_decay": 1e-4, "surrogate.batch_size": 16,
    "surrogate.epochs": 50, "surrogate.epochs_after_warmup": 100, "surrogate.warmup_lr": 1e-4,
    "search.proxy_batches": 2, "search.method": "hirelc", "vote": "uniform", "carry": "none",
    "sensitivity.method": "fisher", "eval.images": 1280, "eval.full": True, "data.image_size": 224,
    "data.train_images": 0, "data.test_images": 0, "model.weights": "auto", "model.width": 1.0, "smoke": False}


@pytest.mark.parametrize("number", TABLE)
def test_experiment_against_the_papers_table(number):
    config, paper = override(Config(), EXPERIMENTS[number].settings), EXPERIMENTS[number].paper
    keys = ("model.name", "data.name", "search.cycles", "finetune.epochs", "compress.qtype", "compress.granularity",
            "surrogate.enabled", "surrogate.warmup")
    assert (*(get(config, key) for key in keys), paper.baseline, paper.final, paper.drop, paper.cr,
            paper.compliance) == TABLE[number]
    assert (EXPERIMENTS[number].number, config.exp) == (number, number) and EXPERIMENTS[number].title
    assert paper.baseline - paper.final == pytest.approx(paper.drop, abs=0.006)
    assert {key: get(config, key) for key in SHARED} == SHARED
    for acc in (paper.baseline, paper.final):  # ledger D15: multiples of one in 1,280
        assert round(round(acc * 12.8) / 12.8, 2) == acc


def test_the_imagenet_context_and_other_numbers_of_the_paper():
    keys = "model.name", "data.name", "lla.timesteps", "data.train_images", "data.test_images", "eval.images"
    assert {n: (*(e.settings[key] for key in keys), e.paper.baseline, e.paper.drop, e.paper.cr)
            for n, e in EXPERIMENTS.items() if n not in TABLE} == {
        8: ("resnet50", "imagenet", 512, 62_000, 39_000, 39_000, 74.12, 0.0, 6.32),
        9: ("deit_small_patch16_224", "imagenet", 512, 125_000, 39_000, 39_000, 77.18, 2.17, 5.59)}
    assert {n: e.paper.cycle_drops for n, e in EXPERIMENTS.items() if e.paper.cycle_drops} == {
        1: (3.52, 2.34, 1.72, 2.81), 2: (3.12, 0.55, 0.86, 3.36), 4: (11.72, 5.08, 4.53, 4.22),
        6: (4.77, 1.17, 2.58, 1.48)}
    for e in EXPERIMENTS.values():  # the drop of the table is that of the best cycle
        assert not e.paper.cycle_drops or min(e.paper.cycle_drops) == e.paper.drop
    assert [e.paper.surrogate_mae for e in EXPERIMENTS.values()] == [3.57, None, None, 15.20, 10.37, *[None] * 4]
