"""Launching: what a layer costs the host beside its work, measured with a model that has next to none."""

from __future__ import annotations

import statistics
import time

from orchestrator.planning.compute import operators
from orchestrator.planning.estimate import OURS
from parallel.engine import MicroBatch
from parallel.specs import ClusterSpec

LAYERS = (2, 6)
HIDDEN, HEADS, VOCABULARY, TOKENS, ADAPTED = 64, 4, 128, 8, 4
MICRO_BATCHES, STEPS = 4, 5


def measure_launch(threads: int) -> float:
    """Seconds for one operator as plans count them: a deep and a shallow model's steps differ by their layers."""
    import torch

    torch.set_num_threads(threads)
    shallow, deep = (_step_s(layers) for layers in LAYERS)
    passes = 2 * MICRO_BATCHES * (LAYERS[1] - LAYERS[0])
    return max(1e-7, (deep - shallow) / (passes * operators(OURS, ADAPTED)))


def _step_s(layers: int) -> float:
    """Median step of a LoRA run of a tiny model on this process alone, without the first, which warms up."""
    import torch

    from orchestrator.assemble import open_engine
    from orchestrator.config.building import build_job
    from orchestrator.models import model_spec
    from orchestrator.planning.plan import make_plan
    from parallel.groups import open_groups

    job = build_job(_job(layers))
    plan = make_plan(job, model_spec(job.model), ClusterSpec("one", 1, 1))
    engine = open_engine(job, plan, open_groups(plan.topology, 0))
    row = torch.arange(TOKENS).unsqueeze(0)
    batches = [MicroBatch(row, row, (place,)) for place in range(MICRO_BATCHES)]
    taken = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        engine.train_step(batches, 1e-4)
        taken.append(time.perf_counter() - start)
    engine.close()
    return statistics.median(taken[1:])


def _job(layers: int) -> dict[str, object]:
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": 2 * HIDDEN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    return {
        "precision": "fp32",
        "model": {"config": config, "weights": "random"},
        "cluster": {"name": "one", "nodes": 1, "gpus_per_node": 1, "memory_gib": 4.0},
        "topology": {"tp": 1, "pp": 1, "dp": 1, "cp": 1},
        "memory": {"recompute": "none"},
        "batch": {"global_sequences": MICRO_BATCHES, "micro_sequences": 1, "sequence_tokens": TOKENS},
    }
