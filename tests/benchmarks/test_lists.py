"""Image lists and class folders by name."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from nacpipe.benchmarks.lists import describe_wrong_labels, parse_list, read_list
from nacpipe.benchmarks.standard import Benchmark, Split, Transform, find_benchmark
from nacpipe.errors import ImageError, InputError

CIFAR10 = find_benchmark("cifar10")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# --- lists ------------------------------------------------------------------------------------------------------------


def test_labels_are_integers_minus_one_or_in_a_dictionary() -> None:
    content = b"a/1.png 3\nb/2.JPEG -1\nc.png {'label': 7, 'other': 'x y'}\nd.png {\"soft\": [1]}\n"
    names, labels = parse_list(content, "list.txt")
    assert names == ["a/1.png", "b/2.JPEG", "c.png", "d.png"]
    assert labels.tolist() == [3, -1, 7, -1]
    assert labels.dtype == np.int64


def test_line_ends_and_empty_lines_at_the_end_do_not_matter() -> None:
    names, labels = parse_list(b"a.png 1\r\n b.png  2 \r\n\r\n\n", "list.txt")
    assert (names, labels.tolist()) == (["a.png", "b.png"], [1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png 1\nb.png\n", r"^line 2 of list\.txt is not 'path label' \(no label\): 'b\.png'$"),
        (b"a.png one\n", r"^line 1 of list\.txt is not 'path label' \(label 'one' is not an integer\): 'a\.png one'$"),
        (b"a.png 1.5\n", r"^line 1 of list\.txt is not 'path label' \(label '1\.5' is not an integer\)"),
        (b"a.png True\n", r"^line 1 of list\.txt is not 'path label' \(label 'True' is not an integer\)"),
        (
            b"a.png {'label': '3'}\n",
            r"^line 1 of list\.txt is not 'path label' \(the 'label' of its dictionary is not an integer\):"
            r" \"a\.png {'lab",
        ),
        (
            b"a.png {'label': True}\n",
            r"^line 1 of list\.txt is not 'path label' \(the 'label' of its dictionary is not",
        ),
        (
            b"a.png {'label' 3}\n",
            r"^line 1 of list\.txt is not 'path label' \(no label: the text that ends in } is not",
        ),
        (
            b"a{b}\n",
            r"^line 1 of list\.txt is not 'path label' \(no label: the text that ends in } is not a dictionary\):"
            r" 'a{b}'$",
        ),
        (b"a.png 1\nb.png 2\n\nc.png 3\n", r"^line 3 of list\.txt is not 'path label' \(it is empty\): ''$"),
        (b"a.png 1\n\t \r\nc.png 3\n", r"^line 2 of list\.txt is not 'path label' \(it is empty\): ''$"),
        (b"a.png __import__('os').getcwd()\n", r"^line 1 of list\.txt is not 'path label' \(label \"__import__\('os"),
        (b"my picture.png\n", r"^line 1 of list\.txt is not 'path label' \(label 'picture\.png' is not an integer\)"),
        (b"", r"^list\.txt lists no images$"),
        (b"\n \n", r"^list\.txt lists no images$"),
        (b"\xef\xbb\xbf\r\n", r"^list\.txt lists no images$"),
        (b"a.png 1\n\xff.png 1\n", r"^line 2 of list\.txt is not UTF-8 text: invalid start byte at byte 8$"),
        (b"\xef\xbb\xbfa.png 1\nb\xe9.png 1\n", r"^line 2 of list\.txt is not UTF-8 text: .* at byte 12$"),
        ("a.png 1\n".encode("utf-16"), r"^line 1 of list\.txt is not UTF-8 text: invalid start byte at byte 0$"),
        (b"a.png 1\n../b.png 2\n", r"^line 2 of list\.txt leaves the image folder: '\.\./b\.png'$"),
        (b"a/../../b.png 2\n", r"^line 1 of list\.txt leaves the image folder: 'a/\.\./\.\./b\.png'$"),
        (b"x y/../b.png\t2\n", r"^line 1 of list\.txt leaves the image folder: 'x y/\.\./b\.png'$"),
        (b"/etc/passwd 2\n", r"^line 1 of list\.txt leaves the image folder: '/etc/passwd'$"),
        (b"../a {'label': 1}\n", r"^line 1 of list\.txt leaves the image folder: '\.\./a'$"),
        (
            b"a\x00.png 2\n",
            r"^line 1 of list\.txt is not 'path label' \(its path has a NUL character; is it UTF-16\?\): 'a\\x00\.pn",
        ),
        (
            b"a.png 1\rb.png 2\r",
            r"^line 1 of list\.txt is not 'path label' \(its path has a carriage return; lines end in LF or CRLF\): ",
        ),
    ],
)
def test_bad_lists_are_refused_by_line(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        parse_list(content, "list.txt")


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (b"99999999999999999999", "its label is too large"),
        (b"{'label': -99999999999}", "its label is too large"),
        (b"{[]: 1}", "no label: the text that ends in } is not a dictionary"),
    ],
)
def test_odd_labels_are_refused_by_line_too(label: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=rf"^line 1 of list\.txt is not 'path label' \({re.escape(reason)}\): "):
        parse_list(b"a.png " + label, "list.txt")


def test_long_lines_are_cut_in_messages() -> None:
    with pytest.raises(ImageError, match=r"'path label' \(no label\): 'x{80}'$"):
        parse_list(b"x" * 500, "list.txt")


@pytest.mark.parametrize(
    ("label", "value"), [(b"0", 0), (b"-1", -1), (b"-0", 0), (b"+3", 3), (b"999", 999), (b"1_0", 10), (b"0x1f", 31)]
)
def test_integers_are_pythons(label: bytes, value: int) -> None:
    assert parse_list(b"a.png " + label, "list.txt")[1].tolist() == [value]


@pytest.mark.parametrize("label", ["01", "\u0661", "1.0", "--1", "-", "1,2", "[1]", "9" * 5000])
def test_what_is_no_integer_is_refused(label: str) -> None:
    with pytest.raises(
        ImageError, match=r"^line 1 of list\.txt is not 'path label' \(label '.{1,40}' is not an integer\): "
    ):
        parse_list(f"a.png {label}".encode(), "list.txt")


@pytest.mark.parametrize(
    ("line", "name", "label"),
    [
        ("my picture.png 3", "my picture.png", 3),
        ("my picture.png\t3", "my picture.png", 3),
        ("my\tpicture.png \t 3\t ", "my\tpicture.png", 3),
        ("a.png 1 2", "a.png 1", 2),
        ("a  b.png  -1", "a  b.png", -1),
        ("no\u00a0break.png 3", "no\u00a0break.png", 3),
        ("\u3000wide.png 3", "\u3000wide.png", 3),  # white space, but no blank: part of the path
        ("my picture.png {'label': 3, 'x': 1}", "my picture.png", 3),
        ("my picture.png\t{'x': {'y z': 1}, 'label': 3}", "my picture.png", 3),
        ("my {x} y.png {'label': 3}", "my {x} y.png", 3),
        ("{x} 3", "{x}", 3),
    ],
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_last_blank_parts_path_and_label(line: str, name: str, label: int, end: str, mark: str) -> None:
    names, labels = parse_list(f"{mark}{line}{end}".encode(), "list.txt")
    assert (names, labels.tolist()) == ([name], [label])


def test_a_list_of_another_editor_is_found_and_known_by_its_own_bytes(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, tabs and paths with blanks; the digest is that of the file as it is."""
    touch(tmp_path, "images_classic/my pictures/a 1.png", "images_classic/b.png")
    path = tmp_path / "benchmark_imglist/cifar10/val_cifar10.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content := b"\xef\xbb\xbfmy pictures/a 1.png\t3\r\nb.png 1\r\n\r\n")
    listed = read_list(CIFAR10, CIFAR10.split("id/val"), tmp_path)
    assert listed is not None
    assert (listed.names, listed.labels.tolist()) == (["my pictures/a 1.png", "b.png"], [3, 1])
    assert listed.missing(range(2)) == []
    assert listed.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["a..b/c.png", "..a/b.png", "a/...png"])
