"""The oracle of adapters: an ordinary transformers + peft loop over the same global batches in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.seeding import DropoutClock, kaiming_uniform, normal
from tests.helpers import runs
from tests.helpers.runs import Run

Prepare = Callable[[Any], None]


class SampleDropout(torch.nn.Module):
    """Dropout by our masks where PEFT has its own random ones: what it does with the dropped input stays PEFT's."""

    def __init__(self, clock: DropoutClock, module: str, rate: float) -> None:
        super().__init__()
        self.clock, self.module, self.rate = clock, module, rate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[sequences, tokens, features]``."""
        if not self.training:
            return hidden
        mask = self.clock.mask(self.module, hidden.shape[1], hidden.shape[2], 1 - self.rate)
        return hidden * (mask.transpose(0, 1).to(hidden.dtype) / (1 - self.rate))


def backward(run: Run, step: int, model: Any, clock: DropoutClock) -> float:
    """The mean loss over the label tokens of a global batch, and its gradients."""
    rows = runs.global_batch(run, step)
    tokens, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    clock.announce(0, tuple(row[2] for row in rows))
    logits = model(tokens).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    return float(loss.detach())


def make_model(run: Run, folder: Path, **config: Any) -> tuple[Any, DropoutClock]:
    """PEFT's model of a run; A (of an embedding B) starts from the values that the seed gives."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = list(run.targets) if isinstance(run.targets, tuple) else run.targets
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": run.rslora,
        "use_dora": run.dora,
        "lora_dropout": run.dropout,
    }
    if run.modules_to_save:
        settings["modules_to_save"] = list(run.modules_to_save)
        settings["ensure_weight_tying"] = run.model.tied_embeddings
    model: Any = get_peft_model(base, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings | config))
    clock = DropoutClock(run.seed, run.tokens)
    for name, module in model.named_modules():
        if run.dropout and hasattr(module, "lora_dropout"):
            logical = name.removeprefix("base_model.model.")
            module.lora_dropout["default"] = SampleDropout(clock, logical, run.dropout)
    if "init_lora_weights" not in config:
        for name, parameter in model.named_parameters():
            key = name.replace(".default", "")
            if ".lora_embedding_B" in name:
                parameter.data.copy_(normal(tuple(parameter.shape), 1.0, run.seed, "lora_embedding_B", key))
            if ".lora_A." in name:
                parameter.data.copy_(kaiming_uniform(tuple(parameter.shape), run.seed, "lora_A", key))  # type: ignore[arg-type]
    return model, clock


def train(run: Run, model: Any, clock: DropoutClock, optimizer: Any = None) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the run's steps; ``optimizer`` is AdamW over all that is trained, if None."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=0.0)
    model.train()
    losses, norms = [], []
    for step in range(run.steps):
        optimizer.zero_grad()
        losses.append(backward(run, step, model, clock))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
    return losses, norms


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """The adapter under the keys that PEFT saves it by, without the whole ends of the base that it may add."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {key: value.detach() for key, value in state.items() if ".base_layer." not in key}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> float:
    """Same names, and each tensor within the tolerance in relative Frobenius norm; returns the worst error."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, value in theirs.items():
        error = float(torch.linalg.vector_norm(ours[name] - value) / torch.linalg.vector_norm(value))
        assert error <= tolerance, f"{name}: {error:.1e}"
        worst = max(worst, error)
    return worst
