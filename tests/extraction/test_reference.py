"""The authors' own code as judge: what it computed with a published ResNet-20, and what comes out here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nacpipe.cache import Cache, open_cache
from nacpipe.evaluation.baselines import score_baselines
from nacpipe.evaluation.tables import evaluate
from nacpipe.method.counting import count_sorted, fill_ranked, fill_rows
from nacpipe.method.coverage import bin_edges, combine_layers, layer_score, product_borders, select_source
from nacpipe.method.metrics import accuracy, detect
from nacpipe.method.params import NacParams
from nacpipe.method.plain_scores import fit_temperature
from nacpipe.method.sorted_index import index_columns, sort_columns
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.runner import run
from nacpipe.tuning.study import Search
from nacpipe.tuning.trials import trial_params

SPLITS = ("id/train", "id/subtrain", "id/val", "ood/val")
TESTED = ("id/test", "ood/near/cifar100", "ood/far/svhn")
LAYERS = ("avgpool", "layer3", "layer2", "layer1")

Arrays = dict[str, NDArray[np.float32]]

# A process of its own, in which no convolution has run before the variable is set that settles its arithmetic.
EXTRACT = """
import sys
from pathlib import Path
import torch
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest

torch.set_num_threads(1)
shared, cache = Path(sys.argv[1]), Path(sys.argv[2])
request = ExtractRequest(
    benchmark="cifar10",
    model="resnet20",
    cache=cache,
    checkpoint=shared / "checkpoints/resnet_cifar10/resnet20-12fca82f.th",
    data_root=shared / "openood",
    device="cpu",
    splits=tuple(sys.argv[3:]),
)
extract(plan_extraction(request))
"""


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Arrays]:
    """Split → array → values, as the authors' code gave them."""
    folder = shared / "reference/resnet20"
    return {name: dict(np.load(folder / f"{name.replace('/', '-')}.npz")) for name in SPLITS}


