"""What a resume would restore, what has changed since, and whether it stays the same run. Starts nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.listing import topology_words
from orchestrator.checkpoint.load import hash_file
from orchestrator.checkpoint.manifest import installed_versions
from orchestrator.config.building import FREE_KEYS, as_override, differences, flatten
from orchestrator.config.job import JobConfig
from orchestrator.data.sources import resolve
from orchestrator.models import resolve_model
from orchestrator.planning.experts import dependence_on_cut

if TYPE_CHECKING:
    from orchestrator.checkpoint.load import CheckpointReader
    from orchestrator.planning.plan import Plan

SAME = "the same run: losses equal to 1e-5 (fp32)"


@dataclass(frozen=True)
class Change:
    """Something that is not as it was; ``same`` is whether the run stays the same, ``effect`` says how so."""

    what: str
    before: str
    now: str
    same: bool
    effect: str


@dataclass(frozen=True)
class Explanation:
    """What a resume would do.

    Args:
        checkpoint: the folder that it would go on from; ``notes`` says why not from a newer one.
        restored: what is read from it, by name.
        changes: what differs from when it was written.
    """

    checkpoint: Path
    step: int
    steps: int
    restored: dict[str, str]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the run goes on as if it had not been interrupted."""
        return all(change.same for change in self.changes)

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        values = asdict(self) | {"checkpoint": str(self.checkpoint), "same": self.same}
        return {"code": 0, **values}


def explain_resume(run_dir: Path, before: JobConfig, job: JobConfig, plan: Plan) -> Explanation:
    """Explain a resume of a run as ``job`` with ``plan``; every file of the checkpoint is hashed, nothing is written.

    What the run means is compared with what the checkpoint says of its own job: ``before``, that of the last launch,
    may have changed without a step.

    Raises:
        ConfigError: nothing was saved. DataError: no checkpoint is good.
    """
    from orchestrator.checkpoint.load import find_latest_good
    from orchestrator.errors import ConfigError

    reader, notes = find_latest_good(run_dir)
    if reader is None:
        raise ConfigError(f"{run_dir} has no checkpoint to resume from", f"isotrain train ... run_dir={run_dir}")
    changes = [*_topology(reader, plan, job), *_keys(reader, before, job), *_data(reader, job)]
    changes += [*_base(reader, job), *_versions(reader)]
    return Explanation(reader.folder, reader.step, job.steps, _restored(reader, job), tuple(changes), notes)


def _restored(reader: CheckpointReader, job: JobConfig) -> dict[str, str]:
    kinds: dict[str, int] = {}
    for _, kind in reader.manifest.tensors:
        kinds[kind] = kinds.get(kind, 0) + 1
    state = reader.state
    restored = {
        "weights": f"{kinds.pop('weight', 0)} tensors of the {reader.manifest.room}",
        "optimizer": ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
        + f", after {state['optimizer_steps']} updates",
    }
    if state["data"] is None:
        restored["data"] = f"the first that step {reader.step + 1} has; what was read before lies in another tool"
    else:
        rows = state["data"]["rows"]
        epoch, row = divmod(state["samples_consumed"], rows)
        restored["data"] = f"sample {state['samples_consumed'] + 1}: row {row + 1} of {rows} in epoch {epoch + 1}"
    restored["schedule"] = f"{job.optimizer.schedule}, at step {reader.step} of {job.steps}"
    restored["random numbers"] = "dropout masks follow from seed, sample and module: nothing to restore"
    return restored


def _topology(reader: CheckpointReader, plan: Plan, job: JobConfig) -> list[Change]:
    cut = dependence_on_cut(job.experts)
    same, effect = not cut, "; ".join(cut) or SAME
    changes = []
    about = reader.manifest.about
    then, now = topology_words(about), topology_words({"topology": asdict(plan.topology)})
    if then != now:
        changes.append(Change("topology", then, now, same, effect))
    if about.get("precision") != plan.precision:
        rounding = "another run: the same data and schedule, other rounding"
        changes.append(Change("precision", str(about.get("precision")), plan.precision, False, rounding))
    written = about.get("plan", {})
    for name in ("micro_sequences", "recompute", "distributed", "engine"):
        if name in written and written[name] != getattr(plan, name):
            is_cut = name == "micro_sequences" and bool(cut)
            said = (False, effect) if is_cut else (True, SAME)
            changes.append(Change(name, str(written[name]), str(getattr(plan, name)), *said))
    return changes


def _keys(reader: CheckpointReader, before: JobConfig, job: JobConfig) -> list[Change]:
    written = reader.manifest.about.get("job", {})
    now = flatten(job)
    found = {key: (old, new) for key, old, new in differences(before, job) if key not in written}
    found |= {key: (old, now[key]) for key, old in written.items() if key in now and old != now[key]}
    changes = []
    for key, (old, new) in found.items():
        if key.startswith(("topology.", "memory.", "batch.micro", "optimizer.distributed", "run_dir", "precision")):
            continue  # told of by what is planned
        same, effect = _effect(key, job)
        changes.append(Change(key, as_override(old), as_override(new), same, effect))
    return changes


def _data(reader: CheckpointReader, job: JobConfig) -> list[Change]:
    """Whether the file behind ``data.path`` is still the same; a resume refuses another one under the old name."""
    then = reader.state["data"]
    if then is None or then["path"] != job.data.path:
        return []
    now = hash_file(resolve(job.data.path))
    if now == then["sha256"]:
        return []
    effect = "refused: the file has changed under its name; restore it, or name another data.path"
    return [Change("data", then["sha256"][:12], now[:12], False, effect)]


def _base(reader: CheckpointReader, job: JobConfig) -> list[Change]:
    """Whether an adapter still finds the weights that it was trained on; a resume refuses others under the old name."""
    from orchestrator.checkpoint.base import fingerprint

    then = reader.manifest.about.get("base")
    if not then:
        return []
    now = fingerprint(resolve_model(job.model.path))
    if now == then:
        return []
    effect = "another run from here: an adapter of other weights"
    if reader.manifest.about.get("model") == job.model.path:
        effect = "refused: the weights have changed under their name; restore them, or name another model.path"
    return [Change("base", then[:12], now[:12], False, effect)]


def _effect(key: str, job: JobConfig) -> tuple[bool, str]:
    if key.startswith(FREE_KEYS):
        return True, SAME
    if key == "steps":
        if job.optimizer.schedule == "constant":
            return True, "the same run, longer or shorter"
        return False, f"another run from here: the {job.optimizer.schedule} schedule is stretched to the new end"
    if key.startswith("data.") or key in ("seed", "batch.global_sequences", "batch.sequence_tokens"):
        return False, "another run from here: other samples, or another order"
    return False, "another run from here"


def _versions(reader: CheckpointReader) -> list[Change]:
    then = reader.manifest.versions
    effect = "the same run, as far as both versions compute alike"
    return [
        Change(name, str(then.get(name)), str(now), True, effect)
        for name, now in installed_versions().items()
        if now != then.get(name)
    ]
