"""Image files → what a detector says of each; one that cannot be read is named and the others are scored."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nacpipe.benchmarks.standard import BENCHMARKS, Benchmark, Transform
from nacpipe.detector.file import Exported, read_detector
from nacpipe.detector.module import Detected, Detector, attach
from nacpipe.detector.parts import ScoredImage, format_time
from nacpipe.detector.shards import EncodedImage, Shard, Unscored
from nacpipe.errors import DetectorError, ImageError, InputError
from nacpipe.extraction.dataset import build_transform
from nacpipe.extraction.decoder import Decoder, stored_decoder
from nacpipe.extraction.distributed import Ranks
from nacpipe.extraction.image_file import decode_image
from nacpipe.extraction.request import find_device, pin_arithmetic
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model
from nacpipe.networks.precision import CHANNELS_LAST, FP32, arithmetic, lay_out
from nacpipe.networks.wrappers import find_device_and_dtype


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
    decoder: Decoder = field(default_factory=Decoder)
    """What decodes JPEGs, as it did those of the cache."""

    @property
    def exported(self) -> Exported:
        """The detector without its network."""
        return self.detector.exported

    @classmethod
    def of(cls, detector: Detector) -> Ready:
        """Return a detector of images, as it is.

        Raises:
            DetectorError: it takes no images that nacpipe prepares.
        """
        exported = detector.exported
        predicts = exported.identity.get("outputs", "logits") != "features"
        device = find_device_and_dtype(detector.network)[0]
        decoder = stored_decoder(exported.identity, device)
        return cls(detector, exported.transform, device, predicts, decoder=decoder)


def prepare(
    file: Path,
    model: str | None,
    checkpoint: Path | None,
    device: str,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> Ready:
    """Read a detector, build its network and put the two together.

    Args:
        file: from `nacpipe export`.
        model: as for extraction; None means the one that the file names, where it is in the table.
        checkpoint: the weights; None means the model's own.
        device: cuda, mps, cpu, … or auto.
        ranks: this process among others; each on a GPU of its own.

    Raises:
        DetectorError: the file is malformed or the network is another.
        InputError: an unknown model, weights that do not fit, a device that is not there.
    """
    exported = read_detector(file)
    pin_arithmetic()
    place = find_device(device, ranks.local, ranks.local_world)
    with arithmetic(FP32):  # as extraction looks at a network
        return attach_network(exported, str(file), model, checkpoint, place)


def attach_network(
    exported: Exported, file: str, model: str | None, checkpoint: Path | None, device: torch.device
) -> Ready:
    """Build a detector's network and put the two together; arguments and errors as `prepare`, `file` for messages."""
    named = str(exported.identity.get("architecture"))
    if model is None and ":" in named:  # code is run, or weights are fetched, where someone asks for it
        raise InputError(f"{file} is for {named}; say where it is with --model {shlex.quote(named)}")
    row = find_model(model or named)
    known = BENCHMARKS.get(str(exported.identity.get("benchmark")))
    benchmark = known or Benchmark(name="its own", classes=exported.classes, transform=exported.transform, splits=())
    benchmark = replace(benchmark, transform=exported.transform)
    network = load_network(row, benchmark, checkpoint, device, "benchmark")
    before = exported.identity.get("arithmetic")
    if isinstance(before, Mapping) and (before.get("memory_format"), device.type) == (CHANNELS_LAST, "cuda"):
        lay_out(network.module)  # as the states were made
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
    return replace(Ready.of(detector), notes=tuple(notes))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return files as they are given, and folders' images (by suffix, at any depth) in alphabetical order.

    Raises:
        ImageError: a folder holds no image, cannot be read, or has a link that leads nowhere or back.
    """
    shards = [
        Shard(address=str(p), kind="folder") if p.is_dir() else Shard(address="", kind="files", files=(p,))
        for p in paths
    ]
    return [path for shard in shards for path in shard.paths()]


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
    shard = Shard(address="", kind="files", files=tuple(paths))
    return score_stream(ready, shard.images(), batch_size, workers, note)


def score_stream(
    ready: Ready,
    images: Iterable[EncodedImage | Unscored],
    batch_size: int,
    workers: int,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[ScoredImage]:
    """Yield one row per image of a stream, in order, as `score_images`; memory holds two batches."""
    run: BatchRunner[Detected] = BatchRunner(ready.detector, ready.device, note)
    for batch in decode_ahead(
        images, partial(_decode, build_transform(ready.transform), ready.decoder), batch_size, workers
    ):
        yield from _score_batch(ready, run, batch)


Decoded = tuple[EncodedImage | Unscored, Tensor | ImageError]


def decode_ahead(
    images: Iterable[EncodedImage | Unscored],
    decode: Callable[[EncodedImage | Unscored], Tensor | ImageError],
    batch_size: int,
    workers: int,
) -> Iterator[list[Decoded]]:
    """Yield batches in order; the next one is decoded on threads while one is used."""
    coming = iter(images)
    with ThreadPoolExecutor(workers) as pool:

        def submit() -> list[tuple[EncodedImage | Unscored, Future[Tensor | ImageError]]]:
            return [(image, pool.submit(decode, image)) for image in itertools.islice(coming, batch_size)]

        try:
            ahead = submit()
            while ahead:
                batch, ahead = ahead, submit()
                yield [(image, future.result()) for image, future in batch]
        finally:
            pool.shutdown(cancel_futures=True)


def _decode(
    transform: Callable[[Image.Image], Tensor], decoder: Decoder, image: EncodedImage | Unscored
) -> Tensor | ImageError:
    if isinstance(image, Unscored):
        return image
    try:
        return transform(decode_image(image.read(), image.where, decoder=decoder))
    except ImageError as error:
        return error
    except (OSError, ValueError, MemoryError, Image.DecompressionBombWarning) as error:  # of the transform
        return ImageError(f"image cannot be prepared: {image.where}: {str(error)[:120]}")


def _score_batch(ready: Ready, run: BatchRunner[Detected], batch: Sequence[Decoded]) -> Iterator[ScoredImage]:
    good = [tensor for _, tensor in batch if isinstance(tensor, Tensor)]
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
    for image, tensor in batch:
        time = None if isinstance(image, Unscored) else format_time(image.time)
        if isinstance(tensor, ImageError):
            yield ScoredImage(
                image=image.name,
                score=None,
                percentile=None,
                is_ood=None,
                predicted=None,
                error=str(tensor),
                time=time,
            )
            continue
        logits, score, percentile, is_ood = next(rows)
        predicted = logits.index(max(logits)) if ready.predicts else None
        yield ScoredImage(
            image=image.name,
            score=score,
            percentile=None if math.isnan(percentile) else percentile,
            is_ood=is_ood,
            predicted=predicted,
            error=None,
            time=time,
        )
