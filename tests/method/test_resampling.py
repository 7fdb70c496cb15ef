"""A draw's metrics are those of the drawn scores, written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.method.metrics import detect
from nacpipe.method.resampling import draw_counts, rank_scores, redetect

scores = st.lists(st.integers(0, 8).map(lambda n: n / 7), min_size=1, max_size=40).map(np.array)  # with ties


@given(inside=scores, outside=scores, number=st.integers(0, 50))
def test_a_draw_is_what_detect_says_of_the_drawn_scores(inside: np.ndarray, outside: np.ndarray, number: int) -> None:
    id_counts, ood_counts = draw_counts(inside.size, "id/test", number, 1), draw_counts(outside.size, "x", number, 1)
    drawn = [np.repeat(side, counts.astype(int)) for side, counts in ((inside, id_counts), (outside, ood_counts))]
    expected = detect(*drawn)
    fpr95, auroc = redetect(*rank_scores(inside, outside), id_counts, ood_counts)
    assert auroc == pytest.approx(expected.auroc, abs=1e-12)
    assert fpr95 == pytest.approx(expected.fpr95, abs=1e-12)


def test_ranks_by_hand() -> None:
    """The picture in the module."""
    inside, outside = rank_scores(np.array([0.9, 0.4, 0.7]), np.array([0.4, 0.1]))
    assert (inside.tolist(), outside.tolist()) == ([3, 1, 2], [1, 0])
    fpr95, auroc = redetect(inside, outside, np.array([0.0, 2.0, 1.0]), np.array([1.0, 1.0]))
    # ID .4 .4 .7 against OOD .4 .1: of 6 pairs 4 above, 2 tied; at .4 all OOD and two of three ID are flagged.
    assert auroc == 5 / 6
    assert fpr95 == 2 / 3


def test_draws_are_the_same_again_and_differ_by_set_number_and_seed() -> None:
    first = draw_counts(200, "id/test", 3, 1)
    assert first.sum() == 200
    np.testing.assert_array_equal(draw_counts(200, "id/test", 3, 1), first)
    for other in (("id/val", 3, 1), ("id/test", 4, 1), ("id/test", 3, 2)):
        assert not np.array_equal(draw_counts(200, *other), first)
    # A share 1 / e of the images is not drawn: 0.368 ± 0.02 over 200 draws of 200.
    missed = np.mean([(draw_counts(200, "id/test", number, 1) == 0).mean() for number in range(200)])
    assert missed == pytest.approx((1 - 1 / 200) ** 200, abs=0.01)
