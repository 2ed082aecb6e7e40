"""What is done for a cell: planned, trained by the ranks of a pool, compared with one process and transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.pool import Pool, RankError
from orchestrator.certify.cell import LONGEST_ROW, write_rows
from orchestrator.certify.comparing import LOGITS_ATOL, Error, errors
from orchestrator.certify.grid import BATCH, REFERENCE, Layout
from orchestrator.certify.shrinking import VOCABULARY
from orchestrator.checkpoint.export import export_merged
from orchestrator.checkpoint.folder import step_name
from orchestrator.commands import Planned, plan_job
from orchestrator.config.building import as_override, job_to_yaml
from orchestrator.config.job import JobConfig, TunerConfig
from orchestrator.config.loading import override_job
from orchestrator.errors import ConfigError
from orchestrator.planning.certified import plan_features
from orchestrator.planning.tuning import beyond_peft
from orchestrator.runs import write_run
from parallel.families import read_model
from parallel.names import leaf_names, resolve_targets
from parallel.specs import ModelSpec, SpecError

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
class Ready:
    """A cell that can be trained: its plan, and the job of its run folder."""

    tuner: str
    layout: Layout
    run: Path
    planned: Planned

    def cell(self, verdict: str, errors: tuple[Error, ...] = (), reason: str = "") -> Cell:
        """What came of it."""
        features = tuple(plan_features(self.planned.job, self.planned.plan))
        return Cell(self.tuner, self.layout, verdict, errors, reason, features)


@dataclass(frozen=True)
class Trained:
    """What a cell's ranks left beside its run folder: their logits of a probe."""

    ready: Ready
    probe: list[list[int]]
    logits: Any


@dataclass(frozen=True)
class Bench:
    """The small model, its rows and, by tuner, the job of that row of the grid in one process."""

    folder: Path
    model: ModelSpec
    jobs: Mapping[str, JobConfig]

    @classmethod
    def prepared(
        cls, folder: Path, job: JobConfig, config: dict[str, Any], tuners: Mapping[str, tuple[str, ...]]
    ) -> Bench:
        """Make the small model and its rows in ``folder``.

        Args:
            job: the user's.
            config: the small model's ``config.json``.
            tuners: the overrides of each row, of which the first is ``tuner=NAME``.
        """
        from orchestrator.certify.outside import make_model

        make_model(config, folder / "model", SEED)
        write_rows(folder / "rows", VOCABULARY, SEED)
        model = read_model(config)
        return cls(folder, model, {name: _job(job, folder / "model", model, words) for name, words in tuners.items()})

    def ready(self, tuner: str, layout: Layout) -> Ready | Cell:
        """Plan a cell and write its run folder; the cell itself, refused, where there is no plan."""
        run = self._run_dir(tuner, layout)
        words = [f"cluster.gpus_per_node={layout.ranks}", *layout.words]
        try:
            planned = plan_job(override_job(job_to_yaml(self.jobs[tuner]), words))
        except (ConfigError, SpecError) as error:
            return Cell(tuner, layout, "refused", reason=str(error))
        write_run(run, replace(planned.job, run_dir=str(run)), planned.plan.to_json())
        return Ready(tuner, layout, run, planned)

    def trained(self, ready: Ready, pool: Pool, train: Train) -> Trained | Cell:
        """Train a cell on the ranks of a pool; the cell itself, red, where a rank raised."""
        probe, rows = _probe(ready.planned.plan.length_multiple), str(self.folder / "rows")
        try:
            said = pool.run(ready.layout.ranks, train, str(ready.run), rows, probe, timeout_s=LIMIT_S)
        except RankError as error:
            return ready.cell("red", reason=str(error))
        return Trained(ready, probe, next(each for each in said if each is not None))

    def judged(self, trained: Trained) -> Cell:
        """Compare a cell with the row's run in one process, and its logits with those of its export."""
        ready = trained.ready
        is_reference = ready.layout == REFERENCE
        found = [] if is_reference else errors(self._run_dir(ready.tuner, REFERENCE), ready.run, STEPS)
        found.append(self._outside(trained))
        if not is_reference:
            shutil.rmtree(ready.run, ignore_errors=True)
        good = all(error.value <= error.limit for error in found)
        return ready.cell("green" if good else "red", tuple(found))

    def _run_dir(self, tuner: str, layout: Layout) -> Path:
        return self.folder / tuner / layout.name

    def _outside(self, trained: Trained) -> Error:
        """How far our logits are from what transformers or peft make of the run's last checkpoint.

        A quantised base is not the base's folder: its adapter is merged into what it was trained on. So is what PEFT
        has no place for.
        """
        from orchestrator.certify.outside import logits

        run, tuner, probe = trained.ready.run, trained.ready.planned.job.tuner, trained.probe
        checkpoint = run / "checkpoints" / step_name(STEPS)
        if tuner.name == "full":
            said, where = logits(checkpoint / "model", None, probe), "of the checkpoint in transformers"
        elif tuner.quantise or beyond_peft(tuner, resolve_targets(tuner.targets, self.model), self.model):
            export_merged(checkpoint, self.folder / "model", run / "merged")
            said, where = logits(run / "merged", None, probe), "of the merged export in transformers"
        else:
            said, where = logits(self.folder / "model", checkpoint / "adapter", probe), "of the adapter in peft"
        return Error("logits", where, float(np.abs(said - trained.logits).max()), LOGITS_ATOL)


def _job(job: JobConfig, folder: Path, model: ModelSpec, words: tuple[str, ...]) -> JobConfig:
    """The user's job with the small model in one process; what decides the numbers is the same in all of a row."""
    choice, *rest = words  # tuner=NAME comes first, and takes the place of the whole section
    fixed = [
        *("cluster=one", "cluster.gpus_per_node=1", "cluster.memory_gib=64"),
        *("topology=auto", "memory.recompute=none", "precision=fp32", f"steps={STEPS}", f"seed={SEED}"),
        *(f"model.path={folder}", "model.weights=load", "model.config=null", "tuner.path=null"),
        *(f"batch.global_sequences={BATCH}", "batch.micro_sequences=1", f"batch.sequence_tokens={LONGEST_ROW}"),
        *("optimizer=adamw", "optimizer.lr=1e-3", f"optimizer.eps={EPS}", "optimizer.schedule=constant"),
        *("metrics=jsonl", "metrics.progress=false", "checkpoint.every_steps=0", "checkpoint.keep_last=0"),
        *("tuner.r=4", "tuner.alpha=8", "optimizer.distributed=false", "topology.cp_comm=ring"),
    ]
    if choice != "tuner=full":
        fixed.append(f"tuner.targets={as_override(_targets(job, model))}")
    return override_job(job_to_yaml(job), [choice, *fixed, *rest])


def _targets(job: JobConfig, model: ModelSpec) -> str | list[str]:
    """The user's; else all linears, of a mixture of experts by name."""
    asked = job.tuner.targets
    if asked != TunerConfig().targets or not model.is_moe:
        return asked
    return leaf_names(model)


def _probe(multiple: int) -> list[list[int]]:
    """Two rows of token ids of about the longest row's length, which is one that the topology can cut."""
    tokens = -(-LONGEST_ROW // multiple) * multiple
    return np.random.Generator(np.random.PCG64(SEED)).integers(0, VOCABULARY, (2, tokens)).tolist()
