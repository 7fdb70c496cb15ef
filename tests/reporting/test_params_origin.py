"""From parameters back to their study, however it was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache, open_cache
from nacpipe.cli import main
from nacpipe.reporting.params_origin import find_origin


def search(*args: str) -> None:
    done = CliRunner().invoke(main, ["search", *args])
    assert done.exit_code == 0, done.stderr


@pytest.mark.repeats(1)
@pytest.mark.parametrize(
    "asked",
    [
        [],
        ["--sampler", "tpe", "--seed", "7"],
        ["--space", "wide"],
        ["--objective", "fpr95", "--study", "my-own"],
        ["--layers", "layer1"],
        ["--space", "terms"],
        ["--space", "terms", "--layers", "layer1"],
        ["--layers", "avgpool:gradient,layer1:product"],
        ["--val", "ood/far/textures"],
        ["--storage", "ELSEWHERE"],
    ],
    ids=" ".join,
)
def test_the_study_is_found_again(make_cache: Callable[..., Cache], tmp_path: Path, asked: list[str]) -> None:
    asked = [word.replace("ELSEWHERE", str(tmp_path / "elsewhere.log")) for word in asked]
    cache = make_cache(tmp_path / "c.zarr")
    search(cache.path, "--trials", "25", *asked)
    found = find_origin(cache, None)
    assert (found.reason, found.source) == ("", str(tmp_path / "c.params.json"))
    assert found.explanation is not None
    written = json.loads((tmp_path / "c.params.json").read_text())
    guided = "--space" not in asked and "--objective" not in asked
    shown = "val_fpr95" if "fpr95" in asked else "val_correlation" if guided else "val_auroc"
    assert found.explanation.history["best"].iloc[-1] == written["result"][shown]
    values = found.explanation.parameters.set_index(["layer", "parameter"])["value"]
    for name, layer in written["layers"].items():
        assert values[name, "bins"] == layer["bins"]
    before = [word for pair in zip(asked[::2], asked[1::2], strict=True) for word in pair]
    assert sorted(found.command.split()) == sorted(["nacpipe", "search", cache.path, *before])


def test_why_it_cannot_be_looked_at(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    search(cache.path, "--trials", "3")
    path = tmp_path / "c.params.json"
    written = json.loads(path.read_text())
    study = f"study nac-seed1 in {tmp_path}/c.study.log"
    (tmp_path / "c.study.log").rename(tmp_path / "moved.log")
    said = find_origin(cache, None)
    assert said.explanation is None
    assert said.reason.startswith(f"History and importances are left out, {study}: there is no completed trial")
    assert find_origin(cache, "published").reason == "The parameters are the paper's; no search was made for them."
    options = written["made_by"]["options"]
    for change, reason in (
        ({"study": "postgresql://nac:***@db/x"}, "nac-seed1 in postgresql://nac:***@db/x wants a password."),
        ({"options": None}, f"{study}: an earlier nacpipe's."),
        ({"options": {**options, "sampel": 1}}, "the record of the search's options is damaged (SearchRequest."),
        (
            {"options": {**options, "study": "other"}},
            f"there is no completed trial to explain; start with: nacpipe search {cache.path} --study other.",
        ),
    ):
        made_by = {key: value for key, value in {**written["made_by"], **change}.items() if value is not None}
        path.write_text(json.dumps({**written, "made_by": made_by}))
        found = find_origin(cache, None)
        assert found.explanation is None
        assert reason in found.reason


def test_a_study_that_moved_with_its_cache_is_found(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """Also where the search named the journal beside the cache itself, and a space file."""
    (tmp_path / "before").mkdir()
    cache = make_cache(tmp_path / "before" / "c.zarr")
    (tmp_path / "s.toml").write_text("[default]\nbins = [20, 50]\n")
    asked = ["--storage", f"{tmp_path}/before/c.study.log", "--space", f"{tmp_path}/s.toml", "--seed", "3"]
    search(cache.path, "--trials", "3", *asked)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = open_cache(tmp_path / "after" / "c.zarr")
    found = find_origin(moved, None)
    assert found.reason == ""
    assert found.command == f"nacpipe search {moved.path} --space {tmp_path}/s.toml --seed 3"
