"""Fetch and unpack OpenOOD's archives, so that a partial download or folder is never taken for a complete one.

.download/NAME.zip         the download; an interrupted one continues
images_X/.NAME.unpacking   unpacked here, then moved into place: a new folder at once, an existing one file by file
.download/NAME.done        the archive was unpacked whole; files that lists still lack are not in it
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nacpipe.benchmarks.archives import AUTHORS_LISTS, LISTS, Archive, find_archives
from nacpipe.benchmarks.folders import is_hidden
from nacpipe.benchmarks.lists import ImageList, read_list
from nacpipe.benchmarks.standard import Benchmark, Split
from nacpipe.benchmarks.unpack import BrokenArchive, unpack
from nacpipe.errors import DownloadError, InputError, MissingExtra

Fetch = Callable[[str, Path], None]  # (URL, file): complete the file, from the bytes that exist; or raise
Lists = Sequence[tuple[Split, ImageList | None]]
STATES = ("complete", "unpacked before", "to unpack", "to fetch")


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadPlan:
    """What is to be done with one archive."""

    archive: Archive
    url: str
    zip: Path
    target: Path
    state: str
    """One of `STATES`."""

    @property
    def done(self) -> Path:
        """The file that records that the archive was unpacked whole."""
        return self.zip.with_suffix(".done")


def choose_archives(
    benchmark: Benchmark, only: Sequence[str] = (), checkpoints: bool = False, root: Path | None = None
) -> list[Archive]:
    """Return the archives to download: those named, or the lists and all images, and the checkpoints if asked for.

    The lists are OpenOOD's, or the authors' if those were downloaded below `root` before; then images that only
    OpenOOD's lists name are left out.

    Raises:
        InputError: an archive is not the benchmark's, or both archives of lists are named.
    """
    known = {archive.name: archive for archive in find_archives(benchmark.name)}
    for name in only:
        if name not in known:
            raise InputError(f"archive {name!r} is not part of {benchmark.name}; it has {', '.join(known)}")
    if {LISTS, AUTHORS_LISTS} <= {*only}:
        raise InputError(f"{LISTS} and {AUTHORS_LISTS} are unpacked into the same folder; name one of them")
    if only:
        return [archive for archive in known.values() if archive.name in only]
    authors_lists = root is not None and _done(root, AUTHORS_LISTS).exists()
    left_out = {LISTS if authors_lists else AUTHORS_LISTS}
    if root is not None:
        left_out |= {split.removeprefix("csid/") for split in unlisted_splits(benchmark, root)}
    return [a for a in known.values() if a.name not in left_out and (checkpoints or not a.checkpoints)]


def unlisted_splits(benchmark: Benchmark, root: Path) -> tuple[str, ...]:
    """Return the splits that the lists downloaded below `root` do not contain; OpenOOD's lists contain all."""
    authors_lists = next(archive for archive in find_archives(benchmark.name) if archive.name == AUTHORS_LISTS)
    return authors_lists.lacks if _done(root, AUTHORS_LISTS).exists() else ()


def read_lists(benchmark: Benchmark, root: Path) -> Lists:
    """Read every existing list of a benchmark except id/subtrain's, which `data split-train` writes."""
    return [(split, read_list(benchmark, split, root)) for split in benchmark.splits if split.name != "id/subtrain"]


def plan_download(
    benchmark: Benchmark, archive: Archive, lists: Lists, root: Path, results: Path, mirror: str | None = None
) -> DownloadPlan:
    """Return what to do with one archive; reads the disk and changes nothing."""
    base = results if archive.checkpoints else root
    draft = base / ".download" / f"{archive.name}.zip"
    listed, missing, _ = count_missing(benchmark, archive, lists, root)
    if listed and not missing and archive.name != AUTHORS_LISTS:  # OpenOOD's lists have the same names
        state = "complete"
    elif draft.with_suffix(".done").exists():
        state = "unpacked before"
    else:
        state = "to unpack" if draft.exists() else "to fetch"
    return DownloadPlan(archive=archive, url=archive.url(mirror), zip=draft, target=base / archive.folder, state=state)


