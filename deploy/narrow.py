"""A network with pruned channels made physically narrower, with the same logits (paper §3.5.1).

A pruned output channel is a row of a Conv2d or Linear weight that is exactly zero. The network is exported to a graph
of ATen operations, and two things are followed through it together: the values of one forward, and which channels
depend on the images at all. A channel that does not (the bias of a pruned one, its BatchNorm shift, the activation of
that, zero-padded borders included) is a constant, and the forward has shown which. Every value then carries only the
channels that depend on the images and that somebody reads; a layer that reads it drops the other columns and takes
their constant product into its bias, or, where zero padding makes it differ at the borders, adds it as a map. An
operation that needs a channel that was taken out (residual sums, attention heads, LayerNorm) gets the narrow product
scattered among the constants.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import os
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from config import InputError
from deploy.checks import demand, difference
from support.files import replace_file
from support.own import copy_network, forward, said, untouched, visible_attention

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}
MATMULS = {aten.matmul.default, aten.mm.default}
PADS = {aten.constant_pad_nd.default, aten.pad.default}
SIZED = {aten.reshape.default, aten.expand.default}  # the new shape is their second argument
# How channels go through an operation; "spatial": dimension 1 of the output is that of the input, channel by channel.
KINDS = {
    "layer": {*CONVOLUTIONS, aten.linear.default}, "norm": {aten.batch_norm.default}, "cat": {aten.cat.default},
    "spatial": {aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
                aten.adaptive_max_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec},
    "reduction": {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default},
    "move": {*SIZED, *PADS, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.t.default,
             aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int,
             aten.roll.default, aten.flip.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
             aten.detach.default, aten.to.dtype, aten._to_copy.default},
    "pointwise": {aten.hardswish.default}}  # and what torch tags as such
KIND_OF = {target: kind for kind, targets in KINDS.items() for target in targets}


@dataclass
class Value:
    """What one forward of two images shows of one tensor of the graph, and which of its channels are computed."""
    shape: tuple[int, ...]  # with a batch of two
    kind: str = ""  # how channels go through the operation (:func:`_kind`)
    batch: tuple[int, ...] = ()  # dimensions whose size depends on the batch's
    reached: bool = True  # whether the images reach any of it
    known: torch.Tensor | None = None  # the whole tensor, where no image reaches it and no size depends on the batch
    dim: int | None = None  # dimension of the channels; None where there is none to follow, and nothing below is set
    links: dict = field(default_factory=dict)  # operand → [C] which of its channels each one is made of, -1 for none
    origin: fx.Node | None = None  # the operand that has the channels, where the operation cannot choose its own
    alive: torch.Tensor | None = None  # [C] bool: the images reach it, or its constant differs within the batch
    const: torch.Tensor | None = None  # the other channels, and zeros; of size 1 along dimensions where all agree
    need: torch.Tensor | None = None  # [C] bool: is computed, where the operation chooses (layers, sums, cat)
    inside: torch.Tensor | None = None  # bool: the input channels that a convolution in groups reads


def _program(model, images, functional=False):
    """The forward of a network as torch.export sees it, for batches of any size; without side effects if asked."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch writes pages before it raises
    try:
        with torch.no_grad(), visible_attention(), contextlib.redirect_stderr(io.StringIO()):
            shapes = torch.export.ShapesCollection()
            shapes[images] = {0: torch.export.Dim.DYNAMIC}  # wherever forward takes them, *args too
            try:
                program = torch.export.export(model, (images,), dynamic_shapes=shapes)
            except Exception as error:
                if "Constraints violated" not in str(error) and "specialized" not in str(error):
                    raise
                program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=True)  # len(images)
            mutable = any(_operation(node) and node.target._schema.is_mutable for node in program.graph.nodes)
            return program.run_decompositions({}) if functional and mutable else program
    except Exception as error:  # whatever the network's own code, and torch.export's, raise
        why = said(error)
        size = " for batches of any size" if "Constraints violated" in why or "specialized" in why else ""
        raise InputError(f"{type(model).__name__} cannot be exported{size}: {why}") from error
    finally:
        logging.disable(disabled)


