"""The training loop of one rank: batches in, one optimizer step at a time, checkpoints and metrics out."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np
import torch
import torch.distributed as dist

from launch.states import host_of
from launch.stop import StopRequest
from orchestrator.anomalies import Anomalies
from orchestrator.data import BatchShape, SampleOrder, step_microbatches
from orchestrator.errors import ExitCode
from orchestrator.learning import learn, skip_or_leave
from orchestrator.micro_batches import MicroBatches, read_size, write_size
from orchestrator.planning.memory import GIB
from orchestrator.planning.plan import Plan
from orchestrator.saving import attempt, contents_at, open_saver, save
from orchestrator.schedule import learning_rate
from orchestrator.training import Cursor, Run
from parallel.device import peak_memory_bytes
from parallel.engine import StepResult


def train(run: Run, start: Cursor, stop: StopRequest) -> ExitCode:
    """Train from the step after ``start`` to the last one, saving on the way, at the end and when asked to stop.

    Returns:
        DONE, or INTERRUPTED when all ranks agreed to stop after saving.
    Raises:
        GaveUp: the loss is no number, or too far from those before, and the job says to stop then.
        Rewound: the same, and the job says to go back to the newest checkpoint then.
    """
    turns = steps(run, start, stop)
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return ExitCode(end.value)


def steps(run: Run, start: Cursor, stop: StopRequest) -> Generator[None, None, ExitCode]:
    """:func:`train`, a step for each ``next``: several runs may take turns. Closing it ends the saver."""
    anomalies, micro = Anomalies(run.job.anomalies, start.losses), _micro_batches(run)
    order, sequences = SampleOrder(run.data.rows, run.job.seed), run.plan.global_sequences
    with open_saver(run) as saver:
        saver.prepare(run.engine.shards(), contents_at(run, start))
        for step in range(start.steps + 1, run.job.steps + 1):
            started = time.perf_counter()
            first = start.after(step - 1, sequences).samples
            shape = batch_shape(run.plan, micro.size.rows)
            batches = step_microbatches(run.data, order, first, shape, run.groups.coordinate("dp"))
            rate = learning_rate(run.job.optimizer, step, run.job.steps)
            result = learn(run, anomalies, batches, rate, step)
            done = start.after(step, sequences, anomalies.losses)
            if not result.applied:
                skip_or_leave(run, anomalies, saver, result, done)
            step_s, held = time.perf_counter() - started, peak_memory_bytes(run.plan.device)
            lengths = run.data.lengths(order.rows_at(first, sequences))
            if run.metrics is not None:
                more = {"peak_memory_bytes": held} | ({} if result.applied else {"skipped": 1})
                run.metrics.log(step, _values(result, rate, lengths, step_s) | more)
            stopping, failed, most_s, most_held = _agree(run, step, stop.requested, saver.has_failed, step_s, held)
            if micro.heard(most_s, most_held, int(lengths.sum())):
                _use(run, micro, step)
            if run.pace is not None:
                run.pace.note(step, step_s, time.perf_counter() - started - step_s)
            if failed:
                attempt(run, saver.last_step, saver.finish)
            every = run.job.checkpoint.every_steps
            if stopping or step == run.job.steps:
                save(run, saver, done, result, last=True)
            elif every and step % every == 0:
                save(run, saver, done, result, last=False)
            if stopping and step < run.job.steps:
                return ExitCode.INTERRUPTED
            yield
    return ExitCode.DONE


def batch_shape(plan: Plan, micro_sequences: int) -> BatchShape:
    """How a plan cuts the global batch; a pipeline wants all micro-batches of a step in one length."""
    dp, micro_batches = plan.topology.dp, plan.global_sequences // micro_sequences
    each = -(-micro_batches // dp)
    return BatchShape(
        dp=dp,
        micro_batches=each,
        micro_sequences=micro_sequences,
        length_multiple=plan.length_multiple,
        common_length=plan.topology.pp > 1,
        empty=dp * each - micro_batches,
    )


def _micro_batches(run: Run) -> MicroBatches:
    plan = run.plan
    memory = plan.cluster.memory_gib * GIB if plan.cluster else 0.0
    return MicroBatches(plan.micro_choices, read_size(run.run_dir, plan.micro_choices, plan.micro_sequences), memory)


def _use(run: Run, micro: MicroBatches, step: int) -> None:
    """Keep a new size, or that the old one stays, for later launches, and say so."""
    if run.metrics is not None:
        write_size(run.run_dir, micro.size)
        words = "stays" if micro.size.settled else "is tried"
        run.say(f"step {step}: batch.micro_sequences={micro.size.rows} {words}")


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


def _agree(run: Run, step: int, *here: float) -> list[float]:
    """The most of each over all ranks; the same answer on every rank. Slow ranks are told of on the way."""
    numbers = run.stragglers.numbers(step) if run.stragglers is not None else []
    told = torch.tensor([*here, *numbers], dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=run.cpu_group)
    most: list[float] = told.tolist()
    for slow in run.stragglers.heard(most[len(here) :]) if run.stragglers is not None else ():
        run.say(f"step {step}: {slow.words(host_of(run.run_dir, slow.rank))}")
    return most[: len(here)]
