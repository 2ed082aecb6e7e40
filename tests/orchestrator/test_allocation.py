"""What the batch script decides: when ranks are started again, when the job is requeued, and when it is given up."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.exits import RankExit
from launch.slurm import commands
from launch.slurm.allocation import Allocation
from launch.slurm.commands import SlurmError
from launch.slurm.nodes import Node
from launch.slurm.step import StepRequest, StepResult
from orchestrator.config.building import read_job
from orchestrator.config.loading import compose_job
from orchestrator.jobs import allocation as module
from orchestrator.jobs import suspects
from orchestrator.jobs.allocation import run_allocation
from orchestrator.jobs.by_hand import by_hand
from orchestrator.jobs.nodes import plan_on
from orchestrator.jobs.record import Ended, note_start, read_ended, write_cancelled
from orchestrator.planning.plan import Plan
from orchestrator.runs import write_whole
from tests.helpers.fake_slurm import FakeSlurm

KILLED = RankExit(1, 86, "Killed", "rank 1 was killed", "", None, 0.0)
SAVED = RankExit(0, 85, "interrupted", "stopped", "", 3, 0.0)
NO_MEMORY = RankExit(0, 71, "OutOfMemory", "no memory", "", 3, 0.0)
VARIABLES = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "4"}


class Stage:
    """An allocation of two nodes in which steps end as they are told to."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.heard: list[signal.Signals] = []
        self.script: list[tuple[RankExit | None, int, signal.Signals | None]] = []
        self.hosts = ["n1", "n2"]
        self.down: list[str] = []
        self.requests: list[StepRequest] = []
        self.requeued: list[str] = []
        self.said: list[str] = []

    def step(self, request: StepRequest, *rest: object) -> StepResult:
        cause, saved, heard = self.script.pop(0)
        self.requests.append(request)
        if saved:
            (self.run_dir / "checkpoints" / f"step-{saved:06d}").mkdir(parents=True, exist_ok=True)
            write_whole(self.run_dir / "checkpoints" / f"step-{saved:06d}" / "manifest.json", "{}")
            write_whole(self.run_dir / "checkpoints" / "latest", f"step-{saved:06d}\n")
        if heard is not None:
            self.heard.append(heard)
        return StepResult(cause, request.host_of(cause.rank) if cause else "")

    def nodes(self, node_list: str) -> list[Node]:
        return [Node(name, 1, 1, is_up=name not in self.down) for name in node_list.split(",")]

    def run(self, words: list[str]) -> tuple[int, Ended]:
        code = run_allocation(None, words, self.said.append)
        ended = read_ended(self.run_dir)
        assert ended is not None and not self.script
        return code, ended


@pytest.fixture
def words(tmp_path: Path, tiny_model: Callable[..., Path]) -> list[str]:
    data = tmp_path / "chat.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    job = [f"model.path={tiny_model('llama')}", f"data.path={data}", "batch.sequence_tokens=64", "steps=100"]
    return [*job, f"run_dir={tmp_path / 'run'}"]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(tmp_path / "run")
    monkeypatch.setattr(module, "Signals", lambda: stage)
    monkeypatch.setattr(module, "slurm_variables", lambda: VARIABLES)
    monkeypatch.setattr(module, "run_step", stage.step)
    monkeypatch.setattr(module, "host_names", lambda text: stage.hosts)
    monkeypatch.setattr(suspects, "seen_nodes", stage.nodes)
    monkeypatch.setattr(module, "node_address", lambda node: f"addr-{node}")
    monkeypatch.setattr(module, "was_preempted", lambda job: False)
    monkeypatch.setattr(module, "requeue", stage.requeued.append)
    return stage


def test_by_hand_the_plan_is_for_the_nodes_there_are(stage: Stage, words: list[str]) -> None:
    stage.script = [(None, 0, None)]
    code, ended = stage.run(words)
    (request,) = stage.requests
    assert (code, ended.code, request.hosts, request.ranks_per_node) == (0, 0, ("n1", "n2"), 1)
    assert request.environment["ISOTRAIN_MEETING_HOST"] == "addr-n1"
    assert Path(request.environment["ISOTRAIN_MEETING"]).parent == stage.run_dir / "slurm"
    assert read_job(stage.run_dir).cluster.nodes == 2


def test_ranks_are_started_again_while_that_brings_checkpoints(stage: Stage, words: list[str]) -> None:
    stage.script = [(KILLED, step, None) for step in (5, 10, 15, 20, 25)] + [(None, 100, None)]
    code, _ = stage.run(words)
    assert code == 0
    assert len({request.environment["ISOTRAIN_MEETING"] for request in stage.requests}) == 6  # never an old port


