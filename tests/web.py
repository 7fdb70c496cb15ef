"""Web servers before a folder: those that list what is in it, with byte ranges or without, and one that does not."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's own server: pages of folders, no byte ranges."""

    folder = ""
    requests: Counter[str]
    """Method and path of each request, which `serve` counts."""

    def translate_path(self, path: str) -> str:
        self.directory = self.folder
        return super().translate_path(path)

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        if parsed:
            self.requests[f"{self.command} {self.path}"] += 1
        return parsed

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


class Ranges(Plain):
    """One that sends the bytes that are asked for, as nginx and Apache do."""

    def do_GET(self) -> None:
        wanted, file = self.headers.get("Range"), Path(self.translate_path(self.path))
        if wanted is None or not file.is_file():
            super().do_GET()
            return
        content = file.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = int(last) + 1 if first and last else len(content)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(content[start:stop]) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content[start:stop])))
        self.end_headers()
        self.wfile.write(content[start:stop])


class Blind(Plain):
    """One that shows no folders, as most do."""

    def list_directory(self, path: object) -> None:
        self.send_error(404)


@contextlib.contextmanager
def serve(folder: Path, kind: type[Plain], requests: Counter[str] | None = None) -> Iterator[str]:
    """Serve a folder while this lasts; yield its address.

    Args:
        folder: what is served.
        kind: the server.
        requests: counts the requests, as `GET /x.zarr/zarr.json`.
    """
    handler = type("Handler", (kind,), {"folder": str(folder), "requests": Counter() if requests is None else requests})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
