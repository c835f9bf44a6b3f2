"""Every published checkpoint layout against an independent forward pass, and every way a file can be wrong."""

import collections
import hashlib
import json
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

import checkpoints  # noqa: E402
import models  # noqa: E402
from support.weights import is_torchscript, read_checkpoint  # noqa: E402
from config import InputError  # noqa: E402
from models import QuickGELU, build, load_pretrained, weights_path  # noqa: E402
from test_models import images, randomised, same, snapshot, tiny  # noqa: E402

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64"}


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
    before = snapshot(model)
    with pytest.raises(InputError) as error:
        load_pretrained(model, source, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert same(before, model)
    return message


@pytest.fixture
def state():
    """The state dict of a tiny ViT of known weights."""
    return snapshot(randomised(tiny(), seed=5))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3},
                                  lambda s: {"module." + name: tensor for name, tensor in s.items()},
                                  lambda s: {"state_dict": {"module." + n: t for n, t in s.items()}}])
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_torch_files(tmp_path, state, wrap, suffix):
    path = str(tmp_path / f"weights.{suffix}")
    torch.save(wrap(state), path)
    model = tiny()
    report = load_pretrained(model, path)
    assert same(state, model)
    assert report == models.LoadReport(path, len(state))


@pytest.mark.parametrize("dtype", CODES)
def test_safetensors(tmp_path, state, dtype):
    if dtype == torch.int64:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        expected = {**snapshot(model), "1.num_batches_tracked": torch.tensor(7)}
    else:
        model, expected = tiny(), {name: tensor.to(dtype) for name, tensor in state.items()}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors(expected))
    report = load_pretrained(model, str(path))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32)
        assert torch.equal(tensor, expected[name].to(tensor.dtype))
    converted = [f"{len(expected)} tensors of another precision converted to float32"]
    assert list(report.notes) == (converted if dtype in (torch.float64, torch.float16, torch.bfloat16) else [])


