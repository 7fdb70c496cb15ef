"""Hostile input, drawn: whatever a cache, list, folder, image, TOML, parameter file, checkpoint or name is, it is read
or refused in words.

A few draws of each in `make check`, many in `make fuzz`. Never a traceback, never a path outside, never memory for more
than what is really stored.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nacpipe.benchmarks.folders import is_hidden, walk_images
from nacpipe.benchmarks.lists import check_labels, parse_list
from nacpipe.benchmarks.toml import read_benchmark
from nacpipe.cache import Cache, open_cache
from nacpipe.cache.digest import split_digest
from nacpipe.cache.identity import fingerprint
from nacpipe.cli import main
from nacpipe.errors import FormatError, ImageError, InputError, NacError, ParamsError
from nacpipe.extraction.image_file import read_image
from nacpipe.scoring.params_file import read_params

pytestmark = pytest.mark.slow

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

    root = zarr.open_group(path, mode="r", use_consolidated=False)
    try:
        header = open_cache(path).header
    except FormatError:  # it is refused before its splits are looked at
        return
    content = json.loads((path / "id/val/zarr.json").read_text())
    content["attributes"]["digest"] = split_digest(root, "id/val", dict(root["id/val"].attrs), header)
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
        codecs.BOM_UTF8,
        b"\r\n",
        b"a b.png",
        b"\ta.png\t1",
        b"caf\xe9.png",  # Latin-1
        "a.png 1\n".encode("utf-16"),
        b"9" * 5000,
        b"1e400",
        b"0x10",
        b"1_000",
        "\u0663".encode(),  # a digit, and none that int() takes in a list
        "\u2028\x85\x0c".encode(),
        b"{'label': 99999999999999999999}",
        b"2147483648",
        b"x" * 5000,
        b"#",
        b"\xed\xb3\xa9",  # a surrogate, encoded
    ]
)


@fuzzed
@given(content=st.lists(PIECES, max_size=12).map(b"".join) | st.binary(max_size=40))
@example(content=b"a/../../b.png 1")
@example(content=b"[" * 5000 + b" 1")
@example(content=codecs.BOM_UTF8 + b"a.png 1\r\nb c.png\t2\r\n")
@example(content=b"a.png " + b"9" * 5000)
@example(content="a.png 1\n".encode("utf-16"))
@example(content=b"caf\xe9.png 1")
def test_any_list_is_read_or_refused_and_none_leaves_its_folder(content: bytes) -> None:
    try:
        names, labels = parse_list(content, "list.txt")
    except ImageError as error:
        assert "list.txt" in str(error) and "\n" not in error.one_line() and len(error.one_line()) < 1000
        return
    assert len(names) == labels.size > 0
    assert np.abs(labels).max() <= 2**31
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


# --- labels, folders and links, through the command line --------------------------------------------------------------

OWN = """
name = "mine"
classes = 3
[transform]
resize = 8
crop = 8
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
"""
SETS = ["id.train", "id.subtrain", "id.val", "id.test", "csid.x", "ood.val", "ood.near.x", "ood.far.x"]
NETWORK = """
from torch import nn
def build():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
"""
PIXELS = b"P6 1 1 255\n\x01\x02\x03"  # a whole image, in few bytes


def invoke(*args: str, charset: str = "utf-8") -> tuple[int, str, str]:
    """Run a command; it ends with an exit code and one line, never with a traceback."""
    done = CliRunner(charset=charset).invoke(main, list(args), prog_name="nacpipe")
    if not isinstance(done.exception, SystemExit | None):
        raise AssertionError(f"{args}: {done.exception!r}") from done.exception
    assert done.exit_code in (0, 1)
    errors = done.stderr_bytes.decode(charset)
    assert all(c.isprintable() or c == "\n" for c in errors)
    if done.exit_code == 1:
        assert errors.splitlines()[-1].startswith("nacpipe: ")
    return done.exit_code, done.stdout_bytes.decode("utf-8" if "--csv" in args else charset), errors


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of lists, with three images and a small network."""
    folder = tmp_path_factory.mktemp("listed")
    tables = "".join(f'[{name}]\nlist = "{name}.txt"\n' for name in SETS)
    (folder / "mine.toml").write_text(OWN + tables)
    (folder / "net.py").write_text(NETWORK)
    for name in "abc":
        (folder / f"{name}.ppm").write_bytes(PIXELS)
    return folder


