"""Which points of a sweep train on one base, what is said of the others, and how a launch of several is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from launch.exits import first_cause, read_exits, write_exit
from launch.local import LaunchResult
from launch.many import TaskEnd
from launch.request import Rendered
from orchestrator.cli import main
from orchestrator.config.building import read_job
from orchestrator.config.grid import grid
from orchestrator.errors import ConfigError, DataError
from orchestrator.locking import locked
from orchestrator.pages.run_folder import read_run
from orchestrator.planning.memory import GIB
from orchestrator.runs import write_run
from orchestrator.sweeps import together as together_command
from orchestrator.sweeps.bundle import is_bundle, is_over, read_bundle, write_bundle
from orchestrator.sweeps.planning import PlannedSweep, plan_sweep
from orchestrator.sweeps.running import end_of_point
from orchestrator.sweeps.searching import plan_only
from orchestrator.sweeps.sharing import check_sharing, launches, needed
from orchestrator.sweeps.together import PointEnd, point_end
from tests.orchestrator.test_cli import TINY

SHARED = [*TINY, "sweep.share_base=true"]


def planned(folder: Path, *words: str) -> PlannedSweep:
    all_words = [*SHARED, *words, f"run_dir={folder}/s"]
    return plan_sweep(all_words, grid(all_words), plan_only)


def together(sweep: PlannedSweep) -> list[list[int]]:
    return [one.numbers for one in launches(sweep.waiting)]


@pytest.mark.parametrize(
    "words",
    [
        ["tuner.r=2,8", "optimizer.lr=1e-3,1e-4"],
        ["tuner.dora=false,true", "tuner.rslora=false,true"],
        ["tuner.r=2", "tuner.init=default,pissa", "tuner.loraplus_lr_ratio=1,4"],
        ["tuner.targets=[q_proj],[v_proj]", "tuner.dropout=0,0.1"],
        ["steps=3,7", "optimizer.schedule=constant,cosine"],
        ["batch.global_sequences=2,4", "batch.sequence_tokens=16,32"],
        ["checkpoint.every_steps=1,2", "anomalies.spike=warn,stop"],
        ["objective.train_on=last,all", "tuner.modules_to_save=[],[norm]"],
    ],
)
def test_what_an_adapter_owns_may_differ_on_one_base(tmp_path: Path, words: list[str]) -> None:
    assert together(planned(tmp_path, *words)) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        (["seed=0,1", "tuner.r=2,4"], [[0, 1], [2, 3]]),  # random weights are another base with another seed
        (["tuner=lora,full", "optimizer.lr=1e-3,1e-4"], [[0, 1], [2], [3]]),
        (["precision=fp32,bf16", "tuner.r=2,4"], [[0, 1], [2, 3]]),
        (["tuner.r=2,4,8", "batch.micro_sequences=1,auto"], [[0, 2, 4], [1], [3], [5]]),
        (["cluster=laptop", "topology.tp=1,2", "topology.pp=1", "topology.dp=1", "tuner.r=2,4"], [[0, 1], [2, 3]]),
        (["recovery.restarts=0,1", "tuner.r=2,4"], [[0, 1], [2, 3]]),
        (["sweep.share_base=true,false", "tuner.r=2,4"], [[0, 1], [2], [3]]),
    ],
)
def test_points_with_another_base_are_in_another_launch(
    tmp_path: Path, words: list[str], groups: list[list[int]]
) -> None:
    assert together(planned(tmp_path, *words)) == groups


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tuner=full", "optimizer.lr=1e-3,1e-4"], r"no two of 2 points can share a base: tuner\.name=full trains the "
                                                   r"base itself \(point 0, 1\)"),
        (["seed=3,5"], r"points 0 and 1 differ in seed \(of random weights\)"),
        (["batch.micro_sequences=auto", "tuner.r=2,4"], r"batch\.micro_sequences=auto measures .* \(point 0, 1\)"),
        (["tuner=full,lora", "precision=fp32,bf16"], r"\(point 0, 1\); points 2 and 3 differ in precision"),
    ],
)  # fmt: skip
def test_a_sweep_without_two_points_on_one_base_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_sharing(planned(tmp_path, *words))
    assert caught.value.hint == "sweep.share_base=false"
    check_sharing(planned(tmp_path, *words, caught.value.hint))


def test_one_base_and_every_adapter_are_what_a_rank_needs(tmp_path: Path) -> None:
    """By the parts of each point's own plan."""
    points = planned(tmp_path, "tuner.r=2,4,8", "cluster=one").waiting
    plans = [one.planned.plan for one in points if one.planned is not None]
    held = [plan.memory[0] for plan in plans]
    own = [one.adapters + one.gradients + one.optimizer for one in held]
    assert len({one.weights for one in held}) == 1 and own == sorted(own) and own[0] < own[2]
    turn = max(one.activations + one.logits + one.buffers for one in held)
    assert needed(plans, points) == held[0].weights + sum(own) + turn + held[0].overhead
    assert needed(plans[:1], points[:1]) == held[0].total


