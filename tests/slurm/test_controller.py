"""Slurm's controller goes away while a job runs: nothing is concluded from its silence, and the run is unharmed."""

from __future__ import annotations

import subprocess

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, wait_for
from tests.slurm.conftest import SlurmShell
from tests.slurm.rig import Cluster
from tests.slurm.test_training import STEPS, adapter, log, logged, words
from tests.slurm.test_training import undisturbed as undisturbed

pytestmark = [pytest.mark.slurm, pytest.mark.faults]


def test_a_run_goes_on_while_the_controller_is_away_and_nothing_is_concluded(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun, undisturbed: Folder
) -> None:
    run, other = Folder(slurm.folder / "headless"), Folder(slurm.folder / "submitted-late")
    job = slurm.submit(*words(tiny_run_model, run))
    wait_for(lambda: logged(run) > 5)
    before, said = logged(run), slurm.folder / "said-while-away"
    cluster.stop_controller()
    try:
        (status,) = slurm.isotrain("status", str(run.path), "--json").json["jobs"]
        assert status["state"] == "UNKNOWN" and status["code"] is None
        typed = ["isotrain", "submit", *tiny_run_model.words(cluster="slurm_cpu", run_dir=other.path, steps=1)]
        with said.open("w") as stream:
            waiting = subprocess.Popen(typed, cwd=slurm.folder, env=slurm.environment, stdout=stream, stderr=stream)
        wait_for(lambda: "asking again in" in said.read_text() or waiting.poll() is not None)
        wait_for(lambda: logged(run) > before)  # it trains on
    finally:
        cluster.start_controller()
    slurm.isotrain("wait", str(run.path))
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)
    assert slurm.field(job, "Restarts") == "0" and "starting again" not in log(run)
    assert waiting.wait(timeout=200) == 0, said.read_text()
    slurm.isotrain("wait", str(other.path))
    jobs = slurm.cluster.ask("squeue", "-h", "-t", "all", "-o", "%o").splitlines()
    assert sum(str(other.path) in one for one in jobs) == 1
