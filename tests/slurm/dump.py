"""A stand-in for a rank: leaves what it was given, byte for byte. argv: FOLDER WORD..."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["SLURM_PROCID"]
mine = {name: value for name, value in os.environ.items() if name.startswith("STRANGE")}
value = {"argv": sys.argv[2:], "environment": mine, "host": os.uname().nodename}
(folder / f"rank-{rank}.json").write_text(json.dumps(value))
