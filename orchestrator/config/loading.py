"""Hydra composes plain YAML from ``configs/``; the strict builder makes the job. Hydra is imported only here.

Hydra writes no folders, changes no directory and sets up no logging: only its composition is used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from orchestrator.config.building import (
    all_keys,
    blocking_differences,
    build_job,
    differences,
    job_from_yaml,
    job_to_yaml,
    mapping_from_yaml,
    read_job,
    same_run,
)
from orchestrator.config.hints import SETTINGS, unknown_key
from orchestrator.config.job import JobConfig
from orchestrator.config.job_file import with_job_files
from orchestrator.config.paths import with_absolute_paths
from orchestrator.config.secrets import refuse_secrets
from orchestrator.errors import ConfigError

__all__ = [
    "blocking_differences",
    "compose_job",
    "compose_points",
    "config_root",
    "differences",
    "group_choices",
    "hydra_words",
    "job_from_yaml",
    "job_to_yaml",
    "override_job",
    "parse_words",
    "read_job",
    "same_run",
]


def config_root() -> Path:
    """The folder of configs: inside the installed package, or beside it in a checkout.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "job.yaml").is_file():
            return folder
    raise ConfigError(f"no configs were found in {package} or beside it", "pip install --force-reinstall isotrain")


def group_choices() -> dict[str, list[str]]:
    """The groups of ``configs/`` and the names that each offers, sorted."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(config_root().iterdir())
        if folder.is_dir() and not folder.name.startswith(("_", "."))
    }


def compose_job(overrides: Sequence[str] = ()) -> JobConfig:
    """Compose ``configs/job.yaml`` with overrides in Hydra's grammar (``group=choice``, ``key.name=value``).

    Names of job files among them stand for the words in them. Files and folders in it are named from the root.

    Raises:
        ConfigError: the text is no override, a group has no such choice, a key is unknown, a value is of a wrong type.
    """
    parsed = _parse(with_job_files(overrides))
    _check_known(parsed)
    return with_absolute_paths(build_job(_compose(_as_hydra_takes_them(parsed))))


def compose_points(common: Sequence[str], points: Sequence[Sequence[str]]) -> list[JobConfig | ConfigError]:
    """:func:`compose_job` of the common words and each point's, with the files read once for all that choose the same.

    Args:
        common: words of every point, job files among them read already.
        points: the words of each.
    Returns:
        The job of each point, or what speaks against it.
    """
    configs: dict[tuple[str, ...], Any] = {}
    jobs: list[JobConfig | ConfigError] = []
    for point in points:
        try:
            jobs.append(_compose_point(common, point, configs))
        except ConfigError as error:
            jobs.append(error)
    return jobs


def _compose_point(common: Sequence[str], point: Sequence[str], configs: dict[tuple[str, ...], Any]) -> JobConfig:
    """A point's values on top of ``configs[its choices]``, which is made where it is missing; as Hydra sets values."""
    import copy

    from omegaconf import OmegaConf

    parsed = _parse([*common, *point])
    _check_known(parsed)
    groups = group_choices()
    shared, own = parsed[: len(common)], parsed[len(common) :]
    chosen = [*shared, *(one for one in own if one.key_or_group in groups)]
    key = tuple(one.input_line for one in chosen)
    if key not in configs:
        configs[key] = _composed(_as_hydra_takes_them(chosen))
    config = copy.deepcopy(configs[key])
    for one in own:
        if one.key_or_group not in groups:
            OmegaConf.update(config, one.key_or_group, one.value(), merge=True, force_add=True)
    return with_absolute_paths(build_job(_plain(config)))


def hydra_words(overrides: Sequence[str]) -> list[str]:
    """Words as Hydra's strict composition takes them; several values for one key are let pass.

    Raises:
        ConfigError: a word is no override.
    Example:
        >>> hydra_words(["tuner=lora", "steps=5,6", "experiment=null"])
        ['tuner=lora', '++steps=5,6']
    """
    return _as_hydra_takes_them(parse_words(overrides))


def _as_hydra_takes_them(parsed: Sequence[Any]) -> list[str]:
    return [_forced(override) for override in parsed if not _is_nothing(override)]


def override_job(job_yaml: str, overrides: Sequence[str]) -> JobConfig:
    """The job of a run folder with overrides on top; a ``group=choice`` replaces that whole section.

    Raises:
        ConfigError: as :func:`compose_job`, or ``experiment=`` was given (it is a whole recipe, not a change).
    """
    from omegaconf import OmegaConf

    parsed = _parse(overrides)
    _check_known(parsed)
    config = OmegaConf.create(mapping_from_yaml(job_yaml))
    for override in parsed:
        key = override.key_or_group
        if key == "experiment":
            raise ConfigError(
                f"{override.input_line}: a recipe cannot be laid over a run that exists",
                f"isotrain train {override.input_line} run_dir=ANOTHER",
            )
        if key in group_choices():
            OmegaConf.update(config, key, _compose([override.input_line])[key], merge=False, force_add=True)
        else:
            OmegaConf.update(config, key, override.value(), merge=False, force_add=True)
    return with_absolute_paths(build_job(_plain(config)))


