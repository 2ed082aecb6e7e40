"""The oracle of LoRA training is transformers + peft: same batches, same initial adapter, same losses and adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.seeding import kaiming_uniform, normal
from parallel.topology import Topology
from tests.helpers import runs
from tests.helpers.cells import in_grid
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

LOSS_RTOL, TENSOR_RTOL = 1e-5, 1e-4
STEPS = 4
PLACES = {"one": Topology(), "tp3": Topology(tp=3), "tp2-pp2": Topology(tp=2, pp=2)}


def backward(run: Run, step: int, model: torch.nn.Module) -> float:
    """The mean loss over the label tokens of a global batch, and its gradients."""
    rows = runs.global_batch(run, step)
    tokens, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    logits = model(tokens).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    return loss.item()


def train_with_peft(run: Run, folder: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """An ordinary loop over the same global batches; the adapter starts from the values that the seed gives."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = list(run.targets) if isinstance(run.targets, tuple) else run.targets
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=run.rslora, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        key = name.replace(".default", "")
        if ".lora_embedding_B" in name:
            parameter.data.copy_(normal(tuple(parameter.shape), 1.0, run.seed, "lora_embedding_B", key))
        if ".lora_A." in name:
            parameter.data.copy_(kaiming_uniform(tuple(parameter.shape), run.seed, "lora_A", key))  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=0.0)
    losses, norms = [], []
    for step in range(run.steps):
        optimizer.zero_grad()
        losses.append(backward(run, step, model))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    return losses, norms, {key: value.detach() for key, value in adapter.items()}


def weights(states: list[list[tuple[Any, ...]]]) -> dict[str, torch.Tensor]:
    return {name: value for (name, kind), value in runs.merge(states).items() if kind == "weight"}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"rslora": True}),
        ("llama", {"targets": ("q_proj", "v_proj", "down_proj")}),
        ("qwen2", {}),
        ("qwen2", {"targets": ("lm_head", "embed_tokens", "q_proj")}),
        ("gemma3_text", {"targets": ("embed_tokens", "q_proj")}),
        ("qwen3", {}),
        ("qwen3_moe", {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}),
        ("deepseek_v3", {"targets": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}),
    ],
    ids=[
        "llama",
        "llama-rslora",
        "llama-some-targets",
        "qwen2",
        "qwen2-ends",
        "gemma3-embedding",
        "qwen3",
        "qwen3_moe",
        "deepseek_v3",
    ],
)
@pytest.mark.parametrize("place", in_grid(["one", "tp2-pp2"]))
def test_training_equals_peft(
    pool: Pool, tiny_model: Callable[..., Path], family: str, changes: dict[str, Any], place: str
) -> None:
    folder, topology = tiny_model(family), PLACES[place]
    run = Run(family, topology, steps=STEPS, **changes)
    run = run.on(sp=run.model.is_moe and topology.tp > 1)
    found = pool.run(topology.world_size, runs.train, run, str(folder))
    losses, norms, adapter = train_with_peft(run, folder)
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    ours = weights([state for _, _, state in found])
    assert ours.keys() == adapter.keys()
    for name, value in adapter.items():
        assert torch.linalg.vector_norm(ours[name] - value) <= TENSOR_RTOL * torch.linalg.vector_norm(value), name


@pytest.mark.parametrize("place", in_grid(["one", "tp3"], finer=["one"]))
def test_full_training_equals_transformers(pool: Pool, tiny_model: Callable[..., Path], place: str) -> None:
    from transformers import AutoModelForCausalLM

    folder, topology = tiny_model("llama"), PLACES[place]
    run = Run("llama", topology, steps=3, full=True, learning_rate=1e-4)
    found = pool.run(topology.world_size, runs.train, run, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(run.steps):
        optimizer.zero_grad()
        losses.append(backward(run, step, model))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    ours, theirs = weights([state for _, _, state in found]), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.linalg.vector_norm(ours[name] - value) <= TENSOR_RTOL * torch.linalg.vector_norm(value), name
