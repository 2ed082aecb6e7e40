"""Run folders: what is in one, whether a job may go on in it, and how a new one is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from orchestrator.checkpoint.folder import MARKER, list_steps, read_latest, step_name
from orchestrator.config.building import as_override, blocking_differences, job_to_yaml, quote_override, read_job
from orchestrator.config.job import JobConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.locking import locked
from orchestrator.models import model_spec
from orchestrator.provenance import provenance
from parallel.families import read_model
from parallel.specs import read_hf_config

# What the tensors of a checkpoint are shaped by: no resume can change it.
SHAPE_KEYS = (
    "tuner.name",
    "tuner.r",
    "tuner.dora",
    "tuner.init",
    "tuner.targets",
    "tuner.freeze",
    "tuner.modules_to_save",
    *("optimizer.name", "optimizer.galore.rank", "optimizer.galore.projection"),
)


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

    ``checkpoints/latest`` decides; where it is missing, unreadable or names nothing, the newest folder does.

    Raises:
        DataError: ``latest`` names a checkpoint, and there is none at all.
    """
    checkpoints = run_dir / "checkpoints"
    steps = dict(list_steps(checkpoints))
    newest = max(steps, default=None)
    try:
        name = read_latest(checkpoints)
    except DataError:
        if newest is None:
            raise
        return newest
    if name is None:
        return newest
    named = int(name.removeprefix("step-"))
    if named not in steps and newest is None:
        raise DataError(
            f"{checkpoints / 'latest'} names {name}, but there is no checkpoint in {checkpoints}",
            "restore the folder, or start anew with run_dir=ANOTHER",
        )
    return named if named in steps else newest


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
        if is_imported(run_dir):
            return _go_on_here(run_dir, job)
        if not _is_ours_alone(run_dir):
            raise ConfigError(f"run_dir={run_dir} is not empty and holds no run (no job.yaml)", "run_dir=ANOTHER")
        return Decision("start", 0, f"new run in {run_dir}")
    step = latest_step(run_dir)
    if step is None:
        return Decision("start", 0, f"{run_dir} holds a run without a checkpoint: it starts at step 1")
    before = read_job(run_dir)
    blocking = blocking_differences(before, job)
    if blocking:
        more = [("steps", before.steps, job.steps)] if job.steps > before.steps else []
        raise _another_run(run_dir, step, blocking + more)
    return _go_on(run_dir, step, before, job)


def is_ours(run_dir: Path) -> bool:
    """Whether a word may be left in a folder: it is new, empty or a run's, writable, and nobody trains in it."""
    existing = next((folder for folder in (run_dir, *run_dir.parents) if folder.exists()), run_dir)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return False
    if existing != run_dir:
        return True
    if not (run_dir / "job.yaml").is_file():
        return _is_ours_alone(run_dir) or is_imported(run_dir)
    try:
        with locked(run_dir):
            return True
    except ConfigError:
        return False


def is_imported(run_dir: Path) -> bool:
    """Whether ``isotrain convert --moments`` wrote a folder."""
    try:
        return json.loads((run_dir / MARKER).read_bytes()).get("to") == "run"
    except (OSError, ValueError, AttributeError):
        return False


def _go_on_here(run_dir: Path, job: JobConfig) -> Decision:
    """Go on with what another tool began, as a job that has not run here yet."""
    step = latest_step(run_dir) or 0
    if job.tuner.name != "full":
        raise ConfigError(f"{run_dir} holds a whole model with its moments, not an adapter", "tuner=full")
    if job.optimizer.name != "adamw":
        raise ConfigError(f"{run_dir} holds Adam's moments, which are none of {job.optimizer.name}", "optimizer=adamw")
    there = read_model(read_hf_config(run_dir / "checkpoints" / step_name(step) / "model"))
    ours = model_spec(job.model)
    other = [field.name for field in fields(there) if getattr(there, field.name) != getattr(ours, field.name)]
    if other:
        words = ", ".join(f"{name} {getattr(there, name)}, not {getattr(ours, name)}" for name in other[:3])
        raise ConfigError(
            f"{run_dir} holds another model than model.path={job.model.path}: {words}",
            f"model.path={run_dir / 'checkpoints' / step_name(step) / 'model'}",
        )
    if step >= job.steps:
        raise ConfigError(
            f"{run_dir} has done {step} steps in another tool, and steps={job.steps} counts them", f"steps={step + 1}"
        )
    return Decision("resume", step, f"going on in {run_dir} after {step} steps of another tool, of {job.steps}")


