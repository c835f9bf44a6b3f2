"""Settings: typed overrides and what they refuse, the flat form, and the experiments against the paper's tables."""

import dataclasses
import json
import os
import sys
import typing

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings  # noqa: E402
from config import EXPERIMENTS, PRESETS, Config, InputError, fields_of, flatten, get, override, read_settings


def changed(*assignments):
    return override(Config(), assignments)


def refused(assignment, *parts):
    """The message with which an assignment (text, or a mapping) is refused; it holds every part."""
    with pytest.raises(InputError) as caught:
        override(Config(), [assignment] if isinstance(assignment, str) else assignment)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize("assignment, key, value", [
    ("seed=7", "seed", 7), (" seed = 7 ", "seed", 7), ("search.cycles=1", "search.cycles", 1),
    ("finetune.lr=1e-3", "finetune.lr", 0.001), ("finetune.lr=2", "finetune.lr", 2.0),
    ("search.target=0.15", "search.target", 0.15), ("scratch.warmup_epochs=0.5", "scratch.warmup_epochs", 0.5),
    ("data.name=synthetic", "data.name", "synthetic"), ("data.dir=/tmp/some where", "data.dir", "/tmp/some where"),
    ("model.weights=https://host/file?a=b", "model.weights", "https://host/file?a=b"),
    ("name=no-hla", "name", "no-hla"), ("name=", "name", ""), ("compress.qtype=any", "compress.qtype", "any"),
    ("lla.algorithms=A2C,A2C,A2C", "lla.algorithms", ("A2C", "A2C", "A2C")),
    ("hla.beta=1, 2.5 ,4", "hla.beta", (1.0, 2.5, 4.0))])
def test_text_becomes_the_fields_type(assignment, key, value):
    got = get(changed(assignment), key)
    assert got == value and type(got) is type(value)
    if isinstance(value, tuple):
        assert [type(v) for v in got] == [type(v) for v in value]


@pytest.mark.parametrize("word, value", [("true", True), ("on", True), ("yes", True), ("1", True), ("True", True),
                                         ("false", False), ("off", False), ("no", False), ("0", False), ("OFF", False)])
def test_words_for_true_and_false(word, value):
    for key in ("surrogate.enabled", "eval.full", "smoke"):
        assert get(changed(f"{key}={word}"), key) is value


@pytest.mark.parametrize("key, value, expected", [
    ("seed", 7, 7), ("seed", 7.0, 7), ("finetune.lr", 1, 1.0), ("surrogate.enabled", False, False),
    ("lla.alpha", [1, 2, 3], (1.0, 2.0, 3.0)), ("lla.algorithms", ("A2C", "PPO", "PPO"), ("A2C", "PPO", "PPO")),
    ("name", "x", "x")])
def test_values_that_are_typed_already(key, value, expected):
    got = get(override(Config(), {key: value}), key)
    assert got == expected and type(got) is type(expected)
    assert get(override(Config(), [(key, value)]), key) == expected


def test_an_override_changes_that_setting_alone():
    before = flatten(Config())
    after = flatten(changed("data.image_size=64"))
    assert {key for key in after if after[key] != before[key]} == {"data.image_size"}
    assert list(after) == list(before)
    assert flatten(Config()) == before  # the settings that were given are left alone
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().data.image_size = 1


def test_later_assignments_win():
    assert changed("seed=1", "seed=2").seed == 2
    assert changed("compress.bits_max=4", "compress.bits_max=6").compress.bits_max == 6


@pytest.mark.parametrize("assignment, key, value", [
    ("search=no-hla", "search.method", "no-hla"), ("search=null", "search.method", "null"),
    ("sensitivity=none", "sensitivity.method", "none"), ("surrogate=off", "surrogate.enabled", False),
    ("data=cifar10", "data.name", "cifar10"), ("model=resnet18", "model.name", "resnet18"),
    ("lla=A2C,A2C,A2C", "lla.algorithms", ("A2C", "A2C", "A2C")), ("finetune=2", "finetune.epochs", 2)])
def test_a_sections_name_stands_for_its_first_field(assignment, key, value):
    result = changed(assignment)
    assert get(result, key) == value
    assert result == changed(f"{key}={','.join(value) if isinstance(value, tuple) else value}")


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("key", ["sed", "data.size", "data.", ".name", "", "Data.name", "data.name.x", "exp.number",
                                 "__class__", "data.__class__", "seed.real", "lla.algorithms.0"])
