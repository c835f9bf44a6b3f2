"""BatchNorm's statistics, estimated again from training images."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
from deploy.batchnorm import estimate_batchnorm
from networks import equal, snapshot


class Frozen(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Passing(nn.BatchNorm2d):
    def forward(self, x):  # hands its momentum on, which has to be a number
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training, momentum=self.momentum)


def network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8), nn.Dropout(0.5)), Passing(8), nn.Flatten())
    model[0][1].running_mean.fill_(9.0)
    return model


def test_batchnorm_statistics_are_those_of_the_images():
    model, (images, _) = network(), data.synthetic(3, 64, 1, 8, 0)
    model[1].unused = nn.BatchNorm2d(8)  # no image reaches it: it keeps its statistics
    model[1].unused.running_mean.fill_(2.0)
    before = snapshot(model)
    assert estimate_batchnorm(model, images, 48, 64, torch.Generator().manual_seed(0))  # 48 images, then 16
    seen = torch.cat([x for x, _ in images.batches(48, "cpu", torch.Generator().manual_seed(0), 64)])
    x = model[0][:2](seen).detach()
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, x.var((0, 2, 3)), rtol=2e-2, atol=1e-4)
    assert model[1].momentum == 0.1 and model.training and model[0][2].training and not model[0][1].training
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == {
        "1.running_mean", "1.running_var"}


@pytest.mark.parametrize("norm, limit", [(nn.BatchNorm2d(8), 0), (nn.BatchNorm2d(8), 1), (nn.GroupNorm(2, 8), 64),
                                         (nn.BatchNorm2d(8, track_running_stats=False), 64)])
def test_nothing_to_estimate(norm, limit):
    model, (images, _) = network(), data.synthetic(3, 64, 1, 8, 0)
    model[1] = norm
    before = snapshot(model)
    assert not estimate_batchnorm(model, images, 32, limit, torch.Generator().manual_seed(0))
    assert equal(before, model.state_dict())
