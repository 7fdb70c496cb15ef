"""Extraction: batches → append → seal, obeying a plan.

Memory is one block of pooled numbers and a few batches of images, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nacpipe.cache import CacheWriter
from nacpipe.network.images import build_transform, load_batches
from nacpipe.network.models import classifier_weights
from nacpipe.network.plan import Plan
from nacpipe.network.taps import Taps


def extract(plan: Plan, progress: Callable[[str, int], None] = lambda split, rows: None) -> None:
    """Do what the plan says. Killed at any moment, the same command goes on; blocks that are marked are never redone.

    Args:
        plan: from `plan_extraction`.
        progress: called with a split's name and the rows just written.

    Raises:
        ImageError: an image cannot be read, naming file, list and line.
    """
    writer = CacheWriter(plan.request.cache, plan.header)
    network = plan.network
    weight, bias = classifier_weights(network)
    writer.write_classifier(weight.numpy(), bias.numpy())
    transform = build_transform(network.transform)
    with Taps(network.module, plan.header.layers, network.model.classifier) as taps:
        for split in plan.splits:
            if split.sealed:
                continue
            name = split.images.name
            if split.drop:
                writer.drop(name)
            writer.prepare(name, split.rows, split.images.identity())
            batches = [batch for block in split.todo for batch in plan.batches(split, block)]
            loaded = load_batches(split.images, batches, transform, plan.request.workers)
            for block in split.todo:
                parts = [_run(taps, next(loaded), network.device) for _ in plan.batches(split, block)]
                rows = plan.rows_of_block(split, block)
                index = split.images.index[rows.start : rows.stop]
                arrays: dict[str, NDArray[Any]] = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
                writer.write_block(name, block, {**arrays, "label": split.images.labels[index], "index": index})
                progress(name, len(rows))
            writer.seal(name)


def _run(taps: Taps, images: torch.Tensor, device: torch.device) -> dict[str, NDArray[np.float32]]:
    """One batch through the network: array path → (n, width) float32 on the CPU."""
    tapped = taps(images.to(device, non_blocking=True))
    found = {f"{name}/activation": value for name, value in tapped.activation.items()}
    found |= {f"{name}/gradient": value for name, value in tapped.gradient.items()}
    found["logits"] = tapped.logits
    if tapped.features is not None:
        found["features"] = tapped.features
    return {path: value.float().cpu().numpy() for path, value in found.items()}
