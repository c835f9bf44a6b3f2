"""A user's network: made by a function of the user's, copied, and tried on a batch of images."""

from __future__ import annotations

import builtins
import copy
import importlib.util
import inspect
import os
import sys
from contextlib import contextmanager, nullcontext
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from config import InputError

PROJECT = Path(__file__).resolve().parents[1]
_usual_import, _folders = builtins.__import__, {}  # folder of a user's code → what exchanges the modules for it


@contextmanager
def visible_attention():
    """Run nn.MultiheadAttention without its fast path, which is one operation that hides its kernels."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def said(error: BaseException) -> str:
    """Return the type and the message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def forward(model: nn.Module, images, mode=None) -> torch.Tensor:
    """Return the logits [n, classes] of a batch [n, …], without gradients, in the mode that the network is in.

    ``mode``: a dispatch mode to run it under. Raises InputError when the network fails or returns something else.
    """
    name, batch = type(model).__name__, f"a batch of images {list(images.shape)}"
    try:
        with torch.no_grad(), visible_attention(), mode or nullcontext():
            logits = model(images)
    except Exception as error:  # whatever the network's own code raises
        raise InputError(f"{name} fails on {batch}: {said(error)}") from error
    tensor = isinstance(logits, torch.Tensor)
    if not tensor or logits.dim() != 2 or len(logits) != len(images) or not logits.is_floating_point():
        what = f"{logits.dtype} {list(logits.shape)}" if tensor else f"a {type(logits).__name__}"
        raise InputError(f"{name} returns {what} for {batch} in {'train' if model.training else 'eval'} mode, expected "
                         f"logits: a float tensor [{len(images)}, classes]; wrap it in a module that returns them")
    return logits


def try_network(model: nn.Module, images) -> tuple[int, bool]:
    """Return (number of classes, whether it gives the same with channels last), tried on copies in both modes. Raises
    InputError where :func:`forward` does, without parameters, and where the first forward makes some."""
    if next(model.parameters(), None) is None:
        raise InputError(f"{type(model).__name__} has no parameters, nothing to compress")
    trial = copy_network(model)

    def run(trial):  # in both modes; one image alone has no batch statistics
        results = []
        for mode in (False, True)[:len(images)]:
            trial.train(mode)
            results.append(forward(trial, images.clone()).double())
        return results[0]

    with untouched(trial):
        logits = run(trial)
        if made := trial.state_dict().keys() ^ model.state_dict().keys():
            raise InputError(f"{type(model).__name__}: its first forward makes or drops {min(made)}; call it before")
        classes, bound = logits.shape[1], 1e-3 * logits.abs().max().item()
        try:  # of another copy: statistics of BatchNorm have moved
            other = run(copy_network(model).to(memory_format=torch.channels_last))
            return classes, torch.allclose(other, logits, 0, bound)  # otherwise with as_strided
        except (InputError, RuntimeError):
            return classes, False


@contextmanager
def untouched(model):
    """Run in eval mode; afterwards every module's mode, every buffer and the random generators are as they were."""
    before = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()
            yield
    finally:
        for module, mode, buffers in before:  # the forward may have put other tensors in their places
            module.training = mode
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def copy_network(model: nn.Module) -> nn.Module:
    """Return a deep copy that shares nothing with ``model``, also of plain tensors that hang on a graph (the weight
    that an old-style weight_norm computed last), which deepcopy alone refuses. Parameters that are one in memory become
    one parameter."""
    memo = {id(value): value.detach().clone() for module in model.modules() for value in tree_leaves(vars(module))
            if isinstance(value, torch.Tensor) and value.grad_fn is not None}
    first = {}
    for parameter in model.parameters():
        if parameter.numel():
            other = first.setdefault(memory(parameter), parameter)
            if other is not parameter:
                memo[id(parameter)] = copy.deepcopy(other, memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be copied ({said(error)}); it is compressed as a copy, so "
                         "that the given network stays as it is") from error


def memory(tensor) -> tuple:
    """Return what two parameters that are one in memory have in common."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def own_network(source: str, num_classes: int) -> nn.Module:
    """Return the network that ``module:function`` or ``path/to/file.py:function`` makes.

    The function is called without arguments, or with ``num_classes`` where it has a parameter of that name. File and
    function run as in a Python that starts in the file's folder (for a module: in the current directory). Raises
    InputError where there is no such module, file or function, and where it fails or returns something else.
    """
    place, _, function = source.rpartition(":")
    if not (place and function):
        raise InputError(f"--model {source}: expected module:function or path/to/file.py:function")
    path = Path(place).resolve() if place.endswith(".py") else None
    try:
        with _imports_of(path.parent if path else Path.cwd()):
            if path:  # the number keeps files of one name in two folders apart
                spec = importlib.util.spec_from_file_location(f"own_{path.stem}_{abs(hash(path))}", path)
                module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            else:
                module = importlib.import_module(place)
            make = getattr(module, function, None)
            if not callable(make):
                raise InputError(f"{place} has no function '{function}'")
            sized = "num_classes" in inspect.signature(make).parameters
            network = make(num_classes=num_classes) if sized else make()
            if not isinstance(network, nn.Module):
                raise InputError(f"returned a {type(network).__name__}, expected a torch.nn.Module")
            return network
    except InputError as error:
        raise InputError(f"--model {source}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise InputError(f"--model {source}: {said(error)}") from error


@contextmanager
def _imports_of(folder):
    """Import as a Python that starts in ``folder``, without this project's folder.

    A loaded module for whose name another file would be found (``models``, where the folder has one too) is taken out
    of sys.modules for that time; afterwards it is back, and the other one out. An import statement in the folder's code
    that is reached later, as in a forward, does the same again.
    """
    here = [str(folder), *(p for p in sys.path if Path(p).resolve() not in (folder, PROJECT))]
    importlib.invalidate_caches()
    clash = {name for name, module in [*sys.modules.items()] if "." not in name and name not in sys.stdlib_module_names
             and len({_places(getattr(module, "__spec__", None)), _places(PathFinder.find_spec(name, here)), ()}) > 2}
    theirs = {}

    @contextmanager
    def exchanged():
        path, known = [*sys.path], lambda: [name for name in sys.modules if name.partition(".")[0] in clash]
        hidden = {name: sys.modules.pop(name) for name in known()}
        sys.path[:] = here
        sys.modules.update(theirs)
        try:
            yield
        finally:
            theirs.update((name, sys.modules.pop(name)) for name in known())
            sys.modules.update(hidden)
            sys.path[:] = path + [p for p in sys.path if p not in (*path, str(folder))]

    with exchanged():
        yield
    _folders[f"{folder}{os.sep}"], builtins.__import__ = exchanged, _import


def _import(name, globals=None, *more, **named):
    """``import`` for everyone; for code in a user's folder, what that folder has."""
    place = str((globals or {}).get("__file__"))
    own = [exchanged for folder, exchanged in _folders.items() if place.startswith(folder)]
    with own[0]() if own and "site-packages" not in place else nullcontext():
        return _usual_import(name, globals, *more, **named)


def _places(spec):
    """Folders of a package (a namespace package may have several) or the file of a module, in order."""
    places = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    return tuple(sorted({str(Path(place).resolve()) for place in places}))
