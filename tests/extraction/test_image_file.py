"""What an image of more than 8 bits becomes, format by format, and wherever images are read."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.detector.predict import Ready, ScoreOptions, score_images
from nacpipe.errors import ImageError
from nacpipe.extraction.dataset import ImageSet, Normalise, open_images
from nacpipe.extraction.image_file import read_image, to_eight_bits
from nacpipe.extraction.loader import load_batches
from nacpipe.reporting.mosaic import GAP, SIDE, TEXT, draw_mosaic

pytestmark = pytest.mark.usefixtures("one_thread")

Values = np.ndarray[Any, Any]

WIDE = np.array([[0, 1, 128, 129, 257, 1000], [32768, 40000, 65000, 65406, 65407, 65535]])
EIGHT = [0, 0, 0, 1, 1, 4, 128, 156, 253, 254, 255, 255]  # v / 257, rounded: by hand
AS_THEY_ARE = Transform(resize=2, crop=2, mean=(0.0,) * 3, std=(1 / 255,) * 3)


def tiff(values: Values, bits: int, sample_format: int = 1, photometric: int = 1, raw: bytes = b"") -> bytes:
    """A grey TIFF, little endian, not compressed, of values (height, width), or of what is given as packed."""
    (height, width), raw = values.shape, raw or values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: height}
    tags |= {279: len(raw), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + raw  # 8 + 2 + 10 · 12 + 4 = 134


def packed(values: Values) -> bytes:
    """Values (height, width) of 12 bits, two in three bytes."""
    first, second = values[:, ::2], values[:, 1::2]
    parts = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    return parts.astype(np.uint8).tobytes()


def saved(values: Values, kind: str, **options: Any) -> bytes:
    Image.fromarray(values).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def pgm(values: Values, top: int, plain: bool = False) -> bytes:
    height, width = values.shape
    body = " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes()
    return f"{'P2' if plain else 'P5'} {width} {height} {top}\n".encode() + body


TOP_1000 = np.array([[0, 1, 2, 499, 500, 1000]])
TOP_12 = np.array([[0, 8, 9, 2048, 4080, 4095]])
KNOWN: dict[str, tuple[bytes, list[int]]] = {
    "png": (saved(WIDE.astype("<u2"), "PNG"), EIGHT),
    "tiff": (saved(WIDE.astype("<u2"), "TIFF"), EIGHT),
    "tiff, big endian": (saved(WIDE.astype(">u2"), "TIFF"), EIGHT),
    "tiff, lzw": (saved(WIDE.astype("<u2"), "TIFF", compression="tiff_lzw"), EIGHT),
    "tiff, deflate, big endian": (saved(WIDE.astype(">u2"), "TIFF", compression="tiff_adobe_deflate"), EIGHT),
    "tiff, 0 is white": (tiff(65535 - WIDE.astype("<u2"), 16, photometric=0), EIGHT),
    "tiff, 12 bits": (tiff(TOP_12, 12, raw=packed(TOP_12)), [0, 0, 1, 128, 254, 255]),
    "pgm": (pgm(WIDE, 65535), EIGHT),
    "pgm, plain": (pgm(WIDE, 65535, plain=True), EIGHT),
    "pgm, maximum 1000": (pgm(TOP_1000, 1000), [0, 0, 1, 127, 128, 255]),
    "pgm, maximum 1000, plain": (pgm(TOP_1000, 1000, plain=True), [0, 0, 1, 127, 128, 255]),
}
UNKNOWN: dict[str, tuple[bytes, str]] = {
    "tiff, floats": (saved(WIDE.astype("<f4"), "TIFF"), "floats of unknown range"),
    "tiff, floats to 1": (saved(WIDE.astype("<f4") / 65535, "TIFF"), "floats of unknown range"),
    "pfm": (b"Pf\n2 2\n-1.0\n" + np.float32([0, 1, 0.5, 300]).tobytes(), "floats of unknown range"),
    "tiff, signed 32 bits": (saved(WIDE.astype("<i4"), "TIFF"), "signed or 32-bit integers of unknown range"),
    "tiff, unsigned 32 bits": (tiff(WIDE.astype("<u4"), 32), "signed or 32-bit integers of unknown range"),
    "tiff, signed 16 bits": (tiff(WIDE.astype("<i2"), 16, 2), "signed or 32-bit integers of unknown range"),
    "tiff, signed 8 bits": (
        tiff(np.array([[-1, 0, 1, 127]], "i1"), 8, 2),
        "signed or 32-bit integers of unknown range",
    ),
}


def read(folder: Path, content: bytes) -> Image.Image:
    (folder / "a.png").write_bytes(content)  # Pillow goes by content
    return read_image(folder / "a.png", "here")


@pytest.mark.parametrize("kind", KNOWN)
def test_what_has_a_known_range_is_scaled(tmp_path: Path, kind: str) -> None:
    content, expected = KNOWN[kind]
    image = read(tmp_path, content)
    assert (image.mode, np.asarray(image).ravel().tolist()) == ("L", expected)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_has_no_known_range_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, reason = UNKNOWN[kind]
    message = rf"^image cannot be read: here: its values are {reason}; save it with 8 or 16 bits per value, unsigned$"
    with pytest.raises(ImageError, match=message):
        read(tmp_path, content)


def test_what_cannot_become_rgb_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("LAB", (2, 2)).save(tmp_path / "a.tif")
    with pytest.raises(
        ImageError, match=r"^image cannot be read: here: its values are of Pillow's mode LAB, which canno"
    ):
        read_image(tmp_path / "a.tif", "here")


def png(depth: int, colour: int, raw: bytes, width: int) -> bytes:
    """A PNG of one row; Pillow writes none of 16 bits per colour."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"\0" + raw)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [  # 16 bits per colour: Pillow has made 8 of them, a PNG's by their upper half
        (png(16, 2, np.array([0, 1000, 65535], ">u2").tobytes(), 1), "RGB", [0, 3, 255]),
        (png(16, 6, np.array([0, 1000, 65535, 32768], ">u2").tobytes(), 1), "RGBA", [0, 3, 255, 128]),
        (b"P6 1 1 65535\n" + np.array([0, 1000, 65535], ">u2").tobytes(), "RGB", [0, 4, 255]),  # rounded
        # at most 8 bits: as they are
        (saved(np.array([[0, 100, 255]], np.uint8), "PNG"), "L", [0, 100, 255]),
        (saved(np.array([[0, 100, 255]], np.uint8), "TIFF"), "L", [0, 100, 255]),
        (png(2, 0, b"\x1b", 4), "L", [0, 85, 170, 255]),
        (pgm(np.array([[0, 7, 15]]), 15, plain=True), "L", [0, 119, 255]),
    ],
)
def test_what_pillow_scales_is_left_as_it_is(tmp_path: Path, content: bytes, mode: str, expected: list[int]) -> None:
    image = read(tmp_path, content)
    assert (image.mode, np.asarray(image).ravel().tolist()) == (mode, expected)


