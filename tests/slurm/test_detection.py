"""``cluster=auto`` finds what a real Slurm has: a partition's nodes from outside, a job's own part of them inside."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.slurm.conftest import SlurmShell

pytestmark = pytest.mark.slurm


def test_nodes_are_found_from_outside_and_inside(slurm: SlurmShell, tiny_run_model: TinyRun) -> None:
    words = tiny_run_model.words(cluster="auto", run_dir=slurm.folder / "auto", batch__global_sequences=32)
    outside = _cluster(slurm.isotrain("plan", *words, "cluster.slurm.partition=batch", "--json").out)
    assert (outside["nodes"], outside["gpus_per_node"], outside["device"]) == (4, 8, "cuda")
    assert "4 nodes in partition batch: 8 x GPU" in outside["found"]
    asked = ["srun", "--output=0", "--nodes=2", "--ntasks=2", "--gres=gpu:3", "--cpus-per-task=2", "--mem=4000"]
    said = slurm.run([*asked, "isotrain", "plan", *words, "--json"]).out
    inside = _cluster(said)
    assert (inside["nodes"], inside["gpus_per_node"], inside["device"]) == (2, 3, "cuda")
    cores = slurm.run(["srun", "--nodes=1", "--mem=4000", "-c", "2", "isotrain", "plan", *words, "--json"]).out
    alone = _cluster(cores)
    assert (alone["nodes"], alone["gpus_per_node"], alone["device"]) == (1, 2, "cpu")
    assert alone["memory_gib"] == pytest.approx(4000 / 1024 / 2, abs=0.1)


def _cluster(said: str) -> dict[str, Any]:
    """What the plan in the last line of an output is for."""
    cluster: dict[str, Any] = json.loads(said.splitlines()[-1])["cluster"]
    return cluster
