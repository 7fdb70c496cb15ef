"""params.json: written whole or not at all, read with a message for whatever may be in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nacpipe.errors import InputError, ParamsError
from nacpipe.files import beside_cache, check_writable
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import MAX_BYTES, read_params, read_section, write_params

PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=50, saturation=7, alpha=0.1 + 0.2, weight=1 / 3),
        "layer 3 «ü»": LayerParams(
            bins=5, saturation=10**9, alpha=1e-12, weight=0.0, edges="linear", source="gradient"
        ),
    }
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_params(path, PARAMS, result={"val_auroc": 0.9, "ended": "trials"}, made_by={"cache": "c.zarr"})
    assert read_params(path) == read_params(str(path)) == PARAMS
    assert list(read_params(path).layers) == ["avgpool", "layer 3 «ü»"]
    content = json.loads(path.read_text())
    assert list(content) == ["layers", "result", "made_by"]
    assert content["result"] == {"val_auroc": 0.9, "ended": "trials"}
    assert path.read_text().endswith("}\n")
    os.umask(umask := os.umask(0o022))
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]


def test_only_layers_are_needed_and_fields_have_defaults(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"layers": {"avgpool": {"bins": 50.0, "saturation": 3, "alpha": 2}}, "more": 1}')
    expected = LayerParams(bins=50, saturation=3, alpha=2.0, weight=1.0, edges="log", source="product")
    assert read_params(tmp_path / "p.json") == NacParams(layers={"avgpool": expected})


def test_a_byte_order_mark_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_params(path, PARAMS, made_by={"fingerprint": "abc"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert (read_params(path), read_section(path, "made_by")) == (PARAMS, {"fingerprint": "abc"})


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["replace", "fsync", "open"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "p.json"
    write_params(path, PARAMS)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    other = NacParams(layers={"avgpool": LayerParams(bins=4, saturation=1, alpha=1.0)})
    if isinstance(error, OSError):
        with pytest.raises(InputError, match=rf"^{path} cannot be written: No space left on device$"):
            write_params(path, other)
    else:
        with pytest.raises(KeyboardInterrupt):
            write_params(path, other)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]


def test_sections_that_are_no_json_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_params(path, PARAMS)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_params(path, PARAMS, result={"value": object()})
    assert read_params(path) == PARAMS
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/no/p\.json cannot be written: No such file or directory$"):
        write_params(tmp_path / "no/p.json", PARAMS)
    (tmp_path / "d.json").mkdir()
    with pytest.raises(InputError, match=r"/d\.json cannot be written: Is a directory$"):
        write_params(tmp_path / "d.json", PARAMS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.json"]


def test_an_output_is_checked_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "p.json")
    message = r"^(.*)/no/p\.json cannot be written: \1/no is not a folder that can be written to$"
    with pytest.raises(InputError, match=message):
        check_writable(tmp_path / "no/p.json")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"/file is not a folder that can be written to$"):
        check_writable(tmp_path / "file/p.json")


def test_nothing_is_beside_a_url() -> None:
    with pytest.raises(InputError, match=r"^s3://b/x\.zarr is not on this machine, .*; give --storage and --output$"):
        beside_cache("s3://b/x.zarr", ".params.json", "--storage and --output")


def test_names_beside_a_cache() -> None:
    assert beside_cache("a/b.zarr", ".params.json") == Path("a/b.params.json")
    assert beside_cache("a/b.zarr/", ".params.json") == Path("a/b.params.json")
    assert beside_cache("b", ".study.log") == Path("b.study.log")


# --- whatever may be in it --------------------------------------------------------------------------------------------

NEEDED = r'parameters need an object \{"layers": \{NAME: \{"bins": …, "saturation": …, "alpha": …\}\}\}$'


def one(**fields: Any) -> dict[str, Any]:
    return {"layers": {"a": {"bins": 50, "saturation": 3, "alpha": 2.0, **fields}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], NEEDED),
        (None, NEEDED),
        (7, NEEDED),
        ("layers", NEEDED),
        ({}, NEEDED),
        ({"layers": []}, NEEDED),
        ({"layers": {}}, "there are no layers in these parameters$"),
        ({"layers": {"a": 3}}, "layer 'a' must be an object with bins, saturation, alpha, weight, edges, source$"),
        ({"layers": {"a": {"bins": 4, "alpha": 1}}}, "layer 'a' lacks 'saturation'; fields: bins, "),
        (one(bin=4), "layer 'a' does not know 'bin'; fields: bins, "),
        (one(bins=3), "layer 'a': bins is 3; it must lie between 4 and 100000$"),
        (one(bins=4.5), r"layer 'a': bins is 4\.5; it must be a whole number$"),
        (one(bins="50"), "layer 'a': bins is '50'; it must be a whole number$"),
        (one(bins=True), "layer 'a': bins is True; it must be a whole number$"),
        (one(bins=None), "layer 'a': bins is None; it must be a whole number$"),
        (one(bins=float("inf")), "layer 'a': bins is inf; it must be a whole number$"),
        (one(bins=10**400), r"layer 'a': bins is 10+; it must lie between 4 and 100000$"),
        (one(saturation=0), "layer 'a': saturation is 0; it must lie between 1 and 1000000000$"),
        (one(saturation=float("nan")), "layer 'a': saturation is nan; it must be a whole number$"),
        (one(alpha=0), r"layer 'a': alpha is 0\.0; it must be above 0$"),
        (one(alpha=-1), r"layer 'a': alpha is -1\.0; it must be above 0$"),
        (one(alpha=float("inf")), "layer 'a': alpha is inf; it must be a finite number$"),
        (one(alpha=10**400), "layer 'a': alpha is 10+; it must be a finite number$"),
        (one(alpha=False), "layer 'a': alpha is False; it must be a finite number$"),
        (one(weight=-0.5), r"layer 'a': weight is -0\.5; it must be at least 0$"),
        (one(weight=float("nan")), "layer 'a': weight is nan; it must be a finite number$"),
        (one(weight=0), "every layer's weight is 0; at least one must be above 0$"),
        (one(weight=[]), r"layer 'a': weight is \[\]; it must be a finite number$"),
        (one(edges="quantile"), "layer 'a': edges is 'quantile'; known: log, linear$"),
        (one(edges=["log"]), r"layer 'a': edges is \['log'\]; known: log, linear$"),
        (one(source={}), r"layer 'a': source is \{\}; known: product, activation, gradient$"),
    ],
)
def test_malformed_parameters_by_message(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ParamsError, match=rf"^{path}: {message}"):
        read_params(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"layers": {}} x', "Extra data"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"layers": {"a": {"bins": ' + b"9" * 5000 + b"}}}", "Exceeds the limit"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=rf"^{path} cannot be read as JSON: {message}"):
        read_params(path)


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    message = rf"^there is no parameter file {tmp_path}/p\.json; make one with: nacpipe search CACHE$"
    with pytest.raises(ParamsError, match=message):
        read_params(tmp_path / "p.json")
    with pytest.raises(ParamsError, match=r"cannot be read as JSON: \[Errno 21\] Is a directory"):
        read_params(tmp_path)
    with pytest.raises(ParamsError, match=r"^p\0\.json cannot be read as JSON: embedded null byte$"):
        read_params("p\0.json")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ParamsError, match=rf"^{path}: it has 16777217 bytes; at most 16777216 are read$"):
        read_params(path)


KEYS = st.sampled_from(["layers", "bins", "saturation", "alpha", "weight", "edges", "source", "a", ""]) | st.text()
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from(["log", "linear", "product", "gradient"])
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=20
)
FIELDS = st.fixed_dictionaries(
    {"bins": SCALARS | st.integers(4, 100), "saturation": SCALARS | st.just(3), "alpha": SCALARS | st.just(2.0)},
    optional={"weight": SCALARS, "edges": SCALARS, "source": SCALARS, "other": SCALARS},
)
NEARLY = st.fixed_dictionaries({"layers": st.dictionaries(st.text(), FIELDS | VALUES, max_size=3)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(content=VALUES | NEARLY)
def test_any_json_is_read_or_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    try:
        params = read_params(path)
    except ParamsError as error:
        assert str(error).startswith(f"{path}: ")
        return
    assert NacParams.from_json(json.loads(json.dumps(params.to_json()))) == params
    write_params(path, params)
    assert read_params(path) == params


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(ParamsError):
        read_params(tmp_path / "p.json")
