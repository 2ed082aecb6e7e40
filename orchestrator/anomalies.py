"""Steps whose loss is no number or far above those before: found before the update, the same on every rank."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.job import AnomaliesConfig
from orchestrator.runs import rewinds_file, write_whole

WINDOW, LEAST = 32, 8
"""Losses that a spike is measured against: the newest, and not fewer."""


@dataclass(frozen=True)
class Anomaly:
    """``words`` say what is wrong, ``policy`` what is to be done: warn, stop, skip or rewind."""

    words: str
    policy: str


class Anomalies:
    """Judges the steps of a run. Every rank has one, and all say the same, for they are told the same losses.

    Args:
        losses: of the newest steps before, the newest last.

    ``has_learned``: whether the model has learned from a step since this start.
    """

    def __init__(self, config: AnomaliesConfig, losses: Iterable[float] = ()) -> None:
        self._config = config
        self._losses = deque(losses, maxlen=WINDOW)
        self._skipped = 0
        self.has_learned = False

    @property
    def losses(self) -> tuple[float, ...]:
        """Those that the next step is measured against."""
        return tuple(self._losses)

    def found(self, loss: float, grad_norm: float) -> Anomaly | None:
        """What is wrong with a step; None: nothing.

        Example:
            >>> Anomalies(AnomaliesConfig(), [2.0] * 8).found(7.0, 1.0)
            Anomaly(words='loss 7 is 3.5 times the median of the 8 steps before', policy='warn')
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Anomaly(f"loss {loss}, grad_norm {grad_norm}", self._config.not_finite)
        if len(self._losses) < LEAST:
            return None
        median = statistics.median(self._losses)
        if loss <= self._config.spike_factor * median:
            return None
        words = f"loss {loss:g} is {loss / median:.4g} times the median of the {len(self._losses)} steps before"
        return Anomaly(words, self._config.spike)

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the model shall learn from a step."""
        anomaly = self.found(loss, grad_norm)
        return anomaly is None or anomaly.policy == "warn"

    def learned(self, loss: float) -> None:
        """The model has learned from a step of this loss."""
        self._losses.append(loss)
        self._skipped = 0
        self.has_learned = True

    def skipped_too_many(self) -> bool:
        """One more step is skipped; whether these are more in a row than the job bears."""
        self._skipped += 1
        return self._skipped > self._config.limit


def note_rewind(run_dir: Path, step: int, samples: int) -> None:
    """Whoever goes on from ``step``, or from one before it, begins with sample ``samples``."""
    file = rewinds_file(run_dir)
    write_whole(file, json.dumps(_rewinds(file) | {str(step): samples}) + "\n")


def samples_after_rewinds(run_dir: Path, step: int, samples: int) -> int:
    """Where the data of a run goes on after ``step``, whose checkpoint says ``samples``."""
    later = [past for noted, past in _rewinds(rewinds_file(run_dir)).items() if int(noted) >= step]
    return max(samples, *later) if later else samples


def _rewinds(file: Path) -> dict[str, int]:
    if not file.is_file():
        return {}
    known: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    return known
