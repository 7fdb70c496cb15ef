"""Terms' names: a law, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.errors import ParamsError
from nacpipe.method.params import LayerParams, NacParams, term_of
from nacpipe.method.term import SOURCES, VIEWS, Term, layer_of, parse_term, source_of, view_of

TERMS = st.builds(
    Term,
    layer=st.from_regex(r"[A-Za-z0-9_.-]+", fullmatch=True),
    source=st.sampled_from(SOURCES),
    view=st.sampled_from(VIEWS),
)


@given(TERMS)
def test_a_term_is_read_from_its_name(term: Term) -> None:
    assert parse_term(term.name) == term
    assert str(term) == term.name
    assert parse_term(f"{term.layer}:{term.source}:{term.view}") == term  # defaults may be written too
    assert (layer_of(term.name), source_of(term.name), view_of(term.name)) == (term.layer, term.source, term.view)


@pytest.mark.parametrize(
    ("name", "layer", "source", "view"),
    [
        ("layer3", "layer3", "product", "plain"),
        ("layer3:activation", "layer3", "activation", "plain"),
        ("layer3:by_class", "layer3", "product", "by_class"),
        ("layer3:product:by_class", "layer3", "product", "by_class"),
        ("layer3:activation:by_class", "layer3", "activation", "by_class"),
        ("layer3.0:product:components", "layer3.0", "product", "components"),
        ("logits:gradient:plain", "logits", "gradient", "plain"),
        ("a:b", "a:b", "product", "plain"),  # a layer's own name
        ("a:b:gradient:components", "a:b", "gradient", "components"),
        ("activation:by_class", "activation", "product", "by_class"),
    ],
)
def test_names(name: str, layer: str, source: str, view: str) -> None:
    term = parse_term(name)
    assert (term.layer, term.source, term.view) == (layer, source, view)


@pytest.mark.parametrize(
    ("term", "name"),
    [
        (Term(layer="a"), "a"),
        (Term(layer="a", view="by_class"), "a:by_class"),
        (Term(layer="a", source="gradient"), "a:gradient"),
        (Term(layer="a", source="gradient", view="components"), "a:gradient:components"),
    ],
)
def test_defaults_are_left_out(term: Term, name: str) -> None:
    assert term.name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "layer3:activation:by_clas",
            r"^term 'layer3:activation:by_clas' has the view 'by_clas'; known: plain, by_class, components; use the"
            r" nacpipe that wrote it, or make parameters anew with: nacpipe search CACHE$",
        ),
        (
            "layer3:by_class:activation",
            r"^term 'layer3:by_class:activation' has a view twice or before its source; write LAYER:SOURCE:VIEW$",
        ),
        ("layer3:by_class:components", r"has a view twice or before its source"),
    ],
)
def test_wrong_names_are_refused(name: str, message: str) -> None:
    entry = {"bins": 9, "saturation": 1, "alpha": 1.0}
    with pytest.raises(ParamsError, match=message):
        parse_term(name)
    with pytest.raises(ParamsError, match=message):
        NacParams.from_json({"layers": {name: entry}})
    with pytest.raises(ParamsError, match=message):
        NacParams(layers={name: LayerParams(bins=9, saturation=1, alpha=1.0)})


def test_parameters_take_the_source_from_the_name() -> None:
    entry = {"bins": 9, "saturation": 1, "alpha": 1.0}
    params = NacParams.from_json({"layers": {"a:gradient:by_class": entry, "a:by_class": entry, "a": entry}})
    assert [layer.source for layer in params.layers.values()] == ["gradient", "product", "product"]
    assert [term_of(*item) for item in params.layers.items()] == [
        Term(layer="a", source="gradient", view="by_class"),
        Term(layer="a", view="by_class"),
        Term(layer="a"),
    ]
    assert NacParams.from_json(params.to_json()) == params
    with pytest.raises(
        ParamsError, match=r"^layer 'a:gradient:by_class' is named after its source, which is 'product'$"
    ):
        NacParams(layers={"a:gradient:by_class": LayerParams(bins=9, saturation=1, alpha=1.0)})


def test_a_record_may_have_a_source_that_its_name_leaves_out() -> None:
    params = LayerParams(bins=9, saturation=1, alpha=1.0, source="activation")
    assert term_of("a:by_class", params) == Term(layer="a", source="activation", view="by_class")
