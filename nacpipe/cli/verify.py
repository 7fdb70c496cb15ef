"""`nacpipe verify` names the damage of a cache; `nacpipe repair` prepares damaged rows to be computed again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nacpipe.cli.output import Address, Progress, note, print_json, print_line, print_table
from nacpipe.text import command_line

if TYPE_CHECKING:
    from nacpipe.cache import Cache
    from nacpipe.cache.verify import Damage


SHOWN = 10  # names of foreign files that are printed


@click.command()
@click.argument("cache", type=Address())
@click.option("--format", "metadata_only", is_flag=True, help="Check metadata alone; no chunk is read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(cache: str | Path, metadata_only: bool, as_json: bool) -> None:
    """Read everything in CACHE and name each damaged chunk: split, array and rows. Exit code 1 where there is any.

    Metadata must be as cache/README.md specifies, every chunk must match its checksum, every split its seal. Files that
    do not belong to the cache are named too; they are not damage.

    \b
    nacpipe verify cache/digits-digits_cnn.zarr
    nacpipe verify cache/digits-digits_cnn.zarr --format
    """
    from nacpipe.cache import open_cache
    from nacpipe.cache.verify import check_metadata, foreign_files, verify_cache
    from nacpipe.errors import CacheError

    opened = open_cache(cache)
    if metadata_only:
        damage = check_metadata(opened)
    else:
        with Progress("verify", {name: _rows(opened, name) for name in opened}) as progress:
            damage = verify_cache(opened, lambda split, rows: progress.step(rows, split))
    foreign = foreign_files(opened)
    unfinished = [name for name in opened if not opened.peek(name).sealed]
    if as_json:
        damaged = [asdict(d) | {"rows": d.rows and [d.rows.start, d.rows.stop - 1]} for d in damage]
        print_json({"cache": opened.path, "splits": len(opened), "damage": damaged, "foreign": foreign})
    elif damage:
        print_table(("split", "array", "block", "rows", "what"), [_cells(d) for d in damage], left=5)
    else:
        but = f", {len(unfinished)} of them not finished" if unfinished else ""
        print_line(f"{opened.path}: {len(opened)} splits, {'of the right form' if metadata_only else 'whole'}{but}")
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        note(f"not part of the cache, and left alone: {', '.join(foreign[:SHOWN])}{more}")
    if unfinished:
        note(f"not finished: {', '.join(unfinished)}; finish with: {opened.command()}")
    if damage:
        raise CacheError(f"{opened.path}: {len(damage)} damaged; repair it with: {command_line('repair', opened.path)}")


@click.command()
@click.argument("cache", type=Address())
def repair(cache: str | Path) -> None:
    """Repair CACHE and print the command that computes what is missing then.

    Damaged rows lose their marks, so that the same extract computes exactly those. Metadata of arrays are rewritten.
    A split whose attributes are damaged is dropped, and that is said. A damaged root is refused. Foreign files are left
    alone. A repair that was stopped can be run again.

    \b
    nacpipe repair cache/digits-digits_cnn.zarr
    """
    from nacpipe.cache import open_cache
    from nacpipe.cache.repair import repair_cache

    repaired = repair_cache(cache)
    for line in repaired or [f"{cache}: whole, nothing was done"]:
        note(line)
    if any(line.endswith(" again") for line in repaired):
        print_line(open_cache(cache).command())


def _rows(cache: Cache, name: str) -> int:
    from nacpipe.errors import NacError

    try:
        return cache.peek(name).rows
    except NacError:
        return 0


def _cells(damage: Damage) -> tuple[str, ...]:
    block = "" if damage.block is None else str(damage.block)
    rows = "" if damage.rows is None else f"{damage.rows.start}-{damage.rows.stop - 1}"
    return damage.split, damage.array, block, rows, damage.what