def test_an_unknown_key_lists_the_known_ones(key):
    message = refused(f"{key}=1", f"unknown setting '{key}", *(fields_of(Config())))
    assert "search.method" in message and "data.image_size" in message


@pytest.mark.parametrize("text", ["seed", "data.image_size 64", ""])
def test_an_assignment_needs_an_equals_sign(text):
    refused(text, "expected key=value")


@pytest.mark.parametrize("assignment, expected", [
    ("seed=1.5", "a whole number"), ("seed=one", "a whole number"), ("seed=", "a whole number"),
    ("seed=1e3", "a whole number"), ("seed=true", "a whole number"), ("seed=0x10", "a whole number"),
    ("finetune.lr=fast", "a number"), ("finetune.lr=", "a number"), ("finetune.lr=nan", "a number"),
    ("finetune.lr=inf", "a number"), ("finetune.lr=1,5", "a number"),
    ("surrogate.enabled=maybe", "true or false"), ("surrogate.enabled=", "true or false"),
    ("surrogate.enabled=2", "true or false"), ("smoke=None", "true or false"),
    ("lla.alpha=1,x,3", "a number"), ("lla.alpha=1,2,", "a number"), ("lla.alpha=", "a number"),
    ("lla.alpha=1;2;3", "a number"), ("hla.beta=1,nan,2", "a number")])
def test_mistyped_text(assignment, expected):
    key, _, value = assignment.partition("=")
    refused(assignment, key, f"expected {expected}")


@pytest.mark.parametrize("key, value", [
    ("seed", True), ("seed", 1.5), ("seed", None), ("seed", [1]), ("seed", float("nan")), ("seed", float("inf")),
    ("finetune.lr", True), ("finetune.lr", None), ("finetune.lr", {}), ("finetune.lr", float("nan")),
    pytest.param("finetune.lr", 10 ** 400, id="finetune.lr-too large for a float"),
    ("surrogate.enabled", None), ("surrogate.enabled", 2), ("surrogate.enabled", 1.0), ("surrogate.enabled", []),
    ("name", 5), ("name", None), ("name", True), ("data.name", ["cifar10"]), ("search", {"cycles": 2}),
    ("lla.alpha", 30.0), ("lla.alpha", None), ("lla.alpha", []), ("lla.alpha", [1, None, 2]), ("lla.alpha", {}),
    ("lla.algorithms", [1, 2, 3]), ("lla.algorithms", 3)])
def test_mistyped_values(key, value):
    refused({key: value}, key)


@pytest.mark.parametrize("key, allowed, forbidden", [
    ("seed", [0, 2 ** 31 - 1000], [-1, 2 ** 31 - 999]), ("exp", [0, 7], [-1]),
    ("data.image_size", [8, 1024], [7, 1025]), ("data.train_images", [0, 5], [-1]), ("data.test_images", [0], [-1]),
    ("data.classes", [2, 1000], [1, 1001]), ("data.batch_size", [1], [0]), ("model.width", [0.01, 4], [0, 4.1, -1]),
    ("model.patch_size", [0, 16], [-1]), ("baseline.epochs", [0], [-1]), ("baseline.patience", [1], [0]),
    ("finetune.epochs", [1, 20], [0]), ("finetune.lr", [0, 0.1], [-1e-9]), ("finetune.patience", [1], [0]),
    ("compress.bits_min", [2, 8], [1, 9]), ("compress.bits_max", [3, 16], [1, 17]),
    ("compress.max_pruning", [0, 0.99], [-0.1, 1.0]), ("search.cycles", [1], [0]),
    ("search.target", [0.01, 1], [0, 1.01]), ("search.max_drop", [0], [-0.5]), ("search.proxy_batches", [1], [0]),
    ("lla.timesteps", [1], [0]), ("lla.episode", [1], [0]), ("lla.envs", [1], [0]), ("hla.burst", [1], [0]),
    ("sensitivity.images", [1], [0]), ("surrogate.warmup", [0, 100], [-1]), ("surrogate.min_samples", [1], [0]),
    ("surrogate.batch_size", [1], [0]), ("eval.images", [1], [0]), ("eval.batch_size", [1], [0])])
def test_ranges_include_their_ends(key, allowed, forbidden):
    for value in allowed:
        assert get(changed(f"{key}={value}"), key) == value
    for value in forbidden:
        refused(f"{key}={value}", f"{key}={value}", "expected")
        refused({key: value}, "expected")


