"""NAC as one of OpenOOD v1.5's postprocessors. OpenOOD is not needed to import this: it has what their base class has.

from nacpipe.detector.adapters.openood import NACPostprocessor

class NAC(NACPostprocessor, BasePostprocessor):  # OpenOOD's Evaluator asks for its own class
    pass

Evaluator(network, id_name="cifar10", postprocessor=NAC("resnet18.detector.safetensors"), …)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.detector.fit import DetectorSource, Source
from nacpipe.detector.module import Detected, Detector
from nacpipe.errors import InputError
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap


class NACPostprocessor:
    """Neuron activation coverage behind `setup`, `postprocess` and `inference`."""

    config = None
    APS_mode = False
    """No search inside OpenOOD: `nacpipe search` does that, on id/val and ood/val."""
    hyperparam_search_done = True

    def __init__(
        self,
        source: Source,
        *,
        poolings: Mapping[str, str] | None = None,
        train_images: int | None = None,
        layers: Mapping[str, str] | None = None,
    ) -> None:
        """Choose where the coverage comes from.

        Args:
            source: an exported detector; or parameters (`Recipe.source`), whose coverage `setup` counts.
            pools: layer → pooling, where the guess is wrong.
            train_images: how many of the training loader's images are counted; None means all.
            layers: layer → module path, where the parameters call it otherwise.
        """
        self._detector_source = DetectorSource(
            source=source, poolings=poolings or {}, train_images=train_images, layers=layers or {}
        )
        self._detector: Detector | None = None

    def setup(self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Mapping[str, Any]) -> None:
        """Put the coverage on the network; parameters are counted on `id_loader_dict["train"]`, batches with `data`.

        Raises:
            NacError: the file is not there or malformed, or was exported for another network.
        """
        images = (batch["data"] for batch in id_loader_dict["train"]) if not self._detector_source.counted else ()
        self._detector = self._detector_source.detector(net, images)

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted classes (n,) and confidences (n,), larger = more like the training data.

        Raises:
            InputError: `setup` was not called, or with another network.
        """
        found = self._detect(net, data)
        return found.logits.argmax(dim=1), found.score

    def inference(
        self, net: nn.Module, data_loader: Iterable[Mapping[str, Tensor]], progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Return predictions, confidences and labels, (samples,) each, of batches with `data` and `label`.

        Nothing is shown meanwhile, whatever `progress` says.

        Raises:
            InputError: `setup` was not called, or with another network.
        """
        device = find_device_and_dtype(net)[0]
        predicted, confidence, label = [], [], []
        for batch in data_loader:
            pred, conf = self.postprocess(net, batch["data"].to(device))
            predicted.append(pred.cpu().numpy())
            confidence.append(conf.cpu().numpy())
            label.append(batch["label"].cpu().numpy())
        return np.concatenate(predicted).astype(int), np.concatenate(confidence), np.concatenate(label).astype(int)

    def _detect(self, net: nn.Module, data: Tensor) -> Detected:
        if self._detector is None or self._detector.network is not unwrap(net):
            raise InputError("call setup(net, id_loaders, ood_loaders) with this network first")
        detected: Detected = self._detector(data)
        return detected
