"""An exported detector as a record: all that turns a network's states into scores, without the network.

    {"nacpipe_detector": 1, "layers": [{"name", "path", "pooling", "params": {…}}, …], "threshold": …, "keep": …,
     "classes": …, "outputs": …, "train_rows": …, "keep_bits": …, "identity": {…}, "information": {…}}
    and per layer two arrays: borders (bins,) float32 and counts (neurons, bins − 1)

What comes from a file is checked here, number by number: it may be anyone's.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nacpipe.benchmarks.standard import INTERPOLATIONS, Transform
from nacpipe.errors import DetectorError, ParamsError
from nacpipe.files import write_whole
from nacpipe.method.coverage import layer_of
from nacpipe.method.outputs import OUTPUTS
from nacpipe.method.params import LayerParams, layer_from_json
from nacpipe.text import command_line

VERSION = 1
MAX_CLASSES, MAX_SIDE = 1_000_000, 4096
_SHA256 = re.compile("[0-9a-f]{64}")

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedLayer:
    """One layer's coverage: where to tap, where its bins are and how full they got."""

    name: str
    path: str
    """The module's path inside the network; empty for the logits."""
    pooling: str
    """How the output becomes one number per neuron, as in the cache."""
    params: LayerParams
    borders: NDArray[np.float32]
    """(bins,), of the product: −∞ first, +∞ last, ascending."""
    counts: NDArray[np.int32]
    """(neurons, bins − 1), training samples per bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A detector without its network."""

    layers: tuple[ExportedLayer, ...]
    """Those of a weight above 0."""
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

    @property
    def transform(self) -> Transform:
        """How images are prepared for the network."""
        return _transform(self.identity.get("transform"))

    def to_json(self) -> dict[str, Any]:
        """Return everything but the arrays, ready for json.dumps."""
        return {
            "nacpipe_detector": VERSION,
            "layers": [
                {"name": one.name, "path": one.path, "pooling": one.pooling, "params": asdict(one.params)}
                for one in self.layers
            ],
            **{_STORED_AS.get(name, name): getattr(self, name) for name in (*_WHOLE, "threshold", "keep")},
            "identity": dict(self.identity),
            "information": dict(self.information),
        }

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, counts as narrow as they can be."""
        found: dict[str, NDArray[Any]] = {}
        for one in self.layers:
            found[f"{one.name}/borders"] = one.borders
            found[f"{one.name}/counts"] = one.counts.astype(_narrow(int(one.counts.max())))
        return found

    @classmethod
    def from_json(cls, data: Any, arrays: Arrays) -> Exported:
        """Read what `to_json` and `to_arrays` return.

        Raises:
            DetectorError: anything is not as it must be, naming it and the value.
        """
        if not isinstance(data, dict) or "nacpipe_detector" not in data:
            raise DetectorError("it is no exported detector")
        if (version := data["nacpipe_detector"]) != VERSION:
            raise DetectorError(
                f"it has version {_show(version)}, this nacpipe reads version {VERSION}; use the nacpipe that wrote it,"
                " or export again with: nacpipe export CACHE"
            )
        whole = {name: _whole(data, _STORED_AS.get(name, name), *limits) for name, limits in _WHOLE.items()}
        threshold, keep = _real(data, "threshold"), _real(data, "keep")
        if not 0 < keep <= 1:
            raise DetectorError(f"keep is {keep}; it must be above 0 and at most 1")
        entries = data.get("layers")
        if not isinstance(entries, list) or not entries:
            raise DetectorError("it has no layers")
        layers = tuple(_layer(entry, arrays, whole["train_rows"]) for entry in entries)
        names = [one.name for one in layers]
        if len(set(names)) < len(names):
            raise DetectorError("two of its layers have one name")
        if len({(layer_of(one.name), one.path, one.pooling) for one in layers}) > len({layer_of(n) for n in names}):
            raise DetectorError("two states of one of its layers have another path or pooling")
        if unknown := sorted(set(arrays) - {f"{n}/{what}" for n in names for what in ("borders", "counts")}):
            raise DetectorError(f"array {unknown[0]!r} belongs to no layer")
        identity, information = (_object(data, name) for name in ("identity", "information"))
        if not (isinstance(weights := identity.get("weights"), str) and _SHA256.fullmatch(weights)):
            raise DetectorError(f"the sha256 of its network's weights is {_show(weights)}")
        if (dtype := identity.get("dtype")) not in ("float32", "bf16"):
            raise DetectorError(f"its network's dtype is {_show(dtype)}; known: float32, bf16")
        if (given := identity.get("outputs", "logits")) not in OUTPUTS:
            raise DetectorError(f"its network gives {_show(given)}; known: {', '.join(OUTPUTS)}")
        _transform(identity.get("transform"))
        return cls(
            layers=layers, threshold=threshold, keep=keep, identity=identity, information=information, **whole
        )  # fmt: skip


_WHOLE = {
    "classes": (2, MAX_CLASSES),
    "outputs": (1, MAX_CLASSES),
    "train_rows": (1, 2**31 - 1),
    "mantissa_bits": (1, 23),
}
_STORED_AS = {"mantissa_bits": "keep_bits"}  # the name of a number in version 1, where it is another


def _layer(entry: Any, arrays: Arrays, train_rows: int) -> ExportedLayer:
    if not isinstance(entry, dict) or set(entry) != {"name", "path", "pooling", "params"}:
        raise DetectorError("a layer is not {name, path, pooling, params}")
    for key in ("name", "path", "pooling"):
        if not isinstance(entry[key], str):
            raise DetectorError(f"a layer's {key} is {_show(entry[key])}; it must be text")
    name = entry["name"]
    try:
        params = layer_from_json(name, entry["params"])
    except ParamsError as error:
        raise DetectorError(str(error)) from None
    if params.weight == 0:
        raise DetectorError(f"layer {name!r} has weight 0; a detector holds only layers that count")
    borders, counts = (_array(arrays, name, what) for what in ("borders", "counts"))
    if borders.dtype != np.float32 or borders.shape != (params.bins,):
        raise DetectorError(
            f"layer {name!r}: borders are {borders.dtype} {borders.shape}; wanted: float32 ({params.bins},)"
        )
    if not (borders[0] == -np.inf and borders[-1] == np.inf and bool((borders[:-1] <= borders[1:]).all())):
        raise DetectorError(f"layer {name!r}: borders do not ascend from −∞ to +∞")
    narrow = counts.dtype in (np.uint8, np.uint16, np.int32)
    if not narrow or counts.ndim != 2 or counts.shape[0] == 0 or counts.shape[1] != params.bins - 1:
        raise DetectorError(
            f"layer {name!r}: counts are {counts.dtype} {counts.shape}; wanted: uint8, uint16 or int32"
            f" (neurons, {params.bins - 1})"
        )
    totals = counts.sum(axis=1, dtype=np.int64)
    if int(counts.min()) < 0 or bool((totals != train_rows).any()):
        wrong = int(np.argmax((totals != train_rows) | (counts.min(axis=1) < 0)))
        raise DetectorError(
            f"layer {name!r}: the counts of neuron {wrong} add up to {totals[wrong]}, or one is below 0;"
            f" {train_rows} samples were counted"
        )
    return ExportedLayer(
        name=name, path=entry["path"], pooling=entry["pooling"], params=params, borders=borders,
        counts=counts.astype(np.int32),
    )  # fmt: skip


def _array(arrays: Arrays, layer: str, what: str) -> NDArray[Any]:
    if (found := arrays.get(f"{layer}/{what}")) is None:
        raise DetectorError(f"layer {layer!r}: its {what} are not there")
    return found


def _narrow(largest: int) -> type[np.uint8 | np.uint16 | np.int32]:
    return np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.int32


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


_DTYPES = ("F32", "U8", "U16", "I32")


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
