"""Downloads against a real server on loopback."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading

import pytest

from calibrate.fetch import FetchFailed, fetch

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/cut" else CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_pinned_file_arrives_whole(server, tmp_path):
    fetch(f"{server}/t", DIGEST.upper(), tmp_path / "new" / "t")
    assert (tmp_path / "new" / "t").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "digest", "message"),
    [
        ("/t", "0" * 64, "SHA-256 is .* another file, or damaged"),
        ("/cut", DIGEST, "broke off|truncated"),
        ("/missing", DIGEST, "answers 404"),
        ("/t", "12ab", "not 64 hex digits"),
    ],
)
def test_nothing_is_written_when_anything_is_wrong(server, tmp_path, path, digest, message):
    with pytest.raises(FetchFailed, match=message):
        fetch(server + path, digest, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_without_a_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(FetchFailed, match=r"cannot be reached.*no download is needed"):
        fetch(f"http://127.0.0.1:{port}/t", DIGEST, tmp_path / "t")
    with pytest.raises(FetchFailed, match="not an http"):
        fetch("ftp://127.0.0.1/t", DIGEST, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []
