"""`nacpipe.tune` finds what the command finds, goes on, and shows itself in notebooks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import optuna
import pytest

import nacpipe
from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import CacheError, InputError
from nacpipe.tuning.request import SearchResult


@pytest.fixture(scope="module")
def tuned(small_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    path = tmp_path_factory.mktemp("tune") / "c.zarr"
    shutil.copytree(small_cache.path, path)
    return path, nacpipe.tune(nacpipe.open_cache(path), trials=30, space="paper", progress=False)


def test_the_result_has_parameters_study_and_checks(tuned: tuple[Path, SearchResult]) -> None:
    path, result = tuned
    assert isinstance(result.study, optuna.Study)
    assert len(result.study.trials) == result.trials == 30
    assert result.study.best_value == pytest.approx(result.checks.val_auroc)
    scores = nacpipe.score_splits(nacpipe.open_cache(path), result.params, ["id/val", "ood/val"])
    higher = (
        np.mean(scores["id/val"][:, None] > scores["ood/val"])
        + np.mean(scores["id/val"][:, None] == scores["ood/val"]) / 2
    )
    assert result.checks.val_auroc == pytest.approx(higher)
    assert result.best_plain == (result.guide, result.guide_val)
    assert nacpipe.read_params(path.with_name("c.params.json")) == result.params


def test_the_default_is_cross_validated(small_cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    result = nacpipe.tune(tmp_path / "c.zarr", space="terms", trials=40, layers=["avgpool"], progress=False)
    assert result.params.layers
    assert result.cross_validated is None or 0 <= result.cross_validated.images <= 1


def test_the_same_call_goes_on_as_the_command_does(tuned: tuple[Path, SearchResult], tmp_path: Path) -> None:
    path, result = tuned
    again = tmp_path / "c.zarr"
    shutil.copytree(path, again)
    nacpipe.tune(again, trials=12, space="paper", progress=False)
    going_on = nacpipe.tune(again, trials=30, space="paper", progress=False)
    assert going_on.params == result.params
    assert going_on.study is not None and result.study is not None
    assert [t.values for t in going_on.study.trials] == [t.values for t in result.study.trials]
    with pytest.raises(SystemExit) as ended:
        main(["search", str(again), "--trials", "30", "--space", "paper"])
    assert ended.value.code == 0
    assert nacpipe.read_params(again.with_name("c.params.json")) == result.params


def test_progress_is_shown_on_stderr(tuned: tuple[Path, SearchResult], capsys: pytest.CaptureFixture[str]) -> None:
    nacpipe.tune(tuned[0], trials=31, space="paper")
    out, err = capsys.readouterr()
    assert out == ""
    assert "31/31" in err and "best AUROC" in err


def test_what_makes_no_sense_is_refused(tuned: tuple[Path, SearchResult], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trials is 0; it must be at least 1"):
        nacpipe.tune(tuned[0], trials=0, progress=False)
    with pytest.raises(CacheError, match="there is no cache at"):
        nacpipe.tune(tmp_path / "none.zarr", progress=False)


def test_a_notebook_shows_tables(tuned: tuple[Path, SearchResult]) -> None:
    path, result = tuned
    html = result._repr_html_()
    assert "<td>avgpool</td>" in html
    assert f"<td>{100 * result.checks.val_auroc:.2f}</td>" in html
    assert str(result) == (
        f"id/val: AUROC {100 * result.checks.val_auroc:.2f} %, FPR@95 {100 * result.checks.val_fpr95:.2f} %, AUROC of"
        f" {result.guide} {100 * float(result.guide_val or 0):.2f} %; 1 term, {result.trials} trials"
    )
    shown = nacpipe.open_cache(path)._repr_html_()
    assert "<tr><td>id/val</td><td>40</td><td>yes</td></tr>" in shown
    assert "<tr><td>layer1</td><td>layer1</td><td>sum-nchw</td><td>4</td></tr>" in shown
