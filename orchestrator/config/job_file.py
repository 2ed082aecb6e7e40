"""Job files: the words of a command line, kept in a YAML file.

    model: smollm2_135m            # GROUP: CHOICE
    data: {path: chat.jsonl}       # or the values of a section
    cluster: slurm_4x8
    cluster.slurm.partition: gpu   # dotted, beside the choice
    steps: 200

``isotrain train job.yaml steps=300``: the file's words come first, and what is typed wins. A run folder's ``job.yaml``
is one, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.config.building import all_keys, as_override
from orchestrator.errors import ConfigError

SUFFIXES = (".yaml", ".yml")


def is_job_file(word: str) -> bool:
    """Whether a word names a job file; no key has a slash, so folders in its path may have ``=`` in their names.

    Example:
        >>> is_job_file("runs/first/job.yaml"), is_job_file("data.path=rows.yaml"), is_job_file("runs/seed=1/job.yaml")
        (True, False, True)
    """
    key, equals, _ = word.partition("=")
    return word.endswith(SUFFIXES) and (not equals or "/" in key)


def with_job_files(words: Sequence[str]) -> list[str]:
    """The words, with those of job files in place of the files' names and before all that is typed, which wins.

    A typed GROUP=CHOICE replaces all that a file says of that section.

    Raises:
        ConfigError: a file is not there, is no YAML, or holds no mapping.
    Example:
        >>> with_job_files(["model=smollm2_135m", "steps=3"])
        ['model=smollm2_135m', 'steps=3']
    """
    kept: list[str] = []
    for word in words:
        if is_job_file(word):
            kept = laid_over(kept, words_of(read_job_file(Path(word))))
    return laid_over(kept, [word for word in words if not is_job_file(word)])


def laid_over(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """``words`` without the sections that ``more`` chooses anew, then ``more``.

    Example:
        >>> laid_over(["cluster=slurm_4x8", "cluster.nodes=2", "seed=1"], ["cluster=one"])
        ['seed=1', 'cluster=one']
    """
    sections = {key.partition(".")[0] for key in all_keys() if "." in key}
    chosen = sections & {word.partition("=")[0] for word in more}
    return [*(word for word in words if re.split("[.=]", word)[0] not in chosen), *more]


def read_job_file(file: Path) -> dict[str, Any]:
    """The mapping in a job file.

    Raises:
        ConfigError: it is not there, is no YAML, or holds no mapping.
    """
    import yaml

    try:
        mapping = yaml.safe_load(file.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"job file {file}: {error.strerror}", f"isotrain init {file}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"job file {file} is no YAML: {error}", "KEY: VALUE, a line each") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"job file {file} holds {type(mapping).__name__}, not a mapping", "KEY: VALUE, a line each")
    return mapping


def words_of(mapping: Mapping[str, Any]) -> list[str]:
    """A job file's mapping as words, choices first.

    Example:
        >>> words_of({"data": {"path": "my rows.jsonl"}, "model": "smollm2_135m", "tuner.targets": ["q_proj"]})
        ['model=smollm2_135m', "data.path='my rows.jsonl'", 'tuner.targets=[q_proj]']
    """
    known = all_keys()
    words = list(_walk(mapping, "", known))
    return sorted(words, key=lambda word: word.partition("=")[0] in known)  # stable


def _walk(mapping: Mapping[str, Any], where: str, known: Mapping[str, Any]) -> Iterator[str]:
    for name, value in mapping.items():
        key = f"{where}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _walk(value, f"{key}.", known)
        else:
            yield f"{key}={as_override(value)}"
