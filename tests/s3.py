"""An S3 endpoint process (moto_server), and a proxy before it that does not always do what it is asked."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BUCKET = "caches"
FAULTS = {
    "500": "an error of the server",
    "503": "slow down",
    "slow": "an answer after a while",
    "refused": "the connection cut before the request is done",
    "lost": "the request done, the connection cut before the answer",
    "torn": "the connection cut within the answer",
}


def variables(url: str) -> dict[str, str]:
    """The environment that leads to an endpoint."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    return {**dict.fromkeys(names, "test"), "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url}


@contextlib.contextmanager
def endpoint(folder: Path) -> Iterator[str]:
    """Start an S3 endpoint with one empty bucket; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **variables(url)})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "moto.log").read_text()
                time.sleep(0.1)
        else:
            raise AssertionError(f"no endpoint after a minute: {(folder / 'moto.log').read_text()}")
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 endpoint; each test writes below a key of its own."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with endpoint(tmp_path_factory.mktemp("moto")) as url:
        yield url


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an endpoint, but for a share of them, drawn with a seed, up to a limit."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: str, *, share: float = 0.0, limit: int = sys.maxsize, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.share, self.limit, self.slow = share, limit, 0.3
        self.only: str | None = None  # one kind alone
        self.faults: Counter[str] = Counter()
        self.hit: Counter[str] = Counter()  # by method
        self.requests: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    def draw(self, method: str, path: str) -> str:
        """The fault of the next request, empty for none."""
        with self._lock:
            self.requests[method] += 1
            if self.faults.total() >= self.limit or self._random.random() >= self.share:
                return ""
            kind = self.only or self._random.choice(list(FAULTS))
            self.faults[kind] += 1
            self.hit[method] += 1
            return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up, which is no news."""

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.draw(self.command, self.path)
        if kind.isdigit():
            self.close_connection = True
            self.wfile.write(f"HTTP/1.1 {kind} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            return
        if kind == "slow":
            time.sleep(self.server.slow)
        if kind == "refused":
            self.close_connection = True
            return
        onward = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            onward.request(self.command, self.path, body, dict(self.headers.items()))
            reply = onward.getresponse()
            content = reply.read()
        finally:
            onward.close()
        if kind == "lost":
            self.close_connection = True
            return
        head = [f"HTTP/1.1 {reply.status} {reply.reason}"]
        head += [
            f"{name}: {value}"
            for name, value in reply.getheaders()
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "keep-alive")
        ]
        length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        raw = "\r\n".join([*head, f"Content-Length: {length or 0}", "", ""]).encode() + content
        if kind == "torn":
            self.close_connection = True
            raw = raw[: len(raw) - len(content) // 2 - 1]
        self.wfile.write(raw)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""
