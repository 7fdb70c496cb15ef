"""The whole default search at ImageNet ResNet-50 sizes: time and memory, and cross-validation with feature scores.

Measured: `nacpipe search CACHE` as a process of its own, its study new, a journal, compiled loops on disk; its seconds
and its peak memory. The cache holds made-up states of 2048, 1024, 512 and 256 neurons, 1,000 classes, 1,000 training
images and 7,763 of the validation splits.

    python bench/default.py [--fuse auto]

Bars: 90 s on two idle cores; peak memory at most 4 times the float32 bytes of one source of all layers and rows.
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

from nacpipe.cache import CacheWriter, Header, LayerSpec

NEURONS = {"avgpool": 2048, "layer3": 1024, "layer2": 512, "layer1": 256}
ROWS = {"id/train": 1000, "id/subtrain": 1000, "id/val": 5000, "ood/val": 1763}
CLASSES, BLOCK = 1000, 512


def write_cache(path: Path) -> None:
    """Activations after a ReLU; those of `avgpool` are the features of a classifier of random rows."""
    random = np.random.default_rng(0)
    header = Header(
        identity={"benchmark": "imagenet", "family": "resnet", "architecture": "made up", "weights": "0" * 64},
        information={},
        block_rows=BLOCK,
        layers=tuple(
            LayerSpec(name=name, path=name, pooling="sum-nchw", neurons=neurons) for name, neurons in NEURONS.items()
        ),
        classes=CLASSES,
        features=NEURONS["avgpool"],
    )
    writer = CacheWriter(path, header)
    weight = random.standard_normal((CLASSES, header.features), np.float32) / np.float32(16)
    bias = np.zeros(CLASSES, np.float32)
    writer.write_classifier(weight, bias)
    for split, rows in ROWS.items():
        wide = np.float32(1.5 if split == "ood/val" else 1.0)
        label = random.integers(0, CLASSES, rows)
        arrays: dict[str, np.ndarray] = {"label": label, "index": np.arange(rows)}
        for name, neurons in NEURONS.items():
            values = random.standard_normal((rows, neurons), np.float32) * wide
            if name == "avgpool" and not split.startswith("ood/"):
                values += 4 * weight[label]
            arrays[f"layers/{name}/activation"] = np.maximum(values, 0)
            arrays[f"layers/{name}/gradient"] = 0.01 * wide * random.standard_normal((rows, neurons), np.float32)
        arrays["features"] = arrays["layers/avgpool/activation"]
        arrays["logits"] = arrays["features"] @ weight.T + bias
        writer.prepare(split, rows, {"list": split, "sha256": "0" * 64})
        for block in range(-(-rows // BLOCK)):
            writer.write_block(split, block, {k: a[block * BLOCK : (block + 1) * BLOCK] for k, a in arrays.items()})
        writer.seal(split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuse", default="auto")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = f"import default; default.write_cache(default.Path({name!r}, 'c.zarr'))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        command = [sys.executable, "-m", "nacpipe", "search", str(folder / "c.zarr"), "--fuse", asked.fuse]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stderr is not None
        text = process.stderr.read() + process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone
        seconds, peak = time.perf_counter() - started, usage.ru_maxrss
        source = 4 * sum(ROWS.values()) * (sum(NEURONS.values()) + CLASSES)
        print(text)
        assert status == 0
        print(f"{seconds:.1f} s; peak {peak / 1024:.0f} MiB, {peak * 1024 / source:.2f} of one source's")
        print(f"{source / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
