"""Handing whole logical tensors to the ranks that write them: point-to-point, in rounds, within a stated buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from orchestrator.checkpoint.coverage import Held, Holdings
from orchestrator.checkpoint.layout import Block, Layout, cut_blocks
from orchestrator.checkpoint.tensor_file import TORCH_DTYPES, item_bytes
from orchestrator.errors import IsotrainError
from parallel.shards import Box, Shard, flat_boxes

ALIGNMENT = 16  # bytes, of the widest type that a view may have
Value = TypeVar("Value")


@dataclass(frozen=True)
class Peers:
    """The ranks that save together: positions in ``group``, a process group that can carry CPU tensors.

    Without torch.distributed there is one rank.
    """

    rank: int
    size: int
    group: Any = None

    @classmethod
    def of(cls, group: Any = None) -> Peers:
        """The ranks of ``group``, or of the default group.

        Raises:
            ValueError: the group carries no CPU tensors (NCCL alone).
        """
        if not dist.is_initialized():
            return cls(0, 1)
        carried = str(dist.get_backend_config(group))
        if "cpu:" not in carried:
            raise ValueError(f"checkpoints need a group for CPU tensors (gloo), this one carries {carried}")
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, value: Value, error: IsotrainError | None) -> list[Value]:
        """Every rank's value; if any rank brings an error, every rank raises the lowest rank's one."""
        answers = self.gather((value, error))
        for _, problem in answers:
            if problem is not None:
                raise problem
        return [answer for answer, _ in answers]


@dataclass(frozen=True)
class Move:
    """One box that goes from a rank's shard into a block.

    The block's bytes from ``at`` hold ``frame``, a box of the tensor ``name``/``kind``; ``region`` is the part of it
    that comes from ``sender``, who holds it in ``held``.
    """

    sender: int
    name: str
    kind: str
    dtype: str
    held: Box
    frame: Box
    at: int
    region: Box

    @property
    def bytes(self) -> int:
        """How much is moved."""
        return self.region.elements * item_bytes(self.dtype)


@dataclass(frozen=True)
class Task:
    """A block with the moves that fill it, in file order."""

    block: Block
    moves: tuple[Move, ...]

    def sent_bytes(self) -> dict[int, int]:
        """Bytes that each other rank sends to the block's owner, in one message."""
        sizes: dict[int, int] = {}
        for move in self.moves:
            if move.sender != self.block.owner:
                sizes[move.sender] = sizes.get(move.sender, 0) + move.bytes
        return sizes

    def message_bytes(self) -> dict[int, int]:
        """Bytes of messages on each rank: the owner's that arrive, and the senders'."""
        messages = self.sent_bytes()
        messages[self.block.owner] = sum(messages.values())
        return messages


