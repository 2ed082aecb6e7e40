"""Building a sharded GPTModel of megatron-core, with its base weights filled in from logical tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, mappings
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel import names
from parallel.device import stand_in_for_cuda
from parallel.dora import DoraLinear, DoraRouter
from parallel.engine import EngineSpec, TensorReader
from parallel.engines import megatron_quantised as quantised
from parallel.engines import megatron_rates as rates
from parallel.engines.megatron_experts import finalize_with_experts, number_tokens
from parallel.engines.megatron_rotary import Rotary
from parallel.groups import Groups
from parallel.lora import (
    ExpertPlace,
    Kinds,
    LoraContext,
    LoraLinear,
    Regions,
    adapter_tensors,
    wrap_layer,
)
from parallel.lora_ends import DoraEmbedding, DoraHead, LoraEmbedding, LoraHead
from parallel.provider import block_spec
from parallel.quantised import QuantisedLinear
from parallel.rotary import frequencies
from parallel.seeding import DropoutClock, normal
from parallel.sequence import SequenceCut
from parallel.shards import Piece
from parallel.specs import ModelSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMMUNICATION = {"ring": "p2p", "ulysses": "a2a"}
INITIAL_STD = 0.02


class HiddenGPTModel(GPTModel):
    """A GPTModel whose last stage returns hidden states ``[s, b, hidden]``: the loss makes the logits, in blocks."""

    head_adapter: LoraHead | None

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the output layer ``[padded vocab / tp, hidden]`` (the last stage has them)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def process_groups(groups: Groups) -> ProcessGroupCollection:
    """Our groups under megatron-core's names."""
    collection = ProcessGroupCollection(**{name: group for name, group in groups.by_name.items() if name != "world"})
    collection.embd = groups.embd
    collection.pos_embd = None
    collection.intra_dp_cp = groups.by_name["dp_cp"]
    collection.intra_expt_dp = groups.by_name["expt_dp"]
    collection.inter_dist_opt = None
    collection.intra_dist_opt = groups.by_name["world"]
    return collection


def regions(groups: Groups) -> Regions:
    """The differentiable tensor-parallel collectives that adapters use."""
    group, expert_group = groups.by_name["tp"], groups.by_name["expt_tp"]
    return Regions(
        copy=lambda value: mappings.copy_to_tensor_model_parallel_region(value, group=group),
        reduce=lambda value: mappings.reduce_from_tensor_model_parallel_region(value, group=group),
        gather=lambda value: mappings.gather_from_sequence_parallel_region(value, group=group),
        scatter=lambda value: mappings.reduce_scatter_to_sequence_parallel_region(value, group=group),
        sum_expert=lambda value: mappings.reduce_from_tensor_model_parallel_region(value, group=expert_group),
    )


def transformer_config(spec: EngineSpec, groups: Groups, on_host: bool = False) -> TransformerConfig:
    """megatron-core's config of this model on this topology; ``on_host``: weights are made on the CPU."""
    model, topology = spec.model, groups.topology
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        layernorm_zero_centered_gamma=model.norm_offset,
        softmax_scale=_score_scale(model),
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # megatron-core's name for an activation module: the provider's, whatever is above
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=spec.vpp,
        context_parallel_size=topology.cp,
        cp_comm_type=COMMUNICATION[spec.cp_comm],
        expert_model_parallel_size=topology.ep,
        expert_tensor_parallel_size=topology.etp,
        sequence_parallel=spec.sp,
        params_dtype=DTYPES[spec.precision],
        pipeline_dtype=DTYPES[spec.precision],
        bf16=spec.precision == "bf16",
        perform_initialization=False,
        use_cpu_initialization=device == "cpu" or spec.quantise is not None or on_host,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_comm=device == "cuda",
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_with_experts(groups),
        **_recompute(spec.recompute),
        **_experts(spec),
    )


