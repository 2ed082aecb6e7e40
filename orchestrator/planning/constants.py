"""Constants: the twelve numbers that were fitted to published runs, for every device, model and source alike."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Constants:
    """Each is what programs achieve of a physical limit, or a cost that no catalogue prints.

    Args:
        matmul: share of the best measured rate that a model's own 16-bit products reach.
        matmul_low: the same for 8 and 4 bits, whose scales have to be found and applied.
        attention: share of it in fused attention.
        memory: share of the memory's bandwidth.
        link: share of a fast link's bandwidth in a collective.
        network: share of the network's bandwidth in a collective.
        latency_s: one message of a collective over the network.
        launch_s: what the host needs to launch one operator.
        hidden: share of a collective that hides behind computation where the program overlaps them.
        expert: share of ``matmul`` that the products of experts reach, which are many and unequal.
        slack: what an allocator reserves, per byte that is used at the peak.
        context_gb: buffers of communication of a process among others, 1e9 bytes.
    """

    matmul: float = 0.85
    matmul_low: float = 0.8039
    attention: float = 0.408
    memory: float = 0.866
    link: float = 0.6535
    network: float = 0.7677
    latency_s: float = 4.069e-05
    launch_s: float = 1.961e-05
    hidden: float = 0.882
    expert: float = 0.8725
    slack: float = 1.142
    context_gb: float = 4.03


FITTED = Constants()
"""Written by ``isotrain bench planner --fit``; measured devices (a CPU) take no shares, see ``AS_MEASURED``."""
AS_MEASURED = Constants(1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0)
"""For devices whose catalogue entry is what runs achieve."""


def constants_for(
    is_measured: bool, constants: Constants = FITTED, attention: float = 0.0, launch_s: float = 0.0
) -> Constants:
    """The shares of a device. ``attention``, ``launch_s``: measured on the machine at hand, as all its rates are."""
    if is_measured:
        return replace(AS_MEASURED, attention=attention or 1.0, launch_s=launch_s)
    if attention:
        return replace(constants, matmul=1.0, matmul_low=1.0, attention=attention, memory=1.0, link=1.0)
    return constants
