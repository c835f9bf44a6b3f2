"""--dry-run: what a run would do and need is found out, and nothing is written."""

import dataclasses
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import data
import hirelc
from support import plan
import rl
import search
from support import images as sources
from compress import kernel_shapes
from config import Config, override
from search import HLAEnsemble, LLAEnsemble, Proxy
from test_hirelc import QUICK

SMALL = ["--exp", "4", "--smoke", "--dry-run", "--set", *QUICK]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plan, "PROBE", 0.0)  # the smallest probes


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def rows(text):
    """{(phase, what): count} of the table."""
    table = text.partition("s each")[2].splitlines()[1:-1]
    return {(line[:12].strip(), line[12:56].strip()): int(line[56:66].replace(",", "")) for line in table}


def dry_run(tmp_path, capsys, *more, code=0):
    """Standard output, or with another code the line on standard error; nothing below tmp_path may have changed."""
    before = files(tmp_path)
    assert hirelc.main([*SMALL, *more, "--out", str(tmp_path / "runs")]) == code
    assert files(tmp_path) == before
    out, error = capsys.readouterr()
    assert (error.count("\n") == 1 and error.startswith("hirelc: ") and not out) if code else not error
    return error if code else out


def test_nothing_is_written_and_the_plan_names_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = dry_run(tmp_path, capsys)
    assert f"run directory: {tmp_path / 'runs' / 'exp4-seed42'} (new)" in text
    assert "64 training and 40 test images" in text and "17 kernels in 5 blocks" in text
    assert "from scratch" in text and re.search(r"disk of .*run directory .* MB.* free", text)
    assert re.search(r"memory: .*activations of a training batch \(measured\).*available", text)
    found = rows(text)
    assert {phase for phase, _ in found} == {"scratch", "baseline", "sensitivity", "warmup", "surrogate", "hla",
                                             "search", "finetune", "deploy", "report"}
    assert "epochs of 2 steps, 40 test images" in text and "about" in text.splitlines()[-1]


def test_the_plan_of_held_out_images(tmp_path, capsys):
    text = dry_run(tmp_path, capsys, "eval.protocol=holdout", "data.train_images=200", "data.batch_size=64")
    assert "epochs of 3 steps, 10 held-out images" in text


@pytest.mark.parametrize("more", [[], ["surrogate.enabled=false"], ["surrogate.warmup=0", "surrogate.min_samples=2"],
                                  ["search=no-hla", "surrogate.enabled=false"], ["search=null"],
                                  ["finetune.mode=qat", "search.cycles=1"]])
def test_the_counts_are_those_of_a_run(tmp_path, capsys, monkeypatch, more):
    found = rows(dry_run(tmp_path, capsys, *more))
    seen = {"candidates": 0.0, "low": 0, "high": 0, "fits": 0, "epochs": 0}
    drops, learn, fit, epoch = Proxy.drops, rl.learn_together, search.Surrogate.train, hirelc.Trainer.run_epoch
    proxies = []

    def counted_drops(self, index, configs):
        proxies.append(self)
        seen["candidates"] += len(list(configs)) * self.stages_passed(index)
        return drops(self, index, configs)

    def counted_learn(agents, timesteps, step=None):
        seen["high" if isinstance(agents[0].env, search.HLAEnv) else "low"] += timesteps * len(agents)
        return learn(agents, timesteps, step)

    def counted_fit(self, epochs):
        seen["fits"] += epochs
        return fit(self, epochs)

    def counted_epoch(self, *rest):
        seen["epochs"] += 1
        return epoch(self, *rest)

    monkeypatch.setattr(Proxy, "drops", counted_drops)
    monkeypatch.setattr(search, "learn_together", counted_learn)
    monkeypatch.setattr(search.Surrogate, "train", counted_fit)
    monkeypatch.setattr(hirelc.Trainer, "run_epoch", counted_epoch)
    config = hirelc.resolve(4, {"smoke": True, "out": str(tmp_path / "runs")}, [*QUICK, *more])
    result = hirelc.run_experiment(config, hirelc.Log(open(os.devnull, "w")))

    def said(phase, what):
        return sum(count for (p, w), count in found.items() if p == phase and w.startswith(what))
    assert said("hla", "agent steps") == seen["high"] and said("search", "agent steps") == seen["low"]
    epochs = said("scratch", "") + said("baseline", "") + said("warmup", "") + said("finetune", "")
    assert epochs == seen["epochs"] > len(result["cycles"])
    assert said("surrogate", "") == (seen["fits"] if config.surrogate.enabled else 0)
    candidates = said("search", "candidates")
    if candidates:  # resets of episodes ask for none, equal candidates are asked once
        middle = proxies[0].stages_passed(len(proxies[0].blocks) // 2)
        assert 0.5 * candidates <= seen["candidates"] / middle <= candidates + 1
    else:
        assert not seen["candidates"]


def test_what_is_missing_is_named_with_its_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "fetch", lambda *_: pytest.fail("a download"))
    monkeypatch.setattr("models.cached", lambda *_, **__: pytest.fail("a download"))
    before = files(tmp_path)
    places = ["--out", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "d"), "--weights-dir", str(tmp_path / "w")]
    size = ["data.image_size=32", "eval.batch_size=8", "data.batch_size=8"]
    for exp, url, archive, weights in (
            (4, sources.TINY_IMAGENET_URL, "tiny-imagenet-200.zip (about 248 MB)",
             "resnet18-f37072fd.pth (about 47 MB"),
            (5, "tiny-imagenet", "248 MB", "mobilenet_v2-b0353104.pth (about 14 MB")):
        assert hirelc.main(["--exp", str(exp), "--dry-run", *places, "--set", *size]) == 0
        text = capsys.readouterr().out
        assert url in text and archive in text and weights in text and f"{tmp_path / 'w'} can be written" in text
        assert re.search(r"data set 748.0 MB, decoded train images 1,228.8 MB, decoded test images 122.9 MB", text)
        assert "100 epochs" not in text and rows(text)["report", "test images, of three networks"] == 30_000
    assert files(tmp_path) == before
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "cifar-10-python.tar.gz").write_bytes(b"archive")
    absent = sources.absent(SimpleNamespace(dir=str(tmp_path / "d"), name="cifar10"))
    assert "unpacked from" in absent.what and absent.bytes == 186e6
    assert sources.absent(SimpleNamespace(dir=str(tmp_path), name="folder")) is None
    error = dry_run(tmp_path, capsys, "data.name=tiny-imagenet", "data.train_images=100001", "data.dir=none", code=2)
    assert "100000" in error