LABELS = st.sampled_from([-1, 0, 1, 2]) | st.sampled_from([-2, 3, 4, 10, 999, 2**31, -(2**31), 2**63, 10**30])


@fuzzed
@given(data=st.data())
def test_any_labels_are_taken_or_refused(listed: Path, data: st.DataObject) -> None:
    drawn = {}
    for name in SETS:
        labels = data.draw(st.lists(LABELS, min_size=3, max_size=6), label=name)
        if name.startswith("ood"):
            labels = [-1 for _ in labels] if data.draw(st.booleans()) else labels
        drawn[name] = labels
        end = data.draw(st.sampled_from(["\n", "\r\n"]))
        lines = end.join(f"{'abc'[i % 3]}.ppm {label}" for i, label in enumerate(labels))
        (listed / f"{name}.txt").write_bytes(lines.encode())
    invoke("data", "status", str(listed / "mine.toml"))
    cache = ["--cache", str(listed / "c.zarr"), "--train-images", "3"]
    model = ["--model", f"{listed / 'net.py'}:build"]
    code, _, errors = invoke("extract", str(listed / "mine.toml"), *model, *cache, "--dry-run")
    if any(not 0 <= label < 3 for name in SETS if not name.startswith("ood") for label in drawn[name]):
        assert code == 1 and re.search(r"(id|csid)\.\w+\.txt", errors)


FILE_NAMES = st.sampled_from(
    [
        "a.ppm",
        "b c.ppm",
        ".a.ppm",
        "._a.ppm",
        "Thumbs.db",
        "x\ny.ppm",
        "caf\udce9.ppm",
        "\u202eppm.ppm",
        "-a.ppm",
        "a.PPM",
    ]
)
FOLDER_NAMES = st.sampled_from(["0", "1", "2", "deep", ".hidden", "caf\udce9", "a b", "x\ny"])
AWAY = st.sampled_from([".", "..", "../..", "0", "../0", "deep", "/", "nosuch", "self", "a.ppm", "../outside"])


