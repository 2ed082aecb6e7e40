"""sacct of a real Slurm with a database: what becomes of jobs that the controller has forgotten."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from launch.slurm.commands import JobState, job_states
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import wait_for
from tests.slurm.conftest import SlurmShell, login
from tests.slurm.rig import ACCOUNTING_COMMANDS, ACCOUNTING_PACKAGES, COMMANDS, INSTALL, Cluster, missing

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
DEAF = "trap '' TERM; while :; do sleep 1; done"


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmShell]:
    """A shell on a cluster of two nodes that keeps account of jobs, and forgets them soon."""
    if lacking := missing((*COMMANDS, *ACCOUNTING_COMMANDS)):
        pytest.skip(f"{', '.join(lacking)} not found; accounts take: {INSTALL} {ACCOUNTING_PACKAGES}")
    running = Cluster(2, accounting=True)
    try:
        running.up()
        yield login(running, tmp_path_factory.mktemp("login"))
    finally:
        running.down()


def test_states_and_codes_of_forgotten_jobs_are_those_of_sacct(
    accounted: SlurmShell, tiny_run_model: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = accounted.cluster
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)

    def sbatch(*words: str) -> str:
        return cluster.ask("sbatch", "--parsable", "--output=/dev/null", *words).strip()

    run = accounted.folder / "run"
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=1, run_dir=run, steps=1)
    mine = accounted.submit(*typed)
    accounted.isotrain("wait", str(run))
    for name in ("ended", "starts"):
        (run / "slurm" / f"{name}.json").unlink()  # so that nobody else can say it

    done, failed, tasks = sbatch("--wrap=exit 0"), sbatch("--wrap=exit 93"), sbatch("--array=0-1", "--wrap=exit 7")
    never = sbatch(f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes", "--wrap=exit 0")
    waiting = sbatch("--hold", "--wrap=exit 0")
    cluster.ask("scancel", waiting)
    cluster.ask("scontrol", "update", "partitionname=batch", "gracetime=1")
    preempted = sbatch("--no-requeue", "--exclusive", "-N2", f"--wrap={DEAF}")
    wait_for(lambda: job_states(preempted)[0].state == "RUNNING")
    urgent = sbatch("-phigh", "--exclusive", "-N2", "--wrap=exit 0")
    wait_for(lambda: job_states(urgent)[0].state == "COMPLETED")
    lost = sbatch("--no-requeue", "-wnode2", "--wrap=sleep 1000")
    wait_for(lambda: job_states(lost)[0].state == "RUNNING")
    cluster.power_cut("node2")
    cluster.ask("scontrol", "update", "nodename=node2", "state=down", "reason=power")

    def remembered() -> list[str]:
        return cluster.ask("squeue", "-h", "-t", "all", "-o", "%i").split()

    wait_for(lambda: not remembered(), 60)
    assert job_states(done) == [JobState(done, "COMPLETED", "", "node1", 0)]
    assert job_states(failed) == [JobState(failed, "FAILED", "", "node1", 93)]
    assert [(one.job_id, one.state, one.code) for one in job_states(tasks)] == [
        (f"{tasks}_0", "FAILED", 7),
        (f"{tasks}_1", "FAILED", 7),
    ]
    assert job_states(waiting) == [JobState(waiting, "CANCELLED", f"by user {os.getuid()}")]
    assert job_states(never)[0].state == "CANCELLED"
    assert [(one.state, one.nodes) for one in job_states(preempted)] == [("PREEMPTED", "node[1-2]")]
    assert [(one.state, one.nodes) for one in job_states(lost)] == [("NODE_FAIL", "node2")]
    (status,) = accounted.isotrain("status", str(run), "--json").json["jobs"]
    assert (status["job_id"], status["state"], status["code"]) == (mine, "COMPLETED", 0)
    assert accounted.isotrain("wait", str(run), "--json").json["jobs"] == [status]