def test_a_crash_loop_is_given_up(stage: Stage, words: list[str]) -> None:
    stage.script = [(KILLED, 5, None), *[(KILLED, 0, None)] * 3]
    code, ended = stage.run([*words, "recovery.restarts=2"])
    assert code == ended.code == 93
    assert "rank 1 was killed; 3 times without a new checkpoint after step 5: given up" in ended.message


ELASTIC = ["cluster.nodes=1-2"]


def hosts(stage: Stage) -> list[tuple[str, ...]]:
    return [request.hosts for request in stage.requests]


@pytest.mark.parametrize("cause", ["Killed", "Silent", "Stalled"])
def test_a_node_that_starts_are_lost_to_again_is_left_out(stage: Stage, words: list[str], cause: str) -> None:
    stage.script = [(KILLED, 5, None), (dataclasses.replace(KILLED, cause=cause), 10, None), (None, 100, None)]
    assert stage.run([*words, *ELASTIC])[0] == 0
    assert hosts(stage) == [("n1", "n2"), ("n1", "n2"), ("n1",)]
    assert "n2 left out: starts were lost to it 2 times" in stage.said
    there = Plan.from_json((stage.run_dir / "plan.json").read_text()).cluster
    assert there is not None and there.nodes == 1
    cluster = read_job(stage.run_dir).cluster
    assert (cluster.fewest_nodes, cluster.nodes) == (1, 2)  # as it was asked


@pytest.mark.parametrize(
    ("rows", "nodes", "empty"),
    [
        (9, 3, 0),
        (8, 3, 1),  # 3 micro-batches on each of three nodes, one of them without rows; 4 on each of two
        (4, 2, 0),  # 2 on each of two or three nodes: the third would only have to be told
        (2, 2, 0),  # fewer rows than nodes
    ],
)
def test_where_dp_does_not_divide_the_batch_the_faster_plan_is_taken(rows: int, nodes: int, empty: int) -> None:
    words = ["model=llama3_8b", "cluster.memory_gib=100"]
    plain = ["cluster=slurm_cpu", "cluster.nodes=1-3", "batch.micro_sequences=1", "topology.tp=1", "topology.pp=1"]
    planned = plan_on(compose_job([*words, *plain, f"batch.global_sequences={rows}"]), 3)
    assert (planned.job.cluster.nodes, planned.plan.topology.dp, planned.plan.empty_micro_batches) == (
        nodes, nodes, empty,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "ranks"),
    [
        ([], (1, 1, 1)),  # every node is needed
        ([*ELASTIC, "recovery.node_faults=0"], (1, 1, 1)),
        ([*ELASTIC, "recovery.node_faults=3"], (1, 1, 0, 0)),  # two of five for each
    ],
)
def test_no_node_is_left_out_where_it_need_not_be(
    stage: Stage, words: list[str], more: list[str], ranks: tuple[int, ...]
) -> None:
    lost = [dataclasses.replace(KILLED, rank=rank) for rank in ranks]
    stage.script = [(cause, 5 * (number + 1), None) for number, cause in enumerate(lost)] + [(None, 100, None)]
    assert stage.run([*words, *more])[0] == 0
    assert set(hosts(stage)) == {("n1", "n2")}


def test_what_is_no_fault_of_a_node_is_not_held_against_it(stage: Stage, words: list[str]) -> None:
    lost = RankExit(1, 86, "PeerLost", "rank 1 lost rank 0", "", None, 0.0)
    stage.script = [(lost, 5, None), (lost, 10, None), (lost, 15, None), (None, 100, None)]
    assert stage.run([*words, *ELASTIC])[0] == 0
    assert set(hosts(stage)) == {("n1", "n2")}


def test_all_bad_nodes_together_are_better_than_none(stage: Stage, words: list[str]) -> None:
    first = dataclasses.replace(KILLED, rank=0)
    stage.script = [(cause, 5 * (n + 1), None) for n, cause in enumerate([KILLED, KILLED, first, first])]
    stage.script += [(None, 100, None)]
    assert stage.run([*words, *ELASTIC])[0] == 0
    assert hosts(stage) == [("n1", "n2")] * 2 + [("n1",)] * 3


def test_a_node_that_slurm_has_lost_counts_where_the_start_came_to_no_end(stage: Stage, words: list[str]) -> None:
    for number in range(2):
        note_start(stage.run_dir, "7", number, ["n1", "n3"])
        stage.hosts, stage.down = ["n1", "n2"], ["n3"]
        stage.script = [(SAVED, number + 1, signal.SIGUSR1)]
        stage.run([*words, *ELASTIC])
        assert "n3 was lost, and the start before this one with it" in stage.said
        stage.said.clear()
    stage.hosts, stage.down = ["n1", "n3"], []
    stage.script = [(None, 100, None)]
    stage.run([*words, *ELASTIC])
    assert hosts(stage)[-1] == ("n1",)


