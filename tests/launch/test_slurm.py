"""Slurm's parts that need no Slurm: who a task is, where ranks meet, signs of life, and what srun's words mean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from launch import watch
from launch.beat import STOP, Listener, start_beating, wish
from launch.environment import LaunchError, RankEnvironment, rank_environment
from launch.meeting import meet
from launch.slurm import step
from launch.slurm.allocation import Allocation, read_allocation
from launch.slurm.script import EXTRA, PLAIN
from launch.slurm.step import Signals, StepRequest, srun_command, tasks_ended
from launch.states import enter, leave, someone_prepares
from launch.stop import StopRequest
from launch.watch import Patience
from orchestrator.jobs.record import read_faults
from orchestrator.jobs.suspects import note_end

ROOT = Path(__file__).resolve().parents[2]
TASK = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}
JOB = {"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "32"}


def test_a_task_is_a_rank_only_where_we_have_started_it() -> None:
    assert rank_environment(TASK) is None  # a shell under srun has these too
    me = rank_environment(TASK | {"ISOTRAIN_MEETING": "/m", "RANK": "0", "WORLD_SIZE": "1"})
    assert me == RankEnvironment(rank=5, world_size=7, local_rank=1, local_world_size=2)


def test_an_allocation_is_read_from_its_variables() -> None:
    given = read_allocation(
        JOB | {"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_MEM_PER_CPU": "1000"}
    )
    assert (given.nodes, given.ranks_per_node, given.gpus_per_node, given.memory_mib) == (2, 4, 8, 32000)
    task = read_allocation(JOB | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"})
    assert (task.job_id, task.restarts) == ("7_2", 1)  # the raw id may be that of the whole array
    with pytest.raises(LaunchError, match="this is no job of Slurm's") as raised:
        read_allocation({})
    assert raised.value.hint.startswith("isotrain submit")


@pytest.mark.parametrize(
    ("cpus", "cores", "crowded"), [(32, "--cpus-per-task=8", False), (1, "--cpus-per-task=1", True)]
)
def test_srun_gets_one_task_per_rank_and_deals_out_the_cores(cpus: int, cores: str, crowded: bool) -> None:
    given = Allocation("9", nodes=2, node_list="n[1-2]", cpus_per_node=cpus)
    argv = srun_command(StepRequest(given, ("n1", "n2"), 4, ("python", "rank.py"), {}, Path("run")))
    assert {"--nodes=2", "--nodelist=n1,n2", "--ntasks=8", "--ntasks-per-node=4", cores, "--kill-on-bad-exit=0"} <= set(
        argv
    )
    assert not any(word.startswith("--gres") for word in argv)
    assert ("--overcommit" in argv) == crowded and argv[-2:] == ("python", "rank.py")


def test_what_srun_says_of_tasks_is_understood() -> None:
    assert tasks_ended("srun: error: n1: tasks 0-1: Segmentation fault (core dumped)") == [
        (0, -11, "n1"),
        (1, -11, "n1"),
    ]
    assert tasks_ended("srun: error: n1: task 3: Out Of Memory") == [(3, -9, "n1")]
    assert tasks_ended("srun: Job step aborted: Waiting up to 32 seconds") == []


def test_fifty_launches_of_two_jobs_on_one_node_do_not_clash(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.launch.two_jobs", str(tmp_path), "50"]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout)
    assert len(launches) == 50
    for first, second in launches:
        assert first[0] == first[1] != second[0] == second[1]


def test_a_first_rank_that_does_not_come_is_a_lost_peer(tmp_path: Path) -> None:
    from orchestrator.supervise import explain

    with pytest.raises(ConnectionError, match="timed out waiting for rank 0") as raised:
        meet(tmp_path / "nobody", "127.0.0.1", RankEnvironment(1, 2, 1, 2), timedelta(seconds=0.2))
    assert explain(raised.value).code == 86


def test_silence_is_told_from_life_and_from_leaving(tmp_path: Path) -> None:
    now = 100.0
    listener = Listener(tmp_path, clock=lambda: now)
    for rank in range(3):
        enter(tmp_path, rank)
    assert listener.silent_s() == {0: 0, 1: 0, 2: 0}
    now = 107.0
    leave(tmp_path, 2)
    os.utime(tmp_path / "states" / "rank-0.json", ns=(1, 1))  # any change counts: clocks of nodes differ
    assert listener.silent_s() == {0: 0, 1: 7.0}


def stand_in_srun(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An srun that runs a script in ``folder``, watched without pauses."""
    command = folder / "bin" / "srun"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\ncd {folder}\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    monkeypatch.setattr(watch, "LISTEN_EVERY_S", 0.01)
    monkeypatch.setattr(watch, "ANSWER_S", 0.5)
    monkeypatch.setattr(step, "ENDING_S", 1.0)


