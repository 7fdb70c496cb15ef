"""What the search wing's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tuning.postgres import find_programs, running


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a running PostgreSQL."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed; on Debian: apt-get install postgresql")
    with running(programs) as url:
        yield url
