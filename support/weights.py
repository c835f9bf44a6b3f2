"""Checkpoint files: reading them without running what is in them, their layouts, and copying them into a network.

A network whose class has a ``layout`` ("vit", "resnet", "mobilenetv2") uses the parameter names of timm, which Meta's
DeiT and torchvision's ResNet files have too; any other network takes files with the names that it has itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import urllib.parse
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from config import InputError
from support.files import download, one_line, parse_json, shown
from support.published import PRETRAINED, PRETRAINED_STATS, Published  # noqa: F401 (models hands the first two on)

# Reading

MAX_HEADER = 16 << 20  # bytes of a safetensors header; those of published networks take less than one million
WRAPPERS = ("model", "state_dict", "model_state_dict", "net")  # keys under which training scripts save the weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                      "U8": torch.uint8, "BOOL": torch.bool}


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file by the file's names, on the CPU: safetensors, or what ``torch.save`` wrote,
    there also below one of the keys ``WRAPPERS``. Raises InputError, one line, for whatever cannot be used."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; give a checkpoint with --weights, or --weights none")
    try:
        if path.endswith(".safetensors"):
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            _check_zip(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
    except Exception as error:  # damaged input leads to almost any
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name:
            raise InputError(f"{path}: holds Python objects besides tensors ({shown(name[1])}), which are not loaded; "
                             "save the network's state_dict() with torch.save") from None
        raise InputError(f"{path}: damaged, or not a checkpoint ({type(error).__name__}: {shown(one_line(error))}); "
                         "delete it and get it again") from None
    for key in WRAPPERS * 2:  # one may be around the other
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}: holds no state dict of tensors by name")
    for name, entry in value.items():
        if not isinstance(name, str) or not isinstance(entry, torch.Tensor) or entry.layout != torch.strided or \
                entry.is_quantized or entry.device.type != "cpu":
            raise InputError(f"{path}: no state dict: entry {ascii(name)[:80]} is a {type(entry).__name__}, no plain "
                             "tensor by name; save the network's state_dict() with torch.save")
    return {name: entry.detach() for name, entry in value.items()}


def _check_zip(path):
    """Check every CRC of a zip archive; InputError for TorchScript, ValueError for damage and for what would expand."""
    with zipfile.ZipFile(path) as archive:
        if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist()):
            names = json.dumps(path), json.dumps(os.path.splitext(path)[0] + "-weights.pt")
            code = 'import torch; torch.save(torch.jit.load({}, "cpu").state_dict(), {})'.format(*names)
            raise InputError(f"{path}: a TorchScript archive; if you trust it, convert it with the following, which "
                             f"runs the file's code: python -c {shlex.quote(code)}")
        if sum(item.file_size for item in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its parts are compressed, as torch never does")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{shown(damaged)} is not what was written")


def _read_safetensors(path):
    """Read 8 bytes: length of the header; JSON: name → dtype, shape, data_offsets; the data, without gaps. Every number
    is compared with the file's size before memory is taken for it; ValueError and others where one is wrong."""
    room = os.path.getsize(path) - 8
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(room, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {room + 8}")
        header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        if not header:
            raise InputError(f"{path}: holds no state dict of tensors by name")
        state, last, room = {}, 0, room - length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise InputError(f"{path}: {shown(name)} is of type {shown(entry['dtype'])}, expected one of "
                                 f"{', '.join(SAFETENSORS_DTYPES)}")
            dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or begin != last or end > room or \
                    end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"shape and place of {shown(name)} do not fit each other and the data")
            data, last = bytearray(file.read(end - begin)), end
            data = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            state[name] = (data.bool() if dtype == torch.bool else data.view(dtype)).reshape(shape)
        if last != room:
            raise ValueError(f"{room - last} bytes belong to no tensor")
        return state


# Downloads

def hash_prefix(url: str) -> str:
    """Return the digits of the SHA-256 in a URL: NAME-xxxxxxxx.pth, or a folder that is the whole digest; else ""."""
    parts = urllib.parse.unquote(urllib.parse.urlsplit(url).path).split("/")
    name = re.search(r"-([0-9a-f]{8,64})\.\w+$", parts[-1])
    whole = [part for part in parts[:-1] if re.fullmatch("[0-9a-f]{64}", part)]
    return name[1] if name else whole[-1] if whole else ""


