"""compress_model and --model on networks that this project did not write, with every figure counted anew here."""

import copy
import importlib.util
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import hirelc
import models
from compress import BlockConfig, KernelConfig, NetworkConfig, compress_network, from_policy, kernel_shapes
from config import Config, InputError, override
from support.log import Log
from evidence.report import main as report_main
from search import Proxy, proxy_drop
from train import accuracy, block_fisher

ROOT = Path(__file__).resolve().parents[2]
TINY = {"search__cycles": 1, "lla__timesteps": 4, "hla__timesteps": 4, "baseline__epochs": 0, "finetune__epochs": 1,
        "finetune__lr": 1e-3, "sensitivity__images": 2, "search__proxy_batches": 1, "data__batch_size": 16,
        "device": "cpu"}
QUIET = Log(stream=open(os.devnull, "w"))


def pictures(n=40, channels=3, size=16, classes=3):
    """Noise with a brighter channel or corner per class, floats [n, C, size, size], and labels."""
    generator = torch.Generator().manual_seed(n)
    y = torch.arange(n) % classes
    x = torch.randn(n, channels, size, size, generator=generator)
    x[:, 0] += y.view(-1, 1, 1)
    return x, y


class Shared(nn.Module):
    """One convolution used twice under two names, an in-place activation, BatchNorm, dropout; 1-channel images."""

    def __init__(self):
        super().__init__()
        self.stem, self.once = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.dw = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.again = self.once
        self.bn, self.drop, self.fc = nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu_()
        x = self.dw(self.again(F.relu(self.once(x))))
        return self.fc(self.drop(x.mean((2, 3))))


class Attend(nn.Module):
    """A patch embedding and a TransformerEncoderLayer, whose in_proj_weight no module holds."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True), 2,
                                             enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Flattening(nn.Module):
    """Flattens with view, which channels-last feature maps do not allow; a weight-normed and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), parametrizations.weight_norm(nn.Conv2d(6, 4, 3, 2, 1))
        self.c, self.d = nn.Linear(64, 12), nn.Linear(12, 3)
        self.a.weight.requires_grad_(False)
        self.calls = []

    def forward(self, x):
        return self.d(F.relu(self.c(self.b(F.relu(self.a(x))).view(-1, 64))))


def swin():
    return torchvision.models.SwinTransformer(patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2],
                                              window_size=[4, 4], num_classes=3)


def fingerprint(model):
    """Everything that may not change: tensors bit by bit, modes, requires_grad, gradients, hooks."""
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()],
            [(n, p.requires_grad, p.grad, p.data_ptr()) for n, p in model.named_parameters()],
            [(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for m in model.modules()])


def same(one, two):
    return one[0].keys() == two[0].keys() and all(torch.equal(one[0][k], two[0][k]) for k in one[0]) \
        and one[1:] == two[1:]


