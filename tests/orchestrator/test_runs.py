"""Run folders: a run goes on by itself, never silently starts over, and is never mixed with another one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from orchestrator.config.building import job_to_yaml
from orchestrator.config.job import JobConfig
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError, DataError
from orchestrator.locking import locked
from orchestrator.provenance import git_state
from orchestrator.runs import decide_resume, decide_train, latest_step, write_run

JOB = JobConfig(steps=10)


@pytest.fixture(autouse=True)
def empty_checkpoints_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing: tests/end_to_end/test_bad_input.py."""
    monkeypatch.setattr("orchestrator.runs.is_whole", lambda run_dir, step: True)


def make_run(run_dir: Path, *steps: int, latest: str | None = None, job: JobConfig = JOB) -> Path:
    write_run(run_dir, job, "{}")
    for step in steps:
        folder = run_dir / "checkpoints" / f"step-{step:06d}"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    if latest is not None:
        (run_dir / "checkpoints" / "latest").write_text(latest)
    return run_dir


def test_a_new_or_empty_folder_starts_at_step_1(tmp_path: Path) -> None:
    assert decide_train(tmp_path / "new", JOB).kind == "start"
    assert decide_train(tmp_path, JOB).kind == "start"


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run") as raised:
        decide_train(tmp_path, JOB)
    assert raised.value.hint == "run_dir=ANOTHER"
    with pytest.raises(ConfigError, match="is a file"):
        decide_train(tmp_path / "thesis.tex", JOB)


@pytest.mark.parametrize(
    "overrides",
    [[], ["topology.tp=3", "cluster=one"], ["steps=20"], ["metrics=tensorboard", "memory.recompute=full"]],
)
def test_the_same_run_goes_on_by_itself_and_says_so(tmp_path: Path, overrides: list[str]) -> None:
    run_dir = make_run(tmp_path / "run", 3, 6, latest="step-000006\n")
    decision = decide_train(run_dir, compose_job(["steps=10", f"run_dir={run_dir}", *overrides]))
    assert (decision.kind, decision.step) == ("resume", 6)
    assert "after step 6 of" in decision.message


