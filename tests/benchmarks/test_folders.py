"""Folders of images: links are followed once each, hidden names are skipped, what cannot be followed is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nacpipe.benchmarks.folders import is_hidden, list_folders, walk_images
from nacpipe.benchmarks.lists import ImageList, read_list
from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.errors import ImageError, InputError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def read(root: Path, split: str, source: str = "set") -> ImageList:
    transform = Transform(resize=8, crop=8, mean=(0.5,), std=(0.5,))
    splits = (Split(name="id/train", source="train.txt"), Split(name=split, source=source, kind="folders"))
    benchmark = Benchmark(name="own", classes=2, transform=transform, splits=splits, class_names=("cat", "dog"))
    found = read_list(benchmark, splits[1], root)
    assert found is not None
    return found


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_in_class_folders(tmp_path: Path) -> None:
    """A link inside a class folder, a link below that, a class folder that is one, relative and absolute."""
    touch(tmp_path, *(f"set/cat/{i}.png" for i in range(3)), *(f"disk/more/{i}.png" for i in range(3)))
    touch(tmp_path, "disk/dogs/a.png", "other/deep/b.png")
    link(tmp_path / "set/cat/more", "../../disk/more")
    link(tmp_path / "disk/more/x/deep", tmp_path / "other/deep")
    link(tmp_path / "set/dog", tmp_path / "disk/dogs")
    found = read(tmp_path, "id/val")
    cats = ["cat/0.png", "cat/1.png", "cat/2.png", "cat/more/0.png", "cat/more/1.png", "cat/more/2.png"]
    assert found.names == [*cats, "cat/more/x/deep/b.png", "dog/a.png"]
    assert found.labels.tolist() == [0] * 7 + [1]
    assert found.missing(range(8)) == []


def test_links_to_folders_are_followed_in_ood_sets(tmp_path: Path) -> None:
    touch(tmp_path, "set/b/1.png", "elsewhere/2.png", "elsewhere/in/3.png")
    link(tmp_path / "set/a", "../elsewhere")
    assert read(tmp_path, "ood/far/x").names == ["a/2.png", "a/in/3.png", "b/1.png"]


def test_a_set_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/cat/2.png")
    link(tmp_path / "set", "elsewhere")
    assert read(tmp_path, "csid/x").names == ["cat/2.png"]


@pytest.mark.parametrize("target", ["z", "z/../z", "z/in/.."])
def test_a_folder_is_read_once_under_its_first_path(tmp_path: Path, target: str) -> None:
    touch(tmp_path, "set/z/1.png", "set/z/in/2.png", "set/b.png")
    link(tmp_path / "set/a", target)
    link(tmp_path / "set/y/again", "../z/in")
    assert walk_images(tmp_path / "set").names == ("a/1.png", "a/in/2.png", "b.png")
    assert set(walk_images(tmp_path / "set").folders.values()) == {
        str(tmp_path / "set" / name) for name in ("", "a", "a/in", "y")
    }


@pytest.mark.parametrize(
    ("path", "target", "again", "first"),
    [
        ("set/b/up", "..", "set/b/up", "set"),
        ("set/b/in/here", ".", "set/b/in/here", "set/b/in"),
        ("set/b/in/out", "../../..", "set/b/in/out/set", "set"),  # leads above the set, and from there into it
    ],
)
def test_a_link_that_leads_back_is_refused_by_name(
    tmp_path: Path, path: str, target: str, again: str, first: str
) -> None:
    touch(tmp_path, "set/b/in/1.png", "set/a.png")
    link(tmp_path / path, target)
    message = f"^a link leads to a folder that contains it: {tmp_path}/{again} is {tmp_path}/{first} again; remove"
    with pytest.raises(ImageError, match=message):
        walk_images(tmp_path / "set")
    with pytest.raises(ImageError, match=message):
        read(tmp_path, "ood/val")


def test_two_links_that_lead_to_each_other_are_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "set/a/1.png", "set/b/2.png")
    link(tmp_path / "set/a/to_b", "../b")
    link(tmp_path / "set/b/to_a", "../a")
    with pytest.raises(ImageError, match=rf"{tmp_path}/set/a/to_b/to_a is {tmp_path}/set/a again; remove the link$"):
        walk_images(tmp_path / "set")


@pytest.mark.parametrize("target", ["nowhere", "gone"])  # of its own name: a link to itself
def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path: Path, target: str) -> None:
    touch(tmp_path, "set/cat/1.png", "set/dog/1.png")
    link(tmp_path / "set/cat/gone", target)
    message = rf"^link {tmp_path}/set/cat/gone is broken; correct it or remove it$"
    with pytest.raises(ImageError, match=message):
        read(tmp_path, "id/test")
    with pytest.raises(ImageError, match=message):
        list_folders(tmp_path / "set/cat")


@pytest.mark.parametrize("target", ["nowhere", "gone.png"])
def test_a_link_to_a_missing_image_is_an_image_that_is_missing(tmp_path: Path, target: str) -> None:
    touch(tmp_path, "set/1.png")
    link(tmp_path / "set/gone.png", target)
    found = read(tmp_path, "ood/val")
    assert (found.names, found.missing(range(2))) == (["1.png", "gone.png"], [1])


@pytest.mark.parametrize(("path", "target"), [("dog", "cat"), ("cat/more", "../dog"), ("dog/in/more", "../../cat")])
def test_a_folder_in_two_classes_is_refused_by_name(tmp_path: Path, path: str, target: str) -> None:
    touch(tmp_path, "set/cat/1.png")
    if path != "dog":
        touch(tmp_path, "set/dog/2.png")
    link(tmp_path / "set" / path, target)
    with pytest.raises(InputError, match=rf"^{tmp_path}/set/\S+ and {tmp_path}/set/\S+ are one folder, in two classes"):
        read(tmp_path, "id/val")


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "set/cat/1.png", "set/cat/locked/2.png")
    scan = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ImageError, match=rf"^folder {tmp_path}/set/cat/locked cannot be read: Permission denied$"):
        read(tmp_path, "id/val")


# --- hidden names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("._a.png", True), (".DS_Store", True), ("__MACOSX", True), ("a.png", False), ("__macosx__", False), ("_", False)],
)
def test_which_names_are_hidden(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden


def test_hidden_files_and_folders_are_skipped_at_every_depth(tmp_path: Path) -> None:
    touch(tmp_path, "set/cat/a.png", "set/cat/._a.png", "set/cat/.trash/b.png", "set/cat/in/.c.png", "set/cat/in/c.png")
    touch(tmp_path, "set/.dog/a.png", "set/__MACOSX/cat/._a.png", "set/cat/in/__MACOSX/x.png", "set/cat/.ipynb/x.png")
    link(tmp_path / "set/cat/.gone", "nowhere")
    assert read(tmp_path, "id/val").names == ["cat/a.png", "cat/in/c.png"]
    assert read(tmp_path, "ood/val").names == ["cat/a.png", "cat/in/c.png"]
    assert list_folders(tmp_path / "set") == ["cat"]


def test_order_is_alphabetical(tmp_path: Path) -> None:
    touch(tmp_path, "set/b/1.png", "set/a-1.png", "set/a/2.png", "set/B.png", "set/a/10.png")
    assert walk_images(tmp_path / "set").names == ("B.png", "a-1.png", "a/10.png", "a/2.png", "b/1.png")
