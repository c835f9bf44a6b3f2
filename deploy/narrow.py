"""A network with pruned channels made physically narrower, with the same logits (paper §3.5.1).

A pruned output channel is a row of a Conv2d or Linear weight that is exactly zero. The network is exported to a graph
of ATen operations, and two things are followed through it together: the values of one forward, and which of their
elements depend on the images at all. What does not (a pruned channel's bias, the BatchNorm shift and the activation
of it, their zero-padded borders) is a constant that the forward has just shown. Every value then carries only the
channels that depend on the images and that somebody reads; a layer that reads it drops the other columns and takes
their constant product into its bias, or, where zero padding makes it differ at the borders, adds it as a map. An
operation that needs a channel which is not there (residual sums, attention heads, LayerNorm) gets the narrow product
scattered among the constants.
"""

from __future__ import annotations

import operator
import os
import tempfile
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from config import InputError
from models import MobileNetV2, ResNet, VisionTransformer
from support.own import copy_network, forward

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default}
PRODUCTS = {aten.matmul.default: (0, 1), aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
# Dimension 1 of their output is that of their input, channel by channel.
SPATIAL = {aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
           aten.adaptive_max_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec}
REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}
MOVES = {aten.reshape.default, aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten.permute.default,
         aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
         aten.squeeze.default, aten.slice.Tensor, aten.select.int, aten.roll.default, aten.flip.default,
         aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.to.dtype,
         aten._to_copy.default, aten.movedim.int, aten.repeat.default, aten.constant_pad_nd.default, aten.pad.default}
SIZED = {aten.reshape.default, aten.expand.default}  # the new shape is their second argument
PADS = {aten.constant_pad_nd.default, aten.pad.default}
UNTAGGED = {aten.hardswish.default, aten.prelu.default}  # elementwise as well


@dataclass
class Value:
    """What one forward showed of one tensor of the graph.

    ``shape``: with a batch of two images; ``batch``: the dimensions whose size depends on the batch's. ``dim``: the
    dimension of the channels, None where there is none to follow; ``alive`` [C] bool: the channels that are to be
    computed, because the images reach them or because their constant differs within the batch; ``const``: the
    constants of the others, of size 1 in every dimension along which they are equal, without the living channels.
    ``known``: the whole tensor, where no image reaches it and its shape does not depend on the batch.
    ``reached``: whether an image reaches any of it. ``source`` [C]: where the channels are those of one operand, which
    of its channels each one is.
    """
    shape: tuple[int, ...]
    batch: tuple[int, ...] = ()
    dim: int | None = None
    alive: torch.Tensor | None = None
    const: torch.Tensor | None = None
    known: torch.Tensor | None = None
    reached: bool = True
    source: torch.Tensor | None = None

    def constants(self, mask) -> torch.Tensor:
        """The constants of the channels ``mask`` [C], zero for the living ones among them."""
        shape = list(self.const.shape)
        shape[self.dim] = len(self.alive)
        full = self.const.new_zeros(shape).index_copy_(self.dim, (~self.alive).nonzero()[:, 0], self.const)
        return full.index_select(self.dim, mask.nonzero()[:, 0])


# ---------------------------------------------------------------------------------------------------------------
# The graph


