"""Downloads against a server on this machine: whole, resumed, broken, unsafe, and what is left alone."""

from __future__ import annotations

import io
import shutil
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nacpipe.benchmarks import download as downloading
from nacpipe.benchmarks.archives import find_archives
from nacpipe.benchmarks.download import choose_archives, download, download_archives, plan_download, read_lists
from nacpipe.benchmarks.standard import BENCHMARKS, find_benchmark
from nacpipe.benchmarks.status import read_status
from nacpipe.benchmarks.unpack import unpack
from nacpipe.errors import DownloadError, InputError, MissingExtra

CIFAR10 = find_benchmark("cifar10")


def pack(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def get(root: Path, mirror: Any, *only: str, checkpoints: bool = False) -> list[str]:
    archives = choose_archives(CIFAR10, only, checkpoints, root)
    return download_archives(CIFAR10, archives, root, root / "results", mirror=mirror.url)


def states(root: Path, mirror: str | None = None) -> dict[str, str]:
    lists = read_lists(CIFAR10, root)
    plans = [plan_download(CIFAR10, a, lists, root, root / "results", mirror) for a in find_archives("cifar10")]
    return {plan.archive.name: plan.state for plan in plans}


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


# --- whole ------------------------------------------------------------------------------------------------------------


def test_everything_is_fetched_unpacked_and_complete(tmp_path: Path, mirror: Any) -> None:
    assert set(states(tmp_path).values()) == {"to fetch"}
    assert get(tmp_path, mirror, checkpoints=True) == []
    assert {s.state for s in read_status(CIFAR10, tmp_path) if s.split != "id/subtrain"} == {"complete"}
    assert (tmp_path / "images_classic/cifar10/test/cat/2.png").read_bytes() == b"cifar10 test/cat/2.png" * 50
    assert (tmp_path / "images_classic/tin/val/2.JPEG").is_file()  # the folder that the archive holds once more is gone
    run = tmp_path / "results/cifar10_resnet18_32x32_base_e100_lr0.1_default"
    assert sorted(path.name for path in run.iterdir()) == ["s0", "s1", "s2"]
    left = {name for name in files(tmp_path) if ".download" in name or ".unpacking" in name}
    assert all(name.endswith(".done") for name in left)
    assert len(mirror.asked) == len(left) == 10
    assert states(tmp_path) == {
        **dict.fromkeys((a.name for a in find_archives("cifar10")), "complete"),
        "benchmark_imglist_authors": "to fetch",
        "cifar10_res18_v1.5": "unpacked before",
    }
    assert get(tmp_path, mirror, checkpoints=True) == []
    assert len(mirror.asked) == 10  # nothing is asked for twice


def test_only_some_archives(tmp_path: Path, mirror: Any) -> None:
    assert get(tmp_path, mirror, "benchmark_imglist", "mnist") == []
    assert [name for name, _ in mirror.asked] == ["benchmark_imglist.zip", "mnist.zip"]
    state = {s.split: s.state for s in read_status(CIFAR10, tmp_path)}
    assert (state["ood/far/mnist"], state["ood/far/svhn"], state["id/subtrain"]) == ("complete", "missing", "no list")
    message = (
        r"^archive 'minst' is not part of cifar10; it has benchmark_imglist, benchmark_imglist_authors, cifar10, .*,"
        r" cifar10_res18_v1\.5$"
    )
    with pytest.raises(InputError, match=message):
        choose_archives(CIFAR10, ("minst",))


def test_checkpoints_are_fetched_when_asked_for() -> None:
    assert "cifar10_res18_v1.5" not in {a.name for a in choose_archives(CIFAR10)}
    assert choose_archives(CIFAR10, checkpoints=True)[-1].name == "cifar10_res18_v1.5"
    assert [a.name for a in choose_archives(CIFAR10, ("cifar10_res18_v1.5",))] == ["cifar10_res18_v1.5"]


# --- the authors' lists -----------------------------------------------------------------------------------------------

IMAGENET = find_benchmark("imagenet")


def chosen(root: Path | None = None) -> set[str]:
    return {archive.name for archive in choose_archives(IMAGENET, root=root)}


def test_lists_are_openoods_unless_the_authors_are_there(tmp_path: Path, mirror: Any) -> None:
    """Then images that only OpenOOD's lists name are left out, and their list is not missing."""
    assert chosen() == chosen(tmp_path) >= {"benchmark_imglist", "imagenet_es", "imagenet_r"}
    assert "benchmark_imglist_authors" not in chosen()
    lists = {f"benchmark_imglist/imagenet/{s.fallback or s.source}": b"a/b.png 1\n" for s in IMAGENET.splits}
    del lists["benchmark_imglist/imagenet/test_imagenet_es.txt"]
    mirror.files["benchmark_imglist_authors.zip"] = pack(lists)
    named = choose_archives(IMAGENET, ("benchmark_imglist_authors",), root=tmp_path)
    assert download_archives(IMAGENET, named, tmp_path, tmp_path / "results", mirror=mirror.url) == []
    assert chosen(tmp_path) == chosen() - {"benchmark_imglist", "imagenet_es"} | {"benchmark_imglist_authors"}
    plan = plan_download(IMAGENET, named[0], read_lists(IMAGENET, tmp_path), tmp_path, tmp_path / "results")
    assert plan.state == "unpacked before"
    with pytest.raises(
        InputError, match=r"^benchmark_imglist and benchmark_imglist_authors are unpacked into the same "
    ):
        choose_archives(IMAGENET, ("benchmark_imglist", "benchmark_imglist_authors"))


def test_the_lists_of_two_archives_are_never_mixed(tmp_path: Path, mirror: Any) -> None:
    root = tmp_path / "my data"
    content = {f"benchmark_imglist/cifar10/{s.fallback or s.source}": b"a/b.png 1\n" for s in CIFAR10.splits}
    mirror.files["benchmark_imglist_authors.zip"] = pack(content)
    get(root, mirror, "benchmark_imglist")
    folder, before = root / "benchmark_imglist", files(root / "benchmark_imglist")
    with pytest.raises(DownloadError) as raised:
        get(root, mirror, "benchmark_imglist_authors")
    assert str(raised.value) == (
        f"{folder} holds the lists of benchmark_imglist; to use those of benchmark_imglist_authors:"
        f" mv '{folder}' '{folder}.before' && rm '{root}/.download/benchmark_imglist.done'"
    )
    assert files(folder) == before
    (root / ".download/benchmark_imglist.done").unlink()  # lists of somebody
    with pytest.raises(
        DownloadError, match=r"benchmark_imglist holds other lists; to use those of benchmark_imglist_auth"
    ):
        get(root, mirror, "benchmark_imglist_authors")
    folder.rename(f"{folder}.before")
    get(root, mirror, "benchmark_imglist_authors")
    assert (folder / "cifar10/test_mnist.txt").read_bytes() == b"a/b.png 1\n"
    (folder / "cifar10/test_mnist.txt").unlink()
    with pytest.raises(
        DownloadError, match=r"holds the lists of benchmark_imglist_authors; to use those of benchmark_"
    ):
        get(root, mirror, "benchmark_imglist")
    assert not (folder / "cifar10/test_mnist.txt").exists()


# --- resumed ----------------------------------------------------------------------------------------------------------


def test_a_broken_connection_goes_on_where_it_stopped(tmp_path: Path, mirror: Any) -> None:
    mirror.files["mnist.zip"] = pack({"test/1.png": bytes(range(256)) * 8192})  # 2 MiB
    mirror.cut["mnist.zip"] = 1_500_000
    message = (
        r"^http://\S+/mnist\.zip cannot be downloaded: .*; the partial file is kept in .*/\.download, the same command"
        " goes on$"
    )
    with pytest.raises(DownloadError, match=message):
        get(tmp_path, mirror, "benchmark_imglist", "mnist")
    assert not (tmp_path / "images_classic").exists()
    assert states(tmp_path)["mnist"] == "to fetch"
    assert get(tmp_path, mirror, "benchmark_imglist", "mnist") == []
    begun = int(mirror.asked[-1][1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < begun <= 1_500_000
    assert (tmp_path / "images_classic/mnist/test/1.png").read_bytes() == bytes(range(256)) * 8192


def test_killed_while_unpacking_nothing_looks_whole(
    tmp_path: Path, mirror: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(tmp_path, mirror, "benchmark_imglist")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    archive = next(a for a in find_archives("cifar10") if a.name == "cifar10")
    lists = read_lists(CIFAR10, tmp_path)
    plan = plan_download(CIFAR10, archive, lists, tmp_path, tmp_path / "results", mirror.url)
    with pytest.raises(KeyboardInterrupt):
        download(plan, lists, progress=stop)
    assert not (tmp_path / "images_classic/cifar10").exists()
    assert states(tmp_path)["cifar10"] == "to unpack"
    assert {s.state for s in read_status(CIFAR10, tmp_path) if s.split.startswith("id/")} == {"missing", "no list"}
    asked = len(mirror.asked)
    assert get(tmp_path, mirror, "cifar10") == []
    assert len(mirror.asked) == asked  # the archive was there
    assert not list(tmp_path.rglob(".*.unpacking"))

    # killed between two files that go into a folder that is there already
    shutil.rmtree(tmp_path / "images_classic/cifar10/test")
    (tmp_path / ".download/cifar10.done").unlink()
    moved: list[Path] = []
    rename = downloading.os.rename

    def rename_one(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        rename(source, target)

    shutil.rmtree(tmp_path / "images_classic/cifar10/train/cat")
    with monkeypatch.context() as patch:
        patch.setattr(downloading.os, "rename", rename_one)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path, mirror, "cifar10")
    assert {s.state for s in read_status(CIFAR10, tmp_path) if s.split.startswith("id/")} != {"complete"}
    assert states(tmp_path)["cifar10"] == "to unpack"
    assert get(tmp_path, mirror, "cifar10") == []


@pytest.mark.parametrize("beside", ["__MACOSX/tin/._val", ".DS_Store", "._tin"])
def test_what_a_mac_adds_beside_the_one_folder_does_not_hide_it(tmp_path: Path, mirror: Any, beside: str) -> None:
    files = {"tin/val/1.JPEG": b"1", "tin/val/2.JPEG": b"2", beside: b"0"}
    mirror.files["tin.zip"] = pack(files)
    assert get(tmp_path, mirror, "benchmark_imglist", "tin") == []
    assert (tmp_path / "images_classic/tin/val/1.JPEG").read_bytes() == b"1"


# --- what is there already --------------------------------------------------------------------------------------------


def test_files_that_are_there_are_kept(tmp_path: Path, mirror: Any) -> None:
    """As ImageNet's training images, which OpenOOD does not share."""
    mine = tmp_path / "images_classic/cifar10/train/cat/1.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert get(tmp_path, mirror, "benchmark_imglist", "cifar10") == []
    assert mine.read_text() == "mine"
    assert (tmp_path / "images_classic/cifar10/train/dog/1.png").is_file()


def test_what_an_archive_lacks_is_said_and_not_fetched_for_ever(tmp_path: Path, mirror: Any) -> None:
    mirror.files["cifar10.zip"] = pack({"test/cat/1.png": b"1", "test/cat/2.png": b"2"})
    expected = (
        f"cifar10: 2 of 4 listed files are not there, the first {tmp_path}/images_classic/cifar10/train/cat/1.png"
        f" (line 1 of {tmp_path}/benchmark_imglist/cifar10/train_cifar10.txt)"
    )
    assert get(tmp_path, mirror, "benchmark_imglist", "cifar10") == [expected]
    asked = len(mirror.asked)
    assert get(tmp_path, mirror, "benchmark_imglist", "cifar10") == [expected]
    assert (len(mirror.asked), states(tmp_path)["cifar10"]) == (asked, "unpacked before")
    (tmp_path / ".download/cifar10.done").unlink()
    assert states(tmp_path)["cifar10"] == "to fetch"


def test_without_lists_nothing_is_called_checked(tmp_path: Path, mirror: Any) -> None:
    problem = "mnist: no list names a file of it, so it is not checked; benchmark_imglist has the lists"
    assert get(tmp_path, mirror, "mnist") == [problem]
    assert get(tmp_path, mirror, "benchmark_imglist", "mnist") == []
    assert states(tmp_path)["mnist"] == "complete"


def test_missing_lists_are_said(tmp_path: Path, mirror: Any) -> None:
    mirror.files["benchmark_imglist.zip"] = pack({"benchmark_imglist/cifar10/val_cifar10.txt": b"cifar10/a.png 1\n"})
    (problem,) = get(tmp_path, mirror, "benchmark_imglist")
    assert problem == (
        "benchmark_imglist: 10 of 11 listed files are not there, the first"
        " benchmark_imglist/cifar10/main_train_cifar10.txt"
    )


# --- broken and unsafe ------------------------------------------------------------------------------------------------


def corrupt(content: bytes) -> bytes:
    at = content.index(b"picture")
    return content[:at] + b"pictura" + content[at + 7 :]


PICTURES = {"test/1.png": b"picture 1", "test/2.png": b"picture 2"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Quota exceeded</html>", r"mnist\.zip is not a complete zip archive: File is not a zip file"),
        (b"", r"mnist\.zip is not a complete zip archive: File is not a zip file"),
        (pack(PICTURES)[:-40], r"mnist\.zip is not a complete zip archive: "),
        (corrupt(pack(PICTURES)), r"mnist\.zip is not a complete zip archive: Bad CRC-32 for file 'test/1\.png'"),
        (
            pack({"test/1.png": b"", "../../evil.png": b""}),
            r"is not safe to unpack: '\.\./\.\./evil\.png' leaves its f",
        ),
        (pack({"/evil.png": b""}), r"is not safe to unpack: '/evil\.png' leaves its folder or is a link"),
        (pack({"a/../../evil.png": b""}), r"is not safe to unpack: 'a/\.\./\.\./evil\.png' leaves its folder"),
        (pack({"..\\evil.png": b""}), r"is not safe to unpack: '\.\.\\\\evil\.png' leaves its folder"),
    ],
)
def test_broken_and_unsafe_archives_are_set_aside(tmp_path: Path, mirror: Any, content: bytes, message: str) -> None:
    good = mirror.files["mnist.zip"]
    mirror.files["mnist.zip"] = content
    before = files(tmp_path.parent)
    with pytest.raises(DownloadError, match=message) as caught:
        get(tmp_path, mirror, "benchmark_imglist", "mnist")
    assert "the same command fetches it again" in caught.value.one_line()
    assert {f for f in files(tmp_path.parent) - before if not f.startswith(f"{tmp_path.name}/benchmark_imglist")} == {
        f"{tmp_path.name}/.download/mnist.broken",
        f"{tmp_path.name}/.download/benchmark_imglist.done",
    }
    mirror.files["mnist.zip"] = good
    assert get(tmp_path, mirror, "mnist") == []


def test_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
    with pytest.raises(DownloadError, match=r"a\.zip is not safe to unpack: 'link' leaves its folder or is a link$"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_on_the_disk_is_kept_for_later(
    tmp_path: Path, mirror: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(tmp_path, mirror, "benchmark_imglist")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr("nacpipe.benchmarks.unpack.shutil.disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(DownloadError, match=r"mnist\.zip needs 0 MiB unpacked, .*images_classic has 0 MiB$"):
            get(tmp_path, mirror, "mnist")
    assert states(tmp_path)["mnist"] == "to unpack"
    assert get(tmp_path, mirror, "mnist") == []


def test_what_cannot_be_reached_is_said(tmp_path: Path, mirror: Any) -> None:
    del mirror.files["mnist.zip"]
    with pytest.raises(DownloadError, match=r"/mnist\.zip cannot be downloaded: 404 Client Error"):
        get(tmp_path, mirror, "mnist")


def test_without_gdown_the_way_to_it_is_said(tmp_path: Path, mirror: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(MissingExtra, match=r"^downloads need gdown; install it with: pip install 'nacpipe\[data\]'$"):
        get(tmp_path, mirror, "mnist")


# --- the table --------------------------------------------------------------------------------------------------------


def test_archives_are_openoods() -> None:
    """Typed a second time by hand."""
    found = {a.name: a for a in find_archives("cifar10")}
    assert list(found) == [
        *("benchmark_imglist", "benchmark_imglist_authors"),
        *("cifar10", "cifar100", "tin", "mnist", "svhn", "texture", "places365", "cifar10c"),
        "cifar10_res18_v1.5",
    ]
    assert found["benchmark_imglist"].url() == "https://drive.google.com/uc?id=1lI1j0_fDDvjIt9JlWAw09X8ks-yrR_H1"
    assert found["svhn"].url("http://here/x/") == "http://here/x/svhn.zip"
    assert found["places365"].folder == "images_classic/places365"
    large = {a.name: a for a in find_archives("imagenet")}
    assert list(large) == [
        *("benchmark_imglist", "benchmark_imglist_authors"),
        *("imagenet_1k", "ssb_hard", "ninco", "inaturalist", "openimage_o"),
        *("imagenet_v2", "imagenet_c", "imagenet_r", "imagenet_es", "texture", "imagenet_res50_v1.5"),
    ]
    assert large["imagenet_es"].folder == "images_largescale/imagenet_es"
    assert "imagenet_es" not in {a.name for a in find_archives("imagenet200")}
    assert (large["ninco"].folder, large["texture"].folder) == ("images_largescale/ninco", "images_classic/texture")
    assert {a.name: a.drive for name in BENCHMARKS if name != "digits" for a in find_archives(name)} == {
        "benchmark_imglist": "1lI1j0_fDDvjIt9JlWAw09X8ks-yrR_H1",
        "benchmark_imglist_authors": "1XKzBdWCqg3vPoj-D32YixJyJJ0hL63gP",
        "cifar10": "1Co32RiiWe16lTaiOU6JMMnyUYS41IlO1",
        "cifar100": "1PGKheHUsf29leJPPGuXqzLBMwl8qMF8_",
        "tin": "1PZ-ixyx52U989IKsMA2OT-24fToTrelC",
        "mnist": "1CCHAGWqA1KJTFFswuF9cbhmB-j98Y1Sb",
        "svhn": "1DQfc11HOtB1nEwqS4pWUFp8vtQ3DczvI",
        "texture": "1OSz1m3hHfVWbRdmMwKbUzoU8Hg9UKcam",
        "places365": "1Ec-LRSTf6u5vEctKX9vRp9OA6tqnJ0Ay",
        "cifar10c": "170DU_ficWWmbh6O2wqELxK9jxRiGhlJH",
        "imagenet_1k": "1i1ipLDFARR-JZ9argXd2-0a6DXwVhXEj",
        "ssb_hard": "1PzkA-WGG8Z18h0ooL_pDdz9cO-DCIouE",
        "ninco": "1Z82cmvIB0eghTehxOGP5VTdLt7OD3nk6",
        "inaturalist": "1zfLfMvoUD0CUlKNnkk7LgxZZBnTBipdj",
        "openimage_o": "1VUFXnB_z70uHfdgJG2E_pjYOcEgqM7tE",
        "imagenet_v2": "1akg2IiE22HcbvTBpwXQoD7tgfPCdkoho",
        "imagenet_r": "1EzjMN2gq-bVV7lg-MEAdeuBuz-7jbGYU",
        "imagenet_es": "1ATz11vKmPqyzfEaEDRaPTF9TXiC244sw",
        "imagenet_c": "1JeXL9YH4BO8gCJ631c5BHbaSsl-lekHt",
        "cifar10_res18_v1.5": "1byGeYxM_PlLjT72wZsMQvP6popJeWBgt",
        "cifar100_res18_v1.5": "1s-1oNrRtmA0pGefxXJOUVRYpaoAML0C-",
        "imagenet200_res18_v1.5": "1ddVmwc8zmzSjdLUO84EuV4Gz1c7vhIAs",
        "imagenet_res50_v1.5": "15PdDMNRfnJ7f2oxW6lI-Ge4QJJH3Z0Fy",
    }
    with pytest.raises(InputError, match=r"^OpenOOD has no archives for benchmark digits; it has them for cifar10, "):
        find_archives("digits")


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "digits"])
def test_every_set_has_its_archive(name: str) -> None:
    """The archives' folders are those that the sets' images are in."""
    archives = {a.folder.split("/")[0] for a in find_archives(name)}
    assert {split.folder for split in BENCHMARKS[name].splits} < archives
