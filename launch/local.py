"""Starts the ranks of one machine, waits for them, passes on the wish to stop, and finds out why they ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.beat import wish
from launch.environment import TERMINAL_VARIABLE, child_environment
from launch.exits import (
    INTERNAL,
    INTERRUPTED,
    PEER_LOST,
    RUN_AGAIN,
    RankExit,
    clear_exits,
    explain_end,
    read_exits,
)
from launch.parent import dying_with_parent
from launch.request import Rendered
from launch.states import clear_states, rank_pids, signal_ranks
from launch.stop import WARNINGS
from launch.watch import USUAL, Patience, Watch

ABORTED = 130
ORPHAN_GRACE_S = 5.0
FAILED_RANK = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
ALSO_FAILED = re.compile(r"\(local_rank: (\d+)\)\s+exitcode\s*:\s*(-?\d+)")  # in torchrun's closing table


@dataclass(frozen=True)
class LaunchResult:
    """How a launch ended: the code for the shell, and the first cause (None when all is done).

    ``stopped``: the user had asked it to stop.
    """

    code: int
    cause: RankExit | None
    stopped: bool = False


class Stops:
    """How often the user asked to stop: Ctrl-C, SIGTERM and SIGHUP count alike.

    A scheduler's warning asks once, and what is said after it is not impatience: the end of the time limit, mostly.
    """

    def __init__(self) -> None:
        self._warned = False
        self._asked = 0

    @property
    def count(self) -> int:
        """1: finish the step and save; 2: end at once."""
        return max(self._asked, int(self._warned))

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self._warned |= number in WARNINGS
        self._asked += number not in WARNINGS


def launch(
    rendered: Rendered,
    run_dir: Path,
    world_size: int,
    say: Callable[[str], None],
    patience: Patience = USUAL,
    progress: Callable[[], object] = lambda: None,
) -> LaunchResult:
    """Start a rendered command and wait until all its ranks have ended.

    The first Ctrl-C asks the ranks to stop after a step and save (85); the second kills them (130). torchrun's own
    words go to ``logs/launcher.log``. Ranks live in a session of their own, so a Ctrl-C reaches them only through us.

    Args:
        rendered: from :func:`launch.launcher.render`.
        run_dir: the run folder; exits and states of an earlier launch are removed from it first.
        world_size: how many ranks there will be.
        say: tells the user something, in one line.
        patience: how long ranks may be silent, or do no step.
        progress: anything that changes when a step is done.
    """
    clear_exits(run_dir)
    clear_states(run_dir)
    wish(run_dir, "")
    log = run_dir / "logs" / "launcher.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if rendered.warning:
        say(rendered.warning)
    kills_before = _out_of_memory_kills()
    watch = Watch(run_dir, patience, progress)
    with catching_stops() as stops, log.open("w", encoding="utf-8") as stream:
        process = _start(rendered, stream.fileno())
        ending = _wait(process, run_dir, stops, watch, say)
        _end_orphans(run_dir, at_once=ending is not None)
    if ending is not None:
        return ending
    out_of_memory = _out_of_memory_kills() > kills_before
    return _result(run_dir, world_size, process.returncode, log, stops.count > 0, out_of_memory)


def _start(rendered: Rendered, log: int) -> subprocess.Popen[bytes]:
    """Ranks get our standard error as their standard input: the only way past torchrun that shares its file offset."""
    environment = dict(rendered.environment) | {TERMINAL_VARIABLE: "0"}
    return subprocess.Popen(
        rendered.argv,
        stdin=2,
        stdout=log,
        stderr=log,
        env=child_environment(environment),
        start_new_session=True,
        preexec_fn=dying_with_parent(signal.SIGTERM),  # safe: the launcher has no threads
    )


def _wait(
    process: subprocess.Popen[bytes], run_dir: Path, stops: Stops, watch: Watch, say: Callable[[str], None]
) -> LaunchResult | None:
    """Wait for the end; a result where everything was killed, because the user insisted or a rank hangs."""
    heard = 0
    while True:
        try:
            process.wait(timeout=0.2)
            return None
        except subprocess.TimeoutExpired:
            pass
        if stops.count >= 2:
            say("killing all ranks")
            _kill_all(process, run_dir)
            return LaunchResult(ABORTED, None, stopped=True)
        if (hung := watch.hang()) is not None:
            _kill_all(process, run_dir)
            return LaunchResult(hung.exit.code, hung.exit, stopped=heard > 0)
        if stops.count > heard:
            heard = stops.count
            say("stopping after this step and saving; press Ctrl-C again to end at once without saving")
            if not signal_ranks(run_dir, signal.SIGTERM):
                _signal_group(process, signal.SIGTERM)  # no rank is up yet: there is nothing to save


def _kill_all(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    _kill_tree(process)
    signal_ranks(run_dir, signal.SIGKILL)
    process.wait()


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its descendants; torchrun gives each rank a session of its own, so a group is not enough."""
    process.send_signal(signal.SIGSTOP)  # so that it starts nothing meanwhile
    family = [process.pid]
    for parent in family:
        family += _children(parent)
    for pid in reversed(family):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _children(parent: int) -> list[int]:
    """Direct children, from /proc; none where there is no /proc."""
    children = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # "pid (name) state ppid ...": the name may hold spaces and brackets, see proc(5)
            if int(file.read_text().rpartition(")")[2].split()[1]) == parent:
                children.append(int(file.parent.name))
    return children


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end_orphans(run_dir: Path, at_once: bool) -> None:
    """End ranks that outlived the agent that started them."""
    if not at_once and signal_ranks(run_dir, signal.SIGTERM):
        deadline = time.monotonic() + ORPHAN_GRACE_S
        while _living(run_dir) and time.monotonic() < deadline:
            time.sleep(0.05)
    signal_ranks(run_dir, signal.SIGKILL)
    clear_states(run_dir)


