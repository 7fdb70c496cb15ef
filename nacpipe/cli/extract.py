"""`nacpipe extract`: run the network once, write every layer's states to a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.show import Progress, format_bytes, note, print_json, print_table, split_names

if TYPE_CHECKING:
    from nacpipe.network.plan import ExtractRequest, Plan


def extract_options(command: Any) -> Any:
    """Add the options that say what to extract; `run` has them too."""
    options = [
        click.argument("benchmark"),
        click.option("--model", metavar="NAME", help="The network; for digits: digits_cnn."),
        click.option("--checkpoint", type=click.Path(path_type=Path), help="The network's weights."),
        click.option("--layers", callback=split_names, metavar="A,B", help="Layers to tap; default: the paper's four."),
        click.option("--data-root", type=click.Path(path_type=Path), default=Path("data"), show_default=True,
                     help="Folder with benchmark_imglist/ and the images."),
        click.option("--cache", type=click.Path(path_type=Path), help="Default: cache/BENCHMARK-MODEL.zarr."),
        click.option("--train-images", type=int, default=1000, show_default=True,
                     help="Images of id/train, the same number of each class."),
        click.option("--train-seed", type=int, default=1, show_default=True, help="Seed of their choice."),
        click.option("--batch-size", type=int, default=128, show_default=True, help="Images at once."),
        click.option("--device", default="auto", show_default=True, help="cuda, mps, cpu, …"),
        click.option("--splits", callback=split_names, metavar="A,B", help="Only these; default: all that are there."),
        click.option("--force", callback=split_names, metavar="A,B", help="Drop these splits and extract them again."),
        click.option("--allow-truncated", is_flag=True, help="Load truncated images as OpenOOD does."),
        click.option("--workers", type=click.IntRange(0), default=2, show_default=True,
                     help="Threads that decode images."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@extract_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result as JSON.")
@click.pass_obj
def extract(command: str, /, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Run a network over BENCHMARK's images once and write its states to a cache.

    Stopped at any moment, the same command goes on where it was.

    \b
    nacpipe extract digits
    nacpipe extract cifar10 --model resnet20 --checkpoint resnet20.th --data-root data --dry-run
    """
    from nacpipe.network.plan import plan_extraction

    request = make_request(command, **asked)
    plan = plan_extraction(request)
    for text in plan.notes:
        note(text)
    if dry_run:
        print_plan(plan, as_json)
        return
    extract_plan(plan)
    from nacpipe.cache import open_cache
    from nacpipe.cli.inspect import print_splits
    from nacpipe.search.inspection import summarise_splits

    frame = summarise_splits(open_cache(request.cache))
    if as_json:
        print_json({"cache": str(request.cache), "splits": frame.to_dict("records")})
        return
    print_splits(frame)
    note(f"next: nacpipe search {request.cache}")


def make_request(command: str, **asked: Any) -> ExtractRequest:
    """Fill in what depends on the benchmark: its network and the cache's place."""
    from nacpipe.core.benchmarks import find_benchmark
    from nacpipe.errors import InputError
    from nacpipe.network.models import MODELS
    from nacpipe.network.plan import ExtractRequest, name_cache

    benchmark = find_benchmark(asked["benchmark"])
    if asked["model"] is None:
        if not benchmark.packaged:
            raise InputError(f"{benchmark.name} needs a network: --model NAME; known: {', '.join(MODELS)}")
        asked["model"] = "digits_cnn"
    if asked["cache"] is None:
        asked["cache"] = name_cache(benchmark.name, asked["model"])
    return ExtractRequest(command=command, **asked)


def extract_plan(plan: Plan) -> None:
    """Extract with progress on stderr."""
    from nacpipe.network.extract import extract as run_plan

    progress = Progress(plan.todo_rows)
    run_plan(plan, lambda split, rows: progress.step(rows, f"extract {split}"))


def print_plan(plan: Plan, as_json: bool) -> None:
    """Print what would be done."""
    from nacpipe.network.plan import total_bytes

    rows = [
        {
            "split": s.images.name,
            "list": s.images.source,
            "rows": s.rows,
            "blocks": s.blocks,
            "blocks_to_write": len(s.todo),
            "bytes": total_bytes(plan, [s]),
            "state": s.state,
        }
        for s in plan.splits
    ]
    if as_json:
        print_json({"cache": str(plan.request.cache), "exists": plan.exists, "splits": rows, "notes": plan.notes})
        return
    print_table(
        ("split", "list", "rows", "blocks", "to write", "raw", "state"),
        [
            (
                str(r["split"]), str(r["list"]), str(r["rows"]), str(r["blocks"]), str(r["blocks_to_write"]),
                format_bytes(int(str(r["bytes"]))), str(r["state"]),
            )
            for r in rows
        ],
        left=2,
    )  # fmt: skip
    layers = ", ".join(f"{s.name} ({s.neurons})" for s in plan.header.layers)
    click.echo(f"\n{plan.request.cache}: {'goes on' if plan.exists else 'new'}, {plan.todo_rows} images to run")
    click.echo(f"layers (neurons): {layers}; device {plan.network.device}, batches of {plan.request.batch_size}")
