"""Sweeps whose points one of Hydra's sweepers chooses, batch by batch: here as processes, on Slurm as arrays."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from orchestrator.commands import Planned, Say, check_device, check_files
from orchestrator.config.building import as_override
from orchestrator.config.grid import Grid
from orchestrator.config.job import JobConfig
from orchestrator.config.loading import compose_job
from orchestrator.config.multirun import common_words, multirun
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.jobs.follow import wait_for
from orchestrator.runs import Decision
from orchestrator.sweeps.array import is_slurms, on_slurm, plan_on_slurm, submit_sweep
from orchestrator.sweeps.book import Book, Metric, Row, key_of, write_book
from orchestrator.sweeps.planning import HYDRAS, PlannedSweep, plan_sweep, sweep_folder
from orchestrator.sweeps.running import exit_code, plan_here, run_here


class PointFailed(Exception):
    """What a sweeper gets instead of a metric; most of them end the sweep then."""


class _Stopped(Exception):
    """The user asked to stop."""


def plan_anywhere(job: JobConfig, decision: Decision) -> Planned:
    """The plan of a point that is to start where its cluster is, on this machine or under Slurm.

    Raises:
        ConfigError, SpecError, LaunchError: it cannot work, or what it needs is not there; says why.
    """
    check_files(job, decision.kind)
    if not is_slurms(job.cluster):
        check_device(job.cluster)
    return plan_only(job, decision)


def plan_only(job: JobConfig, decision: Decision) -> Planned:
    """:func:`plan_anywhere` of a point that is not to start: model, data and devices may be elsewhere."""
    return plan_on_slurm(job) if is_slurms(job.cluster) else plan_here(job)


def are_for_slurm(sweep: PlannedSweep) -> bool:
    """Whether what there is to do is for Slurm.

    Raises:
        ConfigError: some of it is, and some is for this machine.
    """
    places = {is_slurms(one.planned.job.cluster) for one in sweep.waiting if one.planned is not None}
    if len(places) > 1:
        raise ConfigError("some points are for Slurm and some for this machine", "a sweep for each: cluster=ONE")
    return True in places


def search(words: Sequence[str], say: Say) -> tuple[Path, Book, int]:
    """Train what a sweeper of Hydra's asks for, until it is done, a point fails, or the user stops it.

    A point that is in the folder already is not trained again, so that a sweeper which asks for the same points in the
    same order (a grid; a sampler with a seed) goes on where it was stopped.

    Returns:
        The folder, its book, and the exit code.
    Raises:
        ConfigError: the words are no job, no sweeper takes them, or no point can work.
    """
    batches = _Batches(words, say)
    code = int(ExitCode.DONE)
    try:
        multirun(words, batches.folder / HYDRAS, batches.run)
    except PointFailed as error:
        say(f"the sweeper stops: {error}")
        code = int(ExitCode.RED)
    except _Stopped as error:
        say(str(error))
    book = batches.book
    if book is None:
        raise ConfigError("the sweeper has asked for no point", "tuner.r=8,16   or   hydra.sweeper.params")
    if all(row.state == "pruned" for row in book.rows):
        raise ConfigError(
            f"none of {len(book.rows)} points can work; the first: {book.rows[0].reason}", "isotrain plan"
        )
    return batches.folder, book, batches.code or code


class _Batches:
    """What has become of the batches so far: the folder's ``book``, and the exit ``code``."""

    def __init__(self, words: Sequence[str], say: Say) -> None:
        common = common_words(words)
        self.folder = sweep_folder(compose_job(common))
        here = f"run_dir={as_override(str(self.folder))}"  # also where the words leave it open
        self._words = [*words, here]
        self._common = [*(word for word in common if key_of(word) != "run_dir"), here]
        self._say = say
        self.book: Book | None = None
        self.code = 0

    def run(self, batch: Sequence[tuple[str, ...]], jobs: int | None, best: str) -> list[float | Exception]:
        """Train a batch; the metric of each point, or why it has none."""
        if not batch:
            return []
        metric = asked_metric(best)
        keys = {key_of(word) for word in self._common}
        swept = [tuple(word.lstrip("+") for word in words if key_of(word) not in keys) for words in batch]
        grid = Grid(tuple(self._common), tuple(dict.fromkeys(swept)))
        sweep = plan_sweep(self._words, grid, plan_anywhere, may_grow=True)
        (self.folder / HYDRAS).mkdir(parents=True, exist_ok=True)  # some sweepers write there at their end
        self._say(f"batch of {len(sweep.points)} points: {len(sweep.waiting)} to run")
        if are_for_slurm(sweep):
            self.book, _ = submit_sweep(sweep, metric, jobs, self._say)
            try:
                wait_for([sweep.folder], self._say)
            except KeyboardInterrupt:
                self.code = int(ExitCode.ABORTED)
                raise _Stopped(
                    f"the jobs go on; to end them: isotrain cancel {shlex.quote(str(self.folder))}"
                ) from None
            sweep = plan_sweep(self._words, grid, plan_anywhere, may_grow=True)
            self.book = on_slurm(sweep, metric)
            write_book(sweep.folder, self.book)
            self.code = exit_code(sweep, self.book)
        else:
            self.book, self.code = run_here(sweep, metric, jobs or 1, self._say)
        if self.code in (ExitCode.INTERRUPTED, ExitCode.ABORTED):
            raise _Stopped("stopped; what is done is kept")
        rows = {row.point.overrides: row for row in self.book.rows}
        return [_result(rows[one], metric) for one in swept]


def _result(row: Row, metric: Metric) -> float | Exception:
    """A number for the sweeper; what cannot work is as bad as can be."""
    if row.state == "pruned":
        return -math.inf if metric.largest else math.inf
    if row.state == "done" and row.value is not None:
        return row.value
    why = row.reason or f"it has no number for {metric.name}"
    return PointFailed(f"point {row.point.number} ({row.point.words}) {row.state}: {why}")


def asked_metric(text: str) -> Metric:
    """What ``--best`` names.

    Raises:
        ConfigError: it is no name, or neither ``min`` nor ``max`` follows it.
    Example:
        >>> asked_metric("tokens_per_s:max")
        Metric(name='tokens_per_s', largest=True)
    """
    name, colon, which = text.partition(":")
    if not name or (colon and which not in ("min", "max")):
        raise ConfigError(f"--best {text}: a column of metrics.jsonl, then :min or :max", "--best tokens_per_s:max")
    return Metric(name, which == "max")