def _exported(model, images) -> fx.GraphModule:
    """The forward of a network in eval mode as ATen operations without side effects, for batches of any size."""
    name = type(model).__name__
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that hides its weights
    try:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
            graph = program.module(check_guards=False)
    except Exception as error:  # whatever the network's own code, and torch.export's, raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "Constraints violated" in why or "specialized" in why:
            raise InputError(f"{name} cannot be exported for batches of any size: {why}") from error
        raise InputError(f"{name} cannot be exported: {why}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return _normalised(graph)


def _mutates(node):
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _normalised(graph):
    """One operation for what the exporter writes in several ways; what eval mode leaves without effect is gone."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # the same, in every memory layout
        elif node.target in (aten.dropout.default, aten.feature_dropout.default) and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            node.target, node.args = aten.batch_norm.default, (*node.args[:5], False, *node.args[5:], True)
            node.meta["val"] = node.meta["val"][0]  # the other results are empty
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.graph.erase_node(user)
    return graph


def _kind(node, values):
    """How channels go through an operation, by what is known of its operands; "" where nothing is to be known."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    if target in CONVOLUTIONS or target is aten.linear.default or target in PRODUCTS:
        x, weight, bias = _operands(node)
        if values[weight].known is None or bias is not None and values[bias].known is None or not values[x].reached:
            return ""
        if target in PRODUCTS and (values[weight].known.dim() != 2 or len(node.args) > 3 or node.kwargs):
            return ""
        return "layer" if target not in CONVOLUTIONS or len(values[x].shape) == values[weight].known.dim() else ""
    if target is aten.batch_norm.default:
        fixed = not node.args[5] and all(a is None or values[a].known is not None for a in node.args[1:5])
        return "norm" if fixed and node.args[3] is not None else ""
    if target in SPATIAL:
        return "spatial"
    if target in REDUCTIONS:
        return "reduction" if isinstance(node.args[1], (list, tuple)) and node.args[1] else ""
    if target in MOVES:
        constant = target is not aten.pad.default or (node.args[2] if len(node.args) > 2 else "constant") == "constant"
        return "move" if constant else ""
    if target is aten.cat.default:
        return "cat"
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return ""
    return "pointwise" if torch.Tag.pointwise in target.tags or target in UNTAGGED else ""


def _operands(node):
    """(input, weight, bias or None) of a convolution or a linear product."""
    if node.target in PRODUCTS:
        x, weight = PRODUCTS[node.target]
        return node.args[x], node.args[weight], node.args[0] if x else None
    return node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _argument(node, position, name, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _settings(node, rank):
    """(stride, padding, dilation) of a convolution over ``rank`` dimensions."""
    padding = "valid" if node.target is aten.conv2d.padding else [0] * rank
    return (_argument(node, 3, "stride", [1] * rank), _argument(node, 4, "padding", padding),
            _argument(node, 5, "dilation", [1] * rank))


def _groups(node):
    return _argument(node, 6, "groups", 1) if node.target in CONVOLUTIONS else 1


def _rows(node, weight):
    """The weight [out, in, …] of a layer; a product keeps it transposed."""
    return weight.t() if node.target in PRODUCTS else weight


# ---------------------------------------------------------------------------------------------------------------
# One forward: values, and what the images reach


def _watched(graph, images) -> dict[fx.Node, Value]:
    """Every node of the graph → what a forward of ``images`` shows of its value."""
    values, data, reached, last = {}, {}, {}, {}
    for node in graph.graph.nodes:
        for argument in node.all_input_nodes:
            last[argument] = node
    for node in graph.graph.nodes:
        args = ()
        if node.op == "placeholder":
            data[node], reached[node] = images, torch.ones_like(images, dtype=torch.bool)
        elif node.op == "get_attr":
            data[node], reached[node] = operator.attrgetter(node.target)(graph).detach(), None
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: data[n])
            data[node] = node.target(*args, **kwargs)
            reached[node] = _reached(node, values, data, reached)
        else:
            continue
        values[node] = _value(node, data[node], reached[node], values, args)
        for argument in node.all_input_nodes:
            if last[argument] is node:
                del data[argument], reached[argument]
    return values


def _reached(node, values, data, reached):
    """Which elements of a result depend on the images: bool like the result, None for none, True for a result that is
    no tensor."""
    given, out = [n for n in node.all_input_nodes if reached[n] is not None], data[node]
    if node.target is aten.sym_size.int:
        return None
    if not isinstance(node.target, torch._ops.OpOverload):
        given = given and True
    elif torch.Tag.nondeterministic_seeded in node.target.tags:
        given = True
    if not given:
        return None
    if not isinstance(out, torch.Tensor):
        return True
    kind = _kind(node, values)
    if given is True or not kind or not all(isinstance(reached[n], torch.Tensor) for n in given):
        return torch.ones_like(out, dtype=torch.bool)
    if kind == "layer":
        x, weight, _ = _operands(node)
        x, rows = reached[x], _rows(node, values[weight].known).flatten(1).ne(0).any(1)
        if node.target not in CONVOLUTIONS:
            return x.any(-1, keepdim=True) & rows
        groups = _groups(node)
        rows = rows & x.transpose(0, 1).reshape(groups, -1).any(1).repeat_interleave(len(rows) // groups)
        return rows.view(1, -1, *[1] * (out.dim() - 2)).expand(out.shape)
    if kind == "norm":
        return reached[given[0]]
    if kind == "pointwise":
        result = torch.zeros_like(out, dtype=torch.bool)
        for n in given:
            result |= reached[n]
        if node.target is aten.mul.Tensor and isinstance(node.args[1], fx.Node):
            for n in node.args:  # nothing gets through a constant zero
                result &= data[n].ne(0) if reached[n] is None else data[n].ne(0) | reached[n]
        return result

    def mark(n):
        if not isinstance(data[n], torch.Tensor):
            return data[n]
        return torch.zeros(data[n].shape, device=out.device) if reached[n] is None else reached[n].float()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), mark)
    return node.target(*args, **kwargs) > 0


