"""Parts of a result: one file per shard of images, written whole or not at all, and read back.

    scores/_detector.json      what they were scored with
    scores/000.csv             one row per image of shard 000: image, score, percentile, is_ood, predicted, error, time
    scores/001.csv

A shard is done when its part exists. Parts are .csv, .json or .parquet files in a folder, or objects at s3://.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path, PurePath
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any, Protocol

from nacpipe.cache.objects import check_writable_object, list_objects, open_file, read_object, write_object
from nacpipe.errors import InputError, MissingExtra, first_line
from nacpipe.files import is_url, lock_handle, write_whole, writing_whole
from nacpipe.text import escape_bytes

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("csv", "json", "parquet")
DESCRIPTION = "_detector.json"
ROWS_IN_MEMORY = 8192  # of a Parquet file's row group


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredImage:
    """One row of the result."""

    image: str
    """The file's path, or the name of a shard's member or row."""
    score: float | None
    """Larger = more like the training data; None where there is none."""
    percentile: float | None
    """Percent of id/val's scores that are lower; None where there is no score, or a file of an earlier version."""
    is_ood: bool | None
    predicted: int | None
    """The class of the largest logit or probability; None where the network gives features."""
    error: str | None
    """Why the image could not be scored."""
    time: str | None = None
    """When the image was written last, UTC; None where that is not known."""


COLUMNS = tuple(field.name for field in fields(ScoredImage))


def format_time(seconds: float | None) -> str | None:
    """Return seconds since 1970 as 2026-11-27T20:15:00Z."""
    if seconds is None or not math.isfinite(seconds):
        return None
    with suppress(ValueError, OverflowError, OSError):  # a member of a tar file may claim any
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return None


class RowWriter(Protocol):
    """Writes rows to a file, one by one."""

    def add(self, row: ScoredImage) -> None:
        """Write a row."""

    def close(self) -> None:
        """Write what is left."""

    def drop(self) -> None:
        """Close without: the file is not kept."""


class Parts:
    """The folder of parts."""

    def __init__(self, folder: str | Path, kind: str = "csv") -> None:
        """Take a folder.

        Args:
            folder: a path, which is made at the first part, or a URL of an object store.
            kind: csv, json or parquet.

        Raises:
            InputError: the kind is not known, or the URL cannot be written.
            MissingExtra: Parquet needs pyarrow.
        """
        if kind not in KINDS:
            raise InputError(f"format is {kind!r}; known: {', '.join(KINDS)}")
        if kind == "parquet":
            _import_pyarrow()
        if is_url(folder):
            check_writable_object(str(folder))
        self.folder, self.kind = str(folder).rstrip("/") if is_url(folder) else str(folder), kind

    def address(self, stem: str) -> str:
        """Return a part's path or URL."""
        name = f"{stem}.{self.kind}"
        return f"{self.folder}/{name}" if is_url(self.folder) else str(Path(self.folder, name))

    def written(self) -> set[str]:
        """Return the stems of the parts that exist.

        Raises:
            CacheError: the server does not answer.
        """
        if is_url(self.folder):
            names = [url.removeprefix(f"{self.folder}/") for url in list_objects(self.folder)]
        else:
            folder = Path(self.folder)
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        own = f".{self.kind}"
        return {
            name.removesuffix(own)
            for name in names
            if name.endswith(own) and not name.startswith(".") and name != DESCRIPTION
        }

    @contextmanager
    def writing(self, stem: str) -> Iterator[RowWriter]:
        """Write a part: it appears at the end of the `with` block, unless the block raises.

        Raises:
            InputError: it cannot be written.
        """
        if is_url(self.folder):
            with SpooledTemporaryFile(1 << 24) as file:
                with _rows(_WRITERS[self.kind](file)) as writer:
                    yield writer
                file.seek(0)
                write_object(self.address(stem), file.read())
            return
        for draft in Path(self.folder).glob(f".{_literal(stem)}.{self.kind}.*"):  # of a process that was killed
            with suppress(OSError), open(draft, "rb") as left:  # one that writes now holds a lock
                if sys.platform != "win32":  # where no open file can be removed
                    lock_handle(left.fileno(), wait=False)
                draft.unlink(missing_ok=True)
        with writing_whole(self.address(stem)) as file:
            if sys.platform != "win32":
                with suppress(OSError):
                    lock_handle(file.fileno(), wait=False)
            with _rows(_WRITERS[self.kind](file)) as writer:
                yield writer

    def check(self, description: Mapping[str, Any]) -> bool:
        """Refuse a folder with parts of another detector or in another format; return whether it is claimed.

        Raises:
            InputError: such parts are in it.
        """
        here = _join(self.folder, DESCRIPTION)
        if (content := _read(here)) is None:
            return False
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("sha256") != description["sha256"]:
            raise InputError(
                f"{self.folder} holds parts of another detector ({here} differs); name another folder with --output"
            )
        if (kind := found.get("format", self.kind)) != self.kind:  # `watch` would count images twice
            raise InputError(
                f"{self.folder} holds parts in the format {kind}; go on with --format {shlex.quote(str(kind))}, or name"
                " another folder with --output"
            )
        return True

    def claim(self, description: Mapping[str, Any]) -> None:
        """Make the folder, and refuse one with parts of another detector or in another format.

        Raises:
            InputError: the folder cannot be made, or such parts are in it.
        """
        if not is_url(self.folder):
            try:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{self.folder} cannot be made: {error.strerror or error}") from None
        if not self.check(description):
            content = json.dumps({**description, "format": self.kind}, indent=2)
            _write(_join(self.folder, DESCRIPTION), content.encode())


