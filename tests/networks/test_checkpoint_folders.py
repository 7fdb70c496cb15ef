"""Folders of training runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nacpipe.errors import CheckpointError
from nacpipe.networks.checkpoint_folders import find_checkpoint, find_runs, holds_runs, name_run


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_runs_come_by_number_each_with_its_best(tmp_path: Path) -> None:
    touch(tmp_path, "s0/best.ckpt", "s0/last.ckpt", "s2/net.pth", "s2/log.txt", "s10/best.ckpt")
    touch(tmp_path, "summary/best.ckpt", "s1", "best.ckpt")  # no run folders
    assert find_runs(tmp_path) == {
        "s0": tmp_path / "s0/best.ckpt",
        "s2": tmp_path / "s2/net.pth",
        "s10": tmp_path / "s10/best.ckpt",
    }


def test_runs_that_do_not_say_which_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder without run folders s0, s1, …; name a file in it$"):
        find_runs(tmp_path)
    touch(tmp_path, "s0/best.ckpt", "s1/a.ckpt", "s1/b.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"/s1 has no best\.ckpt, and not one .*: a\.ckpt, b\.ckpt; leave one in it, or call one best\.ckpt$",
    ):
        find_runs(tmp_path)
    (tmp_path / "s1/a.ckpt").unlink()
    (tmp_path / "s1/b.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"/s1 has no best\.ckpt, and not one checkpoint but 0: none$"):
        find_runs(tmp_path)


@pytest.mark.parametrize(
    ("cache", "named"),
    [
        ("cache/cifar10-resnet18.zarr", "cache/cifar10-resnet18-s0.zarr"),
        ("mine", "mine-s0.zarr"),
        ("{run}/c.zarr", "s0/c.zarr"),
        ("c{x}.zarr", "c{x}-s0.zarr"),
    ],
)
def test_each_run_has_its_cache(cache: str, named: str) -> None:
    assert name_run(cache, "s0") == named


def test_what_a_mac_adds_is_no_checkpoint(tmp_path: Path) -> None:
    touch(tmp_path, "s0/net.pth", "s0/._net.pth", "s1/a.ckpt", "s1/.a.ckpt.pth")
    assert find_runs(tmp_path) == {"s0": tmp_path / "s0/net.pth", "s1": tmp_path / "s1/a.ckpt"}


@pytest.mark.parametrize("name", ["ckpt.pth", "best.ckpt", "only.safetensors", "s3/best.ckpt"])
def test_a_folder_of_one_checkpoint_is_that_checkpoint(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "log.txt", "._a.pth")
    assert find_checkpoint(tmp_path) == tmp_path / name
    if name == "ckpt.pth":
        touch(tmp_path, "optimizer.pth")
        assert find_checkpoint(tmp_path) == tmp_path / name
        assert not holds_runs(tmp_path)


def test_a_folder_of_none_or_many_is_refused(tmp_path: Path) -> None:
    message = r"^checkpoint .* is a folder without a checkpoint or run folders s0, s1, …; name a file$"
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path)
    touch(tmp_path, "a.pth", "b.pt")
    with pytest.raises(
        CheckpointError, match=r"but 2: a\.pth, b\.pt; name one of them: --checkpoint .*/a\.pth; of several tr"
    ):
        find_checkpoint(tmp_path)
    touch(tmp_path, "s0/best.ckpt", "s11/best.ckpt")
    with pytest.raises(CheckpointError, match=r"is a folder of 2 runs, s0, s11; name one of them: --checkpoint .*/s0$"):
        find_checkpoint(tmp_path)
