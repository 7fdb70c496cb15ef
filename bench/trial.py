"""One trial's scoring, nacpipe's way and the plain way, side by side in one run.

Measured: the time from new parameters for every layer to the AUROC of id/val against ood/val, without any file. nacpipe
indexes a layer once, outside the trial's time; the plain way, in torch, compares every state with every edge (float32
states, float64 edges, batches of 128: (batch, bins, neurons)). Before timing, both must give the same scores; states
within float32 rounding of an edge alone may fall into its other bin, and are counted. Products are made up: ReLU-like
activation × signed gradient, 7 % exact zeros, |alpha · product| about 0.1 … 15. Parameters are the published ones with
alpha, bins and saturation moved by about 1 % before every trial. Both ways in turn, twenty trials to one; prints the
minimum, the median, and the time that all cores were busy with it, which other work on the machine hardly changes.

    python bench/trial.py [--repeats 5]       CIFAR-10, ResNet-18: the ratio; bar 1/1000
    python bench/trial.py --sizes imagenet    ImageNet, ResNet-50: ms per trial; bar 60 ms
    python bench/trial.py --sizes vit         ViT-B/16, 50,000 training images: index time, memory, ms per trial
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from nacpipe.method.counting import fill_ranked
from nacpipe.method.coverage import bin_edges, combine_layers, layer_score, product_borders
from nacpipe.method.metrics import auroc
from nacpipe.method.params import LayerParams
from nacpipe.method.published import PUBLISHED
from nacpipe.method.sorted_index import LayerIndex, index_columns

Floats = NDArray[np.float32]
Times = tuple[float, float]
BATCH = 128
ROUNDING = 2e-7  # a few float32 steps of a state near 1


@dataclass(frozen=True, slots=True)
class Sizes:
    published: tuple[str, str]
    neurons: tuple[int, ...]
    train: int
    val: int
    ood: int
    evaluated: int  # val, ood, and 1,000 of id/subtrain, which every trial scores too
    keep: int  # rows of each side that the check against the plain way sees


SIZES = {
    "cifar10": Sizes(("cifar10", "resnet"), (512, 256, 128, 64), 1000, 1000, 1000, 3000, 3000),
    "imagenet": Sizes(("imagenet", "resnet"), (2048, 1024, 512, 256), 1000, 5000, 1763, 7763, 1000),
    "vit": Sizes(("imagenet", "vit"), (768,) * 4, 50_000, 5000, 1763, 7763, 500),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    params: LayerParams
    train: Floats  # (keep, neurons): products as they come, for the plain way
    evaluated: Floats  # (keep, neurons)
    index: LayerIndex


def draw_products(random: np.random.Generator, rows: int, neurons: int, alpha: float) -> Floats:  # (rows, neurons)
    """ReLU-like activations times signed gradients, in pieces, so that drawing takes no memory of note."""
    products = np.empty((rows, neurons), np.float32)
    for start in range(0, rows, 1024):
        part = products[start : start + 1024]
        activation = np.maximum(random.standard_normal(part.shape, np.float32) + np.float32(1.5), 0)
        steepness = np.exp(0.7 * random.standard_normal((len(part), 1), np.float32))
        part[:] = activation * random.standard_normal(part.shape, np.float32) * steepness / np.float32(alpha)
    return products


def index_layer(params: LayerParams, train: Floats, evaluated: Floats, keep: int) -> Layer:
    """What a search does once per layer, and the first rows as they are."""
    first = train[:keep].copy(), evaluated[:keep].copy()
    return Layer(params=params, train=first[0], evaluated=first[1], index=index_columns(train, evaluated))


def build_layers(sizes: Sizes, random: np.random.Generator) -> tuple[list[Layer], float]:
    """Return the layers and the seconds that indexing took."""
    layers, seconds = [], 0.0
    for neurons, params in zip(sizes.neurons, PUBLISHED[sizes.published].layers.values(), strict=True):
        train = draw_products(random, sizes.train, neurons, params.alpha)
        evaluated = draw_products(random, sizes.evaluated, neurons, params.alpha)
        evaluated[sizes.val : sizes.val + sizes.ood] *= np.float32(1.5)  # OOD samples spread wider
        started = time.perf_counter()
        layers.append(index_layer(params, train, evaluated, sizes.keep))
        seconds += time.perf_counter() - started
    return layers, seconds


def score(layers: list[Layer]) -> NDArray[np.float64]:  # (samples,)
    """What nacpipe does in a trial, as scoring/trial_scorer.py does."""
    asked = []
    for layer in layers:
        borders = product_borders(bin_edges(layer.params.bins, layer.params.edges), layer.params.alpha)
        asked.append((layer.index, borders, layer.params.saturation))
    scores = [
        layer_score(filled, index.neurons, saturation)
        for filled, (index, _, saturation) in zip(fill_ranked(asked), asked, strict=True)
    ]
    return combine_layers(np.stack(scores), np.ones(len(layers)))


def score_plainly(layers: list[Layer]) -> NDArray[np.float64]:  # (samples,)
    """The same by comparing every state with every edge, as the authors do."""

    def inside(products: Floats, alpha: float, edges: torch.Tensor) -> torch.Tensor:
        states = torch.sigmoid(alpha * torch.from_numpy(products))[:, None]  # (batch, 1, neurons) float32
        return (states >= edges[:-1]) & (states < edges[1:])  # (batch, bins - 1, neurons)

    total = torch.zeros(len(layers[0].evaluated))
    for layer in layers:
        params = layer.params
        edges = torch.from_numpy(bin_edges(params.bins, params.edges).copy())[:, None]  # (bins, 1) float64
        counts = torch.zeros(params.bins - 1, layer.train.shape[1])
        for start in range(0, len(layer.train), BATCH):
            counts += inside(layer.train[start : start + BATCH], params.alpha, edges).sum(dim=0)
        table = (counts / params.saturation).clamp(max=1.0)
        for start in range(0, len(layer.evaluated), BATCH):
            rows = slice(start, start + BATCH)
            found = (inside(layer.evaluated[rows], params.alpha, edges) * table).sum(dim=1)
            total[rows] += found.mean(dim=1) / len(layers)
    return total.double().numpy()


def move(layers: list[Layer], random: np.random.Generator) -> list[Layer]:
    """New parameters for every layer, near the old ones."""

    def near(params: LayerParams) -> LayerParams:
        bins, alpha, saturation = np.array([params.bins, params.alpha, params.saturation]) * random.lognormal(
            0, 0.01, 3
        )
        return replace(params, bins=2 * round(bins / 2), alpha=float(alpha), saturation=max(round(saturation), 1))

    return [replace(layer, params=near(layer.params)) for layer in layers]


def check(layers: list[Layer]) -> str:
    """Refuse to time two ways that do not give the same; return what was found."""
    clean: list[Layer] = []
    states_in_all, exceptions = 0, 0
    for layer in layers:
        params, unlike = layer.params, np.zeros(layer.train.shape[1], bool)
        edges = bin_edges(params.bins, params.edges)
        borders = product_borders(edges, params.alpha)
        for products in (layer.train, layer.evaluated):
            states = torch.sigmoid(params.alpha * torch.from_numpy(products)).double().numpy()
            other = np.searchsorted(edges, states, "right") != np.searchsorted(borders, products, "right")
            assert (np.abs(states[other, None] - edges) < ROUNDING).any(axis=1).all(), "a state away from any edge"
            exceptions += int(other.sum())
            states_in_all += other.size
            unlike |= other.any(axis=0)
        clean.append(index_layer(params, layer.train[:, ~unlike], layer.evaluated[:, ~unlike], states_in_all))
    gap = float(np.abs(score(clean) - score_plainly(clean)).max())
    assert gap < 1e-6, f"scores differ by {gap}"
    where = f"{exceptions} of {states_in_all} states, within float32 rounding of an edge, are in its other bin"
    return f"{where}; without their neurons, scores are the same to {gap:.0e} (float32 sums)"


def clock(function: Callable[[list[Layer]], NDArray[np.float64]], layers: list[Layer], sizes: Sizes) -> Times:
    """Milliseconds of one trial, the AUROC included: on the wall clock, and of all cores."""
    wall, cores = time.perf_counter(), time.process_time()
    scores = function(layers)
    auroc(scores[: sizes.val], scores[sizes.val : sizes.val + sizes.ood])
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cores)


def summarise(name: str, found: list[Times]) -> NDArray[np.float64]:
    """Minimum and median on the wall clock, and the median of all cores, (3,)."""
    walls, cores = zip(*found, strict=True)
    values = np.array([min(walls), median(walls), median(cores)])
    print("{}: {:.2f} ms per trial, median {:.2f}, on all cores {:.2f}".format(name, *values), f"({len(found)} trials)")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="cifar10")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    sizes, random = SIZES[asked.sizes], np.random.default_rng(0)
    score(build_layers(Sizes(sizes.published, (2,) * 4, 9, 3, 3, 9, 9), random)[0])  # compiles, or loads what was
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    layers, seconds = build_layers(sizes, random)
    raw = 4 * sum(sizes.neurons) * (sizes.train + sizes.evaluated)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f"{asked.sizes}: {sizes.neurons} neurons, {sizes.train} training and {sizes.evaluated} evaluated samples")
    print(f"index: {seconds:.2f} s, peak memory {peak / raw:.2f} × the products' {raw / 2**20:.0f} MiB (float32)")
    print(check(layers))
    fast, slow = [], []
    for _ in range(asked.repeats):
        fast += [clock(score, move(layers, random), sizes) for _ in range(20)]
        slow += [clock(score_plainly, move(layers, random), sizes)] if asked.sizes == "cifar10" else []
    ours = summarise("nacpipe", fast)
    if slow:
        ratios = summarise("plain  ", slow) / ours
        print("ratio: 1/{:.0f} of the minima, 1/{:.0f} of the medians, 1/{:.0f} on all cores".format(*ratios))


if __name__ == "__main__":
    main()
