"""NAC as one of OpenOOD v1.5's postprocessors. OpenOOD is not needed to import this: it has what their base class has.

from nacpipe.detector.adapters.openood import NACPostprocessor

class NAC(NACPostprocessor, BasePostprocessor):  # OpenOOD's Evaluator asks for its own class
    pass

Evaluator(network, id_name="cifar10", postprocessor=NAC("resnet18.detector.safetensors"), …)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.detector.fit import DetectorSource, Source
from nacpipe.detector.module import Detected, Detector
from nacpipe.errors import InputError
from nacpipe.networks.call import Call, Mask
from nacpipe.networks.wrappers import unwrap


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
        prepare: Callable[[Any], Any] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        mask: Mask | None = None,
    ) -> None:
        """Choose where the coverage comes from.

        Args:
            source: an exported detector; or parameters (`DetectorSource.source`), whose coverage `setup` counts.
            poolings: layer → pooling, where the guess is wrong.
            train_images: how many of the training loader's samples are counted; None means all.
            layers: layer → module path, where the parameters call it otherwise.
            prepare: a batch's input → the network's arguments, as for `nacpipe.extract`.
            logits: the network's output → logits, as for `nacpipe.extract`.
            mask: of padded samples, as for `nacpipe.extract`.
        """
        self._detector_source = DetectorSource(
            source=source,
            poolings=poolings or {},
            train_images=train_images,
            layers=layers or {},
            call=Call(prepare=prepare, logits=logits, mask=mask),
        )
        self._detector: Detector | None = None

    def setup(self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Mapping[str, Any]) -> None:
        """Put the coverage on the network; parameters are counted on `id_loader_dict["train"]`, batches with `data`.

        Raises:
            NacError: the file is not there or malformed, or was exported for another network.
        """
        inputs = (batch["data"] for batch in id_loader_dict["train"]) if not self._detector_source.counted else ()
        self._detector = self._detector_source.detector(net, inputs)

    def postprocess(self, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """Return predicted classes (n,) and confidences (n,), larger = more like the training data.

        Args:
            net: the network of `setup`.
            data: its input for n samples, on any device, or what `prepare` makes one of.

        Raises:
            InputError: `setup` was not called, or with another network.
        """
        found = self._detect(net, data)
        return found.logits.argmax(dim=1), found.score

    def inference(
        self, net: nn.Module, data_loader: Iterable[Mapping[str, Any]], progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Return predictions, confidences and labels, (samples,) each, of batches with `data` and `label`.

        Nothing is shown meanwhile, whatever `progress` says.

        Raises:
            InputError: `setup` was not called, or with another network.
        """
        predicted, confidence, label = [], [], []
        for batch in data_loader:
            pred, conf = self.postprocess(net, batch["data"])
            predicted.append(pred.cpu().numpy())
            confidence.append(conf.cpu().numpy())
            label.append(np.asarray(torch.as_tensor(batch["label"]).cpu()))
        return np.concatenate(predicted).astype(int), np.concatenate(confidence), np.concatenate(label).astype(int)

    def _detect(self, net: nn.Module, data: Any) -> Detected:
        if self._detector is None or self._detector.network is not unwrap(net):
            raise InputError("call setup(net, id_loaders, ood_loaders) with this network first")
        detected: Detected = self._detector(data)
        return detected
