"""The refinement of plus on a problem whose kernels have a joint error."""

import numpy as np
import pytest

from compress import KernelConfig
from evidence import plus
from evidence.baselines import Space, optimum
from problems import BUDGET, TARGET, SixKernels, problem


@pytest.fixture(scope="module")
def six():
    made = SixKernels()
    made.errors_of = made.table.errors  # the table's own
    made.table.proxy = type("Joint", (), {"errors": staticmethod(lambda index, networks: [
        sum(made.drop(i, block) for i, block in enumerate(network.blocks)) for network in networks])})
    return made


def test_exchanges_end_no_worse_than_they_begin_within_the_size_and_the_passes(six):
    space = Space(problem(six, budget=60))
    start = sum(six.drop(i, block) for i, block in enumerate(optimum(space, space.allowed).blocks))
    note = plus.refined(space, np.random.default_rng(0))
    assert space.best_drop <= start and space.best.retained <= TARGET and 0 <= space.remaining < plus.MEASURED + 57
    assert six.gain(space.best) > 0.9 and f"{space.best_drop:.4g} after" in note


def test_an_exchange_changes_something_and_keeps_the_size(six):
    space, rng = Space(problem(six, budget=BUDGET)), np.random.default_rng(0)
    genome = space.genome(space.config(np.array([[1, 1, 0, 0]] * 6)))
    assert genome.tolist() == [[1, 1, 0, 0]] * 6
    children = [plus.exchange(space, space.fitted(genome, rng), rng) for _ in range(30)]
    assert all(space.cost(space.config(child)) <= space.problem.allowed for child in children)
    assert len({child.tobytes() for child in children}) > 10
    assert space.genome(space.grouped([KernelConfig(3, 0.5)] * 6)).tolist() == [[0, 0, 0, 0]] * 6
