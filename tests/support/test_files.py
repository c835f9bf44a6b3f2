"""Downloads against a server of the test's own on 127.0.0.1, and archives."""

import hashlib
import http.server
import os
import pathlib
import re
import sys
import threading
import zipfile

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import files  # noqa: E402
from config import InputError  # noqa: E402

CONTENT = bytes(range(256)) * 4000                          # 1,024,000 bytes: several blocks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content`` at every path; the test sets how it behaves and reads what it was asked."""
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.headers = CONTENT, {"ETag": '"one"'}
        self.drop = None            # bytes after which the connection breaks off
        self.ranges = True          # whether it knows Range
        self.status = None          # an error for every request
        self.length = None          # a Content-Length that is not true
        self.chunked = False
        self.shift = 0              # added to the first byte that a part is said to begin with
        self.asked = []             # headers of the requests
        self.gate = None            # an Event to wait for in the middle

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, content, start = self.server, self.server.content, 0
        server.asked.append(dict(self.headers))
        if server.status:
            return self.send_error(server.status)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, server.headers.get("ETag"), server.headers.get("Last-Modified"))
        if wanted and server.ranges and same:
            start = int(wanted[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        for name, value in server.headers.items():
            self.send_header(name, value)
        body = content[start:]
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(server.length or len(body)))
        self.end_headers()
        cut, server.drop = server.drop, None                # only this connection breaks off
        sent = body if cut is None else body[:cut]
        if server.gate:
            self.wfile.write(sent[:1000])
            self.wfile.flush()
            server.gate.wait(20)
            sent = sent[1000:]
        if server.chunked:
            sent = b"%x\r\n%s\r\n" % (len(sent), sent) + (b"0\r\n\r\n" if cut is None else b"")
        self.wfile.write(sent)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    if server.gate:
        server.gate.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder" / "file.bin"


def names(target):
    return sorted(path.name for path in target.parent.iterdir())


def broken(server, target, after, **options):
    """A download that breaks off after so many bytes: nothing under the final name, what arrived beside it."""
    server.drop = after
    with pytest.raises(OSError) as error:
        files.fetch(server.url, target, timeout=10, **options)
    assert not target.exists()
    return str(error.value)


def test_a_download(server, target):
    seen = []
    during = lambda what, done, total: seen.append((what, done, total, target.exists()))
    files.fetch(server.url, target, during, 10, size=len(CONTENT), sha256=DIGEST[:8])
    assert target.read_bytes() == CONTENT and names(target) == ["file.bin"]
    done = [call[1] for call in seen]
    assert done[0] == 0 and done[-1] == len(CONTENT) and done == sorted(set(done)) and len(done) > 3
    assert {(what, total, there) for what, _, total, there in seen} == {("downloading file.bin", len(CONTENT), False)}
    assert "Range" not in server.asked[0]


def test_a_download_smaller_than_any_buffer(server, target):
    server.content = b"small"
    files.fetch(server.url, target, timeout=10, size=5, sha256=hashlib.sha256(b"small").hexdigest())
    assert target.read_bytes() == b"small"


@pytest.mark.parametrize("headers", [{"ETag": '"one"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
@pytest.mark.parametrize("after", [1, 300_000, len(CONTENT) - 1])
def test_a_broken_download_goes_on(server, target, headers, after):
    server.headers = headers
    assert f"{after} of {len(CONTENT)} bytes" in broken(server, target, after)
    assert names(target) == ["file.bin.part", "file.bin.part.json"]
    assert target.with_name("file.bin.part").read_bytes() == CONTENT[:after]
    seen = []
    files.fetch(server.url, target, lambda what, done, total: seen.append((done, total)), 10)
    assert target.read_bytes() == CONTENT and names(target) == ["file.bin"]
    assert server.asked[1]["Range"] == f"bytes={after}-"
    assert server.asked[1]["If-Range"] == next(iter(headers.values()))
    assert seen[0] == (after, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_download_may_break_more_than_once(server, target):
    for after in (300_000, 200_000):
        broken(server, target, after)
    files.fetch(server.url, target, timeout=10)
    assert [asked.get("Range") for asked in server.asked] == [None, "bytes=300000-", "bytes=500000-"]
    assert target.read_bytes() == CONTENT


def test_another_version_on_the_server_starts_again(server, target):
    """The server ignores Range when If-Range names a version that it does not have any more."""
    broken(server, target, 300_000)
    server.content, server.headers = CONTENT[::-1], {"ETag": '"two"'}
    files.fetch(server.url, target, timeout=10)
    assert server.asked[1]["If-Range"] == '"one"' and target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("behaviour", [{"ranges": False}, {"shift": 1}])
def test_a_server_without_ranges_or_with_wrong_ones_starts_again(server, target, behaviour):
    broken(server, target, 300_000)
    for name, value in behaviour.items():
        setattr(server, name, value)
    files.fetch(server.url, target, timeout=10)
    assert "Range" in server.asked[1] and target.read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_without_a_version_only_a_digest_allows_to_go_on(server, target, headers):
    server.headers = headers
    broken(server, target, 300_000)
    files.fetch(server.url, target, timeout=10)
    assert "Range" not in server.asked[1] and target.read_bytes() == CONTENT
    target.unlink()
    broken(server, target, 300_000, sha256=DIGEST)
    files.fetch(server.url, target, timeout=10, sha256=DIGEST)
    assert server.asked[3]["Range"] == "bytes=300000-" and "If-Range" not in server.asked[3]
    assert target.read_bytes() == CONTENT


def test_a_partial_file_of_another_url_is_not_used(server, target):
    broken(server, target, 300_000)
    files.fetch(server.url + "?v=2", target, timeout=10)
    assert "Range" not in server.asked[1] and target.read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["", "{", "[]", '{"url": 3}'])
def test_a_partial_file_of_unknown_origin_is_not_used(server, target, note):
    broken(server, target, 300_000)
    target.with_name("file.bin.part.json").write_text(note)
    files.fetch(server.url, target, timeout=10)
    assert "Range" not in server.asked[1] and target.read_bytes() == CONTENT


def test_a_partial_file_that_is_whole_already(server, target):
    """The process ended between the last byte and the move: the server answers 416."""
    broken(server, target, len(CONTENT) - 1)
    with open(target.with_name("file.bin.part"), "ab") as file:
        file.write(CONTENT[-1:])
    files.fetch(server.url, target, timeout=10, sha256=DIGEST)
    assert len(server.asked) == 2 and target.read_bytes() == CONTENT and names(target) == ["file.bin"]


def test_a_partial_file_longer_than_the_servers(server, target):
    broken(server, target, 300_000)
    server.content = CONTENT[:1000]
    files.fetch(server.url, target, timeout=10)
    assert [("Range" in asked) for asked in server.asked] == [False, True, False]
    assert target.read_bytes() == CONTENT[:1000]


def test_a_chunked_answer(server, target):
    server.chunked = True
    seen = []
    files.fetch(server.url, target, lambda what, done, total: seen.append((done, total)), 10)
    assert target.read_bytes() == CONTENT and seen[-1] == (len(CONTENT), 0)
    target.unlink()
    broken(server, target, 300_000)


def test_another_file_than_the_published_one(server, target):
    for options, word in ((dict(sha256="00000000"), "SHA-256"), (dict(size=5), "1024000 bytes"),
                          (dict(size=len(CONTENT) + 1), "1024000 bytes")):
        with pytest.raises(InputError) as error:
            files.fetch(server.url, target, timeout=10, **options)
        assert word in str(error.value) and server.url in str(error.value) and "\n" not in str(error.value)
        assert names(target) == []
    server.chunked = True                                   # the length is known only once all has arrived
    with pytest.raises(InputError, match="bytes arrived"):
        files.fetch(server.url, target, timeout=10, size=500_000)
    assert names(target) == []


def test_a_resumed_download_is_checked_as_a_whole(server, target):
    broken(server, target, 300_000, sha256=DIGEST)
    with open(target.with_name("file.bin.part"), "r+b") as file:
        file.write(b"damage")
    with pytest.raises(InputError, match="SHA-256"):
        files.fetch(server.url, target, timeout=10, sha256=DIGEST)
    assert names(target) == []
    files.fetch(server.url, target, timeout=10, sha256=DIGEST)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404, 416, 500])
def test_an_error_of_the_server(server, target, status):
    server.status = status
    with pytest.raises(OSError, match=str(status)):
        files.fetch(server.url, target, timeout=10)
    assert names(target) == []
    server.status = None
    broken(server, target, 300_000)
    server.status = 404
    with pytest.raises(OSError, match="404"):
        files.fetch(server.url, target, timeout=10)
    assert names(target) == ["file.bin.part", "file.bin.part.json"]     # for when the server is back


def test_an_answer_longer_than_it_says_is_cut_there(server, target):
    server.length = 700_000
    files.fetch(server.url, target, timeout=10)
    assert target.read_bytes() == CONTENT[:700_000]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "file:///nowhere/at/all", "nonsense", "http://[x/y"])
