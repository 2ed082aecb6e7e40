"""Errors that a user sees, and the exit codes that they end with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell, sbatch and the launcher learn from a finished command."""

    DONE = 0
    RED = 1
    CONFIG = 64
    DATA = 65
    INTERNAL = 70
    RESOURCES = 71
    INTERRUPTED = 85
    PEER_LOST = 86
    GAVE_UP = 93
    ABORTED = 130


class IsotrainError(Exception):
    """A problem with numbers, config keys and a hint that works if typed."""

    code = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def render(self) -> str:
        """The text for a terminal: the message and, below it, the hint."""
        return f"{self}\nhint: {self.hint}" if self.hint else str(self)


class ConfigError(IsotrainError):
    """The user's configuration cannot work (64)."""

    code = ExitCode.CONFIG


class DataError(IsotrainError):
    """Data or a checkpoint is corrupt, truncated or missing (65)."""

    code = ExitCode.DATA


class ResourceError(IsotrainError):
    """No memory or no disk space is left (71)."""

    code = ExitCode.RESOURCES


class Interrupted(IsotrainError):
    """The run was asked to stop and has saved: requeue it (85)."""

    code = ExitCode.INTERRUPTED


class PeerLost(IsotrainError):
    """Another rank died: restart the run (86)."""

    code = ExitCode.PEER_LOST


class Rewound(IsotrainError):
    """The run goes back to its newest checkpoint: restart it (86)."""

    code = ExitCode.PEER_LOST


class GaveUp(IsotrainError):
    """Going on makes no sense: do not requeue (93)."""

    code = ExitCode.GAVE_UP
