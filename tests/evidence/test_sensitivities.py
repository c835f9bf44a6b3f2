"""Every measure against numbers worked out by hand, and against autograd's own Hessian."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from evidence import sensitivities
from evidence.sensitivities import block_values, sensitivity
from networks import seeded

METHODS = ("gradient", "snip", "grasp", "hessian")


class Line(nn.Module):
    """Logits (a x0 + b0 x1 + b1 x2, 0): loss log(1 + exp(-z)) for class 0, log(1 + exp(z)) for class 1."""

    def __init__(self, a=0.0, b=(0.0, 0.0)):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([a])), nn.Parameter(torch.tensor(b))

    def forward(self, x):
        z = x[:, :1] * self.a + (x[:, 1:] * self.b).sum(1, keepdim=True)
        return torch.cat([z, torch.zeros_like(z)], dim=1)


def block(*names):
    return SimpleNamespace(parameters=names)


BLOCKS = [block("a"), block("b")]
X, Y = torch.tensor([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -8.0], [0.0, 0.0, 4.0]]), torch.tensor([0, 0, 1, 1])


def test_hessian_of_a_diagonal_one_is_exact_with_any_vector():
    """Each image touches one weight, so H is diagonal: x^2/4 at z = 0, mean over four images."""
    for seed in range(3):
        assert block_values("hessian", Line(), BLOCKS, X, Y, seeded(seed), probes=1) == pytest.approx(
            [16 / 4 / 4, (4 + 64 + 16) / 4 / 4])


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)  # and is measured all the same
    return model, [block("0.weight", "0.bias"), block("3.weight")], torch.randn(40, 5), torch.arange(40) % 3


def exact(model, blocks, x, y):
    """theta, g and H of the blocks' parameters laid side by side, and each block's slice."""
    names = [name for b in blocks for name in b.parameters]
    start = [dict(model.named_parameters())[name].detach() for name in names]

    def loss(flat):
        parts = flat.split([p.numel() for p in start])
        values = {name: part.view(p.shape) for name, part, p in zip(names, parts, start)}
        return F.cross_entropy(torch.func.functional_call(model, values, x), y)

    model.eval()
    theta = torch.cat([p.flatten() for p in start])
    first = sum(p.numel() for p in start[:len(blocks[0].parameters)])
    return (theta, torch.autograd.functional.jacobian(loss, theta), torch.autograd.functional.hessian(loss, theta),
            [slice(first), slice(first, None)])


def test_all_against_autograds_hessian(network):
    """More images than are taken at once, and blocks whose parameters have mixed second derivatives."""
    model, blocks, x, y = network
    theta, g, hessian, parts = exact(model, blocks, x, y)
    product = theta * (hessian @ g)
    for method, tolerance, values in (("gradient", 1e-4, [g[p].abs().mean() for p in parts]),
            ("snip", 1e-4, [(theta * g)[p].abs().sum() for p in parts]),
            ("grasp", 1e-3, [product[p].sum().abs() for p in parts]),
            ("hessian", 0.15, [hessian.diagonal()[p].sum() for p in parts])):
        got = block_values(method, model, blocks, x, y, seeded(), probes=800)
        assert got == pytest.approx([value.item() for value in values], rel=tolerance)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == [(False, None)] * 2 + [(True, None)] * 4


def test_flat_and_broken_losses():
    """A classifier that sees nothing has no sensitivity; numbers that are not finite are an error."""
    for method in METHODS:
        assert sensitivity(method, Line(), BLOCKS, torch.zeros(4, 3), Y, seeded()) == [1.0, 1.0]
        with pytest.raises(FloatingPointError, match=f"sensitivity={method}"):
            sensitivity(method, Line(a=float("nan")), BLOCKS, X, Y, seeded())


def test_a_negative_trace_counts_as_none(monkeypatch):
    for values, expected in (([-3.0, 2.0, 1.0], [0.0, 1.0, 0.5]), ([-1.0, 0.0], [1.0, 1.0])):
        monkeypatch.setattr(sensitivities, "block_values", lambda *_: values)
        assert sensitivity("hessian", None, BLOCKS, X, Y, seeded()) == expected


@pytest.mark.parametrize("name, patch", [("deit_tiny_patch16_224", 16), ("mobilenetv2_100", 0)])
def test_second_derivatives_of_attention_and_convolutions(name, patch):
    model = models.build(name, 3, 32, 0.25, patch)
    values = sensitivity("grasp", model, models.find_blocks(model), torch.randn(3, 3, 32, 32), torch.arange(3), None)
    assert max(values) == 1.0 and min(values) >= 0.0
