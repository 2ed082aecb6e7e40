"""``isotrain init``: ask, write the job file, show its plan and what to type next."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.command import add_overrides
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config.job import JobConfig

HEADER = """\
# A job of isotrain's, to be used wherever words of a job are: isotrain train {name}
# What is typed after it wins, as in: isotrain train {name} steps=10
# docs/configuration.md lists every key.
"""


def add_init(parser: argparse.ArgumentParser) -> None:
    """The file, and answers that need not be asked for."""
    parser.add_argument("file", nargs="?", default="job.yaml", metavar="FILE", help="job.yaml")
    add_overrides(parser)


def run_init(arguments: argparse.Namespace) -> int:
    """Ask for what was not typed, write the file, and print the plan and the next command."""
    from orchestrator.cli_plan import show_plan
    from orchestrator.commands import plan_advice, plan_job
    from orchestrator.config.job_file import SUFFIXES
    from orchestrator.config.loading import compose_job
    from orchestrator.doctor.slurm import goes_through_slurm
    from orchestrator.runs import write_whole

    name, typed = arguments.file, list(arguments.overrides)
    if "=" in name:  # a word of the job: no file was named
        name, typed = "job.yaml", [name, *typed]
    file = Path(name).expanduser()
    if file.suffix not in SUFFIXES:
        raise ConfigError(
            f"a job file is named {' or '.join('*' + suffix for suffix in SUFFIXES)}",
            f"isotrain init {shlex.quote(str(file.with_suffix('.yaml')))}",
        )
    _check_free(file)
    words = _answers(file, typed)
    job = compose_job(words)
    planned = plan_job(job)
    _check_free(file)
    write_whole(file, HEADER.format(name=shlex.quote(file.name)) + job_text(words, job))
    next_command = f"isotrain {'submit' if goes_through_slurm(job.cluster) else 'train'} {shlex.quote(str(file))}"
    more = {"file": str(file), "next": next_command}
    if planned.warning:
        more = {"warning": planned.warning, **more}
    show_plan(planned, plan_advice(planned), arguments.json, more)
    return 0


def _check_free(file: Path) -> None:
    if file.exists():
        raise ConfigError(f"{file} is there already", f"isotrain init {file.with_name('another.yaml')}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}", f"mkdir -p {file.parent}")


def _answers(file: Path, typed: Sequence[str]) -> list[str]:
    from orchestrator.interview.detecting import found_clusters, found_data, found_models
    from orchestrator.interview.questions import ask_all, questions

    here = Path.cwd()
    asked = questions(found_models(here), found_data(here), found_clusters(), file.stem)
    return ask_all(asked, typed, sys.stdin.readline, _say)


def _say(text: str) -> None:
    print(text, end="" if text.endswith(": ") else "\n", file=sys.stderr, flush=True)


def job_text(words: Sequence[str], job: JobConfig) -> str:
    """What was chosen, a line each: choices as they were made, values as the job has them (paths from the root)."""
    import yaml

    from orchestrator.config.building import flatten

    values: dict[str, Any] = {}
    known = flatten(job)
    for word in words:
        key, _, choice = word.lstrip("+").partition("=")
        leaf = next((one for one in known if key == one or key.startswith(f"{one}.")), None)
        values[leaf or key] = known[leaf] if leaf else choice
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
