"""A person's own Optuna study with our objective and samplers, and our studies in Optuna's tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

import nacpipe
from nacpipe.cache import Cache
from nacpipe.errors import InputError
from nacpipe.scoring.term_index import IndexBuilder
from nacpipe.tuning import runner
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.storage import open_storage
from nacpipe.tuning.study import Search

BY_HAND = {
    f"{layer}.{field}": value
    for layer in ("avgpool", "layer1")
    for field, value in (("bins", 20), ("saturation", 5), ("alpha", 0.5))
}


@pytest.fixture(scope="module")
def objective(small_cache: Cache) -> nacpipe.Objective:
    return nacpipe.Objective(small_cache.path, space="paper")


def check(study: optuna.Study, objective: nacpipe.Objective) -> None:
    """Every trial says what it was, and can be measured again."""
    for trial in study.get_trials(states=(TrialState.COMPLETE,)):
        metrics = objective.measure(objective.params(trial))
        assert trial.value == trial.user_attrs["val_auroc"] == metrics.val_auroc
        assert trial.user_attrs["val_fpr95"] == metrics.val_fpr95
        assert trial.user_attrs["subtrain_auroc"] == metrics.subtrain_auroc


def ours(small_cache: Cache, folder: Path, trials: int, **more: Any) -> Search:
    """A search of our own, to compare with."""
    search = Search(
        SearchRequest(cache=small_cache.path, space="paper", storage=str(folder / "ours.log"), trials=trials, **more)
    )
    runner.run(search)
    return search


def test_tpe_with_callbacks(objective: nacpipe.Objective) -> None:
    seen: list[int] = []
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=1))
    callbacks: list[Any] = [lambda _study, trial: seen.append(trial.number), MaxTrialsCallback(15)]
    study.optimize(objective, n_trials=100, callbacks=callbacks)
    assert seen == list(range(15))
    assert len({repr(trial.params) for trial in study.trials}) == 15
    check(study, objective)
    for trial in study.trials:
        assert set(trial.params) == set(BY_HAND)
        assert set(trial.user_attrs) == {"weights", "val_auroc", "val_fpr95", "subtrain_auroc"}
        assert objective.weigh(objective.params(trial)) == objective.params(trial)  # in closed form
    assert study.best_value == max(trial.user_attrs["val_auroc"] for trial in study.trials)


def test_our_sampler_does_what_our_search_does(
    objective: nacpipe.Objective, small_cache: Cache, tmp_path: Path
) -> None:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "theirs.log")))
    study = optuna.create_study(
        study_name="theirs",
        direction="maximize",
        storage=storage,
        sampler=nacpipe.LayerwiseSampler(objective, seed=1),
    )
    study.optimize(objective, n_trials=30)
    study = optuna.load_study(study_name="theirs", storage=storage, sampler=nacpipe.LayerwiseSampler(objective, seed=1))
    study.optimize(objective, n_trials=30)
    check(study, objective)
    expected = ours(small_cache, tmp_path, 60).completed()
    for mine, other in zip(study.trials, expected, strict=True):
        assert (mine.params, mine.value) == (other.params, other.value)
        assert mine.user_attrs == {key: value for key, value in other.user_attrs.items() if key != "seconds"}


def test_ask_and_tell(objective: nacpipe.Objective, small_cache: Cache, tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", sampler=nacpipe.LayerwiseSampler(objective, seed=1))
    for number in range(8):
        trial = study.ask(objective.distributions) if number % 2 else study.ask()
        study.tell(trial, objective(trial))
    check(study, objective)
    assert [trial.params for trial in study.trials] == [t.params for t in ours(small_cache, tmp_path, 8).completed()]


@pytest.mark.parametrize("sampler", ["layers", "tpe"])
def test_an_enqueued_trial_is_tried_as_it_is(objective: nacpipe.Objective, sampler: str) -> None:
    """All of its parameters or some, the others at random; ours goes on from it where it is the best."""
    study = optuna.create_study(
        direction="maximize",
        sampler=nacpipe.LayerwiseSampler(objective, seed=1) if sampler == "layers" else None,
    )
    study.enqueue_trial(BY_HAND)
    study.enqueue_trial({"avgpool.bins": 33})
    study.enqueue_trial(BY_HAND, user_attrs={"weights": {"avgpool": 0.25, "layer1": 0.75}})
    study.optimize(objective, n_trials=6)
    check(study, objective)
    assert study.trials[0].params == study.trials[2].params == BY_HAND
    assert study.trials[1].params["avgpool.bins"] == 33
    assert study.trials[2].user_attrs["weights"] == {"avgpool": 0.25, "layer1": 0.75}
    assert "position" not in {key for trial in study.trials[:3] for key in trial.user_attrs}
    if sampler == "layers":
        assert [trial.user_attrs["position"] for trial in study.trials[3:]] == [3, 4, 5]


@pytest.mark.parametrize("sampler", ["layers", "tpe"])
def test_two_trials_at_once(objective: nacpipe.Objective, sampler: str) -> None:
    ours_ = nacpipe.LayerwiseSampler(objective, seed=1)
    study = optuna.create_study(
        direction="maximize", sampler=ours_ if sampler == "layers" else optuna.samplers.TPESampler(seed=1)
    )
    study.optimize(objective, n_trials=60, n_jobs=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 60
    check(study, objective)
    if sampler == "layers":
        assert sorted(trial.user_attrs["position"] for trial in study.trials) == list(range(60))


def test_a_fixed_trial_is_scored(objective: nacpipe.Objective) -> None:
    trial = optuna.trial.FixedTrial(BY_HAND)
    value = objective(trial)
    assert value == trial.user_attrs["val_auroc"] > 0.7
    again = optuna.trial.FixedTrial(BY_HAND)
    again.set_user_attr("weights", {"avgpool": 1.0, "layer1": 0.0})
    assert objective(again) != value


def test_two_values(small_cache: Cache) -> None:
    objective = nacpipe.Objective(small_cache, objective="pareto", space="paper")
    assert objective.directions == ["maximize", "minimize"]
    for sampler in (nacpipe.LayerwiseSampler(objective, seed=1), optuna.samplers.NSGAIISampler(seed=1)):
        study = optuna.create_study(directions=objective.directions, sampler=sampler)
        study.optimize(objective, n_trials=5)
        for trial in study.trials:
            assert trial.values == [trial.user_attrs["val_auroc"], trial.user_attrs["val_fpr95"]]


def test_a_grid_of_a_persons_own(small_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("[default]\nbins = [20, 50]\nsaturation = 5\nalpha = [0.1, 0.5]\n")
    objective = nacpipe.Objective(small_cache, space=tmp_path / "s.toml", layers=["layer1"])
    study = optuna.create_study(direction="maximize", sampler=nacpipe.GridSampler(objective, seed=2))
    study.optimize(objective)  # it ends by itself
    tried = {(trial.params["layer1.bins"], trial.params["layer1.alpha"]) for trial in study.trials}
    assert len(study.trials) == 4
    assert tried == {(20, 0.1), (20, 0.5), (50, 0.1), (50, 0.5)}
    with pytest.raises(InputError, match=r"^a grid needs values, and avgpool\.bins is a range"):
        nacpipe.GridSampler(nacpipe.Objective(small_cache, space="paper"))


def test_an_objective_of_what_is_not_there(small_cache: Cache) -> None:
    with pytest.raises(InputError, match=r"^val is id/train; name a split that plays OOD, such as ood/val$"):
        nacpipe.Objective(small_cache, val="id/train")
    with pytest.raises(nacpipe.NacError, match=r"^split 'ood/nowhere' is not in "):
        nacpipe.Objective(small_cache, val="ood/nowhere")


# --- our studies in Optuna's tools ------------------------------------------------------------------------------------


def test_a_study_of_ours_is_optunas(small_cache: Cache, tmp_path: Path) -> None:
    search = ours(small_cache, tmp_path, 30)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "ours.log")))
    study = optuna.load_study(study_name="nac-paper-seed1", storage=storage)
    assert [trial.params for trial in study.trials] == [trial.params for trial in search.completed()]
    assert search.objective.params(study.best_trial).layers.keys() == {"avgpool", "layer1"}
    importances = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    assert set(importances) == set(BY_HAND)
    frame = study.trials_dataframe()
    assert frame["value"].tolist() == [trial.value for trial in search.completed()]
    assert frame["user_attrs_phase"][0] == "layer avgpool"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["{}/ours.log", pytest.param("sqlite:///{}/ours.db", marks=pytest.mark.slow)])
def test_the_optuna_command_opens_it(small_cache: Cache, tmp_path: Path, where: str) -> None:
    url = where.format(tmp_path)
    search = Search(SearchRequest(cache=small_cache.path, space="paper", storage=url, trials=5))
    runner.run(search)

    def tool(*words: str) -> Any:
        kind = [] if "://" in url else ["--storage-class", "JournalFileBackend"]
        command = [str(Path(sys.executable).with_name("optuna")), *words, "--storage", url, *kind, "-f", "json"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert [study["name"] for study in tool("studies")] == ["nac-paper-seed1"]
    shown = tool("trials", "--study-name", "nac-paper-seed1")
    expected = search.completed()
    assert [row["number"] for row in shown] == [0, 1, 2, 3, 4]
    assert [row["value"] for row in shown] == [trial.value for trial in expected]
    assert [row["params"]["avgpool.bins"] for row in shown] == [trial.params["avgpool.bins"] for trial in expected]
    assert tool("best-trial", "--study-name", "nac-paper-seed1")["value"] == max(trial.value or 0 for trial in expected)
    assert open_storage(url).get_n_trials(search.study._study_id) == 5  # type: ignore[union-attr]


def test_every_term_is_sorted_once_whatever_the_sampler(small_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the default space too, whose terms our own sampler tries one by one."""
    objective = nacpipe.Objective(small_cache)
    made: list[str] = []
    make = IndexBuilder.index
    monkeypatch.setattr(IndexBuilder, "index", lambda self, term: made.append(term.name) or make(self, term))
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=1))
    study.optimize(objective, n_trials=3)
    assert sorted(made) == sorted(objective.space)
