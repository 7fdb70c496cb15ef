"""The one thing to try after a search: which rule speaks, and with which numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nacpipe.cache import Cache
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import source_of
from nacpipe.tuning.advice import Findings, advise
from nacpipe.tuning.request import SearchRequest, SearchResult
from nacpipe.tuning.runner import run
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import CrossValidation, ValidationMetrics

EVEN = {"layer3": 0.4, "layer3:gradient": 0.1, "avgpool": 0.3, "logits": 0.2}
IMAGES = {"id/train": 1000, "id/val": 2000, "ood/val": 3000}


def find(
    *,
    val: float = 0.95,
    over_images: float = 0.94,
    over_classes: float = 0.94,
    guide: float | None = 0.93,
    subtrain: tuple[float, float] = (0.5, 0.5),
    weights: Mapping[str, float] = EVEN,
    crossed: bool = True,
    split: str = "ood/val",
    **findings: Any,
) -> str:
    """The advice on a result in which nothing stands out but what is given."""
    result = SearchResult(
        params=NacParams(
            layers={
                name: LayerParams(bins=4, saturation=1, alpha=1.0, weight=weight, source=source_of(name))
                for name, weight in weights.items()
            }
        ),
        checks=ValidationMetrics(val_auroc=val, val_fpr95=0.1, subtrain_auroc=subtrain[0]),
        guide=None if guide is None else "GEN",
        guide_val=guide,
        guide_subtrain=None if guide is None else subtrain[1],
        cross_validated=CrossValidation(images=over_images, clusters=over_classes, guide=guide) if crossed else None,
        alone={},
        trials=100,
        seconds=1.0,
        seed=1,
        ended="trials",
    )
    given = {"cache": "c.zarr", "val": split, "made_val": False, "python": False, "images": IMAGES, **findings}
    return advise(Findings(result=result, **given))


COMPARE = "compare them on the test sets: nacpipe evaluate c.zarr --against GEN"
GAP_IMAGES = "95.00 % AUROC fitted, 93.40 % on images that were left out"


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ({}, ""),
        ({"guide": None}, ""),
        ({"guide": 1.0, "val": 1.0, "crossed": False}, ""),
        (
            {"guide": 0.94},
            f"GEN in NAC's place: its AUROC is 94.00 %, NAC's 94.00 % (cross-validated); {COMPARE}",
        ),
        (
            {"guide": 0.96, "crossed": False},
            f"GEN in NAC's place: its AUROC is 96.00 %, NAC's 95.00 % (on the validation pair); {COMPARE}",
        ),
        (
            {"guide": 0.94, "output": "my p.json"},
            "GEN in NAC's place: its AUROC is 94.00 %, NAC's 94.00 % (cross-validated); compare them on the test sets:"
            " nacpipe evaluate c.zarr --params 'my p.json' --against GEN",
        ),
        (
            {"over_images": 0.934, "split": "ood/near/a", "images": {**IMAGES, "ood/near/a": 3000}},
            f"fewer terms: {GAP_IMAGES}; nacpipe search c.zarr --layers layer3,avgpool --val ood/near/a --study fewer",
        ),
        ({"guide": 0.945, "crossed": False}, ""),
        ({"over_images": 0.9351, "over_classes": 0.9351}, ""),
        (
            {"over_classes": 0.92},
            "OOD images of more kinds in ood/val: 95.00 % AUROC fitted, 92.00 % on classes of it that were left out",
        ),
        (
            {"over_classes": 0.92, "made_val": True},
            "real OOD images in ood/val: 95.00 % AUROC fitted, 92.00 % on classes of it that were left out",
        ),
        (
            {"over_images": 0.934},
            f"fewer terms: {GAP_IMAGES}; nacpipe search c.zarr --layers layer3,avgpool --study fewer",
        ),
        (
            {"over_images": 0.934, "images": {**IMAGES, "ood/val": 999}},
            f"more images in ood/val, which has 999: {GAP_IMAGES}",
        ),
        (
            {"subtrain": (0.46, 0.5)},
            "more images in id/train, which has 1000 (extract: --train-images 2000): NAC tells training images from"
            " others more than 3 points better than GEN does",
        ),
        (
            {"subtrain": (0.46, 0.5), "python": True},
            "more images in id/train, which has 1000: NAC tells training images from others more than 3 points better"
            " than GEN does",
        ),
        ({"subtrain": (0.48, 0.5)}, ""),
        (
            {"images": {**IMAGES, "id/val": 200, "ood/val": 300}},
            "more validation images: from 200 of id/val and 300 of ood/val, the AUROC has a standard error of 1.1"
            " points",
        ),
        (
            {"at_edge": "avgpool.alpha is 0.1, at the end of 0.1 … 10 in s.toml"},
            "a wider range: avgpool.alpha is 0.1, at the end of 0.1 … 10 in s.toml",
        ),
        (
            {"best_place": 0.9, "longer": "nacpipe search c.zarr --trials 200"},
            "more trials: the best was among the last tenth of 100; nacpipe search c.zarr --trials 200",
        ),
        ({"best_place": 0.89}, ""),
        (
            {"weights": {"layer3": 0.5, "layer3:gradient": 0.4, "avgpool": 0.1}},
            "other layers (extract: --layers A,B; nacpipe layers NAME lists them): layer3 has 90 % of the weight of 2"
            " layers",
        ),
        ({"weights": {"layer3": 0.89, "avgpool": 0.11}}, ""),
        (
            {"weights": {"avgpool": 1.0}, "python": True},
            "other layers (extract: layers=): avgpool was searched alone",
        ),
        (
            {"made_val": True},
            "real OOD images in ood/val, in place of those that are made from id/val (extract: --redo ood/val)",
        ),
        (
            {"made_val": True, "python": True},
            "real OOD images in ood/val, in place of those that are made from id/val (extract: redo=['ood/val'])",
        ),
    ],
)
def test_what_is_advised(findings: dict[str, Any], expected: str) -> None:
    assert find(**findings) == expected


def test_the_worst_finding_speaks() -> None:
    """All at once, and then without the worst, one after another."""
    worst: list[dict[str, Any]] = [
        {"guide": 0.99},
        {"over_images": 0.9, "over_classes": 0.9, "guide": 0.8},
        {"subtrain": (0.3, 0.5)},
        {"images": {"id/train": 100, "id/val": 50, "ood/val": 50}},
        {"at_edge": "here"},
        {"best_place": 0.99},
        {"weights": {"avgpool": 1.0}},
        {"made_val": True},
    ]
    first_words = []
    while worst:
        together = {key: value for finding in reversed(worst) for key, value in finding.items()}
        first_words.append(find(**together)[:12])
        worst.pop(0)
    assert first_words == [
        "GEN in NAC's",
        "more images ",
        "more images ",
        "more validat",
        "a wider rang",
        "more trials:",
        "other layers",
        "real OOD ima",
    ]


def test_a_search_is_advised_once_it_has_its_trials(small_cache: Cache, tmp_path: Path) -> None:
    """With fewer trials than asked for, the command that goes on is the next thing."""
    asked = SearchRequest(cache=small_cache.path, space="paper", storage=str(tmp_path / "s.log"), trials=5)
    search = Search(asked)
    result = run(search)
    assert result.advice == (
        f"MSP in NAC's place: its AUROC is {100 * (result.guide_val or 0):.2f} %, NAC's"
        f" {100 * result.checks.val_auroc:.2f} % (on the validation pair); compare them on the test sets: nacpipe"
        f" evaluate {small_cache.path} --against MSP"
    )
    assert "advice" not in result.to_json()
    later = Search(SearchRequest(cache=small_cache.path, space="paper", storage=str(tmp_path / "s.log"), trials=6))
    assert later.result("stopped").advice == ""


@pytest.fixture
def large_cache(make_cache: Callable[..., Cache], tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "large.zarr", rows={"id/val": 1200, "ood/val": 1200})


def test_what_a_search_knows_of_its_ranges_and_trials(large_cache: Cache, tmp_path: Path) -> None:
    """Of two values for the bins, each is an end of the range."""
    space = tmp_path / "s.toml"
    space.write_text("[default]\nbins = { low = 8, high = 9 }\nsaturation = 5\n[layers.avgpool]\n")
    asked: dict[str, Any] = {"cache": large_cache.path, "objective": "auroc", "storage": str(tmp_path / "s.log")}
    found = Search(SearchRequest(space=str(space), trials=40, **asked))
    result = run(found)
    findings = found._findings(result, found.completed())
    bins = result.params.layers["avgpool"].bins
    assert findings.at_edge == f"avgpool.bins is {bins}, at the end of 8 … 9 in {space}"
    assert findings.images == {"id/train": 60, "id/val": 1200, "ood/val": 1200}
    assert not findings.made_val
    values = [trial.value for trial in found.completed()]
    assert findings.best_place == values.index(max(values)) / 40
    assert f" --trials 80 --space {space} --objective auroc " in findings.longer
