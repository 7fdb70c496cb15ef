"""Whole searches at CIFAR-10 ResNet-18 sizes: the published grid, 1,000 trials, and how the cost grows.

Measured: `nacpipe search CACHE` as a process of its own, its study new, a journal, compiled loops on disk; the cache
holds made-up products (bench/trial.py's) of 512, 256, 128 and 64 neurons, 1,000 training and 3,000 evaluated samples.

    published   all 256 combinations of the paper's grid, against the plain broadcast search, in which every combination
                is fitted and scored anew (as the authors do): ten of its combinations in the same run, times 25.6
    default     1,000 trials; and the time from trial 900 to 1,000 against that from 100 to 200, by the study's record

    python bench/sweep.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import optuna
from trial import SIZES, Layer, draw_products, score_plainly

from nacpipe.cache import CacheWriter, Header, LayerSpec
from nacpipe.method.metrics import auroc
from nacpipe.method.params import LayerParams
from nacpipe.method.published import GRIDS, PUBLISHED
from nacpipe.tuning.storage import open_storage

KEY, BLOCK, PLAIN = ("cifar10", "resnet"), 512, 10


def write_cache(path: Path) -> None:
    """Products as activation × 1, so that a layer's products are bench/trial.py's."""
    sizes, random = SIZES["cifar10"], np.random.default_rng(0)
    names = list(PUBLISHED[KEY].layers)
    header = Header(
        identity={"benchmark": KEY[0], "family": KEY[1], "architecture": "made up", "weights": "0" * 64},
        information={},
        block_rows=BLOCK,
        layers=tuple(
            LayerSpec(name=name, path=name, pooling="sum-nchw", neurons=neurons)
            for name, neurons in zip(names, sizes.neurons, strict=True)
        ),
        classes=10,
        features=512,
    )
    writer = CacheWriter(path, header)
    for split in ("id/train", "id/subtrain", "id/val", "ood/val"):
        rows = 1000
        arrays = {
            "logits": random.standard_normal((rows, 10), np.float32),
            "features": np.ones((rows, 512), np.float32),
        }
        arrays |= {"label": np.zeros(rows, np.int64), "index": np.arange(rows)}
        for name, neurons in zip(names, sizes.neurons, strict=True):
            alpha = PUBLISHED[KEY].layers[name].alpha
            products = draw_products(random, rows, neurons, alpha)
            arrays[f"layers/{name}/activation"] = products * np.float32(1.5 if split == "ood/val" else 1.0)
            arrays[f"layers/{name}/gradient"] = np.ones((rows, neurons), np.float32)
        known = {key: arrays[key] for key in ("label", "index")}
        writer.prepare(split, rows, {"list": split, "sha256": "0" * 64}, **known)
        for block in range(-(-rows // BLOCK)):
            writer.write_block(split, block, {k: a[block * BLOCK : (block + 1) * BLOCK] for k, a in arrays.items()})
        writer.seal(split)


def search(cache: Path, folder: Path, *options: str) -> tuple[float, Path]:
    """Seconds of a whole command, and its journal."""
    journal = folder / "s.log"
    journal.unlink(missing_ok=True)
    command = [sys.executable, "-m", "nacpipe", "search", str(cache), "--storage", str(journal), *options]
    started = time.perf_counter()
    subprocess.run([*command, "--output", str(folder / "p.json")], check=True, capture_output=True)
    return time.perf_counter() - started, journal


def plain_seconds(random: np.random.Generator) -> float:
    """One combination by broadcast, the median of ten, AUROC included."""
    sizes, layers, times = SIZES["cifar10"], [], []
    for neurons, params in zip(sizes.neurons, PUBLISHED[KEY].layers.values(), strict=True):
        train, evaluated = (draw_products(random, rows, neurons, params.alpha) for rows in (1000, 3000))
        layers.append((train, evaluated))
    grid = GRIDS[KEY]
    for _ in range(PLAIN):
        chosen = []
        for (train, evaluated), (bins, saturations, alphas) in zip(layers, grid.values(), strict=True):
            params = LayerParams(
                bins=int(random.choice(bins)),
                saturation=int(random.choice(saturations)),
                alpha=float(random.choice(alphas)),
            )
            chosen.append(Layer(params=params, train=train, evaluated=evaluated, index=None))  # type: ignore[arg-type]
        started = time.perf_counter()
        scores = score_plainly(chosen)
        auroc(scores[:1000], scores[1000:2000])
        times.append(time.perf_counter() - started)
    return median(times)


def growth(journal: Path) -> float:
    """The time from trial 900 to 1,000 over that from 100 to 200."""
    storage = open_storage(str(journal), write=False)
    trials = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage).get_trials()
    seconds = [trial.user_attrs["seconds"] for trial in trials]
    return (seconds[999] - seconds[899]) / (seconds[199] - seconds[99])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "c.zarr"
        write_cache(cache)
        search(cache, folder, "--trials", "5")  # compiles, or loads what was
        random = np.random.default_rng(1)
        grids, defaults, grown, plain = [], [], [], []
        for _ in range(asked.repeats):
            grids.append(search(cache, folder, "--space", "published")[0])
            plain.append(plain_seconds(random))
            seconds, journal = search(cache, folder, "--trials", "1000")
            defaults.append(seconds)
            grown.append(growth(journal))
    whole = 256 * median(plain)
    print(f"published grid, 256 combinations: {median(grids):.2f} s (each: {', '.join(f'{s:.2f}' for s in grids)})")
    print(f"plain broadcast, from {PLAIN} combinations: {whole:.0f} s; ratio 1/{whole / median(grids):.0f}")
    print(f"default search, 1,000 trials: {median(defaults):.2f} s (each: {', '.join(f'{s:.2f}' for s in defaults)})")
    print(f"trials 900 to 1,000 against 100 to 200: {median(grown):.2f} ({', '.join(f'{g:.2f}' for g in grown)})")


if __name__ == "__main__":
    main()
