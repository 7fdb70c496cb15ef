"""From parameters back to the study that found them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nacpipe.cache import Cache
from nacpipe.errors import NacError
from nacpipe.files import beside_cache
from nacpipe.method.coverage import layer_of
from nacpipe.scoring.params_file import read_section
from nacpipe.tuning.explain import Explanation, explain
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.space_file import read_spec
from nacpipe.tuning.storage import backend
from nacpipe.tuning.study import Search


@dataclass(frozen=True, slots=True, kw_only=True)
class PastStudy:
    """Where parameters are from, and what mattered in their study."""

    source: str
    """The parameter file, or `published`."""
    explanation: Explanation | None = None
    reason: str = ""
    """Why there is no explanation."""
    command: str = ""
    """The command that made the study."""


def find_study(cache: Cache, choice: str | None) -> PastStudy:
    """Return the study that found the parameters of a cache; where it cannot be looked at, why.

    Args:
        cache: the cache.
        choice: where the parameters are from, as `evaluate.find_params` has it.
    """
    if choice == "published":
        return PastStudy(source="published", reason="The parameters are the paper's; no search was made for them.")
    path = Path(choice) if choice is not None else beside_cache(cache.path, ".params.json")
    made_by = read_section(path, "made_by")
    if not made_by:
        return PastStudy(source=str(path), reason=f"{path} does not say which study found it.")
    study = f"study {made_by.get('study_name')} in {made_by.get('study')}"
    if "***" in study:
        return PastStudy(source=str(path), reason=f"History and importances are left out: {study} wants a password.")
    reason, layers = "", tuple(made_by.get("space", ()))
    for named in _requests(cache, made_by):
        try:
            usual = tuple(read_spec(named.space, cache, ()))
            shorter = tuple(dict.fromkeys(map(layer_of, layers)))
            chosen = shorter if tuple(read_spec(named.space, cache, shorter)) == layers else layers
            request = named if layers == usual else replace(named, layers=chosen)
            search = Search(request, create=False)
            return PastStudy(source=str(path), explanation=explain(search), command=search.command())
        except NacError as error:
            reason = reason or error.one_line()
    reason = reason or "it was searched in a space of its own; nacpipe search --explain shows it"
    return PastStudy(source=str(path), reason=f"History and importances are left out, {study}: {reason}.")


def _requests(cache: Cache, made_by: Mapping[str, Any]) -> Iterator[SearchRequest]:
    """What may have been asked for, by the study's name; the name that says most comes first."""
    name, where = str(made_by.get("study_name")), str(made_by.get("study"))
    usual = str(beside_cache(cache.path, ".study.log"))
    if not backend(where) and not Path(where).exists():
        where = usual  # the cache has moved, its study with it
    seed = re.search(r"-seed(\d+)$", name)
    for words in ("published", "wide", "terms", "auto"):
        for sampler in (made_by.get("sampler"), None):
            asked: dict[str, Any] = {"space": words, "sampler": sampler, "storage": None if where == usual else where}
            asked |= {key: made_by[key] for key in ("objective", "val") if key in made_by}
            asked |= {"seed": int(seed[1]) if seed else 1, "cache": Path(cache.path)}
            ending = SearchRequest(study="", **asked).study_name
            if name.endswith(ending) and len(name) > len(ending):
                yield SearchRequest(study=name.removesuffix(ending), **asked)