def file_name(url: str) -> str:
    """Return the name under which a URL's file is kept: the URL's where that carries a hash, else host and path, since
    many files are called model.safetensors. Raises InputError for what is no URL of a file."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url}: not a URL ({error})") from None
    path = urllib.parse.unquote(parts.path)
    name = path.rpartition("/")[2]
    if not name.strip("."):
        raise InputError(f"{url}: does not name a file")
    if not re.search(r"-[0-9a-f]{8,64}\.\w+$", name):  # the query goes in front: the suffix tells the format
        name = re.sub(r"[^\w.-]+", "_", f"{parts.hostname or ''}{parts.query}{path}", flags=re.ASCII).strip("_")
    return name[-200:]  # file systems end at 255 bytes


def weights_path(source, weights_dir: str = "weights") -> str:
    """Return where the file of a URL or :class:`Published` is kept, and where to put it by hand without a network."""
    return os.path.join(weights_dir, source.file if isinstance(source, Published) else file_name(source))


def cached(source, weights_dir: str = "weights", progress=None) -> tuple[str, str]:
    """Return (name of the source, file that holds it), downloading a URL or :class:`Published` that is not in
    ``weights_dir`` yet; a file: URL is copied again, it may have changed."""
    if not isinstance(source, Published):
        source = os.fspath(source)
        if "://" not in source and not source.startswith("file:"):
            return source, os.path.expanduser(source)
    target, size = weights_path(source, weights_dir), ""
    if isinstance(source, Published):
        source, size = source.url, f" (about {source.megabytes} MB)"
    sha256 = hash_prefix(source)
    if source.startswith("file:") or not os.path.isfile(target):
        download(source, target, progress, sha256, f"{size}, or give --weights FILE or --weights none")
    elif sha256:
        with open(target, "rb") as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256):
                raise InputError(f"{target}: its SHA-256 does not begin with {sha256}; delete it to download it again")
    return source, target


# Into a network

@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did. ``loaded``: number of tensors copied; ``replaced``: classifier tensors at their
    initialisation, since the file has another number of classes or no classifier."""
    source: str
    loaded: int
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_pretrained(model: nn.Module, source, weights_dir: str = "weights", progress=None,
                    quick_gelu: bool | None = None) -> LoadReport:
    """Copy a checkpoint into ``model`` in place; all of it fits or nothing is changed.

    ``source``: a file for :func:`read_checkpoint`, an http(s) or file URL, or a :class:`Published`. A classifier for
    another number of classes keeps its initialisation, position embeddings of another image size are interpolated,
    other precisions become float32; the report says so. ``quick_gelu``: activation of a ViT, QuickGELU (True) or GELU
    (False), which OpenAI's CLIP files tell and other files with CLIP's names do not; None leaves a network that takes
    any other file as it is. Raises InputError, one line, that names every name and shape that does not fit.
    """
    vit = getattr(type(model), "layout", "") == "vit"
    if quick_gelu is not None and not vit:
        raise InputError("model.quick_gelu is a matter of CLIP's weights; leave it at auto for any other network")
    source, path = cached(source, weights_dir, progress)
    state, notes, activation = convert_layout(read_checkpoint(path), model)
    headless = activation is not None
    target = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    replaced = _replaced(model, state, target, headless, notes)
    if vit and "pos_embed" in state:
        resized = _resized_positions(state["pos_embed"], target["pos_embed"])
        if resized is not None:
            notes.append(f"position embeddings interpolated from {state['pos_embed'].shape[1] - 1} to "
                         f"{resized.shape[1] - 1} patches (bicubic)")
            state["pos_embed"] = resized
    _check_fit(path, state, target, replaced)
    wanted = [name for name in target if name in state and name not in replaced]
    notes += _to_float32(path, state, wanted)  # after the check, so that the file cannot make it take more memory
    kept = len(target) - len(replaced) - len(wanted)
    if kept:
        notes.append(f"{kept} num_batches_tracked counters are not in the file and keep their values")
    if activation == "unknown" and quick_gelu is None:
        raise InputError(f"{path}: has CLIP's names and does not tell its activation; set model.quick_gelu=on (weights "
                         "of OpenAI, open_clip's -quickgelu models) or model.quick_gelu=off (open_clip's others)")
    with torch.no_grad():
        for name in wanted:
            target[name].copy_(state[name])
    if quick_gelu is not None or activation == "quick":
        set_quick_gelu(model, quick_gelu is not False)
        notes.append(f"activation {'GELU' if quick_gelu is False else 'QuickGELU'}, "
                     f"{'as OpenAI trained it' if quick_gelu is None else 'as asked'}")
    return LoadReport(source, len(wanted), replaced, tuple(notes))


