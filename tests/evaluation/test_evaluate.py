"""The table: its rows, its columns, and every number in it by another way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView, open_cache
from nacpipe.cache.identity import bound_splits, fingerprint
from nacpipe.cli import main
from nacpipe.errors import InputError, ParamsError
from nacpipe.evaluation import method_scores
from nacpipe.evaluation.bootstrap import add_confidence, compare_methods
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.evaluation.score_files import save_scores
from nacpipe.evaluation.standing import describe_standing
from nacpipe.evaluation.tables import evaluate, tabulate, verdicts
from nacpipe.method import published
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import find_params, write_params
from tests import oracle

COLUMNS = [
    *("task", "group", "dataset", "method"),
    *("fpr95", "auroc", "aupr_in", "aupr_out", "accuracy", "n_id", "n_ood", "fitted_on", "n_fitted", "reason"),
    "parameters",
]
METRICS = ["fpr95", "auroc", "aupr_in", "aupr_out"]
PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=0.6137),
        "layer1": LayerParams(bins=21, saturation=9, alpha=2.0, weight=0.2291),
    }
)
METHODS = ["NAC", "MSP", "MaxLogit", "Energy"]


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A finished cache with two corrupted ID sets and three far sets."""
    rows = {"csid/blurred": 25, "csid/noisy": 18, "ood/far/faces": 40, "ood/far/words": 30}
    return make_cache(tmp_path_factory.mktemp("evaluate") / "e.zarr", rows=rows)


@pytest.fixture(scope="module")
def frame(cache: Cache) -> pd.DataFrame:
    return evaluate(cache, PARAMS)


def scores_by_hand(cache: Cache, method: str, split: str) -> NDArray[np.float64]:
    logits = np.asarray(cache[split].logits[:], np.float64)
    if method == "MSP":
        return np.asarray((np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1))
    if method == "MaxLogit":
        return np.asarray(logits.max(axis=1))
    if method == "Energy":
        return np.asarray(np.log(np.exp(logits).sum(axis=1)))
    layers = []
    for name, p in PARAMS.layers.items():
        train, values = (
            np.asarray(cache[which][name].activation[:]) * np.asarray(cache[which][name].gradient[:])
            for which in ("id/train", split)
        )
        layers.append(oracle.score_layer(train, values, bins=p.bins, saturation=p.saturation, alpha=p.alpha))
    return oracle.weighted_score(layers, [p.weight for p in PARAMS.layers.values()])


def test_rows_and_columns(frame: pd.DataFrame) -> None:
    assert list(frame.columns) == COLUMNS
    assert list(frame.index) == list(range(len(frame)))
    expected = [
        (task, group, name, method)
        for task in ("ood", "fsood")
        for group, sets in (("near", ["letters"]), ("far", ["faces", "textures", "words"]))
        for names in (sets, ["mean"])
        for method in METHODS
        for name in names
    ]
    assert list(frame[["task", "group", "dataset", "method"]].itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["ood", "fsood"])
