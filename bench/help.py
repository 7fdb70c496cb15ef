"""How long someone waits for the first word.

Measured: best of five of a whole process for `nacpipe --help`, `nacpipe search --help` and `import nacpipe`, in turn,
and the heavy packages that each has loaded by its end: there should be none. The bare interpreter stands beside them.

    python bench/help.py [--repeats 5]      bar: below 0.3 s each
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "numba", "zarr", "optuna", "pandas")
COMMANDS = {
    "python -m nacpipe --help": ("-m", "nacpipe", "--help"),
    "python -m nacpipe search --help": ("-m", "nacpipe", "search", "--help"),
    "python -c 'import nacpipe'": ("-c", "import nacpipe"),
    "python -c pass": ("-c", "pass"),
}


def clock(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def loaded(*arguments: str) -> list[str]:
    """Heavy packages among a process's imports."""
    ran = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, check=True, capture_output=True)
    names = {line.rpartition(b"|")[2].strip().decode() for line in ran.stderr.splitlines()}
    return [name for name in HEAVY if name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    heavy = {name: loaded(*arguments) for name, arguments in COMMANDS.items()}  # and compiles .pyc files
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            seconds[name].append(clock(*arguments))
    for name, found in seconds.items():
        print(f"{name:<32} {min(found):.3f} s, median {median(found):.3f} s; heavy: {', '.join(heavy[name]) or 'none'}")


if __name__ == "__main__":
    main()
