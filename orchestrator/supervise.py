"""The edge around everything that can fail: errors become exit codes, words and hints; a rank leaves its exit file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.beat import start_beating
from launch.environment import LaunchError, terminal_descriptor
from launch.exits import RUN_AGAIN, write_exit
from launch.output import redirect
from launch.states import enter, leave
from launch.stop import StopRequest
from orchestrator.errors import ExitCode, IsotrainError
from orchestrator.telling import tell
from parallel.specs import SpecError

BEAT_S = 2.0  # between two signs of life of a rank
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|std::bad_alloc", re.IGNORECASE)
LOST_PEER = re.compile(
    r"connection (closed|reset)|broken pipe|connection refused|connectFullMesh|timed out waiting|timed out after"
    r"|socket (closed|timeout)|remote process exited|failed to recv|recvValue failed",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Explanation:
    """An error as the user sees it. ``unexpected``: our fault, so its traceback is worth keeping."""

    code: int
    cause: str
    message: str
    hint: str = ""
    unexpected: bool = False

    def render(self) -> str:
        """The text for a terminal."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


def explain(error: BaseException) -> Explanation:
    """Which code, words and hint an error ends with.

    Example:
        >>> from orchestrator.errors import ConfigError
        >>> explain(ConfigError("steps=0 should be at least 1", "steps=1")).code
        64
        >>> [int(explain(error).code) for error in (MemoryError(), KeyError("x"), KeyboardInterrupt())]
        [71, 70, 130]
    """
    cause, message = type(error).__name__, str(error)
    if isinstance(error, IsotrainError):
        return Explanation(int(error.code), cause, message, error.hint, unexpected=error.code == ExitCode.INTERNAL)
    if isinstance(error, SpecError | LaunchError) or (isinstance(error, ValueError) and hasattr(error, "hint")):
        return Explanation(ExitCode.CONFIG, cause, message, getattr(error, "hint", ""))
    if isinstance(error, KeyboardInterrupt):
        return Explanation(ExitCode.ABORTED, cause, "stopped at once, without saving")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(message)):
        first = message.splitlines()[0] if message else "an allocation failed"
        return Explanation(
            ExitCode.RESOURCES,
            "OutOfMemory",
            f"out of memory: {first}",
            "batch.micro_sequences=1  or  memory.recompute=full",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Explanation(ExitCode.RESOURCES, "NoSpace", _no_space(error), "free some space, or run_dir=ELSEWHERE")
    if _is_lost_peer(error):
        first = message.splitlines()[0]
        return Explanation(ExitCode.PEER_LOST, "PeerLost", f"another rank is gone: {first}", RUN_AGAIN)
    return Explanation(ExitCode.INTERNAL, cause, f"{cause}: {message}".rstrip(": "), unexpected=True)


def _is_lost_peer(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"DistNetworkError", "DistStoreError", "DistBackendError"}:
        return True
    return isinstance(error, RuntimeError | ConnectionError) and bool(LOST_PEER.search(str(error)))


def _no_space(error: OSError) -> str:
    if not error.filename:
        return str(error.strerror)  # which disk is not known
    place = Path(os.fsdecode(error.filename))
    existing = next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))
    free_mib = shutil.disk_usage(existing).free / 2**20
    return f"{error.strerror} at {place} ({free_mib:.0f} MiB free there)"


def outcome(work: Callable[[], int], say: Callable[[Explanation], None]) -> int:
    """Run a command; an error is said with its hint, on one screen, and becomes the exit code.

    The traceback of an error that is our fault goes to a file, and the path is said.
    """
    try:
        return int(work())
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the outermost edge
        explanation = explain(error)
        if explanation.unexpected:
            explanation = _with_traceback(explanation, error)
        say(explanation)
        return int(explanation.code)


def _with_traceback(explanation: Explanation, error: BaseException) -> Explanation:
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="isotrain-", suffix=".txt", delete=False) as file:
            file.write(text)
        hint = f"this is a fault of isotrain; please report it with the traceback in {file.name}"
    except OSError:
        hint = f"this is a fault of isotrain; please report it:\n{text}"
    return Explanation(explanation.code, explanation.cause, explanation.message, explanation.hint or hint, True)


def guarded(run_dir: Path, rank: int, work: Callable[[], int]) -> int:
    """The life of one rank: output to its log, signals that ask to stop, its work, and its exit file.

    Args:
        run_dir: the run folder.
        rank: the global rank.
        work: returns an exit code, or raises; what it raises is written to the log and into ``exits/rank-N.json``.
    Returns:
        The exit code. Leave the process with :func:`leave_process`, because threads of a broken process group may
        hang in an orderly exit.
    """
    launched = terminal_descriptor()
    redirect(run_dir, rank, launched)
    stop = StopRequest.installed()
    enter(run_dir, rank)
    start_beating(run_dir, rank, BEAT_S, stop, tell)
    try:
        explanation = orderly_end(rank, int(work()))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the outermost edge of a rank
        explanation = explain(error)
        print("".join(traceback.format_exception(error)), file=sys.__stderr__, flush=True)
        if rank == 0 and launched is None:  # by hand: there is no launcher that will say it
            print(explanation.render(), file=sys.stderr, flush=True)
    try:
        leave_word(run_dir, rank, explanation)
    finally:
        leave(run_dir, rank)
    return int(explanation.code)


def orderly_end(rank: int, code: int) -> Explanation:
    """What a rank says whose work has returned an exit code.

    Example:
        >>> orderly_end(1, 85).message
        'rank 1 ended with code 85 (interrupted)'
    """
    name = ExitCode(code).name.lower() if code in list(ExitCode) else "unknown"
    return Explanation(code, name, "" if code == 0 else f"rank {rank} ended with code {code} ({name})")


def leave_word(run_dir: Path, rank: int, explanation: Explanation) -> None:
    """Write a rank's exit file; where that fails there is no one to tell but the log."""
    hint = explanation.hint or (f"see logs/rank-{rank}.log in the run folder" if explanation.unexpected else "")
    try:
        write_exit(
            run_dir,
            rank,
            explanation.code,
            cause=explanation.cause,
            message=explanation.message,
            hint=hint,
            step=last_logged_step(run_dir / "metrics.jsonl"),
        )
    except OSError as error:  # no space even for this: the launcher goes by the process's code
        print(f"the exit file could not be written: {error}", file=sys.__stderr__, flush=True)


def last_logged_step(metrics: Path) -> int | None:
    """The step of the last whole line of a metrics file; None when there is none."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            lines = stream.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def leave_process(code: int) -> None:
    """End this process with ``code``; after a failure without waiting for threads that wait for lost peers."""
    for stream in (sys.stdout, sys.stderr, sys.__stderr__):
        if stream is not None:
            stream.flush()
    if code:
        os._exit(code)
    raise SystemExit(code)
