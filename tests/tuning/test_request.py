"""What a search has found, as a record."""

from __future__ import annotations

from pathlib import Path

import pytest

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.request import SearchRequest, SearchResult, ValidationMetrics, describe_overfitting


@pytest.mark.parametrize(
    ("subtrain", "guides", "expected"),
    [(0.40, 0.44, True), (0.42, 0.44, False), (0.44, 0.44, False), (0.5, 0.3, False), (None, 0.44, False),
     (0.3, None, False)],
)  # fmt: skip
def test_the_overfitting_warning(subtrain: float | None, guides: float | None, expected: bool) -> None:
    result = SearchResult(
        params=NacParams(layers={"avgpool": LayerParams(bins=4, saturation=1, alpha=1.0)}),
        checks=ValidationMetrics(val_auroc=0.9, val_fpr95=0.1, subtrain_auroc=subtrain),
        guide=None if guides is None else "GEN",
        guide_subtrain=guides,
        guide_val=0.8,
        alone={},
        trials=1,
        seconds=1.23456,
        seed=1,
        ended="trials",
    )
    assert result.overfits is expected
    assert result.to_json()["overfits"] is expected
    assert result.to_json()["seconds"] == 1.235
    assert ("may be overfitted" in result.overfitting()) is expected


@pytest.mark.parametrize(
    ("subtrain", "verdict"),
    [
        (0.6077, "no sign of overfitting; NAC prefers training images no more than GEN does"),
        (0.6, "no sign of overfitting; NAC prefers training images less than 3 points more than GEN does"),
        (0.5756, "no sign of overfitting; NAC prefers training images less than 3 points more than GEN does"),
        (0.57, "the coverage may be overfitted; NAC prefers training images over 3 points more than GEN does"),
    ],
)
def test_the_overfitting_check_in_words(subtrain: float, verdict: str) -> None:
    assert describe_overfitting(subtrain, ("GEN", 0.6056)) == (
        f"overfitting check: {verdict} (AUROC of id/val against id/subtrain {100 * subtrain:.2f} %, GEN's 60.56 %;"
        " lower: training images score higher)"
    )
    assert describe_overfitting(subtrain, None) == (
        f"overfitting check: AUROC of id/val against id/subtrain {100 * subtrain:.2f} %; the more it is below 50 %, the"
        " more NAC prefers training images"
    )


def test_names_and_places_of_a_study() -> None:
    request = SearchRequest(cache=Path("somewhere/c.zarr"), seed=7)
    assert request.study_name == "nac-seed7"
    assert request.where == "somewhere/c.study.log"
    assert SearchRequest(cache=Path("c"), study="mine").study_name == "mine-seed1"
    assert SearchRequest(cache=Path("c")).where == "c.study.log"
    assert SearchRequest(cache=Path("c"), storage="sqlite:///x.db").where == "sqlite:///x.db"


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("s.log", "s.log"),
        ("a:b@c.log", "a:b@c.log"),
        ("postgresql://nac@db/studies", "postgresql://nac@db/studies"),
        ("postgresql://nac:secret@db:5432/studies", "postgresql://nac:***@db:5432/studies"),
        ("mysql+pymysql://nac:p@ss:word@db/x?ssl=1", "mysql+pymysql://nac:***@db/x?ssl=1"),
    ],
)
def test_passwords_are_not_shown(where: str, shown: str) -> None:
    assert SearchRequest(cache=Path("c.zarr"), storage=where).shown == shown


def test_a_study_per_way_to_search() -> None:
    names = {
        SearchRequest(cache=Path("c.zarr"), **asked).study_name  # type: ignore[arg-type]
        for asked in (
            {},
            {"seed": 2},
            {"space": "published"},
            {"space": "my/wide.toml"},
            {"sampler": "tpe"},
            {"objective": "pareto"},
            {"val": "ood/near/letters"},
            {
                "study": "mine",
                "space": "my/wide.toml",
                "sampler": "tpe",
                "objective": "fpr95",
                "val": "csid/x",
                "seed": 3,
            },
        )
    }
    assert names == {
        *("nac-seed1", "nac-seed2", "nac-published-seed1", "nac-wide-seed1", "nac-tpe-seed1", "nac-pareto-seed1"),
        *("nac-ood-near-letters-seed1", "mine-wide-tpe-fpr95-csid-x-seed3"),
    }
