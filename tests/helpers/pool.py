"""The pool of worker processes that all multi-process tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import coverage

from launch import pool
from launch.pool import RankError

__all__ = ["Pool", "RankError"]


class Pool(pool.Pool):
    """A pool that is traced for coverage where that tells something new: tracing makes a rank a third slower.

    Of ranks it is the first one, and of the cells of a parametrised test the first one.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._traced: set[tuple[str, Callable[..., Any]]] = set()

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
        """As :meth:`launch.pool.Pool.run`."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0]
        is_new = (test, function) not in self._traced
        self._traced.add((test, function))
        return super().run(world, _run, is_new, function, args, timeout_s=timeout_s)


def _run(is_new: bool, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if os.environ["RANK"] != "0":
        tracing = coverage.Coverage.current()
        if tracing is not None:
            tracing.stop()
        return function(*args)
    tracer = sys.gettrace()
    sys.settrace(tracer if is_new else None)  # stopping and starting coverage would forget what it has seen
    try:
        return function(*args)
    finally:
        sys.settrace(tracer)
