"""A run goes on from its newest good checkpoint: with the same data, the same base, and every tensor in its place."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.anomalies import samples_after_rewinds
from orchestrator.checkpoint.exchange import Peers
from orchestrator.checkpoint.load import CheckpointReader, find_latest_good
from orchestrator.config.building import quote_override
from orchestrator.config.job import JobConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.training import Cursor
from parallel.engine import Engine

SHOWN = 3


@dataclass(frozen=True)
class Restoring:
    """What a checkpoint must agree with. ``base``: the fingerprint of an adapter's model; None: it has none."""

    job: JobConfig
    run_dir: Path
    data_sha256: str
    base: str | None
    cpu_group: dist.ProcessGroup


def restore(engine: Engine, rank: int, wanted: Restoring) -> Cursor:
    """Load the newest good checkpoint, if there is one; returns where the run stands then. Every rank calls it.

    Raises:
        DataError: no checkpoint is good, or the data or the base have changed under their names.
        ConfigError: the checkpoint is of another model or tuner.
    """
    checkpoint, messages = find_latest_good(wanted.run_dir / "checkpoints", peers=Peers.of(wanted.cpu_group))
    for line in messages if rank == 0 else ():
        print(line, file=sys.stderr, flush=True)
    if checkpoint is None:
        return Cursor(0, samples_after_rewinds(wanted.run_dir, 0, 0))
    _check_same_data(checkpoint, wanted)
    _check_same_base(checkpoint, wanted)
    try:
        engine.load(checkpoint, moments=True)
    except KeyError as error:
        raise _other_model(checkpoint, wanted, f"has no tensor {error}, which this job trains") from error
    _check_all_taken(engine, checkpoint, wanted)
    engine.set_optimizer_steps(int(checkpoint.state["optimizer_steps"]))
    if rank == 0:
        print(f"loaded {checkpoint.folder}", file=sys.stderr, flush=True)
    # Another tool's run, of other data, has no cursor: it is as if all its steps had been like those to come.
    samples = checkpoint.state.get("samples_consumed", checkpoint.step * wanted.job.batch.global_sequences)
    losses = tuple(checkpoint.manifest.about.get("losses", ()))
    return Cursor(checkpoint.step, samples_after_rewinds(wanted.run_dir, checkpoint.step, int(samples)), losses)


def _check_same_data(checkpoint: CheckpointReader, wanted: Restoring) -> None:
    """The cursor of a checkpoint means nothing in other data: refuse a file that was changed under its name."""
    before, path = checkpoint.state["data"], wanted.job.data.path
    if before is None:  # it comes from another tool's run, of other data
        return
    if before["path"] == path and before["sha256"] != wanted.data_sha256:
        raise DataError(
            f"data.path={path} has changed since step {checkpoint.step}: sha256 "
            f"{before['sha256'][:12]} then, {wanted.data_sha256[:12]} now",
            f"restore the file, or go on with another one: isotrain resume {wanted.run_dir} data.path=OTHER_FILE",
        )


def _check_same_base(checkpoint: CheckpointReader, wanted: Restoring) -> None:
    """An adapter means nothing on other weights: refuse a model that was changed under its name."""
    about, path = checkpoint.manifest.about, wanted.job.model.path
    if about.get("base") and wanted.base and about.get("model") == path and about["base"] != wanted.base:
        raise DataError(
            f"the weights of model.path={path} have changed since step {checkpoint.step}: fingerprint "
            f"{about['base'][:12]} then, {wanted.base[:12]} now",
            f"restore them, or go on with others: isotrain resume {wanted.run_dir} model.path=OTHER_FOLDER",
        )


def _check_all_taken(engine: Engine, checkpoint: CheckpointReader, wanted: Restoring) -> None:
    """Every weight of the checkpoint has a place on some rank: a smaller model would drop the others in silence."""
    names = checkpoint.names()
    mine = {shard.name for shard in engine.shards() if shard.kind == "weight"}
    taken = torch.tensor([name in mine for name in names], dtype=torch.uint8)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=wanted.cpu_group)
    left = [name for name, here in zip(names, taken.tolist(), strict=True) if not here]
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise _other_model(checkpoint, wanted, f"holds what this job has no place for: {', '.join(left[:SHOWN])}{more}")


def _other_model(checkpoint: CheckpointReader, wanted: Restoring, words: str) -> ConfigError:
    before = checkpoint.manifest.about.get("model")
    back = f" {quote_override('model.path', before)}" if before != wanted.job.model.path else " --explain"
    return ConfigError(
        f"{checkpoint.folder} {words}: it is of another model or tuner", f"isotrain resume {wanted.run_dir}{back}"
    )
