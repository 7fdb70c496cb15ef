"""Change one byte of a cache, again and again: each is found by verify or changes no value, and none is a traceback.

A cache of random numbers (two layers, seven splits, blocks of 16 rows), first plain, then sharded. Half of the bytes
are drawn from all chunks, half from all zarr.json; the new value is any other one. After each change, and before the
byte is put back:

    verify     the command; its exit code must be 0 or 1
    scores     of all splits, logits, labels, the classifier: equal to those before, or refused in words
    repair     (every tenth) afterwards verify finds nothing, or says what it cannot mend

    python bench/corrupt.py [--changes 500] [--seed 0]      exit code 1 where a changed value passed, or on a traceback
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cli import main as nacpipe
from nacpipe.errors import NacError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import score_splits

PARAMS = NacParams(layers={name: LayerParams(bins=20, saturation=5, alpha=0.5) for name in ("avgpool", "layer1")})


@dataclass(slots=True)
class Tally:
    found: int = 0  # by verify
    refused: int = 0  # and by a reader
    harmless: int = 0  # not found, and no value differs
    mended: Counter[bool] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def values_of(path: Path) -> dict[str, Any]:
    """Everything that a score, a metric or a baseline is made from."""
    cache = open_cache(path)
    found: dict[str, Any] = {"splits": list(cache), "unfinished": [n for n in cache if not cache.peek(n).sealed]}
    names = [name for name in cache if name not in found["unfinished"]]
    found |= {name: scores.tobytes() for name, scores in score_splits(cache, PARAMS, names).items()}
    for name in names:
        found |= {f"{name}/{path}": cache[name].read(path).tobytes() for path in cache.header.arrays()}
    found["classifier"] = [array.tobytes() for array in cache.classifier() or ()]
    return found | {"outputs": cache.header.identity.get("outputs"), "layers": cache.header.layers}


def command(*words: str) -> tuple[int, str]:
    """Exit code and output; −1 and the error where there would be a traceback."""
    done = CliRunner().invoke(nacpipe, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return -1, f"{type(done.exception).__name__}: {done.exception}"
    return done.exit_code, done.output


def corrupt(cache: Path, changes: int, dice: random.Random, tally: Tally) -> None:
    """Change this many bytes of a finished cache, one at a time."""
    whole = values_of(cache)
    assert command("verify", str(cache))[0] == 0
    files = sorted(file for file in cache.rglob("*") if file.is_file())
    chunks = [file for file in files if file.name != "zarr.json"]
    metadata = [file for file in files if file.name == "zarr.json"]
    for number in range(changes):
        file = (
            dice.choice(metadata)
            if dice.random() < 0.5
            else dice.choices(chunks, [f.stat().st_size for f in chunks])[0]
        )
        content = file.read_bytes()
        place = dice.randrange(len(content))
        byte = (content[place] + dice.randrange(1, 256)) % 256
        file.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        what = f"{file.relative_to(cache)}, byte {place}: {content[place]} → {byte}"
        code, output = command("verify", str(cache))
        if code not in (0, 1):
            tally.failures.append(f"{what}: verify: {output}")
        try:
            same = values_of(cache) == whole
            if not same:
                tally.failures.append(f"{what}: a value changed and was not refused (verify says {code})")
        except NacError:
            same = False
            tally.refused += 1
        except Exception as error:  # what a person would see as a traceback
            same = False
            tally.failures.append(f"{what}: {type(error).__name__}: {error}")
        if code == 0 and not same:
            tally.failures.append(f"{what}: refused or changed, and verify found nothing")
        tally.found += code == 1
        tally.harmless += code == 0 and same
        if code == 1 and number % 10 == 0:
            mend(cache, what, tally)
        file.write_bytes(content)


def mend(cache: Path, what: str, tally: Tally) -> None:
    """Repair a copy."""
    copy = cache.with_name("copy.zarr")
    shutil.copytree(cache, copy)
    code, output = command("repair", str(copy))
    if code not in (0, 1):
        tally.failures.append(f"{what}: repair: {output}")
    tally.mended[code == 0 and command("verify", str(copy))[0] == 0] += 1
    shutil.rmtree(copy)


def rewrite(cache: Cache, path: Path, **header: Any) -> Path:
    """Write a finished cache's values again, in another form."""
    writer = CacheWriter(path, replace(cache.header, **header))
    if (weights := cache.classifier()) is not None:
        writer.write_classifier(*weights)
    unit = writer.header.block_rows * writer.header.shard_blocks
    for name, split in cache.items():
        writer.prepare(name, split.rows, split.images)
        arrays = {key: split.read(key) for key in cache.header.arrays()}
        for start in range(0, split.rows, unit):
            rows = {key: array[start : start + unit] for key, array in arrays.items()}
            writer.write_block(name, start // writer.header.block_rows, rows)
        writer.seal(name)
    return path


def run_changes(folder: Path, changes: int, seed: int) -> Tally:
    """Half of the changes on a plain cache, half on one with shards, made in an empty folder."""
    tally, dice = Tally(), random.Random(seed)
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).parents[1] / "tests/conftest.py")
    assert spec is not None and spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    plain = tests.build_cache(folder / "plain.zarr")
    corrupt(folder / "plain.zarr", changes - changes // 2, dice, tally)
    corrupt(rewrite(plain, folder / "sharded.zarr", shard_blocks=2), changes // 2, dice, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("--changes", 500), ("--seed", 0)):
        parser.add_argument(option, type=int, default=value)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = run_changes(Path(folder), asked.changes, asked.seed)
    for failure in tally.failures:
        print(failure)
    print(
        f"{asked.changes} changed bytes: {tally.found} found by verify ({tally.refused} refused by a reader too),"
        f" {tally.harmless} changed no value; repair: {tally.mended[True]} of {tally.mended.total()} copies whole"
        f" afterwards; {len(tally.failures)} failures"
    )
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
