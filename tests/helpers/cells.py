"""Which cells of a parametrisation run in `make test`, and which only in `make grid`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

SIMPLER = ("one", "tp3")  # a training on tp2-sp-pp2 has what these have, and is held against the same oracle


def in_grid(cells: Iterable[str | tuple[str, ...]], finer: Collection[str] = SIMPLER) -> list[Any]:
    """Parameters with ids; a cell whose last part (its place) is in ``finer`` is marked ``grid``."""
    parts = [(cell,) if isinstance(cell, str) else cell for cell in cells]
    return [pytest.param(*part, id="-".join(part), marks=[pytest.mark.grid] * (part[-1] in finer)) for part in parts]
