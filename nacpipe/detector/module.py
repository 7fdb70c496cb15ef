"""The exported detector, running beside its classifier.

    images ──▶ network with taps ──▶ values of every term    ──▶ Σ min(count, saturation) ──▶ score ──▶ is_ood
               one forward and one   (n, neurons) float32        (n,) integers               (n,) float64
               backward pass

The sums are integers, as in the cache's scoring, so a score does not depend on the batch it came in; what a network
computes for an image may, in its last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.benchmarks.standard import Transform
from nacpipe.cache import Cache, LayerSpec, as_cache
from nacpipe.cache.identity import diff, stored_precision
from nacpipe.cache.layout import ALL_BITS
from nacpipe.detector.calibration import Calibration, calibrate_scores
from nacpipe.detector.count import count_coverage
from nacpipe.detector.explanation import Explanation, explain_sample
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import Exported, keep_scores, read_detector, write_detector
from nacpipe.detector.graph import DetectorGraph
from nacpipe.detector.runtimes import EXAMPLES, RuntimeCheck, write_onnx, write_program
from nacpipe.detector.values import round_bits, select_values
from nacpipe.errors import DetectorError, InputError, ValuesError
from nacpipe.extraction.samples import split_label
from nacpipe.method.coverage import combine_layers, layer_score
from nacpipe.method.feature_scores import FittedFusion
from nacpipe.method.fitted_term import FittedTerm
from nacpipe.method.metrics import KEEP
from nacpipe.method.params import NacParams
from nacpipe.networks.buffers import kept_buffers
from nacpipe.networks.call import (
    PLAIN_CALL,
    Call,
    Mask,
    device_of,
    map_tensors,
    move,
    repeat_samples,
    tensors_of,
)
from nacpipe.networks.checkpoints import hash_network
from nacpipe.networks.poolings import POOLINGS
from nacpipe.networks.precision import FP32, deterministic, laid_out, products, stored_format
from nacpipe.networks.taps import Tapped, Taps, find_penultimate, isolated, named_failures
from nacpipe.networks.trial import run_trial_batch
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap


class Detected(NamedTuple):
    """What a detector says of n images, on their device."""

    logits: Tensor
    """(n, classes), the network's own."""
    score: Tensor
    """(n,) float64 (float32 where the device has none); larger = more like the training data."""
    percentile: Tensor
    """(n,), of the score's type: percent of id/val's scores that are lower, 0 to 100; NaN where they are not known."""
    is_ood: Tensor
    """(n,) bool: the score is below the threshold, or states are not finite (the score is then NaN)."""


