"""The command that `extract` and `search` name as the next one is one that works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nacpipe.cache import Cache, open_cache
from nacpipe.cache.identity import fingerprint
from nacpipe.cli.extract import describe_next
from nacpipe.cli.search import after_search
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(layers={"layer1": LayerParams(bins=9, saturation=3, alpha=1)})


def unseal(cache: Cache, *splits: str) -> Cache:
    for split in splits:
        file = Path(cache.path, split, "zarr.json")
        content = json.loads(file.read_text())
        content["attributes"].update(sealed=False, digest=None)
        file.write_text(json.dumps(content))
    return open_cache(cache.path)


def test_what_a_search_lacks_is_extracted_first(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"ood/val": 0})
    assert describe_next(cache) == ["a search needs ood/val too", f"next: {cache.command()}"]
    cache = unseal(make_cache(tmp_path / "d.zarr", rows={"id/train": 0}), "id/val")
    assert describe_next(cache) == ["a search needs id/train, id/val too", f"next: {cache.command()}"]
    assert cache.command() == f"nacpipe extract digits --cache {tmp_path}/d.zarr"


def test_a_search_can_begin_before_the_test_sets_are_there(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = unseal(make_cache(tmp_path / "c.zarr"), "id/test", "id/subtrain", "ood/near/letters", "ood/far/textures")
    assert describe_next(cache) == [f"next: nacpipe search {cache.path}"]


@pytest.mark.parametrize(
    ("rows", "command"), [({}, "evaluate"), ({"ood/near/letters": 0, "ood/far/textures": 0}, "export")]
)
def test_after_a_search_of_these_states_they_are_used(
    make_cache: Callable[..., Cache], tmp_path: Path, rows: dict[str, int], command: str
) -> None:
    """Without a near or far set there is nothing to evaluate. Parameters of other states are not used."""
    cache = make_cache(tmp_path / "c.zarr", rows=rows)
    own = fingerprint(cache.search_identity(("id/train", "id/val", "ood/val"), ("layer1",)))
    write_params(tmp_path / "c.params.json", PARAMS, made_by={"fingerprint": own})
    assert describe_next(cache) == [f"next: nacpipe {command} {cache.path}"]
    write_params(tmp_path / "c.params.json", PARAMS, made_by={"fingerprint": "0" * 64})
    assert describe_next(cache) == [f"next: nacpipe search {cache.path}"]


def test_after_a_search_what_a_table_needs_is_finished_first(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = unseal(make_cache(tmp_path / "c.zarr"), "ood/near/letters", "ood/far/textures")
    assert after_search(cache) == cache.command() == f"nacpipe extract digits --cache {tmp_path}/c.zarr"
