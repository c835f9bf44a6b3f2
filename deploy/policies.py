"""Policies as plain data: the configuration of every kernel and the budget of every block, read as untrusted input."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from itertools import zip_longest

from compress import (FULL_BITS, STRATEGIES, BlockConfig, KernelConfig, LayerBudget, NetworkConfig, channels_kept,
                      kernel_retained, kernel_shapes)
from config import Config, InputError, override
from support.files import one_line, parse_json, read_json, shown

MAX_BYTES = 4 << 20  # of a policy.json; one of 120 kernels has about 40,000
GIVE = "give the policy.json of a run"
NUMBER = (int, float)
BOUNDS = {"target": (NUMBER, 0.01, 1), "max_pruning": (NUMBER, 0, 1), "min_bits": (int, 2, 32),
          "max_drop": (NUMBER, 0, 1e6)}  # type and range of what is in a budget


@dataclass(frozen=True)
class Policy:
    """A policy of which nothing is checked yet but that it is JSON; :meth:`fit` checks the rest."""
    where: str  # the file, "given" for a dictionary
    sha256: str
    content: object = field(repr=False)

    @property
    def source(self) -> dict:
        """Return what result.json says of it."""
        return {"file": self.where, "sha256": self.sha256}

    def settings(self, config: Config) -> Config:
        """Return the settings of a run that applies it: one cycle, and the digest, by which the run directory is told
        from others. Raises InputError where the settings ask for another digest."""
        if config.policy_sha256 not in ("", self.sha256):
            raise InputError(f"{self.where}: its SHA-256 is {self.sha256}, policy_sha256 asks for "
                             f"{quoted(config.policy_sha256)}; give the policy that the run began with")
        return override(config, {"policy": self.where, "policy_sha256": self.sha256, "search.cycles": 1})

    def fit(self, blocks, config: Config) -> tuple[NetworkConfig, tuple[LayerBudget, ...] | None]:
        """Return (configuration, budget of every block) for a network with these blocks, which the policy has to list
        in order, kernel by kernel; budgets are None where it has none.

        Of each kernel the requested values and the number of channels are read, and checked against the settings'
        bounds; 32 bits, as a block that was given back has, are always allowed. Raises InputError, one line: file,
        place and how to mend it.
        """
        if type(self.content) is not dict or self.content.get("format") != 1:
            raise InputError(f"{self.where}: not a policy.json of this program, which has format 1; {GIVE}")
        entries, chosen = _named(self.content, "blocks", [block.name for block in blocks], self.where), []
        for block, (entry, place) in zip(blocks, entries):
            kernels, shapes = _named(entry, "kernels", list(block.kernels), place), kernel_shapes(block)
            chosen.append(BlockConfig(tuple(_kernel_config(*kernel, shape, config.compress)
                                            for kernel, shape in zip(kernels, shapes)), shapes))
        has_budgets = any("budget" in entry for entry, _ in entries)
        return NetworkConfig(tuple(chosen)), tuple(_budget(*entry) for entry in entries) if has_budgets else None


def read(source) -> Policy:
    """Read a policy from a path or a dictionary. Raises InputError for what is absent, too large or no JSON."""
    is_file = isinstance(source, (str, os.PathLike))
    where = os.fspath(source) if is_file else "given"
    try:
        raw = None if is_file else json.dumps(source, sort_keys=True).encode()
        content, raw = read_json(where, MAX_BYTES) if is_file else (parse_json(raw), raw)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a policy: {one_line(error)}; {GIVE}") from None
    return Policy(where, hashlib.sha256(raw).hexdigest(), content)


def given(source, config):
    """Return (the policy read from ``source``, the settings with it), or (None, the settings) where it is None."""
    policy = read(source) if source is not None else None
    return policy, policy.settings(config) if policy else config


def to_policy(blocks, config: NetworkConfig, budgets=None) -> dict:
    """Return a configuration and budgets as plain data for policy.json: requested values and what follows from them."""
    policy = {"format": 1, "blocks": [
        {"name": block.name, "retained": block_config.retained, "cr": 1 / block_config.retained, "kernels": [
            {"name": name, **asdict(kernel), "channels": shape.n_out,
             "channels_kept": channels_kept(kernel.keep, shape.n_out),
             "keep_actual": channels_kept(kernel.keep, shape.n_out) / shape.n_out,
             "retained": kernel_retained(kernel, shape.n_out)}
            for name, kernel, shape in zip(block.kernels, block_config.kernels, block_config.shapes)]}
        for block, block_config in zip(blocks, config.blocks)]}
    for entry, budget in zip(policy["blocks"], budgets or ()):
        entry["budget"] = asdict(budget)
    return policy


def _named(owner, key, names, place) -> list[tuple[dict, str]]:
    """Return the entries of a list of a policy and their places; InputError unless they have these names, in order."""
    entries = member(owner, key, list, place)
    given = [type(entry) is dict and entry.get("name") for entry in entries]
    if given != names:
        n = next(n for n, pair in enumerate(zip_longest(given, names, fillvalue=...)) if pair[0] != pair[1])
        raise InputError(f"{place}: {key}[{n}:] are {shown(given[n:])}, in the network {shown(names[n:])}; a policy "
                         "for another network, compress.scope or grouping")
    return [(entry, f"{place}, {key}[{n}] ({names[n]})") for n, entry in enumerate(entries)]


def _kernel_config(entry, place, shape, limits) -> KernelConfig:
    """Return the configuration in one kernel's entry; InputError unless it is within the limits and fits the shape."""
    bits, keep = member(entry, "bits", int, place), member(entry, "keep", NUMBER, place)
    qtype, granularity = member(entry, "qtype", str, place), member(entry, "granularity", str, place)
    if member(entry, "channels", int, place) != shape.n_out:
        raise InputError(f"{place}: {quoted(entry['channels'])} channels there, {shape.n_out} in the network")
    if not limits.bits_min <= bits <= limits.bits_max and bits != FULL_BITS:
        raise InputError(f"{place}: bits={quoted(bits)}, expected {limits.bits_min} to {limits.bits_max} "
                         f"(compress.bits_min, compress.bits_max), or {FULL_BITS} for none")
    least = 1 - limits.max_pruning
    if not least - 1e-9 <= keep <= 1:
        raise InputError(f"{place}: keep={quoted(keep)}, expected {least:g} to 1 (compress.max_pruning)")
    for key, value in (("qtype", qtype), ("granularity", granularity)):
        if getattr(limits, key) not in ("any", value):
            raise InputError(f"{place}: {key}={quoted(value)}, expected {getattr(limits, key)} (compress.{key})")
    try:
        config = KernelConfig(bits, keep, qtype, granularity)
    except ValueError as error:
        raise InputError(f"{place}: {one_line(error)}") from None
    if not shape.prunable and channels_kept(keep, shape.n_out) < shape.n_out:
        raise InputError(f"{place}: keep={keep}, but its channels are the classes; keep 1")
    return config


