"""The balanced, seeded training subset against the rule in plain lines (`oracle`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.benchmarks.subset import choose_balanced
from nacpipe.errors import InputError
from tests import oracle


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.integers(1, 80),
    st.integers(0, 2**32 - 1),
    st.integers(5, 7),
)
def test_choice_is_the_oracles(labels: list[int], count: int, seed: int, classes: int) -> None:
    chosen = choose_balanced(np.array(labels), classes, count, seed)
    assert chosen.tolist() == oracle.choose_balanced(labels, classes, count, seed)
    assert chosen.dtype == np.int64


def test_choice_by_hand() -> None:
    """RandomState(1) shuffles three things to (0, 2, 1); the classes come as they first appear: 2, 0, 1."""
    labels = np.array([2, 0, 2, 1, 1, 0, 2, 1, 0])
    assert choose_balanced(labels, 3, 9, 1).tolist() == [0, 6, 2, 1, 8, 5, 3, 7, 4]
    assert choose_balanced(labels, 3, 5, 1).tolist() == [0, 1, 3]  # 5 / 3 rounded down: one of each


def test_the_smallest_class_is_the_most_of_every_class() -> None:
    labels = np.array([0] * 10 + [1] * 2 + [2] * 10)
    chosen = choose_balanced(labels, 3, 15, 1)
    assert labels[chosen].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_count_below_the_number_of_classes_is_unbalanced_but_seeded() -> None:
    labels = np.repeat(np.arange(10), 5)
    rows = np.arange(50)
    np.random.RandomState(7).shuffle(rows)
    assert choose_balanced(labels, 10, 9, 7).tolist() == rows[:9].tolist()
    assert choose_balanced(labels, 10, 9, 8).tolist() != rows[:9].tolist()


def test_a_class_without_images_takes_nothing_from_the_others() -> None:
    labels = np.array([4] * 6 + [0] * 6)
    chosen = choose_balanced(labels, 5, 10, 1)  # 10 / 5 classes = 2 of each that is there
    assert labels[chosen].tolist() == [4, 4, 0, 0]


def test_global_random_state_stays_as_it_was() -> None:
    before = np.random.get_state(legacy=False)["state"]["key"].copy()
    choose_balanced(np.arange(10) % 2, 2, 4, 1)
    assert (np.random.get_state(legacy=False)["state"]["key"] == before).all()


@pytest.mark.parametrize("count", [0, -5])
def test_no_images_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"^train-images is {count}; it must be at least 1$"):
        choose_balanced(np.array([0, 1]), 2, count, 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 3, 4, 5, 10], r"^training labels must lie in 0 … 9; found 10$"),
        ([3, -1, 5, -1], r"^training labels must lie in 0 … 9; found -1$"),
        ([*range(10, 20), -3], r"^training labels must lie in 0 … 9; found -3, 10, 11, 12, 13 …$"),
        ([], r"^there are no training images to choose from$"),
    ],
)
def test_labels_out_of_range_are_refused_by_value(labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_balanced(np.array(labels, np.int64), 10, 10, 1)


def test_choice_is_the_authors(shared: Path) -> None:
    """The 1,000 rows that the authors' code takes of the reference list."""
    lines = (shared / "openood/benchmark_imglist/cifar10/main_train_cifar10.txt").read_text().splitlines()
    labels = np.array([int(line.split()[1]) for line in lines])
    rows = np.loadtxt(shared / "reference/resnet20/id-train-rows.txt", dtype=int)
    assert choose_balanced(labels, 10, 1000, 1).tolist() == rows.tolist()
