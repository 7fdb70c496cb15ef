"""Drift: whether scored images are still like id/val, shard by shard or over time.

Two questions of every group of images, each with what chance alone would do:

    flagged     How many of n images are below the threshold? Of m scores of id/val v are, so that the share of images
                like them that is flagged is distributed as Beta(v + 1, m − v), and the number of n new ones as
                BetaBinomial(n, v + 1, m − v): id/val's own chance is part of it.
    distance    How far are the distributions of their scores and of id/val's? The largest difference of both, D, of
                Kolmogorov and Smirnov; P(√(nm / (n + m)) · D > x) is at most about 2 Σ (−1)^(k − 1) exp(−2 k² x²).

Of fewer images than `least_images`, whatever they score, neither is past chance: they are too few to say.
Both take images for independent of each other: frames of one video are not, and alarm sooner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nacpipe.detector.parts import find_parts, read_description, read_part
from nacpipe.errors import InputError

PERIODS = {"hour": "%Y-%m-%d %H:00", "day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}
NO_TIME = "no time"
DECILES = 10
MANY = 1_000_000  # images, from which on id/val's chance decides
ACCURACY = 1e-10

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What in-distribution images score."""

    scores: Scores
    """(m,), of id/val, ascending."""
    threshold: float
    """The lowest score that counts as ID."""

    @property
    def flagged(self) -> int:
        """Scores of id/val below the threshold."""
        return int((self.scores < self.threshold).sum())


def watch(
    parts: Sequence[str | Path],
    *,
    by: str = "part",
    false_alarms: float = 0.01,
    max_flagged: float | None = None,
) -> pd.DataFrame:
    """Compare scored images with id/val, group by group.

    Args:
        parts: files from `nacpipe score --output`, or their folders, here or at a URL.
        by: part; or hour, day, week or month, by the images' own times.
        false_alarms: the chance that any group is called drift where all images are like id/val, at most.
        max_flagged: a share; a group in which no more is flagged is not called drift.

    Returns:
        A row per group, in order: group, images, errors, flagged (a share), flagged_low and flagged_high (between which
        chance keeps it), distance, distance_bound, percentile_10, percentile_50, percentile_90, deciles (shares of
        images by their percentile), first_error (of an image without a score, with its name), least_images (of fewer
        nothing can be said), drift.

    Raises:
        InputError: parts cannot be read, are of several detectors or of one without scores of id/val; or an option is
            wrong.
        CacheError: a server does not answer.
    """
    if by != "part" and by not in PERIODS:
        raise InputError(f"by is {by!r}; known: part, {', '.join(PERIODS)}")
    if not 0 < false_alarms < 1:
        raise InputError(f"false-alarms is {false_alarms}; it must be above 0 and below 1")
    if max_flagged is not None and not 0 <= max_flagged < 1:
        raise InputError(f"max-flagged is {max_flagged}; it must be at least 0 and below 1")
    addresses = find_parts(list(parts))
    reference = read_reference(addresses)
    if by == "part":  # one at a time: memory holds one
        level = false_alarms / (2 * len(addresses))  # two questions of every group
        return pd.DataFrame(
            [_judge(name, rows, reference, level, max_flagged) for name, rows in _groups(addresses, by)]
        )
    groups: dict[str, list[pd.DataFrame]] = {}
    for name, rows in _groups(addresses, by):
        groups.setdefault(name, []).append(rows)
    if not groups:
        raise InputError(f"the parts hold no images, so that there is no {by}; the first: {addresses[0]}")
    level = false_alarms / (2 * len(groups))
    named = sorted(groups.items(), key=lambda item: (item[0] == NO_TIME, item[0]))
    return pd.DataFrame(
        [_judge(name, pd.concat(frames, ignore_index=True), reference, level, max_flagged) for name, frames in named]
    )


def read_reference(addresses: Sequence[str]) -> Reference:
    """Return what the parts' detector scored id/val with.

    Raises:
        InputError: it is not known, or there are several.
    """
    found: dict[str, tuple[str, dict[str, object]]] = {}
    folders: set[str] = set()
    for address in addresses:
        folder = address.rpartition("/")[0]
        if folder not in folders:
            folders.add(folder)
            description = read_description(address)
            if description is None or not description.get("validation_scores"):
                raise InputError(
                    f"{address}: what its detector scored id/val with is not known; export the detector again and score"
                    " into a new folder"
                )
            found.setdefault(str(description.get("sha256")), (folder, description))
    if len(found) > 1:
        (one, _), (other, _), *_ = found.values()
        raise InputError(f"the parts in {one or '.'} and {other or '.'} are of two detectors; watch them one by one")
    _, description = next(iter(found.values()))
    try:
        scores = np.sort(np.asarray(description["validation_scores"], np.float64))
        return Reference(scores=scores, threshold=float(str(description["threshold"])))
    except (KeyError, ValueError) as error:
        raise InputError(f"the description of the detector beside {addresses[0]} cannot be read: {error}") from None