def set_quick_gelu(model: nn.Module, on: bool) -> None:
    """Give every block of a ViT QuickGELU, or GELU."""
    for block in model.blocks:
        block.mlp.act.quick = on


def classifier_name(model: nn.Module) -> str | None:
    """Return the dotted name of the module that gives the logits: the one that the network's class names, else the last
    Linear in registration order, else the last Conv2d if it is 1×1, else None."""
    if hasattr(type(model), "classifier_name"):
        return model.classifier_name
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    pointwise = convs and convs[-1][1].kernel_size == (1, 1)
    return linear[-1] if linear else convs[-1][0] if pointwise else None


def _replaced(model, state, target, headless, notes):
    """Names of the classifier's tensors where the file has none, or one that differs in the number of classes alone."""
    names = tuple(f"{classifier_name(model)}.{leaf}" for leaf in ("weight", "bias"))
    names = tuple(name for name in names if name in target)
    if headless:
        notes.append("classifier left at its initialisation: the file has none")
        return names
    if not names or not all(name in state for name in names):
        return ()
    before, now = (tuple(tensors[name].shape for name in names) for tensors in (state, target))
    if before == now or any(o[:1] != before[0][:1] or len(o) != len(n) or o[1:] != n[1:] for o, n in zip(before, now)):
        return ()
    notes.append(f"classifier left at its initialisation: {before[0][0]} classes in the file, {now[0][0]} here")
    return names


