"""`nacpipe search`: tune bins, alpha, saturation and layer weights against a cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.output import Address, Progress, note, percent, print_json, print_table, split_layers
from nacpipe.text import command_line

if TYPE_CHECKING:
    from nacpipe.cache import Cache
    from nacpipe.tuning.request import SearchRequest, SearchResult
    from nacpipe.tuning.study import Search

SAMPLERS = ("terms", "layers", "tpe", "random", "grid", "nsga2", "cmaes")


@click.command()
@click.argument("cache", type=Address())
@click.option("--trials", type=int, help="Completed trials to reach; default: what the space needs, or 2000.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Stop after this time.")
@click.option("--patience", type=int, metavar="N", help="Stop after N trials without improvement.")
@click.option(
    "--space",
    default="auto",
    show_default=True,
    help="auto (all terms), paper, wide, terms, published, or a TOML file.",
)
@click.option("--sampler", type=click.Choice(SAMPLERS), help="Default: terms; in other spaces layers or grid.")
@click.option(
    "--objective",
    type=click.Choice(("auroc", "fpr95", "pareto", "guided")),
    help="Of --val; default: guided, in other spaces auroc.",
)
@click.option("--val", default="ood/val", show_default=True, metavar="SPLIT", help="The split that plays OOD.")
@click.option(
    "--fuse",
    default="auto",
    show_default=True,
    type=click.Choice(("auto", "none", "NCI", "fDBD", "ViM"), case_sensitive=False),
    help="A feature score that is added to the sum; auto: the best in cross-validation, or none.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Another seed is another study.")
@click.option("--threads", type=click.IntRange(1), help="Cores to use; default: all.")
@click.option("--layers", callback=split_layers, metavar="A,B", help="Layers to use, logits too; default: the cache's.")
@click.option("--storage", metavar="URL", help="Journal file or database URL; default: X.study.log beside X.zarr.")
@click.option("--study", default="nac", show_default=True, help="The study's name in its storage.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: X.params.json beside X.zarr.")
@click.option("--status", is_flag=True, help="Show the study as it is and run nothing.")
@click.option("--explain", is_flag=True, help="Show what mattered in the study and run nothing.")
@click.option("--dry-run", is_flag=True, help="Print layers, ranges and what would be run, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def search(status: bool, explain: bool, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Find the parameters under which NAC best tells id/val from ood/val in CACHE.

    CPU only; the network is not needed. The same command continues the same study until it has the trials asked for;
    with a database's URL, many machines share one study. No test split is ever read unless --val names one.

    \b
    nacpipe search cache/digits-digits_cnn.zarr
    nacpipe search cache/digits-digits_cnn.zarr --trials 5000 --timeout 600
    nacpipe search cache/digits-digits_cnn.zarr --explain
    nacpipe search cache/digits-digits_cnn.zarr --storage postgresql://nac@db/studies
    """
    from nacpipe.files import check_writable
    from nacpipe.tuning.request import SearchRequest
    from nacpipe.tuning.study import Search

    request = SearchRequest(**asked)
    if not (status or explain or dry_run):
        if request.output is not None:
            check_writable(request.output)
        run_search(request, as_json)
        return
    found = Search(request, create=False)
    if dry_run:
        _print_plan(found, as_json)
    elif explain:
        print_explanation(found, as_json)
    else:
        result = found.result("stopped")
        print_result(result, found, as_json)
        if result.advice:
            note(f"try: {result.advice}")
        done = len(found.completed())
        more = "it is complete; more with --trials N" if done >= found.trials else f"go on with: {found.command()}"
        note(f"{done} of {found.trials} trials; {more}")


def run_search(request: SearchRequest, as_json: bool = False) -> SearchResult:
    """Run a search with progress on stderr, write the parameters, print what was found."""
    from nacpipe.tuning.library import save_result
    from nacpipe.tuning.storage import only_runner
    from nacpipe.tuning.study import Search

    with only_runner(request.where, request.study_name):  # before the study is made: two at once would both make it
        search = Search(request)
        result = _run(search)
    target = save_result(search, result, note)
    print_result(result, search, as_json)
    note(f"wrote {target}")
    if result.advice:
        note(f"try: {result.advice}")
    if result.ended == "interrupted":
        raise KeyboardInterrupt
    if result.ended == "timeout":
        note(f"time is up; go on with: {search.command()}")
    elif result.ended == "patience" and request.patience:
        note(f"no improvement in {request.patience} trials; go on with more: {search.command(2 * request.patience)}")
    else:
        named: list[str | Path] = ["--params", target] if request.output or target != request.target else []
        note(f"next: {after_search(search.cache, *named)}")
    return result


def after_search(cache: Cache, *named: str | Path) -> str:
    """Return the command that comes next.

    `evaluate`; `extract` where what it evaluates is not finished; `export` of a cache that has nothing to evaluate.
    """
    test = [name for name in cache if name == "id/test" or name.startswith(("ood/near/", "ood/far/"))]
    finished = [name for name in test if cache.peek(name).sealed]
    if "id/test" in finished and len(finished) > 1:
        return command_line("evaluate", cache.path, *named)
    return cache.command() if len(finished) < len(test) else command_line("export", cache.path, *named)


