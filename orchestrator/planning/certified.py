"""Which layouts the shipped certificate covers: every two features of a plan have been green together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

from orchestrator.config.job import JobConfig
from orchestrator.planning.plan import Plan

SHIPPED = Path(__file__).resolve().parent / "certified.json"
AXES = ("tp", "pp", "dp", "cp", "ep", "etp")

Pair = tuple[str, str]


def pairs(features: Iterable[str]) -> set[Pair]:
    """Every two of some features, and each with itself.

    Example:
        >>> sorted(pairs(["tp", "sp"]))
        [('sp', 'sp'), ('sp', 'tp'), ('tp', 'tp')]
    """
    chosen = sorted(set(features))
    return {*combinations(chosen, 2), *((one, one) for one in chosen)}


def plan_features(job: JobConfig, plan: Plan) -> list[str]:
    """What a plan uses: the axes that are larger than 1, and what is switched on."""
    asked = {
        "sp": plan.sp,
        "vpp": (plan.vpp or 1) > 1,
        "ulysses": plan.topology.cp > 1 and plan.cp_comm == "ulysses",
        "distributed": plan.distributed,
        "recompute": plan.recompute == "full",
    }
    axes = [axis for axis in AXES if getattr(plan.topology, axis) > 1]
    return axes + [feature for feature, is_asked in asked.items() if is_asked]


def tuner_name(job: JobConfig) -> str:
    """The row of the grid that a job's tuner belongs to."""
    tuner = job.tuner
    if tuner.name == "full":
        return "galore" if job.optimizer.name == "galore" else "full"
    special = {"dora": tuner.dora, "pissa": tuner.init == "pissa", "qlora": tuner.quantise is not None}
    return next((name for name, is_asked in special.items() if is_asked), "lora")


def uncovered(job: JobConfig, plan: Plan, family: str) -> list[Pair] | None:
    """Pairs of a plan's features that the shipped certificate has no green cell for; None: not even the tuner."""
    rows = shipped().get(family, {})
    known = rows.get(tuner_name(job))
    if known is None:
        return None
    return sorted(pairs(plan_features(job, plan)) - {(one, other) for one, other in known})


def shipped() -> dict[str, dict[str, list[list[str]]]]:
    """The pairs that are green, by family and tuner."""
    if not SHIPPED.is_file():
        return {}
    value: dict[str, dict[str, list[list[str]]]] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return value


def with_family(family: str, green: Mapping[str, set[Pair]]) -> str:
    """The text of ``certified.json`` with a family's pairs, by tuner, put in; other tuners keep theirs."""
    rows = {tuner: sorted([one, other] for one, other in covered) for tuner, covered in green.items()}
    before = shipped()
    return json.dumps(before | {family: before.get(family, {}) | rows}, indent=0, sort_keys=True) + "\n"


def warning(job: JobConfig, plan: Plan, family: str) -> str:
    """What to tell the user of a plan that the shipped certificate does not cover; empty when it does, or none is."""
    if not SHIPPED.is_file():
        return ""
    missing, tuner = uncovered(job, plan, family), tuner_name(job)
    if missing is None:
        return f"not certified: {tuner} on {family} (isotrain certify with the same model shows whether it holds)"
    if not missing:
        return ""
    words = ", ".join(one if one == other else f"{one} with {other}" for one, other in missing)
    return f"not certified: {tuner} on {family} with {words} (isotrain certify shows whether it holds)"
