"""The residual networks for CIFAR-10: their sizes, and a block by hand."""

import pytest
import torch

from evidence import networks


@pytest.mark.parametrize("make, params, kernels", [(networks.resnet20, 269_722, 20), (networks.resnet56, 853_018, 56)])
def test_parameters_and_names_are_those_of_the_published_weights(make, params, kernels):
    model = make().eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(p.dim() > 1 for p in model.parameters()) == kernels
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer3.2.bn2.running_var", "linear.bias"} \
        <= set(model.state_dict())
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_shortcut_takes_every_second_pixel_and_has_zero_channels_on_both_sides():
    block, x = networks.Block(2, 4, 2).eval(), torch.rand(1, 2, 6, 6)
    torch.nn.init.zeros_(block.conv2.weight)  # what is left is the shortcut
    y = block(x)
    assert y.shape == (1, 4, 3, 3) and not y[:, [0, 3]].any() and torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
