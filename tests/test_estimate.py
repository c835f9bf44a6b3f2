"""Tests of the logit-MSE proxy's fast path and of what it stands on: stages, states kept, kernels prepared.

Every family is built narrow and compared with the plain path, a whole forward pass per candidate.
"""

import copy
import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from support import stages
from support import winograd
from compress import (GRANULARITIES, QTYPES, BlockConfig, KernelConfig, NetworkConfig, PreparedKernel, compress_kernel,
                      compress_network, kernel_shapes)
from config import Config, override
from config import Surrogate as SurrogateSettings
from search import DropEstimator, LayerBudget, LLAEnsemble, Proxy, Surrogate
from support.stages import Entering, Stage, split, state_bytes

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"deit": ("deit_tiny_patch16_224", 0.125, 16), "clip": ("vit_base_patch32_clip_224", 0.07, 16),
            "quickgelu": ("vit_base_patch32_clip_224", 0.07, 16), "resnet18": ("resnet18", 0.125, 0),
            "resnet50": ("resnet50", 0.07, 0), "mobilenetv2": ("mobilenetv2_100", 0.125, 0)}
CLASSES = 20


def images(count=6, seed=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(family):
    """A narrow network of the family whose logits follow its input: BatchNorm's statistics are those of images."""
    name, width, patch = FAMILIES[family]
    torch.manual_seed(1)
    model = models.build(name, CLASSES, 32, width, patch).to(memory_format=torch.channels_last)
    if family == "quickgelu":
        models.set_quick_gelu(model, True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
            elif isinstance(module, nn.Linear) and family not in ("resnet18", "resnet50", "mobilenetv2"):
                module.weight.mul_(4)  # at 0.02 a narrow ViT's blocks hardly move its logits
        model(images(32, 9))
        # So that no drop reaches its limit of 50.
        list(model.children())[-1].weight.div_(20 * model.eval()(images(32, 9)).std())
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    """(model, blocks, two batches)"""
    model = build(request.param)
    return model, models.find_blocks(model), list(images().split(4))


def uniform(block, bits, keep=1.0, qtype="INT", granularity="uniform"):
    return BlockConfig((KernelConfig(bits, keep, qtype, granularity),) * len(block.kernels), kernel_shapes(block))


def drawn(block, rng, highest=6):
    """Any type and granularity; few bits, because an error of the size of float32's rounding has no fixed value."""
    kernels = tuple(KernelConfig(int(rng.integers(3, highest + 1)), float(rng.uniform(0.5, 1.0)),
                                 str(rng.choice(QTYPES)), str(rng.choice(GRANULARITIES))) for _ in block.kernels)
    return BlockConfig(kernels, kernel_shapes(block))


def drops(model, blocks, batches, questions, **settings):
    """[question] → drop, one call each; questions: (block, configuration)."""
    proxy = Proxy(model, blocks, batches, **settings)
    return [proxy.drops(index, [config])[0] for index, config in questions]


def close(first, second, rel=1e-5):
    return first == pytest.approx(second, rel=rel, abs=0)


# ---------------------------------------------------------------------------------------------------------------
# Fast against plain


def test_fast_equals_plain_on_every_block(family):
    model, blocks, batches = family
    rng = np.random.default_rng(0)
    questions = [(i, drawn(block, rng)) for i, block in enumerate(blocks)]
    plain = drops(model, blocks, batches, questions, cache=False)
    assert close(drops(model, blocks, batches, questions), plain)
    without_norms = drops(model, blocks, batches, questions, cache=False, fold=True)
    assert close(without_norms, plain, rel=1e-4)
    assert close(drops(model, blocks, batches, questions, fold=True), without_norms)
    assert all(0 < d < 50 for d in plain) and len(set(plain)) == len(plain)


@pytest.mark.parametrize("fold", [False, True])
def test_winograd_equals_plain_on_every_block(monkeypatch, fold):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 8)
    model = build("resnet18")
    blocks, batches = models.find_blocks(model), list(images(size=112).split(4))  # 28, 14, 7 and 4 pixels
    rng = np.random.default_rng(0)
    questions = [(i, drawn(block, rng)) for i, block in enumerate(blocks)]
    plain = drops(model, blocks, batches, questions, cache=False)
    proxy = Proxy(model, blocks, batches, fold=fold, winograd=True)
    assert close([proxy.drops(i, [config])[0] for i, config in questions], plain, rel=1e-4 if fold else 1e-5)
    assert sum(isinstance(m, winograd.WinogradConv2d) for m in proxy.network.modules()) == 13
    assert not any(isinstance(m, winograd.WinogradConv2d) for m in model.modules())
    with torch.no_grad():  # theta_0 is another: so are the products that were computed of it
        for parameter in model.parameters():
            parameter.mul_(1.01)
    changed = drops(model, blocks, batches, questions, cache=False)
    assert not close(changed, plain)
    assert close([proxy.drops(i, [config])[0] for i, config in questions], changed, rel=1e-4 if fold else 1e-5)


@pytest.mark.parametrize("family, width, unused", [("resnet18", 1, []), ("resnet18", 0.125, ["winograd"]),
                                                   ("deit", 0.125, ["fold", "winograd"]), (None, 1, ["fold", "winograd"])])
def test_what_finds_nothing_in_a_network_is_told(family, width, unused):
    if family is None:
        model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128))  # not known to be Staged
    else:
        name, _, patch = FAMILIES[family]
        model = models.build(name, CLASSES, 32, width, patch)
    assert Proxy(model, [], [images()], fold=True, winograd=True).without_effect() == unused
    assert Proxy(model, [], [images()]).without_effect() == []


