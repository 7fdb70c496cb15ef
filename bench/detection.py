"""How well the default search detects, beside the logit baselines, and what other choices of layers and states give.

Measured: for every row and seed one `nacpipe search`, then the mean AUROC over the near and over the far test sets.
Which row is best was decided on the validation AUROC alone; test sets were read for this table only.

    python bench/detection.py CACHE [CACHE …] [--layers A,B] [--seeds 1,2,3] [--trials 2000]

Each CACHE is searched with its layers (all, or those named), with `logits` as a layer too, in the wide space, which has
every state source besides, and with every layer once per source for the smooth objective. A cache of more layers, more
training images or another network is one more argument.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from nacpipe.cache import open_cache
from nacpipe.evaluation.tables import evaluate
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.runner import run
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import ObjectiveName


def means(frame: pd.DataFrame, method: str) -> tuple[float, float]:
    """Near and far mean AUROC, percent."""
    rows = frame[(frame.task == "ood") & (frame.dataset == "mean") & (frame.method == method)].set_index("group")
    return 100 * float(rows.auroc["near"]), 100 * float(rows.auroc["far"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path, nargs="+")
    parser.add_argument("--layers", type=lambda text: text.split(","), help="some of the cache's")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--trials", type=int, default=2000)
    asked = parser.parse_args()
    print("cache, layers, space and objective             seed   val AUROC   near    far")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in asked.caches:
            cache = open_cache(path)
            held = tuple(asked.layers or (spec.name for spec in cache.header.layers))
            all_layers = (*held, "logits")
            rows: list[tuple[str, tuple[str, ...], str, ObjectiveName]] = [
                (f"{path.stem}, {len(held)} layers", held, "auto", "auroc"),
                (f"{path.stem}, {len(held)} layers and logits", all_layers, "auto", "auroc"),
                (f"{path.stem}, {len(held)} layers and logits, wide", all_layers, "wide", "auroc"),
                (f"{path.stem}, {len(held)} layers and logits, terms guided", all_layers, "terms", "guided"),
            ]
            for title, layers, space, objective in rows:
                for seed in asked.seeds:
                    request = SearchRequest(
                        cache=path, layers=layers, space=space, objective=objective, seed=seed, trials=asked.trials,
                        storage=str(folder / f"{title} {seed}.log"),
                    )  # fmt: skip
                    result = run(Search(request))
                    near, far = means(evaluate(cache, result.params), "NAC")
                    value = 100 * result.checks.val_auroc
                    print(f"{title:<48}{seed}      {value:.2f}   {near:.2f}  {far:.2f}", flush=True)
            table = evaluate(cache, result.params)
            for method in ("MSP", "MaxLogit", "Energy"):
                print(f"{f'{path.stem}, {method}':<66}{means(table, method)[0]:.2f}  {means(table, method)[1]:.2f}")


if __name__ == "__main__":
    main()
