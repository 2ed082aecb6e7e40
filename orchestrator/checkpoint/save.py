"""Saving: whole logical tensors handed to owner ranks, hashed while written, published atomically."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.coverage import CoverageError, Holdings, prove
from orchestrator.checkpoint.exchange import Peers, exchange, plan_rounds
from orchestrator.checkpoint.folder import explain_save, step_name
from orchestrator.checkpoint.layout import FILE_BYTES, Layout, LogicalTensor, make_layout
from orchestrator.checkpoint.publish import Contents, complete, prepare, publish
from orchestrator.checkpoint.replicas import prove_equal, replica_prints
from orchestrator.checkpoint.retention import Retention, prune
from orchestrator.checkpoint.tensor_file import DTYPE_CODES
from orchestrator.checkpoint.writing import RankFiles
from orchestrator.errors import IsotrainError
from parallel.shards import Box, Shard


@dataclass(frozen=True)
class SavePolicy:
    """How to save.

    Args:
        retention: which checkpoints stay (all, unless told otherwise).
        readback: read what was written back from the disk and compare its sha256, before it is published. None: for
            adapters, and where this save will be the only checkpoint that stays.
        buffer_bytes: staged per rank at most, beside training.
        file_bytes: about how big a file gets (an adapter is one file always).
    """

    retention: Retention = field(default_factory=Retention)
    readback: bool | None = None
    buffer_bytes: int = 64 * 2**20
    file_bytes: int = FILE_BYTES

    def reads_back(self, room: str) -> bool:
        """Whether a save of this room is read back.

        Example:
            >>> SavePolicy().reads_back("adapter"), SavePolicy().reads_back("model")
            (True, False)
        """
        only_one = self.retention.last == 1 and not self.retention.every
        return self.readback if self.readback is not None else room == "adapter" or only_one


Pieces = list[tuple[LogicalTensor, Box]]
Held = dict[tuple[str, str, Box], Shard]


@dataclass(frozen=True)
class Agreement:
    """What all ranks have agreed on and proven before a byte is written; ``held``: this rank's own shards.

    ``pieces`` are this rank's, by which the next save finds out that nothing has changed.
    """

    pieces: Pieces
    holdings: Holdings
    layout: Layout
    policy: SavePolicy
    contents: Contents
    token: str
    held: Held


@dataclass(frozen=True)
class _Offer:
    """What a rank brings to a save: its pieces (None: those of the last one), settings (the first rank's count)."""

    pieces: Pieces | None
    room: str
    policy: SavePolicy
    token: str


def save(
    checkpoints: Path,
    step: int,
    shards: Iterable[Shard],
    contents: Contents,
    *,
    policy: SavePolicy | None = None,
    group: Any = None,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` and point ``latest`` at it. Every rank of ``group`` calls it.

    Until the last rename nothing that is already there changes; if any rank fails, every rank raises the same error
    and the unfinished folder is removed.

    Args:
        checkpoints: on a file system that all ranks see; made when missing.
        shards: this rank's pieces, weights and optimizer state; their data are read until the call returns.
        group: a process group that carries CPU tensors; the default group if None.
    Returns:
        The published folder.
    Raises:
        CoverageError: the ranks' shards do not make whole tensors.
        ReplicaError: ranks hold different numbers of what should be one tensor.
        ResourceError: no space is left, the folder cannot be written, or what was read back is not what was written.
    """
    peers = Peers.of(group)
    return write(agree(shards, contents, policy or SavePolicy(), peers), checkpoints, step, peers)


def agree(
    shards: Iterable[Shard], contents: Contents, policy: SavePolicy, peers: Peers, last: Agreement | None = None
) -> Agreement:
    """Let all ranks agree on what is saved and prove that it is whole; nothing is written.

    Args:
        last: what was agreed on before by the same ranks; where no rank holds other pieces now, they are not told
            again.
    Raises:
        CoverageError, ReplicaError: as :func:`save`.
    """
    pieces, held, problem = _describe(shards, contents)
    known = last is not None and last.pieces == pieces and last.contents.room == contents.room
    token = secrets.token_hex(4)
    offers = peers.agree(_Offer(None if known else pieces, contents.room, policy, token), problem)
    policy, token = offers[0].policy, offers[0].token
    if last is not None and all(offer.pieces is None for offer in offers):
        holdings, layout = last.holdings, last.layout
    else:
        told = [offer.pieces for offer in offers]
        holdings = prove(peers.gather(pieces) if None in told else [pieces for pieces in told if pieces is not None])
        layout = make_layout(holdings, offers[0].room, peers.size, policy.file_bytes)
    prove_equal(holdings, peers.gather(replica_prints(holdings, held, peers.rank)))
    return Agreement(pieces, holdings, layout, policy, contents, token, held)


def write(
    agreement: Agreement, checkpoints: Path, step: int, peers: Peers, guard: Callable[[], None] = lambda: None
) -> Path:
    """Write and publish what was agreed on; returns the folder. Raises as :func:`save`, and what ``guard`` raises.

    Args:
        guard: called on the first rank before anything is touched, and before the new folder gets its name.
    """
    layout, policy, token = agreement.layout, agreement.policy, agreement.token
    temporary = checkpoints / f"{step_name(step)}.tmp-{token}"
    final = checkpoints / step_name(step)
    try:

        def begun() -> None:
            guard()
            prepare(temporary, layout)

        on_first(peers, begun, checkpoints, layout.bytes)
        files = RankFiles(temporary, layout, peers.rank)
        rounds = plan_rounds(layout, agreement.holdings, peers.size, policy.buffer_bytes)
        exchange(rounds, agreement.held, peers, files.receive, policy.buffer_bytes)
        written = peers.agree(*files.finish(policy.reads_back(agreement.contents.room)))

        def finished() -> None:
            folder = complete(temporary, step, layout, written, agreement.contents)
            guard()
            publish(folder, final, token)

        on_first(peers, finished, checkpoints, layout.bytes)
    except IsotrainError:
        if peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if peers.rank == 0:
        prune(checkpoints, step, policy.retention, token)
    return final


def _describe(shards: Iterable[Shard], contents: Contents) -> tuple[Pieces, Held, IsotrainError | None]:
    """This rank's pieces, its shards by what they hold, and what is wrong with them (told to all before any raises)."""
    pieces, held = [], {}
    problem: IsotrainError | None = None
    for shard in shards:
        if tuple(shard.data.shape) != shard.box.size or shard.data.dtype not in DTYPE_CODES:
            problem = CoverageError(
                f"checkpoint shard {shard.name} ({shard.kind}): data {tuple(shard.data.shape)} {shard.data.dtype} "
                f"for a box of size {shard.box.size}"
            )
            break
        tensor = LogicalTensor(shard.name, shard.kind, tuple(shard.shape), DTYPE_CODES[shard.data.dtype])
        pieces.append((tensor, shard.box))
        held[shard.name, shard.kind, shard.box] = shard
    try:
        json.dumps([contents.state, contents.about])
    except (TypeError, ValueError) as error:
        problem = IsotrainError(f"the checkpoint's state is not JSON-able: {error}")
    return pieces, held, problem


def on_first(peers: Peers, action: Callable[[], None], folder: Path, needed_bytes: int = 0) -> None:
    """Do something on the first rank; if it fails, every rank raises the same error."""
    problem = None
    if peers.rank == 0:
        try:
            action()
        except OSError as error:
            problem = explain_save(error, folder, needed_bytes)
        except IsotrainError as error:
            problem = error
    peers.agree(None, problem)
