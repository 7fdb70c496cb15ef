"""Change one byte of a cache, again and again: each is found by verify or changes no value, and none is a traceback.

A cache of random numbers (two layers, seven splits, blocks of 16 rows), first plain, then sharded. Half of the bytes
are drawn from all chunks, half from all zarr.json; the new value is any other one. After each change, and before the
byte is put back:

    verify     the command; its exit code must be 0 or 1
    scores     of all splits, logits, labels, the classifier: equal to those before, or refused in words

Then copies are damaged and repaired, each kind of object in turn: a byte is changed, or the object is lost, emptied or
cut in two; or two chunks of an array are exchanged. Of every kind what docs/trust.md promises is compared: what verify
names, what repair prints, which blocks an extract then writes, and that all values and digests are those before. The
copy of all metadata in the root's zarr.json is a kind of its own, and so are the labels of many blocks in one chunk.

    python bench/corrupt.py [--changes 500] [--repairs 50] [--seed 0]      exit code 1 where a promise is broken
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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
from nacpipe.cache.layout import is_whole
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
    repaired: Counter[str] = field(default_factory=Counter)  # by kind
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
    for _ in range(changes):
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
        file.write_bytes(content)


REPAIRED = ("id/train", "id/val", "ood/near/letters")  # splits of the copies that are repaired
KINDS = ("root", "copy", "group", "classifier", "attributes", "array", "mark", "rows", "labels", "exchanged")


def kind_of(file: str, cache: Cache) -> str:
    """What of a cache a file is, by its path from the root; the root's copy of all metadata is told by `is_copy`."""
    split = next((name for name in cache if file.startswith(f"{name}/")), "")
    inside = file.removeprefix(f"{split}/") if split else file
    if not split:
        return "root" if file == "zarr.json" else "classifier" if file.startswith("classifier/") else "group"
    if inside == "zarr.json":
        return "attributes"
    if inside.endswith("zarr.json"):
        return "group" if inside.removesuffix("/zarr.json") in cache.header.groups() else "array"
    array = inside.rpartition("/")[0]
    if array == "blocks":
        return "mark"
    return "labels" if is_whole(cache.peek(split).array(array), cache.header) else "rows"


def is_copy(before: bytes, after: bytes | None) -> bool:
    """Whether of the root's zarr.json only the consolidated metadata changed."""
    try:
        one, other = json.loads(before), json.loads(after or b"")
        return {**one, "consolidated_metadata": 0} == {**other, "consolidated_metadata": 0}
    except (ValueError, TypeError):
        return False


