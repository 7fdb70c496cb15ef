"""OpenOOD's archives on Google Drive: which ones a benchmark needs, and the folder of each."""

from __future__ import annotations

from dataclasses import dataclass

from nacpipe.errors import InputError

DRIVE = "https://drive.google.com/uc?id="
LISTS = "benchmark_imglist"
AUTHORS_LISTS = "benchmark_imglist_authors"  # not downloaded unless named

# fmt: off
_LISTS = {
    LISTS: "1lI1j0_fDDvjIt9JlWAw09X8ks-yrR_H1",  # OpenOOD's since 2024-07-30 (275260a)
    AUTHORS_LISTS: "1XKzBdWCqg3vPoj-D32YixJyJJ0hL63gP",  # OpenOOD's before, and the authors' of NAC-UE
}
_CLASSIC = {
    "cifar10": "1Co32RiiWe16lTaiOU6JMMnyUYS41IlO1",
    "cifar100": "1PGKheHUsf29leJPPGuXqzLBMwl8qMF8_",
    "tin": "1PZ-ixyx52U989IKsMA2OT-24fToTrelC",
    "mnist": "1CCHAGWqA1KJTFFswuF9cbhmB-j98Y1Sb",
    "svhn": "1DQfc11HOtB1nEwqS4pWUFp8vtQ3DczvI",
    "texture": "1OSz1m3hHfVWbRdmMwKbUzoU8Hg9UKcam",
    "places365": "1Ec-LRSTf6u5vEctKX9vRp9OA6tqnJ0Ay",
    "cifar10c": "170DU_ficWWmbh6O2wqELxK9jxRiGhlJH",
}
_LARGE = {
    "imagenet_1k": "1i1ipLDFARR-JZ9argXd2-0a6DXwVhXEj",
    "ssb_hard": "1PzkA-WGG8Z18h0ooL_pDdz9cO-DCIouE",
    "ninco": "1Z82cmvIB0eghTehxOGP5VTdLt7OD3nk6",
    "inaturalist": "1zfLfMvoUD0CUlKNnkk7LgxZZBnTBipdj",
    "openimage_o": "1VUFXnB_z70uHfdgJG2E_pjYOcEgqM7tE",
    "imagenet_v2": "1akg2IiE22HcbvTBpwXQoD7tgfPCdkoho",
    "imagenet_c": "1JeXL9YH4BO8gCJ631c5BHbaSsl-lekHt",
    "imagenet_r": "1EzjMN2gq-bVV7lg-MEAdeuBuz-7jbGYU",
    "imagenet_es": "1ATz11vKmPqyzfEaEDRaPTF9TXiC244sw",
}
_CHECKPOINTS = {
    "cifar10_res18_v1.5": "1byGeYxM_PlLjT72wZsMQvP6popJeWBgt",
    "cifar100_res18_v1.5": "1s-1oNrRtmA0pGefxXJOUVRYpaoAML0C-",
    "imagenet200_res18_v1.5": "1ddVmwc8zmzSjdLUO84EuV4Gz1c7vhIAs",
    "imagenet_res50_v1.5": "15PdDMNRfnJ7f2oxW6lI-Ge4QJJH3Z0Fy",
}
_ARCHIVES_OF = {
    "cifar10": ("cifar10", "cifar100", "tin", "mnist", "svhn", "texture", "places365", "cifar10c"),
    "cifar100": ("cifar100", "cifar10", "tin", "mnist", "svhn", "texture", "places365"),
    "imagenet200": (*(name for name in _LARGE if name != "imagenet_es"), "texture"),
    "imagenet": (*_LARGE, "texture"),
}
_CHECKPOINTS_OF = dict(zip(_ARCHIVES_OF, _CHECKPOINTS, strict=True))
_NOTES = {
    "imagenet_1k": "OpenOOD shares no ImageNet training images: put ILSVRC2012's in images_largescale/imagenet_1k/train"
}
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A zip archive."""

    name: str
    drive: str
    """Its id on Google Drive."""
    folder: str
    """The folder that it is unpacked into: below the data root, or for checkpoints below the folder of results."""
    checkpoints: bool = False
    lists: bool = False
    """Whether it holds image lists and no images."""
    lacks: tuple[str, ...] = ()
    """The benchmark's splits that these lists do not contain."""
    note: str = ""
    """The note to print when the archive lacks images that a list names."""

    def url(self, mirror: str | None = None) -> str:
        """Return the URL: at Google Drive, or NAME.zip at a mirror."""
        return f"{DRIVE}{self.drive}" if mirror is None else f"{mirror.rstrip('/')}/{self.name}.zip"


def has_archives(benchmark: str) -> bool:
    """Return whether OpenOOD has archives for a benchmark."""
    return benchmark in _ARCHIVES_OF


def find_archives(benchmark: str) -> tuple[Archive, ...]:
    """Return a benchmark's archives: OpenOOD's lists, the authors', then the images, last the checkpoints.

    Raises:
        InputError: OpenOOD has none for this benchmark.
    """
    if benchmark not in _ARCHIVES_OF:
        raise InputError(
            f"OpenOOD has no archives for benchmark {benchmark}; it has them for {', '.join(_ARCHIVES_OF)}"
        )
    trained = _CHECKPOINTS_OF[benchmark]
    return (
        Archive(name=LISTS, drive=_LISTS[LISTS], folder=LISTS, lists=True),
        Archive(
            name=AUTHORS_LISTS,
            drive=_LISTS[AUTHORS_LISTS],
            folder=LISTS,
            lists=True,
            lacks=("csid/imagenet_es",) if benchmark == "imagenet" else (),
        ),
        *(
            Archive(
                name=name,
                drive=(_CLASSIC | _LARGE)[name],
                folder=f"{'images_classic' if name in _CLASSIC else 'images_largescale'}/{name}",
                note=_NOTES.get(name, ""),
            )
            for name in _ARCHIVES_OF[benchmark]
        ),
        Archive(name=trained, drive=_CHECKPOINTS[trained], folder="", checkpoints=True),
    )
