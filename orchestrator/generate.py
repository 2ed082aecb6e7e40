"""Text from a trained run, by transformers and peft: nothing of ours computes here, so others will see the same."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.exporting import base_folder


@dataclass(frozen=True)
class Generated:
    """One prompt and what was said to it. ``before``: by the base model, None when it was not asked."""

    prompt: str
    text: str
    before: str | None = None


def generate(path: Path, prompts: Sequence[str], max_new_tokens: int = 64, compare: bool = False) -> list[Generated]:
    """Answer prompts greedily with a run's newest checkpoint.

    Args:
        path: a run folder, one checkpoint, a PEFT adapter folder or a model folder.
        prompts: user turns, each answered for itself.
        max_new_tokens: longest answer.
        compare: answer with the base model as well (LoRA only).
    Raises:
        ConfigError: there is nothing to load at ``path``, or nothing that PEFT has a place for.
        DataError: the checkpoint is damaged.
    """
    base, adapter = find_weights(path.expanduser())
    if compare and adapter is None:
        raise ConfigError(f"{path} holds no adapter, so there is no base to compare with", "leave out --compare")
    model, tokenizer = _load(base, adapter)
    answers = []
    for prompt in prompts:
        text = _answer(model, tokenizer, prompt, max_new_tokens)
        before = None
        if compare:
            with model.disable_adapter():
                before = _answer(model, tokenizer, prompt, max_new_tokens)
        answers.append(Generated(prompt, text, before))
    return answers


def find_weights(path: Path) -> tuple[Path, Path | None]:
    """The model folder and, for LoRA, the adapter folder behind a run, a checkpoint, an adapter or a model.

    Raises:
        ConfigError: nothing of these is there.
    """
    if (path / "adapter_config.json").is_file():
        return base_folder(path), path
    if (path / "config.json").is_file():
        return path, None
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}", "isotrain generate RUN_DIR --prompt TEXT")
    from orchestrator.checkpoint.load import open_checkpoint

    checkpoint = open_checkpoint(path).folder
    if (checkpoint / "adapter").is_dir():
        return base_folder(checkpoint), checkpoint / "adapter"
    return checkpoint / "model", None


def _load(base: Path, adapter: Path | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from orchestrator.checkpoint.export import check_peft
    from orchestrator.checkpoint.hf_reader import adapter_files, weight_files

    weight_files(base)  # raises where there are only pickles, which those libraries would open
    if adapter is not None:
        adapter_files(adapter)
        check_peft(adapter)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # transformers and peft speak to each other there, not to our user
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = {"local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto", use_safetensors=True, **ours)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(str(base), **ours)


def _answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    import torch

    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        rows = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        rows = tokenizer(prompt, return_tensors="pt")
    rows = rows.to(model.device)
    with torch.no_grad():
        output = model.generate(**rows, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
