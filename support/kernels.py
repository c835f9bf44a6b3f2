"""Which weights of a network are kernels, and how kernels form blocks (paper §3.2).

Any network that maps a batch to logits will do: one forward of a batch is recorded operation by operation, and the
rest is read off that graph. A kernel is the weight of a Conv2d or Linear, or an input projection of
nn.MultiheadAttention, in the order in which the forward uses them first, however it uses them: by calling the module,
by giving its weight to a function, several times, or under several names; and any other parameter that is only ever
given, as it is, to a two-dimensional convolution or a linear layer. By structure, never by name, two kinds are left
out: the classifier (no kernel comes after it on the way to the logits) and 1×1 projections on residual shortcuts.
Whatever else is left out is named with its reason.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import InputError
from support.own import forward, untouched

CLASSIFIER = "classifier: no kernel comes after it on the way to the logits"
SHORTCUT = "1x1 projection on a residual shortcut"
UNREACHED = "not reached by the forward of the traced images in eval mode"
INDIRECT = "not used as it is: the forward computes another tensor from it first"
ELSEWHERE = "the forward reads it from elsewhere than its module (a list, a closure), where no other can be tried"
PATCHES = "patch embedding: not part of an encoder block"
LAST = "last 1x1 convolution, not among the paper's 51 kernels"
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


@dataclass(frozen=True)
class ParameterKernel:
    """A kernel that no Conv2d or Linear holds, for example ``in_proj_weight`` of nn.MultiheadAttention."""
    owner: nn.Module
    attribute: str

    @property
    def weight(self) -> nn.Parameter:  # [n_out, …], like that of a Conv2d or Linear
        return getattr(self.owner, self.attribute)


@dataclass
class Block:
    """A group of kernels that one low-level ensemble configures (B_i of the paper)."""
    name: str
    kernels: dict[str, nn.Module | ParameterKernel]  # dotted name → what has the kernel as its ``weight``, ordered
    parameters: tuple[str, ...]  # names of those whose Fisher information makes up s_i (Eq. 14): all of an encoder
    # block for this project's ViTs, weights and biases of the kernels otherwise
    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)  # kernel → all names of its weight
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)  # kernel → of these one per module that holds it
    whole: tuple[str, ...] = ()  # kernels that keep all their output channels, since those are the classes

    def replaced(self, weights) -> dict[str, torch.Tensor]:
        """Map names for :func:`swapped` to ``weights``, one per kernel."""
        return {place: weight for places, weight in zip(self.places.values(), weights) for place in places}

    @property
    def state_names(self) -> tuple[str, ...]:
        """Return all names in the state dict that hold a kernel of this block; a shared kernel has several."""
        return tuple(name for names in self.tensors.values() for name in names)


@dataclass
class Kernel:
    """A weight that could be compressed, or the reason why not."""
    name: str  # dotted name of its module, or of the parameter where it is used without one
    holder: nn.Module | ParameterKernel | None  # has the kernel as ``weight``; None where nothing can be compressed
    tensors: tuple[str, ...]  # names in the state dict; of a computed weight, of what it is computed from
    params: int
    shape: tuple[int, ...]
    places: tuple[str, ...] = ()  # of the names one per module that holds it
    biases: tuple[str, ...] = ()  # names of the biases that belong to it
    reason: str = ""  # why it is left out; "" for a kernel that is compressed
    classifier: bool = False  # whether it gives the logits

    @property
    def names(self) -> set[str]:
        """Return every name by which ``exclude`` and ``groups`` may call it."""
        return {self.name, *self.tensors, *(t.removesuffix(".weight") for t in self.tensors)}


def registered_kernels(model: nn.Module) -> list[Kernel]:
    """Return the Conv2d and Linear weights and the input projections of MultiheadAttention, in registration order.

    A weight that several modules share is one kernel. One that is computed from other parameters (weight_norm,
    torch.nn.utils.parametrize, prune) has no ``holder`` and its reason set.
    """
    return list({k.name: k for k in _registered(model, _names(model)).values()}.values())


def _names(model) -> dict[int, tuple[str, ...]]:
    """Map the id of each parameter to every name that it has."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def _places(model) -> dict[int, tuple[str, ...]]:
    """Map the id of each parameter to one name per module that holds it."""
    places = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            places[id(parameter)] = (*places.get(id(parameter), ()), f"{prefix}.{leaf}" if prefix else leaf)
    return places


