"""``isotrain certify``: every cell of the grid, by several teams of processes at once."""

from __future__ import annotations

import difflib
import os
import queue
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch.pool import Pool
from orchestrator.certify.bench import SEED, STEPS, Bench, Cell, Ready, Train, Trained
from orchestrator.certify.cell import train_cell
from orchestrator.certify.grid import REFERENCE, Layout, layouts
from orchestrator.certify.shrinking import shrunken
from orchestrator.config.job import JobConfig
from orchestrator.config.loading import group_choices
from orchestrator.errors import ConfigError
from orchestrator.models import resolve_model
from orchestrator.planning.experts import dependence_on_cut
from parallel.families import read_model
from parallel.specs import read_hf_config

__all__ = ["SEED", "STEPS", "Cell", "Request", "certify", "small_config", "tuner_rows"]

Tick = Callable[[int, int, str], None]
Places = Mapping[tuple[str, str], Cell]
"""Cells by the names of their tuner and topology."""
MOST_TEAMS = 4  # whose cells one judge can follow


@dataclass(frozen=True)
class Request:
    """What to certify: the user's job, up to how many processes, which tuners, and a piece of the columns' names."""

    job: JobConfig
    ranks: int = 4
    tuners: tuple[str, ...] = ()
    only: str = ""


def small_config(job: JobConfig, ranks: int) -> dict[str, Any]:
    """The small model's ``config.json`` for a job's model; the model's weights are not needed.

    Raises:
        ConfigError, SpecError: the job names no model that we know.
    """
    given = job.model.config
    return shrunken(given if given is not None else read_hf_config(resolve_model(job.model.path)), ranks)


