"""Benchmark files: what they say, and what is refused by file and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.benchmarks.standard import Benchmark, Split, Transform, find_benchmark
from nacpipe.benchmarks.synthetic import IMAGE_KINDS
from nacpipe.benchmarks.toml import choose_root, open_benchmark, read_benchmark
from nacpipe.errors import InputError

GOOD = """
name = "mine"
classes = 3
class_names = ["a", "b", "c"]
root = "pictures"

[transform]
resize = 36
crop = 32
mean = [0.5, 0.4, 1]
std = [0.25, 0.25, 0.25]

[id.train]
list = "lists/train.txt"
folder = "images/"
[id.subtrain]
list = "lists/sub.txt"
[id.val]
folders = "val/"
[id.test]
torchvision = "SVHN"
split = "test"
folder = "svhn"
download = true
[csid.blurred]
folders = "blurred"
pre_resized = true
[ood.val]
folders = "."
[ood.near.foo-1]
torchvision = "FakeData"
size = 10
image_size = [3, 32, 32]
[ood.far.bar]
list = "bar.txt"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_becomes_a_benchmark(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    benchmark = open_benchmark(str(path))
    assert benchmark == Benchmark(
        name="mine",
        classes=3,
        transform=Transform(resize=36, crop=32, mean=(0.5, 0.4, 1.0), std=(0.25, 0.25, 0.25)),
        splits=(
            Split(name="id/train", source="lists/train.txt", folder="images"),
            Split(name="id/subtrain", source="lists/sub.txt", optional=True),
            Split(name="id/val", source="val", kind="folders"),
            Split(
                name="id/test",
                source="SVHN",
                kind="torchvision",
                folder="svhn",
                download=True,
                arguments={"split": "test"},
            ),
            Split(name="csid/blurred", source="blurred", kind="folders", optional=True, pre_resized=True),
            Split(name="ood/val", source=".", kind="folders"),
            Split(
                name="ood/near/foo-1",
                source="FakeData",
                kind="torchvision",
                optional=True,
                arguments={"size": 10, "image_size": [3, 32, 32]},
            ),
            Split(name="ood/far/bar", source="bar.txt", optional=True),
        ),
        root=str(tmp_path / "pictures"),
        class_names=("a", "b", "c"),
    )
    assert choose_root(benchmark, None) == tmp_path / "pictures"
    assert choose_root(benchmark, Path("elsewhere")) == Path("elsewhere")


@pytest.mark.parametrize(
    ("instead", "kinds"),
    [
        ("", IMAGE_KINDS),
        ("[ood.val]\nsynthetic = true", IMAGE_KINDS),
        ('[ood.val]\nsynthetic = ["turn", "mix"]', ("turn", "mix")),
    ],
    ids=["left out", "asked for", "chosen"],
)
def test_ood_val_is_made_from_id_val(tmp_path: Path, instead: str, kinds: tuple[str, ...]) -> None:
    benchmark = read_benchmark(write(tmp_path, GOOD.replace('[ood.val]\nfolders = "."', instead)))
    assert benchmark.split("ood/val") == Split(name="ood/val", source="val", kind="folders", synthetic=kinds)
    assert [split.name for split in benchmark.splits] == [s.name for s in read_benchmark(write(tmp_path, GOOD)).splits]


def test_other_names_are_benchmarks() -> None:
    assert open_benchmark("cifar10") is find_benchmark("cifar10")
    assert choose_root(find_benchmark("cifar10"), None) == Path("data")
    with pytest.raises(InputError, match=r"^benchmark 'mine' is not known; known: digits, .*, or your own FILE\.toml$"):
        open_benchmark("mine")
    with pytest.raises(InputError, match=r"^benchmark file no/such\.toml is not there$"):
        open_benchmark("no/such.toml")


def test_the_root_is_the_files_own_folder_unless_said(tmp_path: Path) -> None:
    assert read_benchmark(write(tmp_path, GOOD.replace('root = "pictures"', ""))).root == str(tmp_path)
    assert read_benchmark(write(tmp_path, GOOD.replace('"pictures"', '"/else/where"'))).root == "/else/where"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_taken_away(tmp_path: Path, end: str) -> None:
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.strip().replace("\n", end).encode())
    assert read_benchmark(tmp_path / "marked.toml") == read_benchmark(write(tmp_path, GOOD))


