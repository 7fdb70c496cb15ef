"""Time of all baselines of `nacpipe evaluate --baselines all` at ImageNet sizes, each alone and all together.

    python bench/baselines.py [--classes 1000] [--features 1280] [--train 4000] [--tested 1600] [--cache CACHE]

Writes a cache of made-up features around the classes' centres, 500 images of id/val, and `--tested` in three splits,
then times each method alone and all of them in one call, reading and fitting included: on the clock, and of all cores.
`--cache` takes one that is there. Peak memory is the operating system's.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.evaluation.baselines import BASELINES, score_baselines
from nacpipe.evaluation.method_scores import evaluated_splits

BLOCK = 512


def write(path: Path, classes: int, features: int, rows: dict[str, int]) -> Cache:
    rng = np.random.RandomState(0)
    weight = np.maximum(rng.normal(0, 1, (classes, features)), 0).astype(np.float32)
    bias = (-(weight**2).sum(axis=1) / 2).astype(np.float32)
    header = Header(
        identity={"benchmark": "made-up"},
        information={"command": "python bench/baselines.py"},
        block_rows=BLOCK,
        layers=(LayerSpec(name="layer", path="layer", pooling="none", neurons=4),),
        classes=classes,
        features=features,
    )
    writer = CacheWriter(path, header)
    writer.write_classifier(weight, bias)
    for split, count in rows.items():
        label = np.arange(count) % classes
        inside = split.startswith("id/")
        values = np.maximum((weight[label] if inside else 0.4) + 0.6 * rng.normal(size=(count, features)), 0)
        values = values.astype(np.float32)
        states = values[:, :4]
        arrays = {
            "features": values,
            "logits": values @ weight.T + bias,
            "label": label if inside else np.full(count, -1),
            "index": np.arange(count),
            "layers/layer/activation": states,
            "layers/layer/gradient": states,
        }
        known = {key: arrays[key] for key in ("label", "index")}
        writer.prepare(split, count, {"list": split, "sha256": split}, **known)
        for block, start in enumerate(range(0, count, BLOCK)):
            writer.write_block(split, block, {name: array[start : start + BLOCK] for name, array in arrays.items()})
        writer.seal(split)
    return open_cache(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--classes", 1000), ("--features", 1280), ("--train", 4000), ("--tested", 1600)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.cache is None:
            third = options.tested // 3
            tested = {"id/test": options.tested - 2 * third, "ood/near/a": third, "ood/far/b": third}
            rows = {"id/train": options.train, "id/val": 500, **tested}
            cache = write(Path(folder) / "c.zarr", options.classes, options.features, rows)
        else:
            cache = open_cache(options.cache)
        splits = evaluated_splits(cache)
        for name in BASELINES:
            wall, cpu = time.perf_counter(), time.process_time()
            found = score_baselines(cache, [name], splits)[name]
            reason = next(iter(found.reasons.values()), "")
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"{name:12} {wall:6.2f} s, {cpu:6.2f} s of all cores  {reason}", flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        score_baselines(cache, ["all"], splits)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"all {len(BASELINES)} together: {wall:.1f} s, {cpu:.1f} s of all cores, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
