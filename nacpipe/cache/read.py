"""Opening a cache for reading: `open_cache(path)["id/val"]["avgpool"].activation[:]` is a numpy array."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from nacpipe.cache.layout import MISSING_INT, Header, LayerSpec, count_blocks, find_splits
from nacpipe.errors import CacheError, FormatError, InputError, NacError


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
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path} cannot be read as a Zarr group ({type(error).__name__}: {error})") from error
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
        self.rows: int = int(self.attributes["rows"])
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
            array = self._group[path]
        except KeyError:
            raise CacheError(f"{self._cache.path}: {self.name}/{path} is not in the store") from None
        except (ValueError, TypeError) as error:
            raise self._damaged(path, error) from error
        if not isinstance(array, zarr.Array):
            raise self._damaged(path, "it is a group, not an array")
        return array

    def read(self, path: str, rows: slice = slice(None)) -> NDArray[Any]:
        """Return rows of an array.

        Raises:
            CacheError: a chunk is damaged or not there, naming the array. (States may hold NaN of their own: scoring
                refuses those by layer, split and row.)
        """
        try:
            values = np.asarray(self.array(path)[rows])
        except (ValueError, RuntimeError) as error:  # crc32c says ValueError, Blosc RuntimeError
            raise self._damaged(path, error) from error
        if values.dtype.kind == "i":
            missing = values == MISSING_INT
        elif path in ("logits", "features"):
            missing = np.isnan(values).any(axis=1)
        else:
            return values
        if missing.any():
            raise self._damaged(path, f"row {int(np.argmax(missing)) + (rows.start or 0)} holds no value")
        return values

    def _damaged(self, path: str, what: object) -> CacheError:
        return CacheError(
            f"{self._cache.path}: {self.name}/{path} is damaged ({what}); extract the split again with:"
            f" {self._cache.command()} --force {self.name}"
        )

    def marks(self) -> NDArray[np.bool_]:
        """Return which blocks are written, (blocks,) bool; none where the split was only begun."""
        if "blocks" not in self._group:
            return np.zeros(count_blocks(self.rows, self._cache.header.block_rows), bool)
        return self.read("blocks").astype(bool)

    def stored_bytes(self) -> int:
        """Return the bytes of the split's chunks as they are stored."""
        arrays = [*self._cache.header.arrays(), "blocks"]
        return sum(int(self.array(path).nbytes_stored()) for path in arrays if path in self._group)


class Cache(Mapping[str, SplitView]):
    """A cache opened for reading: splits by name. Only sealed splits are handed out; `peek` shows the others."""

    def __init__(self, path: str, root: zarr.Group, header: Header) -> None:
        self.path = path
        self.header = header
        self._root = root
        with warnings.catch_warnings():
            # A killed writer may leave `.partial` files beside the groups; the next extract removes them.
            warnings.filterwarnings(
                "ignore", message="Object at .* is not recognized as a component of a Zarr hierarchy"
            )
            try:
                self._names = find_splits(root)
            except (ValueError, TypeError, KeyError) as error:
                raise CacheError(f"{path}: metadata below it is damaged ({error}); extract anew") from error

    def __getitem__(self, name: str) -> SplitView:
        split = self.peek(name)
        if not split.sealed:
            raise CacheError(
                f"{self.path}: {name} is not finished ({int(split.marks().sum())} of {split.marks().size} blocks);"
                f" finish it with: {self.command()}"
            )
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
        group = self._root[name]
        assert isinstance(group, zarr.Group)
        return SplitView(self, name, group)

    def command(self) -> str:
        """Return the command that made this cache, which also finishes it."""
        return str(self.header.information.get("command") or f"nacpipe extract BENCHMARK --cache {self.path}")

    def classifier(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return the last linear layer's weight (classes, features) and bias (classes,), where there is one."""
        group = self._root.get("classifier")
        if group is None or not group.attrs.get("written"):
            return None
        weight, bias = (self._root[f"classifier/{name}"] for name in ("weight", "bias"))
        return np.asarray(weight[:]), np.asarray(bias[:])  # type: ignore[index]

    def search_identity(self, splits: tuple[str, ...], layers: tuple[str, ...]) -> dict[str, Any]:
        """Return the identity of these splits and layers, which a study is bound to."""
        whole = self.header.whole_identity()
        return {
            **whole,
            "layers": {name: whole["layers"].get(name, "held with every sample") for name in layers},  # or logits
            "splits": {name: dict(self.peek(name).images) for name in splits if name in self},
        }
