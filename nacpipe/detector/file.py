"""An exported detector as a record: all that turns a network's states into scores, without the network.

    {"nacpipe_detector": 2, "taps": [{"name", "path", "pooling", "neurons"}, …], "terms": [{"name", "params": {…}}, …],
     "threshold": …, "keep": …, "classes": …, "outputs": …, "train_rows": …, "keep_bits": …, "identity": {…},
     "information": {…}}

and the arrays of docs/detector.md. Version 1 has layers, each with its path and pooling, in place of taps and terms.
Version 3 is version 2 with a feature score in the sum, `"fused": {"method", "mean", "deviation", "weight"}`; a detector
without one is written as version 2. Version 4 is either of them with `validation_scores`, float64 in ascending order,
from which a score's percentile is read; `fused` may be there or not, and the identity may have `input` in place of
`transform`. `cache_layers`, the module paths of all layers of the cache, may be there in any of them.

What comes from a file is checked here, number by number: it may be anyone's.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nacpipe.benchmarks.standard import INTERPOLATIONS, Transform
from nacpipe.cache import LayerSpec
from nacpipe.detector.term_arrays import ARRAYS, restore_term, store_term
from nacpipe.errors import DetectorError, ParamsError
from nacpipe.files import write_whole
from nacpipe.method.class_groups import MAX_GROUPS, ClassGroups
from nacpipe.method.feature_scores import FittedFusion, field_names, restore_feature_score
from nacpipe.method.fitted_term import FittedTerm
from nacpipe.method.outputs import OUTPUTS
from nacpipe.method.params import fused_from_json, layer_from_json, term_of
from nacpipe.method.term import LOGITS
from nacpipe.text import command_line

VERSION, VERSION_FUSED, VERSION_VALIDATED = 2, 3, 4
MAX_VALIDATION = 10_001  # scores of id/val that are kept: all, or quantiles of so many
MAX_CLASSES, MAX_SIDE, MAX_NEURONS = 1_000_000, 4096, 2**24
FUSED = "fused"  # before a dot, the arrays of a feature score
VALIDATION = "validation_scores"
CLASS_GROUPS = "class_groups"  # an array; a term's have a slash in their names
_SHA256 = re.compile("[0-9a-f]{64}")

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A detector without its network."""

    terms: tuple[FittedTerm, ...]
    """Those of a weight above 0."""
    fused: FittedFusion | None = None
    """The feature score beside them, if there is one; of a weight above 0."""
    taps: tuple[LayerSpec, ...]
    """The layers of the terms but for the logits: where to tap and how to pool."""
    threshold: float
    """The lowest score that counts as ID."""
    keep: float
    """The share of id/val that the threshold was chosen to keep."""
    classes: int
    """What the network was built for."""
    outputs: int
    """Width of its output: `classes`, or that of an embedding."""
    train_rows: int
    """Samples counted in every neuron's bins."""
    mantissa_bits: int
    """Bits of the mantissa that the counted activations and gradients kept."""
    identity: Mapping[str, Any]
    """What it is made from: the cache's identity, and the image lists of id/train and id/val."""
    information: Mapping[str, Any]
    """Versions and origin: shown, never compared."""
    validation: NDArray[np.float64] | None = None
    """Scores of id/val, or quantiles of them, ascending; None in files of earlier versions."""
    cache_layers: tuple[str, ...] = ()
    """Module paths of all layers of the cache, tapped or not; none in files of earlier versions."""

    @property
    def transform(self) -> Transform:
        """How images are prepared for the network.

        Raises:
            DetectorError: its input are no images that nacpipe prepares.
        """
        if self.prepares_input:
            described = self.identity["input"].get("description", "")
            raise DetectorError(f"it takes {described}, no image files; use it from Python: nacpipe.Detector.load")
        return _transform(self.identity.get("transform"))

    @property
    def prepares_input(self) -> bool:
        """Whether the caller prepares the network's input."""
        return self.identity.get("transform") is None and isinstance(self.identity.get("input"), Mapping)

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """The shape of one sample of the counted states, of its first tensor; None: it is not known, or padded."""
        if not self.prepares_input:
            transform = self.transform
            return (len(transform.mean), transform.crop, transform.crop)
        shape, described = self.identity["input"].get("shape"), self.identity["input"].get("description")
        if re.search(r"[( ]length[,)]", str(described)):
            return None
        return tuple(shape) if isinstance(shape, list | tuple) else None

    @property
    def _version(self) -> int:
        if self.validation is not None:
            return VERSION_VALIDATED
        return VERSION if self.fused is None else VERSION_FUSED

    def to_json(self) -> dict[str, Any]:
        """Return everything but the arrays, ready for json.dumps."""
        return {
            "nacpipe_detector": self._version,
            "taps": [asdict(tap) for tap in self.taps],
            "terms": [{"name": fitted.name, "params": asdict(fitted.params)} for fitted in self.terms],
            **{_STORED_AS.get(name, name): getattr(self, name) for name in (*_WHOLE, "threshold", "keep")},
            **({} if self.fused is None else {"fused": asdict(self.fused.params)}),
            **({"cache_layers": list(self.cache_layers)} if self.cache_layers else {}),
            "identity": dict(self.identity),
            "information": dict(self.information),
        }

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, each as narrow as it can be."""
        arrays: dict[str, NDArray[Any]] = {}
        for fitted in self.terms:
            arrays |= {f"{fitted.name}/{what}": array for what, array in store_term(fitted).items()}
        if groups := [fitted.groups for fitted in self.terms if fitted.groups is not None]:
            arrays[CLASS_GROUPS] = groups[0].group_of
        if self.fused is not None:
            own = self.fused.feature_score.arrays()
            arrays |= {f"{FUSED}.{what}": np.ascontiguousarray(array) for what, array in own.items()}
        if self.validation is not None:
            arrays[VALIDATION] = self.validation
        return arrays

    @classmethod
    def from_json(cls, data: Any, arrays: Arrays) -> Exported:
        """Read what `to_json` and `to_arrays` return.

        Raises:
            DetectorError: anything is not as it must be, naming it and the value.
        """
        if not isinstance(data, dict) or "nacpipe_detector" not in data:
            raise DetectorError("it is no exported detector")
        if (version := data["nacpipe_detector"]) not in (1, VERSION, VERSION_FUSED, VERSION_VALIDATED):
            raise DetectorError(
                f"it has version {_show(version)}, this nacpipe reads versions 1 to {VERSION_VALIDATED}; use the"
                " nacpipe that wrote it, or export again with: nacpipe export CACHE"
            )
        whole = {name: _whole(data, _STORED_AS.get(name, name), *limits) for name, limits in _WHOLE.items()}
        threshold, keep = _real(data, "threshold"), _real(data, "keep")
        if not 0 < keep <= 1:
            raise DetectorError(f"keep is {keep}; it must be above 0 and at most 1")
        groups = _class_groups(arrays, whole["classes"])
        terms, taps = (_read_layers if version == 1 else _read_terms)(data, arrays, whole, groups)
        has_fused = version == VERSION_FUSED or (
            version == VERSION_VALIDATED and ("fused" in data or any(name.startswith(f"{FUSED}.") for name in arrays))
        )
        fused = _read_fused(data, arrays, whole) if has_fused else None
        validation = _validation(arrays) if version == VERSION_VALIDATED else None
        names = [fitted.name for fitted in terms]
        known = {f"{name}/{what}" for name in names for what in ARRAYS} | {CLASS_GROUPS}
        if validation is not None:
            known.add(VALIDATION)
        if fused is not None:
            known |= {f"{FUSED}.{what}" for what in field_names(fused.params.method)}
        if unknown := sorted(set(arrays) - known):
            raise DetectorError(f"array {unknown[0]!r} belongs to no term")
        identity, information = (_object(data, name) for name in ("identity", "information"))
        if not (isinstance(weights := identity.get("weights"), str) and _SHA256.fullmatch(weights)):
            raise DetectorError(f"the sha256 of its network's weights is {_show(weights)}")
        if (dtype := identity.get("dtype")) not in ("float32", "bf16", "fp16"):
            raise DetectorError(f"its network's dtype is {_show(dtype)}; known: float32, bf16, fp16")
        if (given := identity.get("outputs", "logits")) not in OUTPUTS:
            raise DetectorError(f"its network gives {_show(given)}; known: {', '.join(OUTPUTS)}")
        given_input = identity.get("input")
        if not (version == VERSION_VALIDATED and "transform" not in identity and isinstance(given_input, dict)):
            _transform(identity.get("transform"))
        cache_layers = data.get("cache_layers", [])
        if not isinstance(cache_layers, list) or not all(isinstance(path, str) for path in cache_layers):
            raise DetectorError(f"its cache_layers are {_show(cache_layers)}; they must be module paths")
        return cls(
            terms=terms, fused=fused, taps=taps, threshold=threshold, keep=keep, identity=identity,
            information=information, validation=validation, cache_layers=tuple(cache_layers), **whole,
        )  # fmt: skip


_WHOLE = {
    "classes": (2, MAX_CLASSES),
    "outputs": (1, MAX_CLASSES),
    "train_rows": (1, 2**31 - 1),
    "mantissa_bits": (1, 23),
}
_STORED_AS = {"mantissa_bits": "keep_bits"}  # the name of a number in version 1, where it is another


def _read_terms(
    data: Mapping[str, Any], arrays: Arrays, whole: Mapping[str, int], groups: ClassGroups | None
) -> tuple[tuple[FittedTerm, ...], tuple[LayerSpec, ...]]:
    """Those of version 2."""
    taps = tuple(_tap(entry) for entry in _list(data, "taps"))
    by_name = {tap.name: tap for tap in taps}
    if len(by_name) < len(taps):
        raise DetectorError("two of its taps have one name")
    entries = _list(data, "terms")
    if not entries:
        raise DetectorError("it has no terms")
    for entry in entries:
        _check_keys("term", entry, ("name", "params"))
    terms = tuple(_term(entry, arrays, whole["train_rows"], groups) for entry in entries)
    _refuse_twins(terms)
    for fitted in terms:
        layer = fitted.term.layer
        if layer != LOGITS and layer not in by_name:
            raise DetectorError(f"term {fitted.name!r}: its layer is not among the taps")
        neurons = whole["outputs"] if layer == LOGITS else by_name[layer].neurons
        if fitted.neurons != neurons:
            raise DetectorError(f"term {fitted.name!r} is of {fitted.neurons} neurons; its layer has {neurons}")
    if unused := sorted(set(by_name) - {fitted.term.layer for fitted in terms}):
        raise DetectorError(f"tap {unused[0]!r} is of no term")
    return terms, taps


def _read_fused(data: Mapping[str, Any], arrays: Arrays, whole: Mapping[str, int]) -> FittedFusion:
    """The feature score of version 3."""
    try:
        params = fused_from_json(data.get("fused"))
    except ParamsError as error:
        raise DetectorError(str(error)) from None
    if params is None or params.weight == 0:
        raise DetectorError("its fused score is not there or has weight 0; a detector holds only what counts")
    own: dict[str, NDArray[Any]] = {}
    for what in field_names(params.method):
        if (array := arrays.get(f"{FUSED}.{what}")) is None:
            raise DetectorError(f"the {what} of its fused {params.method} is not there")
        own[what] = array
    classes = whole["classes"]
    features = next((own[what].size for what in ("mean", "origin") if what in own), 0)
    shapes: dict[str, tuple[int, ...]] = {
        "weight": (classes, features),
        "between": (classes, classes),
        "mean": (features,),
        "origin": (features,),
        "principal": (features, own["principal"].shape[-1] if own.get("principal", _NONE).ndim else 0),
        "alpha": (1,),
    }
    for what, array in own.items():
        dtype = np.dtype(np.float32 if what == "weight" else np.float64)
        if array.dtype != dtype or array.shape != shapes[what] or not array.size:
            raise DetectorError(
                f"the {what} of its fused {params.method} is {array.dtype} {array.shape}; wanted: {dtype}"
                f" {shapes[what]}"
            )
        if not bool(np.isfinite(array).all()):
            raise DetectorError(f"the {what} of its fused {params.method} is not finite")
    if "between" in own and not bool((own["between"] >= 0).all()):
        raise DetectorError(f"the between of its fused {params.method} is below 0")
    return FittedFusion(params=params, feature_score=restore_feature_score(params.method, own))


_NONE = np.empty(())


def _read_layers(
    data: Mapping[str, Any], arrays: Arrays, whole: Mapping[str, int], groups: ClassGroups | None
) -> tuple[tuple[FittedTerm, ...], tuple[LayerSpec, ...]]:
    """Those of version 1: plain terms, each with its layer's path and pooling."""
    entries = _list(data, "layers")
    if not entries:
        raise DetectorError("it has no layers")
    for entry in entries:
        _check_keys("layer", entry, ("name", "path", "pooling", "params"))
    terms = tuple(_term(entry, arrays, whole["train_rows"], groups) for entry in entries)
    _refuse_twins(terms)
    for fitted in terms:
        if fitted.term.view != "plain":
            raise DetectorError(f"layer {fitted.name!r}: version 1 has no views")
    taps: dict[str, LayerSpec] = {}
    for entry, fitted in zip(entries, terms, strict=True):
        layer = fitted.term.layer
        tap = _tap({"name": layer, "path": entry["path"], "pooling": entry["pooling"], "neurons": fitted.neurons})
        if taps.setdefault(layer, tap) != tap:
            raise DetectorError("two states of one of its layers have another path or pooling")
    taps.pop(LOGITS, None)
    return terms, tuple(taps.values())


