"""Checkpoint files of every kind, CLIP's layout against an independent forward pass, and files that are wrong."""

import collections
import hashlib
import json
import os
import pickle
import shlex
import struct
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from config import InputError
from models import build, has_quick_gelu, load_pretrained, weights_path
from networks import Trap, equal, randomised, snapshot
from support.published import Published
from support.weights import LoadReport, read_checkpoint
from test_models import images, tiny

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def safetensors(state, tamper=None):
    """The bytes of a safetensors file; ``tamper`` may change the header before it is written."""
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in state.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    if tamper:
        tamper(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(model, source, *words, **options):
    """load_pretrained refuses ``source`` with one line that holds ``words``, and leaves the model as it was."""
    before, activation = snapshot(model), has_quick_gelu(model)
    with pytest.raises(InputError) as error:
        load_pretrained(model, source, **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert equal(before, model.state_dict()) and has_quick_gelu(model) == activation
    return message


@pytest.fixture
def state():
    return snapshot(randomised(tiny(), seed=5))


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "w.pth")


prefixed = lambda state, prefix: {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [
    collections.OrderedDict, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}}, lambda s: {"net": {"model": s}},
    lambda s: prefixed(s, "module."), lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    lambda s: prefixed(s, "module._orig_mod.")])
def test_torch_files(file, state, wrap, legacy):
    torch.save(wrap(state), file, _use_new_zipfile_serialization=not legacy)
    model = tiny()
    assert load_pretrained(model, file) == LoadReport(file, len(state))
    assert equal(state, model.state_dict()) and all(p.requires_grad for p in model.parameters())
    torch.save(prefixed(state, "module."), file)  # a prefix that the network's names have, too, stays
    assert load_pretrained(nn.Sequential(collections.OrderedDict(module=model)), file).loaded == len(state)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_every_kind_of_tensor_and_truncated_files(tmp_path, form):
    content = {"transposed": torch.arange(24.0).view(4, 6).T, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3),
               **{str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in CODES}}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.bin")
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    if form == "safetensors":
        path.write_bytes(safetensors(content))
    state = read_checkpoint(str(path))
    assert state.keys() == content.keys()
    assert all(state[n].dtype == t.dtype and torch.equal(state[n], t) for n, t in content.items())
    whole = path.read_bytes()
    for keep in (0.05, 0.5, 0.999):
        path.write_bytes(whole[:int(keep * len(whole))])
        refused(tiny(), str(path), f"{path}: damaged")


@pytest.mark.parametrize("name, classifier", [("vit", "head"), ("resnet18", "fc"), ("mobilenetv2_100", "classifier")])
def test_another_number_of_classes_and_no_counters(file, name, classifier):
    source, model = (randomised(tiny(n) if name == "vit" else build(name, n, width=0.1), seed=n) for n in (6, 3))
    state, before = snapshot(source), snapshot(model)
    state = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, file)
    report = load_pretrained(model, file)
    assert report.replaced == (f"{classifier}.weight", f"{classifier}.bias")
    assert report.loaded == len(state) - 2 and "6 classes in the file, 3 here" in report.notes[0]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key] if key in state and key not in report.replaced else before[key])


def test_position_embeddings_of_another_image_size(file, state):
    """A linear ramp over the grid stays a linear ramp away from the border; the class token's row is untouched."""
    ramp = torch.arange(4.0).repeat(4)  # column index, row by row
    state["pos_embed"] = torch.cat([torch.full((1, 1, 8), 9.0), ramp[None, :, None].expand(1, 16, 8)], dim=1)
    torch.save(state, file)
    model = tiny(image_size=32)
    assert "interpolated from 16 to 64 patches (bicubic)" in load_pretrained(model, file).notes[0]
    assert (model.pos_embed[0, 0] == 9).all()
    grid = model.pos_embed[0, 1:, 3].reshape(8, 8)
    torch.testing.assert_close(grid, grid[:1].expand(8, 8))  # no change from row to row
    assert abs(grid[0].mean() - 1.5) < 1e-5 and (grid[0].diff() > 0).all()
    torch.testing.assert_close(grid[0, 3:5], torch.tensor([1.25, 1.75]), atol=0.02, rtol=0)
    refused(tiny(head_dim=6), file, "pos_embed torch.float32 [1, 17, 8] in the file, torch.float32 [1, 17, 12] in")


