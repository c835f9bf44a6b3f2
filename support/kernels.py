"""Which weights of a network are kernels, and how kernels form blocks (paper §3.2).

Any network that maps a batch to logits will do: one forward of a real batch is watched operation by operation, and
everything is read off the dataflow that it leaves behind. A kernel is the weight of a Conv2d or Linear, or an input
projection of nn.MultiheadAttention, in the order in which the forward uses them first, however it uses them: by
calling the module, by handing its weight to a function, several times, or under several names. By structure, never by
name, two kinds are left out: the classifier (no kernel comes after it on the way to the logits) and 1×1 projections
on residual shortcuts. Whatever else is left out is named with its reason.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from config import InputError
from support.own import forward, untouched

GROUP = 4  # kernels of a block where the network has no blocks of its own

CLASSIFIER = "classifier: no kernel comes after it on the way to the logits"
SHORTCUT = "1x1 projection on a residual shortcut"
UNREACHED = "never reached by the forward"
INDIRECT = "not used as it is: the forward computes another tensor from it first"
PATCHES = "patch embedding: not part of an encoder block"
LAST = "last 1x1 convolution, not among the paper's 51 kernels"
OUT_OF_SCOPE = (CLASSIFIER, SHORTCUT, PATCHES, LAST)  # reasons that hold for compress.scope=paper only


# ---------------------------------------------------------------------------------------------------------------
# Kernels and blocks


@dataclass(frozen=True)
class ParameterKernel:
    """A kernel that no Conv2d or Linear holds, for example ``in_proj_weight`` of nn.MultiheadAttention; like those
    modules it has the kernel as its ``weight`` [n_out, …]."""
    owner: nn.Module
    attribute: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.owner, self.attribute)


@dataclass
class Block:
    """A group of kernels that one low-level ensemble configures (B_i of the paper).

    ``kernels``: full dotted name → Conv2d/Linear module or :class:`ParameterKernel`, ordered; the kernel itself is
    its ``weight``. ``parameters``: full dotted names of the parameters whose Fisher information makes up s_i (Eq. 14):
    everything under the encoder block for this project's ViTs, the weights and biases of its own kernels otherwise.
    ``tensors``: kernel → all names of its weight in the state dict where they are not just ``<kernel>.weight``;
    ``places``: of these one per module that holds it, where there are several. ``whole``: kernels that keep all their
    output channels, since those are the classes.
    """
    name: str
    kernels: dict[str, nn.Module | ParameterKernel]
    parameters: tuple[str, ...]
    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    @property
    def weight_names(self) -> dict[str, str]:
        """Kernel → name of its weight among ``named_parameters()``."""
        return {name: self.tensors.get(name, (f"{name}.weight",))[0] for name in self.kernels}

    def replaced(self, weights) -> dict[str, torch.Tensor]:
        """Other weights for the kernels, in their order, by the names for functional_call(…, tie_weights=False).

        One name per module that holds a kernel. functional_call's own tying would name a module that is used under
        two names twice, and after the call leave the replacement in it.
        """
        return {place: weight for (kernel, name), weight in zip(self.weight_names.items(), weights)
                for place in self.places.get(kernel, (name,))}

    @property
    def state_names(self) -> tuple[str, ...]:
        """All names in the state dict that hold a kernel of this block; a shared kernel has several."""
        return tuple(key for name in self.kernels for key in self.tensors.get(name, (f"{name}.weight",)))


@dataclass
class Kernel:
    """A weight that could be compressed, or the reason why not.

    ``name``: dotted name of its module, or of the parameter where it is used without one. ``tensors``: its names in
    the state dict (several where modules share it; for a computed weight the parameters that it is computed from);
    ``places``: one of them per module that holds it.
    ``holder``: has the tensor as ``weight``; None where nothing can be compressed. ``reason``: why it is left out, ""
    for a kernel that is compressed. ``biases``: names of the biases that belong to it. ``classifier``: whether it gives
    the logits.
    """
    name: str
    holder: nn.Module | ParameterKernel | None
    tensors: tuple[str, ...]
    params: int
    shape: tuple[int, ...]
    places: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    reason: str = ""
    classifier: bool = False

    @property
    def names(self) -> set[str]:
        """Every name by which ``exclude`` and ``groups`` may call it."""
        return {self.name, *self.tensors, *(t.removesuffix(".weight") for t in self.tensors)}


@dataclass
class Survey:
    """The blocks of a network and everything that is not in one. ``excluded`` has its reasons set."""
    blocks: list[Block]
    compressed: list[Kernel]
    excluded: list[Kernel]

    @property
    def coverage(self) -> float:
        """Compressed share of the parameters of all kernels but the classifier, in [0, 1]."""
        left = sum(k.params for k in self.excluded if not k.classifier)
        done = sum(k.params for k in self.compressed if not k.classifier)
        return done / max(done + left, 1)


def arrange(what: str, kernels: list[Kernel], exclude=(), groups=None, sections=None, scope="paper") -> Survey:
    """Cut kernels into blocks: groups of four in their order, or as ``groups`` and ``sections`` say.

    ``scope="all"``: kernels that are left out for a reason of OUT_OF_SCOPE alone follow in groups of four of their own.

    ``exclude``: names of kernels or modules, or patterns with ``*``, which are left out. ``groups``: lists of names;
    they are the blocks, in that order; a kernel that none of them names is left out, one that they name is compressed
    even if it is the classifier or on a shortcut. ``sections``: (block name, kernel names, parameter names) of a
    network whose blocks are given. Raises InputError for a name without a kernel (naming close ones), a kernel that
    cannot be compressed or is named twice, and where nothing is left to compress.
    """
    unwanted = set()
    for pattern in (exclude,) if isinstance(exclude, str) else exclude:
        found = [k for k in kernels if _matches(k, pattern)]
        if not found:
            raise InputError(f"exclude: {_unknown(pattern, kernels)}")
        for kernel in found:
            unwanted.add(kernel.name)
            kernel.reason = kernel.reason or f"left out by exclude={pattern}"
    if groups is not None:
        cut = _named_groups(kernels, groups, unwanted)
    elif sections:
        cut = [(name, [k for k in kernels if k.name in names and not k.reason], parameters)
               for name, names, parameters in sections]
    else:
        cut = _fours("group", [k for k in kernels if not k.reason])
    if scope == "all" and groups is None:
        extra = [k for k in kernels if k.reason in OUT_OF_SCOPE and k.holder is not None and k.name not in unwanted]
        for kernel in extra:
            kernel.reason = ""
        cut += _fours("extra", extra)
    blocks, counted = [], set()
    for name, group, parameters in cut:
        if not group:
            continue
        if parameters is None:  # a bias that several kernels share counts once, with the first
            names = dict.fromkeys(p for k in group for p in (k.tensors[0], *k.biases) if p not in counted)
            counted.update(names)
            parameters = tuple(names)
        blocks.append(Block(name, {k.name: k.holder for k in group}, parameters,
                            {k.name: k.tensors for k in group if k.tensors != (f"{k.name}.weight",)},
                            {k.name: k.places for k in group if len(k.places) > 1},
                            tuple(k.name for k in group if k.classifier)))
    compressed = [k for _, group, _ in cut for k in group]
    if not compressed:
        raise InputError(f"{what}: no Conv2d or Linear besides the classifier, nothing to compress"
                         + "".join(f"; {k.name}: {k.reason}" for k in kernels[:5]))
    return Survey(blocks, compressed, [k for k in kernels if k.reason])


def _fours(what, kernels):
    return [(f"{what}{first // GROUP}", kernels[first:first + GROUP], None) for first in range(0, len(kernels), GROUP)]


def _named_groups(kernels, groups, unwanted):
    by_name = {name: k for k in reversed(kernels) for name in k.names}
    by_name.update({k.name: k for k in kernels})
    if isinstance(groups, str) or not all(isinstance(g, (list, tuple)) and g for g in groups):
        raise InputError("groups: expected lists of kernel names, none of them empty, one list per block")
    cut, taken = [], set()
    for number, names in enumerate(groups):
        group = []
        for name in names:
            if name not in by_name:
                raise InputError(f"groups: {_unknown(name, kernels)}")
            kernel = by_name[name]
            if kernel.name in unwanted:
                raise InputError(f"groups: {name} is in exclude as well")
            if kernel.holder is None or kernel.reason in (UNREACHED, INDIRECT):
                raise InputError(f"groups: {name} cannot be compressed: {kernel.reason}")
            if kernel.name in taken:
                raise InputError(f"groups: {name} is named twice")
            taken.add(kernel.name)
            kernel.reason = ""
            group.append(kernel)
        cut.append((f"group{number}", group, None))
    for kernel in kernels:
        if not kernel.reason and kernel.name not in taken:
            kernel.reason = "in none of the groups"
    return cut


def _matches(kernel, pattern):
    return any(name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
               for name in kernel.names)


def _unknown(name, kernels):
    names = sorted({k.name for k in kernels})
    close = difflib.get_close_matches(str(name), names, n=5, cutoff=0.4) or names[:5]
    return f"no kernel is called '{name}'; close: {', '.join(close)}"


# ---------------------------------------------------------------------------------------------------------------
# Which weights there are


# Weights of torch.nn's own layers that are kernels; a network's own layers are judged by how they use a parameter.
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def registered_kernels(model: nn.Module) -> list[Kernel]:
    """The Conv2d and Linear weights and the input projections of MultiheadAttention, in registration order.

    A weight that several modules share is one kernel, with all its names. A weight that is computed from other
    parameters (weight_norm, torch.nn.utils.parametrize, prune) has no ``holder`` and its reason set.
    """
    if any(is_lazy(p) for p in model.parameters()):
        raise InputError(f"{type(model).__name__} holds parameters without a shape yet (lazy modules); call it on a "
                         "batch once before compressing it")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    places = _places(model)
    kernels, seen = [], set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            leaves, bias = ("weight",), "bias"
        elif isinstance(module, nn.MultiheadAttention):
            leaves, bias = ATTENTION_WEIGHTS, "in_proj_bias"
        else:
            continue
        if leaves == ("weight",) and module._parameters.get("weight") is None:
            kernels.append(_computed_kernel(prefix or "weight", dot, module))
            continue
        bias = module._parameters.get(bias)
        for leaf in leaves:
            weight = module._parameters.get(leaf)
            if weight is None or id(weight) in seen:
                continue
            seen.add(id(weight))
            kernels.append(Kernel(
                name=(prefix or "weight") if leaf == "weight" else dot + leaf,
                holder=module if leaf == "weight" else ParameterKernel(module, leaf),
                # functional_call and named_parameters know a shared tensor by its first name.
                tensors=tuple(names[id(weight)]), params=weight.numel(), shape=tuple(weight.shape),
                places=places[id(weight)],
                biases=() if bias is None else (names[id(bias)][0],)))
    return kernels


def _places(model):
    """Parameter → its name in each module that holds it, every module once, whatever number of names it has."""
    places: dict[int, tuple[str, ...]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            places[id(parameter)] = (*places.get(id(parameter), ()), name)
    return places


def _computed_kernel(name, dot, module):
    parts = {dot + leaf: p for leaf, p in module.named_parameters() if leaf != "bias"
             and not leaf.startswith("parametrizations.bias.")}
    return Kernel(name, None, tuple(parts), sum(p.numel() for p in parts.values()), (),
                  reason=f"its weight is computed from other parameters ({', '.join(parts) or 'none of its own'})")


# ---------------------------------------------------------------------------------------------------------------
# One forward, watched


# Operations that combine a tensor with a weight along a shared dimension, and where their two operands stand.
CONTRACTIONS = {
    "convolution": (0, 1), "_convolution": (0, 1), "convolution_overrideable": (0, 1), "cudnn_convolution": (0, 1),
    "mkldnn_convolution": (0, 1), "miopen_convolution": (0, 1), "conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1),
    "conv_transpose1d": (0, 1), "conv_transpose2d": (0, 1), "conv_transpose3d": (0, 1), "linear": (0, 1),
    "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "matmul": (0, 1), "dot": (0, 1), "addmm": (1, 2), "addmv": (1, 2),
    "addbmm": (1, 2), "baddbmm": (1, 2), "_addmm_activation": (1, 2), "_trilinear": (0, 1),
    "mkldnn_rnn_layer": (0, 1, 2), "_cudnn_rnn": (0, 1), "_thnn_fused_lstm_cell": (0, 1)}
COPIES = {"clone", "_to_copy", "contiguous", "copy_", "lift_fresh", "lift_fresh_copy"}
NORMS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
         "miopen_batch_norm", "batch_norm", "_batch_norm_with_update", "native_layer_norm", "layer_norm",
         "native_group_norm", "group_norm", "_fused_rms_norm", "rms_norm", "mean", "var", "var_mean", "std", "std_mean",
         "sum", "norm", "linalg_vector_norm"}
UNTAGGED = {"hardswish_", "hardswish", "_prelu_kernel", "prelu", "native_dropout", "dropout"}  # elementwise as well


@dataclass
class _Node:
    """One operation. ``parents``: nodes of what it read. ``data``: whether the images reach it. ``weights``: ids of
    the parameters that it is computed from, for a node that no image reaches. ``uses``: ids of the parameters behind
    the weight that it applies; ``direct`` when that weight is the parameter itself, ``source`` is then the node of
    what the weight is applied to. ``chain``: whether it is a norm or works element by element."""
    parents: tuple[int, ...]
    data: bool
    weights: frozenset = frozenset()
    chain: bool = False
    add: bool = False
    uses: frozenset = frozenset()
    direct: bool = False
    source: int | None = None
    biases: tuple[int, ...] = ()


class _Trace(TorchDispatchMode):
    """Records the dataflow of one forward, below autograd, where every composite function has come apart.

    A tensor is known by its storage: a view has its base's node, and writing in place gives the storage a new node.
    """

    def __init__(self, model, example):
        super().__init__()
        self.nodes: list[_Node] = []
        self.before: list[int] = []  # bit set of the ancestors of each node
        self.current: dict[int, int] = {}  # storage → node of what it holds now
        self.owners: dict[int, list[nn.Parameter]] = {}  # storage → parameters in it
        self.read: set[int] = set()  # parameters that some operation read
        self.alive = []  # a freed storage's address could come back as another tensor's
        self.known = set()  # parameters of Conv2d, Linear and MultiheadAttention
        self.raw: dict[int, bool] = {}  # parameter used in a contraction → whether as F.linear and F.conv2d use one
        for tensor in _tensors(example):
            self._add(_Node((), True), [tensor])
        for parameter in model.parameters():
            weights = frozenset([id(parameter)]) if parameter.dim() >= 2 else frozenset()
            self._add(_Node((), False, weights), [parameter])
            self.owners.setdefault(_storage(parameter), []).append(parameter)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._record(func, args, kwargs or {}, result)
        return result

    def _record(self, func, args, kwargs, result):
        name = func._schema.name.rpartition("::")[2]
        given = list(_tensors((args, kwargs)))
        written = []
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += _tensors(value)
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += _tensors(kwargs.get(argument.name))
        storages = {_storage(t) for t in given}
        made = written + [t for t in _tensors(result) if _storage(t) not in storages]
        if not made:
            return  # a view, or a number
        if name.endswith("_like") or name.startswith("new_") or name in ("zero_", "fill_"):
            given = []  # only shape and type were read
        for tensor in given:
            parameter = self._parameter(tensor)
            if parameter is not None:
                self.read.add(id(parameter))
        parents = tuple(dict.fromkeys(self.current[_storage(t)] for t in given if _storage(t) in self.current))
        node = _Node(parents, any(self.nodes[p].data for p in parents))
        if not node.data:
            node.weights = frozenset().union(*(self.nodes[p].weights for p in parents))
        node.chain = name in COPIES or name in NORMS or name in UNTAGGED or torch.Tag.pointwise in func.tags
        node.add = name in ("add", "add_")
        if name in CONTRACTIONS:
            self._contraction(node, [args[i] for i in CONTRACTIONS[name] if i < len(args)], given,
                              transposed=name == "convolution" and args[6])
        if name in COPIES and len(given) == 1 and self._parameter(given[0]) is not None:
            self.owners.setdefault(_storage(made[0]), []).append(self._parameter(given[0]))
        self._add(node, made)

    def _contraction(self, node, operands, given, transposed):
        """Which operand of a contraction is its weight, if any is: a known kernel, a parameter, something computed
        from parameters; of two, the second, where F.linear and F.conv2d have theirs."""
        operands = [t for t in operands if isinstance(t, torch.Tensor)][::-1]
        found = [(t, self._parameter(t)) for t in operands]
        found = [(t, p) for t, p in found if p is not None and p.dim() >= 2]
        found.sort(key=lambda pair: id(pair[1]) not in self.known)
        if found:
            tensor, parameter = found[0]
            node.uses, node.direct = frozenset([id(parameter)]), True
            if id(parameter) not in self.known:
                fits = tensor is not operands[-1] and not transposed and _as_linear_or_conv2d(tensor, parameter)
                self.raw[id(parameter)] = fits and self.raw.get(id(parameter), True)
        else:
            for tensor in operands:
                origin = self.nodes[self.current[_storage(tensor)]] if _storage(tensor) in self.current else None
                if origin is not None and not origin.data and origin.weights:
                    node.uses = origin.weights
                    break
            else:
                return
        node.chain = False
        others = [t for t in operands if t is not tensor]
        if others and _storage(others[0]) in self.current:
            node.source = self.current[_storage(others[0])]
        biases = (self._parameter(t) for t in given)
        node.biases = tuple(id(p) for p in biases if p is not None and p.dim() == 1)

    def _parameter(self, tensor):
        """The parameter that a tensor is, or is a view or plain copy of."""
        owners = self.owners.get(_storage(tensor))
        if not owners or len(owners) == 1:
            return owners[0] if owners else None
        where = tensor.storage_offset()  # parameters that lie in one storage
        return next((p for p in owners if p.storage_offset() <= where < p.storage_offset() + max(1, p.numel())), None)

    def _add(self, node, tensors):
        index, ancestors = len(self.nodes), 0
        for parent in node.parents:
            ancestors |= self.before[parent] | 1 << parent
        self.nodes.append(node)
        self.before.append(ancestors)
        for tensor in tensors:
            self.alive.append(tensor)
            self.current[_storage(tensor)] = index

    # -- questions about the finished graph

    def node_of(self, tensor) -> int | None:
        return self.current.get(_storage(tensor))

    def classifiers(self, output: int) -> set[int]:
        """Parameters of the weights after which no weight comes on the way to the node ``output``."""
        reaches = self.before[output] | 1 << output
        uses = [i for i, node in enumerate(self.nodes) if node.uses and reaches >> i & 1]
        after = 0
        for i in uses:
            after |= self.before[i]
        return {p for i in uses if not after >> i & 1 for p in self.nodes[i].uses}

    def shortcuts(self, sizes) -> set[int]:
        """Parameters that are only ever used as 1×1 projections on residual shortcuts.

        Such a weight's result, through norms and elementwise operations alone, is added to a branch that starts from
        the tensor the weight is applied to and applies at least two other weights. ``sizes``: id → shape.
        """
        found, others = set(), set()
        for total in self.nodes:
            data = [p for p in total.parents if self.nodes[p].data]
            if total.add and len(data) == 2:
                for side, branch in (data, data[::-1]):
                    use = self._chain_start(side)
                    if use is not None and self._is_projection(use, branch, sizes):
                        found.add(use)
        for i, node in enumerate(self.nodes):
            if i not in found:
                others |= node.uses
        return {p for i in found for p in self.nodes[i].uses} - others

    def _chain_start(self, index):
        """The one weight that a node is a function of through norms and elementwise operations alone, or None."""
        starts, seen, stack = set(), set(), [index]
        while stack:
            i = stack.pop()
            if i in seen:
                continue
            seen.add(i)
            node = self.nodes[i]
            if node.uses:
                starts.add(i)
            elif node.chain:
                stack += [p for p in node.parents if self.nodes[p].data]
            else:
                return None
            if len(starts) > 1:
                return None
        return starts.pop() if starts else None

    def _is_projection(self, use, branch, sizes):
        node = self.nodes[use]
        parameter, = node.uses if len(node.uses) == 1 else (None,)
        shape = sizes.get(parameter, ())
        before, source = self.before[branch] | 1 << branch, node.source
        if not node.direct or len(shape) < 2 or any(side != 1 for side in shape[2:]) or source is None:
            return False
        if before >> use & 1:
            return False  # x + f(x) with x straight from a 1×1: the branch starts after it
        while True:
            if before >> source & 1:  # the branch starts from the same tensor
                between = {self.nodes[i].uses for i in range(source, branch + 1)
                           if before >> i & 1 and self.nodes[i].uses and self.before[i] >> source & 1}
                return len(between - {node.uses}) >= 2
            # A shortcut may pool, normalise or copy before it projects.
            above = [p for p in self.nodes[source].parents if self.nodes[p].data]
            if self.nodes[source].uses or len(above) != 1:
                return False
            source, = above


def traced_kernels(model: nn.Module, example) -> list[Kernel]:
    """The kernels of any network in the order in which one forward of the batch ``example`` uses them first, and
    after them those that it never uses; ``reason`` is set for every one that is not to be compressed.

    The network is left as it was, mode, buffers and random numbers included. Raises InputError where the forward
    fails or does not give logits [n, classes].
    """
    kernels = registered_kernels(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    by_parameter = {id(parameters[name]): k for k in kernels for name in k.tensors}
    example = example.clone()  # the network may write into its input
    trace = _Trace(model, example)
    trace.known = set(by_parameter)
    with untouched(model):
        logits = forward(model, example, trace)
    output = trace.node_of(logits)
    if output is None or not trace.nodes[output].data:
        raise InputError(f"{type(model).__name__}: its logits do not depend on the images")
    final = trace.classifiers(output)
    projections = trace.shortcuts({id(p): tuple(p.shape) for p in model.parameters()})
    direct = {p for node in trace.nodes if node.direct for p in node.uses}

    ordered = []
    for node in trace.nodes:
        for parameter in sorted(node.uses, key=lambda p: names[p][0]):
            kernel = by_parameter.get(parameter)
            if kernel is None:
                if not node.direct:
                    continue
                kernel = by_parameter[parameter] = _raw_kernel(model, names[parameter], trace.raw[parameter])
                kernel.biases = tuple(names[b][0] for b in node.biases)
            if any(kernel is k for k in ordered):
                continue
            ordered.append(kernel)
            if not kernel.reason:
                if parameter not in direct:
                    kernel.reason = INDIRECT
                elif parameter in projections:
                    kernel.reason = SHORTCUT
            if parameter in final:
                kernel.reason, kernel.classifier = CLASSIFIER, True
    for kernel in kernels:
        if not any(kernel is k for k in ordered):
            if not kernel.reason:
                reached = any(id(parameters[name]) in trace.read for name in kernel.tensors)
                kernel.reason = INDIRECT if reached else UNREACHED
            ordered.append(kernel)
    return ordered


def _raw_kernel(model, names, fits):
    """A parameter in a contraction that is not the weight of a Conv2d, Linear or MultiheadAttention."""
    prefix, _, leaf = names[0].rpartition(".")
    owner = model.get_submodule(prefix)
    weight = getattr(owner, leaf)
    kernel = Kernel(names[0].removesuffix(".weight"), ParameterKernel(owner, leaf), tuple(names), weight.numel(),
                    tuple(weight.shape), _places(model)[id(weight)])
    torch_layer = type(owner).__module__.startswith("torch.nn.") and not isinstance(
        owner, (nn.ParameterList, nn.ParameterDict))
    if torch_layer:
        kernel.reason = f"weight of a {type(owner).__name__}; only those of Conv2d, Linear and MultiheadAttention " \
                        "are compressed"
    elif not fits:
        kernel.reason = "used in a product, but not as Linear and Conv2d use a weight [n_out, ...]"
    if kernel.reason:
        kernel.holder = None
    return kernel


def _storage(tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # layouts without a storage
        return id(tensor)


def _as_linear_or_conv2d(tensor, parameter) -> bool:
    """Whether an operand is all or some rows of a parameter as F.linear (transposed [i, o]) or F.conv2d ([o, i, h, w])
    pass it on, so that dimension 0 of the parameter is that of the output channels."""
    if parameter.dim() == 4:
        return tensor.shape[1:] == parameter.shape[1:]
    if parameter.dim() != 2 or tensor.dim() < 2:
        return False
    return tensor.shape[-2] == parameter.shape[1] and tensor.shape[-1] <= parameter.shape[0] \
        and tensor.stride()[-2:] == (parameter.stride(1), parameter.stride(0))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
