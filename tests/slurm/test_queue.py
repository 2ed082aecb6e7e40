"""What a queue does with runs: more nodes when they are back, and chains of jobs that depend on each other."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, close, wait_for
from tests.slurm.conftest import SlurmShell
from tests.slurm.rig import Cluster
from tests.slurm.test_training import STEPS, adapter, log, logged, rank_process, words
from tests.slurm.test_training import undisturbed as undisturbed

pytestmark = pytest.mark.slurm


@pytest.mark.faults
def test_a_requeued_run_grows_when_its_nodes_are_back(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun, undisturbed: Folder
) -> None:
    run = Folder(slurm.folder / "grown")
    cluster.settle()
    cluster.power_cut("node4")
    try:
        cluster.ask("scontrol", "update", "nodename=node4", "state=down", "reason=power")
        job = slurm.submit(*words(tiny_run_model, run, cluster__nodes="2-4"))
        wait_for(lambda: logged(run) > 8)
        assert slurm.field(job, "NumNodes") == "3"
        _, pid = rank_process(cluster, run)
        os.kill(pid, signal.SIGSTOP)  # so that it is not done before the node is back
    finally:
        cluster.power_on("node4")
    slurm.cluster.ask("scontrol", "requeue", job)
    slurm.isotrain("wait", str(run.path))
    assert (slurm.field(job, "NumNodes"), slurm.field(job, "Restarts")) == ("4", "1")
    assert "2 of 3 nodes are used" in log(run) and "on 4 ranks" in log(run)
    assert close(run.losses, undisturbed.losses)


@pytest.mark.faults
def test_a_node_that_loses_its_rank_twice_is_left_out(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun, undisturbed: Folder
) -> None:
    run = Folder(slurm.folder / "suspect")
    cluster.settle()  # Slurm gives the fewest nodes if others are not there at once
    job = slurm.submit(*words(tiny_run_model, run, cluster__nodes="2-3"), "recovery.silent_s=6")
    for number in (signal.SIGSTOP, signal.SIGKILL):  # two of three nodes are used; rank 1 is on the second
        before = logged(run)
        wait_for(lambda before=before: logged(run) > before + 8)
        node, pid = rank_process(cluster, run)
        os.kill(pid, number)
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())
    slurm.isotrain("wait", str(run.path))
    assert f"{node} left out: starts were lost to it 2 times" in log(run)
    assert re.search(r"rank 1 gives no sign of life for .*; rank 0 waits in \w+ of pp \(ranks 0, 1\) at ", log(run))
    assert slurm.field(job, "Restarts") == "0"
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)


def test_a_chain_of_jobs_ends_as_its_dependencies_say(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    def submit(name: str, dependency: str = "") -> str:
        run_dir = slurm.folder / f"chain-{name}"
        typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=1, run_dir=run_dir, steps=1)
        return slurm.submit(*typed, *([f"cluster.slurm.dependency={dependency}"] if dependency else []))

    first = submit("first")
    failing = ["sbatch", "--parsable", f"--dependency=afterok:{first}", "--output=/dev/null", "--wrap", "exit 3"]
    failed = slurm.run(failing).out.strip()
    after_failed, after_any = submit("ok", f"afterok:{failed}"), submit("any", f"afterany:{failed}")
    for job, state in ((first, "COMPLETED"), (failed, "FAILED"), (after_failed, "CANCELLED"), (after_any, "COMPLETED")):
        slurm.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
        assert slurm.field(job, "JobState") == state
    last = slurm.isotrain("wait", str(slurm.folder / "chain-any"), "--json").json
    assert [(one["state"], one["code"]) for one in last["jobs"]] == [("COMPLETED", 0)]


def test_of_jobs_with_the_same_name_one_at_a_time_runs(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    run = Folder(slurm.folder / "alone-by-name")
    first = ["sbatch", "--parsable", f"--job-name=isotrain-{run.path.name}", "--output=/dev/null", "--wrap=sleep 1000"]
    running = slurm.run(first).out.strip()
    slurm.wait_for_state(running, "RUNNING")
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=1, run_dir=run.path, steps=1)
    job = slurm.submit(*typed, "cluster.slurm.dependency=singleton")
    (status,) = slurm.isotrain("status", str(run.path), "--json").json["jobs"]
    assert (status["job_id"], status["state"], status["reason"]) == (job, "PENDING", "Dependency")
    slurm.cluster.ask("scancel", running)
    slurm.isotrain("wait", str(run.path))
    assert list(run.losses) == [1]
