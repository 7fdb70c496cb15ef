"""One split of a cache: its layers, its other arrays, and the comparison with its seal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from nacpipe.cache.array_view import ArrayView
from nacpipe.cache.digest import matches_seal
from nacpipe.cache.keys import list_split
from nacpipe.cache.layout import MISSING_INT, Header, LayerSpec, chunk_key, count_blocks, is_there
from nacpipe.cache.options import FROM_PYTHON
from nacpipe.cache.store import WebStore
from nacpipe.cache.validation import missing_chunks, open_member, split_problems
from nacpipe.errors import CacheError, FormatError, InputError, NacError, ValuesError
from nacpipe.text import command_line, spell_option


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of a split; both arrays are (rows, neurons) float32, read from the store and checked when sliced."""

    spec: LayerSpec
    activation: ArrayView
    gradient: ArrayView | None
    """None in a cache that was written by forward passes alone."""


class SplitView(Mapping[str, LayerView]):
    """One set of samples: layers by name, and the other arrays of a split."""

    def __init__(self, path: str, root: zarr.Group, header: Header, name: str, group: zarr.Group) -> None:
        """Open a split, which is a group of its cache's root; `path` is the cache's.

        Raises:
            FormatError: its number of rows is damaged.
        """
        self.name = name
        self.attributes: dict[str, Any] = dict(group.attrs)
        rows = self.attributes.get("rows")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise FormatError(f"{path}: {name}/zarr.json is damaged (rows is {str(rows)[:40]})")
        self.rows: int = rows
        self.sealed: bool = bool(self.attributes.get("sealed"))
        self._cache_path, self._root, self._header, self._group = path, root, header, group
        self._arrays: dict[str, zarr.Array[Any]] = {}  # opened once

    def __getitem__(self, layer: str) -> LayerView:
        try:
            spec = self._header.layer(layer)
        except InputError as error:
            raise InputError(f"{error} ({self._cache_path})") from None
        header = self._header
        gradient = self._view(header.layer_array(layer, "gradient")) if header.gradients else None
        return LayerView(spec, self._view(header.layer_array(layer, "activation")), gradient)

    def __contains__(self, layer: object) -> bool:
        return any(spec.name == layer for spec in self._header.layers)

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._header.layers)

    def __len__(self) -> int:
        return len(self._header.layers)

    @property
    def redo_option(self) -> str:
        """How this split is extracted again: `--redo id/val`; of a cache made from Python `redo=['id/val']`."""
        python = self._header.information.get("written_by") == FROM_PYTHON
        return spell_option("redo", [self.name] if python else self.name, python=python)

    @property
    def images(self) -> Mapping[str, Any]:
        """The image list's name and sha256, and for id/train how its samples were chosen.

        Raises:
            CacheError: the attribute is damaged.
        """
        images = self.attributes.get("images", {})
        if not isinstance(images, Mapping):
            raise self._damaged("zarr.json", f"images is {str(images)[:40]!r}, not an object")
        return dict(images)

    def row_slices(self, step: int) -> Iterator[slice]:
        """Cut the rows into slices of `step`, the last of what is left: what is read at once."""
        return (slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    @cached_property
    def logits(self) -> ArrayView:
        """(rows, classes) float32."""
        return self._view("logits")

    @cached_property
    def features(self) -> ArrayView:
        """(rows, d) float32, the input of the last linear layer."""
        return self._view("features")

    @cached_property
    def label(self) -> NDArray[np.int64]:
        """(rows,) class numbers, −1 for OOD."""
        return self.read("label")

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """(rows,) positions in the image list."""
        return self.read("index")

    def array(self, path: str) -> zarr.Array[Any]:
        """Return the Zarr array; its chunks are read without the checks of `read`.

        Raises:
            CacheError: the array does not exist, or its metadata is damaged.
        """
        if path in self._arrays:
            return self._arrays[path]
        try:
            array = open_member(self._group, path)
        except KeyError:
            raise CacheError(f"{self._cache_path}: {self.name}/{path} is not in the store") from None
        except FormatError as error:
            raise self._damaged(path, error) from error
        if not isinstance(array, zarr.Array):
            raise self._damaged(path, "it is a group, not an array")
        self._arrays[path] = array
        return array

    def _view(self, path: str) -> ArrayView:
        array = self.array(path)
        read = partial(self.read, path)
        return ArrayView(f"{self.name}/{path}", array.shape, np.dtype(array.dtype), self._header.block_rows, read)

    def read_layer(self, layer: str, what: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Return rows of a layer's `activation` or `gradient`, (rows, neurons); see `read`.

        Raises:
            CacheError: a chunk is damaged or missing, or the cache has no gradients.
        """
        if what == "gradient" and not self._header.gradients:
            raise CacheError(
                f"{self._cache_path} was written without gradients (extract --no-gradient): terms of activations alone"
                " can be used"
            )
        return self.read(self._header.layer_array(layer, what), rows)

    def read(self, path: str, rows: slice = slice(None), *, any_number: bool = False) -> NDArray[Any]:
        """Return rows of an array; `rows` may have a step above 0.

        Args:
            path: the array's path in the split.
            rows: which.
            any_number: whether logits and features may contain NaN and infinity, as a copy of them may.

        Raises:
            CacheError: a chunk is damaged or missing, naming the array.
            ValuesError: logits or features contain NaN or infinity. (Scoring refuses such states by layer, split, row.)
        """
        array = self.array(path)
        try:
            values = np.asarray(array[rows])
        except (NacError, OSError, MemoryError):
            raise
        except Exception as error:  # crc32c raises ValueError, Blosc RuntimeError, a crafted chunk any error
            raise self._damaged(path, str(error).split(" Stored: b")[0]) from error
        bad = np.flatnonzero(_without_number(path, values))
        if bad.size:
            self._check_values(path, array, values, bad, range(self.rows)[rows], any_number)
        return values

    def _check_values(
        self,
        path: str,
        array: zarr.Array[Any],
        values: NDArray[Any],
        bad: NDArray[np.intp],
        rows: range,
        any_number: bool,
    ) -> None:
        """Refuse rows at these positions of `values`: missing values, or values that no baseline can use."""
        blocks = np.array([rows[int(place)] for place in bad]) // self._header.block_rows
        for block, first in zip(*np.unique(blocks, return_index=True), strict=True):
            key = chunk_key(array, int(block), self._header)
            if values.dtype.kind == "i" or not is_there(self._root, key):
                raise self._damaged(path, f"row {rows[int(bad[first])]} holds no value")
        if path in ("logits", "features") and not any_number:
            value = values[bad[0]]
            infinite = value[~np.isfinite(value)][0]
            raise ValuesError(
                f"{self._cache_path}: {self.name}/{path}, row {rows[int(bad[0])]}: the network gave {infinite}"
            )

    def _damaged(self, path: str, what: object) -> CacheError:
        return CacheError(
            f"{self._cache_path}: {self.name}/{path} is damaged ({what}); repair it with:"
            f" {command_line('repair', self._cache_path)}"
        )

    def check(self) -> None:
        """Refuse a split that differs from what was sealed: in metadata, or by changed, exchanged or lost files.

        In a sharded cache the digest is not compared: it includes whole shards, which would be read twice. Behind a web
        server metadata alone are checked: a request for each chunk is as much as reading it; a lost one is found then.

        Raises:
            CacheError: naming the difference.
        """
        root, header = self._root, self._header
        sharded = header.shard_blocks > 1
        for array, what in split_problems(self._group, header, self._arrays):
            raise self._damaged(array or "zarr.json", what)
        if isinstance(root.store, WebStore):
            return
        keys = list_split(root.store, header, self.name)
        for array, count in missing_chunks({path: self.array(path) for path in header.arrays()}, keys[0]):
            raise self._damaged(array, f"{count} of its chunks are not there")
        if not (sharded or matches_seal(root, self.name, self.attributes, keys)):
            raise CacheError(
                f"{self._cache_path}: {self.name} is not what was sealed: files were changed, exchanged or lost;"
                f" {command_line('verify', self._cache_path)} says which"
            )

    def marks(self) -> NDArray[np.bool_]:
        """Return which blocks are written, (blocks,) bool; all False if the split has no marks yet.

        A mark that cannot be read (cut short by a power cut) counts as False: its block is written again.
        """
        count = count_blocks(self.rows, self._header.block_rows)
        if not self._holds("blocks"):
            return np.zeros(count, bool)
        marks = self.array("blocks")
        if marks.shape != (count,):
            raise self._damaged("blocks", f"it has {marks.shape} marks for {count} blocks")
        try:
            return np.asarray(marks[:]).astype(bool)
        except (ValueError, RuntimeError):
            return np.array([_is_marked(marks, block) for block in range(count)])

    def stored_bytes(self) -> int:
        """Return the bytes of the split's chunks as they are stored."""
        arrays = [*self._header.arrays(), "blocks"]
        return sum(int(self.array(path).nbytes_stored()) for path in arrays if self._holds(path))

    def _holds(self, path: str) -> bool:
        return is_there(self._root, f"{self.name}/{path}/zarr.json")


def _without_number(path: str, values: NDArray[Any]) -> NDArray[np.bool_]:  # (rows,) or (rows, width) → (rows,)
    """Return which rows contain a fill value or, for logits and features, values that no baseline can use."""
    if values.dtype.kind == "i":
        return np.asarray(values == MISSING_INT)
    if path == "logits":  # −∞ in some classes is allowed
        return np.asarray(~np.isfinite(values.max(axis=1)))
    bad = ~np.isfinite(values) if path == "features" else np.isnan(values)
    return np.asarray(bad.any(axis=1))


def _is_marked(marks: zarr.Array[Any], block: int) -> bool:
    try:
        return bool(np.asarray(marks[block]))
    except (ValueError, RuntimeError):
        return False
