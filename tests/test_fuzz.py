"""Damaged and hostile checkpoint, packed and image files: each is read to something sane or refused in one line.

Files are made here from seeds and read by a worker process with one GB of address space above what its libraries take
and ten seconds per file; a crash, a hang, a traceback or another exception than InputError fails the test. 80 files,
or 400 with HIRELC_LONG=1. The worker is this same file, run as a program.
"""

import hashlib
import io
import json
import math
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

COUNT = 400 if os.environ.get("HIRELC_LONG") == "1" else 80
SECONDS, MEMORY = 10, 1 << 30


def network():
    import models
    return models.VisionTransformer(5, image_size=16, patch=4, heads=2, head_dim=4, depth=2, clip=True)


# ---------------------------------------------------------------------------------------------------------------
# The worker


def read(path):
    """Load one file as a user would; a line that says what came of it. Anything but InputError goes up."""
    import torch
    from config import InputError
    try:
        if path.endswith((".png", ".jpg", ".jpeg")):
            from sources import decode
            pixels = decode([path], 32)[0]
            assert tuple(pixels.shape) == (1, 3, 32, 32) and str(pixels.dtype).endswith("uint8")
        elif path.endswith("packed.pt"):
            import pack
            state = pack.load(path, model=network()).state_dict()
            whole = pack.state(pack.read(os.path.join(os.path.dirname(path), "..", "whole", "packed.pt")))
            assert state.keys() == whole.keys()
            assert "-crafted-" in path or all(torch.equal(state[name], whole[name]) for name in whole)
            assert len(pack.info(pack.read(path))) < 10_000
        else:
            from models import load_pretrained
            model = network()
            report = load_pretrained(model, path)
            assert report.loaded >= len(model.state_dict()) - 2
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
            with torch.no_grad():
                assert model.eval()(torch.ones(1, 3, 16, 16)).shape == (1, 5)
        return "read"
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 100_000
        assert os.path.basename(path) in message
        return "refused: " + message


def work(folder):
    """Read every file of a folder, each under the limits; one line of JSON before and after each."""
    import resource
    import torch
    torch.set_num_threads(1)
    for example in sorted(os.listdir(os.path.join(folder, "whole"))):     # all that is imported late, is now
        assert read(os.path.join(folder, "whole", example)) == "read", example
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    for name in sorted(os.listdir(os.path.join(folder, "bad"))):
        print(json.dumps([name, "started", 0]), flush=True)
        signal.alarm(SECONDS)                               # its default action ends the process, whatever it is doing
        started = time.monotonic()
        try:
            outcome = read(os.path.join(folder, "bad", name))
        except BaseException as error:
            outcome = f"raised {type(error).__name__}: {error}"
        signal.alarm(0)
        print(json.dumps([name, outcome, time.monotonic() - started]), flush=True)


if __name__ == "__main__":
    work(sys.argv[1])
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
    import pack
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


def deflated_zeros(blocks=32):
    """A deflate stream of ``blocks`` times 64 MB of zeros: one such block, complete in itself, over and over."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(64 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return block * blocks + squeeze.flush(zlib.Z_FINISH)


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
        side = draw.choice([13_000, 20_000])
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
    return data[:at] + struct.pack(">HH", *(draw.choice([0, 1, 9_000, 65_535]) for _ in range(2))) + data[at + 4:]


WAYS = {"zip.pth": ANY + [spoilt_pickle, numbers_in_pickle, other_storages, missing_records, zip_bomb],
        "old.pth": ANY + [wrong_numbers, flipped_in_front, absurd_numbers],
        "safe.safetensors": ANY + [spoilt_header] * 6 + [wrong_numbers],
        "script.pt": ANY + [spoilt_pickle, spoilt_pickle, numbers_in_pickle, other_storages, missing_records, zip_bomb],
        "packed.pt": ANY + [spoilt_pickle, numbers_in_pickle, missing_records, zip_bomb] + [crafted] * 6,
        "zip4.bin": [spoilt_pickle, numbers_in_pickle],
        "rgb.png": ANY + [absurd_png, absurd_png, absurd_text], "palette.png": ANY + [absurd_png, absurd_text],
        "alpha.png": ANY, "bits.png": ANY, "colour.jpg": ANY + [absurd_jpeg], "grey.jpeg": ANY + [absurd_jpeg],
        "cmyk.jpg": ANY}


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc for the address space")
def test_spoilt_files_are_read_or_refused(tmp_path):
    whole, bad, canary = tmp_path / "whole", tmp_path / "bad", tmp_path / "canary"
    whole.mkdir()
    bad.mkdir()
    checkpoints(whole)
    pictures(whole)
    packed(whole)
    for name, content in hostile(canary, whole).items():
        (bad / name).write_bytes(content)
    evil = len(os.listdir(bad))
    ways = [(name, way) for name in WAYS for way in WAYS[name]]
    random.Random(1).shuffle(ways)                          # the short form takes some of everything
    for number in range(COUNT - evil):
        name, way = ways[number % len(ways)]
        content = way((whole / name).read_bytes(), random.Random(number))
        (bad / f"{number:03d}-{way.__name__}-{name}").write_bytes(content)
    assert len(os.listdir(bad)) == COUNT

    command = [sys.executable, os.path.abspath(__file__), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60 + SECONDS * COUNT, cwd=ROOT,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    last = lines[-1][0] if lines else "the whole files"
    assert ran.returncode == 0, f"ended with {ran.returncode} at {last}: {ran.stderr[-2000:]}"
    assert ran.stderr == ""                                 # no traceback of a thread, no warning
    done = {name: (outcome, seconds) for name, outcome, seconds in lines if outcome != "started"}
    assert len(done) == COUNT
    assert {name: outcome for name, (outcome, _) in done.items() if outcome.startswith("raised")} == {}
    assert max(seconds for _, seconds in done.values()) < SECONDS
    refused = [name for name, (outcome, _) in done.items() if outcome.startswith("refused: ")]
    assert COUNT * 0.5 < len(refused) < COUNT               # neither passes everything nor refuses everything
    assert {name for name in done if name.startswith("evil")} - set(refused) == {"evil-code.pt"}
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(str(canary))))
    assert canary.exists()                                  # the trap is a working one
