"""On a rank: from its environment and a run folder to what the loop trains with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from launch.environment import (
    RankEnvironment,
    isotrain_cache,
    meeting_place,
    rank_environment,
    wanted_threads,
)
from launch.meeting import meet
from launch.states import preparing
from launch.stop import StopRequest
from orchestrator.assemble import load_adapter, open_engine, room
from orchestrator.checkpoint.base import fingerprint
from orchestrator.config.building import read_job
from orchestrator.config.job import JobConfig
from orchestrator.data import TokenisedData, prepare
from orchestrator.errors import ConfigError, IsotrainError
from orchestrator.locking import still_mine
from orchestrator.metrics import Metrics
from orchestrator.models import model_spec, resolve_model
from orchestrator.pace import Pace
from orchestrator.planning.plan import Plan
from orchestrator.progress import Named
from orchestrator.restoring import Restoring, restore
from orchestrator.stragglers import Stragglers
from orchestrator.training import Cursor, Run
from parallel.device import backend, peak_memory_bytes
from parallel.groups import Groups, open_groups
from parallel.topology import Topology

if TYPE_CHECKING:
    from parallel.engines.megatron_base import SharedBase

Value = TypeVar("Value")
PEER_TIMEOUT = timedelta(minutes=10)
DATA_TIMEOUT = timedelta(hours=12)  # tokenising a large file on the first rank, while the others wait


@dataclass(frozen=True)
class World:
    """What the ranks of a launch have in common, whatever they train.

    ``folder``: where they say how they are. ``cpu_group``: checkpoints, data and stopping need no accelerator.
    """

    me: RankEnvironment
    folder: Path
    groups: Groups
    cpu_group: Any
    stop: StopRequest


@dataclass(frozen=True)
class Asked:
    """What a run folder asks of a rank; ``guard`` raises when the folder has become another launch's."""

    job: JobConfig
    plan: Plan
    run_dir: Path
    guard: Callable[[], None] = lambda: None


def this_rank() -> RankEnvironment:
    """Who this process is.

    Raises:
        ConfigError: nobody has started it as a rank.
    """
    me = rank_environment()
    if me is None:
        raise ConfigError("a worker needs RANK and WORLD_SIZE in its environment", "isotrain train ...")
    return me


def open_store(me: RankEnvironment) -> dist.Store:
    """The key-value store of the launch; all started ranks call it."""
    if place := meeting_place():
        return meet(*place, me, PEER_TIMEOUT)
    store: dist.Store = next(dist.rendezvous("env://", me.rank, me.world_size, timeout=PEER_TIMEOUT))[0]
    return store


def open_world(me: RankEnvironment, device: str, ranks: int, store: dist.Store) -> None:
    """Open the default process group over the first ``ranks`` ranks."""
    if device == "cuda":
        torch.cuda.set_device(me.local_rank)
    if threads := wanted_threads():
        torch.set_num_threads(threads)
    dist.init_process_group(backend(device), store=store, rank=me.rank, world_size=ranks, timeout=PEER_TIMEOUT)


def read_asked(run_dir: Path) -> Asked:
    """Read the job and the plan of a run folder.

    Raises:
        ConfigError, DataError: there is none, or it cannot be read.
    """
    plan = Plan.from_json((run_dir / "plan.json").read_text(encoding="utf-8"))
    return Asked(read_job(run_dir), plan, run_dir, still_mine(run_dir))


def join_world(me: RankEnvironment, folder: Path, topology: Topology) -> World:
    """Open the groups of a topology in the default process group; all its ranks call it."""
    stop = StopRequest.installed()
    groups = open_groups(topology, me.rank)
    return World(me, folder, groups, dist.new_group(backend="gloo", timeout=PEER_TIMEOUT), stop)


def open_run(
    world: World, asked: Asked, base: str | None, stragglers: Stragglers, shared: SharedBase | None = None
) -> tuple[Run, Cursor]:
    """Open what a rank trains with, and go on from the newest checkpoint where there is one; all ranks call it.

    Args:
        base: the fingerprint of an adapter's model.
        shared: the frozen weights that several runs in these processes have in common.
    """
    me, job, plan, run_dir = world.me, asked.job, asked.plan, asked.run_dir
    name = run_dir.name if shared is not None else ""
    data = _open_data(world, job, name)
    engine = open_engine(job, plan, world.groups, shared)
    start = restore(engine, me.rank, Restoring(job, run_dir, data.summary.source_sha256, base, world.cpu_group))
    if not start.steps:
        load_adapter(job, engine)
    metrics = _open_metrics(asked, start.steps, name) if me.rank == 0 else None
    beside = room(job, model_spec(job.model))
    run = Run(
        job=job,
        plan=plan,
        run_dir=run_dir,
        groups=world.groups,
        cpu_group=world.cpu_group,
        engine=engine,
        data=data,
        room=beside.read() if me.rank == 0 else beside,  # the first rank writes them
        metrics=metrics,
        guard=asked.guard,
        base=base,
        pace=Pace(run_dir, me.rank, partial(peak_memory_bytes, plan.device)),
        stragglers=stragglers,
        name=name,
    )
    return run, start


def close_run(run: Run) -> None:
    """Write what a rank knows of its steps, and close its metrics."""
    if run.pace is not None:
        run.pace.write()
    if run.metrics is not None:
        run.metrics.close()


def base_of(world: World, job: JobConfig) -> str | None:
    """Which weights the adapter belongs to; None where the run has no other weights than its own or random ones."""
    if job.tuner.name == "full" or job.model.weights == "random":
        return None
    base, problem = share(world.me, lambda: fingerprint(resolve_model(job.model.path)), "", world.cpu_group)
    if problem is not None:
        raise problem
    return base


def share(
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


def _open_metrics(asked: Asked, completed: int, name: str) -> Metrics:
    from orchestrator.detection.cluster import found_cluster
    from orchestrator.planning.advice import peak_tokens_per_s

    job, plan = asked.job, asked.plan
    peak = peak_tokens_per_s(job, model_spec(job.model), plan.cluster or found_cluster(job.cluster), plan)
    stream: Any = Named(sys.stderr, name) if name else None
    return Metrics(job.metrics, asked.run_dir, job.steps, completed + 1, stream, peak)


def _open_data(world: World, job: JobConfig, name: str) -> TokenisedData:
    """Tokenise on the first rank of each node (or find it done), then map the tokens on every rank."""
    cache, me = isotrain_cache() / "tokens", world.me
    folder = resolve_model(job.model.path)

    def prepared() -> TokenisedData:
        return prepare(job.data, job.objective, folder, job.batch.sequence_tokens, cache)

    data = None
    if me.local_rank == 0:
        with preparing(world.folder, me.rank):
            data = prepared()
    dist.monitored_barrier(group=world.cpu_group, timeout=DATA_TIMEOUT)
    data = data or prepared()
    if me.rank == 0:
        for line in [data.summary.epochs(job.steps, job.batch.global_sequences), *data.summary.messages()]:
            print(f"{name}: {line}" if name else line, file=sys.stderr, flush=True)
    return data
