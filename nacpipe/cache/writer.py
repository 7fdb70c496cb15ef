"""Writing a cache: rows of a block first, then its mark, last the split's seal.

    arrays of block k ──▶ blocks[k] = 1 ──▶ … all blocks … ──▶ sealed + digest
          │                     │                                   │
    killed here: k is     killed here: k is done,          killed here: seals anew
    written again         the next block is next

A writer does not read rows back and does not write another block's chunks. The arrays are on the disk (fsync) before
their mark is written, and the marks before the seal, so that a power cut does no more harm than a kill.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import BitRound
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from nacpipe.cache.address import holds_cache, is_empty, open_store
from nacpipe.cache.digest import split_digest
from nacpipe.cache.durability import sync_files, writing
from nacpipe.cache.identity import diff, said_by
from nacpipe.cache.keys import is_draft, list_own, remove_own
from nacpipe.cache.layout import (
    ALL_BITS,
    Header,
    check_split_name,
    chunk_key,
    count_blocks,
    create_array,
    create_marks,
    is_there,
)
from nacpipe.cache.reader import open_cache, open_root
from nacpipe.cache.validation import open_member, split_problems
from nacpipe.errors import CacheError, FormatError, IdentityError
from nacpipe.files import is_url
from nacpipe.text import command_line


class CacheWriter:
    """A cache opened for writing. Opening one that exists checks that it was made from the same things."""

    def __init__(self, path: str | Path, header: Header, *, first: bool = True) -> None:
        """Open the cache at `path`, or create it.

        Args:
            path: where it is.
            header: what it is made from.
            first: False for a process that joins others: it creates nothing and removes no leftovers.

        Raises:
            IdentityError: it was made from something else; the message says what differs.
            FormatError: it is not a cache of a version that this nacpipe writes.
            CacheError: something else is there, or nothing can be written there.
        """
        self.path = str(path)
        self._disk = None if is_url(self.path) else Path(self.path)
        with writing(self.path):
            self._open_root(header, first)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def _open_root(self, header: Header, first: bool) -> None:
        if holds_cache(self.path):
            self.root, self.header = open_root(self.path, mode="r+")
            check_identity(self.path, self.header, header)
            if first and self._disk:
                remove_drafts(self._disk)
        elif self._is_taken():
            raise CacheError(f"{self.path} is there already and is not a cache; give another --cache")
        else:
            if self._disk:
                remove_drafts(self._disk)  # of a root that was never finished
            store = open_store(self.path, write=True)
            self.root = zarr.create_group(store, zarr_format=3, attributes=header.to_attributes())
            self.header = header
            self._sync("zarr.json")

    def _is_taken(self) -> bool:
        if self._disk is None:
            return not is_empty(self.path)
        return self._disk.is_file() or any(not is_draft(entry.name) for entry in self._disk.glob("*"))

    def _sync(self, *keys: str) -> None:
        """Wait until these objects are on the disk; a server has them when it says so."""
        if self._disk:
            sync_files([self._disk / key for key in keys], self._disk)

    def _sync_below(self, path: str) -> None:
        if self._disk:
            self._sync(*list_own(self.root.store, self.header, path))

    def write_classifier(self, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """Store the last linear layer: weight (classes, features), bias (classes,). Done once."""
        with writing(self.path):
            if self._holds("classifier"):
                self._member("classifier")  # or refused
            group = self.root.require_group("classifier")
            if group.attrs.get("written"):
                return
            for name in ("weight", "bias"):
                self._remove(f"classifier/{name}")
            for name, data in (("weight", weight), ("bias", bias)):
                group.create_array(
                    name,
                    data=np.asarray(data, np.float32),
                    chunks=data.shape,
                    compressors=(Crc32cCodec(),),
                    fill_value=float("nan"),
                    config={"write_empty_chunks": True},
                )
            self._sync_below("classifier")
            group.attrs["written"] = True

    def prepare(self, name: str, rows: int, images: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Create what is missing of a split and return which of its blocks are done, (blocks,) bool.

        Raises:
            CacheError: it was begun with other rows or images.
            InputError: the name of its set is reserved.
        """
        check_split_name(name)
        with writing(self.path):
            group = self._group(name, {"rows": rows, "sealed": False, "digest": None, "images": dict(images)})
            for what, wanted in (("rows", rows), ("images", images)):
                if (stored := group.attrs.get(what)) != wanted:
                    raise CacheError(
                        f"{self.path}: {name} has {stored} {what}, not {wanted}; drop it first with --redo"
                        f" {shlex.quote(name)}"
                    )
            missing = [path for path in self.header.arrays() if not self._holds(f"{name}/{path}")]
            if missing:
                self._remove(f"{name}/blocks")  # a mark says that all arrays of its block are written
            for path in missing:
                if "/" in path:
                    group.require_group(path.split("/")[0])
                self._remove(f"{name}/{path}")
                create_array(group, path, rows, *self.header.arrays()[path], self.header)
            if not self._holds(f"{name}/blocks"):
                self._remove(f"{name}/blocks")
                create_marks(group, count_blocks(rows, self.header.block_rows))
            for array, what in split_problems(group, self.header):
                raise FormatError(
                    f"{self.path}: {name}/{array} {what}; mend it with: {command_line('repair', self.path)}"
                )
            if missing:
                self._sync_below(name)
        return open_cache(self.path).peek(name).marks()

    def write_block(self, name: str, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one block of a split, or one shard's blocks: every array's rows (rows, …), then the marks.

        Args:
            name: the split.
            block: the block, or the first of a shard.
            arrays: everything of `Header.arrays`; activations, gradients, features are rounded to `mantissa_bits` here.
        """
        expected = self.header.arrays()
        if set(arrays) != set(expected):
            raise CacheError(f"{name}, block {block}: got arrays {sorted(arrays)}, expected {sorted(expected)}")
        with writing(self.path):
            self._write_block(name, block, arrays)

    def _write_block(self, name: str, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._check_there()
        start = block * self.header.block_rows
        count = self.header.shard_blocks
        written = []
        for path, data in arrays.items():
            target = self._open(f"{name}/{path}")
            stop = min(start + count * self.header.block_rows, target.shape[0])
            expected_shape = (stop - start, *target.shape[1:])
            if data.shape != expected_shape:  # zarr would broadcast
                raise CacheError(f"{name}/{path}, block {block}: got shape {data.shape}, expected {expected_shape}")
            rounded = self.header.mantissa_bits < ALL_BITS and target.dtype.kind == "f" and path != "logits"
            target[start:stop] = round_mantissa(data, self.header.mantissa_bits) if rounded else data
            written.append(chunk_key(target, block, self.header))
        self._check_there()  # or zarr would have made the folders of a store that is gone anew, for these rows alone
        self._sync(*written)
        self._open(f"{name}/blocks")[block : block + count] = 1

    def _check_there(self) -> None:
        if self._disk and not (self._disk / "zarr.json").exists():  # a server has no folders to be made anew
            raise CacheError(f"{self.path} is gone: it was moved, removed or unmounted while it was written")

    def seal(self, name: str) -> None:
        """Seal a split whose blocks are all marked.

        Raises:
            CacheError: some are not.
        """
        with writing(self.path):
            self._check_there()
            self._seal(name)

    def _seal(self, name: str) -> None:
        group = self._member(name)
        assert isinstance(group, zarr.Group)
        done = open_cache(self.path).peek(name).marks()
        if not done.all():
            raise CacheError(f"{self.path}: {name} has {int((~done).sum())} of {done.size} blocks to write")
        for path in self.header.arrays():
            array = self._open(f"{name}/{path}")
            if array.nchunks_initialized < array.nchunks:
                raise CacheError(
                    f"{self.path}: {name}/{path} lacks {array.nchunks - array.nchunks_initialized} of its chunks;"
                    f" mend it with: {command_line('repair', self.path)}"
                )
        self._sync_below(name)
        attributes = dict(group.attrs)
        # One write, where attrs.update makes one per key: killed in between, it would be sealed without a digest.
        group.update_attributes({"sealed": True, "digest": split_digest(self.root, name, attributes, self.header)})
        self._sync(f"{name}/zarr.json")

    def drop(self, name: str) -> None:
        """Remove a split: first its seal, then its marks, then its arrays, so that a half-removed one is not used."""
        if not self._holds(name):
            return
        with writing(self.path):
            group = self._member(name)
            assert isinstance(group, zarr.Group)
            group.update_attributes({"sealed": False, "digest": None})
            self._remove(name)
        self._arrays.clear()

    def _remove(self, path: str) -> None:
        """Remove the cache's objects below a path, whatever state its metadata are in; what is foreign stays."""
        remove_own(self.root.store, self.header, path)

    def _group(self, name: str, attributes: Mapping[str, Any]) -> zarr.Group:
        parent = self.root
        for depth, part in enumerate(name.split("/")[:-1], start=1):
            if self._holds(path := "/".join(name.split("/")[:depth])):
                self._member(path)  # or refused
            parent = parent.require_group(part)
        if self._holds(name):
            group = self._member(name)
            assert isinstance(group, zarr.Group)
            return group
        self._remove(name)  # a removal that was cut short may have left arrays of other rows below a group that is gone
        return parent.create_group(name.split("/")[-1], attributes=dict(attributes))

    def _holds(self, path: str) -> bool:
        return is_there(self.root, f"{path}/zarr.json")

    def _member(self, path: str) -> zarr.Group | zarr.Array[Any]:
        try:
            return open_member(self.root, path)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}; mend it with: {command_line('repair', self.path)}") from error

    def _open(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            with zarr.config.set({"array.write_empty_chunks": True}):
                array = self._member(path)
            assert isinstance(array, zarr.Array)
            self._arrays[path] = array
        return self._arrays[path]


def check_identity(path: str, stored: Header, wanted: Header) -> None:
    """Refuse a cache that was made from something else; fields that an older cache lacks are not compared.

    Raises:
        IdentityError: naming every value that differs and what to do.
    """
    identity = stored.whole_identity()
    if differences := diff(identity, said_by(identity, wanted.whole_identity())):
        raise IdentityError(
            f"{path} was made from something else: {'; '.join(differences)}. Give another --cache, or"
            f" {_remedy(identity, differences)}"
        )


def _remedy(stored: Mapping[str, Any], differences: Sequence[str]) -> str:
    """Return the options that make an identity equal to the stored one."""
    differ = {phrase.split(":")[0] for phrase in differences}
    arithmetic = stored.get("arithmetic", {})
    known = {
        "arithmetic.device": f"--device {shlex.quote(str(arithmetic.get('device')))}",
        "arithmetic.memory_format": f"--{str(arithmetic.get('memory_format')).replace('_', '-')}",
        "arithmetic.tf32": f"TF32 (torch.backends, in the network's file) {'on' if arithmetic.get('tf32') else 'off'}",
        "source": "the network's file, and what it imports from its folder, as they were",
    }
    if "arithmetic.device" in differ:
        differ.discard("arithmetic.memory_format")  # it follows the device
    remedies = [text for key, text in known.items() if key in differ]
    return ", ".join(remedies + ["the same options"] * bool(differ.difference(known)))


def round_mantissa(values: NDArray[np.float32], mantissa_bits: int) -> NDArray[np.float32]:
    """Return float32 values rounded to `mantissa_bits` bits of mantissa, which compress better; zeros stay zeros."""
    encoded = BitRound(keepbits=mantissa_bits).encode(np.array(values, np.float32))
    return np.asarray(encoded).view(np.float32).reshape(values.shape)


def remove_drafts(path: Path) -> None:
    """Remove what a killed writer left between its temporary file and the rename."""
    for leftover in path.rglob("*.partial"):
        if is_draft(leftover.name):
            with contextlib.suppress(OSError):
                leftover.unlink()
