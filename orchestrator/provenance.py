"""Where a run came from: what is worth knowing of the machine, the versions and the code that started it."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from launch.environment import scheduler_job, telling_variables
from orchestrator.config.secrets import without_secrets

PACKAGES = ("isotrain", "torch", "megatron-core", "transformers", "peft", "safetensors", "transformer-engine")
GIT_S = 10.0


def provenance(folder: Path) -> dict[str, Any]:
    """When, where, with which versions and variables, and from which commit a start was made; no secrets.

    Args:
        folder: the working folder; ``git`` is null where it is in no repository.
    """
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "scheduler": scheduler_job() or None,
        "folder": str(folder),
        "git": git_state(folder),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
        "variables": without_secrets(telling_variables()),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is at, and whether tracked files in its repository differ from it; None without one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
