"""NAC-ME against the oracle; who is chosen, by what, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cli import main
from nacpipe.errors import IdentityError, InputError, ParamsError
from nacpipe.evaluation import model_selection as ranking
from nacpipe.evaluation.model_selection import PAPER, rank_checkpoints, read_accuracies
from nacpipe.method.coverage import covered_area
from nacpipe.method.metrics import spearman
from nacpipe.method.params import LayerParams
from nacpipe.scoring.states import read_source
from tests import oracle

SETS = {"csid/a": 30, "csid/b": 45, "csid/a_out": 25, "csid/b_out": 25}
MISTAKES: list[dict[str, int]] = [  # beside those that every checkpoint makes; ties are meant
    {"id/train": 9, "csid/a": 12, "csid/b": 20, "csid/a_out": 9, "csid/b_out": 11, "id/val": 7},
    {"id/train": 4, "csid/a": 3, "csid/b": 6, "csid/a_out": 2, "csid/b_out": 2, "id/val": 1},
    {"id/train": 14, "csid/a": 8, "csid/b": 6, "csid/a_out": 2, "csid/b_out": 2, "id/val": 1},
    {"id/train": 0, "csid/a": 8, "csid/b": 8, "csid/a_out": 5, "csid/b_out": 1, "id/val": 5},
]


def nacpipe(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="nacpipe")


@pytest.fixture(scope="module")
def caches(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Four checkpoints of one run: the same images, other weights and so other states and other mistakes."""
    place = tmp_path_factory.mktemp("run")
    made = []
    for seed, mistakes in enumerate(MISTAKES):
        path = place / f"step{seed}.zarr"
        weights = hashlib.sha256(str(seed).encode()).hexdigest()
        made.append(make_cache(path, seed=seed, rows=SETS, identity={"weights": weights}))
        root = zarr.open_group(path, mode="r+", use_consolidated=False)
        for split, count in mistakes.items():
            label = root[f"{split}/label"]
            label[:count] = (label[:count] + 1) % 3  # type: ignore[index, operator]
            CacheWriter(path, made[-1].header).seal(split)
    return [open_cache(cache.path) for cache in made]


def plain_area(cache: Cache, layer: str, params: LayerParams, split: str = "id/train") -> float:
    view = cache[split]
    correct = [int(np.argmax(logits)) == label for logits, label in zip(view.logits[:], view.label, strict=True)]
    assert 0 < sum(correct) < len(correct)  # it matters that some are left out
    products = read_source(view, layer)
    assert not oracle.in_doubt(products, params.alpha, oracle.bin_edges(params.bins, "linear")).any()
    return float(
        oracle.covered_area(products, correct, bins=params.bins, saturation=params.saturation, alpha=params.alpha)
    )


@pytest.mark.repeats(1)
@pytest.mark.parametrize(
    "params",
    [PAPER, LayerParams(bins=11, saturation=3, alpha=2.0, edges="linear")],
    ids=["paper", "steeper"],
)
def test_areas_are_the_oracles(caches: list[Cache], params: LayerParams) -> None:
    found = rank_checkpoints(caches, params=params).checkpoints
    assert found["checkpoint"].tolist() == ["step0", "step1", "step2", "step3"]
    for layer in ("avgpool", "layer1"):
        expected = [plain_area(cache, layer, params) for cache in caches]
        assert len(set(expected)) > 2
        np.testing.assert_allclose(found[f"area_{layer}"], expected, rtol=1e-12)
    for cache, images in zip(caches, found["images"], strict=True):
        logits, label = np.asarray(cache["id/train"].logits[:]), cache["id/train"].label
        assert images == sum(int(np.argmax(row)) == one for row, one in zip(logits, label, strict=True))


def test_the_papers_parameters() -> None:
    assert LayerParams(bins=50, saturation=500, alpha=0.1, edges="linear", source="product") == PAPER


