"""Names, shapes, chunks and codecs of the format (cache/README.md).

block 0                    block 1                    last block
├── block_rows rows ──┤    ├── block_rows rows ──┤    ├─ remainder ┤
one chunk per array and block; blocks[i] = 1 once every array of block i is written

Version 2 keeps layers below `layers/` and a chunk as one file beside its array's zarr.json (`c.7.0`). Version 1 has
layers beside `logits` and a folder for each chunk (`c/7/0`); such a cache is read, and finished as it was begun.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.sync import sync

from nacpipe.cache.identity import fingerprint
from nacpipe.errors import FormatError, InputError
from nacpipe.method.term import layer_of
from nacpipe.text import why_reserved

FORMAT_VERSION = 2
VERSIONS = (1, 2)
BLOCK_ROWS = 512
ALL_BITS = 23  # of a float32's mantissa

# Never a legal value: Zarr reads a missing chunk as the fill value, which must not be mistaken for data.
MISSING_INT = np.iinfo(np.int64).min

MAX_CHUNK_BYTES = 2**31 - 1  # Blosc's limit; it also bounds the memory that a crafted header can request
LIMITS = {  # smallest and largest values of the root's integers
    "block_rows": (1, 2**20),
    "classes": (1, 2**24),
    "features": (0, 2**24),
    "mantissa_bits": (1, ALL_BITS),
    "shard_blocks": (1, 2**16),
}
STORED_AS = {"mantissa_bits": "keep_bits"}  # names in version 1 that differ
LAYERS = "layers"  # the group of a split's layers
WHOLE = ("label", "index")  # known before a split is run: a chunk of theirs can hold many blocks
WHOLE_ROWS = 2**20  # at most, of such a chunk
POOLINGS = (
    *("sum-nchw", "sum-nhwc", "sum-ncdhw", "sum-ndhwc", "sum-ncl", "sum-tokens", "sum-lnc", "class-token", "none"),
)
SPLIT_PARENTS = ("id", "csid", "ood/near", "ood/far")
RESERVED = ("logits",)  # the name of the terms of the logits themselves
_LAYER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One tapped layer."""

    name: str
    """The name in the cache: avgpool, layer3, …"""
    path: str
    """The module's path inside the network."""
    pooling: str
    """How the output becomes one number per neuron: one of `POOLINGS`."""
    neurons: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The root's attributes."""

    identity: Mapping[str, Any]
    """The fields that must match: benchmark, architecture, family, weights' sha256, transform, dtype, …"""
    information: Mapping[str, Any]
    """Versions, device, dates, and `options` (`options.ExtractOptions`): shown, never compared."""
    block_rows: int
    """Rows of a block: the unit of writing, of resuming and of repair."""
    layers: tuple[LayerSpec, ...]
    classes: int
    """Width of `logits`."""
    features: int
    """Width of `features`, the input of the last linear layer; 0 if the network has none."""
    mantissa_bits: int = ALL_BITS
    """Bits of mantissa of activations, gradients and features; 23: not rounded."""
    shard_blocks: int = 1
    """Blocks in one stored object; a shard has one writer."""
    gradients: bool = True
    """Whether layers have gradients; False: written by forward passes alone."""
    version: int = FORMAT_VERSION
    """The format's version."""

    def whole_identity(self) -> dict[str, Any]:
        """Return the identity with layers and precision: all root attributes that must match.

        It does not depend on the version: parameters of a cache are those of its converted copy. `keep_bits` is the
        name that studies and parameters know.
        """
        layers = {spec.name: {"path": spec.path, "pooling": spec.pooling} for spec in self.layers}
        gradients = {} if self.gradients else {"gradients": False}
        return {**self.identity, "layers": layers, "keep_bits": self.mantissa_bits, **gradients}

    def layer(self, name: str) -> LayerSpec:
        """Return the layer of that name.

        Raises:
            InputError: the cache does not contain it.
        """
        for spec in self.layers:
            if spec.name == name:
                return spec
        raise InputError(f"layer {name!r} is not in this cache; it holds {', '.join(s.name for s in self.layers)}")

    def layer_path(self, name: str) -> str:
        """Return the path, from a split, of the group of a layer."""
        return name if self.version == 1 else f"{LAYERS}/{name}"

    def layer_array(self, name: str, what: str) -> str:
        """Return the path, from a split, of a layer's `activation` or `gradient`."""
        return f"{self.layer_path(name)}/{what}"

    def groups(self) -> list[str]:
        """Return the paths, from a split, of the groups in it."""
        return ([] if self.version == 1 else [LAYERS]) + [self.layer_path(spec.name) for spec in self.layers]

    def arrays(self) -> dict[str, tuple[int, str]]:
        """Return a split's arrays except `blocks`: path in the split → (width, dtype); width 0: one-dimensional."""
        states = ("activation", "gradient") if self.gradients else ("activation",)
        arrays = {self.layer_array(s.name, what): (s.neurons, "float32") for s in self.layers for what in states}
        if self.features:
            arrays["features"] = (self.features, "float32")
        return {**arrays, "logits": (self.classes, "float32"), "label": (0, "int64"), "index": (0, "int64")}

    @property
    def most_block_rows(self) -> int:
        """The largest number of rows of a block: a chunk of the widest array has a limit."""
        return min(MAX_CHUNK_BYTES // size for size in self._row_sizes().values())

    def block_problem(self) -> str | None:
        """Return why a block cannot be stored, or None if it can."""
        for path, size in self._row_sizes().items():
            if self.block_rows * size > MAX_CHUNK_BYTES:
                return f"a block of {path} has more than {MAX_CHUNK_BYTES} bytes"
        return None

    def _row_sizes(self) -> dict[str, int]:
        """Return array → raw bytes of one sample."""
        return {path: max(width, 1) * np.dtype(dtype).itemsize for path, (width, dtype) in self.arrays().items()}

    def row_bytes(self) -> int:
        """Return the raw bytes of one sample."""
        return sum(self._row_sizes().values())

    def to_attributes(self) -> dict[str, Any]:
        """Return the root's attributes and, last, their digest, which shows changes when they are read."""
        attributes = {
            "nacpipe_format": self.version,
            "identity": dict(self.identity),
            "information": dict(self.information),
            "block_rows": self.block_rows,
            "layers": [
                {"name": s.name, "path": s.path, "pooling": s.pooling, "neurons": s.neurons} for s in self.layers
            ],
            "classes": self.classes,
            "features": self.features,
            "keep_bits" if self.version == 1 else "mantissa_bits": self.mantissa_bits,
            "shard_blocks": self.shard_blocks,
            **({} if self.version == 1 else {"gradients": self.gradients}),
        }
        return {**attributes, "digest": fingerprint(attributes)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Header:
        """Read the root's attributes.

        Raises:
            FormatError: they are not a cache's, are damaged, or have a version that this nacpipe does not know.
        """
        version = attributes.get("nacpipe_format")
        if version is None:
            raise FormatError("this Zarr group is not a nacpipe cache (it has no nacpipe_format)")
        if isinstance(version, bool) or version not in VERSIONS:
            raise FormatError(
                f"this cache has format version {version}, this nacpipe reads versions {', '.join(map(str, VERSIONS))};"
                " use the nacpipe that wrote it, or extract again into another --cache"
            )
        digest = attributes.get("digest")  # caches of the first versions have none
        if digest is not None and digest != fingerprint({k: v for k, v in attributes.items() if k != "digest"}):
            raise FormatError("the cache's attributes are damaged (they do not match their digest)")
        try:
            header = cls(
                identity={**attributes["identity"]},
                information={**attributes["information"]},
                layers=tuple(_layer(**layer) for layer in attributes["layers"]),
                gradients=_truth("gradients", True if version == 1 else attributes["gradients"]),
                version=version,
                **_numbers(attributes, version),
            )
            (_check_old_names if version == 1 else check_layer_names)([spec.name for spec in header.layers])
            if not header.layers or len({spec.name for spec in header.layers}) < len(header.layers):
                raise ValueError("layers are none, or two have one name")
            if problem := header.block_problem():
                raise ValueError(problem)
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise FormatError(f"the cache's attributes are damaged ({type(error).__name__}: {error})") from error
        return header


def _numbers(attributes: Mapping[str, Any], version: int) -> dict[str, int]:
    """Return the root's integers by their field names."""
    stored = {name: STORED_AS.get(name, name) if version == 1 else name for name in LIMITS}
    return {name: _whole(key, attributes[key], *LIMITS[name]) for name, key in stored.items()}


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:40]}, not a whole number from {low} to {high}")
    return value


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {str(value)[:40]}, neither true nor false")
    return value


