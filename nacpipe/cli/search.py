"""`nacpipe search`: tune bins, alpha, saturation and layer weights against a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nacpipe.cli.show import Progress, note, print_json, print_table, split_names

if TYPE_CHECKING:
    from nacpipe.search.result import SearchResult
    from nacpipe.search.study import Search

DEFAULT_TRIALS = 2000


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--trials", type=int, default=DEFAULT_TRIALS, show_default=True, help="Completed trials to reach.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Stop after this time.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Another seed is another study.")
@click.option("--threads", type=click.IntRange(1), help="Cores to use; default: all.")
@click.option("--layers", callback=split_names, metavar="A,B", help="Layers to use; default: all in the cache.")
@click.option("--storage", metavar="URL", help="Journal file or database URL; default: X.study.log beside X.zarr.")
@click.option("--study", default="nac", show_default=True, help="The study's name in its storage.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: X.params.json beside X.zarr.")
@click.option("--status", is_flag=True, help="Show the study as it is and run nothing.")
@click.option("--dry-run", is_flag=True, help="Print layers, ranges and what would be run, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def search(
    cache: Path,
    trials: int,
    timeout: float | None,
    seed: int,
    threads: int | None,
    layers: tuple[str, ...],
    storage: str | None,
    study: str,
    output: Path | None,
    status: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find the parameters under which NAC best tells id/val from ood/val in CACHE.

    CPU only; the network is not needed. The same command continues the same study until it has the trials asked for.
    No test split is ever read.

    \b
    nacpipe search cache/digits-digits_cnn.zarr
    nacpipe search cache/digits-digits_cnn.zarr --trials 5000 --timeout 600
    nacpipe search cache/digits-digits_cnn.zarr --status
    """
    from nacpipe.artifact import check_writable
    from nacpipe.search.result import SearchRequest
    from nacpipe.search.study import Search

    if output is not None and not (status or dry_run):
        check_writable(output)
    request = SearchRequest(
        cache=cache, trials=trials, timeout=timeout, seed=seed, layers=layers, threads=threads, storage=storage,
        study=study, output=output,
    )  # fmt: skip
    found = Search(request, create=not (status or dry_run))
    if dry_run:
        _print_plan(found, as_json)
    elif status:
        print_result(found.result("stopped"), found, as_json)
        note(f"go on, or ask for more with --trials N: {found.command()}")
    else:
        run_search(found, as_json)


def run_search(search: Search, as_json: bool = False) -> SearchResult:
    """Run a search with progress on stderr, write the parameters, print what was found."""
    from nacpipe.artifact import write_params
    from nacpipe.search.storage import only_runner

    target = search.request.target
    done = len(search.completed())
    if done >= search.request.trials:
        note(f"the study has {done} completed trials already; more with --trials N")
    progress = Progress(search.request.trials, done)
    with only_runner(search.request.where, search.request.study_name):
        result = search.run(lambda told, best: progress.step(1, f"search  best {100 * best:.2f} %"))
    _say_what_is_replaced(target, search)
    write_params(target, result.params, result=result.to_json(), made_by=search.made_by())
    print_result(result, search, as_json)
    note(f"wrote {target}")
    if result.ended == "interrupted":
        raise KeyboardInterrupt
    if result.ended == "timeout":
        note(f"time is up; go on with: {search.command()}")
    else:
        named = f" --params {target}" if search.request.output else ""
        note(f"next: nacpipe evaluate {search.request.cache}{named}")
    return result


def _say_what_is_replaced(target: Path, search: Search) -> None:
    """Another study's result is not replaced without a word."""
    import json

    try:
        before = json.loads(target.read_text("utf-8"))
        name, value = before["made_by"]["study_name"], before["result"]["val_auroc"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if name != search.request.study_name:
        note(f"{target} held the result of {name} ({_percent(value)} %); it is replaced, keep both with --output FILE")


def print_result(result: SearchResult, search: Search, as_json: bool) -> None:
    """Print what a study has found."""
    if as_json:
        print_json({**result.params.to_json(), "result": result.to_json(), "made_by": search.made_by()})
    else:
        rows = [
            (
                name,
                str(p.bins),
                str(p.saturation),
                f"{p.alpha:.4g}",
                f"{p.weight:.4f}",
                _percent(result.alone.get(name)),
            )
            for name, p in result.params.layers.items()
        ]
        print_table(("layer", "bins", "saturation", "alpha", "weight", "alone, AUROC %"), rows)
        checks = result.checks
        click.echo(
            f"\nid/val against ood/val: AUROC {_percent(checks.val_auroc)} % (Energy {_percent(result.energy_val)} %),"
            f" FPR@95 {_percent(checks.val_fpr95)} %"
        )
        if checks.subtrain_auroc is None:
            click.echo("overfitting check: the cache has no id/subtrain")
        else:
            click.echo(
                f"overfitting check, id/val against id/subtrain: AUROC {_percent(checks.subtrain_auroc)} %"
                f" (50 is ideal; Energy's {_percent(result.energy_subtrain)} %)"
            )
        click.echo(f"{result.trials} trials in {result.seconds:.1f} s, seed {result.seed}, {search.request.where}")
    if result.overfits:
        note(
            "warning: NAC tells training images from others more than 3 points better than Energy does; the coverage"
            " may be overfitted: more --train-images, fewer bins or a higher saturation help"
        )


def _print_plan(search: Search, as_json: bool) -> None:
    from nacpipe.search.space import to_json

    done = len(search.completed())
    space = to_json(search.space())
    if as_json:
        print_json({"study": search.request.where, "done": done, "trials": search.request.trials, "space": space})
        return
    print_table(
        ("layer", "bins", "saturation", "alpha"),
        [
            (name, *(f"{low:.4g} … {high:.4g}" for low, high in (r["bins"], r["saturation"], r["alpha"])))
            for name, r in space.items()
        ],
    )
    splits = ", ".join(f"{name} ({rows.stop - rows.start})" for name, rows in search.scorer.rows.items())
    click.echo(f"\nid/train ({search.scorer.train_rows}) is counted; scored: {splits}")
    click.echo(f"study {search.request.where}: {done} of {search.request.trials} trials done")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