WRONG = {  # what stands in the file instead → the complaint
    ('name = "mine"', ""): "name: is not there; it must be a name",
    ('name = "mine"', "name = 5"): "name: is 5; it must be a name",
    ('name = "mine"', 'name = "../x"'): "name: is '../x'; it must match [A-Za-z0-9][A-Za-z0-9_.-]{0,63} and be none of",
    ('name = "mine"', 'name = "cifar10"'): "name: is 'cifar10'; it must match ",
    ("classes = 3", "classes = 3\ncolour = 1"): "colour: is not known",
    ("classes = 3", "classes = 1"): "classes: is 1; it must be a whole number from 2 to 1000000",
    ("classes = 3", "classes = 1e6"): "classes: is 1000000.0; it must be a whole number from 2 to 1000000",
    ("classes = 3", "classes = true"): "classes: is True; it must be a whole number",
    ("classes = 3", "classes = 4"): "class_names: has 3 names for 4 classes",
    ('["a", "b", "c"]', '["a", "b", "a"]'): "class_names: must be different names, the class folders in the order of",
    ('["a", "b", "c"]', '["a", "b", 3]'): "class_names: must be different names",
    ('root = "pictures"', "root = 1"): "root: is 1; it must be a folder, relative to this file",
    ('root = "pictures"', r'root = "a\u0000b"'): r"root: is 'a\x00b'; it must be a folder",
    ("resize = 36", ""): "transform.resize: is not there; it must be a whole number from 1 to 4096",
    ("resize = 36", "resize = 1000000"): "transform.resize: is 1000000; it must be a whole number from 1 to 4096",
    ("crop = 32", "crop = 40"): "transform.crop: is 40; it must be a whole number from 1 to 36",
    ("crop = 32", "crop = 32\nflip = true"): "transform.flip: is not known",
    ("crop = 32", 'crop = 32\ninterpolation = "box"'): "transform.interpolation: is 'box'; it must be one of bilinear,",
    ("[0.5, 0.4, 1]", "[0.5, 0.4]"): "transform.mean: is [0.5, 0.4]; it must be one number per channel, 1 or 3",
    ("[0.5, 0.4, 1]", "[0.5, nan, 1]"): "transform.mean: is [0.5, nan, 1]; it must be one number per channel",
    ("[0.5, 0.4, 1]", "0.5"): "transform.mean: is 0.5; it must be one number per channel",
    ("[0.5, 0.4, 1]", "[0.5]"): "transform.std: has 3 channels, mean has 1",
    ("[0.25, 0.25, 0.25]", "[0.25, 0, 0.25]"): "transform.std: is [0.25, 0.0, 0.25]; it must be positive",
    ("[transform]", "[[transform]]"): "transform: is [{",
    (
        "[transform]",
        "[transforms]",
    ): "transform: is not there; write [transform] and, a line each, resize = 256, crop",
    ("[id.train]", "[id.training]"): "id.training: is not known",
    ("[id.val]", "[id.other]"): "id.other: is not known",
    ("[id.val]", "[csid.val]"): "id.val: is not there; every benchmark needs id/train, id/val, id/test",
    (
        '[ood.val]\nfolders = "."',
        "[ood.val]",
    ): "ood.val: has no source; it needs one of list, folders, torchvision, syn",
    (
        "[ood.val]",
        "[ood.val]\nsynthetic = true",
    ): "ood.val: has folders and synthetic; it needs one of list, folders, to",
    ('[ood.val]\nfolders = "."', "[ood.val]\nsynthetic = false"): "ood.val.synthetic: is False; it must be true, or a",
    ('[ood.val]\nfolders = "."', "[ood.val]\nsynthetic = []"): "ood.val.synthetic: is []; it must be true, or a list",
    (
        '[ood.val]\nfolders = "."',
        '[ood.val]\nsynthetic = ["mix", "mix"]',
    ): "ood.val.synthetic: is ['mix', 'mix']; it mu",
    (
        '[ood.val]\nfolders = "."',
        '[ood.val]\nsynthetic = ["swirl"]',
    ): "ood.val.synthetic: is ['swirl']; it must be true",
    ('[ood.val]\nfolders = "."', "[ood.val]\nsynthetic = [1]"): "ood.val.synthetic: is [1]; it must be true, or a list",
    (
        '[ood.val]\nfolders = "."',
        "[ood.val]\nsynthetic = 1",
    ): "ood.val.synthetic: is 1; it must be true, or a list of s",
    ('[ood.val]\nfolders = "."', "[ood.val]\nsynthetic = true\nseed = 3"): "ood.val.seed: is not known",
    (
        '[id.val]\nfolders = "val/"',
        "[id.val]\nsynthetic = true",
    ): "id.val: has no source; it needs one of list, folders",
    ("[ood.far.bar]", "[ood.middle.bar]"): "ood.middle: is not known",
    ("[ood.far.bar]", '[ood.far."a/b"]'): "ood.far.a/b: is not a name for a set: ",
    ("[ood.far.bar]", '[ood.far."../../x"]'): "ood.far.../../x: is not a name for a set: ",
    ("[ood.far.bar]", "[ood.far.mean]"): "ood.far.mean: is reserved, tables name the mean over a group's sets so; give",
    (
        "[ood.near.foo-1]",
        "[ood.near.null]",
    ): "ood.near.null: is reserved, pandas reads it as a missing value in a table",
    (
        "[csid.blurred]",
        "[csid.NA]",
    ): "csid.NA: is reserved, pandas reads it as a missing value in a table; give the set",
    ("[ood.far.bar]", "[ood]\nfar = 3\n[x]"): "ood.far: is 3; it must be a table",
    ('list = "bar.txt"', ""): "ood.far.bar: has no source; it needs one of list, folders, torchvision",
    ('list = "bar.txt"', 'list = "a"\nfolders = "b"'): "ood.far.bar: has list and folders; it needs one of list",
    (
        'list = "bar.txt"',
        'list = "/etc/passwd"',
    ): "ood.far.bar.list: is '/etc/passwd'; it must be a path below the root",
    ('list = "bar.txt"', 'list = "a/../../b"'): "ood.far.bar.list: is 'a/../../b'; it must be a path below the root",
    ('list = "bar.txt"', "list = 3"): "ood.far.bar.list: is 3; it must be a path below the root",
    ('list = "bar.txt"', 'list = "b"\nfolder = ".."'): "ood.far.bar.folder: is '..'; it must be a path below the root",
    ('list = "bar.txt"', 'list = "b"\nsplit = "x"'): "ood.far.bar.split: is not known",
    ('list = "bar.txt"', 'folders = "b"\nfolder = "x"'): "ood.far.bar.folder: is not known",
    (
        '"SVHN"',
        '"os.system"',
    ): "id.test.torchvision: is 'os.system'; it must be the name of a class in torchvision.data",
    ('"SVHN"', '"__import__"'): "id.test.torchvision: is '__import__'; it must be the name of a class",
    ("download = true", "download = 1"): "id.test.download: is 1; it must be true or false",
    ("download = true", 'root = "/"'): "id.test.root: cannot be given",
    ("download = true", 'loader = "x"'): "id.test.loader: cannot be given",
    ("download = true", "when = 1979-05-27"): "id.test.when: is datetime.date(1979, 5, 27); it must be a number, text",
    ("download = true", "deep = [[1]]"): "id.test.deep: is [[1]]; it must be a number, text, true or false, or a list",
    ("pre_resized = true", 'pre_resized = "yes"'): "csid.blurred.pre_resized: is 'yes'; it must be true or false",
    ("[csid.blurred]", "[csid]\nblurred = 3\n[x]"): "csid.blurred: is 3; it must be a table",
}


@pytest.mark.parametrize(("change", "complaint"), WRONG.items(), ids=[c[:40] for c in WRONG.values()])
def test_what_does_not_fit_is_refused_by_file_and_key(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    assert GOOD.count(change[0]) == 1
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(InputError) as caught:
        read_benchmark(path)
    assert re.search(rf"^(benchmark file )?{re.escape(str(path))}:? {re.escape(complaint)}", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"a = " + b"[" * 50_000, b"x = 1\nx = 2", b"[a]\n[a]"])
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^benchmark file .*bad\.toml is not TOML: "):
        read_benchmark(path)


def test_huge_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InputError, match=r"^benchmark file .*huge\.toml is larger than 1 MiB$"):
        read_benchmark(path)


@given(data=st.data())
def test_a_file_with_a_piece_torn_out_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never another error."""
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, len(GOOD)))
    path = write(tmp_path_factory.getbasetemp(), GOOD[:start] + data.draw(st.text(max_size=5)) + GOOD[end:])
    try:
        assert {s.name for s in read_benchmark(path).splits} >= {"id/train", "id/val", "id/test", "ood/val"}
    except InputError as error:
        assert str(path) in str(error)
