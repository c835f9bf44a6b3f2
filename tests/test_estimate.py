"""Tests of the drop estimates: the proxy against real copies of compressed networks, the surrogate by hand."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from compress import (GRANULARITIES, QTYPES, BlockConfig, KernelConfig, KernelShape, NetworkConfig, compress_network,
                      kernel_shapes)
from config import Surrogate as Settings
from estimate import UNKNOWN_KERNEL, DropEstimator, Proxy, Surrogate, block_features, kernel_features, proxy_drop
from networks import through_a_file
from test_models import images

FAMILIES = {"deit": ("deit_tiny_patch16_224", 0.125, 16), "clip": ("vit_base_patch32_clip_224", 0.07, 16),
            "resnet18": ("resnet18", 0.125, 0), "resnet50": ("resnet50", 0.07, 0),
            "mobilenetv2": ("mobilenetv2_100", 0.125, 0)}


def build(family):
    """A narrow network of the family whose logits follow its input, and no drop of which reaches 50."""
    name, width, patch = FAMILIES[family]
    torch.manual_seed(1)
    model = models.build(name, 20, 32, width, patch).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # its statistics become those of the images
            elif isinstance(module, nn.Linear) and patch:
                module.weight.mul_(4)  # at 0.02 a narrow ViT's blocks hardly move its logits
        model(images(32, 32, 9))
        list(model.children())[-1].weight.div_(20 * model.eval()(images(32, 32, 9)).std())
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    """(model, blocks, two batches)"""
    model = build(request.param)
    return model, models.find_blocks(model), list(images(6, 32, 3).split(4))


def small():
    """A network of one stage that writes into its images, in blocks of four kernels and of one; two batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.Flatten(), nn.Linear(96, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(),
                          nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5))
    for module in model.modules():  # weights large enough for the input to reach the logits
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    model[2].running_var.uniform_(0.5, 2.0)
    batches = (2 * torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(1))).split(16)
    return model, models.find_blocks(model, batches[0]), list(batches)


def alike(block, bits, keep=1.0, granularity="uniform"):
    return BlockConfig((KernelConfig(bits, keep, "INT", granularity),) * len(block.kernels), kernel_shapes(block))


def drawn(block, rng):
    """Any type and granularity; few bits, because an error of the size of float32's rounding has no fixed value."""
    kernels = tuple(KernelConfig(int(rng.integers(3, 7)), float(rng.uniform(0.5, 1.0)), str(rng.choice(QTYPES)),
                                 str(rng.choice(GRANULARITIES))) for _ in block.kernels)
    return BlockConfig(kernels, kernel_shapes(block))


def by_copy(model, blocks, index, config, batches):
    """min(20 MSE, 50) of whole forward passes of a copy in which the block is compressed."""
    other, reference = copy.deepcopy((model, blocks)), copy.deepcopy(model).eval()
    compress_network(other[1][index:index + 1], NetworkConfig((config,)))
    with torch.no_grad():
        return min(50.0, float(np.mean([20 * F.mse_loss(other[0].eval()(x.clone()), reference(x.clone())).item()
                                        for x in batches])))


def snapshot(model):
    return ([tensor.tolist() for tensor in model.state_dict().values()], [m.training for m in model.modules()],
            [(id(p), p.requires_grad, p.grad, p.is_inference()) for p in model.parameters()])


# --- Proxy -----------------------------------------------------------------------------------------------------
def test_proxy_drop_by_hand():
    assert [proxy_drop(m) for m in (0.0, 0.1, 2.49, 2.5, 2.51, 1e6)] == pytest.approx([0.0, 2.0, 49.8, 50, 50, 50])
    assert [proxy_drop(m, 40.0) for m in (4.0, 100.0, 200.0)] == [2.0, 50.0, 50.0] and proxy_drop(9, 2, 99) == 90
    assert proxy_drop(math.inf) == math.inf and math.isnan(proxy_drop(math.nan))


