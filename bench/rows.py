"""Memory and time of an evaluation as the test sets grow: 1,000,000 images against 100,000.

    python bench/rows.py [--small 100000] [--large 1000000] [--folder FOLDER] [--baselines NAMES]

Writes two caches of 960 neurons in four layers (512, 256, 128, 64), 512 features and 10 logits, half of the images
id/test and half ood/near/rows, and evaluates each in a process of its own: NAC on all four layers, MSP, MaxLogit and
Energy, and the baselines asked for. States are eight blocks of values of 8 bits, written in turn, so that the large
cache needs 2 GB and not 10; logits are drawn anew for every image. Peak memory is the operating system's; seconds are
those of `evaluate`, loops compiled and the cache opened before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from nacpipe.cache import CacheWriter, Header, LayerSpec

WIDTHS = {"avgpool": 512, "layer3": 256, "layer2": 128, "layer1": 64}
CLASSES, FEATURES, BLOCK = 10, 512, 512

CHILD = """
import sys, time
from nacpipe.cache import open_cache
from nacpipe.core.params import LayerParams, NacParams
from nacpipe.search.evaluate import evaluate
from nacpipe.search.scored import evaluated_splits

path, warm, names = sys.argv[1:]
params = NacParams(layers={name: LayerParams(bins=500, saturation=50, alpha=1.0) for name in
                           ("avgpool", "layer3", "layer2", "layer1")})

def run(path):
    cache, more = open_cache(path), {}
    if names:
        from nacpipe.network.baselines import score_baselines
        more = score_baselines(cache, names.split(","), evaluated_splits(cache))
    return evaluate(cache, params, more=more)

run(warm)
started = time.perf_counter()
frame = run(path)
print(time.perf_counter() - started)
assert frame["auroc"].notna().any()
"""


def write(path: Path, rows: int) -> None:
    layers = tuple(LayerSpec(name=n, path=n, pooling="sum-nchw", neurons=w) for n, w in WIDTHS.items())
    header = Header(
        identity={"benchmark": "rows", "weights": "none"}, information={}, block_rows=BLOCK, layers=layers,
        classes=CLASSES, features=FEATURES,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    writer = CacheWriter(path, header)
    writer.write_classifier(rng.normal(size=(CLASSES, FEATURES)).astype(np.float32), np.zeros(CLASSES, np.float32))
    levels = rng.normal(size=256).astype(np.float32)
    shapes = {key: width for key, (width, kind) in header.arrays().items() if kind == "float32" and key != "logits"}
    pool = [{key: levels[rng.integers(256, size=(BLOCK, width))] for key, width in shapes.items()} for _ in range(8)]
    for name, count in {"id/train": 1000, "id/val": 1000, "id/test": rows // 2, "ood/near/rows": rows // 2}.items():
        writer.prepare(name, count, {"list": name, "sha256": name})
        for block, start in enumerate(range(0, count, BLOCK)):
            size = min(BLOCK, count - start)
            arrays = {key: values[:size] for key, values in pool[block % len(pool)].items()}
            arrays |= {"logits": rng.normal(size=(size, CLASSES)).astype(np.float32)}
            arrays |= {"label": np.arange(start, start + size) % CLASSES, "index": np.arange(start, start + size)}
            writer.write_block(name, block, arrays)
        writer.seal(name)


def measure(path: Path, warm: Path, names: str) -> tuple[float, float]:
    """Seconds and peak MiB."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(warm), names], stdout=subprocess.PIPE)
    assert child.stdout is not None
    seconds = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the evaluation of {path} failed")
    return float(seconds), usage.ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the caches are written; default: the temporary folder")
    parser.add_argument("--baselines", default="", help="names, or all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        warm = Path(folder) / "warm.zarr"
        write(warm, 2000)
        found = []
        for rows in (args.small, args.large):
            path = Path(folder) / f"{rows}.zarr"
            write(path, rows)
            stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            seconds, peak = measure(path, warm, args.baselines)
            found.append(seconds / rows)
            print(
                f"{rows} images: {stored / 2**30:.2f} GiB stored, {seconds:.1f} s, {1e6 * seconds / rows:.1f} us per"
                f" image, peak {peak:.0f} MiB",
                flush=True,
            )
        print(f"time per image, large against small: {found[1] / found[0]:.3f}")
