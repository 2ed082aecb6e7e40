"""Points of a sweep that train in one launch on one base: what their launch's folder says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launch.exits import first_cause, read_exits
from orchestrator.errors import DataError, ExitCode
from orchestrator.runs import write_whole

FILE = "points.json"
OF_ONE_POINT = frozenset({ExitCode.CONFIG, ExitCode.DATA, ExitCode.INTERNAL})
"""Errors that are one point's own; a lost peer and a lack of memory or disk are everybody's."""
AGAIN = frozenset({ExitCode.INTERRUPTED, ExitCode.PEER_LOST})
"""What a point ends with that goes on when it is started again."""


def bundle_folder(sweep: Path, numbers: Sequence[int]) -> Path:
    """Where the launch of some points keeps its logs, states and exits.

    Example:
        >>> bundle_folder(Path("sweep"), [3, 4, 7]).as_posix()
        'sweep/together-003'
    """
    return sweep / f"together-{min(numbers):03d}"


def is_bundle(folder: Path) -> bool:
    """Whether a folder is that of several points' launch."""
    return (folder / FILE).is_file()


def write_bundle(folder: Path, run_dirs: Sequence[Path]) -> None:
    """Write down which run folders a launch is of; they lie beside its own."""
    folder.mkdir(exist_ok=True)
    write_whole(folder / FILE, json.dumps({"points": [run_dir.name for run_dir in run_dirs]}) + "\n")


def read_bundle(folder: Path) -> tuple[Path, ...]:
    """The run folders of a launch.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        names = json.loads((folder / FILE).read_text(encoding="utf-8"))["points"]
        return tuple(folder.parent / str(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / FILE} cannot be read: {error}", f"isotrain sweep {folder.parent}") from error


def is_over(run_dir: Path) -> bool:
    """Whether a point has ended in this launch, well or not, and is not to be started again."""
    exits = read_exits(run_dir)
    cause = first_cause(exits)
    return bool(exits) and (cause is None or cause.code not in AGAIN)
