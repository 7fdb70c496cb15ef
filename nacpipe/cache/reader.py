"""Opening a cache for reading: `open_cache(path)["id/val"]["avgpool"].activation[:]` is a numpy array."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from nacpipe.cache.address import open_store
from nacpipe.cache.layout import Header, find_splits, is_there
from nacpipe.cache.options import finishing_command
from nacpipe.cache.split import SplitView
from nacpipe.cache.store import WebStore
from nacpipe.cache.validation import classifier_problems, open_member
from nacpipe.errors import CacheError, FormatError, InputError, NacError
from nacpipe.text import command_line, escape_bytes, html_table


def open_cache(path: str | Path) -> Cache:
    """Open a cache for reading.

    Raises:
        CacheError: the cache does not exist.
        FormatError: it is not a cache, or has another format version.
    """
    root, header = open_root(str(path), mode="r")
    return Cache(str(path), root, header)


def as_cache(cache: Cache | str | Path) -> Cache:
    """Return a cache, which is opened where its path or URL is given."""
    return cache if isinstance(cache, Cache) else open_cache(cache)


def open_root(path: str, *, mode: Literal["r", "r+"]) -> tuple[zarr.Group, Header]:
    """Open the root group and read its header; errors carry the path."""
    try:
        root = zarr.open_group(open_store(path, write=mode == "r+"), mode=mode, zarr_format=3, use_consolidated=False)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        raise CacheError(
            f"there is no cache at {path}; make one with: {command_line('extract', 'BENCHMARK', '--cache', path)}"
        ) from None
    except (NacError, MemoryError):
        raise
    except Exception as error:  # Zarr raises errors of any kind for broken metadata
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise FormatError(f"{path} cannot be read as a Zarr group ({what})") from error
    try:
        header = Header.from_attributes(root.attrs)
    except NacError as error:
        raise type(error)(f"{path}: {error}") from error
    if isinstance(root.store, WebStore):
        _check_web_cache(path, header, root.store)
    return root, header


def _check_web_cache(path: str, header: Header, store: WebStore) -> None:
    """Refuse a cache that has no copy of its metadata: a web server has no listing.

    Raises:
        FormatError: it is of version 1.
        CacheError: no split of it is finished.
    """
    if header.version == 1:
        raise FormatError(
            f"{path} has format version 1, which cannot be read over http; where it is kept, make a copy that can:"
            f" {command_line('convert', 'OLD.zarr', 'NEW.zarr')}"
        )
    if not sync(store.metadata()):
        raise CacheError(
            f"{path} has no consolidated metadata, by which a cache is read over http: no split of it is finished, or"
            f" they were removed; where it is kept, finish it with: {finishing_command(header.information, 'x.zarr')}"
        )


class Cache(Mapping[str, SplitView]):
    """A cache opened for reading: splits by name. Indexing returns sealed splits alone; `peek` returns any."""

    def __init__(self, path: str, root: zarr.Group, header: Header) -> None:
        self.path = path
        self.header = header
        self.root = root
        self._names = find_splits(root)
        if odd := [name for name in self._names if escape_bytes(name) != name]:
            raise FormatError(f"{path}: the name of split {escape_bytes(odd[0])} is not UTF-8; rename its folder")
        self._checked: set[str] = set()
        self._sealed: dict[str, SplitView] = {}  # opened once; what is not sealed still changes

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
        if name in self._sealed:
            return self._sealed[name]
        if name not in self._names:
            held = ", ".join(self._names) or "none"
            known = name in ("id/train", "id/val", "id/test", "ood/val")  # no misspelling of one another
            close = [] if known else difflib.get_close_matches(name, self._names, 1)
            hint = f"did you mean {close[0]}?" if close else f"add it with: {self.command()}"
            raise InputError(f"split {name!r} is not in {self.path}; it holds {held}; {hint}")
        try:
            group = open_member(self.root, name)
        except KeyError:
            raise CacheError(f"{self.path}: {name} was removed; is it being extracted again?") from None
        except FormatError as error:
            raise FormatError(
                f"{self.path}: {error}; {command_line('repair', self.path)} repairs what can be repaired"
            ) from error
        if not isinstance(group, zarr.Group):
            raise FormatError(f"{self.path}: {name} is an array, not a split")
        split = SplitView(self.path, self.root, self.header, name, group)
        if split.sealed:
            self._sealed[name] = split
        return split

    def _repr_html_(self) -> str:
        """Return the cache as a notebook shows it: its splits and layers."""
        splits = [
            (name, str(split.rows), "yes" if split.sealed else "no")
            for name, split in ((name, self.peek(name)) for name in self)
        ]
        layers = [(spec.name, spec.path, spec.pooling, str(spec.neurons)) for spec in self.header.layers]
        return (
            f"<p>{html.escape(self.path)}: {html.escape(str(self.header.identity.get('architecture')))},"
            f" {self.header.classes} classes</p>"
            + html_table(("split", "samples", "finished"), splits)
            + html_table(("layer", "module", "pooling", "neurons"), layers)
        )

    def command(self) -> str:
        """Return the command that made this cache, which also finishes it."""
        return finishing_command(self.header.information, self.path, self.train_images())

    def train_images(self) -> int | None:
        """Return the number of images that was asked for as id/train; None where it is not known."""
        try:
            count = self.peek("id/train").images.get("images") if "id/train" in self else None
        except NacError:  # damaged, or just being extracted again
            return None
        return count if type(count) is int else None

    def classifier(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return the last linear layer's weight (classes, features) and bias (classes,), or None."""
        try:
            problems = list(classifier_problems(self.root, self.header))
        except FormatError as error:
            problems = [("zarr.json", str(error))]
        for array, what in problems:
            raise CacheError(
                f"{self.path}: classifier/{array} {what}; repair it with: {command_line('repair', self.path)}"
            )
        if not is_there(self.root, "classifier/zarr.json") or not self.root["classifier"].attrs.get("written"):
            return None
        try:
            weight, bias = (np.asarray(self.root[f"classifier/{name}"][:]) for name in ("weight", "bias"))  # type: ignore[index]
        except (ValueError, RuntimeError) as error:
            raise CacheError(
                f"{self.path}: classifier is damaged ({error}); repair it with: {command_line('repair', self.path)}"
            ) from error
        if np.isnan(weight).any() or np.isnan(bias).any():
            raise CacheError(
                f"{self.path}: classifier holds no value; repair it with: {command_line('repair', self.path)}"
            )
        return weight, bias

    def search_identity(self, splits: tuple[str, ...], layers: tuple[str, ...]) -> dict[str, Any]:
        """Return the identity of these splits and layers, to which a study is bound."""
        whole = self.header.whole_identity()
        return {
            **whole,
            "layers": {name: whole["layers"].get(name, "held with every sample") for name in layers},  # or logits
            "splits": {name: dict(self.peek(name).images) for name in splits if name in self},
        }
