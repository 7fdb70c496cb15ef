"""A ResNet-20 cache against what the authors' code computes on the same images, set by set.

    python bench/reference.py CACHE METRICS.json

METRICS.json: {name: {"params": {layer: …}, "metrics": {"id-test against ood-SET": {"auroc": …, "fpr95": …, …}}}}.
Prints the largest difference of every metric over the cache's near and far sets, AUPRs under their right names (the
authors' code swaps the two).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nacpipe.cache import open_cache
from nacpipe.evaluation.tables import evaluate
from nacpipe.method.params import NacParams

PREFIX = "id-test against ood-"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("metrics", type=Path)
    args = parser.parse_args()
    cache = open_cache(args.cache)
    for name, entry in json.loads(args.metrics.read_text()).items():
        frame = evaluate(cache, NacParams.from_json({"layers": entry["params"]}))
        rows = frame[(frame["method"] == "NAC") & (frame["task"] == "ood")].set_index("dataset")
        worst: dict[str, float] = {}
        compared = [key for key in entry["metrics"] if key.removeprefix(PREFIX) in rows.index]
        for key in compared:
            for metric, value in entry["metrics"][key].items():
                difference = abs(float(rows.loc[key.removeprefix(PREFIX)][metric]) - value)
                worst[metric] = max(worst.get(metric, 0.0), difference)
        print(f"{name}, {len(compared)} sets: " + ", ".join(f"{k} {v:.6f}" for k, v in sorted(worst.items())))
