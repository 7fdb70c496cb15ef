"""A detector without a cache: coverage counted from batches of samples, for other tools' loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nacpipe.detector.count import count_coverage
from nacpipe.detector.module import Detector, load_detector
from nacpipe.method.params import NacParams
from nacpipe.networks.call import PLAIN_CALL, Call, count_samples, select_samples
from nacpipe.scoring.params_file import read_params

Source = str | Path | NacParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSource:
    """How other tools' adapters come to a detector."""

    source: Source
    """A detector from `nacpipe export`; or parameters, in a `.json` file or as a record, whose layers are the network's
    module paths: then the coverage is counted from training samples."""
    poolings: Mapping[str, str] = field(default_factory=dict)
    """Layer → pooling, where the one that `nacpipe layers` would guess is wrong."""
    train_images: int | None = None
    """How many training samples are counted, the loader's first; None means all. Saturation is a number of samples, so
    give what the parameters were found with."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Layer → module path, where the parameters call it otherwise (extract's `--layers NAME=PATH`)."""
    call: Call = PLAIN_CALL
    """How the network is called: `prepare`, `logits` and `mask`, as for `nacpipe.extract`."""

    @property
    def counted(self) -> bool:
        """Whether the coverage is in the source already."""
        return not isinstance(self.source, NacParams) and Path(self.source).suffix != ".json"

    def detector(self, network: nn.Module, batches: Iterable[Any] = ()) -> Detector:
        """Return the detector on a network: an exported one as it is, or one counted from batches of inputs.

        Raises:
            NacError: as `load_detector` and `fit_detector` do.
        """
        if self.counted:
            assert not isinstance(self.source, NacParams)
            return load_detector(self.source, network, self.call)
        params = self.source if isinstance(self.source, NacParams) else read_params(self.source)
        first = _first(batches, self.train_images, self.call)
        return fit_detector(network, params, first, self.poolings, self.layers, self.call)


def fit_detector(
    network: nn.Module,
    params: NacParams,
    batches: Iterable[Any],  # inputs, each of n samples
    poolings: Mapping[str, str],
    layers: Mapping[str, str] | None = None,
    call: Call = PLAIN_CALL,
) -> Detector:
    """Count the coverage of training samples. Nothing is flagged: there is no threshold."""
    exported, examples = count_coverage(network, params, batches, poolings, layers, call)
    return Detector(
        network, exported.terms, exported.taps, examples, fused=exported.fused, call=call, exported=exported
    )


def _first(batches: Iterable[Any], count: int | None, call: Call) -> Iterator[Any]:
    """Yield batches until `count` samples have come; the last is cut."""
    left = count
    for batch in batches:
        if left is None:
            yield batch
            continue
        if left <= 0:
            return
        rows = count_samples(call.arguments(batch))
        yield batch if rows <= left else select_samples(batch, torch.arange(rows) < left)
        left -= rows
