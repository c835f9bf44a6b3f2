"""A network from elsewhere: made by a user's function, copied, and tried on a batch of images."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch
from torch import nn

from config import InputError


def forward(model: nn.Module, images, mode=None) -> torch.Tensor:
    """Logits [n, classes] of a batch [n, …], without gradients, in the mode the network is in; ``mode``: a dispatch
    mode to do it under. Raises InputError when the network fails or gives something else."""
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fast path of MultiheadAttention and TransformerEncoder is one operation that hides its kernels.
    torch.backends.mha.set_fastpath_enabled(False)
    name, shape = type(model).__name__, list(images.shape)
    try:
        with torch.no_grad():
            if mode is None:
                logits = model(images)
            else:
                with mode:
                    logits = model(images)
    except InputError:
        raise
    except Exception as error:  # whatever the network's own code raises
        raise InputError(f"{name} fails on a batch of images {shape}: {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:300]}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if not isinstance(logits, torch.Tensor):
        raise InputError(f"{name} returns a {type(logits).__name__} for a batch of images {shape} "
                         f"({'train' if model.training else 'eval'} mode), expected logits: one tensor "
                         f"[{shape[0]}, classes]; wrap it in a module that returns them")
    if logits.dim() != 2 or len(logits) != shape[0] or not logits.is_floating_point():
        raise InputError(f"{name} returns {logits.dtype} {list(logits.shape)} for a batch of images {shape}, expected "
                         f"logits: a float tensor [{shape[0]}, classes]")
    return logits


def try_network(model: nn.Module, images) -> tuple[int, bool]:
    """(number of classes, whether it runs with channels last), tried on a copy in eval and in train mode.

    Convolutions run up to 1.7 times faster with channels last, but a network that flattens feature maps with ``view``
    does not run at all. Raises InputError where :func:`forward` does, and for a network without parameters.
    """
    if not any(True for _ in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameters, nothing to compress")
    trial = copy_network(model)
    modes = ("eval", "train") if len(images) > 1 else ("eval",)  # one image alone has no batch statistics

    def run():
        for mode in modes:
            classes = forward(trial.train(mode == "train"), images.clone()).shape[1]
        return classes

    with untouched(trial):
        classes = run()
        try:
            trial.to(memory_format=torch.channels_last)
            run()
            return classes, True
        except (InputError, RuntimeError):
            return classes, False


class untouched:
    """Puts every module's mode, every buffer and the random generators back as they were; eval mode inside."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.buffers = [(module, name, buffer, buffer.detach().clone()) for module in self.model.modules()
                        for name, buffer in module._buffers.items() if buffer is not None]
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        self.fork = torch.random.fork_rng(devices=sorted(devices, key=str))
        self.fork.__enter__()
        self.model.eval()

    def __exit__(self, *error):
        self.fork.__exit__(*error)
        with torch.no_grad():
            for module, name, buffer, value in self.buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer  # the forward may have put another tensor in its place
        for module, mode in self.modes:
            module.training = mode


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with ``model``. Plain tensors that hang on a graph (the weight that an old-style
    weight_norm computed last) are copied without it; deepcopy alone refuses them."""
    memo = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:300]}); it is compressed as a copy, so that the given "
                         "network stays as it is") from error


def own_network(source: str, num_classes: int) -> nn.Module:
    """The network that ``module:function`` or ``path/to/file.py:function`` returns.

    The function is called without arguments, or with ``num_classes`` where it has a parameter of that name. Raises
    InputError where there is no such module, file or function, and where it fails or returns something else.
    """
    place, colon, name = source.rpartition(":")
    if not (colon and place and name):
        raise InputError(f"--model {source}: expected module:function or path/to/file.py:function")
    is_file = place.endswith(".py")
    folder = str(Path(place).resolve().parent if is_file else Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)  # at the end: the network's own modules are found, and hide none of this program's
    try:
        if is_file:
            if not Path(place).is_file():
                raise InputError(f"--model {source}: no file {place}")
            spec = importlib.util.spec_from_file_location(f"own_{Path(place).stem}", place)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        make = getattr(module, name, None)
        if not callable(make):
            raise InputError(f"--model {source}: {place} has no function '{name}'")
        parameters = inspect.signature(make).parameters.values()
        missing = [p.name for p in parameters if p.default is p.empty and p.name != "num_classes"
                   and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if missing:
            raise InputError(f"--model {source}: needs {', '.join(missing)}; only num_classes is passed, give the "
                             "others a default")
        network = make(**{p.name: num_classes for p in parameters if p.name == "num_classes"})
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise InputError(f"--model {source}: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(folder)
    if not isinstance(network, nn.Module):
        raise InputError(f"--model {source}: returned a {type(network).__name__}, expected a torch.nn.Module")
    return network