def _layer(name: Any, path: Any, pooling: Any, neurons: Any) -> LayerSpec:
    if not (isinstance(name, str) and isinstance(path, str)) or pooling not in POOLINGS:
        raise ValueError(f"layer {str(name)[:40]!r} needs a name, a path and a pooling of {', '.join(POOLINGS)}")
    return LayerSpec(name=name, path=path, pooling=pooling, neurons=_whole("neurons", neurons, 1, 2**24))


def check_layer_names(names: list[str]) -> None:
    """Refuse layer names that cannot be a folder's name everywhere, or that the terms of the logits have.

    Raises:
        InputError: naming the layer, and how to give it another name.
    """
    for name in names:
        if problem := layer_name_problem(name):
            raise InputError(
                f"layer name {name!r} {problem}; give it another: --layers {shlex.quote(f'{free_name(name)}={name}')}"
            )


def layer_name_problem(name: str) -> str | None:
    """Return why a layer cannot have this name, or None if it can."""
    if name in RESERVED:
        return "is that of the network's output"
    return None if _LAYER_NAME.fullmatch(name) else "has other characters than letters, digits, _ . and -"


def _check_old_names(names: list[str]) -> None:
    """Refuse names that collide with a split's own arrays: in version 1 a layer lies beside them.

    Raises:
        InputError: naming the layer.
    """
    for name in names:
        if name in ("blocks", "features", "logits", "label", "index", "classifier") or name.startswith("."):
            raise InputError(f"layer name {name!r} cannot be used in a cache of version 1")
        if not name or "/" in name or layer_of(name) != name:
            raise InputError(f"layer name {name!r} cannot be used in a cache")


