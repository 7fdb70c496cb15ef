"""The share of images that an exported detector would flag, beside the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache, open_cache
from nacpipe.cli import main
from nacpipe.cli.export import export
from nacpipe.detector.export import export_detector
from nacpipe.evaluation.flagged import add_flagged, describe_flagged
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.evaluation.tables import evaluate, evaluate_runs, tabulate
from nacpipe.method.metrics import KEEP
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import score_splits
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=0.6137),
        "layer1": LayerParams(bins=21, saturation=9, alpha=2.0, weight=0.2291),
    }
)
SPLITS = ["id/test", "csid/blurred", "ood/near/letters", "ood/far/faces", "ood/far/textures"]
WHAT = "flagged by NAC at the threshold of nacpipe export, which keeps 95 % of id/val: "


@pytest.fixture(scope="module")
def runs(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    folder, rows = tmp_path_factory.mktemp("flagged"), {"csid/blurred": 25, "ood/far/faces": 40}
    return [
        make_cache(folder / f"s{seed}.zarr", rows=rows, seed=seed, identity={"weights": f"{seed:064x}"})
        for seed in (0, 1)
    ]


def by_the_detector(cache: Cache) -> dict[str, float]:
    threshold = export_detector(cache, PARAMS).threshold
    return {name: float((s < threshold).mean()) for name, s in score_splits(cache, PARAMS, SPLITS).items()}


def test_the_share_is_the_exported_detector_s(runs: list[Cache]) -> None:
    assert next(option.default for option in export.params if option.name == "keep") == KEEP
    expected = by_the_detector(runs[0])
    frame = evaluate(runs[0], PARAMS)
    assert frame.attrs["flagged"] == expected
    assert list(expected) == SPLITS
    assert 0 < expected["id/test"] < 0.2 < expected["ood/near/letters"] < 1
    names = ["id/test", "csid/blurred", "near letters", "far faces", "far textures"]
    shares = ", ".join(f"{n} {100 * s:.2f} %" for n, s in zip(names, expected.values(), strict=True))
    assert describe_flagged(frame) == [WHAT + shares]
    assert describe_flagged(evaluate(runs[0], None)) == []


def test_of_runs_the_mean_and_the_deviation(runs: list[Cache]) -> None:
    """Each with the threshold of its own id/val."""
    first, second = (by_the_detector(run) for run in runs)
    frame = evaluate_runs(runs, [PARAMS, PARAMS])
    assert frame.attrs["flagged"] == pytest.approx({name: (first[name] + second[name]) / 2 for name in SPLITS})
    spread = {name: abs(first[name] - second[name]) / 2 for name in SPLITS}
    assert frame.attrs["flagged_std"] == pytest.approx(spread)
    mean, deviation = 100 * frame.attrs["flagged"]["ood/far/faces"], 100 * spread["ood/far/faces"]
    assert f", far faces {mean:.2f} ± {deviation:.2f} %, " in describe_flagged(frame)[0]


def test_in_json_a_field_of_nac_s_rows(runs: list[Cache]) -> None:
    shares = by_the_detector(runs[0])
    write_params(file := Path(runs[0].path).with_name("p.json"), PARAMS)
    asked = ["evaluate", runs[0].path, "--params", str(file)]
    rows = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    full = (50 * shares["id/test"] + 25 * shares["csid/blurred"]) / 75
    for row in rows:
        if row["method"] != "NAC":
            assert (row["flagged"], row["flagged_id"]) == (None, None)
            continue
        sets = [
            s for s in SPLITS if s.startswith(f"ood/{row['group']}/") and row["dataset"] in ("mean", s.split("/")[2])
        ]
        assert row["flagged"] == pytest.approx(np.mean([shares[s] for s in sets]))
        assert row["flagged_id"] == pytest.approx(shares["id/test"] if row["task"] == "ood" else full)
    assert "flagged" not in CliRunner().invoke(main, [*asked, "--csv"]).stdout


@pytest.mark.parametrize("kept", [0, 40])
def test_without_id_val_it_is_left_out(make_cache: Callable[..., Cache], tmp_path: Path, kept: int) -> None:
    """Not there, and not finished; in a table of several runs, of one of them."""
    make_cache(tmp_path / "c.zarr", rows={"id/val": kept})
    reason = "the cache holds no id/val"
    if kept:
        file = tmp_path / "c.zarr/id/val/zarr.json"
        content = json.loads(file.read_text())
        content["attributes"].update(sealed=False, digest=None)
        file.write_text(json.dumps(content))
        reason = "id/val is not finished"
    run = score_cache(open_cache(tmp_path / "c.zarr"), PARAMS)
    frame = tabulate([run])
    assert describe_flagged(frame) == [f"{WHAT[:-2]}: left out, {reason}"]
    assert add_flagged(frame)[["flagged", "flagged_id"]].isna().all(axis=None)
    assert tabulate([run, run]).attrs["flagged_reason"] == f"{run.path}: {reason}"
    write_params(tmp_path / "c.params.json", PARAMS)
    asked = ["evaluate", run.path, "--params", str(tmp_path / "c.params.json")]
    printed = CliRunner().invoke(main, asked)
    assert printed.exit_code == 0, printed.output
    assert f"left out, {reason}\n" in printed.stdout
    assert f"left out, {reason}\n" in CliRunner().invoke(main, [*asked, "--json"]).stderr