def download(
    plan: DownloadPlan,
    lists: Lists = (),
    fetch: Fetch | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Download one archive as planned. After an interruption, a new plan continues.

    Args:
        plan: from `plan_download`.
        lists: from `read_lists`; they show whether an archive's single folder is part of its paths.
        fetch: downloads a file from a URL; gdown by default.
        progress: called with the bytes unpacked and their total.

    Raises:
        DownloadError: the archive cannot be fetched; it is broken or not safe to unpack, and is renamed; or it holds
            lists and another archive's lists exist.
        MissingExtra: gdown is not installed.
    """
    if plan.state in ("complete", "unpacked before"):
        return
    _check_lists(plan)
    plan.zip.parent.mkdir(parents=True, exist_ok=True)
    if plan.state == "to fetch":
        (fetch or fetch_with_gdown)(plan.url, plan.zip)
    unpack_parent = plan.target if plan.archive.checkpoints else plan.target.parent
    draft = unpack_parent / f".{plan.archive.name}.unpacking"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        unpack(plan.zip, draft, progress)
    except BrokenArchive as error:
        shutil.rmtree(draft, ignore_errors=True)
        broken = plan.zip.with_suffix(".broken")
        os.replace(plan.zip, broken)
        error.add_note(f"it is kept as {broken}, the same command fetches it again")
        raise
    _move_missing(_choose_unpacked_folder(plan, lists, draft), plan.target)
    shutil.rmtree(draft, ignore_errors=True)
    plan.done.write_text(f"{plan.url} was unpacked whole; remove this file to fetch it again\n")
    plan.zip.unlink()


def download_archives(
    benchmark: Benchmark,
    archives: Sequence[Archive],
    root: Path,
    results: Path,
    *,
    mirror: str | None = None,
    fetch: Fetch | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Download archives one after another and return a sentence for each that lacks listed files.

    Raises:
        DownloadError: an archive cannot be fetched or unpacked; the earlier ones are in place.
    """
    problems = []
    lists = read_lists(benchmark, root)
    for archive in archives:
        plan = plan_download(benchmark, archive, lists, root, results, mirror)
        note(f"{archive.name}: {plan.state}" + (f" from {plan.url}" if plan.state == "to fetch" else ""))
        download(plan, lists, fetch, progress)
        if archive.lists:
            lists = read_lists(benchmark, root)
        total, missing, first = count_missing(benchmark, archive, lists, root)
        if not total and not archive.checkpoints:
            problems.append(f"{archive.name}: no list names a file of it, so it is not checked; {LISTS} has the lists")
        if missing:
            remark = f" ({archive.note})" if archive.note else ""
            problems.append(
                f"{archive.name}: {missing} of {total} listed files are not there, the first {first}{remark}"
            )
    return problems


def count_missing(benchmark: Benchmark, archive: Archive, lists: Lists, root: Path) -> tuple[int, int, str]:
    """Return how many files of an archive the lists name, how many of these are missing, and the first missing one.

    For an archive of lists, the lists are counted; for checkpoints, all three are empty.
    """
    if archive.lists:
        wanted = [(split, listed) for split, listed in lists if split.name not in archive.lacks]
        missing_lists = [f"{benchmark.lists}/{split.source}" for split, listed in wanted if listed is None]
        return len(wanted), len(missing_lists), missing_lists[0] if missing_lists else ""
    total, missing, first = 0, 0, ""
    for listed, rows in _rows_below(archive, lists, root):
        missing_rows = listed.missing(rows)
        first = first or (listed.where(missing_rows[0]) if missing_rows else "")
        total, missing = total + len(rows), missing + len(missing_rows)
    return total, missing, first


def fetch_with_gdown(url: str, file: Path) -> None:
    """Download a file with gdown, which supports Google Drive and continues partial downloads.

    Raises:
        MissingExtra: gdown is not installed.
        DownloadError: the download failed.
    """
    try:
        import gdown
    except ModuleNotFoundError as error:
        raise MissingExtra("downloads need gdown; install it with: pip install 'nacpipe[data]'") from error
    try:
        gdown.download(url=url, output=str(file), quiet=not (sys.stderr and sys.stderr.isatty()), resume=True)
    except Exception as error:  # gdown raises its own, requests' and the system's errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DownloadError(
            f"{url} cannot be downloaded: {reason}; the partial file is kept in {file.parent}, the same command goes on"
        ) from error
    if not file.is_file():
        raise DownloadError(f"{url} cannot be downloaded: gdown left no {file}")


def _check_lists(plan: DownloadPlan) -> None:
    """Refuse to mix the lists of two archives: existing lists are never overwritten, so both would be used in part.

    OpenOOD's lists are added to existing lists of unknown origin.
    """
    if not plan.archive.lists or not plan.target.exists():
        return
    other = LISTS if plan.archive.name == AUTHORS_LISTS else AUTHORS_LISTS
    done = _done(plan.zip.parent.parent, other)
    if plan.archive.name == AUTHORS_LISTS or done.exists():
        aside = plan.target.with_name(f"{plan.target.name}.before")
        owner = f"the lists of {other}" if done.exists() else "other lists"
        next_command = shlex.join(["mv", str(plan.target), str(aside)])
        if done.exists():
            next_command += f" && {shlex.join(['rm', str(done)])}"
        raise DownloadError(f"{plan.target} holds {owner}; to use those of {plan.archive.name}: {next_command}")


def _done(root: Path, name: str) -> Path:
    return root / ".download" / f"{name}.done"


def _rows_below(archive: Archive, lists: Lists, root: Path) -> Iterator[tuple[ImageList, list[int]]]:
    """Yield each list with the positions whose files belong to an archive of images."""
    for _, listed in lists:
        if listed is not None and archive.folder and (root / archive.folder).is_relative_to(listed.folder):
            prefix = f"{(root / archive.folder).relative_to(listed.folder).as_posix()}/"
            yield listed, [row for row, name in enumerate(listed.names) if name.startswith(prefix)]


def _choose_unpacked_folder(plan: DownloadPlan, lists: Lists, draft: Path) -> Path:
    """Return the folder that becomes the target: the unpacked one, or its only child if that has the target's name.

    OpenOOD unpacks an archive of images without a further folder. The lists show whether an archive has one.
    """
    inner = draft / plan.target.name
    visible = {path.name for path in draft.iterdir() if not is_hidden(path.name)}
    if plan.archive.checkpoints or visible != {inner.name}:
        return draft
    if plan.archive.lists:
        return inner
    root = plan.zip.parent.parent
    files_present = dict.fromkeys((draft, inner), 0)
    for listed, rows in _rows_below(plan.archive, lists, root):
        for candidate in files_present:
            files_present[candidate] += sum(
                (candidate / listed.file(row).relative_to(plan.target)).is_file() for row in rows
            )
    return inner if files_present[inner] > files_present[draft] else draft


def _move_missing(source: Path, target: Path) -> None:
    """Move what does not exist at the target: a folder at once if it is new, otherwise child by child."""
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)  # noqa: PTH104 (the folder appears at once)
    elif source.is_dir() and target.is_dir():
        for child in sorted(source.iterdir()):
            _move_missing(child, target / child.name)
