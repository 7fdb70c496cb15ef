"""Published weights bring their own preparation of images, whatever their file is called; it is shown, and chosen."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from click.testing import CliRunner

from nacpipe.benchmarks.standard import Transform, find_benchmark
from nacpipe.cli import main
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks import models
from nacpipe.networks.build import blank_network, load_network
from nacpipe.networks.checkpoints import published_sha256
from nacpipe.networks.models import MODELS, Model, find_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IMAGENET = find_benchmark("imagenet")
NETWORKS = ("resnet18", "resnet50", "vit_b_16", "swin_t")

# What torchvision's file names have; beside its own table, so that a change of either is seen.
HASHES = {
    "resnet18": {"IMAGENET1K_V1": "f37072fd"},
    "resnet50": {"IMAGENET1K_V1": "0676ba61", "IMAGENET1K_V2": "11ad3fa6"},
    "vit_b_16": {"IMAGENET1K_V1": "c867db91", "IMAGENET1K_SWAG_LINEAR_V1": "4e70ced5"},
    "swin_t": {"IMAGENET1K_V1": "704ceda3"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_known_hashes_are_torchvisions(name: str) -> None:
    assert {weights: one.sha256 for weights, one in find_model(name).weights.items()} == HASHES[name]
    for weights, sha256 in HASHES[name].items():
        url = torchvision.models.get_model_weights(name)[weights].url
        assert url.endswith(f"-{sha256}.pth")
    assert published_sha256("https://x.org/net-without.pth") == ""


@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of ResNet-18; nothing may change them."""
    file = tmp_path_factory.mktemp("published") / "my own name.pth"
    torch.manual_seed(0)
    torch.save(find_model("resnet18").build(10).state_dict(), file)
    return file


@pytest.fixture
def published(published_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up file that holds, by its hash, Swin-T's published weights; and its row knows that hash."""
    file = published_file
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    rows = {}
    for row, weights in (("resnet18", "IMAGENET1K_V1"), ("resnet50", "IMAGENET1K_V2")):
        known = {**MODELS[row].weights, weights: replace(MODELS[row].weights[weights], sha256=digest[:8])}
        rows[row] = replace(MODELS[row], weights=known, build=MODELS["resnet18"].build)  # which the file fits
    # resnet18's weights want 256 as the benchmark does; Swin-T's are told from them.
    swin = find_model("swin_t").weights["IMAGENET1K_V1"]
    rows["resnet18"] = replace(
        rows["resnet18"], weights={"IMAGENET1K_V1": replace(swin, sha256=digest[:8]), "IMAGENET1K_V9": swin}
    )
    for row, model in rows.items():
        monkeypatch.setitem(models.MODELS, row, model)
    return file


SWIN = Transform(
    resize=232, crop=224, mean=IMAGENET.transform.mean, std=IMAGENET.transform.std, interpolation="bicubic"
)
TEN = replace(IMAGENET, classes=10)


def row(name: str) -> Model:
    return find_model(name)


@pytest.mark.slow
def test_a_published_file_is_recognised_by_its_content(published: Path) -> None:
    for network in (
        load_network(row("resnet18"), TEN, published, CPU),
        blank_network(row("resnet18"), TEN, published),
        blank_network(row("resnet18+augmix"), TEN, published),
    ):
        assert network.transform == SWIN
        assert network.prepared_by == "the weights IMAGENET1K_V1"
    second = blank_network(row("resnet50"), TEN, published)
    assert (second.transform.resize, second.prepared_by) == (232, "the weights IMAGENET1K_V2")


@pytest.mark.slow
def test_a_file_of_other_content_has_the_benchmarks(published: Path, tmp_path: Path) -> None:
    """And if it has the name of a published one, that is said."""
    other = tmp_path / "resnet50-11ad3fa6.pth"
    torch.save(find_model("resnet18").build(10).state_dict(), other)
    network = load_network(row("resnet18"), TEN, other, CPU)
    assert (network.transform, network.prepared_by) == (TEN.transform, "the benchmark imagenet")
    assert network.notes == ()
    named = tmp_path / f"resnet18-{row('resnet18').weights['IMAGENET1K_V1'].sha256}.pth"
    other.rename(named)
    network = load_network(row("resnet18"), TEN, named, CPU)
    assert network.transform == TEN.transform
    assert network.notes == (
        f"{named} has the name of IMAGENET1K_V1's file, but other content; if it holds those weights, give"
        " --weights-transform IMAGENET1K_V1",
    )


@pytest.mark.slow
def test_a_transform_can_be_chosen(published: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": find_model("resnet18").build(10).state_dict()}, tmp_path / "resaved.pth")
    for file, chosen, expected, by in [
        (tmp_path / "resaved.pth", None, TEN.transform, "the benchmark imagenet"),
        (tmp_path / "resaved.pth", "IMAGENET1K_V9", SWIN, "the weights IMAGENET1K_V9"),
        (published, "benchmark", TEN.transform, "the benchmark imagenet"),
        (published, None, SWIN, "the weights IMAGENET1K_V1"),
    ]:
        network = load_network(row("resnet18"), TEN, file, CPU, chosen)
        assert (network.transform, network.prepared_by) == (expected, by)
    cifar10, resnet20 = find_benchmark("cifar10"), find_model("resnet20")
    assert resnet20.transform is not None
    for chosen, expected, by in [
        (None, resnet20.transform, "the network resnet20"),
        ("benchmark", cifar10.transform, "the benchmark cifar10"),
    ]:
        blank = blank_network(resnet20, cifar10, None, chosen)
        assert (blank.transform, blank.prepared_by) == (expected, by)


@pytest.mark.slow
def test_the_plan_shows_the_transform(request_: ExtractRequest) -> None:
    text = "resize 32 (bilinear), crop 32, mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616"
    plan = plan_extraction(replace(request_, weights_transform="benchmark", splits=("ood/val",)))
    assert f"images are prepared by the benchmark cifar10: {text}" in plan.notes
    assert plan.header.identity["transform"]["mean"] == [0.4914, 0.4822, 0.4465]
    command = [
        *("extract", "cifar10", "--model", "resnet20", "--checkpoint", str(request_.checkpoint), "--data-root"),
        *(str(request_.data_root), "--weights-transform", "benchmark", "--cache", str(request_.cache)),
    ]
    done = CliRunner().invoke(main, [*command, "--dry-run"])
    assert f"transform: {text}" in done.stdout.splitlines()
    assert f"images are prepared by the benchmark cifar10: {text}" in done.stderr.splitlines()
    shown = json.loads(CliRunner().invoke(main, [*command, "--dry-run", "--json"]).stdout)["transform"]
    assert shown == {
        "resize": 32, "crop": 32, "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616],
        "interpolation": "bilinear",
    }  # fmt: skip
    done = CliRunner().invoke(main, [*command, "--splits", "ood/val", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert f"images are prepared by the benchmark cifar10: {text}" in done.stderr.splitlines()
    from nacpipe.cache import open_cache

    assert "--weights-transform benchmark" in open_cache(request_.cache).command()