@fuzzed
@given(data=st.data())
def test_any_benchmark_of_folders_is_walked_or_refused(data: st.DataObject) -> None:
    """Links to folders above and below, to themselves, to nothing, out of the set; hidden files; names of bytes."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tables = "".join(f'[{key}]\nfolders = "{key}"\n' for key in ("id.train", "id.val", "ood.val"))
        (place / "mine.toml").write_text(OWN + tables)
        (place / "net.py").write_text(NETWORK)
        (place / "outside").mkdir()
        (place / "outside/o.ppm").write_bytes(PIXELS)
        for key in ("id.train", "id.val", "ood.val"):
            folders = [place / key / str(label) for label in range(3)]
            for folder in folders:
                folder.mkdir(parents=True)
                (folder / "a.ppm").write_bytes(PIXELS)
            folders.append(place / key)
            for _ in range(data.draw(st.integers(0, 4), label=f"changes in {key}")):
                where = data.draw(st.sampled_from(folders))
                kind = data.draw(st.sampled_from(["file", "folder", "link", "nothing", "garbage"]))
                target = where / data.draw(FOLDER_NAMES if kind == "folder" else FILE_NAMES | FOLDER_NAMES)
                with contextlib.suppress(OSError):  # it is there already, or its folder is not any more
                    if kind == "folder":
                        target.mkdir()
                        folders.append(target)
                    elif kind == "link":
                        target.symlink_to(data.draw(AWAY))
                    elif kind == "nothing":
                        shutil.rmtree(where)
                    elif not os.path.lexists(target):
                        target.write_bytes(PIXELS if kind == "file" else b"no image")
        toml = str(place / "mine.toml")
        invoke("data", "status", toml)
        invoke("data", "status", toml, "--json")
        if data.draw(st.integers(0, 4), label="planned") == 0:
            cache = ["--cache", str(place / "c.zarr"), "--train-images", "3"]
            invoke("extract", toml, "--model", f"{place / 'net.py'}:build", *cache, "--dry-run")
        with contextlib.suppress(ImageError):
            from nacpipe.detector.shards import find_paths

            assert all(path.is_relative_to(place) for path in find_paths([place]))


# --- checkpoints ------------------------------------------------------------------------------------------------------

PREFIXES = ["", "module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod.", "encoder.module."]
NESTS = ["model", "net", "state_dict", "model_state_dict", "ema", "weights", "", "1"]
DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "uint16", "bool", "float8_e4m3fn", "complex64"]
# What stands beside the weights in files of training loops.
OTHERS: list[Any] = [7, "text", None, [1, 2], {}, {"lr": 0.1}, (1,), True, b"bytes", {"a": {"b": 3}}]


def change_tensor(tensor: Any, how: str) -> Any:
    """A tensor as somebody might have saved it."""
    import torch

    changes: dict[str, Callable[[], Any]] = {
        "parameter": lambda: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
        "transposed": lambda: tensor.t() if tensor.dim() == 2 else tensor,
        "strided": lambda: torch.stack([tensor, tensor], dim=-1)[..., 0],
        "empty": lambda: tensor[:0] if tensor.dim() else tensor,
        "scalar": lambda: torch.tensor(1.0),
        "nan": lambda: torch.full_like(tensor.float(), float("nan")),
        "expanded": lambda: torch.zeros(()).expand(tensor.shape),
        "sparse": lambda: tensor.to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        "meta": lambda: tensor.to("meta"),
        "text": lambda: "text",
        "nothing": lambda: None,
    }
    try:
        return changes[how]() if how in changes else tensor.to(getattr(torch, how))
    except RuntimeError:  # NotImplementedError too: a tensor that was changed before
        return tensor


@pytest.mark.filterwarnings("ignore")  # torch's, of types that are new or old
@fuzzed
@given(data=st.data())
def test_any_checkpoint_is_loaded_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from nacpipe.benchmarks.standard import find_benchmark
    from nacpipe.networks.architectures.digits_cnn import DigitsCNN
    from nacpipe.networks.build import load_network
    from nacpipe.networks.models import find_model

    state: dict[Any, Any] = dict(DigitsCNN().state_dict())
    for _ in range(data.draw(st.integers(0, 3), label="changes")):
        key = data.draw(st.sampled_from(sorted(state, key=repr)))
        kind = data.draw(st.sampled_from(["tensor", "remove", "add", "rename"]))
        if kind == "tensor" and isinstance(state[key], torch.Tensor):
            hows = [*DTYPES, "parameter", "transposed", "strided", "empty", "scalar", "nan", "expanded", "sparse"]
            hows += ["quantised", "meta", "text", "nothing"]
            state[key] = change_tensor(state[key], data.draw(st.sampled_from(hows), label=key))
        elif kind == "remove":
            del state[key]
        elif kind == "rename":
            names = ["x", "", "module.", f"{key}.", "\ud800", str(key).upper(), 1, None, ("a", 1)]
            state[data.draw(st.sampled_from(names))] = state.pop(key)
        else:
            state["_extra_state"] = data.draw(st.sampled_from(OTHERS))
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype of all")
    if data.draw(st.booleans()):
        state = {k: change_tensor(v, dtype) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    prefix = data.draw(st.sampled_from(PREFIXES), label="prefix")
    content: Any = data.draw(st.sampled_from([dict, OrderedDict]))(
        {prefix + k if isinstance(k, str) else k: v for k, v in state.items()}
    )
    for _ in range(data.draw(st.integers(0, 2), label="nested")):
        content = {data.draw(st.sampled_from(NESTS)): content}
        if data.draw(st.booleans()):
            content["epoch"] = data.draw(st.sampled_from([*OTHERS, dict(state)]))
    tensors = all(isinstance(v, torch.Tensor) for v in content.values()) and all(isinstance(k, str) for k in content)
    if tensors and data.draw(st.booleans(), label="safetensors"):
        file = tmp_path / "net.safetensors"
        with contextlib.suppress(ValueError, RuntimeError, KeyError):  # what it does not hold
            save_file({k: v.detach().contiguous().clone() for k, v in content.items()}, file)
    else:
        torch.save(content, file := tmp_path / "net.pth")
    if file.exists() and data.draw(st.integers(0, 3), label="damaged") == 0:
        whole = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(whole[: data.draw(st.sampled_from([len(whole), at]))])
    try:
        network = load_network(find_model("digits_cnn"), find_benchmark("digits"), file, torch.device("cpu"))
    except NacError as error:
        assert "\n" not in error.one_line() and file.name in str(error)
        return
    finally:
        file.unlink(missing_ok=True)
    assert re.fullmatch("[0-9a-f]{64}", network.weights_sha256)


# --- names and encodings ----------------------------------------------------------------------------------------------

CHARSETS = st.sampled_from(["utf-8", "cp1252", "latin-1", "ascii", "cp437", "cp1251", "shift_jis", "gb18030"])
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12)
NAMES = st.one_of(
    TEXTS,
    st.binary(min_size=1, max_size=12).map(lambda b: os.fsdecode(b.replace(b"/", b"x").replace(b"\0", b"x"))),
    st.sampled_from(
        ["a b", "it's", "$(ls)", "`x`", "a;b", "*", "~", "caf\udce9", "\u202e", "a\nb", "\x1b[2J", "é", "測定", '"']
    ),
).filter(lambda name: name not in (".", "..") and not name.startswith("-") and "://" not in name)


@pytest.fixture(scope="module")
def searched(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, c.zarr, and what a search left beside it."""
    folder = tmp_path_factory.mktemp("searched")
    make_cache(folder / "c.zarr", rows={"id/train": 20, "id/val": 17, "ood/val": 17})
    assert invoke("search", str(folder / "c.zarr"), "--trials", "25")[0] == 0
    return folder


