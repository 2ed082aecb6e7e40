"""The ledger: runs are noted beside their plans, similar plans are held against them, and nothing in it ends a run."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from orchestrator.commands import Planned, plan_job
from orchestrator.config.loading import compose_job
from orchestrator.ledger import Measured, append, corrected, history, likeness, measured, steps_of
from orchestrator.planning.plan import History, Plan

FOUND = Measured(step_s=2.0, steps=4, peak_bytes=2**30)


def planned(*words: str) -> Planned:
    return plan_job(compose_job(["model=smollm2_135m", "data=lighthouse", "cluster=laptop", *words]))


def note(file: Path, one: Planned, time: float, memory: float = 1.0) -> None:
    plan = one.plan
    most = max(stage.total for stage in plan.memory)
    found = Measured(plan.step_time.total_s * time, 4, int(most * memory))
    assert append(file, likeness(one.job, one.model, plan), plan, found) == ""


def test_a_plan_is_corrected_by_similar_runs_and_says_by_how_many(tmp_path: Path) -> None:
    file, one = tmp_path / "cache" / "ledger.sqlite", planned("topology.dp=2", "topology.pp=1")
    assert corrected(one.plan, one.job, one.model, file) == one.plan
    for time, memory in ((1.2, 0.5), (1.4, 0.6), (3.0, 0.7)):
        note(file, one, time, memory)
    other = planned("topology.dp=2", "topology.pp=1", "seed=3", "batch.global_sequences=16")
    told = corrected(other.plan, other.job, other.model, file)
    assert told.history is not None and told.history == History(3, pytest.approx(1.4), pytest.approx(0.6))
    assert told.expected_step_s == pytest.approx(1.4 * other.plan.step_time.total_s)
    assert told.expected_bytes == pytest.approx(0.6 * max(stage.total for stage in other.plan.memory))
    assert told.reasons[-1].startswith(
        "3 similar runs in the ledger: steps took 1.40 and memory 0.60 times the estimate"
    )
    assert told.step_time == other.plan.step_time and told.topology == other.plan.topology
    assert Plan.from_json(told.to_json()) == told


@pytest.mark.parametrize(
    "words",
    [
        ["topology.dp=1", "topology.pp=2"],
        ["precision=bf16"],
        ["tuner=full"],
        ["tuner=qlora"],
        ["memory.recompute=full"],
        ["model=llama3_2_1b", "cluster.memory_gib=40"],
    ],
)
def test_what_differs_is_not_similar(tmp_path: Path, words: list[str]) -> None:
    one, other = planned("topology.dp=2", "topology.pp=1"), planned("topology.dp=2", "topology.pp=1", *words)
    note(tmp_path / "ledger.sqlite", one, 1.5)
    assert likeness(one.job, one.model, one.plan) != likeness(other.job, other.model, other.plan)
    assert corrected(other.plan, other.job, other.model, tmp_path / "ledger.sqlite").history is None


def write_many(file: Path) -> list[str]:
    """What one of several processes does at once."""
    one = planned("topology.dp=1", "topology.pp=1")
    return [append(file, "alike", one.plan, FOUND) for _ in range(10)]


def test_many_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    with ProcessPoolExecutor(3, mp_context=get_context("forkserver")) as writers:
        problems = [problem for found in writers.map(write_many, [file] * 3) for problem in found]
    assert problems == [""] * 30
    found, _ = history(file, "alike")
    assert found is not None and found.runs == 30


def test_a_broken_ledger_is_said_and_ends_nothing(tmp_path: Path) -> None:
    one = planned("topology.dp=1", "topology.pp=1")
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"no database at all, but long enough to be taken for a header of one" * 20)
    assert "this run is not in the ledger" in append(broken, "alike", one.plan, FOUND)
    told = corrected(one.plan, one.job, one.model, broken)
    assert told.history is None and f"the ledger {broken} cannot be read" in told.reasons[-1]
    nowhere = tmp_path / "file" / "ledger.sqlite"
    nowhere.parent.touch()
    assert "this run is not in the ledger" in append(nowhere, "alike", one.plan, FOUND)
    assert history(nowhere, "alike") == (None, "") == history(None, "alike")
    older = tmp_path / "older.sqlite"
    sqlite3.connect(older).execute("CREATE TABLE runs (id INTEGER PRIMARY KEY)").connection.close()
    assert "cannot be read" in history(older, "alike")[1] and append(older, "alike", one.plan, FOUND)


def test_a_ledger_of_someone_else_is_read_and_not_written(tmp_path: Path) -> None:
    one = planned("topology.dp=1", "topology.pp=1")
    file = tmp_path / "ledger.sqlite"
    note(file, one, 1.5)
    locked = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        locked.execute("DELETE FROM runs")
    locked.close()
    assert corrected(one.plan, one.job, one.model, file).history is not None


def test_only_steps_of_this_launch_count_and_not_its_first(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}, "step_s": {step}.0}}\n' for step in range(1, 8)))
    assert steps_of(file, 4) == [4.0, 5.0, 6.0, 7.0] and steps_of(tmp_path / "nothing", 1) == []
    assert measured(steps_of(file, 4), 7) == Measured(6.0, 3, 7)
    file.write_text("no json")
    assert steps_of(file, 1) == []


def test_likeness_holds_for_plans_of_before() -> None:
    one = planned("topology.dp=1", "topology.pp=1", "topology.tp=1", "topology.cp=1")
    assert likeness(one.job, one.model, replace(one.plan, cluster=None)) == likeness(one.job, one.model, one.plan)
    assert likeness(one.job, one.model, one.plan) == "cpu fp32 dense 2^27 lora none one"
