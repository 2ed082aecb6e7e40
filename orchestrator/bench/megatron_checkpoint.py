"""megatron-core's dist_checkpointing, as the benchmark of checkpoints calls it. The adapter to that library."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from parallel.device import stand_in_for_cuda

stand_in_for_cuda()


def sharded(key: str, data: torch.Tensor, place: tuple[int, int, int]) -> Any:
    """A local tensor and its place: (axis, position, how many parts)."""
    return ShardedTensor.from_rank_offsets(key, data, place)


def save(values: dict[str, Any], folder: Path) -> None:
    """Save with the library's defaults: ``torch_dist``, one writer per rank, fsync."""
    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False  # it writes from processes of its own, which a pool's worker may not have
    dist_checkpointing.save(values, str(folder), TorchDistSaveShardedStrategy("torch_dist", 1))
    process._config["daemon"] = True


def load(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load; returns tensors by key."""
    loaded: dict[str, Any] = dist_checkpointing.load(values, str(folder))
    return loaded
