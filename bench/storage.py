"""What a cache costs on disk, and what keeping fewer mantissa bits does to the AUROC.

    python bench/storage.py CACHE [--params FILE] [--bits 23,12,10,9,8,7,6]

Copies the cache's states into temporary caches with `mantissa_bits` set, as `extract --mantissa-bits` would write them,
and evaluates both. Stored bytes are those of all files, metadata included; ΔAUROC is the largest over all OOD sets.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.evaluation.tables import evaluate
from nacpipe.scoring.params_file import find_params


def copy_rounded(cache: Cache, path: Path, bits: int) -> Cache:
    header = replace(cache.header, mantissa_bits=bits)
    writer = CacheWriter(path, header)
    for name, split in cache.items():
        writer.prepare(name, split.rows, split.images, label=split.label, index=split.index)
        for block in range(split.marks().size):
            start = block * header.block_rows
            rows = slice(start, min(start + header.block_rows, split.rows))
            writer.write_block(name, block, {key: split.read(key, rows) for key in header.arrays()})
        writer.seal(name)
    return open_cache(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--params")
    parser.add_argument("--bits", default="23,12,10,9,8,7,6")
    args = parser.parse_args()
    cache = open_cache(args.cache)
    params = find_params(cache, args.params)
    raw = sum(split.rows for split in cache.values()) * cache.header.row_bytes()
    exact = evaluate(cache, params).query("method == 'NAC'")["auroc"].to_numpy()
    print(f"{len(cache)} splits, {raw} raw bytes")
    for bits in map(int, args.bits.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            copy = copy_rounded(cache, Path(folder, "copy.zarr"), bits)
            stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            rounded = evaluate(copy, params).query("method == 'NAC'")["auroc"].to_numpy()
            worst = abs(rounded - exact).max()
            print(f"mantissa bits {bits:2d}: {stored / raw:.3f} of the raw bytes, |ΔAUROC| ≤ {worst:.5f}")