def free_name(name: str) -> str:
    """Return an allowed name for a layer: logits → logits_layer."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".") + "_layer"


def count_blocks(rows: int, block_rows: int) -> int:
    """Return how many blocks hold this many rows."""
    return -(-rows // block_rows)


def create_array(
    group: zarr.Group, path: str, rows: int, width: int, dtype: str, header: Header, *, whole: bool = False
) -> zarr.Array[Any]:
    """Create one array of a split: chunks of (block_rows, width), Blosc zstd with bit shuffle, CRC32C on each.

    No object of the array may exist, because chunks from an incomplete removal would become valid (`keys.remove_own`).

    Args:
        group: the split.
        path: the array's path in it.
        rows: samples.
        width: numbers of a sample; 0: the array is one-dimensional.
        dtype: of the numbers.
        header: the cache's.
        whole: the values of all rows are written at once, in chunks of many blocks.
    """
    kind = np.dtype(dtype)
    whole = whole and rows > header.block_rows  # one block has every form
    outer = 1 if whole else header.shard_blocks
    chunk = (whole_chunk_rows(rows, header) if whole else header.block_rows, *((width,) if width else ()))
    shard = (header.block_rows * outer, *chunk[1:]) if outer > 1 else None
    return group.create_array(
        path,
        shape=(rows, width) if width else (rows,),
        chunks=chunk,
        shards=shard,
        dtype=dtype,
        serializer=BytesCodec(endian="little"),
        compressors=(
            BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=kind.itemsize),
            Crc32cCodec(),
        ),
        fill_value=float("nan") if kind.kind == "f" else MISSING_INT,
        chunk_key_encoding=chunk_key_encoding(header),
        dimension_names=_dimension_names(path, width, header),
        config={"write_empty_chunks": True},
    )


def create_marks(group: zarr.Group, blocks: int, header: Header) -> zarr.Array[Any]:
    """Create `blocks`, with one chunk per mark, so that two writers never write the same file; see `create_array`."""
    return group.create_array(
        "blocks",
        shape=(blocks,),
        chunks=(1,),
        dtype="uint8",
        serializer=BytesCodec(endian="little"),
        compressors=(Crc32cCodec(),),
        fill_value=0,
        chunk_key_encoding=chunk_key_encoding(header),
        dimension_names=("block",),
    )


def chunk_key_encoding(header: Header) -> Any:
    """Return Zarr's name for how the keys of chunks are made: c/7/0, from version 2 on c.7.0."""
    return {"name": "default", "separator": chunk_separator(header)}


