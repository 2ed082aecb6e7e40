"""A sweep as one job array: what is handed to Slurm (a stand-in), what is asked of it, what a task finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import commands
from launch.slurm.allocation import Allocation
from orchestrator.cli import main
from orchestrator.errors import ConfigError, PeerLost
from orchestrator.jobs.allocation import run_of_task
from orchestrator.jobs.asking import states_of
from orchestrator.jobs.follow import statuses
from orchestrator.jobs.record import is_cancelled, read_submission, read_tasks
from tests.helpers.fake_slurm import TIMED_OUT, FakeSlurm
from tests.orchestrator.test_cli import ROOT, TINY

GOLDEN = ROOT / "tests" / "golden" / "sbatch" / "sweep.sbatch"
Sweeping = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    monkeypatch.setenv("ISOTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(commands.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("orchestrator.runs.is_whole", lambda run_dir, step: True)
    return fake


@pytest.fixture
def sweep(capsys: pytest.CaptureFixture[str]) -> Sweeping:
    """``isotrain sweep`` of a tiny job on slurm_cpu: code, value, and what was said."""

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = main(["sweep", *TINY, "cluster=slurm_cpu", *words, "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return run


def sbatch_calls(slurm: FakeSlurm) -> list[list[str]]:
    return [call for call in slurm.calls if call[0] == "sbatch"]


def finish(run: Path, steps: int) -> None:
    """What a run leaves that has done its steps."""
    folder = run / "checkpoints" / f"step-{steps:06d}"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    lines = [json.dumps({"step": step, "loss": 3.0, "step_s": 1.0}) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_script_is_as_it_was_reviewed(sweep: Sweeping) -> None:
    code, value, _ = sweep("seed=0,1,2", "topology.tp=1,3", "run_dir=/runs/tide", "--jobs", "2", "--dry-run")
    assert code == 0 and value["script"] == GOLDEN.read_text()
    assert [point["state"] for point in value["points"]] == ["waiting", "pruned"] * 3
    assert not Path("/runs").exists()


def test_points_are_one_array_and_only_what_is_missing_is_submitted_again(
    slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path
) -> None:
    folder = tmp_path / "a sweep"
    words = ["seed=0,1,2", "steps=2", f"run_dir='{folder}'", "--jobs", "2"]
    code, value, said = sweep(*words)
    (job,) = slurm.jobs
    assert code == 0 and value["job_id"] == "1" and job["cwd"] == str(folder)
    assert "#SBATCH --array=0-2%2\n" in Path(job["script"]).read_text()
    runs = read_tasks(folder)
    assert {number: read_submission(run).job_id for number, run in runs.items()} == {0: "1_0", 1: "1_1", 2: "1_2"}  # type: ignore[union-attr]
    assert all({"job.yaml", "plan.json"} <= {file.name for file in run.iterdir()} for run in runs.values())
    assert [(one.job_id, one.state) for one in statuses(folder)] == [(f"1_{task}", "PENDING") for task in range(3)]
    _, value, said = sweep(*words)
    assert len(sbatch_calls(slurm)) == 1 and value["job_id"] is None and "waits or runs already" in said
    finish(runs[0], 2)
    ended = {"job_id": "1_1", "code": 93, "cause": "GaveUp", "message": "step 2: loss nan"}
    (runs[1] / "slurm" / "ended.json").write_text(json.dumps(ended))
    slurm.set_state("FAILED")
    _, value, _ = sweep(*words)
    assert value["job_id"] == "2" and "#SBATCH --array=1-2%2\n" in Path(slurm.jobs[1]["script"]).read_text()
    assert value["points"][0]["state"] == "done"
    assert main(["status", str(folder)]) == 0 and main(["status", "all"]) == 0


def test_how_points_ended_is_in_the_table(slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path) -> None:
    from orchestrator.config.grid import grid
    from orchestrator.sweeps.array import on_slurm
    from orchestrator.sweeps.book import Metric
    from orchestrator.sweeps.planning import plan_sweep
    from orchestrator.sweeps.searching import plan_anywhere

    words = ["seed=0,1,2,3", f"run_dir={tmp_path}/s"]
    sweep(*words)
    runs = read_tasks(tmp_path / "s")
    for task, code in ((0, 85), (1, 65)):
        ended = {"job_id": f"1_{task}", "code": code, "cause": "x", "message": "row 3 is no JSON"}
        (runs[task] / "slurm" / "ended.json").write_text(json.dumps(ended))
    slurm.set_state("")  # forgotten
    typed = [*TINY, "cluster=slurm_cpu", *words]
    book = on_slurm(plan_sweep(typed, grid(typed), plan_anywhere), Metric())
    assert [(row.state, row.code, row.reason) for row in book.rows] == [
        ("interrupted", 85, ""), ("failed", 65, "row 3 is no JSON"), ("waiting", None, ""), ("waiting", None, ""),
    ]  # fmt: skip
    slurm.set_state("NODE_FAIL ExitCode=1:0 x")
    assert on_slurm(plan_sweep(typed, grid(typed), plan_anywhere), Metric()).rows[2].reason == "NODE_FAIL"


def test_a_lost_answer_submits_nothing_twice(
    slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100_000, 20))
    monkeypatch.setattr(commands.time, "monotonic", lambda: float(next(clock)))
    words = ["seed=0,1", f"run_dir={tmp_path}/s"]
    slurm.replies(f"lose {TIMED_OUT}")
    slurm.silent()
    assert sweep(*words)[0] == PeerLost.code
    code, value, _ = sweep(*words)
    assert code == PeerLost.code and "Slurm does not answer" in value["error"] and len(slurm.jobs) == 1
    slurm.silent(False)
    code, value, said = sweep(*words)
    assert code == 0 and value["job_id"] is None and "waits or runs already" in said and len(slurm.jobs) == 1
    assert [one.job_id for one in statuses(tmp_path / "s")] == ["1_0", "1_1"]


def test_a_refused_array_leaves_no_job(
    slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["seed=0,1", f"run_dir={tmp_path}/s"]
    slurm.replies("refuse Invalid job array specification")
    code, value, _ = sweep(*words)
    assert code == 64 and "Slurm refuses the job: Invalid job array specification" in value["error"]
    assert main(["status", str(tmp_path / "s"), "--json"]) == 64
    assert json.loads(capsys.readouterr().out)["hint"] == f"isotrain sweep {tmp_path}/s"
    assert sweep(*words)[1]["job_id"] == "1"


@pytest.mark.parametrize(
    ("state", "now", "call"),
    [
        ("PENDING", [], ["scancel", "1_1"]),
        ("RUNNING", [], ["scancel", "--batch", "--signal=USR1", "1_1"]),
        ("RUNNING", ["--now"], ["scancel", "1_1"]),
    ],
)
def test_cancel_ends_every_point_and_says_so_in_its_folder(
    slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path, state: str, now: list[str], call: list[str]
) -> None:
    sweep("seed=0,1", f"run_dir={tmp_path}/s")
    slurm.set_state(state)
    assert main(["cancel", str(tmp_path / "s"), *now]) == 0
    assert slurm.calls[-1] == call
    assert all(is_cancelled(run, f"1_{task}") for task, run in read_tasks(tmp_path / "s").items())


def test_one_point_can_be_cancelled_by_itself(slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path) -> None:
    sweep("seed=0,1", f"run_dir={tmp_path}/s")
    assert main(["cancel", str(read_tasks(tmp_path / "s")[0])]) == 0
    assert [call for call in slurm.calls if call[0] == "scancel"] == [["scancel", "1_0"]]
    slurm.set_state("RUNNING ArrayJobId=1 ArrayTaskId=1")  # of the other Slurm says nothing any more
    assert [one.state for one in statuses(tmp_path / "s")] == ["CANCELLED", "RUNNING"]


def test_waiting_tasks_that_slurm_names_together_are_told_apart(
    slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path
) -> None:
    sweep("seed=0,1,2", f"run_dir={tmp_path}/s")
    slurm.set_state("RUNNING ArrayJobId=1 ArrayTaskId=0\nJobId=1 ArrayJobId=1 ArrayTaskId=1-2%1 JobState=PENDING")
    asked = len(slurm.calls)
    found = states_of(list(read_tasks(tmp_path / "s").values()))
    assert [(state.job_id, state.state) for (state,) in found.values()] == [
        ("1_0", "RUNNING"), ("1_1", "PENDING"), ("1_2", "PENDING"),
    ]  # fmt: skip
    assert len(slurm.calls) == asked + 1  # the array is asked for once


def test_a_task_finds_its_point_and_its_log(slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    sweep("seed=0,1", f"run_dir={folder}")
    task = Allocation("1_1", 1, "n1", task=1)
    run = run_of_task(folder, task)
    assert run == run_of_task(folder, task) == read_tasks(folder)[1]
    (folder / "slurm" / "1_1.log").write_text("hello\n")
    assert (run / "slurm" / "1_1.log").read_text() == "hello\n"
    assert run_of_task(run, task) == run  # a run's own array
    with pytest.raises(ConfigError, match=r"job 1_7 is no task of .*: it has 2, numbered 0 to 1") as raised:
        run_of_task(folder, Allocation("1_7", 1, "n1", task=7))
    assert raised.value.hint == f"isotrain sweep {folder}"


def test_batches_of_hydras_sweepers_are_arrays_that_are_waited_for(
    slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(folders: list[Path], say: Callable[[str], None]) -> None:
        for run in read_tasks(folders[0]).values():
            if not (run / "metrics.jsonl").exists():
                finish(run, 2)
        slurm.set_state("COMPLETED")

    monkeypatch.setattr("orchestrator.sweeps.searching.wait_for", wait)
    words = ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2", "seed=0,1,2", "steps=2", f"run_dir={tmp_path}/s"]
    code, value, _ = sweep(*words, "--jobs", "1")
    assert code == 0 and [point["value"] for point in value["points"]] == [3.0] * 3
    script = tmp_path / "s" / "slurm" / "train.sbatch"
    assert len(slurm.jobs) == 2 and "#SBATCH --array=2%1\n" in script.read_text()

    def interrupt(folders: list[Path], say: Callable[[str], None]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.sweeps.searching.wait_for", interrupt)
    code, _, said = sweep(*words[:-1], f"run_dir={tmp_path}/t")
    assert code == 130 and f"the jobs go on; to end them: isotrain cancel {tmp_path}/t" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0,1", "cluster.slurm.array='0-3'"], "cluster.slurm.array=0-3: a sweep is an array itself"),
        (["cluster.nodes=2,4"], "the points differ in --nodes=2, --nodes=4"),
        (["cluster=slurm_cpu,one"], "some points are for Slurm and some for this machine"),
        (["seed=0,1", r"run_dir='/runs/a\b'"], "in a folder with a backslash"),
    ],
)
def test_what_cannot_be_one_array_is_refused(
    slurm: FakeSlurm, sweep: Sweeping, tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, value, _ = sweep(*words, "--dry-run")
    assert code == 64 and message in value["error"] and value["hint"]
    assert not sbatch_calls(slurm)