def _score_scale(model: ModelSpec) -> float | None:
    """What attention scores are multiplied with; None for ``1/sqrt(head_dim)``."""
    if model.latent is not None:
        return model.score_scale  # the temperature is of the rotary part alone, where the layer sees to it
    factor = model.rope_scaling.score_factor if model.rope_scaling else 1.0
    if not model.score_scale and factor == 1:
        return None
    return factor * (model.score_scale or model.head_dim**-0.5)


def _recompute(kind: str) -> dict[str, Any]:
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective"} if kind == "selective" else {}


def _experts(spec: EngineSpec) -> dict[str, Any]:
    model = spec.model
    if not model.is_moe:
        return {}
    return {
        "num_moe_experts": model.experts,
        "moe_router_topk": model.experts_per_token,
        "moe_ffn_hidden_size": model.expert_ffn,
        "moe_shared_expert_intermediate_size": model.shared_ffn or None,
        "moe_router_pre_softmax": not model.normalise_expert_weights,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": spec.capacity_factor,
    }


def build_chunks(spec: EngineSpec, groups: Groups, clock: DropoutClock, on_host: bool = False) -> list[HiddenGPTModel]:
    """Build this rank's pipeline chunks, wrap adapters on, freeze what is not trained; weights are filled later.

    Args:
        on_host: make weights on the CPU, where they take no memory before they are written: others will replace them.
    """
    stand_in_for_cuda()
    _name_rng_stream()
    if not hasattr(moe_utils, "te_general_gemm"):  # unbound in megatron-core 0.16.1 without transformer-engine
        moe_utils.te_general_gemm = None
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # where sequence parallelism gathers into
        parallel_state._set_global_memory_buffer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformer_config(spec, groups, on_host)
        chunks = [_build_chunk(spec, groups, config, virtual) for virtual in range(spec.vpp or 1)]
    for virtual, chunk in enumerate(chunks):
        if spec.quantise is not None:
            layers = zip(chunk_layers(spec, groups, virtual), chunk.decoder.layers, strict=True)
            quantised.replace_linears(spec, groups, layers, regions(groups))
        _mark_cut_tensors(spec, groups, chunk, virtual)
        if spec.lora is None:
            rates.set_apart(spec, _base_tensors(spec.model, groups, chunk, chunk_layers(spec, groups, virtual)))
            _let_hidden_states_require_grad(spec, chunk)
            continue
        chunk.requires_grad_(False)
        context = LoraContext(
            spec.model,
            spec.lora,
            spec.seed,
            groups.topology.tp,
            groups.coordinate("tp"),
            regions(groups),
            spec.sp,
            clock,
            expert_place(groups),
        )
        _adapt_ends(chunk, context)
        for layer, index in zip(chunk.decoder.layers, chunk_layers(spec, groups, virtual), strict=True):
            kinds = Kinds(DoraLinear, DoraRouter) if spec.lora.dora else Kinds()
            drops = spec.lora.dropout and spec.model.has_experts(index)
            tokens = number_tokens(layer, groups, clock, spec.sp, process_groups(groups)) if drops else None
            wrap_layer(layer, index, context, kinds, tokens)
        base = _base_tensors(spec.model, groups, chunk, chunk_layers(spec, groups, virtual))
        rates.set_adapters_apart(spec.lora, chunk, base)
        _let_hidden_states_require_grad(spec, chunk)
    return chunks


def _adapt_ends(chunk: HiddenGPTModel, context: LoraContext) -> None:
    """Put adapters on the embedding and the output layer, where they are targets and this chunk has them."""
    if chunk.post_process and names.HEAD_MODULE in context.lora.targets:
        head = DoraHead if context.lora.dora else LoraHead
        chunk.head_adapter = head(context, chunk.head_weight)
    if chunk.pre_process and names.EMBEDDING_MODULE in context.lora.targets:
        embedding = DoraEmbedding if context.lora.dora else LoraEmbedding
        table = chunk.embedding.word_embeddings
        chunk.embedding_adapter = adapter = embedding(context, partial(getattr, table, "weight"))

        def adapted(module: Any, args: Any, inputs: dict[str, Any], embedded: torch.Tensor) -> torch.Tensor:
            return adapter(inputs["input_ids"], embedded)

        chunk.embedding.register_forward_hook(adapted, with_kwargs=True, prepend=True)  # before it is scaled