def test_the_parameters_stay_the_same_objects(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    model = tiny()
    before = {name: id(p) for name, p in model.named_parameters()}
    load_pretrained(model, tmp_path / "w.pth")
    assert before == {name: id(p) for name, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())


def test_another_number_of_classes(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    model = tiny(classes=4)
    head = model.head.weight.clone()
    report = load_pretrained(model, str(tmp_path / "w.pth"))
    assert report.replaced == ("head.weight", "head.bias") and report.loaded == len(state) - 2
    assert "10 classes in the file, 4 in the network" in report.notes[0]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, state["norm.weight"])


@pytest.mark.parametrize("name, classifier", [("resnet18", "fc"), ("mobilenetv2_100", "classifier")])
def test_another_number_of_classes_of_a_cnn(tmp_path, name, classifier):
    torch.save(build(name, 6, width=0.1).state_dict(), tmp_path / "w.pth")
    report = load_pretrained(build(name, 3, width=0.1), str(tmp_path / "w.pth"))
    assert report.replaced == (f"{classifier}.weight", f"{classifier}.bias")


def test_a_classifier_of_another_width_is_not_another_number_of_classes(tmp_path, state):
    state["head.weight"] = torch.zeros(4, 12)
    torch.save(state, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "shape: head.weight [4, 12] (file) vs [10, 8] (network)")


def test_position_embeddings_of_another_image_size(tmp_path, state):
    """A linear ramp over the grid stays a linear ramp away from the border; the class token's row is untouched."""
    ramp = torch.arange(4.0).repeat(4)  # column index, row by row
    state["pos_embed"] = torch.cat([torch.full((1, 1, 8), 9.0), ramp[None, :, None].expand(1, 16, 8)], dim=1)
    torch.save(state, tmp_path / "w.pth")
    model = tiny(image_size=32)
    report = load_pretrained(model, str(tmp_path / "w.pth"))
    assert report.notes == ("position embeddings interpolated from 16 to 64 patches (bicubic)",)
    assert report.loaded == len(state)
    assert (model.pos_embed[0, 0] == 9).all()
    grid = model.pos_embed[0, 1:, 3].reshape(8, 8)
    torch.testing.assert_close(grid, grid[:1].expand(8, 8))  # no change from row to row
    assert abs(grid[0].mean() - 1.5) < 1e-5 and (grid[0].diff() > 0).all()
    torch.testing.assert_close(grid[0, 3:5], torch.tensor([1.25, 1.75]), atol=0.02, rtol=0)
    refused(tiny(head_dim=6), str(tmp_path / "w.pth"), "shape: pos_embed [1, 17, 8] (file) vs [1, 17, 12] (network)")


def test_counters_may_be_missing(tmp_path):
    source = randomised(build("resnet18", 3, width=0.1))
    state = {n: t for n, t in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    model = build("resnet18", 3, width=0.1)
    report = load_pretrained(model, str(tmp_path / "old.pth"))
    assert len(report.missing) == 20 and all(n.endswith("num_batches_tracked") for n in report.missing)
    assert report.loaded == len(state) and "20 num_batches_tracked" in report.notes[0]
    assert torch.equal(model.layer4[1].bn2.running_var, source.layer4[1].bn2.running_var)


def test_every_mismatch_is_listed(tmp_path, state):
    del state["norm.bias"], state["blocks.1.attn.qkv.bias"]
    state["dist_token"], state["odd\nname"] = torch.zeros(1), torch.zeros(1)
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 8)
    state["blocks.0.norm1.bias"] = torch.zeros(9)
    state["norm.weight"] = torch.ones(8, dtype=torch.int8)
    torch.save(state, tmp_path / "w.pth")
    message = refused(tiny(), str(tmp_path / "w.pth"), str(tmp_path / "w.pth"),
                      "missing: blocks.1.attn.qkv.bias, norm.bias", "unexpected: dist_token, 'odd\\nname'",
                      "shape: blocks.0.mlp.fc1.weight [5, 8] (file) vs [32, 8] (network)",
                      "shape: blocks.0.norm1.bias [9] (file) vs [8] (network)", "type: norm.weight torch.int8")
    assert message.count("shape:") == 2


def test_a_counter_that_is_not_a_whole_number(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch.save({**model.state_dict(), "1.num_batches_tracked": torch.tensor(0.5)}, tmp_path / "w.pth")
    refused(model, str(tmp_path / "w.pth"), "type: 1.num_batches_tracked torch.float32 (file) vs torch.int64")


def test_another_network_is_refused(tmp_path):
    torch.save(build("resnet18", 3, width=0.1).state_dict(), tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "missing: cls_token", "unexpected: conv1.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path, state, value):
    state["blocks.1.mlp.fc2.weight"][3, 2] = value
    torch.save(state, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "blocks.1.mlp.fc2.weight", "not finite")


def test_a_value_beyond_float32(tmp_path, state):
    state["norm.bias"] = torch.full((8,), 1e300, dtype=torch.float64)
    torch.save(state, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "norm.bias", "not finite")


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00", b"garbage" * 500, b"PK\x03\x04 not really", b"\x80\x02}q\x00(X",
                                     b"\xff" * 64, b"<!DOCTYPE html><html>404</html>"])
def test_garbage(tmp_path, suffix, content):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    refused(tiny(), str(path), str(path))


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated(tmp_path, state, suffix, keep):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        path.write_bytes(safetensors(state))
    path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    refused(tiny(), str(path), str(path))


@pytest.mark.parametrize("content", [
    struct.pack("<Q", 2 ** 63) + b"{}", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", struct.pack("<Q", 2) + b"{}" + b"\0" * 9,
    struct.pack("<Q", 100_000) + b"[" * 100_000])
def test_safetensors_headers_that_lie(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    refused(tiny(), str(path), str(path))


@pytest.mark.parametrize("field, value", [
    ("dtype", "F8_E4M3"), ("dtype", ["F32"]), ("dtype", None), ("shape", [9]), ("shape", [-8]), ("shape", [True] * 8),
    ("shape", 8), ("shape", {}), ("shape", [8.0]), ("shape", [2 ** 70]), ("shape", [1] * 50 + [8]),
    ("data_offsets", [0, 10 ** 12]), ("data_offsets", [-32, 0]), ("data_offsets", [64, 32]), ("data_offsets", [0]),
    ("data_offsets", [0.0, 32.0]), ("data_offsets", None)])
def test_safetensors_entries_that_lie(tmp_path, state, field, value):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(state, lambda header: header["norm.bias"].update({field: value})))
    refused(tiny(), str(path), str(path), "norm.bias is declared as")


def test_safetensors_data_that_no_tensor_or_two_claim(tmp_path, state):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(state) + bytes(4))
    refused(tiny(), str(path), str(path), "4 bytes belong to no tensor")
    path.write_bytes(safetensors(state, lambda header: header["norm.bias"].update(data_offsets=[0, 32])))
    refused(tiny(), str(path), str(path), "overlap")


def test_safetensors_scalar_whose_shape_is_no_list(tmp_path, state):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors({**state, "one": torch.tensor(1.0)}, lambda header: header["one"].update(shape={})))
    refused(tiny(), str(path), str(path), "one is declared as")


def test_safetensors_empty_tensor_of_absurd_sides(tmp_path, state):
    def tamper(header):
        header["extra"] = {"dtype": "F32", "shape": [0] + [4000] * 7, "data_offsets": [0, 0]}
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(state, tamper))
    refused(tiny(), str(path), "extra")


