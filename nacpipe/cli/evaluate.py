"""`nacpipe evaluate`: tables of how well NAC and the baselines tell ID from OOD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.output import (
    Address,
    note,
    output_options,
    params_option,
    percent,
    print_frame,
    print_table,
    printable,
    split_names,
)
from nacpipe.text import escape_bytes

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.cache import Cache
    from nacpipe.evaluation.method_scores import MethodScores, ScoredCache
    from nacpipe.method.params import NacParams

_TITLES = {"ood": "OOD: ID is id/test", "fsood": "FS-OOD: ID is id/test and csid together"}
_SHOWN = {"fpr95": "FPR@95", "auroc": "AUROC", "aupr_in": "AUPR-IN", "aupr_out": "AUPR-OUT"}


@click.command()
@click.argument("caches", metavar="CACHE…", nargs=-1, required=True, type=Address())
@params_option
@click.option(
    "--baselines",
    metavar="NAMES",
    callback=split_names,
    help="all, or some by name: Temperature, Entropy, GEN, KNN, ViM, …, fitted on the cache.",
)
@click.option(
    "--against",
    metavar="NAME",
    help="Compare NAC, image by image, with a method by name, best, another parameter file, or published.",
)
@click.option("--confidence", metavar="SHARE", type=float, help="Add bootstrap intervals of that level, as 0.95.")
@click.option("--resamples", type=int, help="How often images are drawn anew for intervals; default 1000.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of these draws.")
@click.option(
    "--scores", metavar="FILE", type=click.Path(path_type=Path), help="Write every image's scores: .npz or .parquet."
)
@click.option(
    "--published-results",
    is_flag=True,
    help="Add the results that papers report for this benchmark, marked as published.",
)
@click.option("--latex", "output", flag_value="latex", help="Print tables for a paper: best bold, second underlined.")
@output_options
def evaluate(
    caches: tuple[str | Path, ...],
    choices: tuple[str, ...],
    baselines: tuple[str, ...],
    against: str | None,
    confidence: float | None,
    resamples: int | None,
    seed: int,
    scores: Path | None,
    published_results: bool,
    output: str | None,
) -> None:
    """Print FPR@95, AUROC, AUPR-IN and AUPR-OUT for every OOD set in CACHE, NAC beside MSP, MaxLogit and Energy.

    Several caches are training runs of one network: mean ± standard deviation. On a terminal and in LaTeX in percent;
    as JSON, CSV and Markdown in fractions. --against with --baselines prints the table and then the comparison,
    in LaTeX too.

    \b
    nacpipe evaluate cache/digits-digits_cnn.zarr
    nacpipe evaluate cache/digits-digits_cnn.zarr --baselines all --confidence 0.95
    nacpipe evaluate cache/digits-digits_cnn.zarr --against Energy
    nacpipe evaluate cache/digits-digits_cnn.zarr --baselines all --against best
    nacpipe evaluate cache/cifar10-resnet20.zarr --params published --json
    nacpipe evaluate cache/s0.zarr cache/s1.zarr cache/s2.zarr --latex > table.tex
    """
    from nacpipe.cache import open_cache
    from nacpipe.evaluation.bootstrap import LEVEL, RESAMPLES, add_confidence, compare_methods, compare_with_best
    from nacpipe.evaluation.flagged import add_flagged, describe_flagged
    from nacpipe.evaluation.latex import comparison_to_latex, to_latex
    from nacpipe.evaluation.score_files import check_scores_file, save_scores
    from nacpipe.evaluation.tables import add_published, tabulate
    from nacpipe.evaluation.training_runs import check_runs

    best = against == "best"
    rows = output not in (None, "latex")  # one table; a paper has both
    table_too = bool(against is None or (baselines and not (best and rows)) or published_results)
    if against is not None and table_too and rows:
        raise click.UsageError(
            f"Table and comparison are two tables, --{output} is one: leave out --against for the table, --baselines"
            " and --published-results for the comparison."
        )
    if resamples is not None and confidence is None and against is None:
        raise click.UsageError("--resamples is for --confidence and --against.")
    if scores is not None:
        check_scores_file(scores)
    opened = [open_cache(path) for path in caches]
    check_runs(opened)
    runs, other = _score(opened, choices, baselines, None if best else against)
    if scores is not None:
        save_scores(scores, opened, runs)
        note(f"wrote {scores}")
    for run in runs:
        if run.note:
            note(run.note if len(runs) == 1 else f"{run.path}: {run.note}")
    draws: dict[str, Any] = {"resamples": RESAMPLES if resamples is None else resamples, "seed": seed}
    comparison, level = None, LEVEL if confidence is None else confidence
    if best:
        comparison = compare_with_best(runs, "NAC", level=level, **draws)
    elif other is not None:
        comparison = compare_methods(runs, "NAC", other, level=level, **draws)
    if comparison is None or table_too:
        frame = tabulate(runs)
        if confidence is not None:
            frame = add_confidence(frame, runs, level=confidence, **draws)
        if published_results:
            frame = add_published(frame, str(opened[0].header.identity.get("benchmark")))
        if output == "latex":
            click.echo(to_latex(frame), nl=False)
        elif output:
            _print_described(add_flagged(frame) if output == "json" else frame, output)
            if output == "json" and "flagged_reason" in frame.attrs:
                note(describe_flagged(frame)[0])
        else:
            print_evaluation(frame)
    if comparison is not None and output == "latex":
        click.echo("\n" * table_too + comparison_to_latex(comparison), nl=False)
    elif comparison is not None and output:
        _print_described(comparison, output)
    elif comparison is not None:
        click.echo("\n" * table_too, nl=False)
        print_comparison(comparison)


def _score(
    caches: Sequence[Cache], choices: Sequence[str], baselines: Sequence[str], against: str | None
) -> tuple[list[ScoredCache], str | None]:
    """Score every cache; return the scored caches and the name of the method to compare with."""
    from nacpipe.evaluation.method_scores import evaluated_splits, score_cache
    from nacpipe.scoring.params_file import find_params
    from nacpipe.scoring.params_summary import summarise_choice

    chosen = match_choices(choices, len(caches))
    names, other = list(baselines), None
    if against is not None and (other := _method_name(against)) is not None:
        names.append(other)
    runs = []
    for cache, choice in zip(caches, chosen, strict=True):
        sets: dict[str, NacParams] = {"NAC": find_params(cache, choice, note)}
        known = {"NAC": summarise_choice(cache, sets["NAC"], choice)}
        if against is not None and (other is None or other.startswith("NAC (")):
            other = f"NAC ({escape_bytes(against)})"
            sets[other] = find_params(cache, against, note)
            known[other] = summarise_choice(cache, sets[other], against)
        more = score_baselines_named(cache, names, evaluated_splits(cache))
        runs.append(score_cache(cache, sets, more=more, parameters=known))
    return runs, other


def match_choices(choices: Sequence[str], caches: int) -> list[str | None]:
    """Return --params for each cache: given once for each, once for all, or not at all."""
    if len(choices) not in (0, 1, caches):
        raise click.UsageError(f"--params is given {len(choices)} times for {caches} caches; give it once for each.")
    chosen: list[str | None] = [*choices] or [None]
    return chosen * (caches // len(chosen))


def _method_name(text: str) -> str | None:
    """Return the baseline of that name as it is written; None for a parameter file or `published`."""
    from nacpipe.errors import InputError
    from nacpipe.evaluation.baselines import MORE_BASELINES, find_baseline
    from nacpipe.method.plain_scores import LOGIT_BASELINES

    if (name := find_baseline(text)) is None and text != "published" and not Path(text).exists():
        raise InputError(
            f"--against {text} is neither a parameter file that is there nor a method; methods: published,"
            f" {', '.join([*LOGIT_BASELINES, *MORE_BASELINES])}"
        )
    return name


def score_baselines_named(cache: Cache, names: Sequence[str], splits: list[str]) -> Mapping[str, MethodScores]:
    """Score these splits by the named baselines; none for no names."""
    from nacpipe.evaluation.baselines import score_baselines

    return score_baselines(cache, names, splits) if names else {}


def _print_described(frame: pd.DataFrame, output: str) -> None:
    """Print a frame as json, csv or markdown; in markdown what NAC is stands below the table, once."""
    from nacpipe.evaluation.tables import parameter_lines

    if output != "markdown":
        print_frame(frame, output)
        return
    print_frame(frame.drop(columns="parameters"), output)
    for line in parameter_lines(frame):
        click.echo(f"\n{printable(line)}")


def print_evaluation(frame: pd.DataFrame) -> None:
    """Print one table per task, in percent, what methods were fitted on, which are below chance, where NAC ranks."""
    from nacpipe.evaluation.flagged import describe_flagged
    from nacpipe.evaluation.standing import describe_below_chance, describe_standing
    from nacpipe.evaluation.tables import footnotes, parameter_lines, verdicts

    for number, (task, rows) in enumerate(frame.groupby("task", sort=False)):
        first = rows.iloc[0]
        runs = f"{first['runs']} runs, " if "runs" in frame else ""
        click.echo(
            ("\n" if number else "")
            + f"{_TITLES[str(task)]} ({first['n_id']} images, {runs}accuracy {_cell(first, 'accuracy')} %);"
            " all in percent"
        )
        lines: list[tuple[str, ...]] = []
        alone = rows.groupby("group")["dataset"].nunique() <= 2  # one set and its mean, which is the same …
        if "source" in rows:  # … but for published rows, which may have a mean alone
            alone &= ~rows.groupby("group")["source"].agg(lambda sources: "published" in set(sources))
        for (group, dataset), block in rows.groupby(["group", "dataset"], sort=False):
            if dataset == "mean" and alone[group]:
                continue
            lines.append(())
            for place, (_, row) in enumerate(block.iterrows()):
                published = row.get("source") == "published"
                lines.append(
                    (
                        f"{group} {dataset}" if place == 0 else "",
                        f"{row['method']} ({row['reason']})" if published else str(row["method"]),
                        *(_cell(row, metric) for metric in _SHOWN),
                        "" if published else str(row["n_ood"]),
                    )
                )
        print_table(("set", "method", *_SHOWN.values(), "images"), lines, left=2)
    click.echo("")
    below = parameter_lines(frame) + footnotes(frame) + describe_below_chance(frame) + describe_flagged(frame)
    for line in below + verdicts(frame):
        click.echo(printable(line))
    if "confidence" in frame:
        first = frame.iloc[0]
        click.echo(f"[…]: {first['confidence']:g} bootstrap intervals of {first['resamples']:g} draws of the images")
    if standing := describe_standing(frame):
        click.echo(printable(standing))


def print_comparison(frame: pd.DataFrame) -> None:
    """Print how two methods differ, in percentage points, and whether that is more than chance."""
    from nacpipe.evaluation.bootstrap import PICKED, name_second
    from nacpipe.evaluation.tables import parameter_lines

    picked = "among" in frame
    names = frame["first"].iloc[0], "best" if picked else frame["second"].iloc[0]
    for number, (task, rows) in enumerate(frame.groupby("task", sort=False)):
        second = name_second(rows)
        click.echo(("\n" if number else "") + f"{_TITLES[str(task)]}: {names[0]} against {second}; all in percent")
        lines: list[tuple[str, ...]] = []
        for (group, dataset), block in rows.groupby(["group", "dataset"], sort=False):
            lines.append(())
            for place, row in enumerate(block.itertuples()):
                better = (row.difference > 0) == (row.metric == "auroc")
                lines.append(
                    (
                        f"{group} {dataset}" if place == 0 else "",
                        _SHOWN[row.metric],
                        *(percent(value) for value in (row.first_value, row.second_value)),
                        f"{100 * row.difference:+.2f}" if row.more_than_chance is not None else "–",
                        f"[{100 * row.low:+.2f}, {100 * row.high:+.2f}]" if row.more_than_chance is not None else "–",
                        row.reason or (("better" if better else "worse") if row.more_than_chance else "within chance"),
                    )
                )
        print_table(("set", "metric", *names, "difference", "interval", f"{names[0]} is"), lines, left=2)
    first = frame.iloc[0]
    click.echo(
        f"\ninterval: {first['confidence']:g} of {first['resamples']} paired draws of the images;"
        " within chance: it holds 0"
    )
    if picked:
        click.echo(PICKED)
    for line in parameter_lines(frame):
        click.echo(printable(line))


def _cell(row: pd.Series[Any], metric: str) -> str:
    """A metric with its deviation over runs and its interval, where the table has them, and a mark below chance."""
    from nacpipe.evaluation.standing import BELOW_CHANCE, CHANCE

    text = percent(row[metric])
    spread = row.get(f"{metric}_std")
    if spread is not None and not math.isnan(spread):
        text += f" ± {percent(spread)}"
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if low is not None and not math.isnan(low):
        text += f" [{percent(low)}, {percent(high)}]"
    return text + (BELOW_CHANCE if metric == "auroc" and row[metric] < CHANCE else "")
