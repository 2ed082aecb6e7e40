"""Several commands of one kind, some at a time, until all have ended or the user asks to stop."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.environment import child_environment
from launch.local import catching_stops
from launch.parent import dying_with_parent

POLL_S = 0.2


@dataclass(frozen=True)
class Task:
    """``log``: what the command says goes there, but for its standard output, which is kept for its end."""

    name: str
    argv: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class TaskEnd:
    """``code``: the exit code, minus the signal's number when a signal ended it. ``said``: its standard output."""

    code: int
    said: str


@dataclass(frozen=True)
class _Running:
    task: Task
    place: int
    process: subprocess.Popen[bytes]
    said: IO[bytes]


def run_tasks(
    tasks: Sequence[Task],
    places: Sequence[Mapping[str, str]],
    began: Callable[[Task], None],
    ended: Callable[[Task, TaskEnd], None],
    say: Callable[[str], None],
) -> int:
    """Run tasks in their order, as many at a time as there are places; returns how often the user asked to stop.

    Each Ctrl-C (SIGTERM and SIGHUP count alike) is passed on to those that run, as SIGTERM, and no other is started.
    Tasks have a session of their own, so that the terminal's Ctrl-C reaches them only through us, and they get a
    SIGTERM when this process is killed.

    Args:
        tasks: what to run.
        places: for each place the variables that its tasks get beside ours.
        began, ended: called when a task starts and ends.
        say: tells the user something, in one line.
    """
    waiting, running, free = deque(tasks), list[_Running](), deque(range(len(places)))
    passed_on = 0
    with catching_stops() as stops:
        while running or (waiting and not stops.count):
            while waiting and free and not stops.count:
                place = free.popleft()
                running.append(_start(waiting.popleft(), place, places[place]))
                began(running[-1].task)
            if stops.count > passed_on:
                passed_on += 1
                say(f"stopping {len(running)} of them" if passed_on == 1 else "ending at once")
                for one in running:
                    one.process.send_signal(signal.SIGTERM)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.place)
                ended(one.task, _end(one))
            time.sleep(POLL_S)
        return stops.count


def _start(task: Task, place: int, environment: Mapping[str, str]) -> _Running:
    said = tempfile.TemporaryFile()  # noqa: SIM115  closed at its end
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        process = subprocess.Popen(
            task.argv,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=log,
            env=child_environment(environment),
            start_new_session=True,
            preexec_fn=dying_with_parent(signal.SIGTERM),  # safe: there are no threads here
        )
    return _Running(task, place, process, said)


def _end(one: _Running) -> TaskEnd:
    with one.said as stream:
        stream.seek(0)
        return TaskEnd(one.process.returncode, stream.read().decode(errors="replace"))