@pytest.mark.parametrize(
    ("stories", "device", "node"),
    [
        (["waits in x", "is at y"], "cpu", "n2"),
        (["waits in x", "waits in x"], "cpu", ""),
        (["is at x", "is at y"], "cpu", ""),
        (["is at x", ""], "cpu", ""),  # the other beats, but does not say what it does
        (["is at x"], "cpu", ""),  # the other has not come up: this one waits for it, in no collective
        (["waits in x", "is at y"], "cuda", ""),  # and may wait for its GPU
    ],
)
def test_where_no_step_is_done_a_node_is_blamed_only_if_all_others_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: list[str], device: str, node: str
) -> None:
    said = [f"echo {rank} > states/rank-{rank}.json" for rank in range(len(stories))]
    said += [f"printf '{story}' > states/told-{rank}.txt" for rank, story in enumerate(stories)]
    stand_in_srun(tmp_path, monkeypatch, "\n".join([*said, "exec sleep 30"]))
    given = Allocation("9", 2, "n[1-2]")
    request = StepRequest(given, ("n1", "n2"), 1, ("rank",), {}, tmp_path, Patience(stalled_s=1), device)
    ended = step.run_step(request, Signals(()), lambda: None, lambda text: None)
    assert ended.cause is not None and (ended.cause.cause, ended.node) == ("Stalled", node)
    assert ended.cause.message.endswith(" (n2)") == bool(node)
    note_end(tmp_path, "9", ended)
    assert [fault["node"] for fault in read_faults(tmp_path)] == ([node] if node else [])


@pytest.mark.parametrize(
    ("marker", "cause"), [("touch states/preparing-0; sleep 3", "Unsaid"), ("exec sleep 30", "Stalled")]
)
def test_tokenising_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str, cause: str) -> None:
    """srun is a stand-in that ends with 3 where it is left alone."""
    stand_in_srun(tmp_path, monkeypatch, f"{marker}\necho 'srun: error: n1: task 0: Exited with exit code 3'")
    request = StepRequest(Allocation("9", 1, "n1"), ("n1",), 1, ("rank",), {}, tmp_path, Patience(stalled_s=2))
    ended = step.run_step(request, Signals(()), lambda: None, lambda text: None)
    assert ended.cause is not None and ended.cause.cause == cause
    assert not someone_prepares(tmp_path)


def test_a_rank_beats_and_hears_the_wish_to_stop(tmp_path: Path) -> None:
    stop = StopRequest()
    enter(tmp_path, 0)
    os.utime(tmp_path / "states" / "rank-0.json", ns=(1, 1))
    wish(tmp_path, "")
    start_beating(tmp_path, 0, 0.02, stop, lambda: "waits in x")
    deadline = time.monotonic() + 10
    while (tmp_path / "states" / "rank-0.json").stat().st_mtime_ns == 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not stop.requested
    wish(tmp_path, STOP)
    while not stop.requested:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_where_no_step_is_done_the_one_that_waits_for_nobody_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LISTEN_EVERY_S", 0.0)
    wish(tmp_path, "")
    for rank, story in enumerate(["waits in barrier", "is at data.py:7 in read", "waits in barrier"]):
        enter(tmp_path, rank)
        start_beating(tmp_path, rank, 0.02, StopRequest(), lambda story=story: story)  # type: ignore[misc]
    hung = watch.Watch(tmp_path, Patience(stalled_s=-1), lambda: None).hang()
    assert hung is not None and (hung.exit.cause, hung.exit.rank, hung.culprit(3)) == ("Stalled", 1, 1)
    assert hung.culprit(4) is None  # one of four is not there
    words = "though all ranks live; rank 1 is at data.py:7 in read; rank 0, 2 waits in barrier"
    assert hung.exit.message.endswith(words)


@pytest.mark.parametrize("value", ["a b", "$(id)", "`id`", "a'b", 'a"b', "a\nb", "a\\b", "a$b", "a;b\n#SBATCH --x", ""])
def test_an_sbatch_line_holds_nothing_that_could_be_taken_otherwise(value: str) -> None:
    assert not PLAIN.fullmatch(value)
    assert not EXTRA.fullmatch(f"--comment={value}") or not value


def test_signals_are_known_by_slurms_words_for_them() -> None:
    assert tasks_ended("srun: error: n1: task 0: Aborted") == [(0, -signal.SIGABRT, "n1")]
    assert tasks_ended("srun: error: n1: task 0: Terminated") == [(0, -signal.SIGTERM, "n1")]
