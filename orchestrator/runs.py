"""Run folders: what is in one, whether a job may go on in it, and how a new one is written."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.building import blocking_differences, job_to_yaml, read_job
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import JobConfig

STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Decision:
    """What a command does with a run folder.

    ``step``: optimizer steps that the newest checkpoint has completed, 0 when there is none. ``message``: the words
    for the user.
    """

    kind: Literal["start", "resume", "finished"]
    step: int
    message: str


def default_run_dir(model_path: str | None, now: Callable[[], float] = time.time) -> Path:
    """A folder for a run without ``run_dir``: ``runs/MODEL-TIME`` (UTC).

    Example:
        >>> default_run_dir("org/Tiny", lambda: 0).as_posix()
        'runs/tiny-19700101-000000'
    """
    name = Path(model_path or "model").name.lower()
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now()))}"


def latest_step(run_dir: Path) -> int | None:
    """Steps completed by the newest checkpoint, or None when the run has none.

    ``checkpoints/latest`` decides; where it is missing or names nothing, the newest committed folder does.

    Raises:
        DataError: ``latest`` names a checkpoint, and there is none at all.
    """
    checkpoints = run_dir / "checkpoints"
    steps = {
        folder.name: int(match[1])
        for folder in checkpoints.glob("step-*")
        if (match := STEP_FOLDER.fullmatch(folder.name)) and (folder / "manifest.json").is_file()
    }
    latest = checkpoints / "latest"
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    if named in steps:
        return steps[named]
    if named is not None and not steps:
        raise DataError(
            f"{latest} names {named!r}, but there is no checkpoint in {checkpoints}",
            "restore the folder, or start anew with run_dir=ANOTHER",
        )
    return max(steps.values(), default=None)


def decide_train(run_dir: Path, job: JobConfig) -> Decision:
    """What ``isotrain train`` does: start, go on by itself, or say that the run is finished; never start over.

    Raises:
        ConfigError: the folder holds something else, or another run; the hint is the command that goes on with it.
    """
    if not run_dir.exists():
        return Decision("start", 0, f"new run in {run_dir}")
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} is a file", "run_dir=ANOTHER")
    if not (run_dir / "job.yaml").is_file():
        if any(run_dir.iterdir()):
            raise ConfigError(f"run_dir={run_dir} is not empty and holds no run (no job.yaml)", "run_dir=ANOTHER")
        return Decision("start", 0, f"new run in {run_dir}")
    step = latest_step(run_dir)
    if step is None:
        return Decision("start", 0, f"{run_dir} holds a run without a checkpoint: it starts at step 1")
    blocking = blocking_differences(read_job(run_dir), job)
    if blocking:
        raise _another_run(run_dir, step, blocking)
    return _go_on(run_dir, step, job)


def decide_resume(run_dir: Path, job: JobConfig) -> Decision:
    """What ``isotrain resume`` does with the run's job and the given overrides.

    Raises:
        ConfigError: there is no run, or it has no checkpoint yet.
    """
    step = latest_step(run_dir)
    if step is None:
        raise ConfigError(f"{run_dir} has no checkpoint to resume from", f"isotrain train ... run_dir={run_dir}")
    return _go_on(run_dir, step, job)


def _go_on(run_dir: Path, step: int, job: JobConfig) -> Decision:
    if step >= job.steps:
        return Decision(
            "finished",
            step,
            f"{run_dir} is finished: {step} of {job.steps} steps (more: isotrain resume {run_dir} steps=N)",
        )
    return Decision("resume", step, f"resuming {run_dir} after step {step} of {job.steps}")


def _another_run(run_dir: Path, step: int, blocking: list[tuple[str, Any, Any]]) -> ConfigError:
    lines = [f"  {key}: {as_override(old)} -> {as_override(new)}" for key, old, new in blocking]
    changes = " ".join(quote_override(key, new) for key, _, new in blocking)
    return ConfigError(
        f"run_dir={run_dir} holds another run, at step {step}; it differs in\n" + "\n".join(lines),
        f"isotrain resume {run_dir} {changes}   or   run_dir=ANOTHER",
    )


def as_override(value: Any) -> str:
    """A value in Hydra's override grammar.

    Example:
        >>> as_override(["q_proj", "v_proj"]), as_override(None), as_override(True), as_override(r"layers.*")
        ('[q_proj,v_proj]', 'null', 'true', "'layers.*'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(as_override(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_/][\w./-]*", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def quote_override(key: str, value: Any) -> str:
    """``KEY=VALUE`` as it can be typed into a shell.

    Example:
        >>> quote_override("optimizer.lr", 0.001), quote_override("tuner.targets", ["q_proj"])
        ('optimizer.lr=0.001', "'tuner.targets=[q_proj]'")
    """
    import shlex

    return shlex.quote(f"{key}={as_override(value)}")


def write_run(run_dir: Path, job: JobConfig, plan_json: str) -> None:
    """Write ``job.yaml`` and ``plan.json``, each whole or not at all, and the folders for logs and exits.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    try:
        for name in ("logs", "exits", "states", "checkpoints"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "plan.json", plan_json)
        write_whole(run_dir / "job.yaml", job_to_yaml(job))
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}", "run_dir=ANOTHER") from error


def write_whole(file: Path, text: str) -> None:
    """Replace a file in one move, so that no reader sees half of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