def _graph(program) -> fx.GraphModule:
    """A program's operations, in one way where the exporter has several, with all their positional arguments."""
    module, constant = program.module(check_guards=False), set()
    for node in list(module.graph.nodes):
        if node.target is aten.copy_.default and not node.users:  # into a buffer or the images, when all is done
            module.graph.erase_node(node)
            continue
        if node.op == "get_attr" and not isinstance(operator.attrgetter(node.target)(module), torch.Tensor):
            raise InputError(f"the network runs part of its forward as a graph within the graph ({node.target}), "
                             "which cannot be made narrower")  # autocast, cond, ...
        if node.op == "call_function" and "_functorch" in str(getattr(node.target, "__module__", "")):
            raise InputError("the network transforms a function in its forward (torch.vmap, torch.func.grad …), which "
                             "cannot be made narrower")
        if node.op == "get_attr" or node.all_input_nodes and constant.issuperset(node.all_input_nodes):
            constant.add(node)
        if _operation(node):
            _normalise(module.graph, node, constant)
    return module


def _operation(node):
    return isinstance(node.target, torch._ops.OpOverload)


def _normalise(graph, node, constant):
    kwargs, arguments = dict(node.kwargs), [a for a in node.target._schema.arguments if not a.kwarg_only]
    node.args = (*node.args, *(kwargs.pop(a.name, a.default_value) for a in arguments[len(node.args):]))
    node.kwargs = kwargs
    if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
        graph.erase_node(node)
    elif node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default  # the same, in every memory layout
    elif node.target is aten.squeeze.default:  # a dimension that comes down to one channel is none of these
        sizes = node.args[0].meta["val"].shape
        node.target, node.args = aten.squeeze.dims, (node.args[0], [d for d, size in enumerate(sizes) if size == 1])
    elif node.target in (aten.dropout.default, aten.feature_dropout.default) and not node.args[2]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    elif node.target is aten._native_batch_norm_legit_no_training.default:
        node.target, node.args = aten.batch_norm.default, (*node.args[:5], False, *node.args[5:], True)
        node.meta["val"] = node.meta["val"][0]  # the other results are empty
        for user in list(node.users):
            user.replace_all_uses_with(node)
            graph.erase_node(user)
    elif node.target in MATMULS and not node.kwargs:  # a product with a constant is a linear layer
        x, weight = node.args
        if weight in constant and len(weight.meta["val"].shape) == 2:
            with graph.inserting_before(node):
                rows = graph.call_function(aten.t.default, (weight,))
            rows.meta["val"] = weight.meta["val"].t()
            node.target, node.args = aten.linear.default, (x, rows, None)


def _source(node):
    """What a constant is computed from first: a parameter, if from any."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _kind(node, values):
    """How channels go through an operation, by what is known of its operands; "" where nothing is to be known."""
    target, args = node.target, node.args
    if not _operation(node) or torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return ""
    kind = KIND_OF.get(target, "pointwise" if torch.Tag.pointwise in target.tags else "")
    if kind in ("layer", "norm"):
        constants = args[1:3 if kind == "layer" else 5]
        if not values[args[0]].reached or any(c is not None and values[c].known is None for c in constants):
            return ""
    if kind == "layer" and args[2] is not None and values[args[2]].shape != values[args[1]].shape[:1] \
            or kind == "norm" and (args[5] or args[3] is None):  # a broadcast bias; by the statistics of the batch
        return ""
    if target is aten.pad.default and args[2] != "constant":
        return ""
    return "" if target in CONVOLUTIONS and len(values[args[0]].shape) != 4 else kind


def _groups(node):
    return node.args[6] if node.target in CONVOLUTIONS else 1


def _axis(node, value):
    """Dimension of the channels of a layer's input and output."""
    return 1 if node.target in CONVOLUTIONS else len(value.shape) - 1