def _registered(model, names) -> dict[int, Kernel]:
    """The kernels of :func:`registered_kernels` by the ids of their parameters."""
    kernels, places = {}, _places(model)
    for prefix, module in model.named_modules():
        dot, held = f"{prefix}." if prefix else "", module._parameters
        if isinstance(module, nn.MultiheadAttention):
            leaves, bias = (leaf for leaf in ATTENTION_WEIGHTS if held.get(leaf) is not None), held.get("in_proj_bias")
            named = [(dot + leaf, ParameterKernel(module, leaf)) for leaf in leaves]
        elif not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        elif "weight" in held:
            named, bias = [(prefix or "weight", module)], held.get("bias")
        else:
            parts = {dot + n: p for n, p in module.named_parameters()
                     if n != "bias" and not n.startswith("parametrizations.bias.")}
            kernel = Kernel(prefix or "weight", None, tuple(parts), sum(p.numel() for p in parts.values()), (),
                            reason=f"its weight is computed from other parameters ({', '.join(parts)})")
            kernels.update((id(p), kernel) for p in parts.values())
            continue
        for name, holder in named:  # named_parameters knows a shared tensor by its first name
            kernels.setdefault(id(holder.weight), Kernel(
                name, holder, names[id(holder.weight)], holder.weight.numel(), tuple(holder.weight.shape),
                biases=() if bias is None else (names[id(bias)][0],)))
    for kernel in kernels.values():
        kernel.places = places[id(kernel.holder.weight)] if kernel.holder is not None else ()
    return kernels


