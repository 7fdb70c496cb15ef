"""Writing a cache: rows of a block first, then its mark, last the split's seal.

    arrays of block k ──▶ blocks[k] = 1 ──▶ … all blocks … ──▶ sealed + digest
          │                     │                                   │
    killed here: k is     killed here: k is done,          killed here: seals anew
    written again         the next block is next

A writer never reads rows back and never touches another block's chunks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import BitRound
from numpy.typing import NDArray

from nacpipe.cache.layout import ALL_BITS, Header, count_blocks, create_array, create_marks
from nacpipe.cache.read import open_root
from nacpipe.cache.seal import split_digest
from nacpipe.core.provenance import diff
from nacpipe.errors import CacheError, IdentityError


class CacheWriter:
    """A cache opened for writing. Opening one that exists checks that it was made from the same things."""

    def __init__(self, path: str | Path, header: Header, *, first: bool = True) -> None:
        """Open the cache at `path`, or create it.

        Args:
            path: where it is.
            header: what it is made from.
            first: False for a process that joins others: it creates nothing and tidies nothing up.

        Raises:
            IdentityError: it was made from something else; the message says what differs.
            FormatError: it is not a cache of a version that this nacpipe writes.
            CacheError: something else is there.
        """
        self.path = str(path)
        root = Path(self.path)
        if (root / "zarr.json").exists():
            self.root, self.header = open_root(self.path, mode="r+")
            check_identity(self.path, self.header, header)
            if first:
                _remove_partials(root, "**/*.partial")
        elif root.is_file() or any(not entry.match("zarr.*.partial") for entry in root.glob("*")):
            raise CacheError(f"{self.path} is there already and is not a cache; give another --cache")
        else:
            _remove_partials(root, "zarr.*.partial")  # of a root that was never finished
            self.root = zarr.create_group(self.path, zarr_format=3, attributes=header.to_attributes())
            self.header = header
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def write_classifier(self, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """Store the last linear layer: weight (classes, features), bias (classes,). Done once."""
        group = self.root.require_group("classifier")
        if group.attrs.get("written"):
            return
        for name, data in (("weight", weight), ("bias", bias)):
            group.create_array(
                name, data=np.asarray(data, np.float32), chunks=data.shape, fill_value=float("nan"), overwrite=True
            )
        group.attrs["written"] = True

    def prepare(self, name: str, rows: int, images: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Create what is missing of a split and return which of its blocks are done, (blocks,) bool."""
        group = self._group(name, {"rows": rows, "sealed": False, "digest": None, "images": dict(images)})
        if (found := group.attrs["rows"]) != rows:
            raise CacheError(f"{self.path}: {name} has {found} rows, not {rows}; drop it first with --force {name}")
        for path, (width, dtype) in self.header.arrays().items():
            if path not in group:
                if "/" in path:
                    group.require_group(path.split("/")[0])
                create_array(group, path, rows, width, dtype, self.header)
        if "blocks" not in group:  # last: marks of arrays that are not there would be lies
            create_marks(group, count_blocks(rows, self.header.block_rows))
        return np.asarray(group["blocks"][:], dtype=bool)  # type: ignore[index]

    def write_block(self, name: str, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one block of a split, or one shard's blocks: every array's rows (rows, …), then the marks.

        Args:
            name: the split.
            block: the block, or the first of a shard.
            arrays: everything of `Header.arrays`; activations, gradients and features are rounded to `keep_bits` here.
        """
        expected = self.header.arrays()
        if set(arrays) != set(expected):
            raise CacheError(f"{name}, block {block}: got arrays {sorted(arrays)}, expected {sorted(expected)}")
        start = block * self.header.block_rows
        count = self.header.shard_blocks
        for path, data in arrays.items():
            target = self._open(f"{name}/{path}")
            stop = min(start + count * self.header.block_rows, target.shape[0])
            expected_shape = (stop - start, *target.shape[1:])
            if data.shape != expected_shape:  # zarr would broadcast
                raise CacheError(f"{name}/{path}, block {block}: got shape {data.shape}, expected {expected_shape}")
            rounded = self.header.keep_bits < ALL_BITS and target.dtype.kind == "f" and path != "logits"
            target[start:stop] = round_mantissa(data, self.header.keep_bits) if rounded else data
        self._open(f"{name}/blocks")[block : block + count] = 1

    def seal(self, name: str) -> None:
        """Seal a split whose blocks are all marked.

        Raises:
            CacheError: some are not.
        """
        group = self.root[name]
        assert isinstance(group, zarr.Group)
        done = np.asarray(group["blocks"][:])  # type: ignore[index]
        if not done.all():
            raise CacheError(f"{self.path}: {name} has {int((done == 0).sum())} of {done.size} blocks to write")
        for path in self.header.arrays():
            array = self._open(f"{name}/{path}")
            if array.nchunks_initialized < array.nchunks:
                raise CacheError(
                    f"{self.path}: {name}/{path} lacks {array.nchunks - array.nchunks_initialized} of its chunks;"
                    f" extract the split again with --force {name}"
                )
        attributes = dict(group.attrs)
        # One write, where attrs.update makes one per key: killed in between, it would be sealed without a digest.
        group.update_attributes(
            {"sealed": True, "digest": split_digest(group, attributes, sharded=self.header.shard_blocks > 1)}
        )

    def drop(self, name: str) -> None:
        """Remove a split: first its seal, then its marks, then the rest; a half-removed one is never trusted."""
        if name not in self.root:
            return
        group = self.root[name]
        assert isinstance(group, zarr.Group)
        group.update_attributes({"sealed": False, "digest": None})
        if "blocks" in group:
            del group["blocks"]
        del self.root[name]
        self._arrays.clear()

    def _group(self, name: str, attributes: Mapping[str, Any]) -> zarr.Group:
        parent = self.root
        for part in name.split("/")[:-1]:
            parent = parent.require_group(part)
        leaf = name.split("/")[-1]
        if leaf in parent:
            group = parent[leaf]
            assert isinstance(group, zarr.Group)
            return group
        # A removal that was cut short may have left arrays of other rows below a group that is gone.
        return parent.create_group(leaf, attributes=dict(attributes), overwrite=True)

    def _open(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            with zarr.config.set({"array.write_empty_chunks": True}):
                array = self.root[path]
            assert isinstance(array, zarr.Array)
            self._arrays[path] = array
        return self._arrays[path]


def check_identity(path: str, stored: Header, wanted: Header) -> None:
    """Refuse to mix what does not belong together.

    Raises:
        IdentityError: naming every value that differs and what to do.
    """
    if differences := diff(stored.whole_identity(), wanted.whole_identity()):
        raise IdentityError(
            f"{path} was made from something else: {'; '.join(differences)}. Give another --cache, or the same options"
        )


def round_mantissa(values: NDArray[np.float32], keep_bits: int) -> NDArray[np.float32]:
    """Return float32 values rounded to `keep_bits` bits of mantissa, which compress better; zeros stay zeros."""
    encoded = BitRound(keepbits=keep_bits).encode(np.array(values, np.float32))
    return np.asarray(encoded).view(np.float32).reshape(values.shape)


def _remove_partials(path: Path, pattern: str) -> None:
    """Remove what a killed writer left between its temporary file and the rename."""
    for leftover in path.glob(pattern):
        with contextlib.suppress(OSError):
            leftover.unlink()
