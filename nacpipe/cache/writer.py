"""Writing a cache: first the rows of a block, then its mark, last the split's seal.

    arrays of block k ──▶ blocks[k] = 1 ──▶ … all blocks … ──▶ sealed + digest
          │                     │                                   │
    killed here: k is     killed here: k is done,          killed here: seals again
    written again         the next block is next

A writer never reads rows and never writes another block's chunks. Before a mark or a seal is written, its
rows are on the disk (fsync), so that a power cut has the effect of a kill.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import BitRound
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from nacpipe.cache.address import Objects, holds_cache, is_empty, open_store
from nacpipe.cache.consolidated import consolidate
from nacpipe.cache.digest import split_digest
from nacpipe.cache.durability import sync_files, writing
from nacpipe.cache.identity import comparable_fields, diff, stored_precision
from nacpipe.cache.keys import is_draft, is_own_draft, list_own, own_keys, remove_own
from nacpipe.cache.layout import (
    ALL_BITS,
    Header,
    check_split_name,
    chunk_key,
    chunk_key_encoding,
    count_blocks,
    create_array,
    create_marks,
    is_there,
    is_whole,
)
from nacpipe.cache.options import FROM_PYTHON
from nacpipe.cache.reader import open_cache, open_root
from nacpipe.cache.validation import open_member, split_problems
from nacpipe.errors import CacheError, FormatError, IdentityError
from nacpipe.files import is_url
from nacpipe.text import command_line, spell_option

WRITERS = 8  # arrays that are written at once: their compression and their fsync overlap


class CacheWriter:
    """A cache opened for writing. Opening an existing one checks its identity."""

    def __init__(self, path: str | Path, header: Header, *, first: bool = True) -> None:
        """Open the cache at `path`, or create it.

        Args:
            path: the cache's path or URL.
            header: the root's attributes, with the identity that must match.
            first: False for all but the first of several processes: such a process creates and removes nothing.

        Raises:
            IdentityError: the cache has another identity; the message names the differences.
            FormatError: it is not a cache of a version that this nacpipe writes.
            CacheError: the path exists and is not a cache, or cannot be written; or what the first process made is not
                there for another.
        """
        self.path = str(path)
        self._disk = None if is_url(self.path) else Path(self.path)
        with writing(self.path):
            self._open_root(header, first)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._pool = ThreadPoolExecutor(WRITERS)
        self._opening = threading.Lock()  # Zarr's configuration is the process's

    def _open_root(self, header: Header, first: bool) -> None:
        if holds_cache(self.path):
            self.root, self.header = open_root(self.path, mode="r+")
            check_identity(self.path, self.header, header)
            if first and self._disk:
                remove_drafts(self._disk, self.header)
            if first:
                consolidate(self.root, self.header, self.path)  # after a crash before that
        elif not first:
            raise CacheError(
                f"{self.path}: the first process made it, and it is not there for this one; several machines need a"
                " folder that all of them share, or s3://BUCKET/x.zarr"
            )
        elif self._is_taken():
            raise CacheError(f"{self.path} is there already and is not a cache; give another --cache")
        else:
            if self._disk:
                remove_drafts(self._disk, header)  # of an interrupted creation of the root
            store = open_store(self.path, write=True)
            self.root = zarr.create_group(store, zarr_format=3, attributes=header.to_attributes())
            self.header = header
            self._sync("zarr.json")

    def _is_taken(self) -> bool:
        if self._disk is None:
            return not is_empty(self.path)
        return self._disk.is_file() or any(not is_draft(entry.name) for entry in self._disk.glob("*"))

    def _sync(self, *keys: str) -> None:
        """Wait until these objects, and every folder above them, are on the disk; a server confirms each write."""
        if self._disk:
            sync_files([self._disk / key for key in keys], self._disk)

    def _sync_chunk(self, key: str) -> None:
        """Wait until a chunk is on the disk, and in version 2 its entry in the array's folder.

        The folders above that one have been synced by `prepare`.
        """
        if self._disk:
            file = self._disk / key
            sync_files([file], self._disk if self.header.version == 1 else file.parent)

    def _sync_below(self, path: str) -> None:
        if self._disk:
            self._sync(*list_own(self.root.store, self.header, path))

    def _sync_metadata(self, name: str) -> None:
        """Wait until the metadata of a split's groups and arrays, and the folders above them, are on the disk."""
        inside = [*self.header.groups(), *self.header.arrays(), "blocks"]
        self._sync(f"{name}/zarr.json", *(f"{name}/{path}/zarr.json" for path in inside))

    def write_classifier(self, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """Store the last linear layer, once: weight (classes, features), bias (classes,)."""
        with writing(self.path):
            if self._holds("classifier"):
                self._member("classifier")  # refuses damaged metadata
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
                    chunk_key_encoding=chunk_key_encoding(self.header),
                    dimension_names=None if self.header.version == 1 else ("class", "feature")[: data.ndim],
                    config={"write_empty_chunks": True},
                )
            self._sync_below("classifier")
            group.attrs["written"] = True
            self._sync("classifier/zarr.json")
            consolidate(self.root, self.header, self.path)

    def add_information(self, values: Mapping[str, Any]) -> None:
        """Add values to the root's information, which is never compared; not while a split is sealed."""
        with writing(self.path):
            objects = Objects(self.path)
            content = json.loads(objects.read("zarr.json") or b"{}")
            header = replace(self.header, information={**self.header.information, **values})
            content["attributes"] = header.to_attributes()
            objects.replace("zarr.json", json.dumps(content, separators=(",", ":")).encode())
            self.header = header

    def prepare(
        self,
        name: str,
        rows: int,
        images: Mapping[str, Any],
        *,
        label: NDArray[np.int64] | None = None,
        index: NDArray[np.int64] | None = None,
    ) -> NDArray[np.bool_]:
        """Create the missing arrays of a split and return which of its blocks are written, (blocks,) bool.

        Args:
            name: the split.
            rows: its samples.
            images: the attribute `images`.
            label: (rows,), where all labels are known before the split is run: they are written here, once, and not
                with every block. None: each block brings its own.
            index: (rows,), likewise.

        Raises:
            CacheError: the split exists with other rows or images.
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
            known = {"label": label, "index": index} if self.header.version > 1 else {}
            missing = [path for path in self.header.arrays() if not self._holds(f"{name}/{path}")]
            if missing:
                self._remove(f"{name}/blocks")  # marks must not outlive their arrays
                self._arrays.clear()
            for path in self.header.groups():
                if not self._holds(f"{name}/{path}"):
                    group.require_group(path)
            for path in missing:
                self._remove(f"{name}/{path}")
                whole = known.get(path) is not None
                create_array(group, path, rows, *self.header.arrays()[path], self.header, whole=whole)
            for path, values in known.items():
                self._write_whole(name, path, values, sealed=bool(group.attrs.get("sealed")))
            if not self._holds(f"{name}/blocks"):
                self._remove(f"{name}/blocks")
                create_marks(group, count_blocks(rows, self.header.block_rows), self.header)
            for array, what in split_problems(group, self.header):
                raise FormatError(
                    f"{self.path}: {name}/{array} {what}; repair it with: {command_line('repair', self.path)}"
                )
            if not group.attrs.get("sealed"):  # also what a killed run had created and not synced
                self._sync_metadata(name)
        return open_cache(self.path).peek(name).marks()

    def _write_whole(self, name: str, path: str, values: NDArray[np.int64] | None, *, sealed: bool) -> None:
        """Write all rows of an array whose chunks hold many blocks.

        Until the split is sealed they are written by every run: a chunk that is there may be torn by a power cut.
        """
        array = self._open(f"{name}/{path}")
        if not is_whole(array, self.header):
            return
        if (values is None or sealed) and array.nchunks_initialized == array.nchunks:
            return
        if values is None:
            raise CacheError(f"{self.path}: {name}/{path} is to be written, and its values are not given")
        if values.shape != array.shape:
            raise CacheError(f"{name}/{path}: got shape {values.shape}, expected {array.shape}")
        array[:] = values
        self._sync_below(f"{name}/{path}")

    def write_block(self, name: str, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one block of a split, or one shard's blocks: every array's rows (rows, …), then the marks.

        Several threads may write blocks at once, each its own (of a sharded cache, its own shard).

        Args:
            name: the split.
            block: the block, or the first of a shard.
            arrays: all of `Header.arrays`; activations, gradients and features are rounded to `mantissa_bits` here.
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
        targets = {path: self._open(f"{name}/{path}") for path in arrays}
        for path, data in arrays.items():
            stop = min(start + count * self.header.block_rows, targets[path].shape[0])
            expected_shape = (stop - start, *targets[path].shape[1:])
            if data.shape != expected_shape:  # zarr would broadcast
                raise CacheError(f"{name}/{path}, block {block}: got shape {data.shape}, expected {expected_shape}")
        tasks = [self._pool.submit(self._write_rows, targets[path], path, block, data) for path, data in arrays.items()]
        wait(tasks)  # also after an error: nothing is written any more when this returns
        for task in tasks:
            task.result()
        self._check_there()  # Zarr would have created the folders of a removed store again, with these rows alone
        self._open(f"{name}/blocks")[block : block + count] = 1

    def _write_rows(self, array: zarr.Array[Any], path: str, block: int, data: NDArray[Any]) -> None:
        """Write a block's rows of one array, or a shard's; they are on the disk when this returns."""
        if is_whole(array, self.header):
            return
        start = block * self.header.block_rows
        rounded = self.header.mantissa_bits < ALL_BITS and array.dtype.kind == "f" and path != "logits"
        array[start : start + len(data)] = round_mantissa(data, self.header.mantissa_bits) if rounded else data
        self._sync_chunk(chunk_key(array, block, self.header))

    def _check_there(self) -> None:
        if self._disk and not (self._disk / "zarr.json").exists():  # only on a disk does Zarr create folders
            raise CacheError(
                f"{self.path} does not exist any more: it was moved, removed or unmounted while it was written"
            )

    def seal(self, name: str) -> None:
        """Seal a split whose blocks are all marked.

        Raises:
            CacheError: a block is not marked, or a chunk is missing.
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
                    f" repair it with: {command_line('repair', self.path)}"
                )
        self._sync_below(name)
        attributes = dict(group.attrs)
        # One write; attrs.update would write each key, and a kill in between would leave a seal without a digest.
        group.update_attributes({"sealed": True, "digest": split_digest(self.root, name, attributes, self.header)})
        self._sync(f"{name}/zarr.json")
        consolidate(self.root, self.header, self.path)

    def renew_copy(self) -> None:
        """Renew the consolidated metadata, after the last of several processes.

        Each renews them when it seals; of two that seal different splits at once, the later may lack the other's.
        """
        with writing(self.path):
            consolidate(self.root, self.header, self.path)

    def drop(self, name: str) -> None:
        """Remove a split: first its seal, then its marks, then its arrays. A reader never uses a partly removed one.

        The consolidated metadata lose it with its seal.
        """
        if not self._holds(name):
            return
        with writing(self.path):
            group = self._member(name)
            assert isinstance(group, zarr.Group)
            group.update_attributes({"sealed": False, "digest": None})
            consolidate(self.root, self.header, self.path)  # before a reader of the copy meets what is left
            self._remove(name)
        self._arrays.clear()

    def _remove(self, path: str) -> None:
        """Remove the cache's objects below a path, also with damaged metadata; foreign objects stay."""
        remove_own(self.root.store, self.header, path)

    def _group(self, name: str, attributes: Mapping[str, Any]) -> zarr.Group:
        parent = self.root
        for depth, part in enumerate(name.split("/")[:-1], start=1):
            if self._holds(path := "/".join(name.split("/")[:depth])):
                self._member(path)  # refuses damaged metadata
            parent = parent.require_group(part)
        if self._holds(name):
            group = self._member(name)
            assert isinstance(group, zarr.Group)
            return group
        self._remove(name)  # an interrupted removal may have left arrays below a removed group
        return parent.create_group(name.split("/")[-1], attributes=dict(attributes))

    def _holds(self, path: str) -> bool:
        return is_there(self.root, f"{path}/zarr.json")

    def _member(self, path: str) -> zarr.Group | zarr.Array[Any]:
        try:
            return open_member(self.root, path)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}; repair it with: {command_line('repair', self.path)}") from error

    def _open(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            with self._opening, zarr.config.set({"array.write_empty_chunks": True}):
                array = self._member(path)
            assert isinstance(array, zarr.Array)
            self._arrays[path] = array
        return self._arrays[path]


def check_identity(path: str, stored: Header, wanted: Header) -> None:
    """Refuse to continue a cache with another identity; optional fields that it lacks are not compared.

    Raises:
        IdentityError: naming every value that differs and what to do.
    """
    stored_identity = stored.whole_identity()
    if differences := diff(stored_identity, comparable_fields(stored_identity, wanted.whole_identity())):
        python = wanted.information.get("written_by") == FROM_PYTHON
        raise IdentityError(
            f"{path} was made from something else: {'; '.join(differences)}. Give another"
            f" {'path' if python else '--cache'}, or {_remedy(stored_identity, differences, python)}"
        )


def _remedy(stored: Mapping[str, Any], differences: Sequence[str], python: bool) -> str:
    """Return the options that restore the stored identity."""
    differ = {phrase.split(":")[0] for phrase in differences}
    arithmetic = stored.get("arithmetic", {})
    known = {
        "arithmetic.device": spell_option("device", str(arithmetic.get("device")), python=python),
        **dict.fromkeys(
            ("dtype", "arithmetic.tf32"), spell_option("precision", stored_precision(stored), python=python)
        ),
        "decoder": spell_option("decoder", str(stored.get("decoder", "pillow")), python=python),
        "source": "the network's file, and what it imports from its folder, as they were",
    }
    if differ & {"arithmetic.device", "arithmetic.tf32", "dtype"}:
        differ.discard("arithmetic.memory_format")  # which follows from them
    options = list(dict.fromkeys(text for key, text in known.items() if key in differ))
    same = "the same network, layers and options" if python else "the same options"
    return ", ".join(options + [same] * bool(differ.difference(known)))


def round_mantissa(values: NDArray[np.float32], mantissa_bits: int) -> NDArray[np.float32]:
    """Return float32 values rounded to `mantissa_bits` bits of mantissa, for better compression; zeros stay zeros."""
    encoded = BitRound(keepbits=mantissa_bits).encode(np.array(values, np.float32))
    return np.asarray(encoded).view(np.float32).reshape(values.shape)


def remove_drafts(path: Path, header: Header) -> None:
    """Remove the partial files of a killed writer; those in folders that are not the cache's are somebody else's."""
    own = own_keys(header)
    for leftover in path.rglob("*.partial"):
        if is_own_draft(leftover.relative_to(path).as_posix(), own):
            with contextlib.suppress(OSError):
                leftover.unlink()
