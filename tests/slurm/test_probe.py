"""Nodes that are broken in a real way are found on a real Slurm, and the job trains without them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, wait_for
from tests.slurm.conftest import SlurmShell
from tests.slurm.rig import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
PATIENCE = "40"  # for a node that never answers; a good one needs some 8 s of two cores


@contextmanager
def without_files(cluster: Cluster, node: str, folder: Path) -> Iterator[None]:
    """A node on which a shared folder is not mounted: something else is there, read-only."""
    cluster.inside(node, "mount", "-t", "tmpfs", "-o", "ro", "none", str(folder))
    try:
        yield
    finally:
        cluster.inside(node, "umount", "-l", str(folder))


@contextmanager
def hanging_files(cluster: Cluster, node: str, folder: Path, file: Path) -> Iterator[None]:
    """A node that waits for ever when it opens a file: its file server does not answer."""
    cluster.inside(node, "mount", "-t", "tmpfs", "none", str(folder))
    cluster.inside(node, "mkdir", "-p", str(file.parent))
    cluster.inside(node, "mkfifo", str(file))
    try:
        yield
    finally:
        cluster.inside(node, "umount", "-l", str(folder))


def by_node(probe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is said of each node."""
    return {one["node"]: one for one in probe["nodes"]}


def test_a_job_trains_without_a_node_that_lacks_the_folder_and_one_that_hangs(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun
) -> None:
    shared = slurm.folder / "shared"
    run = Folder(shared / "a run")
    (run.path / "slurm").mkdir(parents=True)
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=2, topology__pp=2, run_dir=f"'{run.path}'")
    asked = run.path / "slurm" / "probe-asked.json"
    with without_files(cluster, "node2", shared), hanging_files(cluster, "node3", shared, asked):
        probe = ("--probe-nodes", "4", "--probe-patience", PATIENCE)
        done = slurm.isotrain("submit", *typed, *probe, "--json")
        found = done.json["probe"]
        assert (found["good"], found["bad"]) == (["node1", "node4"], ["node2", "node3"])
        assert by_node(found)["node2"]["why"] == [f"{asked} cannot be read: No such file or directory"]
        assert by_node(found)["node3"]["why"] == [f"no answer in {PATIENCE} s"]
        slurm.isotrain("wait", str(run.path))
        state = slurm.isotrain("status", str(run.path), "--json").json["jobs"][0]
    assert state["nodes"] == "node[1,4]" and state["code"] == 0 and len(run.losses) == 6
    script = (run.path / "slurm" / "train.sbatch").read_text()
    assert "#SBATCH --exclude=node2,node3\n" in script
    links = by_node(found)["node1"]["report"]["links"]
    assert ["node4"] in [link["peers"] for link in links if link["rate"]]
    files = {file.name: json.loads(file.read_text()) for file in (run.path / "probe").glob("*.json")}
    assert {"node1.json", "node4.json"} <= files.keys() and "node3.json" not in files
    assert "probe: job" in done.err and "answers" in done.err
    said = slurm.cluster.ask("scontrol", "-o", "show", "job", done.json["job_id"])
    assert "ExcNodeList=node[2-3]" in said


def test_a_node_that_loses_power_is_told_of_and_too_few_are_refused(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun
) -> None:
    shared = slurm.folder / "shared-2"
    run = shared / "run"
    (run / "slurm").mkdir(parents=True)
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=3, batch__global_sequences=6, run_dir=run)
    before = slurm.run(["squeue", "--noheader", "--states=all", "--format=%i"]).out.split()
    command = ("submit", *typed, "--probe-nodes", "4", "--probe-patience", PATIENCE, "--json")
    with hanging_files(cluster, "node3", shared, run / "slurm" / "probe-asked.json"):
        started = slurm.start(*command)  # while node3 is waited for, node4 has answered, and goes
        wait_for((run / "probe" / "node4.json").is_file, 90)
        cluster.power_cut("node4")
        try:
            out, err = started.communicate(timeout=200)
        finally:
            cluster.ask("scontrol", "update", "nodename=node4", "state=down", "reason=power")
            cluster.power_on("node4")
    assert started.returncode == 71, err
    said = json.loads(out)
    assert said["error"] == "2 of 4 probed nodes are good, and the job needs 3: nothing is submitted"
    assert said["hint"] == "--probe-nodes 5   or   cluster.nodes=2-3"
    assert said["probe"]["good"] == ["node1", "node2"]
    assert by_node(said["probe"])["node4"]["why"]
    after = slurm.run(["squeue", "--noheader", "--states=all", "--format=%i"]).out.split()
    assert len(after) == len(before) + 1 and not (run / "job.yaml").exists()  # the probe, and nothing else


def test_nodes_without_the_gpus_that_a_job_needs_are_all_bad(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    run = slurm.folder / "no-gpus"
    typed = tiny_run_model.words(cluster="slurm_4x8", cluster__nodes=2, batch__global_sequences=16, run_dir=run)
    done = slurm.isotrain("submit", *typed, "--probe", code=71)
    assert "0 of 2 probed nodes are good, and the job needs 2" in done.err and done.hint.startswith("--probe-nodes 4")
    rows = [line for line in done.out.splitlines() if line.startswith("node")]
    assert len([row for row in rows if "0 of 8 GPUs (this torch is built for CPUs only)" in row]) == 2


def test_a_probe_by_hand_leaves_its_table_in_the_log(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    run, script = slurm.folder / "by-hand-probe", Path(__file__).resolve().parents[2] / "slurm" / "probe.sbatch"
    typed = tiny_run_model.words(cluster=None, cluster__nodes=None, run_dir=run)
    log = slurm.folder / "by-hand-probe.log"
    job = slurm.run(["sbatch", "--parsable", "-N3", f"--output={log}", str(script), *typed]).out.strip()
    slurm.wait_for_state(job, "COMPLETED", "FAILED")
    rows = [line.split() for line in log.read_text().splitlines() if line.startswith("node") and "GB/s" in line]
    assert [row[0] for row in rows] == ["node1", "node2", "node3"]
    is_good = {row[-1] for row in rows} == {"good"}
    assert slurm.field(job, "ExitCode") == ("0:0" if is_good else "1:0")  # a busy machine may have a slow node


def test_a_first_node_that_is_bad_leaves_no_answer_and_is_named(
    slurm: SlurmShell, cluster: Cluster, tiny_run_model: TinyRun
) -> None:
    shared = slurm.folder / "shared-3"
    (shared / "run").mkdir(parents=True)
    typed = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=2, run_dir=shared / "run")
    with without_files(cluster, "node1", shared):
        done = slurm.isotrain("submit", *typed, "--probe", code=71)
    assert "before any node answered, and its first node, node1, has left no log" in done.err
    assert done.hint == "cluster.slurm.exclude=node1"
