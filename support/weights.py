"""Checkpoint files: reading them without running what is in them, their layouts, and copying them into a network.

A network whose class has a ``layout`` ("vit", "resnet", "mobilenetv2") uses the parameter names of timm, which Meta's
DeiT and torchvision's ResNet files have too; any other network takes files with the names that it has itself.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import warnings
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from config import InputError
from support.files import download, one_line, parse_json, shown
from support.published import PRETRAINED, PRETRAINED_STATS, Published  # noqa: F401 (models hands the first two on)

WRAPPERS = ("model", "state_dict", "model_state_dict", "net")  # keys under which training scripts save the weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                      "U8": torch.uint8, "BOOL": torch.bool}


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file by the file's names, on the CPU: safetensors, or what ``torch.save`` wrote,
    there also below one of the keys ``WRAPPERS``. Raises InputError, one line, for what cannot be used."""
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        raise InputError(f"{path}: no such file, or not readable; give a checkpoint with --weights, or --weights none")
    try:
        if path.endswith(".safetensors"):
            value = _read_safetensors(path)
        else:
            if zipfile.is_zipfile(path):
                _check_zip(path)
            with warnings.catch_warnings(action="ignore"):
                value = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # readers of damaged files raise almost anything
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(f"{path}: holds Python objects besides tensors ({shown(name[1])}), which are not loaded; "
                             "save the network's state_dict() with torch.save") from None
        raise InputError(f"{path}: damaged, or not a checkpoint ({type(error).__name__}: {shown(one_line(error))}); "
                         "delete it and get it again") from None
    for key in WRAPPERS * 2:  # one may be around the other
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) and isinstance(
            tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
            for name, tensor in value.items()):
        below = [shown(key) for key in value if isinstance(value[key], dict)] if isinstance(value, dict) else []
        raise InputError(f"{path}: holds no plain tensors by name" + f" but more below {', '.join(below)}" * bool(below)
                         + "; save the network's state_dict() with torch.save")
    return {name: tensor.detach() for name, tensor in value.items()}


def _check_zip(path):
    """Check every CRC of a zip archive; InputError for TorchScript, ValueError for damage and for what would expand."""
    with zipfile.ZipFile(path) as archive:
        if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist()):
            target = os.path.splitext(path)[0] + "-weights.pt"
            code = f"import torch; torch.save(torch.jit.load({path!r}, 'cpu').state_dict(), {target!r})"
            raise InputError(f"{path}: a TorchScript archive; if you trust it, convert it with the following, which "
                             f"runs the file's code: python -c {shlex.quote(code)}")
        if sum(item.file_size for item in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its parts are compressed, as torch never does")
        if archive.testzip():
            raise ValueError("a part of it is not what was written")


def _read_safetensors(path):
    """Read 8 bytes: length of the header; JSON: name → dtype, shape, data_offsets; the data, without gaps. Every number
    is compared with the file's size before memory is taken for it; ValueError and others where one is wrong."""
    room, state, last = os.path.getsize(path) - 8, {}, 0
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(room, 16 << 20):  # headers of published networks take less than one million bytes
            raise ValueError(f"a header of {length} bytes in a file of {room + 8}")
        header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or begin != last or \
                    end > room - length or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"shape and place of {shown(name)} do not fit each other and the data")
            data, last = torch.empty(end - begin, dtype=torch.uint8), end
            file.readinto(data.numpy())
            state[name] = (data.bool() if dtype == torch.bool else data.view(dtype)).reshape(shape)
        if last != room - length:
            raise ValueError(f"{room - length - last} bytes belong to no tensor")
        return state


def weights_path(source: str | Published, weights_dir: str = "weights") -> str:
    """Return where the file of a URL is kept, and where to put it by hand without a network."""
    return os.path.join(weights_dir, (source if isinstance(source, Published) else Published(source)).file)


