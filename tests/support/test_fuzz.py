"""Damaged and hostile files of every kind that the program reads: read to something sane, or refused in one line.

Files are made here from seeds and read by a worker process with one GB of address space above what its libraries take
and ten seconds per file; a crash, a hang, a traceback or another exception than InputError fails the test. Eight files
of each kind, or 1,000 with HIRELC_LONG=1. The worker is this same file, run as a program, which also prints the table::

    python tests/test_fuzz.py --count 1000 [--kinds policy "images: png"]
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import http.server
import io
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import types
import zipfile
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

LONG = os.environ.get("HIRELC_LONG") == "1"
COUNT = 1000 if LONG else 8        # of each kind
SECONDS, MEMORY = 10, 1 << 30
SIDE, CACHED = 8, 1500             # of the cache of decoded images: pixels and images


def network():
    import models
    return models.VisionTransformer(5, image_size=16, patch=4, heads=2, head_dim=4, depth=2, clip=True)


# ---------------------------------------------------------------------------------------------------------------
# The worker: a reader per kind of file. ``home`` holds the whole files; a reader returns a line where a file is not
# refused but made anew, None where it was read.


def read_image(path, home, folder):
    from support.images import decode
    pixels = decode([path], 32)[0]
    assert tuple(pixels.shape) == (1, 3, 32, 32) and str(pixels.dtype).endswith("uint8")


def read_packed(path, home, folder):
    from deploy import pack
    import torch
    state = pack.load(path, model=network()).state_dict()
    whole = pack.state(pack.read(home / "packed.pt"))
    assert state.keys() == whole.keys()
    assert "-crafted-" in path.name or all(torch.equal(state[name], whole[name]) for name in whole)
    assert len(pack.info(pack.read(path))) < 10_000


def read_weights(path, home, folder):
    import torch
    from models import load_pretrained
    model = network()
    report = load_pretrained(model, str(path))
    assert report.loaded >= len(model.state_dict()) - 2
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    with torch.no_grad():
        assert model.eval()(torch.ones(1, 3, 16, 16)).shape == (1, 5)


def read_policy(path, home, folder):
    from support import policies
    from config import Config, override
    from models import find_blocks
    limits = {"compress.qtype": "any", "compress.granularity": "any"}
    blocks = find_blocks(network())
    chosen, budgets, notes = policies.read(path).fit(blocks, override(Config(), limits))
    said = json.loads(path.read_bytes())["blocks"]
    kernels = {kernel["name"]: kernel for block in said for kernel in block["kernels"]}
    for block, config in zip(blocks, chosen.blocks, strict=True):
        for name, kernel in zip(block.kernels, config.kernels, strict=True):
            assert {**kernels[name], **vars(kernel)} == kernels[name]
            assert kernel.bits in (3, 4, 5, 6, 7, 8, 32) and 0.4 - 1e-6 <= kernel.keep <= 1
    assert len(budgets) == len(blocks) and all(0 < b.target <= 1 and b.min_bits >= 2 for b in budgets)


def read_settings(path, home, folder):
    from config import Config, flatten
    from support.runs import check_settings
    shutil.copy(path, folder / "config.json")
    check_settings(folder, Config())
    said, own = json.loads(path.read_bytes())["settings"], flatten(Config())
    places = {"out", "policy", "data.dir", "data.cache", "data.workers", "model.weights_dir"}
    for key in own.keys() - places:
        value = said.get(key, own[key])
        assert value == own[key] or str(value).strip().lower() == str(own[key]).lower(), key


def read_result(path, home, folder):
    from evidence.report import read_results, results_table
    (folder / "run").mkdir()
    shutil.copy(path, folder / "run" / "result.json")
    results = read_results(folder)
    assert len(results) == 1
    for text in (results_table(results), results_table(results, markdown=True)):
        assert len(text) < 100_000 and text.replace("\n", "").isprintable()


def read_archive(path, home, folder):
    from support import images as sources
    shutil.copy(path, folder / "tiny-imagenet-200.zip")
    tree = folder / "tiny-imagenet-200"
    try:
        sources._download_tiny_imagenet(types.SimpleNamespace(dir=folder), tree, sources.silent)
    finally:
        found = [entry for entry in folder.rglob("*") if not entry.is_dir()]
        assert all(tree in entry.parents and not entry.is_symlink() for entry in found if entry.suffix != ".zip")
        assert sum(entry.stat().st_size for entry in found) < 200 * path.stat().st_size + (1 << 20)
        assert all(entry.name in ("tiny-imagenet-200.zip", tree.name) for entry in folder.iterdir())
    with zipfile.ZipFile(home / "images.zip") as whole:
        contents = {whole.read(name) for name in whole.namelist()} | {b"n01\n"}     # of a member there twice
    assert all(entry.read_bytes() in contents for entry in tree.rglob("*") if not entry.is_dir())


def small_cifar(home):
    """torchvision's reader with the checksums of the whole archive made here, and no server to get another from."""
    import torchvision

    def md5(name):
        return hashlib.md5((home.parent / "cifar" / "batches" / name).read_bytes()).hexdigest()

    class Small(torchvision.datasets.CIFAR10):
        base_folder, filename, url = "batches", "small.tar", "http://127.0.0.1:1/small.tar"
        tgz_md5 = hashlib.md5((home / "small.tar").read_bytes()).hexdigest()
        train_list, test_list = [["data_batch", md5("data_batch")]], [["test_batch", md5("test_batch")]]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")}
    return Small