class Evil:
    """Unpickled, it would make the folder that it names."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, state, zipped):
    path, mark = tmp_path / "w.pth", tmp_path / "executed"
    if zipped:
        torch.save({**state, "evil": Evil(str(mark))}, path)
    else:
        path.write_bytes(pickle.dumps({"evil": Evil(str(mark))}, protocol=2))
    refused(tiny(), str(path), str(path), "besides tensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(str(mark))))
    assert mark.exists()  # the trap is a working one


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("content, word", [({}, "no state dict"), ([1, 2], "no state dict"),
                                           ({"a": 1}, "'a' is a int"), ({1: torch.zeros(1)}, "1 is a Tensor"),
                                           ({"a": torch.zeros(2).to_sparse()}, "plain tensor")])
def test_files_without_a_state_dict(tmp_path, content, word):
    torch.save(content, tmp_path / "w.pth")
    refused(tiny(), str(tmp_path / "w.pth"), "w.pth", word)


def test_files_that_do_not_exist(tmp_path):
    refused(tiny(), str(tmp_path / "no.pth"), "no.pth", "no such file")
    refused(tiny(), str(tmp_path), "no such file")


def test_read_checkpoint_gives_the_files_own_names(tmp_path):
    torch.save({"model": {"features.0.0.weight": torch.ones(2)}}, tmp_path / "w.pth")
    assert list(read_checkpoint(str(tmp_path / "w.pth"))) == ["features.0.0.weight"]


def test_file_urls_go_through_the_weights_folder(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    url, kept = (tmp_path / "w.pth").as_uri(), tmp_path / "deep" / "weights"
    model = tiny()
    report = load_pretrained(model, url, weights_dir=str(kept))
    assert same(state, model) and report.source == url
    assert [os.path.join(str(kept), name) for name in os.listdir(kept)] == [weights_path(url, str(kept))]
    state["norm.bias"] += 1
    torch.save(state, tmp_path / "w.pth")  # the URL's file changes; the copy must follow
    load_pretrained(model, url, weights_dir=str(kept))
    assert same(state, model)


def test_urls_that_fail(tmp_path):
    kept = str(tmp_path / "weights")
    refused(tiny(), "file:///nonexistent/w.pth", "file:///nonexistent/w.pth", weights_path("file:///nonexistent/w.pth",
            kept), weights_dir=kept)
    refused(tiny(), "http://127.0.0.1:9/x-0123abcd.pth", "http://127.0.0.1:9/x-0123abcd.pth",
            os.path.join(kept, "x-0123abcd.pth"), weights_dir=kept)
    assert os.listdir(kept) == []
    refused(tiny(), "ftp://host/w.pth", "ftp://host/w.pth", "http", weights_dir=kept)
    refused(tiny(), "http://host/", "http://host/", weights_dir=kept)
    refused(tiny(), "http://[host/w.pth", "http://[host/w.pth", weights_dir=kept)
    (tmp_path / "file").write_text("")
    refused(tiny(), (tmp_path / "file").as_uri(), weights_dir=str(tmp_path / "file"))


def test_the_hash_in_a_urls_name_is_checked(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    good, bad, kept = tmp_path / f"w-{digest[:8]}.pth", tmp_path / "w-00000000.pth", tmp_path / "weights"
    for path in (good, bad):
        path.write_bytes((tmp_path / "w.pth").read_bytes())
    load_pretrained(tiny(), good.as_uri(), weights_dir=str(kept))
    refused(tiny(), bad.as_uri(), "SHA-256", "00000000", weights_dir=str(kept))
    assert os.listdir(kept) == [good.name]


def test_a_file_put_by_hand_is_used_without_a_network(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for url in (f"http://127.0.0.1:9/w-{digest[:8]}.pth", "http://127.0.0.1:9/a/model.pth?version=2"):
        path = weights_path(url, str(tmp_path))
        with open(path, "wb") as file:
            file.write(content)
        model = tiny()
        load_pretrained(model, url, weights_dir=str(tmp_path))
        assert same(state, model)
    wrong = "http://127.0.0.1:9/w-00000000.pth"
    with open(weights_path(wrong, str(tmp_path)), "wb") as file:
        file.write(content)
    refused(tiny(), wrong, "w-00000000.pth", "SHA-256", weights_dir=str(tmp_path))


def test_names_in_the_weights_folder():
    assert weights_path(models.PRETRAINED["resnet18"], "weights") == os.path.join("weights", "resnet18-f37072fd.pth")
    clip = models.PRETRAINED["vit_base_patch32_clip_224"]
    assert weights_path(clip, "w") == os.path.join("w", "vit_base_patch32_clip_224.laion2b_ft_in12k_in1k.safetensors")
    assert weights_path("http://h/a/m.pt") != weights_path("http://h/b/m.pt") != weights_path("http://h/b/m.pt?v=2")
    assert os.path.dirname(weights_path("http://h/%2e%2e/..%2fx.pt", "w")) == "w"
    assert len(os.path.basename(weights_path(f"http://h/{'x' * 300}.pth"))) <= 255


def test_published_files_are_known_by_name_and_hash():
    for name, known in models.PRETRAINED.items():
        assert known.url.startswith("https://") and known.megabytes > 10 and known.size is None
        assert os.path.splitext(known.file)[1] in (".pth", ".safetensors")
        assert known.sha256 == ("" if "clip" in name else re.search("-([0-9a-f]{8}).pth$", known.url)[1])
    assert len({known.file for known in models.PRETRAINED.values()}) == 7


def test_without_a_network_the_line_says_what_to_do(tmp_path, monkeypatch):
    known = models.Published("http://127.0.0.1:9/model.safetensors", "short.safetensors", 353)
    message = refused(tiny(), known, known.url, os.path.join(str(tmp_path), "short.safetensors"), "about 353 MB",
                      "--weights none", weights_dir=str(tmp_path))
    assert message.startswith("cannot fetch")
    monkeypatch.setitem(models.PRETRAINED, "resnet18", known)
    refused(tiny(), known.url, "short.safetensors", weights_dir=str(tmp_path))  # the URL alone names the same file


def test_a_kept_file_of_another_size_is_not_used(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    size = (tmp_path / "w.pth").stat().st_size
    load_pretrained(tiny(), models.Published("http://127.0.0.1:9/w.pth", "w.pth", 1, size=size), str(tmp_path))
    refused(tiny(), models.Published("http://127.0.0.1:9/w.pth", "w.pth", 1, size=size + 1), f"has {size} bytes",
            f"published file {size + 1}", weights_dir=str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------
# The layouts that are published, written by the test, against a forward pass of its own


def layer_norm(x, state, name, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def quick(x):
    return x / (1 + torch.exp(-1.702 * x))


def exact(x):
    return x * 0.5 * (1 + torch.erf(x / 2 ** 0.5))


def openai_tower(width=8, depth=2, patch=4, side=16, projected=6, seed=3):
    """The state dict of CLIP's image tower as OpenAI names it, of drawn weights. Their networks take the number of
    heads from the width (64 channels each); here it is the caller's."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    state = {"class_embedding": 0.3 * draw(width), "positional_embedding": 0.3 * draw(1 + (side // patch) ** 2, width),
             "proj": draw(width, projected), "conv1.weight": draw(width, 3, patch, patch) / (3 * patch * patch) ** 0.5}
    blocks = [f"transformer.resblocks.{i}." for i in range(depth)]
    for name in ["ln_pre", "ln_post"] + [block + norm for block in blocks for norm in ("ln_1", "ln_2")]:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.3 * draw(width).tanh(), 0.3 * draw(width)
    for block in blocks:
        state[block + "attn.in_proj_weight"] = draw(3 * width, width) / width ** 0.5
        state[block + "attn.in_proj_bias"] = 0.3 * draw(3 * width)
        for name, rows, columns in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width),
                                    ("mlp.c_proj", width, 4 * width)):
            state[f"{block}{name}.weight"] = draw(rows, columns) / columns ** 0.5
            state[f"{block}{name}.bias"] = 0.3 * draw(rows)
    return state