COMMANDS: list[list[str]] = [
    ["inspect", "CACHE"],
    ["inspect", "CACHE", "id/val", "avgpool", "--alpha", "2"],
    ["inspect", "CACHE", "NAME"],
    ["inspect", "CACHE", "id/val", "NAME"],
    ["inspect", "CACHE", "--json"],
    ["search", "CACHE", "--status"],
    ["search", "CACHE", "--explain"],
    ["search", "CACHE", "--dry-run"],
    ["search", "CACHE", "--trials", "2", "--study", "NAME"],
    ["search", "CACHE", "--status", "--study", "NAME"],
    ["search", "CACHE", "--trials", "2", "--storage", "NAME"],
    ["search", "CACHE", "--trials", "2", "--storage", "sqlite+pysqlite:///NAME"],
    ["search", "CACHE", "--space", "NAME"],
    ["search", "CACHE", "--layers", "NAME"],
    ["search", "CACHE", "--val", "NAME"],
    ["evaluate", "CACHE"],
    ["evaluate", "CACHE", "--csv"],
    ["evaluate", "CACHE", "--markdown"],
    ["evaluate", "CACHE", "--against", "CACHE.params.json", "--json"],
    ["evaluate", "CACHE", "--params", "NAME"],
    ["rank", "CACHE", "--csv"],
    ["verify", "CACHE"],
    ["repair", "CACHE"],
    ["export", "CACHE", "--json"],
    ["data", "status", "NAME.toml"],
    ["evaluate", "NAME"],
    ["extract", "NAME"],
]
BEFORE_COMMANDS = r"(?:next|with): (nacpipe .*)"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Optuna closes its databases when they are collected
@fuzzed
@given(name=NAMES, charset=CHARSETS, command=st.sampled_from(COMMANDS))
@example(name="caf\udce9", charset="cp1252", command=COMMANDS[10])
@example(name="a\nb", charset="ascii", command=COMMANDS[0])
def test_any_name_in_any_encoding(searched: Path, name: str, charset: str, command: list[str]) -> None:
    """What is printed is of the terminal's encoding, one line where a command fails; names in commands are quoted."""
    with tempfile.TemporaryDirectory() as folder:
        cache = os.path.join(folder, name)
        try:
            shutil.copytree(searched / "c.zarr", f"{cache}.zarr")
        except OSError:
            return  # the file system takes no such name
        for ending in ("params.json", "study.log"):
            shutil.copy(searched / f"c.{ending}", f"{cache}.{ending}")
        args = [arg.replace("CACHE.params", f"{cache}.params").replace("CACHE", f"{cache}.zarr") for arg in command]
        args = [
            arg.replace("NAME", os.path.join(folder, "other " + name) if "--study" not in args else name)
            for arg in args
        ]
        code, printed, errors = invoke(*args, charset=charset)
        if "--json" in command and code == 0:
            json.loads(printed.encode("ascii"))
        if charset == "utf-8" and name.isprintable():
            for pasted in re.findall(BEFORE_COMMANDS, errors):
                for path in (f"{cache}.zarr", f"{folder}/other {name}"):
                    assert path not in pasted or shlex.quote(path) in pasted
