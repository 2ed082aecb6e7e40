"""A run's checkpoints: what goes into them, and what is done where the disk refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.retention import Retention
from orchestrator.checkpoint.save import SavePolicy
from orchestrator.checkpoint.saver import Saver
from orchestrator.config.building import meaning
from orchestrator.config.job import JobConfig
from orchestrator.errors import ResourceError
from orchestrator.training import Cursor, Run
from parallel.engine import StepResult

TOLD_OF_PLAN = (
    *("vpp", "sp", "stages", "micro_batches", "micro_sequences", "global_sequences", "recompute", "distributed"),
    "engine",
)


def open_saver(run: Run) -> Saver:
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


def save(run: Run, saver: Saver, done: Cursor, result: StepResult, *, last: bool) -> None:
    """Save the training state at ``done``; every rank calls it.

    Raises:
        ResourceError: the disk refuses this save or (asynchronous) the one before, and the job says to stop then, or
            there is no later save.
    """
    metrics = {"loss": result.loss, "grad_norm": result.grad_norm} if result.applied else {}
    contents = contents_at(run, done, metrics)
    attempt(run, saver.last_step, saver.finish)
    attempt(run, done.steps, lambda: saver.save(done.steps, run.engine.shards(), contents), last=last)


def attempt(run: Run, step: int, action: Callable[[], None], *, last: bool = False) -> None:
    """Save, or hear of the save of ``step``; what the disk refuses is said, where there is a later save to come."""
    try:
        action()
    except ResourceError as error:
        if last or run.job.checkpoint.on_failure == "stop":
            raise
        run.say(f"step {step}: a checkpoint could not be saved, and checkpoint.on_failure=continue: {error}")


def contents_at(run: Run, done: Cursor, metrics: Mapping[str, float] | None = None) -> Contents:
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
        "losses": list(done.losses),
        "job": meaning(run.job),
    }
    return Contents(run.room.name, state, run.room.files, about)


def _schedule(job: JobConfig) -> dict[str, Any]:
    """The optimizer's settings, without where its state lies."""
    settings = asdict(job.optimizer) | {"steps": job.steps}
    del settings["distributed"]
    return settings