# --- wherever images are read -----------------------------------------------------------------------------------------


class Wide(torchvision.datasets.FakeData):
    """Gives images as the class attribute has them."""

    image = Image.new("L", (1, 1))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image, index


def split_of(place: str, root: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Split:
    """A split whose only image is of this content."""
    file = root / "pictures/cat/a.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    (root / "list.txt").write_text("pictures/cat/a.png 0\n")
    if place == "class":
        monkeypatch.setattr(torchvision.datasets, "FakeData", Wide)
        monkeypatch.setattr(Wide, "image", Image.open(io.BytesIO(content)))
        return Split(name="id/val", source="FakeData", kind="torchvision", arguments={"size": 1})
    return {
        "list": Split(name="id/val", source="list.txt"),
        "class folder": Split(name="csid/x", source="pictures", kind="folders"),
        "OOD folder": Split(name="ood/far/x", source="pictures", kind="folders"),
        "ImageFolder": Split(name="id/val", source="ImageFolder", kind="torchvision", folder="pictures"),
    }[place]


def opened(split: Split, root: Path) -> ImageSet:
    splits = (Split(name="id/train", source="train.txt"), split)
    benchmark = Benchmark(name="own", classes=1, transform=AS_THEY_ARE, splits=splits)
    images = open_images(benchmark, split, root, train_images=1, train_seed=1)
    assert images is not None
    return images


PLACES = ["list", "class folder", "OOD folder", "ImageFolder", "class"]


@pytest.mark.parametrize("kind", ["png", "tiff, big endian", "pgm, maximum 1000"])
@pytest.mark.parametrize("place", PLACES)
def test_extraction_sees_the_scaled_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    content, expected = KNOWN[kind]
    images = opened(split_of(place, tmp_path, content, monkeypatch), tmp_path)
    images = replace(images, pre_resized=True)
    (batch,) = map(Normalise(AS_THEY_ARE), load_batches([images], [(0, range(1))], AS_THEY_ARE, 0))
    assert batch.round().int()[0].flatten(1).tolist() == [expected] * 3


@pytest.mark.parametrize("kind", ["tiff, floats", "tiff, signed 16 bits"])
@pytest.mark.parametrize("place", PLACES)
def test_extraction_refuses_the_others_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    content, reason = UNKNOWN[kind]
    images = opened(split_of(place, tmp_path, content, monkeypatch), tmp_path)
    file = f"{tmp_path}/pictures/cat/a.png"
    where = {
        "list": rf"{file} \(line 1 of {tmp_path}/list\.txt\)",
        "ImageFolder": f"number 0 of torchvision's ImageFolder: {file}",
        "class": "number 0 of torchvision's FakeData",
    }.get(place, file)
    with pytest.raises(ImageError, match=f"^image cannot be read: {where}: its values are {reason}; save it with 8"):
        next(load_batches([images], [(0, range(1))], AS_THEY_ARE, 0))


def mean_as_score(images: torch.Tensor) -> SimpleNamespace:
    """Stands for a detector; its file holds no scores of id/val."""
    score = images.mean((1, 2, 3))
    is_ood = images.flatten(1)[:, 0] > 0
    return SimpleNamespace(
        logits=images.flatten(1), score=score, percentile=torch.full_like(score, torch.nan), is_ood=is_ood
    )


def test_score_sees_the_scaled_values_and_names_the_others(tmp_path: Path) -> None:
    names = ["png", "tiff, floats", "pgm", "tiff, signed 32 bits", "tiff, lzw"]
    paths = [tmp_path / f"{number}.png" for number in range(len(names))]
    for path, name in zip(paths, names, strict=True):
        path.write_bytes({**KNOWN, **UNKNOWN}[name][0])
    ready = Ready(mean_as_score, AS_THEY_ARE, torch.device("cpu"), predicts=False)  # type: ignore[arg-type]
    rows = list(score_images(ready, paths, ScoreOptions(batch_size=2)))
    middle = np.mean([EIGHT[2], EIGHT[3], EIGHT[8], EIGHT[9]])  # the centre of 2 × 6
    assert {row.percentile for row in rows} == {None}
    assert [row.score for row in rows] == [pytest.approx(middle, abs=1e-3) if n in KNOWN else None for n in names]
    assert [row.error for row in rows] == [
        None
        if name in KNOWN
        else f"image cannot be read: {path}: its values are {UNKNOWN[name][1]}; save it with 8 or 16 bits per value,"
        " unsigned"
        for path, name in zip(paths, names, strict=True)
    ]


@pytest.mark.parametrize("place", PLACES)
def test_a_mosaic_shows_the_scaled_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    flat = np.full((4, 4), 40000, "<u2")
    images = opened(split_of(place, tmp_path, saved(flat, "PNG"), monkeypatch), tmp_path)
    tile = np.asarray(draw_mosaic(images.open, {"": [(0, "")]}))[2 * GAP + TEXT :][:SIDE, GAP : GAP + SIDE]
    assert {tuple(pixel) for pixel in tile.reshape(-1, 3).tolist()} == {(156, 156, 156)}
    (tmp_path / "pictures/cat/a.png").write_bytes(UNKNOWN["tiff, floats"][0])
    monkeypatch.setattr(Wide, "image", Image.fromarray(WIDE.astype("<f4")))
    with pytest.raises(ImageError, match="its values are floats of unknown range"):
        draw_mosaic(images.open, {"": [(0, "")]})


def test_an_array_of_16_bits_has_their_whole_range() -> None:
    assert np.asarray(to_eight_bits(Image.fromarray(WIDE.astype("<u2")))).ravel().tolist() == EIGHT
    assert np.asarray(to_eight_bits(Image.fromarray(WIDE.astype(">u2")))).ravel().tolist() == EIGHT
    with pytest.raises(ValueError, match=r"^its values are signed or 32-bit integers of unknown range"):
        to_eight_bits(Image.fromarray(WIDE.astype("<i4")))
