"""What one wing writes and the other reads: params.json and the exported detector.

params.json is what the search writes and everything else reads:

    {"layers": {"avgpool": {"bins": 50, "saturation": 50, "alpha": 100.0, "weight": 1.0, "edges": …, "source": …}, …},
     "result": {"val_auroc": …, "val_fpr95": …, "subtrain_auroc": …, "trials": …, "seconds": …, "seed": …},
     "made_by": {…}}

Only `layers` is needed; `edges`, `source` and `weight` have defaults.

The exported detector is a safetensors file: arrays NAME/borders and NAME/counts for each layer, and the rest
(core/exported.py) as JSON in its metadata, under one key, so that the same detector makes the same bytes.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nacpipe.address import is_url
from nacpipe.detector.exported import Exported
from nacpipe.errors import DetectorError, InputError, ParamsError
from nacpipe.method.params import NacParams
from nacpipe.text import command_line

NEW_FILE = 0o666  # from which the kernel takes what the umask says; tempfile's files would be the owner's alone
MAX_BYTES = 16 * 2**20  # a parameter file is a few kB; more is a mistake
MAX_DETECTOR_BYTES = 2**30  # a detector is a few MB
_DTYPES = ("F32", "U8", "U16", "I32")
_KEY = "nacpipe_detector"


def read_params(path: str | Path) -> NacParams:
    """Read a parameter file.

    Raises:
        ParamsError: it is not there, not JSON, or malformed; the message names the file.
    """
    try:
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise ParamsError(f"it has {size} bytes; at most {MAX_BYTES} are read")
        return NacParams.from_json(json.loads(Path(path).read_text("utf-8-sig")))
    except FileNotFoundError:
        raise ParamsError(f"there is no parameter file {path}; make one with: nacpipe search CACHE") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5,000 digits, …
        raise ParamsError(f"{path} cannot be read as JSON: {error}") from None
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None


def read_section(path: str | Path, name: str) -> Mapping[str, Any]:
    """Return a section of a parameter file, `made_by` or `result`; empty where it has none."""
    data = json.loads(Path(path).read_text("utf-8-sig"))
    section = data.get(name) if isinstance(data, dict) else None
    return section if isinstance(section, dict) else {}


def write_params(path: str | Path, params: NacParams, **sections: Mapping[str, Any]) -> None:
    """Write parameters and further sections (`result`, `made_by`) whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps({**params.to_json(), **sections}, indent=2) + "\n"
    write_whole(path, text.encode())


def write_detector(path: str | Path, exported: Exported) -> None:
    """Write an exported detector whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(exported.to_json(), allow_nan=False)
    write_whole(path, save(exported.to_arrays(), metadata={_KEY: text}))


def read_detector(path: str | Path) -> Exported:
    """Read an exported detector; nothing in it is ever run.

    Raises:
        DetectorError: it is not there, no such file, or malformed; the message names the file.
    """
    try:
        if (Path(path) / "zarr.json").is_file():
            raise DetectorError(f"it is a cache; make a detector of it with: {command_line('export', path)}")
        if (size := os.path.getsize(path)) > MAX_DETECTOR_BYTES:
            raise DetectorError(f"it has {size} bytes; at most {MAX_DETECTOR_BYTES} are read")
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise DetectorError("it is no exported detector")
            arrays = {}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    raise DetectorError(f"array {name!r} is {dtype}; known: {', '.join(_DTYPES)}")
                arrays[name] = file.get_tensor(name)
        return Exported.from_json(json.loads(text, parse_constant=_refuse), arrays)
    except FileNotFoundError:
        raise DetectorError(f"there is no detector {path}; make one with: nacpipe export CACHE") from None
    except DetectorError as error:
        raise DetectorError(f"{path}: {error}") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DetectorError(f"{path} cannot be read as a detector: {said}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to be written whole or not at all: it appears when the `with` block ends well, with the umask's mode.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path)
    try:
        draft = target.parent / f".{target.name}.{secrets.token_hex(4)}"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), NEW_FILE)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None


def check_writable(path: str | Path) -> None:
    """Refuse an output file that could not be written, before any work is done for it.

    Raises:
        InputError: its folder is not there or not writable.
    """
    folder = Path(path).parent
    if Path(path).is_dir():
        raise InputError(f"{path} cannot be written: it is a folder; name a file in it")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path} cannot be written: {folder} is not a folder that can be written to")


def beside_cache(cache: str, suffix: str, options: str = "--output FILE") -> Path:
    """Return the file beside a cache: `X.zarr` → `X` + suffix.

    Raises:
        InputError: the cache is at a URL, where no files are put; the message names the options to give instead.
    """
    if is_url(cache):
        raise InputError(f"{cache} is not on this machine, so that nothing is kept beside it; give {options}")
    path = Path(cache)
    path = path if path.name else path.resolve()
    return path.with_name(path.name.removesuffix(".zarr") + suffix)
