"""Profiles: what one machine was measured to achieve, in place of the catalogue's figures."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.environment import profiles_folder
from orchestrator.errors import ConfigError
from orchestrator.planning.devices import Device, Measured, device


@dataclass(frozen=True)
class Pace:
    """What a process with ``threads`` threads achieves while others compute on all other cores; on a GPU, alone.

    ``products``: matrix products by precision, FLOP/s. ``attention``: FLOP/s of its scores and values, forward.
    ``memory``: bytes/s of a copy, read and written.
    """

    threads: int
    products: dict[str, float]
    attention: float
    memory: float


@dataclass(frozen=True)
class Profile:
    """A machine. ``kind``: of its devices in the catalogue. ``link``: bytes/s of one rank to the next of this host;
    ``message_s``: of one message. ``measured``: when, UTC."""

    host: str
    kind: str
    cores: int
    paces: tuple[Pace, ...]
    link: float
    message_s: float
    measured: str
    torch: str

    def to_json(self) -> str:
        """The text of a profile's file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def pace(self, threads: int) -> Pace:
        """The measured pace whose threads are nearest, in proportion."""
        return min(self.paces, key=lambda one: abs(math.log(one.threads / threads)))

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
        return Profile(**{**value, "paces": tuple(Pace(**pace) for pace in value["paces"])})
    except OSError as error:
        raise ConfigError(f"cluster.profile={file}: {error.strerror}", f"isotrain calibrate --out {file}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"cluster.profile={file} is no profile: {error}", f"isotrain calibrate --out {file}"
        ) from error


@lru_cache(maxsize=64)
def measured_device(file: str, ranks_per_node: int, kind: str) -> Device:
    """A device of the catalogue with a profile's figures, for ``ranks_per_node`` processes on a node.

    Raises:
        ConfigError: the profile is of another kind.
    """
    profile, base = read_profile(file), device(kind)
    if profile.kind != base.kind:
        raise ConfigError(
            f"cluster.profile={file} was measured on {profile.kind}, but the plan is for {base.kind}",
            "cluster.profile=null",
        )
    threads = max(1, profile.cores // ranks_per_node)
    pace = profile.pace(threads)
    widest = pace.products.get("bf16") or pace.products["fp32"]
    cores = profile.cores if base.is_measured else 0
    measured = Measured(pace.attention / widest, profile.message_s, threads, cores, profile.words)
    return replace(
        base,
        peaks=pace.products if base.is_measured else base.peaks,
        best=pace.products,
        memory_rate=pace.memory,
        link_rate=profile.link,
        message_s=profile.message_s if base.is_measured else 0.0,
        measured=measured,
    )
