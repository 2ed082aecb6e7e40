"""What one check says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from launch.environment import LaunchError
from orchestrator.errors import IsotrainError
from parallel.specs import SpecError

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    ``state``: with a ``fault`` no run would start; a ``warning`` is slower, less sure, or cannot be known from here.
    ``hint``: what to type; empty only where nothing is to be done.
    """

    subject: str
    state: State
    found: str
    hint: str = ""


def judged(subject: str, work: Callable[[], str]) -> Finding:
    """What ``work`` says of itself, or the error that a run would end with at once.

    Example:
        >>> judged("data", lambda: "300 rows")
        Finding(subject='data', state='ok', found='300 rows', hint='')
    """
    try:
        return Finding(subject, "ok", work())
    except (IsotrainError, SpecError, LaunchError) as error:
        return Finding(subject, "fault", str(error), getattr(error, "hint", ""))
