"""Whether Slurm answers, and whether it would take the job."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.commands import SlurmError, ask, partitions
from orchestrator.config.job import ClusterConfig, SlurmConfig
from orchestrator.doctor.finding import Finding
from orchestrator.errors import ConfigError, PeerLost
from parallel.specs import SpecError


@dataclass(frozen=True)
class SlurmSeen:
    """``is_there``: whether sbatch is on the PATH. ``error``: why its controller does not answer."""

    is_there: bool
    error: str = ""
    partitions: tuple[str, ...] = ()


def goes_through_slurm(cluster: ClusterConfig) -> bool:
    """Whether a cluster is one of Slurm's: it has several nodes, or settings for it.

    Example:
        >>> goes_through_slurm(ClusterConfig()), goes_through_slurm(ClusterConfig(nodes=2))
        (False, True)
    """
    return cluster.nodes > 1 or cluster.slurm != SlurmConfig()


def seen_slurm() -> SlurmSeen:
    """Ask Slurm's controller whether it is up, where there is a Slurm."""
    if shutil.which("sbatch") is None:
        return SlurmSeen(is_there=False)
    try:
        said = ask(["scontrol", "ping"])
    except SlurmError as error:
        return SlurmSeen(True, str(error).splitlines()[0])
    if "UP" not in said and "is up" not in said.lower():
        return SlurmSeen(True, " ".join(said.split()))
    return SlurmSeen(True, "", tuple(partitions()))


def check_slurm(seen: SlurmSeen, cluster: ClusterConfig) -> list[Finding]:
    """Whether a job could be handed to Slurm; nothing to say where neither the cluster nor this machine has one.

    Example:
        >>> [one.state for one in check_slurm(SlurmSeen(is_there=False), ClusterConfig(nodes=2))]
        ['fault']
    """
    is_needed = goes_through_slurm(cluster)
    if not seen.is_there:
        words = f"sbatch is not on the PATH, and cluster={cluster.name} goes through Slurm"
        return [Finding("Slurm", "fault", words, "cluster=laptop   or on a machine with sbatch")] if is_needed else []
    if seen.error:
        words = f"its controller does not answer: {seen.error}"
        words += "" if is_needed else f" (cluster={cluster.name} does without)"
        return [Finding("Slurm", "fault" if is_needed else "warning", words, "scontrol ping")]
    names = ", ".join(seen.partitions) or "none"
    return [Finding("Slurm", "ok", f"its controller answers; partitions: {names}")]


def check_submission(overrides: Sequence[str]) -> Finding:
    """Whether Slurm would take the job as it would be submitted now (``sbatch --test-only``); nothing is submitted.

    The run has no job that waits or runs already.
    """
    from orchestrator.jobs.submit import prepare, refuse_second_job, refused

    try:
        prepared = prepare(overrides)
        refuse_second_job(prepared.run_dir)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "train.sbatch"
            script.write_text(prepared.script, encoding="utf-8")
            ask(["sbatch", "--test-only", str(script)], cwd=Path(folder))
    except SlurmError as error:
        refusal = refused(str(error), prepared.planned.job.cluster)
        return Finding("submission", "fault", str(refusal), refusal.hint)
    except (ConfigError, PeerLost, SpecError) as error:
        return Finding("submission", "fault", str(error), error.hint)
    return Finding("submission", "ok", "Slurm would take this job (sbatch --test-only)")
