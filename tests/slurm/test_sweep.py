"""A sweep as one job array on a real Slurm: a point is the run that it would be alone; what is missing comes back."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, wait_for
from tests.slurm.conftest import SlurmShell

pytestmark = pytest.mark.slurm


def test_an_array_of_points_is_followed_cancelled_and_gone_on_with(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    alone = Folder(slurm.folder / "alone")
    slurm.isotrain("train", *tiny_run_model.words(run_dir=alone.path))
    sweep = slurm.folder / "a sweep"
    changes = {"cluster": "slurm_cpu", "cluster__nodes": 1, "optimizer__lr": "0.02,0.01,0.005", "topology__tp": "1,4"}
    typed = tiny_run_model.words(**changes, run_dir=f"'{sweep}'")
    done = slurm.isotrain("sweep", *typed, "--jobs", "1", "--json").json
    assert [point["state"] for point in done["points"]] == ["waiting", "pruned"] * 3
    job = done["job_id"]
    assert slurm.field(f"{job}_4", "ArrayTaskThrottle") == "1"
    points = [Folder(sweep / point["folder"]) for point in done["points"]]

    # The last one is cancelled by itself while it waits, and the others are not.
    slurm.isotrain("cancel", str(points[4].path))
    jobs = slurm.isotrain("status", str(sweep), "--json").json["jobs"]
    assert [(one["job_id"], one["state"] == "CANCELLED") for one in jobs] == [
        (f"{job}_0", False), (f"{job}_2", False), (f"{job}_4", True),
    ]  # fmt: skip
    slurm.run(["isotrain", "wait", str(points[0].path), str(points[2].path)])
    assert points[2].losses == alone.losses
    assert "done: 6 of 6 steps" in slurm.isotrain("logs", str(points[2].path)).out

    # Once more: only what is missing, as a new array of one.
    again = slurm.isotrain("sweep", str(sweep), "--json").json
    assert [point["state"] for point in again["points"]] == ["done", "pruned", "done", "pruned", "waiting", "pruned"]
    assert "#SBATCH --array=4\n" in (sweep / "slurm" / "train.sbatch").read_text()
    slurm.isotrain("wait", str(sweep))
    over = slurm.isotrain("sweep", str(sweep), "--json").json
    losses = [point["value"] for point in over["points"] if point["state"] == "done"]
    assert len(losses) == 3 and over["best"]["value"] == min(losses)
    assert json.loads((sweep / "sweep.json").read_text())["best"] == over["best"]["number"]


def test_a_running_array_is_cancelled_as_a_whole_after_a_save(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    sweep = slurm.folder / "cancelled-sweep"
    changes = {"cluster": "slurm_cpu", "cluster__nodes": 1, "steps": 100_000, "checkpoint__every_steps": 0}
    typed = tiny_run_model.words(**changes, seed="0,1", run_dir=sweep)
    done = slurm.isotrain("sweep", *typed, "--json").json
    points = [sweep / point["folder"] for point in done["points"]]
    wait_for(lambda: all((point / "metrics.jsonl").is_file() for point in points))
    slurm.isotrain("cancel", str(sweep))
    ended = slurm.isotrain("wait", str(sweep), "--json", code=85).json["jobs"]
    assert [(one["code"], one["saved"] > 0, one["saved"] == one["step"]) for one in ended] == [(85, True, True)] * 2


def test_a_batch_of_hydras_sweeper_is_one_array_that_is_waited_for(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    """``--multirun`` with Hydra's own sweeper, and the launcher that isotrain brings for it."""
    sweep = slurm.folder / "multirun"
    changes = {"cluster": "slurm_cpu", "cluster__nodes": 1, "steps": 2, "optimizer__lr": "0.02,0.01"}
    typed = [*tiny_run_model.words(**changes, run_dir=sweep), "hydra/sweeper=basic"]
    done = slurm.isotrain("train", "--multirun", *typed, "--json").json
    points = [Folder(sweep / point["folder"]) for point in done["points"]]
    jobs = slurm.isotrain("status", str(sweep), "--json").json["jobs"]
    array = jobs[0]["job_id"].partition("_")[0]
    assert [(one["job_id"], one["state"]) for one in jobs] == [(f"{array}_{task}", "COMPLETED") for task in range(2)]
    assert slurm.field(f"{array}_1", "ArrayJobId") == array
    means = [sum(point.losses.values()) / 2 for point in points]  # of the newest steps
    assert [point["value"] for point in done["points"]] == pytest.approx(means)
    assert done["best"]["value"] == min(point["value"] for point in done["points"])
