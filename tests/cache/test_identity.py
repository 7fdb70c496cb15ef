"""How two identities differ, in words, and the fingerprint that a study is bound to."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.cache.identity import bound_splits, comparable_fields, diff, fingerprint

IDENTITIES = st.dictionaries(
    st.text(max_size=3),
    st.recursive(
        st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
        lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)
A, B = "a" * 64, "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("stored", "wanted", "phrases"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"weights": A}, {"weights": B}, ["weights: stored aaaaaaaa…, now 01234567…"]),
        ({"seed": 1}, {}, ["seed: stored 1, now nothing"]),
        ({}, {"seed": 1}, ["seed: stored nothing, now 1"]),
        ({"m": [0.5, 0.25]}, {"m": [0.5]}, ["m: stored [0.5, 0.25], now [0.5]"]),
        ({"t": {"crop": 32, "mean": 1}}, {"t": {"crop": 28, "mean": 1}}, ["t.crop: stored 32, now 28"]),
        ({"a": {"b": {"c": "x"}}}, {"a": {"b": {"c": "y"}}}, ["a.b.c: stored x, now y"]),
        ({"b": 1, "a": 2}, {"b": 2, "a": 1}, ["a: stored 2, now 1", "b: stored 1, now 2"]),
        ({"a": {"b": 1}}, {"a": 3}, ['a: stored {"b": 1}, now 3']),
        ({"a": "x" * 90}, {"a": "y"}, [f"a: stored {'x' * 77}…, now y"]),
        ({"a": "g" * 64}, {"a": "y"}, [f"a: stored {'g' * 64}, now y"]),  # 64 letters, but no sha256
    ],
)
def test_differences_in_words(stored: dict[str, Any], wanted: dict[str, Any], phrases: list[str]) -> None:
    assert diff(stored, wanted) == phrases


@given(IDENTITIES, IDENTITIES)
def test_no_difference_exactly_when_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert diff(a, a) == []
    assert (diff(a, b) == []) == (a == b)
    assert len(diff(a, b)) == len(diff(b, a))


@given(IDENTITIES, IDENTITIES)
def test_fingerprints_agree_exactly_when_identities_do(a: dict[str, Any], b: dict[str, Any]) -> None:
    reordered = dict(reversed(a.items()))
    assert fingerprint(reordered) == fingerprint(a)
    assert (fingerprint(a) == fingerprint(b)) == (a == b)


def test_fingerprint_is_the_sha256_of_compact_sorted_json() -> None:
    assert fingerprint({"b": [1, 2.5], "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,2.5]}').hexdigest()


def test_a_search_reads_no_test_split_unless_it_is_named() -> None:
    assert bound_splits() == ("id/train", "id/val", "ood/val")
    assert bound_splits("ood/near/tin") == ("id/train", "id/val", "ood/near/tin")


def test_what_an_older_identity_does_not_say_is_left_out() -> None:
    new = {"weights": A, "source": B, "arithmetic": {"device": "cpu"}, "outputs": "features"}
    assert comparable_fields({"weights": A}, new) == {"weights": A, "outputs": "features"}
    assert comparable_fields({"weights": A, "source": A}, new) == {"weights": A, "source": B, "outputs": "features"}
    assert comparable_fields(new, {"weights": A}) == {"weights": A}
