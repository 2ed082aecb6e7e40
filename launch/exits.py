"""How ranks say why they ended, and how the launcher finds the first cause.

torchrun and srun do not pass on the exit codes of workers, so each rank writes ``exits/rank-N.json``.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

# The codes that this package must tell apart; the orchestrator's ExitCode has the same numbers (a test compares).
INTERNAL, RESOURCES, INTERRUPTED, PEER_LOST = 70, 71, 85, 86
RUN_AGAIN = "run the same command again: it goes on from what is saved"
OWN_CODES = frozenset({1, 64, 65, INTERNAL, RESOURCES, INTERRUPTED, PEER_LOST, 93, 130})


@dataclass(frozen=True)
class RankExit:
    """Why one rank ended. ``step``: optimizer steps completed, None if unknown; ``time``: unix seconds."""

    rank: int
    code: int
    cause: str
    message: str
    hint: str
    step: int | None
    time: float


def exit_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's exit is written.

    Example:
        >>> exit_file(Path("run"), 3).as_posix()
        'run/exits/rank-3.json'
    """
    return run_dir / "exits" / f"rank-{rank}.json"


def write_exit(
    run_dir: Path, rank: int, code: int, *, cause: str, message: str = "", hint: str = "", step: int | None = None
) -> None:
    """Write a rank's exit, whole or not at all.

    ``cause``: one word, such as ``done``, ``ConfigError`` or ``PeerLost``.
    """
    file = exit_file(run_dir, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    value = RankExit(rank, int(code), cause, message, hint, step, time.time())
    aside.write_text(json.dumps(asdict(value)) + "\n", encoding="utf-8")
    aside.replace(file)


def read_exits(run_dir: Path) -> dict[int, RankExit]:
    """All exits of a run folder by rank; files that are no exits are left out."""
    exits = {}
    for file in sorted((run_dir / "exits").glob("rank-*.json")):
        try:
            value = RankExit(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            continue
        exits[value.rank] = value
    return exits


def clear_exits(run_dir: Path) -> None:
    """Forget the exits of an earlier launch."""
    for file in (run_dir / "exits").glob("rank-*.json"):
        file.unlink()


def first_cause(exits: Mapping[int, RankExit], silent: Mapping[int, RankExit] | None = None) -> RankExit | None:
    """The exit that explains the others, or None when every rank is done.

    A rank that failed for a reason of its own comes first, the earliest of them; then a rank that died without a
    word (``silent``); then an interruption; a lost peer counts only when there is nothing else.

    Example:
        >>> lost = RankExit(0, 86, "PeerLost", "rank 1 is gone", "", 4, 10.0)
        >>> failed = RankExit(1, 65, "DataError", "row 3", "", 4, 11.0)
        >>> first_cause({0: lost, 1: failed}).rank
        1
    """
    failed = sorted((value for value in exits.values() if value.code), key=lambda value: value.time)
    own = [value for value in failed if value.code not in (INTERRUPTED, PEER_LOST)]
    unheard = sorted((silent or {}).values(), key=lambda value: value.rank)
    interrupted = [value for value in failed if value.code == INTERRUPTED]
    lost = [value for value in failed if value.code == PEER_LOST]
    return next(iter([*own, *unheard, *interrupted, *lost]), None)


def explain_end(
    run_dir: Path, world_size: int, codes: Mapping[int, int], *, stopped: bool, out_of_memory: bool
) -> RankExit | None:
    """Why a launch ended, from what its ranks have said and from what the one that started them saw.

    Args:
        run_dir: the run folder.
        world_size: how many ranks there were.
        codes: what processes ended with, minus the signal's number when a signal ended one; the first of them only.
        stopped: the ranks were asked to stop.
        out_of_memory: the kernel counted an out-of-memory kill while the ranks ran.
    """
    exits = read_exits(run_dir)
    unheard = set(range(world_size)) - set(exits)
    if stopped and not exits:
        return RankExit(0, INTERRUPTED, "Interrupted", "stopped before the first step", "", None, time.time())
    # Those that were seen to fail come before those that were then ended.
    silent = {rank: silent_exit(rank, codes.get(rank), out_of_memory) for rank in unheard & set(codes) or unheard}
    return first_cause(exits, silent)


def silent_exit(rank: int, return_code: int | None, out_of_memory: bool) -> RankExit:
    """The exit of a rank that wrote none, as far as its process tells.

    Args:
        rank: the global rank.
        return_code: what the process ended with; minus the signal's number when a signal ended it; None if unknown.
        out_of_memory: the kernel counted an out-of-memory kill while the ranks ran.
    Returns:
        71 when memory ran out, 70 when the process crashed by itself, the rank's own code where it has one of ours,
        else 86: someone killed it, and a restart may help.
    Example:
        >>> silent_exit(2, -9, out_of_memory=False).message
        'rank 2 was killed by SIGKILL and left no word'
        >>> [silent_exit(0, code, False).code for code in (-9, -11, -6, 71, None)]
        [86, 70, 70, 71, 86]
    """
    how = "ended and left no word"
    if return_code is not None and return_code < 0:
        how = f"was killed by {_signal_name(-return_code)} and left no word"
    elif return_code:
        how = f"ended with code {return_code} and left no word"
    hint = f"see logs/rank-{rank}.log in the run folder"
    if out_of_memory and return_code in (None, -signal.SIGKILL):
        return _silent(
            rank,
            RESOURCES,
            "OutOfMemory",
            f"rank {rank} {how}: the kernel was out of memory",
            "batch.micro_sequences=1",
        )
    crashed = return_code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL)
    if crashed:
        return _silent(rank, INTERNAL, "Crash", f"rank {rank} {how}", hint)
    if return_code is not None and return_code > 0:
        code = return_code if return_code in OWN_CODES else INTERNAL
        return _silent(rank, code, "Unsaid", f"rank {rank} {how}", hint)
    return _silent(rank, PEER_LOST, "Killed", f"rank {rank} {how}", RUN_AGAIN)


def _silent(rank: int, code: int, cause: str, message: str, hint: str) -> RankExit:
    return RankExit(rank, code, cause, message, hint, None, time.time())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