def _is_ours_alone(folder: Path) -> bool:
    """Whether a folder without ``job.yaml`` is empty, or holds only what a launch that failed early leaves behind."""
    left_behind = {
        "exits",
        "logs",
        "states",
        "slurm",
        "probe",
        "checkpoints",
        "plan.json",
        "environment.jsonl",
        ".lock",
    }
    left_behind |= {"paces", "launches.jsonl", "report.html"}
    aside = (".plan.json.", ".job.yaml.", ".environment.jsonl.", ".report.html.")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(aside)}
    return names <= left_behind and not list_steps(folder / "checkpoints")


def decide_resume(run_dir: Path, job: JobConfig) -> Decision:
    """What ``isotrain resume`` does with the run's job and the given overrides.

    Raises:
        ConfigError: there is no run, or it has no checkpoint yet; the checkpoint holds an adapter of another shape; or
            the changes would have no effect, because no step is left.
    """
    step = latest_step(run_dir)
    if step is None:
        raise ConfigError(f"{run_dir} has no checkpoint to resume from", f"isotrain train ... run_dir={run_dir}")
    before = read_job(run_dir)
    changed = {key: (old, new) for key, old, new in blocking_differences(before, job) if key != "steps"}
    for key in SHAPE_KEYS:
        if key in changed:
            old, new = changed[key]
            raise ConfigError(
                f"{run_dir} was trained with {key}={as_override(old)}; its checkpoint does not fit {as_override(new)}",
                f"{quote_override(key, old)}   or   a new run: isotrain train ... run_dir=ANOTHER",
            )
    if step >= job.steps and (changed or job.steps < step):
        words = f"{run_dir} has done {step} steps, and steps={job.steps} asks for no more"
        changes = "".join(f" {quote_override(key, new)}" for key, (_, new) in changed.items())
        raise ConfigError(words, f"isotrain resume {run_dir}{changes} steps={step + 1}")
    return _go_on(run_dir, step, before, job)


def _go_on(run_dir: Path, step: int, before: JobConfig, job: JobConfig) -> Decision:
    if step >= job.steps and not is_whole(run_dir, step):
        return Decision("resume", step, f"the checkpoint of step {step} in {run_dir} is damaged: going on before it")
    if step >= job.steps:
        return Decision(
            "finished",
            step,
            f"{run_dir} is finished: {step} of {job.steps} steps (more: isotrain resume {run_dir} steps=N)",
        )
    words = f"resuming {run_dir} after step {step} of {job.steps}"
    if job.steps != before.steps and job.optimizer.schedule != "constant":
        words += f" (the {job.optimizer.schedule} schedule ended at step {before.steps} until now)"
    return Decision("resume", step, words)


def is_whole(run_dir: Path, step: int) -> bool:
    """Whether a checkpoint is all there and unchanged; its files are hashed."""
    from orchestrator.checkpoint.load import open_checkpoint  # imports torch, which takes two seconds

    try:
        open_checkpoint(run_dir, step, verify=True)
    except DataError:
        return False
    return True


def _another_run(run_dir: Path, step: int, blocking: list[tuple[str, Any, Any]]) -> ConfigError:
    lines = [f"  {key}: {as_override(old)} -> {as_override(new)}" for key, old, new in blocking]
    changes = " ".join(quote_override(key, new) for key, _, new in blocking if key != "steps" or new > step)
    goes_on = not any(key in SHAPE_KEYS for key, _, _ in blocking)
    return ConfigError(
        f"run_dir={run_dir} holds another run, at step {step}; it differs in\n" + "\n".join(lines),
        f"isotrain resume {run_dir} {changes}   or   run_dir=ANOTHER" if goes_on else "run_dir=ANOTHER",
    )


def write_run(run_dir: Path, job: JobConfig, plan_json: str) -> None:
    """Write ``job.yaml``, ``plan.json`` and a line of ``environment.jsonl``, and the folders for logs and exits.

    Each file is there whole or not at all. ``environment.jsonl`` has a line for each start, the newest last.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    try:
        for name in ("logs", "exits", "states", "checkpoints"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        environment = run_dir / "environment.jsonl"
        earlier = environment.read_text(encoding="utf-8") if environment.exists() else ""
        write_whole(environment, f"{earlier}{json.dumps(provenance(Path.cwd()))}\n")
        if latest_step(run_dir) is None:  # it starts at step 1, and with the first sample
            rewinds_file(run_dir).unlink(missing_ok=True)
        write_whole(run_dir / "plan.json", plan_json)
        write_whole(run_dir / "job.yaml", job_to_yaml(job))
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}", "run_dir=ANOTHER") from error


def rewinds_file(run_dir: Path) -> Path:
    """Where a run that was rewound keeps by step of a checkpoint with which sample to go on behind it."""
    return run_dir / "rewinds.json"


def write_whole(file: Path, text: str, mode: int = 0o666) -> None:
    """Replace a file in one move, so that no reader sees half of it; ``mode`` is cut by the umask."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, mode)) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
