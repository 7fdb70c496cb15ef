"""Compressors on the real states of caches: stored over raw bytes, and seconds to write and to read.

    python bench/codecs.py CACHE [CACHE …] [--blocks 4] [--rounds 3]

Blosc with bit shuffle, byte shuffle or none; the first blocks of id/val: activations, gradients, features, logits, as
they are and rounded to 10 bits of mantissa. A block of Blosc's of 0 KiB: the one that it chooses itself. The times are
those of one thread, the smallest of the rounds, over zstd 5's with bit shuffle, which the writer uses.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numcodecs.blosc import BITSHUFFLE, NOSHUFFLE, SHUFFLE, Blosc, set_nthreads

from nacpipe.cache import open_cache
from nacpipe.cache.writer import round_mantissa

SHUFFLES = {"bits": BITSHUFFLE, "bytes": SHUFFLE, "none": NOSHUFFLE}
CHOICES = [
    ("zstd", 5, "bits", 0),
    *(("zstd", level, "bits", size) for level in (1, 2, 3) for size in (0, 256)),
    ("zstd", 7, "bits", 0),
    ("zstd", 1, "bytes", 256),
    *(("lz4", level, "bits", size) for level in (1, 5) for size in (0, 256)),
    ("lz4", 5, "bytes", 0),
    ("lz4", 5, "none", 0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="+", metavar="CACHE")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    set_nthreads(1)
    for path in options.caches:
        cache = open_cache(path)
        split, size = cache["id/val"], cache.header.block_rows
        chunks = [
            np.ascontiguousarray(split.read(name, slice(block * size, min((block + 1) * size, split.rows))))
            for name, (width, _) in cache.header.arrays().items()
            if width
            for block in range(min(options.blocks, split.rows // size))
        ]
        raw, usual = sum(chunk.nbytes for chunk in chunks), (0.0, 0.0)
        rounded = [round_mantissa(chunk, 10) for chunk in chunks]
        print(f"{path}: {len(chunks)} chunks, {raw} raw bytes")
        for compressor, level, shuffle, size_kib in CHOICES:
            codec = Blosc(compressor, level, SHUFFLES[shuffle], size_kib << 10)
            writes, reads = [], []
            for _ in range(options.rounds):
                started = time.perf_counter()
                stored = [codec.encode(chunk) for chunk in chunks]
                writes.append(time.perf_counter() - started)
                started = time.perf_counter()
                for content in stored:
                    codec.decode(content)
                reads.append(time.perf_counter() - started)
            usual = usual if usual[0] else (min(writes), min(reads))
            share = sum(map(len, stored)) / raw
            few = sum(len(codec.encode(chunk)) for chunk in rounded) / raw
            print(
                f"  {compressor:4} {level} {shuffle:5} {size_kib:3} KiB   {share:.3f} of raw, 10 bits {few:.3f}"
                f"   write {min(writes) / usual[0]:5.2f}   read {min(reads) / usual[1]:5.2f}"
                f"   {raw / min(writes) / 2**20:4.0f} MiB/s written"
            )


if __name__ == "__main__":
    main()
