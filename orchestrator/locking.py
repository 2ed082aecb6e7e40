"""One launch at a time in a run folder, on one machine and over several that share the folder."""

from __future__ import annotations

import contextlib
import errno
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
CONFIRM_S = 1.0
READ_AGAIN, READ_AGAIN_S = 3, 0.5


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
            kernel_knows = _flock(stream)
        except BlockingIOError as error:
            raise _taken(run_dir, read_holder(run_dir)) from error
        holder, me = read_holder(run_dir), _me()
        if holder is not None and not _is_gone(holder, me, kernel_knows) and _beats(path, lease_s):
            raise _taken(run_dir, holder)
        _write(stream, json.dumps(asdict(me)))
        if not kernel_knows or (holder is not None and holder.host != me.host):
            _confirm(run_dir, me)
        done = threading.Event()
        beating = threading.Thread(target=_beat, args=(run_dir, me, beat_s, done), daemon=True)
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
        A function that raises ConfigError, naming the new holder if it is still there. Nothing is checked where nobody
        held the folder.
    """
    before = read_holder(run_dir)

    def check() -> None:
        for _ in range(READ_AGAIN if before is not None else 0):  # a disk may be away for a moment
            now = read_holder(run_dir)
            if now == before:
                return
            time.sleep(READ_AGAIN_S)
        if before is not None:
            raise _taken(run_dir, now)

    return check


def _me() -> Holder:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Holder(socket.gethostname(), scheduler_job() or f"process {os.getpid()}", since, secrets.token_hex(8))


def _taken(run_dir: Path, holder: Holder | None) -> ConfigError:
    who = f" ({holder})" if holder is not None else ""
    return ConfigError(f"another isotrain is training in {run_dir}{who}", f"wait for it, or run_dir={run_dir}-2")


def _flock(stream: IO[str]) -> bool:
    """Take the kernel's lock; False on a file system that has none. Raises BlockingIOError: another process has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _is_gone(holder: Holder, me: Holder, kernel_knows: bool) -> bool:
    """Whether the holder cannot live: the kernel gave its lock to us, or its scheduler has started its job anew."""
    started_anew = bool(scheduler_job()) and holder.job.split(",")[0] == me.job.split(",")[0] and holder.job != me.job
    return (kernel_knows and holder.host == me.host) or started_anew


def _confirm(run_dir: Path, me: Holder) -> None:
    """See that nobody has written beside us. Raises ConfigError."""
    time.sleep(CONFIRM_S)
    holder = read_holder(run_dir)
    if holder != me:
        raise _taken(run_dir, holder)


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


def _beat(run_dir: Path, me: Holder, beat_s: float, done: threading.Event) -> None:
    while not done.wait(beat_s):
        if read_holder(run_dir) == me:  # else it was taken over, and the beat is another's
            with contextlib.suppress(OSError):  # a disk that is away for a moment; it is tried again
                os.utime(run_dir / ".lock")


def _write(stream: IO[str], text: str) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