def read_cifar(path, home, folder):
    from support import images as sources
    if path.name.endswith("small.tar"):
        shutil.copy(path, folder / "small.tar")
    else:
        shutil.copytree(home.parent / "cifar" / "batches", folder / "batches")
        shutil.copy(path, folder / "batches" / "data_batch")
    with contextlib.redirect_stdout(io.StringIO()):
        stored = sources._open_cifar(small_cifar(home), types.SimpleNamespace(name="small.tar", dir=str(folder)), True,
                                     sources.silent)
    assert stored.data.shape == (20, 32, 32, 3) and stored.data.tobytes() == bytes(range(256)) * 240


def read_lists(path, home, folder):
    from support import images as sources
    from config import Config, Data
    tree = folder / "tiny-imagenet-200"
    shutil.copytree(home.parent / "tree", tree)
    name = path.name.rpartition("-")[2]
    shutil.copy(path, tree / name if name == "wnids.txt" else tree / "val" / name)
    train, test, names, _ = sources.read(Data(name="tiny-imagenet", dir=str(folder), cache=False), sources.silent)
    for part in (train, test):
        assert len(part.labels) and part.pixels.shape == (len(part.labels), 3, 64, 64)
        assert 0 <= part.labels.min() <= part.labels.max() < len(names) <= 2


def cached_images():
    """(pixels, flags, reasons) that the whole cache holds."""
    import numpy as np
    draw = np.random.RandomState(0)
    flags = np.zeros(CACHED, np.uint8)
    flags[[3, 1100]] = 4
    return draw.randint(0, 256, (CACHED - 2, 3, SIDE, SIDE), np.uint8), flags, {3: "broken", 1100: "cut"}


def read_cache(path, home, folder):
    from support import images as sources
    notes, (pixels, flags, reasons) = [], cached_images()
    for count in (CACHED, 1200):
        found = sources._open_cache(path, "0123456789abcdef", SIDE, count, notes)
        if found is not None:
            assert (found[0] == pixels[:count - 2]).all() and len(found[0]) == count - 2
            assert (found[1] == flags[:count]).all() and found[2].keys() == reasons.keys()
    if notes:
        assert path.name in notes[0]
        return notes[0]
    return None if found is not None else f"{path.name} covers fewer images"


def read_checked(path, home, folder):
    from support import images as sources
    listing = sources.Listing(home.parent / "listed", ["a.png", "b.png", "c.png"], [0, 0, 0])
    target = folder / sources.CACHE / f"some-{sources._key(listing, 0)}.json"
    target.parent.mkdir()
    shutil.copy(path, target)
    inode = target.stat().st_ino
    flags, known = sources._verified(types.SimpleNamespace(dir=folder, cache=True, name="some"), "some", listing, 3,
                                     "checking", sources.silent, [])
    assert flags.tolist() == [0, 4, 0] and known.keys() == {1}
    return None if target.stat().st_ino == inode else f"{path.name} is made anew"


def read_origin(path, home, folder):
    from support import files
    content = (home.parent / "served").read_bytes()
    (folder / "file.part").write_bytes(content[:1000])
    shutil.copy(path, folder / "file.part.json")
    seen = []
    files.fetch(json.loads((home / "origin.json").read_bytes())["url"], folder / "file", lambda *s: seen.append(s[1:]))
    assert (folder / "file").read_bytes() == content and os.listdir(folder) == ["file"]
    return None if seen[0] == (1000, len(content)) else f"{path.name} is not of this file, which is fetched anew"


def state_parts():
    """What the whole state holds: the values of two parts."""
    import torch
    draw = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(3, 4, generator=draw) for i in range(5)}
    weights["layer1.weight"][1], weights["layer3.weight"][:2] = 0.0, 0.0  # pruned
    weights["wide.weight"] = torch.randn(70, 70, generator=draw)  # with coded exponents
    return {"network": {**weights, "count": torch.tensor(3), "none": torch.empty(0, 2), "order": torch.arange(5)},
            "cycles": [{"acc": 51.25, "cycle": 1, "budgets": [[0.25, "auto"]]}, {1: [True, None]}, b"packed"]}


def same(a, b):
    """Whether two values are equal, tensors bit for bit."""
    import torch
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def read_state(path, home, folder):
    from support import state
    shutil.copytree(home.parent / "state", folder / "state")
    part = "manifest.json" if path.name.endswith("manifest.json") else "network-1"
    shutil.copy(path, folder / "state" / part)
    if "-crafted" in path.name:                             # its size and checksum are right
        manifest = json.loads((folder / "state" / "manifest.json").read_bytes())
        manifest["parts"]["network"] = [part, path.stat().st_size, zlib.crc32(path.read_bytes())]
        (folder / "state" / "manifest.json").write_text(json.dumps(manifest))
    progress = state.Progress(state.Store(folder / "state", {"seed": 42, "torch": "2"}))
    found, whole = progress.load(), state_parts()
    assert "-crafted" in path.name or all(same(found.get(name), whole[name]) for name in found)
    return None