def test_points_that_do_not_fit_together_are_in_several_launches(tmp_path: Path) -> None:
    words = ["tuner.r=64", "optimizer.lr=1e-3,1e-4,1e-5,1e-6", "cluster=one"]
    points = planned(tmp_path, *words).waiting
    plans = [one.planned.plan for one in points if one.planned is not None]
    two = needed(plans[:2], points[:2]) / GIB
    assert needed(plans[:3], points[:3]) / GIB > two > needed(plans[:1], points[:1]) / GIB
    assert together(planned(tmp_path, *words, f"cluster.memory_gib={two}")) == [[0, 1], [2, 3]]
    one = needed(plans[:1], points[:1]) / GIB
    with pytest.raises(ConfigError, match=r"points 0 and 1 need .* GiB per rank together, but cluster\.memory_gib="):
        check_sharing(planned(tmp_path, *words, f"cluster.memory_gib={one}"))


def test_a_dry_run_says_who_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *SHARED, "tuner.r=2,4", f"run_dir={tmp_path}/s", "--dry-run", "--json"]) == 0
    said = capsys.readouterr()
    assert re.search(r"points 0, 1 train in turns on one base: [\d.]+ GiB a rank \([\d.]+ with a base each\)", said.err)
    assert json.loads(said.out)["together"] == [[0, 1]] and not list(tmp_path.iterdir())


def test_slurm_refuses_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SHARED, "cluster.slurm.partition=gpu", "tuner.r=2,4", f"run_dir={tmp_path}/s", "--json"]
    assert main(["sweep", *words]) == 64
    value = json.loads(capsys.readouterr().out)
    assert "on Slurm each point is a task of its own" in value["error"]
    assert value["hint"].startswith("sweep.share_base=false")


def test_a_launch_of_several_points_is_read_back_or_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "together-003", [tmp_path / "003-seed=1", tmp_path / "005-seed=2"])
    assert read_bundle(tmp_path / "together-003") == (tmp_path / "003-seed=1", tmp_path / "005-seed=2")
    with pytest.raises(DataError, match=r"points\.json cannot be read") as caught:
        read_bundle(tmp_path)
    assert caught.value.hint == f"isotrain sweep {tmp_path.parent}"


def test_a_point_ends_by_its_own_word_or_as_its_launch(tmp_path: Path) -> None:
    launch = PointEnd(86, "rank 1 was killed")
    assert point_end(tmp_path, launch) == launch and not is_over(tmp_path)
    write_exit(tmp_path, 0, 85, cause="interrupted")
    assert point_end(tmp_path, launch).code == 85 and not is_over(tmp_path)
    write_exit(tmp_path, 0, 0, cause="done")
    assert point_end(tmp_path, launch) == PointEnd(0) and is_over(tmp_path)
    write_exit(tmp_path, 1, 93, cause="GaveUp", message="loss nan")
    assert point_end(tmp_path, launch) == PointEnd(93, "loss nan") and is_over(tmp_path)


