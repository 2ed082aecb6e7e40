"""The doctor asks a real Slurm, and what it hints at is understood there."""

from __future__ import annotations

import shlex

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.slurm.conftest import SlurmShell

pytestmark = pytest.mark.slurm


def test_a_job_is_judged_by_slurm_and_nodes_answer_for_themselves(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    words = tiny_run_model.words(cluster="slurm_cpu", cluster__nodes=2, run_dir=slurm.folder / "runs")
    before = slurm.run(["squeue", "--noheader", "--states=all"]).out
    found = {one["subject"]: one for one in slurm.isotrain("doctor", *words, "--json").json["findings"]}
    assert (found["Slurm"]["state"], found["submission"]["state"]) == ("ok", "ok")
    done = slurm.isotrain("doctor", *words, "cluster.slurm.partition=hgih", "--json", code=1).json
    (fault,) = [one for one in done["findings"] if one["state"] == "fault"]
    assert fault["subject"] == "submission" and fault["hint"].startswith("cluster.slurm.partition=high")
    assert slurm.run(["squeue", "--noheader", "--states=all"]).out == before
    on_nodes = slurm.run(shlex.split(found["run folder"]["hint"].partition("   or   ")[0]))
    shared = [line for line in on_nodes.out.splitlines() if "all 2 tasks of this step see each other's files" in line]
    assert {line.partition(":")[0] for line in shared} == {"0", "1"}
    assert not list(slurm.folder.glob(".isotrain-doctor-*"))