def _where(mask):
    return mask.nonzero()[:, 0]


class _Watch(fx.Interpreter):
    """Runs the graph once. ``values``: every node → what that shows of its value."""

    def run_node(self, node):
        out = super().run_node(node)
        self.values[node] = _value(node, out, self.values, self.env)
        return out


def _value(node, out, values, data):
    """What a node's result shows. ``data``: the tensors and numbers of its operands."""
    inputs = node.all_input_nodes
    random = _operation(node) and torch.Tag.nondeterministic_seeded in node.target.tags
    reached = node.op == "placeholder" or random or any(values[n].reached for n in inputs)
    if not isinstance(out, torch.Tensor):  # a number, several tensors, or the output of the graph
        return Value((), reached=reached and node.target is not aten.sym_size.int)
    value = Value(tuple(out.shape), _kind(node, values), reached=reached)
    if node.op != "get_attr":
        value.batch = tuple(i for i, size in enumerate(node.meta["val"].shape) if isinstance(size, torch.SymInt))
    if not reached:
        value.known = None if value.batch else out.detach()
        return value
    dim, links = _channels(node, value, values, data)
    if dim is None or dim in value.batch:
        return value
    value.dim, value.links = dim, links
    wide = [n for n in links if values[n].known is None] if value.kind != "pointwise" else [
        n for n in inputs if values[n].known is None and _has(values[n], value, dim)]
    value.origin = wide[0] if len(wide) == 1 and value.kind != "cat" else None
    value.alive = _alive(node, value, values, data) | ~_by_channel(out.isfinite(), dim)
    value.need = torch.zeros_like(value.alive)
    along = [-1 if d == dim else 1 for d in range(out.dim())]
    for d in value.batch:  # a constant that differs there cannot be written down for batches of any size
        value.alive |= ~_by_channel(_equal(out, d), dim)
    value.const = out.masked_fill(value.alive.view(along), 0)
    for d in set(range(out.dim())) - {dim}:
        if d in value.batch or _equal(value.const, d).all():
            value.const = value.const.narrow(d, 0, 1)
    value.const = value.const.clone()
    return value


def _by_channel(mask, dim):
    """Which channels [C] of a mask are all True."""
    return mask.movedim(dim, 0).reshape(mask.shape[dim], -1).all(1)


def _close(a, b):
    """Which elements of two tensors are equal up to rounding."""
    if not a.is_floating_point():
        return a == b
    return (a - b).abs() <= 16 * torch.finfo(a.dtype).eps * b.abs()


def _equal(tensor, along):
    """Which elements are, up to rounding, those at the first position along a dimension; bool like ``tensor``."""
    return _close(tensor, tensor.narrow(along, 0, 1))


def _channels(node, value, values, data):
    """(``dim``, ``links``) of a result; (None, {}) where its channels cannot be followed."""
    kind, shape, nothing = value.kind, value.shape, (None, {})
    if kind == "layer":
        return _axis(node, value), {}
    inputs = [n for n in node.all_input_nodes if values[n].dim is not None]
    if not kind or not inputs:
        return nothing
    x = values[inputs[0]]
    same = torch.arange(x.shape[x.dim])
    if kind in ("norm", "spatial"):
        return (1, {inputs[0]: same}) if x.dim == 1 and len(x.shape) == len(shape) else nothing
    if kind == "reduction":
        gone = {d % len(x.shape) for d in node.args[1] or range(len(x.shape))}
        dim = x.dim if node.args[2] else x.dim - sum(d < x.dim for d in gone)
        return nothing if x.dim in gone else (dim, {inputs[0]: same})
    if kind == "move":
        dim, source = _moved(node, x, data)
        return dim, {inputs[0]: source}
    if kind == "cat" and node.args[1] % len(shape) == x.dim:
        parts = node.args[0]
        if len(set(parts)) < len(parts) or any(values[n].dim != x.dim for n in inputs):
            return nothing
        channels, links, begin = torch.arange(shape[x.dim]), {}, 0
        for n in parts:
            end = begin + values[n].shape[x.dim]
            links[n] = torch.where((begin <= channels) & (channels < end), channels - begin, -1)
            begin = end
        return x.dim, links
    for n in inputs:  # elementwise, or concatenated along another dimension: of operands that may be broadcast
        dim = values[n].dim + len(shape) - len(values[n].shape)
        if values[n].shape[values[n].dim] == shape[dim] > 1:
            return dim, {m: torch.arange(shape[dim]) for m in inputs if _has(values[m], value, dim)
                         and values[m].dim + len(shape) - len(values[m].shape) == dim}
    return nothing


