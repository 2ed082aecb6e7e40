"""Which checkpoints stay when a new one has been saved."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.folder import list_steps, read_latest, remove
from orchestrator.checkpoint.load import CheckpointReader
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.errors import DataError


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

    A later step may be there because the user has gone back on purpose. One that is damaged is not counted among those
    that stay, and not deleted either. Nothing is raised.
    """
    if retention.keeps_all:
        return
    with contextlib.suppress(OSError, DataError):  # that an old one stays is no reason to end a run
        latest = read_latest(checkpoints)
        there = {other: path for other, path in list_steps(checkpoints) if other <= step}
        whole = {other: manifest for other, path in there.items() if (manifest := _manifest(path)) is not None}
        values = {other: manifest.about.get("metrics", {}).get(retention.metric) for other, manifest in whole.items()}
        known = {other: float(value) for other, value in values.items() if isinstance(value, (int, float))}
        for other in retention.doomed(sorted(whole), known):
            path = there[other]
            if path.name == latest:
                continue
            doomed = path.with_name(f"{path.name}.tmp-{token}")  # half deleted it must not look like a checkpoint
            path.rename(doomed)
            remove(doomed)


def _manifest(checkpoint: Path) -> Manifest | None:
    """A checkpoint's manifest; None where one of its files is missing or short: such a one does not count as kept."""
    try:
        return CheckpointReader(checkpoint).manifest
    except DataError:
        return None
