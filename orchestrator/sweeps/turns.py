"""One rank of several points' launch: one base, and a step of each point in turn.

All ranks take the same turns, because all that ends a point or sends it back is known to all of them alike.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from orchestrator.errors import ExitCode, GaveUp, Rewound
from orchestrator.loop import steps
from orchestrator.opening import (
    Asked,
    World,
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
from orchestrator.recovery import Tries
from orchestrator.runs import latest_step
from orchestrator.stragglers import OwnTime, Stragglers
from orchestrator.supervise import Explanation, explain, leave_word, orderly_end
from orchestrator.sweeps.bundle import OF_ONE_POINT, is_over, read_bundle
from parallel.engines.megatron_base import SharedBase


def main(folder: Path) -> int:
    """Train as one rank of the points that the launch's ``folder`` names; returns an exit code.

    Raises:
        IsotrainError: says what is wrong. A point whose own fault it is has it in its ``exits/`` too.
    """
    me, run_dirs = this_rank(), read_bundle(folder)
    plan = read_asked(run_dirs[0]).plan
    open_world(me, plan.device, plan.ranks_used, dist.PrefixStore("train", open_store(me)))
    try:
        return int(train_in_turns(join_world(me, folder, plan.topology), run_dirs))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train_in_turns(world: World, run_dirs: Sequence[Path]) -> ExitCode:
    """Train runs of one base and one layout, each after its newest checkpoint; all ranks call it.

    Those that are over already (in an earlier start of the same launch) are left out.

    Returns:
        INTERRUPTED where a run was, else DONE; how each has ended is in its ``exits/``.
    """
    nothing: list[Path] = []
    left, problem = share(world.me, lambda: [one for one in run_dirs if not is_over(one)], nothing, world.cpu_group)
    if problem is not None:
        raise problem
    if not left:
        return ExitCode.DONE
    asked = [read_asked(run_dir) for run_dir in left]
    plan, own, shared = asked[0].plan, OwnTime(), SharedBase()
    stragglers = _StragglersInTurns(world.me.rank, plan.ranks_used, plan.topology.groups("tp-cp-dp"), own)
    base = base_of(world, asked[0].job)
    points = [_Point(world, one, base, stragglers, shared) for one in asked]
    for point in points:
        point.open()
    with own:
        codes = take_turns(points)
    return ExitCode.INTERRUPTED if ExitCode.INTERRUPTED in codes else ExitCode.DONE


def take_turns(points: Sequence[_Point]) -> list[int]:
    """A step of each point in turn until all are over; how each has ended, in the order of their ends."""
    codes, waiting = list[int](), deque(points)
    while waiting:
        point = waiting.popleft()
        code = point.turn()
        if code is None:
            waiting.append(point)
        else:
            codes.append(code)
    return codes


class _Point:
    """One run among several; ``shared`` keeps the base that all of them have."""

    def __init__(
        self, world: World, asked: Asked, base: str | None, stragglers: Stragglers, shared: SharedBase
    ) -> None:
        self._world, self._asked = world, asked
        self._base, self._stragglers, self._shared = base, stragglers, shared
        self._tries = Tries(asked.job.recovery.restarts, self._saved())

    def open(self) -> None:
        """Open what it trains with, after its newest checkpoint; all ranks call it."""
        try:
            self._run, start = open_run(self._world, self._asked, self._base, self._stragglers, self._shared)
        except Exception as error:
            self._blame(error)
            raise
        self._steps = steps(self._run, start, self._world.stop)

    def turn(self) -> int | None:
        """One step; the point's exit code where it is over."""
        try:
            next(self._steps)
        except StopIteration as end:
            return self._leave(orderly_end(self._world.me.rank, int(end.value)))
        except GaveUp as error:
            return self._leave(explain(error))
        except Rewound as error:
            return self._go_back(error)
        except Exception as error:
            self._blame(error)
            raise
        return None

    def _go_back(self, error: Rewound) -> int | None:
        """As when all ranks are started again, but for this point alone; the others keep what they have."""
        restarts, step = self._asked.job.recovery.restarts, self._saved()
        if restarts == 0:
            return self._leave(explain(error))
        if not self._tries.again(step):
            times = f"{restarts + 1} times without a new checkpoint after step {step}"
            return self._leave(Explanation(int(ExitCode.GAVE_UP), "Rewound", f"{error}; {times}: given up", error.hint))
        self._run.say(str(error))
        self._close()
        self.open()
        return None

    def _saved(self) -> int:
        step, problem = share(self._world.me, lambda: latest_step(self._asked.run_dir) or 0, 0, self._world.cpu_group)
        if problem is not None:
            raise problem
        return step

    def _leave(self, end: Explanation) -> int:
        self._close()
        dist.barrier(group=self._world.cpu_group)  # a word that it is over is true of all ranks
        leave_word(self._asked.run_dir, self._world.me.rank, end)
        return end.code

    def _close(self) -> None:
        close_run(self._run)
        self._run.engine.close()
        del self._run, self._steps
        gc.collect()  # megatron-core's buffers and parameters name each other

    def _blame(self, error: Exception) -> None:
        """Say in the point's own folder that it has ended all ranks, so that they are started again without it."""
        explanation = explain(error)
        if explanation.code in OF_ONE_POINT:
            leave_word(self._asked.run_dir, self._world.me.rank, explanation)


class _StragglersInTurns(Stragglers):
    """Counts the steps of all points together, as their time is."""

    _turn = 0

    def numbers(self, step: int) -> list[float]:
        self._turn += 1
        return super().numbers(self._turn)