# Operations that combine a tensor with a weight along a shared dimension, and where their two operands stand.
PRODUCTS = {"convolution": (0, 1), "linear": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
MOVES = {"cat", "stack", "index", "index_select", "gather", "embedding", "index_put", "index_put_", "constant_pad_nd"}
COPIES = {"clone", "_to_copy", "copy_", "lift_fresh"}
# Parts of norms that are not called norm, and elementwise operations without torch's tag for them.
CHAIN = {"mean", "var", "var_mean", "std", "std_mean", "sum", "hardswish", "hardswish_", "_prelu_kernel", *COPIES}


@dataclass
class _Node:
    """One operation of the forward."""
    parents: tuple[int, ...]  # nodes of what it read
    data: bool  # whether the images reach it
    weights: frozenset = frozenset()  # ids of the parameters that it is computed from, where no image reaches it
    chain: bool = False  # whether it is a norm or works element by element
    add: bool = False
    uses: frozenset = frozenset()  # ids of the parameters behind the weight that it applies
    source: int | None = None  # node of what the weight is applied to


class _Trace(TorchDispatchMode):
    """Records the dataflow of one forward, below autograd, where every composite function has come apart.

    A tensor is identified by its storage: a view has its base's node, and writing in place gives the storage a new
    node. ``known``: ids of the parameters of Conv2d, Linear and MultiheadAttention.
    """

    def __init__(self, parameters, example, known):
        super().__init__()
        self.known, self.mine = known, set(map(id, parameters))
        self.nodes: list[_Node] = []
        self.before: list[int] = []  # bit set of the ancestors of each node
        self.current: dict[int, int] = {}  # storage → node of what it holds now
        self.owners: dict[int, list[nn.Parameter]] = {}  # storage → parameters in it
        self.read: set[int] = set()  # parameters that some operation read
        self.alive = []  # a freed storage's address could come back as another tensor's
        self.applied: set[int] = set()  # parameters that some operation applies as they are
        self.otherwise: set[int] = set()  # those used otherwise than as the [n_out, …] of conv2d or linear
        self._add(_Node((), True), [example])
        for parameter in parameters:
            weights = frozenset([id(parameter)]) if parameter.dim() >= 2 else frozenset()
            self._add(_Node((), False, weights), [parameter])
            self.owners.setdefault(_storage(parameter), []).append(parameter)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, func._schema
        if any(isinstance(t, nn.Parameter) and id(t) not in self.mine for t in _tensors((args, kwargs))):
            raise InputError("the forward uses a parameter that is none of the network's: of a module in a plain list "
                             "(use nn.ModuleList), made there, or behind a closure, which a copy does not follow")
        result = func(*args, **kwargs)
        name, read = schema.name.rpartition("::")[2], _tensors((args, kwargs))
        values = {a.name: value for a, value in zip(schema.arguments, args)} | kwargs
        written = _tensors([values.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write])
        storages = {_storage(t) for t in read}
        made = written + [t for t in _tensors(result) if _storage(t) not in storages]
        if not made:
            return result  # a view, or a number
        parameters = [p for p in map(self._parameter, read) if p is not None]
        self.read.update(map(id, parameters))
        parents = tuple(dict.fromkeys(self.current[_storage(t)] for t in read if _storage(t) in self.current))
        node = _Node(parents, any(self.nodes[p].data for p in parents), add=name in ("add", "add_"))
        if not node.data:
            node.weights = frozenset().union(*(self.nodes[p].weights for p in parents))
        node.chain = name in CHAIN or "norm" in name or torch.Tag.pointwise in func.tags
        if name in PRODUCTS:
            self._product(node, [args[i] for i in PRODUCTS[name]], name == "convolution" and not args[6])
        elif node.data and not node.chain and name not in MOVES:
            node.uses = frozenset(id(p) for p in parameters if p.dim() >= 2)  # of an operation that is not followed
            self.applied |= node.uses
        if name in COPIES and len(read) == 1 and parameters:
            self.owners.setdefault(_storage(made[0]), []).append(parameters[0])
        else:
            self.otherwise |= set(map(id, parameters)) - (node.uses if name in PRODUCTS else set())
        self._add(node, made)
        return result

    def _product(self, node, operands, convolution):
        """Find the weight of a product, if it has one: a known kernel, else a parameter, else something computed
        from parameters; of two, the second, where F.linear and F.conv2d have theirs."""
        candidates = [(t, self._parameter(t)) for t in reversed(operands)]
        direct = [(t, p) for t, p in candidates if p is not None and p.dim() >= 2]
        if direct:
            weight, parameter = min(direct, key=lambda pair: id(pair[1]) not in self.known)
            node.uses = frozenset([id(parameter)])
            self.applied |= node.uses
            plain = parameter if convolution else parameter.t() if parameter.dim() == 2 else None
            if plain is None or weight is not operands[1] or weight.dim() != 2 + 2 * convolution or (
                    weight.shape, weight.stride()) != (plain.shape, plain.stride()):
                self.otherwise.add(id(parameter))
        else:
            nodes = [(t, self.nodes[self.node_of(t)]) for t, _ in candidates if self.node_of(t) is not None]
            weight, node.uses = next(((t, n.weights) for t, n in nodes if n.weights), (None, frozenset()))
        node.source = next(self.node_of(t) for t in operands if t is not weight)

    def _parameter(self, tensor):
        """The parameter that a tensor is, or is a view or plain copy of."""
        owners = self.owners.get(_storage(tensor), [])  # several may lie in one storage
        return next((p for p in owners if len(owners) == 1
                     or 0 <= tensor.storage_offset() - p.storage_offset() < max(1, p.numel())), None)

    def _add(self, node, tensors):
        index, ancestors = len(self.nodes), 0
        for parent in node.parents:
            ancestors |= self.before[parent] | 1 << parent
        self.nodes.append(node)
        self.before.append(ancestors)
        self.alive += tensors
        for tensor in tensors:
            self.current[_storage(tensor)] = index

    def node_of(self, tensor) -> int | None:
        return self.current.get(_storage(tensor))

    def above(self, index) -> list[int]:
        """Return the nodes that a node read and that the images reach."""
        return [p for p in self.nodes[index].parents if self.nodes[p].data]


def _classifiers(trace, output) -> set[int]:
    """Parameters of the weights after which no weight comes on the way to the node ``output``."""
    reaches = trace.before[output] | 1 << output
    uses = [i for i, node in enumerate(trace.nodes) if node.uses and reaches >> i & 1]
    after = 0
    for i in uses:
        after |= trace.before[i]
    return {p for i in uses if not after >> i & 1 for p in trace.nodes[i].uses}


def _shortcuts(trace) -> set[int]:
    """Parameters that are only ever used as projections on residual shortcuts.

    Such a weight's result, through norms and elementwise operations alone, is added to a branch that starts from the
    tensor the weight is applied to and applies at least two other weights.
    """
    projections = set()
    for index, total in enumerate(trace.nodes):
        sides = trace.above(index) if total.add else []
        if len(sides) == 2:
            for use, branch in (sides, sides[::-1]):
                while trace.nodes[use].chain and len(trace.above(use)) == 1:
                    use, = trace.above(use)
                if trace.nodes[use].uses and _is_projection(trace, use, branch):
                    projections.add(use)
    others = {p for i, node in enumerate(trace.nodes) if i not in projections for p in node.uses}
    return {p for i in projections for p in trace.nodes[i].uses} - others


def _is_projection(trace, use, branch):
    before, source, own = trace.before[branch] | 1 << branch, trace.nodes[use].source, trace.nodes[use].uses
    if source is None or before >> use & 1:  # x + f(x), x from a 1×1: the branch starts after it
        return False
    while not before >> source & 1:  # a shortcut may pool, normalise or copy before it projects
        if trace.nodes[source].uses or len(trace.above(source)) != 1:
            return False
        source, = trace.above(source)
    between = {trace.nodes[i].uses for i in range(source, branch + 1)
               if before >> i & 1 and trace.before[i] >> source & 1}
    return len(between - {own, frozenset()}) >= 2


def traced_kernels(model: nn.Module, example) -> list[Kernel]:
    """Return the kernels of any network in the order in which one forward of the batch ``example`` uses them first,
    and after them those that it never uses; ``reason`` is set for every one that is not to be compressed.

    The network is left as it was, mode, buffers and random numbers included. Raises InputError where the forward
    fails or does not give logits [n, classes].
    """
    names, places = _names(model), _places(model)
    kernels, parameters = _registered(model, names), list(model.parameters())

    def traced():
        images = example.clone()  # the network may write into its input
        trace = _Trace(parameters, images, set(kernels))
        with untouched(model):
            return trace, forward(model, images, trace)
    trace, logits = traced()
    output = trace.node_of(logits)
    if output is None or not trace.nodes[output].data:
        raise InputError(f"{type(model).__name__}: its logits do not depend on the images")
    final, projections, used = _classifiers(trace, output), _shortcuts(trace), {}
    for p in (p for node in trace.nodes for p in sorted(node.uses, key=lambda p: names[p][0])):
        if p not in kernels and p in trace.applied:
            kernels[p] = _plain(model, names[p], places[p], p in trace.otherwise)
        if p not in kernels or kernels[p].name in used:
            continue
        kernel = used[kernels[p].name] = kernels[p]
        kernel.classifier = p in final
        kernel.reason = kernel.reason or (
            INDIRECT if p not in trace.applied else CLASSIFIER if kernel.classifier else
            SHORTCUT if p in projections and all(side == 1 for side in kernel.shape[2:]) else "")
    for p, kernel in kernels.items():
        if kernel.name not in used and not kernel.reason:
            kernel.reason = INDIRECT if p in trace.read else UNREACHED
    tried = {p: kernel for p, kernel in kernels.items()
             if kernel.holder is not None and kernel.reason in ("", CLASSIFIER, SHORTCUT)}
    others = {place: kernel.holder.weight.detach().clone() for kernel in tried.values() for place in kernel.places}
    with swapped(model, others):  # of which, after all, the search tries many
        read = traced()[0].read
    for p in read & tried.keys():
        tried[p].reason = ELSEWHERE
    return list((used | {k.name: k for k in kernels.values()}).values())


def _plain(model, names, places, otherwise) -> Kernel:
    """The kernel that a parameter is which no Conv2d, Linear or MultiheadAttention holds."""
    path, _, leaf = names[0].rpartition(".")
    owner, weight = model.get_submodule(path), model.get_parameter(names[0])
    bias = ".".join(filter(None, (path, leaf.replace("weight", "bias"))))
    own = owner._parameters.get(leaf.replace("weight", "bias"))  # itself where no weight is in its name
    reason = otherwise and f"weight of a {type(owner).__name__}, used otherwise than as that of conv2d or linear"
    return Kernel(names[0].removesuffix(".weight"), None if otherwise else ParameterKernel(owner, leaf), names,
                  weight.numel(), tuple(weight.shape), places,
                  () if own is None or own.shape != weight.shape[:1] else (bias,), reason or "")


@contextlib.contextmanager
def swapped(model: nn.Module, weights):
    """Let modules compute with other tensors than their parameters: ``weights``, by one name per module that holds the
    parameter (:meth:`Block.replaced`)."""
    named = ((name.rpartition("."), weight) for name, weight in weights.items())
    held = [(own := model.get_submodule(at)._parameters, leaf, weight, own[leaf]) for (at, _, leaf), weight in named]
    try:
        for parameters, leaf, weight, _ in held:
            parameters[leaf] = weight
        yield
    finally:
        for parameters, leaf, _, before in held:
            parameters[leaf] = before


def _storage(tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
