"""Caches of networks that give probabilities, or their logarithms: MSP holds, what needs logits is empty."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import nacpipe.cache.writer as append
from nacpipe.cache import Cache
from nacpipe.cache.validation import root_problems
from nacpipe.cli import main
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import Exported
from nacpipe.errors import DetectorError, ParamsError
from nacpipe.evaluation.inspection import rank_rows
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.evaluation.model_selection import rank_checkpoints
from nacpipe.evaluation.tables import evaluate
from nacpipe.method.outputs import OUTPUTS, as_logits, why_no_logits
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import energy, msp
from nacpipe.reporting.report import check_overfitting, score_selection
from nacpipe.scoring.coverage import fit_coverage
from nacpipe.scoring.params_file import write_params
from nacpipe.scoring.states import check_layers, has_classes, has_logits, held_layers, outputs_of

PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})
KINDS = ("probabilities", "log-probabilities")
ROWS = {"id/train": 40, "id/subtrain": 0, "ood/far/textures": 0}


def convert(logits: NDArray[np.float32], outputs: str) -> NDArray[np.float32]:
    log = logits.astype(np.float64) - energy(logits)[:, None]
    return (np.exp(log) if outputs == "probabilities" else log).astype(np.float32)


@pytest.fixture(scope="module")
def caches(write_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Cache]:
    """The same network with logits, probabilities and their logarithms."""
    made: dict[str, Cache] = {}
    write = append.CacheWriter.write_block
    for outputs in ("logits", *KINDS):
        with pytest.MonkeyPatch.context() as patch:
            if outputs != "logits":
                patch.setattr(
                    append.CacheWriter,
                    "write_block",
                    lambda self, name, block, arrays, outputs=outputs: write(
                        self, name, block, {**arrays, "logits": convert(arrays["logits"], outputs)}
                    ),
                )
            identity = {} if outputs == "logits" else {"outputs": outputs}
            path = tmp_path_factory.mktemp("outputs") / f"{outputs}.zarr"
            made[outputs] = write_cache(path, rows=ROWS, identity=identity)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("outputs", KINDS)
def test_accuracy_and_msp_are_those_of_the_logits(caches: Mapping[str, Cache], outputs: str) -> None:
    cache = caches[outputs]
    assert (outputs_of(cache), has_logits(cache), has_classes(cache)) == (outputs, False, True)
    found, expected = score_cache(cache, PARAMS), score_cache(caches["logits"], PARAMS)
    assert found.correct == expected.correct
    assert list(found.methods) == list(expected.methods) == ["NAC", "MSP", "MaxLogit", "Energy"]
    for split in ("id/test", "ood/near/letters"):
        for method in ("NAC", "MSP"):
            np.testing.assert_allclose(
                found.methods[method].scores[split], expected.methods[method].scores[split], rtol=1e-5
            )
    reason = f"what this network gives are {outputs}, not logits"
    for method in ("MaxLogit", "Energy"):
        assert found.methods[method].scores == {}
        assert set(found.methods[method].reasons.values()) == {reason}
    assert found.note == f"MaxLogit, Energy are left empty: {reason}"
    frame, other = evaluate(cache, PARAMS), evaluate(caches["logits"], PARAMS)
    assert frame["accuracy"].equals(other["accuracy"])
    for method, empty in (("MSP", False), ("Energy", True), ("MaxLogit", True)):
        assert frame.loc[frame["method"] == method, "auroc"].isna().all() == empty


@pytest.mark.parametrize("outputs", KINDS)
def test_energy_is_no_yardstick(caches: Mapping[str, Cache], tmp_path: Path, outputs: str) -> None:
    """In search, report and evaluate."""
    cache = caches[outputs]
    files = ["--storage", str(tmp_path / "s.log"), "--output", str(tmp_path / "p.json")]
    done = CliRunner().invoke(main, ["search", cache.path, "--trials", "3", *files])
    assert done.exit_code == 0, done.output
    assert "Energy" not in done.output
    assert "id/val against ood/val: AUROC " in done.stdout
    result = json.loads((tmp_path / "p.json").read_text())["result"]
    assert (result["guide"], result["guide_val_auroc"], result["overfits"]) == (None, None, False)
    assert list(check_overfitting(cache, score_selection(cache, fit_coverage(cache, PARAMS)))["method"]) == ["NAC"]
    write_params(tmp_path / "mine.json", PARAMS)
    done = CliRunner().invoke(main, ["evaluate", cache.path, "--params", str(tmp_path / "mine.json")])
    assert done.stderr == f"MaxLogit, Energy are left empty: {why_no_logits(outputs)}\n"
    assert f"\nempty: MaxLogit, Energy: {why_no_logits(outputs)}\n" in done.stdout
    assert "ranks first of 2 by AUROC" in done.stdout or "ranks second of 2 by AUROC" in done.stdout


@pytest.mark.parametrize("outputs", KINDS)
def test_the_largest_is_the_prediction(caches: Mapping[str, Cache], outputs: str) -> None:
    """Where rows and checkpoints are ranked."""
    cache, logits = caches[outputs], caches["logits"]
    ours, theirs = (rank_rows(one, "id/val", PARAMS) for one in (cache, logits))
    assert ours["predicted"].tolist() == theirs["predicted"].tolist()
    assert set(ours["predicted"]) == {0, 1, 2}
    params = LayerParams(bins=20, saturation=5, alpha=0.5)
    areas = [rank_checkpoints([one], params=params).checkpoints["area_avgpool"].tolist() for one in (cache, logits)]
    assert areas[0] == areas[1]


@pytest.mark.parametrize("outputs", KINDS)
def test_outputs_are_no_layer_of_logits(caches: Mapping[str, Cache], outputs: str) -> None:
    assert held_layers(caches[outputs]) == ["avgpool", "layer1"]
    with pytest.raises(ParamsError, match=r"layer 'logits' is not in .*; it holds avgpool, layer1;"):
        check_layers(caches[outputs], ["logits"])


@pytest.mark.parametrize("outputs", KINDS)
def test_a_detector_knows_the_word(caches: Mapping[str, Cache], outputs: str) -> None:
    exported = export_detector(caches[outputs], PARAMS)
    assert (exported.identity["outputs"], exported.classes, exported.outputs) == (outputs, 3, 3)
    data, arrays = exported.to_json(), exported.to_arrays()
    data["identity"] = {**data["identity"], "outputs": "guesses"}
    message = r"^its network gives 'guesses'; known: logits, features, probabilities, log-probabilities$"
    with pytest.raises(DetectorError, match=message):
        Exported.from_json(data, arrays)


def test_the_format_knows_the_words(caches: Mapping[str, Cache]) -> None:
    for cache in caches.values():
        assert list(root_problems(cache.header)) == []
    header = caches["probabilities"].header
    for outputs in (*OUTPUTS, "guesses"):
        changed = type(header)(**{
            **{name: getattr(header, name) for name in header.__dataclass_fields__},
            "identity": {**header.identity, "outputs": outputs},
        })  # fmt: skip
        expected = ["identity.outputs is 'guesses', none of logits, features, probabilities, log-probabilities"]
        assert list(root_problems(changed)) == (expected if outputs == "guesses" else [])


def test_logarithms_are_logits_up_to_a_constant() -> None:
    logits = np.random.RandomState(0).randn(50, 7).astype(np.float32) * 4
    for outputs in ("logits", *KINDS):
        values = logits if outputs == "logits" else convert(logits, outputs)
        found = as_logits(values, outputs)
        np.testing.assert_allclose(found - found[:, :1], logits - logits[:, :1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(msp(found), msp(logits), rtol=1e-5)
    assert np.isfinite(as_logits(np.array([[0.0, 1.0]]), "probabilities")).all()
