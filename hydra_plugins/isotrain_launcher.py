"""``hydra/launcher=isotrain``, with which ``isotrain train --multirun`` has the points of Hydra's sweepers trained.

Hydra imports every module of this namespace package, whichever program it composes for, so there is little here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher


class IsotrainLauncher(Launcher):
    """Trains each batch that a sweeper asks for, and gives it the metric of each point.

    The task function is a batch's, not a point's: ``orchestrator.config.multirun.RunBatch``.
    """

    def __init__(self, jobs: int | None = None, best: str = "loss") -> None:
        self._jobs, self._best = jobs, best

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what trains; of the config nothing is needed, for a point is what its words say."""
        self._run_batch = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Train; a point without a metric raises the reason when the sweeper asks for its value."""
        results = self._run_batch([tuple(words) for words in job_overrides], self._jobs, self._best)
        returned = []
        for words, result in zip(job_overrides, results, strict=True):
            status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
            one = JobReturn(overrides=list(words), status=status)
            one.return_value = result
            returned.append(one)
        return returned


ConfigStore.instance().store(
    group="hydra/launcher",
    name="isotrain",
    node={"_target_": f"{__name__}.IsotrainLauncher", "jobs": None, "best": "loss"},
    provider="isotrain",
)
