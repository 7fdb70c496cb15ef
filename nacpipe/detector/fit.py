"""A detector without a cache: coverage counted from batches of images, for other tools' loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from nacpipe.detector.module import Detector, load_detector
from nacpipe.method.params import NacParams
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
    batches: Iterable[Tensor],  # each (n, …), as the network takes them
    poolings: Mapping[str, str],
    layers: Mapping[str, str] | None = None,
) -> Detector:
    """Count the coverage of training images by `Detector.fit`. Nothing is flagged: there is no threshold."""
    return Detector.fit(network, batches, params, pooling=poolings, layers=layers)


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
