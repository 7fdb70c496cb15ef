"""Image files → what a detector says of each; one that cannot be read is named and the others are scored."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from nacpipe.benchmarks.standard import BENCHMARKS, Benchmark, Transform
from nacpipe.detector.file import Exported
from nacpipe.detector.module import Detected, Detector, attach
from nacpipe.detector.network_options import check_network_is_named, name_network
from nacpipe.detector.parts import ScoredImage, format_time
from nacpipe.detector.shards import Shard
from nacpipe.errors import CacheError, DetectorError, ImageError, InputError
from nacpipe.extraction.dataset import Normalise
from nacpipe.extraction.decoder import NVJPEG, Decoder, stored_decoder
from nacpipe.extraction.encoded_images import DecodedImages, EncodedBatches
from nacpipe.extraction.image_content import EncodedImage, Unscored
from nacpipe.extraction.loader import choose_stream_workers, load_stream
from nacpipe.extraction.place import Place
from nacpipe.extraction.request import find_device, pin_arithmetic
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model
from nacpipe.networks.precision import CHANNELS_LAST, FP32, arithmetic, lay_out, stored_format
from nacpipe.networks.wrappers import find_device_and_dtype


class ShardError(ImageError):
    """A shard cannot be read, or not to its end; the next one can follow."""


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
    exported: Exported,
    file: str,
    model: str | None,
    checkpoint: Path | None,
    device: str,
    place: Place = Place(),  # noqa: B008
) -> Ready:
    """Build a detector's network and put the two together.

    Args:
        exported: the detector.
        file: where it is, for messages.
        model: as for extraction; None means the one that the file names, where it is in the table.
        checkpoint: the weights; None means the model's own.
        device: cuda, mps, cpu, … or auto.
        place: this process among others; each on a GPU of its own.

    Raises:
        DetectorError: the network is another.
        InputError: an unknown model, weights that do not fit, a device that is not there.
    """
    pin_arithmetic()
    found = find_device(device, place.local, place.local_world)
    with arithmetic(FP32):  # as extraction looks at a network
        return attach_network(exported, file, model, checkpoint, found)


def attach_network(
    exported: Exported, file: str, model: str | None, checkpoint: Path | None, device: torch.device
) -> Ready:
    """Build a detector's network and put the two together; arguments and errors as `prepare`, `file` for messages."""
    check_network_is_named(exported, file, model, checkpoint)
    named = str(exported.identity.get("architecture"))
    try:
        row = find_model(model or named)
    except InputError:
        if model is not None:
            raise
        raise InputError(name_network(exported, file, checkpoint)) from None
    known = BENCHMARKS.get(str(exported.identity.get("benchmark")))
    benchmark = known or Benchmark(name="its own", classes=exported.classes, transform=exported.transform, splits=())
    benchmark = replace(benchmark, transform=exported.transform)
    network = load_network(row, benchmark, checkpoint, device, "benchmark")
    if stored_format(exported.identity, device) == CHANNELS_LAST:
        lay_out(network.module)  # once: a detector does it in every call
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """How images are read; a score may depend on `batch_size` alone, in the last bits of what a network computes."""

    batch_size: int = 128
    """Images at once; no batch holds images of two shards."""
    workers: int | None = 0
    """Processes that decode images, one set for all shards; 0: a thread; None: as loader.py chooses."""
    column: str | None = None
    """Of Parquet files; None: the first of encoded images."""
    local_world: int = 1
    """The processes on this machine that score, each with as many workers."""


