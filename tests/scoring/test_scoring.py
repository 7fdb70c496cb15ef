"""The one path from states to scores: both ways to walk it agree, with each other to the bit and with the oracle."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.errors import CacheError, InputError, ParamsError, ValuesError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import LOGITS, Source
from nacpipe.scoring import states
from nacpipe.scoring.coverage import fit_coverage, score_splits
from nacpipe.scoring.states import check_layers, read_layer, read_source
from nacpipe.scoring.trial_scorer import REMEMBER_BYTES, Scorer, TermIndexes, split_rows
from tests import oracle

SPLITS = ("id/subtrain", "id/val", "ood/val")


def values_of(cache: Cache, split: str, layer: str, source: str) -> NDArray[np.float32]:
    view = cache[split][layer]
    activation, gradient = np.asarray(view.activation[:]), np.asarray(view.gradient[:])
    return {"product": activation * gradient, "activation": activation, "gradient": gradient}[source]


def scorer_of(cache: Cache, splits: Sequence[str], remember: int = REMEMBER_BYTES) -> Scorer:
    return Scorer(functools.cache(TermIndexes(cache, splits)), split_rows(cache, splits), remember)


def both_layers(bins: int = 20, alpha: float = 0.5, **more: str) -> NacParams:
    """Two layers whose parameters all differ."""
    return NacParams(
        layers={
            "avgpool": LayerParams(bins=bins, saturation=5, alpha=alpha, weight=0.3, **more),  # type: ignore[arg-type]
            "layer1": LayerParams(bins=bins + 1, saturation=9, alpha=4 * alpha, weight=0.9, **more),  # type: ignore[arg-type]
        }
    )


def alone(scorer: Scorer, layer: str, params: LayerParams) -> NDArray[np.float64]:
    """One layer's scores."""
    (scores,) = scorer.layer_scores({layer: params})
    return scores


@pytest.mark.parametrize("source", ["product", "activation", "gradient"])
@pytest.mark.parametrize("edges", ["log", "linear"])
@pytest.mark.parametrize("bins", [4, 7, 20, 51])
def test_both_ways_give_the_oracles_scores(small_cache: Cache, source: str, edges: str, bins: int) -> None:
    params = both_layers(bins, edges=edges, source=source)
    scorer, coverage = scorer_of(small_cache, SPLITS), fit_coverage(small_cache, params)
    expected: dict[str, list[NDArray[np.float64]]] = {name: [] for name in SPLITS}
    for layer, p in params.layers.items():
        indexed = alone(scorer, layer, p)
        train = values_of(small_cache, "id/train", layer, source)
        for name in SPLITS:
            values = values_of(small_cache, name, layer, source)
            borders = oracle.bin_edges(p.bins, edges)
            assert not oracle.in_doubt(values, p.alpha, borders).any(), "choose another seed"
            assert not oracle.in_doubt(train, p.alpha, borders).any(), "choose another seed"
            np.testing.assert_array_equal(indexed[scorer.rows[name]], coverage.layers[layer].score(values))
            expected[name].append(
                oracle.score_layer(train, values, bins=p.bins, saturation=p.saturation, alpha=p.alpha, edges=edges)
            )
            np.testing.assert_allclose(indexed[scorer.rows[name]], expected[name][-1], rtol=1e-13)
    together = scorer.scores(params)
    for name in SPLITS:
        np.testing.assert_array_equal(together[scorer.rows[name]], coverage.score(small_cache[name]))
        np.testing.assert_allclose(
            together[scorer.rows[name]], oracle.weighted_score(expected[name], [0.3, 0.9]), rtol=1e-13
        )


def test_rows_say_which_scores_are_whose(small_cache: Cache) -> None:
    scorer = scorer_of(small_cache, SPLITS)
    assert scorer.rows == {"id/subtrain": slice(0, 33), "id/val": slice(33, 73), "ood/val": slice(73, 110)}
    assert alone(scorer, "avgpool", LayerParams(bins=20, saturation=5, alpha=0.5)).shape == (110,)