def expert_place(groups: Groups) -> ExpertPlace:
    """Which experts this rank holds, and which cut of them."""
    topology = groups.topology
    return ExpertPlace(topology.ep, groups.index("ep"), topology.etp, groups.index("expt_tp"))


def _mark_cut_tensors(spec: EngineSpec, groups: Groups, chunk: HiddenGPTModel, virtual: int) -> None:
    """Say which weights are cut over tp: megatron-core only does so while it initialises them, which we do not let it.

    Without the mark every rank but the first would take its share for a replica, and leave it out of the gradient norm.

    Say too which weights are experts', so that their gradients are summed over the ranks that hold the same experts.
    megatron-core only does so with ep > 1; with ep = 1 and tp > 1 the tp ranks, which send different tokens to the
    experts that they all hold, would each learn from their own tokens and drift apart.
    """
    for tensor, piece in _base_tensors(spec.model, groups, chunk, chunk_layers(spec, groups, virtual)):
        tensor.tensor_model_parallel = piece.box.size != piece.shape  # type: ignore[attr-defined]
        tensor.allreduce = ".experts." not in piece.name  # type: ignore[attr-defined]


def _name_rng_stream() -> None:
    """megatron-core's embedding forks this stream under sequence parallelism, for a dropout that is always 0 here."""
    tracker, name = get_cuda_rng_tracker(), "model-parallel-rng"
    if name not in tracker.get_states():
        tracker.add(name, 0)


def _build_chunk(spec: EngineSpec, groups: Groups, config: TransformerConfig, virtual: int) -> HiddenGPTModel:
    model, topology = spec.model, groups.topology
    stage, last = groups.coordinate("pp"), (spec.vpp or 1) - 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chunk = HiddenGPTModel(
        config=config,
        transformer_layer_spec=block_spec(model, chunk_layers(spec, groups, virtual), config, device),
        vocab_size=names.padded_vocab(model.vocab, topology.tp),
        max_sequence_length=model.max_positions,
        pre_process=stage == 0 and virtual == 0,
        post_process=stage == topology.pp - 1 and virtual == last,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        pg_collection=process_groups(groups),
        vp_stage=virtual if spec.vpp else None,
    )
    chunk.head_adapter = None
    turns = frequencies(model.rope_theta, model.head_dim, model.rope_scaling)
    chunk.rotary_pos_emb = Rotary(turns, SequenceCut(topology.cp, groups.coordinate("cp")))
    if model.embedding_scale != 1 and chunk.pre_process:
        chunk.embedding.register_forward_hook(lambda module, inputs, out: out * out.new_tensor(model.embedding_scale))
    return chunk


def chunk_layers(spec: EngineSpec, groups: Groups, virtual: int) -> tuple[int, ...]:
    """Global layer indices of one of this rank's chunks."""
    return spec.stages[virtual * groups.topology.pp + groups.coordinate("pp")]


def _let_hidden_states_require_grad(spec: EngineSpec, chunk: HiddenGPTModel) -> None:
    """A frozen embedding under activation recompute would cut the graph, and the stage would train nothing."""
    if spec.recompute == "none" or not chunk.pre_process or chunk.embedding.word_embeddings.weight.requires_grad:
        return
    chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def tensors(spec: EngineSpec, groups: Groups, chunks: list[HiddenGPTModel]) -> Iterator[tuple[torch.Tensor, Piece]]:
    """Every local tensor with each logical piece in it: adapters first, then base weights, in a fixed order."""
    for chunk in chunks:
        yield from adapter_tensors(chunk)
    for virtual, chunk in enumerate(chunks):
        yield from _base_tensors(spec.model, groups, chunk, chunk_layers(spec, groups, virtual))


