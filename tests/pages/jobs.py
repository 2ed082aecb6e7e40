"""A job on 64 GPUs in four stages of two virtual chunks."""

from __future__ import annotations

from orchestrator.config.job import BatchConfig, ClusterConfig, JobConfig, TopologyConfig, TunerConfig
from parallel.specs import ClusterSpec, ModelSpec

LLAMA3_8B = ModelSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, 5e5, False)
H100X64 = ClusterSpec("h100x64", 8, 8, "cuda", 76.0, "H100-80GB")
JOB = JobConfig(
    cluster=ClusterConfig("h100x64", 8, 8, "cuda", 76.0),
    tuner=TunerConfig(name="full"),
    batch=BatchConfig(global_sequences=128, sequence_tokens=8192),
    topology=TopologyConfig(pp=4, vpp=2),
)
