"""A study: exactly the trials asked for, the same ones whatever happened, and a result that can be checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from nacpipe.cache import Cache
from nacpipe.errors import InputError, ParamsError
from nacpipe.method import published
from nacpipe.method.metrics import auroc, detect
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import PLAIN_SCORES
from nacpipe.scoring.coverage import score_splits
from nacpipe.scoring.params_file import read_params, write_params
from nacpipe.tuning import runner as sweep
from nacpipe.tuning.request import SearchRequest, SearchResult
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import Evaluator, ValidationMetrics

TRIALS = 60  # through both layers alone and into the first round


def request_(cache: Cache, folder: Path, **more: Any) -> SearchRequest:
    return SearchRequest(
        **{"cache": Path(cache.path), "space": "paper", "storage": str(folder / "s.log"), "trials": TRIALS, **more}
    )


def trials_of(search: Search) -> list[tuple[float | None, dict[str, Any], dict[str, Any]]]:
    """Everything of a trial but its clock."""
    return [
        (trial.value, dict(trial.params), {k: v for k, v in trial.user_attrs.items() if k != "seconds"})
        for trial in search.completed()
    ]


def run(request: SearchRequest) -> tuple[Search, SearchResult]:
    search = Search(request)
    return search, sweep.run(search)


@pytest.fixture(scope="module")
def whole(small_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, SearchResult]:
    """An uninterrupted study."""
    return run(request_(small_cache, tmp_path_factory.mktemp("whole")))


def test_exactly_the_trials_asked_for(whole: tuple[Search, SearchResult]) -> None:
    search, result = whole
    assert search.study is not None
    trials = search.study.get_trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert result.trials == TRIALS
    assert result.ended == "trials"
    assert result.seed == 1


def test_every_trial_says_what_it_was(whole: tuple[Search, SearchResult]) -> None:
    search, _ = whole
    for trial in search.completed():
        expected = "layer avgpool" if trial.number < 24 else "layer layer1" if trial.number < 48 else "round avgpool"
        assert trial.user_attrs["phase"] == expected
        checks = search.objective.measure(search.objective.params(trial))
        assert trial.value == checks.val_auroc
        assert trial.user_attrs["position"] == trial.number
        assert sum(trial.user_attrs["weights"].values()) == pytest.approx(1)
        if trial.number < 48:  # alone
            assert trial.user_attrs["weights"] == {n: float(f"layer {n}" == expected) for n in ("avgpool", "layer1")}
        assert trial.user_attrs["val_auroc"] == checks.val_auroc
        assert trial.user_attrs["val_fpr95"] == checks.val_fpr95
        assert trial.user_attrs["subtrain_auroc"] == checks.subtrain_auroc
        assert set(trial.params) == {
            f"{layer}.{field}" for layer in ("avgpool", "layer1") for field in ("bins", "alpha", "saturation")
        }
        assert trial.datetime_start is not None
        assert trial.datetime_complete is not None
        assert trial.duration is not None
        assert trial.duration.total_seconds() >= 0


def test_the_result_is_the_best_trial(whole: tuple[Search, SearchResult]) -> None:
    search, result = whole
    values = [trial.value or 0.0 for trial in search.completed()]
    first_best = search.completed()[int(np.argmax(values))]
    assert result.params == search.objective.params(first_best)
    assert result.checks.val_auroc == max(values)
    assert result.alone["layer1"] == max(values[24:48])
    assert result.alone["avgpool"] >= max(values[:24])  # a later round may give it all the weight
    assert result.seconds > 0


def test_of_equal_trials_the_first_is_the_best(
    small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal = ValidationMetrics(val_auroc=0.75, val_fpr95=0.5, subtrain_auroc=None)
    monkeypatch.setattr(Evaluator, "measure", lambda _evaluator, _params: equal)
    search, result = run(request_(small_cache, tmp_path, trials=5))
    assert result.params == search.objective.params(search.completed()[0])
    assert result.params != search.objective.params(search.completed()[1])


def test_the_result_can_be_recomputed(whole: tuple[Search, SearchResult], small_cache: Cache) -> None:
    """By the other way to walk from states to scores, and the other door to the metrics."""
    _, result = whole
    scores = score_splits(small_cache, result.params, ["id/val", "ood/val", "id/subtrain"])
    found = detect(scores["id/val"], scores["ood/val"])
    assert (result.checks.val_auroc, result.checks.val_fpr95) == (found.auroc, found.fpr95)
    assert result.checks.subtrain_auroc == detect(scores["id/val"], scores["id/subtrain"]).auroc
    logits = {name: np.asarray(small_cache[name].logits[:]) for name in scores}
    plain = [{name: score(array) for name, array in logits.items()} for score in PLAIN_SCORES.values()]
    own = max(plain, key=lambda scores: auroc(scores["id/val"], scores["ood/val"]))
    assert PLAIN_SCORES[result.guide or ""] is [*PLAIN_SCORES.values()][plain.index(own)]
    assert result.guide_val == auroc(own["id/val"], own["ood/val"])
    assert result.guide_subtrain == auroc(own["id/val"], own["id/subtrain"])


def test_the_search_beats_its_first_points(whole: tuple[Search, SearchResult]) -> None:
    search, result = whole
    values = [trial.value or 0.0 for trial in search.completed()]
    assert result.checks.val_auroc > max(values[:12])
    assert result.checks.val_auroc >= 0.9


def test_params_json_holds_the_result(whole: tuple[Search, SearchResult], tmp_path: Path) -> None:
    search, result = whole
    write_params(tmp_path / "p.json", result.params, result=result.to_json(), made_by=search.made_by())
    assert read_params(tmp_path / "p.json") == result.params
    stored = json.loads((tmp_path / "p.json").read_text())
    assert stored["result"] == result.to_json()
    assert list(stored["result"]) == [
        *("val_auroc", "val_fpr95", "subtrain_auroc", "guide", "guide_val_auroc", "guide_subtrain_auroc", "overfits"),
        *("alone", "trials", "seconds", "seed", "ended"),
    ]
    assert stored["result"]["trials"] == TRIALS
    made_by = stored["made_by"]
    assert made_by["cache"] == str(search.request.cache)
    assert made_by["study"] == search.request.where
    assert made_by["study_name"] == "nac-paper-seed1"
    assert len(made_by["fingerprint"]) == 64
    assert set(made_by["space"]) == {"avgpool", "layer1"}


def test_going_on_gives_the_trials_of_a_single_run(
    whole: tuple[Search, SearchResult], small_cache: Cache, tmp_path: Path
) -> None:
    for trials in (1, 10, 30, 50, TRIALS):
        search, result = run(request_(small_cache, tmp_path, trials=trials))
        assert len(search.completed()) == result.trials == trials
    assert trials_of(search) == trials_of(whole[0])
    assert (result.params, result.checks) == (whole[1].params, whole[1].checks)
    # Fewer than there are: nothing is run and nothing is lost.
    assert run(request_(small_cache, tmp_path, trials=5))[1].trials == TRIALS


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_study(
    whole: tuple[Search, SearchResult], small_cache: Cache, tmp_path: Path, threads: int
) -> None:
    search, result = run(request_(small_cache, tmp_path, threads=threads))
    assert trials_of(search) == trials_of(whole[0])
    assert result.params == whole[1].params


def test_another_seed_is_another_study_in_the_same_file(
    whole: tuple[Search, SearchResult], small_cache: Cache, tmp_path: Path
) -> None:
    first, _ = run(request_(small_cache, tmp_path, trials=5))
    second, result = run(request_(small_cache, tmp_path, trials=5, seed=2))
    assert result.seed == 2
    assert trials_of(second) != trials_of(first)
    assert second.made_by()["study_name"] == "nac-paper-seed2"
    again, _ = run(request_(small_cache, tmp_path, trials=8))
    assert trials_of(again) == trials_of(whole[0])[:8]


def test_test_splits_are_never_read(
    whole: tuple[Search, SearchResult], make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    """Without them the study is the same one, bound to the same fingerprint."""
    rows = dict.fromkeys(["id/test", "ood/near/letters", "ood/far/textures"], 0)
    search, _ = run(request_(make_cache(tmp_path / "c.zarr", rows=rows), tmp_path))
    assert trials_of(search) == trials_of(whole[0])
    assert search.made_by()["fingerprint"] == whole[0].made_by()["fingerprint"]


def test_published_parameters_are_the_first_trial(
    small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LayerParams(bins=5000, saturation=3000, alpha=1e-6)  # outside every range
    params = NacParams(layers={"layer1": layer, "avgpool": layer})
    monkeypatch.setitem(published.PUBLISHED, ("digits", "made_up"), params)
    search, _ = run(request_(small_cache, tmp_path, trials=3))
    assert [trial.user_attrs["phase"] for trial in search.completed()] == ["published"] + ["layer avgpool"] * 2
    first = search.objective.params(search.completed()[0])
    assert first.layers == {name: replace(layer, weight=0.5) for name in ("avgpool", "layer1")}
    assert search.completed()[0].value == search.objective.measure(first).val_auroc


def test_some_layers_only(small_cache: Cache, tmp_path: Path) -> None:
    _, result = run(request_(small_cache, tmp_path, trials=30, layers=("layer1",)))
    assert list(result.params.layers) == ["layer1"]
    assert result.params.layers["layer1"].weight == 1
    assert list(result.alone) == ["layer1"]
    with pytest.raises(ParamsError, match=r"^layer 'layer7' is not in .*; it holds avgpool, layer1, logits;"):
        Search(request_(small_cache, tmp_path, layers=("layer1", "layer7")))


@pytest.mark.parametrize("layers", [("layer1", "avgpool"), ("avgpool", "layer1", "avgpool")])
def test_the_order_in_which_layers_are_named_does_not_matter(
    whole: tuple[Search, SearchResult], small_cache: Cache, tmp_path: Path, layers: tuple[str, ...]
) -> None:
    run(request_(small_cache, tmp_path, trials=30))
    assert trials_of(run(request_(small_cache, tmp_path, layers=layers))[0]) == trials_of(whole[0])


def test_a_cache_without_subtrain(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"id/subtrain": 0})
    search, result = run(request_(cache, tmp_path, trials=5))
    assert all(trial.user_attrs["subtrain_auroc"] is None for trial in search.completed())
    assert result.checks.subtrain_auroc is None
    assert result.guide_subtrain is None
    assert not result.overfits
    assert result.to_json()["subtrain_auroc"] is None


# --- when it ends -----------------------------------------------------------------------------------------------------


def test_time_is_up(
    whole: tuple[Search, SearchResult], small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that moves by a second at every look: at the start, twice before the trials, twice in each."""
    looks = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: float(next(looks))))
        _, result = run(request_(small_cache, tmp_path, timeout=5.0))
    assert result.ended == "timeout"
    assert result.trials == 2
    assert result.seconds == 5
    search, result = run(request_(small_cache, tmp_path, timeout=1e9))
    assert result.ended == "trials"
    assert result.seconds > 5
    assert trials_of(search) == trials_of(whole[0])


