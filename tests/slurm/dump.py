"""A stand-in for a rank: leaves what it was given, byte for byte. argv: FOLDER WORD..."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(folder: Path, words: list[str]) -> None:
    mine = {name: value for name, value in os.environ.items() if name.startswith("STRANGE")}
    value = {"argv": words, "environment": mine, "host": os.uname().nodename}
    value["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    (folder / f"rank-{os.environ['SLURM_PROCID']}.json").write_text(json.dumps(value))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
