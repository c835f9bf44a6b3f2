"""A user's network: made by a function of the user's, copied, and tried on a batch of images."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from contextlib import chdir, contextmanager, nullcontext
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from config import InputError

PROJECT = Path(__file__).resolve().parents[1]


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
    except InputError:  # of what looks at it from inside
        raise
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

    The function is given ``num_classes`` where it has a parameter of that name, and nothing else. File and function run
    as in a Python that starts in the file's folder (for a module: in the current directory), and so does the process
    from here on: one network each. Raises InputError where one of them is missing or fails, or no network comes back.
    """
    place, _, function = source.rpartition(":")
    if not (place and function):
        raise InputError(f"--model {source}: expected module:function or path/to/file.py:function")
    path = Path(place).resolve() if place.endswith(".py") else None
    try:
        with chdir("."), torch.enable_grad():  # both are put back, whatever the file switches
            _start_in(path.parent if path else Path.cwd())
            if path:  # the number keeps files of one name in two folders apart
                spec = importlib.util.spec_from_file_location(f"own_{path.stem}_{abs(hash(path))}", path)
                module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            else:
                module = importlib.import_module(place)
            make = getattr(module, function, None)
            if not callable(make):
                raise InputError(f"{place} has no function '{function}'")
            parameters = inspect.signature(make).parameters
            network = make(num_classes=num_classes) if "num_classes" in parameters else make()
            if not isinstance(network, nn.Module):
                raise InputError(f"returned a {type(network).__name__}, expected a torch.nn.Module")
            return network
    except InputError as error:
        raise InputError(f"--model {source}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise InputError(f"--model {source}: {said(error)}") from error


class _Ours:
    """Finds this project's modules for a user's code where no other file of the name is on sys.path."""
    modules = {}  # by name; those that have left sys.modules

    def find_spec(self, name, path=None, target=None):
        """Return the spec of the loaded module, or None for the finders after this one."""
        module, parent = self.modules.get(name), name.rpartition(".")[0]
        if module is None or parent and sys.modules.get(parent) is not self.modules.get(parent) or _places(
                PathFinder.find_spec(name, path)) not in ((), _places(module.__spec__)):
            return None
        spec = copy.copy(module.__spec__)
        spec.loader = self
        return spec

    def create_module(self, spec):
        """Return the module as it is."""
        return self.modules[spec.name]

    def exec_module(self, module):
        """Do nothing: it has been executed."""


_ours = _Ours()


@contextmanager
def ours_by_name():
    """Put this project's modules back into sys.modules inside, where their objects are pickled by name."""
    theirs = {name: sys.modules.pop(name) for name in _ours.modules if name in sys.modules}
    sys.modules.update(_ours.modules)
    try:
        yield
    finally:
        for name in _ours.modules:
            del sys.modules[name]
        sys.modules.update(theirs)


def _start_in(folder):
    """Import from here on as a Python that starts in ``folder``, without this project's folder.

    A loaded module for whose name another file would be found leaves sys.modules for that. So do all of this project's,
    which have imported one another already: a user's code may have files of those names, and put their folder on
    sys.path itself. Where there is no other file of the name, they are found as before.
    """
    loaded = {name: _places(getattr(module, "__spec__", None))  # now: namespace packages follow sys.path
              for name, module in [*sys.modules.items()] if "." not in name and name not in sys.stdlib_module_names}
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() not in (folder, PROJECT))]
    importlib.invalidate_caches()
    own = {path.stem for path in PROJECT.glob("*.py")} | {"deploy", "evidence", "support"}
    mine = {name for name, places in loaded.items() if name in own and Path(*places[:1]).parent == PROJECT}
    other = {name for name, places in loaded.items() if len({places, _places(PathFinder.find_spec(name)), ()}) > 2}
    for name in [name for name in sys.modules if name.partition(".")[0] in mine | other]:
        module = sys.modules.pop(name)
        if name.partition(".")[0] in mine:
            _ours.modules[name] = module
    if _ours not in sys.meta_path:
        sys.meta_path.insert(0, _ours)


def _places(spec):
    """Folders of a package (a namespace package may have several) or the file of a module, in order."""
    places = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    return tuple(sorted({str(Path(place).resolve()) for place in places}))
