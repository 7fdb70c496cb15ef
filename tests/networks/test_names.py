"""The names that people know: OpenOOD's networks and schemes, layers with blanks, hints at what was nearly right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import CheckpointError, InputError
from nacpipe.networks.architectures.training_schemes import WRAPPERS
from nacpipe.networks.build import blank_network
from nacpipe.networks.layers import measure_layers
from nacpipe.networks.models import MODELS, PLAIN_SCHEMES, find_model

ALIASES = {
    "resnet18_224x224": "resnet18",
    "resnet18-224x224": "resnet18",
    "resnet18_256x256": "resnet18",
    "ResNet50": "resnet50",
    "vit-b-16": "vit_b_16",
    "ViT-B-16": "vit_b_16",
    "vit_b16": "vit_b_16",
    "swin-t": "swin_t",
    "Swin_T": "swin_t",
    "ResNet18_32x32": "resnet18_32x32",
    "resnet18_32x32+conf_branch": "resnet18_32x32+confbranch",
    "resnet18_224x224+conf_branch_net": "resnet18+confbranch",
    "resnet50+rot_net": "resnet50+rotpred",
    "resnet18_32x32+godin_net": "resnet18_32x32+godin",
    "resnet18_32x32+cider_net": "resnet18_32x32+cider",
    "resnet18_32x32+CSI": "resnet18_32x32+csi",
    **{f"resnet18_224x224+{scheme}": "resnet18" for scheme in PLAIN_SCHEMES},
    "resnet20+AugMix": "resnet20",
    "vit-b-16+regmixup": "vit_b_16",
}


@pytest.mark.parametrize("name", ALIASES)
def test_other_names_are_the_same_networks(name: str) -> None:
    found, expected = find_model(name), find_model(ALIASES[name])
    assert found.name == expected.name == ALIASES[name]
    assert (found.layers, found.default, found.outputs) == (expected.layers, expected.default, expected.outputs)
    if "+" not in ALIASES[name]:
        assert found is MODELS[ALIASES[name]]


def test_openoods_plain_schemes_are_all_there() -> None:
    known = {"augmix", "pixmix", "regmixup", "randaugment", "deepaugment", "stylized", "logitnorm", "base"}
    assert known <= set(PLAIN_SCHEMES)
    assert not set(PLAIN_SCHEMES) & set(WRAPPERS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"^model 'resnet81' is not known; known: digits_cnn, .*; see too: nacpipe models; did you mean"),
        ("resnet-500", r"; did you mean resnet50\?$"),
        ("swin_b", r"; did you mean swin_t\?$"),
        ("resnet18+agmix", r"^model 'resnet18\+agmix' is not known; .* by \+base, .*; did you mean augmix\?$"),
        ("resnet18+ciderr", r"; did you mean cider\?$"),
        (
            "resnet20+cider",
            r"^model 'resnet20\+cider' is not known; resnet18_32x32, resnet18, resnet50 can be followed",
        ),
        ("nothing_like_it", r"see too: nacpipe models$"),
    ],
)
def test_near_misses_get_a_hint(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_model(name)


def test_layers_weights_and_transforms_get_one_too() -> None:
    imagenet, resnet50 = find_benchmark("imagenet"), find_model("resnet50")
    network = blank_network(resnet50, imagenet, None)
    with pytest.raises(InputError, match=r"nacpipe layers resnet50; did you mean avgpool\?$"):
        measure_layers(network, ("avg_pool",))
    with pytest.raises(CheckpointError, match=r"it has IMAGENET1K_V1, IMAGENET1K_V2; did you mean IMAGENET1K_V2\?$"):
        blank_network(resnet50, imagenet, Path("IMAGENET1KV2"))
    message = (
        r"^weights-transform is 'IMAGENET1K-V2'; known for resnet50: IMAGENET1K_V1, IMAGENET1K_V2, benchmark; did you"
        r" mean IMAGENET1K_V2\?$"
    )
    with pytest.raises(InputError, match=message):
        blank_network(resnet50, imagenet, None, "IMAGENET1K-V2")


@pytest.mark.parametrize(
    "layers", ["avgpool layer3 layer2", "avgpool,layer3,layer2", " avgpool, layer3\tlayer2,", "avgpool  layer3,layer2"]
)
@pytest.mark.repeats(1)
def test_layers_may_be_separated_by_blanks(tmp_path: Path, layers: str) -> None:
    done = CliRunner().invoke(
        main, ["extract", "digits", "--cache", str(tmp_path / "c.zarr"), "--layers", layers, "--dry-run"]
    )
    assert done.exit_code == 0, done.output
    assert "layers (neurons): avgpool (64), layer3 (64), layer2 (32);" in done.stdout


def test_search_takes_them_too(small_cache: Cache, tmp_path: Path) -> None:
    files = ["--storage", str(tmp_path / "s.log"), "--output", str(tmp_path / "p.json")]
    done = CliRunner().invoke(
        main,
        [
            "search",
            small_cache.path,
            "--space",
            "paper",
            "--layers",
            "avgpool layer1",
            "--trials",
            "2",
            *files,
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    assert list(json.loads((tmp_path / "p.json").read_text())["layers"]) == ["avgpool", "layer1"]