def text_tower(width=8):
    """What else CLIP's files hold: the text tower, with names that look like the image tower's."""
    return {"positional_embedding": torch.randn(7, width), "text_projection": torch.randn(width, 6),
            "logit_scale": torch.tensor(2.6), "token_embedding.weight": torch.randn(11, width),
            "transformer.resblocks.0.attn.in_proj_weight": torch.randn(3 * width, width),
            "transformer.resblocks.0.ln_1.weight": torch.randn(width), "ln_final.weight": torch.randn(width)}


def openai_features(state, x, heads, act):
    """The normalised class token of OpenAI's image tower, from its definition, through torch's own attention."""
    patch, width = state["conv1.weight"].shape[-1], state["conv1.weight"].shape[0]
    x = F.conv2d(x, state["conv1.weight"], stride=patch).flatten(2).permute(0, 2, 1)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, width), x], dim=1) + state["positional_embedding"]
    x = layer_norm(x, state, "ln_pre", 1e-5)
    depth = sum(name.endswith("in_proj_weight") for name in state)
    for block in (f"transformer.resblocks.{i}" for i in range(depth)):
        y = layer_norm(x, state, f"{block}.ln_1", 1e-5).transpose(0, 1)  # [T, B, C], as CLIP feeds it
        x = x + F.multi_head_attention_forward(
            y, y, y, width, heads, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"], None,
            None, False, 0.0, state[f"{block}.attn.out_proj.weight"], state[f"{block}.attn.out_proj.bias"],
            need_weights=False)[0].transpose(0, 1)
        y = layer_norm(x, state, f"{block}.ln_2", 1e-5)
        y = act(F.linear(y, state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"]))
        x = x + F.linear(y, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
    return layer_norm(x[:, 0], state, "ln_post", 1e-5)


def equals_openai(model, state, act, side=16, heads=2):
    """Whether a network's logits are its classifier on the features of OpenAI's definition."""
    x = images(3, side, seed=8)
    with torch.no_grad():
        model.head.weight.copy_(images(1, 64, seed=9).flatten()[:model.head.weight.numel()].view_as(model.head.weight))
        expected = model.head(openai_features({n: t.float() for n, t in state.items()}, x, heads, act))
        assert expected.std() > 0.05
        return (model.eval()(x) - expected).abs().max() < 1e-4


class Mlp(nn.Module):
    """One block's pieces under OpenAI's names, for torch.jit.script."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class Resblock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.resblocks = nn.Sequential(*[Resblock(width, heads) for _ in range(depth)])

    def forward(self, x):
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, patch: int, side: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (side // patch) ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, depth)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, 6))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        token = self.class_embedding.expand(x.shape[0], 1, x.shape[2])
        x = self.ln_pre(torch.cat([token, x], dim=1) + self.positional_embedding).permute(1, 0, 2)
        return self.ln_post(self.transformer(x).permute(1, 0, 2)[:, 0]) @ self.proj


class Clip(nn.Module):
    """An image tower beside what belongs to the text tower; the attributes are of every kind that TorchScript keeps."""

    def __init__(self, width: int, heads: int, depth: int, patch: int, side: int):
        super().__init__()
        self.visual = Visual(width, heads, depth, patch, side)
        self.transformer = Transformer(width, heads, 1)
        self.token_embedding = nn.Embedding(11, width)
        self.positional_embedding = nn.Parameter(torch.zeros(7, width))
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.sizes = [width, heads]
        self.names = {"a": 1.5}
        self.label = "tiny"

    def forward(self, x):
        return self.visual(x) * self.logit_scale


def scripted_clip(path, state, heads=2, half=True):
    """Save a TorchScript archive of a CLIP with the image tower ``state``; returns the scripted network."""
    width, patch = state["conv1.weight"].shape[0], state["conv1.weight"].shape[-1]
    side = patch * round((len(state["positional_embedding"]) - 1) ** 0.5)
    depth = sum(name.endswith("in_proj_weight") for name in state)
    network = Clip(width, heads, depth, patch, side)
    network.visual.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the files that people have are not
        script = torch.jit.script(network.half() if half else network)
        torch.jit.save(script, str(path))
    return script


def clip_vit(classes=5, **settings):
    return tiny(classes, clip=True, **settings)


@pytest.mark.parametrize("half", [False, True])
def test_openais_torchscript_archive(tmp_path, half):
    """Read as a zip of tensors: logits as OpenAI's definition with QuickGELU, and as the scripted network's own."""
    tower = openai_tower()
    script = scripted_clip(tmp_path / "ViT-B-32.pt", tower, half=half)
    model = clip_vit()
    head = model.head.weight.clone()
    report = load_pretrained(model, tmp_path / "ViT-B-32.pt")
    assert report.loaded == len(model.state_dict()) - 2 and report.replaced == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, head) and {p.dtype for p in model.parameters()} == {torch.float32}
    stored = {name: tensor.half() for name, tensor in tower.items()} if half else tower
    assert equals_openai(model, stored, quick) and not equals_openai(model, stored, exact)
    if not half:
        x = images(3, 16)
        with torch.no_grad():
            model.head = nn.Linear(8, 6)
            model.head.weight.copy_(tower["proj"].T)
            model.head.bias.zero_()
            torch.testing.assert_close(model(x), script(x), rtol=1e-4, atol=1e-4)
    notes = " | ".join(report.notes)
    for words in ("activation QuickGELU: a TorchScript archive", "projection to the space shared with texts [8, 6]",
                  "tensors besides the image tower", "the file has none"):
        assert words in notes
    assert ("converted to float32" in notes) == half
    assert all(isinstance(block.mlp.act, QuickGELU) for block in model.blocks)


def test_a_torchscript_archive_gives_the_scripted_networks_state_dict(tmp_path):
    script = scripted_clip(tmp_path / "c.pt", openai_tower())
    found, expected = read_checkpoint(str(tmp_path / "c.pt")), script.state_dict()
    assert found.keys() == expected.keys() and len(found) > 40
    assert all(found[name].dtype == torch.float16 and torch.equal(found[name], expected[name]) for name in expected)
    assert is_torchscript(tmp_path / "c.pt")
    torch.save(expected, tmp_path / "d.pt")
    assert not is_torchscript(tmp_path / "d.pt") and not is_torchscript(tmp_path / "none.pt")


def test_the_code_of_a_torchscript_archive_is_not_even_read(tmp_path):
    scripted_clip(tmp_path / "c.pt", openai_tower())
    with zipfile.ZipFile(tmp_path / "c.pt") as old, zipfile.ZipFile(tmp_path / "d.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, b"raise SystemExit" if "/code/" in name or "constants" in name else content)
    model = clip_vit()
    load_pretrained(model, tmp_path / "d.pt")
    assert equals_openai(model, {n: t.half() for n, t in openai_tower().items()}, quick)


@pytest.mark.parametrize("asked, act", [(None, exact), (False, exact), (True, quick)])
@pytest.mark.parametrize("prefix, wrap", [("visual.", True), ("visual.", False), ("", False)])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_state_dicts_with_openais_names(tmp_path, suffix, prefix, wrap, asked, act):
    """open_clip's files and OpenAI's image tower; the text tower's look-alike names must not get in."""
    tower = openai_tower()
    state = {prefix + name: tensor for name, tensor in tower.items()}
    if prefix:
        state = {**text_tower(), **state}
    path = tmp_path / f"open_clip.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": {"module." + n: t for n, t in state.items()}, "epoch": 32} if wrap else state, path)
    else:
        path.write_bytes(safetensors(state))
    model = clip_vit()
    report = load_pretrained(model, path, quick_gelu=asked)
    assert equals_openai(model, tower, act)
    notes = " | ".join(report.notes)
    assert ("assumed" in notes and "quick_gelu" in notes) == (asked is None)
    assert ("7 tensors besides the image tower" in notes) == bool(prefix)
    assert report.replaced == ("head.weight", "head.bias")


def test_the_networks_own_activation_stays_unless_asked(tmp_path):
    torch.save(openai_tower(), tmp_path / "w.pt")
    model = clip_vit(quick_gelu=True)
    assert "activation QuickGELU assumed" in load_pretrained(model, tmp_path / "w.pt").notes[-1]
    assert equals_openai(model, openai_tower(), quick)
    report = load_pretrained(model, tmp_path / "w.pt", quick_gelu=False)
    assert report.notes[-1] == "activation GELU, as asked" and equals_openai(model, openai_tower(), exact)
    scripted_clip(tmp_path / "c.pt", openai_tower(), half=False)
    load_pretrained(model, tmp_path / "c.pt", quick_gelu=False)
    assert equals_openai(model, openai_tower(), exact)


def test_an_activation_for_a_network_without_one(tmp_path):
    resnet = build("resnet18", 3, width=0.1)
    torch.save(resnet.state_dict(), tmp_path / "w.pth")
    refused(resnet, tmp_path / "w.pth", "quick_gelu", quick_gelu=False)


def test_nothing_changes_when_a_clip_file_does_not_fit(tmp_path):
    """Not even the activation; and every name is listed, in ours where it has one."""
    tower = openai_tower()
    del tower["ln_post.bias"], tower["transformer.resblocks.1.mlp.c_fc.weight"]
    tower["transformer.resblocks.0.attn.bias_k"] = torch.zeros(1)
    tower["conv1.weight"] = tower["conv1.weight"][:, :1]
    torch.save(tower, tmp_path / "w.pt")
    model = clip_vit()
    refused(model, tmp_path / "w.pt", "missing: blocks.1.mlp.fc1.weight, norm.bias",
            "unexpected: transformer.resblocks.0.attn.bias_k",
            "shape: patch_embed.proj.weight [8, 1, 4, 4] (file) vs [8, 3, 4, 4]", quick_gelu=True)
    assert isinstance(model.blocks[0].mlp.act, nn.GELU)
    refused(clip_vit(heads=3), tmp_path / "w.pt", "shape: cls_token [1, 1, 8] (file) vs [1, 1, 12] (network)")
    refused(clip_vit(depth=1), tmp_path / "w.pt", "unexpected: blocks.1.")


def test_openais_positions_for_another_image_size(tmp_path):
    tower = openai_tower()
    scripted_clip(tmp_path / "c.pt", tower, half=True)  # interpolated in float32: halves may not be
    model = clip_vit(image_size=32)
    report = load_pretrained(model, tmp_path / "c.pt")
    assert "position embeddings interpolated from 16 to 64 patches (bicubic)" in report.notes
    assert torch.equal(model.pos_embed[0, 0], tower["positional_embedding"][0].half().float())
    inner = tower["positional_embedding"][1:].reshape(4, 4, 8).mean((0, 1))
    torch.testing.assert_close(model.pos_embed[0, 1:].mean(0), inner, atol=0.05, rtol=0)


def test_the_full_clip_network_from_its_archive(tmp_path):
    """The real widths: 768 channels, 12 heads, 12 blocks, patches of 32 pixels."""
    tower = openai_tower(768, 12, 32, 64, 512)
    torch.save({"visual." + name: tensor.half() for name, tensor in tower.items()}, tmp_path / "w.pt")
    model = build("vit_base_patch32_clip_224", 10, image_size=64)
    load_pretrained(model, tmp_path / "w.pt", quick_gelu=True)
    assert equals_openai(model, {n: t.half() for n, t in tower.items()}, quick, side=64, heads=12)


def deit_forward(state, x, heads):
    """DeiT step by step from a state dict of Meta's (and timm's) names."""
    patch, width = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], patch).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), 1, width), x], dim=1) + state["pos_embed"]
    for block in (f"blocks.{i}" for i in range(sum(name.endswith("qkv.weight") for name in state))):
        linear = lambda x, name: x @ state[f"{block}.{name}.weight"].T + state[f"{block}.{name}.bias"]
        parts = linear(layer_norm(x, state, f"{block}.norm1", 1e-6), "attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        mixed = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), "attn.proj")
        x = x + linear(exact(linear(layer_norm(x, state, f"{block}.norm2", 1e-6), "mlp.fc1")), "mlp.fc2")
    return layer_norm(x, state, "norm", 1e-6)[:, 0] @ state["head.weight"].T + state["head.bias"]


def deit_state(width, side, classes, depth=12, seed=0):
    """DeiT's names and shapes, written down here: patches of 16 pixels, four times ``width`` in the middle."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + (side // 16) ** 2, width),
              "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{i}.{name}.bias"] = (rows * width,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (width,)
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "head.weight": (classes, width), "head.bias": (classes,)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
        elif name.endswith("weight"):
            state[name] *= 10 / state[name][0].numel() ** 0.5
    return state


@pytest.mark.parametrize("file, name, width, heads", [
    *((file, "deit_small_patch16_224", 384, 6) for file in ("meta", "meta-legacy", "timm")),
    *((file, "deit_base_patch16_224", 768, 12) for file in ("meta", "timm"))])
def test_deit(tmp_path, file, name, width, heads):
    """Meta's {"model": …}, by either of torch's formats, and timm's safetensors."""
    state = deit_state(width, 32, 7)
    if file == "timm":
        path = tmp_path / "model.safetensors"
        path.write_bytes(safetensors(state))
    else:
        path = tmp_path / f"{name}.pth"
        torch.save({"model": collections.OrderedDict(state)}, path,
                   _use_new_zipfile_serialization=file == "meta")
    model = build(name, 7, image_size=32).eval()
    report = load_pretrained(model, path)
    assert report == models.LoadReport(str(path), len(state)) and len(state) == 152
    x = images(2, 32)
    with torch.no_grad():
        expected = deit_forward(state, x, heads)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


TIMM_STEM = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2",
             "classifier.1": "classifier"}


