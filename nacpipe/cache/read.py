"""Opening a cache for reading: `open_cache(path)["id/val"]["avgpool"].activation[:]` is a numpy array."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from nacpipe.cache.form import classifier_problems, missing_chunks, open_member, split_problems
from nacpipe.cache.layout import MISSING_INT, Header, LayerSpec, chunk_key, count_blocks, find_splits, is_there
from nacpipe.cache.seal import digest_lines, hash_keys, list_keys
from nacpipe.errors import CacheError, FormatError, InputError, NacError, ValuesError


def open_cache(path: str | Path) -> Cache:
    """Open a cache for reading.

    Raises:
        CacheError: nothing is there.
        FormatError: it is not a cache, or one of another format version.
    """
    root, header = open_root(str(path), mode="r")
    return Cache(str(path), root, header)


def open_root(path: str, *, mode: Literal["r", "r+"]) -> tuple[zarr.Group, Header]:
    """Open the root group and read its header; errors carry the path."""
    try:
        root = zarr.open_group(path, mode=mode, zarr_format=3, use_consolidated=False)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        raise CacheError(
            f"there is no cache at {path}; make one with: nacpipe extract BENCHMARK --cache {path}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # zarr answers broken metadata with errors of every kind
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise FormatError(f"{path} cannot be read as a Zarr group ({what})") from error
    try:
        return root, Header.from_attributes(root.attrs)
    except NacError as error:
        raise type(error)(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of a split; both arrays are (rows, neurons) float32 and read from the store when sliced."""

    spec: LayerSpec
    activation: zarr.Array[Any]
    gradient: zarr.Array[Any]


class SplitView(Mapping[str, LayerView]):
    """One set of samples: layers by name, and the arrays that every split has."""

    def __init__(self, cache: Cache, name: str, group: zarr.Group) -> None:
        self.name = name
        self.attributes: dict[str, Any] = dict(group.attrs)
        rows = self.attributes.get("rows")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise FormatError(f"{cache.path}: {name}/zarr.json is damaged (rows is {str(rows)[:40]})")
        self.rows: int = rows
        self.sealed: bool = bool(self.attributes.get("sealed"))
        self._cache = cache
        self._group = group

    def __getitem__(self, layer: str) -> LayerView:
        try:
            spec = self._cache.header.layer(layer)
        except InputError as error:
            raise InputError(f"{error} ({self._cache.path})") from None
        return LayerView(spec, self.array(f"{layer}/activation"), self.array(f"{layer}/gradient"))

    def __contains__(self, layer: object) -> bool:
        return any(spec.name == layer for spec in self._cache.header.layers)

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._cache.header.layers)

    def __len__(self) -> int:
        return len(self._cache.header.layers)

    @property
    def images(self) -> Mapping[str, Any]:
        """The image list's name and sha256, and for id/train how its samples were chosen."""
        return dict(self.attributes.get("images", {}))

    @cached_property
    def logits(self) -> zarr.Array[Any]:
        """(rows, classes) float32."""
        return self.array("logits")

    @cached_property
    def features(self) -> zarr.Array[Any]:
        """(rows, d) float32, the input of the last linear layer."""
        return self.array("features")

    @cached_property
    def label(self) -> NDArray[np.int64]:
        """(rows,) class numbers, −1 for OOD."""
        return self.read("label")

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """(rows,) positions in the image list."""
        return self.read("index")

    def array(self, path: str) -> zarr.Array[Any]:
        """Return an array of this split.

        Raises:
            CacheError: it is not there.
        """
        try:
            array = open_member(self._group, path)
        except KeyError:
            raise CacheError(f"{self._cache.path}: {self.name}/{path} is not in the store") from None
        except FormatError as error:
            raise self._damaged(path, error) from error
        if not isinstance(array, zarr.Array):
            raise self._damaged(path, "it is a group, not an array")
        return array

    def read(self, path: str, rows: slice = slice(None)) -> NDArray[Any]:
        """Return rows of an array.

        Raises:
            CacheError: a chunk is damaged or not there, naming the array.
            ValuesError: NaN among logits or features. (Scoring refuses states of NaN by layer, split and row.)
        """
        array = self.array(path)
        try:
            values = np.asarray(array[rows])
        except (NacError, OSError, MemoryError):
            raise
        except Exception as error:  # crc32c says ValueError, Blosc RuntimeError, a crafted chunk anything
            raise self._damaged(path, error) from error
        missing = values == MISSING_INT if values.dtype.kind == "i" else np.isnan(values)
        if missing.any():
            row = int(np.argmax(missing.reshape(len(values), -1).any(axis=1))) + (rows.start or 0)
            block = row // self._cache.header.block_rows
            if values.dtype.kind == "i" or not is_there(self._cache.root, chunk_key(array, block, self._cache.header)):
                raise self._damaged(path, f"row {row} holds no value")
            if path in ("logits", "features"):
                raise ValuesError(f"{self._cache.path}: {self.name}/{path}, row {row}: the network gave NaN")
        return values

    def _damaged(self, path: str, what: object) -> CacheError:
        return CacheError(
            f"{self._cache.path}: {self.name}/{path} is damaged ({what}); mend it with: nacpipe repair"
            f" {self._cache.path}"
        )

    def check(self) -> None:
        """Refuse a split that is not what was sealed: another form, or files changed, exchanged or lost since.

        Of a sharded cache the form alone is looked at: its seal covers whole shards, which would be read twice.

        Raises:
            CacheError: naming what is wrong.
        """
        root, header = self._cache.root, self._cache.header
        sharded = header.shard_blocks > 1
        for array, what in split_problems(self._group, header):
            raise self._damaged(array or "zarr.json", what)
        hashes = dict.fromkeys(list_keys(root, self.name), "") if sharded else hash_keys(root, self.name)
        for array, count in missing_chunks(header, self.rows, hashes):
            raise self._damaged(array, f"{count} of its chunks are not there")
        if not sharded and digest_lines(self.attributes, hashes) != self.attributes["digest"]:
            raise CacheError(
                f"{self._cache.path}: {self.name} is not what was sealed: files were changed, exchanged or lost;"
                f" nacpipe verify {self._cache.path} says which"
            )

    def marks(self) -> NDArray[np.bool_]:
        """Return which blocks are written, (blocks,) bool; none where the split was only begun.

        A mark that cannot be read (torn when the power went) does not count: its block is written again.
        """
        count = count_blocks(self.rows, self._cache.header.block_rows)
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
        arrays = [*self._cache.header.arrays(), "blocks"]
        return sum(int(self.array(path).nbytes_stored()) for path in arrays if self._holds(path))

    def _holds(self, path: str) -> bool:
        return is_there(self._cache.root, f"{self.name}/{path}/zarr.json")


