"""One pool of worker processes for all multi-process tests: imports are paid for once, groups open per call."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

BACKEND = "gloo"


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


def _serve(index: int, tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        world, store, module, name, args = task
        os.environ.update(RANK=str(index), WORLD_SIZE=str(world), LOCAL_RANK=str(index), LOCAL_WORLD_SIZE=str(world))
        try:
            results.put((index, True, _run(index, world, store, module, name, args)))
        except BaseException:  # noqa: BLE001  the traceback is the result; the parent raises it
            results.put((index, False, traceback.format_exc()))


def _run(rank: int, world: int, store: str, module: str, name: str, args: tuple[Any, ...]) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group(
        BACKEND, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        return getattr(importlib.import_module(module), name)(*args)
    finally:
        dist.destroy_process_group()


class Pool:
    """Up to ``size`` live workers; :meth:`run` opens a fresh process group on the first ``world`` of them."""

    def __init__(self, size: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._size = size
        self._folder = tempfile.TemporaryDirectory(prefix="pool")
        self._results: Any = None
        self._tasks: list[Any] = []
        self._workers: list[Any] = []
        self._calls = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
        """Run ``function(*args)`` on ranks 0..world-1 with a gloo default group open; return results by rank.

        ``function`` must be importable at module level and picklable by name. After a failure or a time-out the
        workers are killed, so that the next call starts with clean ones.

        Raises:
            RankError: a rank raised or did not answer in ``timeout_s``.
        """
        self._start(world)
        self._calls += 1
        store = str(Path(self._folder.name) / f"store{self._calls}")
        for tasks in self._tasks[:world]:
            tasks.put((world, store, function.__module__, function.__name__, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < world:
            try:
                rank, good, value = self._results.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                self.close()
                missing = sorted(set(range(world)) - set(answers))
                raise RankError(f"ranks {missing} gave no answer in {timeout_s} s") from None
            if not good:
                self.close()
                raise RankError(f"rank {rank} of {world}:\n{value}")
            answers[rank] = value
        return [answers[rank] for rank in range(world)]

    def _start(self, world: int) -> None:
        if world > self._size:
            raise ValueError(f"the pool has {self._size} workers, {world} asked for")
        if self._results is None:
            self._results = self._context.Queue()
        while len(self._workers) < world:
            tasks = self._context.Queue()
            worker = self._context.Process(target=_serve, args=(len(self._workers), tasks, self._results), daemon=True)
            worker.start()
            self._tasks.append(tasks)
            self._workers.append(worker)

    def leave(self, timeout_s: float = 20) -> None:
        """Let idle workers end by themselves, so that their coverage is written; kill those that do not."""
        for tasks in self._tasks:
            tasks.put(None)
        for worker in self._workers:
            worker.join(timeout_s)
        self.close()

    def close(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._tasks, self._results = [], [], None
