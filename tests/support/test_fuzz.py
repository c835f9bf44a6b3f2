"""Files from outside, spoilt at random places from a fixed seed: each is read to something sane, or refused by an
InputError of one line that names it."""

import collections
import json
import random

import pytest
import torch
from PIL import Image

import models
from compress import BlockConfig, KernelConfig, NetworkConfig, kernel_shapes
from config import Config, InputError, override
from deploy import policies
from support import images, weights
from test_weights import safetensors

COUNT = 150  # spoilt files of each kind


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.VisionTransformer(5, image_size=16, patch=4, heads=2, head_dim=4, depth=2)


def chosen(network):
    blocks = models.find_blocks(network)
    kernels = (KernelConfig(3, 0.6), KernelConfig(4, 0.5, "FLOAT", "per-channel"), KernelConfig(5, 0.7, "INT", "log"),
               KernelConfig(32, 1.0))
    return blocks, NetworkConfig(tuple(BlockConfig(kernels, kernel_shapes(block)) for block in blocks))


def write_image(path, network):  # a file as it should be; the reader asserts that what was read is sane
    picture = Image.frombytes("RGB", (48, 40), random.Random(0).randbytes(48 * 40 * 3))
    picture.convert("P" if path.suffix == ".gif" else "RGB").save(path)


def read_image(path, network):
    assert images.decode(path, 32).shape == (1 + 3 * 32 * 32,)


def write_safetensors(path, network):
    path.write_bytes(safetensors(network.state_dict()))


def write_torch(path, network):
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=path.suffix == ".pt")


def read_weights(path, network):
    for name, tensor in weights.read_checkpoint(str(path)).items():
        assert isinstance(name, str) and tensor.element_size() * tensor.numel() <= path.stat().st_size


def write_policy(path, network):
    path.write_text(json.dumps(policies.to_policy(*chosen(network)), indent=1))


def read_policy(path, network):
    blocks, _ = chosen(network)
    config = override(Config(), {"compress.qtype": "any", "compress.granularity": "any"})
    for block in policies.read(path).fit(blocks, config)[0].blocks:
        assert all(kernel.bits in (3, 4, 5, 6, 7, 8, 32) and 0.4 <= kernel.keep <= 1 for kernel in block.kernels)


def spoil(whole, draw):
    """Bytes of a file with one of: its end missing, bits flipped, bytes replaced by others, a span out, twice or 0."""
    start, most = draw.randrange(draw.choice([64, len(whole)])), draw.choice([1, 2, 8, 100])
    head, span, tail = whole[:start], whole[start:start + most], whole[start + most:]
    flipped = bytes([span[0] ^ 1 << draw.randrange(8)])
    return head + draw.choice([b"", flipped + span[1:] + tail, draw.randbytes(len(span)) + tail, tail, 2 * span + tail,
                               bytes(len(span)) + tail])


KINDS = {**{f"image.{kind}": (write_image, read_image) for kind in ("png", "jpg", "bmp", "gif", "tiff", "webp")},
         "weights.safetensors": (write_safetensors, read_weights), "weights.pt": (write_torch, read_weights),
         "weights.pth": (write_torch, read_weights), "policy.json": (write_policy, read_policy)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_file_is_read_or_refused(tmp_path, kind, network):
    write, read = KINDS[kind]
    write(tmp_path / kind, network)
    read(tmp_path / kind, network)
    whole, counts = (tmp_path / kind).read_bytes(), collections.Counter()
    for number in range(COUNT):
        path = tmp_path / f"{number}-{kind}"
        path.write_bytes(spoil(whole, random.Random(f"{kind} {number}")))
        try:
            read(path, network)
            counts["read"] += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 5000
            counts["refused"] += 1
    assert counts["refused"] > COUNT // 10, counts