def test_the_choice_and_its_judgement(caches: list[Cache]) -> None:
    params = replace(PAPER, saturation=3, alpha=2.0)
    found = rank_checkpoints(caches, params=params, layer="layer1")
    areas = [plain_area(cache, "layer1", params) for cache in caches]
    assert found.layer == "layer1"
    assert found.chosen == f"step{int(np.argmax(areas))}"

    def accuracy(cache: Cache, *splits: str) -> float:
        shares = [np.mean(np.argmax(cache[s].logits[:], axis=1) == cache[s].label) for s in splits]
        return float(np.mean(shares))  # every domain counts the same, whatever its size

    test_in = [accuracy(cache, "csid/a", "csid/b") for cache in caches]
    test_out = [accuracy(cache, "csid/a_out", "csid/b_out") for cache in caches]
    train_out = [accuracy(cache, "id/val") for cache in caches]
    assert found.selections is not None
    rows = found.selections.set_index("selection")
    assert list(rows.index) == ["oracle", "last", "training-domain validation", "coverage"]
    for name, values in {"oracle": test_out, "training-domain validation": train_out, "coverage": areas}.items():
        place = int(np.argmax(values))
        assert rows.loc[name, "checkpoint"] == f"step{place}"
        assert rows.loc[name, "test_in"] == pytest.approx(test_in[place], abs=1e-12)
        assert rows.loc[name, "correlation"] == pytest.approx(oracle.spearman(values, test_in), abs=1e-12)
    assert rows.loc["last", "checkpoint"] == "step3"
    assert math.isnan(rows.loc["last", "correlation"])


def test_accuracies_of_a_file_judge_and_do_not_choose(caches: list[Cache], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "checkpoint,train_out,test_in\nstep3.zarr,0.9,0.1\nstep1,0.7,0.4\nstep0,0.8,0.2\nstep2,0.7,0.3\n"
    )
    given = read_accuracies(tmp_path / "a.csv")
    found = rank_checkpoints(caches, accuracies=given)
    assert found.chosen == rank_checkpoints(caches).chosen
    assert found.checkpoints["test_in"].tolist() == [0.2, 0.4, 0.3, 0.1]
    assert found.selections is not None
    rows = found.selections.set_index("selection")
    assert rows.loc["oracle", ["checkpoint", "test_in", "correlation"]].tolist() == ["step1", 0.4, 1.0]  # on test_in
    assert rows.loc["training-domain validation", "checkpoint"] == "step3"
    assert rows.loc["training-domain validation", "correlation"] == pytest.approx(
        oracle.spearman([0.8, 0.7, 0.7, 0.9], [0.2, 0.4, 0.3, 0.1])
    )


def test_without_held_out_domains_there_is_no_judgement(small_cache: Cache) -> None:
    found = rank_checkpoints([small_cache])
    assert (found.chosen, found.layer, found.selections) == ("small", "avgpool", None)
    assert list(found.checkpoints.columns) == ["checkpoint", "images", "area_avgpool", "area_layer1"]


def test_another_split_can_be_counted(caches: list[Cache]) -> None:
    found = rank_checkpoints(caches[:2], split="id/val").checkpoints
    expected = [plain_area(cache, "avgpool", PAPER, "id/val") for cache in caches[:2]]
    np.testing.assert_allclose(found["area_avgpool"], expected, rtol=1e-12)


# --- laws -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(1, 40))
def test_area_by_hand_and_its_laws(rows: list[list[int]], saturation: int) -> None:
    counts = np.array(rows, np.int32)
    found = covered_area(counts, saturation)
    expected = sum(min(c / saturation, 1) for row in rows for c in row) / 4 / len(rows)
    assert found == pytest.approx(expected, rel=1e-12)
    assert 0 <= covered_area(counts, saturation + 1) <= found <= 3 / 4  # M − 1 of M
    assert covered_area(counts + 1, saturation) >= found


def test_no_correct_image_covers_nothing() -> None:
    assert covered_area(np.zeros((4, 9), np.int32), 5) == 0.0


VALUES = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(VALUES, st.randoms(use_true_random=False))
def test_spearman_is_the_oracles_with_ties(values: list[int], chance: Any) -> None:
    other = values[:]
    chance.shuffle(other)
    if len(set(values)) == 1:
        assert math.isnan(spearman(np.array(values, float), np.array(other, float)))
        return
    a, b = np.array(values, float), np.array(other, float)
    assert spearman(a, b) == pytest.approx(oracle.spearman(values, other), abs=1e-12)
    assert spearman(a, b) == pytest.approx(spearman(b, a), abs=1e-12)
    assert spearman(a, -b) == pytest.approx(-spearman(a, b), abs=1e-12)
    assert spearman(a, np.exp(a)) == pytest.approx(1.0, abs=1e-12)


