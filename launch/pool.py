"""A pool of processes on this machine: imports are paid for once, and a process group is opened anew for every call."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.environment import become_rank

LOOK_EVERY_S = 0.5  # whether workers live
PEER_TIMEOUT = timedelta(seconds=120)
CALLS_OF_A_WORKER = 50  # engines with experts still leave threads of gloo groups behind, which poll
# By the process that workers are forked from: megatron-core, and what an optimizer of torch imports when it is made.
IMPORTED_ONCE = ["torch", "torch._dynamo", "parallel.engines"]


class RankError(RuntimeError):
    """A rank raised or gave no answer; the message holds its traceback."""


class Pool:
    """Up to ``size`` live workers; :meth:`run` opens a fresh gloo group on the first ``world`` of them.

    Args:
        size: most workers that there will be; they start when they are first needed.
        log: a file for all that workers print; None: they print where this process does.
        method: how multiprocessing starts workers; None: forked from one process that has imported what they need,
            but spawned where torch may have CUDA, which does not survive a fork.
    """

    def __init__(self, size: int, log: Path | None = None, method: str | None = None) -> None:
        self._log = log
        self._context: Any = multiprocessing.get_context(method or _start_method())
        self._context.set_forkserver_preload(IMPORTED_ONCE)
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
            RankError: a rank raised, ended, or did not answer in ``timeout_s``.
        """
        if self._calls and self._calls % CALLS_OF_A_WORKER == 0:
            self.leave()
        self._start(world)
        self._calls += 1
        store = str(Path(self._folder.name) / f"store{self._calls}")
        for tasks in self._tasks[:world]:
            tasks.put((world, store, function.__module__, function.__name__, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < world:
            missing = sorted(set(range(world)) - set(answers))
            dead = {rank: code for rank in missing if (code := self._workers[rank].exitcode) is not None}
            try:
                rank, good, value = self._results.get(timeout=LOOK_EVERY_S)
            except queue.Empty:
                if not dead and time.monotonic() < deadline:
                    continue
                self.close()
                if dead:
                    raise RankError(f"ranks ended without an answer, with these exit codes: {dead}") from None
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
            arguments = (len(self._workers), tasks, self._results, self._log)
            worker = self._context.Process(target=_serve, args=arguments, daemon=True)
            worker.start()
            self._tasks.append(tasks)
            self._workers.append(worker)

    def leave(self, timeout_s: float = 20) -> None:
        """Let idle workers end by themselves; kill those that do not."""
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


def _start_method() -> str:
    import torch

    return "spawn" if torch.version.cuda or torch.version.hip else "forkserver"


def _serve(index: int, tasks: Any, results: Any, log: Path | None) -> None:
    """The life of one worker: one thread, one task after the other, until None comes."""
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    become_rank(index, 1)
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    while (task := tasks.get()) is not None:
        world, store, module, name, args = task
        become_rank(index, world)
        try:
            results.put((index, True, _run(index, world, store, getattr(importlib.import_module(module), name), args)))
        except BaseException:  # noqa: BLE001  the traceback is the result; the parent raises it
            results.put((index, False, traceback.format_exc()))


def _end_with_parent() -> None:
    """The system's own signal for this would come from the process that forked us, which outlives our parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _run(rank: int, world: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=PEER_TIMEOUT)
    try:
        return function(*args)
    finally:
        gc.collect()  # a model is a cycle that holds its groups, and each of those has threads that poll
        gc.freeze()  # what is left are modules: half a second to look at again after each call
        dist.destroy_process_group()
