"""The command line: arguments in, words and exit codes out. Imports of what a command needs wait until it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.exits import RUN_AGAIN
from launch.output import CLEAR_LINE
from launch.stop import Stopped, stopping_at_once
from orchestrator.calibrate.command import add_calibrate, run_calibrate
from orchestrator.cli_checkpoints import add_checkpoints, add_verify, run_checkpoints, run_explain, run_verify
from orchestrator.cli_doors import add_convert, add_copy, add_export, run_convert, run_copy, run_export
from orchestrator.cli_plan import add_bench, add_plan, run_bench, run_plan, show_plan
from orchestrator.command import CODES, Command, add_overrides
from orchestrator.doctor.command import add_doctor, run_doctor
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.interview.command import add_init, run_init
from orchestrator.jobs.cli import ALLOCATION
from orchestrator.jobs.cli import COMMANDS as SLURM_COMMANDS
from orchestrator.pages.command import add_report, run_report
from orchestrator.piping import until_unread
from orchestrator.probing.command import INSIDE as PROBING
from orchestrator.sweeps.command import SWEEP
from orchestrator.sweeps.inside import TOGETHER


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are said with a hint and never with a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else int(ExitCode.CONFIG)
    if words[0] == "worker":
        return _worker(words[1:])
    from orchestrator.supervise import Explanation, outcome

    def say(explanation: Explanation) -> None:
        if explanation.code == ExitCode.CONFIG and _is_not_first_rank():
            return  # all ranks of a launch by hand learn it; one says it
        print(explanation.render(), file=sys.stderr)
        if "--json" in words:
            print(json.dumps({"code": explanation.code, "error": explanation.message, "hint": explanation.hint}))

    return outcome(lambda: until_unread(lambda: _dispatch(words[0], words[1:])), say)


def _dispatch(name: str, words: list[str]) -> int:
    if name in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"isotrain {version('isotrain')}")
        return 0
    if name in INSIDE:
        return INSIDE[name].run(_with_job_files(INSIDE[name].parser(name).parse_args(words)))
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1) or ["--help"]
        raise ConfigError(f"there is no command {name!r} (there are: {', '.join(COMMANDS)})", f"isotrain {near[0]}")
    command = COMMANDS[name]
    return command.run(_with_job_files(command.parser(name).parse_intermixed_args(words)))


def _with_job_files(arguments: argparse.Namespace) -> argparse.Namespace:
    """The names of job files among a job's words give way to the words in them."""
    if "overrides" in arguments:
        from orchestrator.config.job_file import with_job_files

        arguments.overrides = with_job_files(arguments.overrides)
    return arguments


def _help() -> str:
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    examples = [f"  {command.example}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "usage: isotrain COMMAND ... [--json]",
            "",
            "The same fine-tuning run on any topology. Each command has --help.",
            "",
            *lines,
            "",
            "examples:",
            *examples,
            "",
            CODES,
        ]
    )


def _say(text: str) -> None:
    clear = CLEAR_LINE if sys.stderr.isatty() else ""  # the last line of a panel may be here
    print(clear + text, file=sys.stderr, flush=True)


def _worker(words: list[str]) -> int:
    """One rank of a launched run, or of several points of a sweep: ``worker RUN_DIR``. Not for people."""
    from launch.environment import rank_environment
    from orchestrator.supervise import guarded, leave_process
    from orchestrator.sweeps.bundle import is_bundle

    run_dir = Path(words[0])
    me = rank_environment()

    def work() -> int:
        if is_bundle(run_dir):
            from orchestrator.sweeps.turns import main as train_in_turns

            return train_in_turns(run_dir)
        from orchestrator.worker import main as train_rank

        return train_rank(run_dir)

    leave_process(guarded(run_dir, me.rank if me else 0, work))
    return 0


def _is_not_first_rank() -> bool:
    from launch.environment import LaunchError, rank_environment

    try:
        me = rank_environment()
    except LaunchError:
        return False
    return me is not None and me.rank > 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the command, and start nothing")
    parser.add_argument("-m", "--multirun", action="store_true", help="as in Hydra: the same as isotrain sweep")


def _train(arguments: argparse.Namespace) -> int:
    if arguments.multirun:
        return SWEEP.run(argparse.Namespace(**vars(arguments), jobs=None, best="loss"))
    from launch.environment import rank_environment

    if rank_environment() is not None:
        from orchestrator.torchrun import train_by_hand

        return train_by_hand(arguments.overrides, arguments.json)
    from orchestrator import commands

    if arguments.dry_run:
        from orchestrator.config.loading import compose_job

        job = compose_job(arguments.overrides)
        planned = commands.plan_job(job)
        command = commands.rendered_launch(planned, commands.run_folder(job)).text
        show_plan(planned, commands.plan_advice(planned), arguments.json, {"command": command})
        return 0
    return _report(lambda: commands.train(arguments.overrides, _say), arguments.json)


def _resume(arguments: argparse.Namespace) -> int:
    from launch.environment import rank_environment

    if rank_environment() is not None:
        raise ConfigError(
            "resume starts its own ranks, and this process is already one (RANK is set)",
            f"torchrun ... -m orchestrator train ... run_dir={arguments.run_dir}  (it resumes by itself)",
        )
    if arguments.explain:
        return run_explain(arguments)
    from orchestrator.commands import resume

    return _report(lambda: resume(arguments.run_dir, arguments.overrides, _say), arguments.json)


