"""Baselines from a cache, without torch: in blocks, what is learned from, what is left empty, and the command."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cli import main
from nacpipe.errors import InputError
from nacpipe.evaluation import baselines, method_scores
from nacpipe.evaluation.baselines import BASELINES, MORE_BASELINES, choose_baselines, find_baseline, score_baselines
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.evaluation.posthoc.detector import Linear, Samples, Training
from nacpipe.evaluation.posthoc.distances import vim_dimension
from nacpipe.evaluation.posthoc.openmax import fit_openmax, fit_weibull
from nacpipe.evaluation.tables import tabulate
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import LOGIT_BASELINES, entropy, fit_temperature, gen, tempered_msp
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})
TABLE = ["id/test", "ood/near/letters", "ood/far/textures"]


def relabel(cache: Cache, split: str, label: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Cache:
    array = zarr.open_group(cache.path, mode="r+", use_consolidated=False)[f"{split}/label"]
    array[:] = label(np.asarray(array[:]))  # type: ignore[index]
    CacheWriter(cache.path, cache.header).seal(split)
    return open_cache(cache.path)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_plain_scores_are_those_of_the_cached_logits(small_cache: Cache) -> None:
    val, found = small_cache["id/val"], score_baselines(small_cache, ["GEN", "Entropy", "Temperature"], TABLE)
    temperature = fit_temperature(val.read("logits"), val.label)
    for split in TABLE:
        logits = small_cache[split].read("logits")
        expected = {"GEN": gen(logits), "Entropy": entropy(logits), "Temperature": tempered_msp(logits, temperature)}
        for name, scores in expected.items():
            np.testing.assert_array_equal(found[name].scores[split], scores)
    told = {name: (method.fitted_on, method.n_fitted) for name, method in found.items()}
    assert told == {"Temperature": ("id/val", 40), "Entropy": ("", 0), "GEN": ("", 0)}


def test_blocks_change_nothing(small_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows read at a time and one scored at a time: the same to float64's rounding, every row in its place."""
    whole = score_baselines(small_cache, ["all"], TABLE)
    assert all(method.reasons == {} for method in whole.values())
    monkeypatch.setattr(method_scores, "BLOCK_BYTES", 1)
    monkeypatch.setattr(baselines, "HELD", 1)
    for name, method in score_baselines(small_cache, ["all"], TABLE).items():
        for split, expected in whole[name].scores.items():
            np.testing.assert_allclose(method.scores[split], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_one_method_alone_scores_as_all_of_them_do(small_cache: Cache) -> None:
    together = score_baselines(small_cache, ["all"], TABLE)
    for name in MORE_BASELINES:
        alone = score_baselines(small_cache, [name], TABLE)[name]
        for split in TABLE:
            np.testing.assert_allclose(alone.scores[split], together[name].scores[split], rtol=1e-12)


def test_an_openmax_score_is_the_images_own(small_cache: Cache) -> None:
    """pytorch-ood's depends on which classes the other images of the same call are predicted as."""
    train, tested = small_cache["id/train"], small_cache["id/test"]
    linear = Linear(weight=np.zeros((3, 6), np.float32), bias=np.zeros(3, np.float32))

    def samples(logits: NDArray[np.float32]) -> Samples:
        return Samples(logits=logits, features=np.empty((len(logits), 0), np.float32), linear_logits=logits)

    score = fit_openmax(Training(samples=samples(train.read("logits")), label=train.label, linear=linear))
    logits = tested.read("logits")
    whole = score(samples(logits))
    assert len({*logits.argmax(axis=1).tolist()}) == 3
    for k in range(3):
        rows = logits.argmax(axis=1) == k
        np.testing.assert_allclose(score(samples(logits[rows])), whole[rows], rtol=1e-12)


def test_weibull_of_greatest_likelihood() -> None:
    """The likelihood falls on every side; equal values give a step; NaN fills up rows that have fewer values."""
    rng = np.random.RandomState(0)
    values = 10_000 + 8 * rng.weibull(2.0, (3, 25))
    values[1, 10:] = np.nan
    values[2] = 10_003.0
    shape, scale = fit_weibull(values)

    def log_likelihood(x: NDArray[np.float64], c: float, s: float) -> float:
        return float(np.sum(np.log(c / s) + (c - 1) * np.log(x / s) - (x / s) ** c))

    for row in (0, 1):
        x = values[row][np.isfinite(values[row])]
        best = log_likelihood(x, shape[row], scale[row])
        for c, s in ((1.001, 1), (0.999, 1), (1, 1 + 1e-6), (1, 1 - 1e-6), (1.01, 1 + 1e-6)):
            assert log_likelihood(x, c * shape[row], s * scale[row]) < best
    assert scale[2] == pytest.approx(10_003.0, rel=1e-12)
    assert np.exp(-((10_002.9 / scale[2]) ** shape[2])) == 1.0


@pytest.mark.repeats(4)
@pytest.mark.parametrize(
    "name",
    ["DICE", "fDBD", "Mahalanobis", "MDS++", "RMD", "RMDS++", "OpenMax", "Relation", "CFOOD", "WeiPer", "GradNorm"],
)
def test_no_array_of_samples_classes_and_features(name: str) -> None:
    """It would have 400 MB of float32 here: 200 images, 1,000 classes, 500 features."""
    classes, features = 1000, 500
    rng = np.random.RandomState(0)
    linear = Linear(weight=rng.normal(size=(classes, features)).astype(np.float32), bias=np.zeros(classes, np.float32))

    def samples(count: int) -> Samples:
        values = np.maximum(rng.normal(size=(count, features)), 0).astype(np.float32)
        return Samples(logits=linear(values), features=values, linear_logits=linear(values))

    training = Training(samples=samples(2000), label=np.arange(2000) % classes, linear=linear)
    tested = samples(200)
    tracemalloc.start()
    try:
        scores = BASELINES[name].fit(training)(tested)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.isfinite(scores).all()
    assert peak < 200e6


# --- what is learned from ---------------------------------------------------------------------------------------------


def test_at_most_so_many_images_are_learned_from(small_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "FIT_ROWS", 20)
    found = score_baselines(small_cache, ["NCI", "KL-Matching", "GEN"], ["ood/val"])
    assert {name: method.n_fitted for name, method in found.items()} == {"KL-Matching": 20, "GEN": 0, "NCI": 20}
    rows = np.linspace(0, 59, 20).round().astype(int)
    mean = small_cache["id/train"].read("features")[rows].mean(axis=0, dtype=np.float64)
    (weight, bias), outside = small_cache.classifier() or (None, None), small_cache["ood/val"].read("features")
    assert weight is not None
    centred = outside - mean
    chosen = weight[(outside @ weight.T + bias).argmax(axis=1)]
    expected = (centred * chosen).sum(axis=1) / np.linalg.norm(centred, axis=1)
    np.testing.assert_allclose(found["NCI"].scores["ood/val"], expected, rtol=1e-6)


def test_how_wide_vims_subspace_is() -> None:
    said = {2048: 1000, 1501: 1000, 1500: 512, 768: 512, 767: 383, 512: 256, 64: 32}
    assert {features: vim_dimension(features) for features in said} == said


# --- empty cells ------------------------------------------------------------------------------------------------------


def reasons(cache: Cache, *names: str) -> dict[str, set[str]]:
    found = score_baselines(cache, names, ["id/test", "ood/near/letters"])
    assert all(set(m.reasons) | set(m.scores) == {"id/test", "ood/near/letters"} for m in found.values())
    return {name: set(method.reasons.values()) for name, method in found.items()}


@pytest.mark.slow
def test_too_few_images(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """One image per class, as of ImageNet with 1,000 training images."""
    cache = make_cache(tmp_path / "c.zarr", rows={"id/train": 3})
    found = reasons(cache, "all")
    covariance = {"the covariance of 6 features in 3 classes needs 9 images; id/train has 3"}
    assert found["Mahalanobis"] == found["RMD"] == found["MDS++"] == found["RMDS++"] == covariance
    assert found["OpenMax"] == {"it needs 2 images of every class; id/train has a class with 1"}
    assert found["KNN"] == {"it needs 50 images; id/train has 3"}
    assert found["NNGuide"] == {"it needs 10 images; id/train has 3"}
    assert found["ReAct"] == found["Temperature"] == found["ViM"] == set()
    method = score_baselines(cache, ["KNN"], ["id/test"])["KNN"]
    assert (method.fitted_on, method.n_fitted, method.scores) == ("id/train", 0, {})
    cache = make_cache(tmp_path / "d.zarr", rows={"id/train": 2})
    assert reasons(cache, "SHE")["SHE"] == {"it needs an image of every class; id/train has a class with 0"}


def test_what_a_cache_lacks(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "f.zarr", identity={"outputs": "features"})
    assert set().union(*reasons(cache, "all").values()) == {"what this network gives are features, not logits"}
    cache = make_cache(tmp_path / "v.zarr", rows={"id/val": 0})
    assert reasons(cache, "Temperature", "Entropy") == {"Temperature": {"the cache has no id/val"}, "Entropy": set()}
    shutil.rmtree(tmp_path / "v.zarr/classifier")
    found = reasons(open_cache(tmp_path / "v.zarr"), "DICE", "GEN", "OpenMax")
    assert found == {"DICE": {"the cache holds no last linear layer"}, "GEN": set(), "OpenMax": set()}


def test_labels_that_cannot_be_learned_from(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """What learns from labels says so; what does not is there."""
    cache = make_cache(tmp_path / "c.zarr")
    classes = cache["id/train"].label

    def spoil(label: NDArray[np.int64]) -> NDArray[np.int64]:
        label[[1, 4, 9]] = (-1, 3, 1000)
        return label

    cache = relabel(cache, "id/train", spoil)
    found = reasons(cache, "all")
    wrong = {"3 of 60 labels of id/train are outside 0 … 2"}
    labelled = ("OpenMax", "Mahalanobis", "MDS++", "RMD", "RMDS++", "SHE")
    assert {name: found[name] for name in labelled} == dict.fromkeys(labelled, wrong)
    assert all(found[name] == set() for name in MORE_BASELINES if name not in labelled)
    cache = relabel(cache, "id/val", lambda label: np.where(label == 0, 7, label))
    assert reasons(cache, "Temperature")["Temperature"] == {"13 of 40 labels of id/val are outside 0 … 2"}
    cache = relabel(cache, "id/train", lambda _: (classes + 1) % 3)
    said = reasons(cache, "SHE")["SHE"].pop()
    assert said.startswith("id/train: no image of class ") and " is classified correctly (" in said


def test_a_temperature_that_is_none(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    predicted = cache["id/val"].read("logits").argmax(axis=1)
    cache = relabel(cache, "id/val", lambda _: predicted)
    assert reasons(cache, "Temperature")["Temperature"] == {
        "id/val: all images are classified correctly: the smaller the temperature the better, none is the best"
    }
    cache = relabel(cache, "id/val", lambda _: cache["id/val"].read("logits").argmin(axis=1))
    assert reasons(cache, "Temperature")["Temperature"] == {
        "id/val: logits tell nothing of the labels: the larger the temperature the better, none is the best"
    }


def test_scores_that_are_no_numbers(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """ASH divides by the features that it keeps: an image whose features are all 0 has no score."""
    cache = make_cache(tmp_path / "z.zarr")
    array = zarr.open_group(cache.path, mode="r+", use_consolidated=False)["ood/near/letters/features"]
    array[5] = 0.0  # type: ignore[index]
    CacheWriter(cache.path, cache.header).seal("ood/near/letters")
    method = score_baselines(open_cache(cache.path), ["ASH"], ["id/test", "ood/near/letters"])["ASH-S@65"]
    bad = int((np.asarray(array[:]).sum(axis=1) == 0).sum())  # type: ignore[index]
    assert method.reasons == {"ood/near/letters": f"{bad} of 35 scores of ood/near/letters are not finite"}
    assert list(method.scores) == ["id/test"]


# --- names and the command --------------------------------------------------------------------------------------------


def test_names() -> None:
    assert tuple(BASELINES) == MORE_BASELINES
    assert choose_baselines(["all"]) == list(MORE_BASELINES)
    assert choose_baselines(["vim", "KNN", "ViM", *LOGIT_BASELINES]) == ["ViM", "KNN"]
    assert choose_baselines(["ash", "SCALE", "scale@85"]) == ["ASH-S@65", "SCALE@65", "SCALE@85"]  # earlier names
    assert [find_baseline(name) for name in ("energy", "Ash", "mds++", "odin")] == ["Energy", "ASH-S@65", "MDS++", None]
    with pytest.raises(
        InputError, match=r"^baseline 'nosuch' is not known; known: all, MSP, MaxLogit, Energy, Temperat"
    ):
        choose_baselines(["KNN", "nosuch"])
    with pytest.raises(
        InputError, match=r"^baseline ODIN, Gram: it runs the network itself; a cache does not hold what it needs$"
    ):
        choose_baselines(["odin", "Gram"])
    assert choose_baselines(["odin", "MSP", "knn"]) == ["ODIN", "KNN"]


def test_a_method_that_runs_the_network_has_an_empty_row(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    write_params(tmp_path / "c.params.json", PARAMS)
    done = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "ODIN,Entropy", "--json"])
    assert (done.exit_code, done.stderr) == (0, "")
    rows = {row["method"]: row for row in json.loads(done.stdout)}
    reason = "it runs the network itself; a cache does not hold what it needs"
    assert [rows["ODIN"]["auroc"], rows["ODIN"]["reason"], rows["Entropy"]["reason"]] == [None, reason, ""]
    assert rows["Entropy"]["auroc"] > 0
    alone = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "ODIN"])
    assert (alone.exit_code, alone.stdout) == (1, "")


def test_the_command_shows_them_all(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"id/train": 45})
    write_params(tmp_path / "c.params.json", PARAMS)
    more = score_baselines(cache, ["all"], TABLE)
    expected = tabulate([score_cache(cache, PARAMS, more=more)])
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "all", "--json"])
    assert printed.exit_code == 0, printed.stderr
    rows = json.loads(printed.stdout)
    assert len({row["method"] for row in rows}) == 1 + 3 + 27
    for row, (_, known) in zip(rows, expected.iterrows(), strict=True):
        assert (row["method"], row["fitted_on"], row["n_fitted"], row["reason"]) == (
            known["method"], known["fitted_on"], known["n_fitted"], known["reason"],
        )  # fmt: skip
        assert row["auroc"] == (None if math.isnan(known["auroc"]) else pytest.approx(known["auroc"], abs=1e-6))
    table = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "knn,gen"]).stdout
    assert "\nfitted on id/train (45 images): NAC\n" in table
    assert "\nempty: KNN: it needs 50 images; id/train has 45\n" in table
    line = next(line for line in table.splitlines() if line.split()[:1] == ["KNN"])
    assert line.split() == ["KNN", "–", "–", "–", "–", "35"]
    against = CliRunner().invoke(main, ["evaluate", cache.path, "--against", "gen", "--resamples", "20", "--json"])
    assert {row["second"] for row in json.loads(against.stdout)} == {"GEN"}


@pytest.mark.slow
def test_without_torch_and_pytorch_ood(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """All of them, in a process where torch, pytorch-ood, scikit-learn and scipy cannot be imported."""
    cache = make_cache(tmp_path / "c.zarr")
    write_params(tmp_path / "c.params.json", PARAMS)
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "pytorch_ood", "sklearn", "scipy")))
from nacpipe.cli import main
main(["evaluate", sys.argv[1], "--baselines", "all", "--csv"], standalone_mode=False)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, cache.path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    methods = {line.split(",")[3] for line in done.stdout.splitlines()[1:]}
    assert methods == {"NAC", *LOGIT_BASELINES, *MORE_BASELINES}
    assert "ood,near,letters,GEN," in done.stdout
