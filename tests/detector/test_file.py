"""An exported detector may be anyone's file: every number in it is checked, and the message names what is wrong."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nacpipe.cache import LayerSpec
from nacpipe.detector.file import MAX_DETECTOR_BYTES, Exported, read_detector, write_detector
from nacpipe.errors import DetectorError, InputError
from nacpipe.method.fitted_term import FittedTerm
from nacpipe.method.params import LayerParams

INF = np.float32(np.inf)
GOOD: dict[str, Any] = {
    "nacpipe_detector": 1,
    "layers": [
        {
            "name": "avgpool",
            "path": "avgpool",
            "pooling": "sum-nchw",
            "params": {"bins": 4, "saturation": 2, "alpha": 1.0, "weight": 1.0, "edges": "log", "source": "product"},
        }
    ],
    "threshold": 0.5,
    "keep": 0.95,
    "classes": 3,
    "outputs": 3,
    "train_rows": 300,
    "keep_bits": 23,
    "identity": {
        "weights": "0123456789abcdef" * 4,
        "dtype": "float32",
        "transform": {"resize": 8, "crop": 8, "mean": [0.5], "std": [0.5]},
    },
    "information": {},
}


NEW: dict[str, Any] = {  # the same in version 2
    **{key: value for key, value in GOOD.items() if key != "layers"},
    "nacpipe_detector": 2,
    "taps": [{"name": "avgpool", "path": "avgpool", "pooling": "sum-nchw", "neurons": 2}],
    "terms": [{"name": "avgpool", "params": GOOD["layers"][0]["params"]}],
}


def arrays() -> dict[str, Any]:
    return {
        "avgpool/borders": np.array([-INF, 0, 1, INF], np.float32),
        "avgpool/counts": np.array([[100, 200, 0], [300, 0, 0]], np.uint16),
    }


def test_round_trip_and_narrow_counts() -> None:
    exported = Exported.from_json(GOOD, arrays())
    assert exported.to_json() == NEW
    assert exported.terms[0].counts.tolist() == [[100, 200, 0], [300, 0, 0]]
    assert {key: a.dtype for key, a in exported.to_arrays().items()} == {
        "avgpool/borders": np.float32,
        "avgpool/counts": np.uint16,
    }


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.int32)]
)
def test_counts_are_as_narrow_as_they_can_be(largest: int, dtype: type, tmp_path: Path) -> None:
    fitted = FittedTerm(
        name="a",
        params=LayerParams(bins=4, saturation=1, alpha=1.0),
        borders=arrays()["avgpool/borders"],
        table=np.array([[largest, 0, 0]], np.int32),
    )
    tap = LayerSpec(name="a", path="a", pooling="none", neurons=1)
    good = Exported.from_json(GOOD, arrays())
    made = Exported(
        **{
            **{f: getattr(good, f) for f in Exported.__slots__},
            "terms": (fitted,),
            "taps": (tap,),
            "train_rows": largest,
        }
    )
    assert made.to_arrays()["a/counts"].dtype == dtype
    write_detector(tmp_path / "d", made)
    assert read_detector(tmp_path / "d").terms[0].counts.tolist() == [[largest, 0, 0]]


def change(path: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def do(data: dict[str, Any], _: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            data = data[int(key) if key.isdigit() else key]
        data[last] = value

    return do


def array(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, found: found.update({name: value})


def second_layer(
    weight: float, name: str = "layer1", path: str = "avgpool"
) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def do(data: dict[str, Any], found: dict[str, Any]) -> None:
        (layer,) = data["layers"]
        params = {**layer["params"], "weight": weight}
        data["layers"].append({**layer, "name": name, "path": path, "params": params})
        found.update({key.replace("avgpool", name): value for key, value in arrays().items()})

    return do


def grey(channels: int) -> dict[str, Any]:
    return {"resize": 8, "crop": 8, "mean": [0.5] * channels, "std": [0.5] * channels}


NAN = float("nan")
WRONG = [
    (change("nacpipe_detector", 5), "it has version 5, this nacpipe reads versions 1 to 4"),
    (change("threshold", NAN), "threshold is nan; it must be a finite number"),
    (change("threshold", True), "threshold is True"),
    (change("threshold", 10**400), "threshold is 1000"),
    (change("keep", 0.0), r"keep is 0\.0"),
    (change("classes", 1), "classes is 1; it must be a whole number from 2 to 1000000"),
    (change("outputs", 3.0), r"outputs is 3\.0"),
    (change("keep_bits", 24), "keep_bits is 24"),
    (change("train_rows", 0), "train_rows is 0"),
    (change("layers", []), "it has no layers"),
    (change("layers", [GOOD["layers"][0]] * 2), "two of its terms have one name"),
    (second_layer(1.0, "avgpool:product", "elsewhere"), "two states of one of its layers have another path or pooling"),
    (change("layers.0.path", 3), "a layer's path is 3; it must be text"),
    (change("layers.0.extra", 3), "a layer is not"),
    (change("layers.0.params.bins", 5), r"borders are float32 \(4,\); wanted: float32 \(5,\)"),
    (change("layers.0.params.alpha", NAN), "layer 'avgpool': alpha is nan"),
    (change("layers.0.params.weight", -1), "weight is -1"),
    (change("layers.0.params.weight", 0), "layer 'avgpool' has weight 0; a detector holds only layers that count"),
    (second_layer(0.0), "layer 'layer1' has weight 0"),
    (change("identity.weights", "abc"), "sha256 of its network's weights is 'abc'"),
    (change("identity.dtype", "int8"), "dtype is 'int8'"),
    (change("identity", []), r"identity is \[\], not an object"),
    (change("identity.transform", None), "its transform is None"),
    (change("identity.transform.crop", 10**6), "its transform is"),
    (change("identity.transform.crop", 8.0), "its transform is"),
    (change("identity.transform.std", [0.0]), "its transform is"),
    (change("identity.transform.std", [NAN]), "its transform is"),
    (change("identity.transform.mean", [0.1, 0.2]), "its transform is"),
    (
        change("identity.transform", grey(2)),
        r"its images have 2 channels; files are prepared as grey \(1\) or RGB \(3\)",
    ),
    (change("identity.transform.mean", ["0"]), "its transform is"),
    (change("identity.transform.interpolation", "nearest"), "its transform is"),
    (change("identity.transform.more", 1), "its transform is"),
    (array("avgpool/borders", np.array([-INF, 1, 0, INF], np.float32)), "borders do not ascend from"),
    (array("avgpool/borders", np.array([-INF, 0, NAN, INF], np.float32)), "borders do not ascend from"),
    (array("avgpool/borders", np.array([0, 0, 1, INF], np.float32)), "borders do not ascend from"),
    (array("avgpool/borders", np.array([0, 0, 1, 2], np.int32)), "borders are int32"),
    (array("avgpool/counts", np.array([[300, 0]], np.uint16)), r"counts are uint16 \(1, 2\)"),
    (array("avgpool/counts", np.zeros((0, 3), np.uint16)), r"counts are uint16 \(0, 3\)"),
    (array("avgpool/counts", np.array([[1.0, 0, 0]], np.float32)), "counts are float32"),
    (array("avgpool/counts", np.array([[300, 0, 0], [300, 0, 1]], np.uint16)), "counts of neuron 1 add up to 301"),
    (array("avgpool/counts", np.array([[301, -1, 0]], np.int32)), "a count of neuron 0 is below 0"),
    (array("layer9/counts", np.array([[1]], np.uint8)), "array 'layer9/counts' belongs to no term"),
    (lambda _, found: found.pop("avgpool/counts"), "layer 'avgpool': its counts are not there"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_named(spoil: Callable[[Any, Any], None], message: str, tmp_path: Path) -> None:
    data, found = copy.deepcopy(GOOD), arrays()
    spoil(data, found)
    with pytest.raises(DetectorError, match=message):
        Exported.from_json(data, found)
    save_file(found, tmp_path / "d", metadata={"nacpipe_detector": json.dumps(data)})
    with pytest.raises(DetectorError, match=str(tmp_path / "d")) as raised:
        read_detector(tmp_path / "d")
    assert "\n" not in raised.value.one_line()
    assert len(raised.value.one_line()) < 600


# --- version 2 --------------------------------------------------------------------------------------------------------

TERM_PARAMS = GOOD["layers"][0]["params"]
VIEWS: dict[str, Any] = {
    **NEW,
    "train_rows": 5,
    "taps": [{"name": "a", "path": "a", "pooling": "none", "neurons": 2}],
    "terms": [
        {"name": "a:by_class", "params": TERM_PARAMS},
        {"name": "a:components", "params": TERM_PARAMS},
        {"name": "logits", "params": TERM_PARAMS},
    ],
}


def view_arrays() -> dict[str, Any]:
    """Two groups of 3 and 2 images, two neurons; one component of two neurons; three logits."""
    borders = np.array([-INF, 0, 1, INF], np.float32)
    return {
        "class_groups": np.array([0, 1, 1], np.int32),
        "a:by_class/borders": borders,
        "a:by_class/counts": np.array([3, 1, 2, 2, 1, 1], np.uint8),
        "a:by_class/starts": np.array([0, 1, 3, 4, 6], np.uint8),
        "a:by_class/bins": np.array([2, 0, 1, 1, 0, 2], np.uint8),
        "a:components/borders": borders,
        "a:components/counts": np.array([[5, 0, 0]], np.uint8),
        "a:components/mean": np.array([0.5, 1.0], np.float32),
        "a:components/matrix": np.array([[2.0], [1.0]], np.float32),
        "logits/borders": borders,
        "logits/counts": np.array([[5, 0, 0], [0, 5, 0], [0, 0, 5]], np.uint8),
    }


def test_views_are_read() -> None:
    exported = Exported.from_json(VIEWS, view_arrays())
    by_class, components, logits = exported.terms
    assert by_class.counts.tolist() == [[0, 2, 3], [2, 2, 1]]
    assert [fitted.neurons for fitted in exported.terms] == [2, 2, 3]
    # values (−1, 0.5) are in bins 0 and 1: group 0 has 0 and 2 there, group 1 has 0 and 0
    values = np.array([[-1.0, 0.5]] * 2, np.float32)
    assert by_class.sum_entries(values, np.eye(3, dtype=np.float32)[[0, 2]]).tolist() == [2, 0]
    assert components.sum_entries(np.array([[0.0, 0.0], [0.5, 1.5]], np.float32)).tolist() == [2, 0]  # −2 and 0.5
    assert logits.groups is None
    assert exported.to_json() == VIEWS
    again = Exported.from_json(exported.to_json(), exported.to_arrays())
    assert again.terms[0].counts.tolist() == by_class.counts.tolist()
    assert exported.cache_layers == ()
    more = Exported.from_json({**VIEWS, "cache_layers": ["a", "0.b"]}, view_arrays())
    assert more.cache_layers == ("a", "0.b")
    assert more.to_json() == {**VIEWS, "cache_layers": ["a", "0.b"]}


WRONG_VIEWS = [
    (change("taps", None), "its taps are None, not a list"),
    (change("taps", []), "term 'a:by_class': its layer is not among the taps"),
    (change("taps.0.more", 1), "a tap is not {name, path, pooling, neurons}"),
    (change("taps.0.neurons", 3), "term 'a:by_class' is of 2 neurons; its layer has 3"),
    (change("taps", [VIEWS["taps"][0]] * 2), "two of its taps have one name"),
    (change("taps", [*VIEWS["taps"], {**VIEWS["taps"][0], "name": "b"}]), "tap 'b' is of no term"),
    (change("outputs", 4), "term 'logits' is of 3 neurons; its layer has 4"),
    (change("terms", []), "it has no terms"),
    (change("cache_layers", "a"), "its cache_layers are 'a'; they must be module paths"),
    (change("terms.0.more", 1), "a term is not {name, params}"),
    (change("terms.0.name", "a:product:by_clas"), "term 'a:product:by_clas' has the view 'by_clas'; known: plain, by_"),
    (change("classes", 4), r"class_groups are int32 \(3,\); wanted: int32 \(4,\), a group for every class"),
    (array("class_groups", np.array([0, 1, 64], np.int32)), "class_groups are not all from 0 to 63"),
    (array("class_groups", np.array([0, -1, 1], np.int32)), "class_groups are not all from 0 to 63"),
    (array("class_groups", np.array([0, 1, 2], np.int32)), "counts have 4 rows, not as many for each of 3 groups"),
    (lambda _, found: found.pop("class_groups"), "'a:by_class': it is counted by class, and there are no class_groups"),
    (lambda _, found: found.pop("a:by_class/bins"), "layer 'a:by_class': its bins are not there"),
    (array("a:by_class/starts", np.array([0, 1, 3, 4, 5], np.uint8)), "starts do not ascend from 0 to the 6 counts"),
    (array("a:by_class/starts", np.array([0, 3, 1, 4, 6], np.uint8)), "starts do not ascend"),
    (array("a:by_class/starts", np.array([[0, 6]], np.uint8)), r"starts are uint8 \(1, 2\); wanted"),
    (array("a:by_class/bins", np.array([2, 0, 1, 1, 0, 3], np.uint8)), "bins do not ascend from 0 to at most 2 in"),
    (array("a:by_class/bins", np.array([2, 1, 1, 1, 0, 2], np.uint8)), "bins do not ascend"),
    (array("a:by_class/bins", np.array([2, 0, 1, 1, 0, -1], np.int32)), "bins do not ascend"),
    (array("a:by_class/counts", np.array([3, 1, 2, 2, 2, 0], np.uint8)), "counts are not 6 numbers above 0"),
    (array("a:by_class/counts", np.array([3, 1, 2, 2, 1], np.uint8)), "counts are not 6 numbers above 0"),
    (
        array("a:by_class/counts", np.array([3, 1, 1, 2, 1, 2], np.uint8)),
        "a group's neurons add up to different numbers",
    ),
    (change("train_rows", 6), "layer 'a:by_class': the counts of neuron 0 add up to 5; 6 samples were counted"),
    (lambda _, found: found.pop("a:components/mean"), "layer 'a:components': its mean is not there"),
    (array("a:components/mean", np.zeros(3, np.float32)), r"mean is float32 \(3,\); wanted: float32 \(2,\)"),
    (
        array("a:components/matrix", np.zeros((2, 2), np.float32)),
        r"matrix is float32 \(2, 2\); wanted: float32 \(2, 1\)",
    ),
    (array("a:components/matrix", np.full((2, 1), NAN, np.float32)), "matrix is not finite"),
    (array("logits/mean", np.zeros(3, np.float32)), "layer 'logits': it has a mean or a matrix, which only components"),
    (array("b/mean", np.zeros(3, np.float32)), "array 'b/mean' belongs to no term"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG_VIEWS, ids=[message[:40] for _, message in WRONG_VIEWS])
def test_what_is_wrong_in_version_2_is_named(spoil: Callable[[Any, Any], None], message: str, tmp_path: Path) -> None:
    data, found = copy.deepcopy(VIEWS), view_arrays()
    spoil(data, found)
    with pytest.raises(DetectorError, match=message):
        Exported.from_json(data, found)


def test_version_1_has_no_views() -> None:
    data = copy.deepcopy(GOOD)
    data["layers"][0]["name"] = "avgpool:components"
    found = {key.replace("avgpool", "avgpool:components"): value for key, value in arrays().items()}
    found |= {
        "avgpool:components/mean": np.zeros(2, np.float32),
        "avgpool:components/matrix": np.eye(2, dtype=np.float32),
    }
    with pytest.raises(DetectorError, match=r"^layer 'avgpool:components': version 1 has no views$"):
        Exported.from_json(data, found)


# --- the file ---------------------------------------------------------------------------------------------------------


def good_bytes(tmp_path: Path) -> bytes:
    write_detector(tmp_path / "good", Exported.from_json(GOOD, arrays()))
    return (tmp_path / "good").read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\x80\x04pickle", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}", b"\0" * 64],
)
def test_other_files_are_no_detectors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(DetectorError, match=rf"^{tmp_path / 'd'}(:| cannot be read as a detector: ).+"):
        read_detector(tmp_path / "d")


def test_files_that_are_not_there_too_large_or_folders(tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match=r"there is no detector .*nosuch; make one with: nacpipe export CACHE"):
        read_detector(tmp_path / "nosuch")
    with pytest.raises(DetectorError, match="cannot be read as a detector"):
        read_detector(tmp_path)
    (tmp_path / "a b.zarr").mkdir()
    (tmp_path / "a b.zarr/zarr.json").write_text("{}")
    with pytest.raises(DetectorError, match=r"a b\.zarr: it is a cache; make a .* nacpipe export '.*/a b\.zarr'$"):
        read_detector(tmp_path / "a b.zarr")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MAX_DETECTOR_BYTES + 1)
    with pytest.raises(DetectorError, match=f"it has {MAX_DETECTOR_BYTES + 1} bytes"):
        read_detector(tmp_path / "large")
    with pytest.raises(InputError, match="cannot be written"):
        write_detector(tmp_path / "no" / "such", Exported.from_json(GOOD, arrays()))


@pytest.mark.parametrize("text", ['{"nacpipe_detector": NaN}', "[" * 100_000, "1" * 5000, "{", "null", "{}"])
def test_metadata_that_is_no_detector(text: str, tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "d", metadata={"nacpipe_detector": text})
    with pytest.raises(DetectorError, match=str(tmp_path / "d")):
        read_detector(tmp_path / "d")


def test_arrays_of_other_types_are_not_read(tmp_path: Path) -> None:
    save_file({**arrays(), "more": np.zeros(2, np.int64)}, tmp_path / "d", metadata={"nacpipe_detector": "{}"})
    with pytest.raises(DetectorError, match="array 'more' is I64; known: F64, F32, U8, U16, I32"):
        read_detector(tmp_path / "d")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(place: float, bit: int, cut: bool, tmp_path: Path) -> None:
    content = bytearray(good_bytes(tmp_path))
    at = int(place * len(content))
    content[at] ^= 1 << bit
    (tmp_path / "d").write_bytes(content[:at] if cut else content)
    try:
        found = read_detector(tmp_path / "d")
    except DetectorError as error:
        assert str(error).startswith(str(tmp_path / "d"))
        return
    assert not cut
    assert found.terms[0].counts.sum(axis=1).tolist() == [found.train_rows] * 2
