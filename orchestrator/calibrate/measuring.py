"""Measuring: matrix products, attention, copies and collectives, timed by the processes that would train."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orchestrator.planning.profile import Message, Pace

SHAPES = ((512, 576, 576), (512, 1536, 576), (512, 576, 1536), (512, 2048, 2048), (1024, 4096, 1024))
"""Tokens, output and input width of the products that are timed: linears of small models, which CPUs train."""
FEWER_TOKENS = (16, 64, 256)
WIDTHS = ((576, 576), (1536, 576), (576, 1536))
"""Products of few tokens reach less: the same widths by tokens."""
BETWEEN = (256, 576, 576)
"""The product that ranks compute between two messages: a few milliseconds, as much as a small model's layer."""
GPU_SHAPES = ((4096, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (16384, 8192, 8192))
TOKENS, GROUPS, QUERIES, HEAD_DIM = 512, 3, 3, 64
COPIED_BYTES = 64 * 2**20
CACHED_BYTES = 128 * 2**20
"""More than what the caches of a process's share of a CPU hold."""
SIZES = (16 * 2**10, 256 * 2**10, 4 * 2**20)
LONG_ENOUGH_S = 0.25
FEWEST, MOST = 3, 200
ROUNDS, COMPUTED = 3, 100
LEAST_S = 1e-6
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def median_s(work: Callable[[], object], wait: Callable[[], object], repeats: int = 0) -> float:
    """Median seconds of ``work``, after one that does not count: as often as fits into a quarter of a second, or
    ``repeats`` times (which all ranks of a collective must agree on)."""
    work()
    wait()
    taken: list[float] = []
    while len(taken) < (repeats or MOST):
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
        if not repeats and len(taken) >= FEWEST and sum(taken) > LONG_ENOUGH_S:
            break
    return statistics.median(taken)


def measure_pace(threads: int, device: str) -> Pace:
    """What this rank achieves while all ranks do the same."""
    torch.set_num_threads(threads)
    place, wait = _place(device)
    products, shares = {}, {}
    for name, dtype in PRECISIONS.items():
        dist.barrier()
        products[name] = _product_rate(dtype, place, wait, GPU_SHAPES if device == "cuda" else SHAPES)
        if device == "cpu":
            shares[name] = _shares(dtype, products[name])
    dist.barrier()
    attention = _attention_rate(place, wait)
    dist.barrier()
    source = torch.ones(COPIED_BYTES // 4, device=place)
    target = torch.empty_like(source)
    memory = 2 * COPIED_BYTES / median_s(lambda: target.copy_(source), wait)
    return Pace(threads, products, attention, memory, shares=shares)


def _place(device: str) -> tuple[torch.device, Callable[[], object]]:
    """Where this rank computes, and how it waits until that is done."""
    if device == "cpu":
        return torch.device("cpu"), lambda: None
    place = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(place)
    return place, torch.cuda.synchronize


def _shares(dtype: torch.dtype, rate: float) -> tuple[tuple[int, float], ...]:
    """Of products of fewer tokens, what they reach of the rate."""
    found = []
    for tokens in FEWER_TOKENS:
        shapes = [(tokens, out, width) for out, width in WIDTHS]
        found.append((tokens, min(1.0, _product_rate(dtype, torch.device("cpu"), lambda: None, shapes) / rate)))
    return *found, (SHAPES[0][0], 1.0)


def _product_rate(
    dtype: torch.dtype, place: torch.device, wait: Callable[[], object], shapes: Sequence[tuple[int, int, int]]
) -> float:
    """FLOP/s over all shapes together, each timed alone; the shapes count alike.

    On a CPU every product has another weight, as in a model: none is in a cache that the one before has left it in.
    """
    from parallel.fused import product

    beyond = CACHED_BYTES if place.type == "cpu" else 0
    slowness = []
    for tokens, out, width in shapes:
        rows = torch.ones(tokens, width, dtype=dtype, device=place)
        size = out * width * dtype.itemsize
        weights = itertools.cycle(torch.ones(max(1, beyond // size), out, width, dtype=dtype, device=place))
        slowness.append(median_s(lambda: product(rows, next(weights).t()), wait) / (2 * tokens * out * width))  # noqa: B023
    return len(slowness) / sum(slowness)


def _attention_rate(place: torch.device, wait: Callable[[], object]) -> float:
    """FLOP/s of a row's scores and values, of what causality leaves of them."""
    from parallel.fused_attention import causal_attention  # imports megatron-core, which only ranks need

    heads = torch.ones(TOKENS, 1, GROUPS, QUERIES + 2, HEAD_DIM, device=place)
    angles = torch.ones(TOKENS, HEAD_DIM, device=place)
    operations = 2 * TOKENS * (TOKENS + 1) / 2 * 2 * GROUPS * QUERIES * HEAD_DIM
    return operations / median_s(lambda: causal_attention(heads, angles), wait)


def measure_messages(device: str) -> list[Message]:
    """All-reduces, all-gathers, all-to-alls and sends to a neighbour, over all ranks, by size.

    On a CPU ranks compute a little before each: one that waits gives its core away, and is woken late where all are
    busy. What the computing takes alone, on as many ranks, is not counted.
    """
    place, wait = _place(device)
    group = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
    between = _computing(group) if device == "cpu" else _Between(lambda: None, 0.0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for size in SIZES:
        count = size // 4 // ranks * ranks
        whole, other = (torch.ones(count, device=place) for _ in range(2))
        part = torch.ones(count // ranks, device=place)
        moved, hops, repeats = count * 4 * (ranks - 1) / ranks, ranks - 1, 12 if size < 2**20 else 6

        def send() -> None:
            ends = ((dist.isend, whole, (rank + 1) % ranks), (dist.irecv, other, (rank - 1) % ranks))  # noqa: B023
            for one in dist.batch_isend_irecv([dist.P2POp(op, data, peer, group) for op, data, peer in ends]):
                one.wait()

        works: list[tuple[Callable[[], object], float, int]] = [
            (lambda: dist.all_reduce(whole, group=group), 2 * moved, 2 * hops),  # noqa: B023
            (lambda: dist.all_gather_into_tensor(whole, part, group=group), moved, hops),  # noqa: B023
            (lambda: dist.all_to_all_single(other, whole, group=group), moved, hops),  # noqa: B023
            (send, count * 4, 1),
        ]
        for work, bytes_moved, messages in works:
            dist.barrier()

            def both(work: Callable[[], object] = work) -> None:
                between.compute()
                work()

            taken = mean_s(both, wait, repeats) if device == "cpu" else median_s(work, wait, repeats)
            found.append(Message(bytes_moved, messages, max(taken - between.seconds, LEAST_S)))
    return found


@dataclass(frozen=True)
class _Between:
    """What a rank computes between two messages, and how long it takes while all ranks do."""

    compute: Callable[[], object]
    seconds: float


def _computing(group: dist.ProcessGroup | None) -> _Between:
    tokens, out, width = BETWEEN
    rows, weight = torch.ones(tokens, width), torch.ones(out, width)

    def compute() -> None:
        rows @ weight.t()

    dist.barrier(group)
    return _Between(compute, mean_s(compute, lambda: None, COMPUTED))


def mean_s(work: Callable[[], object], wait: Callable[[], object], repeats: int) -> float:
    """Mean seconds of ``work``, after one that does not count: waiting for a core is part of it, now and then.

    Of some rounds the median, so that a moment of other work on the machine does not count.
    """
    work()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        rounds.append((time.perf_counter() - start) / repeats)
    return statistics.median(rounds)