def test_what_cannot_be_reached(target, url):
    with pytest.raises(OSError):
        files.fetch(url, target, timeout=10)
    assert names(target) == []


def test_an_existing_file_stays_until_the_new_one_is_whole(server, target):
    target.parent.mkdir()
    target.write_bytes(b"old")
    server.drop = 1000
    with pytest.raises(OSError):
        files.fetch(server.url, target, timeout=10)
    assert target.read_bytes() == b"old"
    files.fetch(server.url, target, timeout=10)
    assert target.read_bytes() == CONTENT


def test_two_at_once_download_once(server, target):
    """The second waits, then finds the file there. flock tells two open files apart, so threads will do."""
    server.gate, failures, waits = threading.Event(), [], []

    def download(progress=None):
        try:
            files.fetch(server.url, target, progress, 20)
        except BaseException as error:
            failures.append(error)

    def note(what, done, total):
        waits.append(what)
        server.gate.set()                                   # the second is known to be waiting

    first = threading.Thread(target=download)
    first.start()
    while not server.asked and first.is_alive():
        threading.Event().wait(0.01)
    second = threading.Thread(target=download, args=(note,))
    second.start()
    first.join(20)
    second.join(20)
    assert not failures and len(server.asked) == 1 and "another process" in waits[0]
    assert target.read_bytes() == CONTENT and names(target) == ["file.bin"]


