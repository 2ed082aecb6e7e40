"""A run folder that has a checkpoint: ``train`` goes on, says so, or refuses; it never starts over."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.building import read_job
from orchestrator.pages.run_folder import read_run
from orchestrator.schedule import learning_rate
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, Shell, close, is_one_screen


def test_a_finished_run_says_so_and_nothing_is_started(
    command: Callable[..., Any], uninterrupted: Folder, tiny_run_model: TinyRun
) -> None:
    before = (uninterrupted.path / "metrics.jsonl").read_bytes()
    words = tiny_run_model.words(cluster="laptop", topology__pp=2, run_dir=uninterrupted.path)
    done = command("train", *words, "--json", code=0)
    assert "is finished: 6 of 6 steps" in done.json["message"] and done.json["step"] == 6
    elsewhere = tiny_run_model.words(run_dir=uninterrupted.path, topology__pp=None)
    assert "is finished" in command("train", *elsewhere, code=0).err  # the same run, on one process
    assert (uninterrupted.path / "metrics.jsonl").read_bytes() == before


def test_train_with_more_steps_resumes_by_itself_and_another_rate_needs_the_hint(
    command: Callable[..., Any], shell: Shell, uninterrupted: Folder, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    done = shell.isotrain("train", *tiny_run_model.words(run_dir=run.path, steps=7), "--json")
    assert f"resuming {run.path} after step 6 of 7" in done.err and done.json["step"] == 7
    assert close(uninterrupted.losses, {step: loss for step, loss in run.losses.items() if step < 7}, 0)
    assert sorted(run.losses) == [1, 2, 3, 4, 5, 6, 7]

    refused = command(
        "train", *tiny_run_model.words(run_dir=run.path, steps=8, optimizer__lr=0.02, seed=1), "--json", code=64
    )
    assert "optimizer.lr: 0.01 -> 0.02" in refused.err and "seed: 0 -> 1" in refused.err
    assert is_one_screen(refused.err)
    typed = shlex.split(refused.hint.partition("   or   ")[0])
    assert typed[:2] == ["isotrain", "resume"]
    done = shell.isotrain(*typed[1:])
    expected = learning_rate(read_job(run.path).optimizer, 8, 8)
    assert run.metrics[8]["learning_rate"] == pytest.approx(expected) and run.steps == [3, 6, 7, 8][-len(run.steps) :]
    assert "after step 7 of 8" in done.err


def test_by_hand_torchrun_does_the_same_also_with_an_idle_rank(
    shell: Shell, uninterrupted: Folder, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    words = tiny_run_model.words(cluster="laptop", topology__tp=3, run_dir=run.path)
    done = shell.torchrun(4, "train", *words, "--json")
    assert (done.json["code"], done.json["step"], done.json["run_dir"]) == (0, 6, str(run.path))
    assert close(uninterrupted.losses, run.losses) and sorted(run.losses) == [1, 2, 3, 4, 5, 6]
    assert {exit["code"] for exit in run.exits.values()} == {0} and len(run.exits) == 4
    assert "rank 3 is idle: the plan uses 3 of 4 ranks" in (run.path / "logs/rank-3.log").read_text()
    assert run.exits[3]["time"] >= run.exits[0]["time"]  # an agent whose ranks have ended does not come back
    assert done.err.count("step 6/6") == 1
    assert "Run: run" in (run.path / "report.html").read_text() and len(read_run(run.path).launches) == 1


def test_by_hand_on_two_nodes_every_rank_is_used_and_the_run_is_the_same(
    shell: Shell, uninterrupted: Folder, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    words = tiny_run_model.words(cluster="laptop", topology__pp=2, run_dir=run.path)
    done = shell.torchrun_nodes(2, 1, "train", *words)
    assert close(uninterrupted.losses, run.losses) and run.steps == uninterrupted.steps
    assert [node.err.count("step 6/6") for node in done] == [1, 0]
    one = tiny_run_model.words(topology__tp=1, topology__pp=1, topology__dp=1, run_dir=tmp_path / "refused")
    refused = shell.torchrun_nodes(2, 1, "train", *one, code=1)
    assert "on cluster.nodes=2 all must be used" in refused[0].err


def test_by_hand_an_error_ends_all_ranks_alike_and_is_said_once(
    shell: Shell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    done = shell.torchrun(2, "train", *tiny_run_model.words(cluster="laptop", topology__tp=3, run_dir=run.path), code=1)
    message = "the job needs 3 ranks, but torchrun has started 2"
    assert done.err.count(message) == 1
    assert sorted(run.exits) == [0, 1]
    for exit in run.exits.values():
        assert (exit["code"], exit["message"]) == (64, message)
        assert exit["hint"].startswith("torchrun --nproc-per-node 3 ")
    assert not (run.path / "job.yaml").exists()
    plan = shell.isotrain("train", *tiny_run_model.words(run_dir=run.path), "--dry-run", "--json")
    assert json.loads(plan.out)  # what the failed launch left does not make the folder someone else's
