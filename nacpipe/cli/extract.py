"""`nacpipe extract`: run the network once and write every layer's states to a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.output import (
    Address,
    Progress,
    format_bytes,
    note,
    percent,
    print_json,
    print_table,
    split_layers,
    split_names,
)
from nacpipe.files import is_url
from nacpipe.text import command_line

if TYPE_CHECKING:
    from nacpipe.cache import Cache
    from nacpipe.extraction.distributed import Ranks
    from nacpipe.extraction.plan import Plan
    from nacpipe.extraction.profile import Profile
    from nacpipe.extraction.request import ExtractRequest


def _split_poolings(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Turn `avgpool=none` into ("avgpool", "none")."""
    poolings = []
    for value in values:
        layer, _, kind = value.rpartition("=")
        if not (layer and kind):
            raise click.BadParameter(f"{value!r} is not LAYER=KIND, such as layer3=sum-nchw")
        poolings.append((layer, kind))
    return tuple(poolings)


class _Workers(click.ParamType):  # type: ignore[type-arg]
    """`auto`, which is None, or a number."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "auto" else click.IntRange(0).convert(value, param, ctx)


workers_option = click.option(
    "--workers", type=_Workers(), default="auto", show_default=True, metavar="auto|N",
    help="Processes that decode images, 0 for a thread; auto: the cores less two, 0 where images are few or small.",
)  # fmt: skip


def extract_options(command: Any) -> Any:
    """Add the options of an extraction to a command: `extract` and `run`."""
    options = [
        click.argument("benchmark"),
        click.option("--model", metavar="NAME", help="The network (nacpipe models); for digits: digits_cnn."),
        click.option("--checkpoint", type=click.Path(path_type=Path),
                     help="The network's weights: a file, a folder with one, a name from nacpipe models, or a folder of"
                     " runs s0, s1, …: then a cache each."),
        click.option("--weights-transform", metavar="NAME",
                     help="Prepare images as for these published weights (nacpipe models), or benchmark; default: as"
                     " the weights need."),
        click.option("--layers", callback=split_layers, metavar="A,B",
                     help="Layers to tap, by alias or module path, NAME=PATH for another name; default: auto, the"
                     " paper's four, or of an own network the classifier's input and the ends of stages."),
        click.option("--pooling", "poolings", multiple=True, callback=_split_poolings, metavar="LAYER=KIND",
                     help="sum-nchw, sum-nhwc, sum-tokens, class-token, none, …; again for each layer."),
        click.option("--data-root", type=click.Path(path_type=Path),
                     help="Folder with benchmark_imglist/ and the images; default: data, or the root of FILE.toml."),
        click.option("--cache", type=Address(),
                     help="A folder or s3://…; default: cache/BENCHMARK-MODEL.zarr. Of several runs each adds -s0, …"
                     " before .zarr, or stands for {run}."),
        click.option("--train-images", type=int,
                     help="Images of id/train, the same number of each class; default: as many as the cache has, of a"
                     " new one 1000. For another number id/train alone is extracted anew."),
        click.option("--train-seed", type=click.IntRange(0, 2**32 - 1), default=1, show_default=True,
                     help="Seed of their choice."),
        click.option("--batch-size", type=int, default=128, show_default=True, help="Images at once."),
        click.option("--device", default="auto", show_default=True, help="cuda, mps, cpu, …"),
        click.option("--splits", callback=split_names, metavar="A,B",
                     help="Only these; default: all whose images are there."),
        click.option("--redo", callback=split_names, metavar="A,B",
                     help="Drop these finished splits and extract them again."),
        click.option("--synthetic-val", is_flag=True,
                     help="Make ood/val of id/val's images although the benchmark has its own: an ablation."),
        click.option("--allow-truncated", is_flag=True, help="Load truncated images as OpenOOD does."),
        click.option("--decoder", default="pillow", show_default=True, metavar="pillow|torchvision|nvjpeg",
                     help="What decodes JPEG files; Pillow whatever it does not take, and all other formats."),
        workers_option,
        click.option("--precision", default="fp32", show_default=True, metavar="fp32|tf32|bf16|fp16",
                     help="What the network computes in: tf32, from Ampere on, and the half types are faster on a GPU;"
                     " states change in the second or third digit."),
        click.option("--mantissa-bits", type=int, default=23, show_default=True,
                     help="Mantissa bits to store; 10 take half the space."),
        click.option("--block-rows", type=int, metavar="N",
                     help="Rows of a block of a new cache, a multiple of the batch; default: about ten seconds of work,"
                     " at most 512."),
        click.option("--shard-blocks", type=int,
                     help="Blocks in one stored object; default: 1, of a remote cache 8."),
        click.option("--no-gradient", "gradient", flag_value=False, default=True, type=bool,
                     help="Write activations alone, by forward passes: half the time and disk; terms of gradients and"
                     " products need gradients."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@extract_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--profile", is_flag=True, help="Print at the end where the time went, and what binds.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result as JSON.")
def extract(dry_run: bool, profile: bool, as_json: bool, **asked: Any) -> None:
    """Run a network over BENCHMARK's images once and write its states to a cache.

    BENCHMARK is digits, cifar10, cifar100, imagenet200, imagenet, or your own FILE.toml. Stopped at any moment, the
    same command goes on where it was.

    \b
    nacpipe extract digits
    nacpipe extract cifar10 --model resnet20 --checkpoint resnet20.th --data-root data --dry-run
    nacpipe extract cifar10 --model resnet18_32x32 --checkpoint results/cifar10_resnet18_32x32_base_e100_lr0.1_default
    nacpipe extract my.toml --model resnet18 --checkpoint mine.pth
    """
    from nacpipe.extraction.plan import plan_extraction

    requests = make_requests(**asked)
    if dry_run:
        print_plans([plan_extraction(request, dry=True) for request in requests], as_json)
        return
    profiles: dict[str, Profile] = {}
    if not extract_requests(requests, profiles if profile else None):
        return  # another process of the same torchrun prints the result
    from nacpipe.cache import open_cache
    from nacpipe.cli.inspect import print_splits
    from nacpipe.evaluation.inspection import summarise_splits

    frames = {str(request.cache): summarise_splits(open_cache(request.cache)) for request in requests}
    if as_json:
        results = [
            {"cache": cache, "splits": frame.to_dict("records")}
            | ({"profile": profiles[cache].to_json()} if cache in profiles else {})
            for cache, frame in frames.items()
        ]
        print_json(results if len(results) > 1 else results[0])
        return
    for cache, frame in frames.items():
        if len(frames) > 1:
            click.echo(f"{cache}")
        print_splits(frame)
        if cache in profiles:
            _print_profile(profiles[cache])
        for line in describe_next(open_cache(cache)):
            note(line)


def describe_next(cache: Cache) -> list[str]:
    """Return what to do with an extracted cache: extract what a search lacks, search, or use what was found before."""
    from nacpipe.cache.identity import bound_splits
    from nacpipe.cli.search import after_search
    from nacpipe.errors import NacError
    from nacpipe.scoring.params_file import find_params

    if lacking := [name for name in bound_splits() if name not in cache or not cache.peek(name).sealed]:
        return [f"a search needs {', '.join(lacking)} too", f"next: {cache.command()}"]
    try:
        find_params(cache, None)
    except NacError:  # none beside it, or of other states
        return [f"next: {command_line('search', cache.path)}"]
    return [f"next: {after_search(cache)}"]


def make_requests(**asked: Any) -> list[ExtractRequest]:
    """Return the request of each training run, with the defaults that depend on the benchmark and its network.

    Raises:
        InputError: the benchmark is not known, or needs a network.
        CheckpointError: the checkpoint is a folder that does not hold exactly one checkpoint of each run.
    """
    from nacpipe.benchmarks.toml import open_benchmark
    from nacpipe.errors import InputError
    from nacpipe.extraction.request import ExtractRequest, name_cache
    from nacpipe.networks.checkpoint_folders import find_checkpoint, find_runs, holds_runs, name_run
    from nacpipe.networks.models import MODELS, plain_name

    benchmark = open_benchmark(asked["benchmark"])
    if asked["model"] is None:
        if not benchmark.packaged:
            raise InputError(f"{benchmark.name} needs a network: --model NAME; known: {', '.join(MODELS)}")
        asked["model"] = "digits_cnn"
    if asked["cache"] is None:
        asked["cache"] = name_cache(benchmark.name, plain_name(asked["model"]))
    checkpoint = asked["checkpoint"]
    if checkpoint is None or not checkpoint.is_dir():
        runs = [asked]
    elif not holds_runs(checkpoint):
        runs = [{**asked, "checkpoint": find_checkpoint(checkpoint)}]
    else:
        runs = [
            {**asked, "checkpoint": file, "cache": _address(name_run(str(asked["cache"]), run))}
            for run, file in find_runs(checkpoint).items()
        ]
    counts = [_train_images(run.get("train_images"), run["cache"]) for run in runs]
    return [ExtractRequest(**{**run, "train_images": count}) for run, count in zip(runs, counts, strict=True)]


def _train_images(asked: int | None, cache: str | Path) -> int:
    """Return how many images id/train has: as many as asked for, as the cache has, or 1000."""
    from nacpipe.cache import open_cache
    from nacpipe.cache.address import holds_cache
    from nacpipe.cache.options import TRAIN_IMAGES
    from nacpipe.errors import NacError

    if asked is not None:
        return asked
    try:
        stored = open_cache(cache).train_images() if holds_cache(cache) else None
    except NacError:  # the plan says what is wrong
        stored = None
    return TRAIN_IMAGES if stored is None else stored


def _address(cache: str) -> str | Path:
    return cache if is_url(cache) else Path(cache)


def _print_profile(profile: Profile) -> None:
    click.echo(f"\n{profile.summary('images')}")
    print_table(
        ("stage", "where", "seconds", "share %"),
        [(s.name, s.where, f"{s.seconds:.2f}", percent(s.share, 1)) for s in profile.stages()],
        left=2,
    )


def extract_requests(requests: Sequence[ExtractRequest], profiles: dict[str, Profile] | None = None) -> bool:
    """Plan and extract with progress on stderr; return whether this process is the one that prints the result.

    Args:
        requests: one for each cache.
        profiles: gets cache → where the time of this process went; None: it is not measured.
    """
    from nacpipe.extraction.distributed import join_ranks, leave_ranks

    ranks = join_ranks()
    try:
        for request in requests:
            _extract_one(request, ranks, profiles)
    finally:
        leave_ranks()
    return ranks.first


def _extract_one(request: ExtractRequest, ranks: Ranks, profiles: dict[str, Profile] | None) -> None:
    from nacpipe.extraction.pipeline import choose_blocks
    from nacpipe.extraction.pipeline import extract as run_plan
    from nacpipe.extraction.plan import plan_extraction
    from nacpipe.extraction.profile import Profile

    plan = plan_extraction(request, ranks=ranks)
    for text in plan.notes if ranks.first else ():
        note(text)
    plan = choose_blocks(plan, ranks, note)
    profile = None
    if profiles is not None:
        profile = profiles[str(request.cache)] = Profile(plan.network.device)
    with _progress(plan, ranks) as progress:
        run_plan(plan, lambda split, rows: progress.step(rows, split), ranks, progress.note, profile)


def _progress(plan: Plan, ranks: Ranks) -> Progress:
    """Return the progress of the first process's share; of a process alone, with what was done before."""
    rows = plan.todo(ranks) if ranks.first else {}
    todo = {split.images.name: rows[split.images.name] for split in plan.splits if ranks.first and not split.sealed}
    before = {s.images.name: s.rows - todo[s.images.name] for s in plan.splits if ranks.alone and s.images.name in todo}
    return Progress("extract", {name: rows + before.get(name, 0) for name, rows in todo.items()}, before)


