"""Running a study: when it ends, what it says meanwhile, and several workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nacpipe.cache import Cache
from nacpipe.errors import InputError, StudyError
from nacpipe.tuning import workers as workers_room
from nacpipe.tuning.objective import Evaluator, ValidationMetrics
from nacpipe.tuning.request import SearchRequest, SearchResult
from nacpipe.tuning.runner import run
from nacpipe.tuning.study import Search
from nacpipe.tuning.trials import number_of, trial_params


def request_(cache: Cache, folder: Path, **more: Any) -> SearchRequest:
    return SearchRequest(**{"cache": Path(cache.path), "storage": str(folder / "s.log"), **more})


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
        ({"workers": 0}, r"^workers is 0; it must be at least 1$"),
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
    assert list(search.scorer.rows) == ["id/subtrain", "id/val", "ood/near/letters"]
    assert search.request.study_name == "nac-ood-near-letters-seed1"
    assert search.made_by()["val"] == "ood/near/letters"
    usual = run(Search(request_(small_cache, tmp_path, trials=30)))  # the same file, another study
    assert result.checks != usual.checks
    assert search.command().endswith(f"--trials 30 --val ood/near/letters --storage {tmp_path}/s.log")


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
    on_the_front = {number_of(trial) for trial in search.study.best_trials}
    chosen = next(t for t in search.completed() if trial_params(t, search.space) == result.params)
    assert number_of(chosen) in on_the_front
    values = {tuple(t.values) for t in search.study.best_trials}
    assert result.front == len(values)
    assert result.to_json()["front"] == result.front


# --- several workers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "grid.toml"
    path.write_text("[default]\nbins = [20, 50]\nsaturation = [2, 5]\nalpha = [0.1, 0.5, 2.0]\n")
    return path


def by_number(search: Search) -> dict[int, tuple[dict[str, Any], list[float] | None]]:
    return {number_of(trial): (trial.params, trial.values) for trial in search.completed()}


def test_workers_give_the_grid_that_one_gives(small_cache: Cache, tmp_path: Path, grid: Path) -> None:
    found: list[tuple[Search, SearchResult]] = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        search = Search(request_(small_cache, folder, space=str(grid), sampler="grid", workers=workers))
        found.append((search, run(search)))
    (one, expected), (three, result) = found
    assert len(by_number(one)) == 144
    assert by_number(three) == by_number(one)
    assert (result.params, result.checks) == (expected.params, expected.checks)


def test_workers_reach_exactly_the_trials_and_go_on(small_cache: Cache, tmp_path: Path) -> None:
    for trials in (20, 61):
        search = Search(request_(small_cache, tmp_path, workers=2, trials=trials))
        assert run(search).trials == trials
        assert sorted(by_number(search)) == list(range(trials))


def test_interrupted_with_workers(small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is left, and what was recorded stays."""
    started: list[int] = []
    start = workers_room.Workers._start

    def watch(pool: workers_room.Workers) -> Any:
        worker = start(pool)
        started.append(worker.process.pid)
        return worker

    def interrupt(done: int, _best: float) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workers_room.Workers, "_start", watch)
        result = run(Search(request_(small_cache, tmp_path, workers=2, trials=50)), interrupt)
    assert (result.ended, result.trials) == ("interrupted", 9)
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert run(Search(request_(small_cache, tmp_path, trials=50))).trials == 50


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


def test_the_guided_objective_finds_the_same_in_workers(small_cache: Cache, tmp_path: Path) -> None:
    """A grid of terms: workers know Energy too, and the best trial is the one that correlates most."""
    (tmp_path / "space.toml").write_text("[default]\nbins = [10, 20]\nalpha = [0.5, 2]\nsaturation = 5\n")
    asked = {"space": str(tmp_path / "space.toml"), "sampler": "grid", "objective": "guided"}
    results = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        search = Search(request_(small_cache, tmp_path / str(workers), workers=workers, **asked))
        results.append(run(search))
        values = [trial.values[0] for trial in search.completed()]
        assert len(values) == 16
        assert results[-1].checks.val_correlation == max(values) > min(values)
    assert results[0].params == results[1].params


def test_features_have_no_energy_to_learn_from(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "f.zarr", identity={"outputs": "features"})
    with pytest.raises(InputError, match=r"f\.zarr holds features, not logits: without Energy, search for auroc$"):
        Search(request_(cache, tmp_path, objective="guided"))