def chunk_separator(header: Header) -> str:
    """Return what stands between the numbers of a chunk's key."""
    return "/" if header.version == 1 else "."


def mark_key(header: Header, block: int) -> str:
    """Return the key, from a split, of a block's mark."""
    return f"blocks/c{chunk_separator(header)}{block}"


def _dimension_names(path: str, width: int, header: Header) -> tuple[str, ...]:
    """Return the names of an array's axes; one name has one length in a group, which xarray needs."""
    if not width:
        return ("sample",)
    if header.version == 1:
        return ("sample", "neuron")
    return ("sample", {"features": "feature", "logits": "class"}.get(path, "neuron"))


def chunk_key(array: zarr.Array[Any], block: int, header: Header) -> str:
    """Return the key, from the store's root, of the object that holds a block of an array."""
    return object_key(array, block * header.block_rows // (array.shards or array.chunks)[0])


def object_key(array: zarr.Array[Any], number: int) -> str:
    """Return the key, from the store's root, of an array's object of that number along the rows."""
    return f"{array.path}/{array.metadata.encode_chunk_key((number, *(0 for _ in array.shape[1:])))}"


def is_whole(array: zarr.Array[Any], header: Header) -> bool:
    """Return whether a chunk of an array holds many blocks: all its rows were written before the first block."""
    return bool(array.shards is None and array.chunks[0] > header.block_rows)


def whole_chunk_rows(rows: int, header: Header) -> int:
    """Return the rows of such a chunk, in a split of this many rows."""
    return header.block_rows * count_blocks(min(rows, WHOLE_ROWS), header.block_rows)


def is_split_path(path: str) -> bool:
    """Return whether a path can be a split's: id/…, csid/NAME, ood/val, ood/near/NAME, ood/far/NAME."""
    parent, _, leaf = path.rpartition("/")
    return bool(leaf) and not leaf.startswith(".") and (path == "ood/val" or parent in SPLIT_PARENTS)


def check_split_name(name: str) -> None:
    """Refuse the name of a split that a table could confuse with a mean or a missing value.

    Raises:
        InputError: naming the split and the reason.
    """
    if reason := why_reserved(name.rpartition("/")[2]):
        raise InputError(f"split {name}: the name of its set is reserved, {reason}; give the set another name")


def is_there(root: zarr.Group, key: str) -> bool:
    """Return whether an object exists in the store."""
    return sync(root.store.exists(key))


def list_split_paths(root: zarr.Group) -> list[str]:
    """Return every existing path that can be a split's, in the order of tables."""

    async def members(parent: str) -> list[str]:
        return [f"{parent}/{leaf}" async for leaf in root.store.list_dir(parent)]

    paths = [path for parent in (*SPLIT_PARENTS, "ood") for path in sync(members(parent)) if is_split_path(path)]
    return sorted(paths, key=split_order)


def find_splits(root: zarr.Group) -> list[str]:
    """Return the names of all splits, also of damaged ones, in the order of tables."""
    return [path for path in list_split_paths(root) if is_there(root, f"{path}/zarr.json")]


def split_order(name: str) -> tuple[int, str]:
    """Sort key: id (train, subtrain, val, test), csid, ood/val, near, far."""
    fixed = ["id/train", "id/subtrain", "id/val", "id/test", "csid/", "ood/val", "ood/near/", "ood/far/"]
    for place, start in enumerate(fixed):
        if name == start or (start.endswith("/") and name.startswith(start)):
            return place, name
    return len(fixed), name
