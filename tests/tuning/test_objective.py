"""What a trial's value is: its metrics, its weights in closed form, the network's output as a layer, the callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.errors import ParamsError
from nacpipe.method.coverage import logits_gradient
from nacpipe.method.guide import guided_target
from nacpipe.method.metrics import auroc, fpr95
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import energy
from nacpipe.method.term import Source
from nacpipe.method.weights import ridge_weights
from nacpipe.scoring.coverage import fit_coverage, score_splits
from nacpipe.scoring.states import check_layers, held_layers, read_source
from nacpipe.scoring.trial_scorer import Scorer, TermIndexes, split_rows
from nacpipe.tuning.validation import DIRECTIONS, Evaluator, ObjectiveName, ValidationMetrics
from nacpipe.tuning.weights import fisher_weights

SPLITS = ["id/subtrain", "id/val", "ood/val"]
PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=0.5),
        "layer1": LayerParams(bins=31, saturation=3, alpha=2.0, weight=0.3, source="activation", edges="linear"),
        "logits": LayerParams(bins=50, saturation=4, alpha=1.5, weight=0.2),
    }
)


def evaluator(cache: Cache, ood: str = "ood/val", splits: list[str] = SPLITS) -> Evaluator:
    return Evaluator(Scorer(TermIndexes(cache, splits), split_rows(cache, splits)), ood)


# --- checks -----------------------------------------------------------------------------------------------------------

CHECKS = ValidationMetrics(val_auroc=0.75, val_fpr95=0.5, subtrain_auroc=None, val_correlation=0.25)


@pytest.mark.parametrize(
    ("objective", "values", "objective_key"),
    [
        ("auroc", [0.75], (0.75,)),
        ("fpr95", [0.5], (-0.5, 0.75)),
        ("pareto", [0.75, 0.5], (0.625,)),
        ("guided", [0.25], (0.25,)),
    ],
)
def test_values_and_objective_key(
    objective: ObjectiveName, values: list[float], objective_key: tuple[float, ...]
) -> None:
    assert CHECKS.values(objective) == values
    assert CHECKS.objective_key(objective) == objective_key
    assert CHECKS.objective_key(objective) > ()
    assert len(DIRECTIONS[objective]) == len(values)


@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_the_key_orders_as_the_directions_do(four: tuple[float, float, float, float]) -> None:
    """What is better in one value and no worse in the other has no smaller key, whatever is searched for."""
    low, high = sorted(four[:2])
    small, large = sorted(four[2:])
    better = ValidationMetrics(val_auroc=high, val_fpr95=small, subtrain_auroc=None)
    worse = ValidationMetrics(val_auroc=low, val_fpr95=large, subtrain_auroc=None)
    for objective in DIRECTIONS:
        assert better.objective_key(objective) >= worse.objective_key(objective)
    assert replace(better, subtrain_auroc=0.1).objective_key("pareto") == better.objective_key("pareto")


def test_of_equal_fpr95_the_higher_auroc() -> None:
    assert replace(CHECKS, val_auroc=0.8).objective_key("fpr95") > CHECKS.objective_key("fpr95")
    assert replace(CHECKS, val_auroc=0.99, val_fpr95=0.51).objective_key("fpr95") < CHECKS.objective_key("fpr95")


# --- metrics and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ood", ["ood/val", "ood/far/textures"])
def test_checks_are_the_metrics_of_the_other_path(small_cache: Cache, ood: str) -> None:
    splits = ["id/subtrain", "id/val", ood]
    found = evaluator(small_cache, ood, splits).measure(PARAMS)
    scores = score_splits(small_cache, PARAMS, splits)
    assert found == ValidationMetrics(
        val_auroc=auroc(scores["id/val"], scores[ood]),
        val_fpr95=fpr95(scores["id/val"], scores[ood]),
        subtrain_auroc=auroc(scores["id/val"], scores["id/subtrain"]),
    )
    assert 0.5 < found.val_auroc < 1


def test_layers_without_weight_are_not_scored(small_cache: Cache) -> None:
    layers = {**PARAMS.layers, "nowhere": LayerParams(bins=4, saturation=1, alpha=1, weight=0)}
    assert evaluator(small_cache).measure(NacParams(layers=layers)) == evaluator(small_cache).measure(PARAMS)


def test_checks_of_any_score(small_cache: Cache) -> None:
    """id/val above ood/val but for one of its 40, all ties with id/subtrain."""
    scores = np.zeros(33 + 40 + 37)
    scores[33 + 40 :] = -1.0
    scores[33] = -2.0
    found = evaluator(small_cache).check(scores)
    assert found == ValidationMetrics(val_auroc=39 / 40, val_fpr95=1 / 40, subtrain_auroc=39 / 80)


def test_without_subtrain(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"id/subtrain": 0})
    found = evaluator(cache, splits=SPLITS[1:]).measure(PARAMS)
    assert found.subtrain_auroc is None
    scores = score_splits(cache, PARAMS, SPLITS[1:])
    assert found.val_auroc == auroc(scores["id/val"], scores["ood/val"])


def test_weights_come_from_the_layer_scores(small_cache: Cache) -> None:
    """Layer by layer alone, by the other path; id/val against the OOD split, nothing else."""
    alone = {
        name: score_splits(small_cache, NacParams(layers={name: layer}), SPLITS)
        for name, layer in PARAMS.layers.items()
    }
    shares = fisher_weights(*(np.stack([alone[name][split] for name in alone]) for split in ("id/val", "ood/val")))
    expected = {name: replace(PARAMS.layers[name], weight=w) for name, w in zip(alone, shares.tolist(), strict=True)}
    ours = evaluator(small_cache)
    weighed = ours.weigh(PARAMS).layers
    assert {name: replace(layer, weight=1) for name, layer in weighed.items()} == {
        name: replace(layer, weight=1) for name, layer in expected.items()
    }
    assert [w.weight for w in weighed.values()] == pytest.approx(shares.tolist(), rel=1e-12)
    assert sum(w.weight for w in weighed.values()) == pytest.approx(1)

    assert ours.measure(NacParams(layers=weighed)).val_auroc > ours.measure(PARAMS).val_auroc


# --- the network's output as a layer ----------------------------------------------------------------------------------


def test_logits_by_hand(small_cache: Cache) -> None:
    """z · (e^z / Σ e^z − 1/3), in plain float64."""
    split = small_cache["id/val"]
    logits = split.read("logits")
    wide = logits.astype(np.float64)
    gradient = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True) - 1 / 3
    found: dict[Source, NDArray[np.float32]] = {
        name: read_source(split, "logits", name) for name in ("product", "activation", "gradient")
    }
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found["activation"], logits)
    np.testing.assert_allclose(found["gradient"], gradient, rtol=0, atol=1e-7)
    np.testing.assert_allclose(found["product"], wide * gradient, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found["product"], logits * found["gradient"])
    np.testing.assert_array_equal(read_source(split, "logits", "product", slice(5, 20)), found["product"][5:20])


def test_the_gradient_is_torchs(small_cache: Cache) -> None:
    """Of D_KL(u ‖ p), and so of the cross-entropy between u and p: what extraction takes at every other layer."""
    torch = pytest.importorskip("torch")
    logits = small_cache["ood/far/textures"].read("logits")
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    uniform = torch.full_like(leaf, 1 / leaf.shape[1])
    torch.nn.functional.cross_entropy(leaf, uniform, reduction="sum").backward()
    np.testing.assert_allclose(logits_gradient(logits), leaf.grad.numpy(), rtol=0, atol=1e-7)
    other = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.kl_div(other.log_softmax(1), uniform, reduction="sum").backward()
    np.testing.assert_allclose(logits_gradient(logits), other.grad.numpy(), rtol=0, atol=1e-7)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 9)), elements=FINITE))
def test_the_gradient_of_logits_of_any_size(logits: NDArray[np.float32]) -> None:
    gradient = logits_gradient(logits)
    assert np.isfinite(gradient).all()
    classes = logits.shape[1]
    np.testing.assert_allclose(gradient.astype(np.float64).sum(axis=1), 0, atol=1e-6)
    assert (gradient >= np.float32(-1 / classes)).all()
    assert (gradient <= np.float32(1 - 1 / classes)).all()
    tops = np.take_along_axis(gradient, logits.argmax(axis=1)[:, None], axis=1)[:, 0]
    np.testing.assert_array_equal(tops, gradient.max(axis=1))
    np.testing.assert_allclose(logits_gradient(logits[:, ::-1])[:, ::-1], gradient, rtol=0, atol=1e-7)


def test_equal_logits_have_no_gradient() -> None:
    assert logits_gradient(np.full((2, 4), 7.5, np.float32)).tolist() == [[0.0] * 4] * 2
    assert logits_gradient(np.array([[0, np.log(3)]], np.float32))[0].tolist() == pytest.approx([-0.25, 0.25], abs=1e-7)


@pytest.mark.parametrize("source", ["product", "activation", "gradient"])
def test_both_paths_score_the_logits_equally(small_cache: Cache, source: Source) -> None:
    layer = LayerParams(bins=37, saturation=40, alpha=5.0, source=source)
    params = NacParams(layers={"logits": layer})
    splits = ["id/val", "ood/val", "ood/far/textures"]
    scorer = Scorer(TermIndexes(small_cache, splits), split_rows(small_cache, splits))
    coverage = fit_coverage(small_cache, params)
    assert coverage.layers["logits"].counts.shape == (3, 36)
    assert coverage.layers["logits"].counts.sum() == 3 * 60
    for name in splits:
        expected = coverage.score(small_cache[name], block=7)
        np.testing.assert_array_equal(scorer.scores(params)[scorer.rows[name]], expected)
        assert np.unique(expected).size > 2


def test_features_are_no_logits(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "f.zarr", identity={"outputs": "features"})
    assert held_layers(cache) == ["avgpool", "layer1"]
    message = r"^layer 'logits' is not in .*f\.zarr; it holds avgpool, layer1;"
    with pytest.raises(ParamsError, match=message):
        check_layers(cache, ["avgpool", "logits"])
    with pytest.raises(ParamsError, match=message):
        fit_coverage(cache, PARAMS)


# --- the guided target, and a layer once per source -------------------------------------------------------------------

TERMS = NacParams(
    layers={
        "avgpool:product": replace(PARAMS.layers["avgpool"], weight=1.0),
        "avgpool:gradient": replace(PARAMS.layers["avgpool"], source="gradient", weight=2.0),
        "logits:activation": replace(PARAMS.layers["logits"], source="activation", weight=1.0),
    }
)


def test_a_layers_terms_add_up(small_cache: Cache) -> None:
    """Each term scores as the layer with that source does alone."""
    alone = [
        score_splits(small_cache, NacParams(layers={name.split(":")[0]: term}), ["ood/val"])["ood/val"]
        for name, term in TERMS.layers.items()
    ]
    found = score_splits(small_cache, TERMS, ["ood/val"])["ood/val"]
    np.testing.assert_allclose(found, (alone[0] + 2 * alone[1] + alone[2]) / 4, rtol=1e-12)
    assert not np.allclose(alone[0], alone[1])
    with pytest.raises(ParamsError, match=r"^layer 'conv9' is not in "):
        score_splits(small_cache, NacParams(layers={"conv9:product": TERMS.layers["avgpool:product"]}), ["ood/val"])


def test_the_guided_objective_is_the_correlation_with_its_target(small_cache: Cache) -> None:
    own = np.concatenate([energy(small_cache[name].read("logits")) for name in SPLITS])
    scorer = Scorer(TermIndexes(small_cache, SPLITS), split_rows(small_cache, SPLITS))
    rows = scorer.rows
    pair = np.r_[rows["id/val"], rows["ood/val"]]
    target = guided_target(np.arange(pair.size) < small_cache["id/val"].rows, own[pair])
    ours = Evaluator(scorer, "ood/val", target)
    params = ours.weigh(TERMS)
    layers = np.stack(scorer.layer_scores(TERMS.layers))[:, pair]
    weights = ridge_weights(layers.T, target)
    np.testing.assert_allclose([term.weight for term in params.layers.values()], weights, atol=1e-12)
    assert ours.measure(params).val_correlation == pytest.approx(np.corrcoef(weights @ layers, target)[0, 1])
    assert evaluator(small_cache).measure(TERMS).val_correlation is None
