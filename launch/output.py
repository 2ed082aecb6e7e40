"""Where a rank's output goes: everything into ``logs/rank-N.log``, and the first rank's own words to the user too."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

CLEAR_LINE = "\r\x1b[2K"


class Tee(io.TextIOBase):
    """A text stream into a log and onto a terminal; on a real terminal a line of progress is cleared first."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        super().__init__()
        self.terminal = terminal
        self.log = log
        self._at_line_start = True

    def write(self, text: str) -> int:
        """Write to both; a terminal that went away is no reason to stop training."""
        self.log.write(text)
        try:
            if text and self._at_line_start and self.terminal.isatty():
                self.terminal.write(CLEAR_LINE)
            self.terminal.write(text)
            self.terminal.flush()
        except OSError:
            pass
        self._at_line_start = text.endswith("\n") or (self._at_line_start and not text)
        return len(text)

    def flush(self) -> None:
        """Flush the log; the terminal is never behind."""
        self.log.flush()

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        return self.terminal.isatty()


def redirect(run_dir: Path, rank: int, terminal_descriptor: int | None) -> None:
    """Send this process's output to its log file, what C and C++ libraries print included.

    On rank 0 ``sys.stderr`` becomes a :class:`Tee`, so that what Python code says there reaches the user as well:
    on the launcher's standard error (``terminal_descriptor``), or on this process's own when it was started by hand.
    """
    file = run_dir / "logs" / f"rank-{rank}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    shown_on = 2 if terminal_descriptor is None else terminal_descriptor
    terminal = os.fdopen(os.dup(shown_on), "w", buffering=1, errors="backslashreplace") if rank == 0 else None
    if terminal_descriptor == 0:  # torchrun hands on nothing but 0, 1 and 2, so the launcher's words go through 0
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    stream.write(f"--- rank {rank}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
    logging.basicConfig(stream=stream, level=logging.WARNING)
    logging.captureWarnings(True)
    if terminal is not None:
        sys.stderr = Tee(terminal, stream)
