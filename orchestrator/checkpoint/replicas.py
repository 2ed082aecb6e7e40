"""Proof that what several ranks hold of one tensor is the same, bit for bit: fingerprints instead of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from orchestrator.checkpoint.coverage import Held, Holdings
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.errors import IsotrainError
from parallel.shards import Box, Shard

_WORDS = 2**18  # 64-bit words at a time: 2 MiB, which stay in a core's cache
_ODD = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number (Knuth, TAOCP 3, 6.4)


class ReplicaError(IsotrainError):
    """Ranks that should hold the same numbers do not: memory, a collective or the engine was at fault (70)."""


def fingerprint(data: torch.Tensor) -> int:
    """64 bits that depend on every bit of a tensor and on its place (multilinear, mod 2^64).

    A change of one element always changes it, other changes nearly always. It is no proof against intent, as the
    manifest's sha256 is.

    Example:
        >>> fingerprint(torch.tensor([1.0, 2.0])) == fingerprint(torch.tensor([2.0, 1.0]))
        False
    """
    flat = data.detach().contiguous()
    content = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # one element may have any stride
    whole = content.numel() // 8 * 8
    aligned = content[:whole] if content.data_ptr() % 8 == 0 else content[:whole].clone()
    words = aligned.view(torch.int64)
    keys = torch.arange(1, min(_WORDS, words.numel()) + 1, dtype=torch.int64, device=data.device) * _ODD | 1
    total = 0
    for start in range(0, words.numel(), _WORDS):
        part = words[start : start + _WORDS]
        total = (total * _ODD + int((part * keys[: part.numel()]).sum())) % 2**64
    tail = int.from_bytes(bytes(content[whole:].tolist()), "little")
    return (total * _ODD + tail) % 2**64


def replica_prints(holdings: Holdings, held: Mapping[tuple[str, str, Box], Shard], rank: int) -> list[int]:
    """The fingerprints of those of this rank's boxes that other ranks hold too, in the order of ``holdings``."""
    return [
        fingerprint(held[tensor.name, tensor.kind, item.box].data)
        for tensor, item in _shared(holdings)
        if rank in item.ranks
    ]


def prove_equal(holdings: Holdings, prints_by_rank: Sequence[Sequence[int]]) -> None:
    """Compare the fingerprints of all ranks.

    Raises:
        ReplicaError: names the first box that differs, how many do, and the ranks that stand alone.
    """
    prints = [iter(prints) for prints in prints_by_rank]
    unequal = []
    for tensor, item in _shared(holdings):
        values = {rank: next(prints[rank]) for rank in item.ranks}
        if len(set(values.values())) > 1:
            unequal.append((tensor, item, values))
    if not unequal:
        return
    tensor, item, values = unequal[0]
    common, times = Counter(values.values()).most_common(1)[0]
    alone = [rank for rank, value in values.items() if value != common]
    who = f"{alone} differ" if times > 1 else "no two agree"
    raise ReplicaError(
        f"{tensor.name} ({tensor.kind}, from {list(item.box.offset)}, size {list(item.box.size)}) should be the same "
        f"on ranks {list(item.ranks)}: {who} ({len(unequal)} such pieces in all); nothing was saved",
        "go on from the newest checkpoint: isotrain resume RUN_DIR   (if it happens again, test that host's memory)",
    )


def _shared(holdings: Holdings) -> Iterator[tuple[LogicalTensor, Held]]:
    """The boxes that several ranks hold; the same order on every rank."""
    return ((tensor, item) for tensor, items in holdings.items() for item in items if len(item.ranks) > 1)