def _has(x, value, dim):
    """Whether an operand of an elementwise operation has the channels of the result, instead of being broadcast."""
    aligned = dim - len(value.shape) + len(x.shape)
    return aligned >= 0 and x.shape[aligned] == value.shape[dim]


def _moved(node, x, data):
    """:func:`_channels` of an operation that only moves elements: seen by moving the number of each one's channel."""
    same = torch.arange(x.shape[x.dim])
    args = fx.node.map_arg(node.args, lambda n: data[n])
    if node.target in PADS:
        position = 2 * (len(x.shape) - 1 - x.dim)
        return (None, None) if any(args[1][position:position + 2]) else (x.dim, same)
    out = same.view([-1 if d == x.dim else 1 for d in range(len(x.shape))]).expand(x.shape)
    if node.target not in (aten.to.dtype, aten._to_copy.default):
        out = node.target(out, *args[1:], **node.kwargs)
    varying = [d for d in range(out.dim()) if not torch.equal(out, out.narrow(d, 0, 1).expand(out.shape))]
    if len(varying) != 1:  # the channels are not in order along one dimension
        return None, None
    source = out.movedim(varying[0], 0).flatten(1)[:, 0] if out.dim() > 1 else out
    if node.target not in (aten.reshape.default, aten.flatten.using_ints) and not torch.equal(source, same):
        return None, None
    return varying[0], source