def _groups(addresses: Sequence[str], by: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (group, rows); of a time a part may have rows of several groups."""
    kept = ["image", "score", "percentile", "is_ood", "error"]
    for address in addresses:
        rows = read_part(address)
        if by == "part":
            yield address, rows[kept]
            continue
        times = pd.to_datetime(rows["time"], utc=True, errors="coerce")
        names = times.dt.strftime(PERIODS[by]).fillna(NO_TIME)
        for name, group in rows[kept].groupby(names.to_numpy()):
            yield str(name), group


def _judge(
    name: str, rows: pd.DataFrame, reference: Reference, level: float, max_flagged: float | None
) -> dict[str, object]:
    scored = rows[rows["error"].isna()]
    images, flagged = len(scored), int(scored["is_ood"].astype(bool).sum())
    scores = np.sort(scored["score"].dropna().to_numpy(np.float64))
    percentiles = scored["percentile"].dropna().to_numpy(np.float64)
    low, high = flagged_interval(images, reference.flagged, reference.scores.size, level)
    distance, bound = distance_of(scores, reference.scores), distance_bound(scores.size, reference.scores.size, level)
    share = flagged / images if images else math.nan
    drift = images > 0 and (share > high or distance > bound)
    if max_flagged is not None:
        drift = drift and share > max_flagged
    counts = np.histogram(percentiles, np.linspace(0, 100, DECILES + 1))[0]
    middle = np.percentile(percentiles, [10, 50, 90]) if percentiles.size else np.full(3, math.nan)
    return {
        "group": name,
        "images": images,
        "errors": len(rows) - images,
        "flagged": share,
        "flagged_low": low,
        "flagged_high": high,
        "distance": distance,
        "distance_bound": bound,
        **{f"percentile_{q}": float(value) for q, value in zip((10, 50, 90), middle, strict=True)},
        "deciles": (counts / max(percentiles.size, 1)).tolist(),
        "first_error": _first_error(rows),
        "least_images": least_images(reference.flagged, reference.scores.size, level),
        "drift": bool(drift),
    }


def _first_error(rows: pd.DataFrame) -> str | None:
    """Return the first image without a score, and why it has none."""
    unscored = rows[rows["error"].notna()]
    if unscored.empty:
        return None
    image, error = str(unscored["image"].iloc[0]), str(unscored["error"].iloc[0])
    return error if image in error else f"{image}: {error}"


@lru_cache(1024)
def least_images(flagged: int, reference: int, level: float) -> int:
    """Return the size from which a group can be past chance: with all images flagged, or all scores on one side.

    Below it the interval of `flagged_interval` ends at 1 and `distance_bound` is 1, which no group passes. Both fall
    with n, so that the size is found by halving.

    Args:
        flagged: v, scores of id/val below the threshold.
        reference: m, scores of id/val.
        level: of each question.
    """

    def can_alarm(images: int) -> bool:
        return (
            flagged_interval(images, flagged, reference, level)[1] < 1 or distance_bound(images, reference, level) < 1
        )

    high = 1
    while not can_alarm(high) and high < MANY:
        high *= 2
    low = high // 2  # cannot alarm, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if can_alarm(middle) else (middle, high)
    return high


@lru_cache(1024)  # shards are often of one size
def flagged_interval(images: int, flagged: int, reference: int, level: float) -> tuple[float, float]:
    """Return the least and the largest share of images that chance flags, each passed with probability `level` at most.

    Args:
        images: n, of a group.
        flagged: v, scores of id/val below the threshold.
        reference: m, scores of id/val.
        level: of each side.
    """
    if images == 0:
        return math.nan, math.nan
    n = min(images, MANY)
    below = np.cumsum(flagged_chances(n, flagged, reference))  # P(K ≤ k)
    high = int(np.searchsorted(below, 1 - level, side="left"))  # the least k with P(K > k) ≤ level
    low = int(np.searchsorted(below, level, side="right"))  # the largest k with P(K < k) ≤ level
    return min(low, n) / n, min(high, n) / n


def flagged_chances(images: int, flagged: int, reference: int) -> Scores:
    """Return P(K = k) for k = 0 … n of BetaBinomial(n, v + 1, m − v), (n + 1,).

    From one k to the next the probability grows by (n − k)(v + 1 + k) / ((k + 1)(m − v + n − k − 1)).
    """
    a, b = flagged + 1.0, max(reference - flagged, 1e-9)
    k = np.arange(images, dtype=np.float64)
    steps = np.log(images - k) + np.log(a + k) - np.log(k + 1) - np.log(b + images - k - 1)
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    chances = np.exp(logs - logs.max())
    return np.asarray(chances / chances.sum())


def distance_of(scores: Scores, reference: Scores) -> float:  # both ascending
    """Return the largest difference of two distribution functions, 0 … 1; NaN where there are no scores."""
    if scores.size == 0:
        return math.nan
    points = np.concatenate([scores, reference])
    ours = np.searchsorted(scores, points, side="right") / scores.size
    theirs = np.searchsorted(reference, points, side="right") / reference.size
    return float(np.abs(ours - theirs).max())


@lru_cache(1024)
def distance_bound(scores: int, reference: int, level: float) -> float:
    """Return the distance that chance passes with probability `level`; 1 where there are too few scores to pass it."""
    if scores == 0:
        return math.nan
    low, high = 0.0, 10.0
    while high - low > ACCURACY:
        middle = (low + high) / 2
        low, high = (middle, high) if kolmogorov_tail(middle) > level else (low, middle)
    return min(high * math.sqrt((scores + reference) / (scores * reference)), 1.0)


def kolmogorov_tail(x: float) -> float:
    """Return 2 Σ (−1)^(k − 1) exp(−2 k² x²), the probability that Kolmogorov's variable is above x."""
    if x < 0.2:  # 1 to twelve digits, and the sum converges slowly
        return 1.0
    k = np.arange(1, 101)
    terms = np.where(k % 2 == 1, 1.0, -1.0) * np.exp(-2.0 * k**2 * x**2)
    return float(min(max(2.0 * terms.sum(), 0.0), 1.0))
