"""A user's network: from a file with imports of its own, tried, copied, compressed; every figure is counted anew."""

import json
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import hirelc
import models
import rl
from config import Config, InputError
from deploy import policies
from estimate import Proxy
from networks import Attend, Caching, Flattening, Shared, fingerprint, pictures, same, silent, strided, tied
from support.own import copy_network, ours_by_name, own_network, try_network
from test_estimate import alike, by_copy
from train import accuracy

TINY = {"search__cycles": 1, "lla__timesteps": 4, "hla__timesteps": 4, "baseline__epochs": 0, "finetune__epochs": 1,
        "finetune__lr": 1e-3, "sensitivity__images": 2, "search__proxy_batches": 1, "data__batch_size": 16,
        "device": "cpu"}
QUIET = silent()


def test_channels_last_only_where_it_runs():
    images = pictures()[0][:2]
    assert try_network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
                       images) == (3, True)
    assert try_network(Flattening(), images) == (3, False)

    class Two(nn.Linear):
        def forward(self, x):
            y = super().forward(x.flatten(1))
            return (y, x) if self.training else y
    with pytest.raises(InputError, match="tuple .*train mode"):
        try_network(Two(768, 3), images)


def test_copies_share_nothing_even_with_an_old_weight_norm():
    model, images = Flattening(), pictures()[0]
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.c)
    model(images)
    copied = copy_network(model)
    assert torch.equal(copied(images), model(images))
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}


FILE = """
import sys, torch
sys.path.insert(0, __file__[:-8] + "src")
import models
def make(): return torch.nn.Linear(models.N, 2)
def sized(num_classes, width=3): return torch.nn.Linear(width, num_classes)
def needs(depth): pass
def number(): return 3
def fails(): raise ValueError("no\\nluck")
"""


def test_a_network_from_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(FILE)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "models.py").write_text("N = 7\n")
    (tmp_path / "broken.py").write_text("def make(:\n")
    assert own_network(f"{tmp_path}/mynet.py:make", 5).weight.shape == (2, 7)
    assert own_network(f"{tmp_path}/mynet.py:sized", 5).weight.shape == (5, 3)
    monkeypatch.chdir(tmp_path)
    assert own_network("mynet:sized", 4).weight.shape == (4, 3)
    for source, message in (
            ("mynet.py:nothing", "has no function 'nothing'"), ("mynet.py:needs", "missing 1 required positional"),
            ("mynet.py:number", "returned a int, expected a torch"), ("mynet.py:fails", "ValueError: no luck"),
            ("no_such_module:make", "No module named"), ("gone.py:make", "No such file"),
            ("broken.py:make", "SyntaxError"), ("mynet", "expected module:function or path/to/file.py:function")):
        with pytest.raises(InputError, match=message) as error:
            own_network(source, 3)
        assert "\n" not in str(error.value)


NEIGHBOURS = {
    "net.py": """
import os, torch
from models import MobileNetV2
from support.extra import BIAS
def make(num_classes):
    import config, helper, rl
    return MobileNetV2(config.WIDTH + helper.MORE, num_classes, BIAS)
def late():
    import data
torch.set_grad_enabled(False), os.chdir(os.sep)
""",
    "models.py": "import config\nfrom torch import nn\nclass MobileNetV2(nn.Linear):\n  def forward(self, x):\n"
                 "    import config, helper\n    return super().forward(x) + helper.MORE + config.WIDTH\n",
    "config.py": "WIDTH = {width}\n", "helper.py": "MORE = {width}\n", "support/extra.py": "BIAS = {width} == 4\n",
    "data.py": "raise OSError('imported by the function only')\n"}


def test_a_files_imports_are_its_neighbours_and_ours_stay_ours(tmp_path, monkeypatch):
    first, second, here = tmp_path / "a", tmp_path / "b", Path.cwd()
    for folder, width in ((first, 3), (second, 4)):
        (folder / "support").mkdir(parents=True)
        for name, text in NEIGHBOURS.items():
            (folder / name).write_text(text.format(width=width))
    one, two = own_network(f"{first}/net.py:make", 5), own_network(f"{second}/net.py:make", 5)
    assert one.weight.shape == (5, 6) and two.weight.shape == (5, 8)
    assert torch.is_grad_enabled() and Path.cwd() == here
    assert one.bias is None and two.bias is not None
    assert torch.equal(two(torch.zeros(1, 8))[0], two.bias + (4 + 4))  # imports in the forward
    assert sys.modules["rl"] is rl  # there is no other file of the name
    with ours_by_name():
        assert pickle.loads(pickle.dumps(Config())) == Config()
    with pytest.raises(InputError, match="OSError: imported by the function only"):
        own_network(f"{first}/net.py:late", 5)
    for folder, width in ((second, 4), (first, 3)):
        monkeypatch.chdir(folder)
        assert own_network("net:make", 5).weight.shape == (5, 2 * width)


