"""Training on the grid: what the forward uses, where the gradient goes, and what is left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import models
from compress import (BlockConfig, KernelConfig, NetworkConfig, compress_network, decode, encode, find_grid,
                      kernel_shapes, quantize, snap_to_grid)
from deploy.qat import GridTraining, coded, decoded
from train import Trainer, accuracy, correct, estimate_batchnorm

KINDS = [(qtype, granularity) for qtype in ("INT", "FLOAT")
         for granularity in ("uniform", "per-channel", "learned", "log", "log-script")]


def setup(kernel, seed=0):
    """A linear layer as a one-kernel block, with its configuration and mask."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    blocks = models.find_blocks(model)
    config = NetworkConfig(tuple(BlockConfig((kernel,) * len(b.kernels), kernel_shapes(b)) for b in blocks))
    return model, blocks, config


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 32])
@pytest.mark.parametrize("qtype, granularity", KINDS)
@pytest.mark.parametrize("learned", [False, True])
def test_the_forward_uses_the_grid_values_of_the_kept_rows(bits, qtype, granularity, learned):
    kernel = KernelConfig(bits, 0.6, qtype, granularity)
    model, blocks, config = setup(kernel)
    masks = compress_network(blocks, config)
    with torch.no_grad():
        model[0].weight[masks["0"]] += 0.01 * torch.randn(3, 6)  # off the grid, as after a step
    training = GridTraining(blocks, config, masks, learned)
    used = training.weights()
    assert list(used) == ["0.weight"]
    expected = torch.zeros(5, 6)
    expected[masks["0"]] = quantize(model[0].weight.detach()[masks["0"]], bits, qtype, granularity)
    torch.testing.assert_close(used["0.weight"], expected, rtol=1e-6 if learned else 0, atol=1e-7 if learned else 0)


@pytest.mark.parametrize("bits", [2, 3, 8, 32])
@pytest.mark.parametrize("qtype, granularity", KINDS)
def test_grid_values_are_coded_without_loss(bits, qtype, granularity):
    model, blocks, config = setup(KernelConfig(bits, 0.6, qtype, granularity))
    masks = compress_network(blocks, config)
    grids = snap_to_grid(blocks, config, masks)
    state = model.state_dict()
    small = coded(state, blocks, masks, grids)
    back = decoded(small)
    assert list(back) == list(state)
    assert all(torch.equal(back[key].view(torch.int32), value.view(torch.int32)) for key, value in state.items())
    assert small["2.weight"] is state["2.weight"]  # the classifier is not compressed
    if bits == 32:
        assert small["0.weight"] is state["0.weight"]
    else:
        assert small["0.weight"]["codes"].nbytes == 18 * (2 if bits == 8 and granularity == "log-script" else 1)
    with torch.no_grad():
        model[0].weight[masks["0"].nonzero()[0], 0] += 1e-6
    moved = coded(model.state_dict(), blocks, masks, grids)["0.weight"]
    assert moved is not state["0.weight"] and torch.equal(moved, model[0].weight)  # off its grid it stays as it is
    assert coded(state, blocks, masks, None) == state


@pytest.mark.parametrize("kept", [torch.ones(4, dtype=torch.bool), torch.ones(3), torch.ones(3, 1, dtype=torch.bool),
                                  torch.arange(49) < 3, [True] * 3])
def test_codes_that_do_not_fit_are_refused(kept):
    entry = {"codes": torch.ones(3, 2, dtype=torch.int8), "kept": kept,
             "grid": {"bits": 4, "qtype": "INT", "granularity": "uniform", "scale": torch.tensor(0.5)}}
    with pytest.raises((ValueError, RuntimeError, AttributeError, IndexError)):
        decoded({"a.weight": entry})


def test_the_gradient_goes_straight_through_to_kept_rows_only():
    model, blocks, config = setup(KernelConfig(4, 0.6))
    masks = compress_network(blocks, config)
    used = GridTraining(blocks, config, masks, learned=False).weights()["0.weight"]
    coefficients = torch.randn(5, 6)
    (used * coefficients).sum().backward()
    assert torch.equal(model[0].weight.grad, coefficients * masks["0"][:, None])


def test_learned_scales_clip_the_gradient_and_get_that_of_lsq():
    model, blocks, config = setup(KernelConfig(3, 1.0))
    masks = compress_network(blocks, config)
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, 30).view(5, 6))
    training = GridTraining(blocks, config, masks, learned=True)
    with torch.no_grad():
        training.log_scales["0"].fill_(torch.tensor(0.1).log())  # codes -4…3: from -0.4 to 0.3
    coefficients = torch.randn(5, 6)
    (training.weights()["0.weight"] * coefficients).sum().backward()
    position = model[0].weight.detach() / 0.1
    codes = position.round().clamp(-4, 3)
    inside = (position.round() == codes).float()
    assert 0 < inside.sum() < 30
    torch.testing.assert_close(model[0].weight.grad, coefficients * inside)
    by_scale = (coefficients * (codes - inside * position)).sum()
    torch.testing.assert_close(training.log_scales["0"].grad, by_scale * 0.1)  # d scale / d log scale


