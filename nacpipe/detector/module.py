"""The exported detector, running beside its classifier.

    images ──▶ network with taps ──▶ values of every term    ──▶ Σ min(count, saturation) ──▶ score ──▶ is_ood
               one forward and one   (n, neurons) float32        (n,) integers               (n,) float64
               backward pass

The sums are integers, as in the cache's scoring, so a score does not depend on the batch it came in; what a network
computes for an image may, in its last bits.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.cache import LayerSpec
from nacpipe.cache.identity import diff
from nacpipe.cache.layout import ALL_BITS
from nacpipe.detector.file import Exported, read_detector
from nacpipe.errors import DetectorError, InputError
from nacpipe.extraction.request import AUTOCAST
from nacpipe.method.coverage import combine_layers, layer_score, logits_gradient, select_source
from nacpipe.method.feature_scores import FittedFusion
from nacpipe.method.fitted_term import FittedTerm
from nacpipe.method.term import LOGITS, Term
from nacpipe.networks.checkpoints import hash_network
from nacpipe.networks.poolings import POOLINGS
from nacpipe.networks.taps import Tapped, Taps, find_penultimate, isolated
from nacpipe.networks.trial import run_trial_batch
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap


class Detected(NamedTuple):
    """What a detector says of n images, on their device."""

    logits: Tensor
    """(n, classes), the network's own."""
    score: Tensor
    """(n,) float64 (float32 where the device has none); larger = more like the training data."""
    is_ood: Tensor
    """(n,) bool: the score is below the threshold, or states are not finite (the score is then NaN)."""


