"""Policies as plain data: the configuration of every kernel and the budget of every block, read as untrusted input."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields

from compress import (FULL_BITS, GRANULARITIES, QTYPES, STRATEGIES, BlockConfig, KernelConfig, LayerBudget,
                      NetworkConfig, channels_kept, kernel_retained, kernel_shapes)
from config import Config, InputError, override
from support.files import member, one_line, parse_json, quoted, read_json

MAX_BYTES = 4 << 20  # of a policy.json; one of 120 kernels has about 40,000
GIVE = "give the policy.json of a run"
NUMBER = (int, float)
BOUNDS = {"target": (0.01, 1), "max_pruning": (0, 1), "min_bits": (2, 32), "max_drop": (0, 1e6)}  # of a budget


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

    def fit(self, blocks, config: Config) -> tuple[NetworkConfig, tuple[LayerBudget, ...] | None, list[str]]:
        """Return (configuration, budget of every block, notes) for a network with these blocks.

        Every value is checked against the settings' bounds. Budgets are None where the file has none; a note then says
        which ones count instead. Raises InputError, one line: file, place and how to mend it.
        """
        chosen = from_policy(self.content, blocks, config.compress, self.where)
        entries = {block["name"]: (block, f"{self.where}, blocks[{n}]")
                   for n, block in enumerate(self.content["blocks"])}
        if not any("budget" in block for block, _ in entries.values()):
            note = (f"{self.where} has no budgets: compliance is that of {config.search.target:g} and the global "
                    "bounds for every block")
            return chosen, None, [note]
        return chosen, tuple(_budget(*entries[block.name]) for block in blocks), []


def read(source) -> Policy:
    """Read a policy from a path or a dictionary. Raises InputError for what is absent, too large or no JSON."""
    if isinstance(source, (str, os.PathLike)):
        where = os.fspath(source)
        try:
            content, raw = read_json(where, MAX_BYTES)
        except OSError as error:
            raise InputError(f"{where}: the policy cannot be read ({error.strerror or error}); {GIVE}") from None
        except ValueError as error:
            raise InputError(f"{where}: not a policy: {one_line(error)}; {GIVE}") from None
        return Policy(where, hashlib.sha256(raw).hexdigest(), content)
    try:
        raw = json.dumps(source, sort_keys=True).encode()
        content = parse_json(raw)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"policy: not plain data as in a policy.json: {one_line(error)}; {GIVE}") from None
    return Policy("given", hashlib.sha256(raw).hexdigest(), content)


def to_policy(blocks, config: NetworkConfig, budgets=None) -> dict:
    """Return a configuration, and the blocks' budgets, as plain data for policy.json: requested values and what follows
    from them."""
    policy = {"format": 1, "blocks": [
        {"name": block.name, "retained": block_config.retained, "cr": block_config.cr, "kernels": [
            {"name": name, **asdict(kernel), "channels": shape.n_out,
             "channels_kept": channels_kept(kernel.keep, shape.n_out),
             "keep_actual": channels_kept(kernel.keep, shape.n_out) / shape.n_out,
             "retained": kernel_retained(kernel, shape.n_out)}
            for name, kernel, shape in zip(block.kernels, block_config.kernels, block_config.shapes)]}
        for block, block_config in zip(blocks, config.blocks)]}
    for entry, budget in zip(policy["blocks"], budgets or ()):
        entry["budget"] = asdict(budget)
    return policy


def from_policy(policy, blocks, limits=None, where: str = "policy") -> NetworkConfig:
    """Return the configuration that a policy holds for a network with these blocks.

    ``policy``: anything, for example a parsed policy.json; of each kernel the requested values and the number of
    channels are read. ``limits``: config.Compress, which every kernel must keep to (32 bits, as a block that was given
    back has, are always allowed). ``where``: the file's name for messages. Kernels are told by name, in any order.
    Raises InputError naming the place, for whatever is no policy or does not fit.
    """
    if type(policy) is not dict or type(policy.get("format")) is not int or policy["format"] != 1:
        raise InputError(f"{where}: not a policy.json of this program, which has format 1; {GIVE}")
    entries = {}  # kernel → (entry, place, name of its block)
    blocks_read = _list(policy, "blocks", where)
    for n, block in enumerate(blocks_read):
        for k, kernel in enumerate(_list(block, "kernels", f"{where}, blocks[{n}]")):
            place = f"{where}, blocks[{n}].kernels[{k}]"
            name = member(kernel, "name", str, place)
            if name in entries:
                raise InputError(f"{place}: {quoted(name)} has a configuration already; name each kernel once")
            entries[name] = kernel, f"{place} ({quoted(name)})", block.get("name")
    names = {name for block in blocks for name in block.kernels}
    if names != entries.keys():
        raise InputError(f"{where}: a policy for another network, compress.scope or grouping; kernels without a "
                         f"configuration: {_some(names - entries.keys())}; configurations without a kernel: "
                         f"{_some(entries.keys() - names)}")
    for block in blocks:
        for name in block.kernels:
            _, place, owner = entries[name]
            if owner != block.name:
                raise InputError(f"{place}: it is in block {quoted(owner)} there, in {block.name} here; a policy for "
                                 "another network, compress.scope or grouping")
    if len(blocks_read) != len(blocks):
        raise InputError(f"{where}: names a block twice; each must have one entry with all its kernels")
    return NetworkConfig(tuple(BlockConfig(
        tuple(_kernel_config(*entries[name][:2], shape, limits)
              for name, shape in zip(block.kernels, kernel_shapes(block))), kernel_shapes(block)) for block in blocks))


def _kernel_config(entry, place, shape, limits) -> KernelConfig:
    """Return the configuration in one kernel's entry; InputError unless it is within the limits and fits the shape."""
    bits, keep = member(entry, "bits", int, place), member(entry, "keep", NUMBER, place)
    qtype, granularity = member(entry, "qtype", str, place), member(entry, "granularity", str, place)
    if member(entry, "channels", int, place) != shape.n_out:
        raise InputError(f"{place}: {quoted(entry['channels'])} channels there, {shape.n_out} here; a policy for a "
                         "network of other widths")
    low, high = (limits.bits_min, limits.bits_max) if limits else (2, 16)
    if not low <= bits <= high and bits != FULL_BITS:
        raise InputError(f"{place}: bits={quoted(bits)}, expected {low} to {high} (compress.bits_min, "
                         f"compress.bits_max), or {FULL_BITS} for none")
    least = 1 - limits.max_pruning if limits else 0
    if not (keep > 0 and least - 1e-9 <= keep <= 1):
        raise InputError(f"{place}: keep={quoted(keep)}, expected {least:g} to 1 (compress.max_pruning)")
    try:
        config = KernelConfig(bits, keep, qtype, granularity)
    except ValueError as error:
        raise InputError(f"{place}: {one_line(error)}") from None
    for key, value, allowed in (("qtype", qtype, QTYPES), ("granularity", granularity, GRANULARITIES)):
        wanted = getattr(limits, key, value)
        if value != wanted and not (wanted == "any" and value in allowed):
            raise InputError(f"{place}: {key}={value}, the settings have {wanted}; --set compress.{key}={value} or any")
    if not shape.prunable and channels_kept(keep, shape.n_out) < shape.n_out:
        raise InputError(f"{place}: keep={keep}, but its channels are the classes; keep 1")
    return config


