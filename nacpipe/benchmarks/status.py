"""Which files of a benchmark exist on disk, by split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nacpipe.benchmarks.lists import describe_wrong_labels, list_path, read_list
from nacpipe.benchmarks.standard import Benchmark, Split
from nacpipe.method.metrics import find_wrong_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class SetStatus:
    """The files of one split on disk."""

    split: str
    source: str
    """The list that exists, or the one that is missing."""
    images: int
    """Number of listed images; 0 without a list."""
    missing: int
    """Number of listed images whose file does not exist."""
    first: str = ""
    """The first missing file, or the missing list."""
    wrong_labels: int = 0
    """Number of images of an ID or csid split whose label is not a class."""
    label_problem: str = ""
    """How many, the first of those labels and its image, and what to do."""
    elsewhere: str = ""
    """The origin of images that are not checked here: Python packages, or torchvision."""
    synthetic_if_missing: bool = False
    """Whether `extract` makes the split from id/val where it has no list or no image."""

    @property
    def complete(self) -> bool:
        """Whether every listed image exists."""
        return self.images > 0 and not self.missing

    @property
    def is_made(self) -> bool:
        """Whether `extract` makes the split from id/val."""
        return self.synthetic_if_missing and self.missing == self.images

    @property
    def state(self) -> str:
        """The status in a few words."""
        if self.elsewhere:
            return self.elsewhere
        if not self.images:
            return "no list"
        if self.wrong_labels:
            return "wrong labels"
        return "complete" if self.complete else "missing" if self.missing == self.images else "incomplete"


def read_status(benchmark: Benchmark, root: Path) -> list[SetStatus]:
    """Return one row per split; checks that every listed file exists and opens no image.

    Raises:
        ImageError: a list is malformed, naming file and line.
    """
    return [_check_split(benchmark, split, root) for split in benchmark.splits]


def _check_split(benchmark: Benchmark, split: Split, root: Path) -> SetStatus:
    if benchmark.packaged or split.kind == "torchvision":
        elsewhere = "in Python packages" if benchmark.packaged else "torchvision's, looked for when extracted"
        return SetStatus(split=split.name, source=split.source, images=0, missing=0, elsewhere=elsewhere)
    listed = read_list(benchmark, split, root)
    if listed is None:
        path = list_path(benchmark, split, root)
        return SetStatus(
            split=split.name,
            source=split.source,
            images=0,
            missing=0,
            first=str(path),
            synthetic_if_missing=split.synthetic_if_missing,
        )
    missing = listed.missing(range(len(listed.names)))
    is_ood = split.name.startswith("ood/")
    wrong = 0 if is_ood else find_wrong_labels(listed.labels, benchmark.classes).size
    return SetStatus(
        split=split.name,
        source=f"synthetic, from {listed.source}" if split.synthetic else listed.source,
        images=len(listed.names),
        missing=len(missing),
        synthetic_if_missing=split.synthetic_if_missing,
        first=listed.where(missing[0]) if missing else "",
        wrong_labels=wrong,
        label_problem=describe_wrong_labels(listed.labels, benchmark.classes, listed.where) if wrong else "",
    )
