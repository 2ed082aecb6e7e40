"""One rank of a run: reads the job and the plan, opens groups, engine and data, and trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.environment import RankEnvironment, isotrain_cache, rank_environment
from launch.stop import StopRequest
from orchestrator.assemble import open_engine, room
from orchestrator.building import read_job
from orchestrator.checkpoint.load import CheckpointReader, find_latest_good
from orchestrator.data import TokenisedData, prepare
from orchestrator.errors import ConfigError, DataError, ExitCode, IsotrainError
from orchestrator.job import JobConfig
from orchestrator.loop import Run, train
from orchestrator.metrics import Metrics
from orchestrator.models import model_spec, resolve_model
from orchestrator.planning.plan import Plan
from parallel.device import backend
from parallel.groups import Groups, open_groups

Value = TypeVar("Value")
PEER_TIMEOUT = timedelta(minutes=10)


def main(run_dir: Path) -> int:
    """Train as one rank of the run that ``job.yaml`` and ``plan.json`` of ``run_dir`` describe; returns an exit code.

    Raises:
        IsotrainError: says what is wrong; its ``code`` is the exit code.
    """
    me = _me()
    job, plan = read_job(run_dir), Plan.from_json((run_dir / "plan.json").read_text(encoding="utf-8"))
    if me.world_size < plan.ranks_used:
        raise ConfigError(
            f"the plan uses {plan.ranks_used} ranks ({plan.topology}), but {me.world_size} were started",
            f"torchrun --nproc-per-node {plan.ranks_used} ...",
        )
    _open_world(me, plan.device)
    try:
        return _train_rank(me, job, plan, run_dir)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main_by_hand(overrides: Sequence[str]) -> int:
    """``torchrun ... -m orchestrator train KEY=VALUE ...``: the first rank composes and plans, the others are told.

    Returns:
        The exit code. A configuration error ends all ranks alike.
    """
    from orchestrator.supervise import guarded, leave_process

    me = _me()
    _open_world(me, "cuda" if torch.cuda.is_available() else "cpu")
    run_dir, decided = _share(me, lambda: _prepare_run(me, overrides))
    if decided == "finished":
        dist.destroy_process_group()
        return int(ExitCode.DONE)
    with ExitStack() as stack:
        if me.rank == 0:
            from orchestrator.runs import locked

            stack.enter_context(locked(run_dir))
        leave_process(guarded(run_dir, me.rank, lambda: main(run_dir)))
    return 0


def _me() -> RankEnvironment:
    me = rank_environment()
    if me is None:
        raise ConfigError("a worker needs RANK and WORLD_SIZE in its environment", "isotrain train ...")
    return me


def _open_world(me: RankEnvironment, device: str) -> None:
    """Open the default process group over all started ranks, unless it is open."""
    if device == "cuda":
        torch.cuda.set_device(me.local_rank)
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not dist.is_initialized():
        dist.init_process_group(backend(device), rank=me.rank, world_size=me.world_size, timeout=PEER_TIMEOUT)


def _share(me: RankEnvironment, decide: Callable[[], Value]) -> Value:
    """Decide on the first rank; every rank gets the answer, or raises the same error."""
    answer: list[Any] = [None, None]
    if me.rank == 0:
        try:
            answer[0] = decide()
        except (IsotrainError, ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _prepare_run(me: RankEnvironment, overrides: Sequence[str]) -> tuple[Path, str]:
    from orchestrator.commands import prepare_by_hand

    return prepare_by_hand(overrides, me.world_size)


def _train_rank(me: RankEnvironment, job: JobConfig, plan: Plan, run_dir: Path) -> int:
    """All of a rank's work between opening the world and closing it."""
    stop = StopRequest.installed()
    if me.rank >= plan.ranks_used:
        # An idle rank of a by-hand launch: it opens the one group that all ranks must open, and waits for the end.
        _open_cpu_group(plan)
        dist.barrier()
        return int(ExitCode.DONE)
    groups = open_groups(plan.topology, me.rank)
    cpu_group = _open_cpu_group(plan)
    data = _open_data(me, job, cpu_group)
    engine = open_engine(job, plan, groups)
    completed = _restore(engine, me, job, run_dir, data, cpu_group)
    metrics = Metrics(job.metrics, run_dir, job.steps, completed + 1) if me.rank == 0 else None
    run = Run(job, plan, run_dir, groups, cpu_group, engine, data, room(job, model_spec(job.model)), metrics)
    try:
        code = train(run, completed, stop)
    finally:
        if metrics is not None:
            metrics.close()
    if me.world_size > plan.ranks_used:
        dist.barrier()
    return int(code)


def _open_cpu_group(plan: Plan) -> dist.ProcessGroup:
    """A gloo group of the ranks that train: checkpoints, data and stopping need no accelerator."""
    return dist.new_group(list(range(plan.ranks_used)), backend="gloo", timeout=PEER_TIMEOUT)


def _open_data(me: RankEnvironment, job: JobConfig, cpu_group: dist.ProcessGroup) -> TokenisedData:
    """Tokenise on the first rank of each node (or find it done), then map the tokens on every rank."""
    cache = isotrain_cache() / "tokens"
    folder = resolve_model(job.model.path)

    def prepared() -> TokenisedData:
        return prepare(job.data, job.objective, folder, job.batch.sequence_tokens, cache)

    data = prepared() if me.local_rank == 0 else None
    dist.barrier(group=cpu_group)
    data = data or prepared()
    if me.rank == 0:
        for line in data.summary.messages():
            print(line, flush=True)
    return data


def _restore(
    engine: Any, me: RankEnvironment, job: JobConfig, run_dir: Path, data: TokenisedData, cpu_group: dist.ProcessGroup
) -> int:
    """Load the newest good checkpoint, if there is one; returns the steps that it has completed."""
    answer: list[Any] = [None, None]
    if me.rank == 0:
        try:
            reader, messages = find_latest_good(run_dir / "checkpoints") if _has_checkpoints(run_dir) else (None, ())
            for line in messages:
                print(line, flush=True)
            answer[0] = reader.folder if reader is not None else None
        except IsotrainError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=cpu_group)
    if answer[1] is not None:
        raise answer[1]
    if answer[0] is None:
        return 0
    checkpoint = CheckpointReader(answer[0])
    _check_same_data(checkpoint, job, data)
    engine.load(checkpoint, moments=True)
    engine.set_optimizer_steps(int(checkpoint.state["optimizer_steps"]))
    if me.rank == 0:
        print(f"loaded {checkpoint.folder}", flush=True)
    return checkpoint.step


def _has_checkpoints(run_dir: Path) -> bool:
    return (run_dir / "checkpoints").is_dir()


def _check_same_data(checkpoint: CheckpointReader, job: JobConfig, data: TokenisedData) -> None:
    """The cursor of a checkpoint means nothing in other data: refuse a file that was changed under its name."""
    before = checkpoint.state["data"]
    if before["path"] == job.data.path and before["sha256"] != data.summary.source_sha256:
        raise DataError(
            f"data.path={job.data.path} has changed since step {checkpoint.step}: sha256 "
            f"{before['sha256'][:12]} then, {data.summary.source_sha256[:12]} now",
            "restore the file, or name the new one: isotrain resume DIR data.path=OTHER_FILE",
        )
