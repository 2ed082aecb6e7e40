"""Jobs that go back into the queue: repeatedly, without time for a save, alone of an array, for want of nodes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ROOT, Folder, wait_for
from tests.slurm.conftest import SlurmShell
from tests.slurm.test_training import STEPS, adapter, log, logged, ranks, words
from tests.slurm.test_training import undisturbed as undisturbed

pytestmark = [pytest.mark.slurm, pytest.mark.faults]


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
    for restart in range(1, 4):
        wait_for(lambda saved=saved: logged(run) > saved + 3)
        slurm.cluster.ask("scancel", "--batch", "--signal=USR1", job)
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