def _alive(node, value, values, data):
    """Which channels [C] of a result depend on the images."""
    if value.kind == "layer":
        weight, groups = values[node.args[1]].known, _groups(node)
        columns = _columns(node, values).view(groups, -1).any(1)
        return _rows(weight) & columns.repeat_interleave(len(weight) // groups)
    reaches = {}
    for n in node.all_input_nodes:
        x, link = values[n], value.links.get(n)
        there = torch.ones(value.shape[value.dim], dtype=torch.bool) if link is None else link >= 0
        reaches[n] = there & (x.reached if link is None or x.dim is None else x.alive[link])
    alive = torch.stack(list(reaches.values())).any(0)
    if node.target is aten.mul.Tensor and isinstance(node.args[1], fx.Node):
        for n in node.args:  # nothing gets through a constant zero
            alive &= reaches[n] | data[n].expand(value.shape).movedim(value.dim, 0).flatten(1).ne(0).any(1)
    return alive


def _columns(node, values):
    """The input channels [in] of a layer that depend on the images."""
    x, weight = values[node.args[0]], values[node.args[1]].known
    return x.alive if x.dim == _axis(node, x) else torch.ones(weight.shape[1] * _groups(node), dtype=torch.bool)


def _plan(graph, values) -> None:
    """Set ``need`` and ``inside`` of the values: from the logits back, what depends on the images and a user reads."""
    whole = set()
    for node in reversed(graph.graph.nodes):
        value = values[node]
        if value.kind == "layer" and value.dim is not None:
            value.need = _padded(node, value, values)
        elif node in whole and value.origin is None and len(node.users) > 1:
            value.need = torch.ones_like(value.need)  # scattered once, here, instead of before each of them
        if value.dim is not None and not value.need.any():
            value.need[0] = True
        for n in (n for n in node.all_input_nodes if values[n].dim is not None):
            wanted = _wanted(node, n, values)
            if wanted is None:
                whole.add(n)
            values[n].need = values[n].need | (values[n].alive if wanted is None else wanted)


def _wanted(node, n, values):
    """The channels [C] of operand ``n`` that ``node`` needs; None: all, scattered into place."""
    x, value = values[n], values[node]
    if value.kind == "layer" and x.dim == _axis(node, x):
        return x.alive if value.inside is None else x.alive & value.inside
    if n not in value.links:
        return None
    link, wanted = value.links[n], torch.zeros_like(x.alive)
    wanted[link[value.need & (link >= 0)]] = True
    return wanted & x.alive if value.origin is None else wanted


def _padded(node, value, values):
    """The output channels that a layer computes: as many in each group of which any is needed. Sets ``inside``."""
    groups = _groups(node)
    if groups == 1:
        return value.need
    rows = value.need.view(groups, -1)
    columns = _columns(node, values).view(groups, -1)
    remain = rows.any(1)
    remain[0] |= not remain.any()

    def filled(mask):  # in each group that remains, the marked ones first
        count = max(1, int(mask[remain].sum(1).max()))
        order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(mask).scatter_(1, order, remain[:, None].expand(order.shape)).flatten()
    value.inside = filled(columns)
    return filled(rows)


class _Writer:
    """A new graph, and the values of the old one in it with other channels. ``made``: old node → new node; ``masks``:
    old node → which channels the new one has; old nodes without an entry have all of everything."""

    def __init__(self, old, values):
        self.old, self.values = old, values
        self.graph, self.root = fx.Graph(), nn.Module()
        self.made, self.masks, self.cache = {}, {}, {}

    def call(self, target, *args, **kwargs):
        return self.graph.call_function(target, args, kwargs)

    def once(self, key, make):
        """What ``make`` returns, the first time for every key; masks in a key count by their elements."""
        key = tuple(bytes(k.cpu().numpy()) if isinstance(k, torch.Tensor) else k for k in key)
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def mask(self, node):
        value = self.values[node]
        return self.masks.get(node, torch.ones(value.shape[value.dim], dtype=torch.bool))

    def take(self, node, dim=None, mask=None):
        """The new node of ``node`` with the channels ``mask`` [C] along ``dim``; whole without them."""
        if node.op == "get_attr" and node not in self.made:
            self.made[node] = self.tensor(node.target, operator.attrgetter(node.target)(self.old))
        new, value, have = self.made[node], self.values[node], self.masks.get(node)
        if have is not None and dim != value.dim:
            new, have = self.adapt(node, new, value.dim, have, torch.ones_like(have)), None
        if dim is None or have is None and mask.all():
            return new
        if value.known is not None:  # some of the channels of a constant
            return self.once((node, dim, mask), lambda: self.tensor(
                _name(node), value.known.index_select(dim, _where(mask))))
        return self.adapt(node, new, dim, torch.ones_like(mask) if have is None else have, mask)

    def adapt(self, node, new, dim, have, want):
        """``new``, which has the channels ``have`` of ``node`` along ``dim``, with the channels ``want``: without those
        that are not wanted, and scattered among the constants of those that it has not.

        As a matrix with the channels last, for which index_select and index_add are several times as fast as along a
        dimension of a larger tensor; images come out channels-last, the faster for convolutions.
        """
        def rearranged():
            count, dims = int(want.sum()), len(self.values[node].shape)
            last = self.call(aten.movedim.int, new, dim, -1)
            sizes = [*(self.call(aten.sym_size.int, last, d) for d in range(dims - 1)), count]
            result = self.call(aten.reshape.default, last, [-1, int(have.sum())])
            if not want[have].all():
                result = self.call(aten.index_select.default, result, 1, self.index(_where(want[have])))
            if not have[want].all():
                base = self.values[node].const.movedim(dim, -1)[..., want] * ~have[want]
                full = self.call(aten.expand.default, self.spread(f"{node.name}.constant", base, dims - 1), sizes)
                full = self.call(aten.clone.default, full, memory_format=torch.contiguous_format)
                full = self.call(aten.view.default, full, [-1, count])
                result = self.call(aten.index_add_.default, full, 1, self.index(_where(have[want])), result)
            return self.call(aten.movedim.int, self.call(aten.view.default, result, sizes), -1, dim)
        return new if torch.equal(have, want) else self.once((node, dim, have, want), rearranged)

    def index(self, positions):
        """A node that reads positions [n]."""
        return self.once(("index", positions), lambda: self.tensor("index", positions))

    def spread(self, name, constant, dim):
        """A node with a constant that has the channels along ``dim``; what repeats along the other dimensions (the
        inside of a map, between its borders) is stored once."""
        constant, indices = constant.movedim(dim, -1), {}
        for along in range(constant.dim() - 1):
            different, index = constant.unique_consecutive(dim=along, return_inverse=True)
            if different.shape[along] < len(index):
                constant, indices[along] = different, index
        node = self.tensor(name, constant.contiguous())
        for along, index in indices.items():
            node = self.call(aten.index_select.default, node, along, self.index(index))
        return self.call(aten.movedim.int, node, -1, dim)

    def tensor(self, name, tensor):
        """A node that reads a parameter or buffer, registered under ``name`` or the next free name like it."""
        *path, leaf = name.split(".")
        owner = self.root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        free = next(f for f in (leaf, *(f"{leaf}_{i}" for i in range(1, 10_000))) if not hasattr(owner, f))
        register = owner.register_parameter if isinstance(tensor, nn.Parameter) else owner.register_buffer
        register(free, tensor)
        return self.graph.get_attr(".".join([*path, free]))


class _Narrow(_Writer):
    """Writes the graph anew, node by node. ``stays``: layer that still computes pruned channels → why."""

    def __init__(self, old, values):
        super().__init__(old, values)
        self.stays = {}

    def run(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = self.graph.placeholder(node.name)
            elif node.op == "call_function":
                self.write(node)
            elif node.op == "output":
                logits, = node.args[0]
                self.graph.output(self.take(logits))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        network = fx.GraphModule(self.root, self.graph, type(self.old).__name__)
        network.meta["stays"] = self.stays
        return network.eval().requires_grad_(False)

    def write(self, node):
        value = self.values[node]
        if value.dim is None:
            self.made[node] = self.graph.node_copy(node, self.take)
            self.unfollowed(node)
        elif value.kind == "layer":
            self.layer(node)
        else:
            mask = value.need if value.origin is None else self.mask(value.origin)[value.links[value.origin]]
            self.made[node] = self.other(node, mask)
            self.masks[node] = mask

    def other(self, node, mask):
        """A norm, an elementwise operation, a concatenation, a pooling or a move, on the channels ``mask`` [C]."""
        value = self.values[node]
        if value.kind == "cat" and any((link < 0).any() for link in value.links.values()):
            pieces = [(n, mask[link >= 0]) for n, link in value.links.items()]
            parts = [self.take(n, value.dim, piece) for n, piece in pieces if piece.any()]
            return self.call(aten.cat.default, parts, value.dim) if len(parts) > 1 else parts[0]

        def take(n):
            x = self.values[n]
            if value.kind == "norm":
                return self.take(n, 1 if x.reached else 0, mask)
            if value.kind in ("pointwise", "cat"):
                wide = x.shape and _has(x, value, value.dim)
                return self.take(n, value.dim - len(value.shape) + len(x.shape), mask) if wide else self.take(n)
            return self.take(n, x.dim, self.mask(n)) if x.dim is not None else self.take(n)
        new = self.graph.node_copy(node, take)
        if node.target in SIZED and not mask.all():
            sizes = list(new.args[1])
            sizes[value.dim - len(value.shape)] = int(mask.sum())
            new.args = (new.args[0], sizes)
        return new

    def layer(self, node):
        """A convolution or linear product with the rows that are needed and the columns that are there."""
        value, (x, weight, bias), groups = self.values[node], node.args[:3], _groups(node)
        axis, rows, full = _axis(node, self.values[x]), value.need, self.values[weight].known
        if value.inside is not None:
            inside = value.inside
        else:
            inside = self.mask(x) if self.values[x].dim == axis else torch.ones(full.shape[1], dtype=torch.bool)
        self.note(node, full)
        self.masks[node] = rows
        if rows.all() and inside.all():
            self.made[node] = self.graph.node_copy(node, self.take)
            return
        product = self.dropped(node, full, rows, inside)
        vector = product is not None and product.numel() == rows.sum()
        shift = None if bias is None else self.values[bias].known[rows].double()
        if vector:
            shift = product.flatten() + (0 if shift is None else shift)
        stem = _name(weight).removesuffix("weight")
        args = [self.take(x, axis, inside), self.once((weight, rows, inside), lambda: self.tensor(
            _name(weight), nn.Parameter(_narrowed(full, rows, inside, groups).contiguous())))]
        args.append(None if shift is None else self.tensor(
            stem + "bias" if bias is None else _name(bias), nn.Parameter(shift.to(full.dtype))))
        if node.target in CONVOLUTIONS:
            args += [*node.args[3:6], int(rows.view(groups, -1).any(1).sum())]
        new = self.call(node.target, *args)
        if product is not None and not vector:
            new = self.call(aten.add.Tensor, new, self.spread(stem + "map", product.to(full.dtype), axis))
        self.made[node] = new

    def dropped(self, node, full, rows, inside):
        """What the columns that were dropped add to each output channel in ``rows``: float64, of size 1 in every
        dimension along which it is the same; None where that is nothing."""
        x = self.values[node.args[0]]
        if inside.all() or x.dim is None:
            return None
        const = x.const.double()
        const = const * ~inside.view([-1 if d == x.dim else 1 for d in range(const.dim())])
        if not const.any():
            return None
        if node.target not in CONVOLUTIONS:
            return const @ full[rows].double().t()
        const, groups = const.expand(1, -1, *x.shape[2:]), _groups(node)
        if groups == 1:
            const, full = const[:, ~inside], full[:, ~inside]
        product = node.target(const, full.double(), None, *node.args[3:6], groups)[:, rows]
        for along in (2, 3):
            if _equal(product, along).all():
                product = product.narrow(along, 0, 1)
        return product if product.any() else None

    def unfollowed(self, node):
        """Record kernels with pruned channels that go into an operation of which nothing is known."""
        if self.values[node].reached and not self.values[node].kind:
            for source in (_source(n) for n in node.all_input_nodes if not self.values[n].reached):
                if source.op == "get_attr" and self.values[source].known.dim() > 1:
                    self.stay(source, ~_rows(self.values[source].known), "",
                              f"used in {node.target}, which is not followed")

    def note(self, node, full):
        """Record a layer that still computes pruned channels."""
        rows, pruned = self.values[node].need, ~_rows(full)
        if _groups(node) > 1:
            why = "a convolution in groups, which do not keep equally many channels"
        elif rows.sum() == 1:
            why = "none of its channels is both kept and read, one is left"
        else:
            why = "the constants of its pruned channels depend on the position in the batch"
        self.stay(node.args[1], pruned & rows, f"of {int(pruned.sum())} ", why)

    def stay(self, weight, rows, of, why):
        if rows.any():
            self.stays[_name(weight).removesuffix(".weight")] = f"{int(rows.sum())} {of}pruned channels stay: {why}"


def _rows(weight):
    """Which rows [out] of a weight are not pruned."""
    return weight.flatten(1).ne(0).any(1)


def _name(node):
    """Name of the parameter that a constant is, or is computed from first."""
    source = _source(node)
    return source.target if source.op == "get_attr" else node.name


def _narrowed(weight, rows, inside, groups):
    """Rows, and in each group the columns, of a weight [out, in / groups, …]."""
    parts = zip(weight.chunk(groups), rows.view(groups, -1), inside.view(groups, -1))
    return torch.cat([part[keep][:, columns] for part, keep, columns in parts if keep.any()])


def materialize(model: nn.Module, example) -> fx.GraphModule:
    """Return a network without the pruned channels, and with the logits of ``model`` in eval mode.

    A channel is pruned where its row of a Conv2d or Linear weight is exactly zero. ``example``: images [n, C, H, W]
    of the size that the narrow network is for. The result takes batches of any size, is in eval mode for good, needs
    no gradients, and keeps the device, the type and, for what remains of them, the names of the parameters. ``model``
    stays as it is. :func:`stays` says what could not shrink. Raises InputError for a network that fails on the images,
    that torch.export cannot export, or whose narrow form gives other logits on random images (deploy.checks).
    """
    images = _images(model, example)
    with torch.no_grad():
        network = copy_network(model).cpu()  # masks and indices are made there
        network.eval()
        forward(network, images.cpu().clone())
        graph = _graph(_program(network, images.cpu(), functional=True))
        watch = _Watch(graph)
        watch.values = values = {}
        watch.run(images.cpu().clone(), enable_io_processing=False)
        _plan(graph, values)
        narrowed = _Narrow(graph, values).run()
        found = difference(network, narrowed, images.cpu(), exact=False)
        with contextlib.suppress(InputError):  # in double precision only what is wrong is left, and not what is rounded
            found = found and difference(*(copy.deepcopy(n).double() for n in (network, narrowed)),
                                         images.cpu().double(), exact=False)
        demand("the narrow network", found, "the network does something with its channels that is not followed")
        return narrowed.to(images.device)


def stays(network: fx.GraphModule) -> dict[str, str]:
    """Map each layer whose pruned channels :func:`materialize` could not take out, or not all, to the reason."""
    return dict(network.meta["stays"])


def _images(model, example):
    """Two images for a network, on its device; of their own type where it takes that, else of the weights' type."""
    if not isinstance(model, nn.Module) or any(p.is_meta or is_lazy(p) for p in model.parameters()):
        raise InputError(f"expected a torch.nn.Module with values, not a {type(model).__name__}, or on the meta "
                         "device, or lazy")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        raise InputError(f"{type(model).__name__} has no parameters, nothing to make narrower")
    if not isinstance(example, torch.Tensor) or example.dim() < 2 or not len(example):
        raise InputError("example: expected a batch of images [n, C, H, W]")
    images = example[:1].detach().to(weight.device).repeat(2, *[1] * (example.dim() - 1))
    if images.dtype != weight.dtype:
        with contextlib.suppress(InputError), untouched(model):
            forward(model, images.clone())
            return images
    return images.to(weight.dtype)


def multiply_adds(model: nn.Module, example) -> int:
    """Count the multiply-adds of one image through convolutions, linear and matrix products and attention.

    Not those of nn.Bilinear, nor on a CPU of nn.LSTM, which torch's counter does not see. ``example``: images [n, …].
    Raises InputError where the network fails on them."""
    network = copy_network(model).requires_grad_(False)  # otherwise the counter stumbles over views of parameters
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kinds are not counted
        forward(network, example[:1].clone())
    return counter.get_total_flops() // 2


def export(network: fx.GraphModule, example, path) -> None:
    """Write a narrow network as a program that ``torch.export.load(path).module()`` runs without this project.

    ``example``: images [n, C, H, W] of the size that the network is for; the program takes batches of any size. The
    file appears, or is replaced, only when it is complete. Raises InputError where torch.export refuses, OSError where
    the file cannot be written.
    """
    images = _images(network, example)
    program = _program(network, images)
    demand("the exported program", difference(network, program.module(), images, exact=False), "export it otherwise")
    replace_file(os.fspath(path), lambda file: torch.export.save(program, file))
