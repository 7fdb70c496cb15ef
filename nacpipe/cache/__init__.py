"""The cache: one Zarr v3 group per network × benchmark × training run. Specified in cache/README.md at the top.

These are the only rooms that know Zarr. `store` finds the objects, on a disk or at a server (`pages`: of the web).
`layout` says what a store holds and `keys` what of it belongs there, `append` writes it block by block (`durable` waits
for the disk, `lock` keeps others out), `read` opens it, a `split` at a time, whose arrays are sliced (`view`), `seal`
sums it up. `form` says whether metadata are as specified, `verify` reads everything, `repair` mends what is damaged.
`pending` ends what is left of it all with the process.
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
