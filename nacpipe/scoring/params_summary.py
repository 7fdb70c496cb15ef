"""What the row NAC of a table is, in one line: how many terms, and on what they were chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nacpipe.cache import Cache
from nacpipe.cache.identity import VAL
from nacpipe.method.params import NacParams, term_of
from nacpipe.method.term import LOGITS
from nacpipe.scoring.params_file import find_file, read_section

PUBLISHED = "published"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamsSummary:
    """One cache's parameters: what they are, and what their file says of how they were found."""

    terms: int
    """Of a weight above 0, without the feature score."""
    layers: int
    fused: str = ""
    """The feature score in the sum; empty where there is none."""
    as_published: bool = False
    """Whether they make NAC-UE: each layer once, product, plain, logarithmic bins, nothing fused."""
    equal_weights: bool = False
    source: str = ""
    """Their file, or `published`; empty where they were given as a record."""
    val: str = ""
    """The split that played OOD when they were chosen; empty where it is not known."""
    made_val: bool = False
    """Whether that split is made of id/val's images."""
    objective: str = ""
    space: str = ""
    trials: int | None = None
    seed: int | None = None
    gradients: bool = True
    """Whether the cache has what NAC-UE needs."""

    def describe_source(self) -> str:
        """Return the file, the space and the search in one line: `parameters c.params.json, space auto, …`."""
        if self.source == PUBLISHED:
            return "parameters of the paper"
        words = [f"parameters {self.source or 'given in Python'}"]
        words += [f"space {self.space}"] * bool(self.space) + [f"objective {self.objective}"] * bool(self.objective)
        words += [f"{self.trials:,} trials"] if self.trials is not None else []
        words += [f"seed {self.seed}"] if self.seed is not None else []
        words += [f"chosen on id/val and {self._shown_val}" if self.val else "no record of how they were chosen"]
        return ", ".join(words)

    @property
    def _shown_val(self) -> str:
        return f"{self.val}, which is made of id/val" if self.made_val else self.val


def summarise_params(params: NacParams) -> ParamsSummary:
    """Return what parameters say by themselves."""
    used = params.used()
    terms = [term_of(name, layer) for name, layer in used.layers.items()]
    layers = {term.layer for term in terms}
    plain = all((term.source, term.view) == ("product", "plain") for term in terms)
    logarithmic = all(layer.edges == "log" for layer in used.layers.values())
    return ParamsSummary(
        terms=len(terms),
        layers=len(layers),
        fused=used.fused.method if used.fused is not None else "",
        as_published=plain and logarithmic and len(layers) == len(terms) and LOGITS not in layers and not used.fused,
        equal_weights=len({layer.weight for layer in used.layers.values()}) == 1,
    )


def summarise_choice(cache: Cache, params: NacParams, choice: str | None) -> ParamsSummary:
    """Return what parameters and their file say.

    Args:
        cache: the cache they are used on.
        params: the parameters.
        choice: where they are from, as `find_params` has it.
    """
    summary = replace(summarise_params(params), gradients=cache.header.gradients)
    if choice == PUBLISHED:
        return replace(summary, source=PUBLISHED)
    path = find_file(cache, choice)
    made_by, result = read_section(path, "made_by"), read_section(path, "result")
    options = made_by.get("options")
    val = str(made_by.get("val", VAL)) if made_by else ""
    return replace(
        summary,
        source=str(path),
        val=val,
        made_val=val in cache and "synthetic" in cache.peek(val).images,
        objective=str(made_by.get("objective", "")),
        space=str(options.get("space", "")) if isinstance(options, dict) else "",
        trials=_whole(result.get("trials")),
        seed=_whole(result.get("seed")),
    )


def describe_params(summaries: Sequence[ParamsSummary]) -> str:
    """Return in one line what NAC is under the parameters of one cache, or of several training runs.

    45 terms of 8 layers, and ViM, chosen on id/val and ood/val (guided, 2,701 trials, seed 1); NAC-UE as published: …
    as published (4 layers, equal weights), with the paper's parameters
    """
    layers = _span([one.layers for one in summaries], "layer")
    chosen = _describe_choice(summaries)
    if all(one.as_published for one in summaries):
        weights = (
            "equal weights" if all(one.equal_weights for one in summaries) else "weights fitted, equal in the paper"
        )
        return f"as published ({layers}, {weights}), {chosen}".removesuffix(", ")
    fused = _distinct(one.fused for one in summaries)
    text = f"{_span([one.terms for one in summaries], 'term')} of {layers}"
    if any(fused):
        text += f", and {' or '.join(name or 'no feature score' for name in fused)}"
    where = (
        "NAC-UE as published: nacpipe search CACHE --space paper"
        if all(one.gradients for one in summaries)
        else "NAC-UE as published needs gradients: extract without --no-gradient"
    )
    return f"{text}, {chosen}".removesuffix(", ") + f"; {where}"


def _describe_choice(summaries: Sequence[ParamsSummary]) -> str:
    """On what they were chosen; empty where nothing is known of it: records from Python, files without `made_by`."""
    if all(one.source == PUBLISHED for one in summaries):
        return "with the paper's parameters"
    if not all(one.val for one in summaries):
        return ""
    words = _distinct(one.objective for one in summaries if one.objective)
    trials = [one.trials for one in summaries if one.trials is not None]
    words += [_span(trials, "trial")] if trials else []
    seeds = _distinct(str(one.seed) for one in summaries if one.seed is not None)
    words += [f"seed{'s' * (len(seeds) > 1)} {' and '.join(seeds)}"] if seeds else []
    vals = " or ".join(_distinct(one._shown_val for one in summaries))
    return f"chosen on id/val and {vals}" + f" ({', '.join(words)})" * bool(words)


def _span(counts: Sequence[int], noun: str) -> str:
    """[4, 4] → 4 layers; [43, 45] → 43 to 45 terms."""
    low, high = min(counts), max(counts)
    return (f"{low:,}" if low == high else f"{low:,} to {high:,}") + f" {noun}{'s' * (high != 1)}"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
