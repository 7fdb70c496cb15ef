"""Kill extraction and search (SIGKILL) again and again; what they leave must equal what nobody disturbed.

Measured: whether the same command, started anew after every kill, ends in the same values. Extraction of four splits of
the packaged benchmark, six blocks: every array and seal. Search on that cache: every trial, and params.json. What was
hit is read from what is left. Three kinds of kills, at a random moment

    any     after the process's start, its imports included (one in ten)
    write   after the process's first write (the others)
    mark    extraction alone: at the last array of a block, 2 ms before its mark (half of all, until two have hit)

A kill after the last seal or trial does not count: that result is compared and all begins anew. Not for Windows.

    python bench/kills.py [--kills 20] [--seed 0]      half of extractions, half of searches; exit code 1 on any
                                                       difference, or where fewer than 80 % hit a writing process
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nacpipe.cache import open_cache
from nacpipe.cache.layout import is_whole

SPLITS, TRIALS = ("id/train", "id/val", "ood/val", "ood/near/letters"), 400
Process = subprocess.Popen[bytes]
Stamps = dict[str, tuple[int, int] | None]  # file → what changes when it is written


@dataclass(slots=True)
class Tally:
    kills: int = 0
    writing: int = 0  # after the process's first write and before the last seal, or between the first and last trial
    between: int = 0  # between a block's rows and its mark
    differences: list[str] = field(default_factory=list)


def stamp(path: str) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):  # not yet there, or a temporary file that has its name by now
        return (stat := os.stat(path)).st_ino, stat.st_mtime_ns
    return None


class Extraction:
    def __init__(self, folder: Path) -> None:
        self.out = folder / "x.zarr"
        self.command = (
            f"extract digits --cache {self.out} --batch-size 64 --block-rows 512 --splits {','.join(SPLITS)}".split()
        )

    def read(self) -> dict[str, Any]:
        """Every value of the finished cache."""
        cache = open_cache(self.out)
        arrays, self.blocks = cache.header.arrays(), [(s, k) for s in SPLITS for k in range(len(cache[s].marks()))]
        self.arrays = {  # those that are written with each block, of each split
            s: [path for path in arrays if not is_whole(cache[s].array(path), cache.header)] for s in SPLITS
        }
        self.keys = {path: "c.{}.0" if width else "c.{}" for path, (width, _) in arrays.items()}
        values: Any = {f"{s}/{path}": cache[s].array(path)[:] for s in SPLITS for path in (*arrays, "blocks")}
        values |= dict(zip(("weight", "bias"), cache.classifier() or (), strict=True))
        found: dict[str, Any] = {k: (v.dtype.str, v.shape, v.tobytes()) for k, v in values.items()}
        found["left over"] = list(self.out.rglob("*.partial"))
        return found | {s: cache[s].attributes for s in SPLITS}  # the seal's digest among them

    def stamps(self) -> Stamps:
        paths = (os.path.join(folder, file) for folder, _, files in os.walk(self.out) for file in files)
        return {path: stamp(path) for path in paths}

    def marked(self, block: tuple[str, int]) -> bool:
        return (self.out / block[0] / f"blocks/c.{block[1]}").exists()

    def new_rows(self, block: tuple[str, int], before: Stamps) -> list[bool]:
        """Which of a block's arrays this process has written."""
        name, number = block
        paths = [f"{self.out}/{name}/{array}/{self.keys[array].format(number)}" for array in self.arrays[name]]
        return [stamp(path) not in (None, before.get(path)) for path in paths]

    def near_mark(self, before: Stamps, skip: int) -> bool:
        """Whether a block, some passed over, has all its arrays and no mark."""
        return any(all(self.new_rows(block, before)) and not self.marked(block) for block in self.blocks[skip:])

    def left(self) -> int:
        """Blocks and seals to be written."""
        files = [file for split in SPLITS if (file := self.out / split / "zarr.json").exists()]
        sealed: int = sum(json.loads(file.read_text())["attributes"]["sealed"] for file in files)
        return len(SPLITS) - sealed + sum(not self.marked(block) for block in self.blocks)

    def look(self, before: Stamps) -> tuple[str, bool]:
        """What a kill left, and whether it lay between a block's rows and its mark."""
        new = {block: sum(self.new_rows(block, before)) for block in self.blocks if not self.marked(block)}
        rows = [f"; {s} block {k}: {n} of {len(self.arrays[s])} arrays, no mark" for (s, k), n in new.items() if n]
        marked = f"{len(self.blocks) - len(new)} of {len(self.blocks)} blocks marked"
        return marked + "".join(rows), any(n == len(self.arrays[s]) for (s, _), n in new.items())


