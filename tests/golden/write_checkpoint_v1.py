"""How ``checkpoint-v1`` was written, once, by the code of format_version 1. It is never written again.

python -m tests.golden.write_checkpoint_v1
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from orchestrator.checkpoint.adapter import adapter_config
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import SavePolicy, save
from orchestrator.config.job import TunerConfig
from parallel.shards import Box, Shard

FOLDER = Path(__file__).parent / "checkpoint-v1"


def shards() -> Iterator[Shard]:
    """LoRA matrices of two layers and their moments: counted numbers, no random ones."""
    for layer in (0, 10):
        for part, shape in (("lora_A", (3, 5)), ("lora_B", (4, 3))):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight"
            for offset, kind in ((0, "weight"), (100, "exp_avg"), (200, "exp_avg_sq")):
                data = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) / 8 + layer + offset
                yield Shard(name, kind, shape, Box.whole(shape), data)


def main() -> None:
    """Write it."""
    config = adapter_config(TunerConfig(r=3, alpha=6.0), ["q_proj"], "base")
    state = {"step": 3, "samples_consumed": 24, "optimizer_steps": 3, "seed": 0}
    files = {"adapter_config.json": json.dumps(config, indent=1).encode()}
    about = {"topology": {"pp": 1, "dp": 1, "cp": 1, "tp": 1}}
    save(FOLDER, 3, shards(), Contents("adapter", state, files, about), policy=SavePolicy(file_bytes=400))


if __name__ == "__main__":
    main()
