"""`nacpipe run`: extract, search and evaluate in one command."""

from __future__ import annotations

from typing import Any

import click

from nacpipe.cli.extract import extract_options, extract_requests, make_requests


@click.command()
@extract_options
@click.option("--trials", type=int, help="Completed trials to reach; default: 2000.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="The search's seed.")
def run(trials: int | None, seed: int, **asked: Any) -> None:
    """Extract BENCHMARK's states, search the parameters, and print the table, in one command.

    Stopped at any moment, the same command goes on where it was.

    \b
    nacpipe run digits
    nacpipe run cifar10 --model resnet20 --checkpoint resnet20.th --data-root data
    """
    from nacpipe.cache import open_cache
    from nacpipe.cli.evaluate import print_evaluation
    from nacpipe.cli.search import run_search
    from nacpipe.errors import InputError
    from nacpipe.evaluation.tables import evaluate
    from nacpipe.files import is_url
    from nacpipe.tuning.request import SearchRequest

    if trials is not None and trials < 1:
        raise InputError(f"trials is {trials}; it must be at least 1")
    requests = make_requests(**asked)
    if len(requests) > 1:
        raise InputError(
            f"checkpoint {asked['checkpoint']} is a folder of {len(requests)} runs; name one of them, or make a cache"
            " of each with: nacpipe extract"
        )
    if is_url(requests[0].cache):
        raise InputError(
            f"{requests[0].cache} is not a folder on this machine, beside which search could write its files; run"
            " extract, search and evaluate one by one, with --storage and --output"
        )
    extract_requests(requests)
    request = requests[0]
    result = run_search(SearchRequest(cache=request.cache, trials=trials, seed=seed))
    click.echo("")
    print_evaluation(evaluate(open_cache(request.cache), result.params))
