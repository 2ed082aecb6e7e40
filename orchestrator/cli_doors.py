"""Arguments and words of the commands that let data in and out: export, copy, convert."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_export(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``isotrain export``."""
    parser.add_argument("path", type=Path, metavar="DIR", help="a run folder, a checkpoint (torch_dist: or a model)")
    parser.add_argument("--to", required=True, choices=("peft", "merged", "torch_dist"), help="an adapter, or a model")
    parser.add_argument("out", metavar="OUT", help="a new folder, or a URL such as s3://bucket/x")


def run_export(arguments: argparse.Namespace) -> int:
    """Export, and say where the result is."""
    from orchestrator.exporting import export, export_to_url

    if "://" in arguments.out:
        export_to_url(arguments.path, arguments.to, arguments.out, _say)
    else:
        export(arguments.path, arguments.to, Path(arguments.out), _say)
    _say(f"exported to {arguments.out}")
    if arguments.json:
        print(json.dumps({"code": 0, "to": arguments.to, "out": arguments.out}))
    return 0


def add_copy(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``isotrain copy``."""
    parser.add_argument("source", metavar="FROM", help="a checkpoint's folder, here or behind a URL")
    parser.add_argument("target", metavar="TO", help="a new folder, here or behind a URL")


def run_copy(arguments: argparse.Namespace) -> int:
    """Copy a checkpoint, and say what was done."""
    from dataclasses import asdict

    from orchestrator.storage import copy_checkpoint

    sent = copy_checkpoint(arguments.source, arguments.target)
    kept = f", {sent.kept} were there" if sent.kept else ""
    _say(f"copied {sent.files} files ({sent.bytes:,} bytes{kept}) to {arguments.target}; read back and proven")
    if arguments.json:
        print(json.dumps({"code": 0, "out": arguments.target, **asdict(sent)}))
    return 0


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``isotrain convert``."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with pickled weights, or a torch_dist checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, in safetensors")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open pickled weights, by the unpickler that runs no code"
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="of a torch_dist checkpoint: where its config.json and tokenizer are"
    )
    parser.add_argument(
        "--moments",
        action="store_true",
        help="of a torch_dist checkpoint: OUT is a run, with its optimizer",
    )


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert, and say where the result is."""
    from orchestrator.convert import convert

    folder, out, model = arguments.folder, arguments.out, arguments.model
    kind = convert(folder, out, allow_pickle=arguments.allow_pickle, model=model, moments=arguments.moments)
    _say(f"converted {kind} to {out}")
    if arguments.moments:
        _say(f"go on with: isotrain train tuner=full model.path={model} run_dir={out} data.path=FILE steps=N")
    if arguments.json:
        print(json.dumps({"code": 0, "from": kind, "out": str(arguments.out)}))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