@pytest.mark.parametrize("key, choices", [
    ("data.name", ["cifar10", "cifar100", "tiny-imagenet", "synthetic"]),
    ("model.name", ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224",
                    "vit_base_patch32_clip_224", "resnet18", "resnet50", "mobilenetv2_100"]),
    ("compress.qtype", ["INT", "FLOAT", "any"]),
    ("compress.granularity", ["uniform", "log", "per-channel", "learned", "log-script", "any"]),
    ("search.method", ["hirelc", "no-hla", "null", "uniform", "random", "greedy", "evolution", "sequential"]),
    ("sensitivity.method", ["fisher", "none", "gradient", "snip", "grasp", "hessian"]),
    ("vote", ["uniform", "confidence", "mode"]),
    ("carry", ["none", "rest", "all"]), ("device", ["auto", "cpu", "cuda"])])
def test_choices(key, choices):
    for choice in choices:
        assert get(changed(f"{key}={choice}"), key) == choice
    for wrong in ("", "other", choices[0] + "x", choices[0].swapcase()):
        refused(f"{key}={wrong}", *choices)


def test_there_is_at_least_one_agent():
    for section, names in (("lla", ("alpha", "beta", "gamma_s")), ("hla", ("alpha", "beta", "gamma"))):
        refused({f"{section}.{name}": [] for name in ("algorithms", *names)}, "at least one value")


def test_every_entry_of_a_tuple_is_checked():
    refused("lla.algorithms=PPO,A2C,DQN", "lla.algorithms=DQN", "PPO, A2C")
    refused("hla.algorithms=ppo,A2C,PPO", "hla.algorithms=ppo")
    refused("lla.algorithms=PPO,,PPO", "PPO, A2C")


def test_bits_must_be_a_range():
    refused({"compress.bits_min": 5, "compress.bits_max": 4}, "compress.bits_min=5", "compress.bits_max=4")
    refused("compress.bits_max=2", "compress.bits_min=3", "compress.bits_max=2")
    assert changed("compress.bits_min=4", "compress.bits_max=4").compress.bits_max == 4
    # looked at when all assignments are in, whatever their order
    assert changed("compress.bits_max=2", "compress.bits_min=2").compress.bits_min == 2


@pytest.mark.parametrize("section, names", [("lla", ("alpha", "beta", "gamma_s")), ("hla", ("alpha", "beta", "gamma"))])
def test_weights_are_one_per_agent(section, names):
    for name in names:
        refused(f"{section}.{name}=1,2", f"{section}.{name} has 2 values", f"{section}.algorithms has 3")
    refused(f"{section}.algorithms=PPO", f"{section}.algorithms has 1")
    alone = changed(f"{section}.algorithms=A2C", *(f"{section}.{name}=2" for name in names))
    assert [get(alone, f"{section}.{name}") for name in names] == [(2.0,)] * 3


@pytest.mark.parametrize("name", ["a/b", "../x", "/etc", "..", ".", "a\\b", "x/"])
def test_a_name_cannot_hold_a_path(name):
    refused(f"name={name}", "name=", "path")
    refused({"name": name}, "name=", "path")


def test_a_name_may_hold_dots_and_dashes():
    assert changed("name=no-hla.v1..2").name == "no-hla.v1..2"


@pytest.mark.parametrize("assignment", [
    "seed=__import__('os')", "seed=2+2", "seed=int('3')", "finetune.lr=1/2", "finetune.lr=2**-3", "smoke=1==1",
    "smoke=not False", "lla.alpha=(1,2,3)", "lla.alpha=[1,2,3]", "lla.alpha=1,2,1+2", "lla.algorithms=['PPO']*3",
    "search.method='null'", "search.method=str('null')", "compress.qtype=settings.QTYPES[0]"])
def test_nothing_is_evaluated(assignment):
    refused(assignment, "expected")


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "{0.__class__}", "%(seed)s", "$HOME", "~"])
def test_text_is_taken_as_it_stands(text):
    assert changed(f"data.dir={text}").data.dir == text


# ---------------------------------------------------------------------------------------------------------------
# The fields and their flat form


def test_every_setting_has_a_type_and_a_line_of_help():
    owners = {"": Config, **{f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)
                             if dataclasses.is_dataclass(getattr(Config(), f.name))}}
    for key, item in fields_of(Config()).items():
        section, _, name = key.rpartition(".")
        wanted = typing.get_type_hints(owners[section])[name]
        assert wanted in (int, float, bool, str, tuple[str, ...], tuple[float, ...]), key
        assert item.metadata["help"].strip() and "\n" not in item.metadata["help"], key
        value = get(Config(), key)
        assert type(value) is (typing.get_origin(wanted) or wanted), key


