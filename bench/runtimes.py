"""The ONNX file of a forward-only detector beside the torch detector, on all images of a cache's val and test sets.

    python bench/runtimes.py CACHE [--checkpoint FILE] [--data-root FOLDER] [--params FILE]

CACHE is one of `nacpipe extract … --no-gradient`. Printed per set: the share of scores that differ by at most 1e-5,
the largest difference, and the AUROC of id/val against the set from both. Bars: 97 % of all samples within 1e-5, AUROC
within 0.0005; a batch of 1 and one of 257 give the scores that batches of 128 give.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from nacpipe.benchmarks.toml import choose_root, open_benchmark
from nacpipe.cache import open_cache
from nacpipe.cache.options import read_options
from nacpipe.detector.export import export_detector
from nacpipe.detector.predict import attach_network
from nacpipe.extraction.dataset import Normalise, open_images
from nacpipe.extraction.loader import load_batches
from nacpipe.method.metrics import detect
from nacpipe.scoring.params_file import find_params

CLOSE, BATCH = 1e-5, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--params")
    args = parser.parse_args()
    cache = open_cache(args.cache)
    options = read_options(cache.header.information)
    assert options is not None
    exported = export_detector(cache, find_params(cache, args.params, print))
    ready = attach_network(
        exported, str(args.cache), options.model, args.checkpoint or options.checkpoint, torch.device("cpu")
    )
    with tempfile.TemporaryDirectory() as folder:
        check = ready.detector.to_onnx(Path(folder, "d.onnx"))
        print(f"{Path(folder, 'd.onnx').stat().st_size / 2**20:.1f} MiB; random images: {check}")
        session = onnxruntime.InferenceSession(Path(folder, "d.onnx").read_bytes())
    benchmark = open_benchmark(options.benchmark)
    root = choose_root(benchmark, args.data_root or options.data_root)
    benchmark = replace(benchmark, transform=ready.transform)

    def run(images: torch.Tensor) -> np.ndarray:
        return np.asarray(session.run(["score"], {"input": images.numpy()})[0])

    scores: dict[str, list[np.ndarray]] = {}
    for name in cache:
        if name in ("id/train", "id/subtrain"):
            continue
        images = open_images(benchmark, benchmark.split(name), root, train_images=1, train_seed=1)
        assert images is not None
        rows = cache[name].rows
        batches = [(0, range(start, min(start + BATCH, rows))) for start in range(0, rows, BATCH)]
        ours, theirs, first = [], [], None
        for batch in map(Normalise(ready.transform), load_batches([images], batches, ready.transform, 0)):
            first = batch if first is None else first
            ours.append(ready.detector(batch).score.numpy())
            theirs.append(run(batch))
        scores[name] = [np.concatenate(ours), np.concatenate(theirs)]
        off = np.abs(scores[name][0] - scores[name][1])
        line = f"{name:24} {rows:6} images  {100 * (off <= CLOSE).mean():7.3f} % within 1e-5  largest {off.max():.2g}"
        if name.startswith("ood/"):
            aurocs = [detect(scores["id/val"][side], scores[name][side]).auroc for side in (0, 1)]
            line += f"  AUROC {aurocs[0]:.6f} {aurocs[1]:.6f}  difference {abs(aurocs[0] - aurocs[1]):.2g}"
        print(line)
        if name == "id/val":
            assert first is not None
            many = torch.cat([first, first, first])[:257]
            wanted = np.concatenate([scores[name][1][:128]] * 3)[:257]
            found = run(many), np.concatenate([run(first[row : row + 1]) for row in range(20)])
            print(
                f"batch of 257: {100 * (np.abs(found[0] - wanted) <= CLOSE).mean():.2f} % within 1e-5;"
                f" 20 batches of 1: {100 * (np.abs(found[1] - wanted[:20]) <= CLOSE).mean():.2f} %"
            )
    every = np.concatenate([np.abs(a - b) for a, b in scores.values()])
    print(f"all {every.size} images: {100 * (every <= CLOSE).mean():.3f} % within 1e-5, largest {every.max():.2g}")


if __name__ == "__main__":
    main()