class Cache(Mapping[str, SplitView]):
    """A cache opened for reading: splits by name. Only sealed splits are handed out; `peek` shows the others."""

    def __init__(self, path: str, root: zarr.Group, header: Header) -> None:
        self.path = path
        self.header = header
        self.root = root
        self._names = find_splits(root)
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> SplitView:
        split = self.peek(name)
        if not split.sealed:
            raise CacheError(
                f"{self.path}: {name} is not finished ({int(split.marks().sum())} of {split.marks().size} blocks);"
                f" finish it with: {self.command()}"
            )
        if name not in self._checked:
            split.check()
            self._checked.add(name)
        return split

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def peek(self, name: str) -> SplitView:
        """Return a split, finished or not.

        Raises:
            InputError: the cache has no such split.
        """
        if name not in self._names:
            held = ", ".join(self._names) or "none"
            close = difflib.get_close_matches(name, self._names, 1)
            hint = f"did you mean {close[0]}?" if close else f"add it with: {self.command()}"
            raise InputError(f"split {name!r} is not in {self.path}; it holds {held}; {hint}")
        try:
            group = open_member(self.root, name)
        except KeyError:
            raise CacheError(f"{self.path}: {name} is gone; is it being extracted anew?") from None
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}; nacpipe repair {self.path} mends what can be mended") from error
        if not isinstance(group, zarr.Group):
            raise FormatError(f"{self.path}: {name} is an array, not a split")
        return SplitView(self, name, group)

    def command(self) -> str:
        """Return the command that made this cache, which also finishes it."""
        return str(self.header.information.get("command") or f"nacpipe extract BENCHMARK --cache {self.path}")

    def classifier(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return the last linear layer's weight (classes, features) and bias (classes,), where there is one."""
        try:
            problems = list(classifier_problems(self.root, self.header))
        except FormatError as error:
            problems = [("zarr.json", str(error))]
        for array, what in problems:
            raise CacheError(f"{self.path}: classifier/{array} {what}; mend it with: nacpipe repair {self.path}")
        if not is_there(self.root, "classifier/zarr.json") or not self.root["classifier"].attrs.get("written"):
            return None
        try:
            weight, bias = (np.asarray(self.root[f"classifier/{name}"][:]) for name in ("weight", "bias"))  # type: ignore[index]
        except (ValueError, RuntimeError) as error:
            raise CacheError(
                f"{self.path}: classifier is damaged ({error}); mend it with: nacpipe repair {self.path}"
            ) from error
        if np.isnan(weight).any() or np.isnan(bias).any():
            raise CacheError(f"{self.path}: classifier holds no value; mend it with: nacpipe repair {self.path}")
        return weight, bias

    def search_identity(self, splits: tuple[str, ...], layers: tuple[str, ...]) -> dict[str, Any]:
        """Return the identity of these splits and layers, which a study is bound to."""
        whole = self.header.whole_identity()
        return {
            **whole,
            "layers": {name: whole["layers"][name] for name in layers},
            "splits": {name: dict(self.peek(name).images) for name in splits if name in self},
        }


def _is_marked(marks: zarr.Array[Any], block: int) -> bool:
    try:
        return bool(np.asarray(marks[block]))
    except (ValueError, RuntimeError):
        return False
