"""Ranges of a layer's parameters: to the unit cube and back, from the data, wide enough."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.errors import ParamsError, ValuesError
from nacpipe.method import sorted_index as columns
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.sorted_index import index_columns
from nacpipe.scoring.trial_scorer import IndexOf
from nacpipe.tuning.space import BINS, Choice, Interval, LayerSpace, measure_space, to_json, with_weights

UNITS = st.tuples(*[st.floats(0, 1)] * 3).map(np.array)


def ranges(bins: tuple[int, int], saturation: tuple[int, int], alpha: tuple[float, float]) -> LayerSpace:
    return LayerSpace(
        bins=Interval(*bins, whole=True),
        saturation=Interval(*saturation, whole=True),
        alpha={"product": Interval(*alpha)},
    )


def ends(space: LayerSpace) -> list[tuple[float, float]]:
    """(low, high) of bins, alpha and saturation."""
    found = [space.bins, space.alpha["product"], space.saturation]
    return [(d.low, d.high) for d in found if isinstance(d, Interval)]


WIDE = ranges(bins=(4, 2000), saturation=(1, 1000), alpha=(1e-3, 1e4))


@st.composite
def spaces(draw: st.DrawFn) -> LayerSpace:
    """Ranges of any width, empty ones included."""
    bins, saturation = draw(st.integers(4, 5000)), draw(st.integers(1, 10**6))
    alpha = 10.0 ** draw(st.floats(-20, 20))
    return ranges(
        bins=(bins, bins + draw(st.integers(0, 5000))),
        saturation=(saturation, saturation + draw(st.integers(0, 10**6))),
        alpha=(alpha, alpha * draw(st.sampled_from([1.0, 2.0, 300.0, 1e12]))),
    )


@given(space=spaces(), unit=UNITS)
def test_parameters_lie_inside_and_come_back_from_the_unit_cube(space: LayerSpace, unit: np.ndarray) -> None:
    params = space.params(unit[: len(space.free)])
    for (low, high), value in zip(ends(space), (params.bins, params.alpha, params.saturation), strict=True):
        assert low <= value <= high
    assert params.weight == 1
    assert ((space.unit(params) > -1e-9) & (space.unit(params) < 1 + 1e-9)).all()
    again = space.params(space.unit(params))
    assert (again.bins, again.saturation) == (params.bins, params.saturation)
    assert again.alpha == pytest.approx(params.alpha, rel=1e-10)


@given(unit=UNITS)
def test_alpha_is_not_rounded_and_whole_numbers_are_by_half_at_most(unit: np.ndarray) -> None:
    params = WIDE.params(unit)
    assert WIDE.unit(params)[1] == pytest.approx(unit[1], abs=1e-12)
    assert abs(params.bins - 4 * 500 ** unit[0]) <= 0.5 + 1e-9
    assert abs(params.saturation - 1000 ** unit[2]) <= 0.5 + 1e-9


def test_corners_and_the_middle() -> None:
    """The order is bins, alpha, saturation, each on a logarithmic scale: the middle is the geometric mean."""
    space = ranges(bins=(4, 100), saturation=(1, 400), alpha=(0.5, 50.0))
    assert space.params(np.zeros(3)) == LayerParams(bins=4, saturation=1, alpha=0.5)
    assert space.params(np.ones(3)) == LayerParams(bins=100, saturation=400, alpha=50.0)
    assert space.params(np.array([1.0, 0.0, 0.0])) == LayerParams(bins=100, saturation=1, alpha=0.5)
    assert space.params(np.array([0.0, 1.0, 0.0])) == LayerParams(bins=4, saturation=1, alpha=50.0)
    middle = space.params(np.full(3, 0.5))
    assert (middle.bins, middle.saturation, middle.alpha) == (20, 20, pytest.approx(5.0))
    assert space.params(np.array([-1.0, 2.0, 7.0])) == space.params(np.array([0.0, 1.0, 1.0]))


def test_a_range_of_one_value_is_no_coordinate() -> None:
    space = ranges(bins=(7, 7), saturation=(3, 3), alpha=(2.0, 2.0))
    assert space.free == ()
    assert space.params(np.empty(0)) == LayerParams(bins=7, saturation=3, alpha=2.0)
    assert space.unit(space.params(np.empty(0))).tolist() == []


@given(space=spaces(), bins=st.integers(4, 10**5), saturation=st.integers(1, 10**7), alpha=st.floats(1e-30, 1e30))
def test_including_widens_only_where_it_must(space: LayerSpace, bins: int, saturation: int, alpha: float) -> None:
    params = LayerParams(bins=bins, saturation=saturation, alpha=alpha)
    wider = space.including(params)
    for (low, high), (old_low, old_high), value in zip(
        ends(wider), ends(space), (bins, alpha, saturation), strict=True
    ):
        assert low == min(old_low, value)
        assert high == max(old_high, value)
    assert wider.including(params) == wider


def index_of(train: np.ndarray) -> IndexOf:
    """An index whose training states are these, whatever the layer."""
    made = index_columns(train.T, train.T)
    return lambda _layer, _source: made


def test_including_keeps_a_space_that_holds_them_already() -> None:
    assert WIDE.including(LayerParams(bins=50, saturation=1000, alpha=1e-3)) == WIDE
    assert WIDE.including(LayerParams(bins=5000, saturation=2000, alpha=1e-4)) == ranges(
        bins=(4, 5000), saturation=(1, 2000), alpha=(1e-4, 1e4)
    )


def test_ranges_are_measured_from_the_products_that_are_not_0() -> None:
    """|product| is 1 … 101: the median is 51, the 99th percentile 100."""
    sizes = np.arange(1, 102, dtype=np.float32)
    products = np.concatenate([sizes * np.where(sizes % 2, 1, -1), np.zeros(50, np.float32)]).astype(np.float32)
    space = measure_space("avgpool", index_of(products[:, None]), train_rows=151)
    assert ends(space)[0] == BINS == (4, 2000)
    assert ends(space)[2] == (1, 151)
    assert ends(space)[1] == (pytest.approx(0.1 / 100), pytest.approx(30 / 51))
    assert measure_space("avgpool", index_of(products.reshape(1, -1)), train_rows=151) == space


SIZES = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149])


@given(
    values=st.lists(SIZES, min_size=1, max_size=300), neurons=st.integers(1, 3), part=st.sampled_from([1, 7, 1 << 18])
)
def test_ranges_are_those_of_numpys_quantiles_to_the_bit(values: list[float], neurons: int, part: int) -> None:
    train = np.resize(np.array(values, np.float32), (-(-len(values) // neurons), neurons))
    sizes = np.abs(train[train != 0].astype(np.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "PART", part)  # of a neuron, of a few, of all
        if sizes.size == 0:
            with pytest.raises(ValuesError, match="every product of id/train is 0"):
                measure_space("avgpool", index_of(train.T), 10)
            return
        space = measure_space("avgpool", index_of(train.T), 10)
    median, large = np.quantile(sizes, [0.5, 0.99]).tolist()
    assert space.alpha["product"] == Interval(0.1 / large, 30.0 / median)


@pytest.mark.parametrize(("samples", "neurons"), [(2000, 1000), (200_000, 10)])
def test_measuring_holds_the_products_once(samples: int, neurons: int) -> None:
    train = np.random.RandomState(0).randn(samples, neurons).astype(np.float32)
    made = index_columns(train, train[:500])
    tracemalloc.start()
    try:
        measure_space("avgpool", lambda _layer, _source: made, samples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < train.nbytes + 4 * 2**20  # float64 and its copies: five times the products


@pytest.mark.parametrize("size", [1e-40, 1.0, 3e38])
def test_products_of_any_one_size_leave_a_range(size: float) -> None:
    space = measure_space("avgpool", index_of(np.full((3, 2), size, np.float32)), train_rows=1)
    size = float(np.float32(size))
    assert ends(space)[1] == (pytest.approx(0.1 / size), pytest.approx(30 / size))
    assert ends(space)[2] == (1, 2)
    assert space.params(np.full(3, 0.5)).alpha == pytest.approx(np.sqrt(3) / size)


def test_a_layer_that_is_0_everywhere_is_refused() -> None:
    message = r"^layer 'layer1': every product of id/train is 0; leave it out with --layers$"
    with pytest.raises(ValuesError, match=message):
        measure_space("layer1", index_of(np.array([[0.0, -0.0]], np.float32)), train_rows=10)


def test_a_space_is_plain_json() -> None:
    value = {
        "avgpool": {
            "bins": {"low": 4, "high": 2000},
            "saturation": {"low": 1, "high": 1000},
            "alpha": {"low": 1e-3, "high": 1e4},
            "source": "product",
            "edges": "log",
            "weight": "fit",
        }
    }
    assert to_json({"avgpool": WIDE}) == value
    assert json.loads(json.dumps(to_json({"avgpool": WIDE}))) == value


@given(weights=st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=6).filter(any))
def test_weights_are_normalised_in_the_order_of_the_layers(weights: list[float]) -> None:
    layers = {f"layer{i}": LayerParams(bins=4 + i, saturation=1, alpha=1.0, weight=9.0) for i in range(len(weights))}
    params = with_weights(layers, np.array(weights))
    assert list(params.layers) == list(layers)
    assert sum(layer.weight for layer in params.layers.values()) == pytest.approx(1.0)
    for i, layer in enumerate(params.layers.values()):
        assert layer.bins == 4 + i
        assert layer.weight == pytest.approx(weights[i] / sum(weights))
        assert (layer.weight == 0) == (weights[i] == 0)


def test_as_many_weights_as_layers() -> None:
    layers = {"avgpool": LayerParams(bins=4, saturation=1, alpha=1.0)}
    assert with_weights(layers, np.array([5.0])) == NacParams(layers=layers)
    with pytest.raises(ValueError, match="zip"):
        with_weights(layers, np.ones(2))
    with pytest.raises(ParamsError, match="every layer's weight is 0"), np.errstate(invalid="ignore"):
        NacParams(layers={"avgpool": LayerParams(bins=4, saturation=1, alpha=1.0, weight=0.0)})


# --- choices ----------------------------------------------------------------------------------------------------------

MIXED = LayerSpace(
    bins=Choice((50, 500, 20)),
    saturation=Choice((7,)),
    alpha={"product": Interval(0.1, 10.0), "gradient": Interval(100.0, 10_000.0)},
    source=Choice(("product", "gradient")),
    edges=Choice(("log", "linear")),
    weight=Choice((0.25, 1.0)),
)


def test_choices_share_the_unit_interval_equally() -> None:
    choice = Choice((50, 500, 20))
    found = [choice.at(unit) for unit in (-1.0, 0.0, 0.33, 0.34, 0.66, 0.67, 1.0, 2.0)]
    assert found == [50, 50, 50, 500, 500, 20, 20, 20]
    assert [choice.unit(value) for value in choice.values] == [pytest.approx((i + 0.5) / 3) for i in range(3)]
    assert choice.including(500) is choice
    assert choice.including(9).values == (50, 500, 20, 9)


def test_alphas_range_is_its_sources() -> None:
    assert MIXED.free == ("bins", "alpha", "source", "edges")
    expected = LayerParams(bins=500, saturation=7, alpha=1000.0, source="gradient", edges="log")
    found = MIXED.params(np.array([0.5, 0.5, 0.9, 0.1]))
    assert replace(found, alpha=1000.0) == expected
    assert found.alpha == pytest.approx(1000.0)
    assert MIXED.params(np.array([0.5, 0.5, 0.1, 0.1])).alpha == pytest.approx(1.0)
    assert MIXED.unit(expected) == pytest.approx([0.5, 0.5, 0.75, 0.25])


@given(unit=st.tuples(*[st.floats(0, 1)] * 4).map(np.array))
def test_choices_come_back_from_the_unit_cube(unit: np.ndarray) -> None:
    params = MIXED.params(unit)
    again = MIXED.params(MIXED.unit(params))
    assert replace(again, alpha=params.alpha) == params
    assert again.alpha == pytest.approx(params.alpha, rel=1e-12)


def test_what_is_given_is_not_measured() -> None:
    nothing = index_of(np.zeros((1, 3), np.float32))
    given = {"alpha": Choice((2.0,)), "bins": Choice((50, 500)), "weight": Choice((1.0,))}
    space = measure_space("layer1", nothing, 10, given)
    assert space == LayerSpace(
        bins=Choice((50, 500)),
        saturation=Interval(1, 10, whole=True),
        alpha={"product": Choice((2.0,))},
        weight=Choice((1.0,)),
    )
    with pytest.raises(ValuesError, match=r"^layer 'layer1': every gradient of id/train is 0"):
        measure_space("layer1", nothing, 10, {"source": Choice(("gradient",))})


def test_mixed_spaces_as_json() -> None:
    assert MIXED.to_json() == {
        "bins": [50, 500, 20],
        "saturation": 7,
        "alpha": {"product": {"low": 0.1, "high": 10.0}, "gradient": {"low": 100.0, "high": 10_000.0}},
        "source": ["product", "gradient"],
        "edges": ["log", "linear"],
        "weight": [0.25, 1.0],
    }
