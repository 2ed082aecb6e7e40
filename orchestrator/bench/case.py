"""One measured process of ``python -m orchestrator.bench train``: a few optimizer steps, timed, as one line of JSON.

Both sides get the same weights, the same initial adapter, the same rows and the same AdamW, so that their losses agree
as well: the table compares two programs that compute the same thing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.engine import IGNORED_LABEL, MicroBatch

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LEARNING_RATE = 2e-4
SEED = 0
# labels -> rows of a step and their longest length: about 512 tokens either way
SHAPES = {"all": (2, 256), "assistant": (8, 256)}


@dataclass(frozen=True)
class Case:
    """What one process runs: ``side`` is ``ours`` or ``theirs``, ``labels`` a key of SHAPES."""

    side: str
    precision: str
    labels: str
    threads: int
    warmup_steps: int = 2
    steps: int = 6
    model: str = MODEL


@dataclass(frozen=True)
class Measured:
    """What came out. Tokens are real ones, without padding; ``peak_bytes`` is the process's highest resident size."""

    tokens_per_s: float
    peak_bytes: int
    ready_s: float
    losses: tuple[float, ...]


def job_of(case: Case) -> Any:
    """The case as the job that ``isotrain train`` would run."""
    from orchestrator.config.building import build_job

    sequences, tokens = SHAPES[case.labels]
    return build_job(
        {
            "seed": SEED,
            "precision": case.precision,
            "steps": case.warmup_steps + case.steps,
            "model": {"path": case.model},
            "data": {"path": "builtin:lighthouse"},
            "objective": {"train_on": case.labels},
            "cluster": {"name": "one", "nodes": 1, "gpus_per_node": 1, "memory_gib": 16.0},
            "topology": {"tp": 1, "pp": 1, "dp": 1},
            "batch": {"global_sequences": sequences, "micro_sequences": sequences, "sequence_tokens": tokens},
        }
    )


def step_batches(case: Case) -> list[MicroBatch]:
    """One micro-batch per step: whole lighthouse conversations, or (labels ``all``) the same text in full rows."""
    from launch.environment import isotrain_cache
    from orchestrator.data import BatchShape, SampleOrder, prepare, step_microbatches
    from orchestrator.models import resolve_model

    job = job_of(case)
    sequences, tokens = SHAPES[case.labels]
    data = prepare(job.data, job.objective, resolve_model(case.model), tokens, isotrain_cache() / "tokens")
    if case.labels == "all":
        return packed_batches(data, job.steps, sequences, tokens)
    order, shape = SampleOrder(data.rows, SEED), BatchShape(micro_sequences=sequences)
    return [step_microbatches(data, order, step * shape.global_sequences, shape, 0)[0] for step in range(job.steps)]


def packed_batches(data: Any, steps: int, sequences: int, tokens: int) -> list[MicroBatch]:
    """Rows without padding: conversations end to end, starting over at the end of the data; every token a label."""
    import numpy as np
    import torch

    stream = np.concatenate([data.row(row)[0] for row in range(data.rows)]).astype(np.int64)
    whole = torch.from_numpy(np.resize(stream, steps * sequences * tokens)).view(steps, sequences, tokens)
    batches = []
    for step, rows in enumerate(whole):
        labels = torch.full_like(rows, IGNORED_LABEL)
        labels[:, :-1] = rows[:, 1:]
        batches.append(MicroBatch(rows.clone(), labels, tuple(range(step * sequences, (step + 1) * sequences))))
    return batches


def open_ours(case: Case) -> Callable[[MicroBatch], float]:
    """Our engine in this process, as a worker opens it: a function that takes a step and returns its loss."""
    import torch.distributed as dist

    from orchestrator.assemble import open_engine
    from orchestrator.commands import plan_job
    from parallel.groups import open_groups

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    planned = plan_job(job_of(case))
    engine = open_engine(planned.job, planned.plan, open_groups(planned.plan.topology, 0))
    return lambda batch: engine.train_step([batch], LEARNING_RATE).loss


def measure(case: Case) -> Measured:
    """Open one side, take its steps, and time those after the warm-up."""
    import torch

    from orchestrator.bench.peer import open_theirs

    began = time.perf_counter()
    torch.set_num_threads(case.threads)
    step = open_ours(case) if case.side == "ours" else open_theirs(job_of(case), LEARNING_RATE)
    batches = step_batches(case)
    ready_s = time.perf_counter() - began
    losses, speeds = [], []
    for batch in batches:
        started = time.perf_counter()
        losses.append(step(batch))
        speeds.append(real_tokens(batch) / (time.perf_counter() - started))
    return Measured(statistics.median(speeds[case.warmup_steps :]), peak_bytes(), ready_s, tuple(losses))


def real_tokens(batch: MicroBatch) -> int:
    """Tokens of a batch without the padding after each row's last label (every row ends with a label)."""
    learned = (batch.labels != IGNORED_LABEL).long()
    after_last = learned.flip(1).argmax(1)
    return int((batch.labels.shape[1] - after_last + 1).sum())


def peak_bytes() -> int:
    """The highest resident set of this process since it began (Linux: VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Case(**json.loads(sys.argv[1]))))), flush=True)
