"""One launch at a time in a run folder, on one machine and over several that share the folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from launch.environment import scheduler_job
from orchestrator.errors import ConfigError

BEAT_S = 5.0  # a holder touches its lock this often
LEASE_S = 20.0  # a holder on another host that has not touched it for so long is gone
OLD_S = 600.0  # so old is no clock's error


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. ``job``: the scheduler's name of it, or the process; ``token``: different for each hold."""

    host: str
    job: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"{self.job} on {self.host}, since {self.since}"


@contextlib.contextmanager
def locked(run_dir: Path, lease_s: float = LEASE_S, beat_s: float = BEAT_S) -> Iterator[None]:
    """Hold a run folder, so that two launches do not train in it at once; the lock ends with this process.

    On one machine the kernel knows whether a holder lives. On a folder that several machines share, where its locks
    may not reach, the file says who holds it and is touched every ``beat_s``: a holder elsewhere that has not done so
    for ``lease_s`` is gone, and its lock is taken over.

    Raises:
        ConfigError: another launch holds it; names it.
    """
    path = run_dir / ".lock"
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(run_dir, read_holder(run_dir)) from error
        holder = read_holder(run_dir)
        me = _me()
        if holder is not None and not _is_gone(holder, me) and _beats(path, lease_s):
            raise _taken(run_dir, holder)
        _write(stream, json.dumps(asdict(me)))
        done = threading.Event()
        beating = threading.Thread(target=_beat, args=(path, beat_s, done), daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join()
            if read_holder(run_dir) == me:
                _write(stream, "")


def read_holder(run_dir: Path) -> Holder | None:
    """Who holds a run folder, or held it when its process was killed; None when nobody does."""
    try:
        return Holder(**json.loads((run_dir / ".lock").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def still_mine(run_dir: Path) -> Callable[[], None]:
    """A check that nobody has taken the folder over since now: a launch that hung may have been taken for dead.

    Returns:
        A function that raises ConfigError, naming the new holder.
    """
    before = read_holder(run_dir)

    def check() -> None:
        now = read_holder(run_dir)
        if now is not None and now != before:
            raise _taken(run_dir, now)

    return check


def _me() -> Holder:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Holder(socket.gethostname(), scheduler_job() or f"process {os.getpid()}", since, secrets.token_hex(8))


def _taken(run_dir: Path, holder: Holder | None) -> ConfigError:
    who = f" ({holder})" if holder is not None else ""
    return ConfigError(f"another isotrain is training in {run_dir}{who}", "wait for it, or run_dir=ANOTHER")


def _is_gone(holder: Holder, me: Holder) -> bool:
    """Whether the holder cannot live: the kernel gave its lock to us, or its scheduler has started its job anew."""
    return holder.host == me.host or (bool(scheduler_job()) and holder.job == me.job)


def _beats(path: Path, lease_s: float) -> bool:
    """Whether somebody touches the file within the lease."""
    first = path.stat().st_mtime_ns
    if time.time() - first / 1e9 > OLD_S:
        return False
    deadline = time.monotonic() + lease_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, lease_s / 4))
        if path.stat().st_mtime_ns != first:
            return True
    return False


def _beat(path: Path, beat_s: float, done: threading.Event) -> None:
    while not done.wait(beat_s):
        with contextlib.suppress(OSError):  # a disk that is away for a moment; it is tried again
            os.utime(path)


def _write(stream: IO[str], text: str) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
