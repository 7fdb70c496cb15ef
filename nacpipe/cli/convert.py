"""`nacpipe convert`: a copy of a cache in the newest format."""

from __future__ import annotations

from pathlib import Path

import click

from nacpipe.cli.output import Address, Progress, note, print_json, print_line


@click.command()
@click.argument("old", type=Address())
@click.argument("new", type=Address())
@click.option("--dry-run", is_flag=True, help="Print what would be copied.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def convert(old: str | Path, new: str | Path, dry_run: bool, as_json: bool) -> None:
    """Copy the cache OLD to NEW in the newest format, value for value. OLD is not changed.

    Caches of every format are read for ever, but only the newest is read over http. OLD and NEW are folders or URLs;
    parameters and studies of OLD are those of NEW. A stopped conversion goes on with the same command, and so does an
    extraction that was not finished, with NEW.

    \b
    nacpipe convert cache/cifar10-resnet20.zarr cache/cifar10-resnet20-2.zarr
    nacpipe convert cache/cifar10-resnet20.zarr s3://bucket/cifar10-resnet20.zarr
    """
    from nacpipe.cache import open_cache
    from nacpipe.cache.convert import convert_cache
    from nacpipe.cache.layout import FORMAT_VERSION

    opened = open_cache(old)
    rows = {name: opened.peek(name).rows for name in opened}
    unfinished = [name for name in opened if not opened.peek(name).sealed]
    if not dry_run:
        with Progress("convert", rows) as progress:
            convert_cache(old, new, lambda split, count: progress.step(count, split))
    if as_json:
        versions = {"from": opened.header.version, "to": FORMAT_VERSION}
        print_json({"old": opened.path, "new": str(new), "format": versions, "rows": rows, "unfinished": unfinished})
    else:
        would = "would be copied" if dry_run else "copied"
        print_line(
            f"{opened.path}, format {opened.header.version}, {would} to {new}, format {FORMAT_VERSION}:"
            f" {len(rows)} splits, {sum(rows.values())} rows"
        )
    if unfinished:
        command = opened.command() if dry_run else open_cache(new).command()
        note(f"not finished: {', '.join(unfinished)}; finish with: {command}")
