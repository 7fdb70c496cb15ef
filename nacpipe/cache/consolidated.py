"""The root's copy of all metadata, which Zarr calls consolidated: a finished cache is read over http by it.

    seal, repair, drop ──▶ the groups' own metadata ──▶ the copy in the root's zarr.json

A copy goes stale, so only a web server's reader uses it; on a disk and at an object store the groups themselves are
read. It is renewed as the last step of every change. A crash before that leaves a copy without the newest split, which
the same command renews. A split that is not sealed is not in it. Version 1 has no copy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.common import concurrent_map
from zarr.core.sync import sync

from nacpipe.cache.address import Objects
from nacpipe.cache.layout import Header, list_split_paths
from nacpipe.cache.store import MAX_REQUESTS, read_consolidated


def consolidate(root: zarr.Group, header: Header, address: str | Path) -> None:
    """Renew the copy if it is not what the groups are; it is on the disk when this returns."""
    if header.version == 1:
        return
    wanted = wanted_copy(root, header)
    objects = Objects(address)
    content = json.loads(objects.read("zarr.json") or b"{}")
    if wanted == content.get("consolidated_metadata"):
        return
    content["consolidated_metadata"] = wanted
    objects.replace("zarr.json", json.dumps(content, separators=(",", ":")).encode())


def copy_is_stale(root: zarr.Group, header: Header) -> bool:
    """Return whether the copy is not what the groups are."""
    if header.version == 1:
        return False
    found = sync(root.store.get("zarr.json", default_buffer_prototype()))
    stored = read_consolidated(b"" if found is None else found.to_bytes())
    return bool(stored != wanted_copy(root, header)["metadata"])


def wanted_copy(root: zarr.Group, header: Header) -> dict[str, Any]:
    """Return the copy that the groups make: Zarr's object for the root's zarr.json."""
    splits = sync(_read(root.store, list_split_paths(root)))
    sealed = {name: content for name, content in splits.items() if _attribute(content, "sealed") is True}
    parents = {name[:i] for name in sealed for i, letter in enumerate(name) if letter == "/"}
    inside = (*header.groups(), *header.arrays(), "blocks")
    found = sync(_read(root.store, [*parents, *(f"{name}/{path}" for name in sealed for path in inside)]))
    classifier = sync(_read(root.store, ["classifier", "classifier/weight", "classifier/bias"]))
    if _attribute(classifier.get("classifier", {}), "written") is not True:
        classifier = {}
    return {
        "kind": "inline",
        "must_understand": False,
        "metadata": dict(sorted({**found, **sealed, **classifier}.items())),
    }


def _attribute(content: dict[str, Any], name: str) -> Any:
    attributes = content.get("attributes")
    return attributes.get(name) if isinstance(attributes, dict) else None


async def _read(store: Store, paths: list[str]) -> dict[str, Any]:
    """Return path → the content of its zarr.json, of those that exist and can be read."""

    async def read(path: str) -> tuple[str, Any]:
        buffer = await store.get(f"{path}/zarr.json", default_buffer_prototype())
        try:
            content = None if buffer is None else json.loads(buffer.to_bytes())
        except ValueError:  # damaged: verify names it
            content = None
        return path, content if isinstance(content, dict) else None

    found = await concurrent_map([(path,) for path in paths], read, MAX_REQUESTS)
    return {path: content for path, content in found if content is not None}
