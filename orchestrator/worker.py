"""One rank of a run: reads the job and the plan, opens groups, engine and data, and trains."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.environment import (
    RankEnvironment,
    isotrain_cache,
    ledger_file,
    meeting_place,
    rank_environment,
    wanted_threads,
)
from launch.exits import first_cause, read_exits
from launch.meeting import meet
from launch.states import preparing
from launch.stop import StopRequest
from orchestrator.assemble import load_adapter, open_engine, room
from orchestrator.checkpoint.base import fingerprint
from orchestrator.config.building import read_job
from orchestrator.config.job import JobConfig
from orchestrator.data import TokenisedData, prepare
from orchestrator.errors import ConfigError, ExitCode, IsotrainError
from orchestrator.ledger import append, likeness, measured, steps_of
from orchestrator.locking import still_mine
from orchestrator.loop import train
from orchestrator.metrics import Metrics
from orchestrator.models import model_spec, resolve_model
from orchestrator.pace import Pace
from orchestrator.planning.plan import Plan
from orchestrator.restoring import Restoring, restore
from orchestrator.stragglers import OwnTime, Stragglers
from orchestrator.training import Run
from parallel.device import backend, peak_memory_bytes
from parallel.groups import open_groups

Value = TypeVar("Value")
PEER_TIMEOUT = timedelta(minutes=10)


DATA_TIMEOUT = timedelta(hours=12)  # tokenising a large file on the first rank, while the others wait


def main(run_dir: Path, store: dist.Store | None = None) -> int:
    """Train as one rank of the run that ``job.yaml`` and ``plan.json`` of ``run_dir`` describe; returns an exit code.

    The default process group has exactly the ranks that the plan uses, because megatron-core gathers over it; a rank
    beyond them (of a launch by hand) has nothing to do and leaves.

    Args:
        store: the launch's store where it is open already.
    Raises:
        IsotrainError: says what is wrong; its ``code`` is the exit code.
    """
    me, guard = _me(), still_mine(run_dir)
    job, plan = read_job(run_dir), Plan.from_json((run_dir / "plan.json").read_text(encoding="utf-8"))
    if me.world_size < plan.ranks_used:
        raise ConfigError(
            f"the plan uses {plan.ranks_used} ranks ({plan.topology}), but {me.world_size} were started",
            f"torchrun --nproc-per-node {plan.ranks_used} ...",
        )
    store = store or _open_store(me)
    if me.rank >= plan.ranks_used:
        print(f"rank {me.rank} is idle: the plan uses {plan.ranks_used} of {me.world_size} ranks", flush=True)
        return int(ExitCode.DONE)
    _open_world(me, plan.device, plan.ranks_used, dist.PrefixStore("train", store))
    try:
        return _train_rank(me, job, plan, run_dir, guard)
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

    me = _me()
    store = _open_store(me)
    _open_world(me, "cpu", me.world_size, dist.PrefixStore("prepare", store))
    with ExitStack() as stack:
        (run_dir, decided), error = _share(me, lambda: prepare_by_hand(overrides, *_started(me), stack), (Path(), ""))
        if error is not None:
            asked = asked_run_dir(overrides)
            (ours, _) = _share(me, lambda: asked is not None and is_ours(asked), False)
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


def _me() -> RankEnvironment:
    me = rank_environment()
    if me is None:
        raise ConfigError("a worker needs RANK and WORLD_SIZE in its environment", "isotrain train ...")
    return me


def _open_store(me: RankEnvironment) -> dist.Store:
    """The key-value store of the launch; all started ranks call it."""
    if place := meeting_place():
        return meet(*place, me, PEER_TIMEOUT)
    store: dist.Store = next(dist.rendezvous("env://", me.rank, me.world_size, timeout=PEER_TIMEOUT))[0]
    return store


def _open_world(me: RankEnvironment, device: str, ranks: int, store: dist.Store) -> None:
    """Open the default process group over the first ``ranks`` ranks."""
    if device == "cuda":
        torch.cuda.set_device(me.local_rank)
    if threads := wanted_threads():
        torch.set_num_threads(threads)
    dist.init_process_group(backend(device), store=store, rank=me.rank, world_size=ranks, timeout=PEER_TIMEOUT)


def _share(
    me: RankEnvironment, decide: Callable[[], Value], otherwise: Value, group: dist.ProcessGroup | None = None
) -> tuple[Value, Exception | None]:
    """Decide on the first rank: every rank gets the answer, or ``otherwise`` and the error."""
    answer: list[Any] = [otherwise, None]
    if me.rank == 0:
        try:
            answer[0] = decide()
        except (IsotrainError, ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    return answer[0], answer[1]


def _train_rank(me: RankEnvironment, job: JobConfig, plan: Plan, run_dir: Path, guard: Callable[[], None]) -> int:
    """All of a rank's work between opening the world and closing it."""
    stop = StopRequest.installed()
    groups = open_groups(plan.topology, me.rank)
    # Checkpoints, data and stopping need no accelerator.
    cpu_group = dist.new_group(backend="gloo", timeout=PEER_TIMEOUT)
    data = _open_data(me, job, run_dir, cpu_group)
    engine = open_engine(job, plan, groups)
    base = _base(me, job, cpu_group)
    start = restore(engine, me.rank, Restoring(job, run_dir, data.summary.source_sha256, base, cpu_group))
    if not start.steps:
        load_adapter(job, engine)
    metrics = _open_metrics(job, plan, run_dir, start.steps) if me.rank == 0 else None
    pace = Pace(run_dir, me.rank, partial(peak_memory_bytes, plan.device))
    beside = room(job, model_spec(job.model))
    if me.rank == 0:  # which writes them
        beside = beside.read()
    own = OwnTime()
    alike = [list(stage) for stage in plan.topology.groups("tp-cp-dp")]
    stragglers = Stragglers(me.rank, plan.ranks_used, alike, own)
    run = Run(job, plan, run_dir, groups, cpu_group, engine, data, beside, metrics, guard, base, pace, stragglers)
    try:
        with own:
            code = train(run, start, stop)
    finally:
        pace.write()
        if metrics is not None:
            metrics.close()
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


