"""A user's program with every public name, for mypy --strict (test_typed_user.py); it is not run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nacpipe


class Texts(Dataset[tuple[str, int]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> tuple[str, int]:
        return ("text", row)


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    ids = torch.tensor([list(text.encode()) for text in texts])
    return {"input_ids": ids, "valid": ids != 0}


def find_mask(arguments: Mapping[str, Tensor]) -> Tensor:
    return arguments["valid"]


def take_logits(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0]


def count(split: str, rows: int) -> None:
    print(split, rows)


def extract(network: nn.Module, data: TensorDataset) -> nacpipe.Cache:
    text_splits: dict[str, Texts | list[tuple[str, int]]] = {"id/train": Texts(), "id/val": [("a", 0)]}
    nacpipe.extract(
        network, text_splits, Path("texts.zarr"),
        layers={"hidden": "encoder"}, pooling={"hidden": "class-token"}, prepare=tokenize, logits=take_logits,
        mask=find_mask, device=torch.device("cpu"), batch_size=8, workers=2, precision="bf16", mantissa_bits=10,
        gradient=False, block_rows=16, shard_blocks=2, redo=["id/val"], fingerprint={"id/train": "v1"}, name="texts",
        distributed=False, progress=count,
    )  # fmt: skip
    splits = {"id/train": DataLoader(data, batch_size=8), "id/val": data, "ood/val": data}
    return nacpipe.extract(network, splits, "x.zarr", mask="valid", device="cpu", layers=["1"], progress=False)


def read() -> tuple[int, NDArray[np.float32]]:
    cache: nacpipe.Cache = nacpipe.open_cache("x.zarr")
    split = cache["id/val"]
    activation: NDArray[np.float32] = split["1"].activation[:]
    for name in cache:
        print(name, cache[name].rows, cache[name].label[:3], cache.header.layers[0].pooling)
    return split.rows, activation


def tune(cache: nacpipe.Cache) -> nacpipe.NacParams:
    result: nacpipe.SearchResult = nacpipe.tune(
        cache, trials=10, timeout=5.0, patience=None, space="paper", sampler="layers", objective="auroc",
        val="ood/val", seed=2, layers=["1"], threads=1, fuse="none", storage="x.log", study="mine", output="x.json",
        progress=False,
    )  # fmt: skip
    study: optuna.Study | None = result.study
    values: list[float] = [] if study is None else study.best_trial.values
    auroc: float = result.checks.val_auroc
    guide: str | None = result.guide
    print(values, auroc, guide, result.guide_val, result.cross_validated)
    return result.params


def search_with_optuna(cache: nacpipe.Cache) -> nacpipe.NacParams:
    objective = nacpipe.Objective(cache, objective="auroc", space="paper", layers=["1"], val="ood/val")
    samplers: list[optuna.samplers.BaseSampler] = [
        nacpipe.LayerwiseSampler(objective, seed=1),
        nacpipe.TermwiseSampler(objective, seed=1),
        nacpipe.GridSampler(objective, seed=1),
    ]
    study = optuna.create_study(directions=objective.directions, sampler=samplers[0])
    study.optimize(objective, n_trials=3)
    params = objective.params(study.best_trial)
    print(objective.measure(params).val_fpr95)
    return params


def evaluate(cache: nacpipe.Cache, params: nacpipe.NacParams) -> pd.DataFrame:
    own = nacpipe.NacParams(layers={"1": nacpipe.LayerParams(bins=50, saturation=20, alpha=1.0, weight=0.5)})
    nacpipe.write_params("x.json", own, made_by={"tool": "mine"})
    again: nacpipe.NacParams = nacpipe.read_params(Path("x.json"))
    assert nacpipe.NacParams.from_json(again.to_json()) == again
    scores: dict[str, NDArray[np.float64]] = nacpipe.score_splits(cache, params, ["id/val", "ood/val"])
    found = nacpipe.detect(scores["id/val"], scores["ood/val"])
    auroc: float = found.auroc
    runs = [nacpipe.score_cache(cache, {"NAC": params, "own": own})]
    frame: pd.DataFrame = nacpipe.add_confidence(nacpipe.tabulate(runs), runs, level=0.9, resamples=100, seed=1)
    differences: pd.DataFrame = nacpipe.compare_methods(runs, "NAC", "Energy")
    nacpipe.save_scores(Path("x.npz"), [cache], runs)
    over_runs: pd.DataFrame = nacpipe.evaluate_runs([cache, cache], [params, None])
    text: str = nacpipe.to_latex(over_runs)
    print(auroc, frame, differences, text, nacpipe.__version__)
    return nacpipe.evaluate("x.zarr", None)


def look(cache: nacpipe.Cache, params: nacpipe.NacParams) -> pd.DataFrame:
    whole, layer = nacpipe.inspect(cache), nacpipe.inspect(cache, "id/val", "1", params=params)
    facts: Mapping[str, object] = whole.facts
    frames: list[pd.DataFrame] = [
        whole.layers, whole.splits, layer.summary, layer.values, layer.histograms,
        nacpipe.inspect("x.zarr", "id/val", params="published"),
        nacpipe.inspect(cache, "id/val", "1", alpha=2.0).values,
        nacpipe.inspect(cache, "id/val", compare=Path("y.zarr")),
        nacpipe.inspect(cache, "ood/val", rows=5, params=params),
    ]  # fmt: skip
    made: nacpipe.Report = nacpipe.report([cache, "y.zarr"], params=[params, Path("y.params.json")], baselines=["all"])
    made.save("report.html", figures="figures")
    layer.plot().savefig("layer.png")
    print(facts, frames, made.table, made.checks, list(made.figures), made.html)
    return nacpipe.report(cache, Path("report.html"), params=params).table


def deploy(cache: nacpipe.Cache, params: nacpipe.NacParams, network: nn.Module, data: TensorDataset) -> Tensor:
    detector: nacpipe.Detector = nacpipe.Detector.from_cache(
        cache, params, network, keep=0.9, prepare=tokenize, logits=take_logits, mask="valid"
    )
    detector.save("d.safetensors")
    loaded = nacpipe.Detector.load("d.safetensors", network, prepare=tokenize)
    loader = DataLoader(data, batch_size=8)
    fitted = nacpipe.Detector.fit(network, loader, params, pooling={"1": "none"}, layers={"1": "encoder"})
    calibration = fitted.calibrate(loader, keep=0.9, confidence=0.9)
    low, high = calibration.interval
    for explanation in loaded.explain(torch.zeros(2, 5), neurons=3):
        terms: pd.DataFrame = explanation.terms
        print(explanation.score, explanation.percentile, terms, explanation.neurons, low + high)
    old: nacpipe.Detector = nacpipe.load_detector("d.safetensors", network)
    logits, score, percentile, is_ood = old(torch.zeros(2, 5))
    check = detector.to_onnx("d.onnx", {"input_ids": torch.zeros(2, 5)})
    close: float = check.close
    rows: pd.DataFrame = nacpipe.score(old, ["photos", Path("shards/{000..009}.tar")], workers=4)
    parts: pd.DataFrame = nacpipe.score(old, "s3://in/shards/", "scores", format="parquet", note=print)
    drift: pd.DataFrame = nacpipe.watch(["scores"], by="day", false_alarms=0.001, max_flagged=0.1)
    print(close, rows, parts, drift, old.prepare_image(b""))
    one: Tensor = detector.forward({"input_ids": torch.zeros(2, 5)}).score
    print(logits, score, percentile, is_ood)
    return one


def main() -> None:
    data, network = TensorDataset(torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64)), nn.Linear(5, 2)
    try:
        cache = extract(network, data)
        deploy(cache, tune(cache), network, data)
        params = search_with_optuna(cache)
        print(evaluate(cache, params), look(cache, params))
        read()
    except nacpipe.NacError as error:
        print(error)
