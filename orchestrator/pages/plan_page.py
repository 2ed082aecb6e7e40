"""A plan as a page: what runs and why, where ranks sit, when stages wait, what memory and time are for, what else."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.building import job_to_yaml
from orchestrator.config.job import JobConfig
from orchestrator.pages.bars import memory_chart, time_chart
from orchestrator.pages.document import facts, folded, page, section, tiles, words
from orchestrator.pages.drawing import seconds
from orchestrator.pages.frontier import Layout, frontier_chart
from orchestrator.pages.markup import Markup, joined, table, tag
from orchestrator.pages.ranks import rank_grid
from orchestrator.pages.timeline import timeline_chart
from orchestrator.planning.advice import Advice
from orchestrator.planning.memory import GIB
from orchestrator.planning.pipeline import plan_timeline
from orchestrator.planning.plan import Plan
from orchestrator.planning.search import FLOOR
from orchestrator.planning.show import advice_lines, group_rejected, plan_facts
from parallel.specs import ModelSpec

FEW = 3
"""How many topologies are named for one reason; the others are shown when they are asked for, up to ``MANY``."""
MANY = 400
MOST_REASONS = 60


def plan_page(plan: Plan, job: JobConfig, model: ModelSpec, advice: Advice, warning: str = "") -> str:
    """The whole page of a plan; all figures are the plan's and its advice's."""
    name = job.model.path or model.family
    told = plan_facts(plan, job, model)
    advised = [line.split(maxsplit=1) for line in advice_lines(advice) if not line.startswith("next best")]
    reasons = [*plan.reasons, *([warning] if warning else [])]
    return page(
        f"Plan: {name}",
        f"{told['topology']} on {told['cluster']}",
        tiles(list(_tiles(plan, job, advice))),
        section("What runs", "", facts([*told.items()]), half=True),
        section("Why", "", words(reasons), facts([(first, rest) for first, rest in advised]), half=True),
        *plan_sections(plan, job, advice),
        _rejected(plan),
        section("The job", "A job file, for isotrain train FILE.yaml.", folded("show", tag("pre", job_to_yaml(job)))),
    )


def plan_sections(plan: Plan, job: JobConfig, advice: Advice | None) -> Iterator[Markup]:
    """The charts."""
    there = plan.cluster or job.cluster  # the job's may be a range, or to be found out
    grid = rank_grid(plan.topology, there.nodes, there.gpus_per_node)
    yield section("Ranks on nodes", "Each box is a rank: its number and its place along every axis that is cut. "
                  "Colours are pipeline stages; the pointer shows a rank's groups.", grid)  # fmt: skip
    timeline = plan_timeline(plan)
    if timeline is not None:
        note = (
            f"{plan.micro_batches} micro-batches under {'interleaved ' if plan.vpp else ''}1F1B with the plan's times "
            f"of every stage: {seconds(timeline.end_s)}, of which stages wait {timeline.bubble:.1%}. The plan counts "
            f"{seconds(plan.step_time.total_s)} for the step: with sends, reductions and the optimizer."
        )
        yield section("Pipeline", note, timeline_chart(timeline, plan.vpp or 1))
    yield section("Memory", "Estimated for one rank of each stage, at the deepest point of a step.",
                  memory_chart(plan.memory, job.cluster.memory_gib), half=True)  # fmt: skip
    times = [("plan", plan.step_time)]
    note = "Estimated for one step, the slowest stage's."
    if advice and advice.next_best:
        times.append(("next best", advice.next_best.step_time))
        note += (
            f" Thin bars: the next best topology, {advice.next_best.topology}, {seconds(times[1][1].total_s)} per step."
        )
    yield section("Time", note, time_chart(times), half=True)
    chosen, others = layouts_of(plan)
    if others:
        note = (
            f"Each point is a topology with its best settings; {plan.considered:,} layouts were weighed for them. "
            "What is grey was not searched further: its step takes at least so long."
        )
        yield section("Memory against time", note, frontier_chart(chosen, others, job.cluster.memory_gib))


def layouts_of(plan: Plan) -> tuple[Layout, list[Layout]]:
    """The plan, and every topology whose memory was estimated beside it."""
    most = max(stage.total for stage in plan.memory) / GIB
    others = [
        Layout(one.topology, one.step_s, one.needs_bytes / GIB, FLOOR in one.reason)
        for one in plan.rejected
        if one.needs_bytes
    ]
    return Layout(str(plan.topology), plan.step_time.total_s, most), others


def _tiles(plan: Plan, job: JobConfig, advice: Advice) -> Iterator[tuple[str, str, str]]:
    error = f"give or take {advice.error:.0%}" if advice.error else "estimated"
    yield "step", seconds(plan.step_time.total_s), error
    yield "steps", f"{job.steps:,}", f"{seconds(job.steps * plan.step_time.total_s)} in all"
    yield "tokens/s per rank", f"{advice.tokens_per_s_per_rank:,.0f}", f"{plan.ranks_used:,} ranks"
    if advice.utilisation:
        yield "MFU", f"{advice.utilisation:.0%}", "of the device's peak"
    most = max(stage.total for stage in plan.memory) / GIB
    yield "fullest rank", f"{most:.1f} GiB", f"of {job.cluster.memory_gib:g} GiB"
    yield "pipeline bubble", f"{plan.step_time.bubble_s / plan.step_time.total_s:.1%}", seconds(plan.step_time.bubble_s)
    yield "layouts considered", f"{plan.considered:,}", f"{1 + len(plan.rejected):,} topologies"


def _rejected(plan: Plan) -> Markup:
    groups = group_rejected(plan)
    rows = [(f"{len(names):,}", reason, _named(names)) for reason, names in groups[:MOST_REASONS]]
    left = groups[MOST_REASONS:]
    parts = [table(["topologies", "reason", "which"], rows)] if rows else []
    if left:
        count = sum(len(names) for _, names in left)
        parts.append(tag("p", f"And {count:,} by {len(left):,} more reasons: isotrain plan --json.", class_="note"))
    note = f"{len(plan.rejected):,} other topologies by the reason against each, the most frequent reason first."
    return section("Not chosen", note, *parts)


def _named(names: list[str]) -> Markup:
    shown = joined(["; ".join(names[:FEW])])
    if len(names) <= FEW:
        return shown
    more = "; ".join(names[FEW:MANY]) + (f"; and {len(names) - MANY:,} more" if len(names) > MANY else "")
    return joined([shown, folded(f"and {len(names) - FEW:,} more", more)])
