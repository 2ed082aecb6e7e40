"""Jobs that have left squeue, as sacct tells of them: its words are those of Slurm 22.05, the command is a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm import commands
from launch.slurm.commands import FORGOTTEN, UNKNOWN, JobState, job_states
from orchestrator.errors import ExitCode
from orchestrator.jobs.follow import Status
from tests.helpers.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """It has forgotten every job."""
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    fake.set_state("")
    return fake


def row(job: str, state: str, code: str, nodes: str = "node[1-2]", reason: str = "None") -> dict[str, str]:
    return {"JobID": job, "State": state, "ExitCode": code, "NodeList": nodes, "Reason": reason}


@pytest.mark.parametrize(
    ("said", "state", "code", "end"),
    [
        (("COMPLETED", "0:0"), JobState("7", "COMPLETED", "", "node[1-2]", 0), 0, ExitCode.DONE),
        (("FAILED", "93:0"), JobState("7", "FAILED", "", "node[1-2]", 93), 93, ExitCode.GAVE_UP),
        (("FAILED", "0:9"), JobState("7", "FAILED", "", "node[1-2]", 137), 137, 137),
        (("PREEMPTED", "0:0"), JobState("7", "PREEMPTED", "", "node[1-2]"), None, ExitCode.PEER_LOST),
        (("PREEMPTED", "0:15"), JobState("7", "PREEMPTED", "", "node[1-2]", 143), 143, 143),
        (("NODE_FAIL", "0:0"), JobState("7", "NODE_FAIL", "", "node[1-2]"), None, ExitCode.PEER_LOST),
        (("NODE_FAIL", "1:0"), JobState("7", "NODE_FAIL", "", "node[1-2]", 1), 1, 1),
        (("TIMEOUT", "0:0"), JobState("7", "TIMEOUT", "", "node[1-2]"), None, ExitCode.PEER_LOST),
        (("OUT_OF_MEMORY", "0:125"), JobState("7", "OUT_OF_MEMORY", "", "node[1-2]"), None, ExitCode.RESOURCES),
        (("CANCELLED by 1000", "0:15"), JobState("7", "CANCELLED", "by user 1000", "node[1-2]", 143), 143, 143),
        (
            ("CANCELLED by 0", "0:0", "None assigned"),
            JobState("7", "CANCELLED", "by user 0"),
            None,
            ExitCode.GAVE_UP,
        ),
        (
            ("CANCELLED", "0:0", "None assigned", "DependencyNeverSatisfied"),
            JobState("7", "CANCELLED", "DependencyNeverSatisfied"),
            None,
            ExitCode.GAVE_UP,
        ),
    ],
)
def test_a_job_that_slurm_has_forgotten_is_what_sacct_says(
    slurm: FakeSlurm, said: tuple[str, ...], state: JobState, code: int | None, end: int
) -> None:
    slurm.accounts(row("6", "COMPLETED", "0:0"), row("7", *said))
    (found,) = job_states("7")
    assert found == state and found.code == code and not found.is_active and not found.is_out_of_reach
    status = Status(Path("/r"), "7", found.state, found.reason, found.nodes, 1, 0, 8, found.code)
    assert status.is_over and status.exit_code == end


def test_tasks_of_an_array_have_a_row_each(slurm: FakeSlurm) -> None:
    slurm.accounts(row("7_0", "COMPLETED", "0:0", "node1"), row("7_1", "FAILED", "71:0", "node2"))
    found = {one.job_id: (one.state, one.code, one.nodes) for one in job_states("7")}
    assert found == {"7_0": ("COMPLETED", 0, "node1"), "7_1": ("FAILED", 71, "node2")}


def test_what_sacct_does_not_know_either_is_forgotten(slurm: FakeSlurm) -> None:
    assert job_states("7") == [JobState("7", UNKNOWN, FORGOTTEN)]  # no accounting
    slurm.accounts(row("6", "COMPLETED", "0:0"))
    assert job_states("7") == [JobState("7", UNKNOWN, FORGOTTEN)]


def test_an_older_sacct_that_refuses_a_field_is_none(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.accounts(row("7", "COMPLETED", "0:0"))
    monkeypatch.setattr(commands, "ACCOUNTED", ("JobID", "State", "NoSuchField"))
    assert job_states("7") == [JobState("7", UNKNOWN, FORGOTTEN)]
