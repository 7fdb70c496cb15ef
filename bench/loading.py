"""Loading images without a network, beside bare Pillow processes and beside another version of nacpipe.

    python bench/loading.py [--images 4000] [--workers 2] [--against CHECKOUT] [--rounds 3]
    python bench/loading.py --small --images 10000 --against CHECKOUT
    python bench/loading.py --score --against CHECKOUT

JPEGs of 500 × 375 are made in a temporary folder and prepared to 224 × 224. A loader is timed after the first batch
of each worker, since the second's is ready with the first's; what comes before the first batch, the start of the
processes, is told apart. Bare: as many processes at once as workers, each decodes and transforms its share with
Pillow and torchvision, timed from the moment that all are ready. With `--small` the images are PNGs of 32 × 32, and
the whole extraction with a ResNet-20 of random weights is timed, with the workers that each version chooses. With
`--score` the JPEGs are in tar shards, and `nacpipe.score` of a small network is timed, the start of its processes
included, beside the same with a thread; exit code 1 where a part differs. Sides run in turn; a ratio is the median of
the rounds'."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
BATCH, DISTINCT = 128, 200
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images(root: Path, images: int, *, small: bool) -> None:
    """Write CIFAR-10's id/val with generated images: blurred noise, whose JPEGs are as large as photographs'."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    width, height, ending = (32, 32, "png") if small else (500, 375, "jpg")
    folder, lists = root / "images_classic", root / "benchmark_imglist/cifar10"
    folder.mkdir(parents=True)
    lists.mkdir(parents=True)
    for number in range(min(images, DISTINCT)):
        noise = Image.fromarray(random.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8))
        noise.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.{ending}", quality=90)
    for number in range(DISTINCT, images):
        shutil.copyfile(folder / f"{number % DISTINCT}.{ending}", folder / f"{number}.{ending}")
    (lists / "val_cifar10.txt").write_text("".join(f"{row}.{ending} {row % 10}\n" for row in range(images)))


def load(root: Path, workers: int) -> dict[str, float]:
    """Load id/val with the nacpipe that is imported; return seconds to the first batch, and images a second."""
    import torch

    from nacpipe.benchmarks.standard import Transform, find_benchmark
    from nacpipe.extraction import dataset

    torch.set_num_threads(1)
    benchmark = find_benchmark("cifar10")
    images = dataset.open_images(benchmark, benchmark.split("id/val"), root, train_images=1, train_seed=1)
    transform = Transform(resize=256, crop=224, mean=MEAN, std=STD)
    rows = images.index.size
    batches = [range(start, min(start + BATCH, rows)) for start in range(0, rows, BATCH)]
    started = time.perf_counter()
    if hasattr(dataset, "load_batches"):  # before loader.py
        loaded = dataset.load_batches(images, batches, dataset.build_transform(transform), workers)
    else:
        from nacpipe.extraction.loader import load_batches

        normalise = dataset.Normalise(transform)
        loaded = map(normalise, load_batches([images], [(0, batch) for batch in batches], transform, workers))
    next(loaded)
    first = time.perf_counter()
    for _ in range(workers - 1):
        next(loaded)
    begun, count = time.perf_counter(), sum(len(batch) for batch in loaded)
    return {"start": first - started, "rate": count / (time.perf_counter() - begun)}


def score(root: Path, workers: int) -> dict[str, float | str]:
    """Score shards with the nacpipe that is imported; return images a second, and the parts' digest."""
    import torch

    import nacpipe
    from nacpipe.detector.module import Detector, attach
    from nacpipe.method.params import LayerParams, NacParams

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(588, 64), torch.nn.ReLU())
    network.append(torch.nn.Linear(64, 10))
    layers = {"3:activation": LayerParams(bins=200, saturation=20, alpha=1.0, source="activation")}
    made = Detector.fit(network, [torch.randn(300, 3, 224, 224)], NacParams(layers=layers))
    made.calibrate([torch.randn(300, 3, 224, 224)])
    transform = {"resize": 256, "crop": 224, "mean": list(MEAN), "std": list(STD)}
    identity = {name: value for name, value in made.exported.identity.items() if name != "input"}
    detector = attach(replace(made.exported, identity={**identity, "transform": transform}), network)
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        done = nacpipe.score(detector, sorted(root.glob("*.tar")), out, workers=workers)
        seconds = time.perf_counter() - started
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(out).glob("*.csv"))))
    assert not done["errors"].any()
    return {"rate": float(done["images"].sum()) / seconds, "parts": digest.hexdigest()}


def decode_bare(root: Path, share: int, shares: int) -> None:
    """Decode and transform one share of the images; waits for a line before, and prints when it begins and ends."""
    import torch
    from PIL import Image
    from torchvision import transforms

    torch.set_num_threads(1)
    steps = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    paths = sorted((root / "images_classic").iterdir())[share::shares]
    steps(Image.open(paths[0]).convert("RGB"))
    print("ready", flush=True)
    sys.stdin.readline()
    for path in paths:
        steps(Image.open(path).convert("RGB"))
    print("done", flush=True)


