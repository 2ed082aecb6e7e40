"""Which checkpoints stay when a new one has been saved."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.folder import MANIFEST, list_steps, read_latest, remove


@dataclass(frozen=True)
class Retention:
    """What stays: the union of three rules; with all at 0 everything stays.

    Args:
        last: the newest ones.
        every: those of steps that it divides.
        best: those with the lowest ``metric`` of their step.
        metric: "loss" or "grad_norm".
    """

    last: int = 0
    every: int = 0
    best: int = 0
    metric: str = "loss"

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever deleted: no rule says how many stay."""
        return not (self.last or self.best)

    def doomed(self, steps: Sequence[int], values: Mapping[int, float]) -> tuple[int, ...]:
        """The steps to delete, oldest first. The newest of ``steps`` always stays.

        Args:
            steps: ascending.
            values: the metric after a step; a step without one is never among the best.
        Example:
            >>> Retention(last=2, every=100).doomed([50, 100, 150, 200, 250], {})
            (50, 150)
            >>> Retention(last=1, best=1).doomed([50, 100, 150], {50: 2.0, 100: 1.5, 150: 1.7})
            (50,)
        """
        if self.keeps_all or not steps:
            return ()
        finite = {step: value for step, value in values.items() if step in steps and math.isfinite(value)}
        staying = {steps[-1], *steps[len(steps) - min(self.last, len(steps)) :]}
        staying |= {step for step in steps if self.every and step % self.every == 0}
        staying |= set(sorted(finite, key=lambda step: (finite[step], -step))[: self.best])
        return tuple(step for step in steps if step not in staying)


def prune(checkpoints: Path, step: int, retention: Retention, token: str) -> None:
    """Delete what ``retention`` lets go up to ``step``; never ``latest``, never one of a later step.

    A later step may be there because the user has gone back on purpose.
    """
    if retention.keeps_all:
        return
    latest = read_latest(checkpoints)
    there = {other: path for other, path in list_steps(checkpoints) if other <= step}
    values = {other: _metric(path, retention.metric) for other, path in there.items()} if retention.best else {}
    known = {other: value for other, value in values.items() if value is not None}
    for other in retention.doomed(sorted(there), known):
        path = there[other]
        if path.name == latest:
            continue
        doomed = path.with_name(f"{path.name}.tmp-{token}")  # a half-deleted folder must not look like a checkpoint
        with contextlib.suppress(OSError):  # that an old one stays is no reason to end a run
            path.rename(doomed)
            remove(doomed)


def _metric(checkpoint: Path, metric: str) -> float | None:
    """The metric that a manifest says; None where it has none or cannot be read: whether it is whole is not asked."""
    try:
        value = json.loads((checkpoint / MANIFEST).read_bytes())["about"]["metrics"][metric]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, (int, float)) else None
