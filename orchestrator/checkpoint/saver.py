"""The saves of one run: one at a time, where asked for beside training."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from orchestrator.checkpoint.exchange import Peers, sent_keys
from orchestrator.checkpoint.publish import Contents, check_space
from orchestrator.checkpoint.save import Agreement, SavePolicy, agree, on_first, write
from orchestrator.errors import IsotrainError
from parallel.shards import Box, Shard


class Saver:
    """Saves a run's training state, step after step. Every rank of a run has one and makes the same calls.

    An asynchronous save stops training only while ranks agree and copy to host memory what each contributes (of each
    box one of its holders); a thread then writes, and publishes when all ranks' files are durable. One save runs at a
    time: the next one, and :meth:`finish`, wait for it and raise what went wrong. As a context it finishes at the end,
    also when the block ends with an error that all ranks raise alike (an ``IsotrainError``).

    Args:
        checkpoints: the folder of checkpoints.
        policy: how to save.
        group: carries CPU tensors. The thread communicates over it, so nothing else may while a save runs.
        asynchronous: write beside training.
        guard: called on the first rank before a save is published; what it raises stops the save.

    ``last_step`` is that of the last save that was begun (0: none).
    """

    def __init__(
        self,
        checkpoints: Path,
        policy: SavePolicy,
        group: Any = None,
        *,
        asynchronous: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoints = checkpoints
        self._policy = policy
        self._peers = Peers.of(group)
        self._asynchronous = asynchronous
        self._guard = guard
        self.last_step = 0
        self._last: Agreement | None = None
        self._buffers: dict[tuple[str, str, Box], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def prepare(self, shards: Iterable[Shard], contents: Contents) -> None:
        """Find out before the first step whether saves can work: ranks agree, replicas are equal, there is space.

        Raises:
            IsotrainError: they cannot; on every rank alike.
        """
        agreement = agree(shards, contents, self._policy, self._peers)
        self._last = dataclasses.replace(agreement, held={})
        layout = agreement.layout
        on_first(self._peers, lambda: check_space(self._checkpoints, layout), self._checkpoints, layout.bytes)

    def save(self, step: int, shards: Iterable[Shard], contents: Contents) -> None:
        """Save the state after ``step``. The shards may change as soon as this returns.

        Raises:
            IsotrainError: this save (an asynchronous one: the save before) failed, on every rank alike.
        """
        self.finish()
        self.last_step = step
        agreement = agree(shards, contents, self._policy, self._peers, self._last)
        self._last = dataclasses.replace(agreement, held={})
        if self._asynchronous:
            self._thread = threading.Thread(target=self._write, args=(self._copied(agreement), step), daemon=True)
            self._thread.start()
        else:
            write(agreement, self._checkpoints, step, self._peers, self._guard)

    def finish(self) -> None:
        """Wait for a save that runs. Raises IsotrainError where it failed, on every rank alike."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def has_failed(self) -> bool:
        """Whether an asynchronous save has failed on this rank, and :meth:`finish` would say so; waits for nothing."""
        return self._failure is not None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, IsotrainError):
            try:
                self.finish()
            except IsotrainError as failure:  # the block's own error is what ends the run
                error.add_note(f"and the save that ran could not be finished: {failure}")

    def _write(self, agreement: Agreement, step: int) -> None:
        try:
            write(agreement, self._checkpoints, step, self._peers, self._guard)
        except BaseException as error:  # noqa: BLE001  raised by finish(), in the thread that trains
            self._failure = error

    def _copied(self, agreement: Agreement) -> Agreement:
        """The same with copies in host memory of what this rank contributes; the copies' memory is used again."""
        wanted = sent_keys(agreement.layout, agreement.holdings, self._peers.rank)
        held = {key: shard for key, shard in agreement.held.items() if key in wanted}
        self._buffers = {key: self._buffer(key, shard.data) for key, shard in held.items()}
        for key, shard in held.items():
            self._buffers[key].copy_(shard.data.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        copies = {key: dataclasses.replace(shard, data=self._buffers[key]) for key, shard in held.items()}
        return dataclasses.replace(agreement, held=copies)

    def _buffer(self, key: tuple[str, str, Box], data: torch.Tensor) -> torch.Tensor:
        known = self._buffers.get(key)
        if known is not None and (known.shape, known.dtype) == (data.shape, data.dtype):
            return known
        return torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=data.is_cuda)
