"""Checks of a store's metadata against cache/README.md; no chunk is read.

A reader refuses a split that differs. `nacpipe verify --format` prints all differences, also for caches of other
programs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.metadata import ArrayV3Metadata

from nacpipe.cache.keys import parse_chunk_key
from nacpipe.cache.layout import (
    MAX_CHUNK_BYTES,
    MISSING_INT,
    WHOLE,
    Header,
    chunk_key_encoding,
    count_blocks,
    is_there,
)
from nacpipe.errors import FormatError, NacError
from nacpipe.method.outputs import OUTPUTS

IDENTITY = ("benchmark", "architecture", "family", "weights", "dtype")
TRANSFORM = ("resize", "crop", "mean", "std")
MAX_ROWS = 2**40
_SHA256 = re.compile("[0-9a-f]{64}")

Arrays = dict[str, zarr.Array[Any]]
"""By their paths in a split."""


def open_member(root: zarr.Group, path: str) -> zarr.Group | zarr.Array[Any]:
    """Return a group or an array below the root.

    Raises:
        KeyError: it does not exist.
        FormatError: its metadata cannot be read.
    """
    try:
        return root[path]
    except KeyError as error:
        if error.args == (path,):
            raise
        raise FormatError(f"{path}/zarr.json is damaged (KeyError: {error})") from error
    except (NacError, OSError, MemoryError):
        raise
    except Exception as error:  # Zarr raises errors of any kind for broken metadata
        raise FormatError(f"{path}/zarr.json is damaged ({type(error).__name__}: {str(error)[:200]})") from error


def root_problems(header: Header) -> Iterator[str]:
    """Yield errors in the root's attributes that `Header.from_attributes` accepts, because only a writer needs them."""
    for key in IDENTITY:
        if key not in header.identity:
            yield f"identity lacks {key}"
    for key in ("weights", "source"):
        if key in header.identity and not _is_sha256(header.identity[key]):
            yield f"identity.{key} is not a sha256"
    transform, described = header.identity.get("transform"), header.identity.get("input")
    if transform is None and (header.version == 1 or described is None):
        yield "identity lacks transform"
    if described is not None and not _describes_input(described):
        yield "identity.input has no shape (whole numbers) and description (text)"
    if transform is not None:
        for key in TRANSFORM:
            if not isinstance(transform, Mapping) or key not in transform:
                yield f"identity.transform lacks {key}"
    if header.identity.get("outputs", "logits") not in OUTPUTS:
        yield f"identity.outputs is {header.identity['outputs']!r}, none of {', '.join(OUTPUTS)}"


def _describes_input(value: Any) -> bool:
    """Whether a value describes inputs that are no images: `shape`, a list of whole numbers, and `description`."""
    if not isinstance(value, Mapping) or not isinstance(value.get("description"), str):
        return False
    shape = value.get("shape")
    return isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)


def split_problems(group: zarr.Group, header: Header, opened: Arrays | None = None) -> Iterator[tuple[str, str]]:
    """Yield (array, problem) of a split; the array is empty for problems of its attributes.

    Args:
        group: the split's.
        header: the cache's.
        opened: its arrays that are open already; those that are opened here are added.
    """
    opened = {} if opened is None else opened
    attributes = dict(group.attrs)
    rows = attributes.get("rows")
    for what in attribute_problems(attributes):
        yield "", what
    if isinstance(rows, bool) or not isinstance(rows, int) or not 0 < rows <= MAX_ROWS:
        return
    begun = has_no_marks(group)
    for path, (width, dtype) in header.arrays().items():
        if begun and not is_there(group, f"{group.path}/{path}/zarr.json"):
            continue
        for what in _array_problems(group, path, (rows, width) if width else (rows,), dtype, header, opened):
            yield path, what
    if begun:
        return
    for what in _mark_problems(group, count_blocks(rows, header.block_rows), header, opened):
        yield "blocks", what


def has_no_marks(group: zarr.Group) -> bool:
    """Return whether a split has no marks yet. They are created last, so missing arrays are then not damage."""
    return not group.attrs.get("sealed") and not is_there(group, f"{group.path}/blocks/zarr.json")


