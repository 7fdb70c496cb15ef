"""A detector in tensor operations alone, so that `torch.export` and ONNX can hold it; forward passes only.

    input ──▶ network with taps ──▶ values (n, neurons) ──▶ bins ──▶ entries ──▶ Σ, weights ──▶ score, is_ood

The same numbers as `Detector`: borders are compared in float32, entries are summed as whole numbers, components,
feature scores and the weighted sum are float64. A bin is found by bisection, in as many comparisons as the number of
bins has binary digits:

    borders  −∞  b1  b2  b3  b4  b5  +∞  +∞       padded to 2^k − 1; three comparisons find one of 8 places

Numbers of float64 are buffers: the exporter to ONNX rounds a number in the code to float32, also beside float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.cache.layout import ALL_BITS
from nacpipe.errors import DetectorError
from nacpipe.method.counting import SparseCounts
from nacpipe.method.feature_scores import STEP, Fdbd, FittedFusion, Nci, Vim
from nacpipe.method.fitted_term import FittedTerm
from nacpipe.method.term import LOGITS, Term
from nacpipe.networks.taps import Tapped, Taps

SMALLEST = -149  # the exponent of float32's smallest number


class DetectorGraph(nn.Module):
    """The network's arguments in, (logits, score, percentile, is_ood) out, as `Detector` gives them."""

    def __init__(
        self,
        network: nn.Module,
        taps: Taps,
        terms: Sequence[FittedTerm],
        *,
        classifier: str | None,
        direct: Set[str],
        fused: FittedFusion | None,
        weights: NDArray[np.float64],  # (terms,), the fused score's last
        threshold: float,
        validation: NDArray[np.float64] | None,
        mantissa_bits: int,
    ) -> None:
        """Put the parts together.

        Args:
            network: frozen, while its taps exist.
            taps: of forward passes alone, on that network.
            terms: the coverage.
            classifier: path of the last linear layer.
            direct: layers whose pooled output is the classifier's input: their gradient has a closed form.
            fused: the feature score beside the terms.
            weights: of the terms.
            threshold: the lowest score that counts as ID.
            validation: scores of id/val, ascending, among which a percentile is.
            mantissa_bits: of the mantissa of activations and features.

        Raises:
            DetectorError: a term needs a backward pass.
        """
        super().__init__()
        self.names: tuple[str, ...] | None = None
        """The names of the network's keyword arguments, in the order in which `forward` takes their tensors."""
        if needing := [
            fitted.name for fitted in terms if fitted.term.needs_gradient and fitted.term.layer not in direct
        ]:
            raise DetectorError(
                f"term {needing[0]!r} needs a backward pass, which other runtimes do not have; extract with"
                " --no-gradient (nacpipe extract … --no-gradient --cache FORWARD.zarr), search that cache, and export"
                " its detector"
            )
        self.network = network
        self._taps = (taps,)  # in a tuple: it is not a part of the module's state
        self._classifier = classifier
        self._mantissa_bits = mantissa_bits
        self.terms = nn.ModuleList([_TermTable(fitted) for fitted in terms])
        self.rounding = None if mantissa_bits == ALL_BITS else _Rounding(mantissa_bits)
        self.fused = None if fused is None else _FusedTable(fused)
        self.register_buffer("shares", torch.from_numpy(weights / weights.sum()))
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))
        self.validation = None if validation is None else _Bisection(validation)

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits (n, classes), score (n,) float64, percentile (n,) float64 and is_ood (n,) bool."""
        if self.names is not None:
            tapped = self._taps[0](dict(zip(self.names, arguments, strict=True)))
        else:
            tapped = self._taps[0](arguments[0] if len(arguments) == 1 else arguments)
        logits = tapped.logits.float()
        scores, finite = (
            torch.zeros_like(logits[:, 0], dtype=torch.float64),
            torch.ones_like(logits[:, 0], dtype=torch.bool),
        )
        members = iter(self.get_buffer("shares"))
        for table in self.terms:
            assert isinstance(table, _TermTable)
            values = self._values(tapped, table.term, logits)
            finite = finite & is_finite(values)
            scores = scores + next(members) * table(values, logits)
        if self.fused is not None:
            assert tapped.features is not None
            features = self._round(tapped.features.float())
            fused = self.fused(features, logits)
            finite = finite & is_finite(features) & is_finite(fused[:, None])
            scores = scores + next(members) * fused
        scores = torch.where(finite, scores, math.nan)
        percentile = torch.full_like(scores, math.nan)
        if self.validation is not None:
            lower = self.validation(scores, or_equal=False)
            percentile = torch.where(finite, 100.0 * lower.double() / self.validation.size, math.nan)
        return tapped.logits, scores, percentile, torch.logical_not(scores >= self.get_buffer("threshold"))

    def _values(self, tapped: Tapped, term: Term, logits: Tensor) -> Tensor:
        """A term's source, (n, neurons) float32; see `select_values`."""
        if term.layer == LOGITS:
            activation, wide = logits, logits.double()
            exp = torch.exp(wide - wide.amax(dim=1, keepdim=True))
            uniform = torch.ones_like(wide[:, :1]) / logits.shape[1]
            gradient = (exp / exp.sum(dim=1, keepdim=True) - uniform).float()
        else:
            activation = self._round(tapped.activation[term.layer].float())
            if not term.needs_gradient:
                return activation
            weight = self.network.get_submodule(str(self._classifier)).weight
            assert isinstance(weight, Tensor)
            gradient = self._round((logits.softmax(dim=1) - 1.0 / logits.shape[1]) @ weight.float())
        if term.source == "product":
            return activation * gradient
        return activation if term.source == "activation" else gradient

    def _round(self, values: Tensor) -> Tensor:
        rounded: Tensor = values if self.rounding is None else self.rounding(values)
        return rounded


