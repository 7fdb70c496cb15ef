"""Neuron activation coverage: which images should a trained classifier not be trusted on?

The search side needs no torch and nothing heavy is imported before it is used:

    cache = nacpipe.open_cache("cache/digits-digits_cnn.zarr")
    cache["id/val"]["avgpool"].activation[:]                    # (samples, neurons) float32
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nacpipe.artifact import read_params, write_params
    from nacpipe.cache import Cache, open_cache
    from nacpipe.core.metrics import detect
    from nacpipe.core.params import LayerParams, NacParams
    from nacpipe.errors import NacError
    from nacpipe.network.detector import load_detector
    from nacpipe.search.bootstrap import add_confidence, compare_methods
    from nacpipe.search.evaluate import evaluate, evaluate_runs
    from nacpipe.search.samples import save_scores
    from nacpipe.search.scored import score_cache
    from nacpipe.search.scoring import score_splits
    from nacpipe.search.tables import tabulate

__version__ = "0.1.0"

_HOMES = {
    "Cache": "nacpipe.cache",
    "open_cache": "nacpipe.cache",
    "LayerParams": "nacpipe.core.params",
    "NacParams": "nacpipe.core.params",
    "detect": "nacpipe.core.metrics",
    "read_params": "nacpipe.artifact",
    "write_params": "nacpipe.artifact",
    "score_splits": "nacpipe.search.scoring",
    "evaluate": "nacpipe.search.evaluate",
    "evaluate_runs": "nacpipe.search.evaluate",
    "score_cache": "nacpipe.search.scored",
    "tabulate": "nacpipe.search.tables",
    "add_confidence": "nacpipe.search.bootstrap",
    "compare_methods": "nacpipe.search.bootstrap",
    "save_scores": "nacpipe.search.samples",
    "NacError": "nacpipe.errors",
    "load_detector": "nacpipe.network.detector",
}

__all__ = [
    "Cache",
    "LayerParams",
    "NacError",
    "NacParams",
    "__version__",
    "add_confidence",
    "compare_methods",
    "detect",
    "evaluate",
    "evaluate_runs",
    "load_detector",
    "open_cache",
    "read_params",
    "save_scores",
    "score_cache",
    "score_splits",
    "tabulate",
    "write_params",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nacpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
