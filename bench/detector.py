"""What an exported detector costs beside its classifier: ResNet-20, random weights, batches of 128, CPU.

    python bench/detector.py [--rounds 15] [--batch 128] [--threads 1]

The sides are taken in turn; medians of the ratios round by round:

    detector   nacpipe's, images in, (logits, score, is_ood) out; all four layers, 50 … 2,000 bins
    bare       a forward pass and one backward pass to the first tapped layer, nothing pooled
    forward    a forward pass that records nothing: the classifier alone
    lookup     the detector's tables alone, for the products of the same batch

Bars: detector at most 1.15 of bare, lookup at most 5 % of detector.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from taps import bare, forward, measure, specs

from nacpipe.detector.module import Detector, select_values
from nacpipe.method.fitted_term import FittedTerm, fit_term
from nacpipe.method.params import LayerParams
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import Tapped, Taps, freeze

BINS = {"avgpool": 2000, "layer3": 1000, "layer2": 200, "layer1": 50}
TRAIN = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = freeze(find_model("resnet20").build(10))
    images = torch.randn(args.batch, 3, 32, 32)
    tapped_layers = specs("resnet20", tuple(BINS))
    terms = [fit(spec.name, network) for spec in tapped_layers]
    detector = Detector(network, terms, tapped_layers, images[:2])
    found = tapped(network, images)
    products, logits = [select_values(found, fitted.term) for fitted in terms], found.logits.numpy()
    first = next(spec for spec in tapped_layers if spec.name == "layer1")
    sides: dict[str, Callable[[], object]] = {
        "detector": lambda: detector(images),
        "bare": lambda: bare(network, first, images),
        "forward": lambda: forward(network, images),
        "lookup": lambda: [look(p, logits) for look, p in zip(detector._lookups, products, strict=True)],
    }
    seconds = measure(sides, args.rounds)
    print(
        f"resnet20, batch {args.batch}: " + ", ".join(f"{k} {statistics.median(v):.4f} s" for k, v in seconds.items())
    )
    for a, b in (("detector", "bare"), ("lookup", "detector"), ("detector", "forward")):
        ratios = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        print(f"  {a} / {b}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} … {max(ratios):.3f}")


def tapped(network: torch.nn.Module, images: torch.Tensor) -> Tapped:
    with Taps(network, specs("resnet20", tuple(BINS)), "fc") as taps:
        return taps(images)


def fit(name: str, network: torch.nn.Module) -> FittedTerm:
    """Count the states of random images."""
    found = tapped(network, torch.randn(TRAIN, 3, 32, 32))
    train = (found.activation[name] * found.gradient[name]).numpy()
    return fit_term(name, LayerParams(bins=BINS[name], saturation=50, alpha=float(1 / np.abs(train).mean())), train)


if __name__ == "__main__":
    main()
