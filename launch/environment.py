"""The one file that reads environment variables: who this process is, and where caches lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


class LaunchError(ValueError):
    """Processes cannot be started as asked; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class RankEnvironment:
    """Who this process is among ``world_size`` processes (global rank) and on its node (local rank)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def rank_environment(variables: Mapping[str, str] | None = None) -> RankEnvironment | None:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them; None outside of a launch.

    Raises:
        LaunchError: a variable is no whole number, or the rank is not below the world size.
    Example:
        >>> rank_environment({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
        RankEnvironment(rank=1, world_size=4, local_rank=1, local_world_size=4)
        >>> rank_environment({}) is None
        True
    """
    known = os.environ if variables is None else variables
    if "RANK" not in known or "WORLD_SIZE" not in known:
        return None
    rank, world_size = _whole(known, "RANK"), _whole(known, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise LaunchError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}", "start with torchrun, or unset RANK and WORLD_SIZE"
        )
    local_rank = _whole(known, "LOCAL_RANK") if "LOCAL_RANK" in known else rank
    local_world_size = _whole(known, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in known else world_size
    return RankEnvironment(rank, world_size, local_rank, local_world_size)


def _whole(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except ValueError:
        raise LaunchError(
            f"{name}={variables[name]!r} is no whole number", f"start with torchrun, or unset {name}"
        ) from None


def isotrain_cache(variables: Mapping[str, str] | None = None) -> Path:
    """Where isotrain keeps models: $ISOTRAIN_CACHE, else $XDG_CACHE_HOME/isotrain, else ~/.cache/isotrain.

    Example:
        >>> isotrain_cache({"ISOTRAIN_CACHE": "/scratch/isotrain"}).as_posix()
        '/scratch/isotrain'
    """
    known = os.environ if variables is None else variables
    if folder := known.get("ISOTRAIN_CACHE"):
        return Path(folder).expanduser()
    return Path(known.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "isotrain"


def hugging_face_cache(variables: Mapping[str, str] | None = None) -> Path:
    """Where huggingface_hub keeps snapshots: $HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub.

    Example:
        >>> hugging_face_cache({"HF_HOME": "/scratch/hf"}).as_posix()
        '/scratch/hf/hub'
    """
    known = os.environ if variables is None else variables
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := known.get(name):
            return Path(folder).expanduser()
    home = known.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(known.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"
