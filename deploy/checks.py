"""What is refused before a user's network is worked on, and what a packed file, a narrow network or an exported program
must show before it is handed over: the same logits."""

from __future__ import annotations

import hashlib

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from config import InputError
from support.own import copy_network, forward, memory, said

BATCHES = (1, 2, 3, 7)
CLOSE = 1e-4  # of the largest logit, where another order of sums may differ
CLOSE_IN_HALF = 0.02  # the same of a network in half precision
SEED = 20261128
# of compress_model: settings that say nothing about a network and images that are given
NOT_GIVEN = ("exp", "name", "smoke", "out", "policy", "policy_sha256", "model.", "scratch.", "data.")


def check_settings(settings) -> dict:
    """Return the settings of compress_model with dots for ``__``. Raises InputError for one without an effect there."""
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    useless = [key for key in settings if key != "data.batch_size" and any(
        key == name or name.endswith(".") and key.startswith(name) for name in NOT_GIVEN)]
    if useless:
        raise InputError(f"compress_model: {', '.join(useless)} has no effect on a network and images that are given; "
                         "leave it out")
    return settings


def fingerprint(model: nn.Module, *sets) -> dict[str, str]:
    """Return what tells a network and sets of images from others, for the identity of a run: a hash of the state dict,
    of the numbers of images and of their first labels."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for images in sets:
        digest.update(f"{len(images)} {images.batch(torch.arange(min(8, len(images))))[1].tolist()}".encode())
    return {"given": digest.hexdigest()}


def check_given(model) -> None:
    """Raise InputError for what is no network that can be compressed, with the reason."""
    what = type(model).__name__
    if torch.is_inference_mode_enabled():
        raise InputError("called under torch.inference_mode(), in which nothing can be trained; call it outside")
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, not a {what}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{what} is compiled by torch.jit; give the module that it was made of")
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise InputError(f"{what} holds parameters without a shape yet (lazy modules); call it on a batch once before")
    seen = {}
    for name, p in model.named_parameters():
        if p.is_meta:
            raise InputError(f"{what}: {name} is on the meta device and has no values; load the weights first")
        if p.dtype != torch.float32:
            raise InputError(f"{what}: {name} is {p.dtype}, images and weights are float32; give model.float(), or "
                             "without complex numbers")
        if not p.isfinite().all():
            raise InputError(f"{what}: {name} holds values that are not finite (NaN or infinity)")
        if 0 in [stride for stride, side in zip(p.stride(), p.shape) if side > 1]:
            raise InputError(f"{what}: {name} is expanded, several of its values lie at one place; give a clone of it")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.layout == torch.strided and t.numel() and not t.is_meta:
            begin = t.data_ptr()
            end = begin + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size()
            for other, (first, last, o) in seen.items():
                if o is not t and memory(o) != memory(t) and first < end and begin < last and t.device == o.device:
                    raise InputError(f"{what}: {other} and {name} share memory without being one parameter; tie them "
                                     "by making them the same object, or give one a clone")
            seen[name] = begin, end, t
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{what}: {key} of its state dict is no tensor (get_extra_state); leave it out")
    trial = copy_network(model)
    states = [{k: v.clone() for k, v in trial.train(mode).state_dict().items()} for mode in (True, False)]
    if differing := [k for k, v in states[0].items() if not torch.equal(v, states[1][k])]:
        raise InputError(f"{what}: {differing[0]} is another one in eval than in train mode; give a network whose "
                         "weights do not change by switching modes alone (LoRA merged, or taken out)")


def check_gradients(model: nn.Module, train, blocks) -> None:
    """Raise InputError where no gradient reaches one of the kernels of ``blocks`` from the logits; train: the network's
    images, as data.Images."""
    images, _ = train.batch(torch.arange(min(2, len(train))), next(model.parameters()).device)
    kernels = [names[0] for block in blocks for names in block.tensors.values()]
    trial, what = copy_network(model), type(model).__name__
    reached = dict(trial.requires_grad_().named_parameters())
    with torch.enable_grad(), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        for mode in (True, False)[len(images) < 2:]:  # one image alone has no batch statistics
            logits, missing = trial.train(mode)(images.clone()), kernels
            if logits.requires_grad:
                try:
                    found = torch.autograd.grad(logits.sum(), [reached[name] for name in kernels], allow_unused=True)
                except Exception as error:  # whatever the network's own code raises
                    raise InputError(f"{what} has no gradients: {said(error)}") from error
                missing = [] if mode else [name for name, value in zip(kernels, found) if value is None]
            if missing:
                raise InputError(f"no gradient reaches {missing[0]}: {what} runs it under torch.no_grad, detaches what "
                                 "it gives, or uses torch.utils.checkpoint with use_reentrant=True (give it False)")


def like(images) -> torch.Tensor:
    """Return random images [7, …] with each channel's mean and standard deviation over ``images`` [n, …]."""
    x = images.detach().double()
    over = [d for d in range(x.dim()) if d != 1]
    mean, std = x.mean(over, keepdim=True), x.std(over, keepdim=True, correction=0)
    noise = torch.randn(max(BATCHES), *x.shape[1:], generator=torch.Generator().manual_seed(SEED), dtype=torch.double)
    return (noise.to(x.device) * (std + (std == 0)) + mean).to(images.dtype)


def difference(reference: nn.Module, other, images, exact: bool = True) -> str:
    """Return on which batch of :func:`like` two networks differ, and by how much; "" where they agree, to the bit or
    with ``exact=False`` up to CLOSE of the largest logit.

    Both are brought into eval mode through train() and eval(), so that what they compute on the way is theirs, and left
    there. A batch size on which ``reference`` fails is left out. Raises InputError where ``other`` fails, or all do.
    """
    errors, floats = [], [t.dtype for t in (*reference.parameters(), images) if t.is_floating_point()]
    close = CLOSE_IN_HALF if min(dtype.itemsize for dtype in floats) < 4 else CLOSE
    for network in (reference, other):
        if isinstance(network, nn.Module) and not isinstance(network, fx.GraphModule):  # which is in eval mode for good
            network.train()
            network.eval()
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
