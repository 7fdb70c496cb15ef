"""What stands for a caller's functions in an identity: their source, whatever its layout and comments.

    lambda output: output[0]              the lambda alone, not its line
    def take(output, part=PART): …        the definition, and the simple values of its closure and defaults
    functools.partial(take, part=1)       the function, and the arguments
    an object with __call__               its class, and its simple values; of a module its weights too
    taker.take                            the method, and the object's simple values that it names
    operator.itemgetter(0)                no source: its name, which a note says

Simple values are numbers, texts, tensors and arrays, and tuples, lists and mappings of them. What a function calls is
not compared, nor are global values.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import linecache
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from nacpipe.errors import InputError
from nacpipe.networks.call import Call
from nacpipe.networks.checkpoints import hash_network
from nacpipe.networks.state_dicts import hash_weights

_SIMPLE = (str, bytes, int, float, complex, bool, type(None))
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def describe_call(call: Call) -> tuple[dict[str, str], list[str]]:
    """Return the identity of how a network is called, and notes.

    Returns:
        `prepare`, `logits` and `mask`, those that there are: a mask's name, or the sha256 of a function's source; and a
        note for each function whose source is not at hand: its name stands for it.
    """
    described, notes = {}, []
    for name in ("prepare", "logits", "mask"):
        given = getattr(call, name)
        if isinstance(given, str):
            described[name] = given
        elif given is not None:
            described[name], from_source = describe_function(given)
            if not from_source:
                notes.append(
                    f"the source of {name}= is not at hand; the cache's identity has its name, {described[name]}: it is"
                    " not noticed when its code changes"
                )
    return described, notes


def describe_function(function: Callable[..., Any]) -> tuple[str, bool]:
    """Return the sha256 of a function's source, and True; or its name, and False, where there is no source."""
    try:
        text, from_source = _text(function)
    except RecursionError:  # a value that holds itself
        text, from_source = _name(function), False
    return (hashlib.sha256(text.encode()).hexdigest() if from_source else text), from_source


def _text(function: Callable[..., Any]) -> tuple[str, bool]:
    if isinstance(function, functools.partial):
        text, from_source = _text(function.func)
        arguments = [*map(_value, function.args), *(f"{k}={_value(v)}" for k, v in sorted(function.keywords.items()))]
        return f"partial({', '.join([text, *arguments])})", from_source
    with contextlib.suppress(ValueError):  # wrappers in a circle
        function = inspect.unwrap(function)
    plain = getattr(function, "__func__", function)  # of a method
    code = getattr(plain, "__code__", None)
    texts = _find_code(code) if isinstance(code, CodeType) else _find_class(plain)
    if not texts:
        return _name(function), False
    if isinstance(code, CodeType):
        texts += _find_values(plain, code)
        if plain is not function:
            own = _simple_values(function.__self__)  # type: ignore[attr-defined]
            texts += [f"self.{name} = {_value(value)}" for name, value in own.items() if name in code.co_names]
    return "\n".join(texts), True


def _find_values(function: Any, code: CodeType) -> list[str]:
    """Return what a function holds beside its text: its closure, and the values of its defaults."""
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    texts = [f"{name} = {_cell(cell)}" for name, cell in cells]
    if defaults := [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]:
        texts.append(f"defaults = {_value(defaults)}")
    return texts


def _find_code(code: CodeType) -> list[str]:
    """Return a function's definition without comments and layout; none where its file is not at hand."""
    found = [node for node in _definitions(code.co_filename) if _first_line(node) == code.co_firstlineno]
    found = [node for node in found if isinstance(node, ast.Lambda) == (code.co_name == "<lambda>")]
    if len(found) > 1:  # of several lambdas in a line the one whose body this code computes
        positions = {(a, b, c, d) for a, b, c, d in code.co_positions()}
        found = [node for node in found if _position(node) in positions] or found
    return [ast.unparse(node) for node in found]


def _find_class(instance: object) -> list[str]:
    """Return the class and the values of an object that is called; none where the class is not written in Python."""
    kind = type(instance)
    if not any(isinstance(vars(base).get("__call__"), FunctionType) for base in kind.__mro__):
        return []
    try:
        lines, start = inspect.findsource(kind)
    except (OSError, TypeError):
        return []
    nodes = [node for node in _parse("".join(lines)) if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    texts = [ast.unparse(node) for node in nodes if start + 1 in (node.lineno, _first_line(node))]
    weights = [f"weights = {_weights(instance)}"] if isinstance(instance, nn.Module) else []
    return [*texts, _value(_simple_values(instance)), *weights] if texts else []


def _simple_values(instance: object) -> dict[str, Any]:
    """Return an object's public attributes that are numbers or texts; others may change while it is used."""
    held = getattr(instance, "__dict__", {}).items()
    return {name: value for name, value in held if isinstance(value, _SIMPLE) and not name.startswith("_")}


def _weights(module: nn.Module) -> str:
    try:
        return hash_network(module)
    except InputError:  # in a form that cannot be hashed
        return "?"


def _definitions(file: str) -> list[Any]:
    return _parse("".join(linecache.getlines(file)))


def _parse(text: str) -> list[Any]:
    try:
        return [node for node in ast.walk(ast.parse(text)) if isinstance(node, _DEFINITIONS)]
    except (SyntaxError, ValueError, RecursionError):
        return []


def _first_line(node: Any) -> int:
    """The line of a definition, or of its first decorator."""
    first: int = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return first


def _position(node: Any) -> tuple[int, int, int, int] | None:
    if not isinstance(node, ast.Lambda):
        return None
    body = node.body
    assert body.end_lineno is not None and body.end_col_offset is not None
    return body.lineno, body.end_lineno, body.col_offset, body.end_col_offset


def _cell(cell: Any) -> str:
    try:
        return _value(cell.cell_contents)
    except ValueError:  # a name that is not set yet
        return "?"


def _value(value: Any) -> str:
    """A value that is the same in another process: simple ones, and tuples, lists and mappings of them, as written."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_value(k)}: {_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, Tensor | np.ndarray | np.generic):
        with contextlib.suppress(InputError):  # objects, or no values
            return hash_weights({"": value})
    if isinstance(code := getattr(value, "__code__", None), CodeType):
        return "\n".join(_find_code(code)) or _name(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _name(function: Callable[..., Any]) -> str:
    if (name := getattr(function, "__qualname__", None)) is not None:
        module = getattr(function, "__module__", None)  # None of code that was executed from a text
        return f"{module}.{name}" if module else str(name)
    shown = repr(function)
    return _value(function) if " at 0x" in shown else shown
