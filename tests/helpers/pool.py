"""The pool of worker processes that all multi-process tests share."""

from __future__ import annotations

from launch.pool import Pool, RankError

__all__ = ["Pool", "RankError"]
