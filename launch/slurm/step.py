"""One srun step, one task per rank: started, watched for silence, asked to stop, ended, and explained."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO

from launch.beat import STOP, wish
from launch.environment import child_environment
from launch.exits import INTERRUPTED, PEER_LOST, RankExit, clear_exits, explain_end, read_exits
from launch.parent import dying_with_parent
from launch.slurm.allocation import Allocation
from launch.slurm.commands import SlurmError, end_steps
from launch.states import clear_states, rank_pids
from launch.stop import WARNINGS
from launch.watch import USUAL, Hang, Patience, Watch

# "srun: error: node2: task 2: Killed", "srun: error: node1: tasks 0-1,3: Exited with exit code 70"
TASK_ENDED = re.compile(r"^srun: error: (?P<node>[^\s:]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$")
EXITED = re.compile(r"Exited with exit code (\d+)")
SIGNALS = {signal.strsignal(number): -number for number in signal.valid_signals()}
OUT_OF_MEMORY = ": Out Of Memory"
POLL_S = 0.2
ENDING_S = 20.0


@dataclass(frozen=True)
class StepRequest:
    """``hosts``: the nodes to use, in Slurm's order. ``program``: one rank's argv. ``environment``: added to ours.

    ``device``: what ranks compute on, ``cpu`` or ``cuda``.
    """

    allocation: Allocation
    hosts: tuple[str, ...]
    ranks_per_node: int
    program: tuple[str, ...]
    environment: Mapping[str, str]
    run_dir: Path
    patience: Patience = USUAL
    device: str = "cpu"

    @property
    def world_size(self) -> int:
        """How many ranks are started."""
        return len(self.hosts) * self.ranks_per_node

    def host_of(self, rank: int) -> str:
        """The node that a rank runs on."""
        return self.hosts[rank // self.ranks_per_node]


@dataclass(frozen=True)
class StepResult:
    """How a step ended: the first cause (None when all is done), and the node it was seen on where that is known."""

    cause: RankExit | None
    node: str = ""

    @property
    def code(self) -> int:
        """The exit code of the first cause."""
        return self.cause.code if self.cause else 0


class Signals:
    """Which signals asked this process to stop, in order. Make it on the main thread, before anything is started."""

    def __init__(self, numbers: Iterable[signal.Signals] = (signal.SIGTERM, *WARNINGS, signal.SIGINT)) -> None:
        self.heard: list[signal.Signals] = []
        for number in numbers:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.heard.append(signal.Signals(number))


def srun_command(request: StepRequest) -> tuple[str, ...]:
    """The srun command: ranks in the order of nodes, a node's cores dealt out among its ranks.

    Ranks that end do not end the others: that is decided here, after their last words.
    """
    given, per_node = request.allocation, request.ranks_per_node
    cores = max(1, given.cpus_per_node // per_node)
    layout = [f"--ntasks={request.world_size}", f"--ntasks-per-node={per_node}", f"--cpus-per-task={cores}"]
    if per_node > given.cpus_per_node:
        layout.append("--overcommit")
    if given.gpus_per_node:  # of a whole node (--exclusive) a step gets the GPUs only where it asks for them
        layout.append(f"--gres=gpu:{given.gpus_per_node}")
    nodes = (f"--nodes={len(request.hosts)}", f"--nodelist={','.join(request.hosts)}", "--distribution=block")
    ends = ("--kill-on-bad-exit=0", "--wait=0", "--input=none", "--export=ALL", "--mpi=none", "--job-name=ranks")
    return ("srun", *nodes, *layout, *ends, *request.program)


def run_step(
    request: StepRequest, signals: Signals, progress: Callable[[], object], say: Callable[[str], None]
) -> StepResult:
    """Start the ranks and wait until all have ended; the first cause is found as in a launch on one machine.

    Args:
        request: what to start, and where.
        signals: a signal heard here asks all ranks to stop after their step and save.
        progress: anything that changes when a step is done.
        say: tells the user something, in one line.
    """
    clear_exits(request.run_dir)
    clear_states(request.run_dir)
    asked = len(signals.heard)
    wish(request.run_dir, STOP if asked else "")
    process = subprocess.Popen(
        srun_command(request),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=child_environment(request.environment),
        preexec_fn=dying_with_parent(signal.SIGTERM),
        start_new_session=True,
    )
    step, watch = _Step(request, process), Watch(request.run_dir, request.patience, progress)
    hung: Hang | None = None
    while process.poll() is None and hung is None:
        if len(signals.heard) > asked:
            say(f"{signals.heard[-1].name}: stopping after this step and saving")
            asked = len(signals.heard)
            wish(request.run_dir, STOP)
            if not rank_pids(request.run_dir):
                break  # no rank is up yet: there is nothing to save
        if step.someone_failed_for(request.patience.last_words_s):
            break
        hung = watch.hang()
        time.sleep(POLL_S)
    step.end()
    clear_states(request.run_dir)
    return _result(request, step, hung, stopped=bool(asked))


class _Step:
    """Hears what srun says and what ranks leave behind while a step runs."""

    def __init__(self, request: StepRequest, process: subprocess.Popen[bytes]) -> None:
        self.codes: dict[int, int] = {}
        self.nodes: dict[int, str] = {}
        self.said: list[str] = []
        self._request = request
        self._process = process
        self.out_of_memory = False
        self._failed_at: float | None = None
        self._ending = False
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), name="srun", daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        """Pass on what ranks and srun say, into ``logs/launcher.log`` too; remember which tasks ended and how."""
        log = self._request.run_dir / "logs" / "launcher.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as copy:
            for raw in stream:
                line = raw.decode(errors="backslashreplace")
                copy.write(line)
                copy.flush()
                sys.stderr.write(line)
                sys.stderr.flush()
                if line.startswith("srun: ") and not self._ending:
                    self._note(line.rstrip())

    def _note(self, line: str) -> None:
        self.said.append(line)
        self.out_of_memory |= line.endswith(OUT_OF_MEMORY)
        for task, code, node in tasks_ended(line):
            self.codes.setdefault(task, code)
            self.nodes.setdefault(task, node)

    def someone_failed_for(self, seconds: float) -> bool:
        """Whether a rank has ended badly (done, or interrupted and saved, is well) that long ago."""
        now = time.monotonic()
        if self._failed_at is None:
            bad = any(value.code not in (0, INTERRUPTED) for value in read_exits(self._request.run_dir).values())
            if bad or any(code not in (0, INTERRUPTED) for code in dict(self.codes).values()):
                self._failed_at = now
        return self._failed_at is not None and now - self._failed_at > seconds

    def end(self) -> None:
        """End what is left of the step: srun answers SIGTERM by killing its tasks."""
        if self._process.poll() is None:
            self._ending = True
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                self._process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=ENDING_S)
                    break
        if self._process.wait() < 0:  # killed, so nobody has ended its tasks: two of each rank would train
            self._end_tasks()
        self._reader.join(timeout=ENDING_S)

    def _end_tasks(self) -> None:
        deadline = time.monotonic() + ENDING_S
        while time.monotonic() < deadline:
            with suppress(SlurmError):
                if not end_steps(self._request.allocation.job_id):
                    return
            time.sleep(POLL_S)


def tasks_ended(line: str) -> list[tuple[int, int, str]]:
    """Which tasks srun says have ended badly: rank, code (minus the signal's number), node.

    Example:
        >>> tasks_ended("srun: error: node2: tasks 2-3,5: Exited with exit code 7")
        [(2, 7, 'node2'), (3, 7, 'node2'), (5, 7, 'node2')]
        >>> tasks_ended("srun: error: node1: task 0: Killed")
        [(0, -9, 'node1')]
    """
    found = TASK_ENDED.match(line)
    if found is None:
        return []
    exited = EXITED.match(found["how"])
    code = int(exited[1]) if exited else SIGNALS.get(found["how"].removesuffix(" (core dumped)"), -signal.SIGKILL)
    tasks: list[int] = []
    for part in found["tasks"].split(","):
        first, _, last = part.partition("-")
        tasks += range(int(first), int(last or first) + 1)
    return [(task, code, found["node"]) for task in tasks]


def _result(request: StepRequest, step: _Step, hung: Hang | None, stopped: bool) -> StepResult:
    if hung is not None:
        node = _node_of(request, hung)
        return StepResult(replace(hung.exit, message=f"{hung.exit.message} ({node})") if node else hung.exit, node)
    exits, codes = read_exits(request.run_dir), step.codes
    if not exits and not codes and not stopped and step.said:
        words = re.sub(r"^srun: (error: )?", "", step.said[0])
        hint = f"see {request.run_dir / 'logs' / 'launcher.log'}"
        return StepResult(RankExit(0, PEER_LOST, "Launcher", f"srun: {words}", hint, None, time.time()))
    cause = explain_end(request.run_dir, request.world_size, codes, stopped=stopped, out_of_memory=step.out_of_memory)
    node = step.nodes.get(cause.rank, "") if cause else ""
    return StepResult(replace(cause, message=f"{cause.message} ({node})") if cause and node else cause, node)


def _node_of(request: StepRequest, hung: Hang) -> str:
    """The node that a launch hangs for; empty where that is not known.

    Ranks on GPUs run ahead of them: one that waits for its own GPU, which waits for others, seems to wait for nobody.
    """
    if request.device != "cpu" and hung.exit.cause != "Silent":
        return ""
    rank = hung.culprit(request.world_size)
    return request.host_of(rank) if rank is not None else ""
