"""The command that messages name as the way to make or finish a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nacpipe.cli.extract import _canonical, extract

USUAL: dict[str, Any] = {o.name: o.default for o in extract.params if o.name and isinstance(o.default, int | str)}
USUAL |= {"allow_truncated": False, "channels_last": None, "layers": (), "splits": (), "redo": (), "poolings": ()}
ASKED = {"benchmark": "cifar10", "model": "resnet20", "checkpoint": Path("a b.th"), "cache": Path("c.zarr")}


def test_it_names_what_the_cache_is_made_from_and_not_this_times_splits() -> None:
    found = _canonical({**ASKED, **USUAL, "splits": ("id/val",), "redo": ("id/val",)})
    assert found == "nacpipe extract cifar10 --model resnet20 --checkpoint 'a b.th' --cache c.zarr"


def test_it_names_what_is_not_as_usual() -> None:
    more = {"train_images": 50, "layers": ("avgpool", "x.1"), "poolings": (("x.1", "none"),), "channels_last": False}
    found = _canonical({**ASKED, **more, "allow_truncated": True, "batch_size": 128})
    assert found.split(" c.zarr ")[1] == (
        "--train-images 50 --layers avgpool,x.1 --pooling x.1=none --contiguous --allow-truncated"
    )
