"""The scripts in docs/ run, and say what the command says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_evaluate(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"csid/blurred": 25})
    layers = {
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5),
        "layer1": LayerParams(bins=9, saturation=3, alpha=1),
    }
    write_params(tmp_path / "c.params.json", NacParams(layers=layers))
    command = [sys.executable, "-W", "error", str(ROOT / "docs/examples/evaluate.py"), cache.path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "c.scores.npz").exists()
    rows = json.loads(CliRunner().invoke(main, ["evaluate", cache.path, "--json"]).stdout)
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[:6] if line}
    for method in ("NAC", "MSP", "MaxLogit", "Energy"):
        found = {
            r["group"]: r["auroc"] for r in rows if (r["task"], r["dataset"], r["method"]) == ("ood", "mean", method)
        }
        assert [float(word) for word in lines[method]] == [round(found[group], 6) for group in ("far", "near")]
