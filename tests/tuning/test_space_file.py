"""A space as someone writes it: every form of a field, every refusal, and the paper's grids."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nacpipe.cache import Cache
from nacpipe.errors import InputError, ParamsError
from nacpipe.method import published
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.published import GRIDS, PUBLISHED
from nacpipe.scoring.trial_scorer import TermIndexes
from nacpipe.tuning.samplers import GridSampler
from nacpipe.tuning.space import Choice, Dimension, Given, Interval, LayerSpace, measure_space
from nacpipe.tuning.space_file import MAX_BYTES, read_spec
from tests.tuning.trials import objective_of

FIELDS = "bins, alpha, saturation, source, edges, weight"


@pytest.fixture
def read(small_cache: Cache, tmp_path: Path) -> Callable[..., dict[str, Given]]:
    """The function that reads a space file of this text."""

    def read_text(text: str | bytes, *layers: str) -> dict[str, Given]:
        path = tmp_path / "s.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_spec(str(path), small_cache, layers)

    return read_text


Read = Callable[..., dict[str, Given]]


# --- what a field may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ("bins = 50", "bins", Choice((50,))),
        ("bins = 50.0", "bins", Choice((50,))),  # a whole number, however it is written
        ("bins = [500, 50]", "bins", Choice((500, 50))),
        ("bins = [50, 50.0, 500, 50]", "bins", Choice((50, 500))),  # each value once
        ("bins = { low = 4, high = 100000 }", "bins", Interval(4, 100_000, whole=True)),
        ("bins = { low = 7, high = 7 }", "bins", Interval(7, 7, whole=True)),
        ("saturation = 1", "saturation", Choice((1,))),
        ("saturation = { high = 9.0, low = 1 }", "saturation", Interval(1, 9, whole=True)),
        ("alpha = 1", "alpha", Choice((1.0,))),
        ("alpha = [0.1, 1e3]", "alpha", Choice((0.1, 1000.0))),
        ("alpha = { low = 0.1, high = 100 }", "alpha", Interval(0.1, 100.0)),
        ('source = "gradient"', "source", Choice(("gradient",))),
        ('source = ["product", "activation"]', "source", Choice(("product", "activation"))),
        ('edges = "linear"', "edges", Choice(("linear",))),
        ('edges = ["log", "linear"]', "edges", Choice(("log", "linear"))),
        ("weight = 0.25", "weight", Choice((0.25,))),
        ("weight = [1, 2, 0]", "weight", Choice((1.0, 2.0, 0.0))),
        ("weight = { low = 0, high = 2 }", "weight", Interval(0.0, 2.0, log=False)),
    ],
)
def test_forms_of_a_field(read: Read, line: str, field: str, expected: Dimension) -> None:
    for text in (f"[layers.layer1]\n{line}", f"[default]\n{line}\n[layers.layer1]"):
        found = read(text)
        assert found == {"layer1": {field: expected}}
        dimension = found["layer1"][field]
        kind = int if field in ("bins", "saturation") else float if field in ("alpha", "weight") else str
        ends = dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        assert {type(value) for value in ends} == {kind}


def test_what_is_not_named_is_as_in_auto(read: Read, small_cache: Cache) -> None:
    both: dict[str, Given] = {"avgpool": {}, "layer1": {}}
    for text in ("", "[default]", "[layers]", '[default]\nweight = "fit"', "# nothing\n"):
        assert read(text) == both
    assert read_spec("paper", small_cache, ()) == both
    assert read('[layers.layer1]\nweight = "fit"') == {"layer1": {}}


def test_a_layer_overrides_the_default(read: Read) -> None:
    found = read(
        "[default]\nbins = [50, 500]\nalpha = 1\nweight = 2\n"
        "[layers.layer1]\nbins = 20\n[layers.avgpool]\nsaturation = 3\nweight = 1"
    )
    rest = {"alpha": Choice((1.0,))}
    assert found == {
        "avgpool": {"bins": Choice((50, 500)), **rest, "saturation": Choice((3,)), "weight": Choice((1.0,))},
        "layer1": {"bins": Choice((20,)), **rest, "weight": Choice((2.0,))},
    }


def test_weights_may_go_back_to_fit(read: Read) -> None:
    assert read('[default]\nweight = 1\n[layers.layer1]\nweight = "fit"') == {"layer1": {}}


# --- which layers -----------------------------------------------------------------------------------------------------


def test_layers_come_in_the_order_of_the_cache(read: Read, small_cache: Cache) -> None:
    assert list(read("[layers.logits]\n[layers.layer1]\n[layers.avgpool]")) == ["avgpool", "layer1", "logits"]
    assert list(read("[default]", "logits", "layer1")) == ["layer1", "logits"]
    assert list(read_spec("paper", small_cache, ("logits", "avgpool", "logits"))) == ["avgpool", "logits"]
    assert list(read_spec("paper", small_cache, ("nope", "avgpool"))) == ["avgpool", "nope"]  # refused elsewhere


def test_some_layers_of_a_space(read: Read, tmp_path: Path) -> None:
    text = "[layers.logits]\nbins = 5\n[layers.layer1]\nbins = 6\n[layers.avgpool]\nbins = 7"
    assert read(text, "logits", "avgpool") == {"avgpool": {"bins": Choice((7,))}, "logits": {"bins": Choice((5,))}}
    message = f"layer 'layer1' is not in the space {tmp_path / 's.toml'}; it has logits, avgpool"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read("[layers.logits]\n[layers.avgpool]", "avgpool", "layer1")


# --- refusals ---------------------------------------------------------------------------------------------------------

TABLE = f"must be a table of {FIELDS}"
ONE = "layers.layer1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1", "{path}: 'a' is not known; it has [default] and [layers.NAME]"),
        ("[layer.layer1]", "{path}: 'layer' is not known; it has [default] and [layers.NAME]"),
        ("default = 3", f"{{path}}: default is 3; it {TABLE}"),
        ("layers = ['layer1']", f"{{path}}: layers is ['layer1']; it {TABLE}"),
        ("[[layers]]", f"{{path}}: layers is [{{{{}}}}]; it {TABLE}"),
        ("[layers]\nlayer1 = 50", f"{{path}}: layers.layer1 is 50; it {TABLE}"),
        ("[layers.layer1]\nbin = 50", f"{{path}}: {ONE}.bin is not known; fields: {FIELDS}"),
        ("[default]\nbin = 50\n[layers.layer1]", f"{{path}}: {ONE}.bin is not known; fields: {FIELDS}"),
        ("[layers.layer1]\nbins = []", f"{{path}}: {ONE}.bins is empty; give at least one value"),
        ("[layers.layer1]\nweight = []", f"{{path}}: {ONE}.weight is empty; give at least one value"),
        ("[layers.layer1]\nbins = 3", f"{{path}}: {ONE}.bins: bins is 3; it must lie between 4 and 100000"),
        ("[layers.layer1]\nbins = [50, 4.5]", f"{{path}}: {ONE}.bins: bins is 4.5; it must be a whole number"),
        ("[layers.layer1]\nbins = true", f"{{path}}: {ONE}.bins: bins is True; it must be a whole number"),
        ("[layers.layer1]\nbins = '50'", f"{{path}}: {ONE}.bins: bins is '50'; it must be a whole number"),
        ("[layers.layer1]\nbins = [[50]]", f"{{path}}: {ONE}.bins: bins is [50]; it must be a whole number"),
        ("[layers.layer1]\nbins = nan", f"{{path}}: {ONE}.bins: bins is nan; it must be a whole number"),
        ("[layers.layer1]\nbins = inf", f"{{path}}: {ONE}.bins: bins is inf; it must be a whole number"),
        ("[layers.layer1]\nalpha = 0", f"{{path}}: {ONE}.alpha: alpha is 0.0; it must be above 0"),
        ("[layers.layer1]\nalpha = -1", f"{{path}}: {ONE}.alpha: alpha is -1.0; it must be above 0"),
        ("[layers.layer1]\nalpha = nan", f"{{path}}: {ONE}.alpha: alpha is nan; it must be a finite number"),
        ("[layers.layer1]\nalpha = [1, inf]", f"{{path}}: {ONE}.alpha: alpha is inf; it must be a finite number"),
        (
            "[layers.layer1]\nalpha = 2020-01-01",
            f"{{path}}: {ONE}.alpha: alpha is datetime.date(2020, 1, 1); it must be a finite number",
        ),
        ("[layers.layer1]\nweight = -0.5", f"{{path}}: {ONE}.weight: weight is -0.5; it must be at least 0"),
        (
            "[layers.layer1]\nweight = 'fitted'",
            f"{{path}}: {ONE}.weight: weight is 'fitted'; it must be a finite number",
        ),
        (
            "[layers.layer1]\nweight = ['fit', 1]",
            f"{{path}}: {ONE}.weight: weight is 'fit'; it must be a finite number",
        ),
        (
            "[layers.layer1]\nsource = 'states'",
            f"{{path}}: {ONE}.source: source is 'states'; known: product, activation, gradient",
        ),
        ("[layers.layer1]\nedges = 1", f"{{path}}: {ONE}.edges: edges is 1; known: log, linear"),
        ("[layers.layer1]\nedges = [['log']]", f"{{path}}: {ONE}.edges: edges is ['log']; known: log, linear"),
        (
            "[layers.layer1]\nalpha = { low = 3, high = 2 }",
            f"{{path}}: {ONE}.alpha goes from 3.0 to 2.0; low must not be above high",
        ),
        (
            "[layers.layer1]\nalpha = { low = 0, high = 2 }",
            f"{{path}}: {ONE}.alpha: alpha is 0.0; it must be above 0",
        ),
        (
            "[layers.layer1]\nbins = { low = 4, high = [9] }",
            f"{{path}}: {ONE}.bins: bins is [9]; it must be a whole number",
        ),
        (
            "[layers.layer1]\nbins = { low = 4 }",
            f"{{path}}: {ONE}.bins is {{{{'low': 4}}}}; give one value, a list, or {{{{ low = …, high = … }}}}",
        ),
        (
            "[layers.layer1]\nbins = { low = 4, high = 9, step = 1 }",
            f"{{path}}: {ONE}.bins is {{{{'low': 4, 'high': 9, 'step': 1}}}};"
            " give one value, a list, or {{ low = …, high = … }}",
        ),
        (
            "[layers.layer1]\nedges = { low = 'log', high = 'linear' }",
            f"{{path}}: {ONE}.edges is {{{{'low': 'log', 'high': 'linear'}}}}; give one value, a list",
        ),
        (
            "[layers.layer1]\nweight = 1\n[layers.avgpool]",
            '{path}: layer1 has a weight and avgpool has "fit"; give all layers a weight, or none',
        ),
        (
            "[default]\nweight = 1\n[layers.avgpool]\nweight = 'fit'\n[layers.layer1]",
            '{path}: layer1 has a weight and avgpool has "fit"; give all layers a weight, or none',
        ),
    ],
)
def test_refusals(read: Read, tmp_path: Path, text: str, message: str) -> None:
    expected = message.format(path=tmp_path / "s.toml")
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        read(text)


def test_a_byte_order_mark_is_taken_away(read: Read) -> None:
    text = "[layers.layer1]\nbins = 50\n"
    assert read(b"\xef\xbb\xbf" + text.encode()) == read(text)


def test_a_number_of_five_thousand_digits(read: Read) -> None:
    """Python itself will not print it."""
    for field in ("alpha", "bins"):
        with pytest.raises(InputError, match=rf"s\.toml: layers\.layer1\.{field}: "):
            read(f"[layers.layer1]\n{field} = 0x{'f' * 5000}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[default", r"Expected ']' at the end of a table declaration \(at end of document\)"),
        ("[default]\nbins = 4\nbins = 5", r"Cannot overwrite a value \(at .*\)"),
        (b"[default]\n# \xff", r"'utf-8' codec can't decode byte 0xff in position 12: invalid start byte"),
        ("[default]\nbins = " + "9" * 5000, r"Exceeds the limit \(4300 digits\) for integer string conversion.*"),
        ("[default]\nbins = " + "[" * 5000, r"maximum recursion depth exceeded.*|TOML.*nest.*"),
    ],
)
def test_files_that_are_not_toml(read: Read, tmp_path: Path, text: str | bytes, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^the space file {tmp_path}/s\.toml cannot be read: ({reason})$"):
        read(text)


def test_a_file_that_is_too_large_is_not_cut(read: Read) -> None:
    """What stands behind the limit would be lost, and nobody told."""
    text = "[default]\nbins = 50\n" + "#" * MAX_BYTES + "\n[layers.layer1]\n"
    with pytest.raises(InputError, match=r"^the space file .*s\.toml cannot be read: "):
        read(text)
    whole = "[layers.layer1]\n#"
    assert read(whole + "#" * (MAX_BYTES - len(whole))) == {"layer1": {}}


def test_files_that_are_not_there(small_cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "no.toml"
    message = rf"^there is no space file {path}; name a file, or --space auto, paper, wide, terms or published$"
    with pytest.raises(InputError, match=message):
        read_spec(str(path), small_cache, ())
    with pytest.raises(InputError, match=rf"^the space file {tmp_path} cannot be read: .*Is a directory"):
        read_spec(str(tmp_path), small_cache, ())


# --- the paper's grids ------------------------------------------------------------------------------------------------


def test_the_published_space(small_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerParams(bins=50, saturation=5, alpha=1)
    key = ("digits", "made_up")
    monkeypatch.setitem(published.PUBLISHED, key, NacParams(layers={"layer1": layer, "avgpool": layer}))
    grid = {"layer1": ((50, 500), (5,), (1, 0.001)), "avgpool": ((50,), (5, 10), (100,))}
    monkeypatch.setitem(published.GRIDS, key, grid)
    one = {"weight": Choice((1.0,))}
    expected: dict[str, Given] = {
        "avgpool": {"bins": Choice((50,)), "saturation": Choice((5, 10)), "alpha": Choice((100.0,)), **one},
        "layer1": {"bins": Choice((50, 500)), "saturation": Choice((5,)), "alpha": Choice((1.0, 0.001)), **one},
    }
    found = read_spec("published", small_cache, ())
    assert found == expected
    assert list(found) == ["avgpool", "layer1"]  # as in the cache
    assert read_spec("published", small_cache, ("layer1",)) == {"layer1": expected["layer1"]}
    message = r"^layer 'logits' is not in the space published; it has layer1, avgpool$"
    with pytest.raises(InputError, match=message):
        read_spec("published", small_cache, ("layer1", "logits"))


def test_wide_is_every_source_and_the_logits(small_cache: Cache) -> None:
    every = {"source": Choice(("product", "activation", "gradient"))}
    assert read_spec("wide", small_cache, ()) == {"avgpool": every, "layer1": every, "logits": every}
    assert read_spec("wide", small_cache, ("layer1",)) == {"layer1": every}


def test_a_network_that_the_paper_does_not_know(small_cache: Cache) -> None:
    message = (
        r"^the paper has no parameters for digits, made_up, layers avgpool, layer1, logits \(it has cifar10 resnet: "
    )
    with pytest.raises(ParamsError, match=message):
        read_spec("published", small_cache, ())


@pytest.mark.parametrize(
    ("key", "combinations", "fits"),
    [
        (("cifar10", "resnet"), 256, 24),
        (("cifar100", "resnet"), 288, 19),
        (("imagenet", "resnet"), 576, 24),
        (("imagenet", "vit"), 256, 18),
    ],
)
def test_sizes_of_the_papers_grids(key: tuple[str, str], combinations: int, fits: int) -> None:
    """As the paper's table has them; and the parameters that the authors chose are among them."""
    grid, chosen = GRIDS[key], PUBLISHED[key].layers
    assert sum(math.prod(map(len, axes)) for axes in grid.values()) == fits
    space: dict[str, LayerSpace] = {}
    for name, axes in grid.items():
        bins, saturation, alpha = (Choice(values) for values in axes)
        given = {"bins": bins, "saturation": saturation, "alpha": alpha, "weight": Choice((1.0,))}
        space[name] = measure_space(name, lambda *_: pytest.fail("nothing is left to measure"), 1000, given)
    everything = GridSampler(objective_of(space), seed=1)
    assert everything.size == combinations
    found = [dict(everything.params(number).layers) for number in range(combinations)]
    assert list(chosen) == list(grid)
    assert found.count(dict(chosen)) == 1