def test_a_node_that_is_not_there_after_an_end_of_its_own_is_not_blamed(stage: Stage, words: list[str]) -> None:
    stage.hosts = ["n1", "n3"]
    stage.script = [(SAVED, 3, signal.SIGUSR1)]
    stage.run([*words, *ELASTIC])
    stage.hosts, stage.down = ["n1", "n2"], ["n3"]
    stage.script = [(None, 100, None)]
    stage.run([*words, *ELASTIC])
    assert not any("was lost" in line for line in stage.said)


def test_an_end_that_would_come_again_is_not_tried_again(stage: Stage, words: list[str]) -> None:
    stage.script = [(NO_MEMORY, 0, None)]
    assert stage.run(words)[0] == 71


@pytest.mark.parametrize(
    ("heard", "preempted", "more", "requeued"),
    [
        (signal.SIGUSR1, False, [], True),
        (signal.SIGUSR2, False, [], True),
        (signal.SIGTERM, False, [], False),  # may be scancel
        (signal.SIGTERM, True, [], True),
        (None, True, [], True),  # Slurm has told the ranks alone
        (signal.SIGUSR1, False, ["cluster.slurm.requeue=false"], False),
    ],
)
def test_what_was_warned_is_requeued(
    stage: Stage,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    heard: signal.Signals | None,
    preempted: bool,
    more: list[str],
    requeued: bool,
) -> None:
    monkeypatch.setattr(module, "was_preempted", lambda job: preempted)
    stage.script = [(SAVED, 3, heard)]
    code, ended = stage.run([*words, *more])
    assert (code, ended.requeued, stage.requeued) == (85, requeued, ["7"] if requeued else [])


def test_where_slurm_is_silent_a_stopped_run_has_saved_and_is_not_requeued(
    stage: Stage, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake, pauses = FakeSlurm(tmp_path / "bin"), list[float]()
    fake.silent()
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    monkeypatch.setattr(module, "was_preempted", commands.was_preempted)
    monkeypatch.setattr(commands, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append))
    stage.script = [(SAVED, 3, signal.SIGTERM)]
    code, ended = stage.run(words)
    assert (code, ended.code, ended.requeued, stage.requeued) == (85, 85, False, [])
    assert set(map(tuple, fake.calls)) == {("scontrol", "--oneliner", "show", "job", "7")}
    assert len(fake.calls) == len(pauses) + 1 > 1


def test_what_was_cancelled_is_not_requeued(stage: Stage, words: list[str]) -> None:
    write_cancelled(stage.run_dir, "7")
    stage.script = [(SAVED, 3, signal.SIGUSR1)]
    code, ended = stage.run(words)
    assert (code, stage.requeued) == (85, []) and "cancelled, so it is not requeued" in ended.message


def test_a_refused_requeue_is_said(stage: Stage, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: str) -> None:
        raise SlurmError("Requested operation is presently disabled")

    monkeypatch.setattr(module, "requeue", refuse)
    stage.script = [(SAVED, 3, signal.SIGUSR1)]
    assert stage.run(words)[1].requeued is False
    assert "Slurm does not requeue job 7: Requested operation is presently disabled" in stage.said


def test_allocations_that_bring_no_checkpoint_are_given_up(stage: Stage, words: list[str]) -> None:
    for _ in range(2):
        note_start(stage.run_dir, "7", 0)
    stage.script = [(KILLED, 0, signal.SIGUSR1)]
    code, ended = stage.run(words)
    assert (code, stage.requeued) == (93, [])
    assert ended.message == "3 allocations brought no checkpoint after step 0: not requeued"


def test_a_task_of_an_array_is_requeued_alone(stage: Stage, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    task = VARIABLES | {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    monkeypatch.setattr(module, "slurm_variables", lambda: task)
    stage.script = [(SAVED, 3, signal.SIGUSR1)]
    stage.run(words)
    assert stage.requeued == ["5_2"]


@pytest.mark.parametrize(
    ("given", "more", "ranks_per_node"),
    [
        ({"ranks_per_node": 4}, [], 4),
        ({}, [], 1),
        ({}, ["cluster=laptop"], 4),
        ({"gpus_per_node": 8}, ["cluster=slurm_4x8"], 8),
    ],
)
def test_ranks_per_node_are_what_the_allocation_has(
    words: list[str], given: dict[str, int], more: list[str], ranks_per_node: int
) -> None:
    job = by_hand([*words, *more], Allocation("7", nodes=2, node_list="n[1-2]", **given))
    assert (job.cluster.nodes, job.cluster.gpus_per_node) == (2, ranks_per_node)


def test_a_run_by_hand_without_a_folder_keeps_its_name_over_a_requeue(words: list[str]) -> None:
    first, second = (
        by_hand(words[:-1], Allocation("7", nodes=1, node_list="n1", restarts=restarts)).run_dir for restarts in (0, 1)
    )
    assert first == second and str(first).endswith("-job-7")
