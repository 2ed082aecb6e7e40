"""The loop: one step at a time, saved in time, stopped when asked, and given up when numbers end; with a real engine
replaced by one that counts."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from launch.stop import StopRequest
from orchestrator.assemble import Room
from orchestrator.checkpoint import publish
from orchestrator.checkpoint.layout import Layout
from orchestrator.config.job import CheckpointConfig, JobConfig, OptimizerConfig
from orchestrator.errors import ExitCode, GaveUp, ResourceError
from orchestrator.loop import train
from orchestrator.training import Cursor, Run
from parallel.engine import Accepts, MicroBatch, StepResult, always
from parallel.shards import Box, Shard
from parallel.topology import Topology


@dataclass
class CountingEngine:
    """Notes what it learns from; its one tensor holds the number of steps.

    ``losses`` by step, ``once`` the first time only; ``bad`` by sample.
    """

    rates: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    once: dict[int, float] = field(default_factory=dict)
    bad: dict[int, float] = field(default_factory=dict)
    stop: StopRequest | None = None
    stop_after: int = 0
    optimizer_steps: int = 0
    pause_s: float = 0.0

    def train_step(
        self, microbatches: Sequence[MicroBatch], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        time.sleep(self.pause_s)
        here = [sample for batch in microbatches for sample in batch.sample_ids]
        loss = self.once.pop(self.optimizer_steps + 1, None) or self.losses.get(self.optimizer_steps + 1, 1.0)
        loss = next((self.bad[sample] for sample in here if sample in self.bad), loss)
        if not accepts(loss, 1.0):
            return StepResult(loss, 3, 1.0, applied=False)
        self.rates.append(learning_rate)
        self.samples += here
        self.optimizer_steps += 1
        if self.stop is not None and self.optimizer_steps == self.stop_after:
            self.stop.requested = True
        return StepResult(loss, 3, 1.0)

    def shards(self) -> Iterator[Shard]:
        data = torch.full((2, 3), float(self.optimizer_steps))
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            yield Shard("base_model.model.q_proj.lora_A.weight", kind, (2, 3), Box.whole((2, 3)), data)


class Rows:
    """Seven rows of lengths 2..8."""

    rows = 7
    summary: Any = type("Summary", (), {"source_sha256": "5ha", "pad_token": 0})()

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(rows) + 2

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(index + 2, dtype=np.int32), np.ones(index + 2, dtype=bool)


class OneRank:
    """Groups of a run on one rank."""

    def coordinate(self, axis: str) -> int:
        return 0


class Noted:
    """Metrics that remember."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, Any]] = {}

    def log(self, step: int, values: dict[str, Any]) -> None:
        assert step not in self.lines
        self.lines[step] = values


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_run(tmp_path: Path, engine: CountingEngine, **changes: Any) -> Run:
    plan: Any = type(
        "Plan",
        (),
        {
            "topology": Topology(),
            "micro_batches": 2,
            "micro_sequences": 1,
            "global_sequences": 2,
            "length_multiple": 1,
            "precision": "fp32",
            "device": "cpu",
            "cluster": None,
            "micro_choices": (),
            **dict.fromkeys(("vpp", "sp", "stages", "recompute", "distributed", "engine")),
        },
    )()
    job = JobConfig(steps=5, optimizer=OptimizerConfig(lr=1.0, schedule="linear"), checkpoint=CheckpointConfig(2, 0))
    beside = Room("adapter", {"adapter_config.json": b"{}"})
    values: list[Any] = [replace(job, **changes), plan, tmp_path, OneRank(), dist.group.WORLD, engine, Rows(), beside]
    return Run(*values, Noted())  # type: ignore[arg-type]