def test_the_space_of_terms(small_cache: Cache) -> None:
    """Every layer once per source, the network's output too; --layers names layers."""
    found = read_spec("terms", small_cache, ())
    assert list(found) == [
        f"{layer}:{source}"
        for layer in (*(spec.name for spec in small_cache.header.layers), "logits")
        for source in ("product", "activation", "gradient")
    ]
    assert all(given == {"source": Choice((name.split(":")[1],))} for name, given in found.items())
    assert list(read_spec("terms", small_cache, ("layer1",))) == [name for name in found if name.startswith("layer1:")]


def test_a_file_may_name_a_layer_once_per_source(read: Read, small_cache: Cache) -> None:
    """Its source is the one that it is named after, unless another is asked for."""
    made = TermIndexes(small_cache, ["id/val"])
    asked = read('[layers."layer1:gradient"]\nbins = 9\n[layers.layer1]\n')
    spaces = {name: measure_space(name, made, small_cache["id/train"].rows, given) for name, given in asked.items()}
    assert {name: space.source for name, space in spaces.items()} == {
        "layer1:gradient": Choice(("gradient",)),
        "layer1": Choice(("product",)),
    }
    assert spaces["layer1:gradient"].alpha["gradient"] != spaces["layer1"].alpha["product"]


STATES = ("product", "activation", "gradient")


@pytest.mark.parametrize(("space", "rest"), [("wide", ["layer1"]), ("terms", [f"layer1:{state}" for state in STATES])])
def test_a_named_space_keeps_to_the_source_that_a_name_says(small_cache: Cache, space: str, rest: list[str]) -> None:
    found = read_spec(space, small_cache, ("avgpool:gradient", "layer1"))
    assert list(found) == ["avgpool:gradient", *rest]
    assert found["avgpool:gradient"] == {"source": Choice(("gradient",))}


@pytest.mark.parametrize(
    "text",
    [
        '[layers."avgpool:gradient"]\nsource = ["product", "gradient"]',
        '[default]\nsource = "product"\n[layers."avgpool:gradient"]',
    ],
)
def test_a_file_may_not_give_another_source_than_the_name_says(read: Read, text: str) -> None:
    with pytest.raises(InputError, match=r"s\.toml: layers\.avgpool:gradient\.source is product.*leave it out$"):
        read(text)
    assert read(text.replace("product", "gradient")) == {"avgpool:gradient": {"source": Choice(("gradient",))}}
