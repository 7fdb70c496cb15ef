"""Data sets, loaders and iterables of a caller as the samples of splits.

    map-style data set, DataLoader of one     blocks of samples by their positions; goes on at a block
    any other iterable of batches             from its beginning each time; its identity needs a pass over it

A sample, and a batch, is an input, (input, label), or a mapping, whose `label` or `labels` is the label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset, default_collate

from nacpipe.benchmarks.lists import OOD, check_labels
from nacpipe.errors import InputError, NacError, first_line
from nacpipe.networks.call import Call, count_samples, take_rows, tensors_of

LABELS = ("label", "labels")
SEEDED = 16  # samples whose content is part of a split's identity
EXAMPLES = 6  # that a trial batch runs

Batch = tuple[Any, NDArray[np.int64] | None]
"""The network's arguments for n samples, and their labels (n,)."""


def split_label(batch: Any) -> tuple[Any, Any]:
    """Return input and label of a sample or batch; None for a label that is not there.

    Raises:
        InputError: it is a tuple or list of more than two.
    """
    if isinstance(batch, Mapping):
        label = next((batch[key] for key in LABELS if key in batch), None)
        return {key: value for key, value in batch.items() if key not in LABELS}, label
    if not isinstance(batch, tuple | list) or all(isinstance(part, str) for part in batch):  # a batch of texts
        return batch, None
    if len(batch) == 1:
        return batch[0], None
    if len(batch) != 2:
        raise InputError(
            f"a sample has {len(batch)} parts; wanted: an input, (input, label), or a mapping; leave the others out by"
            " a DataLoader's collate_fn, or put the network's arguments into a tuple: ((a, b), label)"
        )
    return batch[0], batch[1]


def collate_samples(samples: list[Any]) -> Any:
    """Return a batch as torch's `default_collate` makes it, or of what that does not take, such as images, lists."""
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError):  # of another type; tensors of several sizes
        parts = [split_label(sample) for sample in samples]
    if all(isinstance(given, Mapping) for given, _ in parts):
        inputs: Any = {key: [given[key] for given, _ in parts] for key in parts[0][0]}
        return inputs if parts[0][1] is None else {**inputs, "label": default_collate([label for _, label in parts])}
    inputs = [given for given, _ in parts]
    return [inputs] if parts[0][1] is None else [inputs, default_collate([label for _, label in parts])]


class _Reader:
    """Reads batches of one split: arguments, labels, and whether samples are of one length."""

    def __init__(self, name: str, call: Call) -> None:
        self.name, self._call = name, call
        self.advice = ""
        """What to do where samples look like batches."""
        self._shapes: list[tuple[str, tuple[int, ...]]] | None = None
        self._masked = False

    def read(self, batch: Any) -> Batch:
        """Return a batch's arguments and labels.

        Raises:
            InputError: labels are not one whole number for each sample; or lengths differ and there is no mask.
        """
        given, label = split_label(batch)
        arguments = self._call.arguments(given)
        rows = count_samples(arguments)
        # Keywords may come in any order.
        shapes = sorted((name, tuple(tensor.shape[1:])) for name, tensor in tensors_of(arguments))
        if self._shapes is None:
            self._shapes, self._masked = shapes, self._call.mask_of(arguments) is not None
        elif shapes != self._shapes and self._call.mask_of(arguments) is None:
            raise InputError(
                f"{self.name}: samples differ in shape ({_show(self._shapes)}; {_show(shapes)}), and nothing tells"
                " which positions are padding: a state would depend on the other samples of its batch; bring them to"
                " one size, or give mask="
            )
        return arguments, None if label is None else self._labels(label, rows)

    def check_like(self, other: _Reader) -> None:
        """Refuse samples of another shape than those of another split, whose states are sums over other positions.

        Raises:
            InputError: naming both shapes.
        """
        if self._shapes != other._shapes and not (self._masked or other._masked):
            raise InputError(
                f"{self.name}: samples differ in shape from those of {other.name} ({_show(self._shapes or [])};"
                f" {_show(other._shapes or [])}): a layer's states are sums over its positions; bring them to one size,"
                " or give mask="
            )

    def _labels(self, label: Any, rows: int) -> NDArray[np.int64]:
        values = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
        if self.name.startswith("ood/"):
            return np.full(rows, OOD)
        if values.shape != (rows,) or values.dtype.kind not in "iu":
            advice = "; number the classes as the network does"
            if values.ndim > 1:
                advice = (
                    self.advice or "; of one-hot rows give row.argmax(); several classes of one sample are no label"
                )
            elif values.ndim == 0:
                advice = "; an iterable gives batches: of single samples give DataLoader(data, batch_size=…)"
            raise InputError(
                f"{self.name}: labels are {values.dtype} {values.shape} for {rows} sample{'s' * (rows > 1)}; wanted:"
                f" ({rows},) whole numbers{advice}"
            )
        return values.astype(np.int64)

    def finish(self, labels: NDArray[np.int64] | None, rows: int, classes: int, start: int) -> NDArray[np.int64]:
        """Return the labels of rows, which OOD samples need not have.

        Raises:
            InputError: an ID sample has none, or one that is no class.
        """
        if labels is None:
            if not self.name.startswith("ood/"):
                raise InputError(f"{self.name}: samples have no label; give (input, label), or a mapping with label")
            return np.full(rows, OOD)
        number = f"the network, which has {classes} classes"
        check_labels(self.name, labels, classes, lambda row: f"sample {start + row}", number)
        return labels


