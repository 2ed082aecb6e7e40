"""What Slurm warns of, as it really does: a time limit that comes near; preemption without a signal of the job's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, wait_for
from tests.slurm.conftest import SlurmShell
from tests.slurm.rig import Cluster
from tests.slurm.test_training import STEPS, adapter, log, logged, words
from tests.slurm.test_training import undisturbed as undisturbed

pytestmark = [pytest.mark.slurm, pytest.mark.faults, pytest.mark.timeout(600)]
USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"


@pytest.fixture
def plain_preemption(cluster: Cluster) -> Iterator[None]:
    """Slurm as most sites have it: what is preempted gets no signal of its own, its steps get TERM."""
    cluster.reconfigure(USER_SIGNAL, f"#{USER_SIGNAL}")
    assert "preempt_send_user_signal" not in cluster.ask("scontrol", "show", "config")
    yield
    cluster.reconfigure(f"#{USER_SIGNAL}", USER_SIGNAL)


def test_a_job_that_comes_near_its_time_limit_saves_and_goes_on_in_another(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun
) -> None:
    run = Folder(slurm.folder / "limited")
    typed = words(tiny_run_model, run, steps=100_000, checkpoint__every_steps=0, cluster__slurm__signal_s=30)
    job = slurm.submit(*typed)
    wait_for(lambda: logged(run) > 5)
    cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=1")  # Slurm looks every 30 s, for what ends by then
    wait_for(lambda: slurm.field(job, "Restarts") == "1")
    (saved,) = run.steps
    assert saved == logged(run) and slurm.field(job, "TimeLimit") == "00:01:00"
    cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=60")
    wait_for(lambda: logged(run) > saved + 3)
    assert f"resuming {run.path} after step {saved} of 100000" in log(run)
    slurm.isotrain("cancel", str(run.path))
    slurm.isotrain("wait", str(run.path), code=85)
    assert list(run.losses) == list(range(1, logged(run) + 1))  # no step twice, and none left out


@pytest.mark.usefixtures("plain_preemption")
def test_a_job_is_preempted_by_a_slurm_that_sends_no_signal_of_the_users(
    slurm: SlurmShell, tiny_run_model: TinyRun, undisturbed: Folder
) -> None:
    run = Folder(slurm.folder / "preempted-by-term")
    job = slurm.submit(*words(tiny_run_model, run, checkpoint__every_steps=0))
    wait_for(lambda: logged(run) > 5)
    urgent = ["sbatch", "--parsable", "-phigh", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    slurm.wait_for_state(slurm.run(urgent).out.strip(), "COMPLETED")
    slurm.isotrain("wait", str(run.path))
    assert slurm.field(job, "Restarts") == "1"
    assert min(run.steps) < STEPS and f"after step {min(run.steps)} of {STEPS}" in log(run)
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)