def test_interrupted_after_a_trial(whole: tuple[Search, SearchResult], small_cache: Cache, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def progress(done: int, best: float) -> None:
        seen.append((done, best))
        if done == 7:
            raise KeyboardInterrupt

    search = Search(request_(small_cache, tmp_path))
    result = sweep.run(search, progress)
    assert result.ended == "interrupted"
    assert result.trials == len(search.completed()) == 7
    values = [value or 0.0 for value, _, _ in trials_of(search)]
    assert seen == [(number + 1, max(values[: number + 1])) for number in range(7)]
    assert trials_of(run(request_(small_cache, tmp_path))[0]) == trials_of(whole[0])


def test_interrupted_within_a_trial(
    whole: tuple[Search, SearchResult], small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = Evaluator.measure, iter(range(10**6))

    def interrupt(evaluator: Evaluator, params: NacParams) -> ValidationMetrics:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return measure(evaluator, params)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "measure", interrupt)
        search, result = run(request_(small_cache, tmp_path))
    assert result.ended == "interrupted"
    assert search.study is not None
    assert len(search.study.get_trials()) == result.trials == 3
    assert trials_of(run(request_(small_cache, tmp_path))[0]) == trials_of(whole[0])


def test_interrupted_before_any_trial(small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to report, so the interrupt goes on to whoever can say so."""

    def interrupt(_search: Search, _params: NacParams) -> ValidationMetrics:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(request_(small_cache, tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trials": 0}, r"^trials is 0; it must be at least 1$"),
        ({"trials": -5}, r"^trials is -5; it must be at least 1$"),
        ({"timeout": 0.0}, r"^timeout is 0\.0; it must be above 0 seconds$"),
    ],
)
def test_senseless_requests(small_cache: Cache, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Search(request_(small_cache, tmp_path, **wrong))
    assert not list(tmp_path.iterdir())