def test_another_run_is_listed_and_refused_with_the_command_that_goes_on(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", 6, latest="step-000006")
    job = compose_job(["steps=10", "seed=3", "optimizer.lr=0.5", "tuner.alpha=8", "topology.tp=3"])
    with pytest.raises(ConfigError) as raised:
        decide_train(run_dir, job)
    assert "  seed: 0 -> 3" in str(raised.value) and "  optimizer.lr: 0.0002 -> 0.5" in str(raised.value)
    assert "topology" not in str(raised.value)
    expected = f"isotrain resume {run_dir} seed=3 tuner.alpha=8.0 optimizer.lr=0.5"
    assert raised.value.hint.startswith(expected)


def test_fewer_steps_are_another_run_unless_resume_says_so(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", 6, latest="step-000006")
    with pytest.raises(ConfigError, match="steps: 10 -> 8"):
        decide_train(run_dir, dataclasses.replace(JOB, steps=8))
    assert decide_resume(run_dir, dataclasses.replace(JOB, steps=8)).kind == "resume"


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", 10, latest="step-000010")
    for decision in (decide_train(run_dir, JOB), decide_resume(run_dir, JOB)):
        assert decision.kind == "finished" and "10 of 10 steps" in decision.message
    assert decide_train(run_dir, dataclasses.replace(JOB, steps=12)).kind == "resume"


def test_a_run_without_a_checkpoint_starts_at_step_1_and_says_so(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    decision = decide_train(run_dir, dataclasses.replace(JOB, seed=5))
    assert decision.kind == "start" and "without a checkpoint: it starts at step 1" in decision.message
    with pytest.raises(ConfigError, match="has no checkpoint to resume from"):
        decide_resume(run_dir, JOB)


@pytest.mark.parametrize("latest", [None, "step-000099", "rubbish"])
def test_a_run_whose_latest_is_lost_still_goes_on(tmp_path: Path, latest: str | None) -> None:
    assert latest_step(make_run(tmp_path / "run", 3, 6, latest=latest)) == 6


@pytest.mark.parametrize(("latest", "message"), [("step-000099", "but there is no checkpoint"), ("rubbish", "rubbish")])
def test_a_run_whose_checkpoints_are_all_gone_is_never_started_over(tmp_path: Path, latest: str, message: str) -> None:
    run_dir = make_run(tmp_path / "run", latest=latest)
    with pytest.raises(DataError, match=message):
        decide_train(run_dir, JOB)


def test_a_written_run_holds_the_job_as_asked_and_the_plan(tmp_path: Path) -> None:
    write_run(tmp_path / "run", JOB, '{"a": 1}')
    assert (tmp_path / "run" / "job.yaml").read_text() == job_to_yaml(JOB)
    assert (tmp_path / "run" / "plan.json").read_text() == '{"a": 1}'
    with pytest.raises(ConfigError, match="cannot be written"):
        write_run(tmp_path / "run" / "job.yaml" / "x", JOB, "{}")


def test_two_launches_do_not_train_in_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another isotrain is training in"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("tuner.r=32", "was trained with tuner.r=16; its checkpoint does not fit 32", "tuner.r=16   or   a new run"),
        ("tuner.targets=[q_proj]", "was trained with tuner.targets=all-linear", "tuner.targets=all-linear   or"),
        ("tuner.dora=true", "was trained with tuner.dora=false", "tuner.dora=false   or"),
        ("tuner.init=pissa", "was trained with tuner.init=default", "tuner.init=default   or"),
        (
            "tuner.modules_to_save=[norm]",
            "was trained with tuner.modules_to_save=[]",
            "'tuner.modules_to_save=[]'   or",
        ),
        ("tuner=full", "was trained with tuner.name=lora", "tuner.name=lora   or"),
        ("optimizer.galore.rank=8", "was trained with optimizer.galore.rank=128", "optimizer.galore.rank=128   or"),
    ],
)
def test_a_resume_that_does_not_fit_the_checkpoint_is_refused(
    tmp_path: Path, override: str, message: str, hint: str
) -> None:
    run_dir = make_run(tmp_path / "run", 6, latest="step-000006")
    job = compose_job(["steps=10", override])
    with pytest.raises(ConfigError) as raised:
        decide_resume(run_dir, job)
    assert message in str(raised.value)
    assert raised.value.hint.startswith(hint)
    with pytest.raises(ConfigError) as raised:
        decide_train(run_dir, job)
    assert raised.value.hint == "run_dir=ANOTHER"


@pytest.mark.parametrize("overrides", [["steps=10", "optimizer.lr=0.5"], ["steps=4"]])
def test_changes_that_no_step_would_see_are_refused(tmp_path: Path, overrides: list[str]) -> None:
    run_dir = make_run(tmp_path / "run", 10, latest="step-000010")
    with pytest.raises(ConfigError, match="has done 10 steps, and steps=") as raised:
        decide_resume(run_dir, compose_job(overrides))
    words = raised.value.hint.split()
    assert words[:2] == ["isotrain", "resume"]
    assert decide_resume(run_dir, compose_job(words[3:])).kind == "resume"


def test_the_hint_to_resume_keeps_the_larger_number_of_steps(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", 10, latest="step-000010")
    with pytest.raises(ConfigError) as raised:
        decide_train(run_dir, compose_job(["steps=20", "optimizer.lr=0.5"]))
    assert "optimizer.lr=0.5 steps=20" in raised.value.hint


def git(folder: Path, *words: str) -> str:
    mine = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *mine, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_run_folder_says_where_each_start_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "code"
    code.mkdir()
    git(code, "init", "--quiet")
    (code / "prompts.txt").write_text("one")
    git(code, "add", ".")
    git(code, "commit", "--quiet", "--message", "first")
    monkeypatch.chdir(code)
    for name, value in {
        "OMP_NUM_THREADS": "3",
        "HF_TOKEN": "t-0123",
        "WANDB_API_KEY": "k-0123",
        "HF_ENDPOINT": "https://me:p-0123@hub.local",
        "WANDB_MODE": "offline",
        "EDITOR": "vi",
    }.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    write_run(run, JOB, "{}")
    (code / "prompts.txt").write_text("two")
    write_run(run, JOB, "{}")
    first, second = [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]
    assert first["git"] == {"commit": git(code, "rev-parse", "HEAD"), "changed": False}
    assert second["git"] == {"commit": git(code, "rev-parse", "HEAD"), "changed": True}
    assert first["folder"] == str(code) and first["host"] and first["python"]
    assert first["packages"]["torch"].startswith("2.") and first["packages"]["megatron-core"] == "0.16.1"
    kept = first["variables"]
    assert (kept["OMP_NUM_THREADS"], kept["WANDB_MODE"], kept["HF_ENDPOINT"]) == (
        "3",
        "offline",
        "https://...@hub.local",
    )
    assert not {"HF_TOKEN", "WANDB_API_KEY", "EDITOR"} & kept.keys()
    assert "0123" not in (run / "environment.jsonl").read_text()


def test_outside_of_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) is None  # nothing is committed
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None  # no git
