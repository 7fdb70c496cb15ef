"""Benchmarks and the paper's parameters, typed here a second time by hand from the paper and from OpenOOD."""

from __future__ import annotations

import pytest

from nacpipe.benchmarks.standard import BENCHMARKS, find_benchmark
from nacpipe.errors import InputError, ParamsError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.published import published_params


def test_cifar10_is_openoods() -> None:
    benchmark = find_benchmark("cifar10")
    assert {split.name: split.source for split in benchmark.splits} == {
        "id/train": "main_train_cifar10.txt",
        "id/subtrain": "sub_train_cifar10.txt",
        "id/val": "val_cifar10.txt",
        "id/test": "test_cifar10.txt",
        "csid/cifar10c": "test_cifar10c.txt",
        "ood/val": "val_tin.txt",
        "ood/near/cifar100": "test_cifar100.txt",
        "ood/near/tin": "test_tin.txt",
        "ood/far/mnist": "test_mnist.txt",
        "ood/far/svhn": "test_svhn.txt",
        "ood/far/texture": "test_texture.txt",
        "ood/far/places365": "test_places365.txt",
    }
    assert {split.folder for split in benchmark.splits} == {"images_classic"}
    assert {split.name: split.fallback for split in benchmark.splits if split.fallback} == {
        "id/train": "train_cifar10.txt"
    }
    assert [s.name for s in benchmark.splits if not s.optional] == ["id/train", "id/val", "id/test", "ood/val"]
    assert (benchmark.name, benchmark.classes, benchmark.packaged) == ("cifar10", 10, False)
    assert (benchmark.transform.resize, benchmark.transform.crop) == (32, 32)
    assert benchmark.transform.mean == (0.4914, 0.4822, 0.4465)
    assert benchmark.transform.std == (0.2470, 0.2435, 0.2616)


def test_cifar100_is_openoods() -> None:
    benchmark = find_benchmark("cifar100")
    assert {split.name: split.source for split in benchmark.splits} == {
        "id/train": "main_train_cifar100.txt",
        "id/subtrain": "sub_train_cifar100.txt",
        "id/val": "val_cifar100.txt",
        "id/test": "test_cifar100.txt",
        "ood/val": "val_tin.txt",
        "ood/near/cifar10": "test_cifar10.txt",
        "ood/near/tin": "test_tin.txt",
        "ood/far/mnist": "test_mnist.txt",
        "ood/far/svhn": "test_svhn.txt",
        "ood/far/texture": "test_texture.txt",
        "ood/far/places365": "test_places365.txt",
    }
    assert {split.folder for split in benchmark.splits} == {"images_classic"}
    assert benchmark.split("id/train").fallback == "train_cifar100.txt"
    assert (benchmark.classes, benchmark.lists, benchmark.root) == (100, "benchmark_imglist/cifar100", "data")
    assert (benchmark.transform.resize, benchmark.transform.crop) == (32, 32)
    assert benchmark.transform.mean == (0.5071, 0.4867, 0.4408)
    assert benchmark.transform.std == (0.2675, 0.2565, 0.2761)