def test_every_number_of_a_set_by_hand(cache: Cache, frame: pd.DataFrame, task: str, method: str) -> None:
    """FS-OOD's ID is id/test and every csid set, joined here by hand."""
    id_splits = ["id/test"] + ["csid/blurred", "csid/noisy"] * (task == "fsood")
    inside = np.concatenate([scores_by_hand(cache, method, split) for split in id_splits])
    right = [
        bool(np.asarray(logits).argmax() == label)
        for split in id_splits
        for logits, label in zip(cache[split].logits[:], cache[split].label, strict=True)  # type: ignore[arg-type]
    ]
    for name in ("ood/near/letters", "ood/far/faces", "ood/far/textures", "ood/far/words"):
        outside = scores_by_hand(cache, method, name)
        # Sums in another order may part what is equal: compare what rounding cannot touch.
        inside, outside = np.round(inside, 9), np.round(outside, 9)
        dataset = name.split("/")[-1]
        rows = frame[(frame["task"] == task) & (frame["dataset"] == dataset) & (frame["method"] == method)]
        assert len(rows) == 1
        row = rows.iloc[0]
        assert row["auroc"] == pytest.approx(oracle.auroc(inside, outside), abs=1e-12)
        assert row["fpr95"] == pytest.approx(oracle.fpr95(inside, outside), abs=1e-12)
        assert row["aupr_in"] == pytest.approx(oracle.aupr(inside, outside), abs=1e-12)
        assert row["aupr_out"] == pytest.approx(oracle.aupr(-outside, -inside), abs=1e-12)
        assert row["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-12)
        assert (row["n_id"], row["n_ood"]) == (len(right), cache[name].rows)


def test_means_are_unweighted(frame: pd.DataFrame) -> None:
    """40 faces count as much as 20 textures or 30 words."""
    for (_task, group, _method), rows in frame.groupby(["task", "group", "method"], sort=False):
        sets, mean = rows[rows["dataset"] != "mean"], rows[rows["dataset"] == "mean"].iloc[0]
        assert len(sets) == {"near": 1, "far": 3}[str(group)]
        for metric in [*METRICS, "accuracy"]:
            assert mean[metric] == pytest.approx(sum(sets[metric]) / len(sets), abs=1e-15)
        assert mean["n_ood"] == {"near": 35, "far": 90}[str(group)]
        assert mean["n_id"] == sets["n_id"].iloc[0]


def test_without_parameters_only_the_baselines(cache: Cache, frame: pd.DataFrame) -> None:
    found = evaluate(cache, None)
    assert list(found["method"].unique()) == ["MSP", "MaxLogit", "Energy"]
    pd.testing.assert_frame_equal(found, frame[frame["method"] != "NAC"].reset_index(drop=True))


def test_without_csid_there_is_no_full_spectrum(small_cache: Cache) -> None:
    found = evaluate(small_cache, PARAMS)
    assert list(found["task"].unique()) == ["ood"]
    assert len(found) == 4 * 4


def test_scores_by_method(cache: Cache) -> None:
    found = score_cache(cache, PARAMS)
    assert list(found.methods) == METHODS
    for name, method in found.methods.items():
        assert list(method.scores) == [
            *("id/test", "csid/blurred", "csid/noisy", "ood/near/letters"),
            *("ood/far/faces", "ood/far/textures", "ood/far/words"),
        ]
        assert not method.reasons
        for split, scores in method.scores.items():
            np.testing.assert_allclose(scores, scores_by_hand(cache, name, split), rtol=1e-6)


def test_scores_do_not_depend_on_how_many_rows_are_held(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows at a time, of 50, 25, …: every row once, in its place."""
    whole = score_cache(cache, PARAMS)
    asked: list[int] = []
    read = SplitView.read

    def watched(self: SplitView, path: str, rows: slice = slice(None)) -> NDArray[Any]:
        found = read(self, path, rows)
        asked.append(len(found) if path == "logits" else 0)
        return found

    monkeypatch.setattr(SplitView, "read", watched)
    monkeypatch.setattr(method_scores, "BLOCK_BYTES", 1)
    blocks = score_cache(cache, PARAMS)
    assert max(asked) == 16
    assert sum(asked) == sum(whole.rows.values())
    assert blocks.correct == whole.correct
    for name, method in whole.methods.items():
        for split, scores in method.scores.items():
            np.testing.assert_array_equal(blocks.methods[name].scores[split], scores)


def test_what_each_method_was_fitted_on(frame: pd.DataFrame) -> None:
    nac = frame["method"] == "NAC"
    assert set(frame.loc[nac, "fitted_on"]) == {"id/train"}
    assert set(frame.loc[nac, "n_fitted"]) == {60}
    assert set(frame.loc[~nac, "fitted_on"]) == {""}
    assert set(frame.loc[~nac, "n_fitted"]) == {0}
    assert set(frame["reason"]) == {""}


def unseal(path: Path, split: str) -> None:
    content = json.loads((path / split / "zarr.json").read_text())
    content["attributes"].update(sealed=False, digest=None)
    (path / split / "zarr.json").write_text(json.dumps(content))


def test_a_set_that_is_not_finished_is_empty_and_so_are_its_means(
    cache: Cache, frame: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(cache.path, path)
    unseal(path, "ood/far/faces")
    unseal(path, "id/subtrain")
    found = evaluate(open_cache(path), PARAMS)
    empty = (found["group"] == "far") & found["dataset"].isin(["faces", "mean"])
    assert found.loc[empty, METRICS].isna().all(axis=None)
    assert dict(zip(found.loc[empty, "dataset"], found.loc[empty, "reason"], strict=True)) == {
        "faces": "ood/far/faces is not finished",
        "mean": "faces: ood/far/faces is not finished",
    }
    pd.testing.assert_frame_equal(found[~empty], frame[~empty])
    same = [column for column in COLUMNS if column not in (*METRICS, "reason")]
    pd.testing.assert_frame_equal(found[same], frame[same])
    assert found.attrs["note"] == (
        f"not finished: id/subtrain, ood/far/faces; what needs them is left empty; finish with: {cache.command()}"
    )
    assert [line.split(":")[0] for line in verdicts(found)] == ["near-OOD", "near-OOD, full spectrum"]


def test_a_csid_set_that_is_not_finished_empties_the_full_spectrum(
    cache: Cache, frame: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(cache.path, path)
    unseal(path, "csid/noisy")
    found = evaluate(open_cache(path), PARAMS)
    full = found["task"] == "fsood"
    pd.testing.assert_frame_equal(found[~full], frame[~full])
    assert found.loc[full, [*METRICS, "accuracy"]].isna().all(axis=None)
    assert set(found.loc[full, "reason"]) == {"csid/noisy is not finished"}
    assert set(found.loc[full, "n_id"]) == {93}


def test_without_a_finished_set_there_is_no_table(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(cache.path, path)
    for split in ("ood/far/faces", "ood/far/textures", "ood/far/words", "ood/near/letters"):
        unseal(path, split)
    message = rf"^{path} holds no finished near or far set; add them with: nacpipe extract digits --cache "
    with pytest.raises(InputError, match=message):
        evaluate(open_cache(path), PARAMS)


def test_what_follows_from_a_table_takes_an_unfinished_set(cache: Cache, tmp_path: Path) -> None:
    """Saved scores, intervals, a comparison, and the mean over runs of which one lacks the set."""
    path = tmp_path / "c.zarr"
    shutil.copytree(cache.path, path)
    unseal(path, "ood/far/faces")
    part, run = open_cache(path), score_cache(open_cache(path), PARAMS)
    save_scores(tmp_path / "s.npz", [part], [run])
    with np.load(tmp_path / "s.npz") as saved:
        assert {name.rpartition("/")[0] for name in saved} == set(run.rows) - {"ood/far/faces"}
    sure = add_confidence(tabulate([run]), [run], resamples=20)
    empty = (sure["group"] == "far") & sure["dataset"].isin(["faces", "mean"])
    assert sure.loc[empty, ["auroc_low", "auroc_high"]].isna().all(axis=None)
    assert sure.loc[~empty, ["auroc_low", "auroc_high"]].notna().all(axis=None)
    compared = compare_methods([run], "NAC", "Energy", resamples=20)
    assert set(compared[compared["more_than_chance"].isna()]["dataset"]) == {"faces", "mean"}
    both = tabulate([score_cache(cache, PARAMS), run])
    assert (both["auroc"].isna() == empty).all()


# --- which parameters -------------------------------------------------------------------------------------------------


def test_parameters_beside_the_cache_in_a_file_and_published(
    small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(small_cache.path, path)
    cache = open_cache(path)
    message = rf"^there is no {tmp_path}/c\.params\.json; make it with: nacpipe search {path}, or give --params FILE or"
    with pytest.raises(ParamsError, match=message):
        find_params(cache, None)
    write_params(tmp_path / "c.params.json", PARAMS)
    assert find_params(cache, None) == PARAMS
    alone = NacParams(layers={"layer1": PARAMS.layers["layer1"]})
    write_params(tmp_path / "alone.json", alone)
    assert find_params(cache, str(tmp_path / "alone.json")) == alone
    message = (
        r"^the paper has no parameters for digits, made_up, layers avgpool, layer1 \(it has cifar10 resnet: avgpool"
    )
    with pytest.raises(ParamsError, match=message):
        find_params(cache, "published")
    monkeypatch.setitem(published.PUBLISHED, ("digits", "made_up"), PARAMS)
    assert find_params(cache, "published") == PARAMS
    with pytest.raises(
        ParamsError, match=r"^there is no parameter file nosuch\.json; make one with: nacpipe search CACHE"
    ):
        find_params(cache, "nosuch.json")


def test_a_layer_that_the_cache_lacks(small_cache: Cache) -> None:
    with pytest.raises(
        ParamsError, match=r"^layer 'layer9' is not in .*small\.zarr; it holds avgpool, layer1, logits;"
    ):
        evaluate(small_cache, NacParams(layers={"layer9": PARAMS.layers["layer1"]}))


# --- as printed -------------------------------------------------------------------------------------------------------


@pytest.fixture
def params_file(tmp_path: Path) -> str:
    write_params(tmp_path / "p.json", PARAMS)
    return str(tmp_path / "p.json")


def test_json_and_csv_hold_the_frame(cache: Cache, frame: pd.DataFrame, params_file: str) -> None:
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--params", params_file, "--json"])
    assert (printed.exit_code, printed.stderr) == (0, "")
    rows = json.loads(printed.stdout)
    assert all(list(row) == [*COLUMNS, "flagged", "flagged_id"] for row in rows)
    pd.testing.assert_frame_equal(pd.DataFrame(rows)[COLUMNS], frame, rtol=1e-14)
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--params", params_file, "--csv"])
    (Path(params_file).parent / "t.csv").write_text(printed.stdout)
    pd.testing.assert_frame_equal(pd.read_csv(Path(params_file).parent / "t.csv", keep_default_na=False), frame)


def test_markdown_and_the_table(cache: Cache, frame: pd.DataFrame, params_file: str) -> None:
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--params", params_file, "--markdown"])
    lines = printed.stdout.splitlines()
    assert lines[0] == "| " + " | ".join(COLUMNS[:-1]) + " |"
    assert lines[1] == "|" + " --- |" * len(COLUMNS[:-1])
    told = "NAC: as published (2 layers, weights fitted, equal in the paper)"
    assert lines[2 + len(frame) :] == ["", told]
    assert [cell.strip() for cell in lines[2].split("|")[1:5]] == ["ood", "near", "letters", "NAC"]
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--params", params_file])
    accuracy = 100 * frame["accuracy"].iloc[0]
    assert printed.stdout.startswith(f"OOD: ID is id/test (50 images, accuracy {accuracy:.2f} %); all in percent\n")
    assert "\nFS-OOD: ID is id/test and csid together (93 images, " in printed.stdout
    row = next(line for line in printed.stdout.splitlines() if line.startswith("near letters"))
    shown = [f"{100 * value:.2f}" for value in frame.loc[0, METRICS]]
    assert row.split() == ["near", "letters", "NAC", *shown, "35"]
    assert f"\n{told}\nfitted on id/train (60 images): NAC\n" in printed.stdout
    assert "\nfar mean " in printed.stdout
    assert "near mean" not in printed.stdout  # of one set, which it would repeat
    said = [*verdicts(frame), describe_standing(frame)]
    assert printed.stdout.endswith("".join(f"{line}\n" for line in said))


# --- whose parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [("avgpool",), ("avgpool", "logits")])
def test_parameters_of_other_states_are_refused_beside_a_cache_and_said_elsewhere(
    make_cache: Callable[..., Cache], tmp_path: Path, layers: tuple[str, ...]
) -> None:
    cache, other = make_cache(tmp_path / "c.zarr"), make_cache(tmp_path / "o.zarr", identity={"weights": "b" * 64})
    bound = fingerprint(cache.search_identity(bound_splits(), layers))
    params = NacParams(layers={name: LayerParams(bins=10, saturation=5, alpha=1.0) for name in layers})
    for name in ("c", "o"):
        write_params(tmp_path / f"{name}.params.json", params, made_by={"fingerprint": bound})
    said: list[str] = []
    assert find_params(cache, None, said.append) == params
    assert find_params(cache, str(tmp_path / "o.params.json"), said.append) == params
    assert said == []
    with pytest.raises(ParamsError, match=r"o\.params\.json was found on other states than those of .*o\.zarr now"):
        find_params(other, None)
    assert find_params(other, str(tmp_path / "o.params.json"), said.append) == params
    assert len(said) == 1
    assert "was found on other states than those of" in said[0]
    write_params(tmp_path / "o.params.json", params)  # a file with just layers is accepted
    assert find_params(other, None) == params
