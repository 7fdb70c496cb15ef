"""The keys of the objects that belong to a cache, which follow from its header:

    zarr.json                               the root, and every group: id, ood/near, classifier, a split, a layer
    classifier/weight/c.0.0                 one chunk each
    id/val/layers/layer3/gradient/c.7.0     chunks of a split's arrays, of any number
    id/val/blocks/c.7                       marks
    id/val/logits/c.7.3fa9….partial         a draft: the partial file of a killed writer

In version 1: id/val/layer3/gradient/c/7/0, id/val/blocks/c/7, id/val/logits/c/7/0.3fa9….partial.

All other objects are foreign (`desktop.ini`, `notes.txt`, other folders): digests do not include them, no command
removes them, and `nacpipe verify` names them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from zarr.abc.store import Store
from zarr.core.common import concurrent_map
from zarr.core.sync import sync
from zarr.storage import LocalStore

from nacpipe.cache.layout import SPLIT_PARENTS, Header, chunk_separator
from nacpipe.cache.store import MAX_REQUESTS

_NUMBER = "(?:0|[1-9][0-9]*)"
_DRAFT = re.compile(
    rf"(?:zarr\.json(?:\.[0-9a-f]+)?|zarr\.[0-9a-f]+|(?:{_NUMBER}|c(?:\.{_NUMBER}){{0,2}})(?:\.[0-9a-f]+)?)\.partial"
)  # those of durability.py and of Zarr
_CHUNK_FOLDER = re.compile(rf"/c(?:/{_NUMBER})?$")  # of version 1, below an array's folder
_CHUNK = re.compile(rf"(.+)/c[./]({_NUMBER})(?:[./]0)?")


def own_keys(header: Header) -> re.Pattern[str]:
    """Return the pattern of the keys, from the store's root, that belong to a cache, without drafts."""
    arrays = {"blocks": 0, **{path: width for path, (width, _) in header.arrays().items()}}
    inside = ["zarr\\.json", *(f"{re.escape(group)}/zarr\\.json" for group in header.groups())]
    dot = re.escape(chunk_separator(header))
    for path, width in arrays.items():
        inside.append(f"{re.escape(path)}/(?:zarr\\.json|c{dot}{_NUMBER}{f'{dot}0' if width else ''})")
    parents = "|".join(SPLIT_PARENTS)
    split = f"(?:(?:{parents})/[^/.][^/]*|ood/val)"
    return re.compile(
        f"(?:(?:{parents}|ood|classifier)/)?zarr\\.json|classifier/weight/(?:zarr\\.json|c{dot}0{dot}0)"
        f"|classifier/bias/(?:zarr\\.json|c{dot}0)|{split}/(?:{'|'.join(inside)})"
    )


def parse_chunk_key(key: str) -> tuple[str, int] | None:
    """Return the array and the number, along the rows, of a chunk's key; None for other keys."""
    found = _CHUNK.fullmatch(key)
    return None if found is None else (found[1], int(found[2]))


def list_keys(store: Store, path: str = "") -> list[str]:
    """Return the keys of all objects below a path, from the store's root."""
    return sync(_list_keys(store, path))


def list_own(store: Store, header: Header, path: str) -> list[str]:
    """Return the keys of the cache's objects below a path, from the store's root, in ascending order."""
    pattern = own_keys(header)
    return sorted(key for key in list_keys(store, path) if pattern.fullmatch(key))


def list_split(store: Store, header: Header, split: str) -> tuple[list[str], list[str]]:
    """Return the keys, from the split, of its objects (except its own zarr.json) and of the foreign files in it."""
    pattern, own, foreign = own_keys(header), list[str](), list[str]()
    for key in list_keys(store, split):
        inside = key.removeprefix(f"{split}/")
        if pattern.fullmatch(key):
            own += [inside] * (inside != "zarr.json")
        elif not is_draft(key):
            foreign.append(inside)
    return own, foreign


def find_foreign(store: Store, header: Header) -> list[str]:
    """Return the foreign objects in a store: keys, and for a foreign folder its name with a / at the end."""
    keys, pattern = list_keys(store), own_keys(header)
    own = [key for key in keys if pattern.fullmatch(key)]
    folders = {folder for key in own for folder in _folders(key)}
    not_own = set(keys).difference(own)
    foreign = set()
    for key in not_own:
        foreign_folder = next((folder for folder in _folders(key) if folder not in folders), None)
        if foreign_folder is not None:
            foreign.add(f"{foreign_folder}/")
        elif not is_draft(key):
            foreign.add(key)
    return sorted(foreign)


def is_draft(key: str) -> bool:
    """Return whether a key or file name is that of a killed writer's partial file."""
    return _DRAFT.fullmatch(key.rpartition("/")[2]) is not None


def is_own_draft(key: str, own: re.Pattern[str]) -> bool:
    """Return whether a key is that of a partial file in a folder of the cache, given `own_keys`."""
    folder = _CHUNK_FOLDER.sub("", key.rpartition("/")[0])
    return is_draft(key) and own.fullmatch(f"{folder}/zarr.json" if folder else "zarr.json") is not None


def remove_own(store: Store, header: Header, path: str) -> None:
    """Remove the cache's objects below a path, with drafts, then empty folders.

    The order is: metadata of the marks, the marks, the other objects, the group's own attributes. A reader therefore
    never uses a partly removed split.
    """
    pattern = own_keys(header)
    steps: dict[int, list[str]] = {0: [], 1: [], 2: [], 3: []}
    for key in sorted(list_keys(store, path)):
        if pattern.fullmatch(key) and key.endswith("/blocks/zarr.json"):
            steps[0].append(key)
        elif pattern.fullmatch(key) or is_own_draft(key, pattern):
            mark = (parse_chunk_key(key) or ("", 0))[0].endswith("/blocks")
            steps[1 if mark else 3 if key == f"{path}/zarr.json" else 2].append(key)
    for step in steps.values():
        sync(_delete(store, step))
    if isinstance(store, LocalStore):
        remove_empty(Path(store.root, path))


def remove_empty(folder: Path) -> None:
    """Remove a folder and the folders below it that are empty."""
    for subfolder, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(subfolder)  # noqa: PTH106 (os.walk yields strings)


async def _list_keys(store: Store, path: str) -> list[str]:
    return [key async for key in (store.list_prefix(f"{path}/") if path else store.list())]


async def _delete(store: Store, keys: Iterable[str]) -> None:
    await concurrent_map([(key,) for key in keys], store.delete, MAX_REQUESTS)


def _folders(key: str) -> list[str]:
    """Return the folders above a key, the topmost first."""
    parts = key.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]
