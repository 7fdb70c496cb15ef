"""`watch`: images like id/val are called drift as seldom as stated, others are found; groups, picture, exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy import stats

from nacpipe.cli import main
from nacpipe.detector.parts import DESCRIPTION, Parts, ScoredImage
from nacpipe.errors import InputError
from nacpipe.evaluation.drift import (
    Reference,
    distance_bound,
    distance_of,
    flagged_chances,
    flagged_interval,
    kolmogorov_tail,
    least_images,
    watch,
)

VALIDATION = np.sort(np.random.default_rng(1).normal(size=500))
THRESHOLD = float(VALIDATION[25])  # keeps 95 %


def write_parts(
    folder: Path,
    groups: Mapping[str, np.ndarray],
    *,
    validation: np.ndarray = VALIDATION,
    times: Callable[[str, int], str | None] = lambda name, row: None,
    errors: int = 0,
) -> Path:
    folder.mkdir(exist_ok=True)
    description = {"sha256": "0" * 64, "threshold": THRESHOLD, "validation_scores": validation.tolist()}
    (folder / DESCRIPTION).write_text(json.dumps(description))
    parts = Parts(folder)
    for name, scores in groups.items():
        with parts.writing(name) as writer:
            for row, score in enumerate(scores.tolist()):
                lower = 100.0 * float((validation < score).mean())
                writer.add(
                    ScoredImage(image=f"{row}.png", score=score, percentile=lower, is_ood=score < THRESHOLD,
                                predicted=0, error=None, time=times(name, row))
                )  # fmt: skip
            for row in range(errors):
                writer.add(
                    ScoredImage(image=f"b{row}", score=None, percentile=None, is_ood=None, predicted=None, error="bad")
                )
    return folder


def draw(seed: int, count: int = 400, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count) + shift


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["watch", *map(str, args)], prog_name="nacpipe")


# --- the chances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "flagged", "reference"), [(1, 0, 5), (40, 25, 500), (300, 3, 60)])
def test_chances_are_scipys(images: int, flagged: int, reference: int) -> None:
    theirs = stats.betabinom(images, flagged + 1, reference - flagged)
    np.testing.assert_allclose(
        flagged_chances(images, flagged, reference), theirs.pmf(np.arange(images + 1)), atol=1e-12
    )
    low, high = flagged_interval(images, flagged, reference, 0.01)
    assert theirs.sf(round(high * images)) <= 0.01 < theirs.sf(round(high * images) - 1)
    assert theirs.cdf(round(low * images) - 1) <= 0.01 < theirs.cdf(round(low * images)) + 1e-12


def test_distances_are_scipys() -> None:
    ours, reference = np.sort(draw(3, 200).round(1)), np.sort(draw(4, 300).round(1))  # with ties
    assert distance_of(ours, reference) == pytest.approx(stats.ks_2samp(ours, reference).statistic, abs=1e-12)
    for x in (0.1, 0.3, 0.8, 1.2, 2.5):
        assert kolmogorov_tail(x) == pytest.approx(stats.kstwobign.sf(x), abs=1e-9)
    bound = distance_bound(200, 300, 0.02)
    assert stats.kstwobign.sf(bound * np.sqrt(200 * 300 / 500)) == pytest.approx(0.02, abs=1e-6)


def test_the_rate_of_false_alarms_is_as_stated() -> None:
    """2,000 times id/val and five groups of other sizes, all of one distribution, with a stated rate of 10 %."""
    rng, level, sizes = np.random.default_rng(0), 0.10, (30, 100, 250, 400, 1000)
    alarms = {"either": 0, "flagged": 0, "distance": 0}
    each = level / (2 * len(sizes))
    highest = {size: flagged_interval(size, 20, 400, each)[1] for size in sizes}
    farthest = {size: distance_bound(size, 400, each) for size in sizes}
    for _ in range(2000):
        scores = np.sort(rng.normal(size=400))
        reference = Reference(scores=scores, threshold=float(scores[20]))
        found = {"flagged": False, "distance": False}
        for size in sizes:
            group = np.sort(rng.normal(size=size))
            found["flagged"] |= float((group < reference.threshold).mean()) > highest[size]
            found["distance"] |= distance_of(group, scores) > farthest[size]
        alarms["flagged"] += found["flagged"]
        alarms["distance"] += found["distance"]
        alarms["either"] += any(found.values())
    deviation = np.sqrt(level * (1 - level) / 2000)
    assert alarms["either"] / 2000 <= level + 3 * deviation
    for question in ("flagged", "distance"):  # and it is no rule that never alarms
        assert 0.01 <= alarms[question] / 2000 <= level / 2 + 3 * deviation


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_shifted_part_is_drift_and_the_others_are_not(tmp_path: Path) -> None:
    scores = write_parts(tmp_path / "s", {"a": draw(5), "b": draw(6, shift=-0.7), "c": draw(7)}, errors=2)
    frame = watch([scores])
    assert frame["group"].map(lambda name: Path(name).name).tolist() == ["a.csv", "b.csv", "c.csv"]
    assert frame["drift"].tolist() == [False, True, False]
    assert frame[["images", "errors"]].to_numpy().tolist() == [[400, 2]] * 3
    row = frame.iloc[1]
    assert row["flagged"] == (draw(6, shift=-0.7) < THRESHOLD).mean()
    assert row["flagged_low"] < 0.05 < row["flagged_high"] < row["flagged"]
    assert sum(row["deciles"]) == pytest.approx(1.0)
    assert row["deciles"][0] > 0.2
    assert row["percentile_10"] < row["percentile_50"] < row["percentile_90"]


def test_a_narrower_distribution_is_drift_though_nothing_is_flagged(tmp_path: Path) -> None:
    scores = write_parts(tmp_path / "s", {"a": draw(5) * 0.3})
    (row,) = watch([scores]).to_dict("records")
    assert (row["drift"], row["flagged"]) == (True, 0.0)
    assert row["distance"] > row["distance_bound"]
    assert not watch([scores], max_flagged=0.02)["drift"].any()


def test_by_time(tmp_path: Path) -> None:
    days = ("2026-11-26T23:59:59Z", "2026-11-27T00:00:00Z", None)
    scores = write_parts(tmp_path / "s", {"a": draw(5, 300), "b": draw(6, 300)}, times=lambda name, row: days[row % 3])
    frame = watch([scores], by="day")
    assert frame["group"].tolist() == ["2026-11-26", "2026-11-27", "no time"]
    assert frame["images"].tolist() == [200, 200, 200]
    assert watch([scores], by="week")["group"].tolist() == ["2026-W48", "no time"]


def test_an_empty_part_is_no_drift(tmp_path: Path) -> None:
    scores = write_parts(tmp_path / "s", {"a": np.empty(0), "b": draw(5)})
    frame = watch([scores])
    assert frame["images"].tolist() == [0, 400]
    assert not frame["drift"].any()
    done = run(scores)
    assert "1 of 2 groups have no image with a score, and were not compared" in done.stderr


def test_no_images_have_no_days(tmp_path: Path) -> None:
    scores = write_parts(tmp_path / "s", {"a": np.empty(0)})
    with pytest.raises(InputError, match=r"the parts hold no images, so that there is no day; the first: .*a\.csv"):
        watch([scores], by="day")


def test_a_part_that_is_named_twice_is_counted_once(tmp_path: Path) -> None:
    scores = write_parts(tmp_path / "s", {"a": draw(5)})
    assert watch([scores, scores / "a.csv"]).equals(watch([scores]))


def test_two_detectors_are_refused(tmp_path: Path) -> None:
    one, other = (write_parts(tmp_path / name, {"x": draw(5)}) for name in ("a", "b"))
    description = json.loads((other / DESCRIPTION).read_text()) | {"sha256": "1" * 64}
    (other / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(InputError, match="are of two detectors"):
        watch([one, other])
    (other / DESCRIPTION).unlink()
    with pytest.raises(InputError, match="what its detector scored id/val with is not known"):
        watch([other])


def test_the_interval_narrows_with_the_number_of_images() -> None:
    widths = [high - low for low, high in (flagged_interval(n, 25, 500, 0.01) for n in (10, 100, 10_000, 3_000_000))]
    assert all(a > b for a, b in pairwise(widths))
    low, high = flagged_interval(3_000_000, 25, 500, 0.01)
    exact = stats.beta(26, 475).ppf([0.01, 0.99])
    assert (low, high) == pytest.approx(tuple(exact), abs=2e-4)


@pytest.mark.parametrize(
    ("flagged", "reference", "level"), [(25, 500, 0.005), (0, 3, 0.01), (20, 400, 1e-6), (5, 5, 0.01)]
)
def test_the_least_images_are_those_from_which_anything_is_excluded(flagged: int, reference: int, level: float) -> None:
    """By trying one size after another: the chance that all are flagged, and the distance where scores do not meet."""
    theirs = (
        n for n in range(1, 5000) if stats.betabinom(n, flagged + 1, max(reference - flagged, 1e-9)).pmf(n) <= level
    )
    apart = stats.kstwobign.isf(level) ** 2  # nm / (n + m) · 1² at the bound
    from_distance = (n for n in range(1, 5000) if n * reference / (n + reference) > apart)
    tried = min(next(theirs, 5000), next(from_distance, 5000))
    found = least_images(flagged, reference, level)
    assert (found if found < 5000 else 5000) == tried
    assert (flagged, reference, level) != (25, 500, 0.005) or found == 2


def test_one_image_is_too_few_to_say_and_an_image_without_a_score_is_named(tmp_path: Path) -> None:
    scores = write_parts(tmp_path / "s", {"a": np.array([-9.0]), "b": draw(5)}, errors=1)
    frame = watch([scores])
    assert frame["least_images"].tolist() == [3, 3]  # level 0.01 / (2 · 2): one more than for one group
    assert frame["first_error"].tolist() == ["b0: bad", "b0: bad"]
    done = run(scores)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].endswith("drift")
    assert lines[1].endswith("too few to say")
    assert lines[2].endswith("no")
    assert done.stderr.splitlines() == [
        "1 of 2 groups have too few images to say: fewer than 3 are never past chance, whatever they score",
        f"2 images have no score; the first, in {scores}/a.csv: b0: bad",
        "no drift in 1 groups; a false alarm has a chance of at most 1.00 %",
    ]
    most = write_parts(tmp_path / "most", {"a": np.full(3, -9.0), "b": draw(5)})
    assert watch([most])["drift"].tolist() == [True, False]  # and so many can be


# --- the command ------------------------------------------------------------------------------------------------------


def test_exit_codes_table_json_and_picture(tmp_path: Path) -> None:
    calm = write_parts(tmp_path / "calm", {"a": draw(5), "b": draw(8)})
    done = run(calm, "--plot", tmp_path / "d.png")
    assert done.exit_code == 0, done.output
    assert "no drift in 2 groups; a false alarm has a chance of at most 1.00 %" in done.stderr
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    other = write_parts(tmp_path / "other", {"a": draw(5), "b": draw(8, shift=-1)})
    done = run(other, "--json", "--plot", tmp_path / "d.svg")
    assert done.exit_code == 3
    said = json.loads(done.stdout)
    assert (said["drift"], [group["drift"] for group in said["groups"]]) == (1, [False, True])
    assert f"drift in 1 of 2 groups, first in {other}/b.csv: " in done.stderr
    assert (tmp_path / "d.svg").read_text().count("<svg") == 1
    table = run(other).stdout.splitlines()
    assert table[2].split()[0] == f"{other}/b.csv"
    assert table[2].endswith("drift")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nosuch",), "there are no scores at nosuch; make some with: nacpipe score … --output FOLDER"),
        (("S", "--false-alarms", "0"), "false-alarms is 0.0; it must be above 0 and below 1"),
        (("S", "--max-flagged", "2"), "max-flagged is 2.0; it must be at least 0 and below 1"),
        (("S", "--plot", "x.gif"), "x.gif: a plot is written as .png or .svg"),
    ],
)
def test_refusals(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    scores = write_parts(tmp_path / "s", {"a": draw(5, 20)})
    done = run(*(str(scores) if arg == "S" else arg for arg in args))
    assert (done.exit_code, message in done.stderr) == (1, True), done.stderr
