"""Terms by class and of components on a cache: both ways agree, with the oracle too; what the data allow."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.errors import ParamsError, ValuesError
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.method.components import fit_components
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import SOURCES, Term, parse_term
from nacpipe.scoring.alpha_range import measure_alpha
from nacpipe.scoring.coverage import fit_coverage, score_splits
from nacpipe.scoring.params_file import read_params, write_params
from nacpipe.scoring.states import check_layers, read_source
from nacpipe.scoring.trial_scorer import Scorer, TermIndexes, split_rows
from nacpipe.scoring.views import available_terms, list_terms, read_groups, why_unavailable
from tests import oracle

SPLITS = ("id/val", "ood/val")


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One of 300 training images of three classes, so that each is a group."""
    return make_cache(tmp_path_factory.mktemp("views") / "c.zarr", rows={"id/train": 300})


def score_term(cache: Cache, term: Term, params: LayerParams, splits: Sequence[str] = SPLITS) -> NDArray[np.float64]:
    """One term's scores of these splits, by the index."""
    scorer = Scorer(TermIndexes(cache, splits), split_rows(cache, splits))
    return scorer.layer_scores({term.name: params})[0]


def params_of(term: Term) -> LayerParams:
    return LayerParams(bins=20, saturation=5, alpha=0.5, source=term.source)


@pytest.mark.repeats(3)
@pytest.mark.parametrize("layer", ["avgpool", "logits"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("view", ["by_class", "components"])
def test_both_ways_give_the_oracles_scores(cache: Cache, layer: str, source: str, view: str) -> None:
    term = parse_term(f"{layer}:{source}:{view}")
    params = params_of(term)
    rows, indexed = split_rows(cache, SPLITS), score_term(cache, term, params)
    scores = score_splits(cache, NacParams(layers={term.name: params}), SPLITS)
    train = read_source(cache["id/train"], layer, term.source)
    predicted = [cache[name].read("logits").argmax(axis=1) for name in ("id/train", *SPLITS)]
    for name, own in zip(SPLITS, predicted[1:], strict=True):
        np.testing.assert_array_equal(scores[name], indexed[rows[name]])
        values = read_source(cache[name], layer, term.source)
        if view == "by_class":
            expected = oracle.score_by_class(train, predicted[0], values, own, bins=20, saturation=5, alpha=0.5)
        else:
            components = fit_components(train)
            assert components is not None
            sides = components.project(train), components.project(values)
            expected = oracle.score_layer(*sides, bins=20, saturation=5, alpha=0.5)
        np.testing.assert_allclose(scores[name], expected, rtol=1e-12)


MIXED = NacParams(
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=0.5),
        "avgpool:by_class": LayerParams(bins=31, saturation=3, alpha=0.7, weight=2.0),
        "avgpool:components": LayerParams(bins=12, saturation=9, alpha=1.5, weight=1.0),
        "layer1:gradient:by_class": LayerParams(bins=9, saturation=2, alpha=2.0, source="gradient"),
        "logits:activation:by_class": LayerParams(bins=15, saturation=4, alpha=0.4, source="activation"),
    }
)


def test_a_score_is_the_weighted_sum_of_its_terms(cache: Cache) -> None:
    terms = [parse_term(name) for name in MIXED.layers]
    rows = split_rows(cache, SPLITS)
    alone = [score_term(cache, term, MIXED.layers[term.name]) for term in terms]
    expected = oracle.weighted_score(alone, [layer.weight for layer in MIXED.layers.values()])
    found = score_splits(cache, MIXED, SPLITS)
    trial = Scorer(TermIndexes(cache, SPLITS), split_rows(cache, SPLITS)).scores(MIXED)
    for name in SPLITS:
        np.testing.assert_allclose(found[name], expected[rows[name]], rtol=1e-12)
        np.testing.assert_array_equal(found[name], trial[rows[name]])


@pytest.mark.parametrize("block", [1, 7, 39])
def test_block_boundaries_do_not_matter(cache: Cache, block: int) -> None:
    coverage = fit_coverage(cache, MIXED)
    np.testing.assert_array_equal(coverage.score(cache["id/val"], block), coverage.score(cache["id/val"]))


def test_parameters_with_views_go_through_a_file_and_a_table(cache: Cache, tmp_path: Path) -> None:
    write_params(tmp_path / "p.json", MIXED)
    assert read_params(tmp_path / "p.json") == MIXED
    scored = score_cache(cache, read_params(tmp_path / "p.json"))
    expected = score_splits(cache, MIXED, ["id/test", "ood/far/textures"])
    for name, scores in expected.items():
        np.testing.assert_array_equal(scored.methods["NAC"].scores[name], scores)