def _value(node, data, reached, values, args):
    if not isinstance(data, torch.Tensor):
        return Value((), reached=reached is not None)
    batch = ()
    if node.op != "get_attr":
        batch = tuple(i for i, size in enumerate(node.meta["val"].shape) if isinstance(size, torch.SymInt))
    value = Value(tuple(data.shape), batch, reached=reached is not None)
    if reached is None:
        value.known = None if batch else data.detach()
        return value
    value.dim, value.source = _channels(node, value, values, args)
    if value.dim is None:
        return value
    dim, count = value.dim, data.shape[value.dim]
    of_channel = data.movedim(dim, 0).reshape(count, -1)
    alive = reached.movedim(dim, 0).reshape(count, -1).any(1) | ~of_channel.isfinite().all(1)
    dead = (~alive).nonzero()[:, 0]
    const = data.index_select(dim, dead).detach().clone()
    for along in range(data.dim()):
        if along == dim or not len(dead):
            continue
        same = _equal(const, along).movedim(dim, 0).reshape(len(dead), -1).all(1)
        if along in batch and not same.all():  # its constant cannot be written down for batches of any size
            alive[dead[~same]] = True
            dead, const = dead[same], const.index_select(dim, same.nonzero()[:, 0])
        if along in batch or same.all():
            const = const.narrow(along, 0, 1)
    value.alive, value.const = alive, const.clone()
    return value


def _equal(tensor, along):
    """Which elements are, up to rounding, those at the first position along a dimension; bool like ``tensor``."""
    first = tensor.narrow(along, 0, 1)
    limit = 16 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
    return (tensor - first).abs() <= limit * (first.abs() + 1)


def _channels(node, value, values, args):
    """(dimension of a result's channels, channel [n] of the one operand that it takes each of them from). The second
    is None where there are several operands, or the operation chooses its own channels; both are, without channels."""
    kind, shape = _kind(node, values), value.shape
    if kind == "layer":
        return (1 if node.target in CONVOLUTIONS else len(shape) - 1), None
    inputs = [n for n in node.all_input_nodes if values[n].dim is not None]
    if not kind or not inputs:
        return None, None
    x = values[inputs[0]]
    same = torch.arange(x.shape[x.dim])
    if kind in ("norm", "spatial"):
        return (1, same) if x.dim == 1 and len(x.shape) == len(shape) else (None, None)
    if kind == "cat":
        return x.dim, None
    if kind == "reduction":
        gone = {d % len(x.shape) for d in node.args[1]}
        if x.dim in gone:
            return None, None
        return (x.dim if _argument(node, 2, "keepdim", False) else x.dim - sum(d < x.dim for d in gone)), same
    if kind == "move":
        return _moved(node, x, shape, args) or (None, None)
    for n in inputs:
        x = values[n]
        dim = x.dim + len(shape) - len(x.shape)
        if x.shape[x.dim] == shape[dim] > 1:
            wide = [m for m in node.all_input_nodes if values[m].known is None and _has(values[m], shape, dim)]
            return dim, (torch.arange(shape[dim]) if wide == [n] else None)
    return None, None


def _has(x, shape, dim):
    """Whether an operand of an elementwise operation has the channels of the result, instead of being broadcast."""
    aligned = dim - len(shape) + len(x.shape)
    return aligned >= 0 and x.shape[aligned] == shape[dim]


def _moved(node, x, shape, args):
    """:func:`_channels` of an operation that only moves elements: seen by moving the number of each one's channel.
    None where the channels do not stay in order along one dimension."""
    count, same = x.shape[x.dim], torch.arange(x.shape[x.dim])
    if node.target in PADS:
        position = 2 * (len(x.shape) - 1 - x.dim)
        return None if any(args[1][position:position + 2]) else (x.dim, same)
    if node.target is aten.unflatten.int and args[1] % len(x.shape) == x.dim:
        return None
    index = same.view([-1 if d == x.dim else 1 for d in range(len(x.shape))]).expand(x.shape)
    if node.target in (aten.to.dtype, aten._to_copy.default):
        out = index
    else:
        out = node.target(index, *args[1:], **{k: v for k, v in node.kwargs.items() if k == "memory_format"})
    varying = [d for d in range(out.dim()) if not torch.equal(out, out.narrow(d, 0, 1).expand(out.shape))]
    if len(varying) != 1:
        return None
    dim, = varying
    source = out.movedim(dim, 0).reshape(len(out.movedim(dim, 0)), -1)[:, 0]
    if node.target not in (aten.reshape.default, aten.flatten.using_ints) and not torch.equal(source, same):
        return None
    return (dim, source) if count > 1 else None


