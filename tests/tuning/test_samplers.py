"""Every combination once, and Optuna's samplers: the same trials from the same seed, however often interrupted."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacpipe.tuning.strategy import Strategy

from nacpipe.cache import Cache
from nacpipe.errors import InputError, MissingExtra
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning import runner as sweep
from nacpipe.tuning import samplers
from nacpipe.tuning.objective import DIRECTIONS, Objective, ValidationMetrics
from nacpipe.tuning.request import Sampler, SearchRequest
from nacpipe.tuning.samplers import Grid, OptunaSampler, make_asker
from nacpipe.tuning.space import Choice, Interval, LayerSpace, Space
from nacpipe.tuning.study import Search

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


def asked(asker: Grid | OptunaSampler | Strategy, numbers: range) -> list[NacParams]:
    return [asker.ask(number).params for number in numbers]


# --- a grid -----------------------------------------------------------------------------------------------------------

SIZES = [
    *((1, 1, 1), (2, 1, 1), (7, 1, 1), (2, 2, 2), (3, 5, 7), (4, 4, 4)),
    *((2, 3, 2, 3, 4, 2), (2, 1, 3, 2, 3, 8)),  # 288, twice
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_every_combination_once(sizes: tuple[int, ...], seed: int) -> None:
    """Against the plain product."""
    space = grid_space(*sizes)
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
    grid = Grid(space, seed)
    found = [tuple(enumerate(params.layers.values())) for params in asked(grid, range(len(everything)))]
    assert grid.size == len(everything) == len(found)
    assert set(found) == everything
    assert asked(Grid(space, seed), range(len(everything))) == asked(grid, range(len(everything)))


@given(sizes=st.tuples(*[st.integers(1, 4)] * 6), seed=st.integers(0, 2**32))
def test_no_combination_twice(sizes: tuple[int, ...], seed: int) -> None:
    grid = Grid(grid_space(*sizes), seed)
    assert grid.size is not None
    found = {repr(params) for params in asked(grid, range(grid.size))}
    assert len(found) == grid.size


def test_the_order_depends_on_the_seed_alone() -> None:
    space = grid_space(2, 3, 2, 3, 4, 2)
    orders = {repr(asked(Grid(space, seed), range(288))) for seed in range(8)}
    assert len(orders) == 8
    told = Grid(space, 1)
    told.tell(0, told.ask(0).params, ValidationMetrics(val_auroc=0.5, val_fpr95=0.5, subtrain_auroc=None))
    assert asked(told, range(288)) == asked(Grid(space, 1), range(288))


def test_a_grid_of_every_field() -> None:
    layer = LayerSpace(
        bins=Choice((50,)),
        saturation=Choice((5,)),
        alpha={"product": Choice((1.0,)), "gradient": Choice((1.0,))},
        source=Choice(("product", "gradient")),
        edges=Choice(("log", "linear")),
        weight=Choice((1.0, 2.0, 0.5)),
    )
    grid = Grid({"layer1": layer}, seed=3)
    proposals = [grid.ask(number) for number in range(12)]
    found = {(p.source, p.edges, p.weight) for p in (proposal.params.layers["layer1"] for proposal in proposals)}
    assert grid.size == 12
    assert found == set(itertools.product(("product", "gradient"), ("log", "linear"), (1.0, 2.0, 0.5)))
    assert not any(proposal.fit for proposal in proposals)
    assert Grid(grid_space(2, 1, 1), 1).ask(0).fit


def test_a_grid_of_more_combinations_than_a_machine_word_counts() -> None:
    grid = Grid(grid_space(2000, 2000, 900, 2000, 2000, 900), seed=1)
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
        make_asker("grid", {"layer0": grid_space(1, 1, 1)["layer0"], "layer1": layer}, 1, "auroc")


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
    cache: Cache, folder: Path, sampler: Sampler, *, space: str = "[default]", trials: int | None = TRIALS, **more: Any
) -> SearchRequest:
    path = folder / "space.toml"
    path.write_text(space)
    rest: dict[str, Any] = {"cache": Path(cache.path), "storage": str(folder / "s.log"), "space": str(path), **more}
    return SearchRequest(sampler=sampler, trials=trials, **rest)


@pytest.fixture
def short_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda seed: samplers.optuna.samplers.NSGAIISampler(seed=seed, population_size=6)  # noqa: E731
    monkeypatch.setattr(samplers, "_SAMPLERS", {**samplers._SAMPLERS, "nsga2": make})


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


@pytest.mark.usefixtures("short_generations")
@pytest.mark.parametrize(
    ("sampler", "objective", "space"),
    [
        *(("tpe", "auroc", "sources"), ("tpe", "pareto", "weights"), ("random", "fpr95", "auto")),
        *(("nsga2", "auroc", "sources"), ("nsga2", "pareto", "weights")),
        *(("cmaes", "auroc", "auto"), ("cmaes", "fpr95", "sources"), ("cmaes", "auroc", "weights")),
    ],
)
def test_interrupted_or_not_the_trials_are_the_same(
    small_cache: Cache, tmp_path: Path, sampler: Sampler, objective: Objective, space: str
) -> None:
    def ask(folder: str, **more: Any) -> Search:
        (tmp_path / folder).mkdir(exist_ok=True)
        return run(request(small_cache, tmp_path / folder, sampler, space=SPACES[space], objective=objective, **more))

    expected = trials_of(whole := ask("whole"))
    assert len(expected) == TRIALS
    assert len({repr(params) for _, params, _ in expected}) > TRIALS / 2  # a cross of two may be one of them
    assert trials_of(ask("again")) == expected
    for trials in (1, 13, TRIALS):
        assert trials_of(ask("stopped", trials=trials)) == expected[:trials]
    assert trials_of(ask("whole", seed=2)) != expected

    assert all(inside(whole.objective.params(trial), whole.objective.space) for trial in whole.completed())
    assert {attributes["phase"] for _, _, attributes in expected} == {sampler}
    weights = [params["avgpool.weight"] for _, params, _ in expected]
    if space == "weights":
        assert len(set(weights)) > 5
    else:
        sums = [weight + params["layer1.weight"] for weight, (_, params, _) in zip(weights, expected, strict=True)]
        assert sums == pytest.approx([1] * TRIALS)
    if space == "sources":
        assert {params["layer1.source"] for _, params, _ in expected} == {"product", "activation", "gradient"}


@pytest.mark.usefixtures("short_generations")
@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_two_objectives(small_cache: Cache, tmp_path: Path, sampler: Sampler) -> None:
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


@pytest.mark.parametrize("sampler", ["nsga2", "cmaes"])
def test_every_trial_counts_for_its_sampler(sampler: Sampler) -> None:
    """Alpha is kept inside its source's range; what was asked for is told all the same, not lost."""
    apart = {"product": Interval(1e-3, 1e-1), "gradient": Interval(10.0, 1000.0)}
    layer = LayerSpace(bins=Choice((20,)), saturation=Choice((5,)), alpha=apart, source=Choice(("product", "gradient")))
    asker = OptunaSampler(sampler, {"layer1": layer}, 1, "auroc")
    for number in range(20):
        params = asker.ask(number).params
        assert inside(params, {"layer1": layer})
        asker.tell(number, params, ValidationMetrics(val_auroc=number / 20, val_fpr95=0.5, subtrain_auroc=None))
    assert [trial.value for trial in asker._study.trials] == [number / 20 for number in range(20)]


