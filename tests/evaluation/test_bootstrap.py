"""Intervals and comparisons against draws that are written out in plain loops."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import InputError
from nacpipe.evaluation.bootstrap import add_confidence, compare_methods, compare_with_best, simultaneous_intervals
from nacpipe.evaluation.flagged import add_flagged
from nacpipe.evaluation.method_scores import MethodScores, ScoredCache, score_cache
from nacpipe.evaluation.tables import tabulate
from nacpipe.method.metrics import detect
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    rows = {"csid/blurred": 25, "ood/far/faces": 40}
    path = tmp_path_factory.mktemp("bootstrap") / "b.zarr"
    write_params(path.with_name("b.params.json"), PARAMS)
    write_params(path.with_name("other.json"), NacParams(layers={"layer1": LayerParams(bins=9, saturation=3, alpha=1)}))
    return make_cache(path, rows=rows)


@pytest.fixture(scope="module")
def run(cache: Cache) -> ScoredCache:
    return score_cache(cache, PARAMS)


def drawn(run: ScoredCache, id_splits: list[str], sets: list[str], resamples: int, seed: int) -> dict[str, Any]:
    """Method → (resamples, 2) of FPR@95 and AUROC, means over sets, from scores picked one by one."""
    found: dict[str, list[list[float]]] = {name: [] for name in run.methods}
    for number in range(resamples):
        picked = {}
        for name in ("+".join(id_splits), *sets):
            size = sum(run.rows[split] for split in name.split("+"))
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
            picked[name] = rng.integers(size, size=size)
        for method, scored in run.methods.items():
            inside = np.concatenate([scored.scores[split] for split in id_splits])[picked["+".join(id_splits)]]
            results = [detect(inside, scored.scores[name][picked[name]]) for name in sets]
            found[method].append([float(np.mean([getattr(r, m) for r in results])) for m in ("fpr95", "auroc")])
    return {method: np.array(values) for method, values in found.items()}


@pytest.mark.parametrize("task", ["ood", "fsood"])
@pytest.mark.parametrize("sets", [["ood/near/letters"], ["ood/far/faces"], ["ood/far/faces", "ood/far/textures"]])
def test_intervals_by_hand(run: ScoredCache, task: str, sets: list[str]) -> None:
    id_splits = ["id/test"] + ["csid/blurred"] * (task == "fsood")
    draws = drawn(run, id_splits, sets, 40, 5)
    table = add_confidence(tabulate([run]), [run], level=0.8, resamples=40, seed=5)
    dataset = sets[0].split("/")[-1] if len(sets) == 1 else "mean"
    rows = table[(table["task"] == task) & (table["dataset"] == dataset) & (table["group"] == sets[0].split("/")[1])]
    assert len(rows) == 4
    for row in rows.itertuples():
        for place, metric in enumerate(("fpr95", "auroc")):
            low, high = np.quantile(draws[row.method][:, place], [0.1, 0.9])
            assert getattr(row, f"{metric}_low") == pytest.approx(low, abs=1e-12)
            assert getattr(row, f"{metric}_high") == pytest.approx(high, abs=1e-12)
    assert set(table["confidence"]) == {0.8}
    assert set(table["resamples"]) == {40}


def test_the_same_seed_gives_the_same_intervals_and_another_others(run: ScoredCache) -> None:
    table = tabulate([run])
    first = add_confidence(table, [run], resamples=30)
    pd.testing.assert_frame_equal(add_confidence(table, [run], resamples=30), first)
    other = add_confidence(table, [run], resamples=30, seed=2)
    assert not other["auroc_low"].equals(first["auroc_low"])
    wider = add_confidence(table, [run], resamples=30, level=0.99)
    assert (wider["auroc_low"] <= first["auroc_low"]).all()
    assert (wider["auroc_high"] >= first["auroc_high"]).all()


def test_a_comparison_is_paired(run: ScoredCache) -> None:
    table = compare_methods([run], "NAC", "MSP", level=0.9, resamples=60, seed=3)
    draws = drawn(run, ["id/test"], ["ood/far/faces"], 60, 3)
    rows = table.query("task == 'ood' and dataset == 'faces'").set_index("metric")
    values = tabulate([run]).query("task == 'ood' and dataset == 'faces'").set_index("method")
    for place, metric in enumerate(("fpr95", "auroc")):
        low, high = np.quantile(draws["NAC"][:, place] - draws["MSP"][:, place], [0.05, 0.95])
        row = rows.loc[metric]
        assert (row["low"], row["high"]) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
        assert (row["first_value"], row["second_value"]) == tuple(values.loc[["NAC", "MSP"], metric])
        assert row["difference"] == row["first_value"] - row["second_value"]
        assert row["more_than_chance"] == (low > 0 or high < 0)
    assert len(table) == 2 * 2 * (1 + 1 + 2 + 1)


def made(**methods: MethodScores) -> ScoredCache:
    rows = {"id/test": 400, "ood/near/a": 400}
    return ScoredCache(path="x", methods=methods, rows=rows, correct={}, note="")


def test_what_is_more_than_chance() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
    one = MethodScores(scores={"id/test": inside, "ood/near/a": outside})
    same = MethodScores(scores={"id/test": 3 * inside, "ood/near/a": 3 * outside})
    noisy = MethodScores(scores={"id/test": inside + rng.normal(0, 1, 400), "ood/near/a": outside})
    empty = MethodScores(scores={"id/test": inside}, reasons={"ood/near/a": "it cannot"})
    run = made(one=one, same=same, noisy=noisy, empty=empty)
    table = compare_methods([run], "one", "same", resamples=50)
    assert set(table["difference"]) == set(table["low"]) == set(table["high"]) == {0.0}
    assert list(table["more_than_chance"]) == [False] * 4
    better = compare_methods([run], "one", "noisy", resamples=200).set_index(["dataset", "metric"]).loc["a", "auroc"]
    worse = compare_methods([run], "noisy", "one", resamples=200).set_index(["dataset", "metric"]).loc["a", "auroc"]
    assert better["more_than_chance"]
    assert better["low"] > 0
    assert (worse["difference"], worse["low"], worse["high"]) == pytest.approx(
        (-better["difference"], -better["high"], -better["low"])
    )
    none = compare_methods([run], "one", "empty", resamples=5)
    assert list(none["more_than_chance"]) == [None] * 4
    assert none["low"].isna().all()
    assert set(none["reason"]) == {"it cannot"}


def test_intervals_of_several_differences_hold_together() -> None:
    """Of k independent normal differences c is the normal quantile at (1 + level^(1/k)) / 2: 1.960, of five 2.569."""
    draws = np.random.default_rng(0).normal(0, [1, 2, 3, 4, 5], (200_000, 5))
    observed = np.zeros(5)
    for count, factor in ((1, 1.960), (5, 2.569)):
        found = simultaneous_intervals(observed[:count], draws[:, :count], 0.95)
        expected = factor * np.arange(1, count + 1)
        np.testing.assert_allclose(found, np.stack([-expected, expected], axis=1), rtol=0.01)
    same = np.repeat(draws[:, :1], 5, axis=1)  # five times one method: as if there were one
    one = simultaneous_intervals(observed[:1], draws[:, :1], 0.95)
    np.testing.assert_allclose(simultaneous_intervals(observed, same, 0.95), np.repeat(one, 5, axis=0))
    still = simultaneous_intervals(np.array([0.5, 0.0]), np.stack([np.full(200_000, 0.5), draws[:, 0]], axis=1), 0.95)
    np.testing.assert_allclose(still, [[0.5, 0.5], one[0]])


def test_the_best_is_picked_by_the_mean_and_said_so(run: ScoredCache) -> None:
    table = tabulate([run])
    found = compare_with_best([run], "NAC", resamples=40, seed=5)
    for (task, group), rows in found.groupby(["task", "group"]):
        means = table[(table["task"] == task) & (table["group"] == group) & (table["dataset"] == "mean")].iloc[1:]
        assert set(rows["second"]) == {means.set_index("method")["auroc"].idxmax()}
        assert set(rows["among"]) == {3}
    draws = drawn(run, ["id/test"], ["ood/near/letters"], 40, 5)
    row = found.query("task == 'ood' and dataset == 'letters' and metric == 'auroc'").iloc[0]
    names = ["MSP", "MaxLogit", "Energy"]
    values = table.query("task == 'ood' and dataset == 'letters'").set_index("method")["auroc"]
    differences = np.stack([(draws["NAC"] - draws[name])[:, 1] for name in names], axis=1)
    spread = differences.std(axis=0)
    factor = np.quantile((abs(differences - (values["NAC"] - values[names]).to_numpy()) / spread).max(axis=1), 0.95)
    half = factor * spread[names.index(row["second"])]
    assert (row["low"], row["high"]) == (
        pytest.approx(row["difference"] - half, abs=1e-12),
        pytest.approx(row["difference"] + half, abs=1e-12),
    )
    assert row["more_than_chance"] == (not row["low"] <= 0 <= row["high"])
    assert set(found["resamples"]) == {40}


@pytest.mark.slow
def test_equal_methods_are_seldom_called_different() -> None:
    """At 0.9, one comparison in ten of equally good methods; 60 of them, seeded: within 5 of 6."""
    called = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
        a, b = (
            MethodScores(
                scores={
                    "id/test": truth[0] + rng.normal(0, 0.5, 400),
                    "ood/near/a": truth[1] + rng.normal(0, 0.5, 400),
                }
            )
            for _ in range(2)
        )
        table = compare_methods([made(a=a, b=b)], "a", "b", level=0.9, resamples=100, seed=seed)
        called += bool(table.set_index(["dataset", "metric"]).loc[("a", "auroc"), "more_than_chance"])
    assert 1 <= called <= 11


def test_over_runs_the_interval_is_that_of_the_mean(run: ScoredCache) -> None:
    """The same images twice: the mean over runs is drawn as one."""
    nac, msp = run.methods["NAC"], run.methods["MSP"]
    first = ScoredCache(path="a", methods={"m": nac}, rows=run.rows, correct=run.correct, note="")
    second = ScoredCache(path="b", methods={"m": msp}, rows=run.rows, correct=run.correct, note="")
    table = add_confidence(tabulate([first, second]), [first, second], resamples=40, seed=5)
    draws = drawn(run, ["id/test"], ["ood/near/letters"], 40, 5)
    low = np.quantile((draws["NAC"] + draws["MSP"])[:, 1] / 2, 0.025)
    assert table.query("task == 'ood' and dataset == 'letters'")["auroc_low"].iloc[0] == pytest.approx(low, abs=1e-12)


def test_wrong_requests(run: ScoredCache) -> None:
    with pytest.raises(InputError, match=r"^confidence is 95; it must lie between 0 and 1$"):
        add_confidence(tabulate([run]), [run], level=95)
    with pytest.raises(InputError, match=r"^resamples is 0; it must be at least 1$"):
        compare_methods([run], "NAC", "MSP", resamples=0)
    with pytest.raises(InputError, match=r"^method 'ViM' was not evaluated; there are NAC, MSP, MaxLogit, Energy$"):
        compare_methods([run], "NAC", "ViM")


# --- as printed -------------------------------------------------------------------------------------------------------


def invoke(*args: str) -> Any:
    return CliRunner().invoke(main, ["evaluate", *args])


def test_confidence_as_printed(cache: Cache, run: ScoredCache) -> None:
    table = add_confidence(tabulate([run]), [run], level=0.9, resamples=50)
    options = [cache.path, "--confidence", "0.9", "--resamples", "50"]
    pd.testing.assert_frame_equal(
        pd.DataFrame(json.loads(invoke(*options, "--json").stdout)), add_flagged(table), rtol=1e-14
    )
    lines = invoke(*options).stdout.splitlines()
    first = table.iloc[0]
    assert f"{100 * first['auroc']:.2f} [{100 * first['auroc_low']:.2f}, {100 * first['auroc_high']:.2f}]" in lines[3]
    assert lines[-2] == "[…]: 0.9 bootstrap intervals of 50 draws of the images"
    assert invoke(cache.path, "--resamples", "50").exit_code == 2


@pytest.mark.parametrize("against", ["energy", "other.json"])
def test_a_comparison_as_printed(cache: Cache, run: ScoredCache, against: str) -> None:
    from nacpipe.scoring.params_file import read_params

    file = cache.path.replace("b.zarr", against)
    if against.endswith(".json"):
        name = f"NAC ({file})"
        run = score_cache(cache, {"NAC": PARAMS, name: read_params(file)})
    else:
        file, name = against, "Energy"
    table = compare_methods([run], "NAC", name, resamples=50)
    printed = invoke(cache.path, "--against", file, "--resamples", "50", "--json")
    assert (printed.exit_code, printed.stderr) == (0, "")
    pd.testing.assert_frame_equal(pd.DataFrame(json.loads(printed.stdout)), table, rtol=1e-14)
    lines = invoke(cache.path, "--against", file, "--resamples", "50").stdout.splitlines()
    row = table.iloc[1]
    assert lines[0] == f"OOD: ID is id/test: NAC against {name}; all in percent"
    said = ("better" if row["difference"] > 0 else "worse") if row["more_than_chance"] else "within chance"
    shown = [f"{100 * row[key]:.2f}" for key in ("first_value", "second_value")]
    shown += [f"{100 * row['difference']:+.2f}", f"[{100 * row['low']:+.2f},", f"{100 * row['high']:+.2f}]"]
    assert lines[4].split() == ["AUROC", *shown, *said.split()]


def test_the_best_as_printed(cache: Cache, run: ScoredCache) -> None:
    table = compare_with_best([run], "NAC", resamples=50)
    printed = invoke(cache.path, "--against", "best", "--resamples", "50", "--json")
    assert (printed.exit_code, printed.stderr) == (0, "")
    pd.testing.assert_frame_equal(pd.DataFrame(json.loads(printed.stdout)), table, rtol=1e-14)
    lines = invoke(cache.path, "--against", "best", "--resamples", "50").stdout.splitlines()
    near, far = (table[table["group"] == group]["second"].iloc[0] for group in ("near", "far"))
    told = f"NAC against the best of 3 ({near} near, {far} far)"
    assert lines[0] == f"OOD: ID is id/test: {told}; all in percent"
    assert lines[-2].startswith("the best was picked by its mean AUROC on these test sets; intervals hold for")
    latex = invoke(cache.path, "--against", "best", "--resamples", "50", "--latex", "--baselines", "Entropy").stdout
    assert f"\\caption{{NAC against the best of 4 ({near} near, " in latex
    assert "bold where it does not hold 0. The best was picked by its mean AUROC on these test sets;" in latex


@pytest.mark.parametrize("against", ["Energy", "best"])
def test_a_paper_has_the_table_and_the_comparison(cache: Cache, against: str) -> None:
    """In LaTeX both are printed, one after the other, under labels of their own; CSV is one table."""
    options = [cache.path, "--against", against, "--baselines", "Entropy", "--resamples", "20"]
    both = invoke(*options, "--latex")
    alone = invoke(cache.path, "--baselines", "Entropy", "--latex").stdout
    assert (both.exit_code, both.stderr) == (0, "")
    assert both.stdout.startswith(alone)
    found = [line for line in both.stdout.splitlines() if line.startswith(r"\label")]
    places = ["ood-near", "ood-far", "fsood-near", "fsood-far", "ood-difference", "fsood-difference"]
    assert found == [rf"\label{{tab:{place}}}" for place in places]
    assert invoke(*options[:2], "Energy", *options[3:], "--csv").exit_code == 2


@pytest.mark.parametrize(("images", "given"), [(1, False), (5, False), (6, True)])
def test_an_interval_needs_images(images: int, given: bool) -> None:
    """Of one image every draw is the same: an interval of no width would call any difference more than chance."""
    rows = {"id/test": 400, "ood/near/a": images}
    high, low = (
        MethodScores(scores={"id/test": np.full(400, 1.0), "ood/near/a": np.full(images, ood)}) for ood in (0.0, 2.0)
    )
    run = ScoredCache(path="x", methods={"NAC": high, "MSP": low}, rows=rows, correct={}, note="")
    for table in (compare_methods([run], "NAC", "MSP", resamples=5), compare_with_best([run], "NAC", resamples=5)):
        assert list(table["difference"]) == [-1.0, 1.0] * 2
        assert list(table["more_than_chance"]) == [True if given else None] * 4
        assert set(table["reason"]) == {"" if given else "fewer than 6 images say nothing"}
    assert add_confidence(tabulate([run]), [run], resamples=5)["auroc_low"].notna().all() == given
