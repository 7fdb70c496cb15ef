"""The compiled loops give the oracle's bins, whatever the values, the bins and the number of threads.

What a layer is filled with is found in three ways, which keep one contract (`each_fill`): by the index of a search, row
by row as scoring does, and in plain torch as a detector on a GPU does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from nacpipe.method.counting import count_sorted, fill_ranked, fill_rows
from nacpipe.method.coverage import bin_edges, coverage_table, layer_score, product_borders
from nacpipe.method.params import LayerParams
from nacpipe.method.sorted_index import index_columns, sort_columns
from nacpipe.method.threads import get_threads, set_threads
from tests import oracle

Products = NDArray[np.float32]  # (samples, neurons)
Borders = NDArray[np.float32]  # (bins,)
Fill = Callable[[Products, Products, Borders, int], NDArray[np.int64]]

BINS = st.sampled_from([4, 5, 50, 1001])
KINDS = st.sampled_from(["log", "linear"])
ALPHAS = st.sampled_from([1e-3, 0.07, 1.0, 3.9, 100.0, 5000.0])
SATURATIONS = st.sampled_from([1, 2, 5, 50, 5000])  # 5000 is far more than there are samples

# A ReLU's zeros of both signs, values that occur again and again, the end of float32 at both ends, and anything.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0]),
    st.sampled_from([0.5, -0.5, 0.01, -0.01, 2.0]),
    st.sampled_from([3.4e38, -3.4e38, 1e-38, -1e-38, 1e-45, -1e-45]),
    st.floats(-10, 10, width=32),
    st.floats(-1 / 128, 1 / 128, width=32),
)


HALF = np.float32(0.5)


def products(samples: int, neurons: int = 3) -> st.SearchStrategy[Products]:
    """Columns of values; sometimes a whole column is one value."""
    free = arrays(np.float32, st.tuples(st.integers(1, samples), st.just(neurons)), elements=VALUES)
    constant = st.none() | VALUES

    def set_first(table: Products, value: float | None) -> Products:
        table = table.copy()
        if value is not None:
            table[:, 0] = value
        return table

    return st.builds(set_first, free, constant)


@pytest.fixture(scope="module", autouse=True)
def one_thread_unless_told() -> Iterator[None]:
    """Starting threads takes longer than these few values."""
    set_threads(1)
    yield
    set_threads(None)


def fill(train: Products, queries: Products, borders: Borders, saturation: int) -> NDArray[np.int64]:
    """What one layer is filled with, by the index."""
    (entry_sum,) = fill_ranked([(index_columns(train, queries), borders, saturation)])
    return entry_sum


def fill_by_rows(train: Products, queries: Products, borders: Borders, saturation: int) -> NDArray[np.int64]:
    return fill_rows(queries, borders, count_sorted(sort_columns(train), borders), saturation)


def fill_in_torch(train: Products, queries: Products, borders: Borders, saturation: int) -> NDArray[np.int64]:
    torch = pytest.importorskip("torch")
    from nacpipe.detector.module import Lookup
    from nacpipe.method.fitted_term import FittedTerm

    counts = count_sorted(sort_columns(train), borders)
    params = LayerParams(bins=borders.size, saturation=saturation, alpha=1.0)  # the borders are what counts
    fitted = FittedTerm(name="a", params=params, borders=borders, table=counts)
    return Lookup(fitted).on_device(torch.from_numpy(queries))


each_fill = pytest.mark.parametrize("fill", [fill, fill_by_rows, fill_in_torch])


@each_fill
@given(products(30), products(20), BINS, KINDS, ALPHAS, SATURATIONS)
def test_bins_counts_and_scores_are_the_oracles(
    fill: Fill, train: Products, queries: Products, bins: int, kind: str, alpha: float, saturation: int
) -> None:
    edges = oracle.bin_edges(bins, kind)
    for table in (train, queries):
        table[oracle.in_doubt(table, alpha, edges)] = 0.0
    train_bins = oracle.bins_of(oracle.states(train, alpha), edges)
    query_bins = oracle.bins_of(oracle.states(queries, alpha), edges)
    counts = oracle.count(train_bins, bins - 1)
    borders = product_borders(bin_edges(bins, kind), alpha)  # type: ignore[arg-type]

    found = count_sorted(sort_columns(train), borders)
    np.testing.assert_array_equal(found, counts)
    entry_sum = [sum(min(counts[i, k], saturation) for i, k in enumerate(sample)) for sample in query_bins]
    np.testing.assert_array_equal(fill(train, queries, borders, saturation), entry_sum)
    score = layer_score(fill(train, queries, borders, saturation), 3, saturation)
    np.testing.assert_allclose(score, oracle.layer_score(oracle.table(counts, saturation), query_bins), rtol=1e-13)


@given(products(25), products(25), BINS, KINDS, ALPHAS, SATURATIONS)
def test_all_ways_fill_alike_even_on_the_borders(
    train: Products, queries: Products, bins: int, kind: str, alpha: float, saturation: int
) -> None:
    borders = product_borders(bin_edges(bins, kind), alpha)  # type: ignore[arg-type]
    on_borders = borders[np.isfinite(borders)][:20]
    queries = np.concatenate([queries, np.repeat(on_borders[:, None], 3, axis=1)])
    train = np.concatenate([train, np.nextafter(queries, np.float32(-np.inf)), queries])
    by_index = fill(train, queries, borders, saturation)
    for other in (fill_by_rows, fill_in_torch):
        np.testing.assert_array_equal(other(train, queries, borders, saturation), by_index)
    # A border belongs to the bin above it, the number just below to the bin below: here one neuron for each border.
    k = np.flatnonzero(np.isfinite(borders))
    pairs = np.stack([np.nextafter(borders[k], np.float32(-np.inf)), borders[k]], axis=1)
    counts = count_sorted(sort_columns(pairs.T), borders)
    assert (counts[np.arange(k.size), k - 1] == 1).all()
    assert (counts[np.arange(k.size), k] == 1).all()


@given(products(30), BINS, ALPHAS, st.randoms(use_true_random=False))
def test_permuting_samples_changes_no_count(train: Products, bins: int, alpha: float, random: object) -> None:
    borders = product_borders(bin_edges(bins), alpha)
    order = list(range(len(train)))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(
        count_sorted(sort_columns(train[order]), borders), count_sorted(sort_columns(train), borders)
    )


@given(products(30), st.integers(0, 30), BINS, ALPHAS)
def test_counts_add_over_splits(train: Products, cut: int, bins: int, alpha: float) -> None:
    borders = product_borders(bin_edges(bins), alpha)
    whole, first, second = (count_sorted(sort_columns(part), borders) for part in (train, train[:cut], train[cut:]))
    np.testing.assert_array_equal(first + second, whole)
    assert (whole.sum(axis=1) == len(train)).all()


@each_fill
@given(products(30), products(10), BINS, ALPHAS)
def test_scores_fall_as_saturation_rises(
    fill: Fill, train: Products, queries: Products, bins: int, alpha: float
) -> None:
    borders = product_borders(bin_edges(bins), alpha)
    scores = [layer_score(fill(train, queries, borders, r), 3, r) for r in (1, 2, 5, 50, 5000)]
    for lower, higher in itertools.pairwise(scores):
        assert (higher <= lower + 1e-15).all()


@given(products(30), products(10), BINS, KINDS, ALPHAS)
def test_twice_alpha_on_half_the_products_gives_the_same_bins(
    train: Products, queries: Products, bins: int, kind: str, alpha: float
) -> None:
    for table in (train, queries):
        table[np.abs(table) <= 1e-30] = 0.0  # halving a denormal would round
    edges = bin_edges(bins, kind)  # type: ignore[arg-type]
    borders, half_borders = product_borders(edges, alpha), product_borders(edges, 2 * alpha)
    counts, half_counts = (
        count_sorted(sort_columns(train), borders),
        count_sorted(sort_columns(train * HALF), half_borders),
    )
    np.testing.assert_array_equal(half_counts, counts)
    np.testing.assert_array_equal(
        fill_rows(queries * HALF, half_borders, half_counts, 5000), fill_rows(queries, borders, counts, 5000)
    )


@each_fill
def test_fill_is_the_sum_of_the_table_by_hand(fill: Fill) -> None:
    """Products 1, 2, 2, 3 of one neuron and 0 of the other; borders at −∞, 0, 2, +∞."""
    train = np.array([[1, 0], [2, 0], [2, 0], [3, 0]], np.float32)
    queries = np.array([[5, 0], [-1, 0.0], [0, -1], [2, -0.0]], np.float32)
    borders = np.array([-np.inf, 0, 2, np.inf], np.float32)
    counts = count_sorted(sort_columns(train), borders)
    assert counts.tolist() == [[0, 1, 3], [0, 4, 0]]
    assert fill(train, queries, borders, 2).tolist() == [4, 2, 1, 4]
    assert (2 * coverage_table(counts, 2)).tolist() == [[0, 1, 2], [0, 2, 0]]


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    set_threads(1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("neurons", [1, 2, 37, 5000])  # neurons go by fours: alone, half, one over
def test_threads_change_nothing(neurons: int) -> None:
    rng = np.random.RandomState(0)
    train, queries = (rng.randn(n, neurons).astype(np.float32) for n in (40, 23))
    borders = product_borders(bin_edges(50), 2.0)
    results = []
    for number in (1, None):
        set_threads(number)
        counts = count_sorted(sort_columns(train), borders)
        results += [fill(train, queries, borders, 3), fill_rows(queries, borders, counts, 3)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    bins = oracle.bins_of(oracle.states(queries, 2.0), oracle.bin_edges(50))
    expected = oracle.layer_score(oracle.table(counts, 3), bins)
    np.testing.assert_allclose(layer_score(results[0], neurons, 3), expected, rtol=1e-12)


@pytest.mark.usefixtures("threads", "numba_threads")
def test_set_threads_takes_all_by_default_and_never_more() -> None:
    """It is a number of our own: numba's is the caller's."""
    numbas, most = numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS
    for asked, used in ((1, 1), (None, most), (10**6, most)):
        set_threads(asked)
        assert (get_threads(), numba.get_num_threads()) == (used, numbas)


@pytest.mark.parametrize("samples", [65_535, 65_536, 65_537, 70_000])
def test_ranks_are_as_narrow_as_they_can_be_and_right(samples: int) -> None:
    rng = np.random.RandomState(samples)
    queries = rng.randn(samples, 2).astype(np.float32)
    queries[:, 1] = np.round(queries[:, 1])  # many ties
    train = rng.randn(100, 2).astype(np.float32)
    ranks = index_columns(train, queries).ranks
    assert ranks.dtype == (np.uint16 if samples <= 65_536 else np.uint32)
    assert (ranks[:, :, 2:] == 0).all()  # of the two neurons that a four lacks
    for neuron in range(2):
        assert (np.sort(ranks[0, :, neuron]) == np.arange(samples)).all()
        np.testing.assert_array_equal(np.sort(queries[:, neuron])[ranks[0, :, neuron]], queries[:, neuron])
    borders = product_borders(bin_edges(50), 1.0)
    counts = count_sorted(sort_columns(train), borders)
    np.testing.assert_array_equal(fill(train, queries, borders, 7), fill_rows(queries, borders, counts, 7))


@pytest.mark.parametrize("n_train", [0, 1, 15, 16, 17, 65_535, 65_536])
@pytest.mark.parametrize("n_query", [0, 1, 15, 31, 32, 33])
def test_an_index_holds_its_training_samples(n_train: int, n_query: int) -> None:
    """Beside queries equal to them, at every fill of the last line, with marks of 32 and of 64 bits."""
    rng = np.random.RandomState(n_train + n_query)
    train, queries = (np.round(3 * rng.randn(n, 5)).astype(np.float32) for n in (n_train, n_query))
    made = index_columns(train, queries)
    assert made.train_bits.dtype == (np.uint32 if n_train < 65_536 else np.uint64)
    assert (made.neurons, made.queries, made.train_samples) == (5, n_query, n_train)
    np.testing.assert_array_equal(made.train, np.sort(train, axis=0).T)
    np.testing.assert_array_equal(made.columns.ascending, np.sort(np.concatenate([train, queries]), axis=0).T)


@each_fill
def test_no_samples_are_filled_with_nothing(fill: Fill) -> None:
    train, none = np.ones((3, 2), np.float32), np.empty((0, 2), np.float32)
    borders = product_borders(bin_edges(10), 1.0)
    assert fill(train, none, borders, 5).tolist() == []
    assert fill(none, train, borders, 5).tolist() == [0, 0, 0]


@each_fill
@pytest.mark.parametrize("n_train", [1, 15, 16, 17, 50, 255, 256, 257])
@pytest.mark.parametrize("n_query", [1, 15, 16, 31, 32, 33, 300, 4096])
def test_rows_that_end_anywhere_in_a_line(fill: Fill, n_train: int, n_query: int) -> None:
    """Values go by lines of sixteen, lines by trees of sixteen, entries by stretches of 32; none need be full."""
    random = np.random.RandomState(n_train * 100 + n_query)
    train, queries = (random.randint(-4, 5, (n, 7)).astype(np.float32) for n in (n_train, n_query))
    borders = np.array([-np.inf, -3, -1, 0, 0.5, 2, np.inf, np.inf], np.float32)
    expected = np.zeros(n_query, np.int64)
    for neuron in range(7):
        of_train = np.searchsorted(borders, train[:, neuron], side="right") - 1
        of_query = np.searchsorted(borders, queries[:, neuron], side="right") - 1
        expected += np.minimum(np.bincount(of_train, minlength=7)[of_query], 3)
    assert fill(train, queries, borders, 3).tolist() == expected.tolist()


@pytest.mark.parametrize("samples", [0, 1, 15, 16, 17, 239, 240, 255, 256, 257, 4079, 4080, 4095, 4096, 4097, 66_000])
def test_a_tree_finds_what_searchsorted_finds(samples: int) -> None:
    """At every depth of the tree, and with its lines and levels as good as full, full and just begun."""
    random = np.random.RandomState(samples)
    values = random.randn(samples, 3).astype(np.float32)
    values[:, 1] = np.round(values[:, 1])  # many ties
    values[:, 2] = 0.0
    there = np.concatenate([[-3.4e38, -1, -0.0, 1e-45, 0.5, 3.4e38], values[:100].ravel()]).astype(np.float32)
    borders = np.sort(np.concatenate([[-np.inf], there, np.nextafter(there, np.float32(np.inf)), [np.inf]]))
    columns = sort_columns(values)
    np.testing.assert_array_equal(columns.ascending, np.sort(values, axis=0).T)
    below = [np.searchsorted(column, borders) for column in columns.ascending]
    np.testing.assert_array_equal(count_sorted(columns, borders.astype(np.float32)), np.diff(below))


@each_fill
@pytest.mark.parametrize("saturation", [65_535, 65_536, 10**6])
@pytest.mark.parametrize("n_train", [65_535, 65_536, 70_000])
def test_counts_that_sixteen_bits_do_not_hold(fill: Fill, n_train: int, saturation: int) -> None:
    train, queries = np.ones((n_train, 5), np.float32), np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]], np.float32)
    borders = np.array([-np.inf, 0, 1, 2, np.inf], np.float32)
    most = min(n_train, saturation)
    assert fill(train, queries, borders, saturation).tolist() == [5 * most, 2 * most]


def test_callers_from_several_threads_do_not_mix() -> None:
    random = np.random.RandomState(0)
    indexed = [random.standard_normal((200, 40)).astype(np.float32) for _ in range(8)]
    borders = np.array([-np.inf, -1, 0, 1, np.inf], np.float32)

    def entry_sum(values: NDArray[np.float32]) -> list[int]:
        return [int(x) for x in fill(values, values, borders, 30)]

    alone = [entry_sum(values) for values in indexed]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(entry_sum, indexed * 5)) == alone * 5


def test_layers_are_filled_together_as_alone() -> None:
    """Of any number of neurons, saturations and samples; also none."""
    random = np.random.RandomState(1)
    asked = []
    for neurons, bins, saturation in (
        (1, 4, 1),
        (3, 50, 300),
        (4, 20, 70_000),
        (9, 500, 2),
        (64, 50, 255),
        (5, 50, 256),
    ):
        train, queries = (random.standard_normal((n, neurons)).astype(np.float32) for n in (600, 70))
        asked.append((index_columns(train, queries), product_borders(bin_edges(bins), 2.0), saturation))
    for number in (1, None):
        set_threads(number)
        for together, one in zip(fill_ranked(asked), asked, strict=True):
            np.testing.assert_array_equal(together, fill_ranked([one])[0])
    set_threads(1)
    assert fill_ranked([]) == []
