"""What is refused before a user's network is worked on, and what a packed file, a narrow network or an exported program
must show before it is handed over: the same logits."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import random
import re
import tempfile
from pathlib import Path
from types import CellType

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from compress import set_state, to_eval
from config import InputError
from data import mixed
from support.own import copy_network, forward, memory, own_network, said

BATCHES = (1, 2, 3, 7)
CLOSE = 1e-4  # of the largest logit, where another order of sums may differ
CLOSE_IN_HALF = 0.02  # the same of a network in half precision
SEED = 20261128
# of compress_model: settings that say nothing about a network and images that are given
NOT_GIVEN = ("exp", "name", "smoke", "out", "policy", "policy_sha256", "model.", "scratch.", "data.")


def check_settings(settings) -> dict:
    """Return compress_model's settings, dots for ``__``, the preset first. Raises InputError for one without effect."""
    settings = {key.replace("__", "."): settings[key] for key in sorted(settings, key=lambda key: key != "preset")}
    useless = [key for key in settings if key != "data.batch_size" and any(
        key == name or name.endswith(".") and key.startswith(name) for name in NOT_GIVEN)]
    if useless:
        raise InputError(f"compress_model: {', '.join(useless)} has no effect on a network and images that are given; "
                         "leave it out")
    return settings


def fair_order(test, settings, log):
    """Return test images in a fixed order drawn at random where those that choose epoch and cycle, the first ones by
    ``settings`` (config.Eval), lack classes of the others, as where they are sorted by class; else as they are."""
    n = settings.images
    if settings.protocol != "paper" or len(test) <= n:
        return test
    y = test.labels if hasattr(test, "labels") else torch.cat([y.cpu() for _, y in test.batches(256)])
    if y[:n].unique().equal(y.unique()):
        return test
    log.note(f"test images: the first {n}, which choose epoch and cycle, lack classes; in an order drawn at random now")
    return mixed(test)


