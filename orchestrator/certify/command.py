"""``isotrain certify``: every cell is planned, trained in a pool of processes, and compared with one process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.pool import Pool, RankError
from orchestrator.certify.cell import LONGEST_ROW, train_cell, write_rows
from orchestrator.certify.comparing import LOGITS_ATOL, Error, errors
from orchestrator.certify.grid import BATCH, REFERENCE, Layout, layouts
from orchestrator.certify.shrinking import VOCABULARY, shrunken
from orchestrator.checkpoint.export import export_merged
from orchestrator.checkpoint.folder import step_name
from orchestrator.commands import Planned, plan_job
from orchestrator.config.building import as_override, job_to_yaml
from orchestrator.config.job import JobConfig, TunerConfig
from orchestrator.config.loading import group_choices, override_job
from orchestrator.errors import ConfigError
from orchestrator.models import resolve_model
from orchestrator.planning.certified import plan_features
from orchestrator.planning.experts import dependence_on_cut
from orchestrator.planning.tuning import beyond_peft
from orchestrator.runs import write_run
from parallel.families import read_model
from parallel.names import leaf_names, resolve_targets
from parallel.specs import ModelSpec, SpecError, read_hf_config

Tick = Callable[[int, int, str], None]
Train = Callable[..., Any]
STEPS, SEED = 3, 5
# Adam divides a gradient by its own size: where rounding is all that there is of one, its update is rounding / eps.
# With the usual 1e-8 that alone exceeds the tolerance on more than two processes (2e-3; 1e-6: 1e-4; 1e-5: 4e-5).
EPS = 1e-4
LIMIT_S = 180.0


@dataclass(frozen=True)
class Cell:
    """One tuner on one topology. ``verdict``: ``green``, ``red`` or ``refused`` (by the plan; ``reason`` says why).

    ``features``: what the plan used (:func:`orchestrator.planning.certified.plan_features`), empty where there is none.
    """

    tuner: str
    layout: Layout
    verdict: str
    errors: tuple[Error, ...] = ()
    reason: str = ""
    features: tuple[str, ...] = ()

    @property
    def worst(self) -> Error | None:
        """The error that is nearest to its limit, or furthest beyond it."""
        return max(self.errors, key=lambda error: error.share, default=None)


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
    )
    for name in asked:
        if name not in rows:
            raise ConfigError(f"--tuner {name} is none of {', '.join(rows)}", "--tuner lora")
    return {name: words for name, words in rows.items() if name in (asked or rows.keys() - {"galore"})}


def certify(
    request: Request, tick: Tick = lambda done, of, name: None, pool: Pool | None = None, train: Train = train_cell
) -> list[Cell]:
    """Train and compare every cell; cells of a row are compared with the row's own run in one process.

    Args:
        tick: told before each cell how many are trained, how many there are, and the next one's name.
        pool: processes to use and to leave alive; None: own ones.
        train: what each rank runs; a test plants its fault here.
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
    columns = [one for one in layouts(request.ranks, read_model(config).is_moe) if request.only in one.name]
    if not columns:
        raise ConfigError(f"--only {request.only} leaves no topology of up to {request.ranks} processes", "--up-to 4")
    with tempfile.TemporaryDirectory(prefix="isotrain-certify-") as name:
        workers = pool or Pool(request.ranks, Path(name) / "ranks.log")
        try:
            bench = _Bench.prepared(Path(name), request, config, workers, train)
            return _cells(bench, columns, tick)
        finally:
            if pool is None:
                workers.leave()


def _cells(bench: _Bench, columns: list[Layout], tick: Tick) -> list[Cell]:
    """Every cell in order. One is compared while the ranks train the next."""
    rows = tuner_rows(bench.request.tuners)
    total = len(rows) * (len(columns) + 1)
    found: list[Future[Cell]] = []
    with _Judge(max_workers=1) as judge:
        for tuner, words in rows.items():
            tick(len(found), total, f"{tuner} in one process")
            found.append(judge.submit(bench.judged, bench.trained(tuner, words, REFERENCE)))
            reference = found[-1].result()
            for layout in columns:
                for each in found:
                    if each.done():
                        each.result()  # raises what the judge raised
                tick(len(found), total, f"{tuner} on {layout.name}")
                if reference.verdict == "green":
                    trained = bench.trained(tuner, words, layout)
                else:
                    reason = reference.reason or "one process is red itself"
                    trained = _Trained(tuner, layout, without=Cell(tuner, layout, "refused", reason=reason))
                found.append(judge.submit(bench.judged, trained))
        cells = [each.result() for each in found]
    tick(total, total, "")
    return cells


class _Judge(ThreadPoolExecutor):
    """One thread, that leaves what waits when the block ends with an error."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(wait=True, cancel_futures=kind is not None)


@dataclass(frozen=True)
class _Trained:
    """What a cell's ranks left: its run folder and job, and their logits of a probe; or the cell that it is without."""

    tuner: str
    layout: Layout
    run: Path = Path()
    planned: Planned | None = None
    probe: tuple[list[int], ...] = ()
    logits: Any = None
    without: Cell | None = None


