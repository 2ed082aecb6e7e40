"""isotrain from Python: what the commands do, as functions.

Importing this package costs nothing: each name is loaded when it is first used.

Example:
    >>> from orchestrator import compose_job, plan_job
    >>> str(plan_job(compose_job(["model=smollm2_135m", "cluster=laptop", "topology.tp=3"])).plan.topology)
    'pp=1 dp=1 cp=1 tp=3'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.commands import plan_job, resume, train
    from orchestrator.config.loading import compose_job
    from orchestrator.exporting import export

_HOMES = {"compose_job": "config.loading", "export": "exporting"}  # of the others: commands
__all__ = ["compose_job", "export", "plan_job", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Load what :data:`__all__` names from the module that has it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"orchestrator.{_HOMES.get(name, 'commands')}"), name)
