"""megatron-core's own GPTModel, of its own layers, with its own dist_checkpointing: what torch_dist is held against.

Which rows of a Hugging Face model lie where is said here once more, after NVIDIA's converters for Llama (q, k and v of
each key/value group one under the other; gate over up on each tensor-parallel rank), and not taken from parallel/.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from parallel.device import stand_in_for_cuda
from parallel.specs import ModelSpec
from parallel.topology import Topology
from tests.helpers.exported import hf_weights


def build(spec: ModelSpec, topology: Topology, vocab: int) -> Any:
    """This rank's GPTModel, with ``vocab`` rows in its tables."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    layer = get_gpt_layer_local_spec(
        num_experts=spec.experts or None, qk_layernorm=spec.qk_norm, normalization="RMSNorm"
    )
    if spec.is_moe:  # as transformer-engine's layers have it, where no linear follows the norm before a router
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    experts = {
        "num_moe_experts": spec.experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.expert_ffn,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    config = TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        expert_model_parallel_size=topology.ep,
        expert_tensor_parallel_size=topology.etp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=True,  # which also marks what is cut, for the norm of gradients
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **(experts if spec.is_moe else {}),
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=vocab,
        max_sequence_length=spec.max_positions,
        pre_process=stage == 0,
        post_process=stage == topology.pp - 1,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
    )


def expected(model: Any, hf: dict[str, torch.Tensor], spec: ModelSpec, topology: Topology, vocab: int) -> Iterator[Any]:
    """``(name, parameter, what it should hold)`` of every parameter of this rank."""
    tp, rank = topology.tp, parallel_state.get_tensor_model_parallel_rank()
    etp, expert_rank = topology.etp, parallel_state.get_expert_tensor_parallel_rank()
    first_expert = parallel_state.get_expert_model_parallel_rank() * (spec.experts // topology.ep)

    def table(name: str) -> torch.Tensor:
        whole = torch.zeros(vocab, spec.hidden)
        whole[: spec.vocab] = hf[name]
        return whole.chunk(tp)[rank]

    def fused_qkv(layer: str, leaf: str) -> torch.Tensor:
        q, k, v = (
            hf[f"{layer}.self_attn.{part}_proj.{leaf}"].unflatten(0, (spec.kv_heads, -1)) for part in ("q", "k", "v")
        )
        return torch.cat([q, k, v], dim=1).flatten(0, 1).chunk(tp)[rank]

    def in_layer(layer: str, name: str) -> torch.Tensor:
        path, size, at, leaf = f"{layer}.mlp.", tp, rank, name.removeprefix("mlp.")
        if name.startswith("mlp.experts."):
            number, _, leaf = name.removeprefix("mlp.experts.local_experts.").partition(".")
            path, size, at = f"{layer}.mlp.experts.{first_expert + int(number)}.", etp, expert_rank
        if leaf == "linear_fc1.weight":
            return torch.cat([hf[f"{path}{part}.weight"].chunk(size)[at] for part in ("gate_proj", "up_proj")])
        if leaf == "linear_fc2.weight":
            return hf[f"{path}down_proj.weight"].chunk(size, dim=1)[at]
        if name == "mlp.router.weight":
            return hf[f"{layer}.mlp.gate.weight"]
        if name.startswith("self_attention.linear_qkv."):
            return fused_qkv(layer, name.rpartition(".")[2])
        if name == "self_attention.linear_proj.weight":
            return hf[f"{layer}.self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
        norms = {
            "input_layernorm.weight": "input_layernorm.weight",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        }
        return hf[f"{layer}.{norms[name]}"]

    ends = {
        "embedding.word_embeddings.weight": lambda: table("model.embed_tokens.weight"),
        "output_layer.weight": lambda: table("model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"),
        "decoder.final_layernorm.weight": lambda: hf["model.norm.weight"],
    }
    for name, parameter in model.named_parameters():
        if name in ends:
            yield name, parameter, ends[name]()
            continue
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layer = model.decoder.layers[int(number)].layer_number - 1
        yield name, parameter, in_layer(f"model.layers.{layer}", rest)


@contextmanager
def opened(topology: Topology) -> Iterator[None]:
    """megatron-core's own global groups; an engine of ours in this worker before has made its buffer already."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is not None:
        parallel_state.destroy_global_memory_buffer()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        expert_model_parallel_size=topology.ep,
        expert_tensor_parallel_size=topology.etp,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def metadata(style: str) -> dict[str, Any]:
    """What megatron-core's ``sharded_state_dict`` is told."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"dp_cp_group": group, "singleton_local_shards": style == "numbered"}


def sharded(model: Any, style: str) -> Any:
    """``stacked``: layers and experts on axes of one tensor. ``numbered``: layers, experts, gate and up have keys."""
    return model.sharded_state_dict(metadata=metadata(style))


def save(spec: ModelSpec, hf_folder: Path, out: Path, topology: Topology, style: str, vocab: int) -> None:
    """Write a torch_dist checkpoint of a model that holds the folder's weights."""
    stand_in_for_cuda()
    with opened(topology), torch.no_grad():
        model = build(spec, topology, vocab)
        for _, parameter, value in expected(model, hf_weights(hf_folder), spec, topology, vocab):
            parameter.copy_(value)
        write(sharded(model, style), out, style)


def write(state: Any, out: Path, style: str, **arguments: Any) -> None:
    """Let dist_checkpointing save a sharded state."""
    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False  # megatron-core writes in processes of its own, which daemons may not have
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=style == "numbered")
    if style == "numbered":  # Megatron-LM's own choice: data-parallel ranks share the work; plans are kept
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    dist_checkpointing.save(state, str(out), strategy, **arguments)
    process._config["daemon"] = True


def differing(spec: ModelSpec, hf_folder: Path, checkpoint: Path, topology: Topology, vocab: int) -> tuple[int, list]:
    """Load a torch_dist checkpoint as megatron-core does; how many parameters, and which are not the folder's."""
    stand_in_for_cuda()
    with opened(topology), torch.no_grad():
        model = build(spec, topology, vocab)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        state = dist_checkpointing.load(sharded(model, "stacked"), str(checkpoint))
        model.load_state_dict({name: value for name, value in state.items() if isinstance(value, torch.Tensor)})
        found = list(expected(model, hf_weights(hf_folder), spec, topology, vocab))
        return len(found), [name for name, parameter, value in found if not torch.equal(parameter, value)]