IMAGENET = {  # after the benchmark's name in OpenOOD's lists: its classes, its csid sets' lists
    "imagenet200": (200, ["test_imagenet200_v2.txt", "test_imagenet200_c.txt", "test_imagenet200_r.txt"]),
    "imagenet": (
        1000,
        ["test_imagenet_v2.txt", "test_imagenet_c.txt", "test_imagenet_r.txt", "test_imagenet_es.txt"],
    ),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_the_imagenets_are_openoods(name: str) -> None:
    benchmark = find_benchmark(name)
    classes, csid = IMAGENET[name]
    assert {split.name: split.source for split in benchmark.splits} == {
        "id/train": f"main_train_{name}.txt",
        "id/subtrain": f"sub_train_{name}.txt",
        "id/val": f"val_{name}.txt",
        "id/test": f"test_{name}.txt",
        **dict(zip([f"csid/imagenet_{kind}" for kind in ("v2", "c", "r", "es")], csid, strict=False)),
        "ood/val": "val_openimage_o.txt",
        "ood/near/ssb_hard": "test_ssb_hard.txt",
        "ood/near/ninco": "test_ninco.txt",
        "ood/far/inaturalist": "test_inaturalist.txt",
        "ood/far/textures": "test_textures.txt",
        "ood/far/openimage_o": "test_openimage_o.txt",
    }
    folders = {split.name: split.folder for split in benchmark.splits}
    assert folders.pop("ood/far/textures") == "images_classic"
    assert set(folders.values()) == {"images_largescale"}
    assert [split.name for split in benchmark.splits if split.pre_resized] == ["csid/imagenet_c"]
    assert [s.name for s in benchmark.splits if not s.optional] == ["id/train", "id/val", "id/test", "ood/val"]
    assert benchmark.split("id/train").fallback == f"train_{name}.txt"
    assert (benchmark.classes, benchmark.lists) == (classes, f"benchmark_imglist/{name}")
    assert (benchmark.transform.resize, benchmark.transform.crop) == (256, 224)
    assert benchmark.transform.mean == (0.485, 0.456, 0.406)
    assert benchmark.transform.std == (0.229, 0.224, 0.225)


def test_digits_holds_every_packaged_set() -> None:
    benchmark = find_benchmark("digits")
    assert {split.name: split.source for split in benchmark.splits} == {
        "id/train": "main_train",
        "id/subtrain": "sub_train",
        "id/val": "val",
        "id/test": "test",
        "csid/digits8x8": "digits8x8",
        "ood/val": "letters_val",
        "ood/near/letters": "letters",
        "ood/near/scripts": "scripts",
        "ood/far/textures": "textures",
        "ood/far/photographs": "photographs",
        "ood/far/pages": "pages",
        "ood/far/scans": "scans",
        "ood/far/faces": "faces",
    }
    assert (benchmark.classes, benchmark.packaged) == (10, True)
    assert (benchmark.transform.resize, benchmark.transform.mean, benchmark.transform.std) == (28, (0.1307,), (0.3081,))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_searched(name: str) -> None:
    """It has the four splits that a search reads, once each, and is found under its own name."""
    names = [split.name for split in BENCHMARKS[name].splits]
    assert len(set(names)) == len(names)
    assert {"id/train", "id/subtrain", "id/val", "ood/val"} < set(names)
    assert find_benchmark(name).name == name
    assert find_benchmark(name).split("ood/val").name == "ood/val"


def test_unknown_benchmark_names_the_known_ones() -> None:
    with pytest.raises(
        InputError,
        match=r"^benchmark 'cifar11' is not known; known: digits, cifar10, cifar100, imagenet200, imagenet, or ",
    ):
        find_benchmark("cifar11")


def test_unknown_split_names_the_known_ones() -> None:
    message = (
        r"^split 'ood/far/mnist' is not part of benchmark digits; it has id/train, .*, ood/far/scans, ood/far/faces$"
    )
    with pytest.raises(InputError, match=message):
        find_benchmark("digits").split("ood/far/mnist")


# bins, saturation, alpha; arXiv 2306.02879, appendix
PAPER: dict[tuple[str, str], dict[str, tuple[int, int, float]]] = {
    ("cifar10", "resnet"): {
        "avgpool": (50, 50, 100),
        "layer3": (500, 100, 1000),
        "layer2": (50, 5, 0.001),
        "layer1": (500, 100, 0.001),
    },
    ("cifar100", "resnet"): {
        "avgpool": (50, 50, 50),
        "layer3": (1000, 500, 10),
        "layer2": (50, 500, 1),
        "layer1": (50, 5, 0.005),
    },
    ("imagenet", "resnet"): {
        "avgpool": (50, 10, 3000),
        "layer3": (50, 500, 300),
        "layer2": (500, 50, 0.01),
        "layer1": (1000, 5000, 1),
    },
    ("imagenet", "vit"): {
        "layer_norm": (50, 500, 100),
        "layer_11": (500, 50, 1),
        "layer_10": (500, 10, 10),
        "layer_9": (1000, 10, 1),
    },
}


@pytest.mark.parametrize(("benchmark", "family"), PAPER)
def test_published_parameters_are_the_papers(benchmark: str, family: str) -> None:
    cells = PAPER[benchmark, family]
    expected = NacParams(
        layers={
            name: LayerParams(bins=bins, saturation=r, alpha=alpha, weight=1.0, edges="log", source="product")
            for name, (bins, r, alpha) in cells.items()
        }
    )
    found = published_params(benchmark, family, sorted(cells))  # in whatever order the layers are asked for
    assert found == expected
    assert list(found.layers) == list(cells)


def test_further_layers_are_left_alone() -> None:
    layers = ["avgpool", "layer4", "layer3", "layer2", "layer1"]
    assert list(published_params("cifar10", "resnet", layers).layers) == ["avgpool", "layer3", "layer2", "layer1"]


@pytest.mark.parametrize(
    ("benchmark", "family", "layers"),
    [
        ("digits", "digits_cnn", ["avgpool", "layer3", "layer2", "layer1"]),
        ("cifar10", "vit", ["layer_norm", "layer_11", "layer_10", "layer_9"]),
        ("cifar10", "resnet", ["avgpool", "layer3", "layer2"]),
    ],
)
def test_what_the_paper_does_not_have_is_refused(benchmark: str, family: str, layers: list[str]) -> None:
    message = (
        rf"^the paper has no parameters for {benchmark}, {family}, layers {', '.join(layers)} \(it has "
        r"cifar10 resnet: avgpool, layer3, layer2, layer1; .*imagenet vit: layer_norm, layer_11, layer_10, layer_9\); "
        r"find some with: nacpipe search CACHE$"
    )
    with pytest.raises(ParamsError, match=message):
        published_params(benchmark, family, layers)
