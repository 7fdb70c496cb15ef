"""docs/how-it-works.md: the score that its program computes by hand is nacpipe's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe import LayerParams, NacParams, score_splits, write_params
from nacpipe.cache.reader import Cache

PAGE = (Path(__file__).resolve().parents[1] / "docs/how-it-works.md").read_text("utf-8")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bins", [10, 51, 330])
def test_the_score_by_hand_is_the_score(
    bins: int, make_cache: Callable[..., Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "own.zarr")
    params = NacParams(layers={"avgpool": LayerParams(bins=bins, saturation=5, alpha=0.5)})
    write_params(tmp_path / "own.params.json", params)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    for split, scores in score_splits(cache, params, ["id/val", "ood/val"]).items():
        np.testing.assert_allclose(names["score_by_hand"](split), scores, rtol=0, atol=1e-12)
        assert np.ptp(scores) > 0.1
