"""What the row NAC is, in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nacpipe.cache import Cache
from nacpipe.method.feature_scores import FusedScore
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.published import PUBLISHED
from nacpipe.scoring.params_file import write_params
from nacpipe.scoring.params_summary import describe_params, summarise_choice, summarise_params

ONE = LayerParams(bins=20, saturation=5, alpha=0.5)
HINT = "NAC-UE as published: nacpipe search CACHE --space paper"


def described(fused: FusedScore | None = None, **layers: LayerParams) -> str:
    names = {name.replace("__", ":"): layer for name, layer in layers.items()}
    return describe_params([summarise_params(NacParams(layers=names, fused=fused))])


def test_as_published_is_told_by_the_parameters_alone() -> None:
    assert described(a=ONE, b=ONE) == "as published (2 layers, equal weights)"
    fitted = replace(ONE, weight=0.5)
    assert described(a=ONE, b=fitted) == "as published (2 layers, weights fitted, equal in the paper)"
    assert described(a=ONE, b=replace(ONE, weight=0.0)) == "as published (1 layer, equal weights)"


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"a": ONE, "a__by_class": ONE}, "2 terms of 1 layer"),
        ({"a": ONE, "logits": ONE}, "2 terms of 2 layers"),
        ({"a": replace(ONE, source="activation")}, "1 term of 1 layer"),
        ({"a": replace(ONE, edges="linear")}, "1 term of 1 layer"),
        ({"a": ONE, "a__product": ONE}, "2 terms of 1 layer"),
    ],
)
def test_what_is_not_as_published(layers: dict[str, LayerParams], told: str) -> None:
    assert described(**layers) == f"{told}; {HINT}"


def test_a_fused_score_is_named() -> None:
    fused = FusedScore(method="ViM", weight=0.1, mean=0.0, deviation=1.0)
    assert described(fused, a=ONE) == f"1 term of 1 layer, and ViM; {HINT}"
    assert described(replace(fused, weight=0.0), a=ONE) == "as published (1 layer, equal weights)"


def write(path: Path, params: NacParams, **made_by: Any) -> str:
    options = {"space": "auto"}
    write_params(path, params, made_by={"objective": "guided", "options": options, **made_by}, result=RESULT)
    return str(path)


RESULT = {"trials": 2701, "seed": 1}
TWO = NacParams(layers={"avgpool": ONE, "avgpool:by_class": ONE})


def test_what_the_file_says(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    found = summarise_choice(cache, TWO, write(tmp_path / "p.json", TWO, val="ood/val"))
    chosen = "2 terms of 1 layer, chosen on id/val and {} (guided, 2,701 trials, seed {})"
    assert describe_params([found]) == f"{chosen.format('ood/val', 1)}; {HINT}"
    assert found.describe_source() == (
        f"parameters {tmp_path}/p.json, space auto, objective guided, 2,701 trials, seed 1, chosen on id/val and"
        " ood/val"
    )
    made = replace(found, made_val=True)
    assert describe_params([made]) == f"{chosen.format('ood/val, which is made of id/val', 1)}; {HINT}"
    forward = "NAC-UE as published needs gradients: extract without --no-gradient"
    assert describe_params([replace(found, gradients=False)]) == f"{chosen.format('ood/val', 1)}; {forward}"


def test_runs_are_told_together(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    first = summarise_choice(cache, TWO, write(tmp_path / "p.json", TWO))
    second = replace(first, terms=45, layers=8, fused="ViM", trials=2690, seed=2)
    assert describe_params([first, second]) == (
        "2 to 45 terms of 1 to 8 layers, and no feature score or ViM, chosen on id/val and ood/val"
        f" (guided, 2,690 to 2,701 trials, seeds 1 and 2); {HINT}"
    )


def test_the_papers_own_and_a_file_without_a_record(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    params = PUBLISHED["cifar10", "resnet"]
    paper = summarise_choice(cache, params, "published")
    assert describe_params([paper]) == "as published (4 layers, equal weights), with the paper's parameters"
    assert paper.describe_source() == "parameters of the paper"
    write_params(tmp_path / "p.json", params)
    plain = summarise_choice(cache, params, str(tmp_path / "p.json"))
    assert describe_params([plain]) == "as published (4 layers, equal weights)"
    assert plain.describe_source() == f"parameters {tmp_path}/p.json, no record of how they were chosen"
