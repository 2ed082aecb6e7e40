"""Three ways to save and load one sharded state: ours, torch.distributed.checkpoint, megatron-core's torch_dist.

All three fsync. Ours also hashes everything that it writes, and hashes everything again before it loads; the peers hash
nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from parallel.shards import Box, Shard

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shape:
    """A state: ``layers`` times a few fp32 matrices of ``width``, each with two moments."""

    layers: int
    width: int

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Logical tensors by name, as a decoder has them."""
        one = {"q_proj": (1, 1), "o_proj": (1, 1), "up_proj": (3, 1), "down_proj": (1, 3)}
        return {
            f"model.layers.{layer}.{name}.weight": (rows * self.width, columns * self.width)
            for layer in range(self.layers)
            for name, (rows, columns) in one.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(rows * columns for rows, columns in self.tensors.values()) * 4 * len(KINDS)


@dataclass(frozen=True)
class Cut:
    """Every tensor cut evenly along ``axis`` over the ranks of the default group."""

    axis: int

    def box(self, shape: tuple[int, int]) -> Box:
        """This rank's box."""
        rank, world = dist.get_rank(), dist.get_world_size()
        part = shape[self.axis] // world
        offset, size = [0, 0], list(shape)
        offset[self.axis], size[self.axis] = rank * part, part
        return Box(tuple(offset), tuple(size))


class Side(Protocol):
    """How one of the three saves and loads: every rank calls it."""

    def save(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """Write; durable when it returns."""

    def load(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """Fill ``state``, whatever cut has written."""


def local_state(shape: Shape, cut: Cut, fill: bool) -> dict[str, torch.Tensor]:
    """This rank's tensors by ``NAME KIND``; with ``fill`` the values depend on the place in the whole tensor only."""
    state = {}
    for name, whole in shape.tensors.items():
        box = cut.box(whole)
        for kind in KINDS:
            data = torch.empty(box.size)
            if fill:
                start = int.from_bytes(hashlib.sha256(f"{name}{kind}".encode()).digest()[:2], "little")
                rows = torch.arange(box.offset[0], box.offset[0] + box.size[0])[:, None] * whole[1]
                columns = torch.arange(box.offset[1], box.offset[1] + box.size[1])[None, :]
                data.copy_((rows + columns + start) % 1_000_003)
            state[f"{name} {kind}"] = data
    return state


class Ours:
    """isotrain's own checkpoints."""

    def shards(self, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> list[Shard]:
        """The state as shards of logical tensors."""
        shards = []
        for key, data in state.items():
            name, kind = key.split()
            whole = shape.tensors[name]
            shards.append(Shard(name, kind, whole, cut.box(whole), data))
        return shards

    def save(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """Write, hash, fsync, publish."""
        from orchestrator.checkpoint.publish import Contents
        from orchestrator.checkpoint.save import SavePolicy, save

        files = {"config.json": b"{}"}
        policy = SavePolicy(readback=False)
        save(folder, 1, self.shards(state, shape, cut), Contents("model", {"step": 1}, files), policy=policy)

    def load(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """Hash all files, each rank a share; read the boxes."""
        from orchestrator.checkpoint.exchange import Peers
        from orchestrator.checkpoint.load import find_latest_good

        reader, _ = find_latest_good(folder, peers=Peers.of())
        if reader is None:
            raise FileNotFoundError(folder)
        for key, data in state.items():
            name, kind = key.split()
            data.copy_(reader.read(name, kind, cut.box(shape.tensors[name])))


class TorchDistributed:
    """torch.distributed.checkpoint over DTensors, with its defaults (fsync is one)."""

    def _values(self, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Placement

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {key: DTensor.from_local(data, mesh, [Placement(cut.axis)]) for key, data in state.items()}

    def save(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """``dcp.save``."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self._values(state, shape, cut), checkpoint_id=folder)

    def load(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """``dcp.load``, in place."""
        import torch.distributed.checkpoint as dcp

        dcp.load(self._values(state, shape, cut), checkpoint_id=folder)


class Megatron:
    """megatron-core's dist_checkpointing in its format torch_dist."""

    def _values(self, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> dict[str, Any]:
        from orchestrator.bench.megatron_checkpoint import sharded

        place = (cut.axis, dist.get_rank(), dist.get_world_size())
        return {key: sharded(key, data, place) for key, data in state.items()}

    def save(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """``dist_checkpointing.save``."""
        from orchestrator.bench.megatron_checkpoint import save

        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        save(self._values(state, shape, cut), folder)

    def load(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """``dist_checkpointing.load``."""
        from orchestrator.bench.megatron_checkpoint import load

        loaded = load(self._values(state, shape, cut), folder)
        for key, data in state.items():
            if loaded[key] is not data:
                data.copy_(loaded[key])


class Disk:
    """No checkpoint: the same bytes to one file per rank, fsynced, and read back. What the disk allows."""

    def save(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """Write and fsync."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{dist.get_rank()}").open("wb") as file:
            for data in state.values():
                content: Any = data.numpy()
                file.write(memoryview(content).cast("B"))
            file.flush()
            os.fsync(file.fileno())

    def load(self, folder: Path, state: Mapping[str, torch.Tensor], shape: Shape, cut: Cut) -> None:
        """Read into place."""
        with (folder / f"rank-{dist.get_rank()}").open("rb") as file:
            for data in state.values():
                content: Any = data.numpy()
                file.readinto(memoryview(content).cast("B"))


SIDES: dict[str, Callable[[], Side]] = {
    "isotrain": Ours,
    "torch.distributed.checkpoint": TorchDistributed,
    "megatron-core torch_dist": Megatron,
    "plain files (the disk)": Disk,
}


def seconds(action: Callable[[], Any]) -> float:
    """From the moment when all ranks are ready until all are done."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Let the page cache forget a folder's files, so that a load reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