def _base_tensors(
    model: ModelSpec, groups: Groups, chunk: HiddenGPTModel, layers: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, Piece]]:
    tp, rank = groups.topology.tp, groups.coordinate("tp")
    if chunk.pre_process:
        yield chunk.embedding.word_embeddings.weight, names.vocab_piece(names.EMBEDDING, model, tp, rank)
    for layer, index in zip(chunk.decoder.layers, layers, strict=True):
        held = names.layer_names(model, index)
        for path, name in held.norms + held.fixed:
            parameter = layer.get_parameter(path)
            yield parameter, names.whole_piece(names.layer_prefix(index) + name, tuple(parameter.shape))
        for linear in names.linears(model, index, groups.topology.ep, groups.index("ep")):
            module = layer.get_submodule(linear.path)
            base = module.base if isinstance(module, LoraLinear) else module
            cut = (groups.topology.etp, groups.index("expt_tp")) if linear.expert else (tp, rank)
            bias: torch.Tensor | None = base.bias  # type: ignore[assignment]
            if not isinstance(base, QuantisedLinear):  # which has no weight of its own
                weight: torch.Tensor = base.weight  # type: ignore[assignment]
                for piece in names.weight_pieces(linear, model, index, *cut):
                    yield weight, piece
            if bias is not None:
                for piece in names.bias_pieces(linear, model, index, tp, rank):
                    yield bias, piece
    if chunk.post_process:
        norm = chunk.decoder.final_layernorm.weight
        yield norm, names.whole_piece(names.FINAL_NORM, tuple(norm.shape))
        if not (model.tied_embeddings and chunk.pre_process):
            name = names.EMBEDDING if model.tied_embeddings else names.HEAD
            yield chunk.head_weight(), names.vocab_piece(name, model, tp, rank)


def fill_base(
    spec: EngineSpec,
    groups: Groups,
    chunks: list[HiddenGPTModel],
    reader: TensorReader | None,
    there: frozenset[int] = frozenset(),
) -> None:
    """Fill the base weights: slices of a Hugging Face folder, or (``reader`` None) random ones keyed by their names.

    Each rank reads only the rows and columns that it holds; rows that pad the vocabulary are zero.

    Args:
        there: ``id`` of parameters that have their values already.
    """
    with torch.no_grad():
        for virtual, chunk in enumerate(chunks):
            for tensor, piece in _base_tensors(spec.model, groups, chunk, chunk_layers(spec, groups, virtual)):
                if id(tensor) in there:
                    continue
                if piece.local.size[0] < tensor.shape[0] and piece.name in (names.EMBEDDING, names.HEAD):
                    tensor[piece.local.size[0] :].zero_()
                if 0 in piece.box.size:
                    continue
                tensor[piece.local.slices].copy_(base_values(spec, reader, piece))
            if spec.quantise is not None:
                layers = zip(chunk_layers(spec, groups, virtual), chunk.decoder.layers, strict=True)
                quantised.fill(spec, groups, layers, lambda piece: base_values(spec, reader, piece))


def base_values(spec: EngineSpec, reader: TensorReader | None, piece: Piece) -> torch.Tensor:
    """The base's values of a piece, as they are stored or (without a reader) drawn."""
    return reader.read(piece.name, "weight", piece.box) if reader else _random(spec, piece)


def start_adapters(chunks: list[HiddenGPTModel]) -> None:
    """Give adapters the start that depends on the base's weights; all tensor-parallel ranks call it, after the fill."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DoraLinear | DoraRouter | DoraEmbedding):
                module.start()


def _random(spec: EngineSpec, piece: Piece) -> torch.Tensor:
    if piece.name.endswith("norm.weight"):
        return torch.full(piece.box.size, 0.0 if spec.model.norm_offset else 1.0)
    if piece.name.endswith("bias"):
        return torch.zeros(piece.box.size)
    return normal(piece.shape, INITIAL_STD, spec.seed, "weight", piece.name)[piece.box.slices]
