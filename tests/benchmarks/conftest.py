"""A server of archives on this machine, and a data root that they fit."""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server:
    """Serves files by name, in parts where asked for; `cut` ends an answer after so many bytes, once."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []  # name, Range
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                part = self.headers.get("Range", "")
                outer.asked.append((name, part))
                if name not in outer.files:
                    self.send_error(404)
                    return
                content = outer.files[name]
                start = int(part.removeprefix("bytes=").partition("-")[0]) if part else 0
                self.send_response(206 if part else 200)
                if part:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                end = outer.cut.pop(name, len(content))
                self.wfile.write(content[start:end])
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


def pack(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


LISTS = {
    "train_cifar10.txt": "cifar10/train/cat/1.png 3\ncifar10/train/dog/1.png 5\n",
    "val_cifar10.txt": "cifar10/test/cat/1.png 3\n",
    "test_cifar10.txt": "cifar10/test/cat/2.png 3\n",
    "test_cifar10c.txt": "cifar10c/1.png 3\n",
    "val_tin.txt": "tin/val/1.JPEG -1\n",
    "test_cifar100.txt": "cifar100/test/1.png -1\n",
    "test_tin.txt": "tin/val/2.JPEG -1\n",
    "test_mnist.txt": "mnist/test/1.png -1\n",
    "test_svhn.txt": "svhn/test/1.png -1\n",
    "test_texture.txt": "texture/banded/1.jpg -1\n",
    "test_places365.txt": "places365/airfield/1.jpg -1\n",
}
IMAGES = {
    "cifar10": ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/cat/2.png"],
    "cifar100": ["test/1.png"],
    "tin": ["tin/val/1.JPEG", "tin/val/2.JPEG"],  # its own folder once more
    "mnist": ["test/1.png"],
    "svhn": ["test/1.png"],
    "texture": ["banded/1.jpg"],
    "places365": ["airfield/1.jpg"],
    "cifar10c": ["1.png"],
}


@pytest.fixture
def mirror(server: Server) -> Server:
    """All of cifar10's archives, with empty pictures."""
    lists = {f"benchmark_imglist/cifar10/{name}": text.encode() for name, text in LISTS.items()}
    server.files["benchmark_imglist.zip"] = pack(lists)
    for name, files in IMAGES.items():
        server.files[f"{name}.zip"] = pack({file: f"{name} {file}".encode() * 50 for file in files})
    run = "cifar10_resnet18_32x32_base_e100_lr0.1_default"
    server.files["cifar10_res18_v1.5.zip"] = pack({f"{run}/s{i}/best.ckpt": b"weights" for i in range(3)})
    return server
