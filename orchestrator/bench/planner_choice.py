"""Choice: whether the planner, told only model, machine and batch, would have been content with a published layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from orchestrator.bench.planner_rows import Unreadable, setup_of_row, stage_sizes
from orchestrator.bench.planner_score import ODD, SWEEPS, Score, capacity_of
from orchestrator.planning.candidates import SHORTEST_PART
from orchestrator.planning.memory import fits
from orchestrator.planning.search import MOST_CHUNKS, KnownCosts, floor
from orchestrator.planning.setup import Setup
from orchestrator.planning.timing import StepTime, step_time
from parallel.capabilities import divisors

CLOSE = 1.10
"""A published layout is held if its estimated step is at most so many times the best one's."""


@dataclass(frozen=True)
class Choice:
    """A published layout against the planner's own best, both by its estimate, seconds by cause.

    ``fits``: whether the published one, which ran, fits by the estimate of its memory, as the best has to.
    """

    row: str
    group: str
    published: str
    best: str
    published_s: dict[str, float]
    best_s: dict[str, float]
    fits: bool

    @property
    def ratio(self) -> float:
        """Estimated step of the published layout / of the best one."""
        return sum(self.published_s.values()) / sum(self.best_s.values())

    @property
    def is_held(self) -> bool:
        """Whether the published layout is about as good as the best."""
        return self.ratio <= CLOSE


