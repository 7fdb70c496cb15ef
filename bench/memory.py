"""Peak memory of extraction: 10,000 images against 1,000, the same batch size.

    python bench/memory.py [--small 1000] [--large 10000] [--workers auto] [--network resnet20|tiny]

Writes generated PNGs in OpenOOD's layout to a temporary folder (every image is listed as often as needed) and extracts
them with a network of random weights, each size in a process of its own; peak memory is the operating system's. `tiny`
is one convolution, so that 100,000 images take minutes: what grows with their number is not the network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nacpipe.networks.architectures.resnets import CifarResNet

TINY = """
from torch import nn

def build():
    body = nn.Sequential(nn.Conv2d(3, 64, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(64, 10))
"""


def network_options(root: Path, network: str) -> list[str]:
    """Write a network's weights, or its file, and return the options that choose it."""
    if network == "tiny":
        (root / "tiny.py").write_text(TINY)
        return ["--model", f"{root / 'tiny.py'}:build", "--layers", "0.0,0"]
    torch.save(CifarResNet(3, 10).state_dict(), root / "weights.pth")
    return ["--model", "resnet20", "--checkpoint", str(root / "weights.pth")]


def peak_mib(root: Path, options: list[str], rows: int, workers: str) -> float:
    (root / "benchmark_imglist/cifar10/val_cifar10.txt").write_text(
        "".join(f"{row % 100}.png {row % 10}\n" for row in range(rows))
    )
    command = [sys.executable, "-m", "nacpipe", "extract", "cifar10", *options, "--device", "cpu"]
    command += ["--data-root", str(root), "--splits", "id/val"]
    command += ["--cache", str(root / f"{rows}.zarr"), "--workers", workers]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"extraction of {rows} images failed")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=10000)
    parser.add_argument("--workers", default="auto", help="processes that decode, whose own memory is not counted")
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "tiny"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "benchmark_imglist/cifar10").mkdir(parents=True)
        (root / "images_classic").mkdir()
        random = np.random.default_rng(0)
        for number in range(100):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images_classic" / f"{number}.png")
        options = network_options(root, args.network)
        small, large = (peak_mib(root, options, rows, args.workers) for rows in (args.small, args.large))
        ratio = large / small
        print(f"peak memory: {args.small} images {small:.0f} MiB, {args.large} images {large:.0f} MiB: {ratio:.3f}")
