"""An additive estimate of the logit MSE (``search.estimate=table``): every kernel measured alone, candidates are sums.

Once per run the proxy measures each kernel with all others at theta_0: every bit width (type, granularity) with all
channels, and every keep of the agents' grid at full bits. The logit MSE of a candidate is then the sum of its kernels'
entries times a factor per block, which a few joint candidates of the block give. A candidate costs a look-up in place
of a forward pass. How far the table is from the proxy is measured on candidates that took no part in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from compress import FULL_BITS, BlockConfig, KernelConfig, NetworkConfig, channels_kept
from config import BASELINES
from estimate import WORST, Proxy, proxy_drop
from evidence.baselines import Problem, Space
from evidence.stats import rank_correlation
from search import derive_seed

JOINT = 8  # networks whose blocks give the factors
HELD_OUT = 16  # networks that are measured to tell how far the table is from the proxy
PER_BLOCK = 8  # candidates of a block among them, at least
LEAST = 1e-12  # of a logit MSE, for ratios


@dataclass(frozen=True)
class Entries:
    """One kernel's logit MSEs, alone, infinite where the logits are not finite. bits: by (bits, type, granularity);
    kept: channels, ascending, and their MSEs."""
    bits: dict[tuple[int, str, str], float]
    kept: list[int]
    kept_mse: list[float]

    def mse(self, config: KernelConfig, n_out: int) -> float:
        """Return the kernel's part of a candidate's MSE: of its bits, plus of its channels (linear between entries)."""
        pruned = np.interp(channels_kept(config.keep, n_out), self.kept, self.kept_mse) if config.keep < 1 else 0.0
        quantised = 0.0 if config.bits >= FULL_BITS else self.bits[config.bits, config.qtype, config.granularity]
        return float(pruned) + quantised


class EstimateTable:
    """The measured entries, with estimate.Proxy's interface: ``blocks``, :meth:`drops`, :meth:`errors`, :meth:`check`.

    entries: per block and kernel; ``factors``: per block; ``quality``: for result.json, see :func:`compare`.
    """

    def __init__(self, proxy: Proxy, entries: list[list[Entries]], factors: list[float], quality: dict):
        self.proxy, self.blocks, self.entries, self.factors = proxy, proxy.blocks, entries, factors
        self.quality = quality
        self.chosen: list[dict] = []  # logit MSE of each chosen network: as estimated, as measured

    def errors(self, index: int | None, configs) -> list[float]:
        """Return the estimated logit MSE of each candidate, as estimate.Proxy.errors."""
        if index is None:
            return [math.fsum(self.errors(i, [block])[0] for i, block in enumerate(network.blocks))
                    for network in configs]
        return [self.factors[index] * sum(entry.mse(kernel, shape.n_out) for entry, kernel, shape in zip(
            self.entries[index], config.kernels, config.shapes)) for config in configs]

    def drops(self, index: int, configs, worst: float = WORST) -> list[float]:
        """Return the estimated drop of each candidate of a block, in points, at most ``worst`` (Eq. 23, relative as the
        proxy's)."""
        return [proxy_drop(mse, self.proxy.unit, worst) for mse in self.errors(index, configs)]

    def check(self, chosen: NetworkConfig) -> dict:
        """Measure a chosen network by the proxy; return the quality with all that were chosen so far."""
        told, measured = (source.errors(None, [chosen])[0] for source in (self, self.proxy))
        self.chosen.append({key: mse if math.isfinite(mse) else None
                            for key, mse in (("table_mse", told), ("proxy_mse", measured))})
        return {**self.quality, "chosen": self.chosen}


def needs_table(config) -> bool:
    """Whether the search asks for a table."""
    return config.search.estimate == "table" or config.search.method == "table"


def relative_drops(config) -> bool:
    """Whether drops are told in parts of the logits' variance: in every search that goes past the paper's."""
    return needs_table(config) or config.search.method in BASELINES


def tabulated(proxy: Proxy, problem: Problem, config, once) -> Proxy | EstimateTable:
    """Return the proxy, or the table that it measures, where the search asks for one; ``once``: Phases.once."""
    if not needs_table(config):
        return proxy
    rng = np.random.default_rng(derive_seed(config.seed, "table"))
    return EstimateTable(proxy, **once("table: entries", lambda: measure(proxy, Space(problem), rng)))


def measure(proxy: Proxy, space: Space, rng) -> dict:
    """Return entries, factors and quality of a :class:`EstimateTable`; ``space``: what candidates are drawn from."""
    entries = measure_entries(proxy, space)
    table = EstimateTable(proxy, entries, [1.0] * len(entries), {})
    networks = [space.config(space.onto_target(space.draw(rng), rng)) for _ in range(JOINT)]
    for i in range(len(entries)):
        told, measured = _pairs(table, i, [network.blocks[i] for network in networks])
        table.factors[i] = float(np.exp(np.log(measured / told).mean())) if len(told) else 1.0
    bad = sum(math.isinf(mse) for row in entries for e in row for mse in (*e.bits.values(), *e.kept_mse))
    passes = sum(len(e.bits) + len(e.kept) - 1 for row in entries for e in row) + JOINT * len(entries)
    quality = {"passes": passes, "not_finite": bad, **compare(table, space, rng)}
    return {"entries": entries, "factors": table.factors, "quality": quality}


def compare(table: EstimateTable, space: Space, rng, count: int = HELD_OUT) -> dict:
    """Return how far the table is from the proxy on ``count`` networks drawn on the size: rank correlation and mean
    relative error of the whole networks, and of as many candidates of single blocks, PER_BLOCK or more of each (means
    over the blocks), all of those whose logits are finite; None where there are none, or nothing to rank."""
    networks = [space.config(space.onto_target(space.draw(rng), rng)) for _ in range(count)]

    def compared(index, configs):
        told, measured = _pairs(table, index, configs)
        rank = rank_correlation(told, measured) if len(told) else math.nan
        return None if math.isnan(rank) else rank, float(np.abs(told / measured - 1).mean()) if len(told) else None

    each = max(PER_BLOCK, count // len(table.blocks))
    blocks = [compared(i, [network.blocks[i] for network in networks[:each]]) for i in range(len(table.blocks))]
    whole, means = compared(None, networks), []
    for column in zip(*blocks):
        known = [value for value in column if value is not None]
        means.append(float(np.mean(known)) if known else None)
    return {"held_out": count, "networks_rank_correlation": whole[0], "networks_mean_error": whole[1],
            "blocks_rank_correlation": means[0], "blocks_mean_error": means[1]}


def _pairs(table: EstimateTable, index: int | None, configs) -> np.ndarray:
    """Logit MSEs of candidates as estimated and as measured, [2, n], without those where one of the two is not finite;
    at least LEAST."""
    pairs = np.array([source.errors(index, configs) for source in (table, table.proxy)])
    return np.maximum(pairs[:, np.isfinite(pairs).all(0)], LEAST)


def measure_entries(proxy: Proxy, space: Space) -> list[list[Entries]]:
    """Measure every kernel alone at the bits, types, granularities and channels of ``space``."""
    rows, limits = [], space.problem.limits
    widths = [KernelConfig(bits, 1.0, qtype, granularity) for qtype in space.qtypes
              for granularity in space.granularities for bits in range(limits.bits_min, limits.bits_max + 1)]
    for i, shapes in enumerate(space.block_shapes):
        row = []
        for k, shape in enumerate(shapes):
            def alone(configs):
                whole = [KernelConfig()] * len(shapes)
                errors = proxy.errors(i, [BlockConfig((*whole[:k], own, *whole[k + 1:]), shapes) for own in configs])
                return [error if math.isfinite(error) else math.inf for error in errors]

            keeps = [keep for keep in space.keep_grid(shape) if channels_kept(keep, shape.n_out) < shape.n_out]
            row.append(Entries({(c.bits, c.qtype, c.granularity): mse for c, mse in zip(widths, alone(widths))},
                               [*(channels_kept(keep, shape.n_out) for keep in keeps), shape.n_out],
                               [*alone([KernelConfig(FULL_BITS, keep) for keep in keeps]), 0.0]))
        rows.append(row)
    return rows