def test_every_mismatch_is_listed(file, state):
    del state["norm.bias"], state["blocks.1.attn.qkv.bias"]
    state |= {"dist_token": torch.zeros(1), "odd\nname": torch.zeros(1), "blocks.0.mlp.fc1.weight": torch.zeros(5, 8),
              "blocks.0.norm1.bias": torch.zeros(9), "norm.weight": torch.ones(8, dtype=torch.int8),
              "blocks.1.norm1.bias": torch.ones(8, dtype=torch.complex64), "head.weight": torch.zeros(4, 12)}
    state |= {"blocks.0.norm2.bias": torch.full((8,), 1e300, dtype=torch.float64),
              "blocks.1.norm2.bias": torch.full((8,), float("nan"))}
    torch.save(state, file)
    message = refused(tiny(), file, f"{file} does not fit", "blocks.0.norm2.bias holds values that are not finite",
                      "blocks.1.norm2.bias holds values", "missing: blocks.1.attn.qkv.bias, norm.bias;",
                      "unexpected: dist_token, 'odd\\nname';", "different: norm.weight torch.int8 [8] in",
                      "different: blocks.1.norm1.bias torch.complex64 [8]", "head.weight torch.float32 [4, 12] in",
                      "fc1.weight torch.float32 [5, 8] in the file, torch.float32 [32, 8] in the", quick_gelu=True)
    assert message.count("different:") == 5


def test_torch_files_with_changed_bytes_or_compressed_ones(tmp_path, state):
    path, packed = tmp_path / "w.pth", tmp_path / "packed.pth"
    torch.save({**state, "a": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    refused(tiny(), str(packed), "compressed")
    content = path.read_bytes()
    at = content.index(state["norm.bias"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
    refused(tiny(), str(path), "not what was written")


@pytest.mark.parametrize("field, value", [
    ("dtype", "F8_E4M3"), ("dtype", ["F32"]), ("shape", [9]), ("shape", [-8]), ("shape", [True] * 8), ("shape", 8),
    ("shape", [8.0]), ("shape", [2 ** 70]), ("data_offsets", [0, 10 ** 12]), ("data_offsets", [-32, 0]),
    ("data_offsets", None), ("data_offsets", [0, 32])])  # the last are the bytes of another tensor
def test_safetensors_entries_that_lie(tmp_path, state, field, value):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(state, lambda header: header["norm.bias"].update({field: value})))
    refused(tiny(), str(path), str(path))
    path.write_bytes(safetensors(state) + bytes(4))
    refused(tiny(), str(path), "4 bytes belong to no tensor")


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, file, state, new):
    mark = tmp_path / "executed"
    torch.save({**state, "evil": Trap(mark)}, file, _use_new_zipfile_serialization=new)
    refused(tiny(), file, f"{file}: holds Python objects besides tensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # the trap is a working one


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content, word", [
    ({}, "no plain tensors"), ([1], "no plain tensors"), ({"a": 1}, "no plain tensors"),
    ({1: torch.zeros(1)}, "no plain tensors"), ({"a": torch.zeros(2).to_sparse()}, "no plain tensors"),
    (nn.Linear(2, 2), "torch.nn.modules.linear.Linear")])
def test_files_without_a_state_dict(file, content, word):
    torch.save(content, file)
    refused(tiny(), file, file, word)
    for path in (f"{file}.none", os.path.dirname(file)):
        refused(tiny(), path, f"{path}: no such file")


def test_urls_go_through_the_weights_folder(tmp_path, state):
    url, kept, model = (tmp_path / "w.pth").as_uri(), str(tmp_path / "deep" / "weights"), tiny()
    for _ in range(2):  # the file of a file: URL changes; the copy must follow
        state["norm.bias"] += 1
        torch.save(state, tmp_path / "w.pth")
        assert load_pretrained(model, url, weights_dir=kept).source == url and equal(state, model.state_dict())
        assert [os.path.join(kept, name) for name in os.listdir(kept)] == [weights_path(url, kept)]
    content = (tmp_path / "w.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    for name in (f"w-{digest}.pth", "w-00000000.pth"):
        (tmp_path / name).write_bytes(content)
    refused(tiny(), (tmp_path / "w-00000000.pth").as_uri(), "00000000", weights_dir=kept)
    load_pretrained(tiny(), (tmp_path / f"w-{digest}.pth").as_uri(), weights_dir=kept)
    load_pretrained(tiny(), f"http://127.0.0.1:9/w-{digest}.pth", weights_dir=kept)  # the file is there already


def test_urls_that_fail(tmp_path):
    known = Published("http://127.0.0.1:9/model.safetensors", 353)
    refused(tiny(), known, f"cannot fetch {known.url}", str(tmp_path / "127.0.0.1_9_model.safetensors"), "about 353 MB",
            "--weights none", weights_dir=str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_names_and_digests_of_published_files():
    for name, known in models.PRETRAINED.items():
        path = weights_path(known, "w")
        assert path.endswith("in1k_resolve_main_model.safetensors") if "clip" in name else (
            path == f"w/{os.path.basename(known.url)}" and known.sha256 == path[-12:-4])
    assert Published("https://host/model.pth").sha256 == Published("https://host/model-f37072f.pth").sha256 == ""
    assert len({weights_path(f"http://h/{name}") for name in ("a/m.pt", "b/m.pt", "b/m.pt?v=2")}) == 3
    assert weights_path("http://h/../%2e%2e/..%2fx.pt?a=/../b", "w") == "w/a_.._bh_.._2e_2e_.._2fx.pt"
    assert len(os.path.basename(weights_path(f"http://h/{'x' * 300}.pth"))) <= 255


quick = lambda x: x / (1 + torch.exp(-1.702 * x))
exact = lambda x: x * 0.5 * (1 + torch.erf(x / 2 ** 0.5))
OPENAIS = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
           "norm_pre": "ln_pre", "blocks.": "transformer.resblocks.", "norm1": "ln_1", "norm2": "ln_2",
           "qkv.": "in_proj_", "attn.proj": "attn.out_proj", "fc1": "c_fc", "fc2": "c_proj", "norm.": "ln_post."}


def openai_tower(model):
    """The state dict of CLIP's image tower as OpenAI names it, of drawn weights."""
    state = {"proj": torch.ones(8, 6)}
    for name, tensor in snapshot(randomised(model, seed=3)).items():
        if not name.startswith("head."):
            for ours, openais in OPENAIS.items():
                name = name.replace(ours, openais)
            state[name] = tensor.squeeze() if name.endswith("embedding") else tensor
    return state


def openai_features(state, x, heads, act):
    """The normalised class token of OpenAI's image tower, from its definition, through torch's encoder layer."""
    patch, width = state["conv1.weight"].shape[-1], state["conv1.weight"].shape[0]
    norm = lambda x, name: F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
    x = F.conv2d(x, state["conv1.weight"], stride=patch).flatten(2).permute(0, 2, 1)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, width), x], dim=1) + state["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(sum(name.endswith("in_proj_weight") for name in state)):
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, act, 1e-5, batch_first=True, norm_first=True)
        for name, tensor in layer.state_dict().items():
            for new, old in ("self_attn", "attn"), ("linear1", "mlp.c_fc"), ("linear2", "mlp.c_proj"), ("norm", "ln_"):
                name = name.replace(new, old)
            tensor.copy_(state[f"transformer.resblocks.{i}.{name}"])
        x = layer(x)
    return norm(x[:, 0], "ln_post")


