"""The one thing to try after a search, from what it found: a table of rules, of which the first that holds speaks.

Test sets are not among the findings: a search reads none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nacpipe.method.metrics import auroc_error
from nacpipe.method.term import layer_of
from nacpipe.text import command_line, spell_option
from nacpipe.tuning.request import GAP, OVERFIT_POINTS, SearchResult

FEW_IMAGES = 1000  # of a validation split, below which a gap over images is the images' fault and not the terms'
UNCERTAIN = 0.01  # standard error of the validation AUROC from which more images are asked for
LONE = 0.9  # share of all coverage weight that makes a layer the only one that counts
LATE = 0.9  # of the trials, after which a best trial says that the search was still getting better
WORTH_TRYING = 20  # trials from which the place of the best one says something


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What rules look at."""

    result: SearchResult
    cache: str
    """Its path or URL, for commands."""
    val: str
    """The split that plays OOD."""
    output: str = ""
    """The file that the result goes to, where one was named; empty where it goes beside the cache."""
    made_val: bool
    """Whether its samples were made from those of id/val."""
    python: bool
    """Whether the cache was extracted from Python: options are then spelled as arguments."""
    images: Mapping[str, int]
    """Samples of id/train, id/val and `val`."""
    at_edge: str = ""
    """A parameter of the best trial that stands at an end of the range that a space file gives it."""
    best_place: float | None = None
    """Where among the trials the best one stands, 0 … 1; None where its place says nothing."""
    longer: str = ""
    """The command that goes on with twice the trials."""


def advise(found: Findings) -> str:
    """Return what to try next in one line; empty where nothing stands out."""
    return next((text for rule in _RULES if (text := rule(found))), "")


def _plain_score(found: Findings) -> str:
    """NAC is no better than the best plain score, and could be."""
    result = found.result
    if result.guide is None or result.guide_val is None:
        return ""
    if (crossed := result.cross_validated) is not None and crossed.guide is not None:
        ours, guides, where = crossed.images, crossed.guide, "cross-validated"
    else:
        ours, guides, where = result.checks.val_auroc, result.guide_val, "on the validation pair"
    if ours > guides or ours == 1.0:
        return ""
    named = ["--params", found.output] if found.output else []
    compare = command_line("evaluate", found.cache, *named, "--against", result.guide)
    return (
        f"{result.guide} in NAC's place: its AUROC is {_percent(guides)}, NAC's {_percent(ours)} ({where}); compare"
        f" them on the test sets: {compare}"
    )


def _gap(found: Findings) -> str:
    """The fitted AUROC is well above the cross-validated one: over images, or over classes alone."""
    result, crossed = found.result, found.result.cross_validated
    if crossed is None or not result.overestimates:
        return ""
    fitted = result.checks.val_auroc
    if fitted - crossed.images <= GAP:
        kinds = "real OOD images" if found.made_val else "OOD images of more kinds"
        return (
            f"{kinds} in {found.val}: {_percent(fitted)} AUROC fitted, {_percent(crossed.clusters)} on classes of it"
            " that were left out"
        )
    seen = f"{_percent(fitted)} AUROC fitted, {_percent(crossed.images)} on images that were left out"
    fewest = min(("id/val", found.val), key=lambda split: found.images[split])
    if found.images[fewest] < FEW_IMAGES:
        return f"more images in {fewest}, which has {found.images[fewest]}: {seen}"
    heaviest = ",".join(sorted(weights := _layer_weights(result), key=lambda layer: -weights[layer])[:2])
    options = ["--val", found.val] if found.val != "ood/val" else []
    fewer = command_line("search", found.cache, "--layers", heaviest, *options, "--study", "fewer")
    return f"fewer terms: {seen}; {fewer}"


def _overfitted(found: Findings) -> str:
    """Coverage knows its training images."""
    if not found.result.overfits:
        return ""
    rows = found.images["id/train"]
    option = "" if found.python else f" (extract: {spell_option('train-images', 2 * rows, python=False)})"
    return (
        f"more images in id/train, which has {rows}{option}: NAC tells training images from others more than"
        f" {100 * OVERFIT_POINTS:.0f} points better than {found.result.guide} does"
    )


def _few_images(found: Findings) -> str:
    """The validation AUROC is uncertain."""
    rows, ood_rows = found.images["id/val"], found.images[found.val]
    error = auroc_error(found.result.checks.val_auroc, rows, ood_rows)
    if error <= UNCERTAIN:
        return ""
    return (
        f"more validation images: from {rows} of id/val and {ood_rows} of {found.val}, the AUROC has a standard error"
        f" of {100 * error:.1f} points"
    )


def _edge(found: Findings) -> str:
    return f"a wider range: {found.at_edge}" if found.at_edge else ""


def _more_trials(found: Findings) -> str:
    """The best trial was among the last."""
    if found.best_place is None or found.best_place < LATE or found.result.trials < WORTH_TRYING:
        return ""
    return f"more trials: the best was among the last tenth of {found.result.trials}; {found.longer}"


def _lone_layer(found: Findings) -> str:
    """One layer has nearly all the weight, or is alone."""
    weights = _layer_weights(found.result)
    total = sum(weights.values())
    layer = max(weights, key=lambda name: weights[name])
    if total == 0 or weights[layer] < LONE * total:
        return ""
    carried = f"{100 * weights[layer] / total:.0f} % of the weight of {len(weights)} layers" if len(weights) > 1 else ""
    why = f"{layer} has {carried}" if carried else f"{layer} was searched alone"
    option = "layers=" if found.python else "--layers A,B; nacpipe layers NAME lists them"
    return f"other layers (extract: {option}): {why}"


def _made_val(found: Findings) -> str:
    """No OOD image was seen."""
    if not found.made_val:
        return ""
    option = spell_option("redo", [found.val] if found.python else found.val, python=found.python)
    return f"real OOD images in {found.val}, in place of those that are made from id/val (extract: {option})"


def _layer_weights(result: SearchResult) -> dict[str, float]:
    """Layer → the weight of its terms."""
    weights: dict[str, float] = {}
    for name, params in result.params.layers.items():
        weights[layer_of(name)] = weights.get(layer_of(name), 0.0) + params.weight
    return weights


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


_RULES: tuple[Callable[[Findings], str], ...] = (  # the worse the finding, the earlier
    _plain_score,
    _gap,
    _overfitted,
    _few_images,
    _edge,
    _more_trials,
    _lone_layer,
    _made_val,
)