def check_figures(given, compressed, policy, result, classifiers):
    """CR, bytes, coverage and the compressed tensors, counted from the policy and the networks alone."""
    tensors, original = dict(compressed.named_parameters()), dict(given.named_parameters())
    chosen = {kernel["name"]: kernel for block in policy["blocks"] for kernel in block["kernels"]}
    assert list(chosen) == list(result["kernels"])
    stored = total = saved = 0
    for name, kernel in chosen.items():
        weight = tensors[name if name in tensors else f"{name}.weight"]
        zero = int((weight.detach().flatten(1) == 0).all(dim=1).sum())
        kept = max(1, math.floor(kernel["keep"] * len(weight) + 1e-9))
        assert zero == len(weight) - kept == len(weight) - kernel["channels_kept"], name
        assert weight.shape == original[name if name in original else f"{name}.weight"].shape
        total += weight.numel()
        stored += weight.numel() * kernel["bits"] / 32 * kept / len(weight)
        # INT uniform: codes, one float32 scale, and a bitmap of the channels where some are gone
        bitmap = math.ceil(len(weight) / 8) if zero else 0
        size = math.ceil(kept * weight[0].numel() * kernel["bits"] / 8) + 4 + bitmap
        assert result["kernels"][name]["bytes"] == size and result["kernels"][name]["params"] == weight.numel()
        saved += 4 * weight.numel() - size
    assert result["cr"] == pytest.approx(total / stored) and 4 <= result["cr"] <= 26.67
    everything = {id(t): t for t in (*given.parameters(), *given.buffers())}.values()
    size = sum(t.numel() * t.element_size() for t in everything)
    # the packed file: the kernels' bytes, everything else as it is, and an index
    assert size - saved < result["packed_bytes"] < size - saved + 4096 + 100 * len(list(given.state_dict()))
    assert result["whole_model_ratio"] == pytest.approx(size / result["packed_bytes"])
    count = result["accounting"]
    assert count["bytes"] == size and count["bytes_packed"] == result["packed_bytes"] and count["compressed"] == total
    assert count["parameters"] == sum(p.numel() for p in given.parameters()) == total + count["classifier"] \
        + count["kernels_left_out"] + count["not_kernels"]
    assert {n for n, e in result["excluded"].items() if e["reason"].startswith("classifier")} == set(classifiers)
    left = sum(e["params"] for n, e in result["excluded"].items() if n not in classifiers)
    assert result["coverage"] == pytest.approx(total / (total + left))
    assert not set(result["excluded"]) & set(result["kernels"])
    json.dumps([policy, result])


@pytest.mark.parametrize("make, channels, kernels, classifier, left_out", [
    (Shared, 1, ["stem", "once", "dw"], "fc", set()),
    (Attend, 3, ["patch"] + [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in
                             ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")], "head", set()),
    (Flattening, 3, ["a", "c"], "d", {"b"}),
    (swin, 3, ["features.0.0"] + [f"features.1.{i}.{part}" for i in (0, 1) for part in
                                  ("attn.qkv", "attn.proj", "mlp.0", "mlp.3")] + ["features.2.reduction"]
     + [f"features.3.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.3")],
     "head", set()),
    (lambda: torchvision.models.regnet.RegNet(torchvision.models.regnet.BlockParams(
        [1, 1], [8, 16], [4, 8], [1.0, 1.0], [2, 2], 0.25), num_classes=3, stem_width=8), 3, None, "fc",
     {"trunk_output.block1.block1-0.proj.0", "trunk_output.block2.block2-0.proj.0"}),
])
def test_a_network_of_ones_own(make, channels, kernels, classifier, left_out):
    model, (x, y) = make(), pictures(channels=channels)
    model.register_forward_hook(lambda *_: None)
    before, generator = fingerprint(model), torch.get_rng_state()
    compressed, policy, result = hirelc.compress_model(model, (x, y), (x, y), log=QUIET, **TINY)
    assert same(before, fingerprint(model)) and torch.equal(generator, torch.get_rng_state())
    assert kernels is None or list(result["kernels"]) == kernels
    assert set(result["excluded"]) == left_out | {classifier}
    check_figures(model, compressed, policy, result, {classifier})
    assert not compressed.training and result["data"] == "given" and result["model"] == type(model).__name__
    with torch.no_grad():
        hits = compressed(x).argmax(1) == y
    assert accuracy(hits) == result["final_acc_full"]
    config = from_policy(policy, models.find_blocks(compressed, x[:8]))  # the same blocks are found in what comes back
    assert config.cr == result["cr"]


def test_equal_seeds_give_equal_networks_with_dropout_and_another_seed_another():
    images, networks = pictures(channels=1), []
    for seed in (1, 1, 2):
        torch.rand(seed * 3)  # what the caller drew before does not matter
        torch.manual_seed(7)
        networks.append(hirelc.compress_model(Shared(), images, images, log=QUIET, seed=seed, **TINY)[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(networks[0].values(), networks[1].values()))
    assert not all(torch.equal(a, b) for a, b in zip(networks[0].values(), networks[2].values()))


def tied():
    """The shared network with the shared module's weight in a third module, too."""
    model = Shared()
    model.fc = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 8, 3, 1, 1), nn.Flatten(), model.fc)
    model.fc[1].weight = model.once.weight
    return model