class _Bisection(nn.Module):
    """How many entries of an ascending row are below a value, or at most it."""

    def __init__(self, ascending: NDArray[Any]) -> None:  # (entries,)
        super().__init__()
        self.size = ascending.size
        self._digits = max(int(self.size).bit_length(), 1)
        top = np.inf if ascending.dtype.kind == "f" else np.iinfo(ascending.dtype).max
        padded = np.full(1 << self._digits, top, ascending.dtype)
        padded[1 : 1 + self.size] = ascending  # the first place is never looked at
        self.register_buffer("entries", torch.from_numpy(padded))

    def forward(self, values: Tensor, or_equal: bool = True) -> Tensor:
        """Return the numbers of entries, int64, of the shape of the values; of NaN 0."""
        entries = self.get_buffer("entries")
        found = torch.zeros_like(values, dtype=torch.int64)
        for digit in reversed(range(self._digits)):
            place = found + (1 << digit)
            entry = entries[place]
            found = torch.where(entry <= values if or_equal else entry < values, place, found)
        return found.clamp(max=self.size)


class _TermTable(nn.Module):
    """One term's table: values (n, neurons) → the mean over neurons of the table, (n,) float64."""

    def __init__(self, fitted: FittedTerm) -> None:
        super().__init__()
        self.term, self._bins, self._counted = fitted.term, fitted.params.bins - 1, fitted.counted
        scale = torch.tensor(fitted.counted * fitted.params.saturation, dtype=torch.float64)
        self.register_buffer("scale", scale)
        self.borders = _Bisection(fitted.borders)
        self.components = fitted.components is not None
        if fitted.components is not None:
            self.register_buffer("mean", torch.from_numpy(fitted.components.mean.astype(np.float64)))
            self.register_buffer("matrix", torch.from_numpy(fitted.components.matrix.astype(np.float64)))
        self.keys = None
        first = np.arange(fitted.counted) * self._bins  # a neuron's first place in the table
        self.register_buffer("first", torch.from_numpy(first.astype(np.int64)))
        if isinstance(fitted.table, SparseCounts):
            assert fitted.groups is not None
            self.register_buffer("group_of", torch.from_numpy(fitted.groups.group_of.astype(np.int64)))
            # The counts above 0 alone, found by their place in the whole table: row · bins + bin, ascending.
            rows = np.repeat(np.arange(fitted.table.starts.size - 1), np.diff(fitted.table.starts))
            self.keys = _Bisection(rows * self._bins + fitted.table.bins)
            counts = fitted.table.counts if fitted.table.counts.size else np.zeros(1, np.int32)
        else:
            counts = fitted.table.reshape(-1)
        self.register_buffer("entries", _narrow(np.minimum(counts, fitted.params.saturation)))

    def forward(self, values: Tensor, logits: Tensor) -> Tensor:
        """Return the term's score, (n,)."""
        if self.components:
            known = torch.where(torch.isfinite(values), values, 0.0)
            values = ((known.double() - self.get_buffer("mean")) @ self.get_buffer("matrix")).float()
        bins = (self.borders(values) - 1).clamp(0, self._bins - 1)
        places, entries = self.get_buffer("first") + bins, self.get_buffer("entries")
        if self.keys is None:
            found = entries[places].to(torch.int64)
        else:
            groups = self.get_buffer("group_of")[logits.argmax(dim=1)]
            places = places + (groups * (self._counted * self._bins))[:, None]
            stored = self.keys(places)  # the last stored place that is at most this one, from 1; 0: there is none
            there = self.keys.get_buffer("entries")[stored] == places
            found = torch.where(there, entries[(stored - 1).clamp(min=0)].to(torch.int64), 0)
        return found.sum(dim=1).double() / self.get_buffer("scale")


