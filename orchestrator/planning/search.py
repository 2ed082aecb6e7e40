"""Search: of each topology the settings that make its step shortest, weighed one by one; of all topologies the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config.job import TopologyConfig
from orchestrator.planning.candidates import (
    Candidate,
    Question,
    Rejected,
    length_multiple,
    open_topologies,
    plainest,
    refusals_of,
    set_up,
    stages_of,
)
from orchestrator.planning.memory import GIB, fits, fullest
from orchestrator.planning.setup import Setup
from orchestrator.planning.timing import LayerCosts, layer_costs, step_time
from parallel.capabilities import Proposal, batch_refusals, divisors, model_refusals
from parallel.topology import Topology, TopologyError

MOST_CHUNKS = 12
"""Virtual chunks per stage, where ``topology.vpp`` is open (Megatron-LM's own recipes have 12 at most)."""
NO_FASTER = {"cuda": 1.01, "cpu": 1.25}
"""Settings that are slower by less than this are preferred where they are plainer: the estimate is not that good. On a
CPU, whose processes share cores and memory, it is rougher."""
ALIKE = {"cuda": 1.04, "cpu": 1.0}
"""Topologies whose estimates differ by less are alike, and the one with the fewest stages is taken: measured twice, one
configuration differs by 4 to 6 %, and more is left out of a pipeline's estimate than of others'. On a CPU stages save
memory that processes share."""

FLOOR = "at least"
"""How the reason says that a slower topology's settings were not searched, for its floor was too high already."""


@dataclass(frozen=True)
class Found:
    """The fastest topologies with their best settings, the fastest first; the others with their reasons.

    ``considered``: layouts that were weighed, topologies with their settings.
    """

    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    considered: int


@dataclass(frozen=True)
class _Topology:
    """A topology that can run, before its settings are searched. ``floor_s``: what no setting is faster than;
    ``needs_bytes``: what its fullest rank needs at least."""

    asked: TopologyConfig
    thrifty: Proposal
    setup: Setup
    floor_s: float
    needs_bytes: int


def search(question: Question) -> Found:
    """Judge every topology that a job leaves open, the most promising first.

    A topology whose floor is above the second best step found is not searched further. The two best have the plainest
    settings of their kind.
    """
    judge = Judge(question)
    judged = [judge.entry(sizes) for sizes in open_topologies(question)]
    rejected = [one for one in judged if isinstance(one, Rejected)]
    found: list[Candidate] = []
    alike = ALIKE[question.cluster.device]
    for entry in sorted((one for one in judged if isinstance(one, _Topology)), key=lambda one: one.floor_s):
        if len(found) > 1 and entry.floor_s > found[1].time.total_s and entry.floor_s > alike * found[0].time.total_s:
            rejected.append(_slower(entry.thrifty, entry.floor_s, entry.needs_bytes, FLOOR))
            continue
        best = judge.settings(entry)
        if best is None:
            rejected.append(judge.too_large(entry.setup, entry.thrifty))
            continue
        found.append(best)
        found.sort(key=lambda one: (one.time.total_s, one.proposal.topology.tp, one.proposal.topology.pp))
    found = _fewest_stages_first(found, alike)
    slower = [_slower(one.proposal, one.time.total_s, fullest(one.setup)[1].total, "an estimated") for one in found[1:]]
    return Found(tuple(map(judge.settled, found[:2])), (*slower, *rejected), judge.considered)


def _fewest_stages_first(found: list[Candidate], alike: float) -> list[Candidate]:
    """Of those that are alike with the fastest the one with the fewest stages, then all others, the fastest first."""
    near = [one for one in found if one.time.total_s <= alike * found[0].time.total_s]
    best = min(near, key=lambda one: one.proposal.topology.pp, default=None)
    return [one for one in found if one is best] + [one for one in found if one is not best]


def _slower(proposal: Proposal, step_s: float, needs_bytes: int, words: str) -> Rejected:
    reason = f"slower: {words} {step_s:.3g} s per step"
    return Rejected(str(proposal.topology), reason, needs_bytes=needs_bytes, step_s=step_s)


class KnownCosts:
    """Costs of layers of one model on one kind of cluster, estimated once for all layouts that share them."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], LayerCosts] = {}

    def of(self, setup: Setup) -> LayerCosts:
        """The costs of a setup's layers."""
        cut = (setup.tp, setup.cp, setup.ep, setup.etp, setup.sp, setup.cp_comm)
        key = (*cut, setup.micro, setup.recompute)
        if key not in self._known:
            self._known[key] = layer_costs(setup)
        return self._known[key]


def floor(setup: Setup, costs: KnownCosts) -> float:
    """Seconds that no micro-batch and no virtual chunks are faster than: layers at the largest micro-batch, whose time
    per row is the shortest, and the other stages' row, divided by the most chunks."""
    rows = setup.micro_batches * setup.micro
    found = costs.of(replace(setup, micro=rows, cp_comm="ring"))
    row_s = {}
    for kind, layer in found.layers.items():
        talk = found.talks[kind][0] + found.talks[kind][2]
        row_s[kind] = ((layer.forward + layer.backward + layer.again).total + talk) / rows
    stages = [
        (sum(row_s[kind] * layers for kind, layers in setup.kinds_by_stage[stage].items() if layers), count)
        for stage, count in setup.distinct
    ]
    slowest = max(one for one, _ in stages)
    others = sum(one * count for one, count in stages) - slowest
    return rows * slowest + max(0.0, others) / max(MOST_CHUNKS, setup.vpp)


class Judge:
    """Weighs layouts of one question; layers that layouts share are estimated once.

    ``considered``: how many layouts (a topology with its settings) it has looked at.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.considered = 0
        self._costs = KnownCosts()

    def runs(self, asked: TopologyConfig) -> bool:
        """Whether a topology is legal and fits with some settings."""
        return isinstance(self.entry(asked), _Topology)

    def entry(self, asked: TopologyConfig) -> _Topology | Rejected:
        """A topology whose sizes are all given, with the settings that need least memory; or why it cannot run."""
        self.considered += 1
        sizes = {axis: getattr(asked, axis) or 1 for axis in ("pp", "dp", "cp", "tp", "ep", "etp")}
        try:
            topology = Topology(**sizes)
        except TopologyError as error:
            return Rejected(" ".join(f"{axis}={size}" for axis, size in sizes.items()), str(error), error.hint)
        plain = plainest(self.question, topology, asked)
        if found := refusals_of(self.question, plain):
            return Rejected(str(topology), found[0].message, found[0].hint)
        thrifty = self._thriftiest(plain, asked)
        setup = set_up(self.question, thrifty)
        _, needs = fullest(setup)
        if needs.total > self._capacity:
            return self.too_large(setup, thrifty)
        recompute = self.question.job.memory.recompute or "none"
        lavish = replace(setup, recompute=recompute)
        floor_s = floor(lavish if fits(lavish, self._capacity) else setup, self._costs)
        return _Topology(asked, thrifty, setup, floor_s, needs.total)

    def settings(self, entry: _Topology) -> Candidate | None:
        """The fastest settings of a topology; what the job fixes stays. None: nothing fits."""
        found = [one for layout in self._layouts(entry) if (one := self._fastest(layout))]
        return min(found, key=lambda one: one.time.total_s, default=None)

    def settled(self, best: Candidate) -> Candidate:
        """The same topology with settings that are plainer and not slower, to speak of: what is open is off again."""
        job, moe = self.question.job, self.question.model.is_moe
        most_s = NO_FASTER[self.question.cluster.device] * best.time.total_s
        sizes, topology = job.topology, best.proposal.topology
        changes: list[dict[str, Any]] = []
        if job.optimizer.distributed is None:
            changes.append({"distributed": False})
        if sizes.sp is None:
            changes.append({"sp": moe and topology.tp > 1})
        if sizes.cp_comm is None:
            changes.append({"cp_comm": "ring"})
        if sizes.vpp is None:
            changes.append({"vpp": None})
        changes += [{"micro_sequences": micro} for micro in self._micro_sizes(best.proposal)]
        found = best
        for change in changes:
            proposal = replace(found.proposal, **change)
            if proposal == found.proposal or proposal.micro_sequences > found.proposal.micro_sequences:
                continue
            one = self._weighed(set_up(self.question, proposal), proposal)
            if one and one.time.total_s <= most_s:
                found = one
        return found

    @property
    def _capacity(self) -> float:
        return self.question.cluster.memory_gib * GIB

    def _thriftiest(self, plain: Proposal, asked: TopologyConfig) -> Proposal:
        """What needs the least memory of all settings; the optimizer's part is the fastest too."""
        job, topology = self.question.job, plain.topology
        is_open = job.optimizer.distributed is None and job.optimizer.name == "adamw"
        return replace(
            plain,
            sp=topology.tp > 1 if asked.sp is None else plain.sp,
            recompute=job.memory.recompute or "full",
            distributed=topology.dp * topology.cp > 1 if is_open else plain.distributed,
        )

    def _layouts(self, entry: _Topology) -> Iterator[Proposal]:
        """A topology with every open ``vpp`` and ``cp_comm``."""
        thrifty, asked = entry.thrifty, entry.asked
        model, topology = self.question.model, thrifty.topology
        chunks = self._chunk_sizes(thrifty) if asked.vpp is None and topology.pp > 1 else [thrifty.vpp]
        kinds = [thrifty.cp_comm]
        ulysses = replace(thrifty, cp_comm="ulysses")
        if asked.cp_comm is None and topology.cp > 1 and not model_refusals(model, ulysses):
            kinds.append("ulysses")
        for vpp in chunks:
            for kind in kinds:
                yield replace(thrifty, vpp=vpp, cp_comm=kind)

    def _chunk_sizes(self, proposal: Proposal) -> list[int | None]:
        """None, and what cuts the stages evenly; where nothing does, two. Not on a CPU: its processes share cores, and
        one that waits leaves them to the others."""
        if self.question.cluster.device == "cpu":
            return [None]
        layers, pp = self.question.model.layers, proposal.topology.pp
        even = [size for size in range(2, MOST_CHUNKS + 1) if layers % (pp * size) == 0]
        sizes = even or ([2] if layers >= 2 * pp else [])
        return [None, *(size for size in sizes if not batch_refusals(replace(proposal, vpp=size)))]

    def _micro_sizes(self, proposal: Proposal) -> list[int]:
        """Open micro-batches, ascending: what divides a rank's rows, and leaves rounds where chunks need them."""
        if self.question.job.batch.micro:
            return [proposal.micro_sequences]
        return micro_sizes(proposal)

    def _fastest(self, layout: Proposal) -> Candidate | None:
        """The micro-batch of a layout with which its step is shortest: the first that the next is slower than."""
        base, best = set_up(self.question, layout), None
        for micro in self._micro_sizes(layout):
            one = self._weighed(base, replace(layout, micro_sequences=micro))
            if one is None or (best and one.time.total_s >= best.time.total_s):
                break  # a larger one needs more memory still
            best = one
        return best

    def _weighed(self, base: Setup, proposal: Proposal) -> Candidate | None:
        """A legal layout with its time, and with the least of open recompute that fits; None: nothing does."""
        asked = self.question.job.memory.recompute
        for recompute in [asked] if asked else ["none", "full"]:
            self.considered += 1
            setup = replace(base, micro=proposal.micro_sequences, recompute=recompute)
            if fits(setup, self._capacity):
                time = step_time(setup, costs=self._costs.of(setup))
                proposal = replace(proposal, recompute=recompute)
                stages = stages_of(self.question, proposal)
                return Candidate(proposal, setup, stages, length_multiple(proposal), time)
        return None

    def too_large(self, setup: Setup, proposal: Proposal) -> Rejected:
        """The topology does not fit the memory, with the numbers of its fullest rank."""
        stage, needs = fullest(setup)
        owner, capacity = needs.largest, self.question.cluster.memory_gib
        reason = (
            f"stage {stage} needs {needs.total / GIB:.1f} GiB per rank ({owner} {getattr(needs, owner) / GIB:.1f} "
            f"GiB), but cluster.memory_gib={capacity:g}"
        )
        return Rejected(str(proposal.topology), reason, needs_bytes=needs.total)


def micro_sizes(proposal: Proposal) -> list[int]:
    """The micro-batches that a layout allows, ascending: what divides the batch and gives no rank more rows than single
    rows would, in rounds where chunks need them.

    Example:
        >>> micro_sizes(Proposal(Topology(dp=2), global_sequences=12))
        [1, 2, 3, 6]
        >>> micro_sizes(Proposal(Topology(dp=3), global_sequences=10))
        [1, 2]
    """
    fullest = -(-proposal.global_sequences // proposal.topology.dp)  # rows of the rank that has most
    every = [replace(proposal, micro_sequences=size) for size in divisors(fullest)]
    return [one.micro_sequences for one in every if not batch_refusals(one)]