def parse_words(overrides: Sequence[str]) -> list[Any]:
    """Hydra's ``Override`` of each word; several values for one key are let pass. Job files are read already.

    Raises:
        ConfigError: a text is no override, or holds a secret.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    refuse_secrets(overrides)
    parser = OverridesParser.create()
    parsed = []
    for place, text in enumerate(overrides):
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{text!r} is no override: {reason}", _well_typed(text, overrides[place + 1 :])
            ) from error
    return parsed


def _parse(overrides: Sequence[str]) -> list[Any]:
    parsed = parse_words(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line!r} asks for several runs at once", _one_run(override.input_line))
    return parsed


def _well_typed(text: str, rest: Sequence[str]) -> str:
    """What was meant by a word that is no override: a list that the shell has cut at its spaces, or unquoted text."""
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text}=VALUE"
    for count in range(1, len(rest) + 1):
        whole = " ".join([value, *rest[:count]])
        if whole.startswith("[") and whole.count("[") == whole.count("]"):
            return f"'{key}={whole}'   (quoted for the shell)"
    return f"'{key}=\"{value}\"'   (quoted for the shell and for Hydra)"


def _one_run(text: str) -> str:
    """The first of several values; all of them as one list where the key takes a list."""
    key, _, value = text.partition("=")
    expected = all_keys().get(key)
    takes_list = any(get_origin(choice) is list for choice in (expected, *get_args(expected)))
    return f"'{key}=[{value}]'" if takes_list else f"{key}={value.split(',')[0]}   (all of them: isotrain sweep)"


def _check_known(parsed: Sequence[Any]) -> None:
    """Every override names a group with that choice, or a key that a job has."""
    choices, keys = group_choices(), all_keys()
    free = tuple(f"{key}." for key, expected in keys.items() if "dict[" in str(expected))
    for override in parsed:
        key = override.key_or_group
        if override.is_delete():
            instead = f"{key}={choices[key][0]}" if choices.get(key) else f"{key}=VALUE"
            raise ConfigError(f"{override.input_line}: nothing can be left out of a job", instead)
        if key in choices:
            if not isinstance(override.value(), Mapping):
                _check_choice(key, override.value(), choices[key])
        elif key == "hydra" or key.startswith("hydra."):
            raise ConfigError(f"{override.input_line}: isotrain has no Hydra settings", "leave it out")
        elif key not in keys and not key.startswith(free):
            raise unknown_key(key, list(keys), tuple(choices), override.input_line.partition("=")[2] or "VALUE")


def _check_choice(group: str, choice: object, choices: Sequence[str]) -> None:
    if choice in choices or (group == "experiment" and choice is None):
        return
    choice = "null" if choice is None else choice
    near = (difflib.get_close_matches(str(choice), choices, n=1) or list(choices[:1]) or ["CHOICE"])[0]
    names = ", ".join(choices) or "none"
    hint = SETTINGS.get((group, str(choice).lower()), f"{group}={near}")
    if choice != "null" and group in ("model", "data"):
        hint += f"  or  {group}.path={choice}"
    raise ConfigError(f"{group}={choice}: there is no configs/{group}/{choice}.yaml; choices: {names}", hint)


def _is_nothing(override: Any) -> bool:
    """``experiment=null``: no recipe; Hydra takes no null for a group."""
    return bool(override.key_or_group == "experiment" and override.value() is None)


def _forced(override: Any) -> str:
    """Values may set any key of the job, also one that a group's file leaves at its default (Hydra wants ``++``)."""
    line: str = override.input_line
    is_group = override.key_or_group in group_choices()
    return line if is_group else f"++{line.lstrip('+')}"


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    return _plain(_composed(overrides))


def _composed(overrides: Sequence[str]) -> Any:
    """What Hydra composes; nothing in it is resolved yet."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(config_root()), version_base="1.3", job_name="isotrain"):
            return compose(config_name="job", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"the configs do not compose: {str(error).splitlines()[0]}",
            "GROUP=CHOICE and KEY=VALUE, as in: isotrain plan model=smollm2_135m steps=10",
        ) from error


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"a value cannot be resolved: {str(error).splitlines()[0]}", "write the value itself: KEY=VALUE"
        ) from error
    plain.pop("experiment", None)
    return {str(key): value for key, value in plain.items()}
