"""`--fuse`: what is chosen, by cross-validation; trials do not change; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache
from nacpipe.errors import InputError
from nacpipe.method.cross_validation import cluster_folds, cross_validate, image_folds
from nacpipe.method.feature_scores import FEATURE_SCORES
from nacpipe.method.metrics import auroc
from nacpipe.tuning.explain import explain
from nacpipe.tuning.request import SearchRequest, SearchResult
from nacpipe.tuning.runner import run
from nacpipe.tuning.study import Search


def search(cache: Cache, folder: Path, **options: Any) -> tuple[Search, SearchResult]:
    made = Search(SearchRequest(cache=cache.path, storage=f"{folder}/s.log", output=folder / "p.json", **options))
    return made, run(made)


@pytest.fixture(scope="module")
def chosen(small_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, SearchResult]:
    return search(small_cache, tmp_path_factory.mktemp("auto"))


def test_the_best_in_cross_validation_is_chosen(chosen: tuple[Search, SearchResult]) -> None:
    made, result = chosen
    assert made.study is not None
    kept = made.study.user_attrs["cross_validated"]["by_fusion"]
    assert list(kept) == ["none", *FEATURE_SCORES]
    means = {name: (one["images"] + one["clusters"]) / 2 for name, one in kept.items()}
    best = max(means, key=means.__getitem__)
    assert (result.params.fused.method if result.params.fused else "none") == best
    assert result.cross_validated is not None
    assert result.cross_validated.to_json() == kept[best]
    assert result.checks == made.objective.measure(result.params)


def test_each_is_cross_validated_as_one_more_term(chosen: tuple[Search, SearchResult]) -> None:
    made, _ = chosen
    objective, trials = made.objective, made.completed()
    pair = [objective.scorer.rows[name] for name in ("id/val", "ood/val")]
    terms: dict[str, list[Any]] = {name: [] for name in objective.space}
    for trial in trials:
        if len(layers := objective.params(trial).layers) == 1:
            ((name, layer),) = layers.items()
            terms[name].append(objective.scorer.layer_scores({name: layer})[0])
    scores = [
        np.stack([np.concatenate([one[rows] for rows in pair]).astype(np.float32) for one in of_term])
        for of_term in terms.values()
    ]
    fused = objective.evaluator.standardise_fused("NCI")[1]
    scores.append(np.concatenate([fused[rows] for rows in pair])[None])  # a term of one trial
    predicted = np.concatenate([made.cache[name].read("logits") for name in ("id/val", "ood/val")]).argmax(axis=1)
    is_id = objective._is_id
    assert made.study is not None
    found = made.study.user_attrs["cross_validated"]["by_fusion"]["NCI"]
    for kind, folds in (("images", image_folds(is_id)), ("clusters", cluster_folds(is_id, predicted))):
        assert found[kind] == pytest.approx(cross_validate(scores, is_id, objective._plain, folds), abs=1e-12)


@pytest.mark.slow
def test_a_study_goes_on_with_another_choice(chosen: tuple[Search, SearchResult]) -> None:
    """The trials are the same; only the sum is made anew."""
    made, _ = chosen
    for fuse in ("none", "fDBD"):
        request = SearchRequest(
            cache=made.request.cache, storage=made.request.storage, output=made.request.output, fuse=fuse
        )
        again = Search(request)
        result = run(again)
        assert len(again.completed()) == len(made.completed())
        assert (result.params.fused.method if result.params.fused else "none") == fuse
        assert (result.without_fusion is not None) == (fuse != "none")
        assert ("--fuse" in again.command()) is True
        if fuse == "none":
            assert result.params.to_json().keys() == {"layers"}


def test_layers_and_weights_of_other_spaces(small_cache: Cache, tmp_path: Path) -> None:
    """`auto` adds nothing to the paper's detector; a name does."""
    _, plain = search(small_cache, tmp_path, space="paper", trials=30)
    assert plain.params.fused is None
    _, fused = search(small_cache, tmp_path, space="paper", trials=30, fuse="NCI")
    assert fused.params.fused is not None and fused.params.fused.weight > 0
    same = [{**vars_of(layer), "weight": None} for layer in fused.params.layers.values()]
    assert same == [{**vars_of(layer), "weight": None} for layer in plain.params.layers.values()]


def test_what_a_feature_score_is_worth_is_explained(chosen: tuple[Search, SearchResult]) -> None:
    """Its row is the last: alone it is its AUROC, without it the coverage's."""
    made, result = chosen
    plain = run(Search(replace(made.request, fuse="none")))
    made.cross_validate()  # which the study holds for the last --fuse alone
    found = explain(made)
    fused = result.params.fused
    assert fused is not None and found.fused == fused
    scores = made.objective.evaluator.standardise_fused(fused.method)[1]
    val, ood = (scores[made.objective.scorer.rows[name]] for name in ("id/val", "ood/val"))
    assert found.layers.iloc[-1].to_dict() == {
        "layer": fused.method,
        "weight": fused.weight,
        "alone": auroc(val, ood),
        "without": plain.checks.val_auroc,
    }
    assert fused.describe().startswith(f"{fused.method} is no coverage but a score of the last layer's input, ")


def vars_of(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in layer.__slots__}


def test_what_cannot_be_fused_is_refused(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    space = tmp_path / "space.toml"
    space.write_text("[default]\nweight = 1.0\n")
    with pytest.raises(InputError, match=r"^--fuse NCI is weighed in closed form: leave out weight"):
        search(cache, tmp_path, space=str(space), fuse="NCI")
    del zarr.open_group(cache.path, mode="r+")["classifier"]
    with pytest.raises(InputError, match=r"^--fuse NCI needs the last linear layer; the cache holds no last linear"):
        search(cache, tmp_path, fuse="NCI")
    made, result = search(cache, tmp_path, trials=40)
    assert result.params.fused is None
    assert made._candidates() == []
