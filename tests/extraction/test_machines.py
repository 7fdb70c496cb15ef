"""Two machines that share nothing but a network and an S3 endpoint, as two network namespaces of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.extraction.test_distributed import command, environment, extract_words
from tests.s3 import BUCKET, variables

pytest.importorskip("obstore")
pytest.importorskip("moto")

pytestmark = [pytest.mark.server, pytest.mark.slow]

ADDRESSES = ("10.213.77.1", "10.213.77.2")
URL = f"http://{ADDRESSES[0]}:5511"
Inside = Callable[[int, list[str]], list[str]]


@pytest.fixture
def inside() -> Iterator[Inside]:
    """Make two network namespaces with a cable between them; the result prefixes a command with one of them."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    if not (shutil.which("ip") and shutil.which("nsenter")):
        pytest.skip("network namespaces are made with ip (iproute2) and entered with nsenter (util-linux)")
    names, ends = [f"nacpipe{os.getpid()}{side}" for side in "ab"], ("cable0", "cable1")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield lambda side, words: ["nsenter", f"--net=/var/run/netns/{names[side]}", *words]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system makes no network namespaces: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def machine(inside: Inside, side: int, cache: str) -> subprocess.Popen[str]:
    """One torchrun of two, in a folder and with an address of its own."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29511", "--rdzv-id", "two", "--local-addr", ADDRESSES[side]]
    launcher += ["--rdzv-conf", f"is_host={int(side == 0)}"]  # both have the same host name
    words = inside(side, [sys.executable, *launcher, *extract_words(cache)])
    names = {**environment(), **variables(URL), "GLOO_SOCKET_IFNAME": f"cable{side}"}
    return subprocess.Popen(words, env=names, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


MAKE_BUCKET = """
import sys, time, urllib.request
for _ in range(600):
    try:
        urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="PUT"), timeout=10).close()
        break
    except OSError:
        time.sleep(0.1)
else:
    sys.exit("no endpoint after a minute")
"""

COMPARE = """
import sys
from nacpipe.cache import open_cache
from nacpipe.cache.consolidated import copy_is_stale
from tests.extraction.test_distributed import same
whole, shared = open_cache(sys.argv[1]), open_cache(sys.argv[2])
print(list(shared), same(whole, shared), copy_is_stale(shared.root, shared.header))
"""


def test_two_machines_write_one_cache_at_s3(inside: Inside, tmp_path: Path) -> None:
    """The endpoint is a process on the first, and neither reaches anything but the other."""
    whole, cache = tmp_path / "whole.zarr", f"s3://{BUCKET}/two.zarr"
    names = {**environment(), **variables(URL)}
    subprocess.run(command(whole), check=True, env=environment(), capture_output=True)
    processes: list[subprocess.Popen[Any]] = []
    with (tmp_path / "moto.log").open("wb") as log:
        moto = inside(0, [sys.executable, "-m", "moto.server", "-H", ADDRESSES[0], "-p", URL.rpartition(":")[2]])
        processes.append(subprocess.Popen(moto, stdout=log, stderr=log, env=names))
        try:
            subprocess.run(inside(1, [sys.executable, "-c", MAKE_BUCKET, f"{URL}/{BUCKET}"]), check=True)
            machines = [machine(inside, side, cache) for side in range(2)]
            processes += machines
            texts = [process.communicate(timeout=240) for process in machines]
            assert [process.returncode for process in machines] == [0, 0], texts
            assert "".join(out for out, _ in texts).count("ood/near/letters") == 1, "the first rank alone prints"
            words = inside(1, [sys.executable, "-c", COMPARE, str(whole), cache])
            compared = subprocess.run(words, env=names, capture_output=True, text=True)
            assert compared.stdout == "['id/val', 'ood/val', 'ood/near/letters'] True False\n", compared.stderr
        finally:
            for process in processes:
                process.kill()
                process.wait()
