"""Poolings: a layer's output → one number per neuron, of padded samples over the positions that count.

sum-nchw, sum-nhwc       images: maps and tokens on a grid      (n, c, h, w), (n, h, w, c)
sum-ncdhw, sum-ndhwc     volumes, videos                        (n, c, d, h, w), (n, d, h, w, c)
sum-ncl                  one-dimensional convolutions           (n, c, length)
sum-tokens, class-token  tokens, recurrent outputs              (n, length, units)
sum-lnc                  the same without batch_first           (length, n, units)
none                     dense layers                           (n, units)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nacpipe.errors import InputError


@dataclass(frozen=True, slots=True)
class Pooling:
    """How an output becomes (n, neurons)."""

    dimensions: tuple[int, ...]
    """The numbers of dimensions that it takes."""
    neurons: int
    """The axis of the neurons."""
    pool: Callable[[Tensor], Tensor]
    length: int | None = None
    """The axis of the positions that a mask covers; None: a mask changes nothing."""
    samples: int = 0
    """The axis of the samples."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return values of a layer's output, pooled over all positions, (n, neurons)."""
        return self.pool(values)


POOLINGS: Mapping[str, Pooling] = {
    "sum-nchw": Pooling((2, 4), 1, lambda x: x.sum(dim=(2, 3)) if x.dim() == 4 else x),
    "sum-nhwc": Pooling((2, 4), -1, lambda x: x.sum(dim=(1, 2)) if x.dim() == 4 else x),
    "sum-ncdhw": Pooling((2, 5), 1, lambda x: x.sum(dim=(2, 3, 4)) if x.dim() == 5 else x),
    "sum-ndhwc": Pooling((2, 5), -1, lambda x: x.sum(dim=(1, 2, 3)) if x.dim() == 5 else x),
    "sum-ncl": Pooling((2, 3), 1, lambda x: x.sum(dim=2) if x.dim() == 3 else x, length=2),
    "sum-tokens": Pooling((3,), -1, lambda x: x.sum(dim=1), length=1),
    "sum-lnc": Pooling((3,), -1, lambda x: x.sum(dim=0), length=0, samples=1),
    "class-token": Pooling((3,), -1, lambda x: x[:, 0]),
    "none": Pooling((2,), -1, lambda x: x),
}

_TOKENS = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
_OF_IMAGES = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d)
_CHANNELS = (*(nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d), *_OF_IMAGES, nn.GroupNorm)

_AVERAGES = {  # over positions, of outputs of so many dimensions: these are channels first by definition
    3: (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    4: (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
}


def pool(
    layer: str,
    pooling: str,
    values: Tensor,
    mask: Tensor | None = None,  # (n, length)
) -> Tensor:
    """Return the pooled output of a layer, (n, neurons).

    Raises:
        InputError: the mask does not fit the output's length.
    """
    kind = POOLINGS[pooling]
    if mask is not None and kind.length is not None and values.dim() == 3:
        mask = _fit_mask(layer, mask, values.shape[kind.length])
        view = {2: mask[:, None, :], 1: mask[:, :, None], 0: mask.T[:, :, None]}[kind.length]
        values = torch.where(view, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kind.pool(values)


def _fit_mask(layer: str, mask: Tensor, length: int) -> Tensor:
    """Return the mask of a layer's positions, (n, length); one counts where any of its inputs does.

    input   1 1 1 1 1 0 0    stride 2
    layer   1   1   1   0
    """
    whole = mask.shape[1]
    if length == whole:
        return mask
    stride = max(round(whole / length), 1) if length else 1
    if -(-whole // stride) != length:
        raise InputError(
            f"layer {layer!r} has {length} positions and the mask {whole}, which is no whole stride; tap another layer,"
            " or give a mask of the layer's length"
        )
    padded = nn.functional.pad(mask, (0, length * stride - whole))
    return padded.view(len(mask), length, stride).any(dim=2)


def guess_pooling(module: nn.Module, shape: Sequence[int], before: str = "", samples: int = 2) -> str:
    """Guess the pooling of a module's output, of 2 to 5 dimensions, the first being the samples.

    The last module in it whose width is known decides: convolutions, norms, linear layers, recurrent ones.

    Args:
        module: the module.
        shape: its output's; (length, samples, units) is without batch_first.
        before: the pooling of the nearest output of as many dimensions that ran before, for modules without a width.
        samples: their number.
    """
    if len(shape) == 2:
        return "none"
    if len(shape) == 3:
        return "sum-lnc" if shape[0] != samples else known_layout(module, shape) or before or "sum-tokens"
    width = _width(module)
    first, last = shape[1], shape[-1]
    if len(shape) == 5:
        return "sum-ndhwc" if width == last != first else "sum-ncdhw"
    if width in (first, last) and first != last:
        return "sum-nhwc" if width == last else "sum-nchw"
    if first == shape[2] != last:  # without a width, two equal sizes are those of square images
        return known_layout(module, shape) or before or "sum-nhwc"
    return "sum-nchw"


def known_layout(module: nn.Module, shape: Sequence[int]) -> str:
    """Return the pooling of (n, a, b) or (n, a, b, c) by the last module of known width, or an empty text.

    Images of which a module makes tokens, (n, positions, channels), have their channels on the last axis.
    """
    channels, units = ("sum-ncl", "sum-tokens") if len(shape) == 3 else ("sum-nchw", "sum-nhwc")
    if isinstance(module, _AVERAGES[len(shape)]):
        return channels
    for part in reversed(list(module.modules())):
        if isinstance(part, _CHANNELS) and (width := _channels(part)) == shape[1]:
            return channels
        if isinstance(part, _OF_IMAGES) and len(shape) == 3 and width == shape[2]:
            return units
        if isinstance(part, _TOKENS):
            return units
    return ""


def _channels(module: nn.Module) -> int | None:
    for name in ("out_channels", "num_features", "num_channels"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    return None


def _width(module: nn.Module) -> int | None:
    for part in reversed(list(module.modules())):
        if isinstance(part, nn.Linear):
            return part.out_features
        if isinstance(part, nn.LayerNorm):
            return int(part.normalized_shape[-1])
    return None
