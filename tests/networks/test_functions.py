"""What stands for a function: its own text and simple values; not its layout, comments, place or neighbours."""

from __future__ import annotations

import copy
import functools
import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nacpipe.networks.call import Call
from nacpipe.networks.functions import describe_call, describe_function


def load(folder: Path, text: str) -> dict[str, Any]:
    file = folder / f"f{len(list(folder.iterdir()))}.py"
    file.write_text(text)
    names: dict[str, Any] = {}
    exec(compile(text, str(file), "exec"), names)
    return names


def described(folder: Path, text: str, name: str = "f") -> str:
    found, from_source = describe_function(load(folder, text)[name])
    assert from_source
    return found


def test_it_is_the_definition_whatever_its_layout_and_place(tmp_path: Path) -> None:
    first = described(tmp_path, "def f(x):\n    return x[0]\n")
    assert first == hashlib.sha256(b"def f(x):\n    return x[0]").hexdigest()
    assert described(tmp_path, "import os\n\n\ndef f( x ):  # the first\n\n    return (x[0])\n") == first
    assert described(tmp_path, "def f(x):\n    return x[1]\n") != first
    assert described(tmp_path, "def f(x, part=0):\n    return x[part]\n") != first


def test_a_lambda_is_told_from_its_neighbours(tmp_path: Path) -> None:
    lone = described(tmp_path, "f = lambda x: x[0]\n")
    assert described(tmp_path, "g = dict(a=lambda x: x[1], f=lambda x: x[0], b=3)\nf = g['f']\n") == lone
    assert described(tmp_path, "g = dict(a=lambda x: x[1], f=lambda x: x[0], b=3)\nf = g['a']\n") != lone
    assert described(tmp_path, "call(\n    2,\n    f := (lambda x: x[0]),\n)\n".replace("call", "print")) == lone


CLOSURE = "def make(part):\n    return lambda x: x[part]\n\n\nf = make({})\n"


RECURSIVE = "def make():\n    def f(x):\n        return x if x < {} else f(x - 1)\n    return f\n\n\nf = make()\n"


def test_functions_in_closures(tmp_path: Path) -> None:
    """Their own text counts too; one that calls itself ends."""
    assert described(tmp_path, RECURSIVE.format(1)) == described(tmp_path, RECURSIVE.format(1))
    assert described(tmp_path, RECURSIVE.format(1)) != described(tmp_path, RECURSIVE.format(2))
    inner = "def make():\n    g = lambda x: x[{}]\n    return lambda x: g(x)\n\n\nf = make()\n"
    assert described(tmp_path, inner.format(0)) != described(tmp_path, inner.format(1))


class Counting:
    """Notes something while it is used."""

    def __init__(self) -> None:
        self.part, self._calls, self.seen = 0, 0, list[int]()

    def __call__(self, output: Any) -> Any:
        self._calls += 1
        self.seen.append(self._calls)
        return output[self.part]


def test_what_changes_with_use_is_left_out() -> None:
    function = Counting()
    before = describe_function(function)
    function([1])
    assert describe_function(function) == before
    function.part = 1
    assert describe_function(function) != before


def test_closures_partials_and_objects(tmp_path: Path) -> None:
    assert described(tmp_path, CLOSURE.format(0)) == described(tmp_path, CLOSURE.format(0))
    assert described(tmp_path, CLOSURE.format(0)) != described(tmp_path, CLOSURE.format(1))
    partial = "import functools\ndef g(x, part):\n    return x[part]\nf = functools.partial(g, part={})\n"
    assert described(tmp_path, partial.format("[0, {1: 2}]")) == described(tmp_path, partial.format("[0, {1: 2}]"))
    assert described(tmp_path, partial.format(0)) != described(tmp_path, partial.format(1))


def taking(part: Any) -> Callable[..., Any]:
    return lambda output, part=part: output[part]


def taking_by_name(part: Any) -> Callable[..., Any]:
    def take(output: Any, *, part: Any = part) -> Any:
        return output[part]

    return take


def holding(value: Any) -> Callable[..., Any]:
    return lambda output: output @ value


@pytest.mark.parametrize("make", [taking, taking_by_name, holding, lambda part: Take(part).named])
def test_values_of_defaults_closures_and_methods_count(make: Callable[[Any], Callable[..., Any]]) -> None:
    assert describe_function(make(0)) == describe_function(make(0))
    assert describe_function(make(0)) != describe_function(make(1))


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_tensors_and_arrays_that_a_function_holds_count(kind: Callable[[list[int]], Any]) -> None:
    assert describe_function(holding(kind([1, 2]))) == describe_function(holding(kind([1, 2])))
    assert describe_function(holding(kind([1, 2]))) != describe_function(holding(kind([1, 3])))
    odd = describe_function(holding(np.array([object()], object)))
    assert odd == describe_function(holding(np.array([object()], object)))


def test_a_module_counts_with_its_weights() -> None:
    torch.manual_seed(0)
    head = nn.Linear(3, 2)
    assert describe_function(copy.deepcopy(head)) == describe_function(head)
    assert describe_function(nn.Linear(3, 2)) != describe_function(head)


def test_wrappers_in_a_circle_are_described() -> None:
    one, two = taking(0), taking(0)
    one.__wrapped__, two.__wrapped__ = two, one  # type: ignore[attr-defined]
    assert describe_function(one) == describe_function(taking(0))


def first(output: Any) -> Any:
    return output[0]


class Take:
    def __init__(self, part: int = 0) -> None:
        self.part = part

    def __call__(self, output: Any) -> Any:
        return output[self.part]

    def method(self, output: Any) -> Any:
        return output[1]

    def named(self, output: Any) -> Any:
        return output[self.part]


def test_classes_methods_and_decorated_functions() -> None:
    @functools.wraps(first)
    def wrapper(output: Any) -> Any:
        return first(output)

    assert describe_function(wrapper) == describe_function(first)
    sources = {describe_function(function) for function in (first, Take(), Take(1), Take(1), Take().method)}
    assert len(sources) == 4
    assert all(from_source for _, from_source in sources)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (operator.itemgetter(0), "operator.itemgetter(0)"),
        (len, "builtins.len"),
        (eval("lambda x: x"), "tests.networks.test_functions.<lambda>"),
    ],
)
def test_without_source_its_name_stands_for_it(function: Callable[..., Any], name: str) -> None:
    assert describe_function(function) == (name, False)


def test_a_call_names_what_it_has() -> None:
    assert describe_call(Call()) == ({}, [])
    source = describe_function(first)[0]
    assert describe_call(Call(logits=first, mask="valid")) == ({"logits": source, "mask": "valid"}, [])
    found, notes = describe_call(Call(prepare=dict))
    assert found == {"prepare": "builtins.dict"}
    assert notes == [
        "the source of prepare= is not at hand; the cache's identity has its name, builtins.dict: it is not noticed"
        " when its code changes"
    ]