def _refuse_twins(terms: tuple[FittedTerm, ...]) -> None:
    if len({fitted.name for fitted in terms}) < len(terms):
        raise DetectorError("two of its terms have one name")


def _tap(entry: Any) -> LayerSpec:
    _check_keys("tap", entry, ("name", "path", "pooling", "neurons"))
    for key in ("name", "path", "pooling"):
        if not isinstance(entry[key], str):
            raise DetectorError(f"a layer's {key} is {_show(entry[key])}; it must be text")
    return LayerSpec(
        name=entry["name"],
        path=entry["path"],
        pooling=entry["pooling"],
        neurons=_whole(entry, "neurons", 1, MAX_NEURONS),
    )


def _check_keys(what: str, entry: Any, keys: Sequence[str]) -> None:
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise DetectorError(f"a {what} is not {{{', '.join(keys)}}}")


def _term(entry: Any, arrays: Arrays, train_rows: int, groups: ClassGroups | None) -> FittedTerm:
    if not isinstance(name := entry["name"], str):
        raise DetectorError(f"a layer's name is {_show(name)}; it must be text")
    try:
        params = layer_from_json(name, entry["params"])
        view = term_of(name, params).view
    except ParamsError as error:
        raise DetectorError(str(error)) from None
    if params.weight == 0:
        raise DetectorError(f"layer {name!r} has weight 0; a detector holds only layers that count")
    own = {what: arrays[f"{name}/{what}"] for what in ARRAYS if f"{name}/{what}" in arrays}
    try:
        return restore_term(name, params, own, train_rows, groups if view == "by_class" else None)
    except DetectorError as error:
        raise DetectorError(f"layer {name!r}: {error}") from None


