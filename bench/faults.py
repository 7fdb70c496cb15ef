"""Put faults into an S3 endpoint during one extraction and one search; the results must equal undisturbed local ones.

An endpoint process (moto_server) behind a proxy that refuses a share of the requests, drawn with a seed: answers 500
and 503, slow ones, connections cut before the request is done, after it, and within the answer. Extraction of four
splits of the packaged benchmark into s3://, then a search there. Compared with a cache in a folder: every array and
seal; with a search on it: all of params.json's layers and result but its seconds.

    python bench/faults.py [--faults 100] [--trials 200] [--seed 0]      exit code 1 on any difference, or fewer faults
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

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nacpipe.cache import open_cache
from tests.s3 import BUCKET, Proxy, endpoint, variables

SPLITS = ("id/train", "id/val", "ood/val", "ood/near/letters")
SHARE = 0.2  # of the requests


def nacpipe(*words: str) -> float:
    """Run a command; return its seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nacpipe", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def extract(cache: str) -> float:
    # a block an object, in both: then the seals are the same, and the requests more
    return nacpipe(
        *f"extract digits --splits {','.join(SPLITS)} --shard-blocks 1 --block-rows 512 --cache {cache}".split()
    )


def search(cache: str, folder: Path, name: str, trials: int) -> float:
    files = ("--storage", str(folder / f"{name}.log"), "--output", str(folder / f"{name}.json"))
    return nacpipe("search", cache, "--trials", str(trials), *files)


def found(file: Path) -> dict[str, object]:
    content = json.loads(file.read_text())
    return {"layers": content["layers"], "result": {k: v for k, v in content["result"].items() if k != "seconds"}}


def differences(here: str, there: str, folder: Path) -> list[str]:
    one, other = open_cache(here), open_cache(there)
    unlike = [] if list(one) == list(other) else ["the splits"]
    for name in one:
        if one[name].attributes != other[name].attributes:
            unlike.append(f"{name}'s seal")
        for path in one.header.arrays():
            if not np.array_equal(one[name].read(path), other[name].read(path)):
                unlike.append(f"{name}/{path}")
    return unlike + ["params.json"] * (found(folder / "here.json") != found(folder / "there.json"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        here, there = str(folder / "x.zarr"), f"s3://{BUCKET}/x.zarr"
        extract(here)
        search(here, folder, "here", args.trials)
        with endpoint(folder) as url, Proxy(url, share=SHARE, seed=args.seed) as proxy:
            os.environ.update(variables(proxy.url))
            for verb, limit in (("extraction", args.faults // 2), ("search", args.faults)):
                proxy.limit, before, asked = limit, proxy.faults.total(), proxy.requests.total()
                took = extract(there) if verb == "extraction" else search(there, folder, "there", args.trials)
                faults, requests = proxy.faults.total() - before, proxy.requests.total() - asked
                print(f"{verb}: {faults} faults in {requests} requests, {took:.1f} s")
            proxy.share = 0.0
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(proxy.faults.items()))
            unlike = differences(here, there, folder)
        print(f"{proxy.faults.total()} faults ({kinds}): {', '.join(unlike) or 'finished, equal'}")
        return int(bool(unlike) or proxy.faults.total() < args.faults)


if __name__ == "__main__":
    sys.exit(main())