@pytest.mark.parametrize("block", [1, 7, 16, 39, 4096])
def test_block_boundaries_do_not_matter(small_cache: Cache, block: int) -> None:
    coverage = fit_coverage(small_cache, both_layers())
    for name in SPLITS:
        whole = coverage.score(small_cache[name], block=small_cache[name].rows)
        np.testing.assert_array_equal(coverage.score(small_cache[name], block=block), whole)


def test_a_layer_of_weight_0_changes_no_score(small_cache: Cache) -> None:
    with_it = both_layers().layers["avgpool"], LayerParams(bins=9, saturation=2, alpha=3.0, weight=0.0)
    alone = score_splits(small_cache, NacParams(layers={"avgpool": with_it[0]}), SPLITS)
    both = score_splits(small_cache, NacParams(layers={"avgpool": with_it[0], "layer1": with_it[1]}), SPLITS)
    for name in SPLITS:
        np.testing.assert_array_equal(both[name], alone[name])


def test_score_splits(small_cache: Cache) -> None:
    params = both_layers()
    coverage = fit_coverage(small_cache, params)
    scores = score_splits(small_cache, params, ["ood/far/textures", "id/test"])
    assert list(scores) == ["ood/far/textures", "id/test"]
    for name, found in scores.items():
        assert found.shape == (small_cache[name].rows,)
        assert found.dtype == np.float64
        assert ((found >= 0) & (found <= 1)).all()
        np.testing.assert_array_equal(found, coverage.score(small_cache[name]))
    assert scores["id/test"].mean() > scores["ood/far/textures"].mean()


