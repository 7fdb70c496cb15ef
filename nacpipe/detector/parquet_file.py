"""Parquet files with a column of encoded images: bytes, or a struct with `bytes` and `path`; a few rows in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from nacpipe.cache.objects import READ_AHEAD, open_file
from nacpipe.errors import ImageError, MissingExtra, first_line
from nacpipe.extraction.image_content import CANNOT_READ, EncodedImage, Unscored

ROWS_AT_ONCE = 64


def read_parquet(address: str, column: str | None = None) -> Iterator[EncodedImage | Unscored]:
    """Yield the rows.

    Args:
        address: a path or a URL.
        column: of images; None: the first.

    Raises:
        ImageError: it cannot be read, or has no such column.
        InputError: there is no such object at the URL.
        CacheError: its server does not answer.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{address} needs pyarrow; install it with: pip install 'nacpipe[score]'") from None
    with open_file(address) as file:
        try:
            # Without the two it reads all images of a row group first, and many files are one row group.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_AHEAD)
            chosen = _image_column(address, table.schema_arrow, column)
            row = 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[chosen]):
                for value in batch.column(0).to_pylist():
                    yield _parquet_row(address, row, value)
                    row += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: of names that are no UTF-8
            raise ImageError(f"{address} cannot be read as Parquet: {first_line(error)}") from None


def _image_column(address: str, schema: Any, column: str | None) -> str:
    """The name of the column of images: bytes, or a struct with a field of bytes, as Hugging Face's data sets have."""
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_binary_view,
                                           types.is_fixed_size_binary))  # fmt: skip

    def bytes_of(kind: Any) -> Any:
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return kind.value_type if types.is_dictionary(kind) else kind

    fitting = [field.name for field in schema if holds_images(bytes_of(field.type))]
    if column is None and fitting:
        return str(fitting[0])
    if column in fitting:
        return str(column)
    wanted = "a column of encoded images" if column is None else f"a column {column!r} of encoded images"
    raise ImageError(f"{address} has not {wanted} (bytes, or a struct with bytes); it has {', '.join(schema.names)}")


def _parquet_row(address: str, row: int, value: Any) -> EncodedImage | Unscored:
    name = str(row)
    if isinstance(value, dict):
        name, value = str(value.get("path") or name), value.get("bytes")
    where = f"{address}: row {row}" + (f", {name}" if name != str(row) else "")
    if value is None:
        return Unscored(f"{CANNOT_READ}{where}: it is null", name)
    return EncodedImage(name=name, where=where, read=partial(bytes, value))
