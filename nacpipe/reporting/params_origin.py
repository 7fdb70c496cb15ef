"""From parameters back to the study that found them."""

from __future__ import annotations

from dataclasses import dataclass

from nacpipe.cache import Cache
from nacpipe.errors import NacError
from nacpipe.scoring.params_file import find_file, read_section
from nacpipe.tuning.explain import Explanation, explain
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.study import Search


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamsOrigin:
    """Where parameters are from, and what mattered in their study."""

    source: str
    """The parameter file, or `published`."""
    explanation: Explanation | None = None
    reason: str = ""
    """Why there is no explanation."""
    command: str = ""
    """The command that made the study."""


def find_origin(cache: Cache, choice: str | None) -> ParamsOrigin:
    """Return the study that found the parameters of a cache; where it cannot be looked at, why.

    Args:
        cache: the cache.
        choice: where the parameters are from, as `evaluate.find_params` has it.
    """
    if choice == "published":
        return ParamsOrigin(source="published", reason="The parameters are the paper's; no search was made for them.")
    path = find_file(cache, choice)
    made_by = read_section(path, "made_by")
    if not made_by:
        return ParamsOrigin(source=str(path), reason=f"{path} does not say which study found it.")
    study = f"study {made_by.get('study_name')} in {made_by.get('study')}"
    if "***" in study:
        return ParamsOrigin(source=str(path), reason=f"History and importances are left out: {study} wants a password.")
    if "options" not in made_by:
        return ParamsOrigin(
            source=str(path), reason=f"History and importances are left out, {study}: an earlier nacpipe's."
        )
    try:
        search = Search(SearchRequest.from_json(made_by["options"], cache.path), create=False)
        return ParamsOrigin(source=str(path), explanation=explain(search), command=search.command())
    except NacError as error:
        reason = error.one_line()
    return ParamsOrigin(source=str(path), reason=f"History and importances are left out, {study}: {reason}.")
