"""A network as a chain of stages, and the activations that enter them while its weights stay as they are.

A candidate that changes the weights of one stage needs nothing of the stages before it but their result, which is the
same for every candidate. :func:`split` says how a network divides, :class:`Entering` keeps the results within a bound.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = Tensor | tuple[Tensor, ...]  # what one stage hands to the next; the first takes images, the last gives logits


@dataclass(frozen=True)
class Stage:
    """One link of the chain. ``modules``: hold every weight that it uses; ``run``: state in → state out."""
    modules: tuple[nn.Module, ...]
    run: Callable[[State], State]

    def holds(self, weights) -> bool:
        """Whether one of ``weights`` is a parameter of this stage."""
        wanted = {id(weight) for weight in weights}
        return any(id(p) in wanted for module in self.modules for p in module.parameters())


class Staged(nn.Module):
    """A network that says how it splits. Its stages treat every image of a batch by itself (in eval mode) and never
    write into what they are given, so that states can be kept, shared and concatenated. A BatchNorm2d that a module
    registers right after a Conv2d is applied to that convolution's result and to nothing else."""

    def stages(self) -> list[Stage]:
        """The chain whose composition gives the logits that forward gives, in eval mode."""
        raise NotImplementedError


class StagedBlock(nn.Module):
    """A part of a :class:`Staged` network that can be entered between its convolutions."""

    def stages(self) -> list[Stage]:
        """The chain that forward runs."""
        raise NotImplementedError

    def forward(self, x):
        return run(self.stages(), x)


def folded(model: Staged) -> tuple[Staged, dict[str, Tensor]]:
    """A copy of ``model`` without BatchNorm, with the same logits in eval mode up to rounding, and by what the weights
    of its convolutions, by name, are multiplied: gamma / sqrt(var + eps), [outputs].

    The running mean and beta become the convolution's bias. ``model`` itself where it has no BatchNorm.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model, {}
    network, factors = copy.deepcopy(model).eval(), {}
    with torch.no_grad():
        for prefix, module in network.named_modules():
            children = list(module.named_children())
            for (name, conv), (place, norm) in zip(children, children[1:]):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
                    shift = norm.bias.double() - norm.running_mean.double() * factor
                    if conv.bias is not None:
                        shift = shift + conv.bias.double() * factor
                    factor = factor.to(conv.weight.dtype)
                    conv.weight.copy_(conv.weight * factor[:, None, None, None])
                    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
                    setattr(module, place, nn.Identity())
                    factors[f"{prefix}.{name}.weight".lstrip(".")] = factor
    return network, factors


def whole(model: nn.Module) -> tuple[Stage, ...]:
    """The chain of one stage."""
    return (Stage((model,), model),)


def split(model: nn.Module) -> tuple[Stage, ...]:
    """The stages of a network: its own, those of a Sequential's children, otherwise all of it as one."""
    if isinstance(model, Staged):
        return tuple(model.stages())
    # A subclass may run its children otherwise, and a hook on the container sees nothing of a part of the chain.
    if type(model) is nn.Sequential and not (model._forward_hooks or model._forward_pre_hooks):
        return tuple(stage for child in model for stage in split(child))
    return whole(model)


def run(stages, state: State) -> State:
    """``state`` through ``stages`` in order."""
    for stage in stages:
        state = stage.run(state)
    return state


class Chain(nn.Module):
    """:func:`run` as a module around ``model``, for functional_call: other weights by their names below ``model``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, stages, state):
        return run(stages, state)


def concatenated(states) -> State:
    """States of several candidates as one, the batch dimension growing."""
    if isinstance(states[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*states))
    return torch.cat(states)


def copied(state: State) -> State:
    """A state that shares no memory."""
    return tuple(part.clone() for part in state) if isinstance(state, tuple) else state.clone()


def state_bytes(state: State) -> int:
    """Bytes that a state takes."""
    return sum(part.nbytes for part in (state if isinstance(state, tuple) else (state,)))


class Entering:
    """What enters a stage for every calibration batch, computed at the weights that the network has, once.

    At most ``limit`` bytes are kept, besides the images. Where a stage's states do not all fit, those of other stages
    go first, the oldest before the others, as a search works on one block at a time; what then still does not fit
    is computed again at every call from the nearest earlier state. ``copy``: hand out copies, for a network
    whose stages may write into what they are given.
    """

    def __init__(self, stages, batches, limit: int, copy: bool):
        self.stages, self.batches, self.limit, self.copy = stages, batches, limit, copy
        self.kept: dict[tuple[int, int], State] = {}  # (stage, batch) → state, oldest first

    @property
    def bytes(self) -> int:
        """Bytes kept now."""
        return sum(map(state_bytes, self.kept.values()))

    def at(self, stage: int, batch: int) -> State:
        """The state that enters ``stage`` for calibration batch ``batch``."""
        known = max((s for s, b in self.kept if b == batch and s <= stage), default=0)
        state = self.kept.get((known, batch), self.batches[batch])
        if self.copy:
            state = copied(state)
        if known < stage:
            state = run(self.stages[known:stage], state)
            if self._make_room(stage, state_bytes(state)):
                self.kept[stage, batch] = copied(state) if self.copy else state
        return state

    def _make_room(self, stage: int, size: int) -> bool:
        """Whether ``size`` bytes more fit, after states of other stages have gone where that is enough."""
        others = [key for key in self.kept if key[0] != stage]
        held = self.bytes
        if held - sum(state_bytes(self.kept[key]) for key in others) + size > self.limit:
            return False
        for key in others:
            if held + size <= self.limit:
                break
            held -= state_bytes(self.kept.pop(key))
        return True