def _open_metrics(job: JobConfig, plan: Plan, run_dir: Path, completed: int) -> Metrics:
    from orchestrator.detection.cluster import found_cluster
    from orchestrator.planning.advice import peak_tokens_per_s

    peak = peak_tokens_per_s(job, model_spec(job.model), plan.cluster or found_cluster(job.cluster), plan)
    return Metrics(job.metrics, run_dir, job.steps, completed + 1, peak_tokens_per_s=peak)


def _open_data(me: RankEnvironment, job: JobConfig, run_dir: Path, cpu_group: dist.ProcessGroup) -> TokenisedData:
    """Tokenise on the first rank of each node (or find it done), then map the tokens on every rank."""
    cache = isotrain_cache() / "tokens"
    folder = resolve_model(job.model.path)

    def prepared() -> TokenisedData:
        return prepare(job.data, job.objective, folder, job.batch.sequence_tokens, cache)

    data = None
    if me.local_rank == 0:
        with preparing(run_dir, me.rank):
            data = prepared()
    dist.monitored_barrier(group=cpu_group, timeout=DATA_TIMEOUT)
    data = data or prepared()
    if me.rank == 0:
        for line in [data.summary.epochs(job.steps, job.batch.global_sequences), *data.summary.messages()]:
            print(line, file=sys.stderr, flush=True)
    return data


def _base(me: RankEnvironment, job: JobConfig, cpu_group: dist.ProcessGroup) -> str | None:
    """Which weights the adapter belongs to; None where the run has no other weights than its own or random ones."""
    if job.tuner.name == "full" or job.model.weights == "random":
        return None
    base, problem = _share(me, lambda: fingerprint(resolve_model(job.model.path)), "", cpu_group)
    if problem is not None:
        raise problem
    return base
