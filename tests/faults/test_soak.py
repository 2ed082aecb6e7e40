"""A short soak: the run is hit twice, of two kinds, and ends as the one that was left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.soak import Soak, run_soak, schedule, table

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def test_a_run_that_is_hit_again_and_again_ends_as_an_undisturbed_one(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    soak = Soak(faults=2, minutes=0.1, seed=3)
    soaked = run_soak(soak, tmp_path)
    assert soaked.differs == ()
    assert [one.kind for one in soaked.recovered] == [planned.kind for planned in schedule(soak)]
    assert 0 < soaked.goodput < 1 and soaked.steps > soaked.recovered[-1].step
    assert "bit for bit" in table(soaked)
    for one in soaked.recovered:
        record_property("recovery_s", f"{one.recovery_s:.2f}")
