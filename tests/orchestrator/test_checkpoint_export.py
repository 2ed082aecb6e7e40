"""Exports mean what PEFT and transformers make of them; what is not ours is never overwritten."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint import export as export_module
from orchestrator.checkpoint.adapter import adapter_config, lora_pairs, lora_scale
from orchestrator.checkpoint.export import export_adapter, export_merged
from orchestrator.checkpoint.folder import MARKER
from orchestrator.checkpoint.hf_reader import AdapterReader
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.config.job import TunerConfig
from orchestrator.errors import ConfigError, DataError, ResourceError
from parallel.shards import Box, Shard

TARGETS = {"q_proj": (16, 16), "v_proj": (8, 16), "down_proj": (16, 24)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in three shards, made by transformers, with a stand-in for tokenizer files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "model"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="9KB")
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def matrices(seed: int = 1, r: int = 4) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        for target, (rows, columns) in TARGETS.items():
            part = "mlp" if target == "down_proj" else "self_attn"
            stem = f"base_model.model.model.layers.{layer}.{part}.{target}"
            yield f"{stem}.lora_A.weight", torch.randn(r, columns, generator=generator) / 4
            yield f"{stem}.lora_B.weight", torch.randn(rows, r, generator=generator) / 4


def save_adapter(folder: Path, base: Path, tuner: TunerConfig, **changes: Any) -> Path:
    """A checkpoint of an adapter with random matrices."""
    shards = [Shard(name, "weight", tuple(m.shape), Box.whole(tuple(m.shape)), m) for name, m in matrices(r=tuner.r)]
    shards.append(Shard(shards[0].name, "exp_avg", shards[0].shape, shards[0].box, shards[0].data))
    config = {**adapter_config(tuner, list(TARGETS), str(base)), **changes}
    files = {"adapter_config.json": json.dumps(config).encode()}
    return save(folder, 5, shards, Contents("adapter", {"step": 5}, files))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(2, 12)).logits


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        for path in folder.iterdir()
    }


TUNERS = [
    (TunerConfig(r=4, alpha=8.0), {}),
    (TunerConfig(r=4, alpha=3.5, rslora=True), {}),
    (TunerConfig(r=4, alpha=8.0), {"alpha_pattern": {"v_proj": 20, r"layers\.1\..*q_proj": 2}}),
]


@pytest.mark.parametrize(("tuner", "changes"), TUNERS, ids=["plain", "rslora", "alpha_pattern"])
def test_an_export_is_what_peft_makes_of_it(tmp_path: Path, base: Path, tuner: TunerConfig, changes: dict) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    before = digests(base)
    checkpoint = save_adapter(tmp_path / "checkpoints", base, tuner, **changes)
    export_adapter(checkpoint, tmp_path / "peft")
    export_merged(checkpoint, base, tmp_path / "merged")

    plain = LlamaForCausalLM.from_pretrained(base)
    by_hand = LlamaForCausalLM.from_pretrained(base)
    loaded = dict(matrices(r=tuner.r))
    for name, weight in by_hand.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in loaded:
            config = json.loads((checkpoint / "adapter/adapter_config.json").read_bytes())
            scale = lora_scale(config, stem.removeprefix("base_model.model."), tuner.r)
            weight.data += scale * loaded[f"{stem}.lora_B.weight"] @ loaded[f"{stem}.lora_A.weight"]
    for adapter in (checkpoint / "adapter", tmp_path / "peft"):
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
        assert (logits_of(model) - logits_of(by_hand)).abs().max() < 1e-5
        assert (logits_of(model) - logits_of(plain)).abs().max() > 1e-2
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits_of(merged) - logits_of(model)).abs().max() < 1e-5
    oracle = model.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert (weight - oracle[name]).abs().max() <= 1e-6, name
    assert digests(base) == before
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == sorted(
        path.name for path in base.glob("*.safetensors")
    )
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


def test_a_merge_is_computed_in_fp32_and_cast_once(tmp_path: Path, base: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    for path in half.glob("*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    checkpoint = save_adapter(tmp_path / "checkpoints", half, TunerConfig(r=4, alpha=8.0))
    name = "model.layers.1.self_attn.q_proj"
    a, b = (dict(matrices())[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}

    expected = weights(half)[f"{name}.weight"].float() + 2.0 * (b @ a)
    for precision, dtype in ((None, torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):
        out = tmp_path / f"out-{precision}"
        export_merged(checkpoint, half, out, precision)
        merged = weights(out)
        assert {value.dtype for value in merged.values()} == {dtype}
        assert torch.equal(merged[f"{name}.weight"], expected.to(dtype))
        config = json.loads((out / "config.json").read_bytes())
        assert precision is None or config["dtype"] == str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match="holds an adapter: a merge needs its base model"):
        export_merged(checkpoint, None, tmp_path / "x")
    with pytest.raises(ConfigError, match="precision 'int8' is not known") as error:
        export_merged(checkpoint, half, tmp_path / "x", "int8")
    assert "bf16" in error.value.hint


def test_blocks_of_rows_merge_like_whole_tensors(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_adapter(tmp_path / "checkpoints", base, TunerConfig(r=4))
    export_merged(checkpoint, base, tmp_path / "whole")
    monkeypatch.setattr(export_module, "BUFFER_BYTES", 200)
    export_merged(checkpoint, base, tmp_path / "blocks")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        other = load_file(tmp_path / "blocks" / path.name)
        for key, value in load_file(path).items():
            assert torch.allclose(value, other[key], atol=1e-6, rtol=0)


def test_a_fully_tuned_checkpoint_is_its_own_base(tmp_path: Path, base: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    shards = [
        Shard(name, "weight", tuple(value.shape), Box.whole(tuple(value.shape)), value)
        for name, value in model.named_parameters()
    ]
    files = {"config.json": base / "config.json", "tokenizer.json": b"{}"}
    checkpoint = save(tmp_path / "c", 1, shards, Contents("model", {}, files))
    loaded = LlamaForCausalLM.from_pretrained(checkpoint / "model")
    assert torch.equal(logits_of(loaded), logits_of(model))
    export_merged(checkpoint, None, tmp_path / "out", "bf16")
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.bfloat16 and (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match="holds a full model, no adapter"):
        export_adapter(checkpoint, tmp_path / "peft")


def test_only_our_own_exports_are_replaced(tmp_path: Path, base: Path) -> None:
    checkpoint = save_adapter(tmp_path / "checkpoints", base, TunerConfig(r=4))
    out = tmp_path / "deep" / "out"
    for _ in range(2):
        export_adapter(checkpoint, out)
    with pytest.raises(ConfigError, match="out holds an export --to peft"):
        export_merged(checkpoint, base, out)
    assert (out / "adapter_config.json").exists()
    (out / "thesis.txt").write_text("mine")
    before = digests(out)
    with pytest.raises(ConfigError, match=r"out is not empty: thesis\.txt did not come from an export"):
        export_adapter(checkpoint, out)
    assert digests(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file"):
        export_adapter(checkpoint, tmp_path / "file")
    for inside in (base, base / "new", checkpoint / "new"):
        with pytest.raises(ConfigError, match="which is only read"):
            export_merged(checkpoint, base, inside)
    (tmp_path / "empty").mkdir()
    export_adapter(checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / MARKER).exists()


def test_a_failing_export_leaves_nothing(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_adapter(tmp_path / "checkpoints", base, TunerConfig(r=4))
    (tmp_path / "room").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/some/disk")

    monkeypatch.setattr(export_module.FileWriter, "write", full)
    with pytest.raises(ResourceError, match=r"no space left: /some/disk.*bytes are needed") as error:
        export_merged(checkpoint, base, tmp_path / "room" / "out")
    assert "set OUT on another disk" in error.value.hint
    assert not list((tmp_path / "room").iterdir())


def test_a_damaged_adapter_is_not_exported(tmp_path: Path, base: Path) -> None:
    checkpoint = save_adapter(tmp_path / "checkpoints", base, TunerConfig(r=4))
    weights = checkpoint / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    for export in (export_adapter, lambda c, out: export_merged(c, base, out)):
        with pytest.raises(DataError, match=r"adapter_model\.safetensors is damaged: sha256"):
            export(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is an adapter of type 'IA3'"),
        ({"use_dora": True}, "has use_dora=True, but no .*down_proj.lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\], but no weight of lm_head"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', only plain LoRA"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(tmp_path: Path, base: Path, changes: dict, message: str) -> None:
    checkpoint = save_adapter(tmp_path / "checkpoints", base, TunerConfig(r=4), **changes)
    with pytest.raises(ConfigError, match=message):
        export_merged(checkpoint, base, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lm_head.lora_A.weight": (2, 16), "lm_head.lora_B.weight": (40, 2)}, r"has no lm_head\.weight, which"),
        (
            {"model.embed_tokens.lora_embedding_A": (2, 40), "model.embed_tokens.lora_embedding_B": (16, 2)},
            r"is tied to model\.embed_tokens\.weight, and merging would change both",
        ),
        ({"model.norm.lora_A.weight": (2, 16)}, "model.norm.lora_A.weight without its partner"),
        ({"model.norm.lora_magnitude_vector": (2,)}, "model.norm.lora_magnitude_vector without its partner"),
        ({"model.norm.lora_embedding_C": (2,)}, "lora_embedding_C, which is no LoRA matrix"),
        (
            {"model.layers.0.mlp.up_proj.lora_A.weight": (2, 5), "model.layers.0.mlp.up_proj.lora_B.weight": (24, 2)},
            r"up_proj.weight has shape \(24, 16\) in .*, the adapter's update is \(24, 2\) @ \(2, 5\)",
        ),
        (
            {"model.layers.7.mlp.up_proj.lora_A.weight": (2, 5), "model.layers.7.mlp.up_proj.lora_B.weight": (24, 2)},
            r"has no model\.layers\.7\.mlp\.up_proj\.weight, which the adapter changes",
        ),
    ],
)
def test_updates_that_fit_no_base_weight_are_named(tmp_path: Path, base: Path, tensors: dict, message: str) -> None:
    shards = [
        Shard(f"base_model.model.{name}", "weight", shape, Box.whole(shape), torch.zeros(shape))
        for name, shape in tensors.items()
    ]
    files = {"adapter_config.json": json.dumps(adapter_config(TunerConfig(), "all-linear", "")).encode()}
    checkpoint = save(tmp_path / "c", 1, shards, Contents("adapter", {}, files))
    with pytest.raises(ConfigError, match=message) as error:
        export_merged(checkpoint, base, tmp_path / "out")
    assert "lm_head" not in message or "tied" in error.value.hint


def test_a_base_that_peft_saved_beside_its_adapter_is_named(tmp_path: Path) -> None:
    """As it does where the output layer is adapted."""
    whole = torch.zeros(40, 16)
    save_file({"base_model.model.lm_head.base_layer.weight": whole}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(TunerConfig(), ["lm_head"], "")))
    with pytest.raises(ConfigError, match=r"lm_head\.base_layer\.weight, a whole weight of the base") as error:
        lora_pairs(AdapterReader(tmp_path), tmp_path)
    assert "save_embedding_layers=False" in error.value.hint


def test_quantised_bases_are_refused(tmp_path: Path, base: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    for path in quantised.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, path)
    checkpoint = save_adapter(tmp_path / "checkpoints", base, TunerConfig(r=4))
    with pytest.raises(ConfigError, match=r"has type F8_E4M3 in .*: nothing can be merged into quantised weights"):
        export_merged(checkpoint, quantised, tmp_path / "out")


def test_types_that_cannot_be_written_are_refused(tmp_path: Path, base: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    header = b'{"extra":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'
    header += b" " * (-len(header) % 8)
    index = json.loads((odd / "model.safetensors.index.json").read_bytes())
    index["weight_map"]["extra"] = "odd.safetensors"
    (odd / "model.safetensors.index.json").write_text(json.dumps(index))
    (odd / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    checkpoint = save_adapter(tmp_path / "checkpoints", base, TunerConfig(r=4))
    with pytest.raises(ConfigError, match="extra has type F99, which is not supported"):
        export_merged(checkpoint, odd, tmp_path / "out")
