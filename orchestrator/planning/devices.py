"""Devices: the physical limits of every kind of accelerator that a plan can be made for, each with its source."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError

CATALOGUE = Path(__file__).resolve().parent / "devices.yaml"
UNMEASURED = {"bf16": 0.80, "fp16": 0.80, "fp8": 0.74, "fp4": 0.74, "fp32": 1.0}
"""Best measured matrix product / peak where nobody measured: the middle of what was (73 to 87 % in 16 bits, 71 to 76 %
in 8)."""
SUBSTITUTES = {"mxfp8": "fp8", "fp8-blockwise": "fp8", "nvfp4": "fp4", "mxfp4": "fp4"}
FALLBACKS = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp16", "fp16": "bf16"}


@dataclass(frozen=True)
class Measured:
    """What a profile of one machine adds to its figures (``orchestrator.planning.profile``).

    ``attention``: its rate / that of products. ``message_s``: one message between ranks of a host. ``threads``: of a
    process, on ``cores`` that all share (0: every rank has a device of its own). ``words``: where and when.
    ``launch_s``: of one operator, where the device is its own host (0: not measured). ``shares``: by precision, what
    products of so many tokens reach of the rate of large ones, ascending.
    """

    attention: float
    message_s: float
    threads: int
    cores: int
    words: str
    launch_s: float = 0.0
    shares: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Args:
        peaks: dense peak by precision, FLOP/s; ``best``: the highest measured rate of a matrix product.
        memory_bytes, memory_rate: size, and bytes/s. ``link_rate``: bytes/s of one device in one direction inside of a
            ``domain`` of so many devices; ``network_rate``: its share of the node's network.
        message_s: latency of one message, where it was measured (0: the model's constant).
        sources: for each figure where it was printed.
        calibrated: whether a published run on this kind is among the benchmark's rows.
        measured: what was measured of the machine at hand, where it was.
    """

    kind: str
    peaks: dict[str, float]
    best: dict[str, float]
    memory_bytes: float
    memory_rate: float
    link_rate: float
    network_rate: float
    domain: int
    message_s: float
    calibrated: bool
    sources: dict[str, str]
    measured: Measured | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the figures are what runs achieve (a CPU's) and not what the hardware could."""
        return self.message_s > 0

    @property
    def reads_weights(self) -> bool:
        """Whether rates of products have the reading of their weights in them (``isotrain calibrate`` on a CPU)."""
        return self.measured is not None and bool(self.measured.shares)

    def product_share(self, precision: str, tokens: float) -> float:
        """What products of so many tokens reach of the rate of large ones: 1 where it was not measured.

        Between measured numbers of tokens along the straight line over their logarithms.
        """
        points = self.measured.shares.get(self.precision(precision), ()) if self.measured else ()
        if not points or tokens >= points[-1][0]:
            return points[-1][1] if points else 1.0
        for (few, low), (many, high) in itertools.pairwise(points):
            if few <= tokens < many:
                return low + (high - low) * math.log(tokens / few) / math.log(many / few)
        return points[0][1]

    def precision(self, asked: str) -> str:
        """The precision whose units do the work: the asked one's, or the next that the device has.

        Example:
            >>> device("A100").precision("fp8"), device("T4").precision("bf16"), device("B200").precision("mxfp8")
            ('bf16', 'fp16', 'fp8')
        """
        name = SUBSTITUTES.get(asked, asked)
        while name not in self.peaks:
            name = FALLBACKS.get(name, "fp32") if name != "fp16" or "bf16" in self.peaks else "fp32"
        return name

    def matmul_rate(self, precision: str) -> float:
        """FLOP/s of the best matrix product: measured, or a usual share of the peak."""
        name = self.precision(precision)
        return self.best.get(name) or self.peaks[name] * UNMEASURED[name]


@cache
def catalogue() -> dict[str, Device]:
    """Every kind of ``devices.yaml`` by name."""
    import yaml

    text = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return {kind: _read(kind, figures, text["sources"]) for kind, figures in text["devices"].items()}


def device(kind: str) -> Device:
    """The device of a kind or alias, in any case.

    Raises:
        ConfigError: there is no such kind.
    Example:
        >>> device("h100").kind, device("H100").peaks["bf16"]
        ('H100-80GB', 989000000000000.0)
    """
    found = _names().get(_plain(kind))
    if found is None:
        near = difflib.get_close_matches(_plain(kind), _names(), n=1)
        known = ", ".join(catalogue())
        raise ConfigError(
            f"cluster.gpu={kind} is not in the catalogue of devices; there is {known}",
            f"cluster.gpu={_names()[near[0]].kind if near else 'H100-80GB'}",
        )
    return found


def nearest_variant(kind: str) -> Device | None:
    """The device that a longer name begins with, such as a seller's; None where there is none.

    Example:
        >>> nearest_variant("H100-SXM5-80GB HBM3").kind, nearest_variant("MI300X")
        ('H100-80GB', None)
    """
    fitting = [name for name in _names() if _plain(kind).startswith(name)]
    return _names()[max(fitting, key=len)] if fitting else None


def seen_device(name: str, memory_gib: float = 0.0) -> tuple[Device, bool]:
    """The device that a driver or a scheduler names, and whether it is that; else the nearest.

    Args:
        name: such as ``NVIDIA A100-PCIE-40GB``, or a GRES kind such as ``nvidia_h100_80gb_hbm3``; may be empty.
        memory_gib: of one device, 0 where it is not known. It tells variants of a kind apart, and is what the nearest
            is nearest in; of nothing at all that is an H100.
    Example:
        >>> [seen_device(name, size)[0].kind for name, size in (("NVIDIA A100-PCIE-40GB", 39.4), ("tesla_v100", 15.8))]
        ['A100-40GB', 'V100-16GB']
        >>> seen_device("NVIDIA L4", 22.2)[1]
        False
    """
    found = nearest_variant(re.sub("nvidia|tesla|geforce|amd", "", name.lower()))
    accelerators = [one for one in catalogue().values() if not one.is_measured]
    if found is None:
        return _nearest_in_memory(accelerators, memory_gib) if memory_gib else device("H100"), False
    family = found.kind.partition("-")[0]
    variants = [one for one in accelerators if one.kind.partition("-")[0] == family]
    return _nearest_in_memory(variants, memory_gib) if memory_gib else found, True


def _nearest_in_memory(devices: list[Device], memory_gib: float) -> Device:
    return min(devices, key=lambda one: abs(one.memory_bytes - memory_gib * 2**30))


@cache
def _names() -> dict[str, Device]:
    import yaml

    figures = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))["devices"]
    return {
        _plain(name): one for kind, one in catalogue().items() for name in (kind, *(figures[kind].get("aliases") or []))
    }


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _read(kind: str, figures: dict[str, Any], sources: dict[str, str]) -> Device:
    printed = {name: value for name, value in figures.items() if isinstance(value, list) and name != "aliases"}

    def number(name: str, unit: float) -> float:
        return float(printed[name][0]) * unit if name in printed else 0.0

    precisions = ("fp4", "fp8", "bf16", "fp16", "fp32")
    peaks = {name: number(name, 1e12) for name in precisions if name in printed}
    if "bf16" in peaks:
        peaks.setdefault("fp16", peaks["bf16"])
    best = {name: number(f"best_{name}", 1e12) for name in precisions if f"best_{name}" in printed}
    if "bf16" in best:
        best.setdefault("fp16", best["bf16"])
    return Device(
        kind=kind,
        peaks=peaks,
        best=best,
        memory_bytes=number("memory_gb", 1e9),
        memory_rate=number("memory_gb_s", 1e9),
        link_rate=number("link_gb_s", 1e9) or number("pcie_gb_s", 1e9),
        network_rate=number("nic_gb_s", 1e9),
        domain=int(number("domain", 1)),
        message_s=number("message_s", 1),
        calibrated=bool(figures["calibrated"]),
        sources={name: sources[value[1]] for name, value in printed.items()},
    )
