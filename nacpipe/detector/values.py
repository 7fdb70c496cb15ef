"""What a term counts of a batch that was run: its source, rounded as the cache's."""

from __future__ import annotations

import torch
from torch import Tensor

from nacpipe.cache.layout import ALL_BITS
from nacpipe.method.coverage import logits_gradient, select_source
from nacpipe.method.term import LOGITS, Term
from nacpipe.networks.taps import Tapped


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


def round_bits(values: Tensor, mantissa_bits: int) -> Tensor:
    """Return float32 values with `mantissa_bits` bits of mantissa, rounded half to even, as the cache does."""
    drop = ALL_BITS - mantissa_bits
    if drop == 0:
        return values
    bits = values.contiguous().view(torch.int32)
    bits = bits + ((bits >> drop) & 1) + ((1 << (drop - 1)) - 1)
    return (bits >> drop << drop).view(torch.float32)
