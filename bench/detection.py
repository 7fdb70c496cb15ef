"""How well the default search detects, beside the logit baselines, and what other choices of layers and states give.

Measured: for every row and seed one `nacpipe search`, then the mean AUROC over the near and over the far test sets.
Which row is best was decided on the validation AUROC alone; test sets were read for this table only.

    python bench/detection.py CACHE [CACHE …] [--seeds 1,2,3] [--trials 2000]

Each CACHE is searched with its layers, with `logits` as a layer too, and in the wide space, which has every
state source besides. A cache of more layers or more training images is one more argument.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from nacpipe.cache import open_cache
from nacpipe.search.evaluate import evaluate
from nacpipe.search.result import SearchRequest
from nacpipe.search.study import Search
from nacpipe.search.sweep import run


def means(frame: pd.DataFrame, method: str) -> tuple[float, float]:
    """Near and far mean AUROC, percent."""
    rows = frame[(frame.task == "ood") & (frame.dataset == "mean") & (frame.method == method)].set_index("group")
    return 100 * float(rows.auroc["near"]), 100 * float(rows.auroc["far"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path, nargs="+")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--trials", type=int, default=2000)
    asked = parser.parse_args()
    print("cache, layers, states                          seed   val AUROC   near    far")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in asked.caches:
            cache = open_cache(path)
            held = tuple(spec.name for spec in cache.header.layers)
            for title, layers, space in (
                (f"{path.stem}, {len(held)} layers", held, "auto"),
                (f"{path.stem}, {len(held)} layers and logits", (*held, "logits"), "auto"),
                (f"{path.stem}, wide", (), "wide"),
            ):
                for seed in asked.seeds:
                    storage = folder / f"{title} {seed}.log"
                    request = SearchRequest(
                        cache=path, layers=layers, space=space, seed=seed, trials=asked.trials, storage=str(storage)
                    )
                    result = run(Search(request))
                    near, far = means(evaluate(cache, result.params), "NAC")
                    print(
                        f"{title:<48}{seed}      {100 * result.checks.val_auroc:.2f}   {near:.2f}  {far:.2f}",
                        flush=True,
                    )
            frame = evaluate(cache, result.params)
            for method in ("MSP", "MaxLogit", "Energy"):
                print(f"{path.stem + ', ' + method:<64}{means(frame, method)[0]:.2f}  {means(frame, method)[1]:.2f}")


if __name__ == "__main__":
    main()
