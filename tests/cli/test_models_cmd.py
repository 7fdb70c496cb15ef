"""`nacpipe models` and `nacpipe layers`, and --pooling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nacpipe.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


def test_models_are_listed() -> None:
    text = nacpipe("models").stdout
    for line in (
        r"resnet50        resnet      avgpool, layer3, layer2, layer1            IMAGENET1K_V1, IMAGENET1K_V2",
        "+cider           features  resnet18_32x32+cider, resnet18+cider, resnet50+cider",
        "timm:NAME",
        "path/to/file.py:function",
    ):
        assert line in text
    models = {model["name"]: model for model in json.loads(nacpipe("models", "--json").stdout)}
    assert len(models) == 10 + 3 * 7
    assert models["resnet18+npos"]["outputs"] == "features"
    assert models["vit_b_16"]["default"] == ["layer_norm", "layer_11", "layer_10", "layer_9"]
    assert models["vit_b_16"]["layers"]["layer_norm"] == {"path": "encoder.ln", "pooling": "class-token"}


def test_layers_are_listed() -> None:
    result = nacpipe("layers", "vit_b_16")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["layer", "module", "output", "pooling", "neurons"]
    assert ["layer_norm", "encoder.ln", "197×768", "class-token", "768", "default"] in lines
    assert ["encoder.layers.encoder_layer_0.mlp.0", "197×3072", "sum-tokens?", "3072"] in lines
    assert result.stderr == (
        "images of 224×224; tapped by default: layer_norm, layer_11, layer_10, layer_9\n"
        "?: a pooling guessed from the output's shape; nacpipe extract … --pooling LAYER=KIND sets another\n"
    )
    found = {layer["name"]: layer for layer in json.loads(nacpipe("layers", "resnet50", "--json").stdout)}
    assert found["layer3"] == {
        "name": "layer3",
        "path": "layer3",
        "shape": [1024, 14, 14],
        "pooling": "sum-nchw",
        "neurons": 1024,
        "guessed": False,
        "runs": 1,
        "default": True,
    }
    assert (found["layer1.0.relu"]["runs"], found["layer1.0.relu"]["guessed"]) == (3, True)
    assert found["fc"]["neurons"] == 1000
    assert "the last of 3 runs" in nacpipe("layers", "resnet50").stdout


def test_layers_on_another_benchmark(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten(), nn.Linear(4, 10))\n"
    )
    found = json.loads(nacpipe("layers", f"{tmp_path}/net.py:build", "--benchmark", "cifar10", "--json").stdout)
    assert [(layer["name"], layer["shape"], layer["pooling"]) for layer in found] == [
        ("0", [4, 1, 1], "sum-nchw"),
        ("1", [4], "none"),
        ("2", [10], "none"),
    ]
    result = nacpipe("layers", f"{tmp_path}/net.py:build")
    assert result.exit_code == 1
    assert result.stderr.startswith("nacpipe: model 'net.py:build' fails on images of 224 pixels: RuntimeError: ")
    hint = "; these are the images and classes of imagenet; say whose it takes with --benchmark NAME or FILE.toml\n"
    assert result.stderr.endswith(hint)
    named = nacpipe("layers", f"{tmp_path}/net.py:build", "--benchmark", "imagenet")
    assert named.stderr == result.stderr.replace(hint, "\n")


@pytest.mark.parametrize("value", ["mix", "=none", "mix="])
def test_a_pool_without_a_layer_or_a_kind_is_wrong_usage(value: str) -> None:
    result = nacpipe("extract", "digits", "--pooling", value)
    assert result.exit_code == 2
    assert f"'{value}' is not LAYER=KIND, such as layer3=sum-nchw" in result.stderr


def test_pools_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    result = nacpipe("extract", "digits", "--cache", str(tmp_path / "c.zarr"), "--pooling", "layer1=mean")
    assert result.exit_code == 1
    assert result.stderr.startswith("nacpipe: pooling layer1=mean: known poolings are sum-nchw, ")
    assert not (tmp_path / "c.zarr").exists()
