"""One rank of a run: reads the job and the plan, opens groups, engine and data, and trains."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from launch.environment import RankEnvironment, ledger_file
from orchestrator.errors import ConfigError
from orchestrator.ledger import append, likeness, measured, steps_of
from orchestrator.loop import train
from orchestrator.models import model_spec
from orchestrator.opening import (
    Asked,
    base_of,
    close_run,
    join_world,
    open_run,
    open_store,
    open_world,
    read_asked,
    this_rank,
)
from orchestrator.stragglers import OwnTime, Stragglers
from orchestrator.training import Run
from parallel.device import peak_memory_bytes


def main(run_dir: Path, store: dist.Store | None = None) -> int:
    """Train as one rank of the run that ``job.yaml`` and ``plan.json`` of ``run_dir`` describe; returns an exit code.

    The default process group has exactly the ranks that the plan uses, because megatron-core gathers over it.

    Args:
        store: the launch's store where it is open already.
    Raises:
        IsotrainError: says what is wrong; its ``code`` is the exit code.
    """
    me, asked = this_rank(), read_asked(run_dir)
    plan = asked.plan
    if me.world_size < plan.ranks_used:
        raise ConfigError(
            f"the plan uses {plan.ranks_used} ranks ({plan.topology}), but {me.world_size} were started",
            f"torchrun --nproc-per-node {plan.ranks_used} ...",
        )
    store = store or open_store(me)
    open_world(me, plan.device, plan.ranks_used, dist.PrefixStore("train", store))
    try:
        return _train_rank(me, asked)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train_rank(me: RankEnvironment, asked: Asked) -> int:
    """All of a rank's work between opening the world and closing it."""
    plan = asked.plan
    world = join_world(me, asked.run_dir, plan.topology)
    own = OwnTime()
    stragglers = Stragglers(me.rank, plan.ranks_used, plan.topology.groups("tp-cp-dp"), own)
    run, start = open_run(world, asked, base_of(world, asked.job), stragglers)
    try:
        with own:
            code = train(run, start, world.stop)
    finally:
        close_run(run)
    _note(me, run, start.steps + 1)
    return int(code)


def _note(me: RankEnvironment, run: Run, first_step: int) -> None:
    """Append what this launch took to the ledger; all ranks call it, for each knows its own peak."""
    peak = torch.tensor(peak_memory_bytes(run.plan.device))
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=run.cpu_group)
    file, found = ledger_file(), measured(steps_of(run.run_dir / "metrics.jsonl", first_step), int(peak))
    if me.rank or file is None or found is None:
        return
    problem = append(file, likeness(run.job, model_spec(run.job.model), run.plan), run.plan, found)
    if problem:
        print(problem, file=sys.stderr, flush=True)
