"""Where a cache is: a folder, or a URL."""

from __future__ import annotations

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(address: object) -> bool:
    """Return whether an address is a URL, so that nothing stands beside it."""
    return _URL.match(str(address)) is not None
