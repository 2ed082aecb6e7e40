"""Show: a plan for a terminal, and for machines."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.config.job import ClusterConfig, JobConfig
from orchestrator.planning.advice import Advice
from orchestrator.planning.goals import GOALS, is_built
from orchestrator.planning.memory import GIB
from orchestrator.planning.plan import Plan
from orchestrator.planning.search import FLOOR
from parallel.specs import ModelSpec

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MOST_TOPOLOGIES = 4
"""How many topologies are named for one reason; the rest are counted."""
MOST_REASONS = 12
"""How many reasons are shown; the rest are counted."""


def batch_arithmetic(plan: Plan) -> str:
    """How the global batch is split: ``8 sequences = 2 dp x 2 micro-batches x 2``."""
    rows = "sequences" if GOALS[plan.objective].row_sequences == 1 else "pairs"
    split = f"{plan.topology.dp} dp x {plan.micro_batches} micro-batches x {plan.micro_sequences}"
    empty = f", {plan.empty_micro_batches} of them empty" if plan.empty_micro_batches else ""
    return f"{plan.global_sequences} {rows} = {split}{empty}"


def group_rejected(plan: Plan) -> list[tuple[str, list[str]]]:
    """The rejected topologies by reason, the reason with most topologies first.

    All slower ones are together, the fastest of them first; and all that need too much memory, the smallest first.

    Returns:
        Pairs of a reason and the topologies that it is against.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for one in sorted(plan.rejected, key=lambda one: (one.step_s, one.needs_bytes)):
        if one.step_s:
            words = "at least " if FLOOR in one.reason else ""
            groups["slower"].append(f"{one.topology} ({words}{one.step_s:.3g} s)")
        elif one.needs_bytes:
            groups["more memory than there is, at its thriftiest"].append(
                f"{one.topology} ({one.needs_bytes / GIB:.1f} GiB)"
            )
        else:
            groups[one.reason].append(one.topology)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def plan_summary(plan: Plan, job: JobConfig, model: ModelSpec, advice: Advice | None = None) -> dict[str, Any]:
    """The plan as one JSON object: all of plan.json, and what the terminal shows beside it."""
    told = {"advice": asdict(advice)} if advice else {}
    return told | {
        **json.loads(plan.to_json()),
        "batch": batch_arithmetic(plan),
        "is_built": is_built(plan.objective),
        "model": {"path": job.model.path, **asdict(model)},
        "memory_gib_per_rank": [round(stage.total / GIB, 3) for stage in plan.memory],
        "estimated_step_s": plan.step_time.total_s,
        "expected_step_s": plan.expected_step_s,
    }


def _nodes(cluster: ClusterConfig) -> str:
    return f"{cluster.fewest_nodes} to {cluster.nodes}" if cluster.fewest_nodes else str(cluster.nodes)


def plan_facts(plan: Plan, job: JobConfig, model: ModelSpec) -> dict[str, str]:
    """What runs, by name."""
    idle = f", {plan.ranks_idle} idle" if plan.ranks_idle else ""
    moe = f", {model.experts} experts" if model.is_moe else ""
    kind = "dora" if job.tuner.dora else "lora"
    kind += f" on {job.tuner.quantise}" if job.tuner.quantise else ""
    tuner = f"{kind} r={job.tuner.r}" if job.tuner.name == "lora" else job.tuner.name
    tuner += f", galore r={job.optimizer.galore.rank}" if job.optimizer.name == "galore" else ""
    goal = {} if plan.objective == "sft" else {"learns": GOALS[plan.objective].words(job.tuner.name != "full")}
    padded = f", padded to multiples of {plan.length_multiple}" if plan.length_multiple > 1 else ""
    return {
        "model": f"{job.model.path or model.family} ({model.layers} layers, hidden {model.hidden}{moe}), {tuner}",
        **goal,
        "cluster": f"{job.cluster.name}: {_nodes(job.cluster)} x {job.cluster.gpus_per_node} {plan.device} ranks",
        "topology": f"{plan.topology}{_switches(plan)} = {plan.ranks_used} ranks{idle}",
        "batch": batch_arithmetic(plan) + (", which a run tries out" if len(plan.micro_choices) > 1 else ""),
        "rows": f"at most {plan.sequence_tokens} tokens{' a sequence' if goal else ''}{padded}",
        "runs on": f"{plan.engine}, {plan.precision}, recompute {plan.recompute}",
    }


