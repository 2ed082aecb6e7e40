"""The page of a plan: well-formed, loads nothing, escapes what users wrote, and its charts show the plan's figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.bench import planning
from orchestrator.cli import main
from orchestrator.config.job import ClusterConfig, ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.pages.bars import memory_chart, time_chart
from orchestrator.pages.document import write_page
from orchestrator.pages.frontier import Layout, frontier_chart, frontier_of
from orchestrator.pages.plan_page import layouts_of, plan_page
from orchestrator.pages.ranks import alike, nodes_of, rank_grid
from orchestrator.pages.timeline import timeline_chart
from orchestrator.planning.advice import Advice, advise
from orchestrator.planning.memory import GIB, StageMemory
from orchestrator.planning.pipeline import plan_timeline, run_schedule
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.timing import StagePass, StepTime
from parallel.topology import Topology
from tests.pages.jobs import H100X64, JOB, LLAMA3_8B
from tests.pages.parsed import parsed


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(JOB, LLAMA3_8B, H100X64)


@pytest.fixture(scope="module")
def advice(plan: Plan) -> Advice:
    return advise(JOB, LLAMA3_8B, H100X64, plan)


@pytest.fixture(scope="module")
def text(plan: Plan, advice: Advice) -> str:
    return plan_page(plan, JOB, LLAMA3_8B, advice)


def test_the_page_is_well_formed_and_loads_nothing(text: str) -> None:
    found = parsed(text)
    assert not found.wrong and not found.loads
    assert "http" not in re.sub(r"http-equiv", "", text)
    policy = next(meta["content"] for meta in found.of("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_the_page_says_what_the_terminal_says(text: str, plan: Plan) -> None:
    said = parsed(text).text
    for words in (str(plan.topology), *plan.reasons, f"{plan.considered:,}", "128 sequences = ", "76 GiB"):
        assert words in said, words


def test_words_of_a_job_are_text_and_never_markup(plan: Plan, advice: Advice) -> None:
    nasty = "</script><img src=x onerror=alert(1)>&\"'é"
    job = replace(JOB, model=ModelConfig(path=nasty), cluster=replace(JOB.cluster, name=nasty))
    found = parsed(plan_page(plan, job, LLAMA3_8B, advice))
    assert not found.wrong and not found.loads and not found.of("img")
    assert nasty in found.text


def test_every_rank_is_on_the_grid_with_its_coordinates(plan: Plan) -> None:
    found = parsed(rank_grid(plan.topology, 8, 8))
    tips = [box["data-tip"] for box in found.of("div") if "data-tip" in box]
    assert len(tips) == 64
    for rank, tip in enumerate(tips):
        at = plan.topology.coordinates(rank)
        assert tip.startswith(f"rank {rank}: pp {at['pp']} of 4, dp {at['dp']} of ")
        assert f"pp group: {', '.join(map(str, plan.topology.group('pp', rank)))}" in tip


def test_idle_places_are_shown() -> None:
    assert parsed(rank_grid(Topology(dp=3), 1, 4)).text.count("idle") == 1


@pytest.mark.parametrize(
    ("topology", "kinds"),
    [
        (Topology(tp=8, dp=16), 1),
        (Topology(tp=16, dp=8), 2),
        (Topology(tp=2, cp=8, dp=8), 2),
        (Topology(pp=128), 1),
        (Topology(tp=8, dp=16, ep=16), 2),
    ],
)
def test_many_nodes_are_shown_by_kind_and_all_on_a_map(topology: Topology, kinds: int) -> None:
    nodes = nodes_of(topology, 16, 8)
    groups = alike(topology, nodes)
    assert len(groups) == kinds and sum(map(len, groups)) == 16
    found = parsed(rank_grid(topology, 16, 8))
    held = [path["data-tip"] for path in found.of("path")]
    assert len(held) == topology.pp and held[0].startswith("stage 0: nodes 0 to ")
    squares = sum(path["d"].count("M") for path in found.of("path"))
    assert squares == sum(len({topology.coordinates(rank)["pp"] for rank in node.ranks}) for node in nodes)


def test_the_timeline_has_a_box_for_every_pass_of_a_short_step() -> None:
    timeline = run_schedule(6, [StagePass(1.0, 2.0)] * 3)
    found = parsed(timeline_chart(timeline, 1))
    drawn = [path for path in found.of("path") if path.get("fill")]
    assert sum(path["d"].count("M") for path in drawn) == 6 * 3 * 2
    assert "stage 0" in found.text and "25% idle" in found.text  # (pp - 1) / (micro-batches + pp - 1)
    tips = [box["data-tip"] for box in found.of("rect")]
    assert len(tips) == 3 and "6 passes forward of 1 s on average, as many backward of 2 s" in tips[2]


def test_a_long_step_is_drawn_without_its_middle() -> None:
    timeline = run_schedule(300, [StagePass(1.0, 2.0)] * 40)
    chart = timeline_chart(timeline, 1)
    assert "of the same are left out" in chart and len(chart) < 200_000


def test_memory_is_drawn_in_proportion_and_against_the_limit() -> None:
    stages = [StageMemory(GIB, 0, 0, 2 * GIB, 3 * GIB, 0, 0), StageMemory(2 * GIB, 0, 0, 2 * GIB, 8 * GIB, 0, 0)]
    found = parsed(memory_chart(stages, 10.0))
    widths = {box["data-tip"].partition(" GiB")[0]: float(box["width"]) for box in found.of("rect")}
    assert widths["stage 1: activations 8.00"] == pytest.approx(8 * widths["stage 0: weights 1.00"], abs=0.1)
    assert "limit 10 GiB" in found.text and "12.0" in found.text
    (limit,) = [line for line in found.of("line") if line["class"] == "limit"]
    assert float(limit["x1"]) < 62 + 12 * widths["stage 0: weights 1.00"]  # the second stage is over it


def test_time_is_drawn_by_cause_for_both_plans() -> None:
    times = [("plan", StepTime(matmul_s=2.0, bubble_s=1.0)), ("next best", StepTime(matmul_s=3.0, data_s=1.0))]
    found = parsed(time_chart(times))
    tips = {box["data-tip"]: float(box["width"]) for box in found.of("rect")}
    assert tips["next best: matrix products 3 s, 75.0% of 4 s"] == pytest.approx(
        1.5 * tips["plan: matrix products 2 s, 66.7% of 3 s"], rel=0.01
    )
    assert "gradients, weights" in found.text and "attention" not in found.text


def test_nothing_on_the_frontier_is_beaten_in_both(plan: Plan) -> None:
    chosen, others = layouts_of(plan)
    timed = [one for one in others if one.step_s and not one.bound]
    frontier = frontier_of([chosen, *timed])
    assert chosen in frontier
    for one in frontier:
        assert not [other for other in timed if other.step_s < one.step_s and other.gib < one.gib]
    steps = {one.topology: one.step_s for one in plan.rejected if one.step_s}
    assert steps and all(one.gib > 0 for one in others) and {one.name for one in others} >= set(steps)


def test_layouts_that_do_not_fit_stand_above_the_limit() -> None:
    chosen, large = Layout("a", 1.0, 8.0), Layout("b", 0.0, 20.0)
    found = parsed(frontier_chart(chosen, [Layout("c", 2.0, 4.0), large], 10.0))
    (limit,) = [line for line in found.of("line") if line["class"] == "limit"]
    (strip,) = [box for box in found.of("rect") if box["data-tip"].startswith("b")]
    assert float(strip["y"]) < float(limit["y1"]) and "1 too large" in found.text
    assert strip["data-tip"] == "b\ntoo large: 20.0 GiB on the fullest rank"


def test_the_command_writes_the_page_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "plan.html"
    words = ["plan", "model=smollm2_135m", "cluster=laptop", "--html", str(file)]
    assert main(words) == 0 and f"page: {file}" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0 and json.loads(capsys.readouterr().out)["page"] == str(file)
    assert "Plan: HuggingFaceTB/SmolLM2-135M-Instruct" in parsed(file.read_text(encoding="utf-8")).text


def test_a_place_that_takes_no_page_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written") as raised:
        write_page(tmp_path / "file" / "plan.html", "")
    assert raised.value.hint == "--html ANOTHER.html"


def test_a_page_goes_with_a_plan_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--why", "topology.tp=1", "--html", "a.html"]) == 64
    assert "--html writes a plan, and --why makes none" in capsys.readouterr().err


def test_a_page_of_16384_gpus_is_under_a_megabyte(advice: Advice) -> None:
    cluster = ClusterConfig("large", 2048, 8, "cuda", 76.0)
    job = replace(planning.LARGE_JOB, cluster=cluster)
    plan = make_plan(job, planning.LARGE_MOE, planning.LARGE_CLUSTER)
    text = plan_page(plan, job, planning.LARGE_MOE, advice)
    found = parsed(text)
    assert not found.wrong and len(text.encode()) < 1_000_000
    assert "All 2,048 nodes" in found.text and plan_timeline(plan) is not None
