"""Strict and plain: mappings become a frozen JobConfig and go back; two jobs are compared key by key.

Neither Hydra nor torch is needed here, so workers read ``job.yaml`` without them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.checking import check_values
from orchestrator.config.hints import unknown_key
from orchestrator.config.job import JobConfig
from orchestrator.errors import ConfigError

# A job that differs only here is the same run: where it runs, how fast, and what is written down about it.
FREE_KEYS = (
    *("run_dir", "cluster.", "topology.", "engine.", "metrics.", "memory.", "checkpoint.", "recovery.", "sweep."),
    *("batch.micro_sequences", "optimizer.distributed", "model.download"),
)

BARE_TEXT = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)  # as Hydra's lexer has it
NOT_TEXT = frozenset({"null", "true", "false", "inf", "nan"})


def build_job(mapping: Mapping[str, Any]) -> JobConfig:
    """Make the frozen job from a nested mapping; missing keys keep their defaults.

    Raises:
        ConfigError: an unknown key (names the nearest), a value of the wrong type, or one that cannot be meant.
    Example:
        >>> build_job({"steps": 5, "topology": {"tp": 3}}).topology.tp
        3
    """
    job = _build(JobConfig, _with_node_range(mapping), "")
    check_values(job)
    return typing.cast(JobConfig, job)


def _with_node_range(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """``cluster.nodes=2-8`` as the two numbers that it stands for."""
    cluster = mapping.get("cluster") if isinstance(mapping, Mapping) else None
    nodes = cluster.get("nodes") if isinstance(cluster, Mapping) else None
    if not (isinstance(cluster, Mapping) and isinstance(nodes, str)):
        return mapping
    found = re.fullmatch(r"(\d+)-(\d+)", nodes, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"cluster.nodes={nodes} should be a whole number or FEWEST-MOST", "cluster.nodes=2-8")
    return {**mapping, "cluster": {**cluster, "nodes": int(found[2]), "fewest_nodes": int(found[1])}}


def _build(kind: type, mapping: object, where: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise _wrong_type(where, mapping, "a mapping of keys")
    known = typing.get_type_hints(kind)
    values = {}
    for name, value in mapping.items():
        key = f"{where}.{name}" if where else str(name)
        if name not in known:
            raise unknown_key(key, list(all_keys()))
        values[name] = _convert(known[name], value, key)
    return kind(**values)


def _convert(expected: Any, value: object, key: str) -> Any:
    """``value`` as ``expected``: a dataclass, a plain type, list[...], dict[str, Any], or a union of those."""
    if dataclasses.is_dataclass(expected):
        return _build(typing.cast(type, expected), value, key)
    choices = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    for choice in choices:
        converted = _convert_plain(choice, value)
        if converted is not _NO_MATCH:
            return converted
    raise _wrong_type(key, value, " or ".join(_words(choice) for choice in choices))


_NO_MATCH = object()


def _convert_plain(expected: Any, value: object) -> Any:
    if expected is types.NoneType:
        return None if value is None else _NO_MATCH
    origin = typing.get_origin(expected)
    if origin is dict:
        return _convert_mapping(typing.get_args(expected)[1], value)
    if origin is list:
        if not isinstance(value, list):
            return _NO_MATCH
        items = [_convert_plain(typing.get_args(expected)[0], item) for item in value]
        return _NO_MATCH if any(item is _NO_MATCH for item in items) else items
    if expected is float:
        return _number(value)
    if expected is int and type(value) is float and value.is_integer():  # 1e3
        return int(value)
    return value if type(value) is expected else _NO_MATCH


def _convert_mapping(expected: Any, value: object) -> Any:
    if not isinstance(value, Mapping):
        return _NO_MATCH
    if expected is Any:
        return dict(value)
    items = {str(key): _convert_plain(expected, item) for key, item in value.items()}
    return _NO_MATCH if any(item is _NO_MATCH for item in items.values()) else items


def _number(value: object) -> Any:
    """Numbers, and what YAML 1.1 takes for text though a number is meant (``1e-4``); no nan, no infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _NO_MATCH
    try:
        number = float(value)
    except ValueError:
        return _NO_MATCH
    return number if math.isfinite(number) else _NO_MATCH


def _words(expected: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
        list[str]: "a list of texts",
        list[float]: "a list of numbers",
        dict[str, float]: "a mapping of names to numbers",
    }
    return names.get(expected, "a mapping")


def _wrong_type(key: str, value: object, expected: str) -> ConfigError:
    example = quote_override(key, flatten(JobConfig())[key]) if key in all_keys() else f"{key}={{KEY: VALUE}}"
    return ConfigError(f"{key or 'the job'}={value!r} should be {expected}", f"for example {example}")


def all_keys() -> dict[str, Any]:
    """Every dotted key of a job with its type.

    Example:
        >>> all_keys()["batch.global_sequences"]
        <class 'int'>
    """

    def walk(kind: Any, where: str) -> typing.Iterator[tuple[str, Any]]:
        for name, expected in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(expected):
                yield from walk(expected, f"{where}{name}.")
            else:
                yield f"{where}{name}", expected

    return dict(walk(JobConfig, ""))


