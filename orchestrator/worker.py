"""One rank of a run: reads the job and the plan, opens groups, engine and data, and trains."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from launch.environment import RankEnvironment, ledger_file
from launch.exits import first_cause, read_exits
from orchestrator.config.building import read_job
from orchestrator.errors import ConfigError, ExitCode
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
    share,
    this_rank,
)
from orchestrator.stragglers import OwnTime, Stragglers
from orchestrator.training import Run
from parallel.device import peak_memory_bytes


def main(run_dir: Path, store: dist.Store | None = None) -> int:
    """Train as one rank of the run that ``job.yaml`` and ``plan.json`` of ``run_dir`` describe; returns an exit code.

    The default process group has exactly the ranks that the plan uses, because megatron-core gathers over it; a rank
    beyond them (of a launch by hand) has nothing to do and leaves.

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
    if me.rank >= plan.ranks_used:
        print(f"rank {me.rank} is idle: the plan uses {plan.ranks_used} of {me.world_size} ranks", flush=True)
        return int(ExitCode.DONE)
    open_world(me, plan.device, plan.ranks_used, dist.PrefixStore("train", store))
    try:
        return _train_rank(me, asked)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main_by_hand(overrides: Sequence[str], as_json: bool = False) -> int:
    """``torchrun ... -m orchestrator train KEY=VALUE ...``: the first rank composes and plans, the others are told.

    Returns:
        The exit code. An error before training ends all ranks alike: the first one raises it, the others just return
        its code, and each leaves it in ``exits/`` where the run folder is ours to write in.
    """
    from orchestrator.commands import asked_run_dir, ended, prepare_by_hand
    from orchestrator.runs import is_ours
    from orchestrator.supervise import explain, guarded, leave_process, leave_word

    me = this_rank()
    store = open_store(me)
    open_world(me, "cpu", me.world_size, dist.PrefixStore("prepare", store))
    with ExitStack() as stack:
        (run_dir, decided), error = share(me, lambda: prepare_by_hand(overrides, *_started(me), stack), (Path(), ""))
        if error is not None:
            asked = asked_run_dir(overrides)
            (ours, _) = share(me, lambda: asked is not None and is_ours(asked), False)
            if ours and asked is not None:
                leave_word(asked, me.rank, explain(error))
            dist.barrier()  # or torchrun ends those that have not yet left their word
        dist.destroy_process_group()
        if error is not None:
            if me.rank == 0:
                raise error
            return int(explain(error).code)
        report = os.fdopen(os.dup(1), "w") if as_json and me.rank == 0 else None  # the log takes over 1 and 2
        code = 0
        if decided != "finished":
            started = time.time()
            code = guarded(run_dir, me.rank, lambda: main(run_dir, store))
            if me.rank == 0:
                _note_end(run_dir, started, code)
        if report is not None:
            cause = first_cause(read_exits(run_dir)) if code else None
            with report:
                print(json.dumps(ended(run_dir, read_job(run_dir).steps, code, cause).summary()), file=report)
        leave_process(code)
    return code


def _note_end(run_dir: Path, started: float, code: int) -> None:
    """What else a launcher does: write down how this launch has ended, and the run's page."""
    from orchestrator.history import note_launch
    from orchestrator.pages.run_page import report_end

    cause = first_cause(read_exits(run_dir)) if code else None
    note_launch(run_dir, started, code, cause)
    report_end(run_dir)


def _started(me: RankEnvironment) -> tuple[int, int]:
    """Nodes and ranks per node, as torchrun has started them; nodes of different sizes count as one."""
    nodes, rest = divmod(me.world_size, me.local_world_size)
    return (1, me.world_size) if rest else (nodes, me.local_world_size)


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
