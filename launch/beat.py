"""Signs of life: each rank touches its state file from a thread, and learns there that it is asked to stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch.states import state_file, told_file
from launch.stop import StopRequest

STOP, TELL = "stop", "tell"


def wish_file(run_dir: Path) -> Path:
    """Where the launcher writes what it wants of the ranks.

    It is there from the start: opening a file that is there asks the file server anew, while the absence of one may be
    remembered for a minute (NFS).
    """
    return run_dir / "states" / "wish"


def wish(run_dir: Path, word: str) -> None:
    """Tell all ranks ``stop``, or ask what they do (``tell``); an empty word before they start.

    Written in place, for the same reason.
    """
    file = wish_file(run_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(word, encoding="utf-8")


def start_beating(run_dir: Path, rank: int, every_s: float, stop: StopRequest, tell: Callable[[], str]) -> None:
    """Touch this rank's state file every ``every_s`` seconds until the process ends, and hear the launcher's wishes.

    A process that is stopped, or that holds the interpreter for good, beats no more; one that waits for a peer does.
    ``tell`` says what the process does, in a line.
    """

    def beat() -> None:
        while True:
            with suppress(OSError):  # it has left, or the file server is away: the next beat counts
                os.utime(state_file(run_dir, rank))
            with suppress(OSError):
                word = wish_file(run_dir).read_text(encoding="utf-8")
                stop.requested |= word == STOP
                if word == TELL and not told_file(run_dir, rank).exists():
                    told_file(run_dir, rank).write_text(tell(), encoding="utf-8")
            time.sleep(every_s)

    threading.Thread(target=beat, name="beat", daemon=True).start()


class Listener:
    """Hears beats: which ranks have been silent for how long, by this machine's clock alone.

    Args:
        run_dir: the run folder.
        clock: seconds, for tests.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = run_dir
        self._clock = clock
        self._heard: dict[int, tuple[int, float]] = {}

    def silent_s(self) -> dict[int, float]:
        """Seconds since the last new sign of each rank that has entered and not left."""
        now = self._clock()
        heard: dict[int, tuple[int, float]] = {}
        for file in (self._run_dir / "states").glob("rank-*.json"):
            with suppress(OSError, ValueError):  # it has left just now
                rank, sign = int(file.stem.removeprefix("rank-")), file.stat().st_mtime_ns
                before = self._heard.get(rank)
                heard[rank] = before if before is not None and before[0] == sign else (sign, now)
        self._heard = heard
        return {rank: now - at for rank, (_, at) in heard.items()}