class Detector(nn.Module):
    """A classifier with its coverage: images in, (logits, score, is_ood) out.

    Works whatever the caller's gradient mode, and leaves the network's modes, flags and gradients as they were; during
    a call it is in evaluation mode. Calls from several threads wait for each other. Where all layers are the
    classifier's input (avgpool alone, say) or the logits, no backward pass runs.

    Tables are looked up by compiled code on the CPU; elsewhere those of plain terms by plain torch, and those by class
    or of components on the CPU. Only the CPU has been measured.
    """

    def __init__(
        self,
        network: nn.Module,
        terms: Sequence[FittedTerm],
        taps: Sequence[LayerSpec],
        like: Tensor,  # (2, channels, height, width)
        *,
        threshold: float = -np.inf,
        autocast: torch.dtype | None = None,
        mantissa_bits: int = ALL_BITS,
        name: str = "",
        outputs: str | None = None,
        fused: FittedFusion | None = None,
    ) -> None:
        """Put a network and coverage together.

        Args:
            network: the classifier, on whatever device; what torch.compile or DataParallel wrap is taken out of it.
            terms: the coverage.
            taps: the layers of these terms but for the logits.
            like: images of the kind to come, of any content, on the network's device; they are run to see whether all
                fits.
            threshold: the lowest score that counts as ID; by default nothing is flagged.
            autocast: the half type that the states were counted in.
            mantissa_bits: of the mantissa of activations and gradients, if the cache rounded them.
            name: the network's, for messages.
            outputs: what the network gives, as the cache had it; None finds it out.
            fused: the feature score beside the terms, if there is one.

        Raises:
            DetectorError: a layer has another number of neurons, or a pooling is not known.
            InputError: the network fails or is random in evaluation mode, or a layer is not in it.
        """
        super().__init__()
        network = unwrap(network)
        self.network, self.threshold = network, threshold
        self.fused = fused
        self.weights = np.array(
            [*(fitted.params.weight for fitted in terms), *([] if fused is None else [fused.params.weight])]
        )
        self._lookups = [Lookup(fitted) for fitted in terms]
        self._autocast, self._mantissa_bits = autocast, mantissa_bits
        for spec in taps:
            if spec.pooling not in POOLINGS:
                raise DetectorError(f"layer {spec.name!r}: pooling {spec.pooling!r} is not known")
        self._specs = list(taps)
        self._gradients = any(fitted.term.needs_gradient for fitted in terms)
        if self._gradients and any(parameter.is_inference() for parameter in network.parameters()):
            raise InputError(
                "the network was made under torch.inference_mode, which forbids gradients; make it outside"
            )
        with isolated(network, like.device):
            trial = run_trial_batch(name or type(network).__name__, network, like, gives_features=outputs == "features")
            self.classifier, self._outputs = trial.classifier, outputs or trial.outputs
            if fused is not None and self.classifier is None:
                raise DetectorError(
                    f"its score holds {fused.params.method}, which needs the input of a last linear layer; this network"
                    " has none"
                )
            self._direct = find_penultimate(network, self._specs, self.classifier, like) if self._gradients else set()
        self._overwritten: Set[str] | None = None
        self(like)

    def forward(self, images: Tensor) -> Detected:  # (n, channels, height, width), prepared for the network
        tapped = self._run(images)
        logits = tapped.logits.float().cpu().numpy()
        term_scores, finite = [], np.ones(len(images), bool)
        for lookup in self._lookups:
            fitted = lookup.fitted
            values = select_values(tapped, fitted.term, self._mantissa_bits)
            finite &= torch.isfinite(values).all(dim=1).cpu().numpy()
            term_scores.append(layer_score(lookup(values, logits), fitted.counted, fitted.params.saturation))
        if self.fused is not None:
            assert tapped.features is not None
            features = round_bits(tapped.features.float(), self._mantissa_bits)
            finite &= torch.isfinite(features).all(dim=1).cpu().numpy()
            with np.errstate(all="ignore"):  # of images that are not finite
                term_scores.append(self.fused.score(features.cpu().numpy(), logits))
            finite &= np.isfinite(term_scores[-1])
        scores = combine_layers(np.stack(term_scores), self.weights)
        scores[~finite] = np.nan
        device = tapped.logits.device
        return Detected(
            logits=tapped.logits,
            score=torch.from_numpy(scores).to(device, torch.float32 if device.type == "mps" else torch.float64),
            is_ood=torch.from_numpy(~(scores >= self.threshold)).to(device),
        )

    def _run(self, images: Tensor) -> Tapped:
        """One pass, as extraction makes it, whatever mode the caller is in."""
        with (
            isolated(self.network, images.device),
            Taps(
                self.network,
                self._specs,
                self.classifier,
                penultimate=self._direct,
                overwritten=self._overwritten,
                outputs=self._outputs,
                autocast=self._autocast,
                gradients=self._gradients,
            ) as taps,
        ):
            tapped = taps(images.detach())
            self._overwritten = taps.overwritten
        return tapped


def select_values(tapped: Tapped, term: Term, mantissa_bits: int = ALL_BITS) -> Tensor:
    """Return a term's source of a layer or the logits, (n, neurons) float32."""
    if term.layer == LOGITS:
        activation = tapped.logits.float().cpu()
        gradient = torch.from_numpy(logits_gradient(activation.numpy()))
    else:
        activation = round_bits(tapped.activation[term.layer].float(), mantissa_bits)
        if not term.needs_gradient:  # there may be none
            return activation
        gradient = round_bits(tapped.gradient[term.layer].float(), mantissa_bits)
    return select_source(activation, gradient, term.source)  # type: ignore[arg-type, return-value]  # as arrays do


