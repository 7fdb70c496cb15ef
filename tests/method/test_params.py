"""Parameters: round trips as laws, and what every refusal says."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.errors import ParamsError
from nacpipe.method.params import LayerParams, NacParams

LAYER_PARAMS = st.builds(
    LayerParams,
    bins=st.integers(4, 100_000),
    saturation=st.integers(1, 10**9),
    alpha=st.floats(1e-300, 1e300),
    weight=st.floats(0, 1e300),
    edges=st.sampled_from(["log", "linear"]),
    source=st.sampled_from(["product", "activation", "gradient"]),
)
NAC_PARAMS = (
    st.dictionaries(st.text(min_size=1), LAYER_PARAMS, min_size=1, max_size=4)
    .filter(lambda layers: any(layer.weight > 0 for layer in layers.values()))
    .map(lambda layers: NacParams(layers=layers))
)
GOOD: dict[str, Any] = {"bins": 50, "saturation": 100, "alpha": 0.5}


@given(NAC_PARAMS)
def test_json_round_trip(params: NacParams) -> None:
    again = NacParams.from_json(json.loads(json.dumps(params.to_json())))
    assert again == params
    assert list(again.layers) == list(params.layers)  # the order of the score's sum


@given(NAC_PARAMS)
def test_repr_round_trip(params: NacParams) -> None:
    assert eval(repr(params)) == params


def test_json_by_hand() -> None:
    params = NacParams(layers={"avgpool": LayerParams(bins=50, saturation=10, alpha=100)})
    assert params.to_json() == {
        "layers": {
            "avgpool": {
                "bins": 50,
                "saturation": 10,
                "alpha": 100.0,
                "weight": 1.0,
                "edges": "log",
                "source": "product",
            }
        }
    }
    assert (
        NacParams.from_json({"layers": {"avgpool": {"bins": 50, "saturation": 10, "alpha": 100}}, "note": 1}) == params
    )


def test_whole_floats_count_as_whole_numbers() -> None:
    """JSON written elsewhere may say 50.0."""
    params = LayerParams(bins=50.0, saturation=1e3, alpha=1)  # type: ignore[arg-type]
    assert params == LayerParams(bins=50, saturation=1000, alpha=1.0)
    assert (type(params.bins), type(params.saturation), type(params.alpha)) == (int, int, float)


@pytest.mark.parametrize("bins", [4, 100_000])
@pytest.mark.parametrize("saturation", [1, 10**9])
def test_bounds_are_within(bins: int, saturation: int) -> None:
    params = LayerParams(bins=bins, saturation=saturation, alpha=1.0, weight=0)
    assert (params.bins, params.saturation, params.weight) == (bins, saturation, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": 3}, r"^bins is 3; it must lie between 4 and 100000$"),
        ({"bins": 100_001}, r"^bins is 100001; it must lie between 4 and 100000$"),
        ({"bins": 10**400}, r"^bins is 10+; it must lie between 4 and 100000$"),
        ({"bins": 50.5}, r"^bins is 50\.5; it must be a whole number$"),
        ({"bins": "50"}, r"^bins is '50'; it must be a whole number$"),
        ({"bins": True}, r"^bins is True; it must be a whole number$"),
        ({"bins": None}, r"^bins is None; it must be a whole number$"),
        ({"bins": math.nan}, r"^bins is nan; it must be a whole number$"),
        ({"bins": math.inf}, r"^bins is inf; it must be a whole number$"),
        ({"bins": -math.inf}, r"^bins is -inf; it must be a whole number$"),
        ({"saturation": 0}, r"^saturation is 0; it must lie between 1 and 1000000000$"),
        ({"saturation": 10**9 + 1}, r"^saturation is 1000000001; it must lie between 1 and 1000000000$"),
        ({"saturation": 0.5}, r"^saturation is 0\.5; it must be a whole number$"),
        ({"alpha": 0}, r"^alpha is 0\.0; it must be above 0$"),
        ({"alpha": -2}, r"^alpha is -2\.0; it must be above 0$"),
        ({"alpha": math.inf}, r"^alpha is inf; it must be a finite number$"),
        ({"alpha": math.nan}, r"^alpha is nan; it must be a finite number$"),
        ({"alpha": 10**400}, r"^alpha is 10+; it must be a finite number$"),
        ({"alpha": "1"}, r"^alpha is '1'; it must be a finite number$"),
        ({"alpha": False}, r"^alpha is False; it must be a finite number$"),
        ({"weight": -0.1}, r"^weight is -0\.1; it must be at least 0$"),
        ({"weight": math.nan}, r"^weight is nan; it must be a finite number$"),
        ({"weight": [1]}, r"^weight is \[1\]; it must be a finite number$"),
        ({"edges": "round"}, r"^edges is 'round'; known: log, linear$"),
        ({"edges": []}, r"^edges is \[\]; known: log, linear$"),
        ({"source": "state"}, r"^source is 'state'; known: product, activation, gradient$"),
    ],
)
def test_bad_values_are_refused_with_their_layer(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        LayerParams(**{**GOOD, **change})
    with pytest.raises(ParamsError, match="^layer 'a b': " + message.removeprefix("^")):
        NacParams.from_json({"layers": {"a b": {**GOOD, **change}}})


@pytest.mark.parametrize(
    "data", [None, [], "params", {}, {"layers": None}, {"layers": [GOOD]}, {"avgpool": GOOD}], ids=repr
)
def test_other_forms_are_refused(data: Any) -> None:
    with pytest.raises(ParamsError, match=r'^parameters need an object \{"layers": \{NAME: \{"bins": …, '):
        NacParams.from_json(data)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([50, 100], r"^layer 'fc' must be an object with bins, saturation, alpha, weight, edges, source$"),
        ({"bins": 50, "alpha": 1}, r"^layer 'fc' lacks 'saturation'; fields: bins, saturation, alpha, weight, edges"),
        ({**GOOD, "gamma": 1}, r"^layer 'fc' does not know 'gamma'; fields: bins, saturation, alpha, weight, edges"),
    ],
)
def test_bad_layers_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        NacParams.from_json({"layers": {"fc": entry}})


def test_no_layers_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"^there are no layers in these parameters$"):
        NacParams(layers={})
    with pytest.raises(ParamsError, match=r"^there are no layers in these parameters$"):
        NacParams.from_json({"layers": {}})


def test_layers_without_weight_are_refused() -> None:
    nothing = LayerParams(**GOOD, weight=0)
    with pytest.raises(ParamsError, match=r"^every layer's weight is 0; at least one must be above 0$"):
        NacParams(layers={"a": nothing, "b": nothing})
    assert NacParams(layers={"a": nothing, "b": LayerParams(**GOOD)}).layers["b"].weight == 1.0


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError, match="bins"):
        LayerParams(**GOOD).bins = 7  # type: ignore[misc]


def test_a_layer_may_be_there_once_per_source_and_is_named_after_it() -> None:
    layer = LayerParams(bins=9, saturation=1, alpha=1.0)
    gradient = replace(layer, source="gradient")
    both = NacParams(layers={"layer3:product": layer, "layer3:gradient": gradient, "layer3": gradient})
    assert NacParams.from_json(json.loads(json.dumps(both.to_json()))) == both
    with pytest.raises(ParamsError, match=r"^layer 'layer3:gradient' is named after its source, which is 'product'$"):
        NacParams(layers={"layer3:gradient": layer})
