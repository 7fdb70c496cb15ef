"""OOD samples made of ID samples: the same bytes everywhere, and of each kind what it says."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nacpipe.benchmarks.synthetic import ARRAY_KINDS, IMAGE_KINDS, Synthesis, make_synthetic
from nacpipe.errors import InputError

Array = NDArray[Any]
LABELS = np.arange(24) % 3


def pictures(shape: tuple[int, ...] = (24, 20, 32, 3)) -> NDArray[np.uint8]:
    return np.random.RandomState(5).randint(0, 256, shape).astype(np.uint8)


def one(kind: str, images: Array, labels: Array = LABELS, seed: int = 1) -> list[tuple[Array, Array, Array]]:
    """(the ID sample, its partner, what is made) of every row, all of one kind."""
    synthesis = Synthesis(labels=labels, kinds=[kind], seed=seed)
    made = make_synthetic(images, labels, seed, kinds=[kind])
    assert (made.shape, made.dtype) == (images.shape, images.dtype)
    partners = [synthesis.partner(row) for row in range(len(images))]
    assert all(labels[row] != labels[partner] for row, partner in enumerate(partners))
    return [(images[row], images[partner], made[row]) for row, partner in enumerate(partners)]


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "sha256"),
    [
        (pictures(), "f9e51ce8b777f545d68593bd58abbe705806aae076080e7e887bee394a6e8452"),
        (pictures((24, 28, 28)), "2a510e3f84caa8207ac3978d6555f77c80a6f13da242ca46fb3ee70b5300e61a"),
        (
            pictures((24, 6, 5, 3)).astype(np.float32),
            "19a4a10a063e7a697264a817ac667681e581116d5fae02afc334c63d4c637c98",
        ),
        (pictures((24, 12)).astype(np.int64), "6ead668f74f8f5e79512938ffec1e77a0131a78ff94a2978240ea5476d170ec0"),
    ],
    ids=["images", "grey images", "floats", "whole numbers"],
)
def test_the_bytes(images: Array, sha256: str) -> None:
    """They are part of a cache's identity by version and seed alone, so they must never change within a version."""
    made = make_synthetic(images, LABELS)
    assert hashlib.sha256(made.astype(made.dtype.newbyteorder("<")).tobytes()).hexdigest() == sha256


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_rounding_of_the_transform_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Fourier transform that differs by 10⁻¹⁰, a thousand times float64's rounding, gives the same bytes."""
    images, inverse = pictures((24, 32, 32, 3)), np.fft.irfft2
    expected = make_synthetic(images, LABELS, kinds=[kind])
    monkeypatch.setattr(np.fft, "irfft2", lambda *args, **options: inverse(*args, **options) + 1e-10)
    np.testing.assert_array_equal(make_synthetic(images, LABELS, kinds=[kind]), expected)


def test_a_row_is_made_alone() -> None:
    """In any order, whatever was made before, and only what it needs is loaded."""
    images, loaded = pictures(), list[int]()

    def load(row: int) -> Array:
        loaded.append(row)
        return images[row]

    synthesis, expected = Synthesis(labels=LABELS), make_synthetic(images, LABELS)
    for row in (17, 3, 0, 22, 17):
        loaded.clear()
        np.testing.assert_array_equal(synthesis.make(row, load), expected[row])
        needs = [row, synthesis.partner(row)] if synthesis.kind(row) in ("mix", "patches") else [row]
        assert loaded == needs
    assert [synthesis.kind(row) for row in range(9)] == [*IMAGE_KINDS, "shuffle"]
    assert synthesis.identity() == {"version": 1, "seed": 1, "kinds": list(IMAGE_KINDS)}


def test_another_seed_gives_other_samples() -> None:
    images = pictures((24, 16, 16, 3))
    first, second = make_synthetic(images, LABELS), make_synthetic(images, LABELS, seed=2)
    alike = [kind for row, kind in enumerate(IMAGE_KINDS) if (first[row::8] == second[row::8]).all()]
    assert alike == ["blur", "negative"]  # nothing is drawn for them
    assert (images == pictures((24, 16, 16, 3))).all()  # and the ID samples stay as they are


# --- images -----------------------------------------------------------------------------------------------------------


