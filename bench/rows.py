"""Memory and time of an evaluation as the test sets grow: 1,000,000 images against 100,000.

    python bench/rows.py [--small 100000] [--large 1000000] [--repeats 1] [--folder FOLDER] [--baselines NAMES]

Writes two caches of 960 neurons in four layers (512, 256, 128, 64), 512 features and 10 logits, half of the images
id/test and half ood/near/rows, and evaluates each in a process of its own: NAC on all four layers, MSP, MaxLogit and
Energy, and the baselines asked for. States are eight blocks of multiples of 1/16, written in turn, so that the large
cache needs 3 GB and not 10; logits are drawn anew for every image. Peak memory is the operating system's; seconds are
those of `evaluate`, loops compiled before. Where others use the machine too, both sides meet the same of them: the
small cache is evaluated before and after the large one as often as it fits into it, and means are compared.
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
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.evaluation.evaluate import evaluate
from nacpipe.evaluation.method_scores import evaluated_splits

path, warm, names = sys.argv[1:]
params = NacParams(layers={name: LayerParams(bins=500, saturation=50, alpha=1.0) for name in
                           ("avgpool", "layer3", "layer2", "layer1")})

def run(path):
    cache, more = open_cache(path), {}
    if names:
        from nacpipe.evaluation.baselines import score_baselines
        more = score_baselines(cache, names.split(","), evaluated_splits(cache))
    return evaluate(cache, params, more=more)

run(warm)
wall, cpu = time.perf_counter(), time.process_time()
frame = run(path)
print(time.perf_counter() - wall, time.process_time() - cpu)
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
    shapes = {key: width for key, (width, kind) in header.arrays().items() if kind == "float32" and key != "logits"}
    pool = [  # few bits of mantissa compress well
        {key: (np.round(16 * rng.normal(size=(BLOCK, w))) / 16).astype(np.float32) for key, w in shapes.items()}
        for _ in range(8)
    ]
    for name, count in {"id/train": 1000, "id/val": 1000, "id/test": rows // 2, "ood/near/rows": rows // 2}.items():
        index = np.arange(count)
        writer.prepare(name, count, {"list": name, "sha256": name}, label=index % CLASSES, index=index)
        for block, start in enumerate(range(0, count, BLOCK)):
            size = min(BLOCK, count - start)
            arrays = {key: values[:size] for key, values in pool[block % len(pool)].items()}
            arrays |= {"logits": rng.normal(size=(size, CLASSES)).astype(np.float32)}
            places = index[start : start + size]
            arrays |= {"label": places % CLASSES, "index": places}
            writer.write_block(name, block, arrays)
        writer.seal(name)


def measure(path: Path, warm: Path, names: str) -> tuple[float, float, float]:
    """Seconds on the clock, seconds of all cores, peak MiB."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(warm), names], stdout=subprocess.PIPE)
    assert child.stdout is not None
    wall, cpu = (float(word) for word in child.stdout.read().split() or ("nan", "nan"))
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the evaluation of {path} failed")
    return wall, cpu, usage.ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the caches are written; default: the temporary folder")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--baselines", default="", help="names, or all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        warm = Path(folder) / "warm.zarr"
        write(warm, 2000)
        sizes = {rows: Path(folder) / f"{rows}.zarr" for rows in (args.small, args.large)}
        for rows, path in sizes.items():
            write(path, rows)
        found: dict[int, list[tuple[float, float, float]]] = {rows: [] for rows in sizes}
        for _ in range(args.repeats):
            half = args.large // args.small // 2
            for rows in [args.small] * half + [args.large] + [args.small] * half:
                found[rows].append(measure(sizes[rows], warm, args.baselines))
        mean = {rows: [sum(values) / len(runs) for values in zip(*runs, strict=True)] for rows, runs in found.items()}
        for rows, path in sizes.items():
            stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            wall, cpu = (1e6 * seconds / rows for seconds in mean[rows][:2])
            peak = max(run[2] for run in found[rows])
            print(
                f"{rows} images: {stored / 2**30:.2f} GiB stored, {mean[rows][0]:.1f} s, {wall:.1f} us per image"
                f" ({cpu:.1f} of all cores), peak {peak:.0f} MiB"
            )
        ratios = [mean[args.large][i] / args.large / (mean[args.small][i] / args.small) for i in (0, 1)]
        print(f"time per image, large against small: {ratios[0]:.3f} on the clock, {ratios[1]:.3f} of all cores")