def print_plans(plans: Sequence[Plan], as_json: bool) -> None:
    """Print the plan of each cache."""
    for text in dict.fromkeys(text for plan in plans for text in plan.notes):
        note(text)
    values = [_plan_json(plan) for plan in plans]
    if as_json:
        print_json(values if len(values) > 1 else values[0])
        return
    for number, (plan, value) in enumerate(zip(plans, values, strict=True)):
        if number:
            click.echo("")
        _print_plan(plan, value["splits"])


def _plan_json(plan: Plan) -> dict[str, Any]:
    from nacpipe.extraction.plan import total_bytes

    transform = plan.network.image_transform
    rows = [
        {
            "split": s.images.name,
            "list": s.images.source,
            "rows": s.rows,
            "blocks": s.blocks,
            "blocks_to_write": len(s.todo),
            "bytes": total_bytes(plan, [s]),
            "missing": len(s.images.missing()) if s.todo else 0,
            "state": s.state,
        }
        for s in plan.splits
    ]
    return {
        "cache": str(plan.request.cache),
        "exists": plan.exists,
        "transform": {**transform.to_json(), "interpolation": transform.interpolation},
        "splits": rows,
        "notes": plan.notes,
    }


def _print_plan(plan: Plan, rows: Sequence[dict[str, Any]]) -> None:
    from nacpipe.extraction.distributed import Ranks

    print_table(
        ("split", "list", "rows", "missing", "blocks", "to write", "raw", "state"),
        [
            (
                r["split"], r["list"], str(r["rows"]), str(r["missing"] or ""), str(r["blocks"]),
                str(r["blocks_to_write"]), format_bytes(r["bytes"]), r["state"],
            )
            for r in rows
        ],
        left=2,
    )  # fmt: skip
    layers = ", ".join(f"{s.name} ({s.neurons})" for s in plan.header.layers)
    click.echo(
        f"\n{plan.request.cache}: {'goes on' if plan.exists else 'new'}, {plan.todo_rows(Ranks())} images to run"
    )
    click.echo(f"layers (neurons): {layers}; device {plan.device}, batches of {plan.request.batch_size}")
    click.echo(f"transform: {plan.network.image_transform.describe()}")
    at_most = "at most " if plan.blocks_are_open else ""
    why = ", about ten seconds of work: a trial batch is timed first" if plan.blocks_are_open else ""
    click.echo(f"blocks of {at_most}{plan.header.block_rows} rows{why}")