def _run(search: Search) -> SearchResult:
    from nacpipe.tuning.runner import run
    from nacpipe.tuning.validation import SHOWN

    request = search.request
    done = len(search.completed())
    if done >= search.trials:
        note(f"the study has {done} completed trials already; more with --trials N")
    if request.val.startswith(("id/test", "csid/", "ood/near/", "ood/far/")):
        note(f"{request.val} is a test set: what is found on it says nothing about how well NAC does there")
    shown = SHOWN[request.aim]
    best = {"auroc": "best", "pareto": shown}.get(request.aim, f"best {shown}")
    with Progress("search", {"": search.trials}, {"": done}, unit="trial") as progress:
        return run(search, lambda told, value: progress.step(told - progress.done, more=f"{best} {100 * value:.2f} %"))


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
                percent(result.alone.get(name)),
                *_choices(search, name, p),
            )
            for name, p in result.params.layers.items()
        ]
        extra = [field for field in ("source", "edges") if _chosen(search, field)]
        if (fused := result.params.fused) is not None:
            rows.append((fused.method, "", "", "", f"{fused.weight:.4f}", "", *[""] * len(extra)))
        print_table(("term", "bins", "saturation", "alpha", "weight", "alone, AUROC %", *extra), rows)
        checks = result.checks
        guide = "" if result.guide is None else f" ({result.guide} {percent(result.guide_val)} %)"
        click.echo(
            f"\nid/val against {search.request.val}: AUROC {percent(checks.val_auroc)} %{guide},"
            f" FPR@95 {percent(checks.val_fpr95)} %"
        )
        if (crossed := result.cross_validated) is not None:
            own = "" if crossed.guide is None else f" ({result.guide} {percent(crossed.guide)} %)"
            click.echo(
                f"cross-validated: AUROC {percent(crossed.images)} % over images{own},"
                f" {percent(crossed.clusters)} % over the classes that {search.request.val} is predicted as"
            )
        if fused is not None:
            alone = ""
            if crossed is not None and (without := result.without_fusion) is not None:
                alone = (
                    f"; without it {percent(without.images)} % over images, {percent(without.clusters)} % over classes"
                )
            click.echo(fused.describe() + alone)
        if result.front is not None:
            click.echo(
                f"{result.front} trials are on the front of AUROC and FPR@95; this one is nearest the best of both,"
                " each measured by its extent on the front"
            )
        click.echo(result.overfitting())
        click.echo(f"{result.trials} trials in {result.seconds:.1f} s, seed {result.seed}, {search.request.shown}")


def print_explanation(search: Search, as_json: bool) -> None:
    """Print what mattered in a study: per parameter, per layer, and its history."""
    from nacpipe.tuning.explain import explain

    found = explain(search)
    if as_json:
        print_json(found.to_json())
        return
    parameters = [
        (
            f"{row.layer}.{row.parameter}",
            f"{row.value:.4g}" if isinstance(row.value, float) else str(row.value),
            percent(row.importance),
            row.choices if math.isnan(row.low) else f"{row.low:.4g} … {row.high:.4g}",
            "" if math.isnan(row.place) else _gauge(row.place) + " at the edge" * row.at_edge,
        )
        for row in found.parameters.itertuples()
    ]
    print_table(("parameter", "best", "importance %", "range", "place in it"), parameters, left=1)
    click.echo("")
    layers = [
        (str(row.layer), f"{row.weight:.4f}", percent(row.alone), percent(row.without))
        for row in found.layers.itertuples()
    ]
    print_table(("layer", "weight", "alone, AUROC %", "without it, AUROC %"), layers)
    if found.fused is not None:
        click.echo(found.fused.describe())
    click.echo("")
    click.echo(found.picture())


def _gauge(place: float) -> str:
    """Where a value stands in its range: |--x------|."""
    spots = ["·"] * 11
    spots[round(10 * min(max(place, 0.0), 1.0))] = "●"
    return "".join(spots)


def _chosen(search: Search, field: str) -> bool:
    """True where a field is not the default everywhere."""
    usual = {"source": "product", "edges": "log"}[field]
    return any(getattr(layer, field).values != (usual,) for layer in search.objective.space.values())


def _choices(search: Search, name: str, params: Any) -> list[str]:
    return [str(getattr(params, field)) for field in ("source", "edges") if _chosen(search, field)]


def _print_plan(search: Search, as_json: bool) -> None:
    from nacpipe.tuning.space import to_json

    done = len(search.completed())
    space = to_json(search.objective.space)
    if as_json:
        print_json({"study": search.request.shown, "done": done, "trials": search.trials, "space": space})
        return
    fields = ["bins", "saturation", "alpha"]
    fields += [field for field in ("source", "edges") if _chosen(search, field)]
    print_table(
        ("layer", *fields, "weight"),
        [
            (name, *(_values(asked[field]) for field in fields), _values(asked["weight"]))
            for name, asked in space.items()
        ],
        left=1,
    )
    splits = ", ".join(f"{name} ({rows.stop - rows.start})" for name, rows in search.objective.scorer.rows.items())
    click.echo(f"\nid/train ({search.objective.train_rows}) is counted; scored: {splits}")
    click.echo(
        f"study {search.request.study_name} in {search.request.shown}: {done} of {search.trials} trials done,"
        f" sampler {search.request.how}"
    )


def _values(given: Any) -> str:
    """A field of a space, for a person."""
    if isinstance(given, dict) and set(given) == {"low", "high"}:
        return f"{given['low']:.4g} … {given['high']:.4g}"
    if isinstance(given, dict):
        return "; ".join(f"{source} {_values(value)}" for source, value in given.items())
    return ", ".join(
        f"{v:.4g}" if isinstance(v, float) else str(v) for v in (given if isinstance(given, list) else [given])
    )
