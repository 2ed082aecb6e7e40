"""Names in the folder of checkpoints, ``latest``, and writing that survives a crash."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from orchestrator.errors import ConfigError, DataError, IsotrainError, ResourceError

LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
MARKER = "isotrain.json"  # in a folder that an export or a conversion wrote: says so, and what it is
STEP_NAME = re.compile(r"step-(\d{6,})")
REPLACED_NAME = re.compile(r"(step-\d{6,})\.replaced-\w+")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
TEMPORARY_NAME = re.compile(r"(step-\d{6,}|latest)\.tmp-\w+")


def step_name(step: int) -> str:
    """The folder name of a step.

    Example:
        >>> step_name(50)
        'step-000050'
    """
    return f"step-{step:06d}"


def list_steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """All published checkpoints, ascending by step; not checked.

    One that was moved aside to be replaced counts where the crash came before its replacement had its name.
    """
    if not checkpoints.is_dir():
        return []
    found: dict[str, Path] = {}
    for path in sorted(checkpoints.iterdir(), reverse=True):
        aside = REPLACED_NAME.fullmatch(path.name)
        if STEP_NAME.fullmatch(path.name):
            found[path.name] = path
        elif aside:
            found.setdefault(aside.group(1), path)
    return sorted((int(name.removeprefix("step-")), path) for name, path in found.items())


def read_latest(checkpoints: Path) -> str | None:
    """The folder name that ``latest`` holds; None when there is no ``latest``.

    Raises:
        DataError: it holds no name of a checkpoint.
    """
    try:
        name = (checkpoints / LATEST).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not STEP_NAME.fullmatch(name):
        raise DataError(f"{checkpoints / LATEST} names no checkpoint: {name[:40]!r}")
    return name


def write_latest(checkpoints: Path, name: str, token: str) -> None:
    """Point ``latest`` at a published folder, atomically and durably. Raises OSError."""
    temporary = checkpoints / f"{LATEST}.tmp-{token}"
    write_durably(temporary, f"{name}\n".encode())
    temporary.replace(checkpoints / LATEST)
    sync_folder(checkpoints)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and fsync it. Raises OSError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """:func:`sync_folder` for a folder and all below it, deepest first. Raises OSError."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def remove(path: Path) -> None:
    """Delete a file or a folder, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Free space on the disk where ``folder`` is, or would be made. Raises OSError."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def explain(error: OSError, folder: Path, needed_bytes: int, place: str) -> IsotrainError:
    """Turn a failed write into an error with numbers and a hint; ``place`` is what the user sets to move it."""
    path = error.filename or folder
    if error.errno == errno.EFBIG:
        return ResourceError(
            f"{path} would be larger than this process or its file system allows: {error.strerror}",
            f"ulimit -f unlimited, or set {place} on another disk; then run it again",
        )
    if error.errno in NO_SPACE:
        return ResourceError(
            f"no space left: {path}: {error.strerror}; {needed_bytes:,} bytes are needed, {free_bytes(folder):,} are "
            "free. What was saved before is untouched",
            f"free some space or set {place} on another disk, then run it again",
        )
    if error.errno in FORBIDDEN:
        return ConfigError(f"{path} cannot be written: {error.strerror}", f"set {place} to a folder that you may write")
    return ResourceError(f"{path} cannot be written: {error.strerror}", "check the disk, then run it again")


def explain_save(error: OSError, folder: Path, needed_bytes: int) -> IsotrainError:
    """:func:`explain` for a save of a run, which could write when it began: the disk has changed, not the job."""
    if error.errno in NO_SPACE:
        return explain(error, folder, needed_bytes, "run_dir=DIR")
    hint = "check the disk, then run it again"
    if error.errno in FORBIDDEN:
        hint = "let it be written again, or set run_dir=DIR on another disk; then run it again"
    if error.errno == errno.ENOENT:
        hint = "run_dir=DIR must lie on a file system that all nodes share, and stay there; then run it again"
    return ResourceError(
        f"{error.filename or folder} cannot be written: {error.strerror}. What was saved before is as it was",
        hint,
    )