def _living(run_dir: Path) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in rank_pids(run_dir).values())


@contextmanager
def catching_stops() -> Iterator[Stops]:
    """While open, signals that ask to stop are counted instead of ending this process.

    Under nohup a lost terminal (SIGHUP) asks nothing.
    """
    stops = Stops()
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    before = {
        number: signal.signal(number, stops.note) for number in (signal.SIGINT, signal.SIGTERM, *hangup, *WARNINGS)
    }
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(
    run_dir: Path, world_size: int, return_code: int, log: Path, stopped: bool, out_of_memory: bool
) -> LaunchResult:
    codes = {0: return_code} if world_size == 1 else _codes_in(log)
    heard = stopped or codes or read_exits(run_dir)
    if return_code > 0 and not heard:
        hint = f"see {log}"
        cause = RankExit(0, INTERNAL, "Launcher", f"torchrun ended with code {return_code}", hint, None, time.time())
        return LaunchResult(cause.code, cause, stopped)
    first = explain_end(run_dir, world_size, codes, stopped=stopped, out_of_memory=out_of_memory)
    if world_size > 1 and return_code < 0 and not stopped and first is not None and first.code == INTERRUPTED:
        # Nobody has asked the ranks to stop: they were, because the one that started them was killed.
        words = f"torchrun was killed by {signal.Signals(-return_code).name}"
        first = RankExit(first.rank, PEER_LOST, "Launcher", words, RUN_AGAIN, first.step, time.time())
    return LaunchResult(first.code if first else 0, first, stopped)


def _codes_in(log: Path) -> dict[int, int]:
    """What torchrun saw of the ranks that failed by themselves, by their local rank, which is their rank on one node.

    A peer of a killed rank may end before torchrun looks, and is then the first that failed: so the others count too,
    but for those that torchrun has ended itself (SIGTERM).
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    others = {int(rank): int(code) for rank, code in ALSO_FAILED.findall(text) if int(code) != -signal.SIGTERM}
    return others | {int(rank): int(code) for code, rank in FAILED_RANK.findall(text)}


def _out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory here (cgroup 2), as far as we may know."""
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
