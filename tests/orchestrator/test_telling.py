"""What a rank says that it does where no frame of torch's shows that it waits."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from orchestrator.telling import story

# A pipeline's receive, as megatron-core has it: the request that it waits for is C code.
RECEIVES = """
class Communicator:
    def __init__(self, pp_group, seen):
        self.pp_group = pp_group
        self.seen = seen

    def recv_forward(self):
        return self._communicate()

    def _communicate(self):
        return self.seen()
"""


def test_who_waits_for_another_stage_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group.ranks)
    known: dict[str, Any] = {"__name__": "megatron.core"}
    exec(compile(RECEIVES, "/x/megatron/core/pipeline_parallel/p2p_communication.py", "exec"), known)
    group = SimpleNamespace(group_desc="pp", ranks=[1, 3])
    said = known["Communicator"](group, lambda: story(sys._getframe(1))).recv_forward()
    assert said.startswith("waits in recv_forward of pp (ranks 1, 3) at ")
    assert said.endswith("megatron/core/pipeline_parallel/p2p_communication.py:11 in _communicate")