def timm_mobilenet(state):
    """torchvision's MobileNetV2 under timm's names, by counting modules: a table apart from the code's own."""
    stages = [1, 2, 3, 4, 3, 3, 1]
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(stages) for i in range(count)]
    renamed = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module in TIMM_STEM:
            new = TIMM_STEM[module]
        else:
            _, index, _, rest = module.split(".", 3)
            order = {"0.0": 0, "0.1": 1, "1": 2, "2": 3} if index == "1" else \
                {"0.0": 0, "0.1": 1, "1.0": 2, "1.1": 3, "2": 4, "3": 5}
            names = ["conv_dw", "bn1", "conv_pw", "bn2"] if index == "1" else \
                ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            new = f"{places[int(index) - 1]}.{names[order[rest]]}"
        renamed[f"{new}.{leaf}"] = tensor
    return renamed


@pytest.mark.parametrize("name, theirs", [("resnet18", "resnet18"), ("resnet50", "resnet50"),
                                          ("mobilenetv2_100", "mobilenet_v2"), ("mobilenetv2_100", "timm")])
@pytest.mark.parametrize("legacy", [False, True])
def test_cnns_from_their_files(tmp_path, name, theirs, legacy):
    reference = randomised(getattr(torchvision.models, theirs if theirs != "timm" else "mobilenet_v2")(num_classes=9))
    state = reference.state_dict()
    if theirs == "timm":
        state = timm_mobilenet(state)
        assert len(state) == len(reference.state_dict()) and "blocks.6.0.conv_pwl.weight" in state
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    model = build(name, 9).eval()
    assert load_pretrained(model, tmp_path / "w.pth").loaded == len(state)
    x = images(2, 64)
    with torch.no_grad():
        expected = reference(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# What torch.save writes, read without torch.load


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_kind_of_tensor(tmp_path, legacy, protocol):
    shared = torch.arange(24.0)
    content = {"transposed": shared.view(4, 6).T, "part": shared[5:9], "whole": shared.view(2, 3, 4),
               "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "parameter": nn.Parameter(torch.ones(2)),
               **{str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in checkpoints.STORAGES.values()}}
    path = tmp_path / "w.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    found = read_checkpoint(str(path))
    assert list(found) == list(content)
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert found["transposed"].stride() == (1, 6)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_beside_the_state_dict_is_passed_over(tmp_path, state, legacy):
    parameter = nn.Parameter(torch.ones(5))
    optimiser = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimiser.step()
    torch.save({"optimizer": optimiser.state_dict(), "epoch": 3, "dtype": torch.float16, "size": torch.Size([2, 3]),
                "state_dict": state, "last": torch.ones(7)}, tmp_path / "w.pth",
               _use_new_zipfile_serialization=not legacy)
    model = tiny()
    load_pretrained(model, tmp_path / "w.pth")
    assert same(state, model)


@pytest.mark.parametrize("content, word", [(nn.Linear(2, 2), "Linear"), ({"a": 1 + 2j}, "complex"),
                                           ({"a": torch.zeros(2, dtype=torch.complex64)}, "ComplexFloatStorage")])
def test_objects_are_named_and_refused(tmp_path, content, word):
    torch.save(content, tmp_path / "w.pth")
    refused(tiny(), tmp_path / "w.pth", "besides tensors", word)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The zip at ``path`` again with ``change(name, content)`` for its contents, and CRCs that fit."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, change(name, content))


def test_a_storage_shorter_than_it_claims(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    rewritten(tmp_path / "w.pth", lambda name, content: content[:-4] if name.endswith("/data/3") else content)
    refused(tiny(), tmp_path / "w.pth", "storage 3 has")


def test_compressed_storages(tmp_path, state):
    """Not of torch.save, and they can claim more memory than the file has bytes."""
    torch.save(state, tmp_path / "w.pth")
    rewritten(tmp_path / "w.pth", lambda name, content: content, zipfile.ZIP_DEFLATED)
    refused(tiny(), tmp_path / "w.pth", "is compressed")


def test_one_record_read_as_several_storages(tmp_path):
    """Each reading of the same bytes as another type takes memory of its own: no more of it than the file has."""
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(5000), "b": torch.zeros(5000, dtype=torch.int32)}, path)
    rewritten(path, lambda name, content: content.replace(b"X\x01\0\0\x001", b"X\x01\0\0\x000")
              if name.endswith("data.pkl") else b"" if name.endswith("/data/1") else content)
    refused(tiny(), path, "data/0 claims 20000 bytes")


