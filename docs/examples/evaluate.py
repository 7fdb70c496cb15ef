"""Everything that `nacpipe evaluate` prints, as pandas frames.

    python docs/examples/evaluate.py cache/digits-digits_cnn.zarr

Read the cells from top to bottom, in a notebook or as a script.
"""

# %% A cache, and the parameters that `nacpipe search` wrote beside it
import sys
from pathlib import Path

import numpy as np

import nacpipe

path = Path(sys.argv[1])
cache = nacpipe.open_cache(path)
params = nacpipe.read_params(path.with_suffix(".params.json"))

# %% The table: nacpipe evaluate CACHE
table = nacpipe.evaluate(cache, params)
means = table[(table["task"] == "ood") & (table["dataset"] == "mean")]
print(means.pivot(index="method", columns="group", values="auroc"))

# %% The same in two steps: images are scored once, then any tables are made from the scores
scored = nacpipe.score_cache(cache, params)
assert nacpipe.tabulate([scored]).equals(table)
scored.methods["NAC"].scores["id/test"]  # (images,) float64, larger = more like the training data

# %% Intervals: nacpipe evaluate CACHE --confidence 0.95
with_intervals = nacpipe.add_confidence(table, [scored], level=0.95, resamples=200)
print(with_intervals.loc[with_intervals["method"] == "NAC", ["task", "dataset", "auroc", "auroc_low", "auroc_high"]])

# %% Is NAC better than Energy, by more than chance? nacpipe evaluate CACHE --against Energy
compared = nacpipe.compare_methods([scored], "NAC", "Energy", resamples=200)
print(compared[["task", "dataset", "metric", "difference", "low", "high", "more_than_chance"]])

# %% Two sets of parameters: nacpipe evaluate CACHE --against FILE
alone = nacpipe.NacParams(layers=dict([next(iter(params.layers.items()))]))
both = nacpipe.score_cache(cache, {"all layers": params, "one layer": alone})
print(nacpipe.compare_methods([both], "all layers", "one layer", resamples=200)[["dataset", "metric", "difference"]])

# %% Baselines that learn from the cache: nacpipe evaluate CACHE --baselines ViM,KNN
from nacpipe.evaluation.baselines import score_baselines  # noqa: E402

baseline_scores = score_baselines(cache, ["ViM", "KNN"], list(scored.rows))
print(
    nacpipe.evaluate(cache, params, more=baseline_scores)[
        ["dataset", "method", "auroc", "fitted_on", "n_fitted", "reason"]
    ]
)

# %% Every image's scores in a file: nacpipe evaluate CACHE --scores FILE
target = path.with_suffix(".scores.npz")
nacpipe.save_scores(target, [cache], [scored])
saved = np.load(target)
strangest = saved["id/test/index"][saved["id/test/NAC"].argsort()[:5]]
print("the five strangest test images, lines of their list from 0:", strangest)

# %% A part of a split, as one of several machines would score it: the scores are the same
from nacpipe.method.coverage import combine_layers  # noqa: E402
from nacpipe.scoring.coverage import fit_coverage  # noqa: E402
from nacpipe.scoring.states import read_source  # noqa: E402

coverage, rows = fit_coverage(cache, params), slice(10, 20)
parts = [
    fitted.score(read_source(cache["id/test"], name, fitted.params.source, rows))
    for name, fitted in coverage.layers.items()
]
assert np.array_equal(combine_layers(np.stack(parts), coverage.weights), saved["id/test/NAC"][rows])
