"""``torchrun ... -m orchestrator train KEY=VALUE ...``: ranks that somebody else has started, as many as there are.

Under ``--nnodes MIN:MAX`` torchrun starts all ranks again when a node has come or gone; every start is planned anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from launch.beat import wish
from launch.environment import RankEnvironment, restarts_in_one_store
from launch.exits import clear_exits, first_cause, read_exits
from launch.parent import die_with_parent
from launch.states import clear_states
from launch.stop import StopRequest
from launch.watch import LISTEN_EVERY_S, Watch
from orchestrator.commands import check_files, ended, make_folder, plan_job, run_folder
from orchestrator.config.building import read_job
from orchestrator.config.job import JobConfig, RecoveryConfig
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.jobs.nodes import plan_on, spare_nodes
from orchestrator.locking import locked
from orchestrator.opening import open_store, open_world, read_asked, share, this_rank
from orchestrator.recovery import patience, progress
from orchestrator.runs import decide_train, is_ours, write_run
from orchestrator.supervise import Explanation, explain, guarded, leave_process, leave_word
from parallel.specs import SpecError

OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d"
OVER = "isotrain/over"  # in the launch's store: the code with which the run has ended, for ranks that stand by
DISMISSED = "isotrain/dismissed"  # how many of them have read it
DISMISSAL_S, ASK_EVERY_S = 10, 0.5


def train_by_hand(overrides: Sequence[str], as_json: bool = False) -> int:
    """Train as one of torchrun's ranks: the first one composes and plans, the others are told.

    Returns:
        The exit code. An error before training ends all ranks alike: the first one raises it, the others just return
        its code, and each leaves it in ``exits/`` where the run folder is ours to write in.
    """
    die_with_parent(signal.SIGTERM)  # torchrun's ranks train on when it is killed
    me = this_rank()
    _refuse_restarts_in_one_store()
    store = open_store(me)
    open_world(me, "cpu", me.world_size, dist.PrefixStore("prepare", store))
    with ExitStack() as stack:
        (run_dir, decided), error = share(me, lambda: prepare(overrides, *_started(me), stack), (Path(), ""))
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
            if me.local_rank == 0:
                _watch(run_dir, me.rank, read_job(run_dir).recovery)
            code = guarded(run_dir, me.rank, lambda: _train_or_stand_by(run_dir, me, store))
            if me.rank == 0:
                _note_end(run_dir, started, code)
                _dismiss(store, me.world_size - read_asked(run_dir).plan.ranks_used, code)
        if report is not None:
            cause = first_cause(read_exits(run_dir)) if code else None
            with report:
                print(json.dumps(ended(run_dir, read_job(run_dir).steps, code, cause).summary()), file=report)
        leave_process(code)
    return code


def prepare(overrides: Sequence[str], nodes: int, ranks_per_node: int, stack: ExitStack) -> tuple[Path, str]:
    """What the first rank does before training: decide, plan for the ranks there are, write.

    Args:
        nodes, ranks_per_node: what torchrun has started; it counts instead of the job's ``cluster``. Of a job with a
            range of nodes some may stay idle.
        stack: holds the lock of the run folder from now on.
    Returns:
        The run folder, and ``start``, ``resume`` or ``finished``.
    Raises:
        ConfigError: as :func:`orchestrator.commands.train`.
    """
    job = compose_job(overrides)
    if job.run_dir is None:
        raise ConfigError("torchrun by hand needs run_dir", "run_dir=runs/NAME")
    run_dir = run_folder(job)
    decision = decide_train(run_dir, job)
    if decision.kind != "finished":
        check_files(job, decision.kind)
        started = dataclasses.replace(job.cluster, nodes=nodes, gpus_per_node=ranks_per_node)
        try:
            planned = plan_on(dataclasses.replace(job, cluster=started), nodes)
        except (ConfigError, SpecError) as error:
            raise _too_few_started(job, nodes * ranks_per_node) or error from error
        make_folder(run_dir)
        stack.enter_context(locked(run_dir))
        write_run(run_dir, job, planned.plan.to_json())
        for line in filter(None, (planned.words, spare_nodes(planned, nodes))):
            print(line, file=sys.stderr, flush=True)
        clear_exits(run_dir)
        clear_states(run_dir)
        wish(run_dir, "")
    print(decision.message, file=sys.stderr, flush=True)
    return run_dir, decision.kind


def asked_run_dir(overrides: Sequence[str]) -> Path | None:
    """The ``run_dir`` among overrides that need not be right, so that their error can be left in ``exits/``.

    Example:
        >>> asked_run_dir(["stps=3", "run_dir=/scratch/run"])
        PosixPath('/scratch/run')
    """
    asked = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith("run_dir=")]
    return Path(asked[-1].strip("'\"")).expanduser().absolute() if asked and asked[-1] else None


def _refuse_restarts_in_one_store() -> None:
    """Of torch 2.13 ranks that are started again find the addresses of those before them, and wait for the dead.

    Raises:
        ConfigError: torchrun would do that.
    """
    if restarts := restarts_in_one_store():
        raise ConfigError(
            f"torchrun --max-restarts {restarts} lets ranks that it starts again meet in the store of those before; "
            "from there gloo does not come back",
            f"{OWN_STORES} --max-restarts {restarts} ...   or   isotrain train ..., which starts them again itself",
        )


def _too_few_started(job: JobConfig, world_size: int) -> ConfigError | None:
    """Where the job would work with the ranks of its own cluster: the error that asks to start as many."""
    try:
        wanted = plan_job(job).plan.ranks_used
    except (ConfigError, SpecError):
        return None
    if wanted <= world_size:
        return None
    return ConfigError(
        f"the job needs {wanted} ranks, but torchrun has started {world_size}",
        f"torchrun --nproc-per-node {wanted} -m orchestrator train ...",
    )


def _started(me: RankEnvironment) -> tuple[int, int]:
    """Nodes and ranks per node, as torchrun has started them; nodes of different sizes count as one."""
    nodes, rest = divmod(me.world_size, me.local_world_size)
    return (1, me.world_size) if rest else (nodes, me.local_world_size)


def _watch(run_dir: Path, rank: int, recovery: RecoveryConfig) -> None:
    """End this process where a rank hangs, as torchrun looks for ranks that have ended; others that wait follow."""
    watch = Watch(run_dir, patience(recovery), lambda: progress(run_dir))

    def look() -> None:
        while (found := watch.hang()) is None:
            time.sleep(LISTEN_EVERY_S)
        hung = found.exit
        print(hung.message, file=sys.stderr, flush=True)
        leave_word(run_dir, rank, Explanation(hung.code, hung.cause, hung.message, hung.hint))
        leave_process(hung.code)

    threading.Thread(target=look, name="watch", daemon=True).start()


def _train_or_stand_by(run_dir: Path, me: RankEnvironment, store: dist.Store) -> int:
    """The work of a rank; one that the plan does not use waits for the run's end, whose code it returns.

    An agent whose ranks have ended leaves torchrun's rendezvous, so that its node would not be there when another is
    lost.
    """
    from orchestrator.worker import main

    used = read_asked(run_dir).plan.ranks_used
    if me.rank < used:
        return main(run_dir, store)
    print(f"rank {me.rank} is idle: the plan uses {used} of {me.world_size} ranks", flush=True)
    stop = StopRequest.installed()
    while not store.check([OVER]):
        if stop.requested:
            return int(ExitCode.INTERRUPTED)
        time.sleep(ASK_EVERY_S)
    code = int(store.get(OVER))
    store.add(DISMISSED, 1)
    return code


def _dismiss(store: dist.Store, waiting: int, code: int) -> None:
    """Tell the ranks that stand by how the run has ended, and stay until they know: the store may end with this one."""
    store.set(OVER, str(code))
    until = time.monotonic() + DISMISSAL_S
    while store.add(DISMISSED, 0) < waiting and time.monotonic() < until:
        time.sleep(ASK_EVERY_S)


def _note_end(run_dir: Path, started: float, code: int) -> None:
    """What else a launcher does: write down how this launch has ended, and the run's page."""
    from orchestrator.history import note_launch
    from orchestrator.pages.run_page import report_end

    cause = first_cause(read_exits(run_dir)) if code else None
    note_launch(run_dir, started, code, cause)
    report_end(run_dir)
