"""Hostile input, drawn: whatever a cache, list, folder, image, TOML or parameter file holds, it is read or refused.

A few draws of each in `make check`, many in `make fuzz`. Never a traceback, never a path outside, never memory for more
than what is really stored.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nacpipe.artifact import read_params
from nacpipe.cache import Cache, open_cache
from nacpipe.cache.seal import split_digest
from nacpipe.cli import main
from nacpipe.core.provenance import fingerprint
from nacpipe.data.folders import is_hidden, walk_images
from nacpipe.data.lists import check_labels, parse_list
from nacpipe.data.own import read_benchmark
from nacpipe.errors import ImageError, InputError, NacError, ParamsError
from nacpipe.network.image_file import read_image

EXAMPLES = int(os.environ.get("NACPIPE_FUZZ", "40"))
fuzzed = settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

WORDS = ["a", "", "..", "/", "\x1b[2J", "\u202eright", "NaN", "float32", "crc32c", "\ud800", "x" * 5000, "rows", "none"]
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
LEAVES = st.sampled_from([*WORDS, *NUMBERS, None, True, False]) | st.text(max_size=8) | st.integers(-3, 70)
VALUES = st.recursive(
    LEAVES,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(WORDS[:-4]), v, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(len(value)):
            yield from places(value[number], (*path, number))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; None there removes it."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is None:
        del copy[path[0]]
    else:
        copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crafted(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = dict.fromkeys(["id/subtrain", "id/test", "ood/near/letters", "ood/far/textures", "ood/val"], 0)
    make_cache(path := tmp_path_factory.mktemp("crafted") / "c.zarr", rows={**rows, "id/train": 20, "id/val": 17})
    return path


def seal(path: Path) -> None:
    """What someone does who wants his changes believed: all digests computed anew."""
    content = json.loads((path / "zarr.json").read_text())
    rest = {key: value for key, value in content["attributes"].items() if key != "digest"}
    content["attributes"] = {**rest, "digest": fingerprint(rest)}
    (path / "zarr.json").write_text(json.dumps(content))
    import zarr

    group = zarr.open_group(path, mode="r")["id/val"]
    assert isinstance(group, zarr.Group)
    content = json.loads((path / "id/val/zarr.json").read_text())
    content["attributes"]["digest"] = split_digest(group, dict(group.attrs))
    (path / "id/val/zarr.json").write_text(json.dumps(content))


def read_everything(path: Path) -> None:
    cache = open_cache(path)
    for split in cache.values():
        for array in cache.header.arrays():
            assert split.read(array).nbytes < 2**20
        assert split.marks().size < 1000
    cache.classifier()


@fuzzed
@given(data=st.data())
def test_a_crafted_cache_is_read_or_refused(crafted: Path, data: st.DataObject) -> None:
    files = sorted(crafted.rglob("zarr.json"))
    file = data.draw(st.sampled_from(files).map(lambda f: f.relative_to(crafted).as_posix()), label="file")
    whole = (crafted / file).read_bytes()
    val = (crafted / "id/val/zarr.json").read_bytes()
    root = (crafted / "zarr.json").read_bytes()
    content = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(content))), label="place")
        content = put(content, place, data.draw(VALUES, label="value"))
    (crafted / file).write_text(json.dumps(content))
    try:
        if data.draw(st.booleans(), label="sealed anew"):
            with contextlib.suppress(Exception):  # it may be no cache by now, and is read as it is
                seal(crafted)
        try:
            read_everything(crafted)
        except NacError as error:
            assert "\n" not in error.one_line()
        for line in (["verify"], ["verify", "--format"], ["inspect"], ["verify", "--json"]):
            done = CliRunner().invoke(main, [line[0], str(crafted), *line[1:]])
            assert isinstance(done.exception, SystemExit | None), done.exception
            assert done.exit_code in (0, 1)
            shown = done.output if "--json" not in line else done.stderr
            assert all(c.isprintable() or c == "\n" for c in shown)
    finally:
        (crafted / file).write_bytes(whole)
        (crafted / "id/val/zarr.json").write_bytes(val)
        (crafted / "zarr.json").write_bytes(root)


@pytest.mark.parametrize("size", [10**12, 2**40])
def test_a_cache_that_claims_more_than_is_there_is_not_believed(crafted: Path, tmp_path: Path, size: int) -> None:
    """Every number consistent, every digest right: only the chunks of so many rows are not there."""
    shutil.copytree(crafted, path := tmp_path / "c.zarr")
    for file in (path / "id/val").rglob("zarr.json"):
        content = json.loads(file.read_text())
        if content["node_type"] == "array":
            rows = size if file.parent.name != "blocks" else -(-size // 16)
            content["shape"] = [rows, *content["shape"][1:]]
        elif file.parent == path / "id/val":
            content["attributes"]["rows"] = size
        file.write_text(json.dumps(content))
    seal(path)
    with pytest.raises(NacError, match="its chunks are not there"):
        open_cache(path)["id/val"]
    for command in ("verify", "inspect", "repair"):
        done = CliRunner().invoke(main, [command, str(path)])
        assert isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == 1


# --- lists, TOML, parameters ------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        b"a.png",
        b" ",
        b"1",
        b"-1",
        b"\n",
        b"/etc/passwd",
        b"../",
        b"..",
        b"\x00",
        b"\r",
        b"{'label': 3}",
        b"{",
        b"9" * 30,
        b"\xff",
        b"\x1b[2J",
        b"__import__('os')",
        "é".encode(),
        b"(" * 200,
        b"\t",
        b"-",
        b"\\..\\",
        b"./",
        b"//x",
        b"\xef\xbb\xbf",
        b"{'x': {'y z': 1}, 'label': 12}",
        b" {",
        b"}",
        "\u00a0".encode(),
    ]
)


@fuzzed
@given(content=st.lists(PIECES, max_size=12).map(b"".join) | st.binary(max_size=40))
@example(content=b"a/../../b.png 1")
@example(content=b"[" * 5000 + b" 1")
def test_any_list_is_read_or_refused_and_none_leaves_its_folder(content: bytes) -> None:
    try:
        names, labels = parse_list(content, "list.txt")
    except ImageError as error:
        assert "list.txt" in str(error) and "\n" not in error.one_line()
        return
    assert len(names) == labels.size > 0
    for name in names:
        path = PurePosixPath(name)
        assert not path.is_absolute() and ".." not in path.parts and not {"\0", "\r", "\n"} & {*name}
    with contextlib.suppress(InputError):
        check_labels("id/val", labels, 10, lambda row: f"line {row + 1}")
        assert labels.min() >= 0 and labels.max() < 10


NODES = st.sampled_from(["a", "b", "a/a", "a/b", "b/a", "b/b", "a/b/a", ".h", "a/.h", "b/__MACOSX", "b/v1.0"])
TARGETS = st.sampled_from([".", "..", "a", "b", "../a", "../b", "../..", "nowhere", "/nowhere", "../../set", "b/a"])


@fuzzed
@given(
    folders=st.lists(NODES, max_size=5),
    links=st.dictionaries(NODES, TARGETS, max_size=5),
    images=st.lists(st.tuples(NODES, st.sampled_from(["1.png", "2.JPG", "._1.png", "x.txt"])), max_size=6),
)
def test_any_folder_is_walked_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    folders: list[str],
    links: dict[str, str],
    images: list[tuple[str, str]],
) -> None:
    """Whatever links it holds: it ends, and names every visible image once, or a link."""
    top = tmp_path_factory.mktemp("walk") / "set"
    top.mkdir()
    for name in folders:
        (top / name).mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        with contextlib.suppress(OSError):
            (top / name).symlink_to(target)
    for name, image in images:
        with contextlib.suppress(OSError):
            (top / name / image).touch()
    try:
        found = walk_images(top)
    except ImageError as error:
        assert str(top) in str(error) and "link" in str(error)
        return
    files = [os.path.realpath(top / name) for name in found.names]
    assert len(set(files)) == len(files) and all(map(os.path.isfile, files))
    visible = {str(file) for file in top.rglob("*.[pJ]*") if not any(map(is_hidden, file.relative_to(top).parts))}
    assert {os.path.realpath(file) for file in visible} <= {*files}


def wide_image(kind: str, dtype: str) -> bytes:
    Image.fromarray(np.arange(0, 60000, 5000).reshape(3, 4).astype(dtype)).save(file := io.BytesIO(), kind)
    return file.getvalue()


IMAGES = [wide_image("PNG", "<u2"), wide_image("TIFF", "<u2"), wide_image("TIFF", ">u2"), wide_image("TIFF", "<i4")]
IMAGES += [
    wide_image("TIFF", "<f4"),
    b"P5 4 1 1000\n" + bytes(8),
    b"P2 4 1 300\n1 2 300 4\n",
    b"Pf\n1 1\n-1\n" + bytes(4),
]


@fuzzed
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata
@given(
    image=st.sampled_from(IMAGES),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 10_000) | st.none(),
)
def test_any_image_becomes_eight_bits_or_is_refused(
    tmp_path: Path, image: bytes, changes: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(image)
    for place, value in changes:
        content[place % len(content)] = value
    (tmp_path / "a.png").write_bytes(content if cut is None else content[: cut % len(content)])
    try:
        found = read_image(tmp_path / "a.png", "here").convert("RGB")
    except ImageError as error:
        assert str(error).startswith("image cannot be read: here: ") and "\n" not in str(error)
        return
    assert found.mode == "RGB"


TOML = """
name = "mine"
classes = 3
[transform]
resize = 32
crop = 32
mean = [0.5]
std = [0.25]
[id.train]
list = "train.txt"
[id.val]
folders = "val"
[id.test]
torchvision = "FakeData"
size = 5
[ood.val]
list = "ood.txt"
folder = "images"
[ood.near.other]
list = "other.txt"
"""


@fuzzed
@given(
    line=st.integers(0, TOML.count("\n")),
    new=st.sampled_from(
        [
            'root = "/"',
            'list = "../x"',
            'list = "/etc/passwd"',
            "classes = 1e400",
            "classes = nan",
            "mean = [nan]",
            "[id.train]",
            "[[id]]",
            '[ood."../x"]',
            'folder = "\\u0000"',
            "size = 1979-05-27",
            "x = " + "[" * 3000,
            "=",
            "",
            'torchvision = "os"',
            'loader = "x"',
            "crop = 99999999999999999999",
            'name = "\\u001b[2J"',
            "std = [0]",
        ]
    )
    | st.text(max_size=20),
    replaces=st.booleans(),
)
def test_any_toml_is_read_or_refused(tmp_path: Path, line: int, new: str, replaces: bool) -> None:
    lines = TOML.split("\n")
    lines[line : line + replaces] = [new]
    file = tmp_path / "mine.toml"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        found = read_benchmark(file)
    except InputError as error:
        assert "mine.toml" in str(error)
        return
    for split in found.splits:
        for path in (PurePosixPath(split.source), PurePosixPath(split.folder)):
            assert not path.is_absolute() and ".." not in path.parts


PARAMS = {"layers": {"avgpool": {"bins": 50, "saturation": 50, "alpha": 100.0, "weight": 1.0, "edges": "log"}}}


@fuzzed
@given(place=st.sampled_from(list(places(PARAMS))), value=VALUES)
def test_any_parameters_are_read_or_refused(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(put(PARAMS, place, value)))
    try:
        found = read_params(file)
    except ParamsError as error:
        assert "p.json" in str(error)
        return
    for layer in found.layers.values():
        assert 4 <= layer.bins <= 100_000 and layer.alpha > 0 and np.isfinite([layer.alpha, layer.weight]).all()
