"""What is on this machine that a job could be made of; the first of each is proposed."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from launch.environment import hugging_face_cache, isotrain_cache, usable_cores
from launch.slurm.commands import SlurmError, ask
from launch.slurm.nodes import gpus_of
from orchestrator.config.loading import config_root, group_choices
from orchestrator.data.conversations import find_format
from orchestrator.data.sources import READERS, read_rows
from orchestrator.errors import DataError

LOOKED_AT_BYTES = 8 * 2**20  # a .json file is read whole before its first row is known


def found_models(folder: Path) -> list[str]:
    """Models in a folder, then those in the caches, by the name of their config where they have one."""
    here = [shlex.quote(f"./{one.name}") for one in sorted(folder.glob("*")) if _has_weights(one)]
    cached = [one.name for one in sorted((isotrain_cache() / "models").glob("*")) if _has_weights(one)]
    snapshots = sorted(hugging_face_cache().glob("models--*/snapshots/*"))
    cached += [one.parent.parent.name.removeprefix("models--") for one in snapshots if _has_weights(one)]
    named, hub_ids = _named_models(), [name.replace("--", "/") for name in cached]
    return list(dict.fromkeys([*here, *(named.get(hub_id, hub_id) for hub_id in hub_ids)]))


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _named_models() -> dict[str, str]:
    """Hub ids to the choices of ``model=`` that stand for them."""
    import yaml

    named = {}
    for name in group_choices()["model"]:
        value = yaml.safe_load((config_root() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
        if value.get("path"):
            named[value["path"]] = name
    return named


def found_data(folder: Path) -> list[str]:
    """Files in a folder whose first row is chat, by name."""
    return [shlex.quote(f"./{file.name}") for file in sorted(folder.iterdir()) if file.is_file() and _is_chat(file)]


def _is_chat(file: Path) -> bool:
    if file.suffix.lower() not in READERS or (file.suffix == ".json" and file.stat().st_size > LOOKED_AT_BYTES):
        return False
    try:
        return any(find_format(row.value) for row in itertools.islice(read_rows(file), 1))
    except (DataError, OSError):
        return False


def found_clusters() -> list[str]:
    """Clusters that this machine is, or stands before, the likeliest first."""
    return list(dict.fromkeys([*_slurm(), *_gpus(), "laptop" if usable_cores() > 1 else "one"]))


def _slurm() -> Iterator[str]:
    """The nodes of Slurm's default partition, as many as there are, with their GPUs."""
    if shutil.which("sbatch") is None:
        return
    try:
        rows = [line.split() for line in ask(["sinfo", "--noheader", "--format=%P %D %G"]).splitlines()]
    except SlurmError:
        return
    rows = [row for row in rows if len(row) == 3]
    for partition, nodes, gres in sorted(rows, key=lambda row: not row[0].endswith("*"))[:1]:
        gpus, _ = gpus_of(gres)
        kind = f"slurm_4x8 cluster.gpus_per_node={gpus}" if gpus else "slurm_cpu"
        yield f"{kind} cluster.nodes={nodes} cluster.slurm.partition={partition.rstrip('*')}"


def _gpus() -> Iterator[str]:
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return
    count = len(done.stdout.splitlines()) if done.returncode == 0 else 0
    if count:
        yield "h100x8" if "H100" in done.stdout and count == 8 else f"gpu1 cluster.gpus_per_node={count}"
