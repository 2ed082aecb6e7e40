"""Runs that train on a real Slurm: the same losses, and the same adapter bit for bit whatever happens on the way."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.environment import MEETING_HOST_VARIABLE
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ROOT, Folder, close, distance, wait_for
from tests.slurm.conftest import SlurmShell
from tests.slurm.rig import Cluster

pytestmark = pytest.mark.slurm
ADAPTER = Path("adapter/adapter_model.safetensors")
STEPS, EVERY = 200, 6  # some 8 s: what disturbs a run comes before its end also on a quick machine
TWO_NODES = {"cluster": "slurm_cpu", "cluster__nodes": 2, "topology__pp": 2, "steps": STEPS}
TWO_NODES |= {"checkpoint__every_steps": EVERY, "optimizer__schedule": "constant"}
TWO_NODES |= {"optimizer__lr": 0.001}  # so small that rounding stays rounding for so many steps


def words(tiny: TinyRun, run: Folder, **changes: object) -> list[str]:
    """A run of two stages on two nodes, long enough to be disturbed."""
    return tiny.words(**(TWO_NODES | changes), run_dir=run.path)


def adapter(run: Folder, step: int) -> str:
    """The digest of what was learned, and of the optimizer's state."""
    files = sorted(run.checkpoint(step).rglob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def logged(run: Folder) -> int:
    """The last step that metrics.jsonl holds."""
    file = run.path / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def log(run: Folder) -> str:
    """The job's own log."""
    return "".join(file.read_text() for file in sorted((run.path / "slurm").glob("*.log")))


def rank_process(cluster: Cluster, run: Folder, rank: int = 1) -> tuple[str, int]:
    """The node of a rank of this run, by default one that is not the first, and its process on this machine."""
    for node in cluster.nodes:
        for pid in cluster.pids(node):
            is_rank = {b"worker", str(run.path).encode()} <= set(proc(pid, "cmdline"))
            if is_rank and f"SLURM_PROCID={rank}".encode() in proc(pid, "environ"):
                return node, pid
    raise AssertionError(f"rank {rank} does not run")


def ranks(cluster: Cluster, run: Folder) -> list[int]:
    """The processes of a run's ranks on this machine."""
    mine = [b"-m", b"orchestrator", b"worker", str(run.path).encode()]  # of srun there is more before it
    return [pid for pid in cluster.processes if proc(pid, "cmdline")[1:] == mine]


def proc(pid: int, name: str) -> list[bytes]:
    """The words that /proc has of a process; none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().removesuffix(b"\0").split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def first_step_of(run: Folder, job: str, slurm: SlurmShell) -> float:
    """Seconds until a job that loses a node trains in its next allocation, from when Slurm has noticed."""
    wait_for(lambda: slurm.field(job, "Restarts") == "1")
    lost = time.monotonic()
    before = log(run).count("\nstep ")
    wait_for(lambda: log(run).count("\nstep ") > before)
    return time.monotonic() - lost


def next_step_of(run: Folder, job: str, slurm: SlurmShell) -> float:
    """Seconds until a job that has just lost a rank trains again, or is over."""
    killed = time.monotonic()
    time.sleep(0.5)
    before = logged(run)
    wait_for(lambda: logged(run) > before or slurm.field(job, "JobState") != "RUNNING")
    return time.monotonic() - killed


def kill_srun(cluster: Cluster) -> None:
    """The one that started the ranks dies, and its ranks live on."""
    for pid in cluster.pids("node1"):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"srun\0"):
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError("srun does not run on node1")


@pytest.fixture(scope="module")
def undisturbed(slurm: SlurmShell, tiny_run_model: TinyRun) -> Folder:
    """The same run, started by torchrun on this machine and left alone."""
    run = Folder(slurm.folder / "undisturbed")
    slurm.isotrain("train", *words(tiny_run_model, run, cluster="laptop", cluster__nodes=1, topology__dp=1))
    return run


def test_tp_pp_dp_on_four_nodes_is_one_process(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    one, four = Folder(slurm.folder / "one"), Folder(slurm.folder / "four nodes")
    slurm.isotrain("train", *tiny_run_model.words(run_dir=one.path))
    sizes = {"cluster": "slurm_cpu", "cluster__gpus_per_node": 2, "topology__tp": 2, "topology__pp": 2}
    typed = tiny_run_model.words(**sizes, run_dir=f"'{four.path}'")
    shown = slurm.isotrain("submit", *typed, "--dry-run").out
    assert not four.path.exists()
    job = slurm.submit(*typed)
    done = slurm.isotrain("wait", str(four.path), "--json").json
    assert [(one["job_id"], one["state"], one["code"], one["step"]) for one in done["jobs"]] == [
        (job, "COMPLETED", 0, 6)
    ]
    assert (four.path / "slurm" / "train.sbatch").read_text() == shown
    assert close(four.losses, one.losses)
    assert len(four.exits) == 8 and not list((four.path / "states").glob("rank-*"))
    assert "done: 6 of 6 steps" in slurm.isotrain("logs", str(four.path)).out
    assert "[7] --- rank 7, process" in slurm.isotrain("logs", str(four.path), "--rank", "all").out


def test_by_hand_the_cluster_is_the_allocation(slurm: SlurmShell, tiny_run_model: TinyRun, undisturbed: Folder) -> None:
    run = Folder(slurm.folder / "by-hand")
    script = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
    typed = words(tiny_run_model, run, cluster=None, cluster__nodes=None, steps=4)
    job = slurm.run(["sbatch", "--parsable", "-N2", f"--output={slurm.folder}/by-hand.log", str(script), *typed]).out
    slurm.wait_for_state(job.strip(), "COMPLETED", "FAILED")
    assert run.losses == {step: undisturbed.losses[step] for step in range(1, 5)}
    (status,) = slurm.isotrain("status", str(run.path), "--json").json["jobs"]
    assert (status["state"], status["step"]) == ("COMPLETED", 4)


def test_a_killed_rank_is_started_again_in_the_allocation(
    slurm: SlurmShell,
    cluster: Cluster,
    tiny_run_model: TinyRun,
    undisturbed: Folder,
    record_property: Callable[[str, object], None],
) -> None:
    run = Folder(slurm.folder / "killed")
    job = slurm.submit(*words(tiny_run_model, run))
    wait_for(lambda: logged(run) > 8)
    for rank in (1, 0):  # rank 0 holds the store where ranks meet
        node, pid = rank_process(cluster, run, rank)
        os.kill(pid, signal.SIGKILL)
        record_property("recovery_s", f"{next_step_of(run, job, slurm):.2f}")
        assert f"rank {rank} was killed by SIGKILL and left no word ({node}); starting again from step" in log(run)
    _, pid = rank_process(cluster, run)
    first = cluster.ask("scontrol", "-o", "show", "node", slurm.field(job, "BatchHost"))
    address = next(word.partition("=")[2] for word in first.split() if word.startswith("NodeAddr="))
    assert address.startswith("127.0.0.1") and f"{MEETING_HOST_VARIABLE}={address}".encode() in proc(pid, "environ")
    kill_srun(cluster)
    slurm.isotrain("wait", str(run.path))
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)
    assert run.losses == undisturbed.losses
    assert slurm.field(job, "Restarts") == "0"
    assert not ranks(cluster, run)


def test_a_preempted_job_saves_makes_room_and_comes_back(
    slurm: SlurmShell,
    tiny_run_model: TinyRun,
    undisturbed: Folder,
    record_property: Callable[[str, object], None],
) -> None:
    run = Folder(slurm.folder / "preempted")
    job = slurm.submit(*words(tiny_run_model, run, checkpoint__every_steps=0))
    wait_for(lambda: logged(run) > 5)
    # Its batch script gets USR1, as by --signal=B:USR1@120 before the time limit.
    urgent = ["sbatch", "--parsable", "-phigh", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    preempted = time.monotonic()
    high = slurm.run(urgent).out.strip()
    slurm.wait_for_state(high, "COMPLETED")
    assert slurm.field(job, "Restarts") == "1"
    (saved,) = run.steps  # the step that was running
    wait_for(lambda: logged(run) > saved)
    record_property("recovery_s", f"{time.monotonic() - preempted:.2f}")
    wait_for(lambda: logged(run) > saved + 3)
    slurm.cluster.ask("scontrol", "requeue", job)  # and without any warning
    slurm.isotrain("wait", str(run.path))
    assert f"resuming {run.path} after step {saved} of {STEPS}" in log(run)
    assert slurm.field(job, "Restarts") == "2"
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)


def test_a_lost_node_is_replaced(
    slurm: SlurmShell,
    cluster: Cluster,
    tiny_run_model: TinyRun,
    undisturbed: Folder,
    record_property: Callable[[str, object], None],
) -> None:
    run = Folder(slurm.folder / "lost")
    job = slurm.submit(*words(tiny_run_model, run))
    wait_for(lambda: logged(run) > 8)
    node, _ = rank_process(cluster, run)
    cluster.power_cut(node)
    try:
        cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=power")  # sooner than by itself
        record_property("recovery_s", f"{first_step_of(run, job, slurm):.2f}")
        slurm.isotrain("wait", str(run.path))
    finally:
        cluster.power_on(node)
    assert slurm.field(job, "Restarts") == "1"
    assert adapter(run, STEPS) == adapter(undisturbed, STEPS)


def test_a_range_of_nodes_goes_on_with_those_that_are_left(
    slurm: SlurmShell,
    cluster: Cluster,
    tiny_run_model: TinyRun,
    undisturbed: Folder,
    record_property: Callable[[str, object], None],
) -> None:
    run = Folder(slurm.folder / "elastic")
    cluster.settle()
    job = slurm.submit(*words(tiny_run_model, run, cluster__nodes="2-4"))
    wait_for(lambda: logged(run) > 8)
    assert len(run.exits) == 0 and slurm.field(job, "NumNodes") == "4"
    for node in ("node3", "node4"):
        cluster.power_cut(node)
    try:
        record_property("recovery_s", f"{first_step_of(run, job, slurm):.2f}")  # Slurm notices by itself
        slurm.isotrain("wait", str(run.path))
    finally:
        for node in ("node3", "node4"):
            cluster.power_on(node)
    assert slurm.field(job, "NumNodes") == "2" and "dp=2" in log(run) and "dp=1" in log(run)
    assert close(run.losses, undisturbed.losses)
    assert distance(run.checkpoint(STEPS) / ADAPTER, undisturbed.checkpoint(STEPS) / ADAPTER) < 1e-5


def test_a_cancelled_job_saves_and_is_not_requeued(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    run = Folder(slurm.folder / "cancelled")
    job = slurm.submit(*words(tiny_run_model, run, steps=100_000, checkpoint__every_steps=0))
    wait_for(lambda: logged(run) > 2)
    slurm.isotrain("cancel", str(run.path))
    done = slurm.isotrain("wait", str(run.path), "--json", code=85).json
    assert [(one["state"], one["code"], one["saved"]) for one in done["jobs"]] == [("FAILED", 85, logged(run))]
    assert slurm.field(job, "Restarts") == "0" and "cancelled, so it is not requeued" in log(run)


def test_a_run_that_makes_no_progress_is_given_up(slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun) -> None:
    run = Folder(slurm.folder / "hopeless")
    typed = words(tiny_run_model, run, steps=100_000, checkpoint__every_steps=0, recovery__restarts=1)
    slurm.submit(*typed, "recovery.silent_s=5")
    for start in range(2):
        wait_for(lambda start=start: log(run).count("\nstep 3/") > start)  # type: ignore[misc]
        _, pid = rank_process(cluster, run)
        os.kill(pid, signal.SIGSTOP)
    done = slurm.isotrain("wait", str(run.path), "--json", code=93).json
    assert "rank 1 gives no sign of life for" in done["jobs"][0]["reason"]
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_tasks_of_an_array_go_on_with_the_same_run_and_leave_no_secret(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run, keys = Folder(slurm.folder / "array"), tmp_path / "keys"
    keys.write_text("WANDB_API_KEY=hunter2hunter2\n")
    keys.chmod(0o600)
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=1, run_dir=run.path, steps=2)
    job = slurm.submit(*typed, "cluster.slurm.array='0-1%1'", f"cluster.slurm.secrets={keys}")
    wait_for(lambda: bool(ranks(cluster, run)))
    (rank,) = ranks(cluster, run)
    typed_anywhere = [word for pid in cluster.processes for word in proc(pid, "cmdline")]
    assert b"WANDB_API_KEY=hunter2hunter2" in proc(rank, "environ")  # which is where wandb looks
    assert b"slurmctld" in b" ".join(typed_anywhere) and not any(b"hunter2" in word for word in typed_anywhere)
    done = slurm.isotrain("wait", str(run.path), "--json").json
    assert [(one["job_id"], one["code"]) for one in done["jobs"]] == [(f"{job}_0", 0), (f"{job}_1", 0)]
    assert len(run.losses) == 2 and "is finished: 2 of 2 steps" in log(run)
    everything = b"".join(found.read_bytes() for found in run.path.rglob("*") if found.is_file())
    assert b"hunter2" not in everything and "hunter2" not in slurm.cluster.ask("scontrol", "show", "job", job)


def test_a_job_whose_dependency_failed_does_not_wait_for_ever(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    failed = slurm.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap", "exit 3"]).out.strip()
    run = Folder(slurm.folder / "dependent")
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=1, run_dir=run.path, steps=1)
    slurm.submit(*typed, f"cluster.slurm.dependency=afterok:{failed}")
    done = subprocess.run(
        ["isotrain", "wait", str(run.path)], env=slurm.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "CANCELLED" in done.stdout


def test_a_refusal_of_the_real_sbatch_is_said_with_the_nearest_name(
    slurm: SlurmShell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    typed = tiny_run_model.words(cluster="slurm_cpu", run_dir=tmp_path / "run")
    done = slurm.isotrain("submit", *typed, "cluster.slurm.partition=batsch", code=64)
    assert "invalid partition specified: batsch" in done.err and done.hint.startswith("cluster.slurm.partition=batch")


@pytest.mark.parametrize("by_hand", [False, True], ids=["submitted", "by-hand"])
def test_scancel_leaves_time_for_one_save_and_nothing_requeues(
    slurm: SlurmShell, tiny_run_model: TinyRun, by_hand: bool
) -> None:
    run = Folder(slurm.folder / f"scancelled-{by_hand}")
    changes = {"steps": 100_000, "checkpoint__every_steps": 0}
    if by_hand:
        typed = words(tiny_run_model, run, **changes, cluster=None, cluster__nodes=None)
        said = f"--output={slurm.folder}/scancelled.log"
        job = slurm.run(["sbatch", "--parsable", "-N2", said, str(ROOT / "slurm" / "train.sbatch"), *typed]).out.strip()
    else:
        job = slurm.submit(*words(tiny_run_model, run, **changes))
    wait_for(lambda: logged(run) > 2)
    slurm.cluster.ask("scancel", job)
    done = slurm.isotrain("wait", str(run.path), "--json", code=85).json
    assert [(one["state"], one["code"], one["saved"]) for one in done["jobs"]] == [("CANCELLED", 85, logged(run))]
    assert slurm.field(job, "Restarts") == "0"