@pytest.fixture(scope="module")
def extracted(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same 4,000 images and 5,600 of the test sets through nacpipe; about half a minute."""
    path = tmp_path_factory.mktemp("reference") / "c.zarr"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error", "-c", EXTRACT, str(shared), str(path), *SPLITS, *TESTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return open_cache(path)


def test_training_rows_are_the_references(extracted: Cache, shared: Path) -> None:
    rows = np.loadtxt(shared / "reference/resnet20/id-train-rows.txt", dtype=int)
    assert extracted["id/train"].index.tolist() == rows.tolist()
    assert extracted["id/val"].index.tolist() == list(range(1000))


@pytest.mark.parametrize("name", SPLITS)
def test_labels_and_logits_are_the_references(extracted: Cache, reference: dict[str, Arrays], name: str) -> None:
    assert extracted[name].label.tolist() == reference[name]["label"].tolist()
    np.testing.assert_allclose(np.asarray(extracted[name].logits[:]), reference[name]["logits"], atol=2e-4)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("kind", ["activation", "gradient"])
@pytest.mark.parametrize("layer", LAYERS)
def test_activations_and_gradients_are_the_references(
    extracted: Cache, reference: dict[str, Arrays], name: str, kind: str, layer: str
) -> None:
    found, expected = np.asarray(getattr(extracted[name][layer], kind)[:]), reference[name][f"{layer}.{kind}"]
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= 5e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("which", ["published", "tuned"])
def test_cells_of_the_table_are_the_references(extracted: Cache, shared: Path, which: str) -> None:
    known = json.loads((shared / "reference/resnet20/metrics.json").read_text())[which]
    table = evaluate(extracted, NacParams.from_json({"layers": known["params"]}))
    for name in ("cifar100", "svhn"):
        row = table.query(f"dataset == '{name}' and method == 'NAC'").iloc[0]
        metrics = known["metrics"][f"id-test against ood-{name}"]
        for metric, tolerance in {"auroc": 5e-4, "aupr_in": 5e-4, "aupr_out": 5e-4, "fpr95": 3e-3}.items():
            assert row[metric] == pytest.approx(metrics[metric], abs=tolerance)
        assert row["accuracy"] == metrics["accuracy"]


def test_gen_and_the_temperature_of_the_table(extracted: Cache) -> None:
    """As OpenOOD's code has them in float64; clamped probabilities give SVHN 0.8831, fifty small steps T = 1.22."""
    more = score_baselines(extracted, ["GEN", "Temperature"], ["id/test", "ood/near/cifar100", "ood/far/svhn"])
    table = evaluate(extracted, None, more=more).query("task == 'ood'").set_index(["dataset", "method"])["auroc"]
    assert table["svhn", "GEN"] == pytest.approx(0.87466, abs=5e-5)
    assert table["cifar100", "GEN"] == pytest.approx(0.88092, abs=5e-5)
    val = extracted["id/val"]
    assert fit_temperature(val.read("logits"), val.label) == pytest.approx(2.279, abs=2e-3)
    assert more["Temperature"].n_fitted == 1000


def products(arrays: Arrays, layer: str) -> NDArray[np.float32]:
    return select_source(arrays[f"{layer}.activation"], arrays[f"{layer}.gradient"])


@pytest.mark.parametrize("which", ["published", "tuned"])
def test_scores_of_the_references_arrays_are_the_references(
    shared: Path, reference: dict[str, Arrays], which: str
) -> None:
    """No sample is off by more than 1e-4, at most 0.5 % by more than 1e-6; the metrics follow."""
    known = json.loads((shared / "reference/resnet20/metrics.json").read_text())[which]
    expected = dict(np.load(shared / f"reference/resnet20/scores-{which}.npz"))
    scores = {}
    for name in SPLITS[1:]:
        layers = []
        for layer in LAYERS:
            p = known["params"][layer]
            train, queries = (products(reference[split], layer) for split in ("id/train", name))
            borders = product_borders(bin_edges(p["bins"]), p["alpha"])
            filled = fill_rows(queries, borders, count_sorted(sort_columns(train), borders), p["saturation"])
            (ranked,) = fill_ranked([(index_columns(train, queries), borders, p["saturation"])])
            np.testing.assert_array_equal(filled, ranked)
            layers.append(layer_score(filled, queries.shape[1], p["saturation"]))
        scores[name] = combine_layers(np.stack(layers), np.ones(4))
        # The authors divide by the number of layers a second time.
        error = np.abs(scores[name] / 4 - expected[name.replace("/", "-")])
        assert error.max() <= 1e-4
        assert (error > 1e-6).mean() <= 0.005
    for name in ("ood/val", "id/subtrain"):
        found, metrics = (
            detect(scores["id/val"], scores[name]),
            known["metrics"][f"id-val against {name.replace('/', '-')}"],
        )
        assert found.auroc == pytest.approx(metrics["auroc"], abs=1e-4)
        assert found.fpr95 == pytest.approx(metrics["fpr95"], abs=2e-3)
        assert found.aupr_in == pytest.approx(metrics["aupr_in"], abs=1e-4)
        assert found.aupr_out == pytest.approx(metrics["aupr_out"], abs=1e-4)
    val = reference["id/val"]
    assert (
        accuracy(val["logits"], val["label"].astype(np.int64)) == known["metrics"]["id-val against ood-val"]["accuracy"]
    )


# --- searching --------------------------------------------------------------------------------------------------------


def test_the_published_grid_gives_the_authors_trials_and_their_choice(
    extracted: Cache, shared: Path, tmp_path: Path
) -> None:
    known = json.loads((shared / "reference/resnet20/grid.json").read_text())["trials"]
    search = Search(SearchRequest(cache=Path(extracted.path), space="published", storage=str(tmp_path / "s.log")))
    result = run(search)
    found = {}
    for trial in search.completed():
        layers = trial_params(trial, search.objective.space).layers
        found[tuple((p.bins, p.saturation, p.alpha) for p in layers.values())] = trial.user_attrs
    assert len(found) == len(known) == 256
    for trial in known:
        params = trial["params"]
        ours = found[tuple((p["bins"], p["saturation"], float(p["alpha"])) for p in params.values())]
        assert ours["val_auroc"] == pytest.approx(trial["val_auroc"], abs=0.0005)
        assert ours["subtrain_auroc"] == pytest.approx(trial["subtrain_auroc"], abs=0.0005)
        assert ours["val_fpr95"] == pytest.approx(trial["val_fpr95"], abs=0.005)  # steps of 0.001, at few thresholds
    assert result.checks.val_auroc == pytest.approx(max(t["val_auroc"] for t in known), abs=0.0005)
    assert result.trials == 256


@pytest.mark.parametrize(("layers", "least"), [(LAYERS, 0.893), ((*LAYERS, "logits"), 0.898)])
def test_the_default_search_finds_what_it_promises(
    extracted: Cache, tmp_path: Path, layers: tuple[str, ...], least: float
) -> None:
    """bench/search.py repeats it for five seeds, with the time it takes."""
    search = Search(
        SearchRequest(cache=Path(extracted.path), space="paper", layers=layers, storage=str(tmp_path / "s.log"))
    )
    result = run(search)
    assert result.checks.val_auroc >= least
    assert result.trials == 2000
    assert not result.overfits
