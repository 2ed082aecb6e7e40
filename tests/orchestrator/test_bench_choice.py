"""The choice score: published layouts against the planner's own best, which is not told them."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.bench.planner_choice import CLOSE, best_layout, choices, held, held_by_group
from orchestrator.bench.planner_rows import setup_of_row
from orchestrator.bench.planner_score import ROWS, capacity_of, read_rows
from orchestrator.planning.memory import fits
from orchestrator.planning.timing import step_time

NAMES = {
    "tuned": "dgxc-v25.04-pretrain-llama3-70b-h100-bf16-64-128",
    "far": "zerobubble-1.5B-1F1B-m24",
    "open": "megascale-175B-megascale-512",
    "swept": "vtrain-m-0001",
}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """Published rows."""
    every, _ = read_rows(ROWS)
    return {name: next(row for row in every if row["id"] == wanted) for name, wanted in NAMES.items()}


def test_the_best_is_legal_fits_and_uses_the_same_ranks_and_batch(rows: dict[str, dict[str, Any]]) -> None:
    published = setup_of_row(rows["tuned"])
    capacity = capacity_of(rows["tuned"], published)
    best, time = best_layout(published, capacity)
    assert (best.ranks, best.sequences, best.tokens) == (published.ranks, published.sequences, published.tokens)
    assert best.sequences == best.dp * best.micro * best.micro_batches
    assert best.shape.kv_heads % best.tp == 0 and best.tp <= best.domain
    assert best == published or fits(best, capacity)
    assert time.total_s == pytest.approx(step_time(best).total_s) and time.total_s <= step_time(published).total_s


def test_a_layout_is_held_by_its_own_estimate_and_both_breakdowns_are_told(rows: dict[str, dict[str, Any]]) -> None:
    found = {one.row: one for one in choices([rows["far"], rows["tuned"]])}
    far, tuned = found[rows["far"]["id"]], found[rows["tuned"]["id"]]
    assert far.ratio > CLOSE and not far.is_held and far.published.startswith("pp8") and far.best.startswith("dp8")
    assert far.published_s["bubble_s"] > 0 and "bubble_s" not in far.best_s
    assert sum(far.published_s.values()) == pytest.approx(step_time(setup_of_row(rows["far"])).total_s)
    assert tuned.is_held and tuned.ratio >= 1
    assert held(found.values()).value == 0.5 and held(found.values()).count == 2
    assert held_by_group(found.values())["zerobubble"].value == 0


def test_what_was_not_printed_is_what_the_planner_would_take(rows: dict[str, dict[str, Any]]) -> None:
    assert not rows["open"].get("vpp") and not rows["open"].get("mbs")
    (one,) = choices([rows["open"]])
    assert one.published.startswith("tp8 pp8 vpp") and one.is_held


def test_sweeps_rows_of_lower_quality_and_repetitions_are_left_out(rows: dict[str, dict[str, Any]]) -> None:
    far = rows["far"]
    assert choices([rows["swept"], far | {"quality": "B"}, {"id": "odd", "group": "x", "quality": "A"}]) == []
    assert len(choices([far, far])) == 1
    assert held([]).value == 0 and held_by_group([]) == {}