def job_to_yaml(job: JobConfig) -> str:
    """The job as YAML text: what was asked for, nothing derived. :func:`job_from_yaml` gives an equal job back."""
    import yaml

    text: str = yaml.safe_dump(dataclasses.asdict(job), sort_keys=False, allow_unicode=True)
    return text


def job_from_yaml(text: str) -> JobConfig:
    """Read what :func:`job_to_yaml` wrote.

    Raises:
        ConfigError: no YAML, or no job.
    Example:
        >>> job_from_yaml(job_to_yaml(JobConfig(steps=7))) == JobConfig(steps=7)
        True
    """
    return build_job(mapping_from_yaml(text))


def mapping_from_yaml(text: str) -> dict[str, Any]:
    """The nested mapping of a job file, not yet checked.

    Raises:
        ConfigError: no YAML, or no mapping.
    """
    import yaml

    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"job.yaml is no YAML: {error}", "restore job.yaml, or start in a new run_dir") from error
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"job.yaml holds {type(mapping).__name__}, not a mapping", "restore job.yaml, or start in a new run_dir"
        )
    checkpoint = mapping.get("checkpoint")
    if isinstance(checkpoint, dict) and "keep" in checkpoint:  # its name in job files of isotrain 0.1
        checkpoint["keep_last"] = checkpoint.pop("keep")
    cluster = mapping.get("cluster")
    slurm = cluster.get("slurm") if isinstance(cluster, dict) else None
    if isinstance(slurm, dict):
        for name in {"restarts", "silent_s", "stalled_s"} & slurm.keys():  # where isotrain 0.1 had them
            mapping.setdefault("recovery", {})[name] = slurm.pop(name)
        if (nodes := slurm.pop("nodes", None)) is not None:
            mapping["cluster"]["nodes"] = nodes
    return mapping


def read_job(run_dir: Path) -> JobConfig:
    """The job of a run folder.

    Raises:
        ConfigError: there is no job.yaml, or it is no job.
    """
    file = run_dir / "job.yaml"
    if not file.is_file():
        raise ConfigError(f"{run_dir} is no run folder: it has no job.yaml", "isotrain train ... run_dir=DIR")
    return job_from_yaml(file.read_text(encoding="utf-8"))


def as_override(value: Any) -> str:
    """A value in Hydra's override grammar.

    Example:
        >>> as_override(["q_proj", "v_proj"]), as_override(None), as_override(True), as_override(r"layers.*")
        ('[q_proj,v_proj]', 'null', 'true', "'layers.*'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(as_override(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and (not BARE_TEXT.fullmatch(value) or value.lower() in NOT_TEXT):
        # In Hydra's quotes a backslash counts only before a quote.
        return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value) + "'"
    return str(value)


def quote_override(key: str, value: Any) -> str:
    """``KEY=VALUE`` as it can be typed into a shell.

    Example:
        >>> quote_override("optimizer.lr", 0.001), quote_override("tuner.targets", ["q_proj"])
        ('optimizer.lr=0.001', "'tuner.targets=[q_proj]'")
    """
    return shlex.quote(f"{key}={as_override(value)}")


def flatten(job: JobConfig) -> dict[str, Any]:
    """Dotted keys to values; lists, and mappings that a user gave, stay whole.

    Example:
        >>> flatten(JobConfig())["tuner.r"]
        16
    """
    flat = {}
    for key in all_keys():
        value: Any = job
        for name in key.split("."):
            value = getattr(value, name)
        flat[key] = value
    return flat


def differences(first: JobConfig, second: JobConfig) -> list[tuple[str, Any, Any]]:
    """The keys in which two jobs differ, with both values, in the order of the job's fields.

    Example:
        >>> differences(JobConfig(steps=1), JobConfig(steps=2))
        [('steps', 1, 2)]
    """
    left, right = flatten(first), flatten(second)
    return [(key, left[key], right[key]) for key in left if left[key] != right[key]]


def blocking_differences(before: JobConfig, now: JobConfig) -> list[tuple[str, Any, Any]]:
    """The differences that make ``now`` another run than ``before``.

    Where it runs (cluster, topology, engine, micro-batches, the optimizer's sharding), memory, metrics, checkpoints and
    the folder's name are free, and so is a larger ``steps``.

    Example:
        >>> blocking_differences(JobConfig(steps=1), JobConfig(steps=2, seed=3))
        [('seed', 0, 3)]
    """
    return [
        (key, old, new)
        for key, old, new in differences(before, now)
        if not key.startswith(FREE_KEYS) and not (key == "steps" and new > old)
    ]


def meaning(job: JobConfig) -> dict[str, Any]:
    """The keys that make a job the run that it is, with their values: what :func:`blocking_differences` looks at.

    Example:
        >>> meaning(JobConfig(seed=3))["seed"], "topology.tp" in meaning(JobConfig())
        (3, False)
    """
    return {key: value for key, value in flatten(job).items() if not key.startswith(FREE_KEYS)}


def same_run(before: JobConfig, now: JobConfig) -> bool:
    """Whether ``now`` may go on where ``before`` stopped; see :func:`blocking_differences`."""
    return not blocking_differences(before, now)
