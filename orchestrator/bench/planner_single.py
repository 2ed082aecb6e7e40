"""``isotrain bench planner --single``: time and memory of one device, LoRA to full tuning, estimated and measured."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.bench.planner import table
from orchestrator.bench.planner_here import median_step_s, planned_and_trained
from orchestrator.config.loading import compose_job
from orchestrator.detection.cluster import found_cluster
from orchestrator.marks import between_marks

MARK = "<!-- planner single: written by `isotrain bench planner --single --write docs/planner.md` -->"
RUN = (
    *("model=smollm2_135m", "cluster=auto", "cluster.gpus_per_node=1", "steps=5", "checkpoint.every_steps=0"),
    *("topology.tp=1", "topology.pp=1", "topology.cp=1", "topology.dp=1", "memory.recompute=none"),
)
SIZES = {"cuda": (16, 2048), "cpu": (4, 64)}
"""Rows of a step and tokens of a row: enough for a GPU to be busy, few enough for a CPU to be done in seconds."""
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "lora": ("tuner=lora", "batch.micro_sequences=1"),
    "lora, all rows at once": ("tuner=lora", "batch.micro_sequences={rows}"),
    "lora, full recompute": ("tuner=lora", "batch.micro_sequences={rows}", "memory.recompute=full"),
    "lora r=64 on all": (
        "tuner=lora",
        "tuner.r=64",
        "tuner.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
        "batch.micro_sequences=1",
    ),
    "dora": ("tuner=dora", "batch.micro_sequences=1"),
    "qlora": ("tuner=qlora", "batch.micro_sequences=1"),
    "full": ("tuner=full", "batch.micro_sequences=1"),
    "full, all rows at once": ("tuner=full", "batch.micro_sequences={rows}"),
}
Words = Sequence[str]


@dataclass(frozen=True)
class Single:
    """One run on one device. Bytes: the peak, of torch's allocator on a GPU, resident on a CPU."""

    name: str
    measured_s: float
    estimated_s: float
    measured_bytes: int
    estimated_bytes: int

    @property
    def time_error(self) -> float:
        """|estimated / measured - 1|."""
        return abs(self.estimated_s / self.measured_s - 1)

    @property
    def memory_error(self) -> float:
        """|estimated / measured - 1|."""
        return abs(self.estimated_bytes / self.measured_bytes - 1)


def measure(name: str, words: Words, run_dir: Path) -> Single:
    """Train a few steps; the median without the first, and the peak of memory, beside the plan's.

    Raises:
        ResourceError: the run did not end well.
    """
    plan = planned_and_trained(words, run_dir)
    memory = plan.memory[0]
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held = max(int(json.loads(line)["peak_memory_bytes"]) for line in lines)
    asked = memory.allocated if plan.device == "cuda" else memory.total
    return Single(name, median_step_s(run_dir), plan.step_time.total_s, held, asked)


def bench_single(as_json: bool, pages: Sequence[Path], one: Callable[[str, Words, Path], Single] = measure) -> int:
    """Measure every configuration on one device of this host, print the table, and write it into pages."""
    rows, tokens = SIZES[found_cluster(compose_job(RUN[:3]).cluster).device]
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _long_rows(folder / "rows.jsonl", rows)
        sizes = [f"data.path={data}", f"batch.global_sequences={rows}", f"batch.sequence_tokens={tokens}"]
        for place, (name, words) in enumerate(CONFIGURATIONS.items()):
            job = [*RUN, *sizes, *(word.format(rows=rows) for word in words)]
            found.append(one(name, job, folder / str(place)))
            print(f"{name}: time {found[-1].time_error:.0%}, memory {found[-1].memory_error:.0%} off", file=sys.stderr)
    text = shown(found)
    values = [asdict(each) | {"time_error": each.time_error, "memory_error": each.memory_error} for each in found]
    print(json.dumps({"code": 0, "runs": values}) if as_json else text)
    for page in pages:
        page.write_text(between_marks(page.read_text(encoding="utf-8"), MARK, text), encoding="utf-8")
    return 0


def _long_rows(file: Path, count: int) -> Path:
    """Rows that fill any length they are cut at, for the plan takes every row for full."""
    turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two three four " * 1000}]
    file.write_text((json.dumps({"messages": turns}) + "\n") * count, encoding="utf-8")
    return file


def shown(found: Sequence[Single]) -> str:
    """A table in markdown, with the mean and the worst errors under it."""
    rows = [
        (
            each.name,
            *(f"{each.measured_s:.3g}", f"{each.estimated_s:.3g}", f"{each.time_error:.0%}"),
            *(f"{each.measured_bytes / 1e9:.2f}", f"{each.estimated_bytes / 1e9:.2f}", f"{each.memory_error:.0%}"),
        )
        for each in found
    ]
    times, memories = ([getattr(each, kind) for each in found] for kind in ("time_error", "memory_error"))
    means = [f"{statistics.mean(errors):.0%}; {max(errors):.0%}" for errors in (times, memories)]
    rows.append((f"mean of {len(found)}; worst", "", "", means[0], "", "", means[1]))
    return table(("configuration", "s per step", "estimated", "error", "peak GB", "estimated", "error"), rows)
