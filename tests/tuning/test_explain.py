"""What mattered in a study: frames by hand, and the history as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nacpipe.cache import Cache
from nacpipe.errors import StudyError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning import runner as sweep
from nacpipe.tuning.explain import FEW, HEIGHT, WIDTH, Explanation, explain
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import ObjectiveName, ValidationMetrics
from tests.tuning.trials import make_trial

SPACE = """
[default]
bins = { low = 4, high = 400 }
saturation = 5
alpha = [0.1, 0.5]
weight = { low = 0, high = 2 }
[layers.avgpool]
[layers.layer1]
edges = ["log", "linear"]
weight = { low = 0.5, high = 2 }
"""


def open_search(cache: Cache, folder: Path, space: str = SPACE, **more: Any) -> Search:
    (folder / "s.toml").write_text(space)
    rest: dict[str, Any] = {"sampler": "tpe", "trials": 5, **more}
    return Search(
        SearchRequest(cache=Path(cache.path), storage=str(folder / "s.log"), space=str(folder / "s.toml"), **rest)
    )


def layers(avgpool: tuple[int, float], layer1: tuple[int, float], alpha: float = 0.5, edges: Any = "log") -> NacParams:
    """Parameters from (bins, weight) of either layer."""
    return NacParams(
        layers={
            "avgpool": LayerParams(bins=avgpool[0], saturation=5, alpha=0.5, weight=avgpool[1]),
            "layer1": LayerParams(bins=layer1[0], saturation=5, alpha=alpha, weight=layer1[1], edges=edges),
        }
    )


def add(search: Search, trials: Sequence[tuple[NacParams, float, float]]) -> None:
    """Trials with an AUROC and an FPR@95 that nobody measured."""
    assert search.study is not None
    for number, (params, auroc, fpr95) in enumerate(trials):
        checks = ValidationMetrics(val_auroc=auroc, val_fpr95=fpr95, subtrain_auroc=None)
        search.study.add_trial(
            make_trial(params, checks, search.request.aim, search.objective.space, phase=f"phase {number}")
        )


BY_HAND = [
    (layers((40, 1.0), (4, 0.0)), 0.60, 0.5),  # avgpool alone
    (layers((40, 2.0), (4, 0.0)), 0.65, 0.6),  # and again
    (layers((40, 0.0), (4, 1.0)), 0.55, 0.7),  # layer1 alone
    (layers((40, 0.5), (398, 2.0), alpha=0.1, edges="linear"), 0.80, 0.3),
    (layers((40, 0.5), (100, 2.0)), 0.70, 0.2),
]


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["auroc", "fpr95", "pareto"])
def test_frames_by_hand(small_cache: Cache, tmp_path: Path, objective: Any) -> None:
    search = open_search(small_cache, tmp_path, objective=objective)
    add(search, BY_HAND)
    found = explain(search)
    assert found.maximize == (objective != "fpr95")

    # The Pareto front is (0.80, 0.3) and (0.70, 0.2), equally far from their ideal: the first.
    best, bins, place = (BY_HAND[4][0], 100, math.log(25) / math.log(100)) if objective == "fpr95" else (
        *(BY_HAND[3][0], 398, math.log(99.5) / math.log(100)),
    )  # fmt: skip
    assert list(found.layers.columns) == ["layer", "weight", "alone", "without"]
    rest = {name: NacParams(layers={name: best.layers[name]}) for name in ("avgpool", "layer1")}
    assert found.layers.to_dict("records") == [
        {
            "layer": "avgpool",
            "weight": 0.5,
            "alone": 0.65,
            "without": search.objective.measure(rest["layer1"]).val_auroc,
        },
        {
            "layer": "layer1",
            "weight": 2.0,
            "alone": 0.55,
            "without": search.objective.measure(rest["avgpool"]).val_auroc,
        },
    ]
    assert found.layers["without"][0] != found.layers["without"][1]

    names = ["layer", "parameter", "value", "importance", "low", "high", "choices", "place", "at_edge"]
    assert list(found.parameters.columns) == names
    assert found.parameters["importance"].isna().all()  # of five trials
    first, linear = ("log", 0.5) if objective == "fpr95" else ("linear", 0.1), objective != "fpr95"
    expected = [
        ("avgpool", "bins", 40, 4, 400, "", pytest.approx(0.5), False),
        ("avgpool", "alpha", 0.5, None, None, "0.1, 0.5", None, False),
        ("avgpool", "weight", 0.5, 0, 2, "", pytest.approx(0.25), False),  # on no logarithmic scale
        ("layer1", "bins", bins, 4, 400, "", pytest.approx(place), linear),
        ("layer1", "alpha", first[1], None, None, "0.1, 0.5", None, False),
        ("layer1", "edges", first[0], None, None, "log, linear", None, False),
        ("layer1", "weight", 2.0, 0.5, 2, "", 1.0, True),
    ]
    rows = found.to_json()["parameters"]
    assert [tuple(row[n] for n in names if n != "importance") for row in rows] == expected
    assert {type(row["at_edge"]) for row in rows} == {bool}
    assert [type(row["value"]) for row in rows[:4]] == [int, float, float, int]  # saturation is fixed, and no row

    values = [0.5, 0.6, 0.7, 0.3, 0.2] if objective == "fpr95" else [0.60, 0.65, 0.55, 0.80, 0.70]
    reached = [0.5, 0.5, 0.5, 0.3, 0.2] if objective == "fpr95" else [0.60, 0.65, 0.65, 0.80, 0.80]
    assert found.history.to_dict("list") == {
        "number": [0, 1, 2, 3, 4],
        "phase": [f"phase {number}" for number in range(5)],
        "value": values,
        "best": reached,
    }


@pytest.mark.parametrize(("bins", "at_edge"), [(4, True), (5, False), (365, False), (366, True), (400, True)])
def test_near_the_end_of_a_range(small_cache: Cache, tmp_path: Path, bins: int, at_edge: bool) -> None:
    """Within 2 % of log 4 … log 400: below 4 · 100 ** 0.02 = 4.39, above 400 / 100 ** 0.02 = 364.8."""
    assert 364 < 400 / 100**0.02 < 365
    at_edge = at_edge or bins == 365
    search = open_search(small_cache, tmp_path)
    add(search, [(layers((bins, 1.0), (40, 1.0)), 0.5, 0.5)])
    assert explain(search).parameters["at_edge"].tolist() == [at_edge, *[False] * 6]


def test_a_layer_that_has_all_the_weight(small_cache: Cache, tmp_path: Path) -> None:
    """Without it there is nothing; without the other nothing changes; and that one was never tried alone."""
    search = open_search(small_cache, tmp_path)
    add(search, BY_HAND[:1])
    records = explain(search).to_json()["layers"]
    alone = search.objective.measure(NacParams(layers={"avgpool": BY_HAND[0][0].layers["avgpool"]})).val_auroc
    assert records == [
        {"layer": "avgpool", "weight": 1.0, "alone": 0.60, "without": None},
        {"layer": "layer1", "weight": 0.0, "alone": None, "without": alone},
    ]


def test_weights_in_closed_form_are_found_anew(small_cache: Cache, tmp_path: Path) -> None:
    """With three layers: what is left when one goes is weighed again, not as it stood."""
    text = "[default]\nbins = [10, 20]\nsaturation = 5\nalpha = 0.5\n[layers.avgpool]\n[layers.layer1]\n[layers.logits]"
    search = open_search(small_cache, tmp_path, text, sampler="grid", trials=None)
    result = sweep.run(search)
    assert result.trials == 8
    found = explain(search)
    for _, row in found.layers.iterrows():
        rest = NacParams(layers={n: p for n, p in result.params.layers.items() if n != row["layer"]})
        assert row["without"] == search.objective.measure(search.objective.weigh(rest)).val_auroc
        assert row["weight"] == result.params.layers[row["layer"]].weight
    assert found.parameters["place"].isna().all()
    assert not found.parameters["at_edge"].any()


def test_nothing_to_explain(small_cache: Cache, tmp_path: Path) -> None:
    search = open_search(small_cache, tmp_path)
    message = r"^there is no completed trial to explain; start with: nacpipe search .* --trials 5 --space .*s\.toml"
    with pytest.raises(StudyError, match=message):
        explain(search)


# --- importances ------------------------------------------------------------------------------------------------------


def wander(trials: int, value: Any) -> list[tuple[NacParams, float, float]]:
    """Trials anywhere, whose values depend on one parameter."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(trials):
        bins, other = (round(4 * 100**u) for u in rng.uniform(size=2))
        weights = rng.uniform(0.1, 2, size=2).tolist()
        params = layers((bins, weights[0]), (other, weights[1]), float(rng.choice([0.1, 0.5])))
        found.append((params, *value(params)))
    return found