@pytest.mark.parametrize("make, channels", [(Shared, 1), (tied, 1), (Attend, 3)])
def test_the_proxy_judges_a_kernel_without_a_module_and_a_shared_one(make, channels):
    """Against a copy in which the kernels are really overwritten."""
    model, (x, _) = make().eval(), pictures(channels=channels)
    blocks = models.find_blocks(model, x[:4])
    for index, block in enumerate(blocks):
        config = BlockConfig((KernelConfig(3, 0.5),) * len(block.kernels), kernel_shapes(block))
        before = fingerprint(model)
        drop, = Proxy(model, blocks, [x]).drops(index, [config])
        assert same(before, fingerprint(model))
        copied = copy.deepcopy(model)
        compress_network([models.find_blocks(copied, x[:4])[index]], NetworkConfig((config,)))
        with torch.no_grad():
            expected = proxy_drop(F.mse_loss(copied(x), model(x)).item())
        assert drop == pytest.approx(expected, rel=1e-4) and drop > 0


def test_the_proxys_batches_stay_although_the_network_writes_into_its_input():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 3)).eval()
    x = pictures()[0]
    batch, blocks = x.clone(), models.find_blocks(model, x[:4])
    config = BlockConfig((KernelConfig(3, 0.5),), kernel_shapes(blocks[0]))
    Proxy(model, blocks, [batch]).drops(0, [config])
    assert torch.equal(batch, x)


def test_sensitivity_is_over_the_blocks_own_weights_and_biases():
    model, (x, y) = Attend().eval(), pictures(n=3)
    blocks = models.find_blocks(model, x)
    values = block_fisher(model, blocks, x, y)
    expected = [0.0] * len(blocks)
    for image, label in zip(x, y):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        for i, block in enumerate(blocks):
            for name in block.kernels:
                stem = name.removesuffix("in_proj_weight") + "in_proj" if name.endswith("in_proj_weight") else name
                for leaf in ("_weight", "_bias") if stem != name else (".weight", ".bias"):
                    expected[i] += float(model.get_parameter(stem + leaf).grad.double().square().sum()) / len(x)
    assert values == pytest.approx(expected, rel=1e-4)


def test_a_shared_kernel_starts_every_cycle_from_theta0_under_all_its_names():
    images = pictures(channels=1)
    model = Shared()
    blocks = models.find_blocks(model, images[0][:4])
    config = override(Config(), {key.replace("__", "."): value for key, value in {**TINY, "carry": "rest"}.items()})
    run = hirelc.HiReLC(model, blocks, *(hirelc.data.as_images(images),) * 2, config, QUIET)
    run.run()
    run.carried = {k: v + 1 if v.is_floating_point() else v for k, v in run.theta0.items()}
    seen, original = {}, hirelc.compress_network
    hirelc.compress_network = lambda *_: seen.update(run._state()) or {}
    try:
        run.apply(run.best_config)
    finally:
        hirelc.compress_network = original
    for key, value in seen.items():
        kernel = key in ("stem.weight", "once.weight", "again.weight", "dw.weight")
        assert torch.equal(value, run.theta0[key] if kernel else run.carried[key]), key


def test_a_network_whose_parameters_are_all_frozen():
    model, images = Shared().requires_grad_(False), pictures(channels=1)
    compressed, policy, result = hirelc.compress_model(model, images, images, log=QUIET, **TINY)
    check_figures(model, compressed, policy, result, {"fc"})
    assert not any(p.requires_grad for p in compressed.parameters())
    for block in policy["blocks"]:  # nothing moved the weights off their grid
        for kernel in block["kernels"]:
            assert compressed.get_parameter(f"{kernel['name']}.weight").unique().numel() <= 2 ** kernel["bits"]


