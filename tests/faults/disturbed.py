"""A run that something happens to: one command, typed again where it ended, and the time until it trains again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.states import rank_pids
from orchestrator.supervise import last_logged_step
from tests.end_to_end.shell import ISOTRAIN, Folder, Shell, is_alive, wait_for

LIMIT_S = 180.0
"""For an incident to be over: far more than any takes, so that a slow machine is no failure."""
MOST_COMMANDS = 4


@dataclass(frozen=True)
class Recovered:
    """One incident. ``rank``: the one that was hit, or -1; ``recovery_s``: from the fault until a step beyond ``step``,
    the last one that was logged before."""

    kind: str
    rank: int
    step: int
    recovery_s: float


class Disturbed:
    """A run of ``ranks`` ranks on this machine; ``words`` are those of ``isotrain train``."""

    def __init__(self, shell: Shell, words: Sequence[str], run: Folder, ranks: int) -> None:
        self.run = run
        self.codes: list[int] = []
        self._shell = shell
        self._argv = [*ISOTRAIN, "train", *words]
        self._ranks = ranks
        self._seen: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def said(self) -> str:
        """What all commands have said, without the lines of steps."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not line.startswith("step "))

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return last_logged_step(self.run.path / "metrics.jsonl") or 0

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        """The command that runs, or ran last."""
        assert self._process is not None
        return self._process

    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        found = rank_pids(self.run.path)
        self._seen |= set(found.values())
        return found

    def start(self) -> None:
        """Type the command; what it says goes to a file, as a pipe that nobody reads would hold it up."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                cwd=self._shell.folder,
                env=self._shell.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_beyond(self, step: int) -> None:
        """Until all ranks are there and a step after ``step`` is logged; where the command ended it is typed again."""
        for _ in range(MOST_COMMANDS):
            self.wait_until(lambda: self._has_ended() or (self.step > step and len(self.pids()) == self._ranks))
            if self.launcher.poll() is None:
                return
            self.codes.append(self.launcher.returncode)
            self.start()
        raise AssertionError(f"the command ended {MOST_COMMANDS} times with {self.codes}:\n{self.said[-3000:]}")

    def hit(self, kind: str, rank: int, at_random: random.Random) -> Recovered:
        """Let a fault happen to a run that trains, and wait until it trains again beyond where it was."""
        before, step, started = self.pids(), self.step, time.monotonic()
        assert len(before) == self._ranks, f"{len(before)} of {self._ranks} ranks run"
        FAULTS[kind](self, before, rank, at_random)
        self.wait_until(lambda: not any(map(is_alive, before.values())))
        step = max(step, self.step)
        self.wait_beyond(step)
        return Recovered(kind, rank, step, time.monotonic() - started)

    def stop(self) -> int:
        """End it politely; the step that is saved."""
        self.pids()
        self.launcher.send_signal(signal.SIGTERM)
        self.codes.append(self.launcher.wait(LIMIT_S))
        assert self.codes[-1] == 85, self.said[-3000:]
        return int(self.run.latest.removeprefix("step-"))

    def finish(self, limit_s: float = LIMIT_S) -> None:
        """Wait until it is done by itself."""
        self.codes.append(self.launcher.wait(limit_s))
        assert self.codes[-1] == 0, self.said[-3000:]

    def leftovers(self) -> list[str]:
        """What a run must not leave: living processes of ranks, and unfinished folders of checkpoints."""
        alive = [f"process {pid}" for pid in sorted(self._seen) if is_alive(pid)]
        names = sorted(path.name for path in (self.run.path / "checkpoints").iterdir())
        return alive + [name for name in names if name != "latest" and "." in name]

    def kill(self) -> None:
        """End whatever still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # its ranks then end by themselves
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self.run.path.with_name(f"{self.run.path.name}.said")

    def _has_ended(self) -> bool:
        return self.launcher.poll() is not None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something is so; what was said is in the error."""
        try:
            wait_for(condition, LIMIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; the run has said:\n{self.said[-3000:]}") from error


def _signal_rank(number: signal.Signals) -> Callable[[Disturbed, dict[int, int], int, random.Random], None]:
    def send(disturbed: Disturbed, pids: dict[int, int], rank: int, at_random: random.Random) -> None:
        os.kill(pids[rank], number)

    return send


def _kill_two(disturbed: Disturbed, pids: dict[int, int], rank: int, at_random: random.Random) -> None:
    for one in (rank, (rank + 1) % len(pids)):
        os.kill(pids[one], signal.SIGKILL)


def _kill_agent(disturbed: Disturbed, pids: dict[int, int], rank: int, at_random: random.Random) -> None:
    """torchrun's agent is the parent of every rank, and holds the store where they met."""
    parent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])  # see proc(5)
    os.kill(parent, signal.SIGKILL)


def _signal_launcher(number: signal.Signals) -> Callable[[Disturbed, dict[int, int], int, random.Random], None]:
    def send(disturbed: Disturbed, pids: dict[int, int], rank: int, at_random: random.Random) -> None:
        disturbed.launcher.send_signal(number)
        disturbed.launcher.wait(LIMIT_S)

    return send


def _damage(disturbed: Disturbed, pids: dict[int, int], rank: int, at_random: random.Random) -> None:
    """A rank is killed, and before any rank is back the newest checkpoint, where it is not the only one, is damaged."""
    os.kill(pids[rank], signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, pids.values())), LIMIT_S)
    if len(disturbed.run.steps) > 1:
        folder = disturbed.run.path / "checkpoints" / disturbed.run.latest
        at_random.choice((flip_a_bit, cut_short, lose_the_manifest))(folder, at_random)


def flip_a_bit(folder: Path, at_random: random.Random) -> None:
    """In one of a checkpoint's tensor files."""
    file = at_random.choice(sorted(folder.rglob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[at_random.randrange(len(data))] ^= 1 << at_random.randrange(8)
    file.write_bytes(data)


def cut_short(folder: Path, at_random: random.Random) -> None:
    """One of a checkpoint's tensor files."""
    file = at_random.choice(sorted(folder.rglob("*.safetensors")))
    os.truncate(file, at_random.randrange(file.stat().st_size))


def lose_the_manifest(folder: Path, at_random: random.Random) -> None:
    """Of a checkpoint."""
    shutil.move(folder / "manifest.json", folder / "mislaid.json")


FAULTS: dict[str, Callable[[Disturbed, dict[int, int], int, random.Random], None]] = {
    "a rank is killed (SIGKILL)": _signal_rank(signal.SIGKILL),
    "a rank is stopped (SIGSTOP)": _signal_rank(signal.SIGSTOP),
    "a rank crashes (SIGSEGV)": _signal_rank(signal.SIGSEGV),
    "a rank aborts (SIGABRT)": _signal_rank(signal.SIGABRT),
    "two ranks are killed": _kill_two,
    "torchrun's agent is killed": _kill_agent,
    "the launcher is killed; the same command again": _signal_launcher(signal.SIGKILL),
    "the launcher gets SIGTERM; the same command again": _signal_launcher(signal.SIGTERM),
    "a rank is killed, and the newest checkpoint damaged": _damage,
}
OF_LAUNCHER = {name for name in FAULTS if name.startswith(("the launcher", "torchrun"))}
