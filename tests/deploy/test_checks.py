"""What is handed over gives the logits of what was measured, on twenty random networks and on those that try to hide
something; what cannot be compressed is refused in one line before the work."""

from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset, TensorDataset

import data
import hirelc
from compress import eval_mode
from config import Eval, InputError
from deploy import checks, narrow, pack
from deploy.target import Demands
from estimate import Proxy
from models import find_blocks
from networks import Made, seeded, silent
from test_estimate import alike, by_copy

QUICK = dict(search="greedy", search__cycles=1, finetune__epochs=1, sensitivity__images=4, baseline__epochs=0,
             data__batch_size=8, eval__full=False, finetune__bn_images=16)


def images(count=24, side=12, seed=0):
    return torch.randn(count, 3, side, side, generator=seeded(seed)), torch.arange(count) % 3


def quick(model, **more):
    """Compress with few images: (network, policy, result)."""
    return hirelc.compress_model(model, images(), images(seed=1), log=silent(), **QUICK | more)


def random_network(seed):
    """Branches, concatenations, groups, norms of several kinds, a shared module, maps or tokens at the end."""
    rng = np.random.default_rng(seed)

    def norm():
        return rng.choice([nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.Identity()])

    parts = {"stem": nn.Conv2d(3, 8, 3, 2, 1), "shared": nn.Conv2d(8, 8, 3, padding=1), "head": nn.Linear(8, 3)}
    kinds = rng.choice(["plain", "residual", "concatenated", "grouped", "shared"], 3)
    for i, kind in enumerate(kinds):
        groups, n = 1 + (kind == "grouped"), 4 if kind == "concatenated" else 8
        parts |= {f"a{i}": nn.Conv2d(8, n, 3, padding=1, groups=groups), f"n{i}": norm(), f"b{i}": nn.Conv2d(8, n, 1)}
    tokens = bool(rng.integers(2))
    parts |= {"ln": nn.LayerNorm(8), "mlp": nn.Linear(8, 8)}

    def forward(m, x):
        x = F.relu(m.stem(x))
        for i, kind in enumerate(kinds):
            a, b, n = (getattr(m, f"{part}{i}") for part in "abn")
            if kind == "concatenated":
                x = F.relu(n(torch.cat([a(x), b(x)], 1)))
            elif kind == "residual":
                x = F.relu(x + b(F.gelu(n(a(x)))))
            else:
                x = F.relu(n(b(F.relu(a(m.shared(x) if kind == "shared" else x)))))
        if tokens:
            x = x.flatten(2).transpose(1, 2)
            return m.head((x + m.mlp(m.ln(x))).mean(1))
        return m.head(x.mean((2, 3)))

    torch.manual_seed(seed)
    return Made(forward, **parts)


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_are_the_same_returned_packed_fresh_narrow_and_exported(seed, tmp_path):
    model, file = random_network(seed), str(tmp_path / "small.pt")
    network, _, result = quick(model, packed=file, goal="cr:7", compress__scope="all")
    fresh = pack.load(file, random_network(seed))
    assert not checks.difference(network, fresh, images()[0])
    for index, block in enumerate(blocks := find_blocks(model.eval(), images()[0])):  # the search sees the plain way
        drop, = Proxy(model, blocks, [images()[0]]).drops(index, [alike(block, 4, 0.5)])
        assert drop == pytest.approx(by_copy(model, blocks, index, alike(block, 4, 0.5), [images()[0]]), rel=1e-4)
    listed = {*result["kernels"], *result["excluded"]}
    assert {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1} <= listed
    small = narrow.materialize(fresh, images()[0])
    narrow.export(small, images()[0], tmp_path / "small.pt2")
    program = torch.export.load(tmp_path / "small.pt2").module()
    for size in checks.BATCHES:
        x = images(size, seed=size)[0]
        for other in (small, program):
            torch.testing.assert_close(other(x), fresh(x), atol=1e-4, rtol=1e-4)


class Cache(nn.Module):
    """Keeps in eval mode what it computed from a weight, until train() is called."""

    def __init__(self):
        super().__init__()
        self.a, self.q, self.fc, self.kept = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Linear(8, 3), None
        self.forgets = True

    def train(self, mode=True):
        super().train(mode)
        self.kept = None if mode and self.forgets else self.kept
        return self

    def forward(self, x):
        if self.training or self.kept is None:
            self.kept = self.q.bias.sin().detach()
        return self.fc((self.q(self.a(x)).relu() + self.kept[:, None, None]).mean((2, 3)))


