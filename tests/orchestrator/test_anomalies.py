"""Steps whose loss is no number or a spike: warned of, skipped, left behind or the end of a run, as the job says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.stop import StopRequest
from orchestrator.anomalies import Anomalies, note_rewind, samples_after_rewinds
from orchestrator.config.job import AnomaliesConfig, CheckpointConfig
from orchestrator.errors import ExitCode, GaveUp, Rewound
from orchestrator.loop import train
from orchestrator.training import Cursor, Run
from tests.orchestrator.test_loop import CountingEngine, make_run, saved

SKIP, REWIND = AnomaliesConfig(not_finite="skip"), AnomaliesConfig(not_finite="rewind")


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def lines(run: Run) -> dict[int, dict[str, Any]]:
    return run.metrics.lines  # type: ignore[union-attr]


def test_what_does_not_come_again_was_a_machines_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = CountingEngine(once={3: math.nan})
    run = make_run(tmp_path, engine)
    assert train(run, Cursor(), StopRequest()) == ExitCode.DONE
    assert sorted(engine.samples) == list(range(10)) and "skipped" not in lines(run)[3]
    words = "step 3: loss nan, grad_norm 1.0; computed again, the loss is 1: a machine erred, not the data\n"
    assert capsys.readouterr().err == words


def test_a_skipped_step_is_a_step_without_an_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = CountingEngine(bad={4: math.nan})
    run = make_run(tmp_path, engine, anomalies=SKIP, checkpoint=CheckpointConfig(1, 0))
    assert train(run, Cursor(), StopRequest()) == ExitCode.DONE
    assert sorted(engine.samples) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert engine.rates == pytest.approx([1.0, 0.8, 0.4, 0.2])  # the schedule goes on
    assert [step for step, line in lines(run).items() if line.get("skipped")] == [3]
    assert "step 3: loss nan, grad_norm 1.0; skipped: nothing is learned from it" in capsys.readouterr().err
    state = saved(tmp_path)["step-000003"]
    assert (state["step"], state["samples_consumed"], state["optimizer_steps"]) == (3, 6, 2)


def test_too_many_skipped_in_a_row_end_the_run(tmp_path: Path) -> None:
    engine = CountingEngine(losses={3: math.inf})
    with pytest.raises(GaveUp, match=r"step 6: loss inf.*, after 3 steps skipped in a row \(anomalies.limit=3\)"):
        train(make_run(tmp_path, engine, anomalies=SKIP, steps=20), Cursor(), StopRequest())
    assert engine.optimizer_steps == 2
    none = AnomaliesConfig(not_finite="skip", limit=0)
    with pytest.raises(GaveUp, match=r"step 4: loss inf.*, and no step may be skipped \(anomalies.limit=0\)"):
        train(make_run(tmp_path / "none", engine, anomalies=none, steps=20), Cursor(3, 6), StopRequest())


def test_a_rewind_goes_back_to_the_newest_checkpoint_and_past_the_data(tmp_path: Path) -> None:
    engine = CountingEngine(bad={7: math.nan})
    with pytest.raises(Rewound, match=r"step 4: loss nan.*; back to step 2, and on with sample 9") as caught:
        train(make_run(tmp_path, engine, anomalies=REWIND), Cursor(), StopRequest())
    assert caught.value.code == ExitCode.PEER_LOST and list(saved(tmp_path)) == ["step-000002"]
    assert caught.value.hint.startswith(f"isotrain resume {tmp_path} optimizer.lr=0.1")
    samples = samples_after_rewinds(tmp_path, 2, 4)
    assert samples == 8
    again = CountingEngine(bad={7: math.nan}, optimizer_steps=2)
    assert train(make_run(tmp_path, again, anomalies=REWIND), Cursor(2, samples), StopRequest()) == ExitCode.DONE
    assert sorted(again.samples) == [8, 9, 10, 11, 12, 13]
    assert saved(tmp_path)["step-000004"]["samples_consumed"] == 12
    assert samples_after_rewinds(tmp_path, 4, 12) == 12


def test_of_several_rewinds_the_furthest_counts(tmp_path: Path) -> None:
    note_rewind(tmp_path, 2, 8)
    note_rewind(tmp_path, 2, 14)
    note_rewind(tmp_path, 6, 20)
    # From a checkpoint before the one that was gone back to (that one was damaged, say), past the same data.
    assert [samples_after_rewinds(tmp_path, step, 5) for step in (0, 2, 6, 7)] == [20, 20, 20, 5]


@pytest.mark.parametrize(("policy", "error"), [("stop", GaveUp), ("rewind", Rewound)])
def test_a_spike_is_what_the_job_says(tmp_path: Path, policy: str, error: type[Exception]) -> None:
    spiky = CountingEngine(bad={19: 100.0})
    run = make_run(tmp_path, spiky, anomalies=AnomaliesConfig(spike=policy), steps=20)
    with pytest.raises(error, match=r"step 10: loss 100 is 100 times the median of the 9 steps before"):
        train(run, Cursor(), StopRequest())
    assert spiky.optimizer_steps == 9


def test_of_a_spike_one_is_warned_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = CountingEngine(bad={19: 100.0})
    run = make_run(tmp_path, engine, steps=12)
    assert train(run, Cursor(), StopRequest()) == ExitCode.DONE and engine.optimizer_steps == 12
    assert "step 10: loss 100 is 100 times" in capsys.readouterr().err


def test_the_first_steps_are_no_spikes_and_a_resumed_run_remembers(tmp_path: Path) -> None:
    assert Anomalies(AnomaliesConfig(), [1.0] * 7).found(50.0, 1.0) is None
    engine = CountingEngine()
    train(make_run(tmp_path, engine, steps=9), Cursor(), StopRequest())
    known = Anomalies(AnomaliesConfig(), [2.0] * 100)
    assert len(known.losses) == 32
    from orchestrator.checkpoint.load import open_checkpoint

    assert open_checkpoint(tmp_path).manifest.about["losses"] == [1.0] * 9