def _budget(block, place) -> LayerBudget:
    """Return the budget in a block's entry; InputError where a value is missing or out of range."""
    entry, place = member(block, "budget", dict, place), f"{place}.budget"
    kinds = {"int": int, "float": NUMBER, "str": str}
    values = {item.name: member(entry, item.name, kinds[item.type], place) for item in fields(LayerBudget)}
    for key, (low, high) in BOUNDS.items():
        if not low <= values[key] <= high:
            raise InputError(f"{place}: {key}={quoted(values[key])}, expected {low:g} to {high:g}; set it right, or "
                             "take every block's budget out")
    if values["strategy"] not in STRATEGIES:
        raise InputError(f"{place}: strategy={quoted(values['strategy'])}, expected one of {', '.join(STRATEGIES)}")
    return LayerBudget(**values)


def _list(owner, key, place) -> list[dict]:
    """Return a list of a policy; InputError unless it has at least one dictionary and nothing else."""
    value = member(owner, key, list, place)
    if not value or not all(type(item) is dict for item in value):
        raise InputError(f"{place}: {key} must be a list of objects with at least one, as in a run's policy.json")
    return value


def _some(names) -> str:
    return f"[{', '.join(map(quoted, sorted(names)[:5]))}{', …' if len(names) > 5 else ''}]"
