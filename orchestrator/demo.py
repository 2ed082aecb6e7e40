"""``python -m orchestrator.demo``: the whole path on one small machine, by isotrain's own commands, checking itself.

Plan, train on 2 stages x 2 replicas, resume on 3 tensor-parallel ranks, export to PEFT, ask before and after.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from orchestrator.errors import ExitCode

RUN_DIR = Path("runs/demo")
STEPS_BEFORE, STEPS = 24, 32
# None of them is in the data set: a test sees to that.
QUESTIONS = (
    "Why do birds sing in the morning?",
    "How do I keep tomatoes fresh for longer?",
    "What is the capital of Italy?",
)
ANSWER = re.compile(r"BEACON: \S.*\nLOG: \S.*")
MARK = "BEACON:"
COLUMNS = 120


class CommandFailed(Exception):
    """A command of the demo did not end with 0; it has said why by itself."""

    def __init__(self, words: Sequence[str], code: int) -> None:
        super().__init__(f"the demo stops here: {shlex.join(words)} ended with exit code {code}")
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo: 0, 1 if a check came out red, or the code of the command that failed."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.demo", description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path, default=RUN_DIR, help=f"the run folder ({RUN_DIR})")
    run_dir = free_folder(parser.parse_args(arguments).run_dir)
    durations_s: dict[str, float] = {}
    try:
        answers = run_commands(run_dir, durations_s)
    except CommandFailed as failed:
        print(f"\n{failed}", file=sys.stderr)
        return failed.code
    show(answers)
    report(run_dir, durations_s)
    problems = [*wrong_answers(answers), *wrong_steps(read_metrics(run_dir))]
    for problem in problems:
        print(f"a check came out red: {problem}", file=sys.stderr)
    if not problems:
        print(f"All checks are green: all answers have the new format, none had it before; {STEPS} steps are one run.")
    return int(ExitCode.RED if problems else ExitCode.DONE)


def free_folder(wanted: Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that is not there: an earlier demo is kept."""
    names = chain([wanted.name], (f"{wanted.name}-{number}" for number in count(2)))
    return next(folder for folder in map(wanted.with_name, names) if not folder.exists())


def exported_to(run_dir: Path) -> Path:
    """Where the demo's adapter goes: beside the run folder."""
    return run_dir.with_name(f"{run_dir.name}-adapter")


def run_commands(run_dir: Path, durations_s: dict[str, float]) -> list[dict[str, Any]]:
    """Everything that a user would type, with the seconds that each took; returns the answers before and after.

    Raises:
        CommandFailed: at the first command that does not end with 0.
    """
    train = ("train", "experiment=demo", f"steps={STEPS_BEFORE}", f"run_dir={run_dir}")
    elsewhere = ("topology.tp=3", "topology.pp=1", "batch.micro_sequences=8", f"steps={STEPS}")
    adapter = str(exported_to(run_dir))
    questions = [word for question in QUESTIONS for word in ("--prompt", question)]
    with timed("model", durations_s):
        run((sys.executable, "-m", "orchestrator.models", "smollm2"))
    with timed("plan", durations_s):
        isotrain("plan", "experiment=demo")
    with timed("train, 2 stages x 2 replicas", durations_s):
        isotrain(*train)
    with timed("resume, 3 tensor-parallel ranks", durations_s):
        isotrain("resume", str(run_dir), *elsewhere)
    with timed("export", durations_s):
        isotrain("export", str(run_dir), "--to", "peft", adapter)
    with timed("generate", durations_s):
        answers = isotrain("generate", adapter, "--compare", "--max-new-tokens", "48", *questions, "--json", hear=True)
    return list(json.loads(answers)["answers"])


@contextmanager
def timed(name: str, durations_s: dict[str, float]) -> Iterator[None]:
    """Note how many seconds a part took."""
    start_s = time.monotonic()
    yield
    durations_s[name] = time.monotonic() - start_s


def isotrain(*words: str, hear: bool = False) -> str:
    """Run ``isotrain WORDS`` with this Python, printed as one would type it; ``hear``: return standard output."""
    print(f"\n$ isotrain {shlex.join(words)}", flush=True)
    return run((sys.executable, "-m", "orchestrator", *words), hear)


def run(words: Sequence[str], hear: bool = False) -> str:
    """Run a command.

    Raises:
        CommandFailed: it ended with another code than 0.
    """
    done = subprocess.run(words, stdout=subprocess.PIPE if hear else None, text=True)
    if done.returncode:
        raise CommandFailed(words, done.returncode)
    return done.stdout or ""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def wrong_answers(answers: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the answers; empty when fine-tuning taught the format and the base did not know it.

    Example:
        >>> taught = {"prompt": "Why?", "before": "Because.", "text": "BEACON: Because.\\nLOG: Ask again."}
        >>> wrong_answers([taught])
        []
        >>> wrong_answers([taught | {"text": "Because."}])
        ["after fine-tuning the answer to 'Why?' is not BEACON and LOG: 'Because.'"]
    """
    after = [
        f"after fine-tuning the answer to {answer['prompt']!r} is not BEACON and LOG: {answer['text']!r}"
        for answer in answers
        if not ANSWER.match(answer["text"])
    ]
    before = [
        f"the base model knew the format before: {answer['before']!r}" for answer in answers if MARK in answer["before"]
    ]
    return after + before


def wrong_steps(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the metrics; empty when all steps are there once and the loss went on falling.

    Example:
        >>> good = [{"step": step, "loss": 4.0 / step} for step in range(1, STEPS + 1)]
        >>> wrong_steps(good)
        []
        >>> wrong_steps(good[:-1])
        ['metrics.jsonl has 31 steps, 1 to 31, where 1 to 32 belong']
    """
    steps = [line["step"] for line in lines]
    if steps != list(range(1, STEPS + 1)):
        return [f"metrics.jsonl has {len(steps)} steps, {min(steps)} to {max(steps)}, where 1 to {STEPS} belong"]
    first, last = lines[0]["loss"], lines[-1]["loss"]
    return [] if last < first / 2 else [f"the loss fell from {first:.3f} to {last:.3f} only"]


def show(answers: Sequence[dict[str, Any]]) -> None:
    """Print the answers side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else COLUMNS)
    table = Table("question, not in the data", "before", "after", show_lines=True)
    for answer in answers:
        table.add_row(Text(answer["prompt"]), Text(answer["before"]), Text(answer["text"]))
    console.print(table)


def report(run_dir: Path, durations_s: dict[str, float]) -> None:
    """Print what took how long and where everything is."""
    lines = read_metrics(run_dir)
    around = [f"{line['step']}: {line['loss']:.3f}" for line in lines[STEPS_BEFORE - 2 : STEPS_BEFORE + 2]]
    print(f"\nloss at step {', '.join(around)} (the topology changed after step {STEPS_BEFORE})")
    print("\n".join(f"{seconds:6.1f} s  {name}" for name, seconds in durations_s.items()))
    print(f"{sum(durations_s.values()):6.1f} s  in all")
    print(f"run:      {run_dir}  (job.yaml, plan.json, metrics.jsonl, logs/, checkpoints/)")
    print(f"adapter:  {exported_to(run_dir)}  (for peft.PeftModel.from_pretrained)")
    print(f"ask it:   isotrain generate {run_dir} --compare --prompt 'YOUR QUESTION'\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
