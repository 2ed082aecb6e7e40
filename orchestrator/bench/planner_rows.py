"""Rows of published runs, read as setups. What was not printed is filled in by rules, each of them named here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.planning.devices import Device, device, nearest_variant
from orchestrator.planning.setup import Setup, Software
from orchestrator.planning.shape import Shape
from parallel.specs import LatentAttention

DEEPSEEK = LatentAttention(query_rank=1536, latent_rank=512, plain_dim=128, rotary_dim=64, value_dim=128)
"""Latent attention of rows that say no more than that it is (DeepSeek-V3, arXiv:2412.19437, section 4.2; smaller ones
make queries without a latent)."""
PRECISIONS = {
    "fp4": ("fp4",),
    "fp8": ("fp8",),
    "fp16": ("fp16", "float16"),
    "fp32": ("fp32", "float32"),
}
"""Spellings of precisions in rows; all others are bf16."""
MOST = {"pp": 4096, "vpp": 4096, "layers": 100_000, "seq": 1 << 40}
MOST_RANKS = 1 << 24
"""What is larger is a slip of whoever typed the row."""
STAND_IN = "A100-80GB"
"""Where no kind of device was printed and only memory was measured, which does not depend on it."""


class Unreadable(ValueError):
    """A row that cannot be predicted; the message says why."""


def setup_of_row(row: dict[str, Any]) -> Setup:
    """The setup of a row.

    Raises:
        Unreadable: a size that nothing can stand in for is missing, or sizes contradict each other.
    """
    shape = shape_of_row(row)
    if not row.get("gpu") and (row.get("scorable") or {}).get("time"):
        raise Unreadable("the kind of device was not printed")
    printed = str(row.get("gpu") or STAND_IN)
    try:
        kind = nearest_variant(printed) or device(printed)
    except ConfigError as error:
        raise Unreadable(str(error)) from error
    return _setup(row, shape, kind)


def precision_of(row: dict[str, Any]) -> str:
    """The precision of the matrix products, however it is spelled; bf16 where it was not printed.

    Example:
        >>> [precision_of({"precision": text}) for text in ("FP8-blockwise", "mxfp8", "bf16-mixed", "nvfp4", None)]
        ['fp8', 'fp8', 'bf16', 'fp4', 'bf16']
    """
    text = str(row.get("precision") or "").lower()
    for name, spellings in PRECISIONS.items():
        if "bfloat16" not in text and any(spelling in text for spelling in spellings):
            return name
    return "bf16"


def shape_of_row(row: dict[str, Any]) -> Shape:
    """The model's shape; whether its MLP is gated is what agrees best with the printed count of parameters."""
    model = row.get("model") or {}
    sizes = {name: _whole(model.get(name)) for name in ("layers", "hidden", "heads")}
    missing = [name for name, value in sizes.items() if value < 1]
    if missing:
        raise Unreadable(f"model.{missing[0]} was not printed")
    name, hidden, heads = str(model.get("name") or "").lower(), sizes["hidden"], sizes["heads"]
    attention = str(model.get("attn") or "").lower()
    experts = _whole(model.get("experts"))
    expert_ffn = _whole(model.get("moe_ffn")) or _whole(model.get("ffn"))
    ffn = _whole(model.get("ffn")) or expert_ffn or 4 * hidden
    latent = None
    if "mla" in attention or "deepseek" in name or "mla" in name:
        latent = DEEPSEEK if hidden >= 4096 else replace(DEEPSEEK, query_rank=0)
    shared = _whole(model.get("shared_experts"))
    plain = Shape(
        layers=sizes["layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=_whole(model.get("kv_heads")) or heads,
        head_dim=_whole(model.get("head_dim")) or (128 if hidden % heads or "qwen3" in name else hidden // heads),
        ffn=ffn,
        vocab=_whole(model.get("vocab")) or 51200,
        tied=bool(model.get("tied")) or model.get("untied") is False,
        experts=experts,
        experts_per_token=_whole(model.get("topk")) or (1 if experts else 0),
        expert_ffn=expert_ffn if experts else 0,
        shared_ffn=_whole(model.get("shared_ffn")) or shared * expert_ffn,
        dense_layers=_whole(model.get("dense_layers")) if experts else 0,
        latent=latent,
        hybrid="mamba" in attention or bool(model.get("hybrid")),
    )
    return _likeliest(plain, model, name)


def _likeliest(plain: Shape, model: dict[str, Any], name: str) -> Shape:
    """Gated or not, tied or not: as printed, else what comes nearest to the printed count of parameters."""
    gates = [True, False]
    if model.get("swiglu") is not None:
        gates = [bool(model["swiglu"])]
    elif model.get("activation") in ("gelu", "relu", "squared_relu") or plain.hybrid:
        gates = [False]
    ties = [plain.tied] if model.get("tied") is not None or model.get("untied") is not None else [True, False]
    billions = model.get("params_b")
    if not isinstance(billions, int | float) or billions <= 0:
        looks_gated = plain.experts > 0 or plain.kv_heads < plain.heads or plain.ffn != 4 * plain.hidden
        gated = gates[0] if len(gates) == 1 else looks_gated and "gpt" not in name
        return replace(plain, gated=gated, tied=ties[0] if len(ties) == 1 else not gated)
    every = [replace(plain, gated=gated, tied=tied) for gated in gates for tied in ties]
    return min(every, key=lambda one: (round(abs(one.parameters() / 1e9 / billions - 1), 3), one.tied))


def _setup(row: dict[str, Any], shape: Shape, kind: Device) -> Setup:
    sizes = {axis: max(1, _whole(row.get(axis)) or 1) for axis in ("tp", "pp", "cp", "ep", "vpp")}
    gpus = _whole(row.get("gpus"))
    split = sizes["tp"] * sizes["pp"] * sizes["cp"]
    dp = _whole(row.get("dp")) or (gpus // split if gpus >= split else 0)
    sequences, micro, tokens = (_whole(row.get(key)) for key in ("gbs", "mbs", "seq"))
    dp = dp or 1
    large = {**sizes, "dp": dp, "layers": shape.layers, "seq": tokens, "gbs": sequences, "mbs": micro}
    for name, size in large.items():
        if size > MOST.get(name, MOST_RANKS):
            raise Unreadable(f"{name}={size:.6g} is no size of a run")
    if not tokens:
        raise Unreadable("the sequence length was not printed")
    if not micro and not sequences:
        raise Unreadable("neither the micro-batch nor the global batch was printed")
    micro = micro or 1
    sequences = sequences or micro * dp
    software = software_of(row)
    old = is_old(str(row.get("framework") or "").lower())
    recompute = str(row.get("recompute") or "")
    zero = _whole(row.get("zero")) or (1 if row.get("dist_opt") else 0)
    if row.get("zero") is None and row.get("dist_opt") is None and not old:
        zero = 1
    sp = row.get("sp")
    if sp is None:
        sp = sizes["tp"] > 1 and not old
    per_node = _whole(row.get("gpus_per_node")) or min(8, kind.domain)
    etp = _whole(row.get("etp")) or (sizes["tp"] if shape.experts else 1)
    made = Setup(
        shape=shape,
        device=kind,
        gpus_per_node=per_node,
        tokens=tokens,
        micro=micro,
        sequences=sequences,
        dp=dp,
        sp=bool(sp),
        etp=etp if shape.experts else 1,
        stages=stage_sizes(shape.layers, sizes["pp"]),
        zero=zero,
        shard_ranks=_shard_ranks(row, dp),
        recompute=recompute.split(":")[0].split(" ")[0] or "none",
        precision=precision_of(row),
        frozen=str(row.get("peft") or "none") != "none",
        adapter_rank=(_whole(row.get("lora_rank")) or 8) if str(row.get("peft") or "none") != "none" else 0,
        adapts_all="all" in str(row.get("target_modules") or ""),
        quantised="qlora" in str(row.get("peft") or ""),
        offload=bool(row.get("optimizer_cpu_offload") or row.get("cpu_offload")),
        network_rate=network_of(row, per_node),
        software=software,
        tp=sizes["tp"],
        pp=sizes["pp"],
        cp=sizes["cp"],
        ep=sizes["ep"],
        vpp=sizes["vpp"],
    )
    if not recompute and old:
        made = _with_recompute(made)
    return made


def _with_recompute(setup: Setup) -> Setup:
    """Where recompute was not printed: the least of it that fits the device."""
    from orchestrator.planning.memory import fits

    for recompute in ("none", "selective"):
        if fits(replace(setup, recompute=recompute), setup.device.memory_bytes):
            return replace(setup, recompute=recompute)
    return replace(setup, recompute="full")


def stage_sizes(layers: int, pp: int) -> tuple[int, ...]:
    """Layers per stage: even, or one less on the ends (as programs place them that cannot divide)."""
    counts = [layers // pp] * pp
    order = sorted(range(pp), key=lambda stage: (stage in (0, pp - 1), stage))
    for stage in order[: layers % pp]:
        counts[stage] += 1
    return tuple(counts)


def software_of(row: dict[str, Any]) -> Software:
    """What the program of a row does, by its name and year."""
    name = str(row.get("framework") or "").lower()
    old = is_old(name)
    backend = (row.get("args") or {}).get("--attention-backend")
    unfused = old or "megatron-lm@2023" in name or backend == "unfused"
    half = str(row.get("precision") or "fp16").lower() == "fp16"
    modern = any(word in name for word in ("nemo", "bridge", "megatron-core"))
    return Software(
        fused_attention=not unfused,
        overlaps=not old and "nanotron" not in name,
        overlaps_tensor=modern,
        gradient_bytes=2 if old or "fsdp" in name or "deepspeed" in name or "internevo" in name else 4,
        summed_bytes=2 if old and half else 4,
        low_gradients="nanotron" in name or "internevo" in name or ("deepspeed" in name and not half),
        sends_once="nemo" in name or "bridge" in name,
        operators=30 if modern else 110 if "nanotron" in name else 60,
        fused=modern or old or "megatron" in name or "megascale" in name,
        native_attention=modern,
        scatters_sends="deepspeed" not in name,
        loops_experts="transformers" in name,
        layer_messages=12 if "deepspeed" in name else 1,
        broadcasts_shards="internevo" in name,
    )


def is_old(framework: str) -> bool:
    """Whether a program is from before fused attention and overlapped reductions were usual."""
    year = re.search(r"20(1\d|2\d)", framework)
    return bool(year and int(year.group()) <= 2022) or "vtrain" in framework or "bigscience" in framework


def network_of(row: dict[str, Any], per_node: int) -> float:
    """Bytes/s of a device's share of the network, where the row prints it; else 0."""
    text = str(row.get("interconnect") or "")
    each = re.search(r"(\d+)\s*x\s*(\d+)\s*Gb?", text)
    if each:
        return int(each.group(1)) * int(each.group(2)) / 8 * 1e9 / per_node
    links = re.search(r"(\d+) Omni-Path links", text)
    if links:
        return int(links.group(1)) * 100 / 8 * 1e9 / per_node
    node = re.search(r"inter-node (\d+) Gb/s|(\d+) Gbps node-node", text)
    if node:
        return int(node.group(1) or node.group(2)) / 8 * 1e9 / per_node
    per_gpu = re.search(r"(\d+) ?Gb/s (?:per GPU|IB)", text)
    return int(per_gpu.group(1)) / 8 * 1e9 if per_gpu else 0.0


def _shard_ranks(row: dict[str, Any], dp: int) -> int:
    group = row.get("zero_group")
    return min(group, dp) if isinstance(group, int) and group > 0 else 0


def _whole(value: Any) -> int:
    """A size; 0 where none was printed, or what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return max(0, int(value)) if is_number else 0
