"""The training loop of one rank: batches in, one optimizer step at a time, checkpoints and metrics out."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from launch.stop import StopRequest
from orchestrator.assemble import Room
from orchestrator.checkpoint.save import Contents, SavePolicy, save
from orchestrator.config.job import JobConfig
from orchestrator.data import BatchShape, SampleOrder, TokenisedData, step_microbatches
from orchestrator.errors import ExitCode, GaveUp
from orchestrator.metrics import Metrics
from orchestrator.planning.plan import Plan
from orchestrator.schedule import learning_rate
from parallel.engine import Engine, StepResult

if TYPE_CHECKING:
    from parallel.groups import Groups


@dataclass(frozen=True)
class Run:
    """Everything that a rank trains with. ``cpu_group`` carries CPU tensors; ``metrics`` is there on the first rank."""

    job: JobConfig
    plan: Plan
    run_dir: Path
    groups: Groups
    cpu_group: Any
    engine: Engine
    data: TokenisedData
    room: Room
    metrics: Metrics | None


def train(run: Run, completed: int, stop: StopRequest) -> ExitCode:
    """Train from the step after ``completed`` to the last one, saving on the way, at the end and when asked to stop.

    Returns:
        DONE, or INTERRUPTED when all ranks agreed to stop after saving.
    Raises:
        GaveUp: the loss is no number any more.
    """
    order = SampleOrder(run.data.rows, run.job.seed)
    for step in range(completed + 1, run.job.steps + 1):
        started = time.perf_counter()
        batches = step_microbatches(run.data, order, step - 1, batch_shape(run.plan), run.groups.coordinate("dp"))
        rate = learning_rate(run.job.optimizer, step, run.job.steps)
        result = run.engine.train_step(batches, rate)
        _check_finite(run, result, step)
        if run.metrics is not None:
            rows = order.rows_at((step - 1) * run.plan.global_sequences, run.plan.global_sequences)
            run.metrics.log(step, _values(result, rate, run.data.lengths(rows), time.perf_counter() - started))
        stopping = _agree_to_stop(run, stop)
        every = run.job.checkpoint.every_steps
        if stopping or step == run.job.steps or (every and step % every == 0):
            save_checkpoint(run, step)
        if stopping and step < run.job.steps:
            return ExitCode.INTERRUPTED
    return ExitCode.DONE


def batch_shape(plan: Plan) -> BatchShape:
    """How a plan cuts the global batch; a pipeline wants all micro-batches of a step in one length."""
    return BatchShape(
        dp=plan.topology.dp,
        micro_batches=plan.micro_batches,
        micro_sequences=plan.micro_sequences,
        length_multiple=plan.length_multiple,
        common_length=plan.topology.pp > 1,
    )


def save_checkpoint(run: Run, step: int) -> Path:
    """Save the training state after ``step`` completed steps; every rank calls it."""
    state = {
        "step": step,
        "samples_consumed": step * run.plan.global_sequences,
        "optimizer_steps": run.engine.optimizer_steps,
        "seed": run.job.seed,
        "rng": "derived from the seed, the sample and the tensor's name: there is no generator state",
        "schedule": asdict(run.job.optimizer) | {"steps": run.job.steps},
        "data": {"path": run.job.data.path, "sha256": run.data.summary.source_sha256, "rows": run.data.rows},
    }
    about = {"topology": asdict(run.plan.topology), "precision": run.plan.precision, "model": run.job.model.path}
    about["quantise"] = run.job.tuner.quantise
    return save(
        run.run_dir / "checkpoints",
        step,
        run.engine.shards(),
        Contents(run.room.name, state, run.room.files, about),
        policy=SavePolicy(keep=run.job.checkpoint.keep),
        group=run.cpu_group,
    )


def _values(result: StepResult, rate: float, lengths: np.ndarray, step_s: float) -> dict[str, float]:
    """A line of metrics: ``tokens`` are the real ones of the global batch, without padding."""
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": rate,
        "tokens": int(lengths.sum()),
        "label_tokens": result.label_tokens,
        "step_s": step_s,
    }


def _check_finite(run: Run, result: StepResult, step: int) -> None:
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise GaveUp(
            f"step {step}: loss {result.loss}, grad_norm {result.grad_norm}; nothing of this step was saved",
            f"isotrain resume {run.run_dir} optimizer.lr={run.job.optimizer.lr / 10:g}   (goes on from the newest "
            "checkpoint; without one: isotrain train with that and another run_dir)",
        )


def _agree_to_stop(run: Run, stop: StopRequest) -> bool:
    """Whether any rank was asked to stop; the same answer on every rank."""
    flag = torch.tensor([float(stop.requested)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=run.cpu_group)
    return bool(flag.item())