def saved(tmp_path: Path) -> dict[str, dict[str, Any]]:
    files = sorted((tmp_path / "checkpoints").glob("step-*/state.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def test_every_step_is_logged_once_and_saved_in_time_and_at_the_end(tmp_path: Path) -> None:
    engine = CountingEngine()
    run = make_run(tmp_path, engine)
    assert train(run, Cursor(), StopRequest()) == ExitCode.DONE
    lines = run.metrics.lines  # type: ignore[union-attr]
    assert sorted(lines) == [1, 2, 3, 4, 5] and engine.rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [set(engine.samples[at : at + 2]) for at in range(0, 10, 2)] == [{at, at + 1} for at in range(0, 10, 2)]
    assert lines[1].keys() >= {"loss", "grad_norm", "learning_rate", "tokens", "label_tokens", "step_s"}
    states = saved(tmp_path)
    assert list(states) == ["step-000002", "step-000004", "step-000005"]
    state = states["step-000004"]
    assert (state["step"], state["samples_consumed"], state["optimizer_steps"], state["seed"]) == (4, 8, 4, 0)
    assert state["schedule"]["lr"] == 1.0 and state["schedule"]["steps"] == 5
    assert state["data"] == {"path": None, "sha256": "5ha", "rows": 7}


def test_going_on_takes_the_next_samples_and_rates(tmp_path: Path) -> None:
    engine = CountingEngine(optimizer_steps=3)
    run = make_run(tmp_path, engine)
    assert train(run, Cursor(3, 6), StopRequest()) == ExitCode.DONE
    assert sorted(engine.samples) == [6, 7, 8, 9] and engine.rates == pytest.approx([0.4, 0.2])


def test_a_save_beside_training_that_fails_is_heard_of_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*values: Any) -> None:
        raise ResourceError("no space left", "")

    config = CheckpointConfig(2, 0, asynchronous=True)
    monkeypatch.setattr("orchestrator.checkpoint.saver.write", refuse)
    slow = CountingEngine(pause_s=0.2)  # so that the save has failed by the end of the step after it
    with pytest.raises(ResourceError, match="no space left"):
        train(make_run(tmp_path, slow, steps=50, checkpoint=config), Cursor(), StopRequest())
    assert slow.optimizer_steps == 3
    slow = CountingEngine(pause_s=0.2)
    with pytest.raises(ResourceError, match="no space left"):  # of the last save
        config = replace(config, on_failure="continue")
        train(make_run(tmp_path, slow, steps=4, checkpoint=config), Cursor(), StopRequest())
    assert "step 2: a checkpoint could not be saved" in capsys.readouterr().err


def test_another_global_batch_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    engine = CountingEngine(optimizer_steps=3)
    assert train(make_run(tmp_path, engine), Cursor(3, 12), StopRequest()) == ExitCode.DONE  # three steps of 4
    assert sorted(engine.samples) == [12, 13, 14, 15]
    assert [state["samples_consumed"] for state in saved(tmp_path).values()] == [14, 16]


@pytest.mark.parametrize(("after", "code"), [(1, ExitCode.INTERRUPTED), (5, ExitCode.DONE)])
def test_asked_to_stop_it_saves_the_step_and_ends(tmp_path: Path, after: int, code: ExitCode) -> None:
    stop = StopRequest()
    engine = CountingEngine(stop=stop, stop_after=after)
    run = make_run(tmp_path, engine, checkpoint=CheckpointConfig(0, 0))
    assert train(run, Cursor(), stop) == code
    assert list(saved(tmp_path)) == [f"step-{after:06d}"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_it_gives_up_on_a_loss_that_is_no_number_and_does_not_save_it(tmp_path: Path, loss: float) -> None:
    engine = CountingEngine(losses={4: loss})
    run = make_run(tmp_path, engine)
    with pytest.raises(GaveUp, match=f"step 4: loss {loss}, grad_norm 1.0; nothing of this step was saved") as caught:
        train(run, Cursor(), StopRequest())
    assert caught.value.hint.startswith(f"isotrain resume {tmp_path} optimizer.lr=0.1 ")
    assert list(saved(tmp_path)) == ["step-000002"] and 4 not in run.metrics.lines  # type: ignore[union-attr]


def test_a_loss_that_is_no_number_right_after_a_checkpoint_is_held_against_it(tmp_path: Path) -> None:
    train(make_run(tmp_path, CountingEngine(), steps=2), Cursor(), StopRequest())
    run = make_run(tmp_path, CountingEngine(optimizer_steps=2, losses={3: math.nan}))
    with pytest.raises(GaveUp, match="step 2 may have spoilt the weights that were loaded") as caught:
        train(run, Cursor(2, 8), StopRequest())
    folder = tmp_path / "checkpoints" / "step-000002"
    assert caught.value.hint.startswith(f"rm -r {folder} && isotrain resume {tmp_path} optimizer.lr=0.1 ")


def fail_saves(monkeypatch: pytest.MonkeyPatch, *numbers: int, code: int = errno.ENOSPC) -> None:
    """The disk refuses these saves, counted from 1."""
    real, made = publish.prepare, 0

    def prepare(temporary: Path, layout: Layout) -> None:
        nonlocal made
        made += 1
        if made in numbers:
            raise OSError(code, os.strerror(code), str(temporary))
        real(temporary, layout)

    monkeypatch.setattr("orchestrator.checkpoint.save.prepare", prepare)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_stops_the_run_or_is_said_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    config = CheckpointConfig(every_steps=1, keep_last=0, asynchronous=asynchronous)
    fail_saves(monkeypatch, 2)
    run = make_run(tmp_path / "stop", CountingEngine(), checkpoint=config)
    with pytest.raises(ResourceError, match=r"no space left: .*step-000002.*What was saved before is untouched"):
        train(run, Cursor(), StopRequest())
    assert list(saved(tmp_path / "stop")) == ["step-000001"]
    fail_saves(monkeypatch, 2)
    run = make_run(tmp_path / "go", CountingEngine(), checkpoint=replace(config, on_failure="continue"))
    assert train(run, Cursor(), StopRequest()) == ExitCode.DONE
    assert list(saved(tmp_path / "go")) == [f"step-00000{step}" for step in (1, 3, 4, 5)]
    said = "step 2: a checkpoint could not be saved, and checkpoint.on_failure=continue: no space left"
    assert capsys.readouterr().err.startswith(said)
    fail_saves(monkeypatch, 5)  # the last one has no later one that could make up for it
    run = make_run(tmp_path / "last", CountingEngine(), checkpoint=replace(config, on_failure="continue"))
    with pytest.raises(ResourceError, match="step-000005"):
        train(run, Cursor(), StopRequest())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("code", [errno.ENOENT, errno.EROFS, errno.EACCES, errno.EIO])
def test_whatever_the_disk_says_training_goes_on_where_it_shall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, asynchronous: bool
) -> None:
    config = CheckpointConfig(every_steps=1, keep_last=0, asynchronous=asynchronous, on_failure="continue")
    fail_saves(monkeypatch, 2, code=code)
    assert train(make_run(tmp_path, CountingEngine(), checkpoint=config), Cursor(), StopRequest()) == ExitCode.DONE
    assert list(saved(tmp_path)) == [f"step-00000{step}" for step in (1, 3, 4, 5)]
    said = capsys.readouterr().err
    assert said.startswith("step 2: a checkpoint could not be saved") and os.strerror(code) in said
    assert "cannot be written: " in said and "What was saved before is as it was" in said


def test_too_little_space_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.checkpoint.publish.free_bytes", lambda folder: 17)
    engine = CountingEngine()
    with pytest.raises(ResourceError, match=r"no space left: .*bytes are needed"):
        train(make_run(tmp_path, engine), Cursor(), StopRequest())
    assert engine.optimizer_steps == 0


def test_the_best_by_loss_stay_and_the_manifest_says_their_loss(tmp_path: Path) -> None:
    engine = CountingEngine(losses={1: 3.0, 2: 0.5, 3: 2.0, 4: 2.5, 5: 2.2})
    run = make_run(tmp_path, engine, checkpoint=CheckpointConfig(every_steps=1, keep_last=1, keep_best=2))
    train(run, Cursor(), StopRequest())
    assert list(saved(tmp_path)) == ["step-000002", "step-000003", "step-000005"]
    manifest = json.loads((tmp_path / "checkpoints/step-000002/manifest.json").read_text())
    assert manifest["about"]["metrics"] == {"loss": 0.5, "grad_norm": 1.0}