# ---------------------------------------------------------------------------------------------------------------
# Which channels are computed


@dataclass
class Plan:
    """``need``: node → which of its channels are computed [C], for every node that chooses them (layers, sums, cat);
    the others carry those of their operand. ``inside``: the input channels [C] of a convolution in groups."""
    need: dict = field(default_factory=dict)
    inside: dict = field(default_factory=dict)


def _planned(graph, values) -> Plan:
    """From the logits back: the channels that depend on the images and that a user reads."""
    plan, whole = Plan(), set()
    for node in reversed(graph.graph.nodes):
        value = values.get(node)
        if value is not None and value.dim is not None:
            need = plan.need.setdefault(node, torch.zeros_like(value.alive))
            if _kind(node, values) == "layer":
                need = _padded(node, need, values, plan)
            elif value.source is None and node in whole and len(node.users) > 1:
                need = torch.ones_like(need)  # scattered once, here, instead of before each of them
            if not need.any():
                need[0] = True
            plan.need[node] = need
        for n in node.all_input_nodes:
            x = values[n]
            if x.dim is None:
                continue
            wanted = _wanted(node, n, values, plan)
            if wanted is None:
                whole.add(n)
                wanted = x.alive
            plan.need[n] = plan.need.get(n, torch.zeros_like(x.alive)) | wanted
    return plan


def _wanted(node, n, values, plan):
    """The channels [C] of operand ``n`` that have to be there for ``node``; None: all must be scattered into place."""
    x, value, kind = values[n], values.get(node), _kind(node, values) if node in values else ""
    if kind == "layer":
        if x.dim != (1 if node.target in CONVOLUTIONS else len(x.shape) - 1):
            return None
        return x.alive & plan.inside[node] if node in plan.inside else x.alive
    if not kind or value.dim is None:
        return None
    need = plan.need[node]
    if kind == "cat":
        place = _place(node, n, values)
        return None if x.dim != value.dim else x.alive & (need if place is None else need[place[0]:place[1]])
    if kind == "pointwise" and (x.dim + len(value.shape) - len(x.shape) != value.dim
                                or not _has(x, value.shape, value.dim)):
        return None
    if value.source is None:
        return x.alive & need
    wanted = torch.zeros_like(x.alive)
    wanted[value.source[need]] = True
    return wanted


def _place(node, n, values):
    """Where operand ``n`` of a concatenation along the channels begins and ends; None along another dimension."""
    dim = _argument(node, 1, "dim", 0) % len(values[node].shape)
    if dim != values[node].dim:
        return None
    begin = 0
    for other in node.args[0]:
        end = begin + values[other].shape[dim]
        if other is n:
            return begin, end
        begin = end
    raise ValueError(f"{n} is no operand of {node}")


def _padded(node, need, values, plan):
    """Needed output channels of a layer → those that it computes: groups that are left have equally many."""
    groups = _groups(node)
    if groups == 1:
        return need
    x = values[_operands(node)[0]]
    alive = torch.ones(values[_operands(node)[1]].shape[1] * groups, dtype=torch.bool, device=need.device) \
        if x.dim != 1 else x.alive
    rows, columns = need.view(groups, -1), alive.view(groups, -1)
    left = rows.any(1)
    if not left.any():
        left = torch.arange(groups, device=need.device) == 0

    def filled(mask):  # in each group that is left, the marked ones first
        count = max(1, int(mask[left].sum(1).max()))
        order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(mask).scatter_(1, order, left[:, None].expand(order.shape)).flatten()
    plan.inside[node] = filled(columns)
    return filled(rows)


# ---------------------------------------------------------------------------------------------------------------
# The narrow graph


