"""JPEGs by another decoder: the same images, the same errors, another identity."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image as decode_by_torchvision

from nacpipe.cache import Cache, open_cache
from nacpipe.errors import IdentityError, ImageError, InputError
from nacpipe.extraction import decoder as decoder_module
from nacpipe.extraction.decoder import Decoder, check_gpu, stored_decoder
from nacpipe.extraction.image_file import decode_image
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning"),
]

TORCHVISION = Decoder(name="torchvision")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth colours, 60 × 44."""
    rng = np.random.RandomState(0)
    return Image.fromarray(rng.randint(0, 256, (6, 8, 3), np.uint8)).resize((60, 44), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what torchvision was given."""
    lengths: list[int] = []
    decode = decoder_module._decode

    def noting(content: torch.Tensor, *more: Any) -> torch.Tensor:
        lengths.append(content.numel())
        return decode(content, *more)

    monkeypatch.setattr(decoder_module, "_decode", noting)
    return lengths


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "subsampling": 0}, {"quality": 40}])
def test_a_jpeg_is_what_torchvision_makes_of_it(
    picture: Image.Image, decoded: list[int], mode: str, options: dict[str, Any]
) -> None:
    content = encode(picture.convert(mode), **options)
    found = decode_image(content, "x", decoder=TORCHVISION)
    assert decoded == [len(content)]
    assert (found.mode, found.size) == (mode, (60, 44))
    values = decode_by_torchvision(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    np.testing.assert_array_equal(np.asarray(found), values.permute(1, 2, 0).squeeze(2).numpy())
    pillow = np.asarray(decode_image(content, "x")).astype(int)
    assert np.abs(np.asarray(found) - pillow).max() <= 3


OTHERS: dict[str, Callable[[Image.Image], bytes]] = {
    "CMYK": lambda image: encode(image.convert("CMYK")),
    "PNG": lambda image: encode(image, "PNG"),
    "16 bits": lambda image: encode(Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000), "PNG"),
    "palette": lambda image: encode(image.convert("P"), "GIF"),
    "several": lambda image: encode(image, "MPO", save_all=True, append_images=[image]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_plain_jpeg_is_pillows(picture: Image.Image, decoded: list[int], kind: str) -> None:
    content = OTHERS[kind](picture)
    found, expected = decode_image(content, "x", decoder=TORCHVISION), decode_image(content, "x")
    assert decoded == []
    assert found.mode == expected.mode
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_orientation_is_left_alone(picture: Image.Image, decoded: list[int]) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter
    content = encode(picture, exif=tags)
    assert decode_image(content, "x", decoder=TORCHVISION).size == decode_image(content, "x").size == (60, 44)
    assert len(decoded) == 1


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-20],
    "no end": lambda content: content[:-2],
    "garbage": lambda content: content[:4] + bytes(range(256)) + content[-2:],
    "empty": lambda content: b"",
}


def read(content: bytes, allow_truncated: bool, decoder: Decoder) -> str | list[Any]:
    """Its pixels, or the error."""
    try:
        image = decode_image(content, "a.jpg (line 3 of list.txt)", allow_truncated, "; a hint", decoder)
    except ImageError as error:
        return str(error)
    return np.asarray(image).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("allow_truncated", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_or_read_as_pillow_does(
    picture: Image.Image, kind: str, allow_truncated: bool
) -> None:
    content = BROKEN[kind](encode(picture))
    found = read(content, allow_truncated, TORCHVISION)
    assert found == read(content, allow_truncated, Decoder())
    if kind == "truncated" and not allow_truncated:
        assert isinstance(found, str)
        assert found.startswith("image cannot be read: a.jpg (line 3 of list.txt): image file is truncated (")
        assert found.endswith("; a hint")


def test_too_many_pixels_are_refused(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 44 // 2 - 1)
    with pytest.raises(ImageError, match=r"^image cannot be read: x: Image size \(2640 pixels\) exceeds limit"):
        decode_image(encode(picture), "x", decoder=TORCHVISION)


def test_a_full_gpu_is_not_taken_for_a_broken_file(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoder_module, "_decode", full)
    with pytest.raises(
        InputError, match=r"^the memory of cuda:1 is full, on which JPEGs .*; take a smaller --batch-size$"
    ):
        decode_image(encode(picture), "x", decoder=Decoder(name="nvjpeg", device="cuda:1"))


def test_nvjpeg_decodes_on_its_gpu(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[object] = []

    def noting(content: torch.Tensor, mode: str, device: str) -> torch.Tensor:
        places.append(device)
        return torch.zeros(3, 44, 60, dtype=torch.uint8)

    monkeypatch.setattr(decoder_module, "_decode", noting)
    decoder = pickle.loads(pickle.dumps(Decoder(name="nvjpeg", device="cuda:1")))
    assert decode_image(encode(picture), "x", decoder=decoder).size == (60, 44)
    assert places == ["cuda:1"]


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def jpegs(request_: ExtractRequest, tmp_path: Path) -> ExtractRequest:
    """id/val and ood/val of JPEGs."""
    rng, lists = np.random.RandomState(0), tmp_path / "data/benchmark_imglist/cifar10"
    lists.mkdir(parents=True)
    for name in ("val_cifar10.txt", "val_tin.txt"):
        folder = tmp_path / "data/images_classic" / name[:-4]
        folder.mkdir(parents=True)
        for row in range(6):
            colours = Image.fromarray(rng.randint(0, 256, (4, 4, 3), np.uint8))
            colours.resize((36, 32), Image.Resampling.BICUBIC).save(folder / f"{row}.jpg", quality=60)
        (lists / name).write_text("".join(f"{folder.name}/{row}.jpg {row}\n" for row in range(6)))
    return replace(request_, data_root=tmp_path / "data", splits=("id/val", "ood/val"), workers=0)


def run(request: ExtractRequest) -> Cache:
    extract(plan_extraction(request))
    return open_cache(request.cache)


def test_the_decoder_is_in_the_identity(jpegs: ExtractRequest, decoded: list[int], tmp_path: Path) -> None:
    plain = run(jpegs)
    assert "decoder" not in plain.header.identity
    assert decoded == []
    other = replace(jpegs, cache=tmp_path / "other.zarr", decoder="torchvision")
    found = run(other)
    assert found.header.identity["decoder"] == "torchvision"
    assert len(decoded) == 12
    np.testing.assert_allclose(found["id/val"].read("logits"), plain["id/val"].read("logits"), rtol=0.2, atol=0.2)
    wrong = r"decoder: stored nothing, now torchvision\. Give another --cache, or --decoder pillow$"
    for dry in (False, True):
        with pytest.raises(IdentityError, match=wrong):
            plan_extraction(replace(jpegs, decoder="torchvision"), dry=dry)
    with pytest.raises(
        IdentityError, match=r"decoder: stored torchvision, now nothing\. Give .* --decoder torchvision$"
    ):
        plan_extraction(replace(other, decoder="pillow"))


def test_an_image_that_cannot_be_read_is_named(jpegs: ExtractRequest) -> None:
    file = jpegs.data_root / "images_classic/val_tin/3.jpg"  # type: ignore[operator]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ImageError, match=r"val_tin/3\.jpg.*line 4.*truncated.*--allow-truncated loads it as OpenOOD"):
        run(replace(jpegs, decoder="torchvision"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": "opencv"}, "^--decoder is 'opencv'; known: pillow, torchvision, nvjpeg$"),
        ({"decoder": "nvjpeg"}, "^--decoder nvjpeg needs CUDA, and the network runs on cpu; take --decoder pillow$"),
        (
            {"decoder": "torchvision", "benchmark": "digits", "model": "digits_cnn", "checkpoint": None},
            "^--decoder torchvision: the benchmark's images are packaged, no file is decoded; leave it out$",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(jpegs: ExtractRequest, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_extraction(replace(jpegs, **change))


def test_a_torchvision_without_decoders_is_told(jpegs: ExtractRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(decoder_module.torchvision.io, "decode_jpeg")
    plan_extraction(jpegs, dry=True)
    with pytest.raises(
        InputError, match=r"^--decoder torchvision: torchvision \S+ decodes no JPEGs any more; leave it out"
    ):
        plan_extraction(replace(jpegs, decoder="torchvision"), dry=True)


def test_a_detector_reads_images_as_its_cache_was_made() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    check_gpu("nvjpeg", gpu)
    assert stored_decoder({}, cpu) == Decoder()
    assert stored_decoder({"decoder": "torchvision"}, cpu).name == "torchvision"
    assert stored_decoder({"decoder": "nvjpeg"}, gpu) == Decoder(name="nvjpeg", device="cuda:1")
    assert stored_decoder({"decoder": "nvjpeg"}, cpu) == Decoder()
