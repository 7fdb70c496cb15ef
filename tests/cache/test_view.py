"""Arrays of a split sliced as numpy arrays, through the checks of `SplitView.read`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices, integer_array_indices

from nacpipe.cache import ArrayView, Cache, CacheWriter, SplitView, open_cache
from nacpipe.errors import CacheError, ValuesError

ROWS, WIDTH, BLOCK = 40, 6, 16  # of id/val and avgpool in the small cache


@pytest.fixture(scope="module")
def split(small_cache: Cache) -> SplitView:
    return small_cache["id/val"]


def views(split: SplitView) -> dict[str, ArrayView]:
    found = {"logits": split.logits, "features": split.features}
    for name, layer in split.items():
        found |= {f"layers/{name}/activation": layer.activation, f"layers/{name}/gradient": layer.gradient}
    return found


def test_views_look_like_the_arrays_that_they_show(split: SplitView) -> None:
    for path, view in views(split).items():
        values = split.read(path)
        assert (view.shape, view.dtype, view.ndim, len(view)) == (values.shape, np.float32, 2, ROWS)
        assert view.size == values.size
        assert repr(view) == f"<id/val/{path} {values.shape} float32>"
        for found in (view[:], np.asarray(view), view[...], np.stack(list(view)), np.array(view, np.float64)):
            np.testing.assert_array_equal(found, values)
        assert np.asarray(view, np.float64).dtype == np.float64
        with pytest.raises(ValueError, match=re.escape(f"{view!r} is read from a store: there is no array without a")):
            np.asarray(view, copy=False)


MASK = np.arange(ROWS) % 7 == 3
SELECTIONS = [
    *(slice(5, 20), slice(None, None, 3), slice(35, 2, -4), slice(None, None, -1), slice(5, 5), slice(-3, None)),
    *(0, -1, np.int64(17), [], [3], [39, 0, 0, 20], np.array([[1, 2], [30, -1]]), np.array(5), MASK, MASK.tolist()),
    *((slice(2, 30, 9), 3), (3, slice(None, None, 2)), (-1, -1), ([1, 20], [0, 5]), ([[1], [20]], [0, 5]), (7, [1, 2])),
    *((slice(1, 4), [4, 0]), (MASK, 2), (MASK, slice(1, 3)), (slice(None), np.arange(WIDTH) > 2), (..., 1), (3, ...)),
    *((..., [1, 2]), (slice(0, 3), ..., slice(0, 2)), (np.array([18, 2]), slice(None, None, -1)), ()),
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: re.sub(r"\s+", " ", repr(s))[:50])
def test_numpys_selections(split: SplitView, selection: Any) -> None:
    values, view = split.read("layers/avgpool/activation"), split["avgpool"].activation
    expected = values[selection]
    found = view[selection]
    assert type(found) is type(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found, expected)


def test_a_mask_of_the_whole_shape(split: SplitView) -> None:
    values, view = split.read("layers/layer1/gradient"), split["layer1"].gradient
    np.testing.assert_array_equal(view[values > 0.1], values[values > 0.1])
    with pytest.raises(IndexError, match=r"does not take a mask of \(40, 3\)"):
        view[np.ones((40, 3), bool)]


@given(
    selection=basic_indices((ROWS, WIDTH), allow_newaxis=False) | integer_array_indices((ROWS, WIDTH)), data=st.data()
)
def test_any_selection_gives_what_numpy_gives(small_cache: Cache, selection: Any, data: st.DataObject) -> None:
    split = small_cache["id/val"]
    values = split.read("layers/avgpool/gradient")
    np.testing.assert_array_equal(split["avgpool"].gradient[selection], values[selection])
    rows = data.draw(st.lists(st.integers(-ROWS, ROWS - 1), max_size=8))
    columns = data.draw(basic_indices((WIDTH,), allow_newaxis=False, allow_ellipsis=False))
    np.testing.assert_array_equal(
        split["avgpool"].gradient[(rows, *np.index_exp[columns])], values[(rows, *np.index_exp[columns])]
    )


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (40, "index 40 is out of bounds for axis 0 with size 40"),
        ([1, -41], "index -41 is out of bounds for axis 0 with size 40"),
        ((0, 6), "index 6 is out of bounds for axis"),
        (MASK[:39], "boolean index did not match indexed array along axis 0"),
        ((1, 2, 3), r"has 2 axes; 3 were selected from"),
        ((..., 1, ...), r"has 2 axes; 3 were selected from"),
        (
            None,
            r"<id/val/layers/avgpool/activation \(40, 6\) float32> takes slices, whole numbers, arrays of them, masks",
        ),
        (1.5, r"masks and \.\.\., not 1\.5$"),
        ("logits", r"masks and \.\.\., not 'logits'$"),
        (True, r"masks and \.\.\., not True$"),
    ],
)
def test_what_cannot_be_selected(split: SplitView, selection: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        split["avgpool"].activation[selection]


def test_only_blocks_with_wanted_rows_are_read(split: SplitView, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = SplitView.read, list[slice]()

    def watch(self: SplitView, path: str, rows: slice = slice(None)) -> Any:
        seen.append(rows)
        return read(self, path, rows)

    monkeypatch.setattr(SplitView, "read", watch)
    view = split["layer1"].activation
    for selection, blocks in (
        (5, [(5, 6)]),
        ([39, 2, 3], [(2, 4), (39, 40)]),
        (slice(None, None, 20), [(0, 1), (20, 21)]),
    ):
        seen.clear()
        view[selection]
        assert [(rows.start, rows.stop) for rows in seen] == blocks
    seen.clear()
    view[:]
    assert [(rows.start, rows.stop) for rows in seen] == [(0, 40)]  # together: Zarr reads chunks side by side


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(small_cache: Cache, tmp_path: Path) -> Path:
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


@pytest.mark.parametrize("array", ["layers/avgpool/activation", "layers/layer1/gradient", "logits", "features"])
def test_a_damaged_chunk_is_a_sentence(path: Path, array: str) -> None:
    split = open_cache(path)["id/val"]  # before the damage: a split's checksums are compared when it is first used
    chunk = path / "id/val" / array / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[9] ^= 1
    chunk.write_bytes(bytes(content))
    message = rf"^{path}: id/val/{array} is damaged \(.*checksum.*\); repair it with: nacpipe repair {path}$"
    for select in (lambda view: view[:], lambda view: view[20], lambda view: view[[0, 31], 0], np.asarray, list):
        with pytest.raises(CacheError, match=message):
            select(views(split)[array])
    assert views(split)[array][:16].shape[0] == 16  # around it
    chunk.unlink()
    with pytest.raises(CacheError, match=rf"^{path}: id/val/{array} is damaged \(row 17 holds no value\)"):
        views(split)[array][17:3:-5]


@pytest.mark.parametrize("array", ["logits", "features"])
@pytest.mark.repeats(1)
def test_no_number_is_a_sentence(make_cache: Callable[..., Cache], tmp_path: Path, array: str) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"id/test": 0})
    source = cache["id/val"]
    writer = CacheWriter(cache.path, cache.header)
    writer.prepare("id/test", 40, {"list": "l", "sha256": "0" * 64})
    for block in range(3):
        arrays = {key: np.array(source.read(key)[16 * block : 16 * block + 16]) for key in cache.header.arrays()}
        if block == 1:
            arrays[array][4] = np.nan
        writer.write_block("id/test", block, arrays)
    writer.seal("id/test")
    view = views(open_cache(cache.path)["id/test"])[array]
    for selection in (slice(None), 20, [39, 20], (slice(10, 30), 0), slice(30, 10, -1), slice(None, None, 4)):
        with pytest.raises(ValuesError, match=rf"^{cache.path}: id/test/{array}, row 20: the network gave nan$"):
            view[selection]
    np.testing.assert_array_equal(view[21:], source.read(array)[21:])


def test_states_without_a_number_do_not_hide_a_chunk_that_is_not_there(
    make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    """NaN among states is scoring's to refuse; rows that are not stored are nobody's."""
    cache = make_cache(tmp_path / "c.zarr", rows={"id/test": 0})
    source = cache["id/val"]
    writer = CacheWriter(cache.path, cache.header)
    writer.prepare("id/test", 40, {"list": "l", "sha256": "0" * 64})
    for block in range(3):
        arrays = {key: np.array(source.read(key)[16 * block : 16 * block + 16]) for key in cache.header.arrays()}
        arrays["layers/layer1/activation"][3] = np.nan
        writer.write_block("id/test", block, arrays)
    writer.seal("id/test")
    view = open_cache(cache.path)["id/test"]["layer1"].activation
    assert np.flatnonzero(np.isnan(view[:]).any(axis=1)).tolist() == [3, 19, 35]
    (tmp_path / "c.zarr/id/test/layers/layer1/activation/c.1.0").unlink()
    with pytest.raises(CacheError, match=r"id/test/layers/layer1/activation is damaged \(row 16 holds no value\)"):
        view[:]
