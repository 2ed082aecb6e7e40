"""A polite stop: signals set a flag that the training loop reads between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # what schedulers are asked to send some time before the end


class Stopped(BaseException):
    """This process was asked to stop where there is nothing to finish first; says by which signal."""


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """While open, SIGTERM and a scheduler's warnings raise :class:`Stopped`, unless something else takes them.

    Without it they end the process, with a code that says nothing of going on.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, *WARNINGS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether this process was asked to stop, by SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C.

    The flag is this rank's own: ranks must agree on a step (reduce it) before they act on it. A second Ctrl-C raises
    KeyboardInterrupt. Make it on the main thread, with :meth:`installed`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0

    @classmethod
    def installed(cls) -> StopRequest:
        """The one whose handlers are in place, so that no signal is lost between two callers; else a new one."""
        owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(owner, cls):
            return owner
        request = cls()
        for number in (signal.SIGTERM, *WARNINGS, signal.SIGINT):
            signal.signal(number, request._note)
        return request

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
