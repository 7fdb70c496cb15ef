"""Writing blocks of ResNet-50's four layers: rows a second and fsyncs a block, beside another version of nacpipe.

    python bench/writer.py [--against CHECKOUT] [--blocks 16] [--rounds 5] [--folder DIR]

Each side is a process of its own with the code of its checkout, in turn, in the same folder; made-up states, of which
half are 0 as after a ReLU. Blocks are handed to the writer as extraction hands them. The ratio is the median of the
rounds'.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

NEURONS = {"avgpool": 2048, "layer3": 1024, "layer2": 512, "layer1": 256}
CLASSES, FEATURES, BLOCK_ROWS = 1000, 2048, 512
HERE = Path(__file__).resolve().parents[1]


def write(folder: Path, blocks: int) -> dict[str, float]:
    """Write one split with the nacpipe that is imported; return seconds and fsyncs of a block."""
    import inspect
    import time
    from collections import deque
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from nacpipe.cache import CacheWriter, Header, LayerSpec

    header = Header(
        identity={"benchmark": "made up"},
        information={},
        block_rows=BLOCK_ROWS,
        layers=tuple(LayerSpec(name=n, path=n, pooling="sum-nchw", neurons=w) for n, w in NEURONS.items()),
        classes=CLASSES,
        features=FEATURES,
    )
    rows = blocks * BLOCK_ROWS
    random = np.random.default_rng(0)
    arrays = {
        path: np.maximum(random.standard_normal((BLOCK_ROWS, width), np.float32), 0)
        for path, (width, _) in header.arrays().items()
        if width
    }
    known = {"label": np.zeros(rows, np.int64), "index": np.arange(rows)}
    first = "label" in inspect.signature(CacheWriter.prepare).parameters
    in_flight = 2 if first else 1  # extraction/pipeline.py
    writer = CacheWriter(folder / "c.zarr", header)
    writer.prepare("id/val", rows, {"list": "made up", "sha256": "0" * 64}, **(known if first else {}))
    calls, fsync = [0], os.fsync

    def count(handle: int) -> None:
        calls[0] += 1
        fsync(handle)

    os.fsync = count
    started, writing = time.perf_counter(), deque()
    with ThreadPoolExecutor(in_flight) as pool:
        for block in range(blocks):
            if len(writing) == in_flight:
                writing.popleft().result()
            part = {name: values[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS] for name, values in known.items()}
            writing.append(pool.submit(writer.write_block, "id/val", block, {**arrays, **part}))
        for done in writing:
            done.result()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "fsyncs": calls[0] / blocks, "rows": rows / seconds}


def run(checkout: Path, folder: Path, blocks: int) -> dict[str, float]:
    """Return what `write` finds in a process with a checkout's code."""
    target = folder / "side"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    words = [sys.executable, __file__, "--child", str(target), "--blocks", str(blocks)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(write(options.child, options.blocks)))
        return
    ratios = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for _ in range(options.rounds):
            ours = run(HERE, Path(name), options.blocks)
            print(f"here     {ours['rows']:7.0f} rows/s  {ours['fsyncs']:5.1f} fsyncs a block", flush=True)
            if options.against:
                other = run(options.against.resolve(), Path(name), options.blocks)
                print(f"against  {other['rows']:7.0f} rows/s  {other['fsyncs']:5.1f} fsyncs a block", flush=True)
                ratios.append(ours["rows"] / other["rows"])
    if ratios:
        print(f"rows a second here / against: median {statistics.median(ratios):.2f} of {[f'{r:.2f}' for r in ratios]}")


if __name__ == "__main__":
    main()
