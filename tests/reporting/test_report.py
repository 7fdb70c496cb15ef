"""The page: every number is the table's, everything foreign is escaped, and a real browser draws it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nacpipe.cache import Cache, open_cache
from nacpipe.cli import main
from nacpipe.evaluation.method_scores import MethodScores, score_cache
from nacpipe.evaluation.tables import tabulate
from nacpipe.method.coverage import bin_edges, coverage_table
from nacpipe.method.metrics import auroc
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import PLAIN_SCORES
from nacpipe.reporting.figures import draw_coverage, draw_histogram, draw_roc, to_svg
from nacpipe.reporting.galleries import SHOWN, build_galleries, draw_mistakes
from nacpipe.reporting.report import (
    COMPARED_DRAWS,
    check_overfitting,
    draw_cache_report,
    read_cache_report,
    render_report,
    score_selection,
)
from nacpipe.scoring.coverage import fit_coverage
from nacpipe.scoring.params_file import write_params
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.study import Search
from tests.reporting.browser import browse

ROOT = Path(__file__).resolve().parents[2]
PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=3),
        "layer1": LayerParams(bins=9, saturation=3, alpha=1),
    }
)


class Reader(HTMLParser):
    """Tables as lists of rows, the bold cells, all text, and what the page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.bold: list[tuple[int, int, int]] = []
        self.inside = False
        self.text, self.tags, self.references = "", set[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag == "b":
            self.bold.append((len(self.tables) - 1, len(self.tables[-1]) - 1, len(self.tables[-1][-1]) - 1))
        elif tag == "br":
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside:
            self.tables[-1][-1][-1] += data


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


@pytest.fixture(scope="module")
def place(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training runs, searched, and the page of the first with its pictures as files."""
    folder = tmp_path_factory.mktemp("report")
    for name, seed in (("s0", 0), ("s1", 1)):
        weights = f"{seed:064x}"
        cache = make_cache(folder / f"{name}.zarr", rows={"csid/blurred": 25}, seed=seed, identity={"weights": weights})
        assert nacpipe("search", cache.path, "--space", "paper", "--trials", "40").exit_code == 0
    asked = ["report", f"{folder}/s0.zarr", "--output", f"{folder}/page.html", "--figures", f"{folder}/figures"]
    done = nacpipe(*asked)
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    assert done.stderr == f"wrote {folder}/page.html\nwrote {folder}/figures\n"
    return folder


def rows_of(command: list[str]) -> pd.DataFrame:
    return pd.DataFrame(json.loads(nacpipe("evaluate", *command, "--json").stdout))


def check_tables(page: Reader, frame: pd.DataFrame, *, spread: bool) -> None:
    """Every cell of the table stands where it belongs, and the best of every column, those alone, are bold."""
    tables = iter([number for number, table in enumerate(page.tables) if table[0][0] in ("near", "far")])
    for _, block in frame.groupby(["task", "group"], sort=False):
        group = block["group"].iloc[0]
        for pair in (("fpr95", "auroc"), ("aupr_in", "aupr_out")):
            number = next(tables)
            table = page.tables[number]
            names = {"fpr95": "FPR@95 ↓", "auroc": "AUROC ↑", "aupr_in": "AUPR-IN ↑", "aupr_out": "AUPR-OUT ↑"}
            datasets = ["mean", *(d for d in dict.fromkeys(block["dataset"]) if d != "mean")]
            assert table[0] == [group, *datasets]
            assert table[1] == [names[m] for _ in datasets for m in pair]
            means = block[block["dataset"] == "mean"].sort_values("auroc", ascending=False, kind="stable")
            assert [row[0] for row in table[2:]] == means["method"].tolist()  # a leaderboard
            for column, (dataset, metric) in enumerate([(d, m) for d in datasets for m in pair], 1):
                cells = block[block["dataset"] == dataset].set_index("method")
                best = cells[metric].min() if metric == "fpr95" else cells[metric].max()
                for row in range(2, 6):
                    cell = cells.loc[table[row][0]]
                    text = f"{100 * cell[metric]:.2f}" + (f" ± {100 * cell[f'{metric}_std']:.2f}" if spread else "")
                    assert table[row][column] == text
                    assert ((number, row, column) in page.bold) == (f"{100 * cell[metric]:.2f}" == f"{100 * best:.2f}")
    assert next(tables, None) is None


def flagged_table(page: Reader) -> list[list[str]]:
    """The sets, and of each the share that NAC's detector flags."""
    (table,) = (table for table in page.tables if table[0][0] == "flagged, %")
    assert [row[0] for row in table[1:]] == ["NAC"]
    assert table[0][1:] == ["id/test", "csid/blurred", "near letters", "far textures"]
    return table


def test_the_page_of_one_cache(place: Path) -> None:
    page = Reader((place / "page.html").read_text("utf-8"))
    check_tables(page, rows_of([f"{place}/s0.zarr"]), spread=False)
    lines = [line for line in nacpipe("evaluate", f"{place}/s0.zarr").stdout.splitlines() if "-OOD" in line[:9]]
    assert len([line for line in lines if f"{line[0].upper()}{line[1:]}: " in page.text]) == 4  # the verdicts
    means = rows_of([f"{place}/s0.zarr"]).query("dataset == 'mean' and method != 'NAC'")
    for (task, group), rows in means.groupby(["task", "group"]):
        best = rows.loc[rows["auroc"].idxmax(), "method"]
        asked = [f"{place}/s0.zarr", "--against", best, "--resamples", str(COMPARED_DRAWS)]
        found = rows_of(asked).query("dataset == 'mean' and metric == 'auroc'").set_index(["task", "group"])
        points, low, high = (100 * found.loc[(task, group), key] for key in ("difference", "low", "high"))
        interval = f"{low:+.2f} to {high:+.2f}".replace("-", "−")
        assert (
            f": {abs(points):.2f} points {'above' if points >= 0 else 'below'} {best}, the best other method; with"
            f" other images {interval} (95% interval)"
        ) in page.text
    assert (
        "flagged by NAC at the threshold of nacpipe export, which keeps 95 % of id/val: "
        + ", ".join(f"{name} {share} %" for name, share in zip(*(row[1:] for row in flagged_table(page)), strict=True))
        in nacpipe("evaluate", f"{place}/s0.zarr").stdout.splitlines()
    )
    assert "is not what id/test of" in page.text  # the cache's images are made up
    for line in (f"nacpipe extract digits --cache {place}/s0.zarr", f"nacpipe search {place}/s0.zarr --space paper\n"):
        assert line in page.text
    assert f"nacpipe report {place}/s0.zarr --output {place}/page.html" in page.text
    assert f"{0:064x}" in page.text  # the weights' sha256


def test_the_page_needs_nothing_but_itself(place: Path) -> None:
    text = (place / "page.html").read_text("utf-8")
    page = Reader(text)
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import", text)


def test_the_pictures_as_files(place: Path) -> None:
    """Those of the page, as SVG and PNG."""
    sets = ("near-letters", "far-textures")
    names = {*(f"{kind}-{name}" for kind in ("scores", "roc") for name in sets), "coverage-avgpool", "coverage-layer1"}
    names |= {"weights", "importances", "history"}
    assert {p.name for p in (place / "figures").iterdir()} == {f"{n}.{end}" for n in names for end in ("svg", "png")}
    assert len(Reader((place / "page.html").read_text("utf-8")).references) == len(names) + 1  # and the empty icon
    for path in (place / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 540  # 3.6 inches of 150 dots
            assert len(image.convert("RGB").getcolors(2**20) or []) > 20


@pytest.mark.slow
def test_training_runs(place: Path) -> None:
    caches = [f"{place}/s0.zarr", f"{place}/s1.zarr"]
    done = nacpipe("report", *caches, "--output", f"{place}/runs.html", "--figures", f"{place}/two")
    assert done.exit_code == 0, done.stderr
    page = Reader((place / "runs.html").read_text("utf-8"))
    check_tables(page, rows_of(caches), spread=True)
    for number, cache in enumerate(caches, 1):
        assert f"Run {number}: {cache}" in page.text
        assert f"nacpipe search {cache} --space paper\n" in page.text
    assert (place / "two/run2-coverage-layer1.svg").exists()


@pytest.mark.slow
def test_parameters_that_no_study_here_found(place: Path) -> None:
    write_params(place / "bare.json", PARAMS)
    given = ["--params", f"{place}/bare.json", "--output", f"{place}/bare.html"]
    assert nacpipe("report", f"{place}/s0.zarr", *given).exit_code == 0
    page = Reader((place / "bare.html").read_text("utf-8"))
    assert f"{place}/bare.json does not say which study found it." in page.text
    assert len(page.references) == 8  # no importances, no history
    assert "nacpipe search" not in page.text


@pytest.mark.slow
def test_foreign_names_are_text(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    evil = "<script>alert('$x_$')</script>&amp;"
    name = evil.replace("/", "|")
    cache = make_cache(tmp_path / "c.zarr", rows={f"ood/far/{name}": 20}, identity={"architecture": evil})
    write_params(tmp_path / "c.params.json", PARAMS)
    report = read_cache_report(cache, PARAMS)
    text = render_report([report], tabulate([report.run]), f"nacpipe {evil}", [draw_cache_report(report)])
    page = Reader(text)
    assert "script" not in page.tags
    assert "<script" not in text
    far = next(table for table in page.tables if table[0][0] == "far")
    assert name in far[0]
    assert name in [row[0].removeprefix("ood/far/") for table in page.tables for row in table]  # in the provenance
    assert page.text.count(evil) >= 3  # title, heading, command


def test_the_overfitting_check_is_the_search_s(place: Path) -> None:
    search = Search(SearchRequest(cache=place / "s0.zarr", space="paper"), create=False)
    result = search.result("stopped")
    found = check_overfitting(
        search.cache, score_selection(search.cache, fit_coverage(search.cache, result.params))
    ).set_index("method")
    checks = result.checks
    assert found.loc["NAC"].tolist() == [checks.val_auroc, checks.val_fpr95, checks.subtrain_auroc]
    guide = search.objective.guide
    assert guide is not None and found.index.tolist() == ["NAC", guide.name]
    aurocs = {
        name: auroc(score(search.cache["id/val"].read("logits")), score(search.cache["ood/val"].read("logits")))
        for name, score in PLAIN_SCORES.items()
    }
    assert guide.name == max(aurocs, key=aurocs.__getitem__)
    assert found.loc[guide.name, "val_auroc"] == aurocs[guide.name]
    score = PLAIN_SCORES[guide.name]
    expected = auroc(*(score(search.cache[name].read("logits")) for name in ("id/val", "id/subtrain")))
    assert found.loc[guide.name, "subtrain_auroc"] == expected == result.guide_subtrain
    said = result.overfitting()
    assert f", {guide.name}'s {100 * expected:.2f} %; lower: training images score higher)" in said
    assert f"{said[0].upper()}{said[1:]}." in Reader((place / "page.html").read_text()).text


def test_splits_that_are_not_there_are_no_number(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"id/subtrain": 0})
    found = check_overfitting(cache, score_selection(cache, fit_coverage(cache, PARAMS)))
    assert found["subtrain_auroc"].isna().all()
    assert found["val_auroc"].notna().all()


def test_a_set_that_is_not_finished_has_no_picture_and_empty_cells(
    make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    file = Path(make_cache(tmp_path / "c.zarr").path, "ood/far/textures/zarr.json")
    content = json.loads(file.read_text())
    content["attributes"].update(sealed=False, digest=None)
    file.write_text(json.dumps(content))
    cache = open_cache(tmp_path / "c.zarr")
    write_params(tmp_path / "c.params.json", PARAMS)
    report = read_cache_report(cache, PARAMS)
    drawn = draw_cache_report(report)
    assert [*drawn["Scores"], *drawn["ROC curves"]] == ["scores-near-letters", "roc-near-letters"]
    page = Reader(render_report([report], tabulate([report.run]), "nacpipe report", [drawn]))
    far = [table for table in page.tables if table[0][0] == "far"]
    assert [len(table) for table in far] == [2, 2]  # the headings
    assert "Without a value here: NAC, MSP, MaxLogit, Energy." in page.text
    assert "ID test images, which the network classifies" in page.text
    assert "from 1 OOD set." in page.text
    assert "empty: NAC, MSP, MaxLogit, Energy: ood/far/textures is not finished" in page.text


def test_a_gallery_shows_the_images_that_were_scored_most_wrongly(
    make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    """An image's grey is its position in the list, so a thumbnail says which image it is."""
    cache = make_cache(tmp_path / "c.zarr")
    scores = score_cache(cache, PARAMS).methods["NAC"].scores
    reference = fit_coverage(cache, PARAMS).score(cache["id/val"])

    def open_split(_: str) -> Callable[[int], Image.Image]:
        return lambda position: Image.new("L", (28, 28), position)

    for gallery in build_galleries(cache, scores, open_split, reference):
        values = scores[gallery.split]
        order = cache[gallery.split].index[np.argsort(values, kind="stable")]
        lowest, highest = order[:SHOWN].tolist(), order[::-1][:SHOWN].tolist()
        wrong, right = (highest, lowest) if gallery.split.startswith("ood/") else (lowest, highest)
        assert [t.image.getpixel((0, 0)) for t in gallery.mistakes] == wrong
        assert [t.image.getpixel((0, 0)) for t in gallery.typical] == right
        worst = values.max() if gallery.split.startswith("ood/") else values.min()
        assert gallery.mistakes[0].caption == f"{100 * (reference <= worst).mean():.3g} %"
        assert gallery.mistakes[0].uri().startswith("data:image/png;base64,")
    picture = draw_mistakes(build_galleries(cache, scores, open_split, None))
    assert picture.width > SHOWN * 96
    assert len(picture.convert("RGB").getcolors(2**20) or []) > 20


def test_a_histogram_of_percentiles_is_even_for_the_reference() -> None:
    reference = np.random.RandomState(0).randn(400)
    figure = draw_histogram(reference, np.full(3, -9.0), ("id/test", "near/x"), reference)
    inside, outside = [patch.get_data().values for patch in figure.axes[0].patches][::2]  # type: ignore[attr-defined]
    np.testing.assert_allclose(inside, 2.5, atol=0.26)  # 40 bars of 10 images; an end belongs to the next bar
    assert (outside[0], outside.sum()) == (100, 100)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_histogram_s_bars_are_shares() -> None:
    figure = draw_histogram(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0]), ("id/test", "near/x"))
    heights = [patch.get_data().values for patch in figure.axes[0].patches][::2]  # type: ignore[attr-defined]
    assert [(h[0], h[-1], h.sum()) for h in heights] == [(50, 50, 100), (100, 0, 100)]


def test_roc_curves_thinned_keep_their_area() -> None:
    rng = np.random.RandomState(0)
    sides = {"NAC": (rng.randn(5000) + 1, rng.randn(5000)), "other": (rng.randn(50), rng.randn(50))}
    lines = {line.get_label(): line.get_xydata() for line in draw_roc(sides, "x").axes[0].lines}
    curve = np.asarray(lines["NAC"])
    assert len(curve) <= 200
    exact = (np.concatenate(sides["NAC"]).argsort().argsort()[:5000].sum() - 5000 * 4999 / 2) / 5000**2
    assert np.trapezoid(curve[:, 1], curve[:, 0]) / 1e4 == pytest.approx(exact, abs=1e-3)


def test_no_more_curves_than_can_be_told_apart(place: Path) -> None:
    cache = open_cache(place / "s0.zarr")
    run = score_cache(cache, PARAMS)
    noise = {split: np.random.RandomState(0).randn(rows) for split, rows in run.rows.items()}
    good = {split: noise[split] - 9.0 * split.startswith("ood/") for split in run.rows}
    more = {f"noise {n}": MethodScores(scores=noise) for n in range(4)} | {"good": MethodScores(scores=good)}
    drawn = draw_cache_report(read_cache_report(cache, PARAMS, more=more))
    for figure in drawn["ROC curves"].values():
        assert len(figure.axes[0].lines) == 1 + 6  # and the diagonal
        labels = [text.get_text() for text in figure.legends[0].texts]
        assert labels[0] == "NAC"
        assert "good" in labels


def test_a_coverage_curve_is_the_table(small_cache: Cache) -> None:
    fitted = fit_coverage(small_cache, PARAMS).layers["avgpool"]
    drawn = {p.get_label(): p.get_data() for p in draw_coverage("avgpool", fitted).axes[0].patches}  # type: ignore[attr-defined]
    table = coverage_table(fitted.counts, 5)
    np.testing.assert_array_equal(drawn["mean of all"].values, table.mean(axis=0))
    np.testing.assert_array_equal(drawn["mean of all"].edges, bin_edges(20))
    for place, choose in (("least", np.argmin), ("greatest", np.argmax)):
        neuron = choose(table.mean(axis=1))
        np.testing.assert_array_equal(drawn[f"neuron {neuron}, {place}"].values, table[neuron])


def test_the_same_picture_is_the_same_bytes(small_cache: Cache) -> None:
    fitted = fit_coverage(small_cache, PARAMS).layers["layer1"]
    assert to_svg(draw_coverage("layer1", fitted)) == to_svg(draw_coverage("layer1", fitted))


# --- in a browser -----------------------------------------------------------------------------------------------------

MEASURE = """<script>addEventListener("load", () => {
  const places = [...document.images].map(i => { const b = i.getBoundingClientRect();
    return [b.left, b.top, b.right, b.bottom, i.naturalWidth]; });
  parent.postMessage(JSON.stringify([innerWidth, document.documentElement.scrollWidth, places]), "*");
});</script>"""
FRAME = """<!DOCTYPE html><body>
<script>addEventListener("message", e => { document.body.textContent = e.data; })</script>
<iframe src="measured.html" style="border: 0; width: %dpx; height: 9000px"></iframe></body>"""  # no window is so narrow


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_draws_it(place: Path, tmp_path: Path, width: int) -> None:
    page = place / "page.html"
    _, said = browse(page, f"--screenshot={tmp_path}/shot.png", width=width, height=9000)
    assert said == []
    (tmp_path / "measured.html").write_text(page.read_text("utf-8").replace("</body>", f"{MEASURE}</body>"), "utf-8")
    (tmp_path / "frame.html").write_text(FRAME % width)
    dom, _ = browse(tmp_path / "frame.html", "--dump-dom", "--virtual-time-budget=20000", width=1600, height=9000)
    found = re.search(r"<body>(\[.*?\])</body>", dom)
    assert found is not None, dom[-500:]
    inner, needed, places = json.loads(found[1])
    assert (inner, needed) == (width, width)  # nothing sticks out sideways
    assert len(places) == 9
    with Image.open(tmp_path / "shot.png") as shot:
        image = shot.convert("RGB")
    assert image.width == width
    for left, top, right, bottom, natural in places:
        assert natural > 0
        assert min(right - left, bottom - top) > 100
        assert bottom < image.height
        assert len(image.crop((left, top, right, bottom)).getcolors(2**24) or []) > 50


ROWS = """<script>addEventListener("load", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  for (const wide of document.querySelectorAll(".wide")) wide.scrollLeft = 1000;
  const rows = [...document.querySelectorAll(".board tr")].filter(row => row.querySelector(".m2"));
  const found = rows.map(row => [...row.querySelectorAll("th[scope=row], .m1, .m2")].map(cell => {
    const b = cell.getBoundingClientRect(); return [b.left, b.right, cell.scrollWidth - cell.clientWidth]; }));
  const scrolled = Math.max(...[...document.querySelectorAll(".wide")].map(wide => wide.scrollLeft));
  parent.postMessage(JSON.stringify([scrolled, found]), "*");
});</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("runs", [["s0.zarr"], ["s0.zarr", "s1.zarr"]])
def test_names_and_means_stay_side_by_side_while_the_sets_scroll(place: Path, tmp_path: Path, runs: list[str]) -> None:
    done = nacpipe("report", *(f"{place}/{name}" for name in runs), "--output", f"{tmp_path}/page.html")
    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "page.html").read_text("utf-8")
    (tmp_path / "measured.html").write_text(page.replace("</body>", f"{ROWS}</body>"), "utf-8")
    (tmp_path / "frame.html").write_text(FRAME % 400)
    dom, _ = browse(tmp_path / "frame.html", "--dump-dom", "--virtual-time-budget=20000", width=1600, height=3000)
    found = re.search(r"<body>(\[.*?\])</body>", dom)
    assert found is not None, dom[-500:]
    scrolled, rows = json.loads(found[1])
    assert scrolled > 20
    cells = [row for row in rows if len(row) == 3]  # rows of heads have no name of their own
    assert len(cells) == 4 * 2 * 4  # near and far, also of the full spectrum, AUPR too: NAC and three others
    for name, first, second in cells:
        assert name[1] == pytest.approx(first[0], abs=0.6)
        assert first[1] == pytest.approx(second[0], abs=0.6)
        assert second[1] < 400
    assert all(overflow <= 0 for row in rows for _, _, overflow in row)  # nothing is cut off


@pytest.mark.browser
def test_a_console_error_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<script>console.error('gone wrong')</script>")
    _, said = browse(tmp_path / "bad.html", f"--screenshot={tmp_path}/shot.png", width=400, height=400)
    assert len(said) == 1
    assert "gone wrong" in said[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals(place: Path) -> None:
    done = nacpipe("report", f"{place}/s0.zarr", "--output", f"{place}/nowhere/page.html")
    assert done.exit_code == 1
    assert "nowhere is not a folder that can be written to" in done.stderr
    done = nacpipe("report", f"{place}/s0.zarr")
    assert (done.exit_code, "--output" in done.stderr) == (2, True)


@pytest.mark.slow
def test_without_torch(place: Path) -> None:
    code = """
import sys
class NotThere:  # not None in sys.modules: matplotlib takes that for a torch
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "torchvision"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotThere())
from nacpipe.cli import main
main(["report", sys.argv[1], "--output", sys.argv[2]], standalone_mode=False)
main(["inspect", sys.argv[1], "id/val", "avgpool", "--plot", sys.argv[3]], standalone_mode=False)
"""
    command = [sys.executable, "-W", "error", "-c", code, f"{place}/s0.zarr", f"{place}/bare.html", f"{place}/plot.svg"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, f"wrote {place}/bare.html\nwrote {place}/plot.svg\n")


def test_without_matplotlib(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith(("nacpipe.reporting.figures", "nacpipe.reporting.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = nacpipe("report", f"{place}/s0.zarr", "--output", f"{place}/never.html")
    assert done.exit_code == 1
    assert done.stderr == "nacpipe: this needs matplotlib; install it with: pip install 'nacpipe[report]'\n"
    assert not (place / "never.html").exists()
