"""Image files → what a detector says of each; one that cannot be read is named and the others are scored."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nacpipe.benchmarks.folders import SUFFIXES, walk_images
from nacpipe.benchmarks.standard import BENCHMARKS, Benchmark, Transform
from nacpipe.detector.file import Exported, read_detector
from nacpipe.detector.module import Detected, Detector, attach
from nacpipe.errors import DetectorError, ImageError, InputError
from nacpipe.extraction.dataset import build_transform
from nacpipe.extraction.image_file import read_image
from nacpipe.extraction.request import find_device, pin_arithmetic
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredImage:
    """One row of the result."""

    image: str
    score: float | None
    """Larger = more like the training data; None where there is none."""
    percentile: float | None
    """Percent of id/val's scores that are lower; None where there is no score, or a file of an earlier version."""
    is_ood: bool | None
    predicted: int | None
    """The class of the largest logit or probability; None where the network gives features."""
    error: str | None
    """Why the image could not be scored."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A detector on its network, and how images are prepared for it."""

    detector: Detector
    transform: Transform
    device: torch.device
    predicts: bool
    """Whether the network's outputs are classes' logits or probabilities."""
    notes: tuple[str, ...] = ()
    """What to say aloud of the network's weights."""


def prepare(file: Path, model: str | None, checkpoint: Path | None, device: str) -> Ready:
    """Read a detector, build its network and put the two together.

    Args:
        file: from `nacpipe export`.
        model: as for extraction; None means the one that the file names, where it is in the table.
        checkpoint: the weights; None means the model's own.
        device: cuda, mps, cpu, … or auto.

    Raises:
        DetectorError: the file is malformed or the network is another.
        InputError: an unknown model, weights that do not fit, a device that is not there.
    """
    exported = read_detector(file)
    pin_arithmetic()
    return attach_network(exported, str(file), model, checkpoint, device)


def attach_network(exported: Exported, file: str, model: str | None, checkpoint: Path | None, device: str) -> Ready:
    """Build a detector's network and put the two together; arguments and errors as `prepare`, `file` for messages."""
    named = str(exported.identity.get("architecture"))
    if model is None and ":" in named:  # code is run, or weights are fetched, where someone asks for it
        raise InputError(f"{file} is for {named}; say where it is with --model {shlex.quote(named)}")
    row = find_model(model or named)
    known = BENCHMARKS.get(str(exported.identity.get("benchmark")))
    benchmark = known or Benchmark(name="its own", classes=exported.classes, transform=exported.transform, splits=())
    benchmark = replace(benchmark, transform=exported.transform)
    network = load_network(row, benchmark, checkpoint, find_device(device), "benchmark")
    try:
        detector = attach(exported, network.module)
    except DetectorError as error:
        raise DetectorError(f"{file}: {error}") from None
    notes, made = list(network.notes), exported.identity.get("source")
    if made is not None and made != network.source:
        notes.append(
            f"{file} was made with another source of {named} ({str(made)[:8]}…, now {network.source[:8] or 'none'}…):"
            " its scores are right only where the network computes the same"
        )
    predicts = exported.identity.get("outputs", "logits") != "features"
    return Ready(detector, exported.transform, network.device, predicts, tuple(notes))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return files as they are given, and folders' images (by suffix, at any depth) in alphabetical order.

    Raises:
        ImageError: a folder holds no image, cannot be read, or has a link that leads nowhere or back.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [Path(path, name) for name in walk_images(path).names]
        if not inside:
            raise ImageError(f"there is no image in {path}; known endings: {', '.join(sorted(SUFFIXES))}")
        found += sorted(inside)
    return found


def score_images(
    ready: Ready,
    paths: Sequence[Path],
    batch_size: int,
    workers: int,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[ScoredImage]:
    """Yield one row per file, in order; the next batch is decoded while one runs.

    `note` is called with what to say aloud: that batches are smaller, where the memory is.
    """
    decode = partial(_decode, ready)
    run: BatchRunner[Detected] = BatchRunner(ready.detector, ready.device, note)
    with ThreadPoolExecutor(workers) as pool:
        ahead = None
        for start in range(0, len(paths) + batch_size, batch_size):  # one more, which is empty
            batch = paths[start : start + batch_size]
            coming = (batch, [pool.submit(decode, path) for path in batch])
            if ahead is not None:
                yield from _score_batch(ready, run, ahead[0], [future.result() for future in ahead[1]])
            ahead = coming


def _decode(ready: Ready, path: Path) -> Tensor | ImageError:
    try:
        return build_transform(ready.transform)(read_image(path, str(path)))
    except ImageError as error:
        return error
    except (OSError, ValueError, MemoryError, Image.DecompressionBombWarning) as error:  # of the transform
        return ImageError(f"image cannot be prepared: {path}: {str(error)[:120]}")


def _score_batch(
    ready: Ready, run: BatchRunner[Detected], paths: Sequence[Path], images: Sequence[Tensor | ImageError]
) -> Iterator[ScoredImage]:
    good = [image for image in images if isinstance(image, Tensor)]
    rows: Iterator[tuple[list[float], float, float, bool]] = iter(())
    if good:
        parts = list(run(torch.stack(good)))
        rows = (
            row
            for part in parts
            for row in zip(
                part.logits.tolist(),
                part.score.tolist(),
                part.percentile.tolist(),
                part.is_ood.tolist(),
                strict=True,
            )
        )
    for path, image in zip(paths, images, strict=True):
        if isinstance(image, ImageError):
            yield ScoredImage(
                image=str(path), score=None, percentile=None, is_ood=None, predicted=None, error=str(image)
            )
            continue
        logits, score, percentile, is_ood = next(rows)
        predicted = logits.index(max(logits)) if ready.predicts else None
        yield ScoredImage(
            image=str(path),
            score=score,
            percentile=None if math.isnan(percentile) else percentile,
            is_ood=is_ood,
            predicted=predicted,
            error=None,
        )