def cached(source, weights_dir: str = "weights", progress=None) -> tuple[str, str]:
    """Return (name of the source, file that holds it), downloading a URL that is not in ``weights_dir`` yet; a file:
    URL is copied again, it may have changed."""
    source = source if isinstance(source, Published) else Published(os.fspath(source))
    url, target = source.url, weights_path(source, weights_dir)
    if "://" not in url:
        return url, os.path.expanduser(url)
    if url.startswith("file:") or not os.path.isfile(target):
        size = f" (about {source.megabytes} MB)" if source.megabytes else ""
        download(url, target, progress, source.sha256, f"{size}, or give --weights FILE or --weights none")
    return url, target


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
    other precisions become float32; the report says so. ``quick_gelu``: QuickGELU (True) or GELU (False) in a ViT;
    None: as OpenAI's CLIP files tell; other files with CLIP's names are refused, any other leaves it. InputError names
    all that does not fit.
    """
    vit = getattr(type(model), "layout", "") == "vit"
    if quick_gelu is not None and not vit:
        raise InputError("model.quick_gelu is a matter of CLIP's weights; leave it at auto for any other network")
    source, path = cached(source, weights_dir, progress)
    state, notes, activation = convert_layout(read_checkpoint(path), model)
    target = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    replaced = _replaced(model, state, target, activation is not None, notes)
    if vit:
        _resize_positions(state, target, notes)
    wanted = [name for name in target if name in state and name not in replaced]
    if problems := _misfits(state, target, wanted, replaced):
        raise InputError(f"{path} does not fit the network; {'; '.join(problems)}")
    if activation == "unknown" and quick_gelu is None:
        raise InputError(f"{path}: has CLIP's names and does not tell its activation; set model.quick_gelu=on (weights "
                         "of OpenAI, open_clip's -quickgelu models) or model.quick_gelu=off (open_clip's others)")
    if converted := sum(state[name].is_floating_point() and state[name].dtype != torch.float32 for name in wanted):
        notes.append(f"{converted} tensors of another precision converted to float32")
    with torch.no_grad():
        for name in wanted:
            target[name].copy_(state[name])
    if quick_gelu is not None or activation == "quick":
        set_quick_gelu(model, quick_gelu is not False)
        notes.append(f"activation {'GELU' if quick_gelu is False else 'QuickGELU'}")
    return LoadReport(source, len(wanted), replaced, tuple(notes))


def set_quick_gelu(model: nn.Module, on: bool) -> None:
    """Give every block of a ViT QuickGELU, or GELU."""
    for block in model.blocks:
        block.mlp.act.quick = on


def classifier_name(model: nn.Module) -> str | None:
    """Return the dotted name of the module that gives the logits: as the network's class says, else the last Linear in
    registration order, else the last Conv2d if it is 1×1, else None."""
    if hasattr(type(model), "classifier_name"):
        return model.classifier_name
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convs = [(name, module.kernel_size) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return linear[-1] if linear else convs[-1][0] if convs and convs[-1][1] == (1, 1) else None


def _replaced(model, state, target, headless, notes):
    """Names of the classifier's tensors where the file has none, or one that differs in the number of classes alone."""
    names = tuple(name for leaf in ("weight", "bias") if (name := f"{classifier_name(model)}.{leaf}") in target)
    if headless:
        notes.append("classifier left at its initialisation: the file has none")
        return names
    old, new = ([tuple(tensors[name].shape) for name in names if name in tensors] for tensors in (state, target))
    if not old or old == new or len({shape[:1] for shape in old}) > 1 or [s[1:] for s in old] != [s[1:] for s in new]:
        return ()
    notes.append(f"classifier left at its initialisation: {old[0][0]} classes in the file, {new[0][0]} here")
    return names


def _misfits(state, target, wanted, replaced):
    """Name every tensor that is missing (BatchNorm's counters may be), unexpected, of another kind or not finite."""
    missing = [name for name in target.keys() - state.keys() - {*replaced} if not name.endswith("num_batches_tracked")]
    problems = [f"{what}: {', '.join(map(shown, sorted(names)))}" for what, names in (
        ("missing", missing), ("unexpected", state.keys() - target.keys())) if names]
    kind = lambda tensor: f"{tensor.dtype} {list(tensor.shape)}"
    for name in wanted:
        old, new = state[name], target[name]
        if old.shape != new.shape or old.is_floating_point() != new.is_floating_point():
            problems.append(f"different: {name} {kind(old)} in the file, {kind(new)} in the network")
        elif new.is_floating_point() and not old.float().isfinite().all():
            problems.append(f"{name} holds values that are not finite in float32")
    return problems