class _Rounding(nn.Module):
    """float32 values with fewer bits of mantissa, rounded half to even, without a look at their bits.

    value · 2^(bits − exponent) is rounded to a whole number in float64, where all of this is exact.
    """

    def __init__(self, mantissa_bits: int) -> None:
        super().__init__()
        self._bits = mantissa_bits
        powers = np.exp2(np.arange(SMALLEST - 1, 130, dtype=np.float64))
        self.register_buffer("powers", torch.from_numpy(powers))

    def forward(self, values: Tensor) -> Tensor:
        """Return the rounded values; what is not finite stays so."""
        powers = self.get_buffer("powers")
        wide = torch.where(torch.isfinite(values), values, 0.0).double()
        size = wide.abs().clamp(min=2.0**-126)  # numbers below have the spacing of the exponent −126
        exponent = torch.floor(torch.log(size) / math.log(2)).to(torch.int64)  # at most one off, beside powers of 2
        exponent = torch.where(powers[exponent - SMALLEST + 1] > size, exponent - 1, exponent)
        exponent = torch.where(powers[exponent - SMALLEST + 2] <= size, exponent + 1, exponent)
        step = powers[exponent - SMALLEST + 1] * 2.0**-self._bits
        rounded = (torch.round(wide / step) * step).float()
        return torch.where(torch.isfinite(values), rounded, values)


class _FusedTable(nn.Module):
    """The feature score, standardised: features (n, d) and logits (n, classes) → (n,) float64."""

    def __init__(self, fitted: FittedFusion) -> None:
        super().__init__()
        self._score = fitted.feature_score
        for name in ("mean", "deviation"):
            self.register_buffer(f"score_{name}", torch.tensor(getattr(fitted.params, name), dtype=torch.float64))
        for name, array in fitted.feature_score.arrays().items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array, np.float64)))

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the scores; see `method/feature_scores.py` for the formulas."""
        z, wide = features.double(), logits.double()
        if isinstance(self._score, Nci):
            centred = z - self.get_buffer("mean")
            rows = self.get_buffer("weight")[wide.argmax(dim=1)]
            scores = (centred * rows).sum(dim=1) / _length(centred)
        elif isinstance(self._score, Fdbd):
            between = self.get_buffer("between")[wide.argmax(dim=1)]
            boundaries = ((wide.amax(dim=1, keepdim=True) - wide) / between).sum(dim=1)
            distance = _length(z - self.get_buffer("mean")).clamp(min=1e-8)
            scores = boundaries / ((logits.shape[1] - 1) * distance)
        else:
            assert isinstance(self._score, Vim)
            principal, centred = self.get_buffer("principal"), z - self.get_buffer("origin")
            top = wide.amax(dim=1)
            energy = top + torch.log(torch.exp(wide - top[:, None]).sum(dim=1))
            outside = _length(centred - (centred @ principal) @ principal.T)
            scores = energy - self.get_buffer("alpha") * outside
        standardised = (scores - self.get_buffer("score_mean")) / self.get_buffer("score_deviation")
        return torch.round(standardised / STEP) * STEP


def is_finite(values: Tensor) -> Tensor:  # (n, neurons)
    """Return which rows are finite, (n,)."""
    return torch.isfinite(values).all(dim=1)


def _length(vectors: Tensor) -> Tensor:  # (n, d)
    return torch.sqrt((vectors * vectors).sum(dim=1))


def _narrow(counts: NDArray[np.int32]) -> Tensor:
    """Counts in the narrowest type that ONNX's Gather and torch share."""
    largest = int(counts.max(initial=0))
    dtype = np.uint8 if largest < 1 << 8 else np.int16 if largest < 1 << 15 else np.int32
    return torch.from_numpy(np.ascontiguousarray(counts, dtype))
