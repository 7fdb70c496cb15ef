"""Names of sets that a table could not tell from a mean or a missing value."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from pandas._libs.parsers import STR_NA_VALUES

from nacpipe.benchmarks.standard import BENCHMARKS
from nacpipe.text import MISSING_NAMES, label_set, why_reserved


def test_the_names_are_those_that_pandas_takes_for_missing() -> None:
    assert MISSING_NAMES == STR_NA_VALUES


@pytest.mark.parametrize("name", sorted(n for n in MISSING_NAMES if n and "/" not in n))
def test_a_label_is_read_back_from_csv_as_it_was_written(name: str) -> None:
    assert why_reserved(name) == "pandas reads it as a missing value in a table"
    frame = pd.DataFrame({"dataset": [label_set(f"ood/near/{name}"), "mean"], "auroc": [0.5, 0.6]})
    assert pd.read_csv(io.StringIO(frame.to_csv(index=False)))["dataset"].tolist() == [f"ood/near/{name}", "mean"]


def test_other_names_stay_as_they_are() -> None:
    assert why_reserved("mean") == "tables name the mean over a group's sets so"
    assert label_set("ood/far/mean") == "ood/far/mean"
    assert [label_set(f"ood/near/{name}") for name in ("svhn", "Mean", "nulls", "007")] == [
        "svhn",
        "Mean",
        "nulls",
        "007",
    ]
    for benchmark in BENCHMARKS.values():
        assert [why_reserved(split.name.rpartition("/")[2]) for split in benchmark.splits] == [None] * len(
            benchmark.splits
        )