def test_images_come_as_tensors_data_sets_and_loaders():
    x, y = pictures()
    model, policies = Flattening(), []
    dataset = TensorDataset(x, y)
    for train in ((x, y), dataset, DataLoader(dataset, batch_size=8, shuffle=True)):
        policies.append(hirelc.compress_model(model, train, dataset, log=QUIET, **TINY)[1])
    assert policies[0] == policies[1] == policies[2]


def test_exclude_and_groups():
    x, y = pictures()
    _, policy, result = hirelc.compress_model(Attend(), (x, y), (x, y), log=QUIET, exclude=["encoder.layers.1"], **TINY)
    assert len(result["kernels"]) == 5 and len(policy["blocks"]) == 2
    assert result["excluded"]["encoder.layers.1.linear1"] == {"params": 512,
                                                              "reason": "left out by exclude=encoder.layers.1"}
    assert any("encoder.layers.1.linear1 (512 parameters)" in note for note in result["notes"])
    groups = [["patch"], ["encoder.layers.0.linear2", "encoder.layers.0.linear1"]]
    _, policy, _ = hirelc.compress_model(Attend(), (x, y), (x, y), log=QUIET, groups=groups, **TINY)
    assert [[k["name"] for k in b["kernels"]] for b in policy["blocks"]] == groups


class Wrong(Shared):
    """Returns what ``change`` makes of its logits."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


@pytest.mark.parametrize("model, labels, message", [
    (lambda: Wrong(lambda z: (z, z)), None, "returns a tuple.*expected logits"),
    (lambda: Wrong(lambda z: {"logits": z}), None, "returns a dict"),
    (lambda: Wrong(lambda z: z[0]), None, "expected logits: a float tensor"),
    (lambda: Wrong(lambda z: z[:, :2]), None, "labels go from 0 to 2, the network has logits for the classes 0 to 1"),
    (lambda: Wrong(lambda z: z / 0 * 0), None, None),
    (lambda: nn.Flatten(), None, "no parameters"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), None, "nothing to compress"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 3)), None, "fails on a batch of images"),
])
def test_what_cannot_be_compressed_is_said_and_the_network_left_alone(model, labels, message):
    model, images = model(), pictures(channels=1)
    before, generator = fingerprint(model), torch.get_rng_state()
    with pytest.raises(InputError if message else FloatingPointError, match=message):
        hirelc.compress_model(model, images, images, log=QUIET, **TINY)
    assert same(before, fingerprint(model)) and torch.equal(generator, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("home, device", [("cpu", "cuda"), ("cuda", "cuda"), ("cuda", "cpu")])
def test_the_network_comes_back_to_the_device_that_it_was_on(home, device):
    model, images = Attend().to(home), pictures()
    before = fingerprint(model)
    compressed, policy, result = hirelc.compress_model(model, images, images, log=QUIET, **{**TINY, "device": device})
    assert same(before, fingerprint(model)) and {p.device.type for p in compressed.parameters()} == {home}
    assert result["device"].startswith(device)
    check_figures(model.cpu(), compressed.cpu(), policy, result, {"head"})


# ---------------------------------------------------------------------------------------------------------------
# Command line

SOURCE = """
import torch
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

def number():
    return 3
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
    table = capsys.readouterr().out
    assert "\n0-make " in table and "make, synthetic" in table
    path = out / "make-seed42"
    result = json.loads((path / "result.json").read_text())
    assert result["exp"] == 0 and list(result["kernels"]) == ["0", "3"] and set(result["excluded"]) == {"7"}
    settings = json.loads((path / "config.json").read_text())["settings"]
    assert settings["model.source"] == f"{net}:make" and settings["model.weights"] == "given"
    saved = torch.load(path / "best.pt", weights_only=True)
    spec = importlib.util.spec_from_file_location("again", net)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(3).load_state_dict(saved["model"])
    assert saved["policy"] == json.loads((path / "policy.json").read_text())
    assert report_main([str(out)]) == 0 and "0-make" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path)  # as a module, under another name, trained from scratch
    assert hirelc.main(["--model", "net:make", "--name", "mine", "--weights", "none", "--out", str(out), *SET]) == 0
    assert "scratch" in json.loads((out / "mine-seed42" / "result.json").read_text())["timings"]


