"""What generate finds behind a path, and that its answers are those of transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.generate import find_weights, generate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(16)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(str(model)), lora).save_pretrained(str(folder))
    return folder


def test_model_and_adapter_folders_are_told_apart(model: Path, adapter: Path) -> None:
    assert find_weights(model) == (model, None)
    assert find_weights(adapter) == (model, adapter)


def test_compare_shows_the_base_beside_the_adapter(model: Path, adapter: Path) -> None:
    (base,) = generate(model, ["w2 w3"], max_new_tokens=6)
    (both,) = generate(adapter, ["w2 w3"], max_new_tokens=6, compare=True)
    assert both.before == base.text and both.text != base.text and len(both.text.split()) == 6


def test_a_model_without_an_adapter_has_nothing_to_compare(model: Path) -> None:
    with pytest.raises(ConfigError, match="holds no adapter") as raised:
        generate(model, ["w2"], compare=True)
    assert raised.value.hint == "leave out --compare"


def test_nothing_at_a_path_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        find_weights(tmp_path / "none")
    with pytest.raises(ConfigError, match="nothing was saved there"):
        find_weights(tmp_path)
