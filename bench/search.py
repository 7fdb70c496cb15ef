"""What a search finds in how many seconds, and what joint TPE finds in the same time.

Measured: `nacpipe search CACHE` as a process of its own for every seed, its study new, from start to end, imports and
reading included. Numba's compiled code is on disk; --compile adds a run without it. Beside it, Optuna's TPESampler over
the same ranges and the layers' weights, every trial scored by the same code and recorded in a journal too, for the same
seconds; its clock starts after imports, reading and sorting, so it has the longer time. What each found is evaluated
afterwards: mean AUROC over the near and the far test sets. On a busy machine seconds grow; the time that all cores
together were busy hardly does, trials and AUROC not at all.

    python bench/search.py CACHE [--seeds 1,2,3,4,5] [--tpe-seeds 1] [--trials 2000] [--compile]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
from detection import means

from nacpipe.cache import open_cache
from nacpipe.evaluation.tables import evaluate
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import read_params
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.space import Interval
from nacpipe.tuning.storage import open_storage
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import ValidationMetrics

COLUMNS = "seed      seconds   on all cores   trials   val AUROC   FPR@95   subtrain AUROC    near     far   (%)"
Times = tuple[float, float]
Found = tuple[Times, int, ValidationMetrics, NacParams]


def row(cache: Path, name: str, times: Times, trials: int, checks: ValidationMetrics, params: NacParams) -> str:
    near, far = means(evaluate(open_cache(cache), params), "NAC")
    subtrain = float("nan") if checks.subtrain_auroc is None else 100 * checks.subtrain_auroc
    values = (
        f"{100 * checks.val_auroc:9.3f}   {100 * checks.val_fpr95:6.2f}   {subtrain:14.2f}   {near:5.2f}   {far:5.2f}"
    )
    return f"{name:<8}   {times[0]:6.2f}   {times[1]:12.2f}   {trials:6d}   {values}"


def clock(who: int) -> Times:
    """Seconds on the wall clock, and of all cores for this process or the ended ones that it started."""
    used = resource.getrusage(who)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def since(before: Times, after: Times) -> Times:
    return after[0] - before[0], after[1] - before[1]


def run_search(cache: Path, seed: int, trials: int, folder: Path, compiled: Path | None = None) -> Found:
    """Return the times of a whole process, its trials and what it found."""
    output = folder / f"{seed}.params.json"
    command = [sys.executable, "-m", "nacpipe", "search", str(cache), "--seed", str(seed), "--trials", str(trials)]
    command += ["--storage", str(folder / f"{seed}.log"), "--output", str(output)]
    env = {**os.environ, **({"NUMBA_CACHE_DIR": str(compiled)} if compiled else {})}
    before = clock(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    times = since(before, clock(resource.RUSAGE_CHILDREN))
    assert ran.returncode == 0, ran.stderr
    result = json.loads(output.read_text())["result"]
    checks = ValidationMetrics(**{key: result[key] for key in ("val_auroc", "val_fpr95", "subtrain_auroc")})
    return times, result["trials"], checks, read_params(output)


def run_tpe(cache: Path, seed: int, seconds: float, folder: Path) -> Found:
    """Return the times, the trials and the best of joint TPE in this many seconds."""
    search = Search(SearchRequest(cache=cache, storage=str(folder / "ranges.log")))
    middle = {name: ranges.params(np.full(3, 0.5)) for name, ranges in search.objective.space.items()}
    best = NacParams(layers=middle)
    reached = search.objective.measure(best)  # every layer is read and sorted by now
    sampler, storage = optuna.samplers.TPESampler(seed=seed), open_storage(str(folder / f"tpe{seed}.log"))
    study = optuna.create_study(direction="maximize", sampler=sampler, storage=storage)
    trials, before = 0, clock(resource.RUSAGE_SELF)
    while time.perf_counter() - before[0] < seconds:
        trial = study.ask()
        layers = {}
        for name, ranges in search.objective.space.items():
            chosen: dict[str, Any] = {}
            for field in ("bins", "saturation", "alpha"):
                dimension = ranges.dimension(field, "product")
                assert isinstance(dimension, Interval)
                suggest: Any = trial.suggest_int if dimension.whole else trial.suggest_float
                chosen[field] = suggest(f"{name}.{field}", dimension.low, dimension.high, log=True)
            layers[name] = LayerParams(**chosen, weight=trial.suggest_float(f"{name}.weight", 0.0, 1.0))
        params = NacParams(layers=layers)
        checks = search.objective.measure(params)
        study.tell(trial, checks.val_auroc)
        trials += 1
        if checks.val_auroc > reached.val_auroc:
            best, reached = params, checks
    return since(before, clock(resource.RUSAGE_SELF)), trials, reached, best


def whole_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--seeds", type=whole_numbers, default=[1, 2, 3, 4, 5])
    parser.add_argument("--tpe-seeds", type=whole_numbers, default=[1], help="of the seeds, those that TPE tries too")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--compile", action="store_true", help="one more run, with numba's disk cache empty")
    asked = parser.parse_args()
    print(COLUMNS)
    found: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in asked.seeds:
            times, *ours = run_search(asked.cache, seed, asked.trials, folder)
            found.append((*times, 100 * ours[1].val_auroc))
            print(row(asked.cache, str(seed), times, *ours), flush=True)
            if seed in asked.tpe_seeds:
                print(row(asked.cache, f"{seed}, TPE", *run_tpe(asked.cache, seed, times[0], folder)), flush=True)
        if asked.compile:
            (folder / "anew").mkdir()
            print(
                row(
                    asked.cache, "1, anew", *run_search(asked.cache, 1, asked.trials, folder / "anew", folder / "numba")
                )
            )
    seconds, cores, values = zip(*found, strict=True)
    print(
        f"seconds: minimum {min(seconds):.2f}, median {median(seconds):.2f}, on all cores {median(cores):.2f}", end="; "
    )
    print(f"val AUROC: {min(values):.3f} … {max(values):.3f} %, median {median(values):.3f} %")


if __name__ == "__main__":
    main()