def score_images(
    ready: Ready,
    paths: Sequence[Path],
    options: ScoreOptions = ScoreOptions(),
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[ScoredImage]:
    """Yield one row per file, in order; arguments as `score_shards`."""
    for _, rows in score_shards(ready, [Shard(address="", kind="files", files=tuple(paths))], options, note):
        yield from rows


@dataclass(slots=True, kw_only=True)
class _Batch:
    """What is known of a batch before its images are decoded; without their content, which takes memory."""

    names: list[str] = field(default_factory=list)
    times: list[str | None] = field(default_factory=list)
    errors: list[ImageError | None] = field(default_factory=list)
    """Of members that are no images."""
    last: bool = False
    """Whether it is the shard's last."""
    broken: ShardError | None = None
    """Why the shard ends here."""


def score_shards(
    ready: Ready,
    shards: Sequence[Shard],
    options: ScoreOptions = ScoreOptions(),
    note: Callable[[str], None] = lambda text: None,
) -> Generator[tuple[Shard, Iterator[ScoredImage]], None, None]:
    """Yield every shard with its rows, one per image, in order; the rows of one are taken before the next.

        this process        a tar file's members, a Parquet file's rows: read here; of files the paths
        decoding processes  pixels, of the shards that follow too
        this process        pixels → network → rows

    Args:
        ready: the detector.
        shards: of images.
        options: how they are read.
        note: called with what to say aloud: that batches are smaller, where the memory is.

    Raises:
        ShardError: by the rows, at their end.
        ImageError: a process that decodes images is gone.
    """
    normalise = Normalise(ready.transform, ready.device)
    run: BatchRunner[Detected] = BatchRunner(lambda pixels: ready.detector(normalise(pixels)), ready.device, note)
    waiting: deque[_Batch] = deque()

    def read() -> Iterator[list[EncodedImage]]:
        for shard in shards:
            for batch, images in _read_batches(shard, options.column, options.batch_size):
                waiting.append(batch)
                yield images

    def rows() -> Iterator[ScoredImage]:
        while True:
            found = next(decoded)
            batch = waiting.popleft()
            yield from _score_batch(ready, run, batch, found)
            if batch.broken is not None:
                raise batch.broken
            if batch.last:
                return

    asked = 0 if ready.decoder.name == NVJPEG else options.workers  # one process has the GPU
    processes, few = choose_stream_workers(asked, ready.transform.crop, options.local_world)
    decoded = load_stream(
        EncodedBatches(ready.transform, ready.decoder), read(), processes, few, pin=ready.device.type == "cuda"
    )
    with closing(decoded):
        for shard in shards:
            yield shard, rows()


def _read_batches(shard: Shard, column: str | None, size: int) -> Iterator[tuple[_Batch, list[EncodedImage]]]:
    """Yield a shard's batches, the last of which says that it is, and may be empty."""
    batch, images, broken = _Batch(), list[EncodedImage](), None
    try:
        for image in shard.images(column):
            if len(batch.names) == size:
                yield batch, images
                batch, images = _Batch(), []
            batch.names.append(image.name)
            batch.times.append(None if isinstance(image, Unscored) else format_time(image.time))
            batch.errors.append(image if isinstance(image, Unscored) else None)
            if isinstance(image, EncodedImage):
                images.append(image)
    except (InputError, CacheError) as error:
        broken = ShardError(error.one_line())
        broken.__cause__ = error
    batch.last, batch.broken = True, broken
    yield batch, images


def _score_batch(
    ready: Ready, run: BatchRunner[Detected], batch: _Batch, decoded: DecodedImages
) -> Iterator[ScoredImage]:
    parts = [] if decoded.pixels is None else list(run(decoded.pixels))
    scored = (
        row
        for part in parts
        for row in zip(
            part.logits.tolist(), part.score.tolist(), part.percentile.tolist(), part.is_ood.tolist(), strict=True
        )
    )
    errors = iter(decoded.errors)
    for name, time, unscored in zip(batch.names, batch.times, batch.errors, strict=True):
        if (error := next(errors) if unscored is None else unscored) is not None:
            yield ScoredImage(
                image=name, score=None, percentile=None, is_ood=None, predicted=None, error=str(error), time=time
            )
            continue
        logits, score, percentile, is_ood = next(scored)
        yield ScoredImage(
            image=name,
            score=score,
            percentile=None if math.isnan(percentile) else percentile,
            is_ood=is_ood,
            predicted=logits.index(max(logits)) if ready.predicts else None,
            error=None,
            time=time,
        )