class Detector(nn.Module):
    """A classifier with its coverage: a batch in, (logits, score, percentile, is_ood) out.

    A batch is the network's input: a tensor, a tuple of tensors (its arguments) or a mapping (its keyword arguments),
    or what `prepare` makes one of these of.

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
        like: Any = None,
        *,
        threshold: float = -np.inf,
        precision: str = FP32,
        mantissa_bits: int = ALL_BITS,
        name: str = "",
        outputs: str | None = None,
        fused: FittedFusion | None = None,
        call: Call = PLAIN_CALL,
        exported: Exported | None = None,
    ) -> None:
        """Put a network and coverage together.

        Args:
            network: the classifier, on whatever device; what torch.compile or DataParallel wrap is taken out of it.
            terms: the coverage.
            taps: the layers of these terms but for the logits.
            like: the network's arguments for a few samples of the kind to come, of any content, on its device; they are
                run to see whether all fits. None: the first batch is.
            threshold: the lowest score that counts as ID; by default nothing is flagged.
            precision: that the states were counted in.
            mantissa_bits: of the mantissa of activations and gradients, if the cache rounded them.
            name: the network's, for messages.
            outputs: what the network gives, as the cache had it; None finds it out.
            fused: the feature score beside the terms, if there is one.
            call: how the network is called.
            exported: the detector without its network, to be saved.

        Raises:
            DetectorError: a layer has another number of neurons, or a pooling is not known.
            InputError: the network fails or is random in evaluation mode, or a layer is not in it.
        """
        super().__init__()
        network = unwrap(network)
        self.network, self.threshold = network, threshold
        self._call, self._exported, self._name = call, exported, name or type(network).__name__
        self.validation = None if exported is None else exported.validation
        """Scores of id/val, ascending, among which a score's percentile is."""
        self.fused = fused
        self.weights = np.array(
            [*(fitted.params.weight for fitted in terms), *([] if fused is None else [fused.params.weight])]
        )
        self._lookups = [Lookup(fitted) for fitted in terms]
        self._precision, self._mantissa_bits = precision, mantissa_bits
        for spec in taps:
            if spec.pooling not in POOLINGS:
                raise DetectorError(f"layer {spec.name!r}: pooling {spec.pooling!r} is not known")
        self._specs = list(taps)
        self._gradients = any(fitted.term.needs_gradient for fitted in terms)
        if self._gradients and any(parameter.is_inference() for parameter in network.parameters()):
            raise InputError(
                "the network was made under torch.inference_mode, which forbids gradients; make it outside"
            )
        self._overwritten: Set[str] | None = None
        self._strict = True
        self._given_outputs = outputs
        self._changes_buffers = False
        self._ready = False
        if like is not None:
            self._set_up(like, examples=not isinstance(like, Tensor))
            self._detect(self._run(like))

    def _set_up(self, like: Any, *, examples: bool) -> None:
        """Find the classifier and the layers that are its input, by a trial batch."""
        outputs, network = self._given_outputs, self.network
        # What a layer is does not depend on rounding.
        with isolated(network, device_of(like)), kept_buffers(network), products(FP32):
            trial = run_trial_batch(
                self._name, network, like, gives_features=outputs == "features", call=self._call, examples=examples
            )
            self.classifier, self._outputs = trial.classifier, outputs or trial.outputs
            self._changes_buffers = bool(trial.changed_buffers)
            if self.fused is not None and self.classifier is None:
                raise DetectorError(
                    f"its score holds {self.fused.params.method}, which needs the input of a last linear layer; this"
                    " network has none"
                )
            self._direct: Set[str] = frozenset()
            if self._gradients:
                few = repeat_samples(like, 2)
                self._direct = find_penultimate(network, self._specs, self.classifier, few, self._call)
        self._ready = True

    def prepare_image(self, content: bytes) -> Tensor:
        """Return an encoded image (the bytes of a PNG, JPEG, … file) as the network takes it, (channels, crop, crop).

        It is prepared as the images of the cache were.

        Raises:
            ImageError: it cannot be read.
            DetectorError: the detector takes no images that nacpipe prepares.
        """
        from nacpipe.extraction.dataset import build_transform  # torchvision
        from nacpipe.extraction.decoder import stored_decoder
        from nacpipe.extraction.image_file import decode_image

        decoder = stored_decoder(self.exported.identity, find_device_and_dtype(self.network)[0])
        return build_transform(self.exported.transform)(decode_image(content, "the image", decoder=decoder))

    def forward(self, batch: Any) -> Detected:
        """Score a batch of n samples.

        Args:
            batch: the network's input, without labels, such as (n, channels, height, width); it is taken to the
                network's device.

        Raises:
            InputError: the network fails on the first batch, or a mask does not fit.
            DetectorError: a layer has another number of neurons than was counted.
        """
        if torch.compiler.is_compiling():  # torch.compile(detector): hooks and compiled tables are no graph's
            disable: Any = torch.compiler.disable
            eager: Detected = disable(self._forward)(batch)
            return eager
        return self._forward(batch)

    def _forward(self, batch: Any) -> Detected:
        return self._detect(self._run(self._arguments(batch)))

    def _arguments(self, batch: Any) -> Any:
        arguments = self._call.arguments(batch)
        device = find_device_and_dtype(self.network)[0]
        if device_of(arguments) != device:
            arguments = move(arguments, device)
        self._check_size(arguments)
        if not self._ready:
            self._set_up(arguments, examples=True)
        return arguments

    def _check_size(self, arguments: Any) -> None:
        """Refuse samples of another size than the counted ones, whose states are sums over other positions.

        Raises:
            InputError: naming both sizes.
        """
        if self._exported is None or self._call.mask_of(arguments) is not None:
            return
        counted = self._exported.sample_shape
        # Keywords may come in another order than those of the counted samples, whose first tensor is known.
        given = [tuple(tensor.shape[1:]) for _, tensor in tensors_of(arguments)]
        if counted is not None and counted not in given:
            raise InputError(
                f"samples are {' and '.join(map(str, given))}, and this detector's states were counted on {counted}: a"
                " layer's states are sums over its positions; bring them to that size"
            )

    def _term_scores(self, tapped: Tapped) -> tuple[list[NDArray[np.float64]], NDArray[np.bool_]]:
        """Return every term's score (n,), the fused one's last, and which samples are finite (n,)."""
        logits = tapped.logits.float().cpu().numpy()
        term_scores, finite = [], np.ones(len(logits), bool)
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
        return term_scores, finite

    def _detect(self, tapped: Tapped) -> Detected:
        return self._combine(tapped, *self._term_scores(tapped))

    def _combine(
        self, tapped: Tapped, term_scores: Sequence[NDArray[np.float64]], finite: NDArray[np.bool_]
    ) -> Detected:
        scores = combine_layers(np.stack(term_scores), self.weights)
        scores[~finite] = np.nan
        device = tapped.logits.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return Detected(
            logits=tapped.logits,
            score=torch.from_numpy(scores).to(device, dtype),
            percentile=torch.from_numpy(self._percentiles(scores)).to(device, dtype),
            is_ood=torch.from_numpy(~(scores >= self.threshold)).to(device),
        )

    def _percentiles(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the percent of id/val's scores that are lower, (n,)."""
        if self.validation is None:
            return np.full(len(scores), np.nan)
        percentiles = 100.0 * np.searchsorted(self.validation, scores, side="left") / self.validation.size
        percentiles[np.isnan(scores)] = np.nan
        return percentiles

    @classmethod
    def from_cache(
        cls,
        cache: Cache | str | Path,
        params: NacParams,
        network: nn.Module,
        *,
        keep: float = KEEP,
        prepare: Callable[[Any], Any] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        mask: Mask | None = None,
    ) -> Detector:
        """Count the coverage of a cache's id/train, and choose the threshold on its id/val.

        Args:
            cache: a finished cache, or its path or URL.
            params: from `tune` or `read_params`.
            network: the very network of the cache, on whatever device.
            keep: the share of id/val that shall not be flagged, above 0 and at most 1.
            prepare: as for `extract`.
            logits: as for `extract`.
            mask: as for `extract`.

        Raises:
            DetectorError: the network has other weights or layers than the cache was made with.
            CacheError: the cache is not there or not finished.
            InputError: keep is no share, or parameters do not fit the cache.
        """
        exported = export_detector(as_cache(cache), params, keep)
        return attach(exported, network, Call(prepare=prepare, logits=logits, mask=mask))

    @classmethod
    def fit(
        cls,
        network: nn.Module,
        loader: Iterable[Any],
        params: NacParams,
        *,
        pooling: Mapping[str, str] | None = None,
        layers: Mapping[str, str] | None = None,
        prepare: Callable[[Any], Any] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        mask: Mask | None = None,
    ) -> Detector:
        """Count the coverage of training samples, without a cache. Nothing is flagged before `calibrate`.

        Args:
            network: the classifier, on whatever device.
            loader: batches of training samples: inputs, `(input, label)`, or mappings; labels are not used.
            params: their terms name the network's modules, or `layers`' names.
            pooling: layer → pooling, where the guess is wrong.
            layers: layer → module path, where the parameters call it otherwise.
            prepare: as for `extract`.
            logits: as for `extract`.
            mask: as for `extract`.

        Raises:
            InputError: there are no samples, a layer is not in the network, or a pooling does not fit it.
            ValuesError: states are not finite.
        """
        call = Call(prepare=prepare, logits=logits, mask=mask)
        batches = (split_label(batch)[0] for batch in loader)
        exported, examples = count_coverage(network, params, batches, pooling or {}, layers, call)
        return cls(network, exported.terms, exported.taps, examples, fused=exported.fused, call=call, exported=exported)

    @classmethod
    def load(
        cls,
        path: str | Path,
        network: nn.Module,
        *,
        prepare: Callable[[Any], Any] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        mask: Mask | None = None,
    ) -> Detector:
        """Read a detector that `save` or `nacpipe export` wrote, and put it on its network.

        Raises:
            DetectorError: the file is not there or malformed, or the network has other weights or layers.
        """
        return load_detector(path, network, Call(prepare=prepare, logits=logits, mask=mask))

    @property
    def exported(self) -> Exported:
        """This detector without its network, as it would be saved.

        Raises:
            DetectorError: it was not made by `from_cache`, `fit` or `load`.
        """
        if self._exported is None:
            raise DetectorError("this detector has no identity; make it by from_cache, fit or load")
        return replace(self._exported, threshold=self.threshold, validation=self.validation)

    def save(self, path: str | Path) -> None:
        """Write the detector without its network: tables, threshold and identity, as safetensors.

        Raises:
            DetectorError: it has no threshold yet, or was not made by `from_cache`, `fit` or `load`.
            InputError: the file cannot be written.
        """
        exported = self.exported
        if not np.isfinite(self.threshold):
            raise DetectorError("this detector has no threshold yet; choose one with calibrate(loader)")
        write_detector(path, exported)

    def to_onnx(self, path: str | Path, example: Any = None) -> RuntimeCheck:
        """Write network and detector as one ONNX file, for a server without torch.

        onnxruntime runs it before it is written: `session.run(None, {"input": images})` gives logits, score, percentile
        and is_ood, of any number of samples. Images come prepared as `Exported.transform` says.

        Args:
            path: of the file, .onnx.
            example: a batch, as `forward` takes it, on which both are compared; None: random images of the
                detector's size.

        Returns:
            How far the file's scores are from this detector's.

        Raises:
            MissingExtra: onnx, onnxscript or onnxruntime is not installed.
            DetectorError: a term needs a backward pass, the network cannot be written as ONNX, or onnxruntime cannot
                run it or gives other logits.
            InputError: there is no example of an input that is no image, or the file cannot be written.
        """
        with self._graph(example) as (graph, arguments):
            return write_onnx(path, graph, arguments, self._describe(), self._detect_arguments)

    def to_torch_export(self, path: str | Path, example: Any = None) -> RuntimeCheck:
        """Write network and detector as one program of torch.export: `torch.export.load(path).module()(images)`.

        Arguments, result and errors as `to_onnx`; without onnx.
        """
        with self._graph(example) as (graph, arguments):
            return write_program(path, graph, arguments, self._describe(), self._detect_arguments)

    @contextmanager
    def _graph(self, example: Any) -> Iterator[tuple[DetectorGraph, Any]]:
        """This detector in tensor operations alone, and arguments for a few samples, while the network has its taps."""
        if example is None:
            if self._exported is None or self._exported.prepares_input:
                raise InputError("its input are no images that nacpipe prepares; give a batch with example=")
            example = _draw_images(self._exported.transform, EXAMPLES)
        arguments = self._arguments(example)
        device = device_of(arguments)
        with self._tap(device, gradients=False) as taps:
            layers = {spec.name for spec in self._specs}
            graph = DetectorGraph(
                self.network,
                taps,
                [lookup.fitted for lookup in self._lookups],
                classifier=self.classifier,
                direct=self._direct if layers <= self._direct else frozenset(),
                fused=self.fused,
                weights=self.weights,
                threshold=self.threshold,
                validation=self.validation,
                mantissa_bits=self._mantissa_bits,
            )
            yield graph.to(device), map_tensors(Tensor.detach, arguments)

    def _detect_arguments(self, arguments: Any) -> Detected:
        return self._detect(self._run(arguments))

    def _describe(self) -> dict[str, Any]:
        """What a file for another runtime says of this detector."""
        if self._exported is None:
            return {"threshold": self.threshold}
        described = self.exported.to_json()
        return {name: described[name] for name in ("threshold", "keep", "classes", "identity", "information")}

    def calibrate(self, loader: Iterable[Any], keep: float = KEEP, *, confidence: float = 0.95) -> Calibration:
        """Choose the threshold, and what percentiles refer to, by one's own in-distribution data.

        Args:
            loader: batches of samples that are in-distribution and were not trained on: inputs, `(input, label)`, or
                mappings.
            keep: the share of them that shall not be flagged, above 0 and at most 1.
            confidence: of the interval.

        Returns:
            The threshold, and between which shares of such data will not be flagged: of n samples, k of which are kept,
            the share is distributed as Beta(k, n − k + 1).

        Raises:
            InputError: keep or confidence is no share, or there are no samples.
            ValuesError: a score is not finite.
        """
        for name, share in (("keep", keep), ("confidence", confidence)):
            if not 0 < share <= 1:
                raise InputError(f"{name} is {share}; it must be above 0 and at most 1")
        parts = [self(split_label(batch)[0]).score.double().cpu().numpy() for batch in loader]
        scores = np.concatenate(parts) if parts else np.empty(0)
        if scores.size == 0:
            raise InputError("there are no samples to calibrate with")
        if wrong := int(np.isnan(scores).sum()):
            raise ValuesError(f"{wrong} of {scores.size} samples have no finite score")
        calibration = calibrate_scores(scores, keep, confidence)
        self.threshold, self.validation = calibration.threshold, keep_scores(scores)
        if self._exported is not None:
            self._exported = replace(self._exported, keep=keep)
        return calibration

    def explain(self, batch: Any, *, neurons: int = 10) -> list[Explanation]:
        """Return for each sample of a batch which terms and neurons made its score low.

        Args:
            batch: as `forward` takes it.
            neurons: how many of the sample's neurons of lowest coverage are listed.

        Raises:
            InputError: a mask does not fit.
        """
        tapped = self._run(self._arguments(batch))
        term_scores, finite = self._term_scores(tapped)
        detected = self._combine(tapped, term_scores, finite)
        logits = tapped.logits.float().cpu().numpy()
        shares = self.weights / self.weights.sum()
        entries = []
        for lookup, share in zip(self._lookups, shares, strict=False):
            values = select_values(tapped, lookup.fitted.term, self._mantissa_bits).cpu().numpy()
            entries.append((lookup.fitted, float(share), values, lookup.fitted.entries(np.nan_to_num(values), logits)))
        names = [lookup.fitted.name for lookup in self._lookups]
        names += [] if self.fused is None else [self.fused.params.method]
        return [
            explain_sample(
                score=float(detected.score[row]),
                percentile=float(detected.percentile[row]),
                names=names,
                weights=shares,
                term_scores=np.array([scores[row] for scores in term_scores]),
                entries=[(fitted, share, values[row], covered[row]) for fitted, share, values, covered in entries],
                neurons=neurons,
            )
            for row in range(len(logits))
        ]

    def _run(self, images: Any) -> Tapped:
        """One pass, as extraction makes it, whatever mode the caller is in."""
        cached = None if self._exported is None else self._exported.cache_layers
        with self._tap(device_of(images), gradients=self._gradients, cache_layers=cached) as taps:
            with named_failures(images):
                tapped = taps(map_tensors(Tensor.detach, images))
            self._overwritten, self._strict = taps.overwritten, taps.strict
        return tapped

    @contextmanager
    def _tap(
        self, device: torch.device, *, gradients: bool, cache_layers: Sequence[str] | None = None
    ) -> Iterator[Taps]:
        """The network with taps on the layers of the terms; arguments as those of `Taps`."""
        identity = {} if self._exported is None else self._exported.identity
        with (
            isolated(self.network, device),
            kept_buffers(self.network) if self._changes_buffers else nullcontext(),
            laid_out(self.network, stored_format(identity, device)),  # this and the next two: as the states were made
            products(self._precision),
            deterministic() if device.type == "cuda" else nullcontext(),
            Taps(
                self.network,
                self._specs,
                self.classifier,
                penultimate=self._direct,
                overwritten=self._overwritten,
                outputs=self._outputs,
                precision=self._precision,
                gradients=gradients,
                call=self._call,
                cache_layers=cache_layers,
                strict=self._strict,
            ) as taps,
        ):
            yield taps


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


def load_detector(file: str | Path, network: nn.Module, call: Call = PLAIN_CALL) -> Detector:
    """Put an exported detector on the network that it was made for.

    To get the scores of the cache to the last bit, do as `nacpipe score` does (docs/decisions/same-values.md): on
    a CPU with AVX-512, set ONEDNN_MAX_CPU_ISA=AVX2 before torch's first convolution.

    Args:
        file: from `nacpipe export`.
        network: with the very weights, on whatever device; images must come prepared as `Exported.transform` says.
            It may be wrapped (torch.compile, DataParallel); the network inside is what runs.
        call: how the network is called.

    Raises:
        DetectorError: the file is not there or malformed, or the network has other weights or layers.
    """
    exported = read_detector(file)
    try:
        return attach(exported, network, call)
    except DetectorError as error:
        raise DetectorError(f"{file}: {error}") from None


def _check_call(stored: Any, call: Call) -> None:
    """Refuse a call with other options than the states were made with; of functions the source is not compared."""
    if not isinstance(stored, Mapping):  # by the command line, or an earlier nacpipe
        return
    for name in ("prepare", "logits", "mask"):
        before, now = stored.get(name), getattr(call, name)
        if before is None and now is not None:
            raise DetectorError(f"its states were made without {name}=; leave it out")
        if before is not None and now is None:
            raise DetectorError(f"its states were made with {name}=; give the same")
        if isinstance(now, str) and now != before:
            raise DetectorError(f"its states were made with another {name}= than {now!r}; give the same")


def attach(exported: Exported, network: nn.Module, call: Call = PLAIN_CALL) -> Detector:
    """Put an exported detector on its network.

    Raises:
        DetectorError: the network has other weights or layers, or the call lacks `prepare`, `logits` or `mask`.
    """
    identity = exported.identity
    _check_call(identity.get("call"), call)
    network = unwrap(network)
    if differences := diff({"weights": identity["weights"]}, {"weights": hash_network(network)}):
        inside = [name for name, child in network.named_children() if hash_network(child) == identity["weights"]]
        advice = "give that network with those weights, or extract and export for this one"
        if inside:
            advice = f"that one is its module {inside[0]!r}: give network.{inside[0]}"
        raise DetectorError(f"it was exported for another network ({'; '.join(differences)}); {advice}")
    like = None
    if not exported.prepares_input:
        like = _draw_images(exported.transform, 2).to(*find_device_and_dtype(network))
    return Detector(
        network,
        exported.terms,
        exported.taps,
        like,
        threshold=exported.threshold,
        precision=stored_precision(identity),
        mantissa_bits=exported.mantissa_bits,
        name=str(identity.get("architecture", "")),
        outputs=str(identity.get("outputs", "logits")),
        fused=exported.fused,
        call=call,
        exported=exported,
    )


def _draw_images(transform: Transform, count: int) -> Tensor:
    """Return random images of a transform's size, the same every time."""
    shape = (count, len(transform.mean), transform.crop, transform.crop)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
