"""The training loop of one rank: batches in, one optimizer step at a time, checkpoints and metrics out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from launch.states import host_of
from launch.stop import StopRequest
from orchestrator.anomalies import Anomalies, note_rewind
from orchestrator.assemble import Room
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.retention import Retention
from orchestrator.checkpoint.save import SavePolicy
from orchestrator.checkpoint.saver import Saver
from orchestrator.config.building import meaning
from orchestrator.config.job import JobConfig
from orchestrator.data import BatchShape, SampleOrder, TokenisedData, step_microbatches
from orchestrator.errors import ExitCode, GaveUp, ResourceError, Rewound
from orchestrator.metrics import Metrics
from orchestrator.micro_batches import MicroBatches, read_size, write_size
from orchestrator.pace import Pace
from orchestrator.planning.memory import GIB
from orchestrator.planning.plan import Plan
from orchestrator.runs import latest_step
from orchestrator.schedule import learning_rate
from orchestrator.stragglers import Stragglers
from parallel.device import peak_memory_bytes
from parallel.engine import Engine, MicroBatch, StepResult

if TYPE_CHECKING:
    from parallel.groups import Groups

TOLD_OF_PLAN = (
    *("vpp", "sp", "stages", "micro_batches", "micro_sequences", "global_sequences", "recompute", "distributed"),
    "engine",
)


@dataclass(frozen=True)
class Run:
    """Everything that a rank trains with. ``cpu_group`` carries CPU tensors; ``metrics`` is there on the first rank.

    ``guard``: raises when the run folder has become another launch's. ``base``: the fingerprint of an adapter's model.
    ``pace``: notes this rank's steps. ``stragglers``: finds ranks that hold the others up.
    """

    job: JobConfig
    plan: Plan
    run_dir: Path
    groups: Groups
    cpu_group: Any
    engine: Engine
    data: TokenisedData
    room: Room
    metrics: Metrics | None
    guard: Callable[[], None] = lambda: None
    base: str | None = None
    pace: Pace | None = None
    stragglers: Stragglers | None = None


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: after ``steps`` steps, at position ``samples`` of the order of its samples.

    ``losses``: of the newest steps (``orchestrator.anomalies``).
    """

    steps: int = 0
    samples: int = 0
    losses: tuple[float, ...] = field(default=(), repr=False)

    def after(self, step: int, global_sequences: int) -> Cursor:
        """Where it stands after ``step``, with so many samples in each step from here on.

        Example:
            >>> Cursor(6, 24).after(7, 8)
            Cursor(steps=7, samples=32)
        """
        return Cursor(step, self.samples + (step - self.steps) * global_sequences)


def train(run: Run, start: Cursor, stop: StopRequest) -> ExitCode:
    """Train from the step after ``start`` to the last one, saving on the way, at the end and when asked to stop.

    Returns:
        DONE, or INTERRUPTED when all ranks agreed to stop after saving.
    Raises:
        GaveUp: the loss is no number, or too far from those before, and the job says to stop then.
        Rewound: the same, and the job says to go back to the newest checkpoint then.
    """
    anomalies, micro = Anomalies(run.job.anomalies, start.losses), _micro_batches(run)
    order, sequences = SampleOrder(run.data.rows, run.job.seed), run.plan.global_sequences
    with _saver(run) as saver:
        saver.prepare(run.engine.shards(), _contents(run, start, anomalies))
        for step in range(start.steps + 1, run.job.steps + 1):
            started = time.perf_counter()
            first, done = start.after(step - 1, sequences).samples, start.after(step, sequences)
            shape = batch_shape(run.plan, micro.size.rows)
            batches = step_microbatches(run.data, order, first, shape, run.groups.coordinate("dp"))
            rate = learning_rate(run.job.optimizer, step, run.job.steps)
            result = _learn(run, anomalies, batches, rate, step)
            if not result.applied:
                _skip_or_leave(run, anomalies, saver, result, done)
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
                _attempt(run, saver.last_step, saver.finish)
            every = run.job.checkpoint.every_steps
            if stopping or step == run.job.steps:
                _save(run, saver, done, result, anomalies, last=True)
            elif every and step % every == 0:
                _save(run, saver, done, result, anomalies, last=False)
            if stopping and step < run.job.steps:
                return ExitCode.INTERRUPTED
    return ExitCode.DONE


