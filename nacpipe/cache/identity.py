"""A cache's identity, as JSON values: what it was made from, and how two identities differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Identity = Mapping[str, Any]

VAL = "ood/val"  # the OOD split that a search uses by default
OPTIONAL_FIELDS = ("arithmetic", "source", "call")  # fields that caches of an earlier nacpipe lack


def bound_splits(val: str = VAL) -> tuple[str, str, str]:
    """Return the splits that a search reads to choose parameters, given its OOD split.

    A study and its parameters are bound to these splits and to the layers used, so that other sets can be added later.
    id/subtrain is not among them: it serves the overfitting check alone.
    """
    return ("id/train", "id/val", val)


def comparable_fields(other: Identity, identity: Identity) -> dict[str, Any]:
    """Return an identity without the optional fields that the other identity lacks."""
    return {key: value for key, value in identity.items() if key in other or key not in OPTIONAL_FIELDS}


def stored_precision(identity: Identity) -> str:
    """Return the precision of a cache's states: fp32, tf32, bf16 or fp16."""
    if (dtype := identity.get("dtype", "float32")) != "float32":
        return str(dtype)
    arithmetic = identity.get("arithmetic")
    return "tf32" if isinstance(arithmetic, Mapping) and arithmetic.get("tf32") is True else "fp32"


def diff(stored: Identity, wanted: Identity, words: tuple[str, str] = ("stored", "now")) -> list[str]:
    """Return one phrase per value that differs: `weights: stored 3f2a…, now 9c1d…`; nested keys are joined by dots."""
    phrases: list[str] = []
    for key in sorted({*stored, *wanted}):
        a, b = stored.get(key), wanted.get(key)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            phrases += [f"{key}.{phrase}" for phrase in diff(a, b, words)]
        else:
            phrases.append(f"{key}: {words[0]} {_short(a)}, {words[1]} {_short(b)}")
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