@pytest.mark.parametrize("qtype, granularity", KINDS)
def test_in_place_holds_values_that_its_grids_reproduce_and_puts_everything_back(qtype, granularity):
    model, blocks, config = setup(KernelConfig(4, 0.6, qtype, granularity))
    masks = compress_network(blocks, config)
    with torch.no_grad():
        model[0].weight[masks["0"]] += 0.01 * torch.randn(3, 6)
    before = model[0].weight.detach().clone()
    training = GridTraining(blocks, config, masks, learned=True)
    with pytest.raises(RuntimeError, match="stop"), training.in_place() as grids:
        rows = model[0].weight.detach()[masks["0"]]
        assert torch.equal(decode(encode(rows, grids["0"]), grids["0"]), rows)
        assert not torch.equal(rows, before[masks["0"]])
        raise RuntimeError("stop")
    assert torch.equal(model[0].weight, before)


class Pictures:
    """A small set of images that a linear network can learn."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(n)
        self.labels = torch.arange(n) % 3
        self.images = torch.randn(n, 3, 8, 8, generator=generator) + 2 * F.one_hot(self.labels, 3).view(n, 3, 1, 1)

    def __len__(self):
        return len(self.labels)

    def batches(self, batch_size, device, generator=None, limit=0):
        count = min(limit, len(self)) if limit else len(self)
        order = torch.randperm(len(self), generator=generator)[:count] if generator else torch.arange(count)
        for index in order.split(batch_size):
            yield self.batch(index, device)

    def batch(self, index, device):
        return self.images[index], self.labels[index]


def small_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@pytest.mark.parametrize("learned", [False, True])
def test_the_trainer_keeps_weights_on_the_grid_and_learns(learned):
    model, train, test = small_network(), Pictures(96), Pictures(60)
    blocks = models.find_blocks(model, train.images[:4])
    config = NetworkConfig(tuple(BlockConfig((KernelConfig(3, 0.75),) * len(b.kernels), kernel_shapes(b))
                                 for b in blocks))
    masks = compress_network(blocks, config)
    trainer = Trainer(model, train, test, epochs=6, lr=0.01, weight_decay=0.01, patience=0, batch_size=16,
                      eval_images=60, eval_batch_size=60, generator=torch.Generator().manual_seed(0), blocks=blocks,
                      masks=masks, on_grid=GridTraining(blocks, config, masks, learned))
    best = trainer.run()
    assert best.acc >= 80
    assert trainer.history[-1].loss < trainer.history[0].loss
    assert accuracy(correct(model, test)) == best.acc  # what was measured is what is left in the network
    for block in blocks:
        for name, module in block.kernels.items():
            grid, rows = trainer.best_grids[name], module.weight.detach()[masks[name]]
            assert torch.equal(decode(encode(rows, grid), grid), rows)
            assert not module.weight[~masks[name]].any()
    scales = [grid.scale.item() for grid in trainer.best_grids.values()]
    assert len(set(scales)) == len(scales)


def test_a_first_step_is_that_of_a_network_with_the_grid_values():
    """One SGD-like check of the whole path: gradients at the grid values, applied to the full-precision weights."""
    model, images = small_network(), Pictures(16)
    blocks = models.find_blocks(model, images.images[:4])
    config = NetworkConfig(tuple(BlockConfig((KernelConfig(4, 0.75),) * len(b.kernels), kernel_shapes(b))
                                 for b in blocks))
    masks = compress_network(blocks, config)
    with torch.no_grad():
        for block in blocks:
            for name, module in block.kernels.items():
                module.weight[masks[name]] += 0.02 * torch.randn_like(module.weight[masks[name]])
    training = GridTraining(blocks, config, masks, learned=False)
    loss = F.cross_entropy(functional_call(model, training.weights(), (images.images,)), images.labels)
    gradients = torch.autograd.grad(loss, [m.weight for b in blocks for m in b.kernels.values()])
    snapped = small_network()
    snapped.load_state_dict(model.state_dict())
    there = models.find_blocks(snapped, images.images[:4])
    snap_to_grid(there, config, masks)
    F.cross_entropy(snapped(images.images), images.labels).backward()
    for (name, module), gradient in zip(((n, m) for b in there for n, m in b.kernels.items()), gradients):
        torch.testing.assert_close(gradient, module.weight.grad * masks[name].view(-1, 1, 1, 1))


def test_batchnorm_statistics_are_those_of_the_images():
    model, images = small_network(), Pictures(64)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    momentum = model[1].momentum
    estimate_batchnorm(model, images, 32, 64, torch.Generator().manual_seed(0))
    x = model[0](images.images).detach()
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, x.var((0, 2, 3)), rtol=2e-2, atol=1e-4)
    assert model[1].momentum == momentum and model.training

    before = {k: v.clone() for k, v in model.state_dict().items()}
    for limit, few in ((0, images), (1, images), (64, Pictures(1))):  # nothing to estimate from
        estimate_batchnorm(model, few, 32, limit, torch.Generator().manual_seed(0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_grids_that_follow_are_those_of_the_weights():
    model, blocks, config = setup(KernelConfig(4, 0.6, "FLOAT", "per-channel"))
    masks = compress_network(blocks, config)
    with torch.no_grad():
        model[0].weight[masks["0"]] *= 2.5
    with GridTraining(blocks, config, masks, learned=False).in_place() as grids:
        pass
    expected = find_grid(model[0].weight.detach()[masks["0"]], config.blocks[0].kernels[0])
    assert torch.equal(grids["0"].scale, expected.scale) and torch.equal(grids["0"].zero, expected.zero)
