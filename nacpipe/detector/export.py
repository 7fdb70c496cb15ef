"""A cache and parameters → an exported detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.detector.file import FUSED, Exported, keep_scores
from nacpipe.errors import DetectorError, InputError
from nacpipe.method.metrics import KEEP, choose_threshold
from nacpipe.method.params import NacParams
from nacpipe.method.term import LOGITS
from nacpipe.scoring.coverage import fit_coverage
from nacpipe.scoring.states import has_classes
from nacpipe.version import __version__

MAX_BYTES = 64 * 10**6  # of a detector's arrays


def export_detector(cache: Cache, params: NacParams, keep: float = KEEP) -> Exported:
    """Count the coverage of id/train and choose the threshold on id/val. Terms of weight 0 are left out.

    Args:
        cache: with id/train and id/val.
        params: for its layers.
        keep: the share of id/val that shall not be flagged.

    Raises:
        InputError: keep is no share.
        ParamsError: a layer is not in the cache.
        ValuesError: id/val is empty.
        DetectorError: what would be written could not be read: a network of one class, images of 2 or 4 channels, …;
            or it is larger than `MAX_BYTES`.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; it must be above 0 and at most 1")
    coverage, header = fit_coverage(cache, params.used()), cache.header
    validation = coverage.score(cache["id/val"])
    embeds = not has_classes(cache)
    terms = tuple(coverage.layers.values())
    layers = dict.fromkeys(fitted.term.layer for fitted in terms)
    made = Exported(
        terms=terms,
        fused=coverage.fused,
        taps=tuple(header.layer(name) for name in layers if name != LOGITS),
        threshold=choose_threshold(validation, keep),
        keep=keep,
        classes=int(cache["id/train"].label.max()) + 1 if embeds else header.classes,
        outputs=header.classes,
        train_rows=cache["id/train"].rows,
        mantissa_bits=header.mantissa_bits,
        identity={**header.identity, "splits": {name: dict(cache[name].images) for name in ("id/train", "id/val")}},
        validation=keep_scores(validation),
        cache_layers=tuple(layer.path for layer in header.layers),
        information={"nacpipe": __version__, "cache": cache.path, "extraction": dict(header.information)},
    )
    try:
        arrays = made.to_arrays()
        _check_size(made, arrays)
        return Exported.from_json(made.to_json(), arrays)
    except DetectorError as error:
        raise DetectorError(f"{cache.path} cannot be exported: {error}") from None


def _check_size(made: Exported, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a detector that is too large to take away.

    Raises:
        DetectorError: naming its size and its largest term.
    """
    sizes = {
        fitted.name: sum(array.nbytes for name, array in arrays.items() if name.startswith(f"{fitted.name}/"))
        for fitted in made.terms
    }
    fused = sum(array.nbytes for name, array in arrays.items() if name.startswith(f"{FUSED}."))
    if (total := sum(sizes.values()) + fused) > MAX_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise DetectorError(
            f"its arrays have {total / 1e6:.0f} MB, at most {MAX_BYTES / 1e6:.0f} are written; the largest term is"
            f" {largest!r} with {sizes[largest] / 1e6:.0f} MB of {made.train_rows} training images in"
            f" {next(f.params.bins for f in made.terms if f.name == largest)} bins; give that term fewer bins or weight"
            " 0 in a copy of the parameters, and export again with --params COPY"
        )
