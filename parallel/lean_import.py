"""megatron-core's import without what a run here does not use: half of the time that a worker takes to start.

On a CPU, importing megatron-core 0.16.1 takes 5.2 s, of which its own modules are 0.2 s: each function decorated with
``torch.compile`` imports inductor, and two of its modules import wandb and TensorBoard for writers of their own.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

LEFT_OUT = ("wandb", "tensorboard")  # megatron-core goes on without them: timers, inference contexts
NOISE = ".*Apex (are|is) not installed"  # fast paths, optional; said once per module otherwise


def import_megatron_core() -> None:
    """Import ``megatron.core`` once, as ``import megatron.core`` does, but faster; a no-op where it is imported."""
    if "megatron.core" in sys.modules:
        return
    compiled = contextlib.nullcontext() if torch.cuda.is_available() else _nothing_compiled()
    with _absent(LEFT_OUT), compiled, warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOISE)
        import megatron.core
        import megatron.core.models.backends  # noqa: F401


@contextlib.contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """While open, modules that are not imported yet cannot be."""
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # import then raises ModuleNotFoundError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """While open, ``torch.compile`` leaves functions as they are: a CPU runs megatron-core without its fusions."""
    original = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return _as_it_is if function is None else function
