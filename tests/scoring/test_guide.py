"""The best plain score of a cache, by the metric's own word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nacpipe.cache import Cache
from nacpipe.method.metrics import auroc
from nacpipe.method.plain_scores import energy, entropy, gen, max_logit, msp
from nacpipe.scoring.guide import choose_guide


def test_the_one_with_the_highest_auroc(small_cache: Cache) -> None:
    plain = {"MSP": msp, "MaxLogit": max_logit, "Energy": energy, "Entropy": entropy, "GEN": gen}
    for val in ("ood/val", "ood/far/textures"):
        splits = ("id/subtrain", "id/val", val)
        logits = {name: small_cache[name].read("logits") for name in splits}
        values = {name: auroc(score(logits["id/val"]), score(logits[val])) for name, score in plain.items()}
        guide = choose_guide(small_cache, splits, val)
        assert guide is not None
        assert values[guide.name] == max(values.values())
        assert list(guide.scores) == list(splits)
        for name in splits:
            np.testing.assert_array_equal(guide.scores[name], plain[guide.name](logits[name]))


def test_features_have_none(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "f.zarr", identity={"outputs": "features"})
    assert choose_guide(cache, ("id/val", "ood/val"), "ood/val") is None
