from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four worker processes, shared by every multi-process test of the session."""
    workers = Pool(4)
    yield workers
    workers.close()