def choices(rows: Iterable[dict[str, Any]]) -> list[Choice]:
    """One choice for each published configuration of quality A outside of the sweeps that can be estimated."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row.get("quality") == "A" and row.get("group") not in SWEEPS:
            first.setdefault((str(row.get("group")), str(row.get("config_key") or row.get("id"))), row)
    found = []
    for row in first.values():
        try:
            found.append(_choice(row, setup_of_row(row)))
        except (Unreadable, *ODD):
            continue
    return found


def held(found: Iterable[Choice]) -> Score:
    """The share of published configurations that the planner holds."""
    every = list(found)
    return Score(sum(one.is_held for one in every) / len(every) if every else 0.0, len(every))


def held_by_group(found: Iterable[Choice]) -> dict[str, Score]:
    """The same for each group of sources."""
    every = list(found)
    groups = sorted({one.group for one in every})
    return {group: held(one for one in every if one.group == group) for group in groups}


def _choice(row: dict[str, Any], published: Setup) -> Choice:
    capacity = capacity_of(row, published)
    published, time = _completed(row, published, capacity)
    best, best_time = best_layout(published, capacity)
    return Choice(
        str(row.get("id")),
        str(row.get("group")),
        layout_words(published),
        layout_words(best),
        {cause: seconds for cause, seconds in asdict(time).items() if seconds},
        {cause: seconds for cause, seconds in asdict(best_time).items() if seconds},
        fits(published, capacity),
    )


def _completed(row: dict[str, Any], published: Setup, capacity: float) -> tuple[Setup, StepTime]:
    """The published layout; micro-batch, virtual chunks and etp that were not printed are what the planner would take.

    It ran, so it fits as it is, whatever the estimate of its memory.
    """
    costs, shape = KnownCosts(), published.shape
    every = [published]
    if not row.get("etp") and shape.experts:
        every = [replace(published, etp=etp) for etp in _expert_sizes(published)]
    if not row.get("mbs"):
        micros = divisors(max(1, published.sequences // published.dp))
        every = [replace(one, micro=micro) for one in every for micro in micros]
    if not row.get("vpp") and published.pp > 1:
        every += [replace(one, vpp=size) for one in every for size in _chunk_sizes(one)]
    fitting = [published, *(one for one in every if fits(one, capacity))]
    timed = [(one, step_time(one, costs=costs.of(one))) for one in fitting]
    return min(timed, key=lambda one: one[1].total_s)


def layout_words(setup: Setup) -> str:
    """A layout in short.

    Example:
        >>> from orchestrator.planning.devices import device
        >>> from orchestrator.planning.shape import Shape
        >>> layout_words(Setup(Shape(2, 8, 1, 1, 8, 8, 8), device("H100"), 8, 128, 2, 8, tp=2, dp=4, sp=True, zero=1))
        'tp2 dp4 mbs2 sp zero1'
    """
    sizes = {axis: getattr(setup, axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    words = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] + [f"mbs{setup.micro}"]
    words += ["sp"] * setup.sp + [f"zero{setup.zero}"] * bool(setup.zero)
    return " ".join(words + [setup.recompute] * (setup.recompute != "none"))


def best_layout(published: Setup, capacity: float) -> tuple[Setup, StepTime]:
    """The layout of the same model, machine and batch with the shortest estimated step of those that fit.

    Nothing of the published layout is looked at but the number of its ranks; where nothing fits, it is the best.
    """
    costs = KnownCosts()
    entries = []
    for setup in _topologies(published):
        if fits(setup, capacity):
            lavish = replace(setup, recompute="none")
            entries.append((floor(lavish if fits(lavish, capacity) else setup, costs), setup))
    best, best_time = published, step_time(published)
    entries.sort(key=lambda entry: entry[0])
    for least_s, thrifty in entries:
        if least_s >= best_time.total_s:
            break
        for setup, time in _settings(thrifty, capacity, costs):
            if time.total_s < best_time.total_s:
                best, best_time = setup, time
    return best, best_time


def _topologies(published: Setup) -> Iterator[Setup]:
    """Every legal cut of the ranks, at its thriftiest."""
    shape, ranks = published.shape, published.ranks
    heads = math.gcd(shape.heads, shape.kv_heads)
    most_cp = max(1, published.tokens // SHORTEST_PART)
    for tp in (size for size in divisors(math.gcd(heads, ranks)) if size <= published.domain):
        for pp, cp in product(divisors(ranks // tp), divisors(ranks // tp)):
            dp, rest = divmod(ranks, tp * pp * cp)
            if rest or pp > shape.layers or cp > most_cp or published.sequences % dp:
                continue
            cut = replace(published, tp=tp, pp=pp, cp=cp, dp=dp, vpp=1, stages=stage_sizes(shape.layers, pp))
            thrifty = replace(cut, sp=tp > 1, micro=1, recompute="full", zero=1, shard_ranks=0, offload=False)
            yield from _expert_cuts(thrifty)


def _expert_cuts(setup: Setup) -> Iterator[Setup]:
    """Experts over every number of ranks that divides them, each whole or cut as dense layers are."""
    shape = setup.shape
    if not shape.experts:
        yield replace(setup, ep=1, etp=1)
        return
    for ep in divisors(shape.experts):
        cut = replace(setup, ep=ep)
        yield from (replace(cut, etp=etp) for etp in _expert_sizes(cut))


def _expert_sizes(setup: Setup) -> list[int]:
    """Experts whole, or cut as dense layers are; as far as the ranks of a stage allow."""
    ranks = setup.dp * setup.cp * setup.tp
    legal = [etp for etp in {1, setup.tp} if ranks % (setup.ep * etp) == 0 and setup.shape.expert_ffn % etp == 0]
    return sorted(legal)


def _chunk_sizes(setup: Setup) -> list[int]:
    """Virtual chunks that cut every stage evenly, where micro-batches come in rounds of the stages."""
    if setup.pp == 1 or setup.micro_batches % setup.pp:
        return []
    return [size for size in range(2, MOST_CHUNKS + 1) if setup.shape.layers % (setup.pp * size) == 0]


def _settings(thrifty: Setup, capacity: float, costs: KnownCosts) -> Iterator[tuple[Setup, StepTime]]:
    """Of every number of virtual chunks the micro-batches, as long as larger ones fit and are faster."""
    for vpp in [1, *_chunk_sizes(thrifty)]:
        before = math.inf
        for micro in divisors(thrifty.sequences // thrifty.dp):
            setup = replace(thrifty, micro=micro, vpp=vpp)
            if vpp > 1 and setup.micro_batches % thrifty.pp:
                continue
            fitting = _with_least_recompute(setup, capacity)
            if fitting is None:
                break
            time = step_time(fitting, costs=costs.of(fitting))
            if time.total_s >= before:
                break
            before = time.total_s
            yield fitting, time


def _with_least_recompute(setup: Setup, capacity: float) -> Setup | None:
    for recompute in ("none", "selective", "full"):
        if fits(found := replace(setup, recompute=recompute), capacity):
            return found
    return None