def test_what_is_computed_in_eval_mode_belongs_to_the_weights_of_now(tmp_path):
    torch.manual_seed(0)
    network, _, result = quick(Cache(), finetune__lr=0.3, finetune__epochs=3, eval__full=True, packed=tmp_path / "c.pt")
    x, y = images(seed=1)
    logits = pack.load(tmp_path / "c.pt", Cache())(x)
    assert result["deployed_acc_full"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert torch.equal(network(x), logits)
    stubborn = Cache()
    stubborn.forgets = False
    stubborn.q.eval()
    with eval_mode(stubborn):
        stubborn(x)
    assert stubborn.training and stubborn.a.training and not stubborn.q.training
    with pytest.raises(InputError, match="gives other logits .*state dict"):
        quick(stubborn, finetune__lr=0.3)


@pytest.mark.parametrize("mode", ["paper", "qat"])
def test_activation_checkpointing_changes_nothing(mode):
    def made(on):
        torch.manual_seed(0)
        return Made(lambda m, x: m.fc((checkpoint(m.b, F.relu(m.a(x)), use_reentrant=False) if on else
                                         m.b(F.relu(m.a(x)))).mean((2, 3))), a=nn.Conv2d(3, 8, 3, padding=1),
                      b=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)), fc=nn.Linear(8, 3))

    plain, again = (quick(made(on), finetune__mode=mode, goal="cr:9")[0] for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters()))


