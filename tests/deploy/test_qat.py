"""Training on the grid: what the forward pass uses, where the gradient goes, and what the network holds afterwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import data
import models
from compress import (BlockConfig, KernelConfig, NetworkConfig, compress_network, decode, encode, kernel_shapes,
                      quantize, snap_to_grid)
from deploy.qat import Distillation, GridTraining
from networks import Caching, snapshot
from train import Recipe, Trainer, accuracy, correct

KINDS = [(qtype, granularity) for qtype in ("INT", "FLOAT")
         for granularity in ("uniform", "per-channel", "learned", "fitted", "log", "log-script")]


def compressed(model, kernel, example=None):
    """``model`` compressed in place and then moved off its grids, as by a step → blocks, configuration, masks."""
    blocks = models.find_blocks(model, example)
    config = NetworkConfig(tuple(BlockConfig((kernel,) * len(b.kernels), kernel_shapes(b)) for b in blocks))
    masks = compress_network(blocks, config)
    with torch.no_grad():
        for name, module in ((name, module) for block in blocks for name, module in block.kernels.items()):
            module.weight[masks[name]] += 0.01 * torch.randn_like(module.weight[masks[name]])
    return blocks, config, masks


def linear(kernel):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, *compressed(model, kernel, torch.ones(2, 6))


def small_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@pytest.mark.parametrize("bits", [2, 4, 32])
@pytest.mark.parametrize("qtype, granularity", KINDS)
def test_the_forward_uses_the_grid_values_of_the_kept_rows(bits, qtype, granularity):
    model, blocks, config, masks = linear(KernelConfig(bits, 0.6, qtype, granularity))
    used = GridTraining(blocks, config, masks).weights()
    assert list(used) == ["0.weight"]
    expected = torch.zeros(5, 6)
    expected[masks["0"]] = quantize(model[0].weight.detach()[masks["0"]], bits, qtype, granularity)
    torch.testing.assert_close(used["0.weight"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("qtype, scale", [("INT", 0.1), ("FLOAT", 0.1), ("FLOAT", 1.0)])
def test_learned_scales_clip_the_gradient_and_get_that_of_lsq(qtype, scale):
    model, blocks, config, masks = linear(KernelConfig(3, 1.0, qtype))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, 30).view(5, 6))
        training = GridTraining(blocks, config, masks)
        training.log_scales["0"].fill_(torch.tensor(scale).log())  # INT, codes -4…3 of 0.1: from -0.4 to 0.3
    low, high = (code - (training.start["0"].zero or 0) for code in training.start["0"].code_range)
    coefficients = torch.randn(5, 6)
    (training.weights()["0.weight"] * coefficients).sum().backward()
    position = model[0].weight.detach() / scale
    codes = position.round().clamp(low, high)
    inside = (position.round() == codes).float()
    torch.testing.assert_close(model[0].weight.grad, coefficients * inside)
    by_scale = (coefficients * (codes - inside * position)).sum() * scale  # d scale / d log scale
    torch.testing.assert_close(training.log_scales["0"].grad, by_scale)


@pytest.mark.parametrize("qtype, granularity", KINDS)
def test_in_place_holds_values_that_its_grids_reproduce_and_puts_everything_back(qtype, granularity):
    model, blocks, config, masks = linear(KernelConfig(4, 0.6, qtype, granularity))
    before = model[0].weight.detach().clone()
    training = GridTraining(blocks, config, masks)
    with pytest.raises(RuntimeError, match="stop"), training.in_place() as grids:
        rows = model[0].weight.detach()[masks["0"]]
        assert torch.equal(decode(encode(rows, grids["0"]), grids["0"]), rows)
        assert not torch.equal(rows, before[masks["0"]])
        raise RuntimeError("stop")
    assert torch.equal(model[0].weight, before)


def test_the_trainer_keeps_weights_on_the_grid_and_learns():
    train, test = data.synthetic(3, 96, 60, 12, 0)
    model = small_network()
    blocks, config, masks = compressed(model, KernelConfig(3, 0.75), torch.zeros(2, 3, 12, 12))
    trainer = Trainer(model, train, test, Recipe("finetune", 6, 0.01, 0.01), batch_size=16, eval_images=60,
                      eval_batch_size=60, generator=torch.Generator().manual_seed(0), blocks=blocks, masks=masks,
                      on_grid=GridTraining(blocks, config, masks))
    best = trainer.run()
    assert trainer.history[-1].loss < 0.8 * trainer.history[0].loss
    assert accuracy(correct(model, test)) == best.acc > 60  # what was measured is what is left in the network
    assert trainer.best_grids["0"].scale != trainer.best_grids["3"].scale
    for name, grid in trainer.best_grids.items():
        rows = model[int(name)].weight.detach()[masks[name]]
        assert torch.equal(decode(encode(rows, grid), grid), rows) and not model[int(name)].weight[~masks[name]].any()


def test_gradients_are_those_of_a_network_that_holds_the_grid_values():
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    model, snapped = small_network(), small_network()
    blocks, config, masks = compressed(model, KernelConfig(4, 0.75), images[:4])
    training = GridTraining(blocks, config, masks)
    F.cross_entropy(functional_call(model, training.weights(), (images,)), labels).backward()
    snapped.load_state_dict(model.state_dict())
    snap_to_grid(models.find_blocks(snapped, images[:4]), config, masks)
    F.cross_entropy(snapped(images), labels).backward()
    for at in (0, 3):
        torch.testing.assert_close(model[at].weight.grad, snapped[at].weight.grad * masks[str(at)].view(-1, 1, 1, 1))


@pytest.mark.parametrize("half", [False, True])
def test_distillation_by_hand_and_the_teacher_stays(half):
    model, x, y = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    model.seen = model.weight.sum()  # that hangs on a graph
    loss = Distillation(model, {"weight": 2 * torch.eye(2)}, weight=0.5, temperature=2.0, half=half)
    nn.init.zeros_(model.weight)
    model.train()
    student = torch.tensor([[0.0, 4.0]], requires_grad=True)
    p, q = torch.softmax(torch.tensor([1.0, 0.0]), 0), torch.softmax(torch.tensor([0.0, 2.0]), 0)  # logits / 2
    expected = torch.log(1 + torch.exp(torch.tensor(-4.0))) + 0.5 * 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(loss(student, y, x), expected)
    loss(student, y, x).backward()
    assert student.grad is not None and all(p.grad is None for p in loss.teacher.parameters())
    assert not loss.teacher.training and float(loss.teacher.weight.detach().sum()) == 4


def test_the_teacher_is_theta_0_also_where_a_network_makes_something_of_its_weights():
    model, x = Caching().eval(), torch.randn(4, 3, 8, 8)
    theta0, logits = snapshot(model), model(x)
    nn.init.ones_(model.b.weight)  # what was compressed
    assert torch.equal(Distillation(model, theta0, 1.0, 1.0, half=False).teacher(x), logits)
