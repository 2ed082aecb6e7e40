"""Values that have the right type and still cannot be meant: one table of choices, one of ranges."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from orchestrator.config.job import AUTO, JobConfig, TunerConfig
from orchestrator.errors import ConfigError
from parallel.galore_spec import PROJECTIONS

CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("fp32", "bf16"),
    "model.weights": ("load", "random"),
    "cluster.device": ("cpu", "cuda"),
    "topology.cp_comm": ("ring", "ulysses"),
    "memory.recompute": ("none", "selective", "full"),
    "data.on_bad_row": ("error", "skip"),
    "objective.name": ("sft", "dpo", "orpo", "simpo"),
    "objective.train_on": ("assistant", "last", "all"),
    "tuner.name": ("lora", "full"),
    "tuner.init": ("default", "pissa"),
    "tuner.quantise": ("nf4",),
    "experts.balancing_over": ("sequence", "micro_batch"),
    "optimizer.name": ("adamw", "galore"),
    "optimizer.galore.projection": PROJECTIONS,
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "checkpoint.metric": ("loss", "grad_norm"),
    "checkpoint.on_failure": ("stop", "continue"),
    "anomalies.not_finite": ("stop", "skip", "rewind"),
    "anomalies.spike": ("warn", "stop", "skip", "rewind"),
    "metrics.sinks": ("jsonl", "tensorboard", "wandb"),
}

FOUND_OUT = {"cluster.nodes": 0, "cluster.gpus_per_node": 0, "cluster.memory_gib": 0, "cluster.device": AUTO}

PROLOGUES = ("module", "venv", "conda", "apptainer", "pyxis")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _is_prologue(words: list[str]) -> bool:
    """A kind and the one thing that it takes; modules are one or more, and an image may have folders after it."""
    return words[0] in PROLOGUES and (len(words) == 2 or (words[0] not in ("venv", "conda") and len(words) > 2))


# key: (what is asked, whether a value is so, a value that is)
RANGES: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    **{
        key: ("at least 1", lambda value: value >= 1, "1")
        for key in (
            *("steps", "cluster.nodes", "cluster.fewest_nodes", "cluster.gpus_per_node"),
            "batch.global_sequences",
            *(f"topology.{axis}" for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")),
            *("tuner.r", "optimizer.galore.rank", "optimizer.galore.update_steps"),
        )
    },
    "batch.micro_sequences": ("at least 1, or auto", lambda value: value == AUTO or _is_count(value), "auto"),
    "batch.sequence_tokens": ("at least 2 (a row has a token and the next one)", lambda value: value >= 2, "512"),
    **{
        key: ("at least 0", lambda value: value >= 0, "0")
        for key in (
            *("seed", "optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay", "optimizer.clip_norm"),
            *("optimizer.warmup_steps", "checkpoint.every_steps", "experts.balancing_loss", "experts.bias_rate"),
            *(f"checkpoint.keep_{which}" for which in ("last", "every", "best")),
            *("cluster.slurm.signal_s", "recovery.restarts", "recovery.node_faults", "anomalies.limit"),
        )
    },
    "cluster.memory_gib": ("above 0", lambda value: value > 0, "4"),
    "anomalies.spike_factor": ("above 1", lambda value: value > 1, "3"),
    "recovery.silent_s": ("above 0", lambda value: value > 0, "120"),
    "recovery.stalled_s": ("above 0", lambda value: value > 0, "1800"),
    "cluster.slurm.time": (
        "a time of Slurm's: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, in quotes",
        lambda value: re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", value) is not None,
        "'08:00:00'",
    ),
    "cluster.slurm.prologue": (
        "empty, or one of module, venv, conda, apptainer and pyxis with what it takes",
        lambda value: not value or _is_prologue(value),
        "[venv,/path/to/.venv]",
    ),
    "tuner.loraplus_lr_ratio": ("above 0", lambda value: value > 0, "16"),
    "experts.capacity_factor": ("above 0", lambda value: value > 0, "1.25"),
    "tuner.alpha": ("above 0", lambda value: value > 0, "32"),
    "tuner.dropout": ("at least 0 and below 1", lambda value: 0 <= value < 1, "0"),
    "optimizer.galore.scale": ("above 0", lambda value: value > 0, "0.25"),
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
            if item is not None and item not in choices and not _is_found_out(job, key, item):
                meant = {"gpu": "cuda", "bfloat16": "bf16", "float32": "fp32"}.get(str(item), str(item))
                near = (difflib.get_close_matches(meant, choices, n=1) or [choices[0]])[0]
                proposal = f"[{near}]" if isinstance(value, list) else near
                raise ConfigError(f"{key}={item} is none of {', '.join(choices)}", f"{key}={proposal}")
    for key, (asked, is_right, example) in RANGES.items():
        value = _value(job, key)
        if value is not None and not is_right(value) and not _is_found_out(job, key, value):
            raise ConfigError(f"{key}={value} should be {asked}", f"{key}={example}")
    fewest, most = job.cluster.fewest_nodes, job.cluster.nodes
    if fewest is not None and 0 < most < fewest:
        raise ConfigError(
            f"cluster.nodes={most} is below cluster.fewest_nodes={fewest}", f"cluster.nodes={most}-{most}"
        )
    if job.optimizer.min_lr > job.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={job.optimizer.min_lr} is above optimizer.lr={job.optimizer.lr}", "optimizer.min_lr=0"
        )
    _check_tuner(job)
    _check_targets(job)


def _is_found_out(job: JobConfig, key: str, value: object) -> bool:
    """Whether a value stands for what ``cluster=auto`` finds."""
    return job.cluster.name == AUTO and value == FOUND_OUT.get(key)


def _check_tuner(job: JobConfig) -> None:
    """Settings of one tuner under another, and those that contradict each other."""
    tuner, ratios = job.tuner, job.optimizer.lr_ratios
    if tuner.name == "full":
        asked = {"dora=true": tuner.dora, "init=pissa": tuner.init == "pissa"}
        asked[f"targets={tuner.targets if isinstance(tuner.targets, str) else as_list(tuner.targets)}"] = (
            tuner.targets != TunerConfig().targets  # somebody means that only these learn, and everything would
        )
        asked[f"modules_to_save={as_list(tuner.modules_to_save)}"] = bool(tuner.modules_to_save)
        asked[f"loraplus_lr_ratio={tuner.loraplus_lr_ratio:g}"] = tuner.loraplus_lr_ratio != 1
        for setting in (setting for setting, is_asked in asked.items() if is_asked):
            raise ConfigError(
                f"tuner.{setting} is for adapters, but tuner.name=full trains the model itself",
                f"tuner=lora tuner.{setting}",
            )
        for pattern, ratio in ratios.items():
            if ratio <= 0:
                raise ConfigError(
                    f"optimizer.lr_ratios has {pattern}: {ratio:g}, which should be above 0",
                    f"tuner.freeze=[{pattern}]",
                )
    elif tuner.freeze:
        raise ConfigError(
            f"tuner.freeze={tuner.freeze} is for full tuning: adapters freeze the base", "tuner.freeze=[]"
        )
    elif ratios:
        raise ConfigError("optimizer.lr_ratios is for full tuning", "optimizer.lr_ratios={} tuner.loraplus_lr_ratio=16")
    if tuner.init == "pissa" and tuner.dropout:
        raise ConfigError(
            f"tuner.init=pissa with tuner.dropout={tuner.dropout:g} would drop the base's largest components at random",
            "tuner.dropout=0",
        )
    if tuner.init == "pissa" and tuner.quantise:
        raise ConfigError(
            f"tuner.init=pissa with tuner.quantise={tuner.quantise} is not built: the base less its largest components "
            "would have to be quantised",
            "tuner.init=default",
        )
    if tuner.init == "pissa" and tuner.path:
        raise ConfigError(f"tuner.init=pissa and tuner.path={tuner.path} are two starts", "tuner.init=default")


def as_list(names: list[str]) -> str:
    """A list as it is typed.

    Example:
        >>> as_list(["embed_tokens", "lm_head"])
        '[embed_tokens,lm_head]'
    """
    return f"[{','.join(names)}]"


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
