"""What is chosen without a fold, against the same written plainly; and what the number is for."""

from __future__ import annotations

import numpy as np
import pytest

from nacpipe.method.metrics import auroc
from nacpipe.tuning.cross_validation import FOLDS, _folds, correlations, cross_validate
from nacpipe.tuning.weights import guided_target, target_weights

ID, OOD = 200, 150


def terms(seed: int = 0, trials: int = 12, strength: float = 1.0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    sides = np.repeat([1.0, 0.0], [ID, OOD])
    made = []
    for _ in range(3):
        shares = random.random((trials, 1)) * strength
        made.append((shares * sides + random.normal(size=(trials, ID + OOD))).astype(np.float32))
    return made


PREDICTED = np.random.default_rng(5).integers(0, 9, OOD)
GUIDE = np.repeat([1.0, 0.0], [ID, OOD]) + np.random.default_rng(6).normal(size=ID + OOD)


@pytest.mark.parametrize("guide", [None, GUIDE])
def test_against_plain_loops(guide: np.ndarray | None) -> None:
    found = cross_validate(terms(), ID, PREDICTED, guide)
    for kind, value in (("images", found.images), ("clusters", found.clusters)):
        folds = []
        for fold in _folds(ID, OOD, PREDICTED if kind == "clusters" else None, 0):
            rest = [i for i in range(ID + OOD) if not fold[i]]
            target = guided_target(
                sum(i < ID for i in rest), sum(i >= ID for i in rest), None if guide is None else guide[rest]
            )
            chosen = [max(t, key=lambda scores: np.corrcoef(scores[rest], target)[0, 1]).astype(float) for t in terms()]
            weights = target_weights(np.stack(chosen)[:, rest], target)
            scores = sum(weight * one for weight, one in zip(weights, chosen, strict=True))
            inside = [i for i in range(ID + OOD) if fold[i]]
            folds.append(auroc(scores[[i for i in inside if i < ID]], scores[[i for i in inside if i >= ID]]))
        assert value == pytest.approx(np.mean(folds), abs=1e-12), kind
    if guide is None:
        assert found.guide is None
    else:
        masks = list(_folds(ID, OOD, None, 0))
        own = [auroc(guide[:ID][m[:ID]], guide[ID:][m[ID:]]) for m in masks]
        assert found.guide == pytest.approx(np.mean(own), abs=1e-12)


def test_folds_of_images_are_fifths_and_each_sample_is_in_one() -> None:
    masks = np.stack(list(_folds(ID, OOD, None, 0)))
    assert masks.shape == (FOLDS, ID + OOD)
    assert (masks.sum(axis=0) == 1).all()
    assert masks[:, :ID].sum(axis=1).tolist() == [40] * 5
    assert masks[:, ID:].sum(axis=1).tolist() == [30] * 5


def test_folds_of_classes_leave_a_class_out_as_a_whole() -> None:
    masks = np.stack(list(_folds(ID, OOD, PREDICTED, 0)))
    for label in range(9):
        assert len({tuple(column) for column in masks[:, ID:][:, label == PREDICTED].T}) == 1
    assert masks[:, ID:].sum(axis=1).min() >= 10


def test_where_all_are_taken_for_one_class_there_is_one_kind_and_images_are_used() -> None:
    assert list(_folds(ID, OOD, np.zeros(OOD, int), 0)) == []
    found = cross_validate(terms(), ID, np.zeros(OOD, int), None)
    assert found.clusters == found.images


def test_noise_that_was_chosen_from_many_is_found_out() -> None:
    """Of 400 trials of noise the best of each term looks good where it was chosen, and is worth nothing elsewhere."""
    noise = terms(1, trials=400, strength=0.0)
    target = guided_target(ID, OOD)
    chosen = np.stack([scores[np.argmax(correlations(scores, target))] for scores in noise]).astype(float)
    fitted = target_weights(chosen, target) @ chosen
    crossed = cross_validate(noise, ID, PREDICTED, None)
    assert auroc(fitted[:ID], fitted[ID:]) > 0.62
    assert 0.43 < crossed.images < 0.57
    assert 0.43 < crossed.clusters < 0.57


def test_correlations_are_numpys() -> None:
    random = np.random.default_rng(2)
    scores, target = random.normal(size=(7, 50)).astype(np.float32), random.normal(size=50)
    scores[3] = 2.5
    expected = [np.corrcoef(one, target)[0, 1] if np.ptp(one) else -1.0 for one in scores.astype(float)]
    np.testing.assert_allclose(correlations(scores, target), expected, atol=1e-12)
