"""What lies in a folder of checkpoints, a row for each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.folder import MANIFEST, list_steps
from orchestrator.checkpoint.load import CheckpointReader, checkpoints_folder, in_order
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import ConfigError, DataError


@dataclass(frozen=True)
class Row:
    """One checkpoint.

    Args:
        is_next: whether a resume goes on from it, by what is known here.
        loss: of its step; None where its writer did not say.
        bytes: of all its files.
        topology: axes of its writer that are not 1, such as ``tp=2 pp=2``; "1 process" where all are.
        state: "whole" (all files there with their sizes), "verified" (and hashed just now), or what is wrong.
        good: whether nothing is wrong.
    """

    step: int
    folder: Path
    is_next: bool
    loss: float | None
    bytes: int
    topology: str
    room: str
    state: str
    good: bool

    def summary(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return asdict(self) | {"folder": str(self.folder)}


def list_checkpoints(path: Path, *, hashed: bool = False) -> list[Row]:
    """The checkpoints of a run, ascending by step; damaged ones too.

    Args:
        path: a run folder or its ``checkpoints`` folder.
        hashed: hash every file and tensor (else presence and sizes are checked).
    Raises:
        ConfigError: there are none.
    """
    checkpoints = checkpoints_folder(path)
    steps = list_steps(checkpoints)
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder", "name the run_dir of a run that has saved")
    if not steps:
        raise ConfigError(f"{checkpoints} holds no checkpoint", "name the run_dir of a run that has saved")
    rows = {folder: _row(step, folder, hashed) for step, folder in steps}
    rows = {folder: row for folder, row in rows.items() if row.good or folder.exists()}  # else a run has taken it away
    following = next((folder for folder in in_order(checkpoints)[0] if folder in rows and rows[folder].good), None)
    return [replace(row, is_next=folder == following) for folder, row in rows.items()]


def _row(step: int, folder: Path, hashed: bool) -> Row:
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except DataError as error:
        return Row(step, folder, False, None, 0, "?", "?", str(error), False)
    problems = verify(folder).problems if hashed else _absent(folder)
    loss = manifest.about.get("metrics", {}).get("loss")
    total = sum(record.bytes for record in manifest.files.values())
    state = problems[0] if problems else "verified" if hashed else "whole"
    return Row(step, folder, False, loss, total, topology_words(manifest.about), manifest.room, state, not problems)


def _absent(folder: Path) -> tuple[str, ...]:
    try:
        CheckpointReader(folder)
    except DataError as error:
        return (str(error),)
    return ()


def topology_words(about: Any) -> str:
    """The writer's topology in words.

    Example:
        >>> topology_words({"topology": {"pp": 2, "dp": 1, "tp": 2}}), topology_words({"topology": {"tp": 1}})
        ('pp=2 tp=2', '1 process')
    """
    sizes = about.get("topology")
    if not isinstance(sizes, dict):
        return "?"
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, None)) or "1 process"
