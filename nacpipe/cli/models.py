"""`nacpipe models` lists the known networks; `nacpipe layers` lists the layers of one that can be tapped."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from nacpipe.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from nacpipe.networks.layers import Tappable

_OTHERS = {
    "timm:NAME": "timm's network of that name with its weights, or yours; pip install 'nacpipe[timm]'",
    "path/to/file.py:function": "your own: the function returns a torch.nn.Module, with its weights",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(as_json: bool) -> None:
    """Print the networks that --model takes, and what their weights can be called.

    --checkpoint takes a file, a folder with one, or one of those names. Checkpoints of AugMix, PixMix, RegMixup,
    DeepAugment, Stylized, RandAugment and LogitNorm are those of the plain network (+augmix, … is taken and changes
    nothing); schemes with layers of their own follow a plus sign. OpenOOD's names are taken too.

    \b
    nacpipe models
    nacpipe models --json
    """
    from nacpipe.networks.architectures.training_schemes import WRAPPERS
    from nacpipe.networks.models import BACKBONES, MODELS, find_model

    wrapped = [find_model(f"{backbone}+{scheme}") for scheme in WRAPPERS for backbone in BACKBONES]
    if as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "family": model.family,
                    "outputs": model.outputs,
                    "default": list(model.default),
                    "layers": {a: {"path": p, "pooling": pooling} for a, (p, pooling) in model.layers.items()},
                    "weights": list(model.weights),
                }
                for model in (*MODELS.values(), *wrapped)
            ]
        )
        return
    print_table(
        ("model", "family", "layers tapped unless others are asked for", "weights by name"),
        [(m.name, m.family, ", ".join(m.default), ", ".join(m.weights) or "–") for m in MODELS.values()],
        left=4,
    )
    click.echo("")
    print_table(
        ("training scheme", "outputs", "networks"),
        [
            (f"+{scheme}", wrapper.outputs, ", ".join(f"{backbone}+{scheme}" for backbone in BACKBONES))
            for scheme, wrapper in WRAPPERS.items()
        ],
        left=3,
    )
    click.echo("")
    print_table(("others", "what"), list(_OTHERS.items()), left=2)


@click.command()
@click.argument("model")
@click.option("--benchmark", metavar="NAME", help="Whose images and classes; default: those the network is made for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def layers(model: str, benchmark: str | None, as_json: bool) -> None:
    """Print the modules of MODEL that --layers takes: outputs' shapes, pooling, neurons.

    No weights are needed. A pooling with a question mark is a guess from the output's shape; --pooling sets another.

    \b
    nacpipe layers vit_b_16
    nacpipe layers networks.py:build --benchmark cifar10
    """
    from nacpipe.benchmarks.toml import open_benchmark
    from nacpipe.errors import InputError
    from nacpipe.networks.build import blank_network
    from nacpipe.networks.layers import choose_layers, list_layers
    from nacpipe.networks.models import find_model

    row = find_model(model)
    try:
        network = blank_network(row, open_benchmark(benchmark or row.benchmark), None)
    except InputError as error:
        if benchmark is not None or row.known:
            raise
        whose = f"these are the images and classes of {row.benchmark}; say whose it takes"
        raise InputError(f"{error}; {whose} with --benchmark NAME or FILE.toml") from None
    tappable = list_layers(network)
    default = set(row.default or choose_layers(network).values())
    if as_json:
        print_json([{**asdict(layer), "default": layer.name in default} for layer in tappable])
        return
    print_table(
        ("layer", "module", "output", "pooling", "neurons", ""),
        [
            (
                layer.name,
                "" if layer.name == layer.path else layer.path,
                "×".join(str(n) for n in layer.shape),
                layer.pooling + ("?" if layer.guessed else ""),
                str(layer.neurons),
                _remark(layer, layer.name in default),
            )
            for layer in tappable
        ],
        left=4,
    )
    side = network.image_transform.crop
    chosen = row.default or [layer.name for layer in reversed(tappable) if layer.name in default]
    note(f"images of {side}×{side}; tapped by default: {', '.join(chosen)}")
    if any(layer.guessed for layer in tappable):
        note("?: a pooling guessed from the output's shape; nacpipe extract … --pooling LAYER=KIND sets another")


def _remark(layer: Tappable, default: bool) -> str:
    """A remark on a layer that is tapped by default or runs several times, or whose name a cache cannot have."""
    from nacpipe.cache.layout import free_name, layer_name_problem

    remarks = ["default"] if default else []
    remarks += [f"the last of {layer.runs} runs"] if layer.runs > 1 else []
    if layer_name_problem(layer.name):
        remarks.append(f"--layers {shlex.quote(f'{free_name(layer.name)}={layer.name}')}")
    return "; ".join(remarks)
