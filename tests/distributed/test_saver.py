"""Saves beside training: the same bytes, one at a time, published when durable; and what a save proves before that."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.checkpoint import writing
from orchestrator.checkpoint.load import open_checkpoint
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.replicas import fingerprint
from orchestrator.checkpoint.save import SavePolicy, save
from orchestrator.checkpoint.saver import Saver
from orchestrator.checkpoint.verify import compare, verify
from orchestrator.errors import ConfigError, IsotrainError
from parallel.shards import KINDS, Box, Shard
from tests.helpers.pool import Pool

SHAPE = (12, 40)
POLICY = SavePolicy(buffer_bytes=512, file_bytes=3000)


class State:
    """Half of each tensor by rows on two ranks, and each half on two (four ranks: TP=2 x DP=2)."""

    def __init__(self, value: float = 0.0) -> None:
        half = dist.get_rank() % 2
        self._box = Box((6 * half, 0), (6, 40))
        whole = torch.arange(480, dtype=torch.float32).reshape(SHAPE)
        self.data = {kind: (whole + 1000 * at)[self._box.slices] + value for at, kind in enumerate(KINDS)}

    def add(self, value: float) -> None:
        for data in self.data.values():
            data += value

    def shards(self) -> list[Shard]:
        return [Shard("layers.0.w", kind, SHAPE, self._box, data) for kind, data in self.data.items()]


def contents(step: int) -> Contents:
    return Contents("model", {"step": step}, {"config.json": b"{}"})


def save_beside(folder: Path) -> list[bool]:
    """Three asynchronous saves of a state that goes on changing; was the thread still at it when save() returned?"""
    real, os.fsync = os.fsync, lambda handle: time.sleep(0.05)
    state, beside = State(), []
    with Saver(folder / "beside", POLICY, dist.new_group(backend="gloo"), asynchronous=True) as saver:
        saver.prepare(state.shards(), contents(0))
        for step in (1, 2, 3):
            state.add(1.0)
            saver.save(step, state.shards(), contents(step))
            beside.append(saver._thread is not None and saver._thread.is_alive())
            state.add(0.5)  # training goes on at once
    os.fsync = real
    for step in (1, 2, 3):
        save(folder / "stopped", step, State(1.5 * step - 0.5).shards(), contents(step), policy=POLICY)
    return beside


def test_a_save_beside_training_holds_what_was_there_when_it_was_asked_for(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(4, save_beside, tmp_path) == [[True] * 3] * 4
    for step in (1, 2, 3):
        folders = [tmp_path / kind / f"step-00000{step}" for kind in ("beside", "stopped")]
        assert compare(*folders).equal and all(verify(folder).good for folder in folders)
    assert open_checkpoint(tmp_path / "beside").step == 3
    assert sorted(path.name for path in (tmp_path / "beside").iterdir())[0] == "latest"


def fail_beside(folder: Path) -> tuple[list[str], int]:
    """The second of three saves fails on the last rank only; what each rank is told, and when."""
    real, told = os.fsync, []
    state = State()

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/disk")

    saver = Saver(folder, POLICY, dist.new_group(backend="gloo"), asynchronous=True)
    for step in (1, 2, 3):
        if step == 2 and dist.get_rank() == 3:
            saver.finish()
            os.fsync = fsync
        try:
            saver.finish()
            os.fsync = os.fsync if step == 2 else real
            saver.save(step, state.shards(), contents(step))
        except IsotrainError as error:
            told.append(f"{step}: {error}")
            os.fsync = real
            saver.save(step, state.shards(), contents(step))
    saver.finish()
    return told, int(open_checkpoint(folder).step)


def test_what_fails_beside_training_is_raised_at_the_next_save_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    answers = pool.run(4, fail_beside, tmp_path)
    assert answers == [answers[0]] * 4
    ((message,), step) = answers[0]
    assert message.startswith("3: no space left: /some/disk") and step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001", "step-000003"]


def save_unequal(folder: Path, element: int) -> tuple[str, str]:
    """One replica of four has one bit flipped."""
    data = torch.arange(480, dtype=torch.float32).reshape(SHAPE)
    if dist.get_rank() == 2:
        flat = data.view(-1).view(torch.int32)
        flat[element] ^= 1
    shards = [Shard(name, "weight", SHAPE, Box.whole(SHAPE), torch.ones(SHAPE)) for name in ("a", "b")]
    try:
        save(folder, 1, [*shards, Shard("norm", "weight", SHAPE, Box.whole(SHAPE), data)], contents(1))
    except IsotrainError as error:
        return str(error), error.hint
    return "", ""


@pytest.mark.parametrize("element", [0, 479])
def test_replicas_that_differ_by_a_bit_are_named_and_not_saved(pool: Pool, tmp_path: Path, element: int) -> None:
    answers = pool.run(4, save_unequal, tmp_path, element)
    assert answers == [answers[0]] * 4
    assert answers[0][0] == (
        "norm (weight, from [0, 0], size [12, 40]) should be the same on ranks [0, 1, 2, 3]: [2] differ "
        "(1 such pieces in all); nothing was saved"
    )
    assert "isotrain resume RUN_DIR" in answers[0][1] and not list(tmp_path.iterdir())


def save_on_a_bad_disk(folder: Path, readback: bool | None, room: str) -> str:
    """A disk that changes a byte of each tensor file after it was synced, on the last rank."""
    real: Any = writing.FileWriter.close

    def close(self: Any) -> str:
        digest: str = real(self)
        with self.path.open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte[0] ^ 4]))
        return digest

    if dist.get_rank() == dist.get_world_size() - 1:
        writing.FileWriter.close = close  # type: ignore[method-assign]
    try:
        save(folder, 1, State().shards(), Contents(room, {}), policy=SavePolicy(readback=readback, file_bytes=3000))
    except IsotrainError as error:
        return str(error)
    finally:
        writing.FileWriter.close = real  # type: ignore[method-assign]
    return ""


@pytest.mark.parametrize(("readback", "room"), [(None, "adapter"), (True, "model")])
def test_a_disk_that_gives_back_something_else_is_found_before_it_is_published(
    pool: Pool, tmp_path: Path, readback: bool | None, room: str
) -> None:
    answers = pool.run(2, save_on_a_bad_disk, tmp_path, readback, room)
    assert answers == [answers[0]] * 2
    assert "was written with sha256" in answers[0] and "the disk gives back" in answers[0]
    assert not list(tmp_path.iterdir())


def test_without_reading_back_the_same_fault_is_found_when_the_checkpoint_is_verified(
    pool: Pool, tmp_path: Path
) -> None:
    assert pool.run(2, save_on_a_bad_disk, tmp_path, False, "model") == ["", ""]
    assert "sha256" in verify(tmp_path / "step-000001").problems[0]


def guarded(folder: Path) -> str:
    def taken() -> None:
        raise ConfigError("another isotrain is training here")

    saver = Saver(folder, POLICY, guard=taken)
    try:
        saver.save(1, State().shards(), contents(1))
    except IsotrainError as error:
        return str(error)
    return ""


def test_a_run_that_has_lost_its_folder_publishes_nothing(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, guarded, tmp_path) == ["another isotrain is training here"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1,), (3, 5), (700_001,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_fingerprint_tells_every_flipped_bit_and_every_swap(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 100, shape, generator=generator).to(dtype)
    own = fingerprint(data)
    assert own == fingerprint(data.clone()) and 0 <= own < 2**64
    assert own == fingerprint(torch.stack([data, data], -1)[..., 0])  # a view with holes
    content = data.view(-1).view(torch.uint8)
    for at in {0, content.numel() // 2, content.numel() - 1} if content.numel() else ():
        for bit in (1, 128):
            content[at] ^= bit
            assert fingerprint(data) != own
            content[at] ^= bit
    assert fingerprint(data) == own


def test_a_fingerprint_of_swapped_blocks_differs() -> None:
    data = torch.arange(1_200_000, dtype=torch.float32)
    assert fingerprint(data) != fingerprint(data.roll(600_000))
