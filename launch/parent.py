"""A child that does not outlive its parent, so that nothing trains on unseen when a launcher is killed."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def dying_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """What a new process calls to get a signal when its parent ends in whatever way; None where there is no such thing.

    SIGTERM lets ranks save first.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, int(number))


def die_with_parent(number: signal.Signals) -> None:
    """Have this process get a signal when the one that started it ends, where there is such a thing."""
    ask = dying_with_parent(number)
    if ask is not None:
        ask()
