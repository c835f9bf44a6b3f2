"""The intervals and McNemar's test against cases worked by hand."""

import math

import pytest

from evidence.stats import crossed_interval, mcnemar, mean_interval, paired_interval, t95, wilson


@pytest.mark.parametrize("hits, n, low, high", [
    # Roots of (hits/n - p)^2 = z^2 p (1 - p)/n in 40 decimal digits, z = 1.95996398454.
    (0, 10, 0.0, 27.753280), (5, 10, 23.659309, 76.340691), (10, 10, 72.246720, 100.0), (1, 3, 6.149194, 79.234040),
    (1112, 1280, 84.914276, 88.615053)])
def test_wilson_by_hand(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-6)
    assert wilson(hits, n)[0] >= 0 and wilson(hits, n)[1] <= 100
    for bad in ((-1, n), (n + 1, n), (0, 0), (0, -1)):
        with pytest.raises(ValueError):
            wilson(*bad)


def test_paired_interval_by_hand():
    # b* = 12.5, c* = 5.5, n* = 102: (7 / 102) ± 1.959964 sqrt(18 - 49 / 102) / 102
    half = 1.959963984540054 * math.sqrt(18 - 49 / 102) / 102
    assert paired_interval(12, 5, 100) == pytest.approx((100 * (7 / 102 - half), 100 * (7 / 102 + half)))
    low, high = paired_interval(5, 12, 100)
    assert (-high, -low) == pytest.approx(paired_interval(12, 5, 100))
    for bad in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(ValueError):
            paired_interval(*bad)


@pytest.mark.parametrize("lost, won, p", [
    (0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (4, 4, 1.0),
    (9, 1, 2 * (1 + 10) / 1024), (10, 2, 2 * (1 + 12 + 66) / 4096)])
def test_mcnemar_by_hand(lost, won, p):
    assert mcnemar(lost, won) == pytest.approx(p)


def test_crossed_interval_by_hand():
    before, after = [[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]
    # differences 0 0 1 0 and 0 1 1 0: per image 0, 1/2, 1, 0 of variance 11/48, per seed 1/4 and 1/2 of variance 1/32
    images, seeds = 11 / 48 / 4, 1 / 32 / 2
    half = 100 * t95((images + seeds) ** 2 / (images**2 / 3 + seeds**2 / 1)) * math.sqrt(images + seeds)
    assert crossed_interval(before, after) == pytest.approx((37.5, 37.5 - half, 37.5 + half))
    half = 100 * 3.1824463 * math.sqrt(0.25 / 4)  # one seed: 0 0 1 0, of variance 1/4, three degrees of freedom
    assert crossed_interval(before[:1], after[:1]) == pytest.approx((25, 25 - half, 25 + half))
    for df, t in ((1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (10, 2.2281389), (9999, 1.9602013)):
        assert t95(df) == pytest.approx(t, rel=1e-5)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.3026527 / 3**0.5, 2 + 4.3026527 / 3**0.5))