def check_writable(path, folder=None) -> Path:
    """Return ``path``, absolute. InputError where no file can be written, or a run in ``folder`` makes a folder."""
    try:
        place, folder = (where and Path(where).expanduser().absolute() for where in (path, folder))
        if not place or place.is_dir() or folder and place in (folder, folder / "state", *folder.parents):
            raise IsADirectoryError
        home = next(parent for parent in place.parents if parent.is_dir() or place.parent != folder)
        with tempfile.TemporaryFile(dir=home), contextlib.suppress(FileNotFoundError):
            os.stat(home / f".{place.name}.tmp")  # fails for names that are too long
    except (OSError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{path}: cannot be written there; give a file in a folder that can be written to") from None
    return place


def fingerprint(model: nn.Module, sets, asked) -> dict[str, str]:
    """Return what tells one call from another, for the identity of a run: a hash of the network's tensors, of the code
    of its classes and (on a CPU) of its logits; of the sets' sizes, labels and up to 64 images, unless these are others
    each time they are read; and of ``asked``, the other arguments."""
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{model} {asked}")  # addresses are others in the next process
    digest = hashlib.sha256(text.encode())
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        with contextlib.suppress(OSError, TypeError):  # where there is no source
            digest.update(b"" if kind.__module__.startswith("torch.") else inspect.getsource(kind).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + raw_bytes(tensor).numpy().tobytes())
    for images in sets:
        first, (x, y) = (images.batch(torch.arange(0, len(images), -(-len(images) // 64))) for _ in range(2))
        digest.update(f"{len(images)} {getattr(images, 'labels', y).tolist()}".encode())
        digest.update(raw_bytes(x).numpy().tobytes() if torch.equal(x, first[0]) else b"")
    network = copy_network(model)
    network.eval()
    with contextlib.suppress(InputError):  # of images that it does not take
        noise = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(SEED))
        if next(network.parameters()).device.type == "cpu":
            digest.update(f"{forward(network, noise).double().norm():.3g}".encode())  # on another machine too
    return {"network and images": digest.hexdigest()}


def raw_bytes(tensor) -> torch.Tensor:
    """Return the bytes of a tensor, by which NaN is equal to itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def generators():
    """Put torch's, Python's and numpy's random generators back afterwards, from which a user's code may draw."""
    drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


@contextlib.contextmanager
def protected(model: nn.Module):
    """Put back a network's buffers afterwards, which a copy of it may reach through a closure."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(raw_bytes(buffer), raw_bytes(value)):
                    buffer.copy_(value)


def check_given(model) -> None:
    """Raise InputError for what is no network that can be compressed, with the reason."""
    what = type(model).__name__
    if torch.is_inference_mode_enabled():
        raise InputError("called under torch.inference_mode(), in which nothing can be trained; call it outside")
    if torch.empty(0).device.type != "cpu" or torch.get_default_dtype() != torch.float32:
        raise InputError("called under another default device or dtype (torch.set_default_…); call it outside")
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, not a {what}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InputError(f"{what} is or holds a module compiled by torch.jit; give the module that it was made of")
    if any(type(module).__module__.startswith("torch.ao.") for module in model.modules()):
        raise InputError(f"{what} is prepared for quantisation by torch.ao; give the network as it was before")
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise InputError(f"{what} holds parameters without a shape yet (lazy modules); call it on a batch once before")
    every, named = (dict(found).values() for found in (nn.Module.named_parameters(model), model.named_parameters()))
    if not {*map(id, every)} == {*map(id, named)} == {*map(id, model.parameters())}:
        raise InputError(f"{what} has a parameters() or named_parameters() of its own that leaves some out; give it "
                         "without")
    _check_tensors(model, what)
    held = {id(t) for t in model.state_dict(keep_vars=True).values()}
    for name, p in model.named_parameters():
        if id(p) not in held:
            raise InputError(f"{what}: its state_dict() leaves out {name} or gives a copy of it, not the parameter")
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{what}: {key} of its state dict is no tensor (get_extra_state); leave it out")
    _check_modes(model, what)


def _check_tensors(model, what):
    """InputError for parameters and buffers of a kind that is not compressed."""
    devices = sorted({str(t.device) for t in (*model.parameters(), *model.buffers())})
    if len(devices) > 1:
        raise InputError(f"{what} lies on several devices ({', '.join(devices)}); bring it to one with model.to(...)")
    seen = {}
    for name, p in model.named_parameters():
        if p.is_meta or p.is_inference():
            raise InputError(f"{what}: {name} is on the meta device or was made under torch.inference_mode(); give it "
                             "values that can be trained")
        if not (p.is_floating_point() or p.is_complex()):
            raise InputError(f"{what}: {name} is a parameter of {p.dtype}; register it as a buffer")
        if p.dtype != torch.float32:
            raise InputError(f"{what}: {name} is {p.dtype}, images and weights are float32; give model.float(), or "
                             "without complex numbers")
        if p.dim() > 1 and not p.numel():
            raise InputError(f"{what}: {name} is empty, {list(p.shape)}; leave its module out")
        if not p.isfinite().all():
            raise InputError(f"{what}: {name} holds values that are not finite (NaN or infinity)")
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise InputError(f"{what}: {name} has a hook on its gradient, which a copy would not have; take it off")
        if 0 in [stride for stride, side in zip(p.stride(), p.shape) if side > 1]:
            raise InputError(f"{what}: {name} is expanded, several of its values lie at one place; give a clone of it")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.layout == torch.strided and t.numel() and not t.is_meta:
            begin = t.data_ptr()
            end = begin + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size()
            for other, (first, last, o) in seen.items():
                if o is not t and first < end and begin < last and t.device == o.device and _overlap(o, t) and not (
                        isinstance(o, nn.Parameter) and isinstance(t, nn.Parameter) and memory(o) == memory(t)):
                    raise InputError(f"{what}: {other} and {name} share memory without being one parameter; tie them "
                                     "by making them the same object, or give one a clone")
            seen[name] = begin, end, t
    for module in model.modules():
        held = [value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")]
        for leaf in tree_leaves(held):
            for name, (*_, t) in seen.items():
                if isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf is not t and _overlap(t, leaf):
                    raise InputError(f"{what}: a {type(module).__name__} keeps a view of {name} (.data, .T, numpy), "
                                     "which a copy does not follow; make it in the forward, or where it is made there, "
                                     "call the network on a batch once before")
    for name, t in model.named_buffers():
        if t.layout != torch.strided or t.is_quantized or 0 in [n for n, side in zip(t.stride(), t.shape) if side > 1]:
            raise InputError(f"{what}: the buffer {name} is sparse, quantised or expanded; register a clone of it")
        if t.dtype == torch.complex32 or t.is_floating_point() and t.dtype.itemsize < 2:
            raise InputError(f"{what}: the buffer {name} is {t.dtype}, which is not packed; give it another type")


def _overlap(tensor, other):
    """Whether two tensors, or a tensor and an array, have an element of memory in common, as far as can be told."""
    try:
        return np.shares_memory(*(t.detach().numpy() if isinstance(t, torch.Tensor) else t for t in (tensor, other)),
                                max_work=10**6)
    except (RuntimeError, TypeError):  # not on a CPU, or of a type that numpy lacks
        return isinstance(other, torch.Tensor) and tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


def _check_modes(model, what):
    """InputError for a network without a copy of its own, or whose tensors are others in train than in eval mode."""
    trial, states = copy_network(model), []
    if {id(t) for t in (*model.parameters(), *model.buffers())}.intersection(
            id(t) for t in (*trial.parameters(), *trial.buffers())):
        raise InputError(f"{what}: a copy of it shares its tensors (__deepcopy__ that returns the module itself)")
    held = {id(value) for module in model.modules() for value in (module, *vars(module).values())
            if isinstance(value, (nn.Module, dict, list))}
    for function in (leaf for module in trial.modules() for leaf in tree_leaves([*vars(module).values()])):
        seen = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != CellType()]
        seen += getattr(function, "__defaults__", None) or ()
        seen += (getattr(function, "__kwdefaults__", None) or {}).values()
        if any(id(getattr(value, "__self__", value)) in held for value in seen):
            raise InputError(f"{what}: {function.__qualname__}, a hook or function that it holds, reaches the network "
                             "through a closure or a default, which no copy follows; make it a method of the network")
    for mode in (True, False):
        try:
            trial.train(mode)
        except Exception as error:  # whatever the network's own code raises
            raise InputError(f"{what}: its train({mode}) fails: {said(error)}") from error
        states.append({key: raw_bytes(value).clone() for key, value in trial.state_dict().items()})
    differing = {key for key in states[0].keys() | states[1].keys()
                 if key not in states[0] or key not in states[1] or not torch.equal(states[0][key], states[1][key])}
    if differing:
        raise InputError(f"{what}: {min(differing)} is another one in eval than in train mode, or there in one alone; "
                         "give a network whose weights do not change by switching modes (merged or fused for good)")


def _note_what_differs(model, test, others, log):
    """Note what the packed file cannot hold, and test images that are others each time they are read."""
    outside = [f"{name}.{key}" if name else key for name, module in model.named_modules() for key in (
        *module._non_persistent_buffers_set, *(k for k, v in vars(module).items() if isinstance(v, torch.Tensor)))]
    if outside:
        log.note("not in the state dict, so not in the packed file; a network that is filled from it must make the "
                 "same itself: " + ", ".join(outside[:8]) + " …" * (len(outside) > 8))
    with torch.random.fork_rng(devices=[]):
        if not torch.equal(others, test.batch(torch.arange(len(others)), others.device)[0]):
            log.note("the test images are others each time they are read: accuracies before and after, and what is "
                     "paired in them, are not of the same images")


def check_use(model: nn.Module, train, test, blocks, config, log) -> None:
    """Raise InputError for a network that does not take the test images, that gives NaN, or other logits the next time
    or in another batch, whose forward changes its own parameters, that keeps something outside its state dict, or where
    no gradient reaches any of the kernels of ``blocks`` from the logits of a training batch; train, test: its images,
    as data.Images; config: Config. What the packed file cannot hold is noted."""
    device, what, trial = next(model.parameters()).device, type(model).__name__, copy_network(model)
    images, others = (part.batch(torch.arange(min(8, len(part))), device)[0] for part in (train, test))
    kernels = [names[0] for block in blocks for names in block.tensors.values()]
    _note_what_differs(model, test, others, log)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trial.eval()
        forward(trial, others.clone())
        first, *again = (forward(trial, images.clone()) for _ in range(5))
        if first.isnan().any():
            raise InputError(f"{what} gives logits that are NaN")
        if not all(torch.allclose(first, other, 1e-4, 1e-4 * first.abs().max().item()) for other in again):
            raise InputError(f"{what} gives other logits for the same images the next time in eval mode: dropout or "
                             "noise that is on there too, or a state that it carries on")
        half, close = first[:(len(first) + 1) // 2], CLOSE_IN_HALF * first.abs().max().item()
        if not torch.allclose(half, forward(trial, images[:len(half)].clone()), 0, close):
            raise InputError(f"{what} gives an image other logits in another batch (BatchNorm without statistics?)")
        with torch.no_grad():  # by another sign and size, what a constraint such as max-norm or clamp forbids
            before = {name: p.mul_(-4).clone() for name, p in trial.named_parameters()}
        with contextlib.suppress(InputError):
            forward(trial, images.clone())
        for name, p in trial.named_parameters():
            if not torch.equal(p, before[name]):
                raise InputError(f"{what}: its forward changes its own parameter {name} (a constraint such as "
                                 "max-norm); make it a parametrization, or apply it after the training steps")
        trial = copy_network(model).requires_grad_()
        trial.train()
        trained = _check_gradients(trial, images[:config.data.batch_size], kernels)
        trial.eval()
        used = _check_gradients(trial, images, kernels)
        with torch.no_grad():  # what it keeps of the forwards before, and of weights that it no longer has
            for p in trial.parameters():
                p.mul_(1.1)
        source, given = config.model.source, ":" not in config.model.source
        # a file's function makes it again, as for whoever loads the packed file, but in another memory format
        fresh = copy_network(model) if given else own_network(source, first.shape[1]).to(device)
        try:
            set_state(fresh, trial.state_dict())
        except RuntimeError as error:
            raise InputError(f"{what}: what --model {source} makes for num_classes={first.shape[1]}, its logits, does "
                             f"not take its weights; it has to be the same each time ({said(error)})") from None
        if found := difference(fresh, trial, images, exact=given):
            raise InputError(f"{what} keeps something outside its state dict (a cache, a counter, what is drawn anew): "
                             f"with other weights it gives other logits than a fresh one that is given these ({found})")
    trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    if frozen := [name for name in kernels if not trainable[name]]:
        log.note(f"compressed, but frozen (requires_grad=False), so that no training repairs {', '.join(frozen[:8])}"
                 + " …" * (len(frozen) > 8))
    if missing := [name for name in kernels if name not in used]:
        log.note(f"no gradient reaches {', '.join(missing[:8])} in eval mode: the sensitivity leaves them out")
    if unused := [name for name in trained if name not in {*used, *missing}]:
        log.note(f"trained, but without effect in eval mode: {', '.join(unused[:8])}" + " …" * (len(unused) > 8))


def _check_gradients(trial, images, kernels) -> list[str]:
    """The parameters that a gradient reaches. InputError where no kernel is, or a step on such a batch fails."""
    what, reached = type(trial).__name__, dict(trial.named_parameters())
    try:
        with torch.enable_grad():
            logits = trial(images.clone())
            found = torch.autograd.grad(logits.float().sum(), [*reached.values()], allow_unused=True) \
                if logits.requires_grad else [None] * len(reached)
    except Exception as error:  # whatever the network's own code raises
        raise InputError(f"{what} cannot be trained in batches of {len(images)}: {said(error)}") from error
    found = dict(zip(reached, found))
    if any(value is not None and value.layout != torch.strided for value in found.values()):
        raise InputError(f"{what} has sparse gradients, which AdamW does not take; give its embeddings sparse=False")
    if all(found[name] is None for name in kernels):
        raise InputError(f"no gradient reaches {kernels[0]}: {what} runs it under torch.no_grad, detaches what it "
                         "gives, or uses torch.utils.checkpoint with use_reentrant=True (give it False)")
    return [name for name, value in found.items() if value is not None]


def like(images) -> torch.Tensor:
    """Return random images [7, …] with each channel's mean and standard deviation over ``images`` [n, …]."""
    x = images.detach().double()
    over = [d for d in range(x.dim()) if d != 1]
    mean, std = x.mean(over, keepdim=True), x.std(over, keepdim=True, correction=0)
    noise = torch.randn(max(BATCHES), *x.shape[1:], generator=torch.Generator().manual_seed(SEED), dtype=torch.double)
    made, (low, high) = noise.to(x.device) * (std + (std == 0)) + mean, (x.amin(over, True), x.amax(over, True))
    return torch.where(low < high, made.clamp(low, high), made).to(images.dtype)  # some networks take no other values


def difference(reference: nn.Module, other, images, exact: bool = True) -> str:
    """Return on which batch of :func:`like` two networks differ, and by how much; "" where they agree, to the bit or
    with ``exact=False`` up to CLOSE of the largest logit.

    Both are brought into eval mode through train() and eval(), so that what they compute on the way is theirs, and left
    there. A batch size on which ``reference`` fails is left out. Raises InputError where ``other`` fails, or all do.
    """
    errors, floats = [], [t.dtype for t in (*reference.parameters(), images) if t.is_floating_point()]
    close = CLOSE_IN_HALF if min(dtype.itemsize for dtype in floats) < 4 else CLOSE
    for network in (reference, other):
        if isinstance(network, nn.Module):
            to_eval(network)
    for size in BATCHES:
        batch = like(images)[:size]
        try:
            first = forward(reference, batch.clone())
        except InputError as error:
            errors.append(error)
            continue
        second = forward(other, batch.clone())
        bound = 0.0 if exact else close * first.abs().max().item()
        apart = (first.double() - second.double()).abs().max().item()
        if first.shape != second.shape or not (apart <= bound or torch.equal(first, second)):
            return f"on {size} random images the logits differ by {apart:.3g} of {first.abs().max().item():.3g}"
    if len(errors) == len(BATCHES):
        raise errors[0]
    return ""


def demand(what: str, found: str, why: str) -> None:
    """Raise InputError with ``what``, the difference ``found`` and ``why`` it may be; nothing where it is ""."""
    if found:
        raise InputError(f"{what} gives other logits ({found}), so it is not handed over: {why}")
