"""A policy from a file in the place of the search, with the interface of the agents (``search.py``)."""

from __future__ import annotations

from compress import BlockConfig, LayerBudget
from config import Config
from search import Found, UniformBudgets, uniform_budgets


def policy_for(policy, blocks, config: Config, log):
    """Return the (NetworkConfig, budgets) of a ``deploy.policies.Policy`` for these blocks; None without a policy."""
    if policy is None:
        return None
    chosen, budgets = policy.fit(blocks, config)
    log.info(f"policy of {policy.where}: CR {chosen.cr:.2f}, {chosen.joined.average_bits:.2f} bits, keep "
             f"{chosen.joined.average_keep:.3f}; nothing is searched")
    if budgets is None:
        log.note(f"{policy.where} has no budgets: compliance is that of {config.search.target:g} and the global bounds "
                 "for every block")
    return chosen, budgets or uniform_budgets(len(blocks), config.search, config.compress)


class GivenBudgets(UniformBudgets):
    """In place of the high-level agents: the budgets of a policy."""

    def __init__(self, budgets: tuple[LayerBudget, ...]):
        self.given = budgets

    def budgets(self, deterministic: bool) -> tuple[LayerBudget, ...]:
        """Return the policy's budgets."""
        return self.given


class GivenBlock:
    """In place of a block's low-level agents: its configuration in a policy."""

    state_dict, load_state_dict = UniformBudgets.state_dict, UniformBudgets.load_state_dict

    def __init__(self, config: BlockConfig):
        self.config = config

    def search(self, budget: LayerBudget) -> Found:
        """Return the configuration; nothing is evaluated."""
        return Found(self.config)