def test_weights_for_a_model_are_read_strictly_by_name(net, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("again", net)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = ["--model", f"{net}:make", "--out", str(tmp_path / "runs"), "--weights", str(tmp_path / "w.pth"), *SET,
            "finetune.lr=0"]
    given = module.make(3)
    torch.save(given.state_dict(), tmp_path / "w.pth")
    assert hirelc.main(args) == 0
    best = torch.load(tmp_path / "runs" / "make-seed42" / "best.pt", weights_only=True)["model"]
    assert torch.equal(best["7.weight"], given.state_dict()["7.weight"])
    for wrong in ({"7.bias": torch.zeros(3)}, module.make(5).state_dict()):
        capsys.readouterr()
        torch.save(wrong, tmp_path / "w.pth")
        assert hirelc.main(args) == 2
        error = capsys.readouterr().err
        assert "does not fit the network" in error and error.count("\n") == 1


@pytest.mark.parametrize("args, message", [
    (["--model", "{net}:nothing"], "has no function 'nothing'"),
    (["--model", "{net}:number"], "returned a int, expected a torch.nn.Module"),
    (["--model", "no_such_module:make"], "No module named 'no_such_module'"),
    (["--model", "gone.py:make"], "No such file or directory"),
    (["--model", "{net}"], "expected module:function or path/to/file.py:function"),
    (["--model", "{net}:make", "--weights", "auto"], "no published weights for a network of one's own"),
    (["--model", "{net}:make", "--weights", "{net}.pth"], "no such file"),
    (["--model", "{net}:make", "--exp", "3"], "either --exp N"),
])
def test_bad_input_for_a_model_is_one_line_exit_2_and_leaves_nothing(net, tmp_path, capsys, args, message):
    out = tmp_path / "new" / "runs"
    assert hirelc.main([*(a.format(net=net) for a in args), "--out", str(out), *SET]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("hirelc: ")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------
# The README, and the zoo


def test_the_readme_section_runs(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Compress your own network\n(.*?)(?=^## |\Z)", readme, re.M | re.S).group(1)
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) >= 4
    x, y = pictures()
    names = {"model": Attend(), "train": (x, y), "test": (x, y)}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["result"]["coverage"] == 1.0 and isinstance(names["make"](4), nn.Module)
    for command in re.findall(r"^python hirelc\.py (--model .*?)\s*(?:#.*)?$", section, re.M):
        args = hirelc._parser().parse_args(command.split())
        flags = {key: getattr(args, name) for name, key in hirelc.FLAGS.items() if getattr(args, name)}
        assert hirelc.resolve_own(args.model, flags, args.set).exp == 0


@pytest.mark.skipif(not os.environ.get("HIRELC_LONG"), reason="minutes; HIRELC_LONG=1 runs it")
@pytest.mark.parametrize("name, classifier", [
    ("vgg11_bn", "classifier.6"), ("densenet121", "classifier"), ("regnet_y_400mf", "fc"),
    ("convnext_tiny", "classifier.2"), ("swin_t", "head"), ("efficientnet_b0", "classifier.1")])
def test_the_zoo_end_to_end(name, classifier):
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "benchmarks" / "zoo.py")
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    real = os.environ.get("HIRELC_DATA")
    splits = hirelc.data.load(override(Config(), {
        "data.name": "cifar10" if real else "synthetic", "data.dir": real or "", "data.image_size": 64,
        "data.train_images": 64, "data.test_images": 32, "data.cache": False}).data)
    given, compressed, policy, result, _, unchanged = zoo.compress(
        name, splits.train, splits.test, 10, QUIET, device="cpu", lla__timesteps=2, eval__images=32)
    assert unchanged and result["coverage"] >= 0.95
    check_figures(given, compressed, policy, result, {classifier})
    own = {n for n, m in given.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(result["kernels"]) | set(result["excluded"]) == own
