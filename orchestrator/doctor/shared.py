"""Whether the tasks of one srun see each other's files: the only proof that nodes share a folder."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from orchestrator.doctor.finding import Finding

PATIENCE_S = 60.0  # tasks look at everything else first, which takes some longer than others
LOOK_AGAIN_S = 0.1


def seen_tasks(folder: Path, step: tuple[str, int, int], patience_s: float = PATIENCE_S) -> set[int]:
    """The tasks of a step, of (name, task, tasks), whose files appear in a folder; the last to leave cleans up.

    Raises:
        OSError: the folder takes no files.
    """
    name, task, tasks = step
    here, left = folder / f".isotrain-doctor-{name}", folder / f".isotrain-doctor-{name}.left"
    for place in (here, left):
        place.mkdir(exist_ok=True)
    (here / str(task)).touch()
    deadline = time.monotonic() + patience_s
    while len(seen := _tasks_in(here)) < tasks and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_S)
    with contextlib.suppress(FileNotFoundError):  # another task cleans up just now
        (left / str(task)).touch()
        if _tasks_in(left) == seen:
            for place in (here, left):
                for file in place.iterdir():
                    file.unlink(missing_ok=True)
                place.rmdir()
    return seen


def _tasks_in(place: Path) -> set[int]:
    """The tasks that have a file there; none when one that waited too long has cleaned up."""
    try:
        return {int(file.name) for file in place.iterdir()}
    except FileNotFoundError:
        return set()


def check_tasks(folder: Path, seen: set[int], tasks: int) -> Finding:
    """Whether all tasks of a step were seen.

    Example:
        >>> check_tasks(Path("/tmp"), {0}, 2).found
        'of 2 tasks only those of [0] are seen in /tmp: their nodes do not share it'
    """
    if len(seen) == tasks:
        return Finding("shared folder", "ok", f"all {tasks} tasks of this step see each other's files in {folder}")
    words = f"of {tasks} tasks only those of {sorted(seen)} are seen in {folder}: their nodes do not share it"
    return Finding("shared folder", "fault", words, "run_dir=SHARED_FOLDER/NAME")
