"""A job as the one who submitted it follows it: status, logs, wait and cancel, of `all` jobs, while it runs."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ISOTRAIN, Folder, wait_for
from tests.helpers.screen import Screen
from tests.slurm.conftest import SlurmShell, login
from tests.slurm.rig import Cluster
from tests.slurm.test_training import logged

pytestmark = pytest.mark.slurm
COLUMNS = 400  # so wide that no path is cut


class Followers:
    """Commands that run beside a job, each with its output in a file of its name."""

    def __init__(self, slurm: SlurmShell) -> None:
        self._slurm = slurm
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, terminal: Screen | None = None) -> None:
        with (self._slurm.folder / name).open("wb") as file:
            out = terminal.stream if terminal else file
            environment = self._slurm.environment | {"TERM": "xterm", "COLUMNS": str(COLUMNS)}
            self._processes[name] = subprocess.Popen(
                [*ISOTRAIN, *words], cwd=self._slurm.folder, env=environment, stdout=out, stderr=file
            )

    def text(self, name: str) -> str:
        return (self._slurm.folder / name).read_text()

    def end(self, name: str, number: signal.Signals | None = None) -> int:
        """The exit code, when it has ended by itself or by a signal."""
        if number is not None:
            self._processes[name].send_signal(number)
        return self._processes[name].wait(timeout=60)

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(timeout=10)


@pytest.fixture
def mine(cluster: Cluster, tmp_path: Path) -> SlurmShell:
    """A shell of its own, so that `all` is what this test has submitted."""
    return login(cluster, tmp_path)


@pytest.fixture
def followers(mine: SlurmShell) -> Iterator[Followers]:
    started = Followers(mine)
    yield started
    started.kill()


def test_a_job_is_watched_followed_waited_for_and_cancelled(
    mine: SlurmShell, followers: Followers, tiny_run_model: TinyRun
) -> None:
    run, screen = Folder(mine.folder / "followed"), Screen(COLUMNS)
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=2, steps=100_000, checkpoint__every_steps=0)
    job = mine.submit(*typed, f"run_dir={run.path}")
    followers.start("terminal", "status", "all", "--watch", "1", terminal=screen)
    followers.start("lines", "status", "all", "--watch", "1")
    followers.start("until-ctrl-c", "status", str(run.path), "--watch", "1")
    followers.start("log", "logs", "-f", str(run.path))
    followers.start("merged", "logs", "-f", str(run.path), "--rank", "all")
    followers.start("rank-1", "logs", "-f", str(run.path), "--rank", "1")
    followers.start("waited", "wait", "all")
    wait_for(lambda: f"job {job} RUNNING: step" in followers.text("until-ctrl-c") and logged(run) > 3)
    wait_for(lambda: "step 3/100000" in followers.text("log") and "[1] --- rank 1," in followers.text("merged"))
    wait_for(lambda: len(screen.lines()) == 2 and "RUNNING" in screen.lines()[1])
    assert followers.end("until-ctrl-c", signal.SIGINT) == 0

    assert f"{run.path}" in mine.isotrain("cancel", "all").err
    assert followers.end("waited") == 85  # the run's own
    assert f"job {job} FAILED: step {logged(run)} of 100000" in followers.text("waited")
    assert [followers.end(name) for name in ("terminal", "lines", "log", "merged", "rank-1")] == [0] * 5
    assert mine.field(job, "Restarts") == "0" and run.steps == [logged(run)]

    head, row = screen.lines()
    assert head.split() == ["job", "state", "code", "step", "saved", "nodes", "run", "why"]
    assert row.split()[:5] == [job, "FAILED", "85", f"{logged(run)}/100000", str(logged(run))]
    lines = followers.text("lines").splitlines()
    assert any(line.startswith(f"job {job} RUNNING: step ") for line in lines[:-1])
    assert lines[-1].startswith(f"job {job} FAILED: step {logged(run)} of 100000, {logged(run)} saved, {run.path}  ")
    assert followers.text("log") == mine.isotrain("logs", str(run.path)).out
    ranks = [(run.path / "logs" / f"rank-{rank}.log").read_text().splitlines() for rank in range(2)]
    assert followers.text("rank-1").splitlines() == ranks[1]
    merged = followers.text("merged").splitlines()
    for rank, wrote in enumerate(ranks):
        assert [line[4:] for line in merged if line.startswith(f"[{rank}] ")] == wrote
    assert len(merged) == len(ranks[0]) + len(ranks[1])
