"""Policies from a file: the configuration of every kernel and the budget of every block, read as untrusted input."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, fields

from compress import NetworkConfig, from_policy
from config import Config, InputError, override
from support.files import member, parse_json, quoted, read_json
from search import STRATEGIES, LayerBudget, uniform_budgets

MAX_BYTES = 4 << 20  # of a policy.json; one of 120 kernels has about 40,000


@dataclass(frozen=True)
class Policy:
    """A policy that is JSON so far; :meth:`fit` checks the rest. ``where``: the file, "given" for a dictionary."""
    where: str
    sha256: str
    content: object = field(repr=False)

    @property
    def source(self) -> dict:
        """What result.json says of it."""
        return {"file": self.where, "sha256": self.sha256}

    def settings(self, config: Config) -> Config:
        """The settings of a run that applies it: one cycle, and the digest, by which its run directory is known.
        Raises InputError where they ask for another digest."""
        if config.policy_sha256 not in ("", self.sha256):
            raise InputError(f"{self.where}: its SHA-256 is {self.sha256}, policy_sha256 asks for "
                             f"{quoted(config.policy_sha256)}; give the policy that the run began with")
        return override(config, {"policy": self.where, "policy_sha256": self.sha256, "search.cycles": 1})

    def fit(self, blocks, config: Config) -> tuple[NetworkConfig, tuple[LayerBudget, ...], list[str]]:
        """→ (configuration, budget of every block, notes) for a network with these blocks.

        Every value is checked against the settings' bounds. A file without budgets gets neutral ones: rho_target and
        the global bounds for every block. Raises InputError, one line, naming the file, the place and the mending.
        """
        chosen = from_policy(self.content, blocks, config.compress, self.where)
        entries = {block["name"]: (block, f"{self.where}, blocks[{n}]")
                   for n, block in enumerate(self.content["blocks"])}
        if not any("budget" in block for block, _ in entries.values()):
            note = (f"{self.where} has no budgets: compliance is that of {config.search.target:g} and the global "
                    "bounds for every block")
            return chosen, uniform_budgets(len(blocks), config.search, config.compress), [note]
        return chosen, tuple(_budget(*entries[block.name]) for block in blocks), []


def read(source) -> Policy:
    """The policy in a file (a path) or a dictionary. Raises InputError for what is absent, too large or no JSON."""
    if isinstance(source, (str, os.PathLike)):
        where = os.fspath(source)
        try:
            content, raw = read_json(where, MAX_BYTES)
        except OSError as error:
            raise InputError(f"{where}: the policy cannot be read ({error.strerror or error}); give the policy.json of "
                             "a run") from None
        except ValueError as error:
            raise InputError(f"{where}: not a policy: {_line(error)}; give the policy.json of a run") from None
        return Policy(where, hashlib.sha256(raw).hexdigest(), content)
    try:
        raw = json.dumps(source, sort_keys=True).encode()
        content = parse_json(raw)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"policy: not plain data as in a policy.json: {_line(error)}; give a run's policy") from None
    return Policy("given", hashlib.sha256(raw).hexdigest(), content)


def _line(error) -> str:
    return quoted(" ".join(str(error).split()))[1:-1] or type(error).__name__


def _budget(block, place) -> LayerBudget:
    """The checked budget of a policy's block."""
    entry, place = member(block, "budget", dict, place), f"{place}.budget"
    kinds = {"int": int, "float": (int, float), "str": str}
    values = {item.name: member(entry, item.name, kinds[item.type], place) for item in fields(LayerBudget)}
    for key, low, high in (("target", 0.01, 1), ("max_pruning", 0, 1), ("min_bits", 2, 32), ("max_drop", 0, 1e6)):
        if not low <= values[key] <= high:
            raise InputError(f"{place}: {key}={quoted(values[key])}, expected {low:g} to {high:g}; set it right, or "
                             "take every block's budget out")
    if values["strategy"] not in STRATEGIES:
        raise InputError(f"{place}: strategy={quoted(values['strategy'])}, expected one of {', '.join(STRATEGIES)}")
    return LayerBudget(**values)
