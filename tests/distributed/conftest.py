from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.pool import Pool


@pytest.fixture(scope="package", autouse=True)
def idle_workers_end(pool: Pool) -> Iterator[None]:
    """What comes after these tests has the cores for itself; who needs workers again gets new ones."""
    yield
    pool.leave()


# Trainings that are held against peft's or transformers' own: the cell with tp, sp and pp has what the others have.
ORACLES = ("test_dora", "test_learning_rates", "test_modules_to_save", "test_peft_oracle", "test_pissa", "test_qlora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The simpler cells of these go to ``make grid``."""
    for item in items:
        if item.path.stem in ORACLES and item.name.rstrip("]").endswith(("one", "tp3")):
            item.add_marker(pytest.mark.grid)
