"""Every image's scores in a file, read back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import InputError, MissingExtra
from nacpipe.evaluation.method_scores import MethodScores, score_cache
from nacpipe.evaluation.score_files import save_scores
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})
SETS = ["id/test", "ood/near/letters", "ood/far/textures"]


@pytest.fixture
def caches(make_cache: Callable[..., Cache], tmp_path: Path) -> list[Cache]:
    caches = [
        make_cache(tmp_path / f"s{seed}.zarr", seed=seed, identity={"weights": str(seed) * 64}) for seed in (0, 1)
    ]
    for seed in (0, 1):
        write_params(tmp_path / f"s{seed}.params.json", PARAMS)
    return caches


def test_npz(caches: list[Cache], tmp_path: Path) -> None:
    run = score_cache(caches[0], PARAMS)
    target = tmp_path / "scores.npz"
    printed = CliRunner().invoke(main, ["evaluate", caches[0].path, "--scores", str(target)])
    assert (printed.exit_code, printed.stderr) == (0, f"wrote {target}\n")
    found = dict(np.load(target, allow_pickle=False))
    columns = ["index", "label", "NAC", "MSP", "MaxLogit", "Energy"]
    assert sorted(found) == sorted(f"{split}/{column}" for split in SETS for column in columns)
    for split in SETS:
        np.testing.assert_array_equal(found[f"{split}/label"], caches[0][split].label)
        np.testing.assert_array_equal(found[f"{split}/index"], caches[0][split].index)
        for name, method in run.methods.items():
            np.testing.assert_array_equal(found[f"{split}/{name}"], method.scores[split])
    os.umask(umask := os.umask(0o022))
    assert (target.stat().st_mode & 0o777, list(tmp_path.glob(".*"))) == (0o666 & ~umask, [])


def test_npz_of_several_runs(caches: list[Cache], tmp_path: Path) -> None:
    target = tmp_path / "scores.npz"
    CliRunner().invoke(main, ["evaluate", *(cache.path for cache in caches), "--scores", str(target)])
    found = dict(np.load(target, allow_pickle=False))
    for cache in caches:
        expected = score_cache(cache, PARAMS).methods["NAC"].scores["ood/near/letters"]
        np.testing.assert_array_equal(found[f"{cache.path}/ood/near/letters/NAC"], expected)


def test_parquet(caches: list[Cache], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    cannot = MethodScores(reasons=dict.fromkeys(SETS, "it cannot"))
    runs = [score_cache(cache, PARAMS, more={"none": cannot}) for cache in caches]
    save_scores(tmp_path / "s.parquet", caches, runs)
    found = pd.read_parquet(tmp_path / "s.parquet")
    assert list(found.columns) == ["cache", "split", "index", "label", "NAC", "MSP", "MaxLogit", "Energy", "none"]
    assert len(found) == 2 * (50 + 35 + 20)
    part = found[(found["cache"] == caches[1].path) & (found["split"] == "ood/far/textures")]
    np.testing.assert_array_equal(part["NAC"], runs[1].methods["NAC"].scores["ood/far/textures"])
    np.testing.assert_array_equal(part["index"], np.arange(20))
    assert found["none"].isna().all()


def test_what_cannot_be_written_is_refused_first(
    caches: list[Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nacpipe.evaluation.method_scores.score_cache", lambda *_args, **_more: pytest.fail("it was scored first")
    )
    for name, message in {
        "s.csv": "s.csv: scores are written as .npz or .parquet\n",
        "no/s.npz": "s.npz cannot be written: ",
    }.items():
        printed = CliRunner().invoke(main, ["evaluate", caches[0].path, "--scores", str(tmp_path / name)])
        assert printed.exit_code == 1
        assert message in printed.stderr
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"s\.parquet needs pyarrow; install it with: pip install pyarrow, or name"):
        save_scores(tmp_path / "s.parquet", [], [])


def test_a_failed_write_leaves_nothing(caches: list[Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    (tmp_path / "s.npz").write_text("before")
    with pytest.raises(InputError, match=r"s\.npz cannot be written: No space left on device$"):
        save_scores(tmp_path / "s.npz", caches[:1], [score_cache(caches[0], PARAMS)])
    assert (tmp_path / "s.npz").read_text() == "before"
    assert list(tmp_path.glob(".*")) == []