def _report(train: Callable[[], Any], as_json: bool) -> int:
    """Train, and say how it ended."""
    try:
        with stopping_at_once():
            finished = train()
        message, summary = finished.message, finished.summary()
    except Stopped as stopped:
        message = f"interrupted by {stopped} while no rank ran: there was nothing to save"
        summary = {"code": int(ExitCode.INTERRUPTED), "error": message, "hint": RUN_AGAIN}
    _say(message)
    if summary["hint"]:
        _say(f"hint: {summary['hint']}")
    if as_json:
        print(json.dumps(summary))
    return int(summary["code"])


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="the run folder")
    add_overrides(parser)
    parser.add_argument("--explain", action="store_true", help="say what would be restored and what has changed")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} should be at least 1")
    return number


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR", help="a run folder, a checkpoint, an adapter or a model")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=_at_least_one, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--compare", action="store_true", help="show what the base model says, too")


def _generate(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from orchestrator.generate import generate

    answers = generate(arguments.path, arguments.prompt, arguments.max_new_tokens, arguments.compare)
    if arguments.json:
        print(json.dumps({"code": 0, "answers": [asdict(answer) for answer in answers]}))
    elif arguments.compare:
        _print_side_by_side(answers)
    else:
        print("\n\n".join(answer.text for answer in answers))
    return 0


def _print_side_by_side(answers: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", "before", "after", show_lines=True)
    for answer in answers:
        table.add_row(Text(answer.prompt), Text(answer.before or ""), Text(answer.text))
    Console().print(table)


def _add_certify(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    parser.add_argument("--up-to", type=int, default=4, metavar="N", help="topologies of up to N processes (4)")
    parser.add_argument("--tuner", action="append", default=[], metavar="NAME", help="this row only; several times")
    parser.add_argument("--only", default="", metavar="TEXT", help="topologies with this in their name, such as tp2")
    parser.add_argument("--out", type=Path, default=Path("certificate.json"), metavar="FILE", help="certificate.json")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the grid between a page's marks")
    parser.add_argument("--resume", action="store_true", help="keep the green cells that --out has from a run before")
    parser.add_argument("--ship", action="store_true", help="make it the certificate that plans are held against")


def _certify(arguments: argparse.Namespace) -> int:
    from orchestrator.certify.command import Request
    from orchestrator.certify.report import Outputs, certified
    from orchestrator.config.loading import compose_job

    request = Request(compose_job(arguments.overrides), arguments.up_to, tuple(arguments.tuner), arguments.only)
    outputs = Outputs(arguments.out, arguments.write, arguments.json, arguments.ship, arguments.resume)
    return certified(request, outputs)


INSIDE = {"allocation": ALLOCATION, "together": TOGETHER, **PROBING}  # not for people: what scripts and sweeps run
COMMANDS: dict[str, Command] = {
    "plan": Command(
        "Show what would run and why: topology, batch split, memory. Starts nothing.",
        "isotrain plan model=smollm2_135m cluster=laptop --why topology.tp=3",
        add_plan,
        run_plan,
    ),
    "train": Command(
        "Train; go on by itself when run_dir holds a checkpoint of the same run.",
        "isotrain train model=smollm2_135m data=lighthouse run_dir=runs/first",
        _add_train,
        _train,
    ),
    "resume": Command(
        "Go on with a run after its newest checkpoint, on another topology if you like.",
        "isotrain resume runs/first topology.tp=3 topology.pp=1",
        _add_resume,
        _resume,
    ),
    "sweep": SWEEP,
    "doctor": Command(
        "Look whether a run would start here, and say what to do where it would not.",
        "isotrain doctor model=smollm2_135m data=lighthouse cluster=laptop",
        add_doctor,
        run_doctor,
    ),
    "init": Command(
        "Ask for model, data, tuner and cluster, and write a job file; shows its plan.",
        "isotrain init job.yaml",
        add_init,
        run_init,
    ),
    "certify": Command(
        "Prove on a small copy of your model that every topology and tuner computes what one process does.",
        "isotrain certify model=smollm2_135m --up-to 2 --tuner lora",
        _add_certify,
        _certify,
    ),
    "calibrate": Command(
        "Measure this machine in under 3 minutes; plans for it use what was measured, and say so.",
        "isotrain calibrate",
        add_calibrate,
        run_calibrate,
    ),
    "bench": Command(
        "Hold the planner's estimates against published, measured runs.",
        "isotrain bench planner --rows measured.jsonl",
        add_bench,
        run_bench,
    ),
    "report": Command(
        "Write a run's page: curves, launches, ranks, checkpoints, plan; also while it runs.",
        "isotrain report runs/first --html first.html",
        add_report,
        run_report,
    ),
    "checkpoints": Command(
        "List a run's checkpoints: step, loss, size, topology, state.",
        "isotrain checkpoints runs/first --verify",
        add_checkpoints,
        run_checkpoints,
    ),
    "verify": Command(
        "Prove a checkpoint on disk, or that two hold the same training state.",
        "isotrain verify runs/first runs/second/checkpoints/step-000100",
        add_verify,
        run_verify,
    ),
    "export": Command(
        "Write the newest checkpoint as a PEFT adapter, as a merged model, or for megatron-core.",
        "isotrain export runs/first --to peft adapter",
        add_export,
        run_export,
    ),
    "copy": Command(
        "Copy a checkpoint to or from another place (s3://...), proven there by its digests.",
        "isotrain copy runs/first/checkpoints/step-000050 s3://bucket/step-000050",
        add_copy,
        run_copy,
    ),
    "convert": Command(
        "Make a folder of other tools (pickled weights, torch_dist) one in safetensors.",
        "isotrain convert old-model new-model --allow-pickle",
        add_convert,
        run_convert,
    ),
    "generate": Command(
        "Answer a prompt with transformers and peft.",
        'isotrain generate runs/first --prompt "Why is the sky blue?"',
        _add_generate,
        _generate,
    ),
    **SLURM_COMMANDS,
}


if __name__ == "__main__":
    sys.exit(main())
