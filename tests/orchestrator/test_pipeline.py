"""The pipeline's schedule: the order that megatron-core has, and the bubble that the formulas say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from orchestrator.planning.pipeline import plan_timeline, run_schedule, stage_order
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.timing import StagePass
from tests.pages.jobs import H100X64, JOB, LLAMA3_8B

CUTS = [(2, 4, 1), (4, 4, 1), (4, 9, 1), (8, 3, 1), (2, 4, 2), (4, 8, 2), (4, 4, 3), (3, 9, 4)]


@pytest.mark.parametrize(("pp", "micro_batches", "vpp"), CUTS)
def test_every_stage_goes_in_megatron_cores_order(pp: int, micro_batches: int, vpp: int) -> None:
    table = schedules.get_schedule_table(micro_batches, vpp, pp)
    for stage in range(pp):
        order = stage_order(pp, stage, micro_batches, vpp)
        assert [(micro, chunk) for forward, micro, chunk in order if forward] == table
        place = type("Place", (), {"size": lambda self: pp, "rank": lambda self, stage=stage: stage})()
        peers: Any = type(
            "Peers", (), {"pp_group": place, "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None}
        )
        _, _, ahead, _ = schedules.get_pp_rank_microbatches(micro_batches, vpp, pp, p2p_communicator=peers)
        # megatron-core's own: chunks from 1, those of a backward pass negative
        theirs = convert_schedule_table_to_order(ahead, vpp, table)
        assert [chunk + 1 if forward else -(chunk + 1) for forward, _, chunk in order] == theirs


@pytest.mark.parametrize(("pp", "micro_batches", "vpp"), CUTS)
def test_no_pass_starts_before_what_it_needs(pp: int, micro_batches: int, vpp: int) -> None:
    passes = [StagePass(1.0 + stage % 3, 2.0 + stage % 2) for stage in range(pp)]
    shares = [[1 / vpp] * vpp] * pp if vpp > 1 else []
    timeline = run_schedule(micro_batches, passes, shares)
    passed = [(stage, one) for stage, passes in enumerate(timeline.stages) for one in passes]
    ends = {(one.forward, one.micro_batch, one.chunk * pp + stage): one.end_s for stage, one in passed}
    assert Counter(one.forward for _, one in passed) == dict.fromkeys((True, False), micro_batches * pp * vpp)
    free: dict[int, float] = {}
    for stage, one in passed:
        position = one.chunk * pp + stage
        before = (True, position - 1) if one.forward else (False, position + 1)
        if 0 <= before[1] < pp * vpp:
            assert one.start_s >= ends[before[0], one.micro_batch, before[1]]
        if not one.forward:
            assert one.start_s >= ends[True, one.micro_batch, position]
        assert one.start_s >= free.get(stage, 0.0)
        free[stage] = one.end_s


@pytest.mark.parametrize(("pp", "micro_batches", "vpp"), [(4, 8, 1), (8, 64, 1), (4, 8, 2), (4, 8, 4)])
def test_equal_stages_have_the_published_bubble(pp: int, micro_batches: int, vpp: int) -> None:
    """Narayanan et al. 2021, section 2.2: (p - 1) / v micro-batches are waited for."""
    timeline = run_schedule(micro_batches, [StagePass(1.0, 2.0)] * pp, [[1 / vpp] * vpp] * pp)
    assert timeline.end_s == pytest.approx(3.0 * (micro_batches + (pp - 1) / vpp))
    assert timeline.idle_s(0) == pytest.approx(3.0 * (pp - 1) / vpp)
    assert timeline.bubble == pytest.approx(timeline.idle_s(0) / timeline.end_s)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(JOB, LLAMA3_8B, H100X64)


def test_a_plans_stages_are_those_of_its_step_time(plan: Plan) -> None:
    slowest = max(one.forward_s + one.backward_s for one in plan.passes)
    time = plan.step_time
    without = time.total_s - time.bubble_s - time.pipeline_s - time.data_s - time.optimizer_s
    assert plan.micro_batches * slowest == pytest.approx(without)
    assert all(1.5 < one.backward_s / one.forward_s < 2.5 for one in plan.passes)
    timeline = plan_timeline(plan)
    assert timeline is not None and timeline.end_s == pytest.approx(without + time.bubble_s, rel=0.05)


def test_a_plan_without_a_pipeline_or_of_before_has_no_timeline(plan: Plan) -> None:
    assert plan_timeline(replace(plan, passes=())) is None
    assert Plan.from_json(plan.to_json()) == plan
    before = {name: value for name, value in json.loads(plan.to_json()).items() if name != "passes"}
    assert Plan.from_json(json.dumps(before)) == replace(plan, passes=())
