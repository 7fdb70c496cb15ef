"""`nacpipe data`: which images are there, the download of the others, and the cut of train lists."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nacpipe.cli.output import Progress, note, print_json, print_table, split_names
from nacpipe.errors import InputError
from nacpipe.text import command_line

if TYPE_CHECKING:
    from nacpipe.benchmarks.download import DownloadPlan
    from nacpipe.benchmarks.standard import Benchmark
    from nacpipe.benchmarks.status import SetStatus

_root = click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder with benchmark_imglist/ and the images; default: data, or what FILE.toml says.",
)


@click.group()
def data() -> None:
    """See which images of a benchmark are there, and get the others.

    \b
    nacpipe data status cifar10 --data-root data
    nacpipe data download cifar10 --data-root data
    nacpipe data split-train cifar10 --count 1000 --seed 1
    """


@data.command()
@click.argument("benchmark")
@_root
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(benchmark: str, data_root: Path | None, as_json: bool) -> None:
    """Print, set by set, what of BENCHMARK (a name, or your own FILE.toml) is there.

    Looks for every listed file; opens none. The exit code is 1 where labels of an ID or csid set are no classes.

    \b
    nacpipe data status cifar10 --data-root data
    """
    from nacpipe.benchmarks.toml import choose_root, open_benchmark

    opened = open_benchmark(benchmark)
    sets = print_status(opened, choose_root(opened, data_root), as_json)
    if wrong := [one.split for one in sets if one.wrong_labels]:
        raise InputError(f"labels that are no classes: {', '.join(wrong)}; see above, correct their lists")


@data.command()
@click.argument("benchmark")
@_root
@click.option("--only", callback=split_names, metavar="A,B", help="Only these archives.")
@click.option("--checkpoints", is_flag=True, help="OpenOOD's trained networks too.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
              help="Where the trained networks go.")  # fmt: skip
@click.option("--mirror", metavar="URL", help="Fetch URL/NAME.zip instead of from Google Drive.")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched, and stop.")
def download(
    benchmark: str,
    data_root: Path | None,
    only: tuple[str, ...],
    checkpoints: bool,
    results: Path,
    mirror: str | None,
    dry_run: bool,
) -> None:
    """Fetch OpenOOD's archives for BENCHMARK, unpack them, and check that every listed file is there.

    Complete archives are not fetched again; stopped at any moment, the same command goes on. Needs gdown: pip install
    'nacpipe[data]'. Lists are OpenOOD's of 2024-07-30; the older ones, which the authors of NAC-UE used, are
    benchmark_imglist_authors.

    \b
    nacpipe data download cifar10 --data-root data --dry-run
    nacpipe data download cifar10 --data-root data --only benchmark_imglist,mnist
    nacpipe data download cifar10 --data-root data --checkpoints
    nacpipe data download imagenet --data-root data --only benchmark_imglist_authors
    """
    from nacpipe.benchmarks.download import choose_archives, download_archives, plan_download, read_lists
    from nacpipe.benchmarks.toml import choose_root, open_benchmark
    from nacpipe.errors import DownloadError

    opened = open_benchmark(benchmark)
    root = choose_root(opened, data_root)
    archives = choose_archives(opened, only, checkpoints, root)
    if dry_run:
        lists = read_lists(opened, root)
        _print_downloads([plan_download(opened, archive, lists, root, results, mirror) for archive in archives])
        return
    with _Unpacking() as progress:
        problems = download_archives(opened, archives, root, results, mirror=mirror, note=note, progress=progress)
    print_status(opened, root, as_json=False)
    if problems:
        raise DownloadError("; ".join(problems))


@data.command("split-train")
@click.argument("benchmark")
@_root
@click.option("--count", type=int, default=1000, show_default=True, help="Images of sub_train, as many of each class.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=1, show_default=True, help="Of the choice.")
@click.option("--redo", is_flag=True, help="Write lists that are there anew.")
def split_train(benchmark: str, data_root: Path | None, count: int, seed: int, redo: bool) -> None:
    """Cut BENCHMARK's train list into main_train and sub_train, by the authors' rule.

    Coverage is built from main_train; on sub_train the search sees whether it overfits.

    \b
    nacpipe data split-train cifar10 --data-root data --count 1000 --seed 1
    """
    from nacpipe.benchmarks.toml import choose_root, open_benchmark
    from nacpipe.benchmarks.train_split import plan_split, write_split

    opened = open_benchmark(benchmark)
    split = plan_split(opened, choose_root(opened, data_root), count, seed)
    write_split(split, redo)
    print_table(
        ("list", "images"),
        [(str(split.main), str(len(split.main_lines))), (str(split.sub), str(len(split.sub_lines)))],
    )


def print_status(benchmark: Benchmark, root: Path, as_json: bool) -> list[SetStatus]:
    """Print one line per set, and what to do next; return what was printed."""
    from nacpipe.benchmarks.archives import has_archives
    from nacpipe.benchmarks.download import unlisted_splits
    from nacpipe.benchmarks.status import read_status

    sets = read_status(benchmark, root)
    if as_json:
        print_json(
            [
                {
                    "split": s.split,
                    "list": s.source,
                    "images": s.images,
                    "missing": s.missing,
                    "wrong_labels": s.wrong_labels,
                    "state": s.state,
                }
                for s in sets
            ]
        )
        return sets
    rows = [(s.split, s.source, s.state, str(s.images or ""), str(s.missing or "")) for s in sets]
    print_table(("split", "list", "state", "images", "missing"), rows, left=3)
    for s in sets:
        if s.missing:
            note(f"{s.split}: {s.missing} of {s.images} images are not there, the first {s.first}")
        if s.is_made:
            note(f"{s.split}: until its images are there, extract makes it from those of id/val")
        if s.wrong_labels:
            note(f"{s.split}: {s.label_problem}")
    if has_archives(benchmark.name):
        unlisted = ("id/subtrain", *unlisted_splits(benchmark, root))
        incomplete = [s.split for s in sets if not s.complete and s.split not in unlisted]
        if incomplete:
            note(f"get what is missing: {command_line('data', 'download', benchmark.name, '--data-root', root)}")
        elif not next(s for s in sets if s.split == "id/subtrain").complete:
            command = command_line("data", "split-train", benchmark.name, "--data-root", root)
            note(f"make the list of id/subtrain: {command}")
    return sets


def _print_downloads(plans: list[DownloadPlan]) -> None:
    rows = [(p.archive.name, p.state, str(p.target), p.url) for p in plans]
    print_table(("archive", "state", "into", "from"), rows, left=4)
    note("sizes are not known before an archive is fetched")


class _Unpacking(ExitStack):
    """Progress over archives that come one after another, each with its own total."""

    _bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None or done < self._bar.done:
            self.close()
            self._bar = self.enter_context(Progress("unpack", {"bytes": total}, unit="B"))
        self._bar.step(done - self._bar.done, "bytes")
