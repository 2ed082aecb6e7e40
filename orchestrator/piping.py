"""A reader of standard output that leaves early, as ``head`` does: no fault, and no lost peer."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

UNREAD = 128 + signal.SIGPIPE  # as a shell counts a process that ended by the signal


def until_unread(work: Callable[[], int]) -> int:
    """Do the work; its exit code, or 141 once nobody reads standard output any more."""
    try:
        code = work()
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        rich_left = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
        if not rich_left and not (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return UNREAD
    return code


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