def _budget(block, place) -> LayerBudget:
    """Return the budget in a block's entry; InputError where a value is missing or out of range."""
    entry, place = member(block, "budget", dict, place), f"{place}.budget"
    for key, (kind, low, high) in BOUNDS.items():
        if not low <= member(entry, key, kind, place) <= high:
            raise InputError(f"{place}: {key}={quoted(entry[key])}, expected {low:g} to {high:g}")
    if member(entry, "strategy", str, place) not in STRATEGIES:
        raise InputError(f"{place}: strategy={quoted(entry['strategy'])}, expected one of {', '.join(STRATEGIES)}")
    return LayerBudget(**{key: entry[key] for key in (*BOUNDS, "strategy")})


def member(owner, key, kinds, place):
    """Return ``owner[key]`` of a parsed file, which must be of the type or types ``kinds``; a bool is no number. Raises
    InputError that names the ``place``."""
    value = owner.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        what = {int: "a whole number", (int, float): "a number", str: "text", list: "a list", dict: "an object"}[kinds]
        raise InputError(f"{place}: {key}{'=' + quoted(value) if key in owner else ' is missing'}, expected {what}")
    return value


def quoted(value) -> str:
    """Return a value from a file in a form fit for a one-line message: text in quotes, a list by its length."""
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (list, dict)) else shown(repr(value))