def test_every_block_of_every_family_comes_out_as_by_whole_forward_passes(family):
    """The blocks of scope "all" too: shortcut projections, the patch embedding, the classifier."""
    model, blocks, batches = family
    model.train()
    before, rng, every = snapshot(model), np.random.default_rng(0), models.survey(model, scope="all").blocks
    proxy = Proxy(model, every, batches)
    links = []  # stages that a candidate runs
    for index, block in enumerate(every):
        config = drawn(block, rng)
        drop, none = proxy.drops(index, [config, alike(block, 32)])
        links.append(len(proxy.links))
        assert 0 < drop < 50 and drop == pytest.approx(by_copy(model, every, index, config, batches), rel=1e-4)
        assert none < 1e-9
    assert before == snapshot(model) and proxy.drops(0, []) == []
    links = links[:len(blocks)]
    assert links == sorted(links, reverse=True) and 2 <= links[-1] < links[0] <= len(proxy.stages)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_of_one_stage_comes_out_likewise_and_is_left_as_it_was(training):
    model, blocks, batches = small()
    model.train(training)
    model[3].train(not training)  # one module in another mode than the rest
    before, given = snapshot(model), [x.clone() for x in batches]
    proxy, rng = Proxy(model, blocks, batches), np.random.default_rng(0)
    for index in (0, 1, 0):
        configs = [drawn(blocks[index], rng), alike(blocks[index], 3, 0.5)]
        wanted = [by_copy(model, blocks, index, config, batches) for config in configs]
        assert proxy.drops(index, configs) == pytest.approx(wanted, rel=1e-4) and len(proxy.links) == 1
    hook = model[8].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        proxy.drops(0, configs)
    hook.remove()
    assert before == snapshot(model) and proxy.drops(0, configs) == pytest.approx(wanted, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(batches, given))  # although it writes into its images


def test_relative_drops_are_in_parts_of_the_variance_of_an_images_logits():
    model, blocks, batches = small()
    config, whole = alike(blocks[0], 3, 0.5), Proxy(model, blocks, batches)
    with torch.no_grad():
        unit = np.mean([model.eval()(x.clone()).numpy().var(axis=1) for x in batches])
    relative = Proxy(model, blocks, batches, relative=True)
    assert relative.unit == pytest.approx(unit, rel=1e-5) and whole.unit == 1  # also before anything was estimated
    wanted = min(20 * whole.errors(0, [config])[0] / unit, 50)
    assert relative.drops(0, [config]) == pytest.approx([wanted], rel=1e-5) and wanted < 50
    assert relative.drops(0, [config], wanted / 2) == [wanted / 2]  # another largest drop than 50