def render(plan: Plan, job: JobConfig, model: ModelSpec, advice: Advice | None = None) -> Group:
    """The plan for a terminal: topology, batch split, memory, reasons and what was rejected.

    Returns:
        A rich renderable.
    """
    from rich.console import Group
    from rich.text import Text

    lines = [Text(f"{name:<10}{text}") for name, text in plan_facts(plan, job, model).items()]
    reasons = [Text(f"  {reason}") for reason in plan.reasons]
    groups = group_rejected(plan)
    rejected = [Text(f"  {_named(topologies)}: {reason}") for reason, topologies in groups[:MOST_REASONS]]
    if len(groups) > MOST_REASONS:
        rejected.append(Text(f"  and {len(groups) - MOST_REASONS} more reasons (--json has them all)"))
    parts: list[Text | Table] = [*lines, Text(""), _memory_table(plan), Text(""), _time_table(plan, advice)]
    if advice:
        parts += [Text(""), *(Text(line) for line in advice_lines(advice))]
    parts += [Text(""), Text("why", style="bold"), *reasons]
    if rejected:
        parts += [Text(""), Text("rejected", style="bold"), *rejected]
    return Group(*parts)


def _switches(plan: Plan) -> str:
    """What of a layout no axis says, as far as it is on."""
    chosen = {
        "sp": plan.sp,
        f"vpp={plan.vpp}": (plan.vpp or 1) > 1,
        plan.cp_comm: plan.topology.cp > 1,
        "distributed optimizer": plan.distributed,
    }
    return "".join(f" {name}" for name, is_on in chosen.items() if is_on)


def advice_lines(advice: Advice) -> list[str]:
    """What a plan achieves and what else there is, as lines of text."""
    lines = [f"speed     {advice.tokens_per_s_per_rank:,.0f} tokens/s per rank"]
    if advice.utilisation:
        lines[0] += f", {advice.utilisation:.0%} of the device's peak (MFU), give or take {advice.error:.0%}"
    lines.append(f"limit     {advice.limit}")
    if advice.fewest:
        step_s = advice.fewest.step_time.total_s
        lines.append(f"fewest    {advice.fewest.ranks} ranks work: {advice.fewest.typed} ({step_s:.3g} s per step)")
    if advice.faster:
        lines.append(f"faster    {advice.faster.typed} (an estimated {advice.faster.step_time.total_s:.3g} s per step)")
    if advice.next_best:
        most = max(stage.total for stage in advice.next_best.memory) / GIB
        lines.append(
            f"next best {advice.next_best.topology}: {advice.next_best.step_time.total_s:.3g} s per step, "
            f"{most:.1f} GiB on the fullest rank ({advice.next_best.typed})"
        )
    return [*lines, f"layouts   {advice.layouts} considered"]


def _named(topologies: list[str]) -> str:
    more = len(topologies) - MOST_TOPOLOGIES
    return "; ".join(topologies[:MOST_TOPOLOGIES]) + (f"; and {more} more" if more > 0 else "")


def _time_table(plan: Plan, advice: Advice | None) -> Table:
    """Estimated seconds per step: a row for the plan and the next best, a column per cause."""
    from rich.table import Table

    table = Table(title="estimated seconds per step", title_justify="left", box=None, pad_edge=False)
    rows = {"plan": plan.step_time} | ({"next best": advice.next_best.step_time} if advice and advice.next_best else {})
    causes = [cause for cause in asdict(plan.step_time) if any(getattr(time, cause) for time in rows.values())]
    for name in ("", *(cause.removesuffix("_s") for cause in causes), "total"):
        table.add_column(name, justify="right" if name else "left")
    for name, time in rows.items():
        table.add_row(name, *(f"{getattr(time, cause):.3g}" for cause in causes), f"{time.total_s:.3g}")
    return table


def _memory_table(plan: Plan) -> Table:
    """Estimated memory per rank: a row per stage, a column per owner."""
    from rich.table import Table

    table = Table(title="estimated MiB per rank", title_justify="left", box=None, pad_edge=False)
    owners = [owner for owner in asdict(plan.memory[0]) if owner != "reference" or plan.objective != "sft"]
    for name in ("stage", "layers", *owners, "total"):
        table.add_column(name, justify="right")
    for stage, memory in enumerate(plan.memory):
        layers = sum(len(chunk) for chunk in plan.stages[stage :: plan.topology.pp])
        sizes = [*(getattr(memory, owner) for owner in owners), memory.total]
        table.add_row(str(stage), str(layers), *(f"{size / 2**20:,.0f}" for size in sizes))
    return table
