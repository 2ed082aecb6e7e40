"""Saving and loading a model of a GiB: what a rank holds beyond its own state, watched while it happens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.bench.checkpoint_sides import Cut, Shape
from orchestrator.checkpoint.exchange import Peers
from orchestrator.checkpoint.load import find_latest_good
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import SavePolicy, save
from parallel.shards import Shard
from tests.helpers.pool import Pool

SHAPE = Shape(layers=32, width=1024)
LAYER_BYTES = 8 * 1024**2 * 4
STATED_BYTES = SavePolicy().buffer_bytes
SLACK_BYTES = 24 * 2**20  # threads, messages of metadata, the allocator's own


def private_bytes() -> int:
    """Memory of this process that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def peak_beyond(action: Callable[[], Any]) -> int:
    """The most that an action adds to this process's private memory, looked at every millisecond."""
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_bytes() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        action()
    finally:
        done.set()
        watching.join()
    return peak


def save_and_load(folder: Path) -> tuple[int, int, int]:
    """Peaks of a save, and of a load into the same memory cut otherwise; and the bytes of the model."""
    own = {name: torch.ones(Cut(0).box(shape).size) for name, shape in SHAPE.tensors.items()}
    shards = [Shard(name, "weight", SHAPE.tensors[name], Cut(0).box(SHAPE.tensors[name]), own[name]) for name in own]
    saving = peak_beyond(lambda: save(folder, 1, shards, Contents("model", {"step": 1})))

    def load() -> None:
        reader, _ = find_latest_good(folder, peers=Peers.of())
        assert reader is not None
        for name, shape in SHAPE.tensors.items():
            box = Cut(1).box(shape)
            own[name].view(-1).copy_(reader.read(name, "weight", box).view(-1))

    total = sum(rows * columns * 4 for rows, columns in SHAPE.tensors.values())
    dist.barrier()
    return saving, peak_beyond(load), total


@pytest.mark.grid
def test_a_rank_holds_no_more_than_a_layer_and_the_stated_buffer_beyond_its_state(pool: Pool, tmp_path: Path) -> None:
    for saving, loading, total in pool.run(2, save_and_load, tmp_path):
        assert total >= 2**30
        assert 0 < saving <= LAYER_BYTES + STATED_BYTES + SLACK_BYTES
        assert 0 < loading <= LAYER_BYTES + SLACK_BYTES
