"""Baselines that pytorch-ood does not have, or has otherwise, against restatements of OpenOOD's or the authors' code.

Each restatement works image by image, in torch or scikit-learn, in float64, and is given the same draws.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.covariance import EmpiricalCovariance

from nacpipe.cache import Cache
from nacpipe.evaluation.baselines import BASELINES, score_baselines
from nacpipe.evaluation.posthoc import neighbourhoods, weiper
from nacpipe.evaluation.posthoc.detector import Linear, Samples, Training
from nacpipe.evaluation.posthoc.distances import vim_dimension
from nacpipe.method.metrics import detect

Floats = NDArray[np.float64]


def made_up(classes: int, features: int, images: int) -> tuple[Training, Samples]:
    """A training set of every class with mistakes in it, and 60 images of which half belong to no class."""
    rng = np.random.RandomState(classes)
    centres = np.maximum(rng.normal(0, 1, (classes, features)), 0)
    bias = rng.normal(0, 0.1, classes) - (centres**2).sum(axis=1) / 2
    linear = Linear(weight=centres.astype(np.float32), bias=bias.astype(np.float32))
    label = np.arange(images) % classes

    def samples(middle: Floats, spread: float) -> Samples:
        values = np.maximum(middle + spread * rng.normal(size=middle.shape), 0).astype(np.float32)
        return Samples(logits=linear(values), features=values, linear_logits=linear(values))

    train = samples(centres[label], 0.2)
    label[:: 3 * classes + 1] = (label[:: 3 * classes + 1] + 1) % classes
    tested = samples(np.concatenate([centres[np.arange(30) % classes], np.full((30, features), 0.4)]), 0.4)
    return Training(samples=train, label=label, linear=linear), tested


def double(values: NDArray[np.floating]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float64))


def layer(linear: Linear) -> torch.nn.Linear:
    made = torch.nn.Linear(linear.weight.shape[1], linear.weight.shape[0], dtype=torch.float64)
    made.load_state_dict({"weight": double(linear.weight), "bias": double(linear.bias)})
    return made


def free_energy(linear: Linear, features: torch.Tensor) -> Floats:
    return np.asarray(torch.logsumexp(layer(linear)(features), dim=1).detach())


def gradnorm(training: Training, tested: Samples) -> Floats:
    """OpenOOD: one backward pass per image, targets all 1."""
    fc, scores = layer(training.linear), []
    for z in double(tested.features):
        fc.zero_grad()
        torch.mean(torch.sum(-torch.nn.functional.log_softmax(fc(z[None]), dim=-1), dim=-1)).backward()
        assert fc.weight.grad is not None
        scores.append(fc.weight.grad.abs().sum().item())
    return np.array(scores)


def residual(training: Training, tested: Samples) -> Floats:
    """OpenOOD: the null space of the covariance around −W⁺ b, with ViM's dimension in place of 512."""
    weight, bias = training.linear.weight.astype(np.float64), training.linear.bias.astype(np.float64)
    origin = -np.linalg.pinv(weight, rcond=1e-6) @ bias
    found = EmpiricalCovariance(assume_centered=True).fit(training.samples.features - origin)
    values, vectors = np.linalg.eigh(found.covariance_)
    null_space = vectors[:, np.argsort(-values)[vim_dimension(weight.shape[1]) :]]
    return -np.linalg.norm((tested.features - origin) @ null_space, axis=-1)


def mahalanobis(training: Training, tested: Samples, *, relative: bool) -> Floats:
    """The authors' `evaluate_Mahalanobis_norm` and `evaluate_Relative_Mahalanobis_norm`."""
    train = training.samples.features.astype(np.float64)
    train /= np.linalg.norm(train, axis=-1, keepdims=True)
    values = tested.features.astype(np.float64)
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    means = np.array([train[training.label == k].mean(axis=0) for k in range(len(training.linear.bias))])
    precision = EmpiricalCovariance(assume_centered=True).fit(train - means[training.label]).precision_
    scores = -np.array([(((v - means) @ precision) * (v - means)).sum(axis=-1).min() for v in values])
    if relative:
        mean = train.mean(axis=0)
        whole = EmpiricalCovariance(assume_centered=True).fit(train - mean).precision_
        scores += np.array([(v - mean) @ whole @ (v - mean) for v in values])
    return scores