def test_spearman_by_hand() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    # ranks 1, 2½, 2½, 4 and 1, 2, 3, 4
    assert spearman(np.array([0.0, 5.0, 5.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5.0)
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def test_caches_of_another_run_are_refused(
    caches: list[Cache], make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    other = make_cache(tmp_path / "o.zarr", identity={"architecture": "another"})
    with pytest.raises(
        IdentityError,
        match=r"o\.zarr is not of the same training run as .*step0\.zarr: architecture: there made_up, here",
    ):
        rank_checkpoints([caches[0], other])
    embeds = make_cache(tmp_path / "e.zarr", identity={"outputs": "features"})
    with pytest.raises(InputError, match="gives features"):
        rank_checkpoints([embeds])
    with pytest.raises(InputError, match="there are no checkpoints to rank"):
        rank_checkpoints([])
    with pytest.raises(InputError, match=r"checkpoint .*step0 is given twice"):
        rank_checkpoints([caches[0], caches[0]])
    with pytest.raises(ParamsError, match="layer 'layer9' is not in"):
        rank_checkpoints(caches, layer="layer9")


def refuse_judges(first: Cache, second: Cache, message: str) -> None:
    """In whichever order they are given; accuracies of a file make the choice possible, and it is as before."""
    with pytest.raises(IdentityError, match=message):
        rank_checkpoints([first, second])
    with pytest.raises(IdentityError):
        rank_checkpoints([second, first])
    given = {Path(cache.path).stem: {"test_in": 0.5} for cache in (first, second)}
    found = rank_checkpoints([first, second], accuracies=given).checkpoints
    assert found["area_avgpool"].tolist() == [plain_area(cache, "avgpool", PAPER) for cache in (first, second)]
    assert list(found.columns) == ["checkpoint", "images", "area_avgpool", "area_layer1", "test_in"]


@pytest.mark.parametrize("lacks", ["csid/b", "csid/b_out", "id/val"])
@pytest.mark.slow
def test_a_set_that_only_one_cache_has_judges_nothing(
    caches: list[Cache], make_cache: Callable[..., Cache], tmp_path: Path, lacks: str
) -> None:
    fewer = make_cache(tmp_path / "fewer.zarr", seed=8, rows={**SETS, lacks: 0})
    refuse_judges(
        caches[0],
        fewer,
        rf"^{lacks} is finished in .*step0\.zarr and not in {fewer.path}, so that accuracies would be of different"
        rf" images; finish it with: nacpipe extract digits --cache {fewer.path}, or give --accuracies FILE$",
    )


@pytest.mark.parametrize("split", ["csid/a", "csid/a_out", "id/val"])
@pytest.mark.slow
def test_accuracies_of_other_images_are_not_compared(
    caches: list[Cache], make_cache: Callable[..., Cache], tmp_path: Path, split: str
) -> None:
    path = tmp_path / "other.zarr"
    other = make_cache(path, seed=8, rows=SETS)
    zarr.open_group(path / split, mode="r+", use_consolidated=False).attrs["images"] = {
        "list": "other.txt",
        "sha256": "ab" * 32,
    }
    CacheWriter(path, other.header).seal(split)
    refuse_judges(
        caches[0],
        open_cache(path),
        rf"^{split} of {path} is not of the same images as that of .*step0\.zarr: list: there {split.replace('/', '_')}"
        r"\.txt, here other\.txt; sha256: there .{8}…, here abababab…; extract it in both from one list, or give ",
    )


def test_without_held_out_domains_id_val_judges_nothing(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    made = [make_cache(tmp_path / f"{name}.zarr", rows=rows) for name, rows in (("a", {}), ("b", {"id/val": 0}))]
    found = rank_checkpoints(made)
    assert (found.chosen, found.selections) == ("a", None)


def test_like_names_are_told_by_their_folders(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    made = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        made.append(make_cache(tmp_path / folder / "c.zarr"))
    assert rank_checkpoints(made).checkpoints["checkpoint"].tolist() == [f"{tmp_path}/one/c", f"{tmp_path}/two/c"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["checkpoint,accuracy", "a,1"], "the first line is 'checkpoint,accuracy'; wanted: checkpoint,test_in"),
        ([], "the first line is ''"),
        (["checkpoint,test_in,test_in", "a,1,1"], "the first line is"),
        (["checkpoint,test_in", "a,0.5", "b,51.2"], "line 3, test_in is '51.2'; it must be a fraction from 0 to 1"),
        (["checkpoint,test_in", "a,nan"], "line 2, test_in is 'nan'"),
        (["checkpoint,test_in", "a,"], "line 2, test_in is ''"),
        (["checkpoint,test_in", "a"], "line 2 has 1 values, not 2"),
        (["checkpoint,test_in", "a,0.5,0.5"], "line 2 has 3 values, not 2"),
        (["checkpoint,test_in", "a,0.5", "", "a.zarr,0.5"], "line 4 has a again"),
        (['checkpoint,"test_in', "a,1"], "cannot be read as CSV"),
    ],
)
def test_accuracies_that_are_none(lines: Sequence[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message) as raised:
        read_accuracies(tmp_path / "a.csv")
    assert str(tmp_path / "a.csv") in str(raised.value)
    assert "\n" not in raised.value.one_line()


def test_accuracies_that_lack_a_checkpoint(caches: list[Cache], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the accuracies lack 3 of 4 checkpoints: step1, step2, step3; they"):
        rank_checkpoints(caches, accuracies={"step0": {"test_in": 0.5}})
    with pytest.raises(InputError, match=r"there is no file .*nosuch"):
        read_accuracies(tmp_path / "nosuch")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_the_function_found(caches: list[Cache]) -> None:
    paths = [cache.path for cache in caches]
    expected = rank_checkpoints(caches, params=replace(PAPER, saturation=3), layer="layer1")
    done = nacpipe("rank", *paths, "--saturation", "3", "--layer", "layer1", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["layer"], told["chosen"]) == ("layer1", expected.chosen)
    assert told["checkpoints"] == expected.checkpoints.to_dict("records")
    assert expected.selections is not None
    assert [row["test_in"] for row in told["selections"]] == expected.selections["test_in"].tolist()
    assert told["selections"][1]["correlation"] is None
    lines = nacpipe("rank", *paths, "--saturation", "3", "--layer", "layer1", "--csv").stdout.splitlines()
    assert lines[0] == "checkpoint,images,area_avgpool,area_layer1,test_in,test_out,train_out"
    assert [line.split(",")[0] for line in lines[1:]] == ["step0", "step1", "step2", "step3"]
    table = nacpipe("rank", *paths, "--saturation", "3", "--layer", "layer1").stdout
    assert f"\nlargest covered area of layer1: {expected.chosen}\n" in table
    assert f"{100 * expected.selections['test_in'].iloc[-1]:.2f}" in table.splitlines()[-1]


def test_the_command_says_when_nothing_judges(small_cache: Cache) -> None:
    done = nacpipe("rank", small_cache.path)
    assert done.exit_code == 0
    assert done.stderr.startswith("no accuracies on held-out domains are known")
    assert nacpipe("rank", small_cache.path, "--bins", "3").stderr.startswith("nacpipe: bins is 3; it must lie between")


def test_one_state_of_a_layer_does_not_decide(caches: list[Cache]) -> None:
    with pytest.raises(
        ParamsError, match=r"^layer 'layer1:gradient' is one state of a layer; NAC-ME has one per layer: layer1$"
    ):
        rank_checkpoints(caches, layer="layer1:gradient")


# --- nothing to choose by ---------------------------------------------------------------------------------------------


def wrong_everywhere(cache: Cache, *splits: str) -> None:
    """Every label becomes a class that the network does not predict."""
    root = zarr.open_group(cache.path, mode="r+", use_consolidated=False)
    for split in splits:
        predicted = np.asarray(root[f"{split}/logits"][:]).argmax(axis=1)  # type: ignore[index]
        root[f"{split}/label"][:] = (predicted + 1) % 3  # type: ignore[index]
        CacheWriter(cache.path, cache.header).seal(split)


@pytest.fixture
def run(caches: list[Cache], tmp_path: Path) -> list[Cache]:
    """Copies of three checkpoints, which a test may write to."""
    paths = [shutil.copytree(cache.path, tmp_path / f"s{number}.zarr") for number, cache in enumerate(caches[:3])]
    return [open_cache(path) for path in paths]


def reopen(run: list[Cache]) -> list[Cache]:
    return [open_cache(cache.path) for cache in run]


@pytest.mark.slow
def test_none_is_chosen_where_none_classifies_an_image(run: list[Cache]) -> None:
    for cache in run:
        wrong_everywhere(cache, "id/train")
    found = rank_checkpoints(reopen(run))
    assert found.chosen is None
    assert found.checkpoints["images"].tolist() == found.checkpoints["area_avgpool"].tolist() == [0, 0, 0]
    reason = (
        "none of 3 checkpoints classifies an image of id/train correctly;"
        " are its labels in the order of the network's classes?"
    )
    assert found.reason == reason
    assert found.selections is not None
    rows = found.selections.set_index("selection")
    assert rows.loc["coverage"].isna().all()
    assert rows.loc["last", "checkpoint"] == "s2"
    paths = [cache.path for cache in run]
    printed = nacpipe("rank", *paths)
    assert printed.exit_code == 1
    assert printed.stderr == f"nacpipe: no checkpoint is chosen: {reason}\n"
    assert "\nlargest covered area of avgpool: none\n" in printed.stdout
    assert printed.stdout.splitlines()[-1].split() == ["coverage", "none", "–", "–"]
    told = json.loads((done := nacpipe("rank", *paths, "--json")).stdout)
    assert (done.exit_code, told["chosen"], told["reason"]) == (1, None, reason)
    assert told["selections"][-1] == {"selection": "coverage", "checkpoint": None, "test_in": None, "correlation": None}
    assert (done := nacpipe("rank", *paths, "--csv")).exit_code == 1
    assert done.stdout.splitlines()[0].startswith("checkpoint,images,area_avgpool")
    alone = nacpipe("rank", paths[0])
    assert "no checkpoint is chosen: the checkpoint classifies no image of id/train correctly" in alone.stderr


@pytest.mark.repeats(1)
@pytest.mark.parametrize("wrong", [(0, 1), (1, 2), (0, 2)])
def test_a_checkpoint_that_classifies_no_image_is_never_chosen(run: list[Cache], wrong: tuple[int, ...]) -> None:
    """Wherever it stands, and whatever parameters would make of its area."""
    for place in wrong:
        wrong_everywhere(run[place], "id/train")
    (left,) = {0, 1, 2} - {*wrong}
    found = rank_checkpoints(reopen(run), params=replace(PAPER, saturation=100_000))
    assert (found.chosen, found.reason) == (f"s{left}", "")
    assert [area > 0 for area in found.checkpoints["area_avgpool"]] == [place == left for place in range(3)]
    assert nacpipe("rank", *(cache.path for cache in run)).exit_code == 0


def test_areas_that_are_no_numbers_are_never_chosen() -> None:
    """NaN beside a number, NaN alone, and a number of a checkpoint that classifies no image."""
    frame = pd.DataFrame({"images": [3, 2, 0, 4], "area_x": [math.nan, 0.1, 0.9, 0.1]})
    assert ranking._largest(ranking._eligible(frame, "area_x")) == 1
    assert ranking._largest(ranking._eligible(frame.assign(area_x=math.nan), "area_x")) is None
    assert ranking._largest(ranking._eligible(frame.assign(images=0), "area_x")) is None
    assert ranking._largest(pd.Series([0.0, 0.0])) is None
    assert ranking._largest(pd.Series([0.0, 0.5, 0.5])) == 1


def test_a_split_without_labels_is_said(run: list[Cache]) -> None:
    found = rank_checkpoints(run, split="ood/val")
    assert found.chosen is None
    assert found.reason == "ood/val has no labels, all 37 are −1; name a split that has, with --split"
    printed = nacpipe("rank", *(cache.path for cache in run), "--split", "ood/val")
    assert (printed.exit_code, printed.stderr) == (1, f"nacpipe: no checkpoint is chosen: {found.reason}\n")


def test_a_way_that_goes_by_zeros_alone_chooses_none(run: list[Cache]) -> None:
    for cache in run:
        wrong_everywhere(cache, "id/val", "csid/a_out", "csid/b_out")
    selections = rank_checkpoints(reopen(run)).selections
    assert selections is not None
    rows = selections.set_index("selection")["checkpoint"]
    assert rows[["oracle", "training-domain validation"]].isna().all()
    assert rows["last"] == "s2" and rows["coverage"] in ("s0", "s1", "s2")
