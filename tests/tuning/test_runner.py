"""Running a study: when it ends, and what it says meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe.cache import Cache
from nacpipe.errors import InputError, StudyError
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.runner import run
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import Evaluator, ValidationMetrics


def request_(cache: Cache, folder: Path, **more: Any) -> SearchRequest:
    return SearchRequest(**{"cache": Path(cache.path), "space": "paper", "storage": str(folder / "s.log"), **more})


def made_up(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials whose AUROC is the next of these; the first again at the end."""
    left = iter([*values, *[values[0]] * 1000])
    monkeypatch.setattr(
        Evaluator,
        "measure",
        lambda _evaluator, _params: ValidationMetrics(val_auroc=next(left), val_fpr95=0.5, subtrain_auroc=None),
    )


# --- patience ---------------------------------------------------------------------------------------------------------


def test_patience_counts_trials_without_improvement(
    small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up([0.1, 0.2, 0.2, 0.2, 0.3, 0.1, 0.1, 0.1, 0.9], monkeypatch)
    request = request_(small_cache, tmp_path, sampler="random", patience=3)
    result = run(Search(request))
    assert (result.trials, result.ended) == (8, "patience")
    again = run(Search(request))  # it has waited long enough already
    assert (again.trials, again.ended) == (8, "patience")
    assert run(Search(replace(request, patience=4))).trials == 9


def test_the_opening_does_not_count(small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are looked at alone first; that the second one is worse than the first is no reason to stop."""
    made_up([0.9], monkeypatch)
    result = run(Search(request_(small_cache, tmp_path, patience=5)))
    assert (result.trials, result.ended) == (2 * 24 + 5, "patience")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patience": 0}, r"^patience is 0; it must be at least 1$"),
        ({"val": "id/val"}, r"^val is id/val; name a split that plays OOD, such as ood/val$"),
        ({"val": "ood/nowhere"}, r"^split 'ood/nowhere' is not in "),
        ({"space": "published", "sampler": "tpe"}, r"^the published space is a grid; leave out --sampler tpe$"),
        ({"sampler": "grid"}, r"^a grid needs values, and avgpool\.bins is a range; list its values in a --space FILE"),
    ],
)
def test_senseless_requests(small_cache: Cache, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Search(request_(small_cache, tmp_path, **wrong))
    assert not list(tmp_path.iterdir())


# --- other objectives and validation splits ---------------------------------------------------------------------------


def test_another_validation_split(small_cache: Cache, tmp_path: Path) -> None:
    """It is what is searched against, and the study says so; ood/val is not read."""
    search = Search(request_(small_cache, tmp_path, val="ood/near/letters", trials=30))
    result = run(search)
    assert list(search.objective.scorer.rows) == ["id/subtrain", "id/val", "ood/near/letters"]
    assert search.request.study_name == "nac-paper-ood-near-letters-seed1"
    assert search.made_by()["val"] == "ood/near/letters"
    usual = run(Search(request_(small_cache, tmp_path, trials=30)))  # the same file, another study
    assert result.checks != usual.checks
    assert search.command().endswith(f"--trials 30 --space paper --val ood/near/letters --storage {tmp_path}/s.log")


def test_fpr95_is_searched_for(small_cache: Cache, tmp_path: Path) -> None:
    search = Search(request_(small_cache, tmp_path, objective="fpr95", trials=150))
    result = run(search)
    assert search.study is not None
    assert search.study.direction.name == "MINIMIZE"
    least = min(trial.user_attrs["val_fpr95"] for trial in search.completed())
    assert result.checks.val_fpr95 == least == search.study.best_value
    equal = [t.user_attrs["val_auroc"] for t in search.completed() if t.user_attrs["val_fpr95"] == least]
    assert result.checks.val_auroc == max(equal)


def test_both_are_searched_for(small_cache: Cache, tmp_path: Path) -> None:
    search = Search(request_(small_cache, tmp_path, objective="pareto", trials=150))
    result = run(search)
    assert search.study is not None
    on_the_front = {trial.number for trial in search.study.best_trials}
    chosen = next(t for t in search.completed() if search.objective.params(t) == result.params)
    assert chosen.number in on_the_front
    values = {tuple(t.values) for t in search.study.best_trials}
    assert result.front == len(values)
    assert result.to_json()["front"] == result.front


# --- one process ------------------------------------------------------------------------------------------------------


def test_sqlite_is_for_one_process(small_cache: Cache, tmp_path: Path) -> None:
    from nacpipe.tuning.storage import only_runner

    url = f"sqlite:///{tmp_path}/s.db"
    message = "is being searched by another process"
    with only_runner(url, "s"), pytest.raises(StudyError, match=message), only_runner(url, "s"):
        pass
    search = Search(request_(small_cache, tmp_path, storage=url, trials=5))
    assert run(search).trials == 5


def test_progress_counts_completed_trials(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache, seen = make_cache(tmp_path / "c.zarr"), []
    run(Search(request_(cache, tmp_path, trials=4)), lambda done, best: seen.append((done, best)))
    run(Search(request_(cache, tmp_path, trials=6)), lambda done, best: seen.append((done, best)))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [best for _, best in seen] == sorted(best for _, best in seen)


# --- the guided objective ---------------------------------------------------------------------------------------------


def test_the_guided_objective_takes_the_trial_that_correlates_most(small_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("[default]\nbins = [10, 20]\nalpha = [0.5, 2]\nsaturation = 5\n")
    asked = {"space": str(tmp_path / "space.toml"), "sampler": "grid", "objective": "guided"}
    search = Search(request_(small_cache, tmp_path, **asked))
    result = run(search)
    values = [trial.values[0] for trial in search.completed()]
    assert len(values) == 16
    assert result.checks.val_correlation == max(values) > min(values)
    best = next(trial for trial in search.completed() if trial.values[0] == max(values))
    assert result.params == search.objective.params(best)


def test_features_have_no_plain_score_to_learn_from(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """The target is ID or OOD alone then."""
    cache = make_cache(tmp_path / "f.zarr", identity={"outputs": "features"})
    search = Search(request_(cache, tmp_path, objective="guided", trials=3))
    result = run(search)
    assert (search.objective.guide, result.guide, result.guide_val) == (None, None, None)
    scorer = search.objective.scorer
    pair = [scorer.scores(result.params)[scorer.rows[name]] for name in ("id/val", "ood/val")]
    target = np.repeat([1.0, -1.0], [len(side) for side in pair])
    assert result.checks.val_correlation == pytest.approx(np.corrcoef(np.concatenate(pair), target)[0, 1])
