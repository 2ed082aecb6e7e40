"""Experts on disk mean in PEFT and transformers what they mean here, joined or not, both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.assemble import check_adapter, room
from orchestrator.checkpoint.adapter import lora_pairs
from orchestrator.checkpoint.export import export_adapter, export_merged
from orchestrator.checkpoint.hf_reader import AdapterReader, HfReader
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.config.job import JobConfig, ModelConfig, TunerConfig
from orchestrator.errors import ConfigError
from parallel import names
from parallel.families import read_model
from parallel.shards import Box, Shard
from parallel.specs import ModelSpec, read_hf_config

R, ALPHA = 4, 8.0
KV_B_PROJ = "model.layers.3.self_attn.kv_b_proj.weight"
EVERYTHING = ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]
EVERYTHING_OF_MIXTRAL = ["q_proj", "gate", "w1", "w3", "w2"]
TARGETS: dict[str, Any] = {
    "everything": EVERYTHING,
    "gate-and-up": ["gate_proj", "up_proj"],
    "down": ["down_proj"],
    "router": ["gate"],
    "some-layers": r"model\.layers\.(1|2)\.(self_attn\.k_proj|mlp\.experts\.\d+\.down_proj)|.*\.3\.mlp\.gate",
}
TARGETS_OF_DEEPSEEK: dict[str, Any] = {
    "everything": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *EVERYTHING[1:]],
    "gate-and-up": ["gate_proj", "up_proj"],
    "shared": r".*\.shared_experts\..*",
    "dense": r".*layers\.[01]\.mlp\.(up|down)_proj|.*kv_b_proj",
}
Model = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tiny_model: Model) -> Path:
    """Experts apart, as transformers saves them."""
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def joined_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with joined experts."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("joined")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(folder / "model.safetensors")
    return folder


def job_of(base: Path, targets: Any, **tuner: Any) -> JobConfig:
    return JobConfig(model=ModelConfig(path=str(base)), tuner=TunerConfig(r=R, alpha=ALPHA, targets=targets, **tuner))


def matrices(spec: ModelSpec, targets: Any) -> dict[str, torch.Tensor]:
    """Random halves of every adapter, B too."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    chosen = names.resolve_targets(targets, spec)
    for layer in range(spec.layers):
        for linear in names.linears(spec, layer):
            for part in linear.parts:
                if names.layer_prefix(layer) + part[1] in chosen:
                    for piece in names.adapter_pieces(linear, part, spec, layer, R, 1, 0):
                        found[piece.name] = torch.randn(piece.shape, generator=generator) / 3
    return found