class Merging(nn.Linear):
    """Adds a part to its weight in eval mode, as LoRA does."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight += (self.training - mode) * 0.5
        return super().train(mode)


def linear(**more):
    return Made(lambda m, x: m.fc(m.l(m.a(x).mean((2, 3))).relu()), a=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 3),
                  **{"l": nn.Linear(8, 8), **more})


def net(run):
    return Made(run, a=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 3))


OTHER, reentrant = nn.Linear(8, 8), partial(checkpoint, use_reentrant=True)


def changed(change):
    model = linear()
    change(model)
    return model


@pytest.mark.parametrize("make, words", [
    (lambda: changed(lambda m: setattr(m.fc.weight, "data", m.l.weight.data[:3])), "l.weight share memory"),
    (lambda: changed(lambda m: setattr(m.l, "weight", nn.Parameter(torch.ones(8, 1).expand(8, 8)))), "is expanded"),
    (lambda: changed(lambda m: setattr(m, "kept", [m.l.weight.data.T])), "keeps a view of l.weight"),
    (lambda: changed(lambda m: m.l.weight.register_hook(torch.neg)), "l.weight has a hook on its gradient"),
    (lambda: changed(lambda m: m.l.register_forward_hook(lambda *_: vars(m).update(seen=1))), "through a closure"),
    (lambda: changed(lambda m: m.l.register_forward_hook(lambda *_, net=m: None)), "or a default"),
    (lambda: changed(lambda m: m.l.register_forward_hook(lambda a, b, c, net=m.l: None)), "or a default"),
    (lambda: len, "expected a torch"), (lambda: nn.Flatten(), "no parameters"), (lambda: linear().to("meta"), "meta"),
    (lambda: changed(lambda m: m.register_buffer("n", torch.ones(2, device="meta"))), "several devices"),
    (lambda: linear(l=nn.LazyLinear(8)), "lazy"), (lambda: linear().double(), "torch.float64"),
    (lambda: torch.jit.trace(linear(), images()[0]), "torch.jit"), (lambda: linear(l=Merging(8, 8)), "in eval than in"),
    (lambda: net(lambda m, x: m.fc(m.a(x).mean((2, 3)).detach()).detach()), "no gradient reaches a"),
    (lambda: net(lambda m, x: m.fc(reentrant(m.a, x).mean((2, 3)))), "no gradient reaches a.weight: .*use_reentrant"),
    (lambda: net(lambda m, x: m.fc(reentrant(F.relu, m.a(x)).mean((2, 3)))), "cannot be trained .*use_reentrant"),
    (lambda: net(lambda m, x: m.fc(F.dropout(m.a(x).mean((2, 3))))), "the next time"),
    (lambda: net(lambda m, x: m.fc((y := m.a(x).mean((2, 3))) - y.mean(0))), "in another batch"),
    (lambda: changed(lambda m: setattr(m, "named_parameters", lambda *_, **__: iter(()))), "leaves some out"),
    (lambda: net(lambda m, x: m.fc(OTHER(m.a(x).mean((2, 3))))), "none of the network's"),
    (lambda: net(lambda m, x: m.fc(m.a(x).mean((2, 3)) + 0 * m.a.weight.data.clamp_(-0.1, 0.1).sum())), "changes its")])
def test_what_cannot_be_compressed_is_refused_before_the_work(make, words, monkeypatch):
    monkeypatch.setattr(hirelc, "algorithm_1", lambda run: pytest.fail("work"))
    with pytest.raises(InputError, match=words) as caught:
        quick(make())
    assert "\n" not in str(caught.value)


def test_parameters_that_are_one_in_memory_are_one_kernel(tmp_path):
    def made():
        torch.manual_seed(0)
        model = linear(l=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
        model.l[2].weight.data = model.l[0].weight.data
        return model
    network, _, result = quick(made(), packed=tmp_path / "tied.pt")
    assert list(result["kernels"]) == ["a", "l.0"]
    assert torch.equal(pack.load(tmp_path / "tied.pt", made())(images()[0]), network(images()[0]))


def test_a_narrow_network_is_compressed_again():
    example = images()[0]
    small = narrow.materialize(quick(linear(), goal="cr:6", compress__bits_min=8)[0], example)
    again, _, result = quick(small, goal="cr:6", compress__bits_min=8, compress__scope="all")
    assert list(result["kernels"]) == ["a", "l", "fc"] and result["coverage"] == 1
    smaller = narrow.materialize(again, example)
    assert narrow.multiply_adds(smaller, example) < narrow.multiply_adds(small, example)


def test_labels_of_a_dataset_are_looked_at_before_the_work(monkeypatch):
    monkeypatch.setattr(hirelc, "algorithm_1", lambda run: pytest.fail("work"))
    x, y = images()
    wrong = Subset([(image, 7 if i == 20 else int(y[i])) for i, image in enumerate(x)], range(24))
    for sets in ((wrong, (x, y)), ((x, y), DataLoader(wrong, batch_size=5))):
        with pytest.raises(InputError, match="labels go from 0 to 7, .* of image 20"):
            hirelc.compress_model(linear(), *sets, log=silent(), **QUICK)


def test_what_is_frozen_is_noted_and_sorted_test_images_are_not_chosen_from_in_their_order():
    found = quick(linear().requires_grad_(False), eval__images=2)[2]["notes"]
    assert [note for note in found if "repairs a.weight, l.weight" in note] and "the first 2, which choose" in found[0]
    noisy = type("Noisy", (TensorDataset,), {"__getitem__": lambda s, i: (s.tensors[0][i] * torch.rand(()), i % 3)})
    found = hirelc.compress_model(linear(), images(), noisy(*images()), log=silent(), **QUICK)[2]["notes"]
    assert all(any(words in note for note in found) for words in ("test images are others each time", "is larger than"))
    (x, y), settings = images(300), (Eval(images=90), silent())
    first = next(checks.fair_order(data.as_images((x, y.sort().values)), *settings).batches(90))[1]
    assert min(first.bincount()) > 15 and checks.fair_order(plain := data.as_images((x, y)), *settings) is plain


@pytest.mark.parametrize("under", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_call_under_another_mode_gives_the_same(under):
    model = linear()
    plain = quick(model)[0]
    with under():
        other = quick(model)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters()))
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        quick(model)
    taught = quick(model, finetune__distill=1.0)[0].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), taught))


@pytest.mark.parametrize("holds", [True, False])  # else blocks are given back
def test_a_call_that_was_broken_off_goes_on_in_its_folder(tmp_path, monkeypatch, holds):
    model, more, addresses = linear(), {"goal": "drop:9"}, iter(range(2**30, 2**31))
    model.extra_repr = lambda: f"<function at {next(addresses):#x}>"  # as in another process
    monkeypatch.setattr(Demands, "holds", lambda *_: holds)
    whole = quick(model, **more)[2]
    assert len(whole["cycles"]) == (2 if holds else 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hirelc.summary, "summarise", Mock(side_effect=KeyboardInterrupt))
        quick(model, run_dir=tmp_path, **more)
    monkeypatch.setattr(hirelc.Trainer, "run_epoch", lambda *_: pytest.fail("trained again"))
    assert quick(model, run_dir=tmp_path, threads=1, **more)[2]["cycles"] == whole["cycles"]
    for other, asked in ((linear(), ()), (model, "l")):
        with pytest.raises(InputError, match="network and images"):
            quick(other, run_dir=tmp_path, exclude=asked, **more)
    x, y = images()
    one, other = (checks.fingerprint(model, [data.as_images((z, y))], ()) for z in (x, torch.cat([x[:-1], x[:1]])))
    assert one != other  # by the last image
