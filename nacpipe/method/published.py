"""The authors' published parameters, by (benchmark, network family, layer names); equal weights.

They were found for particular networks and do not transfer: on a CIFAR ResNet-20 they reach 61 % validation AUROC where
a search reaches 89 %. They are a baseline and a starting point, not an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nacpipe.errors import ParamsError
from nacpipe.method.params import LayerParams, NacParams


def _row(**layers: tuple[int, int, float]) -> NacParams:
    return NacParams(
        layers={name: LayerParams(bins=m, saturation=r, alpha=a) for name, (m, r, a) in layers.items()},
    )


# fmt: off
PUBLISHED: dict[tuple[str, str], NacParams] = {  # each layer: bins, saturation, alpha
    ("cifar10", "resnet"): _row(
        avgpool=(50, 50, 100), layer3=(500, 100, 1000), layer2=(50, 5, 0.001), layer1=(500, 100, 0.001)),
    ("cifar100", "resnet"): _row(
        avgpool=(50, 50, 50), layer3=(1000, 500, 10), layer2=(50, 500, 1), layer1=(50, 5, 0.005)),
    ("imagenet", "resnet"): _row(
        avgpool=(50, 10, 3000), layer3=(50, 500, 300), layer2=(500, 50, 0.01), layer1=(1000, 5000, 1)),
    ("imagenet", "vit"): _row(
        layer_norm=(50, 500, 100), layer_11=(500, 50, 1), layer_10=(500, 10, 10), layer_9=(1000, 10, 1)),
}

Grid = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]
GRIDS: dict[tuple[str, str], Grid] = {  # each layer: bins × saturation × alpha; the full product over layers
    ("cifar10", "resnet"): {
        "avgpool": ((50,), (10, 50), (100,)), "layer3": ((50, 500), (100,), (1000, 5000)),
        "layer2": ((50,), (5, 10), (0.001,)), "layer1": ((50, 500), (5, 10, 50, 100), (0.001, 0.005))},
    ("cifar100", "resnet"): {
        "avgpool": ((50, 500), (50,), (1, 50)), "layer3": ((50, 500, 1000), (500,), (10, 50, 100)),
        "layer2": ((50, 500), (100, 500), (1,)), "layer1": ((50,), (5, 50), (0.005,))},
    ("imagenet", "resnet"): {
        "avgpool": ((50, 500), (10, 50, 500), (3000,)), "layer3": ((50, 500), (100, 500), (50, 100, 300)),
        "layer2": ((500,), (50, 500), (0.01,)), "layer1": ((500, 1000), (5000,), (0.1, 1))},
    ("imagenet", "vit"): {
        "layer_norm": ((50, 500), (500,), (100,)), "layer_11": ((50, 500), (50, 500), (1, 10)),
        "layer_10": ((50, 500), (10, 50), (10,)), "layer_9": ((500, 1000), (10, 50), (1,))},
}
# fmt: on


def published_grid(benchmark: str, family: str, layers: Collection[str]) -> Grid:
    """Return the paper's search grid, where its layers are among these.

    Raises:
        ParamsError: the paper has none for this benchmark, family and choice of layers.
    """
    published_params(benchmark, family, layers)
    return GRIDS[benchmark, family]


def published_params(benchmark: str, family: str, layers: Collection[str]) -> NacParams:
    """Return the paper's parameters, where its layers are among these.

    Raises:
        ParamsError: the paper has none for this benchmark, family and choice of layers.
    """
    params = PUBLISHED.get((benchmark, family))
    if params is None or not set(params.layers) <= set(layers):
        known = "; ".join(f"{b} {f}: {', '.join(p.layers)}" for (b, f), p in PUBLISHED.items())
        raise ParamsError(
            f"the paper has no parameters for {benchmark}, {family}, layers {', '.join(layers)} (it has {known});"
            " find some with: nacpipe search CACHE"
        )
    return params
