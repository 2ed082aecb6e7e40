"""Jobs that go back into the queue: repeatedly, without time for a save, alone of an array, for want of nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ROOT, Folder, wait_for
from tests.slurm.conftest import SlurmShell
from tests.slurm.rig import Cluster
from tests.slurm.test_training import STEPS, adapter, log, logged, rank_process, ranks, words
from tests.slurm.test_training import undisturbed as undisturbed

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
# What Slurm says of a job that waits for nodes: those that there are, and those that are down.
TOO_FEW = (
    "Resources",
    "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions",
)
# A disk that becomes slow: while the file SLOW is there, what is to be on it takes longer than any grace.
SLOW_DISK = """import os, time
from pathlib import Path
really = os.fsync
def fsync(descriptor):
    slow = Path(os.environ["SLOW"])
    if slow.exists():
        slow.with_name("is saving").touch()
        time.sleep(600)
    really(descriptor)
os.fsync = fsync
"""


@pytest.fixture
def short_grace(cluster: Cluster) -> Iterator[None]:
    """What is preempted has two seconds to leave, and then Slurm's KillWait."""
    cluster.ask("scontrol", "update", "partitionname=batch", "gracetime=2")
    yield
    cluster.ask("scontrol", "update", "partitionname=batch", "gracetime=20")


def test_by_hand_three_warnings_are_three_requeues_and_the_same_bits(
    slurm: SlurmShell,
    tiny_run_model: TinyRun,
    undisturbed: Folder,
    record_property: Callable[[str, object], None],
) -> None:
    run, script = Folder(slurm.folder / "warned"), ROOT / "slurm" / "train.sbatch"
    typed = words(tiny_run_model, run, cluster=None, cluster__nodes=None, checkpoint__every_steps=0)
    job = slurm.run(["sbatch", "--parsable", "-N2", f"--output={slurm.folder}/warned.log", str(script), *typed]).out
    job, saved = job.strip(), 0
    for restart, warning in enumerate(("USR1", "USR2", "USR1"), 1):
        wait_for(lambda saved=saved: logged(run) > saved + 3)
        slurm.cluster.ask("scancel", "--batch", f"--signal={warning}", job)
        warned = time.monotonic()
        wait_for(lambda restart=restart: slurm.field(job, "Restarts") == str(restart))
        assert run.steps[-1] == logged(run) > saved  # the step that was running
        saved = run.steps[-1]
        wait_for(lambda saved=saved: logged(run) > saved)
        record_property("recovery_s", f"{time.monotonic() - warned:.2f}")
    slurm.isotrain("wait", str(run.path))
    assert slurm.field(job, "Restarts") == "3"
    assert (slurm.folder / "warned.log").read_text().count(f"resuming {run.path} after step ") == 3
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)
    assert run.losses == undisturbed.losses


@pytest.mark.usefixtures("short_grace")
def test_a_save_that_takes_longer_than_the_grace_leaves_the_checkpoint_before(
    slurm: SlurmShell, tiny_run_model: TinyRun, undisturbed: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, slow = Folder(slurm.folder / "slow-disk"), tmp_path / "slow"
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    monkeypatch.setenv("SLOW", str(slow))
    typed = ["isotrain", "submit", *words(tiny_run_model, run)]
    slurm.run(["env", f"PYTHONPATH={tmp_path}:{ROOT}", *typed])
    job = slurm.isotrain("status", str(run.path), "--json").json["jobs"][0]["job_id"]
    wait_for(lambda: logged(run) > 8)
    slow.touch()
    wait_for((tmp_path / "is saving").exists)
    before = run.steps
    urgent = ["sbatch", "--parsable", "-phigh", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    slurm.wait_for_state(slurm.run(urgent).out.strip(), "COMPLETED")
    slow.unlink()
    assert before and run.steps == before and not ranks(slurm.cluster, run)
    slurm.isotrain("wait", str(run.path))
    assert slurm.field(job, "Restarts") == "1"
    assert f"resuming {run.path} after step {before[-1]} of {STEPS}" in log(run)
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)


def test_a_task_of_an_array_is_requeued_and_its_sibling_is_not(
    slurm: SlurmShell, tiny_run_model: TinyRun, record_property: Callable[[str, object], None]
) -> None:
    sweep = slurm.folder / "siblings"
    changes = {"cluster": "slurm_cpu", "cluster__nodes": 1, "steps": STEPS, "checkpoint__every_steps": 5}
    changes |= {"checkpoint__keep_last": "3,4"}  # of no consequence for what is learned
    done = slurm.isotrain("sweep", *tiny_run_model.words(**changes, run_dir=sweep), "--json").json
    job, (requeued, sibling) = done["job_id"], [Folder(sweep / point["folder"]) for point in done["points"]]
    wait_for(lambda: logged(requeued) > 8 and logged(sibling) > 8)
    processes = ranks(slurm.cluster, sibling)
    slurm.cluster.ask("scontrol", "requeue", f"{job}_0")
    started = time.monotonic()
    wait_for(lambda: not ranks(slurm.cluster, requeued))
    assert processes and ranks(slurm.cluster, sibling) == processes
    wait_for(lambda: bool(ranks(slurm.cluster, requeued)))
    before = logged(requeued)
    wait_for(lambda: logged(requeued) > before)
    record_property("recovery_s", f"{time.monotonic() - started:.2f}")
    slurm.isotrain("wait", str(sweep))
    assert [slurm.field(f"{job}_{task}", "Restarts") for task in range(2)] == ["1", "0"]
    assert "resuming" in log(requeued) and "resuming" not in log(sibling)
    assert requeued.losses == sibling.losses
    assert adapter(requeued, STEPS) == adapter(sibling, STEPS)


def test_with_fewer_nodes_than_it_needs_a_job_waits_and_says_why(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun, undisturbed: Folder
) -> None:
    run = Folder(slurm.folder / "too-few")
    cluster.ask("scontrol", "update", "nodename=node[3-4]", "state=drain", "reason=repair")
    try:
        job = slurm.submit(*words(tiny_run_model, run))
        wait_for(lambda: logged(run) > 8)
        node, _ = rank_process(cluster, run)
        cluster.power_cut(node)
        try:
            cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=power")
            wait_for(lambda: slurm.field(job, "Reason") in TOO_FEW)
            (status,) = slurm.isotrain("status", str(run.path), "--json").json["jobs"]
            assert (status["state"], status["code"]) == ("PENDING", None) and status["saved"] == run.steps[-1]
            assert status["reason"] in TOO_FEW
        finally:
            cluster.power_on(node)
    finally:
        cluster.ask("scontrol", "update", "nodename=node[3-4]", "state=resume")
    slurm.isotrain("wait", str(run.path))
    assert slurm.field(job, "Restarts") == "1"
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)
