"""``isotrain bench planner --here``: estimated against measured steps of short runs on this machine."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.bench.planner import table
from orchestrator.commands import plan_job, train
from orchestrator.config.loading import compose_job
from orchestrator.errors import ResourceError
from orchestrator.marks import between_marks
from orchestrator.planning.plan import Plan

MARK = "<!-- planner here: written by `isotrain bench planner --here --write docs/planner.md` -->"
# the plan takes every row for full; these are, but for one in six: the shipped chats are cut at 64 tokens
RUN = (
    *("model=smollm2_135m", "data=lighthouse", "cluster=one", "cluster.memory_gib=4", "steps=5"),
    *("batch.global_sequences=16", "batch.micro_sequences=1", "batch.sequence_tokens=64", "memory.recompute=none"),
    *("optimizer.distributed=false", "topology.vpp=1", "topology.sp=false", "checkpoint.every_steps=0"),
)
TOPOLOGIES: tuple[dict[str, int], ...] = (
    {},
    {"dp": 2},
    {"pp": 2},
    {"cp": 2},
    {"tp": 3},
    {"dp": 4},
    {"pp": 2, "dp": 2},
    {"pp": 4},
)


@dataclass(frozen=True)
class Here:
    """One run on this machine."""

    topology: str
    ranks: int
    measured_s: float
    estimated_s: float

    @property
    def error(self) -> float:
        """|estimated / measured - 1|."""
        return abs(self.estimated_s / self.measured_s - 1)


def words_of(sizes: dict[str, int]) -> list[str]:
    """The job of one topology, on as many processes as it has.

    Example:
        >>> words_of({"pp": 2, "dp": 2})[-5:]
        ['topology.pp=2', 'topology.cp=1', 'topology.tp=1', 'topology.dp=2', 'cluster.gpus_per_node=4']
    """
    axes = {"pp": 1, "cp": 1, "tp": 1, "dp": 1} | sizes
    ranks = axes["pp"] * axes["cp"] * axes["tp"] * axes["dp"]
    return [*RUN, *(f"topology.{axis}={size}" for axis, size in axes.items()), f"cluster.gpus_per_node={ranks}"]


def measure(sizes: dict[str, int], run_dir: Path) -> Here:
    """Train a few steps and compare their median, without the first, with the plan's estimate.

    Raises:
        ResourceError: the run did not end well.
    """
    plan = planned_and_trained(words_of(sizes), run_dir)
    return Here(str(plan.topology), plan.ranks_used, median_step_s(run_dir), plan.step_time.total_s)


def planned_and_trained(words: Sequence[str], run_dir: Path) -> Plan:
    """The plan of a job that has been trained in ``run_dir``.

    Raises:
        ResourceError: the run did not end well.
    """
    plan = plan_job(compose_job(words)).plan
    finished = train([*words, f"run_dir={run_dir}", "metrics.progress=false"])
    if finished.code:
        raise ResourceError(f"{plan.topology}: {finished.message}", f"isotrain train {' '.join(words)}")
    return plan


def median_step_s(run_dir: Path) -> float:
    """The median of a run's steps without the first."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median([json.loads(line)["step_s"] for line in lines][1:])


def bench_here(as_json: bool, pages: Sequence[Path], one: Callable[[dict[str, int], Path], Here] = measure) -> int:
    """Measure every topology, print the table, and write it into pages."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for place, sizes in enumerate(TOPOLOGIES):
            found.append(one(sizes, Path(folder) / str(place)))
            print(f"{found[-1].topology}: {found[-1].error:.0%} off", file=sys.stderr, flush=True)
    text = shown(found)
    print(
        json.dumps({"code": 0, "runs": [asdict(each) | {"error": each.error} for each in found]}) if as_json else text
    )
    for page in pages:
        page.write_text(between_marks(page.read_text(encoding="utf-8"), MARK, text), encoding="utf-8")
    return 0


def shown(found: Sequence[Here]) -> str:
    """A table in markdown, with the mean and the worst error under it."""
    rows = [
        (each.topology, str(each.ranks), f"{each.measured_s:.3g}", f"{each.estimated_s:.3g}", f"{each.error:.0%}")
        for each in found
    ]
    errors = [each.error for each in found]
    rows.append((f"mean of {len(found)}; worst", "", "", "", f"{statistics.mean(errors):.0%}; {max(errors):.0%}"))
    return table(("topology", "processes", "measured s per step", "estimated", "error"), rows)
