"""Scores of the logits alone against their definitions with 80 digits, and the temperature against a plain search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nacpipe.errors import InputError
from nacpipe.method import plain_scores
from nacpipe.method.plain_scores import PLAIN_SCORES, entropy, fit_temperature, gen, msp, tempered_msp
from tests import oracle

ROWS = st.lists(st.floats(-60, 60, width=32), min_size=3, max_size=3)


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_scores_are_the_definitions(rows: list[list[float]]) -> None:
    """Probabilities from 1 − 10⁻⁵² to 10⁻⁵²: none of them is 0 or 1."""
    logits = np.array(rows, np.float32)
    for name, score in PLAIN_SCORES.items():
        found = score(logits)
        assert found.dtype == np.float64
        expected = [oracle.plain_scores(row)[name] for row in logits.tolist()]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14 if name == "Energy" else 0)


@pytest.mark.repeats(1)
@pytest.mark.parametrize("classes", [1, 2, 99, 100, 101, pytest.param(1000, marks=pytest.mark.slow)])
def test_scores_of_many_classes_are_the_definitions(classes: int) -> None:
    """GEN takes the 100 largest probabilities, of whichever classes."""
    logits = np.random.RandomState(classes).normal(0, 4, (6, classes)).astype(np.float32)
    logits[0] += 40 * (np.arange(classes) == classes // 2)
    for name, score in PLAIN_SCORES.items():
        expected = [oracle.plain_scores(row)[name] for row in logits.tolist()]
        np.testing.assert_allclose(score(logits), expected, rtol=1e-12, atol=1e-14)


def test_the_surest_images_are_told_apart() -> None:
    """In float32, or clamped to 10⁻⁷ … 1 − 10⁻⁷ as pytorch-ood has it, all four would be equal."""
    logits = np.array([[g, 0.0, -1.0] for g in (20.0, 30.0, 45.0, 90.0)], np.float32)
    for score in (entropy, gen):
        found = score(logits)
        assert (np.diff(found) > 0).all()  # the surer, the larger
        assert found[-1] < 0
    np.testing.assert_allclose(gen(logits)[3], oracle.plain_scores([90.0, 0.0, -1.0])["GEN"], rtol=1e-13)


def test_equal_logits_and_classes_that_are_ruled_out() -> None:
    equal = np.zeros((1, 4), np.float32)
    assert entropy(equal)[0] == pytest.approx(-np.log(4), rel=1e-15)
    assert gen(equal)[0] == pytest.approx(-4 * (3 / 16) ** 0.1, rel=1e-15)
    ruled_out = np.array([[1.0, -np.inf, 2.0, -np.inf]], np.float32)
    for name, score in PLAIN_SCORES.items():
        assert score(ruled_out)[0] == pytest.approx(score(ruled_out[:, [0, 2]])[0], rel=1e-15), name


def openood_gen(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """OpenOOD's `generalized_entropy`, written again, in float64."""
    wide = logits.astype(np.float64)
    p = np.exp(wide - wide.max(axis=1, keepdims=True))
    p = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)[:, -100:]
    return -(p**0.1 * (1 - p) ** 0.1).sum(axis=1)


def test_gen_is_openoods_on_real_logits(shared: Path) -> None:
    """Where 1 − p has digits left in float64; where it has none, theirs is off by up to 0.0157 on these images."""
    for name, most in {"id-val": 0.016, "ood-val": 1e-7}.items():
        logits = np.load(shared / f"reference/resnet20/{name}.npz")["logits"]
        surest = np.sort(logits, axis=1)[:, -1] - np.sort(logits, axis=1)[:, -2]
        found, expected = gen(logits), openood_gen(logits)
        np.testing.assert_allclose(found[surest < 12], expected[surest < 12], rtol=1e-11)
        assert np.abs(found - expected).max() < most


# --- the temperature --------------------------------------------------------------------------------------------------


def drawn(seed: int, *, images: int = 300, classes: int = 5) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that are too sure: labels are drawn from softmax(logits / 2.5)."""
    rng = np.random.RandomState(seed)
    logits = rng.normal(0, 6, (images, classes)).astype(np.float32)
    noise = rng.gumbel(size=logits.shape)
    return logits, np.asarray((logits / 2.5 + noise).argmax(axis=1), np.int64)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_temperature_is_the_best(seed: int, scale: float) -> None:
    logits, label = drawn(seed)
    found = fit_temperature(scale * logits, label)
    assert found == pytest.approx(oracle.temperature((scale * logits).tolist(), label.tolist()), rel=1e-8)
    assert 2.0 < found / scale < 3.0


def test_the_temperature_of_a_real_network(shared: Path) -> None:
    """ResNet-20's is 2.28; pytorch-ood's fifty steps of L-BFGS at rate 0.01 end at 1.22."""
    arrays = np.load(shared / "reference/resnet20/id-val.npz")
    label = arrays["label"].astype(np.int64)
    found = fit_temperature(arrays["logits"], label)
    assert found == pytest.approx(2.279, abs=2e-3)
    assert found == pytest.approx(oracle.temperature(arrays["logits"].tolist(), label.tolist()), rel=1e-8)


def test_pieces_give_the_same_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, label = drawn(3)
    whole = fit_temperature(logits, label)
    monkeypatch.setattr(plain_scores, "PIECE", 7 * 5)
    assert fit_temperature(logits, label) == pytest.approx(whole, rel=1e-9)


def test_one_wrong_image_is_enough_for_a_temperature() -> None:
    logits = np.array([[9.0, 0.0]] * 10 + [[0.0, 1e-3]], np.float32)
    label = np.zeros(11, np.int64)
    assert fit_temperature(logits, label) == pytest.approx(
        oracle.temperature(logits.tolist(), label.tolist()), rel=1e-8
    )


def test_labels_that_no_temperature_fits_best() -> None:
    right = np.array([[2.0, 1.0], [0.0, 3.0]], np.float32)
    with pytest.raises(
        InputError, match=r"^all images are classified correctly: the smaller the temperature the better"
    ):
        fit_temperature(right, np.array([0, 1]))
    with pytest.raises(InputError, match=r"^logits tell nothing of the labels: the larger the temperature the better"):
        fit_temperature(right, np.array([1, 0]))
    ruled_out = np.array([[2.0, -np.inf, 1.0], [0.0, 3.0, 1.0]], np.float32)
    with pytest.raises(InputError, match=r"^the labels of 1 images have a logit of −inf: no temperature fits them$"):
        fit_temperature(ruled_out, np.array([1, 0]))
    assert fit_temperature(ruled_out[:, [0, 2, 1]], np.array([1, 2])) > 0  # −∞ elsewhere is a class like any other


def test_tempered_msp() -> None:
    logits = np.array([[3.0, 1.0, -1.0], [0.5, 0.0, 80.0]], np.float32)
    np.testing.assert_allclose(tempered_msp(logits, 2.0), msp(logits / 2), rtol=1e-15)
    np.testing.assert_allclose(tempered_msp(logits, 1.0), msp(logits), rtol=1e-15)
    assert tempered_msp(logits, 2.0)[0] == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-2)), rel=1e-14)
