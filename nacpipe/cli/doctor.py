"""`nacpipe doctor`: what is installed, what is missing, and a self-test; for bug reports."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from nacpipe.cli.output import format_bytes, print_json, print_line
from nacpipe.version import __version__

# Extra → the modules by which it is known to be installed; pyproject.toml says which package each comes from.
EXTRAS = {
    "extract": ("torch", "torchvision", "PIL"),
    "demo": ("mlxtend", "sklearn", "skimage", "matplotlib"),
    "report": ("matplotlib", "jinja2"),
    "score": ("pyarrow", "obstore"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "remote": ("obstore",),
    "data": ("gdown",),
    "timm": ("timm",),
    "cmaes": ("cmaes",),
    "postgresql": ("psycopg",),
    "mysql": ("pymysql",),
    "pytorch-ood": ("pytorch_ood",),
}
PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "zarr",
    "numcodecs",
    "optuna",
    "sqlalchemy",
    "pandas",
    "safetensors",
    "click",
    "pillow",
    "torch",
    "torchvision",
)
# What changes threads, devices or the arithmetic; nothing that holds a path or a name.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMBA_DISABLE_JIT",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "WORLD_SIZE",
)


@click.command()
@click.option("--no-test", is_flag=True, help="Leave the self-test out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(no_test: bool, as_json: bool) -> None:
    """Print versions, devices, threads and missing extras, and run a self-test; exit code 1 if it fails.

    Paste what it prints into a bug report. It reads no file of yours and sends nothing.

    \b
    nacpipe doctor
    nacpipe doctor --no-test --json
    """
    facts = {**_versions(), **_devices()}
    installed = {extra: not _missing(extra) for extra in EXTRAS}
    if as_json:
        checks = [] if no_test else _self_test()
        print_json({**facts, "extras": installed, "self_test": [dict(check) for check in checks]})
    else:
        for name, value in facts.items():
            print_line(f"{name:<12} {value}")
        print_line(f"{'extras':<12} {', '.join(extra for extra, there in installed.items() if there) or 'none'}")
        for extra, there in installed.items():
            if not there:
                print_line(f"{'missing':<12} {extra}: pip install 'nacpipe[{extra}]'  ({', '.join(_missing(extra))})")
        checks = [] if no_test else _self_test()
        for check in checks:
            print_line(f"{'self-test':<12} {check['what']}: {check['result']} ({check['seconds']:.1f} s)")
    if any(check["result"].startswith("failed") for check in checks):
        sys.exit(1)


def _versions() -> dict[str, str]:
    import importlib.metadata
    import platform

    facts = {
        "nacpipe": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _devices() -> dict[str, str]:
    """The devices that a network can run on, and the threads of each stage."""
    from nacpipe.method.threads import get_threads

    facts = {
        "cores": f"{os.cpu_count()}, {_usable_cores()} of them for this process",
        "processor": _processor(),
        "memory": _memory(),
        "threads": f"search {get_threads()}",
        "environment": " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none set",
    }
    if _missing("extract"):
        return {**facts, "devices": "none: torch is not installed"}
    import torch

    devices = ["cpu", *(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        **facts,
        "threads": f"{facts['threads']}, torch {torch.get_num_threads()}",
        "devices": ", ".join(devices),
        "cuda": _cuda(torch.version.cuda, torch.cuda.is_available()),
    }


def _cuda(built_for: str | None, there: bool) -> str:
    if built_for is None:
        return "torch was built without it"
    return f"{built_for}, which torch was built for" + ("" if there else "; no device of it is here")


def _usable_cores() -> int:
    """Those that this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name, and the vector instructions that the compiled loops use of it."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    vectors = [name for name in ("avx2", "avx512f", "neon") if features.get(name)]
    return f"{llvm.get_host_cpu_name()} ({', '.join(vectors) or 'no vector instructions that are used'})"


def _memory() -> str:
    """The machine's memory, where the system tells; a container's limit may be lower."""
    try:
        return format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return "not known"


def _missing(extra: str) -> list[str]:
    import importlib.util

    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def _self_test() -> list[dict[str, Any]]:
    """Run each part on made-up data: what was tried, `ok` or `failed: why`, seconds."""
    checks = []
    parts = [("compiled loops against plain numpy", _check_loops)]
    if not _missing("extract"):
        parts.append(("extract, search, table and detector of a small network", _check_pipeline))
    for what, part in parts:
        started, result = time.perf_counter(), "ok"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                part()
        except Exception as error:  # whatever it is, it is what the report is for
            result = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        checks.append({"what": what, "result": result, "seconds": round(time.perf_counter() - started, 1)})
    return checks


def _check_loops() -> None:
    """Count 60 samples of 5 neurons in bins and look 40 others up, in compiled loops and in plain numpy."""
    import numpy as np

    from nacpipe.method.counting import fill_ranked
    from nacpipe.method.sorted_index import index_columns

    rng, saturation = np.random.RandomState(0), 3
    train, queries = (rng.randn(rows, 5).astype(np.float32) for rows in (60, 40))
    inner = np.linspace(-2, 2, 9, dtype=np.float32)
    (found,) = fill_ranked(
        [(index_columns(train, queries), np.array([-np.inf, *inner, np.inf], np.float32), saturation)]
    )
    expected = np.zeros(40, np.int64)
    for counted, looked_up in zip(train.T, queries.T, strict=True):
        counts = np.bincount(np.digitize(counted, inner), minlength=10)
        expected += np.minimum(counts, saturation)[np.digitize(looked_up, inner)]
    if not np.array_equal(found, expected):
        raise AssertionError(f"{np.count_nonzero(found != expected)} of 40 sums differ")


def _check_pipeline() -> None:
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    import nacpipe

    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, far: float) -> TensorDataset:
        labels = torch.arange(rows) % 2
        return TensorDataset(far + 4.0 * labels[:, None] + torch.randn(rows, 8, generator=generator), labels)

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="nacpipe-doctor-") as folder:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
        splits = {"id/train": draw(200, 0), "id/val": draw(60, 0), "id/test": draw(60, 0)}
        others = {"ood/val": draw(60, 30), "ood/far/other": draw(60, -30)}
        cache = nacpipe.extract(network, {**splits, **others}, Path(folder, "x.zarr"))
        result = nacpipe.tune(cache, trials=20)
        table = nacpipe.evaluate(cache, result.params)
        best = float(table[(table["method"] == "NAC") & (table["dataset"] == "other")]["auroc"].iloc[0])
        nacpipe.Detector.from_cache(cache, result.params, network)(torch.zeros(2, 8))
    if not best > 0.9:
        raise AssertionError(f"the AUROC of data far away is {best:.3f}, not above 0.9")
