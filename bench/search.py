"""What a search finds in how many seconds, and what joint TPE finds in the same time.

Measured: `nacpipe search CACHE` as a process of its own for every seed, its study new, from start to end, imports and
reading included. Numba's compiled code is on disk; --compile adds a run without it. Beside it, Optuna's TPESampler over
the same ranges and the layers' weights, every trial scored by the same code and recorded in a journal too, for the same
seconds; its clock starts after imports, reading and sorting, so it has the longer time. Test splits are not read. On a
busy machine seconds grow; a search's trials and AUROC do not change.

    python bench/search.py CACHE [--seeds 1,2,3,4,5] [--tpe-seeds 1] [--trials 2000] [--compile]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import optuna

from nacpipe.core.params import LayerParams, NacParams
from nacpipe.search.storage import open_storage
from nacpipe.search.study import Checks, Search, SearchRequest

COLUMNS = "seed      seconds   trials   val AUROC   FPR@95   subtrain AUROC   (%)"


def row(name: str, seconds: float, trials: int, checks: Checks) -> str:
    subtrain = float("nan") if checks.subtrain_auroc is None else 100 * checks.subtrain_auroc
    values = f"{100 * checks.val_auroc:9.3f}   {100 * checks.val_fpr95:6.2f}   {subtrain:14.2f}"
    return f"{name:<8}   {seconds:6.2f}   {trials:6d}   {values}"


def run_search(
    cache: Path, seed: int, trials: int, folder: Path, numba_cache: Path | None = None
) -> tuple[float, Checks]:
    """Return the seconds of a whole process and what it found."""
    output = folder / f"{seed}.params.json"
    command = [sys.executable, "-m", "nacpipe", "search", str(cache), "--seed", str(seed), "--trials", str(trials)]
    command += ["--storage", str(folder / f"{seed}.log"), "--output", str(output)]
    env = {**os.environ, **({"NUMBA_CACHE_DIR": str(numba_cache)} if numba_cache else {})}
    started = time.perf_counter()
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert ran.returncode == 0, ran.stderr
    result = json.loads(output.read_text())["result"]
    assert result["trials"] == trials
    return seconds, Checks(**{key: result[key] for key in ("val_auroc", "val_fpr95", "subtrain_auroc")})


def run_tpe(cache: Path, seed: int, seconds: float, folder: Path) -> tuple[float, int, Checks]:
    """Return the seconds, the trials and the best of joint TPE in this time."""
    search = Search(SearchRequest(cache=cache, storage=str(folder / "ranges.log")))
    space = search.space()
    search.measure(
        NacParams(layers={name: layer.params([0.5] * 3) for name, layer in space.items()})
    )  # compiled by now
    sampler, storage = optuna.samplers.TPESampler(seed=seed), open_storage(str(folder / f"tpe{seed}.log"))
    study = optuna.create_study(direction="maximize", sampler=sampler, storage=storage)
    best, trials, started = Checks(val_auroc=0.0, val_fpr95=1.0, subtrain_auroc=None), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        trial = study.ask()
        layers = {}
        for name, ranges in space.items():
            layers[name] = LayerParams(
                bins=trial.suggest_int(f"{name}.bins", *ranges.bins, log=True),
                saturation=trial.suggest_int(f"{name}.saturation", *ranges.saturation, log=True),
                alpha=trial.suggest_float(f"{name}.alpha", *ranges.alpha, log=True),
                weight=trial.suggest_float(f"{name}.weight", 0.0, 1.0),
            )
        checks = search.measure(NacParams(layers=layers))
        study.tell(trial, checks.val_auroc)
        best, trials = max(best, checks, key=lambda found: found.val_auroc), trials + 1
    return time.perf_counter() - started, trials, best


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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = []
        for seed in asked.seeds:
            seconds, checks = run_search(asked.cache, seed, asked.trials, folder)
            found.append((seconds, checks.val_auroc))
            print(row(str(seed), seconds, asked.trials, checks), flush=True)
            if seed in asked.tpe_seeds:
                print(row(f"{seed}, TPE", *run_tpe(asked.cache, seed, seconds, folder)), flush=True)
        if asked.compile:
            (folder / "again").mkdir()
            seconds, checks = run_search(asked.cache, 1, asked.trials, folder / "again", folder / "numba")
            print(row("1, anew", seconds, asked.trials, checks))
    seconds_of, values = zip(*found, strict=True)
    print(f"seconds: minimum {min(seconds_of):.2f}, median {median(seconds_of):.2f}", end="; ")
    print(f"val AUROC: {100 * min(values):.3f} … {100 * max(values):.3f} %, median {100 * median(values):.3f} %")


if __name__ == "__main__":
    main()
