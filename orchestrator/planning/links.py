"""Links: how long ranks of a layout take to tell each other something."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from orchestrator.planning.constants import Constants, constants_for
from orchestrator.planning.devices import Device
from orchestrator.planning.setup import Setup, fast_domain

NEAR = 0.1
"""Latency of a hop inside of a domain / over the network (a store between neighbours / a trip through two adapters)."""


def slowest_hop(inside: int, size: int, fast: float, network: float) -> float:
    """Bytes/s of a ring's slowest hop, where ``inside`` of its ``size`` members share a fast domain."""
    return fast if inside >= size else min(fast, inside * network)


def two_nodes_rate(device: Device, gpus_per_node: int) -> float:
    """Bytes/s over the slowest hop of an all-reduce of all ranks of two nodes, as plans for such devices assume it.

    0 for a CPU: what is known of it was measured inside of one host.

    Example:
        >>> from orchestrator.planning.devices import device
        >>> round(two_nodes_rate(device("H100"), 8) / 1e9), two_nodes_rate(device("cpu"), 4)
        (294, 0.0)
    """
    if device.is_measured:
        return 0.0
    constants = constants_for(False, attention=device.measured.attention if device.measured else 0.0)
    ranks = 2 * gpus_per_node
    inside = min(ranks, fast_domain(device, gpus_per_node))
    return slowest_hop(inside, ranks, device.link_rate * constants.link, device.network_rate * constants.network)


@dataclass(frozen=True)
class Links:
    """The links of a setup. A group is ``size`` ranks, ``stride`` apart."""

    setup: Setup
    constants: Constants

    @cached_property
    def latency_s(self) -> float:
        """Of one message."""
        return self.setup.device.message_s or self.constants.latency_s

    @cached_property
    def near(self) -> float:
        """A message inside of a domain, in messages over the network."""
        device = self.setup.device
        if device.is_measured:
            return 1.0
        return device.measured.message_s / self.latency_s if device.measured else NEAR

    @cached_property
    def fast(self) -> float:
        """Bytes/s of one rank inside of a fast domain."""
        return self.setup.device.link_rate * self.constants.link

    @cached_property
    def network(self) -> float:
        """Bytes/s of one rank's share of its node's network."""
        return (self.setup.network_rate or self.setup.device.network_rate) * self.constants.network

    def members_inside(self, size: int, stride: int) -> int:
        """How many ranks of a group share a fast domain."""
        return max(1, min(size, self.setup.domain // stride))

    def ring_rate(self, size: int, stride: int) -> float:
        """Bytes/s over the slowest hop of a ring. All members in a node bring their share of its network."""
        return slowest_hop(self.members_inside(size, stride), size, self.fast, self.network)

    def gather_s(self, size_bytes: float, size: int, stride: int = 1) -> float:
        """An all-gather to, or a reduce-scatter of, ``size_bytes`` in all: ``(n - 1) / n`` of them over every hop."""
        if size == 1:
            return 0.0
        return (size - 1) / size * size_bytes / self.ring_rate(size, stride) + self.hops_s(size, stride)

    def hops_s(self, size: int, stride: int) -> float:
        """A message's way round a ring: over the network once for each domain, and inside of them in between."""
        inside = self.members_inside(size, stride)
        domains = -(-size // inside)
        return (domains - 1) * self.latency_s + (size - domains) * self.latency_s * self.near

    def reduce_s(self, size_bytes: float, size: int, stride: int = 1) -> float:
        """An all-reduce: twice the bytes; in a ring where ranks are few, in a tree where they are many."""
        if size == 1:
            return 0.0
        moved = 2 * (size - 1) / size * size_bytes / self.ring_rate(size, stride)
        return moved + 2 * min(self.hops_s(size, stride), self.tree_s(size, stride))

    def tree_s(self, size: int, stride: int) -> float:
        """A message's way through a tree of domains, and round the members inside of one."""
        inside = self.members_inside(size, stride)
        return 2 * math.log2(-(-size // inside)) * self.latency_s + (inside - 1) * self.latency_s * self.near

    def exchange_s(self, copies_bytes: float, copies: int, size: int, stride: int = 1) -> float:
        """An all-to-all of tokens, each in ``copies``, to ``size`` ranks; what leaves the domain crosses the network.

        A program that sends a token once to each domain, and copies it there, sends as many as it has domains among
        the receivers on average: ``1 - (1 - 1/d) ** copies`` of them.
        """
        if size == 1:
            return 0.0
        inside = self.members_inside(size, stride)
        near, far = copies_bytes * (inside - 1) / size, copies_bytes * (size - inside) / size
        if self.setup.software.sends_once and copies > 1:
            domains = size / inside
            far = copies_bytes / copies * (domains - 1) * (1 - (1 - 1 / domains) ** copies)
        return max(near / self.fast, far / self.network) + self.hops_s(size, stride)

    def send_s(self, size_bytes: float, stride: int) -> float:
        """One message to the rank ``stride`` further."""
        near = stride < self.setup.domain and self.setup.ranks <= self.setup.domain
        return size_bytes / (self.fast if near else self.network) + self.latency_s