def started(folder: Path, *names: str) -> list[Path]:
    """Folders of points, and their launch's, as a sweep leaves them to the command that trains them."""
    sweep = planned(folder, "tuner.r=2,4,8")
    found = []
    for name, one in zip(names, sweep.waiting, strict=True):
        assert one.job is not None and one.planned is not None
        run_dir = folder / name
        write_run(run_dir, replace(one.job, run_dir=str(run_dir)), one.planned.plan.to_json())
        found.append(run_dir)
    write_bundle(folder / "together-000", found)
    return found


def test_ranks_are_started_again_without_a_point_whose_fault_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start ends by one point's data, the second is done; each point is told of the starts that it was in."""
    points, starts = started(tmp_path, "000", "001", "002"), list[list[str]]()
    write_exit(points[0], 0, 93, cause="GaveUp")  # of an earlier launch: forgotten

    def launch(rendered: Rendered, folder: Path, *_: object) -> LaunchResult:
        left = [point for point in read_bundle(folder) if not is_over(point)]
        starts.append([point.name for point in left])
        if len(starts) == 1:
            write_exit(points[2], 0, 0, cause="done")
            write_exit(points[1], 0, 65, cause="DataError", message="row 3 is no JSON")
            write_exit(folder, 0, 65, cause="DataError", message="row 3 is no JSON")
            return LaunchResult(65, first_cause(read_exits(folder)))
        write_exit(left[0], 0, 0, cause="done")
        return LaunchResult(0, None)

    said: list[str] = []
    monkeypatch.setattr(together_command, "launch", launch)
    ends = together_command.train_together(tmp_path / "together-000", said.append)
    assert starts == [["000", "001", "002"], ["000"]]
    assert ends == {"000": PointEnd(0), "001": PointEnd(65, "row 3 is no JSON"), "002": PointEnd(0)}
    assert said == ["001 has ended; starting again with the other 1"]
    codes = [[one.code for one in read_run(point).launches] for point in points]
    assert codes == [[65, 0], [65], [0]]


def test_a_stopped_launch_is_not_started_again_and_each_point_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = started(tmp_path, "000", "001", "002")

    def launch(rendered: Rendered, folder: Path, *_: object) -> LaunchResult:
        assert rendered.argv[-2:] == ("worker", str(folder)) and is_bundle(folder)
        write_exit(points[0], 0, 0, cause="done")
        write_exit(points[1], 0, 85, cause="interrupted", message="rank 0 ended with code 85 (interrupted)")
        return LaunchResult(85, None, stopped=True)

    monkeypatch.setattr(together_command, "launch", launch)
    ends = together_command.train_together(tmp_path / "together-000", print)
    assert [end.code for end in ends.values()] == [0, 85, 85]
    with locked(points[1]), pytest.raises(ConfigError, match="another isotrain is training"):
        together_command.train_together(tmp_path / "together-000", print)


def test_of_a_command_that_was_killed_points_are_as_far_as_they_had_come(tmp_path: Path) -> None:
    killed = TaskEnd(-9, "")
    assert end_of_point(tmp_path, 4, killed) == killed
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000004" / "manifest.json").write_text("{}")
    assert end_of_point(tmp_path, 4, killed).code == 0 and end_of_point(tmp_path, 5, killed) == killed
    said = json.dumps({"points": {tmp_path.name: {"code": 93, "error": "loss nan"}}})
    assert end_of_point(tmp_path, 4, TaskEnd(1, said)).code == 93


def test_the_key_makes_no_other_run_of_a_job(tmp_path: Path) -> None:
    """A point that was trained with others goes on alone, and the other way round."""
    from orchestrator.config.building import blocking_differences, job_to_yaml

    job = planned(tmp_path, "tuner.r=2,4").waiting[0].job
    assert job is not None and job.sweep.share_base
    (tmp_path / "job.yaml").write_text(job_to_yaml(job).replace("share_base: true", "share_base: false"))
    assert not read_job(tmp_path).sweep.share_base and not blocking_differences(job, read_job(tmp_path))
