"""`nacpipe export`: a detector to run beside the classifier."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.output import Address, format_bytes, note, print_json, print_table
from nacpipe.text import command_line

if TYPE_CHECKING:
    from nacpipe.cache import Header
    from nacpipe.detector.file import Exported
    from nacpipe.detector.runtimes import RuntimeCheck

ENDINGS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}


@click.command()
@click.argument("cache", type=Address())
@click.option(
    "--params", "choice", metavar="FILE", help="A file, or published; default: what search left beside X.zarr."
)
@click.option("--output", type=click.Path(path_type=Path), help="Default: X.detector.ENDING beside X.zarr.")
@click.option("--keep", type=float, default=0.95, show_default=True, help="Share of id/val that is not flagged.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(list(ENDINGS)),
    default="safetensors",
    show_default=True,
    help="The detector without its network, or one file with both.",
)
@click.option(
    "--model", metavar="NAME", help="Of onnx and torch-export: the network (nacpipe models), or file.py:function."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Of onnx and torch-export: its weights.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(
    cache: str | Path,
    choice: str | None,
    output: Path | None,
    keep: float,
    kind: str,
    model: str | None,
    checkpoint: Path | None,
    as_json: bool,
) -> None:
    """Write a detector: CACHE's coverage under the given parameters, and a threshold chosen on id/val.

    As onnx and torch-export the file holds the network too, and runs where nacpipe is not. These are of forward passes
    alone: their cache is one of `extract --no-gradient`.

    \b
    nacpipe export cache/digits-digits_cnn.zarr
    nacpipe export cache/cifar10-resnet20.zarr --params mine.params.json --keep 0.99 --output resnet20.safetensors
    nacpipe export forward.zarr --format onnx --model resnet20 --checkpoint resnet20.th
    """
    from nacpipe.cache import open_cache
    from nacpipe.detector.export import export_detector
    from nacpipe.detector.file import write_detector
    from nacpipe.files import beside_cache, check_writable
    from nacpipe.scoring.params_file import find_params

    if kind == "safetensors" and (model is not None or checkpoint is not None):
        raise click.UsageError("--model and --checkpoint belong to --format onnx and torch-export.")
    target = output or beside_cache(str(cache), f".detector{ENDINGS[kind]}")
    check_writable(target)
    opened = open_cache(cache)
    exported = export_detector(opened, find_params(opened, choice, note), keep)
    check = None
    if kind == "safetensors":
        write_detector(target, exported)
    else:
        check = _write_with_network(kind, target, exported, str(cache), model, checkpoint)
    described: list[dict[str, Any]] = [
        {"layer": one.name, "neurons": one.neurons, "bins": one.params.bins, "weight": one.params.weight}
        for one in exported.terms
    ]
    fused = None if exported.fused is None else exported.fused.params
    if as_json:
        compared = {} if check is None else {"format": kind, "compared": asdict(check)}
        member = {} if fused is None else {"fused": {"method": fused.method, "weight": fused.weight}}
        print_json(
            {
                "detector": str(target),
                "threshold": exported.threshold,
                "keep": keep,
                "layers": described,
                **member,
                **compared,
            }
        )
    else:
        rows = [(d["layer"], str(d["neurons"]), str(d["bins"]), f"{d['weight']:.4g}") for d in described]
        rows += [] if fused is None else [(fused.method, "", "", f"{fused.weight:.4g}")]
        print_table(("layer", "neurons", "bins", "weight"), rows)
        if fused is not None:
            click.echo(f"\n{fused.describe()}")
        click.echo(f"\nthreshold {exported.threshold:.6g}: at least {100 * keep:g} % of id/val score as high or higher")
    note(f"wrote {target}, {format_bytes(target.stat().st_size)}")
    if check is None:
        note(f"next: {score_command(target, opened.header)}")
    else:
        note(
            f"compared with torch on {check.samples} random images: {100 * check.close:.4g} % of the scores within"
            f" 1e-5, the largest difference {check.largest:.2g}"
        )


def _write_with_network(
    kind: str, target: Path, exported: Exported, cache: str, model: str | None, checkpoint: Path | None
) -> RuntimeCheck:
    """Write network and detector as one file."""
    import torch

    from nacpipe.detector.predict import attach_network

    ready = attach_network(exported, cache, model, checkpoint, torch.device("cpu"))
    for text in ready.notes:
        note(text)
    return ready.detector.to_onnx(target) if kind == "onnx" else ready.detector.to_torch_export(target)


def score_command(detector: Path, header: Header) -> str:
    """Return the command that scores images; what the cache does not know of its network stands in capitals."""
    from nacpipe.detector.network_options import network_options

    return command_line("score", detector, "IMAGES", *network_options(header.identity, header.information))