def batch_shape(plan: Plan, micro_sequences: int) -> BatchShape:
    """How a plan cuts the global batch; a pipeline wants all micro-batches of a step in one length."""
    return BatchShape(
        dp=plan.topology.dp,
        micro_batches=plan.micro_batches * plan.micro_sequences // micro_sequences,
        micro_sequences=micro_sequences,
        length_multiple=plan.length_multiple,
        common_length=plan.topology.pp > 1,
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
        _say(run, f"step {step}: batch.micro_sequences={micro.size.rows} {words}")


def _saver(run: Run) -> Saver:
    """What saves this run. An asynchronous one has a group of its own: its thread talks beside training."""
    config = run.job.checkpoint
    retention = Retention(config.keep_last, config.keep_every, config.keep_best, config.metric)
    return Saver(
        run.run_dir / "checkpoints",
        SavePolicy(retention, config.readback),
        dist.new_group(backend="gloo") if config.asynchronous else run.cpu_group,
        asynchronous=config.asynchronous,
        guard=run.guard,
    )


def _save(run: Run, saver: Saver, done: Cursor, result: StepResult, anomalies: Anomalies, *, last: bool) -> None:
    """Save the training state at ``done``; every rank calls it.

    Raises:
        ResourceError: the disk refuses this save or (asynchronous) the one before, and the job says to stop then, or
            there is no later save.
    """
    metrics = {"loss": result.loss, "grad_norm": result.grad_norm} if result.applied else {}
    contents = _contents(run, done, anomalies, metrics)
    _attempt(run, saver.last_step, saver.finish)
    _attempt(run, done.steps, lambda: saver.save(done.steps, run.engine.shards(), contents), last=last)


def _attempt(run: Run, step: int, action: Callable[[], None], *, last: bool = False) -> None:
    """Save, or hear of the save of ``step``; what the disk refuses is said, where there is a later save to come."""
    try:
        action()
    except ResourceError as error:
        if last or run.job.checkpoint.on_failure == "stop":
            raise
        _say(run, f"step {step}: a checkpoint could not be saved, and checkpoint.on_failure=continue: {error}")


def _contents(run: Run, done: Cursor, anomalies: Anomalies, metrics: Mapping[str, float] | None = None) -> Contents:
    """What a checkpoint says beside its tensors. ``state`` is equal on every topology; ``about`` tells of this one."""
    data = {"path": run.job.data.path, "sha256": run.data.summary.source_sha256, "rows": run.data.rows}
    state = {
        "step": done.steps,
        "samples_consumed": done.samples,
        "optimizer_steps": run.engine.optimizer_steps,
        "seed": run.job.seed,
        "rng": "derived from the seed, the sample and the tensor's name: there is no generator state",
        "schedule": _schedule(run.job),
        "data": data,
    }
    about = {
        "topology": asdict(run.plan.topology),
        "precision": run.plan.precision,
        "model": run.job.model.path,
        "base": run.base,
        "seed": run.job.seed,
        "data": data,
        "quantise": run.job.tuner.quantise,
        "plan": {name: getattr(run.plan, name) for name in TOLD_OF_PLAN},
        "metrics": dict(metrics or {}),
        "losses": list(anomalies.losses),
        "job": meaning(run.job),
    }
    return Contents(run.room.name, state, run.room.files, about)


def _schedule(job: JobConfig) -> dict[str, Any]:
    """The optimizer's settings, without where its state lies."""
    settings = asdict(job.optimizer) | {"steps": job.steps}
    del settings["distributed"]
    return settings


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


def _learn(run: Run, anomalies: Anomalies, batches: Sequence[MicroBatch], rate: float, step: int) -> StepResult:
    """One step. What should not be learned from is computed once more: a fault of a machine does not come again."""
    result = run.engine.train_step(batches, rate, anomalies.accepts)
    anomaly = anomalies.found(result.loss, result.grad_norm)
    if anomaly is not None and result.applied:
        _say(run, f"step {step}: {anomaly.words}; anomalies.spike=warn: learned from all the same")
    elif anomaly is not None:
        result = run.engine.train_step(batches, rate, anomalies.accepts)
        if result.applied:
            words = f"computed again, the loss is {result.loss:g}: a machine erred, not the data"
            _say(run, f"step {step}: {anomaly.words}; {words}")
    if result.applied:
        anomalies.learned(result.loss)
    return result


def _skip_or_leave(run: Run, anomalies: Anomalies, saver: Saver, result: StepResult, done: Cursor) -> None:
    """Say what is done about a step that nothing was learned from; what is not skipped ends here.

    Raises:
        GaveUp: the job says to stop, or too many steps in a row were skipped. Rewound: it says to go back.
    """
    anomaly = anomalies.found(result.loss, result.grad_norm)
    assert anomaly is not None
    words = f"step {done.steps}: {anomaly.words}"
    if anomaly.policy == "rewind":
        _attempt(run, saver.last_step, saver.finish)
        step = latest_step(run.run_dir) or 0
        if run.metrics is not None:
            note_rewind(run.run_dir, step, done.samples)
        dist.barrier(group=run.cpu_group)  # nobody leaves before it is written
        raise Rewound(f"{words}; back to step {step}, and on with sample {done.samples + 1}")
    if anomaly.policy == "stop" or anomalies.skipped_too_many():
        limit = run.job.anomalies.limit
        many = "" if anomaly.policy == "stop" else f", after {limit} steps skipped in a row (anomalies.limit={limit})"
        raise GaveUp(
            f"{words}{many}; nothing of this step was saved",
            f"isotrain resume {run.run_dir} optimizer.lr={run.job.optimizer.lr / 10:g}   (goes on from the newest "
            "checkpoint; without one: isotrain train with that and another run_dir)",
        )
    _say(run, f"{words}; skipped: nothing is learned from it")


def _say(run: Run, words: str) -> None:
    if run.metrics is not None:
        print(words, file=sys.stderr, flush=True)


def _agree(run: Run, step: int, *here: float) -> list[float]:
    """The most of each over all ranks; the same answer on every rank. Slow ranks are told of on the way."""
    numbers = run.stragglers.numbers(step) if run.stragglers is not None else []
    told = torch.tensor([*here, *numbers], dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=run.cpu_group)
    most: list[float] = told.tolist()
    for slow in run.stragglers.heard(most[len(here) :]) if run.stragglers is not None else ():
        _say(run, f"step {step}: {slow.words(host_of(run.run_dir, slow.rank))}")
    return most[: len(here)]
