"""What an exported detector costs beside its classifier: ResNet-20, random weights, batches of 128, CPU.

    python bench/detector.py [--rounds 15] [--batch 128] [--threads 1]

The sides are taken in turn; medians of the ratios round by round:

    detector   nacpipe's, images in, (logits, score, is_ood) out; all four layers, 50 … 2,000 bins
    bare       a forward pass and one backward pass to the first tapped layer, nothing pooled
    forward    a forward pass that records nothing: the classifier alone
    lookup     the detector's tables alone, for the products of the same batch
    default    the detector of the default search: every source of the four layers and the logits, plain and by class,
               1,000 training images, 200 bins (by class 100), and ViM
    no-grad    that of a cache of forward passes alone: activations of its eight layers and the logits, in the same way

Bars: detector at most 1.15 of bare, lookup at most 5 % of detector, default at most 1.20 of bare, no-grad at most 1.10
of forward.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from taps import bare, forward, measure, specs

from nacpipe.cache import LayerSpec
from nacpipe.detector.module import Detector
from nacpipe.detector.values import select_values
from nacpipe.method.class_groups import ClassGroups
from nacpipe.method.feature_scores import FittedFusion, FusedScore, fit_feature_score
from nacpipe.method.fitted_term import FittedTerm, fit_term
from nacpipe.method.params import LayerParams
from nacpipe.method.term import SOURCES, Source, Term
from nacpipe.networks.build import adopt_module
from nacpipe.networks.layers import FORWARD_ONLY, choose_layers, measure_layers
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
    default = default_detector(network, images, tapped_layers, SOURCES)
    adopted = adopt_module(network, images[:2])
    chosen = measure_layers(adopted, choose_layers(adopted, more=FORWARD_ONLY))
    no_gradient = default_detector(network, images, chosen.layers, ("activation",))
    found = tapped(network, images)
    products, logits = [select_values(found, fitted.term) for fitted in terms], found.logits.numpy()
    first = next(spec for spec in tapped_layers if spec.name == "layer1")
    sides: dict[str, Callable[[], object]] = {
        "detector": lambda: detector(images),
        "bare": lambda: bare(network, first, images),
        "forward": lambda: forward(network, images),
        "default": lambda: default(images),
        "no-grad": lambda: no_gradient(images),
        "lookup": lambda: [look(p, logits) for look, p in zip(detector._lookups, products, strict=True)],
    }
    seconds = measure(sides, args.rounds)
    print(
        f"resnet20, batch {args.batch}: " + ", ".join(f"{k} {statistics.median(v):.4f} s" for k, v in seconds.items())
    )
    for a, b in (
        ("detector", "bare"),
        ("default", "bare"),
        ("lookup", "detector"),
        ("detector", "forward"),
        ("no-grad", "forward"),
    ):
        ratios = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        print(f"  {a} / {b}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} … {max(ratios):.3f}")


def tapped(network: torch.nn.Module, images: torch.Tensor, layers: Sequence[LayerSpec] | None = None) -> Tapped:
    with Taps(network, layers or specs("resnet20", tuple(BINS)), "fc") as taps:
        return taps(images)


def default_detector(
    network: torch.nn.Module, images: torch.Tensor, layers: Sequence[LayerSpec], sources: Sequence[Source]
) -> Detector:
    """Terms of these sources (of the logits, of all) in two views, and a feature score, counted of random images."""
    found = tapped(network, torch.randn(TRAIN, 3, 32, 32), layers)
    logits, groups = found.logits.numpy(), ClassGroups(group_of=np.arange(10, dtype=np.int32), count=10)
    terms = []
    for layer in (*(spec.name for spec in layers), "logits"):
        for source in SOURCES if layer == "logits" else sources:
            train = np.ascontiguousarray(select_values(found, Term(layer=layer, source=source)).numpy())
            alpha = float(1 / np.abs(train).mean())
            for view, bins in (("plain", 200), ("by_class", 100)):
                params = LayerParams(bins=bins, saturation=20, alpha=alpha, source=source)
                name = Term(layer=layer, source=source, view=view).name
                terms.append(fit_term(name, params, train, groups=groups, train_groups=groups.assign(logits)))
    weight, bias = (p.detach().numpy() for p in (network.fc.weight, network.fc.bias))  # type: ignore[union-attr]
    assert found.features is not None
    vim = fit_feature_score("ViM", found.features.numpy(), logits, weight, bias)
    fused = FittedFusion(params=FusedScore(method="ViM", mean=0.0, deviation=1.0, weight=0.02), feature_score=vim)
    return Detector(network, terms, layers, images[:2], fused=fused)


def fit(name: str, network: torch.nn.Module) -> FittedTerm:
    """Count the states of random images."""
    found = tapped(network, torch.randn(TRAIN, 3, 32, 32))
    train = (found.activation[name] * found.gradient[name]).numpy()
    return fit_term(name, LayerParams(bins=BINS[name], saturation=50, alpha=float(1 / np.abs(train).mean())), train)


if __name__ == "__main__":
    main()
