"""A run on the ranks of a pool, one of which takes its time."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any


def train_with_a_slow_rank(run_dir: str, rows: str, rank: int, pause_s: float) -> str:
    """Train the run of ``run_dir``, where ``rank`` sleeps before each step; what this rank says to the user."""
    import torch.distributed as dist

    from launch.states import enter, leave
    from launch.stop import StopRequest
    from orchestrator.assemble import open_engine, room
    from orchestrator.config.building import read_job
    from orchestrator.data.store import TokenisedData
    from orchestrator.loop import train
    from orchestrator.metrics import Metrics
    from orchestrator.models import model_spec
    from orchestrator.planning.plan import Plan
    from orchestrator.stragglers import OwnTime, Stragglers
    from orchestrator.training import Cursor, Run
    from parallel.groups import open_groups

    folder, me = Path(run_dir), dist.get_rank()
    job, plan = read_job(folder), Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    groups = open_groups(plan.topology, me)
    engine: Any = open_engine(job, plan, groups)
    metrics = Metrics(job.metrics, folder, job.steps) if me == 0 else None
    own = OwnTime()
    stragglers = Stragglers(me, plan.ranks_used, plan.topology.groups("tp-cp-dp"), own)
    data, files = TokenisedData.open(Path(rows)), room(job, model_spec(job.model))
    cpu_group: Any = dist.new_group(backend="gloo")
    parts: list[Any] = [job, plan, folder, groups, cpu_group, engine, data, files, metrics]
    if me == rank:
        engine.train_step = _after(pause_s, engine.train_step)
    enter(folder, me)
    with contextlib.redirect_stderr(io.StringIO()) as said, own:
        train(Run(*parts, stragglers=stragglers), Cursor(), StopRequest())
    leave(folder, me)
    groups.close()
    return said.getvalue()


def _after(pause_s: float, step: Any) -> Any:
    def slowly(*arguments: Any) -> Any:
        time.sleep(pause_s)
        return step(*arguments)

    return slowly