def test_at_eight_bits_they_differ_by_no_more_than_rounding_does(family):
    """There the logits move by little more than float32 resolves, in which the two orders of addition differ."""
    model, blocks, batches = family
    questions = [(i, uniform(blocks[i], 8, 1.0, "INT", "per-channel")) for i in (0, 1, len(blocks) - 1)]
    fast, plain = (drops(model, blocks, batches, questions, cache=cache) for cache in (True, False))
    largest = max(model(x).abs().max().item() for x in batches)
    for a, b in zip(fast, plain):
        rounding = 2 * (b / 20) ** 0.5 * 4 * torch.finfo(torch.float32).eps * largest  # d(e^2) = 2 e d(e)
        assert abs(a - b) <= 1e-5 * b + 20 * rounding


def test_the_plain_path_is_whole_forwards_of_a_compressed_copy():
    model = build("resnet18")
    blocks, batches = models.find_blocks(model), list(images().split(4))
    config = uniform(blocks[2], 4, 0.7)
    other = copy.deepcopy(model)
    modules = dict(other.named_modules())
    with torch.no_grad():
        for name, kernel in zip(blocks[2].kernels, config.kernels):
            modules[name].weight.copy_(compress_kernel(modules[name].weight, kernel)[0])
        wanted = np.mean([20 * F.mse_loss(other(x), model(x)).item() for x in batches])
    for cache in (True, False):
        assert close(Proxy(model, blocks, batches, cache=cache).drops(2, [config]), [wanted], rel=1e-4)