READERS = {"manifest.json": read_state, "network-1": read_state, "packed.pt": read_packed, "policy.json": read_policy,
           "config.json": read_settings, "result.json": read_result, "images.zip": read_archive,
           "small.tar": read_cifar, "data_batch": read_cifar,
           "wnids.txt": read_lists, "val_annotations.txt": read_lists, "cache.u8": read_cache,
           "checked.json": read_checked, "origin.json": read_origin,
           **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".tiff", ".webp"), read_image),
           **dict.fromkeys((".pth", ".bin", ".safetensors", "script.pt", ".pt"), read_weights)}


def read(path, home):
    """Load one file as a user would; a line that says what came of it. Anything but InputError goes up."""
    from config import InputError
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    folder = pathlib.Path(tempfile.mkdtemp(dir=home.parent))
    try:
        line = READERS[suffix](path, home, folder)
        return "refused: " + line if line else "read"
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 100_000
        assert path.name in message or folder.name in message, message      # of a reader that copies it there
        return "refused: " + message
    finally:
        shutil.rmtree(folder)


def work(folder):
    """Read every file of a folder, each under the limits; one line of JSON before and after each."""
    import resource
    import torch
    torch.set_num_threads(1)
    whole = pathlib.Path(folder) / "whole"
    for example in sorted(whole.iterdir()):                 # all that is imported late, is now
        assert read(example, whole) == "read", example
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    for path in sorted((whole.parent / "bad").iterdir()):
        print(json.dumps([path.name, "started", 0]), flush=True)
        signal.alarm(SECONDS)                               # its default action ends the process, whatever it is doing
        started = time.monotonic()
        try:
            outcome = read(path, whole)
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"raised {type(error).__name__}: {error} in line {at.lineno} of {at.filename}"
        signal.alarm(0)
        print(json.dumps([path.name, outcome, time.monotonic() - started]), flush=True)


if __name__ == "__main__" and sys.argv[1:2] == ["--work"]:
    work(sys.argv[2])
    sys.exit(0)

import pytest  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------
# Whole files


class Evil:
    """Unpickled, it would make the folder that it names."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def checkpoints(folder):
    """One file of each format, all of the same tiny network."""
    import torch
    from test_checkpoints import openai_tower, safetensors, scripted_clip
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    torch.save(state, folder / "zip.pth")
    torch.save({"model": state, "epoch": 3}, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "safe.safetensors").write_bytes(safetensors(state))
    scripted_clip(folder / "script.pt", openai_tower())
    torch.save(state, folder / "zip4.bin", pickle_protocol=4)


def packed(folder):
    from deploy import pack
    from compress import BlockConfig, KernelConfig, NetworkConfig, compress_network, kernel_shapes, snap_to_grid
    from models import find_blocks
    model = network()
    blocks = find_blocks(model)
    kernels = (KernelConfig(3, 0.6), KernelConfig(4, 0.5, "FLOAT", "per-channel"), KernelConfig(5, 0.7, "INT", "log"),
               KernelConfig(32, 0.5))
    config = NetworkConfig(tuple(BlockConfig(kernels, kernel_shapes(block)) for block in blocks))
    masks = compress_network(blocks, config)
    pack.write(folder / "packed.pt", pack.pack(model, blocks, config, masks, snap_to_grid(blocks, config, masks),
                                               {"name": "", "source": "network"}))


def pictures(folder):
    from PIL import Image
    noise = random.Random(0).randbytes(48 * 40 * 3)
    image = Image.frombytes("RGB", (48, 40), noise)
    image.save(folder / "rgb.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png", compress_level=0)
    image.convert("1").save(folder / "bits.png")
    image.save(folder / "colour.jpg", quality=90)
    image.convert("L").save(folder / "grey.jpeg", progressive=True)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    for name in ("other.bmp", "other.gif", "other.ppm", "other.tiff", "other.webp"):
        image.save(folder / name)


def policy(folder):
    from compress import BlockConfig, KernelConfig, NetworkConfig, kernel_shapes, to_policy
    from models import find_blocks
    blocks = find_blocks(network())
    kernels = (KernelConfig(3, 0.6), KernelConfig(4, 0.5, "FLOAT", "per-channel"), KernelConfig(5, 0.7, "INT", "log"),
               KernelConfig(32, 1.0))
    made = to_policy(blocks, NetworkConfig(tuple(BlockConfig(kernels, kernel_shapes(block)) for block in blocks)))
    for entry in made["blocks"]:
        entry["budget"] = {"target": 0.25, "max_pruning": 0.6, "min_bits": 4, "max_drop": 1.0, "strategy": "auto"}
    (folder / "policy.json").write_text(json.dumps(made, indent=1))


def run_files(folder):
    from config import Config, flatten
    from test_report import result
    (folder / "config.json").write_text(json.dumps({"settings": flatten(Config()), "processes": 1, "command": ["x"]}))
    (folder / "result.json").write_text(json.dumps(result()))


def data_files(folder):
    """A zip, a CIFAR archive and its batches, Tiny ImageNet's lists and tree, and what is kept of decoded images."""
    from support import images as sources
    from PIL import Image
    tree, listed, batches = folder.parent / "tree", folder.parent / "listed", folder.parent / "cifar" / "batches"
    for place in (tree / "val" / "images", tree / "train" / "n01" / "images", tree / "train" / "n02" / "images"):
        place.mkdir(parents=True)
        for i in range(3):
            Image.frombytes("RGB", (64, 64), random.Random(i).randbytes(64 * 64 * 3)).save(place / f"{i}.png")
    (tree / "wnids.txt").write_text("n01\nn02\n")
    lines = [f"{i}.png\tn0{1 + i % 2}\t0\t0\t9\t9\n" for i in range(3)]
    (tree / "val" / "val_annotations.txt").write_text("".join(lines))
    shutil.copy(tree / "wnids.txt", folder)
    shutil.copy(tree / "val" / "val_annotations.txt", folder)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, path in enumerate(sorted(path for path in tree.rglob("*") if path.is_file())):
            archive.write(path, f"tiny-imagenet-200/{path.relative_to(tree)}", (0, 8)[i % 2])

    batches.mkdir(parents=True)
    content = {"data_batch": {"data": pixels(20), "labels": [i % 10 for i in range(20)]},
               "test_batch": {"data": pixels(10), "labels": list(range(10))},
               "batches.meta": {"label_names": [f"class{i}" for i in range(10)]}}
    for name, value in content.items():
        (batches / name).write_bytes(pickle.dumps(value, protocol=2))
    with tarfile.open(folder / "small.tar", "w") as archive:
        archive.add(batches, "batches")
    shutil.copy(batches / "data_batch", folder)

    found, flags, reasons = cached_images()
    with open(folder / "cache.u8", "w+b") as file:
        file.write(found.tobytes())
        sources._seal(file, "0123456789abcdef", SIDE, found, flags, reasons)

    from support import state
    state.Store(folder.parent / "state", {"seed": 42, "torch": "2"}).write(state_parts())
    for name in ("manifest.json", "network-1"):
        shutil.copy(folder.parent / "state" / name, folder)

    listed.mkdir()
    for name in ("a.png", "c.png"):
        shutil.copy(tree / "val" / "images" / "0.png", listed / name)
    (listed / "b.png").write_bytes(b"no image")
    settings = types.SimpleNamespace(dir=folder.parent, cache=True, name="some")
    listing = sources.Listing(listed, ["a.png", "b.png", "c.png"], [0, 0, 0])
    sources._verified(settings, "some", listing, 3, "checking", sources.silent, [])
    next((folder.parent / sources.CACHE).glob("*.json")).rename(folder / "checked.json")