def cut(image: Array, cuts: int) -> list[bytes]:
    height, width = image.shape[0] // cuts, image.shape[1] // cuts
    places = [(y * height, x * width) for y in range(cuts) for x in range(cuts)]
    return [image[y : y + height, x : x + width].tobytes() for y, x in places]


def test_shuffled_patches_are_a_permutation() -> None:
    found = set()
    for image, _, made in one("shuffle", pictures()):
        (cuts,) = [
            c for c in (2, 4) if sorted(cut(made, c)) == sorted(cut(image, c)) and cut(made, c) != cut(image, c)
        ][:1]
        found.add(cuts)
    assert found == {2, 4}


def test_what_is_left_over_beside_the_patches_stays() -> None:
    for image, _, made in one("shuffle", pictures((24, 22, 35, 3))):
        assert (made[:, 34] == image[:, 34]).all()
        assert (made != image).any()


def test_a_mixture_is_between_its_two_images() -> None:
    shares = []
    for image, other, made in one("mix", pictures()):
        a, b, c = (x.astype(float).ravel() for x in (image, other, made))
        shares.append(float(((c - b) * (a - b)).sum() / ((a - b) ** 2).sum()))
        assert np.abs(c - (shares[-1] * a + (1 - shares[-1]) * b)).max() < 1
    assert 0.4 <= min(shares) < 0.45
    assert 0.55 < max(shares) <= 0.6


def test_phases_keep_amplitudes() -> None:
    """Up to the rounding to whole numbers; values far from 0 and 255, so that nothing is cut off."""
    images = (pictures() // 8 + 112).astype(np.uint8)
    for image, _, made in one("phases", images):
        before, after = (np.fft.rfft2(x.astype(float), axes=(0, 1)) for x in (image, made))
        kept = np.abs(before) > 50
        assert np.abs(np.abs(after) - np.abs(before))[kept].max() < 30  # 1,920 rounded values
        assert abs(image.mean() - made.mean()) < 0.5
        turned = np.angle(after * before.conj())
        assert np.ptp(turned[..., 0][kept[..., 0]]) > 4
        strong = (np.abs(before) > 300).all(axis=2)  # all channels are turned alike
        assert np.abs(np.exp(1j * turned[strong, 0]) - np.exp(1j * turned[strong, 1])).max() < 0.3


def test_an_even_image_has_no_phases_to_change() -> None:
    images = np.full((24, 9, 8), 77, np.uint8)
    assert (make_synthetic(images, LABELS, kinds=["phases"]) == 77).all()


def test_noise_is_a_quarter_to_a_half_of_the_range() -> None:
    images = np.full((24, 40, 40, 3), 128, np.uint8)
    spreads = [(made.astype(float) - image).std() for image, _, made in one("noise", images)]
    assert 60 < min(spreads) < 75
    assert 85 < max(spreads) < 115  # cut off at 0 and 255
    assert all(abs(made.astype(float).mean() - 128) < 5 for _, _, made in one("noise", images))


def test_blur_keeps_the_mean_and_little_else() -> None:
    for image, _, made in one("blur", pictures((24, 32, 32, 3))):
        assert made.astype(float).std() < 0.2 * image.astype(float).std()
        assert abs(made.astype(float).mean() - image.astype(float).mean()) < 6
    edge = np.zeros((24, 21, 21), np.uint8)
    edge[:, :, 10] = 210
    made = make_synthetic(edge, LABELS, kinds=["blur"])[0]
    assert (made == made[0]).all()  # the same along the line
    np.testing.assert_array_equal(made[0], made[0, ::-1])  # and on both sides of it
    assert (made[0, 10], made[0, 4], made[0, 3]) == (32, 2, 0)  # 210 · 19 / 125, 210 / 125 rounded thrice; none beyond


def test_negative() -> None:
    for image, _, made in one("negative", pictures()):
        np.testing.assert_array_equal(made.astype(int) + image, 255)


def test_half_the_patches_are_of_another_class() -> None:
    for image, other, made in one("patches", pictures()):
        own, others, found = cut(image, 4), cut(other, 4), cut(made, 4)
        assert sum(patch == mine for patch, mine in zip(found, own, strict=True)) == 8
        assert sum(patch == theirs for patch, theirs in zip(found, others, strict=True)) == 8


def test_turns() -> None:
    turns = set()
    for image, _, made in one("turn", pictures((24, 16, 16, 3))):
        (quarters,) = [k for k in range(1, 4) if (np.rot90(image, k) == made).all()]
        turns.add(quarters)
    assert turns == {1, 2, 3}
    for image, _, made in one("turn", pictures()):  # not square
        np.testing.assert_array_equal(made, image[::-1, ::-1])


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([None, 1, 3]), seed=st.integers(0, 9)
)
def test_images_of_any_size(height: int, width: int, channels: int | None, seed: int) -> None:
    shape = (8, height, width, *([] if channels is None else [channels]))
    images = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    made = make_synthetic(images, np.arange(8) % 2, seed)
    assert (made.shape, made.dtype) == (images.shape, np.uint8)


