"""Values that have the right type and still cannot be meant: one table of choices, one of ranges."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from orchestrator.config.job import JobConfig
from orchestrator.errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("fp32", "bf16"),
    "model.weights": ("load", "random"),
    "cluster.device": ("cpu", "cuda"),
    "memory.recompute": ("none", "selective", "full"),
    "data.on_bad_row": ("error", "skip"),
    "objective.train_on": ("assistant", "all"),
    "tuner.name": ("lora", "full"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "metrics.sinks": ("jsonl", "tensorboard", "wandb"),
}

# key: (what is asked, whether a value is so, a value that is)
RANGES: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    **{
        key: ("at least 1", lambda value: value >= 1, "1")
        for key in (
            *("steps", "cluster.nodes", "cluster.gpus_per_node", "batch.global_sequences", "batch.micro_sequences"),
            *(f"topology.{axis}" for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")),
            "tuner.r",
        )
    },
    "batch.sequence_tokens": ("at least 2 (a row has a token and the next one)", lambda value: value >= 2, "512"),
    **{
        key: ("at least 0", lambda value: value >= 0, "0")
        for key in (
            *("seed", "optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay", "optimizer.clip_norm"),
            *("optimizer.warmup_steps", "checkpoint.every_steps", "checkpoint.keep"),
        )
    },
    "cluster.memory_gib": ("above 0", lambda value: value > 0, "4"),
    "tuner.alpha": ("above 0", lambda value: value > 0, "32"),
    "tuner.dropout": ("at least 0 and below 1", lambda value: 0 <= value < 1, "0"),
    "optimizer.eps": ("above 0", lambda value: value > 0, "1e-8"),
    "optimizer.betas": (
        "two numbers of at least 0 and below 1",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "[0.9,0.999]",
    ),
}


def check_values(job: JobConfig) -> None:
    """Refuse values outside of their choices and ranges; None (not set) is always right.

    Raises:
        ConfigError: names the key, the value, what is asked and a value that works.
    """
    for key, choices in CHOICES.items():
        value = _value(job, key)
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item not in choices:
                near = (difflib.get_close_matches(item, choices, n=1) or [choices[0]])[0]
                proposal = f"[{near}]" if isinstance(value, list) else near
                raise ConfigError(f"{key}={item} is none of {', '.join(choices)}", f"{key}={proposal}")
    for key, (asked, is_right, example) in RANGES.items():
        value = _value(job, key)
        if value is not None and not is_right(value):
            raise ConfigError(f"{key}={value} should be {asked}", f"{key}={example}")
    if job.optimizer.min_lr > job.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={job.optimizer.min_lr} is above optimizer.lr={job.optimizer.lr}", "optimizer.min_lr=0"
        )
    _check_tuner(job)
    _check_targets(job)


def _check_tuner(job: JobConfig) -> None:
    if job.tuner.name == "full" and job.tuner.dora:
        raise ConfigError("tuner.dora=true asks for an adapter, but tuner.name=full trains the model itself", "tuner=dora")


def _check_targets(job: JobConfig) -> None:
    targets = job.tuner.targets
    if isinstance(targets, list):
        if not targets:
            raise ConfigError("tuner.targets=[] adapts nothing", "tuner.targets=all-linear")
        return
    try:
        re.compile(targets)
    except re.error as error:
        raise ConfigError(
            f"tuner.targets={targets} is no regular expression: {error}", "tuner.targets=all-linear"
        ) from error


def _value(job: JobConfig, key: str) -> Any:
    value: Any = job
    for name in key.split("."):
        value = getattr(value, name)
    return value