def equals_openai(model, state, act, side=16, heads=2):
    """Whether a network's logits are its classifier on the features of OpenAI's definition."""
    x = images(3, side, seed=8)
    with torch.no_grad():
        nn.init.normal_(model.head.weight)
        expected = model.head(openai_features({n: t.float() for n, t in state.items()}, x, heads, act))
        assert expected.std() > 0.05
        return ((model.eval()(x) - expected).abs().max() < 1e-4 * expected.abs().max()).item()


OPENAI = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
TEXT = {"positional_embedding": torch.ones(7, 8), "text_projection": torch.ones(8, 6), "logit_scale": torch.tensor(2.6),
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8), "ln_final.weight": torch.ones(8)}


@pytest.mark.parametrize("form, asked, act", [
    ("openai", None, quick), ("openai", False, exact), ("open_clip", True, quick), ("tower", False, exact),
    ("open_clip", None, None), ("tower", None, None)])
def test_state_dicts_with_openais_names(file, form, asked, act):  # the text tower's look-alikes must not get in
    tower = {name: tensor.half() if form == "openai" else tensor
             for name, tensor in openai_tower(tiny(clip=True)).items()}
    state = tower if form == "tower" else {**TEXT, **prefixed(tower, "visual.")}
    torch.save({**state, **OPENAI} if form == "openai" else {"state_dict": prefixed(state, "module.")}, file)
    model = tiny(5, clip=True)
    if act is None:
        refused(model, file, "does not tell its activation", "model.quick_gelu=on", "model.quick_gelu=off")
        return
    report = load_pretrained(model, file, quick_gelu=asked)
    assert equals_openai(model, tower, act) and not equals_openai(model, tower, exact if act is quick else quick)
    assert report.loaded == len(model.state_dict()) - 2 and report.replaced == ("head.weight", "head.bias")
    assert all(words in " | ".join(report.notes) for words in (
        "the file has none", "projection to the space shared with texts [8, 6]",
        {"openai": "8 tensors besides the image tower", "open_clip": "5 tensors besides", "tower": ""}[form],
        "tensors of another precision converted to float32" if form == "openai" else "",
        f"activation {'QuickGELU' if act is quick else 'GELU'}"))


def test_an_activation_where_the_layout_is_not_clips(file, state):
    torch.save(state, file)
    for on, asked in ((True, None), (False, None), (False, True), (True, False)):
        model = tiny(quick_gelu=on)
        load_pretrained(model, file, quick_gelu=asked)
        assert has_quick_gelu(model) == (on if asked is None else asked)
    refused(build("resnet18", 3, width=0.1), file, "quick_gelu", quick_gelu=False)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; the files that people have are not
def test_a_torchscript_archive_is_refused_with_the_line_that_converts_it(tmp_path):
    network, path = randomised(tiny(), seed=5), str(tmp_path / "it's.pt")
    torch.jit.save(torch.jit.trace(network, images(1, 16)), path)
    message = refused(tiny(), path, "TorchScript", "runs the file's code")
    exec(shlex.split(message[message.index("python -c"):])[2])
    model = tiny()
    load_pretrained(model, str(tmp_path / "it's-weights.pt"))
    assert equal(network.state_dict(), model.state_dict())