def _resize_positions(state, target, notes):
    """Resize [1, 1 + g², C] to [1, 1 + G², C] as timm: bicubic, anti-aliased, the class token's row kept."""
    old, new = state.get("pos_embed"), target["pos_embed"]
    if old is None or old.ndim != 3 or old.shape == new.shape or old.shape[::2] != new.shape[::2] or old.shape[1] < 2:
        return
    before, after = math.isqrt(old.shape[1] - 1), math.isqrt(new.shape[1] - 1)
    if before ** 2 == old.shape[1] - 1:
        grid = old[:, 1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)  # [1, C, g, g]
        grid = F.interpolate(grid, size=(after, after), mode="bicubic", antialias=True, align_corners=False)
        state["pos_embed"] = torch.cat([old[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + G², C]
        notes.append(f"position embeddings interpolated from {before ** 2} to {after ** 2} patches (bicubic)")


# Layouts: (pattern, replacement) for names, one after the other

CLIP = ((r"^class_embedding$", "cls_token"), (r"^positional_embedding$", "pos_embed"), (r"^ln_pre\.", "norm_pre."),
        (r"^conv1\.", "patch_embed.proj."), (r"^ln_post\.", "norm."), (r"^transformer\.resblocks\.", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."), (r"\.attn\.in_proj_", ".attn.qkv."), (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."))
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # tensors that OpenAI's CLIP files alone hold
TORCHVISION = (("features.0.0", "conv_stem"), ("features.0.1", "bn1"), ("features.18.0", "conv_head"),
               ("features.18.1", "bn2"), ("classifier.1", "classifier"))  # MobileNetV2 outside its blocks
SEPARABLE = (("0.0", "conv_dw"), ("0.1", "bn1"), ("1", "conv_pw"), ("2", "bn2"))  # its first block
INVERTED = (("0.0", "conv_pw"), ("0.1", "bn1"), ("1.0", "conv_dw"), ("1.1", "bn2"), ("2", "conv_pwl"), ("3", "bn3"))


def convert_layout(state: dict, model: nn.Module) -> tuple[dict, list[str], str | None]:
    """Rename a checkpoint's tensors to the network's names → (tensors, notes, activation).

    The activation is "quick" or "unknown" for a file with CLIP's names, which has no classifier, else None. CLIP's
    image tower is read with or without ``visual.`` in front and the text tower beside. Other names stay as they are.
    """
    names, layout = list(model.state_dict()), getattr(type(model), "layout", "")
    for prefix in PREFIXES * 2:  # one may be around the other
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in names):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if layout == "mobilenetv2" and "features.0.0.weight" in state:
        places = [f"blocks.{i}.{j}." for i, group in enumerate(model.blocks) for j in range(len(group))]
        blocks = [(f"features.{n}.conv.{old}", place + new) for n, place in enumerate(places, start=1)
                  for old, new in (SEPARABLE if n == 1 else INVERTED)]
        return _renamed(state, [(f"^{re.escape(old)}(?=[.])", new) for old, new in (*TORCHVISION, *blocks)]), [], None
    prefix = "visual." if "visual.class_embedding" in state else ""
    tower = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if layout != "vit" or not {"class_embedding", "conv1.weight"} <= tower.keys():
        return state, [], None
    notes = []
    if len(tower) < len(state):
        notes.append(f"{len(state) - len(tower)} tensors besides the image tower (CLIP's text tower …) left out")
    if "proj" in tower:
        notes.append(f"projection to the space shared with texts {list(tower.pop('proj').shape)} left out")
    tower = _renamed(tower, CLIP)
    for name in {"cls_token", "pos_embed"} & tower.keys():
        tower[name] = tower[name][(None,) * (3 - tower[name].ndim)]  # [C], [T, C] → [1, 1, C], [1, T, C]
    return tower, notes, "quick" if OPENAI <= state.keys() else "unknown"


def _renamed(state, rules):
    """Apply the rules to every name; a file with a name of both kinds keeps the one that is then unexpected."""
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[name if new in state else new] = tensor
    return renamed
