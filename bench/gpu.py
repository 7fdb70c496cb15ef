"""What a GPU makes of extraction and detection, as rows of README.md's table: one command, nine minutes at most.

    python bench/gpu.py [--minutes 9] [--device cuda] [--only states,taps]
    python bench/gpu.py --device cpu --small       the same parts with a few small samples, as a test runs them

Needs torch with CUDA and what nacpipe's wheel needs. Weights are random (seeded), their batch norms fitted to a batch
of noise; images are made here, in a temporary folder. Parts, in order; those for which the minutes do not suffice are
skipped, and the table says so:

    states       the CPU's states against the device's, fp32: ‖difference‖ / ‖CPU's‖ of each array, the largest
    taps         ours against a bare forward pass and one backward pass to the first tapped layer; fp32, tf32, bf16;
                 tensors on the device, sides in turn, median of the ratios round by round
    detector     a detector against the same bare passes, and its look-ups' share
    same         one extraction twice: the same values, bit for bit
    whole        an extraction of JPEGs of 500 × 375 by resnet50, beside each of its parts alone: decoding (the same by
                 a network that computes next to nothing), the network (a batch that stays on the device), writing
                 (blocks of the same numbers); the share of time that the GPU is busy is nvidia-smi's
    auroc        the packaged benchmark on the CPU and on the device, the same parameters: largest difference of AUROC
    memory       batches that do not fit: the GPU's memory is limited to what half of a batch needs

Times on a GPU are those of CUDA's events. A part that fails prints its error, and the others go on; exit code 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from taps import bare, specs
from torch import Tensor, nn

from nacpipe.cache import Cache, CacheWriter, LayerSpec, open_cache
from nacpipe.detector.module import Detector
from nacpipe.detector.values import select_values
from nacpipe.evaluation.tables import KEYS, evaluate
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest, pin_arithmetic
from nacpipe.method.fitted_term import FittedTerm, fit_term
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.models import find_model
from nacpipe.networks.precision import (
    AUTOCAST,
    arithmetic,
    choose_format,
    computing,
    laid_out,
    products,
    strictly_deterministic,
)
from nacpipe.networks.taps import Tapped, Taps, find_penultimate, freeze

SIDE = {"resnet20": 32, "resnet50": 224, "vit_b_16": 224, "swin_t": 224}  # pixels
CLASSES = {"resnet20": 10}
PRECISIONS = ("fp32", "tf32", "bf16")
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table."""

    what: str
    printed: str
    asked: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything is run."""

    networks: tuple[str, ...] = ("resnet50", "vit_b_16", "swin_t")
    states: tuple[tuple[str, int], ...] = (("resnet20", 256), ("resnet50", 16), ("vit_b_16", 8))
    """(network, images)"""
    batch: int = 128
    rounds: int = 15
    training: int = 1000
    """Images that a detector's tables are counted of."""
    images: int = 20_000
    twice: int = 1_000
    """Images of the extraction that runs twice."""
    extracted: str = "resnet50"
    digits: int = 1000
    """Training images of the packaged benchmark."""


SMALL = Sizes(
    networks=("resnet20",), states=(("resnet20", 4),), batch=4, rounds=2, training=24, images=24, twice=8,
    extracted="resnet20", digits=40,
)  # fmt: skip


