"""NAC as one of pytorch-ood's detectors.

from nacpipe.detector.adapters.pytorch_ood import NAC

detector = NAC(network, "resnet20.detector.safetensors")             # ready to predict
detector = NAC(network, "resnet20.params.json").fit(train_loader)    # coverage counted from the loader's images
metrics.update(detector(images), labels)                             # larger = more likely an outlier
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nacpipe.detector.fit import DetectorSource, Source
from nacpipe.detector.module import Detector
from nacpipe.errors import MissingExtra
from nacpipe.extraction.samples import split_label
from nacpipe.networks.call import Call, Mask, select_samples

try:
    from pytorch_ood.api import DetectorInfo, GradientDetector, Paper, RequiresFittingException, Task
except ModuleNotFoundError as error:
    raise MissingExtra("this needs pytorch-ood; install it with: pip install 'nacpipe[pytorch-ood]'") from error


class NAC(GradientDetector):  # type: ignore[misc]
    """Neuron activation coverage behind pytorch-ood's `fit` and `predict`."""

    info = DetectorInfo(
        tasks={Task.CLASSIFICATION},
        paper=Paper(
            title="Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization",
            venue="ICLR",
            year=2024,
            url="https://arxiv.org/abs/2306.02879",
        ),
    )
    requires_fit = True
    """False of an exported detector."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        *,
        poolings: Mapping[str, str] | None = None,
        train_images: int | None = None,
        layers: Mapping[str, str] | None = None,
        prepare: Callable[[Any], Any] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        mask: Mask | None = None,
    ) -> None:
        """Choose a network and where its coverage comes from.

        Args:
            model: the classifier; its modes, flags and gradients stay as they are.
            source: an exported detector, which needs no fitting; or parameters (`DetectorSource.source`).
            poolings: layer → pooling, where the guess is wrong.
            train_images: how many of the loader's samples `fit` counts; None means all.
            layers: layer → module path, where the parameters call it otherwise.
            prepare: a batch's input → the network's arguments, as for `nacpipe.extract`.
            logits: the network's output → logits, as for `nacpipe.extract`.
            mask: of padded samples, as for `nacpipe.extract`.

        Raises:
            NacError: the file is not there or malformed, or was exported for another network.
        """
        super().__init__()
        self.model = model
        self._detector_source = DetectorSource(
            source=source,
            poolings=poolings or {},
            train_images=train_images,
            layers=layers or {},
            call=Call(prepare=prepare, logits=logits, mask=mask),
        )
        self.requires_fit = not self._detector_source.counted
        self._detector: Detector | None = None if self.requires_fit else self._detector_source.detector(model)

    def fit(self, data_loader: Iterable[Any]) -> NAC:
        """Count the coverage of the loader's samples, batches `(x, y)`; outliers, of labels below 0, are left out.

        An exported detector brings its coverage and stays as it is.
        """
        if self.requires_fit:
            self._detector = self._detector_source.detector(self.model, _inliers(data_loader))
        return self

    def predict(self, x: Any) -> Tensor:
        """Return outlier scores (n,), float64: minus the coverage's.

        Args:
            x: the network's input for n samples, on any device: a tensor, such as (n, channels, height, width), a tuple
                of its arguments or a mapping of its keyword arguments; or what `prepare` makes one of these of.

        Raises:
            RequiresFittingException: parameters were given and `fit` was not called.
        """
        if self._detector is None:
            raise RequiresFittingException
        score: Tensor = self._detector(x).score
        return -score


def _inliers(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the inputs of batches, without outliers."""
    for batch in batches:
        x, y = split_label(batch)
        if y is None:
            yield x
        elif (kept := torch.as_tensor(y) >= 0).any():
            yield x if kept.all() else select_samples(x, kept)
