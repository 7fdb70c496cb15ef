"""`nacpipe score` on shards: two processes, one of them killed and started again, against one process; and kills.

    python bench/shards.py [--images 100000] [--shards 100] [--kills 20] [--seed 0] [--workers auto]

Generated images of 32 × 32 in tar shards, ResNet-20 with random weights, a detector of the activations of avgpool and
layer3. Printed: whether every image has exactly one row; whether the parts of two ranks, of which one got SIGKILL in
the middle and was started again, equal those of one process, byte for byte; peak memory of one process over all shards
and over a tenth of them; and after how many kills of one process (at random moments after its first write) every part
was whole and the end equal. Exit code 1 on any difference. Not for Windows.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nacpipe.detector.file import write_detector
from nacpipe.detector.module import Detector
from nacpipe.detector.parts import read_part
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.models import find_model

ROOT = Path(__file__).resolve().parents[1]
TRANSFORM = {"resize": 32, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
Parts = dict[str, bytes]


@dataclass(slots=True)
class Bench:
    """Shards, a detector and its weights in a folder."""

    folder: Path
    images: int
    shards: int
    workers: str = "auto"
    python: Sequence[str] = (sys.executable,)

    def words(self, out: Path, shards: int | None = None) -> list[str]:
        """Return what Python is called with."""
        last = (shards or self.shards) - 1
        words = ["score", str(self.folder / "d.safetensors"), f"{self.folder}/in/{{0000..{last:04}}}.tar"]
        words += [
            "--workers",
            self.workers,
            "--model",
            "resnet20",
            "--checkpoint",
            str(self.folder / "resnet20.pth"),
            "--device",
            "cpu",
        ]
        return ["-m", "nacpipe", *words, "--output", str(out)]

    def start(self, out: Path, rank: int = 0, world: int = 1, shards: int | None = None) -> subprocess.Popen[bytes]:
        variables = {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT)}
        with Path(self.folder, f"log-{rank}.txt").open("wb") as log:
            command = [*self.python, *self.words(out, shards)]
            return subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)

    def finish(self, process: subprocess.Popen[bytes], rank: int = 0) -> float:
        """Wait for a process and return its peak memory in MiB."""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, Path(self.folder, f"log-{rank}.txt").read_text()
        return float(usage.ru_maxrss) / 1024


def make_bench(folder: Path, images: int, shards: int, seed: int = 0) -> Bench:
    """Write the shards, the weights and the detector."""
    (folder / "in").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(shards):
        first, last = images * number // shards, images * (number + 1) // shards
        with tarfile.open(folder / f"in/{number:04}.tar", "w") as archive:
            for row in range(first, last):
                content = io.BytesIO()
                coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR).save(content, "png")
                member = tarfile.TarInfo(f"{row:07}.png")
                member.size = content.tell()
                content.seek(0)
                archive.addfile(member, content)
    torch.manual_seed(seed)
    network = find_model("resnet20").build(10)
    torch.save(network.state_dict(), folder / "resnet20.pth")
    batch = torch.randn(300, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    layers = {
        name: LayerParams(bins=200, saturation=20, alpha=alpha, source="activation")
        for name, alpha in (("avgpool:activation", 0.5), ("layer3:activation:by_class", 0.01))
    }
    detector = Detector.fit(network, [batch], NacParams(layers=layers))
    detector.calibrate([batch])
    exported = detector.exported
    identity = {name: value for name, value in exported.identity.items() if name != "input"}
    identity |= {"architecture": "resnet20", "transform": TRANSFORM}
    write_detector(folder / "d.safetensors", replace(exported, identity=identity))
    return Bench(folder, images, shards)


def read_parts(out: Path) -> Parts:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def count_images(out: Path) -> dict[str, int]:
    """How many rows each image has."""
    counts: dict[str, int] = {}
    for path in sorted(out.glob("*.csv")):
        for name in read_part(str(path)).image:
            counts[name] = counts.get(name, 0) + 1
    return counts


def check_two_ranks(bench: Bench, alone: Parts) -> list[str]:
    """Two ranks, one killed in the middle and started again; return what differs from one process."""
    out = bench.folder / "two"
    first, second = bench.start(out, 0, 2), bench.start(out, 1, 2)
    before = {name for name in alone if name.endswith(".csv")}
    own = {f"{number:04}.csv" for number in range(1, bench.shards, 2)}
    while second.poll() is None and len(own & {path.name for path in out.glob("*.csv")}) < max(len(own) // 2, 1):
        time.sleep(0.002)
    killed = second.poll() is None
    second.send_signal(signal.SIGKILL)
    second.wait()
    bench.finish(first)
    left = {path.name for path in out.glob("*.csv")}
    differences = [] if killed and before - left <= own else [f"killed: {killed}, lost: {sorted(before - left)}"]
    bench.finish(bench.start(out, 1, 2), 1)
    counts = count_images(out)
    if len(counts) != bench.images or set(counts.values()) != {1}:
        differences.append(f"{len(counts)} of {bench.images} images have rows, up to {max(counts.values())} each")
    found = read_parts(out)
    return differences + [f"two ranks: {name}" for name in sorted(alone) if found.get(name) != alone[name]]


def check_kills(bench: Bench, alone: Parts, kills: int, seed: int) -> tuple[int, list[str]]:
    """Kill one process again and again; return the kills that hit it at work, and what differs."""
    dice, out, hits = random.Random(seed), bench.folder / "killed", 0
    differences: list[str] = []
    while hits < kills and not differences:
        process = bench.start(out)
        drafts_or_parts = set(os.listdir(out)) if out.is_dir() else set()
        while process.poll() is None and not (out.is_dir() and set(os.listdir(out)) - drafts_or_parts):
            time.sleep(0.001)
        time.sleep(dice.random() * 0.5)
        hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = read_parts(out)
        differences += [f"kill {hits}: {name}" for name, part in found.items() if part != alone.get(name)]
        if len(found) == len(alone):
            shutil.rmtree(out)
    bench.finish(bench.start(out))
    found = read_parts(out)
    if found != alone:
        differences.append("the end differs")
    return hits, differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", default="auto", help="processes that decode images, of each rank")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(Path(folder), args.images, args.shards, args.seed)
        bench.workers = args.workers
        started = time.monotonic()
        peak = bench.finish(bench.start(Path(folder, "one")))
        seconds = time.monotonic() - started
        few = max(args.shards // 10, 1)
        small = bench.finish(bench.start(Path(folder, "few"), shards=few))
        print(
            f"one process: {args.images} images in {args.shards} shards, {seconds:.0f} s; peak {peak:.0f} MiB, over"
            f" {few} shards {small:.0f} MiB: {peak / small:.3f}"
        )
        alone = read_parts(Path(folder, "one"))
        differences = check_two_ranks(bench, alone)
        print(f"two ranks, one killed and started again: {'; '.join(differences) or 'every image once, equal'}")
        hits, more = check_kills(bench, alone, args.kills, args.seed)
        print(f"{hits} kills: {'; '.join(more) or 'parts whole or absent, the end equal'}")
    sys.exit(bool(differences or more))


if __name__ == "__main__":
    main()
