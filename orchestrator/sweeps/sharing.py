"""Which points of a sweep train together on one frozen base, and what that takes of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.config.job import AUTO, JobConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.memory import GIB, StageMemory
from orchestrator.planning.plan import Plan
from orchestrator.sweeps.planning import PlannedPoint, PlannedSweep


@dataclass(frozen=True)
class Together:
    """Points of one launch; one alone is a run as any other. ``needs_bytes``: of its fullest rank."""

    points: tuple[PlannedPoint, ...]
    needs_bytes: int

    @property
    def numbers(self) -> list[int]:
        """The points' numbers."""
        return [one.point.number for one in self.points]

    @property
    def words(self) -> str:
        """What the user is told of it."""
        apart = sum(needed([_plan(one)], [one]) for one in self.points)
        listed = ", ".join(map(str, self.numbers))
        return (
            f"points {listed} train in turns on one base: {self.needs_bytes / GIB:.2f} GiB a rank "
            f"({apart / GIB:.2f} with a base each)"
        )


def launches(waiting: Sequence[PlannedPoint]) -> list[Together]:
    """Put points that may share a base, and fit with it, into one launch; in the order of their first points.

    They are equal in all that makes the frozen tensors what they are and puts them where they are: model,
    quantisation, precision, topology and stages, cluster. All else is each point's own.
    """
    found: list[list[PlannedPoint]] = []
    for one in waiting:
        for others in found:
            joined = [*others, one]
            if _may_share(others[0], one) and needed([_plan(each) for each in joined], joined) <= _capacity(one):
                others.append(one)
                break
        else:
            found.append([one])
    return [Together(tuple(points), needed([_plan(one) for one in points], points)) for points in found]


def alone_because(job: JobConfig) -> str:
    """Why a job cannot share its base with any other; empty where it can."""
    if job.tuner.name == "full":
        return "tuner.name=full trains the base itself"
    if job.batch.micro_sequences == AUTO:
        return "batch.micro_sequences=auto measures a launch that is one run's alone"
    return ""


def check_sharing(sweep: PlannedSweep) -> None:
    """Refuse a sweep that asks for one base where no two of its points can have one.

    A sweep that goes on may have a single point left, and is not asked.

    Raises:
        ConfigError: names the points and what stands against it.
    """
    asked = [one for one in sweep.waiting if one.job is not None and one.job.sweep.share_base]
    if len(asked) < 2 or len(asked) < sum(one.state != "pruned" for one in sweep.points):
        return
    if any(len(one.points) > 1 for one in launches(asked)):
        return
    reasons: dict[str, list[str]] = {}
    for one in asked:
        reasons.setdefault(alone_because(_job(one)), []).append(str(one.point.number))
    words = [f"{reason} (point {', '.join(numbers)})" for reason, numbers in reasons.items() if reason]
    able = [one for one in asked if not alone_because(_job(one))]
    words += [_between(able[0], able[1])] if len(able) > 1 else []
    raise ConfigError(
        f"sweep.share_base=true, but no two of {len(asked)} points can share a base: {'; '.join(words)}",
        "sweep.share_base=false",
    )


def needed(plans: Sequence[Plan], points: Sequence[PlannedPoint]) -> int:
    """Bytes of the fullest rank: one base, every point's adapter with gradients and moments, one point's activations.

    What a point trains whole beside its adapter (``tuner.modules_to_save``) it has for itself: at most as much as its
    gradients.
    """
    wholes = [one.job is not None and bool(one.job.tuner.modules_to_save) for one in points]
    stages = range(len(plans[0].memory))
    return max(_stage_bytes([plan.memory[stage] for plan in plans], wholes) for stage in stages)


def _stage_bytes(held: Sequence[StageMemory], wholes: Sequence[bool]) -> int:
    if len(held) == 1:
        return held[0].total
    copies = sum(one.gradients for one, whole in zip(held, wholes, strict=True) if whole)
    own = sum(one.adapters + one.gradients + one.optimizer for one in held) + copies
    in_turn = max(one.activations + one.logits + one.buffers for one in held)
    given = max(one.weights for one in held) + own + in_turn
    slack = max(one.slack / max(1, one.allocated) for one in held)
    return int(given * (1 + slack)) + max(one.overhead for one in held)


def _may_share(first: PlannedPoint, second: PlannedPoint) -> bool:
    jobs = (_job(first), _job(second))
    if not all(job.sweep.share_base and not alone_because(job) for job in jobs):
        return False
    return _base(first) == _base(second)


def _base(one: PlannedPoint) -> dict[str, Any]:
    """What points with one base are equal in, by the keys that decide it."""
    job, plan = _job(one), _plan(one)
    seed = {"seed (of random weights)": job.seed} if job.model.weights == "random" else {}
    layout = ("vpp", "sp", "stages", "cp_comm", "device", "ranks_used")
    return {
        "model": asdict(job.model),
        "tuner.quantise": job.tuner.quantise,
        "precision": plan.precision,
        "topology": str(plan.topology),
        **{f"the plan's {name}": getattr(plan, name) for name in layout},
        "cluster": asdict(job.cluster),
        "engine.name": job.engine.name,
        "recovery": asdict(job.recovery),
        **seed,
    }


def _between(first: PlannedPoint, second: PlannedPoint) -> str:
    """Why two points do not share a base."""
    one, other = _base(first), _base(second)
    keys = [key for key in one if one[key] != other.get(key)]
    numbers = f"points {first.point.number} and {second.point.number}"
    if keys:
        return f"{numbers} differ in {', '.join(keys)}"
    together = needed([_plan(first), _plan(second)], [first, second])
    return (
        f"{numbers} need {together / GIB:.2f} GiB per rank together, but cluster.memory_gib={_capacity(first) / GIB:g}"
    )


def _capacity(one: PlannedPoint) -> float:
    cluster = _plan(one).cluster
    return cluster.memory_gib * GIB if cluster is not None else 0.0


def _job(one: PlannedPoint) -> JobConfig:
    assert one.job is not None
    return one.job


def _plan(one: PlannedPoint) -> Plan:
    assert one.planned is not None, "what waits has a plan"
    return one.planned.plan