def save_checkpoint(folder: Path, job: JobConfig, spec: ModelSpec) -> Path:
    held = matrices(spec, job.tuner.targets).items()
    shards = [Shard(name, "weight", tuple(m.shape), Box.whole(tuple(m.shape)), m) for name, m in held]
    return save(folder, 1, shards, Contents("adapter", {}, room(job, spec).files))


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def merged_by_hand(base: Path, job: JobConfig, spec: ModelSpec) -> Any:
    """transformers' model with ``scale * B @ A`` added to every adapted logical weight."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    held = matrices(spec, job.tuner.targets)
    scale = ALPHA / (R**0.5 if job.tuner.rslora else R)
    with torch.no_grad():
        for name, a in held.items():
            if ".lora_A." not in name:
                continue
            update = scale * held[name.replace("lora_A", "lora_B")] @ a
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            module = module.replace("block_sparse_moe", "mlp")
            if ".experts." not in module:
                model.get_submodule(module).weight += update
                continue
            experts, number, leaf = module.rsplit(".", 2)
            joined = model.get_submodule(experts)
            if leaf in ("down_proj", "w2"):
                joined.down_proj[int(number)] += update
            else:
                joined.gate_up_proj[int(number)].chunk(2)[leaf in ("up_proj", "w3")].add_(update)
    return model


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("which", TARGETS)
def test_peft_loads_checkpoint_and_export(tmp_path: Path, base: Path, which: str, rslora: bool) -> None:
    assert_peft_loads(tmp_path, base, TARGETS[which], rslora)


@pytest.mark.parametrize("which", TARGETS_OF_DEEPSEEK)
def test_linears_that_share_the_names_of_experts_are_loaded_too(tmp_path: Path, tiny_model: Model, which: str) -> None:
    """Dense layers and shared experts of DeepSeek, which PEFT would take for experts."""
    assert_peft_loads(tmp_path, tiny_model("deepseek_v3"), TARGETS_OF_DEEPSEEK[which], rslora=which == "everything")


def assert_peft_loads(tmp_path: Path, base: Path, targets: Any, rslora: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = read_model(read_hf_config(base))
    job = job_of(base, targets, rslora=rslora)
    checkpoint = save_checkpoint(tmp_path / "c", job, spec)
    export_adapter(checkpoint, tmp_path / "peft")
    expected = logits_of(merged_by_hand(base, job, spec))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (logits_of(plain) - expected).abs().max() > 0.1
    for folder in (checkpoint / "adapter", tmp_path / "peft"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        assert (logits_of(loaded) - expected).abs().max() <= 1e-4, folder
    held, back = matrices(spec, job.tuner.targets), AdapterReader(tmp_path / "peft")
    assert set(back.names) == set(held)
    for name, value in held.items():
        assert back.shape(name) == tuple(value.shape)
        assert torch.equal(back.read(name, "weight", Box.whole(tuple(value.shape))), value)
    for pair in lora_pairs(back, tmp_path / "peft").values():
        assert pair.scale == pytest.approx(ALPHA / (R**0.5 if rslora else R))
    check_adapter(job_of(base, targets, rslora=rslora, path=str(tmp_path / "peft")), spec)


def test_experts_of_mixtral_have_its_names_apart_and_common_ones_joined(tmp_path: Path, tiny_model: Model) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_model("mixtral")
    joined_base = tmp_path / "joined"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.save_pretrained(joined_base, save_original_format=False)
    spec, job = read_model(read_hf_config(base)), job_of(base, EVERYTHING_OF_MIXTRAL)
    checkpoint = save_checkpoint(tmp_path / "c", job, spec)
    export_adapter(checkpoint, tmp_path / "peft")
    expected = logits_of(merged_by_hand(base, job, spec))
    for folder in (checkpoint / "adapter", tmp_path / "peft"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        assert (logits_of(loaded) - expected).abs().max() <= 1e-4, folder
    for stored in (base, joined_base):
        export_merged(checkpoint, stored, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert (logits_of(merged) - expected).abs().max() <= 1e-4, stored
    back, apart, joined = AdapterReader(tmp_path / "peft"), HfReader(base), HfReader(joined_base)
    for name, value in matrices(spec, job.tuner.targets).items():
        assert torch.equal(back.read(name, "weight", Box.whole(tuple(value.shape))), value), name
    for name in apart.names:
        box = Box.whole(apart.shape(name))
        assert torch.equal(joined.read(name, "weight", box), apart.read(name, "weight", box)), name
    check_adapter(job_of(base, EVERYTHING_OF_MIXTRAL, path=str(tmp_path / "peft")), spec)


def test_a_merge_keeps_layers_that_predict_further_tokens(tmp_path: Path, tiny_model: Model) -> None:
    """DeepSeek-V3's files hold one more layer, which is no part of the model: it stays as it is."""
    base = shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    further = {name: value for name, value in tensors.items() if ".layers.3." in name}
    further = {name.replace(".layers.3.", ".layers.4."): 2 * value for name, value in further.items()}
    save_file({**tensors, **further}, base / "model.safetensors", {"format": "pt"})
    spec, job = read_model(read_hf_config(base)), job_of(base, ["kv_b_proj"])
    export_merged(save_checkpoint(tmp_path / "c", job, spec), base, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == tensors.keys() | further.keys()
    assert all(torch.equal(merged[name], value) for name, value in further.items())
    assert not torch.equal(merged[KV_B_PROJ], tensors[KV_B_PROJ])


def test_an_export_is_what_peft_itself_writes(tmp_path: Path, base: Path) -> None:
    """Same names, shapes, values and settings as PEFT's save_pretrained after it has loaded the checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = read_model(read_hf_config(base))
    checkpoint = save_checkpoint(tmp_path / "c", job_of(base, EVERYTHING), spec)
    export_adapter(checkpoint, tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(plain, checkpoint / "adapter").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    mine, other = (json.loads((tmp_path / who / "adapter_config.json").read_bytes()) for who in ("ours", "theirs"))
    for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"):
        assert mine[key] == other[key], key
    assert {name.split("mlp.")[1].removeprefix("experts.") for name in mine["target_parameters"]} == set(
        other["target_parameters"]
    )


def test_boxes_of_joined_tensors_are_boxes_of_logical_ones(tmp_path: Path, base: Path, joined_base: Path) -> None:
    spec = read_model(read_hf_config(base))
    apart, joined = HfReader(base), HfReader(joined_base)
    assert set(apart.names) == set(joined.names)
    for name in apart.names:
        shape = apart.shape(name)
        assert joined.shape(name) == shape and joined.dtype(name) == apart.dtype(name)
        box = Box(tuple(size // 3 for size in shape), tuple(size // 2 for size in shape))
        assert torch.equal(joined.read(name, "weight", box), apart.read(name, "weight", box))
    with pytest.raises(ValueError, match="does not lie in it"):
        joined.read("model.layers.0.mlp.experts.1.up_proj.weight", "weight", Box((0, 0), (33, 1)))
    with pytest.raises(KeyError):
        joined.shape("model.layers.0.mlp.experts.4.up_proj.weight")
    export_adapter(save_checkpoint(tmp_path / "c", job_of(base, EVERYTHING), spec), tmp_path / "peft")
    adapter, name = (
        AdapterReader(tmp_path / "peft"),
        "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight",
    )
    part = matrices(spec, EVERYTHING)[name][3:7, 1:3]
    assert torch.equal(adapter.read(name, "weight", Box((3, 1), (4, 2))), part)
    with pytest.raises(ValueError, match="does not lie in it"):
        adapter.read(name, "weight", Box((0, 0), (33, 1)))


@pytest.mark.parametrize("stored", ["apart", "joined"])
def test_a_merge_into_experts(tmp_path: Path, base: Path, joined_base: Path, stored: str) -> None:
    from transformers import AutoModelForCausalLM

    spec = read_model(read_hf_config(base))
    job = job_of(base, EVERYTHING)
    checkpoint = save_checkpoint(tmp_path / "c", job, spec)
    export_merged(checkpoint, {"apart": base, "joined": joined_base}[stored], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = merged_by_hand(base, job, spec).state_dict()
    for name, value in merged.state_dict().items():
        assert (value - expected[name]).abs().max() <= 1e-6, name


def test_an_adapter_that_gate_and_up_share_is_refused(tmp_path: Path, base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=R, target_modules=["gate_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"one dense adapter over gate and up of its experts") as error:
        AdapterReader(tmp_path)
    assert "merge_and_unload" in error.value.hint


def test_target_parameters_that_are_not_known_are_refused(tmp_path: Path, base: Path) -> None:
    spec = read_model(read_hf_config(base))
    export_adapter(save_checkpoint(tmp_path / "c", job_of(base, ["gate"]), spec), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "target_parameters": ["gate.weight", "mixer.weight"]}))
    with pytest.raises(ConfigError, match=r"target_parameters=\['mixer.weight'\], only plain LoRA"):
        lora_pairs(AdapterReader(tmp_path / "peft"), tmp_path / "peft")
