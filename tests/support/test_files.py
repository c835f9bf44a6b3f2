"""Downloads, JSON from elsewhere, and writing whole files."""

import hashlib
import os

import pytest
import torch

from config import InputError
from deploy import policies
from deploy.checks import check_writable
from support import files


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source.bin").write_bytes(b"content")
    return (tmp_path / "source.bin").as_uri()


def test_a_download_appears_whole_and_replaces_what_was_there(tmp_path, source):
    target = tmp_path / "new" / "folder" / "file.bin"
    files.download(source, target, sha256=hashlib.sha256(b"content").hexdigest()[:8])
    assert target.read_bytes() == b"content"
    (tmp_path / "source.bin").write_bytes(b"new")
    files.download(source, target)
    assert target.read_bytes() == b"new" and os.listdir(target.parent) == ["file.bin"]


@pytest.mark.parametrize("url, sha256, word", [
    ("file:///nonexistent/file.bin", "", "nonexistent"), ("http://127.0.0.1:9/file.bin", "", "refused"),
    ("http://[host/file.bin", "", "IPv6"), ("ftp://host/file.bin", "", "only http, https"),
    (None, "0123abcd", "0123abcd")])
def test_a_download_that_fails_is_one_line_and_leaves_the_old_file(tmp_path, source, url, sha256, word):
    target = tmp_path / "kept" / "file.bin"
    files.download(source, target)
    with pytest.raises(InputError, match=word) as error:
        files.download(url or source, target, sha256=sha256, hint=" HINT")
    assert (url or source) in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith(f"save it as {target} HINT")
    assert target.read_bytes() == b"content" and os.listdir(target.parent) == ["file.bin"]


def test_read_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": [1, 2.5]}')
    assert files.read_json(tmp_path / "a.json", 15) == ({"a": [1, 2.5]}, b'{"a": [1, 2.5]}')
    with pytest.raises(ValueError, match="larger than 14 bytes"):
        files.read_json(tmp_path / "a.json", 14)
    with pytest.raises(ValueError, match="larger than 16777216 bytes"):
        files.read_json("/dev/zero")


def test_names_values_and_errors_fit_on_a_line():
    assert files.shown("a\nb") == policies.quoted("a\nb") == "'a\\nb'" and files.shown("é" * 300) == "é" * 200 + "…"
    assert files.one_line(ValueError("a\n  b")) == "a b" and files.one_line(ValueError()) == "ValueError"
    assert files.one_line(ValueError("Caught ValueError in process 0.\nTraceback\nValueError: b\n")) == "ValueError: b"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"é": 1.5})
    assert path.read_text() == '{\n "\\u00e9": 1.5\n}\n'
    with pytest.raises(ValueError):
        files.write_json(path, float("nan"))
    files.replace_file(tmp_path / "b.txt", "é\n".encode())
    files.replace_file(path, lambda file: torch.save({"a": torch.ones(3)}, file))
    assert torch.equal(torch.load(path)["a"], torch.ones(3))
    before, run, long = path.read_bytes(), tmp_path / "new" / "run", tmp_path / ("a" * 251)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            files.replace_file(path, b"new")
        assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.json", "b.txt"]
    assert check_writable(path) == path and check_writable(run / "a.pt", run) == run / "a.pt"  # the run makes it
    for place, home in ((tmp_path, None), (long, None), (run / "a.pt", None), (run.parent, run), (run / "state", run)):
        with pytest.raises(InputError, match="cannot be written"):
            check_writable(place, home)


def test_a_full_disk_is_an_oserror_when_torch_saves(tmp_path):
    with pytest.raises(OSError, match="No space"), open("/dev/full", "wb", buffering=0) as full:
        files.replace_file(tmp_path / "a.pt", lambda file: torch.save({"a": torch.randn(1000)}, full))
    with pytest.raises(RuntimeError, match="another"):
        files.replace_file(tmp_path / "a.pt", lambda file: (_ for _ in ()).throw(RuntimeError("another")))
    assert os.listdir(tmp_path) == []
