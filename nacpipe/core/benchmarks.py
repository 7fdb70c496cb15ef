"""Which sets of images a benchmark is made of, and how its images are prepared. Plain records; nothing is opened."""

from __future__ import annotations

from dataclasses import dataclass

from nacpipe.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """RGB (or grey, for one channel), resize the short side (bilinear), centre crop, to tensor, normalise."""

    resize: int
    """Pixels of the short side."""
    crop: int
    """Pixels of the square that is kept."""
    mean: tuple[float, ...]
    """Per channel, of values in 0 … 1."""
    std: tuple[float, ...]
    """Per channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One set of samples and where its images are."""

    name: str
    """`id/train`, `id/subtrain`, `id/val`, `id/test`, `csid/NAME`, `ood/val`, `ood/near/NAME` or `ood/far/NAME`."""
    source: str
    """The image list's file name, or the packaged set's name."""
    folder: str = ""
    """The folder below the data root that the list's paths start from."""
    fallback: str = ""
    """The list to use where `source` is not there, which is said aloud."""
    optional: bool = False
    """Left out without an error, and said so, when its list is not there and nobody asked for it by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """An in-distribution data set with the sets it is to be told from."""

    name: str
    classes: int
    transform: Transform
    splits: tuple[Split, ...]
    packaged: bool = False
    """True where the images come with Python packages and no data root is needed."""

    def split(self, name: str) -> Split:
        """Return the split of that name.

        Raises:
            InputError: there is none.
        """
        for split in self.splits:
            if split.name == name:
                return split
        raise InputError(
            f"split {name!r} is not part of benchmark {self.name}; it has {', '.join(s.name for s in self.splits)}"
        )


def _openood(name: str, *, near: dict[str, str], far: dict[str, str], csid: dict[str, str]) -> tuple[Split, ...]:
    """OpenOOD's layout for a CIFAR benchmark: lists under benchmark_imglist/NAME, images under images_classic."""

    def one(split: str, source: str, **more: str | bool) -> Split:
        return Split(name=split, source=source, folder="images_classic", **more)  # type: ignore[arg-type]

    return (
        one("id/train", f"main_train_{name}.txt", fallback=f"train_{name}.txt"),
        one("id/subtrain", f"sub_train_{name}.txt", optional=True),
        one("id/val", f"val_{name}.txt"),
        one("id/test", f"test_{name}.txt"),
        *(one(f"csid/{key}", source, optional=True) for key, source in csid.items()),
        one("ood/val", "val_tin.txt"),
        *(one(f"ood/near/{key}", source, optional=True) for key, source in near.items()),
        *(one(f"ood/far/{key}", source, optional=True) for key, source in far.items()),
    )


_CIFAR_FAR = {key: f"test_{key}.txt" for key in ("mnist", "svhn", "texture", "places365")}

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
                    "ood/far/textures": "textures",
                    "ood/far/faces": "faces",
                }.items()
            ),
        ),
        Benchmark(
            name="cifar10",
            classes=10,
            transform=Transform(resize=32, crop=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
            splits=_openood(
                "cifar10",
                near={"cifar100": "test_cifar100.txt", "tin": "test_tin.txt"},
                far=_CIFAR_FAR,
                csid={"cifar10c": "test_cifar10c.txt"},
            ),
        ),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        InputError: it is not known.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is not known; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