def test_every_candidate_is_judged_against_theta0_whatever_was_asked_before(family):  # ledger D17
    model, blocks, batches = family
    rng = np.random.default_rng(1)
    questions = [(i, [drawn(blocks[i], rng)]) for i in (len(blocks) - 1, 0, len(blocks) // 2, 1)]
    alone = [Proxy(model, blocks, batches).drops(*question) for question in questions]
    proxy, state = Proxy(model, blocks, batches), copy.deepcopy(model.state_dict())
    for order in ((3, 1, 0, 2), (0, 2, 3, 1)):
        assert [proxy.drops(*questions[n]) for n in order] == [alone[n] for n in order]
        for parameter in model.parameters():  # a cycle fine-tunes the network and puts theta_0 back
            parameter.data *= -0.5
        model.load_state_dict(state)


@pytest.mark.parametrize("name, index", [("resnet18", 2), ("deit", 7), ("mobilenetv2", 5)])
def test_a_candidate_starts_at_its_block_and_one_blocks_input_is_kept(name, index):
    model, ran = build(name), []
    blocks = models.find_blocks(model)
    proxy, first = Proxy(model, blocks, [images(6, 32, 3)]), next(iter(blocks[index].kernels.values()))
    for module in (m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
        module.register_forward_hook(lambda m, x, y: ran.append((m, y.shape[1])))

    def modules_run(block):
        ran.clear()
        proxy.drops(block, [alike(blocks[block], 4)])
        return [module for module, _ in ran]

    once, again = modules_run(index), modules_run(index)
    assert first in again[:3] and len(again) < 0.4 * len(once) and len(proxy.inputs) == 1
    if name == "deit":  # the classifier needs the last block's first token alone
        assert [count for module, count in ran if module is model.blocks[-1].mlp.fc1] == [1]
    modules_run(0)
    assert len(modules_run(index)) > len(again)  # its input had to be computed again


# --- Surrogate -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel, features", [
    (KernelConfig(5, 0.7, "FLOAT", "learned"), [0.5, 0.7, 1, 1, 1.0]),
    (KernelConfig(8, 0.7, "INT", "log"), [0.8, 0.7, 0, 0.33, 0.5]),  # pruned, but at 8 bits
    (KernelConfig(7, 1.0, "FLOAT", "per-channel"), [0.7, 1.0, 1, 0.67, 0.5]),  # fewer bits, but not pruned
    (KernelConfig(8, 1.0, "INT", "uniform"), UNKNOWN_KERNEL)])
def test_features_by_hand(kernel, features):
    assert kernel_features(kernel) == pytest.approx(features) and UNKNOWN_KERNEL == [0.8, 1.0, 0.0, 0.0, 0.5]
    two = BlockConfig((kernel, KernelConfig(4, 0.5, "FLOAT", "log")), (KernelShape(4, 8),) * 2)
    assert block_features(two) == pytest.approx([*features, 0.4, 0.5, 1, 0.33, 1.0])


def surrogate(count, seed=3, **changes):
    """One that has measured networks of three kernels whose accuracy is 60 + 3 (bits - 6) per kernel."""
    result, rng = Surrogate(15, Settings(**changes), seed), np.random.default_rng(0)
    for _ in range(count):
        kernels = [KernelConfig(int(rng.integers(4, 9)), float(rng.uniform(0.6, 1))) for _ in range(3)]
        blocks = tuple(BlockConfig((kernel,), (KernelShape(100, 1000),)) for kernel in kernels)
        result.add(NetworkConfig(blocks), 60.0 + 3 * sum(kernel.bits - 6 for kernel in kernels))
        assert result.buffer[-1][0] == [value for kernel in kernels for value in kernel_features(kernel)]
    return result


def test_it_is_active_and_trained_from_the_threshold_on():
    assert [surrogate(n).active for n in range(5)] == [False, False, False, True, True]
    for model in (surrogate(2), surrogate(4, enabled=False)):
        before = snapshot(model.layers)
        assert not model.active and math.isnan(model.train(5)) and snapshot(model.layers) == before


def test_it_learns_a_simple_relation_and_keeps_the_best_epoch():
    model, (others, truth) = surrogate(60, lr=3e-3), zip(*surrogate(100).buffer[60:])
    model.train(150)
    assert np.mean(np.subtract(model.predict(others), truth) ** 2) < 0.35 * np.var(truth)
    # At a rate at which the loss goes up and down, more epochs in one call are never worse.
    results = [surrogate(20, lr=0.05).train(epochs) for epochs in (1, 5, 10, 20)]
    assert results == sorted(results, reverse=True) and results[-1] < results[0]
    assert surrogate(20).train(3) != surrogate(20, weight_decay=0.0).train(3)
    model, seen = surrogate(20, lr=0.05), []
    model.layers.register_forward_pre_hook(lambda layers, x: seen.append((layers.training, x[0][:, 1].tolist())))
    returned, (rows, accuracies) = model.train(7), zip(*model.buffer)
    # with dropout in batches of 16, then without; in another order in every epoch
    assert [(mode, len(x)) for mode, x in seen] == [(True, 16), (True, 4), (False, 20)] * 7 and seen[0] != seen[3]
    assert returned == pytest.approx(np.mean(np.subtract(model.predict(rows), accuracies) ** 2), rel=1e-4)
    model.buffer.append(([math.nan] * 15, 60.0))
    with pytest.raises(FloatingPointError, match="surrogate.lr"):
        model.train(2)


def test_predictions_by_hand_and_without_dropout():
    """One path through the network: relu(2 x0 - 0.5), times 3, times -1: x0 = 0.8 gives -3.3, x0 = 0.2 gives 0."""
    model = surrogate(3)
    model.train(1)
    assert sum(parameter.numel() for parameter in model.layers.parameters()) == 64 * 16 + 32 * 65 + 33  # ledger D11
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
        first, second, last = (module for module in model.layers if isinstance(module, nn.Linear))
        first.weight[0, 0], first.bias[0], second.weight[0, 0], last.weight[0, 0] = 2.0, -0.5, 3.0, -1.0
    predicted = model.predict([[0.8] + [0.0] * 14, [0.2] + [0.0] * 14])
    assert predicted == pytest.approx([3.5571, 50.0], abs=1e-3)  # 100 / (1 + e^3.3)
    assert [module.p for module in model.layers if isinstance(module, nn.Dropout)] == [0.3, 0.3]


def test_it_is_a_function_of_its_seed_goes_on_bit_for_bit_and_leaves_torchs_generator_alone():
    first, second = surrogate(7), Surrogate(15, Settings(), 99)
    before = torch.manual_seed(5).get_state()
    assert first.train(3) == surrogate(7).train(3) != surrogate(7, seed=4).train(3)
    assert torch.equal(torch.get_rng_state(), before)
    second.load_state_dict(through_a_file(first.state_dict()))
    for model in (first, second):
        model.buffer.append(([0.5] * 15, 70.0))
    assert first.train(4) == second.train(4) and first.buffer == second.buffer
    assert all(torch.equal(a, b) for a, b in zip(first.layers.parameters(), second.layers.parameters()))


# --- Which estimate the agents are told ------------------------------------------------------------------------
class Stub:
    """In place of proxy and surrogate; keeps what it is asked."""
    blocks, active = small()[1], True

    def drops(self, index, configs):
        return [7.0 + index] * len(configs)

    def predict(self, rows):
        self.rows = [list(row) for row in rows]
        return [80.0 + n for n in range(len(self.rows))]


def test_the_proxy_is_asked_until_the_surrogate_is_active():
    model = Stub()
    estimator, configs = DropEstimator(Stub(), model, 87.0), [alike(model.blocks[1], bits) for bits in (4, 5)]
    model.active = False
    assert not estimator.surrogate_active and estimator.drops(1, configs) == [8.0, 8.0]
    model.active = True
    assert estimator.surrogate_active and estimator.drops(1, configs) == [7.0, 6.0]  # baseline - prediction
    assert estimator.evaluations == 4


def test_other_blocks_carry_their_consensus_or_unknown_kernels():  # ledger D10
    proxy, model = Stub(), Stub()
    first, second = proxy.blocks
    estimator, candidates = DropEstimator(proxy, model, 87.5), [alike(second, 5), alike(second, 4, 0.6)]
    estimator.drops(1, candidates)
    assert model.rows == [pytest.approx(UNKNOWN_KERNEL * 4 + [0.5, 1, 0, 0, 0.5]),
                          pytest.approx(UNKNOWN_KERNEL * 4 + [0.4, 0.6, 0, 0, 1.0])]
    estimator.consensus[0] = alike(first, 6, 0.9)
    estimator.consensus[1] = alike(second, 3, 0.5)  # the block's own consensus plays no part in its query
    estimator.drops(1, candidates[:1])
    assert model.rows == [pytest.approx([0.6, 0.9, 0, 0, 1.0] * 4 + [0.5, 1, 0, 0, 0.5])]
    estimator.drops(0, [alike(first, 4, 0.7)])
    assert model.rows == [pytest.approx([0.4, 0.7, 0, 0, 1.0] * 4 + [0.3, 0.5, 0, 0, 1.0])]
