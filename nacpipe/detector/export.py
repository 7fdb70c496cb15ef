"""A cache and parameters → an exported detector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import nacpipe
from nacpipe.cache import Cache, LayerSpec
from nacpipe.detector.file import Exported, ExportedLayer
from nacpipe.errors import DetectorError, InputError, ValuesError
from nacpipe.method.coverage import LOGITS, layer_of
from nacpipe.method.params import NacParams
from nacpipe.scoring.coverage import fit_coverage
from nacpipe.scoring.states import has_classes


def export_detector(cache: Cache, params: NacParams, keep: float = 0.95) -> Exported:
    """Count the coverage of id/train and choose the threshold on id/val. Layers of weight 0 are left out.

    Args:
        cache: with id/train and id/val.
        params: for its layers.
        keep: the share of id/val that shall not be flagged.

    Raises:
        InputError: keep is no share.
        ParamsError: a layer is not in the cache.
        ValuesError: id/val is empty.
        DetectorError: what would be written could not be read: a network of one class, images of 2 or 4 channels, …
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; it must be above 0 and at most 1")
    used = replace(params, layers={name: layer for name, layer in params.layers.items() if layer.weight > 0})
    coverage, header = fit_coverage(cache, used), cache.header
    validation = coverage.score(cache["id/val"])
    embeds = not has_classes(cache)
    specs = {spec.name: spec for spec in header.layers}
    specs[LOGITS] = LayerSpec(name=LOGITS, path="", pooling="none", neurons=header.classes)
    made = Exported(
        layers=tuple(
            ExportedLayer(
                name=name,
                path=specs[layer_of(name)].path,
                pooling=specs[layer_of(name)].pooling,
                params=fitted.params,
                borders=fitted.borders,
                counts=fitted.counts,
            )
            for name, fitted in coverage.layers.items()
        ),
        threshold=choose_threshold(validation, keep),
        keep=keep,
        classes=int(cache["id/train"].label.max()) + 1 if embeds else header.classes,
        outputs=header.classes,
        train_rows=cache["id/train"].rows,
        mantissa_bits=header.mantissa_bits,
        identity={**header.identity, "splits": {name: dict(cache[name].images) for name in ("id/train", "id/val")}},
        information={"nacpipe": nacpipe.__version__, "cache": cache.path, "extraction": dict(header.information)},
    )
    try:
        return Exported.from_json(made.to_json(), made.to_arrays())
    except DetectorError as error:
        raise DetectorError(f"{cache.path} cannot be exported: {error}") from None


def choose_threshold(scores: NDArray[np.float64], keep: float) -> float:
    """Return the highest score t such that at least this share of the scores (samples,) is ≥ t.

    Raises:
        ValuesError: there are no scores.
    """
    if scores.size == 0:
        raise ValuesError("there are no id/val scores to choose a threshold from")
    kept = int(np.ceil(round(keep * scores.size, 6)))  # 0.07 · 100 is a little more than 7
    return float(np.sort(scores)[scores.size - max(kept, 1)])