def _validation(arrays: Arrays) -> NDArray[np.float64]:
    scores = arrays.get(VALIDATION)
    if scores is None or scores.dtype != np.float64 or scores.ndim != 1 or not 0 < scores.size <= MAX_VALIDATION:
        found = "not there" if scores is None else f"{scores.dtype} {scores.shape}"
        raise DetectorError(f"its {VALIDATION} are {found}; wanted: float64 (1 to {MAX_VALIDATION},)")
    if not bool(np.isfinite(scores).all()) or bool((np.diff(scores) < 0).any()):
        raise DetectorError(f"its {VALIDATION} are not finite or do not ascend")
    return scores


def keep_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:  # (samples,)
    """Return scores in ascending order; of very many, quantiles."""
    ordered = np.sort(scores)
    if ordered.size <= MAX_VALIDATION:
        return ordered
    return ordered[np.round(np.linspace(0, ordered.size - 1, MAX_VALIDATION)).astype(np.intp)]


def _class_groups(arrays: Arrays, classes: int) -> ClassGroups | None:
    if (group_of := arrays.get(CLASS_GROUPS)) is None:
        return None
    if group_of.dtype != np.int32 or group_of.shape != (classes,):
        raise DetectorError(
            f"{CLASS_GROUPS} are {group_of.dtype} {group_of.shape}; wanted: int32 ({classes},), a group for every class"
        )
    if int(group_of.min()) < 0 or int(group_of.max()) >= MAX_GROUPS:
        raise DetectorError(f"{CLASS_GROUPS} are not all from 0 to {MAX_GROUPS - 1}")
    return ClassGroups(group_of=group_of, count=int(group_of.max()) + 1)


