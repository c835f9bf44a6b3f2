"""torchvision's networks from one end to the other: three of them; ``python -m evidence.zoo`` has the rest."""

import pytest

from evidence import zoo


@pytest.mark.parametrize("name", ["mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_every_step_is_ok(name, tmp_path):
    _, found = zoo.steps(name, tmp_path)
    assert [found[step] for step in ("compress", "fresh load", "narrow", "export")] == ["ok"] * 4