def relation(training: Training, tested: Samples) -> Floats:
    """OpenOOD's `get_relation` with pow 1 and threshold 0.03."""

    def parts(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        z = double(samples.features)
        return z / torch.sqrt((z**2).sum(-1, keepdim=True) + 1e-10), torch.softmax(double(samples.linear_logits), 1)

    (bank, bank_p), (z, p) = parts(training.samples), parts(tested)
    edges = torch.clamp(z @ bank.T, min=0.0) * (p @ bank_p.T)
    return np.asarray(((edges.abs() > 0.03) * edges).sum(-1))


def vra(training: Training, tested: Samples) -> Floats:
    """OpenOOD: percentiles 10 and 90 of all features of all images together."""
    low, high = (np.percentile(training.samples.features.flatten(), p) for p in (10, 90))
    return free_energy(training.linear, double(tested.features).clip(min=low, max=high))


def cfood(training: Training, tested: Samples) -> Floats:
    """OpenOOD's class, with all images where it takes a tenth; k = 0.01."""
    bank, values = (z / (torch.norm(z, dim=1, keepdim=True) + 1e-10)
                    for z in (double(training.samples.features), double(tested.features)))  # fmt: skip
    if len(bank) > neighbourhoods.CFOOD_IMAGES:
        bank = bank[np.random.RandomState(1).permutation(len(bank))[: neighbourhoods.CFOOD_IMAGES]]
    n = len(bank)
    kval = np.concatenate((np.linspace(0.001, 0.1, 100), np.linspace(0.105, 0.5, 81), np.linspace(0.51, 0.99, 49)))
    kpos = np.array(kval * n - 1, dtype=int)
    keep = np.concatenate(([True], kpos[:-1] < kpos[1:]))
    kval, kpos = kval[keep], kpos[keep]
    reach = torch.stack([torch.sort(torch.sum((row - bank) ** 2, dim=1)).values[kpos + 1] for row in bank])
    scores = []
    for value in values:
        distance = torch.sum((value - bank) ** 2, dim=1)
        share = (reach >= distance.view(n, 1)).sum(dim=0).float() / float(n)
        enough = torch.nonzero(share >= 0.01)
        scores.append(-kval[enough[0, 0]] if enough.numel() else -1.0)
    return np.array(scores)


def ash_b(training: Training, tested: Samples) -> Floats:
    """OpenOOD's `ash_b` at 90."""
    x = double(tested.features)
    k = x.shape[1] - int(np.round(x.shape[1] * 90 / 100.0))
    total = x.sum(dim=1)
    values, places = torch.topk(x, k, dim=1)
    x.zero_().scatter_(dim=1, index=places, src=(total / k).unsqueeze(1).expand(values.shape))
    return free_energy(training.linear, x)


def scale(training: Training, tested: Samples, percentile: int) -> Floats:
    """OpenOOD's `scale`."""
    x = double(tested.features)
    k = x.shape[1] - int(np.round(x.shape[1] * percentile / 100.0))
    ratio = x.sum(dim=1) / torch.topk(x, k, dim=1).values.sum(dim=1)
    return free_energy(training.linear, x * torch.exp(ratio[:, None]))


def ash_s(training: Training, tested: Samples) -> Floats:
    """OpenOOD's `ash_s` at 65."""
    x = double(tested.features)
    k = x.shape[1] - int(np.round(x.shape[1] * 65 / 100.0))
    total = x.sum(dim=1)
    values, places = torch.topk(x, k, dim=1)
    x.zero_().scatter_(dim=1, index=places, src=values)
    return free_energy(training.linear, x * torch.exp((total / x.sum(dim=1))[:, None]))


def weiper_kld(training: Training, tested: Samples) -> Floats:
    """The authors' `calculate_WeiPerKLDiv_score`, image by image, with histograms by numpy and torch's convolution."""
    weight = training.linear.weight.astype(np.float64)
    copies = min(100, 10_000 // len(weight))
    noise = np.random.RandomState(1).standard_normal((copies, *weight.shape))
    heads = []
    for one in noise:
        one /= np.linalg.norm(one, axis=1, keepdims=True)
        heads.append(weight + 1.8 * one * np.linalg.norm(weight, axis=1)[:, None])

    def perturbed(values: NDArray[np.float32]) -> Floats:
        return np.concatenate([values.astype(np.float64) @ head.T + training.linear.bias for head in heads], axis=1)

    def densities(values: Floats, edges: Floats) -> Floats:
        return np.stack([np.histogram(row, edges)[0] / len(row) for row in values])

    def divergence(p: Floats, q: Floats, width: int, floor: float) -> float:
        kernel = torch.nn.Conv1d(1, 1, width, padding="same", padding_mode="replicate", bias=False, dtype=torch.float64)
        kernel.weight.data.fill_(1 / width)
        with torch.no_grad():
            q = kernel(torch.from_numpy(q)[None, None])[0, 0].numpy() + floor
        p, q = (p + floor) / (p + floor).sum(), q / q.sum()
        return float((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())

    train = (training.samples.features.astype(np.float64), perturbed(training.samples.features))
    values = (tested.features.astype(np.float64), perturbed(tested.features))
    edges = [np.linspace(found.min(), found.max() + 1e-8, 101) for found in train]
    means = [densities(found, edge).mean(axis=0) for found, edge in zip(train, edges, strict=True)]
    inside = [densities(found, edge) for found, edge in zip(values, edges, strict=True)]
    p = torch.softmax(torch.from_numpy(values[1]).reshape(len(values[1]), copies, -1), dim=-1).max(dim=-1)[0].mean(-1)
    first = np.array([divergence(means[0], q, 4, 0.01) for q in inside[0]])
    second = np.array([divergence(means[1], q, 15, 0.025) for q in inside[1]])
    return np.asarray(-(first + 2.5 * second - 0.1 * p.numpy()))


RESTATED: dict[str, Callable[[Training, Samples], Floats]] = {
    "GradNorm": gradnorm,
    "Residual": residual,
    "MDS++": lambda training, tested: mahalanobis(training, tested, relative=False),
    "RMDS++": lambda training, tested: mahalanobis(training, tested, relative=True),
    "Relation": relation,
    "VRA": vra,
    "CFOOD": cfood,
    "ASH-S@65": ash_s,
    "ASH-B@90": ash_b,
    "SCALE@65": lambda training, tested: scale(training, tested, 65),
    "SCALE@85": lambda training, tested: scale(training, tested, 85),
    "WeiPer": weiper_kld,
}
ROUNDING = {  # in standard deviations of the scores
    "CFOOD": 0.0,
    "WeiPer": 1e-3,  # a value within rounding of a bin's edge may be in its other bin
}


@pytest.mark.parametrize(
    ("classes", "features", "images"),
    [(12, 30, 200), (40, 16, 400), (150, 70, 600), (3, 90, 230)],
    ids=["few classes", "classes than features", "many classes", "features than classes"],
)
@pytest.mark.parametrize("name", RESTATED)
def test_scores_are_those_of_a_plain_restatement(name: str, classes: int, features: int, images: int) -> None:
    training, tested = made_up(classes, features, images)
    expected = RESTATED[name](training, tested)
    found = BASELINES[name].fit(training)(tested)
    assert (found.dtype, found.shape) == (np.float64, (60,))
    assert len(np.unique(expected)) >= (3 if name == "CFOOD" else 21)  # CFOOD's are values of a grid
    assert np.abs(found - expected).max() <= ROUNDING.get(name, 4e-6) * expected.std()


@pytest.mark.parametrize("most", [100, 150, 199])
def test_cfood_draws_where_there_are_many_images(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """RandomState(1)'s permutation, the first so many of it: 1 % of 150 is 1.5, so two images must reach."""
    monkeypatch.setattr(neighbourhoods, "CFOOD_IMAGES", most)
    training, tested = made_up(12, 30, 200)
    np.testing.assert_array_equal(BASELINES["CFOOD"].fit(training)(tested), cfood(training, tested))


def test_cfood_of_the_smallest_cache() -> None:
    """Two images: each reaches as far as the other one."""
    training, tested = made_up(2, 5, 2)
    found = BASELINES["CFOOD"].fit(training)(tested)
    assert set(found) <= {-0.001, -1.0}
    np.testing.assert_array_equal(found, cfood(training, tested))


@pytest.mark.parametrize(("classes", "copies"), [(10, 100), (100, 100), (1000, 10), (20_000, 1)])
def test_weipers_perturbed_layer(classes: int, copies: int) -> None:
    """Every row is 1.8 times its length away from its weight; at most 10,000 rows, or one copy; the same every time."""
    rng = np.random.RandomState(0)
    weight, bias = rng.normal(size=(classes, 8)).astype(np.float32), rng.normal(size=classes).astype(np.float32)
    linear = Linear(weight=weight, bias=bias)
    perturbed, biases = weiper.perturb(linear)
    rows = perturbed.reshape(copies, classes, 8)
    lengths = np.linalg.norm(weight.astype(np.float64), axis=1)
    distances = np.linalg.norm(rows - weight, axis=2)
    np.testing.assert_allclose(distances, np.broadcast_to(1.8 * lengths, distances.shape), rtol=1e-12)
    np.testing.assert_array_equal(biases, np.tile(bias, copies))
    np.testing.assert_array_equal(perturbed, weiper.perturb(linear)[0])


def test_weiper_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    training, tested = made_up(12, 30, 200)
    whole = BASELINES["WeiPer"].fit(training)(tested)
    monkeypatch.setattr(weiper, "PIECE", 1)
    np.testing.assert_allclose(BASELINES["WeiPer"].fit(training)(tested), whole, rtol=1e-3, atol=1e-4)


def test_what_counts_as_a_value_of_a_bin() -> None:
    """The lowest training value is in the first bin, the highest in the last, what lies outside in none."""
    found = weiper.count_values(np.array([[0.0, 1.0, 0.005, -0.1, 1.1], [0.5, 0.5, 0.5, 0.5, 0.5]]), 0.0, 1.0)
    assert (found[0, 0], found[0, -1], found[0].sum()) == (0.4, 0.2, 0.6000000000000001)
    assert found[1, 49] == 1.0  # 0.5 is below the edge at 50 · (1 + 10⁻⁸) / 100


def test_dead_features_count_nothing_in_mds_plus() -> None:
    """A feature that is 0 in every training image: no direction of the covariance, as in the authors' code."""
    training, tested = made_up(12, 30, 200)
    training.samples.features[:, 7] = 0.0
    for name, relative in (("MDS++", False), ("RMDS++", True)):
        expected = mahalanobis(training, tested, relative=relative)
        found = BASELINES[name].fit(training)(tested)
        assert np.abs(found - expected).max() <= 4e-6 * expected.std()


def test_new_baselines_find_ood_images_of_a_cache(small_cache: Cache) -> None:
    """All but Residual, whose principal half holds what tells these OOD sets from ID."""
    found = score_baselines(small_cache, RESTATED, ["id/test", "ood/far/textures"])
    values = {n: detect(m.scores["id/test"], m.scores["ood/far/textures"]).auroc for n, m in found.items()}
    assert {name: value for name, value in values.items() if value <= 0.5} == {}
    assert (found["VRA"].fitted_on, found["VRA"].n_fitted) == ("id/val", 40)
    assert {found[name].fitted_on for name in ("GradNorm", "ASH-B@90", "SCALE@85")} == {""}