class Bench:
    """The device, the sizes, and a folder for what is made."""

    def __init__(self, device: torch.device, sizes: Sizes, folder: Path, deadline: float) -> None:
        self.device, self.sizes, self.folder, self.deadline = device, sizes, folder, deadline

    def seconds(self, side: Callable[[], object]) -> float:
        """Return the seconds that a side takes."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            side()
            return time.perf_counter() - began
        torch.cuda.synchronize(self.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        side()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000  # of milliseconds

    def measure(self, sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of every side, taken in turn; three rounds before that warm up."""
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(-3 if self.device.type == "cuda" else -1, self.sizes.rounds):
            for name, side in sides.items():
                passed = self.seconds(side)
                if number >= 0:
                    found[name].append(passed)
            if number >= 2 and time.monotonic() > self.deadline:
                break
        return found

    # --- parts --------------------------------------------------------------------------------------------------------

    def states(self) -> Iterator[Row]:
        """Compare the CPU's states with the device's."""
        for model, count in self.sizes.states:
            network, images = build(model, torch.device("cpu")), noise(model, count)
            expected = tap(model, network, images)
            found = tap(model, network.to(self.device), images.to(self.device))
            worst = max(
                (difference(getattr(found, kind)[name], value), f"{name}'s {kind}")
                for kind in ("activation", "gradient")
                for name, value in getattr(expected, kind).items()
            )
            logits = difference(found.logits, expected.logits)
            yield Row(
                what=f"{model}, fp32: the CPU's states against the device's, {count} images",
                printed=f"largest relative difference {worst[0]:.1e} ({worst[1]}), logits {logits:.1e}",
                asked="1e-3",
            )

    def taps(self) -> Iterator[Row]:
        """Compare ours with bare passes."""
        for model in self.sizes.networks:
            yield from self._taps(model)
            self.free()

    def _taps(self, model: str) -> Iterator[Row]:
        plain, images = self.placed(model)
        tapped, row, layers = copy.deepcopy(plain), find_model(model), layers_of(model)
        penultimate = find_penultimate(plain, layers, row.classifier, images[:2])
        for precision in PRECISIONS:
            memory_format = choose_format(precision, self.device)
            with computing(tapped, precision, memory_format), laid_out(plain, memory_format):
                seconds = self._against_bare(tapped, plain, images, model, penultimate, precision)
            rate = self.sizes.batch / statistics.median(seconds["ours"])
            yield Row(
                what=f"{model}, {precision}, batch {self.sizes.batch}: ours against bare passes",
                printed=f"{ratio(seconds['ours'], seconds['bare'])}; {rate:.0f} images/s",
                asked="1.10" if precision != "tf32" else "",
            )

    def _against_bare(
        self,
        tapped: nn.Module,
        plain: nn.Module,
        images: Tensor,
        model: str,
        penultimate: Set[str],
        precision: str,
    ) -> dict[str, list[float]]:
        layers, classifier = layers_of(model), find_model(model).classifier

        def both_passes() -> None:
            with half(self.device, AUTOCAST[precision]), as_ours(strict=taps.strict):
                bare(plain, layers[-1], images)

        with Taps(tapped, layers, classifier, penultimate=penultimate, precision=precision) as taps:
            return self.measure({"ours": lambda: taps(images), "bare": both_passes})

    def detector(self) -> Iterator[Row]:
        """Compare a detector with bare passes."""
        for model in dict.fromkeys(("resnet20", self.sizes.networks[0])):
            yield self._detector(model)
            self.free()

    def _detector(self, model: str) -> Row:
        network, layers = build(model, self.device), layers_of(model)
        plain, images = copy.deepcopy(network), noise(model, self.sizes.batch).to(self.device)
        terms = self.count(model, network, layers)
        detector = Detector(network, terms, layers, images[:2])
        with Taps(network, layers, find_model(model).classifier) as taps:
            found = taps(images)
        values, logits = [select_values(found, fitted.term) for fitted in terms], found.logits.cpu().numpy()

        def both_passes() -> None:
            with as_ours(strict=detector._strict):
                bare(plain, layers[-1], images)

        sides: dict[str, Callable[[], object]] = {
            "detector": lambda: detector(images),
            "bare": both_passes,
            "look-ups": lambda: [look(value, logits) for look, value in zip(detector._lookups, values, strict=True)],
        }
        with arithmetic("fp32"):  # as in the detector; torch's own choice is TF32
            seconds = self.measure(sides)
        whole = statistics.median(seconds["detector"])
        share = statistics.median(seconds["look-ups"]) / whole
        return Row(
            what=f"{model}: a detector of {len(terms)} layers against bare passes, batch {self.sizes.batch}",
            printed=f"{ratio(seconds['detector'], seconds['bare'])}; {1000 * whole:.1f} ms;"
            f" look-ups {100 * share:.1f} % of it",
            asked="1.15",
        )

    def count(self, model: str, network: nn.Module, layers: Sequence[LayerSpec]) -> list[FittedTerm]:
        """Count a detector's tables of noise."""
        parts: dict[str, list[NDArray[np.float32]]] = {spec.name: [] for spec in layers}
        with Taps(network, layers, find_model(model).classifier) as taps:
            for start in range(0, self.sizes.training, self.sizes.batch):
                rows = min(self.sizes.batch, self.sizes.training - start)
                found = taps(noise(model, rows, seed=1 + start).to(self.device))
                for name, values in parts.items():
                    values.append((found.activation[name] * found.gradient[name]).cpu().numpy())
        terms = []
        for name, values in parts.items():
            train = np.concatenate(values)
            params = LayerParams(bins=200, saturation=50, alpha=float(1 / np.abs(train).mean()))
            terms.append(fit_term(name, params, train))
        return terms

    def same(self) -> Iterator[Row]:
        """Extract twice."""
        first, second = (self.extract("id/test", f"twice{number}.zarr") for number in range(2))
        split, other = first["id/test"], second["id/test"]
        arrays = list(first.header.arrays())
        equal = sum(split.read(path).tobytes() == other.read(path).tobytes() for path in arrays)
        yield Row(
            what=f"{self.sizes.extracted}, fp32, {split.rows} images extracted twice",
            printed=f"{equal} of {len(arrays)} arrays have the same bytes",
            asked="all",
        )

    def whole(self) -> Iterator[Row]:
        """Extract all images, and run each part of that alone."""
        model, busy, rows = self.sizes.extracted, list[float](), self.sizes.images
        self.make_benchmark()
        moments = [time.perf_counter()]
        cache = self.extract("id/val", "whole.zarr", lambda: moments.append(time.perf_counter()), busy=busy)
        took = time.perf_counter() - moments[0]
        decoded = [time.perf_counter()]
        tiny = f"{self.folder / 'tiny.py'}:tiny"
        self.extract("id/val", "decoded.zarr", lambda: decoded.append(time.perf_counter()), tiny, ("pool",))
        batch = self.sizes.batch
        alone = {
            "decoding": (rows - batch) / max(decoded[-1] - decoded[1], 1e-9),
            "the network": self.network_rate(model),
            "writing": self.write_rate(cache),
        }
        rate = (rows - batch) / max(moments[-1] - moments[1], 1e-9)
        binds = min(alone, key=lambda name: alone[name])
        shown = ", ".join(f"{name} {value:.0f}" for name, value in alone.items())
        share = f"{statistics.mean(busy):.0f} % of the time" if busy else NOT_MEASURED
        yield Row(
            what=f"{model}, {rows} JPEGs of 500 × 375 extracted, {os.cpu_count()} cores",
            printed=f"{rate:.0f} images/s after the first batch, {rate / alone[binds]:.2f} of {binds} alone (images/s:"
            f" {shown}); {took:.0f} s with everything; GPU busy {share}",
            asked="0.9",
        )

    def network_rate(self, model: str) -> float:
        """Return the images per second of the network alone."""
        network, images = self.placed(model)
        with arithmetic("fp32"), Taps(network, layers_of(model), find_model(model).classifier) as taps:
            return self.sizes.batch / statistics.median(self.measure({"ours": lambda: taps(images)})["ours"])

    def write_rate(self, cache: Cache) -> float:
        """Return the rows per second of writing blocks of a cache's numbers, two at once as extraction does."""
        split, header = cache["id/val"], cache.header
        unit = header.block_rows * header.shard_blocks
        rows = min(split.rows, 8 * unit)
        arrays = {path: split.read(path, slice(0, rows)) for path in header.arrays()}
        writer = CacheWriter(self.folder / "written.zarr", header)
        writer.prepare("id/val", rows, split.images, label=arrays["label"], index=arrays["index"])

        def write(start: int) -> None:
            part = {path: values[start : start + unit] for path, values in arrays.items()}
            writer.write_block("id/val", start // header.block_rows, part)

        began = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(0, rows, unit)))
        return rows / (time.perf_counter() - began)

    def auroc(self) -> Iterator[Row]:
        """Compare the packaged benchmark's table."""
        tables: list[pd.DataFrame] = []
        for device in ("cpu", str(self.device)):
            path = self.folder / f"digits{len(tables)}.zarr"
            request = ExtractRequest(
                benchmark="digits", model="digits_cnn", cache=path, device=device, train_images=self.sizes.digits,
                splits=("id/train", "id/test", "ood/near/letters"),
            )  # fmt: skip
            extract(plan_extraction(request))
            cache = open_cache(path)
            layer = LayerParams(bins=50, saturation=20, alpha=100.0)
            tables.append(evaluate(cache, NacParams(layers={spec.name: layer for spec in cache.header.layers})))
        ours, theirs = (table.set_index(list(KEYS))["auroc"] for table in tables)
        gap = float((ours - theirs.loc[ours.index]).abs().max(skipna=False))
        yield Row(
            what="digits: AUROC of a cache of the CPU against one of the device, NAC and three baselines",
            printed=f"largest difference {gap:.6f}",
            asked="0.0005",
        )

    def memory(self) -> Iterator[Row]:
        """Run a batch that does not fit."""
        what = "a batch that exceeds the GPU's memory"
        if self.device.type != "cuda":
            yield Row(what=what, printed=f"{NOT_MEASURED}: it needs CUDA", asked="all rows, one note, 1e-3")
            return
        model, batch = self.sizes.extracted, self.sizes.batch
        network, images, notes = build(model, self.device), noise(model, batch), list[str]()
        self.free()
        with arithmetic("fp32"), Taps(network, layers_of(model), find_model(model).classifier) as taps:
            expected = taps(images[: batch // 4].to(self.device)).logits.cpu()
            self.free()
            torch.cuda.reset_peak_memory_stats(self.device)
            taps(images[: batch // 2].to(self.device))
            needed = torch.cuda.max_memory_reserved(self.device)
            self.free()
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, 1.2 * needed / total), self.device)
            try:
                run = BatchRunner(lambda part: taps(part).logits.cpu(), self.device, notes.append)
                found = torch.cat([*run(images), *run(images)])
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        kept = difference(found[: batch // 4], expected)
        yield Row(
            what=f"{what}: {model}, batch {batch}, memory limited to {needed * 1.2 / 2**30:.1f} GiB",
            printed=f"{len(found)} of {2 * batch} rows; notes: {'; '.join(notes) or 'none'};"
            f" logits differ by {kept:.1e}",
            asked="all rows, one note, 1e-3",
        )

    # --- what they share ----------------------------------------------------------------------------------------------

    def free(self) -> None:
        """Give the memory of what is gone back to the GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def placed(self, model: str) -> tuple[nn.Module, Tensor]:
        """Return a network and a batch on the device."""
        return build(model, self.device), noise(model, self.sizes.batch).to(self.device)

    def extract(
        self,
        split: str,
        name: str,
        on_batch: Callable[[], None] = lambda: None,
        model: str | None = None,
        layers: tuple[str, ...] = (),
        busy: list[float] | None = None,
    ) -> Cache:
        """Extract one split of the images made here; `busy` gets the GPU's use meanwhile."""
        benchmark, weights = self.make_benchmark(), self.folder / "weights.pth"
        if not weights.exists():
            torch.save(build(self.sizes.extracted, torch.device("cpu")).state_dict(), weights)
        request = ExtractRequest(
            benchmark=str(benchmark), model=model or self.sizes.extracted, cache=self.folder / name, splits=(split,),
            checkpoint=None if model else weights, batch_size=self.sizes.batch, layers=layers, device=str(self.device),
        )  # fmt: skip
        plan = plan_extraction(request)
        with sampling(self.device, [] if busy is None else busy):
            extract(plan, lambda _split, _rows: on_batch())
        return open_cache(request.cache)

    def make_benchmark(self) -> Path:
        """Write JPEGs, lists, the benchmark's file and a network that computes next to nothing."""
        file = self.folder / "made.toml"
        if file.exists():
            return file
        pictures = self.folder / "pictures"
        pictures.mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda number: save_picture(pictures / f"{number}.jpg", number), range(self.sizes.images)))
        classes = CLASSES.get(self.sizes.extracted, 1000)
        for name, count in (("val", self.sizes.images), ("test", self.sizes.twice)):
            lines = [f"{number}.jpg {number % classes}\n" for number in range(count)]
            (self.folder / f"{name}.txt").write_text("".join(lines))
        side = SIDE[self.sizes.extracted]
        (self.folder / "tiny.py").write_text(TINY.format(classes=classes, side=side // 8))
        file.write_text(BENCHMARK.format(classes=classes, resize=side * 256 // 224, crop=side))
        return file


BENCHMARK = """\
name = "made"
classes = {classes}

[transform]
resize = {resize}
crop = {crop}
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[id.train]
list = "test.txt"
folder = "pictures"

[id.val]
list = "val.txt"
folder = "pictures"

[id.test]
list = "test.txt"
folder = "pictures"
"""

TINY = """\
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d({side})
        self.fc = nn.Linear(3 * 64, {classes})

    def forward(self, images):
        return self.fc(torch.flatten(self.pool(images), 1))


def tiny():
    torch.manual_seed(0)
    return Tiny()
"""


def save_picture(file: Path, seed: int) -> None:
    """Save a JPEG of 500 × 375 with large forms and some grain, about as many bytes as a photograph's."""
    rng = np.random.default_rng(seed)
    forms = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    grain = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
    Image.blend(forms, grain, 0.12).save(file, quality=90)


def build(model: str, device: torch.device) -> nn.Module:
    """Return a frozen network of random weights whose batch norms fit a batch of noise: states of usual size."""
    torch.manual_seed(0)
    network = find_model(model).build(CLASSES.get(model, 1000))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0  # the batch's own mean and variance
        network.train()
        with torch.no_grad():
            network(noise(model, 8))
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
    return freeze(network.eval()).to(device)


def noise(model: str, count: int, seed: int = 0) -> Tensor:
    """Return random images, (count, 3, side, side), on the CPU."""
    side = SIDE[model]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def layers_of(model: str) -> list[LayerSpec]:
    """Return the default layers of a network; the last is the first that runs."""
    return specs(model, find_model(model).default)


def tap(model: str, network: nn.Module, images: Tensor) -> Tapped:
    """Return the states of images, in float32 without TF32."""
    with products("fp32"), Taps(network, layers_of(model), find_model(model).classifier) as taps:
        return taps(images)


def half(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Return autocast to a half type, or nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def as_ours(*, strict: bool) -> contextlib.AbstractContextManager[object]:
    """Let attention take the backward pass that it takes in ours, where ours has run."""
    return strictly_deterministic() if strict else contextlib.nullcontext()


def difference(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖, in float64."""
    a, b = found.cpu().double(), expected.cpu().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the median of the ratios round by round, and their range."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"


@contextlib.contextmanager
def sampling(device: torch.device, busy: list[float]) -> Iterator[None]:
    """Collect the GPU's use in percent, five times a second, by nvidia-smi; nothing without it."""
    if device.type != "cuda":
        yield
        return
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    words = ["nvidia-smi", which, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]
    with tempfile.TemporaryFile("w+") as out:
        try:
            process = subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL)
        except OSError:
            yield
            return
        try:
            yield
        finally:
            process.terminate()
            process.wait()
        out.seek(0)
        for line in out:
            with contextlib.suppress(ValueError):  # [N/A]
                busy.append(float(line))


PARTS = {  # part → seconds that it needs on an H100 at most, which is a guess until one has run it
    "states": 60, "taps": 120, "detector": 30, "same": 60, "whole": 120, "auroc": 60, "memory": 30,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    args = parser.parse_args()
    if unknown := [part for part in args.only.split(",") if part not in PARTS]:
        parser.error(f"part {unknown[0]!r} is not known; the parts are {', '.join(PARTS)}")
    began = time.monotonic()
    deadline = began + 60 * args.minutes
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU here; --device cpu --small tries the parts on a CPU")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    pin_arithmetic()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, which stands in for a GPU"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores\n")
    print("| what | command | it printed | asked for |\n|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory(prefix="nacpipe-") as folder:
        bench = Bench(device, SMALL if args.small else Sizes(), Path(folder), deadline)
        for part in args.only.split(","):
            command = f"`python bench/gpu.py --only {part}`"
            if time.monotonic() + (0 if args.small else PARTS[part]) > deadline:
                print(f"| {part} | {command} | skipped: {args.minutes:g} minutes do not suffice for it | |", flush=True)
                continue
            try:
                for row in getattr(bench, part)():
                    print(f"| {row.what} | {command} | {row.printed} | {row.asked} |", flush=True)
            except Exception as error:  # the other parts' figures are worth having
                failed = True
                traceback.print_exc()
                print(f"| {part} | {command} | failed: {type(error).__name__} | |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