def test_the_second_takes_over_when_the_first_fails(server, target):
    server.gate, server.drop, failures = threading.Event(), 300_000, []

    def first():
        try:
            files.fetch(server.url, target, timeout=20)
        except OSError as error:
            failures.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    while not server.asked and thread.is_alive():
        threading.Event().wait(0.01)
    files.fetch(server.url, target, lambda what, done, total: server.gate.set(), 20)
    thread.join(20)
    assert len(failures) == 1 and "300000 of" in failures[0]
    assert [asked.get("Range") for asked in server.asked] == [None, "bytes=300000-"]
    assert target.read_bytes() == CONTENT and names(target) == ["file.bin"]


def test_a_kept_file_is_not_asked_for_again(server, target):
    assert files.cached(server.url, target, sha256=DIGEST[:8]) == str(target)
    files.cached(server.url, target, sha256=DIGEST[:8], size=len(CONTENT))
    assert len(server.asked) == 1
    for wrong in (dict(sha256="00000000"), dict(size=3)):
        with pytest.raises(InputError, match="delete it to download"):
            files.cached(server.url, target, **wrong)
    assert target.exists()


def test_a_kept_files_download_that_fails_names_url_and_place(server, target):
    server.status = 404
    with pytest.raises(InputError) as error:
        files.cached(server.url, target, hint=" HINT")
    assert str(error.value).startswith(f"cannot fetch {server.url} (") and "404" in str(error.value)
    assert str(error.value).endswith(f"save it as {target} HINT")


def test_the_digest_that_a_url_carries():
    whole = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert files.hash_prefix(f"https://host/clip/models/{whole}/ViT-B-32.pt") == whole
    assert files.hash_prefix("https://host/resnet18-f37072fd.pth?x=1") == "f37072fd"
    assert files.hash_prefix(f"https://host/{whole}/resnet18-f37072fd.pth") == "f37072fd"
    for none in ("https://host/model.pth", "https://host/model-f37072f.pth", f"https://host/{whole}",
                 f"https://host/{whole[1:]}/a.pt", "https://host/x-F37072FD.pth"):
        assert files.hash_prefix(none) == ""


# ---------------------------------------------------------------------------------------------------------------
# Archives


def test_extract(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("top/one.txt", "1")
        archive.writestr("top/deep/two.txt", "22")
    files.extract(tmp_path / "a.zip", tmp_path / "new" / "folder")
    found = {str(path.relative_to(tmp_path / "new")): path.read_text() for path in (tmp_path / "new").rglob("*.txt")}
    assert found == {"folder/top/one.txt": "1", "folder/top/deep/two.txt": "22"}


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt"])
def test_extract_writes_nothing_when_a_name_leads_out(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.txt", "1")
        archive.writestr(name, "x")
    with pytest.raises(InputError, match="leads out"):
        files.extract(tmp_path / "a.zip", tmp_path / "x" / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_extract_refuses_a_bomb_before_writing(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(5 << 20))
    with pytest.raises(InputError, match="claim to hold 5242880"):
        files.extract(tmp_path / "a.zip", tmp_path / "out")
    monkeypatch.setattr(files, "MAX_EXPANSION", 10_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4 << 20}))
    with pytest.raises(InputError, match="5 MB.*room for 4"):
        files.extract(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", "ab" * 1000)               # small files may shrink as they like
    files.extract(tmp_path / "b.zip", tmp_path / "out")
    assert (tmp_path / "out" / "text").stat().st_size == 2000


def test_extract_names_a_damaged_archive(tmp_path):
    whole = tmp_path / "a.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for i in range(20):
            archive.writestr(f"file{i}", os.urandom(200))
    content = whole.read_bytes()
    damaged = [b"", b"no zip", content[:-10], content[:len(content) // 2], content[100:]]
    damaged += [content[:at] + bytes([content[at] ^ 255]) + content[at + 1:] for at in range(60, len(content), 331)]
    refused = 0
    for number, bad in enumerate(damaged):
        path = tmp_path / f"bad{number}.zip"
        path.write_bytes(bad)
        try:
            files.extract(path, tmp_path / f"out{number}")
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "delete it" in str(error) and "\n" not in str(error)
        except OSError as error:                            # a name that no file system takes
            assert isinstance(error, OSError)
    assert refused > 15


def test_extract_into_a_place_that_cannot_be_written(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one", "1")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        files.extract(tmp_path / "a.zip", pathlib.Path(tmp_path / "file" / "below"))
