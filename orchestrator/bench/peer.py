"""The other side of the benchmark: an ordinary transformers + peft training loop, as its documentation writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.models import resolve_model
from parallel.engine import IGNORED_LABEL, MicroBatch
from parallel.seeding import kaiming_uniform


def open_theirs(job: Any, learning_rate: float) -> Callable[[MicroBatch], float]:
    """A LoRA model of peft with torch's fused AdamW and gradient clipping (the defaults of transformers' Trainer).

    Weights are in the job's precision and adapters in fp32, as peft makes them. Attention is sdpa. Our initial A goes
    into the adapters, so that both sides start from the same point.

    Returns:
        A function that takes one optimizer step on a batch and returns its loss.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(job.model.path), dtype=dtype, attn_implementation="sdpa", use_cache=False
    )
    tuner = job.tuner
    config = LoraConfig(r=tuner.r, lora_alpha=tuner.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    peft_model.train()
    trained = {name: each for name, each in peft_model.named_parameters() if each.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".lora_A." in name:
                logical = name.replace(".lora_A.default.", ".lora_A.")
                parameter.copy_(kaiming_uniform((parameter.shape[0], parameter.shape[1]), job.seed, "lora_A", logical))
    adam = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0, fused=True)

    def step(batch: MicroBatch) -> float:
        adam.zero_grad()
        loss = peft_model(input_ids=batch.tokens, attention_mask=real(batch), labels=unshifted(batch.labels)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), job.optimizer.clip_norm)
        adam.step()
        return float(loss.detach())

    return step


def unshifted(labels: Any) -> Any:
    """Labels as transformers wants them: ``[b, t]`` names the token at ``t``, and the model shifts."""
    import torch

    first = torch.full_like(labels[:, :1], IGNORED_LABEL)
    return torch.cat([first, labels[:, :-1]], dim=1)


def real(batch: MicroBatch) -> Any:
    """The attention mask: 1 up to and with the token that the last label of a row names."""
    import torch

    learned = (batch.labels != IGNORED_LABEL).long()
    ends = batch.labels.shape[1] - learned.flip(1).argmax(1) + 1
    return (torch.arange(batch.labels.shape[1]) < ends.unsqueeze(1)).long()
