"""A detector without a cache: coverage counted from batches of images, for other tools' loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.cache import LayerSpec
from nacpipe.detector.file import ExportedLayer
from nacpipe.detector.module import Detector, load_detector, select_products
from nacpipe.errors import InputError, ValuesError
from nacpipe.method.counting import count_sorted
from nacpipe.method.coverage import LOGITS, bin_edges, layer_of, product_borders
from nacpipe.method.params import NacParams
from nacpipe.method.sorted_index import sort_columns
from nacpipe.networks.build import adopt_module
from nacpipe.networks.layers import measure_layers
from nacpipe.networks.taps import Taps, isolated
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap
from nacpipe.scoring.params_file import read_params

Source = str | Path | NacParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSource:
    """How other tools' adapters come to a detector."""

    source: Source
    """A detector from `nacpipe export`; or parameters, in a `.json` file or as a record, whose layers are the network's
    module paths: then the coverage is counted from training images."""
    poolings: Mapping[str, str] = field(default_factory=dict)
    """Layer → pooling, where the one that `nacpipe layers` would guess is wrong."""
    train_images: int | None = None
    """How many training images are counted, the loader's first; None means all. Saturation is a number of images, so
    give what the parameters were found with."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Layer → module path, where the parameters call it otherwise (extract's `--layers NAME=PATH`)."""

    @property
    def counted(self) -> bool:
        """Whether the coverage is in the source already."""
        return not isinstance(self.source, NacParams) and Path(self.source).suffix != ".json"

    def detector(self, network: nn.Module, batches: Iterable[Tensor] = ()) -> Detector:
        """Return the detector on a network: an exported one as it is, or one counted from training images.

        Raises:
            NacError: as `load_detector` and `fit_detector` do.
        """
        if self.counted:
            assert not isinstance(self.source, NacParams)
            return load_detector(self.source, network)
        params = self.source if isinstance(self.source, NacParams) else read_params(self.source)
        return fit_detector(network, params, _first(batches, self.train_images), self.poolings, self.layers)


def fit_detector(
    network: nn.Module,
    params: NacParams,
    batches: Iterable[Tensor],  # each (n, channels, side, side), prepared for the network
    poolings: Mapping[str, str],
    layers: Mapping[str, str] | None = None,
) -> Detector:
    """Count the coverage of training images; memory does not grow with their number. Nothing is flagged: there is no
    threshold.

    Args:
        network: on whatever device; images are taken there. It may be wrapped (torch.compile, DataParallel).
        params: for the network's modules, by their paths, or the logits.
        batches: training images.
        pools: layer → pooling, where the guess is wrong.
        layers: layer → module path, where the parameters call it otherwise.

    Raises:
        InputError: there are no images, a layer is not in the network, or a pooling does not fit it.
        ValuesError: states are not finite.
    """
    params = NacParams(layers={name: layer for name, layer in params.layers.items() if layer.weight > 0})
    network = unwrap(network)
    device = find_device_and_dtype(network)[0]
    coming = iter(batches)
    first = next(coming, None)
    if first is None:
        raise InputError("there are no training images to count")
    with isolated(network, device):
        wrapped = adopt_module(network, first[:1].repeat(2, 1, 1, 1).to(device))
        named = [name for name in dict.fromkeys(map(layer_of, params.layers)) if name != LOGITS]
        paths = {name: (layers or {}).get(name, name) for name in named}
        specs = measure_layers(wrapped, paths, list(poolings.items())).layers if named else ()
    by_name = {spec.name: spec for spec in specs}
    by_name[LOGITS] = LayerSpec(name=LOGITS, path="", pooling="none", neurons=0)
    borders = {
        name: product_borders(bin_edges(layer.bins, layer.edges), layer.alpha) for name, layer in params.layers.items()
    }
    counts: dict[str, NDArray[np.int32]] = {}
    model, overwritten = wrapped.model, None
    for images in chain([first], coming):
        with (
            isolated(network, device),
            Taps(network, specs, model.classifier, overwritten=overwritten, outputs=model.outputs) as taps,
        ):
            tapped = taps(images.detach().to(device))
            overwritten = taps.overwritten
        for name, layer in params.layers.items():
            products = select_products(tapped, name, layer.source).cpu().numpy()
            if not np.isfinite(products).all():
                raise ValuesError(f"layer {name!r}: a training image's {layer.source} is not finite")
            found = count_sorted(sort_columns(products), borders[name])
            counts[name] = counts[name] + found if name in counts else found
    counted = [
        ExportedLayer(
            name=name,
            path=by_name[layer_of(name)].path,
            pooling=by_name[layer_of(name)].pooling,
            params=layer,
            borders=borders[name],
            counts=counts[name],
        )
        for name, layer in params.layers.items()
    ]
    return Detector(network, counted, first[:1].repeat(2, 1, 1, 1).to(device))


def _first(batches: Iterable[Tensor], count: int | None) -> Iterator[Tensor]:
    """Yield batches until `count` images have come; the last is cut."""
    left = count
    for images in batches:
        if left is None:
            yield images
            continue
        if left <= 0:
            return
        yield images[:left]
        left -= len(images)
