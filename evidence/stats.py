"""Intervals and tests for accuracies, in percentage points."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion, in points. Raises ValueError for what is none."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n}")
    p, z2 = hits / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def paired_interval(lost: int, won: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a drop in accuracy on the same ``n`` images, in percentage points.

    ``lost`` were right before and are wrong after, ``won`` the reverse; the drop itself is 100 (lost - won) / n.
    Agresti and Min (2005): half an image is added to each of the four cells, then
    (b - c) / n ± z sqrt(b + c - (b - c)^2 / n) / n. Raises ValueError for impossible counts.
    """
    if min(lost, won) < 0 or lost + won > n or n == 0:
        raise ValueError(f"{lost} lost and {won} won of {n}")
    b, c, total = lost + 0.5, won + 0.5, n + 2
    half = Z95 * math.sqrt(b + c - (b - c) ** 2 / total) / total
    return 100 * ((b - c) / total - half), 100 * ((b - c) / total + half)


def t95(df: float) -> float:
    """Return the two-sided 95 % quantile of Student's t with ``df`` >= 1 degrees of freedom: t = sqrt(df) tan(a), where
    the density of the angle a is proportional to cos(a)^(df - 1)."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (df - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(df) * math.tan(np.interp(0.95 * mass[-1], mass, angles))


def mean_interval(values) -> tuple[float, float, float]:
    """Return the mean of two or more values and its 95 % interval by Student's t."""
    mean, half = float(np.mean(values)), t95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def crossed_interval(before, after) -> tuple[float, float, float]:
    """Return the mean difference ``after`` - ``before`` of accuracies in percentage points and its 95 % interval.

    Arguments: which images were right with several seeds, bool [seeds, n] each, paired by seed and image. Both count as
    drawn at random: var = var over the images of the mean over the seeds, / n, + var over the seeds of the mean over
    the images, / seeds (with one seed, of the images alone). The quantile is Student's, with the degrees of freedom of
    Welch and Satterthwaite for that sum: two or three seeds say little of how much seeds differ. The interval is too
    wide where seeds hardly differ, since what is particular to a seed and an image counts twice, and with so few seeds
    somewhat too narrow where they differ by far more than their images make them.
    """
    difference = 100 * (np.asarray(after, float) - np.asarray(before, float))
    seeds, n = difference.shape
    images = difference.mean(0).var(ddof=1) / n
    drawn = difference.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0
    df = (images + drawn) ** 2 / (images**2 / (n - 1) + drawn**2 / max(seeds - 1, 1)) if images + drawn else n - 1
    mean, half = float(difference.mean()), t95(df) * math.sqrt(images + drawn)
    return mean, mean - half, mean + half


def rank_correlation(a, b) -> float:
    """Return Spearman's rank correlation of two sequences, equal values at their mean rank; nan where one is flat."""
    ranks = []
    for values in (a, b):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p of McNemar's test: the probability of so uneven a split of the images on which two
    networks differ, if each falls to either side with probability 1/2; 1 where there is none."""
    n, term, total = lost + won, 1, 0
    for k in range(min(lost, won) + 1):
        total += term  # binomial(n, k)
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)
