"""NAC as one of pytorch-ood's detectors.

from nacpipe.detector.adapters.pytorch_ood import NAC

detector = NAC(network, "resnet20.detector.safetensors")             # ready to predict
detector = NAC(network, "resnet20.params.json").fit(train_loader)    # coverage counted from the loader's images
metrics.update(detector(images), labels)                             # larger = more likely an outlier
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from nacpipe.detector.fit import DetectorSource, Source
from nacpipe.detector.module import Detector
from nacpipe.errors import MissingExtra

try:
    from pytorch_ood.api import GradientDetector, RequiresFittingException
except ModuleNotFoundError as error:
    raise MissingExtra("this needs pytorch-ood; install it with: pip install 'nacpipe[pytorch-ood]'") from error


class NAC(GradientDetector):  # type: ignore[misc]
    """Neuron activation coverage behind pytorch-ood's `fit` and `predict`."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        *,
        poolings: Mapping[str, str] | None = None,
        train_images: int | None = None,
        layers: Mapping[str, str] | None = None,
    ) -> None:
        """Choose a network and where its coverage comes from.

        Args:
            model: the classifier; its modes, flags and gradients stay as they are.
            source: an exported detector, which needs no fitting; or parameters (`Recipe.source`).
            pools: layer → pooling, where the guess is wrong.
            train_images: how many of the loader's images `fit` counts; None means all.
            layers: layer → module path, where the parameters call it otherwise.

        Raises:
            NacError: the file is not there or malformed, or was exported for another network.
        """
        super().__init__()
        self.model = model
        self._detector_source = DetectorSource(
            source=source, poolings=poolings or {}, train_images=train_images, layers=layers or {}
        )
        self.requires_fit = not self._detector_source.counted
        self._detector: Detector | None = None if self.requires_fit else self._detector_source.detector(model)

    def fit(self, data_loader: Iterable[Any]) -> NAC:
        """Count the coverage of the loader's images, batches `(x, y)`; outliers, of labels below 0, are left out.

        An exported detector brings its coverage and stays as it is.
        """
        if self.requires_fit:
            self._detector = self._detector_source.detector(
                self.model, (x[y >= 0] for x, y in data_loader if (y >= 0).any())
            )
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Return outlier scores (n,) of images (n, channels, height, width): minus the coverage's.

        Raises:
            RequiresFittingException: parameters were given and `fit` was not called.
        """
        if self._detector is None:
            raise RequiresFittingException
        device = self.device
        score: Tensor = self._detector(x if device is None else x.to(device)).score
        return -score