class Lookup:
    """One term's table: values → Σ over neurons of min(count, saturation) at each sample's bins."""

    def __init__(self, fitted: FittedTerm) -> None:
        self.fitted = fitted
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        values: Tensor,  # (n, neurons)
        logits: NDArray[np.float32],  # (n, classes)
    ) -> NDArray[np.int64]:
        """Return the sums, (n,).

        Raises:
            DetectorError: these are other neurons than were counted.
        """
        fitted = self.fitted
        if values.shape[1] != fitted.neurons:
            raise DetectorError(
                f"layer {fitted.name!r} has {values.shape[1]} neurons, {fitted.neurons} were counted;"
                " is it another network?"
            )
        if (
            values.device.type == "cpu" or fitted.term.view != "plain"
        ):  # a batch's values are few, float64 not everywhere
            rows = np.ascontiguousarray(values.cpu().numpy())
            if fitted.components is not None:
                rows = np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)  # such samples' scores are NaN in any case
            return fitted.sum_entries(rows, logits)
        return self.on_device(values)

    def on_device(self, values: Tensor) -> NDArray[np.int64]:
        """Return the same of a plain term in plain torch, for any device."""
        device, fitted = values.device, self.fitted
        if device not in self._moved:
            entries = np.minimum(fitted.counts, fitted.params.saturation)  # (neurons, bins − 1)
            self._moved[device] = torch.from_numpy(fitted.borders).to(device), torch.from_numpy(entries).to(device)
        borders, table = self._moved[device]
        bins = torch.bucketize(values.contiguous(), borders, right=True) - 1  # borders[k] ≤ x < borders[k + 1]
        places = bins.clamp_(0, table.shape[1] - 1) + table.shape[1] * torch.arange(table.shape[0], device=device)
        sums: NDArray[np.int64] = table.take(places).sum(dim=1).cpu().numpy()
        return sums


def round_bits(values: Tensor, mantissa_bits: int) -> Tensor:
    """Return float32 values with `mantissa_bits` bits of mantissa, rounded half to even, as the cache does."""
    drop = ALL_BITS - mantissa_bits
    if drop == 0:
        return values
    bits = values.contiguous().view(torch.int32)
    bits = bits + ((bits >> drop) & 1) + ((1 << (drop - 1)) - 1)
    return (bits >> drop << drop).view(torch.float32)


def load_detector(file: str | Path, network: nn.Module) -> Detector:
    """Put an exported detector on the network that it was made for.

    To get the scores of the cache to the last bit, do as `nacpipe score` does (docs/decisions/same-values.md): on
    a CPU with AVX-512, set ONEDNN_MAX_CPU_ISA=AVX2 before torch's first convolution; on CUDA,
    torch.backends.cudnn.allow_tf32 = False.

    Args:
        file: from `nacpipe export`.
        network: with the very weights, on whatever device; images must come prepared as `Exported.transform` says.
            It may be wrapped (torch.compile, DataParallel); the network inside is what runs.

    Raises:
        DetectorError: the file is not there or malformed, or the network has other weights or layers.
    """
    exported = read_detector(file)
    try:
        return attach(exported, network)
    except DetectorError as error:
        raise DetectorError(f"{file}: {error}") from None


def attach(exported: Exported, network: nn.Module) -> Detector:
    """Put an exported detector on its network.

    Raises:
        DetectorError: the network has other weights or layers.
    """
    identity, transform = exported.identity, exported.transform
    network = unwrap(network)
    if differences := diff({"weights": identity["weights"]}, {"weights": hash_network(network)}):
        inside = [name for name, child in network.named_children() if hash_network(child) == identity["weights"]]
        advice = "give that network with those weights, or extract and export for this one"
        if inside:
            advice = f"that one is its module {inside[0]!r}: give network.{inside[0]}"
        raise DetectorError(f"it was exported for another network ({'; '.join(differences)}); {advice}")
    side, (device, dtype) = transform.crop, find_device_and_dtype(network)
    noise = torch.randn(2, len(transform.mean), side, side, generator=torch.Generator().manual_seed(0))
    return Detector(
        network,
        exported.terms,
        exported.taps,
        noise.to(device, dtype),
        threshold=exported.threshold,
        autocast=AUTOCAST["none" if identity["dtype"] == "float32" else identity["dtype"]],
        mantissa_bits=exported.mantissa_bits,
        name=str(identity.get("architecture", "")),
        outputs=str(identity.get("outputs", "logits")),
        fused=exported.fused,
    )
