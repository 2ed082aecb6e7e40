"""What a job becomes on a rank: which adapters a run may start from, and what lies beside the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.assemble import check_adapter, lora_spec, room
from orchestrator.checkpoint.adapter import adapter_config
from orchestrator.config.job import JobConfig, ModelConfig, TunerConfig
from orchestrator.errors import ConfigError
from parallel.families import read_model
from tests.helpers import runs

CONFIG = runs.config("llama")
MODEL = read_model(CONFIG)
JOB = JobConfig(
    model=ModelConfig(weights="random", config=CONFIG), tuner=TunerConfig(r=4, alpha=8.0, targets=["q_proj", "v_proj"])
)


def write_adapter(folder: Path, modules: tuple[str, ...] = ("q_proj", "v_proj"), r: int = 4, **changes: Any) -> Path:
    """An adapter folder as PEFT writes it."""
    tensors = {}
    for layer in range(MODEL.layers):
        for name in modules:
            where = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{where}.lora_A.weight"] = torch.zeros(r, 48)
            tensors[f"{where}.lora_B.weight"] = torch.zeros(48, r)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = adapter_config(TunerConfig(r=4, alpha=8.0), list(modules), "base") | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def starting_from(folder: Path, **changes: Any) -> JobConfig:
    return replace(JOB, tuner=replace(JOB.tuner, path=str(folder), **changes))


def test_an_adapter_that_fits_is_taken(tmp_path: Path) -> None:
    check_adapter(starting_from(write_adapter(tmp_path / "a")), MODEL)
    check_adapter(JOB, MODEL)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"r": 8}, "tuner.r=8 but r 4 in the adapter", "tuner.r=4"),
        ({"alpha": 16.0}, "tuner.alpha=16.0 but lora_alpha 8 in the adapter", "tuner.alpha=8"),
        ({"rslora": True}, "tuner.rslora=True but use_rslora False in the adapter", "tuner.rslora=false"),
        ({"r": 2, "alpha": 1.0}, "tuner.r=2 but r 4 in the adapter, tuner.alpha", "tuner.r=4 tuner.alpha=8"),
        ({"targets": ["q_proj"]}, "4 more, first model.layers.0.self_attn.v_proj", "tuner.targets=[q_proj,v_proj]"),
        ({"targets": "all-linear"}, "20 that it lacks, first model.layers.0.mlp", "tuner.targets=[q_proj,v_proj]"),
        ({"name": "full"}, "tuner=full trains the model itself", "tuner=lora"),
    ],
)
def test_the_hint_makes_the_job_fit_the_adapter(
    tmp_path: Path, changes: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_adapter(starting_from(write_adapter(tmp_path / "a"), **changes), MODEL)
    assert message in str(caught.value) and caught.value.hint == hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "has use_dora=True, but no base_model.model.model.layers.0.self_attn.q_proj.lora_mag"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save="),
        ({"alpha_pattern": {"v_proj": 32}}, "v_proj.weight has rank 4 and scale 8, but the job has rank 4 and scale 2"),
        ({"peft_type": "IA3"}, "adapter of type 'IA3'"),
    ],
)
def test_what_would_mean_something_else_here_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_adapter(starting_from(write_adapter(tmp_path / "a", **changes)), MODEL)
    assert message in str(caught.value)


def test_a_rank_that_only_the_tensors_have_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"q_proj\.weight has rank 2 and scale 4"):
        check_adapter(starting_from(write_adapter(tmp_path / "a", r=2)), MODEL)


def test_the_adapter_folder_says_which_modules_by_their_last_names() -> None:
    everything = replace(JOB, tuner=replace(JOB.tuner, targets="all-linear"))
    beside = room(everything, MODEL)
    config = json.loads(bytes(beside.files["adapter_config.json"]))  # type: ignore[arg-type]
    leaves = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert beside.name == "adapter" and config["target_modules"] == leaves
    expression = replace(JOB, tuner=replace(JOB.tuner, targets=r".*layers\.[01]\..*q_proj"))
    config = json.loads(bytes(room(expression, MODEL).files["adapter_config.json"]))  # type: ignore[arg-type]
    assert config["target_modules"] == r".*layers\.[01]\..*q_proj"


def test_a_full_model_folder_carries_config_and_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(json.dumps(CONFIG))
    full = replace(JOB, tuner=TunerConfig(name="full"), model=ModelConfig(path=str(tmp_path)))
    assert set(room(full, MODEL).files) == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert {type(file) for file in room(full, MODEL).read().files.values()} == {bytes}
    assert lora_spec(full.tuner, MODEL) is None
    scratch = room(replace(full, model=JOB.model), MODEL)
    assert scratch.name == "model" and json.loads(bytes(scratch.files["config.json"])) == CONFIG  # type: ignore[arg-type]


def test_whole_weights_in_an_adapter_are_compared_with_the_job(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", modules_to_save=["embed_tokens"])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(101, 48)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="has trained the embedding apart from the head") as caught:
        check_adapter(starting_from(folder), MODEL)
    assert caught.value.hint == "train it in PEFT with ensure_weight_tying=True"
    untied = replace(MODEL, tied_embeddings=False)
    with pytest.raises(ConfigError, match=r"holds 1 whole weights, but tuner.modules_to_save=\[\] names 0") as caught:
        check_adapter(starting_from(folder), untied)
    assert caught.value.hint == "tuner.modules_to_save=[embed_tokens]"
    check_adapter(starting_from(folder, modules_to_save=["embed_tokens"]), untied)


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", ["lm_head", "q_proj"]])
def test_an_adapter_on_the_ends_of_a_model_is_named_for_peft(targets: str | list[str]) -> None:
    job, untied = replace(JOB, tuner=replace(JOB.tuner, targets=targets)), replace(MODEL, tied_embeddings=False)
    config = json.loads(bytes(room(job, untied).files["adapter_config.json"]))  # type: ignore[arg-type]
    assert config["target_modules"] == (sorted(targets) if isinstance(targets, list) else [targets])


def test_an_adapter_on_a_tied_embedding_leaves_the_head() -> None:
    """PEFT's ensure_weight_tying would put it on the head too."""
    tuner = replace(JOB.tuner, targets=["embed_tokens"], modules_to_save=["norm"])
    config = json.loads(bytes(room(replace(JOB, tuner=tuner), MODEL).files["adapter_config.json"]))  # type: ignore[arg-type]
    assert MODEL.tied_embeddings and "ensure_weight_tying" not in config