def test_dots_in_names_do_not_leave_the_folder(name: str) -> None:
    assert parse_list(f"{name} 1".encode(), "list.txt")[0] == [name]


def test_a_list_tells_what_is_missing_and_where(tmp_path: Path) -> None:
    touch(tmp_path, "images_classic/a.png", "images_classic/x/c.png")
    (tmp_path / "images_classic/folder.png").mkdir()
    path = tmp_path / "benchmark_imglist/cifar10/val_cifar10.txt"
    path.parent.mkdir(parents=True)
    path.write_text("a.png 3\nb.png 1\nx/c.png 2\nfolder.png 0\n")
    listed = read_list(CIFAR10, CIFAR10.split("id/val"), tmp_path)
    assert listed is not None
    assert listed.missing(range(4)) == [1, 3]
    assert listed.missing([0, 2]) == []
    assert listed.where(1) == f"{tmp_path}/images_classic/b.png (line 2 of {path})"
    assert listed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_list(CIFAR10, CIFAR10.split("id/test"), tmp_path) is None


def test_a_list_in_a_folder_is_itself_and_not_its_fallback(tmp_path: Path) -> None:
    benchmark = own(Split(name="id/val", source="lists/val.txt", folder="images"))
    touch(tmp_path, "lists/x")
    (tmp_path / "lists/val.txt").write_text("a.png 1\n")
    listed = read_list(benchmark, benchmark.split("id/val"), tmp_path)
    assert listed is not None
    assert (listed.source, listed.file(0)) == ("lists/val.txt", tmp_path / "images/a.png")