def check_figures(given, compressed, policy, result, classifiers):
    """CR, coverage, counts and the compressed tensors, counted from the policy and the networks alone."""
    tensors, original = dict(compressed.named_parameters()), dict(given.named_parameters())
    chosen = {kernel["name"]: kernel for block in policy["blocks"] for kernel in block["kernels"]}
    assert list(chosen) == list(result["kernels"]) and not set(result["excluded"]) & set(chosen)
    stored = total = 0
    for name, kernel in chosen.items():
        key = name if name in tensors else f"{name}.weight"
        weight = tensors[key]
        zero = int((weight.detach().flatten(1) == 0).all(dim=1).sum())
        kept = max(1, math.floor(kernel["keep"] * len(weight) + 1e-9))
        assert zero == len(weight) - kept == len(weight) - kernel["channels_kept"], name
        assert weight.shape == original[key].shape
        total += weight.numel()
        stored += weight.numel() * kernel["bits"] / 32 * kept / len(weight)
    assert result["cr"] == pytest.approx(total / stored) and 4 <= result["cr"] <= 26.67
    count = result["accounting"]
    size = sum(t.numel() * t.element_size() for t in (*given.parameters(), *given.buffers()))
    assert count["bytes"] == size and count["bytes_packed"] == result["packed_bytes"] and count["compressed"] == total
    assert count["parameters"] == sum(p.numel() for p in given.parameters()) == total + count["classifier"] \
        + count["kernels_left_out"] + count["not_kernels"]
    assert {n for n, e in result["excluded"].items() if e["reason"].startswith("classifier")} == set(classifiers)
    left = sum(e["params"] for n, e in result["excluded"].items() if n not in classifiers)
    assert result["coverage"] == pytest.approx(total / (total + left))
    json.dumps([policy, result])


