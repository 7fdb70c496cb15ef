"""The grid's combinations once each, LayerwiseSampler in a study, and Optuna's samplers by name."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from nacpipe.cache import Cache
from nacpipe.errors import InputError, MissingExtra
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning import runner as sweep
from nacpipe.tuning import samplers
from nacpipe.tuning.request import SamplerName, SearchRequest
from nacpipe.tuning.samplers import GridSampler, LayerwiseSampler, TermwiseSampler, make_sampler
from nacpipe.tuning.space import Choice, Interval, LayerSpace, Space
from nacpipe.tuning.study import Search
from nacpipe.tuning.trials import attributes_of, layers_from, suggest
from nacpipe.tuning.validation import DIRECTIONS, ObjectiveName, ValidationMetrics
from tests.tuning.trials import ask, make_trial, objective_of

Trials = list[tuple[list[float], dict[str, Any], dict[str, Any]]]


def grid_space(*sizes: int) -> Space:
    """A layer per three sizes: of bins, saturation and alpha; weights in closed form."""
    layers = {}
    for number, (bins, saturation, alpha) in enumerate(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True)):
        layers[f"layer{number}"] = LayerSpace(
            bins=Choice(tuple(range(4, 4 + bins))),
            saturation=Choice(tuple(range(1, 1 + saturation))),
            alpha={"product": Choice(tuple(float(2**k) for k in range(alpha)))},
        )
    return layers


def grid_of(*sizes: int, seed: int = 1) -> GridSampler:
    return GridSampler(objective_of(grid_space(*sizes)), seed=seed)


def asked(grid: GridSampler, numbers: range) -> list[NacParams]:
    return [grid.params(number) for number in numbers]


# --- a grid -----------------------------------------------------------------------------------------------------------

SIZES = [
    *((1, 1, 1), (2, 1, 1), (7, 1, 1), (2, 2, 2), (3, 5, 7), (4, 4, 4)),
    *((2, 3, 2, 3, 4, 2), (2, 1, 3, 2, 3, 8)),  # 288, twice
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_every_combination_once(sizes: tuple[int, ...], seed: int) -> None:
    """Against the plain product."""
    layers = [
        [
            LayerParams(bins=bins, saturation=saturation, alpha=alpha)
            for bins in range(4, 4 + sizes[at])
            for saturation in range(1, 1 + sizes[at + 1])
            for alpha in (float(2**k) for k in range(sizes[at + 2]))
        ]
        for at in range(0, len(sizes), 3)
    ]
    everything = {tuple(enumerate(combination)) for combination in itertools.product(*layers)}
    grid = grid_of(*sizes, seed=seed)
    found = [tuple(enumerate(params.layers.values())) for params in asked(grid, range(len(everything)))]
    assert grid.size == len(everything) == len(found)
    assert set(found) == everything
    assert asked(grid_of(*sizes, seed=seed), range(len(everything))) == asked(grid, range(len(everything)))


@given(sizes=st.tuples(*[st.integers(1, 4)] * 6), seed=st.integers(0, 2**32))
def test_no_combination_twice(sizes: tuple[int, ...], seed: int) -> None:
    grid = grid_of(*sizes, seed=seed)
    found = {repr(params) for params in asked(grid, range(grid.size))}
    assert len(found) == grid.size


def test_the_order_depends_on_the_seed_alone() -> None:
    orders = {repr(asked(grid_of(2, 3, 2, 3, 4, 2, seed=seed), range(288))) for seed in range(8)}
    assert len(orders) == 8
    space = grid_space(2, 3, 2, 3, 4, 2)
    sampler = grid_of(2, 3, 2, 3, 4, 2)
    study = optuna.create_study(sampler=sampler)
    metrics = ValidationMetrics(val_auroc=0.5, val_fpr95=0.5, subtrain_auroc=None)
    study.add_trial(make_trial(sampler.params(0), metrics, "auroc", space, position=0))
    assert [candidate.params for candidate in ask(sampler, range(288))] == asked(sampler, range(288))


def test_a_grid_of_every_field() -> None:
    layer = LayerSpace(
        bins=Choice((50,)),
        saturation=Choice((5,)),
        alpha={"product": Choice((1.0,)), "gradient": Choice((1.0,))},
        source=Choice(("product", "gradient")),
        edges=Choice(("log", "linear")),
        weight=Choice((1.0, 2.0, 0.5)),
    )
    grid = GridSampler(objective_of({"layer1": layer}), seed=3)
    found = {(p.source, p.edges, p.weight) for p in (params.layers["layer1"] for params in asked(grid, range(12)))}
    assert grid.size == 12
    assert found == set(itertools.product(("product", "gradient"), ("log", "linear"), (1.0, 2.0, 0.5)))


def test_a_grid_of_more_combinations_than_a_machine_word_counts() -> None:
    grid = grid_of(2000, 2000, 900, 2000, 2000, 900)
    assert grid.size == (2000 * 2000 * 900) ** 2 > 2**63
    assert len({repr(params) for params in asked(grid, range(100))}) == 100


@pytest.mark.parametrize("field", ["bins", "saturation", "alpha", "weight"])
def test_a_grid_refuses_a_range(field: str) -> None:
    fields: dict[str, Any] = {"bins": Choice((4,)), "saturation": Choice((1,)), "alpha": {"product": Choice((1.0,))}}
    ranges = {"alpha": {"product": Interval(1, 2)}, "weight": Interval(0, 1, log=False)}
    layer = LayerSpace(**{**fields, field: ranges.get(field, Interval(4, 8, whole=True))})
    message = (
        rf"^a grid needs values, and layer1\.{field} is a range; list its values in a --space FILE, or take another"
        r" --sampler$"
    )
    with pytest.raises(InputError, match=message):
        make_sampler("grid", objective_of({"layer0": grid_space(1, 1, 1)["layer0"], "layer1": layer}), 1, 0)


@pytest.mark.parametrize("weight", ["[0, 1]", "[1, 0, 2]", "{ low = 0, high = 1 }"])
def test_no_combination_without_any_weight(small_cache: Cache, tmp_path: Path, weight: str) -> None:
    """Weights of 0 in every layer at once are no detector: refused before the study is made."""
    text = f"[default]\nbins = 20\nsaturation = 5\nalpha = 0.5\nweight = {weight}"
    for sampler in ("grid", "tpe") if weight[0] == "[" else ("cmaes",):
        with pytest.raises(InputError, match="weight"):
            Search(request(small_cache, tmp_path, sampler, space=text))  # type: ignore[arg-type]
    assert not (tmp_path / "s.log").exists()


def test_weights_are_recorded_whatever_their_order(small_cache: Cache, tmp_path: Path) -> None:
    text = "[default]\nbins = 20\nsaturation = 5\nalpha = 0.5\nweight = [5.0, 3, 0.5]"
    search = Search(request(small_cache, tmp_path, "grid", space=text, trials=None))
    sweep.run(search)
    found = {(t.params["avgpool.weight"], t.params["layer1.weight"]) for t in search.completed()}
    kept = {tuple(t.user_attrs["weights"][name] for name in ("avgpool", "layer1")) for t in search.completed()}
    assert kept == found
    assert found == set(itertools.product((5.0, 3.0, 0.5), repeat=2))


# --- Optuna's samplers ------------------------------------------------------------------------------------------------

OPTUNAS = ("tpe", "random", "nsga2", "cmaes")
SPACES = {
    "auto": "[default]",
    "sources": '[default]\nsource = ["product", "activation", "gradient"]\nedges = ["log", "linear"]',
    "weights": "[default]\nbins = [10, 20, 50]\nsaturation = { low = 2, high = 9 }\nweight = { low = 0.5, high = 2 }",
}
TRIALS = 20  # past the random start of tpe (10) and of cmaes (1); nsga2's (50, a generation) is shortened below


def request(
    cache: Cache,
    folder: Path,
    sampler: SamplerName,
    *,
    space: str = "[default]",
    trials: int | None = TRIALS,
    **more: Any,
) -> SearchRequest:
    path = folder / "space.toml"
    path.write_text(space)
    rest: dict[str, Any] = {"cache": Path(cache.path), "storage": str(folder / "s.log"), "space": str(path), **more}
    return SearchRequest(sampler=sampler, trials=trials, **rest)


@pytest.fixture
def short_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda seed: samplers.optuna.samplers.NSGAIISampler(seed=seed, population_size=6)  # noqa: E731
    monkeypatch.setattr(samplers, "_OPTUNA", {**samplers._OPTUNA, "nsga2": make})


def run(request: SearchRequest) -> Search:
    search = Search(request)
    sweep.run(search)
    return search


def trials_of(search: Search) -> Trials:
    """Everything of a trial but its clock."""
    return [
        (t.values or [], dict(t.params), {k: v for k, v in t.user_attrs.items() if k != "seconds"})
        for t in search.completed()
    ]


def inside(params: NacParams, space: Space) -> bool:
    for name, layer in params.layers.items():
        for field in ("bins", "saturation", "alpha", "source", "edges", "weight"):
            value, dimension = getattr(layer, field), space[name].dimension(field, layer.source)
            if isinstance(dimension, Choice) and value not in dimension.values:
                return False
            if isinstance(dimension, Interval) and not dimension.low <= value <= dimension.high:
                return False
    return True


@pytest.mark.repeats(2)
@pytest.mark.usefixtures("short_generations")
@pytest.mark.parametrize(
    ("sampler", "objective", "space"),
    [
        *(("tpe", "pareto", "weights"), ("random", "fpr95", "auto"), ("nsga2", "auroc", "sources")),
        ("cmaes", "auroc", "auto"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                *(("tpe", "auroc", "sources"), ("nsga2", "pareto", "weights")),
                *(("cmaes", "fpr95", "sources"), ("cmaes", "auroc", "weights")),
            )
        ),
    ],
)
def test_a_study_that_goes_on_has_the_trials_asked_for_and_repeats_none(
    small_cache: Cache, tmp_path: Path, sampler: SamplerName, objective: ObjectiveName, space: str
) -> None:
    """Optuna's samplers begin anew, with random numbers that the study has not had."""

    def search(folder: str, **more: Any) -> Search:
        (tmp_path / folder).mkdir(exist_ok=True)
        return run(request(small_cache, tmp_path / folder, sampler, space=SPACES[space], objective=objective, **more))

    expected = trials_of(whole := search("whole"))
    assert len(expected) == TRIALS
    different = len({repr(params) for _, params, _ in expected})
    assert different > TRIALS / 2  # a cross of two may be one of them
    assert trials_of(search("again")) == expected
    stopped = search("stopped", trials=1)
    assert trials_of(stopped) == expected[:1]
    for trials in (7, 13, TRIALS):
        before = trials_of(Search(stopped.request))
        found = trials_of(stopped := search("stopped", trials=trials))
        assert (len(found), found[: len(before)]) == (trials, before)
    assert len({repr(params) for _, params, _ in found}) >= (TRIALS / 2 if sampler == "nsga2" else TRIALS)
    assert trials_of(search("whole", seed=2)) != expected

    for trial in [*whole.completed(), *stopped.completed()]:
        assert inside(whole.objective.params(trial), whole.objective.space)
        assert "phase" not in trial.user_attrs and "position" not in trial.user_attrs
    weights = [attributes["weights"] for _, _, attributes in expected]
    if space == "weights":
        assert weights == [{n: params[f"{n}.weight"] for n in ("avgpool", "layer1")} for _, params, _ in expected]
        assert len({repr(shares) for shares in weights}) > 5
    else:
        assert [sum(shares.values()) for shares in weights] == pytest.approx([1] * TRIALS)
    if space == "sources":
        assert {params["layer1.source"] for _, params, _ in expected} == {"product", "activation", "gradient"}


