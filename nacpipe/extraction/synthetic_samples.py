"""`ood/val` made of `id/val`'s samples, where a caller has none (benchmarks/synthetic.py says how)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nacpipe.benchmarks.synthetic import ARRAY_KINDS, IMAGE_KINDS, Synthesis
from nacpipe.errors import InputError
from nacpipe.extraction.samples import MapSamples, find_labels, split_label
from nacpipe.networks.call import Call

CHANNELS = (1, 3, 4)  # of an image of 8 bits, whose first axis they are


class SyntheticSamples:
    """A map-style data set: a sample made of each sample of another, of the same form, without labels."""

    def __init__(self, dataset: Any, labels: NDArray[np.int64]) -> None:
        """Take the ID samples.

        Args:
            dataset: map-style; an input is a tensor or array, or a tuple or mapping of them.
            labels: (rows,), of two classes at least.

        Raises:
            InputError: an input is something else, or there are fewer than two classes.
        """
        self._dataset = dataset
        parts = list(_leaves(self._input(0)))
        kinds: tuple[str, ...] = IMAGE_KINDS
        if not (images := all(_is_image(part) for part in parts)):
            can_shuffle = all(max(part.shape, default=1) > 1 for part in parts)
            kinds = tuple(kind for kind in ARRAY_KINDS if kind != "shuffle" or can_shuffle)
        self._images = images
        self.synthesis = Synthesis(labels=labels, kinds=kinds)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._dataset)

    def __getitem__(self, row: int) -> Any:
        """Return the sample made of a row."""
        row = int(row)
        read = cache(self._input)  # each sample once, however many tensors an input has
        return _map_leaves(read(row), lambda place: self._make(row, place, read))

    def _input(self, row: int) -> Any:
        return split_label(self._dataset[row])[0]

    def _make(self, row: int, place: int, read: Callable[[int], Any]) -> Any:
        """One tensor of an input."""
        own = list(_leaves(read(row)))[place]

        def load(of: int) -> NDArray[Any]:
            part = list(_leaves(read(of)))[place]
            if isinstance(part, Tensor):
                part = part.detach().cpu()
                part = part.float() if part.dtype is torch.bfloat16 else part  # which numpy lacks
            array = np.asarray(part)
            return np.moveaxis(array, 0, -1) if self._images and array.ndim == 3 else array

        made = self.synthesis.make(row, load)
        made = np.ascontiguousarray(np.moveaxis(made, -1, 0) if self._images and made.ndim == 3 else made)
        return torch.from_numpy(made).to(own.dtype) if isinstance(own, Tensor) else made


def make_val(samples: MapSamples, call: Call) -> MapSamples:
    """Return `ood/val` made of id/val's samples.

    Raises:
        InputError: none can be made of these, saying why.
    """
    dataset = samples.dataset
    if call.mask_of(samples.examples()) is not None:
        raise InputError("its samples are padded")
    labels = find_labels(dataset)
    if labels is None or len(labels) != len(dataset):  # `labels` may be the classes'
        labels = np.array([_label(dataset, row) for row in range(len(dataset))], np.int64)
    made = SyntheticSamples(dataset, labels)
    return samples.of(
        "ood/val", made, {"list": f"made of id/val, {samples.source}", "synthetic": made.synthesis.identity()}
    )


def _label(dataset: Any, row: int) -> int:
    label = split_label(dataset[row])[1]
    try:
        return int(label)
    except (TypeError, ValueError, RuntimeError):  # none, or not a number: refused where id/val is read
        raise InputError(f"sample {row} has no whole number as its label") from None


def _is_image(part: Tensor | NDArray[Any]) -> bool:
    """Whether it is 8 bits of (channels, height, width) or (height, width)."""
    eight_bits = part.dtype in (torch.uint8, np.uint8)
    return eight_bits and (part.ndim == 2 or (part.ndim == 3 and part.shape[0] in CHANNELS))


def _leaves(given: Any) -> Iterator[Any]:
    """Yield an input's tensors and arrays, in order."""
    if isinstance(given, Tensor | np.ndarray | np.generic):
        yield given
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from _leaves(value)
    elif isinstance(given, tuple | list):
        for value in given:
            yield from _leaves(value)
    else:
        raise InputError(f"an input holds {type(given).__name__}, which is no tensor")


def _map_leaves(given: Any, make: Callable[[int], Any]) -> Any:
    """Return an input of the same form with what is made for each tensor's place."""
    places = itertools.count()

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, tuple | list):
            return tuple(walk(inner) for inner in value)
        return make(next(places))

    return walk(given)
