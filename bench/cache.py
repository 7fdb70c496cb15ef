"""The cache's own work on many rows: peak memory and seconds to write, seal, verify, repair and convert, and to read.

    python bench/cache.py [--small 10000] [--large 100000] [--shard-blocks 8] [--folder DIR]
    python bench/cache.py --rows 1280000 [--folder DIR]

Made-up states of one layer of 64 neurons and 10 classes, blocks of 512 rows. Each step is a process of its own; peak
memory is the operating system's. `--small` and `--large`: the ratio of the peaks, not sharded and sharded. `--rows`: a
training set of that size and a validation set of 5,000; what is on the disk; opening, the index of a search, a trial.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NEURONS, CLASSES, BLOCK_ROWS = 64, 10, 512
STEPS = ("write", "seal", "verify", "repair", "convert")


def step(what: str, path: Path, rows: int, shard_blocks: int) -> None:
    """Do one step; the caller measures the process."""
    from nacpipe.cache import CacheWriter, Header, LayerSpec, open_cache
    from nacpipe.cache.convert import convert_cache
    from nacpipe.cache.repair import repair_cache
    from nacpipe.cache.verify import verify_cache

    header = Header(
        identity={
            **dict.fromkeys(("benchmark", "architecture", "family", "dtype"), "made up"),
            "weights": "a" * 64,
            "transform": {"resize": 8, "crop": 8, "mean": [0.5], "std": [0.5]},
        },
        information={},
        block_rows=BLOCK_ROWS,
        layers=(LayerSpec(name="wide", path="wide", pooling="none", neurons=NEURONS),),
        classes=CLASSES,
        features=0,
        shard_blocks=shard_blocks,
    )
    if what == "write":
        writer = CacheWriter(path, header)
        for name, count in {"id/train": rows, "id/val": 5000, "ood/val": 5000}.items():
            write_split(writer, name, count)
    elif what == "seal":
        writer = CacheWriter(path, header)
        for name in ("id/train", "id/val", "ood/val"):
            writer.seal(name)
    elif what == "verify":
        assert verify_cache(open_cache(path)) == []
    elif what == "repair":
        assert repair_cache(path) == []
    elif what == "convert":
        convert_cache(path, path.with_name(f"{path.stem}-copy.zarr"))
    elif what == "open":
        started = time.perf_counter()
        opened = open_cache(path)["id/train"].rows
        print(f"opened, with its seal compared: {time.perf_counter() - started:.2f} s, {opened} rows")
    elif what == "index":
        from nacpipe.method.params import LayerParams, NacParams
        from nacpipe.scoring.coverage import score_splits
        from nacpipe.scoring.trial_scorer import TermIndexes

        cache = open_cache(path)
        started = time.perf_counter()
        TermIndexes(cache, ["id/val", "ood/val"])("wide", "product")
        print(f"index of the training set and 10,000 rows: {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
        params = NacParams(layers={"wide": LayerParams(bins=50, saturation=100, alpha=1.0)})
        scores = score_splits(cache, params, ["id/val", "ood/val"])
        print(f"scored: {time.perf_counter() - started:.2f} s, mean {scores['id/val'].mean():.4f}")


def write_split(writer: object, name: str, rows: int) -> None:
    """Write the blocks of a split, as extraction does: a few at a time."""
    from nacpipe.cache import CacheWriter

    assert isinstance(writer, CacheWriter)
    random = np.random.default_rng(len(name))
    shift = 0.5 if name.startswith("ood") else 0.0
    known = {"label": np.arange(rows) % CLASSES, "index": np.arange(rows)}
    done = writer.prepare(name, rows, {"list": "made up", "sha256": "0" * 64}, **known)
    unit = writer.header.shard_blocks
    for block in range(0, done.size, unit):
        part = slice(block * BLOCK_ROWS, min((block + unit) * BLOCK_ROWS, rows))
        size = part.stop - part.start
        arrays = {
            writer.header.layer_array("wide", what): random.standard_normal((size, NEURONS), np.float32) + shift
            for what in ("activation", "gradient")
        }
        logits = random.standard_normal((size, CLASSES), np.float32)
        rest = {key: values[part] for key, values in known.items()}
        writer.write_block(name, block, {**arrays, "logits": logits, **rest})


def measure(what: str, path: Path, rows: int, shard_blocks: int) -> tuple[float, float]:
    """Return the peak memory in MiB and the seconds of a step."""
    words = [sys.executable, __file__, "--step", what, "--path", str(path), "--rows", str(rows)]
    started = time.perf_counter()
    child = subprocess.Popen([*words, "--shard-blocks", str(shard_blocks)])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{what} failed")
    return usage.ru_maxrss / 1024, time.perf_counter() - started


def compare(folder: Path, small: int, large: int, shard_blocks: int) -> None:
    """Print the peaks of every step at both sizes."""
    for blocks in (1, shard_blocks):
        for what in STEPS:
            peaks = [measure(what, folder / f"{rows}-{blocks}.zarr", rows, blocks)[0] for rows in (small, large)]
            kind = "not sharded" if blocks == 1 else f"shards of {blocks} blocks"
            print(
                f"{what:8} {kind:18} {small} rows {peaks[0]:.0f} MiB, {large} rows {peaks[1]:.0f} MiB:"
                f" {peaks[1] / peaks[0]:.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--shard-blocks", type=int, default=8)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    if options.step:
        step(options.step, options.path, options.rows, options.shard_blocks)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if options.rows is None:
            compare(Path(name), options.small, options.large, options.shard_blocks)
            return
        path = Path(name, "c.zarr")
        for what in ("write", "seal", "open", "index"):
            peak, seconds = measure(what, path, options.rows, 1)
            print(f"{what}: {seconds:.1f} s with the start of Python, peak {peak:.0f} MiB", flush=True)
        files = [file for file in path.rglob("*") if file.is_file()]
        print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