def pixels(count):
    """uint8 [count, 3072] that look like 0…255 over and over once they are put as torchvision puts them."""
    import numpy as np
    rows = np.arange(count * 3072, dtype=np.int64).astype(np.uint8).reshape(count, 32, 32, 3)
    return np.ascontiguousarray(rows.transpose(0, 3, 1, 2)).reshape(count, 3072)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` as one version of one file, or the part that is asked for of it."""
    content = random.Random(0).randbytes(5000)

    def do_GET(self):
        start = 1000 if self.headers.get("Range") == "bytes=1000-" and self.headers.get("If-Range") == '"v1"' else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(self.content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *_):
        pass


def origin(folder, server):
    (folder.parent / "served").write_bytes(Server.content)
    url = f"http://127.0.0.1:{server.server_port}/file"
    (folder / "origin.json").write_text(json.dumps({"url": url, "version": '"v1"'}))


# ---------------------------------------------------------------------------------------------------------------
# Ways to spoil them


def flip(data, draw, first=0, last=None, most=32):
    data = bytearray(data)
    for _ in range(draw.randint(1, most)):
        at = draw.randrange(first, min(last or len(data), len(data)))
        data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


def truncated(data, draw):
    return data[:draw.randrange(len(data))]


def flipped(data, draw):
    return flip(data, draw)


def flipped_in_front(data, draw):
    return flip(data, draw, last=200, most=6)


def flipped_at_the_end(data, draw):
    return flip(data, draw, first=max(0, len(data) - 400), most=6)


def overwritten(data, draw):
    at, length = draw.randrange(len(data)), draw.randint(1, 400)
    return data[:at] + draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)]) + data[at + length:]


def spliced(data, draw):
    at, start, length = (draw.randrange(len(data)) for _ in range(3))
    return data[:at] + data[start:start + length] + data[at:]


def absurd_numbers(data, draw):
    """Some four or eight bytes become the largest numbers that they can hold."""
    at = draw.randrange(len(data))
    large = draw.choice([b"\xff" * 4, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", b"\0" * 7 + b"\x10"])
    return data[:at] + large + data[at + len(large):]


ANY = [truncated, flipped, flipped_in_front, flipped_at_the_end, overwritten, spliced, absurd_numbers]


def rezipped(data, change):
    """A zip again with ``change(name, content)`` and CRCs that fit, so that the damage gets past them."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return made.getvalue()


def spoilt_pickle(data, draw):
    spoil = draw.choice([flipped, truncated, overwritten, spliced, absurd_numbers])
    return rezipped(data, lambda name, content: spoil(content, draw) if name.endswith("data.pkl") else content)


def numbers_in_pickle(data, draw):
    """Sizes, strides, offsets and lengths of another size (BININT1 and BININT2 become BININT, BINPUTs move)."""
    def change(name, content):
        if not name.endswith("data.pkl"):
            return content
        at = [i for i in range(len(content) - 1) if content[i] in b"KM"]
        for i in sorted(draw.sample(at, min(3, len(at))), reverse=True):
            value = draw.choice([0, 1, 2 ** 31 - 1, -1, -2 ** 31, 10 ** 6, 3])
            content = content[:i] + b"J" + struct.pack("<i", value) + content[i + (2 if content[i] == 75 else 3):]
        return content
    return rezipped(data, change)


def other_storages(data, draw):
    kinds = [b"DoubleStorage", b"HalfStorage", b"LongStorage", b"BoolStorage", b"ByteStorage", b"QInt8Storage"]
    return rezipped(data, lambda name, content: content.replace(b"FloatStorage", draw.choice(kinds))
                    .replace(b"HalfStorage", draw.choice(kinds)) if name.endswith("data.pkl") else content)


def missing_records(data, draw):
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        gone = draw.sample(names, 3)
        for name in names:
            if name not in gone:
                new.writestr(name, old.read(name)[:draw.choice([None, None, None, 5])])
    return made.getvalue()


def zip_bomb(data, draw):
    """Records that unpack to two GB of zeros from two MB, or only claim to."""
    bomb, claim = deflated_zeros(), draw.random() < 0.5
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        target = draw.choice([name for name in old.namelist() if name.endswith(("data.pkl", "/data/0", "byteorder"))])
        for name in old.namelist():
            if name == target and not claim:
                info = zipfile.ZipInfo(name)
                new.writestr(info, bomb)                    # stored, then declared to be deflated
                info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 2 << 30
                continue
            new.writestr(name, old.read(name))
            if name == target:
                new.getinfo(name).file_size = new.getinfo(name).compress_size = draw.choice([2 << 30, 2 << 40, 3 << 29])
    return made.getvalue()


@functools.cache
def deflated_zeros(blocks=32):
    """A deflate stream of ``blocks`` times 64 MB of zeros: one such block, complete in itself, over and over."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(64 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return block * blocks + squeeze.flush(zlib.Z_FINISH)


NONSENSE = [b"", b"null", b"[]", b"{}", b"3", b"[" * 10 ** 6, b'{"a":' * 10 ** 6, b"9" * 10 ** 6, b"[]," * 10 ** 6,
            b" " * (64 << 20), b"[" + b"0," * (8 << 20) + b"0]", b'"' + b"\\u0041" * (2 << 20) + b'"', b'{"a":1,"a":1}',
            b"\xff\xfe{}", b'"\\ud800"', b"NaN", b"1e999"]


def nonsense(data, draw):
    """JSON that is none, or something else, much larger or much deeper."""
    return draw.choice(NONSENSE)


def other_json(data, draw):
    """JSON of something else in one to three places."""
    value = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        value = other_leaf(value, draw)
    return json.dumps(value).encode()


def given_twice(data, draw):
    """A key of a JSON object once more, with another value."""
    at = draw.choice([i for i in range(len(data)) if data[i:i + 1] == b"{"]) + 1
    name = json.dumps(draw.choice(["settings", "format", "blocks", "bits", "exp", "url", "files", "seed"])).encode()
    return data[:at] + name + b": 3, " + name + b": 4, " + data[at:]


def other_line(data, draw):
    """A text with lines twice, in another order, left out, of other words, or very long ones."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = draw.choice([b"", lines[0], b"..", b"../../../etc", b"/etc", b"n01\0", b"\xff", b"n" * 10 ** 6, b"\t\t",
                             b"0.png\tn03", b"../train/n01/images/0.png\tn01", b"0.png\tn01\r", b"train"])
    return b"\n".join(draw.sample(lines, len(lines)) if draw.random() < 0.3 else lines)


def crafted_cache(data, draw):
    """A cache of decoded images of another header, with checksums that fit it."""
    length = int.from_bytes(data[-16:-12], "little")
    header = json.dumps(other_leaf(json.loads(data[-16 - length:-16]), draw)).encode()
    if draw.random() < 0.2:
        header = draw.choice(NONSENSE)
    index = data[-16 - length - CACHED:-16 - length] + header
    end = len(header).to_bytes(4, "little") + zlib.crc32(index).to_bytes(4, "little") + data[-8:]
    return data[:-16 - length - CACHED] + index + end


def crafted_part(data, draw):
    """A part of a state of another header, or other bytes behind it; the manifest will have its checksum."""
    start = len(b"HiReLC state\n")
    length = int.from_bytes(data[start:start + 8], "little")
    header, rest = data[start + 8:start + 8 + length], data[start + 8 + length:]
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(ANY)(data, draw)
    if kind == 1:
        header = draw.choice(NONSENSE)
    elif kind == 2:
        header = json.dumps(other_leaf(json.loads(header), draw)).encode()
    else:
        sides = draw.choice([[2 ** 62, 4], [0, 2 ** 62], [0] * 100_000, [-1], [3, 5], [True], "ab", [2 ** 70],
                             [1] * 64])
        shape = json.dumps({"tensor": [draw.choice(["float32", "int64", "bool", "bfloat16", "qint8"]), sides]})
        header = header.replace(b'{"tensor": ["float32", [3, 4]]}', shape.encode(), draw.choice([1, 5]))
    return data[:start] + len(header).to_bytes(8, "little") + header + rest


def bad_member(data, draw):
    """A zip with a member whose name leads elsewhere, is a link, a device, there twice, or much larger than it says."""
    made, kind = io.BytesIO(data), draw.randrange(7)
    with zipfile.ZipFile(made, "a") as archive:
        name = draw.choice(["../out", "/tmp/out", "a/../../out", "..\\out", "C:/out", "tiny-imagenet-200/../../out",
                            "tiny-imagenet-200", "tiny-imagenet-200/wnids.txt", "x" * 300, "x" * 5000, "a\nb", ".",
                            "/"])
        info = zipfile.ZipInfo(name)
        if kind < 3:
            archive.writestr(info, b"n01\n")
        elif kind == 3:                                     # a symbolic link, and a member below it
            info = zipfile.ZipInfo("tiny-imagenet-200/link")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/tmp")
            archive.writestr("tiny-imagenet-200/link/out", b"n01\n")
        elif kind == 4:
            archive.writestr(zipfile.ZipInfo("tiny-imagenet-200/bomb"), deflated_zeros())
            info = archive.getinfo("tiny-imagenet-200/bomb")
            info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, draw.choice([2 << 30, 10, 1 << 20, 2 << 60])
        elif kind == 5:
            info = draw.choice(archive.infolist())
            info.compress_type, info.flag_bits = draw.choice([1, 9, 12, 14, 93, 99]), draw.choice([0, 1, 0x20, 0x41])
            archive._didModify = True
        else:
            for info in archive.infolist():                 # all members are one
                info.header_offset = 0
            archive._didModify = True
    return made.getvalue()


def spoilt_header(data, draw):
    """A safetensors header with a wrong length, dtype, shape or offset, or far too large."""
    length, = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    kind = draw.randrange(8)
    if kind == 0:
        return struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 2 ** 40, 2 ** 63, 2 ** 64 - 1])) + data[8:]
    name = draw.choice([name for name in header if name != "__metadata__"])
    if kind == 1:
        header[name]["dtype"] = draw.choice(["F64", "F16", "I64", "BOOL", "F8_E5M2", "", None, 7, [], {}])
    elif kind == 2:
        header[name]["shape"] = draw.choice([[], [2 ** 60], [2 ** 62, 4], [-1], [1e9], "8", None, [0] * 9, [[8]], {}])
    elif kind == 3:
        wrong = [[0, 2 ** 50], [2 ** 63, 2 ** 64], [8, 0], [0], [], None, "ab", [-8, 0]]
        header[name]["data_offsets"] = draw.choice(wrong)
    elif kind == 4:
        header = {name: header[name] for name in draw.sample(list(header), 5)}
    elif kind == 5:
        text = draw.choice([b"[" * 10 ** 6, b'{"a":' * 10 ** 6, b"9" * 10 ** 6, b"[]," * 4 * 10 ** 6, b'"\\ud800"'])
        return struct.pack("<Q", len(text)) + text + body
    elif kind == 6:
        header = {f"{draw.random()}": header[name] for _ in range(20_000)}
    else:
        header["x" * 10 ** 6 + "\n\x1b[2J"] = header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def wrong_numbers(data, draw):
    """Stored numbers that no network has: not finite, or huge."""
    at = draw.randrange(len(data) // 2, len(data) - 4096) // 4 * 4
    return data[:at] + draw.choice([b"\xff\xff\xff\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"]) * 500 + data[at + 2000:]


def crafted(data, draw):
    """A packed file of another index or blob, with a digest that fits it."""
    import torch
    parts = {name: bytes(tensor.numpy()) for name, tensor in torch.load(io.BytesIO(data), weights_only=True).items()}
    header, index, blob = parts["header"], parts["index"], parts["blob"]
    kind = draw.randrange(6)
    if kind == 0:
        blob = draw.choice(ANY)(blob, draw)
    elif kind == 1:
        index = draw.choice(ANY)(index, draw)
    elif kind == 2:
        index = zlib.compress(draw.choice(ANY)(zlib.decompress(index), draw))
    elif kind == 3:
        text = draw.choice([b"[" * 10 ** 6, b'{"a":' * 10 ** 6, b"9" * 10 ** 6, b"[]," * 10 ** 6, b" " * (64 << 20)])
        index = zlib.compress(draw.choice([text, text[:4 << 20], b"[" + text[:3 << 20] + b"0]"]), 1)
    else:
        index = zlib.compress(json.dumps(other_leaf(json.loads(zlib.decompress(index)), draw)).encode())
    digest = hashlib.sha256(header[-36:-32] + len(index).to_bytes(8, "little") + index + blob).digest()
    parts.update(header=header[:-32] + digest, index=index, blob=blob)
    made = io.BytesIO()
    torch.save({name: torch.tensor(list(part), dtype=torch.uint8) for name, part in parts.items()}, made)
    return made.getvalue()


def other_leaf(value, draw):
    """JSON with something else somewhere within it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not keys or draw.random() < 0.05:
        number = value if type(value) is int else 1
        return draw.choice([None, True, -1, 0, 1, 2, 2 ** 31, 2 ** 62, 10 ** 300, 1.5, math.inf, math.nan, "", "a", 32,
                            "float16", "FLOAT", "log", [], {}, [[]], number + 1, number - 1, number * 2])
    key = draw.choice(list(keys))
    value[key] = other_leaf(value[key], draw)
    return value


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def absurd_png(data, draw):
    """A PNG of other sides than its pixels have, with a CRC that fits, or one that really unpacks to a GB or more."""
    start = b"\x89PNG\r\n\x1a\n"
    if draw.random() < 0.4:
        side = draw.choice([8_000, 13_000, 20_000])
        zeros = b"\x78\xda" + deflated_zeros(side * side * 3 // (64 << 20) + 2)
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        return start + chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    sides = [draw.choice([0, 1, 48, 65_536, 10 ** 6, 2 ** 31 - 1, 2 ** 32 - 1]) for _ in range(2)]
    header = struct.pack(">IIBBBBB", *sides, draw.choice([1, 8, 16, 99]), draw.choice([0, 2, 3, 6, 7]), 0, 0,
                         draw.randrange(3))
    return start + chunk(b"IHDR", header) + data[33:]


def absurd_text(data, draw):
    """A PNG whose text, profile or palette is much larger than it looks."""
    zeros = b"\x78\xda" + deflated_zeros(8)
    more = draw.choice([chunk(b"zTXt", b"a\0\0" + zeros), chunk(b"iCCP", b"a\0\0" + zeros),
                        chunk(b"iTXt", b"a\0\1\0\0\0" + zeros), chunk(b"PLTE", bytes(10 ** 5)), chunk(b"IHDR", b"")])
    return data[:33] + more + data[33:]


def absurd_jpeg(data, draw):
    """A JPEG that says it has other sides."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    sides = [draw.choice([0, 1, 8_000, 9_000, 65_535]) for _ in range(2)]
    return data[:at] + struct.pack(">HH", *sides) + data[at + 4:]


JSON = ANY + [nonsense, given_twice] + [other_json] * 4
TEXT = ANY + [other_line] * 5
WAYS = {
    "weights: torch.save": {
        "zip.pth": ANY + [spoilt_pickle, numbers_in_pickle, other_storages, missing_records, zip_bomb],
        "zip4.bin": [spoilt_pickle, numbers_in_pickle]},
    "weights: torch.save before 1.6": {"old.pth": ANY + [wrong_numbers, flipped_in_front, absurd_numbers]},
    "weights: safetensors": {"safe.safetensors": ANY + [spoilt_header] * 6 + [wrong_numbers]},
    "weights: TorchScript": {"script.pt": ANY + [spoilt_pickle, spoilt_pickle, numbers_in_pickle, other_storages,
                                                 missing_records, zip_bomb]},
    "packed.pt": {"packed.pt": ANY + [spoilt_pickle, numbers_in_pickle, missing_records, zip_bomb] + [crafted] * 6},
    "state: manifest and parts": {"manifest.json": JSON, "network-1": ANY + [crafted_part] * 8},
    "policy.json": {"policy.json": JSON},
    "config.json": {"config.json": JSON},
    "result.json": {"result.json": JSON},
    "images: png": {"rgb.png": ANY + [absurd_png, absurd_png, absurd_text],
                    "palette.png": ANY + [absurd_png, absurd_text], "alpha.png": ANY, "bits.png": ANY},
    "images: jpg": {"colour.jpg": ANY + [absurd_jpeg], "grey.jpeg": ANY + [absurd_jpeg], "cmyk.jpg": ANY},
    "images: bmp, gif, ppm, tiff, webp": dict.fromkeys(
        ("other.bmp", "other.gif", "other.ppm", "other.tiff", "other.webp"), ANY),
    "archives: zip": {"images.zip": ANY + [bad_member] * 5},
    "archives: CIFAR's tar and batches": {"small.tar": ANY, "data_batch": ANY},
    "lists of Tiny ImageNet": {"wnids.txt": TEXT, "val_annotations.txt": TEXT},
    "cache of decoded images": {"cache.u8": ANY + [crafted_cache] * 5},
    "list of unreadable images": {"checked.json": JSON},
    "origin of a part of a download": {"origin.json": JSON}}
CHECKSUMMED = {"archives: CIFAR's tar and batches", "cache of decoded images", "list of unreadable images",
               "origin of a part of a download"}            # no change of these goes unnoticed


def hostile(canary, folder):
    """Pickles that would make the folder ``canary`` if they were unpickled, in every container; name → bytes."""
    import torch
    evil = Evil(str(canary))
    path = os.fsencode(canary)
    text = b"X" + struct.pack("<I", len(path)) + path
    made = {"evil-dict.pth": pickle.dumps({"model": evil}, protocol=2), "evil-4.pt": pickle.dumps(evil, protocol=4),
            "evil-0.bin": pickle.dumps(evil, protocol=0),
            "evil-global.pth": b"\x80\x02cposix\nmkdir\n" + text + b"\x85R.",
            "evil-stack.pth": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + text + b"\x85R.",
            "evil-obj.pth": b"\x80\x02(cposix\nmkdir\n" + text + b"o.",
            "evil-inst.pth": b"\x80\x02(" + text + b"iposix\nmkdir\n."}
    for name, options in (("evil-zip.pth", {}), ("evil-old.pth", dict(_use_new_zipfile_serialization=False))):
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(2), "b": evil}, buffer, **options)
        made[name] = buffer.getvalue()
    call = pickle.dumps(evil, protocol=2)
    for whole in ("zip.pth", "script.pt"):
        made[f"evil-in-{whole}"] = rezipped((folder / whole).read_bytes(), lambda name, content:
                                            call if name.endswith(("data.pkl", "constants.pkl")) else content)
    made["evil-code.pt"] = rezipped((folder / "script.pt").read_bytes(), lambda name, content:
                                    f"import os\nos.mkdir({str(canary)!r})\n".encode() if "/code/" in name else content)
    return made


def fuzz(folder, kinds, count):
    """{kind: Counter of "read" and "refused"} of ``count`` spoilt files of each kind, and the slowest file's seconds.

    AssertionError for any other outcome.
    """
    whole, bad, canary = folder / "whole", folder / "bad", folder / "canary"
    whole.mkdir(parents=True)
    bad.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for make in (checkpoints, packed, policy, run_files, pictures, data_files):
            make(whole)
        origin(whole, server)
        kind_of = {}
        if kinds[0].startswith("weights"):
            for name, content in hostile(canary, whole).items():
                (bad / name).write_bytes(content)
        for kind in kinds:
            ways = [(name, way) for name in WAYS[kind] for way in WAYS[kind][name]]
            random.Random(1).shuffle(ways)                  # the short form takes some of everything
            for number in range(count):
                name, way = ways[number % len(ways)]
                content = way((whole / name).read_bytes(), random.Random(f"{kind} {number}"))
                path = bad / f"{number:03d}-{way.__name__}-{name}"
                path.write_bytes(content)
                kind_of[path.name] = kind
        command = [sys.executable, os.path.abspath(__file__), "--work", str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120 + SECONDS * len(os.listdir(bad)),
                             cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    finally:
        server.shutdown()
        server.server_close()
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    last = lines[-1][0] if lines else "the whole files"
    assert ran.returncode == 0, f"ended with {ran.returncode} at {last}: {ran.stderr[-2000:]}"
    assert ran.stderr == "", ran.stderr[:2000]              # no traceback of a thread, no warning
    done = {name: (outcome, seconds) for name, outcome, seconds in lines if outcome != "started"}
    assert done.keys() == set(os.listdir(bad))
    raised = {name: outcome for name, (outcome, _) in done.items() if outcome.startswith("raised")}
    assert not raised, raised
    assert max(seconds for _, seconds in done.values()) < SECONDS
    assert {name for name, (outcome, _) in done.items() if name.startswith("evil") and outcome == "read"} <= {
        "evil-code.pt"}                                     # its code is not looked at
    assert not canary.exists()
    counts = {kind: collections.Counter() for kind in kinds}
    for name, kind in kind_of.items():
        counts[kind][done[name][0].partition(":")[0]] += 1
    return counts, max(seconds for _, seconds in done.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc for the address space")
def test_spoilt_files_are_read_or_refused(tmp_path):
    for n, kinds in enumerate([[kind] for kind in WAYS] if LONG else [list(WAYS)]):
        counts, _ = fuzz(tmp_path / str(n), kinds, COUNT)
        shutil.rmtree(tmp_path / str(n))
        assert all(sum(counts[kind].values()) == COUNT for kind in kinds)
        # Neither passes everything nor refuses everything.
        assert all(counts[kind]["refused"] > COUNT // 10 for kind in kinds), counts
        assert all(counts[kind]["read"] for kind in kinds if LONG and kind not in CHECKSUMMED)


def test_the_trap_of_the_hostile_files_is_a_working_one(tmp_path):
    pickle.loads(pickle.dumps(Evil(str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


def main():
    parser = argparse.ArgumentParser(description="Read spoilt files of every kind; print the count of each outcome.")
    parser.add_argument("--count", type=int, default=1000, help="files of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    print("| kind of file | read | refused in one line | slowest, s |\n|---|---|---|---|")
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            counts, slowest = fuzz(pathlib.Path(folder) / "files", [kind], args.count)
        print(f"| {kind} | {counts[kind]['read']} | {counts[kind]['refused']} | {slowest:.1f} |", flush=True)


if __name__ == "__main__":
    main()
