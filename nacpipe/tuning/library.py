"""A search from Python: `nacpipe.tune(cache)`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nacpipe.cache import Cache
from nacpipe.files import beside_cache, check_writable
from nacpipe.scoring.params_file import read_section, write_params
from nacpipe.tuning.request import FuseChoice, SamplerName, SearchRequest, SearchResult
from nacpipe.tuning.runner import run
from nacpipe.tuning.storage import only_runner
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import SHOWN, ObjectiveName


def tune(
    cache: Cache | str | Path,
    *,
    trials: int | None = None,
    timeout: float | None = None,
    patience: int | None = None,
    space: str = "auto",
    sampler: SamplerName | None = None,
    objective: ObjectiveName | None = None,
    val: str = "ood/val",
    seed: int = 1,
    layers: Sequence[str] = (),
    threads: int | None = None,
    fuse: FuseChoice = "auto",
    storage: str | None = None,
    study: str = "nac",
    output: str | Path | None = None,
    progress: bool = True,
) -> SearchResult:
    """Find the parameters of a cache's terms, as `nacpipe search` does; the same call goes on after a kill.

    No trial reads a test split. The study is `X.study.log` beside the cache `X.zarr`, the parameters `X.params.json`.

    Args:
        cache: the cache, or its path or URL.
        trials: completed trials that the study shall have; None: as many as the sampler needs.
        timeout: seconds for this call.
        patience: stop after this many trials without improvement.
        space: `auto`, `paper`, `wide`, `terms`, `published`, or a TOML file.
        sampler: None: term by term in the space `auto`, the grid in the published one, else layer by layer.
        objective: `auroc`, `fpr95`, `pareto` or `guided`; None: `guided` in the space `auto`, else `auroc`.
        val: the split that plays OOD.
        seed: of the sampler.
        layers: names; none means all that the cache holds.
        threads: of the compiled code; None: all cores.
        fuse: a feature score that is one more member of the sum: `NCI`, `fDBD`, `ViM`, `none` or `auto`.
        storage: a journal file or a database URL; None: beside the cache.
        study: the study's name in its storage.
        output: the parameter file; None: beside the cache.
        progress: whether a bar and notes are shown on stderr.

    Returns:
        `params`; `study`, an `optuna.Study`; `checks` on the validation pair, AUROC and FPR@95 as fractions;
        `cross_validated`; the best plain score, `guide` and `guide_val`; and `advice`, the one thing to try next.

    Raises:
        CacheError: the cache is not there or not finished.
        InputError: an argument makes no sense for it.
        StudyError: the study was made with another cache or for another search, or another search runs.
    """
    request = SearchRequest(
        cache=cache.path if isinstance(cache, Cache) else cache,
        trials=trials,
        timeout=timeout,
        patience=patience,
        space=space,
        sampler=sampler,
        objective=objective,
        val=val,
        seed=seed,
        layers=tuple(layers),
        threads=threads,
        fuse=fuse,
        storage=storage,
        study=study,
        output=None if output is None else Path(output),
    )
    if request.output is not None:
        check_writable(request.output)
    with only_runner(request.where, request.study_name):
        search = Search(request)
        with _bar(search, progress) as bar:

            def show(done: int, best: float) -> None:
                if bar is not None:
                    bar.set_postfix_str(f"best {SHOWN[request.aim]} {100 * best:.2f} %", refresh=False)
                    bar.update(done - bar.n)

            result = run(search, show)
    note: Callable[[str], object] = sys.stderr.write if progress else lambda text: None
    save_result(search, result, lambda text: note(f"{text}\n"))
    if result.advice:
        note(f"try: {result.advice}\n")
    return result


def _bar(search: Search, shown: bool) -> AbstractContextManager[Any]:
    if not shown:
        return nullcontext()
    from tqdm.auto import tqdm

    bar: AbstractContextManager[Any] = tqdm(
        total=search.trials, initial=len(search.completed()), unit="trial", desc="tune"
    )
    return bar


def save_result(search: Search, result: SearchResult, note: Callable[[str], object]) -> Path:
    """Write what a search has found as parameters, and return the file.

    A better result of another study is not replaced unless its file is named.
    """
    target = _choose_target(search, result, note)
    write_params(target, result.params, result=result.to_json(), made_by=search.made_by())
    return target


def _choose_target(search: Search, result: SearchResult, note: Callable[[str], object]) -> Path:
    request = search.request
    try:
        made_by, before = (read_section(request.target, section) for section in ("made_by", "result"))
        name, value = str(made_by["study_name"]), float(before["val_auroc"])
    except (OSError, ValueError, KeyError, TypeError):
        return request.target
    if name == request.study_name:
        return request.target
    if request.output is None and value > result.checks.val_auroc:
        note(f"{request.target} stays: it holds the better result of {name} ({100 * value:.2f} %)")
        return beside_cache(str(request.cache), f".{request.study_name}.params.json")
    note(f"{request.target} held the result of {name} ({100 * value:.2f} %); it is replaced")
    return request.target
