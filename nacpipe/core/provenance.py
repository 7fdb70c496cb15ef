"""What made a cache, as plain JSON values: its identity, which must match, and how two of them differ, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Identity = Mapping[str, Any]

# The splits that a search reads; a study is bound to these and to the layers it uses, so that a test set added later
# orphans nothing.
SEARCH_SPLITS = ("id/train", "id/subtrain", "id/val", "ood/val")


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
