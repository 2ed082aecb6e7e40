"""What transformers and peft say: they make the small model, and read what a cell has saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPREAD = 4.0  # times transformers' initial weights, so that logits are of size 1 and a wrong term shows


def make_model(config: Mapping[str, Any], folder: Path, seed: int) -> None:
    """A random model of this config as a Hugging Face folder; norms and biases are no plain ones and zeros."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _quietly()
    rest = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(SPREAD)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.float().save_pretrained(folder)


def logits(folder: Path, adapter: Path | None, probe: list[list[int]]) -> Any:
    """The logits of a model's folder, with an adapter on it if there is one: float32 ``[rows, tokens, vocabulary]``."""
    import torch
    from transformers import AutoModelForCausalLM

    _quietly()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(probe)).logits.numpy()


def _quietly() -> None:
    """No progress bars and no advice: a certificate reads and writes tiny models by the dozen."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
