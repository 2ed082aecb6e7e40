"""How many messages the ranks of a tensor-parallel group send each other, counted and as the planner has it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings

from orchestrator.planning.timing import layer_costs
from tests.helpers.held_memory import planned
from tests.helpers.runs import Run, microbatches, open_engine

MESSAGES = {"all_reduce": 2, "dist_all_gather_func": 1, "dist_reduce_scatter_func": 1}
"""Between two ranks, one way; by the names under which megatron-core's tensor parallelism calls them."""


def sent(run: Run) -> float:
    """Messages of a micro-batch over tp, in all layers and both ends."""
    engine, groups = open_engine(run)
    batches = microbatches(run, 0, groups.coordinate("dp"))
    engine.train_step(batches, run.rate(0))  # the first one has more to do
    counted: list[int] = []
    with ExitStack() as stack:
        for name, messages in MESSAGES.items():
            for place in (dist, layers, mappings):
                if hasattr(place, name):
                    original = getattr(place, name)
                    stack.callback(setattr, place, name, original)
                    setattr(place, name, counting(original, messages, counted))
        engine.train_step(batches, run.rate(0))
    engine.close()
    groups.close()
    return sum(counted) / len(batches)


def counting(original: Callable[..., Any], messages: int, counted: list[int]) -> Callable[..., Any]:
    """The same call, which also counts its messages if it is one of both ranks."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is not None and dist.get_process_group_ranks(kwargs["group"]) == [0, 1]:
            counted.append(messages)
        return original(*args, **kwargs)

    return call


def expected(run: Run) -> float:
    """The same of one layer, by the planner: its seconds, where bytes take none and a message one."""
    setup = planned(run)
    free = replace(setup, device=replace(setup.device, link_rate=1e30, message_s=1.0))
    ((tensor_s, _, _),) = layer_costs(free).talks.values()
    return tensor_s