def tuner_rows(asked: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """The rows of the grid by name, with the overrides of each: every tuner there is, and LoRA with dropout.

    GaLore is a row only where it is asked for: it is full tuning, with another optimizer.

    Raises:
        ConfigError: a name that is none.
    """
    rows: dict[str, tuple[str, ...]] = {name: (f"tuner={name}",) for name in group_choices()["tuner"]}
    rows["lora+dropout"] = ("tuner=lora", "tuner.dropout=0.2")
    rows["galore"] = (
        "tuner=full",
        "optimizer.name=galore",
        "optimizer.galore.rank=4",
        "optimizer.galore.update_steps=2",
        "checkpoint.every_steps=1",  # see orchestrator.certify.comparing
    )
    for name in asked:
        if name not in rows:
            raise ConfigError(f"--tuner {name} is none of {', '.join(rows)}", "--tuner lora")
    return {name: words for name, words in rows.items() if name in (asked or rows.keys() - {"galore"})}


def certify(
    request: Request,
    tick: Tick = lambda done, of, name: None,
    pool: Pool | None = None,
    train: Train = train_cell,
    known: Places = MappingProxyType({}),
    keep: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Train and compare every cell; cells of a row are compared with the row's own run in one process.

    Args:
        tick: told before each cell how many are trained, how many there are, and the next one's name.
        pool: processes to use and to leave alive; None: own ones, as many teams as there are cores.
        train: what each rank runs; a test plants its fault here.
        known: cells that need no training any more, by the names of tuner and topology.
        keep: told of each cell as soon as it is judged, from a thread.
    Raises:
        ConfigError, SpecError: the job names no model that we know, nothing is left of the columns, or what is asked of
            experts depends on how a batch is cut.
    """
    if cut := dependence_on_cut(request.job.experts):
        raise ConfigError(
            f"{cut[0]}: no topology need equal one process",
            "experts.balancing_over=sequence experts.capacity_factor=null",
        )
    config = small_config(request.job, request.ranks)
    columns = _columns(request, read_model(config).is_moe)
    rows = tuner_rows(request.tuners)
    with tempfile.TemporaryDirectory(prefix="isotrain-certify-") as name:
        bench = Bench.prepared(Path(name), request.job, config, rows)
        teams = _own_teams(request.ranks, Path(name)) if pool is None else _given(pool)
        with teams as pools, _Crew(bench, pools, train, keep) as crew:
            return _cells(crew, list(rows), columns, known, tick)


def _columns(request: Request, moe: bool) -> list[Layout]:
    """The columns that were asked for.

    Raises:
        ConfigError: there are none.
    """
    if request.ranks < 2:
        raise ConfigError(f"--up-to {request.ranks}: there is no topology of fewer than 2 processes", "--up-to 4")
    columns = layouts(request.ranks, moe)
    found = [one for one in columns if request.only in one.name]
    if not found:
        names = [one.name for one in columns]
        near = difflib.get_close_matches(request.only, names, n=1, cutoff=0.0) or names[:1]
        raise ConfigError(
            f"--only {request.only} leaves no topology of up to {request.ranks} processes", f"--only {near[0]}"
        )
    return found


def _cells(crew: _Crew, tuners: list[str], columns: list[Layout], known: Places, tick: Tick) -> list[Cell]:
    """The rows' runs in one process first, then what is not known of every row, from left to right."""
    places = [(tuner, layout) for tuner in tuners for layout in columns]
    wanted = [(tuner, layout) for tuner, layout in places if (tuner, layout.name) not in known]
    total = len(tuners) + len(wanted)

    def begun(places: Iterable[tuple[str, Layout]], before: int) -> list[Future[Cell]]:
        found = []
        for number, (tuner, layout) in enumerate(places):
            tick(before + max(0, number - crew.size), total, f"{tuner} on {layout.name}")
            found.append(crew.begin(tuner, layout))
        return found

    ones = [each.result() for each in begun(((tuner, REFERENCE) for tuner in tuners), 0)]
    green = {one.tuner for one in ones if one.verdict == "green"}
    found = begun(((tuner, layout) for tuner, layout in wanted if tuner in green), len(tuners))
    now = (*ones, *(each.result() for each in found))
    cells = {place: cell for place, cell in known.items() if place[0] in green}
    cells |= {(cell.tuner, cell.layout.name): cell for cell in now}
    reasons = {one.tuner: one.reason or "one process is red itself" for one in ones}
    tick(total, total, "")
    return [
        cells.get((tuner, layout.name)) or Cell(tuner, layout, "refused", reason=reasons[tuner])
        for tuner in tuners
        for layout in (REFERENCE, *columns)
    ]


class _Crew:
    """Teams that train one cell each, and one judge (transformers is not made for several threads).

    What begins waits for a free team, so that a cell is planned while the ones before it train.
    """

    def __init__(self, bench: Bench, pools: Sequence[Pool], train: Train, keep: Callable[[Cell], None]) -> None:
        self.size = len(pools)
        self._bench, self._train, self._keep = bench, train, keep
        self._free: queue.SimpleQueue[Pool] = queue.SimpleQueue()
        for pool in pools:
            self._free.put(pool)
        self._teams, self._judge = ThreadPoolExecutor(self.size), ThreadPoolExecutor(1)
        self._begun: list[Future[Cell]] = []

    def begin(self, tuner: str, layout: Layout) -> Future[Cell]:
        """Plan a cell, and train it as soon as a team is free."""
        for each in self._begun:
            if each.done():
                each.result()  # raises what a team or the judge raised
        ready = self._bench.ready(tuner, layout)
        pool = self._free.get()
        trained = self._teams.submit(self._trained, ready, pool)
        self._begun.append(self._judge.submit(self._judged, trained))
        return self._begun[-1]

    def _trained(self, ready: Ready | Cell, pool: Pool) -> Trained | Cell:
        try:
            return ready if isinstance(ready, Cell) else self._bench.trained(ready, pool, self._train)
        finally:
            self._free.put(pool)

    def _judged(self, trained: Future[Trained | Cell]) -> Cell:
        found = trained.result()
        cell = found if isinstance(found, Cell) else self._bench.judged(found)
        self._keep(cell)
        return cell

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for each in (self._teams, self._judge):
            each.shutdown(wait=True, cancel_futures=kind is not None)


@contextmanager
def _own_teams(ranks: int, folder: Path) -> Iterator[list[Pool]]:
    """A pool per core: while the ranks of one wait for each other, another's compute."""
    with ExitStack() as stack:
        pools = [Pool(ranks, folder / f"ranks-{team}.log") for team in range(min(os.cpu_count() or 1, MOST_TEAMS))]
        for pool in pools:
            stack.callback(pool.leave)
        yield pools


@contextmanager
def _given(pool: Pool) -> Iterator[list[Pool]]:
    yield [pool]
