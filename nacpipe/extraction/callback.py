"""A callback for training loops. It writes a cache at each checkpoint, which `nacpipe rank` compares.

snapshots = Snapshots("run", {"id/train": train_loader, "id/val": val_loader}, layers=["avgpool"])
for step in range(steps):
    …
    if step % 300 == 0:
        snapshots(network, step)          # run/step-000300.zarr

nacpipe rank run/*.zarr
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.benchmarks.lists import check_labels
from nacpipe.benchmarks.standard import Transform
from nacpipe.cache import CacheWriter, Header
from nacpipe.cache.layout import BLOCK_ROWS, check_layer_names, check_split_name
from nacpipe.errors import InputError
from nacpipe.extraction.pipeline import to_arrays
from nacpipe.extraction.samples import EXAMPLES
from nacpipe.networks.build import Network, adopt_module, classifier_weights, square_transform
from nacpipe.networks.call import describe_input
from nacpipe.networks.layers import MeasuredLayers, measure_layers, name_layers
from nacpipe.networks.taps import Taps, isolated
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap
from nacpipe.version import __version__

_SPLIT = re.compile(r"id/(train|val|test)|csid/[A-Za-z0-9][A-Za-z0-9_.-]*")

Batches = Iterable[tuple[Tensor, Tensor]]  # inputs (n, …), labels (n,)


class Snapshots:
    """Writes one cache per call. The network's modes, flags and gradients, and random generators, are unchanged."""

    def __init__(
        self,
        folder: str | Path,
        splits: Mapping[str, Batches],
        layers: Sequence[str] | Mapping[str, str],
        *,
        poolings: Mapping[str, str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Choose splits and layers.

        Args:
            folder: the folder of the caches.
            splits: name → batches that can be iterated repeatedly and give the same images each time (a DataLoader
                without shuffling or random transforms, a list). `id/train`, the training domains' images, is required;
                `id/val` is their validation part; `csid/NAME` are held-out domains, `csid/NAME_out` the parts of them
                that only the oracle uses.
            layers: module paths; or name in the cache → module path.
            poolings: layer → pooling, in place of the one that `nacpipe layers` shows.
            transform: the transform that prepared the images; None: pixels of square images are 0 … 1, and other inputs
                are described by their shape.

        Raises:
            InputError: the name of a split or layer is not allowed.
        """
        for name in splits:
            if not _SPLIT.fullmatch(name):
                raise InputError(f"split {name!r} is not known here; known: id/train, id/val, id/test, csid/NAME")
            check_split_name(name)
        if "id/train" not in splits:
            raise InputError(f"the splits are {', '.join(splits) or 'none'}; id/train is needed")
        self.folder, self.splits, self.layers = Path(folder), splits, name_layers(layers)
        check_layer_names(list(self.layers))
        self.poolings, self.transform = poolings or {}, transform

    def __call__(self, network: nn.Module, step: int) -> Path:
        """Write the cache of one checkpoint and return its path. One split's pooled numbers are held in memory.

        Raises:
            InputError: a layer is not in the network, a split has no images, a label is not a class, or the network is
                random in evaluation mode.
            CacheError: another cache exists at this path.
        """
        target = self.folder / f"step-{step:06}.zarr"
        network = unwrap(network)
        device = find_device_and_dtype(network)[0]
        # A DataLoader draws a seed from the global generator at each iteration.
        with torch.random.fork_rng(devices=[]), isolated(network, device):
            wrapped = adopt_module(network, _example_images(self.splits["id/train"]).to(device))
            wrapped = replace(wrapped, transform=self.transform or square_transform(wrapped.examples))
            measured = measure_layers(wrapped, self.layers, list(self.poolings.items()))
            self.folder.mkdir(parents=True, exist_ok=True)
            writer = CacheWriter(target, _header(wrapped, measured))
            if (weights := classifier_weights(wrapped)) is not None:
                writer.write_classifier(*(w.float().numpy() for w in weights))
            model = wrapped.model
            with Taps(network, measured.layers, model.classifier, outputs=model.outputs) as taps:
                for name, batches in self.splits.items():
                    arrays, image_identity = _run_split(taps, batches, device, name, writer.header)
                    check_labels(name, arrays["label"], measured.classes, lambda row: f"image {row} of its batches")
                    _write_split(writer, name, arrays, image_identity)
        return target


def _example_images(batches: Batches) -> Tensor:
    for images, _ in batches:
        return images[:EXAMPLES]
    raise InputError("id/train has no samples")


def _header(network: Network, measured: MeasuredLayers) -> Header:
    return Header(
        identity={
            "benchmark": "a training run",
            "architecture": network.model.name,
            "family": network.model.family,
            "weights": network.weights_sha256,
            **(
                {"input": describe_input(network.examples)}
                if network.transform is None
                else {"transform": network.transform.to_json()}
            ),
            "dtype": "float32",
            **({} if network.model.outputs == "logits" else {"outputs": network.model.outputs}),
        },
        information={
            "nacpipe": __version__,
            "torch": torch.__version__,
            "device": str(network.device),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "written_by": "nacpipe.extraction.callback",
            **({"no_classifier": network.no_classifier} if network.no_classifier else {}),
        },
        block_rows=BLOCK_ROWS,
        layers=measured.layers,
        classes=measured.classes,
        features=measured.features,
    )


def _run_split(
    taps: Taps, batches: Batches, device: torch.device, name: str, header: Header
) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
    """Run a split; return its arrays, (rows, …) each, and the attribute `images`."""
    parts: list[dict[str, NDArray[Any]]] = []
    digest = hashlib.sha256()
    for images, labels in batches:
        tapped = taps(images.detach().to(device))
        part = to_arrays(tapped, header)
        parts.append({**part, "label": labels.cpu().numpy().astype(np.int64)})
        digest.update(images.detach().cpu().contiguous().numpy().tobytes())
        digest.update(parts[-1]["label"].tobytes())
    if not parts:
        raise InputError(f"{name} has no samples")
    arrays = {path: np.concatenate([part[path] for part in parts]) for path in parts[0]}
    arrays["index"] = np.arange(arrays["label"].size)
    return arrays, {"list": "given by the training loop", "sha256": digest.hexdigest()}


def _write_split(writer: CacheWriter, name: str, arrays: Mapping[str, NDArray[Any]], images: Mapping[str, Any]) -> None:
    rows = arrays["label"].size
    marks = writer.prepare(name, rows, images, label=arrays["label"], index=arrays["index"])
    for block in np.flatnonzero(~marks).tolist():
        start = block * BLOCK_ROWS
        writer.write_block(name, block, {path: a[start : start + BLOCK_ROWS] for path, a in arrays.items()})
    writer.seal(name)
