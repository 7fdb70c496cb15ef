"""The cache: one Zarr v3 group per network × benchmark × training run. Specified in cache/README.md at the top.

Only this package imports Zarr. `address` opens a store on a disk or at a server (`store`; `pages` over http). `layout`
has the names, shapes and codecs of a cache, `options` what it was extracted with, `keys` which objects belong to it.
`writer` writes it block by block (`durability` waits for the disk, `lock` refuses a second writer), `reader` opens it,
a `split` at a time, whose arrays are sliced (`array_view`). `digest` computes a split's seal, `validation` checks
metadata, `verify` checks everything, `repair` mends damage. `pending` cancels unfinished reads when the process ends.
"""

import atexit

from nacpipe.cache.array_view import ArrayView
from nacpipe.cache.layout import Header, LayerSpec
from nacpipe.cache.pending import end_pending
from nacpipe.cache.reader import Cache, open_cache
from nacpipe.cache.split import LayerView, SplitView
from nacpipe.cache.writer import CacheWriter

__all__ = ["ArrayView", "Cache", "CacheWriter", "Header", "LayerSpec", "LayerView", "SplitView", "open_cache"]

atexit.register(end_pending)  # after Zarr registered the stop of its loop, and so run before that
