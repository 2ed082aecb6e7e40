"""Pipeline: which pass of which micro-batch each stage runs when, under 1F1B and its interleaved form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from orchestrator.planning.plan import Plan
from orchestrator.planning.timing import StagePass


@dataclass(frozen=True)
class Pass:
    """One micro-batch going through one chunk of a stage. ``chunk``: the stage's virtual chunk, 0 first."""

    micro_batch: int
    chunk: int
    forward: bool
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The passes of an optimizer step, of each stage in its order; ``end_s``: when the last one ends."""

    stages: tuple[tuple[Pass, ...], ...]
    end_s: float

    def idle_s(self, stage: int) -> float:
        """How long a stage waits."""
        return self.end_s - sum(one.end_s - one.start_s for one in self.stages[stage])

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they wait."""
        return sum(map(self.idle_s, range(len(self.stages)))) / (self.end_s * len(self.stages))


def stage_order(pp: int, stage: int, micro_batches: int, vpp: int = 1) -> list[tuple[bool, int, int]]:
    """What a stage runs, in order: whether forward, the micro-batch, the chunk.

    Narayanan et al. 2021 (arXiv:2104.04473), section 2.2; with chunks, micro-batches go in rounds of ``pp``, as in
    megatron-core, where the number of forward passes before the first backward is from.

    Example:
        >>> [("F" if forward else "B") + str(micro) for forward, micro, _ in stage_order(2, 0, 3)]
        ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    rounds = range(0, micro_batches, pp)
    forward = [
        (True, micro, chunk)
        for first in rounds
        for chunk in range(vpp)
        for micro in range(first, min(first + pp, micro_batches))
    ]
    backward = [(False, micro, vpp - 1 - chunk) for _, micro, chunk in forward]
    ahead = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    ahead = min(ahead, len(forward))
    pairs = zip(forward[ahead:], backward, strict=False)
    return [*forward[:ahead], *chain.from_iterable(pairs), *backward[len(forward) - ahead :]]


def run_schedule(
    micro_batches: int, passes: Sequence[StagePass], chunk_shares: Sequence[Sequence[float]] = ()
) -> Timeline:
    """Run every stage's order as early as what it waits for allows; sends take no time.

    Args:
        passes: what each stage needs for a micro-batch, over all its chunks.
        chunk_shares: for each stage the share of that in each of its chunks; empty: one chunk.
    Example:
        >>> run_schedule(2, [StagePass(1.0, 2.0)] * 2).end_s
        9.0
    """
    pp, vpp = len(passes), len(chunk_shares[0]) if chunk_shares else 1
    orders = [stage_order(pp, stage, micro_batches, vpp) for stage in range(pp)]
    done: dict[tuple[bool, int, int], float] = {}
    clocks: list[float] = [0.0] * pp
    found: list[list[Pass]] = [[] for _ in range(pp)]
    waiting = set(range(pp))
    while waiting:
        for stage in sorted(waiting):
            while len(found[stage]) < len(orders[stage]):
                forward, micro, chunk = orders[stage][len(found[stage])]
                position = chunk * pp + stage
                before = _awaited(forward, micro, position, pp * vpp)
                if before is not None and before not in done:
                    break
                start = max(clocks[stage], done[before] if before else 0.0)
                share = chunk_shares[stage][chunk] if chunk_shares else 1.0
                took = (passes[stage].forward_s if forward else passes[stage].backward_s) * share
                clocks[stage] = done[forward, micro, position] = start + took
                found[stage].append(Pass(micro, chunk, forward, start, start + took))
            else:
                waiting.discard(stage)
    return Timeline(tuple(map(tuple, found)), max(clocks))


def _awaited(forward: bool, micro: int, position: int, positions: int) -> tuple[bool, int, int] | None:
    """The pass that must have ended before: of the chunk before, going forward; of the next one, coming back."""
    if forward:
        return (True, micro, position - 1) if position else None
    return (False, micro, position + 1) if position < positions - 1 else (True, micro, position)


def plan_timeline(plan: Plan) -> Timeline | None:
    """The timeline of a plan's step, without the optimizer and what ranks of one stage tell each other after it.

    None where there is no pipeline, or where the plan does not tell its stages' times.
    """
    if plan.topology.pp == 1 or not plan.passes:
        return None
    return run_schedule(plan.micro_batches, plan.passes, list(_chunk_shares(plan)))


def _chunk_shares(plan: Plan) -> Iterator[list[float]]:
    for stage in range(plan.topology.pp):
        layers = [len(chunk) for chunk in plan.stages[stage :: plan.topology.pp]]
        yield [count / max(1, sum(layers)) for count in layers]
