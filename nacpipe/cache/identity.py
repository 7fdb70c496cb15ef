"""What made a cache, as plain JSON values: its identity, which must match, and how two of them differ, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Identity = Mapping[str, Any]

VAL = "ood/val"  # the split that plays OOD in a search, when nobody names another
LATER = ("arithmetic", "source")  # what caches of an earlier nacpipe do not say of themselves


def bound_splits(val: str = VAL) -> tuple[str, str, str]:
    """Return the splits that a search chooses by, given the one that plays OOD.

    A study and its parameters are bound to these and to the layers used, so that another set, added later, orphans
    nothing; id/subtrain, on which overfitting shows, is such a set: nothing is chosen by it.
    """
    return ("id/train", "id/val", val)


def said_by(other: Identity, identity: Identity) -> dict[str, Any]:
    """Return an identity without what an older cache, of this other identity, does not say of itself."""
    return {key: value for key, value in identity.items() if key in other or key not in LATER}


def diff(stored: Identity, wanted: Identity) -> list[str]:
    """Return one phrase per value that differs: `weights: stored 3f2a…, now 9c1d…`; nested keys are joined by dots."""
    phrases: list[str] = []
    for key in sorted({*stored, *wanted}):
        a, b = stored.get(key), wanted.get(key)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            phrases += [f"{key}.{phrase}" for phrase in diff(a, b)]
        else:
            phrases.append(f"{key}: stored {_short(a)}, now {_short(b)}")
    return phrases


def fingerprint(identity: Identity) -> str:
    """Return the sha256 (hex) of an identity's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"{text[:8]}…"
    return text if len(text) <= 80 else f"{text[:77]}…"
