from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.pool import Pool


@pytest.fixture(scope="package", autouse=True)
def idle_workers_end(pool: Pool) -> Iterator[None]:
    """What comes after these tests has the cores for itself; who needs workers again gets new ones."""
    yield
    pool.leave()
