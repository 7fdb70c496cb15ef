"""What the authors' code gave for 72 images with a published ResNet-20 (tests/data/reference), beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nacpipe.method.counting import count_sorted, fill_ranked, fill_rows
from nacpipe.method.coverage import bin_edges, combine_layers, layer_score, product_borders, select_source
from nacpipe.method.metrics import detect
from nacpipe.method.sorted_index import index_columns, sort_columns

LAYERS = ("avgpool", "layer3", "layer2", "layer1")
SPLITS = ("id-val", "ood-val", "id-subtrain")

Held = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def held() -> Held:
    return dict(np.load(Path(__file__).resolve().parents[1] / "data/reference/resnet20.npz"))


def train(held: Held, layer: str) -> NDArray[np.float32]:
    """(1000, neurons): values in the bins of the training images' products."""
    intervals = np.cumsum(held[f"{layer}.train_steps"], axis=0, dtype=np.int64)
    return np.ascontiguousarray(held[f"{layer}.values"][intervals])


@pytest.mark.parametrize("which", ["published", "tuned"])
@pytest.mark.parametrize("split", SPLITS)
def test_scores_are_the_authors(held: Held, which: str, split: str) -> None:
    """Of float32 sums theirs, of integers ours: no score is off by more than 1e-6."""
    params = json.loads(held["params"].tobytes())[which]
    layers = []
    for layer in LAYERS:
        p = params[layer]
        counted = train(held, layer)
        queries = select_source(held[f"{split}.{layer}.activation"], held[f"{split}.{layer}.gradient"])
        borders = product_borders(bin_edges(p["bins"]), p["alpha"])
        entry_sum = fill_rows(queries, borders, count_sorted(sort_columns(counted), borders), p["saturation"])
        (ranked,) = fill_ranked([(index_columns(counted, queries), borders, p["saturation"])])
        np.testing.assert_array_equal(entry_sum, ranked)
        layers.append(layer_score(entry_sum, queries.shape[1], p["saturation"]))
    scores = combine_layers(np.stack(layers), np.ones(4))
    # The authors divide by the number of layers a second time.
    np.testing.assert_allclose(scores / 4, held[f"{split}.scores-{which}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", ["published", "tuned"])
def test_metrics_of_the_authors_scores(held: Held, which: str) -> None:
    inside, outside = (held[f"{split}.scores-{which}"].astype(np.float64) for split in ("id-val", "ood-val"))
    found = detect(inside, outside)
    np.testing.assert_allclose([found.auroc, found.aupr_in, found.aupr_out], held[f"metrics-{which}"], atol=1e-12)


def test_the_file_is_small() -> None:
    """It travels with every clone: at most 300 kB."""
    assert (Path(__file__).resolve().parents[1] / "data/reference/resnet20.npz").stat().st_size <= 300_000
