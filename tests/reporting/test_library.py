"""`nacpipe.inspect` and `nacpipe.report` return what the commands print and write."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import nacpipe
from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import CacheError, InputError, MissingExtra, ParamsError
from nacpipe.method.params import LayerParams, NacParams

PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=3),
        "layer1": LayerParams(bins=9, saturation=3, alpha=1),
    }
)


def printed(*args: str) -> Any:
    done = CliRunner().invoke(main, ["inspect", *args, "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def same(frame: pd.DataFrame, expected: list[dict[str, Any]]) -> None:
    pd.testing.assert_frame_equal(frame.reset_index(drop=True), pd.DataFrame(expected), check_dtype=False, rtol=1e-12)


@pytest.fixture
def params_file(tmp_path: Path) -> str:
    nacpipe.write_params(tmp_path / "p.json", PARAMS)
    return str(tmp_path / "p.json")


def test_a_cache_is_what_the_command_prints(small_cache: Cache) -> None:
    found, expected = nacpipe.inspect(small_cache), printed(small_cache.path)
    same(found.layers, expected["layers"])
    same(found.splits, expected["splits"])
    assert found.facts == {"path": small_cache.path, **expected["identity"], **expected["information"]}
    shown = nacpipe.inspect(Path(small_cache.path))._repr_html_()
    assert shown.count("<table") == 3
    assert "<td>avgpool</td>" in shown


def test_a_split_and_a_layer_are_what_the_command_prints(small_cache: Cache, params_file: str) -> None:
    split = nacpipe.inspect(small_cache, "id/val", params=PARAMS)
    same(split, printed(small_cache.path, "id/val", "--params", params_file)["states"])
    assert list(nacpipe.inspect(small_cache, "id/val")["alpha"].isna()) == [True, True]
    layer = nacpipe.inspect(small_cache, "id/val", "avgpool", params=params_file)
    expected = printed(small_cache.path, "id/val", "avgpool", "--params", params_file)
    same(layer.summary, [expected["layer"]])
    for name in ("values", "histograms", "bins"):
        same(getattr(layer, name), expected[name])
    assert "<td>activation</td>" in layer._repr_html_()
    tried = nacpipe.inspect(small_cache, "id/val", "avgpool:gradient", alpha=3.0)
    expected = printed(small_cache.path, "id/val", "avgpool:gradient", "--alpha", "3")
    same(tried.values, expected["values"])
    assert tried.bins is not None
    same(tried.bins, expected["bins"])


def test_a_plot_shows_the_histograms(small_cache: Cache) -> None:
    layer = nacpipe.inspect(small_cache, "id/val", "layer1")
    figure = layer.plot()
    assert [axes.get_xlabel() for axes in figure.axes] == ["activation", "gradient", "product"]
    bars = layer.histograms[layer.histograms["value"] == "gradient"]
    drawn = figure.axes[1].patches[0].get_data()
    np.testing.assert_allclose(drawn.edges[:-1], bars["from"])
    np.testing.assert_allclose(drawn.values * np.diff(drawn.edges), bars["count"] / bars["count"].sum())


def test_rows_and_comparisons(small_cache: Cache, make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    few = nacpipe.inspect(small_cache, "ood/val", rows=3, params=PARAMS)
    scores = nacpipe.score_splits(small_cache, PARAMS, ["ood/val"])["ood/val"]
    order = np.argsort(-scores, kind="stable")
    assert few["row"].tolist() == [*order[:3], *order[-3:]]
    np.testing.assert_array_equal(few["score"], scores[[*order[:3], *order[-3:]]])
    alone = nacpipe.inspect(small_cache, "ood/val", "layer1", rows=10_000, params=PARAMS)
    term = NacParams(layers={"layer1": PARAMS.layers["layer1"]})
    own = nacpipe.score_splits(small_cache, term, ["ood/val"])["ood/val"]
    np.testing.assert_array_equal(alone["score"], np.sort(own)[::-1])
    other = make_cache(tmp_path / "other.zarr", seed=1, identity={"weights": "0" * 64})
    compared = nacpipe.inspect(small_cache, "id/val", compare=other.path)
    same(compared, printed(small_cache.path, "id/val", "--compare", other.path)["layers"])
    assert nacpipe.inspect(small_cache, "id/val", "layer1", compare=other)["layer"].tolist() == ["layer1"]


def test_what_does_not_go_together_is_refused(small_cache: Cache, tmp_path: Path) -> None:
    inspect: Any = nacpipe.inspect
    for wrong, message in (
        ({"rows": 3}, "name a split for layer=, params=, alpha=, compare= and rows="),
        ({"split": "id/val", "alpha": 1.0}, "alpha= is a layer's: name the layer"),
        ({"split": "id/val", "rows": 0, "params": PARAMS}, "rows is 0; it must be at least 1"),
        ({"split": "id/val", "rows": 1, "compare": small_cache}, "give one of alpha=, compare= and rows="),
        ({"split": "id/val", "layer": "layer1", "alpha": 1.0, "params": PARAMS}, "give one of alpha="),
        ({"split": "id/nosuch"}, "id/nosuch"),
    ):
        with pytest.raises(InputError, match=message):
            inspect(small_cache, **wrong)
    with pytest.raises(ParamsError, match="there are no parameters for layer 'layer1'; they are for avgpool"):
        one = NacParams(layers={"avgpool": PARAMS.layers["avgpool"]})
        inspect(small_cache, "id/val", "layer1", params=one)
    with pytest.raises(CacheError, match="there is no cache at"):
        inspect(tmp_path / "none.zarr")


@pytest.mark.slow
def test_a_report_is_the_commands_page(small_cache: Cache, params_file: str, tmp_path: Path) -> None:
    made = nacpipe.report(small_cache, tmp_path / "page.html", params=params_file, figures=tmp_path / "figures")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page == made.html
    done = CliRunner().invoke(
        main, ["report", small_cache.path, "--params", params_file, "--output", str(tmp_path / "other.html")]
    )
    assert done.exit_code == 0, done.stderr
    command = f"nacpipe.report('{small_cache.path}', '{tmp_path / 'page.html'}')".replace("'", "&#39;")
    assert command in page
    without = [
        re.sub(rf"{re.escape(command)}|nacpipe report [^<]*", "", text)
        for text in (page, (tmp_path / "other.html").read_text("utf-8"))
    ]
    assert without[0] == without[1]
    pd.testing.assert_frame_equal(made.table, nacpipe.evaluate(small_cache, PARAMS))
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in made.figures for kind in ("svg", "png")}
    assert {"scores-near-letters", "coverage-avgpool", "weights"} <= made.figures.keys()
    (checks,) = made.checks.values()
    assert checks["method"].iloc[0] == "NAC"
    assert html.escape(page) in made._repr_html_()


def test_a_report_of_parameters_and_runs(small_cache: Cache, make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other.zarr", seed=1, identity={"weights": "0" * 64})
    made = nacpipe.report([small_cache, other.path], params=PARAMS, baselines=["KNN"])
    assert set(made.checks) == {small_cache.path, other.path}
    assert {"run1-weights", "run2-weights"} <= made.figures.keys()
    assert (made.table["runs"] == 2).all()
    assert "KNN" in set(made.table["method"])
    assert "The parameters were given; no study is known for them." in made.html
    with pytest.raises(InputError, match="there are 1 params for 2 caches; give one for each"):
        nacpipe.report([small_cache, other], params=[PARAMS])
    with pytest.raises(ParamsError, match=r"there is no .*other\.params\.json"):
        nacpipe.report(other)
    with pytest.raises(InputError, match="cannot be written"):
        nacpipe.report(other, tmp_path / "nosuch" / "page.html", params=PARAMS)


def test_a_missing_library_is_said(small_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nacpipe.reporting.report", "nacpipe.reporting.figures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    layer = nacpipe.inspect(small_cache, "id/val", "layer1")
    with pytest.raises(MissingExtra, match=r"this needs matplotlib; install it with: pip install 'nacpipe\[report\]'"):
        layer.plot()
    with pytest.raises(MissingExtra, match="this needs matplotlib"):
        nacpipe.report(small_cache, params=PARAMS)
