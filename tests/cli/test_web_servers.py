"""A finished cache behind a web server, in a process of its own: searched and evaluated as in a folder.

Counted: one request for all metadata, then chunks.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache
from nacpipe.cli import main

pytest.importorskip("obstore")
pytestmark = pytest.mark.server

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    log_format short '"$request_method $uri" $status';
    access_log {folder}/access.log short;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; autoindex off; }}
}}
"""


@contextlib.contextmanager
def server(kind: str, root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Serve a folder by a process; yield its address and its log, with a line `"GET /path …" status` a request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "access.log"
    if kind == "nginx":
        (folder / "nginx.conf").write_text(CONFIGURATION.format(folder=folder, root=root, port=port))
        words = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    else:
        words = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(root)]
    with log.open("wb") as said, subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said) as process:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.terminate()


def requests(log: Path) -> list[tuple[str, str, int]]:
    """(method, path, status) of every request."""
    found = re.findall(r'"(\w+) (\S+)[^"]*" (\d{3})', log.read_text())
    return [(method, path, int(status)) for method, path, status in found]


def nacpipe(*args: str) -> str:
    done = CliRunner().invoke(main, list(args), prog_name="nacpipe")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("kind", ["python", "nginx"])
def test_it_is_searched_and_evaluated_as_in_a_folder(
    kind: str, make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    if kind == "nginx" and NGINX is None:
        pytest.skip("nginx is not installed")
    here = Path(make_cache(tmp_path / "www" / "x.zarr").path)
    with server(kind, tmp_path / "www", tmp_path) as (address, log):
        if kind == "nginx":  # no listings
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"{address}/x.zarr/")
            while not requests(log):  # the line comes after the answer
                time.sleep(0.01)
        before = len(requests(log))
        url = f"{address}/x.zarr"
        files = ("--storage", str(tmp_path / "s.log"), "--output", str(tmp_path / "p.json"))
        nacpipe("search", url, *files, "--space", "paper", "--trials", "20")
        nacpipe("search", str(here), "--space", "paper", "--trials", "20")
        ours, theirs = (
            json.loads(path.read_text()) for path in (here.with_suffix(".params.json"), tmp_path / "p.json")
        )
        assert theirs["layers"] == ours["layers"]
        searched = requests(log)[before:]
        tables = [
            nacpipe("evaluate", cache, "--params", str(tmp_path / "p.json"), "--json") for cache in (url, str(here))
        ]
        assert json.loads(tables[0]) == json.loads(tables[1])
        evaluated = requests(log)[before + len(searched) :]
    for asked in (searched, evaluated):
        assert {(method, status) for method, _, status in asked} <= {("GET", 200), ("GET", 206)}
        paths = Counter(path for _, path, _ in asked)
        metadata = {path: count for path, count in paths.items() if path.endswith(("zarr.json", "/"))}
        assert metadata == {"/x.zarr/zarr.json": 1}
        assert all(re.search(r"/c\.\d+(\.0)?$", path) for path in paths if path not in metadata)
    assert max(Counter(path for _, path, _ in searched).values()) <= 2  # logits: by the yardstick as well