class Searching:
    def __init__(self, folder: Path, cache: Path) -> None:
        self.out, self.params, self.best = folder / "study.log", folder / "params.json", 0.0
        self.command = f"search {cache} --trials {TRIALS} --storage {self.out} --output {self.params}".split()

    def trials(self) -> list[dict[str, Any]]:
        lines = self.out.read_bytes().splitlines(keepends=True) if self.out.exists() else []
        found = [json.loads(line) for line in lines if line.startswith(b'{"op_code":4,') and line.endswith(b"\n")]
        kept, clock = ("state", "value", "params", "user_attrs"), {"seconds": None}  # all but times
        return [{key: trial[key] for key in kept} | {"user_attrs": trial["user_attrs"] | clock} for trial in found]

    def read(self) -> dict[str, Any]:
        trials, result = self.trials(), json.loads(self.params.read_text())
        assert len(trials) == TRIALS and result["result"]["val_auroc"] >= self.best and result["result"].pop("seconds")
        return {**result, **{f"trial {number}": trial for number, trial in enumerate(trials)}}

    def stamps(self) -> Stamps:
        return {"trials": (self.out.read_bytes().count(b'{"op_code":4,') if self.out.exists() else 0, 0)}

    def left(self) -> int:
        return TRIALS - len(self.trials())

    def look(self, _before: Stamps) -> tuple[str, bool]:
        self.best = max([self.best, *(trial["value"] for trial in self.trials())])
        return f"{TRIALS - self.left()} of {TRIALS} trials", False


def start(stage: Extraction | Searching) -> Process:
    stage.out.parent.mkdir(exist_ok=True)
    command, env = [sys.executable, "-m", "nacpipe", *stage.command], {**os.environ, "OMP_NUM_THREADS": "1"}
    with stage.out.with_name("output.txt").open("wb") as output:
        return subprocess.Popen(command, cwd=Path(__file__).parents[1], env=env, stdout=output, stderr=output)


def wait(stage: Extraction | Searching, child: Process, reached: Callable[[], bool] = lambda: False) -> None:
    """Wait for a moment or the process's end."""
    while child.poll() is None and not reached():
        time.sleep(0.0002)
    assert not child.returncode, stage.out.with_name("output.txt").read_text()


def disturb(stage: Extraction | Searching, kills: int, dice: random.Random, tally: Tally) -> None:
    """Run a command undisturbed, then with this many kills, and compare."""
    name, missing, begun = stage.command[0], 2 * isinstance(stage, Extraction), time.monotonic()
    wait(stage, start(stage))
    whole, reference = time.monotonic() - begun, stage.read()
    print(f"{name}, undisturbed: {whole:.1f} s", flush=True)
    while kills > 0:
        if stage.left() == 0:  # the undisturbed run, or a kill that came too late
            shutil.rmtree(stage.out.parent)
        before, kind, pause = stage.stamps(), "write", dice.uniform(0, whole / (2 * kills + 2))
        begun, child = time.monotonic(), start(stage)
        if isinstance(stage, Extraction) and missing > 0 and (kills < 3 or dice.random() < 0.5):
            kind, pause, skip = "mark", 0.0, dice.randrange(len(stage.blocks))
            wait(stage, child, lambda: stage.near_mark(before, skip))  # noqa: B023, it is called here alone
        elif kills % 10 == 5:
            kind, pause = "any", dice.uniform(0, whole)
        else:
            wait(stage, child, lambda: stage.stamps() != before)  # noqa: B023
        time.sleep(pause)
        child.kill()
        seconds = time.monotonic() - begun
        assert child.wait() in (0, -signal.SIGKILL), stage.out.with_name("output.txt").read_text()
        if stage.left() > 0:
            text, between = stage.look(before)
            tally.kills, tally.between = tally.kills + 1, tally.between + between
            tally.writing += stage.stamps() != before  # and this is before the last seal or trial
            print(f"{name}, kill {tally.kills} ({kind}) after {seconds:.2f} s: {text}", flush=True)
            missing -= between
            kills = max(kills - 1, missing)
        if kills == 0 or stage.left() == 0:
            wait(stage, start(stage))
            found = stage.read()
            tally.differences += [f"{name}: {k}" for k in {**reference, **found} if reference.get(k) != found.get(k)]


def run_kills(folder: Path, kills: int, seed: int) -> Tally:
    """Kill this many extractions, then as many searches, in an empty folder."""
    tally, dice, extraction = Tally(), random.Random(seed), Extraction(folder / "extract")
    disturb(extraction, kills, dice, tally)
    disturb(Searching(folder / "search", extraction.out), kills, dice, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("--kills", 20), ("--seed", 0)):
        parser.add_argument(option, type=int, default=value)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_kills(Path(folder), asked.kills // 2, asked.seed)
    print(f"{found.kills} kills, {found.writing} while writing, {found.between} between rows and mark:", end=" ")
    first = ", ".join(found.differences[:5])
    print(f"different in {len(found.differences)} places: {first} …" if found.differences else "equal")
    sys.exit(bool(found.differences) or found.writing < 0.8 * found.kills)


if __name__ == "__main__":
    main()