@contextmanager
def _rows(writer: RowWriter) -> Iterator[RowWriter]:
    """Close a writer at the end of the `with` block; where that raises, before its file is."""
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.drop()
        raise


def _literal(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if is_url(folder) else str(Path(folder, name))


def _read(address: str) -> bytes | None:
    if is_url(address):
        return read_object(address)
    try:
        return Path(address).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{address} cannot be read: {error.strerror or error}") from None


def _write(address: str, content: bytes) -> None:
    if is_url(address):
        write_object(address, content)
    else:
        write_whole(address, content)


def csv_line(values: Iterator[Any] | tuple[Any, ...] | list[Any]) -> str:
    """Return a line of CSV; None is an empty cell."""
    line = io.StringIO()
    csv.writer(line).writerow("" if value is None else value for value in values)  # its end has \r: both are quoted
    return line.getvalue().removesuffix("\r\n") + "\n"


def _values(row: ScoredImage) -> dict[str, Any]:
    """A row's values; bytes of a file name that are no UTF-8 are escapes, NaN is None."""
    values = asdict(row)
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = escape_bytes(value)
        elif isinstance(value, float) and not math.isfinite(value):
            values[name] = None
    return values


class _CsvWriter:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.write(csv_line(COLUMNS).encode())

    def add(self, row: ScoredImage) -> None:
        self._file.write(csv_line([*_values(row).values()]).encode())

    def close(self) -> None:
        pass

    def drop(self) -> None:
        pass


class _JsonWriter:
    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._before = file, b"[\n"

    def add(self, row: ScoredImage) -> None:
        self._file.write(self._before + json.dumps(_values(row), allow_nan=False).encode())
        self._before = b",\n"

    def close(self) -> None:
        self._file.write(b"[]\n" if self._before == b"[\n" else b"\n]\n")

    def drop(self) -> None:
        pass


class _ParquetWriter:
    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow
        import pyarrow.parquet

        self._pyarrow = pyarrow
        self._schema = pyarrow.schema(
            [
                ("image", pyarrow.string()),
                ("score", pyarrow.float64()),
                ("percentile", pyarrow.float64()),
                ("is_ood", pyarrow.bool_()),
                ("predicted", pyarrow.int64()),
                ("error", pyarrow.string()),
                ("time", pyarrow.string()),
            ]
        )
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, row: ScoredImage) -> None:
        self._rows.append(_values(row))
        if len(self._rows) == ROWS_IN_MEMORY:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def drop(self) -> None:
        with suppress(Exception):  # a full disk; open, it would print a traceback when it is collected
            self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(self._pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []


_WRITERS: Mapping[str, type[_CsvWriter] | type[_JsonWriter] | type[_ParquetWriter]] = {
    "csv": _CsvWriter,
    "json": _JsonWriter,
    "parquet": _ParquetWriter,
}


def _import_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise MissingExtra("Parquet needs pyarrow; install it with: pip install 'nacpipe[score]'") from None


def find_parts(addresses: list[str | Path]) -> list[str]:
    """Return part files, folders of parts and URLs of either as addresses of parts, in alphabetical order per folder.

    Raises:
        InputError: there is none.
        CacheError: a server does not answer.
    """
    endings = tuple(f".{kind}" for kind in KINDS)
    found: list[str] = []
    for address in map(str, addresses):
        if is_url(address):
            inside = [address] if address.endswith(endings) else list_objects(address)
        elif (path := Path(address)).is_dir():
            inside = sorted(str(one) for one in path.iterdir() if not one.name.startswith("."))
        elif path.exists():
            inside = [address]
        else:
            raise InputError(f"there are no scores at {address}; make some with: nacpipe score … --output FOLDER")
        parts = [one for one in inside if one.endswith(endings)]
        if not parts:
            raise InputError(f"there is no part in {address}; known endings: {', '.join(endings)}")
        found += [one for one in parts if PurePath(one).name != DESCRIPTION]
    if not found:
        named = ", ".join(map(str, addresses))
        raise InputError(f"there is no part in {named} yet; make some with: nacpipe score … --output FOLDER")
    return list(dict.fromkeys(found))  # once, however often it is named


def read_part(address: str) -> pd.DataFrame:
    """Return a part's rows, with the columns of `ScoredImage`.

    Raises:
        InputError: it cannot be read, or lacks score, percentile or is_ood.
    """
    import pandas as pd

    try:
        with open_file(address) as file:
            if address.endswith(".parquet"):
                _import_pyarrow()
                frame = pd.read_parquet(io.BytesIO(file.read()))
            elif address.endswith(".json"):
                if not isinstance(rows := json.loads(file.read()), list):
                    raise ValueError("it is no list of rows")
                frame = pd.DataFrame(rows, columns=list(COLUMNS))
            else:
                text = dict.fromkeys(("image", "error", "time", "is_ood"), str)
                frame = pd.read_csv(file, dtype=text, keep_default_na=False, na_values=[""])
        if lacking := [name for name in ("score", "percentile", "is_ood") if name not in frame]:
            raise ValueError(f"it has no column {lacking[0]!r}, and is not from nacpipe score")
        frame = frame.reindex(columns=list(COLUMNS))
        _check_values(frame)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{address} cannot be read as scores: {first_line(error)}") from None
    return frame


def _check_values(frame: pd.DataFrame) -> None:
    """Make numbers and booleans of a part's columns, as a spreadsheet may have written them.

    Raises:
        ValueError: a value is none, or an image has neither `is_ood` nor an error.
    """
    import pandas as pd

    for name in ("score", "percentile"):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        if (unknown := frame[name][frame[name].notna() & numbers.isna()]).size:
            raise ValueError(f"{name} is {str(unknown.iloc[0])!r}, which is no number")
        frame[name] = numbers
    written = frame["is_ood"]
    if written.dtype != bool:
        known = {"True": True, "False": False}
        frame["is_ood"] = written.map(lambda value: None if pd.isna(value) else known.get(str(value).capitalize()))
        if (unknown := written[written.notna() & frame["is_ood"].isna()]).size:
            raise ValueError(f"is_ood is {str(unknown.iloc[0])!r}; known: True, False")
        if (bare := frame["image"][frame["is_ood"].isna() & frame["error"].isna()]).size:
            raise ValueError(f"image {bare.iloc[0]!r} has neither is_ood nor an error")


def read_description(address: str) -> dict[str, Any] | None:
    """Return what the parts beside this one were scored with; None where that is not known.

    Raises:
        CacheError: a server does not answer.
    """
    folder = address.rpartition("/")[0] if is_url(address) else str(Path(address).parent)
    with suppress(InputError, ValueError):
        content = _read(_join(folder, DESCRIPTION))
        found = None if content is None else json.loads(content)
        return found if isinstance(found, dict) else None
    return None
