"""What a study and its parameters are bound to: id/train, id/val, the split that plays OOD, and the layers used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.identity import fingerprint
from nacpipe.cli import main
from nacpipe.errors import ParamsError, StudyError
from nacpipe.scoring.params_file import find_params, read_params, write_params
from nacpipe.tuning import runner as sweep
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.study import Search

TRIALS = 6


@pytest.fixture
def cache(small_cache: Cache, tmp_path: Path) -> Cache:
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    return open_cache(tmp_path / "c.zarr")


def search(cache: Cache, **more: Any) -> Search:
    """Search, and leave the parameters beside the cache, as the command does."""
    found = Search(SearchRequest(cache=Path(cache.path), **{"space": "paper", "trials": TRIALS, **more}))
    result = sweep.run(found)
    write_params(cache.path.replace(".zarr", ".params.json"), result.params, made_by=found.made_by())
    return found


def replace_split(cache: Cache, name: str, like: str, sha256: str = "c" * 64) -> Cache:
    """Extract a split again from another list."""
    rows, source = cache[like].rows, cache[like]
    writer = CacheWriter(cache.path, cache.header)
    writer.drop(name)
    writer.prepare(name, rows, {"list": "other.txt", "sha256": sha256})
    for block, start in enumerate(range(0, rows, 16)):
        writer.write_block(name, block, {key: source.read(key)[start : start + 16] for key in cache.header.arrays()})
    writer.seal(name)
    return open_cache(cache.path)


def unseal(cache: Cache, name: str) -> Cache:
    file = Path(cache.path, name, "zarr.json")
    content = json.loads(file.read_text())
    content["attributes"].update(sealed=False, digest=None)
    file.write_text(json.dumps(content))
    return open_cache(cache.path)


@pytest.mark.parametrize("val", ["ood/val", "ood/near/letters", "id/test"])
def test_they_say_which_splits_they_are_bound_to(cache: Cache, val: str) -> None:
    found = search(cache, val=val)
    assert found.study is not None
    assert list(found.study.user_attrs["identity"]["splits"]) == ["id/train", "id/val", val]
    made_by = found.made_by()
    assert made_by["val"] == val
    layers = tuple(found.objective.layers)
    assert made_by["fingerprint"] == fingerprint(cache.search_identity(("id/train", "id/val", val), layers))


@pytest.mark.repeats(2)
@pytest.mark.parametrize(
    ("val", "change"),
    [
        *(("ood/val", change) for change in ("add", "replace", "unseal")),
        ("ood/near/letters", "drop"),
        *(pytest.param("ood/near/letters", change, marks=pytest.mark.slow) for change in ("add", "replace", "unseal")),
        pytest.param("ood/val", "drop", marks=pytest.mark.slow),
    ],
)
def test_a_set_that_nothing_is_chosen_by_may_come_and_go(
    small_cache: Cache, make_cache: Callable[..., Cache], tmp_path: Path, val: str, change: str
) -> None:
    """id/subtrain, and the test sets that no search was made on."""
    cache = make_cache(tmp_path / "c.zarr", rows={"id/subtrain": 0 if change == "add" else 33})
    before = search(cache, val=val)
    fingerprints = [before.made_by()["fingerprint"]]
    if change == "unseal":
        cache = unseal(cache, "id/subtrain")
    elif change == "drop":
        CacheWriter(cache.path, cache.header).drop("id/subtrain")
        cache = open_cache(cache.path)
    else:
        cache = replace_split(cache, "id/subtrain", "id/test")
    cache = replace_split(cache, "ood/far/textures", "ood/val", "d" * 64)
    if val == "ood/near/letters":
        cache = replace_split(cache, "ood/val", "ood/far/textures", "e" * 64)
    said: list[str] = []
    params = find_params(cache, None)
    assert find_params(cache, cache.path.replace(".zarr", ".params.json"), said.append) == params
    assert said == []
    after = search(cache, val=val, trials=TRIALS + 2)
    fingerprints.append(after.made_by()["fingerprint"])
    assert len(after.completed()) == TRIALS + 2
    assert fingerprints[0] == fingerprints[1]
    measured = [trial.user_attrs["subtrain_auroc"] is not None for trial in after.completed()]
    assert measured == [change != "add"] * TRIALS + [change in ("add", "replace")] * 2
    # Nothing is chosen by it: the trials are those of a search that never saw a change.
    whole = Search(
        SearchRequest(
            cache=Path(cache.path), space="paper", trials=TRIALS + 2, val=val, storage=str(tmp_path / "w.log")
        )
    )
    sweep.run(whole)
    assert [trial.params for trial in whole.completed()] == [trial.params for trial in after.completed()]


def test_an_unfinished_subtrain_is_said_to_be_left_out(cache: Cache) -> None:
    unseal(cache, "id/subtrain")
    done = CliRunner().invoke(main, ["search", cache.path, "--trials", "3"])
    assert done.exit_code == 0, done.output
    missing = "it needs a finished id/subtrain: training images that are not in id/train"
    assert f"overfitting check: not made, {missing}\n" in done.stdout  # id/val, which is finished, is not blamed


@pytest.mark.parametrize(("val", "changed"), [("ood/val", "ood/val"), ("ood/near/letters", "ood/near/letters"),
                                              ("ood/near/letters", "id/val"), ("id/test", "id/test")])  # fmt: skip
@pytest.mark.repeats(2)
def test_another_set_that_they_were_chosen_by_is_refused(cache: Cache, val: str, changed: str) -> None:
    search(cache, val=val)
    beside = cache.path.replace(".zarr", ".params.json")
    kept = read_params(beside)
    cache = replace_split(cache, changed, "ood/far/textures")
    study = "nac-paper-seed1" if val == "ood/val" else f"nac-paper-{val.replace('/', '-')}-seed1"
    message = (
        rf"^study {study} in .*c\.study\.log was made with another cache than .*c\.zarr: splits\.{changed}\.list:"
        rf" stored .*, now other\.txt; splits\.{changed}\.sha256: stored \w{{8}}…, now cccccccc…\. Give another"
        r" --storage FILE$"
    )
    with pytest.raises(StudyError, match=message):
        Search(SearchRequest(cache=Path(cache.path), space="paper", trials=TRIALS, val=val))
    again = f"nacpipe search {cache.path}" + ("" if val == "ood/val" else f" --val {val}")
    with pytest.raises(
        ParamsError, match=rf"was found on other states than those of .* now; search again with: {again}, or"
    ):
        find_params(cache, None)
    said: list[str] = []
    assert find_params(cache, beside, said.append) == kept
    assert said == [f"{beside} was found on other states than those of {cache.path}; it may fit them badly"]


def test_a_neighbour_whose_own_set_changed_does_not_stop_others(cache: Cache) -> None:
    search(cache, val="ood/near/letters")
    cache = replace_split(cache, "ood/near/letters", "ood/far/textures")
    assert len(search(cache).completed()) == TRIALS


# --- of an earlier nacpipe --------------------------------------------------------------------------------------------


def rewrite_journal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the study's identity, as an earlier version recorded it."""
    lines = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "identity" in entry.get("user_attr", {}):
            change(entry["user_attr"]["identity"])
        lines.append(json.dumps(entry))
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("now", ["there", "gone", "another"])
def test_an_older_study_bound_to_id_subtrain_goes_on(cache: Cache, tmp_path: Path, now: str) -> None:
    search(cache)
    images = dict(cache["id/subtrain"].images)
    rewrite_journal(tmp_path / "c.study.log", lambda identity: identity["splits"].update({"id/subtrain": images}))
    if now == "gone":
        CacheWriter(cache.path, cache.header).drop("id/subtrain")
    elif now == "another":
        replace_split(cache, "id/subtrain", "id/test")
    assert len(search(open_cache(cache.path), trials=TRIALS + 1).completed()) == TRIALS + 1


@pytest.mark.parametrize("subtrain", [True, False])
@pytest.mark.parametrize("val", ["ood/val", "ood/near/letters"])
@pytest.mark.repeats(2)
def test_older_parameters_are_taken(cache: Cache, tmp_path: Path, val: str, subtrain: bool) -> None:
    """They were bound to ood/val whatever --val was, and to id/subtrain where it was there."""
    found = search(cache, val=val)
    splits = ("id/train", *["id/subtrain"] * subtrain, "id/val", "ood/val")
    bound = fingerprint(cache.search_identity(splits, tuple(found.objective.layers)))
    beside = tmp_path / "c.params.json"
    params = read_params(beside)
    write_params(beside, params, made_by={**found.made_by(), "fingerprint": bound})
    assert find_params(cache, None) == params
    cache = replace_split(cache, "id/val", "id/test")
    with pytest.raises(ParamsError, match="was found on other states than those of"):
        find_params(cache, None)
