"""What a run folder knows of its Slurm jobs: ``slurm/*.json``, each written whole."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.environment import isotrain_cache
from orchestrator.runs import write_whole


@dataclass(frozen=True)
class Submission:
    """``mark``: the comment that makes the job findable. ``job_id``: None until Slurm has said it.

    ``task``: which one of an array the run is; None where the job is its own.
    """

    mark: str
    job_id: str | None = None
    submitted: float = 0.0
    task: int | None = None


@dataclass(frozen=True)
class Ended:
    """How the last allocation of a run ended. ``requeued``: it goes on in another one."""

    job_id: str
    code: int
    cause: str
    message: str
    requeued: bool = False
    time: float = 0.0


def slurm_folder(run_dir: Path) -> Path:
    """Where it is kept.

    Example:
        >>> slurm_folder(Path("run")).as_posix()
        'run/slurm'
    """
    return run_dir / "slurm"


def read_submission(run_dir: Path) -> Submission | None:
    """The newest submission; None when there was none."""
    values = _read(slurm_folder(run_dir) / "job.json")
    return Submission(**values) if values else None


def write_submission(run_dir: Path, submission: Submission) -> None:
    """Remember a submission, here and in the list of all."""
    note_submission(run_dir, submission)
    listed = _listed(submission)
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(str(run_dir), encoding="utf-8")


def note_submission(run_dir: Path, submission: Submission) -> None:
    """Remember a submission here only: of a run that is one of an array's."""
    _write(slurm_folder(run_dir) / "job.json", asdict(submission))


def forget_submission(run_dir: Path, submission: Submission) -> None:
    """Forget one that Slurm has refused."""
    (slurm_folder(run_dir) / "job.json").unlink(missing_ok=True)
    _listed(submission).unlink(missing_ok=True)


def submitted_runs() -> list[Path]:
    """All run folders that were submitted from this account and are still there, oldest first."""
    files = sorted(_registry().glob("*"), key=lambda file: file.stat().st_mtime) if _registry().is_dir() else []
    folders = dict.fromkeys(Path(file.read_text(encoding="utf-8")) for file in files)
    return [folder for folder in folders if (folder / "job.yaml").is_file() or read_tasks(folder)]


def _listed(submission: Submission) -> Path:
    return _registry() / submission.mark.rpartition(":")[2]


def _registry() -> Path:
    return isotrain_cache() / "submitted"


def read_tasks(folder: Path) -> dict[int, Path]:
    """The runs of a folder whose jobs are arrays, by the number of their task; none where it is a run's own."""
    tasks = _read(slurm_folder(folder) / "tasks.json")
    return {int(number): folder / name for number, name in tasks.items()}


def runs_in(folder: Path) -> list[Path]:
    """The runs of a folder: those that are tasks of its arrays, else the one that it is."""
    return list(read_tasks(folder).values()) or [folder]


def add_tasks(folder: Path, runs: Mapping[int, str]) -> None:
    """Remember more runs, each the name of a folder in ``folder``."""
    tasks = {number: run.name for number, run in read_tasks(folder).items()} | dict(runs)
    _write(slurm_folder(folder) / "tasks.json", {str(number): tasks[number] for number in sorted(tasks)})


def read_ended(run_dir: Path) -> Ended | None:
    """How the last allocation ended; None while the first one has not."""
    values = _read(slurm_folder(run_dir) / "ended.json")
    return Ended(**values) if values else None


def write_ended(run_dir: Path, ended: Ended) -> None:
    """Say how this allocation ends."""
    _write(slurm_folder(run_dir) / "ended.json", asdict(ended) | {"time": time.time()})


def is_cancelled(run_dir: Path, job_id: str) -> bool:
    """Whether ``isotrain cancel`` was told to end this job (or the array that it belongs to)."""
    return _read(slurm_folder(run_dir) / "cancelled.json").get("job_id") in (job_id, job_id.partition("_")[0])


def write_cancelled(run_dir: Path, job_id: str) -> None:
    """Record the wish to end a job, before Slurm is told: what ends it then does not requeue it."""
    _write(slurm_folder(run_dir) / "cancelled.json", {"job_id": job_id, "time": time.time()})


@dataclass(frozen=True)
class Start:
    """The newest allocation of a run. ``steps``: that checkpoints held at each start of its job, this one last.

    ``nodes``: what it has; ``time``: unix seconds.
    """

    job_id: str
    steps: tuple[int, ...]
    nodes: tuple[str, ...] = ()
    time: float = 0.0


def note_start(run_dir: Path, job_id: str, step: int, nodes: Sequence[str] = ()) -> list[int]:
    """Note at which step an allocation starts, and where; returns the steps of all starts of the same job."""
    before = read_start(run_dir)
    steps = (*(before.steps if before and before.job_id == job_id else ()), step)
    _write(slurm_folder(run_dir) / "starts.json", asdict(Start(job_id, steps, tuple(nodes), time.time())))
    return list(steps)


def read_start(run_dir: Path) -> Start | None:
    """The newest start; None when there was none."""
    values = _read(slurm_folder(run_dir) / "starts.json")
    if not values:
        return None
    return Start(values["job_id"], tuple(values["steps"]), tuple(values.get("nodes", ())), values.get("time", 0.0))


def lost_start(run_dir: Path) -> Start | None:
    """The newest start, where it came to no end of its own."""
    start, end = read_start(run_dir), read_ended(run_dir)
    return None if start is None or (end is not None and end.time >= start.time) else start


def read_faults(run_dir: Path) -> list[dict[str, Any]]:
    """What starts were lost to, oldest first (:mod:`orchestrator.jobs.suspects`)."""
    return list(_read(slurm_folder(run_dir) / "faults.json").get("faults", []))


def write_faults(run_dir: Path, faults: Sequence[Mapping[str, Any]]) -> None:
    """Remember them."""
    _write(slurm_folder(run_dir) / "faults.json", {"faults": list(faults)})


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(values) + "\n")