@pytest.mark.usefixtures("short_generations")
@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_two_objectives(small_cache: Cache, tmp_path: Path, sampler: SamplerName) -> None:
    search = run(request(small_cache, tmp_path, sampler, objective="pareto", trials=15))
    assert search.study is not None
    assert [d.name.lower() for d in search.study.directions] == DIRECTIONS["pareto"] == ["maximize", "minimize"]
    for trial in search.completed():
        assert trial.values == [trial.user_attrs["val_auroc"], trial.user_attrs["val_fpr95"]]
        checks = search.objective.measure(search.objective.params(trial))
        assert trial.values == [checks.val_auroc, checks.val_fpr95]


def test_cmaes_has_one_objective(small_cache: Cache, tmp_path: Path) -> None:
    message = r"^cmaes has one objective; search for auroc, fpr95 or guided, or take --sampler nsga2 or tpe$"
    with pytest.raises(InputError, match=message):
        Search(request(small_cache, tmp_path, "cmaes", objective="pareto"))
    assert not (tmp_path / "s.log").exists()


def test_cmaes_is_an_extra(small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(MissingExtra, match=r"^this needs cmaes; install it with: pip install 'nacpipe\[cmaes\]'$"):
        Search(request(small_cache, tmp_path, "cmaes"))
    assert not (tmp_path / "s.log").exists()


def test_a_weight_to_be_searched_is_not_for_the_default() -> None:
    fixed = grid_space(1, 1, 1)["layer0"]
    for weight in (Interval(0.5, 1, log=False), Choice((1.0, 2.0))):
        layer = LayerSpace(bins=fixed.bins, saturation=fixed.saturation, alpha=fixed.alpha, weight=weight)
        message = r"^layer 'layer1': a weight to be searched needs another sampler, such as --sampler tpe; by default"
        with pytest.raises(InputError, match=message):
            make_sampler("layers", objective_of({"layer1": layer}), 1, 0)


def test_every_name_makes_its_sampler() -> None:
    kinds = {name: type(make_sampler(name, objective_of(grid_space(2, 2, 2)), 1, 0)) for name in get_args(SamplerName)}
    assert kinds == {
        "terms": TermwiseSampler,
        "layers": LayerwiseSampler,
        "grid": GridSampler,
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
        "cmaes": optuna.samplers.CmaEsSampler,
    }


# --- ours, in a study -------------------------------------------------------------------------------------------------


def score(params: NacParams) -> ValidationMetrics:
    """A made-up value that depends on every parameter."""
    total = sum(layer.weight * (layer.bins * 7 + layer.saturation * 3) / 1000 for layer in params.layers.values())
    return ValidationMetrics(val_auroc=total, val_fpr95=0.5, subtrain_auroc=None)


def objective_with_values(space: Space) -> Any:
    """An objective whose `__call__` is `score`; weights that nobody gives are equal."""
    objective: Any = objective_of(space)

    def call(trial: optuna.Trial) -> float:
        layers = layers_from(suggest(trial, objective.distributions), space)
        shares = attributes_of(trial).get("weights") or {name: 1 / len(layers) for name in layers}
        params = NacParams(layers={name: replace(layer, weight=shares[name]) for name, layer in layers.items()})
        metrics = score(params)
        for key, value in {"weights": shares, **metrics.to_attributes()}.items():
            trial.set_user_attr(key, value)
        return metrics.val_auroc

    objective.call = call
    return objective


RANGES: Space = {
    name: LayerSpace(
        bins=Interval(4, 400, whole=True), saturation=Interval(1, 50, whole=True), alpha={"product": Interval(0.1, 10)}
    )
    for name in ("layer0", "layer1")
}


def attempts(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(t.params, t.value, t.user_attrs) for t in study.get_trials(states=(TrialState.COMPLETE,))]


def test_a_sampler_is_one_studys_at_a_time() -> None:
    objective = objective_with_values(RANGES)
    sampler = LayerwiseSampler(objective, seed=3)
    first, second = (optuna.create_study(direction="maximize", sampler=sampler) for _ in range(2))
    first.optimize(objective.call, n_trials=60)
    second.optimize(objective.call, n_trials=60)
    assert attempts(first) == attempts(second)
    other = optuna.create_study(direction="maximize", sampler=LayerwiseSampler(objective, seed=4))
    other.optimize(objective.call, n_trials=60)
    assert attempts(other) != attempts(first)


@pytest.mark.parametrize("stop", [0, 1, 23, 30, 59, 71])
@pytest.mark.repeats(2)
def test_another_process_goes_on_trial_for_trial(stop: int) -> None:
    """A new sampler learns from the study's trials what the first one knew."""
    objective = objective_with_values(RANGES)
    whole = optuna.create_study(direction="maximize", sampler=LayerwiseSampler(objective, seed=3))
    whole.optimize(objective.call, n_trials=80)
    study = optuna.create_study(direction="maximize", sampler=LayerwiseSampler(objective, seed=3))
    study.add_trials(whole.trials[:stop])
    study.optimize(objective.call, n_trials=80 - stop)
    assert attempts(study) == attempts(whole)


@pytest.mark.parametrize("kind", [LayerwiseSampler, GridSampler])
def test_a_space_of_single_values_has_positions_and_weights_too(kind: Any) -> None:
    """Optuna asks a sampler for nothing then."""
    objective = objective_with_values(grid_space(1, 1, 1, 1, 1, 1))
    study = optuna.create_study(direction="maximize", sampler=kind(objective, seed=1))
    study.optimize(objective.call, n_trials=30)  # the grid is complete after one
    if kind is GridSampler:
        assert [t.user_attrs["position"] for t in study.trials] == [0]
    else:
        shares = [list(t.user_attrs["weights"].values()) for t in study.trials]
        assert shares[:24] == [[1.0, 0.0]] * 24 and shares[24:] == [[0.0, 1.0]] * 6


def test_a_grid_ends_when_it_is_complete_whatever_failed() -> None:
    """Numbers of failed trials, and of those that a person enqueued, are made up for at the end."""
    objective = objective_with_values(grid_space(2, 3, 2))
    sampler = GridSampler(objective, seed=1)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({"layer0.bins": 4, "layer0.saturation": 1, "layer0.alpha": 1.0})

    def call(trial: optuna.Trial) -> float:
        value = float(objective.call(trial))
        return float("nan") if trial.number in (2, 3, 13) else value

    study.optimize(call, n_trials=100)
    completed = study.get_trials(states=(TrialState.COMPLETE,))
    positions = [t.user_attrs["position"] for t in completed if "position" in t.user_attrs]
    assert sorted(positions) == list(range(12))
    assert len(study.trials) == 12 + 3 + 1
    for trial in completed[1:]:
        assert objective.params(trial).layers["layer0"] == replace(
            sampler.params(trial.user_attrs["position"]).layers["layer0"], weight=1.0
        )


@pytest.mark.parametrize("kind", [LayerwiseSampler, GridSampler])
@pytest.mark.parametrize("left", ["nothing", "some parameters", "all parameters"])
def test_a_repeated_trial_keeps_its_position(kind: Any, left: str) -> None:
    """As Optuna's RetryHeartbeatStaleTrialCallback enqueues it: with another number and what the first one had."""
    space = RANGES if kind is LayerwiseSampler else grid_space(5, 5, 3, 5, 5, 3)
    objective = objective_with_values(space)
    whole = optuna.create_study(direction="maximize", sampler=kind(objective, seed=1))
    whole.optimize(objective.call, n_trials=12)
    study = optuna.create_study(direction="maximize", sampler=kind(objective, seed=1))
    study.add_trials(whole.trials[:10])
    stale = whole.trials[10]
    names = {"nothing": [], "some parameters": list(stale.params)[:2], "all parameters": list(stale.params)}[left]
    held = (
        {} if left == "nothing" else {"user_attrs": {k: stale.user_attrs[k] for k in ("position", "phase", "weights")}}
    )
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))  # number 10
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            params={name: stale.params[name] for name in names},
            distributions={name: stale.distributions[name] for name in names},
            system_attrs={"failed_trial": 10, "retry_history": [10]},
            user_attrs=held,
        )
    )
    study.optimize(objective.call, n_trials=2)
    assert study.trials[11].user_attrs["position"] == 10
    assert (study.trials[11].params, study.trials[11].value) == (stale.params, stale.value)
    assert study.trials[12].user_attrs["position"] == 12