def count_objects(array: zarr.Array[Any]) -> int:
    """Return how many stored objects hold an array's rows: chunks, or shards."""
    return -(-array.shape[0] // (array.shards or array.chunks)[0])


def missing_chunks(arrays: Mapping[str, zarr.Array[Any]], keys: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield (array, number of its missing objects) of a split, given its arrays and the existing keys."""
    expected = {path: count_objects(array) for path, array in arrays.items()}
    chunks = (found for key in keys if (found := parse_chunk_key(key)) is not None)
    held = Counter(path for path, number in chunks if number < expected.get(path, 0))
    for path, count in expected.items():
        if held[path] < count:
            yield path, count - held[path]


def classifier_problems(root: zarr.Group, header: Header) -> Iterator[tuple[str, str]]:
    """Yield (array, problem) of the last linear layer, if it is written."""
    if not is_there(root, "classifier/zarr.json"):
        if any(is_there(root, f"classifier/{name}/zarr.json") for name in ("weight", "bias")):
            yield "", "has no zarr.json: it was lost, or a removal was interrupted"
        return
    group = open_member(root, "classifier")
    if not isinstance(group, zarr.Group):
        yield "", "is not a group"
        return
    if not group.attrs.get("written"):
        if group.attrs:
            yield "", "has no attribute written"
        return
    for name, shape in (("weight", (header.classes, header.features)), ("bias", (header.classes,))):
        metadata, what = _open_array(group, name, {})
        if metadata is None:
            yield name, what
        elif metadata.shape != shape or metadata.data_type.to_native_dtype() != np.dtype("float32"):
            yield name, f"is {_describe(metadata)}, not float32 of {shape}"


def attribute_problems(attributes: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a split's own attributes."""
    rows, sealed, digest = (attributes.get(key) for key in ("rows", "sealed", "digest"))
    if isinstance(rows, bool) or not isinstance(rows, int) or not 0 < rows <= MAX_ROWS:
        yield f"rows is {str(rows)[:40]}, not a whole number from 1"
    if not isinstance(sealed, bool):
        yield f"sealed is {str(sealed)[:40]}, neither true nor false"
    elif sealed and not _is_sha256(digest):
        yield "is sealed and has no digest"
    elif not sealed and digest is not None:
        yield "has a digest and is not sealed"


def image_problems(attributes: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a split's attribute `images`, which a reader does not need."""
    images = attributes.get("images")
    if not isinstance(images, Mapping) or not isinstance(images.get("list"), str):
        yield "images names no list"
    elif not _is_sha256(images.get("sha256")):
        yield "images.sha256 is not a sha256"


def _array_problems(
    group: zarr.Group, path: str, shape: tuple[int, ...], dtype: str, header: Header, opened: Arrays
) -> Iterator[str]:
    metadata, what = _open_array(group, path, opened)
    if metadata is None:
        yield what
        return
    if metadata.shape != shape or metadata.data_type.to_native_dtype() != np.dtype(dtype):
        yield f"is {_describe(metadata)}, not {dtype} of {shape}"
        return
    if (problem := _key_problem(metadata, header)) is not None:
        yield problem
        return
    chunk = (header.block_rows, *shape[1:])
    outer = (header.block_rows * header.shard_blocks, *shape[1:])
    grid = getattr(metadata.chunk_grid, "chunk_shape", None)
    codecs = metadata.codecs
    whole = header.version > 1 and path in WHOLE and not isinstance(codecs[0], ShardingCodec)
    if whole and grid is not None and grid[0] > header.block_rows:
        if grid[0] % header.block_rows or grid[0] > MAX_CHUNK_BYTES // np.dtype(dtype).itemsize:
            yield f"is chunked {grid}, no multiple of {header.block_rows} rows of at most {MAX_CHUNK_BYTES} bytes"
    elif header.shard_blocks > 1:
        shard = codecs[0] if len(codecs) == 1 else None
        if not isinstance(shard, ShardingCodec) or grid != outer or shard.chunk_shape != chunk:
            yield f"is not sharded {outer} with chunks {chunk}"
            return
        if not isinstance(shard.index_codecs[-1], Crc32cCodec):
            yield "has shards whose index has no crc32c"
        codecs = shard.codecs
    elif grid != chunk:
        yield f"is chunked {grid}, not {chunk}"
    yield from _codec_problems(codecs)
    fill = metadata.fill_value
    fits = math.isnan(float(fill)) if dtype == "float32" else int(fill) == MISSING_INT
    if not fits:
        yield f"has fill value {fill}, which could pass for data"


def _key_problem(metadata: ArrayV3Metadata, header: Header) -> str | None:
    """Return what is wrong with the keys of an array's chunks."""
    encoding, wanted = metadata.chunk_key_encoding.to_dict(), chunk_key_encoding(header)
    found = {"name": encoding["name"], **encoding.get("configuration", {})}  # type: ignore[dict-item]
    return None if found == wanted else f"has chunk keys of {found}, not {wanted}"


def _mark_problems(group: zarr.Group, blocks: int, header: Header, opened: Arrays) -> Iterator[str]:
    metadata, what = _open_array(group, "blocks", opened)
    if metadata is None:
        yield what
        return
    if metadata.shape != (blocks,) or metadata.data_type.to_native_dtype() != np.dtype("uint8"):
        yield f"is {_describe(metadata)}, not uint8 of {(blocks,)}"
        return
    if (grid := getattr(metadata.chunk_grid, "chunk_shape", None)) != (1,):
        yield f"is chunked {grid}, not one mark a chunk"
    if (problem := _key_problem(metadata, header)) is not None:
        yield problem
    if int(metadata.fill_value) != 0:
        yield f"has fill value {metadata.fill_value}: a missing mark would count"
    yield from _codec_problems(metadata.codecs)


def _codec_problems(codecs: Any) -> Iterator[str]:
    if not isinstance(codecs[-1], Crc32cCodec):
        yield "has chunks without a crc32c at their end"
    if not isinstance(codecs[0], BytesCodec) or getattr(codecs[0].endian, "value", "little") != "little":
        yield "is not little endian"
    if not all(isinstance(codec, BytesBytesCodec) for codec in codecs[1:]):
        yield "has codecs of another kind"


def _open_array(group: zarr.Group, path: str, opened: Arrays) -> tuple[ArrayV3Metadata | None, str]:
    try:
        member = opened[path] if path in opened else open_member(group, path)
    except KeyError:
        return None, "is not in the store"
    except FormatError as error:
        return None, str(error).split("/zarr.json ")[-1]
    if not isinstance(member, zarr.Array):
        return None, "is a group, not an array"
    opened[path] = member
    metadata = member.metadata
    if not isinstance(metadata, ArrayV3Metadata):
        return None, "is not Zarr v3"
    return metadata, ""


def _describe(metadata: ArrayV3Metadata) -> str:
    return f"{metadata.data_type.to_native_dtype()} of {metadata.shape}"


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
