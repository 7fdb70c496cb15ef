"""The places that walk folders of images agree: class folders, OOD folders, `nacpipe score`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nacpipe.benchmarks.lists import read_list
from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.cache import open_cache
from nacpipe.detector.shards import find_paths
from nacpipe.errors import ImageError
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = ["id/val", "csid/x", "ood/val", "ood/far/x", "score"]


def names(place: str, root: Path) -> list[str]:
    """The images of the folder root/set, as paths below it."""
    if place == "score":
        return [path.relative_to(root / "set").as_posix() for path in find_paths([root / "set"])]
    transform = Transform(resize=8, crop=8, mean=(0.5,), std=(0.5,))
    split = Split(name=place, source="set", kind="folders")
    splits = (Split(name="id/train", source="train.txt"), split)
    classes = ("cat", "dog")
    benchmark = Benchmark(name="own", classes=2, transform=transform, splits=splits, class_names=classes)
    found = read_list(benchmark, split, root)
    assert found is not None
    return found.names


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


@pytest.mark.parametrize("place", PLACES)
def test_links_are_followed_everywhere(tmp_path: Path, place: str) -> None:
    touch(tmp_path, "set/cat/1.png", "disk/2.png", "disk/in/3.png", "dogs/4.png")
    (tmp_path / "set/cat/more").symlink_to("../../disk")
    (tmp_path / "set/dog").symlink_to(tmp_path / "dogs")
    (tmp_path / "disk/again").symlink_to("in")
    assert names(place, tmp_path) == ["cat/1.png", "cat/more/2.png", "cat/more/again/3.png", "dog/4.png"]


@pytest.mark.parametrize("place", PLACES)
def test_a_cycle_is_refused_everywhere(tmp_path: Path, place: str) -> None:
    touch(tmp_path, "set/cat/in/1.png", "set/dog/1.png")
    (tmp_path / "set/cat/in/up").symlink_to("..")
    message = rf"^a link leads to a folder that contains it: {tmp_path}/set/cat/in/up is {tmp_path}/set/cat again; "
    with pytest.raises(ImageError, match=message):
        names(place, tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_a_link_to_nowhere_is_refused_everywhere(tmp_path: Path, place: str) -> None:
    touch(tmp_path, "set/cat/1.png", "set/dog/1.png")
    (tmp_path / "set/dog/more").symlink_to("nowhere")
    with pytest.raises(ImageError, match=rf"^link {tmp_path}/set/dog/more is broken; correct it or remove it$"):
        names(place, tmp_path)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "hidden",
    ["cat/._1.png", "cat/.x/2.png", ".cat/2.png", "__MACOSX/cat/2.png", "cat/__MACOSX/._1.png", "dog/in/.2.png"],
)
def test_hidden_names_are_skipped_everywhere(tmp_path: Path, place: str, hidden: str) -> None:
    touch(tmp_path, "set/cat/1.png", "set/dog/in/1.PNG", f"set/{hidden}")
    assert names(place, tmp_path) == ["cat/1.png", "dog/in/1.PNG"]


def test_score_takes_what_is_named_by_hand(tmp_path: Path) -> None:
    """A hidden file or folder that somebody names is meant; order is that of the arguments."""
    touch(tmp_path, "b/2.png", "b/1.png", ".a/1.png", ".a/.2.png", "._c.png")
    given = [tmp_path / "b", tmp_path / ".a", tmp_path / "._c.png"]
    assert find_paths(given) == [tmp_path / name for name in ("b/1.png", "b/2.png", ".a/1.png", "._c.png")]
    touch(tmp_path, "empty/._a.png")
    with pytest.raises(ImageError, match=rf"^there is no image in {tmp_path}/empty; known endings: \.bmp, "):
        find_paths([tmp_path / "empty"])


def test_a_cache_holds_the_images_behind_links(tmp_path: Path) -> None:
    """60 images, 30 of them behind links, through a whole extraction."""
    rng = np.random.RandomState(0)
    for number in range(60):
        folder = tmp_path / ("set" if number % 2 else "disk") / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    for number in range(3):
        (tmp_path / f"set/{number}/more").symlink_to(tmp_path / f"disk/{number}")
    (tmp_path / "b.toml").write_text(
        'name = "b"\nclasses = 3\ntransform = {resize = 8, crop = 8, mean = [0.5, 0.5, 0.5], std = [1, 1, 1]}\n'
        'id = {train = {folders = "set"}, val = {folders = "set"}, test = {folders = "set"}}\n'
        'ood = {val = {folders = "set"}}\n'
    )
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef net():\n"
        "    start = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(*start, nn.Linear(4, 3))\n"
    )
    request = ExtractRequest(
        benchmark=str(tmp_path / "b.toml"),
        model=f"{tmp_path}/net.py:net",
        layers=("2",),
        cache=tmp_path / "c.zarr",
        device="cpu",
        train_images=60,
    )
    extract(plan_extraction(request))
    cache = open_cache(tmp_path / "c.zarr")
    assert {name: cache[name].rows for name in cache} == dict.fromkeys(["id/train", "id/val", "id/test", "ood/val"], 60)
    assert np.bincount(cache["id/val"].label).tolist() == [20, 20, 20]
