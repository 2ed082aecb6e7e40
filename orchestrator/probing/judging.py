"""Which of the probed nodes are good, and why the others are not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from orchestrator.doctor.folder import LOW_GIB, SKEW_S, SLOW_MB_S
from orchestrator.probing.report import Asked, Found, Report

SLOW_LINK = 0.5
"""Of what is expected of a link: below this share a node is bad."""
SLOW_DISK = 0.25
"""Of the median node's write rate: below this, and below ``SLOW_MB_S``, a node is bad."""


@dataclass(frozen=True)
class Verdict:
    """``why``: what speaks against a node, in a few words each; empty: nothing. ``report``: None of a silent one."""

    node: str
    why: tuple[str, ...]
    report: Report | None

    @property
    def is_good(self) -> bool:
        """Whether a job may run there."""
        return not self.why


@dataclass(frozen=True)
class Judgement:
    """All nodes of a probe, in their order; ``remarks``: what speaks against none of them alone."""

    verdicts: tuple[Verdict, ...]
    remarks: tuple[str, ...] = ()

    @property
    def good(self) -> tuple[str, ...]:
        """The nodes that a job may have."""
        return tuple(one.node for one in self.verdicts if one.is_good)

    @property
    def bad(self) -> tuple[str, ...]:
        """The nodes to leave out."""
        return tuple(one.node for one in self.verdicts if not one.is_good)

    def to_json(self) -> dict[str, object]:
        """What ``--json`` shows."""
        nodes = [
            {"node": one.node, "good": one.is_good, "why": one.why, "report": one.report and asdict(one.report)}
            for one in self.verdicts
        ]
        return {"good": self.good, "bad": self.bad, "remarks": self.remarks, "nodes": nodes}


@dataclass(frozen=True)
class Usual:
    """What nodes are held against. ``clock_s``: the median clock; ``write_mb_s``, ``rate``: medians; 0: none known."""

    clock_s: float = 0.0
    write_mb_s: float = 0.0
    rate: float = 0.0

    @classmethod
    def of(cls, reports: Sequence[Report]) -> Usual:
        """The usual node among those that have answered."""

        def median(values: Sequence[float]) -> float:
            return statistics.median(values) if values else 0.0

        return cls(
            clock_s=median([one.clock_s for one in reports]),
            write_mb_s=median([one.write_mb_s for one in reports if not one.folder_error]),
            rate=median([one.rate for one in reports if one.rate]),
        )


def judge(found: Found, asked: Asked) -> Judgement:
    """Hold every node against what the job needs, what its plan assumes, and what the other nodes do."""
    usual = Usual.of(found.reports)
    verdicts = [Verdict(one.node, _against(one, asked, usual), one) for one in found.reports]
    verdicts += [Verdict(node, (why,), None) for node, why in found.silent.items()]
    return Judgement(tuple(sorted(verdicts, key=lambda one: _natural(one.node))), _remarks(found, asked, usual))


def _against(report: Report, asked: Asked, usual: Usual) -> tuple[str, ...]:
    found = [*_against_gpus(report, asked), *report.faults, *_against_folder(report, usual)]
    off = abs(report.clock_s - usual.clock_s)
    if off - report.clock_within_s > SKEW_S:
        found.append(f"its clock is {off:.1f} s {'ahead' if report.clock_s > usual.clock_s else 'behind'}")
    return (*found, *_against_links(report, asked, usual))


def _against_gpus(report: Report, asked: Asked) -> list[str]:
    if asked.device != "cuda":
        return []
    if len(report.gpus) < asked.gpus_per_node:
        why = f" ({report.gpu_error})" if report.gpu_error else ""
        return [f"{len(report.gpus)} of {asked.gpus_per_node} GPUs{why}"]
    if report.gpu_gib < asked.memory_gib:
        return [f"a GPU has {report.gpu_gib:.0f} GiB, {asked.memory_gib:.0f} are needed"]
    return []


def _against_folder(report: Report, usual: Usual) -> list[str]:
    if report.folder_error:
        return [report.folder_error]
    if report.free_gib < LOW_GIB:
        return [f"{report.free_gib:.1f} GiB free in the run folder"]
    if report.write_mb_s < min(SLOW_MB_S, SLOW_DISK * usual.write_mb_s):
        return [f"writes {report.write_mb_s:.1f} MB/s, others {usual.write_mb_s:.0f}"]
    return []


def _against_links(report: Report, asked: Asked, usual: Usual) -> list[str]:
    if not report.links:
        return []  # nobody to meet, or the probe ended before
    if not report.rate:
        return [f"no all-reduce with any of {len(report.links)} partners: {report.links[0].error}"]
    least = SLOW_LINK * expected_rate(asked, usual)
    if report.rate < least:
        words = f"all-reduce at {rate_words(report.rate)}, others {rate_words(usual.rate)}"
        return [words + (f", the plan assumes {rate_words(asked.assumed_rate)}" if asked.assumed_rate else "")]
    return []


def expected_rate(asked: Asked, usual: Usual) -> float:
    """Bytes/s that a node's link is held against: the plan's, unless the usual node is far from it itself.

    Example:
        >>> expected_rate(Asked("", assumed_rate=40e9), Usual(rate=39e9)) / 1e9
        40.0
        >>> expected_rate(Asked("", assumed_rate=40e9), Usual(rate=12e9)) / 1e9
        12.0
    """
    return asked.assumed_rate if usual.rate >= SLOW_LINK * asked.assumed_rate > 0 else usual.rate


def _remarks(found: Found, asked: Asked, usual: Usual) -> tuple[str, ...]:
    remarks = []
    if usual.rate and usual.rate < SLOW_LINK * asked.assumed_rate:
        usually, assumed = rate_words(usual.rate), rate_words(asked.assumed_rate)
        remarks.append(f"all nodes are slower than the plan assumes: {usually}, not {assumed}; steps take longer")
    if found.whole is not None and found.whole.error:
        remarks.append(f"the all-reduce over {len(found.whole.peers)} nodes together failed: {found.whole.error}")
    elif found.whole is not None:
        remarks.append(f"{len(found.whole.peers)} nodes together all-reduce at {rate_words(found.whole.rate)}")
    if usual.write_mb_s and usual.write_mb_s < SLOW_MB_S:
        remarks.append(f"the run folder takes {usual.write_mb_s:.1f} MB/s of a node: checkpoints take long")
    alone = [one.node for one in found.reports if not one.links]
    if alone and len(found.reports) > 1:
        remarks.append(f"links were not measured of {', '.join(alone)}")
    unread = sorted({kind for one in found.reports for kind in one.unread})
    if unread:
        remarks.append(f"not readable: {', '.join(unread)}")
    return tuple(remarks)


def rate_words(rate: float) -> str:
    """Bytes/s for a reader.

    Example:
        >>> rate_words(2.5e9), rate_words(3.2e7)
        ('2.50 GB/s', '0.03 GB/s')
    """
    return f"{rate / 1e9:.2f} GB/s"


def _natural(name: str) -> tuple[str, int, str]:
    stem = name.rstrip("0123456789")
    number = name[len(stem) :]
    return stem, int(number) if number else -1, name
