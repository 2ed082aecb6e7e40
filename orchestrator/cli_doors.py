"""Arguments and words of the commands that let data in and out: convert."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


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


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert, and say where the result is."""
    from orchestrator.convert import convert

    kind = convert(arguments.folder, arguments.out, allow_pickle=arguments.allow_pickle, model=arguments.model)
    print(f"converted {kind} to {arguments.out}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"code": 0, "from": kind, "out": str(arguments.out)}))
    return 0