def test_a_class_that_no_training_image_was_predicted_as_has_seen_nothing(
    make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    """Training logits of class 2 are lowered: what is predicted as class 2 scores 0, all else as before."""
    cache = make_cache(tmp_path / "c.zarr", rows={"id/train": 300})
    train = cache["id/train"]
    logits = train.read("logits").copy()
    logits[:, 2] = logits.min() - 1
    writer = CacheWriter(cache.path, cache.header)
    zarr.open_group(cache.path, mode="r+", use_consolidated=False)["id/train/logits"][:] = logits  # type: ignore[index]
    writer.seal("id/train")
    changed = open_cache(cache.path)
    term = Term(layer="avgpool", source="activation", view="by_class")
    scores = score_term(changed, term, params_of(term), ["id/val"])
    predicted = changed["id/val"].read("logits").argmax(axis=1)
    assert (predicted == 2).sum() > 5
    assert (scores[predicted == 2] == 0).all()
    assert (scores[predicted != 2] > 0).all()
    np.testing.assert_array_equal(
        score_splits(changed, NacParams(layers={term.name: params_of(term)}), ["id/val"])["id/val"], scores
    )


# --- which terms there are --------------------------------------------------------------------------------------------


def test_available_terms(cache: Cache) -> None:
    names = [term.name for term in available_terms(cache)]
    assert names == [term.name for term in list_terms(cache)]  # 300 images allow all
    assert names[:9] == [
        "avgpool",
        "avgpool:by_class",
        "avgpool:components",
        "avgpool:activation",
        "avgpool:activation:by_class",
        "avgpool:activation:components",
        "avgpool:gradient",
        "avgpool:gradient:by_class",
        "avgpool:gradient:components",
    ]
    assert len(names) == 3 * 9
    assert names[-1] == "logits:gradient:components"


def test_few_images_allow_fewer_terms_and_say_why(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    few = make_cache(tmp_path / "few.zarr", rows={"id/train": 45})
    refused = {str(term): why_unavailable(few, term) for term in list_terms(few) if term.source == "product"}
    assert refused == {
        "avgpool": None,
        "avgpool:by_class": "two groups of classes need 200 training images; id/train has 45",
        "avgpool:components": "components of 6 neurons need 60 training images; id/train has 45",
        "layer1": None,
        "layer1:by_class": "two groups of classes need 200 training images; id/train has 45",
        "layer1:components": None,
        "logits": None,
        "logits:by_class": "two groups of classes need 200 training images; id/train has 45",
        "logits:components": None,
    }
    assert all(refused.get(term.name) is None for term in available_terms(few))


def test_features_have_no_classes(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    embedding = make_cache(tmp_path / "e.zarr", rows={"id/train": 300}, identity={"outputs": "features"})
    assert why_unavailable(embedding, Term(layer="avgpool", view="by_class")) == (
        "what this network gives are features, of which the largest is no predicted class"
    )
    assert {term.view for term in available_terms(embedding)} == {"plain", "components"}
    assert {term.layer for term in available_terms(embedding)} == {"avgpool", "layer1"}
    message = r"e\.zarr is of a network that gives features; leave these terms out$"
    with pytest.raises(ParamsError, match=r"^terms by_class need predicted classes; .*" + message):
        fit_coverage(embedding, NacParams(layers={"avgpool:by_class": LayerParams(bins=9, saturation=1, alpha=1.0)}))
    with pytest.raises(ParamsError, match=message):
        TermIndexes(embedding, SPLITS)("avgpool:by_class", "product")


def test_few_images_share_groups_of_classes(small_cache: Cache, cache: Cache) -> None:
    assert read_groups(cache).group_of.tolist() == [0, 1, 2]
    assert read_groups(small_cache).group_of.tolist() == [0, 0, 0]
    one = score_splits(small_cache, NacParams(layers={"avgpool:by_class": params_of(Term(layer="avgpool"))}), SPLITS)
    plain = score_splits(small_cache, NacParams(layers={"avgpool": params_of(Term(layer="avgpool"))}), SPLITS)
    for name in SPLITS:
        np.testing.assert_array_equal(one[name], plain[name])


def test_unknown_views_are_named(cache: Cache) -> None:
    message = (
        r"^layer 'avgpool:by_clas' is not in .*c\.zarr; it holds avgpool, layer1, logits; after a layer's name stand"
        r" its source and its view: sources are product, activation, gradient, views plain, by_class, components$"
    )
    with pytest.raises(ParamsError, match=message):
        check_layers(cache, ["avgpool:by_clas"])


# --- indexes of terms ------------------------------------------------------------------------------------------------


def test_alpha_ranges_are_of_the_values_that_are_counted(cache: Cache) -> None:
    terms = [parse_term(name) for name in ("avgpool", "avgpool:by_class", "avgpool:components")]
    index = TermIndexes(cache, ["id/val"], 0)
    values = read_source(cache["id/train"], "avgpool")
    components = fit_components(values)
    assert components is not None
    for term, own in zip(terms, (values, values, components.project(values)), strict=True):
        sizes = np.abs(own[own != 0].astype(np.float64))
        expected = 0.1 / np.quantile(sizes, 0.99), 30 / np.quantile(sizes, 0.5)
        for name in (term.name, "layer1", term.name):  # the last is made again
            made = index(name, "product")
            assert name == "layer1" or measure_alpha(name, "product", made) == expected


def test_an_index_that_was_not_kept_is_made_again(cache: Cache) -> None:
    """With a limit the indexes used last are kept, within so many bytes; the scores do not depend on it."""
    names = ["layer1:gradient:by_class", "layer1", "avgpool:components"]
    layers = {name: params_of(parse_term(name)) for name in names}
    rows = split_rows(cache, SPLITS)
    everything = TermIndexes(cache, SPLITS)
    expected = Scorer(everything, rows, remember=0).layer_scores(layers)
    sizes = [everything(name, layers[name].source).nbytes for name in names]
    for limit, kept in ((0, 1), (sizes[1] + 1, 2), (sum(sizes), 3)):
        index = TermIndexes(cache, SPLITS, limit)
        scorer = Scorer(index, rows, remember=0, one_by_one=True)
        for _ in range(2):
            for found, wanted in zip(scorer.layer_scores(layers), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
        last = [index(name, layers[name].source) for name in names[-kept:]]
        assert [index(name, layers[name].source) is one for name, one in zip(names[-kept:], last, strict=True)] == (
            [True] * kept
        )


def test_a_layer_that_is_not_there_is_refused(cache: Cache) -> None:
    with pytest.raises(ParamsError, match=r"^layer 'layer9' is not in "):
        check_layers(cache, ["layer9"])


def write_large(path: Path, rows: dict[str, int], neurons: int, value: float = 0.0) -> Cache:
    """Two layers of random numbers; `value` stands in place of one of id/val's."""
    layers = tuple(LayerSpec(name=name, path=name, pooling="none", neurons=neurons) for name in ("a", "b"))
    header = Header(identity={}, information={}, block_rows=256, layers=layers, classes=4, features=0)
    writer = CacheWriter(path, header)
    random = np.random.default_rng(0)
    for split, count in rows.items():
        writer.prepare(split, count, {})
        for block in range(count // 256):
            arrays: dict[str, NDArray[np.generic]] = {
                header.layer_array(layer, kind): random.normal(size=(256, neurons)).astype(np.float32)
                for layer in ("a", "b")
                for kind in ("activation", "gradient")
            }
            if split == "id/val" and block == 0 and value:
                arrays["layers/b/activation"][3, 1] = value  # type: ignore[call-overload]
            arrays |= {"logits": random.normal(size=(256, 4)).astype(np.float32), "label": np.zeros(256, np.int64)}
            writer.write_block(split, block, {**arrays, "index": np.arange(256 * block, 256 * block + 256)})
        writer.seal(split)
    return open_cache(path)


@pytest.mark.parametrize("view", ["plain", "by_class", "components"])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, view: str) -> None:
    cache = write_large(tmp_path / "c.zarr", {"id/train": 256, "id/val": 256}, 2, np.inf)
    term = parse_term(f"b:activation:{view}")
    message = r"^layer 'b', split id/val, row 3, neuron 1: the activation is inf; extract the split again with --redo"
    with pytest.raises(ValuesError, match=message):
        TermIndexes(cache, ["id/val"])(term.name, term.source)
    with pytest.raises(ValuesError, match=message):
        score_splits(cache, NacParams(layers={term.name: params_of(term)}), ["id/val"])


@pytest.mark.slow
def test_one_term_at_a_time_takes_bounded_memory(tmp_path: Path) -> None:
    """At most four times the float32 bytes of one source of all layers and rows."""
    rows, neurons = {"id/train": 2048, "id/val": 2048, "ood/val": 1024}, 200
    cache = write_large(tmp_path / "c.zarr", rows, neurons)
    terms = available_terms(cache)
    assert {term.view for term in terms if term.layer == "a"} == {"plain", "by_class", "components"}

    def score_all() -> None:
        index = TermIndexes(cache, SPLITS, 0)
        scorer = Scorer(index, split_rows(cache, SPLITS), one_by_one=True)
        for term in terms:
            low, high = measure_alpha(term.name, term.source, index(term.name, term.source))
            params = LayerParams(bins=100, saturation=9, alpha=(low * high) ** 0.5, source=term.source)
            scorer.layer_scores({term.name: params})

    score_all()  # zarr sets itself up, loops are compiled
    tracemalloc.start()
    score_all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 4 * 4 * 2 * neurons * sum(rows.values())
