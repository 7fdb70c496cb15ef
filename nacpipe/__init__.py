"""Neuron activation coverage: finds the images on which a trained classifier should not be trusted.

Searching and evaluating need no torch. Large libraries are imported at first use:

    cache = nacpipe.open_cache("cache/digits-digits_cnn.zarr")
    cache["id/val"]["avgpool"].activation[:]                    # (samples, neurons) float32
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nacpipe.version import __version__

if TYPE_CHECKING:
    from nacpipe.cache import Cache, open_cache
    from nacpipe.detector.module import Detector, load_detector
    from nacpipe.detector.scoring import score
    from nacpipe.errors import NacError
    from nacpipe.evaluation.bootstrap import add_confidence, compare_methods
    from nacpipe.evaluation.drift import watch
    from nacpipe.evaluation.latex import to_latex
    from nacpipe.evaluation.method_scores import score_cache
    from nacpipe.evaluation.score_files import save_scores
    from nacpipe.evaluation.tables import evaluate, evaluate_runs, tabulate
    from nacpipe.extraction.library import extract
    from nacpipe.method.metrics import detect
    from nacpipe.method.params import LayerParams, NacParams
    from nacpipe.reporting.library import Report, inspect, report
    from nacpipe.scoring.coverage import score_splits
    from nacpipe.scoring.params_file import read_params, write_params
    from nacpipe.tuning.library import tune
    from nacpipe.tuning.objective import Objective
    from nacpipe.tuning.request import SearchResult
    from nacpipe.tuning.samplers import GridSampler, LayerwiseSampler, TermwiseSampler

_HOMES = {
    "Cache": "nacpipe.cache",
    "open_cache": "nacpipe.cache",
    "LayerParams": "nacpipe.method.params",
    "NacParams": "nacpipe.method.params",
    "detect": "nacpipe.method.metrics",
    "read_params": "nacpipe.scoring.params_file",
    "write_params": "nacpipe.scoring.params_file",
    "score_splits": "nacpipe.scoring.coverage",
    "evaluate": "nacpipe.evaluation.tables",
    "evaluate_runs": "nacpipe.evaluation.tables",
    "score_cache": "nacpipe.evaluation.method_scores",
    "tabulate": "nacpipe.evaluation.tables",
    "to_latex": "nacpipe.evaluation.latex",
    "add_confidence": "nacpipe.evaluation.bootstrap",
    "compare_methods": "nacpipe.evaluation.bootstrap",
    "save_scores": "nacpipe.evaluation.score_files",
    "inspect": "nacpipe.reporting.library",
    "report": "nacpipe.reporting.library",
    "Report": "nacpipe.reporting.library",
    "NacError": "nacpipe.errors",
    "watch": "nacpipe.evaluation.drift",
    "extract": "nacpipe.extraction.library",
    "Detector": "nacpipe.detector.module",
    "tune": "nacpipe.tuning.library",
    "SearchResult": "nacpipe.tuning.request",
    "load_detector": "nacpipe.detector.module",
    "score": "nacpipe.detector.scoring",
    "Objective": "nacpipe.tuning.objective",
    "LayerwiseSampler": "nacpipe.tuning.samplers",
    "GridSampler": "nacpipe.tuning.samplers",
    "TermwiseSampler": "nacpipe.tuning.samplers",
}

__all__ = [
    "Cache",
    "Detector",
    "GridSampler",
    "LayerParams",
    "LayerwiseSampler",
    "NacError",
    "NacParams",
    "Objective",
    "Report",
    "SearchResult",
    "TermwiseSampler",
    "__version__",
    "add_confidence",
    "compare_methods",
    "detect",
    "evaluate",
    "evaluate_runs",
    "extract",
    "inspect",
    "load_detector",
    "open_cache",
    "read_params",
    "report",
    "save_scores",
    "score",
    "score_cache",
    "score_splits",
    "tabulate",
    "to_latex",
    "tune",
    "watch",
    "write_params",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nacpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
