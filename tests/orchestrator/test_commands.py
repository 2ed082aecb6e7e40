"""What a command finds out before it starts anything."""

from __future__ import annotations

import pytest
import torch

from orchestrator.commands import check_device
from orchestrator.config.job import ClusterConfig
from orchestrator.detection.cluster import found_cluster
from orchestrator.errors import ConfigError


def test_a_cluster_of_gpus_that_this_machine_has_not_is_refused() -> None:
    more = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=f"cluster=big has {more} GPUs per node, but torch sees {more - 1}") as raised:
        check_device(ClusterConfig("big", gpus_per_node=more, device="cuda"))
    assert raised.value.hint.startswith("cluster=laptop")


def test_a_cluster_of_cpus_needs_nothing() -> None:
    check_device(ClusterConfig())


def test_the_kind_of_gpu_reaches_the_plan() -> None:
    assert found_cluster(ClusterConfig("big", 2, 8, "cuda", 140.0, "H200")).gpu == "H200"
