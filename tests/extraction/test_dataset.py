"""Image lists, and what is said about images that are not there or cannot be read."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import functional as vision

from nacpipe.benchmarks import digits
from nacpipe.benchmarks.standard import Transform, find_benchmark
from nacpipe.errors import ImageError, InputError
from nacpipe.extraction.dataset import ImageSet, build_transform, open_images

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR10 = find_benchmark("cifar10")


@pytest.fixture(autouse=True)
def _pillow_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's switch for truncated images is global."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


def write_list(root: Path, name: str, content: str) -> None:
    folder = root / "benchmark_imglist/cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


def write_image(root: Path, name: str, content: bytes | Image.Image) -> Path:
    file = root / "images_classic" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content.save(file, quality=95)
    return file


def open_val(root: Path, allow_truncated: bool = False) -> ImageSet:
    images = open_images(
        CIFAR10, CIFAR10.split("id/val"), root, train_images=10, train_seed=1, allow_truncated=allow_truncated
    )
    assert images is not None
    return images


# --- sets -------------------------------------------------------------------------------------------------------------


def test_a_set_knows_its_list(tmp_path: Path) -> None:
    write_list(tmp_path, "val_cifar10.txt", "a.png 4\nb.png 2\n")
    images = open_val(tmp_path)
    content = (tmp_path / "benchmark_imglist/cifar10/val_cifar10.txt").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert images.identity() == {"list": "val_cifar10.txt", "sha256": sha256}
    assert (images.name, images.labels.tolist(), images.index.tolist()) == ("id/val", [4, 2], [0, 1])
    assert open_images(CIFAR10, CIFAR10.split("id/test"), tmp_path, train_images=1, train_seed=1) is None


def open_train(root: Path, count: int) -> ImageSet:
    images = open_images(CIFAR10, CIFAR10.split("id/train"), root, train_images=count, train_seed=1)
    assert images is not None
    return images


def test_training_images_are_chosen_and_the_choice_is_part_of_the_identity(tmp_path: Path) -> None:
    write_list(tmp_path, "main_train_cifar10.txt", "".join(f"{i}.png {i % 10}\n" for i in range(40)))
    images = open_train(tmp_path, 20)
    assert np.bincount(images.labels[images.index]).tolist() == [2] * 10
    assert {"images": 20, "seed": 1}.items() <= images.identity().items()
    assert images.notes == ()
    assert open_train(tmp_path, 45).notes == ("id/train: 40 of the 45 images asked for, the same number of each class",)
    assert open_train(tmp_path, 3).notes == ("id/train: 3 images cannot cover 10 classes; chosen unbalanced",)


def test_without_main_train_the_train_list_is_used_and_said(tmp_path: Path) -> None:
    write_list(tmp_path, "train_cifar10.txt", "".join(f"{i}.png {i}\n" for i in range(10)))
    images = open_train(tmp_path, 10)
    assert images.identity()["list"] == "train_cifar10.txt"
    assert images.notes == ("id/train: there is no main_train_cifar10.txt, so train_cifar10.txt is used",)
    write_list(tmp_path, "main_train_cifar10.txt", "0.png 0\n")
    assert open_train(tmp_path, 10).source == "main_train_cifar10.txt"


def test_training_labels_out_of_range_name_the_list(tmp_path: Path) -> None:
    write_list(tmp_path, "main_train_cifar10.txt", "a.png 0\nb.png 10\n")
    message = (
        r"^id/train: 1 of 2 labels are outside 0 … 9; the first is 10, of .*/b\.png \(line 2 of .*/main_train_cifar10\."
        r"txt\); correct the labels, or the benchmark's number of classes$"
    )
    with pytest.raises(InputError, match=message):
        open_train(tmp_path, 2)


# --- images -----------------------------------------------------------------------------------------------------------


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_image(tmp_path, "a.png", picture(0))
    write_list(tmp_path, "val_cifar10.txt", "a.png 0\nx/b.png 1\nc.png 2\n")
    images = open_val(tmp_path)
    message = r"images_classic/x/b\.png \(line 2 of .*/benchmark_imglist/cifar10/val_cifar10\.txt\)$"
    assert images.missing() == [1, 2]
    with pytest.raises(ImageError, match=r"^2 listed images are not there; the first is .*" + message):
        images.check(images.index)
    with pytest.raises(ImageError, match=r"^image is not there: .*" + message):
        images.open(1)
    write_list(tmp_path, "val_cifar10.txt", "a.png 0\n")
    images = open_val(tmp_path)
    assert images.missing() == []
    images.check(images.index)


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    write_image(tmp_path, "text.png", b"not an image at all")
    write_image(tmp_path, "empty.png", b"")
    (tmp_path / "images_classic/folder.png").mkdir()
    write_list(tmp_path, "val_cifar10.txt", "text.png 0\nempty.png 1\nfolder.png 2\n")
    images = open_val(tmp_path)
    for row, name in enumerate(["text", "empty", "folder"]):
        message = rf"^image cannot be read: .*/images_classic/{name}\.png \(line {row + 1} of .*val_cifar10\.txt\): .+"
        with pytest.raises(ImageError, match=message):
            images.open(row)


def test_messages_do_not_show_addresses_in_memory(tmp_path: Path) -> None:
    write_image(tmp_path, "text.png", b"not an image at all")
    write_list(tmp_path, "val_cifar10.txt", "text.png 0\n")
    with pytest.raises(ImageError, match=r"image cannot be read") as caught:
        open_val(tmp_path).open(0)
    assert "0x" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


@pytest.fixture
def truncated(tmp_path: Path) -> Path:
    """A data root whose only image is a JPEG without its last third."""
    file = write_image(tmp_path, "cut.jpg", picture(1, (64, 64)))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    write_list(tmp_path, "val_cifar10.txt", "cut.jpg 0\n")
    return tmp_path


def test_truncated_images_are_refused_with_the_way_out(truncated: Path) -> None:
    message = (
        r"^image cannot be read: .*cut\.jpg \(line 1 of .*val_cifar10\.txt\): image file is truncated \(\d+ bytes not"
        r" processed\); --allow-truncated loads it as OpenOOD does$"
    )
    with pytest.raises(ImageError, match=message):
        open_val(truncated).open(0)


def test_truncated_images_load_when_allowed_and_only_then(truncated: Path) -> None:
    whole = np.asarray(picture(1, (64, 64)), int)
    image = np.asarray(open_val(truncated, allow_truncated=True).open(0), int)
    assert image.shape == (64, 64, 3)
    assert np.abs(image[:32] - whole[:32]).mean() < 50  # noise survives a JPEG roughly
    assert (image[-8:] == 128).all()  # what is not there is grey
    with pytest.raises(ImageError, match="truncated"):
        open_val(truncated).open(0)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 80), (28, 28)])
def test_transform_is_torchvisions_step_by_step(size: tuple[int, int]) -> None:
    """OpenOOD's test transform: resize (bilinear, the short side), centre crop, to tensor, normalise."""
    image = picture(3, size)
    steps = vision.resize(image, [32], vision.InterpolationMode.BILINEAR)
    steps = vision.to_tensor(vision.center_crop(steps, [32, 32]))
    expected = vision.normalize(steps, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert torch.equal(build_transform(CIFAR10.transform)(image), expected)


def test_bicubic_is_torchvisions() -> None:
    image = picture(3, (48, 80))
    steps = vision.center_crop(vision.resize(image, [32], vision.InterpolationMode.BICUBIC), [32, 32])
    expected = vision.normalize(vision.to_tensor(steps), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert torch.equal(build_transform(replace(CIFAR10.transform, interpolation="bicubic"))(image), expected)


def test_transform_by_hand() -> None:
    """An image of the right size is only divided by 255, shifted and scaled; grey and transparent ones become RGB."""
    transform = build_transform(Transform(resize=2, crop=2, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    pixels = np.array([[[0, 51, 102], [255, 204, 153]], [[1, 2, 3], [4, 5, 6]]], np.uint8)
    expected = (pixels / 255 - [0.5, 0.25, 0.0]) / [0.5, 0.25, 1.0]
    found = transform(Image.fromarray(pixels))
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-6)
    grey = transform(Image.fromarray(np.full((2, 2), 51, np.uint8)))
    np.testing.assert_allclose(grey[:, 0, 0].numpy(), (0.2 - np.array([0.5, 0.25, 0])) / [0.5, 0.25, 1], rtol=1e-5)
    assert torch.equal(transform(Image.fromarray(pixels).convert("RGBA")), found)


def test_pre_resized_images_are_only_normalised(tmp_path: Path) -> None:
    image = picture(3, (48, 80))
    expected = vision.normalize(vision.to_tensor(image), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    transform = build_transform(CIFAR10.transform, pre_resized=True)
    assert torch.equal(transform(image), expected)


def test_being_pre_resized_is_part_of_the_identity(tmp_path: Path) -> None:
    write_list(tmp_path, "val_cifar10.txt", "a.png 4\n")
    split = replace(CIFAR10.split("id/val"), pre_resized=True)
    images = open_images(CIFAR10, split, tmp_path, train_images=1, train_seed=1)
    assert images is not None
    assert images.pre_resized
    assert images.identity() == {**open_val(tmp_path).identity(), "untouched": True}


def test_packaged_images_come_as_they_are() -> None:
    benchmark = find_benchmark("digits")
    images = open_images(benchmark, benchmark.split("id/val"), Path("nowhere"), train_images=1, train_seed=1)
    assert images is not None
    raw, labels = digits.load_set("val")
    expected = (raw[5] / 255 - 0.1307) / 0.3081
    found = build_transform(benchmark.transform)(images.open(5))
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (images.labels == labels).all()
    images.check(images.index)


# --- hostile images ---------------------------------------------------------------------------------------------------


def png_of_size(width: int, height: int) -> bytes:
    """A whole PNG header that claims a size, and next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of_size(100_000, 100_000), r"decompression bomb"),
        (png_of_size(2**31 - 1, 2**31 - 1), r"decompression bomb"),
        (png_of_size(0, 0), r""),
        (png_of_size(300, 300), r"truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", r""),  # Pillow would start ghostscript
        (b"GIF89a" + b"\xff" * 50, r""),
        (b"<svg/>", r"cannot identify"),
        (b"", r"cannot identify"),
    ],
)
def test_hostile_images_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    write_image(tmp_path, "0.png", content)
    write_list(tmp_path, "val_cifar10.txt", "0.png 0\n")
    images = open_val(tmp_path)
    with pytest.raises(ImageError, match=rf"image cannot be read: .*0\.png \(line 1 of .*\): .*{message}"):
        images.open(0)
