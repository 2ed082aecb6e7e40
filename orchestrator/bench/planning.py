"""How long a plan of 16,384 GPUs takes: experts, 400 layers, full tuning, every open layout and setting."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from orchestrator.config.job import BatchConfig, JobConfig, TunerConfig
from orchestrator.planning.plan import make_plan
from parallel.specs import ClusterSpec, ModelSpec

LARGE_MOE = ModelSpec(
    "qwen3_moe", 400, 8192, 64, 8, 128, 24576, 151936, 32768, 1e-6, 1e6, False,
    qk_norm=True, experts=256, experts_per_token=8, expert_ffn=2048,
)  # fmt: skip
LARGE_CLUSTER = ClusterSpec("large", 2048, 8, "cuda", 76.0, "H100-80GB")
LARGE_JOB = JobConfig(
    batch=BatchConfig(global_sequences=16384, sequence_tokens=4096),
    tuner=TunerConfig(name="full"),
)


@dataclass(frozen=True)
class Planned:
    """``cpu_s``: median of the process's time on one core. ``layouts``: considered."""

    ranks: int
    layouts: int
    topology: str
    cpu_s: float


def measure(rounds: int) -> Planned:
    """Plan ``rounds`` times."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        plan = make_plan(LARGE_JOB, LARGE_MOE, LARGE_CLUSTER)
        times.append(time.process_time() - began)
    return Planned(plan.ranks_used, plan.considered, str(plan.topology), statistics.median(times))


def table(planned: Planned) -> str:
    """As a markdown table."""
    return (
        "| GPUs | layouts considered | chosen | seconds on one core |\n"
        "| ---: | ---: | --- | ---: |\n"
        f"| {planned.ranks:,} | {planned.layouts:,} | {planned.topology} | {planned.cpu_s:.2f} |"
    )