# --- other arrays -----------------------------------------------------------------------------------------------------


def test_arrays_are_mixed_shuffled_and_made_noisy() -> None:
    rows = np.random.RandomState(0).normal(size=(24, 5, 40))
    for image, other, made in one("mix", rows):
        share = (made - other)[0, 0] / (image - other)[0, 0]
        np.testing.assert_allclose(made, share * image + (1 - share) * other, rtol=1e-9, atol=1e-12)
        assert 0.4 <= share <= 0.6
    for image, _, made in one("shuffle", rows):
        assert (made != image).any()
        columns = {column.tobytes() for column in image.T}
        assert {column.tobytes() for column in made.T} == columns  # the longest axis, its entries whole
    for image, _, made in one("noise", rows):
        assert 0.4 * np.ptp(image) < np.abs(made - image).max() <= 0.5 * np.ptp(image)


def test_whole_numbers_stay_numbers_that_were_there() -> None:
    """Tokens: no sum of two is a token."""
    rows = np.random.RandomState(0).randint(0, 1000, (24, 50))
    for image, other, made in one("mix", rows):
        assert ((made == image) | (made == other)).all()
        assert 24 <= (made == other).sum() <= 26
    for image, other, made in one("noise", rows):
        np.testing.assert_array_equal(made[1::2], image[1::2])
        np.testing.assert_array_equal(made[::2], other[::2])
    for image, _, made in one("shuffle", rows):
        assert sorted(made) == sorted(image)


def test_what_the_kind_of_array_allows() -> None:
    floats = np.random.RandomState(0).normal(size=(24, 4)).astype(np.float16)
    made = make_synthetic(floats, LABELS)
    assert made.dtype == np.float16
    for row, kind in enumerate(ARRAY_KINDS):
        np.testing.assert_array_equal(
            made[row], Synthesis(labels=LABELS, kinds=ARRAY_KINDS).make(row, lambda row: floats[row])
        )
        assert ARRAY_KINDS[row % 3] == kind
    single = np.arange(24.0)[:, None]  # one number each: nothing to shuffle
    np.testing.assert_array_equal(
        make_synthetic(single, LABELS), make_synthetic(single, LABELS, kinds=["mix", "noise"])
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    images = pictures()
    with pytest.raises(InputError, match=r"^synthetic version 2 is not known; this nacpipe makes version 1$"):
        make_synthetic(images, LABELS, version=2)
    with pytest.raises(InputError, match=r"^synthetic kind 'swirl' is not known; known: shuffle, mix, phases, noise, "):
        make_synthetic(images, LABELS, kinds=["mix", "swirl"])
    with pytest.raises(InputError, match=r"^synthetic samples need at least one kind; known: shuffle, mix, phases, "):
        make_synthetic(images, LABELS, kinds=[])
    with pytest.raises(
        InputError, match=r"^synthetic samples are mixed from two classes; these ID samples are of one$"
    ):
        make_synthetic(images, np.zeros(24, np.int64))
    with pytest.raises(
        InputError, match=r"^synthetic kind 'blur' is for images of 8 bits; for others: mix, shuffle, noise$"
    ):
        make_synthetic(images.astype(np.float32), LABELS, kinds=["blur"])
    sizes = {0: images[0], 1: images[1][:10]}
    with pytest.raises(InputError, match=r"^samples 0 and 1 cannot be mixed: shapes \(20, 32, 3\) and \(10, 32, 3\)$"):
        Synthesis(labels=np.array([0, 1]), kinds=["mix"]).make(0, lambda row: sizes[row])