def test_the_defaults_pass_their_own_checks():
    assert override(Config(), flatten(Config())) == Config()


def test_flat_form_by_hand():
    flat = flatten(changed("hla.beta=1,2,3", "search=null"))
    assert flat["seed"] == 42 and flat["data.image_size"] == 224 and flat["search.method"] == "null"
    assert flat["hla.beta"] == [1.0, 2.0, 3.0] and flat["surrogate.enabled"] is True
    assert not any(key in flat for key in ("data", "search", "lla"))


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_flat_form_round_trip_through_json(number):
    config = override(Config(), EXPERIMENTS[number].settings)
    config = override(config, ["lla.beta=0.1,0.2,0.3", "finetune.lr=3.3e-5", "name=a b", "smoke=yes"])
    again = read_settings(json.loads(json.dumps(flatten(config))))[0]
    assert again == config and again != Config()
    assert flatten(again) == flatten(config)


def test_from_flat_refuses_as_an_override_does():
    with pytest.raises(InputError, match="unknown setting 'data.colour'"):
        read_settings({**flatten(Config()), "data.colour": 1})
    with pytest.raises(InputError, match="search.cycles"):
        read_settings({**flatten(Config()), "search.cycles": "many"})
    with pytest.raises(InputError, match="lla.alpha has 1 values"):
        read_settings({**flatten(Config()), "lla.alpha": [1.0]})


# ---------------------------------------------------------------------------------------------------------------
# The experiments

TABLE = {  # model, data, cycles, epochs, type, granularity, surrogate, warm-up; baseline, final, drop, CR
    1: ("deit_small_patch16_224", "cifar100", 4, 15, "INT", "uniform", True, 0, 86.88, 85.16, 1.72, 6.23),
    2: ("vit_base_patch32_clip_224", "cifar100", 4, 15, "INT", "uniform", True, 0, 57.50, 56.95, 0.55, 6.63),
    3: ("vit_base_patch32_clip_224", "cifar10", 1, 20, "INT", "uniform", False, 0, 89.22, 93.05, -3.83, 6.64),
    4: ("resnet18", "tiny-imagenet", 4, 15, "INT", "uniform", True, 100, 75.16, 70.94, 4.22, 5.99),
    5: ("mobilenetv2_100", "tiny-imagenet", 4, 15, "INT", "uniform", True, 100, 76.56, 70.94, 5.62, 6.59),
    6: ("deit_small_patch16_224", "cifar100", 4, 15, "any", "log", False, 0, 87.42, 86.25, 1.17, 6.27),
    7: ("deit_base_patch16_224", "cifar100", 1, 15, "any", "log", False, 0, 90.70, 88.59, 2.11, 6.72),
}


def test_there_are_seven_experiments_and_the_context_of_table_7():
    assert list(EXPERIMENTS) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_the_imagenet_context_against_table_7():
    found = {n: (e.settings["model.name"], e.settings["data.name"], e.settings["lla.timesteps"],
                 e.settings["data.train_images"], e.settings["data.test_images"], e.paper.baseline, e.paper.drop,
                 e.paper.cr) for n, e in EXPERIMENTS.items() if n > 7}
    assert found == {8: ("resnet50", "imagenet", 512, 62_000, 39_000, 74.12, 0.0, 6.32),
                     9: ("deit_small_patch16_224", "imagenet", 512, 125_000, 39_000, 77.18, 2.17, 5.59)}


@pytest.mark.parametrize("number", TABLE)
def test_experiment_against_the_papers_table(number):
    experiment = EXPERIMENTS[number]
    config = override(Config(), experiment.settings)
    paper = experiment.paper
    assert (experiment.number, config.exp) == (number, number) and experiment.title
    keys = ("model.name", "data.name", "search.cycles", "finetune.epochs", "compress.qtype", "compress.granularity",
            "surrogate.enabled", "surrogate.warmup")
    if not config.surrogate.enabled:
        assert config.surrogate.warmup == 0
    assert (*(get(config, key) for key in keys), paper.baseline, paper.final, paper.drop, paper.cr) == TABLE[number]
    assert paper.baseline - paper.final == pytest.approx(paper.drop, abs=0.006)


