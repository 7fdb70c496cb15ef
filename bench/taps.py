"""One backward pass for all layers against one per layer: resnet50 and vit_b_16, random weights, CPU.

    python bench/taps.py [--rounds 7] [--batch 8] [--threads 2]

From tensors in to pooled arrays out, the sides taken in turn, medians of the ratios round by round:

    loop      one torch.autograd.grad per layer, everything recorded (as the authors do; their network in float32)
    ours      nacpipe.networks.taps.Taps, the same memory format
    ours cl   the same with channels-last on our side alone
    bare      a forward pass and one backward pass to the first tapped layer, nothing pooled
    forward   a forward pass that records nothing
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from nacpipe.cache import LayerSpec
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import POOLINGS, Taps, find_penultimate, freeze


def specs(model: str, names: tuple[str, ...]) -> list[LayerSpec]:
    layers = find_model(model).layers
    return [LayerSpec(name=n, path=layers[n][0], pooling=layers[n][1], neurons=0) for n in names]


def loop_per_layer(network: nn.Module, layers: list[LayerSpec], images: torch.Tensor) -> list[object]:
    """The authors' way, without their in-place pitfalls: record everything, then one backward pass per layer."""
    kept: dict[str, torch.Tensor] = {}
    handles = [
        network.get_submodule(s.path).register_forward_hook(lambda _m, _i, out, name=s.name: kept.update({name: out}))
        for s in layers
    ]
    logits = network(images)
    for handle in handles:
        handle.remove()
    loss = -(logits.log_softmax(dim=1).mean(dim=1)).sum()
    found: list[object] = []
    for s in layers:
        gradient = torch.autograd.grad(loss, kept[s.name], retain_graph=True)[0]
        pool = POOLINGS[s.pooling]
        found.append((pool(kept[s.name].detach()).numpy(), pool(gradient).numpy()))
    return found


def bare(network: nn.Module, first: LayerSpec, images: torch.Tensor) -> None:
    leaf: list[torch.Tensor] = []

    def start(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    handle = network.get_submodule(first.path).register_forward_hook(start)
    logits = network(images)
    handle.remove()
    torch.autograd.grad(logits, leaf[0], grad_outputs=torch.ones_like(logits))


def measure(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(model: str, names: tuple[str, ...], first: str, args: argparse.Namespace) -> None:
    build = find_model(model).build
    network, plain, last = build(1000).eval(), freeze(build(1000)), freeze(build(1000))
    for copy in (plain, last):
        copy.load_state_dict(network.state_dict())
    last.to(memory_format=torch.channels_last)
    layers, images = specs(model, names), torch.randn(args.batch, 3, 224, 224)
    nhwc = images.to(memory_format=torch.channels_last)
    classifier = find_model(model).classifier
    penultimate = find_penultimate(plain, layers, classifier, images[:2])
    ours, ours_last = (Taps(n, layers, classifier, penultimate=penultimate) for n in (plain, last))
    start = next(s for s in layers if s.name == first)
    sides: dict[str, Callable[[], object]] = {
        "loop": lambda: loop_per_layer(network, layers, images),
        "ours": lambda: {k: v.numpy() for k, v in ours(images).gradient.items()},
        "ours cl": lambda: {k: v.numpy() for k, v in ours_last(nhwc).gradient.items()},
        "bare": lambda: bare(plain_bare, start, images),
        "forward": lambda: forward(plain_bare, images),
    }
    plain_bare = freeze(build(1000))
    seconds = measure(sides, args.rounds)
    print(f"{model}, {', '.join(names)}: " + ", ".join(f"{k} {statistics.median(v):.3f} s" for k, v in seconds.items()))
    for a, b in (("ours", "loop"), ("ours cl", "loop"), ("ours", "bare"), ("ours", "forward")):
        ratios = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        print(f"  {a} / {b}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} … {max(ratios):.3f}")


def forward(network: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        network(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare("resnet50", ("avgpool", "layer3", "layer2", "layer1"), "layer1", arguments)
    compare("resnet50", ("avgpool",), "avgpool", arguments)
    compare("vit_b_16", ("layer_norm", "layer_11", "layer_10", "layer_9"), "layer_9", arguments)
