"""How NAC stands among all methods in one line, and methods below chance, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.cli.evaluate import print_evaluation
from nacpipe.evaluation.standing import describe_below_chance, describe_standing
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params


def table(aurocs: dict[str, tuple[float, float]], task: str = "ood") -> pd.DataFrame:
    """Method → AUROC of its near and far mean; one set each, which is the mean."""
    rows = [
        {
            "task": task,
            "group": group,
            "dataset": dataset,
            "method": name,
            "auroc": values[place],
            **dict.fromkeys(("fpr95", "aupr_in", "aupr_out", "accuracy"), 0.25),
            "n_id": 4,
            "n_ood": 2,
            "fitted_on": "",
            "n_fitted": 0,
            "reason": "",
        }
        for place, group in enumerate(("near", "far"))
        for dataset in ("a", "mean")
        for name, values in aurocs.items()
    ]
    return pd.DataFrame(rows)


def test_one_line_ranks_nac_among_all() -> None:
    found = table({"NAC": (0.9, 0.95), "GEN": (0.914, 0.9), "MSP": (0.5, 0.6), "KNN": (float("nan"), 0.2)})
    assert describe_standing(found) == "NAC is second of 3 near (best: GEN 91.40), first of 4 far"
    equal = table({"NAC": (0.9, 0.8), "GEN": (0.9, 0.9), "MSP": (0.5, 0.8), "KNN": (0.95, 0.85)})
    assert describe_standing(equal) == (
        "NAC is equal second of 4 near (best: KNN 95.00), equal third of 4 far (best: GEN 90.00)"
    )
    assert describe_standing(equal, "MSP") == (
        "MSP is 4th of 4 near (best: KNN 95.00), equal third of 4 far (best: GEN 90.00)"
    )


def test_the_full_spectrum_follows() -> None:
    found = pd.concat(
        [table({"NAC": (0.9, 0.95), "A": (0.8, 0.9)}), table({"NAC": (0.7, 0.6), "A": (0.8, 0.5)}, "fsood")]
    )
    assert describe_standing(found) == (
        "NAC is first of 2 near, first of 2 far; full spectrum: second of 2 near (best: A 80.00), first of 2 far"
    )


def test_what_has_no_mean_is_not_ranked() -> None:
    nothing = float("nan")
    assert describe_standing(table({"NAC": (nothing, nothing), "A": (0.8, 0.9)})) == ""
    assert (
        describe_standing(table({"NAC": (nothing, 0.7), "A": (0.8, 0.9)})) == "NAC is second of 2 far (best: A 90.00)"
    )
    assert describe_standing(table({"A": (0.8, 0.9)})) == ""
    published = pd.concat(
        [table({"NAC": (0.7, 0.7)}).assign(source="measured"), table({"A": (0.8, 0.1)}).assign(source="published")]
    )
    assert describe_standing(published) == "NAC is first of 1 near, first of 1 far"


def test_methods_below_chance_are_named() -> None:
    assert describe_below_chance(table({"NAC": (0.5, 0.95), "A": (0.8, 0.9)})) == []
    found = describe_below_chance(table({"NAC": (0.9, 0.95), "A": (0.4999, 0.9), "B": (0.1, 0.2)}))
    assert found == [
        "† below chance (AUROC under 50 %): it scores OOD images higher than ID images more often than not",
        "† near mean: A, B",
        "† far mean: B",
    ]
    assert describe_below_chance(table({"A": (0.6, 0.2)}, "fsood"))[1:] == ["† far mean, full spectrum: A"]


def test_a_set_alone_below_chance_is_marked_and_explained() -> None:
    found = table({"NAC": (0.9, 0.95), "A": (0.8, 0.9)})
    found.loc[(found["dataset"] == "a") & (found["method"] == "A") & (found["group"] == "far"), "auroc"] = 0.3
    assert len(describe_below_chance(found)) == 1


def test_the_table_marks_what_is_below_chance(capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(table({"NAC": (0.9, 0.5), "A": (0.4321, 0.9)}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-5:] for line in lines if " A " in f" {line} "][:2] == [
        ["25.00", "43.21†", "25.00", "25.00", "2"],
        ["25.00", "90.00", "25.00", "25.00", "2"],  # of the far set: a set alone has no mean
    ]
    assert sum("†" in line for line in lines) == 3  # the set, the meaning, the name
    assert lines[-1] == "NAC is first of 2 near, second of 2 far (best: A 90.00)"


def test_the_command_ends_with_the_line(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    write_params(
        tmp_path / "c.params.json", NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})
    )
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "knn,ash-b@90"])
    assert printed.exit_code == 0, printed.stderr
    last = printed.stdout.splitlines()[-1]
    assert last.startswith("NAC is ")
    assert " of 6 near" in last
    assert " of 6 far" in last