def test_what_another_process_tried_is_learnt_too() -> None:
    asker = OptunaSampler("tpe", grid_space(3, 3, 3), 1, "auroc")
    mine, theirs = asker.ask(0).params, asker.ask(1).params
    assert mine != theirs
    checks = ValidationMetrics(val_auroc=0.75, val_fpr95=0.5, subtrain_auroc=None)
    asker.tell(0, theirs, checks)  # not what was asked for here
    asker.tell(9, mine, checks)  # nor was this
    done = [t.params for t in asker._study.trials if t.value == 0.75]
    fields = ("bins", "saturation", "alpha")
    flat = [{f"layer0.{name}": getattr(p.layers["layer0"], name) for name in fields} for p in (theirs, mine)]
    assert [{name: params[name] for name in flat[0]} for params in done] == flat


def test_a_weight_to_be_searched_is_not_for_the_default() -> None:
    fixed = grid_space(1, 1, 1)["layer0"]
    for weight in (Interval(0.5, 1, log=False), Choice((1.0, 2.0))):
        layer = LayerSpace(bins=fixed.bins, saturation=fixed.saturation, alpha=fixed.alpha, weight=weight)
        message = r"^layer 'layer1': a weight to be searched needs another sampler, such as --sampler tpe; by default"
        with pytest.raises(InputError, match=message):
            make_asker("layers", {"layer1": layer}, 1, "auroc")


def test_every_name_makes_its_asker() -> None:
    kinds = {name: type(make_asker(name, grid_space(2, 2, 2), 1, "auroc")) for name in get_args(Sampler)}
    assert kinds == {"layers": Strategy, "grid": Grid, **dict.fromkeys(OPTUNAS, OptunaSampler)}
    assert [make_asker(n, grid_space(2, 2, 2), 1, "auroc").size for n in ("layers", "grid", "tpe")] == [None, 8, None]
