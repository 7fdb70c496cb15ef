"""The cache: one Zarr v3 group per network × benchmark × training run. Specified in cache/README.md at the top.

These are the only rooms that know Zarr. `layout` says what a store holds, `append` writes it block by block, `read`
opens it, `seal` sums it up.
"""

from nacpipe.cache.append import CacheWriter
from nacpipe.cache.layout import Header, LayerSpec
from nacpipe.cache.read import Cache, LayerView, SplitView, open_cache

__all__ = ["Cache", "CacheWriter", "Header", "LayerSpec", "LayerView", "SplitView", "open_cache"]