def _transform(data: Any) -> Transform:
    sizes = ("resize", "crop")
    try:
        transform = Transform(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})
        numbers = (*transform.mean, *transform.std)
        good = (
            all(type(getattr(transform, name)) is int and 1 <= getattr(transform, name) <= MAX_SIDE for name in sizes)
            and len(transform.mean) == len(transform.std)
            and all(type(n) in (int, float) and abs(n) < 1e6 for n in numbers)  # neither NaN nor infinite
            and all(n > 0 for n in transform.std)
            and transform.interpolation in INTERPOLATIONS
        )
    except (TypeError, KeyError):
        good = False
    if not good:
        raise DetectorError(f"its transform is {_show(data)}, which is none")
    if (channels := len(transform.mean)) not in (1, 3):
        raise DetectorError(f"its images have {channels} channels; files are prepared as grey (1) or RGB (3)")
    return transform


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(entries := data.get(name), list):
        raise DetectorError(f"its {name} are {_show(entries)}, not a list")
    return entries


def _object(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(found := data.get(name), dict):
        raise DetectorError(f"its {name} is {_show(found)}, not an object")
    return found


def _whole(data: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = data.get(name)
    if type(value) is not int or not low <= value <= high:
        raise DetectorError(f"{name} is {_show(value)}; it must be a whole number from {low} to {high}")
    return value


def _real(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if type(value) not in (int, float) or not abs(value) < 1e300 or not math.isfinite(value):  # type: ignore[arg-type]
        raise DetectorError(f"{name} is {_show(value)}; it must be a finite number")
    return float(value)  # type: ignore[arg-type]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


MAX_DETECTOR_BYTES = 2**30  # a detector is a few MB


_DTYPES = ("F64", "F32", "U8", "U16", "I32")


_KEY = "nacpipe_detector"


def write_detector(path: str | Path, exported: Exported) -> None:
    """Write an exported detector whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(exported.to_json(), allow_nan=False)
    write_whole(path, save(exported.to_arrays(), metadata={_KEY: text}))


def read_detector(path: str | Path) -> Exported:
    """Read an exported detector; nothing in it is ever run.

    Raises:
        DetectorError: it is not there, no such file, or malformed; the message names the file.
    """
    try:
        if (Path(path) / "zarr.json").is_file():
            raise DetectorError(f"it is a cache; make a detector of it with: {command_line('export', path)}")
        if (size := os.path.getsize(path)) > MAX_DETECTOR_BYTES:
            raise DetectorError(f"it has {size} bytes; at most {MAX_DETECTOR_BYTES} are read")
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise DetectorError("it is no exported detector")
            arrays = {}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    raise DetectorError(f"array {name!r} is {dtype}; known: {', '.join(_DTYPES)}")
                arrays[name] = file.get_tensor(name)
        return Exported.from_json(json.loads(text, parse_constant=_refuse), arrays)
    except FileNotFoundError:
        raise DetectorError(f"there is no detector {path}; make one with: nacpipe export CACHE") from None
    except DetectorError as error:
        raise DetectorError(f"{path}: {error}") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DetectorError(f"{path} cannot be read as a detector: {said}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