@pytest.mark.parametrize("make, channels, kernels, classifier, left_out", [
    (Shared, 1, ["stem", "once", "dw"], "fc", set()),
    (Attend, 3, ["patch"] + [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in
                             ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")], "head", set()),
    (Flattening, 3, ["a", "c"], "d", {"b"})])
def test_a_network_of_ones_own(make, channels, kernels, classifier, left_out):
    model, (x, y) = make(), pictures(channels=channels)
    model.register_forward_hook(lambda *_: None)
    before, generator = fingerprint(model), torch.get_rng_state()
    compressed, policy, result = hirelc.compress_model(model, (x, y), (x, y), log=QUIET, **TINY)
    assert same(before, fingerprint(model)) and torch.equal(generator, torch.get_rng_state())
    assert list(result["kernels"]) == kernels and set(result["excluded"]) == left_out | {classifier}
    check_figures(model, compressed, policy, result, {classifier})
    assert not compressed.training and result["data"] == "given" and result["model"] == type(model).__name__
    with torch.no_grad():
        hits = compressed(x).argmax(1) == y
    assert accuracy(hits) == result["deployed_acc_full"]
    # the same blocks are found in what comes back
    blocks = models.find_blocks(compressed, x[:8])
    assert policies.read(policy).fit(blocks, Config())[0].cr == result["cr"]


@pytest.mark.parametrize("make, channels", [(Shared, 1), (tied, 1), (Attend, 3), (Caching, 3), (strided, 3)])
def test_the_proxy_judges_kernels_that_are_held_or_used_in_unusual_ways(make, channels):
    model, (x, _) = make().eval(), pictures(channels=channels)
    blocks = models.find_blocks(model, x[:4])
    for index, block in enumerate(blocks):
        config, before = alike(block, 3, 0.5), fingerprint(model)
        drop, = Proxy(model, blocks, [x]).drops(index, [config])
        assert same(before, fingerprint(model))
        assert 0 < drop == pytest.approx(by_copy(model, blocks, index, config, [x]), rel=1e-4)


def test_a_network_whose_parameters_are_all_frozen():
    model, images = Shared().requires_grad_(False), data.Images(*pictures(channels=1), 0, torch.zeros(1), torch.ones(1))
    compressed, policy, result = hirelc.compress_model(model, images, images, log=QUIET, **TINY)
    check_figures(model, compressed, policy, result, {"fc"})
    assert not any(p.requires_grad for p in compressed.parameters())
    for block in policy["blocks"]:  # nothing moved the weights off their grid
        for kernel in block["kernels"]:
            assert compressed.get_parameter(f"{kernel['name']}.weight").unique().numel() <= 2 ** kernel["bits"]


def test_exclude_and_groups():
    x, y = pictures()
    groups = [["patch"], ["encoder.layers.0.linear2", "encoder.layers.0.linear1"]]
    _, policy, result = hirelc.compress_model(Attend(), (x, y), (x, y), log=QUIET, exclude=["encoder.layers.1"],
                                              groups=groups, **TINY)
    assert [[k["name"] for k in b["kernels"]] for b in policy["blocks"]] == groups
    assert result["excluded"]["encoder.layers.1.linear1"] == {"params": 512,
                                                              "reason": "left out by exclude=encoder.layers.1"}
    assert any("encoder.layers.1.linear1 (512 parameters)" in note for note in result["notes"])


SOURCE = """
from torch import nn
def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""
SET = ["--set", *(f"{key.replace('__', '.')}={value}" for key, value in TINY.items()), "data.name=synthetic",
       "data.classes=3", "data.image_size=16", "data.train_images=48", "data.test_images=40", "scratch.epochs=1"]


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(SOURCE)
    return tmp_path / "net.py"


def test_model_from_a_file(net, tmp_path, capsys, monkeypatch):
    out = tmp_path / "runs"
    assert hirelc.main(["--model", f"{net}:make", "--out", str(out), *SET]) == 0
    assert "exp 0-make seed 42" in capsys.readouterr().out
    path = out / "make-seed42"
    result = json.loads((path / "result.json").read_text())
    assert result["exp"] == 0 and list(result["kernels"]) == ["0", "3"] and set(result["excluded"]) == {"7"}
    assert json.loads((path / "config.json").read_text())["settings"]["model.source"] == f"{net}:make"
    assert hirelc.main(["--model", f"{net}:make", "--load", str(path / "packed.pt"), *SET, "data.image_size=24"]) == 0
    assert f"accuracy {result['deployed_acc']:.2f} on the first 40" in capsys.readouterr().out  # at 16 px
    monkeypatch.chdir(tmp_path)  # as a module, under another name, trained from scratch
    assert hirelc.main(["--model", "net:make", "--name", "mine", "--weights", "none", "--out", str(out), *SET]) == 0
    assert "scratch" in json.loads((out / "mine-seed42" / "result.json").read_text())["timings"]


def test_another_network_is_another_run(net, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, words in ((f"{net}:make", "model file"), ("net:make", "network and images")):
        net.write_text(SOURCE)
        args = ["--model", source, "--name", words[:3], "--out", "runs", *SET]
        with monkeypatch.context() as patched:
            patched.setattr(hirelc, "algorithm_1", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
            assert hirelc.main(args) == 130
        net.write_text(SOURCE.replace("nn.ReLU()", "nn.Hardswish()"))
        sys.modules.pop("net", None)
        assert hirelc.main([*args, "--resume"]) == 2 and words in capsys.readouterr().err


def test_a_file_that_makes_another_network_each_time_is_refused_before_the_work(net, tmp_path, capsys):
    hook = "    net.register_forward_hook(lambda m, x, y, b=nn.Linear(1, 1).bias.item(): y * b)\n    return net\n"
    texts = SOURCE.replace("return nn", "net = nn") + hook, SOURCE.replace("(8, num", "(8, 1 + num")
    for text, words in zip(texts, ("what is drawn anew", "the same each time")):
        net.write_text(text)
        assert hirelc.main(["--model", f"{net}:make", "--out", str(tmp_path / "runs"), *SET]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_weights_for_a_model_are_read_strictly_by_name(net, tmp_path, capsys):
    args = ["--model", f"{net}:make", "--out", str(tmp_path / "runs"), "--weights", str(tmp_path / "w.pth"), *SET,
            "finetune.lr=0"]
    given = own_network(f"{net}:make", 3)
    torch.save(given.state_dict(), tmp_path / "w.pth")
    assert hirelc.main(args) == 0
    best = torch.load(tmp_path / "runs" / "make-seed42" / "best.pt", weights_only=True)["model"]
    own_network(f"{net}:make", 3).load_state_dict(best)
    assert torch.equal(best["7.weight"], given.state_dict()["7.weight"])
    torch.save({"7.bias": torch.zeros(3)}, tmp_path / "w.pth")
    capsys.readouterr()
    assert hirelc.main([*args[:3], str(tmp_path / "others"), *args[4:]]) == 2
    assert "does not fit the network" in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [
    (["--model", "{net}:make", "--weights", "auto"], "there are no published weights for a network of your own"),
    (["--model", "{net}:make", "--weights", "{net}.pth"], "no such file"),
    (["--model", "{net}:make", "--exp", "3"], "either --exp N")])
def test_bad_input_for_a_model_is_one_line_exit_2_and_leaves_nothing(net, tmp_path, capsys, args, message):
    out = tmp_path / "new" / "runs"
    assert hirelc.main([*(a.format(net=net) for a in args), "--out", str(out), *SET]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("hirelc: ")
    assert not list(out.glob("*"))