def picture_folders(base):
    from PIL import Image
    for split, count in (("train", 12), ("test", 6)):
        for name in ("one", "two"):
            folder = base / "cifar10" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.frombytes("RGB", (32, 32), os.urandom(3072)).save(folder / f"{i}.png")


def test_images_are_counted_and_decoded_once(tmp_path, capsys):
    picture_folders(tmp_path / "images")
    real = ["data.name=cifar10", f"data.dir={tmp_path / 'images'}", "data.train_images=0", "data.test_images=0"]
    text = dry_run(tmp_path, capsys, *real)
    assert "24 training and 12 test images, 2 classes" in text and rows(text)["data", "images to decode"] == 36
    assert "decoded train images 0.1 MB" in text
    data.load(dataclasses.replace(Config().data, name="cifar10", dir=str(tmp_path / "images"), image_size=32))
    text = dry_run(tmp_path, capsys, *real)  # from now on the cache holds them
    assert ("data", "images to decode") not in rows(text) and "decoded train" not in text
    assert "holds 24" in dry_run(tmp_path, capsys, *real, "data.train_images=25", code=2)
    (tmp_path / "images" / "cifar10" / "test" / "two" / "0.png").unlink()
    (tmp_path / "images" / "cifar10" / "test" / "three").mkdir()
    assert "same class folders" in dry_run(tmp_path, capsys, *real, code=2)


def test_a_disk_without_room_is_refused_and_one_with_just_enough_is_not(tmp_path, capsys, monkeypatch):
    text = dry_run(tmp_path, capsys)
    needed = float(re.search(r"disk of .*: ([\d.,]+) MB needed", text)[1].replace(",", "")) * 1e6
    for free, code in ((needed + 1e5, 0), (needed - 1e5, 2)):
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        line = dry_run(tmp_path, capsys, code=code)
    assert "are free" in line and "run directory" in line and "--out" in line


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert "cannot write there" in dry_run(tmp_path, capsys, code=2)


def test_too_little_memory_is_a_warning(tmp_path, capsys, monkeypatch):
    assert "warning" not in dry_run(tmp_path, capsys)
    monkeypatch.setattr(plan, "available_memory", lambda: 10 ** 6)
    assert "warning: this may not fit into memory" in dry_run(tmp_path, capsys)


def test_memory_is_read_from_the_system(monkeypatch, tmp_path):
    assert 10 ** 6 < plan.available_memory() < 10 ** 15
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:      1000 kB\n", "/sys/fs/cgroup/memory.max": "700000\n",
             "/sys/fs/cgroup/memory.current": "100000\n"}
    place = {}
    for n, (path, text) in enumerate(texts.items()):
        place[path] = tmp_path / str(n)
        place[path].write_text(text)
    monkeypatch.setattr(plan, "Path", lambda *parts: place.get(os.path.join(*parts), tmp_path / "none"))
    assert plan.available_memory() == 600_000
    place["/sys/fs/cgroup/memory.max"].write_text("max\n")
    assert plan.available_memory() == 1_024_000
    place.clear()
    assert plan.available_memory() is None