def run_bare(root: Path, workers: int, images: int) -> float:
    """Return the images a second of all bare processes at once."""
    words = [sys.executable, __file__, "--folder", str(root), "--workers", str(workers)]
    shares = [
        subprocess.Popen([*words, "--share", str(share)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for share in range(workers)
    ]
    for one in shares:
        one.stdout.readline()
    started = time.perf_counter()
    for one in shares:
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in shares:
        one.stdout.readline()
    seconds = time.perf_counter() - started
    for one in shares:
        one.communicate()
    return images / seconds


def make_shards(root: Path, images: int) -> None:
    """Put the JPEGs of `make_images` into four tar files."""
    paths = [root / f"images_classic/{number}.jpg" for number in range(images)]
    for number in range(4):
        with tarfile.open(root / f"{number}.tar", "w") as archive:
            for path in paths[number::4]:
                archive.add(path, path.name)


def run_here(checkout: Path, root: Path, workers: int, *words: str) -> dict[str, Any]:
    """Return what `load`, or with --score `score`, finds in a process with a checkout's code."""
    words = (sys.executable, __file__, "--folder", str(root), "--workers", str(workers), *words)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return dict(json.loads(subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout))


def run_extraction(checkout: Path, root: Path, images: int) -> float:
    """Return the images a second of a whole extraction with a checkout's code, its start included."""
    cache = root / "c.zarr"
    shutil.rmtree(cache, ignore_errors=True)
    words = [sys.executable, "-m", "nacpipe", "extract", "cifar10", "--model", "resnet20", "--device", "cpu"]
    words += ["--checkpoint", str(root / "weights.pth"), "--data-root", str(root), "--splits", "id/val"]
    words += ["--block-rows", "512", "--cache", str(cache)]
    environment, started = {**os.environ, "PYTHONPATH": str(checkout)}, time.perf_counter()
    subprocess.run(words, capture_output=True, check=True, env=environment)
    return images / (time.perf_counter() - started)


def compare(root: Path, options: argparse.Namespace) -> None:
    """Print the rounds and their median ratios."""
    ratios: dict[str, list[float]] = {}
    other = options.against and options.against.resolve()
    for _ in range(options.rounds):
        if options.small:
            ours, shown = run_extraction(HERE, root, options.images), "whole extraction"
        else:
            found = run_here(HERE, root, options.workers)
            ours, shown = found["rate"], f"first batch after {found['start']:.1f} s"
            bare = run_bare(root, options.workers, options.images)
            print(f"bare     {bare:7.0f} images/s, {options.workers} processes", flush=True)
            ratios.setdefault("bare", []).append(ours / bare)
        print(f"here     {ours:7.0f} images/s, {shown}", flush=True)
        if other:
            if options.small:
                theirs, shown = run_extraction(other, root, options.images), "whole extraction"
            else:
                found = run_here(other, root, options.workers)
                theirs, shown = found["rate"], f"first batch after {found['start']:.1f} s"
            print(f"against  {theirs:7.0f} images/s, {shown}", flush=True)
            ratios.setdefault("against", []).append(ours / theirs)
    for name, values in ratios.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        print(f"images a second, here / {name}: median {statistics.median(values):.2f} of {shown}")


def compare_scores(root: Path, options: argparse.Namespace) -> bool:
    """Print the rounds and their median ratios; return whether all parts are equal."""
    sides = {"here": (HERE, options.workers), "a thread": (HERE, 0)}
    if options.against:
        sides["against"] = (options.against.resolve(), options.workers)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    parts = set()
    for _ in range(options.rounds):
        for name, (checkout, workers) in sides.items():
            found = run_here(checkout, root, workers, "--score")
            print(f"{name:8} {found['rate']:7.0f} images/s, {workers} workers", flush=True)
            rates[name].append(found["rate"])
            parts.add(found["parts"])
    for name in [*sides][1:]:
        ratios = [ours / theirs for ours, theirs in zip(rates["here"], rates[name], strict=True)]
        shown = ", ".join(f"{value:.2f}" for value in ratios)
        print(f"images a second, here / {name}: median {statistics.median(ratios):.2f} of {shown}")
    print("parts: " + ("equal, byte for byte" if len(parts) == 1 else "they differ"))
    return len(parts) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="images of 32 × 32, whole extractions")
    parser.add_argument("--score", action="store_true", help="nacpipe.score of tar shards")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a process of this script
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share is not None:
        decode_bare(options.folder, options.share, options.workers)
    elif options.folder:
        print(json.dumps((score if options.score else load)(options.folder, options.workers)))
    else:
        with tempfile.TemporaryDirectory() as name:
            make_images(Path(name), options.images, small=options.small)
            if options.small:
                import torch

                from nacpipe.networks.architectures.resnets import CifarResNet

                torch.save(CifarResNet(3, 10).state_dict(), Path(name) / "weights.pth")
            if options.score:
                make_shards(Path(name), options.images)
                sys.exit(not compare_scores(Path(name), options))
            compare(Path(name), options)


if __name__ == "__main__":
    main()
