"""The splits of the standard benchmarks and how their images are prepared. Records alone; no file is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nacpipe.benchmarks.synthetic import IMAGE_KINDS
from nacpipe.errors import InputError

INTERPOLATIONS = ("bilinear", "bicubic")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """The preparation of images: RGB (or grey, for one channel), resize the short side, centre crop, normalise."""

    resize: int
    """Pixels of the short side."""
    crop: int
    """Pixels of the square that is kept."""
    mean: tuple[float, ...]
    """Per channel, of values in 0 … 1."""
    std: tuple[float, ...]
    """Per channel."""
    interpolation: str = "bilinear"
    """One of `INTERPOLATIONS`; OpenOOD's is bilinear."""

    def describe(self) -> str:
        """Return the transform in words."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"resize {self.resize} ({self.interpolation}), crop {self.crop}, mean {mean}, std {std}"

    def to_json(self) -> dict[str, Any]:
        """Return the record in a cache's identity: the interpolation only if it is not bilinear."""
        return {
            "resize": self.resize,
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
            **({} if self.interpolation == "bilinear" else {"interpolation": self.interpolation}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One set of samples and the place of its images."""

    name: str
    """`id/train`, `id/subtrain`, `id/val`, `id/test`, `csid/NAME`, `ood/val`, `ood/near/NAME` or `ood/far/NAME`."""
    source: str
    """The image list's file name, the folder of class folders, torchvision's class, or the packaged set's name."""
    kind: Literal["list", "folders", "torchvision"] = "list"
    """The kind of `source`; not used in a packaged benchmark."""
    folder: str = ""
    """The folder below the data root that the list's paths are relative to, or that contains torchvision's data set."""
    fallback: str = ""
    """The list to use if `source` does not exist; a note names it."""
    optional: bool = False
    """Whether the split is left out, with a note, if its list does not exist and it was not requested by name."""
    pre_resized: bool = False
    """Whether the images already have their size: neither resized nor cropped, only normalised (ImageNet-C)."""
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of torchvision's class, besides its root."""
    download: bool = False
    """Whether torchvision may download a data set that does not exist."""
    synthetic: tuple[str, ...] = ()
    """The kinds of OOD samples (synthetic.py) that are made from the images, which are those of id/val then."""
    synthetic_if_missing: bool = False
    """Whether such samples take its place where its list or all of its images do not exist and it was not requested by
    name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """An in-distribution data set and the sets to distinguish it from."""

    name: str
    classes: int
    transform: Transform
    splits: tuple[Split, ...]
    packaged: bool = False
    """True where the images come with Python packages and no data root is needed."""
    root: str = "data"
    """The default data root."""
    lists: str = ""
    """The folder below the data root that holds the image lists."""
    class_names: tuple[str, ...] = ()
    """Class folders in the order of their labels; if empty, those of id/train in alphabetical order."""

    def split(self, name: str) -> Split:
        """Return the split of that name.

        Raises:
            InputError: the benchmark has no such split.
        """
        for split in self.splits:
            if split.name == name:
                return split
        raise InputError(
            f"split {name!r} is not part of benchmark {self.name}; it has {', '.join(s.name for s in self.splits)}"
        )

    def make_synthetic(self, split: str, kinds: tuple[str, ...] = IMAGE_KINDS) -> Split:
        """Return the split of that name, to be made from the images of id/val."""
        return replace(self.split("id/val"), name=split, synthetic=kinds)


def _openood(
    name: str,
    classes: int,
    transform: Transform,
    *,
    images: str,
    val: str,
    near: tuple[str, ...],
    far: tuple[str, ...],
    csid: Mapping[str, str],
) -> Benchmark:
    """Return a benchmark in OpenOOD's layout: lists below benchmark_imglist/NAME, `textures` in images_classic."""

    def make_split(split: str, source: str, **more: Any) -> Split:
        folder = "images_classic" if split.endswith("/textures") else images
        return Split(name=split, source=source, folder=folder, **more)

    return Benchmark(
        name=name,
        classes=classes,
        transform=transform,
        lists=f"benchmark_imglist/{name}",
        splits=(
            make_split("id/train", f"main_train_{name}.txt", fallback=f"train_{name}.txt"),
            make_split("id/subtrain", f"sub_train_{name}.txt", optional=True),
            make_split("id/val", f"val_{name}.txt"),
            make_split("id/test", f"test_{name}.txt"),
            *(make_split(f"csid/{k}", v, optional=True, pre_resized=k == "imagenet_c") for k, v in csid.items()),
            make_split("ood/val", f"val_{val}.txt", synthetic_if_missing=True),
            *(make_split(f"ood/near/{key}", f"test_{key}.txt", optional=True) for key in near),
            *(make_split(f"ood/far/{key}", f"test_{key}.txt", optional=True) for key in far),
        ),
    )


def _cifar(name: str, classes: int, transform: Transform, other: str, csid: Mapping[str, str]) -> Benchmark:
    far = ("mnist", "svhn", "texture", "places365")
    return _openood(
        name, classes, transform, images="images_classic", val="tin", near=(other, "tin"), far=far, csid=csid
    )


def _imagenet(name: str, classes: int, csid: tuple[str, ...]) -> Benchmark:
    return _openood(
        name,
        classes,
        Transform(resize=256, crop=224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        images="images_largescale",
        val="openimage_o",
        near=("ssb_hard", "ninco"),
        far=("inaturalist", "textures", "openimage_o"),
        csid={f"imagenet_{kind}": f"test_{name}_{kind}.txt" for kind in csid},
    )


BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            name="digits",
            classes=10,
            packaged=True,
            transform=Transform(resize=28, crop=28, mean=(0.1307,), std=(0.3081,)),
            splits=tuple(
                Split(name=name, source=source)
                for name, source in {
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
                }.items()
            ),
        ),
        _cifar(
            "cifar10",
            10,
            Transform(resize=32, crop=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
            other="cifar100",
            csid={"cifar10c": "test_cifar10c.txt"},  # without cinic10: OpenOOD lists it, but FS-OOD does not contain it
        ),
        _cifar(
            "cifar100",
            100,
            Transform(resize=32, crop=32, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
            other="cifar10",
            csid={},
        ),
        _imagenet("imagenet200", 200, csid=("v2", "c", "r")),
        _imagenet(
            "imagenet", 1000, csid=("v2", "c", "r", "es")
        ),  # OpenOOD's lists since 2024-07; the authors' lists have no `es`
    )
}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        InputError: it is not known.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is not known; known: {', '.join(BENCHMARKS)}, or your own FILE.toml")
    return BENCHMARKS[name]
