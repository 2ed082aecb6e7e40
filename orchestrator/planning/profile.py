"""Profiles: what one machine was measured to achieve, in place of the catalogue's figures."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.environment import profiles_folder
from orchestrator.errors import ConfigError
from orchestrator.planning.devices import Device, Measured, device

FORMAT_VERSION = 2
"""1: products were measured with one weight, which stayed in a cache. 2: with another weight each time."""


@dataclass(frozen=True)
class Pace:
    """What a process with ``threads`` threads achieves while others compute on all other cores; on a GPU, alone.

    ``products``: matrix products by precision, FLOP/s. ``attention``: FLOP/s of its scores and values, forward.
    ``memory``: bytes/s of a copy, read and written. ``launch_s``: of one operator as plans count them, on a CPU.
    ``shares``: by precision, pairs of tokens and what products of so many reach of the rate, ascending.
    """

    threads: int
    products: dict[str, float]
    attention: float
    memory: float
    launch_s: float = 0.0
    shares: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """Between ranks of a host on which ``ranks`` compute and talk: bytes/s from one to the next, seconds a message."""

    ranks: int
    rate: float
    message_s: float


@dataclass(frozen=True)
class Profile:
    """A machine. ``kind``: of its devices in the catalogue. ``links``: by number of ranks. ``measured``: when, UTC.

    ``format_version``: what its figures mean; one of another is refused, as its figures would be taken for these.
    """

    host: str
    kind: str
    cores: int
    paces: tuple[Pace, ...]
    links: tuple[Link, ...]
    measured: str
    torch: str
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of a profile's file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def pace(self, threads: int) -> Pace:
        """The measured pace whose threads are nearest, in proportion."""
        return min(self.paces, key=lambda one: abs(math.log(one.threads / threads)))

    def link(self, ranks: int) -> Link:
        """The measured link whose number of ranks is nearest, in proportion."""
        return min(self.links, key=lambda one: abs(math.log(one.ranks / ranks)))

    @property
    def words(self) -> str:
        """What a plan says of it."""
        return f"measured on {self.host}, {self.measured} (isotrain calibrate)"


@dataclass(frozen=True)
class Message:
    """One measured collective: ``seconds`` for what moves ``moved`` bytes over the slowest hop in ``hops`` messages."""

    moved: float
    hops: int
    seconds: float


def fit_link(messages: Sequence[Message]) -> tuple[float, float]:
    """Bytes/s and seconds per message with which ``moved / rate + hops * latency`` is nearest, in relative terms.

    Example:
        >>> rate, latency = fit_link([Message(size, hops, size / 1e9 + hops * 1e-4) for size, hops in
        ...                           ((1e3, 1), (1e6, 2), (1e8, 6))])
        >>> round(rate / 1e9, 6), round(latency * 1e4, 6)
        (1.0, 1.0)
    """
    rows = [(one.moved / one.seconds, one.hops / one.seconds) for one in messages]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    per_byte, latency = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if per_byte <= 0 or latency <= 0:  # one of them is lost in the other's noise
        per_byte, latency = (a / aa, 1e-7) if per_byte > 0 else (1e-12, b / bb)
    return 1 / per_byte, latency


def profile_file(device: str, host: str | None = None) -> Path:
    """Where this host's profile is kept by default, for each of its devices (cpu or cuda)."""
    return profiles_folder() / f"{host or socket.gethostname()}-{device}.json"


@lru_cache(maxsize=8)
def read_profile(file: str) -> Profile:
    """Read a profile.

    Raises:
        ConfigError: it is not there, or is no profile.
    """
    try:
        value: dict[str, Any] = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        found = value.get("format_version", 1) if isinstance(value, dict) else None
        if found != FORMAT_VERSION:
            raise ValueError(f"its format is {found}, not {FORMAT_VERSION}")
        paces = tuple(Pace(**{**pace, "shares": _shares(pace["shares"])}) for pace in value["paces"])
        return Profile(**{**value, "paces": paces, "links": tuple(Link(**link) for link in value["links"])})
    except OSError as error:
        raise ConfigError(f"cluster.profile={file}: {error.strerror}", f"isotrain calibrate --out {file}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"cluster.profile={file} is no profile: {error}", f"isotrain calibrate --out {file}"
        ) from error


def _shares(value: dict[str, Any]) -> dict[str, tuple[tuple[int, float], ...]]:
    return {name: tuple((int(tokens), float(share)) for tokens, share in points) for name, points in value.items()}


@lru_cache(maxsize=64)
def measured_device(file: str, ranks_per_node: int, kind: str, threads: int = 0) -> Device:
    """A device of the catalogue with a profile's figures, for ``ranks_per_node`` processes on a node.

    Args:
        threads: of each process (0: as the launcher deals out the cores).

    Raises:
        ConfigError: the profile is of another kind.
    """
    profile, base = read_profile(file), device(kind)
    if profile.kind != base.kind:
        raise ConfigError(
            f"cluster.profile={file} was measured on {profile.kind}, but the plan is for {base.kind}",
            "cluster.profile=null",
        )
    threads = threads or max(1, profile.cores // ranks_per_node)
    pace, link = profile.pace(threads), profile.link(ranks_per_node)
    widest = pace.products.get("bf16") or pace.products["fp32"]
    cores = profile.cores if base.is_measured else 0
    on_cpu = base.is_measured
    measured = Measured(
        attention=pace.attention / widest,
        message_s=link.message_s,
        threads=threads,
        cores=cores,
        words=profile.words,
        launch_s=pace.launch_s if on_cpu else 0.0,
        shares=pace.shares if on_cpu else {},
    )
    return replace(
        base,
        peaks=pace.products if base.is_measured else base.peaks,
        best=pace.products,
        memory_rate=pace.memory,
        link_rate=link.rate,
        message_s=link.message_s if base.is_measured else 0.0,
        measured=measured,
    )
