from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import tiny_run_model as tiny_run_model
from tests.end_to_end.shell import Shell, wait_for
from tests.slurm.rig import INSTALL, Cluster, missing


@dataclass(frozen=True)
class SlurmShell(Shell):
    """A shell on the login node of a cluster, where ``isotrain`` is on the PATH."""

    cluster: Cluster

    @property
    def environment(self) -> dict[str, str]:
        mine = super().environment | self.cluster.environment
        return mine | {"PATH": f"{self.folder}/bin:{mine['PATH']}"}

    def submit(self, *words: str) -> str:
        """``isotrain submit WORDS``; the job id."""
        return str(self.isotrain("submit", *words, "--json").json["job_id"])

    def field(self, job: str, name: str) -> str:
        """What ``scontrol show job`` says."""
        shown = self.cluster.ask("scontrol", "-o", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 120) -> None:
        """Wait until a job is in one of these states."""
        wait_for(lambda: self.field(job, "JobState") in states, timeout_s)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of a real Slurm."""
    if lacking := missing():
        pytest.skip(f"{', '.join(lacking)} not found; a real Slurm takes: {INSTALL}")
    running = Cluster(4)
    try:
        running.up()
        yield running
    finally:
        running.down()


@pytest.fixture(scope="session")
def slurm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SlurmShell:
    """A shell whose ``isotrain`` is this checkout's."""
    return login(cluster, tmp_path_factory.mktemp("login"))


def login(cluster: Cluster, folder: Path) -> SlurmShell:
    """A login node's shell in an empty folder."""
    command = folder / "bin" / "isotrain"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m orchestrator "$@"\n')
    command.chmod(0o755)
    return SlurmShell(folder, folder / "cache", cluster)