@pytest.mark.parametrize("objective", ["auroc", "fpr95", "pareto"])
def test_importances(small_cache: Cache, tmp_path: Path, objective: Any) -> None:
    """Of FPR@95 where that is searched for, of AUROC otherwise; shares of one."""
    search = open_search(small_cache, tmp_path, objective=objective)
    add(
        search,
        wander(80, lambda p: (p.layers["avgpool"].bins / 1000, p.layers["layer1"].bins / 1000)),
    )
    frame = explain(search).parameters
    shares = {f"{row['layer']}.{row['parameter']}": row["importance"] for _, row in frame.iterrows()}
    assert np.nansum(list(shares.values())) == pytest.approx(1)
    known = {name for name, share in shares.items() if not math.isnan(share)}
    assert known >= {"avgpool.bins", "layer1.bins", "layer1.alpha", "avgpool.weight", "layer1.weight"}
    assert max(known, key=lambda name: shares[name]) == ("layer1.bins" if objective == "fpr95" else "avgpool.bins")
    assert shares["avgpool.bins" if objective != "fpr95" else "layer1.bins"] > 0.5


def test_no_importances_of_few_or_equal_trials(small_cache: Cache, tmp_path: Path) -> None:
    for folder, trials, none in (("few", FEW - 1, True), ("enough", FEW, False)):
        (tmp_path / folder).mkdir()
        search = open_search(small_cache, tmp_path / folder)
        add(search, wander(trials, lambda p: (p.layers["avgpool"].bins / 1000, 0.5)))
        assert explain(search).parameters["importance"].isna().all() == none
    (tmp_path / "equal").mkdir()
    search = open_search(small_cache, tmp_path / "equal")
    add(search, wander(40, lambda _: (0.75, 0.5)))
    assert explain(search).parameters["importance"].isna().all()


