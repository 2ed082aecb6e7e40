"""Questions whose answers become the words of a job; a bad answer is asked again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.environment import LaunchError
from orchestrator.commands import check_model, plan_job, run_folder
from orchestrator.config.building import as_override
from orchestrator.config.job import JobConfig
from orchestrator.config.job_file import laid_over
from orchestrator.config.loading import compose_job, group_choices
from orchestrator.doctor.job import look_at_data
from orchestrator.errors import ConfigError, IsotrainError
from orchestrator.runs import decide_train
from parallel.specs import SpecError

WITH_PATHS = ("model", "data")  # an answer that is no choice is a path
NEED_PATHS = ("hf", "jsonl")  # choices that stand for a path that is still to be named


@dataclass(frozen=True)
class Question:
    """``proposals``: what was found, likeliest first; the first is taken when nothing is typed. ``look``: judges the
    job so far and returns words about it, or raises what is wrong."""

    section: str
    text: str
    proposals: tuple[str, ...]
    look: Callable[[JobConfig], str]


def questions(models: Sequence[str], data: Sequence[str], clusters: Sequence[str], name: str) -> list[Question]:
    """What is asked, in order. ``name``: of the run folder that is proposed."""
    return [
        Question("model", "Which model? A choice, a folder or a cached hub id", (*models, "smollm2_135m"), _model),
        Question("data", "Which data? A choice or a file", (*data, "lighthouse"), look_at_data),
        Question("tuner", "Tuned how?", ("lora",), lambda job: ""),
        Question("cluster", "Where does it run?", tuple(clusters), lambda job: plan_job(job).words),
        Question("run_dir", "Where are checkpoints, metrics and logs kept?", (shlex.quote(f"runs/{name}"),), _run),
    ]


def _model(job: JobConfig) -> str:
    check_model(job.model)
    return ""


def _run(job: JobConfig) -> str:
    return decide_train(run_folder(job), job).message


def as_words(section: str, answer: str) -> list[str]:
    """An answer as words of a job: ``CHOICE``, a path, or ``KEY=VALUE``, with more KEY=VALUE after it.

    Raises:
        ConfigError: a quote is left open.
    Example:
        >>> as_words("cluster", "slurm_cpu cluster.nodes=2"), as_words("data", "'my rows.jsonl'")
        (['cluster=slurm_cpu', 'cluster.nodes=2'], ["data.path='my rows.jsonl'"])
    """
    try:
        first, *more = shlex.split(answer)
    except ValueError as error:
        raise ConfigError(f"{answer}: {error}", shlex.quote(answer)) from error
    if "=" in first:
        return [first, *more]
    if section == "run_dir" or (section in WITH_PATHS and first not in group_choices()[section]):
        key = "run_dir" if section == "run_dir" else f"{section}.path"
        return [f"{key}={as_override(first)}", *more]
    return [f"{section}={first}", *more]


def ask_all(
    asked: Sequence[Question], typed: Sequence[str], read: Callable[[], str], say: Callable[[str], None]
) -> list[str]:
    """The words of a job: those that were typed, and an answer to every question about a section that they leave open.

    Args:
        read: the next line, with its end; empty when there is none.
        say: shows a line.
    Raises:
        ConfigError: there are no more lines, or what was typed cannot work (as for a bad answer, which is asked again).
    """
    words = list(typed)
    sections = {re.split("[.=]", word.lstrip("+"))[0] for word in typed}
    for question in asked:
        if question.section in sections:
            question.look(compose_job(words))
        else:
            words = laid_over(words, _ask(question, words, read, say))
    return words


def _ask(question: Question, words: Sequence[str], read: Callable[[], str], say: Callable[[str], None]) -> list[str]:
    default = question.proposals[0]
    say(f"\n{question.text}")
    if choices := [name for name in group_choices().get(question.section, []) if name not in NEED_PATHS]:
        say(f"  choices: {', '.join(choices)}")
    if len(question.proposals) > 1:
        say(f"  here:    {', '.join(dict.fromkeys(question.proposals))}")
    while True:
        say(f"{question.section} [{default}]: ")
        line = read()
        if not line:
            raise ConfigError(
                f"the answers ended before the question about {question.section}",
                "isotrain init FILE   (a line for each answer; an empty one takes what is in brackets)",
            )
        try:
            answer = as_words(question.section, line.strip() or default)
            seen = question.look(compose_job(laid_over(words, answer)))
        except (IsotrainError, SpecError, LaunchError) as error:
            hint = getattr(error, "hint", "")
            say(f"  {error}" + (f"\n  hint: {hint}" if hint else ""))
            continue
        if seen:
            say(f"  {seen}")
        return answer
