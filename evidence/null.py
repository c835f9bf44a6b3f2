"""The null search: every action drawn uniformly and voted as the ensembles vote.

It shows what compression ratio and compliance follow from decoders, budgets and votes alone, without anything learnt.
"""

from __future__ import annotations

import numpy as np

from compress import BlockConfig, LayerBudget, NetworkConfig, kernel_shapes
from config import BASELINES
from search import (Found, UniformBudgets, compliance, decode_hla, decode_lla, derive_seed, hla_nvec, lla_nvec,
                    uniform_budgets, vote_actions, vote_budgets)


class NullHLA(UniformBudgets):
    """In place of the high-level agents: tiers and strategies drawn uniformly, voted as theirs are (search=null)."""

    def __init__(self, params, sensitivity, config):
        super().__init__(params, sensitivity, config)
        self.rng = np.random.default_rng(derive_seed(config.seed, "null", "hla"))

    def budgets(self, deterministic: bool) -> tuple[LayerBudget, ...]:
        """Return one budget per block."""
        return _drawn_budgets(self.sensitivity, self.config, self.rng)

    def state_dict(self) -> dict:
        """Return the random state."""
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.rng.bit_generator.state = state["rng"]


class NullLLA:
    """In place of a block's low-level agents: actions drawn uniformly, voted as theirs are (search=null)."""

    state_dict, load_state_dict = NullHLA.state_dict, NullHLA.load_state_dict

    def __init__(self, index, block, sensitivity, estimator, config, blocks):
        self.shapes, self.config = kernel_shapes(block), config
        self.rng = np.random.default_rng(derive_seed(config.seed, "null", index))

    def search(self, budget: LayerBudget) -> Found:
        """Vote on uniformly drawn actions."""
        return Found(_drawn_block(self.shapes, budget, self.config, self.rng))


def _drawn_budgets(sensitivity, config, rng):
    nvec = hla_nvec(len(sensitivity))
    return vote_budgets([decode_hla(rng.integers(nvec), sensitivity, config.compress) for _ in config.hla.algorithms])


def _drawn_block(shapes, budget, config, rng):
    nvec = lla_nvec(len(shapes))
    action = vote_actions([rng.integers(nvec) for _ in config.lla.algorithms])
    return BlockConfig(decode_lla(action, budget, config.compress, shapes), shapes)


def null_controller(shapes, sensitivity, config, draws: int = 200) -> dict:
    """Return mean and standard deviation of CR and compliance over ``draws`` policies of a controller that draws every
    action uniformly and votes as the ensembles do; no network is evaluated. shapes: per block a tuple of KernelShape.
    """
    rng, found = np.random.default_rng(derive_seed(config.seed, "null")), []
    for _ in range(draws):
        budgets = (uniform_budgets(len(shapes), config.search, config.compress)
                   if config.search.method in ("no-hla", *BASELINES) else _drawn_budgets(sensitivity, config, rng))
        drawn = NetworkConfig(tuple(_drawn_block(*pair, config, rng) for pair in zip(shapes, budgets)))
        found.append((drawn.cr, compliance(drawn, budgets)))
    crs, compliances = zip(*found)
    return {"draws": draws, "cr_mean": float(np.mean(crs)), "cr_std": float(np.std(crs)),
            "compliance_mean": float(np.mean(compliances)), "compliance_std": float(np.std(compliances))}