def _show(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes)


class MapSamples:
    """The samples of a map-style data set, or of a DataLoader that reads one in order."""

    def __init__(
        self,
        name: str,
        dataset: Any,
        call: Call,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        fingerprint: str | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        """Look at a data set; its seeded samples are read.

        Args:
            name: the split.
            dataset: with `__len__` and `__getitem__`.
            call: how the network is called.
            collate: a list of samples → a batch; None: torch's `default_collate`.
            workers: processes that read samples; 0: this one.
            fingerprint: text that stands for the data in the cache's identity, in place of samples' content.
            described: further fields of the identity.

        Raises:
            InputError: it is empty, or a sample is another each time it is read.
        """
        self.name, self.source = name, type(dataset).__name__
        self.dataset, self._call, self._workers = dataset, call, workers
        self._collate = collate or (default_collate if call.prepare is None else collate_samples)
        self._reader = _Reader(name, call)
        if isinstance(dataset, list):
            self._reader.advice = "; a list is one of samples: of batches give iter(batches)"
        if len(dataset) < 1:
            raise InputError(f"{name} has no samples")
        self.index: NDArray[np.int64] = np.arange(len(dataset))
        """(rows,)"""
        self._identity = {"list": self.source, "length": len(dataset), **self._content(fingerprint)}
        self._identity |= described or {}

    def of(self, name: str, dataset: Any, described: Mapping[str, Any]) -> MapSamples:
        """Return another split's samples, which are read as these are."""
        return MapSamples(name, dataset, self._call, collate=self._collate, workers=self._workers, described=described)

    def _content(self, fingerprint: str | None) -> dict[str, str]:
        rows = self.index.size
        chosen = {0, rows - 1, *np.random.RandomState(0).randint(0, rows, SEEDED).tolist()}
        digest = hashlib.sha256()
        if fingerprint is not None:
            chosen, digest = {0}, hashlib.sha256(fingerprint.encode())
        for row in sorted(chosen):
            first, again = (_digest(*self._reader.read(self._batch([row]))) for _ in range(2))
            if first != again:
                raise InputError(
                    f"{self.name}: sample {row} of {self.source} is another each time it is read; take random"
                    " transforms out of the data set"
                )
            if fingerprint is None:
                digest.update(first)
        if fingerprint is None and (labels := find_labels(self.dataset)) is not None:
            digest.update(labels.tobytes())
        return {"sha256": digest.hexdigest()}

    def identity(self) -> dict[str, Any]:
        """Return the attribute `images` of this set's split: class, length, and a digest of labels and samples."""
        return dict(self._identity)

    def missing(self) -> list[int]:
        """Return no rows: what is missing is not known before it is read."""
        return []

    def examples(self) -> Any:
        """Return the network's arguments for the first samples."""
        return self._reader.read(self._batch(range(min(EXAMPLES, self.index.size))))[0]

    def check_like(self, other: MapSamples | StreamSamples) -> None:
        """Refuse samples of another shape than another split's."""
        self._reader.check_like(other._reader)

    def _batch(self, rows: Sequence[int]) -> Any:
        """Read and collate a few samples.

        Raises:
            InputError: the data set cannot give one of them, or no batch can be made of them.
        """
        samples = []
        for row in rows:
            with self._reading(f"sample {row} of {self.source} cannot be read"):
                samples.append(self.dataset[row])
        with self._reading(f"no batch can be made of samples of {self.source}"):
            return self._collate(samples)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (NacError, GeneratorExit):
            raise
        except Exception as error:  # a caller's code may raise any error
            reason = first_line(error)
            advice = "; let the data set give tensors, or give prepare=" if "collate" in reason else ""
            raise InputError(f"{self.name}: {what}: {type(error).__name__}: {reason}{advice}") from error

    def load(
        self, batches: Sequence[range], classes: int, pin: bool = False
    ) -> Iterator[tuple[Any, NDArray[np.int64]]]:
        """Yield the network's arguments and the labels of every batch, in order.

        Args:
            batches: positions.
            classes: labels of ID samples are below.
            pin: into page-locked memory.

        Raises:
            InputError: a label is missing or no class, or samples differ in length and there is no mask.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=[list(batch) for batch in batches],
            collate_fn=self._collate,
            num_workers=self._workers,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),  # a seed is drawn even where nothing is shuffled
        )
        coming = iter(loader)
        for rows in batches:
            with self._reading(f"samples {rows.start} to {rows.stop - 1} of {self.source} cannot be read"):
                batch = next(coming)
            arguments, labels = self._reader.read(batch)
            if (count := count_samples(arguments)) != len(rows):
                raise InputError(f"{self.name}: {len(rows)} samples gave a batch of {count}")
            yield arguments, self._reader.finish(labels, len(rows), classes, rows.start)


class StreamSamples:
    """The samples of an iterable of batches, which are read from the beginning each time."""

    def __init__(self, name: str, batches: Iterable[Any], call: Call, *, fingerprint: str | None = None) -> None:
        """Look at the first batch; of an iterator it is kept.

        Args:
            name: the split.
            batches: batches of samples, the same each time.
            call: how the network is called.
            fingerprint: text that stands for the data in the cache's identity: then a finished split is not read.

        Raises:
            InputError: there is no batch.
        """
        self.name, self.source = name, type(batches).__name__
        self._batches, self._call, self._fingerprint = batches, call, fingerprint
        self._reader = _Reader(name, call)
        self._kept: list[Any] = []
        self._iterator = iter(batches) if iter(batches) is batches else None
        first = next(iter(batches) if self._iterator is None else self._iterator, None)
        if first is None:
            raise InputError(f"{name} has no samples")
        if self._iterator is not None:
            self._kept = [first]
        self._first = self._reader.read(first)[0]
        if not count_samples(self._first):
            raise InputError(f"{name}: its first batch has no samples")
        self.index: NDArray[np.int64] = np.arange(0)
        """(0,): its length is not known."""
        self._identity: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """Return the attribute `images` of this set's split, once it was read."""
        return dict(self._identity)

    def missing(self) -> list[int]:
        """Return no rows: what is missing is not known before it is read."""
        return []

    def examples(self) -> Any:
        """Return the network's arguments for the first samples."""
        return take_rows(self._first, 0, EXAMPLES)

    def check_like(self, other: MapSamples | StreamSamples) -> None:
        """Refuse samples of another shape than another split's."""
        self._reader.check_like(other._reader)

    def read_identity(self) -> None:
        """Read all batches for the identity, without the network; with a fingerprint nothing is read."""
        if self._fingerprint is not None:
            self._identity = self._name_identity(hashlib.sha256(self._fingerprint.encode()))
            return
        for _ in self.load(None):
            pass

    def load(self, classes: int | None) -> Iterator[tuple[Any, NDArray[np.int64]]]:
        """Yield the network's arguments and the labels of every batch; afterwards the identity is known.

        Args:
            classes: labels of ID samples are below; None: labels are not checked.

        Raises:
            InputError: a label is missing or no class, or samples differ in length and there is no mask.
        """
        digest, rows = hashlib.sha256(), 0
        for batch in self._iterate():
            arguments, labels = self._reader.read(batch)
            digest.update(_digest(arguments, labels))
            if not (count := count_samples(arguments)):
                continue
            if classes is not None:
                yield arguments, self._reader.finish(labels, count, classes, rows)
            rows += count
        if self._fingerprint is not None:
            digest = hashlib.sha256(self._fingerprint.encode())
        self._identity = self._name_identity(digest)

    def _name_identity(self, digest: Any) -> dict[str, Any]:
        return {"list": self.source, "sha256": digest.hexdigest()}

    def _iterate(self) -> Iterator[Any]:
        if self._iterator is None:
            yield from self._batches
            return
        if not self._kept:
            raise InputError(f"{self.name} is an iterator that was read before; give an iterable or a data set")
        yield self._kept.pop()
        yield from self._iterator


def open_samples(
    name: str, data: Any, call: Call, *, workers: int, fingerprint: str | None = None
) -> MapSamples | StreamSamples:
    """Return a split's samples.

    Args:
        name: the split.
        data: a map-style data set, such as a list of samples; a DataLoader; or an iterable of batches.
        call: how the network is called.
        workers: processes that read a data set's samples.
        fingerprint: text that stands for the data in the cache's identity.

    Raises:
        InputError: it is none of these, a DataLoader that shuffles or drops samples, or has no samples.
    """
    if isinstance(data, DataLoader):
        return _open_loader(name, data, call, fingerprint)
    if isinstance(data, tuple | Mapping | Tensor):  # of columns, of samples, of batches?
        raise InputError(
            f"{name} is a {type(data).__name__}; give a data set, such as TensorDataset(x, y) or a list of samples"
        )
    if isinstance(data, str) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise InputError(
            f"{name} is {type(data).__name__}; give a map-style data set, a DataLoader, or an iterable of batches"
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        return MapSamples(name, data, call, workers=workers, fingerprint=fingerprint)
    return StreamSamples(name, data, call, fingerprint=fingerprint)


def _open_loader(name: str, loader: DataLoader[Any], call: Call, fingerprint: str | None) -> MapSamples | StreamSamples:
    sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    if getattr(loader.batch_sampler, "drop_last", loader.drop_last):
        raise InputError(f"{name}: its DataLoader drops the last batch; make it with drop_last=False")
    if isinstance(loader.dataset, IterableDataset):
        return StreamSamples(name, loader, call, fingerprint=fingerprint)
    if loader.batch_sampler is None:
        raise InputError(
            f"{name}: its DataLoader has batch_size=None and makes no batches; give it a batch_size, or, if each of its"
            " samples is a batch, iter(loader), a new one for every call"
        )
    in_order = isinstance(sampler, SequentialSampler) and type(loader.batch_sampler) is BatchSampler
    if not in_order:
        what = type(sampler if sampler is not None else loader.batch_sampler).__name__
        raise InputError(
            f"{name}: its DataLoader takes samples by {what}, which shuffles, repeats or leaves out; make it with"
            " shuffle=False and without a sampler"
        )
    return MapSamples(
        name, loader.dataset, call, collate=loader.collate_fn, workers=loader.num_workers, fingerprint=fingerprint
    )


def find_labels(dataset: Any) -> NDArray[np.int64] | None:
    """Return the labels that a data set has ready, (rows,), or None: torchvision's, TensorDataset's, subsets'."""
    if isinstance(dataset, Subset):
        labels = find_labels(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, np.int64)]
    tensors = getattr(dataset, "tensors", None)
    given = tensors[1] if isinstance(tensors, tuple) and len(tensors) == 2 else None
    for attribute in ("targets", "labels"):
        given = getattr(dataset, attribute, None) if given is None else given
    if not isinstance(given, list | Tensor | np.ndarray):
        return None
    try:
        values = np.asarray(given)
    except (ValueError, TypeError, RuntimeError):  # ragged, or on another device
        return None
    return values.astype(np.int64) if values.ndim == 1 and values.dtype.kind in "iu" else None


def _digest(arguments: Any, labels: NDArray[np.int64] | None) -> bytes:
    """Return the sha256 of a batch as the network gets it."""
    digest = hashlib.sha256()
    for name, tensor in tensors_of(arguments):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(b"" if labels is None else labels.tobytes())
    return digest.digest()