def test_what_a_training_batch_keeps_is_counted():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    x, y = torch.randn(4, 10), torch.tensor([0, 1, 2, 0])
    # x, what ReLU gives, the logarithms, the labels; the weights of the classes' mean is one number
    assert plan._kept_bytes(model, x, y) - 4 * (4 * 10 + 4 * 20 + 4 * 3) - 8 * 4 in (0, 4)


@pytest.mark.parametrize("agents", [("PPO", "A2C", "PPO"), ("A2C",)])
def test_the_bytes_of_the_agents_are_those_of_their_networks(agents):
    ones = tuple(1.0 for _ in agents)
    config = override(Config(), {"search.cycles": 1})
    config = dataclasses.replace(
        config, lla=dataclasses.replace(config.lla, algorithms=agents, alpha=ones, beta=ones, gamma_s=ones),
        hla=dataclasses.replace(config.hla, algorithms=agents, alpha=ones, beta=ones, gamma=ones))
    blocks = [SimpleNamespace(name="a", kernels={"x": nn.Linear(3, 4), "y": nn.Linear(4, 5)}),
              SimpleNamespace(name="b", kernels={"z": nn.Linear(5, 6)})]
    shapes = [kernel_shapes(block) for block in blocks]
    ensembles = [HLAEnsemble([32, 30], [0.5, 0.5], config)] + [
        LLAEnsemble(i, block, 0.5, None, config, 2) for i, block in enumerate(blocks)]

    def numbers(value):
        if isinstance(value, torch.Tensor):
            return value.numel() if value.is_floating_point() else 0
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return sum(map(numbers, values))
    weights = sum(numbers([p for p in vars(agent).values() if isinstance(p, nn.Module)] and
                          [dict(m.state_dict()) for m in vars(agent).values() if isinstance(m, nn.Module)])
                  for ensemble in ensembles for agent in ensemble.agents)
    assert weights and plan._agent_bytes(config, shapes) == 12 * weights


@pytest.mark.parametrize("more, said", [
    (["model.weights=none.pth"], "none.pth"), (["model.weights=none"], ""), (["goal=size:1KB"], "goal=size:1KB"),
    (["data.batch_size=1"], "batch_size"), (["policy=none.json"], "none.json"), (["data.name=imagenet"], "imagenet"),
    (["goal=nothing"], "goal")])
def test_what_a_run_refuses_the_plan_refuses(tmp_path, capsys, more, said):
    text = dry_run(tmp_path, capsys, *more, code=2 if said else 0)
    assert said in text


def test_a_directory_of_other_settings_is_refused_and_a_policy_is_planned(tmp_path, capsys):
    assert hirelc.main([a for a in SMALL if a != "--dry-run"] + ["--no-table", "--out", str(tmp_path / "runs")]) == 0
    capsys.readouterr()
    assert "holds a run with these settings" in dry_run(tmp_path, capsys)
    assert "finetune.lr" in dry_run(tmp_path, capsys, "finetune.lr=0.5", code=2)
    path = tmp_path / "runs" / "exp4-seed42" / "policy.json"
    text = dry_run(tmp_path, capsys, f"policy={path}", "name=applied")
    assert "nothing is searched" in text and not {"hla", "search", "warmup", "surrogate"} & {p for p, _ in rows(text)}
    assert rows(text)["finetune", "epochs of 2 steps, 40 test images"] == 1
    policy = json.loads(path.read_text())
    policy["blocks"][0]["kernels"][0]["bits"] = 40
    path.write_text(json.dumps(policy))
    assert "bits=40" in dry_run(tmp_path, capsys, f"policy={path}", "name=applied", code=2)


def test_a_network_of_ones_own_is_planned(tmp_path, capsys):
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef make(num_classes):\n    return nn.Sequential("
                                     "nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), "
                                     "nn.Flatten(), nn.Linear(8, num_classes))\n")
    before = files(tmp_path)
    command = ["--model", f"{tmp_path / 'net.py'}:make", *SMALL[2:], "--out", str(tmp_path / "runs")]
    assert hirelc.main(command) == 0
    text = capsys.readouterr().out
    assert "2 kernels in 1 blocks" in text and "scratch" in {p for p, _ in rows(text)}  # as --smoke has it
    assert hirelc.main([*command, "--weights", "given"]) == 0
    assert "scratch" not in {p for p, _ in rows(capsys.readouterr().out)}
    assert files(tmp_path) == before
