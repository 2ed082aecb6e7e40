"""``isotrain calibrate``: measure this machine, and write its profile where plans look for it."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import add_overrides
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.planning.profile import Message, Pace, Profile
    from parallel.specs import ClusterSpec

GROUPS = (2, 3, 4)
"""Ranks of the groups whose collectives are measured on a CPU, more than its cores among them; larger ones follow."""


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """The cluster whose device is measured, and where the profile goes."""
    add_overrides(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of the cache; cluster.profile=FILE uses it")


def run_calibrate(arguments: argparse.Namespace) -> int:
    """Measure, write, and say what was found."""
    from orchestrator.config.loading import compose_job
    from orchestrator.detection.cluster import found_machines
    from orchestrator.planning.profile import profile_file
    from orchestrator.runs import write_whole

    words = arguments.overrides
    chosen = any(word.startswith("cluster=") for word in words)
    cluster = found_machines(compose_job([*([] if chosen else ["cluster=auto"]), *words]).cluster)
    check_here(cluster)
    out = arguments.out or profile_file(cluster.device)
    started = time.monotonic()
    profile = calibrate(cluster)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, profile.to_json())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", "isotrain calibrate --out FILE") from error
    if arguments.json:
        print(json.dumps({"code": 0, "out": str(out), **asdict(profile)}))
        return 0
    print("\n".join(shown(profile)))
    print(f"measured in {time.monotonic() - started:.0f} s; written to {out}", file=sys.stderr)
    return 0


def check_here(cluster: ClusterSpec) -> None:
    """Only this host can be measured, and only devices that it has.

    Raises:
        ConfigError: the cluster has other nodes, or GPUs that torch does not see.
    """
    from orchestrator.commands import check_device
    from orchestrator.config.job import ClusterConfig

    if cluster.nodes > 1:
        raise ConfigError(
            f"cluster={cluster.name} has {cluster.nodes} nodes, and what is measured is this host alone",
            "isotrain calibrate cluster=auto   (on one of the nodes; --out FILE, then cluster.profile=FILE)",
        )
    check_device(ClusterConfig(cluster.name, 1, cluster.gpus_per_node, cluster.device))


def calibrate(cluster: ClusterSpec) -> Profile:
    """Measure this host's device: every pace with all cores busy, collectives over small groups."""
    import torch

    from launch.environment import usable_cores
    from launch.pool import Pool
    from orchestrator.calibrate.launching import measure_launch
    from orchestrator.calibrate.measuring import measure_messages, measure_pace
    from orchestrator.planning.estimate import cluster_device
    from orchestrator.planning.profile import Link, Profile, fit_link

    cores, on_cpu = usable_cores(), cluster.device == "cpu"
    threads = sorted({1, max(1, cores // 4), max(1, cores // 2), cores}) if on_cpu else [1]
    groups = GROUPS if on_cpu else [cluster.gpus_per_node] if cluster.gpus_per_node > 1 else []
    pool = Pool(max([*groups, cores if on_cpu else 1]), log=Path(os.devnull))
    try:
        paces = [mean(pool.run(cores // each if on_cpu else 1, measure_pace, each, cluster.device)) for each in threads]
        if on_cpu:
            paces = [replace(pace, launch_s=pool.run(1, measure_launch, pace.threads)[0]) for pace in paces]
        messages = {size: slowest(pool.run(size, measure_messages, cluster.device)) for size in groups}
    finally:
        pool.leave()
    device = cluster_device(cluster)
    links = [Link(ranks, *fit_link(found)) for ranks, found in messages.items()]
    links = links or [Link(1, device.link_rate, device.message_s)]
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return Profile(socket.gethostname(), device.kind, cores, tuple(paces), tuple(links), when, torch.__version__)


def mean(paces: Sequence[Pace]) -> Pace:
    """One pace for ranks that computed side by side."""
    from orchestrator.planning.profile import Pace

    def of(values: list[float]) -> float:
        return sum(values) / len(values)

    products = {name: of([one.products[name] for one in paces]) for name in paces[0].products}
    shares = {
        name: tuple((points[0][0], of([share for _, share in points])) for points in zip(*alike, strict=True))
        for name in paces[0].shares
        if (alike := [one.shares[name] for one in paces])
    }
    attention, memory = of([one.attention for one in paces]), of([one.memory for one in paces])
    return Pace(paces[0].threads, products, attention, memory, of([one.launch_s for one in paces]), shares)


def slowest(by_rank: Sequence[Sequence[Message]]) -> list[Message]:
    """Of each message the time of the rank that waited longest."""
    return [max(same, key=lambda one: one.seconds) for same in zip(*by_rank, strict=True)]


def shown(profile: Profile) -> list[str]:
    """A profile in lines."""
    lines = [f"{profile.host}: {profile.kind}, {profile.cores} cores"]
    for pace in profile.paces:
        rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in pace.products.items())
        lines.append(
            f"  {pace.threads} thread{'s' if pace.threads > 1 else ''} a process: products {rates} GFLOP/s, attention "
            f"{pace.attention / 1e9:.1f} GFLOP/s, memory {pace.memory / 1e9:.1f} GB/s"
            + (f", {1e6 * pace.launch_s:.0f} us an operator" if pace.launch_s else "")
        )
        for name, points in pace.shares.items():
            lines.append(f"    {name} by tokens: " + ", ".join(f"{tokens} {share:.0%}" for tokens, share in points))
    for link in profile.links:
        words = f"{link.rate / 1e9:.2f} GB/s, {1e6 * link.message_s:.0f} us a message"
        lines.append(f"  between {link.ranks} processes: {words}")
    return lines
