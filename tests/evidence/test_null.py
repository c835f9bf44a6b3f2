"""Tests of the null search: uniform draws, voted as the ensembles vote."""

from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from compress import KernelShape, LayerBudget
from config import Config, override
from evidence.null import NullHLA, NullLLA, null_controller

FREE = LayerBudget(target=0.25, max_pruning=0.6, min_bits=3, max_drop=2.0, strategy="auto")
DEIT = [tuple(KernelShape(n_out, n_out * n_in) for n_out, n_in in ((1152, 384), (384, 384), (1536, 384), (384, 1536)))
        ] * 12
FLAT, PEAKED = [0.5] * 12, [1.0] + [0.6] * 2 + [0.4] * 4 + [0.1] * 5


def block(inputs=8):
    return SimpleNamespace(kernels={"a": nn.Conv2d(inputs, 100, 1), "b": nn.Conv2d(3, 100, 1)})


def test_the_null_search_draws_uniformly():
    high, low = NullHLA([100, 300, 200], [1.0, 0.1, 0.5], Config()), NullLLA(1, block(), 0.5, None, Config(), 3)
    assert high.train(6) == [] and high.entropy() is None
    targets = np.array([[b.target for b in high.budgets(deterministic=True)] for _ in range(400)])
    # s = 1 shifts up (0.35 0.35 0.30 0.25 0.20: mean 0.29), s = 0.1 down (0.21), s = 0.5 not (0.25).
    assert targets.mean(axis=0) == pytest.approx([0.29, 0.21, 0.25], abs=0.01)
    found = [low.search(FREE) for _ in range(400)]
    assert {(f.evaluations, f.entropy, len(f.updates), len(f.compared)) for f in found} == {(0, None, 0, 0)}
    kernels = [f.config.kernels[0] for f in found]
    # The mean of three draws from 0…14 is 7: keep 0.7; the vote seldom leaves the middle, single draws often would.
    keeps = np.array([k.keep for k in kernels])
    assert keeps.mean() == pytest.approx(0.7, abs=0.02) and keeps.std() == pytest.approx(0.107, abs=0.02)
    assert {(k.qtype, k.granularity) for k in kernels} == {("INT", "uniform")}
    assert {k.bits for k in kernels} >= {4, 5, 6}


@pytest.mark.parametrize("sensitivity", [FLAT, PEAKED], ids=["flat", "peaked"])
def test_null_controller_of_twelve_vit_blocks(sensitivity):
    """The figures for uniform draws follow from the decoders, budgets and votes alone."""
    null = null_controller(DEIT, sensitivity, Config(), draws=60)
    assert 6.2 < null["cr_mean"] < 7.3 and 56 < null["compliance_mean"] < 66 and null["draws"] == 60
    assert 0 < null["cr_std"] < 0.5 and 0 < null["compliance_std"] < 8
    assert null_controller(DEIT, sensitivity, Config(), draws=60) == null
    assert null_controller(DEIT, sensitivity, Config(seed=43), draws=60) != null
    config = override(Config(), {"search.method": "no-hla"})  # every block has the global bounds
    assert null_controller(DEIT, sensitivity, config, draws=60)["cr_mean"] == pytest.approx(9.15, abs=0.3)
