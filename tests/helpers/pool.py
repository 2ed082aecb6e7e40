"""The pool of worker processes that all multi-process tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import coverage

from launch import pool
from launch.pool import RankError

__all__ = ["Pool", "RankError"]


class Pool(pool.Pool):
    """A pool whose first rank alone is traced for coverage: tracing makes a rank a third slower."""

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
        """As :meth:`launch.pool.Pool.run`."""
        return super().run(world, _run, function, args, timeout_s=timeout_s)


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    tracing = coverage.Coverage.current()
    if tracing is not None and os.environ["RANK"] != "0":
        tracing.stop()
    return function(*args)
