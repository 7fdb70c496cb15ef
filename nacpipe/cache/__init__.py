"""The cache: one Zarr v3 group per network × benchmark × training run, specified in cache/README.md.

    address, store             from a path or URL to a Zarr store; requests to servers
    layout, keys               arrays and attributes of the format; which objects belong to a cache
    identity, options          what a cache was made from, and comparing it; the options of its extraction
    writer, lock, durability   writing block by block, by one extraction at a time, with fsync
    reader, split, array_view  opening a cache, its splits, and slicing their arrays
    digest, validation         the digest that seals a split; checks of metadata against the format
    consolidated               the root's copy of all metadata, by which a cache is read over http
    verify, repair, convert    finding damage in all chunks, and repairing it; a copy in the newest format
    pending                    cancelling Zarr's pending reads at exit

No other package uses Zarr.
"""

import atexit

from nacpipe.cache.array_view import ArrayView
from nacpipe.cache.layout import Header, LayerSpec
from nacpipe.cache.pending import cancel_pending_tasks
from nacpipe.cache.reader import Cache, as_cache, open_cache
from nacpipe.cache.split import LayerView, SplitView
from nacpipe.cache.writer import CacheWriter

__all__ = [
    "ArrayView",
    "Cache",
    "CacheWriter",
    "Header",
    "LayerSpec",
    "LayerView",
    "SplitView",
    "as_cache",
    "open_cache",
]

atexit.register(cancel_pending_tasks)  # registered after Zarr's own exit function, and so called before it
