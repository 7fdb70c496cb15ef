"""`nacpipe reproduce`: the paper's rows beside ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nacpipe.cli.extract import workers_option
from nacpipe.cli.output import note, output_options, percent, print_frame, print_table

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.benchmarks.standard import Benchmark
    from nacpipe.evaluation.reproduction import Missing, Reproduction
    from nacpipe.method.params import NacParams

_SHOWN = {"auroc": "AUROC", "fpr95": "FPR@95"}


@click.command()
@click.argument("benchmark")
@click.option(
    "--data-root", type=click.Path(path_type=Path), help="Folder with benchmark_imglist/ and the images; default: data."
)
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
              help="Folder of OpenOOD's trained networks.")  # fmt: skip
@click.option("--cache", metavar="PATH", help="Of each run, with {run} for its name; default: cache/….")
@click.option("--download", is_flag=True, help="Fetch what is missing first.")
@click.option("--mirror", metavar="URL", help="Fetch URL/NAME.zip instead of from Google Drive.")
@click.option("--device", default="auto", show_default=True, help="cuda, mps, cpu, …")
@click.option("--batch-size", type=int, default=128, show_default=True, help="Images at once.")
@workers_option
@click.option("--dry-run", is_flag=True, help="Print what is missing and how to get it, and stop.")
@output_options
def reproduce(
    benchmark: str,
    data_root: Path | None,
    results: Path,
    cache: str | None,
    download: bool,
    mirror: str | None,
    device: str,
    batch_size: int,
    workers: int | None,
    dry_run: bool,
    output: str | None,
) -> None:
    """Print the published rows of BENCHMARK (cifar10, cifar100, imagenet200 or imagenet) beside ours, run by run.

    From OpenOOD's trained networks and images: every run is extracted, scored with the paper's parameters (for
    imagenet200, of which none are printed, with what a search in the paper's space finds), and compared. Stopped at any
    moment, the same command goes on where it was. On a terminal in percent; as JSON, CSV and Markdown in fractions.

    \b
    nacpipe reproduce cifar10 --data-root data --dry-run
    nacpipe reproduce cifar10 --data-root data --download
    nacpipe reproduce cifar100 --data-root data --results results --markdown
    """
    from nacpipe.benchmarks.toml import choose_root, open_benchmark
    from nacpipe.errors import InputError
    from nacpipe.evaluation.reproduction import compare_with_published, find_missing, find_reproduction

    reproduction = find_reproduction(benchmark)
    opened = open_benchmark(benchmark)
    root = choose_root(opened, data_root)
    if download and not dry_run:
        _download(reproduction, opened, root, results, mirror)
    missing = find_missing(reproduction, opened, root, results, mirror)
    if dry_run:
        _print_missing(missing, reproduction, output)
        return
    if missing:
        commands = " && ".join(dict.fromkeys(one.command for one in missing))
        raise InputError(
            f"{', '.join(one.what for one in missing)}: not there; get them with --download, or with: {commands}"
        )
    from nacpipe.cache import open_cache
    from nacpipe.cli.extract import extract_requests, make_requests
    from nacpipe.evaluation.method_scores import score_cache
    from nacpipe.evaluation.training_runs import check_runs

    requests = make_requests(
        benchmark=benchmark,
        model=reproduction.model,
        checkpoint=reproduction.checkpoint(results),
        cache=cache,
        data_root=root,
        splits=reproduction.splits(opened),
        device=device,
        batch_size=batch_size,
        workers=workers,
    )
    if not extract_requests(requests):
        return  # another process of the same torchrun prints the result
    caches = [open_cache(request.cache) for request in requests]
    check_runs(caches)
    scored = [score_cache(one, _params(reproduction, str(one.path))) for one in caches]
    names = [
        request.checkpoint.parent.name if reproduction.runs and request.checkpoint else "run" for request in requests
    ]
    frame = compare_with_published(scored, names, benchmark)
    if output:
        print_frame(frame, output)
        return
    _print_comparison(frame, names, reproduction)


def _params(reproduction: Reproduction, cache: str) -> NacParams:
    """The paper's parameters, or what a search in its space finds."""
    if reproduction.params is not None:
        return reproduction.params
    from nacpipe.cli.search import run_search
    from nacpipe.tuning.request import SearchRequest

    return run_search(SearchRequest(cache=Path(cache), space="paper")).params


def _download(reproduction: Reproduction, benchmark: Benchmark, root: Path, results: Path, mirror: str | None) -> None:
    """Fetch the lists, unless there are some, the images and the weights."""
    from nacpipe.benchmarks.download import choose_archives, download_archives

    wanted = list(reproduction.archives())
    if (root / "benchmark_imglist" / reproduction.benchmark).is_dir():
        wanted = [name for name in wanted if not name.startswith("benchmark_imglist")]
    archives = choose_archives(benchmark, wanted, checkpoints=True, root=root)
    for problem in download_archives(benchmark, archives, root, results, mirror=mirror, note=note):
        note(problem)


def _print_missing(missing: list[Missing], reproduction: Reproduction, output: str | None) -> None:
    if output:
        import pandas as pd

        print_frame(pd.DataFrame(missing, columns=["what", "state", "command"]), output)
        return
    if missing:
        print_table(("missing", "state"), [(one.what, one.state) for one in missing], left=2)
    for command in dict.fromkeys(one.command for one in missing):
        note(f"get it with: {command}")
    if not missing:
        note(f"nothing is missing: {reproduction.model}, weights {reproduction.weights}")


def _print_comparison(frame: pd.DataFrame, names: list[str], reproduction: Reproduction) -> None:
    lines = [
        (
            f"{row['group']} {row['dataset']}",
            _SHOWN[row["metric"]],
            _spread(row["published"], row["published_std"]),
            *(percent(row[name]) for name in names),
            _spread(row["ours"], row["ours_std"] if len(names) > 1 else math.nan),
            "–" if math.isnan(row["difference"]) else f"{100 * row['difference']:+.2f}",
        )
        for row in frame.to_dict("records")
    ]
    print_table(("set", "metric", "published", *names, "ours", "difference"), lines, left=2)
    source = "the paper's" if reproduction.params is not None else "searched in the paper's space"
    click.echo(f"\n{frame['network'].iloc[0]} on {reproduction.benchmark}; parameters: {source}; all in percent")


def _spread(value: float, deviation: float) -> str:
    return percent(value) + ("" if math.isnan(deviation) else f" ± {percent(deviation)}")
