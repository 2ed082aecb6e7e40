"""A sweep as a user types it: real runs, each the same as when it is trained alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml

from orchestrator.commands import plan_job
from orchestrator.config.loading import compose_job
from orchestrator.runs import write_run
from tests.distributed.test_turns import alone, assert_same_run
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, Shell, close, wait_for
from tests.helpers.pool import Pool


def test_a_point_is_the_run_that_it_would_be_alone(
    shell: Shell, tiny_run_model: TinyRun, uninterrupted: Folder, tmp_path: Path
) -> None:
    folder = tmp_path / "the sweep"
    words = tiny_run_model.words(optimizer__lr="0.02,0.01", topology__tp="1,4", run_dir=f"'{folder}'")
    done = shell.isotrain("sweep", *words, "--jobs", "2", "--json")
    points = done.json["points"]
    assert [point["state"] for point in points] == ["done", "pruned", "done", "pruned"]
    assert "6 attention heads" in points[1]["reason"]
    same, other = (Folder(folder / points[number]["folder"]) for number in (2, 0))
    assert close(same.losses, uninterrupted.losses) and same.losses != other.losses
    best = min((other, same), key=lambda run: sum(run.losses.values()))
    assert best.path.name == done.json["best"]["folder"]
    again = shell.isotrain("sweep", str(folder))
    assert "2 impossible, 2 finished already" in again.err and "plot: " in again.err


def test_optunas_sampler_chooses_points_that_are_trained(shell: Shell, tiny_run_model: TinyRun, tmp_path: Path) -> None:
    """One point after the other; the best is the one that Optuna itself has on record as the best."""
    words = tiny_run_model.words(steps=2, run_dir=tmp_path / "search", optimizer__lr="tag(log,interval(1e-4,1e-1))")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    done = shell.isotrain("train", "--multirun", *search, "hydra.sweeper.sampler.seed=1", *words, "--json")
    points = done.json["points"]
    assert [point["state"] for point in points] == 2 * ["done"]
    rates = [float(point["folder"].partition("optimizer.lr=")[2]) for point in points]
    assert len(set(rates)) == 2 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    found = yaml.safe_load((tmp_path / "search" / "hydra" / "optimization_results.yaml").read_text())
    assert found["best_value"] == done.json["best"]["value"] == min(point["value"] for point in points)
    assert str(found["best_params"]["++optimizer.lr"]) in done.json["best"]["folder"]


@pytest.mark.faults
def test_points_on_one_base_go_on_after_a_killed_rank_and_are_the_runs_that_they_are_alone(
    shell: Shell, pool: Pool, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    """Two points share a launch of two ranks; one rank is killed in the middle."""
    folder = tmp_path / "sweep"
    common = {"cluster": "laptop", "topology__tp": 2, "topology__pp": 1, "topology__dp": 1}
    common |= {"steps": 30, "checkpoint__every_steps": 5, "tuner__dropout": 0.1}
    words = tiny_run_model.words(**common, tuner__r="2,4", run_dir=folder, sweep__share_base="true")
    process = shell.start("sweep", *words, "--json")
    launch = Folder(folder / "together-000")
    points = [Folder(folder / name) for name in ("000-tuner.r=2", "001-tuner.r=4")]
    wait_for(lambda: points[1].checkpoint(10).is_dir() or process.poll() is not None)
    os.kill(launch.pids()[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "points 0, 1 train in turns on one base" in err
    said = (launch.path / "logs" / "train.log").read_text()
    assert "rank 1 was killed by SIGKILL" in said and "starting again from step" in said
    for point, r in zip(points, (2, 4), strict=True):
        theirs = Folder(tmp_path / f"alone-{r}")
        job = compose_job(tiny_run_model.words(**common, tuner__r=r, run_dir=theirs.path))
        write_run(theirs.path, job, plan_job(job).plan.to_json())
        assert pool.run(2, alone, str(theirs.path), str(shell.cache)) == [0, 0]
        assert_same_run(point, theirs)
        assert len((point.path / "launches.jsonl").read_text().splitlines()) == 2
        assert (point.path / "report.html").is_file()
    again = shell.isotrain("sweep", str(folder))
    assert "2 finished already" in again.err