def test_labels_that_all_mark_ood_images_need_another_remedy() -> None:
    said = describe_wrong_labels(np.full(5, -1), 3, "image {}".format)
    assert said == (
        "5 of 5 labels are outside 0 … 2; the first is -1, of image 0; -1 marks OOD images, an ID image has its class;"
        " without labels, write the classes that the network predicts (docs/own-benchmark.md, Labels)"
    )
    assert describe_wrong_labels(np.array([-1, 2]), 3, "image {}".format).endswith(
        "; correct the labels, or the benchmark's number of classes"
    )
    assert describe_wrong_labels(np.array([0, 2]), 3, "image {}".format) == ""


# --- class folders ----------------------------------------------------------------------------------------------------


def own(*splits: Split, class_names: tuple[str, ...] = ()) -> Benchmark:
    transform = Transform(resize=8, crop=8, mean=(0.5,), std=(0.5,))
    train = () if any(s.name == "id/train" for s in splits) else (Split(name="id/train", source="train.txt"),)
    return Benchmark(name="own", classes=2, transform=transform, splits=(*train, *splits), class_names=class_names)


def folders(name: str, source: str) -> Split:
    return Split(name=name, source=source, kind="folders")


def test_class_folders_are_a_sorted_list(tmp_path: Path) -> None:
    touch(tmp_path, "train/dog/2.png", "train/dog/10.JPG", "train/cat/sub/b.webp", "train/cat/a.png")
    touch(tmp_path, "train/dog/notes.txt", "train/.hidden/x.png", "train/cat/.x.png", "train/readme.png")
    benchmark = own(folders("id/train", "train"))
    listed = read_list(benchmark, benchmark.split("id/train"), tmp_path)
    assert listed is not None
    assert listed.names == ["cat/a.png", "cat/sub/b.webp", "dog/10.JPG", "dog/2.png"]
    assert listed.labels.tolist() == [0, 0, 1, 1]
    text = "cat/a.png 0\ncat/sub/b.webp 0\ndog/10.JPG 1\ndog/2.png 1\n"
    assert listed.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (listed.where(3), listed.missing(range(4))) == (f"{tmp_path}/train/dog/2.png", [])


def test_a_set_that_lacks_a_class_keeps_the_others_labels(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/a.png", "train/dog/b.png", "shifted/dog/c.png")
    benchmark = own(folders("id/train", "train"), folders("csid/shifted", "shifted"))
    listed = read_list(benchmark, benchmark.split("csid/shifted"), tmp_path)
    assert listed is not None
    assert listed.labels.tolist() == [1]


def test_class_names_say_the_labels(tmp_path: Path) -> None:
    touch(tmp_path, "val/cat/a.png", "val/dog/b.png")
    benchmark = own(folders("id/val", "val"), class_names=("dog", "cat"))
    listed = read_list(benchmark, benchmark.split("id/val"), tmp_path)
    assert listed is not None
    assert dict(zip(listed.names, listed.labels.tolist(), strict=True)) == {"cat/a.png": 1, "dog/b.png": 0}


def test_ood_folders_need_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "far/z.png", "far/deep/er/a.png")
    benchmark = own(folders("ood/far/x", "far"))
    listed = read_list(benchmark, benchmark.split("ood/far/x"), tmp_path)
    assert listed is not None
    assert (listed.names, listed.labels.tolist()) == (["deep/er/a.png", "z.png"], [-1, -1])
    assert listed.labels.dtype == np.int64


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/emu/c.png", "val/bird/a.png", "empty/notes.txt")
    benchmark = own(folders("id/train", "train"), folders("id/val", "val"), folders("ood/val", "empty"))
    with pytest.raises(
        InputError, match=r"train has 3 class folders \(cat, dog, emu\), benchmark own has 2 classes; c"
    ):
        read_list(benchmark, benchmark.split("id/train"), tmp_path)
    touch(tmp_path, "flat/b.png", "flat/a.png")
    benchmark_of_flat = own(folders("id/test", "flat"))
    with pytest.raises(
        InputError,
        match=r"^id/test: .*flat has no class folders, its 2 images lie directly in it, so they have no labels; in the"
        r" benchmark's file write list = \"FILE\" in place of folders, a list of lines `path label`, such as"
        r" `a\.png 0` \(docs/own-benchmark\.md, Labels\)$",
    ):
        read_list(benchmark_of_flat, benchmark_of_flat.split("id/test"), tmp_path)
    with pytest.raises(InputError, match=r"val has a class folder 'bird', which is none of cat, dog, emu$"):
        read_list(benchmark, benchmark.split("id/val"), tmp_path)
    with pytest.raises(ImageError, match=r"empty holds no images \(\.bmp, \.jpeg, "):
        read_list(benchmark, benchmark.split("ood/val"), tmp_path)
    assert read_list(benchmark, own(folders("ood/val", "nowhere")).split("ood/val"), tmp_path) is None