class _Narrow:
    """Writes the graph anew, node by node. ``made``: old node → new node; ``masks``: old node → which channels the
    new one has; old nodes without an entry there have all of everything."""

    def __init__(self, graph, values, plan):
        self.old, self.values, self.plan = graph, values, plan
        self.graph, self.root = fx.Graph(), nn.Module()
        self.made, self.masks, self.cache, self.maps = {}, {}, {}, {}
        self.stays = {}

    def run(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = self.graph.placeholder(node.name)
            elif node.op == "call_function":
                self.write(node)
                self.unfollowed(node)
            elif node.op == "output":
                logits, = node.args[0]
                self.graph.output(self.take(logits))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        network = fx.GraphModule(self.root, self.graph, type(self.old).__name__)
        network.meta["stays"] = self.stays
        return network.eval()

    def call(self, target, *args, **kwargs):
        return self.graph.call_function(target, args, kwargs)

    def write(self, node):
        value, kind = self.values[node], _kind(node, self.values)
        if value.dim is None:
            self.made[node] = self.graph.node_copy(node, self.take)
        elif kind == "layer":
            self.layer(node)
        else:
            if value.source is not None:
                source = next(n for n in node.all_input_nodes if self.values[n].dim is not None
                              and _wanted(node, n, self.values, self.plan) is not None)
                mask = self.mask(source)[value.source]
            else:
                mask = self.plan.need[node]
            self.made[node] = self.norm(node, mask) if kind == "norm" else self.other(node, kind, mask)
            self.masks[node] = mask

    def mask(self, node):
        value = self.values[node]
        return self.masks.get(node, torch.ones(value.shape[value.dim], dtype=torch.bool))

    def other(self, node, kind, mask):
        """An elementwise operation, a concatenation, a pooling or a move, on the channels ``mask`` [C]."""
        value = self.values[node]
        if kind == "cat" and _place(node, node.args[0][0], self.values):
            parts = [self.take(n, value.dim, part) for n, part in
                     zip(node.args[0], mask.split([self.values[n].shape[value.dim] for n in node.args[0]]))
                     if part.any()]
            return self.call(aten.cat.default, parts, value.dim) if len(parts) > 1 else parts[0]

        def take(n):
            x = self.values[n]
            if not x.shape:
                return self.take(n)
            if kind in ("pointwise", "cat"):
                dim = value.dim - len(value.shape) + len(x.shape)
                return self.take(n, dim, mask) if _has(x, value.shape, value.dim) else self.take(n)
            return self.take(n, x.dim, self.mask(n)) if x.dim is not None else self.take(n)
        new = self.graph.node_copy(node, take)
        if node.target in SIZED and not mask.all():
            sizes = list(new.args[1])
            sizes[value.dim - len(value.shape)] = int(mask.sum())
            new.args = (new.args[0], sizes)
        return new

    # -----------------------------------------------------------------------------------------------------------
    # Values with other channels

    def take(self, node, dim=None, mask=None):
        """The new node of ``node`` with the channels ``mask`` [C] along ``dim``; whole without them."""
        if node.op == "get_attr" and node not in self.made:
            self.made[node] = self.tensor(node.target, operator.attrgetter(node.target)(self.old))
        value, have = self.values[node], self.masks.get(node)
        if have is not None and dim != value.dim:
            whole = self.adapt(node, self.made[node], value.dim, have, torch.ones_like(have))
            return whole if dim is None else self.adapt(node, whole, dim, torch.ones_like(mask), mask)
        if dim is None:
            return self.made[node]
        if value.known is not None:
            return self.made[node] if mask.all() else self.part(node, dim, mask)
        return self.adapt(node, self.made[node], dim, torch.ones_like(mask) if have is None else have, mask)

    def part(self, node, dim, mask):
        """Some of the channels of a constant."""
        key = node, dim, bytes(mask.cpu().numpy())
        if key not in self.cache:
            self.cache[key] = self.tensor(_name(node), self.values[node].known.index_select(dim, _where(mask)))
        return self.cache[key]

    def adapt(self, node, new, dim, have, want):
        """``new``, which has the channels ``have`` of ``node`` along ``dim``, with the channels ``want``: without those
        that are not wanted, and scattered among the constants of those that it has not.

        As a matrix with the channels last, for which index_select and index_add are several times as fast as along a
        dimension of a larger tensor; images come out channels-last, the faster layout for convolutions.
        """
        if torch.equal(have, want):
            return new
        key = node, dim, bytes(have.cpu().numpy()), bytes(want.cpu().numpy())
        if key in self.cache:
            return self.cache[key]
        value, both, count = self.values[node], have & want, int(want.sum())
        order = [d for d in range(len(value.shape)) if d != dim] + [dim]
        if dim != order[dim]:
            new = self.call(aten.permute.default, new, order)
        sizes = [self.call(aten.sym_size.int, new, i) if d in value.batch else value.shape[d]
                 for i, d in enumerate(order[:-1])] + [count]
        rows = self.call(aten.reshape.default, new, [-1, int(have.sum())])
        if not torch.equal(both, have):
            rows = self.call(aten.index_select.default, rows, 1, self.index(_where(both[have])))
        if not torch.equal(both, want):
            base = value.constants(want).movedim(dim, -1) * ~have[want]
            full = self.call(aten.expand.default, self.spread(f"{node.name}.constant", base), sizes)
            full = self.call(aten.clone.default, full, memory_format=torch.contiguous_format)
            full = self.call(aten.view.default, full, [-1, count])
            rows = self.call(aten.index_add_.default, full, 1, self.index(_where(have[want])), rows)
        new = self.call(aten.view.default, rows, sizes)
        if dim != order[dim]:
            new = self.call(aten.permute.default, new, [order.index(d) for d in range(len(order))])
        self.cache[key] = new
        return new

    def index(self, positions):
        """A node that reads positions [n]."""
        key = bytes(positions.cpu().numpy())
        if key not in self.cache:
            self.cache[key] = self.tensor("index", positions)
        return self.cache[key]

    def spread(self, name, constant):
        """A node with a constant whose last dimension are the channels; what repeats along the others (the inside of a
        map, between its borders) is stored once."""
        indices = {}
        for along in range(constant.dim() - 1):
            first, index = _repeats(constant, along)
            if len(first) < len(index):
                constant = constant.index_select(along, first)
                indices[along] = index
        node = self.tensor(name, constant.contiguous())
        for along, index in indices.items():
            node = self.call(aten.index_select.default, node, along, self.index(index))
        return node

    def scatter(self, node, new, dim, have, want):
        """The channels ``have`` among the constants of the others that are wanted.

        With the channels last the rows of a matrix are written in one go, and channels-last images, the faster
        layout for convolutions, stay that.
        """
        value, rank = self.values[node], len(self.values[node].shape)
        base = value.constants(want).movedim(dim, -1)
        order = [d for d in range(rank) if d != dim] + [dim]
        if dim != rank - 1:
            new = self.call(aten.permute.default, new, order)
        sizes = [self.call(aten.sym_size.int, new, i) if d in value.batch else value.shape[d]
                 for i, d in enumerate(order[:-1])] + [int(want.sum())]
        full = self.call(aten.expand.default, self.spread(f"{node.name}.constant", base), sizes)
        full = self.call(aten.clone.default, full, memory_format=torch.contiguous_format)
        rows = self.call(aten.view.default, full, [-1, int(want.sum())])
        narrow = self.call(aten.reshape.default, new, [-1, int(have.sum())])
        rows = self.call(aten.index_copy_.default, rows, 1, self.index(_where(have[want])), narrow)
        full = self.call(aten.view.default, rows, sizes)
        return full if dim == rank - 1 else self.call(aten.permute.default, full, [order.index(d) for d in range(rank)])

    def tensor(self, name, tensor):
        """A node that reads a parameter or buffer, registered under ``name`` or the next free name like it."""
        *path, leaf = name.split(".")
        owner = self.root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        free, number = leaf, 0
        while hasattr(owner, free):
            number += 1
            free = f"{leaf}_{number}"
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(free, tensor)
        else:
            owner.register_buffer(free, tensor)
        return self.graph.get_attr(".".join([*path, free]))

    # -----------------------------------------------------------------------------------------------------------
    # Layers

    def layer(self, node):
        """A convolution or linear product with the rows that are needed and the columns that are there."""
        x, weight, bias = _operands(node)
        axis = 1 if node.target in CONVOLUTIONS else len(self.values[x].shape) - 1
        rows, groups = self.plan.need[node], _groups(node)
        full = _rows(node, self.values[weight].known)
        if groups > 1:
            inside = self.plan.inside[node]
        elif self.values[x].dim == axis:
            inside = self.mask(x)
        else:
            inside = torch.ones(full.shape[1], dtype=torch.bool, device=full.device)
        self.note(node, weight, full, rows)
        self.masks[node] = rows
        if rows.all() and inside.all():
            self.made[node] = self.graph.node_copy(node, self.take)
            return
        product = self.dropped(node, full, rows, inside)
        vector = product is not None and product.numel() == rows.sum()
        given = None if bias is None else self.values[bias].known[..., rows].double()
        if vector:
            given = product.flatten() + (0 if given is None else given)
        name = _name(weight)
        stem = name.removesuffix("weight")
        key = weight, bytes(rows.cpu().numpy()), bytes(inside.cpu().numpy())
        if key not in self.cache:
            self.cache[key] = self.tensor(name, _like(_narrowed(full, rows, inside, groups), weight, self.old))
        args = [self.take(x, axis, inside), self.cache[key], None if given is None else self.tensor(
            _name(bias) if bias is not None else stem + "bias", _like(given.to(full.dtype), weight, self.old))]
        if node.target in CONVOLUTIONS:
            left = int(rows.view(groups, -1).any(1).sum())
            args += [*_settings(node, full.dim() - 2), left]
        new = self.call(node.target if node.target in CONVOLUTIONS else aten.linear.default, *args)
        if product is not None and not vector:
            users = list(node.users)
            if len(users) == 1 and _kind(users[0], self.values) == "norm" and users[0].args[0] is node:
                self.maps[node] = product
            else:
                new = self.call(aten.add.Tensor, new, self.map(stem + "map", product.to(full.dtype), axis))
        self.made[node] = new

    def dropped(self, node, full, rows, inside):
        """What the columns that are not there add to each output channel in ``rows``: float64, of size 1 in every
        dimension along which it is the same; None where that is nothing."""
        x = self.values[_operands(node)[0]]
        if inside.all() or x.dim is None:
            return None
        const = x.constants(torch.ones_like(inside)).double()
        const = const * ~inside.view([-1 if d == x.dim else 1 for d in range(const.dim())])
        if not const.any():
            return None
        if node.target not in CONVOLUTIONS:
            return const @ full[rows].double().t()
        const = const.expand(1, -1, *x.shape[2:])
        settings = _settings(node, full.dim() - 2)
        if _groups(node) == 1:
            product = node.target(const[:, ~inside], full[rows][:, ~inside].double(), None, *settings)
        else:
            product = node.target(const, full.double(), None, *settings, _groups(node))[:, rows]
        for along in range(2, product.dim()):
            if _equal(product, along).all():
                product = product.narrow(along, 0, 1)
        return product if product.any() else None

    def norm(self, node, mask):
        """BatchNorm of the channels ``mask``; with the map of the convolution before it, as one scaled sum."""
        x = self.take(node.args[0], 1, mask)
        product = self.maps.get(node.args[0])
        if product is None:
            parameters = [a if a is None else self.take(a, 0, mask) for a in node.args[1:5]]
            return self.call(aten.batch_norm.default, x, *parameters, *node.args[5:])
        shape = [-1 if d == 1 else 1 for d in range(product.dim())]
        weight, bias, mean, var = (None if a is None else self.values[a].known[mask].double().view(shape)
                                   for a in node.args[1:5])
        scale = (var + node.args[7]).rsqrt() * (1 if weight is None else weight)
        shift = (product - mean) * scale + (0 if bias is None else bias)
        stem = _name(node.args[3]).removesuffix("running_mean")
        dtype = self.values[node.args[3]].known.dtype
        return self.call(aten.addcmul.default, self.map(stem + "map", shift.to(dtype), 1), x,
                         self.tensor(stem + "scale", scale.to(dtype)))

    def map(self, name, constant, dim):
        """:meth:`spread` of a constant with the channels along ``dim``."""
        node, order = self.spread(name, constant.movedim(dim, -1)), list(range(constant.dim()))
        order.insert(dim, order.pop())
        return node if dim == order[-1] else self.call(aten.permute.default, node, order)

    def unfollowed(self, node):
        """Record kernels with pruned channels that go into an operation of which nothing is known."""
        if _kind(node, self.values) or not self.values[node].reached:
            return
        for weight in (_source(n) for n in node.all_input_nodes if not self.values[n].reached):
            if weight is not None and self.values[weight].known.dim() > 1:
                pruned = ~self.values[weight].known.flatten(1).ne(0).any(1)
                if pruned.any():
                    self.stays[_name(weight).removesuffix(".weight")] = f"{int(pruned.sum())} pruned channels stay: " \
                        f"used in {node.target}, which is not followed"

    def note(self, node, weight, full, rows):
        """Record a layer that still computes pruned channels."""
        pruned = ~full.flatten(1).ne(0).any(1)
        if not (pruned & rows).any():
            return
        if _groups(node) > 1:
            why = "a convolution in groups, which do not keep equally many channels"
        elif rows.sum() == 1:
            why = "none of its channels is both kept and read, one is left"
        else:
            why = "the constants of its pruned channels depend on the position in the batch"
        self.stays[_name(weight).removesuffix(".weight")] = f"{int((pruned & rows).sum())} of {int(pruned.sum())} " \
            f"pruned channels stay: {why}"


def _repeats(tensor, along):
    """(positions [m] of the slices along a dimension that differ from those before them, which of these [n] each slice
    is like, up to rounding)."""
    first, index = [], []
    for position, part in enumerate(tensor.unbind(along)):
        number = next((k for k, f in enumerate(first) if _equal(torch.stack([tensor.select(along, f), part]), 0).all()),
                      len(first))
        if number == len(first):
            first.append(position)
        index.append(number)
    return (torch.tensor(positions, device=tensor.device) for positions in (first, index))


def _where(mask):
    return mask.nonzero()[:, 0]


def _name(node):
    """Name of the parameter that a constant is, or is computed from first."""
    source = _source(node)
    return node.name if source is None else source.target


def _source(node):
    while node.op != "get_attr":
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node


def _like(tensor, weight, old):
    """A parameter with the gradient setting of the one that it is a part of."""
    given = operator.attrgetter(weight.target)(old) if weight.op == "get_attr" else None
    return nn.Parameter(tensor.contiguous(), requires_grad=given is not None and given.requires_grad)


def _narrowed(weight, rows, inside, groups):
    """Rows, and in each group the columns, of a weight [out, in / groups, …]."""
    if groups == 1:
        return weight[rows][:, inside]
    columns = inside.view(groups, -1)
    parts = [part[keep][:, columns[group]] for group, (part, keep) in
             enumerate(zip(weight.chunk(groups), rows.view(groups, -1))) if keep.any()]
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------
# What this module is for


def materialize(model: nn.Module, example=None) -> fx.GraphModule:
    """A network without the pruned channels, and with the logits of ``model`` in eval mode.

    A channel is pruned where its row of a Conv2d or Linear weight is exactly zero. ``example``: images [n, C, H, W]
    of the size that the narrow network is for; this project's networks do without (``image_size`` of a ViT, 224 for
    a CNN). The result takes batches of any size, is in eval mode for good and keeps the device, the type and, for
    what is left of them, the names of the parameters. ``model`` stays as it is. :func:`stays` says what could not
    shrink. Raises InputError for a network that fails on the images or that torch.export cannot export.
    """
    images = _images(model, example)
    device = images.device
    with torch.no_grad():
        network, images = copy_network(model).eval().cpu(), images.cpu()  # masks and indices are made there
        forward(network, images.clone())
        graph = _exported(network, images)
        values = _watched(graph, images.clone())
        return _Narrow(graph, values, _planned(graph, values)).run().to(device)


def stays(network: fx.GraphModule) -> dict[str, str]:
    """Layer with pruned channels that :func:`materialize` could not take out, or not all → reason."""
    return dict(network.meta["stays"])


def _images(model, example):
    """Two images for a network, on its device and of its type."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        raise InputError(f"{type(model).__name__} has no parameters, nothing to make narrower")
    if example is None:
        if not isinstance(model, (VisionTransformer, ResNet, MobileNetV2)):
            raise InputError(f"{type(model).__name__}: give a batch of images as example=, of the size it is to be for")
        size = getattr(model, "image_size", 224)
        example = torch.zeros(1, 3, size, size)
    if not isinstance(example, torch.Tensor) or example.dim() < 2 or not len(example):
        raise InputError("example: expected a batch of images [n, C, H, W]")
    return example[:1].detach().to(weight.device, weight.dtype).repeat(2, *[1] * (example.dim() - 1))


def multiply_adds(model: nn.Module, example) -> int:
    """Multiply-adds of one image through convolutions, linear and matrix products and attention; ``example``: images
    [n, …]."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example[:1].clone())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def export(network: fx.GraphModule, example, path) -> None:
    """Write a narrow network as a program that ``torch.export.load(path).module()`` runs without this project.

    ``example``: images [n, C, H, W] of the size that the network is for; the program takes batches of any size. The
    file appears, or is replaced, only when it is complete. Raises InputError where torch.export refuses, OSError where
    the file cannot be written.
    """
    images = _images(network, example)
    try:
        with torch.no_grad():
            program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:
        raise InputError(f"the narrow network cannot be exported: {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:300]}") from error
    path = os.fspath(path)
    handle, partial = tempfile.mkstemp(suffix=".pt2", prefix=".export-", dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.export.save(program, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
