"""A command reads each array of a split once, and opens a split and its arrays once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView, reader, split
from nacpipe.cache.validation import open_member
from nacpipe.cli import main
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import Source
from nacpipe.scoring.params_file import write_params

ONCE = NacParams(  # each layer in one term
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5),
        "layer1": LayerParams(bins=9, saturation=3, alpha=1.0, source="activation"),
    }
)
TERMS = NacParams(  # avgpool in three
    layers={
        "avgpool:activation": LayerParams(bins=20, saturation=5, alpha=0.5, source="activation"),
        "avgpool:gradient": LayerParams(bins=20, saturation=5, alpha=0.5, source="gradient"),
        "avgpool:product": LayerParams(bins=20, saturation=5, alpha=0.5),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What was read and opened, by `SPLIT/ARRAY`, and opened, by `SPLIT`."""

    rows: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Count the rows that are read of each array, and how often Zarr opens a split or an array."""
    found = Reads()
    read, marks = SplitView.read, SplitView.marks

    def spy(self: SplitView, path: str, rows: slice = slice(None)) -> NDArray[Any]:
        found.rows[f"{self.name}/{path}"] += len(range(self.rows)[rows])
        return read(self, path, rows)

    def spy_marks(self: SplitView) -> NDArray[np.bool_]:
        found.rows[f"{self.name}/blocks"] += self.rows  # all of them
        return marks(self)

    def spy_open(parent: zarr.Group, path: str) -> Any:
        found.opened["/".join(filter(None, (parent.path, path)))] += 1
        return open_member(parent, path)

    monkeypatch.setattr(SplitView, "read", spy)
    monkeypatch.setattr(SplitView, "marks", spy_marks)
    for module in (reader, split):
        monkeypatch.setattr(module, "open_member", spy_open)
    return found


def check_once(reads: Reads, cache: Cache, arrays: set[str], *args: object) -> None:
    """Run a command: exactly these arrays are read, every row once, and whatever is opened is opened once."""
    rows = {path: cache.peek(path_split(cache, path)).rows for path in arrays}
    reads.rows.clear()
    reads.opened.clear()
    done = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="nacpipe")
    assert done.exit_code == 0, done.output
    assert dict(reads.rows) == rows
    assert {path: count for path, count in reads.opened.items() if count > 1} == {}
    assert reads.opened.keys() >= {path_split(cache, path) for path in arrays}


def path_split(cache: Cache, path: str) -> str:
    return next(name for name in cache if path.startswith(f"{name}/"))


def layers_of(split: str, *layers: str) -> set[str]:
    names, both = layers or ("avgpool", "layer1"), ("activation", "gradient")
    return {f"{split}/layers/{layer}/{what}" for layer in names for what in both}


def test_a_cache(small_cache: Cache, reads: Reads) -> None:
    for more in ((), ("--json",)):
        check_once(reads, small_cache, {f"{name}/blocks" for name in small_cache}, "inspect", small_cache.path, *more)


@pytest.mark.parametrize("params", [None, ONCE, TERMS])
@pytest.mark.parametrize("split", ["id/val", "id/train"])
def test_a_split(small_cache: Cache, reads: Reads, tmp_path: Path, split: str, params: NacParams | None) -> None:
    given: list[object] = []
    if params is not None:
        write_params(tmp_path / "p.json", params)
        given = ["--params", tmp_path / "p.json"]
    arrays = {f"{split}/blocks"} | layers_of(split) | layers_of("id/train")
    check_once(reads, small_cache, arrays, "inspect", small_cache.path, split, *given)


@pytest.mark.parametrize("more", [(), ("--alpha", "2"), ("--params", "p.json")])
@pytest.mark.parametrize("layer", ["avgpool", "avgpool:activation", "logits"])
@pytest.mark.parametrize("split", ["id/val", "id/train"])
def test_a_layer(
    small_cache: Cache,
    reads: Reads,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    split: str,
    layer: str,
    more: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    source: Source = "activation" if layer.endswith("activation") else "product"
    write_params("p.json", NacParams(layers={layer: LayerParams(bins=20, saturation=5, alpha=0.5, source=source)}))
    arrays = {f"{name}/logits" for name in (split, "id/train")}
    if layer != "logits":
        arrays = layers_of(split, "avgpool") | layers_of("id/train", "avgpool")
        if source == "activation" and split != "id/train":
            arrays.remove("id/train/layers/avgpool/gradient")
    check_once(reads, small_cache, arrays, "inspect", small_cache.path, split, layer, *more)


def test_a_report(make_cache: Callable[..., Cache], reads: Reads, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cache = make_cache(tmp_path / "c.zarr", rows={"csid/blurred": 25})
    write_params(tmp_path / "c.params.json", ONCE)
    scored = [name for name in cache if name not in ("id/train", "id/subtrain", "id/val", "ood/val")]
    arrays = {f"{name}/logits" for name in cache if name != "id/train"} | {f"{name}/label" for name in scored}
    arrays |= {f"{name}/layers/avgpool/{what}" for name in cache for what in ("activation", "gradient")}
    arrays |= {f"{name}/layers/layer1/activation" for name in cache}
    check_once(reads, cache, arrays, "report", cache.path, "--output", tmp_path / "page.html")