@dataclass(frozen=True)
class _Bench:
    """The small model, its rows, and the pool that trains cells on them."""

    folder: Path
    request: Request
    pool: Pool
    train: Train
    model: ModelSpec

    @classmethod
    def prepared(cls, folder: Path, request: Request, config: dict[str, Any], pool: Pool, train: Train) -> _Bench:
        from orchestrator.certify.outside import make_model

        make_model(config, folder / "model", SEED)
        write_rows(folder / "rows", VOCABULARY, SEED)
        return cls(folder, request, pool, train, read_model(config))

    def trained(self, tuner: str, words: Sequence[str], layout: Layout) -> _Trained:
        """Plan and train a cell."""
        run = self._run_dir(tuner, layout.name)
        try:
            planned = plan_job(self._job(tuner, [*words, *layout.words], layout.ranks))
        except (ConfigError, SpecError) as error:
            return _Trained(tuner, layout, without=Cell(tuner, layout, "refused", reason=str(error)))
        write_run(run, replace(planned.job, run_dir=str(run)), planned.plan.to_json())
        probe, rows = self._probe(planned.plan.length_multiple), str(self.folder / "rows")
        try:
            said = self.pool.run(layout.ranks, self.train, str(run), rows, probe, timeout_s=LIMIT_S)
        except RankError as error:
            features = tuple(plan_features(planned.job, planned.plan))
            return _Trained(tuner, layout, without=Cell(tuner, layout, "red", (), str(error), features))
        return _Trained(tuner, layout, run, planned, tuple(probe), next(each for each in said if each is not None))

    def judged(self, trained: _Trained) -> Cell:
        """Compare a cell with the row's run in one process, and its logits with those of its export."""
        if trained.planned is None:
            assert trained.without is not None
            return trained.without
        tuner, layout, run, planned = trained.tuner, trained.layout, trained.run, trained.planned
        is_reference = layout == REFERENCE
        found = [] if is_reference else errors(self._run_dir(tuner, REFERENCE.name), run, STEPS)
        found.append(self._outside(run, planned.job.tuner, list(trained.probe), trained.logits))
        if not is_reference:
            shutil.rmtree(run, ignore_errors=True)
        good = all(error.value <= error.limit for error in found)
        features = tuple(plan_features(planned.job, planned.plan))
        return Cell(tuner, layout, "green" if good else "red", tuple(found), features=features)

    def _probe(self, multiple: int) -> list[list[int]]:
        """Two rows of token ids of about the longest row's length, which is one that the topology can cut."""
        tokens = -(-LONGEST_ROW // multiple) * multiple
        return np.random.Generator(np.random.PCG64(SEED)).integers(0, VOCABULARY, (2, tokens)).tolist()

    def _job(self, tuner: str, words: Sequence[str], ranks: int) -> JobConfig:
        """The user's job with the small model, on this many processes; what decides the numbers is the same in all."""
        choice, *rest = words  # tuner=NAME comes first, and takes the place of the whole section
        fixed = [
            *("cluster=one", f"cluster.gpus_per_node={ranks}", "cluster.memory_gib=64"),
            *("topology=auto", "memory.recompute=none", "precision=fp32", f"steps={STEPS}", f"seed={SEED}"),
            *(f"model.path={self.folder / 'model'}", "model.weights=load", "model.config=null", "tuner.path=null"),
            *(f"batch.global_sequences={BATCH}", "batch.micro_sequences=1", f"batch.sequence_tokens={LONGEST_ROW}"),
            *("optimizer=adamw", "optimizer.lr=1e-3", f"optimizer.eps={EPS}", "optimizer.schedule=constant"),
            *("metrics=jsonl", "metrics.progress=false", "checkpoint.every_steps=1", "checkpoint.keep_last=0"),
            *("tuner.r=4", "tuner.alpha=8", "optimizer.distributed=false", "topology.cp_comm=ring"),
        ]
        if choice != "tuner=full":
            fixed.append(f"tuner.targets={as_override(self._targets())}")
        return override_job(job_to_yaml(self.request.job), [choice, *fixed, *rest])

    def _targets(self) -> str | list[str]:
        """The user's; else all linears, of a mixture of experts by name."""
        asked = self.request.job.tuner.targets
        if asked != TunerConfig().targets or not self.model.is_moe:
            return asked
        return leaf_names(self.model)

    def _run_dir(self, tuner: str, name: str) -> Path:
        return self.folder / tuner / name

    def _outside(self, run: Path, tuner: TunerConfig, probe: list[list[int]], ours: Any) -> Error:
        """How far our logits are from what transformers or peft make of the run's last checkpoint.

        A quantised base is not the base's folder: its adapter is merged into what it was trained on. So is what PEFT
        has no place for.
        """
        from orchestrator.certify.outside import logits

        checkpoint = run / "checkpoints" / step_name(STEPS)
        if tuner.name == "full":
            said, where = logits(checkpoint / "model", None, probe), "of the checkpoint in transformers"
        elif tuner.quantise or beyond_peft(tuner, resolve_targets(tuner.targets, self.model), self.model):
            export_merged(checkpoint, self.folder / "model", run / "merged")
            said, where = logits(run / "merged", None, probe), "of the merged export in transformers"
        else:
            said, where = logits(self.folder / "model", checkpoint / "adapter", probe), "of the adapter in peft"
        return Error("logits", where, float(np.abs(said - ours).max()), LOGITS_ATOL)