def test_the_training_samples_fill_every_bin_that_they_are_scored_by(small_cache: Cache) -> None:
    """With a saturation of 1, every bin that a training sample falls in is full."""
    params = NacParams(layers={"avgpool": LayerParams(bins=50, saturation=1, alpha=2.0)})
    assert (score_splits(small_cache, params, ["id/train"])["id/train"] == 1).all()


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["avgpool", "layer1", LOGITS])
@pytest.mark.parametrize("source", ["product", "activation", "gradient"])
def test_layers_are_read_in_pieces(
    small_cache: Cache, layer: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = [small_cache[name] for name in SPLITS]
    whole = np.concatenate([read_source(split, layer, source) for split in splits])
    for piece in (1, 7, 8192):
        monkeypatch.setattr(states, "PIECE", piece)
        np.testing.assert_array_equal(read_layer(splits, layer, source), whole)


def test_reading_takes_little_more_memory_than_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "PIECE", 256)
    rows, neurons = 4096, 512
    spec = LayerSpec(name="avgpool", path="p", pooling="none", neurons=neurons)
    header = Header(identity={}, information={}, block_rows=64, layers=(spec,), classes=2, features=0)
    writer = CacheWriter(tmp_path / "c.zarr", header)
    writer.prepare("id/train", rows, {})
    random = np.random.default_rng(0)
    for block in range(rows // 64):
        arrays = {
            f"layers/avgpool/{kind}": random.normal(size=(64, neurons)).astype(np.float32)
            for kind in ("activation", "gradient")
        }
        rest = {"logits": np.zeros((64, 2), np.float32), "label": np.zeros(64, int), "index": np.arange(64)}
        writer.write_block("id/train", block, {**arrays, **rest})
    writer.seal("id/train")
    split = open_cache(tmp_path / "c.zarr")["id/train"]
    read_layer([split], "avgpool")  # zarr sets itself up
    tracemalloc.start()
    values = read_layer([split], "avgpool")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.nbytes == 4 * rows * neurons
    assert peak < 1.4 * values.nbytes


# --- what is remembered -----------------------------------------------------------------------------------------------

TRIED = [LayerParams(bins=bins, saturation=5, alpha=0.5) for bins in range(10, 20)]


def test_remembered_scores_are_the_same_and_bounded(small_cache: Cache) -> None:
    fresh = [alone(scorer_of(small_cache, SPLITS), "avgpool", params) for params in TRIED]
    room = 3 * fresh[0].size * 4  # whole numbers of four bytes
    scorer = scorer_of(small_cache, SPLITS, room)
    for params, expected in [*zip(TRIED, fresh, strict=True)] * 2:
        np.testing.assert_array_equal(alone(scorer, "avgpool", params), expected)
        np.testing.assert_array_equal(alone(scorer, "avgpool", params), expected)
        assert sum(one.sums.nbytes for one in scorer._remembered.values()) <= room
    assert len(scorer._remembered) == 3


def test_what_was_used_longest_ago_is_forgotten_first(small_cache: Cache) -> None:
    a, b, c = TRIED[:3]
    scorer = scorer_of(small_cache, SPLITS, 2 * 110 * 4)
    for params, kept in ((a, [a]), (b, [a, b]), (a, [b, a]), (c, [a, c]), (a, [c, a]), (b, [a, b])):
        alone(scorer, "avgpool", params)
        assert list(scorer._remembered) == [("avgpool", one) for one in kept]


def test_layers_asked_for_together_are_the_layers_alone(small_cache: Cache) -> None:
    """All new, all known, and one of each; the same layer's older scores make room first."""
    a, b = TRIED[:2]
    expected = {
        (name, p): alone(scorer_of(small_cache, SPLITS), name, p) for name in ("avgpool", "layer1") for p in (a, b)
    }
    for room in (1 << 20, 2 * 110 * 4, 1):
        scorer = scorer_of(small_cache, SPLITS, room)
        for first, second in ((a, a), (a, a), (a, b), (b, b), (b, a)):
            found = scorer.layer_scores({"avgpool": first, "layer1": second})
            np.testing.assert_array_equal(found[0], expected["avgpool", first])
            np.testing.assert_array_equal(found[1], expected["layer1", second])
            assert sum(one.sums.nbytes for one in scorer._remembered.values()) <= room
    assert scorer.layer_scores({}) == []


def test_no_room_at_all_still_scores(small_cache: Cache) -> None:
    expected = alone(scorer_of(small_cache, SPLITS), "avgpool", TRIED[0])
    scorer = scorer_of(small_cache, SPLITS, 1)
    np.testing.assert_array_equal(alone(scorer, "avgpool", TRIED[0]), expected)
    assert not scorer._remembered


def test_weight_plays_no_part_in_what_is_remembered_and_all_else_does(small_cache: Cache) -> None:
    scorer = scorer_of(small_cache, SPLITS)
    base = {"bins": 20, "saturation": 5, "alpha": 0.5}
    first = alone(scorer, "avgpool", LayerParams(**base, weight=0.2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(alone(scorer, "avgpool", LayerParams(**base, weight=0.7)), first)  # type: ignore[arg-type]
    assert len(scorer._remembered) == 1
    for change in ({"bins": 21}, {"saturation": 6}, {"alpha": 0.6}, {"edges": "linear"}, {"source": "gradient"}):
        assert not np.array_equal(alone(scorer, "avgpool", LayerParams(**{**base, **change})), first)  # type: ignore[arg-type]
    assert not np.array_equal(alone(scorer, "layer1", LayerParams(**base)), first)  # type: ignore[arg-type]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Cache]:
    """Write a cache of one layer of two neurons: 10 rows per split, activation 2, gradient 1 but for changes."""

    def write_one(**changes: dict[tuple[int, int], float]) -> Cache:
        layer = LayerSpec(name="avgpool", path="avgpool", pooling="none", neurons=2)
        header = Header(identity={}, information={}, block_rows=4, layers=(layer,), classes=2, features=0)
        writer = CacheWriter(tmp_path / "c.zarr", header)
        for name in ("id/train", "id/val", "ood/val"):
            activation, gradient = np.full((10, 2), 2.0, np.float32), np.ones((10, 2), np.float32)
            for key, array in (("activation", activation), ("gradient", gradient)):
                for place, value in changes.get(f"{key}_{name.replace('/', '_')}", {}).items():
                    array[place] = value
            arrays = {
                "layers/avgpool/activation": activation,
                "layers/avgpool/gradient": gradient,
                "logits": np.zeros((10, 2), np.float32),
                "label": np.zeros(10, np.int64),
                "index": np.arange(10),
            }
            writer.prepare(name, 10, {})
            for block in range(3):
                rows = slice(4 * block, 4 * block + 4)
                writer.write_block(name, block, {key: array[rows] for key, array in arrays.items()})
            writer.seal(name)
        return open_cache(tmp_path / "c.zarr")

    return write_one


ONE = NacParams(layers={"avgpool": LayerParams(bins=6, saturation=2, alpha=1.0)})


@pytest.mark.parametrize(
    ("activation", "gradient", "shown"),
    [
        (np.nan, 1.0, "nan"),
        (1.0, np.nan, "nan"),
        (np.inf, 1.0, "inf"),
        (1.0, -np.inf, "-inf"),
        (np.inf, 0.0, "nan"),
        (1e30, -1e30, "-inf"),  # two finite numbers whose product float32 cannot hold
    ],
)
def test_values_that_are_no_numbers_are_refused(
    write: Callable[..., Cache], activation: float, gradient: float, shown: str
) -> None:
    cache = write(activation_id_val={(7, 1): activation}, gradient_id_val={(7, 1): gradient})
    message = (
        rf"^layer 'avgpool', split id/val, row 7, neuron 1: the product is {shown};"
        " extract the split again with --redo id/val$"
    )
    with pytest.raises(ValuesError, match=message):
        scorer_of(cache, ["id/val", "ood/val"]).index("avgpool", "product")
    for block in (3, 4096):  # the row is the split's, not the block's
        with pytest.raises(ValuesError, match=message):
            fit_coverage(cache, ONE).score(cache["id/val"], block=block)
    with pytest.raises(ValuesError, match=message):
        score_splits(cache, ONE, ["ood/val", "id/val"])
    assert score_splits(cache, ONE, ["ood/val"])["ood/val"].tolist() == [1.0] * 10


def test_values_of_the_training_set_are_checked_too(write: Callable[..., Cache]) -> None:
    cache = write(gradient_id_train={(2, 0): np.nan, (5, 1): np.nan})
    with pytest.raises(ValuesError, match=r"^layer 'avgpool', split id/train, row 2, neuron 0: the product is nan;"):
        fit_coverage(cache, ONE)
    with pytest.raises(ValuesError, match=r"^layer 'avgpool', split id/train, row 2, neuron 0: the product is nan;"):
        alone(scorer_of(cache, ["id/val"]), "avgpool", ONE.layers["avgpool"])


def test_only_the_source_is_read(write: Callable[..., Cache]) -> None:
    cache = write(gradient_id_val={(0, 0): np.nan})
    assert (read_source(cache["id/val"], "avgpool", "activation") == 2).all()
    with pytest.raises(ValuesError, match="row 0, neuron 0: the gradient is nan"):
        read_source(cache["id/val"], "avgpool", "gradient")
    assert read_source(cache["id/val"], "avgpool", "gradient", slice(1, 5)).tolist() == [[1.0, 1.0]] * 4


def test_unknown_layers_are_refused(small_cache: Cache) -> None:
    params = NacParams(layers={**both_layers().layers, "layer5": LayerParams(bins=4, saturation=1, alpha=1.0)})
    message = (
        rf"^layer 'layer5' is not in {small_cache.path}; it holds avgpool, layer1, logits;"
        " extract it into another cache with --layers layer5$"
    )
    with pytest.raises(ParamsError, match=message):
        check_layers(small_cache, ["avgpool", "layer5"])
    with pytest.raises(ParamsError, match=message):
        fit_coverage(small_cache, params)
    check_layers(small_cache, ["layer1", "avgpool", "logits"])


def test_unknown_and_unfinished_splits_are_refused(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    with pytest.raises(InputError, match=r"^split 'id/vall' is not in .*c\.zarr; it holds id/train, "):
        scorer_of(cache, ["id/vall"])
    CacheWriter(cache.path, cache.header).prepare("ood/far/more", 20, {})
    with pytest.raises(CacheError, match=r"c\.zarr: ood/far/more is not finished \(0 of 2 blocks\); finish it with: "):
        score_splits(open_cache(cache.path), both_layers(), ["ood/far/more"])