def test_json_has_no_nan(small_cache: Cache, tmp_path: Path) -> None:
    search = open_search(small_cache, tmp_path)
    add(search, BY_HAND)
    found = explain(search).to_json()
    assert list(found) == ["parameters", "layers", "history"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["history"][3] == {"number": 3, "phase": "phase 3", "value": 0.8, "best": 0.8}


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(values: Sequence[float], objective: ObjectiveName = "auroc") -> list[str]:
    history = pd.DataFrame({"number": range(len(values)), "phase": "", "value": values})
    history["best"] = history["value"].cummin() if objective == "fpr95" else history["value"].cummax()
    nothing = pd.DataFrame()
    found = Explanation(parameters=nothing, layers=nothing, history=history, objective=objective)
    return found.picture().split("\n")


def drawn(marks: dict[int, str], high: str, low: str, foot: str, value: str = "AUROC") -> list[str]:
    """A picture from the rows that have marks; the top is row 0."""
    labels = {0: high, HEIGHT - 1: low}
    rows = [f"{labels.get(row, ''):>7} ┤{marks.get(row, '')}" for row in range(HEIGHT)]
    return [*rows, *foot.split("\n"), f"         ━ best so far   · best of the column: {value}, %"]


def test_a_picture_by_hand() -> None:
    """Eleven steps of one point each, from the lowest value at the bottom to the highest at the top."""
    rising, falling = [0.0, 0.11, 0.05], [0.11, 0.0, 0.05]
    foot = "        └───\n         0trial 2"
    assert picture(rising) == drawn({0: " ━━", 6: "  ·", 11: "━"}, "11.00", "0.00", foot)
    assert picture(falling, "fpr95") == drawn({0: "━", 6: "  ·", 11: " ━━"}, "11.00", "0.00", foot, "FPR@95")
    assert picture(rising, "guided") == drawn({0: " ━━", 6: "  ·", 11: "━"}, "11.00", "0.00", foot, "correlation")


def test_a_picture_of_one_value() -> None:
    assert picture([0.75]) == drawn({5: "━"}, "75.00", "75.00", "        └─\n         0trial 0")
    assert picture([0.75, 0.75, 0.75])[5] == "        ┤━━━"


def test_a_failure_does_not_press_the_rest_together() -> None:
    """Far below the rest it lies at the bottom, and the scale is that of the others."""
    values = [0.5, -100.0, *[0.5 + 0.01 * step for step in range(1, 12)]]
    found = picture(values)
    assert found[0].startswith("  61.00 ┤")
    assert found[HEIGHT - 1].startswith(" ≤50.00 ┤")
    assert found[HEIGHT - 1][9:] == "━━" or found[HEIGHT - 1][9:] == "━·"


def test_many_trials_share_columns() -> None:
    half = WIDTH // 2
    found = picture([0.0, 0.25] * half + [0.0, 0.5] * half)
    assert found[0] == f"  50.00 ┤{' ' * half}{'━' * half}"
    assert found[1:HEIGHT] == [f"{'':8}┤"] * (HEIGHT - 2) + [f"  25.00 ┤{'━' * half}"]
    assert found[HEIGHT] == f"{'':8}└{'─' * WIDTH}"
    assert found[HEIGHT + 1] == f"{'':9}0{'trial 143':>{WIDTH - 1}}"
    assert len(found[HEIGHT + 1]) == 9 + WIDTH