def plan_rounds(layout: Layout, holdings: Holdings, ranks: int, buffer_bytes: int) -> Iterator[list[Task]]:
    """Cut the files into blocks and the blocks into rounds; equal on every rank.

    A round has at most one block per owner, each owner's blocks come in the order of writing, and no rank stages more
    than ``buffer_bytes``: a quarter for a block, a quarter for the one before, which is still being written, and a half
    for messages. All ranks finish a round before the next: nothing can deadlock.
    """
    waiting = [
        (_task(block, holdings) for block in cut_blocks(layout, owner, max(1, buffer_bytes // 4)))
        for owner in range(ranks)
    ]
    heads = [next(tasks, None) for tasks in waiting]
    turn = 0
    while any(head is not None for head in heads):
        staged = [0] * ranks
        chosen: list[Task] = []
        for owner in (*range(turn, ranks), *range(turn)):
            task = heads[owner]
            if task is None:
                continue
            need = task.message_bytes()
            if chosen and any(staged[rank] + count > buffer_bytes // 2 for rank, count in need.items()):
                continue
            for rank, count in need.items():
                staged[rank] += count
            chosen.append(task)
            heads[owner] = next(waiting[owner], None)
        turn = (turn + 1) % ranks
        yield chosen


def _task(block: Block, holdings: Holdings) -> Task:
    moves: list[Move] = []
    for position, (tensor, entry) in enumerate(zip(block.file.tensors, block.file.entries, strict=True)):
        low, high = max(block.start, entry.start), min(block.stop, entry.stop)
        if low >= high:
            continue
        item = item_bytes(entry.dtype)
        for frame, offset in flat_boxes(entry.shape, (low - entry.start) // item, (high - entry.start) // item):
            for held in holdings[tensor]:
                region = frame.intersect(held.box)
                if region is not None:
                    at = low - block.start + offset * item
                    sender = _sender(held, block.owner, position)
                    moves.append(Move(sender, tensor.name, tensor.kind, entry.dtype, held.box, frame, at, region))
    return Task(block, tuple(moves))


def _sender(held: Held, owner: int, position: int) -> int:
    """Among replicas: the file's owner itself, else by the tensor's position so that the work is spread."""
    return owner if owner in held.ranks else held.ranks[position % len(held.ranks)]


def sent_keys(layout: Layout, holdings: Holdings, rank: int) -> set[tuple[str, str, Box]]:
    """What a rank contributes to a save, its own files included: of each box one of its holders."""
    return {
        (tensor.name, tensor.kind, held.box)
        for file, owner in zip(layout.files, layout.owners, strict=True)
        for position, tensor in enumerate(file.tensors)
        for held in holdings[tensor]
        if _sender(held, owner, position) == rank
    }


class Staging:
    """One piece of memory for all blocks and messages of a save.

    Blocks come and go by the dozen; an allocator would keep three times as much as is in use at any moment.
    """

    def __init__(self, buffer_bytes: int) -> None:
        self._block_bytes = buffer_bytes // 4 // ALIGNMENT * ALIGNMENT
        self._memory = torch.empty(buffer_bytes, dtype=torch.uint8)
        self._turn = 0
        self._at = 0

    def begin(self) -> None:
        """A round begins: the messages of the one before are gone."""
        self._at = 2 * self._block_bytes

    def message(self, size: int) -> torch.Tensor:
        """Room for a message of this round."""
        start = self._at
        self._at += -(-size // ALIGNMENT) * ALIGNMENT
        return self._part(start, size, self._memory.numel())

    def block(self, size: int) -> torch.Tensor:
        """Room for a block; that of the last but one is used again."""
        self._turn = 1 - self._turn
        start = self._turn * self._block_bytes
        return self._part(start, size, start + self._block_bytes)

    def _part(self, start: int, size: int, stop: int) -> torch.Tensor:
        """Memory of its own for what is larger than it should be: an element, at least, is a block."""
        fits = start + size <= stop
        return self._memory[start : start + size] if fits else torch.empty(size, dtype=torch.uint8)


def exchange(
    rounds: Iterable[Sequence[Task]],
    shards: Mapping[tuple[str, str, Box], Shard],
    peers: Peers,
    receive: Callable[[Block, torch.Tensor], None],
    buffer_bytes: int,
) -> None:
    """Run the rounds; every rank of ``peers`` must call it with equal rounds, of :func:`plan_rounds`.

    ``receive`` gets this rank's blocks in the order of writing, each with its bytes (uint8), which it may use until it
    has returned from the next. It must not raise: the other ranks would wait for this one.
    """
    staging = Staging(buffer_bytes)
    for tasks in rounds:
        staging.begin()
        _run_round(tasks, shards, peers, receive, staging)


def _run_round(
    tasks: Sequence[Task],
    shards: Mapping[tuple[str, str, Box], Shard],
    peers: Peers,
    receive: Callable[[Block, torch.Tensor], None],
    staging: Staging,
) -> None:
    messages, works = [], []
    mine: tuple[Task, dict[int, torch.Tensor]] | None = None
    for task in tasks:
        owner = task.block.owner
        sizes = task.sent_bytes()
        if owner == peers.rank:
            arrived = {sender: staging.message(size) for sender, size in sizes.items()}
            works += [dist.irecv(part, group=peers.group, group_src=sender) for sender, part in arrived.items()]
            mine = (task, arrived)
        elif peers.rank in sizes:
            messages.append(_pack(task, shards, peers.rank, staging.message(sizes[peers.rank])))
            works.append(dist.isend(messages[-1], group=peers.group, group_dst=owner))
    for work in works:
        if work is not None:
            work.wait()
    if mine is not None:
        block = mine[0].block
        receive(block, _fill(*mine, shards, staging.block(block.stop - block.start)))


def _pack(task: Task, shards: Mapping[tuple[str, str, Box], Shard], sender: int, message: torch.Tensor) -> torch.Tensor:
    at = 0
    for move in task.moves:
        if move.sender == sender:
            _typed(message, at, move.dtype, move.region.size).copy_(_source(shards, move))
            at += move.bytes
    return message


def _fill(
    task: Task,
    arrived: Mapping[int, torch.Tensor],
    shards: Mapping[tuple[str, str, Box], Shard],
    buffer: torch.Tensor,
) -> torch.Tensor:
    taken = dict.fromkeys(arrived, 0)
    for move in task.moves:
        if move.sender == task.block.owner:
            source = _source(shards, move)
        else:
            source = _typed(arrived[move.sender], taken[move.sender], move.dtype, move.region.size)
            taken[move.sender] += move.bytes
        frame = _typed(buffer, move.at, move.dtype, move.frame.size)
        frame[_within(move.region, move.frame)].copy_(source)
    return buffer


def _source(shards: Mapping[tuple[str, str, Box], Shard], move: Move) -> torch.Tensor:
    data = shards[move.name, move.kind, move.held].data.detach()
    return data[_within(move.region, move.held)]


def _within(region: Box, frame: Box) -> tuple[slice, ...]:
    return region.shift(tuple(-start for start in frame.offset)).slices


def _typed(buffer: torch.Tensor, at: int, dtype: str, size: tuple[int, ...]) -> torch.Tensor:
    """A typed view of bytes. Wide types come first in a file, so every place is aligned to its own type."""
    count = Box.whole(size).elements * item_bytes(dtype)
    return buffer[at : at + count].view(TORCH_DTYPES[dtype]).view(size)