def test_other_blocks_may_be_compressed_around_a_candidate(family):
    """The candidate is theta_0's kernels compressed by itself, not what is around it compressed again."""
    model, blocks, batches = family
    rng = np.random.default_rng(2)
    around = NetworkConfig(tuple(drawn(block, rng) for block in blocks))
    questions = [(i, drawn(blocks[i], rng)) for i in (0, len(blocks) // 2, len(blocks) - 1)]
    wanted = []
    for index, config in questions:
        other = copy.deepcopy(model)
        compress_network(models.find_blocks(other), NetworkConfig(
            tuple(config if i == index else own for i, own in enumerate(around.blocks))))
        with torch.no_grad():
            wanted.append(np.mean([20 * F.mse_loss(other(x), model(x)).item() for x in batches]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for settings in ({}, {"cache": False}, {"together": 2}, {"fold": True}):
        proxy = Proxy(model, blocks, batches, **settings)
        alone = [proxy.drops(i, [config])[0] for i, config in questions]
        proxy.around = around
        found = [proxy.drops(i, [config])[0] for i, config in questions]
        assert close(found, np.minimum(wanted, 50.0).tolist(), rel=1e-4) and not close(found, alone)
        proxy.around = None
        assert [proxy.drops(i, [config])[0] for i, config in questions] == alone
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_of_the_whole_scope_with_kernels_at_both_ends(family):
    """The extra blocks hold shortcut projections, the patch embedding and the classifier."""
    model, _, batches = family
    blocks = models.survey(model, scope="all").blocks
    few = [i for i, block in enumerate(blocks) if any(".downsample" in name or name in (
        "head", "fc", "classifier", "patch_embed.proj", "conv_head") for name in block.kernels)]
    questions = [(i, uniform(blocks[i], 4)) for i in few]
    fast, plain = (drops(model, blocks, batches, questions, cache=cache) for cache in (True, False))
    assert few and close(fast, plain)


def test_values_do_not_depend_on_what_was_asked_before(family):
    model, blocks, batches = family
    rng = np.random.default_rng(1)
    questions = [(i, drawn(blocks[i], rng)) for i in (len(blocks) - 1, 0, len(blocks) // 2, 1)]
    alone = [drops(model, blocks, batches, [question])[0] for question in questions]
    proxy = Proxy(model, blocks, batches)
    for order in ((3, 1, 0, 2), (0, 2, 3, 1)):
        assert [proxy.drops(*[questions[n][0], [questions[n][1]]])[0] for n in order] == [alone[n] for n in order]


@pytest.mark.parametrize("together", [0, 2])
def test_candidates_given_together(family, together):
    model, blocks, batches = family
    rng = np.random.default_rng(2)
    proxy, single = Proxy(model, blocks, batches, together=together), Proxy(model, blocks, batches)
    for index in (0, len(blocks) - 2):
        configs = [drawn(blocks[index], rng) for _ in range(3)]
        assert close(proxy.drops(index, configs), [single.drops(index, [c])[0] for c in configs])
    assert proxy.drops(0, []) == []


def test_candidates_together_share_the_pass_behind_their_block():
    model = build("resnet18")
    blocks, sizes = models.find_blocks(model), []
    proxy = Proxy(model, blocks, [images()], together=4, fold=True)
    configs = [uniform(blocks[1], bits) for bits in (3, 4, 5, 6, 7)]
    proxy.drops(1, configs)
    proxy.network.layer4.register_forward_hook(lambda *_: sizes.append(None))
    proxy.network.layer4[1].conv1.register_forward_hook(lambda m, x, y: sizes.append(len(y)))
    proxy.drops(1, configs)
    assert sizes == [4 * 6, 6]


def test_the_search_finds_the_same_policy_without_the_cache():
    settings = override(Config(), {"lla.timesteps": 6, "lla.episode": 3, "compress.qtype": "any",
                                   "compress.granularity": "any"})
    budget = LayerBudget(target=0.25, max_pruning=0.6, min_bits=3, max_drop=2.0, strategy="auto")
    model, policies = build("deit"), []
    blocks = models.find_blocks(model)[-2:]
    for cache in (True, False):
        shapes = [kernel_shapes(block) for block in blocks]
        surrogate = Surrogate(5 * sum(map(len, shapes)), SurrogateSettings(), 0)
        estimator = DropEstimator(Proxy(model, blocks, [images(3)], cache=cache), surrogate, 80.0)
        agents = [LLAEnsemble(i, block, 0.5, estimator, settings, len(blocks)) for i, block in enumerate(blocks)]
        for agent in agents:
            agent.train(budget)
        policies.append([agent.consensus() for agent in agents])
    assert policies[0] == policies[1]


# ---------------------------------------------------------------------------------------------------------------
# Stages


def test_the_stages_compose_to_forward(family):
    model, blocks, (x, _) = family
    with torch.no_grad():
        torch.testing.assert_close(stages.run(split(model), x), model(x), rtol=1e-5, atol=1e-6)
    for block in models.survey(model, scope="all").blocks:
        for holder in block.kernels.values():
            assert sum(stage.holds([holder.weight]) for stage in split(model)) == 1


def test_without_batchnorm_the_logits_are_the_same(family):
    model, image = family[0].double(), family[2][0].double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network, factors = stages.folded(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert len(factors) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert (network is model) == (not factors)
    with torch.no_grad():
        torch.testing.assert_close(network(image), model(image), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_stages_leave_what_they_are_given(family):
    model, _, (state, _) = family
    with torch.no_grad():
        for stage in split(model):
            before = stages.copied(state)
            after = stage.run(state)
            pairs = zip(state, before) if isinstance(state, tuple) else [(state, before)]
            assert all(torch.equal(a, b) for a, b in pairs)
            state = after


def test_a_candidate_starts_at_its_block():
    """ResNet18's third block begins at the second convolution of a residual block."""
    for name, first, skipped in (("resnet18", 2, 9), ("deit", 7, 7 * 4 + 1), ("mobilenetv2", 5, 20)):
        model, ran = build(name), []
        blocks = models.find_blocks(model)
        proxy = Proxy(model, blocks, [images()], fold=True)
        proxy.drops(first, [uniform(blocks[first], 4)])
        named = {name: m for name, m in proxy.network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        start, kernels = list(named).index(next(iter(blocks[first].kernels))), list(named.values())
        for module in kernels:
            module.register_forward_hook(lambda m, x, y: ran.append(m))
        proxy.drops(first, [uniform(blocks[first], 5)])
        assert start >= skipped and ran[0] is kernels[start]
        assert not set(map(id, ran)) & set(map(id, kernels[:start]))


def test_the_last_encoder_block_computes_the_class_token_alone():
    model = build("clip")
    blocks, seen = models.find_blocks(model), []
    proxy = Proxy(model, blocks, [images()])
    for module in (model.blocks[-1].attn.proj, model.blocks[-1].mlp.fc1, model.blocks[-2].mlp.fc1):
        module.register_forward_hook(lambda m, x, y: seen.append(x[0].shape[1]))
    tokens = model.pos_embed.shape[1]
    for index in (0, len(blocks) - 1):
        proxy.drops(index, [uniform(blocks[index], 4)])
        del seen[:]
        proxy.drops(index, [uniform(blocks[index], 4)])
        assert seen == ([tokens] if index == 0 else []) + [1, 1]
    with torch.no_grad():
        x = torch.randn(2, tokens, model.head.in_features)
        for block in model.blocks:
            torch.testing.assert_close(block.class_token(x), block(x)[:, :1], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# What is kept


def doubling(count, log):
    def double(i):
        def call(x):
            log.append(i)
            return 2 * x
        return call
    return [Stage((), double(i)) for i in range(count)]


def test_states_are_computed_once_and_from_the_nearest_before():
    log, x = [], torch.ones(1, 4)
    entering = Entering(doubling(6, log), [x, 3 * x], 10**6, copy=False)
    assert entering.at(2, 0).tolist() == [[4.0] * 4] and log == [0, 1]
    assert entering.at(5, 0).tolist() == [[32.0] * 4] and log == [0, 1, 2, 3, 4]
    assert entering.at(4, 1).tolist() == [[48.0] * 4] and log[5:] == [0, 1, 2, 3]
    for stage in (2, 5):
        entering.at(stage, 0)
    assert len(log) == 9 and entering.bytes == 3 * 16
    assert entering.at(0, 1) is entering.batches[1]


def test_states_beyond_the_limit_are_computed_again():
    log, x = [], torch.ones(1, 4)
    batches = [x, 3 * x, 5 * x]
    entering = Entering(doubling(6, log), batches, 2 * 16, copy=False)
    for stage in (1, 3, 2, 4):
        for _ in range(3):
            for b, first in enumerate((1.0, 3.0, 5.0)):
                assert entering.at(stage, b)[0, 0] == first * 2 ** stage and entering.bytes <= 32
        assert sorted(entering.kept) == [(stage, 0), (stage, 1)]  # all but one batch, whatever was there before
    nothing = Entering(doubling(3, log), batches, 15, copy=False)
    assert nothing.at(2, 1)[0, 0] == 12 and nothing.bytes == 0


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_memory_limit_changes_no_value(family, share):
    model, blocks, batches = family
    questions = [(i, uniform(block, 4, 0.7)) for i, block in enumerate(blocks)][::3]
    free = Proxy(model, blocks, batches)
    wanted = [free.drops(index, [config]) for index, config in questions]
    bound = Proxy(model, blocks, batches, cache_mb=share * free.cache_bytes / 1e6)
    for (index, config), drop in zip(questions * 2, wanted * 2):
        assert bound.drops(index, [config]) == drop
        assert bound.cache_bytes <= share * free.cache_bytes
    assert free.cache_bytes > 0 and (share == 0 or bound.cache_bytes > 0)


def test_what_is_kept_goes_with_the_weights_it_was_computed_with(family):
    model, blocks, batches = family
    state = copy.deepcopy(model.state_dict())
    index = len(blocks) - 1
    config = uniform(blocks[index], 4)
    proxy = Proxy(model, blocks, batches)
    before = proxy.drops(index, [config])
    early = next(iter(blocks[0].kernels.values()))
    with torch.no_grad():
        early.weight.mul_(-0.5)
    changed = proxy.drops(index, [config])
    assert changed != before and changed == Proxy(model, blocks, batches).drops(index, [config])
    model.load_state_dict(state)
    assert proxy.drops(index, [config]) == before
    early.weight = nn.Parameter(-early.weight.detach())
    assert proxy.drops(index, [config]) == Proxy(model, blocks, batches).drops(index, [config]) != before
    buffer = next(iter(model.buffers()), None)
    if buffer is not None:
        buffer.add_(0.3)
        assert proxy.drops(index, [config]) == Proxy(model, blocks, batches).drops(index, [config])


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(family, training):
    model, blocks, batches = family
    model.train(training)
    model.head_mode = list(model.children())[-1].eval()  # one module in another mode than the rest
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    kept = [x.clone() for x in batches]
    proxy = Proxy(model, blocks, batches, together=2)
    for index in (0, len(blocks) - 1):
        proxy.drops(index, [uniform(blocks[index], 4), uniform(blocks[index], 3)])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(batches, kept))


# ---------------------------------------------------------------------------------------------------------------
# Precision


def test_bfloat16_is_close_and_not_the_same(family):
    model, blocks, batches = family
    questions = [(i, uniform(blocks[i], 3, 0.7)) for i in (0, len(blocks) // 2, len(blocks) - 1)]
    full = drops(model, blocks, batches, questions)
    lower = drops(model, blocks, batches, questions, dtype="bfloat16")
    assert lower == pytest.approx(full, rel=0.4) and lower != pytest.approx(full, rel=1e-6)
    assert drops(model, blocks, batches, [(1, uniform(blocks[1], 32))], dtype="bfloat16") == [0.0]


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="float16"):
        Proxy(nn.Linear(2, 2), [], [], dtype="float16")


# ---------------------------------------------------------------------------------------------------------------
# Other people's networks


class Remember(nn.Module):
    """Keeps its input for :class:`Recall`, out of sight of the chain."""

    def forward(self, x):
        self.kept = x
        return x


class Recall(nn.Module):
    def __init__(self, source):
        super().__init__()
        self.source = [source]

    def forward(self, x):
        return x + self.source[0].kept


class Tied(nn.Module):
    """Uses another module's weight without holding it."""

    def __init__(self, other):
        super().__init__()
        self.other = [other]

    def forward(self, x):
        return F.linear(x, self.other[0].weight.t())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])  # a name that others use too
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.stages[0](x).relu() + self.stages[1](x))


def flat():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())


def chain():
    return nn.Sequential(flat(), nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.ReLU(inplace=True),
                         nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), nn.Dropout(0.5),
                         nn.Linear(12, CLASSES))


def remembering():
    source = Remember()
    return nn.Sequential(flat(), nn.Linear(12, 12), source, nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12),
                         Recall(source), nn.Linear(12, CLASSES))


class Push(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x):
        self.stack.append(x)
        return x


class Pop(Push):
    def forward(self, x):
        return x + self.stack.pop()


def stacked():
    stack = []
    return nn.Sequential(flat(), nn.Linear(12, 12), Push(stack), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12),
                         Pop(stack), nn.Linear(12, CLASSES))


def hidden():
    first = nn.Linear(12, 12)
    return nn.Sequential(flat(), nn.Linear(12, 12), Tied(first), nn.ReLU(), first, nn.ReLU(), nn.Linear(12, CLASSES))


def twice():
    shared = nn.Linear(12, 12)
    return nn.Sequential(flat(), nn.Linear(12, 12), shared, nn.ReLU(), nn.Linear(12, 12), shared,
                         nn.Linear(12, CLASSES))


def wrapped():
    return nn.Sequential(nn.BatchNorm2d(3), build("resnet18"))


class Loop(nn.Sequential):
    def forward(self, x):
        return super().forward(super().forward(x).reshape(-1, 3, 2, 2))


def loop():
    return Loop(flat(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))


@pytest.mark.parametrize("make", [chain, remembering, stacked, hidden, twice, wrapped, loop, Branches])
def test_any_network_comes_out_as_by_whole_forwards(make):
    torch.manual_seed(4)
    model = make().eval()
    batches = list(images().split(4)) if make is not Branches else list(torch.randn(6, 12).split(4))
    blocks = models.find_blocks(model, batches[0][:2], groups=[[name] for name, module in list(
        model.named_modules())[:-1] if isinstance(module, (nn.Linear, nn.Conv2d))][:6])
    rng = np.random.default_rng(3)
    questions = [(i, drawn(block, rng, 5)) for i, block in enumerate(blocks)] * 2
    assert len(blocks) > 1
    for batches in (batches, batches[:1]):
        wanted = drops(model, blocks, batches, questions, cache=False)
        assert close(drops(model, blocks, batches, questions), wanted)
        assert close(drops(model, blocks, batches, questions[::-1], together=3, cache_mb=0), wanted[::-1])


def test_a_sequential_is_divided_and_nothing_else_is():
    assert [len(split(make())) for make in (chain, loop, Branches)] == [11, 1, 1]
    assert len(split(wrapped())) == 1 + len(split(build("resnet18")))
    model = chain()
    model.register_forward_hook(lambda *_: None)
    assert len(split(model)) == 1


# ---------------------------------------------------------------------------------------------------------------
# Prepared kernels


def kernels():
    generator = torch.Generator().manual_seed(5)
    conv = torch.randn(12, 6, 3, 3, generator=generator)
    yield "linear", torch.randn(9, 7, generator=generator)
    yield "conv", conv
    yield "channels last", conv.to(memory_format=torch.channels_last)
    yield "pointwise", torch.randn(8, 5, 1, 1, generator=generator).to(memory_format=torch.channels_last)
    yield "depthwise", torch.randn(8, 1, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    yield "transposed", torch.randn(7, 9, generator=generator).t()
    yield "half", conv.half()
    yield "empty rows", torch.cat([torch.zeros(3, 5), torch.randn(4, 5, generator=generator), torch.zeros(1, 5)])
    yield "one sign", torch.randn(8, 4, generator=generator).abs() * torch.tensor([-1.0, 1.0] * 4)[:, None]
    yield "negative", -torch.rand(5, 4, generator=generator)
    yield "nothing", torch.zeros(4, 3)
    yield "ties", torch.ones(6, 4) * torch.tensor([1.0, 1, 2, 2, 1, 1])[:, None]


@pytest.mark.parametrize("name, weight", list(kernels()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("chunk", [2 ** 16, 8])
def test_a_prepared_kernel_compresses_bit_for_bit(name, weight, chunk, monkeypatch):
    monkeypatch.setattr(PreparedKernel, "CHUNK", chunk)
    before, kernel = weight.clone(), PreparedKernel(weight)
    for bits, keep, qtype, granularity in itertools.product((2, 3, 8, 32), (0.01, 0.5, 1.0), QTYPES,
                                                            (*GRANULARITIES, "log-script")):
        config = KernelConfig(bits, keep, qtype, granularity)
        wanted, result = compress_kernel(weight, config)[0], kernel.compressed(config)
        assert torch.equal(result, wanted) and result.dtype == weight.dtype, config
        assert result.stride() == torch.empty_like(weight).stride() and result.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)


def test_what_is_not_finite_stays_so():
    weight = torch.randn(5, 4)
    weight[2, 1] = torch.nan
    for qtype, granularity in itertools.product(QTYPES, ("uniform", "per-channel")):
        config = KernelConfig(4, 1.0, qtype, granularity)
        wanted = compress_kernel(weight, config)[0]
        assert torch.equal(PreparedKernel(weight).compressed(config).isnan(), wanted.isnan()) and wanted.isnan().any()


# ---------------------------------------------------------------------------------------------------------------
# Settings


def test_settings_of_the_search():
    search = Config().search
    assert dataclasses.asdict(search) | {"cache": True, "dtype": "float32", "cache_mb": 1024, "together": 0} \
        == dataclasses.asdict(search)
    assert override(Config(), ["search.cache=false", "search.dtype=bfloat16"]).search.cache is False
    assert state_bytes((torch.zeros(2, 3), torch.zeros(1))) == 28


def test_logarithms_are_kept_of_one_block():
    model = build("deit")
    blocks = models.find_blocks(model)
    proxy = Proxy(model, blocks, [images()])
    for index in (0, 1, 0):
        configs = [BlockConfig((KernelConfig(4, 0.7, "INT", granularity),) * len(shapes), shapes)
                   for granularity in ("log", "uniform") for shapes in [tuple(kernel_shapes(blocks[index]))]]
        proxy.drops(index, configs)
        assert {name for name, kernel in proxy.kernels.items() if kernel.logs is not None} == set(blocks[index].kernels)


# ---------------------------------------------------------------------------------------------------------------
# The benchmark


def test_the_benchmark_measures_every_part(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("search_benchmark", ROOT / "benchmarks" / "search.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "LIMITS", dict([*benchmark.LIMITS.items()][1:]))
    monkeypatch.setattr(benchmark, "matmul_rate", lambda device, dtype, clock: 100.0)  # takes longer than the rest
    monkeypatch.setattr(sys, "argv", ["search.py", "--sections", "proxy", "--networks", "resnet18", "--size", "32",
                                      "--images", "1", "--rounds", "1", "--steps", "1", "--device", "cpu"])
    assert benchmark.main() == 0
    printed = capsys.readouterr().out
    for row in ("plain", "start at the block", "+ kernels prepared", "+ channels last", "+ BatchNorm folded",
                "+ Winograd's convolutions", "+ 6 candidates together", "folded, bfloat16", "+ 6 together, bfloat16"):
        assert printed.count(f"\n  {row} ") == 1, row
    assert printed.count("% of the bound") == 4 and printed.count("a step: the suffix's") == 1
