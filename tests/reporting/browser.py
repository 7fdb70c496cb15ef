"""A real browser, headless: Debian's package chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0"),
)


def browse(page: Path, *more: str, width: int, height: int) -> tuple[str, list[str]]:
    """Open a page: what the browser prints, and what its console said."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="nacpipe-chromium-", ignore_cleanup_errors=True) as profile:
        command = [program, *OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}", *more]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
