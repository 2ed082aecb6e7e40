"""Which processes are a run's ranks: each says so in ``states/rank-N.json`` while it lives."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def state_file(run_dir: Path, rank: int) -> Path:
    """Where a rank says that it lives."""
    return run_dir / "states" / f"rank-{rank}.json"


def told_file(run_dir: Path, rank: int) -> Path:
    """Where a rank says what it does, when it is asked."""
    return run_dir / "states" / f"told-{rank}.txt"


def enter(run_dir: Path, rank: int) -> None:
    """Say that this process is ``rank`` and may be sent SIGTERM: it will stop after a step and save."""
    file = state_file(run_dir, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    about = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
    aside.write_text(json.dumps(about) + "\n", encoding="utf-8")
    aside.replace(file)


def host_of(run_dir: Path, rank: int) -> str:
    """The machine that a living rank is on; empty where it cannot be read."""
    with suppress(OSError, ValueError, KeyError):
        return str(json.loads(state_file(run_dir, rank).read_text(encoding="utf-8"))["host"])
    return ""


def leave(run_dir: Path, rank: int) -> None:
    """Say that this process is no longer a rank."""
    state_file(run_dir, rank).unlink(missing_ok=True)


@contextmanager
def preparing(run_dir: Path, rank: int) -> Iterator[None]:
    """While open, no step is expected of any rank: this one does what all need, such as tokenising, for hours maybe."""
    file = run_dir / "states" / f"preparing-{rank}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def someone_prepares(run_dir: Path) -> bool:
    """Whether a rank is :func:`preparing`."""
    return any((run_dir / "states").glob("preparing-*"))


def clear_states(run_dir: Path) -> None:
    """Forget the processes of an earlier launch."""
    for pattern in ("rank-*.json", "preparing-*", "told-*.txt"):
        for file in (run_dir / "states").glob(pattern):
            file.unlink(missing_ok=True)


def rank_pids(run_dir: Path) -> dict[int, int]:
    """Rank to process id, of the ranks on this machine that have entered and not left."""
    pids = {}
    for file in (run_dir / "states").glob("rank-*.json"):
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            pids[int(value["rank"])] = int(value["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # left or being replaced just now
    return pids


def signal_ranks(run_dir: Path, number: signal.Signals) -> list[int]:
    """Send a signal to every living rank; return the ranks that got it."""
    reached = []
    for rank, pid in sorted(rank_pids(run_dir).items()):
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue
        reached.append(rank)
    return reached
