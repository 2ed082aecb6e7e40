"""Bars: memory of every stage by owner against the device's, and the time of a step by cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from orchestrator.pages.drawing import COLOURS, Scale, across, drawing, legend, line, seconds, shown_rows, text
from orchestrator.pages.markup import Markup, joined, tag
from orchestrator.planning.memory import GIB, StageMemory
from orchestrator.planning.timing import StepTime

WIDTH, RIGHT = 560, 496
MOST_ROWS = 32
OWNERS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "buffers",
    "slack",
    "overhead",
    "reference",
)
OWNER_COLOURS = dict(zip(OWNERS, (COLOURS[order] for order in (0, 5, 2, 6, 1, 3, 4, 8, 7, 5)), strict=True))
KINDS = {
    "computing": (
        COLOURS[0],
        ("matmul_s", "attention_s", "head_s", "memory_s", "recompute_s", "optimizer_s", "reference_s"),
    ),
    "waiting for other ranks": (COLOURS[1], ("tensor_s", "context_s", "expert_s", "pipeline_s", "data_s")),
    "pipeline bubble": (COLOURS[3], ("bubble_s",)),
    "the host's launches": (COLOURS[7], ("launch_s",)),
    "waiting for cores": (COLOURS[2], ("shared_s",)),
}
CAUSES = {
    "matmul_s": "matrix products",
    "attention_s": "attention",
    "head_s": "output head, loss",
    "memory_s": "norms, activations",
    "recompute_s": "recompute",
    "optimizer_s": "optimizer",
    "tensor_s": "tensor parallel",
    "context_s": "context parallel",
    "expert_s": "expert parallel",
    "pipeline_s": "sends to stages",
    "data_s": "gradients, weights",
    "bubble_s": "pipeline bubble",
    "launch_s": "launches",
    "shared_s": "shared cores",
    "reference_s": "reference",
}


def memory_chart(stages: Sequence[StageMemory], limit_gib: float) -> Markup:
    """A bar for each pipeline stage, in GiB of one rank."""
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total)
    rows = shown_rows(len(stages), MOST_ROWS, fullest)
    height = 24.0 if len(rows) <= 12 else 13.0
    left, bottom = 62, 22 + height * len(rows)
    scale = Scale(0, 1.04 * max(limit_gib, stages[fullest].total / GIB), left, RIGHT)
    parts: list[str] = [across(scale, 18, bottom)]
    for row, stage in enumerate(rows):
        y, owners = 22 + row * height, asdict(stages[stage])
        x, total = scale.at(0), stages[stage].total / GIB
        parts.append(text(left - 8, y + height / 2 + 4, f"stage {stage}", "end"))
        for owner in OWNERS:
            width = scale.at(owners[owner] / GIB) - scale.at(0)
            if width > 0.05:
                tip = f"stage {stage}: {owner} {_gib(owners[owner])} of {_gib(stages[stage].total)}"
                box = tag("rect", x=x, y=y + 2, width=width, height=height - 4, fill=OWNER_COLOURS[owner], data_tip=tip)
                parts.append(box)
                x += width
        parts.append(text(RIGHT + 8, y + height / 2 + 4, f"{total:.1f}", "bold" if stage == fullest else "soft"))
    at = scale.at(limit_gib)
    parts += [line(at, 14, at, bottom, "limit"), text(at, 10, f"limit {limit_gib:g} GiB", "limit-text", "middle")]
    keys = [(OWNER_COLOURS[owner], owner) for owner in OWNERS if any(asdict(stage)[owner] for stage in stages)]
    chart = drawing(WIDTH, bottom + 24, "memory per stage by owner, GiB of one rank", *parts)
    return joined([chart, legend(keys)])


def time_chart(times: Sequence[tuple[str, StepTime]]) -> Markup:
    """Seconds of a step by cause, the plan's first; other plans' as a thin bar below each."""
    causes = [cause for _, names in KINDS.values() for cause in names if any(getattr(time, cause) for _, time in times)]
    height = 14.0 + 8 * len(times)
    left, bottom = 138, 4 + height * len(causes)
    most = max(getattr(time, cause) for _, time in times for cause in causes)
    scale = Scale(0, 1.02 * most, left, RIGHT - 24)
    parts: list[str] = [across(scale, 4, bottom, seconds, 4)]
    colours = {cause: colour for colour, names in KINDS.values() for cause in names}
    total = times[0][1].total_s
    for row, cause in enumerate(causes):
        y = 4 + row * height
        parts.append(text(left - 8, y + height / 2 + 2, CAUSES[cause], "end"))
        for place, (name, time) in enumerate(times):
            value = getattr(time, cause)
            tip = f"{name}: {CAUSES[cause]} {seconds(value)}, {value / time.total_s:.1%} of {seconds(time.total_s)}"
            top, thick = (y + 4, height - 8 - 7 * (len(times) - 1)) if place == 0 else (y + height - 9, 5.0)
            width, pale = max(0.5, scale.at(value) - left), 0.45 if place else None
            box = tag("rect", x=left, y=top, width=width, height=thick, fill=colours[cause], opacity=pale, data_tip=tip)
            parts.append(box)
        value = getattr(times[0][1], cause)
        parts.append(text(scale.at(value) + 6, y + height / 2 + 1, f"{value / total:.1%}", "soft"))
    keys = [(colour, name) for name, (colour, names) in KINDS.items() if set(names) & set(causes)]
    return joined([drawing(WIDTH, bottom + 24, "seconds of a step by cause", *parts), legend(keys)])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
