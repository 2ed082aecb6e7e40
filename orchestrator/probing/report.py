"""What is asked of a probe and what it finds: values, and their files in a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.jobs.record import slurm_folder
from orchestrator.runs import write_whole


@dataclass(frozen=True)
class Asked:
    """What nodes are probed for.

    ``token``: of this probe alone, so that nothing of an earlier one counts. ``memory_gib``: that a GPU needs.
    ``patience_s``: how long a node may take to answer. ``assumed_rate``: bytes/s of an all-reduce over two nodes in the
    plan; 0 where it assumes nothing of a network. ``prologue``: as in ``cluster.slurm``.
    """

    token: str
    device: str = "cpu"
    gpus_per_node: int = 1
    memory_gib: float = 0.0
    patience_s: float = 120.0
    assumed_rate: float = 0.0
    prologue: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """An all-reduce with other nodes: bytes/s over its slowest hop, or what went wrong."""

    peers: tuple[str, ...]
    rate: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What a node has found of itself.

    ``gpus``: names; ``gpu_gib``: memory of the smallest; ``gpu_error``: why torch sees none. ``faults``: errors of the
    hardware that were read, ``unread``: kinds of errors that could not be. ``folder_error``: what the run folder
    refused; ``write_mb_s``, with fsync; ``free_gib``. ``clock_s``: this node's clock minus the first node's, known
    within ``clock_within_s``. ``links``: one for each group that it was in.
    """

    node: str
    token: str = ""
    gpus: tuple[str, ...] = ()
    gpu_gib: float = 0.0
    gpu_error: str = ""
    faults: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    folder_error: str = ""
    write_mb_s: float = 0.0
    free_gib: float = 0.0
    clock_s: float = 0.0
    clock_within_s: float = 0.0
    links: tuple[Link, ...] = ()

    @property
    def rate(self) -> float:
        """Bytes/s with the best of its partners; 0 where no link was measured."""
        return max((link.rate for link in self.links), default=0.0)

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Found:
    """A probe's result. ``silent``: nodes without an answer, and why. ``whole``: the all-reduce over all good links."""

    token: str
    reports: tuple[Report, ...]
    silent: Mapping[str, str] = field(default_factory=dict)
    whole: Link | None = None


def read_report(text: str | bytes) -> Report:
    """A node's report from its text.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    Example:
        >>> read_report(Report("n1", links=(Link(("n2",), 1e9),)).to_json()).rate
        1000000000.0
    """
    value: dict[str, Any] = json.loads(text)
    lists = {name: tuple(value[name]) for name in ("gpus", "faults", "unread")}
    return Report(**{**value, **lists, "links": tuple(_link(link) for link in value["links"])})


def read_asked(text: str | bytes) -> Asked:
    """What is asked, from its text.

    Raises:
        ValueError, TypeError, KeyError: it is nothing of the kind.
    """
    value: dict[str, Any] = json.loads(text)
    return Asked(**{**value, "prologue": tuple(value["prologue"])})


def _link(value: Mapping[str, Any]) -> Link:
    return Link(**{**value, "peers": tuple(value["peers"])})


def reports_folder(run_dir: Path) -> Path:
    """Where each node leaves ``NODE.json``.

    Example:
        >>> reports_folder(Path("run")).as_posix()
        'run/probe'
    """
    return run_dir / "probe"


def asked_file(run_dir: Path) -> Path:
    """What is asked; a node that cannot read it does not see the run folder."""
    return slurm_folder(run_dir) / "probe-asked.json"


def write_asked(run_dir: Path, asked: Asked) -> None:
    """Say what is asked."""
    write_whole(asked_file(run_dir), json.dumps(asdict(asked)) + "\n")


def found_file(run_dir: Path) -> Path:
    """What the first node has collected."""
    return slurm_folder(run_dir) / "probe-found.json"


def write_found(run_dir: Path, found: Found) -> None:
    """Say what was found, at the probe's end."""
    write_whole(found_file(run_dir), json.dumps(asdict(found)) + "\n")


def read_found(run_dir: Path, token: str) -> Found | None:
    """What this probe has found; None while it has not ended, or if it ended early."""
    try:
        value: dict[str, Any] = json.loads(found_file(run_dir).read_text(encoding="utf-8"))
        reports = tuple(read_report(json.dumps(one)) for one in value["reports"])
        whole = _link(value["whole"]) if value["whole"] else None
        found = Found(value["token"], reports, value["silent"], whole)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.token == token else None


def read_reports(run_dir: Path, token: str) -> tuple[Report, ...]:
    """What nodes have left behind by now in this probe, by name."""
    found = []
    for file in sorted(reports_folder(run_dir).glob("*.json")):
        try:
            found.append(read_report(file.read_bytes()))
        except (OSError, ValueError, TypeError, KeyError):  # gone, or none of ours
            continue
    return tuple(one for one in found if one.token == token)
