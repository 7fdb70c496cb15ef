"""params.json: what a search writes and everything else reads, and which file is meant."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nacpipe.cache import Cache
from nacpipe.cache.identity import VAL, bound_splits, fingerprint
from nacpipe.errors import ParamsError
from nacpipe.files import beside_cache, write_whole
from nacpipe.method.params import NacParams
from nacpipe.method.published import published_params
from nacpipe.method.term import layer_of
from nacpipe.scoring.states import held_layers
from nacpipe.text import command_line


def find_params(cache: Cache, choice: str | None, warn: Callable[[str], None] = lambda text: None) -> NacParams:
    """Return the parameters to use: a file's, the paper's (`published`), or those that a search left beside the cache.

    Args:
        cache: the cache they are for.
        choice: a file, `published`, or None.
        warn: told where a file that was named was found on other states.

    Raises:
        ParamsError: there are none, or those beside the cache were found on other states, saying what to do.
    """
    if choice == "published":
        identity = cache.header.identity
        layers = [spec.name for spec in cache.header.layers]
        return published_params(str(identity.get("benchmark")), str(identity.get("family")), layers)
    if choice is not None:
        params = read_params(choice)
        if not _found_here(cache, params, choice):
            warn(f"{choice} was found on other states than those of {cache.path}; it may fit them badly")
        return params
    beside = find_file(cache, None)
    if not beside.exists():
        raise ParamsError(
            f"there is no {beside}; make it with: {command_line('search', cache.path)},"
            " or give --params FILE or --params published"
        )
    params = read_params(beside)
    if not _found_here(cache, params, beside):
        val = str(read_section(beside, "made_by").get("val", VAL))
        again = command_line("search", cache.path, *(["--val", val] if val != VAL else []))
        raise ParamsError(
            f"{beside} was found on other states than those of {cache.path} now; search again with: {again},"
            f" or give --params {shlex.quote(str(beside))} to use it all the same"
        )
    return params


def find_file(cache: Cache, choice: str | None) -> Path:
    """Return the file that is meant: the one named, or the one beside the cache."""
    return Path(choice) if choice is not None else beside_cache(cache.path, ".params.json", "--params FILE")


def _found_here(cache: Cache, params: NacParams, path: str | Path) -> bool:
    """False where the file says that it was found on other states; a file that says nothing is taken as it is."""
    made_by = read_section(path, "made_by")
    layers = tuple(dict.fromkeys(map(layer_of, params.layers)))
    if not set(layers) <= set(held_layers(cache)):
        return True  # fitting refuses them by name
    splits = bound_splits(str(made_by.get("val", VAL)))
    before = [bound_splits(), (*bound_splits(), "id/subtrain")]  # what an earlier nacpipe bound every file to
    known = {fingerprint(cache.search_identity(some, layers)) for some in (splits, *before)}
    said = made_by.get("fingerprint")
    return not isinstance(said, str) or said in known


MAX_BYTES = 16 * 2**20  # a parameter file is a few kB; more is a mistake


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