def test_bytes_that_changed_in_a_torch_file_are_noticed(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    at = content.index(bytes(state["pos_embed"].numpy().tobytes()[:16]))
    content[at] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    refused(tiny(), tmp_path / "w.pth", "CRC")


def pickled(*steps):
    return b"\x80\x02" + b"".join(steps) + b"."


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"


@pytest.mark.parametrize("tensor", [
    b"K\x00K\x05\x85K\x01\x85",                         # five of four numbers
    b"K\x01K\x04\x85K\x01\x85",                         # four from the second on
    b"K\x00K\x03\x85K\x02\x85",                         # every other one, three times
    b"K\x00J\xff\xff\xff\xff\x85K\x01\x85",             # a side of -1
    b"K\x00K\x02\x85J\xff\xff\xff\xff\x85",             # backwards
    b"K\x00K\x02\x85)",                                 # as many strides as sides
    b"K\x00J\x00\x00\x00\x7f\x85K\x00\x85",             # a number repeated two thousand million times
    b"K\x00(" + b"K\x01" * 9 + b"t(" + b"K\x01" * 9 + b"t",
    b"K\x00K\x00\x8a\x09\0\0\0\0\0\0\0\0\x01\x86K\x01K\x01\x86",
    b"NK\x04\x85K\x01\x85", b"K\x00G?\xf0\0\0\0\0\0\0\x85K\x01\x85"])
def test_tensors_that_lead_out_of_their_storage(tmp_path, tensor):
    path = tmp_path / "w.pth"
    torch.save({"x": torch.ones(4)}, path)
    call = lambda tensor: b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + tensor + b"\x89}tR"
    made = lambda tensor: pickled(b"}X\x01\0\0\0x", call(tensor), b"s")
    rewritten(path, lambda name, content: made(b"K\x00K\x04\x85K\x01\x85") if name.endswith("data.pkl") else content)
    assert torch.equal(read_checkpoint(str(path))["x"], torch.ones(4))  # in order, it is read
    rewritten(path, lambda name, content: made(tensor) if name.endswith("data.pkl") else content)
    refused(tiny(), path, "damaged")


@pytest.mark.parametrize("steps", [
    b"cposix\nsystem\nX\x04\0\0\0true\x85R", b"X\x05\0\0\0posixX\x06\0\0\0system\x93X\x04\0\0\0true\x85R",
    b"(cos\nsystem\nX\x04\0\0\0trueo", b"(X\x04\0\0\0trueios\nsystem\n", b"\x82\x01", b"cbuiltins\neval\n",
    b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch\n_inductor\n", b"c__torch__x\nA\n"])
def test_names_that_are_not_a_tensors(tmp_path, steps):
    with pytest.raises((checkpoints.Forbidden, ValueError)):
        checkpoints.unpickle(pickled(steps))


@pytest.mark.parametrize("steps", [
    b"", b"a", b"u", b"R", b"h\x00", b"K", b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"T\xff\xff\xff\xff", b"NNa",
    b"]N]su", b"}])s", b"ccollections\nOrderedDict\n])\x85R", b"ccollections\nOrderedDict\nNR", b"Nb", b"N}b", b"NQ",
    b"(NNNNNtQ", b"\x85", b"c" + b"x" * 2000 + b"\ny\n", b"(", b"t", b"}(K\x01u", b"\x80"])
def test_pickles_that_make_no_sense(steps):
    assert checkpoints.unpickle(pickled(b"N")) == (None, 4)
    with pytest.raises((ValueError, IndexError, KeyError, TypeError, struct.error)):
        checkpoints.unpickle(pickled(steps))


def test_pickles_that_would_never_end(monkeypatch):
    """A key within itself a hundred levels deep; a TorchScript object that is its own attribute; too many steps."""
    with pytest.raises(ValueError, match="tuple as a key"):
        checkpoints.unpickle(pickled(b"}", b")" + b"q\x00h\x00\x86" * 100, b"Ns"))
    loop = pickled(b"c__torch__\nA\n)\x81q\x00}(X\x01\0\0\0ah\x00X\x01\0\0\0bh\x00ub")
    root, _ = checkpoints.unpickle(loop)
    with pytest.raises(ValueError):
        checkpoints._attributes("w.pt", root)
    monkeypatch.setattr(checkpoints, "MAX_STEPS", 100)
    with pytest.raises(ValueError, match="100 steps"):
        checkpoints.unpickle(pickled(b"N0" * 60))