def _check_fit(path, state, target, replaced):
    """Raise InputError with every name, shape and type that does not fit; older files lack BatchNorm's counters."""
    missing = [name for name in target if name not in state and name not in replaced and
               not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in target]
    problems = [f"{what}: {', '.join(map(shown, names[:1000]))}{' …' if len(names) > 1000 else ''}"
                for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
    for name in [name for name in target if name in state and name not in replaced]:
        if state[name].shape != target[name].shape:
            problems.append(f"shape: {name} {list(state[name].shape)} (file) vs {list(target[name].shape)} (network)")
        elif state[name].is_floating_point() != target[name].is_floating_point():
            problems.append(f"type: {name} {state[name].dtype} (file) vs {target[name].dtype} (network)")
    if problems:
        raise InputError(f"{path} does not fit the network; " + "; ".join(problems))


def _to_float32(path, state, wanted):
    """Convert what is a float in place → notes; InputError for values that are not finite."""
    converted = 0
    for name in wanted:
        if state[name].is_floating_point():
            converted += state[name].dtype != torch.float32
            state[name] = state[name].float()
            if not state[name].isfinite().all():
                raise InputError(f"{path}: tensor {shown(name)} holds values that are not finite in float32")
    return [f"{converted} tensors of another precision converted to float32"] if converted else []


def _resized_positions(old, new):
    """[1, 1 + g², C] → [1, 1 + G², C] as ``new``, the class token's row kept, bicubic with anti-aliasing (as timm);
    None where another number of patches is not the difference."""
    if old.ndim != 3 or old.shape == new.shape or old.shape[0] != 1 or old.shape[2] != new.shape[2]:
        return None
    before, after = math.isqrt(max(old.shape[1] - 1, 0)), math.isqrt(new.shape[1] - 1)
    if before < 1 or before ** 2 != old.shape[1] - 1 or not old.is_floating_point():
        return None
    grid = old[:, 1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)  # [1, C, g, g]
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([old[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + G², C]


# Layouts

CLIP_MODULES = {"conv1": "patch_embed.proj", "ln_pre": "norm_pre", "ln_post": "norm"}
CLIP_BLOCK = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1",
              "mlp.c_proj": "mlp.fc2"}
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # tensors that OpenAI's CLIP files alone hold


def convert_layout(state: dict, model: nn.Module) -> tuple[dict, list[str], str | None]:
    """Rename a checkpoint's tensors to the network's names → (tensors, notes, activation).

    The activation is "quick" or "unknown" for a file with CLIP's names, which has no classifier, else None. CLIP's
    image tower is read as OpenAI and open_clip name it, with or without ``visual.`` in front and the text tower beside.
    A name that no layout has stays as it is, so that it is reported as unexpected; most files need no change.
    """
    names, layout = list(model.state_dict()), getattr(type(model), "layout", "")
    for prefix in PREFIXES * 2:  # one may be around the other
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in names):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if layout == "mobilenetv2" and "features.0.0.weight" in state:
        table = _torchvision_mobilenet(model)
        split = {name: name.rpartition(".") for name in state}
        return {f"{table[module]}.{leaf}" if module in table else name: state[name]
                for name, (module, _, leaf) in split.items()}, [], None
    if layout == "vit":
        activation = "quick" if OPENAI <= state.keys() else "unknown"
        if "visual.class_embedding" in state:
            tower = {name.removeprefix("visual."): tensor for name, tensor in state.items()
                     if name.startswith("visual.")}
            return *_clip_tower(tower, len(state) - len(tower)), activation
        if "class_embedding" in state and "conv1.weight" in state:
            return *_clip_tower(state, 0), activation
    return dict(state), [], None


def _clip_tower(state, others):
    """OpenAI's names of the image tower → (tensors by this project's, notes); ``others``: number of tensors besides."""
    renamed, notes = {}, [f"{others} tensors besides the image tower (CLIP's text tower …) left out"] if others else []
    for name, tensor in state.items():
        if name == "proj":
            notes.append(f"projection to the space shared with texts {list(tensor.shape)} left out")
            continue
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", module)
        new = name
        if name == "class_embedding":
            new, tensor = "cls_token", tensor.reshape(1, 1, -1) if tensor.ndim == 1 else tensor
        elif name == "positional_embedding":
            new, tensor = "pos_embed", tensor[None] if tensor.ndim == 2 else tensor
        elif module in CLIP_MODULES:
            new = f"{CLIP_MODULES[module]}.{leaf}"
        elif block and block[2] == "attn" and leaf in ("in_proj_weight", "in_proj_bias"):
            new = f"blocks.{block[1]}.attn.qkv.{leaf.removeprefix('in_proj_')}"
        elif block and block[2] in CLIP_BLOCK:
            new = f"blocks.{block[1]}.{CLIP_BLOCK[block[2]]}.{leaf}"
        renamed[new if new not in state else name] = tensor  # a file with both names keeps this one as unexpected
    return renamed, notes


def _torchvision_mobilenet(model):
    """torchvision's module names → this project's."""
    table = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2",
             "classifier.1": "classifier"}
    separable = ("conv_dw", "conv.0.0"), ("bn1", "conv.0.1"), ("conv_pw", "conv.1"), ("bn2", "conv.2")
    inverted = (("conv_pw", "conv.0.0"), ("bn1", "conv.0.1"), ("conv_dw", "conv.1.0"), ("bn2", "conv.1.1"),
                ("conv_pwl", "conv.2"), ("bn3", "conv.3"))
    places = [(f"blocks.{i}.{j}", block) for i, group in enumerate(model.blocks) for j, block in enumerate(group)]
    for index, (place, block) in enumerate(places, start=1):
        for ours, torchvisions in inverted if hasattr(block, "conv_pwl") else separable:
            table[f"features.{index}.{torchvisions}"] = f"{place}.{ours}"
    return table