@pytest.mark.parametrize("number", TABLE)
def test_what_the_experiments_share(number):
    config = override(Config(), EXPERIMENTS[number].settings)
    shared = {"compress.bits_min": 3, "compress.bits_max": 8, "compress.max_pruning": 0.6, "search.target": 0.25,
              "search.max_drop": 1.0, "data.batch_size": 64, "finetune.patience": 3, "seed": 42, "lla.timesteps": 256,
              "hla.timesteps": 256, "hla.burst": 256, "lla.episode": 20, "hla.episode": 10, "lla.envs": 2,
              "lla.algorithms": ("PPO", "A2C", "PPO"), "hla.algorithms": ("PPO", "A2C", "PPO"),
              "lla.alpha": (30.0, 30.0, 30.0), "lla.beta": (1.5, 5.0, 8.0), "lla.gamma_s": (1.0, 1.0, 1.0),
              "hla.alpha": (30.0, 30.0, 30.0), "hla.beta": (6.0, 10.0, 4.0), "hla.gamma": (1.0, 1.0, 1.0),
              "finetune.lr": 5e-5, "finetune.weight_decay": 0.01, "baseline.epochs": 3, "baseline.lr": 1e-4,
              "baseline.weight_decay": 0.01, "baseline.patience": 1, "sensitivity.images": 64,
              "surrogate.min_samples": 3, "surrogate.lr": 1e-3, "surrogate.weight_decay": 1e-4,
              "surrogate.batch_size": 16, "surrogate.epochs": 50, "surrogate.epochs_after_warmup": 100,
              "surrogate.warmup_lr": 1e-4, "search.proxy_batches": 2, "search.method": "hirelc", "vote": "uniform",
              "carry": "none", "sensitivity.method": "fisher", "eval.images": 1280, "eval.full": True,
              "data.image_size": 224, "data.train_images": 0, "data.test_images": 0, "model.weights": "auto",
              "model.width": 1.0, "smoke": False}
    assert {key: get(config, key) for key in shared} == shared


def test_other_numbers_of_the_paper():
    papers = {number: experiment.paper for number, experiment in EXPERIMENTS.items() if number < 8}
    assert [papers[n].compliance for n in papers] == [59.8, 59.2, None, 60.9, 62.4, 58.3, 59.7]
    assert {n: p.cycle_drops for n, p in papers.items() if p.cycle_drops} == {
        1: (3.52, 2.34, 1.72, 2.81), 2: (3.12, 0.55, 0.86, 3.36), 4: (11.72, 5.08, 4.53, 4.22),
        6: (4.77, 1.17, 2.58, 1.48)}
    assert [papers[n].surrogate_mae for n in papers] == [3.57, None, None, 15.20, 10.37, None, None]
    for paper in papers.values():  # the drop of the table is that of the best cycle
        assert not paper.cycle_drops or min(paper.cycle_drops) == paper.drop


def test_accuracies_are_multiples_of_one_in_1280():  # ledger D15
    for experiment in list(EXPERIMENTS.values())[:7]:
        for accuracy in (experiment.paper.baseline, experiment.paper.final):
            assert round(round(accuracy * 12.8) / 12.8, 2) == accuracy


def test_names_of_networks_and_data_sets():
    assert {e.settings["model.name"] for e in EXPERIMENTS.values()} <= set(settings.NETWORKS)
    assert {e.settings["data.name"] for e in EXPERIMENTS.values()} <= set(settings.DATASETS)


def test_a_preset_is_its_settings_and_gives_way_to_later_ones():
    plus = changed("preset=plus")
    assert {key: get(plus, key) for key in PRESETS["plus"]} == PRESETS["plus"]
    assert get(changed("preset=plus", "lla.rounds=2"), "lla.rounds") == 2
    assert changed("preset=none") == Config()
    assert read_settings(flatten(changed("preset=plus", "lla.rounds=2"))) == changed("preset=plus", "lla.rounds=2")


def test_winograd_needs_float32():
    for lower in ("search.dtype=bfloat16", "tf32=true"):
        with pytest.raises(InputError, match=f"search.winograd .*leave out .*{lower}"):
            changed("search.winograd=true", lower)
        assert not changed(lower).search.winograd
    assert changed("search.winograd=true").search.winograd


def test_rounds_need_the_candidates_that_were_tried():
    refused("lla.rounds=2", "lla.choose=visited")
    assert changed("lla.choose=visited", "lla.rounds=2").lla.rounds == 2
    refused("lla.start=greedy", "lla.choose=visited")
