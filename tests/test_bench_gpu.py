"""bench/gpu.py on a CPU: every part runs there, so that the one who has a GPU finds no typing errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bench(*options: str) -> tuple[int, list[list[str]], str]:
    """Return the exit code, the table's cells and all that was printed."""
    words = [sys.executable, str(ROOT / "bench/gpu.py"), "--small", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=540)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return done.returncode, rows[1:], done.stdout + done.stderr


@pytest.mark.slow
def test_every_part_runs_on_a_cpu() -> None:
    code, rows, text = bench("--device", "cpu")
    assert code == 0, text
    printed = {row[0].removeprefix("| "): row[2] for row in rows}
    assert [row[1] for row in rows] == [
        f"`python bench/gpu.py --only {part}`"
        for part in ("states", "taps", "taps", "taps", "detector", "same", "whole", "auroc", "memory")
    ]
    assert printed["resnet20, fp32: the CPU's states against the device's, 4 images"].startswith(
        "largest relative difference 0.0e+00"  # the CPU is the device
    )
    assert printed["resnet20, fp32, 8 images extracted twice"] == "12 of 12 arrays have the same bytes"
    assert printed["a batch that exceeds the GPU's memory"] == "not measured: it needs CUDA"
    whole = next(text for what, text in printed.items() if "24 JPEGs of 500 × 375" in what)
    assert whole.endswith("GPU busy not measured")
    assert all(name in whole for name in ("decoding ", "the network ", "writing "))
    assert next(text for what, text in printed.items() if what.startswith("digits")) == "largest difference 0.000000"


@pytest.mark.slow
def test_parts_for_which_time_does_not_suffice_are_skipped_and_named() -> None:
    code, rows, text = bench("--device", "cpu", "--minutes", "0", "--only", "same,auroc")
    assert code == 0, text
    assert [row[0] for row in rows] == ["| same", "| auroc"]
    assert {row[2] for row in rows} == {"skipped: 0 minutes do not suffice for it"}


@pytest.mark.slow
def test_without_a_gpu_it_says_how_to_try_it() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, rows, text = bench()
    assert (code, rows) == (1, [])
    assert text == "torch finds no GPU here; --device cpu --small tries the parts on a CPU\n"