def damage(file: Path, dice: random.Random) -> str:
    """Change a byte of a file, or lose, empty or cut it; return which."""
    content, how = file.read_bytes(), dice.choice(["byte", "byte", "lost", "empty", "cut"])
    if how == "lost":
        file.unlink()
    elif how == "byte":
        place = dice.randrange(len(content))
        byte = bytes([(content[place] + dice.randrange(1, 256)) % 256])
        file.write_bytes(content[:place] + byte + content[place + 1 :])
    else:
        file.write_bytes(content[: 0 if how == "empty" else len(content) // 2])
    return how


def exchange(path: Path, cache: Cache, dice: random.Random) -> str:
    """Exchange two whole chunks of an array; return the first one's file."""
    split, array = dice.choice(list(cache)), dice.choice([*cache.header.arrays()][:-2])
    chunks = sorted((path / split / array).glob("c.*"))
    first, second = dice.sample(chunks, 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return str(first.relative_to(path))


def extract_missing(path: Path, whole: Cache) -> list[tuple[str, int]]:
    """Write what a repaired cache lacks with the values of the whole one, as extract does; return the blocks."""
    writer, written = CacheWriter(path, whole.header), []
    if (weights := whole.classifier()) is not None:
        writer.write_classifier(*weights)
    unit = whole.header.block_rows * whole.header.shard_blocks
    for name, split in whole.items():
        there = open_cache(path)
        if name in there and there.peek(name).sealed:
            continue
        marks = writer.prepare(name, split.rows, split.images, label=split.label, index=split.index)
        for first in range(0, len(marks), whole.header.shard_blocks):
            if marks[first : first + whole.header.shard_blocks].all():
                continue
            rows = slice(first * whole.header.block_rows, first * whole.header.block_rows + unit)
            writer.write_block(name, first, {key: split.read(key, rows) for key in whole.header.arrays()})
            written.append((name, first))
        writer.seal(name)
    return written


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def check_repair(whole: Cache, values: dict[str, Any], kind: str, dice: random.Random, tally: Tally) -> None:
    """Damage a copy in one place and compare what verify, repair and extract do with what is promised of the kind."""
    path = Path(whole.path).with_name("copy.zarr")
    before = contents(Path(whole.path))
    files = ["zarr.json"] if kind == "copy" else [file for file in before if kind_of(file, whole) == kind]
    while True:  # until something is changed that matters: blanks in metadata do not
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole.path, path)
        if kind == "exchanged":
            file, how = exchange(path, whole, dice), "exchanged"
        else:
            file = dice.choice(files)
            how = damage(path / file, dice)
        copied = file == "zarr.json" and is_copy(before[file], contents(path).get(file))
        code, named = command("verify", str(path))
        if code != 0 and copied == (kind == "copy"):
            break
    damaged = contents(path)
    mended, said = command("repair", str(path))
    split = next((name for name in whole if file.startswith(f"{name}/")), "")
    array, _, name = file.removeprefix(f"{split}/").rpartition("/")
    number = name.split(".")[1]  # of a chunk: c.7.0
    problems = []

    def promise(holds: bool, what: str) -> None:
        if not holds:
            problems.append(what)

    if kind == "root":
        promise(mended == 1 and said.count("\n") == 1 and " --cache" in said, "the root is not refused in one line")
        promise(contents(path) == damaged, "something was changed")
    else:
        first = int(number) * whole.header.shard_blocks if kind == "rows" else 0
        blocks = -(-whole[split].rows // whole.header.block_rows) if split else 0
        units = range(0, blocks, whole.header.shard_blocks)
        lines = {
            "copy": "consolidated metadata renewed",
            "group": f"{Path(file).parent}: metadata rewritten",
            "classifier": "classifier: is to be written again",
            "attributes": f"{split}: ",
            "exchanged": f"{split}: is not what was sealed",
            "array": f"{Path(file).parent}: metadata rewritten",
            "mark": f"{split}: the mark of block {number} rewritten",
            "rows": f"{split}: block ",
            "labels": f"{split}: {array} is to be written again",
        }
        names = {kind: Path(file).parent.name for kind in ("group", "array")}
        names |= {"classifier": "classifier", "copy": "consolidated metadata"}
        expected = [(split, unit) for unit in units] if kind in ("attributes", "exchanged") else []
        expected += [(split, first)] * (kind == "rows")
        promise(names.get(kind, split) in named, f"verify does not name it: {named}")
        promise(mended == 0 and said.startswith(lines[kind]), f"repair printed: {said}")
        promise(("dropped" in said) == (kind in ("attributes", "exchanged")), f"repair printed: {said}")
        promise((" again" in said) == (open_cache(path).command() in said), f"the command is not printed: {said}")
        promise(command("verify", str(path))[0] == 0, "verify finds damage after the repair")
        kept = {key for key in before if not (split and key.startswith(f"{split}/")) and kind_of(key, whole) != kind}
        kept.remove("zarr.json")  # which holds the copy of all metadata
        promise(all(contents(path).get(key) == before[key] for key in kept), "something undamaged is lost")
        written = extract_missing(path, whole)
        promise(written == expected, f"extract wrote {written}, not {expected}")
        promise(values_of(path) == values, "values differ")
        attributes = [{name: dict(c.peek(name).attributes) for name in c} for c in (whole, open_cache(path))]
        promise(attributes[0] == attributes[1], "attributes or digests differ")
        promise(command("verify", str(path))[0] == 0, "verify finds damage in the end")
        promise((path / "zarr.json").read_bytes() == before["zarr.json"], "the root's zarr.json differs in the end")
    tally.failures += [f"{file} ({how}): {problem}" for problem in problems]
    tally.repaired[kind] += not problems
    shutil.rmtree(path)


def rewrite(cache: Cache, path: Path, **header: Any) -> Path:
    """Write a finished cache's values again, in another form."""
    writer = CacheWriter(path, replace(cache.header, **header))
    if (weights := cache.classifier()) is not None:
        writer.write_classifier(*weights)
    unit = writer.header.block_rows * writer.header.shard_blocks
    for name, split in cache.items():
        writer.prepare(name, split.rows, split.images, label=split.label, index=split.index)
        arrays = {key: split.read(key) for key in cache.header.arrays()}
        for start in range(0, split.rows, unit):
            rows = {key: array[start : start + unit] for key, array in arrays.items()}
            writer.write_block(name, start // writer.header.block_rows, rows)
        writer.seal(name)
    return path


def run_changes(folder: Path, changes: int, repairs: int, seed: int) -> Tally:
    """Half of the changes and repairs on a plain cache, half on one with shards, made in an empty folder."""
    tally, dice = Tally(), random.Random(seed)
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).parents[1] / "tests/conftest.py")
    assert spec is not None and spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    plain = tests.build_cache(folder / "plain.zarr")
    corrupt(folder / "plain.zarr", changes - changes // 2, dice, tally)
    corrupt(rewrite(plain, folder / "sharded.zarr", shard_blocks=2), changes // 2, dice, tally)
    few = tests.build_cache(folder / "few.zarr", rows={name: 0 for name in plain if name not in REPAIRED})
    caches = (few, open_cache(rewrite(few, folder / "few-sharded.zarr", shard_blocks=2)))
    values = values_of(Path(few.path))
    for number in range(repairs):
        place, kind = divmod(number, len(KINDS))
        check_repair(caches[(place + kind) % 2], values, KINDS[kind], dice, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("--changes", 500), ("--repairs", 50), ("--seed", 0)):
        parser.add_argument(option, type=int, default=value)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = run_changes(Path(folder), asked.changes, asked.repairs, asked.seed)
    for failure in tally.failures:
        print(failure)
    print(
        f"{asked.changes} changed bytes: {tally.found} found by verify ({tally.refused} refused by a reader too),"
        f" {tally.harmless} changed no value"
    )
    kinds = ", ".join(f"{kind} {count}" for kind, count in tally.repaired.items())
    print(f"{tally.repaired.total()} of {asked.repairs} damaged copies repaired as promised ({kinds})")
    print(f"{len(tally.failures)} failures")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
